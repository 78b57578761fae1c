"""The CPU that each part of Tollkeeper's work on an event takes, measured in this process without HTTP or a database."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from backend.app.billing.domain.catalog import parse_catalog
from backend.app.billing.domain.decide import decide
from backend.app.billing.domain.facts import Translation
from backend.app.billing.domain.state import State
from backend.app.billing.masking import mask_sensitive
from backend.app.billing.providers.stripe import translate
from backend.app.billing.providers.stripe_event import StripeEvent, read_event
from backend.app.billing.security import SecretSource, WebhookSecurityValidator, sign
from backend.app.billing.strict_json import parse_event_json
from backend.app.main import SHIPPED_CATALOG
from bench.events import SECRET, TYPES, make_workload
from bench.load import BenchFailed

# Stripe's own tolerance; the signatures are seconds old.
TOLERANCE_SECONDS = 300
MICROSECONDS = 1_000_000


@dataclass(frozen=True, slots=True)
class PartCost:
    """CPU of one part in microseconds per event, one figure per repetition."""

    part: str
    cpu_us: Sequence[float]


@dataclass(frozen=True, slots=True)
class _Known:
    """A measured event with what was known before it."""

    state: State
    event: StripeEvent
    translation: Translation


def measure_parts(*, events: int, repetitions: int) -> list[PartCost]:
    """The parts in the order of the work, each over the whole mix.

    Raises:
        BenchFailed: an event changes nothing, so that its decision would be too cheap.
    """
    work = make_workload(events - events % TYPES, prefix="parts")
    now = datetime.now(UTC)
    timestamp = int(now.timestamp())
    validator = WebhookSecurityValidator(
        SecretSource.from_text(SECRET, livemode=False), tolerance_seconds=TOLERANCE_SECONDS
    )
    headers = [
        sign(body, SECRET.encode("ascii"), timestamp=timestamp).encode("ascii") for body in work.events
    ]
    catalog = parse_catalog(SHIPPED_CATALOG.read_text(encoding="utf-8"))
    # A seed's state stands for the event about the same subscription; others start from nothing.
    known = [_Known(State(), *_read(body, now)) for body in work.seeds]
    states = {
        item.translation.subject: decide(catalog, item.state, item.event.envelope, item.translation, now=now)[
            0
        ]
        for item in known
    }
    measured = [_after(states, *_read(body, now)) for body in work.events]

    def verify() -> None:
        for body, header in zip(work.events, headers, strict=True):
            validator.verify(body=body, header=header, now=now)

    def mask_and_parse() -> None:
        for body in work.events:
            read_event(parse_event_json(mask_sensitive(body)), signed_at=now)

    def translate_all() -> None:
        for item in measured:
            translate(item.event)

    def decide_all() -> None:
        for item in measured:
            _, decision = decide(catalog, item.state, item.event.envelope, item.translation, now=now)
            if not decision.changes:
                raise BenchFailed(f"{item.event.envelope.id} changed nothing")

    parts: list[tuple[str, Callable[[], None]]] = [
        ("verify the signature", verify),
        ("mask, parse and check the envelope", mask_and_parse),
        ("translate into facts", translate_all),
        ("decide", decide_all),
    ]
    return [
        PartCost(name, [_cpu_us(part, len(work.events)) for _ in range(repetitions)]) for name, part in parts
    ]


def _read(body: bytes, now: datetime) -> tuple[StripeEvent, Translation]:
    event = read_event(parse_event_json(body), signed_at=now)
    translation = translate(event)
    if translation is None:
        raise BenchFailed(f"nothing depends on {event.envelope.type}")
    return event, translation


def _after(states: dict[str | None, State], event: StripeEvent, translation: Translation) -> _Known:
    keys = [translation.subject, *(link.parent for link in translation.links)]
    before = next((states[key] for key in keys if key in states), State())
    return _Known(before, event, translation)


def _cpu_us(part: Callable[[], None], events: int) -> float:
    started = time.process_time()
    part()
    return (time.process_time() - started) / events * MICROSECONDS
