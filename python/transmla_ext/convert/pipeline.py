"""convert(): the whole pipeline, top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from typing_extensions import Unpack

from .. import models
from ..architectures import AttentionShape, Projections
from ..checkpoint import Checkpoint, Staging, check_out_path, staging
from ..config import MLAConfig
from ..errors import CheckpointError
from ..text import TextSource
from . import group
from .allocate import Candidate, allocate
from .calibrate import (
    BATCH_TOKENS,
    AttentionIO,
    CalibrationTokens,
    LayerInputs,
    LayerStatistics,
    Original,
    StatisticsCollector,
    Stream,
    calibration_tokens,
    run_layer,
)
from .export import write_model
from .job import ConversionOptions, Job, candidate_freqfolds, check_disk
from .layer import MLALayer, build_layer, truncated
from .low_rank import joint_latent, leading_basis
from .recall import RECALL_STRING, recall_tokens, recalled
from .refine import hidden_state_error, refine
from .report import ConversionPlan, ConversionReport, LayerReport
from .rope_split import RopeSplit, rope_slots, split_rope

if TYPE_CHECKING:
    from ..models import MLAAttention

__all__ = ["convert", "dry_run", "progress_bars"]

_ALLOCATION = "layer-shapes.json"
# Layers on disk, by how far they are: refined alone, which their window's refinement starts from, and done.
_ALONE = "layer-alone"
_FINISHED = "layer"
Solved = tuple[MLALayer, LayerReport]
_SURVEY_TOKENS = 8192  # to measure on what a layer would gain by more cache
_SURVEY_SHARES = (0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0)  # of an average layer's cache
_RECALL_DISTANCES = {512: 4, 2048: 1}  # tokens: sequences


def convert(
    model_path: str | Path,
    out_path: str | Path,
    *,
    calibration: TextSource = None,
    test: TextSource = None,
    device: str = "cpu",
    overwrite: bool = False,
    progress: bool = True,
    **options: Unpack[ConversionOptions],
) -> ConversionReport:
    """Converts a GQA/MHA model to MLA; the output directory appears whole or not at all, a killed run resumes.

    Called by all processes of a torch.distributed group, they share the calibration tokens; the first one writes.

    Args:
        model_path: local directory of config.json and safetensors, or a GGUF file.
        out_path: directory to write; must be empty or absent unless `overwrite`.
        calibration: a text file, a list of texts, a `datasets` name, or None for text that comes with Python.
        test: text to judge the result by, in the same forms; None: calibration text that is held out.
        device: where to compute.
        overwrite: replace a non-empty output directory.
        progress: show progress bars.
        kv_lora_rank: numbers of the latent per token and layer, default 512; "full" loses nothing and "auto" deals
            cache_bytes out over the layers by what each gains (both in the native format only).
        qk_rope_head_dim: numbers of the shared RoPE key; divides what RoPE turns of a head. Default: the most up to 64.
        q_lora_rank: also factors the query projection, to this rank; None, the default, leaves it whole.
        cache_bytes: with kv_lora_rank="auto", the most that a token may take in the cache, all layers together.
        format: "transmla" (default), any shape, for this package and AutoModelForCausalLM after `import transmla_ext`;
            "deepseek_v3", which unmodified transformers, vLLM and SGLang load; "deepseek_v2", for Mixtral, which vLLM
            and SGLang load.
        method: "transmla" (Meng et al., arXiv 2502.07864), or "auto", the default, whose bases know what reads them:
            keys count by the queries of their heads, values by W_O, and RoPE pairs are rotated as complex numbers.
        refine_steps: of Adam on each layer after that, and then on each window of layers, 512 calibration tokens a
            step, so that the hidden states behind them are the original's whatever the layers before them lost.
            Default: 250 with method "auto", none with "transmla" or where nothing is lost.
        refine_window: layers refined together, default 6; fewer take less memory and lose more. 1: each alone.
        seed: of the refinement's batches.
        freqfold: adjacent RoPE frequencies treated as one. "auto" (default): the fewest; with method "transmla" each
            layer's best on held-out text.
        calibration_tokens: tokens to calibrate on, default 32768; a further eighth of the text is held out.
        sequence_length: tokens per calibration sequence, default 512.
        layers: convert the first so many layers for the whole model: to try settings before a long run.
        dtype: of the written weights: "float32", "bfloat16" or "float16"; None, the default, keeps the model's.
        pad_to_engine: stock formats: zero-pad to the shapes that engines' kernels take (512 + 64, heads of 128);
            None, the default, does so where only the latent and the heads grow.
    Raises:
        ValueError: a bad argument; UnsupportedModelError, CheckpointError: a bad model; all before anything is written.
    """
    started = time.monotonic()
    out_path = Path(out_path)
    job = Job.prepare(model_path, device=device, **options)
    if group.is_first():
        check_out_path(out_path, overwrite=overwrite)
    if job.source.path.resolve().is_relative_to(out_path.resolve()):
        raise ValueError(f"output directory {out_path} holds the model itself, which would be lost; choose another")
    check_disk(out_path, job.plan.output_bytes)
    tokens = calibration_tokens(calibration, job.source.tokenizer(), job.num_tokens, job.sequence_length, test)
    with progress_bars(progress and group.is_first()) as bar:
        if not group.is_first():
            report = _solve(job, tokens, None, bar)
        else:
            _check_weights(job.source, bar)
            fingerprint = {
                "version": version("transmla_ext"),
                "plan": asdict(job.plan),
                "seed": job.seed,
                "source": job.source.identity(),
                "tokens": tokens.digest(),
            }
            with staging(out_path, fingerprint, overwrite=overwrite) as stage:
                report = _solve(job, tokens, stage, bar)
                _export(job, report, stage, bar)
    return replace(report, seconds=time.monotonic() - started)


def dry_run(model_path: str | Path, **options: Unpack[ConversionOptions]) -> ConversionPlan:
    """What convert() with these options would do: shapes, cache bytes per token, peak memory. Reads no weight."""
    return Job.prepare(model_path, **options).plan


def _solve(job: Job, tokens: CalibrationTokens, stage: Staging | None, bar: Progress) -> ConversionReport:
    """Converts the attention layers one after the other; each one done is in the first process' staging directory."""
    original = Original(job.source, job.architecture, job.device)
    train = _Text(original, tokens.train[group.rank() :: group.size()])
    if not job.plan.refine_steps:
        train.converted.clear()  # nothing is learned from it
    held_out = _Text(original, tokens.held_out)
    test = held_out if tokens.test is tokens.held_out else _Text(original, tokens.test)
    most = original.config.max_position_embeddings - RECALL_STRING
    recalls = {
        distance: _Text(original, recall_tokens(tokens.held_out, distance, num_sequences))
        for distance, num_sequences in _RECALL_DISTANCES.items()
        if distance <= most
    }
    judges = [text for text in (test, *recalls.values()) if text is not held_out]
    uniform = Candidate(job.target.kv_lora_rank, job.qk_rope_head_dim)
    candidates = [uniform] * job.plan.num_layers
    if job.cache_budget is not None:
        candidates = _allocation(job, job.cache_budget, original, tokens, stage, bar)
    solver = _Solver(job, original, train, held_out, stage, bar)
    reports: list[LayerReport] = []
    task = bar.add_task("Converting layers", total=job.plan.num_layers)
    for window in job.windows():
        layers = [original.layer(index) for index in window]
        attentions = [layer.get_submodule("self_attn") for layer in layers]
        finished = group.from_first(lambda: _read_layers(stage, _FINISHED, window))  # noqa: B023
        behind = judges if finished is None else [train, held_out, *judges]
        if finished is None:
            finished = solver.solve(window, layers, [candidates[index] for index in window])
        for index, layer, attention, (mla, report) in zip(window, layers, attentions, finished, strict=True):
            layer.register_module("self_attn", attention)
            inputs = [original.layer_inputs(index, text.tokens.shape[1]) for text in behind]
            for text, its_inputs in zip(behind, inputs, strict=True):
                run_layer(layer, text.original, its_inputs)
            layer.register_module("self_attn", _attention(original, mla, index))
            for text, its_inputs in zip(behind, inputs, strict=True):
                run_layer(layer, text.converted, its_inputs)
            layer.register_module("self_attn", attention)
            original.unload(index)
            reports.append(report)
            bar.advance(task)

    texts = [test, *recalls.values()]
    of_original = original.predictions([(text.original, text.tokens) for text in texts])
    of_converted = original.predictions([(text.converted, text.tokens) for text in texts])
    before, after = of_original[0], of_converted[0]
    asked = zip(recalls.items(), of_original[1:], of_converted[1:], strict=True)
    return ConversionReport(
        plan=job.plan,
        layers=reports,
        test_tokens=test.tokens.numel(),
        perplexity_before=math.exp(before.nats),
        perplexity_after=math.exp(after.nats),
        agreement=float((before.likeliest == after.likeliest).float().mean()),
        recall={distance: [recalled(seen, text.tokens) for seen in both] for (distance, text), *both in asked},
    )


class _Text:
    """Tokens on their way through the original and through the layers converted so far."""

    def __init__(self, original: Original, tokens: Tensor) -> None:
        self.tokens = tokens
        self.original = original.stream(tokens)
        self.converted = list(self.original)


def _allocation(
    job: Job, budget: int, original: Original, tokens: CalibrationTokens, stage: Staging | None, bar: Progress
) -> list[Candidate]:
    """Each layer's shape within the cache budget, from the closed form's errors on a part of the text."""

    def read() -> list[Candidate] | None:
        if stage is None or not stage.has(_ALLOCATION):
            return None
        return [Candidate(**fields) for fields in stage.read_json(_ALLOCATION)["layers"]]

    chosen = group.from_first(read)
    if chosen is None:
        own = tokens.train[: max(group.size(), _SURVEY_TOKENS // job.sequence_length)]
        train = original.stream(own[group.rank() :: group.size()])
        probe = original.stream(tokens.held_out[: max(1, BATCH_TOKENS // job.sequence_length)])
        survey = []
        for index in bar.track(range(job.plan.num_layers), description="Surveying layers"):
            survey.append(_survey_layer(job, original, index, train, probe))
            original.unload(index)
        chosen = group.from_first(lambda: allocate(survey, budget))
        if stage is not None:
            stage.write_json(_ALLOCATION, {"layers": [asdict(candidate) for candidate in chosen]})
    return chosen


def _survey_layer(job: Job, original: Original, index: int, train: Stream, probe: Stream) -> list[Candidate]:
    """Shapes for a layer, with the mean of ‖error‖² / ‖output‖² of the tokens' hidden states behind it.

    Hidden states are compared, not the attention's output: a layer whose attention hardly matters needs little cache.
    """
    inputs = original.layer_inputs(index, job.sequence_length)
    layer = original.layer(index)
    attention = layer.get_submodule("self_attn")
    weights = job.architecture.projections(attention)
    collector = StatisticsCollector(weights, job.shape, queries=job.plan.method == "auto", factor_queries=False)
    run_layer(layer, train, inputs, collector)
    statistics = collector.statistics()
    before = list(probe)
    run_layer(layer, probe, inputs)

    def error(mla: MLALayer) -> float:
        layer.register_module("self_attn", _attention(original, mla, index))
        stream = list(before)
        run_layer(layer, stream, inputs)
        layer.register_module("self_attn", attention)
        errors = [(a - b).square().sum(-1) / b.square().sum(-1) for a, b in zip(stream, probe, strict=True)]
        return float(torch.cat(errors).double().mean())

    mean = job.target.kv_lora_rank + job.qk_rope_head_dim
    candidates = []
    for rope in (job.qk_rope_head_dim // 2, job.qk_rope_head_dim, 2 * job.qk_rope_head_dim):
        most = job.shape.cache_dim - rope
        ranks = sorted({min(most, int(share * mean) - rope) // 8 * 8 for share in _SURVEY_SHARES})
        if rope < 8 or rope % 8 or job.shape.rotary_dim % rope or ranks[-1] < 8:
            continue
        largest, _ = _convert_layer(
            job, Candidate(ranks[-1], rope), weights, statistics, original.rope_scale, lambda mla: 0.0
        )
        candidates += [Candidate(rank, rope, error(truncated(largest, rank))) for rank in ranks if rank >= 8]
    return candidates


@dataclass(frozen=True)
class _Solver:
    """Finds the MLA weights of successive layers; what both texts are in between stays in their streams."""

    job: Job
    original: Original
    train: _Text
    held_out: _Text
    stage: Staging | None
    bar: Progress

    def solve(self, window: range, layers: list[nn.Module], candidates: list[Candidate]) -> list[Solved]:
        """The weights of a window's layers, which then have them; all streams of both texts come out behind them."""
        train, held_out, stage = self.train, self.held_out, self.stage
        inputs = [self.original.layer_inputs(index, self.job.sequence_length) for index in window]
        before = list(train.converted), list(held_out.converted)
        wanted: list[Stream] = []
        solved: list[Solved] = []
        for index, layer, its_inputs, candidate in zip(window, layers, inputs, candidates, strict=True):
            alone = group.from_first(lambda: _read_layers(stage, _ALONE, [index]))  # noqa: B023
            if alone is None:
                alone = [self._solve_layer(index, layer, its_inputs, candidate)]
                if len(window) > 1:
                    _write_layers(stage, _ALONE, [index], alone)
            else:
                run_layer(layer, train.original, its_inputs)
                run_layer(layer, held_out.original, its_inputs)
            solved += alone
            wanted.append(list(held_out.original))
            layer.register_module("self_attn", _attention(self.original, alone[0][0], index))
            if layer is not layers[-1]:
                self._advance(layer, its_inputs)
        train.converted, held_out.converted = before
        if len(window) > 1:
            self._refine(window, layers, inputs)
        finished = []
        for layer, its_inputs, (mla, report), expected in zip(layers, inputs, solved, wanted, strict=True):
            self._advance(layer, its_inputs)
            error = group.from_first(lambda: hidden_state_error(held_out.converted, expected))  # noqa: B023
            mla = replace(mla, weights=dict(layer.get_submodule("self_attn").state_dict()))
            finished.append((mla, replace(report, hidden_state_error=error)))
        _write_layers(stage, _FINISHED, window, finished)
        return finished

    def _solve_layer(self, index: int, layer: nn.Module, inputs: LayerInputs, candidate: Candidate) -> Solved:
        """One layer's weights, refined alone; the original's streams of both texts come out behind the layer."""
        job, original = self.job, self.original
        attention = layer.get_submodule("self_attn")
        weights = job.architecture.projections(attention)
        collector = StatisticsCollector(
            weights, job.shape, queries=job.plan.method == "auto", factor_queries=job.target.q_lora_rank is not None
        )
        probe: list[AttentionIO] = []
        run_layer(layer, self.held_out.original, inputs, probe.append)
        run_layer(layer, self.train.original, inputs, collector)
        error = partial(_attention_error, original, index, probe, inputs)
        statistics = collector.statistics()
        solved = group.from_first(
            lambda: _convert_layer(job, candidate, weights, statistics, original.rope_scale, error)
        )
        if job.plan.refine_steps:
            mla, report = solved
            refined = _attention(original, mla, index)
            layer.register_module("self_attn", refined)
            self._refine([index], [layer], [inputs])
            solved = replace(mla, weights=dict(refined.state_dict())), report
            layer.register_module("self_attn", attention)
        return solved

    def _refine(self, window: Sequence[int], layers: list[nn.Module], inputs: list[LayerInputs]) -> None:
        """refine() of layers that the original's streams are behind and the converted model's before."""
        pairs, unseen = (list(zip(text.converted, text.original, strict=True)) for text in (self.train, self.held_out))
        steps, seed = self.job.plan.refine_steps, self.job.seed + window[0]
        name = "Refining " + "-".join(map(str, sorted({window[0], window[-1]})))
        task = self.bar.add_task(name, total=steps)
        refine(layers, pairs, unseen, inputs, steps=steps, seed=seed, on_step=lambda: self.bar.advance(task))
        self.bar.remove_task(task)

    def _advance(self, layer: nn.Module, inputs: LayerInputs) -> None:
        """Takes what the converted layers made of both texts through the next one."""
        run_layer(layer, self.train.converted, inputs)
        run_layer(layer, self.held_out.converted, inputs)


def _convert_layer(
    job: Job,
    candidate: Candidate,
    weights: Projections,
    statistics: LayerStatistics,
    rope_scale: float,
    error: Callable[[MLALayer], float],
) -> tuple[MLALayer, LayerReport]:
    """The layer with the FreqFold that has the least error of the attention output on held-out text."""
    best = None
    queries = statistics.queries
    value_metric = None if queries is None else _value_metric(weights, job.shape)
    q_basis = None
    if job.target.q_lora_rank is not None and statistics.q is not None:
        q_basis, _ = leading_basis(statistics.q, job.target.q_lora_rank)
    for freqfold in candidate_freqfolds(job.shape, candidate.qk_rope_head_dim, job.freqfold, job.plan.method):
        slots = rope_slots(job.shape, candidate.qk_rope_head_dim, freqfold, job.export.frequencies)
        split = split_rope(statistics.keys, job.shape, freqfold, slots, queries)
        metrics = None if queries is None or value_metric is None else (_key_metric(split, queries), value_metric)
        latent = joint_latent(statistics.kv, split.nope_keys.flatten(1), candidate.kv_lora_rank, metrics)
        mla = build_layer(weights, job.shape, split, latent, rope_scale, q_basis)
        report = LayerReport(
            freqfold=freqfold,
            rope_energy=split.energy,
            latent_energy=latent.energy,
            attention_error=error(mla),
        )
        if best is None or report.attention_error < best[1].attention_error:
            best = mla, report
    assert best is not None  # freqfolds() names at least one
    return best


def _key_metric(split: RopeSplit, queries: Tensor) -> Tensor:
    """E[q qᵀ] of the queries of all heads that read the keys without RoPE, [nope_dim, nope_dim]."""
    rows = split.nope_queries
    return torch.einsum("ngd,gde->nge", rows, queries).flatten(1) @ rows.flatten(1).mT


def _value_metric(weights: Projections, shape: AttentionShape) -> Tensor:
    """What W_O makes of the values' directions: W_Oᵀ W_O of the heads of each KV head, [kv_dim, kv_dim]."""
    w_o = weights.w_o.double().unflatten(1, (shape.num_kv_heads, -1, shape.head_dim))
    metric: Tensor = torch.block_diag(*torch.einsum("cgnd,cgne->gde", w_o, w_o))
    return metric


def _attention(original: Original, layer: MLALayer, index: int) -> MLAAttention:
    with torch.device("meta"):
        attention: MLAAttention = models.MLAAttention(original.config, layer.config, index)
    attention.load_state_dict(layer.weights, assign=True)
    return attention.to(original.device).requires_grad_(False).eval()


def _attention_error(
    original: Original, index: int, probe: list[AttentionIO], inputs: LayerInputs, layer: MLALayer
) -> float:
    """‖converted − original‖² / ‖original‖² of the attention output, given (input, original's output) pairs."""
    attention = _attention(original, layer, index)
    error = energy = 0.0
    with torch.inference_mode():
        for x, y in probe:
            actual, _ = attention(hidden_states=x, **inputs)
            error += (actual - y).double().square().sum().item()
            energy += y.double().square().sum().item()
    return error / energy


def _write_layers(stage: Staging | None, name: str, window: Sequence[int], layers: Sequence[Solved]) -> None:
    if stage is None:
        return
    for index, (mla, report) in zip(window, layers, strict=True):
        stage.write_tensors(f"{name}-{index:05d}.safetensors", mla.weights)
        stage.write_json(f"{name}-{index:05d}.json", {"config": mla.config.to_dict(), "report": asdict(report)})


def _read_layers(stage: Staging | None, name: str, window: Sequence[int]) -> list[Solved] | None:
    """Layers that are done already."""
    if stage is None or not all(stage.has(f"{name}-{index:05d}.json") for index in window):
        return None
    return [_read_layer(stage, f"{name}-{index:05d}") for index in window]


def _read_layer(stage: Staging, name: str) -> Solved:
    fields = stage.read_json(f"{name}.json")
    layer = MLALayer(MLAConfig(**fields["config"]), stage.read_tensors(f"{name}.safetensors"))
    return layer, LayerReport(**fields["report"])


def _export(job: Job, report: ConversionReport, stage: Staging, bar: Progress) -> None:
    """Writes the reports, and the model from the original's other tensors and the staged layers."""
    stage.write_json("conversion_report.json", report.to_dict())
    (stage.path / "conversion_report.txt").write_text(str(report))
    report.save_picture(stage.path / "conversion_report.png")
    names = [f"{_FINISHED}-{index:05d}" for index in range(job.plan.num_layers)]
    layers = [MLAConfig(**stage.read_json(f"{name}.json")["config"]) for name in names]
    weights = [f"{name}.safetensors" for name in names]
    write_model(stage, job.source, job.export, layers, lambda index: stage.read_tensors(weights[index]), bar)
    stage.remove("layer-*")


def _check_weights(source: Checkpoint, bar: Progress) -> None:
    """CheckpointError if a weight is NaN or infinite: found now, not hours later."""
    for name in bar.track(list(source.shapes), description="Checking weights"):
        if not source.tensor(name).isfinite().all():
            raise CheckpointError(f"{source.path}: {name} holds NaN or infinite values; download the model again")


@contextmanager
def progress_bars(show: bool) -> Iterator[Progress]:
    columns = (TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, disable=not show) as bar:
        yield bar
