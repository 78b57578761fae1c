"""What the next event costs when much is stored already: of everybody, and of one user. Over HTTP, on PostgreSQL.

Every size is measured in turn with the smallest, in the same round, so that a slow minute cancels out.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg  # type: ignore[import-untyped]  # the driver ships no types

from backend.app.core.clock import SystemClock
from backend.app.core.database import Database
from backend.app.simulator import objects
from backend.app.simulator.objects import DAY_SECONDS, MONTH_SECONDS
from backend.tests.support.service import SERVE, ServiceProcess
from backend.tests.support.stored_history import (
    EVENTS_PER_LIFE,
    LIFE,
    copy_life,
    keep_life,
    life,
    name_of,
)
from bench.contenders import CONTENDERS, Kind, Running, Servers, prepared
from bench.events import SECRET, TYPES, signed_requests
from bench.load import BenchFailed, send_all
from bench.rounds import SEEDING_CONNECTIONS, Sample, timed
from bench.spread import Spread, ratio

CONTENDER = next(contender for contender in CONTENDERS if contender.name == "tollkeeper-1")
CONNECTIONS = 64
# The database with the smallest history, to copy from.
SMALLEST = "growth_smallest"
# Of the measured events half are of stored users, whom no two of a size share.
STORED_SHARE = 2
# One statement stores so many users; more would come near the time that a statement may take.
USERS_PER_STATEMENT = 5_000
# Far from the time that one run of the load generator may take, also where an event costs much.
SENT_AT_ONCE = 1_000
# Numbers of users from here on are in no history; and of those whose own history grows.
FIRST_NEW = 1_000_000_000
FIRST_OWN = 2_000_000_000
# All that a size or a round may use of these numbers.
NEW_PER_SIZE, NEW_PER_ROUND = 10_000_000, 100_000
# A vacuum of millions of rows.
MAINTENANCE_SECONDS_MAX = 900
# Stored users began a month ago, and what is measured happens to them now.
AGE_SECONDS = MONTH_SECONDS


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowthEffort:
    """Sizes in stored events; how many events are measured, after how many to warm up, in how many rounds.

    `own` are numbers of events of one user, by their kind, of `own_total` stored events in all; `own_events` of
    them are measured.
    """

    sizes: Sequence[int]
    rounds: int
    warm_up: int
    events: int
    own: Mapping[str, Sequence[int]]
    own_total: int
    own_events: int


# Rounds of a second or two; most of the quarter of an hour goes into storing the histories.
FULL = GrowthEffort(
    sizes=(10_000, 100_000, 500_000, 2_000_000),
    rounds=3,
    warm_up=400,
    events=2_000,
    own={"snapshots": (10, 100, 1_000, 10_000), "invoices": (10, 100, 1_000, 10_000)},
    own_total=10_000,
    own_events=100,
)
QUICK = GrowthEffort(
    sizes=(1_000, 10_000),
    rounds=1,
    warm_up=40,
    events=120,
    own={"snapshots": (10, 100), "invoices": (10, 100)},
    own_total=200,
    own_events=20,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowthPoint:
    """What an event cost with so many before it, and in the same rounds with the fewest."""

    stored: int
    samples: Sequence[Sample]
    smallest: Sequence[Sample]

    @property
    def cost_ratio(self) -> Spread | None:
        """CPU of service and PostgreSQL, to that with the fewest; None where it can't be measured."""
        return ratio(_costs(self.samples), _costs(self.smallest))


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """Points by the number of stored events; and by the number of a user's own, for each kind of them."""

    everybody: Sequence[GrowthPoint]
    one_user: dict[str, Sequence[GrowthPoint]]


def measure_growth(servers: Servers, effort: GrowthEffort, *, say: Callable[[str], None]) -> Growth:
    """Loads histories and measures on them; `say` hears what is being done.

    Raises:
        BenchFailed: an event was not applied.
    """
    return Growth(
        everybody=_measure_everybody(servers, effort, say),
        one_user={kind: _measure_one_user(servers, effort, kind, say) for kind in effort.own},
    )


def _measure_everybody(
    servers: Servers, effort: GrowthEffort, say: Callable[[str], None]
) -> list[GrowthPoint]:
    url = servers.postgres.create_database("growth", template=prepared(servers, Kind.TOLLKEEPER))
    now = int(time.time())
    with _serving(servers, "growth") as service:
        _send(service, [_body(event) for event in life(LIFE, created=now - AGE_SECONDS)], connections=1)
    asyncio.run(_keep_life(url))
    points: list[GrowthPoint] = []
    stored = EVENTS_PER_LIFE
    for place, size in enumerate(effort.sizes):
        say(f"growth: storing {size:,} events")
        users = size // EVENTS_PER_LIFE
        asyncio.run(_load(url, stored // EVENTS_PER_LIFE - 1, users - 1))
        stored = size
        if place == 0:
            servers.postgres.create_database(SMALLEST, template="growth")
        samples: list[Sample] = []
        smallest: list[Sample] = []
        with _serving(servers, "growth") as service:
            for number in range(effort.rounds):
                say(f"growth: {size:,} events, round {number + 1} of {effort.rounds}")
                name = f"growth_smallest_{place}_{number}"
                servers.postgres.create_database(name, template=SMALLEST)
                with _serving(servers, name) as little:
                    least = effort.sizes[0] // EVENTS_PER_LIFE
                    smallest.append(_measured(little, servers, effort, least, place, number))
                servers.postgres.drop_database(name)
                samples.append(_measured(service, servers, effort, users, place, number))
        points.append(GrowthPoint(stored=size, samples=samples, smallest=smallest))
    servers.postgres.drop_database("growth")
    return points


def _measured(
    service: Running, servers: Servers, effort: GrowthEffort, users: int, place: int, number: int
) -> Sample:
    """One round: a warm-up, then the measured events; each must have been applied."""
    per_round = effort.warm_up + effort.events
    step = users * STORED_SHARE // (effort.rounds * per_round)
    began = servers.postgres.execute("SELECT clock_timestamp()")[0][0]
    bodies = [
        _body(_next_event((number * per_round + turn) // STORED_SHARE * step + 1, turn, place, number))
        for turn in range(per_round)
    ]
    _send(service, bodies[: effort.warm_up], connections=CONNECTIONS)
    servers.postgres.execute("CHECKPOINT")
    sample = timed(service, servers, signed_requests(tuple(bodies[effort.warm_up :])), CONNECTIONS)
    _check(service, servers, began, len(bodies))
    return sample


def _next_event(stored: int, turn: int, place: int, number: int) -> dict[str, Any]:
    """In turn: a stored user's upgrade, a new user's checkout, a stored user's next invoice, a new subscriber."""
    now = int(time.time())
    label = f"{place}_{number}"
    new = name_of(FIRST_NEW + place * NEW_PER_SIZE + number * NEW_PER_ROUND + turn)
    old = name_of(stored)
    kind = turn % TYPES
    if kind == 0:
        return _upgrade(old, f"evt_{old}_{label}", now)
    if kind == 1:
        session = objects.checkout_session(
            f"cs_{new}",
            customer=f"cus_{new}",
            payment_intent=f"pi_{new}",
            client_reference_id=f"usr_{new}",
            metadata={"plan_code": "premium"},
            created=now,
        )
        return objects.event(f"evt_{new}_0", "checkout.session.completed", session, created=now)
    if kind == 2:  # noqa: PLR2004  # the third of four
        return _renewal(old, f"{old}_{label}", now)
    return life(new, created=now)[0]


def _measure_one_user(
    servers: Servers, effort: GrowthEffort, kind: str, say: Callable[[str], None]
) -> list[GrowthPoint]:
    sizes = effort.own[kind]
    with contextlib.ExitStack() as stack:
        services: dict[int, Running] = {}
        for own in sizes:
            say(f"growth: {own:,} {kind} of each user")
            name = f"growth_{kind}_{own}"
            url = servers.postgres.create_database(name, template=SMALLEST)
            stack.callback(servers.postgres.drop_database, name)
            services[own] = service = stack.enter_context(_serving(servers, name))
            began = servers.postgres.execute("SELECT clock_timestamp()")[0][0]
            bodies = _own_events(kind, effort.own_total // own, 0, own)
            _send(service, bodies, connections=SEEDING_CONNECTIONS)
            _check(service, servers, began, len(bodies))
            asyncio.run(_maintain(url))
        samples: dict[int, list[Sample]] = {own: [] for own in sizes}
        for number in range(effort.rounds):
            for own, service in services.items():
                users = effort.own_total // own
                turns = max(1, effort.own_events // users)
                bodies = _own_events(kind, users, own + number * turns, turns)[: effort.own_events]
                # Alone, so that it shares its cost with no other.
                samples[own].append(timed(service, servers, signed_requests(tuple(bodies)), 1))
        return [GrowthPoint(stored=own, samples=samples[own], smallest=samples[sizes[0]]) for own in sizes]


def _own_events(kind: str, users: int, first: int, turns: int) -> list[bytes]:
    """Events `first` to `first + turns - 1` of each of the users, turn by turn, the first their subscription."""
    began = int(time.time()) - AGE_SECONDS
    bodies = []
    for turn in range(first, first + turns):
        for user in range(users):
            name = name_of(FIRST_OWN + user)
            if turn == 0:
                event = life(name, created=began)[0]
            elif kind == "snapshots":
                event = _upgrade(name, f"evt_{name}_{turn}", began + turn, back=turn % 2 == 0)
            else:
                event = _renewal(name, f"{name}_{turn}", began + turn)
            bodies.append(_body(event))
    return bodies


def _upgrade(name: str, event_id: str, created: int, *, back: bool = False) -> dict[str, Any]:
    upgraded = objects.subscription(
        f"sub_{name}",
        customer=f"cus_{name}",
        prices=[objects.price("premium" if back else "vip")],
        period_start=created,
        period_end=created + MONTH_SECONDS,
        metadata={"user_id": f"usr_{name}"},
    )
    return objects.event(event_id, "customer.subscription.updated", upgraded, created=created)


def _renewal(name: str, tag: str, created: int) -> dict[str, Any]:
    paid = objects.invoice(
        f"in_{tag}",
        customer=f"cus_{name}",
        subscription_id=f"sub_{name}",
        metadata={"user_id": f"usr_{name}"},
        line_price=objects.price("premium"),
        period_start=created - DAY_SECONDS,
        period_end=created + MONTH_SECONDS,
    )
    return objects.event(f"evt_{tag}", "invoice.paid", paid, created=created)


def _costs(samples: Sequence[Sample]) -> list[float]:
    """CPU of service and PostgreSQL in microseconds per event."""
    return [
        sample.service_cpu_us + sample.postgres_cpu_us
        for sample in samples
        if sample.service_cpu_us is not None and sample.postgres_cpu_us is not None
    ]


def _body(event: dict[str, Any]) -> bytes:
    return json.dumps(event).encode("ascii")


def _send(service: Running, bodies: Sequence[bytes], *, connections: int) -> None:
    for first in range(0, len(bodies), SENT_AT_ONCE):
        requests = signed_requests(tuple(bodies[first : first + SENT_AT_ONCE]))
        send_all(service.service.url, requests, connections=connections)


def _check(service: Running, servers: Servers, began: Any, events: int) -> None:
    found = servers.postgres.execute(
        "SELECT count(*) FROM webhook_events WHERE received_at >= $1 AND status = 'success'",
        began,
        database=service.database,
    )[0][0]
    if found != events:
        raise BenchFailed(f"{service.database}: {found} of {events} events were applied")


@contextlib.contextmanager
def _serving(servers: Servers, database: str) -> Iterator[Running]:
    directory = servers.directory / f"serving_{database}"
    directory.mkdir(exist_ok=True)
    env = {"DATABASE_URL": servers.postgres.url(database), "STRIPE_WEBHOOK_SECRET": SECRET}
    service = ServiceProcess.start(directory, env, command=SERVE)
    try:
        yield Running(CONTENDER, service, database)
    finally:
        service.stop()


async def _keep_life(url: str) -> None:
    database = Database.open(url)
    try:
        async with database.transaction() as tx:
            await keep_life(tx, now=SystemClock().now())
    finally:
        await database.close()


async def _load(url: str, first: int, end: int) -> None:
    """Stores the users `first` to `end - 1`, beside the one that they are copies of."""
    database = Database.open(url)
    try:
        for number in range(first, end, USERS_PER_STATEMENT):
            async with database.transaction() as tx:
                await copy_life(tx, number, min(USERS_PER_STATEMENT, end - number))
    finally:
        await database.close()
    await _maintain(url)


async def _maintain(url: str) -> None:
    """What autovacuum would do by and by, done before the clock starts."""
    connection = await asyncpg.connect(url, command_timeout=MAINTENANCE_SECONDS_MAX)
    try:
        await connection.execute("VACUUM ANALYZE")
        await connection.execute("CHECKPOINT")
    finally:
        await connection.close()
