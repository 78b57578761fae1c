"""What the service is meant to reach, beside what this run measured; said as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.growth import Growth, GrowthPoint
from bench.pgbench import SINGLE
from bench.reads import ANEW, KNOWN, ReadSpeed
from bench.reads import CONNECTIONS as READ_CONNECTIONS
from bench.rounds import Samples
from bench.spread import Spread, ratio, spread

# Ratios within one run; a service below one of them is no reason to refuse a build, only to say so.
TEXTBOOK_RATIO_MIN = 20.0
PGBENCH_RATIO_MIN = 1.2
PROTOTYPE_RATIO_MIN = 0.6
LONE_RATIO_MIN = 1.0
# To wait for nobody must cost a lone delivery nothing; by so much do two runs of the very same work differ.
OWN_LONE_RATIO_MIN = 0.95
P99_TO_P50_MAX = 4.0
# Answers per second of one worker, and their p99 in milliseconds, at 16 connections.
READS_ANEW_MIN, READS_KNOWN_MIN = 3_000, 8_000
READS_P99_MS_MAX = 10.0
# CPU per event at the most stored events, to that at the fewest.
GROWTH_RATIO_MAX = 1.3

BUSY, MIDDLE, LONE = 64, 16, 1


@dataclass(frozen=True, slots=True)
class Verdict:
    """One target: what was wanted, what was measured, and whether that is enough (None: not measured)."""

    target: str
    wanted: str
    measured: str
    met: bool | None

    @property
    def word(self) -> str:
        """As the report says it."""
        return {True: "met", False: "not met", None: "not measured"}[self.met]


def verdicts(samples: Samples, reads: Sequence[ReadSpeed], growth: Growth | None) -> list[Verdict]:
    """Every target, by the medians of the run."""
    found = []
    for workers in (1, 2):
        name = f"tollkeeper-{workers}"
        crew = "1 worker" if workers == 1 else f"{workers} workers"
        where = f"PostgreSQL, {BUSY} connections, {crew}"
        for other, other_name, least in (
            ("the textbook handler with as many", f"textbook-{workers}", TEXTBOOK_RATIO_MIN),
            ("pgbench, one transaction of four statements per event", SINGLE.name, PGBENCH_RATIO_MIN),
            ("the bare prototype with as many", f"prototype-{workers}", PROTOTYPE_RATIO_MIN),
        ):
            found.append(_at_least(samples, f"{where}: to {other}", name, other_name, BUSY, least))
    found.append(
        _at_least(
            samples,
            f"SQLite, {BUSY} connections, 1 worker: to the bare prototype",
            "tollkeeper-sqlite-1",
            "prototype-sqlite-1",
            BUSY,
            PROTOTYPE_RATIO_MIN,
        )
    )
    found.append(
        _at_least(
            samples,
            f"PostgreSQL, {LONE} connection, 1 worker: to the bare prototype with one transaction per event",
            "tollkeeper-1",
            "single-1",
            LONE,
            LONE_RATIO_MIN,
        )
    )
    found.append(
        _at_least(
            samples,
            f"PostgreSQL, {LONE} connection, 1 worker: to Tollkeeper itself with one transaction per event",
            "tollkeeper-1",
            "tollkeeper-single-1",
            LONE,
            OWN_LONE_RATIO_MIN,
        )
    )
    for name, what in (
        ("tollkeeper-1", "PostgreSQL, 1 worker"),
        ("tollkeeper-2", "PostgreSQL, 2 workers"),
        ("tollkeeper-redis-1", "PostgreSQL and Redis, 1 worker"),
        ("tollkeeper-sqlite-1", "SQLite, 1 worker"),
    ):
        tail = spread([sample.p99_ms / sample.p50_ms for sample in samples.of(name, MIDDLE)])
        found.append(
            _verdict(
                f"{what}, {MIDDLE} connections: p99 to p50",
                f"under {P99_TO_P50_MAX:g}",
                tail,
                lambda median: median < P99_TO_P50_MAX,
            )
        )
    found += _reads(reads)
    return found + _growth(growth)


def per_second(samples: Samples, name: str, connections: int) -> list[float]:
    """Events per second of each round."""
    return [sample.per_second for sample in samples.of(name, connections)]


def _reads(reads: Sequence[ReadSpeed]) -> list[Verdict]:
    speeds = {speed.question: speed for speed in reads}
    found = []
    for question, least in ((ANEW, READS_ANEW_MIN), (KNOWN, READS_KNOWN_MIN)):
        speed = speeds.get(question)
        where = f"{question}, {READ_CONNECTIONS} connections, 1 worker"
        found += [
            _verdict(
                f"{where}: answers per second",
                f"at least {least:,}",
                spread(speed.per_second) if speed else None,
                _at_or_over(least),
                digits=0,
            ),
            _verdict(
                f"{where}: p99 in ms",
                f"under {READS_P99_MS_MAX:g}",
                spread(speed.p99_ms) if speed else None,
                lambda median: median < READS_P99_MS_MAX,
            ),
        ]
    return found


def _at_or_over(least: float) -> Callable[[float], bool]:
    return lambda median: median >= least


def _growth(growth: Growth | None) -> list[Verdict]:
    curves: dict[str, Sequence[GrowthPoint]] = {"stored events": growth.everybody if growth else ()}
    for kind, points in (growth.one_user if growth else {}).items():
        curves[f"{kind} of one user"] = points
    found = []
    for what, points in curves.items():
        where = f"at {points[-1].stored:,} {what}" if points else "with a long history"
        found.append(
            _verdict(
                f"CPU per event {where}: to that with a short one",
                f"at most {GROWTH_RATIO_MAX:g}",
                points[-1].cost_ratio if points else None,
                lambda median: median <= GROWTH_RATIO_MAX,
            )
        )
    return found


def _at_least(
    samples: Samples, target: str, name: str, other: str, connections: int, least: float
) -> Verdict:
    measured = ratio(per_second(samples, name, connections), per_second(samples, other, connections))
    return _verdict(target, f"at least {least:g}", measured, _at_or_over(least))


def _verdict(
    target: str,
    wanted: str,
    measured: Spread | None,
    is_enough: Callable[[float], bool],
    *,
    digits: int = 2,
) -> Verdict:
    if measured is None:
        return Verdict(target, wanted, "-", None)
    return Verdict(target, wanted, measured.text(digits), is_enough(measured.median))
