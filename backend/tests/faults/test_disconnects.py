"""Clients that hang up at any moment leave no connection, no lock and no half effect behind."""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from pathlib import Path

from backend.app.billing.routes import WEBHOOK_PATH
from backend.app.billing.security import sign
from backend.tests.faults import events
from backend.tests.faults.ledger import assert_processed_once, count, open_ledger
from backend.tests.faults.processes import servers
from backend.tests.faults.report import report
from backend.tests.support.billing import WEBHOOK_SECRET, running_service
from backend.tests.support.load import send_all
from backend.tests.support.server_process import LOOPBACK

DISCONNECTS = 200
AT_ONCE = 20
# A delivery takes a few milliseconds: some clients leave before it began, some within it, some after it.
STAY_SECONDS_MAX = 0.03


async def hang_up(port: int, event: bytes, stay_seconds: float) -> None:
    """Sends a whole delivery and goes away without reading the answer."""
    _reader, writer = await asyncio.open_connection(LOOPBACK, port)
    signature = sign(event, WEBHOOK_SECRET.encode(), timestamp=int(time.time()))
    head = (
        f"POST {WEBHOOK_PATH} HTTP/1.1\r\nHost: {LOOPBACK}\r\nContent-Length: {len(event)}\r\n"
        f"Stripe-Signature: {signature}\r\n\r\n"
    )
    writer.write(head.encode() + event)
    await writer.drain()
    await asyncio.sleep(stay_seconds)
    writer.transport.abort()


async def test_two_hundred_clients_that_hang_up_leave_nothing_behind(
    migrated_url: str, tmp_path: Path
) -> None:
    seed = secrets.randbits(32)
    chance = random.Random(seed)
    sent = [
        events.purchase(f"gone{number:03d}", user_id=f"user_{number % 5}") for number in range(DISCONNECTS)
    ]
    with servers(tmp_path, migrated_url) as (service,):
        for start in range(0, DISCONNECTS, AT_ONCE):
            async with asyncio.TaskGroup() as group:
                for event in sent[start : start + AT_ONCE]:
                    group.create_task(hang_up(service.port, event, chance.uniform(0, STAY_SECONDS_MAX)))
        replies = await send_all([service.port], sent, connections=10)
        assert [reply.status if reply else None for reply in replies] == [200] * DISCONNECTS
        done_before = sum(reply is not None and "idempotent-replayed" in reply.headers for reply in replies)
        report(f"seed {seed}: {DISCONNECTS} clients hung up; {done_before} of their deliveries had been done")
        async with open_ledger(migrated_url) as ledger:
            if migrated_url.startswith("postgresql"):
                open_transactions = await count(
                    ledger,
                    "pg_stat_activity",
                    "application_name = 'tollkeeper' AND datname = current_database()"
                    " AND state LIKE 'idle in transaction%'",
                )
                assert open_transactions == 0
            await assert_processed_once(ledger, {f"evt_gone{number:03d}" for number in range(DISCONNECTS)})
    assert done_before > 0


async def test_two_hundred_cancelled_requests_leak_no_connection(migrated_url: str) -> None:
    """The request's own task is cancelled, as a server does that gives up; what it began is finished."""
    seed = secrets.randbits(32)
    chance = random.Random(seed)
    sent = [
        events.purchase(f"cut{number:03d}", user_id=f"user_{number % 5}") for number in range(DISCONNECTS)
    ]
    cancelled = 0
    async with running_service(migrated_url) as harness:
        for start in range(0, DISCONNECTS, AT_ONCE):
            tasks = [asyncio.create_task(harness.deliver(event)) for event in sent[start : start + AT_ONCE]]
            for task in tasks:
                await asyncio.sleep(chance.uniform(0, STAY_SECONDS_MAX / AT_ONCE))
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            cancelled += sum(isinstance(result, asyncio.CancelledError) for result in results)
        await harness.service.webhooks.drain()
        for event in sent:
            assert (await harness.deliver(event)).status_code == 200
        assert harness.service.database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]  # a queue pool
    report(f"seed {seed}: {cancelled} of {DISCONNECTS} requests cancelled")
    async with open_ledger(migrated_url) as ledger:
        await assert_processed_once(ledger, {f"evt_cut{number:03d}" for number in range(DISCONNECTS)})
    assert cancelled > 0
