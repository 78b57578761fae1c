"""Money itself: charges, payment intents, refunds, disputes and warnings of fraud."""

from __future__ import annotations

from backend.app.billing.domain.facts import (
    About,
    Alert,
    ChargeFact,
    DisputeFact,
    Event,
    FraudFact,
    Link,
    PaymentFact,
    PaymentIntentFact,
    RefundFact,
    Translation,
    Via,
)
from backend.app.billing.providers.fields import Fields
from backend.app.billing.providers.registry import customer_of, ledger_type, strongest_tie, translates


@translates(
    "charge.succeeded",
    "charge.failed",
    "charge.pending",
    "charge.captured",
    "charge.expired",
    "charge.updated",
    "charge.refunded",
)
def charge(event: Event, document: Fields, _previous: Fields) -> Translation:
    """A charge: a line in the ledger, and how much of it was refunded.

    Source: https://docs.stripe.com/api/charges/object
    """
    amount = document.amount("amount")
    amount_key = {"charge.refunded": "amount_refunded", "charge.captured": "amount_captured"}.get(event.type)
    moved = document.amount(amount_key) if amount_key else None
    settled = event.type in ("charge.captured", "charge.refunded") or (
        event.type == "charge.succeeded" and document.flag("captured") is not False
    )
    # Later refunds of the same charge report a larger sum; updates have no number of their own.
    part = {"charge.refunded": f":{moved}", "charge.updated": f":{event.id}"}.get(event.type, "")
    charge_id, key = document.id("id"), _paying(document)
    refunded = document.amount("amount_refunded") or 0
    facts: tuple[About, ...] = ()
    if key and charge_id and refunded > 0:
        facts = (
            About(
                key=key,
                fact=ChargeFact(
                    event_id=event.id,
                    event_type=event.type,
                    as_of=event.occurred_at,
                    charge_id=charge_id,
                    amount=amount or 0,
                    amount_refunded=refunded,
                ),
            ),
        )
    return _money(
        event,
        document,
        "ch",
        part,
        amount=moved if moved is not None else amount,
        settled=settled,
        facts=facts,
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
def payment_intent(event: Event, document: Fields, _previous: Fields) -> Translation:
    """A payment: a line in the ledger; one that names our plan in its metadata is a purchase of its own.

    Source: https://docs.stripe.com/api/payment_intents/object
    """
    settled = event.type == "payment_intent.succeeded"
    received = document.amount("amount_received") if settled else None
    amount = received if received is not None else document.amount("amount")
    metadata = document.object("metadata")
    intent_id, plan_code = document.id("id"), metadata.text("plan_code")
    facts: tuple[About, ...] = ()
    if intent_id and plan_code:
        fact = PaymentIntentFact(
            event_id=event.id,
            event_type=event.type,
            as_of=event.occurred_at,
            intent_id=intent_id,
            customer_id=customer_of(document),
            is_paid=settled,
            amount=amount,
            metadata_user_id=metadata.user_id("user_id"),
            metadata_plan_code=plan_code,
        )
        facts = (About(key=f"pi:{intent_id}", fact=fact),)
    return _money(
        event,
        document,
        "pi",
        "" if settled else f":{event.id}",
        amount=amount,
        settled=settled,
        facts=facts,
        expects_access=settled and bool(facts),
    )


@translates("refund.created", "refund.updated", "refund.failed", "charge.refund.updated")
def refund(event: Event, document: Fields, _previous: Fields) -> Translation:
    """A refund: one line in the ledger for each status it reaches; it bears on the purchase it gives back.

    Source: https://docs.stripe.com/api/refunds/object
    """
    status = document.text("status") or ("failed" if event.type == "refund.failed" else "unknown")
    refund_id, key = document.id("id"), _paying(document)
    facts: tuple[About, ...] = ()
    if refund_id and key:
        fact = RefundFact(
            event_id=event.id,
            event_type=event.type,
            as_of=event.occurred_at,
            refund_id=refund_id,
            amount=document.amount("amount") or 0,
            status=status,
        )
        facts = (About(key=key, fact=fact),)
    return _money(
        event,
        document,
        "re",
        f":{status}",
        amount=document.amount("amount"),
        settled=status == "succeeded",
        facts=facts,
    )


@translates(
    "charge.dispute.created",
    "charge.dispute.updated",
    "charge.dispute.closed",
    "charge.dispute.funds_withdrawn",
    "charge.dispute.funds_reinstated",
)
def dispute(event: Event, document: Fields, _previous: Fields) -> Translation:
    """A dispute: it suspends what was bought with the payment; only the movements of its funds are settled money.

    Source: https://docs.stripe.com/api/disputes/object
    """
    settled = event.type in ("charge.dispute.funds_withdrawn", "charge.dispute.funds_reinstated")
    dispute_id, key = document.id("id"), _paying(document)
    status = document.text("status") or "unknown"
    facts: tuple[About, ...] = ()
    if dispute_id and key:
        fact = DisputeFact(
            event_id=event.id,
            event_type=event.type,
            as_of=event.occurred_at,
            dispute_id=dispute_id,
            amount=document.amount("amount") or 0,
            status=status,
        )
        facts = (About(key=key, fact=fact),)
    alert = Alert(text=f"Dispute {dispute_id} of {key} is {status} (event {event.id}).")
    return _money(
        event,
        document,
        "dp",
        "" if settled else f":{event.id}",
        amount=document.amount("amount"),
        settled=settled,
        facts=facts,
        alerts=(alert,) if event.type in ("charge.dispute.created", "charge.dispute.closed") else (),
    )


@translates(
    "radar.early_fraud_warning.created",
    "radar.early_fraud_warning.updated",
    "review.opened",
    "review.closed",
)
def fraud(event: Event, document: Fields, _previous: Fields) -> Translation:
    """A warning of fraud, or a review: the owner hears of it; only a review closed as fraud takes access away.

    Sources: https://docs.stripe.com/api/radar/early_fraud_warnings/object, https://docs.stripe.com/api/radar/reviews/object
    """
    key = _paying(document)
    is_review = event.type.startswith("review.")
    confirmed = event.type == "review.closed" and document.text("closed_reason") == "refunded_as_fraud"
    facts: tuple[About, ...] = ()
    if key and (confirmed or not is_review):
        fact = FraudFact(
            event_id=event.id, event_type=event.type, as_of=event.occurred_at, is_confirmed=confirmed
        )
        facts = (About(key=key, fact=fact),)
    return Translation(
        subject=key,
        facts=facts,
        links=_charge_link(document),
        alerts=(Alert(text=f"{event.type} for {key} (event {event.id})."),),
    )


def _paying(document: Fields) -> str | None:
    """The key of the payment an object is about: its intent where it has one, else its charge."""
    if document.text("object") == "payment_intent":
        intent_id = document.id("id")
        return f"pi:{intent_id}" if intent_id else None
    intent_id = document.id("payment_intent")
    if intent_id:
        return f"pi:{intent_id}"
    charge_id = document.id("charge") or (document.id("id") if document.text("object") == "charge" else None)
    return f"ch:{charge_id}" if charge_id else None


def _charge_link(document: Fields) -> tuple[Link, ...]:
    """A charge bears on its payment intent: some objects name only the one, some only the other."""
    intent_id = document.id("payment_intent")
    charge_id = document.id("charge") or (document.id("id") if document.text("object") == "charge" else None)
    if document.text("object") == "payment_intent":
        intent_id, charge_id = document.id("id"), document.id("latest_charge")
    if intent_id is None or charge_id is None:
        return ()
    return (Link(child=f"ch:{charge_id}", parent=f"pi:{intent_id}"),)


def _money(
    event: Event,
    document: Fields,
    prefix: str,
    part: str,
    *,
    amount: int | None,
    settled: bool,
    facts: tuple[About, ...] = (),
    expects_access: bool = False,
    alerts: tuple[Alert, ...] = (),
) -> Translation:
    """A ledger line, with the facts that bear on what was bought with the money."""
    object_id, customer_id, key = document.id("id"), customer_of(document), _paying(document)
    kind = "refund" if prefix == "re" else ledger_type(event.type)
    metadata = document.object("metadata")
    invoice_id = document.id("invoice")
    links = _charge_link(document)
    if invoice_id and key:
        # Gone since basil; there `invoice_payment.paid` tells it.
        links = (*links, Link(child=key, parent=f"in:{invoice_id}"))
    named_user = metadata.user_id("user_id") if prefix in ("ch", "pi") else None
    return Translation(
        subject=key,
        facts=facts,
        links=links,
        ties=strongest_tie(event, customer_id, (Via.METADATA, named_user)) if expects_access else (),
        payments=(
            PaymentFact(
                effect_key=f"{prefix}:{object_id}:{kind}{part}" if object_id else f"evt:{event.id}",
                event_type=ledger_type(event.type),
                customer_id=customer_id,
                invoice_id=invoice_id,
                amount=amount,
                currency=document.text("currency"),
                settled=settled,
                metadata_user_id=named_user,
                metadata_plan_code=metadata.text("plan_code"),
                metadata=document.metadata(),
            ),
        ),
        expects_access=expects_access,
        customer_id=customer_id,
        alerts=alerts,
    )
