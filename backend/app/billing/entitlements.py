"""The read side: what a user may do now, computed from their sources at the moment of the question.

Expiry is computed when it is read, so no timer can forget to revoke.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from backend.app.billing import store
from backend.app.billing.domain.access import Reading, Source, read_source
from backend.app.billing.domain.catalog import Catalog
from backend.app.billing.domain.decide import Entitlement, entitlement_of
from backend.app.core.clock import iso
from backend.app.core.database import Database, database_now


@dataclass(frozen=True, slots=True, kw_only=True)
class CurrentAccess:
    """A user's entitlement at an instant and what each of their sources comes to."""

    entitlement: Entitlement
    sources: tuple[tuple[Source, Reading], ...]
    at: datetime


class EntitlementService:
    """Answers what users may do, by the database's clock."""

    def __init__(self, database: Database, catalog: Catalog) -> None:
        self._database = database
        self._catalog = catalog

    async def current(self, user_id: str) -> CurrentAccess:
        """What a user may do now; a user nobody has heard of has the default plan."""
        async with self._database.snapshot() as tx:
            now = await database_now(tx)
            sources = await store.load_sources_of_user(tx, user_id)
            # What has occurred is in force, also where this clock is a little behind Stripe's.
            now = max([now, *(fact.as_of for source in sources for fact in source.facts)])
            row = await store.load_entitlement(tx, user_id)
        entitlement = entitlement_of(
            self._catalog,
            user_id,
            sources,
            at=now,
            version=row.version if row else 0,
            activated_at=row.activated_at if row else None,
        )
        readings = tuple(
            (source, read_source(self._catalog, source))
            for source in sorted(sources, key=lambda source: source.id)
        )
        return CurrentAccess(entitlement=entitlement, sources=readings, at=now)


def entitlement_document(current: CurrentAccess) -> dict[str, Any]:
    """The JSON answer to `GET /api/v1/entitlements/{user_id}`; instants as RFC 3339 in UTC."""
    entitlement = current.entitlement
    return {
        "user_id": entitlement.user_id,
        "plan_code": entitlement.plan_code,
        "status": entitlement.status,
        "entitlements": dict(entitlement.features),
        "valid_until": iso(entitlement.valid_until) if entitlement.valid_until else None,
        "version": entitlement.version,
        "sources": [_source_document(source, reading, current.at) for source, reading in current.sources],
    }


def _source_document(source: Source, reading: Reading, at: datetime) -> dict[str, Any]:
    return {
        "source": source.id.key,
        "account": source.id.account or None,
        "customer_id": source.customer_id,
        "status": reading.status,
        "since": iso(reading.as_of),
        "plans": [
            {
                "plan_code": access.plan.code,
                "granted": access.is_live(at),
                "starts_at": iso(access.starts_at),
                "ends_at": iso(access.ends_at) if access.ends_at else None,
            }
            for access in reading.accesses
        ],
        "unknown": list(reading.unknown),
    }
