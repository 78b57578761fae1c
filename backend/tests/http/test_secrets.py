"""Card numbers, keys and signatures go in through every door, and come out of none and stay nowhere.

The databases, logs and outputs of these tests are scanned at their ends, like those of all tests (support/leaks.py).
"""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx2 as httpx
import pytest

from backend.app.billing.providers.stripe import TRANSLATORS
from backend.app.billing.routes import WEBHOOK_PATH
from backend.app.billing.security import sign
from backend.app.core.api_keys import Scope
from backend.app.simulator import objects
from backend.tests.support.billing import Harness, running_service
from backend.tests.support.leaks import CARD_PLANTS, PLANTS, SECRET_PLANTS, SIGNATURE_PLANTS, leaks_in
from backend.tests.support.service import ServiceProcess

# Stripe's own limit of metadata entries (docs.stripe.com/api/metadata).
METADATA_ENTRIES_MAX = 50
CLIENT_SECRETS = [plant for plant in SECRET_PLANTS if "_secret_" in plant.text]
# What people paste into free text; a client secret has a field of its own.
FREE_TEXT_PLANTS = [plant for plant in (*CARD_PLANTS, *SECRET_PLANTS) if plant not in CLIENT_SECRETS]
CANARY = "Jd8CanaryOfSettings5Wm"
ALERTS_SECONDS_MAX = 20


def planted(content: dict[str, Any], part: int) -> dict[str, Any]:
    """The object with plants in every text that a customer, a seller or Stripe may fill in."""
    texts = [plant.text for plant in FREE_TEXT_PLANTS]
    chosen = (texts[part:] + texts[:part])[: METADATA_ENTRIES_MAX // 2 - 5]
    content["metadata"] = {
        **content.get("metadata", {}),
        **{f"note_{number}": f"card: {text}, thanks" for number, text in enumerate(chosen)},
        # Written with an escape a key would be the same as the one without, which is refused.
        **{text: "in the key" for text in chosen[:12] if "\\" not in text},
    }
    content["description"] = " and ".join(texts)
    content["client_secret"] = CLIENT_SECRETS[part % len(CLIENT_SECRETS)].text
    content["nested"] = [
        {"client_secret": plant.text, "custom_fields": [{"text": {"value": texts[part % len(texts)]}}]}
        for plant in CLIENT_SECRETS
    ]
    return content


def as_bytes(event: dict[str, Any]) -> bytes:
    """The event's JSON; plants that are written with escapes stay so."""
    return json.dumps(event).replace("\\\\u", "\\u").encode()


def content_of(event_type: str, number: int, now: int) -> dict[str, Any]:
    """A real-shaped object for an event type of ours."""
    metadata = {"user_id": f"usr_{number}", "plan_code": "premium"}
    if event_type.startswith("checkout.session."):
        return objects.checkout_session(
            f"cs_{number}", client_reference_id=f"usr_{number}", metadata=metadata, created=now
        )
    if event_type.startswith("customer.subscription."):
        return objects.subscription(
            f"sub_{number}",
            customer=f"cus_{number}",
            period_start=now,
            period_end=now + objects.MONTH_SECONDS,
            metadata=metadata,
        )
    if event_type.startswith(("invoice.", "invoice_payment.")):
        return objects.invoice(f"in_{number}", customer=f"cus_{number}", metadata=metadata, period_start=now)
    if event_type.startswith("payment_intent."):
        return objects.payment_intent(f"pi_{number}", metadata=metadata, created=now)
    if event_type.startswith(("refund.", "charge.refund.")):
        return objects.refund(f"re_{number}", charge_id=f"ch_{number}", created=now)
    return objects.charge(f"ch_{number}", metadata=metadata, created=now)


class AlertSink:
    """An owner's channel that keeps what it is sent."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        texts = self.texts

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                texts.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the parent's name
                """Prints nothing."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"json://127.0.0.1:{self.server.server_port}/"


@pytest.fixture
def alert_sink() -> Iterator[AlertSink]:
    """A channel that listens on loopback."""
    sink = AlertSink()
    thread = threading.Thread(target=sink.server.serve_forever, daemon=True)
    thread.start()
    yield sink
    sink.server.shutdown()
    sink.server.server_close()
    thread.join()


def assert_clean(*texts: str | bytes) -> None:
    for text in texts:
        assert leaks_in(text, forms=True) == []


async def test_plants_in_every_handled_event_type_stay_nowhere_and_come_back_from_nowhere(
    service: Harness,
) -> None:
    now = int(service.clock.now().timestamp())
    event_types = [*sorted(TRANSLATORS), "customer.created", "some.type.of.tomorrow"]
    for number, event_type in enumerate(event_types):
        content = planted(content_of(event_type, number, now), number)
        body = as_bytes(objects.event(f"evt_{number}", event_type, content, created=now))
        assert leaks_in(body, forms=False), "the plants are really in there"
        for _ in range(2):
            response = await service.deliver(body)
            assert response.status_code == 200, (event_type, response.text)
            assert_clean(response.text, str(response.headers))
    assert await service.count("webhook_events") == len(event_types)
    assert await service.count("payment_events") > 0
    for number in range(len(event_types)):
        assert_clean(json.dumps(await service.entitlements(f"usr_{number}")))
    assert_clean((await service.client.get("/metrics")).content)


async def test_plants_where_names_belong_are_masked_and_the_alerts_about_them_too(
    migrated_url: str, alert_sink: AlertSink
) -> None:
    """A plan code, a price's name or an event's API version may be anything somebody typed."""
    async with running_service(migrated_url, alert_urls=alert_sink.url) as harness:
        now = int(harness.clock.now().timestamp())
        for number, plant in enumerate(FREE_TEXT_PLANTS):
            session = objects.checkout_session(
                f"cs_{number}",
                customer=f"cus_{number}",
                client_reference_id=f"usr_{number}",
                metadata={"plan_code": plant.text, "user_id": f"usr_{number}"},
                created=now,
            )
            event = objects.event(f"evt_{number}", "checkout.session.completed", session, created=now)
            response = await harness.deliver(as_bytes(event))
            assert response.status_code == 200
            assert_clean(response.text)
            price = objects.price(plant.text, price_id=f"price_{number}")
            # Stripe makes ids itself; what stands in one is no card number.
            price["product"] = f"prod_{number}"
            subscription = objects.subscription(
                f"sub_{number}",
                customer=f"cus_{number}",
                prices=[price],
                period_start=now,
                period_end=now + objects.MONTH_SECONDS,
            )
            event = objects.event(
                f"evt_s{number}", "customer.subscription.created", subscription, created=now
            )
            assert_clean((await harness.deliver(as_bytes(event))).text)
        deadline = time.monotonic() + ALERTS_SECONDS_MAX
        while not alert_sink.texts:
            assert time.monotonic() < deadline, "no alert came"
            await harness.service.relay.run_once()
    assert_clean(*alert_sink.texts)


async def test_plants_of_forged_deliveries_and_hostile_headers_leave_nothing(service: Harness) -> None:
    everything = as_bytes({"id": "evt_1", "plants": [plant.text for plant in PLANTS]})
    for plant in (*SECRET_PLANTS, *SIGNATURE_PLANTS):
        for headers in (
            {"Stripe-Signature": plant.text},
            {"Authorization": f"Bearer {plant.text}"},
            {"Cookie": plant.text},
        ):
            response = await service.client.post(WEBHOOK_PATH, content=everything, headers=headers)
            assert response.status_code == 403
            assert_clean(response.text)
    assert await service.count("webhook_events") == 0


@pytest.mark.parametrize("broken", ["store.insert_payments", "store.insert_events", "apply.claim"])
async def test_a_failure_in_the_middle_leaves_a_trace_without_the_plants(
    service: Harness, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """The trace is the failed event's row, the log and an alert."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("broken on purpose")

    now = int(service.clock.now().timestamp())
    content = planted(content_of("charge.succeeded", 1, now), 0)
    body = as_bytes(objects.event("evt_1", "charge.succeeded", content, created=now))
    with monkeypatch.context() as patch:
        patch.setattr(f"backend.app.billing.{broken}", fail)
        response = await service.deliver(body)
    assert response.status_code == 500
    assert_clean(response.text)
    [row] = await service.rows("SELECT status FROM webhook_events")
    assert row["status"] == "failed"


async def test_what_redis_remembers_holds_neither_signature_nor_plant(
    migrated_sqlite_url: str, redis_url: str
) -> None:
    async with running_service(migrated_sqlite_url, redis_url=redis_url) as harness:
        now = int(harness.clock.now().timestamp())
        content = planted(content_of("charge.succeeded", 1, now), 0)
        await harness.deliver(as_bytes(objects.event("evt_1", "charge.succeeded", content, created=now)))
        client = harness.service.redis
        assert client is not None
        keys = await client.keys("*")
        assert keys
        for key in keys:
            assert_clean(key, str(await client.dump(key)))


def test_no_answer_and_no_log_line_shows_a_setting(tmp_path: Path, migrated_postgres_url: str) -> None:
    """A canary stands in every secret setting; all routes are asked, rightly and wrongly."""
    secret = f"whsec_{CANARY}0123456789"
    catalog = tmp_path / f"{CANARY}.toml"
    catalog.write_bytes((Path(objects.__file__).parents[1] / "billing" / "catalog.toml").read_bytes())
    env = {
        "DATABASE_URL": migrated_postgres_url,
        "REDIS_URL": f"redis://user:{CANARY}@127.0.0.1:1/0",
        "STRIPE_WEBHOOK_SECRET": f"main={secret}",
        "ALERT_URLS": f"json://user:{CANARY}@127.0.0.1:1/{CANARY}",
        "CATALOG_FILE": str(catalog),
        "STRIPE_SECRET_KEY": f"sk_test_{CANARY}",
        "NOTIFY_SECRET": f"whsec_{CANARY}",
    }
    body = json.dumps({"id": "evt_1", "type": "charge.succeeded", "data": {"object": {"amount": 1}}}).encode()
    answers: list[httpx.Response] = []
    with (
        ServiceProcess.start(tmp_path, env) as process,
        httpx.Client(base_url=process.url, trust_env=False) as client,
    ):
        for content in (body, b"nonsense", b"x" * 300_000):
            for signature in (
                sign(content, secret.encode(), timestamp=int(time.time())),
                sign(content, secret.encode(), timestamp=1),
                sign(content, b"whsec_wrong", timestamp=int(time.time())),
                "nonsense",
            ):
                headers = {"Stripe-Signature": signature}
                answers.append(client.post(WEBHOOK_PATH, content=content, headers=headers))
        paths = ("/livez", "/readyz", "/metrics", "/openapi.json", "/api/v1/entitlements/usr_1", "/nothing")
        answers += [client.request(method, path) for path in paths for method in ("GET", "POST", "PUT")]
        answers.append(client.get(f"/{quote('é')}", headers={"Authorization": "Bearer x"}))
        log_text = process.log_text()
    assert {answer.status_code for answer in answers} >= {200, 400, 401, 403, 404, 405, 413}
    password = urlsplit(migrated_postgres_url).password
    assert password is not None
    for shown in (*(f"{answer.headers}{answer.text}" for answer in answers), log_text):
        assert CANARY not in shown
        assert password not in shown


async def test_no_answer_shows_the_key_it_was_asked_with(service: Harness) -> None:
    key = await service.service.api_keys.create("test", Scope.READ)
    headers = {"Authorization": f"Bearer {key}"}
    for path in ("/api/v1/entitlements/usr_1", f"/api/v1/entitlements/{'a' * 300}", "/nothing", "/metrics"):
        response = await service.client.get(path, headers=headers)
        assert key not in f"{response.headers}{response.text}"
