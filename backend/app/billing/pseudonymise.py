"""Takes a deleted customer's personal data out of the stored events; what decisions rest on stays.

Staged in the transaction of the event that deletes the customer, and of every later event about that
customer; done by the outbox's relay. docs/personal-data.md says what is replaced and what is not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa
import structlog

from backend.app.audit import log as audit_log
from backend.app.audit.models import AuditLog
from backend.app.billing import store, store_state
from backend.app.billing.domain.facts import CustomerId, Event, SubjectId
from backend.app.billing.domain.state import below
from backend.app.billing.models import facts, webhook_events
from backend.app.billing.personal_data import without_personal_data
from backend.app.core.clock import Clock
from backend.app.core.database import Database, Tx
from backend.app.core.ids import new_id
from backend.app.ops.outbox import Message, NewMessage

PSEUDONYMISE = "pseudonymise"

# Longer than any delivery that was being processed beside the deletion: what it stored is then found too.
DELAY_SECONDS = 60
# A transaction holds so many rows; nearly every customer has fewer events and gets one audit row.
PAGE_EVENTS = 100

log = structlog.get_logger(__name__)


class _Row(NamedTuple):
    event_id: str
    event_type: str
    payload: bytes


def pseudonymise_message(customer: CustomerId, *, cause: Event) -> NewMessage:
    """The outbox message that an event of a deleted customer asks for; one event asks once."""
    return NewMessage(
        kind=PSEUDONYMISE,
        payload={
            "account": customer.account,
            "livemode": customer.livemode,
            "customer_id": customer.id,
            "cause_event_id": cause.id,
        },
        dedupe_key=f"{PSEUDONYMISE}:{cause.account}:{cause.livemode}:{cause.id}"[:255],
        delay_seconds=DELAY_SECONDS,
    )


async def deleted_customers(tx: Tx, customers: Collection[CustomerId]) -> set[CustomerId]:
    """Those of the customers of whom an event has told that they were deleted."""
    if not customers:
        return set()
    named = [SubjectId(account, livemode, f"cus:{key}") for account, livemode, key in customers]
    result = await tx.execute(
        sa.select(facts.c.account, facts.c.livemode, facts.c.subject_key).where(
            store.named_in(facts, "subject_key", named), facts.c.series == "ended"
        )
    )
    return {CustomerId(account, livemode, key.removeprefix("cus:")) for account, livemode, key in result}


class Pseudonymiser:
    """The outbox's handler of `pseudonymise` messages."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    async def deliver(self, message: Message) -> None:
        """Goes through all stored events of one customer, a page in each transaction; doing it again changes nothing."""
        wanted = message.payload
        customer = CustomerId(wanted["account"], wanted["livemode"], wanted["customer_id"])
        async with self._database.snapshot() as tx:
            subjects = await _subjects_of(tx, customer)
        after = ""
        while True:
            async with self._database.transaction() as tx:
                page = await _load_page(tx, customer, subjects, after=after)
                # A second's work for a page of the largest bodies, which deliveries must not wait for.
                changed = await asyncio.to_thread(_changed, page)
                await _save(tx, customer, changed)
                if changed:
                    await audit_log.append(
                        tx, [self._audited(customer, len(changed), cause_event_id=wanted["cause_event_id"])]
                    )
            if len(page) < PAGE_EVENTS:
                return
            after = page[-1].event_id

    def _audited(self, customer: CustomerId, events: int, *, cause_event_id: str) -> AuditLog:
        return AuditLog(
            id=new_id(),
            user_id=None,
            action="customer.pseudonymised",
            resource_type="customer",
            resource_id=customer.id,
            details={"account": customer.account, "livemode": customer.livemode, "events": events},
            actor=f"stripe:{cause_event_id}",
            created_at=self._clock.now(),
        )


async def _subjects_of(tx: Tx, customer: CustomerId) -> list[str]:
    """The keys of all that is the customer's, or bears on it: disputes and refunds name no customer themselves."""
    columns = webhook_events.c
    named = await tx.execute(
        sa.select(columns.subject_key)
        .distinct()
        .where(*_is_customers(customer), columns.subject_key.is_not(None))
    )
    own = {SubjectId(customer.account, customer.livemode, key) for key in named.scalars()}
    state = await store_state.load_state(
        tx,
        store_state.Parties(subjects=frozenset(own), customers=frozenset({customer}), users=frozenset()),
    )
    own |= set(state.sources)
    return [subject.key for subject in below(await store_state.load_below(tx, own), own)]


async def _load_page(
    tx: Tx, customer: CustomerId, subjects: Collection[str], *, after: str
) -> Sequence[_Row]:
    """The next events that name the customer, or name none and are about what is the customer's."""
    columns = webhook_events.c
    result = await tx.execute(
        sa.select(columns.event_id, columns.event_type, columns.payload)
        .where(
            columns.account == customer.account,
            columns.livemode == customer.livemode,
            sa.or_(
                columns.customer_id == customer.id,
                sa.and_(columns.customer_id.is_(None), columns.subject_key.in_(subjects)),
            ),
            columns.event_id > after,
            # What is kept of a body that was let go has nothing personal in it.
            columns.payload.is_not(None),
        )
        .order_by(columns.event_id)
        .limit(PAGE_EVENTS)
        .with_for_update()
    )
    return [_Row(*row) for row in result]


def _changed(page: Sequence[_Row]) -> list[_Row]:
    changed: list[_Row] = []
    for row in page:
        payload = without_personal_data(row.payload, row.event_type)
        if payload is not row.payload:
            changed.append(row._replace(payload=payload))
    return changed


async def _save(tx: Tx, customer: CustomerId, changed: Sequence[_Row]) -> None:
    if not changed:
        return
    columns = webhook_events.c
    values: list[dict[str, Any]] = [{"changed_id": row.event_id, "without": row.payload} for row in changed]
    await tx.execute(
        webhook_events.update()
        .where(
            columns.account == customer.account,
            columns.livemode == customer.livemode,
            columns.event_id == sa.bindparam("changed_id"),
        )
        .values(payload=sa.bindparam("without")),
        values,
    )
    log.info("personal_data_erased", customer_id=customer.id, events=len(changed))


def _is_customers(customer: CustomerId) -> tuple[sa.ColumnElement[bool], ...]:
    columns = webhook_events.c
    return (
        columns.account == customer.account,
        columns.livemode == customer.livemode,
        columns.customer_id == customer.id,
    )
