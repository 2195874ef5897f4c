"""A cache budget dealt out over the layers: each gets as much as its error gains by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["Candidate", "allocate"]


@dataclass(frozen=True)
class Candidate:
    """A shape that a layer may get, and its error with it."""

    kv_lora_rank: int
    qk_rope_head_dim: int
    error: float = 0.0

    @property
    def cache_dim(self) -> int:
        return self.kv_lora_rank + self.qk_rope_head_dim


def allocate(layers: Sequence[Sequence[Candidate]], budget: int) -> list[Candidate]:
    """One candidate a layer with little error in all, for at most `budget` numbers in the cache, layers added up.

    Greedy over the lower convex hulls of (cache_dim, error): the step that removes the most error for each number it
    costs is taken first, and one that is too dear is passed over. So nothing that leaves as much as one step of the
    budget unused is better. ValueError if not even the smallest candidates fit.
    """
    hulls = [_hull(candidates) for candidates in layers]
    chosen = [0] * len(hulls)
    left = budget - sum(hull[0].cache_dim for hull in hulls)
    if left < 0:
        raise ValueError(f"a cache of {budget} numbers a token is less than the {budget - left} of the smallest shapes")
    steps = sorted(
        (-_slope(low, high), layer, number, high.cache_dim - low.cache_dim)
        for layer, hull in enumerate(hulls)
        for number, (low, high) in enumerate(pairwise(hull), start=1)
    )
    for _, layer, number, cost in steps:
        if (
            number == chosen[layer] + 1 and cost <= left
        ):  # a hull's steps come in order; past one that is too dear, none
            chosen[layer], left = number, left - cost
    return [hull[number] for hull, number in zip(hulls, chosen, strict=True)]


def _slope(low: Candidate, high: Candidate) -> float:
    """Error removed for each number more."""
    return (low.error - high.error) / (high.cache_dim - low.cache_dim)


def _hull(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates on the lower convex hull, cheapest first, errors falling."""
    hull: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.cache_dim, c.error)):
        if hull and candidate.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-1], candidate) >= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(candidate)
    return hull
