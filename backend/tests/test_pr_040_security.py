"""The review that started this service, point by point: what it asked for, over HTTP and in the tables."""

from __future__ import annotations

import hashlib
import hmac
import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import stripe
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import inspect as inspect_schema
from structlog.testing import capture_logs

from backend.app.audit.models import AuditLog, audit_logs
from backend.app.billing.models import PaymentEvent, UserEntitlement, payment_events, user_entitlements
from backend.app.billing.routes import WEBHOOK_PATH
from backend.app.billing.security import WebhookReplayProtection, sign
from backend.app.core.api_keys import Scope
from backend.app.core.clock import SystemClock
from backend.app.core.errors import PROBLEM_CONTENT_TYPE
from backend.app.core.idempotency import Answer, IdempotencyHandler, MemoryStore, idempotent
from backend.app.observability.metrics import MetricsCollector, get_metrics
from backend.app.ops.alerts import send_owner_alert
from backend.app.simulator import objects
from backend.tests.support.billing import Harness, running_service
from backend.tests.support.service import ServiceProcess

REVIEW_SECRET = "whsec_test"
# Byte for byte what the review's own test sends.
REPLAY_EVENT = json.dumps(
    {"id": "evt_replay_test", "type": "charge.succeeded", "data": {"object": {"amount": 2999}}}
).encode()
FORGED_HEADER = "t=1234567890,v1=invalid_hash_value"
REPLAY_COUNTERS: tuple[tuple[str, dict[str, str]], ...] = (
    ("billing_webhook_replay_block_total", {}),
    ("idempotent_hits_total", {"operation": "webhook"}),
)
PREMIUM = {
    "signals_enabled": True,
    "max_devices": 5,
    "analytics_level": "advanced",
    "copy_trading": False,
    "dedicated_support": False,
}
VIP = {
    "signals_enabled": True,
    "max_devices": 10,
    "analytics_level": "pro",
    "copy_trading": True,
    "dedicated_support": False,
}


def paid_checkout(
    harness: Harness,
    event_id: str = "evt_checkout",
    plan: str = "premium",
    amount: int = 2999,
    age_seconds: int = 0,
) -> dict[str, Any]:
    """A one-time purchase of a plan by usr_123."""
    now = int(harness.clock.now().timestamp()) - age_seconds
    session = objects.checkout_session(
        f"cs_{event_id}",
        amount_total=amount,
        customer="cus_123",
        client_reference_id="usr_123",
        metadata={"plan_code": plan},
        created=now,
    )
    return objects.event(event_id, "checkout.session.completed", session, created=now)


def as_json(value: Any) -> Any:
    """A JSON column as people's SQL clients show it: text on SQLite and on PostgreSQL."""
    return json.loads(value) if isinstance(value, str) else value


class RealService:
    """A server process, spoken to as Stripe does."""

    def __init__(self, process: ServiceProcess, directory: Path) -> None:
        self.process = process
        self.database_path = directory / "tollkeeper.db"
        self.client = httpx.Client(base_url=process.url, trust_env=False)

    def post(self, body: bytes, signature: str) -> httpx.Response:
        return self.client.post(WEBHOOK_PATH, content=body, headers={"Stripe-Signature": signature})

    def metric(self, name: str, **labels: str) -> float:
        for family in text_string_to_metric_families(self.client.get("/metrics").text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    return float(sample.value)
        raise LookupError(name)

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self.database_path)) as connection:
            return connection.execute(sql).fetchall()


@pytest.fixture(scope="class")
def real_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealService]:
    """One server process on SQLite with the review's secret, for the tests of a class."""
    directory = tmp_path_factory.mktemp("service")
    with ServiceProcess.start(directory, {"STRIPE_WEBHOOK_SECRET": REVIEW_SECRET}) as process:
        service = RealService(process, directory)
        with service.client:
            yield service


class TestTelemetry:
    """Issue 1: the counters exist, count, and appear in /metrics."""

    @pytest.mark.parametrize(
        "name",
        [
            "billing_webhook_replay_block_total",
            "billing_webhook_invalid_sig_total",
            'idempotent_hits_total{operation="webhook"}',
        ],
    )
    async def test_every_counter_is_shown_as_zero_before_it_first_counts(self, name: str) -> None:
        assert f"{name} 0.0\n" in MetricsCollector().render().decode()

    def test_the_collector_has_the_counters_under_the_names_of_the_review(self) -> None:
        metrics = MetricsCollector()
        metrics.billing_webhook_replay_block_total.inc()
        metrics.billing_webhook_invalid_sig_total.inc()
        metrics.idempotent_hits_total.labels(operation="webhook").inc()
        text = metrics.render().decode()
        assert "billing_webhook_replay_block_total 1.0" in text
        assert "billing_webhook_invalid_sig_total 1.0" in text
        assert 'idempotent_hits_total{operation="webhook"} 1.0' in text
        assert get_metrics() is get_metrics()

    async def test_a_new_event_counts_as_no_replay(self, service: Harness) -> None:
        before = [await service.metric(name, **labels) for name, labels in REPLAY_COUNTERS]
        assert (await service.deliver(paid_checkout(service))).status_code == 200
        assert [await service.metric(name, **labels) for name, labels in REPLAY_COUNTERS] == before

    async def test_each_duplicate_raises_both_counters_by_one(self, service: Harness) -> None:
        event = paid_checkout(service)
        await service.deliver(event)
        before = [await service.metric(name, **labels) for name, labels in REPLAY_COUNTERS]
        for count in (1, 2, 3):
            assert (await service.deliver(event)).headers["Idempotent-Replayed"] == "true"
            after = [await service.metric(name, **labels) for name, labels in REPLAY_COUNTERS]
            assert after == [value + count for value in before]

    async def test_each_refused_signature_is_counted_once(self, service: Harness) -> None:
        before = await service.metric("billing_webhook_invalid_sig_total")
        await service.deliver(paid_checkout(service), secret="whsec_of_somebody_else_entirely")
        assert await service.metric("billing_webhook_invalid_sig_total") == before + 1


class TestWebhookEndpointSecurity:
    """Issue 5: the review's three stubs, against a real server, and the same with Stripe's own SDK."""

    def test_webhook_endpoint_requires_valid_signature(self, real_service: RealService) -> None:
        before = real_service.metric("billing_webhook_invalid_sig_total")
        response = real_service.post(b'{"id": "evt_test", "type": "charge.succeeded"}', FORGED_HEADER)
        assert response.status_code == 403
        assert "signature" in response.json()["detail"].lower()
        assert real_service.metric("billing_webhook_invalid_sig_total") == before + 1
        assert real_service.rows("SELECT * FROM webhook_events WHERE event_id = 'evt_test'") == []

    def test_webhook_endpoint_rejects_replay_attacks(self, real_service: RealService) -> None:
        timestamp = str(int(time.time()))
        signed = f"{timestamp}.{REPLAY_EVENT.decode()}".encode()
        signature = hmac.new(REVIEW_SECRET.encode(), signed, hashlib.sha256).hexdigest()
        header = f"t={timestamp},v1={signature}"

        first = real_service.post(REPLAY_EVENT, header)
        assert first.status_code == 200
        assert first.json()["status"] == "success"
        assert "Idempotent-Replayed" not in first.headers

        before = [real_service.metric(name, **labels) for name, labels in REPLAY_COUNTERS]
        second = real_service.post(REPLAY_EVENT, header)
        assert second.status_code == 200
        assert second.json() == first.json()
        assert second.content == first.content
        assert second.headers["Idempotent-Replayed"] == "true"
        after = [real_service.metric(name, **labels) for name, labels in REPLAY_COUNTERS]
        assert after == [value + 1 for value in before]
        assert real_service.rows(
            "SELECT amount FROM payment_events WHERE stripe_event_id = 'evt_replay_test'"
        ) == [(2999,)]

    def test_webhook_endpoint_returns_rfc7807_on_error(self, real_service: RealService) -> None:
        response = real_service.post(b"invalid json", "t=1234567890,v1=invalid")
        assert response.status_code >= 400
        assert response.headers["Content-Type"] == PROBLEM_CONTENT_TYPE
        error = response.json()
        assert error["type"] == "/problems/signature-invalid"
        assert error["title"] == "Invalid signature"
        assert error["status"] == response.status_code
        assert error["detail"]
        assert error["instance"] == WEBHOOK_PATH
        assert error["request_id"] == response.headers["X-Request-Id"]

    def test_a_genuine_signature_over_nonsense_is_400_as_problem_json(
        self, real_service: RealService
    ) -> None:
        header = stripe.WebhookSignature.generate_signature_header("invalid json", REVIEW_SECRET)
        response = real_service.post(b"invalid json", header)
        assert response.status_code == 400
        assert response.headers["Content-Type"] == PROBLEM_CONTENT_TYPE
        assert response.json()["title"] == "Invalid event"

    def test_what_stripes_own_sdk_signs_is_accepted_and_its_retry_is_a_duplicate(
        self, real_service: RealService
    ) -> None:
        body = REPLAY_EVENT.replace(b"evt_replay_test", b"evt_sdk_test")
        now = int(time.time())
        first, retry = (
            real_service.post(
                body, stripe.WebhookSignature.generate_signature_header(body.decode(), REVIEW_SECRET, at)
            )
            # Stripe signs a retry anew, so it is another signature for the same event.
            for at in (now - 60, now)
        )
        assert (first.status_code, first.json()["status"]) == (200, "success")
        assert (retry.status_code, retry.content) == (200, first.content)
        assert retry.headers["Idempotent-Replayed"] == "true"

    def test_what_we_sign_is_accepted_by_stripes_own_sdk(self) -> None:
        header = sign(REPLAY_EVENT, REVIEW_SECRET.encode(), timestamp=int(time.time()))
        assert stripe.WebhookSignature.verify_header(REPLAY_EVENT, header, REVIEW_SECRET, tolerance=300)

    @pytest.mark.parametrize("age_seconds", [301, -302, 86_400])
    def test_a_genuine_signature_outside_the_window_is_refused(
        self, real_service: RealService, age_seconds: int
    ) -> None:
        """In both directions: the SDK alone would let one from the future through."""
        header = stripe.WebhookSignature.generate_signature_header(
            REPLAY_EVENT.decode(), REVIEW_SECRET, int(time.time()) - age_seconds
        )
        response = real_service.post(REPLAY_EVENT, header)
        assert response.status_code == 403
        assert "timestamp" in response.json()["detail"]

    @pytest.mark.parametrize("with_redis", [False, True])
    async def test_the_reviews_event_is_answered_alike_with_and_without_redis(
        self, migrated_url: str, redis_url: str, with_redis: bool
    ) -> None:
        async with running_service(migrated_url, redis_url=redis_url if with_redis else None) as harness:
            first = await harness.deliver(REPLAY_EVENT)
            before = [await harness.metric(name, **labels) for name, labels in REPLAY_COUNTERS]
            second = await harness.deliver(REPLAY_EVENT)
            assert (first.status_code, second.status_code) == (200, 200)
            assert second.content == first.content
            after = [await harness.metric(name, **labels) for name, labels in REPLAY_COUNTERS]
            assert after == [value + 1 for value in before]


class TestEntitlementActivation:
    """Issue 2: who paid has what they paid for."""

    async def test_a_paid_checkout_gives_the_plan_in_the_table_and_in_the_api(self, service: Harness) -> None:
        response = await service.deliver(paid_checkout(service))
        assert response.json() == {
            "status": "success",
            "event_id": "evt_checkout",
            "event_type": "checkout.session.completed",
            "user_id": "usr_123",
            "plan_code": "premium",
        }
        [row] = await service.rows("SELECT * FROM user_entitlements WHERE user_id='usr_123'")
        assert row["plan_code"] == "premium"
        assert as_json(row["entitlements"]) == PREMIUM
        assert row["status"] == "active"
        assert row["activated_at"]
        document = await service.entitlements("usr_123")
        assert document["plan_code"] == "premium"
        assert document["entitlements"] == PREMIUM

    async def test_after_an_upgrade_row_ledger_audit_and_api_all_say_vip(self, service: Harness) -> None:
        await service.deliver(paid_checkout(service, age_seconds=60))
        upgraded = await service.deliver(paid_checkout(service, "evt_upgrade", plan="vip", amount=9999))
        assert upgraded.json()["plan_code"] == "vip"
        [row] = await service.rows("SELECT * FROM user_entitlements WHERE user_id='usr_123'")
        assert (row["plan_code"], as_json(row["entitlements"]), row["version"]) == ("vip", VIP, 2)
        lines = await service.rows("SELECT * FROM payment_events ORDER BY occurred_at")
        assert [(line["plan_code"], line["amount"]) for line in lines] == [("premium", 2999), ("vip", 9999)]
        audit = await service.rows(
            "SELECT * FROM audit_logs WHERE user_id='usr_123' AND action LIKE 'entitlement.%' ORDER BY created_at"
        )
        assert [as_json(entry["details"])["plan_code"] for entry in audit] == ["premium", "vip"]
        assert as_json(audit[1]["details"])["plan_code_before"] == "premium"
        document = await service.entitlements("usr_123")
        assert (document["plan_code"], document["entitlements"]) == ("vip", VIP)

    async def test_an_unknown_plan_gives_nothing_and_is_kept_for_later(self, service: Harness) -> None:
        response = await service.deliver(paid_checkout(service, plan="platinum"))
        assert (response.status_code, response.json()["status"]) == (200, "parked")
        assert (await service.entitlements("usr_123"))["plan_code"] == "free"
        rows = await service.rows("SELECT plan_code FROM user_entitlements WHERE plan_code <> 'free'")
        assert rows == []

    async def test_a_subscriptions_new_price_changes_row_and_api(self, service: Harness) -> None:
        now = int(service.clock.now().timestamp())
        for event_id, kind, plan, at in (
            ("evt_1", "created", "premium_monthly", now - 60),
            ("evt_2", "updated", "vip_monthly", now),
        ):
            content = objects.subscription(
                "sub_1",
                customer="cus_123",
                prices=[objects.price(plan)],
                period_start=now - 60,
                period_end=now + objects.MONTH_SECONDS,
                # Stripe leaves it as it was at the purchase; the price counts.
                metadata={"user_id": "usr_123", "plan_code": "premium"},
            )
            await service.deliver(
                objects.event(event_id, f"customer.subscription.{kind}", content, created=at)
            )
        [row] = await service.rows("SELECT * FROM user_entitlements WHERE user_id='usr_123'")
        assert (row["plan_code"], as_json(row["entitlements"])) == ("vip", VIP)
        assert (await service.entitlements("usr_123"))["plan_code"] == "vip"


class TestPaymentEventLogging:
    """Issue 3: who paid what, and when, is on record."""

    async def test_a_payment_has_one_ledger_line_and_one_audit_row(self, service: Harness) -> None:
        event = paid_checkout(service)
        await service.deliver(event)
        await service.deliver(event)
        [line] = await service.rows("SELECT * FROM payment_events ORDER BY created_at DESC LIMIT 5")
        assert (line["user_id"], line["event_type"]) == ("usr_123", "checkout_completed")
        assert (line["amount"], line["currency"], line["plan_code"]) == (2999, "usd", "premium")
        assert (line["customer_id"], line["stripe_event_id"]) == ("cus_123", "evt_checkout")
        [audit] = await service.rows("SELECT * FROM audit_logs WHERE action = 'payment.event'")
        assert (audit["user_id"], audit["resource_type"]) == ("usr_123", "payment")
        assert audit["resource_id"] == line["id"]
        details = as_json(audit["details"])
        assert (details["event_type"], details["amount"]) == ("checkout_completed", 2999)

    async def test_money_without_a_known_user_is_on_record_too(self, service: Harness) -> None:
        assert (await service.deliver(REPLAY_EVENT)).json()["user_id"] is None
        [line] = await service.rows("SELECT * FROM payment_events")
        assert (line["user_id"], line["event_type"], line["amount"]) == (None, "charge_succeeded", 2999)
        assert await service.count("audit_logs") == 1


class TestIdempotencyLocation:
    """Issue 4: one mechanism in core, used by billing and free for others."""

    def test_billing_has_no_idempotency_module_of_its_own(self) -> None:
        assert IdempotencyHandler.__module__.startswith("backend.app.core.")
        with pytest.raises(ModuleNotFoundError):
            __import__("backend.app.billing.idempotency")

    async def test_replay_protection_remembers_through_the_handler(self) -> None:
        handler = IdempotencyHandler(MemoryStore(SystemClock()), operation="webhook", ttl_seconds=600)
        protection = WebhookReplayProtection(handler, metrics=MetricsCollector())
        assert await protection.check_replay_cache("signature") is None
        await protection.remember("signature", b"answer")
        assert await protection.check_replay_cache("signature") == b"answer"
        cached = await handler.get_cached("signature")
        assert cached == Answer(200, b"answer")

    async def test_any_other_module_can_use_the_decorator(self) -> None:
        runs: list[str] = []
        memory = MemoryStore(SystemClock())

        @idempotent(operation="pr-040-reuse", ttl_seconds=600, key="order", store=lambda _: memory)
        async def ship(order: str) -> dict[str, int]:
            runs.append(order)
            return {"parcel": len(runs)}

        assert await ship("a") == await ship("a") == {"parcel": 1}
        assert await ship("b") == {"parcel": 2}
        assert runs == ["a", "b"]


class TestOwnerAlerts:
    """Issue 3 again: the owner hears when something fails, and an alert that fails harms nothing."""

    async def test_an_alert_without_a_channel_is_logged_and_never_raises(self) -> None:
        with capture_logs() as logs:
            await send_owner_alert("Payment event logging failed: charge_succeeded for user usr_123")
        assert [entry["log_level"] for entry in logs] == ["warning"]
        assert "usr_123" in logs[0]["text"]

    async def test_an_alert_carries_no_secret(self) -> None:
        with capture_logs() as logs:
            await send_owner_alert(f"failed with whsec_{'a' * 32} and 4242 4242 4242 4242")
        assert "a" * 32 not in logs[0]["text"]
        assert "4242" not in logs[0]["text"]

    async def test_a_delivery_that_fails_alerts_the_owner_and_leaves_nothing_behind(
        self, sqlite_service: Harness, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*_: object, **__: object) -> None:
            raise RuntimeError("the ledger is broken")

        with monkeypatch.context() as patch, capture_logs() as logs:
            patch.setattr("backend.app.billing.store.insert_payments", broken)
            assert (await sqlite_service.deliver(REPLAY_EVENT)).status_code == 500
        assert any("evt_replay_test" in entry.get("text", "") for entry in logs)
        assert await sqlite_service.count("payment_events") == 0
        assert (await sqlite_service.deliver(REPLAY_EVENT)).json()["status"] == "success"
        assert await sqlite_service.count("payment_events") == 1


class TestModels:
    """The rows and tables that the review names."""

    @pytest.mark.parametrize(
        ("row", "names"),
        [
            (UserEntitlement, {"id", "user_id", "plan_code", "entitlements", "activated_at", "created_at"}),
            (
                PaymentEvent,
                {"id", "user_id", "event_type", "plan_code", "customer_id", "invoice_id", "subscription_id"}
                | {"amount", "metadata", "created_at"},
            ),
            (
                AuditLog,
                {"id", "user_id", "action", "resource_type", "resource_id", "details", "created_at"},
            ),
        ],
    )
    def test_a_row_has_the_fields_of_the_review(self, row: type, names: set[str]) -> None:
        assert names <= set(row.__annotations__)

    async def test_the_migrated_database_has_every_column_of_the_models(self, service: Harness) -> None:
        async with service.service.database.snapshot() as tx:
            columns = await tx.run_sync(lambda sync: inspect_schema(sync).get_multi_columns())
        for table in (user_entitlements, payment_events, audit_logs):
            found = {column["name"] for column in columns[None, table.name]}
            assert found == set(table.columns.keys())

    async def test_a_user_has_one_entitlement_row_however_much_happens(self, service: Harness) -> None:
        for number in range(5):
            await service.deliver(paid_checkout(service, f"evt_{number}"))
        assert await service.count("user_entitlements") == 1


async def test_the_reviews_manual_check_end_to_end(service: Harness) -> None:
    """Send a payment, look into the three tables, ask the API: all agree."""
    await service.deliver(paid_checkout(service))
    [entitlement] = await service.rows("SELECT * FROM user_entitlements WHERE user_id='usr_123'")
    assert as_json(entitlement["entitlements"])["max_devices"] == 5
    payments = await service.rows("SELECT amount, currency FROM payment_events WHERE user_id='usr_123'")
    assert payments == [{"amount": 2999, "currency": "usd"}]
    audit = await service.rows("SELECT action FROM audit_logs WHERE user_id='usr_123' ORDER BY action")
    assert [row["action"] for row in audit] == ["entitlement.granted", "payment.event"]
    key = await service.service.api_keys.create("review", Scope.READ)
    response = await service.client.get(
        "/api/v1/entitlements/usr_123", headers={"Authorization": f"Bearer {key}"}
    )
    assert response.json()["entitlements"] == as_json(entitlement["entitlements"])
