"""What models scored: numbers, text, picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

__all__ = ["Evaluation", "Result"]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one model scored."""

    task: str  # "text", or lm-evaluation-harness's name
    metric: str
    value: float
    stderr: float | None  # standard error of the value, where it is known
    higher_is_better: bool | None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What several models scored at the same tasks, and how they were asked."""

    settings: dict[str, Any]
    results: dict[str, list[Result]]  # by model; of every model the same tasks and metrics in the same order

    def table(self) -> Table:
        heading, *models = self._headings()
        table = Table(heading, box=SIMPLE_HEAD)
        for model in models:
            table.add_column(model, justify="right")
        for row in self._rows():
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """The table below the settings."""
        headings = self._headings()
        rows = [headings, ["---", *["---:"] * len(self.results)], *self._rows()]
        lines = [f"| {' | '.join(row)} |" for row in rows]
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items() if value is not None)
        return "\n".join([f"{settings}.", "", *lines, ""])

    def save_picture(self, path: Path) -> None:
        """A PNG: a chart for each metric, a bar for each model, standard errors as whiskers."""
        from matplotlib.figure import Figure

        models = list(self.results)
        metrics = list(zip(*self.results.values(), strict=True))
        columns = min(4, len(metrics))
        rows = -(-len(metrics) // columns)
        figure = Figure(figsize=(2.6 * columns + 1, (0.35 * len(models) + 0.9) * rows), layout="constrained")
        charts = figure.subplots(rows, columns, sharey=True, squeeze=False).flat
        for results, chart in zip(metrics, charts, strict=False):
            stderrs = [result.stderr or 0.0 for result in results]
            colors = [f"tab:{'gray' if i == 0 and len(models) > 1 else 'blue'}" for i in range(len(models))]
            bars = chart.barh(models, [result.value for result in results], xerr=stderrs, color=colors)
            chart.bar_label(bars, [_number(result.value) for result in results], padding=3)
            chart.set_title(_name(results[0]), fontsize="medium")
            chart.set_ylim(len(models) - 0.5, -0.5)
            chart.margins(x=0.35)
            chart.grid(axis="x", alpha=0.3)
            chart.set_axisbelow(True)
        for chart in charts:
            chart.remove()
        figure.savefig(path, dpi=120)

    def _headings(self) -> list[str]:
        return ["", *self.results]

    def _rows(self) -> Iterator[list[str]]:
        for results in zip(*self.results.values(), strict=True):
            yield [_name(results[0]), *map(_cell, results)]


def _name(result: Result) -> str:
    arrow = {True: " ↑", False: " ↓", None: ""}[result.higher_is_better]
    return f"{result.task}: {result.metric}{arrow}"


def _cell(result: Result) -> str:
    return _number(result.value) + ("" if result.stderr is None else f" ± {_number(result.stderr)}")


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) <= 1 else f"{value:,.2f}"
