"""What a fault test injected and saw, for the reader of its output."""

from __future__ import annotations

import sys


def report(text: str) -> None:
    """One line on standard output, which pytest shows of a failed test, or of all with -rP."""
    sys.stdout.write(f"{text}\n")
