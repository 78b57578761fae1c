"""A rebuild that was stopped goes on where it ended, and its report is that of a run that was never stopped."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from backend.app.billing import party_index
from backend.app.billing.domain.catalog import Catalog, parse_catalog
from backend.app.billing.rebuild import Rebuild, Report
from backend.app.core.database import Database
from backend.app.main import SHIPPED_CATALOG
from backend.tests.billing.test_rebuild import shaken
from backend.tests.support.billing import Harness, running_service

SHIPPED = SHIPPED_CATALOG.read_text(encoding="utf-8")
USERS = 3


class Stopped(BaseException):
    """Stands for whatever ends a process."""


class Watch:
    """Sees how far a run is, and stops it at its n-th step."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.steps: list[tuple[str, int, int]] = []
        self._stop_at = stop_at

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.steps.append((stage, done, total))
        if len(self.steps) == self._stop_at:
            raise Stopped


def rebuild(
    service: Harness,
    file: Path | None,
    watch: Watch | None = None,
    *,
    catalog: Catalog | None = None,
    livemode: bool = False,
) -> Rebuild:
    return Rebuild(
        service.service.database,
        catalog or service.service.catalog,
        clock=service.clock,
        livemode=livemode,
        progress=watch or Watch(),
        file=file,
    )


async def go(made: Rebuild, *, corrects: bool) -> Report:
    return await (made.run() if corrects else made.check())


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few parties are as many batches."""
    monkeypatch.setattr(party_index, "BATCH_NODES", 10)


async def damage(database: Database) -> None:
    """Something in each party."""
    async with database.transaction() as tx:
        await tx.execute(sa.text("UPDATE payment_events SET amount = 1"))
        await tx.execute(sa.text("UPDATE user_entitlements SET plan_code = 'free', version = version + 7"))


def told(report: Report) -> tuple[Any, ...]:
    """What a report says of the data; instants of the run itself left out."""
    return (
        report.events,
        report.difference_count,
        sorted((each.table, each.key, each.column) for each in report.differences),
    )


@pytest.mark.parametrize("corrects", [False, True], ids=["check", "run"])
@pytest.mark.usefixtures("small_batches")
async def test_a_run_stopped_at_any_step_ends_like_one_that_was_not(
    service: Harness, tmp_path: Path, corrects: bool
) -> None:
    await shaken(service, users=USERS, seed=3)
    await damage(service.service.database)
    whole = await go(rebuild(service, None, watched := Watch()), corrects=corrects)
    assert whole.difference_count > USERS
    for stop_at in range(1, len(watched.steps) + 1):
        await damage(service.service.database)
        file = tmp_path / "run.file"
        with contextlib.suppress(Stopped):
            await go(rebuild(service, file, first := Watch(stop_at)), corrects=corrects)
        report = await go(rebuild(service, file, second := Watch()), corrects=corrects)
        assert told(report) == told(whole)
        # Nothing is done twice: together they took as many steps as the whole.
        assert len(first.steps) + len(second.steps) <= len(watched.steps) + 1
        done = [step[1] for step in first.steps if step[0] == "replaying events"]
        assert report.events_before <= (done[-1] if done else 0)
        file.unlink()


@pytest.mark.usefixtures("small_batches")
async def test_what_was_decided_between_stop_and_resume_is_caught_up_with(
    service: Harness, tmp_path: Path
) -> None:
    await shaken(service, users=2, seed=3)
    file = tmp_path / "run.file"
    watch = Watch(4)
    with pytest.raises(Stopped):
        await rebuild(service, file, watch).check()
    before = await service.count("webhook_events")
    await shaken(service, users=4, seed=4)
    assert await service.count("webhook_events") > before
    report = await rebuild(service, file).check()
    assert (report.differences, report.events) == ([], await service.count("webhook_events"))
    assert report.events_before > 0


@pytest.mark.parametrize("committed", [False, True], ids=["rolled-back", "committed"])
@pytest.mark.usefixtures("small_batches")
async def test_a_kill_around_a_commit_counts_a_correction_once(
    service: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, committed: bool
) -> None:
    """Whether the correction is there is known by its audit row, which is in the same transaction."""
    await shaken(service, users=USERS, seed=3)
    await damage(service.service.database)
    whole = await rebuild(service, None).check()
    original = Database.transaction

    @contextlib.asynccontextmanager
    async def transaction(database: Database) -> Any:
        async with original(database) as tx:
            yield tx
            if not committed:
                raise Stopped
        raise Stopped

    file = tmp_path / "run.file"
    with monkeypatch.context() as patched:
        patched.setattr(Database, "transaction", transaction)
        with pytest.raises(Stopped):
            await rebuild(service, file).run()
    report = await rebuild(service, file).run()
    assert told(report) == told(whole)
    rows = await service.rows(
        "SELECT resource_type, resource_id FROM audit_logs WHERE action LIKE 'rebuild.%'"
    )
    assert len(rows) == len({tuple(row.values()) for row in rows}) > 0


async def test_a_finished_run_tells_its_report_again(service: Harness, tmp_path: Path) -> None:
    """So that a process that is killed before it has printed the report loses nothing."""
    await shaken(service, users=1, seed=3)
    await damage(service.service.database)
    file = tmp_path / "run.file"
    report = await rebuild(service, file).run()
    assert report.difference_count > 0
    assert told(await rebuild(service, file).run()) == told(report)


class TestRefusals:
    """Going on with something else would compare apples with oranges."""

    @pytest.fixture
    async def file(self, sqlite_service: Harness, tmp_path: Path) -> Path:
        await shaken(sqlite_service, users=1, seed=3)
        path = tmp_path / "run.file"
        with pytest.raises(Stopped):
            await rebuild(sqlite_service, path, Watch(2)).check()
        return path

    async def test_another_command(self, sqlite_service: Harness, file: Path) -> None:
        with pytest.raises(ValueError, match="another command"):
            await rebuild(sqlite_service, file).run()

    async def test_another_catalog(self, sqlite_service: Harness, file: Path) -> None:
        other = parse_catalog(SHIPPED.replace("max_devices = 5", "max_devices = 6"))
        with pytest.raises(ValueError, match="another catalog"):
            await rebuild(sqlite_service, file, catalog=other).check()

    async def test_another_mode(self, sqlite_service: Harness, file: Path) -> None:
        with pytest.raises(ValueError, match="another STRIPE_MODE"):
            await rebuild(sqlite_service, file, livemode=True).check()

    async def test_another_version(
        self, sqlite_service: Harness, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("importlib.metadata.version", lambda _name: "0.0.0")
        with pytest.raises(ValueError, match="another version of Tollkeeper"):
            await rebuild(sqlite_service, file).check()

    async def test_another_database(
        self, sqlite_service: Harness, file: Path, migrated_postgres_url: str
    ) -> None:
        async with running_service(migrated_postgres_url) as other:
            with pytest.raises(ValueError, match="another database"):
                await rebuild(other, file).check()

    async def test_an_older_copy_of_the_database(self, sqlite_service: Harness, file: Path) -> None:
        async with sqlite_service.service.database.transaction() as tx:
            await tx.execute(sa.text("DELETE FROM webhook_events"))
        with pytest.raises(ValueError, match="more events than the database"):
            await rebuild(sqlite_service, file).check()

    async def test_a_file_that_another_process_uses(self, sqlite_service: Harness, file: Path) -> None:
        with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as other:
            other.execute("PRAGMA locking_mode = EXCLUSIVE")
            other.execute("BEGIN EXCLUSIVE")
            with pytest.raises(ValueError, match="another run uses it"):
                await rebuild(sqlite_service, file).check()
        assert (await rebuild(sqlite_service, file).check()).differences == []

    async def test_files_of_others_stay_as_they_are(self, sqlite_service: Harness, tmp_path: Path) -> None:
        text = tmp_path / "notes.txt"
        text.write_text("not a database " * 100, encoding="utf-8")
        with pytest.raises(ValueError, match="not a file of"):
            await rebuild(sqlite_service, text).check()
        assert text.read_text(encoding="utf-8").startswith("not a database")
        database = tmp_path / "tollkeeper.db"
        with pytest.raises(ValueError, match="not a file of"):
            await rebuild(sqlite_service, database).check()
        assert (await rebuild(sqlite_service, None).check()).differences == []
