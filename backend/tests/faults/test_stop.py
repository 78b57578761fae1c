"""A server that is asked to stop finishes what it has begun, and one that is killed leaves no worker behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import asyncpg  # type: ignore[import-untyped]  # the driver ships no types
import pytest

from backend.tests.faults import events
from backend.tests.faults.ledger import assert_processed_once, open_ledger
from backend.tests.faults.processes import environment, servers
from backend.tests.faults.report import report
from backend.tests.support.load import Connection, Progress, Reply, send_all
from backend.tests.support.server_process import LOOPBACK
from backend.tests.support.service import ServiceProcess
from backend.tests.support.test_servers import children_of, wait_gone

IN_FLIGHT = 8
# Requests over loopback to a server that has nothing else to do.
ARRIVAL_SECONDS = 0.5
# How long no process may hold the port after its supervisor's death.
PORT_FREE_SECONDS_MAX = 3
# A worker that is still being started notices at the end of that; on a busy machine that takes a while.
START_SECONDS_MAX = 30


def is_refused(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((LOOPBACK, port)) != 0


async def wait_refused(port: int, seconds_max: float) -> float:
    started = time.monotonic()
    while not is_refused(port):
        assert time.monotonic() - started < seconds_max, "somebody still listens"
        await asyncio.sleep(0.02)
    return time.monotonic() - started


async def wait_for_waiters(session: asyncpg.Connection) -> None:
    """Returns once a transaction waits for the lock, and all that was sent has had time to queue up behind it."""
    async with asyncio.timeout(5):
        while True:
            # Sessions are seen anew only with a fresh snapshot of the activity.
            waiting = await session.fetchval(
                "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'webhook_claims'::regclass"
            )
            if waiting > 0:
                break
            await asyncio.sleep(0.02)
    await asyncio.sleep(ARRIVAL_SECONDS)


@contextlib.asynccontextmanager
async def held_claims(url: str) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Nobody can claim an event within the block; what it yields waits until all that was sent tries."""
    holder = await asyncpg.connect(url)
    try:
        async with holder.transaction():
            await holder.execute("LOCK TABLE webhook_claims IN ACCESS EXCLUSIVE MODE")
            yield lambda: wait_for_waiters(holder)
    finally:
        await holder.close()


@pytest.mark.parametrize("workers", [1, 2])
async def test_deliveries_in_flight_at_a_stop_are_finished_and_answered(
    migrated_postgres_url: str, tmp_path: Path, workers: int
) -> None:
    sent = [events.purchase(f"stop{number}", user_id=f"user_{number}") for number in range(IN_FLIGHT)]
    service = ServiceProcess.start(tmp_path, environment(migrated_postgres_url), workers=workers)
    try:
        async with held_claims(migrated_postgres_url) as all_wait:
            load = asyncio.create_task(send_all([service.port], sent, connections=IN_FLIGHT))
            await all_wait()
            stop = asyncio.create_task(asyncio.to_thread(service.stop))
            if workers == 1:
                await wait_refused(service.port, PORT_FREE_SECONDS_MAX)
            else:
                # A supervisor keeps the port until its workers have ended, though nobody accepts any more.
                await asyncio.sleep(0.5)
            assert not load.done()
            assert service.running
        replies = await load
        code = await stop
    finally:
        service.kill()
    report(f"{len(replies)} in flight at SIGTERM of {workers}; exit code {code}")
    assert [reply.status if reply else None for reply in replies] == [200] * IN_FLIGHT
    assert code == 0
    assert is_refused(service.port)
    async with open_ledger(migrated_postgres_url) as ledger:
        await assert_processed_once(ledger, {f"evt_stop{number}" for number in range(IN_FLIGHT)})


async def test_a_stop_under_load_answers_nothing_but_200_and_loses_nothing_acknowledged(
    migrated_url: str, tmp_path: Path
) -> None:
    sent = [events.purchase(f"stop{number:04d}", user_id=f"user_{number % 10}") for number in range(400)]
    progress = Progress()
    service = ServiceProcess.start(tmp_path, environment(migrated_url))
    try:
        load = asyncio.create_task(send_all([service.port], sent, connections=IN_FLIGHT, progress=progress))
        await progress.reaches(50)
        code = await asyncio.to_thread(service.stop)
        replies = await load
    finally:
        service.kill()
    assert is_refused(service.port)
    answered = {number: reply for number, reply in enumerate(replies) if isinstance(reply, Reply)}
    report(f"SIGTERM after {progress.answers} of 400: {len(answered)} answered; exit code {code}")
    assert {reply.status for reply in answered.values()} == {200}
    assert len(answered) < len(sent), "the stop came too late"
    assert code == 0
    with servers(tmp_path, migrated_url) as (again,):
        found = await send_all([again.port], sent, connections=IN_FLIGHT)
    for number, reply in answered.items():
        repeated = found[number]
        assert repeated is not None
        assert repeated.body == reply.body
        assert repeated.headers["idempotent-replayed"] == "true"
    async with open_ledger(migrated_url) as ledger:
        await assert_processed_once(ledger, {f"evt_stop{number:04d}" for number in range(400)})


async def wait_started(service: ServiceProcess, workers: int) -> None:
    """Returns once so many workers have started; one that answers may be the first of them."""
    async with asyncio.timeout(START_SECONDS_MAX):
        while service.log_text().count("Application startup complete") < workers:  # noqa: ASYNC110  # it is another process's log
            await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("started", "seconds_max"),
    [(2, PORT_FREE_SECONDS_MAX), (1, START_SECONDS_MAX)],
    ids=["at work", "starting"],
)
async def test_workers_end_when_their_supervisor_is_killed(
    migrated_sqlite_url: str, tmp_path: Path, started: int, seconds_max: int
) -> None:
    service = ServiceProcess.start(tmp_path, environment(migrated_sqlite_url), workers=2)
    try:
        await wait_started(service, started)
        family = children_of(service.pid)
        with contextlib.closing(Connection(service.port)) as connection:
            await connection.deliver(events.purchase("orphan", user_id="user_orphan"))
            os.kill(service.pid, signal.SIGKILL)
            seconds = await wait_refused(service.port, seconds_max)
        report(f"supervisor killed; {len(family)} children; port free after {seconds:.2f} s")
        assert len(family) >= 2
        wait_gone(family)
    finally:
        service.kill()
