"""All SQL of billing, as functions of an open transaction; what they read and write are the domain's values.

Functions take many rows at once: the number of statements does not grow with the number of events.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Annotated, Any

import sqlalchemy as sa
from pydantic import Field, TypeAdapter

from backend.app.billing.domain.decide import Attribution, EntitlementChange, Status, Waiting
from backend.app.billing.domain.facts import CustomerId, Event, Fact, SubjectId, Tie, Via
from backend.app.billing.domain.merge import Entitlement
from backend.app.billing.domain.state import Owned, State
from backend.app.billing.models import (
    PaymentEvent,
    UserEntitlement,
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
from backend.app.core.database import Tx, insert
from backend.app.core.errors import StoreUnavailable
from backend.app.core.ids import new_id

# A decision looks at the newest facts of each kind of a subject only, so that its cost does not grow with
# history. A subscription past due through more snapshots than this would seem past due a little shorter.
FACTS_PER_SUBJECT_MAX = 64

FAILED = "failed"

# Whom an event concerns grows only while others commit at the same moment; each round waits for them.
LOCK_ROUNDS_MAX = 5

_FACT: TypeAdapter[Fact] = TypeAdapter(Annotated[Fact, Field(discriminator="kind")])


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


async def lock_parties(tx: Tx, named: Parties) -> Parties:
    """All that the named parties concern, held until the transaction ends, so that decisions do not interleave.

    Locks are taken all at once in the order of their numbers, so two transactions can't wait for each
    other. Whom an event concerns is only known by reading, so it is read again under the locks; where
    more turned up meanwhile, the locks are given back and taken anew. On SQLite the one writer is lock
    enough.

    Raises:
        StoreUnavailable: the parties kept growing; the delivery will come again.
    """
    parties = await load_parties(tx, named)
    if tx.dialect.name != "postgresql":
        return parties
    for _ in range(LOCK_ROUNDS_MAX):
        await tx.execute(sa.text("SAVEPOINT before_locks"))
        await _lock(tx, parties.names)
        seen = await load_parties(tx, named)
        if seen.names <= parties.names:
            return seen
        await tx.execute(sa.text("ROLLBACK TO SAVEPOINT before_locks"))
        parties = seen
    raise StoreUnavailable


async def _lock(tx: Tx, names: Collection[str]) -> None:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Parties:
    """Whom some subjects and customers concern: what has to be locked before a decision about them."""

    subjects: frozenset[SubjectId]
    customers: frozenset[CustomerId]
    users: frozenset[str]

    @property
    def names(self) -> set[str]:
        """The names to lock."""
        return {
            *(f"{account}/{livemode}/{key}" for account, livemode, key in self.subjects),
            *(f"{account}/{livemode}/cus:{key}" for account, livemode, key in self.customers),
            *(f"user/{user_id}" for user_id in self.users),
        }


async def load_parties(tx: Tx, named: Parties) -> Parties:
    """The named subjects with all that they bear on, the customers behind them, and the users of both."""
    subjects, customers, users = set(named.subjects), set(named.customers), set(named.users)
    if subjects:
        above = _closure(_literal_seeds(subjects), upwards=True)
        for row in await tx.execute(sa.select(above)):
            subjects.add(SubjectId(row.account, row.livemode, row.key))
    for row in await tx.execute(sa.select(sources).where(_concerning(subjects, customers, frozenset()))):
        if row.customer_id is not None:
            customers.add(CustomerId(row.account, row.livemode, row.customer_id))
        if row.user_id is not None:
            users.add(row.user_id)
    if customers:
        for row in await tx.execute(
            sa.select(customer_ties.c.user_id).where(_in(customer_ties, "customer_id", customers))
        ):
            users.add(row.user_id)
    return Parties(subjects=frozenset(subjects), customers=frozenset(customers), users=frozenset(users))


async def load_state(tx: Tx, parties: Parties) -> State:
    """The state that decisions about these parties need: all sources of their users and customers, with facts."""
    condition = _concerning(parties.subjects, parties.customers, parties.users)
    entitlements: dict[str, Entitlement] = {}
    if parties.users:
        for row in await tx.execute(
            sa.select(user_entitlements).where(user_entitlements.c.user_id.in_(sorted(parties.users)))
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
    state = await load_sources(tx, condition, more=parties.subjects)
    customers = {
        CustomerId(source_id.account, source_id.livemode, owned.customer_id)
        for source_id, owned in state.sources.items()
        if owned.customer_id is not None
    } | parties.customers
    return replace(state, ties=await load_ties(tx, customers), entitlements=entitlements)


async def load_ties(tx: Tx, customers: Collection[CustomerId]) -> dict[CustomerId, frozenset[Tie]]:
    """All claims on some customers."""
    ties: dict[CustomerId, frozenset[Tie]] = {}
    if not customers:
        return ties
    for row in await tx.execute(sa.select(customer_ties).where(_in(customer_ties, "customer_id", customers))):
        customer = CustomerId(row.account, row.livemode, row.customer_id)
        tie = Tie(
            customer_id=row.customer_id,
            user_id=row.user_id,
            via=Via(row.via),
            occurred_at=row.occurred_at,
            event_id=row.event_id,
        )
        ties[customer] = ties.get(customer, frozenset()) | {tie}
    return ties


async def load_sources(
    tx: Tx,
    condition: sa.ColumnElement[bool],
    *,
    more: Collection[SubjectId] = (),
    until: datetime | None = None,
) -> State:
    """The sources that meet a condition, with all that bears on them, each subject with its newest facts.

    `more` are further subjects to load with what bears on them; `until` leaves out what occurred later.
    """
    loaded: dict[SubjectId, Owned] = {}
    for row in await tx.execute(sa.select(sources).where(condition)):
        loaded[SubjectId(row.account, row.livemode, row.source_key)] = Owned(
            customer_id=row.customer_id, user_id=row.user_id
        )
    seeds: list[sa.Select[str, bool, str]] = [
        sa.select(sources.c.account, sources.c.livemode, sources.c.source_key.label("key")).where(condition),
        sa.select(
            sources.c.account, sources.c.livemode, (sa.literal("cus:") + sources.c.customer_id).label("key")
        ).where(condition, sources.c.customer_id.is_not(None)),
        sa.select(
            sources.c.account, sources.c.livemode, (sa.literal("acct:") + sources.c.account).label("key")
        ).where(condition, sources.c.account != ""),
    ]
    below = _closure(sa.union(*seeds, *_literal_selects(more)), upwards=False)
    parents: dict[SubjectId, frozenset[SubjectId]] = {}
    for row in await tx.execute(
        sa.select(links).join(
            below,
            sa.and_(
                links.c.account == below.c.account,
                links.c.livemode == below.c.livemode,
                links.c.child == below.c.key,
            ),
        )
    ):
        child = SubjectId(row.account, row.livemode, row.child)
        parents[child] = parents.get(child, frozenset()) | {SubjectId(row.account, row.livemode, row.parent)}
    return State(sources=loaded, parents=parents, facts=await _load_facts(tx, below, until))


async def _load_facts(tx: Tx, subjects: sa.CTE, until: datetime | None) -> dict[SubjectId, tuple[Fact, ...]]:
    newest = (
        sa.select(
            facts.c.account,
            facts.c.livemode,
            facts.c.subject_key,
            facts.c.body,
            sa.func.row_number()
            .over(
                # Each kind by itself: a subscription's many snapshots must not push its one checkout out,
                # which may name the user and the plan.
                partition_by=(facts.c.account, facts.c.livemode, facts.c.subject_key, facts.c.kind),
                order_by=(facts.c.as_of.desc(), facts.c.event_id.desc()),
            )
            .label("place"),
        )
        .join(
            subjects,
            sa.and_(
                facts.c.account == subjects.c.account,
                facts.c.livemode == subjects.c.livemode,
                facts.c.subject_key == subjects.c.key,
            ),
        )
        .where(facts.c.as_of <= until if until is not None else sa.true())
        .subquery()
    )
    found: dict[SubjectId, tuple[Fact, ...]] = {}
    for row in await tx.execute(sa.select(newest).where(newest.c.place <= FACTS_PER_SUBJECT_MAX)):
        subject = SubjectId(row.account, row.livemode, row.subject_key)
        found[subject] = (*found.get(subject, ()), _FACT.validate_python(row.body))
    return found


async def load_state_of_user(tx: Tx, user_id: str, *, until: datetime | None = None) -> State:
    """A user's sources with all that bears on them, as far as it had occurred at an instant."""
    return await load_sources(tx, sources.c.user_id == user_id, until=until)


async def load_entitlement(tx: Tx, user_id: str) -> UserEntitlement | None:
    """The row of a user, as it was last written."""
    result = await tx.execute(sa.select(user_entitlements).where(user_entitlements.c.user_id == user_id))
    row = result.mappings().first()
    return UserEntitlement(**row) if row else None


async def save_sources(tx: Tx, touched: Sequence[tuple[SubjectId, Owned]], *, now: datetime) -> None:
    """Writes sources with their customers and owners."""
    if not touched:
        return
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
    )


async def save_facts(tx: Tx, new: Sequence[tuple[SubjectId, Fact]]) -> None:
    """Adds facts; one that is there already stays as it is."""
    if not new:
        return
    await tx.execute(
        insert(facts, tx).on_conflict_do_nothing(),
        [
            {
                "account": subject.account,
                "livemode": subject.livemode,
                "subject_key": subject.key,
                "kind": fact.kind,
                "as_of": fact.as_of,
                "event_id": fact.event_id,
                "body": _FACT.dump_python(fact, mode="json"),
            }
            for subject, fact in new
        ],
    )


async def save_links(tx: Tx, new: Sequence[tuple[SubjectId, SubjectId]]) -> None:
    """Adds links from children to parents."""
    if not new:
        return
    await tx.execute(
        insert(links, tx).on_conflict_do_nothing(),
        [
            {
                "account": child.account,
                "livemode": child.livemode,
                "child": child.key,
                "parent": parent.key,
            }
            for child, parent in new
        ],
    )


async def save_ties(tx: Tx, ties: Sequence[tuple[CustomerId, Tie]]) -> None:
    """Adds claims that a customer is a user; of equal claims that is kept which is stronger, whatever came first."""
    if not ties:
        return
    statement = insert(customer_ties, tx)
    later_word = sa.and_(
        customer_ties.c.via == int(Via.ADMIN), statement.excluded.occurred_at > customer_ties.c.occurred_at
    )
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
            where=sa.or_(later_word, sa.and_(customer_ties.c.via != int(Via.ADMIN), earlier)),
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
            subject_key=payment.subject_key,
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
    if attribution.customer is not None:
        account, livemode, customer_id = attribution.customer
        about = sa.and_(
            columns.account == account, columns.livemode == livemode, columns.customer_id == customer_id
        )
    else:
        about = _in(payment_events, "subject_key", attribution.subjects)
    result = await tx.execute(
        payment_events.update()
        .where(about, columns.user_id.is_(None))
        .values(user_id=attribution.user_id)
        .returning(*columns)
    )
    return [PaymentEvent(**row) for row in result.mappings()]


async def name_plans(tx: Tx, waiting: Waiting) -> None:
    """Writes a source's plan into the lines about it that could not name one when they came."""
    if waiting.plan_code is None:
        return
    await tx.execute(
        payment_events.update()
        .where(_in(payment_events, "subject_key", waiting.subjects), payment_events.c.plan_code.is_(None))
        .values(plan_code=waiting.plan_code)
    )


async def settle_waiting(tx: Tx, waiting: Waiting) -> list[str]:
    """Tells the parked events of a source what they wait for now, or that it is over; ids of those that ended."""
    columns = webhook_events.c
    over = waiting.reason is None
    result = await tx.execute(
        webhook_events.update()
        .where(
            _in(webhook_events, "subject_key", waiting.subjects),
            columns.status == Status.PARKED.value,
            # What could not be read is no wiser now.
            columns.reason.not_like("unreadable:%"),
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
        "subject_key": stored.subject_key,
        "answer": stored.answer,
        "request_id": stored.request_id,
        # Under the parties' locks, so it sees every earlier decision about them.
        "position": sa.select(
            sa.func.coalesce(sa.func.max(webhook_events.c.position), 0) + 1
        ).scalar_subquery(),
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
    table: sa.Table, column: str, names: Collection[SubjectId] | Collection[CustomerId]
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


def _concerning(
    subjects: Collection[SubjectId], customers: Collection[CustomerId], users: Collection[str]
) -> sa.ColumnElement[bool]:
    """The sources that are one of the subjects, or belong to one of the customers or users."""
    conditions = [_in(sources, "source_key", subjects), _in(sources, "customer_id", customers)]
    if users:
        conditions.append(sources.c.user_id.in_(sorted(users)))
    return sa.or_(*conditions)


def _literal_selects(subjects: Collection[SubjectId]) -> list[sa.Select[str, bool, str]]:
    return [
        sa.select(
            sa.literal(account).label("account"),
            sa.literal(livemode).label("livemode"),
            sa.literal(key).label("key"),
        )
        for account, livemode, key in sorted(subjects)
    ]


def _literal_seeds(subjects: Collection[SubjectId]) -> sa.CompoundSelect[Any]:
    return sa.union(*_literal_selects(subjects))


def _closure(seeds: sa.CompoundSelect[Any], *, upwards: bool) -> sa.CTE:
    """The seeds and all subjects above them (what they bear on) or below them (what bears on them)."""
    start = seeds.subquery("seeds")
    reached = sa.select(start.c.account, start.c.livemode, start.c.key).cte("reached", recursive=True)
    known, next_key = (links.c.child, links.c.parent) if upwards else (links.c.parent, links.c.child)
    return reached.union(
        sa.select(links.c.account, links.c.livemode, next_key).join(
            reached,
            sa.and_(
                links.c.account == reached.c.account,
                links.c.livemode == reached.c.livemode,
                known == reached.c.key,
            ),
        )
    )
