"""What Stripe would send: events around objects, with ids of their own, and the ledger lines that should follow."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from backend.app.simulator import objects
from backend.app.simulator.objects import Json, Shape

# Letters alone: a random id must never look like a card number.
EVENT_ID_LETTERS = 20


class Money(NamedTuple):
    """A ledger line: an amount in the currency's smallest unit, and whether that money moved."""

    amount: int | None
    settled: bool


@dataclass(slots=True)
class Emitter:
    """Collects one user's events in the order in which they happened."""

    rng: random.Random
    shape: Shape
    account: str | None
    events: list[Json] = field(default_factory=list)
    ledger: dict[str, Money] = field(default_factory=dict)

    def emit(
        self,
        at: int,
        event_type: str,
        content: Json,
        *,
        previous: Json | None = None,
        money: Mapping[str, Money] | None = None,
    ) -> str:
        """An event of that second; its id. `{event}` in a key of `money` stands for it."""
        event_id = "evt_" + "".join(self.rng.choices(string.ascii_letters, k=EVENT_ID_LETTERS))
        document = objects.event(
            event_id,
            event_type,
            # The world goes on changing the object; the event keeps it as it is now.
            json.loads(json.dumps(content)),
            created=at,
            shape=self.shape,
            account=self.account,
            previous_attributes=previous,
        )
        self.events.append(document)
        for key, line in (money or {}).items():
            self.ledger.setdefault(key.format(event=event_id), line)
        return event_id


def changed_attributes(before: Json, after: Json) -> Json:
    """`previous_attributes` of an update: the old value of each top-level field that is another now.

    Of metadata only the keys that changed are told, with null for those that are new.
    Source: https://docs.stripe.com/api/events/object#event_object-data-previous_attributes
    """
    previous: dict[str, Any] = {key: value for key, value in before.items() if after.get(key) != value}
    if "metadata" in previous:
        old, new = before["metadata"], after["metadata"]
        previous["metadata"] = {
            key: old.get(key) for key in sorted({*old, *new}) if old.get(key) != new.get(key)
        }
    return previous
