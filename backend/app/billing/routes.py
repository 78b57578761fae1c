"""Billing's HTTP surface: webhook deliveries in, entitlements out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request, Response
from starlette.types import Receive, Scope, Send

from backend.app.billing.entitlements import EntitlementService, entitlement_document
from backend.app.billing.providers.fields import ID_CHARACTERS_MAX
from backend.app.billing.webhooks import BillingWebhooks, Delivery
from backend.app.core.clock import Clock
from backend.app.core.errors import AppError
from backend.app.core.http import problem_response, read_body

WEBHOOK_PATH = "/api/v1/billing/webhooks"

# PostgreSQL's text has no NUL, so no user has one either.
UserId = Annotated[str, Path(min_length=1, max_length=ID_CHARACTERS_MAX, pattern=r"^[^\x00]*$")]


class WebhookEndpoint:
    """`POST /api/v1/billing/webhooks` as plain ASGI: the signature covers raw bytes, so nothing may touch them first."""

    def __init__(self, webhooks: BillingWebhooks, clock: Clock) -> None:
        self._webhooks = webhooks
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        request = Request(scope)
        try:
            response = await self._respond(scope, receive)
        except AppError as error:
            response = problem_response(error, request)
        await response(scope, receive, send)

    async def _respond(self, scope: Scope, receive: Receive) -> Response:
        answer = await self._webhooks.receive(
            Delivery(
                body=await read_body(receive),
                headers=tuple(scope["headers"]),
                received_at=self._clock.now(),
                request_id=scope["state"]["request_id"],
            )
        )
        return Response(
            answer.body,
            media_type="application/json",
            headers={"Idempotent-Replayed": "true"} if answer.replayed else None,
        )


def entitlement_routes(service: EntitlementService, needs_read_key: Callable[..., Any]) -> APIRouter:
    """What the seller's own product asks: what may this user do?"""
    router = APIRouter(
        prefix="/api/v1/entitlements", tags=["entitlements"], dependencies=[Depends(needs_read_key)]
    )

    @router.get("/{user_id}")
    async def get_entitlements(user_id: UserId, request: Request) -> Response:
        """What a user may do now, until when that holds, and what it rests on."""
        return cacheable(entitlement_document(await service.current(user_id)), request)

    return router


def cacheable(document: dict[str, Any], request: Request) -> Response:
    """A JSON answer with an ETag over its content, or 304 where the caller has it already (RFC 9110 13.1.2)."""
    body = json.dumps(document, separators=(",", ":")).encode()
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    # Private: it is about one user. No-cache: it may be kept, but asked for again, so a revocation shows at once.
    headers = {"ETag": etag, "Cache-Control": "private, no-cache"}
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if etag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/json", headers=headers)
