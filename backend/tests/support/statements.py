"""Sees every statement that a database runs, whichever way it goes: through SQLAlchemy or straight to the driver."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import aiosqlite
import asyncpg  # type: ignore[import-untyped]  # the driver ships no types
import sqlalchemy as sa

from backend.app.core.database import Database

Watcher = Callable[[str, Any], None]

# What `core/database.py` calls of the drivers themselves; SQLAlchemy calls other methods of theirs.
_STRAIGHT = (
    (asyncpg.Connection, "fetch"),
    (asyncpg.Connection, "execute"),
    (aiosqlite.Connection, "execute_fetchall"),
    (aiosqlite.Connection, "executemany"),
)


# The driver's own, around a transaction.
_AROUND = re.compile(r"(?:BEGIN\b.*|COMMIT|ROLLBACK);?")


def _is_asyncpg(connection: Any) -> bool:
    return isinstance(connection, asyncpg.Connection)


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

    def watched(run: Callable[..., Any]) -> Callable[..., Any]:
        async def run_watched(connection: Any, statement: str, *parameters: Any) -> Any:
            if _AROUND.fullmatch(statement):
                return await run(connection, statement, *parameters)
            # SQLite's driver takes all parameters as one.
            told = parameters if _is_asyncpg(connection) else parameters[0]
            before(statement, told)
            rows = await run(connection, statement, *parameters)
            after(statement, told)
            return rows

        return run_watched

    sa.event.listen(engine, "before_cursor_execute", on_before)
    sa.event.listen(engine, "after_cursor_execute", on_after)
    try:
        with contextlib.ExitStack() as patches:
            for kind, name in _STRAIGHT:
                patches.enter_context(mock.patch.object(kind, name, watched(getattr(kind, name))))
            yield
    finally:
        sa.event.remove(engine, "before_cursor_execute", on_before)
        sa.event.remove(engine, "after_cursor_execute", on_after)
