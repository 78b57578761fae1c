"""What a rebuild reads and writes: the derived tables as plain rows, and which of them hang together.

Rows that hang together are a *party*: events, the subjects, customers and users they name, and the ledger
lines they make. Whoever is in a party can be decided about without looking at anybody outside of it.
"""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa

from backend.app.billing.domain.facts import CustomerId, SubjectId, Via
from backend.app.billing.models import (
    customer_ties,
    entitlement_history,
    facts,
    links,
    payment_events,
    sources,
    user_entitlements,
    webhook_claims,
    webhook_events,
)
from backend.app.billing.store import FAILED, Parties
from backend.app.core.database import Tx, insert
from backend.app.core.ids import new_id

# A page is held in memory: at most this many stored bodies of 256 KiB, in practice of three.
PAGE_EVENTS = 200
# Keys alone are small.
PAGE_KEYS = 2_000
# Names in one IN (...): PostgreSQL's driver and SQLite both allow 32,767 parameters a statement.
NAMES_MAX = 5_000
# A batch holds whole parties of about this many nodes; a larger party is a batch of its own.
BATCH_NODES = 1_000
# Positions grow by one, so what commits later than its neighbours is at most as many positions behind as
# there are transactions at once: ten connections in each of 64 workers, and some room.
POSITIONS_IN_FLIGHT_MAX = 1_000

# Facts and claims that people made; they are taken as they are.
MANUAL_KINDS = ("grant", "claim")
# Ties that our own side made; no event can tell them again.
OWN_TIES = (Via.ADMIN, Via.CHECKOUT_RECORD)

Key = tuple[Any, ...]
Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class DerivedTable:
    """A table that follows from the events: `key` names a row, `columns` are compared beside it."""

    table: sa.Table
    key: tuple[str, ...]
    columns: tuple[str, ...]

    def key_of(self, row: Mapping[str, Any]) -> Key:
        """A row's key."""
        return tuple(row[name] for name in self.key)


_SCOPE = ("account", "livemode")
CLAIMS = DerivedTable(table=webhook_claims, key=(*_SCOPE, "event_id"), columns=())
FACTS = DerivedTable(
    table=facts, key=(*_SCOPE, "subject_key", "kind", "as_of", "event_id"), columns=("body",)
)
LINKS = DerivedTable(table=links, key=(*_SCOPE, "child", "parent"), columns=())
TIES = DerivedTable(
    table=customer_ties,
    key=(*_SCOPE, "customer_id", "user_id", "via"),
    columns=("occurred_at", "event_id"),
)
SOURCES = DerivedTable(table=sources, key=(*_SCOPE, "source_key"), columns=("customer_id", "user_id"))
PAYMENTS = DerivedTable(
    table=payment_events,
    key=(*_SCOPE, "effect_key"),
    columns=(
        "stripe_event_id",
        "user_id",
        "event_type",
        "plan_code",
        "customer_id",
        "invoice_id",
        "subscription_id",
        "amount",
        "currency",
        "settled",
        "metadata",
        "subject_key",
        "occurred_at",
    ),
)
EVENTS = DerivedTable(
    table=webhook_events,
    key=(*_SCOPE, "event_id"),
    columns=(
        "event_type",
        "api_version",
        "occurred_at",
        "status",
        "reason",
        "user_id",
        "plan_code",
        "customer_id",
        "subject_key",
    ),
)
ENTITLEMENTS = DerivedTable(
    table=user_entitlements,
    key=("user_id",),
    columns=(
        "plan_code",
        "entitlements",
        "status",
        "valid_until",
        "activated_at",
        "version",
        "created_at",
        "updated_at",
    ),
)
# In the order in which they are reported and corrected; entitlements follow from all of these.
REPLAYED = (EVENTS, CLAIMS, FACTS, LINKS, TIES, SOURCES, PAYMENTS)


class NodeKind(StrEnum):
    """What a node of the index names."""

    EVENT = "event"
    SUBJECT = "subject"
    CUSTOMER = "customer"
    USER = "user"
    MONEY = "money"


class Node(NamedTuple):
    """One name in the index; users have neither account nor livemode of their own."""

    kind: NodeKind
    account: str
    livemode: bool
    name: str


def user_node(user_id: str) -> Node:
    """A user's node."""
    return Node(NodeKind.USER, "", False, user_id)


# Which node a stored row belongs to, and by which column its rows are found.
NODE_OF_TABLE: Mapping[str, tuple[NodeKind, str]] = {
    EVENTS.table.name: (NodeKind.EVENT, "event_id"),
    CLAIMS.table.name: (NodeKind.EVENT, "event_id"),
    FACTS.table.name: (NodeKind.SUBJECT, "subject_key"),
    LINKS.table.name: (NodeKind.SUBJECT, "child"),
    TIES.table.name: (NodeKind.CUSTOMER, "customer_id"),
    SOURCES.table.name: (NodeKind.SUBJECT, "source_key"),
    PAYMENTS.table.name: (NodeKind.MONEY, "effect_key"),
    ENTITLEMENTS.table.name: (NodeKind.USER, "user_id"),
}


def node_of(derived: DerivedTable, row: Mapping[str, Any]) -> Node:
    """The node that a row of a derived table belongs to."""
    kind, column = NODE_OF_TABLE[derived.table.name]
    if kind is NodeKind.USER:
        return user_node(row[column])
    return Node(kind, row["account"], row["livemode"], row[column])


class PartyIndex:
    """Which nodes hang together, in a scratch file: memory stays the same however many there are."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None)
        # It is thrown away after the run, so nothing of it needs to outlive a crash.
        self._connection.execute("PRAGMA journal_mode = OFF")
        self._connection.execute("PRAGMA synchronous = OFF")
        self._connection.execute(
            "CREATE TABLE node (kind TEXT, account TEXT, livemode INTEGER, name TEXT, party INTEGER NOT NULL, "
            "PRIMARY KEY (kind, account, livemode, name)) WITHOUT ROWID"
        )
        self._connection.execute("CREATE INDEX node_party ON node (party)")
        self._newest = 0

    def close(self) -> None:
        """Lets go of the file."""
        self._connection.close()

    def knows(self, node: Node) -> bool:
        """Whether a node is in the index."""
        return self._party_of(node) is not None

    def join(self, nodes: Iterable[Node]) -> None:
        """Makes one party of these nodes and all that hangs together with them.

        Of several parties the newest remains, so that whoever goes through them in order meets it still.
        """
        named = sorted(set(nodes))
        known = {node: self._party_of(node) for node in named}
        parties = sorted({party for party in known.values() if party is not None})
        if not parties:
            self._newest += 1
        party = parties[-1] if parties else self._newest
        for older in parties[:-1]:
            self._connection.execute("UPDATE node SET party = ? WHERE party = ?", (party, older))
        self._connection.executemany(
            "INSERT INTO node VALUES (?, ?, ?, ?, ?)",
            [(*node, party) for node in named if known[node] is None],
        )

    def batch_after(self, party: int) -> list[int]:
        """The next parties in order, as many as make a batch."""
        batch: list[int] = []
        nodes = 0
        for found, size in self._connection.execute(
            "SELECT party, count(*) FROM node WHERE party > ? GROUP BY party ORDER BY party LIMIT ?",
            (party, BATCH_NODES),
        ):
            if batch and nodes + size > BATCH_NODES:
                break
            batch.append(found)
            nodes += size
        return batch

    def nodes_of(self, party: int) -> list[Node]:
        """The nodes of a party, in order."""
        return [
            Node(NodeKind(kind), account, bool(livemode), name)
            for kind, account, livemode, name in self._connection.execute(
                "SELECT kind, account, livemode, name FROM node WHERE party = ? ORDER BY 1, 2, 3, 4", (party,)
            )
        ]

    def count_events(self) -> int:
        """How many events are in the index."""
        (found,) = self._connection.execute(
            "SELECT count(*) FROM node WHERE kind = ?", (NodeKind.EVENT,)
        ).fetchone()
        return int(found)

    def _party_of(self, node: Node) -> int | None:
        row = self._connection.execute(
            "SELECT party FROM node WHERE kind = ? AND account = ? AND livemode = ? AND name = ?", node
        ).fetchone()
        return row[0] if row else None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredEvent:
    """What a replay needs of a stored event; `position` is its place in the order of decisions."""

    account: str
    livemode: bool
    event_id: str
    occurred_at: datetime
    received_at: datetime
    position: int | None
    payload: bytes

    @property
    def place(self) -> tuple[int, datetime, str]:
        """Sorts the events of a party in the order in which they were decided."""
        return (self.position or 0, self.received_at, self.event_id)


async def hold_still(tx: Tx) -> None:
    """Makes all reads of a transaction that has just begun see one instant; on SQLite they do anyway."""
    if tx.dialect.name == "postgresql":
        await tx.execute(sa.text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))


async def load_events_after(tx: Tx, after: Key | None, *, limit: int = PAGE_EVENTS) -> list[StoredEvent]:
    """The next page of processed events in the order of their keys."""
    columns = webhook_events.c
    place = sa.tuple_(columns.account, columns.livemode, columns.event_id)
    statement = _select_events().order_by(columns.account, columns.livemode, columns.event_id).limit(limit)
    if after is not None:
        statement = statement.where(place > sa.tuple_(*(sa.literal(part) for part in after)))
    return [StoredEvent(**row) for row in (await tx.execute(statement)).mappings()]


async def newest_position(tx: Tx) -> int:
    """The position of the newest decision, 0 where there is none."""
    result = await tx.execute(sa.select(sa.func.max(webhook_events.c.position)))
    return result.scalar_one() or 0


async def event_nodes_since(tx: Tx, position: int) -> list[Node]:
    """The events that were decided since a position, and those that may have been on their way then."""
    columns = webhook_events.c
    result = await tx.execute(
        sa.select(columns.account, columns.livemode, columns.event_id).where(
            columns.position > position - POSITIONS_IN_FLIGHT_MAX
        )
    )
    return [Node(NodeKind.EVENT, row.account, row.livemode, row.event_id) for row in result]


async def load_events(tx: Tx, nodes: Collection[Node]) -> list[StoredEvent]:
    """The processed events among some nodes."""
    found: list[StoredEvent] = []
    for condition in _conditions(webhook_events, NodeKind.EVENT, "event_id", nodes):
        found += [
            StoredEvent(**row) for row in (await tx.execute(_select_events().where(condition))).mappings()
        ]
    return found


def _select_events() -> sa.Select[*tuple[Any, ...]]:
    columns = webhook_events.c
    claimed = (
        sa.select(sa.literal(1))
        .where(
            webhook_claims.c.account == columns.account,
            webhook_claims.c.livemode == columns.livemode,
            webhook_claims.c.event_id == columns.event_id,
        )
        .exists()
    )
    # What only ever failed had no effect. Three witnesses, because any one of them may have been altered.
    processed = sa.or_(columns.status != FAILED, columns.answer.is_not(None), claimed)
    return sa.select(
        columns.account,
        columns.livemode,
        columns.event_id,
        columns.occurred_at,
        columns.received_at,
        columns.position,
        columns.payload,
    ).where(processed)


async def load_keys_after(tx: Tx, derived: DerivedTable, after: Key | None) -> list[Row]:
    """The next page of a derived table's keys, in their order; of facts only those that events made, and so on."""
    columns = [derived.table.c[name] for name in derived.key]
    statement = sa.select(*columns).where(_from_events(derived)).order_by(*columns).limit(PAGE_KEYS)
    if after is not None:
        literals = (sa.literal(part, column.type) for part, column in zip(after, columns, strict=True))
        statement = statement.where(sa.tuple_(*columns) > sa.tuple_(*literals))
    return [dict(row) for row in (await tx.execute(statement)).mappings()]


async def load_rows(tx: Tx, derived: DerivedTable, nodes: Collection[Node]) -> dict[Key, Row]:
    """The rows of a derived table that belong to some nodes, by their keys."""
    kind, column = NODE_OF_TABLE[derived.table.name]
    names = dict.fromkeys((*derived.key, *derived.columns))
    selected = sa.select(*(derived.table.c[name] for name in names)).where(_from_events(derived))
    found: dict[Key, Row] = {}
    for condition in _conditions(derived.table, kind, column, nodes):
        for found_row in (await tx.execute(selected.where(condition))).mappings():
            row = dict(found_row)
            found[derived.key_of(row)] = row
    return found


async def load_manual_facts_after(tx: Tx, after: Key | None) -> list[Row]:
    """The next page of facts that people made, with their bodies."""
    columns = [facts.c[name] for name in FACTS.key]
    statement = (
        sa.select(*columns, facts.c.body)
        .where(facts.c.kind.in_(MANUAL_KINDS))
        .order_by(*columns)
        .limit(PAGE_KEYS)
    )
    if after is not None:
        literals = (sa.literal(part, column.type) for part, column in zip(after, columns, strict=True))
        statement = statement.where(sa.tuple_(*columns) > sa.tuple_(*literals))
    return [dict(row) for row in (await tx.execute(statement)).mappings()]


async def load_manual_facts(tx: Tx, nodes: Collection[Node]) -> list[Row]:
    """The facts that people made about some subjects."""
    found: list[Row] = []
    for condition in _conditions(facts, NodeKind.SUBJECT, "subject_key", nodes):
        result = await tx.execute(sa.select(facts).where(condition, facts.c.kind.in_(MANUAL_KINDS)))
        found += [dict(row) for row in result.mappings()]
    return found


async def load_own_ties(tx: Tx, nodes: Collection[Node]) -> list[Row]:
    """The ties of some customers that our own side made."""
    found: list[Row] = []
    for condition in _conditions(customer_ties, NodeKind.CUSTOMER, "customer_id", nodes):
        result = await tx.execute(
            sa.select(customer_ties).where(condition, customer_ties.c.via.in_(OWN_TIES))
        )
        found += [dict(row) for row in result.mappings()]
    return found


async def load_history(tx: Tx, users: Collection[str]) -> dict[str, list[Row]]:
    """All versions that some users' entitlements ever had, the oldest first."""
    found: dict[str, list[Row]] = {}
    for names in _chunks(sorted(users)):
        for row in (
            await tx.execute(
                sa.select(entitlement_history)
                .where(entitlement_history.c.user_id.in_(names))
                .order_by(entitlement_history.c.user_id, entitlement_history.c.version)
            )
        ).mappings():
            found.setdefault(row["user_id"], []).append(dict(row))
    return found


async def load_users_after(tx: Tx, after: str | None, *, limit: int) -> list[str]:
    """The next users who own a source or have a row, in order."""
    users = sa.union(
        sa.select(sources.c.user_id).where(sources.c.user_id.is_not(None)),
        sa.select(user_entitlements.c.user_id),
    ).subquery()
    statement = sa.select(users.c.user_id).order_by(users.c.user_id).limit(limit)
    if after is not None:
        statement = statement.where(users.c.user_id > after)
    return list((await tx.execute(statement)).scalars())


async def write_rows(
    tx: Tx, derived: DerivedTable, changes: Sequence[tuple[Key, Mapping[str, Any] | None]], *, now: datetime
) -> None:
    """Makes rows what they should be; None deletes one. The bytes that came are never touched."""
    table = derived.table
    is_row = sa.and_(*(table.c[name] == sa.bindparam(f"key_{name}") for name in derived.key))
    gone = [_bound(derived, key) for key, row in changes if row is None]
    if gone:
        await tx.execute(table.delete().where(is_row), gone)
    kept = [(key, {name: row[name] for name in derived.columns}) for key, row in changes if row is not None]
    if not kept:
        return
    if derived is EVENTS:
        await tx.execute(table.update().where(is_row), [{**_bound(derived, key), **row} for key, row in kept])
        return
    # What a new row has beside what follows from events.
    made: Row = {
        name: now
        for name in ("created_at", "updated_at", "claimed_at")
        if name in table.c and name not in derived.columns
    }
    statement = insert(table, tx)
    if derived.columns:
        statement = statement.on_conflict_do_update(
            index_elements=list(derived.key),
            set_={name: statement.excluded[name] for name in derived.columns},
        )
    else:
        statement = statement.on_conflict_do_nothing()
    await tx.execute(
        statement,
        [
            {
                **dict(zip(derived.key, key, strict=True)),
                **made,
                **row,
                **({"id": new_id()} if "id" in table.c else {}),
            }
            for key, row in kept
        ],
    )


def _bound(derived: DerivedTable, key: Key) -> Row:
    return {f"key_{name}": part for name, part in zip(derived.key, key, strict=True)}


async def set_created_at(tx: Tx, user_id: str, created_at: datetime) -> None:
    """Says when a user's row was first written; it is the time of the oldest version."""
    await tx.execute(
        user_entitlements.update().where(user_entitlements.c.user_id == user_id).values(created_at=created_at)
    )


def as_parties(nodes: Iterable[Node]) -> Parties:
    """The names that a decision about these nodes locks."""
    subjects: set[SubjectId] = set()
    customers: set[CustomerId] = set()
    users: set[str] = set()
    for node in nodes:
        if node.kind is NodeKind.SUBJECT:
            subjects.add(SubjectId(node.account, node.livemode, node.name))
        elif node.kind is NodeKind.CUSTOMER:
            customers.add(CustomerId(node.account, node.livemode, node.name))
        elif node.kind is NodeKind.USER:
            users.add(node.name)
    return Parties(subjects=frozenset(subjects), customers=frozenset(customers), users=frozenset(users))


def _from_events(derived: DerivedTable) -> sa.ColumnElement[bool]:
    if derived is FACTS:
        return facts.c.kind.not_in(MANUAL_KINDS)
    if derived is TIES:
        return customer_ties.c.via.not_in(OWN_TIES)
    if derived is SOURCES:
        # A grant is its own source; who made the one made the other.
        return sources.c.source_key.not_like("grant:%")
    if derived is EVENTS:
        return sa.or_(webhook_events.c.status != FAILED, webhook_events.c.answer.is_not(None))
    return sa.true()


def _conditions(
    table: sa.Table, kind: NodeKind, column: str, nodes: Collection[Node]
) -> Iterator[sa.ColumnElement[bool]]:
    """Conditions that together find the rows of the nodes of one kind, each of a bounded size."""
    chosen = sorted(node for node in nodes if node.kind is kind)
    if kind is NodeKind.USER:
        for names in _chunks([node.name for node in chosen]):
            yield table.c[column].in_(names)
        return
    for (account, livemode), group in itertools.groupby(
        chosen, key=lambda node: (node.account, node.livemode)
    ):
        for names in _chunks([node.name for node in group]):
            yield sa.and_(
                table.c.account == account, table.c.livemode == livemode, table.c[column].in_(names)
            )


def _chunks(names: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(names), NAMES_MAX):
        yield names[start : start + NAMES_MAX]
