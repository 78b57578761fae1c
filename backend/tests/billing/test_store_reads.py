"""One statement reads everything about any number of users, by indexes, and never mixes their rows."""

from __future__ import annotations

import json
import re

import pytest

from backend.app.billing import store_reads, store_state
from backend.app.billing.models import links, sources, user_entitlements
from backend.app.core.clock import from_unix
from backend.app.core.database import Database, Tx
from backend.app.main import SHIPPED_CATALOG
from backend.app.simulator import objects
from backend.app.simulator.objects import MONTH_SECONDS
from backend.app.simulator.truth import read_terms
from backend.app.simulator.world import START, Plan, live
from backend.tests.support.billing import Harness, deliver_all, statements

USERS = 10


async def live_lives(harness: Harness) -> list[str]:
    """Some simulated users' whole lives, delivered; their ids, and one that nobody has heard of."""
    plan = Plan(seed=12, start=START, days=90, terms=read_terms(SHIPPED_CATALOG.read_text("utf-8")))
    histories = [live(plan, number) for number in range(USERS)]
    await deliver_all(harness, histories)
    return [*(history.user_id for history in histories), "usr_nobody"]


async def subscribe(harness: Harness, number: int, *, customer: str, user_id: str) -> None:
    now = int(harness.clock.now().timestamp())
    subscription = objects.subscription(
        f"sub_{number}",
        customer=customer,
        prices=[objects.price("premium_monthly" if number % 2 else "vip_monthly")],
        period_start=now,
        period_end=now + MONTH_SECONDS,
        metadata={"user_id": user_id},
    )
    event = objects.event(f"evt_{number}", "customer.subscription.created", subscription, created=now)
    assert (await harness.deliver(event)).json()["status"] == "success"


async def test_many_users_read_at_once_are_what_each_is_alone(service: Harness) -> None:
    users = await live_lives(service)
    async with service.service.database.snapshot() as tx:
        with statements(service) as seen:
            together = [rows for rows, _ in await store_reads.load_users(tx, users)]
        # The relay has statements of its own.
        assert len([statement for statement in seen if "facts" in statement]) == 1
        assert [rows.user_id for rows in together] == users
        assert len({rows.sha256() for rows in together}) == len(users)
        for rows in together:
            [(alone, _)] = await store_reads.load_users(tx, [rows.user_id])
            assert alone == rows
            # As the decision, which knows nothing of this statement, loads them.
            expected = await store_state.load_state_of_users(tx, [rows.user_id])
            state = rows.state()
            assert (dict(state.sources), dict(state.parents)) == (
                dict(expected.sources),
                dict(expected.parents),
            )
            assert {subject: set(map(repr, found)) for subject, found in state.facts.items()} == {
                subject: set(map(repr, found)) for subject, found in expected.facts.items()
            }


async def test_an_instant_in_the_past_shows_what_had_occurred_by_then(service: Harness) -> None:
    users = await live_lives(service)
    until = from_unix(START + 30 * 24 * 3600)
    async with service.service.database.snapshot() as tx:
        for rows, _ in await store_reads.load_users(tx, users, until=until):
            expected = await store_state.load_state_of_users(tx, [rows.user_id], until=until)
            facts = rows.state().facts
            assert {subject: len(found) for subject, found in facts.items()} == {
                subject: len(found) for subject, found in expected.facts.items()
            }
            assert all(fact.as_of <= until for found in facts.values() for fact in found)


async def test_two_users_of_one_customer_see_their_own_subscription_only(service: Harness) -> None:
    await subscribe(service, 1, customer="cus_family", user_id="usr_one")
    await subscribe(service, 2, customer="cus_family", user_id="usr_two")
    async with service.service.database.snapshot() as tx:
        one, two = [rows for rows, _ in await store_reads.load_users(tx, ["usr_one", "usr_two"])]
    assert [source.key for source in one.state().sources] == ["sub:sub_1"]
    assert [source.key for source in two.state().sources] == ["sub:sub_2"]
    assert "usr_two" not in one.sources + one.subjects
    assert "usr_one" not in two.sources + two.subjects


@pytest.mark.parametrize("user_id", ["a'b\"c", "[1]", "{}", "ü😀", "\t\n", "%", "x" * 255])
async def test_any_text_can_be_asked_about(service: Harness, user_id: str) -> None:
    await subscribe(service, 3, customer="cus_odd", user_id="usr_plain")
    async with service.service.database.snapshot() as tx:
        found = [rows for rows, _ in await store_reads.load_users(tx, ["usr_plain", user_id])]
    assert [rows.user_id for rows in found] == ["usr_plain", user_id]
    assert [len(rows.state().sources) for rows in found] == [1, 0]


async def test_every_row_is_found_by_an_index_also_while_tables_are_small(service: Harness) -> None:
    await live_lives(service)
    async with service.service.database.snapshot() as tx:
        plan = await _plan(tx, service.service.database)
    for table in (sources.name, links.name, "facts", user_entitlements.name):
        assert not re.search(rf"(?m)^\W*(->\s*)?(Seq Scan on|SCAN) {table}\b", plan), plan
        assert re.search(rf"\b{table}\b", plan), plan


async def _plan(tx: Tx, database: Database) -> str:
    """How the database means to run the statement."""
    statement = store_reads.statement(tx.dialect.name, is_bounded=False)
    explain = "EXPLAIN QUERY PLAN" if database.is_sqlite else "EXPLAIN"
    found = await tx.exec_driver_sql(f"{explain} {statement}", (json.dumps(["usr_1", "usr_2"]),))
    return "\n".join(str(row[-1]) for row in found)
