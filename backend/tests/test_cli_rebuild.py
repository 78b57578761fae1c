"""`tollkeeper rebuild` and `tollkeeper catalog` as operators use them: exit codes, text and JSON."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from backend.app.cli import main
from backend.app.main import SHIPPED_CATALOG
from backend.app.simulator import objects
from backend.tests.billing.test_rebuild import grow
from backend.tests.support.billing import running_service, unix_now

SHIPPED = SHIPPED_CATALOG.read_text(encoding="utf-8")
# Several batches, and a second or two of work.
KILLED_USERS = 60
# Then one process is left in peace, so that the test ends.
STOPS_MAX = 6


def tollkeeper(url: str, *arguments: str) -> Result:
    return CliRunner(env={"DATABASE_URL": url}).invoke(main, arguments)


@pytest.fixture
async def url(migrated_sqlite_url: str) -> str:
    """A database with one user who bought premium."""
    session = objects.checkout_session(
        "cs_1", customer="cus_1", client_reference_id="user_1", metadata={"plan_code": "premium"}
    )
    async with running_service(migrated_sqlite_url) as service:
        event = objects.event("evt_1", "checkout.session.completed", session, created=unix_now() - 60)
        assert (await service.deliver(event)).status_code == 200
    return migrated_sqlite_url


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """The shipped catalog with one more device in premium."""
    path = tmp_path / "changed.toml"
    path.write_text(SHIPPED.replace("max_devices = 5", "max_devices = 6"), encoding="utf-8")
    return path


def test_a_check_without_a_difference_is_exit_0(url: str) -> None:
    done = tollkeeper(url, "rebuild", "--check")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == "1 events replayed; 0 values differ.\n"


def test_a_difference_is_exit_1_named_and_then_corrected(url: str) -> None:
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
        connection.execute("UPDATE payment_events SET amount = 1")
        connection.commit()
    done = tollkeeper(url, "rebuild", "--check")
    assert done.exit_code == 1
    assert "payment_events /False/cs:cs_1 amount: stored 1, recomputed 2999" in done.stdout
    document = json.loads(tollkeeper(url, "rebuild", "--check", "--json").stdout)
    assert document["differences"] == [
        {
            "table": "payment_events",
            "key": ["", False, "cs:cs_1"],
            "column": "amount",
            "stored": 1,
            "recomputed": 2999,
        }
    ]
    assert document["corrected"] is False
    corrected = tollkeeper(url, "rebuild", "--json")
    assert (corrected.exit_code, json.loads(corrected.stdout)["corrected"]) == (0, True)
    assert tollkeeper(url, "rebuild", "--check").exit_code == 0


@pytest.mark.parametrize("arguments", [["--check"], []], ids=["check", "run"])
async def test_a_killed_rebuild_goes_on_where_it_ended(
    migrated_sqlite_url: str, tmp_path: Path, arguments: list[str]
) -> None:
    """Killed at random moments until one process reaches the end: the report is that of an unharmed run."""
    await grow(migrated_sqlite_url, KILLED_USERS, events_per_user=12)
    untouched, killed = tmp_path / "untouched", tmp_path / "killed"
    for directory in (untouched, killed):
        directory.mkdir()
        shutil.copyfile(migrated_sqlite_url.removeprefix("sqlite:///"), directory / "tollkeeper.db")
    whole, seconds = await asyncio.to_thread(rebuild_process, untouched, *arguments)
    assert whole.returncode == (1 if arguments else 0), whole.stderr
    chance = random.Random(len(arguments))
    stops = 0
    while True:
        patience = chance.uniform(0, 0.5) * seconds if stops < STOPS_MAX else None
        done, _ = await asyncio.to_thread(rebuild_process, killed, *arguments, seconds_max=patience)
        if done.stdout:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        stops += 1
    assert stops > 0
    before, after = json.loads(whole.stdout), json.loads(done.stdout)
    assert after["events"] == KILLED_USERS * 12
    assert (after["difference_count"], after["corrected"]) == (
        before["difference_count"],
        before["corrected"],
    )
    shown = [
        [(each["table"], each["key"], each["column"]) for each in report["differences"]]
        for report in (before, after)
    ]
    assert shown[0] == shown[1]
    # No row was corrected twice.
    assert audited(killed) == audited(untouched)
    if not arguments:
        again = await asyncio.to_thread(tollkeeper, f"sqlite:///{killed}/tollkeeper.db", "rebuild", "--check")
        assert again.exit_code == 0


def rebuild_process(
    directory: Path, *arguments: str, seconds_max: float | None = None
) -> tuple[subprocess.CompletedProcess[str], float]:
    """`tollkeeper rebuild --resume` in a directory as a process of its own, and how long it worked.

    It is killed (SIGKILL) when it has worked so long; to start up is no work.
    """
    command = [
        sys.executable,
        "-m",
        "backend.app.cli",
        "rebuild",
        *arguments,
        "--json",
        "--resume",
        "run.file",
    ]
    before = state_of_run(directory)
    child = subprocess.Popen(
        command,
        cwd=directory,
        env={
            "PATH": os.environ.get("PATH", os.defpath),
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "DATABASE_URL": "sqlite:///tollkeeper.db",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while child.poll() is None and state_of_run(directory) == before:
        time.sleep(0.002)
    started = time.monotonic()
    try:
        output, errors = child.communicate(timeout=seconds_max)
    except subprocess.TimeoutExpired:
        child.kill()
        output, errors = child.communicate()
    seconds = time.monotonic() - started
    return subprocess.CompletedProcess(command, child.returncode, output, errors), seconds


def audited(directory: Path) -> list[tuple[str, str]]:
    """Which rows of a directory's database were corrected, as often as they were."""
    with closing(sqlite3.connect(directory / "tollkeeper.db")) as connection:
        return connection.execute(
            "SELECT resource_type, resource_id FROM audit_logs ORDER BY 1, 2"
        ).fetchall()


def state_of_run(directory: Path) -> set[tuple[str, int]]:
    """What changes as soon as a run writes to its file."""
    return {(path.name, path.stat().st_mtime_ns) for path in directory.glob("run.file-wal")}


def test_a_file_of_another_run_is_wrong_use(url: str, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine " * 1_000, encoding="utf-8")
    done = tollkeeper(url, "rebuild", "--check", "--resume", str(path))
    assert (done.exit_code, done.stdout) == (2, "")
    assert "notes.txt is not a file of `rebuild --resume`" in done.stderr
    assert path.read_text(encoding="utf-8").startswith("mine")


def test_the_file_of_a_finished_run_is_gone(url: str, tmp_path: Path) -> None:
    path = tmp_path / "run.file"
    assert tollkeeper(url, "rebuild", "--check", "--resume", str(path)).exit_code == 0
    assert [found.name for found in tmp_path.glob("run.file*")] == []


def test_a_valid_catalog_is_exit_0(url: str) -> None:
    assert tollkeeper(url, "catalog", "check", str(SHIPPED_CATALOG)).exit_code == 0
    done = tollkeeper(url, "catalog", "check", str(SHIPPED_CATALOG), "--json")
    assert json.loads(done.stdout) == {"valid": True, "error": None}


def test_a_wrong_catalog_is_exit_1_with_line_and_key(url: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(SHIPPED.replace("past_due_grace_days = 14", "past_due_grace_days = -1"), encoding="utf-8")
    line = 1 + SHIPPED[: SHIPPED.index("past_due_grace_days")].count("\n")
    done = tollkeeper(url, "catalog", "check", str(path))
    assert (done.exit_code, done.stdout) == (1, "")
    assert f"line {line}, policy.past_due_grace_days" in done.stderr


def test_catalogs_that_differ_for_nobody_are_exit_0(url: str) -> None:
    done = tollkeeper(url, "catalog", "diff", str(SHIPPED_CATALOG), str(SHIPPED_CATALOG))
    assert (done.exit_code, done.stdout) == (0, "0 of 1 users would see a difference.\n")


def test_catalogs_that_differ_for_somebody_are_exit_1(url: str, changed: Path) -> None:
    done = tollkeeper(url, "catalog", "diff", str(SHIPPED_CATALOG), str(changed))
    assert done.exit_code == 1
    assert "gain: 1 users, feature max_devices: 5 -> 6 (user_1)" in done.stdout
    document = json.loads(
        tollkeeper(url, "catalog", "diff", str(SHIPPED_CATALOG), str(changed), "--json").stdout
    )
    assert (document["users"], document["users_changed"]) == (1, 1)


def test_a_catalog_that_can_not_be_compared_is_wrong_use(url: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text("nonsense", encoding="utf-8")
    assert tollkeeper(url, "catalog", "diff", str(SHIPPED_CATALOG), str(path)).exit_code == 2
    assert tollkeeper(url, "catalog", "diff", str(path), str(tmp_path / "absent.toml")).exit_code == 2
    assert tollkeeper(url, "catalog", "check", str(tmp_path / "absent.toml")).exit_code == 2
