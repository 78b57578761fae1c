"""The order of a subscription's snapshots: total, the same whatever order they came in, and right where Stripe tells.

An event's time has a resolution of one second, and two events of one subscription within a second are
common. Terminal states come last, a creation first and a deletion last; in between, the snapshot whose
`previous_attributes` match another's state comes right after that one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cache
from itertools import groupby, pairwise

from backend.app.billing.domain.facts import SubscriptionFact

# Stripe's statuses that never change again; nothing that arrives later may overwrite them.
TERMINAL_STATUSES = frozenset({"canceled", "incomplete_expired"})

# The search doubles with each snapshot: ten of one second take some ten milliseconds, and are as rare as a day's.
CHAINED_SNAPSHOTS_MAX = 10

_CREATED = "customer.subscription.created"
_DELETED = "customer.subscription.deleted"


def in_order(facts: Iterable[SubscriptionFact]) -> list[SubscriptionFact]:
    """The snapshots from the oldest to the one that counts."""
    facts = list(facts)
    if len(facts) == 1:
        return facts
    ordered: list[SubscriptionFact] = []
    by_time = sorted(facts, key=_time)
    for _, group in groupby(by_time, key=_time):
        same_second = list(group)
        if len(same_second) == 1:
            ordered += same_second
        else:
            ordered += _chained(sorted(same_second, key=_hint), ordered[-1] if ordered else None)
    return ordered


def is_settled(facts: Iterable[SubscriptionFact]) -> bool:
    """Whether the events themselves tell which snapshot counts; where not, the order is only the same each time."""
    ordered = in_order(facts)
    if len(ordered) <= 1 or ordered[-1].status in TERMINAL_STATUSES or ordered[-1].event_type == _DELETED:
        return True
    newest = [fact for fact in ordered if fact.as_of == ordered[-1].as_of]
    updates = [fact for fact in newest if fact.event_type != _CREATED]
    if len({tuple(sorted(fact.state.items())) for fact in updates}) <= 1:
        return True
    before = [fact for fact in ordered if fact not in updates]
    if not before and _follows(updates[0], updates[-1]):
        # A ring, as of a cancellation and its undoing: without an older one nobody tells where it began.
        return False
    # Each must follow the one before it; the first has nothing to follow where nothing older is known.
    return all(_follows(later, earlier) for earlier, later in pairwise([*before[-1:], *updates]))


def _time(fact: SubscriptionFact) -> tuple[bool, datetime]:
    return fact.status in TERMINAL_STATUSES, fact.as_of


def _hint(fact: SubscriptionFact) -> tuple[int, datetime, str]:
    """What orders snapshots of one second where they don't tell it themselves: life, period, and at last the id."""
    life = {_CREATED: 0, _DELETED: 2}.get(fact.event_type, 1)
    period_ends = [item.period_end for item in fact.items if item.period_end is not None]
    return life, max(period_ends, default=fact.as_of), fact.event_id


def _chained(facts: Sequence[SubscriptionFact], before: SubscriptionFact | None) -> list[SubscriptionFact]:
    created = [fact for fact in facts if fact.event_type == _CREATED]
    deleted = [fact for fact in facts if fact.event_type == _DELETED]
    updates = [fact for fact in facts if fact.event_type not in (_CREATED, _DELETED)]
    start = created[-1] if created else before
    told = [fact for fact in updates if not _is_echo(fact, updates)]
    ordered = _best_chain(told, start) if len(told) <= CHAINED_SNAPSHOTS_MAX else told
    for echo in updates:
        if echo not in told:
            place = next(place for place, fact in enumerate(ordered) if fact.state == echo.state)
            ordered.insert(place + 1, echo)
    return [*created, *ordered, *deleted]


def _is_echo(fact: SubscriptionFact, updates: Sequence[SubscriptionFact]) -> bool:
    """Whether another snapshot of the second tells the same and more, as an update does beside a `paused`."""
    return not fact.previous and any(other.previous and other.state == fact.state for other in updates)


def _best_chain(facts: Sequence[SubscriptionFact], start: SubscriptionFact | None) -> list[SubscriptionFact]:
    """The order in which most snapshots follow the one before; of equals that which comes first as given."""
    matches = [[_match(later, earlier) for earlier in facts] for later in facts]
    first = [_match(fact, start) if start is not None else (0, 0) for fact in facts]

    def after(place: int, last: int | None) -> tuple[int, int]:
        return first[place] if last is None else matches[place][last]

    @cache
    def best(left: frozenset[int], last: int | None) -> tuple[int, int]:
        """What the best order of the ones that are left comes to, after the last one placed."""
        totals = (_sum(after(place, last), best(left - {place}, place)) for place in left)
        return max(totals, default=(0, 0))

    ordered: list[SubscriptionFact] = []
    left, last = frozenset(range(len(facts))), None
    while left:
        wanted = best(left, last)
        last = min(place for place in left if _sum(after(place, last), best(left - {place}, place)) == wanted)
        left -= {last}
        ordered.append(facts[last])
    return ordered


def _sum(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return one[0] + other[0], one[1] + other[1]


def _match(fact: SubscriptionFact, earlier: SubscriptionFact) -> tuple[int, int]:
    """1 where what was before a snapshot is another's state, else 0: as a whole, and in what its event names."""
    # What an event does not name was before as it is now; so one that names nothing follows its equal.
    before = {**fact.state, **fact.previous}
    wholly = _holds(before, earlier.state) and _holds(earlier.state, before)
    return int(wholly), int(_holds(fact.previous, earlier.state) if fact.previous else wholly)


def _follows(fact: SubscriptionFact, earlier: SubscriptionFact) -> bool:
    """Whether what a snapshot's event says was before is another's state."""
    _, in_what_it_names = _match(fact, earlier)
    return bool(in_what_it_names)


def _holds(previous: Mapping[str, str], state: Mapping[str, str]) -> bool:
    # A metadata key that was new had the value null before; the state before does not name it at all.
    return all(state.get(key, str(None)) == value for key, value in previous.items())
