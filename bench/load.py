"""A load generator that costs little: ready requests over keep-alive connections, latencies kept, its own CPU counted."""

from __future__ import annotations

import asyncio
import gc
import re
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

import uvloop

# A whole measurement takes seconds; one that stands still must not keep the benchmark for ever.
RUN_SECONDS_MAX = 60
HTTP_OK = 200
HTTP_PORT = 80

_LENGTH = re.compile(rb"(?i)\r\ncontent-length:[ \t]*([0-9]+)")
_HEAD_END = b"\r\n\r\n"
# "HTTP/1.1 200": the digits of a status line.
_STATUS_DIGITS = slice(9, 12)
# An answer to a condition that holds has no body and need not say so (RFC 9110 15.4.5).
_BODILESS = 304


class BenchFailed(Exception):
    """A measurement would be worth nothing; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a run came to: seconds from the first request to the last answer, latencies sorted, in milliseconds.

    `cpu_seconds` is the load generator's own.
    """

    requests: int
    seconds: float
    cpu_seconds: float
    latencies_ms: Sequence[float]

    @property
    def per_second(self) -> float:
        """Answered requests per second."""
        return self.requests / self.seconds


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` (0 to 1) of the sorted, non-empty values do not exceed."""
    return ordered[max(0, min(len(ordered) - 1, round(share * len(ordered) + 0.5) - 1))]


def send_all(
    url: str,
    requests: Sequence[bytes],
    *,
    connections: int,
    expected: Collection[int] = (HTTP_OK,),
    heads: list[bytes] | None = None,
) -> Load:
    """Sends every request once, each connection its next one when its last is answered; blocks until all are.

    The head of each answer is added to `heads`, in the order of the answers (with one connection, of the requests).

    Raises:
        BenchFailed: an answer's status is not `expected`, a connection broke, or it took too long.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_send_all(url, requests, connections, frozenset(expected), heads))


async def _send_all(
    url: str,
    requests: Sequence[bytes],
    connections: int,
    expected: frozenset[int],
    heads: list[bytes] | None,
) -> Load:
    loop = asyncio.get_running_loop()
    address = urlsplit(url)
    run = _Run(iter(requests), len(requests), expected, heads, loop.create_future())

    def fail(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        run.fail(f"the load generator itself failed: {context.get('exception') or context['message']}")

    loop.set_exception_handler(fail)
    clients = []
    for _ in range(min(connections, len(requests))):
        transport, client = await loop.create_connection(
            lambda: _Client(run), address.hostname or "", address.port or HTTP_PORT
        )
        clients.append((transport, client))
    # The requests of a run are some ten thousand objects; to look through them again and again is not the load.
    gc.collect()
    gc.disable()
    try:
        cpu_started, started = time.process_time(), time.perf_counter()
        for _, client in clients:
            client.send_next()
        async with asyncio.timeout(RUN_SECONDS_MAX):
            await run.finished
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    except TimeoutError as error:
        raise BenchFailed(f"{run.missing} of {len(requests)} answers had not come in time") from error
    finally:
        gc.enable()
        for transport, _ in clients:
            transport.close()
    return Load(
        requests=len(requests),
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        latencies_ms=sorted(run.latencies_ms),
    )


class _Run:
    """What the connections of one run share."""

    def __init__(
        self,
        waiting: Iterator[bytes],
        missing: int,
        expected: frozenset[int],
        heads: list[bytes] | None,
        finished: asyncio.Future[None],
    ) -> None:
        self.waiting = waiting
        self.missing = missing
        self.expected = expected
        self.heads = heads
        self.finished = finished
        self.latencies_ms: list[float] = []

    def answered(self, status: int, head: bytes, rest: bytes, latency_ms: float) -> None:
        if status not in self.expected:
            self.fail(f"an answer was {status}: {rest[:500].decode('utf-8', 'replace')}")
            return
        self.latencies_ms.append(latency_ms)
        if self.heads is not None:
            self.heads.append(head)
        self.missing -= 1
        if not self.missing and not self.finished.done():
            self.finished.set_result(None)

    def fail(self, reason: str) -> None:
        if not self.finished.done():
            self.finished.set_exception(BenchFailed(reason))


class _Client(asyncio.Protocol):
    """One connection: a request, its answer, the next request."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self._sent_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # By its duty, not by its class: uvloop's transport is none of asyncio's.
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, error: Exception | None) -> None:
        if self._run.missing:
            self._run.fail(f"a connection was closed with {self._run.missing} answers missing: {error}")

    def send_next(self) -> None:
        """Sends the next request, if one is left."""
        request = next(self._run.waiting, None)
        if request is not None and self._transport is not None:
            self._sent_at = time.perf_counter()
            self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        received = self._received + data if self._received else data
        head_end = received.find(_HEAD_END)
        if head_end < 0:
            self._received = received
            return
        status = int(received[_STATUS_DIGITS])
        length = _LENGTH.search(received, 0, head_end + 2)
        if length is None and status != _BODILESS:
            self._run.fail("an answer has no Content-Length, and the load generator reads no other form")
            return
        body_start = head_end + len(_HEAD_END)
        if len(received) < body_start + (int(length[1]) if length else 0):
            self._received = received
            return
        self._received = b""
        latency_ms = (time.perf_counter() - self._sent_at) * 1000
        self._run.answered(status, received[:head_end], received[body_start:], latency_ms)
        self.send_next()
