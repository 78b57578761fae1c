"""Every event type that is translated, in both generations of Stripe's API, against what a person expects of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from backend.app.billing.domain.facts import SubscriptionFact, Translation, source_key
from backend.app.billing.providers.stripe import TRANSLATORS, translate
from backend.app.billing.providers.stripe_event import read_event

FIXTURES = Path(__file__).parents[1] / "fixtures" / "stripe"
GENERATIONS = ("before-basil", "basil")
# Of the instants in the fixtures: when the event occurred, and when the paid month ends.
OCCURRED_AT = datetime(2025, 11, 24, 16, 1, tzinfo=UTC)
PERIOD_END = datetime(2025, 12, 24, 16, 0, tzinfo=UTC)


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What an event comes to: its ledger line, its source and state if it has one, and whom it names."""

    line: str
    effect_key: str
    amount: int | None
    settled: bool
    source: str | None = None
    state: str | None = None
    tied_user: str | None = None
    expects_access: bool = False


def checkout(line: str, state: str, **rest: Any) -> Expected:
    return Expected(line=line, source="cs:cs_test_1", state=state, amount=2999, **rest)


def subscription(line: str, state: str, *, expects_access: bool) -> Expected:
    return Expected(
        line=line,
        effect_key="evt:evt_1",
        amount=None,
        settled=False,
        source="sub:sub_1",
        state=state,
        tied_user="user_1",
        expects_access=expects_access,
    )


def money(line: str, effect_key: str, *, amount: int = 2999, settled: bool = False) -> Expected:
    return Expected(line=line, effect_key=effect_key, amount=amount, settled=settled)


EXPECTED = {
    "checkout.session.completed": checkout(
        "checkout_completed",
        "paid",
        effect_key="cs:cs_test_1",
        settled=True,
        tied_user="user_1",
        expects_access=True,
    ),
    "checkout.session.async_payment_succeeded": checkout(
        "checkout_async_payment_succeeded",
        "paid",
        effect_key="cs:cs_test_1",
        settled=True,
        tied_user="user_1",
        expects_access=True,
    ),
    "checkout.session.async_payment_failed": checkout(
        "checkout_async_payment_failed",
        "failed",
        effect_key="cs:cs_test_1:checkout_async_payment_failed",
        settled=False,
        tied_user="user_1",
    ),
    "checkout.session.expired": checkout(
        "checkout_expired", "expired", effect_key="cs:cs_test_1:checkout_expired", settled=False
    ),
    "customer.subscription.created": subscription("subscription_created", "incomplete", expects_access=False),
    "customer.subscription.updated": subscription("subscription_updated", "past_due", expects_access=True),
    "customer.subscription.deleted": subscription("subscription_deleted", "canceled", expects_access=False),
    "customer.subscription.paused": subscription("subscription_paused", "paused", expects_access=False),
    "customer.subscription.resumed": subscription("subscription_resumed", "active", expects_access=True),
    "customer.subscription.pending_update_applied": subscription(
        "subscription_pending_update_applied", "active", expects_access=True
    ),
    "customer.subscription.pending_update_expired": subscription(
        "subscription_pending_update_expired", "active", expects_access=True
    ),
    "customer.subscription.trial_will_end": subscription(
        "subscription_trial_will_end", "trialing", expects_access=True
    ),
    "invoice.paid": Expected(
        line="invoice_paid",
        effect_key="in:in_1",
        amount=2999,
        settled=True,
        tied_user="user_1",
        expects_access=True,
    ),
    "invoice.payment_succeeded": Expected(
        line="invoice_payment_succeeded",
        effect_key="in:in_1",
        amount=2999,
        settled=True,
        tied_user="user_1",
        expects_access=True,
    ),
    "invoice.payment_failed": Expected(
        line="invoice_payment_failed",
        effect_key="in:in_1:failed:2",
        amount=2999,
        settled=False,
        tied_user="user_1",
    ),
    "charge.succeeded": money("charge_succeeded", "ch:ch_1:charge_succeeded", settled=True),
    "charge.failed": money("charge_failed", "ch:ch_1:charge_failed"),
    "charge.pending": money("charge_pending", "ch:ch_1:charge_pending"),
    "charge.captured": money("charge_captured", "ch:ch_1:charge_captured", amount=2500, settled=True),
    "charge.expired": money("charge_expired", "ch:ch_1:charge_expired"),
    "charge.updated": money("charge_updated", "ch:ch_1:charge_updated:evt_1"),
    "charge.refunded": money("charge_refunded", "ch:ch_1:charge_refunded:1000", amount=1000, settled=True),
    "payment_intent.created": money("payment_intent_created", "pi:pi_1:payment_intent_created:evt_1"),
    "payment_intent.processing": money(
        "payment_intent_processing", "pi:pi_1:payment_intent_processing:evt_1"
    ),
    "payment_intent.succeeded": money(
        "payment_intent_succeeded", "pi:pi_1:payment_intent_succeeded", settled=True
    ),
    "payment_intent.payment_failed": money(
        "payment_intent_payment_failed", "pi:pi_1:payment_intent_payment_failed:evt_1"
    ),
    "payment_intent.canceled": money("payment_intent_canceled", "pi:pi_1:payment_intent_canceled:evt_1"),
    "payment_intent.partially_funded": money(
        "payment_intent_partially_funded", "pi:pi_1:payment_intent_partially_funded:evt_1"
    ),
    "payment_intent.requires_action": money(
        "payment_intent_requires_action", "pi:pi_1:payment_intent_requires_action:evt_1"
    ),
    "payment_intent.amount_capturable_updated": money(
        "payment_intent_amount_capturable_updated", "pi:pi_1:payment_intent_amount_capturable_updated:evt_1"
    ),
    "refund.created": money("refund_created", "re:re_1:refund:pending"),
    "refund.updated": money("refund_updated", "re:re_1:refund:succeeded", settled=True),
    "refund.failed": money("refund_failed", "re:re_1:refund:failed"),
    "charge.refund.updated": money("charge_refund_updated", "re:re_1:refund:succeeded", settled=True),
    "charge.dispute.created": money("charge_dispute_created", "dp:dp_1:charge_dispute_created:evt_1"),
    "charge.dispute.updated": money("charge_dispute_updated", "dp:dp_1:charge_dispute_updated:evt_1"),
    "charge.dispute.closed": money("charge_dispute_closed", "dp:dp_1:charge_dispute_closed:evt_1"),
    "charge.dispute.funds_withdrawn": money(
        "charge_dispute_funds_withdrawn", "dp:dp_1:charge_dispute_funds_withdrawn", settled=True
    ),
    "charge.dispute.funds_reinstated": money(
        "charge_dispute_funds_reinstated", "dp:dp_1:charge_dispute_funds_reinstated", settled=True
    ),
}


def translated(event_type: str, generation: str) -> Translation:
    body = json.loads((FIXTURES / f"{event_type}.{generation}.json").read_text(encoding="utf-8"))
    translation = translate(read_event(body, signed_at=OCCURRED_AT))
    assert translation is not None
    return translation


def summary(translation: Translation) -> Expected:
    (line,) = translation.payments
    fact = translation.facts[0] if translation.facts else None
    state = fact.status if isinstance(fact, SubscriptionFact) else fact.state.value if fact else None
    return Expected(
        line=line.event_type,
        effect_key=line.effect_key,
        amount=line.amount,
        settled=line.settled,
        source=source_key(fact) if fact else None,
        state=state,
        tied_user=translation.ties[0].user_id if translation.ties else None,
        expects_access=translation.expects_access,
    )


def test_every_translated_type_has_a_fixture_in_both_generations_and_no_fixture_is_left_over() -> None:
    """A new event type is one function, one expectation and two fixtures; none of them is forgotten."""
    wanted = {f"{event_type}.{generation}.json" for event_type in TRANSLATORS for generation in GENERATIONS}
    assert {path.name for path in FIXTURES.glob("*.json")} == wanted
    assert EXPECTED.keys() == TRANSLATORS.keys()


@pytest.mark.parametrize("event_type", EXPECTED)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_an_event_comes_to_what_a_person_expects_of_it(event_type: str, generation: str) -> None:
    assert summary(translated(event_type, generation)) == EXPECTED[event_type]


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("event_type", [name for name in EXPECTED if name.startswith("customer.")])
def test_a_subscriptions_period_and_price_are_found_where_its_generation_has_them(
    event_type: str, generation: str
) -> None:
    (fact,) = translated(event_type, generation).facts
    assert isinstance(fact, SubscriptionFact)
    (item,) = fact.items
    assert item.period_end == PERIOD_END
    assert (item.price.price_id, item.price.lookup_key, item.price.product_id) == (
        "price_1Premium",
        "premium_monthly",
        "prod_Premium",
    )
    assert (fact.customer_id, fact.metadata_user_id, fact.as_of) == ("cus_1", "user_1", OCCURRED_AT)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("event_type", [name for name in EXPECTED if name.startswith("invoice.")])
def test_an_invoices_subscription_and_price_are_found_where_its_generation_has_them(
    event_type: str, generation: str
) -> None:
    translation = translated(event_type, generation)
    (line,) = translation.payments
    assert (translation.subscription_id, line.subscription_id, line.customer_id) == (
        "sub_1",
        "sub_1",
        "cus_1",
    )
    assert line.price is not None
    assert (line.price.price_id, line.price.product_id) == ("price_1Premium", "prod_Premium")
    # Since basil a line names its price by id only.
    assert line.price.lookup_key == ("premium_monthly" if generation == "before-basil" else None)


@pytest.mark.parametrize(("generation", "invoice_id"), [("before-basil", "in_1"), ("basil", None)])
def test_a_charges_invoice_is_kept_where_stripe_still_names_it(
    generation: str, invoice_id: str | None
) -> None:
    (line,) = translated("charge.succeeded", generation).payments
    assert line.invoice_id == invoice_id
    assert (line.customer_id, line.metadata_user_id, line.currency) == ("cus_1", "user_1", "usd")
