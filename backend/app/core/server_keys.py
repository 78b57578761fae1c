"""Random keys that the server signs with: made on first use, kept in the database, shared by all workers."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from datetime import datetime

import sqlalchemy as sa

from backend.app.core.database import Tx, UtcDateTime, insert, metadata

# As many as HMAC-SHA256 can make use of (RFC 2104 section 3).
SERVER_KEY_BYTES = 32

server_keys = sa.Table(
    "server_keys",
    metadata,
    # What it is for, such as `claim-links`.
    sa.Column("purpose", sa.Text, primary_key=True),
    sa.Column("random_bytes", sa.LargeBinary, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
)


async def signing_key(tx: Tx, purpose: str, *, now: datetime) -> bytes:
    """The key for one purpose, which is made here if there is none yet."""
    await tx.execute(
        insert(server_keys, tx)
        .values(purpose=purpose, random_bytes=secrets.token_bytes(SERVER_KEY_BYTES), created_at=now)
        .on_conflict_do_nothing()
    )
    return _derived((await tx.execute(_stored(purpose))).scalar_one(), purpose)


def _stored(purpose: str) -> sa.Select[bytes]:
    return sa.select(server_keys.c.random_bytes).where(server_keys.c.purpose == purpose)


def _derived(random_bytes: bytes, purpose: str) -> bytes:
    """HKDF's expansion of one block (RFC 5869 2.3): a signature for one purpose is none for another."""
    return hmac.digest(random_bytes, purpose.encode() + b"\x01", hashlib.sha256)
