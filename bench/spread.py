"""A median with its spread over the rounds of a run, and ratios of what was measured in the same round."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """The median, the lowest and the highest of some rounds."""

    median: float
    low: float
    high: float

    def text(self, digits: int = 0) -> str:
        """`12 (11-14)`; the median alone where there was one round."""
        if self.low == self.high:
            return f"{self.median:,.{digits}f}"
        return f"{self.median:,.{digits}f} ({self.low:,.{digits}f}-{self.high:,.{digits}f})"


def spread(values: Sequence[float]) -> Spread | None:
    """The spread of what was measured; None where nothing was."""
    if not values:
        return None
    return Spread(statistics.median(values), min(values), max(values))


def ratio(values: Sequence[float], to: Sequence[float]) -> Spread | None:
    """Round by round, so that a slow minute of the machine cancels out; None where a side was left out."""
    return spread([value / other for value, other in zip(values, to, strict=False)])
