"""The service's Prometheus metrics; one typed method per thing that is counted.

With several worker processes `serve` sets PROMETHEUS_MULTIPROC_DIR before they start, and
`render` then adds up what all of them counted.
"""

from __future__ import annotations

import functools
import os

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

METRICS_CONTENT_TYPE = CONTENT_TYPE_LATEST

# From a cached duplicate (under a millisecond) to the deadline (8 s).
DURATION_BUCKETS_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

# The `status` of the contract's webhook answer; what else is counted appears with its first delivery.
DELIVERY_OUTCOMES = ("success", "ignored", "parked")
ALERT_RESULTS = ("sent", "failed", "suppressed", "dropped")


class MetricsCollector:
    """All metrics on one registry of their own; names and labels are fixed by the public contract."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.billing_webhook_replay_block_total = Counter(
            "billing_webhook_replay_block_total",
            "Deliveries of an event that was already processed",
            registry=self.registry,
        )
        self.billing_webhook_invalid_sig_total = Counter(
            "billing_webhook_invalid_sig_total",
            "Deliveries refused because of their signature",
            registry=self.registry,
        )
        self.billing_webhook_refused_total = Counter(
            "billing_webhook_refused_total",
            "Deliveries refused because of their signature, by reason",
            ["reason"],
            registry=self.registry,
        )
        self.idempotent_hits_total = Counter(
            "idempotent_hits_total",
            "Requests answered from the result of an earlier identical one",
            ["operation"],
            registry=self.registry,
        )
        self.idempotency_stale_writes_total = Counter(
            "idempotency_stale_writes_total",
            "Writes refused because their holder had lost its lease",
            ["operation"],
            registry=self.registry,
        )
        self.billing_webhook_deliveries_total = Counter(
            "billing_webhook_deliveries_total",
            "Webhook deliveries by outcome",
            ["outcome"],
            registry=self.registry,
        )
        self.billing_webhook_duration_seconds = Histogram(
            "billing_webhook_duration_seconds",
            "Time from the first byte of a delivery to its answer",
            buckets=DURATION_BUCKETS_SECONDS,
            registry=self.registry,
        )
        self.billing_events_parked = Gauge(
            "billing_events_parked",
            "Events that wait for a missing piece",
            multiprocess_mode="mostrecent",
            registry=self.registry,
        )
        self.billing_seconds_since_last_event = Gauge(
            "billing_seconds_since_last_event",
            "Seconds since the newest event was received; -1 before the first",
            multiprocess_mode="mostrecent",
            registry=self.registry,
        )
        self.entitlement_changes_total = Counter(
            "entitlement_changes_total",
            "Committed changes of a user's entitlements",
            ["plan", "change"],
            registry=self.registry,
        )
        self.audit_events_total = Counter(
            "audit_events_total",
            "Committed audit rows by action",
            ["action"],
            registry=self.registry,
        )
        self.alerts_sent_total = Counter(
            "alerts_sent_total",
            "Owner alerts by result",
            ["result"],
            registry=self.registry,
        )
        self.billing_drift_users = Gauge(
            "billing_drift_users",
            "Users whose stored entitlements differ from the provider's, as of the last reconcile run",
            ["kind"],
            multiprocess_mode="mostrecent",
            registry=self.registry,
        )
        self.outbox_deliveries_total = Counter(
            "outbox_deliveries_total",
            "Attempts to deliver an outbox message, by kind and result",
            ["kind", "result"],
            registry=self.registry,
        )
        self.redis_errors_total = Counter(
            "redis_errors_total",
            "Redis calls that failed or took too long; the delivery went on without Redis",
            registry=self.registry,
        )
        self._show_zeros()

    def _show_zeros(self) -> None:
        """Creates the children with known labels: a counter that appears with its first event hides that rise."""
        self.idempotent_hits_total.labels(operation="webhook")
        self.audit_events_total.labels(action="payment.event")
        for outcome in DELIVERY_OUTCOMES:
            self.billing_webhook_deliveries_total.labels(outcome=outcome)
        for result in ALERT_RESULTS:
            self.alerts_sent_total.labels(result=result)

    def replay_blocked(self) -> None:
        """A delivery of an already processed event was answered from the stored answer."""
        self.billing_webhook_replay_block_total.inc()
        self.idempotent_hit("webhook")

    def idempotent_hit(self, operation: str) -> None:
        """A repeated request of `operation` got the first one's result."""
        self.idempotent_hits_total.labels(operation=operation).inc()

    def idempotent_stale_write(self, operation: str) -> None:
        """The holder of a lost lease tried to write its result, and was refused."""
        self.idempotency_stale_writes_total.labels(operation=operation).inc()

    def signature_refused(self, reason: str) -> None:
        """A delivery was refused; `reason` is a member of the verifier's closed list."""
        self.billing_webhook_invalid_sig_total.inc()
        self.billing_webhook_refused_total.labels(reason=reason).inc()

    def delivery_answered(self, outcome: str, duration_seconds: float) -> None:
        """A delivery was answered; `outcome` is success, ignored, parked, duplicate, refused, ..."""
        self.billing_webhook_deliveries_total.labels(outcome=outcome).inc()
        self.billing_webhook_duration_seconds.observe(duration_seconds)

    def entitlement_changed(self, plan: str, change: str) -> None:
        """A user's entitlements changed to `plan`; `change` is granted, changed or revoked."""
        self.entitlement_changes_total.labels(plan=plan, change=change).inc()

    def audit_written(self, action: str) -> None:
        """An audit row was committed."""
        self.audit_events_total.labels(action=action).inc()

    def alert_sent(self, result: str) -> None:
        """An owner alert ended as sent, failed, suppressed or dropped."""
        self.alerts_sent_total.labels(result=result).inc()

    def parked_events(self, count: int) -> None:
        """So many events wait for a missing piece at present."""
        self.billing_events_parked.set(count)

    def newest_event_age(self, age_seconds: float | None) -> None:
        """The newest event was received so many seconds ago; None before the first."""
        self.billing_seconds_since_last_event.set(-1 if age_seconds is None else age_seconds)

    def drift_found(self, kind: str, users: int) -> None:
        """The last reconcile run found so many users with this kind of difference."""
        self.billing_drift_users.labels(kind=kind).set(users)

    def outbox_settled(self, kind: str, result: str) -> None:
        """An attempt to deliver a message ended as delivered, failed (it will be tried again) or dead."""
        self.outbox_deliveries_total.labels(kind=kind, result=result).inc()

    def redis_failed(self) -> None:
        """A Redis call failed or took too long."""
        self.redis_errors_total.inc()

    def render(self) -> bytes:
        """The Prometheus text of all workers together, in METRICS_CONTENT_TYPE."""
        if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            merged = CollectorRegistry()
            MultiProcessCollector(merged)  # type: ignore[no-untyped-call]  # the library leaves it untyped
            return generate_latest(merged)
        return generate_latest(self.registry)


@functools.cache
def get_metrics() -> MetricsCollector:
    """The process's one collector: Prometheus counts per process, so this is the sanctioned global."""
    return MetricsCollector()
