"""The shell around the decision: verify, translate, then claim, decide and commit in one transaction, and answer.

    answer = await webhooks.receive(delivery)

Everything that follows from an event is written in the transaction that claims it, so a 200 means that
all of it is durable, and a failure leaves nothing behind but its own trace. Deliveries that arrive
together share a transaction (committer.py); what is written for them is in apply.py.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import structlog

from backend.app.billing import store
from backend.app.billing.apply import Applier, Assertion, Effects
from backend.app.billing.asserted import Asserted, read_stored, translated
from backend.app.billing.committer import Committer
from backend.app.billing.domain.catalog import Catalog
from backend.app.billing.domain.decide import Decision, Status
from backend.app.billing.domain.facts import Event, EventKey, Translation, prices_of
from backend.app.billing.masking import mask_sensitive
from backend.app.billing.providers.stripe_event import DASHBOARD_TEST_EVENT_ID, StripeEvent, read_event
from backend.app.billing.security import (
    SignatureRefused,
    WebhookReplayProtection,
    WebhookSecurityValidator,
    signature_header,
)
from backend.app.billing.strict_json import parse_event_json
from backend.app.core.clock import Clock, from_unix
from backend.app.core.compact_json import compact_json
from backend.app.core.database import Database, Tx
from backend.app.core.errors import AppError, StoreUnavailable, Unavailable
from backend.app.observability.metrics import MetricsCollector
from backend.app.ops.alerts import OwnerAlerts
from backend.app.ops.outbox import Relay

# Stripe gives up on an answer after about ten seconds; ours comes earlier, and says that it may be sent again.
DEADLINE_SECONDS = 8

# While one transaction is on its way to the disk, the next ones are decided; a lock that is waited for holds
# up one of them. SQLite has one writer.
LANES = 3
SQLITE_LANES = 1

# What a delivery of an event that was processed before comes to.
DUPLICATE = "duplicate"

# A line each in the log at its usual level; the others would only repeat what the tables say.
NOTEWORTHY_OUTCOMES = frozenset({"parked", "refused", "failed"})

# One page of parked events is looked at between two short reads.
PARKED_PAGE_EVENTS = 100

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """One HTTP attempt that carries an event: raw bytes, raw headers, when and as which request."""

    body: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    received_at: datetime
    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The body of the 200, and what became of the event, or that it is `duplicate`: an earlier delivery got these bytes."""

    body: bytes
    outcome: str

    @property
    def replayed(self) -> bool:
        """Whether an earlier delivery of the event was answered with the same bytes."""
        return self.outcome == DUPLICATE


@dataclass(frozen=True, slots=True, kw_only=True)
class Genuine:
    """A verified delivery: the event, and its bytes in the form that may be stored."""

    event: StripeEvent
    payload: bytes
    payload_sha256: str
    signature_sha256: str
    received_at: datetime
    request_id: str


class BillingWebhooks:
    """Takes deliveries of one deployment; `livemode` is the mode it grants for."""

    def __init__(
        self,
        *,
        database: Database,
        catalog: Catalog,
        validator: WebhookSecurityValidator,
        replay: WebhookReplayProtection,
        alerts: OwnerAlerts,
        relay: Relay,
        metrics: MetricsCollector,
        clock: Clock,
        livemode: bool,
        rereads: bool = False,
    ) -> None:
        self._database = database
        self._catalog = catalog
        self._validator = validator
        self._replay = replay
        self._alerts = alerts
        self._relay = relay
        self._metrics = metrics
        self._clock = clock
        self._livemode = livemode
        self._applier = Applier(catalog, clock, rereads=rereads)
        self._committer = Committer(self._commit, lanes=SQLITE_LANES if database.is_sqlite else LANES)

    async def receive(self, delivery: Delivery) -> Answer:
        """The answer to a delivery.

        Raises:
            SignatureRefused: 403, and nothing was stored.
            InvalidEvent: 400, the signature is genuine but the body is not an event.
            Unavailable: 503, it could not be done now or not in time; Stripe sends it again.
        """
        started = time.perf_counter()
        outcome = "failed"
        try:
            genuine = self._verify(delivery)
            structlog.contextvars.bind_contextvars(event_id=genuine.event.envelope.id)
            answer = await self._answer(genuine)
            outcome = answer.outcome
        except AppError as error:
            outcome = "refused" if error.status < 500 else "failed"  # noqa: PLR2004  # HTTP's server errors
            raise
        else:
            return answer
        finally:
            duration_seconds = time.perf_counter() - started
            self._metrics.delivery_answered(outcome, duration_seconds)
            # What went well has its rows, and one line for all that committed together.
            write = log.info if outcome in NOTEWORTHY_OUTCOMES else log.debug
            write("webhook_answered", outcome=outcome, duration_ms=round(duration_seconds * 1000, 1))

    async def prepare(self) -> None:
        """What is to be done before the first delivery."""
        if not self._database.is_sqlite:
            async with self._database.transaction() as tx:
                await store.advance_positions(tx)
        await self.rerun_parked()

    async def rerun_parked(self) -> int:
        """Applies the parked events whose price or plan the catalog has by now; how many were run again."""
        rerun = 0
        for prefix in ("unknown_price:", "unknown_plan:"):
            after: tuple[str, bool, str] | None = None
            while True:
                async with self._database.snapshot() as tx:
                    page = await store.load_parked(
                        tx, after=after, reason_prefix=prefix, limit=PARKED_PAGE_EVENTS
                    )
                if not page:
                    break
                after = (page[-1].account, page[-1].livemode, page[-1].event_id)
                for parked in page:
                    if self._is_known_now(parked, parked.reason.removeprefix(prefix)):
                        await self._rerun(parked)
                        rerun += 1
        return rerun

    def _is_known_now(self, parked: store.ParkedEvent, missing: str) -> bool:
        """Whether the catalog has what was missing, under this name or under another of the event's prices."""
        if self._catalog.knows(missing):
            return True
        asserts = self._read_parked(parked).asserts
        return isinstance(asserts, Translation) and any(
            self._catalog.plan_of_price(price) for about in asserts.facts for price in prices_of(about.fact)
        )

    def _read_parked(self, parked: store.ParkedEvent) -> Asserted:
        return read_stored(
            parked.key,
            parked.payload,
            parked.assertion,
            occurred_at=parked.occurred_at,
            livemode=self._livemode,
        )

    async def _rerun(self, parked: store.ParkedEvent) -> None:
        effects = Effects()
        asserted = self._read_parked(parked)
        async with self._database.transaction() as tx:
            decision = await self._process(tx, asserted, effects)
            await store.resettle_event(
                tx,
                asserted.event,
                status=decision.status,
                reason=decision.reason,
                user_id=decision.user_id,
                plan_code=decision.plan_code,
            )
        self.count(effects)
        log.info("parked_event_rerun", event_id=parked.event_id, status=decision.status.value)

    async def take_read(self, body: bytes) -> None:
        """Applies an object that was read back from Stripe, in the form of an event, through the same transaction."""
        now = self._clock.now()
        payload = mask_sensitive(body)
        await self._submit(
            Genuine(
                event=read_event(parse_event_json(payload), signed_at=now),
                payload=payload,
                payload_sha256=hashlib.sha256(body).hexdigest(),
                signature_sha256="",
                received_at=now,
                request_id="",
            )
        )

    async def drain(self) -> None:
        """Waits until everything in flight has committed or failed."""
        await self._committer.drain(timeout_seconds=DEADLINE_SECONDS)

    def _verify(self, delivery: Delivery) -> Genuine:
        try:
            verified = self._validator.verify(
                body=delivery.body, header=signature_header(delivery.headers), now=delivery.received_at
            )
        except SignatureRefused as refusal:
            self._metrics.signature_refused(refusal.reason.value)
            raise
        # From here on only the storable form is looked at, so a rebuild from the store sees the same.
        payload = mask_sensitive(delivery.body)
        event = read_event(parse_event_json(payload), signed_at=from_unix(verified.timestamp))
        return Genuine(
            event=event,
            payload=payload,
            payload_sha256=hashlib.sha256(delivery.body).hexdigest(),
            signature_sha256=verified.signature_sha256,
            received_at=delivery.received_at,
            request_id=delivery.request_id,
        )

    async def _answer(self, genuine: Genuine) -> Answer:
        envelope = genuine.event.envelope
        if envelope.id == DASHBOARD_TEST_EVENT_ID:
            ignored = Decision(status=Status.IGNORED)
            return Answer(body=answer_body(envelope, ignored), outcome=ignored.status.value)
        remembered = await self._replay.check_replay_cache(genuine.signature_sha256)
        if remembered is not None:
            self._metrics.replay_blocked()
            return Answer(body=remembered, outcome=DUPLICATE)
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                answer = await self._submit(genuine)
        except TimeoutError as error:
            # It may still commit; then the next delivery of the event gets its answer.
            raise Unavailable from error
        await self._replay.remember(genuine.signature_sha256, answer.body)
        return answer

    async def _submit(self, genuine: Genuine) -> Answer:
        try:
            answer = await self._committer.submit(genuine)
        except StoreUnavailable:
            await self._alerts.send_owner_alert(
                "The database is unavailable: webhooks are answered with 503 and will be sent again.",
                key="store-unavailable",
            )
            raise
        except AppError:
            raise
        except Exception as error:
            await self._record_failure(genuine, error)
            raise
        if answer.replayed:
            self._metrics.replay_blocked()
        return answer

    def count(self, effects: Effects) -> None:
        """Counts what a transaction did, once it has committed."""
        for action in effects.audit_actions:
            self._metrics.audit_written(action)
        for plan, change in effects.changes:
            self._metrics.entitlement_changed(plan, change)
        if effects.messages:
            self._relay.wake()

    async def _commit(self, batch: Sequence[Genuine]) -> list[Answer]:
        """Claims the events and writes all that follows from them, or reads the answers of who claimed them before."""
        started = time.perf_counter()
        effects = Effects()
        events = [genuine.event.envelope for genuine in batch]
        async with self._database.transaction() as tx:
            for genuine in batch:
                if not genuine.event.is_dated:
                    await store.date_failed(tx, genuine.event.envelope)
            answers: dict[EventKey, Answer] = {}
            decisions = await self._applier.apply_new(
                tx, [self._assertion(genuine, answers) for genuine in batch], effects
            )
            # After ours are written, so that a second delivery within the batch finds its answer too.
            lost = [event for event, decision in zip(events, decisions, strict=True) if decision is None]
            stored = await store.stored_answers(tx, lost)
        self.count(effects)
        log.info(
            "webhooks_committed",
            events=len(batch) - len(lost),
            duplicates=len(lost),
            duration_ms=round((time.perf_counter() - started) * 1000, 1),
        )
        return [
            Answer(body=stored[event.key].encode("ascii"), outcome=DUPLICATE)
            if decision is None
            else answers[event.key]
            for event, decision in zip(events, decisions, strict=True)
        ]

    def _assertion(self, genuine: Genuine, answers: dict[EventKey, Answer]) -> Assertion:
        """An event to be decided on; its answer goes into `answers` as it goes into its row."""
        event = genuine.event.envelope

        def row(decision: Decision) -> store.StoredEvent:
            stored = stored_event(
                event,
                decision,
                received_at=genuine.received_at,
                payload=genuine.payload,
                payload_sha256=genuine.payload_sha256,
                request_id=genuine.request_id,
            )
            answers[event.key] = Answer(body=stored.answer.encode("ascii"), outcome=decision.status.value)
            return stored

        return Assertion(event=event, asserts=translated(genuine.event, livemode=self._livemode), row=row)

    async def process(self, tx: Tx, event: StripeEvent, effects: Effects) -> Decision:
        """Decides on a genuine event and writes every consequence but its own row into the open transaction."""
        asserts = translated(event, livemode=self._livemode)
        return await self._process(tx, Asserted(event=event.envelope, asserts=asserts), effects)

    async def _process(self, tx: Tx, asserted: Asserted, effects: Effects) -> Decision:
        assertion = Assertion(event=asserted.event, asserts=asserted.asserts)
        (decision,) = await self._applier.apply(tx, [assertion], effects)
        return decision

    async def apply(self, tx: Tx, event: Event, translation: Translation, effects: Effects) -> Decision:
        """Decides on a person's action, written as an event, and writes every consequence."""
        (decision,) = await self._applier.apply(tx, [Assertion(event=event, asserts=translation)], effects)
        return decision

    async def preview(self, tx: Tx, event: StripeEvent) -> Decision:
        """What `process` would decide now; nothing is written."""
        translation = translated(event, livemode=self._livemode)
        if isinstance(translation, Decision):
            return translation
        return await self._applier.preview(tx, event.envelope, translation)

    async def _record_failure(self, genuine: Genuine, error: Exception) -> None:
        """Leaves the trace of a failed attempt, in a transaction of its own, and tells the owner."""
        envelope = genuine.event.envelope
        log.error("webhook_failed", event_type=envelope.type, exc_info=error)
        await self._alerts.send_owner_alert(
            f"Event {envelope.id} ({envelope.type}) could not be processed: {type(error).__name__}. "
            "Nothing of it was applied; Stripe will send it again.",
            key=f"webhook-failed:{type(error).__name__}",
        )
        try:
            async with self._database.transaction() as tx:
                if not genuine.event.is_dated:
                    await store.date_failed(tx, envelope)
                await store.save_failed_attempt(
                    tx,
                    envelope,
                    received_at=genuine.received_at,
                    payload=genuine.payload,
                    payload_sha256=genuine.payload_sha256,
                    request_id=genuine.request_id,
                    reason=type(error).__name__,
                )
        except StoreUnavailable:
            log.warning("failed_attempt_not_recorded", event_type=envelope.type)


def stored_event(
    event: Event,
    decision: Decision,
    *,
    received_at: datetime,
    payload: bytes,
    payload_sha256: str,
    request_id: str,
) -> store.StoredEvent:
    """An event's row, with what was decided on it and the answer to its first delivery."""
    return store.StoredEvent(
        event=event,
        received_at=received_at,
        payload=payload,
        payload_sha256=payload_sha256,
        request_id=request_id,
        status=decision.status,
        reason=decision.reason,
        user_id=decision.user_id,
        plan_code=decision.plan_code,
        customer_id=decision.customer.id if decision.customer else None,
        subject_key=decision.subject.key if decision.subject else None,
        answer=answer_body(event, decision).decode("ascii"),
    )


def answer_body(event: Event, decision: Decision) -> bytes:
    """The body of the 200 that the first delivery of an event gets."""
    document: Mapping[str, str | None] = {
        "status": decision.status.value,
        "event_id": event.id,
        "event_type": event.type,
        "user_id": decision.user_id,
        "plan_code": decision.plan_code,
    }
    return compact_json(document).encode("ascii")
