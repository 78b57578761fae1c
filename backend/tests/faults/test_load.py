"""Two processes under load, with duplicates and bad events among the good ones: the bad ones fail, and they alone."""

from __future__ import annotations

import contextlib
import json
import random
import secrets
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import asyncpg  # type: ignore[import-untyped]  # the driver ships no types
import pytest

from backend.app.billing.entitlements import EntitlementService
from backend.app.billing.rebuild import Rebuild
from backend.app.core.clock import SystemClock, from_unix
from backend.app.core.database import Database
from backend.app.core.settings import Settings
from backend.app.main import SHIPPED_CATALOG, load_catalog
from backend.app.simulator.delivery import Network
from backend.app.simulator.replay import compare, said
from backend.app.simulator.runner import route_of
from backend.app.simulator.truth import read_terms
from backend.app.simulator.world import START, Plan, live
from backend.tests.faults import events
from backend.tests.faults.ledger import Ledger, Row, assert_history_is_gapless, count, open_ledger
from backend.tests.faults.processes import servers
from backend.tests.faults.report import report
from backend.tests.support.billing import running_service
from backend.tests.support.load import Reply, metric, send_all
from backend.tests.support.servers import PostgresServer

CONNECTIONS = 32
# One in five deliveries is of an event that was sent before, so one event in four is sent twice.
DUPLICATE_EVERY = 4
# How far behind the first one: next to it, so that two processes have it at the same moment, or a little later.
DUPLICATE_DISTANCE_MAX = 12
BAD_EVERY = 50
# A life of 90 days has about thirty events.
EVENTS_PER_LIFE = 30
# So many events that wait for a price share these few, and with them the owner's alert about each.
UNKNOWN_PRICES = 5
UNKNOWN_PRICE_EVERY = 20
ROUGH = Network(duplicates=0.0, disorder=0.4, delay=0.05, loss=0.0)

# What the test's database does to an event whose id is in the table: by this SQLSTATE its transaction ends at
# the last of its writes.
REFUSE = """
CREATE TABLE refused (event_id text PRIMARY KEY, sqlstate text NOT NULL);
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE refusal text := (SELECT r.sqlstate FROM refused r WHERE r.event_id = NEW.event_id);
BEGIN
    IF refusal IS NOT NULL THEN
        RAISE EXCEPTION 'refused on purpose: %', NEW.event_id USING ERRCODE = refusal;
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER refuse BEFORE INSERT ON webhook_events FOR EACH ROW
    WHEN (NEW.status <> 'failed') EXECUTE FUNCTION refuse();
"""
# raise_exception, which means a bug of ours, and lock_not_available, which means that somebody was in the way.
BROKEN, BUSY = "P0001", "55P03"
REFUSED_STATUS = {BROKEN: 500, BUSY: 503}

# All that is said of an event's consequences; what is left out are random ids, times of writing, and what is
# derived from them. The hash is that of the bytes as they came; a deleted customer's are erased a minute later.
WRITTEN = {
    "webhook_events": "event_id, event_type, occurred_at, payload_sha256, status, reason, user_id,"
    " plan_code, customer_id, subject_key, answer",
    "user_entitlements": "user_id, plan_code, entitlements, status, valid_until, version",
    "entitlement_history": "user_id, version, change, plan_code, entitlements, status, valid_until, cause_event_id",
    "payment_events": "stripe_event_id, user_id, event_type, plan_code, customer_id, invoice_id,"
    " subscription_id, amount, currency, settled, metadata, effect_key, subject_key, occurred_at",
    # See above.
    "audit_logs WHERE action <> 'customer.pseudonymised'": "user_id, action, resource_type, details, actor",
    "facts": "subject_key, series, as_of, event_id, inherited, body",
    "links": "child, parent",
    "sources": "source_key, customer_id, user_id",
    "customer_ties": "customer_id, user_id, via, occurred_at, event_id",
    "outbox": "kind, dedupe_key",
}


@dataclass(frozen=True, slots=True)
class Stream:
    """Deliveries in the order in which they are sent, and what is wrong with some of them, by place or by event id."""

    bodies: list[bytes]
    forged: frozenset[int]
    unreadable: frozenset[int]
    refused: dict[str, str]

    @property
    def genuine(self) -> list[bytes]:
        """The deliveries that are a genuine event, whether the database takes it or not."""
        bad = self.forged | self.unreadable
        return [body for place, body in enumerate(self.bodies) if place not in bad]


def event_id(body: bytes) -> str:
    return str(json.loads(body)["id"])


def stream_of(plan: Plan, lives: int, chance: random.Random) -> Stream:
    """Whole lives side by side, one in five deliveries a duplicate, one in fifty bad in one of four ways."""
    happened = sorted(
        (event["created"], number, place, events.wire(event))
        for number in range(lives)
        for place, event in enumerate(route_of(plan, number, ROUGH).delivered)
    )
    genuine = [body for *_, body in happened]
    for number in range(len(genuine) // UNKNOWN_PRICE_EVERY):
        waiting = events.subscription(
            f"unpriced{number}",
            subscription_id=f"sub_unpriced{number}",
            customer=f"cus_unpriced{number}",
            user_id=f"user_unpriced{number}",
            price=f"unpriced_{number % UNKNOWN_PRICES}",
        )
        genuine.insert(chance.randrange(len(genuine)), waiting)

    sent: list[tuple[float, str, bytes]] = []
    refused: dict[str, str] = {}
    for place, body in enumerate(genuine):
        sent.append((place, "good", body))
        if place % DUPLICATE_EVERY == 0:
            sent.append((place + chance.choice((0, chance.uniform(0, DUPLICATE_DISTANCE_MAX))), "good", body))
        if place % BAD_EVERY == 0:
            kind = (place // BAD_EVERY) % 4
            if kind == 0:
                sent.append((place, "forged", body))
            elif kind == 1:
                sent.append((place, "unreadable", b'{"object": "event", "type": "charge.succeeded"}'))
            else:
                # Some of them are sent twice, and fail twice.
                refused[event_id(body)] = BROKEN if kind == 2 else BUSY
    sent.sort(key=lambda entry: entry[0])
    return Stream(
        [body for *_, body in sent],
        frozenset(place for place, (_, what, _) in enumerate(sent) if what == "forged"),
        frozenset(place for place, (_, what, _) in enumerate(sent) if what == "unreadable"),
        refused,
    )


def expected_status(stream: Stream, place: int) -> int:
    if place in stream.forged:
        return 403
    if place in stream.unreadable:
        return 400
    refusal = stream.refused.get(event_id(stream.bodies[place]))
    return 200 if refusal is None else REFUSED_STATUS[refusal]


def assert_first_answers_are_repeated(stream: Stream, replies: Iterable[Reply]) -> int:
    """Of each event's answers one is the first, and all are the same bytes; how many were repeats."""
    answers: dict[str, list[Reply]] = defaultdict(list)
    for body, reply in zip(stream.bodies, replies, strict=True):
        if reply.status == 200:
            answers[event_id(body)].append(reply)
    for name, found in answers.items():
        assert len({reply.body for reply in found}) == 1, name
        first = [reply for reply in found if "idempotent-replayed" not in reply.headers]
        assert len(first) == 1, name
    return sum(len(found) - 1 for found in answers.values())


async def assert_each_effect_is_there_once(ledger: Ledger, expected: set[str]) -> None:
    """One claim and one row for each event, one audit row for each ledger line and each version of a user."""
    for processed in ("webhook_claims", "webhook_events WHERE status <> 'failed'"):
        found = Counter(row["event_id"] for row in await ledger.rows(f"SELECT event_id FROM {processed}"))
        assert found == Counter(expected), processed
    for action, of_audit, of_effects in (
        (
            "payment.event",
            "SELECT details->>'effect_key' AS name, details->>'stripe_event_id' AS cause",
            "SELECT effect_key AS name, stripe_event_id AS cause FROM payment_events",
        ),
        (
            "entitlement.%",
            "SELECT user_id AS name, details->>'version' AS cause",
            "SELECT user_id AS name, version::text AS cause FROM entitlement_history",
        ),
    ):
        audited = await ledger.rows(f"{of_audit} FROM audit_logs WHERE action LIKE '{action}'")
        effects = await ledger.rows(of_effects)
        assert effects
        assert Counter(map(pair, audited)) == Counter(map(pair, effects)), action


def pair(row: Row) -> tuple[str, str]:
    return row["name"], row["cause"]


async def written(ledger: Ledger) -> dict[str, list[str]]:
    """All rows by table, sorted, as text."""
    return {
        table: sorted(str(row) for row in await ledger.rows(f"SELECT {columns} FROM {table}"))
        for table, columns in WRITTEN.items()
    }


async def one_after_the_other(url: str, bodies: Iterable[bytes]) -> dict[str, list[str]]:
    async with running_service(url) as harness, open_ledger(url) as ledger:
        for body in bodies:
            assert (await harness.deliver(body)).status_code == 200
        return await written(ledger)


async def assert_only_the_broken_left_a_trace(ledger: Ledger, stream: Stream) -> None:
    """An attempt that ended in an error of ours is counted; one that met a lock is not."""
    failures = Counter(name for name in map(event_id, stream.genuine) if stream.refused.get(name) == BROKEN)
    found = await ledger.rows("SELECT event_id, attempts FROM webhook_events WHERE status = 'failed'")
    assert {row["event_id"]: row["attempts"] for row in found} == failures


async def assert_nothing_is_held(ledger: Ledger) -> None:
    """No transaction is open and nobody waits for a lock."""
    of_service = "application_name = 'tollkeeper' AND datname = current_database()"
    assert await count(ledger, "pg_stat_activity", of_service) > 0
    assert await count(ledger, "pg_stat_activity", f"{of_service} AND state LIKE '%transaction%'") == 0
    here = "database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    assert await count(ledger, "pg_locks", f"{here} AND (NOT granted OR locktype = 'advisory')") == 0


@contextlib.asynccontextmanager
async def database_that_refuses(url: str, refused: Mapping[str, str]) -> AsyncIterator[None]:
    """Within the block the database ends every transaction that writes one of these events."""
    session = await asyncpg.connect(url)
    try:
        await session.execute(REFUSE)
        await session.executemany("INSERT INTO refused VALUES ($1, $2)", list(refused.items()))
        yield
        await session.execute(
            "DROP TRIGGER refuse ON webhook_events; DROP FUNCTION refuse; DROP TABLE refused"
        )
    finally:
        await session.close()


async def two_processes_under_load(
    url: str, sequential_url: str, postgres: PostgresServer, redis_url: str, directory: Path, *, lives: int
) -> None:
    seed = secrets.randbits(32)
    plan = Plan(seed=seed, start=START, days=90, terms=read_terms(SHIPPED_CATALOG.read_text("utf-8")))
    stream = stream_of(plan, lives, random.Random(seed))
    unique = {event_id(body): body for body in stream.genuine}
    log_start = postgres.log_path.stat().st_size
    with servers(directory, url, redis_url=redis_url, processes=2) as running:
        ports = [service.port for service in running]
        async with database_that_refuses(url, stream.refused), open_ledger(url) as ledger:
            found = await send_all(ports, stream.bodies, connections=CONNECTIONS, forged=stream.forged)
            # One that got no answer would be a good one, on a connection that a bad one had ended.
            replies = [reply for reply in found if reply is not None]
            answers = Counter(reply.status for reply in replies)
            report(f"seed {seed}: {len(found)} deliveries of {len(unique)} events: {dict(answers)}")
            assert len(replies) == len(found)
            for place, reply in enumerate(replies):
                assert reply.status == expected_status(stream, place), (stream.bodies[place], reply)
            repeats = assert_first_answers_are_repeated(stream, replies)
            assert await metric(ports, "billing_webhook_replay_block_total") == repeats > len(unique) / 5
            assert await metric(ports, "idempotent_hits_total", operation="webhook") == repeats
            assert await metric(ports, "billing_webhook_invalid_sig_total") == len(stream.forged)
            changes = await metric(ports, "entitlement_changes_total")
            assert changes == await count(ledger, "entitlement_history")
            await assert_nothing_is_held(ledger)
            await assert_only_the_broken_left_a_trace(ledger, stream)
            await assert_each_effect_is_there_once(ledger, set(unique) - set(stream.refused))
        # Once the database takes them, those that were refused are applied like all others.
        again = await send_all(ports, [unique[name] for name in stream.refused], connections=CONNECTIONS)
        assert {reply.status if reply else None for reply in again} == {200}
        assert not any("idempotent-replayed" in reply.headers for reply in again if reply)
        said_by_services = "".join(service.log_text() for service in running)
    assert said_by_services.count('"webhook_failed"') == answers[500] > 0

    logged = postgres.log_path.read_bytes()[log_start:].decode("utf-8", "replace")
    for name in stream.refused:
        # What the database says of errors does get there.
        assert f"refused on purpose: {name}" in logged
    assert "deadlock detected" not in logged

    async with open_ledger(url) as ledger:
        await assert_each_effect_is_there_once(ledger, set(unique))
        await assert_history_is_gapless(ledger)
        found_state = await written(ledger)
        decided = await ledger.rows("SELECT event_id FROM webhook_events ORDER BY position, event_id")
    await assert_a_rebuild_agrees(url, events_count=len(unique), plan=plan, lives=lives)
    # Whatever they met, it is as if they had come one after the other in the order of the decisions.
    in_order = [unique[row["event_id"]] for row in decided]
    expected_state = await one_after_the_other(sequential_url, in_order)
    for table, rows in expected_state.items():
        assert found_state[table] == rows, table


async def assert_a_rebuild_agrees(url: str, *, events_count: int, plan: Plan, lives: int) -> None:
    """What is stored is what the events say, and what every user is told is the truth of their life."""
    database = Database.open(url)
    try:
        catalog = load_catalog(Settings(database_url=url))
        checked = await Rebuild(database, catalog, clock=SystemClock(), livemode=False).check()
        assert (checked.events, checked.differences) == (events_count, [])
        entitlements = EntitlementService(database, catalog)
        for number in range(lives):
            history = live(plan, number)
            view = await entitlements.view(history.user_id, at=from_unix(history.end))
            assert compare(history, history.end, said(view.entitlement), what="view") == []
    finally:
        await database.close()


@pytest.fixture
def sequential_url(postgres_server: PostgresServer, migrated_postgres_template: str) -> str:
    """A second new PostgreSQL database with this version's schema."""
    return postgres_server.create_database(
        f"sequential_{secrets.token_hex(8)}", template=migrated_postgres_template
    )


async def test_two_processes_under_load_fail_the_bad_events_and_no_others(
    migrated_postgres_url: str,
    sequential_url: str,
    postgres_server: PostgresServer,
    redis_url: str,
    tmp_path: Path,
) -> None:
    await two_processes_under_load(
        migrated_postgres_url,
        sequential_url,
        postgres_server,
        redis_url,
        tmp_path,
        lives=600 // EVENTS_PER_LIFE,
    )


@pytest.mark.long
@pytest.mark.timeout(3_600)
async def test_two_processes_under_a_load_of_twenty_thousand_events_fail_the_bad_ones_and_no_others(
    migrated_postgres_url: str,
    sequential_url: str,
    postgres_server: PostgresServer,
    redis_url: str,
    tmp_path: Path,
) -> None:
    await two_processes_under_load(
        migrated_postgres_url,
        sequential_url,
        postgres_server,
        redis_url,
        tmp_path,
        lives=20_000 // EVENTS_PER_LIFE,
    )
