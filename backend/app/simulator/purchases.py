"""One-time purchases: a checkout that is paid at once, later, never or with a coupon; a manual invoice; a bare payment."""

from __future__ import annotations

from collections.abc import Callable

from backend.app.simulator import objects
from backend.app.simulator.emit import Money
from backend.app.simulator.invoices import issue
from backend.app.simulator.money import Account, Payment
from backend.app.simulator.objects import DAY_SECONDS, Json
from backend.app.simulator.stage import Stage
from backend.app.simulator.truth import Cause, Line, PurchaseState

UNIT_AMOUNT = 9900
SEATS_MAX = 5
# Slow payment methods (bank debits) take up to two weeks.
ASYNC_DAYS_MAX = 14


class Purchase:
    """One purchase of one or two plans; `pay` makes what was paid a source from then on."""

    def __init__(self, stage: Stage, *, kind: str, is_guest: bool) -> None:
        self.stage = stage
        self.account = Account(changed=self._note)
        self.lines: tuple[Line, ...] = (Line(plan=stage.rng.choice(stage.truth.terms.sold)),)
        self.customer_id = None if is_guest else stage.customer_id
        self.is_guest = is_guest
        self.paid_at: int | None = None
        self.unpaid: Cause | None = None
        self.payments: list[Payment] = []
        self._is_itemized = kind == "checkout" and stage.chance(0.4)
        if self._is_itemized:
            self.lines = tuple(
                Line(plan=plan, quantity=stage.rng.randint(1, SEATS_MAX))
                for plan in stage.rng.sample(stage.truth.terms.sold, stage.rng.randint(1, 2))
            )
        self.amount = sum(UNIT_AMOUNT * line.quantity for line in self.lines)
        self.key = ""
        start: dict[str, Callable[[], None]] = {
            "checkout": self._checkout,
            "invoice": self._invoice,
            "intent": self._intent,
        }
        start[kind]()

    def _note(self, cause: str) -> None:
        # Nobody owns what a guest bought; it waits to be claimed.
        if not self.is_guest:
            state = PurchaseState(
                lines=self.lines,
                claims=self.account.claims(self.stage),
                amount=self.amount,
                paid_at=self.paid_at,
                unpaid=self.unpaid,
            )
            self.stage.note(self.key, state, cause)

    def customer_gone(self) -> None:
        """The customer was deleted."""
        self._note("the customer was deleted")

    def _checkout(self) -> None:
        stage, self.key = self.stage, f"cs:{self.stage.name('cs')}"
        way = stage.rng.choices(("sync", "async", "failed", "coupon", "expired"), (5, 2, 1, 2, 1))[0]
        if way == "coupon":
            self.amount = 0
            self._session("completed", "no_payment_required", None)
            self._paid("a free checkout was completed")
        elif way == "sync":
            payment = self._payment(None)
            payment.succeed()
            self._session("completed", "paid", payment)
            self.payments.append(payment)
            self._paid("a checkout was paid")
        elif way == "expired":
            self._session("expired", "unpaid", None)
            self._unpaid(Cause.EXPIRED, "a checkout expired")
        else:
            payment = self._payment(None)
            self._session("completed", "unpaid", payment)
            self._unpaid(Cause.AWAITING_PAYMENT, "a checkout waits for a slow payment")
            answered_at = stage.now + stage.rng.randint(0, ASYNC_DAYS_MAX * DAY_SECONDS)
            stage.later(answered_at, lambda: self._answered(payment, is_paid=way == "async"))

    def _answered(self, payment: Payment, *, is_paid: bool) -> None:
        if not is_paid:
            self._session("async_payment_failed", "unpaid", payment)
            self._unpaid(Cause.PAYMENT_FAILED, "a slow payment failed")
            return
        payment.succeed()
        self._session("async_payment_succeeded", "paid", payment)
        self.payments.append(payment)
        self._paid("a slow payment arrived")

    def _paid(self, cause: str) -> None:
        self.paid_at, self.unpaid = self.stage.now, None
        self._note(cause)

    def _unpaid(self, why: Cause, cause: str) -> None:
        self.unpaid = why
        self._note(cause)

    def _session(self, verb: str, payment_status: str, payment: Payment | None) -> None:
        stage, session_id = self.stage, self.key.removeprefix("cs:")
        content = objects.checkout_session(
            session_id,
            payment_status=payment_status,
            status="expired" if verb == "expired" else "complete",
            amount_total=self.amount,
            customer=self.customer_id,
            payment_intent=payment.intent_id if payment else None,
            client_reference_id=None if self.is_guest else stage.user_id,
            metadata={} if self._is_itemized else {"plan_code": self.lines[0].plan},
            created=stage.now,
        )
        if self._is_itemized:
            content["line_items"] = {"object": "list", "data": self._line_items(), "has_more": False}
        settled = payment_status != "unpaid"
        stage.emitter.emit(
            stage.now,
            f"checkout.session.{verb}",
            content,
            money={self.key if settled else f"{self.key}:checkout_{verb}": Money(self.amount, settled)},
        )

    def _line_items(self) -> list[Json]:
        return [
            {
                "id": f"li_{self.key.removeprefix('cs:')}_{index}",
                "object": "item",
                "amount_total": UNIT_AMOUNT * line.quantity,
                "currency": "usd",
                "description": line.plan,
                "price": objects.price(line.plan, unit_amount=UNIT_AMOUNT),
                "quantity": line.quantity,
            }
            for index, line in enumerate(self.lines)
        ]

    def _invoice(self) -> None:
        stage = self.stage
        invoice_id = stage.name("in")
        self.key = f"in:{invoice_id}"
        payment = self._payment(invoice_id)
        issue(
            stage,
            invoice_id,
            amount=self.amount,
            is_paid=True,
            attempt=1,
            reason="manual",
            payment=payment,
            metadata={"user_id": stage.user_id, "plan_code": self.lines[0].plan},
            plan=self.lines[0].plan,
        )
        self.payments.append(payment)
        self._paid("an invoice written by hand was paid")

    def _intent(self) -> None:
        payment = self._payment(None)
        self.key = f"pi:{payment.intent_id}"
        payment.metadata = {"user_id": self.stage.user_id, "plan_code": self.lines[0].plan}
        payment.succeed()
        self.payments.append(payment)
        self._paid("a payment that names its plan succeeded")

    def _payment(self, invoice_id: str | None) -> Payment:
        return Payment(
            stage=self.stage,
            account=self.account,
            intent_id=self.stage.name("pi"),
            charge_id=self.stage.name("ch"),
            amount=self.amount,
            invoice_id=invoice_id,
            customer_id=self.customer_id,
        )
