"""One event's consequences: whose it is, what changes, what waits, what the owner hears."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from backend.app.billing.domain.decide import Attribution, Change, Decision, Status
from backend.app.billing.domain.facts import CustomerId, SubjectId
from backend.app.billing.domain.merge import NO_SOURCE_STATUS, entitlement_of
from backend.app.billing.domain.state import State
from backend.app.billing.providers.stripe_event import StripeEvent
from backend.app.simulator import objects
from backend.tests.domain.events import (
    DAY,
    EMPTY,
    HOUR,
    MONTH,
    T0,
    access_of,
    at,
    decided,
    event,
    owners,
    shipped_catalog,
    subscription,
)

CATALOG = shipped_catalog()
SUB_1 = SubjectId("", False, "sub:sub_1")
CUS_1 = CustomerId("", False, "cus_1")


def run(events: Sequence[StripeEvent], *, now: int = HOUR) -> tuple[State, list[Decision]]:
    state, decisions = EMPTY, []
    for happened in events:
        state, decision = decided(CATALOG, state, happened, now=at(now))
        decisions.append(decision)
    return state, decisions


def updated(event_id: str, *, after: int = 0, envelope: dict[str, Any] | None = None, **changes: Any) -> Any:
    return event(
        event_id, "customer.subscription.updated", subscription(**changes), after=after, **envelope or {}
    )


def deleted(event_id: str, subscription_id: str = "sub_1", *, after: int, **changes: Any) -> StripeEvent:
    content = subscription(subscription_id, status="canceled", ended_at=T0 + after, **changes)
    return event(event_id, "customer.subscription.deleted", content, after=after)


def checkout(event_id: str, *, after: int = 0, session_id: str = "cs_1", **changes: Any) -> StripeEvent:
    content = objects.checkout_session(session_id, **changes)
    return event(event_id, "checkout.session.completed", content, after=after)


def tie(event_id: str = "evt_tie", *, user: str = "user_1", after: int = 0, **changes: Any) -> StripeEvent:
    """The checkout of sub_1 that names the user of cus_1."""
    return checkout(
        event_id,
        after=after,
        **{
            "mode": "subscription",
            "customer": "cus_1",
            "subscription": "sub_1",
            "client_reference_id": user,
            **changes,
        },
    )


def invoice(event_id: str = "evt_invoice", event_type: str = "invoice.paid", **changes: Any) -> StripeEvent:
    content = objects.invoice("in_1", **{"customer": "cus_1", "subscription_id": "sub_1", **changes})
    return event(event_id, event_type, content)


# Granting and revoking


def test_a_purchase_grants_its_plan() -> None:
    state, (decision,) = run(
        [checkout("evt_1", client_reference_id="user_1", metadata={"plan_code": "premium"})]
    )
    assert (decision.status, decision.user_id, decision.plan_code) == (Status.SUCCESS, "user_1", "premium")
    (change,) = decision.changes
    assert (change.kind, change.before, change.after.version) == (Change.GRANTED, None, 1)
    assert state.entitlements["user_1"] == change.after
    assert change.after.features["max_devices"] == 5
    assert change.after.activated_at == at(0)


def test_the_kinds_of_change_in_a_subscriptions_life() -> None:
    metadata = {"user_id": "user_1"}
    _, decisions = run(
        [
            updated("evt_1", status="incomplete", metadata=metadata),
            updated("evt_2", after=1, metadata=metadata),
            updated("evt_3", after=2, metadata=metadata),
            updated("evt_4", after=3, metadata=metadata, months=2),
            updated("evt_5", after=4, metadata=metadata, months=2, prices=[objects.price("vip")]),
            updated(
                "evt_6",
                after=5,
                metadata=metadata,
                months=2,
                prices=[objects.price("vip")],
                status="past_due",
            ),
            deleted("evt_7", after=6, metadata=metadata),
        ]
    )
    assert [[change.kind for change in decision.changes] for decision in decisions] == [
        [Change.CHANGED],
        [Change.GRANTED],
        [],
        [Change.EXTENDED],
        [Change.CHANGED],
        [Change.CHANGED],
        [Change.REVOKED],
    ]
    versions = [change.after.version for decision in decisions for change in decision.changes]
    assert versions == [1, 2, 3, 4, 5, 6]


def test_a_plan_is_active_since_the_event_that_brought_it() -> None:
    metadata = {"user_id": "user_1"}
    state, _ = run(
        [
            updated("evt_1", after=1, metadata=metadata),
            updated("evt_2", after=2, metadata=metadata, months=2),
        ]
    )
    assert state.entitlements["user_1"].activated_at == at(1)
    state, _ = run(
        [
            updated("evt_1", after=1, metadata=metadata),
            updated("evt_2", after=2, metadata=metadata, prices=[objects.price("vip")]),
        ]
    )
    assert state.entitlements["user_1"].activated_at == at(2)


def test_losing_one_source_never_removes_another() -> None:
    """A lifetime purchase stays when a subscription ends."""
    lifetime = checkout("evt_1", client_reference_id="user_1", metadata={"plan_code": "premium"})
    metadata = {"user_id": "user_1"}
    state, decisions = run(
        [
            lifetime,
            updated("evt_2", metadata=metadata, prices=[objects.price("vip")]),
            deleted("evt_3", after=DAY, metadata=metadata),
        ],
        now=2 * DAY,
    )
    assert [change.after.plan_code for decision in decisions for change in decision.changes] == [
        "premium",
        "vip",
        "premium",
    ]
    assert access_of(CATALOG, state, "user_1", now=at(100 * MONTH)).plan_code == "premium"


def test_a_user_nobody_has_heard_of_has_the_default_plan() -> None:
    nobody = entitlement_of(CATALOG, "user_9", [], at=at(0))
    assert (nobody.plan_code, nobody.status, nobody.valid_until) == ("free", NO_SOURCE_STATUS, None)


def test_expiry_is_computed_at_the_instant_of_the_question() -> None:
    state, _ = run([updated("evt_1", metadata={"user_id": "user_1"}, cancel_at_period_end=True)])
    last_second = access_of(CATALOG, state, "user_1", now=at(MONTH - 1))
    assert (last_second.plan_code, last_second.status, last_second.valid_until) == (
        "premium",
        "active",
        at(MONTH),
    )
    after = access_of(CATALOG, state, "user_1", now=at(MONTH))
    assert (after.plan_code, after.status, after.valid_until) == ("free", "expired", None)


def test_the_answer_holds_until_it_would_change_not_until_a_source_ends() -> None:
    """Below an endless vip purchase the end of a premium subscription changes nothing."""
    state, _ = run(
        [
            updated("evt_1", metadata={"user_id": "user_1"}),
            checkout("evt_2", client_reference_id="user_1", metadata={"plan_code": "vip"}),
        ]
    )
    entitlement = access_of(CATALOG, state, "user_1", now=at(HOUR))
    assert (entitlement.plan_code, entitlement.valid_until) == ("vip", None)


def test_of_equal_plans_the_longer_speaks_for_the_user() -> None:
    metadata = {"user_id": "user_1"}
    state, _ = run(
        [
            updated("evt_1", metadata=metadata, months=3),
            updated("evt_2", subscription_id="sub_2", metadata=metadata, status="past_due"),
        ]
    )
    assert access_of(CATALOG, state, "user_1", now=at(HOUR)).status == "active"


# Whose it is


def test_a_customers_later_subscription_belongs_to_the_user_it_is_tied_to() -> None:
    state, decisions = run([tie(), updated("evt_2", subscription_id="sub_2", after=1)])
    assert owners(state)[SubjectId("", False, "sub:sub_2")] == "user_1"
    assert decisions[1].user_id == "user_1"


def test_metadata_of_the_subscription_beats_the_customers_user() -> None:
    state, (_, decision) = run(
        [tie(), updated("evt_2", subscription_id="sub_2", metadata={"user_id": "user_2"}, after=1)]
    )
    assert owners(state)[SubjectId("", False, "sub:sub_2")] == "user_2"
    assert decision.user_id == "user_2"


def test_a_conflicting_tie_moves_nobody_and_the_owner_hears_of_it() -> None:
    """The second checkout's own subscription is its user's; the customer and all else stay where they were."""
    second = tie("evt_2", user="user_2", after=1, session_id="cs_2", subscription="sub_2")
    state, decisions = run([tie(), updated("evt_1"), second, updated("evt_3", subscription_id="sub_3")])
    assert [notice.key for notice in decisions[2].notices] == [f"tie:{CUS_1}:user_2"]
    assert decisions[2].notices[0].text.endswith("holds: user user_1.")
    assert owners(state) == {
        SUB_1: "user_1",
        SubjectId("", False, "sub:sub_2"): "user_2",
        SubjectId("", False, "sub:sub_3"): "user_1",
    }


def test_a_stronger_claim_that_comes_later_moves_the_customer_and_the_owner_hears_of_it() -> None:
    """In the other order it would have held from the start; silent it is in neither."""
    weaker = invoice(metadata={"user_id": "user_2"})
    for events in ([weaker, tie()], [tie(), weaker]):
        _, decisions = run([*events, updated("evt_2", subscription_id="sub_2")])
        (notice,) = (notice for decision in decisions for notice in decision.notices)
        assert notice.text.endswith("holds: user user_1.")
        assert decisions[2].user_id == "user_1"


def test_moving_a_subscription_by_its_metadata_takes_from_one_and_gives_to_the_other() -> None:
    first = updated("evt_1", metadata={"user_id": "user_1"})
    second = updated("evt_2", after=1, metadata={"user_id": "user_2"})
    state, (_, decision) = run([first, second])
    assert {change.after.user_id: change.kind for change in decision.changes} == {
        "user_1": Change.REVOKED,
        "user_2": Change.GRANTED,
    }
    assert owners(state) == {SUB_1: "user_2"}
    assert state.entitlements["user_1"].status == NO_SOURCE_STATUS


def test_the_same_names_in_another_account_or_mode_are_others() -> None:
    """Stripe's ids are unique only within an account and a livemode."""
    scopes: list[dict[str, Any]] = [{}, {"account": "acct_1"}, {"livemode": True}]
    events = [
        updated("evt_1", envelope=scope, metadata={"user_id": f"user_{number}"})
        for number, scope in enumerate(scopes)
    ]
    state, decisions = run(events)
    assert owners(state) == {
        SubjectId("", False, "sub:sub_1"): "user_0",
        SubjectId("acct_1", False, "sub:sub_1"): "user_1",
        SubjectId("", True, "sub:sub_1"): "user_2",
    }
    assert all(decision.status is Status.SUCCESS and not decision.notices for decision in decisions)


def test_a_tie_in_one_account_says_nothing_in_another() -> None:
    _, (_, decision) = run([tie(), updated("evt_2", subscription_id="sub_2", envelope={"account": "acct_1"})])
    assert (decision.status, decision.user_id) == (Status.PARKED, None)


# Parking and late binding


@pytest.mark.parametrize(
    ("happened", "reason"),
    [
        (updated("evt_1"), "unknown_user"),
        (updated("evt_1", customer=None), "unknown_user"),
        (invoice(), "unknown_user"),
        (tie(client_reference_id=None), "unknown_user"),
        (checkout("evt_1", metadata={"plan_code": "premium"}), "unknown_user"),
        (
            updated("evt_1", metadata={"user_id": "u"}, prices=[objects.price("gold")]),
            "unknown_price:gold",
        ),
        (
            checkout("evt_1", client_reference_id="u", metadata={"plan_code": "gold"}),
            "unknown_plan:gold",
        ),
        (checkout("evt_1", client_reference_id="u"), "unknown_plan:none named"),
        (updated("evt_1", metadata={"user_id": "u"}, prices=[]), "unknown_plan:none named"),
    ],
)
def test_what_can_not_be_attributed_is_parked_and_grants_nobody(happened: StripeEvent, reason: str) -> None:
    state, (decision,) = run([happened])
    assert (decision.status, decision.reason) == (Status.PARKED, reason)
    assert all(change.after.plan_code == "free" for change in decision.changes)
    assert all(entitlement.plan_code == "free" for entitlement in state.entitlements.values())
    (notice,) = decision.notices
    assert notice.key.startswith("parked:")
    assert "Nobody was granted anything" in notice.text


@pytest.mark.parametrize(
    "happened",
    [
        updated("evt_1", status="incomplete"),
        updated("evt_1", status="canceled"),
        invoice(event_type="invoice.payment_failed", paid=False),
        invoice(subscription_id=None),
        checkout("evt_1", payment_status="unpaid"),
        event("evt_1", "charge.succeeded", objects.charge("ch_1", customer="cus_1")),
        event("evt_1", "payment_intent.succeeded", objects.payment_intent("pi_1")),
        event("evt_1", "refund.created", objects.refund("re_1")),
    ],
)
def test_what_gives_no_access_waits_for_nobody(happened: StripeEvent) -> None:
    _, (decision,) = run([happened])
    assert (decision.status, decision.reason) == (Status.SUCCESS, None)
    assert not any("parked" in notice.text for notice in decision.notices)
    assert len(decision.payments) == 1


def test_a_subscription_parked_for_its_user_is_granted_by_the_checkout_that_ties_it() -> None:
    state, (parked, tied) = run([updated("evt_1"), tie()])
    assert parked.status is Status.PARKED
    assert tied.status is Status.SUCCESS
    assert [(change.after.user_id, change.after.plan_code) for change in tied.changes] == [
        ("user_1", "premium")
    ]
    assert [(waiting.source, waiting.reason) for waiting in tied.waiting] == [(SUB_1, None)]
    assert tied.attributions == (
        Attribution(user_id="user_1", source=SUB_1),
        Attribution(user_id="user_1", customer=CUS_1),
    )
    assert owners(state) == {SUB_1: "user_1"}


def test_a_tie_attributes_all_sources_of_its_customer() -> None:
    _, decisions = run([updated("evt_1"), updated("evt_2", subscription_id="sub_2"), tie()])
    assert {attribution.source for attribution in decisions[2].attributions} == {
        None,
        SUB_1,
        SubjectId("", False, "sub:sub_2"),
    }


def test_a_price_that_stays_unknown_keeps_waiting_when_the_user_becomes_known() -> None:
    _, decisions = run([updated("evt_1", prices=[objects.price("gold")]), tie()])
    assert decisions[1].status is Status.PARKED
    assert [waiting.reason for waiting in decisions[1].waiting] == ["unknown_price:gold"]


def test_an_invoice_for_a_subscription_that_is_over_waits_for_nobody() -> None:
    _, decisions = run([deleted("evt_1", after=1), invoice()])
    assert decisions[1].status is Status.SUCCESS


def test_an_unknown_status_keeps_access_and_the_owner_hears_of_it() -> None:
    metadata = {"user_id": "user_1"}
    state, decisions = run(
        [
            updated("evt_1", metadata=metadata),
            updated("evt_2", after=1, metadata=metadata, status="a_status_of_tomorrow"),
        ]
    )
    assert state.entitlements["user_1"].plan_code == "premium"
    assert decisions[1].changes == ()
    assert [notice.key for notice in decisions[1].notices] == ["status:a_status_of_tomorrow"]


# The ledger


def test_a_ledger_line_carries_its_user_and_plan() -> None:
    _, decisions = run([updated("evt_1", metadata={"user_id": "user_1"}), invoice()])
    (payment,) = decisions[1].payments
    assert (payment.user_id, payment.plan_code) == ("user_1", "premium")
    assert (decisions[1].subject, decisions[1].customer) == (SubjectId("", False, "in:in_1"), CUS_1)


def test_money_names_its_user_itself_where_nothing_else_is_known() -> None:
    charge = objects.charge("ch_1", metadata={"user_id": "user_1", "plan_code": "vip"})
    _, (decision,) = run([event("evt_1", "charge.succeeded", charge)])
    assert (decision.user_id, decision.plan_code) == ("user_1", "vip")
    assert (decision.payments[0].user_id, decision.payments[0].plan_code) == ("user_1", "vip")
    assert decision.changes == ()


def test_after_an_upgrade_the_ledger_follows_the_price_and_not_stale_metadata() -> None:
    """Since basil an invoice names its price by id only, and the metadata beside it is the old plan's."""
    stale = {"user_id": "user_1", "plan_code": "premium"}
    _, decisions = run(
        [
            updated("evt_1", metadata=stale, prices=[objects.price("vip")]),
            invoice(metadata=stale, line_price=objects.price("vip")),
        ]
    )
    assert decisions[1].plan_code == "vip"
    assert decisions[1].payments[0].plan_code == "vip"


def test_an_event_that_is_decided_again_changes_nothing() -> None:
    happened = updated("evt_1", metadata={"user_id": "user_1"})
    state, (_, again) = run([happened, happened])
    assert (again.status, again.changes, again.attributions) == (Status.SUCCESS, (), ())
    assert len(state.facts[SUB_1]) == 1
