"""How long work tells somebody how far it is."""

from __future__ import annotations

from collections.abc import Callable

# Called with what is being done or counted, how many of it so far, and how many there are (0: not known).
Progress = Callable[[str, int, int], None]


def silent(_stage: str, _done: int, _total: int) -> None:
    """Nobody is watching."""
