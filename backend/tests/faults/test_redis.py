"""Redis stopped, hanging or emptied changes neither what is done nor what is answered, and hardly how fast."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import pytest

from backend.app import main
from backend.app.billing import security
from backend.tests.faults import events
from backend.tests.faults.ledger import assert_processed_once, open_ledger
from backend.tests.faults.report import report
from backend.tests.support.billing import Harness, running_service
from backend.tests.support.servers import ValkeyServer
from backend.tests.support.statements import watched_statements

DELIVERIES = 120
FAULT_AT, REPAIR_AT = 30, 90
# The most that a delivery may take longer on Redis's account.
ADDED_SECONDS_MAX = 0.05
# How many of 120 pairs may be slower by chance, beyond those that are as much faster.
NOISE_MAX = 6
# One for each pause of five seconds that the deliveries last, on a machine that is slow.
FAILED_CALLS_MAX = 5

FAULTS: dict[str, Callable[[ValkeyServer], None]] = {
    "stopped": ValkeyServer.stop,
    "hanging": ValkeyServer.pause,
    "flushed": ValkeyServer.flush,
}


async def timed(harness: Harness, event: bytes) -> tuple[float, bytes, bool]:
    started = time.perf_counter()
    response = await harness.deliver(event)
    assert response.status_code == 200, response.text
    return time.perf_counter() - started, response.content, "idempotent-replayed" in response.headers


@pytest.mark.parametrize("fault", FAULTS)
async def test_redis_failing_while_deliveries_run_costs_little_time_and_no_correctness(
    migrated_url: str, redis_url: str, valkey_server: ValkeyServer, fault: str
) -> None:
    """Every second delivery is an exact replay; a like stream goes in turn to a service without Redis."""
    answers: list[bytes] = []
    with_redis: list[float] = []
    without: list[float] = []
    async with (
        running_service(migrated_url, redis_url=redis_url) as harness,
        running_service(migrated_url) as plain,
    ):
        errors_before = await harness.metric("redis_errors_total")
        for number in range(DELIVERIES):
            if number == FAULT_AT:
                FAULTS[fault](valkey_server)
            if number == REPAIR_AT:
                if not valkey_server.running:
                    valkey_server.restart()
                valkey_server.resume()
            name = f"{number // 2:03d}"
            seconds, body, replayed = await timed(
                harness, events.purchase(f"redis{name}", user_id="user_redis")
            )
            with_redis.append(seconds)
            answers.append(body)
            assert replayed == (number % 2 == 1)
            without.append((await timed(plain, events.purchase(f"plain{name}", user_id="user_plain")))[0])
        errors = await harness.metric("redis_errors_total") - errors_before
    assert answers[::2] == answers[1::2]
    numbers = range(DELIVERIES // 2)
    async with open_ledger(migrated_url) as ledger:
        await assert_processed_once(
            ledger, {f"evt_{name}{number:03d}" for number in numbers for name in ("redis", "plain")}
        )
    added = [mine - other for mine, other in zip(with_redis, without, strict=True)]
    # A busy machine slows either of a pair alike; only what is beyond that is on Redis's account.
    slow, noise = (sum(sign * seconds > ADDED_SECONDS_MAX for seconds in added) for sign in (1, -1))
    report(
        f"Redis {fault}: {errors:.0f} failed calls; added median {median(added) * 1000:.1f} ms,"
        f" max {max(added) * 1000:.1f}; {slow} of {DELIVERIES} over 50 ms slower, {noise} over 50 ms faster"
    )
    assert median(added) <= ADDED_SECONDS_MAX / 5
    assert slow <= noise + NOISE_MAX
    # An outage is noticed, then Redis is left alone: not one failed call for each delivery.
    assert errors <= FAILED_CALLS_MAX
    assert errors > 0 or fault == "flushed"


async def test_an_exact_replay_is_answered_from_redis_without_the_database_and_counted_the_same(
    migrated_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine 25 ms may pass without any fault of Redis's, and the database would answer.
    for module in (security, main):
        monkeypatch.setattr(module, "REDIS_CALL_SECONDS_MAX", 5)
    event = events.purchase("remembered", user_id="user_redis")
    statements: list[str] = []
    async with running_service(migrated_url, redis_url=redis_url) as harness:
        await harness.service.relay.stop()
        first = await harness.deliver(event)
        counters = ("billing_webhook_replay_block_total", "idempotent_hits_total")
        before = [await harness.metric(name) for name in counters]

        with watched_statements(
            harness.service.database, before=lambda statement, _parameters: statements.append(statement)
        ):
            replay = await harness.deliver(event)
            assert statements == []
            harness.clock.advance(seconds=1)
            retry = await harness.deliver(event)
            assert statements, "another signature is not known to Redis: the database answers"
        after = [await harness.metric(name) for name in counters]
    assert first.content == replay.content == retry.content
    assert "idempotent-replayed" not in first.headers
    assert replay.headers["idempotent-replayed"] == retry.headers["idempotent-replayed"] == "true"
    assert [value - earlier for value, earlier in zip(after, before, strict=True)] == [2, 2]
