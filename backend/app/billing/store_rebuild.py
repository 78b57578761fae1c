"""The SQL of a rebuild: the derived tables as plain rows, read and written a few parties (party_index.py) at a time."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from backend.app.audit.models import audit_logs
from backend.app.billing.domain.facts import CustomerId, EventKey, SubjectId, Via
from backend.app.billing.models import (
    customer_ties,
    entitlement_history,
    facts,
    links,
    payment_claims,
    payment_events,
    sources,
    user_entitlements,
    waiting_names,
    webhook_claims,
    webhook_events,
)
from backend.app.billing.party_index import Node, NodeKind, user_node
from backend.app.billing.store import FAILED
from backend.app.billing.store_state import Parties
from backend.app.core.database import Tx, insert
from backend.app.core.ids import new_id

# A page is held in memory: at most this many stored bodies of 256 KiB, in practice of three.
PAGE_EVENTS = 200
# Keys alone are small.
PAGE_KEYS = 2_000
# Names in one IN (...): PostgreSQL's driver and SQLite both allow 32,767 parameters a statement.
NAMES_MAX = 5_000
# A transaction takes its places a few milliseconds before it commits; what others commit meanwhile, at some
# thousand events a second, is by far less than this.
POSITIONS_IN_FLIGHT_MAX = 5_000

# Facts and claims that people made; they are taken as they are.
MANUAL_KINDS = ("grant", "claim")
# Ties that our own side made and that neither an event nor a claim can tell again.
OWN_TIES = (Via.CHECKOUT_RECORD,)

Key = tuple[Any, ...]
Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class DerivedTable:
    """A table that follows from the events: `key` names a row, `columns` are compared beside it.

    With `may_have_more` a row that does not follow is no difference. Where the database itself does not refuse a
    second row of one key, `twice_by` tells it from the first; it stands at the end of the second one's key.
    """

    table: sa.Table
    key: tuple[str, ...]
    columns: tuple[str, ...]
    may_have_more: bool = False
    twice_by: str | None = None

    def key_of(self, row: Mapping[str, Any]) -> Key:
        """A row's key."""
        return tuple(row[name] for name in self.key)


_SCOPE = ("account", "livemode")
CLAIMS = DerivedTable(table=webhook_claims, key=(*_SCOPE, "event_id"), columns=())
FACTS = DerivedTable(
    table=facts,
    key=(*_SCOPE, "subject_key", "series", "as_of", "event_id"),
    columns=("inherited", "body"),
)
LINKS = DerivedTable(table=links, key=(*_SCOPE, "child", "parent"), columns=())
TIES = DerivedTable(
    table=customer_ties,
    key=(*_SCOPE, "customer_id", "user_id", "via"),
    columns=("occurred_at", "event_id"),
)
SOURCES = DerivedTable(table=sources, key=(*_SCOPE, "source_key"), columns=("customer_id", "user_id"))
PAYMENT_CLAIMS = DerivedTable(table=payment_claims, key=(*_SCOPE, "effect_key"), columns=())
WAITING = DerivedTable(table=waiting_names, key=(*_SCOPE, "name"), columns=(), may_have_more=True)
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
    twice_by="created_at",
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
REPLAYED = (EVENTS, CLAIMS, FACTS, LINKS, TIES, SOURCES, PAYMENTS, PAYMENT_CLAIMS, WAITING)
# Tables whose key is no constraint: on PostgreSQL one would have to contain the month.
_WITHOUT_CONSTRAINT = (EVENTS, PAYMENTS)


# Which node a stored row belongs to, and by which column its rows are found.
NODE_OF_TABLE: Mapping[str, tuple[NodeKind, str]] = {
    EVENTS.table.name: (NodeKind.EVENT, "event_id"),
    CLAIMS.table.name: (NodeKind.EVENT, "event_id"),
    FACTS.table.name: (NodeKind.SUBJECT, "subject_key"),
    LINKS.table.name: (NodeKind.SUBJECT, "child"),
    TIES.table.name: (NodeKind.CUSTOMER, "customer_id"),
    SOURCES.table.name: (NodeKind.SUBJECT, "source_key"),
    PAYMENTS.table.name: (NodeKind.MONEY, "effect_key"),
    PAYMENT_CLAIMS.table.name: (NodeKind.MONEY, "effect_key"),
    WAITING.table.name: (NodeKind.SUBJECT, "name"),
    ENTITLEMENTS.table.name: (NodeKind.USER, "user_id"),
}


def node_of(derived: DerivedTable, row: Mapping[str, Any]) -> Node:
    """The node that a row of a derived table belongs to."""
    kind, column = NODE_OF_TABLE[derived.table.name]
    if kind is NodeKind.USER:
        return user_node(row[column])
    return Node(kind, row["account"], row["livemode"], row[column])


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredEvent:
    """What a replay needs of a stored event; `position` is its place in the order of decisions."""

    account: str
    livemode: bool
    event_id: str
    occurred_at: datetime
    received_at: datetime
    position: int | None
    payload: bytes | None
    assertion: Mapping[str, Any] | None

    @property
    def key(self) -> EventKey:
        """What tells it from all other events."""
        return self.account, self.livemode, self.event_id

    @property
    def node(self) -> Node:
        """Its node in the index."""
        return Node(NodeKind.EVENT, self.account, self.livemode, self.event_id)

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


async def database_identity(tx: Tx) -> str:
    """What tells this database from any other, a copy of it included; on SQLite the file, not its path."""
    if tx.dialect.name == "postgresql":
        found = await tx.execute(
            sa.text(
                "SELECT system_identifier, oid FROM pg_control_system(), pg_database "
                "WHERE datname = current_database()"
            )
        )
        return "/".join(str(part) for part in found.one())
    file = await tx.execute(sa.text("SELECT file FROM pragma_database_list WHERE name = 'main'"))
    return _file_identity(Path(file.scalar_one()))


def _file_identity(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_dev}/{stat.st_ino}"


async def newest_position(tx: Tx) -> int:
    """The position of the newest decision, 0 where there is none."""
    result = await tx.execute(sa.select(sa.func.max(webhook_events.c.position)))
    return result.scalar_one() or 0


async def load_positions_after(tx: Tx, position: int, after: Key | None) -> list[Row]:
    """The next page of what was decided since a position, or may have been on its way then: positions and keys."""
    columns = [webhook_events.c[name] for name in ("position", *EVENTS.key)]
    statement = (
        sa.select(*columns)
        .where(webhook_events.c.position > position - POSITIONS_IN_FLIGHT_MAX)
        .order_by(*columns)
        .limit(PAGE_KEYS)
    )
    if after is not None:
        statement = statement.where(sa.tuple_(*columns) > sa.tuple_(*(sa.literal(part) for part in after)))
    return [dict(row) for row in (await tx.execute(statement)).mappings()]


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
        columns.assertion,
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
    names = dict.fromkeys((*derived.key, *derived.columns, *filter(None, [derived.twice_by])))
    selected = sa.select(*(derived.table.c[name] for name in names)).where(_from_events(derived))
    if derived.twice_by is not None:
        selected = selected.order_by(derived.table.c[derived.twice_by])
    found: dict[Key, Row] = {}
    for condition in _conditions(derived.table, kind, column, nodes):
        for found_row in (await tx.execute(selected.where(condition))).mappings():
            row = dict(found_row)
            key = derived.key_of(row)
            if key in found and derived.twice_by is not None:
                key = (*key, row[derived.twice_by])
            found[key] = row
    return found


async def load_manual_facts_after(tx: Tx, after: Key | None) -> list[Row]:
    """The next page of facts that people made, with their bodies."""
    columns = [facts.c[name] for name in FACTS.key]
    statement = sa.select(*columns, facts.c.body).where(_is_manual()).order_by(*columns).limit(PAGE_KEYS)
    if after is not None:
        literals = (sa.literal(part, column.type) for part, column in zip(after, columns, strict=True))
        statement = statement.where(sa.tuple_(*columns) > sa.tuple_(*literals))
    return [dict(row) for row in (await tx.execute(statement)).mappings()]


async def load_manual_facts(tx: Tx, nodes: Collection[Node]) -> list[Row]:
    """The facts that people made about some subjects."""
    found: list[Row] = []
    for condition in _conditions(facts, NodeKind.SUBJECT, "subject_key", nodes):
        result = await tx.execute(sa.select(facts).where(condition, _is_manual()))
        found += [dict(row) for row in result.mappings()]
    return found


async def load_own_ties_after(tx: Tx, after: Key | None) -> list[Row]:
    """The next page of ties that our own side made."""
    columns = [customer_ties.c[name] for name in TIES.key]
    statement = (
        sa.select(customer_ties).where(customer_ties.c.via.in_(OWN_TIES)).order_by(*columns).limit(PAGE_KEYS)
    )
    if after is not None:
        statement = statement.where(sa.tuple_(*columns) > sa.tuple_(*(sa.literal(part) for part in after)))
    return [dict(row) for row in (await tx.execute(statement)).mappings()]


async def load_owned(tx: Tx, users: Collection[str]) -> list[tuple[Node, Node]]:
    """The sources of some users, grants included, each with its user."""
    found: list[tuple[Node, Node]] = []
    for names in _chunks(sorted(users)):
        for row in await tx.execute(sa.select(sources).where(sources.c.user_id.in_(names))):
            subject = Node(NodeKind.SUBJECT, row.account, row.livemode, row.source_key)
            found.append((subject, user_node(row.user_id)))
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
    # Each table by itself, so that a page costs a walk along an index and not a look at everybody.
    # Null, a source of nobody, is greater than no text.
    pages = (
        sa.select(column).where(column > (after or "")).distinct().order_by(column).limit(limit).subquery()
        for column in (sources.c.user_id, user_entitlements.c.user_id)
    )
    users = sa.union(*(sa.select(page.c.user_id) for page in pages)).subquery()
    statement = sa.select(users.c.user_id).order_by(users.c.user_id).limit(limit)
    return list((await tx.execute(statement)).scalars())


async def count_users(tx: Tx) -> int:
    """How many users own a source or have a row."""
    users = sa.union(
        sa.select(sources.c.user_id).where(sources.c.user_id.is_not(None)),
        sa.select(user_entitlements.c.user_id),
    ).subquery()
    return (await tx.execute(sa.select(sa.func.count()).select_from(users))).scalar_one()


async def write_rows(
    tx: Tx,
    derived: DerivedTable,
    changes: Sequence[tuple[Key, Mapping[str, Any] | None]],
    *,
    new: Collection[Key] = (),
    now: datetime,
) -> None:
    """Makes rows what they should be, of which some are `new`; None deletes one. The bytes that came are never touched."""
    table = derived.table
    is_row = sa.and_(*(table.c[name] == sa.bindparam(f"key_{name}") for name in derived.key))
    too_many = [key for key, row in changes if row is None]
    second = [key for key in too_many if len(key) > len(derived.key)]
    if second and derived.twice_by is not None:
        is_second = table.c[derived.twice_by] == sa.bindparam("key_twice")
        await tx.execute(
            table.delete().where(is_row, is_second),
            [{**_bound(derived, key[:-1]), "key_twice": key[-1]} for key in second],
        )
    gone = [_bound(derived, key) for key in too_many if len(key) == len(derived.key)]
    if gone:
        await tx.execute(table.delete().where(is_row), gone)
    kept = [(key, {name: row[name] for name in derived.columns}) for key, row in changes if row is not None]
    if derived in _WITHOUT_CONSTRAINT:
        known = [{**_bound(derived, key), **row} for key, row in kept if key not in new]
        if known:
            await tx.execute(table.update().where(is_row), known)
        kept = [(key, row) for key, row in kept if key in new]
    if not kept:
        return
    # What a new row has beside what follows from events.
    made: Row = {
        name: now
        for name in ("created_at", "updated_at", "claimed_at")
        if name in table.c and name not in derived.columns
    }
    statement = insert(table, tx)
    if derived.columns and derived not in _WITHOUT_CONSTRAINT:
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


async def is_audited(tx: Tx, audit_id: str) -> bool:
    """Whether an audit row is there, and so whether the transaction that wrote it has committed."""
    found = await tx.execute(sa.select(audit_logs.c.id).where(audit_logs.c.id == audit_id))
    return found.first() is not None


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
        return sa.not_(_is_manual())
    if derived is TIES:
        return customer_ties.c.via.not_in(OWN_TIES)
    if derived is SOURCES:
        # A grant is its own source; who made the one made the other.
        return sources.c.source_key.not_like("grant:%")
    if derived is EVENTS:
        return sa.or_(webhook_events.c.status != FAILED, webhook_events.c.answer.is_not(None))
    return sa.true()


def _is_manual() -> sa.ColumnElement[bool]:
    """What a person said of a subject itself; what inherits it follows, as from an event."""
    return sa.and_(facts.c.series.in_(MANUAL_KINDS), sa.not_(facts.c.inherited))


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
