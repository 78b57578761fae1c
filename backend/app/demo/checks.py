"""The demo's claims, each verified by a question of its own: to the API, to /metrics or to the database file."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from backend.app.billing.providers.stripe_event import DASHBOARD_TEST_EVENT_ID
from backend.app.demo.deliveries import DUPLICATES, REFUSALS, Delivered, Kind
from backend.app.demo.deployment import Deployment
from backend.app.demo.story import LAST_EVENT_ID, Chapter, StoryEvent

# More than this many examples of one failure tell nothing new.
EXAMPLES_MAX = 3

# A checkout that made a subscription reports its first invoice's money; only its own purchases count here.
RECEIVED_BY_USER = """
    SELECT user_id, SUM(amount) AS cents FROM payment_events
    WHERE settled AND (event_type LIKE 'invoice%' OR (event_type LIKE 'checkout%' AND subscription_id IS NULL))
    GROUP BY user_id
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All that a check may look at: the story, what was sent and answered, and the two deployments."""

    chapters: Sequence[Chapter]
    delivered: Sequence[Delivered]
    delivered_again: Sequence[Delivered]
    counters_before: dict[str, float]
    deployment: Deployment
    other_deployment: Deployment

    @property
    def events(self) -> list[StoryEvent]:
        """The story's events."""
        return [event for chapter in self.chapters for event in chapter.events]

    @property
    def users(self) -> list[str]:
        """The story's users."""
        return [chapter.user_id for chapter in self.chapters if chapter.user_id is not None]

    def of_kind(self, *kinds: Kind) -> list[Delivered]:
        """The deliveries of some kinds."""
        return [delivered for delivered in self.delivered if delivered.kind in kinds]

    def moved(self) -> dict[str, float]:
        """By how much each counter and gauge has moved since the start."""
        now = self.deployment.counters()
        return {
            name: value - self.counters_before.get(name, 0)
            for name, value in now.items()
            if value != self.counters_before.get(name, 0)
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A claim and whether it holds; `detail` says how many of how many, or what was found instead."""

    claim: str
    ok: bool
    detail: str


Finding = tuple[int, list[str]]
CHECKS: list[tuple[str, Callable[[Evidence], Finding]]] = []


def run_checks(evidence: Evidence) -> list[Check]:
    """Every check's result, in the order of the account."""
    checks = []
    for claim, find in CHECKS:
        asked, wrong = find(evidence)
        # A check that had nothing to look at proves nothing.
        ok = not wrong and asked > 0
        detail = f"{max(0, asked - len(wrong))} of {asked}"
        if wrong:
            more = f" and {len(wrong) - EXAMPLES_MAX} more" if len(wrong) > EXAMPLES_MAX else ""
            detail += f": {'; '.join(wrong[:EXAMPLES_MAX])}{more}"
        checks.append(Check(claim=claim, ok=ok, detail=detail))
    return checks


def _claims(claim: str) -> Callable[[Callable[[Evidence], Finding]], Callable[[Evidence], Finding]]:
    """Registers a check: it returns how many things it looked at, and what is wrong with some of them."""

    def register(find: Callable[[Evidence], Finding]) -> Callable[[Evidence], Finding]:
        CHECKS.append((claim, find))
        return find

    return register


@_claims("every genuine event was answered with 200")
def _answered(evidence: Evidence) -> Finding:
    firsts = evidence.of_kind(Kind.FIRST)
    wrong = [f"{first.event_id} got {first.reply.status}" for first in firsts if first.reply.status != 200]  # noqa: PLR2004  # HTTP's OK
    missing = {event.id for event in evidence.events} - {first.event_id for first in firsts}
    return len(evidence.events), wrong + [f"{event_id} was never sent" for event_id in sorted(missing)]


@_claims("every user has exactly what the story says")
def _access(evidence: Evidence) -> Finding:
    wrong = []
    for chapter in evidence.chapters:
        if chapter.user_id is None:
            continue
        document = evidence.deployment.entitlements(chapter.user_id)
        until = unix_of(document["valid_until"]) if document["valid_until"] else None
        found = (document["plan_code"], document["status"], until)
        expected = (chapter.plan_code, chapter.status, chapter.valid_until)
        if found != expected:
            wrong.append(f"{chapter.user_id} has {found} instead of {expected}")
    return len(evidence.users), wrong


@_claims("the table user_entitlements says the same as the API")
def _table_agrees(evidence: Evidence) -> Finding:
    rows = evidence.deployment.rows("SELECT user_id, plan_code, status, entitlements FROM user_entitlements")
    wrong = []
    for row in rows:
        document = evidence.deployment.entitlements(row["user_id"])
        stored = (row["plan_code"], row["status"], json.loads(row["entitlements"]))
        if stored != (document["plan_code"], document["status"], document["entitlements"]):
            wrong.append(f"{row['user_id']} is stored as {stored[0]}, {stored[1]}")
    unexpected = {
        chapter.user_id
        for chapter in evidence.chapters
        if chapter.user_id is not None and chapter.plan_code != "free"
    } - {row["user_id"] for row in rows}
    return len(rows) + len(unexpected), wrong + [f"{user} has no row" for user in sorted(unexpected)]


@_claims("every duplicate got the first answer, byte for byte")
def _duplicates(evidence: Evidence) -> Finding:
    return _same_answers(evidence, DUPLICATES)


@_claims("delivered by many at once, an event was processed once and answered alike")
def _burst(evidence: Evidence) -> Finding:
    return _same_answers(evidence, (Kind.BURST,))


@_claims("the forged, stale, future, oversized and senseless were refused")
def _refused(evidence: Evidence) -> Finding:
    refused = evidence.of_kind(*REFUSALS)
    wrong = [
        f"{one.kind}: {one.reply.status}"
        for one in refused
        if one.reply.status != REFUSALS[one.kind]
        or not one.reply.headers.get("content-type", "").startswith("application/problem+json")
    ]
    return len(refused), wrong


@_claims("they, the duplicates and the dashboard's test event changed nothing")
def _unchanged(evidence: Evidence) -> Finding:
    watched = evidence.of_kind(*REFUSALS, *DUPLICATES, Kind.DASHBOARD)
    wrong = [f"{one.kind} changed rows" for one in watched if one.changed is not False]
    if evidence.deployment.entitlements("mallory")["plan_code"] != "free":
        wrong.append("mallory has a plan")
    traces = evidence.deployment.rows(
        "SELECT event_id FROM webhook_events WHERE instr(payload, CAST('mallory' AS BLOB)) > 0"
    )
    return len(watched), wrong + [f"{row['event_id']} was stored" for row in traces]


@_claims("the dashboard's test event was accepted each time and never remembered")
def _dashboard(evidence: Evidence) -> Finding:
    sent = evidence.of_kind(Kind.DASHBOARD)
    wrong = [
        f"answered {one.reply.status}"
        for one in sent
        if one.reply.status != 200 or "idempotent-replayed" in one.reply.headers  # noqa: PLR2004  # HTTP's OK
    ]
    stored = evidence.deployment.rows(
        "SELECT event_id FROM webhook_claims WHERE event_id = ?", DASHBOARD_TEST_EVENT_ID
    )
    return len(sent), wrong + ["it was remembered" for _ in stored]


@_claims("each piece of money stands once in the ledger")
def _money_once(evidence: Evidence) -> Finding:
    lines = evidence.deployment.rows("SELECT effect_key FROM payment_events WHERE settled")
    counts = Counter(row["effect_key"] for row in lines)
    wrong = [f"{key} stands {count} times" for key, count in counts.items() if count > 1]
    paid = _paid_invoices(evidence.events)
    stored = Counter(
        (row["invoice_id"], row["amount"])
        for row in evidence.deployment.rows(
            "SELECT invoice_id, amount FROM payment_events WHERE settled AND event_type LIKE 'invoice%'"
        )
    )
    wrong += [
        f"invoice {invoice[0]} stands {stored[invoice]} times with {invoice[1]}"
        for invoice in sorted(paid | set(stored))
        if stored[invoice] != (1 if invoice in paid else 0)
    ]
    return len(counts), wrong


@_claims("each user's money is what they paid, to the cent")
def _money_by_user(evidence: Evidence) -> Finding:
    stored = {row["user_id"]: row["cents"] for row in evidence.deployment.rows(RECEIVED_BY_USER)}
    expected = {chapter.user_id: chapter.paid_cents for chapter in evidence.chapters}
    wrong = [
        f"{user or 'nobody'}: {stored.get(user) or 0} instead of {expected.get(user) or 0}"
        for user in sorted(expected.keys() | stored.keys(), key=str)
        if (stored.get(user) or 0) != (expected.get(user) or 0)
    ]
    return len(expected), wrong


@_claims("each ledger line and each change of access has its audit row")
def _audited(evidence: Evidence) -> Finding:
    pairs = evidence.deployment.rows(
        """
        SELECT 'ledger line ' || line.effect_key AS what, COUNT(audit.id) AS audit_rows
        FROM payment_events line LEFT JOIN audit_logs audit
          ON audit.action = 'payment.event' AND audit.resource_id = line.id GROUP BY line.id
        UNION ALL
        SELECT 'version ' || history.version || ' of ' || history.user_id, COUNT(audit.id)
        FROM entitlement_history history LEFT JOIN audit_logs audit
          ON audit.resource_type = 'entitlement' AND audit.resource_id = history.user_id
          AND json_extract(audit.details, '$.version') = history.version
        GROUP BY history.user_id, history.version
        """
    )
    return len(pairs), [f"{row['what']} has {row['audit_rows']}" for row in pairs if row["audit_rows"] != 1]


@_claims("each event was applied, ignored or parked as the story says")
def _outcomes(evidence: Evidence) -> Finding:
    stored = {
        row["event_id"]: (row["status"], row["reason"])
        for row in evidence.deployment.rows("SELECT event_id, status, reason FROM webhook_events")
    }
    expected = {event.id: (event.outcome, event.reason) for event in evidence.events}
    wrong = [
        f"{event_id} is {stored.get(event_id)}"
        for event_id in sorted(expected.keys() | stored.keys())
        if stored.get(event_id) != expected.get(event_id)
    ]
    return len(expected), wrong


@_claims("what waited for Ben's name was applied by itself when it came, last of all")
def _late_binding(evidence: Evidence) -> Finding:
    waited = [
        first.event_id
        for first in evidence.of_kind(Kind.FIRST)
        if first.event_id.startswith("evt_ben_") and json.loads(first.reply.body).get("status") == "parked"
    ]
    released = {
        row["resource_id"]
        for row in evidence.deployment.rows(
            "SELECT resource_id FROM audit_logs WHERE action = 'event.unparked' AND user_id = 'ben'"
            " AND json_extract(details, '$.by_stripe_event_id') = ?",
            LAST_EVENT_ID,
        )
    }
    return len(waited), [f"{event_id} was not released" for event_id in waited if event_id not in released]


@_claims("each event is kept with its bytes and their hash, but without Stripe's client secrets")
def _bytes_kept(evidence: Evidence) -> Finding:
    sent = {first.event_id: first.body_sha256 for first in evidence.of_kind(Kind.FIRST)}
    stored = {
        row["event_id"]: (row["payload"] or b"", row["payload_sha256"])
        for row in evidence.deployment.rows("SELECT event_id, payload, payload_sha256 FROM webhook_events")
    }
    wrong = []
    for event in evidence.events:
        payload, noted_sha256 = stored.get(event.id, (b"", None))
        client_secret = event.body["data"]["object"].get("client_secret")
        kept = (
            hashlib.sha256(payload).hexdigest() == sent.get(event.id)
            if client_secret is None
            else payload != b"" and client_secret.encode() not in payload
        )
        if not kept or noted_sha256 != sent.get(event.id):
            wrong.append(event.id)
    return len(evidence.events), wrong


@_claims("the metrics counted every duplicate and every refused signature, and no more")
def _counted(evidence: Evidence) -> Finding:
    duplicates = len(evidence.of_kind(*DUPLICATES, Kind.BURST))
    expected = {
        "billing_webhook_replay_block_total": duplicates,
        'idempotent_hits_total{operation="webhook"}': duplicates,
        "billing_webhook_invalid_sig_total": sum(
            REFUSALS[one.kind] == 403  # noqa: PLR2004  # HTTP's Forbidden
            for one in evidence.of_kind(*REFUSALS)
        ),
        "billing_events_parked": sum(event.outcome == "parked" for event in evidence.events),
    }
    moved = evidence.moved()
    wrong = [
        f"{name} moved by {moved.get(name, 0):g} instead of {value}"
        for name, value in expected.items()
        if moved.get(name, 0) != value
    ]
    return len(expected), wrong


@_claims("order did not matter: the same events in another order give the same access")
def _any_order_access(evidence: Evidence) -> Finding:
    wrong = [
        f"{user} differs"
        for user in evidence.users
        if _comparable(evidence.deployment, user) != _comparable(evidence.other_deployment, user)
    ]
    order = [one.event_id for one in evidence.of_kind(Kind.FIRST)]
    if order == [one.event_id for one in evidence.delivered_again]:
        wrong.append("the order was the same")
    return len(evidence.users), wrong


@_claims("... and the same ledger")
def _any_order_ledger(evidence: Evidence) -> Finding:
    sql = "SELECT effect_key, user_id, amount, currency, settled FROM payment_events"
    here = Counter(tuple(row) for row in evidence.deployment.rows(sql))
    there = Counter(tuple(row) for row in evidence.other_deployment.rows(sql))
    different = sorted({str(line[0]) for line in (here - there) + (there - here)})
    return sum(here.values()), [f"{key} differs" for key in different]


def unix_of(text: str) -> int:
    """The unix second of an RFC 3339 instant."""
    return int(datetime.fromisoformat(text).astimezone(UTC).timestamp())


def _comparable(deployment: Deployment, user_id: str) -> dict[str, Any]:
    document = deployment.entitlements(user_id)
    # How many steps it took to get there is the one thing that the order may change.
    return {name: value for name, value in document.items() if name != "version"}


def _same_answers(evidence: Evidence, kinds: Sequence[Kind]) -> Finding:
    first_answers = {first.event_id: first.reply for first in evidence.of_kind(Kind.FIRST)}
    copies = evidence.of_kind(*kinds)
    wrong = []
    for copy in copies:
        first = first_answers.get(copy.event_id)
        same = first is not None and (copy.reply.status, copy.reply.body) == (first.status, first.body)
        if not same or copy.reply.headers.get("idempotent-replayed") != "true":
            wrong.append(f"{copy.kind} of {copy.event_id} got {copy.reply.status}")
    return len(copies), wrong


def _paid_invoices(events: Sequence[StoryEvent]) -> set[tuple[str, int]]:
    return {
        (event.body["data"]["object"]["id"], event.body["data"]["object"]["amount_paid"])
        for event in events
        if event.body["type"] in ("invoice.paid", "invoice.payment_succeeded")
    }
