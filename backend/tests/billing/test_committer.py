"""Deliveries that arrive together share a transaction, and none of them pays for another."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from backend.app.billing.committer import RETRY_AFTER_SECONDS, Committer
from backend.app.core.errors import StoreUnavailable, Unavailable


class Store:
    """Records the batches it was given; commits when told to."""

    def __init__(self, *, bad: frozenset[int] = frozenset(), error: Exception | None = None) -> None:
        self.batches: list[list[int]] = []
        self.done: list[int] = []
        self.open = asyncio.Event()
        self.open.set()
        self._bad = bad
        self._error = error or ValueError("a bad event")

    async def commit(self, batch: Sequence[int]) -> list[int]:
        self.batches.append(list(batch))
        await self.open.wait()
        if self._bad & set(batch):
            raise self._error
        self.done += batch
        return [-item for item in batch]


async def settle() -> None:
    """Lets every task that can go on do so."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_lone_delivery_waits_for_nobody() -> None:
    store = Store()
    committer = Committer(store.commit, lanes=1)
    assert await asyncio.wait_for(committer.submit(1), timeout=1) == -1
    assert await asyncio.wait_for(committer.submit(2), timeout=1) == -2
    assert store.batches == [[1], [2]]


async def test_what_arrives_while_a_transaction_is_under_way_goes_together_into_the_next() -> None:
    store = Store()
    committer = Committer(store.commit, lanes=1)
    store.open.clear()
    first = asyncio.create_task(committer.submit(0))
    await settle()
    others = [asyncio.create_task(committer.submit(item)) for item in (1, 2, 3)]
    await settle()
    assert store.batches == [[0]]
    store.open.set()
    assert await asyncio.gather(first, *others) == [0, -1, -2, -3]
    assert store.batches == [[0], [1, 2, 3]]


async def test_a_batch_has_a_limit_and_what_is_beyond_comes_next() -> None:
    store = Store()
    committer = Committer(store.commit, lanes=1, batch_items_max=4)
    answers = await asyncio.gather(*(committer.submit(item) for item in range(10)))
    assert answers == [-item for item in range(10)]
    assert max(map(len, store.batches)) == 4


async def test_a_bad_delivery_fails_alone() -> None:
    store = Store(bad=frozenset({2}))
    committer = Committer(store.commit, lanes=1)
    answers = await asyncio.gather(*(committer.submit(item) for item in range(5)), return_exceptions=True)
    assert isinstance(answers[2], ValueError)
    assert [answer for answer in answers if not isinstance(answer, BaseException)] == [0, -1, -3, -4]
    assert sorted(store.done) == [0, 1, 3, 4]


async def test_a_store_that_is_down_is_not_asked_again_for_each_of_a_batch() -> None:
    store = Store(bad=frozenset({0, 1, 2}), error=StoreUnavailable())
    committer = Committer(store.commit, lanes=1)
    answers = await asyncio.gather(*(committer.submit(item) for item in range(3)), return_exceptions=True)
    assert all(isinstance(answer, StoreUnavailable) for answer in answers)
    assert len(store.batches) == 1


async def test_a_lock_that_one_delivery_waits_for_does_not_fail_its_neighbours() -> None:
    error = StoreUnavailable()
    error.is_contention = True
    store = Store(bad=frozenset({1}), error=error)
    committer = Committer(store.commit, lanes=1)
    answers = await asyncio.gather(*(committer.submit(item) for item in range(3)), return_exceptions=True)
    assert answers[0] == 0
    assert isinstance(answers[1], StoreUnavailable)
    assert answers[2] == -2


async def test_a_caller_that_is_cancelled_loses_only_the_answer() -> None:
    store = Store()
    committer = Committer(store.commit, lanes=1)
    store.open.clear()
    callers = [asyncio.create_task(committer.submit(item)) for item in range(3)]
    await settle()
    callers[0].cancel()
    callers[1].cancel()
    await settle()
    store.open.set()
    assert await callers[2] == -2
    assert sorted(store.done) == [0, 1, 2]


async def test_a_full_queue_says_when_to_come_again_and_takes_nothing() -> None:
    store = Store()
    committer = Committer(store.commit, lanes=1, queue_items_max=2)
    store.open.clear()
    taken = [asyncio.create_task(committer.submit(0))]
    await settle()
    taken += [asyncio.create_task(committer.submit(item)) for item in (1, 2)]
    await settle()
    with pytest.raises(Unavailable) as refused:
        await committer.submit(3)
    assert refused.value.headers == {"Retry-After": str(RETRY_AFTER_SECONDS)}
    store.open.set()
    assert await asyncio.gather(*taken) == [0, -1, -2]
    assert 3 not in store.done


async def test_transactions_run_side_by_side_but_no_more_of_them_than_there_are_lanes() -> None:
    store = Store()
    committer = Committer(store.commit, lanes=2)
    store.open.clear()
    callers = []
    for item in range(5):
        callers.append(asyncio.create_task(committer.submit(item)))
        await settle()
    assert store.batches == [[0], [1]]
    store.open.set()
    await asyncio.gather(*callers)
    assert store.batches[2:] == [[2, 3, 4]]


async def test_what_comes_at_once_is_shared_among_the_lanes_that_are_free() -> None:
    store = Store()
    committer = Committer(store.commit, lanes=3)
    store.open.clear()
    busy = asyncio.create_task(committer.submit(0))
    await settle()
    callers = [asyncio.create_task(committer.submit(item)) for item in range(1, 8)]
    await settle()
    assert store.batches == [[0], [1, 2, 3, 4], [5, 6, 7]]
    store.open.set()
    assert await asyncio.gather(busy, *callers) == [-item for item in range(8)]


async def test_a_stop_waits_for_what_was_taken() -> None:
    store = Store()
    committer = Committer(store.commit, lanes=1)
    store.open.clear()
    callers = [asyncio.create_task(committer.submit(item)) for item in range(3)]
    await settle()
    stop = asyncio.create_task(committer.drain(timeout_seconds=5))
    await settle()
    assert not stop.done()
    store.open.set()
    await stop
    assert sorted(store.done) == [0, 1, 2]
    await asyncio.gather(*callers)


async def test_a_process_that_ends_while_a_batch_is_done_one_by_one_tells_all_of_them() -> None:
    never = asyncio.Event()

    async def commit(batch: Sequence[int]) -> list[int]:
        if len(batch) > 1:
            raise ValueError("a bad event")
        if batch == [2]:
            await never.wait()
        return [-item for item in batch]

    committer = Committer(commit, lanes=1)
    callers = [asyncio.create_task(committer.submit(item)) for item in range(5)]
    await settle()
    assert callers[1].done()
    for lane in committer._lanes:
        lane.cancel()
    answers = await asyncio.wait_for(asyncio.gather(*callers, return_exceptions=True), timeout=5)
    assert answers[:2] == [0, -1]
    assert all(isinstance(answer, Unavailable) for answer in answers[2:])
