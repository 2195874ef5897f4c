"""The output formats: `transmla` (native), and `deepseek_v3` or `deepseek_v2`, which unmodified engines load."""

from __future__ import annotations

import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.progress import Progress
from torch import Tensor

from .. import models
from ..architectures import Architecture, AttentionShape
from ..checkpoint import Checkpoint, Staging, skeleton
from ..config import MLAConfig
from ..errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["Export", "Format", "NativeExport", "StockExport", "check_stock", "write_model"]

Format = Literal["transmla", "deepseek_v3", "deepseek_v2"]


class Export(ABC):
    """What a format makes of the original's tensors and of the converted attention layers."""

    # The original's RoPE frequencies that the format has, and which of its slots has them; None: any, anywhere.
    frequencies: dict[int, int] | None = None

    def __init__(self, base: PretrainedConfig, dtype: torch.dtype) -> None:
        self.base, self.dtype = base, dtype

    @abstractmethod
    def config(self, layers: Sequence[MLAConfig]) -> dict[str, Any]:
        """config.json of the converted model."""

    def attention(self, layer: MLAConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of one attention layer as the format stores them."""
        return dict(weights)

    def other(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """What becomes of a tensor of the original that is no attention weight."""
        return {name: tensor}

    def cache_dim(self, layer: MLAConfig) -> int:
        """Numbers an engine caches per token for this layer."""
        return layer.cache_dim


class NativeExport(Export):
    """The original architecture with its attention replaced; loads with `import transmla_ext`."""

    def config(self, layers: Sequence[MLAConfig]) -> dict[str, Any]:
        return _json_config(models.native_config(self.base, layers).to_dict(), self.dtype)


class StockExport(Export):
    """A DeepSeek checkpoint that unmodified engines load: dense V3, or V2 for experts with softmax routing.

    Four recipes make it equal to the native model. (1) DeepSeek normalises the latent; with the latent scaled down to
    where its mean square vanishes beside the norm's epsilon, RMSNorm is a constant factor, given back by its weight.
    (2) transformers fixes that epsilon at 1e-6 while engines take rms_norm_eps, so rms_norm_eps becomes 1e-6 and the
    residual stream is scaled by sqrt(1e-6 / original) to leave every other norm as it was. (3) The softmax scale
    (qk_nope_head_dim + qk_rope_head_dim)^-1/2 is made up for in the query projection. (4) Engines know no llama3 RoPE
    here; YaRN with the same factor equals it but for a few frequencies between the two regimes, to which no key
    component is then assigned.

    Args:
        kv_lora_rank, qk_rope_head_dim: asked for; the latent and the key may be padded.
    """

    EPS = 1e-6
    # (1000 * 2^-28)² / 1e-6 = 1e-5: a latent of that size is still scaled right to 1e-5. bf16 has fp32's exponents.
    NORM_INPUT_SCALE = 2.0**-28
    NORM_WEIGHT = 2.0**18  # the power of two next to sqrt(EPS) / NORM_INPUT_SCALE, exact in bf16; kv_b takes the rest
    ENGINE_LATENT, ENGINE_ROPE, ENGINE_HEAD = 512, 64, 128

    def __init__(
        self,
        base: PretrainedConfig,
        dtype: torch.dtype,
        architecture: Architecture,
        format: Format,
        kv_lora_rank: int,
        qk_rope_head_dim: int,
        *,
        pad_to_engine: bool | None,
    ) -> None:
        super().__init__(base, dtype)
        if reason := architecture.no_stock_export(base):
            raise UnsupportedModelError(
                f"format {format} has no place for what this {base.model_type} model has: {reason}; "
                "use format='transmla'"
            )
        if format != architecture.stock_format:
            raise UnsupportedModelError(
                f"a {base.model_type} model is exported as {architecture.stock_format}, not as {format}; "
                f"use format='{architecture.stock_format}'"
            )
        if dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"format {format} needs dtype bfloat16 or float32 (float16 underflows), got {dtype}")
        self.architecture = architecture
        self.shape: AttentionShape = architecture.shape(base)
        norm_scale = math.sqrt(self.EPS / base.rms_norm_eps)
        self.embedding_scale = norm_scale * architecture.embedding_scale(base)
        self.residual_scale = norm_scale * architecture.residual_scale(base)
        self.logits_scale = architecture.logits_scale(base)
        self.rank, self.rope_dim = kv_lora_rank, qk_rope_head_dim
        self.nope_dim = self.v_dim = self.shape.head_dim
        if self.rope_dim > self.shape.rotary_dim or self.rope_dim == self.shape.kv_dim:
            raise ValueError(
                f"format {format} has one RoPE slot per evenly spaced frequency and a key part without RoPE, which "
                f"qk_rope_head_dim={self.rope_dim} of this model does not fit; use format='transmla'"
            )
        fits = (
            self.rank <= self.ENGINE_LATENT
            and self.rope_dim <= self.ENGINE_ROPE
            and self.shape.head_dim <= self.ENGINE_HEAD
            and self.shape.rotary_dim % self.ENGINE_ROPE == 0
        )
        if pad_to_engine and not fits:
            raise ValueError(
                f"pad_to_engine: engines take kv_lora_rank <= {self.ENGINE_LATENT}, "
                f"qk_rope_head_dim <= {self.ENGINE_ROPE}, heads <= {self.ENGINE_HEAD} and every n-th RoPE frequency of "
                f"{self.ENGINE_ROPE // 2} n, got {self.rank}, {self.rope_dim}, {self.shape.head_dim} and "
                f"{self.shape.num_frequencies} frequencies; leave pad_to_engine out"
            )
        # Padding a narrower RoPE key costs cache on every engine, so that is done only when asked for.
        if pad_to_engine or (pad_to_engine is None and fits and self.rope_dim == self.ENGINE_ROPE):
            self.rank, self.rope_dim = self.ENGINE_LATENT, self.ENGINE_ROPE
            self.nope_dim = self.v_dim = self.ENGINE_HEAD
        self.frequencies = self._slots = _equal_frequencies(base, self.config([]))

    def cache_dim(self, layer: MLAConfig) -> int:
        return self.rank + self.rope_dim

    def config(self, layers: Sequence[MLAConfig]) -> dict[str, Any]:
        base = self.base
        version = self.architecture.stock_format.removeprefix("deepseek_").upper()
        num_experts = getattr(base, "num_local_experts", 0)
        config = {
            "architectures": [f"Deepseek{version}ForCausalLM"],
            "model_type": self.architecture.stock_format,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": base.bos_token_id,
            "eos_token_id": base.eos_token_id,
            "pad_token_id": base.pad_token_id,
            "hidden_act": base.hidden_act,
            "hidden_size": base.hidden_size,
            "initializer_range": base.initializer_range,
            "intermediate_size": base.intermediate_size,
            "max_position_embeddings": base.max_position_embeddings,
            "num_attention_heads": base.num_attention_heads,
            "num_hidden_layers": base.num_hidden_layers,
            "num_key_value_heads": base.num_attention_heads,
            "rms_norm_eps": self.EPS,
            "rope_interleave": True,
            "rope_parameters": self._rope_parameters(),
            "rope_theta": base.rope_parameters["rope_theta"],
            "tie_word_embeddings": False,
            "use_cache": True,
            "vocab_size": base.vocab_size,
            "kv_lora_rank": self.rank,
            "q_lora_rank": layers[0].q_lora_rank if layers else None,
            "qk_nope_head_dim": self.nope_dim,
            "qk_rope_head_dim": self.rope_dim,
            "head_dim": self.rope_dim,
            "v_head_dim": self.v_dim,
            # In a dense model engines read the expert counts all the same.
            "first_k_dense_replace": 0 if num_experts else base.num_hidden_layers,
            "moe_intermediate_size": base.intermediate_size,
            "moe_layer_freq": 1,
            "n_group": 1,
            "n_routed_experts": num_experts or 1,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_experts_per_tok": base.num_experts_per_tok if num_experts else 1,
            "num_nextn_predict_layers": 0,
            "routed_scaling_factor": 1.0,
            "topk_group": 1,
        }
        if num_experts:
            config |= {"scoring_func": "softmax", "topk_method": "greedy"}
        return _json_config(config, self.dtype)

    def _rope_parameters(self) -> dict[str, Any]:
        base = self.base.rope_parameters
        if base.get("rope_type", "default") != "llama3":
            return {"rope_type": "default", "rope_theta": base["rope_theta"]}
        return {
            "rope_type": "yarn",
            "rope_theta": base["rope_theta"],
            "factor": base["factor"],
            "original_max_position_embeddings": base["original_max_position_embeddings"],
            # A wavelength that fits 4 times into the original context keeps its frequency, one that fits once does not.
            "beta_fast": base["high_freq_factor"],
            "beta_slow": base["low_freq_factor"],
            "attention_factor": 1.0,
            "mscale": 0.0,
            "mscale_all_dim": 0.0,
        }

    def attention(self, layer: MLAConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        heads, rank = self.shape.num_heads, layer.kv_lora_rank
        nope, rope, v = layer.qk_nope_head_dim, layer.qk_rope_head_dim, layer.v_head_dim
        slots = torch.tensor([self._slots[index] for index in layer.rope_slots], dtype=torch.int64)
        rope_rows = (slots[:, None] * 2 + torch.arange(2)).flatten()

        scale = self.shape.softmax_scale * math.sqrt(self.nope_dim + self.rope_dim)
        q_name = "q_proj.weight" if layer.q_lora_rank is None else "q_b_proj.weight"
        q_in = weights[q_name].double().view(heads, nope + rope, -1) * scale
        q = q_in.new_zeros(heads, self.nope_dim + self.rope_dim, q_in.shape[-1])
        q[:, :nope] = q_in[:, :nope]
        q[:, self.nope_dim + rope_rows] = q_in[:, nope:]

        kv_a_in = weights["kv_a_proj_with_mqa.weight"].double()
        kv_a = kv_a_in.new_zeros(self.rank + self.rope_dim, kv_a_in.shape[1])
        kv_a[:rank] = kv_a_in[:rank] * self.NORM_INPUT_SCALE
        kv_a[self.rank + rope_rows] = kv_a_in[rank:]

        kv_b_in = weights["kv_b_proj.weight"].double().view(heads, nope + v, rank)
        kv_b = kv_b_in.new_zeros(heads, self.nope_dim + self.v_dim, self.rank)
        kv_b[:, :nope, :rank] = kv_b_in[:, :nope]
        kv_b[:, self.nope_dim : self.nope_dim + v, :rank] = kv_b_in[:, nope:]
        norm_rest = math.sqrt(self.EPS) / self.NORM_INPUT_SCALE / self.NORM_WEIGHT
        kv_b *= norm_rest

        o_in = weights["o_proj.weight"].double()
        o = o_in.new_zeros(len(o_in), heads, self.v_dim)
        o[:, :, :v] = o_in.view(len(o_in), heads, v) * self.residual_scale

        stock = {
            q_name: q.flatten(0, 1),
            "kv_a_proj_with_mqa.weight": kv_a,
            "kv_a_layernorm.weight": torch.full((self.rank,), self.NORM_WEIGHT),
            "kv_b_proj.weight": kv_b.flatten(0, 1),
            "o_proj.weight": o.flatten(1),
        }
        if layer.q_lora_rank is not None:
            stock["q_a_proj.weight"] = weights["q_a_proj.weight"].double() * self.NORM_INPUT_SCALE
            stock["q_a_layernorm.weight"] = torch.full((layer.q_lora_rank,), self.NORM_WEIGHT)
            stock[q_name] *= norm_rest
        return stock

    def other(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        if name == "model.embed_tokens.weight":
            scaled = {name: tensor * self.embedding_scale}
            if self.base.tie_word_embeddings:
                scaled["lm_head.weight"] = tensor * self.logits_scale
            return scaled
        if name == "lm_head.weight":
            return {name: tensor * self.logits_scale}
        stock = self.architecture.stock_tensors(name, tensor)
        return {n: t * self.residual_scale if n.endswith(".down_proj.weight") else t for n, t in stock.items()}


def write_model(
    stage: Staging,
    source: Checkpoint,
    export: Export,
    layers: Sequence[MLAConfig],
    attention: Callable[[int], Mapping[str, Tensor]],
    bar: Progress,
) -> None:
    """Writes a model into the staging directory; config.json comes last.

    Args:
        source: of all tensors but the attention's, original or native, and of the tokenizer.
        attention: one layer's weights, under the names of models.MLAAttention.
    """
    groups = _tensor_groups(source.expected, len(layers))
    weight_map: dict[str, str] = {}
    total_size = 0
    for number, (index, names) in enumerate(bar.track(groups, description="Writing"), start=1):
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensors |= export.other(name, source.tensor(name))
        if index is not None:
            for name, tensor in export.attention(layers[index], attention(index)).items():
                tensors[f"model.layers.{index}.self_attn.{name}"] = tensor
        tensors = {name: tensor.to(export.dtype) for name, tensor in tensors.items()}
        shard = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        stage.write_tensors(shard, tensors)
        weight_map |= dict.fromkeys(tensors, shard)
        total_size += sum(tensor.nbytes for tensor in tensors.values())

    config = export.config(layers)
    if isinstance(export, StockExport):
        check_stock(weight_map, config)
    stage.write_json("model.safetensors.index.json", {"metadata": {"total_size": total_size}, "weight_map": weight_map})
    source.tokenizer().save_pretrained(stage.path)
    generation_config = source.path / "generation_config.json"  # many a chat model's ends of a turn are only there
    if generation_config.is_file():
        shutil.copyfile(generation_config, stage.path / generation_config.name)
    stage.write_json("config.json", config)


def _tensor_groups(names: Iterable[str], num_layers: int) -> list[tuple[int | None, list[str]]]:
    """Tensors by output shard, attention left out: (None, those of no layer), then (layer, its own)."""
    names = list(names)
    groups: list[tuple[int | None, list[str]]] = [
        (None, [name for name in names if not name.startswith("model.layers.")])
    ]
    for index in range(num_layers):
        prefix = f"model.layers.{index}."
        own = [name for name in names if name.startswith(prefix) and not name.startswith(prefix + "self_attn.")]
        groups.append((index, own))
    return groups


def check_stock(names: Iterable[str], config: Mapping[str, Any]) -> None:
    """UnsupportedModelError for what engines drop or read wrongly in a DeepSeek checkpoint without saying so."""
    names = set(names)
    problems = []
    if biases := sorted(name for name in names if name.endswith(".bias")):
        problems.append(f"bias tensors are skipped ({biases[0]}, {len(biases)} in all)")
    if "lm_head.weight" not in names or config.get("tie_word_embeddings", True):
        problems.append("a tied head is left uninitialised: write lm_head.weight and tie_word_embeddings=false")
    if config.get("rope_interleave") is not True:
        problems.append("RoPE rows are taken to be interleaved: rope_interleave must be true")
    rope = config.get("rope_parameters", {})
    if (rope_type := rope.get("rope_type", "default")) not in ("default", "yarn"):
        problems.append(f"{rope_type} RoPE parameters are read as YaRN")
    if rope_type == "yarn" and (rope.get("mscale") or rope.get("mscale_all_dim") or rope.get("attention_factor") != 1):
        problems.append("YaRN's scale of the scores differs between engines: mscale 0 and attention_factor 1 have none")
    if problems:
        raise UnsupportedModelError("not a checkpoint that engines read right: " + "; ".join(problems))


def _equal_frequencies(original: PretrainedConfig, stock: dict[str, Any]) -> dict[int, int]:
    """For every RoPE frequency of the original that the stock model has too, which slot has it there."""
    from transformers import AutoConfig

    without_layers = AutoConfig.for_model(**stock | {"num_hidden_layers": 0})
    models: Any = (skeleton(original), skeleton(without_layers))
    of_original, of_stock = (model.model.rotary_emb.inv_freq for model in models)
    equal = (of_stock[:, None] / of_original - 1).abs() < 1e-5
    return {int(index): int(slot) for slot, index in equal.nonzero()}


def _json_config(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {**config, "dtype": str(dtype).removeprefix("torch.")}
