"""Why a user may do what they may: for every feature its rule and source, for every source its evidence, and what comes next.

    view, evidence = await service.view_with_evidence("usr_1")
    explanation = explain(service.catalog, view, evidence)

Pure: it says nothing that does not follow from its arguments. docs/explain.md shows how to read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import Any

from backend.app.audit.models import AuditLog
from backend.app.billing.domain.access import Access, Reading
from backend.app.billing.domain.catalog import Catalog, Plan
from backend.app.billing.domain.facts import (
    Fact,
    FeatureValue,
    InvoiceFact,
    PriceRef,
    ScheduleFact,
    SubjectId,
    SubscriptionFact,
)
from backend.app.billing.domain.merge import Entitlement, boundaries, entitlement_of
from backend.app.billing.domain.pricing import plans_of
from backend.app.billing.domain.state import below
from backend.app.billing.entitlements import Evidence, FeatureCheck, View, check_feature
from backend.app.billing.models import PaymentEvent
from backend.app.core.clock import iso

# What comes next is for a person to read; the dates beyond are looked at when these have passed.
NEXT_CHANGES_MAX = 20

# What each rule of the domain means; a rule that is missing here is shown by its name.
RULES: Mapping[str, str] = {
    "default_plan": "as everybody has it by the default plan; no source changes it",
    "subscription.active": "the subscription is active; the end is its paid period's with the renewal slack, "
    "and a renewal moves it",
    "subscription.trialing": "the subscription is in its trial",
    "subscription.item_trial": "this item of the subscription is in a trial of its own",
    "subscription.cancel_at": "the subscription is cancelled to this date, kept exactly",
    "subscription.past_due.grace": "the renewal's payment failed; access is kept for the days of grace",
    "subscription.incomplete": "the first payment has not been made",
    "subscription.incomplete_expired": "the first payment was not made in time",
    "subscription.unpaid": "all attempts to collect the renewal failed",
    "subscription.paused": "the subscription is paused",
    "subscription.canceled": "the subscription has ended",
    "subscription.unknown_status": "Stripe gave it a status that this release does not know",
    "subscription.not_seen_yet": "its checkout is complete, but nothing was heard of the subscription itself",
    "pause_collection.void": "its collection is paused, and the policy ends access then",
    "pause_collection.keep_as_draft": "its collection is paused, and the policy ends access then",
    "pause_collection.mark_uncollectible": "its collection is paused, and the policy ends access then",
    "checkout.paid": "the checkout was paid",
    "checkout.awaiting_payment": "the checkout's payment is still on its way",
    "checkout.failed": "the checkout's payment failed",
    "checkout.expired": "the checkout expired without a payment",
    "invoice.manual_paid": "the invoice was paid",
    "invoice.payment_failed": "the invoice's payment failed",
    "invoice.voided": "the invoice was voided",
    "invoice.uncollectible": "the invoice was written off",
    "payment_intent.paid": "the payment succeeded",
    "payment_intent.not_paid": "the payment has not succeeded",
    "refund.full": "its money was given back",
    "dispute.open": "the payer disputes the payment; access is suspended until that is decided",
    "dispute.lost": "the dispute over its payment was lost",
    "dispute.prevented": "its payment was given back before it became a dispute",
    "fraud.confirmed": "a review found its payment to be fraud",
    "fraud.warning": "the card's issuer warned of fraud, and the policy ends access then",
    "customer.deleted": "the customer was deleted in Stripe",
    "account.deauthorized": "the connected account was disconnected from the platform",
    "grant": "it was granted by hand",
    "grant.override": "it was set by hand, in place of whatever else would give",
    "grant.removed": "the grant was taken back",
}


class Why(StrEnum):
    """Why a source does not give a feature the value that the user has."""

    REFUSED = "refused"
    RAN_OUT = "ran_out"
    NOT_BEGUN = "not_begun"
    UNMAPPED = "unmapped"
    NO_MORE = "no_more"
    OUTDONE = "outdone"
    OVERRIDDEN = "overridden"


WHY_TEXTS: Mapping[Why, str] = {
    Why.REFUSED: "it gives nothing, for what its rule says",
    Why.RAN_OUT: "it gave access that has run out",
    Why.NOT_BEGUN: "its access has not begun yet",
    Why.UNMAPPED: "the catalog does not know what was bought",
    Why.NO_MORE: "it gives no more of this than everybody has",
    Why.OUTDONE: "another source gives more of this",
    Why.OVERRIDDEN: "a value set by hand stands in place of what it gives",
}

# Schedules in these states (docs.stripe.com/api/subscription_schedules/object#subscription_schedule_object-status)
# still have something before them.
SCHEDULES_AHEAD = frozenset({"not_started", "active"})

# Stripe's object for each kind of source.
OBJECTS: Mapping[str, str] = {
    "sub": "subscription",
    "cs": "checkout session",
    "in": "invoice",
    "pi": "payment",
    "grant": "grant",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceExplanation:
    """What a source comes to, and the facts, ledger lines and audit rows behind it, the oldest fact first.

    `counts`: some of its accesses is live.
    """

    id: SubjectId
    customer_id: str | None
    reading: Reading
    counts: bool
    facts: tuple[Fact, ...]
    payments: tuple[PaymentEvent, ...]
    audit: tuple[AuditLog, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NextChange:
    """What will be different from `at` on, if nothing more is heard, and the accesses that begin or end then."""

    at: datetime
    before: Entitlement
    after: Entitlement
    begin: tuple[Access, ...]
    end: tuple[Access, ...]

    @property
    def features(self) -> dict[str, tuple[FeatureValue, FeatureValue]]:
        """The features that change, each with its value before and after."""
        return {
            key: (self.before.features[key], value)
            for key, value in self.after.features.items()
            if value != self.before.features[key]
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Withheld:
    """A source that does not give a feature its value: why, by which rule and newest event, and since when."""

    source: SubjectId
    why: Why
    rule: str
    event_id: str
    since: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """What Stripe is to change in a source; it counts once an event says that the source itself has changed.

    `kind` and `object_id` name what plans it: a subscription schedule, or the subscription's own
    cancellation. `features` are the values that would be others then, before and after; `unknown` names
    the prices that the catalog lacks.
    """

    at: datetime
    source: SubjectId
    kind: str
    object_id: str
    event_id: str
    plan_codes: tuple[str, ...]
    unknown: tuple[str, ...]
    features: Mapping[str, tuple[FeatureValue, FeatureValue]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Everything about a user at an instant: each feature, each source, and what comes next.

    `next_changes` happen by themselves if nothing more is heard; `planned` is what Stripe is to change.
    """

    view: View
    features: tuple[FeatureCheck, ...]
    withheld: Mapping[str, tuple[Withheld, ...]]
    sources: tuple[SourceExplanation, ...]
    next_changes: tuple[NextChange, ...]
    planned: tuple[Planned, ...]


def explain(catalog: Catalog, view: View, evidence: Evidence) -> Explanation:
    """Why a view is as it is."""
    features = tuple(check_feature(catalog, view, key) for key in catalog.features)
    return Explanation(
        view=view,
        features=features,
        withheld={check.key: tuple(_withheld(view, check)) for check in features},
        sources=tuple(
            _source_explanation(view, source_id, reading, evidence) for source_id, reading in view.readings
        ),
        next_changes=tuple(_next_changes(catalog, view)),
        planned=tuple(_planned(catalog, view)),
    )


def _withheld(view: View, check: FeatureCheck) -> Iterator[Withheld]:
    """Every source that is not among a feature's givers."""
    giving = {access.source for access in check.givers}
    is_overridden = any(access.is_override for access in check.givers)
    for source_id, reading in view.readings:
        if source_id in giving:
            continue
        live = [access for access in reading.accesses if access.is_live(view.at)]
        if live:
            why = Why.NO_MORE
            if check.givers:
                why = Why.OVERRIDDEN if is_overridden else Why.OUTDONE
            rule, event_id, since = live[0].rule, live[0].event_id, live[0].starts_at
        else:
            why, rule, event_id, since = _nothing_given(reading, view.at)
        yield Withheld(source=source_id, why=why, rule=rule, event_id=event_id, since=since)


def _nothing_given(reading: Reading, at: datetime) -> tuple[Why, str, str, datetime]:
    """Why a source has no live access: the reason, its rule and event, and since when that is so."""
    over = [access for access in reading.accesses if access.ends_at is not None and access.ends_at <= at]
    if over:
        last = max(over, key=lambda access: access.ends_at or at)
        return Why.RAN_OUT, last.rule, last.event_id, last.ends_at or at
    if reading.accesses:
        return Why.NOT_BEGUN, reading.rule, reading.event_id, reading.as_of
    why = Why.UNMAPPED if reading.grants else Why.REFUSED
    return why, reading.rule, reading.event_id, reading.as_of


def _source_explanation(
    view: View, source_id: SubjectId, reading: Reading, evidence: Evidence
) -> SourceExplanation:
    source = view.state.source(source_id)
    subjects = set(below(evidence.children, [source_id]))
    event_ids = {fact.event_id for fact in source.facts}
    payments = tuple(
        line
        for line in evidence.payments
        if (line.account, line.livemode) == source_id[:2]
        and (
            line.stripe_event_id in event_ids
            or SubjectId(line.account, line.livemode, line.subject_key or "") in subjects
        )
    )
    resources = {source_id.object_id, *(line.id for line in payments)}
    return SourceExplanation(
        id=source_id,
        customer_id=source.customer_id,
        reading=reading,
        counts=any(access.is_live(view.at) for access in reading.accesses),
        facts=source.facts,
        payments=payments,
        audit=tuple(
            row
            for row in evidence.audit
            if row.resource_id in resources or row.actor.removeprefix("stripe:") in event_ids
        ),
    )


def _next_changes(catalog: Catalog, view: View) -> Iterator[NextChange]:
    readings = [reading for _, reading in view.readings]
    accesses = [access for reading in readings for access in reading.accesses]
    before = view.entitlement
    found = 0
    for edge in boundaries(readings, view.at):
        after = entitlement_of(catalog, view.entitlement.user_id, readings, at=edge)
        if _is_same(before, after):
            continue
        yield NextChange(
            at=edge,
            before=before,
            after=after,
            begin=tuple(access for access in accesses if access.starts_at == edge),
            end=tuple(access for access in accesses if access.ends_at == edge),
        )
        found += 1
        if found == NEXT_CHANGES_MAX:
            return
        before = after


def _planned(catalog: Catalog, view: View) -> Iterator[Planned]:
    """What schedules and cancellations plan for the subscriptions that give access, the soonest first."""
    found = [
        plan
        for source_id, reading in view.readings
        for plan in _planned_for(catalog, view, source_id, reading)
    ]
    yield from sorted(found, key=lambda plan: (plan.at, plan.source))[:NEXT_CHANGES_MAX]


def _planned_for(catalog: Catalog, view: View, source_id: SubjectId, reading: Reading) -> Iterator[Planned]:
    if not reading.grants:
        return
    others = [other for other_id, other in view.readings if other_id != source_id]
    # Until then Stripe renews it; so what it gives now does not end before.
    given = [replace(access, ends_at=None) for access in reading.accesses if access.is_live(view.at)]
    for step in _steps(view, source_id, reading):
        parts = [(price, place) for place, price in enumerate(step.prices)]
        plans, unknown = plans_of(catalog, parts, None) if parts else ([], ())
        then = [_access_then(source_id, step, plan, place, reading) for plan, place in plans]
        before, after = (
            entitlement_of(
                catalog,
                view.entitlement.user_id,
                [*others, replace(reading, accesses=tuple(accesses))],
                at=step.at,
            ).features
            for accesses in (given, then)
        )
        yield Planned(
            at=step.at,
            source=source_id,
            kind=step.kind,
            object_id=step.object_id,
            event_id=step.event_id,
            plan_codes=tuple(plan.code for plan, _ in plans),
            unknown=unknown,
            features={key: (before[key], value) for key, value in after.items() if value != before[key]},
        )
        given = then


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """From when on something planned wants which prices; no prices are the end."""

    at: datetime
    kind: str
    object_id: str
    event_id: str
    prices: tuple[PriceRef, ...]


def _steps(view: View, source_id: SubjectId, reading: Reading) -> list[_Step]:
    facts = view.state.source(source_id).facts
    newest: dict[str, ScheduleFact] = {}
    for fact in sorted(facts, key=lambda fact: (fact.as_of, fact.event_id)):
        if isinstance(fact, ScheduleFact):
            newest[fact.schedule_id] = fact
    steps = [
        _Step(
            at=phase.starts_at,
            kind="subscription schedule",
            object_id=schedule.schedule_id,
            event_id=schedule.event_id,
            prices=phase.prices,
        )
        for schedule in newest.values()
        if schedule.status in SCHEDULES_AHEAD
        for phase in schedule.phases
    ]
    ends = [
        _Step(
            at=fact.cancel_at,
            kind="subscription",
            object_id=fact.subscription_id,
            event_id=fact.event_id,
            prices=(),
        )
        for fact in facts
        if isinstance(fact, SubscriptionFact) and fact.event_id == reading.event_id and fact.cancel_at
    ]
    # An end that needs no further word is among the changes that come by themselves.
    certain = {access.ends_at for access in reading.accesses}
    ahead = [
        step for step in [*steps, *ends] if step.at > view.at and (step.prices or step.at not in certain)
    ]
    return sorted(ahead, key=lambda step: step.at)


def _access_then(source_id: SubjectId, step: _Step, plan: Plan, place: int, reading: Reading) -> Access:
    # A phase's seats are not known here; those of today are the best guess.
    seats = [access.quantity for access in reading.accesses]
    return Access(
        source=source_id,
        part=f"{place:03}",
        plan=plan,
        quantity=seats[place] if place < len(seats) else 1,
        status=reading.status,
        rule=reading.rule,
        event_id=step.event_id,
        starts_at=step.at,
        ends_at=None,
    )


def _is_same(before: Entitlement, after: Entitlement) -> bool:
    return (before.plan_code, before.status, dict(before.features)) == (
        after.plan_code,
        after.status,
        dict(after.features),
    )


def rule_text(rule: str) -> str:
    """What a rule means, in words."""
    return RULES.get(rule, rule)


def explanation_document(explanation: Explanation) -> dict[str, Any]:
    """The `explanation` of `GET /api/v1/entitlements/{user_id}?explain=true`; instants as RFC 3339 in UTC."""
    return {
        "features": [
            {
                "feature": check.key,
                "value": check.value,
                "granted": check.granted,
                "reason": check.reason,
                "text": rule_text(check.reason),
                "given_by": [
                    {
                        **_object_document(access.source),
                        "plan_code": access.plan.code if access.plan else None,
                        "rule": access.rule,
                        "event_id": access.event_id,
                        "ends_at": _iso(access.ends_at),
                    }
                    for access in check.givers
                ],
                "not_given_by": [
                    {
                        **_object_document(one.source),
                        "why": one.why.value,
                        "rule": one.rule,
                        "text": f"{WHY_TEXTS[one.why]}: {rule_text(one.rule)}",
                        "event_id": one.event_id,
                        "since": iso(one.since),
                    }
                    for one in explanation.withheld[check.key]
                ],
                "next": _next_of_feature(explanation, check.key),
            }
            for check in explanation.features
        ],
        "sources": [_source_document(source) for source in explanation.sources],
        "next_changes": [
            {
                "at": iso(change.at),
                "plan_code": change.after.plan_code,
                "status": change.after.status,
                "entitlements": {
                    key: {"before": before, "after": after}
                    for key, (before, after) in change.features.items()
                },
                "because": _because(change),
            }
            for change in explanation.next_changes
        ],
        "planned_changes": [
            {
                "at": iso(planned.at),
                **_planner_document(planned),
                "plan_codes": list(planned.plan_codes),
                "unknown": list(planned.unknown),
                "entitlements": {
                    key: {"before": before, "after": after}
                    for key, (before, after) in planned.features.items()
                },
                "text": _planned_text(planned),
            }
            for planned in explanation.planned
        ],
    }


def _next_of_feature(explanation: Explanation, key: str) -> dict[str, Any] | None:
    """The soonest change of a feature's value; `is_planned`: Stripe is to make it, so an event must still tell it."""
    certain = next((change for change in explanation.next_changes if key in change.features), None)
    planned = next((change for change in explanation.planned if key in change.features), None)
    if planned is not None and (certain is None or planned.at <= certain.at):
        return {
            "at": iso(planned.at),
            "value": planned.features[key][1],
            "is_planned": True,
            "because": [_planner_document(planned)],
        }
    if certain is None:
        return None
    return {
        "at": iso(certain.at),
        "value": certain.after.features[key],
        "is_planned": False,
        "because": _because(certain),
    }


def _object_document(source: SubjectId) -> dict[str, Any]:
    return {
        "source": source.key,
        "account": source.account or None,
        "object": OBJECTS.get(source.kind, source.kind),
        "object_id": source.object_id,
    }


def _planner_document(planned: Planned) -> dict[str, Any]:
    return {
        "source": planned.source.key,
        "account": planned.source.account or None,
        "object": planned.kind,
        "object_id": planned.object_id,
        "event_id": planned.event_id,
    }


def _planned_text(planned: Planned) -> str:
    """What is planned, in words."""
    wanted = ", ".join((*planned.plan_codes, *planned.unknown))
    what = f"moves {planned.source.key} to {wanted}" if wanted else f"ends {planned.source.key}"
    return f"{planned.kind} {planned.object_id} {what}; it counts once Stripe says that it has happened"


def _source_document(source: SourceExplanation) -> dict[str, Any]:
    return {
        **_object_document(source.id),
        "customer_id": source.customer_id,
        "status": source.reading.status,
        "counts": source.counts,
        "rule": source.reading.rule,
        "text": rule_text(source.reading.rule),
        "unknown": list(source.reading.unknown),
        "flags": list(source.reading.flags),
        "events": [
            {
                "event_id": fact.event_id,
                "event_type": fact.event_type,
                "occurred_at": iso(fact.as_of),
                "says": _says(fact),
            }
            for fact in source.facts
        ],
        "payments": [
            {
                "id": line.id,
                "event_type": line.event_type,
                "event_id": line.stripe_event_id,
                "amount": line.amount,
                "currency": line.currency,
                "settled": line.settled,
                "occurred_at": iso(line.occurred_at),
            }
            for line in source.payments
        ],
        "audit": [
            {"id": row.id, "action": row.action, "actor": row.actor, "created_at": iso(row.created_at)}
            for row in source.audit
        ],
    }


def _because(change: NextChange) -> list[dict[str, Any]]:
    return [
        {
            **_object_document(access.source),
            "plan_code": access.plan.code if access.plan else None,
            "what": what,
            "rule": access.rule,
            "text": rule_text(access.rule),
            "event_id": access.event_id,
        }
        for what, accesses in (("ends", change.end), ("begins", change.begin))
        for access in accesses
    ]


def explanation_text(explanation: Explanation) -> str:
    """The same for a terminal: lines without control characters, which ids from outside might carry."""
    return "\n".join(
        "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line)
        for line in _lines(explanation)
    )


def _lines(explanation: Explanation) -> Iterator[str]:
    view, entitlement = explanation.view, explanation.view.entitlement
    until = _until(entitlement.valid_until) if entitlement.valid_until else "until something is heard"
    yield (
        f"User {entitlement.user_id} at {iso(view.at)}: "
        f"plan {entitlement.plan_code}, {entitlement.status}, {until}"
    )
    for title, lines, otherwise in (
        ("Features", _feature_lines(explanation), "none"),
        ("Sources", _source_lines(explanation.sources), "none: nothing was ever heard of this user"),
        ("What changes next, if nothing more is heard", _change_lines(explanation.next_changes), "nothing"),
        ("What Stripe is to change", _planned_lines(explanation.planned), "nothing that is known"),
    ):
        yield ""
        yield title
        yield from (f"  {line}" for line in list(lines) or [otherwise])


def _feature_lines(explanation: Explanation) -> Iterator[str]:
    for check in explanation.features:
        yield f"{check.key} = {_value(check.value)}{'' if check.granted else ' (not granted)'}"
        yield f"    {rule_text(check.reason)} [{check.reason}]"
        for access in check.givers:
            yield f"    from {_access_text(access)}"
        for one in explanation.withheld[check.key]:
            yield f"    not from {one.source.key}: {WHY_TEXTS[one.why]} [{one.rule}], since {iso(one.since)}"
        following = _next_of_feature(explanation, check.key)
        if following is not None:
            planned = " (planned)" if following["is_planned"] else ""
            yield f"    from {following['at']} on: {_value(following['value'])}{planned}"


def _source_lines(sources: Iterable[SourceExplanation]) -> Iterator[str]:
    for source in sources:
        reading = source.reading
        name = f"{OBJECTS.get(source.id.kind, source.id.kind)} {source.id.object_id}"
        account = f" of account {source.id.account}" if source.id.account else ""
        customer = f" of customer {source.customer_id}" if source.customer_id else ""
        counts = "counts" if source.counts else "gives nothing now"
        yield f"{name}{account}{customer}: {reading.status}, {counts}"
        yield f"    {rule_text(reading.rule)} [{reading.rule}]"
        yield from (f"    gives {_access_text(access)}" for access in reading.accesses)
        yield from (f"    note: {note}" for note in (*reading.unknown, *reading.flags))
        yield from (f"    {line}" for line in _evidence_lines(source))


def _evidence_lines(source: SourceExplanation) -> Iterator[str]:
    for fact in source.facts:
        yield f"event {fact.event_id} {fact.event_type} at {iso(fact.as_of)}: {_says(fact)}"
    for line in source.payments:
        money = f"{line.amount} {line.currency}" if line.amount is not None else "no amount"
        settled = "settled" if line.settled else "not settled"
        yield f"payment {line.id} {line.event_type}: {money}, {settled} (event {line.stripe_event_id})"
    for row in source.audit:
        yield f"audit {row.id} {row.action} by {row.actor} at {iso(row.created_at)}"


def _change_lines(changes: Iterable[NextChange]) -> Iterator[str]:
    for change in changes:
        yield f"{iso(change.at)}: plan {change.after.plan_code}, {change.after.status}"
        for key, (before, after) in change.features.items():
            yield f"    {key}: {_value(before)} -> {_value(after)}"
        for what, accesses in (("ends", change.end), ("begins", change.begin)):
            for access in accesses:
                yield f"    because {_given(access)} {what}: {rule_text(access.rule)}"


def _planned_lines(planned_changes: Iterable[Planned]) -> Iterator[str]:
    for planned in planned_changes:
        yield f"{iso(planned.at)}: {_planned_text(planned)} (event {planned.event_id})"
        for key, (before, after) in planned.features.items():
            yield f"    {key}: {_value(before)} -> {_value(after)}"


def _access_text(access: Access) -> str:
    return f"{_given(access)}, from {iso(access.starts_at)} {_until(access.ends_at)}"


def _given(access: Access) -> str:
    given = access.plan.code if access.plan else _values(access.features)
    seats = f" x {access.quantity}" if access.quantity != 1 else ""
    return f"{given}{seats} by {access.source.key}"


def _until(end: datetime | None) -> str:
    return f"until {iso(end)}" if end else "without end"


def _values(features: Mapping[str, FeatureValue]) -> str:
    return ", ".join(f"{key} = {_value(value)}" for key, value in sorted(features.items()))


def _value(value: FeatureValue) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _says(fact: Fact) -> str:
    """What a fact asserts, in a few words."""
    says = _SAYS.get(fact.kind)
    return says(fact) if says is not None else fact.kind


def _says_subscription(fact: SubscriptionFact) -> str:
    return f"{fact.status}, ends at {iso(fact.cancel_at)}" if fact.cancel_at else fact.status


def _says_invoice(fact: InvoiceFact) -> str:
    return f"{fact.state.value}, {fact.amount}" if fact.amount is not None else fact.state.value


# Typed Any: each function takes the fact of its kind, which a mapping's type can't say.
_SAYS: Mapping[str, Callable[[Any], str]] = {
    "subscription": _says_subscription,
    "checkout": lambda fact: str(fact.state.value),
    "invoice": _says_invoice,
    "payment_intent": lambda fact: "paid" if fact.is_paid else "not paid",
    "refund": lambda fact: f"refund {fact.refund_id} of {fact.amount}, {fact.status}",
    "charge": lambda fact: f"{fact.amount_refunded} of {fact.amount} refunded",
    "dispute": lambda fact: f"dispute {fact.dispute_id} over {fact.amount}, {fact.status}",
    "fraud": lambda fact: "found to be fraud" if fact.is_confirmed else "warned of fraud",
    "ended": lambda fact: (
        "customer deleted" if fact.event_type == "customer.deleted" else "account disconnected"
    ),
    "schedule": lambda fact: f"schedule {fact.schedule_id}, {fact.status}, {len(fact.phases)} phases",
    "grant": lambda fact: f"{'taken back' if fact.is_removed else 'granted'} by {fact.actor}: {fact.reason}",
    "claim": lambda fact: f"given to {fact.user_id} by {fact.actor}: {fact.reason}",
}


def _iso(instant: datetime | None) -> str | None:
    return iso(instant) if instant else None
