"""A test clock that is ahead of ours takes its customers' users along, whatever is heard first."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from backend.app.billing.rebuild import Rebuild
from backend.app.simulator import objects
from backend.tests.support.billing import Harness, unix_now

CLOCK = "test_helpers.test_clock.ready"


def story(now: int) -> dict[str, dict[str, Any]]:
    """A customer on a clock, a subscription whose month has begun, and the clock two months ahead."""
    customer = {**objects.customer("cus_1"), "metadata": {"user_id": "usr_1"}, "test_clock": "clock_1"}
    subscription = objects.subscription(
        "sub_1", customer="cus_1", period_start=now, period_end=now + objects.MONTH_SECONDS
    )
    clock = {"id": "clock_1", "frozen_time": now + 2 * objects.MONTH_SECONDS}
    return {
        "customer": objects.event("evt_1", "customer.created", customer, created=now),
        "subscription": objects.event("evt_2", "customer.subscription.created", subscription, created=now),
        "clock": objects.event("evt_3", CLOCK, clock, created=now),
    }


@pytest.mark.parametrize("order", list(itertools.permutations(story(0))), ids=", ".join)
async def test_access_is_read_as_of_the_clocks_time(service: Harness, order: tuple[str, ...]) -> None:
    events = story(unix_now() - 60)
    for name in order:
        assert (await service.deliver(events[name])).json()["status"] in ("success", "parked")
    answer = await service.entitlements("usr_1")
    assert (answer["plan_code"], answer["status"]) == ("free", "expired")
    (row,) = await service.rows("SELECT plan_code, status FROM user_entitlements WHERE user_id = 'usr_1'")
    assert (row["plan_code"], row["status"]) == ("free", "expired")
    made = service.service
    rebuild = Rebuild(made.database, made.catalog, clock=service.clock, livemode=made.settings.livemode)
    assert list((await rebuild.check()).differences) == []


async def test_who_is_on_no_clock_stays_in_our_time(service: Harness) -> None:
    now = unix_now() - 60
    for event in story(now).values():
        await service.deliver(event)
    other = objects.subscription(
        "sub_2",
        customer="cus_2",
        period_start=now,
        period_end=now + objects.MONTH_SECONDS,
        metadata={"user_id": "usr_2"},
    )
    await service.deliver(objects.event("evt_4", "customer.subscription.created", other, created=now))
    assert (await service.entitlements("usr_2"))["plan_code"] == "premium"
