"""Measures services and pgbench in rounds, all in turn, so that a slow minute of the machine meets them all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bench.contenders import Contender, Running, Servers, running
from bench.cpu import tree_cpu_seconds
from bench.events import TYPES, make_workload, signed_requests
from bench.load import percentile, send_all
from bench.pgbench import PgBench, run_pgbench

# Seeds and warm-up come over so many connections, whatever is measured then: they only have to be there.
SEEDING_CONNECTIONS = 64
# Enough that every code path and every pooled connection has been used once before the clock starts.
WARM_UP_EVENTS = 80
# At one connection a warm-up tells the speed as well with fewer.
WARM_UP_EVENTS_LONE = 20
# A p99 of fewer latencies is one single latency.
EVENTS_MIN = 200
# What a machine ten times as fast would take; it bounds the memory of ready requests to about 200 MB.
EVENTS_MAX = 60_000

MICROSECONDS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is measured: so many rounds of about so many seconds each, after a warm-up."""

    rounds: int
    seconds: float
    events_min: int
    connections: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One measurement of one round: events per second, latencies in milliseconds, CPU in microseconds per event.

    A CPU time is None where it can't be measured.
    """

    events: int
    per_second: float
    p50_ms: float
    p99_ms: float
    service_cpu_us: float | None
    postgres_cpu_us: float | None
    load_cpu_us: float | None


@dataclass(slots=True)
class Samples:
    """All measurements by name and number of connections, one entry per round."""

    by_place: dict[tuple[str, int], list[Sample]] = field(default_factory=lambda: defaultdict(list))

    def of(self, name: str, connections: int) -> Sequence[Sample]:
        """Those of all rounds, in their order; none where it was left out."""
        return self.by_place.get((name, connections), ())


def measure_rounds(
    contenders: Sequence[Contender],
    pgbenches: Sequence[PgBench],
    servers: Servers,
    effort: Effort,
    *,
    say: Callable[[str], None],
) -> Samples:
    """Everything once per round; `say` hears what is being done.

    Raises:
        BenchFailed: an event was refused, or rows are missing afterwards.
    """
    samples = Samples()
    for number in range(1, effort.rounds + 1):
        for contender in contenders:
            say(f"round {number} of {effort.rounds}: {contender.title}")
            with running(contender, servers, label=f"r{number}") as service:
                _measure_service(service, servers, effort, samples, label=f"r{number}")
        for variant in pgbenches:
            say(f"round {number} of {effort.rounds}: {variant.title}")
            for connections in effort.connections:
                samples.by_place[variant.name, connections].append(
                    _measure_pgbench(variant, servers, connections, effort.seconds)
                )
    return samples


def _measure_service(
    service: Running, servers: Servers, effort: Effort, samples: Samples, *, label: str
) -> None:
    delivered = users = 0
    for connections in effort.connections:
        warm_up = WARM_UP_EVENTS_LONE if connections == 1 else WARM_UP_EVENTS
        # Twice: the first one also opens connections and fills caches, the second tells the speed.
        rate = 0.0
        for step in range(2):
            work = make_workload(warm_up, prefix=f"w{label}c{connections}s{step}")
            _seed(service, work.seeds)
            rate = send_all(
                service.service.url, signed_requests(work.events), connections=connections
            ).per_second
            delivered += len(work.seeds) + len(work.events)
            users += work.users
        wanted = min(max(round(rate * effort.seconds), effort.events_min), EVENTS_MAX)
        work = make_workload(wanted - wanted % TYPES, prefix=f"{label}c{connections}")
        _seed(service, work.seeds)
        samples.by_place[service.contender.name, connections].append(
            timed(service, servers, signed_requests(work.events), connections)
        )
        delivered += len(work.seeds) + len(work.events)
        users += work.users
    service.check_rows(servers, events=delivered, users=users)


def _seed(service: Running, seeds: tuple[bytes, ...]) -> None:
    send_all(service.service.url, signed_requests(seeds), connections=SEEDING_CONNECTIONS)


def timed(service: Running, servers: Servers, requests: list[bytes], connections: int) -> Sample:
    """Sends ready requests and says what they cost."""
    postgres_before = tree_cpu_seconds(servers.postgres.pid)
    service_before = tree_cpu_seconds(service.service.pid)
    load = send_all(service.service.url, requests, connections=connections)
    service_after = tree_cpu_seconds(service.service.pid)
    postgres_after = tree_cpu_seconds(servers.postgres.pid)
    return Sample(
        events=load.requests,
        per_second=load.per_second,
        p50_ms=percentile(load.latencies_ms, 0.5),
        p99_ms=percentile(load.latencies_ms, 0.99),
        service_cpu_us=_per_event(service_before, service_after, load.requests),
        postgres_cpu_us=_per_event(postgres_before, postgres_after, load.requests),
        load_cpu_us=load.cpu_seconds / load.requests * MICROSECONDS,
    )


def _measure_pgbench(variant: PgBench, servers: Servers, connections: int, seconds: float) -> Sample:
    before = tree_cpu_seconds(servers.postgres.pid)
    result = run_pgbench(variant, servers, clients=connections, seconds=seconds)
    after = tree_cpu_seconds(servers.postgres.pid)
    return Sample(
        events=result.events,
        per_second=result.per_second,
        p50_ms=percentile(result.latencies_ms, 0.5),
        p99_ms=percentile(result.latencies_ms, 0.99),
        service_cpu_us=None,
        postgres_cpu_us=_per_event(before, after, result.events),
        load_cpu_us=result.cpu_seconds / result.events * MICROSECONDS,
    )


def _per_event(before: float | None, after: float | None, events: int) -> float | None:
    if before is None or after is None:
        return None
    return (after - before) / events * MICROSECONDS
