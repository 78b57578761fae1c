"""Sends the story to a deployment as Stripe's bad days would: in disorder, with duplicates, among forgeries."""

from __future__ import annotations

import hashlib
import json
import random
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum

from backend.app.billing.routes import WEBHOOK_PATH
from backend.app.billing.security import sign
from backend.app.demo.deployment import Deployment, Reply
from backend.app.demo.story import LAST_EVENT_ID, Chapter, dashboard_test_event, forged_purchase
from backend.app.simulator.objects import Json

# The service accepts 300 s on both sides; this is beyond it however slow the machine is.
OUT_OF_WINDOW_SECONDS = 3_600
# Inside the window, and before now, so that a later signature of the same bytes is another one.
SIGNED_AGO_SECONDS = 30
# One over the default of WEBHOOK_BODY_BYTES_MAX.
OVERSIZED_BODY_BYTES = 262_145
# Enough of each to see that they are all answered alike.
REPLAYS = 5
REDELIVERIES = 4
BURST_DELIVERIES = 8
# Every table whose rows are money, access or their proof; the outbox is left out because it empties itself.
STATE_TABLES = (
    "audit_logs",
    "customer_ties",
    "entitlement_history",
    "payment_events",
    "facts",
    "links",
    "sources",
    "user_entitlements",
    "webhook_claims",
    "webhook_events",
)


class Kind(StrEnum):
    """What a delivery is meant to be."""

    FIRST = "first delivery"
    REPLAY = "replay"  # same bytes, same signature
    REDELIVERY = "redelivery"  # same bytes, new signature
    BURST = "one of many at once"
    DASHBOARD = "dashboard test event"
    FORGED = "forged signature"
    TAMPERED = "body changed after signing"
    UNSIGNED = "no signature"
    STALE = "signed an hour ago"
    FUTURE = "signed an hour ahead"
    OVERSIZED = "body too large"
    NONSENSE = "signed, but not an event"


DUPLICATES = (Kind.REPLAY, Kind.REDELIVERY)
# The status that each kind of refusal has by the contract.
REFUSALS = {
    Kind.FORGED: 403,
    Kind.TAMPERED: 403,
    Kind.UNSIGNED: 403,
    Kind.STALE: 403,
    Kind.FUTURE: 403,
    Kind.OVERSIZED: 413,
    Kind.NONSENSE: 400,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivered:
    """A delivery and its answer; `changed` says whether any row of STATE_TABLES was another afterwards."""

    kind: Kind
    event_id: str
    body_sha256: str
    reply: Reply
    changed: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Letter:
    kind: Kind
    event_id: str
    body: bytes
    signature: str | None

    def send(self, deployment: Deployment) -> Reply:
        headers = {"Content-Type": "application/json"}
        if self.signature is not None:
            headers["Stripe-Signature"] = self.signature
        if self.kind is Kind.OVERSIZED:
            headers["Expect"] = "100-continue"
        return deployment.request("POST", WEBHOOK_PATH, body=self.body, headers=headers)


Step = Callable[[int, int], None]


def event_bytes(event: Json) -> bytes:
    """An event's body as Stripe writes it: indented by two."""
    return json.dumps(event, indent=2).encode()


def deliver_on_a_bad_day(
    deployment: Deployment, chapters: Sequence[Chapter], *, seed: int, now: int, step: Step
) -> list[Delivered]:
    """Delivers every event, shuffled, with duplicates and refused deliveries in between; in the order sent.

    `step(done, total)` is called after each delivery.
    """
    dice = random.Random(seed)  # noqa: S311  # a shuffle, not a secret
    events = _shuffled(chapters, dice)
    firsts = [_signed(deployment, Kind.FIRST, event, at=now - SIGNED_AGO_SECONDS) for event in events]
    letters: list[_Letter] = list(firsts)
    # The very last letter is Ben's checkout, so nothing may come after it but what is put behind it below.
    for number, first in enumerate(dice.sample(firsts[:-1], REPLAYS + REDELIVERIES)):
        copy = (
            _Letter(kind=Kind.REPLAY, event_id=first.event_id, body=first.body, signature=first.signature)
            if number < REPLAYS
            else _Letter(
                kind=Kind.REDELIVERY,
                event_id=first.event_id,
                body=first.body,
                signature=sign(first.body, deployment.webhook_secret.encode(), timestamp=now),
            )
        )
        letters.insert(dice.randint(letters.index(first) + 1, len(letters) - 1), copy)
    for other in (*_refused(deployment, now), *_dashboard(deployment, now)):
        letters.insert(dice.randrange(len(letters) - 1), other)

    # One event, whichever the dice choose, is delivered by many connections in the same instant.
    burst = dice.choice(firsts[:-1])
    delivered: list[Delivered] = []
    for number, letter in enumerate(letters, start=1):
        if letter is burst:
            delivered += _send_at_once(deployment, letter)
        else:
            delivered.append(_send(deployment, letter))
        step(number, len(letters))
    return delivered


def deliver_in_another_order(
    deployment: Deployment, chapters: Sequence[Chapter], *, seed: int, now: int
) -> list[Delivered]:
    """Delivers every event once, in the order that another seed gives."""
    dice = random.Random(seed)  # noqa: S311  # a shuffle, not a secret
    events = [event.body for chapter in chapters for event in chapter.events]
    dice.shuffle(events)
    return [
        _send(deployment, _signed(deployment, Kind.FIRST, event, at=now - SIGNED_AGO_SECONDS))
        for event in events
    ]


def state_digest(deployment: Deployment) -> str:
    """A hash over all rows of STATE_TABLES."""
    digest = hashlib.sha256()
    for table in STATE_TABLES:
        rows = sorted(repr(tuple(row)) for row in deployment.rows(f"SELECT * FROM {table}"))  # noqa: S608  # our own names
        digest.update(f"{table} {rows}".encode())
    return digest.hexdigest()


def _shuffled(chapters: Sequence[Chapter], dice: random.Random) -> list[Json]:
    events = [event.body for chapter in chapters for event in chapter.events]
    dice.shuffle(events)
    return sorted(events, key=lambda event: event["id"] == LAST_EVENT_ID)


def _signed(deployment: Deployment, kind: Kind, event: Json, *, at: int) -> _Letter:
    body = event_bytes(event)
    signature = sign(body, deployment.webhook_secret.encode(), timestamp=at)
    return _Letter(kind=kind, event_id=event["id"], body=body, signature=signature)


def _dashboard(deployment: Deployment, now: int) -> list[_Letter]:
    # Twice: a service that remembered its id would take every later one for a duplicate.
    event = dashboard_test_event(now)
    return [_signed(deployment, Kind.DASHBOARD, event, at=now - ago) for ago in (1, 2)]


def _refused(deployment: Deployment, now: int) -> list[_Letter]:
    """Deliveries that must change nothing; all but the last would make Mallory an enterprise customer."""
    key = deployment.webhook_secret.encode()
    strangers_key = f"whsec_{secrets.token_hex(16)}".encode()
    wishes = [forged_purchase(now, number) for number in range(1, len(REFUSALS))]
    bodies = [event_bytes(wish) for wish in wishes]
    oversized = bodies[5] + b" " * (OVERSIZED_BODY_BYTES - len(bodies[5]))
    nonsense = b"All your plans are belong to us."
    texts: list[tuple[Kind, bytes, str | None]] = [
        (Kind.FORGED, bodies[0], sign(bodies[0], strangers_key, timestamp=now)),
        (Kind.TAMPERED, bodies[1], sign(bodies[1].replace(b"mallory", b"someone"), key, timestamp=now)),
        (Kind.UNSIGNED, bodies[2], None),
        (Kind.STALE, bodies[3], sign(bodies[3], key, timestamp=now - OUT_OF_WINDOW_SECONDS)),
        (Kind.FUTURE, bodies[4], sign(bodies[4], key, timestamp=now + OUT_OF_WINDOW_SECONDS)),
        (Kind.OVERSIZED, oversized, sign(oversized, key, timestamp=now)),
        (Kind.NONSENSE, nonsense, sign(nonsense, key, timestamp=now)),
    ]
    ids = [*(str(wish["id"]) for wish in wishes), "none"]
    return [
        _Letter(kind=kind, event_id=event_id, body=body, signature=signature)
        for event_id, (kind, body, signature) in zip(ids, texts, strict=True)
    ]


def _send(deployment: Deployment, letter: _Letter) -> Delivered:
    watched = letter.kind is not Kind.FIRST
    before = state_digest(deployment) if watched else None
    reply = letter.send(deployment)
    return _delivered(letter, reply, changed=state_digest(deployment) != before if watched else None)


def _send_at_once(deployment: Deployment, letter: _Letter) -> list[Delivered]:
    with ThreadPoolExecutor(BURST_DELIVERIES) as threads:
        replies = list(threads.map(lambda _: letter.send(deployment), range(BURST_DELIVERIES)))
    # The one that came first, whichever it was, is the event's first delivery.
    replies.sort(key=lambda reply: "idempotent-replayed" in reply.headers)
    return [
        _delivered(letter, replies[0]),
        *(
            Delivered(
                kind=Kind.BURST,
                event_id=letter.event_id,
                body_sha256=hashlib.sha256(letter.body).hexdigest(),
                reply=reply,
            )
            for reply in replies[1:]
        ),
    ]


def _delivered(letter: _Letter, reply: Reply, *, changed: bool | None = None) -> Delivered:
    return Delivered(
        kind=letter.kind,
        event_id=letter.event_id,
        body_sha256=hashlib.sha256(letter.body).hexdigest(),
        reply=reply,
        changed=changed,
    )
