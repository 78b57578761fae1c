"""A worker that has run for a long time is no larger than one that has just warmed up."""

from __future__ import annotations

import asyncio
from pathlib import Path
from statistics import median

import asyncpg  # type: ignore[import-untyped]  # the driver ships no types
import pytest

from backend.app.core.database import metadata
from backend.tests.faults.processes import environment
from backend.tests.faults.report import report
from backend.tests.http.test_server import MEBIBYTE, resident_bytes
from backend.tests.support.load import metric
from backend.tests.support.service import ServiceProcess
from bench.events import SECRET, make_workload, signed_requests
from bench.load import send_all

# With the warm-up two million: an hour of about 550 deliveries a second.
DELIVERIES_LONG = 1_500_000
DELIVERIES_SHORT = 6_000
# Every path and every connection has been used, each connection has prepared its statements anew, which the driver
# does after five minutes, and the allocator has found its size.
WARM_UP_LONG = 500_000
WARM_UP_SHORT = 3_000
# What a leak of 1,500 bytes per delivery comes to in the short run, and of four bytes in the long one.
GROWTH_MAX = 0.05
# Ready requests of so many new events are held at a time, a few megabytes.
EVENTS_PER_CHUNK = 400
CONNECTIONS = 32
# One delivery among so many has a forged signature.
FORGED_EVERY = 50
# One sample is the size at one moment between two collections of garbage.
SAMPLES = 3
CURVE_LINES_MAX = 40
# The rows of two million deliveries are no concern of the worker, and would fill the machine's memory.
EVENTS_KEPT_MAX = 50_000


def chunk_of(number: int) -> tuple[list[bytes], list[bytes], list[bytes]]:
    """Ready requests: new events of several types, about users of their own; repeats of them; and forged ones.

    Of the repeats every second one is the same bytes, the others are signed anew, as Stripe's retries are.
    """
    work = make_workload(EVENTS_PER_CHUNK, prefix=f"m{number}")
    new = signed_requests((*work.seeds, *work.events))
    repeats = [*new[::2], *signed_requests((*work.seeds, *work.events)[1::2])]
    return new, repeats, [request.replace(b",v1=", b",v1=0") for request in new[::FORGED_EVERY]]


async def empty_tables(url: str) -> None:
    session = await asyncpg.connect(url)
    try:
        # The audit log lets nobody empty it otherwise.
        await session.execute("SET session_replication_role = replica")
        await session.execute(f"TRUNCATE {', '.join(metadata.tables)}")
    finally:
        await session.close()


def growth_of_a_worker(url: str, redis_url: str, directory: Path, *, warm_up: int, deliveries: int) -> float:
    """By which part a worker is larger after so many deliveries than after its warm-up."""
    settings = {**environment(url, redis_url), "STRIPE_WEBHOOK_SECRET": SECRET}
    curve: list[tuple[int, float]] = []
    sent = number = kept = 0
    accepted = repeated = refused = 0
    with ServiceProcess.start(directory, settings) as service:
        while sent < warm_up + deliveries:
            new, repeats, forged = chunk_of(number)
            send_all(service.url, new, connections=CONNECTIONS)
            send_all(service.url, [*repeats, *forged], connections=CONNECTIONS, expected={200, 403})
            accepted += len(new)
            repeated += len(repeats)
            refused += len(forged)
            sent = accepted + repeated + refused
            number += 1
            kept += len(new)
            if kept >= EVENTS_KEPT_MAX or sent >= warm_up + deliveries:
                asyncio.run(empty_tables(url))
                kept = 0
            curve.append((sent, resident_bytes(service.pid) / MEBIBYTE))
        outcomes = {
            outcome: asyncio.run(metric([service.port], "billing_webhook_deliveries_total", outcome=outcome))
            for outcome in ("success", "duplicate", "refused")
        }
    for place, size in curve[:: 1 + len(curve) // CURVE_LINES_MAX]:
        report(f"{place:>9,} deliveries  {size:6.1f} MiB")
    assert outcomes == {"success": accepted, "duplicate": repeated, "refused": refused}
    warm = [size for place, size in curve if place >= warm_up]
    before, after = median(warm[:SAMPLES]), median(warm[-SAMPLES:])
    report(f"{before:.1f} MiB warm, {after:.1f} MiB after {sent:,} deliveries: {after / before - 1:+.1%}")
    return after / before - 1


def test_a_worker_stays_as_large_as_it_was_after_its_warm_up(
    migrated_postgres_url: str, redis_url: str, tmp_path: Path
) -> None:
    growth = growth_of_a_worker(
        migrated_postgres_url,
        redis_url,
        tmp_path,
        warm_up=WARM_UP_SHORT,
        deliveries=DELIVERIES_SHORT,
    )
    assert growth < GROWTH_MAX


@pytest.mark.long
@pytest.mark.timeout(7_200)
def test_a_worker_that_took_two_million_deliveries_is_as_large_as_it_was_after_its_warm_up(
    migrated_postgres_url: str, redis_url: str, tmp_path: Path
) -> None:
    growth = growth_of_a_worker(
        migrated_postgres_url, redis_url, tmp_path, warm_up=WARM_UP_LONG, deliveries=DELIVERIES_LONG
    )
    assert growth < GROWTH_MAX
