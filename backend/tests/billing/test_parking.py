"""What can't be attributed yet is kept, shown and applied by itself once the missing piece is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from backend.app.billing.webhooks import PARKED_PAGE_EVENTS
from backend.app.main import SHIPPED_CATALOG
from backend.app.simulator import objects
from backend.app.simulator.objects import MONTH_SECONDS, Shape
from backend.tests.support.billing import Harness, running_service, unix_now

PREMIUM = 'lookup_keys = ["premium", "premium_monthly", "premium_yearly"]'


def happened(event_id: str, event_type: str, content: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return objects.event(event_id, event_type, content, **{"created": unix_now() - 60, **rest})


def subscription(subscription_id: str = "sub_1", **rest: Any) -> dict[str, Any]:
    start = unix_now() - 3600
    return objects.subscription(
        subscription_id,
        **{"customer": "cus_1", "period_start": start, "period_end": start + MONTH_SECONDS, **rest},
    )


def tie() -> dict[str, Any]:
    session = objects.checkout_session(
        "cs_1", mode="subscription", customer="cus_1", subscription="sub_1", client_reference_id="user_1"
    )
    return happened("evt_tie", "checkout.session.completed", session)


def catalog_with(tmp_path: Path, names: str) -> Path:
    """The shipped catalog, in which premium has more names."""
    path = tmp_path / "catalog.toml"
    text = SHIPPED_CATALOG.read_text(encoding="utf-8")
    assert PREMIUM in text
    path.write_text(text.replace(PREMIUM, names), encoding="utf-8")
    return path


async def status_of(service: Harness, event: dict[str, Any]) -> str:
    response = await service.deliver(event)
    assert response.status_code == 200, response.text
    status: str = response.json()["status"]
    return status


async def events_of(service: Harness) -> dict[str, tuple[str, str | None, str | None]]:
    """Each stored event's status, reason and user."""
    rows = await service.rows("SELECT event_id, status, reason, user_id FROM webhook_events")
    return {row["event_id"]: (row["status"], row["reason"], row["user_id"]) for row in rows}


async def waiting(service: Harness) -> set[str]:
    """The names under which something waits."""
    return {row["name"] for row in await service.rows("SELECT name FROM waiting_names")}


async def actions(service: Harness, action: str) -> list[tuple[str, str]]:
    rows = await service.rows(
        "SELECT user_id, resource_id FROM audit_logs WHERE action = :action", action=action
    )
    return sorted((row["user_id"], row["resource_id"]) for row in rows)


@pytest.mark.parametrize("shape", list(Shape))
async def test_what_came_before_its_checkout_is_given_to_the_user_whom_the_checkout_names(
    service: Harness, shape: Shape
) -> None:
    """Invoice, charge and subscription come first; the tie attributes all three and grants, at once."""
    bill = objects.invoice("in_1", customer="cus_1", subscription_id="sub_1", shape=shape)
    charge = objects.charge("ch_1", customer="cus_1", shape=shape)
    early = [
        (happened("evt_1", "invoice.paid", bill, shape=shape), "parked"),
        (happened("evt_2", "charge.succeeded", charge, shape=shape), "success"),
        (
            happened("evt_3", "customer.subscription.created", subscription(shape=shape), shape=shape),
            "parked",
        ),
    ]
    for event, status in early:
        assert await status_of(service, event) == status
    assert await service.count("user_entitlements") == 0
    assert await service.metric("billing_events_parked") == 2
    assert {row["user_id"] for row in await service.rows("SELECT user_id FROM payment_events")} == {None}

    assert await status_of(service, tie()) == "success"
    lines = await service.rows("SELECT id, stripe_event_id, user_id FROM payment_events")
    assert {line["stripe_event_id"]: line["user_id"] for line in lines} == dict.fromkeys(
        ["evt_1", "evt_2", "evt_3", "evt_tie"], "user_1"
    )
    assert await actions(service, "payment.attributed") == sorted(
        ("user_1", line["id"]) for line in lines if line["stripe_event_id"] != "evt_tie"
    )
    assert await actions(service, "event.unparked") == [("user_1", "evt_1"), ("user_1", "evt_3")]
    stored = await events_of(service)
    assert stored["evt_1"] == stored["evt_3"] == ("success", None, "user_1")
    assert await service.metric("billing_events_parked") == 0
    assert (await service.entitlements("user_1"))["plan_code"] == "premium"
    # The answer that was given stays the answer.
    again = await service.deliver(early[0][0])
    assert (again.json()["status"], again.headers["Idempotent-Replayed"]) == ("parked", "true")


async def test_the_subscriptions_own_metadata_unparks_its_invoice(service: Harness) -> None:
    """Without any customer, by the subscription alone."""
    bill = objects.invoice("in_1", customer=None, subscription_id="sub_1")
    assert await status_of(service, happened("evt_1", "invoice.paid", bill)) == "parked"
    content = subscription(customer=None, metadata={"user_id": "user_1"})
    assert await status_of(service, happened("evt_2", "customer.subscription.created", content)) == "success"
    assert (await events_of(service))["evt_1"] == ("success", None, "user_1")
    (line,) = await service.rows("SELECT user_id FROM payment_events WHERE invoice_id = 'in_1'")
    assert line["user_id"] == "user_1"


async def test_a_guests_purchase_waits_until_its_session_is_named(service: Harness) -> None:
    session = objects.checkout_session("cs_1", metadata={"plan_code": "premium"})
    assert await status_of(service, happened("evt_1", "checkout.session.completed", session)) == "parked"
    named = {**session, "client_reference_id": "user_1"}
    await status_of(service, happened("evt_2", "checkout.session.async_payment_succeeded", named))
    assert (await events_of(service))["evt_1"] == ("success", None, "user_1")
    (line,) = await service.rows("SELECT user_id FROM payment_events")
    assert line["user_id"] == "user_1"
    assert (await service.entitlements("user_1"))["plan_code"] == "premium"


async def test_a_source_that_ends_unclaimed_waits_no_longer(service: Harness) -> None:
    await status_of(service, happened("evt_1", "customer.subscription.created", subscription()))
    ended = subscription(status="canceled", ended_at=unix_now() - 30)
    assert (
        await status_of(
            service, happened("evt_2", "customer.subscription.deleted", ended, created=unix_now() - 30)
        )
        == "success"
    )
    assert (await events_of(service))["evt_1"] == ("success", None, None)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0)])
async def test_money_for_nobody_waits_whenever_it_comes_in_a_subscriptions_life(
    service: Harness, order: tuple[int, ...]
) -> None:
    """Paid before the subscription was heard to be active, or after: both wait for the user."""
    now = unix_now()
    bill = objects.invoice("in_1", customer="cus_1", subscription_id="sub_1")
    events = [
        happened(
            "evt_0", "customer.subscription.created", subscription(status="incomplete"), created=now - 90
        ),
        happened("evt_1", "invoice.paid", bill, created=now - 80),
        happened("evt_2", "customer.subscription.updated", subscription(), created=now - 70),
    ]
    for number in order:
        await status_of(service, events[number])
    assert (await events_of(service))["evt_1"] == ("parked", "unknown_user", None)


async def test_the_owner_hears_once_of_what_is_parked(service: Harness) -> None:
    for number in range(3):
        content = subscription(prices=[objects.price("gold")], metadata={"user_id": "user_1"})
        await status_of(service, happened(f"evt_{number}", "customer.subscription.updated", content))
    (alert,) = await service.rows("SELECT kind, payload FROM outbox")
    assert "unknown_price:gold" in str(alert["payload"])


async def test_an_unreadable_event_is_parked_with_the_field_that_could_not_be_read(service: Harness) -> None:
    """It grants nobody, it is not an error to Stripe, and the owner hears of it."""
    content = {**subscription(metadata={"user_id": "user_1"}), "items": [1, 2]}
    event = happened("evt_1", "customer.subscription.created", content)
    assert await status_of(service, event) == "parked"
    assert (await events_of(service))["evt_1"] == (
        "parked",
        "unreadable:data.object.items is not an object",
        None,
    )
    assert await service.count("payment_events") == await service.count("sources") == 0
    (alert,) = await service.rows("SELECT payload FROM outbox")
    assert "data.object.items is not an object" in str(alert["payload"])


@pytest.mark.parametrize(
    ("price", "metadata", "reason", "names"),
    [
        (
            objects.price("gold"),
            {},
            "unknown_price:gold",
            'lookup_keys = ["premium_monthly", "gold"]',
        ),
        (objects.price(None, price_id="price_1"), {}, "unknown_price:price_1", 'prices = ["price_1"]'),
        # The owner may map any of a price's names, not only the one that was shown.
        (objects.price("gold", price_id="price_1"), {}, "unknown_price:gold", 'prices = ["price_1"]'),
        (objects.price("gold"), {}, "unknown_price:gold", 'products = ["prod_gold"]'),
        (objects.price("gold"), {"plan_code": "no_plan"}, "unknown_plan:no_plan", 'lookup_keys = ["gold"]'),
    ],
)
async def test_an_unknown_price_is_applied_by_itself_once_a_new_catalog_knows_it(
    migrated_url: str,
    tmp_path: Path,
    price: dict[str, Any],
    metadata: dict[str, str],
    reason: str,
    names: str,
) -> None:
    content = subscription(prices=[price], metadata={"user_id": "user_1", **metadata})
    bill = objects.invoice("in_1", customer="cus_1", subscription_id="sub_1", line_price=price)
    async with running_service(migrated_url) as before:
        event = happened("evt_1", "customer.subscription.created", content)
        assert await status_of(before, event) == "parked"
        assert await status_of(before, happened("evt_2", "invoice.paid", bill)) == "success"
        assert (await events_of(before))["evt_1"] == ("parked", reason, "user_1")
        assert (await before.entitlements("user_1"))["plan_code"] == "free"
    async with running_service(migrated_url) as unchanged:
        assert (await events_of(unchanged))["evt_1"] == ("parked", reason, "user_1")

    async with running_service(migrated_url, catalog_file=catalog_with(tmp_path, names)) as after:
        assert (await events_of(after))["evt_1"] == ("success", None, "user_1")
        (row,) = await after.rows("SELECT user_id, plan_code FROM user_entitlements")
        assert row == {"user_id": "user_1", "plan_code": "premium"}
        assert (await after.entitlements("user_1"))["plan_code"] == "premium"
        assert await after.count("payment_events") == 2
        assert await after.rows("SELECT plan_code FROM payment_events WHERE plan_code IS NULL") == []
        granted = await after.rows("SELECT action FROM audit_logs WHERE action = 'entitlement.granted'")
        assert len(granted) == 1
        assert await actions(after, "event.unparked") == [("user_1", "evt_1")]
        assert await after.service.webhooks.rerun_parked() == 0


async def test_a_plan_that_the_catalog_lacked_is_applied_once_it_has_it(
    migrated_url: str, tmp_path: Path
) -> None:
    """Also more of them than are read at a time, and nobody is granted anything before."""
    session_count = PARKED_PAGE_EVENTS + 1
    async with running_service(migrated_url) as before:
        for number in range(session_count):
            session = objects.checkout_session(
                f"cs_{number}", client_reference_id=f"user_{number}", metadata={"plan_code": "gold"}
            )
            event = happened(f"evt_{number}", "checkout.session.completed", session)
            assert await status_of(before, event) == "parked"
        plans = await before.rows("SELECT DISTINCT plan_code FROM user_entitlements")
        assert plans == [{"plan_code": "free"}]
    shipped = SHIPPED_CATALOG.read_text(encoding="utf-8")
    path = tmp_path / "catalog.toml"
    path.write_text(shipped.replace("[plans.vip]", "[plans.gold]"), encoding="utf-8")
    async with running_service(migrated_url, catalog_file=path) as after:
        granted = await after.rows("SELECT count(*) AS n FROM user_entitlements WHERE plan_code = 'gold'")
        assert granted == [{"n": session_count}]
        assert await after.metric("billing_events_parked") == 0


async def test_a_new_catalog_leaves_alone_what_waits_for_its_user(migrated_url: str, tmp_path: Path) -> None:
    async with running_service(migrated_url) as before:
        content = subscription(prices=[objects.price("gold")])
        assert (
            await status_of(before, happened("evt_1", "customer.subscription.created", content)) == "parked"
        )
    path = catalog_with(tmp_path, 'lookup_keys = ["gold"]')
    async with running_service(migrated_url, catalog_file=path) as after:
        assert (await events_of(after))["evt_1"] == ("parked", "unknown_user", None)
        assert await status_of(after, tie()) == "success"
        assert (await after.entitlements("user_1"))["plan_code"] == "premium"


async def test_a_name_is_kept_for_as_long_as_something_waits_under_it_and_no_longer(service: Harness) -> None:
    """Every decision looks there: what no longer waits must not cost the next ones anything."""
    for number in (1, 2):
        created = happened(
            f"evt_{number}",
            "customer.subscription.created",
            subscription(f"sub_{number}", customer=f"cus_{number}", prices=[objects.price("premium")]),
        )
        assert await status_of(service, created) == "parked"
    assert await waiting(service) == {"sub:sub_1", "cus:cus_1", "sub:sub_2", "cus:cus_2"}
    assert await status_of(service, tie()) == "success"
    assert (await events_of(service))["evt_1"][0] == "success"
    assert await waiting(service) == {"sub:sub_2", "cus:cus_2"}
