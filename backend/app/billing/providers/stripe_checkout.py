"""Checkout sessions: a purchase of its own, or the tie between a user and a new subscription."""

from __future__ import annotations

from typing import Literal

from backend.app.billing.domain.facts import (
    About,
    Alert,
    CheckoutFact,
    CheckoutState,
    Event,
    Link,
    PaymentFact,
    Translation,
    Via,
)
from backend.app.billing.providers.fields import Fields, TranslationError
from backend.app.billing.providers.registry import customer_of, ledger_type, strongest_tie, translates
from backend.app.billing.providers.stripe_prices import purchase_lines

CheckoutMode = Literal["payment", "subscription", "setup"]

_MODES: dict[str, CheckoutMode] = {"payment": "payment", "subscription": "subscription", "setup": "setup"}


@translates(
    "checkout.session.completed",
    "checkout.session.async_payment_succeeded",
    "checkout.session.async_payment_failed",
    "checkout.session.expired",
)
def checkout_session(event: Event, session: Fields, _previous: Fields) -> Translation | None:
    """A hosted checkout: paid, awaiting payment, failed or expired.

    Source: https://docs.stripe.com/api/checkout/sessions/object
    """
    mode = _mode(session)
    if mode == "setup":
        return None
    session_id = session.required_id("id")
    state = _state(event, session)
    customer_id = customer_of(session)
    subscription_id = session.id("subscription")
    invoice_id = session.id("invoice")
    intent_id = session.id("payment_intent")
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
        lines=purchase_lines(list(session.list_data("line_items"))),
        amount=session.amount("amount_total"),
        client_reference_id=session.user_id("client_reference_id"),
        metadata_user_id=metadata.user_id("user_id"),
        metadata_plan_code=metadata.text("plan_code"),
    )
    # A subscription session that ended without a subscription is about nothing that could give access.
    key = f"cs:{session_id}" if mode == "payment" else f"sub:{subscription_id}" if subscription_id else None
    settled = state is CheckoutState.PAID
    completed = event.type != "checkout.session.expired"
    parts = [f"pi:{intent_id}" if intent_id else None, f"in:{invoice_id}" if invoice_id else None]
    return Translation(
        subject=key,
        facts=(About(key=key, fact=fact),) if key else (),
        links=tuple(Link(child=part, parent=key) for part in parts if part and key),
        ties=strongest_tie(
            event,
            customer_id if completed else None,
            (Via.CLIENT_REFERENCE_ID, fact.client_reference_id),
            (Via.METADATA, fact.metadata_user_id),
        ),
        payments=(
            PaymentFact(
                # A session is paid once, by one of two events; what did not settle is a line of its own.
                effect_key=f"cs:{session_id}" if settled else f"cs:{session_id}:{ledger_type(event.type)}",
                event_type=ledger_type(event.type),
                customer_id=customer_id,
                invoice_id=invoice_id,
                subscription_id=subscription_id,
                amount=fact.amount,
                currency=session.text("currency"),
                settled=settled,
                metadata_user_id=fact.client_reference_id or fact.metadata_user_id,
                metadata_plan_code=fact.metadata_plan_code,
                metadata=session.metadata(),
            ),
        ),
        expects_access=key is not None and (settled or (mode == "subscription" and completed)),
        customer_id=customer_id,
        alerts=(
            Alert(text=f"Checkout {session_id}: the payment failed (event {event.id}); nothing was granted."),
        )
        if state is CheckoutState.FAILED
        else (),
    )


def _mode(session: Fields) -> CheckoutMode:
    mode = session.text("mode")
    if mode is not None:
        if mode not in _MODES:
            # To guess what a new mode sells would be to grant by a guess.
            raise TranslationError(f"{session.path}.mode is not a mode we know")
        return _MODES[mode]
    # Sessions of 2019 have no mode; what they made tells it.
    if session.id("subscription") is not None:
        return "subscription"
    return "setup" if session.id("setup_intent") is not None else "payment"


def _state(event: Event, session: Fields) -> CheckoutState:
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
