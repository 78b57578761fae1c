"""Group commit: deliveries that arrive while a transaction is under way go together into the next one.

    committer = Committer(commit_batch, lanes=2)
    answer = await committer.submit(genuine)

There is no timer: a lone delivery finds a free lane and starts at once; under load a batch is what has
gathered while the one before was on its way to the disk, so that many deliveries share one flush.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from backend.app.core.errors import StoreUnavailable, Unavailable

Item = TypeVar("Item")
Result = TypeVar("Result")

# A flush shared by so many costs each next to nothing; more would only make the first wait for the last.
BATCH_ITEMS_MAX = 64
# Several seconds' work. What would have to wait longer is told so at once, and Stripe sends it again.
QUEUE_ITEMS_MAX = 2_000
# When to come back: about the time in which a full queue is worked off.
RETRY_AFTER_SECONDS = 5


@dataclass(frozen=True, slots=True)
class _Waiting(Generic[Item, Result]):
    item: Item
    done: asyncio.Future[Result]


class Committer(Generic[Item, Result]):
    """Runs `work` on batches, in at most `lanes` transactions at a time.

    `work` gives one result for each item, in their order, or raises and then has changed nothing. A batch
    that fails is done again item by item, so an item that can't be done never harms its neighbours.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Item]], Coroutine[Any, Any, Sequence[Result]]],
        *,
        lanes: int,
        batch_items_max: int = BATCH_ITEMS_MAX,
        queue_items_max: int = QUEUE_ITEMS_MAX,
    ) -> None:
        self._work = work
        self._lanes_max = lanes
        self._batch_items_max = batch_items_max
        self._queue_items_max = queue_items_max
        self._queue: deque[_Waiting[Item, Result]] = deque()
        self._lanes: set[asyncio.Task[None]] = set()
        # Counted apart, because a task that has returned is done a moment later only.
        self._lanes_busy = 0
        # Those of them that have nothing in hand yet.
        self._lanes_free = 0

    async def submit(self, item: Item) -> Result:
        """The result for an item, once its transaction has committed.

        A caller that is cancelled loses only the result: the item is still done.

        Raises:
            Unavailable: the queue is full; nothing was done, and when to try again is in the headers.
            Exception: whatever `work` raised for this item.
        """
        if len(self._queue) >= self._queue_items_max:
            raise Unavailable("Too many requests are waiting.", retry_after_seconds=RETRY_AFTER_SECONDS)
        done: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._queue.append(_Waiting(item, done))
        if self._lanes_busy < self._lanes_max:
            self._lanes_busy += 1
            self._lanes_free += 1
            lane = asyncio.create_task(self._lane(), name="committer-lane")
            self._lanes.add(lane)
            lane.add_done_callback(self._lanes.discard)
        return await done

    async def drain(self, *, timeout_seconds: float) -> None:
        """Waits until all that was submitted is done, or the time is over."""
        if self._lanes:
            await asyncio.wait(self._lanes, timeout=timeout_seconds)

    async def _lane(self) -> None:
        try:
            while self._queue:
                # While the rows of one batch are on their way, the next one is decided.
                share = math.ceil(len(self._queue) / self._lanes_free)
                batch = [self._queue.popleft() for _ in range(min(share, self._batch_items_max))]
                self._lanes_free -= 1
                try:
                    await self._do(batch)
                finally:
                    self._lanes_free += 1
        finally:
            self._lanes_free -= 1
            self._lanes_busy -= 1

    async def _do(self, batch: Sequence[_Waiting[Item, Result]]) -> None:
        try:
            await self._try(batch)
        except asyncio.CancelledError:
            # The process is ending; what was not committed is sent again.
            _fail([*batch, *self._queue], Unavailable())
            self._queue.clear()
            raise

    async def _try(self, batch: Sequence[_Waiting[Item, Result]]) -> None:
        try:
            results = await self._work([waiting.item for waiting in batch])
        except Exception as error:  # noqa: BLE001  # whatever it is, those who wait must be told
            await self._after(error, batch)
        else:
            for waiting, result in zip(batch, results, strict=True):
                # Its caller may have gone meanwhile.
                if not waiting.done.done():
                    waiting.done.set_result(result)

    async def _after(self, error: Exception, batch: Sequence[_Waiting[Item, Result]]) -> None:
        is_outage = isinstance(error, StoreUnavailable)
        is_contention = isinstance(error, StoreUnavailable) and error.is_contention
        if len(batch) == 1 or (is_outage and not is_contention):
            # Each alone would fail as well.
            _fail(batch, error)
        elif is_contention:
            # Side by side: one that waits for a lock must not hold back the others a second time.
            await asyncio.gather(*(self._do([waiting]) for waiting in batch))
        else:
            for waiting in batch:
                await self._do([waiting])


def _fail(batch: Sequence[_Waiting[Item, Result]], error: Exception) -> None:
    for waiting in batch:
        if not waiting.done.done():
            waiting.done.set_exception(error)
