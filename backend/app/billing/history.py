"""Every change a user's entitlements went through, each with its cause: an event, a person, time alone, or the catalog.

    page = await history_page(tx, catalog, "usr_1", request)

A version is written when something is heard of a user. What time or a changed catalog did since is
computed when it is read, from what was known then; nothing is written for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import Any

import sqlalchemy as sa

from backend.app.audit.models import audit_logs
from backend.app.billing import store, store_state
from backend.app.billing.domain.access import Access, Reading
from backend.app.billing.domain.catalog import Catalog
from backend.app.billing.domain.decide import kind_of_change
from backend.app.billing.domain.facts import ACTION_ID_PREFIX, CustomerId, SubjectId
from backend.app.billing.domain.merge import Entitlement, entitlement_of
from backend.app.billing.domain.state import State
from backend.app.billing.models import entitlement_history, webhook_claims, webhook_events
from backend.app.core.clock import iso
from backend.app.core.database import Tx, database_now
from backend.app.core.pages import PageRequest

HISTORY_LIST = "entitlement_history"

# What a correction from the command line writes as its cause's type.
REBUILD_TYPE = "rebuild"


class CauseKind(StrEnum):
    """What brought a change about."""

    EVENT = "event"
    ACTION = "action"  # a person's, by the API or the command line
    REBUILD = "rebuild"  # a correction, or a changed catalog that was applied
    TIME = "time"  # something began or ran out by itself
    CATALOG = "catalog"  # the catalog or its policy is another than when the version was written


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """What brought a change about.

    `subject` is what it is about, such as `sub:sub_1`; `rule` that of the access that began or ran out.
    """

    kind: CauseKind
    event_id: str | None = None
    event_type: str | None = None
    account: str | None = None
    actor: str | None = None
    subject: str | None = None
    rule: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One change. Of a version's entries `step` 0 is the version itself, the others are what time made of it.

    `occurred_at` is None where nobody knows when it happened; `created_at` is when we learned of it.
    """

    step: int
    change: str
    plan_code_before: str | None
    entitlement: Entitlement
    cause: Cause
    occurred_at: datetime | None
    created_at: datetime | None


async def history_page(tx: Tx, catalog: Catalog, user_id: str, request: PageRequest) -> dict[str, Any]:
    """A page of every change of a user's entitlements, the newest first; nothing for an unknown user.

    Raises:
        InvalidRequest: the cursor is none of this list's.
    """
    columns = entitlement_history.c
    after = request.after(HISTORY_LIST, int, int)
    # Two rows more than can be shown: the cursor's version may have nothing left, and the last row only
    # tells which plan the one before it replaced.
    rows_max = request.rows_max + 2
    statement = (
        sa.select(entitlement_history)
        .where(columns.user_id == user_id)
        .order_by(columns.version.desc())
        .limit(rows_max)
    )
    if after is not None:
        statement = statement.where(columns.version <= after[0])
    rows = [dict(row) for row in (await tx.execute(statement)).mappings()]
    entries: list[Entry] = []
    if rows:
        timeline = await _Timeline.load(tx, catalog, user_id)
        causes = await _load_causes(tx, user_id, rows)
        following = await _created_at(tx, user_id, rows[0]["version"] + 1)
        for place, row in enumerate(rows if len(rows) < rows_max else rows[:-1]):
            older = rows[place + 1] if place + 1 < len(rows) else None
            entries += reversed([*_entries_of(row, older, causes, timeline, following)])
            following = row["created_at"]
    if after is not None:
        entries = [entry for entry in entries if (entry.entitlement.version, entry.step) < after]
    return request.page(
        HISTORY_LIST,
        entries[: request.rows_max],
        place=lambda entry: (entry.entitlement.version, entry.step),
        document=_document,
    )


def _entries_of(
    row: Mapping[str, Any],
    older: Mapping[str, Any] | None,
    causes: Mapping[int, Cause],
    timeline: _Timeline,
    following: datetime | None,
) -> Iterator[Entry]:
    """A version, then what time made of it until the following one, or by now and by today's catalog."""
    entitlement = entitlement_of_row(row)
    yield Entry(
        step=0,
        change=row["change"],
        plan_code_before=older["plan_code"] if older else None,
        entitlement=entitlement,
        cause=causes[row["version"]],
        occurred_at=row["occurred_at"],
        created_at=row["created_at"],
    )
    step = 0
    for instant, after, cause in timeline.by_itself(entitlement, following or timeline.now):
        step += 1
        yield timeline.entry(step, entitlement, after, cause, instant)
        entitlement = after
    if following is None:
        after = timeline.present(entitlement)
        if kind_of_change(timeline.catalog, entitlement, after) is not None:
            yield timeline.entry(step + 1, entitlement, after, Cause(kind=CauseKind.CATALOG), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Timeline:
    """What is known of a user, and since when we have known it."""

    catalog: Catalog
    user_id: str
    state: State
    learned_at: Mapping[tuple[str, str], datetime]
    now: datetime

    @classmethod
    async def load(cls, tx: Tx, catalog: Catalog, user_id: str) -> _Timeline:
        state = await store_state.load_state_of_users(tx, [user_id])
        ties = await store_state.load_ties(
            tx,
            {
                CustomerId(source_id.account, source_id.livemode, owned.customer_id)
                for source_id, owned in state.sources.items()
                if owned.customer_id is not None
            },
        )
        events = {
            SubjectId(subject.account, subject.livemode, fact.event_id)
            for subject, facts in state.facts.items()
            for fact in facts
        }
        events |= {
            SubjectId(customer.account, customer.livemode, tie.event_id)
            for customer, claims in ties.items()
            for tie in claims
        }
        claimed = await tx.execute(
            sa.select(webhook_claims.c.account, webhook_claims.c.event_id, webhook_claims.c.claimed_at).where(
                store.named_in(webhook_claims, "event_id", events)
            )
        )
        return cls(
            catalog=catalog,
            user_id=user_id,
            state=replace(state, ties=ties),
            learned_at={(row.account, row.event_id): row.claimed_at for row in claimed},
            now=await database_now(tx),
        )

    def by_itself(
        self, entitlement: Entitlement, until: datetime
    ) -> Iterator[tuple[datetime, Entitlement, Cause]]:
        """Each change that nobody made, from a version's end on, by what was known when it happened."""
        while entitlement.valid_until is not None and entitlement.valid_until <= until:
            instant = entitlement.valid_until
            readings = self._readings(instant)
            after = self._entitlement(readings, instant, entitlement)
            if kind_of_change(
                self.catalog, replace(entitlement, valid_until=None), replace(after, valid_until=None)
            ):
                yield instant, after, _cause_of_time(readings, instant)
            entitlement = after

    def present(self, entitlement: Entitlement) -> Entitlement:
        """What holds now, as the read side computes it."""
        at = max(self.now, self.state.newest_as_of(self.user_id) or self.now)
        return self._entitlement(self.state.readings_of(self.catalog, self.user_id), at, entitlement)

    def entry(
        self, step: int, before: Entitlement, after: Entitlement, cause: Cause, instant: datetime | None
    ) -> Entry:
        """A change that no version was written for."""
        kind = kind_of_change(self.catalog, before, after)
        assert kind is not None, "an entry is a change"
        return Entry(
            step=step,
            change=kind.value,
            plan_code_before=before.plan_code,
            entitlement=after,
            cause=cause,
            occurred_at=instant,
            created_at=instant,
        )

    def _entitlement(self, readings: Sequence[Reading], at: datetime, before: Entitlement) -> Entitlement:
        return entitlement_of(
            self.catalog,
            self.user_id,
            readings,
            at=at,
            version=before.version,
            activated_at=before.activated_at,
        )

    def _readings(self, at: datetime) -> list[Reading]:
        """What each source came to that was known to be the user's at an instant."""
        known = replace(
            self.state,
            facts={
                subject: tuple(
                    fact
                    for fact in facts
                    if self._learned_at(subject.account, fact.event_id, fact.as_of) <= at
                )
                for subject, facts in self.state.facts.items()
            },
            ties={
                customer: frozenset(
                    tie
                    for tie in ties
                    if self._learned_at(customer.account, tie.event_id, tie.occurred_at) <= at
                )
                for customer, ties in self.state.ties.items()
            },
        )
        return [
            reading
            for source_id in sorted(known.sources)
            if known.owner_of(source_id) == self.user_id
            and (reading := known.reading(self.catalog, source_id)) is not None
        ]

    def _learned_at(self, account: str, event_id: str, occurred_at: datetime) -> datetime:
        # What has no claim is a person's action, known when it was done.
        return self.learned_at.get((account, event_id), occurred_at)


def _cause_of_time(readings: Sequence[Reading], instant: datetime) -> Cause:
    """The access that ran out or began at an instant, the highest plan's first."""
    turned = [
        access
        for reading in readings
        for access in reading.accesses
        if instant in (access.starts_at, access.ends_at)
    ]
    first = max(turned, key=_standing, default=None)
    if first is None:
        return Cause(kind=CauseKind.TIME)
    return Cause(
        kind=CauseKind.TIME,
        event_id=first.event_id,
        account=first.source.account or None,
        subject=first.source.key,
        rule=first.rule,
    )


def _standing(access: Access) -> tuple[int, str, str]:
    return access.plan.rank if access.plan else -1, access.source.key, access.part


async def _created_at(tx: Tx, user_id: str, version: int) -> datetime | None:
    """When a version was written, or None where there is none."""
    columns = entitlement_history.c
    result = await tx.execute(
        sa.select(columns.created_at).where(columns.user_id == user_id, columns.version == version)
    )
    return result.scalar_one_or_none()


async def _load_causes(tx: Tx, user_id: str, rows: Sequence[Mapping[str, Any]]) -> dict[int, Cause]:
    """Each version's cause, by its number: the event with its object, or the action with who did it and to what."""
    events = webhook_events.c
    found = await tx.execute(
        sa.select(events.account, events.event_id, events.subject_key).where(
            events.account.in_({row["cause_account"] for row in rows}),
            # A version does not say of which mode its cause was, but the index goes by it.
            events.livemode.in_((False, True)),
            events.event_id.in_({row["cause_event_id"] for row in rows}),
        )
    )
    subjects = {(row.account, row.event_id): row.subject_key for row in found}
    written = await _load_actions(tx, user_id, rows)
    causes: dict[int, Cause] = {}
    for row in rows:
        event_id, account = row["cause_event_id"], row["cause_account"]
        kind = CauseKind.EVENT
        if event_id.startswith(ACTION_ID_PREFIX):
            kind = CauseKind.ACTION
        elif row["cause_event_type"] == REBUILD_TYPE:
            kind = CauseKind.REBUILD
        actor, subject = written.get(event_id, (None, None))
        causes[row["version"]] = Cause(
            kind=kind,
            event_id=event_id,
            event_type=row["cause_event_type"],
            account=account or None,
            actor=f"stripe:{event_id}" if kind is CauseKind.EVENT else actor,
            subject=subjects.get((account, event_id), subject),
        )
    return causes


async def _load_actions(
    tx: Tx, user_id: str, rows: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[str, str | None]]:
    """Who did what no event did, and to what, by the action's id, as the audit log has it."""
    manual = [row for row in rows if row["cause_event_id"].startswith(ACTION_ID_PREFIX)]
    corrected = [row for row in rows if row["cause_event_type"] == REBUILD_TYPE]
    columns = audit_logs.c
    if not manual and not corrected:
        return {}
    found = await tx.execute(
        sa.select(
            columns.action, columns.resource_type, columns.resource_id, columns.details, columns.actor
        ).where(
            columns.user_id == user_id,
            sa.or_(
                columns.action.in_({row["cause_event_type"] for row in manual}),
                columns.created_at.in_({row["created_at"] for row in (*manual, *corrected)}),
            ),
        )
    )
    known: dict[str, tuple[str, str | None]] = {}
    for row in found:
        if row.action.startswith(f"{REBUILD_TYPE}."):
            known[REBUILD_TYPE] = (row.actor, None)
            continue
        action_id = row.details.get("action_id")
        if action_id is None:
            continue
        # The row of the action itself names what it was done to; those of its consequences only who did it.
        is_itself = any(action["cause_event_type"] == row.action for action in manual)
        subject = f"{row.resource_type}:{row.resource_id}" if is_itself else None
        known[action_id] = (row.actor, subject or known.get(action_id, (None, None))[1])
    return known


def entitlement_of_row(row: Mapping[str, Any]) -> Entitlement:
    """What a row of `entitlement_history` says that a user had."""
    return Entitlement(
        user_id=row["user_id"],
        plan_code=row["plan_code"],
        status=row["status"],
        features=row["entitlements"],
        valid_until=row["valid_until"],
        version=row["version"],
    )


def _document(entry: Entry) -> dict[str, Any]:
    entitlement, cause = entry.entitlement, entry.cause
    return {
        "version": entitlement.version,
        "change": entry.change,
        "plan_code_before": entry.plan_code_before,
        "plan_code": entitlement.plan_code,
        "entitlements": dict(entitlement.features),
        "status": entitlement.status,
        "valid_until": _iso(entitlement.valid_until),
        "cause": {
            "kind": cause.kind.value,
            "event_id": cause.event_id,
            "event_type": cause.event_type,
            "account": cause.account,
            "actor": cause.actor,
            "subject": cause.subject,
            "rule": cause.rule,
        },
        "occurred_at": _iso(entry.occurred_at),
        "created_at": _iso(entry.created_at),
    }


def _iso(instant: datetime | None) -> str | None:
    return iso(instant) if instant else None
