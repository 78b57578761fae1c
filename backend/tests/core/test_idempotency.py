"""The exception policy of the handler, and the decorator around functions."""

# ruff: noqa: ARG001 - a function takes its store for the decorator's sake
from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from backend.app.core import idempotency_handler
from backend.app.core.clock import SystemClock
from backend.app.core.errors import (
    AppError,
    Forbidden,
    IdempotencyInProgress,
    IdempotencyKeyMissing,
    IdempotencyMismatch,
    InvalidRequest,
    NotFound,
    Unavailable,
)
from backend.app.core.idempotency import (
    Answer,
    IdempotencyHandler,
    MemoryStore,
    Outcome,
    RecordKey,
    State,
    fingerprint_of,
    foreign_key,
    idempotent,
)
from backend.app.core.ids import new_id
from backend.tests.core.idempotency_contract import ANSWER, OTHER_ANSWER, answering, counted, never_called
from backend.tests.core.test_idempotency_stores import SetClock

LEASE_SECONDS = 60


class RolledBack(Exception):
    pass


class FailingStore(MemoryStore):
    """A memory store whose named method is down."""

    def __init__(self, method: str) -> None:
        super().__init__(SystemClock())
        setattr(self, method, self._down)

    async def _down(self, *_args: Any, **_kwargs: Any) -> Any:
        raise Unavailable


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


@pytest.fixture
def store(clock: SetClock) -> MemoryStore:
    return MemoryStore(clock)


@pytest.fixture
def handler(store: MemoryStore) -> IdempotencyHandler:
    return IdempotencyHandler(store, operation="test", ttl_seconds=600, lease_seconds=LEASE_SECONDS)


def raising(error: BaseException) -> Any:
    async def work() -> Answer:
        raise error

    return work


async def state_of(store: MemoryStore, key: str = "key") -> State | None:
    record = await store.read(RecordKey("test", "", key))
    return record.state if record else None


@pytest.mark.parametrize("error", [InvalidRequest(), Forbidden(), IdempotencyKeyMissing()])
async def test_a_refusal_frees_the_key(
    handler: IdempotencyHandler, store: MemoryStore, error: AppError
) -> None:
    """Validation, authorisation and the like happen before any effect."""
    with pytest.raises(type(error)):
        await handler.run("key", "same", raising(error))
    assert await state_of(store) is None


async def test_a_rollback_frees_the_key(handler: IdempotencyHandler, store: MemoryStore) -> None:
    """What was surely undone may be tried again at once."""
    with pytest.raises(RolledBack):
        await handler.run("key", "same", raising(RolledBack()), rolled_back=(RolledBack,))
    assert await state_of(store) is None


@pytest.mark.parametrize(
    "error",
    [TimeoutError(), ConnectionResetError(), Unavailable(), RolledBack(), KeyError("bug"), SystemExit(1)],
)
async def test_an_unknown_outcome_is_kept(
    handler: IdempotencyHandler, store: MemoryStore, error: BaseException
) -> None:
    """A time-out, a lost connection, an outage or a bug: nobody knows, so nobody repeats it at once."""
    with pytest.raises(type(error)):
        await handler.run("key", "same", raising(error))
    assert await state_of(store) is State.AMBIGUOUS
    with pytest.raises(IdempotencyInProgress) as refused:
        await handler.run("key", "same", never_called)
    assert refused.value.headers["Retry-After"] == str(LEASE_SECONDS)


async def test_recovery_reads_the_answer_back(handler: IdempotencyHandler, clock: SetClock) -> None:
    """After an unknown outcome the work is not repeated if it turns out to have happened."""
    with pytest.raises(TimeoutError):
        await handler.run("key", "same", raising(TimeoutError()))
    await clock.pass_seconds(LEASE_SECONDS)
    outcome = await handler.run("key", "same", never_called, recover=answering(ANSWER))
    assert outcome == Outcome(ANSWER, replayed=False)
    assert (await handler.run("key", "same", never_called)).replayed


async def test_recovery_that_finds_nothing_lets_the_work_run(
    handler: IdempotencyHandler, clock: SetClock
) -> None:
    """`None` from recovery means that surely nothing happened."""

    async def nothing() -> None:
        return None

    with pytest.raises(TimeoutError):
        await handler.run("key", "same", raising(TimeoutError()))
    await clock.pass_seconds(LEASE_SECONDS)
    outcome = await handler.run("key", "same", answering(ANSWER), recover=nothing)
    assert outcome == Outcome(ANSWER, replayed=False)


async def test_recovery_that_fails_leaves_it_unknown(
    handler: IdempotencyHandler, store: MemoryStore, clock: SetClock
) -> None:
    """A refusal met while reading back says nothing about the first attempt."""
    with pytest.raises(TimeoutError):
        await handler.run("key", "same", raising(TimeoutError()))
    await clock.pass_seconds(LEASE_SECONDS)
    with pytest.raises(Forbidden):
        await handler.run("key", "same", never_called, recover=raising(Forbidden()))
    assert await state_of(store) is State.AMBIGUOUS


async def test_recovery_is_not_asked_on_a_first_attempt(handler: IdempotencyHandler) -> None:
    """There is nothing to read back when nobody was here before."""
    outcome = await handler.run("key", "same", answering(ANSWER), recover=never_called)
    assert outcome.answer == ANSWER


async def test_a_refused_second_attempt_does_not_forget_the_first(
    handler: IdempotencyHandler, store: MemoryStore, clock: SetClock
) -> None:
    """A retry with the same foreign key stays possible: the first attempt may have reached the other side."""
    keys: list[str] = []

    async def times_out() -> Answer:
        keys.append(foreign_key())
        raise TimeoutError

    async def is_refused() -> Answer:
        keys.append(foreign_key())
        raise Forbidden

    async def works() -> Answer:
        keys.append(foreign_key())
        return ANSWER

    with pytest.raises(TimeoutError):
        await handler.run("key", "same", times_out)
    await clock.pass_seconds(LEASE_SECONDS)
    with pytest.raises(Forbidden):
        await handler.run("key", "same", is_refused)
    assert await state_of(store) is State.AMBIGUOUS
    await clock.pass_seconds(LEASE_SECONDS)
    await handler.run("key", "same", works)
    assert len(set(keys)) == 1


async def test_a_foreign_key_exists_only_within_work(handler: IdempotencyHandler) -> None:
    """Outside idempotent work there is no key to hand on."""
    await handler.run("key", "same", answering(ANSWER))
    with pytest.raises(LookupError):
        foreign_key()


@pytest.mark.parametrize("method", ["claim", "read", "remember"])
async def test_a_store_that_is_down_stops_the_work(method: str) -> None:
    """Without its memory the handler does nothing at all."""
    handler = IdempotencyHandler(FailingStore(method), operation="test", ttl_seconds=600)
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "claim": lambda: handler.run("key", "same", never_called),
        "read": lambda: handler.get_cached("key"),
        "remember": lambda: handler.remember("key", ANSWER),
    }
    with pytest.raises(Unavailable):
        await calls[method]()


async def test_a_store_that_fails_after_the_work_says_so() -> None:
    """The caller is not told that nothing was changed, and the key stays taken."""
    handler = IdempotencyHandler(FailingStore("complete"), operation="test", ttl_seconds=600)
    with pytest.raises(Unavailable, match="carried out"):
        await handler.run("key", "same", answering(ANSWER))
    with pytest.raises(IdempotencyInProgress):
        await handler.run("key", "same", never_called)


@pytest.mark.parametrize("method", ["release", "mark_ambiguous"])
async def test_a_store_that_fails_after_an_error_does_not_hide_it(method: str) -> None:
    """The caller hears what went wrong with the work."""
    handler = IdempotencyHandler(FailingStore(method), operation="test", ttl_seconds=600)
    error = Forbidden() if method == "release" else TimeoutError("the work's")
    with pytest.raises(type(error)) as raised:
        await handler.run("key", "same", raising(error))
    assert raised.value is error


async def test_a_second_cancellation_does_not_interrupt_the_note(clock: SetClock) -> None:
    """However often a client hangs up, the store's write ends first."""
    entered, go_on = asyncio.Event(), asyncio.Event()

    class SlowStore(MemoryStore):
        async def mark_ambiguous(self, key: RecordKey, token: str) -> bool:
            entered.set()
            await go_on.wait()
            return await super().mark_ambiguous(key, token)

    store = SlowStore(clock)
    handler = IdempotencyHandler(store, operation="test", ttl_seconds=600)
    task = asyncio.create_task(handler.run("key", "same", raising(TimeoutError())))
    await entered.wait()
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await state_of(store) is State.AMBIGUOUS


async def test_a_completion_whose_reply_was_lost_is_a_completion(clock: SetClock) -> None:
    """A client that asks the store twice finds its own answer, and that is no stale write."""

    class RepeatingStore(MemoryStore):
        async def complete(self, *args: Any, **kwargs: Any) -> bool:
            await super().complete(*args, **kwargs)
            return await super().complete(*args, **kwargs)

    operation = new_id()
    handler = IdempotencyHandler(RepeatingStore(clock), operation=operation, ttl_seconds=600)
    assert await handler.run("key", "same", answering(ANSWER)) == Outcome(ANSWER, replayed=False)
    assert counted("idempotency_stale_writes_total", operation) == 0


async def test_remembered_answers_are_found(handler: IdempotencyHandler, clock: SetClock) -> None:
    """The first answer counts, per caller, until its time is over."""
    assert await handler.get_cached("key") is None
    assert await handler.remember("key", ANSWER) == ANSWER
    assert await handler.remember("key", OTHER_ANSWER) == ANSWER
    assert await handler.get_cached("key") == ANSWER
    assert await handler.get_cached("key", caller="other") is None
    await clock.pass_seconds(600)
    assert await handler.get_cached("key") is None


async def test_remembering_during_work_is_refused(handler: IdempotencyHandler) -> None:
    """One key is either worked on or remembered, not both."""

    async def work() -> Answer:
        with pytest.raises(IdempotencyInProgress):
            await handler.remember("key", OTHER_ANSWER)
        return ANSWER

    assert (await handler.run("key", "same", work)).answer == ANSWER


@pytest.mark.parametrize("key", ["", "k" * 256, "a\0b", "\ud800"])
async def test_an_unstorable_key_is_refused(handler: IdempotencyHandler, key: str) -> None:
    """A key that a database could not keep is the client's error, in every store alike."""
    with pytest.raises(IdempotencyKeyMissing):
        await handler.run(key, "same", never_called)


def test_unusable_parameters_are_refused(store: MemoryStore) -> None:
    """A handler without a name or time, a caller that can't be kept, a cookie in an answer: errors of ours."""
    for ttl_seconds, lease_seconds in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="positive"):
            IdempotencyHandler(store, operation="a", ttl_seconds=ttl_seconds, lease_seconds=lease_seconds)
    for operation, caller in (("", "a"), ("o" * 65, "a"), ("é", "a"), ("a", "c" * 256)):
        with pytest.raises(ValueError, match="characters"):
            RecordKey(operation, caller, "key")
    with pytest.raises(ValueError, match="set-cookie"):
        Answer(200, b"", (("set-cookie", "session=1"),))
    with pytest.raises(ValueError, match="too large"):
        Answer(200, bytes(2**20 + 1))


def test_fingerprints_tell_requests_apart() -> None:
    """Moving a character from one part to the next is a different request."""
    assert fingerprint_of("ab", b"c") == fingerprint_of(b"ab", "c")
    assert fingerprint_of("ab", "c") != fingerprint_of("a", "bc")
    assert len(fingerprint_of()) == 64


class Shop:
    """A service with a store of its own, as a service would be written."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self.sold: list[tuple[str, int]] = []
        self.fails_with: Exception | None = None

    @idempotent(
        operation="sell",
        key="order_id",
        store=lambda call: call["self"].store,
        ttl_seconds=600,
        final=(NotFound,),
    )
    async def sell(self, order_id: str, count: int = 1) -> dict[str, Any]:
        """Sells."""
        self.sold.append((order_id, count))
        if self.fails_with:
            raise self.fails_with
        return {"order": order_id, "count": count, "tags": ["ä", None, 1.5]}


async def test_a_repeated_function_call_gets_an_equal_result(store: MemoryStore) -> None:
    """Positional, keyword or defaulted: the same call is the same work."""
    shop = Shop(store)
    hits_before = counted("idempotent_hits_total", "sell")
    first = await shop.sell("a")
    assert first == {"order": "a", "count": 1, "tags": ["ä", None, 1.5]}
    assert await shop.sell(order_id="a", count=1) == first
    assert shop.sold == [("a", 1)]
    assert counted("idempotent_hits_total", "sell") == hits_before + 1
    assert shop.sell.__name__ == "sell"


async def test_a_function_call_with_other_arguments_is_a_mismatch(store: MemoryStore) -> None:
    """A key stands for one call."""
    shop = Shop(store)
    await shop.sell("a", 1)
    with pytest.raises(IdempotencyMismatch):
        await shop.sell("a", 2)


async def test_a_final_failure_is_repeated_not_retried(store: MemoryStore) -> None:
    """What surely failed fails again the same way, without another attempt."""
    shop = Shop(store)
    shop.fails_with = NotFound("There is no such price.")
    with pytest.raises(NotFound) as first:
        await shop.sell("a")
    assert first.value is shop.fails_with
    with pytest.raises(NotFound, match="There is no such price") as repeat:
        await shop.sell("a")
    assert repeat.value is not shop.fails_with
    assert len(shop.sold) == 1


async def test_key_caller_and_payload_may_be_computed(store: MemoryStore) -> None:
    """What makes a call the same is up to its author; what is not JSON stays out of the payload."""
    runs: list[str] = []

    @idempotent(
        operation="computed",
        key=lambda call: f"{call['user']}/{call['number']}",
        caller="user",
        payload=lambda call: [call["number"]],
        store="store",
        ttl_seconds=600,
    )
    async def count(store: MemoryStore, user: str, number: int, connection: object) -> int:
        runs.append(user)
        return number

    assert await count(store, "a", 1, object()) == 1
    assert await count(store, "a", 1, object()) == 1
    assert await count(store, "b", 1, object()) == 1
    assert runs == ["a", "b"]


async def test_a_result_of_none_is_remembered(store: MemoryStore) -> None:
    """Nothing is a result too."""
    runs: list[str] = []

    @idempotent(operation="none", key="name", store="store", ttl_seconds=600)
    async def note(store: MemoryStore, name: str) -> None:
        runs.append(name)

    await note(store, "a")
    await note(store, "a")
    assert runs == ["a"]


async def test_a_function_recovers_with_its_own_arguments(store: MemoryStore, clock: SetClock) -> None:
    """`recover` gets what the call got, and gives the result that the call would have given."""

    async def look_up(store: MemoryStore, name: str) -> dict[str, str]:
        return {"found": name}

    @idempotent(
        operation="recovers", key="name", store="store", ttl_seconds=600, lease_seconds=5, recover=look_up
    )
    async def create(store: MemoryStore, name: str) -> dict[str, str]:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        await create(store, "a")
    await clock.pass_seconds(5)
    assert await create(store, "a") == {"found": "a"}


async def test_a_result_that_is_not_json_is_an_error(store: MemoryStore) -> None:
    """A result that could not be repeated is never given out as if it could."""

    @idempotent(operation="unfit", key="name", store="store", ttl_seconds=600)
    async def make(store: MemoryStore, name: str) -> object:
        return object()

    with pytest.raises(TypeError, match="not JSON serializable"):
        await make(store, "a")


def test_an_incomplete_decorator_is_an_error_at_once() -> None:
    """A function without a store, an endpoint without its request: told when the module is loaded."""

    async def function(name: str) -> None: ...

    with pytest.raises(TypeError, match="store"):
        idempotent(operation="a", key="name", ttl_seconds=1)(function)
    with pytest.raises(TypeError, match="request"):
        idempotent(operation="a", ttl_seconds=1)(function)


async def test_a_stalled_holder_is_told_to_wait_for_the_one_who_took_over(clock: SetClock) -> None:
    """Its own answer would differ from the one that will be kept; so it gets neither."""
    operation = new_id()
    store = MemoryStore(clock)
    handler = IdempotencyHandler(store, operation=operation, ttl_seconds=600, lease_seconds=5)

    async def stalls() -> Answer:
        await clock.pass_seconds(5)
        await store.claim(RecordKey(operation, "", "key"), "same", "other", lease_seconds=5, ttl_seconds=600)
        return OTHER_ANSWER

    with pytest.raises(IdempotencyInProgress):
        await handler.run("key", "same", stalls)
    assert counted("idempotency_stale_writes_total", operation) == 1


async def test_a_stalled_refusal_does_not_free_the_key(clock: SetClock) -> None:
    """Past its lease a holder can't even give up; its error is raised and the attempt is counted."""
    operation = new_id()
    store = MemoryStore(clock)
    handler = IdempotencyHandler(store, operation=operation, ttl_seconds=600, lease_seconds=5)

    async def stalls() -> Answer:
        await clock.pass_seconds(5)
        raise Forbidden

    with pytest.raises(Forbidden):
        await handler.run("key", "same", stalls)
    assert await store.read(RecordKey(operation, "", "key")) is not None
    assert counted("idempotency_stale_writes_total", operation) == 1


async def test_a_store_that_hangs_is_unavailable(monkeypatch: pytest.MonkeyPatch, clock: SetClock) -> None:
    """A store without limits of its own can't make anybody wait for ever."""

    class HangingStore(MemoryStore):
        async def claim(self, *_args: Any, **_kwargs: Any) -> Any:
            await asyncio.Event().wait()

    monkeypatch.setattr(idempotency_handler, "STORE_SECONDS_MAX", 0.05)
    handler = IdempotencyHandler(HangingStore(clock), operation="test", ttl_seconds=600)
    with pytest.raises(Unavailable):
        await handler.run("key", "same", never_called)
