"""The order of a subscription's snapshots: what Stripe tells decides, and the order of arrival never does."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.app.billing.domain.facts import SubscriptionFact
from backend.app.billing.domain.timeline import CHAINED_SNAPSHOTS_MAX, TERMINAL_STATUSES, in_order, is_settled
from backend.app.billing.providers.stripe import translate
from backend.app.simulator import objects
from backend.tests.domain.events import DAY, MONTH, T0, event, subscription


def snapshot(
    event_id: str,
    *,
    verb: str = "updated",
    after: int = 0,
    previous: dict[str, Any] | None = None,
    **rest: Any,
) -> SubscriptionFact:
    """What one event says of sub_1; `extra` are fields of the object itself."""
    extra = rest.pop("extra", {})
    happened = event(
        event_id,
        f"customer.subscription.{verb}",
        {**subscription(**rest), **extra},
        after=after,
        previous_attributes=previous,
    )
    translation = translate(happened)
    assert translation is not None
    (about,) = translation.facts
    assert isinstance(about.fact, SubscriptionFact)
    return about.fact


def every_order(*facts: SubscriptionFact) -> list[str]:
    """The ids in order, which must be one and the same for every order of arrival."""
    orders = {tuple(fact.event_id for fact in in_order(order)) for order in itertools.permutations(facts)}
    (order,) = orders
    return list(order)


def items(*keys: str) -> dict[str, Any]:
    """Items as they stand in `previous_attributes`."""
    items: dict[str, Any] = subscription(prices=[objects.price(key) for key in keys])["items"]
    return items


# The ids of the same-second stories are against the order on purpose: they say nothing about time.


def test_snapshots_of_different_seconds_go_by_their_time() -> None:
    facts = [snapshot(f"evt_{9 - day}", after=day * DAY) for day in range(4)]
    assert every_order(*facts) == ["evt_9", "evt_8", "evt_7", "evt_6"]


@pytest.mark.parametrize(
    ("first", "second", "previous"),
    [
        ({"status": "incomplete"}, {}, {"status": "incomplete"}),
        ({}, {"status": "past_due"}, {"status": "active"}),
        ({"status": "past_due"}, {}, {"status": "past_due"}),
        ({}, {"cancel_at_period_end": True}, {"cancel_at_period_end": False}),
        ({"cancel_at_period_end": True}, {}, {"cancel_at_period_end": True}),
        ({"cancel_at": T0 + DAY}, {}, {"cancel_at": T0 + DAY}),
        ({}, {"cancel_at": T0 + DAY}, {"cancel_at": None}),
        ({}, {"prices": [objects.price("vip")]}, {"items": items("premium")}),
        ({"prices": [objects.price("vip")]}, {}, {"items": items("vip")}),
        ({"quantity": 2}, {}, {"items": subscription(quantity=2)["items"]}),
        (
            {"extra": {"pause_collection": {"behavior": "void"}}},
            {},
            {"pause_collection": {"behavior": "void"}},
        ),
        ({}, {"extra": {"pause_collection": {"behavior": "void"}}}, {"pause_collection": None}),
        ({}, {"metadata": {"user_id": "user_1"}}, {"metadata": {"user_id": None}}),
        (
            {"metadata": {"user_id": "user_1"}},
            {"metadata": {"user_id": "user_2"}},
            {"metadata": {"user_id": "user_1"}},
        ),
        ({"months": 2}, {"months": 1}, {"items": subscription(months=2)["items"]}),
        (
            {"months": 2, "shape": objects.Shape.BEFORE_BASIL},
            {"months": 1, "shape": objects.Shape.BEFORE_BASIL},
            {"current_period_end": T0 + 2 * MONTH},
        ),
    ],
)
def test_within_a_second_an_update_follows_the_state_it_says_was_before_it(
    first: dict[str, Any], second: dict[str, Any], previous: dict[str, Any]
) -> None:
    before = snapshot("evt_z", previous={"latest_invoice": "in_0"}, **first)
    after = snapshot("evt_a", previous=previous, **second)
    assert every_order(before, after) == ["evt_z", "evt_a"]


def test_a_chain_of_updates_within_a_second_is_followed_link_by_link() -> None:
    """Created incomplete, paid, upgraded, to be canceled: four snapshots of one second."""
    created = snapshot("evt_d", verb="created", status="incomplete")
    paid = snapshot("evt_c", previous={"status": "incomplete"})
    vip = [objects.price("vip")]
    upgraded = snapshot("evt_b", prices=vip, previous={"items": items("premium")})
    leaving = snapshot(
        "evt_a", prices=vip, cancel_at_period_end=True, previous={"cancel_at_period_end": False}
    )
    assert every_order(created, paid, upgraded, leaving) == ["evt_d", "evt_c", "evt_b", "evt_a"]


def test_the_state_of_the_second_before_starts_the_chain() -> None:
    """Canceled and restored within a second, seen only by what was before."""
    start = snapshot("evt_z", after=-1)
    leaving = snapshot("evt_b", cancel_at_period_end=True, previous={"cancel_at_period_end": False})
    staying = snapshot("evt_a", previous={"cancel_at_period_end": True})
    assert every_order(start, leaving, staying) == ["evt_z", "evt_b", "evt_a"]


@pytest.mark.parametrize("status", sorted(TERMINAL_STATUSES))
def test_a_terminal_snapshot_is_the_last_whatever_its_time(status: str) -> None:
    """Stripe's clocks may differ by a second; a subscription that is over stays over."""
    over = snapshot("evt_a", status=status)
    later = snapshot("evt_b", after=DAY)
    assert every_order(over, later) == ["evt_b", "evt_a"]


def test_within_a_second_a_creation_is_first_and_a_deletion_last() -> None:
    created = snapshot("evt_c", verb="created")
    updated = snapshot("evt_b")
    deleted = snapshot("evt_a", verb="deleted", status="canceled")
    assert every_order(created, updated, deleted) == ["evt_c", "evt_b", "evt_a"]


@pytest.mark.parametrize("status", sorted(TERMINAL_STATUSES))
def test_within_a_second_a_terminal_snapshot_wins_over_an_active_one(status: str) -> None:
    """Whatever the active one says was before it, and whichever id comes first."""
    over = snapshot("evt_a", status=status, previous={"status": "active"})
    assert every_order(over, snapshot("evt_b", previous={"status": status})) == ["evt_b", "evt_a"]
    assert is_settled([over, snapshot("evt_b")])


def test_previous_attributes_order_a_second_against_ids_periods_and_arrival() -> None:
    """The downgrade came last, although its id comes first and it is paid for a shorter time."""
    start = snapshot("evt_m", after=-1, months=2)
    upgraded = snapshot("evt_z", months=3, previous={"items": subscription(months=2)["items"]})
    back = snapshot("evt_a", months=1, previous={"items": subscription(months=3)["items"]})
    assert every_order(start, upgraded, back) == ["evt_m", "evt_z", "evt_a"]
    assert is_settled([back, start, upgraded])


LEAVING = snapshot("evt_b", cancel_at_period_end=True, previous={"cancel_at_period_end": False})
STAYING = snapshot("evt_a", previous={"cancel_at_period_end": True})


@pytest.mark.parametrize(
    ("facts", "settled"),
    [
        ([], True),
        ([snapshot("evt_1")], True),
        ([snapshot("evt_1"), snapshot("evt_2", after=1, status="past_due")], True),
        ([snapshot("evt_1"), snapshot("evt_2")], True),
        ([snapshot("evt_1"), snapshot("evt_2", status="past_due")], False),
        ([snapshot("evt_1"), snapshot("evt_2", status="past_due"), snapshot("evt_3", after=1)], True),
        ([snapshot("evt_1"), snapshot("evt_2", status="past_due", previous={"status": "active"})], True),
        ([snapshot("evt_1", verb="created", status="incomplete"), snapshot("evt_2")], True),
        (
            [
                snapshot("evt_1", verb="created", status="incomplete"),
                snapshot("evt_2", previous={"status": "incomplete"}),
                snapshot("evt_3", status="past_due", previous={"status": "paused"}),
            ],
            False,
        ),
        ([LEAVING, STAYING], False),
        ([snapshot("evt_c", after=-1), LEAVING, STAYING], True),
        ([snapshot("evt_c", verb="created"), LEAVING, STAYING], True),
        ([LEAVING, STAYING, snapshot("evt_c", status="canceled")], True),
        ([LEAVING, STAYING, snapshot("evt_c", verb="deleted", status="active")], True),
    ],
    ids=[
        "nothing was heard",
        "one snapshot",
        "another second",
        "equal snapshots",
        "neither says what was before it",
        "a later second settles it",
        "one follows the other",
        "a creation comes first",
        "one follows nothing that is known",
        "a cancellation and its undoing, nothing older known",
        "the same after an older snapshot",
        "the same after the creation",
        "the subscription is over",
        "the subscription was deleted",
    ],
)
def test_it_is_known_whether_stripe_tells_which_snapshot_counts(
    facts: list[SubscriptionFact], settled: bool
) -> None:
    assert {is_settled(order) for order in itertools.permutations(facts)} == {settled}


def test_of_updates_that_tell_nothing_the_one_that_paid_further_is_later() -> None:
    assert every_order(snapshot("evt_z"), snapshot("evt_a", months=2)) == ["evt_z", "evt_a"]


def test_very_many_updates_of_one_second_are_still_put_in_one_order() -> None:
    facts = [snapshot(f"evt_{number}") for number in range(CHAINED_SNAPSHOTS_MAX + 2)]
    forwards, backwards = in_order(facts), in_order(reversed(facts))
    assert forwards == backwards
    assert len(forwards) == len(facts)


some_status = st.sampled_from(["incomplete", "active", "past_due", "canceled", "a_status_of_tomorrow"])
some_snapshot = st.fixed_dictionaries(
    {
        "verb": st.sampled_from(["created", "updated", "updated", "updated", "deleted", "paused"]),
        "after": st.sampled_from([0, 0, 0, 1]),
        "status": some_status,
        "cancel_at_period_end": st.booleans(),
        "previous": st.sampled_from(
            [None, {"status": "active"}, {"status": "past_due"}, {"cancel_at_period_end": True}]
        ),
    }
)


@settings(max_examples=100, deadline=None)
@given(told=st.lists(some_snapshot, min_size=2, max_size=6), data=st.data())
def test_any_snapshots_have_one_order_and_none_is_lost(
    told: list[dict[str, Any]], data: st.DataObject
) -> None:
    facts = [snapshot(f"evt_{number}", **what) for number, what in enumerate(told)]
    ordered = in_order(facts)
    assert sorted(fact.event_id for fact in ordered) == sorted(fact.event_id for fact in facts)
    assert in_order(data.draw(st.permutations(facts))) == ordered
    over = [fact.status in TERMINAL_STATUSES for fact in ordered]
    assert over == sorted(over)
    for part in (False, True):
        times = [fact.as_of for fact in ordered if (fact.status in TERMINAL_STATUSES) is part]
        assert times == sorted(times)


def test_a_second_full_of_pauses_and_resumptions_with_their_echoes_ends_with_what_came_last() -> None:
    """`paused` and `resumed` come twice, as an update and under their own name; seven snapshots in all."""
    start = snapshot("evt_0", after=-1)
    happened = [
        snapshot("evt_7", status="paused", previous={"status": "active"}),
        snapshot("evt_2", verb="paused", status="paused"),
        snapshot("evt_6", previous={"status": "paused"}),
        snapshot("evt_1", verb="resumed"),
        snapshot("evt_5", status="past_due", previous={"status": "active"}),
        snapshot("evt_4", status="past_due", months=3, previous={"items": subscription()["items"]}),
        snapshot("evt_3", months=3, previous={"status": "past_due"}),
    ]
    dice = random.Random(7)
    for _ in range(50):
        ordered = in_order([start, *dice.sample(happened, len(happened))])
        told = [fact.event_id for fact in ordered if fact.event_type.endswith(".updated")]
        assert told[-5:] == ["evt_7", "evt_6", "evt_5", "evt_4", "evt_3"]
    assert is_settled([start, *happened])
