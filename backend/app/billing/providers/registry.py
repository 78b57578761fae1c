"""Which function translates which event type: one line per type, filled by the modules beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from backend.app.billing.domain.facts import Event, Tie, Translation, Via
from backend.app.billing.providers.fields import Fields

# The event's envelope, its object, and what the object's changed fields were just before.
Translator = Callable[[Event, Fields, Fields], Translation | None]

_TRANSLATORS: dict[str, Translator] = {}


def translates(*event_types: str) -> Callable[[Translator], Translator]:
    """Registers a function for some event types; no type may have two."""

    def register(function: Translator) -> Translator:
        for event_type in event_types:
            if event_type in _TRANSLATORS:
                raise ValueError(f"{event_type} has two translators")
            _TRANSLATORS[event_type] = function
        return function

    return register


def translators() -> Mapping[str, Translator]:
    """All registered functions by event type."""
    return _TRANSLATORS


def ledger_type(event_type: str) -> str:
    """Stripe's type as `payment_events.event_type` spells it: checkout.session.completed -> checkout_completed."""
    words = event_type.removeprefix("customer.").split(".")
    return "_".join(word for word in words if word != "session")


def customer_of(document: Fields) -> str | None:
    """The customer of an object; since 2026 it may be an account of the customer's instead."""
    return document.id("customer") or document.id("customer_account")


def strongest_tie(event: Event, customer_id: str | None, *named: tuple[Via, str | None]) -> tuple[Tie, ...]:
    """The strongest of the users an event names, tied to its customer; nothing where either is missing."""
    users = [(via, user_id) for via, user_id in named if user_id is not None]
    if customer_id is None or not users:
        return ()
    via, user_id = min(users)
    return (
        Tie(
            customer_id=customer_id,
            user_id=user_id,
            via=via,
            occurred_at=event.occurred_at,
            event_id=event.id,
        ),
    )
