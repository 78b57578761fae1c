"""What events leave open is settled by asking Stripe: a double on loopback that answers like its API."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest
from pydantic import SecretStr

from backend.app.main import open_stripe_api
from backend.app.simulator import objects
from backend.tests.support.billing import Harness, running_service, test_settings, unix_now

KEY = "sk_test_0123456789abcdefghijklmn"


@dataclass
class StripeDouble:
    """Answers `GET <path>` with the JSON put under that path, 404 for the rest; remembers who asked how."""

    url: str = ""
    objects: dict[str, Any] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    status: int = 200


@pytest.fixture
def stripe_double() -> Iterator[StripeDouble]:
    double = StripeDouble()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # the standard library's name
            path = urlsplit(self.path).path
            double.asked.append((path, {name.lower(): value for name, value in self.headers.items()}))
            found = double.objects.get(path)
            body = json.dumps(found if found is not None else {"error": {"type": "invalid_request"}}).encode()
            self.send_response(double.status if found is not None else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments: object) -> None:
            """Keeps the test's output quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    double.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield double
    server.shutdown()
    server.server_close()
    thread.join()


def page(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"object": "list", "data": list(entries), "has_more": False}


async def relayed(harness: Harness) -> None:
    """Waits until everything staged was delivered."""
    for _ in range(200):
        harness.service.relay.wake()
        rows = await harness.rows(
            "SELECT count(*) AS n FROM outbox WHERE delivered_at IS NULL AND kind = 'reread'"
        )
        if rows[0]["n"] == 0:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("the outbox was not emptied")


async def test_a_purchase_whose_lines_were_not_sent_is_granted_once_they_were_read(
    migrated_url: str, stripe_double: StripeDouble
) -> None:
    session = objects.checkout_session("cs_1", customer="cus_1", client_reference_id="usr_1")
    line = {"id": "li_1", "object": "item", "quantity": 1, "price": objects.price("vip")}
    stripe_double.objects = {
        "/v1/checkout/sessions/cs_1": session,
        "/v1/checkout/sessions/cs_1/line_items": page(line),
    }
    async with running_service(
        migrated_url, stripe_secret_key=SecretStr(KEY), stripe_api_base=stripe_double.url
    ) as harness:
        response = await harness.deliver(
            objects.event("evt_1", "checkout.session.completed", session, created=unix_now())
        )
        assert response.json()["status"] == "parked"
        await relayed(harness)
        assert (await harness.entitlements("usr_1"))["plan_code"] == "vip"
        statuses = await harness.rows("SELECT status FROM webhook_events WHERE event_id = 'evt_1'")
        assert statuses == [{"status": "success"}]
        # The same money, read a second time, is still one line.
        assert await harness.count("payment_events") == 1
    path, headers = stripe_double.asked[0]
    assert path == "/v1/checkout/sessions/cs_1"
    assert headers["authorization"] == f"Bearer {KEY}"
    assert "stripe-version" in headers


async def test_two_snapshots_of_one_second_that_do_not_tell_their_order_are_settled_by_stripe(
    migrated_url: str, stripe_double: StripeDouble
) -> None:
    now = unix_now()

    def snapshot(plan: str) -> dict[str, Any]:
        return objects.subscription(
            "sub_1",
            customer="cus_1",
            prices=[objects.price(plan)],
            period_start=now,
            period_end=now + objects.MONTH_SECONDS,
            metadata={"user_id": "usr_1"},
        )

    stripe_double.objects = {
        "/v1/subscriptions/sub_1": snapshot("premium"),
        "/v1/subscription_items": page(*snapshot("premium")["items"]["data"]),
    }
    async with running_service(
        migrated_url, stripe_secret_key=SecretStr(KEY), stripe_api_base=stripe_double.url
    ) as harness:
        for event_id, plan in (("evt_1", "premium"), ("evt_2", "vip")):
            await harness.deliver(
                objects.event(event_id, "customer.subscription.updated", snapshot(plan), created=now - 5)
            )
        await relayed(harness)
        assert (await harness.entitlements("usr_1"))["plan_code"] == "premium"


async def test_without_a_key_nothing_is_asked_and_the_event_stays_parked(
    migrated_sqlite_url: str, stripe_double: StripeDouble
) -> None:
    session = objects.checkout_session("cs_1", client_reference_id="usr_1")
    async with running_service(migrated_sqlite_url, stripe_api_base=stripe_double.url) as harness:
        response = await harness.deliver(
            objects.event("evt_1", "checkout.session.completed", session, created=unix_now())
        )
        assert response.json()["status"] == "parked"
        assert await harness.rows("SELECT kind FROM outbox WHERE kind = 'reread'") == []
    assert stripe_double.asked == []


async def test_an_object_that_is_gone_is_not_asked_for_again(
    migrated_sqlite_url: str, stripe_double: StripeDouble
) -> None:
    session = objects.checkout_session("cs_1", client_reference_id="usr_1")
    async with running_service(
        migrated_sqlite_url, stripe_secret_key=SecretStr(KEY), stripe_api_base=stripe_double.url
    ) as harness:
        await harness.deliver(
            objects.event("evt_1", "checkout.session.completed", session, created=unix_now())
        )
        await relayed(harness)
        rows = await harness.rows("SELECT status FROM webhook_events")
        assert rows == [{"status": "parked"}]


async def test_while_stripe_fails_the_read_waits_in_the_outbox(
    migrated_sqlite_url: str, stripe_double: StripeDouble
) -> None:
    session = objects.checkout_session("cs_1", client_reference_id="usr_1")
    stripe_double.objects = {"/v1/checkout/sessions/cs_1": session}
    stripe_double.status = 500
    async with running_service(
        migrated_sqlite_url, stripe_secret_key=SecretStr(KEY), stripe_api_base=stripe_double.url
    ) as harness:
        await harness.deliver(
            objects.event("evt_1", "checkout.session.completed", session, created=unix_now())
        )
        for _ in range(200):
            rows = await harness.rows(
                "SELECT attempts, last_error, delivered_at FROM outbox WHERE kind = 'reread'"
            )
            if rows[0]["last_error"]:
                break
            await asyncio.sleep(0.02)
        assert rows[0]["delivered_at"] is None
        assert "500" in rows[0]["last_error"]
        assert KEY not in str(rows)


@pytest.mark.parametrize("key", ["sk_live_0123456789abcdefghijklmn", "pk_test_0123456789abcdef", "nonsense"])
def test_a_key_of_the_other_mode_or_kind_is_refused_without_being_shown(key: str) -> None:
    settings = test_settings("sqlite:///unused.db", stripe_secret_key=SecretStr(key))
    with pytest.raises(ValueError, match="STRIPE_SECRET_KEY") as refusal:
        open_stripe_api(settings)
    assert key not in str(refusal.value)


def test_reads_go_over_https_or_not_beyond_this_machine() -> None:
    settings = test_settings(
        "sqlite:///unused.db", stripe_secret_key=SecretStr(KEY), stripe_api_base="http://example.com"
    )
    with pytest.raises(ValueError, match="STRIPE_API_BASE"):
        open_stripe_api(settings)
