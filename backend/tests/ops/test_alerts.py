from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from backend.app.core.database import Database, metadata
from backend.app.core.errors import Unavailable
from backend.app.observability.metrics import MetricsCollector
from backend.app.ops.alerts import (
    OWNER_ALERT,
    OwnerAlerts,
    install_owner_alerts,
    owner_alert,
    send_owner_alert,
)
from backend.app.ops.outbox import Message, Relay, outbox, stage_many
from backend.tests.ops.test_outbox import NOW, until

# The alert library imports this module of Python 3.11 and 3.12 when it loads its plugins.
pytestmark = pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")


class Channel:
    """An HTTP receiver on loopback, as Apprise's json:// service posts to it."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.status = "200 OK"
        self.headers = ""
        self.hangs = False
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = next(
                int(line.split(":")[1])
                for line in head.split("\r\n")
                if line.lower().startswith("content-length")
            )
            self.paths.append(head.split()[1])
            body = json.loads(await reader.readexactly(length))
            if self.hangs:
                await asyncio.sleep(3_600)
            self.got.append(body)
            writer.write(f"HTTP/1.1 {self.status}\r\n{self.headers}Content-Length: 0\r\n\r\n".encode())
            await writer.drain()
        finally:
            writer.close()

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
            self._server = None
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        return f"json://127.0.0.1:{self.port}/"

    @property
    def texts(self) -> list[str]:
        return [body["message"] for body in self.got]


class Time:
    """A monotonic clock that a test moves."""

    def __init__(self) -> None:
        self.seconds = 1_000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
async def channel() -> AsyncIterator[Channel]:
    channel = Channel()
    await channel.open()
    yield channel
    await channel.close()


@pytest.fixture(autouse=True)
def nothing_installed() -> Iterator[None]:
    install_owner_alerts(None)
    yield
    install_owner_alerts(None)
    structlog.reset_defaults()


def count(metrics: MetricsCollector, result: str) -> float | None:
    return metrics.registry.get_sample_value("alerts_sent_total", {"result": result})


def counts(metrics: MetricsCollector) -> dict[str, float | None]:
    return {result: count(metrics, result) for result in ("sent", "failed", "suppressed", "dropped")}


async def test_an_alert_reaches_every_channel_of_the_owner(channel: Channel) -> None:
    second = Channel()
    await second.open()
    metrics = MetricsCollector()
    alerts = OwnerAlerts(f"{channel.url}, {second.url}", metrics=metrics)
    await alerts.send_owner_alert("The audit log does not verify", title="Tollkeeper: audit")
    await until(lambda: count(metrics, "sent") == 1)
    assert channel.texts == second.texts == ["The audit log does not verify"]
    assert channel.got[0]["title"] == "Tollkeeper: audit"
    await alerts.close()
    await second.close()


async def test_one_working_channel_is_enough(channel: Channel) -> None:
    metrics = MetricsCollector()
    alerts = OwnerAlerts(f"json://127.0.0.1:1/ {channel.url} nonsense://x", metrics=metrics)
    await alerts.send_owner_alert("x")
    await alerts.close()
    assert channel.texts == ["x"]
    assert counts(metrics) == {"sent": 1, "failed": 0, "suppressed": 0, "dropped": 0}


async def test_the_caller_never_waits_for_a_channel_and_a_hanging_one_is_given_up(channel: Channel) -> None:
    channel.hangs = True
    metrics = MetricsCollector()
    alerts = OwnerAlerts(channel.url, metrics=metrics)
    began = time.monotonic()
    await alerts.send_owner_alert("x")
    assert time.monotonic() - began < 0.05
    with capture_logs() as logs:
        await until(lambda: count(metrics, "failed") == 1)
    assert 4 < time.monotonic() - began < 6
    assert [(line["event"], line["text"]) for line in logs] == [("owner alert failed", "x")]
    await alerts.close()


@pytest.mark.parametrize(
    "urls", ["json://127.0.0.1:1/", "not a url", "nonsense://token@host", "://", "json://"]
)
async def test_a_channel_that_is_down_or_misspelt_raises_nothing_and_is_counted(urls: str) -> None:
    metrics = MetricsCollector()
    alerts = OwnerAlerts(urls, metrics=metrics)
    with capture_logs() as logs:
        await alerts.send_owner_alert("the money is safe")
        await until(lambda: count(metrics, "failed") == 1)
    (line,) = logs
    assert line["log_level"] == "error"
    assert line["text"] == "the money is safe"
    assert urls not in json.dumps(logs)
    await alerts.close()


async def test_the_next_alert_is_sent_after_one_that_failed(channel: Channel) -> None:
    """Also of the same incident, because its first alert told nobody; and it says what was lost."""
    metrics = MetricsCollector()
    alerts = OwnerAlerts(channel.url, metrics=metrics)
    channel.status = "500 Internal Server Error"
    await alerts.send_owner_alert("trouble", key="incident")
    await until(lambda: count(metrics, "failed") == 1)
    channel.status = "200 OK"
    channel.got.clear()
    await alerts.send_owner_alert("trouble", key="incident")
    await alerts.close()
    assert channel.texts == ["trouble\n(1 more like this were held back.)"]


async def test_one_incident_is_one_alert_in_ten_minutes(channel: Channel) -> None:
    metrics, clock = MetricsCollector(), Time()
    alerts = OwnerAlerts(channel.url, monotonic=clock, metrics=metrics)
    await alerts.send_owner_alert("failure 0", key="incident")
    await until(lambda: count(metrics, "sent") == 1)
    for n in range(1, 20):
        await alerts.send_owner_alert(f"failure {n}", key="incident")
    clock.seconds += 599
    await alerts.send_owner_alert("failure again", key="incident")
    await alerts.send_owner_alert("something else", key="other")
    clock.seconds += 2
    await until(lambda: count(metrics, "sent") == 2)
    await alerts.send_owner_alert("failure still", key="incident")
    await until(lambda: count(metrics, "sent") == 3)
    clock.seconds += 601
    await alerts.send_owner_alert("failure once more", key="incident")
    await alerts.close()
    assert channel.texts == [
        "failure 0",
        "something else",
        "failure still\n(20 more like this were held back.)",
        "failure once more",
    ]
    assert counts(metrics) == {"sent": 4, "failed": 0, "suppressed": 20, "dropped": 0}


async def test_without_a_key_the_same_text_is_the_same_incident(channel: Channel) -> None:
    metrics = MetricsCollector()
    alerts = OwnerAlerts(channel.url, metrics=metrics)
    for text in ("a", "a", "b", "a"):
        await alerts.send_owner_alert(text)
    await alerts.close()
    assert channel.texts == ["a\n(2 more like this were held back.)", "b"]


async def test_no_more_than_thirty_alerts_an_hour(channel: Channel) -> None:
    metrics, clock = MetricsCollector(), Time()
    alerts = OwnerAlerts(channel.url, monotonic=clock, metrics=metrics)
    for n in range(30):
        await alerts.send_owner_alert("x", key=f"incident-{n}")
    await until(lambda: count(metrics, "sent") == 30)
    for n in range(30, 50):
        await alerts.send_owner_alert("x", key=f"incident-{n}")
    assert count(metrics, "suppressed") == 20
    clock.seconds += 3_601
    await alerts.send_owner_alert("y", key="later")
    await alerts.close()
    assert channel.texts[30:] == ["y\n(20 other alerts were held back by the hourly limit.)"]


async def test_memory_for_incidents_and_waiting_alerts_is_bounded(channel: Channel) -> None:
    metrics, clock = MetricsCollector(), Time()
    alerts = OwnerAlerts(channel.url, monotonic=clock, metrics=metrics)
    for n in range(3_000):
        # An hour apart each, and without a pause in which the queue could empty.
        clock.seconds += 3_601
        await alerts.send_owner_alert("x", key=f"incident-{n}")
    assert alerts._queue.qsize() == 100
    assert len(alerts._incidents) <= 1_000
    assert count(metrics, "dropped") == 2_900
    await alerts.close()


async def test_alerts_carry_no_secret_no_control_character_and_are_short(channel: Channel) -> None:
    alerts = OwnerAlerts(channel.url, metrics=MetricsCollector())
    await alerts.send_owner_alert(
        "whsec_abcdefgh sk_live_abcdefgh rk_test_abcdefgh 4242 4242 4242 4242 pi_1_secret_abcdefghijklmnop "
        f"t=1764000000,v1={'ab' * 32} \x1b[31m\u202e\x00\ud800 evt_1NG8Du2eZvKYlo2CUI79vXWy " + "x" * 5_000,
        title="T\r\nsk_live_abcdefgh" + "t" * 500,
    )
    await alerts.close()
    (body,) = channel.got
    sent = json.dumps(body)
    for secret in ("abcdefgh", "4242", "ab" * 8, "\\u001b", "\\u202e", "\\u0000", "\\ud800", "\\n"):
        assert secret not in sent
    assert "evt_1NG8Du2eZvKYlo2CUI79vXWy" in body["message"]
    assert len(body["message"]) == 1_000
    assert len(body["title"]) <= 100


@pytest.mark.parametrize("text", ["", "\x00", "@everyone <b>*bold*</b> \\n %s {x} ${HOME} :smile:"])
async def test_odd_text_is_sent_as_it_is(channel: Channel, text: str) -> None:
    alerts = OwnerAlerts(channel.url, metrics=MetricsCollector())
    await alerts.send_owner_alert(text, title="")
    await alerts.close()
    assert channel.texts == [text.replace("\x00", "") or "(no text)"]


async def test_a_channel_cannot_send_the_alert_elsewhere(channel: Channel) -> None:
    channel.status = "307 Temporary Redirect"
    channel.headers = f"Location: http://127.0.0.1:{channel.port}/elsewhere\r\n"
    metrics = MetricsCollector()
    alerts = OwnerAlerts(channel.url, metrics=metrics)
    await alerts.send_owner_alert("x")
    await until(lambda: count(metrics, "failed") == 1)
    assert channel.paths == ["/"]
    await alerts.close()


async def test_closing_sends_what_waits_and_then_takes_nothing_more(channel: Channel) -> None:
    metrics = MetricsCollector()
    alerts = OwnerAlerts(channel.url, metrics=metrics)
    for n in range(10):
        await alerts.send_owner_alert(f"{n}")
    await alerts.close()
    assert channel.texts == [str(n) for n in range(10)]
    with capture_logs() as logs:
        await alerts.send_owner_alert("too late")
    assert [line["event"] for line in logs] == ["owner alert not sent"]
    assert counts(metrics) == {"sent": 10, "failed": 0, "suppressed": 0, "dropped": 1}
    await alerts.close()


async def test_closing_does_not_wait_longer_than_five_seconds(channel: Channel) -> None:
    channel.hangs = True
    metrics = MetricsCollector()
    alerts = OwnerAlerts(channel.url, metrics=metrics)
    for n in range(10):
        await alerts.send_owner_alert(f"{n}")
    began = time.monotonic()
    with capture_logs() as logs:
        await alerts.close()
    assert time.monotonic() - began < 6
    assert {line["text"] for line in logs} == {str(n) for n in range(10)}
    assert sum(value or 0 for value in counts(metrics).values()) == 10


async def test_without_channels_the_alert_is_logged() -> None:
    metrics = MetricsCollector()
    alerts = OwnerAlerts("  ", metrics=metrics)
    with capture_logs() as logs:
        await alerts.send_owner_alert("look at sk_live_abcdefgh")
    assert [(line["log_level"], line["text"]) for line in logs] == [("warning", "look at sk_live_[redacted]")]
    assert counts(metrics)["dropped"] == 1
    await alerts.close()


async def test_the_plain_function_uses_what_was_installed_and_logs_without(channel: Channel) -> None:
    with capture_logs() as logs:
        await send_owner_alert("nobody is installed")
    assert [(line["log_level"], line["text"]) for line in logs] == [("warning", "nobody is installed")]
    alerts = OwnerAlerts(channel.url, metrics=MetricsCollector())
    install_owner_alerts(alerts)
    await send_owner_alert("Payment event logging failed", key="payment-log")
    await alerts.close()
    assert channel.texts == ["Payment event logging failed"]


def test_importing_the_module_does_not_load_the_alert_library() -> None:
    """Start-up stays fast: the library and its plugins are loaded with the first alert."""
    program = (
        "import sys, backend.app.ops.alerts; print(any(name.startswith('apprise') for name in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "False\n"


def staged(text: str, *, key: str | None = None) -> Message:
    new = owner_alert(text, key=key)
    return Message(id="m", kind=new.kind, payload=new.payload, created_at=NOW, attempt=1)


async def test_an_alert_that_could_not_be_sent_stays_in_the_outbox_until_it_can(
    channel: Channel, sqlite_url: str
) -> None:
    metrics = MetricsCollector()
    alerts = OwnerAlerts(channel.url, metrics=metrics)
    database = Database.open(sqlite_url)
    async with database.transaction() as tx:
        await tx.run_sync(metadata.create_all, tables=[outbox])
        message = owner_alert("audit failed for sk_live_abcdefgh", key="audit", dedupe_key="audit-1")
        await stage_many(tx, [message, message], now=NOW)
    await channel.close()
    relay = Relay(database, {OWNER_ALERT: alerts.deliver}, poll_seconds=0.02, retry_base_seconds=0.02)
    relay.start()
    await until(lambda: (count(metrics, "failed") or 0) >= 2)
    await channel.open()
    await until(lambda: count(metrics, "sent") == 1)
    await relay.stop()
    await alerts.close()
    assert channel.texts == ["audit failed for sk_live_[redacted]"]
    await database.close()


async def test_staged_alerts_of_one_incident_are_one_message(channel: Channel) -> None:
    metrics = MetricsCollector()
    alerts = OwnerAlerts(channel.url, metrics=metrics)
    for n in range(3):
        await alerts.deliver(staged(f"failure {n}", key="incident"))
    assert channel.texts == ["failure 0"]
    assert counts(metrics) == {"sent": 1, "failed": 0, "suppressed": 2, "dropped": 0}
    await alerts.close()


async def test_a_staged_alert_beyond_the_hourly_limit_waits_instead_of_being_lost(channel: Channel) -> None:
    clock = Time()
    alerts = OwnerAlerts(channel.url, monotonic=clock, metrics=MetricsCollector())
    for n in range(30):
        await alerts.deliver(staged(f"{n}"))
    with pytest.raises(Unavailable, match="hourly limit"):
        await alerts.deliver(staged("important"))
    clock.seconds += 3_601
    await alerts.deliver(staged("important"))
    assert channel.texts[-1] == "important"
    await alerts.close()


async def test_attempts_at_a_dead_channel_do_not_use_up_the_hour(channel: Channel) -> None:
    alerts = OwnerAlerts(channel.url, metrics=MetricsCollector())
    channel.status = "503 Service Unavailable"
    for _ in range(40):
        with pytest.raises(Unavailable, match="none of the owner's channels"):
            await alerts.deliver(staged("x", key="incident"))
    channel.status = "200 OK"
    channel.got.clear()
    await alerts.deliver(staged("x", key="incident"))
    assert channel.texts == ["x"]
    await alerts.close()


async def test_a_staged_alert_without_channels_is_logged_and_done() -> None:
    metrics = MetricsCollector()
    alerts = OwnerAlerts("", metrics=metrics)
    with capture_logs() as logs:
        await alerts.deliver(staged("x"))
    assert [line["event"] for line in logs] == ["owner alert not sent"]
    assert counts(metrics)["dropped"] == 1
    await alerts.close()
