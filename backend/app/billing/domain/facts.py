"""What one event asserts: plain immutable values that the translation makes and the decision reads.

A *fact* is about one *subject*, named by a key such as `sub:sub_1` or `pi:pi_1`. Subjects that access
can rest on are *sources*; the others (payments, invoices, customers) bear on the sources they are
linked to, and these *inherit* their facts. All facts of a subject are kept side by side; which of them
counts is decided when they are read, never by the order of their arrival.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum, StrEnum
from typing import Literal, NamedTuple

FeatureValue = bool | int | str

# Kinds of keys that access can rest on: subscription, checkout session, manual invoice, direct payment, manual grant.
SOURCE_KINDS = frozenset({"sub", "cs", "in", "pi", "grant"})


class SubjectId(NamedTuple):
    """A subject's name; Stripe's ids are unique only within an account and a livemode.

    `key` is `<kind>:<id>`; kinds are sub, cs, in, pi, ch, grant, cus, acct and clock.
    """

    account: str
    livemode: bool
    key: str

    @property
    def kind(self) -> str:
        """What it is: the part before the colon."""
        return self.key.partition(":")[0]

    @property
    def object_id(self) -> str:
        """The id of the object itself."""
        return self.key.partition(":")[2]


class CustomerId(NamedTuple):
    """A Stripe customer's name, scoped like a subject's."""

    account: str
    livemode: bool
    id: str


class Via(IntEnum):
    """How a user was found; the smaller number is the stronger evidence and wins."""

    ADMIN = 0
    CHECKOUT_RECORD = 1
    CLIENT_REFERENCE_ID = 2
    METADATA = 3


# A person's action goes through the same decision as an event; no id of Stripe's has a colon.
ACTION_ID_PREFIX = "action:"

# Stripe's ids are unique within an account and a mode.
EventKey = tuple[str, bool, str]
# A piece of money's own name: the events that report it name the same `effect_key`.
MoneyKey = tuple[str, bool, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A verified event's envelope. `account` is empty for the platform's own account."""

    account: str
    livemode: bool
    id: str
    type: str
    api_version: str | None
    occurred_at: datetime

    @property
    def key(self) -> EventKey:
        """What tells it from all other events."""
        return self.account, self.livemode, self.id


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
    trial_end: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SubscriptionFact:
    """A snapshot of a subscription as it was when the event occurred.

    `state` are the watched fields in one comparable text form each, `previous` what the event says
    they were just before; together they order two snapshots of one second.
    """

    kind: Literal["subscription"] = "subscription"
    event_id: str
    event_type: str
    as_of: datetime
    subscription_id: str
    customer_id: str | None
    status: str
    items: tuple[SubscriptionItem, ...]
    period_end: datetime | None
    started_at: datetime | None
    trial_end: datetime | None
    cancel_at: datetime | None
    ended_at: datetime | None
    pause_behavior: str | None = None
    metadata_user_id: str | None
    metadata_plan_code: str | None
    state: Mapping[str, str] = field(default_factory=dict)
    previous: Mapping[str, str] = field(default_factory=dict)


class CheckoutState(StrEnum):
    """How far a checkout session got."""

    AWAITING_PAYMENT = "awaiting_payment"
    PAID = "paid"
    FAILED = "failed"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True, kw_only=True)
class PurchaseLine:
    """One line of a purchase, where the event carries the lines.

    `amount` is what all of its units cost together, in the currency's smallest unit, where the line says so.
    """

    line_id: str
    price: PriceRef
    quantity: int
    amount: int | None = None


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
    amount: int | None = None
    client_reference_id: str | None
    metadata_user_id: str | None
    metadata_plan_code: str | None


class InvoiceState(StrEnum):
    """What an invoice event reports."""

    PAID = "paid"
    PAYMENT_FAILED = "payment_failed"
    VOIDED = "voided"
    UNCOLLECTIBLE = "uncollectible"


@dataclass(frozen=True, slots=True, kw_only=True)
class InvoiceFact:
    """What became of an invoice; `lines` only where it is a purchase of its own (`billing_reason` manual)."""

    kind: Literal["invoice"] = "invoice"
    event_id: str
    event_type: str
    as_of: datetime
    invoice_id: str
    subscription_id: str | None
    customer_id: str | None
    state: InvoiceState
    amount: int | None
    lines: tuple[PurchaseLine, ...] = ()
    metadata_user_id: str | None
    metadata_plan_code: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PaymentIntentFact:
    """A payment that names our user and plan itself, without a checkout session around it."""

    kind: Literal["payment_intent"] = "payment_intent"
    event_id: str
    event_type: str
    as_of: datetime
    intent_id: str
    customer_id: str | None
    is_paid: bool
    amount: int | None
    metadata_user_id: str | None
    metadata_plan_code: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RefundFact:
    """A refund's state; several events report it, the newest of a refund counts."""

    kind: Literal["refund"] = "refund"
    event_id: str
    event_type: str
    as_of: datetime
    refund_id: str
    amount: int
    status: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChargeFact:
    """What a charge says of its refunds: how much of it was given back so far."""

    kind: Literal["charge"] = "charge"
    event_id: str
    event_type: str
    as_of: datetime
    charge_id: str
    amount: int
    amount_refunded: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DisputeFact:
    """A dispute's state."""

    kind: Literal["dispute"] = "dispute"
    event_id: str
    event_type: str
    as_of: datetime
    dispute_id: str
    amount: int
    status: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FraudFact:
    """A warning of fraud, or a review that ended as fraud."""

    kind: Literal["fraud"] = "fraud"
    event_id: str
    event_type: str
    as_of: datetime
    is_confirmed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedFact:
    """The customer was deleted, or the account left: whatever rested on it has ended."""

    kind: Literal["ended"] = "ended"
    event_id: str
    event_type: str
    as_of: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockFact:
    """How far a test clock was moved: `as_of` is the clock's time, which may lie ahead of ours.

    What has occurred is in force, so the users of what hangs on the clock are in its time.
    """

    kind: Literal["clock"] = "clock"
    event_id: str
    event_type: str
    as_of: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulePhase:
    """From when on a schedule wants which prices."""

    starts_at: datetime
    prices: tuple[PriceRef, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleFact:
    """What is planned for a subscription. Shown to people; it counts once the subscription itself has changed."""

    kind: Literal["schedule"] = "schedule"
    event_id: str
    event_type: str
    as_of: datetime
    schedule_id: str
    status: str
    phases: tuple[SchedulePhase, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantFact:
    """A person's decision: a plan or single feature values for a user, from and until when, or its end."""

    kind: Literal["grant"] = "grant"
    event_id: str
    event_type: str
    as_of: datetime
    grant_id: str
    user_id: str
    plan_code: str | None
    features: Mapping[str, FeatureValue]
    is_override: bool
    starts_at: datetime
    ends_at: datetime | None
    is_removed: bool
    reason: str
    actor: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimFact:
    """A person's word that a source belongs to a user: how a guest's purchase finds its owner.

    One `is_of_customer` is about the customer it is kept under; there the tie that was made with it decides.
    """

    kind: Literal["claim"] = "claim"
    event_id: str
    event_type: str
    as_of: datetime
    user_id: str
    actor: str
    reason: str
    is_of_customer: bool = False


Fact = (
    SubscriptionFact
    | CheckoutFact
    | InvoiceFact
    | PaymentIntentFact
    | RefundFact
    | ChargeFact
    | DisputeFact
    | FraudFact
    | EndedFact
    | ClockFact
    | ScheduleFact
    | GrantFact
    | ClaimFact
)


def series_of(fact: Fact) -> str:
    """Which facts of a subject follow each other, so that the newest of them are enough to tell what they come to."""
    # Each state by itself: many failed invoices must not push the last paid one out.
    return f"invoice.{fact.state}" if isinstance(fact, InvoiceFact) else fact.kind


def prices_of(fact: Fact) -> tuple[PriceRef, ...]:
    """The prices that a fact names."""
    if isinstance(fact, SubscriptionFact):
        return tuple(item.price for item in fact.items)
    if isinstance(fact, CheckoutFact | InvoiceFact):
        return tuple(line.price for line in fact.lines)
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """A fact and the key of the subject it is about."""

    key: str
    fact: Fact


@dataclass(frozen=True, slots=True, order=True, kw_only=True)
class Link:
    """`child` bears on `parent`, both subject keys of one account and livemode.

    A charge bears on its payment, a payment on its invoice or session, an invoice on its subscription,
    a test clock on its customers and their subscriptions.
    """

    child: str
    parent: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tie:
    """A claim that a customer is a user. All are kept; the strongest holds, of equals the earliest, of a person's the newest."""

    customer_id: str
    user_id: str
    via: Via
    occurred_at: datetime
    event_id: str

    @property
    def strength(self) -> tuple[int, float, str]:
        """Sorts the claim that holds first, whatever the order of arrival."""
        seconds = self.occurred_at.timestamp()
        # Of a person's words the newest holds: that is how a mistake is mended. Of all other evidence the earliest.
        return (self.via, -seconds if self.via is Via.ADMIN else seconds, self.event_id)


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
class Alert:
    """A text for the owner.

    What is `routine` comes with every billing run: of an event's type the owner hears once a day.
    """

    text: str
    is_routine: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Translation:
    """All that one event asserts.

    `subject` is what the event is about, even where it adds no fact to it. `expects_access`: access
    should follow, so without a known user the event must wait. `alerts` are for the owner.
    """

    subject: str | None = None
    facts: tuple[About, ...] = ()
    links: tuple[Link, ...] = ()
    ties: tuple[Tie, ...] = ()
    payments: tuple[PaymentFact, ...] = ()
    expects_access: bool = False
    customer_id: str | None = None
    alerts: tuple[Alert, ...] = ()
