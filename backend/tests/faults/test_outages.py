"""A database that is away, slow or full is told to the sender with a 503, and comes back without help."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg  # type: ignore[import-untyped]  # the driver ships no types
import pytest
import sqlalchemy as sa
from sqlalchemy.engine import make_url

from backend.app.billing import webhooks
from backend.app.core.database import Database
from backend.app.core.errors import PROBLEM_CONTENT_TYPE
from backend.app.core.migrations import migrate
from backend.tests.faults import events
from backend.tests.faults.ledger import assert_processed_once, count, open_ledger
from backend.tests.faults.processes import servers
from backend.tests.faults.report import report
from backend.tests.support.billing import running_service
from backend.tests.support.load import Progress, Reply, send_all
from backend.tests.support.server_directory import work_directory
from backend.tests.support.servers import PostgresServer

CONNECTIONS = 8
EVENTS = 400
# How soon after the database the service must be back.
RECOVERY_SECONDS_MAX = 5


def assert_says_come_again(reply: Reply) -> None:
    assert reply.status == 503
    assert reply.headers["content-type"] == PROBLEM_CONTENT_TYPE
    assert int(reply.headers["retry-after"]) > 0
    assert json.loads(reply.body)["type"] in {"/problems/store-unavailable", "/problems/unavailable"}


async def answered_again(port: int, event: bytes) -> float:
    """Seconds until a delivery gets its 200."""
    started = time.monotonic()
    while True:
        (reply,) = await send_all([port], [event], connections=1)
        if reply is not None and reply.status == 200:
            return time.monotonic() - started
        assert time.monotonic() - started < RECOVERY_SECONDS_MAX, reply


@pytest.mark.parametrize("fault", ["crash", "backend killed"])
async def test_postgresql_crashing_under_load_loses_and_doubles_nothing_acknowledged(
    tmp_path: Path, fault: str
) -> None:
    with work_directory() as directory:
        postgres = PostgresServer.start(directory / "postgres")
        try:
            url = postgres.create_database("crashing")
            database = Database.open(url)
            await migrate(database)
            await database.close()
            with servers(tmp_path, url, processes=1) as (service,):
                await crash_under_load(postgres, url, service.port, fault)
        finally:
            postgres.stop()


async def crash_under_load(postgres: PostgresServer, url: str, port: int, fault: str) -> None:
    sent = [events.purchase(f"crash{number:04d}", user_id=f"user_{number % 10}") for number in range(EVENTS)]
    acknowledged: dict[int, bytes] = {}
    outcomes: Counter[int | None] = Counter()
    waits: list[float] = []
    rounds = 4
    for turn in range(rounds):
        progress = Progress()
        batch = range(turn * EVENTS // rounds, (turn + 1) * EVENTS // rounds)
        load = asyncio.create_task(
            send_all([port], [sent[index] for index in batch], connections=CONNECTIONS, progress=progress)
        )
        await progress.reaches(20 + 10 * turn)
        if fault == "crash":
            await asyncio.to_thread(postgres.crash)
            refused = (await send_all([port], [sent[0]], connections=1))[0]
            assert refused is not None
            assert_says_come_again(refused)
            await asyncio.to_thread(postgres.restart)
        else:
            await asyncio.to_thread(postgres.kill_backend, "crashing")
            await asyncio.to_thread(postgres.wait_ready)
        waits.append(await answered_again(port, sent[batch[-1]]))
        for index, reply in zip(batch, await load, strict=True):
            outcomes[reply.status if reply else None] += 1
            if reply is not None and reply.status == 200:
                acknowledged[index] = reply.body
            elif reply is not None:
                assert_says_come_again(reply)
    report(f"{rounds} x {fault}: {dict(outcomes)}; back after at most {max(waits):.2f} s")
    assert set(outcomes) == {200, 503}
    async with open_ledger(url) as ledger:
        stored = {row["event_id"] for row in await ledger.rows("SELECT event_id FROM webhook_events")}
    assert {json.loads(sent[index])["id"] for index in acknowledged} <= stored
    again = await send_all([port], sent, connections=CONNECTIONS)
    assert Counter(reply.status if reply else None for reply in again) == {200: EVENTS}
    for index, body in acknowledged.items():
        reply = again[index]
        assert reply is not None
        assert reply.body == body
    async with open_ledger(url) as ledger:
        await assert_processed_once(ledger, {json.loads(event)["id"] for event in sent})


@contextlib.asynccontextmanager
async def held(url: str) -> AsyncIterator[None]:
    """Somebody else holds what every delivery needs to write."""
    if url.startswith("sqlite"):
        file = make_url(url).database
        assert file is not None
        with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield
            connection.rollback()
        return
    session = await asyncpg.connect(url)
    try:
        async with session.transaction():
            await session.execute("LOCK TABLE webhook_claims IN ACCESS EXCLUSIVE MODE")
            yield
    finally:
        await session.close()


async def test_a_database_slower_than_the_deadline_gets_a_503_in_time_and_no_double_effect_later(
    migrated_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadline_seconds = 0.5
    monkeypatch.setattr(webhooks, "DEADLINE_SECONDS", deadline_seconds)
    sent = [events.purchase(f"slow{number:02d}", user_id="user_slow") for number in range(30)]
    async with running_service(migrated_url) as harness:
        # Connections as they are in a service that has been at work.
        assert (await harness.deliver(events.ignored("warm"))).status_code == 200
        async with held(migrated_url):
            started = time.monotonic()
            late = await asyncio.gather(*map(harness.deliver, sent))
            seconds = time.monotonic() - started
        report(f"{len(late)} deliveries to a held database: answered after {seconds:.2f} s")
        assert {response.status_code for response in late} == {503}
        assert {response.headers["content-type"] for response in late} == {PROBLEM_CONTENT_TYPE}
        assert all(int(response.headers["retry-after"]) > 0 for response in late)
        assert deadline_seconds <= seconds < 4 * deadline_seconds
        monkeypatch.undo()
        await harness.service.webhooks.drain()
        for event in sent:
            assert (await harness.deliver(event)).status_code == 200
    async with open_ledger(migrated_url) as ledger:
        assert await count(ledger, "webhook_events", "event_id LIKE 'evt_slow%'") == len(sent)
        assert await count(ledger, "payment_events") == len(sent)
        assert await count(ledger, "entitlement_history") == 1


async def test_a_full_disk_gets_a_503_and_room_is_used_again_by_itself(migrated_sqlite_url: str) -> None:
    pages_max: list[int] = []
    async with running_service(migrated_sqlite_url) as harness:
        await harness.service.relay.stop()

        @sa.event.listens_for(harness.service.database.engine.sync_engine, "begin")
        def on_begin(connection: sa.Connection) -> None:
            # A disk of this size; SQLite reports it full in the very same way (SQLITE_FULL).
            if pages_max:
                connection.exec_driver_sql(f"PRAGMA max_page_count = {pages_max[0]}")

        pages_max.append((await harness.rows("PRAGMA page_count"))[0]["page_count"] + 5)
        acknowledged: list[str] = []
        refused = None
        for number in range(200):
            response = await harness.deliver(events.purchase(f"full{number:03d}", user_id=f"user_{number}"))
            if response.status_code == 200:
                acknowledged.append(response.json()["event_id"])
                continue
            refused = response
            break
        assert refused is not None, "the disk never became full"
        report(f"disk full after {len(acknowledged)} events")
        assert (refused.status_code, refused.headers["content-type"]) == (503, PROBLEM_CONTENT_TYPE)
        assert int(refused.headers["retry-after"]) > 0
        last = f"full{len(acknowledged):03d}"
        assert (await harness.deliver(events.purchase(last, user_id="user_last"))).status_code == 503
        pages_max[0] += 1_000
        assert (await harness.deliver(events.purchase(last, user_id="user_last"))).status_code == 200
        assert (await harness.rows("PRAGMA integrity_check"))[0]["integrity_check"] == "ok"
    async with open_ledger(migrated_sqlite_url) as ledger:
        await assert_processed_once(ledger, {*acknowledged, f"evt_{last}"})
