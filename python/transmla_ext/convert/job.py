"""What a conversion is asked for: validated, and with its shapes, bytes and memory known, before a weight is read."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict, get_args

import torch

from .. import models
from ..architectures import Architecture, AttentionShape, lookup
from ..checkpoint import Checkpoint, check_shape, open_checkpoint
from ..config import MLAConfig
from ..errors import CheckpointError
from . import group
from .calibrate import BATCH_TOKENS
from .export import Export, Format, NativeExport, StockExport
from .refine import STEP_TOKENS
from .report import ConversionPlan
from .rope_split import freqfolds, rope_slots

__all__ = ["ConversionOptions", "Job", "Method", "candidate_freqfolds", "check_disk", "check_shapes"]

Method = Literal["auto", "transmla"]

_REFINE_STEPS = 250
_REFINE_WINDOW = 6
_LIBRARIES_BYTES = 700_000_000  # resident with torch and transformers loaded, allocator slack included
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ConversionOptions(TypedDict, total=False):
    """What convert() and dry_run() can be told about the result; their docstring explains it."""

    kv_lora_rank: int | Literal["full", "auto"]
    qk_rope_head_dim: int | None
    q_lora_rank: int | None
    cache_bytes: int | None
    format: Format
    method: Method
    freqfold: int | Literal["auto"]
    refine_steps: int | None
    refine_window: int
    seed: int
    calibration_tokens: int
    sequence_length: int
    layers: int | None
    dtype: str | None
    pad_to_engine: bool | None


@dataclass(frozen=True)
class Job:
    """A validated conversion."""

    source: Checkpoint
    architecture: Architecture
    shape: AttentionShape
    qk_rope_head_dim: int  # asked for; the target has less where the format lacks a frequency
    target: MLAConfig  # shape of every layer, of the average one for "auto"; the slots of the first FreqFold candidate
    freqfold: int | Literal["auto"]
    cache_budget: int | None  # numbers a token, all layers, to be dealt out
    export: Export
    seed: int
    num_tokens: int
    sequence_length: int
    device: torch.device
    plan: ConversionPlan

    @staticmethod
    def prepare(
        model_path: str | Path,
        *,
        kv_lora_rank: int | Literal["full", "auto"] = 512,
        qk_rope_head_dim: int | None = None,
        q_lora_rank: int | None = None,
        cache_bytes: int | None = None,
        format: Format = "transmla",
        method: Method = "auto",
        freqfold: int | Literal["auto"] = "auto",
        refine_steps: int | None = None,
        refine_window: int = _REFINE_WINDOW,
        seed: int = 0,
        calibration_tokens: int = 32768,
        sequence_length: int = 512,
        layers: int | None = None,
        dtype: str | None = None,
        pad_to_engine: bool | None = None,
        device: str = "cpu",
    ) -> Job:
        if method not in get_args(Method):
            raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
        if format not in get_args(Format):
            raise ValueError(f"format must be one of {', '.join(get_args(Format))}, got {format!r}")
        if sequence_length < 2 or calibration_tokens < 1:
            raise ValueError(
                "calibration_tokens must be >= 1 and sequence_length >= 2, "
                f"got {calibration_tokens} and {sequence_length}"
            )
        if -(-calibration_tokens // sequence_length) < group.size():
            raise ValueError(
                f"calibration_tokens={calibration_tokens} is less than one sequence of {sequence_length} for each of "
                f"{group.size()} processes"
            )
        if refine_steps is not None and refine_steps < 0:
            raise ValueError(f"refine_steps must be >= 0, got {refine_steps}")
        if refine_window < 1:
            raise ValueError(f"refine_window must be >= 1, got {refine_window}")
        if dtype is not None and dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
        source = open_checkpoint(model_path, num_layers=layers)
        architecture = lookup(source.config)
        check_shapes(source)
        if sequence_length > source.config.max_position_embeddings:
            most = source.config.max_position_embeddings
            raise ValueError(f"sequence_length={sequence_length} exceeds the model's {most} positions")
        shape = architecture.shape(source.config)
        out_dtype = source.dtype if dtype is None else _DTYPES[dtype]
        num_layers = source.config.num_hidden_layers
        budget = None
        if (kv_lora_rank == "auto") != (cache_bytes is not None):
            raise ValueError("kv_lora_rank='auto' and cache_bytes, what it may use, go together; give both or neither")
        if cache_bytes is not None:
            if format != "transmla" or freqfold != "auto":
                raise ValueError("kv_lora_rank='auto' is for the native format and freqfold='auto'")
            budget = cache_bytes // out_dtype.itemsize
        rank, rope = _ranks(shape, kv_lora_rank, qk_rope_head_dim, q_lora_rank, (budget or 0) // num_layers)
        if refine_steps is None:
            refine_steps = _REFINE_STEPS if method == "auto" and kv_lora_rank != "full" else 0
        export: Export = NativeExport(source.config, out_dtype)
        if format != "transmla":
            export = StockExport(
                source.config, out_dtype, architecture, format, rank, rope, pad_to_engine=pad_to_engine
            )
        elif pad_to_engine:
            raise ValueError("pad_to_engine is for the stock formats; the native format is never padded")
        folds = candidate_freqfolds(shape, rope, freqfold, method)
        slots = rope_slots(shape, rope, folds[0], export.frequencies)
        target = MLAConfig(
            kv_lora_rank=rank,
            qk_rope_head_dim=2 * sum(map(len, slots)),
            qk_nope_head_dim=0 if rope == shape.kv_dim else shape.head_dim,
            v_head_dim=shape.head_dim,
            rope_slots=tuple(slot for fold in slots for slot in fold),
            q_lora_rank=q_lora_rank,
        )

        num_train = -(-calibration_tokens // sequence_length)
        num_held_out = max(1, num_train // 8)
        per_number = num_layers * out_dtype.itemsize
        job_plan = ConversionPlan(
            model=Path(model_path).resolve().name,
            format=format,
            method=method,
            dtype=str(out_dtype).removeprefix("torch."),
            num_layers=num_layers,
            attention={
                "hidden_size": shape.hidden_size,
                "num_attention_heads": shape.num_heads,
                "num_key_value_heads": shape.num_kv_heads,
                "head_dim": shape.head_dim,
            },
            mla={
                "kv_lora_rank": target.kv_lora_rank if budget is None else "auto",
                "qk_rope_head_dim": target.qk_rope_head_dim if budget is None else "auto",
                "qk_nope_head_dim": target.qk_nope_head_dim,
                "v_head_dim": target.v_head_dim,
                "q_lora_rank": target.q_lora_rank,
            },
            freqfold=folds,
            refine_steps=refine_steps,
            refine_window=refine_window,
            calibration_tokens=num_train * sequence_length,
            held_out_tokens=num_held_out * sequence_length,
            cache_bytes_before=shape.cache_dim * per_number,
            cache_bytes_after=export.cache_dim(target) * per_number if cache_bytes is None else cache_bytes,
            output_bytes=_output_bytes(source, export, target, num_layers),
            peak_memory_bytes=_peak_memory(
                source,
                shape,
                target,
                min(refine_window, num_layers) if refine_steps else 0,
                (num_train + 2 * num_held_out) * sequence_length,
                sequence_length,
            ),
        )
        return Job(
            source,
            architecture,
            shape,
            rope,
            target,
            freqfold,
            budget,
            export,
            seed,
            calibration_tokens,
            sequence_length,
            torch.device(device),
            job_plan,
        )

    def windows(self) -> list[range]:
        """The layers in order, those together that are refined together, about as many each time."""
        num_layers = self.plan.num_layers
        count = -(-num_layers // (self.plan.refine_window if self.plan.refine_steps else 1))
        return [range(num_layers * i // count, num_layers * (i + 1) // count) for i in range(count)]


def _ranks(
    shape: AttentionShape,
    kv_lora_rank: int | Literal["full", "auto"],
    qk_rope_head_dim: int | None,
    q_lora_rank: int | None,
    mean_cache_dim: int,
) -> tuple[int, int]:
    """(kv_lora_rank, qk_rope_head_dim), of an average layer for "auto", or ValueError for a shape that cannot be."""
    most = min(shape.hidden_size, shape.num_heads * shape.head_dim)
    if q_lora_rank is not None and not 8 <= q_lora_rank <= most:
        raise ValueError(f"q_lora_rank must be from 8 to {most}, got {q_lora_rank}")
    if kv_lora_rank == "full":
        if qk_rope_head_dim not in (None, shape.rope_dim):
            raise ValueError(
                f"kv_lora_rank='full' keeps RoPE on all {shape.rope_dim} key numbers; leave qk_rope_head_dim out, "
                f"got {qk_rope_head_dim}"
            )
        return shape.cache_dim - shape.rope_dim, shape.rope_dim
    rope = qk_rope_head_dim
    if rope is None:
        rope = max((dim for dim in range(8, 65, 8) if shape.rotary_dim % dim == 0), default=0)
    rank = kv_lora_rank if kv_lora_rank != "auto" else min((mean_cache_dim - rope) // 8 * 8, shape.cache_dim - rope)
    shape.check_ranks(rank, rope)
    return rank, rope


def candidate_freqfolds(
    shape: AttentionShape, qk_rope_head_dim: int, freqfold: int | Literal["auto"], method: str
) -> list[int]:
    folds = freqfolds(shape, qk_rope_head_dim)
    if freqfold == "auto":
        # With bases that know their queries more folding loses: 1.13 against 0.93 excess nats on SmolLM2 at -68.75 %.
        return folds[:1] if method == "auto" else folds
    if freqfold not in folds:
        raise ValueError(f"freqfold must be 'auto' or one of {', '.join(map(str, folds))}, got {freqfold}")
    return [freqfold]


def check_shapes(source: Checkpoint) -> None:
    """CheckpointError unless the files hold exactly the tensors that config.json asks for."""
    expected = source.expected
    for name, shape in expected.items():
        check_shape(source.path, name, source.shapes.get(name), shape)
    # A tied head may be stored all the same, and old checkpoints carry RoPE's constants.
    extra = [n for n in source.shapes if n not in expected and n != "lm_head.weight" and not n.endswith(".inv_freq")]
    if extra:
        raise CheckpointError(f"{source.path} holds tensors its config.json has no place for: {', '.join(extra[:3])}")


def _output_bytes(source: Checkpoint, export: Export, target: MLAConfig, num_layers: int) -> int:
    """Counted by an export of tensors that have no memory."""
    names = source.expected
    with torch.device("meta"), torch.no_grad():
        attention = models.MLAAttention(source.config, target, layer_idx=0)
        exported = [export.attention(target, dict(attention.named_parameters()))] * num_layers
        exported += [export.other(n, torch.empty(shape)) for n, shape in names.items() if ".self_attn." not in n]
    return sum(tensor.numel() for tensors in exported for tensor in tensors.values()) * export.dtype.itemsize


def _peak_memory(
    source: Checkpoint,
    shape: AttentionShape,
    target: MLAConfig,
    refined_layers: int,
    num_tokens: int,
    sequence_length: int,
) -> int:
    """Estimate: libraries, streams, and the largest of (a layer being converted, a window refined, the output head)."""
    layers = [
        [dims for name, dims in source.shapes.items() if name.startswith(f"model.layers.{index}.")]
        for index in range(source.config.num_hidden_layers)
    ]
    layer_bytes = 4 * max(sum(map(math.prod, dims)) for dims in layers)  # layers without experts are smaller
    moments = 5 * 8 * shape.cache_dim**2  # state, mean, balanced copy; eigenvectors, LAPACK's workspace
    width = 2 * (shape.hidden_size + max(dims[-2:][0] for layer in layers for dims in layer))
    solving = 2 * layer_bytes + moments + 4 * BATCH_TOKENS * width
    refining = 0
    if refined_layers:
        with torch.device("meta"):
            weights = sum(w.numel() for w in models.MLAAttention(source.config, target, layer_idx=0).parameters())
        # Weights, the best ones, gradients, Adam's two moments and its step; queries, keys, values and their gradients.
        head_dims = 2 * (target.qk_nope_head_dim + target.qk_rope_head_dim) + target.v_head_dim
        activations = 4 * max(STEP_TOKENS, sequence_length) * (2 * width + shape.num_heads * head_dims)
        refining = refined_layers * (layer_bytes + 6 * 4 * weights + activations)
        refining += 4 * BATCH_TOKENS * (width + 2 * shape.num_heads * head_dims)
    vocab_size, hidden_size = source.shapes["model.embed_tokens.weight"]
    # The head, and logits of a sequence with what the loss makes of them.
    head = 4 * vocab_size * (2 * hidden_size + 4 * min(sequence_length, 512))
    # Hidden states: the original's and, where there is refinement, the converted model's before the window and now.
    streams = 4 * num_tokens * shape.hidden_size * (3 if refined_layers else 1)
    return _LIBRARIES_BYTES + streams + max(solving, refining, head)


def check_disk(out_path: Path, output_bytes: int) -> None:
    """ValueError if the disk is too full for what is to be written."""
    parent = next(path for path in out_path.resolve().parents if path.exists())
    free = shutil.disk_usage(parent).free
    if free < output_bytes:
        raise ValueError(
            f"the disk of {parent} has {free / 1e9:.2f} GB free, but the output needs {output_bytes / 1e9:.2f} GB"
        )
