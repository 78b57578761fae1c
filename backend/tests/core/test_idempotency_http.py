"""The decorator around FastAPI endpoints, over HTTP: every status code a client can meet."""

# ruff: noqa: ARG001 - an endpoint takes its request and caller for the decorator's sake
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any

import httpx2
import pytest
from fastapi import Body, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from backend.app.core.clock import SystemClock
from backend.app.core.errors import (
    PROBLEM_CONTENT_TYPE,
    AppError,
    Forbidden,
    NotFound,
    Unauthenticated,
    Unavailable,
    problem,
)
from backend.app.core.idempotency import MemoryStore, idempotent
from backend.tests.core.idempotency_contract import EVERY_BYTE, counted

KEY = {"Idempotency-Key": "key-1", "Authorization": "alice"}


class Made(BaseModel):
    number: int
    name: str


class DownStore(MemoryStore):
    async def claim(self, *_args: Any, **_kwargs: Any) -> Any:
        raise Unavailable


async def authenticated(request: Request) -> str:
    caller = request.headers.get("authorization")
    if not caller:
        raise Unauthenticated
    request.state.caller = caller
    return caller


Caller = Annotated[str, Depends(authenticated)]


def build_app() -> FastAPI:
    app = FastAPI()
    app.state.idempotency_store = MemoryStore(SystemClock())
    app.state.runs = []
    app.state.go_on = asyncio.Event()
    app.state.entered = asyncio.Event()

    @app.exception_handler(AppError)
    async def on_error(request: Request, error: AppError) -> JSONResponse:
        document = problem(error, instance=request.url.path, request_id="of-this-request")
        return JSONResponse(document, error.status, error.headers, media_type=PROBLEM_CONTENT_TYPE)

    @app.middleware("http")
    async def number_requests(request: Request, call_next: Any) -> Any:
        request.state.request_id = f"request-{len(app.state.runs)}"
        return await call_next(request)

    @app.post("/things/{name}", status_code=201)
    @idempotent(operation="http-things", ttl_seconds=600)
    async def make_thing(
        request: Request, caller: Caller, name: str, content: Annotated[dict[str, Any], Body()]
    ) -> Made:
        app.state.runs.append(caller)
        return Made(number=len(app.state.runs), name=name)

    @app.post("/binary")
    @idempotent(operation="http-binary", ttl_seconds=600, caller="caller")
    async def make_bytes(request: Request, caller: Caller) -> Response:
        app.state.runs.append(await request.body())
        headers = {"Location": "/made/1", "Set-Cookie": "session=secret", "X-Run": str(len(app.state.runs))}
        return Response(EVERY_BYTE, 202, headers, "application/octet-stream")

    @app.post("/slow")
    @idempotent(operation="http-slow", ttl_seconds=600)
    async def slow(request: Request, caller: Caller) -> dict[str, bool]:
        app.state.runs.append(caller)
        app.state.entered.set()
        await app.state.go_on.wait()
        return {"done": True}

    @app.post("/gone")
    @idempotent(operation="http-gone", ttl_seconds=600, final=(NotFound,))
    async def gone(request: Request, caller: Caller) -> None:
        app.state.runs.append(caller)
        raise NotFound

    @app.post("/forbidden")
    @idempotent(operation="http-forbidden", ttl_seconds=600)
    async def forbidden(request: Request, caller: Caller) -> None:
        app.state.runs.append(caller)
        raise Forbidden

    @app.post("/timeout")
    @idempotent(operation="http-timeout", ttl_seconds=600, lease_seconds=30)
    async def timeout(request: Request, caller: Caller) -> None:
        app.state.runs.append(caller)
        raise Unavailable

    @app.delete("/things/{name}", status_code=204)
    @idempotent(operation="http-delete", ttl_seconds=600)
    async def delete_thing(request: Request, caller: Caller, name: str) -> Response:
        app.state.runs.append(name)
        return Response(status_code=204)

    return app


@pytest.fixture
def app() -> FastAPI:
    return build_app()


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(
        transport=httpx2.ASGITransport(app=app), base_url="http://service"
    ) as client:
        yield client


async def test_a_repeat_gets_the_same_answer(app: FastAPI, client: httpx2.AsyncClient) -> None:
    """Same status, same bytes, marked as a replay, counted, and done once."""
    hits_before = counted("idempotent_hits_total", "http-things")
    first = await client.post("/things/a", json={"n": 1}, headers=KEY)
    second = await client.post("/things/a", json={"n": 1}, headers=KEY)
    assert (first.status_code, first.json()) == (201, {"number": 1, "name": "a"})
    assert "idempotent-replayed" not in first.headers
    assert (second.status_code, second.content) == (first.status_code, first.content)
    assert second.headers["content-type"] == first.headers["content-type"]
    assert second.headers["idempotent-replayed"] == "true"
    assert app.state.runs == ["alice"]
    assert counted("idempotent_hits_total", "http-things") == hits_before + 1


async def test_a_binary_answer_is_replayed_without_its_cookie(
    app: FastAPI, client: httpx2.AsyncClient
) -> None:
    """Every byte comes back, with the headers that carry meaning and none that carry a session."""
    first = await client.post("/binary", content=EVERY_BYTE, headers=KEY)
    second = await client.post("/binary", content=EVERY_BYTE, headers=KEY)
    assert first.headers["set-cookie"] == "session=secret"
    assert (second.status_code, second.content) == (202, EVERY_BYTE)
    assert second.headers["location"] == first.headers["location"] == "/made/1"
    assert second.headers["content-type"] == "application/octet-stream"
    assert not {"set-cookie", "x-run"} & set(second.headers)
    assert app.state.runs == [EVERY_BYTE]


async def test_an_empty_answer_is_replayed(app: FastAPI, client: httpx2.AsyncClient) -> None:
    """204 stays 204, without a body."""
    first = await client.delete("/things/a", headers=KEY)
    second = await client.delete("/things/a", headers=KEY)
    assert (first.status_code, second.status_code, second.content) == (204, 204, b"")
    assert second.headers["idempotent-replayed"] == "true"
    assert app.state.runs == ["a"]


@pytest.mark.parametrize("keys", [[], [""], ["  "], ["k" * 256], ["two", "keys"], ["caf\xe9"], ["tab\there"]])
async def test_a_missing_or_bad_key_is_400(app: FastAPI, client: httpx2.AsyncClient, keys: list[str]) -> None:
    """Exactly one key of 1 to 255 printable ASCII characters."""
    headers = [(b"authorization", b"alice")]
    headers += [(b"idempotency-key", key.encode("latin-1")) for key in keys]
    refused = await client.post("/things/a", json={}, headers=headers)
    assert refused.status_code == 400
    assert refused.json()["type"] == "/problems/idempotency-key-missing"
    assert app.state.runs == []


@pytest.mark.parametrize("key", ["k", "k" * 255, "'; DROP TABLE x; --", '"8e03978e"', "a:b/c?d=e&f #%00"])
async def test_any_printable_key_is_good(client: httpx2.AsyncClient, key: str) -> None:
    """No printable character has a meaning to us."""
    headers = {**KEY, "Idempotency-Key": key}
    first = await client.post("/things/a", json={}, headers=headers)
    second = await client.post("/things/a", json={}, headers=headers)
    assert (first.status_code, second.content) == (201, first.content)


async def test_another_request_with_the_key_is_422(app: FastAPI, client: httpx2.AsyncClient) -> None:
    """Another body, path or query is another request, even if the JSON means the same."""
    headers = {**KEY, "Content-Type": "application/json"}
    assert (await client.post("/things/a", content=b'{"n":1}', headers=headers)).status_code == 201
    for path, body in (
        ("/things/a", b'{"n":2}'),
        ("/things/a", b'{"n": 1}'),
        ("/things/b", b'{"n":1}'),
        ("/things/a?x=1", b'{"n":1}'),
    ):
        refused = await client.post(path, content=body, headers=headers)
        assert (refused.status_code, refused.json()["type"]) == (422, "/problems/idempotency-mismatch")
    assert len(app.state.runs) == 1


async def test_a_request_in_progress_is_409_and_a_mismatch_still_422(
    app: FastAPI, client: httpx2.AsyncClient
) -> None:
    """A repeat during the work is told when to come back; a wrong one is told that it is wrong."""
    first = asyncio.create_task(client.post("/slow", content=b"a", headers=KEY))
    await app.state.entered.wait()
    mismatch = await client.post("/slow", content=b"b", headers=KEY)
    waiting = await client.post("/slow", content=b"a", headers=KEY)
    app.state.go_on.set()
    assert mismatch.status_code == 422
    assert (waiting.status_code, waiting.headers["retry-after"]) == (409, "1")
    assert waiting.json()["type"] == "/problems/idempotency-in-progress"
    assert (await first).status_code == 200
    assert (await client.post("/slow", content=b"a", headers=KEY)).json() == {"done": True}
    assert len(app.state.runs) == 1


async def test_a_hundred_requests_at_once_are_done_once(app: FastAPI, client: httpx2.AsyncClient) -> None:
    """Over HTTP too: one execution, and nobody gets anything but the answer or 409."""
    requests = [asyncio.create_task(client.post("/slow", headers=KEY)) for _ in range(100)]
    await app.state.entered.wait()
    app.state.go_on.set()
    answers = await asyncio.gather(*requests)
    assert {answer.status_code for answer in answers} <= {200, 409}
    assert sum(answer.status_code == 200 for answer in answers) >= 1
    assert len(app.state.runs) == 1


async def test_two_callers_with_one_key_are_served_apart(app: FastAPI, client: httpx2.AsyncClient) -> None:
    """A guessed key shows nothing of another caller's answer."""
    first = await client.post("/things/a", json={}, headers=KEY)
    second = await client.post("/things/a", json={}, headers={**KEY, "Authorization": "mallory"})
    assert (first.json()["number"], second.json()["number"]) == (1, 2)
    assert "idempotent-replayed" not in second.headers
    assert app.state.runs == ["alice", "mallory"]


async def test_an_unauthenticated_request_never_takes_a_key(app: FastAPI, client: httpx2.AsyncClient) -> None:
    """Authentication and validation come first, and leave the key free."""
    nobody = {"Idempotency-Key": "key-1"}
    assert (await client.post("/things/a", json={}, headers=nobody)).status_code == 401
    assert (await client.post("/things/a", content=b"[", headers=KEY)).status_code == 422
    assert (await client.post("/things/a", json={}, headers=KEY)).status_code == 201
    assert len(app.state.runs) == 1


async def test_a_refusal_may_be_repeated(app: FastAPI, client: httpx2.AsyncClient) -> None:
    """403 is decided anew each time."""
    for _ in range(2):
        refused = await client.post("/forbidden", headers=KEY)
        assert refused.status_code == 403
        assert "idempotent-replayed" not in refused.headers
    assert len(app.state.runs) == 2


async def test_a_final_failure_is_replayed_byte_for_byte(app: FastAPI, client: httpx2.AsyncClient) -> None:
    """The repeat gets the first failure's document, request_id included, and nothing is tried again."""
    first = await client.post("/gone", headers=KEY)
    second = await client.post("/gone", headers=KEY)
    assert (first.status_code, first.headers["content-type"]) == (404, PROBLEM_CONTENT_TYPE)
    assert first.json()["request_id"] == "request-0"
    assert first.json()["instance"] == "/gone"
    assert (second.status_code, second.content) == (404, first.content)
    assert second.headers["content-type"] == PROBLEM_CONTENT_TYPE
    assert second.headers["idempotent-replayed"] == "true"
    assert len(app.state.runs) == 1


async def test_an_unknown_outcome_is_not_repeated_at_once(app: FastAPI, client: httpx2.AsyncClient) -> None:
    """After a 503 from the work the key is in progress until its lease is over."""
    assert (await client.post("/timeout", headers=KEY)).status_code == 503
    waiting = await client.post("/timeout", headers=KEY)
    assert waiting.status_code == 409
    assert 1 <= int(waiting.headers["retry-after"]) <= 30
    assert len(app.state.runs) == 1


async def test_a_store_that_is_down_is_503(app: FastAPI, client: httpx2.AsyncClient) -> None:
    """Nothing is done without protection."""
    app.state.idempotency_store = DownStore(SystemClock())
    refused = await client.post("/things/a", json={}, headers=KEY)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    assert app.state.runs == []
