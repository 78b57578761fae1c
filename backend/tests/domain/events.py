"""Events in memory: Stripe's objects translated and decided on, without a server or a database."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from backend.app.billing.domain.catalog import Catalog, parse_catalog
from backend.app.billing.domain.decide import NO_USER, Decision, decide
from backend.app.billing.domain.facts import SubjectId
from backend.app.billing.domain.merge import Entitlement, entitlement_of
from backend.app.billing.domain.state import State, below, children_of
from backend.app.billing.providers.stripe import translate
from backend.app.billing.providers.stripe_event import StripeEvent, read_event
from backend.app.main import SHIPPED_CATALOG
from backend.app.simulator import objects

Json = dict[str, Any]

# A fixed Monday; pure code knows no other time than what it is handed.
T0 = 1_764_000_000
HOUR = 3600
DAY = objects.DAY_SECONDS
MONTH = objects.MONTH_SECONDS

EMPTY = State()


def shipped_catalog() -> Catalog:
    return parse_catalog(SHIPPED_CATALOG.read_text(encoding="utf-8"))


def at(seconds: float) -> datetime:
    """The instant that many seconds after T0."""
    return datetime.fromtimestamp(T0 + seconds, UTC)


def event(event_id: str, event_type: str, content: Json, *, after: int = 0, **envelope: Any) -> StripeEvent:
    """An event that occurred `after` seconds after T0."""
    document = objects.event(event_id, event_type, content, created=T0 + after, **envelope)
    return read_event(document, signed_at=at(after))


def subscription(subscription_id: str = "sub_1", *, start: int = 0, months: int = 1, **rest: Any) -> Json:
    """A subscription of `cus_1` whose paid time begins `start` seconds after T0."""
    return objects.subscription(
        subscription_id,
        **{
            "customer": "cus_1",
            "period_start": T0 + start,
            "period_end": T0 + start + months * MONTH,
            "start_date": T0,
            **rest,
        },
    )


def decided(
    catalog: Catalog, state: State, happened: StripeEvent, *, now: datetime
) -> tuple[State, Decision]:
    """What follows from an event that is translated."""
    translation = translate(happened)
    assert translation is not None
    return decide(catalog, state, happened.envelope, translation, now=now)


@dataclass(frozen=True, kw_only=True)
class Folded:
    """What is kept after some events: `ledger` by effect key, `parked` what waits, by subject, and for what."""

    state: State
    ledger: Mapping[str, str | None]
    parked: Mapping[str, str]


def folded(catalog: Catalog, events: Iterable[StripeEvent], *, now: datetime) -> Folded:
    """All events decided in this order, each claimed once by its id; the shell does the same with rows."""
    state = EMPTY
    claimed: set[tuple[str, bool, str]] = set()
    ledger: dict[str, str | None] = {}
    parked: dict[str, tuple[Decision, str]] = {}
    for happened in events:
        envelope = happened.envelope
        name = (envelope.account, envelope.livemode, envelope.id)
        if name in claimed or translate(happened) is None:
            continue
        claimed.add(name)
        state, decision = decided(catalog, state, happened, now=now)
        for payment in decision.payments:
            ledger.setdefault(payment.fact.effect_key, payment.user_id)
        if decision.reason is not None:
            parked[envelope.id] = decision, decision.reason
        children = children_of(state.parents)
        for waiting in decision.waiting:
            helped = below(children, [waiting.source])
            for event_id, (waits, _) in list(parked.items()):
                if waits.subject not in helped:
                    continue
                reason = waiting.reason if waits.subject == waiting.source else waiting.parts_reason
                if reason is None:
                    del parked[event_id]
                else:
                    parked[event_id] = waits, reason
        tied = {attribution.customer for attribution in decision.attributions if attribution.customer}
        parked = {
            event_id: (waits, reason)
            for event_id, (waits, reason) in parked.items()
            if not (waits.customer in tied and reason == NO_USER)
        }
    return Folded(
        state=state,
        ledger=ledger,
        parked={str(waits.subject or event_id): reason for event_id, (waits, reason) in parked.items()},
    )


def owners(state: State) -> Mapping[SubjectId, str | None]:
    return {source_id: owned.user_id for source_id, owned in state.sources.items()}


def access_of(catalog: Catalog, state: State, user_id: str, *, now: datetime) -> Entitlement:
    """A user's access, computed anew from their sources; what has occurred is in force."""
    newest = max(now, state.newest_as_of(user_id) or now)
    return entitlement_of(catalog, user_id, state.readings_of(catalog, user_id), at=newest)
