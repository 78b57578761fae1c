"""The one source of the current time, handed to whoever needs it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """Tells the time; tests hand in one that they set."""

    def now(self) -> datetime:
        """The present instant, aware, in UTC."""
        ...


class SystemClock:
    """The machine's clock."""

    def now(self) -> datetime:
        """The present instant, aware, in UTC."""
        return datetime.now(UTC)


def from_unix(seconds: int) -> datetime:
    """An aware UTC instant from whole seconds since 1970, Stripe's form of time."""
    return datetime.fromtimestamp(seconds, UTC)


def to_unix(instant: datetime) -> int:
    """Whole seconds since 1970."""
    return int(instant.timestamp())


def iso(instant: datetime) -> str:
    """RFC 3339 in UTC with a `Z`: whole seconds as 2026-11-23T07:30:00Z, else with six more digits."""
    return instant.astimezone(UTC).isoformat().replace("+00:00", "Z")
