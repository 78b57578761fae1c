"""API keys: made once, shown once, kept only as a hash, each with a name and a scope.

A key has 256 random bits, so a plain SHA-256 is as good as a slow password hash and costs nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from weakref import WeakValueDictionary

import sqlalchemy as sa

from backend.app.core.clock import Clock
from backend.app.core.database import Database, UtcDateTime, metadata
from backend.app.core.errors import Forbidden, InvalidRequest, Unauthenticated
from backend.app.core.ids import new_id

KEY_PREFIX = "tk_"  # so that scanners and our own log redaction can tell a key from other text
KEY_RANDOM_BYTES = 32
NAME_CHARACTERS_MAX = 100
# Longer than any key of ours; what is longer is refused before it is hashed.
AUTHORIZATION_CHARACTERS_MAX = 200

# Reads come with every request of a product, so a key that was found is looked up once a second; one that
# was ended reads for this much longer. What changes something is always looked up.
KNOWN_SECONDS = 1.0

api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("scope", sa.Text, nullable=False),
    sa.Column("key_sha256", sa.Text, nullable=False, unique=True),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("revoked_at", UtcDateTime),
)


class Scope(StrEnum):
    """What a key may do; `admin` may do all that `read` may."""

    READ = "read"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Who makes a request: the key's id and name."""

    key_id: str
    name: str
    scope: Scope


class ApiKeys:
    """Makes and checks the keys of one database."""

    def __init__(
        self,
        database: Database,
        clock: Clock,
        *,
        monotonic_seconds: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._clock = clock
        self._monotonic_seconds = monotonic_seconds
        # Found keys by their hash, each with the moment from which on it is looked up again.
        self._known: dict[str, tuple[Principal, float]] = {}
        # A lock lives while somebody looks its key up.
        self._lookups: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def create(self, name: str, scope: Scope) -> str:
        """A new key; this is the only time that it is seen."""
        if not 0 < len(name) <= NAME_CHARACTERS_MAX or not name.isprintable():
            raise InvalidRequest(f"A key's name has 1 to {NAME_CHARACTERS_MAX} printable characters.")
        key = KEY_PREFIX + secrets.token_urlsafe(KEY_RANDOM_BYTES)
        async with self._database.transaction() as tx:
            await tx.execute(
                api_keys.insert().values(
                    id=new_id(),
                    name=name,
                    scope=scope.value,
                    key_sha256=_hash(key),
                    created_at=self._clock.now(),
                )
            )
        return key

    async def authenticate(self, authorization: str | None, needed: Scope) -> Principal:
        """Who an `Authorization: Bearer ...` header belongs to.

        Raises:
            Unauthenticated: there is no such key.
            Forbidden: the key's scope is not enough.
        """
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key or len(key) > AUTHORIZATION_CHARACTERS_MAX:
            raise Unauthenticated
        principal = await self._principal(_hash(key.strip()), anew=needed is Scope.ADMIN)
        if needed is Scope.ADMIN and principal.scope is not Scope.ADMIN:
            raise Forbidden
        return principal

    async def _principal(self, key_sha256: str, *, anew: bool) -> Principal:
        if anew:
            return await self._look_up(key_sha256)
        known = self._fresh(key_sha256)
        if known is not None:
            return known
        # Of the requests that come when it is time, one looks it up for all.
        async with self._lookups.setdefault(key_sha256, asyncio.Lock()):
            return self._fresh(key_sha256) or await self._look_up(key_sha256)

    def _fresh(self, key_sha256: str) -> Principal | None:
        known = self._known.get(key_sha256)
        return known[0] if known is not None and self._monotonic_seconds() < known[1] else None

    async def _look_up(self, key_sha256: str) -> Principal:
        now_seconds = self._monotonic_seconds()
        # An ended key must not stay in memory for ever.
        self._known.pop(key_sha256, None)
        async with self._database.snapshot() as tx:
            found = await tx.execute(
                sa.select(api_keys.c.id, api_keys.c.name, api_keys.c.scope).where(
                    api_keys.c.key_sha256 == key_sha256, api_keys.c.revoked_at.is_(None)
                )
            )
            row = found.first()
        if row is None:
            raise Unauthenticated
        principal = Principal(key_id=row.id, name=row.name, scope=Scope(row.scope))
        self._known[key_sha256] = (principal, now_seconds + KNOWN_SECONDS)
        return principal


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
