"""The odd shapes of Stripe's events, from 2019 to today, and what they assert."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from backend.app.billing.domain.facts import (
    CheckoutFact,
    CheckoutState,
    Link,
    PriceRef,
    SubscriptionFact,
    Translation,
    Via,
)
from backend.app.billing.providers.fields import TranslationError
from backend.app.billing.providers.registry import ledger_type
from backend.app.billing.providers.stripe import translate
from backend.app.billing.providers.stripe_event import read_event
from backend.app.simulator import objects

NOW = 1_764_000_000
END = NOW + objects.MONTH_SECONDS
SIGNED_AT = datetime(2026, 11, 23, tzinfo=UTC)


def assertions_of(event_type: str, content: dict[str, Any]) -> Translation | None:
    event = objects.event("evt_1", event_type, content, created=NOW)
    return translate(read_event(event, signed_at=SIGNED_AT))


def translated(event_type: str, content: dict[str, Any]) -> Translation:
    translation = assertions_of(event_type, content)
    assert translation is not None
    return translation


def checkout_fact(content: dict[str, Any]) -> CheckoutFact:
    (about,) = translated("checkout.session.completed", content).facts
    assert isinstance(about.fact, CheckoutFact)
    return about.fact


def subscription(**changes: Any) -> dict[str, Any]:
    return {
        **objects.subscription("sub_1", customer="cus_1", period_start=NOW, period_end=END),
        **changes,
    }


def subscription_fact(
    content: dict[str, Any], event_type: str = "customer.subscription.updated"
) -> SubscriptionFact:
    (about,) = translated(event_type, content).facts
    assert isinstance(about.fact, SubscriptionFact)
    return about.fact


@pytest.mark.parametrize(
    "event_type",
    ["product.updated", "setup_intent.succeeded", "payout.paid", "account.updated", "v2.core.event"],
)
def test_nothing_depends_on_other_types(event_type: str) -> None:
    assert assertions_of(event_type, {"id": "obj_1"}) is None


@pytest.mark.parametrize(
    ("event_type", "spelt"),
    [
        ("checkout.session.completed", "checkout_completed"),
        ("customer.subscription.deleted", "subscription_deleted"),
        ("invoice.payment_succeeded", "invoice_payment_succeeded"),
        ("charge.succeeded", "charge_succeeded"),
        ("charge.dispute.created", "charge_dispute_created"),
        ("checkout.session.async_payment_failed", "checkout_async_payment_failed"),
    ],
)
def test_the_ledger_spells_stripes_types_in_snake_case(event_type: str, spelt: str) -> None:
    assert ledger_type(event_type) == spelt


# Checkout sessions


@pytest.mark.parametrize(
    ("payment_status", "state"),
    [
        ("paid", CheckoutState.PAID),
        ("no_payment_required", CheckoutState.PAID),
        ("unpaid", CheckoutState.AWAITING_PAYMENT),
        ("a_status_of_tomorrow", CheckoutState.AWAITING_PAYMENT),
    ],
)
def test_a_completed_session_is_paid_only_where_stripe_says_so(
    payment_status: str, state: CheckoutState
) -> None:
    content = objects.checkout_session("cs_1", payment_status=payment_status, client_reference_id="u")
    assert checkout_fact(content).state is state
    translation = translated("checkout.session.completed", content)
    assert translation.expects_access is (state is CheckoutState.PAID)
    assert translation.payments[0].settled is (state is CheckoutState.PAID)


def test_before_payment_status_existed_a_session_completed_by_being_paid() -> None:
    content = objects.checkout_session("cs_1")
    del content["payment_status"]
    assert checkout_fact(content).state is CheckoutState.PAID


def test_a_setup_session_sells_nothing() -> None:
    content = objects.checkout_session("cs_1", mode="setup", payment_status="no_payment_required")
    assert assertions_of("checkout.session.completed", content) is None


@pytest.mark.parametrize(
    ("made", "mode"),
    [({}, "payment"), ({"subscription": "sub_1"}, "subscription"), ({"setup_intent": "seti_1"}, None)],
)
def test_a_session_of_2019_tells_its_mode_by_what_it_made(made: dict[str, str], mode: str | None) -> None:
    content = {**objects.checkout_session("cs_1"), **made}
    del content["mode"]
    translation = assertions_of("checkout.session.completed", content)
    if mode is None:
        assert translation is None
    else:
        assert translation is not None
        assert [getattr(about.fact, "mode", None) for about in translation.facts] == [mode]


def test_a_mode_of_tomorrow_is_not_guessed_at() -> None:
    with pytest.raises(TranslationError, match=r"data\.object\.mode is not a mode we know"):
        assertions_of("checkout.session.completed", objects.checkout_session("cs_1", mode="rental"))


def test_a_client_reference_is_stronger_evidence_than_metadata() -> None:
    content = objects.checkout_session(
        "cs_1", customer="cus_1", client_reference_id="by_reference", metadata={"user_id": "by_metadata"}
    )
    (tie,) = translated("checkout.session.completed", content).ties
    assert (tie.user_id, tie.via) == ("by_reference", Via.CLIENT_REFERENCE_ID)


def test_a_guest_checkout_ties_no_customer() -> None:
    translation = translated(
        "checkout.session.completed", objects.checkout_session("cs_1", client_reference_id="user_1")
    )
    assert translation.ties == ()
    assert translation.customer_id is None


def test_an_expired_session_ties_nobody() -> None:
    """Whoever opened a checkout and left has shown nothing."""
    content = objects.checkout_session("cs_1", customer="cus_1", client_reference_id="user_1")
    translation = translated("checkout.session.expired", content)
    assert translation.ties == ()
    assert translation.expects_access is False


def test_a_subscription_session_speaks_of_its_subscription() -> None:
    content = objects.checkout_session("cs_1", mode="subscription", customer="cus_1", subscription="sub_1")
    translation = translated("checkout.session.completed", content)
    assert translation.subject == "sub:sub_1"
    assert translation.expects_access is True


def test_a_subscription_session_that_made_none_gives_nothing() -> None:
    content = objects.checkout_session("cs_1", mode="subscription", status="expired", payment_status="unpaid")
    translation = translated("checkout.session.expired", content)
    assert translation.facts == ()
    assert translation.expects_access is False
    assert len(translation.payments) == 1


def test_the_lines_of_a_session_are_read_where_the_event_carries_them() -> None:
    content = objects.checkout_session("cs_1")
    content["line_items"] = {"object": "list", "data": [{"price": objects.price("vip"), "quantity": 2}]}
    (line,) = checkout_fact(content).lines
    assert (line.price.lookup_key, line.quantity) == ("vip", 2)


def test_expanded_objects_are_read_like_ids() -> None:
    content = objects.checkout_session("cs_1", mode="subscription")
    content["customer"] = {"id": "cus_1", "object": "customer"}
    content["subscription"] = {"id": "sub_1", "object": "subscription"}
    fact = checkout_fact(content)
    assert (fact.customer_id, fact.subscription_id) == ("cus_1", "sub_1")


# Subscriptions


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (
            {"price": objects.price("vip")},
            PriceRef(price_id="price_vip", lookup_key="vip", product_id="prod_vip"),
        ),
        ({"price": "price_1"}, PriceRef(price_id="price_1")),
        ({"plan": {"id": "plan_1", "product": "prod_1"}}, PriceRef(price_id="plan_1", product_id="prod_1")),
        (
            {"price": {"id": "p", "product": "prod_1", "metadata": {"plan_code": "vip"}}},
            PriceRef(price_id="p", product_id="prod_1", metadata_plan_code="vip"),
        ),
        (
            {"price": {"id": "p", "product": {"id": "prod_1", "metadata": {"plan_code": "vip"}}}},
            PriceRef(price_id="p", product_id="prod_1", metadata_plan_code="vip"),
        ),
        ({}, PriceRef()),
    ],
)
def test_a_price_is_read_in_every_shape_it_comes_in(item: dict[str, Any], expected: PriceRef) -> None:
    content = subscription(items={"object": "list", "data": [item]})
    assert subscription_fact(content).items[0].price == expected


def test_each_item_keeps_its_own_period() -> None:
    items = [
        {"id": "si_1", "price": objects.price("premium"), "current_period_end": END},
        {"id": "si_2", "price": objects.price("vip"), "current_period_end": END + 60},
        {"price": objects.price("enterprise")},
    ]
    fact = subscription_fact(subscription(items={"object": "list", "data": items}))
    assert [item.period_end and item.period_end.timestamp() for item in fact.items] == [END, END + 60, None]
    assert fact.items[2].item_id == "item-2"


@pytest.mark.parametrize(
    ("fields", "cancel_at"),
    [
        ({}, None),
        ({"cancel_at_period_end": True}, END),
        ({"cancel_at": END - 60}, END - 60),
        ({"cancel_at": END - 60, "cancel_at_period_end": True}, END - 60),
    ],
)
def test_the_announced_end_of_a_subscription(fields: dict[str, Any], cancel_at: int | None) -> None:
    fact = subscription_fact(subscription(**fields))
    assert (fact.cancel_at and fact.cancel_at.timestamp()) == cancel_at


@pytest.mark.parametrize(
    ("status", "read_as"),
    [("active", "canceled"), ("canceled", "canceled"), ("incomplete_expired", "incomplete_expired")],
)
def test_a_deleted_subscription_is_over_whatever_status_it_shows(status: str, read_as: str) -> None:
    fact = subscription_fact(subscription(status=status), "customer.subscription.deleted")
    assert fact.status == read_as


def test_a_pending_update_is_not_read() -> None:
    """An upgrade that waits for its payment gives nothing before it is applied."""
    content = subscription(
        pending_update={"subscription_items": [{"id": "si_1", "price": objects.price("vip")}]}
    )
    assert [item.price.lookup_key for item in subscription_fact(content).items] == ["premium"]


def test_a_paused_collection_leaves_the_status_alone() -> None:
    content = subscription(pause_collection={"behavior": "void", "resumes_at": None})
    assert subscription_fact(content).status == "active"


def test_a_subscription_without_status_or_items_is_read_as_it_is() -> None:
    content = subscription()
    del content["status"], content["items"], content["start_date"]
    fact = subscription_fact(content)
    assert (fact.status, fact.items) == ("missing", ())
    assert fact.started_at == datetime.fromtimestamp(NOW, UTC)


@pytest.mark.parametrize(
    ("status", "expects_access"),
    [
        ("incomplete", False),
        ("incomplete_expired", False),
        ("trialing", True),
        ("active", True),
        ("past_due", True),
        ("unpaid", False),
        ("paused", False),
        ("canceled", False),
        ("a_status_of_tomorrow", False),
    ],
)
def test_only_granting_statuses_make_an_event_wait_for_its_user(status: str, expects_access: bool) -> None:
    translation = translated("customer.subscription.updated", subscription(status=status))
    assert translation.expects_access is expects_access


@pytest.mark.parametrize("field", ["items", "status", "customer", "trial_end", "cancel_at_period_end"])
def test_a_field_of_an_unknown_type_is_an_error_not_a_silent_null(field: str) -> None:
    with pytest.raises(TranslationError, match=rf"data\.object\.{field}"):
        assertions_of("customer.subscription.updated", subscription(**{field: [1]}))


# Invoices


@pytest.mark.parametrize(
    "places",
    [
        {"parent": {"subscription_details": {"subscription": "sub_1", "metadata": {"user_id": "user_1"}}}},
        {"subscription": "sub_1", "subscription_details": {"metadata": {"user_id": "user_1"}}},
        {"subscription": {"id": "sub_1", "object": "subscription"}, "metadata": {"user_id": "user_1"}},
        {
            "lines": {
                "data": [
                    {
                        "parent": {"subscription_item_details": {"subscription": "sub_1"}},
                        "metadata": {"user_id": "user_1"},
                    }
                ]
            }
        },
        {"lines": {"data": [{"subscription": "sub_1", "metadata": {"user_id": "user_1"}}]}},
    ],
)
def test_an_invoice_names_its_subscription_and_user_wherever_its_version_has_them(
    places: dict[str, Any],
) -> None:
    translation = translated("invoice.paid", {"id": "in_1", "customer": "cus_1", **places})
    assert translation.links == (Link(child="in:in_1", parent="sub:sub_1"),)
    assert translation.payments[0].metadata_user_id == "user_1"
    assert [(tie.customer_id, tie.user_id) for tie in translation.ties] == [("cus_1", "user_1")]


def test_an_invoice_for_an_upgrade_is_for_the_new_price() -> None:
    """Its proration credits the old price, so the largest line counts."""
    lines = [
        {"amount": -1500, "price": objects.price("premium")},
        {"amount": 4999, "price": objects.price("vip")},
        {"amount": 100, "description": "a fee without a price"},
    ]
    translation = translated("invoice.paid", {"id": "in_1", "lines": {"data": lines}})
    assert translation.payments[0].price == PriceRef(
        price_id="price_vip", lookup_key="vip", product_id="prod_vip"
    )


def test_an_expanded_price_of_an_invoice_line_keeps_its_lookup_key() -> None:
    line = {
        "amount": 1,
        "pricing": {"price_details": {"price": {"id": "p", "lookup_key": "vip"}, "product": "prod"}},
    }
    translation = translated("invoice.paid", {"id": "in_1", "lines": {"data": [line]}})
    assert translation.payments[0].price == PriceRef(price_id="p", lookup_key="vip", product_id="prod")


def test_paid_and_payment_succeeded_report_the_same_money() -> None:
    content = objects.invoice("in_1", customer="cus_1", subscription_id="sub_1")
    keys = {
        translated(event_type, content).payments[0].effect_key
        for event_type in ("invoice.paid", "invoice.payment_succeeded")
    }
    assert keys == {"in:in_1"}


def test_each_failed_attempt_is_a_line_of_its_own() -> None:
    keys = [
        translated(
            "invoice.payment_failed",
            objects.invoice("in_1", customer="cus_1", paid=False, attempt_count=attempt),
        )
        .payments[0]
        .effect_key
        for attempt in (1, 2)
    ]
    assert keys == ["in:in_1:payment_failed:1", "in:in_1:payment_failed:2"]


def test_an_invoice_of_its_own_waits_for_nobody() -> None:
    translation = translated("invoice.paid", objects.invoice("in_1", customer="cus_1"))
    assert translation.expects_access is False
    assert translation.payments[0].settled is True


# Money


def test_an_authorised_charge_that_was_not_captured_is_not_settled() -> None:
    (line,) = translated("charge.succeeded", objects.charge("ch_1", captured=False)).payments
    assert (line.amount, line.settled) == (2999, False)


def test_two_partial_refunds_of_a_charge_are_two_lines() -> None:
    lines = [
        translated("charge.refunded", objects.charge("ch_1", amount_refunded=refunded)).payments[0]
        for refunded in (1000, 2999)
    ]
    assert [(line.effect_key, line.amount) for line in lines] == [
        ("ch:ch_1:charge_refunded:1000", 1000),
        ("ch:ch_1:charge_refunded:2999", 2999),
    ]


@pytest.mark.parametrize(("received", "amount"), [(2500, 2500), (None, 2999)])
def test_a_succeeded_intent_counts_what_was_received(received: int | None, amount: int) -> None:
    content = {**objects.payment_intent("pi_1"), "amount_received": received}
    (line,) = translated("payment_intent.succeeded", content).payments
    assert (line.amount, line.settled) == (amount, True)


def test_a_refund_is_one_line_for_each_status_it_reaches() -> None:
    """Two types of event report the same refund."""
    pending, done, again = (
        translated(event_type, objects.refund("re_1", status=status)).payments[0]
        for event_type, status in (
            ("refund.created", "pending"),
            ("refund.updated", "succeeded"),
            ("charge.refund.updated", "succeeded"),
        )
    )
    assert (pending.settled, done.settled) == (False, True)
    assert done.effect_key == again.effect_key != pending.effect_key


def test_money_without_an_id_is_still_a_line() -> None:
    (line,) = translated("refund.created", {"object": "refund", "amount": 5}).payments
    assert line.effect_key == "evt:evt_1"
    assert line.amount == 5
