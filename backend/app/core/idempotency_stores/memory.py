"""Idempotency records in this process's memory: for one process whose repeats may be forgotten at its end."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from backend.app.core.clock import Clock
from backend.app.core.errors import Unavailable
from backend.app.core.idempotency_stores.record import Answer, Record, RecordKey, State

# About 100 MB of small answers at the very most; beyond it new work is refused rather than old work repeated.
RECORDS_MAX = 100_000


@dataclass(frozen=True, slots=True)
class _Kept:
    record: Record
    lease_until: datetime
    forget_after: datetime


class MemoryStore:
    """An IdempotencyStore without a server. No method awaits, so each is atomic within its event loop."""

    def __init__(self, clock: Clock, *, records_max: int = RECORDS_MAX) -> None:
        self._clock = clock
        self._records_max = records_max
        self._kept: dict[RecordKey, _Kept] = {}

    async def claim(
        self, key: RecordKey, fingerprint: str, token: str, *, lease_seconds: float, ttl_seconds: float
    ) -> Record:
        """See IdempotencyStore."""
        now = self._clock.now()
        kept = self._find(key, now)
        if kept is not None and (
            kept.record.state is State.COMPLETED
            or kept.record.fingerprint != fingerprint
            or kept.lease_until > now
        ):
            return _as_of(kept, now)
        record = Record(
            key=key,
            fingerprint=fingerprint,
            state=State.IN_PROGRESS,
            record_id=kept.record.record_id if kept else token,
            token=token,
            lease_seconds_left=lease_seconds,
            answer=None,
        )
        lease_until = now + timedelta(seconds=lease_seconds)
        self._keep(_Kept(record, lease_until, lease_until + timedelta(seconds=ttl_seconds)), now)
        return record

    async def complete(self, key: RecordKey, token: str, answer: Answer, *, ttl_seconds: float) -> bool:
        """See IdempotencyStore."""
        now = self._clock.now()
        kept = self._held(key, token, now)
        if kept is None:
            return False
        record = replace(kept.record, state=State.COMPLETED, answer=answer)
        self._kept[key] = replace(kept, record=record, forget_after=now + timedelta(seconds=ttl_seconds))
        return True

    async def mark_ambiguous(self, key: RecordKey, token: str) -> bool:
        """See IdempotencyStore."""
        kept = self._held(key, token, self._clock.now())
        if kept is None:
            return False
        self._kept[key] = replace(kept, record=replace(kept.record, state=State.AMBIGUOUS))
        return True

    async def release(self, key: RecordKey, token: str) -> bool:
        """See IdempotencyStore."""
        if self._held(key, token, self._clock.now()) is None:
            return False
        del self._kept[key]
        return True

    async def read(self, key: RecordKey) -> Record | None:
        """See IdempotencyStore."""
        now = self._clock.now()
        kept = self._find(key, now)
        return _as_of(kept, now) if kept else None

    async def remember(
        self, key: RecordKey, fingerprint: str, token: str, answer: Answer, *, ttl_seconds: float
    ) -> Record:
        """See IdempotencyStore."""
        now = self._clock.now()
        kept = self._find(key, now)
        if kept is not None:
            return _as_of(kept, now)
        record = Record(key, fingerprint, State.COMPLETED, token, token, 0.0, answer)
        self._keep(_Kept(record, now, now + timedelta(seconds=ttl_seconds)), now)
        return record

    def _find(self, key: RecordKey, now: datetime) -> _Kept | None:
        kept = self._kept.get(key)
        return kept if kept is not None and kept.forget_after > now else None

    def _held(self, key: RecordKey, token: str, now: datetime) -> _Kept | None:
        kept = self._find(key, now)
        if kept is None or kept.record.token != token or kept.record.state is not State.IN_PROGRESS:
            return None
        return kept if kept.lease_until > now else None

    def _keep(self, kept: _Kept, now: datetime) -> None:
        if kept.record.key not in self._kept and len(self._kept) >= self._records_max:
            self._kept = {key: old for key, old in self._kept.items() if old.forget_after > now}
            if len(self._kept) >= self._records_max:
                raise Unavailable
        self._kept[kept.record.key] = kept


def _as_of(kept: _Kept, now: datetime) -> Record:
    return replace(kept.record, lease_seconds_left=(kept.lease_until - now).total_seconds())
