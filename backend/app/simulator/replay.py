"""Plays a history through the service's own translation and decision in memory, and compares it with the truth."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

from backend.app.billing.domain.catalog import Catalog
from backend.app.billing.domain.decide import decide
from backend.app.billing.domain.merge import Entitlement, entitlement_of
from backend.app.billing.domain.state import State
from backend.app.billing.providers.stripe import translate
from backend.app.billing.providers.stripe_event import read_event
from backend.app.core.clock import from_unix
from backend.app.simulator.emit import Money
from backend.app.simulator.objects import Json
from backend.app.simulator.truth import Entitled
from backend.app.simulator.world import History

# Instants at random beside the end of each period; more find the same differences more slowly.
RANDOM_INSTANTS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Where the service and the truth part: for whom, when (unix seconds; None for the ledger), and both answers."""

    user_id: str
    at: int | None
    what: str
    expected: str
    found: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the service made of deliveries: its state, and the ledger by effect key."""

    state: State
    ledger: dict[str, Money]


def play(catalog: Catalog, deliveries: Iterable[Json], *, now: int) -> Outcome:
    """The outcome of deliveries, each event claimed once, decided on at one instant."""
    state, ledger = State(), dict[str, Money]()
    claimed: set[str] = set()
    instant = from_unix(now)
    for document in deliveries:
        event = read_event(document, signed_at=instant)
        if event.envelope.id in claimed:
            continue
        claimed.add(event.envelope.id)
        translation = translate(event)
        if translation is None:
            continue
        state, decision = decide(catalog, state, event.envelope, translation, now=instant)
        for payment in decision.payments:
            ledger.setdefault(payment.fact.effect_key, Money(payment.fact.amount, payment.fact.settled))
    return Outcome(state, ledger)


def entitlement_at(catalog: Catalog, state: State, user_id: str, at: int) -> Entitlement:
    """What was in force at an instant, as the read side computes it from the facts known by now."""
    instant = from_unix(at)
    facts = {
        subject: tuple(fact for fact in known if fact.as_of <= instant)
        for subject, known in state.facts.items()
    }
    readings = replace(state, facts=facts).readings_of(catalog, user_id)
    return entitlement_of(catalog, user_id, readings, at=instant)


def instants(history: History, rng: random.Random) -> list[int]:
    """The instants worth a comparison: each change, each end, the seconds around them, and a few at random."""
    edges = {record.at for record in history.truth.causes(history.end)}
    for edge in sorted(edges):
        until = history.truth.entitled(edge).valid_until
        if until is not None and until <= history.end:
            edges.add(until)
    chosen = {edge + shift for edge in edges for shift in (-1, 0)}
    chosen |= {rng.randint(history.start, history.end) for _ in range(RANDOM_INSTANTS)}
    return [*sorted(at for at in chosen if history.start <= at <= history.end), history.end]


def differences(catalog: Catalog, history: History, outcome: Outcome, at: Sequence[int]) -> list[Difference]:
    """All differences between the outcome and the truth, at the end, at these instants and in the ledger."""
    found = ledger_differences(history, outcome.ledger)
    for instant in at:
        computed = entitlement_at(catalog, outcome.state, history.user_id, instant)
        found += compare(history, instant, said(computed), what="entitlement")
    stored = outcome.state.entitlements.get(history.user_id)
    if stored is not None:
        found += compare(history, history.end, said(stored), what="stored entitlement")
    elif history.truth.entitled(history.end).status is not None:
        found.append(
            Difference(
                user_id=history.user_id,
                at=history.end,
                what="stored entitlement",
                expected=_text(history.truth.entitled(history.end)),
                found="none",
            )
        )
    return found


def said(entitlement: Entitlement) -> Entitled:
    """An answer of the decision in the truth's own words."""
    until = entitlement.valid_until
    return Entitled(
        plan=entitlement.plan_code,
        status=entitlement.status,
        features=entitlement.features,
        valid_until=None if until is None else round(until.timestamp()),
    )


def compare(history: History, at: int, found: Entitled, *, what: str) -> list[Difference]:
    """The difference at one instant, if any; the status counts only where a source gives something."""
    expected = history.truth.entitled(at)
    if expected.status is None:
        found = replace(found, status=None)
    if found == expected:
        return []
    return [
        Difference(user_id=history.user_id, at=at, what=what, expected=_text(expected), found=_text(found))
    ]


def ledger_differences(history: History, ledger: dict[str, Money]) -> list[Difference]:
    """Lines that are missing, unexpected or of another amount."""
    return [
        Difference(
            user_id=history.user_id,
            at=None,
            what=f"ledger {key}",
            expected=str(history.ledger.get(key)),
            found=str(ledger.get(key)),
        )
        for key in sorted({*history.ledger, *ledger})
        if history.ledger.get(key) != ledger.get(key)
    ]


def _text(entitled: Entitled) -> str:
    until = entitled.valid_until
    ends = "" if until is None else f" until {from_unix(0) + timedelta(seconds=until):%Y-%m-%d %H:%M:%S}"
    features = ", ".join(f"{key}={value}" for key, value in sorted(entitled.features.items()))
    return f"{entitled.plan} ({entitled.status}){ends}: {features}"
