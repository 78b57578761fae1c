"""The idempotency protocol: claim a key, do the work, keep the answer; the work may fail or stall at any point."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

from backend.app.core.errors import AppError, IdempotencyInProgress, IdempotencyMismatch, Unavailable
from backend.app.core.idempotency_stores import Answer, IdempotencyStore, Record, RecordKey, State
from backend.app.core.ids import new_id
from backend.app.observability.metrics import get_metrics

# Longer than any work of ours may take: a call to Stripe ends by time-out well before.
LEASE_SECONDS = 60
# Every store has its own, shorter limits; this one holds for a store that has none.
STORE_SECONDS_MAX = 10
# Work in progress usually ends within a second.
IN_PROGRESS_RETRY_SECONDS = 1

T = TypeVar("T")

_foreign_key: ContextVar[str] = ContextVar("idempotency_foreign_key")


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answer to give, and whether it is that of an earlier call."""

    answer: Answer
    replayed: bool


class IdempotencyHandler:
    """Does one operation's work once per caller and key, and remembers the answer for `ttl_seconds`.

    `lease_seconds` is how long the work may take; after it, a repeat may take the work over.
    """

    def __init__(
        self,
        store: IdempotencyStore,
        *,
        operation: str,
        ttl_seconds: float,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        if ttl_seconds <= 0 or lease_seconds <= 0:
            raise ValueError("ttl_seconds and lease_seconds must be positive")
        self._store = store
        self._operation = operation
        self._ttl_seconds = ttl_seconds
        self._lease_seconds = lease_seconds

    async def get_cached(self, key: str, *, caller: str = "") -> Answer | None:
        """The finished answer for a key, or None; one store call. Raises Unavailable when the store is down."""
        record_key = RecordKey(self._operation, caller, key)
        record = await _bounded(self._store.read(record_key))
        return _own(record, record_key).answer if record else None

    async def remember(self, key: str, answer: Answer, *, caller: str = "", fingerprint: str = "") -> Answer:
        """Keeps a finished answer unless there is one already, and gives back the one that counts; one store call.

        Raises IdempotencyInProgress while `run` works on the same key, Unavailable when the store is down.
        """
        record_key = RecordKey(self._operation, caller, key)
        record = _own(
            await _bounded(
                self._store.remember(record_key, fingerprint, new_id(), answer, ttl_seconds=self._ttl_seconds)
            ),
            record_key,
        )
        if record.answer is None:
            raise _in_progress(record)
        return record.answer

    async def run(
        self,
        key: str,
        fingerprint: str,
        work: Callable[[], Awaitable[Answer]],
        *,
        caller: str = "",
        rolled_back: tuple[type[Exception], ...] = (),
        recover: Callable[[], Awaitable[Answer | None]] | None = None,
    ) -> Outcome:
        """Does `work` if nobody did it before; otherwise the earlier answer.

        `fingerprint` says what is asked for (see `fingerprint_of`). An AppError below 500 and the classes
        in `rolled_back` mean that nothing happened: the key is free again. Any other exception leaves it
        open whether the work happened: repeats get IdempotencyInProgress until the lease is over, then
        one of them takes over. It first asks `recover`, which looks whether the work did happen: its
        answer, or None if surely nothing happened. Without `recover`, `work` runs again and must hand
        `foreign_key()` to whatever it calls.

        Raises IdempotencyMismatch (same key, other fingerprint), IdempotencyInProgress, Unavailable (the
        store is down; nothing is ever done without it), and what `work` raises.
        """
        record_key, token = RecordKey(self._operation, caller, key), new_id()
        record = await self._claim(record_key, fingerprint, token)
        if record.fingerprint != fingerprint:
            raise IdempotencyMismatch
        if record.answer is not None:
            return self._replay(record.answer)
        if record.token != token:
            raise _in_progress(record)
        foreign_key_before = _foreign_key.set(f"{self._operation}-{record.record_id}")
        try:
            return await self._do(record, work, rolled_back, recover)
        finally:
            _foreign_key.reset(foreign_key_before)

    async def _claim(self, key: RecordKey, fingerprint: str, token: str) -> Record:
        attempt = asyncio.ensure_future(
            _bounded(
                self._store.claim(
                    key,
                    fingerprint,
                    token,
                    lease_seconds=self._lease_seconds,
                    ttl_seconds=self._ttl_seconds,
                )
            )
        )
        try:
            return _own(await _uninterrupted(attempt), key)
        except asyncio.CancelledError:
            if not attempt.cancelled() and attempt.exception() is None and attempt.result().token == token:
                await self._give_up(attempt.result(), nothing_happened=not attempt.result().is_takeover)
            raise

    async def _do(
        self,
        record: Record,
        work: Callable[[], Awaitable[Answer]],
        rolled_back: tuple[type[Exception], ...],
        recover: Callable[[], Awaitable[Answer | None]] | None,
    ) -> Outcome:
        # An earlier holder may have reached the outside world; only `recover` can say that it did not.
        is_clean = not record.is_takeover
        try:
            answer = None
            if recover is not None and not is_clean:
                answer = await recover()
                is_clean = answer is None
            if answer is None:
                answer = await work()
        except GeneratorExit:
            # The event loop is gone; nothing can be awaited any more. The lease will end by itself.
            raise
        except BaseException as error:
            refused = isinstance(error, rolled_back) or (isinstance(error, AppError) and error.status < 500)  # noqa: PLR2004
            await self._give_up(record, nothing_happened=is_clean and refused)
            raise
        return await self._complete(record, answer)

    async def _give_up(self, record: Record, *, nothing_happened: bool) -> None:
        put_back = self._store.release if nothing_happened else self._store.mark_ambiguous
        # A store that fails now leaves the record in progress, which a repeat treats like an ambiguous one;
        # what the caller must hear is the error that brought us here.
        with contextlib.suppress(Unavailable):
            if not await _uninterrupted(_bounded(put_back(record.key, record.token))):
                self._count_stale_write()

    async def _complete(self, record: Record, answer: Answer) -> Outcome:
        try:
            is_stored = await _uninterrupted(
                _bounded(
                    self._store.complete(record.key, record.token, answer, ttl_seconds=self._ttl_seconds)
                )
            )
        except Unavailable as error:
            raise Unavailable(
                "This was carried out, but its result could not be stored. Please repeat it with the same key."
            ) from error
        if is_stored:
            return Outcome(answer, replayed=False)
        now_kept = await _bounded(self._store.read(record.key))
        if now_kept is not None and _own(now_kept, record.key).token == record.token and now_kept.answer:
            # The store had done it when its reply was lost, and the client asked a second time.
            return Outcome(now_kept.answer, replayed=False)
        self._count_stale_write()
        if now_kept is not None and now_kept.answer is not None:
            return self._replay(now_kept.answer)
        raise IdempotencyInProgress(retry_after_seconds=IN_PROGRESS_RETRY_SECONDS)

    def _replay(self, answer: Answer) -> Outcome:
        get_metrics().idempotent_hit(self._operation)
        return Outcome(answer, replayed=True)

    def _count_stale_write(self) -> None:
        get_metrics().idempotent_stale_write(self._operation)


def foreign_key() -> str:
    """The Idempotency-Key for a foreign call made within idempotent work: the same each time this work is retried.

    Raises LookupError outside such work.
    """
    return _foreign_key.get()


def fingerprint_of(*parts: bytes | str) -> str:
    """The SHA-256, in hexadecimal digits, of what is asked for; parts can't run into each other."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.hexdigest()


def _own(record: Record, key: RecordKey) -> Record:
    """The record, if it is that of `key`: a client library that mixes up replies must not leak an answer."""
    if record.key != key:
        raise Unavailable
    return record


def _in_progress(record: Record) -> IdempotencyInProgress:
    seconds = record.lease_seconds_left if record.state is State.AMBIGUOUS else IN_PROGRESS_RETRY_SECONDS
    return IdempotencyInProgress(retry_after_seconds=max(1, math.ceil(seconds)))


async def _bounded(store_call: Awaitable[T]) -> T:
    try:
        async with asyncio.timeout(STORE_SECONDS_MAX):
            return await store_call
    except TimeoutError as error:
        raise Unavailable from error


async def _uninterrupted(store_call: Awaitable[T]) -> T:
    """Lets a store call end although our own task is cancelled meanwhile; the cancellation is raised after it."""
    task = asyncio.ensure_future(store_call)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        # Looked at, so that asyncio does not report it as lost.
        if not task.cancelled():
            task.exception()
        raise cancelled
    return task.result()
