"""What the facts of one source mean for access: the newest fact, its status, from when until when."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from backend.app.billing.domain.catalog import Catalog, Plan, Policy
from backend.app.billing.domain.facts import (
    CheckoutFact,
    CheckoutState,
    CustomerId,
    PriceRef,
    SourceFact,
    SourceId,
    SubscriptionFact,
    Tie,
    Via,
)

# Stripe's statuses that never change again; nothing that arrives later may overwrite them.
TERMINAL_STATUSES = frozenset({"canceled", "incomplete_expired"})
# Statuses under which a subscription gives access, at least for a while.
GRANTING_STATUSES = frozenset({"trialing", "active", "past_due"})
KNOWN_STATUSES = GRANTING_STATUSES | TERMINAL_STATUSES | {"incomplete", "unpaid", "paused"}

# Within one second (the resolution of an event's time) a subscription is created, then updated, then deleted.
_LIFE_ORDER = {"customer.subscription.created": 0, "customer.subscription.deleted": 2}
# A session that got paid stays paid; a failed or expired one was awaiting before.
_CHECKOUT_ORDER = {
    CheckoutState.AWAITING_PAYMENT: 0,
    CheckoutState.EXPIRED: 1,
    CheckoutState.FAILED: 1,
    CheckoutState.PAID: 2,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A source with the facts known about it (in no particular order) and its owner, if one is known."""

    id: SourceId
    customer_id: str | None
    user_id: str | None
    facts: tuple[SourceFact, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """A plan that a source gives from `starts_at` until `ends_at` (exclusive; None = without end)."""

    source: SourceId
    plan: Plan
    status: str
    starts_at: datetime
    ends_at: datetime | None

    def is_live(self, at: datetime) -> bool:
        """Whether it holds at an instant."""
        return self.starts_at <= at and (self.ends_at is None or at < self.ends_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a source comes to.

    `status` is Stripe's word; `as_of` when it became so; `grants` whether that status gives access;
    `pending` that only its checkout was heard of; `unknown` names the prices or plans that the catalog
    lacks although access should follow from them.
    """

    status: str
    as_of: datetime
    grants: bool
    pending: bool = False
    accesses: tuple[Access, ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def wants_user(self) -> bool:
        """Whether somebody should have access from it, now or as soon as more is heard."""
        return self.grants or self.pending

    @property
    def plan(self) -> Plan | None:
        """The highest plan it gives."""
        return max((access.plan for access in self.accesses), key=lambda plan: plan.rank, default=None)


def read_source(catalog: Catalog, source: Source) -> Reading:
    """The meaning of all facts of a source together; the order in which they came does not matter."""
    if source.id.key.startswith("sub:"):
        return _read_subscription(catalog, source)
    return _read_purchase(catalog, source)


def owner(source: Source, ties: Mapping[CustomerId, frozenset[Tie]]) -> str | None:
    """The user a source belongs to: named by the source's own facts, else the user its customer is tied to."""
    claims = [
        (via, fact.as_of, fact.event_id, user_id)
        for fact in source.facts
        for via, user_id in _named_users(fact)
    ]
    if claims:
        strongest = min(via for via, *_ in claims)
        # Stronger evidence wins; of equal evidence the newest, because metadata is how owners move a subscription.
        return max(claim for claim in claims if claim[0] == strongest)[-1]
    if source.customer_id is None:
        return None
    customer = CustomerId(source.id.account, source.id.livemode, source.customer_id)
    return bound_user(ties.get(customer, frozenset()))


def bound_user(ties: Iterable[Tie]) -> str | None:
    """The user a customer is tied to, or None."""
    holding = min(ties, key=lambda tie: tie.strength, default=None)
    return holding.user_id if holding else None


def _named_users(fact: SourceFact) -> list[tuple[Via, str]]:
    named: list[tuple[Via, str]] = []
    if isinstance(fact, CheckoutFact) and fact.client_reference_id:
        named.append((Via.CLIENT_REFERENCE_ID, fact.client_reference_id))
    if fact.metadata_user_id:
        named.append((Via.METADATA, fact.metadata_user_id))
    return named


def _read_subscription(catalog: Catalog, source: Source) -> Reading:
    snapshots = sorted(
        (fact for fact in source.facts if isinstance(fact, SubscriptionFact)), key=_subscription_order
    )
    checkouts = _checkouts(source)
    known = [fact for fact in snapshots if fact.status in KNOWN_STATUSES]
    if not known:
        # Only its checkout, or only statuses that we don't know: nothing to grant on.
        facts: Sequence[SourceFact] = snapshots or checkouts
        newest: SourceFact = max(facts, key=lambda fact: (fact.as_of, fact.event_id))
        return Reading(
            status=newest.status if isinstance(newest, SubscriptionFact) else "incomplete",
            as_of=newest.as_of,
            grants=False,
            pending=not snapshots,
        )
    fact = known[-1]
    if fact.status not in GRANTING_STATUSES:
        return Reading(status=fact.status, as_of=fact.ended_at or fact.as_of, grants=False)
    plan_hint = fact.metadata_plan_code or next(
        (checkout.metadata_plan_code for checkout in checkouts if checkout.metadata_plan_code), None
    )
    prices = [(item.price, item.period_end) for item in fact.items]
    plans, unknown = _plans_of(catalog, prices, plan_hint)
    return Reading(
        status=fact.status,
        as_of=fact.as_of,
        grants=True,
        accesses=tuple(
            Access(
                source=source.id,
                plan=plan,
                status=fact.status,
                starts_at=min(fact.started_at or fact.as_of, fact.as_of),
                ends_at=_subscription_end(catalog.policy, fact, period_end, known),
            )
            for plan, period_end in plans
        ),
        unknown=unknown,
    )


def _subscription_order(fact: SubscriptionFact) -> tuple[bool, datetime, int, datetime, str]:
    period_ends = [item.period_end for item in fact.items if item.period_end]
    return (
        fact.status in TERMINAL_STATUSES,
        fact.as_of,
        _LIFE_ORDER.get(fact.event_type, 1),
        max(period_ends, default=fact.as_of),
        fact.event_id,
    )


def _subscription_end(
    policy: Policy, fact: SubscriptionFact, period_end: datetime | None, history: Sequence[SubscriptionFact]
) -> datetime | None:
    """When a granting subscription stops to grant, if nothing more is heard of it."""
    if fact.status == "past_due":
        end: datetime | None = _past_due_since(history) + policy.past_due_grace
    elif fact.status == "trialing":
        end = fact.trial_end or period_end
    elif period_end is not None:
        end = period_end + policy.renewal_slack
    else:
        end = None
    if fact.cancel_at is not None:
        # A date the customer was told: kept exactly, without slack.
        end = fact.cancel_at if end is None else min(end, fact.cancel_at)
    return end


def _past_due_since(history: Sequence[SubscriptionFact]) -> datetime:
    """When the present delinquency began: `history` is in order and ends in past_due."""
    since = history[-1].as_of
    for fact in reversed(history):
        if fact.status != "past_due":
            break
        since = fact.as_of
    return since


def _read_purchase(catalog: Catalog, source: Source) -> Reading:
    facts = _checkouts(source)
    newest = max(facts, key=lambda fact: (_CHECKOUT_ORDER[fact.state], fact.as_of, fact.event_id))
    if newest.state is not CheckoutState.PAID:
        return Reading(status=newest.state.value, as_of=newest.as_of, grants=False)
    paid = [fact for fact in facts if fact.state is CheckoutState.PAID]
    paid_at = min(fact.as_of for fact in paid)
    plan_hint = next((fact.metadata_plan_code for fact in paid if fact.metadata_plan_code), None)
    lines = next((fact.lines for fact in facts if fact.lines), ())
    plans, unknown = _plans_of(catalog, [(line.price, None) for line in lines], plan_hint)
    return Reading(
        status="active",
        as_of=paid_at,
        grants=True,
        accesses=tuple(
            Access(source=source.id, plan=plan, status="active", starts_at=paid_at, ends_at=None)
            for plan, _ in plans
        ),
        unknown=unknown,
    )


def _checkouts(source: Source) -> list[CheckoutFact]:
    """A source's checkout facts, the oldest first: what several of them say, the first one said."""
    facts = [fact for fact in source.facts if isinstance(fact, CheckoutFact)]
    return sorted(facts, key=lambda fact: (fact.as_of, fact.event_id))


def resolve_plan(catalog: Catalog, price: PriceRef | None, plan_hint: str | None) -> Plan | None:
    """The plan of one price: the catalog first, then what the price declares, then the hint around it."""
    if price is not None:
        mapped = catalog.plan_of_price(price)
        if mapped is not None:
            return mapped
        if price.metadata_plan_code is not None:
            return catalog.plans.get(price.metadata_plan_code)
    return catalog.plans.get(plan_hint) if plan_hint is not None else None


def _plans_of(
    catalog: Catalog, prices: Sequence[tuple[PriceRef, datetime | None]], plan_hint: str | None
) -> tuple[list[tuple[Plan, datetime | None]], tuple[str, ...]]:
    """The plans of a source's prices, each with its period's end, and the names that the catalog lacks.

    The hint (metadata of the subscription or session) speaks for the source as a whole: it is taken
    where no price of it says anything, because it goes stale when a price changes.
    """
    plans: list[tuple[Plan, datetime | None]] = []
    unknown: list[str] = []
    for price, period_end in prices:
        plan = resolve_plan(catalog, price, None)
        if plan is not None:
            plans.append((plan, period_end))
        elif price.metadata_plan_code is not None:
            unknown.append(f"unknown_plan:{price.metadata_plan_code}")
        else:
            unknown.append(f"unknown_price:{price.name}")
    says_nothing = not plans and all(price.metadata_plan_code is None for price, _ in prices)
    if not says_nothing:
        return plans, tuple(unknown)
    if plan_hint is None:
        return [], tuple(unknown) or ("unknown_plan:none named",)
    if plan_hint not in catalog.plans:
        return [], (f"unknown_plan:{plan_hint}",)
    ends = [end for _, end in prices if end is not None]
    return [(catalog.plans[plan_hint], max(ends, default=None))], ()
