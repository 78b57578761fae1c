"""The four rows of one event, as the bare prototype and pgbench write them: tables and statements."""

from __future__ import annotations

TABLES_POSTGRES = """
CREATE TABLE bare_events (
    event_id text PRIMARY KEY, event_type text NOT NULL,
    received_at timestamptz NOT NULL DEFAULT now(), payload bytea NOT NULL);
CREATE TABLE bare_payments (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(), event_id text NOT NULL, user_id text NOT NULL,
    event_type text NOT NULL, amount bigint, created_at timestamptz NOT NULL DEFAULT now());
CREATE INDEX ON bare_payments (user_id, created_at);
CREATE TABLE bare_entitlements (
    user_id text PRIMARY KEY, plan_code text NOT NULL, version bigint NOT NULL DEFAULT 1,
    updated_at timestamptz NOT NULL DEFAULT now());
CREATE TABLE bare_audit (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(), user_id text NOT NULL, action text NOT NULL,
    event_id text NOT NULL, created_at timestamptz NOT NULL DEFAULT now());
CREATE INDEX ON bare_audit (user_id, created_at);
"""

# SQLite numbers rows by itself, which is cheaper there than a random id.
TABLES_SQLITE = """
CREATE TABLE bare_events (
    event_id TEXT PRIMARY KEY, event_type TEXT NOT NULL,
    received_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP, payload BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE bare_payments (
    id INTEGER PRIMARY KEY, event_id TEXT NOT NULL, user_id TEXT NOT NULL,
    event_type TEXT NOT NULL, amount INTEGER, created_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP);
CREATE INDEX bare_payments_user ON bare_payments (user_id, created_at);
CREATE TABLE bare_entitlements (
    user_id TEXT PRIMARY KEY, plan_code TEXT NOT NULL, version INTEGER NOT NULL DEFAULT 1,
    updated_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP) WITHOUT ROWID;
CREATE TABLE bare_audit (
    id INTEGER PRIMARY KEY, user_id TEXT NOT NULL, action TEXT NOT NULL,
    event_id TEXT NOT NULL, created_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP);
CREATE INDEX bare_audit_user ON bare_audit (user_id, created_at);
"""

# One event: four statements, in the order that a handler would run them. {name} becomes the place of a value.
ONE_EVENT = (
    "INSERT INTO bare_events (event_id, event_type, payload) VALUES ({event_id}, {event_type}, {payload})",
    (
        "INSERT INTO bare_payments (event_id, user_id, event_type, amount)"
        " VALUES ({event_id}, {user_id}, {event_type}, {amount})"
    ),
    (
        "INSERT INTO bare_entitlements (user_id, plan_code) VALUES ({user_id}, {plan_code})"
        " ON CONFLICT (user_id) DO UPDATE SET plan_code = excluded.plan_code,"
        " version = bare_entitlements.version + 1, updated_at = excluded.updated_at"
    ),
    "INSERT INTO bare_audit (user_id, action, event_id) VALUES ({user_id}, 'payment.event', {event_id})",
)

# Many events: one statement, one round trip; only what was not known yet has consequences.
MANY_EVENTS_POSTGRES = """
WITH incoming AS (
    SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bigint[], $6::bytea[])
        AS incoming (event_id, event_type, user_id, plan_code, amount, payload)
), claimed AS (
    INSERT INTO bare_events (event_id, event_type, payload)
    SELECT event_id, event_type, payload FROM incoming ON CONFLICT DO NOTHING RETURNING event_id
), taken AS (
    SELECT incoming.* FROM incoming JOIN claimed USING (event_id)
), paid AS (
    INSERT INTO bare_payments (event_id, user_id, event_type, amount)
    SELECT event_id, user_id, event_type, amount FROM taken
), entitled AS (
    INSERT INTO bare_entitlements (user_id, plan_code)
    SELECT DISTINCT ON (user_id) user_id, plan_code FROM taken ORDER BY user_id
    ON CONFLICT (user_id) DO UPDATE SET plan_code = excluded.plan_code,
        version = bare_entitlements.version + 1, updated_at = excluded.updated_at
)
INSERT INTO bare_audit (user_id, action, event_id)
SELECT user_id, 'payment.event', event_id FROM taken
"""

# What must be there afterwards: how many rows each of these counts, by events and by users.
ROWS_PER_EVENT = ("bare_events", "bare_payments", "bare_audit")
ROWS_PER_USER = ("bare_entitlements",)
