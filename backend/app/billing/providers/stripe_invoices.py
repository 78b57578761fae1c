"""Invoices, their payments, and credit notes against them."""

from __future__ import annotations

from collections.abc import Sequence

from backend.app.billing.domain.facts import (
    About,
    Alert,
    Event,
    InvoiceFact,
    InvoiceState,
    Link,
    PaymentFact,
    RefundFact,
    Translation,
    Via,
)
from backend.app.billing.providers.fields import Fields
from backend.app.billing.providers.registry import customer_of, ledger_type, strongest_tie, translates
from backend.app.billing.providers.stripe_prices import main_price, purchase_lines

_STATES = {
    "invoice.paid": InvoiceState.PAID,
    "invoice.payment_succeeded": InvoiceState.PAID,
    "invoice.payment_failed": InvoiceState.PAYMENT_FAILED,
    "invoice.voided": InvoiceState.VOIDED,
    "invoice.marked_uncollectible": InvoiceState.UNCOLLECTIBLE,
}
# What the owner should look at; none of it takes access away by itself.
_STATE_ALERTS = {
    InvoiceState.PAYMENT_FAILED: "the payment failed",
    InvoiceState.UNCOLLECTIBLE: "it was marked uncollectible",
}
_ALERTS = {
    "invoice.payment_action_required": "the customer must confirm a payment",
    "invoice.payment_attempt_required": "a payment has to be attempted by hand",
    "invoice.overdue": "the invoice is overdue",
    "invoice.finalization_failed": "the invoice could not be finalized",
    "invoice.overpaid": "more was paid than was due",
}


@translates(*_STATES)
def invoice(event: Event, document: Fields, _previous: Fields) -> Translation:
    """An invoice that was paid, could not be paid, or was given up.

    Access follows from the subscription behind it; an invoice written by hand is a purchase of its own.
    Source: https://docs.stripe.com/api/invoices/object
    """
    invoice_id = document.required_id("id")
    state = _STATES[event.type]
    customer_id = customer_of(document)
    lines = list(document.list_data("lines"))
    subscription_id = _subscription_of(document, lines)
    user_id, plan_code = _metadata_of(document, lines)
    by_hand = document.text("billing_reason") == "manual" and subscription_id is None
    fact = InvoiceFact(
        event_id=event.id,
        event_type=event.type,
        as_of=event.occurred_at,
        invoice_id=invoice_id,
        subscription_id=subscription_id,
        customer_id=customer_id,
        state=state,
        amount=document.amount("amount_paid"),
        lines=purchase_lines(lines) if by_hand else (),
        metadata_user_id=user_id,
        metadata_plan_code=plan_code,
    )
    paid = state is InvoiceState.PAID
    return Translation(
        subject=f"in:{invoice_id}",
        facts=(About(key=f"in:{invoice_id}", fact=fact),),
        links=_links(document, invoice_id, subscription_id),
        ties=strongest_tie(event, customer_id, (Via.METADATA, user_id)),
        payments=(
            PaymentFact(
                effect_key=_effect_key(document, invoice_id, state),
                event_type=ledger_type(event.type),
                customer_id=customer_id,
                invoice_id=invoice_id,
                subscription_id=subscription_id,
                amount=document.amount("amount_paid" if paid else "amount_due"),
                currency=document.text("currency"),
                settled=paid,
                metadata_user_id=user_id,
                price=main_price(lines),
                metadata_plan_code=plan_code,
                metadata={**document.metadata(), **_method(document)},
            ),
        ),
        expects_access=paid and (subscription_id is not None or bool(fact.lines)),
        customer_id=customer_id,
        alerts=_alerts(
            event, invoice_id, _STATE_ALERTS.get(state), is_routine=state is InvoiceState.PAYMENT_FAILED
        ),
    )


@translates(
    "invoice.created",
    "invoice.finalized",
    "invoice.sent",
    "invoice.updated",
    "invoice.will_be_due",
    "invoice.deleted",
    *_ALERTS,
)
def invoice_notice(event: Event, document: Fields, _previous: Fields) -> Translation:
    """An invoice on its way: its links are kept, nothing else follows.

    Source: https://docs.stripe.com/api/events/types
    """
    invoice_id = document.required_id("id")
    customer_id = customer_of(document)
    lines = list(document.list_data("lines"))
    subscription_id = _subscription_of(document, lines)
    user_id, _ = _metadata_of(document, lines)
    return Translation(
        subject=f"in:{invoice_id}",
        links=_links(document, invoice_id, subscription_id),
        ties=strongest_tie(event, customer_id, (Via.METADATA, user_id)),
        customer_id=customer_id,
        alerts=_alerts(event, invoice_id, _ALERTS.get(event.type)),
    )


@translates("invoice.upcoming")
def invoice_upcoming(event: Event, document: Fields, _previous: Fields) -> Translation:
    """An invoice that is to come: the owner hears of it; it has no id yet, and nothing follows from it.

    Source: https://docs.stripe.com/api/invoices/upcoming_invoice
    """
    customer_id = customer_of(document)
    subscription_id = _subscription_of(document, list(document.list_data("lines")))
    return Translation(
        subject=f"sub:{subscription_id}" if subscription_id else None,
        customer_id=customer_id,
        alerts=(
            Alert(
                text=f"An invoice of customer {customer_id} is coming up (event {event.id}).", is_routine=True
            ),
        ),
    )


@translates("invoice_payment.paid")
def invoice_payment(event: Event, document: Fields, _previous: Fields) -> Translation:
    """Since basil the only link between an invoice and the payment that paid it.

    Source: https://docs.stripe.com/api/invoice-payment/object
    """
    invoice_id = document.required_id("invoice")
    payment = document.object("payment")
    intent_id, charge_id = payment.id("payment_intent"), payment.id("charge")
    paying = f"pi:{intent_id}" if intent_id else f"ch:{charge_id}" if charge_id else None
    return Translation(
        subject=f"in:{invoice_id}",
        links=(Link(child=paying, parent=f"in:{invoice_id}"),) if paying else (),
        payments=(
            PaymentFact(
                effect_key=f"ip:{document.id('id') or event.id}",
                event_type=ledger_type(event.type),
                invoice_id=invoice_id,
                amount=document.amount("amount_paid"),
                currency=document.text("currency"),
                # The invoice's own line has this money already.
                settled=False,
            ),
        ),
    )


@translates("credit_note.created", "credit_note.updated", "credit_note.voided")
def credit_note(event: Event, document: Fields, _previous: Fields) -> Translation:
    """A credit against an invoice: like a refund of it, unless a refund of its own stands behind it.

    Source: https://docs.stripe.com/api/credit_notes/object
    """
    note_id, invoice_id = document.required_id("id"), document.required_id("invoice")
    amount = document.amount("amount") or 0
    voided = event.type == "credit_note.voided" or document.text("status") == "void"
    credited = _credited(document, amount)
    fact = RefundFact(
        event_id=event.id,
        event_type=event.type,
        as_of=event.occurred_at,
        refund_id=note_id,
        amount=credited,
        status="canceled" if voided else "succeeded",
    )
    return Translation(
        subject=f"in:{invoice_id}",
        facts=(About(key=f"in:{invoice_id}", fact=fact),) if credited > 0 else (),
        payments=(
            PaymentFact(
                effect_key=f"cn:{note_id}:{'voided' if voided else 'issued'}",
                event_type=ledger_type(event.type),
                customer_id=customer_of(document),
                invoice_id=invoice_id,
                amount=amount,
                currency=document.text("currency"),
                metadata=document.metadata(),
            ),
        ),
        customer_id=customer_of(document),
    )


def _alerts(
    event: Event, invoice_id: str, what: str | None, *, is_routine: bool = False
) -> tuple[Alert, ...]:
    if what is None:
        return ()
    return (Alert(text=f"Invoice {invoice_id}: {what} (event {event.id}).", is_routine=is_routine),)


def _credited(document: Fields, amount: int) -> int:
    """How much of a paid invoice a credit note gives back by itself.

    What it takes off before the payment was never paid, and a refund behind it has events of its own:
    one in `refund` until 2025, since then several in `refunds`.
    """
    returned = document.amount("post_payment_amount")
    if returned is None:
        returned = 0 if document.text("type") == "pre_payment" else amount
    if document.id("refund") is not None:
        return 0
    return returned - sum(entry.amount("amount_refunded") or 0 for entry in document.list("refunds"))


def _effect_key(document: Fields, invoice_id: str, state: InvoiceState) -> str:
    # invoice.paid and invoice.payment_succeeded report the same money.
    if state is InvoiceState.PAID:
        return f"in:{invoice_id}"
    attempt = document.amount("attempt_count") or 0
    return (
        f"in:{invoice_id}:{state}:{attempt}"
        if state is InvoiceState.PAYMENT_FAILED
        else f"in:{invoice_id}:{state}"
    )


def _method(document: Fields) -> dict[str, str]:
    """How an invoice was paid where no card was: by hand outside Stripe, or by the customer's credit."""
    if document.flag("paid_out_of_band"):
        return {"tollkeeper.method": "out_of_band"}
    if document.amount("amount_due") == 0 and (document.amount("total") or 0) > 0:
        return {"tollkeeper.method": "credit"}
    return {}


def _links(document: Fields, invoice_id: str, subscription_id: str | None) -> tuple[Link, ...]:
    key = f"in:{invoice_id}"
    links = [Link(child=key, parent=f"sub:{subscription_id}")] if subscription_id else []
    # Gone since basil; there `invoice_payment.paid` tells it.
    intent_id, charge_id = document.id("payment_intent"), document.id("charge")
    if intent_id:
        links.append(Link(child=f"pi:{intent_id}", parent=key))
    elif charge_id:
        links.append(Link(child=f"ch:{charge_id}", parent=key))
    return tuple(links)


def _subscription_of(document: Fields, lines: Sequence[Fields]) -> str | None:
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


def _metadata_of(document: Fields, lines: Sequence[Fields]) -> tuple[str | None, str | None]:
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
