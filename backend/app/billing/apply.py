"""Decides on events and writes every consequence, any number of them in one transaction.

    decisions = await applier.apply(tx, [Assertion(event=..., asserts=...)], effects)

What is read, locked and written for many events takes as many statements as for one: rows gather in
memory and go to each table together. Only where something had waited for one of the events is written
earlier, because it is found by what is stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from backend.app.audit import log as audit_log
from backend.app.audit.models import AuditLog
from backend.app.billing import store, store_state
from backend.app.billing.domain.access import named_users
from backend.app.billing.domain.catalog import Catalog
from backend.app.billing.domain.components import components, customer_name
from backend.app.billing.domain.decide import (
    NO_USER,
    Decision,
    EntitlementChange,
    Notice,
    Payment,
    Status,
    decide,
)
from backend.app.billing.domain.facts import (
    ACTION_ID_PREFIX,
    CustomerId,
    Event,
    EventKey,
    MoneyKey,
    PaymentFact,
    SubjectId,
    Translation,
)
from backend.app.billing.domain.state import below
from backend.app.billing.models import PaymentEvent
from backend.app.billing.pseudonymise import deleted_customers, pseudonymise_message
from backend.app.billing.reread import reread_message
from backend.app.billing.store_claims import Claimed, claim, claim_money
from backend.app.billing.store_state_sql import FACTS_PER_SUBJECT_MAX
from backend.app.core.bulk import insert_all
from backend.app.core.clock import Clock
from backend.app.core.database import Tx
from backend.app.core.ids import new_id
from backend.app.ops.alerts import owner_alert
from backend.app.ops.outbox import NewMessage, insert_messages


@dataclass(slots=True)
class Effects:
    """What a transaction did, to be counted once it has committed; `actor` is who did it, by default the event itself."""

    actor: str | None = None
    audit_actions: list[str] = field(default_factory=list)
    changes: list[tuple[str, str]] = field(default_factory=list)
    messages: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Assertion:
    """An event or action and what it asserts, or the decision on it where there is nothing to decide.

    `row` makes the event's row of `webhook_events` from its decision; None where none is to be written.
    """

    event: Event
    asserts: Translation | Decision
    row: Callable[[Decision], store.StoredEvent] | None = None


class Applier:
    """Applies events under one catalog; `rereads` says whether Stripe can be asked."""

    def __init__(self, catalog: Catalog, clock: Clock, *, rereads: bool) -> None:
        self._catalog = catalog
        self._clock = clock
        self._rereads = rereads

    async def preview(self, tx: Tx, event: Event, translation: Translation) -> Decision:
        """What `apply` would decide now; nothing is written, and what it concerns stays locked."""
        state, _ = await store_state.load_locked(tx, named_parties(event, translation))
        return decide(self._catalog, state, event, translation, now=self._clock.now())[1]

    async def apply_new(
        self, tx: Tx, assertions: Sequence[Assertion], effects: Effects
    ) -> list[Decision | None]:
        """Claims events and applies those that nobody claimed before; None for each of the others.

        Of an event that is given twice the first is the first.
        """
        now = self._clock.now()
        named = _named(assertions)
        claimed = await claim(
            tx,
            {each.event.key for each in assertions},
            _money(assertions),
            store_state.Parties.together(parties for parties in named if parties is not None),
            now=now,
        )
        new = set(claimed.events)
        places: list[int] = []
        for place, each in enumerate(assertions):
            if each.event.key in new:
                new.discard(each.event.key)
                places.append(place)
        mine = [assertions[place] for place in places]
        decided = await self._apply(tx, mine, [named[place] for place in places], effects, now, claimed)
        decisions: list[Decision | None] = [None] * len(assertions)
        for place, decision in zip(places, decided, strict=True):
            decisions[place] = decision
        return decisions

    async def apply(self, tx: Tx, assertions: Sequence[Assertion], effects: Effects) -> list[Decision]:
        """Decides on events, claimed before, in their order and writes every consequence into the open transaction."""
        return await self._apply(tx, assertions, _named(assertions), effects, self._clock.now(), None)

    async def _apply(
        self,
        tx: Tx,
        assertions: Sequence[Assertion],
        named: Sequence[store_state.Parties | None],
        effects: Effects,
        now: datetime,
        claimed: Claimed | None,
    ) -> list[Decision]:
        known = [parties for parties in named if parties is not None]
        # What can't be decided on is looked at no further, but a deleted customer's data is in it all the same.
        deleted = await deleted_customers(
            tx,
            {
                each.asserts.customer
                for each in assertions
                if isinstance(each.asserts, Decision) and each.asserts.customer is not None
            },
        )
        money = claimed.money if claimed else await claim_money(tx, _money(assertions), now=now)
        writes = _Writes(tx, effects, now, money)
        decisions: list[Decision] = []
        if known:
            state, waiting = await store_state.load_locked(
                tx, store_state.Parties.together(known), claimed.parties if claimed else None
            )
            numbers, states = components(state, [party_names(one) for one in known])
            places = iter(numbers)
        for each in assertions:
            if isinstance(each.asserts, Decision):
                decision = each.asserts
            else:
                number = next(places)
                states[number], decision = decide(
                    self._catalog, states[number], each.event, each.asserts, now=now
                )
                states[number] = states[number].within(
                    FACTS_PER_SUBJECT_MAX,
                    [subject for subject, _ in (*decision.facts, *decision.inherited)],
                )
                writes.add(each.event, decision)
                # What waits does so under the name of all that it bears on too: there its user may be found.
                linked = states[number].above({child for child, _ in decision.links} & waiting)
                waiting |= linked
                writes.waiting |= linked
                if _concerns(decision, waiting):
                    waiting -= await writes.attribute(each.event, decision)
                names = states[number].above(_waits(each.event, decision))
                waiting |= names
                writes.waiting |= names
            if self._rereads and not each.event.id.startswith("read_"):
                writes.messages += [
                    reread_message(wanted, cause_event_id=each.event.id) for wanted in decision.rereads
                ]
            writes.messages += [_alert(notice) for notice in decision.notices]
            departed = decision.departed or (decision.customer if decision.customer in deleted else None)
            if departed is not None:
                writes.messages.append(pseudonymise_message(departed, cause=each.event))
            if each.row is not None:
                writes.events.append(each.row(decision))
            decisions.append(decision)
        await writes.finish()
        return decisions


class _Writes:
    """Rows that gather until they are written together, each kind with one statement."""

    def __init__(self, tx: Tx, effects: Effects, now: datetime, money: set[MoneyKey]) -> None:
        self._tx = tx
        # What is claimed and has no line yet.
        self._money = money
        self._effects = effects
        self._now = now
        self._decided: list[tuple[Event, Decision]] = []
        self._audit: list[AuditLog] = []
        self.events: list[store.StoredEvent] = []
        self.messages: list[NewMessage] = []
        self.waiting: set[SubjectId] = set()

    def add(self, event: Event, decision: Decision) -> None:
        """Keeps a decision, to be written with those that follow."""
        self._decided.append((event, decision))

    async def finish(self) -> None:
        """Writes everything that has gathered, and the messages."""
        # Those that others stage as well are waited for without a lock: all at once in one order, or two
        # batches could wait for each other.
        await self._flush(self.messages)
        if self._money:
            # It would be lost: nobody else could write a line for it any more.
            raise RuntimeError("money was claimed, and no decision tells of it")
        self._effects.messages = self._effects.messages or bool(self.messages)

    async def _flush(self, messages: Sequence[NewMessage] = ()) -> None:
        """Writes everything else that has gathered, together with these messages."""
        now, decided = self._now, self._decided
        sources = dict(source for _, decision in decided for source in decision.sources)
        changes = [(change, event) for event, decision in decided for change in decision.changes]
        for change, event in changes:
            self._add_audit(_entitlement_audit(change, event, self._actor(event), now))
            self._effects.changes.append((change.after.plan_code, change.kind.value))
        lines: list[PaymentEvent] = []
        for event, decision in decided:
            for payment in decision.payments:
                key = _money_key(event, payment.fact)
                if key in self._money:
                    self._money.discard(key)
                    line = _ledger_line(payment, event, now)
                    lines.append(line)
                    self._add_audit(_payment_audit("payment.event", line, self._actor(event), now))
        await insert_all(
            self._tx,
            [
                store.insert_ties([tie for _, decision in decided for tie in decision.ties]),
                store.insert_links([link for _, decision in decided for link in decision.links]),
                store.insert_facts(
                    [fact for _, decision in decided for fact in decision.facts],
                    [fact for _, decision in decided for fact in decision.inherited],
                ),
                store.insert_sources(list(sources.items()), now=now),
                *store.insert_entitlements(changes, now=now),
                store.insert_payments(lines),
                store.insert_waiting(self.waiting),
                store.insert_events(self.events),
                audit_log.insert_rows(self._audit),
                insert_messages(messages, now=now),
            ],
        )
        self._decided, self.events, self._audit, self.waiting = [], [], [], set()

    async def attribute(self, event: Event, decision: Decision) -> set[SubjectId]:
        """Gives what had waited for a user to that user: ledger lines, with their audit rows, and parked events.

        The names under which nothing waits any more.
        """
        await self._flush()
        actor = self._actor(event)
        names = _helped(decision)
        children = await store_state.load_below(self._tx, names, only_waiting=True)
        for attribution in decision.attributions:
            subjects = below(children, [attribution.source] if attribution.source else [])
            for line in await store.attribute_payments(self._tx, attribution, subjects):
                self._add_audit(_payment_audit("payment.attributed", line, actor, self._now))
        settled: list[tuple[str, str | None]] = []
        for waiting in decision.waiting:
            subjects = below(children, [waiting.source])
            await store.name_plans(self._tx, waiting, subjects)
            parts = [subject for subject in subjects if subject != waiting.source]
            for about, reason in (([waiting.source], waiting.reason), (parts, waiting.parts_reason)):
                ended = await store.settle_waiting(self._tx, waiting, about, reason) if about else []
                settled += [(event_id, waiting.user_id) for event_id in ended]
        for attribution in decision.attributions:
            settled += [
                (event_id, attribution.user_id)
                for event_id in await store.settle_waiting_customer(self._tx, attribution, NO_USER)
            ]
        for event_id, user_id in settled:
            self._add_audit(
                AuditLog(
                    id=new_id(),
                    user_id=user_id,
                    action="event.unparked",
                    resource_type="event",
                    resource_id=event_id,
                    details={f"by_{_cause_key(event)}": event.id},
                    actor=actor,
                    created_at=self._now,
                )
            )
        everything = below(children, names)
        waits_still = await store.load_still_waiting(self._tx, everything)
        over = {name for name in everything if waits_still.isdisjoint(below(children, [name]))}
        await store.forget_waiting(self._tx, over)
        return over

    def _actor(self, event: Event) -> str:
        return self._effects.actor or f"stripe:{event.id}"

    def _add_audit(self, row: AuditLog) -> None:
        self._audit.append(row)
        self._effects.audit_actions.append(row.action)


def named_parties(event: Event, translation: Translation) -> store_state.Parties:
    """The subjects, customers and users that an event names itself."""
    keys = {about.key for about in translation.facts}
    keys |= {key for link in translation.links for key in (link.child, link.parent)}
    if translation.subject is not None:
        keys.add(translation.subject)
    customers = {tie.customer_id for tie in translation.ties}
    if translation.customer_id is not None:
        customers.add(translation.customer_id)
    customers |= {key.removeprefix("cus:") for key in keys if key.startswith("cus:")}
    return store_state.Parties(
        subjects=frozenset(SubjectId(event.account, event.livemode, key) for key in keys),
        customers=frozenset(CustomerId(event.account, event.livemode, customer) for customer in customers),
        users=frozenset(
            named_users(about.fact for about in translation.facts) | {tie.user_id for tie in translation.ties}
        ),
    )


def _named(assertions: Iterable[Assertion]) -> list[store_state.Parties | None]:
    """Whom each assertion names; None where there is nothing to decide."""
    return [
        named_parties(each.event, each.asserts) if isinstance(each.asserts, Translation) else None
        for each in assertions
    ]


def _money(assertions: Iterable[Assertion]) -> dict[MoneyKey, list[EventKey]]:
    """The money that assertions tell of, each with the events that do."""
    found: dict[MoneyKey, list[EventKey]] = {}
    for each in assertions:
        if isinstance(each.asserts, Translation):
            for fact in each.asserts.payments:
                found.setdefault(_money_key(each.event, fact), []).append(each.event.key)
    return found


def _money_key(event: Event, fact: PaymentFact) -> MoneyKey:
    return event.account, event.livemode, fact.effect_key


def party_names(parties: store_state.Parties) -> list[Hashable]:
    """The names by which events are seen to concern each other."""
    return [*parties.subjects, *map(customer_name, parties.customers), *parties.users]


def _concerns(decision: Decision, waiting: set[SubjectId]) -> bool:
    """Whether something that waits may wait for this decision."""
    return bool(waiting) and not waiting.isdisjoint(_helped(decision))


def _helped(decision: Decision) -> set[SubjectId]:
    """The names whose waiting a decision may end."""
    names = {waiting.source for waiting in decision.waiting}
    names |= {each.source for each in decision.attributions if each.source is not None}
    return names | {customer_name(each.customer) for each in decision.attributions if each.customer}


def _waits(event: Event, decision: Decision) -> set[SubjectId]:
    """The names under which something of a decision will be looked for later."""
    names: set[SubjectId] = set()
    if decision.status is Status.PARKED:
        names |= {decision.subject} if decision.subject else set()
        names |= {customer_name(decision.customer)} if decision.customer else set()
    for payment in decision.payments:
        if payment.subject is not None and (payment.user_id is None or payment.plan_code is None):
            names.add(payment.subject)
        customer_id = payment.fact.customer_id
        if customer_id is not None and payment.user_id is None:
            names.add(customer_name(CustomerId(event.account, event.livemode, customer_id)))
    return names


def _alert(notice: Notice) -> NewMessage:
    return owner_alert(
        notice.text,
        key=notice.key,
        # Hashed, because a key may be longer than the column.
        dedupe_key=hashlib.sha256(notice.key.encode()).hexdigest(),
    )


def _ledger_line(payment: Payment, event: Event, now: datetime) -> PaymentEvent:
    fact = payment.fact
    return PaymentEvent(
        id=new_id(),
        stripe_event_id=event.id,
        user_id=payment.user_id,
        event_type=fact.event_type,
        plan_code=payment.plan_code,
        customer_id=fact.customer_id,
        invoice_id=fact.invoice_id,
        subscription_id=fact.subscription_id,
        amount=fact.amount,
        currency=fact.currency,
        settled=fact.settled,
        metadata=fact.metadata,
        account=event.account,
        livemode=event.livemode,
        effect_key=fact.effect_key,
        subject_key=payment.subject.key if payment.subject else None,
        occurred_at=event.occurred_at,
        created_at=now,
    )


def _entitlement_audit(change: EntitlementChange, event: Event, actor: str, now: datetime) -> AuditLog:
    after, before = change.after, change.before
    return AuditLog(
        id=new_id(),
        user_id=after.user_id,
        action=f"entitlement.{change.kind.value}",
        resource_type="entitlement",
        resource_id=after.user_id,
        details={
            "plan_code": after.plan_code,
            "plan_code_before": before.plan_code if before else None,
            "status": after.status,
            "entitlements": dict(after.features),
            "valid_until": after.valid_until.isoformat() if after.valid_until else None,
            "version": after.version,
            _cause_key(event): event.id,
        },
        actor=actor,
        created_at=now,
    )


def _payment_audit(action: str, line: PaymentEvent, actor: str, now: datetime) -> AuditLog:
    details: Mapping[str, Any] = {
        "event_type": line.event_type,
        "plan_code": line.plan_code,
        "amount": line.amount,
        "currency": line.currency,
        "settled": line.settled,
        "effect_key": line.effect_key,
        "stripe_event_id": line.stripe_event_id,
    }
    return AuditLog(
        id=new_id(),
        user_id=line.user_id,
        action=action,
        resource_type="payment",
        resource_id=line.id,
        details=details,
        actor=actor,
        created_at=now,
    )


def _cause_key(event: Event) -> str:
    """What an audit row's details call the cause's id: a person's action is no event of Stripe's."""
    return "action_id" if event.id.startswith(ACTION_ID_PREFIX) else "stripe_event_id"
