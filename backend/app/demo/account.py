"""The account of a finished demo as one JSON-ready document: who has what and why, what was refused, what waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from backend.app.demo.checks import Check, Evidence
from backend.app.demo.deliveries import DUPLICATES, REFUSALS, Kind
from backend.app.demo.story import Chapter

# The newest change of a user's access, and the event that caused it.
_CAUSE = """
    SELECT cause_event_id, cause_event_type FROM entitlement_history
    WHERE user_id = ? ORDER BY version DESC LIMIT 1
"""
# The invoice or purchase, the card's side of the same money, and what went back are shown apart.
_MONEY = """
    SELECT user_id,
      SUM(CASE WHEN settled AND (event_type LIKE 'invoice%'
        OR (event_type LIKE 'checkout%' AND subscription_id IS NULL)) THEN amount ELSE 0 END) AS received,
      SUM(CASE WHEN settled AND event_type = 'charge_succeeded' THEN amount ELSE 0 END) AS charged,
      SUM(CASE WHEN settled AND event_type = 'refund_created' THEN amount ELSE 0 END) AS refunded,
      COUNT(*) AS lines
    FROM payment_events GROUP BY user_id ORDER BY user_id IS NULL, user_id
"""


def make_account(evidence: Evidence, checks: Sequence[Check], *, seed: int, seconds: float) -> dict[str, Any]:
    """The account; instants as RFC 3339 in UTC, amounts in cents."""
    deployment = evidence.deployment
    kinds = Counter(one.kind for one in evidence.delivered)
    return {
        "ok": all(check.ok for check in checks),
        "seed": seed,
        "seconds": round(seconds, 1),
        "events": len(evidence.events),
        "deliveries": {
            "total": len(evidence.delivered),
            "duplicates": sum(kinds[kind] for kind in (*DUPLICATES, Kind.BURST)),
            "refused": sum(kinds[kind] for kind in REFUSALS),
        },
        "access": [
            _access(evidence, chapter.user_id, chapter)
            for chapter in evidence.chapters
            if chapter.user_id is not None
        ],
        "refused": [
            {"what": one.kind.value, "status": one.reply.status} for one in evidence.of_kind(*REFUSALS)
        ],
        "parked": [
            dict(row)
            for row in deployment.rows(
                "SELECT event_id, event_type, reason FROM webhook_events WHERE status = 'parked'"
                " ORDER BY event_id"
            )
        ],
        "ignored": [
            dict(row)
            for row in deployment.rows(
                "SELECT event_id, event_type, reason FROM webhook_events WHERE status = 'ignored'"
                " ORDER BY event_id"
            )
        ],
        "money": [dict(row) for row in deployment.rows(_MONEY)],
        "audit": {
            row["action"]: row["rows"]
            for row in deployment.rows(
                "SELECT action, COUNT(*) AS rows FROM audit_logs GROUP BY action ORDER BY action"
            )
        },
        "metrics": dict(sorted(evidence.moved().items())),
        "checks": [{"claim": check.claim, "ok": check.ok, "detail": check.detail} for check in checks],
    }


def _access(evidence: Evidence, user_id: str, chapter: Chapter) -> dict[str, Any]:
    document = evidence.deployment.entitlements(user_id)
    cause = next(iter(evidence.deployment.rows(_CAUSE, user_id)), None)
    return {
        "user_id": user_id,
        "story": chapter.title,
        "plan_code": document["plan_code"],
        "status": document["status"],
        "valid_until": document["valid_until"],
        "sources": [source["source"] for source in document["sources"]],
        "event_id": cause["cause_event_id"] if cause else None,
        "event_type": cause["cause_event_type"] if cause else None,
    }
