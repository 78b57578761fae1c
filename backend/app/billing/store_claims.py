"""Claims: rows that make an event's effect, and a piece of money's line, happen once, whoever tells of it and how often.

    claimed = await claim(tx, events, money, named, now=now)

A claim is made in the transaction that writes what follows from it, and is there if and only if that commits.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from backend.app.billing.domain.facts import EventKey, MoneyKey
from backend.app.billing.models import payment_claims, webhook_claims
from backend.app.billing.store_state import Parties, found_parties, keys_json, load_parties
from backend.app.billing.store_state_sql import statement
from backend.app.core.bulk import insert_new
from backend.app.core.database import Tx, fetch


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """Which events and money are a transaction's own to process, and whom all the events concern that it asked for."""

    events: set[EventKey]
    money: set[MoneyKey]
    parties: Parties


async def claim(
    tx: Tx,
    events: Collection[EventKey],
    money: Mapping[MoneyKey, Collection[EventKey]],
    named: Parties,
    *,
    now: datetime,
) -> Claimed:
    """Claims events, and of the money that they tell of what nobody has claimed before; `named` is whom they name.

    Waits while another transaction holds a claim: if that one commits it is not ours, if it rolls back it is.
    Claims are made in the order of their names, so that two transactions can't wait for each other.
    """
    if tx.dialect.name != "postgresql":
        won = await claim_events(tx, events, now=now)
        paid = await claim_money(tx, [key for key, told_by in money.items() if won & set(told_by)], now=now)
        return Claimed(events=won, money=paid, parties=await load_parties(tx, named))
    of_events = json.dumps(
        [(*key, event_id) for key, told_by in sorted(money.items()) for _, _, event_id in told_by]
    )
    rows = await fetch(
        tx,
        statement(tx.dialect.name, "claims"),
        (keys_json(named.subjects), keys_json(named.customers), keys_json(events), of_events, now),
    )
    told = [row for row in rows if row[0] not in {"event", "money"}]
    return Claimed(
        events={(account, livemode, name) for kind, account, livemode, name in rows if kind == "event"},
        money={(account, livemode, name) for kind, account, livemode, name in rows if kind == "money"},
        parties=found_parties(named, told),
    )


async def claim_events(tx: Tx, events: Collection[EventKey], *, now: datetime) -> set[EventKey]:
    """Claims events by themselves; those that are ours."""
    return await _claim(tx, webhook_claims, "event_id", events, now)


async def claim_money(tx: Tx, money: Collection[MoneyKey], *, now: datetime) -> set[MoneyKey]:
    """Claims money by itself; what is ours."""
    return await _claim(tx, payment_claims, "effect_key", money, now)


async def _claim(
    tx: Tx, table: sa.Table, column: str, names: Collection[tuple[str, bool, str]], now: datetime
) -> set[tuple[str, bool, str]]:
    rows = [
        {"account": account, "livemode": livemode, column: name, "claimed_at": now}
        for account, livemode, name in names
    ]
    return {
        (account, livemode, name)
        for account, livemode, name in await insert_new(tx, table, rows, key=("account", "livemode", column))
    }
