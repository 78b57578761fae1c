"""The decision: state and one event's translation in, every consequence out. Pure; time is an argument.

    state, decision = decide(catalog, state, event, translation, now=...)

Several events are decided one after another on the same state, in memory; the shell then writes all
their decisions in one transaction.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum

from backend.app.billing.domain.access import Reading
from backend.app.billing.domain.catalog import Catalog, Plan
from backend.app.billing.domain.facts import (
    CheckoutFact,
    CustomerId,
    EndedFact,
    Event,
    Fact,
    PaymentFact,
    SubjectId,
    SubscriptionFact,
    Tie,
    Translation,
    prices_of,
)
from backend.app.billing.domain.merge import Entitlement, entitlement_of, live_accesses, read_source
from backend.app.billing.domain.pricing import NO_PLAN_NAMED, resolve_plan
from backend.app.billing.domain.state import NO_FACTS, Owned, State
from backend.app.billing.domain.subscriptions import KNOWN_STATUSES
from backend.app.billing.domain.timeline import is_settled

NO_USER = "unknown_user"


class Status(StrEnum):
    """The `status` of the webhook's answer and of the stored event."""

    SUCCESS = "success"
    IGNORED = "ignored"
    PARKED = "parked"


class Change(StrEnum):
    """How a user's entitlements changed."""

    GRANTED = "granted"  # from the default plan to another
    CHANGED = "changed"  # from one plan to another, or of status or features
    EXTENDED = "extended"  # only the end moved
    REVOKED = "revoked"  # back to the default plan


@dataclass(frozen=True, slots=True, kw_only=True)
class EntitlementChange:
    """A user's entitlements before and after an event."""

    kind: Change
    before: Entitlement | None
    after: Entitlement


@dataclass(frozen=True, slots=True, kw_only=True)
class Payment:
    """A ledger line with its user and plan, as far as they are known."""

    fact: PaymentFact
    subject: SubjectId | None
    user_id: str | None
    plan_code: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribution:
    """From now on what waits for a source and all that bears on it, or else for a customer, belongs to `user_id`."""

    user_id: str
    source: SubjectId | None = None
    customer: CustomerId | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """What the parked events of a source wait for now; `parts_reason` is that of what bears on it.

    None when they wait no longer.
    """

    source: SubjectId
    user_id: str | None
    plan_code: str | None
    reason: str | None
    parts_reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Something the owner should hear of, once per `key`."""

    key: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reread:
    """An object whose events leave something open that Stripe itself could tell; `kind` is sub or cs."""

    account: str
    livemode: bool
    kind: str
    object_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Everything that follows from one event; `departed` is its customer where that one was deleted.

    `inherited` are facts that subjects come to have because of what bears on them.
    """

    status: Status
    reason: str | None = None
    user_id: str | None = None
    plan_code: str | None = None
    subject: SubjectId | None = None
    customer: CustomerId | None = None
    departed: CustomerId | None = None
    facts: tuple[tuple[SubjectId, Fact], ...] = ()
    inherited: tuple[tuple[SubjectId, Fact], ...] = ()
    links: tuple[tuple[SubjectId, SubjectId], ...] = ()
    sources: tuple[tuple[SubjectId, Owned], ...] = ()
    ties: tuple[tuple[CustomerId, Tie], ...] = ()
    payments: tuple[Payment, ...] = ()
    changes: tuple[EntitlementChange, ...] = ()
    attributions: tuple[Attribution, ...] = ()
    waiting: tuple[Waiting, ...] = ()
    notices: tuple[Notice, ...] = ()
    rereads: tuple[Reread, ...] = ()


def decide(
    catalog: Catalog, state: State, event: Event, translation: Translation, *, now: datetime
) -> tuple[State, Decision]:
    """The state after an event and everything that follows from it."""
    scope = _Scope(event)
    facts = [(scope.subject(about.key), about.fact) for about in translation.facts]
    links = [(scope.subject(link.child), scope.subject(link.parent)) for link in translation.links]
    state, tied = _with_ties(state, scope, translation.ties)
    new_links = [link for link in links if link[1] not in state.parents.get(link[0], ())]
    state = state.with_parents(new_links).with_facts(dict(facts))
    inherited = state.inherited(facts, new_links)
    state = state.with_inherited(inherited)
    touched = _touched(state, scope, facts, links, tied)
    state, moved, concerned = _with_owners(state, touched)
    # The rest looks at the state as it was read for this, which knows each source's reading already.
    settled, changes = _with_entitlements(catalog, state, event, concerned, now)

    subject = scope.subject(translation.subject) if translation.subject is not None else None
    customer = scope.customer(translation.customer_id) if translation.customer_id is not None else None
    source = _source_behind(state, subject)
    reading = state.reading(catalog, source) if source is not None else None
    user_id = _user_of(state, translation, source, customer)
    plan_code = _plan_code_of(catalog, translation, _reading_at(catalog, state, source, event)) or (
        reading.plan.code if reading is not None and reading.plan is not None else None
    )
    reason = _reason_to_park(translation, reading, user_id, sells=source is not None and source == subject)
    return settled, Decision(
        status=Status.PARKED if reason else Status.SUCCESS,
        reason=reason,
        user_id=user_id,
        plan_code=plan_code,
        subject=subject,
        customer=customer,
        departed=_departed(state, source, customer),
        facts=tuple(facts),
        inherited=tuple(inherited),
        links=tuple(links),
        sources=tuple((source_id, state.sources[source_id]) for source_id in sorted(touched)),
        ties=tuple((scope.customer(tie.customer_id), tie) for tie in translation.ties),
        payments=tuple(
            Payment(
                fact=fact,
                subject=subject,
                user_id=fact.metadata_user_id or user_id,
                # Its price, if mapped; metadata beside it may be older than the source's own plan.
                plan_code=_code(resolve_plan(catalog, fact.price, None)) or plan_code,
            )
            for fact in translation.payments
        ),
        changes=tuple(changes),
        attributions=tuple(_attributions(state, moved, tied, links)),
        waiting=tuple(_waiting(catalog, state, touched)),
        notices=(
            *_notices(state, scope, translation, reason),
            *_duplicate_plans(catalog, state, concerned, now),
        ),
        rereads=tuple(_rereads(state, facts, reason)),
    )


class _Scope:
    """Turns the keys of one event into names that hold across accounts and modes."""

    def __init__(self, event: Event) -> None:
        self.event = event

    def subject(self, key: str) -> SubjectId:
        return SubjectId(self.event.account, self.event.livemode, key)

    def customer(self, customer_id: str) -> CustomerId:
        return CustomerId(self.event.account, self.event.livemode, customer_id)


def _with_ties(state: State, scope: _Scope, new: Sequence[Tie]) -> tuple[State, set[CustomerId]]:
    """The state with more ties, and the customers whose user is another than before."""
    if not new:
        return state, set()
    ties = dict(state.ties)
    named = {scope.customer(tie.customer_id) for tie in new}
    for tie in new:
        customer = scope.customer(tie.customer_id)
        ties[customer] = ties.get(customer, frozenset()) | {tie}
    after = replace(state, ties=ties)
    return after, {
        customer for customer in named if after.user_of_customer(customer) != state.user_of_customer(customer)
    }


def _touched(
    state: State,
    scope: _Scope,
    facts: Iterable[tuple[SubjectId, Fact]],
    links: Iterable[tuple[SubjectId, SubjectId]],
    tied: set[CustomerId],
) -> set[SubjectId]:
    """The sources whose meaning or owner may be another than before."""
    subjects = {subject for subject, _ in facts} | {subject for link in links for subject in link}
    reached = state.above(subjects)
    customers = {subject.object_id for subject in reached if subject.kind == "cus"}
    return {
        source_id
        for source_id, owned in state.sources.items()
        if source_id in reached
        or (
            owned.customer_id is not None
            and (
                CustomerId(source_id.account, source_id.livemode, owned.customer_id) in tied
                or (
                    owned.customer_id in customers
                    and source_id[:2] == (scope.event.account, scope.event.livemode)
                )
            )
        )
    }


def _with_owners(state: State, touched: Iterable[SubjectId]) -> tuple[State, list[SubjectId], set[str]]:
    """The state with each touched source at its owner; the sources that moved; the users concerned."""
    sources = dict(state.sources)
    moved: list[SubjectId] = []
    concerned: set[str] = set()
    for source_id in sorted(touched):
        before, after = sources[source_id].user_id, state.owner_of(source_id)
        concerned |= {user for user in (before, after) if user is not None}
        if after != before:
            sources[source_id] = Owned(customer_id=sources[source_id].customer_id, user_id=after)
            moved.append(source_id)
    return (replace(state, sources=sources) if moved else state), moved, concerned


def _with_entitlements(
    catalog: Catalog, state: State, event: Event, users: Iterable[str], now: datetime
) -> tuple[State, list[EntitlementChange]]:
    entitlements = dict(state.entitlements)
    changes: list[EntitlementChange] = []
    for user_id in sorted(users):
        # What has occurred is in force, also where our clock is a little behind Stripe's.
        at = max(now, state.newest_as_of(user_id) or now)
        before = entitlements.get(user_id)
        after = entitlement_of(catalog, user_id, state.readings_of(catalog, user_id), at=at)
        kind = kind_of_change(catalog, before, after)
        if kind is None:
            continue
        same_plan = before is not None and before.plan_code == after.plan_code
        after = replace(
            after,
            version=before.version + 1 if before else 1,
            activated_at=before.activated_at if before and same_plan else event.occurred_at,
        )
        entitlements[user_id] = after
        changes.append(EntitlementChange(kind=kind, before=before, after=after))
    return (replace(state, entitlements=entitlements) if changes else state), changes


def kind_of_change(catalog: Catalog, before: Entitlement | None, after: Entitlement) -> Change | None:
    """What to call the difference between two states of a user, or None where there is none."""
    default = catalog.default_plan.code
    if before is None:
        return Change.CHANGED if after.plan_code == default else Change.GRANTED
    if before.plan_code != after.plan_code:
        if after.plan_code == default:
            return Change.REVOKED
        return Change.GRANTED if before.plan_code == default else Change.CHANGED
    if dict(before.features) != dict(after.features) or before.status != after.status:
        return Change.CHANGED
    return Change.EXTENDED if before.valid_until != after.valid_until else None


def _source_behind(state: State, subject: SubjectId | None) -> SubjectId | None:
    """The source that an event's subject is, or bears on."""
    if subject is None:
        return None
    found = [candidate for candidate in state.above({subject}) if candidate in state.sources]
    # A part of another is not what access rests on; of several the choice is the same each time.
    return min(found, key=lambda candidate: (bool(state.parents.get(candidate)), candidate), default=None)


def _departed(state: State, source: SubjectId | None, customer: CustomerId | None) -> CustomerId | None:
    """The customer an event is about, by its own word or by its source's, where that customer was deleted."""
    if customer is None and source is not None:
        customer_id = state.sources[source].customer_id
        customer = CustomerId(source.account, source.livemode, customer_id) if customer_id else None
    if customer is None:
        return None
    itself = SubjectId(customer.account, customer.livemode, f"cus:{customer.id}")
    told = state.facts.get(itself, NO_FACTS)
    return customer if any(isinstance(fact, EndedFact) for fact in told) else None


def _user_of(
    state: State, translation: Translation, source: SubjectId | None, customer: CustomerId | None
) -> str | None:
    if source is not None and state.sources[source].user_id is not None:
        return state.sources[source].user_id
    if translation.ties:
        return min(translation.ties, key=lambda tie: tie.strength).user_id
    if customer is not None:
        known = state.user_of_customer(customer)
        if known is not None:
            return known
    return next((fact.metadata_user_id for fact in translation.payments if fact.metadata_user_id), None)


def _reading_at(catalog: Catalog, state: State, source_id: SubjectId | None, event: Event) -> Reading | None:
    """What a source came to when an event occurred, which may have come late: money was for the plan of its time."""
    if source_id is None:
        return None
    source = state.source(source_id)
    if all(fact.as_of <= event.occurred_at for fact in source.facts):
        return state.reading(catalog, source_id)
    return read_source(
        catalog, source, at=event.occurred_at, is_part_of_another=bool(state.parents.get(source_id))
    )


def _plan_code_of(catalog: Catalog, translation: Translation, reading: Reading | None) -> str | None:
    """The plan an event is about: what its source gives, else what it names itself."""
    if reading is not None and reading.plan is not None:
        return reading.plan.code
    for about in translation.facts:
        hint = getattr(about.fact, "metadata_plan_code", None)
        for price in prices_of(about.fact) or (None,):
            plan = resolve_plan(catalog, price, hint)
            if plan is not None:
                return plan.code
    codes = (_payment_plan(catalog, fact) for fact in translation.payments)
    return next((code for code in codes if code is not None), None)


def _payment_plan(catalog: Catalog, fact: PaymentFact) -> str | None:
    return _code(resolve_plan(catalog, fact.price, fact.metadata_plan_code))


def _code(plan: Plan | None) -> str | None:
    return plan.code if plan else None


def _reason_to_park(
    translation: Translation, reading: Reading | None, user_id: str | None, *, sells: bool
) -> str | None:
    """What is missing before the access that should follow from this event can follow, or None.

    Only an event that `sells`, one of the source itself, waits for a price or plan to be known.
    """
    if not translation.expects_access:
        return None
    if user_id is None and (reading is None or reading.wants_user):
        return NO_USER
    if sells and reading is not None and reading.unknown:
        return reading.unknown[0]
    return None


def _attributions(
    state: State,
    moved: Iterable[SubjectId],
    tied: Iterable[CustomerId],
    links: Iterable[tuple[SubjectId, SubjectId]],
) -> Iterable[Attribution]:
    """Whose the lines and events are that waited for a user, now that a source or a customer has one."""
    newly_linked = {
        source_id for _, parent in links for source_id in state.above({parent}) if source_id in state.sources
    }
    for source_id in sorted({*moved, *newly_linked}):
        user_id = state.sources[source_id].user_id
        if user_id is not None:
            yield Attribution(user_id=user_id, source=source_id)
    for customer in sorted(tied):
        user_id = state.user_of_customer(customer)
        if user_id is not None:
            yield Attribution(user_id=user_id, customer=customer)


def _waiting(catalog: Catalog, state: State, touched: Iterable[SubjectId]) -> Iterable[Waiting]:
    for source_id in sorted(touched):
        reading = state.reading(catalog, source_id)
        if reading is None:
            continue
        user_id = state.sources[source_id].user_id
        plan_code = reading.plan.code if reading.plan else None
        nobody = NO_USER if reading.wants_user and user_id is None else None
        yield Waiting(
            source=source_id,
            user_id=user_id,
            plan_code=plan_code,
            reason=nobody or next(iter(reading.unknown), None),
            # What only bears on a source sells nothing itself, so it never waits for a price.
            parts_reason=nobody,
        )


def _notices(state: State, scope: _Scope, translation: Translation, reason: str | None) -> Iterable[Notice]:
    event = scope.event
    for tie in translation.ties:
        customer = scope.customer(tie.customer_id)
        if any(known.user_id != tie.user_id for known in state.ties[customer]):
            yield Notice(
                key=f"tie:{customer}:{tie.user_id}",
                text=f"Customer {tie.customer_id} is claimed for several users; event {event.id} names "
                f"{tie.user_id}. The strongest, then the earliest claim holds: user "
                f"{state.user_of_customer(customer)}.",
            )
    for about in translation.facts:
        if isinstance(about.fact, SubscriptionFact) and about.fact.status not in KNOWN_STATUSES:
            yield Notice(
                key=f"status:{about.fact.status}",
                text=f"Subscription {about.fact.subscription_id} has the unknown status "
                f"{about.fact.status!r} (event {event.id}). Its last known state is kept.",
            )
    for alert in translation.alerts:
        if alert.is_routine:
            yield Notice(
                key=f"routine:{event.account}:{event.livemode}:{event.type}:{event.occurred_at:%Y-%m-%d}",
                text=f"{alert.text} Further events of this type and day are not reported one by one; "
                f"they are in the list of events under {event.type}.",
            )
        else:
            yield Notice(
                key=f"event:{event.account}:{event.livemode}:{event.id}:{alert.text}", text=alert.text
            )
    if reason is not None:
        subject = (translation.customer_id or translation.subject or event.id) if reason == NO_USER else ""
        yield Notice(
            key=f"parked:{event.account}:{event.livemode}:{reason}:{subject}",
            text=f"Event {event.id} ({event.type}) is parked: {reason} {subject}".rstrip()
            + ". Nobody was granted anything by it; it is kept and applied once the missing piece is known.",
        )


def _duplicate_plans(catalog: Catalog, state: State, users: Iterable[str], now: datetime) -> Iterable[Notice]:
    """Users who pay twice for one plan: they have it once, and the owner should hear of it."""
    for user_id in sorted(users):
        payers: dict[str, set[SubjectId]] = {}
        for access in live_accesses(state.readings_of(catalog, user_id), now):
            if access.source.kind == "sub" and access.plan is not None:
                payers.setdefault(access.plan.code, set()).add(access.source)
        for plan_code, paying in sorted(payers.items()):
            if len(paying) > 1:
                names = ", ".join(source.object_id for source in sorted(paying))
                yield Notice(
                    key=f"duplicate:{user_id}:{plan_code}:{names}",
                    text=f"User {user_id} pays for plan {plan_code} more than once: {names}.",
                )


def _rereads(state: State, facts: Iterable[tuple[SubjectId, Fact]], reason: str | None) -> Iterable[Reread]:
    """What only Stripe can settle: snapshots of one second that don't tell their order, lines that were not sent."""
    for subject, fact in facts:
        open_order = isinstance(fact, SubscriptionFact) and not is_settled(
            [other for other in state.facts[subject] if isinstance(other, SubscriptionFact)]
        )
        open_lines = isinstance(fact, CheckoutFact) and not fact.lines and reason == NO_PLAN_NAMED
        if open_order or open_lines:
            yield Reread(
                account=subject.account,
                livemode=subject.livemode,
                kind=subject.kind,
                object_id=subject.object_id,
            )
