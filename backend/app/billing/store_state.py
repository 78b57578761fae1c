"""What decisions look at, read and locked for any number of events at once: three statements, however many."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from backend.app.billing.domain.facts import CustomerId, Fact, SubjectId, Tie, Via
from backend.app.billing.domain.merge import Entitlement
from backend.app.billing.domain.state import Owned, State, children_of
from backend.app.billing.store_state_sql import statement
from backend.app.core.database import Tx, fetch, instant_parameter, known_instant, run
from backend.app.core.errors import StoreUnavailable

# Whom an event concerns grows only while others commit at the same moment; each round waits for them.
LOCK_ROUNDS_MAX = 5

FACT: TypeAdapter[Fact] = TypeAdapter(Annotated[Fact, Field(discriminator="kind")])
# Without the adapter's own detour, which takes as long as the reading.
_read_fact = FACT.validator.validate_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Parties:
    """Whom some subjects and customers concern: what has to be locked before a decision about them."""

    subjects: frozenset[SubjectId]
    customers: frozenset[CustomerId]
    users: frozenset[str]

    @property
    def names(self) -> set[str]:
        """The names to lock."""
        return {
            *(f"{account}/{livemode}/{key}" for account, livemode, key in self.subjects),
            *(f"{account}/{livemode}/cus:{key}" for account, livemode, key in self.customers),
            *(f"user/{user_id}" for user_id in self.users),
        }

    @classmethod
    def together(cls, parties: Iterable[Parties]) -> Parties:
        """All of several."""
        each = list(parties)
        return cls(
            subjects=frozenset().union(*(one.subjects for one in each)),
            customers=frozenset().union(*(one.customers for one in each)),
            users=frozenset().union(*(one.users for one in each)),
        )


async def load_locked(tx: Tx, named: Parties, parties: Parties | None = None) -> tuple[State, set[SubjectId]]:
    """The state of all that the named parties concern, held until the transaction ends, so that decisions do not interleave.

    Beside it those of its subjects, customers as subjects, for which an event is parked or a ledger line
    lacks its user or plan.

    Locks are taken all at once in the order of their numbers, so two transactions can't wait for each
    other. Whom an event concerns (`parties`, where that is known) is only told by reading, so what is read
    under the locks is compared with what was locked; where more turned up meanwhile, the locks are given
    back and taken anew. On SQLite the one writer is lock enough.

    Raises:
        StoreUnavailable: the parties kept growing; the delivery will come again.
    """
    if parties is None:
        parties = await load_parties(tx, named)
    if tx.dialect.name != "postgresql":
        return await _load(tx, parties)
    for _ in range(LOCK_ROUNDS_MAX):
        # One round trip for both; the numbers stand in the text, because a message of several statements has no parameters.
        await run(tx, f"{_SAVEPOINT}; {_lock_sql(parties.names)}")
        state, waiting = await _load(tx, parties)
        if _reached(state, named).names <= parties.names:
            return state, waiting
        await run(tx, _ROLLBACK)
        parties = await load_parties(tx, named)
    raise StoreUnavailable


def _reached(state: State, named: Parties) -> Parties:
    """What `load_parties` would give, as far as the state of the parties shows that it is more than them."""
    subjects = state.above(named.subjects)
    themselves = named.customers | {
        CustomerId(subject.account, subject.livemode, subject.object_id)
        for subject in subjects
        if subject.kind == "cus"
    }
    customers, users = set(themselves), set(named.users)
    for source, owned in state.sources.items():
        customer = owned.customer_id and CustomerId(source.account, source.livemode, owned.customer_id)
        if source in subjects or customer in themselves:
            customers |= {customer} if customer else set()
            users |= {owned.user_id} if owned.user_id is not None else set()
    users |= {tie.user_id for customer in customers for tie in state.ties.get(customer, ())}
    return Parties(subjects=frozenset(subjects), customers=frozenset(customers), users=frozenset(users))


_SAVEPOINT = "SAVEPOINT before_locks"
_ROLLBACK = "ROLLBACK TO SAVEPOINT before_locks"


async def lock_names(tx: Tx, names: Collection[str]) -> None:
    """Holds names until the transaction ends, in the order of their numbers; on SQLite the one writer is lock enough."""
    if tx.dialect.name != "postgresql":
        return
    if names:
        await run(tx, _lock_sql(names))


def _lock_sql(names: Iterable[str]) -> str:
    numbers = ",".join(map(str, sorted({_lock_number(name) for name in names})))
    return f"SELECT count(pg_advisory_xact_lock(number)) FROM unnest('{{{numbers}}}'::bigint[]) number"  # noqa: S608  # numbers of our own


def _lock_number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)


async def load_parties(tx: Tx, named: Parties) -> Parties:
    """The named subjects with all that they bear on, the customers behind them, and the users of both."""
    rows = await fetch(
        tx, statement(tx.dialect.name, "parties"), (keys_json(named.subjects), keys_json(named.customers))
    )
    return found_parties(named, rows)


def found_parties(named: Parties, rows: Iterable[Sequence[Any]]) -> Parties:
    """The named with those that rows (kind, account, livemode, name) tell of."""
    subjects, customers, users = set(named.subjects), set(named.customers), set(named.users)
    for kind, account, livemode, name in rows:
        if kind == "subject":
            subjects.add(SubjectId(account, bool(livemode), name))
        elif kind == "customer":
            customers.add(CustomerId(account, bool(livemode), name))
        else:
            users.add(name)
    return Parties(subjects=frozenset(subjects), customers=frozenset(customers), users=frozenset(users))


async def load_state(tx: Tx, parties: Parties) -> State:
    """The state that decisions about these parties need: all sources of their users and customers, with facts."""
    state, _ = await _load(tx, parties)
    return state


async def load_state_of_users(tx: Tx, users: Collection[str], *, until: datetime | None = None) -> State:
    """The sources of some users with their facts, as far as these had occurred at an instant.

    Without ties and entitlements.
    """
    parameters: tuple[Any, ...] = ("[]", "[]", json.dumps(sorted(users)))
    if until is not None:
        parameters += (instant_parameter(tx, until),)
    found = _Found()
    name = "users" if until is None else "users_until"
    for row in await fetch(tx, statement(tx.dialect.name, name), parameters):
        found.add(*row)
    return found.state()


async def load_below(
    tx: Tx, subjects: Collection[SubjectId], *, only_waiting: bool = False
) -> Mapping[SubjectId, Collection[SubjectId]]:
    """What bears on some subjects, on what bears on them, and so on: children by their parents.

    With `only_waiting` those for which, or for what bears on them, an event is parked or a ledger line lacks something.
    """
    found = _Found()
    name = "waiting_below" if only_waiting else "below"
    for row in await fetch(tx, statement(tx.dialect.name, name), (keys_json(subjects),)):
        found.add(*row)
    return children_of(found.parents)


async def load_ties(tx: Tx, customers: Collection[CustomerId]) -> dict[CustomerId, frozenset[Tie]]:
    """All claims on some customers."""
    found = _Found()
    for row in await fetch(tx, statement(tx.dialect.name, "ties"), (keys_json(customers),)):
        found.add(*row)
    return found.ties


async def _load(tx: Tx, parties: Parties) -> tuple[State, set[SubjectId]]:
    parameters = (
        keys_json(parties.subjects),
        keys_json(parties.customers),
        json.dumps(sorted(parties.users)),
    )
    found = _Found()
    for row in await fetch(tx, statement(tx.dialect.name, "state"), parameters):
        found.add(*row)
    return found.state(), found.waiting


class _Found:
    """Puts together rows that each say first what they are."""

    def __init__(self) -> None:
        self.sources: dict[SubjectId, Owned] = {}
        self.parents: dict[SubjectId, frozenset[SubjectId]] = {}
        self.facts: dict[SubjectId, tuple[Fact, ...]] = {}
        self.ties: dict[CustomerId, frozenset[Tie]] = {}
        self.entitlements: dict[str, Entitlement] = {}
        self.waiting: set[SubjectId] = set()

    def add(
        self, what: str, account: str, livemode: bool | int, key: str, told: str, other: str | None
    ) -> None:
        """A row: what it is about, by scope and name, and what it tells of that."""
        subject = SubjectId(account, bool(livemode), key)
        if what == "source":
            self.sources[subject] = Owned(customer_id=told or None, user_id=other)
        elif what == "link":
            parent = SubjectId(account, bool(livemode), told)
            self.parents[subject] = self.parents.get(subject, frozenset()) | {parent}
        elif what == "fact":
            self.facts[subject] = (*self.facts.get(subject, ()), _read_fact(told))
        elif what == "tie":
            customer = CustomerId(account, bool(livemode), key)
            self.ties[customer] = self.ties.get(customer, frozenset()) | {_tie(key, json.loads(told))}
        elif what == "entitlement":
            self.entitlements[key] = _entitlement(key, json.loads(told))
        else:
            self.waiting.add(subject)

    def state(self) -> State:
        """What the rows come to."""
        return State(
            facts=self.facts,
            parents=self.parents,
            sources=self.sources,
            ties=self.ties,
            entitlements=self.entitlements,
        )


def _tie(customer_id: str, told: list[Any]) -> Tie:
    user_id, via, occurred_at, event_id = told
    return Tie(
        customer_id=customer_id,
        user_id=user_id,
        via=Via(via),
        occurred_at=known_instant(occurred_at),
        event_id=event_id,
    )


def _entitlement(user_id: str, told: list[Any]) -> Entitlement:
    plan_code, status, features, valid_until, activated_at, version = told
    return Entitlement(
        user_id=user_id,
        plan_code=plan_code,
        status=status,
        features=json.loads(features),
        valid_until=known_instant(valid_until) if valid_until is not None else None,
        activated_at=known_instant(activated_at),
        version=version,
    )


def keys_json(names: Collection[tuple[str, bool, str]]) -> str:
    """Names as a statement's parameter."""
    return json.dumps(sorted(names))
