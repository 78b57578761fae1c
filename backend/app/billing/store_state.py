"""What decisions look at, read and locked for any number of events at once: five statements, however many.

Names travel as one JSON parameter, so a statement's text is always the same and stays prepared.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from backend.app.billing.domain.facts import CustomerId, Fact, SubjectId, Tie, Via
from backend.app.billing.domain.merge import Entitlement
from backend.app.billing.domain.state import Owned, State
from backend.app.core.database import Tx, fetch, instant_parameter, known_instant
from backend.app.core.errors import StoreUnavailable

# A decision looks at the newest facts of each kind of a subject only, so that its cost does not grow with
# history. A subscription past due through more snapshots than this would seem past due a little shorter.
FACTS_PER_SUBJECT_MAX = 64

# Whom an event concerns grows only while others commit at the same moment; each round waits for them.
LOCK_ROUNDS_MAX = 5

FACT: TypeAdapter[Fact] = TypeAdapter(Annotated[Fact, Field(discriminator="kind")])


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


async def load_locked(tx: Tx, named: Parties) -> tuple[Parties, State]:
    """All that the named parties concern and its state, held until the transaction ends, so that decisions do not interleave.

    Locks are taken all at once in the order of their numbers, so two transactions can't wait for each
    other. Whom an event concerns is only known by reading, so what is read under the locks is compared
    with what was locked; where more turned up meanwhile, the locks are given back and taken anew. On
    SQLite the one writer is lock enough.

    Raises:
        StoreUnavailable: the parties kept growing; the delivery will come again.
    """
    parties = await load_parties(tx, named)
    if tx.dialect.name != "postgresql":
        return parties, await load_state(tx, parties)
    for _ in range(LOCK_ROUNDS_MAX):
        await fetch(tx, _SAVEPOINT)
        await lock_names(tx, parties.names)
        state = await load_state(tx, parties)
        if _reached(state, named).names <= parties.names:
            return parties, state
        await fetch(tx, _ROLLBACK)
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
_LOCK = "SELECT count(pg_advisory_xact_lock(number)) FROM unnest($1::bigint[]) number"


async def lock_names(tx: Tx, names: Collection[str]) -> None:
    """Holds names until the transaction ends, in the order of their numbers; on SQLite the one writer is lock enough."""
    if tx.dialect.name != "postgresql":
        return
    numbers = sorted({_lock_number(name) for name in names})
    if numbers:
        await fetch(tx, _LOCK, (numbers,))


def _lock_number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)


async def load_parties(tx: Tx, named: Parties) -> Parties:
    """The named subjects with all that they bear on, the customers behind them, and the users of both."""
    subjects, customers, users = set(named.subjects), set(named.customers), set(named.users)
    for kind, account, livemode, name in await _rows(tx, "parties", _keys(subjects), _keys(customers)):
        if kind == "subject":
            subjects.add(SubjectId(account, bool(livemode), name))
        elif kind == "customer":
            customers.add(CustomerId(account, bool(livemode), name))
        else:
            users.add(name)
    return Parties(subjects=frozenset(subjects), customers=frozenset(customers), users=frozenset(users))


async def load_state(tx: Tx, parties: Parties) -> State:
    """The state that decisions about these parties need: all sources of their users and customers, with facts."""
    state = await _load_sources(tx, parties, until=None)
    customers = {
        CustomerId(source_id.account, source_id.livemode, owned.customer_id)
        for source_id, owned in state.sources.items()
        if owned.customer_id is not None
    } | parties.customers
    return replace(
        state,
        ties=await load_ties(tx, customers),
        entitlements=await load_entitlements(tx, parties.users),
    )


async def load_waiting(
    tx: Tx, subjects: Collection[SubjectId], customers: Collection[CustomerId]
) -> set[SubjectId]:
    """Those of the names, customers as subjects, for which an event is parked or a ledger line lacks its user or plan."""
    found = await _rows(tx, "waiting", _keys(subjects), _keys(customers))
    return {SubjectId(account, bool(livemode), key) for account, livemode, key in found}


async def load_state_of_users(tx: Tx, users: Collection[str], *, until: datetime | None = None) -> State:
    """The sources of some users with all that bears on them, as far as it had occurred at an instant."""
    parties = Parties(subjects=frozenset(), customers=frozenset(), users=frozenset(users))
    return await _load_sources(tx, parties, until=until)


async def load_ties(tx: Tx, customers: Collection[CustomerId]) -> dict[CustomerId, frozenset[Tie]]:
    """All claims on some customers."""
    ties: dict[CustomerId, frozenset[Tie]] = {}
    if not customers:
        return ties
    for account, livemode, customer_id, user_id, via, occurred_at, event_id in await _rows(
        tx, "ties", _keys(customers)
    ):
        customer = CustomerId(account, bool(livemode), customer_id)
        tie = Tie(
            customer_id=customer_id,
            user_id=user_id,
            via=Via(via),
            occurred_at=known_instant(occurred_at),
            event_id=event_id,
        )
        ties[customer] = ties.get(customer, frozenset()) | {tie}
    return ties


async def load_entitlements(tx: Tx, users: Collection[str]) -> dict[str, Entitlement]:
    """What some users have, as it was last written; nothing about users of whom nothing was heard."""
    if not users:
        return {}
    return {
        user_id: Entitlement(
            user_id=user_id,
            plan_code=plan_code,
            status=status,
            features=json.loads(features),
            valid_until=known_instant(valid_until) if valid_until is not None else None,
            activated_at=known_instant(activated_at),
            version=version,
        )
        for user_id, plan_code, features, status, activated_at, valid_until, version in await _rows(
            tx, "entitlements", json.dumps(sorted(users))
        )
    }


async def _load_sources(tx: Tx, parties: Parties, *, until: datetime | None) -> State:
    sources: dict[SubjectId, Owned] = {}
    # Of a customer without a source, too, it is known whether it was deleted.
    seeds = {
        *parties.subjects,
        *(SubjectId(account, livemode, f"cus:{key}") for account, livemode, key in parties.customers),
    }
    for account, livemode, key, customer_id, user_id in await _rows(
        tx, "sources", _keys(parties.subjects), _keys(parties.customers), json.dumps(sorted(parties.users))
    ):
        source = SubjectId(account, bool(livemode), key)
        sources[source] = Owned(customer_id=customer_id, user_id=user_id)
        seeds.add(source)
        if customer_id is not None:
            seeds.add(SubjectId(account, bool(livemode), f"cus:{customer_id}"))
    seeds |= {
        SubjectId(account, livemode, f"acct:{account}")
        for account, livemode, _ in (*parties.subjects, *sources)
        if account
    }
    if not seeds:
        return State(sources=sources)
    parents: dict[SubjectId, frozenset[SubjectId]] = {}
    below = set(seeds)
    for account, livemode, child_key, parent_key in await _rows(tx, "links", _keys(seeds)):
        child = SubjectId(account, bool(livemode), child_key)
        below.add(child)
        parents[child] = parents.get(child, frozenset()) | {SubjectId(account, bool(livemode), parent_key)}
    facts: dict[SubjectId, tuple[Fact, ...]] = {}
    for account, livemode, key, body in (
        await _rows(tx, "facts", _keys(below))
        if until is None
        else await _rows(tx, "facts_until", _keys(below), instant_parameter(tx, until))
    ):
        subject = SubjectId(account, bool(livemode), key)
        facts[subject] = (*facts.get(subject, ()), FACT.validate_json(body))
    return State(sources=sources, parents=parents, facts=facts)


async def _rows(tx: Tx, name: str, *parameters: Any) -> Sequence[Sequence[Any]]:
    return await fetch(tx, _statement(tx.dialect.name, name), parameters)


def _keys(names: Collection[SubjectId] | Collection[CustomerId]) -> str:
    return json.dumps(sorted(names))


# `{keys:1}` stands for the first parameter, which is JSON, as rows (account, livemode, key); `{texts:1}` for one
# as rows (text); `{1}` for its bare value. `{find:table:condition}` joins a table by looking each row up by itself,
# `{some:condition}` the facts that it selects for each row.
_SQL = {
    "parties": """
        WITH RECURSIVE reached(account, livemode, key) AS (
            SELECT account, livemode, key FROM {keys:1} named
            UNION
            SELECT links.account, links.livemode, links.parent
            FROM reached {find:links:links.account = reached.account
                AND links.livemode = reached.livemode AND links.child = reached.key}
        ), customers AS (
            SELECT account, livemode, key FROM {keys:2} named
            UNION
            -- What bears on a customer, as a test clock does, concerns all that is the customer's.
            SELECT account, livemode, substr(key, 5) FROM reached WHERE key LIKE 'cus:%'
        ), owned AS (
            SELECT sources.account, sources.livemode, sources.customer_id, sources.user_id
            FROM reached {find:sources:sources.account = reached.account
                AND sources.livemode = reached.livemode AND sources.source_key = reached.key}
            UNION
            SELECT sources.account, sources.livemode, sources.customer_id, sources.user_id
            FROM customers {find:sources:sources.customer_id = customers.key}
            WHERE sources.account = customers.account AND sources.livemode = customers.livemode
        ), concerned AS (
            SELECT account, livemode, key FROM customers
            UNION
            SELECT account, livemode, customer_id FROM owned WHERE customer_id IS NOT NULL
        )
        SELECT 'subject', account, livemode, key FROM reached
        UNION ALL SELECT 'customer', account, livemode, key FROM concerned
        UNION ALL SELECT 'user', account, livemode, user_id FROM owned WHERE user_id IS NOT NULL
        UNION ALL SELECT 'user', customer_ties.account, customer_ties.livemode, customer_ties.user_id
            FROM concerned {find:customer_ties:customer_ties.account = concerned.account
                AND customer_ties.livemode = concerned.livemode AND customer_ties.customer_id = concerned.key}
        """,
    "sources": """
        SELECT sources.account, sources.livemode, source_key, customer_id, user_id
            FROM {keys:1} named {find:sources:sources.account = named.account
                AND sources.livemode = named.livemode AND sources.source_key = named.key}
        UNION SELECT sources.account, sources.livemode, source_key, customer_id, user_id
            FROM {keys:2} named {find:sources:sources.customer_id = named.key}
            WHERE sources.account = named.account AND sources.livemode = named.livemode
        UNION SELECT sources.account, sources.livemode, source_key, customer_id, user_id
            FROM {texts:3} named {find:sources:sources.user_id = named.text}
        """,
    "links": """
        WITH RECURSIVE reached(account, livemode, key) AS (
            SELECT account, livemode, key FROM {keys:1} named
            UNION
            SELECT links.account, links.livemode, links.child
            FROM reached {find:links:links.parent = reached.key}
            WHERE links.account = reached.account AND links.livemode = reached.livemode
        )
        SELECT links.account, links.livemode, child, parent
        FROM reached {find:links:links.account = reached.account
            AND links.livemode = reached.livemode AND links.child = reached.key}
        """,
    # Each kind by itself: a subscription's many snapshots must not push its one checkout out, which may
    # name the user and the plan. Few subjects have more facts than are looked at; only of those the kinds
    # are gone through by the index, and of each the newest are read, so that a long history costs no more.
    "facts": """
        WITH RECURSIVE first AS (
            SELECT facts.account, facts.livemode, facts.subject_key, facts.body, count(*) OVER (
                PARTITION BY facts.account, facts.livemode, facts.subject_key
            ) AS count
            FROM {keys:1} named {some:facts.account = named.account AND facts.livemode = named.livemode
                AND facts.subject_key = named.key AND {until}
                ORDER BY kind, as_of, event_id LIMIT {newest} + 1}
        ), kinds(account, livemode, key, kind) AS (
            SELECT DISTINCT account, livemode, subject_key, '' FROM first WHERE count > {newest}
            UNION ALL
            SELECT account, livemode, key, (
                SELECT min(facts.kind) FROM facts WHERE facts.account = kinds.account
                    AND facts.livemode = kinds.livemode AND facts.subject_key = kinds.key
                    AND facts.kind > kinds.kind
            ) FROM kinds WHERE kind IS NOT NULL
        )
        SELECT account, livemode, subject_key, CAST(body AS text) FROM first WHERE count <= {newest}
        UNION ALL SELECT facts.account, facts.livemode, facts.subject_key, CAST(facts.body AS text)
            FROM kinds {some:facts.account = kinds.account AND facts.livemode = kinds.livemode
                AND facts.subject_key = kinds.key AND facts.kind = kinds.kind AND {until}
                ORDER BY as_of DESC, event_id DESC LIMIT {newest}}
        """,
    "waiting": """
        SELECT named.account, named.livemode, named.key
            FROM {keys:1} named {find:webhook_events:webhook_events.subject_key = named.key
                AND webhook_events.status = 'parked'}
            WHERE webhook_events.account = named.account AND webhook_events.livemode = named.livemode
        UNION SELECT named.account, named.livemode, 'cus:' || named.key
            FROM {keys:2} named {find:webhook_events:webhook_events.customer_id = named.key
                AND webhook_events.status = 'parked'}
            WHERE webhook_events.account = named.account AND webhook_events.livemode = named.livemode
        UNION SELECT named.account, named.livemode, named.key
            FROM {keys:1} named {find:payment_events:payment_events.subject_key = named.key
                AND payment_events.user_id IS NULL}
            WHERE payment_events.account = named.account AND payment_events.livemode = named.livemode
        UNION SELECT named.account, named.livemode, named.key
            FROM {keys:1} named {find:payment_events:payment_events.subject_key = named.key
                AND payment_events.plan_code IS NULL}
            WHERE payment_events.account = named.account AND payment_events.livemode = named.livemode
        UNION SELECT named.account, named.livemode, 'cus:' || named.key
            FROM {keys:2} named {find:payment_events:payment_events.customer_id = named.key
                AND payment_events.user_id IS NULL}
            WHERE payment_events.account = named.account AND payment_events.livemode = named.livemode
        """,
    "ties": """
        SELECT customer_ties.account, customer_ties.livemode, customer_id, user_id, via, occurred_at, event_id
        FROM {keys:1} named {find:customer_ties:customer_ties.account = named.account
            AND customer_ties.livemode = named.livemode AND customer_ties.customer_id = named.key}
        """,
    "entitlements": """
        SELECT user_id, plan_code, CAST(entitlements AS text), status, activated_at, valid_until, version
        FROM {texts:1} named {find:user_entitlements:user_entitlements.user_id = named.text}
        """,
}
_SQL["facts_until"] = _SQL["facts"].replace("{until}", "as_of <= {2}")
_SQL["facts"] = _SQL["facts"].replace(" AND {until}", "")

_ROWS = {
    "postgresql": {
        "keys": "(SELECT e->>0 AS account, (e->>1)::boolean AS livemode, e->>2 AS key"
        " FROM jsonb_array_elements($@::text::jsonb) e)",
        "texts": "(SELECT e AS text FROM jsonb_array_elements_text($@::text::jsonb) e)",
        "value": "$@",
    },
    "sqlite": {
        "keys": "(SELECT json_extract(value, '$[0]') AS account, json_extract(value, '$[1]') AS livemode,"
        " json_extract(value, '$[2]') AS key FROM json_each(?@))",
        "texts": "(SELECT value AS text FROM json_each(?@))",
        "value": "?@",
    },
}
# PostgreSQL can't know how few names come: it would rather read a table of some ten thousand rows whole than
# look up the hundreds that it expects. OFFSET 0 keeps it from making another kind of join of the lookups.
# What is not looked up by a table's key is looked up without account and livemode, which are compared after: a plan
# that was made while the table was empty could else take the key's index by these two alone.
_FIND = re.compile(r"\{find:(\w+):([^{}]+)\}")
_FOUND = {
    "postgresql": r"CROSS JOIN LATERAL (SELECT * FROM \1 WHERE \2 OFFSET 0) \1",
    "sqlite": r"JOIN \1 ON \2",
}
_SOME = re.compile(r"\{some:([^{}]+)\}")
_SOME_FACTS = {
    "postgresql": r"CROSS JOIN LATERAL (SELECT * FROM facts WHERE \1) facts",
    "sqlite": r"JOIN facts ON facts.rowid IN (SELECT rowid FROM facts WHERE \1)",
}


@functools.cache
def _statement(dialect: str, name: str) -> str:
    forms = _ROWS[dialect]
    # The bare values first: they also stand within the conditions of joins.
    sql = re.sub(
        r"\{(?:(keys|texts):)?([1-3])\}",
        lambda found: forms[found[1] or "value"].replace("@", found[2]),
        _SQL[name].replace("{newest}", str(FACTS_PER_SUBJECT_MAX)),
    )
    return _SOME.sub(_SOME_FACTS[dialect], _FIND.sub(_FOUND[dialect], sql))
