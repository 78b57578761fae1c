"""Which of several events concern each other: each group has a state of its own, as small as if it came alone."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

from backend.app.billing.domain.facts import CustomerId, SubjectId
from backend.app.billing.domain.state import State

K = TypeVar("K")
V = TypeVar("V")


def components(state: State, named: Sequence[Iterable[Hashable]]) -> tuple[list[int], dict[int, State]]:
    """For each event, by the names in it, the number of its group; and the part of the state that is each group's.

    A name is a SubjectId, or a user's id; a customer is named by the subject of the same customer.
    """
    if len(named) == 1:
        # All of the state was looked for because of it.
        return [0], {0: state}
    groups = _Groups()
    subjects = {name for names in named for name in names if isinstance(name, SubjectId)}
    # A connected account bears on all its sources; that joins them only while something is said of it.
    accounts = {subject for subject in subjects if subject.kind == "acct"}
    for names in named:
        groups.join(names)
    for subject in subjects if accounts else ():
        groups.join((subject, *({_account_of(subject)} & accounts)))
    for child, above in state.parents.items():
        groups.join((child, *above))
    for source, owned in state.sources.items():
        groups.join((source, *_of_source(source, owned.customer_id, owned.user_id, accounts)))
    for customer, ties in state.ties.items():
        groups.join((customer_name(customer), *(tie.user_id for tie in ties)))
    numbers = [groups.number_of(names) for names in named]
    facts = _split(groups, state.facts)
    # What was said of an account earlier bears on all its sources, whatever group they are in.
    of_accounts = {
        name: known for name, known in state.facts.items() if name.kind == "acct" and name not in accounts
    }
    parents = _split(groups, state.parents)
    sources = _split(groups, state.sources)
    entitlements = _split(groups, state.entitlements)
    tied = _split(groups, {customer_name(customer): customer for customer in state.ties})
    states = {
        number: State(
            facts={**facts.get(number, {}), **of_accounts},
            parents=parents.get(number, {}),
            sources=sources.get(number, {}),
            ties={customer: state.ties[customer] for customer in tied.get(number, {}).values()},
            entitlements=entitlements.get(number, {}),
        )
        for number in set(numbers)
    }
    return numbers, states


def customer_name(customer: CustomerId) -> SubjectId:
    """A customer as a subject."""
    return SubjectId(customer.account, customer.livemode, f"cus:{customer.id}")


def _of_source(
    source: SubjectId, customer_id: str | None, user_id: str | None, accounts: set[SubjectId]
) -> Iterable[Hashable]:
    if customer_id is not None:
        yield SubjectId(source.account, source.livemode, f"cus:{customer_id}")
    if user_id is not None:
        yield user_id
    if _account_of(source) in accounts:
        yield _account_of(source)


def _account_of(subject: SubjectId) -> SubjectId:
    return SubjectId(subject.account, subject.livemode, f"acct:{subject.account}")


class _Groups:
    """Names that hang together, as a union-find: each name knows one nearer to its group's first."""

    def __init__(self) -> None:
        self._nearer: dict[Hashable, Hashable] = {}
        self._numbers: dict[Hashable, int] = {}

    def join(self, names: Iterable[Hashable]) -> None:
        first: Hashable | None = None
        for name in names:
            root = self.root(name)
            if first is None:
                first = root
            elif root != first:
                self._nearer[root] = first

    def root(self, name: Hashable) -> Hashable:
        nearer = self._nearer.setdefault(name, name)
        while nearer != name:
            # Halving the way each time keeps it short.
            self._nearer[name] = self._nearer[nearer]
            name, nearer = nearer, self._nearer[nearer]
        return name

    def number_of(self, names: Iterable[Hashable]) -> int:
        """The same for names of one group; an event that names nothing is a group of its own."""
        root = next((self.root(name) for name in names), object())
        return self._numbers.setdefault(root, len(self._numbers))

    def known_number(self, name: Hashable) -> int | None:
        return self._numbers.get(self.root(name))


def _split(groups: _Groups, rows: Mapping[K, V]) -> dict[int, dict[K, V]]:
    parts: dict[int, dict[K, V]] = {}
    for name, row in rows.items():
        number = groups.known_number(name)
        if number is not None:
            parts.setdefault(number, {})[name] = row
    return parts
