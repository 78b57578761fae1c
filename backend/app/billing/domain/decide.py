"""The decision: state and one event's translation in, every consequence out. Pure; time is an argument.

    state, decision = decide(catalog, state, event, translation, now=...)

Several events are decided one after another on the same state, in memory; the shell then writes all
their decisions in one transaction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum

from backend.app.billing.domain.access import (
    KNOWN_STATUSES,
    Access,
    Reading,
    Source,
    bound_user,
    owner,
    read_source,
    resolve_plan,
)
from backend.app.billing.domain.catalog import Catalog, FeatureValue, Plan
from backend.app.billing.domain.facts import (
    CustomerId,
    Event,
    PaymentFact,
    PriceRef,
    SourceFact,
    SourceId,
    SubscriptionFact,
    Tie,
    Translation,
    source_key,
)

# The status of a user from whom nothing was ever heard.
NO_SOURCE_STATUS = "none"
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
class Entitlement:
    """What a user may do: the plan in front, every feature's value, and until when this answer holds."""

    user_id: str
    plan_code: str
    status: str
    features: Mapping[str, FeatureValue]
    valid_until: datetime | None
    activated_at: datetime | None = None
    version: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """All that a decision may look at. Complete for the customers and users that its events concern."""

    sources: Mapping[SourceId, Source]
    ties: Mapping[CustomerId, frozenset[Tie]]
    entitlements: Mapping[str, Entitlement]


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
    user_id: str | None
    plan_code: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribution:
    """From now on what waits for this source, or else for this customer, belongs to `user_id`."""

    user_id: str
    source: SourceId | None = None
    customer: CustomerId | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """What the parked events of a source wait for now; None when they wait no longer."""

    source: SourceId
    user_id: str | None
    plan_code: str | None
    reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Something the owner should hear of, once per `key`."""

    key: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Everything that follows from one event."""

    status: Status
    reason: str | None = None
    user_id: str | None = None
    plan_code: str | None = None
    source: SourceId | None = None
    customer: CustomerId | None = None
    facts: tuple[tuple[SourceId, SourceFact], ...] = ()
    sources: tuple[Source, ...] = ()
    ties: tuple[tuple[CustomerId, Tie], ...] = ()
    payments: tuple[Payment, ...] = ()
    changes: tuple[EntitlementChange, ...] = ()
    attributions: tuple[Attribution, ...] = ()
    waiting: tuple[Waiting, ...] = ()
    notices: tuple[Notice, ...] = ()


def decide(
    catalog: Catalog, state: State, event: Event, translation: Translation, *, now: datetime
) -> tuple[State, Decision]:
    """The state after an event and everything that follows from it."""
    state, tied = _with_ties(state, event, translation.ties)
    state, facts = _with_facts(state, event, translation.facts)
    touched = {source_id for source_id, _ in facts}
    touched |= {
        source.id
        for source in state.sources.values()
        if source.customer_id is not None
        and CustomerId(source.id.account, source.id.livemode, source.customer_id) in tied
    }
    state, moved, concerned = _with_owners(state, touched)
    state, changes = _with_entitlements(catalog, state, event, concerned, now)

    source = _source_of(event, translation)
    customer = _customer_of(event, translation)
    user_id = _user_of(state, translation, source, customer)
    reading = read_source(catalog, state.sources[source]) if source in state.sources and source else None
    plan_code = _plan_code_of(catalog, translation, reading)
    reason = _reason_to_park(translation, reading, user_id)
    attributions = [
        Attribution(user_id=user, source=moved_source.id)
        for moved_source in moved
        if (user := moved_source.user_id) is not None
    ]
    attributions += [
        Attribution(user_id=user, customer=customer_id)
        for customer_id in sorted(tied)
        if (user := bound_user(state.ties[customer_id])) is not None
    ]
    return state, Decision(
        status=Status.PARKED if reason else Status.SUCCESS,
        reason=reason,
        user_id=user_id,
        plan_code=plan_code,
        source=source,
        customer=customer,
        facts=tuple(facts),
        sources=tuple(state.sources[source_id] for source_id in sorted(touched)),
        ties=tuple(
            (CustomerId(event.account, event.livemode, tie.customer_id), tie) for tie in translation.ties
        ),
        payments=tuple(
            Payment(
                fact=fact,
                user_id=fact.metadata_user_id or user_id,
                # Its price, if mapped; metadata beside it may be older than the source's own plan.
                plan_code=_payment_plan(catalog, replace(fact, metadata_plan_code=None)) or plan_code,
            )
            for fact in translation.payments
        ),
        changes=tuple(changes),
        attributions=tuple(attributions),
        waiting=tuple(_waiting(catalog, state, touched)),
        notices=tuple(_notices(state, event, translation, reason)),
    )


def entitlement_of(
    catalog: Catalog,
    user_id: str,
    sources: Iterable[Source],
    *,
    at: datetime,
    version: int = 0,
    activated_at: datetime | None = None,
) -> Entitlement:
    """What a user may do at an instant, merged from all of their sources."""
    # In the order of their names: of two that are equal in all that counts, the same one always speaks.
    readings = [read_source(catalog, source) for source in sorted(sources, key=lambda source: source.id)]
    accesses = [access for reading in readings for access in reading.accesses]
    answer = _merged(catalog, readings, accesses, at)
    boundaries = sorted(
        {
            boundary
            for access in accesses
            for boundary in (access.starts_at, access.ends_at)
            if boundary is not None and boundary > at
        }
    )
    valid_until = next(
        (boundary for boundary in boundaries if _merged(catalog, readings, accesses, boundary) != answer),
        None,
    )
    plan, status, features = answer
    return Entitlement(
        user_id=user_id,
        plan_code=plan.code,
        status=status,
        features=features,
        valid_until=valid_until,
        activated_at=activated_at,
        version=version,
    )


def _merged(
    catalog: Catalog, readings: Sequence[Reading], accesses: Sequence[Access], at: datetime
) -> tuple[Plan, str, dict[str, FeatureValue]]:
    live = [access for access in accesses if access.is_live(at)]
    if live:
        # Of equal plans the one that lasts longest speaks for the user.
        first = max(live, key=lambda access: (access.plan.rank, access.ends_at is None, access.ends_at or at))
        return first.plan, first.status, catalog.merge([access.plan for access in live])
    newest = max(readings, key=lambda reading: reading.as_of, default=None)
    if newest is None:
        status = NO_SOURCE_STATUS
    elif newest.accesses:
        status = "expired"
    else:
        status = newest.status
    return catalog.default_plan, status, catalog.merge([])


def _with_ties(state: State, event: Event, new: Sequence[Tie]) -> tuple[State, set[CustomerId]]:
    """The state with more ties, and the customers whose user is another than before."""
    ties = dict(state.ties)
    for tie in new:
        customer = CustomerId(event.account, event.livemode, tie.customer_id)
        ties[customer] = ties.get(customer, frozenset()) | {tie}
    tied = {
        customer
        for customer, known in ties.items()
        if bound_user(known) != bound_user(state.ties.get(customer, frozenset()))
    }
    return replace(state, ties=ties), tied


def _with_facts(
    state: State, event: Event, new: Sequence[SourceFact]
) -> tuple[State, list[tuple[SourceId, SourceFact]]]:
    sources = dict(state.sources)
    added: list[tuple[SourceId, SourceFact]] = []
    for fact in new:
        source_id = SourceId(event.account, event.livemode, source_key(fact))
        known = sources.get(source_id)
        if known is not None and any(fact.event_id == old.event_id for old in known.facts):
            # Decided on before: the event is processed again.
            added.append((source_id, fact))
            continue
        sources[source_id] = Source(
            id=source_id,
            customer_id=(known.customer_id if known else None) or fact.customer_id,
            user_id=known.user_id if known else None,
            facts=(*(known.facts if known else ()), fact),
        )
        added.append((source_id, fact))
    return replace(state, sources=sources), added


def _with_owners(state: State, touched: Iterable[SourceId]) -> tuple[State, list[Source], set[str]]:
    """The state with each touched source at its owner; the sources that moved; the users concerned."""
    sources = dict(state.sources)
    moved: list[Source] = []
    concerned: set[str] = set()
    for source_id in sorted(touched):
        source = sources[source_id]
        user_id = owner(source, state.ties)
        concerned |= {user for user in (source.user_id, user_id) if user is not None}
        if user_id != source.user_id:
            sources[source_id] = replace(source, user_id=user_id)
            moved.append(sources[source_id])
    return replace(state, sources=sources), moved, concerned


def _with_entitlements(
    catalog: Catalog, state: State, event: Event, users: Iterable[str], now: datetime
) -> tuple[State, list[EntitlementChange]]:
    entitlements = dict(state.entitlements)
    changes: list[EntitlementChange] = []
    for user_id in sorted(users):
        owned = [source for source in state.sources.values() if source.user_id == user_id]
        # What has occurred is in force, also where our clock is a little behind Stripe's.
        at = max([now, *(fact.as_of for source in owned for fact in source.facts)])
        after = entitlement_of(catalog, user_id, owned, at=at)
        before = entitlements.get(user_id)
        kind = _kind_of_change(catalog, before, after)
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
    return replace(state, entitlements=entitlements), changes


def _kind_of_change(catalog: Catalog, before: Entitlement | None, after: Entitlement) -> Change | None:
    default = catalog.default_plan.code
    if before is None:
        return Change.CHANGED if after.plan_code == default else Change.GRANTED
    if before.plan_code != after.plan_code:
        if after.plan_code == default:
            return Change.REVOKED
        return Change.GRANTED if before.plan_code == default else Change.CHANGED
    if before.features != after.features or before.status != after.status:
        return Change.CHANGED
    return Change.EXTENDED if before.valid_until != after.valid_until else None


def _source_of(event: Event, translation: Translation) -> SourceId | None:
    if translation.facts:
        return SourceId(event.account, event.livemode, source_key(translation.facts[0]))
    if translation.subscription_id is not None:
        return SourceId(event.account, event.livemode, f"sub:{translation.subscription_id}")
    return None


def _customer_of(event: Event, translation: Translation) -> CustomerId | None:
    if translation.customer_id is None:
        return None
    return CustomerId(event.account, event.livemode, translation.customer_id)


def _user_of(
    state: State, translation: Translation, source: SourceId | None, customer: CustomerId | None
) -> str | None:
    if source is not None and source in state.sources:
        known = state.sources[source].user_id
        if known is not None:
            return known
    if translation.ties:
        return min(translation.ties, key=lambda tie: tie.strength).user_id
    if customer is not None:
        known = bound_user(state.ties.get(customer, frozenset()))
        if known is not None:
            return known
    return next((fact.metadata_user_id for fact in translation.payments if fact.metadata_user_id), None)


def _plan_code_of(catalog: Catalog, translation: Translation, reading: Reading | None) -> str | None:
    """The plan an event is about: what its source gives, else what it names itself."""
    if reading is not None and reading.plan is not None:
        return reading.plan.code
    for fact in translation.facts:
        entries = fact.items if isinstance(fact, SubscriptionFact) else fact.lines
        prices: list[PriceRef | None] = [entry.price for entry in entries]
        for price in prices or [None]:
            plan = resolve_plan(catalog, price, fact.metadata_plan_code)
            if plan is not None:
                return plan.code
    codes = (_payment_plan(catalog, fact) for fact in translation.payments)
    return next((code for code in codes if code is not None), None)


def _payment_plan(catalog: Catalog, fact: PaymentFact) -> str | None:
    plan = resolve_plan(catalog, fact.price, fact.metadata_plan_code)
    return plan.code if plan else None


def _reason_to_park(translation: Translation, reading: Reading | None, user_id: str | None) -> str | None:
    """What is missing before the access that should follow from this event can follow, or None."""
    if not translation.expects_access:
        return None
    if user_id is None and (reading is None or reading.wants_user):
        return NO_USER
    if translation.facts and reading is not None and reading.unknown:
        return reading.unknown[0]
    return None


def _waiting(catalog: Catalog, state: State, touched: Iterable[SourceId]) -> Iterable[Waiting]:
    for source_id in sorted(touched):
        source = state.sources[source_id]
        reading = read_source(catalog, source)
        nobody = reading.wants_user and source.user_id is None
        yield Waiting(
            source=source_id,
            user_id=source.user_id,
            plan_code=reading.plan.code if reading.plan else None,
            reason=NO_USER if nobody else next(iter(reading.unknown), None),
        )


def _notices(state: State, event: Event, translation: Translation, reason: str | None) -> Iterable[Notice]:
    for tie in translation.ties:
        customer = CustomerId(event.account, event.livemode, tie.customer_id)
        if any(known.user_id != tie.user_id for known in state.ties[customer]):
            yield Notice(
                key=f"tie:{customer}:{tie.user_id}",
                text=f"Customer {tie.customer_id} is claimed for several users; event {event.id} names "
                f"{tie.user_id}. The strongest, then the earliest claim holds: user "
                f"{bound_user(state.ties[customer])}.",
            )
    for fact in translation.facts:
        if isinstance(fact, SubscriptionFact) and fact.status not in KNOWN_STATUSES:
            yield Notice(
                key=f"status:{fact.status}",
                text=f"Subscription {fact.subscription_id} has the unknown status {fact.status!r} "
                f"(event {event.id}). Its last known state is kept.",
            )
    if reason is not None:
        subject = (
            (translation.customer_id or translation.subscription_id or event.id) if reason == NO_USER else ""
        )
        yield Notice(
            key=f"parked:{event.account}:{event.livemode}:{reason}:{subject}",
            text=f"Event {event.id} ({event.type}) is parked: {reason} {subject}".rstrip()
            + ". Nobody was granted anything by it; it is kept and applied once the missing piece is known.",
        )
