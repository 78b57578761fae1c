"""The report of a run: tables for the terminal and docs/performance.md, and the chart beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from bench.chart import Bar, bar_chart
from bench.contenders import CONTENDERS, Kind
from bench.growth import Growth, GrowthPoint
from bench.parts import PartCost
from bench.pgbench import HOW_TO_GET, NOT_MEASURED, VARIANTS
from bench.reads import CONNECTIONS as READ_CONNECTIONS
from bench.reads import FEW_USERS, USERS, ReadSpeed
from bench.rebuild import RebuildSpeed
from bench.rounds import Effort, Sample, Samples
from bench.spread import ratio, spread
from bench.targets import BUSY, per_second, verdicts

CHART_NAME = "performance.svg"
GROWTH_CHART_NAME = "growth.svg"
# Told apart by lightness too, for those who see few colours.
COLOURS = {
    Kind.TEXTBOOK: "#8c8c8c",
    Kind.SINGLE: "#9ecae1",
    Kind.PROTOTYPE: "#6baed6",
    Kind.ONE_BY_ONE: "#fdae6b",
    Kind.TOLLKEEPER: "#d95f0e",
}
PGBENCH_COLOUR = "#c7c7c7"
NOTHING = "-"
# Characters; longer cells stand out of their column.
CELL_WIDTH_MAX = 90


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All that was measured; what was left out is empty."""

    effort: Effort
    machine: Mapping[str, str]
    samples: Samples
    has_pgbench: bool
    parts: Sequence[PartCost] = ()
    reads: Sequence[ReadSpeed] = ()
    rebuilds: Mapping[str, RebuildSpeed] = field(default_factory=dict)
    growth: Growth | None = None


def render(run: Run, *, complete: bool) -> str:
    """The whole report in Markdown; `complete` unless this was a quick or partial run."""
    rounds = f"{run.effort.rounds} rounds, all in turn" if run.effort.rounds > 1 else "a single round"
    warning = "" if complete else "**A quick or partial run: too short to quote.**\n\n"
    sections = [
        "# Performance",
        f"""{warning}Written by `make bench`. Everything was measured in one run on one machine, in {rounds}, so that
a slow minute meets everybody; shown is the median, with the lowest and highest round in parentheses. Read
ratios: events per second belong to the machine they were taken on.""",
        f"![Events per second at {BUSY} connections]({CHART_NAME})",
        "## Targets",
        _targets(run),
        """Which comparison each line makes: pgbench runs without HTTP, signatures or JSON. The bare prototype is
[bench/prototype.py](../bench/prototype.py): a plain ASGI endpoint that verifies and parses, and stores four rows per
event by group commit; it decides nothing. Its other form commits each event by itself, with four statements; that
is what a lone delivery is compared with.""",
        "## How many times the textbook handler",
        _ratios(run),
        """With as many workers; pgbench and what runs with one worker, to one worker. The textbook handler is
[bench/textbook.py](../bench/textbook.py): FastAPI, verification by the SDK, an ORM, four writes in one commit.""",
        "## Events per second",
        _rates(run),
        "## Latency",
        _latencies(run),
        "For pgbench, of a transaction; in batches that is of many events.",
        f"## CPU per event at {BUSY} connections",
        _cpu(run),
        """Of the service's processes, of all of PostgreSQL's, and of the load generator, which shares the machine with
both. Valkey's is not counted.""",
    ]
    if not run.has_pgbench:
        sections.insert(
            sections.index("## Targets"), f"**The rows of pgbench are {NOT_MEASURED}.** {HOW_TO_GET}"
        )
    if run.parts:
        sections += ["### Tollkeeper's own parts, without HTTP and database", _parts(run.parts)]
    if run.reads:
        sections += [
            f"## Reads at {READ_CONNECTIONS} connections, PostgreSQL, 1 worker",
            _reads(run.reads),
            f"""Anew: {USERS:,} users are asked about in turn, more than a process holds answers about, so that each answer is
read from the database and decided. Held: {FEW_USERS} users, whose answers are given out again for up to half a
second ([decision 12](decisions/0012-held-answers.md)).""",
        ]
    if run.rebuilds:
        sections += ["## Rebuild", _rebuilds(run.rebuilds)]
    if run.growth is not None:
        sections += ["## Growth", *_growth(run.growth)]
    sections += [
        "## What was measured",
        f"""Each event is unique and correctly signed, and each changes what its user may do: in turn a paid checkout, a
new subscription, an upgrade, and a paid invoice that ends a grace period. The subscriptions of the last two are
delivered before the clock starts. A measurement takes about {run.effort.seconds:g} s, after a warm-up, on a fresh
database right after a checkpoint. Afterwards rows are counted: an event without its rows ends the benchmark
with an error. Load comes from one process over keep-alive connections, each sending its next request when the
last one is answered; requests are signed before the clock starts.""",
        "## The machine",
        _table(["", ""], [[name, value] for name, value in run.machine.items()]),
        "## Again",
        """```
make bench                                   # all of it, and this page: half an hour
.venv/bin/python -m bench --quick            # a smoke run of two minutes or so; writes nothing
.venv/bin/python -m bench --only tollkeeper-1 --only prototype-1
```

PG_BIN names another PostgreSQL's directory of programs. TMPDIR says which disk the databases are on: it has to
be a real one for fsync to mean anything.""",
    ]
    return "\n\n".join(sections) + "\n"


def render_charts(run: Run) -> dict[str, str]:
    """The charts by the names of their files; none of what was not measured."""
    charts = {CHART_NAME: _rate_chart(run), GROWTH_CHART_NAME: _growth_chart(run.growth)}
    return {name: chart for name, chart in charts.items() if chart is not None}


def _rate_chart(run: Run) -> str | None:
    bars = []
    for row in _rows(run):
        values = per_second(run.samples, row.name, BUSY)
        shown = spread(values)
        if shown is None:
            continue
        times = ratio(values, per_second(run.samples, row.base, BUSY))
        label = f"{shown.median:,.0f}" + (f"  ({times.median:.1f} x)" if times is not None else "")
        bars.append(Bar(row.title, shown, label, row.colour))
    if not bars:
        return None
    return bar_chart(
        f"Durable webhooks per second at {BUSY} connections",
        "Median and spread of the rounds; in parentheses: times the textbook handler with as many workers",
        bars,
    )


@dataclass(frozen=True, slots=True)
class _Row:
    """What a line of a table is about; `base` is what its ratio is taken to."""

    name: str
    title: str
    base: str
    colour: str


_Cell = Callable[[_Row, int], str]


def _rows(run: Run) -> list[_Row]:
    services = [
        _Row(contender.name, contender.title, f"textbook-{contender.workers}", COLOURS[contender.kind])
        for contender in CONTENDERS
    ]
    others = [_Row(variant.name, variant.title, "textbook-1", PGBENCH_COLOUR) for variant in VARIANTS]
    first = [row for row in services if row.name.startswith("textbook")]
    rest = [row for row in services if not row.name.startswith("textbook")]
    rows = [*first, *others, *rest]
    missing = {variant.name for variant in VARIANTS} if not run.has_pgbench else set()
    return [row for row in rows if row.name in missing or run.samples.of(row.name, run.effort.connections[0])]


def _targets(run: Run) -> str:
    return _table(
        ["Target", "Wanted", "Measured", ""],
        [
            [verdict.target, verdict.wanted, verdict.measured, verdict.word]
            for verdict in verdicts(run.samples, run.reads, run.growth)
        ],
    )


def _ratios(run: Run) -> str:
    def cell(row: _Row, connections: int) -> str:
        found = ratio(
            per_second(run.samples, row.name, connections), per_second(run.samples, row.base, connections)
        )
        return found.text(1) if found is not None else NOTHING

    return _by_connections(run, cell)


def _rates(run: Run) -> str:
    def cell(row: _Row, connections: int) -> str:
        found = spread(per_second(run.samples, row.name, connections))
        return found.text() if found is not None else NOTHING

    return _by_connections(run, cell)


def _latencies(run: Run) -> str:
    def cell(row: _Row, connections: int) -> str:
        found = run.samples.of(row.name, connections)
        p50 = spread([sample.p50_ms for sample in found])
        p99 = spread([sample.p99_ms for sample in found])
        return f"{p50.median:.1f} / {p99.median:.1f}" if p50 is not None and p99 is not None else NOTHING

    return _by_connections(run, cell, unit=", p50 / p99 ms")


def _by_connections(run: Run, cell: _Cell, *, unit: str = "") -> str:
    connections = run.effort.connections
    header = [f"Connections{unit}", *(str(number) for number in connections)]
    lines = []
    for row in _rows(run):
        if run.samples.of(row.name, connections[0]):
            lines.append([row.title, *(cell(row, number) for number in connections)])
        else:
            lines.append([row.title, NOT_MEASURED, *([NOTHING] * (len(connections) - 1))])
    return _table(header, lines)


def _cpu(run: Run) -> str:
    def cell(values: Sequence[float | None]) -> str:
        found = spread([value for value in values if value is not None])
        return found.text() if found is not None else NOTHING

    lines = []
    for row in _rows(run):
        found: Sequence[Sample] = run.samples.of(row.name, BUSY)
        lines.append(
            [
                row.title,
                cell([sample.service_cpu_us for sample in found]),
                cell([sample.postgres_cpu_us for sample in found]),
                cell([sample.load_cpu_us for sample in found]),
            ]
        )
    return _table(["CPU in microseconds per event", "service", "PostgreSQL", "load generator"], lines)


def _parts(parts: Sequence[PartCost]) -> str:
    lines = [[part.part, _text(part.cpu_us, 1)] for part in parts]
    totals = [sum(costs) for costs in zip(*(part.cpu_us for part in parts), strict=True)]
    return _table(["Part", "CPU in microseconds per event"], [*lines, ["all of these", _text(totals, 1)]])


def _reads(reads: Sequence[ReadSpeed]) -> str:
    return _table(
        ["Question", "answers/s", "p50 ms", "p99 ms", "service CPU us"],
        [
            [
                read.question,
                _text(read.per_second),
                _text(read.p50_ms, 1),
                _text(read.p99_ms, 1),
                _text([value for value in read.service_cpu_us if value is not None]),
            ]
            for read in reads
        ],
    )


def _rebuilds(rebuilds: Mapping[str, RebuildSpeed]) -> str:
    return _table(
        ["Store", "users", "events", "rebuild events/s", "rebuild --check events/s", "catalog diff events/s"],
        [
            [
                store,
                str(speed.users),
                str(speed.events),
                f"{speed.rebuild_per_second:,.0f}",
                f"{speed.check_per_second:,.0f}",
                f"{speed.diff_per_second:,.0f}",
            ]
            for store, speed in rebuilds.items()
        ],
    )


def _growth(growth: Growth) -> list[str]:
    sections = [
        f"![CPU per event by what is stored]({GROWTH_CHART_NAME})",
        f"""CPU of service and PostgreSQL per event at {BUSY} connections and 1 worker, with so many events stored before, two
of each user: a subscription and its first invoice. The measured events are in turn an upgrade and the next invoice of
stored users, who lie all over the tables, and a checkout and a new subscription. Ratios are to the smallest
history, measured anew in each round; of its first line both sides are the same, so it shows how steady the machine
is. The history was stored as copies of what one user's real deliveries left, in all tables, and vacuumed.""",
        _growth_table("Stored events", growth.everybody),
    ]
    for kind, points in growth.one_user.items():
        sections += [
            f"### One user's own {kind}",
            f"""One subscription with so many {kind}, in a database of as many events each time, among the users of the smallest
history; the next events are sent one by one, so that none shares its cost with another.""",
            _growth_table("Events of the user", points),
        ]
    return sections


def _growth_table(what: str, points: Sequence[GrowthPoint]) -> str:
    return _table(
        [
            what,
            "events/s",
            "service CPU in microseconds",
            "PostgreSQL CPU in microseconds",
            "CPU to the smallest",
        ],
        [
            [
                f"{point.stored:,}",
                _text([sample.per_second for sample in point.samples]),
                _text(
                    [sample.service_cpu_us for sample in point.samples if sample.service_cpu_us is not None]
                ),
                _text(
                    [sample.postgres_cpu_us for sample in point.samples if sample.postgres_cpu_us is not None]
                ),
                point.cost_ratio.text(2) if point.cost_ratio is not None else NOTHING,
            ]
            for point in points
        ],
    )


def _growth_chart(growth: Growth | None) -> str | None:
    if growth is None:
        return None
    named = {
        "stored events": growth.everybody,
        **{f"{kind} of the user": points for kind, points in growth.one_user.items()},
    }
    bars = [
        Bar(f"{point.stored:,} {what}", found, f"{found.median:.2f} x", COLOURS[Kind.TOLLKEEPER])
        for what, points in named.items()
        for point in points
        if (found := point.cost_ratio) is not None
    ]
    if not bars:
        return None
    return bar_chart(
        "What the next event costs, by what is stored",
        "CPU of service and PostgreSQL per event, times that with the smallest history; median and spread",
        bars,
    )


def _text(values: Sequence[float], digits: int = 0) -> str:
    found = spread(values)
    return found.text(digits) if found is not None else NOTHING


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns also line up in a terminal."""
    # A long sentence in one cell must not push all others off the screen.
    widths = [
        min(max(len(line[column]) for line in (header, *lines)), CELL_WIDTH_MAX)
        for column in range(len(header))
    ]
    rows = [header, ["-" * width for width in widths], *lines]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    )
