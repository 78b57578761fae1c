"""What a one-time purchase means for access: a paid checkout, a manual invoice, a payment that names its plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from backend.app.billing.domain.access import Access, Reading, Source
from backend.app.billing.domain.catalog import Catalog, PartialRefund
from backend.app.billing.domain.facts import (
    CheckoutFact,
    CheckoutState,
    InvoiceFact,
    InvoiceState,
    PaymentIntentFact,
    PriceRef,
    PurchaseLine,
)
from backend.app.billing.domain.pricing import highest, plans_of
from backend.app.billing.domain.reversals import LastPayment, full_refund, refunded_amount, reversal_of

# A session that got paid stays paid; a failed or expired one was awaiting before.
_CHECKOUT_STAGE = {
    CheckoutState.AWAITING_PAYMENT: 0,
    CheckoutState.EXPIRED: 1,
    CheckoutState.FAILED: 1,
    CheckoutState.PAID: 2,
}
_INVOICE_STAGE = {
    InvoiceState.PAYMENT_FAILED: 0,
    InvoiceState.UNCOLLECTIBLE: 1,
    InvoiceState.VOIDED: 2,
    InvoiceState.PAID: 3,
}


def read_checkout(catalog: Catalog, source: Source) -> Reading | None:
    """A checkout session in payment mode."""
    # The oldest first: what several of them say, the first one said.
    facts = sorted(
        (fact for fact in source.facts if isinstance(fact, CheckoutFact)),
        key=lambda fact: (fact.as_of, fact.event_id),
    )
    if not facts:
        return None
    newest = max(facts, key=lambda fact: (_CHECKOUT_STAGE[fact.state], fact.as_of, fact.event_id))
    if newest.state is not CheckoutState.PAID:
        return Reading(
            status=newest.state.value,
            as_of=newest.as_of,
            rule=f"checkout.{newest.state.value}",
            event_id=newest.event_id,
            grants=False,
        )
    paid = [fact for fact in facts if fact.state is CheckoutState.PAID]
    return _bought(
        catalog,
        source,
        rule="checkout.paid",
        event_id=paid[0].event_id,
        paid_at=paid[0].as_of,
        amount=paid[0].amount,
        lines=next((fact.lines for fact in facts if fact.lines), ()),
        plan_hint=next((fact.metadata_plan_code for fact in paid if fact.metadata_plan_code), None),
    )


def read_manual_invoice(catalog: Catalog, source: Source, *, is_part_of_another: bool) -> Reading | None:
    """An invoice written by hand, whose lines sell plans; one that a checkout made is read there."""
    facts = [fact for fact in source.facts if isinstance(fact, InvoiceFact)]
    if is_part_of_another or not any(fact.lines for fact in facts):
        return None
    newest = max(facts, key=lambda fact: (_INVOICE_STAGE[fact.state], fact.as_of, fact.event_id))
    if newest.state is not InvoiceState.PAID:
        return Reading(
            status=newest.state.value,
            as_of=newest.as_of,
            rule=f"invoice.{newest.state.value}",
            event_id=newest.event_id,
            grants=False,
        )
    paid = min(
        (fact for fact in facts if fact.state is InvoiceState.PAID),
        key=lambda fact: (fact.as_of, fact.event_id),
    )
    return _bought(
        catalog,
        source,
        rule="invoice.manual_paid",
        event_id=paid.event_id,
        paid_at=paid.as_of,
        amount=paid.amount,
        lines=paid.lines,
        plan_hint=paid.metadata_plan_code,
    )


def read_payment_intent(catalog: Catalog, source: Source, *, is_part_of_another: bool) -> Reading | None:
    """A payment of its own; one that belongs to a checkout or an invoice is read there."""
    facts = [fact for fact in source.facts if isinstance(fact, PaymentIntentFact)]
    if not facts or is_part_of_another:
        return None
    paid = sorted((fact for fact in facts if fact.is_paid), key=lambda fact: (fact.as_of, fact.event_id))
    if not paid:
        newest = max(facts, key=lambda fact: (fact.as_of, fact.event_id))
        return Reading(
            status="awaiting_payment",
            as_of=newest.as_of,
            rule="payment_intent.not_paid",
            event_id=newest.event_id,
            grants=False,
        )
    return _bought(
        catalog,
        source,
        rule="payment_intent.paid",
        event_id=paid[0].event_id,
        paid_at=paid[0].as_of,
        amount=paid[0].amount,
        lines=(),
        plan_hint=paid[0].metadata_plan_code,
    )


def _bought(
    catalog: Catalog,
    source: Source,
    *,
    rule: str,
    event_id: str,
    paid_at: datetime,
    amount: int | None,
    lines: Sequence[PurchaseLine],
    plan_hint: str | None,
) -> Reading:
    refunded, refunded_at, refund_event_id = refunded_amount(source.facts)
    if catalog.policy.refund_partial is PartialRefund.REDUCE_QUANTITY:
        lines = _without_refunded_units(lines, amount, refunded)
    reversal = reversal_of(
        catalog.policy,
        source.facts,
        payment=LastPayment(amount=amount, at=paid_at),
        is_subscription=False,
    )
    if reversal is None and refunded_at is not None and any(line.quantity == 0 for line in lines):
        # Every unit was given back, and only what came on top of them, such as shipping, was not.
        reversal = full_refund(refunded_at, refund_event_id)
    # Where the event does not carry the lines, the session's own plan stands for them.
    parts = lines or (PurchaseLine(line_id="", price=PriceRef(), quantity=1),)
    plans, unknown = plans_of(catalog, [(line.price, line) for line in parts], plan_hint)
    if reversal is not None:
        return Reading(
            status=reversal.status,
            as_of=reversal.as_of,
            rule=reversal.rule,
            event_id=reversal.event_id,
            grants=False,
            sold=highest(plans),
        )
    return Reading(
        status="active",
        as_of=paid_at,
        rule=rule,
        event_id=event_id,
        grants=True,
        accesses=tuple(
            Access(
                source=source.id,
                part=line.line_id,
                plan=plan,
                quantity=line.quantity,
                status="active",
                rule=rule,
                event_id=event_id,
                starts_at=paid_at,
                ends_at=paid_at + timedelta(days=plan.purchase_days) if plan.purchase_days else None,
            )
            for plan, line in plans
        ),
        unknown=unknown,
        flags=("partially_refunded",) if refunded > 0 else (),
    )


def _without_refunded_units(
    lines: Sequence[PurchaseLine], amount: int | None, refunded: int
) -> Sequence[PurchaseLine]:
    """The lines with as many units less as the refunds pay for; of several lines nobody says which one was meant."""
    if len(lines) != 1 or lines[0].quantity <= 1:
        return lines
    line = lines[0]
    paid = line.amount if line.amount is not None else amount
    if not paid or paid < 0:
        return lines
    # The price of some units is rounded down to the smallest coin: 33 of 100 give back one of three.
    units = ((refunded + 1) * line.quantity - 1) // paid
    return (replace(line, quantity=max(line.quantity - units, 0)),)
