"""Simulated users against a real service: the API, the ledger and `at=` agree with the truth on both databases."""

from __future__ import annotations

import random

from backend.app.core.api_keys import Scope
from backend.app.core.clock import from_unix
from backend.app.main import SHIPPED_CATALOG
from backend.app.simulator.delivery import Network
from backend.app.simulator.emit import Money
from backend.app.simulator.replay import compare, instants, ledger_differences, said
from backend.app.simulator.runner import Target, explained, run_against
from backend.app.simulator.truth import read_terms
from backend.app.simulator.world import START, Plan, live
from backend.tests.support.billing import WEBHOOK_SECRET, Harness

# About three hundred events in four hundred deliveries.
USERS = 8
ROUGH = Network(duplicates=0.3, disorder=0.4, delay=0.1, loss=0.05)


async def test_a_running_service_agrees_about_every_user_at_any_instant_and_about_the_money(
    service: Harness,
) -> None:
    plan = Plan(seed=7, start=START, days=150, terms=read_terms(SHIPPED_CATALOG.read_text("utf-8")))
    target = Target(
        client=service.client,
        secret=WEBHOOK_SECRET,
        api_key=await service.service.api_keys.create("simulate", Scope.READ),
        clock=service.clock,
    )
    report = await run_against(plan, USERS, ROUGH, target, lambda *_: None)
    assert not report.differences, "\n".join(explained(report.differences, plan, USERS))
    assert report.deliveries > report.events > 200

    lines = {
        row["effect_key"]: Money(row["amount"], bool(row["settled"]))
        for row in await service.rows("SELECT effect_key, amount, settled FROM payment_events")
    }
    histories = [live(plan, number) for number in range(USERS)]
    expected = {key for history in histories for key in history.ledger}
    assert set(lines) == expected
    for history in histories:
        assert ledger_differences(history, {key: lines[key] for key in history.ledger}) == []
        dice = random.Random(history.number)
        for at in dice.sample(instants(history, dice), 5):
            view = await service.service.entitlements.view(history.user_id, at=from_unix(at))
            assert compare(history, at, said(view.entitlement), what="view") == []
