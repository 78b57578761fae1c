"""The command line: the service's parts from a terminal. Exit 0 = good, 1 = what was asked about is bad, 2 = wrong use."""

from __future__ import annotations

import asyncio
import ctypes
import dataclasses
import gc
import http.client
import json
import multiprocessing
import os
import secrets
import signal
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar

import click
import httpx2 as httpx
import uvicorn
from pydantic import ValidationError

from backend.app.billing.catalog_diff import CatalogDiff, compare_catalogs
from backend.app.billing.domain.catalog import Catalog, CatalogError, parse_catalog
from backend.app.billing.entitlements import EntitlementService, entitlement_document, is_user_id
from backend.app.billing.explain import Explanation, explanation_document, explanation_text
from backend.app.billing.explain import explain as explanation_of
from backend.app.billing.rebuild import Rebuild, Report
from backend.app.billing.retention import Report as Retained
from backend.app.billing.retention import Retention
from backend.app.billing.routes import WEBHOOK_PATH, read_instant
from backend.app.billing.security import sign
from backend.app.core.api_keys import ApiKeys, Scope
from backend.app.core.clock import SystemClock, iso
from backend.app.core.database import Database
from backend.app.core.errors import AppError, InvalidRequest
from backend.app.core.migrations import is_current, migrate
from backend.app.core.settings import RETENTION_MONTHS_MAX, RETENTION_MONTHS_MIN, Settings
from backend.app.demo.deployment import DemoFailed
from backend.app.demo.run import run_demo
from backend.app.main import SHIPPED_CATALOG, create_app, load_catalog, open_redis, open_secrets
from backend.app.observability.logs import configure_logging
from backend.app.simulator.delivery import Network
from backend.app.simulator.objects import DAY_SECONDS
from backend.app.simulator.runner import Report as Simulation
from backend.app.simulator.runner import Target, explained, run_against, run_in_memory
from backend.app.simulator.truth import read_terms
from backend.app.simulator.world import START, Generation, Plan

# Longer than a delivery's deadline, so that what is in flight at a stop is finished and answered.
STOP_SECONDS_MAX = 15
# A local service answers at once; a remote one within its own deadline.
SEND_SECONDS_MAX = 15
T = TypeVar("T")

# Linux's number for "send me this signal when my parent ends" (prctl(2)).
PR_SET_PDEATHSIG = 1


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tollkeeper")
def main() -> None:
    """Tollkeeper: signed Stripe webhooks in, provable entitlements out."""


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65_535), help="TCP port.")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1, 64), help="Processes.")
@click.option("--json", "as_json", is_flag=True, help="Print where it listens as JSON.")
def serve(host: str, port: int, workers: int, as_json: bool) -> None:
    """Run the service. SQLite is migrated by itself; PostgreSQL by `tollkeeper migrate`."""
    configure_logging()
    settings = _settings()
    try:
        open_secrets(settings)
        load_catalog(settings)
        if settings.redis_url:
            open_redis(settings.redis_url)
        asyncio.run(_prepare_database(settings))
    except ValueError as error:
        _wrong_use(str(error))
    except AppError as error:
        _bad(error.detail)
    if as_json:
        click.echo(json.dumps({"url": f"http://{host}:{port}"}))
    if workers > 1 and "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        # Before the workers import the metrics library: it decides at import where it counts.
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(prefix="tollkeeper-metrics-")
    # After an orderly stop uvicorn raises the signal again; by then everything is done, and that is a good end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    uvicorn.run(
        "backend.app.cli:worker_app",
        factory=True,
        host=host,
        port=port,
        workers=workers,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=STOP_SECONDS_MAX,
    )


# An event's objects end with their last reference; a search for rings among them, at Python's default of every 700,
# takes a tenth of the work on it. So many objects are a few megabytes.
RUBBISH_OBJECTS_MIN = 50_000


def worker_app() -> Any:
    """The application of one worker process."""
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        _end_with_parent()
    configure_logging()
    app = create_app()
    # What is built by now lives as long as the process; there is no use in searching it for rubbish again and again.
    gc.freeze()
    gc.set_threshold(RUBBISH_OBJECTS_MIN)
    return app


@main.command()
@click.option("--once", is_flag=True, help="End by itself: exit 0 only if every check holds.")
@click.option("--json", "as_json", is_flag=True, help="Print the account as JSON.")
def demo(once: bool, as_json: bool) -> None:
    """See it work: a service of its own, a stream of signed events in disorder, and what came of them."""
    try:
        held = run_demo(once=once, as_json=as_json)
    except (DemoFailed, AppError, OSError, http.client.HTTPException) as error:
        _bad(f"the demo could not be carried out: {error}")
    sys.exit(0 if held else 1)


@main.command("migrate")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def migrate_command(as_json: bool) -> None:
    """Bring the database to this version's schema."""

    async def work(database: Database) -> None:
        await migrate(database)

    _with_database(work)
    click.echo(json.dumps({"migrated": True}) if as_json else "The database has this version's schema.")


@main.group()
def keys() -> None:
    """API keys."""


@keys.command("create")
@click.option("--name", required=True, help="Whose key it is.")
@click.option("--scope", required=True, type=click.Choice([scope.value for scope in Scope]))
@click.option("--json", "as_json", is_flag=True, help='Print {"key": ...}.')
def create_key(name: str, scope: str, as_json: bool) -> None:
    """Make an API key and show it, once."""

    async def work(database: Database) -> str:
        if database.is_sqlite:
            await migrate(database)
        return await ApiKeys(database, SystemClock()).create(name, Scope(scope))

    key = _with_database(work)
    if as_json:
        click.echo(json.dumps({"key": key}))
        return
    click.echo(key)
    click.echo("This is the only time the key is shown.", err=True)


@main.command()
@click.argument("file", type=click.File("rb"))
@click.option("--url", default=f"http://127.0.0.1:8000{WEBHOOK_PATH}", show_default=True)
@click.option("--secret", help="Default: the first of STRIPE_WEBHOOK_SECRET.")
@click.option("--json", "as_json", is_flag=True, help="Print status, headers and body as JSON.")
def send(file: BinaryIO, url: str, secret: str | None, as_json: bool) -> None:
    """Sign an event from FILE (or - for standard input) as Stripe does, and post it."""
    body = file.read()
    if secret is None:
        try:
            secret = open_secrets(_settings()).current()[0].key.decode("ascii")
        except ValueError as error:
            _wrong_use(str(error))
    if not url.startswith(("http://", "https://")):
        _wrong_use("--url must begin with http:// or https://")
    request = urllib.request.Request(  # noqa: S310  # the scheme was checked above
        url,
        data=body,
        headers={
            "Content-Type": "application/json",
            "Stripe-Signature": sign(body, secret.encode(), timestamp=int(time.time())),
        },
    )
    try:
        with urllib.request.urlopen(request, timeout=SEND_SECONDS_MAX) as response:  # noqa: S310  # see above
            status, headers, answer = response.status, dict(response.headers), response.read()
    except urllib.error.HTTPError as error:
        status, headers, answer = error.code, dict(error.headers), error.read()
    except (OSError, ValueError, http.client.HTTPException) as error:
        _bad(f"can't reach the service: {error}")
    text = answer.decode("utf-8", "replace")
    if as_json:
        click.echo(json.dumps({"status": status, "headers": headers, "body": text}))
    else:
        click.echo(f"{status} {text}")
    sys.exit(0 if status < 300 else 1)  # noqa: PLR2004  # HTTP's successes


@main.command()
@click.argument("user")
@click.option("--at", metavar="T", help="An RFC 3339 instant, as 2026-11-23T07:30:00Z; default: now.")
@click.option("--json", "as_json", is_flag=True, help="Print what the API answers with explain=true.")
def explain(user: str, at: str | None, as_json: bool) -> None:
    """Say what USER may do, why, and what changes next."""
    if not is_user_id(user):
        _wrong_use("USER is no user's id")
    try:
        instant = read_instant(at) if at is not None else None
        catalog = load_catalog(_settings())
    except ValueError as error:
        _wrong_use(str(error))

    async def work(database: Database) -> Explanation:
        await _require_current(database)
        view, evidence = await EntitlementService(database, catalog).view_with_evidence(user, at=instant)
        return explanation_of(catalog, view, evidence)

    explanation = _with_database(work)
    if as_json:
        document = {
            **entitlement_document(explanation.view),
            "explanation": explanation_document(explanation),
        }
        click.echo(json.dumps(document))
        return
    click.echo(explanation_text(explanation))


@main.command()
@click.option("--check", is_flag=True, help="Compare only: exit 1 if anything differs, change nothing.")
@click.option(
    "--resume",
    "file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Keep the progress in FILE; after a stop the same command goes on from there.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def rebuild(check: bool, file: Path | None, as_json: bool) -> None:
    """Recompute everything that follows from events out of the stored ones, and correct what differs."""
    settings = _settings()

    async def work(database: Database) -> Report:
        rebuilt = Rebuild(
            database,
            load_catalog(settings),
            clock=SystemClock(),
            livemode=settings.livemode,
            progress=_show_progress,
            file=file,
        )
        return await (rebuilt.check() if check else rebuilt.run())

    report = _with_database(work)
    _end_progress()
    if as_json:
        click.echo(
            json.dumps(
                {
                    "events": report.events,
                    "events_before": report.events_before,
                    "difference_count": report.difference_count,
                    "corrected": not check and report.difference_count > 0,
                    "differences": [dataclasses.asdict(difference) for difference in report.differences],
                }
            )
        )
    else:
        for difference in report.differences:
            shown = dataclasses.asdict(difference)
            name = "/".join(str(part) for part in shown["key"])
            click.echo(
                f"{shown['table']} {name} {shown['column'] or 'row'}: "
                f"stored {json.dumps(shown['stored'])}, recomputed {json.dumps(shown['recomputed'])}"
            )
        hidden = report.difference_count - len(report.differences)
        if hidden:
            click.echo(f"... and {hidden} more")
        verb = "differ" if check else "differed and were corrected"
        before = f" ({report.events_before} of them before it was stopped)" if report.events_before else ""
        click.echo(f"{report.events} events replayed{before}; {report.difference_count} values {verb}.")
    if file is not None:
        # Only now: a run that is stopped before it has told its report tells it when it is gone on with.
        sys.stdout.flush()
        file.unlink(missing_ok=True)
    sys.exit(1 if check and report.difference_count else 0)


@main.command()
@click.option(
    "--months",
    type=click.IntRange(RETENTION_MONTHS_MIN, RETENTION_MONTHS_MAX),
    help="Calendar months that bodies are kept. Default: PAYLOAD_RETENTION_MONTHS.",
)
@click.option("--dry-run", is_flag=True, help="Say what would go; change nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def retention(months: int | None, dry_run: bool, as_json: bool) -> None:
    """Let the bodies of old events go; what they asserted stays, and with it every guarantee."""
    kept_months = _settings().payload_retention_months if months is None else months

    async def work(database: Database) -> Retained:
        await _require_current(database)
        made = Retention(database, SystemClock(), months=kept_months, progress=_show_progress)
        return await (made.preview() if dry_run else made.run())

    report = _with_database(work)
    _end_progress()
    if as_json:
        document = {
            "months": kept_months,
            **dataclasses.asdict(report),
            "received_before": iso(report.received_before),
            "dry_run": dry_run,
        }
        click.echo(json.dumps(document))
    else:
        verb = "would go" if dry_run else "were let go"
        click.echo(
            f"{report.bodies} bodies of {report.body_bytes} bytes, received before {iso(report.received_before)}, {verb}; "
            f"{report.waiting} stay, because their events are parked or failed."
        )
        if report.unreadable:
            more = " ..." if report.unreadable > len(report.unreadable_ids) else ""
            click.echo(
                f"{report.unreadable} stay, because it can't be told what they assert: "
                f"{', '.join(report.unreadable_ids)}{more}; look at `tollkeeper rebuild --check`."
            )
    sys.exit(1 if report.unreadable else 0)


@main.group()
def catalog() -> None:
    """The catalog of plans, features, prices and policy."""


@catalog.command("check")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def check_catalog(file: Path, as_json: bool) -> None:
    """Say whether FILE can be used as a catalog, and if not, where it is wrong."""
    problem = None
    try:
        found = _read_catalog(file)
    except ValueError as error:
        problem = str(error)
    if as_json:
        click.echo(json.dumps({"valid": problem is None, "error": problem}))
    elif problem is None:
        click.echo(f"{file} is valid: {len(found.plans)} plans, {len(found.features)} features.")
    if problem is not None:
        _bad(problem)


@catalog.command("diff")
@click.argument("old", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("new", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the differences as JSON.")
def diff_catalogs(old: Path, new: Path, as_json: bool) -> None:
    """Say what every present user would gain or lose if NEW took the place of OLD; change nothing."""

    async def work(database: Database) -> CatalogDiff:
        return await compare_catalogs(
            database,
            _read_catalog(old),
            _read_catalog(new),
            now=SystemClock().now(),
            progress=lambda done, total: _show_progress("comparing users", done, total),
        )

    diff = _with_database(work)
    _end_progress()
    document = diff.document()
    if as_json:
        click.echo(json.dumps(document))
    else:
        for group in document["groups"]:
            more = " ..." if group["count"] > len(group["users"]) else ""
            click.echo(
                f"{group['direction']}: {group['count']} users, {group['what']}: {json.dumps(group['before'])} -> "
                f"{json.dumps(group['after'])} ({', '.join(group['users'])}{more})"
            )
        click.echo(f"{document['users_changed']} of {document['users']} users would see a difference.")
    sys.exit(1 if diff.users_changed else 0)


@main.command()
@click.option("--users", default=200, show_default=True, type=click.IntRange(1, 1_000_000))
@click.option(
    "--days", default=150, show_default=True, type=click.IntRange(1, 3_650), help="Of virtual time."
)
@click.option("--seed", type=click.IntRange(0), help="Default: one at random, which is printed.")
@click.option("--url", help="A running service, such as http://127.0.0.1:8000. Default: in memory.")
@click.option("--secret", help="Signs the events. Default: the first of STRIPE_WEBHOOK_SECRET.")
@click.option("--key", help="A key of scope read; needed with --url.")
@click.option("--duplicates", default=0.2, show_default=True, type=click.FloatRange(0, 1))
@click.option("--disorder", default=0.3, show_default=True, type=click.FloatRange(0, 1))
@click.option("--delay", default=0.05, show_default=True, type=click.FloatRange(0, 1))
@click.option(
    "--loss", default=0.0, show_default=True, type=click.FloatRange(0, 1), help="Sent again at the end."
)
@click.option(
    "--shape", default="mixed", show_default=True, type=click.Choice([one.value for one in Generation])
)
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Deliveries per second at most.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def simulate(
    users: int,
    days: int,
    seed: int | None,
    url: str | None,
    secret: str | None,
    key: str | None,
    duplicates: float,
    disorder: float,
    delay: float,
    loss: float,
    shape: str,
    rate: float | None,
    as_json: bool,
) -> None:
    """Play a Stripe of our own against the service, and compare its answers with what should be in force."""
    settings = _settings()
    try:
        catalog = load_catalog(settings)
        file = settings.catalog_file or SHIPPED_CATALOG
        plan = Plan(
            seed=secrets.randbelow(1_000_000) if seed is None else seed,
            start=START if url is None else int(time.time()) - days * DAY_SECONDS,
            days=days,
            terms=read_terms(file.read_text(encoding="utf-8")),
            generation=Generation(shape),
        )
        if url is not None and secret is None:
            secret = open_secrets(settings).current()[0].key.decode("ascii")
    except ValueError as error:
        _wrong_use(str(error))
    network = Network(duplicates=duplicates, disorder=disorder, delay=delay, loss=loss)
    if url is None:
        report = run_in_memory(plan, users, network, catalog, _show_progress)
    else:
        if not url.startswith(("http://", "https://")):
            _wrong_use("--url must begin with http:// or https://")
        if key is None or secret is None:
            _wrong_use("--url needs --key, too: `tollkeeper keys create --name simulate --scope read`")
        report = asyncio.run(_simulate_against(url, secret, key, rate, plan, users, network))
    _end_progress()
    if as_json:
        click.echo(json.dumps({**dataclasses.asdict(report), "equal": not report.differences}))
    else:
        click.echo(
            f"seed {report.seed}: {report.users} users, {report.events} events in {report.deliveries} deliveries, "
            f"{report.questions} answers compared, {len(report.differences)} differences"
        )
        for line in explained(report.differences, plan, users):
            click.echo(line)
    sys.exit(1 if report.differences else 0)


async def _simulate_against(
    url: str, secret: str, key: str, rate: float | None, plan: Plan, users: int, network: Network
) -> Simulation:
    async with httpx.AsyncClient(base_url=url) as client:
        target = Target(client=client, secret=secret, api_key=key, clock=SystemClock(), rate=rate)
        try:
            return await run_against(plan, users, network, target, _show_progress)
        except httpx.HTTPError as error:
            _bad(f"the service gave no answer to compare: {error}")


def _read_catalog(path: Path) -> Catalog:
    """A catalog by its path; ValueError names the file and the place in it."""
    try:
        return parse_catalog(path.read_text(encoding="utf-8"))
    except CatalogError as error:
        raise ValueError(f"{path}: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8") from error
    except OSError as error:
        raise ValueError(f"can't read {path}: {error.strerror}") from error


def _show_progress(stage: str, done: int, total: int) -> None:
    """One line that is written over, on a terminal only."""
    if sys.stderr.isatty():
        click.echo(f"\r\x1b[K{stage}: {done}{f' of {total}' if total else ''}", nl=False, err=True)


def _end_progress() -> None:
    if sys.stderr.isatty():
        click.echo("\r\x1b[K", nl=False, err=True)


def _settings() -> Settings:
    try:
        return Settings()
    except ValidationError as error:
        # Which setting and why, but never its value: it may be a secret.
        _wrong_use(
            "; ".join(
                f"{'.'.join(str(part) for part in found['loc']).upper()}: {found['msg']}"
                for found in error.errors()
            )
        )
    except ValueError as error:
        _wrong_use(str(error))


def _with_database(work: Callable[[Database], Awaitable[T]]) -> T:
    async def run() -> T:
        database = Database.open(_settings().database_url)
        try:
            return await work(database)
        finally:
            await database.close()

    try:
        return asyncio.run(run())
    except ValueError as error:
        _wrong_use(str(error))
    except InvalidRequest as error:
        _wrong_use(error.detail)
    except AppError as error:
        _bad(error.detail)


async def _prepare_database(settings: Settings) -> None:
    database = Database.open(settings.database_url)
    try:
        if database.is_sqlite:
            await migrate(database)
        else:
            await _require_current(database)
    finally:
        await database.close()


async def _require_current(database: Database) -> None:
    if not await is_current(database):
        raise ValueError("the database has not this version's schema; run `tollkeeper migrate` first")


def _end_with_parent() -> None:
    """A worker whose supervisor was killed ends too, instead of holding the port."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        parent = multiprocessing.parent_process()
        if parent is not None and os.getppid() != parent.pid:
            # It died while this worker was being started, before there was anybody to be told.
            sys.exit(1)


def _wrong_use(message: str) -> NoReturn:
    click.echo(f"tollkeeper: {message}", err=True)
    sys.exit(2)


def _bad(message: str) -> NoReturn:
    click.echo(f"tollkeeper: {message}", err=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
