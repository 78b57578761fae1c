"""The database's URL as users have it, and the driver's as it wants it."""

from __future__ import annotations

import pytest

from backend.app.core.database import async_url


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("postgresql://u@db/app", "postgresql+asyncpg://u@db/app"),
        ("postgres://u@db/app", "postgresql+asyncpg://u@db/app"),
        ("postgresql://u@db/app?sslmode=require", "postgresql+asyncpg://u@db/app?ssl=require"),
        ("sqlite:///./t.db", "sqlite+aiosqlite:///./t.db"),
    ],
)
def test_a_url_as_hosting_services_hand_it_out_is_understood(given: str, meant: str) -> None:
    assert async_url(given).render_as_string(hide_password=False) == meant


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("postgresql://u@db/app?pool=9", "pool"),
        ("mysql://u@db/app", "mysql"),
        ("sqlite://", "in-memory"),
        ("nonsense", "not a database URL"),
    ],
)
def test_a_url_that_can_not_work_is_refused_with_its_reason(given: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        async_url(given)
