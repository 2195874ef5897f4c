"""evaluate(): several models, one after the other, at the same text and tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import cached_property, partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import print as print_rich
from torch import Tensor

from ..checkpoint import Staging, check_out_path, file_identity, staging
from ..runtime import MLAModel
from ..text import TextSource, split_text, token_sequences
from .report import Evaluation, Result
from .subject import Subject, perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .harness import HarnessTask

__all__ = ["PAPER_TASKS", "evaluate"]

# What TransMLA was judged by (Meng et al., arXiv 2502.07864).
PAPER_TASKS = ("mmlu", "arc_easy", "arc_challenge", "piqa", "hellaswag", "openbookqa", "winogrande")

_DTYPES = ("float32", "bfloat16", "float16")


def evaluate(
    models: str | Path | Sequence[str | Path],
    out_path: str | Path | None = None,
    *,
    text: TextSource = None,
    text_tokens: int = 32768,
    sequence_length: int = 512,
    tasks: Sequence[str] = (),
    num_fewshot: int | None = None,
    limit: int | None = None,
    include_path: str | Path | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> Evaluation:
    """Perplexity of a text and scores of lm-evaluation-harness, models side by side.

    Models with latent attention run on this package's kernels, all others in transformers.

    Args:
        models: directories of config.json and safetensors, or GGUF files.
        out_path: directory to write eval.{json,md,png} to; it appears when all is done. When a killed run is repeated,
            the tasks that a model was through with are not asked again.
        text: a text file, a list of texts, a `datasets` name, or None for the last quarter of the text that comes with
            Python, far behind what convert() calibrates on by default.
        text_tokens: of the text, at most; 0 leaves perplexity out.
        sequence_length: tokens of each piece of the text, which is read without what went before.
        tasks: of lm-evaluation-harness; "paper" stands for MMLU, ARC, PIQA, HellaSwag, OpenBookQA and WinoGrande.
        num_fewshot: examples in front of each question; None: the task's own number, or none.
        limit: documents of each task; None takes all.
        include_path: directory of task YAMLs of one's own; Python functions that they name are run.
        dtype: to compute in: "float32", "bfloat16" or "float16"; None takes each checkpoint's.
        device: where to compute.
        progress: show progress bars.
    Raises:
        ValueError: a bad argument; TransMLAError: a bad model; all before anything is computed.
    """
    models = [models] if isinstance(models, (str, Path)) else models
    out_path = None if out_path is None else Path(out_path)
    include_path = None if include_path is None else Path(include_path)
    tasks = list(dict.fromkeys(name for task in tasks for name in (PAPER_TASKS if task == "paper" else [task])))
    if not models or not (tasks or text_tokens):
        raise ValueError("nothing to do: give models, and a text or tasks")
    if text_tokens < 0 or sequence_length < 2:
        raise ValueError(f"text_tokens must be >= 0 and sequence_length >= 2, got {text_tokens} and {sequence_length}")
    if (num_fewshot or 0) < 0 or (limit is not None and limit < 1):
        raise ValueError(f"num_fewshot must be >= 0 and limit >= 1, got {num_fewshot} and {limit}")
    if dtype not in (None, *_DTYPES):
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    if include_path is not None and not include_path.is_dir():
        raise ValueError(f"include_path {include_path} is no directory")
    if out_path is not None:
        check_out_path(out_path, overwrite=False)
    subjects = [Subject(path) for path in models]
    names = _names(subjects)
    sequences = _sequences(subjects, text, text_tokens, sequence_length)
    harness_tasks = _load_tasks(tasks, include_path, num_fewshot)

    settings = {
        "transmla_ext": version("transmla_ext"),
        "torch": torch.__version__,
        "lm_eval": version("lm_eval") if tasks else None,
        "text": _shown(text) if text_tokens else None,
        "text_tokens": sequences[0].numel() or None,
        "sequence_length": sequence_length if text_tokens else None,
        "num_fewshot": num_fewshot,
        "limit": limit,
        "dtype": dtype,
        "device": device,
    }
    fingerprint = {
        "settings": settings,
        "tasks": tasks,
        "text": sha256(repr([its.tolist() for its in sequences]).encode()).hexdigest(),
        "include_path": [file_identity(file) for file in sorted(include_path.rglob("*.yaml"))] if include_path else [],
        "models": [(name, subject.identity) for name, subject in zip(names, subjects, strict=True)],
    }
    results = {}
    with nullcontext() if out_path is None else staging(out_path, fingerprint, overwrite=False) as stage:
        if stage is not None:
            stage.keep = True
        for i, (name, subject) in enumerate(zip(names, subjects, strict=True)):
            if progress:
                print_rich(f"[bold]{name}")
            judge = _Judge(subject, dtype, device, progress)
            jobs = [partial(judge.text, sequences[i])] if text_tokens else []
            jobs += [partial(judge.task, task, limit) for task in harness_tasks]
            results[name] = [its for j, job in enumerate(jobs) for its in _once(stage, f".{i}-{j}.json", job)]
        evaluation = Evaluation(settings=settings, results=results)
        if stage is not None:
            stage.write_json("eval.json", asdict(evaluation))
            (stage.path / "eval.md").write_text(evaluation.markdown(), encoding="utf-8")
            evaluation.save_picture(stage.path / "eval.png")
    return evaluation


class _Judge:
    """Asks one model, which is loaded when it is asked first."""

    def __init__(self, subject: Subject, dtype: str | None, device: str, progress: bool) -> None:
        self._subject, self._dtype, self._device, self._progress = subject, dtype, device, progress

    @cached_property
    def _model(self) -> MLAModel | PreTrainedModel:
        return self._subject.load(dtype=self._dtype, device=self._device)

    @cached_property
    def _lm(self) -> Any:
        from .harness import harness_model

        return harness_model(self._model, self._subject.tokenizer)

    def text(self, sequences: Tensor) -> list[Result]:
        value = perplexity(self._model, sequences, progress=self._progress)
        return [Result(task="text", metric="perplexity", value=value, stderr=None, higher_is_better=False)]

    def task(self, task: HarnessTask, limit: int | None) -> list[Result]:
        from .harness import run_task

        return run_task(self._lm, task, limit=limit, progress=self._progress)


def _once(stage: Staging | None, name: str, job: Callable[[], list[Result]]) -> list[Result]:
    """The job's results, or those that a killed run got."""
    if stage is None:
        return job()
    if not stage.has(name):
        stage.write_json(name, [asdict(result) for result in job()])
    return [Result(**fields) for fields in stage.read_json(name)]


def _sequences(subjects: Sequence[Subject], text: TextSource, num_tokens: int, sequence_length: int) -> list[Tensor]:
    """The text in the tokens of each model: [num_sequences, sequence_length], int64; num_tokens=0 gives none."""
    if not num_tokens:
        return [torch.empty(0, sequence_length, dtype=torch.int64)] * len(subjects)
    for subject in subjects:
        most = getattr(subject.config, "max_position_embeddings", sequence_length)
        if sequence_length > most:
            raise ValueError(f"sequence_length={sequence_length} exceeds the {most} positions of {subject.path}")
    source = split_text(None)[1] if text is None else text
    count = max(1, num_tokens // sequence_length)
    sequences = [token_sequences(source, subject.tokenizer, count, sequence_length) for subject in subjects]
    if not all(map(len, sequences)):
        raise ValueError(f"text too short: give at least one sequence of {sequence_length} tokens")
    return sequences


def _load_tasks(names: Sequence[str], include_path: Path | None, num_fewshot: int | None) -> list[HarnessTask]:
    if not names:
        return []
    try:
        from .harness import load_tasks
    except ImportError as error:
        if error.name is None or not error.name.startswith("lm_eval"):
            raise
        raise ValueError("tasks are lm-evaluation-harness's: pip install 'transmla_ext[eval]'") from None
    return load_tasks(names, include_path, num_fewshot)


def _names(subjects: Sequence[Subject]) -> list[str]:
    """The models' directories without what is above them, unless two are called the same."""
    names = [subject.path.resolve().name for subject in subjects]
    if len(set(names)) < len(names):
        names = [str(subject.path) for subject in subjects]
    if len(set(names)) < len(names):
        raise ValueError(f"a model is named twice: {', '.join(names)}")
    return names


def _shown(text: TextSource) -> str:
    if text is None:
        return "pydoc_data.topics, last quarter"
    return str(text) if isinstance(text, (str, Path)) else f"{len(text)} texts"
