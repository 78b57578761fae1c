"""What is told of a payment is known of all that it bears on, whatever came first: the fact or the link."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from backend.app.billing.domain.decide import decide
from backend.app.billing.domain.facts import (
    About,
    Event,
    FraudFact,
    InvoiceFact,
    InvoiceState,
    Link,
    SubjectId,
    Translation,
)
from backend.app.billing.domain.state import State, below, children_of
from backend.app.simulator import objects
from backend.tests.domain.events import at, event, folded, shipped_catalog, subscription

CATALOG = shipped_catalog()
KEYS = ("ch:1", "pi:1", "pi:2", "in:1", "in:2", "cs:1", "sub:1")

warnings = st.builds(lambda key: (key, None), st.sampled_from(KEYS))
# Any two, in both directions and in circles: what a hostile or a broken account sends must not hang either.
links = st.tuples(st.sampled_from(KEYS), st.sampled_from(KEYS))


def told(number: int, key: str, parent: str | None) -> tuple[Event, Translation]:
    """An event that warns of fraud about an object, or that says what an object bears on."""
    name = Event(
        account="",
        livemode=False,
        id=f"evt_{number}",
        type="radar.early_fraud_warning.created",
        api_version=None,
        occurred_at=at(number),
    )
    if parent is not None:
        return name, Translation(subject=key, links=(Link(child=key, parent=parent),))
    fact = FraudFact(event_id=name.id, event_type=name.type, as_of=name.occurred_at, is_confirmed=False)
    return name, Translation(subject=key, facts=(About(key=key, fact=fact),))


def state_after(happenings: Sequence[tuple[Event, Translation]]) -> State:
    state = State()
    for happened, translation in happenings:
        state, _ = decide(CATALOG, state, happened, translation, now=at(1_000))
    return state


@given(st.lists(warnings | links, max_size=14))
def test_each_subject_knows_what_was_told_of_all_that_bears_on_it(
    parts: list[tuple[str, str | None]],
) -> None:
    state = state_after([told(number, key, parent) for number, (key, parent) in enumerate(parts)])
    children = children_of(state.parents)
    for key in KEYS:
        subject = SubjectId("", False, key)
        beneath = {part.key for part in below(children, [subject])}
        expected = {
            f"evt_{number}"
            for number, (about, parent) in enumerate(parts)
            if parent is None and about in beneath
        }
        facts = [fact.event_id for fact in state.facts.get(subject, ())]
        assert sorted(facts) == sorted(expected)


def test_a_link_that_is_told_again_brings_nothing_new() -> None:
    state = state_after([told(1, "ch:1", None), told(2, "ch:1", "pi:1")])
    again, decision = decide(CATALOG, state, *told(3, "ch:1", "pi:1"), now=at(1_000))
    assert decision.inherited == ()
    assert again.facts == state.facts


def test_access_rests_on_no_object_that_was_only_named_by_what_bears_on_it() -> None:
    """A payment that names our user and plan bears on an invoice: the invoice itself was never heard of."""
    paid = objects.payment_intent(
        "pi_1", customer="cus_1", metadata={"user_id": "user_1", "plan_code": "vip"}
    )
    linked = objects.invoice_payment("inpay_1", invoice_id="in_1", intent_id="pi_1")
    events = [
        event("evt_1", "payment_intent.succeeded", paid),
        event("evt_2", "invoice_payment.paid", linked, after=1),
    ]
    for order in (events, events[::-1]):
        state = folded(CATALOG, order, now=at(10)).state
        assert [source.key for source in state.sources] == ["pi:pi_1"]


def test_any_number_of_failed_invoices_leave_the_last_paid_one_in_sight() -> None:
    def invoice(number: int, state: InvoiceState) -> InvoiceFact:
        return InvoiceFact(
            event_id=f"evt_{number:03}",
            event_type="invoice",
            as_of=at(number),
            invoice_id=f"in_{number}",
            subscription_id="sub_1",
            customer_id=None,
            state=state,
            amount=2999,
            metadata_user_id=None,
            metadata_plan_code=None,
        )

    subject = SubjectId("", False, "sub:sub_1")
    facts = [
        invoice(number, InvoiceState.PAID if number < 3 else InvoiceState.PAYMENT_FAILED)
        for number in range(10)
    ]
    kept = State(facts={subject: tuple(facts)}).within(2, [subject]).facts[subject]
    assert [fact.event_id for fact in kept] == ["evt_001", "evt_002", "evt_008", "evt_009"]


def test_a_subscription_reads_the_same_whether_its_payments_came_before_it_or_after() -> None:
    bill = objects.invoice("in_1", customer="cus_1", subscription_id="sub_1")
    linked = objects.invoice_payment("inpay_1", invoice_id="in_1", intent_id="pi_1")
    lost = objects.dispute("dp_1", intent_id="pi_1", status="lost")
    events = [
        event("evt_1", "customer.subscription.created", subscription(metadata={"user_id": "user_1"})),
        event("evt_2", "invoice.paid", bill, after=1),
        event("evt_3", "invoice_payment.paid", linked, after=2),
        event("evt_4", "charge.dispute.closed", lost, after=3),
    ]
    for order in (events, events[::-1], [events[3], events[0], events[2], events[1]]):
        state = folded(CATALOG, order, now=at(10)).state
        assert state.entitlements["user_1"].status == "dispute_lost"
