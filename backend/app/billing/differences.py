"""What differs between stored rows and a replay's, and what those rows should be.

corrections = row_corrections(derived, stored, replayed)
correction = user_correction(catalog, state, user_id, row, history, now=...)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from backend.app.billing import store_rebuild as rows
from backend.app.billing.domain.access import Reading
from backend.app.billing.domain.catalog import Catalog
from backend.app.billing.domain.merge import Entitlement, boundaries, entitlement_of
from backend.app.billing.domain.state import State
from backend.app.billing.history import entitlement_of_row
from backend.app.billing.store_rebuild import DerivedTable, Key, Row
from backend.app.core.clock import iso

# What a user's row and the newest version of their history both say.
_TOLD = ("plan_code", "entitlements", "status", "valid_until")


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What is stored and what the events say, as JSON has it; `column` is None where a whole row is missing or too much."""

    table: str
    key: tuple[Any, ...]
    column: str | None
    stored: Any
    recomputed: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """What a row should be; `row` None where there should be none, `current` None where there is none."""

    derived: DerivedTable
    key: Key
    current: Row | None
    row: Row | None
    differences: Sequence[Difference]


@dataclass(frozen=True, slots=True, kw_only=True)
class UserCorrection:
    """A user's row that is wrong: what it differs in, and what the user has now (None: there should be no row)."""

    user_id: str
    current: Row | None
    differences: Sequence[Difference]
    after: Entitlement | None
    before: Entitlement | None
    created_at: datetime


def row_corrections(
    derived: DerivedTable, stored: Mapping[Key, Row], replayed: Mapping[Key, Row]
) -> Iterator[Correction]:
    """The rows of a table that have to change, in the order of their keys."""
    wrong = [
        key
        for key, row in stored.items()
        if (not _equal(derived, row, replayed[key]) if key in replayed else not derived.may_have_more)
    ]
    wrong += [key for key in replayed if key not in stored]
    for key in sorted(wrong, key=repr):
        current, row = stored.get(key), replayed.get(key)
        yield Correction(
            derived=derived,
            key=key,
            current=current,
            row=row,
            differences=tuple(_row_differences(derived, key, current, row)),
        )


def user_correction(
    catalog: Catalog, state: State, user_id: str, row: Row | None, history: Sequence[Row], *, now: datetime
) -> UserCorrection | None:
    """How a user's row has to change, if it has to.

    It is right when it is the history's newest version and says what held at an instant since it was
    written: it is written when something is heard of the user, not when time passes. So an access that has
    run out since is no difference.
    """
    owns = any(owned.user_id == user_id for owned in state.sources.values())
    if not owns and not history:
        # Nothing was ever heard of this user: whoever wrote the row, it was not the service.
        return _removal(user_id, row, now) if row is not None else None
    told = _Told.of(catalog, state, user_id, now)
    current = told.at(told.now)
    differences = (
        _user_differences(told, row, history)
        if row is not None
        else [_difference(rows.ENTITLEMENTS, (user_id,), None, None, _shown(current))]
    )
    if not differences:
        return None
    head = history[-1] if history else None
    version = max(row["version"] if row else 0, head["version"] if head else 0)
    activated_at = _activated_at(history, current.plan_code) or now
    return UserCorrection(
        user_id=user_id,
        current=row,
        differences=differences,
        after=replace(current, version=version + 1, activated_at=activated_at),
        before=entitlement_of_row(head) if head else None,
        created_at=history[0]["created_at"] if history else now,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told:
    """What the events tell of a user; at no instant before the newest of them, for what has occurred is in force."""

    catalog: Catalog
    user_id: str
    readings: Sequence[Reading]
    newest_as_of: datetime | None
    now: datetime

    @classmethod
    def of(cls, catalog: Catalog, state: State, user_id: str, now: datetime) -> _Told:
        newest_as_of = state.newest_as_of(user_id)
        return cls(
            catalog=catalog,
            user_id=user_id,
            readings=state.readings_of(catalog, user_id),
            newest_as_of=newest_as_of,
            now=max(now, newest_as_of or now),
        )

    def at(self, instant: datetime) -> Entitlement:
        return entitlement_of(self.catalog, self.user_id, self.readings, at=instant)

    def instants_since(self, written_at: datetime) -> Iterator[datetime]:
        """When it may have become something else since a row was written."""
        since = max(written_at, self.newest_as_of or written_at)
        yield since
        yield from (edge for edge in boundaries(self.readings, since) if edge <= self.now)
        yield self.now


def _user_differences(told: _Told, row: Row, history: Sequence[Row]) -> list[Difference]:
    held = (_shown(told.at(instant)) for instant in told.instants_since(row["updated_at"]))
    should = next((shown for shown in held if all(row[name] == shown[name] for name in _TOLD)), None)
    if should is None:
        should = _shown(told.at(told.now))
    if history:
        head = history[-1]
        # The row and its newest version are written together and say the same.
        for name in _TOLD:
            if row[name] != head[name] and should[name] == row[name]:
                should[name] = head[name]
        should["version"] = head["version"]
        should["updated_at"] = head["created_at"]
        should["created_at"] = history[0]["created_at"]
        should["activated_at"] = _activated_at(history, head["plan_code"])
    else:
        should["version"] = None
    return [
        _difference(rows.ENTITLEMENTS, (told.user_id,), name, row[name], value)
        for name, value in should.items()
        if row[name] != value
    ]


def _removal(user_id: str, row: Row, now: datetime) -> UserCorrection:
    shown = {name: row[name] for name in rows.ENTITLEMENTS.columns}
    return UserCorrection(
        user_id=user_id,
        current=row,
        differences=[_difference(rows.ENTITLEMENTS, (user_id,), None, shown, None)],
        after=None,
        before=None,
        created_at=now,
    )


def _row_differences(
    derived: DerivedTable, key: Key, current: Row | None, row: Row | None
) -> Iterable[Difference]:
    if current is None or row is None:
        stored, recomputed = (
            {name: values[name] for name in derived.columns} if values is not None else None
            for values in (current, row)
        )
        return [_difference(derived, key, None, stored, recomputed)]
    return [
        _difference(derived, key, name, current[name], row[name])
        for name in derived.columns
        if current[name] != row[name]
    ]


def _equal(derived: DerivedTable, current: Row, row: Row) -> bool:
    return all(current[name] == row[name] for name in derived.columns)


def _difference(
    derived: DerivedTable, key: Key, column: str | None, stored: Any, recomputed: Any
) -> Difference:
    return Difference(
        table=derived.table.name,
        key=tuple(_plain(part) for part in key),
        column=column,
        stored=_plain(stored),
        recomputed=_plain(recomputed),
    )


def _shown(entitlement: Entitlement) -> Row:
    """An entitlement's part of a row: what depends on the events alone."""
    return {
        "plan_code": entitlement.plan_code,
        "entitlements": dict(entitlement.features),
        "status": entitlement.status,
        "valid_until": entitlement.valid_until,
    }


def _activated_at(history: Sequence[Row], plan_code: str) -> datetime | None:
    """When the plan that a user has now began: with the first of the versions that had it ever since."""
    began: datetime | None = None
    for version in reversed(history):
        if version["plan_code"] != plan_code:
            break
        began = version["occurred_at"]
    return began


def _plain(value: Any) -> Any:
    """A value as JSON has it; instants as RFC 3339 in UTC."""
    if isinstance(value, datetime):
        return iso(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value
