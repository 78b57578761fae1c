"""JSON of a signed body, read one way only: what another parser could read differently is refused."""

from __future__ import annotations

import json
import math
import re
from typing import Any, Never

from backend.app.core.errors import InvalidEvent

# Stripe's events nest about ten deep; 64 stays far from the interpreter's own limit.
NESTING_MAX = 64

# A full invoice has a few hundred; 10,000 bounds the work a body of the allowed size can cause.
KEYS_MAX = 10_000

# 64-bit integers have at most 20 digits; Python refuses to read more than 4,300.
INTEGER_DIGITS_MAX = 20

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

# Possessive, with an optional end: linear also on a string that is never closed.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_ALL_BUT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))

_UNSTORABLE_ESCAPE = re.compile(rb"\\u(?:0000|[dD][89a-fA-F])")
# PostgreSQL's text can hold neither U+0000 nor a surrogate without its other half.
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def parse_event_json(body: bytes) -> dict[str, Any]:
    """The JSON object (RFC 8259) in `body`, with U+FFFD for each U+0000 and each lone surrogate.

    Raises InvalidEvent with a short reason, never with the content, for: invalid UTF-8, a byte order
    mark, anything that is not one JSON object, a repeated key, NaN and infinities (also 1e400), integers
    over 20 digits, nesting over 64, more than 10,000 keys.
    """
    if body.startswith(_BYTE_ORDER_MARK):
        raise _refused("it starts with a byte order mark")
    if _is_too_deep(body):
        raise _refused(f"it nests deeper than {NESTING_MAX}")
    reason = None
    value: Any = None
    try:
        value = _decoder().decode(body.decode("utf-8"))
    except UnicodeDecodeError:
        reason = "it is not UTF-8"
    except json.JSONDecodeError:
        reason = "it is not JSON"
    # Raised out here: these exceptions hold the whole body, and a chained one would carry it along.
    if reason is not None:
        raise _refused(reason)
    if not isinstance(value, dict):
        raise _refused("it is not a JSON object")
    event: dict[str, Any] = _storable(value) if _UNSTORABLE_ESCAPE.search(body) else value
    return event


def _refused(reason: str) -> InvalidEvent:
    return InvalidEvent(f"The signature is genuine, but the body is not a Stripe event: {reason}.")


def _is_too_deep(body: bytes) -> bool:
    # Counted before parsing, because the parser recurses. Few brackets in all can't nest deeply.
    if body.count(b"{") + body.count(b"[") <= NESTING_MAX:
        return False
    depth = 0
    for bracket in _STRING.sub(b"", body).translate(None, _ALL_BUT_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        if depth > NESTING_MAX:
            return True
    return False


def _decoder() -> json.JSONDecoder:
    keys_total = 0

    def unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal keys_total
        keys_total += len(pairs)
        if keys_total > KEYS_MAX:
            raise _refused(f"it has more than {KEYS_MAX} keys")
        found = dict(pairs)
        if len(found) != len(pairs):
            raise _refused("it repeats a key")
        return found

    return json.JSONDecoder(
        object_pairs_hook=unique_object,
        parse_int=_bounded_int,
        parse_float=_finite_float,
        parse_constant=_no_constant,
    )


def _bounded_int(text: str) -> int:
    if len(text.removeprefix("-")) > INTEGER_DIGITS_MAX:
        raise _refused(f"it has an integer of more than {INTEGER_DIGITS_MAX} digits")
    return int(text)


def _finite_float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise _refused("it has a number that is too large")
    return number


def _no_constant(_text: str) -> Never:
    raise _refused("it has NaN or an infinity")


def _storable(value: Any) -> Any:
    if isinstance(value, str):
        return _UNSTORABLE.sub(_REPLACEMENT, value)
    if isinstance(value, list):
        return [_storable(item) for item in value]
    if isinstance(value, dict):
        found: dict[str, Any] = {}
        used: dict[str, int] = {}
        for key, item in value.items():
            storable = name = _UNSTORABLE.sub(_REPLACEMENT, key)
            # Two keys that differ only in what can't be stored stay two keys.
            while name != key and (name in found or name in value):
                used[storable] = used.get(storable, 1) + 1
                name = f"{storable} ({used[storable]})"
            found[name] = _storable(item)
        return found
    return value
