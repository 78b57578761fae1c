"""Every error that leaves the service, as one tree; a class is the HTTP truth about itself.

    AppError                       500
    ├── InvalidRequest             400
    │   ├── InvalidEvent           400
    │   └── IdempotencyKeyMissing  400
    ├── Unauthenticated            401
    ├── SignatureInvalid           403
    ├── Forbidden                  403
    ├── NotFound                   404
    ├── MethodNotAllowed           405
    ├── Conflict                   409
    ├── IdempotencyInProgress      409
    ├── PayloadTooLarge            413
    ├── IdempotencyMismatch        422
    ├── InvalidParameters          422
    └── Unavailable                503
        └── StoreUnavailable       503

A class's docstring is its public text: the `detail` of the answer and the page at `/problems/<slug>`.
"""

from __future__ import annotations

from inspect import cleandoc
from typing import Any, ClassVar

PROBLEM_CONTENT_TYPE = "application/problem+json"


class AppError(Exception):
    """Something went wrong on our side; nothing was changed."""

    status: ClassVar[int] = 500
    slug: ClassVar[str] = "internal-error"
    title: ClassVar[str] = "Internal error"

    def __init__(self, detail: str | None = None, *, headers: dict[str, str] | None = None) -> None:
        self.detail = detail or self.public_text()
        self.headers = headers or {}
        self.members: dict[str, Any] = {}
        super().__init__(self.detail)

    @classmethod
    def public_text(cls) -> str:
        """The class docstring as one line."""
        return " ".join(cleandoc(cls.__doc__ or cls.title).split())


class InvalidRequest(AppError):
    """The request can't be understood."""

    status, slug, title = 400, "invalid-request", "Invalid request"


class InvalidEvent(InvalidRequest):
    """The signature is genuine, but the body is not a Stripe event."""

    slug, title = "invalid-event", "Invalid event"


class IdempotencyKeyMissing(InvalidRequest):
    """This operation needs an Idempotency-Key header of 1 to 255 printable ASCII characters."""

    slug, title = "idempotency-key-missing", "Idempotency-Key missing"


class Unauthenticated(AppError):
    """A valid API key is needed: `Authorization: Bearer tk_...`."""

    status, slug, title = 401, "unauthenticated", "Unauthenticated"

    def __init__(self, detail: str | None = None) -> None:
        super().__init__(detail, headers={"WWW-Authenticate": "Bearer"})


class SignatureInvalid(AppError):
    """The Stripe-Signature header is missing, malformed, outside the time window or made with another secret."""

    status, slug, title = 403, "signature-invalid", "Invalid signature"


class Forbidden(AppError):
    """The API key is valid, but its scope does not allow this."""

    status, slug, title = 403, "forbidden", "Forbidden"


class NotFound(AppError):
    """There is nothing here."""

    status, slug, title = 404, "not-found", "Not found"


class MethodNotAllowed(AppError):
    """This address exists, but not for this method; the Allow header names those it has."""

    status, slug, title = 405, "method-not-allowed", "Method not allowed"


class Conflict(AppError):
    """The request contradicts what is so now; nothing was changed."""

    status, slug, title = 409, "conflict", "Conflict"


class IdempotencyInProgress(AppError):
    """A request with this Idempotency-Key is still being carried out; ask again shortly."""

    status, slug, title = 409, "idempotency-in-progress", "Request in progress"

    def __init__(self, detail: str | None = None, *, retry_after_seconds: int = 1) -> None:
        super().__init__(detail, headers={"Retry-After": str(retry_after_seconds)})


class PayloadTooLarge(AppError):
    """The body is larger than this endpoint accepts."""

    status, slug, title = 413, "payload-too-large", "Payload too large"


class IdempotencyMismatch(AppError):
    """This Idempotency-Key was already used with a different request."""

    status, slug, title = 422, "idempotency-mismatch", "Idempotency-Key reused"


class InvalidParameters(AppError):
    """The request has wrong or missing values; `errors` names them."""

    status, slug, title = 422, "invalid-parameters", "Invalid parameters"

    @classmethod
    def named(cls, *location: str, message: str) -> InvalidParameters:
        """One wrong value: where it stands (`"body", "plan_code"`) and what is wrong, never the value itself."""
        error = cls(f"{'.'.join(location[1:])}: {message}")
        error.members["errors"] = [{"location": list(location), "message": message}]
        return error


class Unavailable(AppError):
    """The service can't do this right now; nothing was changed. Please send it again."""

    status, slug, title = 503, "unavailable", "Temporarily unavailable"

    def __init__(self, detail: str | None = None, *, retry_after_seconds: int = 5) -> None:
        super().__init__(detail, headers={"Retry-After": str(retry_after_seconds)})


class StoreUnavailable(Unavailable):
    """The database can't be reached or is too busy; nothing was changed. Please send it again."""

    slug, title = "store-unavailable", "Store unavailable"

    # Whether it is a lock that somebody else holds, rather than an outage.
    is_contention = False


def problem(error: AppError, *, instance: str, request_id: str) -> dict[str, Any]:
    """The RFC 9457 document of an error: type, title, status, detail, instance, our request_id, and its own members."""
    return {
        # A relative reference (RFC 9457 3.1.1): this very service serves the page it points to.
        "type": f"/problems/{error.slug}",
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
        "instance": instance,
        "request_id": request_id,
        **error.members,
    }


def error_for_status(status: int) -> AppError:
    """The error of this tree that a bare HTTP status means, as the web framework raises them."""
    meant = {error.status: error for error in (InvalidRequest, NotFound, MethodNotAllowed, PayloadTooLarge)}
    return meant.get(status, AppError)()


def all_errors() -> list[type[AppError]]:
    """Every class of the tree, parents first; the documentation pages are made from it."""
    found: list[type[AppError]] = []
    waiting: list[type[AppError]] = [AppError]
    while waiting:
        cls = waiting.pop(0)
        found.append(cls)
        waiting.extend(cls.__subclasses__())
    return found
