"""Sees every statement that a database runs, whichever way it goes: through SQLAlchemy or straight to the driver."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import asyncpg  # type: ignore[import-untyped]  # the driver ships no types
import sqlalchemy as sa

from backend.app.core.database import Database

Watcher = Callable[[str, Any], None]


def _nothing(_statement: str, _parameters: Any) -> None:
    pass


@contextlib.contextmanager
def watched_statements(
    database: Database, *, before: Watcher = _nothing, after: Watcher = _nothing
) -> Iterator[None]:
    """Calls `before(statement, parameters)` and `after(...)` around every statement, until the block ends.

    What they raise is raised to who ran the statement.
    """
    engine = database.engine.sync_engine

    def on_before(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_rest: Any) -> None:
        before(statement, parameters)

    def on_after(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_rest: Any) -> None:
        after(statement, parameters)

    fetch = asyncpg.Connection.fetch

    async def watched_fetch(connection: Any, statement: str, *parameters: Any, **options: Any) -> Any:
        before(statement, parameters)
        rows = await fetch(connection, statement, *parameters, **options)
        after(statement, parameters)
        return rows

    sa.event.listen(engine, "before_cursor_execute", on_before)
    sa.event.listen(engine, "after_cursor_execute", on_after)
    try:
        with mock.patch.object(asyncpg.Connection, "fetch", watched_fetch):
            yield
    finally:
        sa.event.remove(engine, "before_cursor_execute", on_before)
        sa.event.remove(engine, "after_cursor_execute", on_after)
