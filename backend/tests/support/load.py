"""A small sender of many signed deliveries at once, over kept-open HTTP/1.1 connections to real server processes.

    replies = await send_all([service.port], bodies, connections=50)

It speaks HTTP itself, because a full client costs more processor time than the service that it tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from backend.app.billing.routes import WEBHOOK_PATH
from backend.app.billing.security import sign
from backend.tests.support.billing import WEBHOOK_SECRET
from backend.tests.support.server_process import LOOPBACK

FORGERS_SECRET = "whsec_forged_0123456789abcdefghijklmn"
# Two seconds above the service's own deadline: what takes longer got no answer.
ANSWER_SECONDS_MAX = 10
# A server that is away is asked again this much later, so that an outage costs tries and not all events.
LOSS_PAUSE_SECONDS = 0.02
# A hundred answers take less than a second; a busy machine may need many times that.
PROGRESS_SECONDS_MAX = 30


@dataclass(frozen=True, slots=True)
class Reply:
    """One HTTP answer, header names in lower case, and how long it took from the first byte sent."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float


class Connection:
    """One kept-open connection; opened by the first request and again after it was lost."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def request(self, method: str, path: str, body: bytes = b"", **headers: str) -> Reply:
        """The answer; OSError, EOFError or TimeoutError when there is none."""
        started = time.perf_counter()
        try:
            async with asyncio.timeout(ANSWER_SECONDS_MAX):
                status, answer_headers, answer = await self._exchange(method, path, body, headers)
        except BaseException:
            self.close()
            raise
        return Reply(status, answer_headers, answer, time.perf_counter() - started)

    async def deliver(self, event: bytes, *, secret: str = WEBHOOK_SECRET) -> Reply:
        """Posts an event's bytes, signed now."""
        signature = sign(event, secret.encode(), timestamp=int(time.time()))
        return await self.request("POST", WEBHOOK_PATH, event, Stripe_Signature=signature)

    def close(self) -> None:
        """Hangs up."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def _exchange(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str]
    ) -> tuple[int, dict[str, str], bytes]:
        if self._streams is None:
            self._streams = await asyncio.open_connection(LOOPBACK, self._port)
        reader, writer = self._streams
        lines = [f"{method} {path} HTTP/1.1", f"Host: {LOOPBACK}", f"Content-Length: {len(body)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        await writer.drain()
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        found = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
        answer = await reader.readexactly(int(found["content-length"]))
        if found.get("connection", "").lower() == "close":
            self.close()
        return int(head[0].split()[1]), found, answer


class Progress:
    """How many answers a running `send_all` has got."""

    def __init__(self) -> None:
        self.answers = 0
        self._changed = asyncio.Condition()

    async def step(self) -> None:
        """One more answer is there."""
        async with self._changed:
            self.answers += 1
            self._changed.notify_all()

    async def reaches(self, answers: int) -> None:
        """Returns once there are so many answers; TimeoutError when no more come."""
        async with asyncio.timeout(PROGRESS_SECONDS_MAX), self._changed:
            await self._changed.wait_for(lambda: self.answers >= answers)


async def send_all(
    ports: Sequence[int],
    events: Sequence[bytes],
    *,
    connections: int,
    progress: Progress | None = None,
    forged: Collection[int] = (),
) -> list[Reply | None]:
    """Delivers every event once, over so many connections spread over the ports; None where no answer came.

    Those at the places in `forged` are signed with a secret that is nobody's.
    """
    waiting = deque(range(len(events)))
    replies: list[Reply | None] = [None] * len(events)

    async def work(port: int) -> None:
        connection = Connection(port)
        while waiting:
            index = waiting.popleft()
            try:
                secret = FORGERS_SECRET if index in forged else WEBHOOK_SECRET
                replies[index] = await connection.deliver(events[index], secret=secret)
            except (OSError, EOFError, TimeoutError):
                await asyncio.sleep(LOSS_PAUSE_SECONDS)
            else:
                if progress is not None:
                    await progress.step()
        connection.close()

    async with asyncio.TaskGroup() as group:
        for number in range(connections):
            group.create_task(work(ports[number % len(ports)]))
    return replies


async def get(port: int, path: str) -> Reply:
    """The answer to one GET on a connection of its own."""
    with contextlib.closing(Connection(port)) as connection:
        return await connection.request("GET", path)


async def metric(ports: Sequence[int], name: str, **labels: str) -> float:
    """The sum over the servers of all samples of this name that have these labels."""
    total = 0.0
    for port in ports:
        text = (await get(port, "/metrics")).body.decode()
        total += sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )
    return total
