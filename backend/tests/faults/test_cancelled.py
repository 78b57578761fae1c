"""Clients that go away at any moment during load, and requests that are cancelled: nothing is lost, held or leaked."""

from __future__ import annotations

import asyncio
import json
import random
import secrets
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import asyncpg  # type: ignore[import-untyped]  # the driver ships no types
import pytest
import sqlalchemy as sa
from structlog.testing import capture_logs

from backend.app import main
from backend.app.billing import security
from backend.app.billing.routes import WEBHOOK_PATH
from backend.app.billing.security import sign
from backend.app.billing.webhooks import Delivery
from backend.app.core.database import POOL_CONNECTIONS_MAX
from backend.tests.faults import events
from backend.tests.faults.ledger import Ledger, assert_processed_once, count, open_ledger
from backend.tests.faults.processes import servers
from backend.tests.faults.report import report
from backend.tests.support.billing import WEBHOOK_SECRET, Harness, running_service
from backend.tests.support.load import send_all
from backend.tests.support.server_process import LOOPBACK

REQUESTS_SHORT = 300
REQUESTS_LONG = 10_000
# A user with hundreds of purchases would be another test: each decision looks at all of them.
EVENTS_PER_USER = 15
# So many go away at the same time, beside as many connections that stay.
AT_ONCE = 20
# A delivery takes a few milliseconds: some clients leave before it began, some within it, some after it.
STAY_SECONDS_MAX = 0.03
# The server hears of a closed connection within milliseconds; two busy cores may take longer.
SETTLE_SECONDS_MAX = 10
# An SQLite connection has its database, the log and the shared memory open, a PostgreSQL connection a socket.
FILES_PER_CONNECTION_MAX = 3


async def drop(port: int, event: bytes, chance: random.Random) -> str:
    """Sends a part of a delivery or all of it, and hangs up without an answer; tells at which point."""
    signature = sign(event, WEBHOOK_SECRET.encode(), timestamp=int(time.time()))
    head = (
        f"POST {WEBHOOK_PATH} HTTP/1.1\r\nHost: {LOOPBACK}\r\nContent-Length: {len(event)}\r\n"
        f"Stripe-Signature: {signature}\r\n\r\n"
    ).encode()
    point = chance.choice(("in the head", "in the body", "after the body", "later"))
    sent = {
        "in the head": lambda: chance.randrange(len(head)),
        "in the body": lambda: len(head) + chance.randrange(len(event)),
    }.get(point, lambda: len(head) + len(event))()
    _reader, writer = await asyncio.open_connection(LOOPBACK, port)
    writer.write((head + event)[:sent])
    await writer.drain()
    if point == "later" or chance.random() < 0.5:
        await asyncio.sleep(chance.uniform(0, STAY_SECONDS_MAX))
    # Half of them end the connection in order, the others break it.
    if chance.random() < 0.5:
        writer.close()
    else:
        writer.transport.abort()
    return point


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


async def settles_at(pid: int, files_max: int) -> int:
    """Waits until the process has no more files open than that; how many it has then."""
    deadline = time.monotonic() + SETTLE_SECONDS_MAX
    while (found := open_files(pid)) > files_max and time.monotonic() < deadline:  # noqa: ASYNC110  # it is another process
        await asyncio.sleep(0.05)
    return found


async def assert_connections_are_idle(ledger: Ledger) -> None:
    """The service has at most its pool, and nothing is under way on it."""
    ours = "application_name = 'tollkeeper' AND datname = current_database()"
    async with asyncio.timeout(SETTLE_SECONDS_MAX):
        while await count(ledger, "pg_stat_activity", f"{ours} AND state <> 'idle'"):  # noqa: ASYNC110  # see above
            await asyncio.sleep(0.05)
    assert 0 < await count(ledger, "pg_stat_activity", ours) <= POOL_CONNECTIONS_MAX


async def assert_claims_and_events_agree(ledger: Ledger) -> None:
    """Nothing is claimed that was not processed, and nothing processed that is not claimed."""
    claims = await ledger.rows("SELECT event_id FROM webhook_claims ORDER BY event_id")
    processed = await ledger.rows(
        "SELECT event_id FROM webhook_events WHERE status <> 'failed' ORDER BY event_id"
    )
    assert claims == processed


async def clients_that_go_away(url: str, redis_url: str, directory: Path, *, requests: int) -> None:
    seed = secrets.randbits(32)
    chance = random.Random(seed)
    users = requests // EVENTS_PER_USER
    dropped = [events.purchase(f"gone{n:05d}", user_id=f"user_{n % users}") for n in range(requests)]
    stayed = [events.purchase(f"kept{n:05d}", user_id=f"user_{n % users}") for n in range(requests)]
    points: Counter[str] = Counter()
    with servers(directory, url, redis_url=redis_url) as (service,):
        # Pools and caches as they are in a service that has been at work.
        warm = [events.purchase(f"warm{n:05d}", user_id=f"user_{n}") for n in range(AT_ONCE)]
        await send_all([service.port], warm, connections=AT_ONCE)
        files_before = open_files(service.pid)
        load = asyncio.create_task(send_all([service.port], stayed, connections=AT_ONCE))
        for start in range(0, requests, AT_ONCE):
            batch = dropped[start : start + AT_ONCE]
            points.update(await asyncio.gather(*(drop(service.port, event, chance) for event in batch)))
        replies = await load
        assert {reply.status if reply else None for reply in replies} == {200}
        files_max = files_before + POOL_CONNECTIONS_MAX * FILES_PER_CONNECTION_MAX
        files_after = await settles_at(service.pid, files_max)
        async with open_ledger(url) as ledger:
            if url.startswith("postgresql"):
                await assert_connections_are_idle(ledger)
            await assert_claims_and_events_agree(ledger)
            done = await count(ledger, "webhook_claims", "event_id LIKE 'evt_gone%'")
        again = await send_all([service.port], dropped, connections=AT_ONCE)
        repeats = sum(reply is not None and "idempotent-replayed" in reply.headers for reply in again)
        report(
            f"seed {seed}: {requests} clients went away {dict(points)}, {done} of their deliveries were done; "
            f"{files_before} files before, {files_after} after"
        )
    assert {reply.status if reply else None for reply in again} == {200}
    # What was being done when they were counted is a repeat as well.
    assert 0 < done <= repeats < requests
    assert files_after <= files_max < requests
    async with open_ledger(url) as ledger:
        await assert_processed_once(ledger, ids_of([*warm, *dropped, *stayed]))


def ids_of(sent: Iterable[bytes]) -> set[str]:
    return {json.loads(event)["id"] for event in sent}


async def test_clients_that_go_away_during_load_leave_nothing_behind(
    migrated_url: str, redis_url: str, tmp_path: Path
) -> None:
    await clients_that_go_away(migrated_url, redis_url, tmp_path, requests=REQUESTS_SHORT)


@pytest.mark.long
@pytest.mark.timeout(3_600)
async def test_ten_thousand_clients_that_go_away_during_load_leave_nothing_behind(
    migrated_url: str, redis_url: str, tmp_path: Path
) -> None:
    await clients_that_go_away(migrated_url, redis_url, tmp_path, requests=REQUESTS_LONG)


# The database ends every transaction that processes such an event.
REFUSE_POSTGRESQL = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'refused on purpose'; END $$;
CREATE TRIGGER refuse BEFORE INSERT ON webhook_events FOR EACH ROW
    WHEN (NEW.status <> 'failed' AND NEW.event_id LIKE 'evt_broken%') EXECUTE FUNCTION refuse()
"""
REFUSE_SQLITE = """
CREATE TRIGGER refuse BEFORE INSERT ON webhook_events
    WHEN NEW.status <> 'failed' AND NEW.event_id LIKE 'evt_broken%'
    BEGIN SELECT RAISE(ABORT, 'refused on purpose'); END
"""
LET_PASS = {"postgresql": "DROP TRIGGER refuse ON webhook_events", "sqlite": "DROP TRIGGER refuse"}


async def change_schema(harness: Harness, script: str) -> None:
    async with harness.service.database.transaction() as tx:
        for statement in script.split(";\n") if tx.dialect.name == "postgresql" else [script]:
            await tx.execute(sa.text(statement))


@pytest.fixture
def patient_with_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine alone must not make the service leave Redis aside, or no call to it would be cancelled."""
    for module in (main, security):
        monkeypatch.setattr(module, "REDIS_CALL_SECONDS_MAX", 5)


@pytest.fixture
def quiet() -> Iterator[None]:
    """A refusal's traceback on a terminal takes longer than the delivery."""
    with capture_logs():
        yield


async def requests_that_are_cancelled(url: str, redis_url: str, *, requests: int) -> None:
    seed = secrets.randbits(32)
    chance = random.Random(seed)
    users = requests // EVENTS_PER_USER
    sent = [
        # Of ten, one is refused by the database, so that a failure is being written down when it is cancelled.
        events.purchase(f"{'broken' if n % 10 == 0 else 'cut'}{n:05d}", user_id=f"user_{n % users}")
        for n in range(requests)
    ]
    outcomes: Counter[str] = Counter()
    async with running_service(url, redis_url=redis_url) as harness:
        redis_errors = await harness.metric("redis_errors_total")
        kind = "sqlite" if harness.service.database.is_sqlite else "postgresql"
        await change_schema(harness, REFUSE_SQLITE if kind == "sqlite" else REFUSE_POSTGRESQL)

        async def receive(event: bytes) -> bool:
            now = harness.clock.now()
            signature = sign(event, WEBHOOK_SECRET.encode(), timestamp=int(now.timestamp()))
            answer = await harness.service.webhooks.receive(
                Delivery(
                    body=event,
                    headers=((b"stripe-signature", signature.encode()),),
                    received_at=now,
                    request_id="",
                )
            )
            assert json.loads(answer.body)["event_id"] == json.loads(event)["id"]
            return answer.replayed

        async def deliver(event: bytes) -> str:
            try:
                await receive(event)
            except (sqlite3.IntegrityError, asyncpg.PostgresError):
                assert b"evt_broken" in event
                return "refused"
            return "delivered"

        async def read(number: int) -> str:
            await harness.service.entitlements.view(f"user_{number % users}")
            return "read"

        for start in range(0, requests, AT_ONCE):
            tasks: list[asyncio.Task[str]] = []
            for number, event in enumerate(sent[start : start + AT_ONCE], start=start):
                tasks += [asyncio.create_task(deliver(event)), asyncio.create_task(read(number))]
            chance.shuffle(tasks)
            for task in tasks:
                await asyncio.sleep(chance.uniform(0, STAY_SECONDS_MAX / AT_ONCE))
                task.cancel()
            await asyncio.wait(tasks)
            outcomes.update("cancelled" if task.cancelled() else task.result() for task in tasks)
        await harness.service.webhooks.drain()
        async with open_ledger(url) as ledger:
            await assert_claims_and_events_agree(ledger)
            assert await count(ledger, "webhook_claims", "event_id LIKE 'evt_broken%'") == 0
            if kind == "postgresql":
                await assert_connections_are_idle(ledger)
            done = await count(ledger, "webhook_claims")
        pool = harness.service.database.engine.pool
        assert pool.checkedout() == 0  # type: ignore[attr-defined]  # a queue pool
        assert harness.service.redis is not None
        assert not harness.service.redis.connection_pool._in_use_connections
        await change_schema(harness, LET_PASS[kind])
        repeats = sum([await receive(event) for event in sent])
        assert repeats == done > 0
        assert await harness.metric("redis_errors_total") == redis_errors
    report(f"seed {seed}: {requests} deliveries and as many reads: {dict(outcomes)}; {done} were done")
    assert set(outcomes) >= {"cancelled", "delivered", "read"}
    async with open_ledger(url) as ledger:
        await assert_processed_once(ledger, ids_of(sent))


@pytest.mark.usefixtures("patient_with_redis", "quiet")
async def test_requests_that_are_cancelled_at_any_moment_lose_and_hold_nothing(
    migrated_url: str, redis_url: str
) -> None:
    await requests_that_are_cancelled(migrated_url, redis_url, requests=REQUESTS_SHORT)


@pytest.mark.long
@pytest.mark.timeout(3_600)
@pytest.mark.usefixtures("patient_with_redis", "quiet")
async def test_ten_thousand_requests_that_are_cancelled_at_any_moment_lose_and_hold_nothing(
    migrated_url: str, redis_url: str
) -> None:
    await requests_that_are_cancelled(migrated_url, redis_url, requests=REQUESTS_LONG)
