"""Any order and any duplicate of a life's events give the same owners, the same access and the same ledger."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.app.billing.domain.facts import SubjectId
from backend.app.billing.providers.stripe_event import StripeEvent
from backend.app.simulator import objects
from backend.tests.domain.events import (
    DAY,
    MONTH,
    T0,
    access_of,
    at,
    event,
    folded,
    owners,
    shipped_catalog,
    subscription,
)

CATALOG = shipped_catalog()
USERS = ("user_1", "user_2")
CHECKOUT = "checkout.session.completed"
CREATED, UPDATED, DELETED = (f"customer.subscription.{verb}" for verb in ("created", "updated", "deleted"))

Outcome = tuple[
    dict[SubjectId, str | None],
    dict[str, tuple[str, str, dict[str, Any], Any]],
    set[str],
    dict[str, str],
]


def outcome(events: Sequence[StripeEvent], *, now: int) -> Outcome:
    """Owners, each user's access as stored and as computed anew (which must agree), the ledger's keys, what waits."""
    told = folded(CATALOG, events, now=at(now))
    state = told.state
    access = {}
    for user_id in USERS:
        computed = access_of(CATALOG, state, user_id, now=at(now))
        stored = state.entitlements.get(user_id)
        if stored is not None:
            for field in ("plan_code", "status", "features", "valid_until"):
                assert getattr(stored, field) == getattr(computed, field)
        access[user_id] = (
            computed.plan_code,
            computed.status,
            dict(computed.features),
            computed.valid_until,
        )
    return dict(owners(state)), access, set(told.ledger), dict(told.parked)


def sub_event(
    event_id: str, kind: str, after: int, subscription_id: str = "sub_1", **rest: Any
) -> StripeEvent:
    return event(event_id, kind, subscription(subscription_id, **rest), after=after)


def checkout(event_id: str, after: int, kind: str = "completed", **rest: Any) -> StripeEvent:
    content = objects.checkout_session(rest.pop("session_id", "cs_1"), **rest)
    return event(event_id, f"checkout.session.{kind}", content, after=after)


def tie(after: int = 1) -> StripeEvent:
    return checkout(
        "evt_tie",
        after,
        mode="subscription",
        customer="cus_1",
        subscription="sub_1",
        client_reference_id="user_1",
    )


def invoice(event_id: str, after: int, invoice_id: str, kind: str = "paid") -> StripeEvent:
    content = objects.invoice(
        invoice_id, customer="cus_1", subscription_id="sub_1", paid=kind != "payment_failed"
    )
    return event(event_id, f"invoice.{kind}", content, after=after)


VIP = [objects.price("vip")]

# A life: its events in the order they occurred, the instant of the question and the plan of user_1 then.
STORIES: dict[str, tuple[list[StripeEvent], int, str]] = {
    "subscribe, tie, renew, past due, recover, cancel": (
        [
            sub_event("evt_1", CREATED, 0),
            tie(),
            sub_event("evt_2", UPDATED, MONTH, start=MONTH),
            sub_event("evt_3", UPDATED, 2 * MONTH, start=2 * MONTH, status="past_due"),
            sub_event("evt_4", UPDATED, 2 * MONTH + DAY, start=2 * MONTH),
            sub_event(
                "evt_5", DELETED, 3 * MONTH, start=2 * MONTH, status="canceled", ended_at=T0 + 3 * MONTH
            ),
        ],
        3 * MONTH + 1,
        "free",
    ),
    "the same until the recovery": (
        [
            sub_event("evt_1", CREATED, 0, status="incomplete"),
            tie(),
            sub_event("evt_2", UPDATED, 1),
            sub_event("evt_3", UPDATED, MONTH, status="past_due"),
            sub_event("evt_4", UPDATED, MONTH + DAY, status="past_due"),
            invoice("evt_5", MONTH, "in_1", "payment_failed"),
        ],
        MONTH + 2 * DAY,
        "premium",
    ),
    "upgrade from premium to vip": (
        [
            tie(),
            sub_event("evt_1", CREATED, 0, metadata={"plan_code": "premium"}),
            invoice("evt_2", 1, "in_1"),
            sub_event("evt_3", UPDATED, DAY, prices=VIP, metadata={"plan_code": "premium"}),
            invoice("evt_4", DAY, "in_2"),
            invoice("evt_5", DAY, "in_2", "payment_succeeded"),
        ],
        2 * DAY,
        "vip",
    ),
    "a purchase that a slow bank pays": (
        [
            checkout(
                "evt_1",
                0,
                payment_status="unpaid",
                client_reference_id="user_1",
                metadata={"plan_code": "vip"},
            ),
            checkout(
                "evt_2",
                DAY,
                "async_payment_succeeded",
                client_reference_id="user_1",
                metadata={"plan_code": "vip"},
            ),
            event("evt_3", "payment_intent.processing", objects.payment_intent("pi_1", status="processing")),
            event("evt_4", "payment_intent.succeeded", objects.payment_intent("pi_1"), after=DAY),
            event("evt_5", "charge.succeeded", objects.charge("ch_1"), after=DAY),
        ],
        2 * DAY,
        "vip",
    ),
    "two subscriptions, one of them canceled": (
        [
            tie(),
            sub_event("evt_1", CREATED, 0),
            sub_event("evt_2", CREATED, DAY, "sub_2", prices=VIP),
            sub_event("evt_3", UPDATED, 2 * DAY, "sub_2", prices=VIP, cancel_at_period_end=True),
            sub_event(
                "evt_4", DELETED, 3 * DAY, "sub_2", prices=VIP, status="canceled", ended_at=T0 + 3 * DAY
            ),
        ],
        4 * DAY,
        "premium",
    ),
    "two subscriptions that ended in the same second": (
        [
            tie(),
            sub_event("evt_1", DELETED, DAY, status="canceled", ended_at=T0 + DAY),
            sub_event("evt_2", UPDATED, DAY, "sub_2", status="incomplete_expired", ended_at=T0 + DAY),
        ],
        2 * DAY,
        "free",
    ),
    "two subscriptions to one plan that end alike": (
        [
            tie(),
            sub_event("evt_1", UPDATED, 0, cancel_at_period_end=True),
            sub_event("evt_2", UPDATED, 0, "sub_2", status="trialing", trial_end=T0 + MONTH),
        ],
        DAY,
        "premium",
    ),
    "everything arrives before the checkout that ties it": (
        [
            sub_event("evt_1", CREATED, 0, status="incomplete"),
            sub_event("evt_2", UPDATED, 1),
            invoice("evt_3", 1, "in_1"),
            event("evt_4", "charge.succeeded", objects.charge("ch_1", customer="cus_1"), after=1),
            tie(2),
        ],
        DAY,
        "premium",
    ),
    "two checkouts claim one customer for two users": (
        [
            tie(),
            checkout(
                "evt_1",
                DAY,
                session_id="cs_2",
                mode="subscription",
                customer="cus_1",
                subscription="sub_2",
                client_reference_id="user_2",
            ),
            sub_event("evt_2", CREATED, 0),
            sub_event("evt_3", CREATED, DAY, "sub_2", prices=VIP),
            sub_event("evt_4", CREATED, 2 * DAY, "sub_3", prices=VIP),
        ],
        3 * DAY,
        "vip",
    ),
    "metadata names one user, the checkout another": (
        [
            sub_event("evt_1", CREATED, 0, metadata={"user_id": "user_2"}),
            tie(),
            sub_event("evt_2", UPDATED, DAY, metadata={"user_id": "user_2"}),
            sub_event("evt_3", CREATED, DAY, "sub_2", prices=VIP),
        ],
        2 * DAY,
        "vip",
    ),
}


def gives_back(event_id: str, after: int, status: str = "succeeded", kind: str = "created") -> StripeEvent:
    content = objects.refund("re_1", intent_id="pi_1", charge_id="ch_1", status=status)
    return event(event_id, f"refund.{kind}", content, after=after)


def disputed(event_id: str, after: int, kind: str, status: str) -> StripeEvent:
    content = objects.dispute("dp_1", intent_id="pi_1", charge_id="ch_1", status=status)
    return event(event_id, f"charge.dispute.{kind}", content, after=after)


def bought(event_id: str = "evt_1", after: int = 0) -> StripeEvent:
    return checkout(
        event_id,
        after,
        payment_intent="pi_1",
        client_reference_id="user_1",
        metadata={"plan_code": "vip"},
    )


def charged(event_id: str, after: int, kind: str = "succeeded", **rest: Any) -> StripeEvent:
    content = objects.charge("ch_1", payment_intent="pi_1", **rest)
    return event(event_id, f"charge.{kind}", content, after=after)


def linked(event_id: str, after: int) -> StripeEvent:
    content = objects.invoice_payment("inpay_1", invoice_id="in_1", intent_id="pi_1")
    return event(event_id, "invoice_payment.paid", content, after=after)


def note(event_id: str, event_type: str, after: int, **content: Any) -> StripeEvent:
    return event(event_id, event_type, content, after=after)


def hangs_on_clock(event_id: str, after: int) -> StripeEvent:
    content = {**objects.customer("cus_1"), "test_clock": "clock_1"}
    return event(event_id, "customer.created", content, after=after)


def clock(event_id: str, frozen: int, verb: str = "ready") -> StripeEvent:
    """A test clock that was moved to so many seconds after T0 within a minute of ours."""
    content = {"id": "clock_1", "frozen_time": T0 + frozen}
    return event(event_id, f"test_helpers.test_clock.{verb}", content, after=60)


def manual(event_id: str, after: int, kind: str = "paid") -> StripeEvent:
    """An invoice written by hand that sells vip to user_1."""
    content = objects.invoice(
        "in_1",
        customer="cus_1",
        billing_reason="manual",
        metadata={"user_id": "user_1"},
        line_price=objects.price("vip"),
        paid=kind != "payment_failed",
        shape=objects.Shape.BEFORE_BASIL,
    )
    content["payment_intent"] = "pi_1"
    return event(event_id, f"invoice.{kind}", content, after=after)


STORIES |= {
    "a purchase is refunded, and the refund fails": (
        [
            bought(),
            charged("evt_2", 0),
            gives_back("evt_3", DAY, "pending"),
            gives_back("evt_4", DAY, "succeeded", "updated"),
            charged("evt_5", DAY, "refunded", amount_refunded=2999),
            gives_back("evt_6", 3 * DAY, "failed", "failed"),
        ],
        4 * DAY,
        "vip",
    ),
    "a purchase is refunded in two parts": (
        [
            bought(),
            charged("evt_2", 0),
            charged("evt_3", DAY, "refunded", amount_refunded=1000),
            charged("evt_4", 2 * DAY, "refunded", amount_refunded=2999),
            gives_back("evt_5", 2 * DAY),
        ],
        3 * DAY,
        "free",
    ),
    "a dispute is opened, argued about and won": (
        [
            bought(),
            charged("evt_2", 0),
            disputed("evt_3", DAY, "created", "needs_response"),
            disputed("evt_4", DAY, "funds_withdrawn", "needs_response"),
            disputed("evt_5", 2 * DAY, "updated", "under_review"),
            disputed("evt_6", 3 * DAY, "closed", "won"),
            disputed("evt_7", 3 * DAY, "funds_reinstated", "won"),
        ],
        4 * DAY,
        "vip",
    ),
    "a dispute of a charge that only its own events tie to the purchase": (
        [
            bought(),
            charged("evt_2", 0),
            note("evt_3", "charge.dispute.closed", DAY, id="dp_1", charge="ch_1", amount=2999, status="lost"),
            note("evt_4", "radar.early_fraud_warning.created", DAY, id="issfr_1", charge="ch_1"),
        ],
        2 * DAY,
        "free",
    ),
    "a lost dispute of a subscription that is paid again": (
        [
            tie(),
            sub_event("evt_1", CREATED, 0),
            invoice("evt_2", 1, "in_1"),
            linked("evt_3", 1),
            disputed("evt_4", DAY, "created", "needs_response"),
            disputed("evt_5", 2 * DAY, "closed", "lost"),
            invoice("evt_6", 3 * DAY, "in_2"),
        ],
        4 * DAY,
        "premium",
    ),
    "a customer is deleted": (
        [
            tie(),
            sub_event("evt_1", CREATED, 0),
            bought("evt_2"),
            note("evt_3", "customer.deleted", DAY, id="cus_1", object="customer"),
            invoice("evt_4", 1, "in_1"),
        ],
        2 * DAY,
        "vip",
    ),
    "an invoice written by hand fails, is paid and credited": (
        [
            manual("evt_1", 0, "payment_failed"),
            manual("evt_2", DAY),
            manual("evt_3", DAY, "payment_succeeded"),
            charged("evt_4", DAY),
            note("evt_5", "credit_note.created", 2 * DAY, id="cn_1", invoice="in_1", amount=2999),
            note("evt_6", "credit_note.voided", 3 * DAY, id="cn_1", invoice="in_1", amount=2999),
        ],
        4 * DAY,
        "vip",
    ),
    "a checkout that made an invoice, refunded": (
        [
            checkout(
                "evt_1",
                0,
                payment_intent="pi_1",
                invoice="in_1",
                customer="cus_1",
                client_reference_id="user_1",
                metadata={"plan_code": "vip"},
            ),
            manual("evt_2", 0),
            charged("evt_3", 0),
            gives_back("evt_4", DAY),
        ],
        2 * DAY,
        "free",
    ),
    "a payment that names its plan, then its checkout is heard of": (
        [
            event(
                "evt_1",
                "payment_intent.succeeded",
                objects.payment_intent("pi_1", metadata={"user_id": "user_1", "plan_code": "premium"}),
            ),
            bought("evt_2"),
            charged("evt_3", 0),
        ],
        DAY,
        "vip",
    ),
    "a price that nobody knows": (
        [
            sub_event("evt_1", CREATED, 0),
            tie(),
            invoice("evt_2", 1, "in_1"),
            sub_event("evt_3", UPDATED, DAY, prices=[objects.price("gold")]),
            invoice("evt_4", DAY, "in_2"),
        ],
        2 * DAY,
        "free",
    ),
    "updates of one second that tell their order": (
        [
            sub_event("evt_4", CREATED, 0, status="incomplete"),
            event(
                "evt_3",
                UPDATED,
                subscription(),
                previous_attributes={"status": "incomplete"},
            ),
            event(
                "evt_2",
                UPDATED,
                subscription(cancel_at_period_end=True),
                previous_attributes={"cancel_at_period_end": False},
            ),
            event(
                "evt_1",
                UPDATED,
                subscription(prices=VIP),
                previous_attributes={
                    "cancel_at_period_end": True,
                    "items": subscription()["items"],
                },
            ),
            tie(),
        ],
        DAY,
        "vip",
    ),
    "past due, paid, past due again": (
        [
            tie(),
            sub_event("evt_1", CREATED, 0),
            sub_event("evt_2", UPDATED, MONTH, start=MONTH, status="past_due"),
            invoice("evt_3", MONTH, "in_1", "payment_failed"),
            invoice("evt_4", MONTH + DAY, "in_1"),
            sub_event("evt_5", UPDATED, 2 * MONTH, start=2 * MONTH, status="past_due"),
            invoice("evt_6", 2 * MONTH, "in_2", "payment_failed"),
        ],
        2 * MONTH + DAY,
        "premium",
    ),
    "a test clock runs ahead of the paid time": (
        [
            tie(),
            sub_event("evt_1", CREATED, 0),
            hangs_on_clock("evt_2", 0),
            clock("evt_3", MONTH),
            clock("evt_4", MONTH + 4 * DAY, "advancing"),
            note("evt_5", "customer.updated", DAY, id="cus_1", object="customer"),
        ],
        DAY,
        "free",
    ),
    "a test clock runs through a renewal": (
        [
            tie(),
            sub_event("evt_1", CREATED, 0),
            hangs_on_clock("evt_2", 0),
            clock("evt_3", MONTH + 4 * DAY),
            sub_event("evt_4", UPDATED, MONTH, start=MONTH),
        ],
        DAY,
        "premium",
    ),
    "nobody ever says whose it is": (
        [
            sub_event("evt_1", CREATED, 0),
            invoice("evt_2", 1, "in_1"),
            checkout("evt_3", 0, metadata={"plan_code": "vip"}),
            sub_event("evt_4", UPDATED, DAY, status="past_due"),
        ],
        2 * DAY,
        "free",
    ),
}

# All orders of seven events are 5040, too many for every change; the long form tries them all.
ORDERS_SAMPLED = 60
DUPLICATES_SAMPLED = 12


def test_there_are_lives_enough() -> None:
    assert len(STORIES) >= 15
    assert all(len(events) <= 7 for events, _, _ in STORIES.values())


@pytest.mark.parametrize("name", STORIES)
def test_sampled_orders_of_a_life_and_its_duplicates_end_alike(name: str) -> None:
    events, now, plan_code = STORIES[name]
    expected = outcome(events, now=now)
    assert expected[1]["user_1"][0] == plan_code
    chance = random.Random(name)  # the same sample each time
    for _ in range(ORDERS_SAMPLED):
        assert outcome(chance.sample(events, len(events)), now=now) == expected
    for _ in range(DUPLICATES_SAMPLED):
        repeated = [*events, chance.choice(events)]
        assert outcome(chance.sample(repeated, len(repeated)), now=now) == expected


@pytest.mark.long
@pytest.mark.parametrize("name", STORIES)
def test_every_order_of_a_life_with_every_single_duplicate_ends_alike(name: str) -> None:
    events, now, _ = STORIES[name]
    expected = outcome(events, now=now)
    for order in itertools.permutations(events):
        assert outcome(order, now=now) == expected
        for again in order:
            # A duplicate is known by its id, wherever it stands.
            assert outcome([*order, again], now=now) == expected


STATUSES = (
    "incomplete",
    "incomplete_expired",
    "trialing",
    "active",
    "past_due",
    "unpaid",
    "paused",
    "canceled",
    "a_status_of_tomorrow",
)
some_plan = st.sampled_from([None, "premium", "vip", "gold"])
some_user = st.sampled_from([None, *USERS])
# Few instants, so that many events fall into the same second.
some_second = st.sampled_from([0, 1, DAY, MONTH])


@st.composite
def some_event(draw: st.DrawFn, number: int) -> StripeEvent:
    """Anything Stripe might say about two customers with a subscription and a purchase each."""
    which = draw(st.sampled_from(["1", "2"]))
    customer, after = f"cus_{which}", draw(some_second)
    named = {"user_id": draw(some_user), "plan_code": draw(some_plan)}
    metadata = {key: value for key, value in named.items() if value is not None}
    kind = draw(st.sampled_from(["subscription", "tie", "purchase", "invoice", "charge"]))
    if kind == "subscription":
        price = objects.price(draw(some_plan), price_id="price_1")
        status = draw(st.sampled_from(STATUSES))
        return sub_event(
            f"evt_{number}",
            draw(st.sampled_from([CREATED, UPDATED, DELETED])),
            after,
            f"sub_{which}",
            customer=customer,
            status=status,
            prices=[price],
            months=draw(st.integers(1, 2)),
            cancel_at_period_end=draw(st.booleans()),
            metadata=metadata,
        )
    if kind == "invoice":
        content = objects.invoice(
            f"in_{which}", customer=customer, subscription_id=f"sub_{which}", metadata=metadata
        )
        return event(f"evt_{number}", "invoice.paid", content, after=after)
    if kind == "charge":
        content = objects.charge(f"ch_{which}", customer=customer)
        return event(f"evt_{number}", "charge.succeeded", content, after=after)
    return checkout(
        f"evt_{number}",
        after,
        "completed" if kind == "tie" else draw(st.sampled_from(["completed", "async_payment_succeeded"])),
        session_id=f"cs_{kind}_{which}",
        mode="subscription" if kind == "tie" else "payment",
        payment_status=draw(st.sampled_from(["paid", "unpaid"])),
        customer=customer,
        subscription=f"sub_{which}" if kind == "tie" else None,
        client_reference_id=draw(some_user),
        metadata=metadata,
    )


some_life = st.integers(2, 7).flatmap(lambda size: st.tuples(*(some_event(number) for number in range(size))))


@settings(max_examples=150, deadline=None)
@given(life=some_life, data=st.data())
def test_no_order_and_no_duplicates_of_any_events_make_a_difference(
    life: tuple[StripeEvent, ...], data: st.DataObject
) -> None:
    order = data.draw(st.permutations([*life, *data.draw(st.lists(st.sampled_from(life), max_size=3))]))
    assert outcome(order, now=2 * DAY) == outcome(life, now=2 * DAY)
