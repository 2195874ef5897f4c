"""compare(): a model converted by TransMLA's method and by this package's, with each ingredient alone."""

from __future__ import annotations

import math
import shlex
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich import print as print_rich
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..checkpoint import open_checkpoint, staging
from ..text import TextSource, split_text
from .calibrate import calibration_tokens as read_tokens
from .export import Format
from .job import ConversionOptions, check_disk
from .pipeline import convert, dry_run

__all__ = ["Comparison", "Variant", "compare"]

# Directory: what it is called, its method, and what its conversion has that is otherwise than asked for.
_VARIANTS: dict[str, tuple[str, ConversionOptions]] = {
    "transmla": ("TransMLA", {"method": "transmla", "refine_steps": 0}),
    "transmla-refined": ("TransMLA's bases + refinement", {"method": "transmla"}),
    "auto-closed-form": ("query- and W_O-aware bases", {"refine_steps": 0}),
    "auto-alone": ("… + each layer refined alone", {"refine_window": 1}),
    "auto": ("… and layers together (auto)", {}),
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The original or one of its conversions, judged on text that none was calibrated on."""

    name: str
    directory: str | None  # beside the report, of a model that load() takes; None: the original
    perplexity: float
    excess_nats: float  # ln(perplexity / the original's)
    ratio: float | None  # of the excess nats to TransMLA's; None where TransMLA loses nothing
    agreement: float  # fraction of tokens for which the original's likeliest is its own
    recall: dict[str, float]  # tokens back: fraction of a random string repeated rightly
    cache_bytes: int  # per token, all layers
    seconds: float | None  # that converting took; None for the original, and if it was killed and resumed


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Variants of one model from the same calibration tokens, and how they were made."""

    model: str
    command: str  # the command line, every option spelt out
    versions: str
    tokens: dict[str, int]  # to calibrate on, held out to choose by, to judge by
    variants: list[Variant]

    def table(self) -> Table:
        names, *figures = self._headings()
        table = Table(names, box=SIMPLE_HEAD, padding=0)
        for heading in figures:  # a word a line: only the names are left to wrap in a terminal of 80 columns
            table.add_column(heading.replace(" ", "\n"), justify="right", no_wrap=True)
        for variant in self.variants:
            table.add_row(*_cells(variant))
        return table

    def markdown(self) -> str:
        """The table below what it takes to have it again."""
        tokens = ", ".join(f"{count:,} {purpose}" for purpose, count in self.tokens.items())
        headings = self._headings()
        rows = [headings, ["---", *["---:"] * (len(headings) - 1)], *map(_cells, self.variants)]
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join(["```", self.command, "```", f"Tokens: {tokens}. {self.versions}.", "", *lines, ""])

    def save_picture(self, path: Path) -> None:
        """A PNG: excess nats and conversion time of each variant."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 2.8), layout="constrained")
        nats, seconds = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
        converted = [variant for variant in self.variants if variant.directory is not None]
        names = [variant.name for variant in converted]
        losses = nats.barh(names, [variant.excess_nats for variant in converted], color="tab:red")
        nats.bar_label(losses, fmt="{:.3f}", padding=3)
        times = seconds.barh(names, [variant.seconds or 0 for variant in converted], color="tab:gray")
        seconds.bar_label(times, [_seconds(variant) for variant in converted], padding=3)
        nats.set(title="excess nats per token", ylim=(len(names) - 0.5, -0.5))
        seconds.set(title="conversion, seconds")
        for axes in (nats, seconds):
            axes.margins(x=0.2)
            axes.grid(axis="x", alpha=0.3)
            axes.set_axisbelow(True)
        before, after = self.variants[0].cache_bytes, converted[-1].cache_bytes
        figure.suptitle(f"{self.model}: cache bytes per token {before:,} → {after:,}")
        figure.savefig(path, dpi=120)

    def _headings(self) -> list[str]:
        recalls = [f"recall at {int(distance):,}" for distance in self.variants[0].recall]
        losses = ["perplexity", "excess nats", "ratio to TransMLA", "same top-1"]
        return ["", *losses, *recalls, "cache bytes", "seconds"]


def compare(
    model_path: str | Path,
    out_path: str | Path,
    *,
    calibration: TextSource = None,
    test: TextSource = None,
    kv_lora_rank: int = 512,
    qk_rope_head_dim: int | None = None,
    format: Format = "transmla",
    refine_steps: int | None = None,
    seed: int = 0,
    calibration_tokens: int = 32768,
    sequence_length: int = 512,
    layers: int | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> Comparison:
    """Converts a model by TransMLA's method, with each layer's best FreqFold, and by method "auto", with and without
    refinement: all on the same calibration tokens, to the same cache.

    The output directory holds compare.{json,md,png} and the models. It appears whole or not at all; a killed
    comparison resumes.

    Args:
        test: text to judge by; None: the last quarter of the calibration text, which is then not calibrated on.
        refine_steps: of the variants with refinement; None: as many as method "auto" takes.
        The others are convert()'s.
    Raises:
        ValueError: a bad argument; UnsupportedModelError, CheckpointError: a bad model; all before anything is written.
    """
    out_path = Path(out_path)
    options: ConversionOptions = {
        "kv_lora_rank": kv_lora_rank,
        "qk_rope_head_dim": qk_rope_head_dim,
        "format": format,
        "refine_steps": refine_steps,
        "seed": seed,
        "calibration_tokens": calibration_tokens,
        "sequence_length": sequence_length,
        "layers": layers,
    }
    plan = dry_run(model_path, **options)
    options["refine_steps"] = plan.refine_steps
    if not plan.refine_steps:
        raise ValueError("compare: refine_steps must be >= 1, got 0; without any is compared anyway")
    if out_path.exists() and not (out_path.is_dir() and not any(out_path.iterdir())):
        raise ValueError(f"output path {out_path} is there and no empty directory; choose another")
    check_disk(out_path, len(_VARIANTS) * plan.output_bytes)
    texts = {"calibration": calibration, "test": test}
    if test is None:
        calibration, test = split_text(calibration)
    source = open_checkpoint(model_path, num_layers=layers)
    tokens = read_tokens(calibration, source.tokenizer(), calibration_tokens, sequence_length, test)

    fingerprint = {
        "version": version("transmla_ext"),
        "options": options,
        "source": source.identity(),
        "tokens": tokens.digest(),
    }
    with staging(out_path, fingerprint, overwrite=False) as stage:
        for directory, (name, its_own) in _VARIANTS.items():
            finished = f".{directory}.json"
            if stage.has(finished):
                continue
            if progress:
                print_rich(f"[bold]{name}")
            resumed = (stage.path / f"{directory}.partial").exists()
            its_options: ConversionOptions = {**options, **its_own}
            report = convert(
                model_path,
                stage.path / directory,
                calibration=calibration,
                test=test,
                device=device,
                overwrite=True,  # a model whose conversion was killed before it was noted as finished
                progress=progress,
                **its_options,
            )
            stage.write_json(finished, None if resumed else report.seconds)
        reports = {directory: stage.read_json(f"{directory}/conversion_report.json") for directory in _VARIANTS}
        nats = reports["transmla"]["excess_nats"]
        variants = [_variant(None, reports["transmla"], nats, None)]
        for directory, its_report in reports.items():
            variants.append(_variant(directory, its_report, nats, stage.read_json(f".{directory}.json")))
        comparison = Comparison(
            model=plan.model,
            command=_command(model_path, {**texts, **options, "device": device}),
            versions=f"transmla_ext {version('transmla_ext')}, torch {torch.__version__}",
            tokens={
                "to calibrate on": tokens.train.numel(),
                "held out to choose by": tokens.held_out.numel(),
                "to judge by": tokens.test.numel(),
            },
            variants=variants,
        )
        stage.write_json("compare.json", asdict(comparison))
        (stage.path / "compare.md").write_text(comparison.markdown(), encoding="utf-8")
        comparison.save_picture(stage.path / "compare.png")
    return comparison


def _variant(directory: str | None, report: dict[str, Any], transmla_nats: float, seconds: float | None) -> Variant:
    """From a conversion_report.json: the conversion or, without a directory, the original."""
    side = "before" if directory is None else "after"
    perplexity = report[f"perplexity_{side}"]
    excess_nats = math.log(perplexity / report["perplexity_before"])
    return Variant(
        name="original" if directory is None else _VARIANTS[directory][0],
        directory=directory,
        perplexity=perplexity,
        excess_nats=excess_nats,
        ratio=excess_nats / transmla_nats if transmla_nats > 0 else None,
        agreement=1.0 if directory is None else report["agreement"],
        recall={distance: both[side == "after"] for distance, both in report["recall"].items()},
        cache_bytes=report["plan"][f"cache_bytes_{side}"],
        seconds=seconds,
    )


def _cells(variant: Variant) -> list[str]:
    return [
        variant.name,
        f"{variant.perplexity:.2f}",
        f"{variant.excess_nats:.3f}",
        "–" if variant.ratio is None else f"{variant.ratio:.2f} ×",
        f"{variant.agreement:.1%}",
        *(f"{fraction:.0%}" for fraction in variant.recall.values()),
        f"{variant.cache_bytes:,}",
        _seconds(variant),
    ]


def _seconds(variant: Variant) -> str:
    if variant.directory is None:
        return "–"
    return "resumed" if variant.seconds is None else f"{variant.seconds:,.0f}"


def _command(model_path: str | Path, options: dict[str, Any]) -> str:
    """The command line that compares like this; a text that is in no file is named for what it is."""
    words = ["transmla", "compare", str(model_path), "OUT"]
    for name, value in options.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value) if isinstance(value, (str, Path, int)) else "<texts>"]
    return shlex.join(words)
