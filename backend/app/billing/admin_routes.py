"""What people do over HTTP: manual grants, claims of guests' purchases, and events processed again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Path, Query, Request
from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StringConstraints,
)

from backend.app.billing.claims import (
    LINK_DAYS_DEFAULT,
    LINK_DAYS_MAX,
    TOKEN_CHARACTERS_MAX,
    Claimed,
    Claims,
    Wanted,
)
from backend.app.billing.grants import Grants, Terms, grant_document
from backend.app.billing.parked import StoredEvents, change_document, difference_document
from backend.app.billing.providers.fields import ID_CHARACTERS_MAX
from backend.app.billing.routes import UserId
from backend.app.core.clock import Clock, iso
from backend.app.core.errors import InvalidParameters
from backend.app.core.idempotency import foreign_key, idempotent
from backend.app.core.pages import PageRequest, page_request

# A sentence or two; who needs more keeps it in a ticket and names that.
REASON_CHARACTERS_MAX = 500
# More single values than any catalog has features would be a mistake.
FEATURES_MAX = 100
# As long as Stripe keeps its own keys; a repeat after a day is a new wish.
IDEMPOTENCY_TTL_SECONDS = 86_400
CLAIMS_PATH = "/api/v1/claims"


def _rfc_3339(value: object) -> object:
    if not isinstance(value, str):
        raise ValueError("an instant as RFC 3339, such as 2026-11-23T07:30:00Z, is expected")  # noqa: TRY004  # pydantic reports ValueError only
    return value


# PostgreSQL's text has no NUL.
Id = Annotated[str, StringConstraints(min_length=1, max_length=ID_CHARACTERS_MAX, pattern=r"^[^\x00]*$")]
Reason = Annotated[
    str,
    StringConstraints(
        strip_whitespace=True, min_length=1, max_length=REASON_CHARACTERS_MAX, pattern=r"^[^\x00]*$"
    ),
]
Instant = Annotated[AwareDatetime, BeforeValidator(_rfc_3339)]
PathId = Annotated[str, Path(min_length=1, max_length=ID_CHARACTERS_MAX, pattern=r"^[^\x00]*$")]
Account = Annotated[str | None, Query(max_length=ID_CHARACTERS_MAX, pattern=r"^[^\x00]*$")]
DryRun = Annotated[bool, Query(description="Only show the difference; nothing is written.")]
Paging = Annotated[PageRequest, Depends(page_request)]


class _Body(BaseModel):
    """A misspelt field must not be taken for an absent one."""

    model_config = ConfigDict(extra="forbid")


class GrantBody(_Body):
    """A grant: a plan, or values for single features, from and until when, and why."""

    plan_code: Id | None = None
    features: dict[Id, StrictBool | StrictInt | Id] = Field(default={}, max_length=FEATURES_MAX)
    override: StrictBool = False
    reason: Reason
    starts_at: Instant | None = None
    ends_at: Instant | None = None


class RemovalBody(_Body):
    """Why a grant is taken back."""

    reason: Reason


class ClaimBody(_Body):
    """What is bound to the user: a source such as `cs:cs_1`, or a customer with all that is theirs."""

    source: Id | None = None
    customer_id: Id | None = None
    account: Id | None = None
    reason: Reason
    move: StrictBool = False


class ClaimLinkBody(_Body):
    """The source that a link is for, and how long it can be used."""

    source: Id
    account: Id | None = None
    expires_in_days: Annotated[StrictInt, Field(ge=1, le=LINK_DAYS_MAX)] = LINK_DAYS_DEFAULT


class LinkClaimBody(_Body):
    """Who opened the link, by the login of the seller's own product."""

    user_id: Id


def removal_reason(
    body: Annotated[RemovalBody | None, Body()] = None,
    reason: Annotated[Reason | None, Query()] = None,
) -> str:
    """A dependency: the reason from the body or the query, because some clients send no body with DELETE."""
    given = body.reason if body is not None else reason
    if given is None:
        raise InvalidParameters.named("query", "reason", message="a reason is needed, here or in the body")
    return given


def grant_routes(
    grants: Grants, clock: Clock, needs_read_key: Callable[..., Any], needs_admin_key: Callable[..., Any]
) -> APIRouter:
    """Grants that people make."""
    router = APIRouter(prefix="/api/v1/users/{user_id}/grants", tags=["grants"])

    @router.post("", status_code=201, dependencies=[Depends(needs_admin_key)])
    @idempotent(operation="grant", ttl_seconds=IDEMPOTENCY_TTL_SECONDS)
    async def create_grant(user_id: UserId, body: GrantBody, request: Request) -> dict[str, Any]:
        """Gives a user a plan or single feature values; an override replaces what their sources come to."""
        terms = Terms(
            plan_code=body.plan_code,
            features=body.features,
            is_override=body.override,
            reason=body.reason,
            starts_at=body.starts_at,
            ends_at=body.ends_at,
        )
        grant = await grants.create(user_id, terms, actor=request.state.actor, action_id=_action_id("grant"))
        return grant_document(grant, at=clock.now())

    @router.delete("/{grant_id}", dependencies=[Depends(needs_admin_key)])
    @idempotent(operation="ungrant", ttl_seconds=IDEMPOTENCY_TTL_SECONDS)
    async def remove_grant(
        user_id: UserId, grant_id: PathId, reason: Annotated[str, Depends(removal_reason)], request: Request
    ) -> dict[str, Any]:
        """Takes a grant back now; what the user's other sources give stays."""
        grant = await grants.remove(
            user_id, grant_id, reason=reason, actor=request.state.actor, action_id=_action_id("ungrant")
        )
        return grant_document(grant, at=clock.now())

    @router.get("", dependencies=[Depends(needs_read_key)])
    async def list_grants(user_id: UserId, paging: Paging) -> dict[str, Any]:
        """A user's grants with their reasons, the newest first, those that are over too."""
        return await grants.page(user_id, paging)

    return router


def claim_routes(
    claims: Claims, needs_read_key: Callable[..., Any], needs_admin_key: Callable[..., Any]
) -> APIRouter:
    """Guests' purchases find their users."""
    router = APIRouter(tags=["claims"])

    @router.post("/api/v1/users/{user_id}/claims", status_code=201, dependencies=[Depends(needs_admin_key)])
    @idempotent(operation="claim", ttl_seconds=IDEMPOTENCY_TTL_SECONDS)
    async def claim(user_id: UserId, body: ClaimBody, request: Request) -> dict[str, Any]:
        """Binds a purchase, or a customer with all of theirs, to a user; `move` takes it from another."""
        if (body.source is None) == (body.customer_id is None):
            raise InvalidParameters.named("body", "source", message="name either a source or a customer_id")
        account = body.account or ""
        wanted = Wanted(
            user_id=user_id,
            source=claims.source(body.source, account) if body.source is not None else None,
            customer=claims.customer(body.customer_id, account) if body.customer_id is not None else None,
            reason=body.reason,
            may_move=body.move,
        )
        claimed = await claims.claim(wanted, actor=request.state.actor, action_id=_action_id("claim"))
        return _claimed_document(claimed)

    @router.post("/api/v1/claim-links", status_code=201, dependencies=[Depends(needs_admin_key)])
    async def create_claim_link(body: ClaimLinkBody, request: Request) -> dict[str, Any]:
        """A signed link that binds a waiting purchase, once, to the user who opens it."""
        source = claims.source(body.source, body.account or "")
        link = await claims.create_link(source, days=body.expires_in_days, actor=request.state.actor)
        return {"url_path": f"{CLAIMS_PATH}/{link.token}", "expires_at": iso(link.expires_at)}

    @router.post(CLAIMS_PATH + "/{token}", dependencies=[Depends(needs_read_key)])
    async def claim_by_link(
        token: Annotated[str, Path(max_length=TOKEN_CHARACTERS_MAX)], body: LinkClaimBody, request: Request
    ) -> dict[str, Any]:
        """Binds the link's purchase to the user whom the seller's product has logged in."""
        return _claimed_document(await claims.claim_by_link(token, body.user_id, actor=request.state.actor))

    return router


def reprocess_routes(events: StoredEvents, needs_admin_key: Callable[..., Any]) -> APIRouter:
    """Stored events, processed again."""
    router = APIRouter(prefix="/api/v1/events", tags=["events"], dependencies=[Depends(needs_admin_key)])

    @router.post("/reprocess-parked")
    async def reprocess_parked(
        request: Request,
        paging: Paging,
        reason: Annotated[str | None, Query(pattern=r"^[^\x00]*$")] = None,
        dry_run: DryRun = False,
    ) -> dict[str, Any]:
        """Processes parked events again, page by page, of one cause or of all; counts them by cause."""
        return await events.reprocess_parked(
            paging, reason=reason, actor=request.state.actor, dry_run=dry_run
        )

    @router.post("/{event_id}/reprocess")
    async def reprocess(
        event_id: PathId,
        request: Request,
        account: Account = None,
        livemode: bool | None = None,
        dry_run: DryRun = False,
    ) -> dict[str, Any]:
        """Processes a stored event again by what is known today, and shows what that changes for whom."""
        key = await events.find(event_id, account=account, livemode=livemode)
        done = await events.reprocess(key, actor=request.state.actor, dry_run=dry_run)
        return difference_document(done, dry_run=dry_run)

    return router


def _action_id(operation: str) -> str:
    """The id of what is asked for: the same each time this very request is carried out again."""
    return foreign_key().removeprefix(f"{operation}-")


def _claimed_document(claimed: Claimed) -> dict[str, Any]:
    wanted = claimed.wanted
    name = wanted.source or wanted.customer
    assert name is not None, "either a source or a customer is claimed"
    return {
        "user_id": wanted.user_id,
        "source": wanted.source.key if wanted.source else None,
        "customer_id": wanted.customer.id if wanted.customer else None,
        "account": name.account or None,
        "sources": [source.key for source in claimed.sources],
        "moved_from": list(claimed.moved_from),
        "changes": [change_document(change) for change in claimed.changes],
    }
