"""What load balancers and Prometheus see, and which doors exist at all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from prometheus_client.parser import text_string_to_metric_families

from backend.app.simulator import objects
from backend.tests.support.billing import Harness, running_service
from backend.tests.support.servers import ValkeyServer

# Every way in. A new one is added here on purpose, after asking who may use it.
ROUTES = {
    ("DELETE", "/api/v1/users/{user_id}/grants/{grant_id}"),
    ("GET", "/api/v1/audit"),
    ("GET", "/api/v1/events"),
    ("GET", "/api/v1/events/parked"),
    ("GET", "/api/v1/payments"),
    ("GET", "/api/v1/users/{user_id}/grants"),
    ("POST", "/api/v1/claim-links"),
    ("POST", "/api/v1/claims/{token}"),
    ("POST", "/api/v1/events/reprocess-parked"),
    ("POST", "/api/v1/events/{event_id}/reprocess"),
    ("POST", "/api/v1/users/{user_id}/claims"),
    ("POST", "/api/v1/users/{user_id}/grants"),
    ("GET", "/api/v1/entitlements/{user_id}"),
    ("GET", "/api/v1/entitlements/{user_id}/history"),
    ("GET", "/api/v1/entitlements/{user_id}/{feature}"),
    ("GET", "/livez"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/problems/{slug}"),
    ("GET", "/readyz"),
    ("HEAD", "/openapi.json"),
    ("POST", "/api/v1/billing/webhooks"),
    ("POST", "/ofrep/v1/evaluate/flags"),
    ("POST", "/ofrep/v1/evaluate/flags/{key}"),
}
NEEDS_NO_KEY = {
    "/livez",
    "/metrics",
    "/openapi.json",
    "/problems/{slug}",
    "/readyz",
    "/api/v1/billing/webhooks",
}


def ways_in(routes: list[Any]) -> Iterator[tuple[str, str]]:
    """(method, path) of each route, those of included routers too."""
    for route in routes:
        included = getattr(route, "original_router", None)
        if included is not None:
            yield from ways_in(included.routes)
        else:
            assert not hasattr(route, "app") or hasattr(route, "methods"), f"a mounted application: {route}"
            for method in route.methods:
                yield method, route.path


def test_there_is_no_door_but_the_known_ones(sqlite_service: Harness) -> None:
    assert set(ways_in(sqlite_service.app.routes)) == ROUTES


async def test_every_route_but_the_public_ones_asks_for_a_key(sqlite_service: Harness) -> None:
    for method, path in ROUTES:
        if path not in NEEDS_NO_KEY:
            response = await sqlite_service.client.request(method, path.replace("{user_id}", "usr_1"))
            assert response.status_code == 401, (method, path)


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/docs",
            "/redoc",
            "/debug",
            "/test",
            "/admin",
            "/.env",
            "/stripe/test/webhook",
            "/api/debug/stripe",
        ),
        *("/api/v1/billing/webhooks/test", "/api/v1/keys", "/console/../.env", "/static/../../etc/passwd"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_no_backdoor_answers(sqlite_service: Harness, method: str, path: str) -> None:
    assert (await sqlite_service.client.request(method, path)).status_code == 404


@pytest.mark.parametrize(
    "header",
    ["X-Djstripe-Webhook-Secret", "X-Webhook-Secret", "X-Debug", "X-Skip-Signature", "X-Forwarded-User"],
)
async def test_no_header_turns_the_signature_check_off(sqlite_service: Harness, header: str) -> None:
    secret = "whsec_chosen_by_the_caller_himself"
    sqlite_service.client.headers[header] = secret
    event = {"id": "evt_1", "type": "charge.succeeded", "data": {"object": {"amount": 1}}}
    assert (await sqlite_service.deliver(event, secret=secret)).status_code == 403


class TestHealth:
    async def test_a_healthy_service_says_so(self, service: Harness) -> None:
        assert (await service.client.get("/livez")).json() == {"status": "ok"}
        assert (await service.client.get("/readyz")).json() == {
            "status": "ok",
            "database": "ok",
            "redis": "off",
        }

    async def test_a_database_of_another_version_is_not_ready_but_alive(self, service: Harness) -> None:
        async with service.service.database.transaction() as tx:
            await tx.execute(sa.text("UPDATE alembic_version SET version_num = '0000'"))
        response = await service.client.get("/readyz")
        assert response.status_code == 503
        assert "migrate" in response.json()["detail"]
        assert (await service.client.get("/livez")).status_code == 200

    async def test_redis_may_fail_without_making_the_service_unready(
        self, migrated_sqlite_url: str, redis_url: str, valkey_server: ValkeyServer
    ) -> None:
        async with running_service(migrated_sqlite_url, redis_url=redis_url) as harness:
            assert (await harness.client.get("/readyz")).json()["redis"] == "ok"
            valkey_server.stop()
            response = await harness.client.get("/readyz")
            assert (response.status_code, response.json()["redis"]) == (200, "degraded")


class TestMetrics:
    async def test_the_text_is_what_prometheus_reads(self, service: Harness) -> None:
        response = await service.client.get("/metrics")
        assert response.headers["Content-Type"].startswith("text/plain; version=")
        names = {family.name for family in text_string_to_metric_families(response.text)}
        assert {
            "billing_webhook_replay_block",
            "billing_webhook_invalid_sig",
            "idempotent_hits",
            "billing_webhook_deliveries",
            "billing_webhook_duration_seconds",
            "billing_events_parked",
            "entitlement_changes",
            "audit_events",
            "alerts_sent",
            "billing_seconds_since_last_event",
            "billing_drift_users",
        } <= names

    async def test_parked_events_and_the_age_of_the_newest_are_as_in_the_database(
        self, service: Harness
    ) -> None:
        assert await service.metric("billing_seconds_since_last_event") == -1
        now = int(service.clock.now().timestamp())
        session = objects.checkout_session(
            "cs_1", client_reference_id="usr_1", metadata={"plan_code": "platinum"}, created=now
        )
        await service.deliver(objects.event("evt_1", "checkout.session.completed", session, created=now))
        service.clock.advance(seconds=90)
        assert await service.metric("billing_events_parked") == 1
        assert 90 <= await service.metric("billing_seconds_since_last_event") < 91
