"""What a conversion will do (plan) and what it did (report): numbers, text, picture."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table

__all__ = ["ConversionPlan", "ConversionReport", "LayerReport", "plain", "table_of"]


@dataclass(frozen=True, kw_only=True)
class ConversionPlan:
    """Shapes, bytes and memory of a conversion, known from config.json and the tensors' headers alone."""

    model: str
    format: str
    method: str
    dtype: str
    num_layers: int
    attention: dict[str, int]  # the original's shape
    mla: dict[str, int | str | None]  # shape of the converted layers; "auto" differs from layer to layer
    freqfold: list[int]  # candidates; the one with the least error on held-out text is taken, layer by layer
    refine_steps: int  # of each layer, and then of each window; 0 is the closed form alone
    refine_window: int  # layers refined together
    calibration_tokens: int
    held_out_tokens: int
    cache_bytes_before: int  # per token, all layers, at `dtype`
    cache_bytes_after: int  # per token, all layers, as an engine that loads this format caches it; "auto": at most
    output_bytes: int
    peak_memory_bytes: int  # estimate, resident, the interpreter and libraries included

    @property
    def cache_saved(self) -> float:
        """Fraction of the cache saved; negative if the format pads it beyond the original."""
        return 1 - self.cache_bytes_after / self.cache_bytes_before

    def table(self) -> RenderableType:
        table = table_of(f"{self.model} → MLA ({self.method}, format {self.format}, {self.dtype})")
        for key, value in self.attention.items():
            table.add_row(key, f"{value}")
        for key, converted in self.mla.items():
            table.add_row(f"→ {key}", f"{converted}")
        table.add_row("layers", f"{self.num_layers}")
        table.add_row("FreqFold candidates", ", ".join(map(str, self.freqfold)))
        table.add_row("refinement steps, layers together", f"{self.refine_steps}, {self.refine_window}")
        table.add_row("calibration / held-out tokens", f"{self.calibration_tokens:,} / {self.held_out_tokens:,}")
        table.add_row("cache bytes per token", f"{self.cache_bytes_before:,} → {self.cache_bytes_after:,}")
        table.add_row("cache saved", f"{self.cache_saved:.2%}")
        table.add_row("output size", f"{self.output_bytes / 1e9:.2f} GB")
        table.add_row("peak memory, about", f"{self.peak_memory_bytes / 1e9:.2f} GB")
        return table

    def __str__(self) -> str:
        return plain(self.table())


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """How one layer fared."""

    freqfold: int
    rope_energy: float  # fraction of E|k|² that keeps RoPE
    latent_energy: float  # fraction of the balanced [k_nope; v] second moment in the latent
    attention_error: float  # ‖closed form − original‖² / ‖original‖² of its output, held-out text, same input
    # Mean square of the difference between both models' hidden states behind the layer, each divided by its root mean
    # square; held-out text, with all that was lost so far.
    hidden_state_error: float = math.nan


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """The plan that was carried out, each layer's losses, and the model's on text that it was not calibrated on."""

    plan: ConversionPlan
    layers: list[LayerReport]
    test_tokens: int  # that all that follows was measured on
    perplexity_before: float
    perplexity_after: float
    agreement: float  # fraction of held-out tokens for which both models' likeliest is the same
    recall: dict[int, list[float]]  # tokens back: fraction of a random string repeated rightly, before and after
    seconds: float = field(default=0.0, compare=False)  # of this run; not saved, so that equal runs write equal bytes

    @property
    def excess_nats(self) -> float:
        """ln(perplexity after / before)."""
        return math.log(self.perplexity_after / self.perplexity_before)

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        del values["seconds"]
        return {**values, "excess_nats": self.excess_nats}

    def table(self) -> RenderableType:
        table = table_of(f"{self.plan.model} → MLA ({self.plan.method}, format {self.plan.format})")
        errors = [layer.attention_error for layer in self.layers]
        worst = max(range(len(errors)), key=errors.__getitem__)
        table.add_row("cache bytes per token", f"{self.plan.cache_bytes_before:,} → {self.plan.cache_bytes_after:,}")
        table.add_row("cache saved", f"{self.plan.cache_saved:.2%}")
        table.add_row(
            f"perplexity, {self.test_tokens:,} tokens not calibrated on",
            f"{self.perplexity_before:.2f} → {self.perplexity_after:.2f}",
        )
        table.add_row("excess nats per token", f"{self.excess_nats:.3f}")
        table.add_row("same likeliest token", f"{self.agreement:.1%}")
        for distance, (before, after) in self.recall.items():
            table.add_row(f"random string recalled {distance:,} tokens on", f"{before:.0%} → {after:.0%}")
        table.add_row("attention-output error, mean", f"{sum(errors) / len(errors):.3f}")
        table.add_row("attention-output error, worst", f"{errors[worst]:.3f} (layer {worst})")
        table.add_row("hidden-state error behind the last layer", f"{self.layers[-1].hidden_state_error:.3f}")
        table.add_row("key energy with RoPE, mean", f"{_mean(self.layers, 'rope_energy'):.1%}")
        table.add_row("latent energy, mean", f"{_mean(self.layers, 'latent_energy'):.1%}")
        if self.seconds:
            table.add_row("time", f"{self.seconds:.0f} s")
        return table

    def __str__(self) -> str:
        return plain(self.table())

    def save_picture(self, path: Path) -> None:
        """A PNG: energy kept and attention-output error, layer by layer."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(9, 3.6), layout="constrained")
        energy, error = figure.subplots(1, 2)
        index = range(len(self.layers))
        energy.plot(index, [layer.rope_energy for layer in self.layers], marker=".", label="keys, with RoPE")
        energy.plot(index, [layer.latent_energy for layer in self.layers], marker=".", label="latent")
        energy.set(title="Energy kept", ylim=(0, 1.02), ylabel="fraction")
        energy.legend()
        attention_errors = [layer.attention_error for layer in self.layers]
        error.bar(index, attention_errors, color="tab:red", label="closed form, attention")
        hidden_state_errors = [layer.hidden_state_error for layer in self.layers]
        error.plot(index, hidden_state_errors, marker=".", color="black", label="result, hidden states")
        error.legend()
        error.set(title="Error on held-out text", ylabel="relative, squared")
        for axes in (energy, error):
            axes.set_xlabel("layer")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.3)
        figure.suptitle(
            f"{self.plan.model}: cache −{self.plan.cache_saved:.2%}, "
            f"perplexity {self.perplexity_before:.2f} → {self.perplexity_after:.2f}"
        )
        figure.savefig(path, dpi=120)


def _mean(layers: list[LayerReport], name: str) -> float:
    return float(sum(getattr(layer, name) for layer in layers) / len(layers))


def table_of(title: str) -> Table:
    table = Table(title=title, show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    return table


def plain(renderable: RenderableType) -> str:
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()
