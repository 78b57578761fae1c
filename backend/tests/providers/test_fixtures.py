"""Every event type that is translated, in both generations of Stripe's API, against what a person expects of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from backend.app.billing.domain.facts import Fact, FraudFact, SubscriptionFact, Translation
from backend.app.billing.providers.registry import translators
from backend.app.billing.providers.stripe import translate
from backend.app.billing.providers.stripe_event import read_event

FIXTURES = Path(__file__).parents[1] / "fixtures" / "stripe"
GENERATIONS = ("before-basil", "basil")
# Objects that older versions of the API do not have.
SINCE_BASIL = frozenset({"invoice_payment.paid"})
# Of the instants in the fixtures: when the event occurred, and when the paid month ends.
OCCURRED_AT = datetime(2025, 11, 24, 16, 1, tzinfo=UTC)
PERIOD_END = datetime(2025, 12, 24, 16, 0, tzinfo=UTC)


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the ledger."""

    type: str
    effect_key: str
    amount: int | None = 2999
    settled: bool = False


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What an event comes to: its subject, its fact's kind and state, its ledger line, and whom it names.

    `links` are those of both generations; `links_before_basil` the ones that only the older shape tells.
    """

    subject: str | None
    fact: str | None = None
    line: Line | None = None
    links: tuple[str, ...] = ()
    links_before_basil: tuple[str, ...] = ()
    tied_user: str | None = None
    expects_access: bool = False
    alerts: int = 0


def checkout(line: str, state: str, effect_key: str, **rest: Any) -> Expected:
    settled = state == "paid"
    return Expected(
        subject="cs:cs_test_1",
        fact=f"checkout {state}",
        line=Line(type=line, effect_key=effect_key, settled=settled),
        expects_access=settled,
        **rest,
    )


PAID_BY = ("pi:pi_1>cs:cs_test_1",)


def subscription(line: str, state: str, *, expects_access: bool, alerts: int = 0) -> Expected:
    return Expected(
        subject="sub:sub_1",
        fact=f"subscription {state}",
        line=Line(type=line, effect_key="evt:evt_1", amount=None),
        tied_user="user_1",
        expects_access=expects_access,
        alerts=alerts,
    )


def invoice(line: Line | None = None, state: str | None = None, **rest: Any) -> Expected:
    return Expected(
        subject="in:in_1",
        fact=f"invoice {state}" if state else None,
        line=line,
        links=("in:in_1>sub:sub_1",),
        links_before_basil=("pi:pi_1>in:in_1",),
        tied_user="user_1",
        **rest,
    )


CHARGED = ("ch:ch_1>pi:pi_1",)
INVOICED = ("pi:pi_1>in:in_1",)


def charge(
    line: str, effect_key: str, *, amount: int = 2999, settled: bool = False, fact: str | None = None
) -> Expected:
    return Expected(
        subject="pi:pi_1",
        fact=fact,
        line=Line(type=line, effect_key=effect_key, amount=amount, settled=settled),
        links=CHARGED,
        links_before_basil=INVOICED,
    )


def intent(state: str, *, settled: bool = False, charged: bool = False) -> Expected:
    line = f"payment_intent_{state}"
    return Expected(
        subject="pi:pi_1",
        line=Line(type=line, effect_key=f"pi:pi_1:{line}" + ("" if settled else ":evt_1"), settled=settled),
        links=CHARGED if charged else (),
        links_before_basil=INVOICED,
    )


def against(
    line: str | None, effect_key: str, fact: str | None, *, settled: bool = False, alerts: int = 0
) -> Expected:
    """Money that comes back, or may have to: a refund, a dispute, a warning."""
    return Expected(
        subject="pi:pi_1",
        fact=fact,
        line=Line(type=line, effect_key=effect_key, settled=settled) if line else None,
        links=CHARGED,
        alerts=alerts,
    )


def credit_note(verb: str, state: str, *, how: str = "issued") -> Expected:
    return Expected(
        subject="in:in_1",
        fact=f"refund {state}",
        line=Line(type=f"credit_note_{verb}", effect_key=f"cn:cn_1:{how}"),
    )


def schedule(state: str) -> Expected:
    return Expected(subject="sub:sub_1", fact=f"schedule {state}")


EXPECTED = {
    "checkout.session.completed": checkout(
        "checkout_completed", "paid", "cs:cs_test_1", tied_user="user_1", links=PAID_BY
    ),
    "checkout.session.async_payment_succeeded": checkout(
        "checkout_async_payment_succeeded", "paid", "cs:cs_test_1", tied_user="user_1", links=PAID_BY
    ),
    "checkout.session.async_payment_failed": checkout(
        "checkout_async_payment_failed",
        "failed",
        "cs:cs_test_1:checkout_async_payment_failed",
        tied_user="user_1",
        links=PAID_BY,
        alerts=1,
    ),
    "checkout.session.expired": checkout("checkout_expired", "expired", "cs:cs_test_1:checkout_expired"),
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
        "subscription_trial_will_end", "trialing", expects_access=True, alerts=1
    ),
    "invoice.paid": invoice(
        Line(type="invoice_paid", effect_key="in:in_1", settled=True), "paid", expects_access=True
    ),
    "invoice.payment_succeeded": invoice(
        Line(type="invoice_payment_succeeded", effect_key="in:in_1", settled=True),
        "paid",
        expects_access=True,
    ),
    "invoice.payment_failed": invoice(
        Line(type="invoice_payment_failed", effect_key="in:in_1:payment_failed:2"),
        "payment_failed",
        alerts=1,
    ),
    "invoice.voided": invoice(Line(type="invoice_voided", effect_key="in:in_1:voided"), "voided"),
    "invoice.marked_uncollectible": invoice(
        Line(type="invoice_marked_uncollectible", effect_key="in:in_1:uncollectible"),
        "uncollectible",
        alerts=1,
    ),
    "invoice.created": invoice(),
    "invoice.finalized": invoice(),
    "invoice.sent": invoice(),
    "invoice.updated": invoice(),
    "invoice.will_be_due": invoice(),
    "invoice.deleted": invoice(),
    "invoice.payment_action_required": invoice(alerts=1),
    "invoice.payment_attempt_required": invoice(alerts=1),
    "invoice.overdue": invoice(alerts=1),
    "invoice.finalization_failed": invoice(alerts=1),
    "invoice.overpaid": invoice(alerts=1),
    "invoice.upcoming": Expected(subject="sub:sub_1", alerts=1),
    "invoice_payment.paid": Expected(
        subject="in:in_1",
        line=Line(type="invoice_payment_paid", effect_key="ip:inpay_1"),
        links=INVOICED,
    ),
    "credit_note.created": credit_note("created", "succeeded"),
    "credit_note.updated": credit_note("updated", "succeeded"),
    "credit_note.voided": credit_note("voided", "canceled", how="voided"),
    "charge.succeeded": charge("charge_succeeded", "ch:ch_1:charge_succeeded", settled=True),
    "charge.failed": charge("charge_failed", "ch:ch_1:charge_failed"),
    "charge.pending": charge("charge_pending", "ch:ch_1:charge_pending"),
    "charge.captured": charge("charge_captured", "ch:ch_1:charge_captured", amount=2500, settled=True),
    "charge.expired": charge("charge_expired", "ch:ch_1:charge_expired", fact="charge"),
    "charge.updated": charge("charge_updated", "ch:ch_1:charge_updated:evt_1"),
    "charge.refunded": charge(
        "charge_refunded", "ch:ch_1:charge_refunded:1000", amount=1000, settled=True, fact="charge"
    ),
    "payment_intent.created": intent("created"),
    "payment_intent.processing": intent("processing"),
    "payment_intent.succeeded": intent("succeeded", settled=True, charged=True),
    "payment_intent.payment_failed": intent("payment_failed", charged=True),
    "payment_intent.canceled": intent("canceled"),
    "payment_intent.partially_funded": intent("partially_funded"),
    "payment_intent.requires_action": intent("requires_action"),
    "payment_intent.amount_capturable_updated": intent("amount_capturable_updated", charged=True),
    "refund.created": against("refund_created", "re:re_1:refund:pending", "refund pending"),
    "refund.updated": against("refund_updated", "re:re_1:refund:succeeded", "refund succeeded", settled=True),
    "refund.failed": against("refund_failed", "re:re_1:refund:failed", "refund failed"),
    "charge.refund.updated": against(
        "charge_refund_updated", "re:re_1:refund:succeeded", "refund succeeded", settled=True
    ),
    "charge.dispute.created": against(
        "charge_dispute_created", "dp:dp_1:charge_dispute_created:evt_1", "dispute needs_response", alerts=1
    ),
    "charge.dispute.updated": against(
        "charge_dispute_updated", "dp:dp_1:charge_dispute_updated:evt_1", "dispute under_review"
    ),
    "charge.dispute.closed": against(
        "charge_dispute_closed", "dp:dp_1:charge_dispute_closed:evt_1", "dispute won", alerts=1
    ),
    "charge.dispute.funds_withdrawn": against(
        "charge_dispute_funds_withdrawn",
        "dp:dp_1:charge_dispute_funds_withdrawn",
        "dispute needs_response",
        settled=True,
    ),
    "charge.dispute.funds_reinstated": against(
        "charge_dispute_funds_reinstated",
        "dp:dp_1:charge_dispute_funds_reinstated",
        "dispute won",
        settled=True,
    ),
    "radar.early_fraud_warning.created": against(None, "", "fraud warned", alerts=1),
    "radar.early_fraud_warning.updated": against(None, "", "fraud warned", alerts=1),
    "review.opened": against(None, "", None, alerts=1),
    "review.closed": against(None, "", "fraud confirmed", alerts=1),
    "customer.created": Expected(subject="cus:cus_1", tied_user="user_1"),
    "customer.updated": Expected(subject="cus:cus_1", tied_user="user_1"),
    "customer.deleted": Expected(subject="cus:cus_1", fact="ended"),
    "account.application.deauthorized": Expected(subject="acct:acct_1", fact="ended", alerts=1),
    "account.updated": Expected(subject="acct:acct_1", alerts=1),
    "test_helpers.test_clock.created": Expected(subject=None, fact="clock"),
    "test_helpers.test_clock.advancing": Expected(subject=None, fact="clock"),
    "test_helpers.test_clock.ready": Expected(subject=None, fact="clock"),
    "test_helpers.test_clock.deleted": Expected(subject=None, fact="clock"),
    "test_helpers.test_clock.internal_failure": Expected(subject=None, fact="clock"),
    "subscription_schedule.created": schedule("active"),
    "subscription_schedule.updated": schedule("active"),
    "subscription_schedule.expiring": schedule("active"),
    "subscription_schedule.released": schedule("released"),
    "subscription_schedule.canceled": schedule("canceled"),
    "subscription_schedule.completed": schedule("completed"),
    "subscription_schedule.aborted": schedule("canceled"),
    "price.updated": Expected(subject=None, alerts=1),
    "product.updated": Expected(subject=None, alerts=1),
    "plan.updated": Expected(subject=None, alerts=1),
}


def translated(event_type: str, generation: str) -> Translation:
    body = json.loads((FIXTURES / f"{event_type}.{generation}.json").read_text(encoding="utf-8"))
    translation = translate(read_event(body, signed_at=OCCURRED_AT))
    assert translation is not None
    return translation


def fact_in_words(fact: Fact) -> str:
    if isinstance(fact, FraudFact):
        return "fraud confirmed" if fact.is_confirmed else "fraud warned"
    state = getattr(fact, "status", None) or getattr(fact, "state", None)
    return f"{fact.kind} {state}" if state else fact.kind


def expected_of(translation: Translation) -> Expected:
    """What a translation comes to, in the words of the expectations."""
    assert len(translation.facts) <= 1
    assert len(translation.payments) <= 1
    for about in translation.facts:
        # A test clock is the business of several users, so its event is about none of them.
        assert about.key == (translation.subject or "clock:clock_1")
        assert about.fact.as_of == OCCURRED_AT
    links = [f"{link.child}>{link.parent}" for link in translation.links]
    return Expected(
        subject=translation.subject,
        fact=next((fact_in_words(about.fact) for about in translation.facts), None),
        line=next(
            (
                Line(
                    type=line.event_type, effect_key=line.effect_key, amount=line.amount, settled=line.settled
                )
                for line in translation.payments
            ),
            None,
        ),
        links=tuple(links),
        tied_user=translation.ties[0].user_id if translation.ties else None,
        expects_access=translation.expects_access,
        alerts=len(translation.alerts),
    )


def generations_of(event_type: str) -> Sequence[str]:
    return ("basil",) if event_type in SINCE_BASIL else GENERATIONS


def test_every_translated_type_has_a_fixture_in_both_generations_and_no_fixture_is_left_over() -> None:
    """A new event type is one function, one expectation and two fixtures; none of them is forgotten."""
    assert {path.name for path in FIXTURES.glob("*.json")} == {
        f"{event_type}.{generation}.json"
        for event_type in translators()
        for generation in generations_of(event_type)
    }
    assert EXPECTED.keys() == translators().keys()


@pytest.mark.parametrize(
    ("event_type", "generation"),
    [(event_type, generation) for event_type in EXPECTED for generation in generations_of(event_type)],
)
def test_an_event_comes_to_what_a_person_expects_of_it(event_type: str, generation: str) -> None:
    expected = EXPECTED[event_type]
    only_then = expected.links_before_basil if generation == "before-basil" else ()
    wanted = replace(expected, links=(*expected.links, *only_then), links_before_basil=())
    assert expected_of(translated(event_type, generation)) == wanted


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(
    "event_type", [name for name in EXPECTED if name.startswith("customer.subscription.")]
)
def test_a_subscriptions_period_and_price_are_found_where_its_generation_has_them(
    event_type: str, generation: str
) -> None:
    (about,) = translated(event_type, generation).facts
    fact = about.fact
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
@pytest.mark.parametrize(
    "event_type", ["invoice.paid", "invoice.payment_succeeded", "invoice.payment_failed"]
)
def test_an_invoices_subscription_and_price_are_found_where_its_generation_has_them(
    event_type: str, generation: str
) -> None:
    translation = translated(event_type, generation)
    (line,) = translation.payments
    assert (line.subscription_id, line.customer_id) == ("sub_1", "cus_1")
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
