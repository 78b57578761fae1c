"""`tollkeeper rebuild` and `tollkeeper catalog` as operators use them: exit codes, text and JSON."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from backend.app.cli import main
from backend.app.main import SHIPPED_CATALOG
from backend.app.simulator import objects
from backend.tests.support.billing import running_service, unix_now

SHIPPED = SHIPPED_CATALOG.read_text(encoding="utf-8")


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
