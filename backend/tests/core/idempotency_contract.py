"""What every idempotency store must do; a store of your own proves itself by passing it.

    class TestMyStore(IdempotencyStoreContract):
        @pytest.fixture
        async def store(self): yield MyStore(...)

Time is the store's: `pass_seconds` really waits. Override it for a store whose clock can be set.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest

from backend.app.core.errors import Forbidden, IdempotencyInProgress, IdempotencyMismatch
from backend.app.core.idempotency import (
    Answer,
    IdempotencyHandler,
    IdempotencyStore,
    Outcome,
    Record,
    RecordKey,
    State,
    foreign_key,
)
from backend.app.core.ids import new_id
from backend.app.observability.metrics import get_metrics

PassSeconds = Callable[[float], Awaitable[None]]

EVERY_BYTE = bytes(range(256))
ANSWER = Answer(201, EVERY_BYTE, (("content-type", "application/octet-stream"), ("location", "/made/1")))
OTHER_ANSWER = Answer(200, b"{}", (("content-type", "application/json"),))
# A lease or memory that a test waits out, and one that no test can outlive.
SHORT_SECONDS = 0.15
LONG_SECONDS = 60.0

HOSTILE_KEYS = [
    " ",
    "a:b",
    "a\nb\r\nSet-Cookie: x",
    "'; DROP TABLE idempotency_keys; --",
    "%s%n{0}${x}",
    "\u202egpj.exe\u0007\x1b[31m",
    "Ünïcödé 💶",
    "*?[a-z]\\",
    "k" * 255,
    "💶" * 255,
]


def key_of(key: str = "key", *, caller: str = "caller", operation: str = "") -> RecordKey:
    """A key that no other test uses, unless the operation is given."""
    return RecordKey(operation or new_id(), caller, key)


def counted(name: str, operation: str) -> float:
    """The present value of a counter for one operation."""
    return get_metrics().registry.get_sample_value(name, {"operation": operation}) or 0.0


class IdempotencyStoreContract:
    @pytest.fixture
    def pass_seconds(self) -> PassSeconds:
        return asyncio.sleep

    async def test_the_first_claim_wins(self, store: IdempotencyStore) -> None:
        """Two claims of one key: the first owns it, the second sees whose it is."""
        key = key_of()
        first = await claim(store, key, "first")
        second = await claim(store, key, "second")
        assert (first.token, first.state, first.is_takeover) == ("first", State.IN_PROGRESS, False)
        assert (second.token, second.state, second.answer) == ("first", State.IN_PROGRESS, None)
        assert LONG_SECONDS / 2 < second.lease_seconds_left <= LONG_SECONDS
        assert second.key == key

    async def test_of_many_claims_at_once_one_wins(self, store: IdempotencyStore) -> None:
        """A hundred claims of one key at the same moment: exactly one owner."""
        key = key_of()
        tokens = [f"token-{number}" for number in range(100)]
        records = await asyncio.gather(*(claim(store, key, token) for token in tokens))
        winners = [token for token, record in zip(tokens, records, strict=True) if record.token == token]
        assert len(winners) == 1
        assert {record.token for record in records} == set(winners)

    async def test_an_answer_is_kept_byte_for_byte(self, store: IdempotencyStore) -> None:
        """Status, every possible byte, and the headers come back as they went in."""
        key = key_of()
        await claim(store, key, "token")
        assert await store.complete(key, "token", ANSWER, ttl_seconds=LONG_SECONDS)
        kept = await store.read(key)
        assert kept is not None
        assert (kept.key, kept.state, kept.answer) == (key, State.COMPLETED, ANSWER)
        again = await claim(store, key, "later")
        assert (again.token, again.answer) == ("token", ANSWER)

    async def test_an_empty_answer_is_an_answer(self, store: IdempotencyStore) -> None:
        """A 204 without a body is remembered too."""
        key = key_of()
        await claim(store, key, "token")
        await store.complete(key, "token", Answer(204), ttl_seconds=LONG_SECONDS)
        kept = await store.read(key)
        assert kept is not None
        assert kept.answer == Answer(204)

    async def test_only_the_holder_may_write(self, store: IdempotencyStore) -> None:
        """A token that does not own the key changes nothing."""
        key = key_of()
        await claim(store, key, "mine")
        assert not await store.complete(key, "yours", ANSWER, ttl_seconds=LONG_SECONDS)
        assert not await store.mark_ambiguous(key, "yours")
        assert not await store.release(key, "yours")
        kept = await store.read(key)
        assert kept is not None
        assert (kept.token, kept.state) == ("mine", State.IN_PROGRESS)

    async def test_a_finished_answer_is_final(self, store: IdempotencyStore) -> None:
        """Not even its own holder can change or forget an answer."""
        key = key_of()
        await claim(store, key, "token")
        await store.complete(key, "token", ANSWER, ttl_seconds=LONG_SECONDS)
        assert not await store.complete(key, "token", OTHER_ANSWER, ttl_seconds=LONG_SECONDS)
        assert not await store.mark_ambiguous(key, "token")
        assert not await store.release(key, "token")
        kept = await store.read(key)
        assert kept is not None
        assert kept.answer == ANSWER

    async def test_an_expired_lease_may_not_write(
        self, store: IdempotencyStore, pass_seconds: PassSeconds
    ) -> None:
        """A holder past its lease is refused, even while nobody has taken over."""
        key = key_of()
        await claim(store, key, "slow", lease_seconds=SHORT_SECONDS)
        await pass_seconds(2 * SHORT_SECONDS)
        assert not await store.complete(key, "slow", ANSWER, ttl_seconds=LONG_SECONDS)
        assert not await store.mark_ambiguous(key, "slow")
        assert not await store.release(key, "slow")
        kept = await store.read(key)
        assert kept is not None
        assert (kept.state, kept.answer) == (State.IN_PROGRESS, None)
        assert kept.lease_seconds_left <= 0

    async def test_a_stalled_holder_can_not_overwrite(
        self, store: IdempotencyStore, pass_seconds: PassSeconds
    ) -> None:
        """After a takeover the first holder's writes are refused, before and after the second finishes."""
        key = key_of()
        await claim(store, key, "stalled", lease_seconds=SHORT_SECONDS)
        await pass_seconds(2 * SHORT_SECONDS)
        second = await claim(store, key, "second")
        assert (second.token, second.record_id, second.is_takeover) == ("second", "stalled", True)
        assert not await store.complete(key, "stalled", OTHER_ANSWER, ttl_seconds=LONG_SECONDS)
        assert not await store.release(key, "stalled")
        assert await store.complete(key, "second", ANSWER, ttl_seconds=LONG_SECONDS)
        assert not await store.complete(key, "stalled", OTHER_ANSWER, ttl_seconds=LONG_SECONDS)
        assert not await store.mark_ambiguous(key, "stalled")
        kept = await store.read(key)
        assert kept is not None
        assert kept.answer == ANSWER

    async def test_a_takeover_has_one_winner(
        self, store: IdempotencyStore, pass_seconds: PassSeconds
    ) -> None:
        """Twenty callers who find the same abandoned key: one takes over."""
        key = key_of()
        await claim(store, key, "gone", lease_seconds=SHORT_SECONDS)
        await pass_seconds(2 * SHORT_SECONDS)
        tokens = [f"token-{number}" for number in range(20)]
        records = await asyncio.gather(*(claim(store, key, token) for token in tokens))
        assert sum(r.token == t for r, t in zip(records, tokens, strict=True)) == 1

    async def test_a_released_key_is_new(self, store: IdempotencyStore) -> None:
        """After a release nothing of the first attempt is left, not even its foreign key."""
        key = key_of()
        await claim(store, key, "first")
        assert await store.release(key, "first")
        assert await store.read(key) is None
        again = await claim(store, key, "second", fingerprint="different")
        assert (again.token, again.record_id, again.is_takeover) == ("second", "second", False)

    async def test_ambiguous_work_blocks_until_its_lease_is_over(
        self, store: IdempotencyStore, pass_seconds: PassSeconds
    ) -> None:
        """Nobody repeats work of unknown outcome at once; after the lease one may take over."""
        key = key_of()
        lease_seconds = 4 * SHORT_SECONDS
        await claim(store, key, "first", lease_seconds=lease_seconds)
        assert await store.mark_ambiguous(key, "first")
        blocked = await claim(store, key, "second")
        assert (blocked.token, blocked.state) == ("first", State.AMBIGUOUS)
        assert not await store.complete(key, "first", ANSWER, ttl_seconds=LONG_SECONDS)
        await pass_seconds(lease_seconds + SHORT_SECONDS)
        later = await claim(store, key, "third")
        assert (later.token, later.state, later.is_takeover) == ("third", State.IN_PROGRESS, True)

    async def test_another_request_never_takes_over(
        self, store: IdempotencyStore, pass_seconds: PassSeconds
    ) -> None:
        """An abandoned key is still bound to what was asked for."""
        key = key_of()
        await claim(store, key, "first", lease_seconds=SHORT_SECONDS)
        await pass_seconds(2 * SHORT_SECONDS)
        other = await claim(store, key, "second", fingerprint="different")
        assert (other.token, other.fingerprint) == ("first", "same")

    async def test_an_answer_is_forgotten_after_its_time(
        self, store: IdempotencyStore, pass_seconds: PassSeconds
    ) -> None:
        """Once `ttl_seconds` are over the key is new, for a different request too."""
        key = key_of()
        await claim(store, key, "first")
        await store.complete(key, "first", ANSWER, ttl_seconds=SHORT_SECONDS)
        await pass_seconds(2 * SHORT_SECONDS)
        assert await store.read(key) is None
        again = await claim(store, key, "second", fingerprint="different")
        assert (again.token, again.record_id, again.answer) == ("second", "second", None)
        assert again.fingerprint == "different"

    async def test_abandoned_work_is_forgotten_in_the_end(
        self, store: IdempotencyStore, pass_seconds: PassSeconds
    ) -> None:
        """A claim that nobody returns to does not stay for ever."""
        key = key_of()
        await claim(store, key, "gone", lease_seconds=SHORT_SECONDS, ttl_seconds=SHORT_SECONDS)
        await pass_seconds(3 * SHORT_SECONDS)
        assert await store.read(key) is None
        assert not (await claim(store, key, "new", fingerprint="different")).is_takeover

    async def test_the_first_remembered_answer_counts(self, store: IdempotencyStore) -> None:
        """Of fifty answers remembered at once one is kept, and everybody is told the same one."""
        key = key_of()
        answers = [Answer(200, str(number).encode()) for number in range(50)]
        records = await asyncio.gather(
            *(
                store.remember(key, "same", f"token-{number}", answer, ttl_seconds=LONG_SECONDS)
                for number, answer in enumerate(answers)
            )
        )
        assert len({(record.token, record.answer) for record in records}) == 1
        kept = await store.read(key)
        assert kept is not None
        assert (kept.token, kept.answer) == (records[0].token, records[0].answer)

    async def test_remembering_does_not_end_work_in_progress(self, store: IdempotencyStore) -> None:
        """An answer from elsewhere never replaces a claim."""
        key = key_of()
        await claim(store, key, "working")
        record = await store.remember(key, "same", "other", ANSWER, ttl_seconds=LONG_SECONDS)
        assert (record.token, record.state, record.answer) == ("working", State.IN_PROGRESS, None)

    async def test_a_remembered_answer_is_forgotten_after_its_time(
        self, store: IdempotencyStore, pass_seconds: PassSeconds
    ) -> None:
        """Once its time is over another answer may take its place."""
        key = key_of()
        await store.remember(key, "same", "first", ANSWER, ttl_seconds=SHORT_SECONDS)
        await pass_seconds(2 * SHORT_SECONDS)
        again = await store.remember(key, "same", "second", OTHER_ANSWER, ttl_seconds=LONG_SECONDS)
        assert (again.token, again.answer) == ("second", OTHER_ANSWER)

    async def test_callers_and_operations_are_apart(self, store: IdempotencyStore) -> None:
        """The same key of another caller or operation is another key, whatever characters they contain."""
        operation = new_id()
        keys = [
            RecordKey(operation, "a", "b:c"),
            RecordKey(operation, "a:b", "c"),
            RecordKey(operation, "", "a:b:c"),
            RecordKey(operation, "A", "b:c"),
            RecordKey(operation + ":a", "b", "c"),
        ]
        for number, key in enumerate(keys):
            token = f"token-{number}"
            assert (await claim(store, key, token)).token == token
            await store.complete(key, token, Answer(200, token.encode()), ttl_seconds=LONG_SECONDS)
        for number, key in enumerate(keys):
            kept = await store.read(key)
            assert kept is not None
            assert (kept.key, kept.answer) == (key, Answer(200, f"token-{number}".encode()))

    async def test_keys_may_hold_hostile_characters(self, store: IdempotencyStore) -> None:
        """A key is data: no character of it means anything to a store."""
        operation = new_id()
        for text in HOSTILE_KEYS:
            key = RecordKey(operation, text, text)
            answer = Answer(200, text.encode())
            assert (await claim(store, key, "token")).key == key
            assert await store.complete(key, "token", answer, ttl_seconds=LONG_SECONDS)
        for text in HOSTILE_KEYS:
            kept = await store.read(RecordKey(operation, text, text))
            assert kept is not None
            assert kept.answer == Answer(200, text.encode())

    async def test_a_hundred_calls_at_once_do_the_work_once(self, store: IdempotencyStore) -> None:
        """Everybody else is told to come back, and then gets the same answer."""
        handler, operation = handler_on(store)
        done: list[str] = []

        async def work() -> Answer:
            done.append(foreign_key())
            await asyncio.sleep(SHORT_SECONDS)
            return ANSWER

        results = await asyncio.gather(
            *(handler.run("key", "same", work) for _ in range(100)), return_exceptions=True
        )
        kinds = Counter(type(result) for result in results)
        assert len(done) == 1
        assert kinds[Outcome] + kinds[IdempotencyInProgress] == 100
        outcomes = [result for result in results if isinstance(result, Outcome)]
        assert sum(not outcome.replayed for outcome in outcomes) == 1
        assert await handler.run("key", "same", work) == Outcome(ANSWER, replayed=True)
        assert counted("idempotent_hits_total", operation) == len(outcomes)
        assert len(done) == 1

    async def test_two_callers_with_one_key_are_served_apart(self, store: IdempotencyStore) -> None:
        """Nobody sees another caller's answer by guessing a key."""
        handler, _ = handler_on(store)
        first = await handler.run("key", "same", answering(ANSWER), caller="first")
        second = await handler.run("key", "same", answering(OTHER_ANSWER), caller="second")
        assert (first.answer, second.answer) == (ANSWER, OTHER_ANSWER)
        assert not second.replayed

    async def test_a_lease_lost_mid_run_is_a_refused_write(
        self, store: IdempotencyStore, pass_seconds: PassSeconds
    ) -> None:
        """A holder that stalls past its lease gets the answer of the one who took over, and is counted."""
        handler, operation = handler_on(store, lease_seconds=SHORT_SECONDS)
        rescuer = IdempotencyHandler(store, operation=operation, ttl_seconds=LONG_SECONDS)
        foreign_keys: list[str] = []

        async def stalls() -> Answer:
            foreign_keys.append(foreign_key())
            await pass_seconds(2 * SHORT_SECONDS)
            await rescuer.run("key", "same", finishes)
            return OTHER_ANSWER

        async def finishes() -> Answer:
            foreign_keys.append(foreign_key())
            return ANSWER

        assert await handler.run("key", "same", stalls) == Outcome(ANSWER, replayed=True)
        assert await handler.get_cached("key") == ANSWER
        assert counted("idempotency_stale_writes_total", operation) == 1
        assert len(set(foreign_keys)) == 1

    async def test_a_crash_frees_the_key_after_the_lease(
        self, store: IdempotencyStore, pass_seconds: PassSeconds
    ) -> None:
        """A process that dies between claim and answer blocks its key for the lease only."""
        handler, operation = handler_on(store)
        key = key_of(caller="", operation=operation)
        lease_seconds = 4 * SHORT_SECONDS
        await claim(store, key, "died", lease_seconds=lease_seconds)
        with pytest.raises(IdempotencyInProgress):
            await handler.run("key", "same", answering(ANSWER))
        await pass_seconds(lease_seconds + SHORT_SECONDS)
        assert await handler.run("key", "same", answering(ANSWER)) == Outcome(ANSWER, replayed=False)

    async def test_cancelled_work_is_ambiguous(
        self, store: IdempotencyStore, pass_seconds: PassSeconds
    ) -> None:
        """A client that hangs up leaves a record that says so, and a key that works again after the lease."""
        lease_seconds = 6 * SHORT_SECONDS
        handler, operation = handler_on(store, lease_seconds=lease_seconds)
        started = asyncio.Event()

        async def hangs() -> Answer:
            started.set()
            await asyncio.Event().wait()
            raise AssertionError

        task = asyncio.create_task(handler.run("key", "same", hangs))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        kept = await store.read(key_of(caller="", operation=operation))
        assert kept is not None
        assert kept.state is State.AMBIGUOUS
        with pytest.raises(IdempotencyInProgress):
            await handler.run("key", "same", answering(ANSWER))
        await pass_seconds(lease_seconds + SHORT_SECONDS)
        assert (await handler.run("key", "same", answering(ANSWER))).answer == ANSWER

    async def test_a_cancelled_claim_leaves_the_key_free(self, store: IdempotencyStore) -> None:
        """Cancelled before the work began, at any point of the claim: nothing is left behind."""
        handler, _ = handler_on(store)
        started: set[int] = set()
        for turns in range(12):
            task = asyncio.create_task(handler.run(f"key-{turns}", "same", hanging(started, turns)))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert 0 not in started
        for turns in set(range(12)) - started:
            outcome = await handler.run(f"key-{turns}", "same", answering(ANSWER))
            assert outcome == Outcome(ANSWER, replayed=False)

    async def test_another_request_is_a_mismatch_before_it_is_in_progress(
        self, store: IdempotencyStore
    ) -> None:
        """A reused key is the client's error, whether or not the first request has ended."""
        handler, _ = handler_on(store)

        async def work() -> Answer:
            with pytest.raises(IdempotencyMismatch):
                await handler.run("key", "different", never_called)
            with pytest.raises(IdempotencyInProgress):
                await handler.run("key", "same", never_called)
            return ANSWER

        await handler.run("key", "same", work)
        with pytest.raises(IdempotencyMismatch):
            await handler.run("key", "different", never_called)

    async def test_refused_work_leaves_the_key_free(self, store: IdempotencyStore) -> None:
        """A refusal changes nothing, so the next request with this key is the first."""
        handler, operation = handler_on(store)

        async def refuses() -> Answer:
            raise Forbidden

        with pytest.raises(Forbidden):
            await handler.run("key", "same", refuses)
        assert await handler.get_cached("key") is None
        assert counted("idempotency_stale_writes_total", operation) == 0
        assert await handler.run("key", "different", answering(ANSWER)) == Outcome(ANSWER, replayed=False)


async def claim(
    store: IdempotencyStore,
    key: RecordKey,
    token: str,
    *,
    fingerprint: str = "same",
    lease_seconds: float = LONG_SECONDS,
    ttl_seconds: float = LONG_SECONDS,
) -> Record:
    return await store.claim(key, fingerprint, token, lease_seconds=lease_seconds, ttl_seconds=ttl_seconds)


def handler_on(
    store: IdempotencyStore, *, lease_seconds: float = LONG_SECONDS
) -> tuple[IdempotencyHandler, str]:
    operation = new_id()
    handler = IdempotencyHandler(
        store, operation=operation, ttl_seconds=LONG_SECONDS, lease_seconds=lease_seconds
    )
    return handler, operation


def answering(answer: Answer) -> Callable[[], Awaitable[Answer]]:
    async def work() -> Answer:
        return answer

    return work


def hanging(started: set[int], number: int) -> Callable[[], Awaitable[Answer]]:
    async def work() -> Answer:
        started.add(number)
        await asyncio.Event().wait()
        raise AssertionError("an event that nobody sets was set")

    return work


async def never_called() -> Answer:
    raise AssertionError("this work must not be done")
