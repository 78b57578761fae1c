"""The same history, told in the shapes of both generations of Stripe's API, ends in the same access."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from backend.app.billing.providers.stripe_event import StripeEvent
from backend.app.simulator import objects
from backend.app.simulator.objects import Shape
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
USER = {"user_id": "user_1"}
VIP = [objects.price("vip")]


def sub(shape: Shape, number: int, after: int, verb: str = "updated", **rest: Any) -> StripeEvent:
    content = subscription(**{"metadata": USER, "shape": shape, **rest})
    return event(f"evt_s{number}", f"customer.subscription.{verb}", content, after=after, shape=shape)


def paid(shape: Shape, number: int, after: int) -> list[StripeEvent]:
    """An invoice and how each generation tells what paid it."""
    invoice_id, intent_id = f"in_{number}", f"pi_in_{number}"
    content = objects.invoice(
        invoice_id, customer="cus_1", subscription_id="sub_1", metadata=USER, shape=shape
    )
    told = [event(f"evt_i{number}", "invoice.paid", content, after=after, shape=shape)]
    if shape is Shape.BASIL:
        link = objects.invoice_payment(f"inpay_{number}", invoice_id=invoice_id, intent_id=intent_id)
        told.append(event(f"evt_l{number}", "invoice_payment.paid", link, after=after, shape=shape))
    return told


def renewed(shape: Shape) -> list[StripeEvent]:
    return [
        sub(shape, 1, 0, "created", status="incomplete"),
        *paid(shape, 1, 1),
        sub(shape, 2, 1),
        *paid(shape, 2, MONTH),
        sub(shape, 3, MONTH, start=MONTH),
    ]


def upgraded(shape: Shape) -> list[StripeEvent]:
    return [sub(shape, 1, 0, "created"), *paid(shape, 1, 0), sub(shape, 2, DAY, prices=VIP)]


def delinquent(shape: Shape) -> list[StripeEvent]:
    return [sub(shape, 1, 0, "created"), sub(shape, 2, DAY, status="past_due")]


def leaving(shape: Shape) -> list[StripeEvent]:
    return [sub(shape, 1, 0, "created"), sub(shape, 2, DAY, cancel_at_period_end=True)]


def gone(shape: Shape) -> list[StripeEvent]:
    return [
        sub(shape, 1, 0, "created"),
        sub(shape, 2, DAY, "deleted", status="canceled", ended_at=T0 + DAY),
    ]


def disputed(shape: Shape) -> list[StripeEvent]:
    """The dispute names the payment only; its way to the subscription is told differently."""
    dispute = objects.dispute("dp_1", intent_id="pi_in_1", charge_id="ch_in_1")
    return [
        sub(shape, 1, 0, "created"),
        *paid(shape, 1, 0),
        event("evt_d", "charge.dispute.created", dispute, after=DAY, shape=shape),
    ]


def charged_back(shape: Shape) -> list[StripeEvent]:
    """A charge before basil names its invoice itself."""
    charge = objects.charge("ch_in_1", payment_intent="pi_in_1", invoice="in_1", shape=shape)
    dispute = objects.dispute("dp_1", charge_id="ch_in_1", status="lost")
    return [
        *disputed(shape),
        event("evt_c", "charge.succeeded", charge, shape=shape),
        event("evt_e", "charge.dispute.closed", dispute, after=2 * DAY, shape=shape),
    ]


@pytest.mark.parametrize(
    ("history", "plan", "status"),
    [
        (renewed, "premium", "active"),
        (upgraded, "vip", "active"),
        (delinquent, "premium", "past_due"),
        (leaving, "premium", "active"),
        (gone, "free", "canceled"),
        (disputed, "free", "disputed"),
        (charged_back, "free", "dispute_lost"),
    ],
)
def test_a_history_ends_alike_in_every_generation_and_when_they_are_mixed(
    history: Callable[[Shape], list[StripeEvent]], plan: str, status: str
) -> None:
    """An endpoint may change its version in the middle of a subscription's life."""
    old, new = history(Shape.BEFORE_BASIL), history(Shape.BASIL)
    half = T0 + DAY / 2
    mixed = [happened for happened in old if happened.envelope.occurred_at.timestamp() < half] + [
        happened for happened in new if happened.envelope.occurred_at.timestamp() >= half
    ]
    ends = []
    for told in (old, new, mixed):
        state = folded(CATALOG, told, now=at(2 * DAY)).state
        ends.append((access_of(CATALOG, state, "user_1", now=at(2 * DAY)), owners(state)))
    assert ends[0] == ends[1] == ends[2]
    assert (ends[0][0].plan_code, ends[0][0].status) == (plan, status)
