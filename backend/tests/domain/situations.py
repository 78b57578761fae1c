"""Every situation that a paying user can be in, as a short story of Stripe's events and what must come of it.

`docs/situations.md` is written from this list, `test_situations.py` tells every story.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from backend.app.billing.domain.facts import About, Event, GrantFact, Translation
from backend.app.billing.providers.stripe_event import StripeEvent
from backend.app.simulator import objects
from backend.tests.domain.events import DAY, HOUR, MONTH, T0, at, event, subscription

Step = StripeEvent | tuple[Event, Translation]

SLACK = 72 * HOUR
GRACE = 14 * DAY
USER = {"user_id": "user_1"}
CREATED, UPDATED, DELETED = (f"customer.subscription.{verb}" for verb in ("created", "updated", "deleted"))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What user_1 has at the end, how the last event was answered, the settled money, and what the owner heard.

    `until` is in seconds after the story's beginning; `notices` are parts of the texts, in order.
    """

    plan: str = "free"
    status: str = "none"
    until: int | None = None
    answer: str = "success"
    settled: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    features: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Situation:
    """A row of the table; `otherwise` tells the outcome where the policy is answered differently.

    `per_unit` are features that the story's catalog declares so.
    """

    table: str
    situation: str
    outcome: str
    story: tuple[Step, ...]
    then: Outcome
    asked_at: int = 2 * DAY
    policy: str | None = None
    otherwise: Mapping[str | int, Outcome] = field(default_factory=dict)
    per_unit: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """A row that other parts of the system show: the path of the test, or why there is none yet."""

    table: str
    situation: str
    outcome: str
    shown_by: str | None


def changed(then: Outcome, **changes: Any) -> Outcome:
    return replace(then, **changes)


def sub(
    event_id: str, after: int, kind: str = UPDATED, *, previous: dict[str, Any] | None = None, **rest: Any
) -> StripeEvent:
    """A snapshot of sub_1, which names user_1."""
    extra = rest.pop("extra", {})
    content = {**subscription(**{"metadata": USER, **rest}), **extra}
    return event(event_id, kind, content, after=after, previous_attributes=previous)


def ended(event_id: str, after: int, **rest: Any) -> StripeEvent:
    return sub(event_id, after, DELETED, status="canceled", ended_at=T0 + after, **rest)


def buys(
    event_id: str, kind: str = "completed", *, after: int = 0, plan: str | None = "vip", **rest: Any
) -> StripeEvent:
    """A checkout of user_1, paid by pi_1."""
    lines = rest.pop("lines", None)
    content = objects.checkout_session(
        rest.pop("session_id", "cs_1"),
        **{
            "payment_intent": "pi_1",
            "client_reference_id": "user_1",
            "metadata": {"plan_code": plan} if plan else {},
            **rest,
        },
    )
    if lines is not None:
        content["line_items"] = {"object": "list", "data": lines}
    return event(event_id, f"checkout.session.{kind}", content, after=after)


def bill(event_id: str, kind: str = "paid", *, after: int = 0, **rest: Any) -> StripeEvent:
    """Invoice in_1 of sub_1, which names user_1."""
    extra = rest.pop("extra", {})
    paid = kind in ("paid", "payment_succeeded", "overpaid")
    content = objects.invoice(
        rest.pop("invoice_id", "in_1"),
        **{"customer": "cus_1", "subscription_id": "sub_1", "metadata": USER, "paid": paid, **rest},
    )
    return event(event_id, f"invoice.{kind}", {**content, **extra}, after=after)


def manual_bill(event_id: str, kind: str = "paid", *, after: int = 0, **extra: Any) -> StripeEvent:
    """An invoice written by hand that sells vip."""
    return bill(
        event_id,
        kind,
        after=after,
        subscription_id=None,
        billing_reason="manual",
        line_price=objects.price("vip"),
        shape=objects.Shape.BEFORE_BASIL,
        extra=extra,
    )


def paid_by(intent_id: str = "pi_1", *, after: int = 0) -> StripeEvent:
    """The link between in_1 and its payment."""
    content = objects.invoice_payment("inpay_1", invoice_id="in_1", intent_id=intent_id)
    return event("evt_link", "invoice_payment.paid", content, after=after)


def gives_back(
    event_id: str,
    kind: str = "created",
    *,
    after: int = DAY,
    amount: int = 2999,
    status: str = "succeeded",
    refund_id: str = "re_1",
) -> StripeEvent:
    content = objects.refund(refund_id, amount=amount, intent_id="pi_1", charge_id="ch_1", status=status)
    return event(event_id, f"refund.{kind}", content, after=after)


def disputes(event_id: str, kind: str, status: str, *, after: int = DAY) -> StripeEvent:
    content = objects.dispute("dp_1", intent_id="pi_1", charge_id="ch_1", status=status)
    return event(event_id, f"charge.dispute.{kind}", content, after=after)


def money(event_id: str, event_type: str, *, after: int = 0, **rest: Any) -> StripeEvent:
    """A payment or charge that names our user and plan itself."""
    make = objects.charge if event_type.startswith("charge.") else objects.payment_intent
    object_id = "ch_1" if event_type.startswith("charge.") else "pi_1"
    content = make(object_id, **{"metadata": {**USER, "plan_code": "vip"}, "customer": "cus_1", **rest})
    return event(event_id, event_type, content, after=after)


def happens(
    event_id: str, event_type: str, content: dict[str, Any], *, after: int = DAY, **envelope: Any
) -> StripeEvent:
    return event(event_id, event_type, content, after=after, **envelope)


def granted(
    grant_id: str,
    *,
    plan: str | None = None,
    features: Mapping[str, Any] | None = None,
    override: bool = False,
    removed: bool = False,
    after: int = 0,
    ends_at: datetime | None = None,
) -> Step:
    """A person's grant to user_1, or its end."""
    name = f"evt_{grant_id}_{removed}"
    fact = GrantFact(
        event_id=name,
        event_type="grant",
        as_of=at(after),
        grant_id=grant_id,
        user_id="user_1",
        plan_code=plan,
        features=features or {},
        is_override=override,
        starts_at=at(after),
        ends_at=ends_at,
        is_removed=removed,
        reason="a favour",
        actor="ann",
    )
    envelope = Event(
        account="", livemode=False, id=name, type="grant", api_version=None, occurred_at=at(after)
    )
    key = f"grant:{grant_id}"
    return envelope, Translation(subject=key, facts=(About(key=key, fact=fact),))


PREMIUM = Outcome(plan="premium", status="active", until=MONTH + SLACK)
VIP_FOR_EVER = Outcome(plan="vip", status="active", settled=("cs:cs_1",))
NOTHING = Outcome()
LINE = {"price": objects.price("vip"), "quantity": 1, "id": "li_1"}
THREE_SEATS = {**LINE, "quantity": 3, "amount_total": 3000}
UNITS_REFUNDED = changed(VIP_FOR_EVER, settled=("cs:cs_1", "re:re_1:refund:succeeded"))
STATUS, EVENTS, CROSS = "Status of a subscription", "Events", "Across sources and events"
PAUSE_OUTCOME = "Access is kept, as Stripe says; never read as `paused`."
DISPUTED = changed(VIP_FOR_EVER, plan="free", status="disputed", notices=("needs_response",))


# What an account loses, the account then, what of it was otherwise before, and what the owner hears.
RESTRICTIONS: tuple[tuple[str, dict[str, Any], dict[str, Any], str], ...] = (
    *(
        (f"`{name}` turns false", {name: False}, {name: True}, f"acct_1: {name} turned off")
        for name in ("charges_enabled", "payouts_enabled", "details_submitted")
    ),
    (
        "`requirements.disabled_reason` appears",
        {"requirements": {"disabled_reason": "rejected.fraud"}},
        {"requirements": {"disabled_reason": None}},
        "acct_1: restricted, because of rejected.fraud",
    ),
)


def pausing(behavior: str) -> Situation:
    return Situation(
        table=STATUS,
        situation=f"collection is paused with `{behavior}`",
        outcome=PAUSE_OUTCOME,
        policy=f"pause_collection_{behavior}",
        story=(sub("evt_1", 0), sub("evt_2", DAY, extra={"pause_collection": {"behavior": behavior}})),
        then=PREMIUM,
        otherwise={"revoke": Outcome(status="paused")},
    )


STATUSES = (
    Situation(
        table=STATUS,
        situation="`incomplete`",
        outcome="Nothing yet: the first payment has 23 hours.",
        story=(sub("evt_1", 0, CREATED, status="incomplete"),),
        then=Outcome(status="incomplete"),
    ),
    Situation(
        table=STATUS,
        situation="`incomplete_expired`",
        outcome="Nothing, for good; other sources are untouched.",
        story=(
            buys("evt_0", plan="premium"),
            sub("evt_1", 0, CREATED, status="incomplete", prices=[objects.price("vip")]),
            sub("evt_2", DAY, status="incomplete_expired", prices=[objects.price("vip")]),
        ),
        then=changed(VIP_FOR_EVER, plan="premium"),
    ),
    Situation(
        table=STATUS,
        situation="`trialing`",
        outcome="The item's plan until the trial's end.",
        story=(sub("evt_1", 0, CREATED, status="trialing", trial_end=T0 + 7 * DAY),),
        then=Outcome(plan="premium", status="trialing", until=7 * DAY),
    ),
    Situation(
        table=STATUS,
        situation="an item with a trial of its own",
        outcome="The item's plan until its own trial's end.",
        story=(
            sub(
                "evt_1",
                0,
                extra={
                    "items": {
                        "data": [
                            {
                                "id": "si_1",
                                "price": objects.price("vip"),
                                "quantity": 1,
                                "current_period_end": T0 + MONTH,
                                "current_trial": {"end_date": T0 + 5 * DAY},
                            }
                        ]
                    }
                },
            ),
        ),
        then=Outcome(plan="vip", status="active", until=5 * DAY),
    ),
    Situation(
        table=STATUS,
        situation="`active`",
        outcome="The plan of each item until its period's end plus the renewal's slack.",
        story=(sub("evt_1", 0),),
        then=PREMIUM,
        policy="renewal_slack_hours",
        otherwise={0: changed(PREMIUM, until=MONTH)},
    ),
    Situation(
        table=STATUS,
        situation="`active`, to be canceled at the period's end",
        outcome="Kept to exactly that date, without slack.",
        story=(sub("evt_1", 0, cancel_at_period_end=True),),
        then=changed(PREMIUM, until=MONTH),
    ),
    Situation(
        table=STATUS,
        situation="`active`, to be canceled at a date",
        outcome="Kept to exactly that date, without slack.",
        story=(sub("evt_1", 0, cancel_at=T0 + 9 * DAY),),
        then=changed(PREMIUM, until=9 * DAY),
    ),
    Situation(
        table=STATUS,
        situation="a cancellation is undone",
        outcome="Restored, as if it had never been.",
        story=(sub("evt_1", 0, cancel_at_period_end=True), sub("evt_2", DAY)),
        then=PREMIUM,
    ),
    Situation(
        table=STATUS,
        situation="`past_due`",
        outcome="Kept until the grace ends, counted once from the first failure.",
        story=(
            sub("evt_1", 0),
            sub("evt_2", DAY, start=MONTH, status="past_due"),
            sub("evt_3", 3 * DAY, start=MONTH, status="past_due"),
        ),
        asked_at=4 * DAY,
        then=Outcome(plan="premium", status="past_due", until=DAY + GRACE),
        policy="past_due_grace_days",
        otherwise={
            0: Outcome(status="expired"),
            5: Outcome(plan="premium", status="past_due", until=6 * DAY),
        },
    ),
    Situation(
        table=STATUS,
        situation="`past_due`, then paid",
        outcome="The delinquency is over, also before the subscription's own snapshot says so.",
        story=(
            sub("evt_1", 0, start=-MONTH),
            sub("evt_2", 0, status="past_due"),
            bill("evt_3", after=DAY),
        ),
        then=Outcome(plan="premium", status="past_due", until=MONTH + SLACK, settled=("in:in_1",)),
    ),
    Situation(
        table=STATUS,
        situation="`past_due` again after a recovery of which only the payment was heard",
        outcome="A new grace, counted from the new failure.",
        story=(
            sub("evt_1", 0, status="past_due"),
            bill("evt_2", after=DAY),
            sub("evt_3", MONTH, status="past_due", start=MONTH),
        ),
        asked_at=MONTH + DAY,
        then=Outcome(plan="premium", status="past_due", until=MONTH + GRACE, settled=("in:in_1",)),
    ),
    Situation(
        table=STATUS,
        situation="`unpaid`",
        outcome="Revoked: all retries have failed.",
        story=(sub("evt_1", 0), sub("evt_2", DAY, status="unpaid")),
        then=Outcome(status="unpaid"),
        policy="unpaid",
        otherwise={"keep": changed(PREMIUM, status="unpaid")},
    ),
    Situation(
        table=STATUS,
        situation="`paused`",
        outcome="Revoked, as Stripe's documentation asks; resuming restores.",
        story=(sub("evt_1", 0), sub("evt_2", DAY, "customer.subscription.paused", status="paused")),
        then=Outcome(status="paused"),
    ),
    pausing("void"),
    pausing("keep_as_draft"),
    pausing("mark_uncollectible"),
    Situation(
        table=STATUS,
        situation="`canceled`",
        outcome="Revoked at its end; nothing that arrives later revives it.",
        story=(sub("evt_1", 0), ended("evt_2", DAY), sub("evt_3", 2 * DAY)),
        then=Outcome(status="canceled"),
    ),
    Situation(
        table=STATUS,
        situation="a status of tomorrow",
        outcome="The last known state is kept, nothing new is granted, the owner hears of it.",
        story=(sub("evt_1", 0), sub("evt_2", DAY, status="hibernating", prices=[objects.price("vip")])),
        then=changed(PREMIUM, notices=("unknown status 'hibernating'",)),
    ),
)

EVENT_ROWS = (
    Situation(
        table=EVENTS,
        situation="a checkout is paid",
        outcome="Its plan, for ever unless the plan has an end.",
        story=(buys("evt_1"),),
        then=VIP_FOR_EVER,
    ),
    Situation(
        table=EVENTS,
        situation="a checkout needs no payment",
        outcome="Its plan; a ledger line of 0.",
        story=(buys("evt_1", payment_status="no_payment_required", amount_total=0),),
        then=VIP_FOR_EVER,
    ),
    Situation(
        table=EVENTS,
        situation="a checkout with its lines",
        outcome="The plan of each line's price.",
        story=(
            buys("evt_1", plan=None, lines=[LINE, {**LINE, "price": objects.price("premium"), "id": "li_2"}]),
        ),
        then=VIP_FOR_EVER,
    ),
    Situation(
        table=EVENTS,
        situation="a checkout that made an invoice",
        outcome="One purchase, not two.",
        story=(
            buys("evt_1", invoice="in_1"),
            manual_bill("evt_2", after=1),
            gives_back("evt_3"),
        ),
        then=Outcome(status="refunded", settled=("cs:cs_1", "in:in_1", "re:re_1:refund:succeeded")),
    ),
    Situation(
        table=EVENTS,
        situation="a checkout completed, `unpaid`",
        outcome="Awaits its payment; no grant.",
        story=(buys("evt_1", payment_status="unpaid"),),
        then=Outcome(status="awaiting_payment"),
    ),
    Situation(
        table=EVENTS,
        situation="a checkout of a subscription",
        outcome="User, customer and subscription belong together; access only from the subscription's state.",
        story=(
            buys("evt_1", mode="subscription", customer="cus_1", subscription="sub_1", payment_intent=None),
            sub("evt_2", 1, metadata={}),
        ),
        then=changed(PREMIUM, settled=("cs:cs_1",)),
    ),
    Situation(
        table=EVENTS,
        situation="a checkout of a subscription that is not active yet",
        outcome="Nothing yet.",
        story=(
            buys("evt_1", mode="subscription", customer="cus_1", subscription="sub_1", payment_intent=None),
        ),
        then=Outcome(status="incomplete", settled=("cs:cs_1",)),
    ),
    Situation(
        table=EVENTS,
        situation="a checkout in `setup` mode",
        outcome="Ignored.",
        story=(buys("evt_1", mode="setup"),),
        then=Outcome(answer="ignored"),
    ),
    Situation(
        table=EVENTS,
        situation="a slow payment arrives",
        outcome="Granted when it has.",
        story=(buys("evt_1", payment_status="unpaid"), buys("evt_2", "async_payment_succeeded", after=DAY)),
        then=VIP_FOR_EVER,
    ),
    Situation(
        table=EVENTS,
        situation="a slow payment fails",
        outcome="Closed without a grant; the owner hears of it.",
        story=(
            buys("evt_1", payment_status="unpaid"),
            buys("evt_2", "async_payment_failed", after=DAY, payment_status="unpaid"),
        ),
        then=Outcome(status="failed", notices=("the payment failed",)),
    ),
    Situation(
        table=EVENTS,
        situation="a checkout expires",
        outcome="What was pending is dropped.",
        story=(
            buys("evt_1", payment_status="unpaid"),
            buys("evt_2", "expired", after=DAY, payment_status="unpaid"),
        ),
        then=Outcome(status="expired"),
    ),
    Situation(
        table=EVENTS,
        situation="a subscription's upgrade waits in `pending_update`",
        outcome="Not granted before it is applied.",
        story=(
            sub(
                "evt_1",
                0,
                extra={"pending_update": {"subscription_items": [{"price": objects.price("vip")}]}},
            ),
        ),
        then=PREMIUM,
    ),
    Situation(
        table=EVENTS,
        situation="the `pending_update` is applied",
        outcome="The new plan replaces the old one.",
        story=(
            sub("evt_1", 0),
            sub("evt_2", DAY, "customer.subscription.pending_update_applied", prices=[objects.price("vip")]),
        ),
        then=changed(PREMIUM, plan="vip"),
    ),
    Situation(
        table=EVENTS,
        situation="the `pending_update` expires",
        outcome="All stays as it was.",
        story=(sub("evt_1", 0), sub("evt_2", DAY, "customer.subscription.pending_update_expired")),
        then=PREMIUM,
    ),
    Situation(
        table=EVENTS,
        situation="a paused subscription is resumed",
        outcome="Restored.",
        story=(
            sub("evt_1", 0, "customer.subscription.paused", status="paused"),
            sub("evt_2", DAY, "customer.subscription.resumed"),
        ),
        then=PREMIUM,
    ),
    Situation(
        table=EVENTS,
        situation="a trial will end",
        outcome="Nothing changes; the owner hears of it, once a day for all trials.",
        story=(
            sub("evt_1", 0, status="trialing", trial_end=T0 + 5 * DAY),
            sub(
                "evt_2",
                DAY,
                "customer.subscription.trial_will_end",
                status="trialing",
                trial_end=T0 + 5 * DAY,
            ),
            sub(
                "evt_3",
                DAY + 1,
                "customer.subscription.trial_will_end",
                status="trialing",
                trial_end=T0 + 5 * DAY,
            ),
        ),
        then=Outcome(
            plan="premium", status="trialing", until=5 * DAY, notices=("The trial of subscription sub_1",)
        ),
    ),
    Situation(
        table=EVENTS,
        situation="`invoice.paid` and `invoice.payment_succeeded`",
        outcome="One ledger entry for one invoice.",
        story=(sub("evt_1", 0), bill("evt_2"), bill("evt_3", "payment_succeeded")),
        then=changed(PREMIUM, settled=("in:in_1",)),
    ),
    Situation(
        table=EVENTS,
        situation="an invoice written by hand is paid",
        outcome="Its lines are purchases.",
        story=(manual_bill("evt_1"),),
        then=Outcome(plan="vip", status="active", settled=("in:in_1",)),
    ),
    Situation(
        table=EVENTS,
        situation="an invoice over 0",
        outcome="A ledger line of 0; the subscription decides about access.",
        story=(sub("evt_1", 0, status="trialing", trial_end=T0 + 7 * DAY), bill("evt_2", amount=0)),
        then=Outcome(plan="premium", status="trialing", until=7 * DAY, settled=("in:in_1",)),
    ),
    *(
        Situation(
            table=EVENTS,
            situation=f"`invoice.{kind}`",
            outcome="Not a reason to revoke by itself" + ("; the owner hears of it." if notice else "."),
            story=(sub("evt_1", 0), bill("evt_2", kind, after=DAY)),
            then=changed(PREMIUM, notices=(notice,) if notice else ()),
        )
        for kind, notice in (
            ("payment_action_required", "must confirm"),
            ("payment_attempt_required", "attempted by hand"),
            ("overdue", "overdue"),
            ("finalization_failed", "could not be finalized"),
            ("voided", None),
            ("marked_uncollectible", "uncollectible"),
            ("deleted", None),
            ("created", None),
            ("finalized", None),
            ("sent", None),
            ("updated", None),
            ("will_be_due", None),
            ("overpaid", "more was paid"),
        )
    ),
    Situation(
        table=EVENTS,
        situation="`invoice.payment_failed`",
        outcome="Not a reason to revoke by itself; the owner hears of it, once a day for all invoices.",
        story=(
            sub("evt_1", 0),
            bill("evt_2", "payment_failed", after=DAY),
            bill("evt_3", "payment_failed", after=DAY + HOUR, invoice_id="in_2"),
        ),
        then=changed(PREMIUM, notices=("in_1: the payment failed",)),
    ),
    Situation(
        table=EVENTS,
        situation="`invoice.upcoming`",
        outcome="Nothing changes; the owner hears of it, once a day for all invoices.",
        story=(
            sub("evt_1", 0),
            *(
                happens(event_id, "invoice.upcoming", {"object": "invoice", "customer": "cus_1"}, after=after)
                for event_id, after in (("evt_2", DAY), ("evt_3", DAY + HOUR), ("evt_4", 3 * DAY))
            ),
        ),
        then=changed(PREMIUM, notices=("customer cus_1 is coming up (event evt_2)", "(event evt_4)")),
    ),
    Situation(
        table=EVENTS,
        situation="`invoice_payment.paid`",
        outcome="Links the payment to its invoice: a dispute of it reaches the subscription.",
        story=(
            sub("evt_1", 0),
            bill("evt_2"),
            paid_by(),
            disputes("evt_3", "created", "needs_response"),
        ),
        then=Outcome(status="disputed", settled=("in:in_1",), notices=("needs_response",)),
    ),
    Situation(
        table=EVENTS,
        situation="a payment that names our user and plan succeeds",
        outcome="A purchase of its own.",
        story=(money("evt_1", "payment_intent.succeeded"),),
        then=Outcome(plan="vip", status="active", settled=("pi:pi_1:payment_intent_succeeded",)),
    ),
    *(
        Situation(
            table=EVENTS,
            situation=f"`payment_intent.{kind}`",
            outcome="A ledger line; nothing is granted before the money is there.",
            story=(money("evt_1", f"payment_intent.{kind}", status="processing"),),
            then=Outcome(status="awaiting_payment"),
        )
        for kind in (
            "processing",
            "payment_failed",
            "canceled",
            "partially_funded",
            "requires_action",
            "amount_capturable_updated",
        )
    ),
    *(
        Situation(
            table=EVENTS,
            situation=f"`charge.{kind}`",
            outcome="A ledger line, nothing else.",
            story=(money("evt_1", f"charge.{kind}", captured=kind == "captured"),),
            then=Outcome(settled=("ch:ch_1:charge_captured",) if kind == "captured" else ()),
        )
        for kind in ("succeeded", "failed", "pending", "captured", "expired", "updated")
    ),
    Situation(
        table=EVENTS,
        situation="a one-time purchase is fully refunded",
        outcome="Revoked.",
        story=(buys("evt_1"), gives_back("evt_2")),
        then=Outcome(status="refunded", settled=("cs:cs_1", "re:re_1:refund:succeeded")),
    ),
    Situation(
        table=EVENTS,
        situation="a one-time purchase is partly refunded",
        outcome="Kept and flagged, below the policy's share.",
        story=(buys("evt_1"), gives_back("evt_2", amount=1600)),
        then=changed(VIP_FOR_EVER, settled=("cs:cs_1", "re:re_1:refund:succeeded")),
        policy="refund_revoke_percent",
        otherwise={50: Outcome(status="refunded", settled=("cs:cs_1", "re:re_1:refund:succeeded"))},
    ),
    Situation(
        table=EVENTS,
        situation="some units of a one-time purchase are refunded",
        outcome="All of them are kept, and the purchase is flagged.",
        story=(
            buys("evt_1", plan=None, lines=[THREE_SEATS], amount_total=3000),
            gives_back("evt_2", amount=1000),
        ),
        then=changed(UNITS_REFUNDED, features={"max_devices": 30}),
        per_unit=("max_devices",),
        policy="refund_partial",
        otherwise={"reduce_quantity": changed(UNITS_REFUNDED, features={"max_devices": 20})},
    ),
    Situation(
        table=EVENTS,
        situation="all units of a one-time purchase are refunded, its shipping is not",
        outcome="All of them are kept, and the purchase is flagged.",
        story=(
            buys("evt_1", plan=None, lines=[THREE_SEATS], amount_total=3500),
            gives_back("evt_2", amount=3000),
        ),
        then=changed(UNITS_REFUNDED, features={"max_devices": 30}),
        per_unit=("max_devices",),
        policy="refund_partial",
        otherwise={
            "reduce_quantity": changed(
                UNITS_REFUNDED, plan="free", status="refunded", features={"max_devices": 1}
            )
        },
    ),
    Situation(
        table=EVENTS,
        situation="a part of a purchase of several lines is refunded",
        outcome="Kept and flagged under either answer: a refund does not say which line it is for.",
        story=(
            buys(
                "evt_1",
                plan=None,
                lines=[THREE_SEATS, {**LINE, "price": objects.price("premium"), "id": "li_2"}],
                amount_total=4000,
            ),
            gives_back("evt_2", amount=1000),
        ),
        then=changed(UNITS_REFUNDED, features={"max_devices": 30}),
        per_unit=("max_devices",),
        policy="refund_partial",
        otherwise={"reduce_quantity": changed(UNITS_REFUNDED, features={"max_devices": 30})},
    ),
    Situation(
        table=EVENTS,
        situation="two partial refunds make a full one, one of them told only by the charge",
        outcome="Revoked.",
        story=(
            buys("evt_1"),
            gives_back("evt_2", amount=1000),
            happens(
                "evt_3",
                "charge.refunded",
                objects.charge("ch_1", amount_refunded=2999, payment_intent="pi_1"),
            ),
        ),
        then=Outcome(
            status="refunded",
            settled=("ch:ch_1:charge_refunded:2999", "cs:cs_1", "re:re_1:refund:succeeded"),
        ),
    ),
    Situation(
        table=EVENTS,
        situation="a refund of a subscription's invoice",
        outcome="Kept: a refund does not cancel.",
        story=(sub("evt_1", 0), bill("evt_2"), paid_by(), gives_back("evt_3")),
        then=changed(PREMIUM, settled=("in:in_1", "re:re_1:refund:succeeded")),
        policy="refund_subscription",
        otherwise={"revoke": Outcome(status="refunded", settled=("in:in_1", "re:re_1:refund:succeeded"))},
    ),
    Situation(
        table=EVENTS,
        situation="a subscription's invoice is refunded in part",
        outcome="Kept under either answer.",
        story=(sub("evt_1", 0), bill("evt_2"), paid_by(), gives_back("evt_3", amount=100)),
        then=changed(PREMIUM, settled=("in:in_1", "re:re_1:refund:succeeded")),
        policy="refund_subscription",
        otherwise={"revoke": changed(PREMIUM, settled=("in:in_1", "re:re_1:refund:succeeded"))},
    ),
    Situation(
        table=EVENTS,
        situation="a refund is pending",
        outcome="Kept until it succeeds.",
        story=(buys("evt_1"), gives_back("evt_2", status="pending")),
        then=VIP_FOR_EVER,
    ),
    *(
        Situation(
            table=EVENTS,
            situation=f"a refund is `{status}` after it had succeeded",
            outcome="Restored.",
            story=(
                buys("evt_1"),
                gives_back("evt_2"),
                gives_back("evt_3", "updated", after=2 * DAY, status=status),
            ),
            then=changed(VIP_FOR_EVER, settled=("cs:cs_1", "re:re_1:refund:succeeded")),
        )
        for status in ("failed", "canceled")
    ),
    Situation(
        table=EVENTS,
        situation="a credit note over a paid one-time invoice",
        outcome="Like a refund of it.",
        story=(
            manual_bill("evt_1"),
            happens(
                "evt_2",
                "credit_note.created",
                {"id": "cn_1", "invoice": "in_1", "amount": 2999, "type": "post_payment"},
            ),
        ),
        then=Outcome(status="refunded", settled=("in:in_1",)),
    ),
    Situation(
        table=EVENTS,
        situation="a credit note before the payment",
        outcome="Kept: what it takes off was never paid.",
        story=(
            happens(
                "evt_1",
                "credit_note.created",
                {"id": "cn_1", "invoice": "in_1", "amount": 2999, "type": "pre_payment"},
                after=0,
            ),
            manual_bill("evt_2", after=1),
        ),
        then=Outcome(plan="vip", status="active", settled=("in:in_1",)),
    ),
    Situation(
        table=EVENTS,
        situation="a credit note is voided",
        outcome="Restored.",
        story=(
            manual_bill("evt_1"),
            happens("evt_2", "credit_note.created", {"id": "cn_1", "invoice": "in_1", "amount": 2999}),
            happens(
                "evt_3",
                "credit_note.voided",
                {"id": "cn_1", "invoice": "in_1", "amount": 2999},
                after=DAY + 1,
            ),
        ),
        then=Outcome(plan="vip", status="active", settled=("in:in_1",)),
    ),
    Situation(
        table=EVENTS,
        situation="an inquiry (`warning_*`) is opened",
        outcome="Kept; the owner hears of it.",
        story=(buys("evt_1"), disputes("evt_2", "created", "warning_needs_response")),
        then=changed(VIP_FOR_EVER, notices=("warning_needs_response",)),
    ),
    Situation(
        table=EVENTS,
        situation="a dispute is opened",
        outcome="The disputed source is suspended, others are kept; the owner hears of it.",
        story=(buys("evt_1"), disputes("evt_2", "created", "needs_response")),
        then=DISPUTED,
        policy="dispute_open",
        otherwise={"keep": changed(VIP_FOR_EVER, notices=("needs_response",))},
    ),
    *(
        Situation(
            table=EVENTS,
            situation=f"a dispute becomes `{status}`",
            outcome="Stays suspended.",
            story=(
                buys("evt_1"),
                disputes("evt_2", "created", "needs_response"),
                disputes("evt_3", "updated", status, after=DAY + 1),
            ),
            then=DISPUTED,
        )
        for status in ("under_review", "appeal_needs_response", "appeal_under_review", "a_word_of_tomorrow")
    ),
    Situation(
        table=EVENTS,
        situation="a dispute's money moves",
        outcome="Ledger lines.",
        story=(
            buys("evt_1"),
            disputes("evt_2", "created", "needs_response"),
            disputes("evt_3", "funds_withdrawn", "needs_response"),
            disputes("evt_4", "funds_reinstated", "won", after=2 * DAY),
        ),
        then=changed(
            VIP_FOR_EVER,
            settled=(
                "cs:cs_1",
                "dp:dp_1:charge_dispute_funds_reinstated",
                "dp:dp_1:charge_dispute_funds_withdrawn",
            ),
            notices=("needs_response",),
        ),
    ),
    *(
        Situation(
            table=EVENTS,
            situation=f"a dispute is closed as `{status}`",
            outcome="Restored.",
            story=(
                buys("evt_1"),
                disputes("evt_2", "created", "needs_response"),
                disputes("evt_3", "closed", status, after=DAY + 1),
            ),
            then=changed(VIP_FOR_EVER, notices=("needs_response", status)),
        )
        for status in ("won", "warning_closed", "charge_refunded")
    ),
    Situation(
        table=EVENTS,
        situation="a dispute is lost",
        outcome="Revoked.",
        story=(buys("evt_1"), disputes("evt_2", "closed", "lost")),
        then=changed(VIP_FOR_EVER, plan="free", status="dispute_lost", notices=("lost",)),
        policy="dispute_lost",
        otherwise={"keep": changed(VIP_FOR_EVER, notices=("lost",))},
    ),
    Situation(
        table=EVENTS,
        situation="a subscription is paid again after a lost dispute",
        outcome="Restored: it was paid for.",
        story=(
            sub("evt_1", 0),
            bill("evt_2"),
            paid_by(),
            disputes("evt_3", "closed", "lost"),
            bill("evt_4", after=2 * DAY, invoice_id="in_2"),
        ),
        then=changed(PREMIUM, settled=("in:in_1", "in:in_2"), notices=("lost",)),
    ),
    Situation(
        table=EVENTS,
        situation="a dispute of a one-time purchase is `prevented`",
        outcome="Like a full refund: revoked.",
        story=(buys("evt_1"), disputes("evt_2", "closed", "prevented")),
        then=changed(VIP_FOR_EVER, plan="free", status="dispute_prevented", notices=("prevented",)),
    ),
    Situation(
        table=EVENTS,
        situation="a dispute of a subscription's invoice is `prevented`",
        outcome="Like a full refund: kept.",
        story=(sub("evt_1", 0), bill("evt_2"), paid_by(), disputes("evt_3", "closed", "prevented")),
        then=changed(PREMIUM, settled=("in:in_1",), notices=("prevented",)),
        policy="refund_subscription",
        otherwise={
            "revoke": Outcome(status="dispute_prevented", settled=("in:in_1",), notices=("prevented",))
        },
    ),
    Situation(
        table=EVENTS,
        situation="an early fraud warning",
        outcome="Kept; the owner hears of it.",
        story=(
            buys("evt_1"),
            happens(
                "evt_2", "radar.early_fraud_warning.created", {"charge": "ch_1", "payment_intent": "pi_1"}
            ),
        ),
        then=changed(VIP_FOR_EVER, notices=("early_fraud_warning",)),
        policy="fraud_warning",
        otherwise={
            "revoke": changed(VIP_FOR_EVER, plan="free", status="fraud", notices=("early_fraud_warning",))
        },
    ),
    Situation(
        table=EVENTS,
        situation="a review is opened, then approved",
        outcome="Kept; the owner hears of it.",
        story=(
            buys("evt_1"),
            happens("evt_2", "review.opened", {"id": "prv_1", "payment_intent": "pi_1"}),
            happens(
                "evt_3",
                "review.closed",
                {"id": "prv_1", "payment_intent": "pi_1", "closed_reason": "approved"},
            ),
        ),
        then=changed(VIP_FOR_EVER, notices=("review.opened", "review.closed")),
    ),
    Situation(
        table=EVENTS,
        situation="a review is closed as `refunded_as_fraud`",
        outcome="Revoked.",
        story=(
            buys("evt_1"),
            happens(
                "evt_2",
                "review.closed",
                {"id": "prv_1", "payment_intent": "pi_1", "closed_reason": "refunded_as_fraud"},
            ),
        ),
        then=changed(VIP_FOR_EVER, plan="free", status="fraud", notices=("review.closed",)),
    ),
    Situation(
        table=EVENTS,
        situation="a schedule plans another plan",
        outcome="Shown; it applies when the subscription itself changes.",
        story=(
            sub("evt_1", 0),
            happens(
                "evt_2",
                "subscription_schedule.updated",
                {
                    "id": "sub_sched_1",
                    "subscription": "sub_1",
                    "status": "active",
                    "phases": [{"start_date": T0 + MONTH, "items": [{"price": "price_vip"}]}],
                },
            ),
        ),
        then=PREMIUM,
    ),
    Situation(
        table=EVENTS,
        situation="a customer's metadata names our user",
        outcome="The customer is that user's; what waited is granted.",
        story=(
            sub("evt_1", 0, metadata={}),
            happens("evt_2", "customer.updated", {**objects.customer("cus_1"), "metadata": USER}),
        ),
        then=changed(PREMIUM, notices=("parked",)),
    ),
    Situation(
        table=EVENTS,
        situation="a customer's metadata names another user later",
        outcome="Never re-mapped silently: the first claim holds, the owner hears of it.",
        story=(
            happens("evt_1", "customer.created", {**objects.customer("cus_1"), "metadata": USER}, after=0),
            sub("evt_2", 0, metadata={}),
            happens(
                "evt_3", "customer.updated", {**objects.customer("cus_1"), "metadata": {"user_id": "user_2"}}
            ),
        ),
        then=changed(PREMIUM, notices=("claimed for several users",)),
    ),
    Situation(
        table=EVENTS,
        situation="`customer.deleted`",
        outcome="Its sources have ended; the ledger stays.",
        story=(
            sub("evt_1", 0),
            bill("evt_2"),
            happens("evt_3", "customer.deleted", objects.customer("cus_1")),
        ),
        then=Outcome(status="customer_deleted", settled=("in:in_1",)),
    ),
    *(
        Situation(
            table=EVENTS,
            situation=f"`{event_type}`",
            outcome="Ignored: nothing here depends on it.",
            story=(sub("evt_1", 0), happens("evt_2", event_type, {"id": "obj_1"})),
            then=changed(PREMIUM, answer="ignored"),
        )
        for event_type in (
            "customer.discount.created",
            "coupon.deleted",
            "promotion_code.updated",
            "payment_method.attached",
            "setup_intent.succeeded",
            "mandate.updated",
            "tax_rate.updated",
            "payout.paid",
            "transfer.created",
            "price.created",
        )
    ),
    Situation(
        table=EVENTS,
        situation="`account.updated`",
        outcome="Ignored, unless the account may no longer do something.",
        story=(
            sub("evt_1", 0),
            happens(
                "evt_2",
                "account.updated",
                {"id": "acct_1", "charges_enabled": True, "requirements": {"disabled_reason": None}},
                previous_attributes={"email": "owner@example.com"},
            ),
        ),
        then=changed(PREMIUM, answer="ignored"),
    ),
    *(
        Situation(
            table=EVENTS,
            situation=f"`account.updated`: {what}",
            outcome="Access is untouched; the owner hears of it.",
            story=(
                event("evt_1", UPDATED, subscription(metadata=USER), account="acct_1"),
                happens(
                    "evt_2",
                    "account.updated",
                    {"id": "acct_1", **now},
                    account="acct_1",
                    previous_attributes=before,
                ),
            ),
            then=changed(PREMIUM, notices=(notice,)),
        )
        for what, now, before, notice in RESTRICTIONS
    ),
    *(
        Situation(
            table=EVENTS,
            situation=f"`test_helpers.test_clock.{verb}`",
            outcome="Test mode: its customers' users are in the clock's time, once it is ahead of ours.",
            story=(
                sub("evt_1", 0, extra={"test_clock": "clock_1"}),
                happens(
                    "evt_2",
                    f"test_helpers.test_clock.{verb}",
                    {"id": "clock_1", "frozen_time": T0 + MONTH + SLACK},
                    after=1,
                ),
            ),
            then=Outcome(status="expired"),
        )
        for verb in ("created", "advancing", "ready", "deleted", "internal_failure")
    ),
    Situation(
        table=EVENTS,
        situation="a test clock that only the customer names",
        outcome="The same: all that is the customer's is in the clock's time.",
        story=(
            happens(
                "evt_1",
                "customer.created",
                {**objects.customer("cus_1"), "metadata": USER, "test_clock": "clock_1"},
                after=0,
            ),
            sub("evt_2", 0, metadata={}),
            happens(
                "evt_3",
                "test_helpers.test_clock.ready",
                {"id": "clock_1", "frozen_time": T0 + MONTH + SLACK},
                after=1,
            ),
        ),
        then=Outcome(status="expired"),
    ),
    Situation(
        table=EVENTS,
        situation="a test clock in live mode",
        outcome="Ignored.",
        story=(
            event("evt_1", UPDATED, {**subscription(metadata=USER), "test_clock": "clock_1"}, livemode=True),
            happens(
                "evt_2",
                "test_helpers.test_clock.ready",
                {"id": "clock_1", "frozen_time": T0 + 2 * MONTH},
                after=1,
                livemode=True,
            ),
        ),
        then=changed(PREMIUM, answer="ignored"),
    ),
    Situation(
        table=EVENTS,
        situation="a price or product changes its lookup key or metadata",
        outcome="Nothing is re-mapped silently; the owner hears of it.",
        story=(
            sub("evt_1", 0),
            happens(
                "evt_2",
                "price.updated",
                objects.price("vip", price_id="price_premium"),
                previous_attributes={"lookup_key": "premium"},
            ),
        ),
        then=changed(PREMIUM, notices=("price_premium changed",)),
    ),
)

CROSS_ROWS = (
    Situation(
        table=CROSS,
        situation="an upgrade with proration",
        outcome="The new plan replaces the old one when the snapshot shows it.",
        story=(
            sub("evt_1", 0),
            sub("evt_2", DAY, prices=[objects.price("vip")]),
            bill("evt_3", after=DAY, line_price=objects.price("vip"), billing_reason="subscription_update"),
        ),
        then=changed(PREMIUM, plan="vip", settled=("in:in_1",), features={"max_devices": 10}),
    ),
    Situation(
        table=CROSS,
        situation="a downgrade at the period's end",
        outcome="The higher plan until the new period applies.",
        story=(
            sub("evt_1", 0, prices=[objects.price("vip")]),
            sub("evt_2", MONTH, start=MONTH, prices=[objects.price("premium")]),
        ),
        asked_at=MONTH + 1,
        then=changed(PREMIUM, until=2 * MONTH + SLACK),
    ),
    Situation(
        table=CROSS,
        situation="several items with periods of their own",
        outcome="Each item's plan until its own end.",
        story=(
            sub(
                "evt_1",
                0,
                extra={
                    "items": {
                        "data": [
                            {
                                "id": f"si_{key}",
                                "price": objects.price(key),
                                "quantity": 1,
                                "current_period_end": end,
                            }
                            for key, end in (("premium", T0 + 12 * MONTH), ("vip", T0 + MONTH))
                        ]
                    }
                },
            ),
        ),
        asked_at=MONTH + SLACK,
        then=changed(PREMIUM, until=12 * MONTH + SLACK),
    ),
    Situation(
        table=CROSS,
        situation="several seats",
        outcome="A feature counts per seat only where the catalog says so.",
        story=(sub("evt_1", 0, quantity=3),),
        then=changed(PREMIUM, features={"max_devices": 5}),
    ),
    Situation(
        table=CROSS,
        situation="a subscription, a purchase and a grant",
        outcome="Feature by feature the best of all.",
        story=(
            sub("evt_1", 0),
            buys("evt_2"),
            granted("g1", features={"dedicated_support": True, "max_devices": 7}),
        ),
        then=changed(VIP_FOR_EVER, features={"dedicated_support": True, "max_devices": 10}),
    ),
    Situation(
        table=CROSS,
        situation="an override",
        outcome="Replaces the merged value, and may lower it.",
        story=(buys("evt_1"), granted("g1", features={"max_devices": 2}, override=True)),
        then=changed(VIP_FOR_EVER, features={"max_devices": 2, "copy_trading": True}),
    ),
    Situation(
        table=CROSS,
        situation="a manual grant is taken back",
        outcome="Only its own access ends.",
        story=(
            sub("evt_1", 0),
            granted("g1", plan="enterprise"),
            granted("g1", plan="enterprise", removed=True, after=DAY),
        ),
        then=PREMIUM,
    ),
    Situation(
        table=CROSS,
        situation="two subscriptions to one plan",
        outcome="One entitlement; the owner hears of it.",
        story=(sub("evt_1", 0), sub("evt_2", 1, subscription_id="sub_2")),
        then=changed(PREMIUM, notices=("more than once: sub_1, sub_2",)),
    ),
    Situation(
        table=CROSS,
        situation="a lifetime purchase, then a subscription is canceled",
        outcome="The lifetime stays.",
        story=(buys("evt_1"), sub("evt_2", 0), ended("evt_3", DAY)),
        then=VIP_FOR_EVER,
    ),
    Situation(
        table=CROSS,
        situation="a guest's checkout without customer or user",
        outcome="Parked until somebody claims it; never looked up by an empty customer.",
        story=(buys("evt_1", client_reference_id=None),),
        then=Outcome(answer="parked", settled=("cs:cs_1",), notices=("unknown_user",)),
    ),
    Situation(
        table=CROSS,
        situation="the session's reference, metadata and a known customer disagree",
        outcome="The session's reference is the strongest, then metadata, then the customer.",
        story=(
            happens(
                "evt_1",
                "customer.created",
                {**objects.customer("cus_1"), "metadata": {"user_id": "user_2"}},
                after=0,
            ),
            buys("evt_2", customer="cus_1", metadata={"user_id": "user_3", "plan_code": "vip"}),
        ),
        then=changed(VIP_FOR_EVER, notices=("claimed for several users",)),
    ),
    Situation(
        table=CROSS,
        situation="an unknown price beside a known one",
        outcome="Parked, the owner hears of it; the other item is unaffected.",
        story=(sub("evt_1", 0, prices=[objects.price("premium"), objects.price("gold")]),),
        then=changed(PREMIUM, answer="parked", notices=("unknown_price:gold",)),
    ),
    Situation(
        table=CROSS,
        situation="a payment's invoice before basil",
        outcome="The links on the objects themselves lead to the subscription.",
        story=(
            sub("evt_1", 0),
            bill("evt_2", shape=objects.Shape.BEFORE_BASIL),
            happens(
                "evt_3",
                "charge.dispute.created",
                objects.dispute("dp_1", intent_id="pi_in_1", charge_id="ch_in_1"),
            ),
        ),
        then=Outcome(status="disputed", settled=("in:in_1",), notices=("needs_response",)),
    ),
    Situation(
        table=CROSS,
        situation="an invoice paid outside Stripe",
        outcome="Paid; the ledger's method says `out_of_band`.",
        story=(manual_bill("evt_1", paid_out_of_band=True),),
        then=Outcome(plan="vip", status="active", settled=("in:in_1",)),
    ),
    Situation(
        table=CROSS,
        situation="our clock is behind Stripe's",
        outcome="What has occurred is in force.",
        story=(sub("evt_1", HOUR),),
        asked_at=0,
        then=PREMIUM,
    ),
    Situation(
        table=CROSS,
        situation="a connected account disconnects",
        outcome="What was bought through it gives no access; the owner hears of it.",
        story=(
            event("evt_1", UPDATED, subscription(metadata=USER), account="acct_1"),
            happens(
                "evt_2",
                "account.application.deauthorized",
                {"id": "ca_1", "object": "application"},
                account="acct_1",
            ),
        ),
        then=Outcome(status="account_deauthorized", notices=("has disconnected",)),
    ),
)

SITUATIONS = (*STATUSES, *EVENT_ROWS, *CROSS_ROWS)

# What an event alone cannot show: the shell around the decision does.
FLOWS, PARKING = "backend/tests/billing/test_flows.py", "backend/tests/billing/test_parking.py"
REREAD = "backend/tests/billing/test_reread.py"
ELSEWHERE = (
    Elsewhere(
        table=EVENTS,
        situation="a checkout whose event does not carry its lines",
        outcome="Its lines are read from Stripe where a key is set; else it is parked.",
        shown_by=f"{REREAD}::test_a_purchase_whose_lines_were_not_sent_is_granted_once_they_were_read",
    ),
    Elsewhere(
        table=CROSS,
        situation="snapshots of one second that do not tell their order",
        outcome="The same order each time; read again from Stripe where a key is set.",
        shown_by=f"{REREAD}::test_two_snapshots_of_one_second_that_do_not_tell_their_order_are_settled_by_stripe",
    ),
    Elsewhere(
        table=CROSS,
        situation="an object is gone before it is read (404)",
        outcome="The event's own snapshot counts; not asked again.",
        shown_by=f"{REREAD}::test_an_object_that_is_gone_is_not_asked_for_again",
    ),
    Elsewhere(
        table=CROSS,
        situation="a duplicate while the first is in flight",
        outcome="Waits for the first; one effect.",
        shown_by="backend/tests/faults/test_one_effect.py::"
        "test_a_thousand_deliveries_of_one_event_at_once_have_one_effect",
    ),
    Elsewhere(
        table=CROSS,
        situation="features declared `per_unit` or `additive`",
        outcome="Counted per seat, summed over sources.",
        shown_by="backend/tests/domain/test_merge.py::"
        "test_seats_and_sums_count_only_where_the_catalog_declares_them",
    ),
    Elsewhere(
        table=EVENTS,
        situation="a deleted customer's personal data",
        outcome="Replaced by a fixed word in every stored event; ids, amounts and metadata stay.",
        shown_by="backend/tests/billing/test_pseudonymise.py::"
        "test_a_deleted_customers_personal_data_leaves_every_stored_event",
    ),
    Elsewhere(
        table=EVENTS,
        situation="`entitlements.active_entitlement_summary.updated`",
        outcome="Ignored: an optional source, and here the catalog says what a plan unlocks.",
        shown_by=None,
    ),
    Elsewhere(
        table=EVENTS,
        situation="`v2.core.event` (thin)",
        outcome="Ignored: the snapshot event of the same change is what counts.",
        shown_by="backend/tests/providers/test_translation.py::test_nothing_depends_on_other_types",
    ),
    Elsewhere(
        table=CROSS,
        situation="an event of the other livemode",
        outcome="Answered, counted, never granted.",
        shown_by=f"{FLOWS}::test_an_event_of_the_other_mode_is_answered_and_never_granted",
    ),
    Elsewhere(
        table=CROSS,
        situation="the same ids in two connected accounts",
        outcome="Two different sources.",
        shown_by=f"{FLOWS}::test_connected_accounts_do_not_share_ids",
    ),
    Elsewhere(
        table=CROSS,
        situation="the dashboard's test event",
        outcome="Accepted every time, never stored.",
        shown_by=f"{FLOWS}::test_the_dashboards_test_event_is_accepted_every_time_and_never_stored",
    ),
    Elsewhere(
        table=CROSS,
        situation="the same event again",
        outcome="The same bytes, no second effect.",
        shown_by=f"{FLOWS}::test_the_same_event_again_gets_the_same_bytes_and_changes_nothing",
    ),
    Elsewhere(
        table=CROSS,
        situation="a plan's name is added to the catalog later",
        outcome="What was parked for it is applied by itself.",
        shown_by=f"{PARKING}::test_an_unknown_price_is_applied_by_itself_once_a_new_catalog_knows_it",
    ),
    Elsewhere(
        table=CROSS,
        situation="no event says that the paid time is over",
        outcome="Access ends by itself when it is read.",
        shown_by=f"{FLOWS}::test_access_ends_by_itself_when_its_paid_time_is_over",
    ),
)


def table() -> list[tuple[str, str, str, str]]:
    """The rows of docs/situations.md: the table, the situation, its outcome, and the policy or the test beside it."""
    rows = [
        (case.table, case.situation, case.outcome, f"`{case.policy}`" if case.policy else "-")
        for case in SITUATIONS
    ]
    for row in ELSEWHERE:
        test = f"`{row.shown_by.rpartition('::')[0]}`" if row.shown_by else "-"
        rows.append((row.table, row.situation, row.outcome, test))
    return rows
