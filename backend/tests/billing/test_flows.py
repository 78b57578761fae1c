"""Customers' lives through the running service, on both databases: what the API says and what the tables hold."""

from __future__ import annotations

from typing import Any

import pytest

from backend.app.simulator import objects
from backend.app.simulator.objects import DAY_SECONDS, MONTH_SECONDS, Shape
from backend.tests.support.billing import Harness, unix_now

SHAPES = pytest.mark.parametrize("shape", list(Shape))
TEST_EVENT_ID = "evt_00000000000000"


def happened(event_id: str, event_type: str, content: dict[str, Any], **rest: Any) -> dict[str, Any]:
    """An event of a minute ago, unless it says otherwise."""
    return objects.event(event_id, event_type, content, **{"created": unix_now() - 60, **rest})


def subscription(subscription_id: str = "sub_1", **rest: Any) -> dict[str, Any]:
    """A subscription of cus_1 whose month began an hour ago."""
    start = unix_now() - 3600
    return objects.subscription(
        subscription_id,
        **{"customer": "cus_1", "period_start": start, "period_end": start + MONTH_SECONDS, **rest},
    )


def tie(
    event_id: str = "evt_tie", user_id: str = "user_1", *, seconds_ago: int = 120, **rest: Any
) -> dict[str, Any]:
    """The completed checkout that says whose cus_1 and sub_1 are."""
    session = objects.checkout_session(
        rest.pop("session_id", "cs_1"),
        **{
            "mode": "subscription",
            "customer": "cus_1",
            "subscription": "sub_1",
            "client_reference_id": user_id,
            **rest,
        },
    )
    return happened(event_id, "checkout.session.completed", session, created=unix_now() - seconds_ago)


async def sent(service: Harness, event: dict[str, Any]) -> dict[str, Any]:
    response = await service.deliver(event)
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    return document


@SHAPES
async def test_a_subscription_from_checkout_to_upgrade_to_the_end(service: Harness, shape: Shape) -> None:
    """The plan follows the price in the entitlement, the ledger and the audit log; deletion takes it back."""
    now = unix_now()
    # The metadata keeps the first plan's name, as Stripe keeps it.
    metadata = {"user_id": "user_1", "plan_code": "premium"}
    vip = objects.price("vip_monthly", unit_amount=4999)

    await sent(service, tie())
    started = subscription(prices=[objects.price("premium_monthly")], metadata=metadata, shape=shape)
    answer = await sent(
        service,
        happened("evt_1", "customer.subscription.created", started, created=now - 90, shape=shape),
    )
    assert answer == {
        "status": "success",
        "event_id": "evt_1",
        "event_type": "customer.subscription.created",
        "user_id": "user_1",
        "plan_code": "premium",
    }
    assert (await service.entitlements("user_1"))["plan_code"] == "premium"

    upgraded = subscription(prices=[vip], metadata=metadata, shape=shape)
    answer = await sent(
        service,
        happened("evt_2", "customer.subscription.updated", upgraded, created=now - 80, shape=shape),
    )
    assert answer["plan_code"] == "vip"
    bill = objects.invoice(
        "in_1",
        customer="cus_1",
        subscription_id="sub_1",
        amount=2000,
        metadata=metadata,
        line_price=vip,
        shape=shape,
    )
    await sent(service, happened("evt_3", "invoice.paid", bill, created=now - 79, shape=shape))
    access = await service.entitlements("user_1")
    assert (access["plan_code"], access["status"], access["version"]) == ("vip", "active", 3)
    assert access["entitlements"] == {
        "signals_enabled": True,
        "max_devices": 10,
        "analytics_level": "pro",
        "copy_trading": True,
        "dedicated_support": False,
    }
    (row,) = await service.rows("SELECT plan_code, version FROM user_entitlements WHERE user_id = 'user_1'")
    assert row == {"plan_code": "vip", "version": 3}
    lines = await service.rows("SELECT stripe_event_id, plan_code FROM payment_events WHERE user_id='user_1'")
    assert {line["stripe_event_id"]: line["plan_code"] for line in lines} == {
        "evt_tie": "premium",
        "evt_1": "premium",
        "evt_2": "vip",
        "evt_3": "vip",
    }

    ended = subscription(prices=[vip], metadata=metadata, shape=shape, status="canceled", ended_at=now - 70)
    await sent(
        service, happened("evt_4", "customer.subscription.deleted", ended, created=now - 70, shape=shape)
    )
    access = await service.entitlements("user_1")
    assert (access["plan_code"], access["status"], access["valid_until"]) == ("free", "canceled", None)
    history = await service.rows(
        "SELECT version, change, plan_code, cause_event_id FROM entitlement_history ORDER BY version"
    )
    assert [tuple(row.values()) for row in history] == [
        (1, "changed", "free", "evt_tie"),
        (2, "granted", "premium", "evt_1"),
        (3, "changed", "vip", "evt_2"),
        (4, "revoked", "free", "evt_4"),
    ]
    audit = await service.rows(
        "SELECT action FROM audit_logs WHERE user_id = 'user_1' AND action LIKE 'entitlement.%'"
    )
    assert sorted(row["action"] for row in audit) == [
        "entitlement.changed",
        "entitlement.changed",
        "entitlement.granted",
        "entitlement.revoked",
    ]


@SHAPES
async def test_two_events_about_one_paid_invoice_have_one_effect(service: Harness, shape: Shape) -> None:
    await sent(service, tie())
    bill = objects.invoice("in_1", customer="cus_1", subscription_id="sub_1", shape=shape)
    for event_id, event_type in (("evt_1", "invoice.payment_succeeded"), ("evt_2", "invoice.paid")):
        answer = await sent(service, happened(event_id, event_type, bill, shape=shape))
        assert (answer["status"], answer["user_id"]) == ("success", "user_1")
    (line,) = await service.rows("SELECT * FROM payment_events WHERE invoice_id = 'in_1'")
    assert (line["event_type"], line["amount"], line["currency"], line["subscription_id"]) == (
        "invoice_payment_succeeded",
        2999,
        "usd",
        "sub_1",
    )
    audit = await service.rows("SELECT * FROM audit_logs WHERE action = 'payment.event'")
    assert len(audit) == 2
    assert await service.count("webhook_events") == 3


async def test_the_same_event_again_gets_the_same_bytes_and_changes_nothing(service: Harness) -> None:
    event = happened("evt_1", "customer.subscription.created", subscription(metadata={"user_id": "user_1"}))
    first, again = await service.deliver(event), await service.deliver(event)
    assert first.content == again.content
    assert again.headers["Idempotent-Replayed"] == "true"
    assert "Idempotent-Replayed" not in first.headers
    assert await service.count("payment_events") == await service.count("entitlement_history") == 1


@pytest.mark.parametrize("days_ago", [0, 40])
async def test_access_ends_by_itself_when_its_paid_time_is_over(service: Harness, days_ago: int) -> None:
    """Nothing has to happen for it: no event and no timer."""
    start = unix_now() - days_ago * DAY_SECONDS - 3600
    content = subscription(
        metadata={"user_id": "user_1"},
        cancel_at_period_end=True,
        period_start=start,
        period_end=start + MONTH_SECONDS,
    )
    await sent(service, happened("evt_1", "customer.subscription.updated", content, created=start + 60))
    access = await service.entitlements("user_1")
    (source,) = access["sources"]
    assert [plan["granted"] for plan in source["plans"]] == [days_ago == 0]
    if days_ago:
        assert (access["plan_code"], access["status"], access["valid_until"]) == ("free", "expired", None)
    else:
        assert (access["plan_code"], access["status"]) == ("premium", "active")
        assert access["valid_until"] == source["plans"][0]["ends_at"]


@pytest.mark.parametrize(("days_past_due", "plan_code"), [(13, "premium"), (15, "free")])
async def test_a_failed_renewal_keeps_access_for_the_grace_only(
    service: Harness, days_past_due: int, plan_code: str
) -> None:
    failed_at = unix_now() - days_past_due * DAY_SECONDS
    for number, created in enumerate([failed_at, failed_at + DAY_SECONDS]):
        content = subscription(
            metadata={"user_id": "user_1"}, status="past_due", period_start=failed_at - MONTH_SECONDS
        )
        await sent(
            service,
            happened(f"evt_{number}", "customer.subscription.updated", content, created=created),
        )
    assert (await service.entitlements("user_1"))["plan_code"] == plan_code
    bill = objects.invoice("in_1", customer="cus_1", subscription_id="sub_1", paid=False)
    answer = await sent(service, happened("evt_failed", "invoice.payment_failed", bill))
    assert (answer["status"], answer["user_id"]) == ("success", "user_1")
    assert (await service.entitlements("user_1"))["plan_code"] == plan_code


async def test_a_purchase_that_a_slow_bank_pays_is_granted_when_it_is_paid(service: Harness) -> None:
    session = objects.checkout_session(
        "cs_1",
        payment_status="unpaid",
        client_reference_id="user_1",
        metadata={"plan_code": "vip"},
        payment_intent="pi_1",
    )
    answer = await sent(service, happened("evt_1", "checkout.session.completed", session))
    assert answer["status"] == "success"
    access = await service.entitlements("user_1")
    assert (access["plan_code"], access["status"]) == ("free", "awaiting_payment")

    paid = {**session, "payment_status": "paid"}
    await sent(service, happened("evt_2", "checkout.session.async_payment_succeeded", paid))
    access = await service.entitlements("user_1")
    assert (access["plan_code"], access["status"], access["valid_until"]) == ("vip", "active", None)
    lines = await service.rows("SELECT event_type, settled FROM payment_events ORDER BY created_at, id")
    assert {line["event_type"]: bool(line["settled"]) for line in lines} == {
        "checkout_completed": False,
        "checkout_async_payment_succeeded": True,
    }


@pytest.mark.parametrize(
    ("event_type", "changes", "plan_code"),
    [
        ("checkout.session.completed", {"payment_status": "no_payment_required", "amount_total": 0}, "vip"),
        ("checkout.session.completed", {"payment_status": "unpaid"}, "free"),
        ("checkout.session.async_payment_failed", {"payment_status": "unpaid"}, "free"),
        ("checkout.session.expired", {"payment_status": "unpaid", "status": "expired"}, "free"),
    ],
)
async def test_only_a_paid_or_free_purchase_grants(
    sqlite_service: Harness, event_type: str, changes: dict[str, Any], plan_code: str
) -> None:
    session = objects.checkout_session(
        "cs_1", client_reference_id="user_1", metadata={"plan_code": "vip"}, **changes
    )
    answer = await sent(sqlite_service, happened("evt_1", event_type, session))
    assert (answer["status"], answer["user_id"]) == ("success", "user_1")
    assert (await sqlite_service.entitlements("user_1"))["plan_code"] == plan_code


async def test_a_setup_session_is_ignored(sqlite_service: Harness) -> None:
    session = objects.checkout_session("cs_1", mode="setup", client_reference_id="user_1")
    assert (await sent(sqlite_service, happened("evt_1", "checkout.session.completed", session)))[
        "status"
    ] == "ignored"
    assert await sqlite_service.count("payment_events") == 0


async def test_money_alone_is_recorded_with_or_without_a_user(service: Harness) -> None:
    """Charges, intents, refunds and disputes are ledger lines; none of them grants or revokes."""
    await sent(service, happened("evt_s", "customer.subscription.created", subscription()))
    await sent(service, tie())
    dispute = {"id": "dp_1", "object": "dispute", "amount": 2999, "currency": "usd", "charge": "ch_1"}
    money = [
        ("charge.succeeded", objects.charge("ch_1", customer="cus_1")),
        ("payment_intent.succeeded", objects.payment_intent("pi_1", customer="cus_1")),
        ("charge.succeeded", objects.charge("ch_2")),
        ("charge.refunded", objects.charge("ch_1", customer="cus_1", amount_refunded=2999)),
        ("refund.created", objects.refund("re_1", charge_id="ch_1")),
        ("charge.refund.updated", objects.refund("re_1", charge_id="ch_1")),
        ("charge.dispute.created", dispute),
        ("charge.dispute.funds_withdrawn", dispute),
    ]
    for number, (event_type, content) in enumerate(money):
        answer = await sent(service, happened(f"evt_{number}", event_type, content))
        assert answer["status"] == "success"
    lines = await service.rows(
        "SELECT event_type, user_id FROM payment_events "
        "WHERE stripe_event_id NOT IN ('evt_s', 'evt_tie') ORDER BY stripe_event_id"
    )
    assert [(line["event_type"], line["user_id"]) for line in lines] == [
        ("charge_succeeded", "user_1"),
        ("payment_intent_succeeded", "user_1"),
        ("charge_succeeded", None),
        ("charge_refunded", "user_1"),
        ("refund_created", None),
        ("charge_dispute_created", None),
        ("charge_dispute_funds_withdrawn", None),
    ]
    assert (await service.entitlements("user_1"))["plan_code"] == "premium"


async def test_the_best_of_all_subscriptions_counts_and_one_end_leaves_the_other(service: Harness) -> None:
    metadata = {"user_id": "user_1"}
    premium = subscription(metadata=metadata)
    vip = subscription("sub_2", metadata=metadata, prices=[objects.price("vip")])
    await sent(service, happened("evt_1", "customer.subscription.created", premium))
    await sent(service, happened("evt_2", "customer.subscription.created", vip))
    access = await service.entitlements("user_1")
    assert access["plan_code"] == "vip"
    assert [source["source"] for source in access["sources"]] == ["sub:sub_1", "sub:sub_2"]
    ended = {**vip, "status": "canceled", "ended_at": unix_now() - 30}
    await sent(service, happened("evt_3", "customer.subscription.deleted", ended, created=unix_now() - 30))
    assert (await service.entitlements("user_1"))["plan_code"] == "premium"


async def test_an_old_event_that_comes_late_does_not_undo_a_newer_one(service: Harness) -> None:
    metadata = {"user_id": "user_1"}
    now = unix_now()
    ended = subscription(metadata=metadata, status="canceled", ended_at=now - 60)
    await sent(service, happened("evt_2", "customer.subscription.deleted", ended))
    late = subscription(metadata=metadata)
    await sent(service, happened("evt_1", "customer.subscription.updated", late, created=now - 600))
    access = await service.entitlements("user_1")
    assert (access["plan_code"], access["status"]) == ("free", "canceled")


async def test_an_event_of_the_other_mode_is_answered_and_never_granted(service: Harness) -> None:
    content = subscription(metadata={"user_id": "user_1"})
    answer = await sent(service, happened("evt_1", "customer.subscription.created", content, livemode=True))
    assert (answer["status"], answer["user_id"], answer["plan_code"]) == ("ignored", None, None)
    for table in ("payment_events", "user_entitlements", "sources", "audit_logs"):
        assert await service.count(table) == 0
    (row,) = await service.rows("SELECT status, reason FROM webhook_events")
    assert row == {"status": "ignored", "reason": "other_livemode"}


async def test_connected_accounts_do_not_share_ids(service: Harness) -> None:
    """The same event, customer and subscription ids of two accounts are about two different things."""
    await sent(service, tie())
    for number, account in enumerate(["acct_1", "acct_2"]):
        content = subscription(metadata={"user_id": f"connected_{number}"})
        answer = await sent(
            service, happened("evt_1", "customer.subscription.created", content, account=account)
        )
        assert (answer["status"], answer["user_id"]) == ("success", f"connected_{number}")
        (source,) = (await service.entitlements(f"connected_{number}"))["sources"]
        assert source["account"] == account
    stranger = happened("evt_2", "customer.subscription.created", subscription("sub_2"), account="acct_3")
    assert (await sent(service, stranger))["status"] == "parked"
    assert (await service.entitlements("user_1"))["plan_code"] == "free"


async def test_the_dashboards_test_event_is_accepted_every_time_and_never_stored(service: Harness) -> None:
    event = happened(TEST_EVENT_ID, "invoice.paid", objects.invoice("in_1", customer=None))
    for _ in range(2):
        response = await service.deliver(event)
        assert response.json()["status"] == "ignored"
        assert "Idempotent-Replayed" not in response.headers
    for table in ("webhook_events", "webhook_claims", "payment_events"):
        assert await service.count(table) == 0


async def test_a_type_nobody_here_depends_on_is_ignored_and_kept(sqlite_service: Harness) -> None:
    answer = await sent(sqlite_service, happened("evt_1", "payout.paid", {"id": "po_1", "object": "payout"}))
    assert answer["status"] == "ignored"
    (row,) = await sqlite_service.rows("SELECT reason FROM webhook_events")
    assert row["reason"] == "not_handled"


async def test_a_second_user_never_takes_over_a_customer(service: Harness) -> None:
    """The owner hears of it; the first tie and all that rests on it stay."""
    await sent(service, happened("evt_1", "customer.subscription.created", subscription()))
    await sent(service, tie())
    await sent(service, tie("evt_2", "user_2", seconds_ago=60, session_id="cs_2", subscription="sub_2"))
    await sent(service, happened("evt_3", "customer.subscription.created", subscription("sub_3")))
    access = await service.entitlements("user_1")
    assert [source["source"] for source in access["sources"]] == ["sub:sub_1", "sub:sub_3"]
    assert (await service.entitlements("user_2"))["plan_code"] == "free"
    alerts = await service.rows("SELECT payload FROM outbox")
    assert any("holds: user user_1." in str(alert["payload"]) for alert in alerts)


async def test_a_long_lived_subscription_keeps_the_user_and_plan_of_its_checkout(service: Harness) -> None:
    """Sixty-five renewals later its checkout still counts more than the metadata beside it."""
    now = unix_now()
    await sent(service, tie(metadata={"plan_code": "vip"}, customer=None))
    unmapped = [objects.price(None, price_id="price_unmapped")]
    for number in range(65):
        content = subscription(prices=unmapped, metadata={"user_id": "user_2"}, customer=None)
        event = happened(
            f"evt_{number:02}", "customer.subscription.updated", content, created=now - 50 + number // 2
        )
        await sent(service, event)
    assert (await service.entitlements("user_1"))["plan_code"] == "vip"
    assert (await service.entitlements("user_2"))["plan_code"] == "free"


def upgraded_then_ended() -> dict[str, dict[str, Any]]:
    """A subscription that began as premium, paid, became vip and ended; by what happened."""
    began = unix_now() - 4 * DAY_SECONDS

    def snapshot(price: str, **rest: Any) -> dict[str, Any]:
        return subscription(
            prices=[objects.price(price)], period_start=began, metadata={"user_id": "user_1"}, **rest
        )

    paid = objects.invoice("in_1", customer="cus_1", subscription_id="sub_1", period_start=began)
    day = DAY_SECONDS
    return {
        "created": happened(
            "evt_1", "customer.subscription.created", snapshot("premium_monthly"), created=began
        ),
        "paid": happened("evt_2", "invoice.paid", paid, created=began + day),
        "upgraded": happened(
            "evt_3", "customer.subscription.updated", snapshot("vip_monthly"), created=began + 2 * day
        ),
        "ended": happened(
            "evt_4",
            "customer.subscription.deleted",
            snapshot("vip_monthly", status="canceled", ended_at=began + 3 * day),
            created=began + 3 * day,
        ),
    }


@pytest.mark.parametrize(
    ("order", "plan_code"),
    [
        (("created", "paid", "upgraded", "ended"), "premium"),
        (("created", "ended", "upgraded", "paid"), "premium"),
        (("ended", "upgraded", "created", "paid"), "premium"),
        # Of its beginning nothing was heard.
        (("ended", "paid"), "vip"),
    ],
)
async def test_money_is_written_with_the_plan_of_its_time_however_late_it_comes(
    service: Harness, order: tuple[str, ...], plan_code: str
) -> None:
    life = upgraded_then_ended()
    for what in order:
        await sent(service, life[what])
    (line,) = await service.rows(
        "SELECT user_id, plan_code FROM payment_events WHERE event_type = 'invoice_paid'"
    )
    assert (line["user_id"], line["plan_code"]) == ("user_1", plan_code)
