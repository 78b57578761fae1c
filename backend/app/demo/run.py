"""Runs the demo: sets everything up in a private directory, tells the story over HTTP, checks and reports."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shlex
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click

from backend.app.billing.routes import WEBHOOK_PATH
from backend.app.core.api_keys import ApiKeys, Scope
from backend.app.core.clock import SystemClock
from backend.app.core.database import Database
from backend.app.core.migrations import migrate
from backend.app.demo.account import make_account
from backend.app.demo.checks import Evidence, run_checks
from backend.app.demo.deliveries import deliver_in_another_order, deliver_on_a_bad_day, event_bytes
from backend.app.demo.deployment import DemoFailed, Deployment, ServiceProcess, start_ready
from backend.app.demo.report import render_account
from backend.app.demo.story import example_event, write_story

# Any number will do; fixed and printed, so that two people see the same disorder.
SEED = 20_251_123
# What `serve` listens on by default, and what the examples of the documentation say.
PREFERRED_PORT = 8_000
DIRECTORY_PREFIX = "tollkeeper-demo-"
# A directory this young may belong to a demo that has not locked it yet, or whose service is still ending.
LEFTOVER_SECONDS_MIN = 60


def run_demo(*, once: bool, as_json: bool) -> bool:
    """Runs it and prints the account; True if every check held.

    Without `once` the service is then left running until Ctrl-C or SIGTERM.

    Raises:
        DemoFailed: it could not be carried out.
        OSError, http.client.HTTPException: the service stopped answering.
    """
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        # SIGTERM ends it like Ctrl-C: the services are stopped and the directory is removed.
        handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
        stack.callback(signal.signal, signal.SIGTERM, handler)
        stack.callback(_progress, "")
        directory = stack.enter_context(private_directory())
        service, other, evidence = perform(directory, stack)
        _progress("checking")
        account = make_account(evidence, run_checks(evidence), seed=SEED, seconds=time.monotonic() - started)
        other.stop()
        _progress("")
        if not once:
            account |= {
                "url": service.deployment.url,
                "api_key": service.deployment.api_key,
                "webhook_secret": service.deployment.webhook_secret,
            }
        click.echo(json.dumps(account) if as_json else render_account(account))
        if not once:
            _stay(service, directory, as_json=as_json)
        return bool(account["ok"])


def perform(directory: Path, stack: contextlib.ExitStack) -> tuple[ServiceProcess, ServiceProcess, Evidence]:
    """Starts two services in `directory`, tells them the story; both run until `stack` is closed."""
    webhook_secret = f"whsec_{secrets.token_hex(16)}"

    def serve(name: str, preferred_port: int | None) -> ServiceProcess:
        database = directory / f"{name}.db"
        api_key = asyncio.run(_prepare(database))
        return stack.enter_context(
            start_ready(
                lambda: ServiceProcess.start(
                    directory,
                    preferred_port=preferred_port,
                    database=database,
                    api_key=api_key,
                    webhook_secret=webhook_secret,
                )
            )
        )

    _progress("starting the service")
    service = serve("tollkeeper", PREFERRED_PORT)
    _progress("starting a second one")
    other = serve("another-order", None)
    return service, other, _tell_story(service.deployment, other.deployment)


def _tell_story(deployment: Deployment, other: Deployment) -> Evidence:
    now = int(time.time())
    chapters = write_story(now)
    before = deployment.counters()
    delivered = deliver_on_a_bad_day(
        deployment,
        chapters,
        seed=SEED,
        now=now,
        step=lambda done, total: _progress(f"delivering {done} of {total}"),
    )
    _progress("delivering the same events in another order to a second service")
    again = deliver_in_another_order(other, chapters, seed=SEED + 1, now=now)
    return Evidence(
        chapters=chapters,
        delivered=delivered,
        delivered_again=again,
        counters_before=before,
        deployment=deployment,
        other_deployment=other,
    )


async def _prepare(path: Path) -> str:
    """Migrates a new database and makes an API key in it; the key."""
    database = Database.open(f"sqlite:///{path}")
    try:
        await migrate(database)
        return await ApiKeys(database, SystemClock()).create("demo", Scope.READ)
    finally:
        await database.close()


def _stay(service: ServiceProcess, directory: Path, *, as_json: bool) -> None:
    deployment = service.deployment
    example = directory / "event.json"
    example.write_bytes(event_bytes(example_event(int(time.time()))))
    if not as_json:
        command = "tollkeeper"
        if shutil.which(command) is None:
            command = os.path.relpath(Path(sys.executable).with_name(command))
        bearer = shlex.quote(f"Authorization: Bearer {deployment.api_key}")
        click.echo(f"""
The service is running at {deployment.url}. Ask it what Ben may do:

  curl -s -H {bearer} \\
    {deployment.url}/api/v1/entitlements/ben

Send an event of your own (the file is yours to change), then ask for the user "you":

  {command} send {shlex.quote(str(example))} \\
    --url {deployment.url}{WEBHOOK_PATH} \\
    --secret {deployment.webhook_secret}

  curl -s -H {bearer} \\
    {deployment.url}/api/v1/entitlements/you

Its database: {deployment.database}
Ctrl-C ends it and removes all of this.""")
    sys.stdout.flush()
    try:
        code = service.wait_end()
    except KeyboardInterrupt:
        return
    raise DemoFailed(f"the service ended by itself with exit code {code}")


@contextlib.contextmanager
def private_directory() -> Iterator[Path]:
    """A directory that only this user can enter; removed at the end, or by a later demo if we are killed."""
    for leftover in Path(tempfile.gettempdir()).glob(f"{DIRECTORY_PREFIX}*"):
        _remove_leftover(leftover)
    with tempfile.TemporaryDirectory(prefix=DIRECTORY_PREFIX, ignore_cleanup_errors=True) as name:
        directory = Path(name).resolve()
        with contextlib.closing(_lock(directory)):
            yield directory


def _lock(directory: Path) -> sqlite3.Connection:
    """Marks a directory as in use until the connection is closed or the process ends, however it ends."""
    # SQLite's file lock is the one that every platform has and that a killed process loses.
    connection = sqlite3.connect(directory / "in-use.db", timeout=0, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    return connection


def _remove_leftover(directory: Path) -> None:
    with contextlib.suppress(OSError, sqlite3.OperationalError):
        status = directory.stat()
        foreign = directory.is_symlink() or (hasattr(os, "getuid") and status.st_uid != os.getuid())
        if foreign or time.time() - status.st_mtime < LEFTOVER_SECONDS_MIN:
            return
        with contextlib.closing(_lock(directory)):
            shutil.rmtree(directory, ignore_errors=True)


def _progress(text: str) -> None:
    """Shows on a terminal what is being done, over the last such line; an empty text clears it."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()
