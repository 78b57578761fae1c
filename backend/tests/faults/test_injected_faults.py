"""An error at every statement and every await of the shell, each in turn, leaves nothing half done."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import coroutine
from typing import Any

import pytest
import sqlalchemy as sa
import structlog

from backend.app.observability.metrics import get_metrics
from backend.tests.faults.events import EPOCH, SCENARIOS
from backend.tests.faults.ledger import Ledger, open_ledger, state_of, without_trace
from backend.tests.faults.report import report
from backend.tests.support.billing import Harness, running_service
from backend.tests.support.statements import watched_statements

AFTER_COMMIT = "after commit"


class Injected(RuntimeError):
    """A bug of ours."""


def bug() -> Exception:
    return Injected("injected")


def outage() -> Exception:
    return sa.exc.OperationalError("injected", None, Exception("server closed the connection unexpectedly"))


@dataclass
class Boundaries:
    """The places that a delivery passes, in order; the one at index `target` raises, once."""

    error: Callable[[], Exception] = bug
    target: int | None = None
    passed: list[str] = field(default_factory=list)

    def passing(self, name: str) -> None:
        self.passed.append(name)
        if len(self.passed) - 1 == self.target:
            raise self.error()


# Set for one delivery: the shell's task inherits it, the outbox relay's does not.
_boundaries: ContextVar[Boundaries | None] = ContextVar("boundaries", default=None)


def passing(name: str) -> None:
    boundaries = _boundaries.get()
    if boundaries is not None:
        boundaries.passing(name)


@contextlib.contextmanager
def watching(harness: Harness) -> Iterator[None]:
    """Makes a service report every boundary of its transactions."""
    engine = harness.service.database.engine.sync_engine

    @sa.event.listens_for(engine, "begin")
    def on_begin(_connection: Any) -> None:
        passing("begin")

    @sa.event.listens_for(engine, "commit")
    def before_commit(_connection: Any) -> None:
        passing("before commit")

    do_commit = engine.dialect.do_commit

    def commit(dbapi_connection: Any) -> None:
        do_commit(dbapi_connection)
        passing(AFTER_COMMIT)

    engine.dialect.do_commit = commit  # type: ignore[method-assign]
    with watched_statements(
        harness.service.database,
        before=lambda statement, _: passing(f"before {statement.split(maxsplit=1)[0]}"),
        after=lambda statement, _: passing(f"after {statement.split(maxsplit=1)[0]}"),
    ):
        yield


@coroutine
def suspending(work: Coroutine[Any, Any, Any], on_suspension: Callable[[], None]) -> Generator[Any, Any, Any]:
    """Runs a coroutine and reports each time it gives control back to the event loop."""
    sent: Any = None
    thrown: BaseException | None = None
    while True:
        try:
            waiting_for = work.send(sent) if thrown is None else work.throw(thrown)
        except StopIteration as end:
            return end.value
        finally:
            # An error kept here would keep its traceback, and so the statement it interrupted, alive.
            thrown = None
        on_suspension()
        sent = None
        try:
            sent = yield waiting_for
        except BaseException as error:  # noqa: BLE001  # whatever comes in belongs to the coroutine
            thrown = error


@pytest.fixture(autouse=True)
def no_pictured_tracebacks() -> Iterator[None]:
    """Without this structlog, not set up in tests, would take a second to draw each traceback."""
    structlog.configure(
        processors=[structlog.processors.format_exc_info, structlog.processors.LogfmtRenderer()]
    )
    yield
    structlog.reset_defaults()


@contextlib.asynccontextmanager
async def quiet_service(url: str) -> AsyncIterator[tuple[Harness, Ledger]]:
    """A service whose clock stands at a fixed instant and whose relay is off, so that equal runs write equal rows."""
    async with running_service(url) as harness, open_ledger(url) as ledger:
        harness.clock.instant = datetime.fromtimestamp(EPOCH + 60, UTC)
        await harness.service.relay.stop()
        with watching(harness):
            yield harness, ledger


async def with_boundaries(boundaries: Boundaries, work: Awaitable[Any]) -> Any:
    token = _boundaries.set(boundaries)
    try:
        return await work
    finally:
        _boundaries.reset(token)


async def undisturbed(harness: Harness, ledger: Ledger, name: str) -> tuple[dict[str, list[str]], list[str]]:
    """The state that a scenario ends in without faults, and the boundaries it passes."""
    scenario = SCENARIOS[name]("calm0")
    for event in scenario.before:
        assert (await harness.deliver(event)).status_code == 200
    boundaries = Boundaries()
    response = await with_boundaries(boundaries, harness.deliver(scenario.event))
    assert response.json()["status"] == scenario.status
    return await state_of(ledger, "calm0"), boundaries.passed


def alerts() -> float:
    """Alerts so far; without ALERT_URLS they end in the log and are counted as dropped."""
    return get_metrics().registry.get_sample_value("alerts_sent_total", {"result": "dropped"}) or 0.0


def attempts(state: dict[str, list[str]]) -> int:
    """The attempts at the event that came last, which is the only one that failed."""
    counted: list[int] = [json.loads(row)["attempts"] for row in state["webhook_events"]]
    return max(counted)


def as_first_attempt(state: dict[str, list[str]]) -> dict[str, list[str]]:
    rows = [json.dumps({**json.loads(row), "attempts": 1}) for row in state["webhook_events"]]
    return {**state, "webhook_events": sorted(rows)}


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize(("error", "status"), [(bug, 500), (outage, 503)], ids=["bug", "outage"])
async def test_an_error_at_any_statement_leaves_nothing_half_done_and_the_next_delivery_succeeds(
    migrated_url: str, name: str, error: Callable[[], Exception], status: int
) -> None:
    injected: Counter[str] = Counter()
    async with quiet_service(migrated_url) as (harness, ledger):
        final, passed = await undisturbed(harness, ledger, name)
        assert passed.count(AFTER_COMMIT) == 1, "the shell commits once"
        for target, place in enumerate(passed):
            tag = f"r{target:04d}"
            scenario = SCENARIOS[name](tag)
            for event in scenario.before:
                await harness.deliver(event)
            before, alerts_before = await state_of(ledger, tag), alerts()
            boundaries = Boundaries(error, target)
            response = await with_boundaries(boundaries, harness.deliver(scenario.event))
            injected[boundaries.passed[target]] += 1
            where = f"{place} ({target})"

            assert response.status_code == status, where
            assert response.headers["content-type"] == "application/problem+json", where
            assert response.json()["status"] == status, where
            assert ("retry-after" in response.headers) == (status == 503), where
            assert alerts() == alerts_before + 1, where
            after = await state_of(ledger, tag)
            committed = place == AFTER_COMMIT
            if committed:
                assert after == final, where
            elif error is bug:
                assert without_trace(after) == before, where
                assert attempts(after) == 1, where
                assert len(after["webhook_events"]) == len(before["webhook_events"]) + 1, where
            else:
                assert after == before, where

            again = await harness.deliver(scenario.event)
            assert (again.status_code, again.json()["status"]) == (200, scenario.status), where
            assert ("idempotent-replayed" in again.headers) == committed, where
            end = await state_of(ledger, tag)
            assert as_first_attempt(end) == as_first_attempt(final), where
            assert attempts(end) == (2 if error is bug and not committed else 1), where
        assert harness.service.database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]  # a queue pool
    report(f"injected {injected.total()} x {error.__name__} into {name}: {dict(injected)}")
    assert injected.total() == len(passed) > 5


@pytest.mark.parametrize("name", SCENARIOS)
async def test_a_cancellation_at_any_await_leaves_all_or_nothing_and_the_next_delivery_succeeds(
    migrated_url: str, name: str
) -> None:
    async with quiet_service(migrated_url) as (harness, ledger):
        final, _ = await undisturbed(harness, ledger, name)
        webhooks = harness.service.webhooks
        committer = webhooks._committer
        work = committer._work
        target, committed, finished = 0, 0, False
        while not finished:
            tag = f"r{target:04d}"
            scenario = SCENARIOS[name](tag)
            for event in scenario.before:
                await harness.deliver(event)
            before = await state_of(ledger, tag)
            suspensions = 0

            def cancel_at_target(wanted: int = target) -> None:
                nonlocal suspensions
                if suspensions == wanted:
                    task = asyncio.current_task()
                    assert task is not None
                    task.cancel()
                suspensions += 1

            async def disturbed(batch: Any, hook: Callable[[], None] = cancel_at_target) -> Any:
                return await suspending(work(batch), hook)

            committer._work = disturbed
            try:
                response = await harness.deliver(scenario.event)
                finished = suspensions <= target
                # A cancellation that arrives when everything is done may go unnoticed.
                assert response.status_code in ((200,) if finished else (200, 503))
            finally:
                committer._work = work

            after = await state_of(ledger, tag)
            assert after in (before, final), f"await {target}"
            committed += after == final
            again = await harness.deliver(scenario.event)
            assert (again.status_code, again.json()["status"]) == (200, scenario.status), f"await {target}"
            assert ("idempotent-replayed" in again.headers) == (after == final), f"await {target}"
            assert await state_of(ledger, tag) == final, f"await {target}"
            target += 1
        assert harness.service.database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]  # a queue pool
    report(f"cancelled {name} at each of {target - 1} awaits; {committed - 1} of them had committed")
    assert target > 5
