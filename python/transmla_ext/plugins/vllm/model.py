"""Native models for vLLM: vLLM's own, each attention replaced by LatentAttention."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import maybe_prefix

from ...architectures import family
from ...checkpoint import skeleton
from ...config import MLAConfig
from ...errors import CheckpointError, UnsupportedModelError
from ...models import base_model_type
from .attention import ATTENTION_OP, LatentAttention

__all__ = ["native_class"]


@cache
def native_class(name: str) -> type[nn.Module]:
    """vLLM's class of a native architecture: `TransMLA`, then the name of the original's."""
    base_model: Any = ModelRegistry.models[name.removeprefix("TransMLA")].load_model_cls()

    class NativeModel(base_model):  # type: ignore[misc]
        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
            config = vllm_config.model_config.hf_config
            _check(vllm_config, config)
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            compilation = vllm_config.compilation_config
            shapes = [MLAConfig(**fields) for fields in config.mla]
            cos_sin = _rope_tables(config, {shape.rope_slots for shape in shapes}, vllm_config)
            for layer_idx, (layer, shape) in enumerate(zip(self.model.layers, shapes, strict=True)):
                layer_name = maybe_prefix(prefix, f"model.layers.{layer_idx}.self_attn")
                layer.self_attn = LatentAttention(config, shape, layer_idx, cos_sin[shape.rope_slots], layer_name)
                # Where vLLM looks for the layers that want a cache.
                del compilation.static_forward_context[f"{layer_name}.attn"]
                compilation.static_forward_context[layer_name] = layer.self_attn
            if compilation.splitting_ops:  # the parts of a model between these become CUDA graphs
                compilation.splitting_ops.append(f"vllm::{ATTENTION_OP}")

        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
            parameters = dict(self.named_parameters())
            loaded: set[str] = set()

            def others() -> Iterator[tuple[str, Tensor]]:
                for name, tensor in weights:
                    if ".self_attn." not in name:
                        yield from _published(name, tensor, self.config)
                        continue
                    own = name.replace(".self_attn.", ".self_attn.native.")
                    if own not in parameters:
                        raise CheckpointError(f"unexpected tensor {name}: config.json describes no such attention")
                    default_weight_loader(parameters[own], tensor)
                    loaded.add(own)

            loaded |= super().load_weights(others())
            return loaded

    NativeModel.__name__ = NativeModel.__qualname__ = name
    return NativeModel


def __getattr__(name: str) -> Any:
    if name.startswith("TransMLA"):
        return native_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _check(vllm_config: VllmConfig, config: PreTrainedConfig) -> None:
    rope_type = config.rope_parameters.get("rope_type")
    if rope_type in ("dynamic", "longrope"):
        raise UnsupportedModelError(
            f"RoPE of type {rope_type} is not supported here: its frequencies change with the length of the text, and "
            "with them keys that are in the cache; run the model with transformers"
        )
    if vllm_config.parallel_config.world_size > 1:
        raise ValueError(
            "a native TransMLA model runs on one device: the heads share one latent; set tensor_parallel_size and "
            "pipeline_parallel_size to 1, or convert with format='deepseek_v3'"
        )
    if vllm_config.cache_config.cache_dtype != "auto":
        raise ValueError(
            f"a native TransMLA model caches latents in its own dtype: leave kv_cache_dtype at 'auto', "
            f"got {vllm_config.cache_config.cache_dtype!r}"
        )


def _rope_tables(
    config: PreTrainedConfig, slots: Collection[tuple[int, ...]], vllm_config: VllmConfig
) -> dict[tuple[int, ...], Tensor]:
    """By the frequencies that a layer has: cosines and sines of every position, [max_model_len, qk_rope_head_dim]."""
    rotary: Any = skeleton(config).model.rotary_emb
    positions = torch.arange(vllm_config.model_config.max_model_len, device="cpu").unsqueeze(0)
    cos, sin = rotary(torch.zeros((), dtype=torch.float32, device="cpu"), positions)
    device = vllm_config.device_config.device
    return {each: torch.cat((cos[0][:, each], sin[0][:, each]), dim=-1).to(device) for each in slots}


def _published(name: str, tensor: Tensor, config: PreTrainedConfig) -> Iterator[tuple[str, Tensor]]:
    """A tensor under the names of published checkpoints, which vLLM loads; native ones have transformers' names."""
    stored = family(base_model_type(config.model_type) or config.model_type).stored(name, config)
    if isinstance(stored, str):
        yield stored, tensor
        return
    for names, expert in zip(stored, tensor, strict=True):
        yield from zip(names, expert.chunk(len(names)), strict=True)
