"""The order of a subscription's snapshots: total, the same whatever order they came in, and right where Stripe tells.

An event's time has a resolution of one second, and two events of one subscription within a second are
common. Terminal states come last, a creation first and a deletion last; in between, the snapshot whose
`previous_attributes` match another's state comes right after that one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from itertools import groupby, permutations

from backend.app.billing.domain.facts import SubscriptionFact

# Stripe's statuses that never change again; nothing that arrives later may overwrite them.
TERMINAL_STATUSES = frozenset({"canceled", "incomplete_expired"})

# All orders of six snapshots of one second are 720, quickly tried; more in one second tell nothing new.
CHAINED_SNAPSHOTS_MAX = 6

_CREATED = "customer.subscription.created"
_DELETED = "customer.subscription.deleted"


def in_order(facts: Iterable[SubscriptionFact]) -> list[SubscriptionFact]:
    """The snapshots from the oldest to the one that counts."""
    ordered: list[SubscriptionFact] = []
    by_time = sorted(facts, key=lambda fact: (fact.status in TERMINAL_STATUSES, fact.as_of, _hint(fact)))
    for _, group in groupby(by_time, key=lambda fact: (fact.status in TERMINAL_STATUSES, fact.as_of)):
        same_second = list(group)
        if len(same_second) == 1:
            ordered += same_second
        else:
            ordered += _chained(same_second, ordered[-1] if ordered else None)
    return ordered


def is_settled(facts: Iterable[SubscriptionFact]) -> bool:
    """Whether the events themselves tell which snapshot counts; where not, the order is only the same each time."""
    ordered = in_order(facts)
    if not ordered or ordered[-1].status in TERMINAL_STATUSES or ordered[-1].event_type == _DELETED:
        return True
    newest = [fact for fact in ordered if fact.as_of == ordered[-1].as_of]
    updates = [fact for fact in newest if fact.event_type != _CREATED]
    if len({tuple(sorted(fact.state.items())) for fact in updates}) <= 1:
        return True
    before = [fact for fact in ordered if fact not in updates]
    start = before[-1] if before else None
    # Each must follow the one before it; the first has nothing to follow where nothing older is known.
    return _chain(updates, start)[1] == len(updates) - (0 if start is not None else 1)


def _hint(fact: SubscriptionFact) -> tuple[int, datetime, str]:
    """What orders snapshots of one second where they don't tell it themselves: life, period, and at last the id."""
    life = {_CREATED: 0, _DELETED: 2}.get(fact.event_type, 1)
    period_ends = [item.period_end for item in fact.items if item.period_end is not None]
    return life, max(period_ends, default=fact.as_of), fact.event_id


def _chained(facts: Sequence[SubscriptionFact], before: SubscriptionFact | None) -> list[SubscriptionFact]:
    created = [fact for fact in facts if fact.event_type == _CREATED]
    deleted = [fact for fact in facts if fact.event_type == _DELETED]
    updates = [fact for fact in facts if fact.event_type not in (_CREATED, _DELETED)]
    if len(updates) > CHAINED_SNAPSHOTS_MAX:
        return [*created, *updates, *deleted]
    start = created[-1] if created else before
    matches = {(id(a), id(b)): _match(a, b) for a in updates for b in (start, *updates) if b is not None}
    # The first of the best: `updates` are sorted by their hints, so a tie goes by these.
    best = max(permutations(updates), key=lambda order: _chain(order, start, matches))
    return [*created, *best, *deleted]


def _chain(
    order: Sequence[SubscriptionFact],
    start: SubscriptionFact | None,
    matches: Mapping[tuple[int, int], tuple[bool, bool]] | None = None,
) -> tuple[int, int]:
    """How many snapshots of an order follow the one before wholly, and how many at least in what they name.

    `matches` are known answers of `_match` by the ids of its two arguments.
    """
    wholly = partly = 0
    earlier = start
    for fact in order:
        if earlier is not None:
            match = matches[id(fact), id(earlier)] if matches is not None else _match(fact, earlier)
            wholly += match[0]
            partly += match[1]
        earlier = fact
    return wholly, partly


def _match(fact: SubscriptionFact, earlier: SubscriptionFact) -> tuple[bool, bool]:
    """Whether what was before a snapshot is another's state: as a whole, and in what its event names."""
    # What an event does not name was before as it is now; so one that names nothing follows its equal.
    before = {**fact.state, **fact.previous}
    wholly = _holds(before, earlier.state) and _holds(earlier.state, before)
    return wholly, _holds(fact.previous, earlier.state) if fact.previous else wholly


def _holds(previous: Mapping[str, str], state: Mapping[str, str]) -> bool:
    # A metadata key that was new had the value null before; the state before does not name it at all.
    return all(state.get(key, str(None)) == value for key, value in previous.items())
