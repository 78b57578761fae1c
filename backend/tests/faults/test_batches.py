"""Deliveries that share a transaction end as if each had come alone."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from datetime import timedelta
from typing import Any

import pytest
from structlog.testing import capture_logs

from backend.app.billing import asserted
from backend.app.billing.providers.stripe import translate
from backend.app.billing.providers.stripe_event import StripeEvent
from backend.app.billing.rebuild import Rebuild
from backend.app.core.clock import from_unix
from backend.app.main import SHIPPED_CATALOG
from backend.app.simulator.delivery import Network
from backend.app.simulator.replay import compare, said
from backend.app.simulator.runner import route_of
from backend.app.simulator.truth import read_terms
from backend.app.simulator.world import START, Plan, live
from backend.tests.faults import events
from backend.tests.support.billing import Harness, statements

USERS = 12
ROUGH = Network(duplicates=0.3, disorder=0.4, delay=0.1, loss=0.0)


async def test_whole_lives_delivered_at_once_end_as_the_truth_and_the_replay_say(service: Harness) -> None:
    plan = Plan(seed=41, start=START, days=90, terms=read_terms(SHIPPED_CATALOG.read_text("utf-8")))
    deliveries = [event for number in range(USERS) for event in route_of(plan, number, ROUGH).delivered]
    random.Random(41).shuffle(deliveries)
    with statements(service) as seen:
        answers = await asyncio.gather(*(service.deliver(event) for event in deliveries))
    assert {answer.status_code for answer in answers} == {200}
    claims = sum("INSERT INTO webhook_claims" in statement for statement in seen)
    assert claims * 8 < len(deliveries), "they must have shared transactions"

    by_event: dict[str, set[bytes]] = {}
    for event, answer in zip(deliveries, answers, strict=True):
        by_event.setdefault(event["id"], set()).add(answer.content)
    assert {len(bodies) for bodies in by_event.values()} == {1}
    replayed = sum("idempotent-replayed" in answer.headers for answer in answers)
    assert replayed == len(deliveries) - len(by_event)
    assert await service.count("webhook_events") == len(by_event) > 200

    for number in range(USERS):
        history = live(plan, number)
        view = await service.service.entitlements.view(history.user_id, at=from_unix(history.end))
        assert compare(history, history.end, said(view.entitlement), what="view") == []
    report = await Rebuild(
        service.service.database, service.service.catalog, clock=service.clock, livemode=False
    ).check()
    assert (report.events, report.differences) == (len(by_event), [])


async def test_a_bad_event_fails_alone_and_is_applied_once_it_can_be(
    service: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    purchases = [events.purchase(f"batch{number:02d}", user_id=f"user_{number:02d}") for number in range(40)]
    bad = {json.loads(body)["id"] for body in purchases[::10]}

    def broken(event: StripeEvent) -> Any:
        if event.envelope.id in bad:
            raise RuntimeError("a bug that only this event meets")
        return translate(event)

    with monkeypatch.context() as patch, capture_logs() as logs:
        patch.setattr(asserted, "translate", broken)
        answers = await asyncio.gather(*(service.deliver(body) for body in purchases))
    assert Counter(answer.status_code for answer in answers) == {200: 36, 500: 4}
    assert await service.count("payment_events") == await service.count("user_entitlements") == 36
    assert [entry["event"] for entry in logs].count("webhook_failed") == len(bad)
    failed = await service.rows("SELECT event_id FROM webhook_events WHERE status = 'failed'")
    assert {row["event_id"] for row in failed} == bad
    again = await asyncio.gather(*(service.deliver(body) for body in purchases))
    assert {answer.status_code for answer in again} == {200}
    assert await service.count("payment_events") == await service.count("user_entitlements") == 40


async def test_an_event_that_tells_no_time_has_one_row_however_often_it_failed(
    service: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made by hand: each delivery stands for another time, and rows are kept by months of it."""
    body = json.loads(events.purchase("undated", user_id="ann"))
    del body["created"]

    def broken(_event: StripeEvent) -> Any:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(asserted, "translate", broken)
        for _ in range(2):
            assert (await service.deliver(body)).status_code == 500
            service.clock.instant += timedelta(days=40)
    [row] = await service.rows("SELECT status, attempts FROM webhook_events")
    assert (row["status"], row["attempts"]) == ("failed", 2)
    assert (await service.deliver(body)).json()["status"] == "success"
    [row] = await service.rows("SELECT status, attempts FROM webhook_events")
    assert (row["status"], row["attempts"]) == ("success", 3)
    assert (await service.deliver(body)).headers["Idempotent-Replayed"] == "true"


async def test_the_number_of_statements_does_not_grow_with_the_batch(service: Harness) -> None:
    async def sent(first: int, last: int) -> tuple[int, int]:
        """How many transactions these purchases took, and how many statements."""
        bodies = [
            events.purchase(f"many{number:03d}", user_id=f"user_{number:03d}")
            for number in range(first, last)
        ]
        with statements(service) as seen:
            answers = await asyncio.gather(*(service.deliver(body) for body in bodies))
        assert {answer.status_code for answer in answers} == {200}
        return sum("INSERT INTO webhook_claims" in statement for statement in seen), len(seen)

    await sent(0, 2)
    transactions, one = await sent(10, 11)
    assert transactions == 1
    transactions, many = await sent(100, 200)
    assert transactions < 10
    assert many == transactions * one
