"""All SQL of billing, as functions of an open transaction; what they read and write are the domain's values.

Functions take many rows at once: the number of statements does not grow with the number of events.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from pydantic import TypeAdapter

from backend.app.billing.domain.access import Source
from backend.app.billing.domain.decide import (
    Attribution,
    Entitlement,
    EntitlementChange,
    State,
    Status,
    Waiting,
)
from backend.app.billing.domain.facts import CustomerId, Event, SourceFact, SourceId, Tie, Via
from backend.app.billing.models import (
    PaymentEvent,
    UserEntitlement,
    customer_ties,
    entitlement_history,
    payment_events,
    source_facts,
    sources,
    user_entitlements,
    webhook_claims,
    webhook_events,
)
from backend.app.core.database import Tx, insert
from backend.app.core.ids import new_id

# A decision looks at the newest facts of each kind of a source only, so that its cost does not grow with history. A
# subscription that was past due through more snapshots than this would seem past due a little shorter.
FACTS_PER_SOURCE_MAX = 64

FAILED = "failed"

_FACT: TypeAdapter[SourceFact] = TypeAdapter(SourceFact)


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
    source_key: str | None
    answer: str


async def claim(tx: Tx, event: Event, *, now: datetime) -> bool:
    """Whether this transaction is the first to process the event.

    Waits while another transaction holds the claim: if that one commits the answer is False, if it
    rolls back it is True.
    """
    result = await tx.execute(
        insert(webhook_claims, tx)
        .values(account=event.account, livemode=event.livemode, event_id=event.id, claimed_at=now)
        .on_conflict_do_nothing()
        .returning(webhook_claims.c.event_id)
    )
    return result.first() is not None


async def stored_answer(tx: Tx, event: Event) -> str:
    """The body that the first delivery of a claimed event was answered with."""
    result = await tx.execute(sa.select(webhook_events.c.answer).where(_is_event(event)))
    answer: str = result.scalar_one()
    return answer


async def lock(tx: Tx, names: Iterable[str]) -> None:
    """Holds the named subjects until the transaction ends, so that decisions about one do not interleave.

    Always taken in the order of their numbers: two transactions can't wait for each other. On SQLite
    the one writer is lock enough.
    """
    if tx.dialect.name != "postgresql":
        return
    numbers = sorted({_lock_number(name) for name in names})
    if numbers:
        await tx.execute(
            sa.text(
                "SELECT count(pg_advisory_xact_lock(number)) FROM unnest(CAST(:numbers AS bigint[])) number"
            ),
            {"numbers": numbers},
        )


def _lock_number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)


async def load_parties(
    tx: Tx, source_ids: Collection[SourceId], customer_ids: Collection[CustomerId]
) -> tuple[dict[CustomerId, frozenset[Tie]], set[SourceId], set[str]]:
    """Who is concerned by these sources and customers: ties, all sources of the customers, and their users."""
    ties: dict[CustomerId, frozenset[Tie]] = {}
    users: set[str] = set()
    found: set[SourceId] = set()
    if customer_ids:
        for row in await tx.execute(
            sa.select(customer_ties).where(_in(customer_ties, "customer_id", customer_ids))
        ):
            customer = CustomerId(row.account, row.livemode, row.customer_id)
            tie = Tie(
                customer_id=row.customer_id,
                user_id=row.user_id,
                via=Via(row.via),
                occurred_at=row.occurred_at,
                event_id=row.event_id,
            )
            ties[customer] = ties.get(customer, frozenset()) | {tie}
            users.add(row.user_id)
    conditions = []
    if source_ids:
        conditions.append(_in(sources, "source_key", source_ids))
    if customer_ids:
        conditions.append(_in(sources, "customer_id", customer_ids))
    if conditions:
        for row in await tx.execute(sa.select(sources).where(sa.or_(*conditions))):
            found.add(SourceId(row.account, row.livemode, row.source_key))
            if row.user_id is not None:
                users.add(row.user_id)
    return ties, found, users


async def load_state(
    tx: Tx,
    ties: Mapping[CustomerId, frozenset[Tie]],
    source_ids: Collection[SourceId],
    user_ids: Collection[str],
) -> State:
    """The state that decisions about these sources and users need: all of the users' sources with their facts."""
    conditions = []
    if source_ids:
        conditions.append(_in(sources, "source_key", source_ids))
    if user_ids:
        conditions.append(sources.c.user_id.in_(sorted(user_ids)))
    if not conditions:
        return State(sources={}, ties=ties, entitlements={})
    loaded = await load_sources(tx, sa.or_(*conditions))
    entitlements = {}
    if user_ids:
        for row in await tx.execute(
            sa.select(user_entitlements).where(user_entitlements.c.user_id.in_(sorted(user_ids)))
        ):
            entitlements[row.user_id] = Entitlement(
                user_id=row.user_id,
                plan_code=row.plan_code,
                status=row.status,
                features=row.entitlements,
                valid_until=row.valid_until,
                activated_at=row.activated_at,
                version=row.version,
            )
    return State(sources=loaded, ties=ties, entitlements=entitlements)


async def load_sources(tx: Tx, condition: sa.ColumnElement[bool]) -> dict[SourceId, Source]:
    """The sources that meet a condition on the table `sources`, each with its newest facts."""
    newest = (
        sa.select(
            sources.c.account,
            sources.c.livemode,
            sources.c.source_key,
            sources.c.customer_id,
            sources.c.user_id,
            source_facts.c.body,
            sa.func.row_number()
            .over(
                # Each kind by itself: a subscription's many snapshots must not push its one checkout out,
                # which may name the user and the plan.
                partition_by=(
                    sources.c.account,
                    sources.c.livemode,
                    sources.c.source_key,
                    source_facts.c.body["kind"].as_string(),
                ),
                order_by=(source_facts.c.as_of.desc(), source_facts.c.event_id.desc()),
            )
            .label("place"),
        )
        .join_from(
            sources,
            source_facts,
            sa.and_(
                source_facts.c.account == sources.c.account,
                source_facts.c.livemode == sources.c.livemode,
                source_facts.c.source_key == sources.c.source_key,
            ),
        )
        .where(condition)
        .subquery()
    )
    rows: dict[SourceId, list[sa.Row[Any]]] = {}
    for row in await tx.execute(sa.select(newest).where(newest.c.place <= FACTS_PER_SOURCE_MAX)):
        rows.setdefault(SourceId(row.account, row.livemode, row.source_key), []).append(row)
    return {
        source_id: Source(
            id=source_id,
            customer_id=group[0].customer_id,
            user_id=group[0].user_id,
            facts=tuple(_FACT.validate_python(row.body) for row in group),
        )
        for source_id, group in rows.items()
    }


async def load_sources_of_user(tx: Tx, user_id: str) -> list[Source]:
    """A user's sources with their newest facts."""
    return list((await load_sources(tx, sources.c.user_id == user_id)).values())


async def load_entitlement(tx: Tx, user_id: str) -> UserEntitlement | None:
    """The row of a user, as it was last written."""
    result = await tx.execute(sa.select(user_entitlements).where(user_entitlements.c.user_id == user_id))
    row = result.mappings().first()
    return UserEntitlement(**row) if row else None


async def save_facts(
    tx: Tx, touched: Sequence[Source], facts: Sequence[tuple[SourceId, SourceFact]], *, now: datetime
) -> None:
    """Writes sources with their owners, and adds facts; a fact that is there already stays as it is."""
    if touched:
        statement = insert(sources, tx)
        await tx.execute(
            statement.on_conflict_do_update(
                index_elements=["account", "livemode", "source_key"],
                set_={
                    "customer_id": statement.excluded.customer_id,
                    "user_id": statement.excluded.user_id,
                    "updated_at": statement.excluded.updated_at,
                },
            ),
            [
                {
                    "account": source.id.account,
                    "livemode": source.id.livemode,
                    "source_key": source.id.key,
                    "customer_id": source.customer_id,
                    "user_id": source.user_id,
                    "created_at": now,
                    "updated_at": now,
                }
                for source in touched
            ],
        )
    if facts:
        await tx.execute(
            insert(source_facts, tx).on_conflict_do_nothing(),
            [
                {
                    "account": source_id.account,
                    "livemode": source_id.livemode,
                    "source_key": source_id.key,
                    "as_of": fact.as_of,
                    "event_id": fact.event_id,
                    "body": _FACT.dump_python(fact, mode="json"),
                }
                for source_id, fact in facts
            ],
        )


async def save_ties(tx: Tx, ties: Sequence[tuple[CustomerId, Tie]]) -> None:
    """Adds claims that a customer is a user; of equal claims the earliest is kept, whatever came first."""
    if not ties:
        return
    statement = insert(customer_ties, tx)
    earlier = sa.or_(
        statement.excluded.occurred_at < customer_ties.c.occurred_at,
        sa.and_(
            statement.excluded.occurred_at == customer_ties.c.occurred_at,
            statement.excluded.event_id < customer_ties.c.event_id,
        ),
    )
    await tx.execute(
        statement.on_conflict_do_update(
            index_elements=["account", "livemode", "customer_id", "user_id", "via"],
            set_={
                "occurred_at": statement.excluded.occurred_at,
                "event_id": statement.excluded.event_id,
            },
            where=earlier,
        ),
        [
            {
                "account": customer.account,
                "livemode": customer.livemode,
                "customer_id": customer.id,
                "user_id": tie.user_id,
                "via": int(tie.via),
                "occurred_at": tie.occurred_at,
                "event_id": tie.event_id,
            }
            for customer, tie in ties
        ],
    )


async def save_entitlement(tx: Tx, change: EntitlementChange, event: Event, *, now: datetime) -> None:
    """Writes a user's entitlements and the history row that says which event caused them."""
    after = change.after
    statement = insert(user_entitlements, tx).values(
        id=new_id(),
        user_id=after.user_id,
        plan_code=after.plan_code,
        entitlements=dict(after.features),
        status=after.status,
        activated_at=after.activated_at,
        valid_until=after.valid_until,
        version=after.version,
        created_at=now,
        updated_at=now,
    )
    kept = {"id", "user_id", "created_at"}
    await tx.execute(
        statement.on_conflict_do_update(
            index_elements=["user_id"],
            set_={
                column.name: statement.excluded[column.name]
                for column in user_entitlements.c
                if column.name not in kept
            },
        )
    )
    await tx.execute(
        entitlement_history.insert().values(
            user_id=after.user_id,
            version=after.version,
            change=change.kind.value,
            plan_code=after.plan_code,
            entitlements=dict(after.features),
            status=after.status,
            valid_until=after.valid_until,
            cause_account=event.account,
            cause_event_id=event.id,
            cause_event_type=event.type,
            occurred_at=event.occurred_at,
            created_at=now,
        )
    )


async def add_payment(tx: Tx, payment: PaymentEvent) -> bool:
    """Adds a ledger line; False when the same money has its line already."""
    result = await tx.execute(
        insert(payment_events, tx)
        .values(
            id=payment.id,
            stripe_event_id=payment.stripe_event_id,
            user_id=payment.user_id,
            event_type=payment.event_type,
            plan_code=payment.plan_code,
            customer_id=payment.customer_id,
            invoice_id=payment.invoice_id,
            subscription_id=payment.subscription_id,
            amount=payment.amount,
            currency=payment.currency,
            settled=payment.settled,
            metadata=dict(payment.metadata),
            account=payment.account,
            livemode=payment.livemode,
            effect_key=payment.effect_key,
            occurred_at=payment.occurred_at,
            created_at=payment.created_at,
        )
        .on_conflict_do_nothing(index_elements=["account", "livemode", "effect_key"])
        .returning(payment_events.c.id)
    )
    return result.first() is not None


async def attribute_payments(tx: Tx, attribution: Attribution) -> list[PaymentEvent]:
    """Gives the ledger lines that waited for a source's or customer's user to that user; the lines it gave."""
    columns = payment_events.c
    if attribution.source is not None:
        scope: SourceId | CustomerId = attribution.source
        kind, _, name = attribution.source.key.partition(":")
        of_subject = (
            columns.subscription_id == name
            if kind == "sub"
            else columns.effect_key.in_(
                [attribution.source.key, f"{attribution.source.key}:checkout_completed"]
            )
        )
    elif attribution.customer is not None:
        scope = attribution.customer
        of_subject = columns.customer_id == attribution.customer.id
    else:
        return []
    result = await tx.execute(
        payment_events.update()
        .where(
            columns.account == scope.account,
            columns.livemode == scope.livemode,
            of_subject,
            columns.user_id.is_(None),
        )
        .values(user_id=attribution.user_id)
        .returning(*columns)
    )
    return [PaymentEvent(**row) for row in result.mappings()]


async def settle_waiting_source(tx: Tx, waiting: Waiting) -> list[str]:
    """Tells the parked events of a source what they wait for now, or that it is over; ids of those that ended."""
    columns = webhook_events.c
    over = waiting.reason is None
    result = await tx.execute(
        webhook_events.update()
        .where(
            columns.account == waiting.source.account,
            columns.livemode == waiting.source.livemode,
            columns.source_key == waiting.source.key,
            columns.status == Status.PARKED.value,
        )
        .values(
            status=(Status.SUCCESS if over else Status.PARKED).value,
            reason=waiting.reason,
            user_id=waiting.user_id,
            plan_code=sa.func.coalesce(waiting.plan_code, columns.plan_code),
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
            columns.status == Status.PARKED.value,
            columns.reason == reason,
        )
        .values(status=Status.SUCCESS.value, reason=None, user_id=attribution.user_id)
        .returning(columns.event_id)
    )
    return sorted(result.scalars())


async def save_event(tx: Tx, stored: StoredEvent) -> None:
    """Writes what came and what became of it; earlier failed attempts of the event are counted on."""
    values = {
        **_event_values(stored.event, stored.received_at, stored.payload, stored.payload_sha256),
        "status": stored.status.value,
        "reason": stored.reason,
        "user_id": stored.user_id,
        "plan_code": stored.plan_code,
        "customer_id": stored.customer_id,
        "source_key": stored.source_key,
        "answer": stored.answer,
        "request_id": stored.request_id,
    }
    await tx.execute(
        insert(webhook_events, tx)
        .values(**values, attempts=1)
        .on_conflict_do_update(
            index_elements=["account", "livemode", "event_id"],
            set_={**values, "attempts": webhook_events.c.attempts + 1},
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
            index_elements=["account", "livemode", "event_id"],
            set_={"attempts": webhook_events.c.attempts + 1, "reason": reason, "request_id": request_id},
            where=webhook_events.c.status == FAILED,
        )
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ParkedEvent:
    """What is needed to process a parked event again; `payload` is its stored body."""

    account: str
    livemode: bool
    event_id: str
    reason: str
    occurred_at: datetime
    payload: bytes


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
        )
        .where(
            columns.status == Status.PARKED.value, columns.reason.startswith(reason_prefix, autoescape=True)
        )
        .order_by(columns.account, columns.livemode, columns.event_id)
        .limit(limit)
    )
    if after is not None:
        statement = statement.where(place > sa.tuple_(*(sa.literal(part) for part in after)))
    return [ParkedEvent(**row) for row in (await tx.execute(statement)).mappings()]


async def resettle_event(
    tx: Tx, event: Event, *, status: Status, reason: str | None, user_id: str | None, plan_code: str | None
) -> None:
    """Writes what became of an event that was processed again; the answer that was given stays."""
    await tx.execute(
        webhook_events.update()
        .where(_is_event(event))
        .values(status=status.value, reason=reason, user_id=user_id, plan_code=plan_code)
    )


async def count_parked(tx: Tx) -> int:
    """How many events wait for a missing piece."""
    result = await tx.execute(
        sa.select(sa.func.count()).where(webhook_events.c.status == Status.PARKED.value)
    )
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


def _in(
    table: sa.Table, column: str, names: Collection[SourceId] | Collection[CustomerId]
) -> sa.ColumnElement[bool]:
    """Rows whose (account, livemode, column) is one of the names, as one indexable condition per scope."""
    scopes: dict[tuple[str, bool], list[str]] = {}
    for account, livemode, name in sorted(names):
        scopes.setdefault((account, livemode), []).append(name)
    return sa.or_(
        *(
            sa.and_(table.c.account == account, table.c.livemode == livemode, table.c[column].in_(values))
            for (account, livemode), values in scopes.items()
        )
    )
