"""Stripe's events of any API version, translated into facts.

Shapes are told apart by the fields that are there, never by the version's number: an account keeps
the version it was created with, and a webhook endpoint may pin another one. The functions stand in
the modules beside this one, a family of objects each.
"""

from __future__ import annotations

from collections.abc import Mapping

from backend.app.billing.domain.facts import Translation
from backend.app.billing.providers import (
    stripe_accounts,
    stripe_checkout,
    stripe_customers,
    stripe_invoices,
    stripe_payments,
    stripe_schedules,
    stripe_subscriptions,
)
from backend.app.billing.providers.fields import Fields
from backend.app.billing.providers.registry import Translator, translators
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
