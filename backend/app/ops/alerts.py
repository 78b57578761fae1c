"""Tells the owner that something needs a person, through the channels in ALERT_URLS.

    await send_owner_alert("Payment event could not be recorded", key="payment-log")

Never raises, never waits for a channel, and a thousand equal troubles are one message. An alert that
must survive a crash is staged in the outbox instead: `owner_alert(...)` makes the message and
`OwnerAlerts.deliver` is its handler.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import structlog

from backend.app.core.errors import Unavailable
from backend.app.observability.logs import clean
from backend.app.observability.metrics import MetricsCollector, get_metrics
from backend.app.ops.outbox import Message, NewMessage

OWNER_ALERT = "owner_alert"
DEFAULT_TITLE = "Tollkeeper"
# Fits every channel in one message, an SMS gateway's ten parts included.
ALERT_CHARACTERS_MAX = 1_000
# What a phone shows of a title.
TITLE_CHARACTERS_MAX = 100
# A slow channel may take so long; the next alert waits behind it.
ALERT_SECONDS_MAX = 5.0
# Apprise ends by itself a little earlier, so that its own result is what is reported.
CHANNEL_SECONDS_MAX = 4.5
# A hundred alerts of 1,000 characters that nobody could send yet tell the owner no more than the first ten.
QUEUE_ALERTS_MAX = 100
# One alert per incident in this time: long enough to act on the first one before the second comes.
INCIDENT_SECONDS = 600.0
# A person reads no more than one alert every two minutes.
ALERTS_PER_HOUR_MAX = 30
HOUR_SECONDS = 3_600.0
# Memory for incident keys; more different ones within ten minutes stop at the hourly limit anyway.
INCIDENTS_MAX = 1_000
# Shutdown does not wait longer for a channel than one alert may take.
CLOSE_SECONDS_MAX = 5.0


@dataclass(frozen=True)
class _Alert:
    text: str
    title: str
    key: str


@dataclass
class _Incident:
    """When its last alert was let through (monotonic seconds) and how many were held back since."""

    sent_at: float = -math.inf
    held_back: int = 0


class OwnerAlerts:
    """The owner's channels: `alert_urls` are Apprise URLs, comma or space separated, from the operator only.

    Empty means that alerts are logged at WARNING and counted as dropped. Limits count per process.
    Redirects are not followed, so a channel can't be led to an address the operator did not write.
    """

    def __init__(
        self,
        alert_urls: str,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        metrics: MetricsCollector | None = None,
    ) -> None:
        self._alert_urls = alert_urls.strip()
        self._monotonic = monotonic
        self._metrics = metrics or get_metrics()
        self._log = structlog.get_logger(__name__)
        self._queue: asyncio.Queue[_Alert] = asyncio.Queue(maxsize=QUEUE_ALERTS_MAX)
        # One thread: a channel that hangs for ever costs this thread, not the service's others.
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="owner-alerts")
        self._worker: asyncio.Task[None] | None = None
        self._closed = False
        self._incidents: OrderedDict[str, _Incident] = OrderedDict()
        self._sent_at: deque[float] = deque()
        self._held_back_by_hour = 0

    async def send_owner_alert(
        self, text: str, *, title: str = DEFAULT_TITLE, key: str | None = None
    ) -> None:
        """Puts an alert on its way and returns at once; never raises.

        `key` names the incident, one alert of which is sent in ten minutes; without it the text does.
        """
        alert = _cleaned(text, title, key)
        if not self._alert_urls or self._closed or self._queue.full():
            self._drop(alert)
            return
        if self._held_back_for_incident(alert.key) or self._held_back_for_hour(alert.key):
            self._metrics.alert_sent("suppressed")
            return
        self._take_turn(alert.key)
        self._queue.put_nowait(alert)
        if self._worker is None:
            # An empty context: the request that happens to come first must not mark every later alert's log.
            self._worker = asyncio.create_task(
                self._work(), name="owner-alerts", context=contextvars.Context()
            )

    async def deliver(self, message: Message) -> None:
        """Sends an alert that was staged in the outbox; raises Unavailable when it has to be tried again."""
        payload = message.payload
        alert = _cleaned(payload["text"], payload["title"], payload["key"])
        if not self._alert_urls:
            self._drop(alert)
            return
        if self._held_back_for_incident(alert.key):
            self._metrics.alert_sent("suppressed")
            return
        if self._hour_is_full():
            raise Unavailable("the hourly limit of owner alerts is reached")
        turn = self._take_turn(alert.key)
        sent = False
        try:
            await self._send(alert)
            sent = True
        finally:
            self._metrics.alert_sent("sent" if sent else "failed")
            if not sent:
                self._give_back(alert.key, lost=0)
                # Retries against a dead channel must not use up the hour of the alerts that can be sent.
                self._sent_at.remove(turn)

    async def close(self) -> None:
        """Sends what is queued, for at most CLOSE_SECONDS_MAX; the rest is logged and counted as dropped."""
        self._closed = True
        try:
            async with asyncio.timeout(CLOSE_SECONDS_MAX):
                await self._queue.join()
        except TimeoutError:
            while not self._queue.empty():
                self._drop(self._queue.get_nowait())
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.wait({self._worker})
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _drop(self, alert: _Alert) -> None:
        """The log is the last place where the owner may find it."""
        self._metrics.alert_sent("dropped")
        self._log.warning("owner alert not sent", title=alert.title, text=alert.text)

    async def _work(self) -> None:
        while True:
            alert = await self._queue.get()
            try:
                await self._send(alert)
            except asyncio.CancelledError:
                self._drop(alert)
                raise
            except Exception as error:  # noqa: BLE001  # whatever a channel does, the next alert is sent
                self._give_back(alert.key, lost=1)
                self._metrics.alert_sent("failed")
                # The type alone: the message of a network error holds the channel's address.
                self._log.error(
                    "owner alert failed", title=alert.title, text=alert.text, error=type(error).__name__
                )
            else:
                self._metrics.alert_sent("sent")
            finally:
                self._queue.task_done()

    async def _send(self, alert: _Alert) -> None:
        """Hands one alert to the channels; Unavailable when none took it in time."""
        incident = self._incidents.get(alert.key) or _Incident()
        equal, others = incident.held_back, self._held_back_by_hour
        body = _with_counts(alert.text, equal=equal, others=others)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(ALERT_SECONDS_MAX):
                taken = await loop.run_in_executor(
                    self._executor, _notify, self._alert_urls, alert.title, body
                )
        except TimeoutError as error:
            raise Unavailable("the owner's channels took too long") from error
        if not taken:
            raise Unavailable("none of the owner's channels took the alert")
        incident.held_back -= equal
        self._held_back_by_hour -= others

    def _held_back_for_incident(self, key: str) -> bool:
        incident = self._incidents.get(key)
        if incident is None or self._monotonic() - incident.sent_at >= INCIDENT_SECONDS:
            return False
        incident.held_back += 1
        return True

    def _held_back_for_hour(self, key: str) -> bool:
        if not self._hour_is_full():
            return False
        self._held_back_by_hour += 1
        return True

    def _hour_is_full(self) -> bool:
        while self._sent_at and self._monotonic() - self._sent_at[0] >= HOUR_SECONDS:
            self._sent_at.popleft()
        return len(self._sent_at) >= ALERTS_PER_HOUR_MAX

    def _take_turn(self, key: str) -> float:
        now = self._monotonic()
        self._sent_at.append(now)
        self._incidents.setdefault(key, _Incident()).sent_at = now
        self._incidents.move_to_end(key)
        if len(self._incidents) > INCIDENTS_MAX:
            self._incidents.popitem(last=False)
        return now

    def _give_back(self, key: str, *, lost: int) -> None:
        """Nothing reached the owner: the incident's next alert may try again, and mentions what was lost."""
        incident = self._incidents.get(key)
        if incident is not None:
            incident.sent_at = -math.inf
            incident.held_back += lost


class _Installed:
    """What the module's `send_owner_alert` uses: set by main at start, unset at its end."""

    alerts: OwnerAlerts | None = None


def install_owner_alerts(alerts: OwnerAlerts | None) -> None:
    """Makes `alerts` what the module's `send_owner_alert` uses; None takes it away again. For main only."""
    _Installed.alerts = alerts


async def send_owner_alert(text: str, *, title: str = DEFAULT_TITLE, key: str | None = None) -> None:
    """Alerts the owner through what main installed; without that the alert is logged. Never raises."""
    if _Installed.alerts is not None:
        await _Installed.alerts.send_owner_alert(text, title=title, key=key)
        return
    alert = _cleaned(text, title, key)
    get_metrics().alert_sent("dropped")
    structlog.get_logger(__name__).warning("owner alert not sent", title=alert.title, text=alert.text)


def owner_alert(
    text: str, *, title: str = DEFAULT_TITLE, key: str | None = None, dedupe_key: str | None = None
) -> NewMessage:
    """An alert as an outbox message, already without secrets; `OwnerAlerts.deliver` sends it."""
    alert = _cleaned(text, title, key)
    payload = {"text": alert.text, "title": alert.title, "key": alert.key}
    return NewMessage(kind=OWNER_ALERT, payload=payload, dedupe_key=dedupe_key)


def _cleaned(text: str, title: str, key: str | None) -> _Alert:
    cleaned = clean(text, characters_max=ALERT_CHARACTERS_MAX)
    return _Alert(
        # Channels refuse an empty message, and an empty alert still means that something happened.
        text=cleaned or "(no text)",
        title=clean(title, characters_max=TITLE_CHARACTERS_MAX).replace("\n", " "),
        key=cleaned if key is None else clean(key, characters_max=TITLE_CHARACTERS_MAX),
    )


def _with_counts(text: str, *, equal: int, others: int) -> str:
    """The text and how many alerts the owner did not get meanwhile, within ALERT_CHARACTERS_MAX."""
    notes = [f"({equal} more like this were held back.)"] if equal else []
    if others:
        notes.append(f"({others} other alerts were held back by the hourly limit.)")
    tail = "".join(f"\n{note}" for note in notes)
    return clean(text, characters_max=ALERT_CHARACTERS_MAX - len(tail)) + tail


def _notify(alert_urls: str, title: str, body: str) -> bool:
    """Whether at least one channel took the message: then the owner knows. Runs in the alert thread."""
    # Imported here: loading Apprise and its plugins takes about half a second that most starts never need.
    import apprise  # noqa: PLC0415

    asset = apprise.AppriseAsset(
        app_id="Tollkeeper",
        http_redirects=False,
        storage_mode="memory",
        service_timeout=CHANNEL_SECONDS_MAX,
        allow_templates=False,
    )
    channels = apprise.Apprise(asset=asset)
    channels.add(alert_urls)
    result = channels.notify(
        title=title,
        body=body,
        body_format=apprise.NotifyFormat.TEXT,
        notify_type=apprise.NotifyType.WARNING,
        interpret_escapes=False,
        timeout=CHANNEL_SECONDS_MAX,
    )
    return any(bool(channel) for channel in result)
