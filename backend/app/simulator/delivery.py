"""What the network does to events on their way: duplicates, disorder, delay and loss, all from one seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from backend.app.simulator.objects import DAY_SECONDS, Json

# An event usually arrives within seconds; a disordered one within the hour, so that it meets others on its way.
USUAL_SECONDS_MAX = 5
DISORDER_SECONDS_MAX = 3_600
# Stripe retries for three days (https://docs.stripe.com/webhooks#retries).
DELAY_SECONDS_MAX = 3 * DAY_SECONDS


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Probabilities from 0 to 1, each for one event."""

    duplicates: float = 0.2
    disorder: float = 0.3
    delay: float = 0.05
    loss: float = 0.0


@dataclass(frozen=True, slots=True)
class Route:
    """Deliveries in the order of their arrival; `lost` are events whose every delivery so far was lost."""

    delivered: tuple[Json, ...]
    lost: tuple[Json, ...]


def route(events: Sequence[Json], network: Network, rng: random.Random) -> Route:
    """The deliveries of events, which are in the order in which they happened."""
    arrivals: list[tuple[float, int, Json]] = []
    lost: list[Json] = []
    for number, event in enumerate(events):
        if rng.random() < network.loss:
            lost.append(event)
            continue
        copies = 1 + (rng.random() < network.duplicates)
        for _ in range(copies):
            late = 0.0
            if rng.random() < network.disorder:
                late += rng.uniform(0, DISORDER_SECONDS_MAX)
            if rng.random() < network.delay:
                late += rng.uniform(0, DELAY_SECONDS_MAX)
            if late:
                late += rng.uniform(0, USUAL_SECONDS_MAX)
            arrivals.append((event["created"] + late, number, event))
    arrivals.sort(key=lambda arrival: arrival[:2])
    return Route(tuple(event for _, _, event in arrivals), tuple(lost))
