"""The database itself refuses to change or remove what the audit log says."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from backend.tests.faults import events
from backend.tests.support.billing import Harness

FORBIDDEN = ["UPDATE audit_logs SET action = 'nothing'", "DELETE FROM audit_logs"]


@pytest.mark.parametrize("statement", [*FORBIDDEN, "TRUNCATE audit_logs", "TRUNCATE audit_logs CASCADE"])
async def test_audit_rows_can_not_be_changed_or_removed(service: Harness, statement: str) -> None:
    # SQLite has no TRUNCATE: there the sentence itself is the error.
    words = (
        "syntax error" if service.service.database.is_sqlite and "TRUNCATE" in statement else "append-only"
    )
    assert (await service.deliver(events.purchase("audited", user_id="user_audited"))).status_code == 200
    before = await service.rows("SELECT * FROM audit_logs ORDER BY id")
    with pytest.raises(sa.exc.DBAPIError, match=words):
        async with service.service.database.engine.begin() as connection:
            await connection.execute(sa.text(statement))
    assert await service.rows("SELECT * FROM audit_logs ORDER BY id") == before
    assert len(before) == 2
