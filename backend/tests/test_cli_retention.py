"""`tollkeeper retention` as operators use it: exit codes, text and JSON, settings, a kill and a second run."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from backend.app.cli import main
from backend.app.core.clock import months_before
from backend.app.simulator import objects
from backend.tests.billing.test_rebuild import grow
from backend.tests.support.billing import running_service, unix_now

# More than a dozen batches, and a second or two of work.
KILLED_USERS = 120
EVENTS_PER_USER = 12
# Then one process is left in peace, so that the test ends.
STOPS_MAX = 6


def tollkeeper(url: str, *arguments: str, **environment: str) -> Result:
    return CliRunner(env={"DATABASE_URL": url, **environment}).invoke(main, arguments)


def make_older(url: str, months: int) -> None:
    """Says that all events came some months earlier."""
    came = months_before(datetime.now(UTC), months).replace(tzinfo=None)
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
        connection.execute("UPDATE webhook_events SET received_at = ?", [came.isoformat(" ")])
        connection.commit()


@pytest.fixture
async def url(migrated_sqlite_url: str) -> str:
    """A database with one user who bought premium, and a purchase of nobody; fourteen months ago."""
    bought = objects.checkout_session("cs_1", client_reference_id="user_1", metadata={"plan_code": "premium"})
    guest = objects.checkout_session("cs_2", metadata={"plan_code": "premium"})
    async with running_service(migrated_sqlite_url) as service:
        for number, session in enumerate((bought, guest), start=1):
            event = objects.event(
                f"evt_{number}", "checkout.session.completed", session, created=unix_now() - 60
            )
            assert (await service.deliver(event)).status_code == 200
    make_older(migrated_sqlite_url, 14)
    return migrated_sqlite_url


def with_bodies(url: str) -> list[str]:
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
        found = connection.execute(
            "SELECT event_id FROM webhook_events WHERE payload IS NOT NULL ORDER BY event_id"
        )
        return [event_id for (event_id,) in found]


def test_a_run_tells_what_went_and_what_stays(url: str) -> None:
    done = tollkeeper(url, "retention")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.startswith("1 bodies of ")
    assert done.stdout.endswith("were let go; 1 stay, because their events are parked or failed.\n")
    assert with_bodies(url) == ["evt_2"]
    assert tollkeeper(url, "rebuild", "--check").exit_code == 0
    again = tollkeeper(url, "retention")
    assert (again.exit_code, again.stdout.startswith("0 bodies of 0 bytes")) == (0, True)


def test_a_dry_run_tells_the_same_and_changes_nothing(url: str) -> None:
    dry = json.loads(tollkeeper(url, "retention", "--dry-run", "--json").stdout)
    assert with_bodies(url) == ["evt_1", "evt_2"]
    done = json.loads(tollkeeper(url, "retention", "--json").stdout)
    assert (dry.pop("dry_run"), done.pop("dry_run")) == (True, False)
    for report in (dry, done):
        received_before = datetime.fromisoformat(report.pop("received_before"))
        assert abs((received_before - months_before(datetime.now(UTC), 13)).total_seconds()) < 60
    assert dry == done
    assert done.pop("body_bytes") > 500
    assert done == {"months": 13, "bodies": 1, "waiting": 1, "unreadable": 0, "unreadable_ids": []}


def test_how_long_bodies_stay_is_set_by_option_environment_or_file(url: str, tmp_path: Path) -> None:
    file = tmp_path / "months"
    file.write_text("24\n", encoding="utf-8")
    for environment in (
        {"PAYLOAD_RETENTION_MONTHS": "15"},
        {"PAYLOAD_RETENTION_MONTHS": "1", "PAYLOAD_RETENTION_MONTHS_FILE": str(file)},
    ):
        assert json.loads(tollkeeper(url, "retention", "--json", **environment).stdout)["bodies"] == 0
    done = tollkeeper(url, "retention", "--json", "--months", "14", PAYLOAD_RETENTION_MONTHS="15")
    assert (json.loads(done.stdout)["months"], json.loads(done.stdout)["bodies"]) == (14, 1)


@pytest.mark.parametrize("months", ["0", "-1", "1201", "13.5", "many"])
def test_months_that_are_none_are_wrong_use(url: str, months: str) -> None:
    assert tollkeeper(url, "retention", "--months", months).exit_code == 2
    assert tollkeeper(url, "retention", PAYLOAD_RETENTION_MONTHS=months).exit_code == 2
    assert with_bodies(url) == ["evt_1", "evt_2"]


def test_another_schema_is_wrong_use(tmp_path: Path) -> None:
    done = tollkeeper(f"sqlite:///{tmp_path / 'empty.db'}", "retention")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "run `tollkeeper migrate` first" in done.stderr


def test_a_body_that_can_not_be_understood_is_exit_1_and_named(url: str) -> None:
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
        connection.execute("UPDATE webhook_events SET payload = x'00' WHERE event_id = 'evt_1'")
        connection.commit()
    done = tollkeeper(url, "retention")
    assert done.exit_code == 1
    assert "1 stay, because it can't be told what they assert: evt_1; look at" in done.stdout
    assert with_bodies(url) == ["evt_1", "evt_2"]


def test_what_somebody_else_wrote_into_an_assertion_is_named_by_a_check(url: str) -> None:
    assert tollkeeper(url, "retention").exit_code == 0
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
        connection.execute(
            "UPDATE webhook_events SET assertion = '{\"version\": 9}' WHERE event_id = 'evt_1'"
        )
        connection.commit()
    done = tollkeeper(url, "rebuild", "--check")
    assert done.exit_code == 2
    assert "event evt_1 has no body, and what is kept of it is of version 9" in done.stderr


async def test_a_killed_run_is_gone_on_with_by_the_next(migrated_sqlite_url: str) -> None:
    """Killed at random moments until one process reaches the end: no body is counted twice, and none is forgotten."""
    url = migrated_sqlite_url
    await grow(url, KILLED_USERS, events_per_user=EVENTS_PER_USER)
    assert (await asyncio.to_thread(tollkeeper, url, "rebuild")).exit_code == 0
    make_older(url, 14)
    told = json.loads((await asyncio.to_thread(tollkeeper, url, "retention", "--dry-run", "--json")).stdout)
    assert told["bodies"] == KILLED_USERS * EVENTS_PER_USER
    chance = random.Random(7)
    stops = 0
    while True:
        patience = chance.uniform(0, 0.08) if stops < STOPS_MAX else None
        done = await asyncio.to_thread(retention_process, url, patience)
        if done.stdout:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        stops += 1
        assert audited_bodies(url) == told["bodies"] - len(with_bodies(url))
    assert stops > 0
    assert json.loads(done.stdout)["bodies"] < told["bodies"]
    assert (with_bodies(url), audited_bodies(url)) == ([], told["bodies"])
    assert (await asyncio.to_thread(tollkeeper, url, "rebuild", "--check")).exit_code == 0


def retention_process(url: str, seconds_max: float | None) -> subprocess.CompletedProcess[str]:
    """`tollkeeper retention` as a process of its own; killed (SIGKILL) so long after its first body went."""
    before = audited_bodies(url)
    child = subprocess.Popen(
        [sys.executable, "-m", "backend.app.cli", "retention", "--json"],
        env={
            "PATH": os.environ.get("PATH", os.defpath),
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "DATABASE_URL": url,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while child.poll() is None and audited_bodies(url) == before:
        time.sleep(0.002)
    try:
        output, errors = child.communicate(timeout=seconds_max)
    except subprocess.TimeoutExpired:
        child.kill()
        output, errors = child.communicate()
    return subprocess.CompletedProcess(child.args, child.returncode, output, errors)


def audited_bodies(url: str) -> int:
    """How many bodies went, by the audit log."""
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
        ((bodies,),) = connection.execute(
            "SELECT coalesce(sum(json_extract(details, '$.bodies')), 0) FROM audit_logs"
            " WHERE action = 'retention.let_go' AND actor = 'cli:retention'"
        )
        return int(bodies)
