"""A server killed at any moment loses nothing that it acknowledged, and nothing happens twice."""

from __future__ import annotations

import asyncio
import json
import random
import secrets
from collections import Counter
from pathlib import Path

import pytest

from backend.tests.faults import events
from backend.tests.faults.ledger import assert_processed_once, open_ledger
from backend.tests.faults.processes import kill_server, respawning_server
from backend.tests.faults.report import report
from backend.tests.support.load import Connection, Progress, Reply, send_all

EVENTS_PER_CYCLE = 30
CONNECTIONS = 8
REDELIVERIES_MAX = 5


async def redeliver_until_answered(port: int, sent: list[bytes]) -> list[Reply]:
    """The 200s to another delivery of each event; a server that is only just back may be asked again."""
    for _ in range(REDELIVERIES_MAX):
        found = await send_all([port], sent, connections=CONNECTIONS)
        answered = [reply for reply in found if reply is not None and reply.status == 200]
        if len(answered) == len(sent):
            return answered
        await asyncio.sleep(0.5)
    raise AssertionError(Counter(reply.status if reply else None for reply in found))


async def kill_and_redeliver(url: str, directory: Path, *, cycles: int) -> None:
    seed = secrets.randbits(32)
    chance = random.Random(seed)
    sent: list[bytes] = []
    acknowledged: dict[int, bytes] = {}
    lost = 0
    with respawning_server(directory, url) as service:
        for cycle in range(cycles):
            batch = [
                events.purchase(f"k{cycle:04d}x{number:03d}", user_id=f"user_{number % 10}")
                for number in range(EVENTS_PER_CYCLE)
            ]
            progress = Progress()
            load = asyncio.create_task(
                send_all([service.port], batch, connections=CONNECTIONS, progress=progress)
            )
            # Any moment between the first delivery and the last but a few, and anywhere within a transaction.
            answers_before_kill = chance.randrange(EVENTS_PER_CYCLE - 2 * CONNECTIONS)
            await progress.reaches(answers_before_kill)
            await asyncio.sleep(chance.uniform(0, 0.01))
            await asyncio.to_thread(kill_server, service)
            replies = await load
            for number, reply in enumerate(replies):
                if reply is None:
                    lost += 1
                else:
                    assert reply.status == 200, reply
                    acknowledged[len(sent) + number] = reply.body
            sent += batch
            await answers_again(service.port)
        report(f"seed {seed}: {cycles} kills, {len(acknowledged)} acknowledged, {lost} without an answer")
        async with open_ledger(url) as ledger:
            stored = {row["event_id"] for row in await ledger.rows("SELECT event_id FROM webhook_events")}
        assert {json.loads(sent[index])["id"] for index in acknowledged} <= stored
        again = await redeliver_until_answered(service.port, sent)
    for index, body in acknowledged.items():
        assert again[index].body == body
        assert again[index].headers["idempotent-replayed"] == "true"
    async with open_ledger(url) as ledger:
        await assert_processed_once(ledger, {json.loads(event)["id"] for event in sent})
    assert acknowledged
    assert lost > 0, "no kill met a delivery"


async def answers_again(port: int) -> None:
    """Waits until the next server of a respawner listens."""
    async with asyncio.timeout(15):
        while True:
            connection = Connection(port)
            try:
                await connection.request("GET", "/livez")
            except (OSError, EOFError):
                await asyncio.sleep(0.01)
            else:
                return
            finally:
                connection.close()


async def test_a_server_killed_twenty_times_under_load_loses_and_doubles_nothing(
    migrated_url: str, tmp_path: Path
) -> None:
    await kill_and_redeliver(migrated_url, tmp_path, cycles=20)


@pytest.mark.long
@pytest.mark.timeout(1_800)
async def test_a_server_killed_five_hundred_times_under_load_loses_and_doubles_nothing(
    migrated_url: str, tmp_path: Path
) -> None:
    await kill_and_redeliver(migrated_url, tmp_path, cycles=500)
