"""The one source of the current time, handed to whoever needs it."""

from __future__ import annotations

import calendar
from datetime import MINYEAR, UTC, datetime
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


def months_before(instant: datetime, months: int) -> datetime:
    """The same day and time some calendar months earlier, in UTC; the last day of a month that has no such day.

    From 31 March one month before is 28 or 29 February: never later than the day, so nothing counts as
    older than it is.

    Raises:
        ValueError: that is before the year 1.
    """
    instant = instant.astimezone(UTC)
    year, month_index = divmod(instant.year * 12 + instant.month - 1 - months, 12)
    if year < MINYEAR:
        raise ValueError(f"{months} months before {iso(instant)} there was no year")
    days = calendar.monthrange(year, month_index + 1)[1]
    return instant.replace(year=year, month=month_index + 1, day=min(instant.day, days))


def to_unix(instant: datetime) -> int:
    """Whole seconds since 1970."""
    return int(instant.timestamp())


def iso(instant: datetime) -> str:
    """RFC 3339 in UTC with a `Z`: whole seconds as 2026-11-23T07:30:00Z, else with six more digits."""
    return instant.astimezone(UTC).isoformat().replace("+00:00", "Z")
