"""What one event asserts: plain immutable values that the translation makes and the decision reads.

A *fact* is about one *source*, the thing access rests on. Facts of one source are kept side by
side; which of them is the newest is decided in `access.py`, never by the order of their arrival.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum, StrEnum
from typing import Literal, NamedTuple


class SourceId(NamedTuple):
    """A source's name; Stripe's ids are unique only within an account and a livemode.

    `key` is `sub:<subscription id>` or `cs:<checkout session id>`.
    """

    account: str
    livemode: bool
    key: str


class CustomerId(NamedTuple):
    """A Stripe customer's name, scoped like a source's."""

    account: str
    livemode: bool
    id: str


class Via(IntEnum):
    """How a user was found; the smaller number is the stronger evidence and wins."""

    CLIENT_REFERENCE_ID = 1
    METADATA = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A verified event's envelope. `account` is empty for the platform's own account."""

    account: str
    livemode: bool
    id: str
    type: str
    api_version: str | None
    occurred_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceRef:
    """What an event says about a price: any of its names, and the plan it declares in its metadata."""

    price_id: str | None = None
    lookup_key: str | None = None
    product_id: str | None = None
    metadata_plan_code: str | None = None

    @property
    def name(self) -> str:
        """The most telling name, for people."""
        return self.lookup_key or self.price_id or self.product_id or "unnamed price"


@dataclass(frozen=True, slots=True, kw_only=True)
class SubscriptionItem:
    """One item of a subscription; since the basil API each has its own billing period."""

    item_id: str
    price: PriceRef
    quantity: int
    period_end: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SubscriptionFact:
    """A snapshot of a subscription as it was when the event occurred."""

    kind: Literal["subscription"] = "subscription"
    event_id: str
    event_type: str
    as_of: datetime
    subscription_id: str
    customer_id: str | None
    status: str
    items: tuple[SubscriptionItem, ...]
    started_at: datetime | None
    trial_end: datetime | None
    cancel_at: datetime | None
    ended_at: datetime | None
    metadata_user_id: str | None
    metadata_plan_code: str | None


class CheckoutState(StrEnum):
    """How far a checkout session got."""

    AWAITING_PAYMENT = "awaiting_payment"
    PAID = "paid"
    FAILED = "failed"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True, kw_only=True)
class PurchaseLine:
    """One line of a checkout session, where the event carries the lines."""

    price: PriceRef
    quantity: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckoutFact:
    """What a checkout session says: a purchase of its own, or who and what a subscription is for."""

    kind: Literal["checkout"] = "checkout"
    event_id: str
    event_type: str
    as_of: datetime
    session_id: str
    mode: Literal["payment", "subscription"]
    state: CheckoutState
    customer_id: str | None
    subscription_id: str | None
    lines: tuple[PurchaseLine, ...]
    client_reference_id: str | None
    metadata_user_id: str | None
    metadata_plan_code: str | None


SourceFact = SubscriptionFact | CheckoutFact


def source_key(fact: SourceFact) -> str:
    """The key of the source that a fact is about."""
    if isinstance(fact, SubscriptionFact):
        return f"sub:{fact.subscription_id}"
    if fact.mode == "subscription":
        return f"sub:{fact.subscription_id}"
    return f"cs:{fact.session_id}"


def prices_of(fact: SourceFact) -> tuple[PriceRef, ...]:
    """The prices that a fact names."""
    entries = fact.items if isinstance(fact, SubscriptionFact) else fact.lines
    return tuple(entry.price for entry in entries)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tie:
    """An event's claim that a customer is a user. All claims are kept; the strongest, then the earliest, holds."""

    customer_id: str
    user_id: str
    via: Via
    occurred_at: datetime
    event_id: str

    @property
    def strength(self) -> tuple[int, datetime, str]:
        """Sorts the claim that holds first, whatever the order of arrival."""
        return (self.via, self.occurred_at, self.event_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class PaymentFact:
    """A line for the ledger.

    `effect_key` names the money itself, so that two events that report the same money make one line.
    `amount` is in the currency's smallest unit; `settled` says whether that money really moved.
    """

    effect_key: str
    event_type: str
    customer_id: str | None = None
    invoice_id: str | None = None
    subscription_id: str | None = None
    amount: int | None = None
    currency: str | None = None
    settled: bool = False
    metadata_user_id: str | None = None
    price: PriceRef | None = None
    metadata_plan_code: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Translation:
    """All that one event asserts. `expects_access`: without a known user the event must wait."""

    facts: tuple[SourceFact, ...] = ()
    ties: tuple[Tie, ...] = ()
    payments: tuple[PaymentFact, ...] = ()
    expects_access: bool = False
    customer_id: str | None = None
    subscription_id: str | None = None
