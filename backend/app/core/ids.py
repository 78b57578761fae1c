"""Identifiers for our own rows."""

from __future__ import annotations

import os
import time

# Random bits of one id, before six of them make room for version and variant.
_RANDOM_BYTES = 10
# To ask the system costs as much as the rest of an id, whether for one or for some hundred.
_IDS_AT_ONCE = 256

_random: list[bytes] = []
if hasattr(os, "register_at_fork"):
    # A child of ours must not give out what its parent gives out too.
    os.register_at_fork(after_in_child=_random.clear)


def new_id() -> str:
    """A UUID version 7 (RFC 9562 5.7): random, but ordered by time, so that index pages fill one after another."""
    unix_ms = time.time_ns() // 1_000_000
    value = (unix_ms << 80) | int.from_bytes(_random_bytes(), "big")
    value = (value & ~(0xF << 76)) | (0x7 << 76)
    value = (value & ~(0x3 << 62)) | (0x2 << 62)
    digits = f"{value:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def _random_bytes() -> bytes:
    try:
        return _random.pop()
    except IndexError:
        fetched = os.urandom(_IDS_AT_ONCE * _RANDOM_BYTES)
        first, *rest = (
            fetched[start : start + _RANDOM_BYTES] for start in range(0, len(fetched), _RANDOM_BYTES)
        )
        _random.extend(rest)
        return first
