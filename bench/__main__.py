"""Runs the benchmark: `make bench`. Ratios of one run; absolute numbers belong to the machine they were taken on."""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import asyncpg  # type: ignore[import-untyped]  # the driver ships no types

from backend.app.core.database import Database
from backend.app.core.migrations import migrate
from backend.tests.support.server_directory import work_directory
from backend.tests.support.servers import PostgresServer
from backend.tests.support.service import SERVE, ServiceProcess
from bench.load import Result, send_all, signed_requests

SECRET = "whsec_bench_0123456789abcdefghijklmn"  # noqa: S105  # signs only what this run sends to itself
# Three rounds in turn, so that a slow minute of the machine meets both; the median is quoted.
ROUNDS = 3
EVENTS_PER_ROUND = 600
WARM_UP_EVENTS = 100
CONNECTIONS = (1, 16, 64)
TEXTBOOK = [sys.executable, "-m", "uvicorn", "bench.textbook:create_app", "--factory", "--no-access-log"]


def main() -> None:
    """Measures both services in turn on one PostgreSQL with fsync on, and prints the ratios."""
    with work_directory(on_disk=True) as directory:
        server = PostgresServer.start(directory / "postgres", fsync=True)
        try:
            asyncio.run(_measure(server, directory))
        finally:
            server.stop()


async def _measure(server: PostgresServer, directory: Path) -> None:
    textbook_url = server.create_database("textbook")
    tollkeeper_url = server.create_database("tollkeeper")
    database = Database.open(tollkeeper_url)
    await migrate(database)
    await database.close()
    services = {
        "textbook": _start(directory / "textbook", textbook_url, TEXTBOOK),
        "tollkeeper": _start(directory / "tollkeeper", tollkeeper_url, SERVE),
    }
    try:
        print(f"PostgreSQL with fsync, one worker each, {os.cpu_count()} cores, median of {ROUNDS} rounds")
        print(f"{'connections':>11}  {'textbook/s':>10}  {'tollkeeper/s':>12}  {'ratio':>5}  {'p99 ms':>6}")
        for connections in CONNECTIONS:
            await _compare(services, connections)
        await _check_rows(tollkeeper_url)
    finally:
        for service in services.values():
            service.stop()


def _start(directory: Path, database_url: str, command: Sequence[str]) -> ServiceProcess:
    directory.mkdir()
    env = {"DATABASE_URL": database_url, "STRIPE_WEBHOOK_SECRET": SECRET}
    return ServiceProcess.start(directory, env, command=command)


async def _compare(services: dict[str, ServiceProcess], connections: int) -> None:
    results: dict[str, list[Result]] = {name: [] for name in services}
    for round_number in range(ROUNDS + 1):
        events = EVENTS_PER_ROUND if round_number else WARM_UP_EVENTS
        for name, service in services.items():
            requests = signed_requests(events, secret=SECRET, prefix=f"{connections}x{round_number}")
            result = await send_all(service.url, requests, connections=connections)
            if result.accepted != events:
                raise SystemExit(f"{name} accepted {result.accepted} of {events} events")
            if round_number:
                results[name].append(result)
    textbook, tollkeeper = (
        statistics.median(result.per_second for result in results[name]) for name in services
    )
    p99_ms = statistics.median(result.p99_ms for result in results["tollkeeper"])
    print(
        f"{connections:>11}  {textbook:>10.0f}  {tollkeeper:>12.0f}  {tollkeeper / textbook:>5.2f}  {p99_ms:>6.1f}"
    )


async def _check_rows(database_url: str) -> None:
    """Every accepted event must really have its rows; a benchmark of lost payments would be worth nothing."""
    expected = len(CONNECTIONS) * (ROUNDS * EVENTS_PER_ROUND + WARM_UP_EVENTS)
    connection = await asyncpg.connect(database_url)
    for table in ("webhook_events", "payment_events", "user_entitlements"):
        found = await connection.fetchval(f"SELECT count(*) FROM {table}")  # noqa: S608  # a fixed list of names
        if found != expected:
            raise SystemExit(f"{table} has {found} rows, {expected} events were accepted")
    await connection.close()
    print(f"every one of {expected} accepted events has its rows")


if __name__ == "__main__":
    main()
