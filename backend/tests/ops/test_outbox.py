from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import pytest
import sqlalchemy as sa

from backend.app.core.database import Database, metadata
from backend.app.core.errors import StoreUnavailable
from backend.app.observability.metrics import MetricsCollector
from backend.app.ops.outbox import Message, NewMessage, Relay, outbox, stage, stage_many
from backend.tests.support.server_directory import work_directory
from backend.tests.support.servers import PostgresServer

NOW = datetime(2026, 11, 23, 7, 30, tzinfo=UTC)


async def opened(url: str) -> Database:
    database = Database.open(url)
    async with database.transaction() as tx:
        await tx.run_sync(metadata.create_all, tables=[outbox])
    return database


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = await opened(database_url)
    yield database
    await database.close()


class Sink:
    """A receiver that notes what it got, and that can be down."""

    def __init__(self) -> None:
        self.got: list[Message] = []
        self.down = False

    async def __call__(self, message: Message) -> None:
        await asyncio.sleep(0)
        if self.down:
            raise ConnectionError("down, and its key is whsec_abcdefghijklmnop")
        self.got.append(message)

    @property
    def payloads(self) -> list[Any]:
        return [message.payload for message in self.got]


async def put(database: Database, *numbers: int, kind: str = "note") -> None:
    async with database.transaction() as tx:
        await stage_many(tx, [NewMessage(kind=kind, payload={"n": n}) for n in numbers], now=NOW)


async def rows(database: Database) -> list[Any]:
    async with database.snapshot() as tx:
        return list((await tx.execute(sa.select(outbox).order_by(outbox.c.id))).all())


async def until(condition: Callable[[], bool] | Callable[[], Awaitable[bool]], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while True:
            outcome = condition()
            if outcome if isinstance(outcome, bool) else await outcome:
                return
            await asyncio.sleep(0.01)


async def test_a_committed_message_is_delivered_as_it_was_staged_and_then_done(database: Database) -> None:
    sink = Sink()
    payload = {"text": "grüße \u0000 \ud800 😀", "list": [1, 2.5, None, True], "nested": {"a": "b"}}
    async with database.transaction() as tx:
        await stage(tx, kind="note", payload=payload, now=NOW)
    metrics = MetricsCollector()
    relay = Relay(database, {"note": sink}, metrics=metrics)
    assert [await relay.run_once(), await relay.run_once()] == [1, 0]
    (message,) = sink.got
    assert (message.payload, message.kind, message.created_at, message.attempt) == (payload, "note", NOW, 1)
    (row,) = await rows(database)
    assert row.id == message.id
    assert row.delivered_at is not None
    assert (row.attempts, row.lease_token, row.next_attempt_at, row.last_error) == (1, None, None, None)
    shown = metrics.registry.get_sample_value(
        "outbox_deliveries_total", {"kind": "note", "result": "delivered"}
    )
    assert shown == 1


async def test_a_message_of_a_transaction_that_rolled_back_never_existed(database: Database) -> None:
    sink = Sink()

    async def fail() -> None:
        async with database.transaction() as tx:
            await stage(tx, kind="note", payload={"n": 1}, now=NOW)
            raise RuntimeError("the payment failed")

    with pytest.raises(RuntimeError, match="the payment failed"):
        await fail()
    await put(database, 2)
    await Relay(database, {"note": sink}).run_once()
    assert sink.payloads == [{"n": 2}]
    assert len(await rows(database)) == 1


async def test_the_same_dedupe_key_is_staged_once(database: Database) -> None:
    """In one call, in one transaction, in a later one, and after it was delivered."""
    sink = Sink()
    relay = Relay(database, {"note": sink})
    twice = [NewMessage(kind="note", payload={"n": n}, dedupe_key="incident-1") for n in (1, 2)]
    for _ in range(2):
        async with database.transaction() as tx:
            await stage_many(tx, twice, now=NOW)
            await stage(tx, kind="note", payload={"n": 3}, dedupe_key="incident-1", now=NOW)
        await relay.run_once()
    assert sink.payloads == [{"n": 1}]


async def test_messages_without_a_dedupe_key_are_all_kept(database: Database) -> None:
    sink = Sink()
    await put(database, 1, 1, 1)
    await Relay(database, {"note": sink}).run_once()
    assert sink.payloads == [{"n": 1}] * 3


async def test_staging_nothing_is_fine(database: Database) -> None:
    async with database.transaction() as tx:
        await stage_many(tx, [], now=NOW)
    assert await rows(database) == []


async def test_transactions_that_stage_the_same_keys_in_opposite_order_both_commit(
    database: Database,
) -> None:
    keys = [f"key-{n}" for n in range(50)]

    async def put_keys(order: list[str]) -> None:
        async with database.transaction() as tx:
            await stage_many(
                tx, [NewMessage(kind="note", payload={}, dedupe_key=key) for key in order], now=NOW
            )

    await asyncio.gather(*(put_keys(keys if n % 2 else keys[::-1]) for n in range(8)))
    assert len(await rows(database)) == 50


async def test_a_relay_in_the_background_delivers_when_woken(database: Database) -> None:
    sink = Sink()
    relay = Relay(database, {"note": sink}, poll_seconds=3_600)
    relay.start()
    await asyncio.sleep(0.05)
    await put(database, *range(50))
    relay.wake()
    await until(lambda: len(sink.got) == 50)
    await relay.stop()
    assert sorted(payload["n"] for payload in sink.payloads) == list(range(50))
    assert all(row.delivered_at for row in await rows(database))


async def test_a_relay_finds_messages_by_polling_when_nobody_wakes_it(database: Database) -> None:
    sink = Sink()
    relay = Relay(database, {"note": sink}, poll_seconds=0.05)
    relay.start()
    relay.start()
    await put(database, 1)
    await until(lambda: len(sink.got) == 1)
    await relay.stop()
    await relay.stop()


async def test_a_crash_between_delivery_and_its_record_delivers_again(database: Database) -> None:
    """At least once: the message comes again after the lease, and not before."""
    sink = Sink()
    await put(database, 1)
    crashed = Relay(database, {"note": sink}, lease_seconds=0.5)
    (message,) = await crashed._claim("the-crashed-one")
    await crashed._deliver(message)
    successor = Relay(database, {"note": sink})
    assert await successor.run_once() == 0

    async def again() -> bool:
        return await successor.run_once() == 1

    await until(again)
    assert [got.id for got in sink.got] == [message.id, message.id]
    assert [got.attempt for got in sink.got] == [1, 2]
    assert await successor.run_once() == 0


async def test_a_relay_that_lost_its_lease_does_not_undo_its_successors_delivery(database: Database) -> None:
    sink = Sink()
    await put(database, 1)
    slow = Relay(database, {"note": sink}, lease_seconds=0)
    (message,) = await slow._claim("the-slow-one")
    assert await Relay(database, {"note": sink}).run_once() == 1
    await slow._settle("the-slow-one", [(message, ConnectionError("too late"))])
    (row,) = await rows(database)
    assert row.delivered_at is not None
    assert row.last_error is None


async def test_a_sink_that_is_down_gets_its_messages_later(database: Database) -> None:
    sink, healthy = Sink(), Sink()
    sink.down = True
    metrics = MetricsCollector()
    relay = Relay(
        database,
        {"note": sink, "other": healthy},
        poll_seconds=0.02,
        retry_base_seconds=0.05,
        metrics=metrics,
    )
    relay.start()
    await put(database, 1, 2, 3)
    await put(database, 4, kind="other")
    await until(lambda: len(healthy.got) == 1)

    async def tried_twice() -> bool:
        return all(row.attempts >= 2 for row in await rows(database) if row.kind == "note")

    await until(tried_twice)
    failing = [row for row in await rows(database) if row.kind == "note"]
    assert all(row.delivered_at is None and row.dead_at is None for row in failing)
    assert {row.last_error for row in failing if row.last_error} == {
        "ConnectionError: down, and its key is whsec_[redacted]"
    }
    sink.down = False
    await until(lambda: len(sink.got) == 3)
    await relay.stop()
    assert sorted(payload["n"] for payload in sink.payloads) == [1, 2, 3]
    labels = {"kind": "note", "result": "failed"}
    assert (metrics.registry.get_sample_value("outbox_deliveries_total", labels) or 0) >= 6


async def test_the_wait_after_a_failure_doubles(database: Database) -> None:
    relay = Relay(database, {}, retry_base_seconds=5)

    def wait_seconds(attempt: int) -> float:
        message = Message(id="m", kind="note", payload={}, created_at=NOW, attempt=attempt)
        retry_at: datetime = relay._failure(message, TimeoutError(), NOW)["retry_at"]
        return (retry_at - NOW).total_seconds()

    assert [wait_seconds(attempt) for attempt in (1, 2, 3, 12, 13, 14, 19)] == [
        5,
        10,
        20,
        10_240,
        20_480,
        21_600,
        21_600,
    ]


async def test_a_message_nobody_takes_is_kept_as_dead_and_not_tried_for_ever(database: Database) -> None:
    sink = Sink()
    sink.down = True
    await put(database, 1)
    metrics = MetricsCollector()
    relay = Relay(database, {"note": sink}, retry_base_seconds=0, attempts_max=3, metrics=metrics)
    assert [await relay.run_once() for _ in range(4)] == [1, 1, 1, 0]
    (row,) = await rows(database)
    assert (row.attempts, row.payload, row.delivered_at) == (3, {"n": 1}, None)
    assert row.dead_at is not None
    assert row.last_error.startswith("ConnectionError: down")
    labels = {"kind": "note", "result": "dead"}
    assert metrics.registry.get_sample_value("outbox_deliveries_total", labels) == 1


async def test_a_message_that_takes_the_process_down_every_time_ends_as_dead(database: Database) -> None:
    sink = Sink()
    await put(database, 1)
    relay = Relay(database, {"note": sink}, lease_seconds=0, attempts_max=2)
    for _ in range(2):
        assert len(await relay._claim("crashes")) == 1
    await relay.run_once()
    (row,) = await rows(database)
    assert row.dead_at is not None
    assert sink.got == []


async def test_a_handler_that_hangs_or_is_cancelled_stops_neither_its_neighbours_nor_the_relay(
    database: Database,
) -> None:
    sink = Sink()

    async def trouble(message: Message) -> None:
        if message.payload["n"] == 1:
            await asyncio.sleep(3_600)
        raise asyncio.CancelledError

    await put(database, 1, 2, kind="trouble")
    await put(database, 3)
    relay = Relay(database, {"trouble": trouble, "note": sink}, handler_seconds_max=0.1, poll_seconds=0.02)
    relay.start()
    await until(lambda: len(sink.got) == 1)
    await put(database, 4)
    await until(lambda: len(sink.got) == 2)
    await relay.stop()
    errors = {row.payload["n"]: row.last_error for row in await rows(database)}
    assert errors == {1: "TimeoutError:", 2: "CancelledError:", 3: None, 4: None}


async def test_a_message_without_a_handler_waits_for_one(database: Database) -> None:
    sink = Sink()
    await put(database, 1, kind="from-a-newer-version")
    await put(database, 2)
    relay = Relay(database, {"note": sink})
    assert await relay.run_once() == 1
    (waiting,) = [row for row in await rows(database) if row.kind == "from-a-newer-version"]
    assert (waiting.attempts, waiting.dead_at) == (0, None)
    assert await Relay(database, {"from-a-newer-version": sink}).run_once() == 1
    assert sink.payloads == [{"n": 2}, {"n": 1}]


async def test_the_relay_outlives_a_missing_table(database: Database) -> None:
    sink = Sink()
    async with database.transaction() as tx:
        await tx.run_sync(metadata.drop_all, tables=[outbox])
    relay = Relay(database, {"note": sink}, poll_seconds=0.02)
    relay.start()
    await asyncio.sleep(0.1)
    async with database.transaction() as tx:
        await tx.run_sync(metadata.create_all, tables=[outbox])
    await put(database, 1)
    await until(lambda: len(sink.got) == 1)
    await relay.stop()


async def test_the_relay_outlives_a_database_that_is_down() -> None:
    sink = Sink()
    with work_directory() as directory:
        server = PostgresServer.start(directory / "postgres")
        database = await opened(server.create_database("outage"))
        await put(database, 1)
        server.stop()
        relay = Relay(database, {"note": sink}, poll_seconds=0.02)
        with pytest.raises(StoreUnavailable):
            await relay.run_once()
        relay.start()
        await asyncio.sleep(0.1)
        server.restart()
        await until(lambda: len(sink.got) == 1)
        await relay.stop()
        await database.close()
        server.stop()


async def test_stopping_lets_the_batch_in_hand_finish(database: Database) -> None:
    entered = asyncio.Event()
    finished: list[str] = []

    async def slow(message: Message) -> None:
        entered.set()
        await asyncio.sleep(0.2)
        finished.append(message.id)

    await put(database, 1)
    relay = Relay(database, {"note": slow})
    relay.start()
    await entered.wait()
    await relay.stop()
    (row,) = await rows(database)
    assert finished == [row.id]
    assert row.delivered_at is not None


async def test_two_relays_on_one_postgresql_deliver_200_messages_once_each(postgres_url: str) -> None:
    """As two worker processes: each with its own connections, both woken at the same moment."""
    first, second = await opened(postgres_url), Database.open(postgres_url)
    by_first, by_second = Sink(), Sink()
    relays = [
        Relay(first, {"note": by_first}, poll_seconds=0.05),
        Relay(second, {"note": by_second}, poll_seconds=0.05),
    ]
    await put(first, *range(100))
    for relay in relays:
        relay.start()
    for start in range(100, 200, 10):
        await put(first, *range(start, start + 10))
        for relay in relays:
            relay.wake()
    await until(lambda: len(by_first.got) + len(by_second.got) >= 200)
    for relay in relays:
        await relay.stop()
    counts = Counter(payload["n"] for payload in by_first.payloads + by_second.payloads)
    assert counts == Counter(range(200))
    assert by_first.got
    assert by_second.got
    assert all(row.delivered_at and row.attempts == 1 for row in await rows(first))
    await first.close()
    await second.close()


async def test_no_transaction_is_open_while_a_handler_works(postgres_url: str) -> None:
    database = await opened(postgres_url)
    seen: list[int] = []

    async def look(_message: Message) -> None:
        async with database.snapshot() as tx:
            result = await tx.execute(
                sa.text(
                    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                    " AND pid <> pg_backend_pid() AND xact_start IS NOT NULL AND backend_type = 'client backend'"
                )
            )
            seen.append(result.scalar_one())

    await put(database, 1)
    await Relay(database, {"note": look}).run_once()
    assert seen == [0]
    await database.close()
