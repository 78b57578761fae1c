"""Many rows in one statement: what a batch writes costs the same number of statements as what one event writes.

    await insert_all(tx, [Insert(facts, rows, "ON CONFLICT DO NOTHING"), Insert(audit_logs, more)])
    new = await insert_new(tx, payment_events, rows, key=("account", "livemode", "effect_key"))

On PostgreSQL the columns travel as arrays, one parameter each, so the statement's text is always the same
and stays prepared; SQLite runs its own prepared statement row by row inside the library.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from pydantic_core import PydanticSerializationError, to_json

from backend.app.core.compact_json import compact_json
from backend.app.core.database import Tx, UtcDateTime, fetch, repeat, sqlite_instant

Row = Mapping[str, Any]
# A column, and what is written into it on PostgreSQL and on SQLite.
_Computed = tuple[tuple[str, str, str], ...]

_POSTGRESQL_TYPES: tuple[tuple[type[sa.types.TypeEngine[Any]], str], ...] = (
    (UtcDateTime, "timestamptz"),
    (sa.Boolean, "boolean"),
    # BigInteger is an Integer to SQLAlchemy; the wider one holds both.
    (sa.Integer, "bigint"),
    (sa.LargeBinary, "bytea"),
    (sa.JSON, "text"),
    (sa.Text, "text"),
    (sa.String, "text"),
)


@dataclass(frozen=True, slots=True)
class Insert:
    """Rows for a table, which all have the same columns; `on_conflict` is the clause as both databases know it.

    A row must not meet another one of the same insert in a `DO UPDATE`. `computed` columns are written as
    an SQL expression of each database, in which `{}` stands for the value that the rows give.
    """

    table: sa.Table
    rows: Sequence[Row]
    on_conflict: str = ""
    computed: _Computed = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the rows give."""
        return tuple(self.rows[0])


async def insert_all(tx: Tx, inserts: Sequence[Insert]) -> None:
    """Inserts all rows, those of each table together; none of the inserts may look at what another one writes."""
    wanted = [insert for insert in inserts if insert.rows]
    if not wanted:
        return
    if tx.dialect.name == "postgresql":
        # One statement for all tables: each round trip would cost as much as several rows.
        shape = tuple(
            (insert.table, insert.columns, insert.on_conflict, insert.computed) for insert in wanted
        )
        parameters = [
            array for insert in wanted for array in _arrays(insert.table, insert.columns, insert.rows)
        ]
        await fetch(tx, _postgresql_inserts(shape), tuple(parameters))
        return
    for insert in wanted:
        columns = insert.columns
        writers = [_sqlite_writer(insert.table, column) for column in columns]
        await repeat(
            tx,
            _sqlite_insert(insert.table, columns, insert.on_conflict, insert.computed),
            [
                tuple(write(row[column]) for write, column in zip(writers, columns, strict=True))
                for row in insert.rows
            ],
        )


async def insert_new(
    tx: Tx, table: sa.Table, rows: Sequence[Row], *, key: tuple[str, ...]
) -> set[tuple[Any, ...]]:
    """Inserts the rows whose key is not there yet; the keys that were new.

    Waits for a transaction that is just inserting one of them. Of rows with the same key the first is taken.
    """
    if not rows:
        return set()
    columns = tuple(rows[0])
    unique: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        unique.setdefault(tuple(row[name] for name in key), row)
    # In the order of the keys, so that two batches never wait for each other.
    ordered = [unique[name] for name in sorted(unique)]
    end = f"ON CONFLICT ({', '.join(key)}) DO NOTHING RETURNING {', '.join(key)}"
    parameters: tuple[Any, ...]
    if tx.dialect.name == "postgresql":
        sql = _postgresql_insert(table, columns, end, ())
        parameters = _arrays(table, columns, ordered)
    else:
        # Rows as JSON, because the driver gives nothing back from a statement that it repeats.
        sql = _sqlite_insert_from_json(table, columns, end)
        writers = [_sqlite_writer(table, column) for column in columns]
        parameters = (
            json.dumps(
                [
                    [write(row[column]) for write, column in zip(writers, columns, strict=True)]
                    for row in ordered
                ]
            ),
        )
    result = await fetch(tx, sql, parameters)
    booleans = [isinstance(table.c[name].type, sa.Boolean) for name in key]
    return {
        tuple(bool(value) if is_boolean else value for value, is_boolean in zip(row, booleans, strict=True))
        for row in result
    }


def _arrays(table: sa.Table, columns: tuple[str, ...], rows: Sequence[Row]) -> tuple[list[Any], ...]:
    return tuple(
        [_json_text(row[column]) for row in rows]
        if isinstance(table.c[column].type, sa.JSON)
        else [row[column] for row in rows]
        for column in columns
    )


@functools.cache
def _postgresql_inserts(shape: tuple[tuple[sa.Table, tuple[str, ...], str, _Computed], ...]) -> str:
    """All but the last as data-modifying parts of a WITH, which PostgreSQL runs to their end in any case."""
    parts: list[str] = []
    first = 1
    for table, columns, on_conflict, computed in shape:
        parts.append(_postgresql_insert(table, columns, on_conflict, computed, first))
        first += len(columns)
    *before, last = parts
    named = ", ".join(f"insert_{number} AS ({part})" for number, part in enumerate(before))
    return f"WITH {named} {last}" if named else last


@functools.cache
def _postgresql_insert(
    table: sa.Table, columns: tuple[str, ...], end: str, computed: _Computed, first: int = 1
) -> str:
    expressions = {column: postgresql for column, postgresql, _ in computed}
    arrays = ", ".join(
        f"${number}::{_postgresql_type(table.c[column])}[]"
        for number, column in enumerate(columns, start=first)
    )
    values = ", ".join(
        expressions.get(column, "{}").format(f"r.{_quoted(column)}") + _postgresql_cast(table.c[column])
        for column in columns
    )
    return (
        f"INSERT INTO {table.name} ({_names(columns)}) SELECT {values}"  # noqa: S608  # names of our own tables
        f" FROM unnest({arrays}) AS r({_names(columns)}) {end}"
    )


@functools.cache
def _sqlite_insert(table: sa.Table, columns: tuple[str, ...], end: str, computed: _Computed) -> str:
    expressions = {column: sqlite for column, _, sqlite in computed}
    values = ", ".join(expressions.get(column, "{}").format("?") for column in columns)
    return f"INSERT INTO {table.name} ({_names(columns)}) VALUES ({values}) {end}"  # noqa: S608  # as above


@functools.cache
def _sqlite_insert_from_json(table: sa.Table, columns: tuple[str, ...], end: str) -> str:
    values = ", ".join(f"json_extract(value, '$[{number}]')" for number in range(len(columns)))
    return f"INSERT INTO {table.name} ({_names(columns)}) SELECT {values} FROM json_each(?) WHERE true {end}"  # noqa: S608  # as above


def _names(columns: Collection[str]) -> str:
    return ", ".join(_quoted(column) for column in columns)


def _quoted(column: str) -> str:
    return f'"{column}"'


def _postgresql_type(column: sa.Column[Any]) -> str:
    return next(name for kind, name in _POSTGRESQL_TYPES if isinstance(column.type, kind))


def _postgresql_cast(column: sa.Column[Any]) -> str:
    if not isinstance(column.type, sa.JSON):
        return ""
    return "::jsonb" if "postgresql" in column.type._variant_mapping else "::json"  # noqa: SLF001  # how SQLAlchemy keeps it


@functools.cache
def _sqlite_writer(table: sa.Table, column: str) -> Callable[[Any], Any]:
    kind = table.c[column].type
    if isinstance(kind, UtcDateTime):
        return _sqlite_instant_or_null
    if isinstance(kind, sa.JSON):
        return _json_text
    return _sqlite_boolean if isinstance(kind, sa.Boolean) else _same


def _sqlite_instant_or_null(value: datetime | None) -> str | None:
    return None if value is None else sqlite_instant(value)


def _sqlite_boolean(value: bool | None) -> int | None:
    """SQLite keeps truth as 1 and 0."""
    return None if value is None else int(value)


def _same(value: Any) -> Any:
    return value


def _json_text(value: Any) -> str | None:
    if value is None:
        return None
    try:
        return to_json(value).decode()
    except PydanticSerializationError:
        # Half of a surrogate pair has no form but its escape.
        return compact_json(value)
