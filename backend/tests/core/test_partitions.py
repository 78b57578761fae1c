"""On PostgreSQL every month of what grows for ever has a partition, and every row one of them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from backend.app.core.database import Database
from backend.app.core.migrations import migrate
from backend.app.core.partitions import MONTHS_AHEAD, month_name, months_from
from backend.tests.faults import events
from backend.tests.support.billing import Harness, running_service

PARTITIONED = ("audit_logs", "payment_events", "webhook_events")


async def partitions_of(database: Database, table: str) -> dict[str, int]:
    """A table's partitions, with the number of rows in each."""
    async with database.snapshot() as tx:
        names = await tx.execute(
            sa.text(
                "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = CAST(:t AS regclass)"
            ),
            {"t": table},
        )
        return {
            name: (await tx.execute(sa.text(f"SELECT count(*) FROM {name}"))).scalar_one()
            for name in sorted(names.scalars())
        }


def test_the_months_that_follow_are_counted_over_the_turn_of_a_year() -> None:
    months = months_from(datetime(2026, 11, 30, 23, 59, tzinfo=UTC), 4)
    assert [month_name("audit_logs", month) for month in months] == [
        "audit_logs_2026_11",
        "audit_logs_2026_12",
        "audit_logs_2027_01",
        "audit_logs_2027_02",
    ]


def test_a_month_begins_at_midnight_in_utc_wherever_the_instant_is_told() -> None:
    east = datetime.fromisoformat("2026-12-01T01:00:00+02:00")
    assert months_from(east, 1) == months_from(datetime(2026, 11, 30, tzinfo=UTC), 1)


@pytest.mark.parametrize("table", PARTITIONED)
async def test_a_migrated_database_has_this_month_and_those_ahead(
    migrated_postgres_url: str, table: str
) -> None:
    database = Database.open(migrated_postgres_url)
    ahead = [month_name(table, month) for month in months_from(datetime.now(UTC), MONTHS_AHEAD + 1)]
    assert list(await partitions_of(database, table)) == [*ahead, f"{table}_rest"]
    await migrate(database)
    assert list(await partitions_of(database, table)) == [*ahead, f"{table}_rest"]
    await database.close()


async def test_what_comes_before_its_month_was_made_is_kept_and_gets_its_month_later(
    migrated_postgres_url: str,
) -> None:
    """Rows of the audit log too, which nobody may delete."""
    async with running_service(migrated_postgres_url) as service:
        database = service.service.database
        present = service.clock.instant
        service.clock.instant = present - timedelta(days=62)
        assert (await service.deliver(events.purchase("late", user_id="ann"))).status_code == 200
        before = {table: await service.rows(f"SELECT * FROM {table}") for table in PARTITIONED}
        month = months_from(service.clock.instant, 1)[0]
        assert (await partitions_of(database, "audit_logs"))["audit_logs_rest"] == 2
        await migrate(database)
        for table in ("audit_logs", "payment_events"):
            rows = await partitions_of(database, table)
            assert rows[month_name(table, month)] == len(before[table]) > 0
            assert rows[f"{table}_rest"] == 0
        assert {table: await service.rows(f"SELECT * FROM {table}") for table in PARTITIONED} == before
        service.clock.instant = present
        assert (await service.deliver(events.purchase("later", user_id="bob"))).status_code == 200
        assert (await partitions_of(database, "audit_logs"))["audit_logs_rest"] == 0


async def test_what_is_older_than_any_plan_for_it_stays_among_the_rest(migrated_postgres_url: str) -> None:
    """An event of 2001 is no reason for three hundred months."""
    async with running_service(migrated_postgres_url) as service:
        database = service.service.database
        old = events.wire(
            {
                "id": "evt_old",
                "object": "event",
                "type": "coupon.created",
                "api_version": "2024-06-20",
                "created": 1_000_000_000,
                "livemode": False,
                "data": {"object": {"id": "c_1", "object": "coupon"}},
            }
        )
        assert (await service.deliver(old)).status_code == 200
        before = set(await partitions_of(database, "webhook_events"))
        await migrate(database)
        after = await partitions_of(database, "webhook_events")
        assert set(after) == before
        assert after["webhook_events_rest"] == 1


@pytest.mark.parametrize("partition", ["audit_logs_rest", "this month"])
@pytest.mark.parametrize("statement", ["UPDATE {} SET action = 'x'", "DELETE FROM {}", "TRUNCATE {}"])
async def test_no_month_of_the_audit_log_can_be_changed_by_its_own_name(
    migrated_postgres_url: str, partition: str, statement: str
) -> None:
    name = month_name("audit_logs", months_from(datetime.now(UTC), 1)[0])
    async with running_service(migrated_postgres_url) as service:
        if partition == "audit_logs_rest":
            name = partition
            service.clock.instant -= timedelta(days=62)
        assert (await service.deliver(events.purchase("kept", user_id="ann"))).status_code == 200
        assert (await partitions_of(service.service.database, "audit_logs"))[name] == 2
        with pytest.raises(sa.exc.DBAPIError, match="append-only"):
            async with service.service.database.transaction() as tx:
                await tx.execute(sa.text(statement.format(name)))


async def test_money_that_two_months_report_makes_one_line(service: Harness) -> None:
    """The ledger's months know nothing of each other; the claim on the money does."""
    body = events.subscription("1", subscription_id="sub_1", customer="cus_1", user_id="ann")
    assert (await service.deliver(body)).status_code == 200
    paid = events.invoice("2", subscription_id="sub_1", customer="cus_1")
    assert (await service.deliver(paid)).status_code == 200
    lines = await service.rows("SELECT * FROM payment_events")
    service.clock.instant += timedelta(days=31)
    again = paid.replace(b"evt_2", b"evt_3").replace(b"invoice.payment_succeeded", b"invoice.paid")
    assert again != paid
    assert (await service.deliver(again)).json()["status"] == "success"
    assert await service.rows("SELECT * FROM payment_events") == lines
    assert await service.count("payment_claims") == len(lines)
    assert await service.count("audit_logs WHERE action = 'payment.event'") == len(lines)
