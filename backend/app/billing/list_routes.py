"""What happened, to be looked up over HTTP: payments, events and the audit log, in pages, the newest first."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query

from backend.app.billing import store_admin
from backend.app.billing.models import PaymentEvent
from backend.app.billing.parked import StoredEvents
from backend.app.billing.providers.fields import ID_CHARACTERS_MAX
from backend.app.billing.store_admin import ListedAudit, ListedEvent
from backend.app.core.clock import iso
from backend.app.core.database import Database
from backend.app.core.pages import PageRequest, page_request

PAYMENTS_LIST = "payments"
EVENTS_LIST = "events"
AUDIT_LIST = "audit"

# PostgreSQL's text has no NUL.
Filter = Annotated[str | None, Query(min_length=1, max_length=ID_CHARACTERS_MAX, pattern=r"^[^\x00]*$")]
EventStatus = Literal["success", "ignored", "parked", "failed"]
Paging = Annotated[PageRequest, Depends(page_request)]


def list_routes(
    database: Database, stored_events: StoredEvents, needs_read_key: Callable[..., Any]
) -> APIRouter:
    """The lists; none of them shows what was sent or answered, only what became of it."""
    router = APIRouter(prefix="/api/v1", tags=["lists"], dependencies=[Depends(needs_read_key)])

    @router.get("/payments")
    async def list_payments(paging: Paging, user_id: Filter = None) -> dict[str, Any]:
        """Ledger lines; `amount` is in the currency's smallest unit."""
        async with database.snapshot() as tx:
            rows = await store_admin.list_payments(
                tx,
                user_id=user_id,
                after=paging.after(PAYMENTS_LIST, datetime, str),
                limit=paging.rows_max,
            )
        return paging.page(
            PAYMENTS_LIST,
            rows,
            place=lambda payment: (payment.created_at, payment.id),
            document=payment_document,
        )

    @router.get("/events")
    async def list_events(
        paging: Paging,
        status: EventStatus | None = None,
        event_type: Annotated[Filter, Query(alias="type")] = None,
        user_id: Filter = None,
    ) -> dict[str, Any]:
        """Stored events and what became of each."""
        async with database.snapshot() as tx:
            rows = await store_admin.list_events(
                tx,
                status=status,
                event_type=event_type,
                user_id=user_id,
                after=paging.after(EVENTS_LIST, datetime, str, bool, str),
                limit=paging.rows_max,
            )
        return paging.page(
            EVENTS_LIST,
            rows,
            place=lambda event: (event.received_at, event.account, event.livemode, event.event_id),
            document=event_document,
        )

    @router.get("/events/parked")
    async def list_parked(paging: Paging) -> dict[str, Any]:
        """What parked events wait for: each cause with how many wait and since when."""
        return await stored_events.parked_groups(paging)

    @router.get("/audit")
    async def list_audit(paging: Paging, user_id: Filter = None, action: Filter = None) -> dict[str, Any]:
        """What was done, to whom, by whom and because of what."""
        async with database.snapshot() as tx:
            rows = await store_admin.list_audit(
                tx,
                user_id=user_id,
                action=action,
                after=paging.after(AUDIT_LIST, datetime, str),
                limit=paging.rows_max,
            )
        return paging.page(
            AUDIT_LIST, rows, place=lambda row: (row.created_at, row.id), document=audit_document
        )

    return router


def payment_document(payment: PaymentEvent) -> dict[str, Any]:
    """The JSON of a ledger line."""
    return {
        "id": payment.id,
        "user_id": payment.user_id,
        "event_type": payment.event_type,
        "plan_code": payment.plan_code,
        "amount": payment.amount,
        "currency": payment.currency,
        "settled": payment.settled,
        "customer_id": payment.customer_id,
        "invoice_id": payment.invoice_id,
        "subscription_id": payment.subscription_id,
        "subject": payment.subject_key,
        "stripe_event_id": payment.stripe_event_id,
        "account": payment.account or None,
        "livemode": payment.livemode,
        "occurred_at": iso(payment.occurred_at),
        "created_at": iso(payment.created_at),
    }


def event_document(event: ListedEvent) -> dict[str, Any]:
    """The JSON of a stored event, without its bytes and its answer."""
    return {
        "event_id": event.event_id,
        "event_type": event.event_type,
        "status": event.status,
        "reason": event.reason,
        "attempts": event.attempts,
        "user_id": event.user_id,
        "plan_code": event.plan_code,
        "customer_id": event.customer_id,
        "subject": event.subject_key,
        "account": event.account or None,
        "livemode": event.livemode,
        "api_version": event.api_version,
        "request_id": event.request_id or None,
        "occurred_at": iso(event.occurred_at),
        "received_at": iso(event.received_at),
    }


def audit_document(row: ListedAudit) -> dict[str, Any]:
    """The JSON of an audit row."""
    return {
        "id": row.id,
        "user_id": row.user_id,
        "action": row.action,
        "resource_type": row.resource_type,
        "resource_id": row.resource_id,
        "details": row.details,
        "actor": row.actor,
        "created_at": iso(row.created_at),
        "content_sha256": row.content_sha256,
    }
