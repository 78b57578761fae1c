"""Billing's tables, and the rows that others read as values. Documented for people in docs/tables.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from backend.app.billing.domain.facts import FeatureValue
from backend.app.core.database import Json, UtcDateTime, metadata


def _partial_index(name: str, *columns: str, where: str) -> sa.Index:
    """An index of the rows that fulfil a condition, on both databases."""
    return sa.Index(name, *columns, postgresql_where=sa.text(where), sqlite_where=sa.text(where))


# Only keys begin with the account. Other indexes begin with what tells rows apart: all rows of a deployment have
# one account, and a plan that PostgreSQL makes while a table is empty may take any index that begins with it.

# One row per event that was ever processed, for ever: the unique key that makes its effect happen once.
# Narrow on purpose, so that it can outlive the payload.
webhook_claims = sa.Table(
    "webhook_claims",
    metadata,
    sa.Column("account", sa.Text, primary_key=True),
    sa.Column("livemode", sa.Boolean, primary_key=True),
    sa.Column("event_id", sa.Text, primary_key=True),
    sa.Column("claimed_at", UtcDateTime, nullable=False),
)

# What came: the signed bytes or, once retention let them go, what they asserted; what became of it and what was answered.
# By months of when it happened, which every delivery of an event tells alike; that an event has one row only is
# the claims' business.
webhook_events = sa.Table(
    "webhook_events",
    metadata,
    sa.Column("account", sa.Text, primary_key=True),
    sa.Column("livemode", sa.Boolean, primary_key=True),
    sa.Column("event_id", sa.Text, primary_key=True),
    sa.Column("event_type", sa.Text, nullable=False),
    sa.Column("api_version", sa.Text),
    sa.Column("occurred_at", UtcDateTime, primary_key=True),
    sa.Column("received_at", UtcDateTime, nullable=False),
    # success, ignored, parked, or failed (every delivery so far ended in an error of ours).
    sa.Column("status", sa.Text, nullable=False),
    # Why it is parked, ignored or failed.
    sa.Column("reason", sa.Text),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("user_id", sa.Text),
    sa.Column("plan_code", sa.Text),
    sa.Column("customer_id", sa.Text),
    # What it is about, such as `sub:sub_1`.
    sa.Column("subject_key", sa.Text),
    # The exact body of the 200 that the first delivery got; null while it has failed only.
    sa.Column("answer", sa.Text),
    # The signed bytes as they came; null once retention let them go.
    sa.Column("payload", sa.LargeBinary),
    # Of the bytes that came, for ever: so that a body that is fetched again can be proved to be the same.
    sa.Column("payload_sha256", sa.Text, nullable=False),
    # What the bytes asserted, in a form of ours (billing/asserted.py); null as long as they are here themselves.
    sa.Column("assertion", Json),
    sa.Column("request_id", sa.Text),
    # Grows from decision to decision about the same parties, so that they can be replayed in their order;
    # events that have nothing to do with each other may share a number.
    sa.Column("position", sa.BigInteger),
    # Nothing, no hand's mistake either, takes the ground away that all else can be made again from.
    sa.CheckConstraint(
        "payload IS NOT NULL OR assertion IS NOT NULL", name="ck_webhook_events_body_or_assertion"
    ),
    sa.Index("ix_webhook_events_received_at", "received_at"),
    sa.Index("ix_webhook_events_position", "position"),
    sa.Index("ix_webhook_events_user_id", "user_id", "received_at"),
    # By these two a deleted customer's events are found; refunds and disputes name no customer.
    _partial_index(
        "ix_webhook_events_customer_id",
        "customer_id",
        "account",
        "livemode",
        where="customer_id IS NOT NULL",
    ),
    _partial_index(
        "ix_webhook_events_subject_without_customer",
        "subject_key",
        "account",
        "livemode",
        where="customer_id IS NULL",
    ),
    # What somebody should look at, the newest first; there should be little of it among very much.
    _partial_index(
        "ix_webhook_events_parked",
        "received_at",
        where="status = 'parked'",
    ),
    _partial_index(
        "ix_webhook_events_failed",
        "received_at",
        where="status = 'failed'",
    ),
    _partial_index(
        "ix_webhook_events_waiting_subject",
        "subject_key",
        "account",
        "livemode",
        where="status = 'parked'",
    ),
    _partial_index(
        "ix_webhook_events_waiting_customer",
        "customer_id",
        "account",
        "livemode",
        where="status = 'parked'",
    ),
    postgresql_partition_by="RANGE (occurred_at)",
)

# The names under which a parked event, or a ledger line without a user or plan, is to be found once somebody can
# help: the subject's, those of all that it bears on, and the customer's. Narrow and almost empty, because every
# decision looks here. May name more than waits, never less.
waiting_names = sa.Table(
    "waiting_names",
    metadata,
    sa.Column("account", sa.Text, primary_key=True),
    sa.Column("livemode", sa.Boolean, primary_key=True),
    # A subject's key; a customer's is `cus:<id>`.
    sa.Column("name", sa.Text, primary_key=True),
)

# What access rests on, and whom it belongs to.
sources = sa.Table(
    "sources",
    metadata,
    sa.Column("account", sa.Text, primary_key=True),
    sa.Column("livemode", sa.Boolean, primary_key=True),
    sa.Column("source_key", sa.Text, primary_key=True),
    sa.Column("customer_id", sa.Text),
    sa.Column("user_id", sa.Text),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("updated_at", UtcDateTime, nullable=False),
    sa.Index("ix_sources_user_id", "user_id"),
    sa.Index("ix_sources_customer_id", "customer_id", "account", "livemode"),
)

# Every fact about a subject, and about all that bears on it: there it is `inherited`. `body` is the translated fact,
# `as_of` the event's own time, `series` its kind, and of an invoice the state that it tells as well. A person's own
# words, of the series `grant` and `claim`, come from nobody else; all others can be made again from `webhook_events`.
facts = sa.Table(
    "facts",
    metadata,
    sa.Column("account", sa.Text, primary_key=True),
    sa.Column("livemode", sa.Boolean, primary_key=True),
    sa.Column("subject_key", sa.Text, primary_key=True),
    sa.Column("series", sa.Text, primary_key=True),
    sa.Column("as_of", UtcDateTime, primary_key=True),
    sa.Column("event_id", sa.Text, primary_key=True),
    sa.Column("inherited", sa.Boolean, nullable=False),
    sa.Column("body", Json, nullable=False),
)

# Which subject bears on which: a payment on its invoice, an invoice on its subscription.
links = sa.Table(
    "links",
    metadata,
    sa.Column("account", sa.Text, primary_key=True),
    sa.Column("livemode", sa.Boolean, primary_key=True),
    sa.Column("child", sa.Text, primary_key=True),
    sa.Column("parent", sa.Text, primary_key=True),
    # With the child in it: SQLite would else rather walk through all of an account's links in the key's index.
    sa.Index("ix_links_parent", "parent", "account", "livemode", "child"),
)

# Which event claimed that a customer is a user.
customer_ties = sa.Table(
    "customer_ties",
    metadata,
    sa.Column("account", sa.Text, primary_key=True),
    sa.Column("livemode", sa.Boolean, primary_key=True),
    sa.Column("customer_id", sa.Text, primary_key=True),
    sa.Column("user_id", sa.Text, primary_key=True),
    sa.Column("via", sa.Integer, primary_key=True),
    sa.Column("occurred_at", UtcDateTime, nullable=False),
    sa.Column("event_id", sa.Text, nullable=False),
    sa.Index("ix_customer_ties_user_id", "user_id"),
)

user_entitlements = sa.Table(
    "user_entitlements",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("user_id", sa.Text, nullable=False, unique=True),
    sa.Column("plan_code", sa.Text, nullable=False),
    sa.Column("entitlements", Json, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("activated_at", UtcDateTime, nullable=False),
    sa.Column("valid_until", UtcDateTime),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("updated_at", UtcDateTime, nullable=False),
)

# Each version a user's entitlements ever had, and the event that caused it.
entitlement_history = sa.Table(
    "entitlement_history",
    metadata,
    sa.Column("user_id", sa.Text, primary_key=True),
    sa.Column("version", sa.BigInteger, primary_key=True),
    sa.Column("change", sa.Text, nullable=False),
    sa.Column("plan_code", sa.Text, nullable=False),
    sa.Column("entitlements", Json, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("valid_until", UtcDateTime),
    sa.Column("cause_account", sa.Text, nullable=False),
    sa.Column("cause_event_id", sa.Text, nullable=False),
    sa.Column("cause_event_type", sa.Text, nullable=False),
    sa.Column("occurred_at", UtcDateTime, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
)

# One row per piece of money that was ever recorded, for ever: events that report the same money make one line.
payment_claims = sa.Table(
    "payment_claims",
    metadata,
    sa.Column("account", sa.Text, primary_key=True),
    sa.Column("livemode", sa.Boolean, primary_key=True),
    sa.Column("effect_key", sa.Text, primary_key=True),
    sa.Column("claimed_at", UtcDateTime, nullable=False),
)

# The ledger, by months of when its lines were written; that money has one line only is the claims' business.
payment_events = sa.Table(
    "payment_events",
    metadata,
    sa.Column("id", sa.Text, nullable=False),
    sa.Column("stripe_event_id", sa.Text, nullable=False),
    sa.Column("user_id", sa.Text),
    sa.Column("event_type", sa.Text, nullable=False),
    sa.Column("plan_code", sa.Text),
    sa.Column("customer_id", sa.Text),
    sa.Column("invoice_id", sa.Text),
    sa.Column("subscription_id", sa.Text),
    sa.Column("amount", sa.BigInteger),
    sa.Column("currency", sa.Text),
    # Whether the amount really moved: false for what is only attempted, pending or failed.
    sa.Column("settled", sa.Boolean, nullable=False),
    sa.Column("metadata", Json, nullable=False),
    sa.Column("account", sa.Text, nullable=False),
    sa.Column("livemode", sa.Boolean, nullable=False),
    # The money's own name.
    sa.Column("effect_key", sa.Text, nullable=False),
    # What the money is about, such as `cs:cs_1`.
    sa.Column("subject_key", sa.Text),
    sa.Column("occurred_at", UtcDateTime, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.PrimaryKeyConstraint("account", "livemode", "effect_key", "created_at"),
    sa.Index("ix_payment_events_user_id", "user_id", "created_at"),
    sa.Index("ix_payment_events_created_at", "created_at"),
    _partial_index(
        "ix_payment_events_unattributed_customer",
        "customer_id",
        "account",
        "livemode",
        where="user_id IS NULL",
    ),
    _partial_index(
        "ix_payment_events_unattributed_subject",
        "subject_key",
        "account",
        "livemode",
        where="user_id IS NULL",
    ),
    _partial_index(
        "ix_payment_events_unnamed_subject",
        "subject_key",
        "account",
        "livemode",
        where="plan_code IS NULL",
    ),
    postgresql_partition_by="RANGE (created_at)",
)


# Claim links that were used, and by whom; a link is used once.
claim_link_uses = sa.Table(
    "claim_link_uses",
    metadata,
    sa.Column("link_id", sa.Text, primary_key=True),
    sa.Column("user_id", sa.Text, nullable=False),
    sa.Column("used_at", UtcDateTime, nullable=False),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class UserEntitlement:
    """A row of `user_entitlements`: a user's merged access as it was last written."""

    id: str
    user_id: str
    plan_code: str
    entitlements: Mapping[str, FeatureValue]
    status: str
    activated_at: datetime
    valid_until: datetime | None
    version: int
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class PaymentEvent:
    """A row of `payment_events`: one piece of money, in its currency's smallest unit."""

    id: str
    stripe_event_id: str
    user_id: str | None
    event_type: str
    plan_code: str | None
    customer_id: str | None
    invoice_id: str | None
    subscription_id: str | None
    amount: int | None
    currency: str | None
    settled: bool
    metadata: Mapping[str, str]
    account: str
    livemode: bool
    effect_key: str
    subject_key: str | None
    occurred_at: datetime
    created_at: datetime
