"""Lets the bodies of old events go: what an event said goes, what it asserted stays, and so does every guarantee.

    report = await Retention(database, clock, months=13).preview()   # changes nothing
    report = await Retention(database, clock, months=13).run()

Claim, answer and hash of an event stay in their rows, and `rebuild` reads what is kept (asserted.py)
where there is no body. docs/operations.md says how it is used, docs/decisions/0014 why it is so.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from backend.app.audit import log as audit_log
from backend.app.audit.models import AuditLog
from backend.app.billing import store_retention as rows
from backend.app.billing.asserted import kept_form, read_body
from backend.app.billing.domain.facts import EventKey
from backend.app.billing.store_retention import Body, OldBody, Place
from backend.app.core.clock import Clock, iso, months_before
from backend.app.core.database import Database, Tx
from backend.app.core.ids import new_id
from backend.app.core.progress import Progress, silent

ACTOR = "cli:retention"

# Without their bodies rows are small; a page of them is read within milliseconds.
PAGE_EVENTS = 2_000
# A transaction reads and writes so many bodies, or so many bytes of them, whichever is less: some tens of
# milliseconds, during which SQLite's deliveries wait, and a few MB of memory, whatever the largest body is.
BATCH_EVENTS_MAX = 100
BATCH_BYTES_MAX = 4_194_304
# After a batch it rests as long as the batch took: half of SQLite's one writer is left to the deliveries.
REST_SHARE = 1.0
# Enough to see what is wrong with them; the report is no place for thousands.
UNREADABLE_SHOWN_MAX = 10


@dataclass(slots=True, kw_only=True)
class Report:
    """What went, or in a preview would go, and which old bodies stay.

    `waiting` belong to events that are parked or failed and still to be processed; `unreadable` to settled
    ones of which this version can't say what they assert, the ids of the first of them in `unreadable_ids`.
    """

    received_before: datetime
    bodies: int = 0
    body_bytes: int = 0
    waiting: int = 0
    unreadable: int = 0
    unreadable_ids: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """A batch's bodies: what is kept of those that can go, and the ids of those that can't be read."""

    kept: Sequence[tuple[EventKey, Mapping[str, Any]]]
    body_bytes: int
    unreadable_ids: Sequence[str]


class Retention:
    """Lets go, batch by batch, what is older than some calendar months; it may be stopped and run again at any time.

    What is done is told by the rows themselves. So a run begins with the oldest event again, and passes what
    is done without looking at the bodies.
    """

    def __init__(self, database: Database, clock: Clock, *, months: int, progress: Progress = silent) -> None:
        self._database = database
        self._clock = clock
        self._months = months
        self._progress = progress

    async def preview(self) -> Report:
        """What a run would do now; changes nothing."""
        return await self._go(writes=False)

    async def run(self) -> Report:
        """Lets the bodies go, each batch in a transaction of its own, together with the audit row that tells of it."""
        return await self._go(writes=True)

    async def _go(self, *, writes: bool) -> Report:
        report = Report(received_before=months_before(self._clock.now(), self._months))
        run_id = new_id()
        looked_at = 0
        after: Place | None = None
        while True:
            async with self._database.snapshot() as tx:
                until = await rows.end_of_page(
                    tx, received_before=report.received_before, after=after, events=PAGE_EVENTS
                )
                page = await rows.load_old_bodies(
                    tx, received_before=report.received_before, after=after, until=until
                )
            report.waiting += sum(not old.is_settled for old in page)
            for batch in _batches([old for old in page if old.is_settled]):
                keys = [old.key for old in batch]
                read = await (self._let_go(keys, report, run_id) if writes else self._look(keys, report))
                report.bodies += len(read.kept)
                report.body_bytes += read.body_bytes
                report.unreadable += len(read.unreadable_ids)
                report.unreadable_ids += read.unreadable_ids
                del report.unreadable_ids[UNREADABLE_SHOWN_MAX:]
                self._progress(f"{report.bodies} bodies; old events looked at", looked_at, 0)
            if until is None:
                return report
            after = until
            looked_at += PAGE_EVENTS
            self._progress(f"{report.bodies} bodies; old events looked at", looked_at, 0)

    async def _look(self, keys: Sequence[EventKey], report: Report) -> _Read:
        async with self._database.snapshot() as tx:
            return _read(await rows.load_bodies(tx, keys, holds=False), report)

    async def _let_go(self, keys: Sequence[EventKey], report: Report, run_id: str) -> _Read:
        started = time.perf_counter()
        async with self._database.transaction() as tx:
            read = _read(await rows.load_bodies(tx, keys, holds=True), report)
            await rows.let_go(tx, read.kept)
            await self._audit(tx, read, report, run_id)
        await asyncio.sleep(REST_SHARE * (time.perf_counter() - started))
        return read

    async def _audit(self, tx: Tx, read: _Read, report: Report, run_id: str) -> None:
        """A row for each batch, in its transaction: after a kill, what is gone is what the log says is gone."""
        if not read.kept:
            return
        row = AuditLog(
            id=new_id(),
            user_id=None,
            action="retention.let_go",
            resource_type="retention",
            resource_id=run_id,
            details={
                "months": self._months,
                "received_before": iso(report.received_before),
                "bodies": len(read.kept),
                "bytes": read.body_bytes,
            },
            actor=ACTOR,
            created_at=self._clock.now(),
        )
        await audit_log.append(tx, [row])


def _batches(page: Sequence[OldBody]) -> Iterator[list[OldBody]]:
    """A page in its order, so much at a time as a transaction takes; a larger body is a batch of its own."""
    batch: list[OldBody] = []
    batch_bytes = 0
    for old in page:
        if batch and (len(batch) == BATCH_EVENTS_MAX or batch_bytes + old.body_bytes > BATCH_BYTES_MAX):
            yield batch
            batch, batch_bytes = [], 0
        batch.append(old)
        batch_bytes += old.body_bytes
    if batch:
        yield batch


def _read(bodies: Sequence[Body], report: Report) -> _Read:
    kept: list[tuple[EventKey, Mapping[str, Any]]] = []
    unreadable_ids: list[str] = []
    body_bytes = 0
    for body in bodies:
        # An event that was delivered anew meanwhile, because somebody had deleted its claim, is young.
        if body.received_at >= report.received_before:
            continue
        document = _kept_of(body)
        if document is None:
            unreadable_ids.append(body.key[2])
        else:
            kept.append((body.key, document))
            body_bytes += len(body.payload)
    return _Read(kept=kept, body_bytes=body_bytes, unreadable_ids=unreadable_ids)


def _kept_of(body: Body) -> dict[str, Any] | None:
    """What is kept of a body, or None where it must stay: what can't be told must not be lost."""
    try:
        event = read_body(body.payload, signed_at=body.occurred_at)
        # The bytes of another event are no ground to stand on.
        return kept_form(event) if event.envelope.key == body.key else None
    except Exception:  # noqa: BLE001  # whatever is wrong with one body, it stays, and the others go
        return None
