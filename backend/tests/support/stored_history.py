"""A stored history of any length: what some real deliveries left behind, copied under other names by the database itself.

    for event in life(LIFE, created=...): ...      # deliver these to an empty database
    await keep_life(tx)
    await copy_life(tx, 0, 10_000)                 # as often as wanted

Every column of every growing table comes along, whatever a later version adds. Ids, and all that
names them, differ from copy to copy; Stripe's instants, and hashes, are those of the one life.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa

from backend.app.audit.models import audit_logs
from backend.app.billing.models import (
    customer_ties,
    entitlement_history,
    facts,
    links,
    payment_claims,
    payment_events,
    sources,
    user_entitlements,
    webhook_claims,
    webhook_events,
)
from backend.app.core.database import Tx
from backend.app.ops.outbox import outbox, stage
from backend.app.simulator import objects
from backend.app.simulator.objects import MONTH_SECONDS

# All that gains rows with every event, and none of which is ever emptied by the service itself.
GROWING = (
    webhook_claims,
    webhook_events,
    facts,
    links,
    sources,
    customer_ties,
    user_entitlements,
    entitlement_history,
    payment_claims,
    payment_events,
    audit_logs,
    outbox,
)
# The name in the ids of the life that is copied; nothing else contains it.
LIFE = "lifetocopy"
EVENTS_PER_LIFE = 2
# Our own clock's instants: a second earlier with every copy, as if they had come one after another. Stripe's are
# also in facts and payloads, and stay.
_OUR_INSTANTS = frozenset({"received_at", "claimed_at", "created_at", "updated_at", "delivered_at"})
# Knuth's multiplicative hash: odd, so that no two numbers below 2**32 get the same name, and neighbours lie far
# apart in every index, as the random ids of real customers do.
_MULTIPLIER, _MODULUS = 2_654_435_761, 2**32
_NAME_DIGITS = 10
# What stays of a row's UUID tells the rows of one life apart.
_UUID_CHARACTERS = 36


def name_of(number: int) -> str:
    """The name that stands in the ids of a copy."""
    return str(number * _MULTIPLIER % _MODULUS).zfill(_NAME_DIGITS)


def life(name: str, *, created: int) -> list[dict[str, Any]]:
    """A subscriber's events: the subscription, and its first invoice, an hour later; `created` in unix seconds."""
    metadata = {"user_id": f"usr_{name}"}
    subscription = objects.subscription(
        f"sub_{name}",
        customer=f"cus_{name}",
        prices=[objects.price("premium")],
        metadata=metadata,
        period_start=created,
        period_end=created + MONTH_SECONDS,
    )
    paid = objects.invoice(
        f"in_{name}",
        customer=f"cus_{name}",
        subscription_id=f"sub_{name}",
        metadata=metadata,
        line_price=objects.price("premium"),
        period_start=created,
        period_end=created + MONTH_SECONDS,
    )
    return [
        objects.event(f"evt_{name}_0", "customer.subscription.created", subscription, created=created),
        objects.event(f"evt_{name}_1", "invoice.paid", paid, created=created + 3_600),
    ]


async def keep_life(tx: Tx, *, now: datetime) -> None:
    """Keeps what a database holds, which is one life and nothing else, with a delivered message, to be copied."""
    await stage(tx, kind="owner_alert", payload={"text": LIFE}, dedupe_key=LIFE, now=now)
    await tx.execute(outbox.update().values(delivered_at=now))
    for table in GROWING:
        await tx.exec_driver_sql(f"CREATE TABLE life_{table.name} AS SELECT * FROM {table.name}")


async def copy_life(tx: Tx, first: int, count: int) -> None:
    """Stores the copies `first` to `first + count - 1` of the kept life, each of its own user."""
    for table in GROWING:
        await tx.exec_driver_sql(_copies(tx.dialect.name, table, first, count))


def _copies(dialect: str, table: sa.Table, first: int, count: int) -> str:
    hashed = f"number * {_MULTIPLIER} % {_MODULUS}"
    name = (
        f"lpad(CAST({hashed} AS text), {_NAME_DIGITS}, '0')"
        if dialect == "postgresql"
        else f"printf('%0{_NAME_DIGITS}d', {hashed})"
    )
    columns = ", ".join(f'"{column.name}"' for column in table.columns)
    values = ", ".join(_value(dialect, column) for column in table.columns)
    return (
        f"WITH RECURSIVE numbers(number) AS (SELECT {first} UNION ALL SELECT number + 1 FROM numbers"
        f" WHERE number < {first + count - 1})"
        f" INSERT INTO {table.name} ({columns}) SELECT {values}"
        f" FROM (SELECT number, {name} AS name FROM numbers) copy CROSS JOIN life_{table.name} life"
    )


def _value(dialect: str, column: sa.Column[Any]) -> str:
    old = f'life."{column.name}"'
    special = {
        "id": f"substr({old}, 1, {_UUID_CHARACTERS - _NAME_DIGITS}) || copy.name",
        "position": f"{old} + copy.number",
        **dict.fromkeys(_OUR_INSTANTS, _earlier(dialect, old)),
    }
    if column.name in special:
        return special[column.name]
    if isinstance(column.type, sa.LargeBinary):
        if dialect == "postgresql":
            text = f"convert_from({old}, 'UTF8')"
            return f"convert_to({_renamed(text)}, 'UTF8')"
        return f"CAST({_renamed(f'CAST({old} AS text)')} AS blob)"
    if isinstance(column.type, sa.JSON) and dialect == "postgresql":
        kind = "jsonb" if "postgresql" in column.type._variant_mapping else "json"
        return f"CAST({_renamed(f'CAST({old} AS text)')} AS {kind})"
    return _renamed(old) if isinstance(column.type, sa.JSON | sa.String) else old


def _earlier(dialect: str, instant: str) -> str:
    if dialect == "postgresql":
        return f"{instant} - copy.number * interval '1 second'"
    return f"strftime('%Y-%m-%d %H:%M:%f000', {instant}, '-' || copy.number || ' seconds')"


def _renamed(text: str) -> str:
    return f"replace({text}, '{LIFE}', copy.name)"
