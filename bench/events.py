"""The events that a measurement sends: four types, each about a user of its own, each changing what that user may do.

work = make_workload(1_000, prefix="a")
# deliver work.seeds first, then measure the delivery of work.events
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

from backend.app.billing.routes import WEBHOOK_PATH
from backend.app.billing.security import sign
from backend.app.simulator import objects
from backend.app.simulator.objects import DAY_SECONDS, MONTH_SECONDS

# Signs only what this run sends to itself; live mode would take it too.
SECRET = "whsec_bench_0123456789abcdefghijklmn"  # noqa: S105  # see above

# A checkout, a new subscription, an upgrade, an invoice, in turn.
TYPES = 4
# The upgrade and the invoice are about subscriptions that must be known before.
SEEDED_TYPES = 2
# The measured events follow the seeds by a day, so that no two facts are of the same second.
SEED_AGE_SECONDS = DAY_SECONDS
# Stands in the templates where each event has its own id; no letter of it needs escaping in JSON.
_PLACE = "@@"


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Bodies of events; each, seed or not, makes one change of one user's entitlements.

    `users` is how many users there are once all are delivered.
    """

    seeds: tuple[bytes, ...]
    events: tuple[bytes, ...]
    users: int


def make_workload(count: int, *, prefix: str) -> Workload:
    """`count` different events, the four types in turn, and the seeds they need; `prefix` names them.

    Raises:
        ValueError: `count` is no multiple of the number of types, so the mix would be crooked.
    """
    if count % TYPES:
        raise ValueError(f"{count} events are no multiple of {TYPES}")
    now = int(time.time())
    seeds = _templates(_seed_documents(now - SEED_AGE_SECONDS))
    events = _templates(_measured_documents(now))
    return Workload(
        seeds=tuple(_bodies(seeds, count // TYPES, prefix)),
        events=tuple(_bodies(events, count // TYPES, prefix)),
        users=count,
    )


def signed_requests(bodies: tuple[bytes, ...]) -> list[bytes]:
    """Each body as a ready HTTP/1.1 request, signed now; they are good for the tolerance of five minutes."""
    now = int(time.time())
    key = SECRET.encode("ascii")
    return [
        (
            f"POST {WEBHOOK_PATH} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json; charset=utf-8\r\n"
            f"Content-Length: {len(body)}\r\nStripe-Signature: {sign(body, key, timestamp=now)}\r\n\r\n"
        ).encode("ascii")
        + body
        for body in bodies
    ]


def user_of(prefix: str, number: int, place: int) -> str:
    """The id of the user of the measured event of type `place` (0 to 3) in turn `number`."""
    return f"usr_{_PLACE}_{place}".replace(_PLACE, f"{prefix}_{number}")


def _bodies(templates: list[bytes], turns: int, prefix: str) -> list[bytes]:
    place = _PLACE.encode("ascii")
    return [
        template.replace(place, f"{prefix}_{number}".encode("ascii"))
        for number in range(turns)
        for template in templates
    ]


def _templates(documents: list[dict[str, Any]]) -> list[bytes]:
    # Stripe indents what it sends by two blanks, and the signature covers them.
    return [json.dumps(document, indent=2).encode("ascii") for document in documents]


def _seed_documents(created: int) -> list[dict[str, Any]]:
    active = _subscription(2, created, "premium", status="active")
    late = _subscription(3, created, "premium", status="past_due")
    return [
        objects.event(f"evt_{_PLACE}_s2", "customer.subscription.created", active, created=created),
        # A failed renewal: its grace ends earlier than the period that the invoice then pays for.
        objects.event(f"evt_{_PLACE}_s3", "customer.subscription.updated", late, created=created),
    ]


def _measured_documents(created: int) -> list[dict[str, Any]]:
    session = objects.checkout_session(
        f"cs_{_PLACE}",
        customer=f"cus_{_PLACE}_0",
        payment_intent=f"pi_{_PLACE}_0",
        client_reference_id=f"usr_{_PLACE}_0",
        metadata={"plan_code": "premium"},
        created=created,
    )
    started = created - SEED_AGE_SECONDS
    new = _subscription(1, created, "premium_monthly", status="active")
    upgraded = _subscription(2, started, "vip_monthly", status="active")
    before = _subscription(2, started, "premium", status="active")
    paid = objects.invoice(
        f"in_{_PLACE}",
        customer=f"cus_{_PLACE}_3",
        subscription_id=f"sub_{_PLACE}_3",
        metadata=_metadata(3),
        period_start=started,
        period_end=started + MONTH_SECONDS,
    )
    return [
        objects.event(f"evt_{_PLACE}_0", "checkout.session.completed", session, created=created),
        objects.event(f"evt_{_PLACE}_1", "customer.subscription.created", new, created=created),
        objects.event(
            f"evt_{_PLACE}_2",
            "customer.subscription.updated",
            upgraded,
            created=created,
            previous_attributes={"items": before["items"]},
        ),
        objects.event(f"evt_{_PLACE}_3", "invoice.paid", paid, created=created),
    ]


def _subscription(place: int, start: int, lookup_key: str, *, status: str) -> dict[str, Any]:
    return objects.subscription(
        f"sub_{_PLACE}_{place}",
        customer=f"cus_{_PLACE}_{place}",
        status=status,
        prices=[objects.price(lookup_key)],
        period_start=start,
        period_end=start + MONTH_SECONDS,
        metadata=_metadata(place),
    )


def _metadata(place: int) -> dict[str, str]:
    return {"user_id": f"usr_{_PLACE}_{place}", "plan_code": "premium"}
