"""The runtime's latent attention over vLLM's paged cache: a layer, its backend, and what a step tells its layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import KVCacheSpec, MLAAttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from ...config import MLAConfig
from ...models import MLAAttention
from ...runtime.attention import PagedAttention, Piece, Step, cut_pieces
from ...runtime.cache import StepTables

__all__ = ["ATTENTION_OP", "LatentAttention", "LatentBackend"]

ATTENTION_OP = "transmla_attention"


class LatentAttention(nn.Module, AttentionLayerBase):  # type: ignore[misc]
    """A native attention layer whose latents lie in vLLM's cache; takes the place of vLLM's in a decoder layer.

    Args:
        config: of the native model.
        mla: shape of this layer.
        layer_idx: which layer of the model this is.
        cos_sin: [max_position, qk_rope_head_dim], fp32: cosines of the layer's RoPE pairs, then sines.
        layer_name: under which vLLM keeps its cache and metadata.
    """

    def __init__(
        self, config: PreTrainedConfig, mla: MLAConfig, layer_idx: int, cos_sin: Tensor, layer_name: str
    ) -> None:
        super().__init__()
        with torch.device("meta"):  # whatever the weights would start from, the checkpoint has others
            native = MLAAttention(config, mla, layer_idx)
        self.native = native.to_empty(device=cos_sin.device).requires_grad_(False)
        self.paged = PagedAttention(self.native, mla, 0)
        self.cos_sin = cos_sin
        self.layer_name = layer_name
        self.kv_cache = torch.empty(0)  # until vLLM binds [num_blocks, 1, block_size, cache_dim]

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """[num_tokens, hidden_size] for the packed tokens of a step; opaque to torch.compile."""
        output = torch.empty_like(hidden_states)
        torch.ops.vllm.transmla_attention(positions, hidden_states, output, self.layer_name)
        return output

    def attend(self, positions: Tensor, hidden_states: Tensor, output: Tensor, metadata: LatentMetadata) -> None:
        """Writes the output of the step's tokens: [num_tokens, hidden_size], maybe padded."""
        for part in metadata.parts:
            tables = StepTables(positions[part.tokens], part.slot_mapping, part.block_table, part.cache_seqlens)
            step = Step(tables, part.pieces, [self.kv_cache.squeeze(1)], [self.cos_sin], batch_invariant=False)
            output[part.tokens] = self.paged(hidden_states[part.tokens].unsqueeze(0), step)[0][0]

    def get_attn_backend(self) -> type[AttentionBackend]:
        return LatentBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        # A window is left to the kernels, so all layers are of one kind and share block tables, whatever their ranks.
        return MLAAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self.paged.mla.cache_dim,
            dtype=vllm_config.model_config.dtype,
        )


class LatentBackend(AttentionBackend):  # type: ignore[misc]
    """Names what builds the metadata of ``LatentAttention``, which does the rest itself, as vLLM's Mamba layers do."""

    @staticmethod
    def get_name() -> str:
        return "TRANSMLA"

    @staticmethod
    def get_builder_cls() -> type[LatentMetadataBuilder]:
        return LatentMetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBNHC,)  # each layer's cache one dense tensor


@dataclass(frozen=True)
class Part:
    """Sequences of a step that are computed together: all have one new token, or all are pieces of prompts."""

    tokens: slice  # of the step's
    slot_mapping: Tensor  # [num_tokens], int64
    block_table: Tensor  # [batch_size, max_blocks], int32
    cache_seqlens: Tensor  # [batch_size], int32, the new tokens included
    pieces: list[Piece] | None  # None: one new token each


@dataclass(frozen=True)
class LatentMetadata(AttentionMetadata):  # type: ignore[misc]
    """What a step tells all of its layers."""

    parts: list[Part]


class LatentMetadataBuilder(AttentionMetadataBuilder[LatentMetadata]):  # type: ignore[misc]
    """Sorts a step's sequences; asks vLLM to put those with one new token in front."""

    reorder_batch_threshold = 1

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = get_layers_from_vllm_config(vllm_config, LatentAttention, layer_names)
        self.windows = {layer.paged.sliding_window for layer in layers.values()}

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> LatentMetadata:
        common = common_attn_metadata
        num_decodes = split_decodes_and_prefills(common)[0]
        parts = []
        if num_decodes:
            parts.append(_part(common, slice(0, num_decodes), slice(0, num_decodes), None))
        if num_decodes < common.num_reqs:
            rows = slice(num_decodes, common.num_reqs)
            pieces = cut_pieces(
                common.query_start_loc_cpu[num_decodes:].diff().tolist(),
                common.seq_lens[rows].tolist(),
                common.block_table_tensor[rows],
                self.kv_cache_spec.block_size,
                None if self.device.type == "cpu" else self.windows,  # ops.mla_prefill has no other kernel
            )
            parts.append(_part(common, rows, slice(num_decodes, common.num_actual_tokens), pieces))
        return LatentMetadata(parts)


def _part(common: CommonAttentionMetadata, rows: slice, tokens: slice, pieces: list[Piece] | None) -> Part:
    return Part(tokens, common.slot_mapping[tokens], common.block_table_tensor[rows], common.seq_lens[rows], pieces)


def _attention(positions: Tensor, hidden_states: Tensor, output: Tensor, layer_name: str) -> None:
    metadata, layer, _, _ = get_attention_context(layer_name)
    if metadata is None:  # vLLM is measuring memory: there is no cache yet
        output.zero_()
    else:
        layer.attend(positions, hidden_states, output, metadata)


direct_register_custom_op(ATTENTION_OP, _attention, mutates_args=["output"])
