"""The demo's story: for each user what Stripe reports, and what the user must have in the end.

The expectations are written by hand, never computed with the product's own decision code: they are
what the service is checked against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from backend.app.simulator import objects
from backend.app.simulator.objects import DAY_SECONDS, MONTH_SECONDS, Json, Shape

# The shipped catalog's policy, written out: see `renewal_slack_hours` and `past_due_grace_days` there.
RENEWAL_SLACK_SECONDS = 3 * DAY_SECONDS
PAST_DUE_GRACE_SECONDS = 14 * DAY_SECONDS

PREMIUM_CENTS = 2_999
VIP_CENTS = 5_999

# The checkout that names Ben; the demo delivers it after everything else of the story.
LAST_EVENT_ID = "evt_ben_6"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoryEvent:
    """An event, and what must have become of it in the end: success, ignored or parked, and why."""

    body: Json
    outcome: str = "success"
    reason: str | None = None

    @property
    def id(self) -> str:
        """The event's id."""
        return str(self.body["id"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Chapter:
    """One user's part of the story.

    `valid_until` is in unix seconds, None for "without end"; `paid_cents` is the sum of their settled
    purchases and invoices. Without a `user_id` nobody can be granted anything.
    """

    user_id: str | None
    title: str
    events: tuple[StoryEvent, ...]
    plan_code: str = "free"
    status: str = "none"
    valid_until: int | None = None
    paid_cents: int = 0


class _Pen:
    """Writes one user's events: numbers them, and puts the user's name into the ids of their objects."""

    def __init__(self, name: str, now: int, shape: Shape = Shape.BASIL) -> None:
        self.now = now
        self.customer = f"cus_{name}"
        self.subscription_id = f"sub_{name}"
        self.session_id = f"cs_{name}"
        self.events: list[StoryEvent] = []
        self._name = name
        self._shape = shape

    def days(self, days: float) -> int:
        """The unix second so many days from now; negative for the past."""
        return self.now + int(days * DAY_SECONDS)

    def tell(
        self,
        event_type: str,
        content: Json,
        *,
        days: float,
        outcome: str = "success",
        reason: str | None = None,
        livemode: bool = False,
        previous: Json | None = None,
    ) -> None:
        """Adds an event that occurred so many days from now."""
        body = objects.event(
            f"evt_{self._name}_{len(self.events) + 1}",
            event_type,
            content,
            created=self.days(days),
            livemode=livemode,
            shape=self._shape,
            previous_attributes=previous,
        )
        self.events.append(StoryEvent(body=body, outcome=outcome, reason=reason))

    def subscription(
        self,
        plan: str,
        *,
        start: float,
        period_start: float | None = None,
        status: str = "active",
        metadata: Json | None = None,
        trial_end: int | None = None,
        cancel_at_period_end: bool = False,
        ended_at: int | None = None,
    ) -> Json:
        """The subscription on a monthly plan; `start` and `period_start` in days from now."""
        period = self.days(start if period_start is None else period_start)
        return objects.subscription(
            self.subscription_id,
            customer=self.customer,
            status=status,
            prices=[objects.price(f"{plan}_monthly", unit_amount=_cents(plan))],
            period_start=period,
            period_end=trial_end or period + MONTH_SECONDS,
            start_date=self.days(start),
            metadata=metadata,
            trial_end=trial_end,
            cancel_at_period_end=cancel_at_period_end,
            ended_at=ended_at,
            shape=self._shape,
        )

    def invoice(self, number: int, plan: str, *, start: float, amount: int, paid: bool = True) -> Json:
        """An invoice of the subscription; its period starts so many days from now."""
        return objects.invoice(
            f"in_{self._name}_{number}",
            customer=self.customer,
            subscription_id=self.subscription_id,
            amount=amount,
            paid=paid,
            line_price=objects.price(f"{plan}_monthly", unit_amount=_cents(plan)),
            period_start=self.days(start),
            period_end=self.days(start) + MONTH_SECONDS,
            shape=self._shape,
        )

    def purchase(self, plan: str, *, days: float, amount: int, payment_status: str = "paid") -> Json:
        """The hosted checkout of a one-time purchase."""
        return objects.checkout_session(
            self.session_id,
            payment_status=payment_status,
            amount_total=amount,
            customer=self.customer,
            payment_intent=f"pi_{self._name}" if amount else None,
            client_reference_id=self._name,
            metadata={"plan_code": plan},
            created=self.days(days),
        )

    def subscribe(self, *, days: float, amount: int) -> Json:
        """The hosted checkout of the subscription: it says who the customer is."""
        return objects.checkout_session(
            self.session_id,
            mode="subscription",
            amount_total=amount,
            customer=self.customer,
            subscription=self.subscription_id,
            invoice=f"in_{self._name}_1",
            client_reference_id=self._name,
            created=self.days(days),
        )

    def charge(self, *, days: float, amount: int, amount_refunded: int = 0) -> Json:
        """The card's side of a payment."""
        return objects.charge(
            f"ch_{self._name}",
            amount=amount,
            amount_refunded=amount_refunded,
            customer=self.customer,
            payment_intent=f"pi_{self._name}",
            created=self.days(days),
            shape=self._shape,
        )


def _cents(plan: str) -> int:
    return VIP_CENTS if plan == "vip" else PREMIUM_CENTS


def write_story(now: int) -> Sequence[Chapter]:
    """All chapters, each in the order in which things happened; `now` is in unix seconds."""
    return [chapter(now) for chapter in _CHAPTERS]


def example_event(now: int) -> Json:
    """An event for the reader to send: somebody called "you" buys vip."""
    pen = _Pen("you", now)
    pen.tell("checkout.session.completed", pen.purchase("vip", days=0, amount=VIP_CENTS), days=0)
    return pen.events[0].body


def forged_purchase(now: int, number: int) -> Json:
    """What an attacker would like to be believed: Mallory bought everything."""
    pen = _Pen(f"mallory_{number}", now)
    session = pen.purchase("enterprise", days=0, amount=0, payment_status="no_payment_required")
    session["client_reference_id"] = "mallory"
    pen.tell("checkout.session.completed", session, days=0)
    return pen.events[0].body


def dashboard_test_event(now: int) -> Json:
    """What the dashboard's "Send test event" sends: always the same id."""
    return objects.event(
        "evt_00000000000000", "customer.updated", objects.customer("cus_00000000000000"), created=now
    )


def _ada(now: int) -> Chapter:
    pen = _Pen("ada", now)
    intent = objects.payment_intent("pi_ada", customer=pen.customer, created=pen.days(-9))
    pen.tell("payment_intent.succeeded", intent, days=-9)
    pen.tell("charge.succeeded", pen.charge(days=-9, amount=PREMIUM_CENTS), days=-9)
    pen.tell("checkout.session.completed", pen.purchase("premium", days=-9, amount=PREMIUM_CENTS), days=-9)
    return Chapter(
        user_id="ada",
        title="bought premium once",
        events=tuple(pen.events),
        plan_code="premium",
        status="active",
        paid_cents=PREMIUM_CENTS,
    )


def _ben(now: int) -> Chapter:
    pen = _Pen("ben", now, Shape.BEFORE_BASIL)
    invoice = pen.invoice(1, "premium", start=-10, amount=PREMIUM_CENTS)
    # Created and activated within one second, as in every real checkout.
    waiting = pen.subscription("premium", start=-10, status="incomplete")
    pen.tell("customer.subscription.created", waiting, days=-10)
    active = pen.subscription("premium", start=-10)
    pen.tell("customer.subscription.updated", active, days=-10, previous={"status": "incomplete"})
    pen.tell("invoice.paid", invoice, days=-10)
    pen.tell("invoice.payment_succeeded", invoice, days=-10)
    pen.tell("charge.succeeded", pen.charge(days=-10, amount=PREMIUM_CENTS), days=-10)
    pen.tell("checkout.session.completed", pen.subscribe(days=-10, amount=PREMIUM_CENTS), days=-10)
    return Chapter(
        user_id="ben",
        title="subscribed; the checkout naming him came last",
        events=tuple(pen.events),
        plan_code="premium",
        status="active",
        valid_until=pen.days(-10) + MONTH_SECONDS + RENEWAL_SLACK_SECONDS,
        paid_cents=PREMIUM_CENTS,
    )


def _cleo(now: int) -> Chapter:
    pen = _Pen("cleo", now)
    upgrade_cents = 1_500
    pen.tell("checkout.session.completed", pen.subscribe(days=-12, amount=PREMIUM_CENTS), days=-12)
    pen.tell("customer.subscription.created", pen.subscription("premium", start=-12), days=-12)
    pen.tell("invoice.paid", pen.invoice(1, "premium", start=-12, amount=PREMIUM_CENTS), days=-12)
    pen.tell("customer.subscription.updated", pen.subscription("vip", start=-12), days=-4)
    pen.tell("invoice.paid", pen.invoice(2, "vip", start=-4, amount=upgrade_cents), days=-4)
    return Chapter(
        user_id="cleo",
        title="upgraded from premium to vip",
        events=tuple(pen.events),
        plan_code="vip",
        status="active",
        valid_until=pen.days(-12) + MONTH_SECONDS + RENEWAL_SLACK_SECONDS,
        paid_cents=PREMIUM_CENTS + upgrade_cents,
    )


def _paul(now: int) -> Chapter:
    pen = _Pen("paul", now)
    # Written at the checkout and stale since the downgrade: the price must win.
    metadata = {"user_id": "paul", "plan_code": "vip"}
    pen.tell("customer.subscription.created", pen.subscription("vip", start=-40, metadata=metadata), days=-40)
    pen.tell("invoice.paid", pen.invoice(1, "vip", start=-40, amount=VIP_CENTS), days=-40)
    renewed = pen.subscription("premium", start=-40, period_start=-10, metadata=metadata)
    pen.tell("customer.subscription.updated", renewed, days=-10)
    pen.tell("invoice.paid", pen.invoice(2, "premium", start=-10, amount=PREMIUM_CENTS), days=-10)
    return Chapter(
        user_id="paul",
        title="went from vip to premium; stale metadata",
        events=tuple(pen.events),
        plan_code="premium",
        status="active",
        valid_until=pen.days(-10) + MONTH_SECONDS + RENEWAL_SLACK_SECONDS,
        paid_cents=VIP_CENTS + PREMIUM_CENTS,
    )


def _dan(now: int) -> Chapter:
    pen = _Pen("dan", now, Shape.BEFORE_BASIL)
    metadata = {"user_id": "dan"}
    pen.tell("customer.subscription.created", pen.subscription("vip", start=-20, metadata=metadata), days=-20)
    pen.tell("invoice.payment_succeeded", pen.invoice(1, "vip", start=-20, amount=VIP_CENTS), days=-20)
    leaving = pen.subscription("vip", start=-20, metadata=metadata, cancel_at_period_end=True)
    pen.tell("customer.subscription.updated", leaving, days=-3, previous={"cancel_at_period_end": False})
    return Chapter(
        user_id="dan",
        title="cancelled; keeps vip to the period's end",
        events=tuple(pen.events),
        plan_code="vip",
        status="active",
        valid_until=pen.days(-20) + MONTH_SECONDS,
        paid_cents=VIP_CENTS,
    )


def _eve(now: int) -> Chapter:
    pen = _Pen("eve", now, Shape.BEFORE_BASIL)
    metadata = {"user_id": "eve"}
    pen.tell(
        "customer.subscription.created", pen.subscription("premium", start=-33, metadata=metadata), days=-33
    )
    pen.tell("invoice.paid", pen.invoice(1, "premium", start=-33, amount=PREMIUM_CENTS), days=-33)
    unpaid = pen.invoice(2, "premium", start=-3, amount=PREMIUM_CENTS, paid=False)
    pen.tell("invoice.payment_failed", unpaid, days=-3)
    due = pen.subscription("premium", start=-33, period_start=-3, status="past_due", metadata=metadata)
    pen.tell("customer.subscription.updated", due, days=-3, previous={"status": "active"})
    pen.tell("invoice.paid", pen.invoice(2, "premium", start=-3, amount=PREMIUM_CENTS), days=-1)
    recovered = pen.subscription("premium", start=-33, period_start=-3, metadata=metadata)
    pen.tell("customer.subscription.updated", recovered, days=-1, previous={"status": "past_due"})
    return Chapter(
        user_id="eve",
        title="her renewal failed, then was paid",
        events=tuple(pen.events),
        plan_code="premium",
        status="active",
        valid_until=pen.days(-3) + MONTH_SECONDS + RENEWAL_SLACK_SECONDS,
        paid_cents=2 * PREMIUM_CENTS,
    )


def _finn(now: int) -> Chapter:
    pen = _Pen("finn", now)
    metadata = {"user_id": "finn"}
    pen.tell(
        "customer.subscription.created", pen.subscription("premium", start=-35, metadata=metadata), days=-35
    )
    pen.tell("invoice.paid", pen.invoice(1, "premium", start=-35, amount=PREMIUM_CENTS), days=-35)
    unpaid = pen.invoice(2, "premium", start=-5, amount=PREMIUM_CENTS, paid=False)
    pen.tell("invoice.payment_failed", unpaid, days=-5)
    due = pen.subscription("premium", start=-35, period_start=-5, status="past_due", metadata=metadata)
    pen.tell("customer.subscription.updated", due, days=-5, previous={"status": "active"})
    return Chapter(
        user_id="finn",
        title="his renewal failed; keeps premium for now",
        events=tuple(pen.events),
        plan_code="premium",
        status="past_due",
        valid_until=pen.days(-5) + PAST_DUE_GRACE_SECONDS,
        paid_cents=PREMIUM_CENTS,
    )


def _gwen(now: int) -> Chapter:
    pen = _Pen("gwen", now)
    pen.tell("checkout.session.completed", pen.subscribe(days=-25, amount=VIP_CENTS), days=-25)
    pen.tell("customer.subscription.created", pen.subscription("vip", start=-25), days=-25)
    pen.tell("invoice.paid", pen.invoice(1, "vip", start=-25, amount=VIP_CENTS), days=-25)
    ended = pen.subscription("vip", start=-25, status="canceled", ended_at=pen.days(-2))
    pen.tell("customer.subscription.deleted", ended, days=-2)
    return Chapter(
        user_id="gwen",
        title="her subscription was deleted",
        events=tuple(pen.events),
        status="canceled",
        paid_cents=VIP_CENTS,
    )


def _hugo(now: int) -> Chapter:
    pen = _Pen("hugo", now)
    trial_end = pen.days(10)
    trial = pen.subscription("premium", start=-4, status="trialing", trial_end=trial_end)
    pen.tell("customer.subscription.created", trial, days=-4)
    pen.tell("invoice.paid", pen.invoice(1, "premium", start=-4, amount=0), days=-4)
    session = pen.subscribe(days=-4, amount=0)
    session["payment_status"] = "no_payment_required"
    pen.tell("checkout.session.completed", session, days=-4)
    return Chapter(
        user_id="hugo",
        title="tries premium for two weeks",
        events=tuple(pen.events),
        plan_code="premium",
        status="trialing",
        valid_until=trial_end,
    )


def _iris(now: int) -> Chapter:
    pen = _Pen("iris", now)
    session = pen.purchase("vip", days=-6, amount=0, payment_status="no_payment_required")
    pen.tell("checkout.session.completed", session, days=-6)
    return Chapter(
        user_id="iris",
        title="bought vip with a 100 % coupon",
        events=tuple(pen.events),
        plan_code="vip",
        status="active",
    )


def _jack(now: int) -> Chapter:
    pen = _Pen("jack", now)
    unpaid = pen.purchase("premium", days=-5, amount=PREMIUM_CENTS, payment_status="unpaid")
    pen.tell("checkout.session.completed", unpaid, days=-5)
    paid = pen.purchase("premium", days=-5, amount=PREMIUM_CENTS)
    pen.tell("checkout.session.async_payment_succeeded", paid, days=-2)
    return Chapter(
        user_id="jack",
        title="paid by bank transfer, which arrived",
        events=tuple(pen.events),
        plan_code="premium",
        status="active",
        paid_cents=PREMIUM_CENTS,
    )


def _kate(now: int) -> Chapter:
    pen = _Pen("kate", now)
    unpaid = pen.purchase("premium", days=-5, amount=PREMIUM_CENTS, payment_status="unpaid")
    pen.tell("checkout.session.completed", unpaid, days=-5)
    pen.tell("checkout.session.async_payment_failed", unpaid, days=-2)
    return Chapter(
        user_id="kate",
        title="paid by bank transfer, which failed",
        events=tuple(pen.events),
        status="failed",
    )


def _lena(now: int) -> Chapter:
    pen = _Pen("lena", now)
    back_cents = 1_000
    pen.tell("checkout.session.completed", pen.purchase("premium", days=-8, amount=PREMIUM_CENTS), days=-8)
    pen.tell("charge.succeeded", pen.charge(days=-8, amount=PREMIUM_CENTS), days=-8)
    refund = objects.refund("re_lena", amount=back_cents, charge_id="ch_lena", created=pen.days(-1))
    # A refund names no customer; the seller who makes it may say whose it is.
    refund["metadata"] = {"user_id": "lena"}
    pen.tell("refund.created", refund, days=-1)
    refunded = pen.charge(days=-8, amount=PREMIUM_CENTS, amount_refunded=back_cents)
    pen.tell("charge.refunded", refunded, days=-1)
    return Chapter(
        user_id="lena",
        title="got a third back and keeps premium",
        events=tuple(pen.events),
        plan_code="premium",
        status="active",
        paid_cents=PREMIUM_CENTS,
    )


def _otto(now: int) -> Chapter:
    pen = _Pen("otto", now, Shape.BEFORE_BASIL)
    pen.tell("checkout.session.completed", pen.purchase("premium", days=-90, amount=PREMIUM_CENTS), days=-90)
    pen.tell("customer.subscription.created", pen.subscription("vip", start=-28), days=-28)
    pen.tell("invoice.payment_succeeded", pen.invoice(1, "vip", start=-28, amount=VIP_CENTS), days=-28)
    ended = pen.subscription("vip", start=-28, status="canceled", ended_at=pen.days(-1))
    pen.tell("customer.subscription.deleted", ended, days=-1)
    return Chapter(
        user_id="otto",
        title="ended vip; the premium he once bought stays",
        events=tuple(pen.events),
        plan_code="premium",
        status="active",
        paid_cents=PREMIUM_CENTS + VIP_CENTS,
    )


def _guest(now: int) -> Chapter:
    pen = _Pen("guest", now)
    session = pen.purchase("premium", days=-1, amount=PREMIUM_CENTS)
    session["client_reference_id"] = session["customer"] = None
    pen.tell("checkout.session.completed", session, days=-1, outcome="parked", reason="unknown_user")
    return Chapter(
        user_id=None,
        title="a guest bought premium and left no name",
        events=tuple(pen.events),
        paid_cents=PREMIUM_CENTS,
    )


def _mona(now: int) -> Chapter:
    pen = _Pen("mona", now)
    snapshot = pen.subscription("gold", start=-2, metadata={"user_id": "mona"})
    pen.tell(
        "customer.subscription.created",
        snapshot,
        days=-2,
        outcome="parked",
        reason="unknown_price:gold_monthly",
    )
    return Chapter(
        user_id="mona",
        title="subscribed at a price that no plan knows",
        events=tuple(pen.events),
        status="unmapped",
    )


def _nora(now: int) -> Chapter:
    pen = _Pen("nora", now)
    session = {**pen.purchase("vip", days=-1, amount=VIP_CENTS), "livemode": True}
    pen.tell(
        "checkout.session.completed",
        session,
        days=-1,
        livemode=True,
        outcome="ignored",
        reason="other_livemode",
    )
    return Chapter(
        user_id="nora", title="bought vip in live mode, at a test service", events=tuple(pen.events)
    )


def _rita(now: int) -> Chapter:
    pen = _Pen("rita", now)
    coupon = {"id": "SPRING", "object": "coupon", "percent_off": 20, "valid": True}
    pen.tell("coupon.created", coupon, days=-7, outcome="ignored", reason="not_handled")
    return Chapter(user_id="rita", title="got a coupon; nothing depends on it", events=tuple(pen.events))


_CHAPTERS = (
    _ada,
    _ben,
    _cleo,
    _dan,
    _eve,
    _finn,
    _gwen,
    _hugo,
    _iris,
    _jack,
    _kate,
    _lena,
    _mona,
    _nora,
    _otto,
    _paul,
    _rita,
    _guest,
)
