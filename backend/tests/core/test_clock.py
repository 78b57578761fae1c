"""A month is a calendar month, wherever it begins and ends."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.app.core.clock import months_before


@pytest.mark.parametrize(
    ("instant", "months", "before"),
    [
        ("2026-11-23", 1, "2026-10-23"),
        ("2026-11-23", 13, "2025-10-23"),
        ("2026-01-15", 1, "2025-12-15"),
        ("2026-12-31", 12, "2025-12-31"),
        ("2026-12-31", 13, "2025-11-30"),
        ("2026-03-31", 1, "2026-02-28"),
        ("2028-03-31", 1, "2028-02-29"),
        ("2028-02-29", 12, "2027-02-28"),
        ("2028-02-29", 48, "2024-02-29"),
        ("2026-05-31", 1, "2026-04-30"),
        ("2026-11-23", 1_200, "1926-11-23"),
    ],
)
def test_some_months_before_is_the_same_day_or_the_last_of_its_month(
    instant: str, months: int, before: str
) -> None:
    time = "T07:30:00.123456+00:00"
    assert months_before(datetime.fromisoformat(instant + time), months) == datetime.fromisoformat(
        before + time
    )


def test_the_day_is_that_of_utc() -> None:
    """An hour into March in Auckland is still February."""
    auckland = timezone(timedelta(hours=13))
    assert months_before(datetime(2026, 3, 1, 1, tzinfo=auckland), 1) == datetime(2026, 1, 28, 12, tzinfo=UTC)


@given(
    st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001  # hypothesis adds the zone
    st.integers(1, 240),
)
def test_nothing_counts_as_older_than_it_is(instant: datetime, months: int) -> None:
    """What came a moment after the horizon is not yet so many months old, counted forward from its own day."""
    before = months_before(instant, months)
    assert (instant.year - before.year) * 12 + instant.month - before.month == months
    assert before.day <= instant.day
    assert months_before(instant + timedelta(days=1), months) >= before


def test_before_the_year_one_there_was_nothing() -> None:
    with pytest.raises(ValueError, match="there was no year"):
        months_before(datetime(2026, 1, 1, tzinfo=UTC), 30_000)
