"""Feature checks for every language: the OpenFeature Remote Evaluation Protocol, where the targeting key is the user's id.

https://openfeature.dev/docs/reference/other-technologies/ofrep/openapi, version 0.3.0. What the protocol
gives a body (400, 404) is answered in its shape; every other error is the service's ordinary problem
document. There is no 429: a client that gets one answers its own defaults to everybody until Retry-After,
and paying users would lose what they paid for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from backend.app.billing.answers import Answers, Form
from backend.app.billing.domain.catalog import Catalog
from backend.app.billing.domain.facts import FeatureValue
from backend.app.billing.entitlements import FeatureCheck, View, check_feature, is_user_id
from backend.app.core.clock import iso
from backend.app.core.http import read_body

FLAGS_PATH = "/ofrep/v1/evaluate/flags"

# OpenFeature's error codes (openfeature.dev/specification/types#error-code), with OFREP's status for each.
_STATUS = {"FLAG_NOT_FOUND": 404, "PARSE_ERROR": 400, "TARGETING_KEY_MISSING": 400, "INVALID_CONTEXT": 400}

# For the OpenAPI document: the body is read by hand, because its errors have a shape of their own.
_REQUEST_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["context"],
                    "properties": {
                        "context": {
                            "type": "object",
                            "required": ["targetingKey"],
                            "properties": {
                                "targetingKey": {"type": "string", "description": "The user's id."}
                            },
                        }
                    },
                }
            }
        },
    }
}


@dataclass(frozen=True, slots=True)
class EvaluationFailed(Exception):
    """Why nothing can be evaluated: one of OpenFeature's error codes, and what to mend."""

    code: str
    details: str


_FLAG_NOT_FOUND = EvaluationFailed("FLAG_NOT_FOUND", "The catalog has no such feature.")


class Evaluations:
    """The protocol's two questions, answered for one catalog."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        catalog = answers.catalog
        self._all = Form("ofrep", lambda view: _evaluations(catalog, view))
        self._each = {key: Form(f"ofrep:{key}", _evaluation_of(catalog, key)) for key in catalog.features}

    async def evaluate_all(self, request: Request) -> Response:
        """Every feature of the catalog for the user in the context, with an ETag (OFREP bulk evaluation)."""
        try:
            user_id = await _read_user_id(request)
        except EvaluationFailed as failure:
            return _failure_response(failure)
        return (await self._answers.about(user_id, self._all)).response(request)

    async def evaluate_one(self, key: str, request: Request) -> Response:
        """One feature for the user in the context (OFREP single evaluation)."""
        try:
            user_id = await _read_user_id(request)
        except EvaluationFailed as failure:
            return _failure_response(failure, key=key)
        form = self._each.get(key)
        if form is None:
            return _failure_response(_FLAG_NOT_FOUND, key=key)
        return (await self._answers.about(user_id, form)).response(request)


def ofrep_routes(evaluations: Evaluations, needs_read_key: Callable[..., Any]) -> APIRouter:
    """The protocol's two routes."""
    router = APIRouter(prefix=FLAGS_PATH, tags=["ofrep"], dependencies=[Depends(needs_read_key)])

    @router.post("", openapi_extra=_REQUEST_BODY)
    async def evaluate_flags(request: Request) -> Response:
        """Every feature of the catalog for the user in the context, with an ETag (OFREP bulk evaluation)."""
        return await evaluations.evaluate_all(request)

    @router.post("/{key}", openapi_extra=_REQUEST_BODY)
    async def evaluate_flag(key: str, request: Request) -> Response:
        """One feature for the user in the context (OFREP single evaluation)."""
        return await evaluations.evaluate_one(key, request)

    return router


async def _read_user_id(request: Request) -> str:
    """The targeting key of a request's context."""
    try:
        document = json.loads(await read_body(request.receive))
    except (ValueError, RecursionError):
        raise EvaluationFailed("PARSE_ERROR", "The body is not JSON.") from None
    if not isinstance(document, dict):
        raise EvaluationFailed("PARSE_ERROR", "The body is not a JSON object.")
    context = document.get("context", {})
    if not isinstance(context, dict):
        raise EvaluationFailed("INVALID_CONTEXT", "The context is not an object.")
    user_id = context.get("targetingKey")
    if user_id is None or user_id == "":
        raise EvaluationFailed("TARGETING_KEY_MISSING", "context.targetingKey, the user's id, is missing.")
    if not isinstance(user_id, str) or not is_user_id(user_id):
        raise EvaluationFailed("INVALID_CONTEXT", "context.targetingKey is not a user's id.")
    return user_id


def _evaluations(catalog: Catalog, view: View) -> dict[str, Any]:
    checks = [check_feature(catalog, view, key) for key in catalog.features]
    return {"flags": [_evaluation(view, check) for check in checks], "metadata": _metadata(view)}


def _evaluation_of(catalog: Catalog, key: str) -> Callable[[View], dict[str, Any]]:
    return lambda view: _evaluation(view, check_feature(catalog, view, key))


def _evaluation(view: View, check: FeatureCheck) -> dict[str, Any]:
    return {
        "key": check.key,
        "value": check.value,
        # This user has it from a source of their own; or everybody has it, for which the protocol's word is
        # STATIC: OpenFeature's DEFAULT is none of the reasons that OFREP allows.
        "reason": "TARGETING_MATCH" if check.givers else "STATIC",
        "variant": _variant(check.value),
        "metadata": {**_metadata(view), "rule": check.reason, "granted": check.granted},
    }


def _metadata(view: View) -> dict[str, bool | int | str]:
    """What a log line about an evaluation should say; the protocol allows no null here."""
    entitlement = view.entitlement
    metadata: dict[str, bool | int | str] = {
        "planCode": entitlement.plan_code,
        "status": entitlement.status,
        "version": entitlement.version,
    }
    if entitlement.valid_until is not None:
        metadata["validUntil"] = iso(entitlement.valid_until)
    return metadata


def _variant(value: FeatureValue) -> str:
    """A value's name: some clients can't do without one."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _failure_response(failure: EvaluationFailed, *, key: str | None = None) -> Response:
    document = {"errorCode": failure.code, "errorDetails": failure.details}
    return JSONResponse({"key": key, **document} if key is not None else document, _STATUS[failure.code])
