"""Connected accounts, and plans and prices in Stripe's own catalog."""

from __future__ import annotations

from backend.app.billing.domain.facts import About, Alert, EndedFact, Event, Translation
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
            Alert(
                text=f"Account {event.account} has disconnected (event {event.id}); "
                "its purchases give no access."
            ),
        ),
    )


# What an account may do; Stripe turns one off when it needs something from the account's owner.
_ABILITIES = ("charges_enabled", "payouts_enabled", "details_submitted")


@translates("account.updated")
def account_updated(event: Event, document: Fields, previous: Fields) -> Translation | None:
    """An account that may no longer do something: the owner hears of it; what was bought through it stays.

    Source: https://docs.stripe.com/api/accounts/object
    """
    lost = [name for name in _ABILITIES if previous.flag(name) and document.flag(name) is False]
    reason = document.object("requirements").text("disabled_reason")
    if not lost and not (reason and previous.object("requirements").has("disabled_reason")):
        return None
    what = f"{', '.join(lost)} turned off" if lost else "restricted"
    because = f", because of {reason}" if reason else ""
    return Translation(
        subject=f"acct:{event.account}" if event.account else None,
        alerts=(Alert(text=f"Account {document.id('id')}: {what}{because} (event {event.id})."),),
    )


@translates("price.updated", "product.updated", "plan.updated")
def price_changed(event: Event, document: Fields, previous: Fields) -> Translation | None:
    """A price that may now mean another plan: the owner hears of it, because nothing is re-mapped silently.

    Source: https://docs.stripe.com/api/prices/object
    """
    if not (previous.has("metadata") or previous.has("lookup_key")):
        return None
    alert = Alert(
        text=f"{event.type}: {document.id('id')} changed its lookup key or metadata (event {event.id}). "
        "Look at it with `tollkeeper catalog diff` before the next renewal applies it."
    )
    return Translation(alerts=(alert,))
