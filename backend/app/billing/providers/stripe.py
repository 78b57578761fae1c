"""Stripe's events of any API version, translated into facts.

Shapes are told apart by the fields that are there, never by the version's number: an account keeps
the version it was created with, and a webhook endpoint may pin another one. The functions stand in
the modules beside this one, a family of objects each.
"""

from __future__ import annotations

from collections.abc import Mapping

from backend.app.billing.domain.facts import CustomerId, Translation
from backend.app.billing.providers import (
    stripe_accounts,
    stripe_checkout,
    stripe_clocks,
    stripe_customers,
    stripe_invoices,
    stripe_payments,
    stripe_schedules,
    stripe_subscriptions,
)
from backend.app.billing.providers.fields import Fields, TranslationError
from backend.app.billing.providers.registry import Translator, customer_of, translators
from backend.app.billing.providers.stripe_event import StripeEvent

# Imported because each registers its functions; named so that nobody takes the imports for leftovers.
FAMILIES = (
    stripe_checkout,
    stripe_subscriptions,
    stripe_schedules,
    stripe_invoices,
    stripe_payments,
    stripe_customers,
    stripe_accounts,
    stripe_clocks,
)

# Every handled event type and the function that translates it.
TRANSLATORS: Mapping[str, Translator] = translators()


def translate(event: StripeEvent) -> Translation | None:
    """What an event asserts, or None where nothing here depends on it.

    Raises:
        TranslationError: a field is of a type that no published API version gives it.
    """
    translator = TRANSLATORS.get(event.envelope.type)
    if translator is None:
        return None
    return translator(
        event.envelope,
        Fields(event.object, "data.object"),
        Fields(event.previous_attributes, "data.previous_attributes"),
    )


def customer_named(event: StripeEvent) -> CustomerId | None:
    """The customer that an event's object is or belongs to, whatever its type; None where it names none."""
    document = Fields(event.object, "data.object")
    try:
        is_customer = document.text("object") == "customer"
        customer_id = document.id("id") if is_customer else customer_of(document)
    except TranslationError:
        return None
    envelope = event.envelope
    return CustomerId(envelope.account, envelope.livemode, customer_id) if customer_id else None
