"""How fast a rebuild checks, and a catalog diff compares, a database of many users: events per second of one run."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from backend.app.billing.catalog_diff import compare_catalogs
from backend.app.billing.domain.catalog import parse_catalog
from backend.app.billing.models import webhook_events
from backend.app.billing.rebuild import Rebuild
from backend.app.core.clock import SystemClock
from backend.app.core.database import Database
from backend.app.main import SHIPPED_CATALOG
from backend.app.simulator import objects
from backend.app.simulator.objects import DAY_SECONDS, MONTH_SECONDS

# Events of so many users are stored by one statement; more would only take more memory.
SEED_USERS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class RebuildSpeed:
    """What a run came to. A comparison of catalogs reads facts and no events, but its cost grows with them."""

    users: int
    events: int
    rebuild_per_second: float
    check_per_second: float
    diff_per_second: float


async def measure(url: str, *, users: int, events_per_user: int) -> RebuildSpeed:
    """Events per second of `rebuild` from the bare events, of `rebuild --check` after it, and of `catalog diff`.

    `url` is a migrated database without events; it is filled here.

    Raises:
        ValueError: a result is wrong, so that its speed would be worth nothing.
    """
    database = Database.open(url)
    try:
        events = await _seed(database, users, events_per_user)
        catalog = parse_catalog(SHIPPED_CATALOG.read_text(encoding="utf-8"))
        rebuild = Rebuild(database, catalog, clock=SystemClock(), livemode=False)
        started = time.perf_counter()
        made = await rebuild.run()
        rebuilt = time.perf_counter()
        checked = await rebuild.check()
        compared = time.perf_counter()
        diff = await compare_catalogs(database, catalog, catalog, now=SystemClock().now())
        ended = time.perf_counter()
    finally:
        await database.close()
    if (made.events, checked.events, checked.difference_count, diff.users) != (events, events, 0, users):
        raise ValueError(f"{checked.difference_count} differences after a rebuild of {made.events} events")
    return RebuildSpeed(
        users=users,
        events=events,
        rebuild_per_second=events / (rebuilt - started),
        check_per_second=events / (compared - rebuilt),
        diff_per_second=events / (ended - compared),
    )


async def _seed(database: Database, users: int, events_per_user: int) -> int:
    """Stores events as they came, without what follows from them; how many."""
    now = int(time.time())
    received_at = datetime.fromtimestamp(now, UTC)
    position = 0
    for first in range(0, users, SEED_USERS):
        stored: list[dict[str, Any]] = []
        for user in range(first, min(first + SEED_USERS, users)):
            for event in _life(user, events_per_user, now):
                position += 1
                stored.append(
                    {
                        "account": "",
                        "livemode": False,
                        "event_id": event["id"],
                        "event_type": event["type"],
                        "api_version": event["api_version"],
                        "occurred_at": datetime.fromtimestamp(event["created"], UTC),
                        "received_at": received_at,
                        "status": "success",
                        "attempts": 1,
                        "payload": json.dumps(event).encode(),
                        "payload_sha256": "",
                        "position": position,
                    }
                )
        async with database.transaction() as tx:
            await tx.execute(webhook_events.insert(), stored)
    return position


def _life(user: int, events: int, now: int) -> Iterator[dict[str, Any]]:
    """A user's subscription: who they are, its snapshots, and for each period an invoice and a payment."""
    subscription, customer = f"sub_{user}", f"cus_{user}"
    session = objects.checkout_session(
        f"cs_{user}",
        mode="subscription",
        customer=customer,
        subscription=subscription,
        client_reference_id=f"usr_{user}",
    )
    start = now - events * DAY_SECONDS
    for place in range(events):
        created = start + place * DAY_SECONDS
        kind, content = "checkout.session.completed", session
        if place % 3 == 1:
            kind = "customer.subscription.updated"
            content = objects.subscription(
                subscription,
                customer=customer,
                prices=[objects.price("premium")],
                period_start=created,
                period_end=created + MONTH_SECONDS,
            )
        elif place % 3 == 2:  # noqa: PLR2004  # the third of three kinds
            kind = "invoice.paid"
            content = objects.invoice(
                f"in_{user}_{place}",
                customer=customer,
                subscription_id=subscription,
                line_price=objects.price("premium"),
            )
        elif place:
            kind = "charge.succeeded"
            content = objects.charge(f"ch_{user}_{place}", customer=customer)
        yield objects.event(f"evt_{user}_{place}", kind, content, created=created)
