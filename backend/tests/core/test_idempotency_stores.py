"""The stores we ship, each against the contract, and what is special about each."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from backend.app.core.database import Database, metadata
from backend.app.core.errors import StoreUnavailable, Unavailable
from backend.app.core.idempotency import (
    Answer,
    IdempotencyHandler,
    IdempotencyStore,
    MemoryStore,
    RedisStore,
    SqlStore,
)
from backend.app.core.idempotency_stores.sql import idempotency_keys
from backend.tests.core.idempotency_contract import (
    ANSWER,
    LONG_SECONDS,
    OTHER_ANSWER,
    IdempotencyStoreContract,
    PassSeconds,
    claim,
    key_of,
    never_called,
)


class SetClock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.instant = datetime(2026, 11, 23, tzinfo=UTC)

    def now(self) -> datetime:
        return self.instant

    async def pass_seconds(self, seconds: float) -> None:
        self.instant += timedelta(seconds=seconds)


class TestMemoryStore(IdempotencyStoreContract):
    @pytest.fixture
    def clock(self) -> SetClock:
        return SetClock()

    @pytest.fixture
    def store(self, clock: SetClock) -> IdempotencyStore:
        return MemoryStore(clock)

    @pytest.fixture
    def pass_seconds(self, clock: SetClock) -> PassSeconds:
        return clock.pass_seconds

    async def test_a_full_store_refuses_new_work(self, clock: SetClock) -> None:
        """Memory is bounded: expired records make room, live ones are never dropped for new ones."""
        store = MemoryStore(clock, records_max=2)
        kept, passing = key_of(), key_of()
        await store.remember(kept, "same", "kept", ANSWER, ttl_seconds=100)
        await store.remember(passing, "same", "passing", ANSWER, ttl_seconds=1)
        with pytest.raises(Unavailable):
            await claim(store, key_of(), "third")
        await clock.pass_seconds(2)
        assert (await claim(store, key_of(), "third")).token == "third"
        assert await store.read(kept) is not None


class TestSqlStore(IdempotencyStoreContract):
    @pytest.fixture
    async def database(self, database_url: str) -> AsyncIterator[Database]:
        database = Database.open(database_url)
        async with database.transaction() as tx:
            await tx.run_sync(metadata.create_all, tables=[idempotency_keys])
        yield database
        await database.close()

    @pytest.fixture
    def store(self, database: Database) -> SqlStore:
        return SqlStore(database)

    async def test_expired_rows_are_deleted_in_portions(
        self, store: SqlStore, pass_seconds: PassSeconds
    ) -> None:
        """Cleaning up takes what is over, a bounded number at a time, and nothing else."""
        for _ in range(3):
            await store.remember(key_of(), "same", "over", ANSWER, ttl_seconds=0.05)
        alive = key_of()
        await store.remember(alive, "same", "alive", ANSWER, ttl_seconds=LONG_SECONDS)
        await pass_seconds(0.2)
        assert await store.forget_expired(rows_max=2) == 2
        assert await store.forget_expired() == 1
        assert await store.forget_expired() == 0
        assert await store.read(alive) is not None


class TestRedisStore(IdempotencyStoreContract):
    @pytest.fixture
    async def client(self, redis_url: str) -> AsyncIterator[Redis]:
        client = Redis.from_url(redis_url)
        yield client
        await client.aclose()

    @pytest.fixture
    def store(self, client: Redis) -> IdempotencyStore:
        return RedisStore(client)

    async def test_each_call_is_one_command(self, client: Redis, store: IdempotencyStore) -> None:
        """Once the server knows the scripts, remembering and looking up take one round trip each."""
        handler = IdempotencyHandler(store, operation="webhook", ttl_seconds=600)
        keys = [key_of().operation for _ in range(3)]
        await handler.remember(keys[0], ANSWER)
        await handler.get_cached(keys[0])
        before = (await client.info("commandstats"))["cmdstat_evalsha"]["calls"]
        assert await handler.get_cached(keys[1]) is None
        assert await handler.remember(keys[1], ANSWER) == ANSWER
        assert await handler.remember(keys[1], OTHER_ANSWER) == ANSWER
        after = (await client.info("commandstats"))["cmdstat_evalsha"]["calls"]
        assert after - before == 3

    async def test_every_record_has_an_end(self, client: Redis, store: IdempotencyStore) -> None:
        """No key stays in Redis for ever, however its work ended."""
        names_before = set(await client.keys("tollkeeper:idempotency:*"))
        claimed, ambiguous, completed = key_of(), key_of(), key_of()
        for key in (claimed, ambiguous, completed):
            await claim(store, key, "token")
        await store.mark_ambiguous(ambiguous, "token")
        await store.complete(completed, "token", ANSWER, ttl_seconds=LONG_SECONDS)
        await store.remember(key_of(), "same", "token", ANSWER, ttl_seconds=LONG_SECONDS)
        names = set(await client.keys("tollkeeper:idempotency:*")) - names_before
        lives = [await client.pttl(name) for name in names]
        assert len(lives) == 4
        assert all(0 < life <= 2 * LONG_SECONDS * 1000 for life in lives)

    async def test_a_reply_for_another_key_is_never_used(
        self, client: Redis, store: IdempotencyStore
    ) -> None:
        """A record that names another caller's key is an outage, not an answer."""
        mine, theirs = key_of(caller="me", operation=key_of().operation), key_of(caller="them")
        names_before = set(await client.keys("tollkeeper:idempotency:*"))
        await store.remember(theirs, "same", "token", Answer(200, b"secret"), ttl_seconds=LONG_SECONDS)
        (their_name,) = set(await client.keys("tollkeeper:idempotency:*")) - names_before
        await store.remember(mine, "same", "token", ANSWER, ttl_seconds=LONG_SECONDS)
        (my_name,) = set(await client.keys("tollkeeper:idempotency:*")) - names_before - {their_name}
        await client.restore(my_name, 0, await client.dump(their_name) or b"", replace=True)
        handler = IdempotencyHandler(store, operation=mine.operation, ttl_seconds=60)
        with pytest.raises(Unavailable):
            await handler.get_cached("key", caller="me")
        with pytest.raises(Unavailable):
            await handler.run("key", "same", never_called, caller="me")

    async def test_a_client_that_decodes_is_refused(self, redis_url: str) -> None:
        """Bodies are bytes; a client that turns them into text would damage them."""
        client = Redis.from_url(redis_url, decode_responses=True)
        with pytest.raises(ValueError, match="decode_responses"):
            RedisStore(client)
        await client.aclose()


async def test_without_redis_nothing_is_done() -> None:
    """A Redis that refuses connections means 503, never work without protection."""
    # Port 1 is reserved (tcpmux) and closed on every machine we know.
    client = Redis(host="127.0.0.1", port=1, socket_connect_timeout=0.2, retry=Retry(NoBackoff(), 0))
    handler = IdempotencyHandler(RedisStore(client), operation="test", ttl_seconds=60)
    with pytest.raises(Unavailable):
        await handler.run("key", "same", never_called)
    with pytest.raises(Unavailable):
        await handler.get_cached("key")
    with pytest.raises(Unavailable):
        await handler.remember("key", ANSWER)
    await client.aclose()


async def test_without_a_database_nothing_is_done() -> None:
    """A database that refuses connections means 503, never work without protection."""
    database = Database.open("postgresql://nobody@127.0.0.1:1/none")
    handler = IdempotencyHandler(SqlStore(database), operation="test", ttl_seconds=60)
    with pytest.raises(StoreUnavailable):
        await handler.run("key", "same", never_called)
    await database.close()
