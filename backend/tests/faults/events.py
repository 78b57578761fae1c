"""The events that fault tests deliver, each with what must have come before it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from backend.app.simulator import objects

# 2026-11-01T00:00:00Z: any fixed instant makes two runs of a scenario write equal rows.
EPOCH = 1_793_491_200
PERIOD_END = EPOCH + objects.MONTH_SECONDS


def wire(event: Mapping[str, Any]) -> bytes:
    """An event's bytes, as they are posted."""
    return json.dumps(event).encode()


def purchase(tag: str, *, user_id: str, plan_code: str = "premium", customer: str | None = None) -> bytes:
    """A paid one-time checkout that grants a plan."""
    session = objects.checkout_session(
        f"cs_{tag}",
        customer=customer,
        client_reference_id=user_id,
        payment_intent=f"pi_{tag}",
        metadata={"plan_code": plan_code},
        created=EPOCH,
    )
    return wire(objects.event(f"evt_{tag}", "checkout.session.completed", session, created=EPOCH))


def subscription(
    tag: str,
    *,
    subscription_id: str,
    customer: str,
    user_id: str | None,
    kind: str = "created",
    price: str = "vip",
    created: int = EPOCH,
) -> bytes:
    """An active subscription's snapshot; without a user it has to wait for one."""
    content = objects.subscription(
        subscription_id,
        customer=customer,
        prices=[objects.price(price)],
        period_start=EPOCH,
        period_end=PERIOD_END,
        metadata={"user_id": user_id} if user_id else {},
    )
    return wire(objects.event(f"evt_{tag}", f"customer.subscription.{kind}", content, created=created))


def invoice(tag: str, *, subscription_id: str, customer: str) -> bytes:
    """A subscription's paid invoice."""
    content = objects.invoice(
        f"in_{tag}",
        customer=customer,
        subscription_id=subscription_id,
        line_price=objects.price("vip"),
        period_start=EPOCH,
        period_end=PERIOD_END,
    )
    return wire(objects.event(f"evt_{tag}", "invoice.payment_succeeded", content, created=EPOCH + 1))


def charge(tag: str, *, customer: str) -> bytes:
    """A charge: money alone."""
    content = objects.charge(f"ch_{tag}", customer=customer, created=EPOCH)
    return wire(objects.event(f"evt_{tag}", "charge.succeeded", content, created=EPOCH))


def ignored(tag: str) -> bytes:
    """An event on which nothing here depends."""
    content = {"id": f"coupon_{tag}", "object": "coupon", "percent_off": 20}
    return wire(objects.event(f"evt_{tag}", "coupon.created", content, created=EPOCH))


@dataclass(frozen=True, slots=True)
class Scenario:
    """An event, what is delivered undisturbed before it, and the `status` it is answered with."""

    event: bytes
    before: tuple[bytes, ...] = ()
    status: str = "success"


def _checkout_paid(tag: str) -> Scenario:
    return Scenario(purchase(tag, user_id=f"user_{tag}", customer=f"cus_{tag}"))


def _late_binding(tag: str) -> Scenario:
    subscription_id, customer = f"sub_{tag}", f"cus_{tag}"
    return Scenario(
        subscription(
            f"{tag}_3",
            subscription_id=subscription_id,
            customer=customer,
            user_id=f"user_{tag}",
            kind="updated",
            created=EPOCH + 2,
        ),
        before=(
            subscription(f"{tag}_1", subscription_id=subscription_id, customer=customer, user_id=None),
            invoice(f"{tag}_2", subscription_id=subscription_id, customer=customer),
        ),
    )


def _invoice(tag: str) -> Scenario:
    subscription_id, customer = f"sub_{tag}", f"cus_{tag}"
    return Scenario(
        invoice(f"{tag}_2", subscription_id=subscription_id, customer=customer),
        before=(
            subscription(
                f"{tag}_1", subscription_id=subscription_id, customer=customer, user_id=f"user_{tag}"
            ),
        ),
    )


def _charge(tag: str) -> Scenario:
    return Scenario(charge(tag, customer=f"cus_{tag}"))


def _parked(tag: str) -> Scenario:
    return Scenario(
        subscription(
            tag,
            subscription_id=f"sub_{tag}",
            customer=f"cus_{tag}",
            user_id=f"user_{tag}",
            price=f"unmapped_{tag}",
        ),
        status="parked",
    )


def _ignored(tag: str) -> Scenario:
    return Scenario(ignored(tag), status="ignored")


# By name; each takes a tag that appears in every id, so that scenarios can share a database.
SCENARIOS: Mapping[str, Callable[[str], Scenario]] = {
    "checkout_paid": _checkout_paid,
    "late_binding": _late_binding,
    "invoice": _invoice,
    "charge": _charge,
    "parked": _parked,
    "ignored": _ignored,
}
