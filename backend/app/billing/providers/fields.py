"""Typed reading of a provider's JSON: a field is what it should be, or absent, or an error that names it.

Nothing is read as a silent null: a value of an unexpected type is a TranslationError, and the event
is kept and shown as unreadable instead of being taken for something it is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from backend.app.core.clock import from_unix

# Stripe's own limits are 200 to 500 characters for ids and references; PostgreSQL index rows hold far more.
ID_CHARACTERS_MAX = 255
# 9999-12-31, the last instant that Python's datetime and PostgreSQL both write with four digits.
UNIX_SECONDS_MAX = 253_402_300_799
# The range of PostgreSQL's bigint; Stripe's amounts have at most 12 digits.
AMOUNT_MAX = 2**63 - 1


class TranslationError(Exception):
    """A field is not of the type that any published API version gives it."""


class Fields:
    """One JSON object and its path in the event, for error messages."""

    def __init__(self, data: Mapping[str, Any], path: str) -> None:
        self.data = data
        self.path = path

    def has(self, key: str) -> bool:
        """Whether the key is there at all, be it null."""
        return key in self.data

    def text(self, key: str) -> str | None:
        """A text, or None where the field is absent, null or empty."""
        value = self.data.get(key)
        if value is None or value == "":
            return None
        if not isinstance(value, str):
            raise self._unexpected(key, "a text")
        return value

    def id(self, key: str) -> str | None:
        """An id, given as such or as the expanded object it belongs to."""
        value = self.data.get(key)
        if isinstance(value, Mapping):
            return Fields(value, self._at(key)).id("id")
        text = self.text(key)
        if text is not None and len(text) > ID_CHARACTERS_MAX:
            raise self._unexpected(key, f"an id of at most {ID_CHARACTERS_MAX} characters")
        return text

    def required_id(self, key: str) -> str:
        """An id that must be there."""
        value = self.id(key)
        if value is None:
            raise self._unexpected(key, "an id")
        return value

    def user_id(self, key: str) -> str | None:
        """Our user's id; blank, unprintable, overlong or masked values name nobody."""
        value = self.data.get(key)
        if not isinstance(value, str):
            return None
        value = value.strip()
        usable = 0 < len(value) <= ID_CHARACTERS_MAX and value.isprintable() and "[" not in value
        return value if usable else None

    def amount(self, key: str) -> int | None:
        """An amount in the currency's smallest unit."""
        value = self.data.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or abs(value) > AMOUNT_MAX:
            raise self._unexpected(key, "a whole number")
        return value

    def flag(self, key: str) -> bool | None:
        """True, false, or None where absent or null."""
        value = self.data.get(key)
        if value is not None and not isinstance(value, bool):
            raise self._unexpected(key, "true or false")
        return value

    def instant(self, key: str) -> datetime | None:
        """An instant, which Stripe gives as whole seconds since 1970."""
        value = self.data.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= UNIX_SECONDS_MAX:
            raise self._unexpected(key, "seconds since 1970")
        return from_unix(value)

    def object(self, key: str) -> Fields:
        """A nested object; where it is absent, null or only an id, one without fields."""
        value = self.data.get(key)
        if value is None or isinstance(value, str):
            return Fields({}, self._at(key))
        if not isinstance(value, Mapping):
            raise self._unexpected(key, "an object")
        return Fields(value, self._at(key))

    def list_data(self, key: str) -> Iterator[Fields]:
        """The objects of a Stripe list, `{"object": "list", "data": [...]}`."""
        yield from self.object(key).list("data")

    def list(self, key: str) -> Iterator[Fields]:
        """The objects of a plain JSON list; none where it is absent or null."""
        entries = self.data.get(key)
        if entries is None:
            return
        if not isinstance(entries, Sequence) or isinstance(entries, str):
            raise self._unexpected(key, "a list")
        for index, entry in enumerate(entries):
            if not isinstance(entry, Mapping):
                raise self._unexpected(f"{key}[{index}]", "an object")
            yield Fields(entry, f"{self._at(key)}[{index}]")

    def metadata(self) -> dict[str, str]:
        """The object's metadata: texts by text."""
        return {
            str(key): value for key, value in self.object("metadata").data.items() if isinstance(value, str)
        }

    def _at(self, key: str) -> str:
        return f"{self.path}.{key}"

    def _unexpected(self, key: str, expected: str) -> TranslationError:
        return TranslationError(f"{self._at(key)} is not {expected}")
