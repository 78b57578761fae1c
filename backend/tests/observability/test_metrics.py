from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from backend.app.observability.metrics import MetricsCollector, get_metrics

CONTRACT_NAMES = [
    "billing_webhook_replay_block_total",
    'idempotent_hits_total{operation="webhook"}',
    "billing_webhook_invalid_sig_total",
    "billing_webhook_deliveries_total",
    "billing_webhook_duration_seconds",
    "billing_events_parked",
    "entitlement_changes_total",
    "audit_events_total",
    "alerts_sent_total",
    "billing_seconds_since_last_event",
    "billing_drift_users",
]


def value(metrics: MetricsCollector, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


@pytest.mark.parametrize("name", CONTRACT_NAMES)
def test_every_promised_metric_is_shown_before_anything_happened(name: str) -> None:
    assert name in MetricsCollector().render().decode()


def test_series_that_alerting_rules_look_at_begin_at_zero() -> None:
    metrics = MetricsCollector()
    assert value(metrics, "idempotent_hits_total", operation="webhook") == 0
    assert value(metrics, "billing_webhook_replay_block_total") == 0
    assert value(metrics, "billing_webhook_invalid_sig_total") == 0
    for result in ("sent", "failed", "suppressed", "dropped"):
        assert value(metrics, "alerts_sent_total", result=result) == 0
    for outcome in ("success", "ignored", "parked"):
        assert value(metrics, "billing_webhook_deliveries_total", outcome=outcome) == 0


COUNTED: list[tuple[Callable[[MetricsCollector], None], str, dict[str, str], float]] = [
    (lambda m: m.idempotent_hit("checkout"), "idempotent_hits_total", {"operation": "checkout"}, 1),
    (lambda m: m.signature_refused("stale"), "billing_webhook_invalid_sig_total", {}, 1),
    (lambda m: m.signature_refused("stale"), "billing_webhook_refused_total", {"reason": "stale"}, 1),
    (
        lambda m: m.delivery_answered("parked", 0.2),
        "billing_webhook_deliveries_total",
        {"outcome": "parked"},
        1,
    ),
    (lambda m: m.delivery_answered("parked", 0.2), "billing_webhook_duration_seconds_count", {}, 1),
    (lambda m: m.delivery_answered("parked", 0.25), "billing_webhook_duration_seconds_sum", {}, 0.25),
    (
        lambda m: m.entitlement_changed("vip", "granted"),
        "entitlement_changes_total",
        {"plan": "vip", "change": "granted"},
        1,
    ),
    (lambda m: m.audit_written("payment.event"), "audit_events_total", {"action": "payment.event"}, 1),
    (lambda m: m.alert_sent("failed"), "alerts_sent_total", {"result": "failed"}, 1),
    (lambda m: m.redis_failed(), "redis_errors_total", {}, 1),
    (lambda m: m.parked_events(7), "billing_events_parked", {}, 7),
    (lambda m: m.newest_event_age(12.5), "billing_seconds_since_last_event", {}, 12.5),
    (lambda m: m.newest_event_age(None), "billing_seconds_since_last_event", {}, -1),
    (lambda m: m.drift_found("missing", 3), "billing_drift_users", {"kind": "missing"}, 3),
    (
        lambda m: m.outbox_settled("owner_alert", "dead"),
        "outbox_deliveries_total",
        {"kind": "owner_alert", "result": "dead"},
        1,
    ),
]


@pytest.mark.parametrize(("count", "name", "labels", "expected"), COUNTED)
def test_what_happened_is_what_is_shown(
    count: Callable[[MetricsCollector], None], name: str, labels: dict[str, str], expected: float
) -> None:
    metrics = MetricsCollector()
    count(metrics)
    assert value(metrics, name, **labels) == expected


def test_a_replay_raises_both_counters_by_one() -> None:
    metrics = MetricsCollector()
    metrics.replay_blocked()
    assert value(metrics, "billing_webhook_replay_block_total") == 1
    assert value(metrics, "idempotent_hits_total", operation="webhook") == 1


def test_no_metric_has_a_label_for_users_events_or_requests() -> None:
    """The number of series is bounded by plans, outcomes and reasons, never by traffic."""
    metrics = MetricsCollector()
    for count, *_ in COUNTED:
        count(metrics)
    names = set(re.findall(r'(\w+)="', metrics.render().decode()))
    assert names == {"operation", "reason", "outcome", "le", "plan", "change", "action", "result", "kind"}


def test_a_process_has_one_collector() -> None:
    assert get_metrics() is get_metrics()


def test_what_several_worker_processes_counted_is_shown_as_one_sum(tmp_path: Path) -> None:
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}

    def child(program: str) -> str:
        source = f"from backend.app.observability.metrics import get_metrics\nm = get_metrics()\n{program}"
        done = subprocess.run(
            [sys.executable, "-c", source],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        return done.stdout

    worker = (
        "for _ in range({n}): m.replay_blocked(); m.delivery_answered('success', 0.01)\nm.parked_events({n})"
    )
    child(worker.format(n=3))
    child(worker.format(n=4))
    shown = child("print(m.render().decode())")
    assert "billing_webhook_replay_block_total 7.0" in shown
    assert 'idempotent_hits_total{operation="webhook"} 7.0' in shown
    assert 'billing_webhook_deliveries_total{outcome="success"} 7.0' in shown
    assert "billing_webhook_duration_seconds_count 7.0" in shown
    # A gauge is a state, not a count: the newest worker's word holds.
    assert "billing_events_parked 4.0" in shown
    assert 'alerts_sent_total{result="dropped"} 0.0' in shown
