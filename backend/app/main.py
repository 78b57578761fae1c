"""Builds the service from its settings: the only place, beside the command line, where parts meet."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import redis.asyncio
from fastapi import FastAPI, Request
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from backend.app.billing import store
from backend.app.billing.admin_routes import claim_routes, grant_routes, reprocess_routes
from backend.app.billing.answers import Answers
from backend.app.billing.claims import Claims
from backend.app.billing.domain.catalog import Catalog, CatalogError, parse_catalog
from backend.app.billing.entitlements import EntitlementService
from backend.app.billing.grants import Grants
from backend.app.billing.hot_reads import HotReads
from backend.app.billing.list_routes import list_routes
from backend.app.billing.ofrep import Evaluations, ofrep_routes
from backend.app.billing.parked import StoredEvents
from backend.app.billing.pseudonymise import PSEUDONYMISE, Pseudonymiser
from backend.app.billing.reread import REREAD, Rereader
from backend.app.billing.routes import WEBHOOK_PATH, WebhookEndpoint, entitlement_routes
from backend.app.billing.security import (
    REDIS_CALL_SECONDS_MAX,
    SecretSource,
    WebhookReplayProtection,
    WebhookSecurityValidator,
)
from backend.app.billing.stripe_api import StripeApi
from backend.app.billing.webhooks import BillingWebhooks
from backend.app.core.api_keys import ApiKeys, Principal, Scope
from backend.app.core.clock import Clock, SystemClock
from backend.app.core.database import Database
from backend.app.core.errors import NotFound, StoreUnavailable, Unavailable, all_errors
from backend.app.core.http import Ahead, BodyLimit, RequestContext, install_problem_handlers
from backend.app.core.idempotency import IdempotencyHandler, IdempotencyStore, RedisStore, SqlStore
from backend.app.core.migrations import is_current
from backend.app.core.settings import Settings
from backend.app.observability.metrics import MetricsCollector, get_metrics
from backend.app.ops.alerts import OWNER_ALERT, OwnerAlerts, install_owner_alerts
from backend.app.ops.health import health_routes
from backend.app.ops.outbox import Relay

SHIPPED_CATALOG = Path(__file__).parent / "billing" / "catalog.toml"


@dataclass(frozen=True, kw_only=True)
class Service:
    """All parts of one running deployment."""

    settings: Settings
    clock: Clock
    database: Database
    redis: redis.asyncio.Redis | None
    stripe_api: StripeApi | None
    catalog: Catalog
    alerts: OwnerAlerts
    relay: Relay
    metrics: MetricsCollector
    webhooks: BillingWebhooks
    entitlements: EntitlementService
    answers: Answers
    grants: Grants
    claims: Claims
    stored_events: StoredEvents
    api_keys: ApiKeys
    idempotency_store: IdempotencyStore


def build(settings: Settings, *, clock: Clock | None = None) -> Service:
    """Every part, wired; nothing is connected or started yet.

    Raises:
        ValueError: a setting can't be used; the message names it and never contains a secret.
    """
    clock = clock or SystemClock()
    metrics = get_metrics()
    database = Database.open(settings.database_url)
    redis_client = open_redis(settings.redis_url) if settings.redis_url else None
    alerts = OwnerAlerts(settings.alert_urls.get_secret_value())
    api = open_stripe_api(settings)
    relay = Relay(database, {OWNER_ALERT: alerts.deliver})
    catalog = load_catalog(settings)
    replay_memory = (
        IdempotencyHandler(
            RedisStore(redis_client), operation="webhook", ttl_seconds=settings.webhook_replay_ttl_seconds
        )
        if redis_client is not None
        else None
    )
    webhooks = BillingWebhooks(
        database=database,
        catalog=catalog,
        validator=WebhookSecurityValidator(
            open_secrets(settings), tolerance_seconds=settings.webhook_tolerance_seconds
        ),
        replay=WebhookReplayProtection(replay_memory, metrics=metrics),
        alerts=alerts,
        relay=relay,
        metrics=metrics,
        clock=clock,
        livemode=settings.livemode,
        rereads=api is not None,
    )
    relay.handle(PSEUDONYMISE, Pseudonymiser(database, clock).deliver)
    if api is not None:
        relay.handle(REREAD, Rereader(api, webhooks.take_read).deliver)
    return Service(
        settings=settings,
        clock=clock,
        database=database,
        redis=redis_client,
        stripe_api=api,
        catalog=catalog,
        alerts=alerts,
        relay=relay,
        metrics=metrics,
        webhooks=webhooks,
        entitlements=EntitlementService(database, catalog),
        answers=Answers(database, catalog),
        grants=Grants(
            database=database, catalog=catalog, webhooks=webhooks, clock=clock, livemode=settings.livemode
        ),
        claims=Claims(database=database, webhooks=webhooks, clock=clock, livemode=settings.livemode),
        stored_events=StoredEvents(database=database, webhooks=webhooks, clock=clock),
        api_keys=ApiKeys(database, clock),
        idempotency_store=SqlStore(database),
    )


def create_app(settings: Settings | None = None, *, clock: Clock | None = None) -> FastAPI:
    """The ASGI application of a service."""
    service = build(settings or Settings(), clock=clock)

    app = FastAPI(
        title="Tollkeeper",
        version=metadata.version("tollkeeper"),
        summary="Signed Stripe webhooks in, provable entitlements out.",
        lifespan=lambda _app: _started(service),
        docs_url=None,
        redoc_url=None,
        # Stripe follows no redirects: a wrong address must say so.
        redirect_slashes=False,
    )
    app.state.service = service
    app.state.idempotency_store = service.idempotency_store
    install_problem_handlers(app)
    body_bytes_max = service.settings.webhook_body_bytes_max
    webhook = WebhookEndpoint(service.webhooks, service.clock)
    # Known to the framework too, so that other methods are 405.
    app.router.routes.append(Route(WEBHOOK_PATH, endpoint=webhook, methods=["POST"]))
    app.add_middleware(BodyLimit, body_bytes_max=body_bytes_max)
    # Added later, so it is further out: refusals of the other middleware carry the request's id too.
    app.add_middleware(RequestContext)

    async def needs_read_key(request: Request) -> Principal:
        principal = await service.api_keys.authenticate(request.headers.get("authorization"), Scope.READ)
        request.state.caller = principal.key_id
        request.state.actor = f"key:{principal.name}"
        return principal

    async def needs_admin_key(request: Request) -> Principal:
        principal = await service.api_keys.authenticate(request.headers.get("authorization"), Scope.ADMIN)
        request.state.caller = principal.key_id
        request.state.actor = f"key:{principal.name}"
        return principal

    async def needs_ofrep_key(request: Request) -> Principal:
        # OFREP's clients may send a key in either way.
        key = request.headers.get("x-api-key")
        authorization = request.headers.get("authorization") or (f"Bearer {key}" if key else None)
        principal = await service.api_keys.authenticate(authorization, Scope.READ)
        request.state.caller = principal.key_id
        return principal

    evaluations = Evaluations(service.answers)
    hot_reads = HotReads(
        service.answers, evaluations, needs_read_key=needs_read_key, needs_ofrep_key=needs_ofrep_key
    )
    for endpoint in (hot_reads, webhook):
        bounded = BodyLimit(endpoint, body_bytes_max=body_bytes_max)
        app.add_middleware(Ahead, takes=endpoint.takes, endpoint=RequestContext(bounded))
    app.include_router(entitlement_routes(service.entitlements, service.answers, needs_read_key))
    app.include_router(grant_routes(service.grants, service.clock, needs_read_key, needs_admin_key))
    app.include_router(claim_routes(service.claims, needs_read_key, needs_admin_key))
    app.include_router(reprocess_routes(service.stored_events, needs_admin_key))
    app.include_router(list_routes(service.database, service.stored_events, needs_read_key))
    app.include_router(ofrep_routes(evaluations, needs_ofrep_key))
    app.include_router(
        health_routes(
            database_check=lambda: _check_database(service.database),
            redis_check=(lambda: _check_redis(service.redis)) if service.redis is not None else None,
            refresh_gauges=lambda: _refresh_gauges(service),
            metrics=service.metrics,
        )
    )
    _add_problem_pages(app)
    return app


@contextlib.asynccontextmanager
async def _started(service: Service) -> AsyncIterator[None]:
    """A service that works in the background, until it is stopped and everything is closed."""
    install_owner_alerts(service.alerts)
    service.relay.start()
    await service.webhooks.prepare()
    try:
        yield
    finally:
        await service.webhooks.drain()
        await service.relay.stop()
        install_owner_alerts(None)
        await service.alerts.close()
        if service.stripe_api is not None:
            await service.stripe_api.close()
        if service.redis is not None:
            await service.redis.aclose()
        await service.database.close()


def load_catalog(settings: Settings) -> Catalog:
    """The catalog of CATALOG_FILE, or the shipped one; ValueError names the file and the place in it."""
    path = settings.catalog_file or SHIPPED_CATALOG
    try:
        return parse_catalog(path.read_text(encoding="utf-8"))
    except CatalogError as error:
        raise ValueError(f"{path}: {error}") from error
    except OSError as error:
        raise ValueError(f"CATALOG_FILE: can't read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"CATALOG_FILE: {path} is not UTF-8") from error


def open_secrets(settings: Settings) -> SecretSource:
    """The webhook secrets; from a file they follow the file."""
    path = settings.stripe_webhook_secret_file
    if path is not None:
        return SecretSource.from_file(path, livemode=settings.livemode)
    return SecretSource.from_text(
        settings.stripe_webhook_secret.get_secret_value(), livemode=settings.livemode
    )


def open_stripe_api(settings: Settings) -> StripeApi | None:
    """A client for reads, where a key is set; ValueError for a key of the other mode, which would read other data."""
    key = settings.stripe_secret_key.get_secret_value().strip()
    if not key:
        return None
    if not re.match(rf"(sk|rk)_{settings.stripe_mode}_", key):
        raise ValueError(
            f"STRIPE_SECRET_KEY: a {settings.stripe_mode} key is needed: sk_{settings.stripe_mode}_..."
        )
    if not settings.stripe_api_base.startswith(("https://", "http://127.0.0.1", "http://localhost")):
        raise ValueError("STRIPE_API_BASE: https is needed; plain http only on loopback")
    return StripeApi(secret_key=key, api_base=settings.stripe_api_base)


def open_redis(url: str) -> redis.asyncio.Redis:
    """A client that gives up quickly: the library's own defaults may wait 25 s for a silent server."""
    try:
        return redis.asyncio.Redis.from_url(
            url,
            socket_timeout=REDIS_CALL_SECONDS_MAX,
            # The handshake has several round trips; the caller's own limit still bounds the whole.
            socket_connect_timeout=4 * REDIS_CALL_SECONDS_MAX,
            retry=Retry(NoBackoff(), 0),
            max_connections=50,
        )
    except ValueError:
        # Without its cause, which may quote a piece of the password.
        raise ValueError("REDIS_URL: not a Redis URL; use redis://, rediss:// or unix://") from None


async def _check_database(database: Database) -> None:
    if not await is_current(database):
        raise StoreUnavailable("The database's schema is not this version's; run `tollkeeper migrate`.")


async def _check_redis(client: redis.asyncio.Redis | None) -> None:
    try:
        if client is not None:
            await client.ping()
    except (RedisError, OSError) as error:
        raise Unavailable from error


async def _refresh_gauges(service: Service) -> None:
    async with service.database.snapshot() as tx:
        service.metrics.parked_events(await store.count_parked(tx))
        newest = await store.newest_received_at(tx)
    age = (service.clock.now() - newest).total_seconds() if newest is not None else None
    service.metrics.newest_event_age(age)


def _add_problem_pages(app: FastAPI) -> None:
    """`/problems/{slug}`: what the `type` of a problem document points to."""
    pages = {error.slug: error for error in reversed(all_errors())}

    @app.get("/problems/{slug}", include_in_schema=False)
    async def problem_page(slug: str) -> Response:
        error = pages.get(slug)
        if error is None:
            raise NotFound
        return HTMLResponse(
            f"<!doctype html><title>{error.title}</title><h1>{error.title}</h1>"
            f"<p>HTTP {error.status}</p><p>{error.public_text()}</p>"
        )
