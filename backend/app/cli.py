"""The command line: the service's parts from a terminal. Exit 0 = good, 1 = what was asked about is bad, 2 = wrong use."""

from __future__ import annotations

import asyncio
import ctypes
import http.client
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable
from typing import Any, BinaryIO, NoReturn, TypeVar

import click
import uvicorn
from pydantic import ValidationError

from backend.app.billing.routes import WEBHOOK_PATH
from backend.app.billing.security import sign
from backend.app.core.api_keys import ApiKeys, Scope
from backend.app.core.clock import SystemClock
from backend.app.core.database import Database
from backend.app.core.errors import AppError, InvalidRequest
from backend.app.core.migrations import is_current, migrate
from backend.app.core.settings import Settings
from backend.app.demo.deployment import DemoFailed
from backend.app.demo.run import run_demo
from backend.app.main import create_app, load_catalog, open_redis, open_secrets
from backend.app.observability.logs import configure_logging

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


def worker_app() -> Any:
    """The application of one worker process."""
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        _end_with_parent()
    configure_logging()
    return create_app()


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
        elif not await is_current(database):
            raise ValueError("the database has not this version's schema; run `tollkeeper migrate` first")
    finally:
        await database.close()


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
