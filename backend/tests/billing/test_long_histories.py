"""Of a subscription with years of events the newest are looked at, and nothing that only one event said gets lost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from backend.app.billing import store_state
from backend.app.billing.domain.facts import CheckoutFact, Fact, SubjectId
from backend.app.billing.store_state_sql import FACTS_PER_SUBJECT_MAX
from backend.app.core.clock import from_unix
from backend.app.simulator import objects
from backend.app.simulator.objects import MONTH_SECONDS
from backend.tests.billing.test_rebuild import rebuild_of
from backend.tests.faults import events
from backend.tests.faults.events import EPOCH
from backend.tests.support.billing import Harness, unix_now

SUBJECT = SubjectId("", False, "sub:sub_long")
NOW = unix_now() - 3600
SNAPSHOTS = FACTS_PER_SUBJECT_MAX + 6


async def test_a_decision_sees_the_newest_snapshots_and_still_the_first_checkout(service: Harness) -> None:
    await _deliver_long_history(service)
    async with service.service.database.snapshot() as tx:
        state = await store_state.load_state_of_users(tx, ["usr_long"])
    found = state.facts[SUBJECT]
    newest = range(SNAPSHOTS - FACTS_PER_SUBJECT_MAX, SNAPSHOTS)
    assert sorted(_snapshots(found)) == sorted(f"evt_long_{number}" for number in newest)
    assert [fact.event_id for fact in found if isinstance(fact, CheckoutFact)] == ["evt_checkout"]


async def test_a_look_at_the_past_sees_what_was_the_newest_then(service: Harness) -> None:
    await _deliver_long_history(service)
    async with service.service.database.snapshot() as tx:
        state = await store_state.load_state_of_users(tx, ["usr_long"], until=from_unix(EPOCH + 2))
    assert sorted(_snapshots(state.facts[SUBJECT])) == ["evt_long_0", "evt_long_1", "evt_long_2"]


async def test_a_decision_reads_no_more_the_more_invoices_there_are(service: Harness) -> None:
    """Years of payments, a thousand in the end: what one more event costs must not depend on them."""
    sizes = []
    for first in (0, SNAPSHOTS):
        await _deliver_invoices(service, range(first, first + SNAPSHOTS))
        async with service.service.database.snapshot() as tx:
            state = await store_state.load_state_of_users(tx, ["usr_long"])
        sizes.append((sum(map(len, state.facts.values())), len(state.parents), len(state.sources)))
    assert sizes == [(1 + FACTS_PER_SUBJECT_MAX, 0, 1)] * 2
    assert await service.count("links") == 2 * 2 * SNAPSHOTS


async def test_a_dispute_of_the_oldest_payment_counts_however_many_followed(service: Harness) -> None:
    await _deliver_invoices(service, range(SNAPSHOTS))
    assert (await service.entitlements("usr_long"))["plan_code"] == "premium"
    dispute = objects.dispute("dp_1", intent_id="pi_0", status="lost")
    happened = objects.event("evt_lost", "charge.dispute.closed", dispute, created=NOW + SNAPSHOTS)
    assert (await service.deliver(happened)).json()["status"] == "success"
    assert (await service.entitlements("usr_long"))["status"] == "dispute_lost"
    await _deliver_invoices(service, [SNAPSHOTS + 1])
    assert (await service.entitlements("usr_long"))["status"] == "active"


async def test_years_of_payments_that_wait_for_their_user_are_all_given_to_the_one_that_is_found(
    service: Harness,
) -> None:
    await _deliver_invoices(service, range(SNAPSHOTS), subscribes=False)
    parked = await service.rows("SELECT event_id FROM webhook_events WHERE status = 'parked'")
    assert len(parked) == SNAPSHOTS
    names = {row["name"] for row in await service.rows("SELECT name FROM waiting_names")}
    assert {"sub:sub_long", "in:in_0", f"in:in_{SNAPSHOTS - 1}"} <= names
    assert (await service.deliver(_subscription())).json()["status"] == "success"
    assert await service.count("waiting_names") == 0
    users = await service.rows(
        "SELECT DISTINCT status, user_id FROM webhook_events WHERE event_type = 'invoice.paid'"
    )
    assert [tuple(row.values()) for row in users] == [("success", "usr_long")]
    lines = await service.rows("SELECT DISTINCT user_id, plan_code FROM payment_events")
    assert [tuple(row.values()) for row in lines] == [("usr_long", "premium")]
    report = await rebuild_of(service).check()
    assert report.differences == []


async def test_what_waits_is_found_by_a_link_that_comes_after_it(service: Harness) -> None:
    """A charge of nobody, whose payment turns out to have paid a subscription's invoice."""
    charge = objects.charge("ch_1", payment_intent="pi_0")
    happened = objects.event("evt_charge", "charge.succeeded", charge, created=NOW)
    assert (await service.deliver(happened)).status_code == 200
    assert (await service.deliver(_subscription())).json()["status"] == "success"
    await _deliver_invoices(service, [0], subscribes=False)
    (line,) = await service.rows("SELECT user_id FROM payment_events WHERE stripe_event_id = 'evt_charge'")
    assert line["user_id"] == "usr_long"
    assert await service.count("waiting_names") == 0


def _subscription() -> dict[str, Any]:
    content = objects.subscription(
        "sub_long",
        customer=None,
        prices=[objects.price("premium")],
        metadata={"user_id": "usr_long"},
        period_start=NOW,
        period_end=NOW + MONTH_SECONDS,
    )
    return objects.event("evt_sub", "customer.subscription.created", content, created=NOW)


async def _deliver_invoices(service: Harness, numbers: Iterable[int], *, subscribes: bool = True) -> None:
    """Paid invoices of one subscription, each with the payment that paid it."""
    deliveries = [_subscription()] if subscribes else []
    for number in numbers:
        paid = objects.invoice(
            f"in_{number}",
            customer=None,
            subscription_id="sub_long",
            line_price=objects.price("premium"),
            period_end=NOW + MONTH_SECONDS,
        )
        payment = objects.invoice_payment(
            f"inpay_{number}", invoice_id=f"in_{number}", intent_id=f"pi_{number}"
        )
        deliveries += [
            objects.event(f"evt_in_{number}", "invoice.paid", paid, created=NOW + number),
            objects.event(f"evt_inpay_{number}", "invoice_payment.paid", payment, created=NOW + number),
        ]
    answers = await asyncio.gather(*(service.deliver(delivery) for delivery in deliveries))
    assert {answer.status_code for answer in answers} == {200}


async def _deliver_long_history(service: Harness) -> None:
    session = objects.checkout_session(
        "cs_long",
        mode="subscription",
        customer="cus_long",
        subscription="sub_long",
        client_reference_id="usr_long",
    )
    checkout = objects.event("evt_checkout", "checkout.session.completed", session, created=EPOCH)
    assert (await service.deliver(checkout)).status_code == 200
    snapshots = [
        events.subscription(
            f"long_{number}",
            subscription_id="sub_long",
            customer="cus_long",
            user_id=None,
            kind="updated",
            created=EPOCH + number,
        )
        for number in range(SNAPSHOTS)
    ]
    answers = await asyncio.gather(*(service.deliver(snapshot) for snapshot in snapshots))
    assert {answer.json()["status"] for answer in answers} == {"success"}


def _snapshots(facts: tuple[Fact, ...]) -> list[str]:
    return [fact.event_id for fact in facts if fact.kind == "subscription"]
