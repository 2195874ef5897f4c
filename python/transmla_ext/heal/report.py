"""What a healing did: numbers and text."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import RenderableType

from ..convert.report import plain, table_of

__all__ = ["HealReport"]


@dataclass(frozen=True, kw_only=True)
class HealReport:
    """What was trained on what, and how much of the conversion's loss is left on text that was not trained on."""

    model: str
    teacher: str
    format: str
    trainable: str
    trained_weights: int
    tokens: int  # trained on, repetitions included
    text_tokens: int  # of the text, each once
    steps: int
    loss: dict[int, float]  # mean since the entry before, by step
    test_tokens: int  # that all that follows was measured on
    perplexity_teacher: float
    perplexity_before: float
    perplexity_after: float
    agreement_before: float  # fraction of tokens for which the teacher's likeliest is the model's
    agreement_after: float
    seconds: float = field(default=0.0, compare=False)  # of this run; not saved, so that equal runs write equal bytes

    @property
    def excess_nats_before(self) -> float:
        """ln(perplexity of the converted model / the teacher's)."""
        return math.log(self.perplexity_before / self.perplexity_teacher)

    @property
    def excess_nats_after(self) -> float:
        return math.log(self.perplexity_after / self.perplexity_teacher)

    @property
    def removed(self) -> float | None:
        """Fraction of the excess nats that is gone; None if there were none."""
        return 1 - self.excess_nats_after / self.excess_nats_before if self.excess_nats_before > 0 else None

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        del values["seconds"]
        return {
            **values,
            "excess_nats_before": self.excess_nats_before,
            "excess_nats_after": self.excess_nats_after,
            "removed": self.removed,
        }

    def table(self) -> RenderableType:
        table = table_of(f"{self.model}, healed by {self.teacher} (format {self.format})")
        table.add_row("trained", f"{self.trainable}: {self.trained_weights:,} weights")
        table.add_row("tokens, of a text of", f"{self.tokens:,}, {self.text_tokens:,}")
        table.add_row("steps", f"{self.steps:,}")
        table.add_row(
            f"perplexity, {self.test_tokens:,} tokens not trained on", f"{self.perplexity_teacher:.2f}, original"
        )
        table.add_row("", f"{self.perplexity_before:.2f} → {self.perplexity_after:.2f}")
        table.add_row("excess nats per token", f"{self.excess_nats_before:.3f} → {self.excess_nats_after:.3f}")
        if self.removed is not None:
            table.add_row("of them removed", f"{self.removed:.1%}")
        table.add_row("same likeliest token", f"{self.agreement_before:.1%} → {self.agreement_after:.1%}")
        if self.seconds:
            table.add_row("time", f"{self.seconds:.0f} s")
        return table

    def __str__(self) -> str:
        return plain(self.table())
