"""What a healing is asked for: validated before any work."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch

from .. import models
from ..architectures import lookup
from ..checkpoint import Checkpoint, open_checkpoint, open_native
from ..config import MLAConfig
from ..convert.export import Export, Format, NativeExport, StockExport
from ..convert.job import check_shapes
from ..errors import TransMLAError, UnsupportedModelError

__all__ = ["PRESETS", "Job", "LossWeights", "Preset", "Schedule", "Trainable"]

Trainable = Literal["all", "attention", "mla"]
_MLA_FACTORS = ("kv_a_proj_with_mqa", "kv_b_proj", "q_a_proj", "q_b_proj", "q_rope_proj")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Of transformers.TrainingArguments, what heal() has a word of its own for or could not do without.
_OWN_ARGUMENTS = {
    "output_dir",
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "warmup_ratio",
    "weight_decay",
    "optim",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "bf16",
    "fp16",
    "seed",
    "use_cpu",
    "remove_unused_columns",
    "save_strategy",
    "disable_tqdm",
    "logging_nan_inf_filter",
}


class LossWeights(NamedTuple):
    kl: float  # of KL(teacher ‖ student), nats a token
    ce: float  # of the cross-entropy of the text, nats a token


@dataclass(frozen=True)
class Schedule:
    """Learning rate of each step: stages of equal length, the first of which warms up.

    Args:
        rates: peak of each stage.
        kind: "constant", or "cosine": to the next stage's rate, in the last stage to zero.
    """

    rates: tuple[float, ...]
    kind: Literal["cosine", "constant"]

    WARM_UP = 0.05  # of all steps

    def rate(self, step: int, num_steps: int) -> float:
        position = min(step / num_steps, 1.0) * len(self.rates)
        stage = min(int(position), len(self.rates) - 1)
        rate, following = self.rates[stage], (*self.rates[1:], 0.0)[stage]
        if self.kind == "cosine":
            rate = following + (rate - following) * (1 + math.cos(math.pi * (position - stage))) / 2
        return rate * min(1.0, (step + 1) / max(1.0, self.WARM_UP * num_steps))


class Preset(NamedTuple):
    """Defaults that go together."""

    tokens: int
    sequence_length: int
    batch_size: int
    schedule: Schedule
    trainable: Trainable


# small: SmolLM2-135M at -87.5 %, 512 tokens a step, fraction of the excess nats removed on other text, by one rate for
# all weights (by a fraction of each one's root mean square). Refined, 20k tokens: 0.001 23 % (0.005 14 %); in closed
# form, 41k tokens: 0.001 56 % (0.01 50 %).
# paper: its two rates; the rest is ours.
PRESETS = {
    "small": Preset(250_000, 512, 1, Schedule((1e-3,), "cosine"), "attention"),
    "paper": Preset(6_000_000_000, 2048, 4, Schedule((1e-4, 2e-5), "cosine"), "all"),
}


@dataclass(frozen=True)
class Job:
    """A validated healing."""

    student: Checkpoint
    teacher: Checkpoint
    layers: list[MLAConfig]
    export: Export
    format: Format
    weights: LossWeights
    schedule: Schedule
    trainable: Trainable
    tokens: int
    sequence_length: int
    batch_size: int  # sequences, in each process
    gradient_accumulation_steps: int
    dtype: torch.dtype  # that matrix products are computed in
    gradient_checkpointing: bool
    teacher_top_k: int | None
    seed: int
    device: str
    training_arguments: dict[str, Any]

    @staticmethod
    def prepare(
        model_path: str | Path,
        teacher_path: str | Path,
        *,
        preset: str,
        tokens: int | None,
        sequence_length: int | None,
        batch_size: int | None,
        gradient_accumulation_steps: int,
        learning_rate: float | Sequence[float] | None,
        schedule: Literal["cosine", "constant"] | None,
        trainable: Trainable | None,
        kl_weight: float,
        ce_weight: float,
        dtype: str | None,
        gradient_checkpointing: bool,
        teacher_top_k: int | None,
        format: Format,
        seed: int,
        device: str,
        training_arguments: Mapping[str, Any] | None,
    ) -> Job:
        _check_choice("preset", preset, tuple(PRESETS))
        defaults = PRESETS[preset]
        kind = schedule or defaults.schedule.kind
        _check_choice("schedule", kind, ("cosine", "constant"))
        trainable = trainable or defaults.trainable
        _check_choice("trainable", trainable, get_args(Trainable))
        _check_choice("format", format, get_args(Format))
        dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
        _check_choice("dtype", dtype, tuple(_DTYPES))
        rates = defaults.schedule.rates if learning_rate is None else learning_rate
        rates = tuple(rates) if isinstance(rates, Sequence) else (rates,)
        if not rates or not all(0 < rate < math.inf for rate in rates):
            raise ValueError(f"learning_rate must be positive, one for each stage, got {learning_rate}")
        weights = LossWeights(kl_weight, ce_weight)
        if not (all(0 <= weight < math.inf for weight in weights) and any(weights)):
            raise ValueError(
                f"kl_weight and ce_weight must be >= 0, and one of them more, got {kl_weight} and {ce_weight}"
            )
        _check_choice("device", device, ("cpu", "cuda"))
        tokens = defaults.tokens if tokens is None else tokens
        sequence_length = defaults.sequence_length if sequence_length is None else sequence_length
        batch_size = defaults.batch_size if batch_size is None else batch_size
        if tokens < 1 or sequence_length < 2 or batch_size < 1 or gradient_accumulation_steps < 1:
            raise ValueError(
                "tokens, batch_size and gradient_accumulation_steps must be >= 1 and sequence_length >= 2, got "
                f"{tokens}, {batch_size}, {gradient_accumulation_steps} and {sequence_length}"
            )
        own = dict(training_arguments or {})
        if taken := sorted(_OWN_ARGUMENTS & own.keys()):
            raise ValueError(f"training_arguments: heal() sets {', '.join(taken)}; use its own arguments")

        student, teacher = open_native(model_path), open_checkpoint(teacher_path)
        lookup(teacher.config)
        for checkpoint in (student, teacher):
            check_shapes(checkpoint)
            if sequence_length > checkpoint.config.max_position_embeddings:
                most = checkpoint.config.max_position_embeddings
                raise ValueError(f"sequence_length={sequence_length} exceeds the {most} positions of {checkpoint.path}")
        _check_vocabulary(student, teacher)
        vocab_size = student.config.vocab_size
        if teacher_top_k is not None and not 1 <= teacher_top_k < vocab_size:
            raise ValueError(f"teacher_top_k must be from 1 to {vocab_size - 1}, got {teacher_top_k}")
        layers = [MLAConfig(**fields) for fields in student.config.mla]
        return Job(
            student,
            teacher,
            layers,
            _export(student, layers, format),
            format,
            weights,
            Schedule(rates, kind),
            trainable,
            tokens,
            sequence_length,
            batch_size,
            gradient_accumulation_steps,
            _DTYPES[dtype],
            gradient_checkpointing,
            teacher_top_k if weights.kl else None,
            seed,
            device,
            own,
        )

    def trains(self, name: str) -> bool:
        """Whether the weight of that name is trained."""
        if self.trainable == "mla":
            return any(f".self_attn.{factor}." in name for factor in _MLA_FACTORS)
        return self.trainable == "all" or ".self_attn." in name

    def step_tokens(self, num_processes: int) -> int:
        return self.sequence_length * self.batch_size * self.gradient_accumulation_steps * num_processes


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check_vocabulary(student: Checkpoint, teacher: Checkpoint) -> None:
    sizes = [checkpoint.config.vocab_size for checkpoint in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise TransMLAError(
            f"the teacher {teacher.path} has another vocabulary, {sizes[1]} tokens and not {sizes[0]}; give the model "
            f"that {student.path} was converted from"
        )
    of_student, of_teacher = (checkpoint.tokenizer().get_vocab() for checkpoint in (student, teacher))
    if of_student != of_teacher:
        token = min(token for token, _ in of_student.items() ^ of_teacher.items())
        raise TransMLAError(
            f"the teacher {teacher.path} has another vocabulary: {token!r} is token {of_teacher.get(token)} and not "
            f"{of_student.get(token)}; give the model that {student.path} was converted from"
        )


def _export(student: Checkpoint, layers: list[MLAConfig], format: Format) -> Export:
    base = models.original_config(student.config)
    if format == "transmla":
        return NativeExport(base, student.dtype)
    first = layers[0]
    shapes = {(layer.kv_lora_rank, layer.qk_rope_head_dim, layer.qk_nope_head_dim) for layer in layers}
    if len(shapes) > 1:
        raise UnsupportedModelError(
            f"format {format} has one shape for all layers, and those of {student.path} differ (kv_lora_rank auto); "
            "use format='transmla'"
        )
    export = StockExport(
        base, student.dtype, lookup(base), format, first.kv_lora_rank, first.qk_rope_head_dim, pad_to_engine=None
    )
    if any(slot not in (export.frequencies or {}) for layer in layers for slot in layer.rope_slots):
        raise UnsupportedModelError(
            f"format {format} has not all of the RoPE frequencies that {student.path} uses; convert the original with "
            f"--format {format} to see what it can have, or use format='transmla'"
        )
    return export
