"""A deleted customer's personal data leaves the stored events; ledger, entitlements and proofs stay as they are."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import Any

import pytest
import sqlalchemy as sa

from backend.app.billing import pseudonymise
from backend.app.billing.rebuild import Rebuild
from backend.app.simulator import objects
from backend.tests.support.billing import Harness, unix_now

EMAIL = "jane.personal@example.com"


def customer(customer_id: str = "cus_1", email: str = EMAIL) -> dict[str, Any]:
    return {
        **objects.customer(customer_id),
        "email": email,
        "name": email,
        "metadata": {"user_id": f"user_of_{customer_id}"},
    }


def happened(
    event_id: str, event_type: str, content: dict[str, Any], *, after: int = 0, **rest: Any
) -> dict[str, Any]:
    return objects.event(event_id, event_type, content, created=unix_now() - 3600 + after, **rest)


def life() -> list[dict[str, Any]]:
    """A customer who bought and disputed, with personal data in every event, up to the deletion."""
    now = unix_now()
    person = {"email": EMAIL, "name": EMAIL, "phone": EMAIL, "address": {"line1": EMAIL}}
    subscription = objects.subscription(
        "sub_1", customer="cus_1", period_start=now - 3600, period_end=now + objects.MONTH_SECONDS
    )
    bill = objects.invoice("in_1", customer="cus_1", subscription_id="sub_1")
    charge = objects.charge("ch_1", customer="cus_1", payment_intent="pi_1")
    # Neither a dispute nor its payment method's event names our customer in a way that is decided on.
    dispute = objects.dispute("dp_1", intent_id="pi_1", charge_id="ch_1")
    method = {"id": "pm_1", "object": "payment_method", "customer": "cus_1", "billing_details": person}
    return [
        happened("evt_1", "customer.created", customer()),
        happened("evt_2", "customer.subscription.created", subscription, after=1),
        happened("evt_3", "invoice.paid", {**bill, "customer_email": EMAIL, "customer_name": EMAIL}, after=2),
        happened("evt_4", "charge.succeeded", {**charge, "billing_details": person}, after=3),
        happened(
            "evt_5",
            "charge.dispute.created",
            {**dispute, "evidence": {"customer_email_address": EMAIL}},
            after=4,
        ),
        happened("evt_6", "payment_method.attached", method, after=5),
        happened(
            "evt_7",
            "customer.updated",
            customer(),
            after=6,
            previous_attributes={"email": EMAIL, "name": EMAIL},
        ),
        happened("evt_8", "customer.deleted", customer(), after=7),
    ]


async def pseudonymised(service: Harness) -> None:
    """Lets the delay pass and waits until the run is over."""
    for _ in range(200):
        async with service.service.database.transaction() as tx:
            await tx.execute(
                sa.text(
                    "UPDATE outbox SET next_attempt_at = NULL WHERE kind = 'pseudonymise' AND lease_token IS NULL"
                )
            )
        service.service.relay.wake()
        waiting = await service.rows(
            "SELECT last_error FROM outbox WHERE kind = 'pseudonymise' AND delivered_at IS NULL"
        )
        if not waiting:
            return
        assert not any(row["last_error"] for row in waiting), waiting
        await asyncio.sleep(0.02)
    raise AssertionError("the run did not end")


async def stored(service: Harness) -> dict[str, bytes]:
    rows = await service.rows("SELECT event_id, payload FROM webhook_events")
    return {row["event_id"]: bytes(row["payload"]) for row in rows}


async def differences(service: Harness) -> list[Any]:
    made = service.service
    rebuild = Rebuild(made.database, made.catalog, clock=service.clock, livemode=made.settings.livemode)
    return list((await rebuild.check()).differences)


async def test_a_deleted_customers_personal_data_leaves_every_stored_event(service: Harness) -> None:
    bodies = {event["id"]: json.dumps(event).encode() for event in life()}
    for body in bodies.values():
        assert (await service.deliver(body)).status_code == 200
    assert all(
        EMAIL.encode() in payload for name, payload in (await stored(service)).items() if name != "evt_2"
    )
    ledger = (
        "SELECT effect_key, amount, customer_id, user_id, settled FROM payment_events ORDER BY effect_key"
    )
    ledger_before = await service.rows(ledger)
    access = await service.entitlements("user_of_cus_1")

    await pseudonymised(service)

    after = await stored(service)
    assert [name for name, payload in after.items() if EMAIL.encode() in payload] == []
    hashes = await service.rows("SELECT event_id, payload_sha256 FROM webhook_events")
    assert {row["event_id"]: row["payload_sha256"] for row in hashes} == {
        name: hashlib.sha256(body).hexdigest() for name, body in bodies.items()
    }
    assert await service.rows(ledger) == ledger_before
    assert (await service.entitlements("user_of_cus_1"))["entitlements"] == access["entitlements"]
    assert await differences(service) == []


async def test_the_audit_log_says_how_many_events_and_nothing_personal(service: Harness) -> None:
    for event in life():
        await service.deliver(event)
    await pseudonymised(service)
    (row,) = await service.rows("SELECT * FROM audit_logs WHERE action = 'customer.pseudonymised'")
    details = row["details"] if isinstance(row["details"], dict) else json.loads(row["details"])
    assert details == {"account": "", "livemode": False, "events": 7}
    assert (row["resource_id"], row["actor"], row["user_id"]) == ("cus_1", "stripe:evt_8", None)
    assert EMAIL not in str(row)


@pytest.mark.parametrize(
    ("event_type", "content"),
    [
        ("payment_method.detached", {"id": "pm_1", "customer": "cus_1", "billing_details": {"email": EMAIL}}),
        ("invoice.updated", {"id": "in_9", "customer": "cus_1", "customer_email": EMAIL}),
        (
            "charge.dispute.closed",
            {"id": "dp_1", "payment_intent": "pi_1", "status": "lost", "evidence": {"access_log": EMAIL}},
        ),
        ("invoice.paid", {"id": 7, "customer": "cus_1", "customer_email": EMAIL}),
    ],
    ids=["nothing depends on it", "understood", "names no customer", "unreadable"],
)
async def test_what_is_heard_of_a_deleted_customer_later_loses_its_personal_data_too(
    service: Harness, event_type: str, content: dict[str, Any]
) -> None:
    for event in life():
        if event["type"] == "invoice.paid":
            # Only by its links is the dispute the customer's.
            link = objects.invoice_payment("inpay_1", invoice_id="in_1", intent_id="pi_1")
            await service.deliver(happened("evt_link", "invoice_payment.paid", link))
        await service.deliver(event)
    await pseudonymised(service)
    await service.deliver(happened("evt_late", event_type, content, after=60))
    assert EMAIL.encode() in (await stored(service))["evt_late"]
    await pseudonymised(service)
    assert EMAIL.encode() not in (await stored(service))["evt_late"]
    assert await differences(service) == []


async def test_other_customers_and_accounts_keep_their_data(service: Harness) -> None:
    await service.deliver(happened("evt_o1", "customer.created", customer("cus_2", "else@example.com")))
    await service.deliver(happened("evt_o2", "customer.created", customer(), account="acct_1"))
    for event in life():
        await service.deliver(event)
    await pseudonymised(service)
    after = await stored(service)
    assert b"else@example.com" in after["evt_o1"]
    assert EMAIL.encode() in after["evt_o2"]


async def test_more_events_than_a_page_are_all_found(
    service: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pseudonymise, "PAGE_EVENTS", 3)
    for event in life():
        await service.deliver(event)
    await pseudonymised(service)
    assert not any(EMAIL.encode() in payload for payload in (await stored(service)).values())
    rows = await service.rows("SELECT details FROM audit_logs WHERE action = 'customer.pseudonymised'")
    counts = [
        row["details"] if isinstance(row["details"], dict) else json.loads(row["details"]) for row in rows
    ]
    assert sum(count["events"] for count in counts) == 7


async def test_doing_it_again_changes_nothing(service: Harness) -> None:
    for event in life():
        await service.deliver(event)
    await pseudonymised(service)
    once = await stored(service)
    async with service.service.database.transaction() as tx:
        await tx.execute(sa.text("UPDATE outbox SET delivered_at = NULL WHERE kind = 'pseudonymise'"))
    await pseudonymised(service)
    assert await stored(service) == once
    audited = await service.rows("SELECT id FROM audit_logs WHERE action = 'customer.pseudonymised'")
    assert len(audited) == 1


async def test_it_waits_until_what_was_processed_beside_the_deletion_is_stored(service: Harness) -> None:
    for event in life():
        await service.deliver(event)
    (row,) = await service.rows(
        "SELECT next_attempt_at, created_at, attempts FROM outbox WHERE kind = 'pseudonymise'"
    )
    assert row["attempts"] == 0
    assert row["next_attempt_at"] > row["created_at"]
