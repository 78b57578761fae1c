"""Stripe's events of any API version, translated into facts: one small pure function per family of types.

Shapes are told apart by the fields that are there, never by the version's number: an account keeps
the version it was created with, and a webhook endpoint may pin another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

from backend.app.billing.domain.access import GRANTING_STATUSES, TERMINAL_STATUSES
from backend.app.billing.domain.facts import (
    CheckoutFact,
    CheckoutState,
    Event,
    PaymentFact,
    PriceRef,
    PurchaseLine,
    SubscriptionFact,
    SubscriptionItem,
    Tie,
    Translation,
    Via,
)
from backend.app.billing.providers.fields import Fields, TranslationError
from backend.app.billing.providers.stripe_event import StripeEvent

Translator = Callable[[Event, Fields], Translation | None]

CheckoutMode = Literal["payment", "subscription", "setup"]

_CHECKOUT_MODES: dict[str, CheckoutMode] = {
    "payment": "payment",
    "subscription": "subscription",
    "setup": "setup",
}

TRANSLATORS: dict[str, Translator] = {}


def translates(*event_types: str) -> Callable[[Translator], Translator]:
    """Registers a function for some event types."""

    def register(function: Translator) -> Translator:
        for event_type in event_types:
            TRANSLATORS[event_type] = function
        return function

    return register


def translate(event: StripeEvent) -> Translation | None:
    """What an event asserts, or None where nothing here depends on it.

    Raises:
        TranslationError: a field is of a type that no published API version gives it.
    """
    translator = TRANSLATORS.get(event.envelope.type)
    if translator is None:
        return None
    return translator(event.envelope, Fields(event.object, "data.object"))


def ledger_type(event_type: str) -> str:
    """Stripe's type as `payment_events.event_type` spells it: checkout.session.completed -> checkout_completed."""
    words = event_type.removeprefix("customer.").split(".")
    return "_".join(word for word in words if word != "session")


@translates(
    "checkout.session.completed",
    "checkout.session.async_payment_succeeded",
    "checkout.session.async_payment_failed",
    "checkout.session.expired",
)
def checkout_session(event: Event, session: Fields) -> Translation | None:
    """A hosted checkout: a purchase of its own, or the tie between a user and a new subscription.

    Source: https://docs.stripe.com/api/checkout/sessions/object
    """
    mode = _checkout_mode(session)
    if mode == "setup":
        return None
    session_id = session.required_id("id")
    state = _checkout_state(event, session)
    customer_id = session.id("customer")
    subscription_id = session.id("subscription")
    metadata = session.object("metadata")
    fact = CheckoutFact(
        event_id=event.id,
        event_type=event.type,
        as_of=event.occurred_at,
        session_id=session_id,
        mode=mode,
        state=state,
        customer_id=customer_id,
        subscription_id=subscription_id,
        lines=tuple(
            PurchaseLine(price=_price(line), quantity=line.amount("quantity") or 1)
            for line in session.list_data("line_items")
        ),
        client_reference_id=session.user_id("client_reference_id"),
        metadata_user_id=metadata.user_id("user_id"),
        metadata_plan_code=metadata.text("plan_code"),
    )
    settled = state is CheckoutState.PAID
    payment = PaymentFact(
        # A session is paid once, by one of two events; what did not settle is a line of its own.
        effect_key=f"cs:{session_id}" if settled else f"cs:{session_id}:{ledger_type(event.type)}",
        event_type=ledger_type(event.type),
        customer_id=customer_id,
        invoice_id=session.id("invoice"),
        subscription_id=subscription_id,
        amount=session.amount("amount_total"),
        currency=session.text("currency"),
        settled=settled,
        metadata_plan_code=fact.metadata_plan_code,
        metadata=session.metadata(),
    )
    completed = event.type != "checkout.session.expired"
    # A subscription session that ended without a subscription is about nothing that could give access.
    has_source = mode == "payment" or subscription_id is not None
    return Translation(
        facts=(fact,) if has_source else (),
        ties=_ties(
            event,
            customer_id if completed else None,
            (Via.CLIENT_REFERENCE_ID, fact.client_reference_id),
            (Via.METADATA, fact.metadata_user_id),
        ),
        payments=(payment,),
        expects_access=has_source and (settled or (mode == "subscription" and completed)),
        customer_id=customer_id,
        subscription_id=subscription_id,
    )


@translates(
    "customer.subscription.created",
    "customer.subscription.updated",
    "customer.subscription.deleted",
    "customer.subscription.paused",
    "customer.subscription.resumed",
    "customer.subscription.pending_update_applied",
    "customer.subscription.pending_update_expired",
    "customer.subscription.trial_will_end",
)
def subscription(event: Event, snapshot: Fields) -> Translation:
    """A subscription as it stood when the event occurred; the contents of a `pending_update` are not read.

    Source: https://docs.stripe.com/api/subscriptions/object
    """
    subscription_id = snapshot.required_id("id")
    customer_id = snapshot.id("customer")
    metadata = snapshot.object("metadata")
    status = snapshot.text("status") or "missing"
    if event.type == "customer.subscription.deleted" and status not in TERMINAL_STATUSES:
        status = "canceled"
    # Until basil (2025-03-31) the period stood on the subscription, since then on each item.
    period_end = snapshot.instant("current_period_end")
    items = tuple(
        SubscriptionItem(
            item_id=item.id("id") or f"item-{index}",
            price=_price(item),
            quantity=item.amount("quantity") or 1,
            period_end=item.instant("current_period_end") or period_end,
        )
        for index, item in enumerate(snapshot.list_data("items"))
    )
    ends = [item.period_end for item in items if item.period_end is not None]
    last_period_end = max(ends, default=period_end)
    cancel_at = snapshot.instant("cancel_at")
    if cancel_at is None and snapshot.flag("cancel_at_period_end"):
        cancel_at = last_period_end
    fact = SubscriptionFact(
        event_id=event.id,
        event_type=event.type,
        as_of=event.occurred_at,
        subscription_id=subscription_id,
        customer_id=customer_id,
        status=status,
        items=items,
        started_at=snapshot.instant("start_date") or snapshot.instant("created"),
        trial_end=snapshot.instant("trial_end"),
        cancel_at=cancel_at,
        ended_at=snapshot.instant("ended_at"),
        metadata_user_id=metadata.user_id("user_id"),
        metadata_plan_code=metadata.text("plan_code"),
    )
    return Translation(
        facts=(fact,),
        ties=_ties(event, customer_id, (Via.METADATA, fact.metadata_user_id)),
        payments=(
            PaymentFact(
                effect_key=f"evt:{event.id}",
                event_type=ledger_type(event.type),
                customer_id=customer_id,
                subscription_id=subscription_id,
                metadata=snapshot.metadata(),
            ),
        ),
        expects_access=status in GRANTING_STATUSES,
        customer_id=customer_id,
        subscription_id=subscription_id,
    )


@translates("invoice.paid", "invoice.payment_succeeded", "invoice.payment_failed")
def invoice(event: Event, document: Fields) -> Translation:
    """An invoice that was paid or could not be; access follows from its subscription's state, not from it.

    Source: https://docs.stripe.com/api/invoices/object
    """
    invoice_id = document.required_id("id")
    customer_id = document.id("customer")
    lines = list(document.list_data("lines"))
    subscription_id = _invoice_subscription(document, lines)
    paid = event.type != "invoice.payment_failed"
    user_id, plan_code = _invoice_metadata(document, lines)
    attempt = document.amount("attempt_count") or 0
    return Translation(
        ties=_ties(event, customer_id, (Via.METADATA, user_id)),
        payments=(
            PaymentFact(
                # invoice.paid and invoice.payment_succeeded report the same money.
                effect_key=f"in:{invoice_id}" if paid else f"in:{invoice_id}:failed:{attempt}",
                event_type=ledger_type(event.type),
                customer_id=customer_id,
                invoice_id=invoice_id,
                subscription_id=subscription_id,
                amount=document.amount("amount_paid" if paid else "amount_due"),
                currency=document.text("currency"),
                settled=paid,
                metadata_user_id=user_id,
                price=_invoice_price(lines),
                metadata_plan_code=plan_code,
                metadata=document.metadata(),
            ),
        ),
        expects_access=paid and subscription_id is not None,
        customer_id=customer_id,
        subscription_id=subscription_id,
    )


@translates(
    "charge.succeeded",
    "charge.failed",
    "charge.pending",
    "charge.captured",
    "charge.expired",
    "charge.updated",
    "charge.refunded",
)
def charge(event: Event, document: Fields) -> Translation:
    """A charge: a line in the ledger.

    Source: https://docs.stripe.com/api/charges/object
    """
    amount_key = {"charge.refunded": "amount_refunded", "charge.captured": "amount_captured"}.get(event.type)
    amount = document.amount(amount_key) if amount_key else None
    settled = event.type in ("charge.captured", "charge.refunded") or (
        event.type == "charge.succeeded" and document.flag("captured") is not False
    )
    # Later refunds of the same charge report a larger sum; updates have no number of their own.
    part = {"charge.refunded": f":{amount}", "charge.updated": f":{event.id}"}.get(event.type, "")
    return _money(
        event, document, "ch", amount if amount is not None else document.amount("amount"), settled, part
    )


@translates(
    "payment_intent.succeeded",
    "payment_intent.processing",
    "payment_intent.payment_failed",
    "payment_intent.canceled",
    "payment_intent.created",
    "payment_intent.partially_funded",
    "payment_intent.requires_action",
    "payment_intent.amount_capturable_updated",
)
def payment_intent(event: Event, document: Fields) -> Translation:
    """A payment intent: a line in the ledger.

    Source: https://docs.stripe.com/api/payment_intents/object
    """
    settled = event.type == "payment_intent.succeeded"
    received = document.amount("amount_received") if settled else None
    part = "" if settled else f":{event.id}"
    return _money(
        event, document, "pi", received if received is not None else document.amount("amount"), settled, part
    )


@translates("refund.created", "refund.updated", "refund.failed", "charge.refund.updated")
def refund(event: Event, document: Fields) -> Translation:
    """A refund: one line in the ledger for each status it reaches.

    Source: https://docs.stripe.com/api/refunds/object
    """
    status = document.text("status") or "unknown"
    return _money(event, document, "re", document.amount("amount"), status == "succeeded", f":{status}")


@translates(
    "charge.dispute.created",
    "charge.dispute.updated",
    "charge.dispute.closed",
    "charge.dispute.funds_withdrawn",
    "charge.dispute.funds_reinstated",
)
def dispute(event: Event, document: Fields) -> Translation:
    """A dispute: a line in the ledger; only the movements of its funds are settled money.

    Source: https://docs.stripe.com/api/disputes/object
    """
    settled = event.type in ("charge.dispute.funds_withdrawn", "charge.dispute.funds_reinstated")
    part = "" if settled else f":{event.id}"
    return _money(event, document, "dp", document.amount("amount"), settled, part)


def _money(
    event: Event, document: Fields, prefix: str, amount: int | None, settled: bool, part: str
) -> Translation:
    """A ledger line for an object that gives nobody access by itself."""
    object_id = document.id("id")
    customer_id = document.id("customer")
    return Translation(
        payments=(
            PaymentFact(
                effect_key=(
                    f"{prefix}:{object_id}:{ledger_type(event.type) if prefix != 're' else 'refund'}{part}"
                    if object_id
                    else f"evt:{event.id}"
                ),
                event_type=ledger_type(event.type),
                customer_id=customer_id,
                # Gone since basil, where only an invoice payment links the two.
                invoice_id=document.id("invoice"),
                amount=amount,
                currency=document.text("currency"),
                settled=settled,
                metadata_user_id=document.object("metadata").user_id("user_id"),
                metadata_plan_code=document.object("metadata").text("plan_code"),
                metadata=document.metadata(),
            ),
        ),
        customer_id=customer_id,
    )


def _ties(event: Event, customer_id: str | None, *named: tuple[Via, str | None]) -> tuple[Tie, ...]:
    """The strongest of the users an event names, tied to its customer."""
    users = [(via, user_id) for via, user_id in named if user_id is not None]
    if customer_id is None or not users:
        return ()
    via, user_id = min(users)
    return (
        Tie(
            customer_id=customer_id,
            user_id=user_id,
            via=via,
            occurred_at=event.occurred_at,
            event_id=event.id,
        ),
    )


def _checkout_mode(session: Fields) -> CheckoutMode:
    mode = session.text("mode")
    if mode is not None:
        if mode not in _CHECKOUT_MODES:
            # To guess what a new mode sells would be to grant by a guess.
            raise TranslationError(f"{session.path}.mode is not a mode we know")
        return _CHECKOUT_MODES[mode]
    # Sessions of 2019 have no mode; what they made tells it.
    if session.id("subscription") is not None:
        return "subscription"
    return "setup" if session.id("setup_intent") is not None else "payment"


def _checkout_state(event: Event, session: Fields) -> CheckoutState:
    fixed = {
        "checkout.session.async_payment_succeeded": CheckoutState.PAID,
        "checkout.session.async_payment_failed": CheckoutState.FAILED,
        "checkout.session.expired": CheckoutState.EXPIRED,
    }.get(event.type)
    if fixed is not None:
        return fixed
    # Before payment_status existed (2020) a session completed only by being paid.
    paid = not session.has("payment_status") or session.text("payment_status") in (
        "paid",
        "no_payment_required",
    )
    return CheckoutState.PAID if paid else CheckoutState.AWAITING_PAYMENT


def _price(item: Fields) -> PriceRef:
    """The price of a subscription item or checkout line: `price` since 2020, `plan` before."""
    price = item.object("price") if item.object("price").data else item.object("plan")
    price_id = item.id("price") or item.id("plan")
    declared = price.object("metadata").text("plan_code")
    return PriceRef(
        price_id=price_id,
        lookup_key=price.text("lookup_key"),
        product_id=price.id("product"),
        metadata_plan_code=declared or price.object("product").object("metadata").text("plan_code"),
    )


def _invoice_subscription(document: Fields, lines: Iterable[Fields]) -> str | None:
    """An invoice's subscription: under `parent` since basil, at the top before, or on its lines."""
    found = document.object("parent").object("subscription_details").id("subscription") or document.id(
        "subscription"
    )
    for line in lines:
        found = (
            found
            or line.object("parent").object("subscription_item_details").id("subscription")
            or line.id("subscription")
        )
    return found


def _invoice_metadata(document: Fields, lines: Iterable[Fields]) -> tuple[str | None, str | None]:
    """The user and the plan that an invoice, or the subscription behind it, names."""
    places = [
        document.object("parent").object("subscription_details").object("metadata"),
        document.object("subscription_details").object("metadata"),
        document.object("metadata"),
        *(line.object("metadata") for line in lines),
    ]
    user_id = next((user for place in places if (user := place.user_id("user_id"))), None)
    plan_code = next((plan for place in places if (plan := place.text("plan_code"))), None)
    return user_id, plan_code


def _invoice_price(lines: Iterable[Fields]) -> PriceRef | None:
    """The price an invoice is for: that of its largest line, because prorations credit the old one."""
    best: tuple[int, PriceRef] | None = None
    for line in lines:
        details = line.object("pricing").object("price_details")
        price = _price(line)
        if details.data:
            price = PriceRef(
                price_id=details.id("price"),
                lookup_key=details.object("price").text("lookup_key"),
                product_id=details.id("product"),
            )
        amount = line.amount("amount") or 0
        if (price.price_id or price.product_id) and (best is None or amount > best[0]):
            best = (amount, price)
    return best[1] if best else None
