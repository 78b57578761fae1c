"""Everything derived can be made again from the stored events: no false alarm, and no alteration unseen."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from backend.app.billing import store_rebuild as rows
from backend.app.billing.masking import mask_sensitive
from backend.app.billing.models import webhook_events
from backend.app.billing.rebuild import Rebuild, Report, _Run
from backend.app.billing.store_rebuild import DerivedTable
from backend.app.core.database import Database
from backend.app.simulator import objects
from backend.app.simulator.objects import DAY_SECONDS, MONTH_SECONDS
from backend.tests.http.test_claims import claim
from backend.tests.support.billing import Harness, unix_now

PLANS = ("premium", "vip", "enterprise")
ALTERATIONS = 100


def rebuild_of(service: Harness) -> Rebuild:
    made = service.service
    return Rebuild(made.database, made.catalog, clock=service.clock, livemode=made.settings.livemode)


async def check(service: Harness) -> Report:
    return await rebuild_of(service).check()


def life(number: int, *, now: int) -> list[dict[str, Any]]:
    """A user's subscription with its checkout, invoices, payment, upgrade, refund and end; in order."""
    sub, cus, user = f"sub_{number}", f"cus_{number}", f"user_{number}"
    plan = PLANS[number % len(PLANS)]
    start = now - 40 * DAY_SECONDS
    ids = (f"evt_{number}_{part}" for part in itertools.count())

    def happened(kind: str, content: dict[str, Any], after: int) -> dict[str, Any]:
        return objects.event(next(ids), kind, content, created=start + after)

    def snapshot(lookup_key: str, from_: int, **rest: Any) -> dict[str, Any]:
        return objects.subscription(
            sub,
            customer=cus,
            prices=[objects.price(lookup_key)],
            period_start=from_,
            period_end=from_ + MONTH_SECONDS,
            **rest,
        )

    session = objects.checkout_session(
        f"cs_{number}", mode="subscription", customer=cus, subscription=sub, client_reference_id=user
    )
    bill = objects.invoice(f"in_{number}", customer=cus, subscription_id=sub, line_price=objects.price(plan))
    bought = objects.checkout_session(
        f"cs_once_{number}",
        customer=cus,
        payment_intent=f"pi_once_{number}",
        metadata={"plan_code": "premium", "user_id": user},
    )
    events = [
        happened("customer.subscription.created", snapshot(plan, start), 0),
        happened("invoice.paid", bill, 1),
        happened("invoice.payment_succeeded", bill, 1),
        happened("checkout.session.completed", session, 2),
        happened("charge.succeeded", objects.charge(f"ch_{number}", customer=cus), 3),
        happened("customer.subscription.updated", snapshot("vip", start), 5 * DAY_SECONDS),
        happened("customer.subscription.updated", snapshot("vip", start + MONTH_SECONDS), MONTH_SECONDS),
        happened("checkout.session.completed", bought, 12),
        happened(
            "payment_intent.succeeded",
            objects.payment_intent(f"pi_once_{number}", customer=cus),
            13,
        ),
        happened("payment_method.attached", {"id": f"pm_{number}"}, 14),
    ]
    if number % 3 == 0:
        refund = objects.refund(f"re_{number}", intent_id=f"pi_once_{number}", charge_id=f"ch_once_{number}")
        events.append(happened("refund.created", refund, 20))
    if number % 4 == 1:
        ended = snapshot("vip", start + MONTH_SECONDS, status="canceled", ended_at=start + 35 * DAY_SECONDS)
        events.append(happened("customer.subscription.deleted", ended, 35 * DAY_SECONDS))
    return events


def guests(now: int) -> list[dict[str, Any]]:
    """What stays parked: a purchase of nobody, an unknown price, an unreadable event; and another mode."""
    guest = objects.checkout_session("cs_guest", metadata={"plan_code": "premium"})
    unknown = objects.subscription(
        "sub_odd",
        customer="cus_odd",
        prices=[objects.price("odd")],
        period_start=now - 60,
        period_end=now + MONTH_SECONDS,
        metadata={"user_id": "user_odd"},
    )
    return [
        objects.event("evt_guest", "checkout.session.completed", guest, created=now - 50),
        objects.event("evt_odd", "customer.subscription.created", unknown, created=now - 50),
        objects.event("evt_bad", "checkout.session.completed", {"id": 7}, created=now - 50),
        objects.event("evt_live", "checkout.session.completed", guest, created=now - 50, livemode=True),
    ]


async def shaken(service: Harness, *, users: int, seed: int) -> None:
    """Delivers the lives of some users in disorder, a third of the events twice, over ten days."""
    chance = random.Random(seed)
    now = unix_now()
    events = [event for number in range(users) for event in life(number, now=now)] + guests(now)
    events += chance.sample(events, len(events) // 3)
    chance.shuffle(events)
    for event in events:
        service.clock.advance(seconds=chance.choice((0, 0, 1, 30)))
        response = await service.deliver(event)
        assert response.status_code == 200, response.text


@pytest.mark.parametrize("seed", range(3))
async def test_ordinary_traffic_leaves_no_difference(service: Harness, seed: int) -> None:
    """Disorder, duplicates, late ties and parked events; also long after, when accesses have run out."""
    await shaken(service, users=6, seed=seed)
    report = await check(service)
    assert (report.differences, report.events) == ([], await service.count("webhook_events"))
    service.clock.advance(days=400)
    assert (await check(service)).differences == []


async def test_a_run_corrects_what_differs_tells_why_and_leaves_the_rest(service: Harness) -> None:
    await shaken(service, users=3, seed=7)
    kept = "SELECT * FROM entitlement_history ORDER BY user_id, version"
    history, payloads = await service.rows(kept), await service.rows("SELECT payload FROM webhook_events")
    audited = await service.count("audit_logs")
    (user,) = await service.rows("SELECT * FROM user_entitlements WHERE user_id = 'user_1'")
    async with service.service.database.transaction() as tx:
        await tx.execute(
            sa.text("UPDATE user_entitlements SET plan_code = 'enterprise' WHERE user_id = 'user_1'")
        )
        await tx.execute(sa.text("DELETE FROM payment_events WHERE effect_key = 'in:in_1'"))
        await tx.execute(sa.text("DELETE FROM user_entitlements WHERE user_id = 'user_2'"))
        await tx.execute(sa.text("UPDATE sources SET user_id = 'user_2' WHERE source_key = 'sub:sub_1'"))
    found = await check(service)
    assert {difference.table for difference in found.differences} == {
        "user_entitlements",
        "payment_events",
        "sources",
    }
    assert await service.count("audit_logs") == audited
    corrected = await rebuild_of(service).run()
    assert corrected.difference_count == found.difference_count
    assert (await check(service)).differences == []
    (row,) = await service.rows("SELECT * FROM user_entitlements WHERE user_id = 'user_1'")
    assert (row["plan_code"], row["version"]) == (user["plan_code"], user["version"] + 1)
    now = await service.rows(kept)
    assert [line for line in now if line["cause_event_id"] != "rebuild"] == history
    assert len(now) == len(history) + 2
    assert await service.rows("SELECT payload FROM webhook_events") == payloads
    logs = await service.rows(
        "SELECT action, resource_type, actor FROM audit_logs WHERE action LIKE 'rebuild.%'"
    )
    assert len(logs) == await service.count("audit_logs") - audited
    assert {log["actor"] for log in logs} == {"cli:rebuild"}
    assert sorted((log["action"], log["resource_type"]) for log in logs) == [
        ("rebuild.added", "payment_events"),
        ("rebuild.added", "user_entitlements"),
        ("rebuild.corrected", "sources"),
        ("rebuild.corrected", "user_entitlements"),
    ]


async def test_a_persons_word_about_a_payment_is_found_missing_where_the_invoice_inherits_it(
    service: Harness,
) -> None:
    now = unix_now()
    paid = objects.payment_intent("pi_1", metadata={"plan_code": "vip"})
    bought = objects.event("evt_1", "payment_intent.succeeded", paid, created=now - 60)
    assert (await service.deliver(bought)).json()["status"] == "parked"
    assert (await claim(service, "user_1", source="pi:pi_1")).status_code == 201
    payment = objects.invoice_payment("inpay_1", invoice_id="in_1", intent_id="pi_1")
    linked = objects.event("evt_2", "invoice_payment.paid", payment, created=now - 50)
    assert (await service.deliver(linked)).status_code == 200
    assert (await check(service)).differences == []
    inherited = "SELECT event_id, inherited FROM facts WHERE subject_key = 'in:in_1' AND series = 'claim'"
    (told,) = await service.rows(inherited)
    async with service.service.database.transaction() as tx:
        await tx.execute(sa.text("DELETE FROM facts WHERE subject_key = 'in:in_1'"))
    assert {difference.table for difference in (await check(service)).differences} == {"facts"}
    await rebuild_of(service).run()
    assert await service.rows(inherited) == [told]
    assert (await check(service)).differences == []


async def test_a_second_run_finds_nothing_to_do(service: Harness) -> None:
    await shaken(service, users=2, seed=11)
    assert (await rebuild_of(service).run()).difference_count == 0
    assert await service.rows("SELECT id FROM audit_logs WHERE action LIKE 'rebuild.%'") == []


async def test_everything_derived_can_be_lost_and_made_again(service: Harness) -> None:
    await shaken(service, users=3, seed=5)
    await lose_and_make_again(service)


async def lose_and_make_again(service: Harness) -> None:
    tables = [derived for derived in rows.REPLAYED if derived is not rows.EVENTS]
    before = [await contents(service, derived) for derived in tables]
    async with service.service.database.transaction() as tx:
        for derived in (*tables, rows.ENTITLEMENTS):
            await tx.execute(derived.table.delete())
    await rebuild_of(service).run()
    assert [await contents(service, derived) for derived in tables] == before
    assert (await check(service)).differences == []


async def test_events_that_come_during_a_check_are_no_difference(
    service: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first page is read, then more is delivered, then the comparison goes on."""
    await shaken(service, users=2, seed=2)
    original = _Run.read_rows

    async def read_rows_late(run: _Run) -> None:
        for event in life(9, now=unix_now()):
            await service.deliver(event)
        await original(run)

    monkeypatch.setattr(_Run, "read_rows", read_rows_late)
    report = await check(service)
    assert (report.differences, report.events) == ([], await service.count("webhook_events"))


async def contents(service: Harness, derived: DerivedTable) -> list[dict[str, Any]]:
    """What a rebuild promises of a table, in order."""
    columns = [derived.table.c[name] for name in (*derived.key, *derived.columns)]
    async with service.service.database.snapshot() as tx:
        found = await tx.execute(
            sa.select(*columns).order_by(*(derived.table.c[name] for name in derived.key))
        )
        return [dict(row) for row in found.mappings()]


def altered(value: Any, column: sa.Column[Any], chance: random.Random) -> Any:
    """Another value of the same column."""
    if isinstance(value, datetime) or (value is None and column.name == "valid_until"):
        return (value or datetime(2030, 1, 1, tzinfo=UTC)).replace(microsecond=chance.randrange(1, 999_999))
    if isinstance(value, bool):
        return not value
    if isinstance(value, int) or isinstance(column.type, sa.Integer):
        return (value or 0) + chance.randrange(1, 9)
    if isinstance(value, dict):
        return {**value, "altered": chance.random()}
    return f"{value or ''}altered{chance.randrange(1_000_000)}"


def all_alterations(tables: Sequence[DerivedTable]) -> list[tuple[DerivedTable, str]]:
    """Each column, each key column, a deleted and an inserted row of each derived table."""
    chosen = [
        (derived, column)
        for derived in tables
        for column in (*derived.key, *derived.columns)
        # The bytes are filed under these; they are what everything else follows from.
        if not (derived is rows.EVENTS and column in derived.key)
        and not (derived is rows.CLAIMS and column in derived.key)
    ]
    chosen += [
        (derived, verb) for derived in tables for verb in ("DELETE", "INSERT") if derived is not rows.EVENTS
    ]
    # A claim of an event that never came grants nothing, and a name may be kept under which nothing waits any more.
    chosen.remove((rows.CLAIMS, "INSERT"))
    chosen.remove((rows.WAITING, "INSERT"))
    return chosen


async def test_every_planted_alteration_is_found(service: Harness) -> None:
    """A hundred, one at a time: each column of each derived table at least once, deleted and inserted rows too."""
    await shaken(service, users=3, seed=1)
    chance = random.Random(service.service.database.engine.dialect.name)
    chosen = all_alterations([*rows.REPLAYED, rows.ENTITLEMENTS])
    plan = chosen + chance.choices(chosen, k=max(0, ALTERATIONS - len(chosen)))
    assert len(plan) >= ALTERATIONS
    database = service.service.database
    unseen = [
        name
        for alteration in plan
        if (name := await unseen_alteration(service, database, alteration, chance))
    ]
    assert unseen == []
    assert (await check(service)).differences == []


async def test_money_that_somebody_wrote_down_twice_is_found_and_the_first_line_stays(
    service: Harness,
) -> None:
    """The database does not refuse it: two lines of different months know nothing of each other."""
    await shaken(service, users=3, seed=1)
    table = rows.PAYMENTS.table
    before = await service.rows("SELECT * FROM payment_events ORDER BY id")
    async with service.service.database.transaction() as tx:
        line = dict((await tx.execute(sa.select(table).order_by(table.c.id).limit(1))).mappings().one())
        for months in (1, 2):
            second = {
                **line,
                "id": f"{months}",
                "created_at": line["created_at"] + timedelta(days=31 * months),
            }
            await tx.execute(table.insert().values(**second))
    assert (await check(service)).difference_count == 2
    assert (await rebuild_of(service).run()).difference_count == 2
    assert await service.rows("SELECT * FROM payment_events ORDER BY id") == before
    assert (await check(service)).differences == []


async def unseen_alteration(
    service: Harness, database: Database, alteration: tuple[DerivedTable, str], chance: random.Random
) -> str | None:
    """Plants one alteration, checks, takes it back; its description if nothing was found."""
    derived, what = alteration
    table = derived.table
    async with database.snapshot() as tx:
        statement = sa.select(table)
        if derived is rows.SOURCES:
            statement = statement.order_by(table.c.source_key)
        stored = [dict(row) for row in (await tx.execute(statement)).mappings()]
    row = chance.choice(stored)
    changed = dict(row)
    if what == "INSERT":
        for column in derived.key:
            if isinstance(row[column], str) and column not in ("kind", "account"):
                changed[column] = f"{row[column]}x"
        if "id" in changed:
            changed["id"] = f"{row['id']}x"
    elif what != "DELETE":
        changed[what] = altered(row[what], table.c[what], chance)
    await replace_row(
        database, table, None if what == "INSERT" else row, None if what == "DELETE" else changed
    )
    found = (await check(service)).difference_count
    await replace_row(
        database, table, None if what == "DELETE" else changed, None if what == "INSERT" else row
    )
    return None if found else f"{table.name}.{what} of {row}"


async def replace_row(
    database: Database, table: sa.Table, old: dict[str, Any] | None, new: dict[str, Any] | None
) -> None:
    async with database.transaction() as tx:
        if old is not None:
            keys = list(table.primary_key.columns)
            await tx.execute(table.delete().where(*(column == old[column.name] for column in keys)))
        if new is not None:
            await tx.execute(table.insert().values(**new))


CHILD = """
import asyncio, resource, sys, time
from backend.app.billing.catalog_diff import compare_catalogs
from backend.app.billing.masking import mask_sensitive
from backend.app.billing.models import webhook_events
from backend.app.billing.rebuild import Rebuild
from backend.app.core.clock import SystemClock
from backend.app.core.database import Database
from backend.app.main import load_catalog
from backend.app.core.settings import Settings

async def main():
    database = Database.open(sys.argv[1])
    settings = Settings(database_url=sys.argv[1])
    catalog = load_catalog(settings)
    rebuild = Rebuild(database, catalog, clock=SystemClock(), livemode=False)
    started = time.monotonic()
    assert (await rebuild.run()).difference_count > 0
    rebuilt = time.monotonic()
    report = await rebuild.check()
    checked = time.monotonic()
    assert report.differences == [], report.differences[:3]
    diff = await compare_catalogs(database, catalog, catalog, now=SystemClock().now())
    ended = time.monotonic()
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert diff.users_changed == 0
    print(report.events, diff.users, kib, rebuilt - started, checked - rebuilt, ended - checked)
    await database.close()

asyncio.run(main())
"""


async def grow(url: str, users: int, *, events_per_user: int, first: int = 0) -> None:
    """Stores many users' events as they came; a rebuild makes all else of them."""
    now = unix_now()
    came = datetime.fromtimestamp(now, UTC)
    database = Database.open(url)
    for start in range(first, first + users, 100):
        found: list[dict[str, Any]] = []
        for number in range(start, min(start + 100, first + users)):
            # One of those who neither got a refund nor ended.
            name = 12 * number + 2
            events = life(name, now=now)
            events += [
                objects.event(
                    f"evt_{name}_more_{place}",
                    "charge.succeeded",
                    objects.charge(f"ch_{name}_{place}", customer=f"cus_{name}"),
                    created=now - DAY_SECONDS,
                )
                for place in range(len(events), events_per_user)
            ]
            found += events[:events_per_user]
        async with database.transaction() as tx:
            await tx.execute(
                webhook_events.insert(),
                [
                    {
                        "account": "",
                        "livemode": False,
                        "event_id": event["id"],
                        "event_type": event["type"],
                        "api_version": event["api_version"],
                        "occurred_at": datetime.fromtimestamp(event["created"], UTC),
                        "received_at": came,
                        "status": "success",
                        "attempts": 1,
                        "payload": mask_sensitive(json.dumps(event).encode()),
                        "payload_sha256": "",
                        "position": start * events_per_user + place + 1,
                    }
                    for place, event in enumerate(found)
                ],
            )
    await database.close()


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a rebuild, its check and a comparison of catalogs took in a process of their own."""

    events: int
    users: int
    megabytes: float
    rebuild_seconds: float
    check_seconds: float
    diff_seconds: float


def measured(url: str) -> Measured:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, url],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 0, done.stderr
    events, users, kib, rebuild_seconds, check_seconds, diff_seconds = done.stdout.split()
    return Measured(
        events=int(events),
        users=int(users),
        megabytes=int(kib) / 1024,
        rebuild_seconds=float(rebuild_seconds),
        check_seconds=float(check_seconds),
        diff_seconds=float(diff_seconds),
    )


async def test_memory_does_not_grow_with_the_number_of_users(
    migrated_sqlite_url: str, migrated_sqlite_template: Path, tmp_path: Path
) -> None:
    """Four times the users, and no more than a little noise in the peak."""
    copy = tmp_path / "few.db"
    shutil.copyfile(migrated_sqlite_template, copy)
    await grow(f"sqlite:///{copy}", 50, events_per_user=12)
    few = measured(f"sqlite:///{copy}")
    await grow(migrated_sqlite_url, 200, events_per_user=12)
    many = measured(migrated_sqlite_url)
    assert (few.events, many.events) == (600, 2_400)
    # Both fill whole batches; all 1,800 further events with what follows from them would be tens of MB.
    assert many.megabytes - few.megabytes < 8


@pytest.mark.long
@pytest.mark.timeout(7_200)
async def test_ten_thousand_users_fit_into_300_mb(
    migrated_sqlite_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    await grow(migrated_sqlite_url, 10_000, events_per_user=20)
    found = measured(migrated_sqlite_url)
    with capsys.disabled():
        sys.stdout.write(
            f"\n{found.events} events of {found.users} users: {found.megabytes:.0f} MB; events/s: rebuild "
            f"{found.events / found.rebuild_seconds:.0f}, check {found.events / found.check_seconds:.0f}, "
            f"catalog diff {found.events / found.diff_seconds:.0f}\n"
        )
    assert (found.events, found.users) == (200_000, 10_000)
    assert found.megabytes < 300
