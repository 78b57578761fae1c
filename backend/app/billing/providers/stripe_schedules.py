"""Subscription schedules: what is planned, not what is."""

from __future__ import annotations

from collections.abc import Iterator

from backend.app.billing.domain.facts import About, Event, ScheduleFact, SchedulePhase, Translation
from backend.app.billing.providers.fields import Fields
from backend.app.billing.providers.registry import customer_of, translates
from backend.app.billing.providers.stripe_prices import price_of


@translates(
    "subscription_schedule.created",
    "subscription_schedule.updated",
    "subscription_schedule.released",
    "subscription_schedule.canceled",
    "subscription_schedule.completed",
    "subscription_schedule.aborted",
    "subscription_schedule.expiring",
)
def schedule(event: Event, document: Fields, _previous: Fields) -> Translation | None:
    """The phases planned for a subscription; they apply only when the subscription itself changes.

    Source: https://docs.stripe.com/api/subscription_schedules/object
    """
    subscription_id = document.id("subscription") or document.id("released_subscription")
    if subscription_id is None:
        return None
    key = f"sub:{subscription_id}"
    fact = ScheduleFact(
        event_id=event.id,
        event_type=event.type,
        as_of=event.occurred_at,
        schedule_id=document.required_id("id"),
        status=document.text("status") or "unknown",
        phases=tuple(_phases(document)),
    )
    return Translation(subject=key, facts=(About(key=key, fact=fact),), customer_id=customer_of(document))


def _phases(document: Fields) -> Iterator[SchedulePhase]:
    for phase in document.list("phases"):
        starts_at = phase.instant("start_date")
        # The items of a phase were called plans until 2020.
        items = [*phase.list("items"), *phase.list("plans")]
        if starts_at is not None:
            yield SchedulePhase(starts_at=starts_at, prices=tuple(price_of(item) for item in items))
