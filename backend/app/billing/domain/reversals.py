"""What took the ground away again: refunds, disputes, fraud and deleted customers, as facts of a source."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from backend.app.billing.domain.catalog import Keep, Policy
from backend.app.billing.domain.facts import (
    ChargeFact,
    DisputeFact,
    EndedFact,
    Fact,
    FraudFact,
    RefundFact,
)

# https://docs.stripe.com/api/disputes/object#dispute_object-status; warnings are inquiries: no money moved.
DISPUTE_OPEN = frozenset({"needs_response", "under_review", "appeal_needs_response", "appeal_under_review"})
DISPUTE_HARMLESS = frozenset(
    # A dispute of a payment that was refunded before it: the refund itself tells what becomes of access.
    {"warning_needs_response", "warning_under_review", "warning_closed", "won", "charge_refunded"}
)
# A dispute only moves on; of two reports of one second the later stage counts.
_DISPUTE_STAGE = {
    "warning_needs_response": 0,
    "warning_under_review": 1,
    "warning_closed": 2,
    "needs_response": 3,
    "under_review": 4,
    "prevented": 5,
    "charge_refunded": 5,
    "lost": 5,
    "won": 6,
    "appeal_needs_response": 7,
    "appeal_under_review": 8,
}
# A refund's states (docs.stripe.com/api/refunds/object#refund_object-status) as they follow each other.
_REFUND_STAGE = {"pending": 0, "requires_action": 0, "succeeded": 1, "failed": 2, "canceled": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reversal:
    """Why a source gives no access, or a flag where it still does; since when, and by which event."""

    status: str
    rule: str
    as_of: datetime
    event_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LastPayment:
    """What was paid last for a source, and when; `amount` in the currency's smallest unit, where it is known."""

    amount: int | None
    at: datetime


def reversal_of(
    policy: Policy, facts: Iterable[Fact], *, payment: LastPayment | None, is_subscription: bool
) -> Reversal | None:
    """What ended or suspended a source, or None.

    A subscription that was paid again is no longer ended by an older refund or lost dispute.
    """
    known = list(facts)
    paid_again_at = payment.at if payment is not None and is_subscription else None
    for reversal in (
        _ended(known),
        _disputed(policy, known, paid_again_at, is_subscription=is_subscription),
        _fraud(policy, known),
        _refunded(policy, known, payment, is_subscription=is_subscription),
    ):
        if reversal is not None:
            return reversal
    return None


def full_refund(as_of: datetime, event_id: str) -> Reversal:
    """The end of a source whose money was given back."""
    return Reversal(status="refunded", rule="refund.full", as_of=as_of, event_id=event_id)


def refunded_amount(facts: Iterable[Fact]) -> tuple[int, datetime | None, str]:
    """How much was given back, since when, and by which event: of a refund's reports the newest counts."""
    newest: dict[str, RefundFact] = {}
    charges: dict[str, ChargeFact] = {}
    for fact in facts:
        if isinstance(fact, RefundFact):
            known = newest.get(fact.refund_id)
            if known is None or _refund_order(fact) > _refund_order(known):
                newest[fact.refund_id] = fact
        elif isinstance(fact, ChargeFact):
            seen = charges.get(fact.charge_id)
            if seen is None or (fact.as_of, fact.amount_refunded, fact.event_id) > (
                seen.as_of,
                seen.amount_refunded,
                seen.event_id,
            ):
                charges[fact.charge_id] = fact
    refunds = [fact for fact in newest.values() if fact.status == "succeeded"]
    by_refunds = sum(fact.amount for fact in refunds)
    # A charge's sum also counts refunds that are pending or failed later; but it knows of refunds that no
    # event of their own told, as older versions of the API have none for most.
    unsettled = sum(fact.amount for fact in newest.values() if fact.status != "succeeded")
    by_charges = sum(fact.amount_refunded for fact in charges.values()) - unsettled
    witnesses: list[ChargeFact] | list[RefundFact] = (
        list(charges.values()) if by_charges > by_refunds else refunds
    )
    as_of, event_id = max(((fact.as_of, fact.event_id) for fact in witnesses), default=(None, ""))
    return max(by_refunds, by_charges), as_of, event_id


def disputes(facts: Iterable[Fact]) -> list[DisputeFact]:
    """Each dispute once, in its newest state that we know; a word of tomorrow changes nothing yet."""
    newest: dict[str, DisputeFact] = {}
    for fact in facts:
        if isinstance(fact, DisputeFact) and fact.status in _DISPUTE_STAGE:
            known = newest.get(fact.dispute_id)
            if known is None or _dispute_order(fact) > _dispute_order(known):
                newest[fact.dispute_id] = fact
    return sorted(newest.values(), key=lambda fact: fact.dispute_id)


def _ended(facts: list[Fact]) -> Reversal | None:
    ended = [fact for fact in facts if isinstance(fact, EndedFact)]
    if not ended:
        return None
    first = min(ended, key=lambda fact: (fact.as_of, fact.event_id))
    rule = "customer.deleted" if first.event_type == "customer.deleted" else "account.deauthorized"
    return Reversal(
        status=rule.replace(".", "_"),
        rule=rule,
        as_of=first.as_of,
        event_id=first.event_id,
    )


def _disputed(
    policy: Policy, facts: list[Fact], paid_again_at: datetime | None, *, is_subscription: bool
) -> Reversal | None:
    # One that Stripe prevented by giving the money back is like a full refund.
    prevented = policy.refund_subscription if is_subscription else Keep.REVOKE
    answers = {"lost": policy.dispute_lost, "prevented": prevented}
    for fact in disputes(facts):
        if fact.status in DISPUTE_HARMLESS:
            continue
        if fact.status in answers:
            paid_again = paid_again_at is not None and paid_again_at > fact.as_of
            if answers[fact.status] is Keep.REVOKE and not paid_again:
                return Reversal(
                    status=f"dispute_{fact.status}",
                    rule=f"dispute.{fact.status}",
                    as_of=fact.as_of,
                    event_id=fact.event_id,
                )
        elif policy.dispute_open is Keep.REVOKE:
            return Reversal(status="disputed", rule="dispute.open", as_of=fact.as_of, event_id=fact.event_id)
    return None


def _fraud(policy: Policy, facts: list[Fact]) -> Reversal | None:
    for fact in sorted(
        (fact for fact in facts if isinstance(fact, FraudFact)), key=lambda fact: (fact.as_of, fact.event_id)
    ):
        if fact.is_confirmed or policy.fraud_warning is Keep.REVOKE:
            rule = "fraud.confirmed" if fact.is_confirmed else "fraud.warning"
            return Reversal(status="fraud", rule=rule, as_of=fact.as_of, event_id=fact.event_id)
    return None


def _refunded(
    policy: Policy, facts: list[Fact], payment: LastPayment | None, *, is_subscription: bool
) -> Reversal | None:
    if is_subscription and policy.refund_subscription is Keep.KEEP:
        return None
    if is_subscription and payment is not None:
        facts = [fact for fact in facts if fact.as_of >= payment.at]
    amount, as_of, event_id = refunded_amount(facts)
    if as_of is None or amount <= 0:
        return None
    paid_amount = payment.amount if payment is not None and payment.amount is not None else 0
    if amount * 100 < paid_amount * policy.refund_revoke_percent:
        return None
    return full_refund(as_of, event_id)


def _refund_order(fact: RefundFact) -> tuple[datetime, int, str]:
    return fact.as_of, _REFUND_STAGE.get(fact.status, 0), fact.event_id


def _dispute_order(fact: DisputeFact) -> tuple[datetime, int, str]:
    return fact.as_of, _DISPUTE_STAGE.get(fact.status, 0), fact.event_id
