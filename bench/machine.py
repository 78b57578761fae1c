"""The facts of the machine and the servers that a figure needs to mean anything."""

from __future__ import annotations

import os
import platform
import sqlite3
import statistics
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from bench.contenders import Servers
from bench.pgbench import find_pgbench

# As many as give a steady median; together a second on a slow disk.
FSYNC_PROBES = 100
# PostgreSQL's page.
FSYNC_BYTES = 8_192
GIB = 1 << 30


def machine_facts(servers: Servers) -> dict[str, str]:
    """Name and value, in the order in which they are shown."""
    show = servers.postgres.execute
    settings = ", ".join(
        f"{name} {show(f'SHOW {name}')[0][0]}"
        for name in ("fsync", "synchronous_commit", "wal_sync_method", "full_page_writes", "shared_buffers")
    )
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return {
        "When": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "Tollkeeper": metadata.version("tollkeeper"),
        "Processor": f"{os.cpu_count()} cores, {_processor()}",
        "Memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / GIB:.0f} GiB",
        "System": f"{platform.system()} {platform.release()}",
        "Load before the run (1, 5, 15 minutes)": load,
        "One fsync of 8 KiB on this disk": f"{_fsync_seconds(servers.directory) * 1000:.2f} ms (median)",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "PostgreSQL": f"{show('SHOW server_version')[0][0]}: {settings}",
        "SQLite": f"{sqlite3.sqlite_version}: journal_mode WAL, synchronous FULL",
        "pgbench": "beside the server" if find_pgbench() else "none",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def _fsync_seconds(directory: Path) -> float:
    taken: list[float] = []
    descriptor = os.open(directory / "fsync-probe", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        for _ in range(FSYNC_PROBES):
            os.write(descriptor, bytes(FSYNC_BYTES))
            started = time.perf_counter()
            os.fsync(descriptor)
            taken.append(time.perf_counter() - started)
    finally:
        os.close(descriptor)
    return statistics.median(taken)
