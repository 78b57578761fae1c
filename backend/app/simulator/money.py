"""Payments and what becomes of them: charges, refunds and disputes, with the ledger lines they leave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from backend.app.simulator import objects
from backend.app.simulator.emit import Money
from backend.app.simulator.objects import DAY_SECONDS, Json, Shape
from backend.app.simulator.stage import Stage
from backend.app.simulator.truth import Claims

# Banks settle a refund, and decide a dispute, within weeks.
REFUND_DAYS_MAX = 7
DISPUTE_DAYS_MAX = 30


@dataclass(slots=True)
class Account:
    """What was taken back from one source, over all of its payments; `changed` writes the source's state down."""

    changed: Callable[[str], None]
    refunded: int = 0
    disputes_open: int = 0
    lost_at: int | None = None

    def claims(self, stage: Stage) -> Claims:
        """The claims as they stand."""
        return Claims(
            refunded=self.refunded,
            disputes_open=self.disputes_open,
            is_dispute_lost=self.lost_at is not None,
            is_customer_gone=stage.is_customer_gone,
        )


@dataclass(slots=True)
class Payment:
    """Money that was taken from a card: its intent, its charge and what was given back of it."""

    stage: Stage
    account: Account
    intent_id: str
    charge_id: str
    amount: int
    invoice_id: str | None = None
    customer_id: str | None = None
    metadata: Json = field(default_factory=dict)
    given_back: int = 0
    is_disputed: bool = False

    def succeed(self) -> None:
        """The events of the payment itself."""
        stage = self.stage
        charge = self._charge()
        stage.emitter.emit(
            stage.now,
            "charge.succeeded",
            charge,
            money={f"ch:{self.charge_id}:charge_succeeded": Money(self.amount, True)},
        )
        intent = objects.payment_intent(
            self.intent_id,
            amount=self.amount,
            customer=self.customer_id,
            metadata=self.metadata,
            created=stage.now,
        )
        intent["latest_charge"] = self.charge_id
        if stage.shape is Shape.BEFORE_BASIL:
            intent["invoice"] = self.invoice_id
        stage.emitter.emit(
            stage.now,
            "payment_intent.succeeded",
            intent,
            money={f"pi:{self.intent_id}:payment_intent_succeeded": Money(self.amount, True)},
        )

    def refund(self, amount: int) -> None:
        """A refund: at once, or pending and then settled or failed; a settled one may fail later, too."""
        stage, refund_id = self.stage, self.stage.name("re")
        self.given_back += amount
        status = "pending" if stage.chance(0.3) else "succeeded"
        self._refund_event("refund.created", refund_id, amount, status)
        # Stripe counts a pending refund here as well.
        stage.emitter.emit(
            stage.now,
            "charge.refunded",
            self._charge(),
            money={f"ch:{self.charge_id}:charge_refunded:{self.given_back}": Money(self.given_back, True)},
        )
        settled_at = stage.now + stage.rng.randint(0, REFUND_DAYS_MAX * DAY_SECONDS)
        if status == "pending":
            fails = stage.chance(0.4)
            stage.later(settled_at, lambda: self._settle(refund_id, amount, fails=fails))
            return
        self.account.refunded += amount
        self.account.changed(f"refund {refund_id} of {amount}")
        if stage.chance(0.2):
            stage.later(settled_at, lambda: self._fail_late(refund_id, amount))

    def dispute(self) -> None:
        """A dispute, or an inquiry that may become one."""
        stage, dispute_id = self.stage, self.stage.name("dp")
        self.is_disputed = True
        closes_at = stage.now + stage.rng.randint(0, DISPUTE_DAYS_MAX * DAY_SECONDS)
        if stage.chance(0.3):
            self._dispute_event("created", dispute_id, "warning_needs_response")
            if stage.chance(0.5):
                stage.later(closes_at, lambda: self._dispute_event("closed", dispute_id, "warning_closed"))
            else:
                stage.later(closes_at, lambda: self._open(dispute_id, "updated"))
            return
        self._open(dispute_id, "created")

    def _open(self, dispute_id: str, verb: str) -> None:
        stage = self.stage
        self._dispute_event(verb, dispute_id, "needs_response")
        self._dispute_event("funds_withdrawn", dispute_id, "needs_response")
        self.account.disputes_open += 1
        self.account.changed(f"dispute {dispute_id} was opened")
        closes_at = stage.now + stage.rng.randint(0, DISPUTE_DAYS_MAX * DAY_SECONDS)
        if stage.chance(0.5):
            stage.later(
                stage.rng.randint(stage.now, closes_at),
                lambda: self._dispute_event("updated", dispute_id, "under_review"),
            )
        won = stage.chance(0.5)
        # After the review, if there is one: a dispute only moves on.
        stage.later(closes_at, lambda: stage.later(closes_at, lambda: self._close(dispute_id, won=won)))

    def _close(self, dispute_id: str, *, won: bool) -> None:
        self.account.disputes_open -= 1
        self._dispute_event("closed", dispute_id, "won" if won else "lost")
        if won:
            self._dispute_event("funds_reinstated", dispute_id, "won")
        else:
            self.account.lost_at = self.stage.now
        self.account.changed(f"dispute {dispute_id} was {'won' if won else 'lost'}")

    def _settle(self, refund_id: str, amount: int, *, fails: bool) -> None:
        if fails:
            self._failed(refund_id, amount, "pending")
            return
        self._refund_event("refund.updated", refund_id, amount, "succeeded", previous={"status": "pending"})
        self.account.refunded += amount
        self.account.changed(f"refund {refund_id} of {amount} was settled")

    def _fail_late(self, refund_id: str, amount: int) -> None:
        self.account.refunded -= amount
        self._failed(refund_id, amount, "succeeded")
        self.account.changed(f"refund {refund_id} of {amount} came back")

    def _failed(self, refund_id: str, amount: int, before: str) -> None:
        self.given_back -= amount
        self._refund_event("refund.updated", refund_id, amount, "failed", previous={"status": before})
        self._refund_event("refund.failed", refund_id, amount, "failed")

    def _refund_event(
        self, event_type: str, refund_id: str, amount: int, status: str, *, previous: Json | None = None
    ) -> None:
        content = objects.refund(
            refund_id,
            amount=amount,
            charge_id=self.charge_id,
            intent_id=self.intent_id,
            status=status,
            created=self.stage.now,
        )
        types = [event_type]
        if event_type == "refund.updated":
            # The older name of the same news.
            types.append("charge.refund.updated")
        for name in types:
            self.stage.emitter.emit(
                self.stage.now,
                name,
                content,
                previous=previous,
                money={f"re:{refund_id}:refund:{status}": Money(amount, status == "succeeded")},
            )

    def _dispute_event(self, verb: str, dispute_id: str, status: str) -> None:
        moves = verb in ("funds_withdrawn", "funds_reinstated")
        key = f"dp:{dispute_id}:charge_dispute_{verb}" + ("" if moves else ":{event}")
        self.stage.emitter.emit(
            self.stage.now,
            f"charge.dispute.{verb}",
            objects.dispute(
                dispute_id,
                amount=self.amount,
                charge_id=self.charge_id,
                intent_id=self.intent_id,
                status=status,
                created=self.stage.now,
            ),
            money={key: Money(self.amount, moves)},
        )

    def _charge(self) -> Json:
        return objects.charge(
            self.charge_id,
            amount=self.amount,
            amount_refunded=self.given_back,
            customer=self.customer_id,
            payment_intent=self.intent_id,
            invoice=self.invoice_id,
            metadata=self.metadata,
            created=self.stage.now,
            shape=self.stage.shape,
        )
