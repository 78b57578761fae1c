"""Reading a provider's JSON: what it should be, or absent, or an error that names the field."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from backend.app.billing.providers.fields import (
    AMOUNT_MAX,
    ID_CHARACTERS_MAX,
    UNIX_SECONDS_MAX,
    Fields,
    TranslationError,
)

Read = Callable[[Fields], Any]


def fields(**data: Any) -> Fields:
    return Fields(data, "data.object")


READS: dict[str, Read] = {
    "text": lambda f: f.text("key"),
    "id": lambda f: f.id("key"),
    "amount": lambda f: f.amount("key"),
    "flag": lambda f: f.flag("key"),
    "instant": lambda f: f.instant("key"),
    "object": lambda f: f.object("key").data,
    "list": lambda f: [entry.data for entry in f.list_data("key")],
}


@pytest.mark.parametrize(
    ("read", "value", "expected"),
    [
        ("text", "a", "a"),
        ("text", "", None),
        ("id", "cus_1", "cus_1"),
        ("id", {"id": "cus_1", "object": "customer"}, "cus_1"),
        ("id", {"object": "customer"}, None),
        ("amount", 0, 0),
        ("amount", -AMOUNT_MAX, -AMOUNT_MAX),
        ("flag", False, False),
        ("instant", 0, datetime(1970, 1, 1, tzinfo=UTC)),
        ("instant", UNIX_SECONDS_MAX, datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)),
        ("object", {"a": 1}, {"a": 1}),
        ("object", "prod_1", {}),
        ("list", {"object": "list", "data": [{"a": 1}]}, [{"a": 1}]),
        ("list", {"object": "list", "data": None}, []),
    ],
)
def test_a_field_of_the_right_type_is_read(read: str, value: Any, expected: Any) -> None:
    assert READS[read](fields(key=value)) == expected


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("data", [{}, {"key": None}])
def test_absent_and_null_are_the_same(read: str, data: dict[str, Any]) -> None:
    assert READS[read](fields(**data)) in (None, {}, [])


@pytest.mark.parametrize(
    ("read", "value", "problem"),
    [
        ("text", 5, "data.object.key is not a text"),
        ("id", ["cus_1"], "data.object.key is not a text"),
        ("id", {"id": 5}, "data.object.key.id is not a text"),
        ("id", "c" * (ID_CHARACTERS_MAX + 1), "data.object.key is not an id of at most 255 characters"),
        ("amount", "5", "data.object.key is not a whole number"),
        ("amount", 5.0, "data.object.key is not a whole number"),
        ("amount", True, "data.object.key is not a whole number"),
        ("amount", AMOUNT_MAX + 1, "data.object.key is not a whole number"),
        ("flag", 0, "data.object.key is not true or false"),
        ("instant", "2026-11-23", "data.object.key is not seconds since 1970"),
        ("instant", True, "data.object.key is not seconds since 1970"),
        ("instant", -1, "data.object.key is not seconds since 1970"),
        ("instant", UNIX_SECONDS_MAX + 1, "data.object.key is not seconds since 1970"),
        ("object", [], "data.object.key is not an object"),
        ("list", [{"a": 1}], "data.object.key is not an object"),
        ("list", {"data": {}}, "data.object.key.data is not a list"),
        ("list", {"data": [{}, 5]}, "data.object.key.data[1] is not an object"),
    ],
)
def test_a_field_of_another_type_is_an_error_that_names_it(read: str, value: Any, problem: str) -> None:
    with pytest.raises(TranslationError) as error:
        READS[read](fields(key=value))
    assert str(error.value) == problem


def test_an_id_that_must_be_there_is_an_error_when_it_is_not() -> None:
    assert fields(id="sub_1").required_id("id") == "sub_1"
    with pytest.raises(TranslationError, match=r"^data\.object\.id is not an id$"):
        fields(id=None).required_id("id")


@pytest.mark.parametrize(
    ("value", "user_id"),
    [
        ("user_1", "user_1"),
        ("  user_1 ", "user_1"),
        ("jörg@example.com", "jörg@example.com"),
        ("u" * ID_CHARACTERS_MAX, "u" * ID_CHARACTERS_MAX),
        ("u" * (ID_CHARACTERS_MAX + 1), None),
        ("", None),
        ("   ", None),
        ("user\n1", None),
        ("user\x001", None),
        ("[masked]", None),
        (None, None),
        (5, None),
    ],
)
def test_only_a_usable_text_names_a_user(value: Any, user_id: str | None) -> None:
    assert fields(key=value).user_id("key") == user_id


def test_metadata_is_texts_by_text() -> None:
    assert fields(metadata={"plan_code": "vip", "nested": {"a": 1}, "none": None}).metadata() == {
        "plan_code": "vip"
    }
    assert fields().metadata() == {}


def test_a_key_that_is_null_is_still_there() -> None:
    assert fields(key=None).has("key")
    assert not fields().has("key")
