"""The read side: what a user may do, computed from their sources for the instant of the question.

Expiry is computed when it is read, so no timer can forget to revoke. Why it is so: explain.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from backend.app.audit.models import AuditLog, audit_logs
from backend.app.billing import store_reads
from backend.app.billing.domain.access import Access, Reading
from backend.app.billing.domain.catalog import Catalog, Feature, FeatureType
from backend.app.billing.domain.facts import FeatureValue, SubjectId
from backend.app.billing.domain.merge import Entitlement, entitlement_of, feature_value, live_accesses
from backend.app.billing.domain.state import State, below
from backend.app.billing.history import history_page
from backend.app.billing.models import PaymentEvent, payment_events
from backend.app.billing.providers.fields import ID_CHARACTERS_MAX
from backend.app.billing.store_reads import UserRows
from backend.app.billing.store_state import load_below
from backend.app.core.clock import iso
from backend.app.core.database import Database, Tx
from backend.app.core.errors import NotFound
from backend.app.core.pages import PageRequest

# An explanation is read by a person; who wants every row of ten years has the lists of payments and audit rows.
EVIDENCE_ROWS_MAX = 200

# The `reason` of a value that everybody has.
DEFAULT_PLAN_REASON = "default_plan"


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A user's entitlement at an instant, and all that it was computed from."""

    entitlement: Entitlement
    state: State
    readings: tuple[tuple[SubjectId, Reading], ...]
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureCheck:
    """One feature's value for a user, and why.

    `granted`: a boolean that is true, a limit above 0, a level above the lowest. `givers` are the accesses
    without which the value would be another, the one that lasts longest first; `reason` is the rule of that
    one, or `default_plan` where the value is what everybody has.
    """

    key: str
    value: FeatureValue
    granted: bool
    reason: str
    givers: tuple[Access, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """The ledger lines and audit rows behind a user's sources, the newest first, and what bears on the sources."""

    payments: tuple[PaymentEvent, ...]
    audit: tuple[AuditLog, ...]
    children: Mapping[SubjectId, Collection[SubjectId]]


class EntitlementService:
    """Answers what users may do, by the database's clock."""

    def __init__(self, database: Database, catalog: Catalog) -> None:
        self._database = database
        self.catalog = catalog

    async def view(self, user_id: str, *, at: datetime | None = None) -> View:
        """What a user may do now, or what was in force at an instant by all that is known today.

        A user nobody has heard of has the default plan. `version` is that of the stored row, which an
        instant in the past does not change.
        """
        async with self._database.snapshot() as tx:
            return await self._view(tx, user_id, at)

    async def view_with_evidence(self, user_id: str, *, at: datetime | None = None) -> tuple[View, Evidence]:
        """The same, with the rows that an explanation names."""
        async with self._database.snapshot() as tx:
            view = await self._view(tx, user_id, at)
            return view, await _load_evidence(tx, user_id, view)

    async def check(self, user_id: str, key: str, *, at: datetime | None = None) -> FeatureCheck:
        """One feature's value; NotFound for a feature that the catalog does not have."""
        if key not in self.catalog.features:
            raise NotFound("The catalog has no such feature.")
        return check_feature(self.catalog, await self.view(user_id, at=at), key)

    async def history(self, user_id: str, request: PageRequest) -> dict[str, Any]:
        """A page of every change a user's entitlements went through, the newest first; nothing for an unknown user.

        Raises:
            InvalidRequest: the cursor is none of this list's.
        """
        async with self._database.snapshot() as tx:
            return await history_page(tx, self.catalog, user_id, request)

    async def _view(self, tx: Tx, user_id: str, at: datetime | None) -> View:
        [(rows, now)] = await store_reads.load_users(tx, [user_id], until=at)
        return view_of(self.catalog, rows, now=now, at=at)


def view_of(catalog: Catalog, rows: UserRows, *, now: datetime, at: datetime | None = None) -> View:
    """What a user may do at an instant, or now by the database's clock, from the stored rows."""
    state = rows.state()
    # What has occurred is in force, also where this clock is a little behind Stripe's.
    instant = at or max(now, state.newest_as_of(rows.user_id) or now)
    readings = tuple(
        (source_id, reading)
        for source_id in sorted(state.sources)
        if (reading := state.reading(catalog, source_id)) is not None
    )
    entitlement = entitlement_of(
        catalog,
        rows.user_id,
        [reading for _, reading in readings],
        at=instant,
        version=rows.version,
        activated_at=rows.activated_at,
    )
    return View(entitlement=entitlement, state=state, readings=readings, at=instant)


def check_feature(catalog: Catalog, view: View, key: str) -> FeatureCheck:
    """One feature of the catalog, as a view has it."""
    live = live_accesses((reading for _, reading in view.readings), view.at)
    value, found = feature_value(catalog, key, live)
    rests_on_default = value == catalog.default_plan.features[key] and not any(
        access.is_override for access in found
    )
    givers = () if rests_on_default else tuple(sorted(found, key=_lasting, reverse=True))
    return FeatureCheck(
        key=key,
        value=value,
        granted=is_granted(catalog.features[key], value),
        reason=givers[0].rule if givers else DEFAULT_PLAN_REASON,
        givers=givers,
    )


def is_granted(feature: Feature, value: FeatureValue) -> bool:
    """Whether a value lets anything happen: true, a limit above 0, a level above the lowest."""
    if feature.type is FeatureType.LEVEL:
        return value != feature.levels[0]
    return bool(value)


def is_user_id(text: str) -> bool:
    """Whether a text can be a user's id: of a bounded length, and one that a database can keep."""
    if not 0 < len(text) <= ID_CHARACTERS_MAX or "\x00" in text:
        return False
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def check_document(check: FeatureCheck) -> dict[str, Any]:
    """The JSON answer to `GET /api/v1/entitlements/{user_id}/{feature}`."""
    return {
        "feature": check.key,
        "value": check.value,
        "granted": check.granted,
        "reason": check.reason,
    }


def _lasting(access: Access) -> tuple[bool, float, SubjectId, str]:
    """Sorts what lasts longest last."""
    end = access.ends_at
    return end is None, end.timestamp() if end else 0.0, access.source, access.part


async def _load_evidence(tx: Tx, user_id: str, view: View) -> Evidence:
    """What was written about the events, objects and payments of a user's sources, as far as the view reaches."""
    children = await load_below(tx, view.state.sources.keys())
    subjects = below(children, view.state.sources)
    event_ids = {
        fact.event_id for source_id in view.state.sources for fact in view.state.source(source_id).facts
    }
    lines = payment_events.c
    found = await tx.execute(
        sa.select(payment_events)
        .where(
            lines.user_id == user_id,
            sa.or_(
                lines.subject_key.in_({subject.key for subject in subjects}),
                lines.stripe_event_id.in_(event_ids),
            ),
            lines.occurred_at <= view.at,
        )
        .order_by(lines.occurred_at.desc(), lines.id.desc())
        .limit(EVIDENCE_ROWS_MAX)
    )
    payments = tuple(PaymentEvent(**row) for row in found.mappings())
    rows = audit_logs.c
    concerned = (
        sa.select(*(column for column in audit_logs.c if column.name in AuditLog.__dataclass_fields__))
        .where(
            sa.or_(
                sa.and_(
                    rows.user_id == user_id,
                    sa.or_(
                        rows.actor.in_({f"stripe:{event_id}" for event_id in event_ids}),
                        rows.resource_id.in_({source_id.object_id for source_id in view.state.sources}),
                    ),
                ),
                # Written before the line had a user, and never rewritten: so by the line alone.
                sa.and_(
                    rows.resource_type == "payment", rows.resource_id.in_({line.id for line in payments})
                ),
            )
        )
        # Found first and sorted then: in a month that has hardly begun it would else look through all, the newest first.
        .offset(0)
        .subquery()
    )
    newest = sa.select(concerned).order_by(concerned.c.created_at.desc(), concerned.c.id.desc())
    written = await tx.execute(newest.limit(EVIDENCE_ROWS_MAX))
    return Evidence(
        payments=payments, audit=tuple(AuditLog(**row) for row in written.mappings()), children=children
    )


def entitlement_document(view: View) -> dict[str, Any]:
    """The JSON answer to `GET /api/v1/entitlements/{user_id}`; instants as RFC 3339 in UTC."""
    entitlement = view.entitlement
    return {
        "user_id": entitlement.user_id,
        "plan_code": entitlement.plan_code,
        "status": entitlement.status,
        "entitlements": dict(entitlement.features),
        "valid_until": iso(entitlement.valid_until) if entitlement.valid_until else None,
        "version": entitlement.version,
        "sources": [_source_document(view, source_id, reading) for source_id, reading in view.readings],
    }


def _source_document(view: View, source_id: SubjectId, reading: Reading) -> dict[str, Any]:
    return {
        "source": source_id.key,
        "account": source_id.account or None,
        "customer_id": view.state.sources[source_id].customer_id,
        "status": reading.status,
        "since": iso(reading.as_of),
        "rule": reading.rule,
        "plans": [_access_document(access, view.at) for access in reading.accesses],
        "unknown": list(reading.unknown),
        "flags": list(reading.flags),
    }


def _access_document(access: Access, at: datetime) -> dict[str, Any]:
    return {
        "plan_code": access.plan.code if access.plan else None,
        "features": dict(access.features),
        "quantity": access.quantity,
        "granted": access.is_live(at),
        "starts_at": iso(access.starts_at),
        "ends_at": iso(access.ends_at) if access.ends_at else None,
    }
