"""Whatever goes wrong, on whatever route, the answer is one problem+json document that gives nothing away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx2 as httpx
import pytest

from backend.app.billing.routes import WEBHOOK_PATH
from backend.app.core import http
from backend.app.core.api_keys import Scope
from backend.app.core.database import Database
from backend.app.core.errors import PROBLEM_CONTENT_TYPE, all_errors
from backend.app.core.migrations import migrate
from backend.tests.support.billing import Harness, running_service
from backend.tests.support.server_directory import work_directory
from backend.tests.support.servers import PostgresServer

EVENT = {"id": "evt_1", "type": "charge.succeeded", "data": {"object": {"amount": 2999}}}
GET_ROUTES = ("/livez", "/readyz", "/metrics", "/api/v1/entitlements/usr_1", "/problems/not-found")
# What the injected failure says, and must not come out.
INNER_DETAIL = "relation billing_inner_detail at 10.1.2.3"


def assert_problem(response: httpx.Response, status: int, path: str) -> dict[str, Any]:
    """The document, checked for what RFC 9457 and the contract ask of every one."""
    assert response.status_code == status
    assert response.headers["Content-Type"] == PROBLEM_CONTENT_TYPE
    document: dict[str, Any] = response.json()
    assert {"type", "title", "status", "detail", "instance", "request_id"} <= document.keys()
    assert document["type"].startswith("/problems/")
    assert (document["status"], document["instance"]) == (status, path)
    assert document["title"]
    assert document["detail"]
    assert document["request_id"] == response.headers["X-Request-Id"]
    return document


async def read_key(harness: Harness) -> dict[str, str]:
    key = await harness.service.api_keys.create("test", Scope.READ)
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    "path", ["/", "/nothing", "/api/v1/billing", "/api/v1/entitlements/", "/problems/no-such-thing"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
async def test_an_unknown_path_is_404(sqlite_service: Harness, method: str, path: str) -> None:
    response = await sqlite_service.client.request(method, path)
    if path.startswith("/problems/") and method != "GET":
        assert_problem(response, 405, path)
    else:
        assert_problem(response, 404, path)


@pytest.mark.parametrize("path", GET_ROUTES)
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "NONSENSE"])
async def test_a_wrong_method_is_405_and_names_the_right_one(
    sqlite_service: Harness, method: str, path: str
) -> None:
    response = await sqlite_service.client.request(method, path, headers=await read_key(sqlite_service))
    assert_problem(response, 405, path)
    assert response.headers["Allow"] == "GET"


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "OPTIONS"])
async def test_the_webhook_takes_only_post(sqlite_service: Harness, method: str) -> None:
    response = await sqlite_service.client.request(method, WEBHOOK_PATH)
    assert_problem(response, 405, WEBHOOK_PATH)
    assert response.headers["Allow"] == "POST"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        b"[]",
        b"null",
        b"{}",
        b'{"id": "evt_1"}',
        b'{"id": "evt_1", "type": "charge.succeeded"}',
        b'{"id": 1, "type": "charge.succeeded", "data": {"object": {}}}',
        b'{"id": "evt_1", "id": "evt_2", "type": "charge.succeeded", "data": {"object": {}}}',
        b'{"id": "evt_1", "type": "charge.succeeded", "data": {"object": {"amount": NaN}}}',
        b"\xff\xfe{}",
        b"[" * 10_000,
    ],
)
async def test_a_genuine_signature_over_no_event_is_400_and_stores_nothing(
    sqlite_service: Harness, body: bytes
) -> None:
    response = await sqlite_service.deliver(body)
    document = assert_problem(response, 400, WEBHOOK_PATH)
    assert document["type"] == "/problems/invalid-event"
    assert await sqlite_service.count("webhook_events") == 0


@pytest.mark.parametrize("header", [None, "", "t=1,v1=", "v1=abc", "t=soon,v1=abc", "t=1790000000", "é"])
async def test_a_bad_signature_is_403_and_says_so(sqlite_service: Harness, header: str | None) -> None:
    headers = {} if header is None else {b"Stripe-Signature": header.encode("latin-1")}
    response = await sqlite_service.client.post(WEBHOOK_PATH, content=b"{}", headers=headers)
    document = assert_problem(response, 403, WEBHOOK_PATH)
    assert "signature" in document["detail"].lower()
    assert await sqlite_service.count("webhook_events") == 0


async def test_a_missing_key_is_401_and_says_how_to_send_one(sqlite_service: Harness) -> None:
    path = "/api/v1/entitlements/usr_1"
    response = await sqlite_service.client.get(path)
    assert_problem(response, 401, path)
    assert response.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize("user_id", ["a" * 256, "a%00b", "%00"])
async def test_a_user_id_that_no_user_can_have_is_422_and_not_repeated(
    service: Harness, user_id: str
) -> None:
    response = await service.client.get(f"/api/v1/entitlements/{user_id}", headers=await read_key(service))
    document = assert_problem(response, 422, response.request.url.path)
    [error] = document["errors"]
    assert error["location"] == ["path", "user_id"]
    assert set(error) == {"location", "message"}


async def test_a_declared_body_over_the_limit_is_413_at_once(sqlite_service: Harness) -> None:
    limit = sqlite_service.service.settings.webhook_body_bytes_max
    response = await sqlite_service.client.post(WEBHOOK_PATH, content=b"x" * (limit + 1))
    assert_problem(response, 413, WEBHOOK_PATH)


async def test_an_undeclared_body_over_the_limit_is_413_as_soon_as_it_gets_there(
    sqlite_service: Harness,
) -> None:
    limit = sqlite_service.service.settings.webhook_body_bytes_max
    sent_bytes = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent_bytes
        while sent_bytes < 100 * limit:
            sent_bytes += 16_384
            yield b"x" * 16_384

    response = await sqlite_service.client.post(WEBHOOK_PATH, content=endless())
    assert_problem(response, 413, WEBHOOK_PATH)
    assert sent_bytes <= limit + 2 * 16_384


async def test_a_body_of_exactly_the_limit_is_looked_at(sqlite_service: Harness) -> None:
    limit = sqlite_service.service.settings.webhook_body_bytes_max
    assert (await sqlite_service.deliver(b"x" * limit)).status_code == 400
    assert (await sqlite_service.deliver(b"x" * (limit + 1))).status_code == 413


async def test_a_bug_of_ours_is_500_without_its_details(
    service: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = await read_key(service)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError(INNER_DETAIL)

    with monkeypatch.context() as patch:
        patch.setattr("backend.app.billing.store.insert_events", broken)
        patch.setattr("backend.app.billing.store_reads.load_users", broken)
        delivered = await service.deliver(EVENT)
        asked = await service.client.get("/api/v1/entitlements/usr_1", headers=headers)
    for response, path in ((delivered, WEBHOOK_PATH), (asked, "/api/v1/entitlements/usr_1")):
        document = assert_problem(response, 500, path)
        assert document["type"] == "/problems/internal-error"
        assert "inner" not in response.text
        assert "RuntimeError" not in response.text
    assert (await service.deliver(EVENT)).json()["status"] == "success"


async def test_a_store_that_is_down_is_503_everywhere_and_says_when_to_come_again() -> None:
    """Only what needs no store still answers; afterwards the same delivery is processed."""
    with work_directory() as directory:
        server = PostgresServer.start(directory / "postgres")
        try:
            url = server.create_database("shop")
            database = Database.open(url)
            await migrate(database)
            await database.close()
            async with running_service(url) as harness:
                headers = await read_key(harness)
                server.stop()
                for response, path in (
                    (await harness.deliver(EVENT), WEBHOOK_PATH),
                    (
                        await harness.client.get("/api/v1/entitlements/usr_1", headers=headers),
                        "/api/v1/entitlements/usr_1",
                    ),
                    (await harness.client.get("/readyz"), "/readyz"),
                ):
                    document = assert_problem(response, 503, path)
                    assert document["type"] == "/problems/store-unavailable"
                    assert int(response.headers["Retry-After"]) > 0
                assert (await harness.client.get("/livez")).status_code == 200
                assert (await harness.client.get("/metrics")).status_code == 200
                # A forged delivery needs no store to be refused.
                forged = await harness.deliver(EVENT, secret="whsec_of_somebody_else_entirely")
                assert_problem(forged, 403, WEBHOOK_PATH)

                server.restart()
                assert (await harness.deliver(EVENT)).json()["status"] == "success"
                assert (await harness.client.get("/readyz")).status_code == 200
        finally:
            server.stop()


@pytest.mark.parametrize("slug", sorted({error.slug for error in all_errors()}))
async def test_the_type_of_every_error_of_ours_is_a_page(sqlite_service: Harness, slug: str) -> None:
    response = await sqlite_service.client.get(f"/problems/{slug}")
    assert response.status_code == 200
    assert response.headers["Content-Type"].startswith("text/html")


class TestRequestIds:
    async def test_every_answer_has_its_own(self, sqlite_service: Harness) -> None:
        headers = await read_key(sqlite_service)
        answers = [
            await sqlite_service.client.get(path, headers=headers)
            for path in (*GET_ROUTES, "/nothing")
            for _ in range(2)
        ]
        assert len({answer.headers["X-Request-Id"] for answer in answers}) == len(answers)

    async def test_a_proxys_id_is_kept_in_the_answer_and_with_the_event(
        self, sqlite_service: Harness
    ) -> None:
        response = await sqlite_service.client.get("/livez", headers={"X-Request-Id": "from-the-proxy.1"})
        assert response.headers["X-Request-Id"] == "from-the-proxy.1"
        delivered = await sqlite_service.deliver(EVENT)
        [row] = await sqlite_service.rows("SELECT request_id FROM webhook_events")
        assert row["request_id"] == delivered.headers["X-Request-Id"]

    @pytest.mark.parametrize(
        "hostile",
        [
            b"short",
            b"a" * 65,
            b"with space in it",
            b"<script>1</script>",
            b"\xe9\xe9\xe9\xe9\xe9\xe9\xe9\xe9",
        ],
    )
    async def test_an_id_that_could_forge_a_log_line_is_replaced(
        self, sqlite_service: Harness, hostile: bytes
    ) -> None:
        response = await sqlite_service.client.get("/livez", headers={b"X-Request-Id": hostile})
        assert response.headers["X-Request-Id"].encode("latin-1") != hostile
        assert len(response.headers["X-Request-Id"]) == 36


async def test_a_body_that_trickles_in_is_given_up_and_nothing_is_stored(
    sqlite_service: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "BODY_SECONDS_MAX", 0.05)

    async def trickle() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(1)
        yield b"}"

    response = await sqlite_service.client.post(WEBHOOK_PATH, content=trickle())
    assert response.status_code == 400
    assert response.json()["detail"] == "The body did not arrive in time."
    assert await sqlite_service.count("webhook_events") == 0


async def test_a_slash_too_many_is_told_instead_of_redirected(sqlite_service: Harness) -> None:
    response = await sqlite_service.client.post(f"{WEBHOOK_PATH}/", content=b"{}")
    assert response.status_code == 404
    assert response.json()["type"] == "/problems/not-found"
