"""JSON without blanks, as it is stored and answered."""

from __future__ import annotations

import json
from typing import Any

# Made once: `json.dumps` makes one for each call that asks for other separators.
_ENCODER = json.JSONEncoder(separators=(",", ":"))


def compact_json(value: Any) -> str:
    """A value as JSON (RFC 8259), in ASCII."""
    return _ENCODER.encode(value)
