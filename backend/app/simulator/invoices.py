"""Invoices and their events: paid, failed and voided, with the payment behind them linked as each API generation does."""

from __future__ import annotations

from backend.app.simulator import objects
from backend.app.simulator.emit import Money
from backend.app.simulator.money import Payment
from backend.app.simulator.objects import Json, Shape
from backend.app.simulator.stage import Stage


def issue(
    stage: Stage,
    invoice_id: str,
    *,
    amount: int,
    is_paid: bool,
    attempt: int,
    reason: str,
    payment: Payment | None,
    subscription_id: str | None = None,
    metadata: Json | None = None,
    plan: str,
) -> None:
    """The events of an attempt to collect an invoice; of nothing there is no payment."""
    content = _content(
        stage,
        invoice_id,
        amount=amount,
        is_paid=is_paid,
        attempt=attempt,
        reason=reason,
        payment=payment,
        subscription_id=subscription_id,
        metadata=metadata,
        plan=plan,
    )
    if not is_paid:
        stage.emitter.emit(
            stage.now,
            "invoice.payment_failed",
            content,
            money={f"in:{invoice_id}:payment_failed:{attempt}": Money(amount, False)},
        )
        return
    line = {f"in:{invoice_id}": Money(amount, True)}
    stage.emitter.emit(stage.now, "invoice.paid", content, money=line)
    stage.emitter.emit(stage.now, "invoice.payment_succeeded", content, money=line)
    if payment is None:
        return
    payment.succeed()
    if stage.shape is Shape.BASIL:
        payment_id = stage.name("inpay")
        stage.emitter.emit(
            stage.now,
            "invoice_payment.paid",
            objects.invoice_payment(
                payment_id,
                invoice_id=invoice_id,
                intent_id=payment.intent_id,
                amount=amount,
                created=stage.now,
            ),
            money={f"ip:{payment_id}": Money(amount, False)},
        )


def void(stage: Stage, invoice_id: str, *, amount: int, subscription_id: str, plan: str) -> None:
    """An invoice that nobody will pay any more."""
    content = _content(
        stage,
        invoice_id,
        amount=amount,
        is_paid=False,
        attempt=1,
        reason="subscription_create",
        payment=None,
        subscription_id=subscription_id,
        metadata=None,
        plan=plan,
    )
    content["status"] = "void"
    stage.emitter.emit(
        stage.now, "invoice.voided", content, money={f"in:{invoice_id}:voided": Money(amount, False)}
    )


def _content(
    stage: Stage,
    invoice_id: str,
    *,
    amount: int,
    is_paid: bool,
    attempt: int,
    reason: str,
    payment: Payment | None,
    subscription_id: str | None,
    metadata: Json | None,
    plan: str,
) -> Json:
    content = objects.invoice(
        invoice_id,
        customer=stage.customer_id,
        subscription_id=subscription_id,
        amount=amount,
        paid=is_paid,
        attempt_count=attempt,
        billing_reason=reason,
        metadata=metadata,
        line_price=objects.price(plan, unit_amount=amount),
        period_start=stage.now,
        period_end=stage.now,
        shape=stage.shape,
    )
    content["metadata"] = metadata or {}
    if stage.shape is Shape.BEFORE_BASIL:
        content["payment_intent"] = payment.intent_id if payment else None
        content["charge"] = payment.charge_id if payment and is_paid else None
    return content
