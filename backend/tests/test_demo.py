"""The demo works on a machine as it is, tells the truth when something is wrong, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from backend.app.cli import main
from backend.app.demo import run
from backend.app.demo.checks import Check, Evidence, run_checks
from backend.app.demo.deliveries import Kind
from backend.app.demo.deployment import LOOPBACK, free_port
from backend.app.demo.story import Chapter, write_story
from backend.app.simulator.objects import Shape
from backend.tests.support.test_servers import REPOSITORY, children_of, wait_gone

COMMAND = (sys.executable, "-m", "backend.app.cli", "demo")
# The promise is a minute; a machine that runs other tests meanwhile gets the whole of it.
DEMO_SECONDS_MAX = 60
# What a developer may have set, and none of which may reach the demo.
USERS_OWN = {
    "DATABASE_URL": "postgresql://127.0.0.1:1/production",
    "REDIS_URL": "redis://127.0.0.1:1",
    "STRIPE_MODE": "live",
    "STRIPE_WEBHOOK_SECRET": "whsec_theirs",
    "CATALOG_FILE": "/nowhere/catalog.toml",
    "WEBHOOK_TOLERANCE_SECONDS": "1",
    "HTTP_PROXY": "http://127.0.0.1:1",
}


def environment(directory: Path) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "TMPDIR": str(directory), **USERS_OWN}


@contextlib.contextmanager
def running_demo(directory: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*COMMAND, *options],
        cwd=REPOSITORY,
        env=environment(directory),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Evidence]:
    """A story that was told, with both services still running."""
    with contextlib.ExitStack() as stack:
        _, _, told = run.perform(tmp_path_factory.mktemp("demo"), stack)
        yield told


def tampered(evidence: Evidence, directory: Path, statement: str) -> Evidence:
    """The same evidence over a copy of the database in which one statement was executed."""
    path = directory / "tampered.db"
    with (
        contextlib.closing(sqlite3.connect(evidence.deployment.database)) as original,
        contextlib.closing(sqlite3.connect(path)) as copy,
    ):
        original.backup(copy)
        for (trigger,) in copy.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            copy.execute(f"DROP TRIGGER {trigger}")
        assert copy.execute(statement).rowcount > 0, "the sabotage must hit something"
        copy.commit()
    return replace(evidence, deployment=replace(evidence.deployment, database=path))


def failed(checks: list[Check]) -> str:
    return "\n".join(f"{check.claim}: {check.detail}" for check in checks if not check.ok)


def test_once_holds_every_check_whatever_the_environment_says_and_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "--once", "--json"],
        cwd=REPOSITORY,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=DEMO_SECONDS_MAX,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    account = json.loads(done.stdout)
    assert account["ok"]
    assert len(account["checks"]) >= 15
    assert all(check["ok"] for check in account["checks"])
    assert account["events"] >= 30
    assert account["deliveries"]["duplicates"] >= 10
    assert {one["status"] for one in account["refused"]} == {400, 403, 413}
    plans = {user["user_id"]: user["plan_code"] for user in account["access"]}
    assert (plans["ben"], plans["cleo"], plans["gwen"]) == ("premium", "vip", "free")
    assert "url" not in account, "nothing is left running"
    assert list(tmp_path.iterdir()) == []


def test_the_account_is_plain_text_that_fits_a_terminal(tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "--once"],
        cwd=REPOSITORY,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=DEMO_SECONDS_MAX,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\x1b" not in done.stdout, "no colour codes in a pipe"
    assert max(len(line) for line in done.stdout.splitlines()) <= 100
    assert "FAILED" not in done.stdout
    assert re.search(r"\n(\d+) of \1 checks hold", done.stdout)


def test_it_stays_and_takes_an_event_of_ones_own_until_it_is_told_to_end(tmp_path: Path) -> None:
    with running_demo(tmp_path) as demo:
        assert demo.stdout is not None
        said = ""
        for line in demo.stdout:
            said += line
            if line.startswith("Ctrl-C"):
                break
        advice = said.replace("\\\n", "")
        send = re.search(r"^ +(\S*tollkeeper send .*)$", advice, re.MULTILINE)
        assert send is not None, said
        sent = subprocess.run(
            send[1], shell=True, cwd=REPOSITORY, capture_output=True, text=True, timeout=30, check=False
        )
        assert sent.returncode == 0, sent.stdout + sent.stderr
        ask = re.search(
            r"-H '(Authorization): (Bearer \S+)' +http://127.0.0.1:(\d+)(\S+/you)$", advice, re.MULTILINE
        )
        assert ask is not None, said
        connection = http.client.HTTPConnection(LOOPBACK, int(ask[3]), timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", ask[4], headers={ask[1]: ask[2]})
            assert json.loads(connection.getresponse().read())["plan_code"] == "vip"
        service = children_of(demo.pid)
        assert len(service) == 1
        demo.send_signal(signal.SIGINT)
        assert demo.wait(DEMO_SECONDS_MAX) == 0, demo.stdout.read()
    wait_gone(service)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("services", [1, 2], ids=["while it starts", "while it delivers"])
def test_no_process_survives_a_kill(tmp_path: Path, services: int) -> None:
    with running_demo(tmp_path, "--once") as demo:
        deadline = time.monotonic() + DEMO_SECONDS_MAX
        while len(family := children_of(demo.pid)) < services:
            assert demo.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        demo.kill()
        demo.wait()
        wait_gone(family)


def test_what_a_killed_demo_left_is_removed_by_the_next_and_a_running_one_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    old = time.time() - 2 * run.LEFTOVER_SECONDS_MIN
    leftover, recent = (tmp_path / f"{run.DIRECTORY_PREFIX}{name}" for name in ("leftover", "recent"))
    for directory in (leftover, recent):
        directory.mkdir()
        (directory / "tollkeeper.db").touch()
    os.utime(leftover, (old, old))
    with run.private_directory() as running:
        os.utime(running, (old, old))
        assert running.stat().st_mode & 0o077 == 0, "nobody else may enter"
        # SQLite's locks are between processes, so the next demo is one.
        subprocess.run(
            [
                sys.executable,
                "-c",
                "from backend.app.demo import run\nwith run.private_directory(): pass",
            ],
            cwd=REPOSITORY,
            env={"TMPDIR": str(tmp_path)},
            timeout=30,
            check=True,
        )
        assert running.exists()
        assert recent.exists(), "it may be starting this very moment"
        assert not leftover.exists()
    assert not running.exists()


def test_the_story_covers_both_generations_of_the_api_and_every_outcome() -> None:
    events = [event for chapter in write_story(1_800_000_000) for event in chapter.events]
    assert {event.body["api_version"] for event in events} == {shape.value for shape in Shape}
    assert {event.outcome for event in events} == {"success", "ignored", "parked"}
    assert len({event.id for event in events}) == len(events)


def test_every_check_holds_on_what_really_happened(evidence: Evidence) -> None:
    assert failed(run_checks(evidence)) == ""


@pytest.mark.parametrize(
    ("statement", "claim"),
    [
        ("DELETE FROM user_entitlements WHERE user_id = 'cleo'", "the table user_entitlements"),
        ("UPDATE user_entitlements SET plan_code = 'enterprise' WHERE user_id = 'ada'", "the table user_ent"),
        ("DELETE FROM payment_events WHERE invoice_id = 'in_eve_2' AND settled", "each piece of money"),
        ("UPDATE payment_events SET amount = 1 WHERE invoice_id = 'in_dan_1'", "each user's money"),
        ("UPDATE payment_events SET user_id = 'dan' WHERE user_id = 'ada'", "and the same ledger"),
        (
            """
            INSERT INTO payment_events
            SELECT 'copy', stripe_event_id, user_id, event_type, plan_code, customer_id, 'in_copy',
              subscription_id, amount, currency, settled, metadata, account, livemode, 'in:copy',
              subject_key, occurred_at, created_at
            FROM payment_events WHERE invoice_id = 'in_dan_1'
            """,
            "each piece of money",
        ),
        (
            "DELETE FROM audit_logs WHERE action = 'payment.event' AND user_id = 'iris'",
            "each ledger line and each change",
        ),
        ("DELETE FROM audit_logs WHERE action = 'entitlement.granted'", "each ledger line and each change"),
        ("DELETE FROM audit_logs WHERE action = 'event.unparked'", "what waited for Ben's name"),
        ("UPDATE webhook_events SET status = 'success' WHERE status = 'parked'", "each event was applied"),
        ("DELETE FROM webhook_events WHERE event_id = 'evt_rita_1'", "each event was applied"),
        ("UPDATE webhook_events SET payload = x'7b7d' WHERE event_id = 'evt_cleo_2'", "each event is kept"),
        (
            "UPDATE webhook_events SET payload = CAST('from mallory' AS BLOB) WHERE event_id = 'evt_ada_3'",
            "test event changed nothing",
        ),
        (
            """
            INSERT INTO webhook_claims
            SELECT account, livemode, 'evt_00000000000000', claimed_at FROM webhook_claims LIMIT 1
            """,
            "the dashboard's test event was accepted",
        ),
    ],
)
def test_a_check_fails_when_the_database_says_otherwise(
    evidence: Evidence, tmp_path: Path, statement: str, claim: str
) -> None:
    assert claim in failed(run_checks(tampered(evidence, tmp_path, statement)))


def test_a_check_fails_when_an_answer_was_another(evidence: Evidence) -> None:
    wrong = [
        one
        if one.kind is Kind.FIRST
        else replace(one, reply=replace(one.reply, status=200, body=b"{}"), changed=True)
        for one in evidence.delivered
    ]
    found = failed(run_checks(replace(evidence, delivered=wrong)))
    for claim in ("every duplicate got", "delivered by many at once", "were refused", "changed nothing"):
        assert claim in found


def test_a_check_fails_when_a_user_has_something_else(evidence: Evidence) -> None:
    chapters: list[Chapter] = [
        replace(chapter, plan_code="enterprise") if chapter.user_id == "finn" else chapter
        for chapter in evidence.chapters
    ]
    assert "finn has ('premium', 'past_due'" in failed(run_checks(replace(evidence, chapters=chapters)))


def test_a_check_fails_when_another_order_gave_something_else(evidence: Evidence) -> None:
    elsewhere = replace(evidence.other_deployment, port=free_port(None))
    with pytest.raises(ConnectionRefusedError):
        run_checks(replace(evidence, other_deployment=elsewhere))
    same_order = replace(
        evidence, delivered_again=[one for one in evidence.delivered if one.kind is Kind.FIRST]
    )
    assert "order did not matter" in failed(run_checks(same_order))


def test_a_check_that_had_nothing_to_look_at_fails(evidence: Evidence) -> None:
    assert "every duplicate got the first answer" in failed(run_checks(replace(evidence, delivered=[])))


def test_once_exits_with_1_when_a_check_does_not_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    # A service that lost one payment: the checks look into a database without it.
    monkeypatch.setattr(
        run,
        "run_checks",
        lambda evidence: run_checks(
            tampered(evidence, tmp_path, "DELETE FROM payment_events WHERE invoice_id = 'in_paul_2'")
        ),
    )
    done = CliRunner().invoke(main, ["demo", "--once"])
    assert done.exit_code == 1, done.output
    said = " ".join(done.output.split())
    assert re.search(r"FAILED each user's money .* paul: 5999 instead of 8998", said)
