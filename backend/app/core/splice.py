"""Edits to bytes, put in all at once, so that positions stay those of the original."""

from __future__ import annotations

from collections.abc import Iterable

# From where and up to where in the original, and what comes there instead.
Edit = tuple[int, int, bytes]


def spliced(original: bytes, edits: Iterable[Edit]) -> bytes:
    """`original` with each edit put in; the same object where that changes nothing."""
    pieces: list[bytes] = []
    position = 0
    for start, end, replacement in sorted(edits):
        pieces += (original[position:start], replacement)
        position = end
    pieces.append(original[position:])
    changed = b"".join(pieces)
    return original if changed == original else changed
