"""What all actors of one simulated user share: a virtual clock with its agenda, ids, randomness, events and the truth."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from backend.app.simulator.emit import Emitter
from backend.app.simulator.objects import Shape
from backend.app.simulator.truth import Record, SourceState, Truth

Action = Callable[[], None]


@dataclass(slots=True)
class Stage:
    """One user's world; `now` is the virtual clock in unix seconds and moves only in `run`.

    `named_in` says where our user's id stands: in the checkout, the subscription's metadata or the customer's.
    """

    rng: random.Random
    tag: str
    user_id: str
    customer_id: str
    named_in: str
    now: int
    end: int
    emitter: Emitter
    truth: Truth
    is_customer_gone: bool = False
    _agenda: list[tuple[int, int, Action]] = field(default_factory=list)
    _count: int = 0

    @property
    def shape(self) -> Shape:
        """The API generation that this user's events are rendered in."""
        return self.emitter.shape

    def name(self, prefix: str) -> str:
        """A new object's id."""
        self._count += 1
        return f"{prefix}_{self.tag}x{self._count}"

    def chance(self, probability: float) -> bool:
        """Whether something of that probability happens."""
        return self.rng.random() < probability

    def later(self, at: int, action: Action) -> None:
        """Puts something on the agenda; of one second, what was put first happens first."""
        self._count += 1
        heapq.heappush(self._agenda, (max(at, self.now), self._count, action))

    def run(self) -> None:
        """Lets everything happen until the end."""
        while self._agenda and self._agenda[0][0] <= self.end:
            self.now, _, action = heapq.heappop(self._agenda)
            action()
        self.now = self.end

    def note(self, source: str, state: SourceState, cause: str) -> None:
        """Writes down what is true of a source from now on."""
        self.truth.add(Record(at=self.now, source=source, state=state, cause=cause))
