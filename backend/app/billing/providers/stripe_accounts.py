"""Connected accounts, and plans and prices in Stripe's own catalog."""

from __future__ import annotations

from backend.app.billing.domain.facts import About, EndedFact, Event, Translation
from backend.app.billing.providers.fields import Fields
from backend.app.billing.providers.registry import translates


@translates("account.application.deauthorized")
def account_left(event: Event, _document: Fields, _previous: Fields) -> Translation | None:
    """A connected account took our access away: what was bought through it no longer gives any.

    Its users lose access when it is next read; the rows of `user_entitlements` follow with each user's
    next event or a rebuild, because one account may have any number of users.
    Source: https://docs.stripe.com/api/events/types
    """
    if not event.account:
        return None
    key = f"acct:{event.account}"
    fact = EndedFact(event_id=event.id, event_type=event.type, as_of=event.occurred_at)
    return Translation(
        subject=key,
        facts=(About(key=key, fact=fact),),
        alerts=(
            f"Account {event.account} has disconnected (event {event.id}); its purchases give no access.",
        ),
    )


@translates("price.updated", "product.updated", "plan.updated")
def price_changed(event: Event, document: Fields, previous: Fields) -> Translation | None:
    """A price that may now mean another plan: the owner hears of it, because nothing is re-mapped silently.

    Source: https://docs.stripe.com/api/prices/object
    """
    if not (previous.has("metadata") or previous.has("lookup_key")):
        return None
    alert = (
        f"{event.type}: {document.id('id')} changed its lookup key or metadata (event {event.id}). "
        "Look at it with `tollkeeper catalog diff` before the next renewal applies it."
    )
    return Translation(alerts=(alert,))
