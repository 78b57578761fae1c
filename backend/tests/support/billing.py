"""A whole service in the test's own process, and the few verbs that billing tests speak in."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2 as httpx
import sqlalchemy as sa
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from backend.app.billing.routes import WEBHOOK_PATH
from backend.app.billing.security import sign
from backend.app.core.api_keys import Scope
from backend.app.core.settings import Settings
from backend.app.main import Service, create_app
from backend.app.simulator.world import History
from backend.tests.support.leaks import must_stay_secret
from backend.tests.support.statements import watched_statements

WEBHOOK_SECRET = "whsec_test_0123456789abcdefghijklmnop"


@dataclass
class SettableClock:
    """A clock that stands still at the real time of its making until a test moves it."""

    instant: datetime = field(default_factory=lambda: datetime.now(UTC))

    def now(self) -> datetime:
        return self.instant

    def advance(self, **duration: float) -> None:
        """Moves on by a `timedelta`'s arguments."""
        self.instant += timedelta(**duration)


@dataclass
class Harness:
    """A running service, spoken to over HTTP (ASGI) and looked into with SQL."""

    app: FastAPI
    service: Service
    client: httpx.AsyncClient
    clock: SettableClock

    async def deliver(
        self, event: Mapping[str, Any] | bytes, *, secret: str = WEBHOOK_SECRET
    ) -> httpx.Response:
        """Posts an event as Stripe would: its bytes, signed now."""
        body = event if isinstance(event, bytes) else json.dumps(event).encode()
        signature = sign(body, secret.encode(), timestamp=int(self.clock.now().timestamp()))
        must_stay_secret(secret=secret, signature_header=signature)
        return await self.client.post(
            WEBHOOK_PATH,
            content=body,
            headers={"Content-Type": "application/json", "Stripe-Signature": signature},
        )

    async def rows(self, sql: str, **parameters: Any) -> list[dict[str, Any]]:
        """What people see who query the tables by hand."""
        async with self.service.database.snapshot() as tx:
            return [dict(row) for row in (await tx.execute(sa.text(sql), parameters)).mappings()]

    async def count(self, table: str) -> int:
        """How many rows a table has."""
        return int((await self.rows(f"SELECT count(*) AS n FROM {table}"))[0]["n"])

    async def entitlements(self, user_id: str) -> dict[str, Any]:
        """The API's answer about a user."""
        key = await self.service.api_keys.create("test", Scope.READ)
        response = await self.client.get(
            f"/api/v1/entitlements/{user_id}", headers={"Authorization": f"Bearer {key}"}
        )
        assert response.status_code == 200, response.text
        document: dict[str, Any] = response.json()
        return document

    async def metric(self, name: str, **labels: str) -> float:
        """A sample's value as Prometheus would read it, 0 where it does not exist yet."""
        response = await self.client.get("/metrics")
        for family in text_string_to_metric_families(response.text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    return float(sample.value)
        return 0.0


def test_settings(database_url: str, **overrides: Any) -> Settings:
    """Settings for a test's service; nothing comes from the environment but what a test puts there."""
    values: dict[str, Any] = {
        "database_url": database_url,
        "stripe_webhook_secret": SecretStr(WEBHOOK_SECRET),
        **overrides,
    }
    return Settings(**values)


test_settings.__test__ = False  # type: ignore[attr-defined]  # pytest would take it for a test


@contextlib.asynccontextmanager
async def running_service(database_url: str, **overrides: Any) -> AsyncIterator[Harness]:
    """A started service on a migrated database; it is stopped, and its connections closed, at the end."""
    clock = SettableClock()
    app = create_app(test_settings(database_url, **overrides), clock=clock)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://tollkeeper.test") as client:
            yield Harness(app=app, service=app.state.service, client=client, clock=clock)


@contextlib.contextmanager
def statements(harness: Harness) -> Iterator[list[str]]:
    """The statements that a service sends while the block runs."""
    seen: list[str] = []
    with watched_statements(
        harness.service.database, before=lambda statement, _parameters: seen.append(statement)
    ):
        yield seen


async def deliver_all(harness: Harness, histories: Iterable[History]) -> None:
    """Whole simulated lives: each user's events in their order, all users side by side."""

    async def deliver(history: History) -> None:
        for event in history.events:
            response = await harness.deliver(event)
            assert response.status_code == 200, response.text

    await asyncio.gather(*(deliver(history) for history in histories))


def unix_now() -> int:
    """The present second."""
    return int(time.time())
