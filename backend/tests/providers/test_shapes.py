"""Stripe's own example objects of seven dates, from 2019 to 2026, in every event type that carries them."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from backend.app.billing.domain.facts import SubscriptionFact, Translation
from backend.app.billing.providers.registry import translators
from backend.app.billing.providers.stripe import translate
from backend.app.billing.providers.stripe_event import read_event

Json = dict[str, Any]

SHAPES = Path(__file__).parents[1] / "fixtures" / "shapes"
DATES = ("2019-06", "2020-10", "2022-11", "2024-06", "2025-03", "2025-06", "2026-08")
SINCE_BASIL = frozenset({"2025-06", "2026-08"})
CREATED = 1_764_000_000
PERIOD_END = 1_766_592_000

# How the types of the events that carry an object begin; the longest beginning counts.
CARRIED_BY = {
    "checkout.session.": "checkout.session",
    "customer.": "customer",
    "customer.subscription.": "subscription",
    "subscription_schedule.": "subscription_schedule",
    "invoice.": "invoice",
    "invoice_payment.": "invoice_payment",
    "credit_note.": "credit_note",
    "charge.": "charge",
    "charge.dispute.": "dispute",
    "charge.refund.": "refund",
    "refund.": "refund",
    "payment_intent.": "payment_intent",
    "radar.early_fraud_warning.": "radar.early_fraud_warning",
    "price.": "price",
    "product.": "product",
}
# Stripe publishes no examples of these objects, or of an application no more than its id.
WITHOUT_EXAMPLE = ("review.", "plan.", "account.", "test_helpers.")


def object_of(event_type: str) -> str:
    return CARRIED_BY[max((start for start in CARRIED_BY if event_type.startswith(start)), key=len)]


CASES = [
    (date, event_type)
    for date in DATES
    for event_type in translators()
    if not event_type.startswith(WITHOUT_EXAMPLE)
    and (SHAPES / date / f"{object_of(event_type)}.json").exists()
]


def shape(date: str, name: str) -> Json:
    document: Json = json.loads((SHAPES / date / f"{name}.json").read_text(encoding="utf-8"))
    return document


def translated(event_type: str, content: Json) -> Translation | None:
    event = {
        "id": "evt_1",
        "type": event_type,
        "created": CREATED,
        "data": {"object": content, "previous_attributes": {"metadata": {}}},
    }
    return translate(read_event(event, signed_at=datetime.fromtimestamp(CREATED, UTC)))


def assertions_of(event_type: str, content: Json) -> Translation:
    translation = translated(event_type, content)
    assert translation is not None
    return translation


def plant(document: Json, **values: Any) -> set[str]:
    """Puts values where this generation has the fields, and nowhere else; the fields it has."""
    found = values.keys() & document.keys()
    document.update({key: values[key] for key in found})
    return set(found)


def test_every_translated_type_is_tried_on_an_example_of_each_date_that_has_one() -> None:
    tried = {event_type for _, event_type in CASES}
    assert tried == {name for name in translators() if not name.startswith(WITHOUT_EXAMPLE)}
    assert {path.name for path in SHAPES.iterdir() if path.is_dir()} == set(DATES)


@pytest.mark.parametrize(("date", "event_type"), CASES)
def test_an_example_of_each_date_is_understood_in_every_event_that_carries_it(
    date: str, event_type: str
) -> None:
    name = object_of(event_type)
    content = shape(date, name)
    if name == "subscription_schedule":
        content["subscription"] = "sub_7"
    if name == "invoice_payment":
        content["invoice"] = "in_7"
    translation = assertions_of(event_type, content)
    if name in ("price", "product"):
        assert len(translation.alerts) == 1
    elif event_type != "invoice.upcoming":
        # One that is to come may be of a customer without a subscription.
        assert translation.subject
    for about in translation.facts:
        assert about.key == translation.subject


@pytest.mark.parametrize("date", DATES)
def test_a_subscriptions_period_price_and_state_are_found_where_each_date_has_them(date: str) -> None:
    content = shape(date, "subscription")
    (item,) = content["items"]["data"]
    places = [plant(part, current_period_end=PERIOD_END) for part in (content, item)]
    assert places == (
        [set(), {"current_period_end"}] if date in SINCE_BASIL else [{"current_period_end"}, set()]
    )
    (about,) = assertions_of("customer.subscription.updated", content).facts
    fact = about.fact
    assert isinstance(fact, SubscriptionFact)
    assert fact.status == "active"
    assert fact.customer_id == content["customer"]
    assert fact.started_at == datetime.fromtimestamp(content["start_date"], UTC)
    (read,) = fact.items
    assert read.period_end == datetime.fromtimestamp(PERIOD_END, UTC)
    assert read.price.price_id == (item.get("price") or item["plan"])["id"]
    assert read.price.product_id == (item.get("price") or item["plan"])["product"]


@pytest.mark.parametrize("date", DATES)
def test_an_invoices_subscription_and_payment_are_found_where_each_date_has_them(date: str) -> None:
    content = shape(date, "invoice")
    content["id"] = "in_7"
    for line in content["lines"]["data"]:
        plant(line, subscription=None, parent=None)
    wanted = {"in:in_7>sub:sub_7"}
    if date in SINCE_BASIL:
        assert content.get("subscription") is None
        content["parent"] = {"subscription_details": {"subscription": "sub_7", "metadata": {}}}
    else:
        plant(content, subscription="sub_7")
    if "payment_intent" in plant(content, payment_intent="pi_7"):
        assert date not in SINCE_BASIL
        wanted.add("pi:pi_7>in:in_7")
    translation = assertions_of("invoice.paid", content)
    assert {f"{link.child}>{link.parent}" for link in translation.links} == wanted
    assert translation.payments[0].amount == content["amount_paid"]


@pytest.mark.parametrize("date", sorted(SINCE_BASIL))
def test_since_basil_an_invoice_payment_links_an_invoice_to_what_paid_it(date: str) -> None:
    content = {
        **shape(date, "invoice_payment"),
        "invoice": "in_7",
        "payment": {"type": "payment_intent", "payment_intent": "pi_7"},
    }
    (link,) = assertions_of("invoice_payment.paid", content).links
    assert (link.child, link.parent) == ("pi:pi_7", "in:in_7")


@pytest.mark.parametrize(
    ("name", "event_type"),
    [
        ("charge", "charge.succeeded"),
        ("refund", "refund.created"),
        ("dispute", "charge.dispute.created"),
        ("radar.early_fraud_warning", "radar.early_fraud_warning.created"),
    ],
)
@pytest.mark.parametrize("date", DATES)
def test_money_is_traced_to_its_payment_or_else_to_its_charge(date: str, name: str, event_type: str) -> None:
    """In 2019 a refund named its charge only; a warning of fraud may do so to this day."""
    content = shape(date, name)
    if name == "charge":
        content["id"] = "ch_7"
    else:
        content["charge"] = "ch_7"
    has_intent = "payment_intent" in plant(content, payment_intent="pi_7")
    translation = assertions_of(event_type, content)
    assert translation.subject == ("pi:pi_7" if has_intent else "ch:ch_7")
    charged = [(link.child, link.parent) for link in translation.links if link.child == "ch:ch_7"]
    assert ("ch:ch_7", "pi:pi_7") in charged if has_intent else ("ch:ch_7", "pi:pi_7") not in charged


@pytest.mark.parametrize("date", DATES)
def test_a_credit_note_gives_back_only_what_was_paid_and_no_refund_tells(date: str) -> None:
    """One before the payment gives back nothing; a refund behind it has events of its own."""
    content = {**shape(date, "credit_note"), "amount": 500, "type": "post_payment", "refund": None}
    plant(content, post_payment_amount=500, refunds=[])
    (about,) = assertions_of("credit_note.created", content).facts
    assert getattr(about.fact, "amount", None) == 500
    before = {**content, "type": "pre_payment"}
    plant(before, post_payment_amount=0)
    assert assertions_of("credit_note.created", before).facts == ()
    if date in SINCE_BASIL:
        refunded = {**content, "refunds": [{"refund": "re_7", "amount_refunded": 500}]}
    else:
        refunded = {**content, "refund": "re_7"}
    assert assertions_of("credit_note.created", refunded).facts == ()
