"""The questions that come with every request of a product, as plain ASGI: routing them costs more than the answer.

Only their plain form: whatever is odd about one (a query, another method, a text that is no user's id) leaves it to
the framework's routes, which give the same answers by the same functions.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from backend.app.billing.answers import ENTITLEMENTS, Answers
from backend.app.billing.entitlements import is_user_id
from backend.app.billing.ofrep import FLAGS_PATH, Evaluations
from backend.app.billing.routes import ENTITLEMENTS_PATH
from backend.app.core.errors import AppError
from backend.app.core.http import problem_response

_USER_PREFIX = f"{ENTITLEMENTS_PATH}/"
_FLAG_PREFIX = f"{FLAGS_PATH}/"

NeedsKey = Callable[[Request], Awaitable[Any]]


class HotReads:
    """`GET /api/v1/entitlements/{user_id}` and `POST /ofrep/v1/evaluate/flags[/{key}]`."""

    def __init__(
        self,
        answers: Answers,
        evaluations: Evaluations,
        *,
        needs_read_key: NeedsKey,
        needs_ofrep_key: NeedsKey,
    ) -> None:
        self._answers = answers
        self._evaluations = evaluations
        self._needs_read_key = needs_read_key
        self._needs_ofrep_key = needs_ofrep_key

    @staticmethod
    def takes(scope: Scope) -> bool:
        """Whether a request is one of these, in its plain form."""
        if scope["query_string"]:
            return False
        path: str = scope["path"]
        if path.startswith(_USER_PREFIX):
            user_id = path[len(_USER_PREFIX) :]
            return scope["method"] == "GET" and "/" not in user_id and is_user_id(user_id)
        if path.startswith(_FLAG_PREFIX):
            key = path[len(_FLAG_PREFIX) :]
            return scope["method"] == "POST" and "/" not in key and key != ""
        return path == FLAGS_PATH and scope["method"] == "POST"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI, for a request that it takes."""
        request = Request(scope, receive)
        try:
            response = await self._respond(request, scope["path"])
        except AppError as error:
            response = problem_response(error, request)
        await response(scope, receive, send)

    async def _respond(self, request: Request, path: str) -> Response:
        if path.startswith(_USER_PREFIX):
            await self._needs_read_key(request)
            representation = await self._answers.about(path.removeprefix(_USER_PREFIX), ENTITLEMENTS)
            return representation.response(request)
        await self._needs_ofrep_key(request)
        if path == FLAGS_PATH:
            return await self._evaluations.evaluate_all(request)
        return await self._evaluations.evaluate_one(path.removeprefix(_FLAG_PREFIX), request)
