"""Customers: who somebody is, and that they are gone."""

from __future__ import annotations

from backend.app.billing.domain.facts import About, EndedFact, Event, Translation, Via
from backend.app.billing.providers.fields import Fields
from backend.app.billing.providers.registry import strongest_tie, translates
from backend.app.billing.providers.stripe_clocks import clock_link


@translates("customer.created", "customer.updated")
def customer(event: Event, document: Fields, _previous: Fields) -> Translation:
    """A customer; one whose metadata names our user is tied to that user.

    Source: https://docs.stripe.com/api/customers/object
    """
    customer_id = document.required_id("id")
    return Translation(
        subject=f"cus:{customer_id}",
        links=clock_link(event, document, f"cus:{customer_id}"),
        ties=strongest_tie(
            event, customer_id, (Via.METADATA, document.object("metadata").user_id("user_id"))
        ),
        customer_id=customer_id,
    )


@translates("customer.deleted")
def customer_deleted(event: Event, document: Fields, _previous: Fields) -> Translation:
    """A deleted customer: what rested on it has ended; the ledger stays.

    Source: https://docs.stripe.com/api/customers/delete
    """
    customer_id = document.required_id("id")
    fact = EndedFact(event_id=event.id, event_type=event.type, as_of=event.occurred_at)
    return Translation(
        subject=f"cus:{customer_id}",
        facts=(About(key=f"cus:{customer_id}", fact=fact),),
        customer_id=customer_id,
    )
