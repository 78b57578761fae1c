"""PostgreSQL itself: pgbench writes the rows of the bare prototype, an event per transaction or many, without HTTP."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from backend.tests.support.server_binaries import postgres_bin
from bench.contenders import Kind, Servers, prepared
from bench.events import TYPES, make_workload
from bench.load import BenchFailed
from bench.rows import ONE_EVENT

NOT_MEASURED = "not measured: no `pgbench` here"
HOW_TO_GET = (
    "`pgbench` comes with PostgreSQL's server or contrib package (Debian, Ubuntu, Homebrew: `postgresql`; Fedora:"
    " `postgresql-contrib`). Put it into PATH, or name its directory in PG_BIN, and run again."
)
# As many as the batches that 64 connections can make.
BATCH_EVENTS = 64
# pgbench's own start and end, beyond the seconds that it measures.
EXTRA_SECONDS_MAX = 60
# A thread for each of two cores; more clients than that share a thread.
THREADS_MAX = 2
# Half of the measured events are about users who have an entitlement already; so are half of these.
KNOWN_USERS = 20_000
# Ids are drawn, not counted, because pgbench's clients share nothing; two alike would be refused, and counted.
NUMBERS = 9_000_000_000_000_000

# The statements of `ONE_EVENT`, each for many events.
MANY_EVENTS = (
    (
        "INSERT INTO bare_events (event_id, event_type, payload)"
        " SELECT {event_id}, 'checkout.session.completed', convert_to(payload, 'UTF8')"
        " FROM unnest(ARRAY[{payloads}]::text[]) WITH ORDINALITY AS incoming (payload, place)"
    ),
    (
        "INSERT INTO bare_payments (event_id, user_id, event_type, amount)"
        " SELECT {event_id}, {user_id}, 'checkout.session.completed', 2999 FROM {series}"
    ),
    (
        "INSERT INTO bare_entitlements (user_id, plan_code) SELECT {user_id}, 'premium' FROM {series}"
        " ON CONFLICT (user_id) DO UPDATE SET plan_code = excluded.plan_code,"
        " version = bare_entitlements.version + 1, updated_at = excluded.updated_at"
    ),
    (
        "INSERT INTO bare_audit (user_id, action, event_id)"
        " SELECT {user_id}, 'payment.event', {event_id} FROM {series}"
    ),
)

_PROCESSED = re.compile(r"number of transactions actually processed: (\d+)")
_PER_SECOND = re.compile(r"^tps = ([0-9.]+)", re.MULTILINE)
# pgbench -l: client, transaction, its time in microseconds, ...
_LOG_TIME = 2


@dataclass(frozen=True, slots=True)
class PgBench:
    """A way to write events with pgbench."""

    name: str
    title: str
    events_per_transaction: int


SINGLE = PgBench("pgbench-single", "pgbench, one transaction of four statements per event", 1)
BATCH = PgBench("pgbench-batch", f"pgbench, {BATCH_EVENTS} events per transaction", BATCH_EVENTS)
VARIANTS = (SINGLE, BATCH)


@dataclass(frozen=True, slots=True, kw_only=True)
class PgBenchResult:
    """What a run came to; latencies of transactions, sorted, in milliseconds, and pgbench's own CPU."""

    events: int
    per_second: float
    latencies_ms: Sequence[float]
    cpu_seconds: float


def find_pgbench() -> Path | None:
    """The `pgbench` beside the server's own programs, else that of PATH, else None."""
    candidates = [os.fspath(postgres_bin() / "pgbench"), shutil.which("pgbench")]
    return next((Path(program) for program in candidates if program and _works(program)), None)


def _works(program: str) -> bool:
    """Whether it runs: Debian's wrapper is there also where the program behind it is not."""
    try:
        return subprocess.run([program, "--version"], capture_output=True, check=False).returncode == 0  # noqa: S603  # one of the two above
    except OSError:
        return False


def run_pgbench(variant: PgBench, servers: Servers, *, clients: int, seconds: float) -> PgBenchResult:
    """Writes events for so many seconds (whole ones, at least one) on an empty database of its own.

    Raises:
        BenchFailed: there is no pgbench, it failed, or rows are missing afterwards.
    """
    program = find_pgbench()
    if program is None:
        raise BenchFailed(f"{NOT_MEASURED}. {HOW_TO_GET}")
    database = f"{variant.name}_{clients}".replace("-", "_")
    url = urlsplit(servers.postgres.create_database(database, template=prepared(servers, Kind.PROTOTYPE)))
    try:
        servers.postgres.execute(
            "INSERT INTO bare_entitlements (user_id, plan_code)"
            " SELECT 'usr_' || number, 'premium' FROM generate_series(1, $1::bigint) AS number",
            KNOWN_USERS,
            database=database,
        )
        # As before every other measurement; and what was just written needs its statistics.
        servers.postgres.execute("VACUUM (ANALYZE) bare_entitlements", database=database)
        servers.postgres.execute("CHECKPOINT")
        script = servers.directory / f"{database}.sql"
        script.write_text(_script(variant), encoding="ascii")
        directory = servers.directory / database
        directory.mkdir(exist_ok=True)
        command = [
            *(os.fspath(program), "--no-vacuum", "--protocol", "prepared", "--log"),
            *("--client", str(clients), "--jobs", str(min(clients, THREADS_MAX))),
            *("--time", str(max(1, round(seconds))), "--file", os.fspath(script)),
            *("--define", f"payload={_payload()}"),
        ]
        env = {
            "PATH": os.environ.get("PATH", os.defpath),
            "PGHOST": url.hostname or "",
            "PGPORT": str(url.port),
            "PGUSER": url.username or "",
            "PGPASSWORD": url.password or "",
            "PGDATABASE": database,
        }
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(  # noqa: S603  # the program found above, with our own words
            command,
            env=env,
            cwd=directory,
            capture_output=True,
            text=True,
            timeout=seconds + EXTRA_SECONDS_MAX,
            check=False,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        latencies_ms = _latencies_ms(directory)
        processed, per_second = _PROCESSED.search(done.stdout), _PER_SECOND.search(done.stdout)
        if done.returncode != 0 or processed is None or per_second is None or not latencies_ms:
            raise BenchFailed(f"pgbench ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        events = int(processed[1]) * variant.events_per_transaction
        found = int(servers.postgres.execute("SELECT count(*) FROM bare_events", database=database)[0][0])
        if found < events:
            raise BenchFailed(f"{variant.name}: {found} rows, {events} are due")
    finally:
        servers.postgres.drop_database(database)
    return PgBenchResult(
        events=events,
        per_second=float(per_second[1]) * variant.events_per_transaction,
        latencies_ms=latencies_ms,
        cpu_seconds=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    )


def _script(variant: PgBench) -> str:
    if variant.events_per_transaction == 1:
        values = {
            "event_id": "'evt_' || :number",
            "event_type": "'checkout.session.completed'",
            "user_id": "'usr_' || :user",
            "plan_code": "'premium'",
            "amount": "2999",
            "payload": "convert_to(:payload, 'UTF8')",
        }
        statements = [statement.format(**values) for statement in ONE_EVENT]
    else:
        statements = _batch_statements(variant.events_per_transaction)
    lines = [
        rf"\set number random(1, {NUMBERS})",
        rf"\set user random(1, {2 * KNOWN_USERS})",
        "BEGIN;",
        *(f"{statement};" for statement in statements),
        "COMMIT;",
    ]
    return "\n".join(lines) + "\n"


def _batch_statements(events: int) -> list[str]:
    values = {
        "event_id": "'evt_' || :number || '_' || place",
        "user_id": "'usr_' || (:user + place)",
        "series": f"generate_series(1, {events}) AS place",
        # Every event's payload crosses the wire, as it would in earnest.
        "payloads": ", ".join([":payload"] * events),
    }
    return [statement.format(**values) for statement in MANY_EVENTS]


def _payload() -> str:
    """The measured event whose size is nearest to the mix's mean."""
    bodies = make_workload(TYPES, prefix="pgbench").events
    mean = sum(map(len, bodies)) / len(bodies)
    return min(bodies, key=lambda body: abs(len(body) - mean)).decode("ascii")


def _latencies_ms(directory: Path) -> list[float]:
    found: list[float] = []
    for log in directory.glob("pgbench_log.*"):
        with log.open(encoding="ascii") as lines:
            found += [int(line.split()[_LOG_TIME]) / 1000 for line in lines]
        log.unlink()
    return sorted(found)
