"""A subscription's life: trial, renewals, dunning, changes of plan and seats, pauses and its end."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

from backend.app.simulator import objects
from backend.app.simulator.emit import Money, changed_attributes
from backend.app.simulator.invoices import issue, void
from backend.app.simulator.money import Account, Payment
from backend.app.simulator.objects import DAY_SECONDS, MONTH_SECONDS, Json, Shape
from backend.app.simulator.stage import Stage
from backend.app.simulator.truth import HOUR_SECONDS, Line, SubscriptionState

YEAR_SECONDS = 365 * DAY_SECONDS
UNIT_AMOUNT = 2999
SEATS_MAX = 5
TRIAL_DAYS = (3, 7, 14)
# Stripe drafts a renewal's invoice and collects it about an hour later.
DRAFT_SECONDS = HOUR_SECONDS
# Days after the first failure at which Stripe tries again; the last one decides what becomes of the subscription.
RETRY_DAYS = (3, 8, 15, 21)
# An unpaid first invoice is given up after 23 hours.
INCOMPLETE_SECONDS = 23 * HOUR_SECONDS

OVER = frozenset({"canceled", "incomplete_expired"})


@dataclass(slots=True)
class Item:
    """One item; `plan` may change, the interval does not."""

    item_id: str
    plan: str
    quantity: int
    interval: str
    period_start: int
    period_end: int

    @property
    def interval_seconds(self) -> int:
        """How long it renews for."""
        return YEAR_SECONDS if self.interval == "year" else MONTH_SECONDS

    @property
    def price(self) -> Json:
        """The price it is sold under now."""
        lookup_key = f"{self.plan}_{self.interval}ly"
        price = objects.price(lookup_key, unit_amount=UNIT_AMOUNT)
        price["recurring"]["interval"] = self.interval
        return price


class Subscription:
    """One subscription; every public verb is something its customer, its seller or Stripe does to it."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.id = stage.name("sub")
        self.account = Account(changed=self._note)
        self.payments: list[Payment] = []
        self.status = "active"
        self.started_at = stage.now
        self.trial_end: int | None = None
        self.cancel_at: int | None = None
        self.cancels_at_period_end = False
        self.ended_at: int | None = None
        self.past_due_since: int | None = None
        self.pause_behavior: str | None = None
        self.next_plan: str | None = None
        self.pending_plan: str | None = None
        self.metadata: Json = {"user_id": stage.user_id} if stage.named_in == "subscription" else {}
        self._debt: tuple[str, int] | None = None
        # Raised when the billing cycle starts anew, so that what was planned in the old one is dropped.
        self._cycle = 0
        self.items = self._ordered_items()
        self._sign_up()

    @property
    def is_over(self) -> bool:
        """Whether nothing can happen to it any more."""
        return self.status in OVER

    @property
    def amount(self) -> int:
        """What all items cost together."""
        return sum(UNIT_AMOUNT * item.quantity for item in self.items)

    # What the customer and the seller do.

    def change_plan(self) -> None:
        """An upgrade at once, prorated and paid; or a downgrade for the next period."""
        stage, item = self.stage, self.stage.rng.choice(self.items)
        sold = stage.truth.terms.sold
        plan = stage.rng.choice([code for code in sold if code != item.plan])
        if sold.index(plan) < sold.index(item.plan):
            self.next_plan = plan
            return
        if stage.chance(0.2) and self.status == "active":
            self.pending_plan = plan
            self._updated("an upgrade waits for its payment")
            stage.later(
                stage.now + stage.rng.randint(0, INCOMPLETE_SECONDS), lambda: self._settle_pending(item, plan)
            )
            return
        self._upgrade(item, plan, "customer.subscription.updated")

    def change_seats(self) -> None:
        """Another number of seats on one item."""
        item = self.stage.rng.choice(self.items)
        item.quantity = self.stage.rng.choice([n for n in range(1, SEATS_MAX + 1) if n != item.quantity])
        self._updated("the number of seats changed")

    def rename(self) -> None:
        """The seller writes something into the metadata."""
        self.metadata = {**self.metadata, "note": self.stage.name("note")}
        self._updated("the metadata changed")

    def cancel_later(self) -> None:
        """It shall end with its period, or on a date."""
        ends = [item.period_end for item in self.items]
        if len(set(ends)) == 1 and self.stage.chance(0.7):
            self.cancels_at_period_end = True
            self.cancel_at = ends[0]
        else:
            self.cancel_at = self.stage.now + self.stage.rng.randint(1, 60) * DAY_SECONDS
        self._updated("a cancellation was planned")
        at, cycle = self.cancel_at, self._cycle
        self.stage.later(at, lambda: self._end_on_date(at, cycle))

    def keep(self) -> None:
        """The planned cancellation is taken back."""
        self.cancel_at, self.cancels_at_period_end = None, False
        self._updated("the planned cancellation was taken back")

    def cancel(self) -> None:
        """It ends at once."""
        self.status, self.ended_at, self.past_due_since = "canceled", self.stage.now, None
        self._cycle += 1
        self._event("customer.subscription.deleted", "the subscription was canceled", is_update=False)

    def pause_collection(self) -> None:
        """Money is not collected for a while; the subscription goes on."""
        self.pause_behavior = self.stage.rng.choice(["void", "keep_as_draft", "mark_uncollectible"])
        self._updated("collection was paused")

    def resume_collection(self) -> None:
        """Money is collected again."""
        self.pause_behavior = None
        self._updated("collection was resumed")

    def pause(self) -> None:
        """The subscription itself is paused."""
        self.status = "paused"
        self._cycle += 1
        self._updated("the subscription was paused")
        self._event("customer.subscription.paused", "the subscription was paused", is_update=False)

    def resume(self) -> None:
        """A paused subscription starts a new period."""
        self.status = "active"
        self._start_cycle()
        self._updated("the subscription was resumed")
        self._event("customer.subscription.resumed", "the subscription was resumed", is_update=False)
        self._collect("subscription_cycle")

    def pay_debt(self) -> None:
        """The customer pays what failed."""
        if self._debt is not None:
            invoice_id, attempt = self._debt
            self._succeed(invoice_id, attempt + 1, "subscription_cycle")
            self._recover()

    def customer_gone(self) -> None:
        """The customer was deleted, and the subscription with it."""
        if not self.is_over:
            self.cancel()
        self._note("the customer was deleted")

    # What Stripe does.

    def _ordered_items(self) -> list[Item]:
        stage, rng = self.stage, self.stage.rng
        plans = rng.sample(stage.truth.terms.sold, 2 if stage.chance(0.25) else 1)
        # Since basil the items of one subscription may renew at different intervals.
        mixed = len(plans) > 1 and stage.shape is Shape.BASIL and stage.chance(0.5)
        interval = "year" if stage.chance(0.15) else "month"
        intervals = ["month", "year"] if mixed else [interval] * len(plans)
        items = [
            Item(
                item_id=f"si_{self.id}_{index}",
                plan=plan,
                quantity=rng.randint(1, SEATS_MAX) if stage.chance(0.3) else 1,
                interval=every,
                period_start=stage.now,
                period_end=0,
            )
            for index, (plan, every) in enumerate(zip(plans, intervals, strict=True))
        ]
        for item in items:
            item.period_end = stage.now + item.interval_seconds
        return items

    def _sign_up(self) -> None:
        stage = self.stage
        way = stage.rng.choices(("paid", "trial", "incomplete", "expired"), (5, 3, 3, 1))[0]
        if way == "trial":
            self.status = "trialing"
            self.trial_end = stage.now + stage.rng.choice(TRIAL_DAYS) * DAY_SECONDS
            for item in self.items:
                item.period_end = self.trial_end
        elif way != "paid":
            self.status = "incomplete"
        self._before: Json = self._content()
        self._event("customer.subscription.created", "the subscription was created", is_update=False)
        if stage.named_in == "checkout":
            self._checkout()
        if way == "trial":
            self._succeed(stage.name("in"), 1, "subscription_create", amount=0)
            self._plan_trial()
        elif way == "paid":
            self._succeed(stage.name("in"), 1, "subscription_create")
            self._plan_renewal()
        elif way == "incomplete":
            invoice_id = stage.name("in")
            stage.later(
                stage.now + stage.rng.choice((0, 1, 60, HOUR_SECONDS)), lambda: self._complete(invoice_id)
            )
        else:
            invoice_id, amount = stage.name("in"), self.amount
            stage.later(stage.now + INCOMPLETE_SECONDS, lambda: self._expire(invoice_id, amount))

    def _checkout(self) -> None:
        stage, session_id = self.stage, self.stage.name("cs")
        stage.emitter.emit(
            stage.now,
            "checkout.session.completed",
            objects.checkout_session(
                session_id,
                mode="subscription",
                amount_total=self.amount,
                customer=stage.customer_id,
                subscription=self.id,
                client_reference_id=stage.user_id,
                created=stage.now,
            ),
            money={f"cs:{session_id}": Money(self.amount, True)},
        )

    def _complete(self, invoice_id: str) -> None:
        if self.status == "incomplete":
            self._succeed(invoice_id, 1, "subscription_create")
            self.status = "active"
            self._updated("the first invoice was paid")
            self._plan_renewal()

    def _expire(self, invoice_id: str, amount: int) -> None:
        if self.status == "incomplete":
            self.status, self.ended_at = "incomplete_expired", self.stage.now
            self._updated("the first invoice was never paid")
            void(self.stage, invoice_id, amount=amount, subscription_id=self.id, plan=self.items[0].plan)

    def _plan_trial(self) -> None:
        assert self.trial_end is not None
        at = self.trial_end
        cycle = self._cycle
        warned_at = max(self.stage.now, at - 3 * DAY_SECONDS)
        self.stage.later(
            warned_at,
            self._if_cycle(
                cycle,
                lambda: self._event(
                    "customer.subscription.trial_will_end", "the trial will end", is_update=False
                ),
            ),
        )
        self.stage.later(at, self._if_cycle(cycle, self._end_trial))

    def _end_trial(self) -> None:
        if self.cancel_at is not None and self.cancel_at <= self.stage.now:
            self.cancel()
        elif self.stage.chance(0.2):
            self.pause()
        else:
            self.status = "active"
            self._start_cycle()
            self._updated("the trial ended")
            self._draft()

    def _start_cycle(self) -> None:
        """A new period for all items; the old plans for renewals are void."""
        self._cycle += 1
        for item in self.items:
            item.period_start = self.stage.now
            item.period_end = self.stage.now + item.interval_seconds
        if self.cancels_at_period_end:
            self._plan_cancellation(self.items[0].period_end)
        elif self.cancel_at is not None:
            self._plan_cancellation(self.cancel_at)
        self._plan_renewal()

    def _plan_cancellation(self, at: int) -> None:
        self.cancel_at = at
        cycle = self._cycle
        self.stage.later(at, lambda: self._end_on_date(at, cycle))

    def _plan_renewal(self) -> None:
        at = min(item.period_end for item in self.items)
        self.stage.later(at, self._if_cycle(self._cycle, self._renew))

    def _renew(self) -> None:
        now = self.stage.now
        if self.cancel_at is not None and self.cancel_at <= now:
            self.cancel()
            return
        for item in self.items:
            if item.period_end <= now:
                item.period_start = item.period_end
                item.period_end += item.interval_seconds
        if self.next_plan is not None:
            self.items[0].plan, self.next_plan = self.next_plan, None
        self._updated("a new period began")
        self._plan_renewal()
        if self.status == "active" and self.pause_behavior is None:
            self._draft()

    def _end_on_date(self, at: int, cycle: int) -> None:
        if self.cancel_at == at and cycle == self._cycle and not self.is_over:
            self.cancel()

    def _draft(self) -> None:
        cycle = self._cycle
        self.stage.later(
            self.stage.now + DRAFT_SECONDS, self._if_cycle(cycle, lambda: self._collect("subscription_cycle"))
        )

    def _collect(self, reason: str) -> None:
        """Tries to collect for the present period; a failure begins a delinquency."""
        stage = self.stage
        if self.status != "active":
            return
        invoice_id = stage.name("in")
        if not stage.chance(0.25):
            self._succeed(invoice_id, 1, reason)
            return
        self._fail(invoice_id, 1)
        self.status, self.past_due_since = "past_due", stage.now
        self._updated("a renewal failed")
        for attempt, days in enumerate(RETRY_DAYS, start=2):
            stage.later(
                stage.now + days * DAY_SECONDS, self._if_cycle(self._cycle, self._retry(invoice_id, attempt))
            )

    def _retry(self, invoice_id: str, attempt: int) -> Callable[[], None]:
        def run() -> None:
            if self._debt is None or self._debt[0] != invoice_id or self.status != "past_due":
                return
            if self.stage.chance(0.35):
                self._succeed(invoice_id, attempt, "subscription_cycle")
                self._recover()
                return
            self._fail(invoice_id, attempt)
            if attempt <= len(RETRY_DAYS):
                return
            if self.stage.chance(0.5):
                self.cancel()
            else:
                self.status, self.past_due_since = "unpaid", None
                self._updated("all retries failed")

        return run

    def _recover(self) -> None:
        self._debt = None
        if self.status in ("past_due", "unpaid"):
            self.status, self.past_due_since = "active", None
            self._updated("the debt was paid")

    def _settle_pending(self, item: Item, plan: str) -> None:
        if self.pending_plan != plan or self.is_over:
            return
        self.pending_plan = None
        if self.status == "active" and self.stage.chance(0.5):
            self._upgrade(item, plan, "customer.subscription.pending_update_applied")
        else:
            self._event(
                "customer.subscription.pending_update_expired", "the upgrade was not paid", is_update=True
            )

    def _upgrade(self, item: Item, plan: str, event_type: str) -> None:
        item.plan = plan
        self._event(event_type, f"an upgrade to {plan}", is_update=True)
        if self.status in ("active", "past_due") and self.pause_behavior is None:
            self._succeed(self.stage.name("in"), 1, "subscription_update", amount=UNIT_AMOUNT // 2)
            # Stripe goes by the newest invoice, and that one is paid.
            self._recover()

    def _succeed(self, invoice_id: str, attempt: int, reason: str, *, amount: int | None = None) -> None:
        due = self.amount if amount is None else amount
        payment = None
        if due:
            payment = Payment(
                stage=self.stage,
                account=self.account,
                intent_id=self.stage.name("pi"),
                charge_id=self.stage.name("ch"),
                amount=due,
                invoice_id=invoice_id,
                customer_id=self.stage.customer_id,
            )
            self.payments.append(payment)
        self._issue(invoice_id, due, attempt, reason, payment, is_paid=True)
        lost_at = self.account.lost_at
        if due and lost_at is not None and lost_at < self.stage.now:
            # Who pays again after a lost dispute is a customer again.
            self.account.lost_at = None
            self._note("it was paid again after a lost dispute")

    def _fail(self, invoice_id: str, attempt: int) -> None:
        self._debt = (invoice_id, attempt)
        self._issue(invoice_id, self.amount, attempt, "subscription_cycle", None, is_paid=False)

    def _issue(
        self,
        invoice_id: str,
        amount: int,
        attempt: int,
        reason: str,
        payment: Payment | None,
        *,
        is_paid: bool,
    ) -> None:
        issue(
            self.stage,
            invoice_id,
            amount=amount,
            is_paid=is_paid,
            attempt=attempt,
            reason=reason,
            payment=payment,
            subscription_id=self.id,
            metadata=self.metadata,
            plan=self.items[0].plan,
        )

    def _if_cycle(self, cycle: int, action: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            if cycle == self._cycle and not self.is_over:
                action()

        return run

    # What is said about it.

    def _updated(self, cause: str) -> None:
        self._event("customer.subscription.updated", cause, is_update=True)

    def _event(self, event_type: str, cause: str, *, is_update: bool) -> None:
        content = self._content()
        previous = changed_attributes(self._before, content) if is_update else None
        self._before = content
        event_id = self.stage.emitter.emit(
            self.stage.now,
            event_type,
            content,
            previous=copy.deepcopy(previous),
            money={"evt:{event}": Money(None, False)},
        )
        self._note(f"{cause} ({event_id})")

    def _note(self, cause: str) -> None:
        self.stage.note(
            f"sub:{self.id}",
            SubscriptionState(
                status=self.status,
                lines=tuple(
                    Line(plan=item.plan, quantity=item.quantity, period_end=item.period_end)
                    for item in self.items
                ),
                claims=self.account.claims(self.stage),
                trial_end=self.trial_end,
                cancel_at=self.cancel_at,
                past_due_since=self.past_due_since,
                pause_behavior=self.pause_behavior,
            ),
            cause,
        )

    def _content(self) -> Json:
        content = objects.subscription(
            self.id,
            customer=self.stage.customer_id,
            status=self.status,
            prices=[item.price for item in self.items],
            period_start=self.items[0].period_start,
            period_end=self.items[0].period_end,
            metadata=dict(self.metadata),
            trial_end=self.trial_end,
            cancel_at_period_end=self.cancels_at_period_end,
            cancel_at=self.cancel_at,
            ended_at=self.ended_at,
            start_date=self.started_at,
            shape=self.stage.shape,
        )
        for item, entry in zip(self.items, content["items"]["data"], strict=True):
            entry.update(id=item.item_id, created=self.started_at, quantity=item.quantity)
            if self.stage.shape is Shape.BASIL:
                entry.update(current_period_start=item.period_start, current_period_end=item.period_end)
        content["billing_cycle_anchor"] = self.started_at
        if self.pause_behavior is not None:
            content["pause_collection"] = {"behavior": self.pause_behavior, "resumes_at": None}
        if self.pending_plan is not None:
            content["pending_update"] = {"expires_at": self.stage.now + INCOMPLETE_SECONDS}
        return content
