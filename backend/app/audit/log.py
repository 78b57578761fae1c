"""Appending to the audit log, always inside the transaction of the thing that is recorded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from backend.app.audit.models import AuditLog, audit_logs
from backend.app.core.bulk import Insert, insert_all
from backend.app.core.clock import iso
from backend.app.core.database import Tx

# Made once: `json.dumps` makes one for each call that asks for anything but its defaults.
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"))


async def append(tx: Tx, rows: Sequence[AuditLog]) -> None:
    """Adds rows to the open transaction; they are there if and only if it commits."""
    await insert_all(tx, [insert_rows(rows)])


def insert_rows(rows: Sequence[AuditLog]) -> Insert:
    """What adds the rows, to go with the other rows of a transaction."""
    return Insert(
        audit_logs,
        [
            {
                "id": row.id,
                "user_id": row.user_id,
                "action": row.action,
                "resource_type": row.resource_type,
                "resource_id": row.resource_id,
                "details": dict(row.details),
                "actor": row.actor,
                "created_at": row.created_at,
                "content_sha256": hashlib.sha256(canonical(row)).hexdigest(),
            }
            for row in rows
        ],
    )


def canonical(row: AuditLog) -> bytes:
    """The one byte form of a row: JSON with sorted keys, no spaces, ASCII only, times as RFC 3339 in UTC."""
    return _CANONICAL.encode(
        {
            "id": row.id,
            "user_id": row.user_id,
            "action": row.action,
            "resource_type": row.resource_type,
            "resource_id": row.resource_id,
            "details": dict(row.details),
            "actor": row.actor,
            "created_at": iso(row.created_at),
        }
    ).encode("ascii")
