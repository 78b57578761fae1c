"""Manual grants: a person gives a user a plan or single feature values, replaces them, or takes a grant back.

A grant is one more source of the user's: it goes through the same decision as an event, so it merges,
explains and is rebuilt alike. Who did it and why stands in the fact and in the audit log.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import Any

from backend.app.audit import log as audit_log
from backend.app.audit.models import AuditLog
from backend.app.billing import store_admin, store_state
from backend.app.billing.apply import Effects
from backend.app.billing.domain.catalog import Catalog
from backend.app.billing.domain.facts import (
    ACTION_ID_PREFIX,
    About,
    Event,
    FeatureValue,
    GrantFact,
    SubjectId,
    Translation,
)
from backend.app.billing.store_claims import claim_events
from backend.app.billing.webhooks import BillingWebhooks
from backend.app.core.clock import Clock, iso
from backend.app.core.database import Database, Tx, database_now
from backend.app.core.errors import InvalidParameters, NotFound
from backend.app.core.ids import new_id
from backend.app.core.pages import PageRequest

GRANTS_LIST = "grants"
# What every JSON reader takes for the same number (RFC 8259 section 6).
WHOLE_NUMBER_MAX = 2**53 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What is granted: a plan, or values for single features; `starts_at` None means from now on."""

    plan_code: str | None
    features: Mapping[str, FeatureValue]
    is_override: bool
    reason: str
    starts_at: datetime | None
    ends_at: datetime | None


class GrantStatus(StrEnum):
    """Where a grant stands at an instant."""

    SCHEDULED = "scheduled"
    ACTIVE = "active"
    ENDED = "ended"
    REMOVED = "removed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """A grant as it stands: `made` is how it began, `removed` how it was taken back."""

    made: GrantFact
    removed: GrantFact | None

    def status(self, at: datetime) -> GrantStatus:
        """Where it stands at an instant."""
        if self.removed is not None:
            return GrantStatus.REMOVED
        if at < self.made.starts_at:
            return GrantStatus.SCHEDULED
        if self.made.ends_at is not None and at >= self.made.ends_at:
            return GrantStatus.ENDED
        return GrantStatus.ACTIVE


class Grants:
    """Makes, ends and lists the manual grants of one deployment."""

    def __init__(
        self,
        *,
        database: Database,
        catalog: Catalog,
        webhooks: BillingWebhooks,
        clock: Clock,
        livemode: bool,
    ) -> None:
        self._database = database
        self._catalog = catalog
        self._webhooks = webhooks
        self._clock = clock
        self._livemode = livemode

    async def create(self, user_id: str, terms: Terms, *, actor: str, action_id: str) -> Grant:
        """A new grant with all that follows from it, in one transaction.

        `action_id` is the same each time one wish is carried out again, and becomes the grant's id: what
        was done already is not done twice.

        Raises:
            InvalidParameters: the catalog has no such plan, feature or value, or the times are no span.
        """
        self._check(terms)
        effects = Effects(actor=actor)
        now = self._clock.now()
        event = action_event("grant.created", action_id, livemode=self._livemode, at=now)
        subject = self._subject(action_id)
        async with self._database.transaction() as tx:
            is_first = bool(await claim_events(tx, [event.key], now=now))
            if is_first:
                fact = GrantFact(
                    event_id=event.id,
                    event_type=event.type,
                    as_of=now,
                    grant_id=action_id,
                    user_id=user_id,
                    plan_code=terms.plan_code,
                    features=terms.features,
                    is_override=terms.is_override,
                    starts_at=terms.starts_at or now,
                    ends_at=terms.ends_at,
                    is_removed=False,
                    reason=terms.reason,
                    actor=actor,
                )
                await self._apply(tx, event, fact, effects)
            grant = await _load(tx, subject, user_id)
        self._webhooks.count(effects)
        return grant

    async def remove(self, user_id: str, grant_id: str, *, reason: str, actor: str, action_id: str) -> Grant:
        """Ends a grant now; one that was taken back already stays as it is.

        Raises:
            NotFound: the user has no such grant.
        """
        effects = Effects(actor=actor)
        now = self._clock.now()
        event = action_event("grant.removed", action_id, livemode=self._livemode, at=now)
        subject = self._subject(grant_id)
        async with self._database.transaction() as tx:
            await store_state.load_locked(
                tx,
                store_state.Parties(
                    subjects=frozenset({subject}), customers=frozenset(), users=frozenset({user_id})
                ),
            )
            grant = await _load(tx, subject, user_id)
            if grant.removed is None:
                fact = replace(
                    grant.made,
                    event_id=event.id,
                    event_type=event.type,
                    as_of=now,
                    is_removed=True,
                    reason=reason,
                    actor=actor,
                )
                await self._apply(tx, event, fact, effects)
                grant = replace(grant, removed=fact)
        self._webhooks.count(effects)
        return grant

    async def page(self, user_id: str, request: PageRequest) -> dict[str, Any]:
        """A page of a user's grants, the newest first, as `{"data": [...], "next_cursor": ...}`."""
        async with self._database.snapshot() as tx:
            places = await store_admin.load_grant_places(
                tx,
                user_id,
                livemode=self._livemode,
                after=request.after(GRANTS_LIST, datetime, str),
                limit=request.rows_max,
            )
            known = await store_admin.load_grant_facts(tx, [subject for _, subject in places])
            at = await database_now(tx)
        return request.page(
            GRANTS_LIST,
            places,
            place=lambda row: (row[0], row[1].key),
            document=lambda row: grant_document(_grant(known[row[1]]), at=max(at, self._clock.now())),
        )

    def _subject(self, grant_id: str) -> SubjectId:
        return SubjectId("", self._livemode, f"grant:{grant_id}")

    def _check(self, terms: Terms) -> None:
        if terms.plan_code is not None and terms.plan_code not in self._catalog.plans:
            raise _wrong(
                "plan_code", message=f"no plan of the catalog; known are {_names(self._catalog.plans)}"
            )
        for key, value in terms.features.items():
            feature = self._catalog.features.get(key)
            if feature is None:
                raise _wrong(
                    "features",
                    message=f"{key!r} is no feature of the catalog; known are "
                    f"{_names(self._catalog.features)}",
                )
            if not feature.fits(value) or (isinstance(value, int) and value > WHOLE_NUMBER_MAX):
                raise _wrong("features", key, message=f"{feature.expected} is expected")
        if (terms.plan_code is None) == (not terms.features):
            raise _wrong("plan_code", message="name either a plan_code or features")
        if terms.is_override and terms.plan_code is not None:
            raise _wrong("override", message="an override replaces single values; name them in features")
        if terms.ends_at is not None and terms.ends_at <= (terms.starts_at or self._clock.now()):
            raise _wrong("ends_at", message="must be later than the start")

    async def _apply(self, tx: Tx, event: Event, fact: GrantFact, effects: Effects) -> None:
        key = f"grant:{fact.grant_id}"
        await self._webhooks.apply(
            tx, event, Translation(subject=key, facts=(About(key=key, fact=fact),)), effects
        )
        await record(
            tx,
            effects,
            event,
            user_id=fact.user_id,
            resource=("grant", fact.grant_id),
            details={
                "plan_code": fact.plan_code,
                "features": dict(fact.features),
                "override": fact.is_override,
                "starts_at": iso(fact.starts_at),
                "ends_at": iso(fact.ends_at) if fact.ends_at else None,
                "reason": fact.reason,
            },
            now=self._clock.now(),
        )


def action_event(kind: str, action_id: str, *, livemode: bool, at: datetime, account: str = "") -> Event:
    """A person's action in the form in which the decision takes its causes."""
    return Event(
        account=account,
        livemode=livemode,
        id=f"{ACTION_ID_PREFIX}{action_id}",
        type=kind,
        api_version=None,
        occurred_at=at,
    )


async def record(
    tx: Tx,
    effects: Effects,
    event: Event,
    *,
    user_id: str | None,
    resource: tuple[str, str],
    details: Mapping[str, Any],
    now: datetime,
) -> None:
    """The audit row of a person's action itself, beside those of its consequences."""
    assert effects.actor is not None, "a person's action has an actor"
    row = AuditLog(
        id=new_id(),
        user_id=user_id,
        action=event.type,
        resource_type=resource[0],
        resource_id=resource[1],
        details={**details, "action_id": event.id},
        actor=effects.actor,
        created_at=now,
    )
    await audit_log.append(tx, [row])
    effects.audit_actions.append(row.action)


def grant_document(grant: Grant, *, at: datetime) -> dict[str, Any]:
    """The JSON of a grant as it stands at an instant; instants as RFC 3339 in UTC."""
    made, removed = grant.made, grant.removed
    return {
        "id": made.grant_id,
        "user_id": made.user_id,
        "plan_code": made.plan_code,
        "features": dict(made.features),
        "override": made.is_override,
        "status": grant.status(at).value,
        "starts_at": iso(made.starts_at),
        "ends_at": iso(made.ends_at) if made.ends_at else None,
        "reason": made.reason,
        "created_at": iso(made.as_of),
        "created_by": made.actor,
        "removed_at": iso(removed.as_of) if removed else None,
        "removed_by": removed.actor if removed else None,
        "removed_reason": removed.reason if removed else None,
    }


async def _load(tx: Tx, subject: SubjectId, user_id: str) -> Grant:
    known = (await store_admin.load_grant_facts(tx, [subject])).get(subject)
    if not known or known[0].user_id != user_id:
        raise NotFound("The user has no such grant.")
    return _grant(known)


def _grant(facts: Sequence[GrantFact]) -> Grant:
    return Grant(
        made=next(fact for fact in facts if not fact.is_removed),
        removed=next((fact for fact in facts if fact.is_removed), None),
    )


def _wrong(*field: str, message: str) -> InvalidParameters:
    return InvalidParameters.named("body", *field, message=message)


def _names(known: Mapping[str, object]) -> str:
    return ", ".join(known)
