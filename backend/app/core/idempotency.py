"""The one idempotency mechanism: work that is asked for twice is done once, and both get the same answer.

The decorator `idempotent` puts it around an async function or a FastAPI endpoint; `IdempotencyHandler`
is the protocol itself. When to use which, and what happens on errors: docs/idempotency.md.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, ParamSpec, TypeVar

from fastapi.encoders import jsonable_encoder
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from backend.app.core.errors import (
    PROBLEM_CONTENT_TYPE,
    AppError,
    IdempotencyKeyMissing,
    all_errors,
    problem,
)
from backend.app.core.idempotency_handler import (
    LEASE_SECONDS,
    IdempotencyHandler,
    Outcome,
    fingerprint_of,
    foreign_key,
)
from backend.app.core.idempotency_stores import (
    Answer,
    IdempotencyStore,
    MemoryStore,
    Record,
    RecordKey,
    RedisStore,
    SqlStore,
    State,
)
from backend.app.core.idempotency_stores.record import ANSWER_HEADERS_ALLOWED, KEY_CHARACTERS_MAX

__all__ = [
    "Answer",
    "IdempotencyHandler",
    "IdempotencyStore",
    "MemoryStore",
    "Outcome",
    "Record",
    "RecordKey",
    "RedisStore",
    "SqlStore",
    "State",
    "fingerprint_of",
    "foreign_key",
    "idempotent",
]

KEY_HEADER = "Idempotency-Key"
REPLAYED_HEADER = "Idempotent-Replayed"

P = ParamSpec("P")
T = TypeVar("T")
# A call's arguments by name, defaults included.
Arguments = Mapping[str, Any]
# The name of an argument, or a function of all of them.
Pick = str | Callable[[Arguments], Any]


def idempotent(
    *,
    operation: str,
    ttl_seconds: float,
    lease_seconds: float = LEASE_SECONDS,
    key: Pick | None = None,
    caller: Pick | None = None,
    payload: Pick | None = None,
    store: Pick | None = None,
    final: tuple[type[AppError], ...] = (),
    rolled_back: tuple[type[Exception], ...] = (),
    recover: Callable[..., Awaitable[Any]] | None = None,
) -> Callable[[Callable[P, Awaitable[T]]], Callable[P, Coroutine[Any, Any, T]]]:
    """Makes an async function, or with no `key` a FastAPI endpoint, idempotent; its signature stays.

    `key`, `caller`, `payload` and `store` each name an argument, or are functions of all arguments by name.

    A function: `key` and `store` are required; `payload` is what a repeat must ask for alike (default:
    every argument but `self` and a named `store`), it and the result must be JSON. The repeat gets an
    equal result.
    An endpoint: it has a parameter `request: Request`; the key is the Idempotency-Key header, the caller
    by default `request.state.caller`, the payload the method, path, query and raw body, the store by
    default `request.app.state.idempotency_store`. It returns JSON or a Response with a body; the repeat
    gets the same status and bytes, and `Idempotent-Replayed: true`. `response_model` does not filter it.

    `final` are errors of which a repeat gets the same: the work surely failed, and would again. For
    `rolled_back` and `recover` see `IdempotencyHandler.run`; `recover` has the arguments of the call
    and gives the result, or None if surely nothing happened.
    """

    def decorate(function: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        signature = inspect.signature(function)
        if key is None and "request" not in signature.parameters:
            raise TypeError("an idempotent endpoint needs a parameter `request: Request`")
        if key is not None and store is None:
            raise TypeError("an idempotent function needs to be told its `store`")
        kind = _Function if key is not None else _Endpoint

        @functools.wraps(function)
        async def once(*args: P.args, **kwargs: P.kwargs) -> T:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            call = kind(bound.arguments, key=key, caller=caller, payload=payload, store=store)
            handler = IdempotencyHandler(
                call.store, operation=operation, ttl_seconds=ttl_seconds, lease_seconds=lease_seconds
            )
            raised: AppError | None = None

            async def work() -> Answer:
                nonlocal raised
                try:
                    return call.to_answer(await function(*args, **kwargs))
                except final as error:
                    raised = error
                    return call.failure(error)

            async def recovered() -> Answer | None:
                result = await recover(*args, **kwargs) if recover else None
                return None if result is None else call.to_answer(result)

            outcome = await handler.run(
                call.key,
                await call.fingerprint(),
                work,
                caller=call.caller,
                rolled_back=rolled_back,
                recover=recovered if recover else None,
            )
            return call.from_outcome(outcome, raised)  # type: ignore[no-any-return]  # what T is, only the function knows

        return once

    return decorate


class _Function:
    """A call of a plain async function: JSON in, JSON out, failures raised."""

    def __init__(
        self,
        arguments: Arguments,
        *,
        key: Pick | None,
        caller: Pick | None,
        payload: Pick | None,
        store: Pick | None,
    ) -> None:
        self._arguments = arguments
        self._payload = payload
        self._unfit = {"self", store}
        self.key: str = _pick(key, arguments)
        self.caller: str = _pick(caller, arguments) if caller else ""
        self.store: IdempotencyStore = _pick(store, arguments)

    async def fingerprint(self) -> str:
        """The fingerprint of the canonical JSON of the payload."""
        if self._payload is not None:
            return fingerprint_of(_canonical_json(_pick(self._payload, self._arguments)))
        return fingerprint_of(
            _canonical_json(
                {name: value for name, value in self._arguments.items() if name not in self._unfit}
            )
        )

    def to_answer(self, result: Any) -> Answer:
        """The result as JSON; TypeError or ValueError where it isn't."""
        return Answer(200, _canonical_json(result), (("content-type", "application/json"),))

    def failure(self, error: AppError) -> Answer:
        """The error as a problem document."""
        return _failure(error, instance="", request_id="")

    def from_outcome(self, outcome: Outcome, raised: AppError | None) -> Any:
        """The result; the first call and every repeat read it from the same bytes."""
        if raised is not None:
            raise raised
        document = json.loads(outcome.answer.body)
        if outcome.answer.content_type != PROBLEM_CONTENT_TYPE:
            return document
        slug = document["type"].rpartition("/")[2]
        raise next((cls for cls in all_errors() if cls.slug == slug), AppError)(document["detail"])


class _Endpoint:
    """A call of a FastAPI endpoint: the request in, a Response out, failures as problem documents."""

    def __init__(
        self,
        arguments: Arguments,
        *,
        key: Pick | None,
        caller: Pick | None,
        payload: Pick | None,
        store: Pick | None,
    ) -> None:
        self._arguments = arguments
        self._payload = payload
        self._request: Request = arguments["request"]
        self._first: Response | None = None
        self.key = _header_key(self._request)
        self.caller: str = _pick(caller, arguments) if caller else self._request.state.caller
        self.store: IdempotencyStore = (
            _pick(store, arguments) if store else self._request.app.state.idempotency_store
        )

    async def fingerprint(self) -> str:
        """The fingerprint of method, path, query and raw body, or of the canonical JSON of `payload`."""
        request = self._request
        body = (
            await request.body()
            if self._payload is None
            else _canonical_json(_pick(self._payload, self._arguments))
        )
        return fingerprint_of(request.method, request.url.path, request.url.query, body)

    def to_answer(self, result: Any) -> Answer:
        """What the endpoint returned, as it goes out."""
        if not isinstance(result, Response):
            # The status code stands in the route's decorator, as FastAPI itself would use it.
            status = getattr(self._request.scope.get("route"), "status_code", None) or 200
            result = JSONResponse(jsonable_encoder(result), status_code=status)
        self._first = result
        headers = tuple(
            (name.lower(), value)
            for name, value in result.headers.items()
            if name.lower() in ANSWER_HEADERS_ALLOWED
        )
        return Answer(result.status_code, bytes(result.body), headers)

    def failure(self, error: AppError) -> Answer:
        """The error as the problem document that the first caller and every repeat gets."""
        request_id = getattr(self._request.state, "request_id", "")
        return _failure(error, instance=self._request.url.path, request_id=request_id)

    def from_outcome(self, outcome: Outcome, raised: AppError | None) -> Any:
        """The first answer as it was made, with all its headers; a repeat as it was stored."""
        if self._first is not None and not outcome.replayed:
            return self._first
        answer = outcome.answer
        response = Response(answer.body, answer.status, dict(answer.headers))
        if outcome.replayed:
            response.headers[REPLAYED_HEADER] = "true"
        return response


def _pick(pick: Pick | None, arguments: Arguments) -> Any:
    if isinstance(pick, str):
        return arguments[pick]
    if pick is None:
        raise TypeError("nothing to pick from the arguments")
    return pick(arguments)


def _header_key(request: Request) -> str:
    values = request.headers.getlist(KEY_HEADER)
    key = values[0].strip() if len(values) == 1 else ""
    if not key or len(key) > KEY_CHARACTERS_MAX or not key.isascii() or not key.isprintable():
        raise IdempotencyKeyMissing
    return key


def _canonical_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _failure(error: AppError, *, instance: str, request_id: str) -> Answer:
    document = problem(error, instance=instance, request_id=request_id)
    return Answer(error.status, _canonical_json(document), (("content-type", PROBLEM_CONTENT_TYPE),))
