"""A load generator that costs little: pre-signed requests over keep-alive connections, counted answers."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from backend.app.billing.routes import WEBHOOK_PATH
from backend.app.billing.security import sign
from backend.app.simulator import objects


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run came to; latencies in milliseconds."""

    per_second: float
    p50_ms: float
    p99_ms: float
    accepted: int


def signed_requests(count: int, *, secret: str, prefix: str) -> list[bytes]:
    """So many different paid checkouts, each for a user of its own, as ready HTTP/1.1 requests."""
    now = int(time.time())
    requests = []
    for number in range(count):
        session = objects.checkout_session(
            f"cs_{prefix}_{number}",
            customer=f"cus_{prefix}_{number}",
            client_reference_id=f"usr_{prefix}_{number}",
            metadata={"plan_code": "premium"},
            created=now,
        )
        event = objects.event(f"evt_{prefix}_{number}", "checkout.session.completed", session, created=now)
        body = json.dumps(event).encode()
        head = (
            f"POST {WEBHOOK_PATH} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nStripe-Signature: {sign(body, secret.encode(), timestamp=now)}\r\n\r\n"
        )
        requests.append(head.encode() + body)
    return requests


async def send_all(url: str, requests: list[bytes], *, connections: int) -> Result:
    """Sends every request once over so many connections; an answer other than 200 is not counted as accepted."""
    waiting = iter(requests)
    latencies_ms: list[float] = []
    started = time.perf_counter()
    accepted = sum(
        await asyncio.gather(*(_connection(url, waiting, latencies_ms) for _ in range(connections)))
    )
    seconds = time.perf_counter() - started
    percentiles = statistics.quantiles(latencies_ms, n=100)
    return Result(
        per_second=accepted / seconds, p50_ms=percentiles[49], p99_ms=percentiles[98], accepted=accepted
    )


async def _connection(url: str, waiting: Iterator[bytes], latencies_ms: list[float]) -> int:
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    accepted = 0
    for request in waiting:
        started = time.perf_counter()
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(_content_length(head))
        latencies_ms.append((time.perf_counter() - started) * 1000)
        accepted += head.startswith(b"HTTP/1.1 200")
    writer.close()
    await writer.wait_closed()
    return accepted


def _content_length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.partition(b":")[2])
    raise ValueError("an answer without Content-Length")
