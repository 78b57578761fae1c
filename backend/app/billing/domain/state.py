"""All that a decision may look at: subjects with their facts, how they hang together, and whose they are."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from backend.app.billing.domain.access import Reading, Source, bound_user, owner
from backend.app.billing.domain.catalog import Catalog
from backend.app.billing.domain.facts import (
    SOURCE_KINDS,
    CheckoutFact,
    CustomerId,
    Fact,
    GrantFact,
    InvoiceFact,
    PaymentIntentFact,
    SubjectId,
    SubscriptionFact,
    Tie,
    series_of,
)
from backend.app.billing.domain.merge import Entitlement, read_source

NO_FACTS: tuple[Fact, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Owned:
    """What is kept of a source beside its facts: its customer and the user it belongs to."""

    customer_id: str | None
    user_id: str | None


_NOBODYS = Owned(customer_id=None, user_id=None)


@dataclass(slots=True)
class _Memo:
    """Answers of one state, which never changes."""

    sources: dict[SubjectId, Source] = field(default_factory=dict)
    readings: dict[tuple[int, SubjectId], Reading | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Complete for the customers and users that its events concern.

    `parents` says which subjects another bears on: a payment on its invoice, an invoice on its subscription.
    `facts` of a subject are its own and those of all that bears on it, so nobody has to look for what that is.
    """

    facts: Mapping[SubjectId, tuple[Fact, ...]] = field(default_factory=dict)
    parents: Mapping[SubjectId, frozenset[SubjectId]] = field(default_factory=dict)
    sources: Mapping[SubjectId, Owned] = field(default_factory=dict)
    ties: Mapping[CustomerId, frozenset[Tie]] = field(default_factory=dict)
    entitlements: Mapping[str, Entitlement] = field(default_factory=dict)
    # What was worked out already; a state that differs in anything is another object, with a memo of its own.
    _memo: _Memo = field(default_factory=_Memo, init=False, repr=False, compare=False)

    def source(self, source_id: SubjectId) -> Source:
        """A source with its own facts and those of all that bears on it."""
        known = self._memo.sources.get(source_id)
        if known is None:
            known = self._memo.sources[source_id] = self._gathered(source_id)
        return known

    def _gathered(self, source_id: SubjectId) -> Source:
        owned = self.sources[source_id]
        # Its own the last, so that they stand: what a person said of it beside what they said of the whole customer.
        related = (*around(source_id, owned.customer_id), source_id)
        facts = {
            (fact.as_of, fact.event_id, fact.kind): fact
            for subject in related
            for fact in self.facts.get(subject, NO_FACTS)
        }
        return Source(
            id=source_id,
            customer_id=owned.customer_id,
            user_id=owned.user_id,
            facts=tuple(facts[name] for name in sorted(facts)),
        )

    def reading(self, catalog: Catalog, source_id: SubjectId) -> Reading | None:
        """What a source comes to."""
        # By identity: two catalogs may be compared on one state, and both outlive it.
        name = (id(catalog), source_id)
        readings = self._memo.readings
        if name not in readings:
            readings[name] = read_source(
                catalog, self.source(source_id), is_part_of_another=bool(self.parents.get(source_id))
            )
        return readings[name]

    def readings_of(self, catalog: Catalog, user_id: str) -> list[Reading]:
        """What each source of a user comes to."""
        found = (
            self.reading(catalog, source_id)
            for source_id, owned in sorted(self.sources.items())
            if owned.user_id == user_id
        )
        return [reading for reading in found if reading is not None]

    def newest_as_of(self, user_id: str) -> datetime | None:
        """The time of the newest fact about any of a user's sources."""
        return max(
            (
                fact.as_of
                for source_id, owned in self.sources.items()
                if owned.user_id == user_id
                for fact in self.source(source_id).facts
            ),
            default=None,
        )

    def above(self, subjects: Iterable[SubjectId]) -> set[SubjectId]:
        """The subjects and all that they bear on."""
        return _reached(self.parents, subjects)

    def within(self, facts_max: int, subjects: Iterable[SubjectId]) -> State:
        """As it would be loaded again: of each series of facts of these subjects only the newest."""
        changed: dict[SubjectId, tuple[Fact, ...]] = {}
        for subject in subjects:
            known = self.facts[subject]
            if len(known) <= facts_max:
                continue
            kept: dict[str, list[Fact]] = {}
            for fact in sorted(known, key=lambda fact: (fact.as_of, fact.event_id)):
                kept.setdefault(series_of(fact), []).append(fact)
            changed[subject] = tuple(fact for group in kept.values() for fact in group[-facts_max:])
        return replace(self, facts={**self.facts, **changed}) if changed else self

    def user_of_customer(self, customer: CustomerId) -> str | None:
        """The user a customer is tied to."""
        return bound_user(self.ties.get(customer, frozenset()))

    def owner_of(self, source_id: SubjectId) -> str | None:
        """The user that a source belongs to, by all that is known now."""
        return owner(self.source(source_id), self.ties)

    def with_facts(self, facts: Mapping[SubjectId, Fact]) -> State:
        """With one more fact each of the subjects' own; a fact of an event that is known already changes nothing."""
        if not facts:
            return self
        sources = dict(self.sources)
        for subject, fact in facts.items():
            if is_source(subject, fact):
                owned = sources.get(subject, _NOBODYS)
                if owned.customer_id is None:
                    owned = Owned(customer_id=getattr(fact, "customer_id", None), user_id=owned.user_id)
                sources[subject] = owned
        return replace(self, facts=self._facts_and(facts.items()), sources=sources)

    def with_inherited(self, facts: Collection[tuple[SubjectId, Fact]]) -> State:
        """With more facts of what bears on the subjects; access rests on none of them by these."""
        return replace(self, facts=self._facts_and(facts)) if facts else self

    def _facts_and(self, facts: Iterable[tuple[SubjectId, Fact]]) -> Mapping[SubjectId, tuple[Fact, ...]]:
        known = dict(self.facts)
        for subject, fact in facts:
            if not _is_known(fact, known.get(subject, NO_FACTS)):
                known[subject] = (*known.get(subject, NO_FACTS), fact)
        return known

    def inherited(
        self, facts: Collection[tuple[SubjectId, Fact]], links: Collection[tuple[SubjectId, SubjectId]]
    ) -> list[tuple[SubjectId, Fact]]:
        """What is to be known above, now that there are these facts, and these links that were not there before."""
        going_up = [(above, fact) for subject, fact in facts for above in self.above({subject})]
        going_up += [
            (above, fact)
            for child, parent in links
            for above in self.above({parent})
            for fact in self.facts.get(child, NO_FACTS)
        ]
        new = {
            # A subject is above itself as well, but knows its own.
            (above, fact.event_id, fact.kind): (above, fact)
            for above, fact in going_up
            if not _is_known(fact, self.facts.get(above, NO_FACTS))
        }
        return [new[name] for name in sorted(new)]

    def with_parents(self, links: Collection[tuple[SubjectId, SubjectId]]) -> State:
        """With more links from children to parents."""
        if not links:
            return self
        parents = dict(self.parents)
        for child, parent in links:
            parents[child] = parents.get(child, frozenset()) | {parent}
        return replace(self, parents=parents)


def children_of(
    parents: Mapping[SubjectId, Collection[SubjectId]],
) -> Mapping[SubjectId, Collection[SubjectId]]:
    """Links the other way round: from parents to what bears on them."""
    children: dict[SubjectId, list[SubjectId]] = {}
    for child, above in parents.items():
        for parent in above:
            children.setdefault(parent, []).append(child)
    return children


def below(
    children: Mapping[SubjectId, Collection[SubjectId]], subjects: Iterable[SubjectId]
) -> list[SubjectId]:
    """The subjects and all that bears on them, in order."""
    return sorted(_reached(children, subjects))


def _reached(
    steps: Mapping[SubjectId, Collection[SubjectId]], subjects: Iterable[SubjectId]
) -> set[SubjectId]:
    """The subjects and all that is some steps away from them; also where these go round in a circle."""
    seen: set[SubjectId] = set()
    waiting = list(subjects)
    while waiting:
        subject = waiting.pop()
        if subject not in seen:
            seen.add(subject)
            waiting += steps.get(subject, ())
    return seen


def is_source(subject: SubjectId, fact: Fact) -> bool:
    """Whether access may rest on a subject, going by a fact about it."""
    if subject.kind not in SOURCE_KINDS:
        return False
    if isinstance(fact, InvoiceFact):
        return bool(fact.lines)
    return isinstance(fact, SubscriptionFact | CheckoutFact | PaymentIntentFact | GrantFact)


def _is_known(fact: Fact, among: Iterable[Fact]) -> bool:
    # An event says one thing of each kind.
    return any(other.event_id == fact.event_id and other.kind == fact.kind for other in among)


def around(source_id: SubjectId, customer_id: str | None) -> list[SubjectId]:
    """The customer and the connected account behind a source, whose facts bear on it too."""
    account, livemode, _ = source_id
    around = [SubjectId(account, livemode, f"acct:{account}")] if account else []
    if customer_id is not None:
        around.append(SubjectId(account, livemode, f"cus:{customer_id}"))
    return around
