"""The questions that are answered ahead of the framework get the very answers that the framework's routes give."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from backend.app.billing.answers import HELD_SECONDS
from backend.app.billing.entitlements import entitlement_document
from backend.app.billing.routes import WEBHOOK_PATH
from backend.app.billing.security import sign
from backend.app.core import api_keys
from backend.app.core.api_keys import KNOWN_SECONDS, ApiKeys, Scope
from backend.app.core.clock import SystemClock
from backend.app.core.database import Database
from backend.app.core.migrations import migrate
from backend.app.core.representation import Representation
from backend.app.main import SHIPPED_CATALOG
from backend.app.simulator import objects
from backend.app.simulator.truth import read_terms
from backend.app.simulator.world import START, Plan, live
from backend.tests.support.billing import (
    WEBHOOK_SECRET,
    Harness,
    deliver_all,
    running_service,
    statements,
)
from backend.tests.support.server_directory import work_directory
from backend.tests.support.servers import PostgresServer
from backend.tests.support.service import ServiceProcess

ENTITLEMENTS = "/api/v1/entitlements"
FLAGS = "/ofrep/v1/evaluate/flags"
USERS = 8
# A query that no route knows leaves a question to the framework.
ROUTED = "?routed"


async def reader(harness: Harness) -> dict[str, str]:
    key = await harness.service.api_keys.create("test", Scope.READ)
    return {"Authorization": f"Bearer {key}"}


def same(ahead: httpx.Response, routed: httpx.Response) -> httpx.Response:
    """One of two answers that must not differ in anything but the id of the request."""

    def told(response: httpx.Response) -> tuple[int, list[tuple[str, str]], Any]:
        headers = [(name, value) for name, value in response.headers.multi_items() if name != "x-request-id"]
        body: Any = response.content
        if body and response.headers.get("Content-Type") == "application/problem+json":
            body = {**response.json(), "request_id": ""}
        return response.status_code, headers, body

    assert ahead.headers["X-Request-Id"]
    assert told(ahead) == told(routed)
    return ahead


async def get(harness: Harness, path: str, headers: dict[str, str], *, method: str = "GET") -> httpx.Response:
    return same(
        await harness.client.request(method, path, headers=headers),
        await harness.client.request(method, path + ROUTED, headers=headers),
    )


async def post(harness: Harness, path: str, body: bytes, headers: dict[str, str]) -> httpx.Response:
    return same(
        await harness.client.post(path, content=body, headers=headers),
        await harness.client.post(path + ROUTED, content=body, headers=headers),
    )


async def test_every_form_of_every_users_answer_is_what_is_computed_anew(service: Harness) -> None:
    """Simulated lives with all that a seller meets, asked about all at once, twice."""
    plan = Plan(seed=23, start=START, days=90, terms=read_terms(SHIPPED_CATALOG.read_text("utf-8")))
    histories = [live(plan, number) for number in range(USERS)]
    await deliver_all(service, histories)
    users = [*(history.user_id for history in histories), "usr_nobody"]
    headers = await reader(service)
    catalog = service.service.catalog

    async def check(user_id: str) -> None:
        asked = await get(service, f"{ENTITLEMENTS}/{user_id}", headers)
        view = await service.service.entitlements.view(user_id)
        expected = Representation.of(entitlement_document(view))
        assert (asked.content, asked.headers["ETag"]) == (expected.body, expected.etag)
        question = json.dumps({"context": {"targetingKey": user_id}}).encode()
        flags = (await post(service, FLAGS, question, headers)).json()["flags"]
        assert {flag["key"]: flag["value"] for flag in flags} == dict(view.entitlement.features)
        for flag in flags:
            assert (await post(service, f"{FLAGS}/{flag['key']}", question, headers)).json() == flag
        assert [flag["key"] for flag in flags] == list(catalog.features)

    await asyncio.gather(*(check(user_id) for user_id in users * 2))


@pytest.mark.parametrize(
    "user_id",
    [
        *("usr_1", "a%20b", "%25", "a%2Fb", "a%00b", "%00", "%ff", "%ED%A0%80", "a%0A", "%C3%BC", "..%2F"),
        *(
            "a+b",
            "a:b",
            "a;b=c",
            "'%22",
            "x" * 255,
            "x" * 256,
            "x" * 300,
            "%F0%9F%98%80" * 255,
            "history",
            "",
        ),
    ],
)
async def test_odd_user_ids_are_taken_or_refused_as_by_the_route(
    sqlite_service: Harness, user_id: str
) -> None:
    headers = await reader(sqlite_service)
    response = await get(sqlite_service, f"{ENTITLEMENTS}/{user_id}", headers)
    assert response.status_code in {200, 404, 422}
    assert (await get(sqlite_service, f"{ENTITLEMENTS}/{user_id}", {})).status_code in {401, 404}


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "POST", "PUT", "DELETE", "PATCH", "NONSENSE"])
async def test_other_methods_are_405(sqlite_service: Harness, method: str) -> None:
    headers = await reader(sqlite_service)
    response = await get(sqlite_service, f"{ENTITLEMENTS}/usr_1", headers, method=method)
    assert (response.status_code, response.headers["Allow"]) == (405, "GET")
    if method != "POST":
        for path in (FLAGS, f"{FLAGS}/copy_trading"):
            response = await get(sqlite_service, path, headers, method=method)
            assert (response.status_code, response.headers["Allow"]) == (405, "POST")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer tk_wrong"}, 401),
        ({"Authorization": "Basic KEY"}, 401),
        ({"X-API-Key": "tk_wrong"}, 401),
        ({"Authorization": "Bearer KEY"}, 200),
        ({"Authorization": "bearer KEY", "If-None-Match": "*"}, 304),
        ({"If-None-Match": "*"}, 401),
        ({"Authorization": "Bearer KEY", "Content-Length": "999999999"}, 413),
    ],
)
async def test_a_question_is_refused_as_by_the_route(
    sqlite_service: Harness, headers: dict[str, str], status: int
) -> None:
    key = await sqlite_service.service.api_keys.create("test", Scope.READ)
    headers = {name: value.replace("KEY", key) for name, value in headers.items()}
    assert (await get(sqlite_service, f"{ENTITLEMENTS}/usr_1", headers)).status_code == status
    question = b'{"context": {"targetingKey": "usr_1"}}'
    for path in (FLAGS, f"{FLAGS}/copy_trading"):
        assert (await post(sqlite_service, path, question, headers)).status_code == status


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"{}", b'{"context": null}', b'{"context": {"targetingKey": 7}}']
)
@pytest.mark.parametrize("path", [FLAGS, f"{FLAGS}/", f"{FLAGS}/copy_trading", f"{FLAGS}/no", f"{FLAGS}/a/b"])
async def test_an_evaluation_that_makes_no_sense_is_refused_as_by_the_route(
    sqlite_service: Harness, path: str, body: bytes
) -> None:
    headers = await reader(sqlite_service)
    assert (await post(sqlite_service, path, body, headers)).status_code in {400, 404}


async def test_an_ended_key_reads_no_held_answers_after_a_second(service: Harness) -> None:
    headers = await reader(service)
    assert (await service.client.get(f"{ENTITLEMENTS}/usr_1", headers=headers)).status_code == 200
    database = Database.open(service.service.settings.database_url)
    async with database.transaction() as tx:
        await tx.exec_driver_sql("UPDATE api_keys SET revoked_at = created_at")
    await database.close()
    ended = time.monotonic()
    while (await service.client.get(f"{ENTITLEMENTS}/usr_1", headers=headers)).status_code == 200:
        assert time.monotonic() < ended + KNOWN_SECONDS + 0.5
        await asyncio.sleep(0.02)


async def test_a_key_is_looked_up_once_for_all_that_wait_for_it(
    service: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A busy machine may take longer for all of them than a key is known for.
    monkeypatch.setattr(api_keys, "KNOWN_SECONDS", 60.0)
    headers = await reader(service)
    with statements(service) as seen:
        responses = await asyncio.gather(
            *(service.client.get(f"{ENTITLEMENTS}/usr_{number}", headers=headers) for number in range(30))
        )
    assert {response.status_code for response in responses} == {200}
    assert sum("api_keys" in statement for statement in seen) == 1


async def test_while_the_store_is_down_it_is_503_and_afterwards_the_answer_is_there_again() -> None:
    with work_directory() as directory:
        server = PostgresServer.start(directory / "postgres")
        try:
            url = server.create_database("shop")
            database = Database.open(url)
            await migrate(database)
            await database.close()
            async with running_service(url) as harness:
                headers = await reader(harness)
                assert (await get(harness, f"{ENTITLEMENTS}/usr_1", headers)).status_code == 200
                server.stop()
                await asyncio.sleep(max(KNOWN_SECONDS, HELD_SECONDS))
                response = await get(harness, f"{ENTITLEMENTS}/usr_1", headers)
                assert (response.status_code, "Retry-After" in response.headers) == (503, True)
                server.restart()
                assert (await get(harness, f"{ENTITLEMENTS}/usr_1", headers)).status_code == 200
        finally:
            server.stop()


async def test_a_change_that_one_process_acknowledged_is_what_every_other_one_says_within_a_second(
    migrated_url: str, tmp_path: Path
) -> None:
    """Two processes; both are asked about all users all the time, so each holds the answer that goes out of date."""
    database = Database.open(migrated_url)
    key = await ApiKeys(database, SystemClock()).create("test", Scope.READ)
    await database.close()
    env = {"DATABASE_URL": migrated_url, "STRIPE_WEBHOOK_SECRET": WEBHOOK_SECRET}
    users = [f"usr_{number}" for number in range(6)]
    acknowledged: dict[str, float] = {}
    lags: list[float] = []
    with ServiceProcess.start(tmp_path, env) as one, ServiceProcess.start(tmp_path, env) as other:

        async def ask(client: httpx.AsyncClient, base: str, user_id: str, *, is_own: bool) -> None:
            while True:
                asked_at = time.monotonic()
                # As it stood before the question went out.
                acknowledged_at = acknowledged.get(user_id)
                response = await client.get(
                    f"{base}{ENTITLEMENTS}/{user_id}", headers={"Authorization": f"Bearer {key}"}
                )
                assert response.status_code == 200
                has_changed = response.json()["plan_code"] == "vip"
                if acknowledged_at is not None and not has_changed:
                    assert not is_own, "a process must show its own changes at once"
                    lags.append(asked_at - acknowledged_at)
                if acknowledged_at is not None and asked_at > acknowledged_at + 1:
                    assert has_changed
                    return
                await asyncio.sleep(0.01)

        async with httpx.AsyncClient(trust_env=False, timeout=20) as client:
            askers = [
                asyncio.create_task(ask(client, base, user_id, is_own=is_own))
                for user_id in users
                for base, is_own in ((one.url, True), (other.url, False))
            ]
            for user_id in users:
                await asyncio.sleep(0.2)
                response = await client.post(one.url + WEBHOOK_PATH, **_bought(user_id))
                assert response.json()["status"] == "success"
                acknowledged[user_id] = time.monotonic()
            await asyncio.gather(*askers)
    assert max(lags, default=0.0) < 1


def _bought(user_id: str) -> dict[str, Any]:
    """A signed, paid checkout of the vip plan, as a request's body and headers."""
    now = int(time.time())
    session = objects.checkout_session(
        f"cs_{user_id}", client_reference_id=user_id, metadata={"plan_code": "vip"}, created=now
    )
    body = json.dumps(
        objects.event(f"evt_{user_id}", "checkout.session.completed", session, created=now)
    ).encode()
    return {
        "content": body,
        "headers": {"Stripe-Signature": sign(body, WEBHOOK_SECRET.encode(), timestamp=now)},
    }
