"""What billing writes, as functions of an open transaction; what they take are the domain's values.

Functions take many rows at once: the number of statements does not grow with the number of events.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from backend.app.billing.domain.decide import Attribution, EntitlementChange, Status, Waiting
from backend.app.billing.domain.facts import (
    CustomerId,
    Event,
    EventKey,
    Fact,
    SubjectId,
    Tie,
    Via,
    series_of,
)
from backend.app.billing.domain.state import Owned
from backend.app.billing.models import (
    PaymentEvent,
    customer_ties,
    entitlement_history,
    facts,
    links,
    payment_events,
    sources,
    user_entitlements,
    waiting_names,
    webhook_events,
)
from backend.app.billing.store_state import FACT
from backend.app.core.bulk import Insert
from backend.app.core.database import Tx, insert
from backend.app.core.ids import new_id

FAILED = "failed"
_PAYMENT_COLUMNS = tuple(field.name for field in fields(PaymentEvent))
# In the statement's text, not a parameter: only so can a prepared plan use the indexes of what is parked.
PARKED: sa.ColumnElement[str] = sa.literal_column(f"'{Status.PARKED.value}'")

_EVENT_COLUMNS = [
    name
    for name in webhook_events.c.keys()  # noqa: SIM118  # not a dict
    if name not in ("account", "livemode", "event_id", "occurred_at", "attempts")
]
_EVENT_AGAIN = (
    "ON CONFLICT (account, livemode, event_id, occurred_at) DO UPDATE SET attempts = webhook_events.attempts + 1, "
    + ", ".join(f"{name} = excluded.{name}" for name in _EVENT_COLUMNS)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredEvent:
    """A row of `webhook_events` as it is written: the signed bytes, and what became of them."""

    event: Event
    received_at: datetime
    payload: bytes
    payload_sha256: str
    request_id: str
    status: Status
    reason: str | None
    user_id: str | None
    plan_code: str | None
    customer_id: str | None
    subject_key: str | None
    answer: str


async def stored_answers(tx: Tx, events: Sequence[Event]) -> dict[EventKey, str]:
    """The bodies that the first deliveries of claimed events were answered with."""
    if not events:
        return {}
    columns = webhook_events.c
    keys = [event.key for event in events]
    result = await tx.execute(
        sa.select(columns.account, columns.livemode, columns.event_id, columns.answer).where(
            named_in(webhook_events, "event_id", keys)
        )
    )
    return {(row.account, row.livemode, row.event_id): row.answer for row in result if row.answer is not None}


def insert_sources(touched: Sequence[tuple[SubjectId, Owned]], *, now: datetime) -> Insert:
    """Writes sources with their customers and owners, each once."""
    return Insert(
        sources,
        [
            {
                "account": source_id.account,
                "livemode": source_id.livemode,
                "source_key": source_id.key,
                "customer_id": owned.customer_id,
                "user_id": owned.user_id,
                "created_at": now,
                "updated_at": now,
            }
            for source_id, owned in touched
        ],
        """ON CONFLICT (account, livemode, source_key) DO UPDATE SET customer_id = excluded.customer_id,
        user_id = excluded.user_id, updated_at = excluded.updated_at""",
    )


def insert_facts(
    own: Sequence[tuple[SubjectId, Fact]], inherited: Sequence[tuple[SubjectId, Fact]]
) -> Insert:
    """Adds subjects' own facts and those of what bears on them; one that is there already stays as it is."""
    return Insert(
        facts,
        [
            {
                "account": subject.account,
                "livemode": subject.livemode,
                "subject_key": subject.key,
                "series": series_of(fact),
                "as_of": fact.as_of,
                "event_id": fact.event_id,
                "inherited": is_inherited,
                "body": FACT.dump_python(fact, mode="json"),
            }
            for new, is_inherited in ((own, False), (inherited, True))
            for subject, fact in new
        ],
        "ON CONFLICT DO NOTHING",
    )


def insert_links(new: Sequence[tuple[SubjectId, SubjectId]]) -> Insert:
    """Adds links from children to parents."""
    return Insert(
        links,
        [
            {
                "account": child.account,
                "livemode": child.livemode,
                "child": child.key,
                "parent": parent.key,
            }
            for child, parent in new
        ],
        "ON CONFLICT DO NOTHING",
    )


def insert_ties(ties: Sequence[tuple[CustomerId, Tie]]) -> Insert:
    """Adds claims that a customer is a user; of equal claims that is kept which is stronger, whatever came first."""
    strongest: dict[tuple[CustomerId, str, Via], Tie] = {}
    for customer, tie in ties:
        name = (customer, tie.user_id, tie.via)
        known = strongest.get(name)
        if known is None or tie.strength < known.strength:
            strongest[name] = tie
    return Insert(
        customer_ties,
        [
            {
                "account": customer.account,
                "livemode": customer.livemode,
                "customer_id": customer.id,
                "user_id": user_id,
                "via": int(via),
                "occurred_at": tie.occurred_at,
                "event_id": tie.event_id,
            }
            for (customer, user_id, via), tie in strongest.items()
        ],
        f"""ON CONFLICT (account, livemode, customer_id, user_id, via) DO UPDATE
        SET occurred_at = excluded.occurred_at, event_id = excluded.event_id
        WHERE CASE WHEN customer_ties.via = {int(Via.ADMIN)}
            THEN excluded.occurred_at > customer_ties.occurred_at
            ELSE (excluded.occurred_at, excluded.event_id)
                < (customer_ties.occurred_at, customer_ties.event_id) END""",  # noqa: S608  # a number of ours
    )


def insert_entitlements(changes: Sequence[tuple[EntitlementChange, Event]], *, now: datetime) -> list[Insert]:
    """Writes users' entitlements, and for each change the history row that says which event caused it."""
    last = {change.after.user_id: change.after for change, _ in changes}
    present = Insert(
        user_entitlements,
        [
            {
                "id": new_id(),
                "user_id": after.user_id,
                "plan_code": after.plan_code,
                "entitlements": dict(after.features),
                "status": after.status,
                "activated_at": after.activated_at,
                "valid_until": after.valid_until,
                "version": after.version,
                "created_at": now,
                "updated_at": now,
            }
            for after in last.values()
        ],
        """ON CONFLICT (user_id) DO UPDATE SET plan_code = excluded.plan_code,
        entitlements = excluded.entitlements, status = excluded.status, activated_at = excluded.activated_at,
        valid_until = excluded.valid_until, version = excluded.version, updated_at = excluded.updated_at""",
    )
    history = Insert(
        entitlement_history,
        [
            {
                "user_id": change.after.user_id,
                "version": change.after.version,
                "change": change.kind.value,
                "plan_code": change.after.plan_code,
                "entitlements": dict(change.after.features),
                "status": change.after.status,
                "valid_until": change.after.valid_until,
                "cause_account": event.account,
                "cause_event_id": event.id,
                "cause_event_type": event.type,
                "occurred_at": event.occurred_at,
                "created_at": now,
            }
            for change, event in changes
        ],
    )
    return [present, history]


def insert_payments(payments: Sequence[PaymentEvent]) -> Insert:
    """Adds ledger lines whose money was claimed."""
    return Insert(
        payment_events,
        [{name: getattr(payment, name) for name in _PAYMENT_COLUMNS} for payment in payments],
    )


def insert_waiting(names: Collection[SubjectId]) -> Insert:
    """Keeps under which names something waits from now on."""
    return Insert(
        waiting_names,
        [
            {"account": account, "livemode": livemode, "name": name}
            for account, livemode, name in sorted(names)
        ],
        "ON CONFLICT DO NOTHING",
    )


async def load_still_waiting(tx: Tx, names: Collection[SubjectId]) -> set[SubjectId]:
    """Those of the names that something waits for itself, rather than for what bears on them."""
    waiting = waiting_names.c
    events, lines = webhook_events.c, payment_events.c
    customer = sa.func.substr(waiting.name, len("cus:") + 1)
    is_customer = waiting.name.like("cus:%")
    still_waits = (
        (events, sa.and_(events.status == PARKED, events.subject_key == waiting.name)),
        (events, sa.and_(events.status == PARKED, is_customer, events.customer_id == customer)),
        (lines, sa.and_(lines.user_id.is_(None), lines.subject_key == waiting.name)),
        (lines, sa.and_(lines.plan_code.is_(None), lines.subject_key == waiting.name)),
        (lines, sa.and_(lines.user_id.is_(None), is_customer, lines.customer_id == customer)),
    )
    result = await tx.execute(
        sa.select(waiting.account, waiting.livemode, waiting.name).where(
            named_in(waiting_names, "name", names),
            sa.or_(
                *(
                    sa.exists()
                    .where(
                        condition, columns.account == waiting.account, columns.livemode == waiting.livemode
                    )
                    .correlate(waiting_names)
                    for columns, condition in still_waits
                )
            ),
        )
    )
    return {SubjectId(*row) for row in result}


async def forget_waiting(tx: Tx, names: Collection[SubjectId]) -> None:
    """Lets go of names under which nothing waits any more."""
    await tx.execute(waiting_names.delete().where(named_in(waiting_names, "name", names)))


async def attribute_payments(
    tx: Tx, attribution: Attribution, subjects: Collection[SubjectId]
) -> list[PaymentEvent]:
    """Gives the ledger lines that waited for a source's or customer's user to that user; the lines it gave.

    `subjects` are the source, if it is about one, and all that bears on it.
    """
    columns = payment_events.c
    if attribution.customer is not None:
        account, livemode, customer_id = attribution.customer
        about = sa.and_(
            columns.account == account, columns.livemode == livemode, columns.customer_id == customer_id
        )
    else:
        about = named_in(payment_events, "subject_key", subjects)
    result = await tx.execute(
        payment_events.update()
        .where(about, columns.user_id.is_(None))
        .values(user_id=attribution.user_id)
        .returning(*columns)
    )
    return [PaymentEvent(**row) for row in result.mappings()]


async def name_plans(tx: Tx, waiting: Waiting, subjects: Collection[SubjectId]) -> None:
    """Writes a source's plan into the lines about it, or what bears on it, that could not name one when they came."""
    if waiting.plan_code is None:
        return
    await tx.execute(
        payment_events.update()
        .where(named_in(payment_events, "subject_key", subjects), payment_events.c.plan_code.is_(None))
        .values(plan_code=waiting.plan_code)
    )


async def settle_waiting(
    tx: Tx, waiting: Waiting, subjects: Collection[SubjectId], reason: str | None
) -> list[str]:
    """Tells the parked events about subjects of a source what they wait for now, or that it is over; ids of those that ended."""
    columns = webhook_events.c
    over = reason is None
    plan_code = sa.func.coalesce(waiting.plan_code, columns.plan_code)
    result = await tx.execute(
        webhook_events.update()
        .where(
            named_in(webhook_events, "subject_key", subjects),
            columns.status == PARKED,
            # What could not be read is no wiser now.
            columns.reason.not_like("unreadable:%"),
            # A thousand that wait on for the same would be written anew with every event.
            sa.or_(
                sa.literal(over),
                columns.reason != reason,
                columns.user_id.is_distinct_from(waiting.user_id),
                columns.plan_code.is_distinct_from(plan_code),
            ),
        )
        .values(
            status=(Status.SUCCESS if over else Status.PARKED).value,
            reason=reason,
            user_id=waiting.user_id,
            plan_code=plan_code,
        )
        .returning(columns.event_id)
    )
    return sorted(result.scalars()) if over else []


async def settle_waiting_customer(tx: Tx, attribution: Attribution, reason: str) -> list[str]:
    """Ends the waiting of a customer's parked events that had no known source; their ids."""
    if attribution.customer is None:
        return []
    columns = webhook_events.c
    result = await tx.execute(
        webhook_events.update()
        .where(
            columns.account == attribution.customer.account,
            columns.livemode == attribution.customer.livemode,
            columns.customer_id == attribution.customer.id,
            columns.status == PARKED,
            columns.reason == reason,
        )
        .values(status=Status.SUCCESS.value, reason=None, user_id=attribution.user_id)
        .returning(columns.event_id)
    )
    return sorted(result.scalars())


def insert_events(events: Sequence[StoredEvent]) -> Insert:
    """Writes what came and what became of it; earlier failed attempts of an event are counted on."""
    return Insert(
        webhook_events,
        [
            {
                **_event_values(stored.event, stored.received_at, stored.payload, stored.payload_sha256),
                "status": stored.status.value,
                "reason": stored.reason,
                "attempts": 1,
                "user_id": stored.user_id,
                "plan_code": stored.plan_code,
                "customer_id": stored.customer_id,
                "subject_key": stored.subject_key,
                "answer": stored.answer,
                "request_id": stored.request_id,
                "position": place,
            }
            for place, stored in enumerate(events, start=1)
        ],
        _EVENT_AGAIN,
        # Under the parties' locks, so after every earlier decision about them.
        computed=(
            (
                "position",
                "nextval('webhook_event_positions')",
                "(SELECT coalesce(max(position), 0) FROM webhook_events) + {}",
            ),
        ),
    )


async def advance_positions(tx: Tx) -> None:
    """Lets PostgreSQL's positions go on after the greatest one: a copy that was not made by dump may have begun anew."""
    await tx.execute(
        sa.text(
            """SELECT setval('webhook_event_positions', newest)
            FROM (SELECT max(position) AS newest FROM webhook_events) known, webhook_event_positions
            WHERE newest >= last_value"""
        )
    )


async def save_failed_attempt(
    tx: Tx,
    event: Event,
    *,
    received_at: datetime,
    payload: bytes,
    payload_sha256: str,
    request_id: str,
    reason: str,
) -> None:
    """Counts an attempt that ended in an error of ours and keeps the bytes; a processed event stays as it is."""
    await tx.execute(
        insert(webhook_events, tx)
        .values(
            **_event_values(event, received_at, payload, payload_sha256),
            status=FAILED,
            reason=reason,
            attempts=1,
            request_id=request_id,
        )
        .on_conflict_do_update(
            index_elements=["account", "livemode", "event_id", "occurred_at"],
            set_={"attempts": webhook_events.c.attempts + 1, "reason": reason, "request_id": request_id},
            where=webhook_events.c.status == FAILED,
        )
    )


async def date_failed(tx: Tx, event: Event) -> None:
    """Gives the failed attempts of an event the time that this delivery of it tells, so that it keeps one row."""
    columns = webhook_events.c
    await tx.execute(
        webhook_events.update()
        .where(_is_event(event), columns.status == FAILED)
        .values(occurred_at=event.occurred_at)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ParkedEvent:
    """What is needed to process a parked event again: its stored body or, where that was let go, what it asserted.

    An event without a body was settled once, and is parked since a rebuild under another catalog.
    """

    account: str
    livemode: bool
    event_id: str
    reason: str
    occurred_at: datetime
    payload: bytes | None
    assertion: Mapping[str, Any] | None

    @property
    def key(self) -> EventKey:
        """What tells it from all other events."""
        return self.account, self.livemode, self.event_id


async def load_parked(
    tx: Tx, *, after: tuple[str, bool, str] | None, reason_prefix: str, limit: int
) -> list[ParkedEvent]:
    """The next page of parked events whose reason begins with a prefix, in the order of their keys."""
    columns = webhook_events.c
    place = sa.tuple_(columns.account, columns.livemode, columns.event_id)
    statement = (
        sa.select(
            columns.account,
            columns.livemode,
            columns.event_id,
            columns.reason,
            columns.occurred_at,
            columns.payload,
            columns.assertion,
        )
        .where(columns.status == PARKED, columns.reason.startswith(reason_prefix, autoescape=True))
        .order_by(columns.account, columns.livemode, columns.event_id)
        .limit(limit)
    )
    if after is not None:
        statement = statement.where(place > sa.tuple_(*(sa.literal(part) for part in after)))
    return [ParkedEvent(**row) for row in (await tx.execute(statement)).mappings()]


async def resettle_event(
    tx: Tx, event: Event, *, status: Status, reason: str | None, user_id: str | None, plan_code: str | None
) -> bool:
    """Writes what became of an event that was processed again; the answer that was given stays.

    Whether its body is still kept: a retention beside may have let it go since it was read.
    """
    result = await tx.execute(
        webhook_events.update()
        .where(_is_event(event))
        .values(status=status.value, reason=reason, user_id=user_id, plan_code=plan_code)
        .returning(webhook_events.c.payload.is_not(None))
    )
    return bool(result.scalar_one())


async def count_parked(tx: Tx) -> int:
    """How many events wait for a missing piece."""
    result = await tx.execute(sa.select(sa.func.count()).where(webhook_events.c.status == PARKED))
    return result.scalar_one()


async def newest_received_at(tx: Tx) -> datetime | None:
    """When the newest event came."""
    result = await tx.execute(
        sa.select(webhook_events.c.received_at).order_by(webhook_events.c.received_at.desc()).limit(1)
    )
    return result.scalar_one_or_none()


def _event_values(event: Event, received_at: datetime, payload: bytes, payload_sha256: str) -> dict[str, Any]:
    return {
        "account": event.account,
        "livemode": event.livemode,
        "event_id": event.id,
        "event_type": event.type,
        "api_version": event.api_version,
        "occurred_at": event.occurred_at,
        "received_at": received_at,
        "payload": payload,
        "payload_sha256": payload_sha256,
    }


def _is_event(event: Event) -> sa.ColumnElement[bool]:
    columns = webhook_events.c
    return sa.and_(
        columns.account == event.account,
        columns.livemode == event.livemode,
        columns.event_id == event.id,
    )


def named_in(
    table: sa.Table, column: str, names: Collection[tuple[str, bool, str]]
) -> sa.ColumnElement[bool]:
    """Rows whose (account, livemode, column) is one of the names, as one indexable condition per scope."""
    scopes: dict[tuple[str, bool], list[str]] = {}
    for account, livemode, name in sorted(names):
        scopes.setdefault((account, livemode), []).append(name)
    return sa.or_(
        sa.false(),
        *(
            sa.and_(table.c.account == account, table.c.livemode == livemode, table.c[column].in_(values))
            for (account, livemode), values in scopes.items()
        ),
    )
