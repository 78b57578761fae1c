"""However many deliveries of one event, or events of one user, arrive at once: each event has its effect once."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from backend.tests.faults import events
from backend.tests.faults.ledger import (
    EFFECT_TABLES,
    assert_history_is_gapless,
    count,
    counts,
    open_ledger,
    state_of,
)
from backend.tests.faults.processes import servers
from backend.tests.faults.report import report
from backend.tests.support.billing import running_service
from backend.tests.support.load import metric, send_all
from backend.tests.support.servers import PostgresServer

DELIVERIES = 1_000
CONNECTIONS = 50
# Of 200 deliveries that all wait for one user; none on an idle machine.
BUSY_MAX = 10


@pytest.mark.parametrize(("processes", "workers"), [(2, 1), (1, 2)], ids=["two processes", "two workers"])
async def test_a_thousand_deliveries_of_one_event_at_once_have_one_effect(
    migrated_url: str, tmp_path: Path, processes: int, workers: int
) -> None:
    event = events.purchase("same", user_id="user_same")
    with servers(tmp_path, migrated_url, processes=processes, workers=workers) as running:
        ports = [service.port for service in running]
        found = await send_all(ports, [event] * DELIVERIES, connections=CONNECTIONS)
        blocked = await metric(ports, "billing_webhook_replay_block_total")
        hits = await metric(ports, "idempotent_hits_total", operation="webhook")
        changes = await metric(ports, "entitlement_changes_total", plan="premium", change="granted")
    replies = [reply for reply in found if reply is not None]
    slowest = max(reply.seconds for reply in replies)
    report(f"delivered one event {len(replies)} times to {processes} x {workers}; slowest {slowest:.3f} s")
    assert Counter(reply.status for reply in replies) == {200: DELIVERIES}
    assert len({reply.body for reply in replies}) == 1
    assert Counter(reply.headers.get("idempotent-replayed") for reply in replies) == {
        "true": DELIVERIES - 1,
        None: 1,
    }
    assert (blocked, hits, changes) == (DELIVERIES - 1, DELIVERIES - 1, 1)
    async with open_ledger(migrated_url) as ledger:
        rows = await counts(ledger)
        assert {table: rows[table] for table in EFFECT_TABLES} == dict.fromkeys(EFFECT_TABLES, 1)
        actions = await ledger.rows("SELECT action FROM audit_logs ORDER BY action")
        assert [row["action"] for row in actions] == ["entitlement.granted", "payment.event"]


def events_of_one_user() -> list[bytes]:
    """200 events of one customer: purchases, subscriptions with different ends, invoices and charges."""
    customer, user_id = "cus_busy", "user_busy"
    found = []
    for number in range(50):
        tag = f"busy{number:03d}"
        subscription_id = f"sub_{tag}"
        end = events.PERIOD_END + (number * 37 % 50) * 86_400
        content = json.loads(
            events.subscription(
                f"{tag}_s",
                subscription_id=subscription_id,
                customer=customer,
                user_id=user_id,
                price="enterprise",
            )
        )
        content["data"]["object"]["items"]["data"][0]["current_period_end"] = end
        plan = ("premium", "vip")[number % 2]
        found += [
            events.wire(content),
            events.purchase(f"{tag}_p", user_id=user_id, plan_code=plan, customer=customer),
            events.invoice(f"{tag}_i", subscription_id=subscription_id, customer=customer),
            events.charge(f"{tag}_c", customer=customer),
        ]
    return found


async def test_two_hundred_events_of_one_user_at_once_end_like_one_after_the_other(
    migrated_url: str, migrated_sqlite_template: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    sent = events_of_one_user()
    with servers(tmp_path, migrated_url, processes=2) as running:
        ports = [service.port for service in running]
        found = await send_all(ports, sent, connections=CONNECTIONS)
        answers = Counter(reply.status if reply else None for reply in found)
        report(f"200 events of one user over {CONNECTIONS} connections: {dict(answers)}")
        # They wait for each other, and on a busy machine some for longer than they may: those come again.
        assert set(answers) <= {200, 503}
        assert answers[503] <= BUSY_MAX
        late = [
            event for event, reply in zip(sent, found, strict=True) if reply is None or reply.status != 200
        ]
        again = await send_all(ports, late, connections=1)
        assert {reply.status if reply else None for reply in again} <= {200}
    if migrated_url.startswith("postgresql"):
        postgres: PostgresServer = request.getfixturevalue("postgres_server")
        name = migrated_url.rsplit("/", 1)[1]
        rows = postgres.execute("SELECT deadlocks FROM pg_stat_database WHERE datname = $1", name)
        assert rows[0]["deadlocks"] == 0
        assert "deadlock detected" not in postgres.log_path.read_text(encoding="utf-8", errors="replace")

    async with open_ledger(migrated_url) as ledger:
        await assert_history_is_gapless(ledger)
        history = await ledger.rows("SELECT * FROM entitlement_history ORDER BY version")
        assert await count(ledger, "webhook_events", "status = 'success'") == len(sent)
        parallel = await state_of(ledger, "busy")

    # Every event only adds access, so one that changed nothing changes nothing later either: applying the
    # changers in their order, then the rest, is the sequence that the parallel run must have been equal to.
    changers = [row["cause_event_id"] for row in history]
    by_id = {json.loads(body)["id"]: body for body in sent}
    order = [*changers, *(event_id for event_id in by_id if event_id not in changers)]
    sequential_file = tmp_path / "sequential.db"
    shutil.copyfile(migrated_sqlite_template, sequential_file)
    sequential_url = f"sqlite:///{sequential_file}"
    async with running_service(sequential_url) as harness, open_ledger(sequential_url) as ledger:
        for event_id in order:
            assert (await harness.deliver(by_id[event_id])).status_code == 200
        sequential_history = await ledger.rows("SELECT * FROM entitlement_history ORDER BY version")
        sequential = await state_of(ledger, "busy")
    report(f"200 events of one user, {len(history)} versions")
    told = ("version", "change", "plan_code", "status", "cause_event_id")
    assert [[row[name] for name in told] for row in history] == [
        [row[name] for name in told] for row in sequential_history
    ]
    assert len(history) > 2, "the events must compete"
    for table in ("payment_events", "facts", "sources", "customer_ties"):
        assert len(parallel[table]) == len(sequential[table]), table
