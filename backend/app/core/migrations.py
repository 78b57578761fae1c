"""Brings a database to the schema of this version, and tells whether it is there."""

from __future__ import annotations

import functools
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory

from backend.app.core.database import Database
from backend.app.core.partitions import create_months

MIGRATIONS_DIRECTORY = Path(__file__).parents[2] / "migrations"

# Two operators who migrate at once: the second waits for the first. Any constant number does.
_ADVISORY_LOCK = 7_402_561_938


async def migrate(database: Database) -> None:
    """Applies every migration that is missing and makes the months ahead, all in one transaction."""
    async with database.migration() as tx:
        if not database.is_sqlite:
            await tx.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
        await tx.run_sync(_upgrade)
        await create_months(tx)


async def is_current(database: Database) -> bool:
    """Whether the database has this version's schema."""
    async with database.snapshot() as tx:
        if not await tx.run_sync(lambda sync: sa.inspect(sync).has_table("alembic_version")):
            return False
        result = await tx.execute(sa.text("SELECT version_num FROM alembic_version"))
        return result.scalar_one_or_none() == _head()


@functools.cache
def _head() -> str | None:
    return ScriptDirectory.from_config(_config()).get_current_head()


def _upgrade(connection: sa.Connection) -> None:
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS_DIRECTORY))
    return config
