"""The shell around the decision: verify, translate, then claim, decide and commit in one transaction, and answer.

    answer = await webhooks.receive(delivery)

Everything that follows from an event is written in the transaction that claims it, so a 200 means that
all of it is durable, and a failure leaves nothing behind but its own trace.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import structlog

from backend.app.audit import log as audit_log
from backend.app.audit.models import AuditLog
from backend.app.billing import store
from backend.app.billing.domain.access import named_users
from backend.app.billing.domain.catalog import Catalog
from backend.app.billing.domain.decide import (
    NO_USER,
    Decision,
    EntitlementChange,
    Notice,
    Payment,
    Status,
    decide,
)
from backend.app.billing.domain.facts import CustomerId, Event, SubjectId, Translation, prices_of
from backend.app.billing.masking import mask_sensitive
from backend.app.billing.models import PaymentEvent
from backend.app.billing.providers.fields import TranslationError
from backend.app.billing.providers.stripe import translate
from backend.app.billing.providers.stripe_event import DASHBOARD_TEST_EVENT_ID, StripeEvent, read_event
from backend.app.billing.reread import reread_message
from backend.app.billing.security import (
    SignatureRefused,
    WebhookReplayProtection,
    WebhookSecurityValidator,
    signature_header,
)
from backend.app.billing.strict_json import parse_event_json
from backend.app.core.clock import Clock, from_unix
from backend.app.core.database import Database, Tx
from backend.app.core.errors import AppError, StoreUnavailable, Unavailable
from backend.app.core.ids import new_id
from backend.app.observability.metrics import MetricsCollector
from backend.app.ops.alerts import OwnerAlerts, owner_alert
from backend.app.ops.outbox import Relay, stage_many

# Stripe gives up on an answer after about ten seconds; ours comes earlier, and says that it may be sent again.
DEADLINE_SECONDS = 8

# One page of parked events is looked at between two short reads.
PARKED_PAGE_EVENTS = 100

# A person's action goes through the same decision as an event; no id of Stripe's has a colon.
ACTION_ID_PREFIX = "action:"

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
    """The body of the 200; `replayed` when an earlier delivery of the event was answered with the same bytes."""

    body: bytes
    replayed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Genuine:
    """A verified delivery: the event, and its bytes in the form that may be stored."""

    event: StripeEvent
    payload: bytes
    payload_sha256: str
    signature_sha256: str
    received_at: datetime
    request_id: str


@dataclass(slots=True)
class Effects:
    """What a transaction did, to be counted once it has committed; `actor` is who did it, by default the event itself."""

    actor: str | None = None
    audit_actions: list[str] = field(default_factory=list)
    changes: list[tuple[str, str]] = field(default_factory=list)
    messages: bool = False


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
        # Whether Stripe can be asked, that is, whether an API key is configured.
        self._rereads = rereads
        self._in_flight: set[asyncio.Task[Answer]] = set()

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
            outcome = "duplicate" if answer.replayed else json.loads(answer.body)["status"]
        except AppError as error:
            outcome = "refused" if error.status < 500 else "failed"  # noqa: PLR2004  # HTTP's server errors
            raise
        else:
            return answer
        finally:
            duration_seconds = time.perf_counter() - started
            self._metrics.delivery_answered(outcome, duration_seconds)
            log.info("webhook_answered", outcome=outcome, duration_ms=round(duration_seconds * 1000, 1))

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
        # Readable, because it was parked for what it says.
        translation = translate(read_event(parse_event_json(parked.payload), signed_at=parked.occurred_at))
        return translation is not None and any(
            self._catalog.plan_of_price(price)
            for about in translation.facts
            for price in prices_of(about.fact)
        )

    async def _rerun(self, parked: store.ParkedEvent) -> None:
        effects = Effects()
        event = read_event(parse_event_json(parked.payload), signed_at=parked.occurred_at)
        async with self._database.transaction() as tx:
            decision = await self.process(tx, event, effects)
            await store.resettle_event(
                tx,
                event.envelope,
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
        await self._process(
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
        if self._in_flight:
            await asyncio.wait(self._in_flight, timeout=DEADLINE_SECONDS)

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
            return Answer(body=answer_body(envelope, Decision(status=Status.IGNORED)))
        remembered = await self._replay.check_replay_cache(genuine.signature_sha256)
        if remembered is not None:
            self._metrics.replay_blocked()
            return Answer(body=remembered, replayed=True)
        # A task of its own: a client that hangs up, or the deadline, must not tear a transaction apart.
        task = asyncio.create_task(self._process(genuine))
        self._in_flight.add(task)
        task.add_done_callback(self._finished)
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                answer = await asyncio.shield(task)
        except TimeoutError as error:
            # It may still commit; then the next delivery of the event gets its answer.
            raise Unavailable from error
        await self._replay.remember(genuine.signature_sha256, answer.body)
        return answer

    def _finished(self, task: asyncio.Task[Answer]) -> None:
        self._in_flight.discard(task)
        if not task.cancelled():
            # After the deadline nobody else asks for it, and asyncio would log that as an error.
            task.exception()

    async def _process(self, genuine: Genuine) -> Answer:
        effects = Effects()
        try:
            answer = await self._commit(genuine, effects)
        except StoreUnavailable:
            await self._alerts.send_owner_alert(
                "The database is unavailable: webhooks are answered with 503 and will be sent again.",
                key="store-unavailable",
            )
            raise
        except Exception as error:
            await self._record_failure(genuine, error)
            raise
        if answer.replayed:
            self._metrics.replay_blocked()
        self.count(effects)
        return answer

    def count(self, effects: Effects) -> None:
        """Counts what a transaction did, once it has committed."""
        for action in effects.audit_actions:
            self._metrics.audit_written(action)
        for plan, change in effects.changes:
            self._metrics.entitlement_changed(plan, change)
        if effects.messages:
            self._relay.wake()

    async def _commit(self, genuine: Genuine, effects: Effects) -> Answer:
        """Claims the event and writes all that follows from it, or reads the answer of who claimed it before."""
        envelope = genuine.event.envelope
        async with self._database.transaction() as tx:
            if not await store.claim(tx, envelope, now=self._clock.now()):
                return Answer(body=(await store.stored_answer(tx, envelope)).encode("ascii"), replayed=True)
            decision = await self.process(tx, genuine.event, effects)
            body = answer_body(envelope, decision)
            await store.save_event(
                tx,
                store.StoredEvent(
                    event=envelope,
                    received_at=genuine.received_at,
                    payload=genuine.payload,
                    payload_sha256=genuine.payload_sha256,
                    request_id=genuine.request_id,
                    status=decision.status,
                    reason=decision.reason,
                    user_id=decision.user_id,
                    plan_code=decision.plan_code,
                    customer_id=decision.customer.id if decision.customer else None,
                    subject_key=decision.subject.key if decision.subject else None,
                    answer=body.decode("ascii"),
                ),
            )
        return Answer(body=body)

    async def process(self, tx: Tx, event: StripeEvent, effects: Effects) -> Decision:
        """Decides on a genuine event and writes every consequence into the open transaction."""
        translation = self._translated(event)
        if isinstance(translation, Decision):
            await self._stage_notices(tx, translation.notices, effects)
            return translation
        return await self.apply(tx, event.envelope, translation, effects)

    async def preview(self, tx: Tx, event: StripeEvent) -> Decision:
        """What `process` would decide now; nothing is written."""
        translation = self._translated(event)
        if isinstance(translation, Decision):
            return translation
        return await self.decide_in(tx, event.envelope, translation, now=self._clock.now())

    def _translated(self, event: StripeEvent) -> Translation | Decision:
        """What an event asserts, or the decision where that is nothing we may or can act on."""
        if event.envelope.livemode != self._livemode:
            return Decision(status=Status.IGNORED, reason="other_livemode")
        try:
            translation = translate(event)
        except TranslationError as error:
            return _unreadable(event.envelope, str(error))
        return translation or Decision(status=Status.IGNORED, reason="not_handled")

    async def decide_in(self, tx: Tx, event: Event, translation: Translation, *, now: datetime) -> Decision:
        """The decision on one event; the subjects it concerns stay locked, and nothing is written."""
        parties = await store.lock_parties(tx, _named(event, translation))
        state = await store.load_state(tx, parties)
        return decide(self._catalog, state, event, translation, now=now)[1]

    async def apply(self, tx: Tx, event: Event, translation: Translation, effects: Effects) -> Decision:
        """Decides on one event and writes every consequence into the open transaction."""
        now = self._clock.now()
        decision = await self.decide_in(tx, event, translation, now=now)
        await store.save_ties(tx, decision.ties)
        await store.save_links(tx, decision.links)
        await store.save_facts(tx, decision.facts)
        await store.save_sources(tx, decision.sources, now=now)
        for change in decision.changes:
            await self._activate_entitlements(tx, change, event, effects, now=now)
        for payment in decision.payments:
            await self._log_payment_event(tx, payment, event, effects, now=now)
        await self._attribute(tx, decision, event, effects, now=now)
        await self._stage_notices(tx, decision.notices, effects)
        if self._rereads and not event.id.startswith("read_"):
            messages = [reread_message(wanted, cause_event_id=event.id) for wanted in decision.rereads]
            await stage_many(tx, messages, now=now)
            effects.messages = effects.messages or bool(messages)
        return decision

    async def _activate_entitlements(
        self, tx: Tx, change: EntitlementChange, event: Event, effects: Effects, *, now: datetime
    ) -> None:
        """Writes what a user may do from now on, its history and its audit row."""
        await store.save_entitlement(tx, change, event, now=now)
        after, before = change.after, change.before
        await self._audit(
            tx,
            effects,
            AuditLog(
                id=new_id(),
                user_id=after.user_id,
                action=f"entitlement.{change.kind.value}",
                resource_type="entitlement",
                resource_id=after.user_id,
                details={
                    "plan_code": after.plan_code,
                    "plan_code_before": before.plan_code if before else None,
                    "status": after.status,
                    "entitlements": dict(after.features),
                    "valid_until": after.valid_until.isoformat() if after.valid_until else None,
                    "version": after.version,
                    _cause_key(event): event.id,
                },
                actor=effects.actor or f"stripe:{event.id}",
                created_at=now,
            ),
        )
        effects.changes.append((after.plan_code, change.kind.value))

    async def _log_payment_event(
        self, tx: Tx, payment: Payment, event: Event, effects: Effects, *, now: datetime
    ) -> None:
        """Writes a ledger line and its audit row, unless the same money has its line already."""
        fact = payment.fact
        line = PaymentEvent(
            id=new_id(),
            stripe_event_id=event.id,
            user_id=payment.user_id,
            event_type=fact.event_type,
            plan_code=payment.plan_code,
            customer_id=fact.customer_id,
            invoice_id=fact.invoice_id,
            subscription_id=fact.subscription_id,
            amount=fact.amount,
            currency=fact.currency,
            settled=fact.settled,
            metadata=fact.metadata,
            account=event.account,
            livemode=event.livemode,
            effect_key=fact.effect_key,
            subject_key=payment.subject.key if payment.subject else None,
            occurred_at=event.occurred_at,
            created_at=now,
        )
        if await store.add_payment(tx, line):
            await self._audit(tx, effects, _payment_audit("payment.event", line, event, effects, now))

    async def _attribute(
        self, tx: Tx, decision: Decision, event: Event, effects: Effects, *, now: datetime
    ) -> None:
        """Gives what had waited for a user to that user: ledger lines, with their audit rows, and parked events."""
        for attribution in decision.attributions:
            for line in await store.attribute_payments(tx, attribution):
                await self._audit(
                    tx, effects, _payment_audit("payment.attributed", line, event, effects, now)
                )
        settled: list[tuple[str, str | None]] = []
        for waiting in decision.waiting:
            await store.name_plans(tx, waiting)
            settled += [(event_id, waiting.user_id) for event_id in await store.settle_waiting(tx, waiting)]
        for attribution in decision.attributions:
            settled += [
                (event_id, attribution.user_id)
                for event_id in await store.settle_waiting_customer(tx, attribution, NO_USER)
            ]
        for event_id, user_id in settled:
            await self._audit(
                tx,
                effects,
                AuditLog(
                    id=new_id(),
                    user_id=user_id,
                    action="event.unparked",
                    resource_type="event",
                    resource_id=event_id,
                    details={f"by_{_cause_key(event)}": event.id},
                    actor=effects.actor or f"stripe:{event.id}",
                    created_at=now,
                ),
            )

    async def _stage_notices(self, tx: Tx, notices: Sequence[Notice], effects: Effects) -> None:
        messages = [
            owner_alert(
                notice.text,
                key=notice.key,
                # Hashed, because a key may be longer than the column.
                dedupe_key=hashlib.sha256(notice.key.encode()).hexdigest(),
            )
            for notice in notices
        ]
        await stage_many(tx, messages, now=self._clock.now())
        effects.messages = effects.messages or bool(messages)

    async def _audit(self, tx: Tx, effects: Effects, row: AuditLog) -> None:
        await audit_log.append(tx, [row])
        effects.audit_actions.append(row.action)

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


def _named(event: Event, translation: Translation) -> store.Parties:
    """The subjects, customers and users that an event names itself."""
    keys = {about.key for about in translation.facts}
    keys |= {key for link in translation.links for key in (link.child, link.parent)}
    if translation.subject is not None:
        keys.add(translation.subject)
    customers = {tie.customer_id for tie in translation.ties}
    if translation.customer_id is not None:
        customers.add(translation.customer_id)
    customers |= {key.removeprefix("cus:") for key in keys if key.startswith("cus:")}
    return store.Parties(
        subjects=frozenset(SubjectId(event.account, event.livemode, key) for key in keys),
        customers=frozenset(CustomerId(event.account, event.livemode, customer) for customer in customers),
        users=frozenset(
            named_users(about.fact for about in translation.facts) | {tie.user_id for tie in translation.ties}
        ),
    )


def _cause_key(event: Event) -> str:
    """What an audit row's details call the cause's id: a person's action is no event of Stripe's."""
    return "action_id" if event.id.startswith(ACTION_ID_PREFIX) else "stripe_event_id"


def _unreadable(event: Event, problem: str) -> Decision:
    return Decision(
        status=Status.PARKED,
        reason=f"unreadable:{problem}",
        notices=(
            Notice(
                key=f"unreadable:{event.type}:{event.api_version}",
                text=f"Event {event.id} ({event.type}, API {event.api_version}) is parked: {problem}. "
                "It is kept and can be processed again once its shape is understood.",
            ),
        ),
    )


def _payment_audit(
    action: str, line: PaymentEvent, event: Event, effects: Effects, now: datetime
) -> AuditLog:
    return AuditLog(
        id=new_id(),
        user_id=line.user_id,
        action=action,
        resource_type="payment",
        resource_id=line.id,
        details={
            "event_type": line.event_type,
            "plan_code": line.plan_code,
            "amount": line.amount,
            "currency": line.currency,
            "settled": line.settled,
            "effect_key": line.effect_key,
            "stripe_event_id": line.stripe_event_id,
        },
        actor=effects.actor or f"stripe:{event.id}",
        created_at=now,
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
    return json.dumps(document, separators=(",", ":")).encode("ascii")
