"""The terms of access: a source with its facts, the accesses it gives, and whom it belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from backend.app.billing.domain.catalog import Plan
from backend.app.billing.domain.facts import (
    CheckoutFact,
    ClaimFact,
    CustomerId,
    Fact,
    FeatureValue,
    GrantFact,
    InvoiceFact,
    PaymentIntentFact,
    SubjectId,
    SubscriptionFact,
    Tie,
    Via,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A source and its owner, if one is known; `facts` are its own and those of what it is linked to."""

    id: SubjectId
    customer_id: str | None
    user_id: str | None
    facts: tuple[Fact, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """A plan, or single feature values, that a source gives from `starts_at` until `ends_at` (exclusive).

    `part` is the item or line; `rule` names the row of the documentation that it follows from;
    `event_id` is the newest event it rests on.
    """

    source: SubjectId
    part: str
    plan: Plan | None
    features: Mapping[str, FeatureValue] = field(default_factory=dict)
    is_override: bool = False
    quantity: int = 1
    status: str
    rule: str
    event_id: str
    starts_at: datetime
    ends_at: datetime | None

    def is_live(self, at: datetime) -> bool:
        """Whether it holds at an instant."""
        return self.starts_at <= at and (self.ends_at is None or at < self.ends_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a source comes to.

    `status` is Stripe's word or one of ours; `as_of` when it became so; `rule` why it gives access or not;
    `grants` whether the status gives access; `pending` that it may do so yet; `sold` is the highest plan
    that it is about also where it gives none now; `unknown` names the prices or plans that the catalog
    lacks although access should follow from them.
    """

    status: str
    as_of: datetime
    rule: str
    event_id: str
    grants: bool
    pending: bool = False
    sold: Plan | None = None
    accesses: tuple[Access, ...] = ()
    unknown: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()

    @property
    def wants_user(self) -> bool:
        """Whether somebody should have access from it, now or as soon as more is heard."""
        return self.grants or self.pending

    @property
    def plan(self) -> Plan | None:
        """The highest plan it gives, else the one it sold: money that came after the end was for that one too."""
        plans = [access.plan for access in self.accesses if access.plan is not None]
        return max(plans, key=lambda plan: plan.rank, default=self.sold)


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


def named_users(facts: Iterable[Fact]) -> set[str]:
    """All users that facts name themselves."""
    return {user_id for fact in facts for _, user_id in _named_users(fact)}


def _named_users(fact: Fact) -> list[tuple[Via, str]]:
    named: list[tuple[Via, str]] = []
    if isinstance(fact, GrantFact) or (isinstance(fact, ClaimFact) and not fact.is_of_customer):
        named.append((Via.ADMIN, fact.user_id))
    if isinstance(fact, CheckoutFact) and fact.client_reference_id:
        named.append((Via.CLIENT_REFERENCE_ID, fact.client_reference_id))
    if (
        isinstance(fact, CheckoutFact | SubscriptionFact | InvoiceFact | PaymentIntentFact)
        and fact.metadata_user_id
    ):
        named.append((Via.METADATA, fact.metadata_user_id))
    return named
