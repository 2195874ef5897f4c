"""heal(): a converted model and its original in, a better converted model out."""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.progress import Progress
from torch import Tensor

from ..architectures import base_model_type, family
from ..checkpoint import Checkpoint, Staging, check_out_path, staging
from ..convert import group
from ..convert.calibrate import Original, Predictions, run_layer
from ..convert.export import Format, write_model
from ..convert.job import check_disk
from ..convert.pipeline import progress_bars
from ..text import TextSource, packed, token_sequences
from .job import Job, Trainable
from .report import HealReport

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments

__all__ = ["heal"]

_WORK = "training"  # in the staging directory: tokens, cached logits, Trainer checkpoints
_HELD_OUT_TOKENS = 8192
_CHECKPOINTS = 10  # of a run, unless training_arguments say otherwise


def heal(
    model_path: str | Path,
    teacher_path: str | Path,
    out_path: str | Path,
    *,
    text: TextSource = None,
    test: TextSource = None,
    preset: Literal["small", "paper"] = "small",
    tokens: int | None = None,
    sequence_length: int | None = None,
    batch_size: int | None = None,
    gradient_accumulation_steps: int = 1,
    learning_rate: float | Sequence[float] | None = None,
    schedule: Literal["cosine", "constant"] | None = None,
    trainable: Trainable | None = None,
    kl_weight: float = 1.0,
    ce_weight: float = 0.1,
    dtype: Literal["float32", "bfloat16"] | None = None,
    gradient_checkpointing: bool = False,
    teacher_top_k: int | None = None,
    format: Format = "transmla",
    seed: int = 0,
    device: str = "cpu",
    training_arguments: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> HealReport:
    """Trains a converted model to predict what the original predicts; the output directory appears whole or not at all.

    A killed run resumes from its last checkpoint when it is started again. Built on transformers' Trainer: called by
    all processes of a torch.distributed group, they train together, by DDP, or by FSDP or DeepSpeed as
    `training_arguments` or `accelerate launch` say.

    Args:
        model_path: a converted model in the native format.
        teacher_path: the original, or any model with the same vocabulary: a directory of safetensors, or a GGUF file.
        out_path: directory to write; must be empty or absent unless `overwrite`.
        text: a text file, a list of texts, a `datasets` name, streamed as far as it is needed, or None for text that
            comes with Python; packed into sequences, and repeated if it is shorter than `tokens`.
        test: text to judge by, in the same forms; None: the beginning of `text`, which is then not trained on.
        preset: "small", for a CPU or a first look, or "paper" (TransMLA, arXiv 2502.07864): what follows, where None.
        tokens: to train on.
        sequence_length: tokens of a sequence.
        batch_size: sequences that each process computes at once.
        gradient_accumulation_steps: batches before each step.
        learning_rate: Adam's peak rate, one for each stage; stages share the steps equally.
        schedule: "cosine", from each rate to the next and at last to zero, or "constant"; both after a warm-up.
        trainable: "all" weights, the "attention", or the "mla" factors, down and up projections, alone.
        kl_weight, ce_weight: of KL(teacher ‖ model) and of the text's cross-entropy in the loss.
        dtype: that matrix products are computed in; weights are trained in fp32. None: bfloat16, on a CPU float32.
        gradient_checkpointing: computes activations twice instead of keeping them.
        teacher_top_k: keep the teacher's so many likeliest next tokens on disk, computed once before the training,
            which then needs no teacher; all others count as one. None: the teacher computes beside the model.
        format: "transmla", or "deepseek_v3" or "deepseek_v2" if all layers have the same shape.
        seed: of the order of the sequences.
        device: "cpu", or "cuda" for the GPU of this process.
        training_arguments: others of transformers.TrainingArguments: fsdp, fsdp_config, deepspeed, save_steps, ...
        overwrite: replace a non-empty output directory.
        progress: show progress bars.
    Raises:
        ValueError: a bad argument; TransMLAError: a bad model, or a loss that is NaN or infinite. The last good
            checkpoint is then kept, and the same call, with another learning rate if wanted, goes on from there.
    """
    started = time.monotonic()
    out_path = Path(out_path)
    job = Job.prepare(
        model_path,
        teacher_path,
        preset=preset,
        tokens=tokens,
        sequence_length=sequence_length,
        batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        learning_rate=learning_rate,
        schedule=schedule,
        trainable=trainable,
        kl_weight=kl_weight,
        ce_weight=ce_weight,
        dtype=dtype,
        gradient_checkpointing=gradient_checkpointing,
        teacher_top_k=teacher_top_k,
        format=format,
        seed=seed,
        device=device,
        training_arguments=training_arguments,
    )
    if group.is_first():
        check_out_path(out_path, overwrite=overwrite)
    for path in (job.student.path, job.teacher.path):
        if path.resolve().is_relative_to(out_path.resolve()):
            raise ValueError(f"output directory {out_path} holds {path}, which would be lost; choose another")
    tokenizer = job.student.tokenizer()
    beginning, test_tokens = _held_out(text, test, tokenizer, job.sequence_length)
    skipped = len(test_tokens) if test is None else 0
    stage = Staging.of(out_path)
    arguments = _training_arguments(job, stage.path / _WORK)
    check_disk(out_path, _disk_bytes(job))

    with progress_bars(progress and group.is_first()) as bar:
        if not group.is_first():
            report = _heal(job, arguments, stage, text, skipped, test_tokens, bar)
        else:
            fingerprint = {
                "version": version("transmla_ext"),
                "options": _options(job),
                "processes": group.size(),
                "models": [job.student.identity(), job.teacher.identity()],
                "text": hashlib.sha256(repr((beginning.tolist(), test_tokens.tolist())).encode()).hexdigest(),
            }
            with staging(out_path, fingerprint, overwrite=overwrite) as stage:
                report = _heal(job, arguments, stage, text, skipped, test_tokens, bar)
    return replace(report, seconds=time.monotonic() - started)


def _held_out(
    text: TextSource, test: TextSource, tokenizer: PreTrainedTokenizerBase, sequence_length: int
) -> tuple[Tensor, Tensor]:
    """The beginning of the text, and the sequences to judge by: an eighth of that, or the test text's."""
    most = max(8, 8 * _HELD_OUT_TOKENS // sequence_length)
    beginning = token_sequences(text, tokenizer, most, sequence_length)
    needed = 1 if test is not None else 2
    if len(beginning) < needed:
        raise ValueError(
            f"text too short: {len(beginning)} sequences of {sequence_length} tokens, but {needed} are needed, one to "
            f"train on{' and one to judge by' if test is None else ''}; give more text or lower sequence_length"
        )
    if test is None:
        return beginning, beginning[: max(1, len(beginning) // 8)]
    judged = token_sequences(test, tokenizer, max(1, _HELD_OUT_TOKENS // sequence_length), sequence_length)
    if not len(judged):
        raise ValueError(f"test text too short: give at least one sequence of {sequence_length} tokens")
    return beginning, judged


def _training_arguments(job: Job, work: Path) -> TrainingArguments:
    from transformers import TrainingArguments

    num_steps = -(-job.tokens // job.step_tokens(group.size()))
    defaults: dict[str, Any] = {
        "logging_steps": max(1, num_steps // 50),
        "save_steps": max(1, num_steps // _CHECKPOINTS),
        "save_total_limit": 2,
        "report_to": "none",
        "max_grad_norm": 1.0,
        "adam_beta2": 0.98,
        "dataloader_pin_memory": job.device != "cpu",
        "log_level": "error",
    }
    if job.gradient_checkpointing:
        defaults |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    try:
        arguments = TrainingArguments(
            **{**defaults, **job.training_arguments},
            output_dir=str(work),
            max_steps=num_steps,
            learning_rate=job.schedule.rates[0],
            per_device_train_batch_size=job.batch_size,
            gradient_accumulation_steps=job.gradient_accumulation_steps,
            bf16=job.dtype == torch.bfloat16,
            seed=job.seed,
            use_cpu=job.device == "cpu",
            remove_unused_columns=False,
            save_strategy="steps",
            disable_tqdm=True,
            logging_nan_inf_filter=False,  # they are looked for at every step
        )
    except (TypeError, ValueError, ImportError, OSError) as error:
        raise ValueError(f"training_arguments: {error}") from error
    if arguments.device.type != job.device:
        raise ValueError(f"device {job.device} is not there; transformers sees {arguments.device}")
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # Trainer would wrap the model in DataParallel, which copies no patched forward
    return arguments


def _options(job: Job) -> dict[str, Any]:
    """What a resumed run must have in common with the one that it resumes: all but the learning rate."""
    return {
        "format": job.format,
        "weights": job.weights,
        "trainable": job.trainable,
        "tokens": job.tokens,
        "sequence_length": job.sequence_length,
        "batch_size": job.batch_size,
        "gradient_accumulation_steps": job.gradient_accumulation_steps,
        "dtype": str(job.dtype),
        "teacher_top_k": job.teacher_top_k,
        "seed": job.seed,
    }


def _disk_bytes(job: Job) -> int:
    """Tokens, cached logits, two Trainer checkpoints in fp32 with Adam's moments, and the output."""
    sizes = {name: math.prod(shape) for name, shape in job.student.expected.items()}
    trained = sum(size for name, size in sizes.items() if job.trains(name))
    checkpoint = 4 * sum(sizes.values()) + 8 * trained
    per_token = 4 + 8 * (job.teacher_top_k or 0)
    return job.tokens * per_token + 2 * checkpoint + sum(sizes.values()) * job.student.dtype.itemsize


def _heal(
    job: Job,
    arguments: TrainingArguments,
    stage: Staging,
    text: TextSource,
    skipped: int,
    test_tokens: Tensor,
    bar: Progress,
) -> HealReport:
    from .text import PackedText, cache_teacher
    from .training import HealingTrainer, Teacher, last_checkpoint, make_student

    work = Staging(stage.path / _WORK)
    device = arguments.device

    def judged_before() -> tuple[Predictions, Predictions]:
        work.path.mkdir(exist_ok=True)
        if not work.has(PackedText.FILE):
            rows = packed(text, job.student.tokenizer(), job.sequence_length)
            PackedText.write(work, islice(rows, skipped, skipped + -(-job.tokens // job.sequence_length)))
        teacher = _judge(job.teacher, test_tokens, device, bar, "Judging the teacher")
        return teacher, _judge(job.student, test_tokens, device, bar, "Judging the model")

    of_teacher, before = group.from_first(judged_before)
    dataset = PackedText(work.path, job.sequence_length, cached=job.teacher_top_k is not None)
    teacher = Teacher(job.teacher, job.dtype, device) if job.weights.kl else None
    if teacher is not None and job.teacher_top_k is not None:
        cache_teacher(dataset, teacher, work, job.teacher_top_k, bar)
        group.from_first(lambda: None)  # all parts are there
        teacher = None
    student = make_student(job.student, job.trains, job.weights, None if teacher is None else teacher.log_p)
    trainer = HealingTrainer(student, arguments, dataset, job.schedule, teacher, bar)
    resumed = last_checkpoint(work.path)
    try:
        with _without_progress_bars():
            trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        healed = _Healed(job.student, {name: w for name, w in trainer.weights().items() if job.trains(name)})
    except Exception:
        stage.keep = last_checkpoint(work.path) is not None
        raise
    after = group.from_first(lambda: _judge(healed, test_tokens, device, bar, "Judging the result"))
    report = HealReport(
        model=job.student.path.resolve().name,
        teacher=job.teacher.path.resolve().name,
        format=job.format,
        trainable=job.trainable,
        trained_weights=sum(math.prod(shape) for name, shape in job.student.expected.items() if job.trains(name)),
        tokens=arguments.max_steps * job.step_tokens(group.size()),
        text_tokens=len(dataset) * job.sequence_length,
        steps=arguments.max_steps,
        loss={int(entry["step"]): entry["loss"] for entry in trainer.state.log_history if "loss" in entry},
        test_tokens=test_tokens.numel(),
        perplexity_teacher=math.exp(of_teacher.nats),
        perplexity_before=math.exp(before.nats),
        perplexity_after=math.exp(after.nats),
        agreement_before=_agreement(of_teacher, before),
        agreement_after=_agreement(of_teacher, after),
    )
    if group.is_first():
        stage.write_json("heal_report.json", report.to_dict())
        (stage.path / "heal_report.txt").write_text(str(report))
        write_model(stage, healed, job.export, job.layers, healed.attention, bar)
        shutil.rmtree(work.path)
    return report


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """transformers', one for each checkpoint that is saved."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class _Healed(Checkpoint):
    """A native checkpoint with some weights replaced, rounded to its dtype; the others are what the files hold."""

    def __init__(self, source: Checkpoint, trained: Mapping[str, Tensor]) -> None:
        self.path, self.config, self.dtype = source.path, source.config, source.dtype
        self.expected, self.shapes = source.expected, source.shapes
        self._source, self._trained = source, trained

    def tensor(self, name: str) -> Tensor:
        trained = self._trained.get(name)
        return self._source.tensor(name) if trained is None else trained.to("cpu", self.dtype)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._source.tokenizer()

    def identity(self) -> list[tuple[str, int, int]]:
        return self._source.identity()

    def attention(self, index: int) -> dict[str, Tensor]:
        """The attention weights of one layer."""
        prefix = f"model.layers.{index}.self_attn."
        return {name.removeprefix(prefix): self.tensor(name) for name in self.expected if name.startswith(prefix)}


def _judge(checkpoint: Checkpoint, tokens: Tensor, device: torch.device, bar: Progress, what: str) -> Predictions:
    """Of a model, original or native, with one layer in memory at a time, as conversion judges."""
    model_type = checkpoint.config.model_type
    original = Original(checkpoint, family(base_model_type(model_type) or model_type), device)
    stream = original.stream(tokens)
    for index in bar.track(range(checkpoint.config.num_hidden_layers), description=what):
        run_layer(original.layer(index), stream, original.layer_inputs(index, tokens.shape[1]))
        original.unload(index)
    return original.predictions([(stream, tokens)])[0]


def _agreement(one: Predictions, other: Predictions) -> float:
    return float((one.likeliest == other.likeliest).float().mean())
