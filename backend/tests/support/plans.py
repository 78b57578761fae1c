"""Says how a database would run a statement, and what of that would cost more with every event ever stored.

with recorded(database) as seen: ...                  # statements with their parameters, as they were sent
for statement in seen.values():
    assert await problems(tx, statement) == []
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from backend.app.core.database import Database, Tx
from backend.tests.support.statements import watched_statements
from backend.tests.support.stored_history import GROWING

GROWING_NAMES = frozenset(table.name for table in GROWING)
# A month of one of them, as `webhook_events_2026_11`, or what has no month.
_PARTITION = re.compile(r"_(?:\d{4}_\d{2}|rest)$")
# Nearly all rows of a deployment agree in these: to look for them alone is to walk through the whole table.
SCOPE = frozenset({"account", "livemode", "resource_type"})
# A waiting room that is read whole; a history has thousands of times as many.
FEW_ROWS = 100
# What has a plan. The others open and close transactions.
_PLANNED = re.compile(r"\s*(SELECT|INSERT|UPDATE|DELETE|WITH)\b", re.IGNORECASE)
_PLACE = re.compile(r"\$(\d+)")
# Steps that take no more rows than are asked of them.
_PASSING_ON = frozenset({"LockRows", "Result", "Subquery Scan", "Incremental Sort", "Append", "Merge Append"})
_POSTGRESQL_SEARCHED = re.compile(r"\((?:ROW)?\(?(?:\w+\.)?\"?(\w+)\"?\)?(?:::\w+)?,? (?:[<>=]|IS )")
_SQLITE_STEP = re.compile(
    r"(?P<verb>SCAN|SEARCH) (?P<name>\w+)"
    r"(?: USING (?:AUTOMATIC )?(?:PARTIAL )?(?:COVERING )?(?:INDEX (?P<index>\w+)|INTEGER PRIMARY KEY))?"
    r"(?: \((?P<condition>.*)\))?"
)
_SQLITE_SEARCHED = re.compile(r"(\w+)[<>=]")
_ALIAS = re.compile(rf"\b({'|'.join(sorted(GROWING_NAMES))})\s+(?:AS\s+)?(\w+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Statement:
    """A statement as it reached the driver, with the parameters of its first row."""

    sql: str
    parameters: Any


@contextmanager
def recorded(database: Database) -> Iterator[dict[str, Statement]]:
    """Every distinct statement that has a plan and is sent while the block runs, by its text."""
    seen: dict[str, Statement] = {}

    def before(sql: str, parameters: Any) -> None:
        if _PLANNED.match(sql):
            # A list has the parameters of many rows.
            seen.setdefault(
                sql, Statement(sql, parameters[0] if isinstance(parameters, list) else parameters)
            )

    with watched_statements(database, before=before):
        yield seen


async def problems(tx: Tx, statement: Statement) -> list[str]:
    """Where a statement walks through rows that have nothing to do with what it asks for; empty where nowhere.

    On PostgreSQL both for its own parameters and for any: a prepared statement goes over to a plan for any.
    """
    if tx.dialect.name != "postgresql":
        rows = await tx.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement.sql}", statement.parameters)
        details = [row.detail for row in rows]
        return list(_sqlite_walks(statement.sql, details, await _few_in_sqlite(tx)))
    indexes = await _postgresql_indexes(tx)
    own = await tx.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {statement.sql}", statement.parameters)
    found = [f"with its parameters {walk}" for walk in _postgresql_walks(_plan(own), indexes)]
    await tx.exec_driver_sql("SET LOCAL plan_cache_mode = force_generic_plan")
    await tx.exec_driver_sql(f"PREPARE hot AS {statement.sql}")
    count = max(map(int, _PLACE.findall(statement.sql)), default=0)
    values = f"({', '.join(['NULL'] * count)})" if count else ""
    generic = await tx.exec_driver_sql(f"EXPLAIN (FORMAT JSON) EXECUTE hot{values}")
    found += [f"with any parameters {walk}" for walk in _postgresql_walks(_plan(generic), indexes)]
    await tx.exec_driver_sql("DEALLOCATE hot")
    return found


@dataclass(frozen=True, slots=True)
class _Index:
    """An index of a growing table; `few`: its own condition leaves so few rows in it that it may be read whole."""

    columns: tuple[str, ...]
    few: bool

    def narrows(self, searched: AbstractSet[str]) -> bool:
        """Whether a search by these columns reads little beside what it looks for."""
        telling = next((place for place, name in enumerate(self.columns) if name not in SCOPE), None)
        return self.few or (telling is not None and set(self.columns[: telling + 1]) <= searched)


async def _postgresql_indexes(tx: Tx) -> dict[str, _Index]:
    found = await tx.execute(
        sa.text(
            """
            SELECT names.relname AS name, indpred IS NOT NULL AND names.reltuples <= :few AS few, (
                SELECT array_agg(attname ORDER BY place) FROM pg_attribute
                JOIN unnest(indkey) WITH ORDINALITY AS keys(attnum, place) USING (attnum)
                WHERE attrelid = indrelid
            ) AS columns
            FROM pg_index JOIN pg_class names ON names.oid = indexrelid
            JOIN pg_class tables ON tables.oid = indrelid
            WHERE regexp_replace(tables.relname, :partition, '') = ANY(:tables)
            """
        ),
        {"tables": sorted(GROWING_NAMES), "few": FEW_ROWS, "partition": _PARTITION.pattern},
    )
    return {row.name: _Index(tuple(row.columns), row.few) for row in found}


def _plan(explained: sa.CursorResult[Any]) -> dict[str, Any]:
    document = explained.scalar_one()
    plan: dict[str, Any] = (json.loads(document) if isinstance(document, str) else document)[0]["Plan"]
    return plan


def _postgresql_walks(
    node: Mapping[str, Any], indexes: Mapping[str, _Index], *, ends_early: bool = False
) -> Iterator[str]:
    kind = node["Node Type"]
    if kind == "Seq Scan" and _PARTITION.sub("", node["Relation Name"]) in GROWING_NAMES:
        yield f"reads all of {node['Relation Name']}"
    index = indexes.get(node.get("Index Name", ""))
    if index is not None:
        searched = set(_POSTGRESQL_SEARCHED.findall(node.get("Index Cond", "")))
        if not index.narrows(searched) and not (ends_early and "Filter" not in node):
            yield f"walks through {node['Index Name']} by {sorted(searched)}"
    for child in node.get("Plans", ()):
        yield from _postgresql_walks(
            child, indexes, ends_early=kind == "Limit" or (ends_early and kind in _PASSING_ON)
        )


async def _few_in_sqlite(tx: Tx) -> set[str]:
    """The indexes whose own condition leaves few rows in them."""
    found = await tx.exec_driver_sql(
        "SELECT name, tbl_name, sql FROM sqlite_master WHERE type = 'index' AND sql LIKE '% WHERE %'"
    )
    few: set[str] = set()
    for row in found.all():
        condition = row.sql.partition(" WHERE ")[2]
        counted = await tx.exec_driver_sql(f"SELECT count(*) FROM {row.tbl_name} WHERE {condition}")
        if counted.scalar_one() <= FEW_ROWS:
            few.add(row.name)
    return few


def _sqlite_walks(sql: str, details: Sequence[str], few: AbstractSet[str]) -> Iterator[str]:
    aliases = {alias: table for table, alias in _ALIAS.findall(sql)}
    for detail in details:
        step = _SQLITE_STEP.match(detail)
        if step is None:
            continue
        table = aliases.get(step["name"], step["name"])
        if table not in GROWING_NAMES or step["index"] in few:
            continue
        if step["verb"] == "SEARCH" and "AUTOMATIC" not in detail:
            # Without a condition it looks for the smallest or the largest only.
            searched = set(_SQLITE_SEARCHED.findall(step["condition"] or ""))
            if step["condition"] is None or searched - SCOPE:
                continue
        elif step["index"] and "LIMIT" in sql and "WHERE" not in sql:
            continue
        yield f"{detail} ({table})"
