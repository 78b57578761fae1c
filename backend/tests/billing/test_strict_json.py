"""A signed body is read one way only, and hostile JSON costs nothing but a refusal."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.app.billing.strict_json import parse_event_json
from backend.app.core.errors import InvalidEvent

DEEP = {
    "65 arrays": (b"[", 64, b"]"),
    "10,000 arrays": (b"[", 10_000, b"]"),
    "1,000,000 arrays": (b"[", 1_000_000, b"]"),
    "10,000 objects": (b'{"a":', 10_000, b"}"),
    "1,000,000 objects": (b'{"a":', 1_000_000, b"}"),
}

HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "blank": b" \n",
    "null": b"null",
    "true": b"true",
    "number": b"1",
    "string": b'"evt_1"',
    "array": b"[]",
    "array of an event": b'[{"id": "evt_1"}]',
    "invalid UTF-8": b'{"a": "\xff"}',
    "truncated UTF-8": b'{"a": "\xc3"}',
    "overlong UTF-8": b'{"a": "\xc0\xaf"}',
    "surrogate in UTF-8": b'{"a": "\xed\xa0\x80"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "UTF-16 without a mark": '{"a": 1}'.encode("utf-16-le"),
    "UTF-32": '{"a": 1}'.encode("utf-32"),
    "byte order mark": b'\xef\xbb\xbf{"a": 1}',
    "escaped mark as a prefix": b'\\ufeff{"a": 1}',
    "duplicate key": b'{"a": 1, "a": 2}',
    "duplicate key, same value": b'{"a": 1, "a": 1}',
    "duplicate key, escaped": b'{"a": 1, "\\u0061": 2}',
    "duplicate key deep inside": b'{"data": {"object": [{"id": 1, "id": 2}]}}',
    "duplicate empty key": b'{"": 1, "": 2}',
    "NaN": b'{"a": NaN}',
    "Infinity": b'{"a": Infinity}',
    "-Infinity": b'{"a": -Infinity}',
    "1e400": b'{"a": 1e400}',
    "-1e400": b'{"a": -1e400}',
    "1e999999999": b'{"a": 1e999999999}',
    "long mantissa": b'{"a": ' + b"9" * 5_000 + b".5}",
    "21 digits": b'{"a": ' + b"1" * 21 + b"}",
    "-21 digits": b'{"a": -' + b"1" * 21 + b"}",
    "4,301 digits": b'{"a": ' + b"1" * 4_301 + b"}",
    "200,000 digits": b'{"a": ' + b"1" * 200_000 + b"}",
    "leading zero": b'{"a": 01}',
    "plus sign": b'{"a": +1}',
    "hexadecimal": b'{"a": 0x10}',
    "bare point": b'{"a": .5}',
    "digits outside ASCII": '{"a": \u0661}'.encode(),
    "trailing comma": b'{"a": 1,}',
    "trailing text": b'{"a": 1} x',
    "second object": b'{"a": 1}{"a": 2}',
    "trailing NUL": b'{"a": 1}\x00',
    "comment": b'{"a": 1 /* x */}',
    "single quotes": b"{'a': 1}",
    "bare key": b"{a: 1}",
    "number as key": b'{1: "a"}',
    "no value": b'{"a": }',
    "unclosed object": b'{"a": 1',
    "unclosed string": b'{"a": "x',
    "unclosed string of quotes": b'{"a": "' + b'\\"' * 100_000,
    "lone backslash at the end": b'{"a": "\\',
    "raw newline in a string": b'{"a": "x\ny"}',
    "raw NUL in a string": b'{"a": "\x00"}',
    "bad escape": b'{"a": "\\q"}',
    "short unicode escape": b'{"a": "\\u12"}',
    "signed unicode escape": b'{"a": "\\u+123"}',
    "no-break space between": '{\u00a0"a": 1}'.encode(),
    "form feed between": b'{\x0c"a": 1}',
    "10,001 keys": json.dumps({str(n): n for n in range(10_001)}).encode(),
    "10,001 keys in many objects": json.dumps({"a": [{"b": 1}] * 10_000}).encode(),
    "closing brackets first": b"]" * 100 + b"[" * 100_000,
    **{f"{name}, closed": b'{"a":' + o * n + b"1" + c * n + b"}" for name, (o, n, c) in DEEP.items()},
    **{f"{name}, open": o * (n + 1) for name, (o, n, c) in DEEP.items()},
}


def parsed(value: bytes) -> Any:
    return parse_event_json(b'{"a": ' + value + b"}")["a"]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_json_is_refused_with_a_short_reason(name: str) -> None:
    with pytest.raises(InvalidEvent) as caught:
        parse_event_json(HOSTILE[name])
    assert caught.value.status == 400
    assert len(caught.value.detail) < 150


def test_there_are_at_least_forty_hostile_cases() -> None:
    assert len(HOSTILE) >= 40


def test_a_refusal_carries_nothing_of_the_body() -> None:
    for body in (b'{"PRIVATE": "PRIVATE" "', b'{"PRIVATE": "\xff"}', b'{"PRIVATE": 1, "PRIVATE": 2}'):
        with pytest.raises(InvalidEvent) as caught:
            parse_event_json(body)
        error = caught.value
        assert "PRIVATE" not in repr((error, vars(error)))
        assert error.__cause__ is None
        assert error.__context__ is None


def test_an_event_is_read_as_it_is() -> None:
    event: dict[str, Any] = {
        "id": "evt_1",
        "n": None,
        "b": [True, False],
        "f": 1.5,
        "i": -3,
        "s": "Zo\u00eb \U0001f600",
        "o": {},
    }
    assert parse_event_json(json.dumps(event).encode()) == event
    assert parse_event_json(json.dumps(event, ensure_ascii=False, indent=2).encode()) == event


def test_the_limits_themselves_are_accepted() -> None:
    assert parsed(b"1" * 20) == int("1" * 20)
    assert parsed(b"-" + b"1" * 20) == -int("1" * 20)
    assert parsed(b"1e308") == 1e308
    assert parsed(b"[" * 63 + b"]" * 63)
    assert len(parse_event_json(json.dumps({str(n): n for n in range(10_000)}).encode())) == 10_000


def test_brackets_in_strings_are_not_nesting() -> None:
    assert parsed(b'"' + b"[{" * 10_000 + b'"') == "[{" * 10_000
    assert parsed(b'"' + b'\\"[' * 10_000 + b'"') == '"[' * 10_000
    assert parsed(b"[" + b",".join([b"[{}]"] * 1_000) + b"]") == [[{}]] * 1_000


def test_what_a_database_cant_hold_is_replaced_and_not_refused() -> None:
    assert parsed(rb'"x\u0000y"') == "x\ufffdy"
    assert parsed(rb'["\ud800", "\uDFFF", "\ude00\ud83d"]') == ["\ufffd", "\ufffd", "\ufffd\ufffd"]
    assert parsed(rb'{"k\u0000": {"\udc00": 1}}') == {"k\ufffd": {"\ufffd": 1}}


def test_a_surrogate_pair_and_an_escaped_backslash_stay_what_they_are() -> None:
    assert parsed(rb'"\ud83d\ude00"') == "\U0001f600"
    assert parsed(rb'"\\u0000 \\ud800"') == r"\u0000 \ud800"


def test_keys_that_differ_only_in_what_is_replaced_stay_distinct() -> None:
    found = parsed(rb'{"\ud800": 1, "\ud801": 2, "\u0000": 3, "\ufffd": 4}')
    assert sorted(found.values()) == [1, 2, 3, 4]
    assert found["\ufffd"] == 4


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(min_value=-(10**19), max_value=10**19)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00")),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00")), inner, max_size=4
        )
    ),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(event=st.dictionaries(st.text("abc\u00e9"), JSON_VALUES, max_size=5), ascii_only=st.booleans())
def test_every_ordinary_object_comes_back_equal(event: dict[str, Any], ascii_only: bool) -> None:
    assert parse_event_json(json.dumps(event, ensure_ascii=ascii_only).encode()) == event


PIECES = st.sampled_from(
    [
        *(b"{", b"}", b"[", b"]", b'"', b":", b",", b"\\", b"\\u0000", b"\\ud800"),
        *(b"a", b"1", b"e9", b"-", b"NaN", b" ", b"\xff", b'"a":', b"null"),
    ]
)


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=300) | st.lists(PIECES, max_size=60).map(b"".join))
def test_whatever_bytes_come_in_the_only_error_is_invalid_event(body: bytes) -> None:
    try:
        event = parse_event_json(body)
    except InvalidEvent:
        return
    text = json.dumps(event, ensure_ascii=False)
    assert "\x00" not in text
    assert text.encode("utf-8")
