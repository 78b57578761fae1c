"""What a delivery or a question costs does not grow with all that was ever stored: every statement finds its rows."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from backend.app.billing import retention
from backend.app.billing.models import webhook_events
from backend.app.billing.retention import Retention
from backend.app.core.api_keys import Scope
from backend.app.core.database import Database
from backend.app.core.migrations import migrate
from backend.app.simulator import objects
from backend.tests.faults import events
from backend.tests.faults.events import EPOCH, PERIOD_END
from backend.tests.support.billing import Harness, SettableClock, running_service
from backend.tests.support.plans import GROWING_NAMES, Statement, problems, recorded
from backend.tests.support.servers import PostgresServer
from backend.tests.support.stored_history import LIFE, copy_life, keep_life, life, name_of

# Users, each with two events: enough that PostgreSQL prefers an index where it has one, stored within a second.
LIVES = 10_000
KINDS = ("sqlite", "postgres")


@pytest.fixture(scope="module", params=KINDS)
def history_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a database with a history.

    Not of the fixtures whose databases are searched for leaks: it would take half a minute to read ten
    thousand copies of one row.
    """
    if request.param == "sqlite":
        directory: Path = tmp_path_factory.mktemp("plans")
        url = f"sqlite:///{directory / 'history.db'}"
        asyncio.run(_store_history(url))
        yield url
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    name = "plans_history"
    url = server.create_database(name)
    asyncio.run(_store_history(url))
    yield url
    server.drop_database(name)


@pytest.fixture
async def old_service(history_url: str) -> AsyncIterator[Harness]:
    """A running service that has a history."""
    async with running_service(history_url) as harness:
        yield harness


@pytest.fixture
async def new_service(
    history_url: str, request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[Harness]:
    """A running service on the same kind of database, in which nothing was ever stored."""
    if history_url.startswith("sqlite"):
        url = f"sqlite:///{tmp_path / 'new.db'}"
    else:
        server: PostgresServer = request.getfixturevalue("postgres_server")
        url = server.create_database("plans_new")
    try:
        database = Database.open(url)
        await migrate(database)
        await database.close()
        async with running_service(url) as harness:
            yield harness
    finally:
        if not url.startswith("sqlite"):
            server.drop_database("plans_new")


async def test_every_statement_of_the_intake_finds_its_rows_by_an_index(
    old_service: Harness, new_service: Harness
) -> None:
    with recorded(old_service.service.database) as seen:
        await _deliver_all_kinds(old_service)
    touched = {name for name in GROWING_NAMES for sql in seen if name in sql}
    assert touched == GROWING_NAMES
    assert await _bad(old_service, seen) == {}
    # A prepared statement keeps the plan that it got on the first day.
    assert await _bad(new_service, seen) == {}


async def test_every_statement_of_the_reads_finds_its_rows_by_an_index(
    old_service: Harness, new_service: Harness
) -> None:
    key = await old_service.service.api_keys.create("test", Scope.READ)
    user_id = f"usr_{name_of(LIVES // 2)}"
    with recorded(old_service.service.database) as seen:
        for path in (
            f"/api/v1/entitlements/{user_id}",
            f"/api/v1/entitlements/{user_id}?explain=true",
            f"/api/v1/entitlements/{user_id}?at=2026-11-02T00:00:00Z",
            f"/api/v1/entitlements/{user_id}/copy_trading",
            f"/api/v1/entitlements/{user_id}/history",
            "/api/v1/entitlements/nobody",
            "/api/v1/payments",
            f"/api/v1/payments?user_id={user_id}",
            "/api/v1/events",
            f"/api/v1/events?user_id={user_id}",
            "/api/v1/events?status=parked",
            "/api/v1/events?status=failed",
            "/api/v1/audit",
            f"/api/v1/audit?user_id={user_id}",
            "/metrics",
        ):
            answer = await old_service.client.get(path, headers={"Authorization": f"Bearer {key}"})
            assert answer.status_code == 200, (path, answer.text)
        answer = await old_service.client.post(
            "/ofrep/v1/evaluate/flags",
            json={"context": {"targetingKey": user_id}},
            headers={"Authorization": f"Bearer {key}"},
        )
        assert answer.status_code == 200, answer.text
    assert len(seen) > 10
    assert await _bad(old_service, seen) == {}
    assert await _bad(new_service, seen) == {}


async def test_every_statement_of_retention_finds_its_rows_by_an_index(
    old_service: Harness, new_service: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages, bodies and what takes their place; only the oldest lives of the history lose theirs."""
    monkeypatch.setattr(retention, "PAGE_EVENTS", 4)
    async with old_service.service.database.snapshot() as tx:
        place = webhook_events.c.received_at
        oldest = (await tx.execute(sa.select(place).order_by(place).limit(1))).scalar_one()
    horizon = oldest + timedelta(seconds=5)
    clock = SettableClock(instant=horizon.replace(year=horizon.year + 4))
    made = Retention(old_service.service.database, clock, months=4 * 12)
    with recorded(old_service.service.database) as seen:
        preview = await made.preview()
        report = await made.run()
    assert report == preview
    assert 2 * 4 < report.bodies < LIVES
    assert any("FOR UPDATE" in sql for sql in seen) or old_service.service.database.is_sqlite
    assert await _bad(old_service, seen) == {}
    assert await _bad(new_service, seen) == {}


@pytest.mark.parametrize(
    ("sql", "parameters"),
    [
        ("SELECT reason FROM webhook_events WHERE answer = {0}", ("x",)),
        # Of an index only what all rows share.
        (
            "SELECT body FROM facts WHERE account = {0} AND livemode = {1} AND event_id = {2}",
            ("", False, "evt_1"),
        ),
        ("SELECT 1 FROM audit_logs waits WHERE waits.resource_type = {0}", ("payment",)),
        ("UPDATE payment_events SET plan_code = {0} WHERE invoice_id = {1}", ("premium", "in_1")),
        ("SELECT count(*) FROM sources", ()),
    ],
)
async def test_a_statement_that_would_walk_through_the_history_is_noticed(
    old_service: Harness, sql: str, parameters: tuple[Any, ...]
) -> None:
    database = old_service.service.database
    places = ["?" if database.is_sqlite else f"${place}" for place in range(1, len(parameters) + 1)]
    assert await _bad(old_service, {sql: Statement(sql.format(*places), parameters)}) != {}


async def _store_history(url: str) -> None:
    database = Database.open(url)
    await migrate(database)
    await database.close()
    async with running_service(url) as service:
        for event in life(LIFE, created=EPOCH):
            assert (await service.deliver(event)).json()["status"] == "success"
        async with service.service.database.transaction() as tx:
            await keep_life(tx, now=service.clock.now())
            await copy_life(tx, 0, LIVES)
            if tx.dialect.name == "postgresql":
                # As autovacuum does by itself; nothing does so on SQLite, which plans without.
                await tx.exec_driver_sql("ANALYZE")


async def _deliver_all_kinds(service: Harness) -> None:
    """New users and old ones, duplicates, what has to wait and what ends the waiting, and money that goes back."""
    scenarios = [
        scenario(f"{name}_{number}") for name, scenario in events.SCENARIOS.items() for number in range(2)
    ]
    before = [body for scenario in scenarios for body in scenario.before]
    others = [scenario.event for scenario in scenarios] + [
        events.wire(event) for number in (10, 20) for event in _of_stored_user(name_of(number))
    ]
    await _all_answered(service, before)
    await _all_answered(service, [*others, *others])
    for body in others:
        await _all_answered(service, [body])
    alone = [
        events.subscription("alone_1", subscription_id="sub_alone", customer="cus_alone", user_id=None),
        events.charge("alone_2", customer="cus_alone"),
        events.purchase("alone_3", user_id="user_alone", customer="cus_alone"),
        *map(events.wire, _money_back("alone_3")),
        events.wire(
            objects.event("evt_alone_4", "customer.deleted", objects.customer("cus_alone"), created=EPOCH + 9)
        ),
    ]
    for body in alone:
        await _all_answered(service, [body])
    # The relay delivers what was staged, or tries to.
    while await service.service.relay.run_once():
        pass


def _of_stored_user(name: str) -> list[dict[str, Any]]:
    upgrade = objects.subscription(
        f"sub_{name}",
        customer=f"cus_{name}",
        prices=[objects.price("vip")],
        period_start=EPOCH,
        period_end=PERIOD_END,
        metadata={"user_id": f"usr_{name}"},
    )
    return [
        objects.event(f"evt_{name}_up", "customer.subscription.updated", upgrade, created=EPOCH + 7_200),
        json.loads(events.invoice(f"{name}_next", subscription_id=f"sub_{name}", customer=f"cus_{name}")),
    ]


def _money_back(tag: str) -> list[dict[str, Any]]:
    refund = objects.refund(f"re_{tag}", intent_id=f"pi_{tag}", created=EPOCH + 5)
    dispute = objects.dispute(f"dp_{tag}", intent_id=f"pi_{tag}", created=EPOCH + 6)
    return [
        objects.event(f"evt_re_{tag}", "refund.created", refund, created=EPOCH + 5),
        objects.event(f"evt_dp_{tag}", "charge.dispute.created", dispute, created=EPOCH + 6),
    ]


async def _all_answered(service: Harness, bodies: list[bytes]) -> None:
    answers = await asyncio.gather(*(service.deliver(body) for body in bodies))
    assert {answer.status_code for answer in answers} <= {200}


async def _bad(service: Harness, statements: dict[str, Statement]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for sql, statement in statements.items():
        async with service.service.database.snapshot() as tx:
            walks = await problems(tx, statement)
        if walks:
            found[sql] = walks
    return found
