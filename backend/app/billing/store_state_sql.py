"""The statements of store_state.py, for both databases.

Names travel as one JSON parameter, so a statement's text is always the same and stays prepared. Every row of a
table is looked up by itself, by an index: what a statement costs depends on what it finds, not on what is stored.
"""

from __future__ import annotations

import functools
import re

# A decision looks at the newest facts of each series of a subject only, so that its cost does not grow with
# history. A subscription past due through more snapshots than this would seem past due a little shorter.
FACTS_PER_SUBJECT_MAX = 64

# In what follows `{keys:1}` stands for the first parameter, which is JSON, as rows (account, livemode, key);
# `{money:1}` for one whose rows also tell `of` which event it is, and their `place`; `{texts:1}` for one as rows
# (text); `{1}` for its bare value. `{find:table:condition}` joins a table by looking each row up by itself,
# `{some:condition}` the facts that it selects for each row; `{row}` makes a JSON array.

# Claims events (3), and the money (4) of those that were not claimed before, at an instant (5). In the order in which
# they are given; a claim that another transaction is just making is waited for.
_CLAIMED = """claimed AS (
        INSERT INTO webhook_claims (account, livemode, event_id, claimed_at)
        SELECT account, livemode, key, {5} FROM {keys:3} named
        ON CONFLICT DO NOTHING RETURNING account, livemode, event_id
    ), paid AS (
        INSERT INTO payment_claims (account, livemode, effect_key, claimed_at)
        SELECT named.account, named.livemode, named.key, {5} FROM {money:4} named
        JOIN claimed ON claimed.account = named.account AND claimed.livemode = named.livemode
            AND claimed.event_id = named.of
        ORDER BY named.place
        ON CONFLICT DO NOTHING RETURNING account, livemode, effect_key
    ), """

# Whom subjects (1) and customers (2) concern: rows (kind, account, livemode, name).
_PARTIES = """
    WITH RECURSIVE {claimed}reached(account, livemode, key) AS (
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
            AND customer_ties.livemode = concerned.livemode AND customer_ties.customer_id = concerned.key}"""

_CLAIMS = """
    UNION ALL SELECT 'event', account, livemode, event_id FROM claimed
    UNION ALL SELECT 'money', account, livemode, effect_key FROM paid"""

# The sources of some subjects (1), customers (2) and users (3), and what is around them. Whatever bears on a source is
# among its own facts, so no link is followed downwards: a subscription of many years has thousands of payments.
_REACHED = """
    WITH RECURSIVE owned(account, livemode, source_key, customer_id, user_id) AS (
        SELECT sources.account, sources.livemode, source_key, customer_id, user_id
            FROM {keys:1} named {find:sources:sources.account = named.account
                AND sources.livemode = named.livemode AND sources.source_key = named.key}
        UNION SELECT sources.account, sources.livemode, source_key, customer_id, user_id
            FROM {keys:2} named {find:sources:sources.customer_id = named.key}
            WHERE sources.account = named.account AND sources.livemode = named.livemode
        UNION SELECT sources.account, sources.livemode, source_key, customer_id, user_id
            FROM {texts:3} named {find:sources:sources.user_id = named.text}
    ), customers(account, livemode, key) AS (
        SELECT account, livemode, key FROM {keys:2} named
        UNION SELECT account, livemode, customer_id FROM owned WHERE customer_id IS NOT NULL
    ), reached(account, livemode, key) AS (
        SELECT account, livemode, key FROM {keys:1} named
        UNION SELECT account, livemode, source_key FROM owned
        -- Of a customer without a source, too, it is known whether it was deleted.
        UNION SELECT account, livemode, 'cus:' || key FROM customers
        UNION SELECT account, livemode, 'acct:' || account FROM {keys:1} named WHERE account <> ''
        UNION SELECT account, livemode, 'acct:' || account FROM owned WHERE account <> ''
    ), """

# Each series by itself: a subscription's many snapshots must not push its one checkout out, which may
# name the user and the plan. Few subjects have more facts than are looked at; only of those the series
# are gone through by the index, and of each the newest are read, so that a long history costs no more.
_FACTS = """first AS (
        SELECT facts.account, facts.livemode, facts.subject_key, facts.body, count(*) OVER (
            PARTITION BY facts.account, facts.livemode, facts.subject_key
        ) AS count
        FROM reached {some:facts.account = reached.account AND facts.livemode = reached.livemode
            AND facts.subject_key = reached.key{until}
            ORDER BY series, as_of, event_id LIMIT {newest} + 1}
    ), each_series(account, livemode, key, series) AS (
        SELECT DISTINCT account, livemode, subject_key, '' FROM first WHERE count > {newest}
        UNION ALL
        SELECT account, livemode, key, (
            SELECT min(facts.series) FROM facts WHERE facts.account = each_series.account
                AND facts.livemode = each_series.livemode AND facts.subject_key = each_series.key
                AND facts.series > each_series.series
        ) FROM each_series WHERE series IS NOT NULL
    )
    SELECT 'source', account, livemode, source_key, coalesce(customer_id, ''), user_id FROM owned
    UNION ALL SELECT 'link', links.account, links.livemode, child, parent, NULL
        FROM reached {find:links:links.account = reached.account
            AND links.livemode = reached.livemode AND links.child = reached.key}
    UNION ALL SELECT 'fact', account, livemode, subject_key, CAST(body AS text), NULL
        FROM first WHERE count <= {newest}
    UNION ALL SELECT 'fact', facts.account, facts.livemode, facts.subject_key, CAST(facts.body AS text), NULL
        FROM each_series {some:facts.account = each_series.account
            AND facts.livemode = each_series.livemode AND facts.subject_key = each_series.key
            AND facts.series = each_series.series{until}
            ORDER BY as_of DESC, event_id DESC LIMIT {newest}}"""

_TIES = """
    SELECT 'tie', customer_ties.account, customer_ties.livemode, customer_id,
        CAST({row}(user_id, via, occurred_at, event_id) AS text), NULL
        FROM customers {find:customer_ties:customer_ties.account = customers.account
            AND customer_ties.livemode = customers.livemode AND customer_ties.customer_id = customers.key}"""

_ENTITLEMENTS = """
    SELECT 'entitlement', '', false, user_id, CAST({row}(
        plan_code, status, CAST(entitlements AS text), valid_until, activated_at, version
    ) AS text), NULL
        FROM {texts:3} named {find:user_entitlements:user_entitlements.user_id = named.text}"""

# All links beneath some subjects (1).
_BELOW = """
    WITH RECURSIVE reached(account, livemode, key, parent) AS (
        SELECT account, livemode, key, '' FROM {keys:1} named
        UNION
        SELECT links.account, links.livemode, links.child, links.parent
        FROM reached {find:links:links.parent = reached.key}{waits}
        WHERE links.account = reached.account AND links.livemode = reached.livemode
    )
    SELECT 'link', account, livemode, key, parent, NULL FROM reached WHERE parent <> ''"""

# Where something waits for a subject, the names of all that it bears on say so too; so whoever follows them sees
# nothing of the thousands that wait for nothing.
_WAITS = """
        {find:waiting_names:waiting_names.account = links.account
            AND waiting_names.livemode = links.livemode AND waiting_names.name = links.child}"""

# For which of the names something waits.
_WAITING = """
    SELECT 'waiting', reached.account, reached.livemode, reached.key, '', NULL
        FROM reached {find:waiting_names:waiting_names.account = reached.account
            AND waiting_names.livemode = reached.livemode AND waiting_names.name = reached.key}"""

_SQL = {
    "parties": _PARTIES.replace("{claimed}", ""),
    # On PostgreSQL only: SQLite writes nothing in the middle of a question.
    "claims": _PARTIES.replace("{claimed}", _CLAIMED) + _CLAIMS,
    "users": _REACHED + _FACTS,
    "users_until": (_REACHED + _FACTS).replace("{until}", " AND as_of <= {4}"),
    "below": _BELOW.replace("{waits}", ""),
    "waiting_below": _BELOW.replace("{waits}", _WAITS),
    "ties": "WITH customers AS (SELECT * FROM {keys:1} named)" + _TIES,  # noqa: S608  # our own words
    "state": " UNION ALL ".join((_REACHED + _FACTS, _TIES, _ENTITLEMENTS, _WAITING)),
}

_WORDS = {
    "postgresql": {
        "keys": "(SELECT e->>0 AS account, (e->>1)::boolean AS livemode, e->>2 AS key"
        " FROM jsonb_array_elements($@::text::jsonb) e)",
        "money": "(SELECT e->>0 AS account, (e->>1)::boolean AS livemode, e->>2 AS key, e->>3 AS of, place"
        " FROM jsonb_array_elements($@::text::jsonb) WITH ORDINALITY elements(e, place))",
        "texts": "(SELECT e AS text FROM jsonb_array_elements_text($@::text::jsonb) e)",
        "value": "$@",
        "row": "json_build_array",
        # PostgreSQL can't know how few names come: it would rather read a table of some ten thousand rows whole
        # than look up the hundreds that it expects. OFFSET 0 keeps it from making another kind of join of the lookups.
        # What is not looked up by a table's key is looked up without account and livemode, which are compared
        # after: a plan that was made while the table was empty could else take the key's index by these two alone.
        "find": r"CROSS JOIN LATERAL (SELECT * FROM \1 WHERE \2 OFFSET 0) \1",
        "some": r"CROSS JOIN LATERAL (SELECT * FROM facts WHERE \1) facts",
    },
    "sqlite": {
        "keys": "(SELECT json_extract(value, '$[0]') AS account, json_extract(value, '$[1]') AS livemode,"
        " json_extract(value, '$[2]') AS key FROM json_each(?@))",
        "texts": "(SELECT value AS text FROM json_each(?@))",
        "value": "?@",
        "row": "json_array",
        "find": r"JOIN \1 ON \2",
        "some": r"JOIN facts ON facts.rowid IN (SELECT rowid FROM facts WHERE \1)",
    },
}
_FIND = re.compile(r"\{find:(\w+):([^{}]+)\}")
_SOME = re.compile(r"\{some:([^{}]+)\}")
_PARAMETER = re.compile(r"\{(?:(keys|texts|money):)?([1-5])\}")


@functools.cache
def statement(dialect: str, name: str) -> str:
    """The text of a statement by its name, in the driver's own words.

    All but parties and claims give rows (what, account, livemode, key, told, other), where `what` is one of source, link,
    fact, tie, entitlement and waiting.
    """
    words = _WORDS[dialect]
    sql = _SQL[name].replace("{newest}", str(FACTS_PER_SUBJECT_MAX)).replace("{until}", "")
    # The bare values first: they also stand within the conditions of joins.
    sql = _PARAMETER.sub(lambda found: words[found[1] or "value"].replace("@", found[2]), sql)
    sql = _SOME.sub(words["some"], _FIND.sub(words["find"], sql))
    return sql.replace("{row}", words["row"])
