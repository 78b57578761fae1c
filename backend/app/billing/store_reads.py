"""What the answers about users rest on, for any number of users in one statement.

    rows = await load_users(tx, ["usr_1", "usr_2"])
    state = rows[0].state()

A user's rows come as texts that the database has put together, each user's apart from all others', so that rows
which are what they were can be told by comparing texts, before anything is decoded.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from backend.app.billing.domain.facts import Fact, SubjectId
from backend.app.billing.domain.state import Owned, State
from backend.app.billing.store_state_sql import FACTS_PER_SUBJECT_MAX
from backend.app.core.database import NOW_SQL, Tx, fetch, instant_parameter, known_instant

_Facts = list[Annotated[Fact, Field(discriminator="kind")]]
# Account, livemode, key and customer of each source.
_SOURCES = TypeAdapter(list[tuple[str, bool, str, str | None]])
# Account, livemode, key, the parents' keys and the facts of each subject.
_SUBJECTS = TypeAdapter(list[tuple[str, bool, str, list[str] | None, _Facts | None]])


@dataclass(frozen=True, slots=True)
class UserRows:
    """All that is stored about one user; sources, and subjects with their parents and facts, as JSON.

    `version` and `activated_at` are those of the entitlement row, 0 and None where there is none.
    """

    user_id: str
    sources: str
    subjects: str
    version: int
    activated_at: datetime | None

    def sha256(self) -> bytes:
        """Tells rows from others of the same user."""
        told = f"{self.sources}\n{self.subjects}\n{self.version}\n{self.activated_at}"
        return hashlib.sha256(told.encode()).digest()

    def state(self) -> State:
        """The sources with all that bears on them."""
        parents: dict[SubjectId, frozenset[SubjectId]] = {}
        facts: dict[SubjectId, tuple[Fact, ...]] = {}
        for account, livemode, key, parent_keys, found in _SUBJECTS.validate_json(self.subjects):
            subject = SubjectId(account, livemode, key)
            if parent_keys:
                parents[subject] = frozenset(SubjectId(account, livemode, parent) for parent in parent_keys)
            if found:
                facts[subject] = tuple(found)
        return State(
            sources={
                SubjectId(account, livemode, key): Owned(customer_id=customer_id, user_id=self.user_id)
                for account, livemode, key, customer_id in _SOURCES.validate_json(self.sources)
            },
            parents=parents,
            facts=facts,
        )


async def load_users(
    tx: Tx, users: Sequence[str], *, until: datetime | None = None
) -> list[tuple[UserRows, datetime]]:
    """The rows of some users, in the order in which these are named, as far as they had occurred at an instant.

    Beside each the database's clock, read after the rows.
    """
    parameters: tuple[Any, ...] = (json.dumps(users),)
    if until is not None:
        parameters += (instant_parameter(tx, until),)
    found = await fetch(tx, statement(tx.dialect.name, is_bounded=until is not None), parameters)
    by_place: dict[int, tuple[UserRows, datetime]] = {}
    for place, sources, subjects, version, activated_at, now in found:
        activated = None if activated_at is None else known_instant(activated_at)
        rows = UserRows(users[place], sources or "[]", subjects or "[]", version or 0, activated)
        by_place[place] = (rows, known_instant(now))
    return [by_place[place] for place in range(len(users))]


# `{row}` makes a JSON array of values, `{rows}` one of a group's rows in the order in which they come, `{json}` marks
# what is JSON already. What bears on two users is gathered for each, so that no row has to be told apart later.
_SQL = """
    WITH named(place, user_id) AS ({named}), owned AS (
        SELECT place, account, livemode, source_key, customer_id
        FROM named JOIN {sources}
    ), reached(place, account, livemode, key) AS (
        SELECT place, account, livemode, source_key FROM owned
        UNION SELECT place, account, livemode, 'cus:' || customer_id FROM owned WHERE customer_id IS NOT NULL
        UNION SELECT place, account, livemode, 'acct:' || account FROM owned WHERE account <> ''
    ), gathered_sources AS (
        SELECT place, {rows}({json}(source)) AS sources FROM (
            SELECT place, {row}(account, livemode, source_key, customer_id) AS source
            FROM owned ORDER BY place, account, livemode, source_key
        ) each_source GROUP BY place
    ), gathered_subjects AS (
        SELECT place, {rows}({json}(subject)) AS subjects FROM (
            SELECT place, {row}(account, livemode, key, {json}((
                SELECT {rows}(parent) FROM (
                    SELECT parent FROM links WHERE links.account = reached.account
                        AND links.livemode = reached.livemode AND links.child = reached.key
                    ORDER BY parent
                ) each_parent
            )), {json}((
                SELECT {rows}({json}(body)) FROM (
                    SELECT body FROM (
                        -- Each series by itself, as decisions look at them.
                        SELECT series, as_of, event_id, body, row_number() OVER (
                            PARTITION BY series ORDER BY as_of DESC, event_id DESC
                        ) AS number
                        FROM facts WHERE facts.account = reached.account
                            AND facts.livemode = reached.livemode AND facts.subject_key = reached.key
                            AND {until}
                    ) numbered WHERE number <= {newest} ORDER BY series, as_of, event_id
                ) each_fact
            ))) AS subject
            FROM reached ORDER BY place, account, livemode, key
        ) each_subject GROUP BY place
    )
    SELECT named.place, CAST(sources AS text), CAST(subjects AS text), version, activated_at, {now}
    FROM named
        LEFT JOIN gathered_sources ON gathered_sources.place = named.place
        LEFT JOIN gathered_subjects ON gathered_subjects.place = named.place
        LEFT JOIN {user_entitlements}
    """
_JOINED = {
    "sources": "sources.user_id = named.user_id",
    "user_entitlements": "user_entitlements.user_id = named.user_id",
}
_WORDS = {
    "postgresql": {
        "until": "$2",
        "named": "SELECT number - 1, text FROM"
        " jsonb_array_elements_text($1::text::jsonb) WITH ORDINALITY AS e(text, number)",
        "row": "json_build_array",
        "rows": "json_agg",
        "json": "",
        # One user's or subject's rows at a time, by their index: PostgreSQL takes names in a parameter for a hundred
        # rows or more, and would rather read the whole of a table that is not large yet.
        **{
            table: f"LATERAL (SELECT * FROM {table} WHERE {condition} OFFSET 0) {table} ON true"  # noqa: S608  # our own words
            for table, condition in _JOINED.items()
        },
    },
    "sqlite": {
        "until": "?2",
        "named": "SELECT key, value FROM json_each(?1)",
        "row": "json_array",
        "rows": "json_group_array",
        "json": "json",
        **{table: f"{table} ON {condition}" for table, condition in _JOINED.items()},
    },
}


@functools.cache
def statement(dialect: str, *, is_bounded: bool) -> str:
    """The statement of `load_users`: its first parameter is the users as JSON, its second the instant, if any."""
    words = _WORDS[dialect]
    return _SQL.format(
        **{**words, "until": f"as_of <= {words['until']}" if is_bounded else "true"},
        now=NOW_SQL[dialect],
        newest=FACTS_PER_SUBJECT_MAX,
    )
