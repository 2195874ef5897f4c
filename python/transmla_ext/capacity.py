"""What a model converted to MLA would need and do on a GPU, predicted from its config.json alone."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table

from . import models
from .architectures import AttentionShape, lookup
from .checkpoint import expected_shapes, read_config
from .config import MLAConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["GPU", "GPUS", "Capacity", "CapacityPlan", "DecodeStep", "plan"]

_ITEMSIZE = 2  # weights and cache are bf16
_MEMORY_FRACTION = 0.9  # of a GPU's memory that weights and cache may fill: vLLM's gpu_memory_utilization
_UNBOUNDED = 1 << 40  # tokens; a sequence gets there only if every layer has a window
_CUTS = (0.5, 0.6875, 0.875, 0.93)  # of the cache; the last three are those that papers report
# kv_lora_rank + qk_rope_head_dim that decode kernels take of a stock checkpoint; prefill kernels want heads of 128 and
# a RoPE key of 64 numbers. Read in vLLM 0.33 and SGLang 0.5.23. None: whatever convert() writes.
_ENGINES: dict[str, Collection[int] | None] = {
    "transmla_ext": None,
    "transformers": None,
    "vLLM, CUDA": (320, 512, 576),
    "vLLM, CPU": (576,),
    "SGLang, CUDA": (576,),
    "vLLM, SGLang: Triton": range(_UNBOUNDED),
}


@dataclass(frozen=True)
class GPU:
    """Datasheet figures of one GPU."""

    name: str
    memory: float  # GB as on the box, of 2^30 bytes
    bandwidth: float  # GB/s
    tflops: float  # TFLOP/s, bf16, dense

    @property
    def usable_bytes(self) -> int:
        return int(_MEMORY_FRACTION * self.memory * 2**30)


GPUS = {
    gpu.name: gpu
    for gpu in (
        # TransMLA, section 5.4, gives memory and FLOP/s of its three cards and no names: the bandwidths are inferred.
        GPU("24GB", 24, 1008, 165.2),  # GeForce RTX 4090: NVIDIA's Ada architecture whitepaper, appendix A
        GPU("40GB", 40, 1555, 312),  # A100 40GB: NVIDIA A100 datasheet
        GPU("64GB", 64, 1600, 320),  # Ascend 910B, as the press has it: no datasheet is public
        GPU("A100-80GB", 80, 2039, 312),  # SXM: NVIDIA A100 datasheet
        GPU("H100", 80, 3350, 989),  # SXM: NVIDIA H100 datasheet; FLOP/s are half of the figure with sparsity
        GPU("H200", 141, 4800, 989),  # SXM: NVIDIA H200 datasheet, likewise
        GPU("B200", 180, 8000, 2250),  # an eighth of a DGX B200: NVIDIA's datasheet, likewise
    )
}


@dataclass(frozen=True, kw_only=True)
class DecodeStep:
    """One new token for each sequence of a batch, on each GPU: moving bytes overlaps with computing."""

    batch_size: int
    weight_bytes: int  # read once for the batch; of experts, those that some token is expected to take
    cache_bytes: int  # of one sequence
    flops: int  # for one sequence
    memory_seconds: float
    compute_seconds: float
    tokens_per_second: float

    def __str__(self) -> str:
        return (
            f"{self.weight_bytes / 1e9:.2f} GB + {self.batch_size:,} × {self.cache_bytes / 1e9:.3f} GB take "
            f"{1e3 * self.memory_seconds:.2f} ms, {self.batch_size:,} × {self.flops / 1e9:.1f} GFLOP take "
            f"{1e3 * self.compute_seconds:.2f} ms: {self.tokens_per_second:,.0f} tokens/s"
        )


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """A model with one layout of its cache: what it needs, how much of it fits, how fast it decodes."""

    name: str  # "original", or "512 + 64"
    kv_lora_rank: int | None
    qk_rope_head_dim: int | None
    cache_bytes_per_token: int  # on each GPU, all layers
    cache_ratios: dict[int, float]  # number of GPUs -> the original's cache bytes over these, on each GPU
    weight_bytes: int  # on each GPU
    max_batch_size: int  # sequences of the plan's context that fit
    max_context: int | None  # tokens of one sequence that fit; None if every layer forgets
    full: DecodeStep | None  # with the largest batch; None if not one sequence fits
    alike: DecodeStep | None  # with the original's largest batch
    single: DecodeStep | None  # with batch 1
    engines: dict[str, str]  # what each can load


@dataclass(frozen=True, kw_only=True)
class CapacityPlan:
    """A model before and after conversion on a GPU: a prediction, made without reading a weight."""

    model: str
    gpu: GPU
    tensor_parallel: int
    context: int
    num_layers: int
    max_positions: int
    original: Capacity
    candidates: tuple[Capacity, ...]
    no_stock_export: str | None  # what of the model vLLM and SGLang have no place for

    @property
    def columns(self) -> tuple[Capacity, ...]:
        return (self.original, *self.candidates)

    @property
    def notes(self) -> list[str]:
        """What the figures assume, with the numbers put in, and what stands in the way."""
        gpu, usable = self.gpu, self.gpu.usable_bytes / 1e9
        notes = [
            f"bf16. Weights and cache may fill {_MEMORY_FRACTION:.0%} of {gpu.memory:g} GB, {usable:.1f}e9 bytes.",
            f"Step time = max(bytes / {gpu.bandwidth:,g} GB/s, FLOPs / {gpu.tflops:,g} TFLOP/s). Bytes: the weights, "
            "once, and the cache of each sequence. FLOPs of a sequence: 2 × the weights it meets, and layers × context "
            "(or window) × heads × (4 × head_dim, or 2 × (2 × kv_lora_rank + qk_rope_head_dim)).",
            *(f"{column.name}: {column.full}" for column in self.columns if column.full),
            "Neither side pays for prefill, activations, kernels below the roofline or traffic between GPUs.",
            "Tensor parallelism splits KV heads over GPUs but gives each the whole latent: see the cache ratios.",
        ]
        if misfits := [column.name for column in self.columns if column.weight_bytes > gpu.usable_bytes]:
            notes.append(
                f"The weights do not fit ({', '.join(misfits)}): take larger or more GPUs (--tensor-parallel)."
            )
        if self.context > self.max_positions:
            notes.append(f"The model was made for {self.max_positions:,} positions, not for {self.context:,}.")
        notes.append("Engines load native checkpoints, stock ones or both.")
        if any("padded" in column.engines.values() for column in self.candidates):
            padded = 576 * _ITEMSIZE * self.num_layers
            notes[-1] += f" Padded is stock with zeros up to 512 + 64, which are {padded:,} bytes per token."
        if self.no_stock_export:
            notes.append(f"No stock checkpoint for vLLM and SGLang, which have no place for {self.no_stock_export}.")
        return notes

    def table(self) -> RenderableType:
        gpus = (
            f"{self.tensor_parallel} × {self.gpu.name} (bytes of each)" if self.tensor_parallel > 1 else self.gpu.name
        )
        before, after = self.original, self.candidates
        table = Table(title=f"{self.model} on {gpus} at context {self.context:,}", box=box.SIMPLE_HEAD)
        table.add_column("latent + RoPE key", style="bold", no_wrap=True)
        for column in self.columns:
            table.add_column(column.name, justify="right", no_wrap=True)
        table.add_row("cache bytes per token", *(f"{c.cache_bytes_per_token:,}" for c in self.columns))
        saved = (1 - c.cache_bytes_per_token / before.cache_bytes_per_token for c in after)
        table.add_row("cache saved", "", *(f"{fraction:.2%}" for fraction in saved))
        for n in before.cache_ratios:
            ratios = (f"{c.cache_ratios[n]:.2f}" for c in after)
            table.add_row(f"cache ratio on {n} GPUs" if n > 1 else "cache ratio", "", *ratios)
        table.add_row("weights, GB", *(f"{c.weight_bytes / 1e9:.2f}" for c in self.columns))
        table.add_row("largest batch", *(f"{c.max_batch_size:,}" for c in self.columns))
        contexts = ("any" if c.max_context is None else f"{c.max_context:,}" for c in self.columns)
        table.add_row("longest context, batch 1", *contexts)
        speeds = (f"{c.full.tokens_per_second:,.0f}" if c.full else "-" for c in self.columns)
        table.add_row("tokens/s, largest batch", *speeds)
        table.add_row("× original's", "", *(_ratio(c.full, before.full) for c in after))
        table.add_row("× at the original's batch", "", *(_ratio(c.alike, before.alike) for c in after))
        table.add_row("× at batch 1", "", *(_ratio(c.single, before.single) for c in after))
        for engine in _ENGINES:
            table.add_row(engine, "", *(c.engines[engine] for c in after))
        return Group(table, *self.notes)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "notes": self.notes}

    def __str__(self) -> str:
        console = Console(width=110, color_system=None, highlight=False)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


def plan(
    model: str | Path | PretrainedConfig,
    *,
    gpu: str | GPU = "H100",
    context: int = 8192,
    candidates: Sequence[str | tuple[int, int]] = (),
    tensor_parallel: int = 1,
) -> CapacityPlan:
    """Cache, batch, context and decode speed of a model before and after conversion, from its config alone.

    Args:
        model: a directory with a config.json, that file, or a transformers config.
        gpu: a name of GPUS, a GPU, or "memory,bandwidth,FLOP/s" in GB, GB/s and TFLOP/s.
        context: tokens of each sequence in the cache.
        candidates: (kv_lora_rank, qk_rope_head_dim) or "512+64"; by default 512 + 64 and cuts of 50 to 93 %.
        tensor_parallel: GPUs that share the model.
    Raises:
        ValueError: a bad argument; CheckpointError, UnsupportedModelError: a bad model.
    """
    gpu = gpu if isinstance(gpu, GPU) else _gpu(gpu)
    if context < 1:
        raise ValueError(f"context must be at least 1 token, got {context}")
    config, name = (read_config(model), _name(model)) if isinstance(model, (str, Path)) else (model, model.model_type)
    architecture = lookup(config)
    shape = architecture.shape(config)
    if tensor_parallel < 1 or shape.num_heads % tensor_parallel:
        raise ValueError(f"tensor_parallel must divide the {shape.num_heads} heads, got {tensor_parallel}")
    layers = [_mla(shape, *_pair(pair)) for pair in candidates or _default_pairs(shape)]
    no_stock_export = architecture.no_stock_export(config)
    group = _Group(
        gpu=gpu,
        num_gpus=tensor_parallel,
        context=context,
        config=config,
        shape=shape,
        windows=[architecture.shape(config, index).sliding_window for index in range(config.num_hidden_layers)],
        stock_format=None if no_stock_export else architecture.stock_format,
    )
    original = group.capacity(None, None)
    return CapacityPlan(
        model=name,
        gpu=gpu,
        tensor_parallel=tensor_parallel,
        context=context,
        num_layers=config.num_hidden_layers,
        max_positions=config.max_position_embeddings,
        original=original,
        candidates=tuple(group.capacity(mla, original) for mla in layers),
        no_stock_export=no_stock_export,
    )


@dataclass(frozen=True)
class _Weights:
    """How many numbers a model's weights are, by when a decode step reads them."""

    total: int
    always: int  # neither experts nor embeddings, of which a step reads a row a token
    experts: int
    num_experts: int
    num_experts_per_tok: int

    @staticmethod
    def of(config: PretrainedConfig) -> _Weights:
        shapes = expected_shapes(config)
        stacks = [dims for name, dims in shapes.items() if ".experts." in name]
        experts = sum(map(math.prod, stacks))
        total = sum(map(math.prod, shapes.values()))
        embeddings = 0 if config.tie_word_embeddings else math.prod(shapes["model.embed_tokens.weight"])
        return _Weights(
            total=total,
            always=total - experts - embeddings,
            experts=experts,
            num_experts=stacks[0][0] if stacks else 1,
            num_experts_per_tok=config.num_experts_per_tok if stacks else 1,
        )

    def read_by(self, batch_size: int) -> int:
        """Expected numbers that the tokens of a batch read, each sent to its experts at random."""
        missed = (1 - self.num_experts_per_tok / self.num_experts) ** batch_size
        return self.always + round(self.experts * (1 - missed))


@dataclass(frozen=True, kw_only=True)
class _Group:
    """GPUs that share a model, and the sequences they decode."""

    gpu: GPU
    num_gpus: int
    context: int
    config: PretrainedConfig
    shape: AttentionShape
    windows: list[int]  # of each layer; 0 is none
    stock_format: str | None  # "deepseek_v3" or "deepseek_v2"; None if neither can express the model

    def capacity(self, mla: MLAConfig | None, original: Capacity | None) -> Capacity:
        """Of the model converted to layers of this shape, against the original; of the original, with None and None."""
        converted = models.native_config(self.config, [mla] * len(self.windows)) if mla else self.config
        weights = _Weights.of(converted)
        per_token = self._cache_dim(mla, self.num_gpus) * _ITEMSIZE
        weight_bytes = -(-weights.total * _ITEMSIZE // self.num_gpus)
        free = self.gpu.usable_bytes - weight_bytes
        max_batch_size = max(0, free // (self._cached_tokens(self.context) * per_token))
        max_context = bisect_right(range(_UNBOUNDED), free, key=lambda c: self._cached_tokens(c) * per_token) - 1
        alike = max_batch_size if original is None else original.max_batch_size

        def step(batch_size: int) -> DecodeStep | None:
            return self._step(mla, weights, batch_size) if 0 < batch_size <= max_batch_size else None

        return Capacity(
            name=f"{mla.kv_lora_rank} + {mla.qk_rope_head_dim}" if mla else "original",
            kv_lora_rank=mla.kv_lora_rank if mla else None,
            qk_rope_head_dim=mla.qk_rope_head_dim if mla else None,
            cache_bytes_per_token=per_token * len(self.windows),
            cache_ratios={
                n: self._cache_dim(None, n) / self._cache_dim(mla, n)
                for n in (1, 2, 4, 8)
                if not self.shape.num_heads % n
            },
            weight_bytes=weight_bytes,
            max_batch_size=max_batch_size,
            max_context=None if max_context == _UNBOUNDED - 1 else max(0, max_context),
            full=step(max_batch_size),
            alike=step(alike),
            single=step(1),
            engines=_engines(self.shape, mla, self.stock_format if mla.qk_nope_head_dim else None) if mla else {},
        )

    def _cache_dim(self, mla: MLAConfig | None, num_gpus: int) -> int:
        """Numbers that each of so many GPUs caches per token and layer."""
        return mla.cache_dim if mla else 2 * self.shape.head_dim * -(-self.shape.num_kv_heads // num_gpus)

    def _cached_tokens(self, context: int) -> int:
        """Over all layers; what has left a layer's window is dropped."""
        return sum(min(context, window or context) for window in self.windows)

    def _step(self, mla: MLAConfig | None, weights: _Weights, batch_size: int) -> DecodeStep:
        tokens = self._cached_tokens(self.context)
        weight_bytes = -(-weights.read_by(batch_size) * _ITEMSIZE // self.num_gpus)
        cache_bytes = tokens * self._cache_dim(mla, self.num_gpus) * _ITEMSIZE
        flops_per_head = 2 * (mla.cache_dim + mla.kv_lora_rank) if mla else 4 * self.shape.head_dim
        flops = (2 * weights.read_by(1) + tokens * self.shape.num_heads * flops_per_head) // self.num_gpus
        memory_seconds = (weight_bytes + batch_size * cache_bytes) / (self.gpu.bandwidth * 1e9)
        compute_seconds = batch_size * flops / (self.gpu.tflops * 1e12)
        return DecodeStep(
            batch_size=batch_size,
            weight_bytes=weight_bytes,
            cache_bytes=cache_bytes,
            flops=flops,
            memory_seconds=memory_seconds,
            compute_seconds=compute_seconds,
            tokens_per_second=batch_size / max(memory_seconds, compute_seconds),
        )


def _engines(shape: AttentionShape, mla: MLAConfig, stock_format: str | None) -> dict[str, str]:
    """What each engine loads of a model converted to `mla`: native or stock checkpoints, both, padded, or "no"."""
    own = "both" if stock_format == "deepseek_v3" else "native"
    small = mla.kv_lora_rank <= 512 and mla.qk_rope_head_dim <= 64 and shape.head_dim <= 128
    engines = {}
    for engine, cache_dims in _ENGINES.items():
        if cache_dims is None:
            engines[engine] = own
        elif stock_format is None:
            engines[engine] = "no"
        elif shape.head_dim == 128 and mla.qk_rope_head_dim == 64 and mla.cache_dim in cache_dims:
            engines[engine] = "stock"
        else:
            engines[engine] = "padded" if small and shape.rotary_dim % 64 == 0 else "no"
    return engines


def _gpu(text: str) -> GPU:
    by_name = {name.lower(): gpu for name, gpu in GPUS.items()}
    if text.lower() in by_name:
        return by_name[text.lower()]
    try:
        memory, bandwidth, tflops = (float(part) for part in text.split(","))
    except ValueError:
        memory = bandwidth = tflops = 0
    if min(memory, bandwidth, tflops) <= 0:
        raise ValueError(f"gpu must be one of {', '.join(GPUS)}, or 'GB,GB/s,TFLOP/s' such as 48,864,181; got '{text}'")
    return GPU(f"{memory:g} GB, {bandwidth:,g} GB/s, {tflops:,g} TFLOP/s", memory, bandwidth, tflops)


def _pair(candidate: str | tuple[int, int]) -> tuple[int, int]:
    if not isinstance(candidate, str):
        return candidate
    match = re.fullmatch(r"\s*(\d+)\s*\+\s*(\d+)\s*", candidate)
    if match is None:
        raise ValueError(f"a candidate is kv_lora_rank+qk_rope_head_dim, such as 512+64; got '{candidate}'")
    return int(match[1]), int(match[2])


def _default_pairs(shape: AttentionShape) -> list[tuple[int, int]]:
    """512 + 64, if it saves anything, and the cuts: at most a third is the RoPE key, since the latent pays better."""
    sizes = [576 / shape.cache_dim] if shape.cache_dim > 576 else []
    pairs = set()
    for size in (*sizes, *(1 - cut for cut in _CUTS)):
        numbers = size * shape.cache_dim
        ropes = [dim for dim in (64, 32, 16, 8) if 3 * dim < numbers and shape.rotary_dim % dim == 0]
        if ropes:
            pairs.add((8 * round((numbers - ropes[0]) / 8), ropes[0]))
    return sorted(pairs, key=sum, reverse=True)


def _mla(shape: AttentionShape, kv_lora_rank: int, qk_rope_head_dim: int) -> MLAConfig:
    """The layer that convert() makes, or ValueError for one that it refuses."""
    shape.check_ranks(kv_lora_rank, qk_rope_head_dim)
    return MLAConfig(
        kv_lora_rank=kv_lora_rank,
        qk_rope_head_dim=qk_rope_head_dim,
        qk_nope_head_dim=0 if qk_rope_head_dim == shape.kv_dim else shape.head_dim,
        v_head_dim=shape.head_dim,
        rope_slots=tuple(range(qk_rope_head_dim // 2)),
    )


def _ratio(after: DecodeStep | None, before: DecodeStep | None) -> str:
    return f"{after.tokens_per_second / before.tokens_per_second:.2f}" if after and before else "-"


def _name(path: str | Path) -> str:
    path = Path(path).resolve()
    return path.name if path.is_dir() else path.stem if path.name != "config.json" else path.parent.name
