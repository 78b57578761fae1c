"""The audit table: rows are added and never changed; the database itself refuses anything else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from backend.app.core.database import Json, UtcDateTime, metadata

audit_logs = sa.Table(
    "audit_logs",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("user_id", sa.Text),
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("resource_type", sa.Text, nullable=False),
    sa.Column("resource_id", sa.Text, nullable=False),
    sa.Column("details", Json, nullable=False),
    # Who did it: `stripe:<event id>` for an event, `key:<name>` for a person's API key.
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("created_at", UtcDateTime, primary_key=True),
    # SHA-256 of the row's canonical JSON, so that a changed row can be told from a written one.
    sa.Column("content_sha256", sa.Text, nullable=False),
    sa.Index("ix_audit_logs_user_id", "user_id", "created_at"),
    sa.Index("ix_audit_logs_resource", "resource_type", "resource_id"),
    sa.Index("ix_audit_logs_created_at", "created_at"),
    postgresql_partition_by="RANGE (created_at)",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditLog:
    """One audit row: what was done to which resource, for which user, by whom."""

    id: str
    user_id: str | None
    action: str
    resource_type: str
    resource_id: str
    details: Mapping[str, Any]
    actor: str
    created_at: datetime
