"""What every HTTP request gets: an id, a bound on its body, and problem+json for whatever goes wrong."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from backend.app.core.errors import (
    PROBLEM_CONTENT_TYPE,
    AppError,
    InvalidParameters,
    InvalidRequest,
    PayloadTooLarge,
    error_for_status,
    problem,
)
from backend.app.core.ids import new_id

# What a proxy in front may hand us; anything else could forge log lines.
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{8,64}")
# Stripe sends a body in one go; who trickles one in holds a connection and nothing else.
BODY_SECONDS_MAX = 10.0
# RFC 9457 allows more members; these few of a long list of wrong fields are enough to mend a request.
VALIDATION_ERRORS_MAX = 10


class RequestContext:
    """Gives each request an id, in its scope, its logs and its answer's `X-Request-Id`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else new_id()
        scope.setdefault("state", {})["request_id"] = request_id
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        await self._app(scope, receive, send_with_id)


class Ahead:
    """Answers some requests before the framework sees them: those that come most often, by far."""

    def __init__(self, app: ASGIApp, *, takes: Callable[[Scope], bool], endpoint: ASGIApp) -> None:
        self._app = app
        self._takes = takes
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        is_ahead = scope["type"] == "http" and self._takes(scope)
        await (self._endpoint if is_ahead else self._app)(scope, receive, send)


class BodyLimit:
    """Refuses bodies over a limit with 413: a declared length at once, an undeclared one when it gets there."""

    def __init__(self, app: ASGIApp, *, body_bytes_max: int) -> None:
        self._app = app
        self._body_bytes_max = body_bytes_max

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared[:20]) > self._body_bytes_max:
            await _problem_response(PayloadTooLarge(headers={"Connection": "close"}), scope)(
                scope, receive, send
            )
            return
        received_bytes = 0

        async def receive_bounded() -> Message:
            nonlocal received_bytes
            message = await receive()
            received_bytes += len(message.get("body", b""))
            if received_bytes > self._body_bytes_max:
                raise PayloadTooLarge(headers={"Connection": "close"})
            return message

        await self._app(scope, receive_bounded, send)


async def read_body(receive: Receive) -> bytes:
    """The whole body of a request whose size `BodyLimit` bounds; InvalidRequest when it does not come."""
    try:
        async with asyncio.timeout(BODY_SECONDS_MAX):
            return await _read_chunks(receive)
    except TimeoutError as error:
        raise InvalidRequest("The body did not arrive in time.") from error


async def _read_chunks(receive: Receive) -> bytes:
    chunks: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise InvalidRequest("The connection ended before the body did.")
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(chunks)


def problem_response(error: AppError, request: Request) -> Response:
    """The problem+json answer to an error."""
    return _problem_response(error, request.scope)


def install_problem_handlers(app: FastAPI) -> None:
    """Makes every error of an app a problem+json answer, whatever raised it."""

    @app.exception_handler(AppError)
    async def on_app_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, AppError)
        return problem_response(error, request)

    @app.exception_handler(HTTPException)
    async def on_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        meant = error_for_status(error.status_code)
        meant.headers = dict(error.headers or {})
        return problem_response(meant, request)

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        document = problem(
            InvalidParameters(), instance=request.url.path, request_id=_request_id(request.scope)
        )
        # Where and what, but never the value: it may be a secret that was put into the wrong field.
        document["errors"] = [
            {"location": [str(part) for part in found["loc"]], "message": found["msg"]}
            for found in error.errors()[:VALIDATION_ERRORS_MAX]
        ]
        return _json_response(document, {})

    @app.exception_handler(Exception)
    async def on_any_other(request: Request, _error: Exception) -> Response:
        # The framework raises it again after this answer; the server logs it and ends the connection, which
        # must be said, or the next request on it would be lost. It answers outside of RequestContext, so
        # the id's header is set here.
        headers = {"X-Request-Id": _request_id(request.scope), "Connection": "close"}
        return problem_response(AppError(headers=headers), request)


def _problem_response(error: AppError, scope: Scope) -> Response:
    document = problem(error, instance=scope["path"], request_id=_request_id(scope))
    return _json_response(document, error.headers)


def _json_response(document: dict[str, Any], headers: dict[str, str]) -> Response:
    return Response(
        json.dumps(document).encode(),
        status_code=document["status"],
        media_type=PROBLEM_CONTENT_TYPE,
        headers=headers,
    )


def _request_id(scope: Scope) -> str:
    request_id: str = scope.get("state", {}).get("request_id", "")
    return request_id
