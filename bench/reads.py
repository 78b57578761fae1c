"""How fast Tollkeeper answers what a product asks all day: may this user do that? Over HTTP, on PostgreSQL."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from backend.app.billing.answers import HELD_USERS_MAX
from backend.app.core.api_keys import ApiKeys, Scope
from backend.app.core.clock import SystemClock
from backend.app.core.database import Database
from backend.tests.support.service import ServiceProcess
from bench.contenders import CONTENDERS, Servers, running
from bench.cpu import tree_cpu_seconds
from bench.events import TYPES, make_workload, signed_requests, user_of
from bench.load import HTTP_OK, BenchFailed, percentile, send_all

CONNECTIONS = 16
# More than a process holds answers about, asked about in turn: each question is read and decided anew.
USERS = HELD_USERS_MAX + 400
# Few enough that each is asked about again while its answer is held.
FEW_USERS = 100
SEEDING_CONNECTIONS = 64
WARM_UP_REQUESTS = 100
REQUESTS_MIN = 200
HTTP_NOT_MODIFIED = 304
MICROSECONDS = 1_000_000
# A feature of the shipped catalog.
FEATURE = "copy_trading"
SERVICE = "tollkeeper-1"

# What is asked, as the report calls it.
ANEW = "`GET /api/v1/entitlements/{user}`, read and decided anew"
KNOWN = "`GET` with the ETag that is known (304), answer held"

_ETAG = re.compile(rb"(?i)\r\netag:[ \t]*([^\r\n]+)")


@dataclass(frozen=True, slots=True)
class ReadSpeed:
    """One kind of question: answers per second, latencies in ms, CPU of the service in microseconds per answer.

    One figure per round.
    """

    question: str
    per_second: Sequence[float]
    p50_ms: Sequence[float]
    p99_ms: Sequence[float]
    service_cpu_us: Sequence[float | None]


def measure_reads(servers: Servers, *, rounds: int, seconds: float) -> list[ReadSpeed]:
    """Each kind of question in turn, over and over.

    Raises:
        BenchFailed: an answer has another status than it must have.
    """
    contender = next(contender for contender in CONTENDERS if contender.name == SERVICE)
    with running(contender, servers, label="reads") as service:
        url = service.service.url
        work = make_workload(USERS, prefix="reads")
        for bodies in (work.seeds, work.events):
            send_all(url, signed_requests(bodies), connections=SEEDING_CONNECTIONS)
        key = asyncio.run(_make_key(servers.postgres.url(service.database)))
        users = [
            user_of("reads", number, place) for number in range(USERS // TYPES) for place in range(TYPES)
        ]
        plain = [_get(user, key) for user in users]
        few = plain[:FEW_USERS]
        heads: list[bytes] = []
        send_all(url, few, connections=1, heads=heads)
        known = [_get(user, key, etag=_etag(head)) for user, head in zip(users, heads, strict=False)]
        evaluations = [_evaluate(user, key) for user in users]
        questions = {
            ANEW: (plain, HTTP_OK),
            "`GET`, answer held": (few, HTTP_OK),
            KNOWN: (known, HTTP_NOT_MODIFIED),
            "`POST /ofrep/v1/evaluate/flags/{key}`, read and decided anew": (evaluations, HTTP_OK),
            "`POST`, answer held": (evaluations[:FEW_USERS], HTTP_OK),
        }
        found: dict[str, list[tuple[float, float, float, float | None]]] = {
            question: [] for question in questions
        }
        for _ in range(rounds):
            for question, (requests, status) in questions.items():
                found[question].append(_measured(service.service, requests, status, seconds))
    return [
        ReadSpeed(question, *(list(column) for column in zip(*rows, strict=True)))
        for question, rows in found.items()
    ]


def _measured(
    service: ServiceProcess, requests: list[bytes], status: int, seconds: float
) -> tuple[float, float, float, float | None]:
    warm_up = send_all(
        service.url, requests[:WARM_UP_REQUESTS], connections=CONNECTIONS, expected=(status,)
    ).per_second
    count = max(REQUESTS_MIN, round(warm_up * seconds))
    repeated = (requests * (count // len(requests) + 1))[:count]
    before = tree_cpu_seconds(service.pid)
    load = send_all(service.url, repeated, connections=CONNECTIONS, expected=(status,))
    after = tree_cpu_seconds(service.pid)
    cpu_us = None if before is None or after is None else (after - before) / count * MICROSECONDS
    return load.per_second, percentile(load.latencies_ms, 0.5), percentile(load.latencies_ms, 0.99), cpu_us


async def _make_key(url: str) -> str:
    database = Database.open(url)
    try:
        return await ApiKeys(database, SystemClock()).create("bench", Scope.READ)
    finally:
        await database.close()


def _get(user: str, key: str, *, etag: bytes | None = None) -> bytes:
    condition = f"If-None-Match: {etag.decode('ascii')}\r\n" if etag is not None else ""
    return (
        f"GET /api/v1/entitlements/{user} HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {key}\r\n"
        f"{condition}\r\n"
    ).encode("ascii")


def _evaluate(user: str, key: str) -> bytes:
    body = json.dumps({"context": {"targetingKey": user}}).encode("ascii")
    return (
        f"POST /ofrep/v1/evaluate/flags/{FEATURE} HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode("ascii") + body


def _etag(head: bytes) -> bytes:
    found = _ETAG.search(head)
    if found is None:
        raise BenchFailed("an answer about entitlements has no ETag")
    return found[1]
