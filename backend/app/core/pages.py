"""Long lists in pages: each answer carries a cursor, the place after which the next page begins.

    request: PageRequest = Depends(page_request)       # ?limit=&cursor=
    rows = ... WHERE place < request.after("payments", datetime, str) ... LIMIT request.rows_max
    return request.page("payments", rows, place=lambda row: (row.created_at, row.id), document=...)

A cursor names a place, not a number of rows to skip: rows that come in meanwhile move nothing. It is
opaque to callers, but no secret, and what it says is checked like any other input.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

from fastapi import Query

from backend.app.core.clock import iso
from backend.app.core.errors import InvalidRequest

PAGE_ROWS_DEFAULT = 50
# A page is built in memory and should arrive within a second.
PAGE_ROWS_MAX = 200
# A list's name, an instant and a few ids of at most 255 characters, which JSON may write as six each, in base64.
CURSOR_CHARACTERS_MAX = 8_192
# The range of PostgreSQL's bigint.
WHOLE_NUMBER_MAX = 2**63 - 1

Place = tuple[datetime | str | bool | int, ...]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class PageRequest:
    """How many rows are asked for, and the cursor of the page before."""

    limit: int = PAGE_ROWS_DEFAULT
    cursor: str | None = None

    @property
    def rows_max(self) -> int:
        """How many rows to read: one more than the page has shows whether another page follows."""
        return self.limit + 1

    def after(self, list_name: str, *kinds: type) -> Place | None:
        """The place after which this page begins, one value of each kind (datetime, str, bool, int); None at the start.

        Raises:
            InvalidRequest: the cursor is none that `page` made for this list.
        """
        return None if self.cursor is None else _decoded(self.cursor, list_name, kinds)

    def page(
        self,
        list_name: str,
        rows: Sequence[T],
        *,
        place: Callable[[T], Place],
        document: Callable[[T], dict[str, Any]],
    ) -> dict[str, Any]:
        """`{"data": [...], "next_cursor": ...}` of up to `rows_max` rows; the cursor is null on the last page."""
        shown = rows[: self.limit]
        more = len(rows) > self.limit
        return {
            "data": [document(row) for row in shown],
            "next_cursor": _encoded(list_name, place(shown[-1])) if more else None,
        }


def page_request(
    limit: Annotated[int, Query(ge=1, le=PAGE_ROWS_MAX)] = PAGE_ROWS_DEFAULT,
    cursor: Annotated[str | None, Query(max_length=CURSOR_CHARACTERS_MAX)] = None,
) -> PageRequest:
    """A dependency: the query parameters of every list."""
    return PageRequest(limit=limit, cursor=cursor)


def _encoded(list_name: str, place: Place) -> str:
    values = [iso(value) if isinstance(value, datetime) else value for value in place]
    text = json.dumps([list_name, *values], separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode("ascii")).decode("ascii").rstrip("=")


def _decoded(cursor: str, list_name: str, kinds: Sequence[type]) -> Place:
    refusal = InvalidRequest("The cursor is none that this list gave out.")
    try:
        padded = cursor.encode("ascii") + b"=" * (-len(cursor) % 4)
        values = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
    except (ValueError, RecursionError, binascii.Error) as error:
        raise refusal from error
    if not isinstance(values, list) or len(values) != len(kinds) + 1 or values[0] != list_name:
        raise refusal
    try:
        return tuple(_value(value, kind) for value, kind in zip(values[1:], kinds, strict=True))
    except (ValueError, OverflowError) as error:
        raise refusal from error


def _value(value: object, kind: type) -> datetime | str | bool | int:
    """A cursor's value, of the kind that is expected; ValueError or OverflowError otherwise."""
    if kind is datetime and isinstance(value, str):
        instant = datetime.fromisoformat(value)
        if instant.tzinfo is None:
            raise ValueError("an instant without an offset")
        return instant.astimezone(UTC)
    # No database keeps a NUL or half a surrogate pair in a text.
    if kind is str and isinstance(value, str) and "\x00" not in value:
        value.encode("utf-8")
        return value
    if kind is bool and isinstance(value, bool):
        return value
    if (
        kind is int
        and isinstance(value, int)
        and not isinstance(value, bool)
        and 0 <= value <= WHOLE_NUMBER_MAX
    ):
        return value
    raise ValueError("a value of another kind")
