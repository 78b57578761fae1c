"""Identifiers for our own rows."""

from __future__ import annotations

import secrets
import time


def new_id() -> str:
    """A UUID version 7 (RFC 9562 5.7): random, but ordered by time, so that index pages fill one after another."""
    unix_ms = time.time_ns() // 1_000_000
    value = (unix_ms << 80) | secrets.randbits(80)
    value = (value & ~(0xF << 76)) | (0x7 << 76)
    value = (value & ~(0x3 << 62)) | (0x2 << 62)
    digits = f"{value:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
