"""What a load balancer and Prometheus ask: is the process alive, can it work, what has it counted."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog
from fastapi import APIRouter, Response

from backend.app.core.errors import StoreUnavailable, Unavailable
from backend.app.observability.metrics import METRICS_CONTENT_TYPE, MetricsCollector

# A load balancer's own limit is a few seconds; an answer that comes later counts as none.
CHECK_SECONDS_MAX = 3.0

log = structlog.get_logger(__name__)

Check = Callable[[], Awaitable[None]]


def health_routes(
    *,
    database_check: Check,
    redis_check: Check | None,
    refresh_gauges: Check,
    metrics: MetricsCollector,
) -> APIRouter:
    """`/livez`, `/readyz` and `/metrics`. A check returns or raises; Redis may fail without harm."""
    router = APIRouter(tags=["operations"])

    @router.get("/livez")
    async def livez() -> dict[str, str]:
        """The process runs and answers."""
        return {"status": "ok"}

    @router.get("/readyz")
    async def readyz() -> dict[str, str]:
        """The database answers and has this version's schema; Redis may be degraded."""
        try:
            async with asyncio.timeout(CHECK_SECONDS_MAX):
                await database_check()
        except TimeoutError as error:
            raise StoreUnavailable from error
        return {"status": "ok", "database": "ok", "redis": await _redis_state(redis_check)}

    @router.get("/metrics")
    async def show_metrics() -> Response:
        """All metrics in Prometheus's text format."""
        try:
            async with asyncio.timeout(CHECK_SECONDS_MAX):
                await refresh_gauges()
        except (Unavailable, TimeoutError) as error:
            # The counters matter most when the store is down; its gauges keep their last values.
            log.warning("gauges_not_refreshed", error=type(error).__name__)
        return Response(metrics.render(), media_type=METRICS_CONTENT_TYPE)

    return router


async def _redis_state(redis_check: Check | None) -> str:
    if redis_check is None:
        return "off"
    try:
        async with asyncio.timeout(CHECK_SECONDS_MAX):
            await redis_check()
    except (Unavailable, TimeoutError):
        return "degraded"
    return "ok"
