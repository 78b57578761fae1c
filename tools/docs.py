"""Writes the generated parts of the documents from the code: `python -m tools.docs [--check]`.

A part stands between `<!-- generated: NAME -->` and `<!-- end of NAME -->`. With --check nothing is
written, and the exit code is 1 when a part is not what the code says.
"""

from __future__ import annotations

import functools
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from inspect import cleandoc
from pathlib import Path

import click
import sqlalchemy as sa
from prometheus_client.metrics import MetricWrapperBase
from pydantic import SecretStr
from sqlalchemy.dialects import postgresql
from starlette.routing import Route

from backend.app.billing.providers.registry import translators
from backend.app.core import errors
from backend.app.core.database import metadata
from backend.app.core.partitions import partition_column
from backend.app.core.settings import Settings
from backend.app.main import create_app
from backend.app.observability.metrics import MetricsCollector
from backend.tests.domain import situations
from tools.source_comments import constant_comment, table_comments

ROOT = Path(__file__).parents[1]
APP = ROOT / "backend" / "app"

# What operators meet when they size or debug a deployment; everything else is in the code, beside its reason.
BOUNDS = (
    ("billing.webhooks", "DEADLINE_SECONDS"),
    ("billing.webhooks", "LANES"),
    ("billing.committer", "BATCH_ITEMS_MAX"),
    ("billing.committer", "QUEUE_ITEMS_MAX"),
    ("billing.answers", "HELD_SECONDS"),
    ("billing.answers", "HELD_USERS_MAX"),
    ("billing.answers", "READ_LANES"),
    ("billing.answers", "READ_USERS_MAX"),
    ("billing.security", "HEADER_BYTES_MAX"),
    ("billing.security", "SECRET_FILE_CHECK_SECONDS"),
    ("billing.security", "REDIS_CALL_SECONDS_MAX"),
    ("billing.security", "REDIS_PAUSE_SECONDS"),
    ("core.database", "POOL_CONNECTIONS_MAX"),
    ("core.database", "POOL_WAIT_SECONDS"),
    ("core.database", "CONNECT_SECONDS_MAX"),
    ("core.database", "LOCK_WAIT_SECONDS"),
    ("core.database", "STATEMENT_SECONDS_MAX"),
    ("ops.alerts", "INCIDENT_SECONDS"),
    ("ops.alerts", "ALERTS_PER_HOUR_MAX"),
    ("ops.outbox", "POLL_SECONDS"),
    ("ops.outbox", "LEASE_SECONDS"),
    ("ops.outbox", "RETRY_BASE_SECONDS"),
    ("ops.outbox", "ATTEMPTS_MAX"),
    ("billing.retention", "BATCH_EVENTS_MAX"),
    ("billing.retention", "BATCH_BYTES_MAX"),
    ("billing.retention", "REST_SHARE"),
    ("cli", "STOP_SECONDS_MAX"),
)

# Routes that the OpenAPI document leaves out have no public docstring to take.
ROUTE_WORDS = {
    "/api/v1/billing/webhooks": "Takes a delivery; what it answers is in [events.md](events.md).",
    "/openapi.json": "The OpenAPI document of the JSON routes.",
    "/problems/{slug}": "The page that a problem's `type` points to.",
}

_PART = re.compile(
    r"(?P<start><!-- generated: (?P<name>[a-z-]+) -->\n).*?(?P<end><!-- end of (?P=name) -->)", re.DOTALL
)


def settings_part() -> str:
    """Every setting with its default."""
    return _table(
        ("Name", "Default", "Meaning"),
        (
            (f"`{name.upper()}`", _default(field.default), field.description or "")
            for name, field in Settings.model_fields.items()
        ),
    )


def routes_part() -> str:
    """Every route the application serves."""
    # Not from the environment: the documents are the same on every machine.
    settings = Settings.model_construct(stripe_webhook_secret=SecretStr("whsec_documents"))
    app = create_app(settings)
    rows = [
        (f"`{method.upper()} {path}`", _first_line(operation.get("description", "")))
        for path, operations in app.openapi()["paths"].items()
        for method, operation in operations.items()
    ]
    rows += [
        (f"`{method} {route.path}`", ROUTE_WORDS[route.path])
        for route in app.routes
        if isinstance(route, Route)
        for method in sorted((route.methods or set()) - {"HEAD"})
    ]
    return _table(("Route", "What it answers"), sorted(set(rows), key=lambda row: row[0].split()[::-1]))


def problems_part() -> str:
    """Every problem type, by status."""
    own = [error for error in errors.all_errors() if error.__module__ == errors.__name__]
    return _table(
        ("Status", "`type`", "`title`", "Meaning"),
        (
            (str(error.status), f"`/problems/{error.slug}`", error.title, error.public_text())
            for error in sorted(own, key=lambda error: (error.status, error.slug))
        ),
    )


def events_part() -> str:
    """Every handled event type, by the function that translates it."""
    types: dict[Callable[..., object], list[str]] = {}
    for event_type, translator in translators().items():
        types.setdefault(translator, []).append(event_type)
    return _table(
        ("Event types", "What they become"),
        (
            ("<br>".join(f"`{name}`" for name in names), _first_line(translator.__doc__ or ""))
            for translator, names in types.items()
        ),
    )


def tables_part() -> str:
    """Every table with its columns, keys and indexes."""
    comments = table_comments(APP)
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]  # the library leaves it untyped
    sections: list[str] = []
    for name in sorted(metadata.tables):
        table = metadata.tables[name]
        rows = _table(
            ("Column", "Type", "Null", "Meaning"),
            (
                (
                    f"`{column.name}`",
                    column.type.compile(dialect=dialect).lower(),
                    "yes" if column.nullable else "",
                    comments[name].columns[column.name],
                )
                for column in table.columns
            ),
        )
        heading = "\n\n".join(filter(None, (f"## {name}", comments[name].table)))
        sections.append(f"{heading}\n\n{rows}\n{_keys(table)}")
    return "\n".join(sections)


def metrics_part() -> str:
    """Every metric with its labels."""
    return _table(
        ("Metric", "Kind", "Labels", "Meaning"),
        (
            (
                f"`{name}`",
                next(iter(metric.describe())).type,
                # The library keeps a metric's label names private and has no other way to ask for them.
                ", ".join(f"`{label}`" for label in metric._labelnames),  # noqa: SLF001
                next(iter(metric.describe())).documentation,
            )
            for name, metric in sorted(vars(MetricsCollector()).items())
            if isinstance(metric, MetricWrapperBase)
        ),
    )


def bounds_part() -> str:
    """The bounds an operator meets, each with its reason."""
    return _table(
        ("Bound", "Value", "Why"),
        (
            (
                f"`{name}`",
                f"{getattr(importlib.import_module(f'backend.app.{module}'), name):,}",
                constant_comment(APP / f"{module.replace('.', '/')}.py", name),
            )
            for module, name in BOUNDS
        ),
    )


def situations_part() -> str:
    """Every situation with what comes of it, as the tests tell them."""
    sections: dict[str, list[Sequence[str]]] = {}
    for section, *row in situations.table():
        sections.setdefault(section, []).append(row)
    head = ("Situation", "What comes of it", "Policy or test")
    return "\n".join(f"## {name}\n\n{_table(head, rows)}" for name, rows in sections.items())


PARTS: dict[str, Callable[[], str]] = {
    "settings": settings_part,
    "routes": routes_part,
    "problems": problems_part,
    "events": events_part,
    "tables": tables_part,
    "metrics": metrics_part,
    "bounds": bounds_part,
    "situations": situations_part,
}


def rendered(text: str) -> str:
    """A document's text with each of its parts as the code has it; ValueError for a part nobody makes."""

    def part(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in PARTS:
            raise ValueError(f"no part is called {name}")
        return f"{match['start']}{_made(name)}{match['end']}"

    return _PART.sub(part, text)


def documents(root: Path) -> list[Path]:
    """The documents that may have parts."""
    return sorted([*root.glob("*.md"), *(root / "docs").rglob("*.md")])


def missing_parts(texts: Iterable[str]) -> set[str]:
    """The parts that no document shows."""
    return set(PARTS) - {match["name"] for text in texts for match in _PART.finditer(text)}


@functools.cache
def _made(name: str) -> str:
    return PARTS[name]()


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    # A bar ends a cell, even in code.
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def _first_line(docstring: str) -> str:
    return cleandoc(docstring).split("\n\n")[0].replace("\n", " ")


def _default(value: object) -> str:
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    return f"`{value}`" if value not in (None, "") else "unset"


def _keys(table: sa.Table) -> str:
    primary = ", ".join(f"`{column.name}`" for column in table.primary_key.columns)
    lines = [f"Primary key: {primary}."]
    unique = [
        ", ".join(f"`{column.name}`" for column in constraint.columns)
        for constraint in table.constraints
        if isinstance(constraint, sa.UniqueConstraint)
    ]
    if unique:
        lines.append(f"Unique: {'; '.join(sorted(unique))}.")
    indexes = sorted(
        ", ".join(f"`{column.name}`" for column in index.columns)
        + (" (partial)" if index.dialect_options["postgresql"]["where"] is not None else "")
        for index in table.indexes
    )
    if indexes:
        lines.append(f"Indexes: {'; '.join(indexes)}.")
    column = partition_column(table)
    if column is not None:
        lines.append(f"On PostgreSQL by months of `{column}`.")
    return " ".join(lines) + "\n"


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; exit 1 when a document is not in step.")
@click.option("--root", default=ROOT, type=click.Path(path_type=Path), help="The repository.")
def main(check: bool, root: Path) -> None:
    """Bring the generated parts of the documents in step with the code."""
    paths = documents(root)
    stale = [path for path in paths if rendered(path.read_text("utf-8")) != path.read_text("utf-8")]
    if missing := missing_parts(path.read_text("utf-8") for path in paths):
        click.echo(f"No document shows these parts: {', '.join(sorted(missing))}.", err=True)
    for path in stale:
        if check:
            click.echo(f"{path.relative_to(root)} is not in step with the code; run `make fmt`.", err=True)
        else:
            path.write_text(rendered(path.read_text("utf-8")), "utf-8")
            click.echo(f"{path.relative_to(root)}: written")
    sys.exit(1 if missing or (check and stale) else 0)


if __name__ == "__main__":
    main()
