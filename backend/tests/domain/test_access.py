"""What a source gives, from when and until when: Stripe's statuses, ends, grace and terminal states."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from backend.app.billing.domain.access import Reading
from backend.app.billing.domain.subscriptions import KNOWN_STATUSES
from backend.app.billing.providers.stripe_event import StripeEvent
from backend.app.simulator import objects
from backend.tests.domain.events import (
    DAY,
    HOUR,
    MONTH,
    T0,
    at,
    event,
    folded,
    shipped_catalog,
    subscription,
)

CATALOG = shipped_catalog()
SLACK = 72 * HOUR
GRACE = 14 * DAY


def updated(event_id: str, *, after: int, **changes: Any) -> StripeEvent:
    return event(event_id, "customer.subscription.updated", subscription(**changes), after=after)


def reading_of(*events: StripeEvent) -> Reading:
    """What the one source that these events are about comes to."""
    state = folded(CATALOG, events, now=at(0)).state
    (source_id,) = state.sources
    reading = state.reading(CATALOG, source_id)
    assert reading is not None
    return reading


def given(reading: Reading) -> list[tuple[str, datetime | None]]:
    return [(access.plan.code if access.plan else "none", access.ends_at) for access in reading.accesses]


def line_items(*prices: dict[str, Any]) -> dict[str, Any]:
    return {"object": "list", "data": [{"price": price, "quantity": 1} for price in prices]}


# Statuses


@pytest.mark.parametrize(
    ("status", "gives"),
    [
        ("incomplete", []),
        ("incomplete_expired", []),
        ("trialing", [("premium", at(7 * DAY))]),
        ("active", [("premium", at(MONTH + SLACK))]),
        ("past_due", [("premium", at(HOUR + GRACE))]),
        ("unpaid", []),
        ("paused", []),
        ("canceled", []),
        ("a_status_of_tomorrow", []),
    ],
)
def test_what_each_status_of_a_subscription_gives(
    status: str, gives: list[tuple[str, datetime | None]]
) -> None:
    trial_end = T0 + 7 * DAY if status == "trialing" else None
    reading = reading_of(updated("evt_1", after=HOUR, status=status, trial_end=trial_end))
    assert given(reading) == gives
    assert reading.grants is bool(gives)
    assert reading.status == status


def test_stripes_eight_statuses_are_all_known() -> None:
    assert len(KNOWN_STATUSES) == 8


def test_an_unknown_status_keeps_the_last_known_state() -> None:
    reading = reading_of(
        updated("evt_1", after=0),
        updated("evt_2", after=DAY, status="a_status_of_tomorrow"),
    )
    assert (reading.status, given(reading)) == ("active", [("premium", at(MONTH + SLACK))])


def test_a_terminal_status_is_never_overwritten_by_what_arrives_later() -> None:
    deleted = event(
        "evt_1",
        "customer.subscription.deleted",
        subscription(status="canceled", ended_at=T0 + HOUR),
        after=HOUR,
    )
    reading = reading_of(deleted, updated("evt_2", after=2 * HOUR))
    assert (reading.status, reading.grants, reading.as_of) == ("canceled", False, at(HOUR))


@pytest.mark.parametrize(
    ("first", "second"), [("created", "updated"), ("updated", "deleted"), ("created", "deleted")]
)
def test_within_one_second_a_subscription_is_created_then_updated_then_deleted(
    first: str, second: str
) -> None:
    """The event ids are against it on purpose: they say nothing about time."""
    before = event("evt_z", f"customer.subscription.{first}", subscription(status="incomplete"))
    status = "canceled" if second == "deleted" else "active"
    later = event("evt_a", f"customer.subscription.{second}", subscription(status=status))
    assert reading_of(before, later).status == reading_of(later, before).status == status


def test_of_two_updates_within_one_second_the_one_that_paid_further_is_newer() -> None:
    renewed, old = updated("evt_a", after=0, months=2), updated("evt_z", after=0, months=1)
    assert given(reading_of(old, renewed)) == given(reading_of(renewed, old))
    assert given(reading_of(old, renewed)) == [("premium", at(2 * MONTH + SLACK))]


# Ends


def test_a_told_date_is_kept_exactly_without_slack() -> None:
    reading = reading_of(updated("evt_1", after=0, cancel_at_period_end=True))
    assert given(reading) == [("premium", at(MONTH))]


def test_an_undone_cancellation_restores_the_end() -> None:
    reading = reading_of(updated("evt_1", after=0, cancel_at_period_end=True), updated("evt_2", after=HOUR))
    assert given(reading) == [("premium", at(MONTH + SLACK))]


def test_a_told_date_after_the_period_does_not_prolong_what_is_paid() -> None:
    reading = reading_of(updated("evt_1", after=0, cancel_at=T0 + 12 * MONTH))
    assert given(reading) == [("premium", at(MONTH + SLACK))]


def test_a_subscription_without_a_period_lasts_until_more_is_heard() -> None:
    content = subscription()
    for item in content["items"]["data"]:
        del item["current_period_end"]
    endless = event("evt_1", "customer.subscription.updated", content)
    ends = event("evt_2", "customer.subscription.updated", {**content, "cancel_at": T0 + DAY}, after=1)
    assert given(reading_of(endless)) == [("premium", None)]
    assert given(reading_of(endless, ends)) == [("premium", at(DAY))]


def test_a_trial_without_its_own_end_lasts_for_its_period() -> None:
    assert given(reading_of(updated("evt_1", after=0, status="trialing"))) == [("premium", at(MONTH))]


def test_grace_begins_once_with_the_first_failure() -> None:
    """More failed attempts do not prolong it; a recovery in between begins a new one."""
    failing = [updated(f"evt_{day}", after=day * DAY, status="past_due") for day in (1, 3, 5)]
    assert given(reading_of(*failing)) == [("premium", at(DAY + GRACE))]
    recovered = updated("evt_r", after=4 * DAY)
    assert given(reading_of(*failing, recovered)) == [("premium", at(5 * DAY + GRACE))]


def test_a_paused_collection_keeps_access() -> None:
    content = {**subscription(), "pause_collection": {"behavior": "void", "resumes_at": None}}
    assert reading_of(event("evt_1", "customer.subscription.updated", content)).grants


# Prices


def test_each_item_gives_its_plan_until_its_own_end() -> None:
    content = subscription(prices=[objects.price("premium"), objects.price("vip")])
    content["items"]["data"][1]["current_period_end"] = T0 + 12 * MONTH
    reading = reading_of(event("evt_1", "customer.subscription.updated", content))
    assert given(reading) == [("premium", at(MONTH + SLACK)), ("vip", at(12 * MONTH + SLACK))]
    assert reading.plan == CATALOG.plans["vip"]


def test_an_unknown_price_does_not_harm_the_other_items() -> None:
    reading = reading_of(
        updated("evt_1", after=0, prices=[objects.price("gold_monthly"), objects.price("vip")])
    )
    assert [plan for plan, _ in given(reading)] == ["vip"]
    assert reading.unknown == ("unknown_price:gold_monthly",)


def test_a_price_without_any_name_names_no_plan() -> None:
    content = subscription(prices=[{}])
    reading = reading_of(event("evt_1", "customer.subscription.updated", content))
    assert reading.unknown == ("unknown_plan:none named",)


@pytest.mark.parametrize(
    ("price_plan", "hint", "plans", "unknown"),
    [
        ("vip", None, ["vip"], ()),
        ("vip", "premium", ["vip"], ()),
        ("gold", None, [], ("unknown_plan:gold",)),
        ("gold", "premium", [], ("unknown_plan:gold",)),
        (None, "premium", ["premium"], ()),
        (None, "gold", [], ("unknown_plan:gold",)),
        (None, None, [], ("unknown_price:price_1",)),
    ],
)
def test_an_unmapped_price_declares_its_plan_itself_or_leaves_it_to_the_subscription(
    price_plan: str | None, hint: str | None, plans: list[str], unknown: tuple[str, ...]
) -> None:
    price = {
        **objects.price(None, price_id="price_1"),
        "metadata": {"plan_code": price_plan} if price_plan else {},
    }
    reading = reading_of(
        updated("evt_1", after=0, prices=[price], metadata={"plan_code": hint} if hint else {})
    )
    assert [plan for plan, _ in given(reading)] == plans
    assert reading.unknown == unknown


def test_stale_metadata_never_beats_a_mapped_price() -> None:
    reading = reading_of(
        updated("evt_1", after=0, prices=[objects.price("vip")], metadata={"plan_code": "premium"})
    )
    assert [plan for plan, _ in given(reading)] == ["vip"]


def test_the_checkout_may_name_the_plan_of_its_subscription() -> None:
    checkout = event(
        "evt_1",
        "checkout.session.completed",
        objects.checkout_session(
            "cs_1", mode="subscription", subscription="sub_1", metadata={"plan_code": "vip"}
        ),
    )
    active = updated("evt_2", after=1, prices=[objects.price(None, price_id="price_1")])
    assert [plan for plan, _ in given(reading_of(checkout, active))] == ["vip"]


def test_a_subscription_of_which_only_the_checkout_was_heard_gives_nothing_yet() -> None:
    checkout = event(
        "evt_1",
        "checkout.session.completed",
        objects.checkout_session("cs_1", mode="subscription", subscription="sub_1"),
    )
    reading = reading_of(checkout)
    assert (reading.status, reading.grants, reading.pending, reading.wants_user) == (
        "incomplete",
        False,
        True,
        True,
    )


# Purchases


def purchase(event_id: str, kind: str = "completed", *, after: int = 0, **changes: Any) -> StripeEvent:
    content = {**objects.checkout_session("cs_1", metadata={"plan_code": "premium"}), **changes}
    return event(event_id, f"checkout.session.{kind}", content, after=after)


def test_a_paid_purchase_lasts_for_ever_from_the_moment_it_was_paid() -> None:
    reading = reading_of(purchase("evt_1", after=HOUR))
    assert given(reading) == [("premium", None)]
    assert reading.accesses[0].starts_at == at(HOUR)


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("completed", "awaiting_payment"),
        ("async_payment_failed", "failed"),
        ("expired", "expired"),
    ],
)
def test_a_purchase_that_was_not_paid_gives_nothing(kind: str, status: str) -> None:
    reading = reading_of(purchase("evt_1", kind, payment_status="unpaid"))
    assert (reading.status, reading.grants, reading.accesses) == (status, False, ())


def test_a_paid_purchase_stays_paid() -> None:
    """The slow bank's success and the completion that announced it may come in any order."""
    paid = purchase("evt_2", "async_payment_succeeded", after=DAY)
    awaiting = purchase("evt_1", payment_status="unpaid", after=2 * DAY)
    reading = reading_of(paid, awaiting)
    assert (reading.status, reading.as_of, given(reading)) == ("active", at(DAY), [("premium", None)])


def test_a_purchase_gives_the_plan_of_each_of_its_lines() -> None:
    reading = reading_of(
        purchase("evt_1", line_items=line_items(objects.price("vip"), objects.price("gold")))
    )
    assert given(reading) == [("vip", None)]
    assert reading.unknown == ("unknown_price:gold",)


def test_a_purchase_that_names_no_plan_waits_for_one() -> None:
    assert reading_of(purchase("evt_1", metadata={})).unknown == ("unknown_plan:none named",)
