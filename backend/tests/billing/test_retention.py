"""Bodies of old events go, and nothing that was promised goes with them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from backend.app.billing import retention
from backend.app.billing import store_rebuild as rows
from backend.app.billing.models import webhook_events
from backend.app.billing.rebuild import Rebuild
from backend.app.billing.retention import Report, Retention
from backend.app.billing.webhooks import BillingWebhooks
from backend.app.core.api_keys import Scope
from backend.app.core.clock import SystemClock, iso
from backend.app.core.database import Database
from backend.app.core.settings import Settings
from backend.app.main import SHIPPED_CATALOG, load_catalog
from backend.app.simulator import objects
from backend.app.simulator.objects import MONTH_SECONDS
from backend.app.simulator.truth import read_terms
from backend.app.simulator.world import START, Plan, live
from backend.tests.billing.test_pseudonymise import EMAIL, pseudonymised
from backend.tests.billing.test_pseudonymise import life as personal_life
from backend.tests.billing.test_rebuild import (
    ALTERATIONS,
    all_alterations,
    check,
    guests,
    life,
    lose_and_make_again,
    rebuild_of,
    shaken,
    unseen_alteration,
)
from backend.tests.billing.test_rebuild_live import STORIES, Admin
from backend.tests.domain.situations import SITUATIONS
from backend.tests.faults.processes import environment
from backend.tests.support.billing import Harness, SettableClock, deliver_all, running_service, unix_now
from backend.tests.support.load import send_all
from backend.tests.support.service import ServiceProcess

MONTHS = 13
# So long after the last delivery all that was delivered is older than MONTHS.
LATER_DAYS = 400
# What is parked of `guests`: of nobody, of an unknown price, unreadable. The event of the other mode is settled.
PARKED = {"evt_guest", "evt_odd", "evt_bad"}
# All that must be as before; the audit log gains rows, and is looked at by itself.
UNTOUCHED = (
    *("webhook_claims", "facts", "links", "customer_ties", "sources", "payment_events"),
    *("user_entitlements", "entitlement_history", "outbox"),
)


class Stopped(BaseException):
    """Stands for whatever ends a process."""


def retention_of(service: Harness, *, months: int = MONTHS) -> Retention:
    return Retention(service.service.database, service.clock, months=months)


async def later(service: Harness) -> Report:
    """Lets the months pass, and then the bodies go."""
    service.clock.advance(days=LATER_DAYS)
    return await retention_of(service).run()


async def bodies(service: Harness) -> dict[str, bytes | None]:
    found = await service.rows("SELECT event_id, payload FROM webhook_events")
    return {row["event_id"]: row["payload"] and bytes(row["payload"]) for row in found}


async def everything_else(service: Harness) -> dict[str, list[dict[str, Any]]]:
    """All rows, of events without bodies and what stands for them, of messages without their deliveries."""
    found = {
        table: sorted(await service.rows(f"SELECT * FROM {table}"), key=repr)
        for table in (*UNTOUCHED, "webhook_events")
    }
    for row in found["webhook_events"]:
        del row["payload"], row["assertion"]
    found["outbox"] = sorted(({"id": row["id"]} for row in found["outbox"]), key=repr)
    return found


async def audited(service: Harness) -> list[dict[str, Any]]:
    """The details of the audit rows that retention left."""
    found = await service.rows(
        "SELECT details, actor, resource_id FROM audit_logs WHERE action = 'retention.let_go' ORDER BY id"
    )
    assert {row["actor"] for row in found} <= {"cli:retention"}
    return [
        {
            **(row["details"] if isinstance(row["details"], dict) else json.loads(row["details"])),
            "run": row["resource_id"],
        }
        for row in found
    ]


async def ask(service: Harness, path: str, **query: Any) -> Any:
    key = await service.service.api_keys.create("alice", Scope.ADMIN)
    return await service.client.post(path, params=query, headers={"Authorization": f"Bearer {key}"})


async def test_only_the_bodies_of_settled_events_go_and_all_else_stays(service: Harness) -> None:
    """Claims, answers, hashes, ledger, entitlements and messages are as before; what is parked keeps its body."""
    sent = [event for number in range(3) for event in life(number, now=unix_now())] + guests(unix_now())
    for event in sent:
        await service.deliver(event)
    before, were = await everything_else(service), await bodies(service)
    report = await later(service)
    assert await everything_else(service) == before
    now = await bodies(service)
    assert {event_id for event_id, body in now.items() if body is not None} == PARKED
    gone = [body for event_id, body in were.items() if event_id not in PARKED and body is not None]
    assert (report.bodies, report.body_bytes) == (len(gone), sum(map(len, gone)))
    assert (report.waiting, report.unreadable) == (len(PARKED), 0)
    hashes = await service.rows("SELECT event_id, payload_sha256 FROM webhook_events")
    assert {row["event_id"]: row["payload_sha256"] for row in hashes} == {
        event["id"]: hashlib.sha256(json.dumps(event).encode()).hexdigest() for event in sent
    }


async def test_a_duplicate_gets_the_same_bytes_and_has_no_second_effect(service: Harness) -> None:
    events = [*life(1, now=unix_now()), *guests(unix_now())]
    first = [await service.deliver(event) for event in events]
    await later(service)
    before, were = await everything_else(service), await bodies(service)
    again = [await service.deliver(event) for event in events]
    assert [answer.content for answer in again] == [answer.content for answer in first]
    assert {answer.headers.get("Idempotent-Replayed") for answer in again} == {"true"}
    assert (await everything_else(service), await bodies(service)) == (before, were)


@pytest.mark.parametrize("seed", range(2))
async def test_a_check_finds_no_difference_without_the_bodies(service: Harness, seed: int) -> None:
    """Disorder, duplicates, late ties and parked events; and what comes afterwards for the same people."""
    await shaken(service, users=6, seed=seed)
    assert (await later(service)).bodies > 0
    report = await check(service)
    assert (report.differences, report.events) == ([], await service.count("webhook_events"))
    for number in range(3):
        charge = objects.charge(f"ch_late_{number}", customer=f"cus_{number}")
        await service.deliver(objects.event(f"evt_l{number}", "charge.succeeded", charge, created=unix_now()))
    assert (await check(service)).differences == []


async def test_a_check_finds_no_difference_in_simulated_lives_without_their_bodies(service: Harness) -> None:
    """Random lives with all that a seller meets."""
    plan = Plan(seed=29, start=START, days=120, terms=read_terms(SHIPPED_CATALOG.read_text("utf-8")))
    await deliver_all(service, [live(plan, number) for number in range(12)])
    assert (await check(service)).differences == []
    report = await later(service)
    assert report.bodies > 100
    assert (await check(service)).differences == []


async def test_a_check_finds_no_difference_in_any_situation_without_the_bodies(
    sqlite_service: Harness,
) -> None:
    """Each situation in an account of its own; a customer's clock and an account that left included."""
    service = sqlite_service
    for number, situation in enumerate(SITUATIONS):
        for step in situation.story:
            if isinstance(step, tuple):
                continue
            envelope = step.envelope
            body = {
                "id": envelope.id,
                "object": "event",
                "type": envelope.type,
                "api_version": envelope.api_version,
                "created": int(envelope.occurred_at.timestamp()),
                "livemode": envelope.livemode,
                "account": f"acct_{number}",
                "data": {"object": step.object, "previous_attributes": step.previous_attributes},
            }
            assert (await service.deliver(body)).status_code == 200
    # Whoever lost access with a whole account hears of it with the next event; a rebuild is one.
    await rebuild_of(service).run()
    assert (await check(service)).differences == []
    report = await later(service)
    assert report.bodies > len(SITUATIONS)
    assert (await check(service)).differences == []


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
async def test_what_people_said_stays_in_its_place_among_events_without_bodies(
    service: Harness, story: Callable[[Harness, Admin], Coroutine[Any, Any, None]]
) -> None:
    await story(service, Admin(service))
    await later(service)
    assert (await rebuild_of(service).run()).difference_count == 0


async def test_everything_derived_can_be_lost_and_made_again_without_the_bodies(service: Harness) -> None:
    await shaken(service, users=3, seed=5)
    await later(service)
    await lose_and_make_again(service)


async def test_every_planted_alteration_is_still_found_without_the_bodies(service: Harness) -> None:
    """As with the bodies: a hundred, each column of each derived table at least once."""
    await shaken(service, users=3, seed=1)
    await later(service)
    chance = random.Random(service.service.database.engine.dialect.name)
    chosen = all_alterations([*rows.REPLAYED, rows.ENTITLEMENTS])
    plan = chosen + chance.choices(chosen, k=max(0, ALTERATIONS - len(chosen)))
    database = service.service.database
    unseen = [
        name
        for alteration in plan
        if (name := await unseen_alteration(service, database, alteration, chance))
    ]
    assert unseen == []
    assert (await check(service)).differences == []


async def test_an_altered_assertion_is_found_by_what_no_longer_follows_from_it(service: Harness) -> None:
    for event in life(1, now=unix_now()):
        await service.deliver(event)
    await later(service)
    (row,) = await service.rows("SELECT assertion FROM webhook_events WHERE event_id = 'evt_1_1'")
    text = row["assertion"] if isinstance(row["assertion"], str) else json.dumps(row["assertion"])
    assert "2999" in text
    async with service.service.database.transaction() as tx:
        await tx.execute(
            webhook_events.update()
            .where(webhook_events.c.event_id == "evt_1_1")
            .values(assertion=json.loads(text.replace("2999", "1")))
        )
    assert "payment_events" in {difference.table for difference in (await check(service)).differences}


async def test_the_database_refuses_to_lose_both_body_and_assertion(service: Harness) -> None:
    await service.deliver(life(1, now=unix_now())[0])
    with pytest.raises(sa.exc.IntegrityError):
        async with service.service.database.transaction() as tx:
            await tx.execute(sa.text("UPDATE webhook_events SET payload = NULL"))


async def test_a_second_run_lets_nothing_go_and_leaves_no_audit_row(service: Harness) -> None:
    await shaken(service, users=2, seed=11)
    first = await later(service)
    logs = await service.count("audit_logs")
    second = await retention_of(service).run()
    assert (first.bodies > 0, second.bodies, second.body_bytes) == (True, 0, 0)
    assert second.waiting == first.waiting
    assert await service.count("audit_logs") == logs


async def test_a_preview_tells_what_a_run_does_and_changes_nothing(service: Harness) -> None:
    await shaken(service, users=2, seed=11)
    service.clock.advance(days=LATER_DAYS)
    before, were = await everything_else(service), await bodies(service)
    logs = await service.count("audit_logs")
    told = await retention_of(service).preview()
    assert (await everything_else(service), await bodies(service)) == (before, were)
    assert await service.count("audit_logs") == logs
    assert await retention_of(service).run() == told


async def test_what_came_at_the_horizon_or_after_it_stays(service: Harness) -> None:
    came = datetime(2026, 8, 31, 7, 30, tzinfo=UTC)
    *_, early, _, late = life(1, now=int(came.timestamp()))[:10]
    service.clock.instant = came - timedelta(microseconds=1)
    await service.deliver(early)
    service.clock.instant = came
    await service.deliver(late)
    service.clock.instant = datetime(2026, 10, 31, 7, 30, tzinfo=UTC)
    report = await retention_of(service, months=2).run()
    assert report.received_before == came
    assert {name: body is None for name, body in (await bodies(service)).items()} == {
        early["id"]: True,
        late["id"]: False,
    }
    service.clock.advance(days=1)
    assert (await retention_of(service, months=2).run()).bodies == 1


async def test_what_was_parked_loses_its_body_once_it_is_settled(service: Harness) -> None:
    """A purchase of an unknown customer, who is named more than a year later."""
    purchase = objects.checkout_session("cs_1", customer="cus_1", metadata={"plan_code": "premium"})
    await service.deliver(
        objects.event("evt_1", "checkout.session.completed", purchase, created=unix_now() - 60)
    )
    assert (await later(service)).waiting == 1
    named = objects.checkout_session(
        "cs_2", customer="cus_1", client_reference_id="user_1", metadata={"plan_code": "premium"}
    )
    await service.deliver(objects.event("evt_2", "checkout.session.completed", named, created=unix_now()))
    report = await retention_of(service).run()
    assert (report.bodies, report.waiting) == (1, 0)
    assert {name: body is None for name, body in (await bodies(service)).items()} == {
        "evt_1": True,
        "evt_2": False,
    }
    assert (await check(service)).differences == []


async def test_a_failed_event_keeps_its_body_until_it_is_processed(
    service: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stripe has long given it up; a person can still have it processed."""
    event = life(1, now=unix_now())[7]
    with monkeypatch.context() as broken:
        broken.setattr(BillingWebhooks, "_assertion", lambda *_: 1 / 0)
        assert (await service.deliver(event)).status_code == 500
    report = await later(service)
    assert (report.bodies, report.waiting) == (0, 1)
    response = await ask(service, f"/api/v1/events/{event['id']}/reprocess")
    assert response.status_code == 200, response.text
    assert (await retention_of(service).run()).bodies == 1
    assert (await check(service)).differences == []


@pytest.mark.parametrize("dry_run", [False, True])
async def test_reprocessing_says_that_the_body_was_let_go_and_changes_nothing(
    service: Harness, dry_run: bool
) -> None:
    for event in life(1, now=unix_now()):
        await service.deliver(event)
    await later(service)
    before = await everything_else(service)
    logs = await service.count("audit_logs")
    response = await ask(service, "/api/v1/events/evt_1_0/reprocess", dry_run=dry_run)
    assert (response.status_code, response.headers["content-type"]) == (409, "application/problem+json")
    assert "body was let go by retention" in response.json()["detail"]
    assert await everything_else(service) == before
    assert await service.count("audit_logs") == logs


async def test_an_event_whose_body_goes_while_it_is_reprocessed_is_not_changed(
    migrated_postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or it could become parked without a body; on SQLite the one writer rules that out."""
    async with running_service(migrated_postgres_url) as service:
        for event in life(1, now=unix_now()):
            await service.deliver(event)
        service.clock.advance(days=LATER_DAYS)
        original = BillingWebhooks.process

        async def process_late(webhooks: BillingWebhooks, *arguments: Any) -> Any:
            decision = await original(webhooks, *arguments)
            assert (await retention_of(service).run()).bodies > 0
            return decision

        before = await everything_else(service)
        with monkeypatch.context() as patched:
            patched.setattr(BillingWebhooks, "process", process_late)
            response = await ask(service, "/api/v1/events/evt_1_0/reprocess")
        assert response.status_code == 409, response.text
        assert await everything_else(service) == before


async def test_an_event_without_body_that_a_rebuild_parks_is_settled_once_its_price_is_known_again(
    migrated_url: str, tmp_path: Path
) -> None:
    """A price is taken out of the catalog and put back: what the event asserted is enough for both."""
    path = tmp_path / "other.toml"
    path.write_text(SHIPPED_CATALOG.read_text("utf-8").replace('lookup_keys = ["vip", ', "lookup_keys = ["))
    now = unix_now()
    content = objects.subscription(
        "sub_1",
        customer="cus_1",
        prices=[objects.price("vip")],
        period_start=now - 60,
        period_end=now + 24 * MONTH_SECONDS,
        metadata={"user_id": "user_1"},
    )
    event = objects.event("evt_1", "customer.subscription.created", content, created=now - 60)
    async with running_service(migrated_url) as service:
        await service.deliver(event)
        await later(service)
    async with running_service(migrated_url, catalog_file=path) as service:
        await rebuild_of(service).run()
        assert (await service.entitlements("user_1"))["plan_code"] == "free"
        (row,) = await service.rows("SELECT status, reason, payload FROM webhook_events")
        assert row == {"status": "parked", "reason": "unknown_price:vip", "payload": None}
        # It can't be read again, so it stands in nobody's way.
        response = await ask(service, "/api/v1/events/reprocess-parked")
        assert (response.status_code, response.json()["data"]) == (200, [])
    async with running_service(migrated_url) as service:
        for _ in range(100):
            (row,) = await service.rows("SELECT status, payload FROM webhook_events")
            if row["status"] == "success":
                break
            await asyncio.sleep(0.02)
        assert row == {"status": "success", "payload": None}
        assert (await service.entitlements("user_1"))["plan_code"] == "vip"
        assert (await check(service)).differences == []


async def test_a_customer_deleted_after_retention_leaves_nothing_personal(service: Harness) -> None:
    """What stands for a body has nothing personal; bodies that are still there lose it as ever."""
    *past, deleted = personal_life()
    for event in past:
        await service.deliver(event)
    assert (await later(service)).bodies == len(past)
    await service.deliver(deleted)
    await pseudonymised(service)
    stored = await service.rows("SELECT * FROM webhook_events")
    assert EMAIL not in str(stored)
    (row,) = [row for row in stored if row["payload"] is not None]
    assert (row["event_id"], b"[erased]" in bytes(row["payload"])) == (deleted["id"], True)
    assert (await check(service)).differences == []


async def test_what_was_pseudonymised_stays_so_and_asserts_the_same_without_its_body(
    service: Harness,
) -> None:
    for event in personal_life():
        await service.deliver(event)
    await pseudonymised(service)
    await later(service)
    stored = await service.rows("SELECT payload, assertion FROM webhook_events")
    assert {row["payload"] for row in stored} == {None}
    assert EMAIL not in str(stored)
    assert (await check(service)).differences == []


async def test_events_of_the_other_mode_mean_what_they_meant_whichever_mode_is_set(service: Harness) -> None:
    """Retention does not ask for the mode: a check for either mode finds what it found before."""
    events = life(1, now=unix_now()) + [
        {**event, "id": f"{event['id']}_live", "livemode": True} for event in life(2, now=unix_now())
    ]
    for event in events:
        await service.deliver(event)

    async def differences(*, livemode: bool) -> list[Any]:
        made = service.service
        report = await Rebuild(made.database, made.catalog, clock=service.clock, livemode=livemode).check()
        return sorted((each.table, each.key, each.column) for each in report.differences)

    service.clock.advance(days=LATER_DAYS)
    before = [await differences(livemode=livemode) for livemode in (False, True)]
    assert (before[0], len(before[1]) > 0) == ([], True)
    assert (await retention_of(service).run()).bodies == len(events)
    assert [await differences(livemode=livemode) for livemode in (False, True)] == before


async def test_a_body_that_can_not_be_understood_or_is_another_events_stays(service: Harness) -> None:
    """What it asserts can't be told, so it must not be lost; all others go."""
    for event in life(1, now=unix_now()):
        await service.deliver(event)
    async with service.service.database.transaction() as tx:
        for event_id, body in (
            ("evt_1_0", b"\xff"),
            ("evt_1_1", json.dumps({**life(1, now=unix_now())[1], "data": {"object": {"id": 7}}}).encode()),
            ("evt_1_3", json.dumps(life(2, now=unix_now())[3]).encode()),
        ):
            await tx.execute(
                webhook_events.update().where(webhook_events.c.event_id == event_id).values(payload=body)
            )
    told = await later(service)
    assert (told.unreadable, sorted(told.unreadable_ids)) == (3, ["evt_1_0", "evt_1_1", "evt_1_3"])
    assert {name for name, body in (await bodies(service)).items() if body} == set(told.unreadable_ids)


async def test_each_audit_row_tells_how_much_went_since_when_and_in_which_run(
    service: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "BATCH_EVENTS_MAX", 4)
    monkeypatch.setattr(retention, "PAGE_EVENTS", 7)
    await shaken(service, users=2, seed=3)
    report = await later(service)
    details = await audited(service)
    assert len(details) > 3
    assert sum(each["bodies"] for each in details) == report.bodies
    assert sum(each["bytes"] for each in details) == report.body_bytes
    assert len({each["run"] for each in details}) == 1
    assert {(each["months"], each["received_before"]) for each in details} == {
        (MONTHS, iso(report.received_before))
    }


async def test_a_batch_holds_no_more_bytes_than_its_bound(
    sqlite_service: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So large bodies cost no more memory than many; one above the bound goes by itself."""
    await shaken(sqlite_service, users=2, seed=3)
    largest = max(len(body) for body in (await bodies(sqlite_service)).values() if body)
    monkeypatch.setattr(retention, "BATCH_BYTES_MAX", largest - 1)
    report = await later(sqlite_service)
    details = await audited(sqlite_service)
    assert sum(each["bodies"] for each in details) == report.bodies
    assert all(each["bytes"] < largest or each["bodies"] == 1 for each in details)


def stop_in_batch(patched: pytest.MonkeyPatch, number: int, *, committed: bool) -> None:
    """Ends a process in its n-th batch: right before its commit or right after it."""
    original = Database.transaction
    batches = 0

    @contextlib.asynccontextmanager
    async def transaction(database: Database) -> Any:
        nonlocal batches
        batches += 1
        async with original(database) as tx:
            yield tx
            if batches == number and not committed:
                raise Stopped
        if batches == number:
            raise Stopped

    patched.setattr(Database, "transaction", transaction)


@pytest.mark.parametrize("committed", [False, True], ids=["rolled-back", "committed"])
async def test_a_run_stopped_at_any_batch_is_gone_on_with_by_the_next(
    service: Harness, monkeypatch: pytest.MonkeyPatch, committed: bool
) -> None:
    """Before its commit or right after it: what is gone is what the audit log says, and the rest goes later."""
    monkeypatch.setattr(retention, "BATCH_EVENTS_MAX", 5)
    await shaken(service, users=2, seed=3)
    service.clock.advance(days=LATER_DAYS)
    told = await retention_of(service).preview()
    stops = 0
    while True:
        try:
            with monkeypatch.context() as patched:
                stop_in_batch(patched, stops + 2, committed=committed)
                await retention_of(service).run()
            break
        except Stopped:
            stops += 1
        gone = [name for name, body in (await bodies(service)).items() if body is None]
        assert sum(each["bodies"] for each in await audited(service)) == len(gone)
        assert (await check(service)).differences == []
    assert stops > 1
    details = await audited(service)
    assert sum(each["bodies"] for each in details) == told.bodies
    assert sum(each["bytes"] for each in details) == told.body_bytes


async def test_retention_beside_a_serving_process_fails_and_changes_no_delivery(
    migrated_url: str, tmp_path: Path
) -> None:
    """Deliveries, and the same ones again, keep arriving in another process while bodies go here."""
    now = unix_now()
    sent = [json.dumps(event).encode() for number in range(12) for event in life(number, now=now)]
    database = Database.open(migrated_url)
    settings = Settings(database_url=migrated_url)
    # To this clock all that has just come is old.
    clock = SettableClock()
    clock.advance(days=LATER_DAYS)
    with ServiceProcess.start(tmp_path, environment(migrated_url)) as service:
        thrice = [body for body in sent for _ in range(3)]
        sending = asyncio.create_task(send_all([service.port], thrice, connections=4))
        runs = gone = 0
        while not sending.done():
            gone += (await Retention(database, clock, months=MONTHS).run()).bodies
            runs += 1
        replies = await sending
        gone += (await Retention(database, clock, months=MONTHS).run()).bodies
        again = await send_all([service.port], sent, connections=4)
    assert [reply.status if reply else None for reply in replies] == [200] * len(sent) * 3
    first = {json.loads(reply.body)["event_id"]: reply.body for reply in replies if reply}
    assert {reply.body for reply in [*replies, *again] if reply} == set(first.values())
    assert runs > 1
    assert gone == len(sent)
    rebuild = Rebuild(database, load_catalog(settings), clock=SystemClock(), livemode=False)
    report = await rebuild.check()
    assert (report.differences, report.events) == ([], len(sent))
    await database.close()


async def test_two_runs_at_once_do_each_body_once(service: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "BATCH_EVENTS_MAX", 3)
    await shaken(service, users=3, seed=3)
    service.clock.advance(days=LATER_DAYS)
    told = await retention_of(service).preview()
    await asyncio.gather(*(retention_of(service).run() for _ in range(3)))
    await retention_of(service).run()
    details = await audited(service)
    assert sum(each["bodies"] for each in details) == told.bodies
    assert (await retention_of(service).preview()).bodies == 0
