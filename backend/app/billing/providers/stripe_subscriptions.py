"""Subscriptions and what is planned for them."""

from __future__ import annotations

from datetime import datetime

from backend.app.billing.domain.facts import (
    About,
    Alert,
    Event,
    PaymentFact,
    SubscriptionFact,
    SubscriptionItem,
    Translation,
    Via,
)
from backend.app.billing.domain.subscriptions import GRANTING_STATUSES
from backend.app.billing.domain.timeline import TERMINAL_STATUSES
from backend.app.billing.providers.fields import Fields
from backend.app.billing.providers.registry import customer_of, ledger_type, strongest_tie, translates
from backend.app.billing.providers.stripe_clocks import clock_link
from backend.app.billing.providers.stripe_prices import price_of


@translates(
    "customer.subscription.created",
    "customer.subscription.updated",
    "customer.subscription.deleted",
    "customer.subscription.paused",
    "customer.subscription.resumed",
    "customer.subscription.pending_update_applied",
    "customer.subscription.pending_update_expired",
    "customer.subscription.trial_will_end",
)
def subscription(event: Event, snapshot: Fields, previous: Fields) -> Translation:
    """A subscription as it stood when the event occurred; the contents of a `pending_update` are not read.

    Source: https://docs.stripe.com/api/subscriptions/object
    """
    subscription_id = snapshot.required_id("id")
    customer_id = customer_of(snapshot)
    metadata = snapshot.object("metadata")
    status = snapshot.text("status") or "missing"
    if event.type == "customer.subscription.deleted" and status not in TERMINAL_STATUSES:
        status = "canceled"
    items = _items(snapshot)
    period_ends = [item.period_end for item in items if item.period_end is not None]
    last_period_end = max(period_ends, default=snapshot.instant("current_period_end"))
    cancel_at = snapshot.instant("cancel_at")
    if cancel_at is None and snapshot.flag("cancel_at_period_end"):
        cancel_at = last_period_end
    fact = SubscriptionFact(
        event_id=event.id,
        event_type=event.type,
        as_of=event.occurred_at,
        subscription_id=subscription_id,
        customer_id=customer_id,
        status=status,
        items=items,
        period_end=last_period_end,
        started_at=snapshot.instant("start_date") or snapshot.instant("created"),
        trial_end=snapshot.instant("trial_end"),
        cancel_at=cancel_at,
        ended_at=snapshot.instant("ended_at"),
        pause_behavior=snapshot.object("pause_collection").text("behavior"),
        metadata_user_id=metadata.user_id("user_id"),
        metadata_plan_code=metadata.text("plan_code"),
        state=_watched(snapshot, snapshot),
        previous=_watched(previous, snapshot),
    )
    return Translation(
        subject=f"sub:{subscription_id}",
        facts=(About(key=f"sub:{subscription_id}", fact=fact),),
        links=clock_link(event, snapshot, f"sub:{subscription_id}"),
        ties=strongest_tie(event, customer_id, (Via.METADATA, fact.metadata_user_id)),
        payments=(
            PaymentFact(
                effect_key=f"evt:{event.id}",
                event_type=ledger_type(event.type),
                customer_id=customer_id,
                subscription_id=subscription_id,
                metadata=snapshot.metadata(),
            ),
        ),
        expects_access=status in GRANTING_STATUSES,
        customer_id=customer_id,
        alerts=(
            Alert(
                text=f"The trial of subscription {subscription_id} ends soon (event {event.id}).",
                is_routine=True,
            ),
        )
        if event.type == "customer.subscription.trial_will_end"
        else (),
    )


def _items(snapshot: Fields) -> tuple[SubscriptionItem, ...]:
    # Until basil (2025-03-31) the period stood on the subscription, since then on each item.
    period_end = snapshot.instant("current_period_end")
    return tuple(
        SubscriptionItem(
            item_id=item.id("id") or f"item-{index}",
            price=price_of(item),
            # Zero seats are none; a metered item has no quantity and counts as one.
            quantity=1 if item.amount("quantity") is None else item.amount("quantity") or 0,
            period_end=item.instant("current_period_end") or period_end,
            trial_end=_trial_end(item),
        )
        for index, item in enumerate(snapshot.list_data("items"))
    )


def _trial_end(item: Fields) -> datetime | None:
    """Since endive an item may be in a trial of its own."""
    return item.object("current_trial").instant("end_date") or item.object("current_trial").instant("end")


def _watched(part: Fields, whole: Fields) -> dict[str, str]:
    """The fields that order two snapshots, each as one comparable text; only those that `part` has."""
    plain = ("status", "cancel_at_period_end", "cancel_at", "trial_end", "current_period_end", "quantity")
    found = {key: str(part.data[key]) for key in plain if key in part.data}
    if "items" in part.data:
        found["items"] = ";".join(
            f"{item.id('id')}={price_of(item).name}*{item.amount('quantity')}@{item.instant('current_period_end')}"
            for item in part.list_data("items")
        )
    if "pause_collection" in part.data:
        found["pause_collection"] = str(part.object("pause_collection").text("behavior"))
    if "metadata" in part.data and part is not whole:
        # Only the keys that changed are told; they are compared one by one.
        found |= {f"metadata.{key}": str(value) for key, value in part.object("metadata").data.items()}
    elif part is whole:
        found |= {f"metadata.{key}": value for key, value in part.metadata().items()}
    return found
