"""What a subscription's facts mean for access: its newest status, from when and until when, item by item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from backend.app.billing.domain.access import Access, Reading, Source
from backend.app.billing.domain.catalog import Catalog, Keep, Plan
from backend.app.billing.domain.facts import (
    CheckoutFact,
    InvoiceFact,
    InvoiceState,
    PriceRef,
    SubscriptionFact,
    SubscriptionItem,
)
from backend.app.billing.domain.pricing import highest, plans_of
from backend.app.billing.domain.reversals import LastPayment, reversal_of
from backend.app.billing.domain.timeline import TERMINAL_STATUSES, in_order

# Statuses under which a subscription gives access, at least for a while.
GRANTING_STATUSES = frozenset({"trialing", "active", "past_due"})
KNOWN_STATUSES = GRANTING_STATUSES | TERMINAL_STATUSES | {"incomplete", "unpaid", "paused"}


def read_subscription(catalog: Catalog, source: Source) -> Reading | None:
    """The meaning of all that is known of a subscription; None when only things linked to it were heard of."""
    snapshots = in_order(fact for fact in source.facts if isinstance(fact, SubscriptionFact))
    checkouts = [fact for fact in source.facts if isinstance(fact, CheckoutFact)]
    known = [fact for fact in snapshots if fact.status in KNOWN_STATUSES]
    if not known:
        return _without_status(snapshots, checkouts)
    fact = known[-1]
    plan_hint = fact.metadata_plan_code or next(
        (
            checkout.metadata_plan_code
            for checkout in sorted(checkouts, key=lambda checkout: (checkout.as_of, checkout.event_id))
            if checkout.metadata_plan_code
        ),
        None,
    )
    # A hand-made event may carry no items; then the subscription as a whole is the one item.
    items = fact.items or (
        SubscriptionItem(item_id="", price=PriceRef(), quantity=1, period_end=fact.period_end),
    )
    plans, unknown = plans_of(catalog, [(item.price, item) for item in items], plan_hint)
    refused = _refusal(catalog, source, fact)
    if refused is not None:
        return replace(refused, sold=highest(plans))
    since = _past_due_since(known, source) if fact.status == "past_due" else None
    accesses = tuple(_access(catalog, source, fact, plan, item, since) for plan, item in plans)
    return Reading(
        status=fact.status,
        as_of=fact.as_of,
        rule=accesses[0].rule if accesses else f"subscription.{fact.status}",
        event_id=fact.event_id,
        grants=True,
        accesses=accesses,
        unknown=unknown,
        flags=("unknown_status",) if snapshots[-1].status not in KNOWN_STATUSES else (),
    )


def _without_status(
    snapshots: Sequence[SubscriptionFact], checkouts: Sequence[CheckoutFact]
) -> Reading | None:
    if snapshots:
        return Reading(
            status=snapshots[-1].status,
            as_of=snapshots[-1].as_of,
            rule="subscription.unknown_status",
            event_id=snapshots[-1].event_id,
            grants=False,
            pending=True,
            flags=("unknown_status",),
        )
    if not checkouts:
        return None
    newest = max(checkouts, key=lambda fact: (fact.as_of, fact.event_id))
    return Reading(
        status="incomplete",
        as_of=newest.as_of,
        rule="subscription.not_seen_yet",
        event_id=newest.event_id,
        grants=False,
        pending=True,
    )


def _refusal(catalog: Catalog, source: Source, fact: SubscriptionFact) -> Reading | None:
    """Why the newest state gives no access at all, or None."""
    policy = catalog.policy
    if fact.status == "unpaid" and policy.unpaid is Keep.KEEP:
        refusing = False
    else:
        refusing = fact.status not in GRANTING_STATUSES
    if refusing:
        return Reading(
            status=fact.status,
            as_of=fact.ended_at or fact.as_of,
            rule=f"subscription.{fact.status}",
            event_id=fact.event_id,
            grants=False,
            pending=fact.status not in TERMINAL_STATUSES,
        )
    reversal = reversal_of(policy, source.facts, payment=_last_payment(source), is_subscription=True)
    if reversal is not None:
        return Reading(
            status=reversal.status,
            as_of=reversal.as_of,
            rule=reversal.rule,
            event_id=reversal.event_id,
            grants=False,
            pending=True,
        )
    if fact.pause_behavior is not None and policy.pause_collection(fact.pause_behavior) is Keep.REVOKE:
        return Reading(
            status="paused",
            as_of=fact.as_of,
            rule=f"pause_collection.{fact.pause_behavior}",
            event_id=fact.event_id,
            grants=False,
            pending=True,
        )
    return None


def _access(
    catalog: Catalog,
    source: Source,
    fact: SubscriptionFact,
    plan: Plan,
    item: SubscriptionItem,
    past_due_since: datetime | None,
) -> Access:
    """One item's access: when it ends, if nothing more is heard of it, and by which rule."""
    policy = catalog.policy
    end: datetime | None
    if past_due_since is not None:
        end, rule = past_due_since + policy.past_due_grace, "subscription.past_due.grace"
    elif item.trial_end is not None and item.trial_end > fact.as_of:
        end, rule = item.trial_end, "subscription.item_trial"
    elif fact.status == "trialing":
        end, rule = fact.trial_end or item.period_end, "subscription.trialing"
    else:
        end = item.period_end + policy.renewal_slack if item.period_end is not None else None
        rule = "subscription.active"
    if fact.cancel_at is not None and (end is None or fact.cancel_at < end):
        # A date the customer was told: kept exactly, without slack.
        end, rule = fact.cancel_at, "subscription.cancel_at"
    return Access(
        source=source.id,
        part=item.item_id,
        plan=plan,
        quantity=item.quantity,
        status=fact.status,
        rule=rule,
        event_id=fact.event_id,
        starts_at=min(fact.started_at or fact.as_of, fact.as_of),
        ends_at=end,
    )


def _past_due_since(history: Sequence[SubscriptionFact], source: Source) -> datetime | None:
    """When the present delinquency began, or None if its invoice was paid since: `history` ends in past_due."""
    since = history[-1].as_of
    payment = _last_payment(source)
    if payment is not None and payment.at > since:
        return None
    for fact in reversed(history):
        # A payment in between ended an earlier delinquency, also where its snapshot was never heard of.
        if fact.status != "past_due" or (payment is not None and fact.as_of < payment.at):
            break
        since = fact.as_of
    return since


def _last_payment(source: Source) -> LastPayment | None:
    paid = [
        fact for fact in source.facts if isinstance(fact, InvoiceFact) and fact.state is InvoiceState.PAID
    ]
    newest = max(paid, key=lambda fact: (fact.as_of, fact.event_id), default=None)
    return LastPayment(amount=newest.amount, at=newest.as_of) if newest is not None else None
