"""Of a subscription with years of events the newest are looked at, and nothing that only one event said gets lost."""

from __future__ import annotations

import asyncio

from backend.app.billing import store_state
from backend.app.billing.domain.facts import CheckoutFact, Fact, SubjectId
from backend.app.billing.store_state_sql import FACTS_PER_SUBJECT_MAX
from backend.app.core.clock import from_unix
from backend.app.simulator import objects
from backend.tests.faults import events
from backend.tests.faults.events import EPOCH
from backend.tests.support.billing import Harness

SUBJECT = SubjectId("", False, "sub:sub_long")
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
