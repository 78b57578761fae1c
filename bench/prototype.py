"""The bare wall: a plain ASGI endpoint that verifies, parses once and stores four rows per event. It decides nothing.

It shows what is left of the machine when nothing but the unavoidable is done. DATABASE_URL chooses the store;
PROTOTYPE_COMMIT is `group` (deliveries that arrive together share a transaction) or `single` (one each).
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import sqlite3
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

import asyncpg  # type: ignore[import-untyped]  # the driver ships no types

from bench.reading import Simple, read_simply
from bench.rows import MANY_EVENTS_POSTGRES, ONE_EVENT

# Stripe's own tolerance, and ours.
TOLERANCE_SECONDS = 300
# As many as Tollkeeper's pool has.
POOL_CONNECTIONS = 10
# More than a load of 64 connections can bring at once; it only bounds a statement.
BATCH_EVENTS_MAX = 256

Message = MutableMapping[str, Any]
Row = tuple[Simple, bytes]


class Store(Protocol):
    """Where events go; `put` returns once they are durable."""

    async def open(self) -> None:
        """Connects; the tables are there."""

    async def close(self) -> None:
        """Ends every connection."""

    async def put(self, row: Row) -> None:
        """Stores an event and what follows from it."""


class GroupCommit:
    """PostgreSQL: while one batch commits the next one gathers, so nobody waits for company."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._waiting: list[tuple[Row, asyncio.Future[None]]] = []
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Connects and prepares the one statement."""
        self._connection = await asyncpg.connect(self._url)
        self._statement = await self._connection.prepare(MANY_EVENTS_POSTGRES)

    async def close(self) -> None:
        """Ends the connection."""
        await self._connection.close()

    async def put(self, row: Row) -> None:
        """Waits for the batch that takes the row."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((row, done))
        if self._task is None:
            self._task = asyncio.create_task(self._commit())
        await done

    async def _commit(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:BATCH_EVENTS_MAX], self._waiting[BATCH_EVENTS_MAX:]
            rows = [row for row, _ in batch]
            try:
                await self._statement.fetch(
                    [event.event_id for event, _ in rows],
                    [event.event_type for event, _ in rows],
                    [event.user_id for event, _ in rows],
                    [event.plan_code for event, _ in rows],
                    [event.amount for event, _ in rows],
                    [payload for _, payload in rows],
                )
            except (OSError, asyncpg.PostgresError) as error:
                for _, done in batch:
                    done.set_exception(error)
            else:
                for _, done in batch:
                    done.set_result(None)
        self._task = None


class SingleCommit:
    """PostgreSQL: each event its own transaction of four statements, over a pool."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def open(self) -> None:
        """Connects the whole pool."""
        self._pool = await asyncpg.create_pool(
            self._url, min_size=POOL_CONNECTIONS, max_size=POOL_CONNECTIONS
        )

    async def close(self) -> None:
        """Ends every connection."""
        await self._pool.close()

    async def put(self, row: Row) -> None:
        """Waits for a connection and its own commit."""
        event, payload = row
        store, pay, entitle, audit = _SINGLE
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.execute(store, event.event_id, event.event_type, payload)
            await connection.execute(pay, event.event_id, event.user_id, event.event_type, event.amount)
            await connection.execute(entitle, event.user_id, event.plan_code)
            await connection.execute(audit, event.user_id, event.event_id)


# Values in the order of `put` above.
_SINGLE = (
    ONE_EVENT[0].format(event_id="$1", event_type="$2", payload="$3"),
    ONE_EVENT[1].format(event_id="$1", user_id="$2", event_type="$3", amount="$4"),
    ONE_EVENT[2].format(user_id="$1", plan_code="$2"),
    ONE_EVENT[3].format(user_id="$1", event_id="$2"),
)
_SQLITE = tuple(
    statement.format(
        event_id=":event_id",
        event_type=":event_type",
        user_id=":user_id",
        plan_code=":plan_code",
        amount=":amount",
        payload=":payload",
    )
    for statement in ONE_EVENT
)


class SqliteCommit:
    """SQLite in the loop's own thread: what arrived while it committed is the next batch. A thread was slower."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._waiting: list[tuple[Row, asyncio.Future[None]]] = []

    async def open(self) -> None:
        """Opens the file with the durability that Tollkeeper has."""
        self._connection = sqlite3.connect(self._path, isolation_level=None)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")

    async def close(self) -> None:
        """Closes the file."""
        self._connection.close()

    async def put(self, row: Row) -> None:
        """Waits until the loop has handed over all that had arrived, and for the commit."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._commit)
        self._waiting.append((row, done))
        await done

    def _commit(self) -> None:
        batch, self._waiting = self._waiting, []
        values = [
            {
                "event_id": event.event_id,
                "event_type": event.event_type,
                "user_id": event.user_id,
                "plan_code": event.plan_code,
                "amount": event.amount,
                "payload": payload,
            }
            for (event, payload), _ in batch
        ]
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            for statement in _SQLITE:
                self._connection.executemany(statement, values)
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            for _, done in batch:
                done.set_exception(error)
        else:
            for _, done in batch:
                done.set_result(None)


class Prototype:
    """The ASGI application."""

    def __init__(self, store: Store, secret: str) -> None:
        self._store = store
        self._key = secret.encode("ascii")

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        if scope["path"] == "/livez":
            await _answer(send, 200)
            return
        body = b""
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if not self._is_genuine(dict(scope["headers"]).get(b"stripe-signature", b""), body):
            await _answer(send, 403)
            return
        await self._store.put((read_simply(json.loads(body)), body))
        await _answer(send, 200)

    async def _live(
        self, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        await receive()
        await self._store.open()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._store.close()
        await send({"type": "lifespan.shutdown.complete"})

    def _is_genuine(self, header: bytes, body: bytes) -> bool:
        parts = dict(part.split(b"=", 1) for part in header.split(b",") if b"=" in part)
        timestamp = parts.get(b"t", b"0")
        if abs(time.time() - int(timestamp)) > TOLERANCE_SECONDS:
            return False
        expected = hmac.digest(self._key, timestamp + b"." + body, "sha256").hex().encode("ascii")
        return hmac.compare_digest(expected, parts.get(b"v1", b""))


_ANSWER = b'{"status":"success"}'
_HEADERS = [(b"content-type", b"application/json"), (b"content-length", str(len(_ANSWER)).encode("ascii"))]


async def _answer(send: Callable[[Message], Awaitable[None]], status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": _HEADERS})
    await send({"type": "http.response.body", "body": _ANSWER})


def create_app() -> Prototype:
    """The application; its settings come from the environment."""
    url = os.environ["DATABASE_URL"]
    store: Store
    if url.startswith("sqlite:///"):
        store = SqliteCommit(url.removeprefix("sqlite:///"))
    elif os.environ["PROTOTYPE_COMMIT"] == "group":
        store = GroupCommit(url)
    else:
        store = SingleCommit(url)
    return Prototype(store, os.environ["STRIPE_WEBHOOK_SECRET"])
