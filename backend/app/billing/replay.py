"""The tables as the shell would have written them, in memory: events and people's words in, rows out.

    replay = Replay(catalog)
    for happening in happenings: replay.add(happening)
    replay.tables, replay.state

It decides with the shell's own `decide`, and keeps of each decision what the shell's statements keep.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from datetime import datetime

from backend.app.billing import store_rebuild as rows
from backend.app.billing.asserted import read_stored
from backend.app.billing.domain.access import named_users
from backend.app.billing.domain.catalog import Catalog
from backend.app.billing.domain.decide import NO_USER, Attribution, Decision, Status, Waiting, decide
from backend.app.billing.domain.facts import (
    About,
    ClaimFact,
    CustomerId,
    Event,
    GrantFact,
    SubjectId,
    Tie,
    Translation,
    Via,
    series_of,
)
from backend.app.billing.domain.state import State, below
from backend.app.billing.party_index import Node, NodeKind, user_node
from backend.app.billing.store_rebuild import DerivedTable, Key, Row, StoredEvent
from backend.app.billing.store_state import FACT
from backend.app.billing.store_state_sql import FACTS_PER_SUBJECT_MAX


@dataclass(frozen=True, slots=True, kw_only=True)
class Happening:
    """One thing that was decided and what it asserts: a stored event, or a person's word.

    `is_of_party` is False for what only bears on a party from outside, and whose own rows are another's.
    """

    event: Event
    asserts: Translation | Decision
    received_at: datetime
    is_stored_event: bool
    is_of_party: bool = True


def happening_of_event(stored: StoredEvent, *, livemode: bool, is_of_party: bool = True) -> Happening:
    """A stored event as it was decided by a deployment of one mode, with its body or without."""
    asserted = read_stored(
        stored.key, stored.payload, stored.assertion, occurred_at=stored.occurred_at, livemode=livemode
    )
    return Happening(
        event=asserted.event,
        asserts=asserted.asserts,
        received_at=stored.received_at,
        is_stored_event=True,
        is_of_party=is_of_party,
    )


def happening_of_manual_fact(row: Row) -> Happening:
    """A person's grant, its removal or a claim."""
    fact = FACT.validate_python(row["body"])
    assert isinstance(fact, GrantFact | ClaimFact), "other kinds come from events"
    about = About(key=row["subject_key"], fact=fact)
    asserts = Translation(subject=row["subject_key"], facts=(about,))
    if isinstance(fact, ClaimFact) and fact.is_of_customer:
        customer_id = row["subject_key"].removeprefix("cus:")
        tie = Tie(
            customer_id=customer_id,
            user_id=fact.user_id,
            via=Via.ADMIN,
            occurred_at=fact.as_of,
            event_id=fact.event_id,
        )
        asserts = Translation(customer_id=customer_id, facts=(about,), ties=(tie,))
    return Happening(
        event=_word(row, fact.event_id, fact.event_type, fact.as_of),
        asserts=asserts,
        received_at=fact.as_of,
        is_stored_event=False,
    )


def happening_of_own_tie(row: Row) -> Happening:
    """Our own side's word that a customer is a user."""
    tie = Tie(
        customer_id=row["customer_id"],
        user_id=row["user_id"],
        via=Via(row["via"]),
        occurred_at=row["occurred_at"],
        event_id=row["event_id"],
    )
    return Happening(
        event=_word(row, tie.event_id, "tie", tie.occurred_at),
        asserts=Translation(ties=(tie,), customer_id=tie.customer_id),
        received_at=tie.occurred_at,
        is_stored_event=False,
    )


def nodes_named_by(happening: Happening) -> set[Node]:
    """All that hangs together by a happening: what it names, and the ledger lines that it makes."""
    asserts = happening.asserts
    if isinstance(asserts, Decision):
        return set()
    scope = (happening.event.account, happening.event.livemode)
    keys = {about.key for about in asserts.facts}
    keys |= {key for link in asserts.links for key in (link.child, link.parent)}
    keys |= {asserts.subject} if asserts.subject is not None else set()
    named = {
        asserts.customer_id,
        *(tie.customer_id for tie in asserts.ties),
        *(getattr(about.fact, "customer_id", None) for about in asserts.facts),
        *(key.removeprefix("cus:") for key in keys if key.startswith("cus:")),
    }
    customers = {customer for customer in named if customer is not None}
    # The customer's own subject too: what is said of it bears on all that rests on it.
    keys |= {f"cus:{customer}" for customer in customers}
    users = named_users(about.fact for about in asserts.facts) | {tie.user_id for tie in asserts.ties}
    nodes = {Node(NodeKind.SUBJECT, *scope, key) for key in keys}
    nodes |= {Node(NodeKind.CUSTOMER, *scope, customer) for customer in customers}
    nodes |= {Node(NodeKind.MONEY, *scope, fact.effect_key) for fact in asserts.payments}
    nodes |= {user_node(user) for user in users}
    return nodes


class Replay:
    """What follows from happenings, given in the order in which they were decided."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self.state = State()
        self.tables: dict[str, dict[Key, Row]] = {derived.table.name: {} for derived in rows.REPLAYED}
        # The rows of `tables` that later decisions look for, so that a long history costs no more per event.
        self._lines_about: defaultdict[SubjectId, list[Row]] = defaultdict(list)
        self._lines_of: defaultdict[CustomerId, list[Row]] = defaultdict(list)
        self._parked_about: defaultdict[SubjectId, list[Row]] = defaultdict(list)
        self._parked_of: defaultdict[CustomerId, list[Row]] = defaultdict(list)
        self._children: defaultdict[SubjectId, set[SubjectId]] = defaultdict(set)

    def add(self, happening: Happening) -> None:
        """Decides on one event as the shell does and keeps every consequence."""
        if isinstance(happening.asserts, Decision):
            self._save_event(happening.event, happening.asserts)
            return
        self.state, decision = decide(
            self._catalog, self.state, happening.event, happening.asserts, now=happening.received_at
        )
        self.state = self.state.within(
            FACTS_PER_SUBJECT_MAX, [subject for subject, _ in (*decision.facts, *decision.inherited)]
        )
        if not happening.is_of_party:
            return
        self._save_rows(decision)
        self._save_payments(happening.event, decision)
        self._attribute(decision)
        if happening.is_stored_event:
            self._save_event(happening.event, decision)

    def note_waiting(self) -> None:
        """Keeps, after the last happening, under which names something waits still."""
        names = self._table(rows.WAITING)
        for (account, livemode, _), row in self._table(rows.EVENTS).items():
            # What can't be read waits for a newer Tollkeeper, and nobody else can help it.
            if row["status"] == Status.PARKED.value and not row["reason"].startswith("unreadable:"):
                names |= self._names(account, livemode, row["subject_key"], row["customer_id"])
        for (account, livemode, _), line in self._table(rows.PAYMENTS).items():
            if line["user_id"] is None:
                names |= self._names(account, livemode, line["subject_key"], line["customer_id"])
            elif line["plan_code"] is None:
                names |= self._names(account, livemode, line["subject_key"], None)

    def _save_rows(self, decision: Decision) -> None:
        for customer, tie in decision.ties:
            if tie.via in rows.OWN_TIES:
                continue
            ties = self._table(rows.TIES)
            key = (*customer, tie.user_id, int(tie.via))
            known = ties.get(key)
            if known is None or tie.strength < replace(tie, **known).strength:
                ties[key] = {"occurred_at": tie.occurred_at, "event_id": tie.event_id}
        for child, parent in decision.links:
            self._table(rows.LINKS)[*child, parent.key] = {}
            self._children[parent].add(child)
        for told, is_inherited in ((decision.facts, False), (decision.inherited, True)):
            for subject, fact in told:
                if is_inherited or fact.kind not in rows.MANUAL_KINDS:
                    self._table(rows.FACTS).setdefault(
                        (*subject, series_of(fact), fact.as_of, fact.event_id),
                        {"inherited": is_inherited, "body": FACT.dump_python(fact, mode="json")},
                    )
        for source, owned in decision.sources:
            if source.kind != "grant":
                self._table(rows.SOURCES)[tuple(source)] = {
                    "customer_id": owned.customer_id,
                    "user_id": owned.user_id,
                }

    def _save_payments(self, event: Event, decision: Decision) -> None:
        lines = self._table(rows.PAYMENTS)
        for payment in decision.payments:
            fact = payment.fact
            key = (event.account, event.livemode, fact.effect_key)
            if key in lines:
                continue
            self._table(rows.PAYMENT_CLAIMS)[key] = {}
            line = lines[key] = {
                "stripe_event_id": event.id,
                "user_id": payment.user_id,
                "event_type": fact.event_type,
                "plan_code": payment.plan_code,
                "customer_id": fact.customer_id,
                "invoice_id": fact.invoice_id,
                "subscription_id": fact.subscription_id,
                "amount": fact.amount,
                "currency": fact.currency,
                "settled": fact.settled,
                "metadata": dict(fact.metadata),
                "subject_key": payment.subject.key if payment.subject else None,
                "occurred_at": event.occurred_at,
            }
            if payment.subject is not None:
                self._lines_about[payment.subject].append(line)
            if fact.customer_id is not None:
                customer = CustomerId(event.account, event.livemode, fact.customer_id)
                self._lines_of[customer].append(line)

    def _save_event(self, event: Event, decision: Decision) -> None:
        key = (event.account, event.livemode, event.id)
        self._table(rows.CLAIMS)[key] = {}
        row = self._table(rows.EVENTS)[key] = {
            "event_type": event.type,
            "api_version": event.api_version,
            "occurred_at": event.occurred_at,
            "status": decision.status.value,
            "reason": decision.reason,
            "user_id": decision.user_id,
            "plan_code": decision.plan_code,
            "customer_id": decision.customer.id if decision.customer else None,
            "subject_key": decision.subject.key if decision.subject else None,
        }
        # What can't be read waits for a newer Tollkeeper, not for a user; it has neither of the two.
        if decision.status is Status.PARKED and decision.subject is not None:
            self._parked_about[decision.subject].append(row)
        if decision.status is Status.PARKED and decision.customer is not None:
            self._parked_of[decision.customer].append(row)

    def _attribute(self, decision: Decision) -> None:
        """Gives what had waited for a user to that user, as the shell's statements do."""
        for attribution in decision.attributions:
            self._attribute_payments(attribution)
        for waiting in decision.waiting:
            self._name_plans(waiting)
            self._settle(waiting)
        for attribution in decision.attributions:
            self._settle_customer(attribution)

    def _attribute_payments(self, attribution: Attribution) -> None:
        lines = (
            [self._lines_of.get(attribution.customer, [])]
            if attribution.customer is not None
            else [
                self._lines_about.get(subject, [])
                for subject in below(self._children, [attribution.source] if attribution.source else [])
            ]
        )
        for line in (line for found in lines for line in found):
            line["user_id"] = line["user_id"] or attribution.user_id

    def _name_plans(self, waiting: Waiting) -> None:
        for subject in below(self._children, [waiting.source]):
            for line in self._lines_about.get(subject, []):
                line["plan_code"] = line["plan_code"] or waiting.plan_code

    def _settle(self, waiting: Waiting) -> None:
        for subject in below(self._children, [waiting.source]):
            reason = waiting.reason if subject == waiting.source else waiting.parts_reason
            for row in self._parked_about.get(subject, []):
                if row["status"] == Status.PARKED.value:
                    row["status"] = (Status.SUCCESS if reason is None else Status.PARKED).value
                    row["reason"] = reason
                    row["user_id"] = waiting.user_id
                    row["plan_code"] = waiting.plan_code or row["plan_code"]

    def _settle_customer(self, attribution: Attribution) -> None:
        if attribution.customer is None:
            return
        for row in self._parked_of.get(attribution.customer, []):
            if row["status"] == Status.PARKED.value and row["reason"] == NO_USER:
                row.update(status=Status.SUCCESS.value, reason=None, user_id=attribution.user_id)

    def _names(
        self, account: str, livemode: bool, subject_key: str | None, customer_id: str | None
    ) -> dict[Key, Row]:
        names = (subject_key, None if customer_id is None else f"cus:{customer_id}")
        waiting = {SubjectId(account, livemode, name) for name in names if name is not None}
        return {tuple(name): {} for name in self.state.above(waiting)}

    def _table(self, derived: DerivedTable) -> dict[Key, Row]:
        return self.tables[derived.table.name]


def _word(row: Row, event_id: str, event_type: str, at: datetime) -> Event:
    return Event(
        account=row["account"],
        livemode=row["livemode"],
        id=event_id,
        type=event_type,
        api_version=None,
        occurred_at=at,
    )
