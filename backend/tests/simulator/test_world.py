"""The simulated world itself: repeatable, real in its shapes, and rich enough to be worth a comparison."""

from __future__ import annotations

import json
import random
from collections import Counter

from click.testing import CliRunner

from backend.app.cli import main
from backend.app.main import SHIPPED_CATALOG
from backend.app.simulator.delivery import Network, route
from backend.app.simulator.truth import read_terms
from backend.app.simulator.world import START, Generation, History, Plan, live

PLAN = Plan(seed=5, start=START, days=150, terms=read_terms(SHIPPED_CATALOG.read_text("utf-8")))
HISTORIES = [live(PLAN, number) for number in range(150)]


def test_the_same_seed_gives_the_same_history_and_another_seed_another() -> None:
    assert live(PLAN, 3).events == HISTORIES[3].events
    other = Plan(seed=6, start=START, days=150, terms=PLAN.terms)
    assert live(other, 3).events != HISTORIES[3].events


def test_every_situation_that_matters_occurs() -> None:
    types = Counter(event["type"] for history in HISTORIES for event in history.events)
    assert {
        "checkout.session.completed",
        "checkout.session.async_payment_succeeded",
        "checkout.session.async_payment_failed",
        "customer.subscription.paused",
        "customer.subscription.resumed",
        "customer.subscription.pending_update_applied",
        "customer.deleted",
        "invoice.payment_failed",
        "refund.failed",
        "charge.dispute.closed",
    } <= set(types)
    statuses = {
        event["data"]["object"]["status"]
        for history in HISTORIES
        for event in history.events
        if event["type"].startswith("customer.subscription.")
    }
    assert statuses >= {
        "incomplete",
        "incomplete_expired",
        "trialing",
        "active",
        "past_due",
        "unpaid",
        "paused",
        "canceled",
    }


def test_updates_of_one_second_are_common_and_tell_what_was_before() -> None:
    crowded = 0
    for history in HISTORIES:
        updates = [event for event in history.events if event["type"] == "customer.subscription.updated"]
        assert all("previous_attributes" in event["data"] for event in updates)
        seconds = Counter((event["data"]["object"]["id"], event["created"]) for event in updates)
        crowded += sum(count > 1 for count in seconds.values())
    assert crowded > 10


def test_one_generation_alone_is_rendered_when_asked_for() -> None:
    def versions(generation: Generation) -> set[str]:
        plan = Plan(seed=5, start=START, days=60, terms=PLAN.terms, generation=generation)
        return {event["api_version"] for number in range(20) for event in live(plan, number).events}

    assert versions(Generation.BASIL) == {"2025-06-30.basil"}
    assert versions(Generation.BEFORE_BASIL) == {"2024-06-20"}
    assert len(versions(Generation.MIXED)) == 2


def longest() -> History:
    return max(HISTORIES, key=lambda history: len(history.events))


def test_the_network_loses_repeats_and_disorders_but_invents_nothing() -> None:
    events = longest().events
    quiet = route(events, Network(duplicates=0, disorder=0, delay=0), random.Random(1))
    assert (quiet.delivered, quiet.lost) == (events, ())

    rough = route(events, Network(duplicates=0.5, disorder=0.5, delay=0.5, loss=0.3), random.Random(1))
    ids = [event["id"] for event in rough.delivered]
    assert len(ids) > len(set(ids))
    assert rough.lost
    assert set(ids) | {event["id"] for event in rough.lost} == {event["id"] for event in events}
    first = list(dict.fromkeys(ids))
    assert first != [event["id"] for event in events if event["id"] in set(ids)]


def test_the_command_reports_equality_as_text_and_as_json_with_its_seed() -> None:
    arguments = ["simulate", "--users", "5", "--days", "90", "--seed", "12"]
    text = CliRunner().invoke(main, arguments, env={"STRIPE_WEBHOOK_SECRET": "whsec_not_used_here_00000"})
    assert (text.exit_code, "seed 12: 5 users" in text.output) == (0, True), text.output
    answer = CliRunner().invoke(main, [*arguments, "--json"])
    document = json.loads(answer.stdout)
    assert (answer.exit_code, document["seed"], document["equal"], document["differences"]) == (
        0,
        12,
        True,
        [],
    )


def test_the_command_refuses_an_address_without_a_key() -> None:
    answer = CliRunner().invoke(main, ["simulate", "--url", "http://127.0.0.1:1", "--secret", "whsec_x"])
    assert (answer.exit_code, "--key" in answer.output) == (2, True)
