"""Runs the benchmark: `make bench`, or `python -m bench --help`. Exit 1 when a measurement would be worth nothing."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from backend.tests.support.server_directory import work_directory
from backend.tests.support.server_process import ServerFailed
from backend.tests.support.servers import PostgresServer, ValkeyServer
from bench.contenders import CONTENDERS, Kind, Servers, create_schema, prepared
from bench.growth import FULL as GROWTH_FULL
from bench.growth import QUICK as GROWTH_QUICK
from bench.growth import measure_growth
from bench.load import BenchFailed
from bench.machine import machine_facts
from bench.parts import measure_parts
from bench.pgbench import HOW_TO_GET, NOT_MEASURED, VARIANTS, find_pgbench
from bench.reads import measure_reads
from bench.rebuild import RebuildSpeed
from bench.rebuild import measure as measure_rebuild
from bench.report import Run, render, render_charts
from bench.rounds import EVENTS_MIN, Effort, measure_rounds

DOCS = Path(__file__).parents[1] / "docs"
PAGE_NAME = "performance.md"

# One, a few and many senders at once: Stripe itself delivers a burst over many connections.
CONNECTIONS = (1, 16, 64)
# Three rounds give a median and its spread; two seconds hold many of PostgreSQL's commits, and all services
# together stay within a quarter of an hour.
FULL = Effort(rounds=3, seconds=2.0, events_min=EVENTS_MIN, connections=CONNECTIONS)
# Long enough to see every path work and every row arrive.
QUICK = Effort(rounds=1, seconds=0.2, events_min=40, connections=CONNECTIONS)
# To start a service takes most of a quick run, so of those with two workers only one is tried there.
QUICK_LEFT_OUT = frozenset(
    {"textbook-2", "prototype-2", "tollkeeper-redis-2", "tollkeeper-sqlite-2"},
)

PARTS, READS, REBUILD, GROWTH = "parts", "reads", "rebuild", "growth"
NAMES = (
    *(contender.name for contender in CONTENDERS),
    *(variant.name for variant in VARIANTS),
    *(PARTS, READS, REBUILD, GROWTH),
)

# A few thousand events: a second of CPU for all parts together.
PARTS_EVENTS, PARTS_REPETITIONS = 4_000, 5
PARTS_EVENTS_QUICK, PARTS_REPETITIONS_QUICK = 400, 2
# Some thousand events, as a year of a small shop.
REBUILD_USERS, REBUILD_EVENTS_PER_USER = 300, 20
REBUILD_USERS_QUICK, REBUILD_EVENTS_PER_USER_QUICK = 20, 6


@click.command()
@click.option(
    "--quick", is_flag=True, help="A smoke run of two minutes or so: every path once, figures to forget."
)
@click.option(
    "--only", "wanted", multiple=True, type=click.Choice(NAMES), help="Only this one; may be repeated."
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where to write the page and the charts; by default docs/, after a whole run only.",
)
def main(quick: bool, wanted: tuple[str, ...], output: Path | None) -> None:
    """Measure Tollkeeper, a textbook handler, PostgreSQL itself and a bare prototype in one run."""
    complete = not quick and not wanted
    names = frozenset(wanted or (set(NAMES) - QUICK_LEFT_OUT if quick else NAMES))
    say = _progress()
    try:
        run = _measure(QUICK if quick else FULL, names, quick=quick, say=say)
    except (BenchFailed, ServerFailed, FileNotFoundError, ValueError) as error:
        click.echo(f"The benchmark is worth nothing: {error}", err=True)
        sys.exit(1)
    page = render(run, complete=complete)
    click.echo(page)
    directory = output or (DOCS if complete else None)
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / PAGE_NAME).write_text(page, encoding="utf-8")
        for name, chart in render_charts(run).items():
            (directory / name).write_text(chart, encoding="utf-8")
        click.echo(f"Written to {directory / PAGE_NAME}.", err=True)


def _measure(effort: Effort, names: frozenset[str], *, quick: bool, say: Callable[[str], None]) -> Run:
    with work_directory(on_disk=True) as directory:
        say("starting PostgreSQL with fsync, and Valkey")
        postgres = PostgresServer.start(directory / "postgres", fsync=True)
        try:
            valkey = ValkeyServer.start(directory / "valkey")
            try:
                servers = Servers(postgres, valkey, directory)
                return _measure_with(servers, effort, names, quick=quick, say=say)
            finally:
                valkey.stop()
        finally:
            postgres.stop()


def _measure_with(
    servers: Servers, effort: Effort, names: frozenset[str], *, quick: bool, say: Callable[[str], None]
) -> Run:
    machine = machine_facts(servers)
    variants = [variant for variant in VARIANTS if variant.name in names]
    has_pgbench = find_pgbench() is not None
    if variants and not has_pgbench:
        say(f"{NOT_MEASURED}. {HOW_TO_GET}")
        variants = []
    contenders = [contender for contender in CONTENDERS if contender.name in names]
    samples = measure_rounds(contenders, variants, servers, effort, say=say)
    parts = []
    if PARTS in names:
        say("CPU by part")
        parts = measure_parts(
            events=PARTS_EVENTS_QUICK if quick else PARTS_EVENTS,
            repetitions=PARTS_REPETITIONS_QUICK if quick else PARTS_REPETITIONS,
        )
    reads = []
    if READS in names:
        say("reads")
        reads = measure_reads(servers, rounds=effort.rounds, seconds=effort.seconds)
    rebuilds = {}
    if REBUILD in names:
        size = (
            (REBUILD_USERS_QUICK, REBUILD_EVENTS_PER_USER_QUICK)
            if quick
            else (REBUILD_USERS, REBUILD_EVENTS_PER_USER)
        )
        rebuilds = _measure_rebuilds(servers, size, say=say)
    growth = None
    if GROWTH in names:
        growth = measure_growth(servers, GROWTH_QUICK if quick else GROWTH_FULL, say=say)
    return Run(
        effort=effort,
        machine=machine,
        samples=samples,
        has_pgbench=has_pgbench,
        parts=parts,
        reads=reads,
        rebuilds=rebuilds,
        growth=growth,
    )


def _measure_rebuilds(
    servers: Servers, size: Sequence[int], *, say: Callable[[str], None]
) -> dict[str, RebuildSpeed]:
    users, events_per_user = size
    urls = {
        "PostgreSQL": servers.postgres.create_database(
            "rebuild", template=prepared(servers, Kind.TOLLKEEPER)
        ),
        "SQLite": f"sqlite:///{servers.directory / 'rebuild.db'}",
    }
    found = {}
    for store, url in urls.items():
        say(f"rebuild, {store}")
        asyncio.run(create_schema(url))
        found[store] = asyncio.run(measure_rebuild(url, users=users, events_per_user=events_per_user))
    return found


def _progress() -> Callable[[str], None]:
    started = time.monotonic()

    def say(what: str) -> None:
        # To the error stream, so that the report can be piped.
        click.echo(f"{time.monotonic() - started:6.0f} s  {what}", err=True)

    return say


if __name__ == "__main__":
    main()
