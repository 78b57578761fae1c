"""Answers about users: read together, and held for a moment.

    answers = Answers(database, catalog)
    representation = await answers.about("usr_1", ENTITLEMENTS)

An answer is given out again without a look at the database only while all of this holds: its rows were asked for
less than HELD_SECONDS ago, no transaction of this process has ended since, and no access has begun or ended by
the database's clock. So a process shows its own changes at once, other processes theirs within HELD_SECONDS, and
expiry is exact. After that the rows are read again; where they are what they were, so is the answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from backend.app.billing import store_reads
from backend.app.billing.committer import Committer
from backend.app.billing.domain.catalog import Catalog
from backend.app.billing.domain.merge import boundaries
from backend.app.billing.entitlements import View, entitlement_document, view_of
from backend.app.billing.store_reads import UserRows
from backend.app.core.database import Database
from backend.app.core.representation import Representation

# How old an answer may be whose change another process has taken: half of the second that is promised, the other
# half for a slow database and a busy machine.
HELD_SECONDS = 0.5
# An answer takes one or two KB; in half a second one process is asked about no more users than this.
HELD_USERS_MAX = 4_096
# While one statement is under way, the rows of the one before are decided on.
READ_LANES = 2
# Some 0.1 ms each of decoding and deciding, during which nothing else of the process goes on.
READ_USERS_MAX = 32


@dataclass(frozen=True, slots=True)
class Form:
    """A form in which is told what a user may do; the name tells it from the others."""

    name: str
    document: Callable[[View], dict[str, Any]]


ENTITLEMENTS = Form("entitlements", entitlement_document)


@dataclass(frozen=True, slots=True)
class _Question:
    user_id: str
    form: Form


@dataclass(frozen=True, slots=True)
class _Reading:
    """When rows were read: this process's seconds and ended transactions, both from before the read began."""

    began_seconds: float
    transactions_ended: int


@dataclass(frozen=True, slots=True)
class _Held:
    """The answers that follow from a user's rows from one instant of the database's clock until another."""

    rows_sha256: bytes
    since: datetime
    until: datetime | None
    reading: _Reading
    representations: dict[str, Representation]
    fresh_until_seconds: float

    def follow_from(self, rows_sha256: bytes, now: datetime) -> bool:
        """Whether the rows are the same, and no access has begun or ended since."""
        return (
            self.rows_sha256 == rows_sha256 and self.since <= now and (self.until is None or now < self.until)
        )


class Answers:
    """Answers the questions that come with every request of a product, for one database."""

    def __init__(
        self,
        database: Database,
        catalog: Catalog,
        *,
        monotonic_seconds: Callable[[], float] = time.monotonic,
    ) -> None:
        self.catalog = catalog
        self._database = database
        self._monotonic_seconds = monotonic_seconds
        # The user whose rows were read last stands last.
        self._held: dict[str, _Held] = {}
        self._reads: Committer[_Question, Representation] = Committer(
            self._read, lanes=READ_LANES, batch_items_max=READ_USERS_MAX
        )

    async def about(self, user_id: str, form: Form) -> Representation:
        """What a user may do now, in one form.

        Raises:
            Unavailable: the database is, or too many questions are waiting.
        """
        held = self._held.get(user_id)
        if held is not None and self._is_fresh(held):
            known = held.representations.get(form.name)
            if known is not None:
                return known
        return await self._reads.submit(_Question(user_id, form))

    def _is_fresh(self, held: _Held) -> bool:
        return (
            held.reading.transactions_ended == self._database.transactions_ended
            and self._monotonic_seconds() < held.fresh_until_seconds
        )

    async def _read(self, questions: Sequence[_Question]) -> list[Representation]:
        # Both before the read begins: a transaction that ends meanwhile may or may not be in what is read.
        reading = _Reading(self._monotonic_seconds(), self._database.transactions_ended)
        forms: dict[str, dict[str, Form]] = {}
        for question in questions:
            forms.setdefault(question.user_id, {})[question.form.name] = question.form
        async with self._database.reading() as tx:
            found = await store_reads.load_users(tx, list(forms))
        answered = {
            rows.user_id: self._answered(rows, now, forms[rows.user_id], reading) for rows, now in found
        }
        return [answered[question.user_id][question.form.name] for question in questions]

    def _answered(
        self, rows: UserRows, now: datetime, forms: dict[str, Form], reading: _Reading
    ) -> dict[str, Representation]:
        rows_sha256 = rows.sha256()
        known = self._held.get(rows.user_id)
        until: datetime | None = None
        representations: dict[str, Representation] = {}
        if known is not None and known.follow_from(rows_sha256, now):
            until, representations = known.until, known.representations
        missing = [form for name, form in forms.items() if name not in representations]
        if missing:
            view = view_of(self.catalog, rows, now=now)
            until = next(iter(boundaries((source for _, source in view.readings), view.at)), None)
            for form in missing:
                representations[form.name] = Representation.of(form.document(view))
        # Of two reads side by side the one that began first may end last.
        if known is None or known.reading.began_seconds <= reading.began_seconds:
            # The database told its time after the read had begun, so this ends no later than `until`.
            held_seconds = min(HELD_SECONDS, (until - now).total_seconds()) if until else HELD_SECONDS
            fresh_until_seconds = reading.began_seconds + held_seconds
            self._hold(
                rows.user_id, _Held(rows_sha256, now, until, reading, representations, fresh_until_seconds)
            )
        return representations

    def _hold(self, user_id: str, held: _Held) -> None:
        self._held.pop(user_id, None)
        self._held[user_id] = held
        if len(self._held) > HELD_USERS_MAX:
            del self._held[next(iter(self._held))]
