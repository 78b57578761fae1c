"""Test clocks: Stripe's way to live through a year of billing in a minute, in test mode only."""

from __future__ import annotations

from backend.app.billing.domain.facts import About, ClockFact, Event, Link, Translation
from backend.app.billing.providers.fields import Fields
from backend.app.billing.providers.registry import translates


@translates(
    "test_helpers.test_clock.created",
    "test_helpers.test_clock.advancing",
    "test_helpers.test_clock.ready",
    "test_helpers.test_clock.deleted",
    "test_helpers.test_clock.internal_failure",
)
def clock_moved(event: Event, document: Fields, _previous: Fields) -> Translation | None:
    """A test clock: its customers and their subscriptions are read as of its time, where that is ahead of ours.

    It is the business of several users, so the event itself is attributed to none of them.
    Source: https://docs.stripe.com/api/test_clocks/object
    """
    frozen_at = document.instant("frozen_time")
    if event.livemode or frozen_at is None:
        return None
    fact = ClockFact(event_id=event.id, event_type=event.type, as_of=frozen_at)
    return Translation(facts=(About(key=f"clock:{document.required_id('id')}", fact=fact),))


def clock_link(event: Event, document: Fields, key: str) -> tuple[Link, ...]:
    """The link from the test clock that a customer or subscription hangs on, if it does; none in live mode."""
    clock_id = None if event.livemode else document.id("test_clock")
    return (Link(child=f"clock:{clock_id}", parent=key),) if clock_id else ()
