"""Stored events processed again: those that are parked or failed, and any other, with a dry run that shows the difference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import structlog

from backend.app.billing import store, store_admin
from backend.app.billing.apply import Effects
from backend.app.billing.asserted import read_body
from backend.app.billing.domain.decide import Decision, EntitlementChange
from backend.app.billing.domain.facts import Event
from backend.app.billing.domain.merge import Entitlement
from backend.app.billing.grants import action_event, record
from backend.app.billing.providers.stripe_event import StripeEvent
from backend.app.billing.store_admin import EventKey, KeptEvent
from backend.app.billing.store_claims import claim_events
from backend.app.billing.webhooks import BillingWebhooks, stored_event
from backend.app.core.bulk import insert_all
from backend.app.core.clock import Clock, iso
from backend.app.core.database import Database, Tx
from backend.app.core.errors import AppError, Conflict, NotFound
from backend.app.core.ids import new_id
from backend.app.core.pages import PageRequest

PARKED_GROUPS_LIST = "parked-groups"
REPROCESS_LIST = "reprocess-parked"
# What is counted of each cause.
_COUNTED = ("events", "success", "ignored", "parked", "failed")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reprocessed:
    """What became, or in a dry run would become, of an event, and what changed for whom."""

    event: Event
    status_before: str
    reason_before: str | None
    decision: Decision


class StoredEvents:
    """Processes the stored events of one deployment again, each in a transaction of its own."""

    def __init__(self, *, database: Database, webhooks: BillingWebhooks, clock: Clock) -> None:
        self._database = database
        self._webhooks = webhooks
        self._clock = clock

    async def find(self, event_id: str, *, account: str | None, livemode: bool | None) -> EventKey:
        """The one stored event of an id.

        Raises:
            NotFound: there is none.
            Conflict: several accounts or modes have one; the detail names them.
        """
        async with self._database.snapshot() as tx:
            found = await store_admin.find_events(tx, event_id, account=account, livemode=livemode)
        if not found:
            raise NotFound("There is no such event.")
        if len(found) > 1:
            places = "; ".join(f"account={key.account}&livemode={str(key.livemode).lower()}" for key in found)
            raise Conflict(f"Several events have this id; add one of: {places}.")
        return found[0]

    async def reprocess(self, key: EventKey, *, actor: str, dry_run: bool) -> Reprocessed:
        """Processes an event again by today's catalog and knowledge; a failed one as if it was delivered now.

        The answer that a delivery got stays the answer. A dry run writes nothing.

        Raises:
            Conflict: its body was let go by retention.
        """
        if dry_run:
            async with self._database.snapshot() as tx:
                kept = await store_admin.load_kept_event(tx, key)
                event = _read(kept)
                decision = await self._webhooks.preview(tx, event)
            return _reprocessed(kept, event, decision)
        effects = Effects(actor=actor)
        async with self._database.transaction() as tx:
            reprocessed = await self._apply(tx, key, effects)
        self._webhooks.count(effects)
        log.info("event_reprocessed", event_id=key.event_id, status=reprocessed.decision.status.value)
        return reprocessed

    async def reprocess_parked(
        self, request: PageRequest, *, reason: str | None, actor: str, dry_run: bool
    ) -> dict[str, Any]:
        """Processes a page of the parked events, of one cause or of all, in the order of their names.

        Gives `{"dry_run", "causes": [{"reason", "events", "success", "ignored", "parked", "failed"}], "data":
        [differences], "next_cursor"}`; in a dry run each event is looked at by itself. One that meets an error of
        ours is as it was and stops no other; its difference has an `error` instead.
        """
        async with self._database.snapshot() as tx:
            found = await store_admin.list_parked_keys(
                tx,
                reason=reason,
                after=request.after(REPROCESS_LIST, str, bool, str),
                limit=request.rows_max,
            )
        causes: dict[str, dict[str, int]] = {}
        documents: dict[EventKey, dict[str, Any]] = {}
        for key, cause in found[: request.limit]:
            counts = causes.setdefault(cause, dict.fromkeys(_COUNTED, 0))
            counts["events"] += 1
            try:
                done = await self.reprocess(key, actor=actor, dry_run=dry_run)
            except AppError:
                raise
            except Exception as error:  # whatever it is, the others can't help it
                log.exception("event_not_reprocessed", event_id=key.event_id)
                counts["failed"] += 1
                documents[key] = {**_named(key), "dry_run": dry_run, "error": type(error).__name__}
            else:
                counts[done.decision.status.value] += 1
                documents[key] = difference_document(done, dry_run=dry_run)
        page = request.page(
            REPROCESS_LIST,
            found,
            place=lambda row: (row[0].account, row[0].livemode, row[0].event_id),
            document=lambda row: documents[row[0]],
        )
        return {
            "dry_run": dry_run,
            "causes": [{"reason": cause, **counts} for cause, counts in sorted(causes.items())],
            **page,
        }

    async def parked_groups(self, request: PageRequest) -> dict[str, Any]:
        """A page of what parked events wait for, each cause with its count and its oldest and newest arrival."""
        async with self._database.snapshot() as tx:
            groups = await store_admin.list_parked_groups(
                tx, after=request.after(PARKED_GROUPS_LIST, str), limit=request.rows_max
            )
        return request.page(
            PARKED_GROUPS_LIST,
            groups,
            place=lambda group: (group.reason,),
            document=lambda group: {
                "reason": group.reason,
                "events": group.events,
                "oldest_received_at": iso(group.oldest_received_at),
                "newest_received_at": iso(group.newest_received_at),
            },
        )

    async def _apply(self, tx: Tx, key: EventKey, effects: Effects) -> Reprocessed:
        event = _read(await store_admin.load_kept_event(tx, key))
        # Waits for a delivery of a failed event that is under way; what it did is then seen below.
        is_first = bool(await claim_events(tx, [event.envelope.key], now=self._clock.now()))
        kept = await store_admin.load_kept_event(tx, key)
        decision = await self._webhooks.process(tx, event, effects)
        if is_first:
            await _save_as_delivered(tx, kept, event.envelope, decision)
        else:
            has_body = await store.resettle_event(
                tx,
                event.envelope,
                status=decision.status,
                reason=decision.reason,
                user_id=decision.user_id,
                plan_code=decision.plan_code,
            )
            # What is parked keeps its body: so nothing may become parked whose body went meanwhile.
            if not has_body:
                raise _let_go()
        await record(
            tx,
            effects,
            action_event(
                "event.reprocessed",
                new_id(),
                livemode=key.livemode,
                at=self._clock.now(),
                account=key.account,
            ),
            user_id=decision.user_id,
            resource=("event", key.event_id),
            details={
                "account": key.account,
                "status_before": kept.status,
                "status_after": decision.status.value,
                "reason_before": kept.reason,
                "reason_after": decision.reason,
            },
            now=self._clock.now(),
        )
        return _reprocessed(kept, event, decision)


async def _save_as_delivered(tx: Tx, kept: KeptEvent, event: Event, decision: Decision) -> None:
    """Writes what a delivery would have written; when it came and as which request stays."""
    row = stored_event(
        event,
        decision,
        received_at=kept.received_at,
        payload=_body(kept),
        payload_sha256=kept.payload_sha256,
        request_id=kept.request_id or "",
    )
    await insert_all(tx, [store.insert_events([row])])


def difference_document(done: Reprocessed, *, dry_run: bool) -> dict[str, Any]:
    """The JSON of what processing an event again did or would do."""
    event, decision = done.event, done.decision
    return {
        **_named(EventKey(account=event.account, livemode=event.livemode, event_id=event.id)),
        "event_type": event.type,
        "dry_run": dry_run,
        "status_before": done.status_before,
        "status_after": decision.status.value,
        "reason_before": done.reason_before,
        "reason_after": decision.reason,
        "user_id": decision.user_id,
        "changes": [change_document(change) for change in decision.changes],
    }


def _named(key: EventKey) -> dict[str, Any]:
    return {"event_id": key.event_id, "account": key.account or None, "livemode": key.livemode}


def change_document(change: EntitlementChange) -> dict[str, Any]:
    """The JSON of a user's entitlements before (null: never heard of) and after."""
    return {
        "user_id": change.after.user_id,
        "change": change.kind.value,
        "before": _entitlement_document(change.before) if change.before else None,
        "after": _entitlement_document(change.after),
    }


def _entitlement_document(entitlement: Entitlement) -> dict[str, Any]:
    return {
        "plan_code": entitlement.plan_code,
        "status": entitlement.status,
        "entitlements": dict(entitlement.features),
        "valid_until": iso(entitlement.valid_until) if entitlement.valid_until else None,
    }


def _read(kept: KeptEvent) -> StripeEvent:
    return read_body(_body(kept), signed_at=kept.occurred_at)


def _body(kept: KeptEvent) -> bytes:
    if kept.payload is None:
        raise _let_go()
    return kept.payload


def _let_go() -> Conflict:
    return Conflict(
        "The event's body was let go by retention, so it can't be read again; nothing was changed. "
        "What it asserted is kept: `tollkeeper rebuild` decides on that by today's catalog."
    )


def _reprocessed(kept: KeptEvent, event: StripeEvent, decision: Decision) -> Reprocessed:
    return Reprocessed(
        event=event.envelope, status_before=kept.status, reason_before=kept.reason, decision=decision
    )
