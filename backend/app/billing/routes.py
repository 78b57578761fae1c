"""Billing's HTTP surface: webhook deliveries in, entitlements out."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BeforeValidator
from starlette.types import Receive, Scope, Send

from backend.app.billing.answers import ENTITLEMENTS, Answers
from backend.app.billing.entitlements import EntitlementService, check_document, entitlement_document
from backend.app.billing.explain import explain as explanation_of
from backend.app.billing.explain import explanation_document
from backend.app.billing.providers.fields import ID_CHARACTERS_MAX
from backend.app.billing.webhooks import BillingWebhooks, Delivery
from backend.app.core.clock import Clock
from backend.app.core.errors import AppError
from backend.app.core.http import problem_response, read_body
from backend.app.core.pages import PageRequest, page_request
from backend.app.core.representation import Representation

WEBHOOK_PATH = "/api/v1/billing/webhooks"
ENTITLEMENTS_PATH = "/api/v1/entitlements"

# PostgreSQL's text has no NUL, so no user has one either.
UserId = Annotated[str, Path(min_length=1, max_length=ID_CHARACTERS_MAX, pattern=r"^[^\x00]*$")]

# RFC 3339 5.6; Python's own reader takes other forms of ISO 8601 too.
_RFC_3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)", re.ASCII)


class WebhookEndpoint:
    """`POST /api/v1/billing/webhooks` as plain ASGI: the signature covers raw bytes, so nothing may touch them first."""

    def __init__(self, webhooks: BillingWebhooks, clock: Clock) -> None:
        self._webhooks = webhooks
        self._clock = clock

    @staticmethod
    def takes(scope: Scope) -> bool:
        """Whether a request is one of these."""
        return bool(scope["path"] == WEBHOOK_PATH and scope["method"] == "POST")

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


def read_instant(text: str) -> datetime:
    """An RFC 3339 instant, in UTC; ValueError for anything else, a time without an offset above all."""
    if not _RFC_3339.fullmatch(text):
        raise ValueError(
            "an RFC 3339 instant with its offset is expected, as 2026-11-23T07:30:00Z; in an address + is %2B"
        )
    try:
        return datetime.fromisoformat(text.upper()).astimezone(UTC)
    except OverflowError:
        raise ValueError("beyond the years 1 to 9999") from None


At = Annotated[
    datetime | None,
    BeforeValidator(read_instant),
    Query(description="As it was in force at this RFC 3339 instant, by all that is known today."),
]


def entitlement_routes(
    service: EntitlementService, answers: Answers, needs_read_key: Callable[..., Any]
) -> APIRouter:
    """What the seller's own product asks: what may this user do, and why?"""
    router = APIRouter(
        prefix=ENTITLEMENTS_PATH, tags=["entitlements"], dependencies=[Depends(needs_read_key)]
    )

    @router.get("/{user_id}")
    async def get_entitlements(
        user_id: UserId, request: Request, at: At = None, explain: bool = False
    ) -> Response:
        """What a user may do now or at an instant, until when that holds, what it rests on, and why."""
        if not explain:
            if at is None:
                return (await answers.about(user_id, ENTITLEMENTS)).response(request)
            view = await service.view(user_id, at=at)
            return Representation.of(entitlement_document(view)).response(request)
        view, evidence = await service.view_with_evidence(user_id, at=at)
        explanation = explanation_of(service.catalog, view, evidence)
        document = {**entitlement_document(view), "explanation": explanation_document(explanation)}
        return Representation.of(document).response(request)

    @router.get("/{user_id}/history")
    async def get_history(user_id: UserId, page: Annotated[PageRequest, Depends(page_request)]) -> Response:
        """Every change of a user's entitlements and the event that caused it, the newest first."""
        return JSONResponse(await service.history(user_id, page))

    # After the history, so a feature of that name can't hide it.
    @router.get("/{user_id}/{feature}")
    async def get_feature(user_id: UserId, feature: str, request: Request, at: At = None) -> Response:
        """One feature's value for a user, whether it lets them do anything, and the rule it follows from."""
        check = await service.check(user_id, feature, at=at)
        return Representation.of(check_document(check)).response(request)

    return router
