"""A thousand instants in simulated lives: what the service says was in force, and why, is what the simulator knows."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from backend.app.core.api_keys import Scope
from backend.app.core.clock import from_unix, iso
from backend.app.main import SHIPPED_CATALOG
from backend.app.simulator.delivery import Network
from backend.app.simulator.objects import Json
from backend.app.simulator.replay import compare
from backend.app.simulator.runner import Target, deliver, route_of
from backend.app.simulator.truth import (
    Cause,
    Entitled,
    PurchaseState,
    Right,
    Standing,
    SubscriptionState,
    read_terms,
)
from backend.app.simulator.world import START, History, Plan, live
from backend.tests.support.billing import WEBHOOK_SECRET, Harness, running_service

ROUGH = Network(duplicates=0.3, disorder=0.4, delay=0.1, loss=0.05)
SEED = 11
# About seven hundred deliveries.
USERS = 16
QUESTIONS = 1_000
# PostgreSQL answers from the same functions; a quarter shows that it stores and reads the same.
POSTGRES_USERS, POSTGRES_QUESTIONS = 6, 250
# The service's name for each cause, where the kind of source does not matter.
RULES: Mapping[Cause, str] = {
    Cause.PAID_PERIOD: "subscription.active",
    Cause.TRIAL: "subscription.trialing",
    Cause.GRACE: "subscription.past_due.grace",
    Cause.PLANNED_END: "subscription.cancel_at",
    Cause.AWAITING_PAYMENT: "checkout.awaiting_payment",
    Cause.PAYMENT_FAILED: "checkout.failed",
    Cause.EXPIRED: "checkout.expired",
    Cause.REFUNDED: "refund.full",
    Cause.DISPUTE_OPEN: "dispute.open",
    Cause.DISPUTE_LOST: "dispute.lost",
    Cause.CUSTOMER_GONE: "customer.deleted",
}
BOUGHT = {"cs": "checkout.paid", "in": "invoice.manual_paid", "pi": "payment_intent.paid"}
OBJECTS = {"sub": "subscription", "cs": "checkout session", "in": "invoice", "pi": "payment"}
# The kinds of events that can be the word behind a rule, by how their type begins.
WITNESSES = {
    "subscription.": ("customer.subscription.",),
    "checkout.": ("checkout.session.",),
    "invoice.": ("invoice.",),
    "payment_intent.": ("payment_intent.",),
    "refund.": ("refund.", "charge.refund"),
    "dispute.": ("charge.dispute.",),
    "customer.": ("customer.deleted",),
}


@dataclass(frozen=True, slots=True)
class Question:
    """Who had what at an instant, in unix seconds."""

    history: History
    at: int


def questions(histories: list[History], count: int) -> list[Question]:
    """So many pairs of a user and an instant: half around what happened or ran out, half anywhere."""
    dice = random.Random(SEED)
    around = [
        Question(history, at)
        for history in histories
        for edge in sorted(edges(history))
        for at in (edge - 1, edge, edge + 1)
        if history.start <= at <= history.end
    ]
    chosen = dice.sample(around, count // 2)
    while len(chosen) < count:
        history = dice.choice(histories)
        chosen.append(Question(history, dice.randint(history.start, history.end)))
    return chosen


def edges(history: History) -> set[int]:
    """When something happened to a user, and when something ran out by itself."""
    found = {record.at for record in history.truth.causes(history.end)}
    ends = {
        right.ends_at
        for at in found
        for standing in history.truth.standings(at).values()
        for right in (*standing.rights, *standing.ended)
    }
    return found | {end for end in ends if end is not None}


@dataclass(frozen=True, slots=True)
class Witness:
    """The events of one user as the simulator sent them, and what it knows about them."""

    history: History
    events: Mapping[str, Json]

    def require_about(self, event_id: str, source: str, rule: str, at: int) -> None:
        """Fails unless an event had occurred, is of a kind that can bring a rule about, and is about the source."""
        event = self.events[event_id]
        assert event["created"] <= at
        kinds = next(kinds for prefix, kinds in WITNESSES.items() if rule.startswith(prefix))
        assert event["type"].startswith(kinds), (event["type"], rule)
        content = event["data"]["object"]
        if rule == "customer.deleted":
            assert content["id"] == self.history.user_id.replace("sim-", "cus_s").replace("-", "u")
        elif rule.startswith(("dispute.", "refund.")):
            # The simulator wrote down which source the dispute or refund was about.
            causes = [record.cause for record in self.history.truth.records[source] if record.at <= at]
            assert any(content["id"] in cause for cause in causes), (content["id"], causes)
        else:
            assert content["id"] == source.partition(":")[2]

    def newest_snapshot_at(self, subscription_id: str, at: int) -> int:
        """The second of the newest event that shows a subscription."""
        return max(
            int(event["created"])
            for event in self.events.values()
            if event["created"] <= at
            and event["type"].startswith("customer.subscription.")
            and event["data"]["object"]["id"] == subscription_id
        )


def rules_of(rights: Iterable[Right]) -> set[str]:
    """What the service may call the causes of rights."""
    return {
        BOUGHT[right.source.partition(":")[0]] if cause is Cause.BOUGHT else RULES[cause]
        for right in rights
        for cause in right.causes
    }


def refusals_of(standing: Standing) -> set[str]:
    """What the service may call the causes for which a source gives nothing."""
    if standing.causes == {Cause.RAN_OUT}:
        newest = max(right.ends_at or 0 for right in standing.ended)
        return rules_of(right for right in standing.ended if right.ends_at == newest)
    return {
        f"subscription.{standing.state.status}"
        if cause is Cause.STATUS and isinstance(standing.state, SubscriptionState)
        else RULES[cause]
        for cause in standing.causes
    }


def until(end: int | None) -> str | None:
    """An end as the API tells it."""
    return None if end is None else iso(from_unix(end))


def require_features(witness: Witness, explanation: dict[str, Any], at: int) -> None:
    """Each feature names exactly the sources that give it, and of each other source why it does not."""
    truth = witness.history.truth
    standings = truth.standings(at)
    for feature in explanation["features"]:
        givers = truth.givers(feature["feature"], at)
        assert sorted(
            (giver["source"], giver["plan_code"], str(giver["ends_at"])) for giver in feature["given_by"]
        ) == sorted((right.source, right.plan, str(until(right.ends_at))) for right in givers)
        for giver in feature["given_by"]:
            source = giver["source"]
            assert giver["rule"] in rules_of(
                right
                for right in givers
                if (right.source, until(right.ends_at)) == (source, giver["ends_at"])
            )
            require_object(giver)
            witness.require_about(giver["event_id"], source, giver["rule"], at)
            if source.startswith("sub:"):
                told_at = witness.events[giver["event_id"]]["created"]
                assert told_at == witness.newest_snapshot_at(giver["object_id"], at)
        lasting = max((right.ends_at or float("inf") for right in givers), default=0)
        longest = [right for right in givers if (right.ends_at or float("inf")) == lasting]
        assert feature["reason"] in (rules_of(longest) or {"default_plan"})
        withheld = {entry["source"]: entry for entry in feature["not_given_by"]}
        assert set(withheld) == set(standings) - {right.source for right in givers}
        for source, entry in withheld.items():
            require_withheld(witness, standings[source], entry, at, is_given=bool(givers))


def require_withheld(
    witness: Witness, standing: Standing, entry: dict[str, Any], at: int, *, is_given: bool
) -> None:
    """A source that does not give a feature says so for the reason that the simulator knows."""
    require_object(entry)
    if standing.rights:
        assert entry["why"] == ("outdone" if is_given else "no_more")
        assert entry["rule"] in rules_of(standing.rights)
    elif standing.causes == {Cause.RAN_OUT}:
        assert entry["why"] == "ran_out"
        assert entry["rule"] in refusals_of(standing)
        assert entry["since"] == until(max(right.ends_at or 0 for right in standing.ended))
    else:
        assert entry["why"] == "refused"
        assert entry["rule"] in refusals_of(standing)
    witness.require_about(entry["event_id"], entry["source"], entry["rule"], at)


def require_object(entry: dict[str, Any]) -> None:
    """Stripe's object is named as people know it."""
    kind, _, object_id = entry["source"].partition(":")
    assert (entry["object"], entry["object_id"]) == (OBJECTS[kind], object_id)


def require_sources(witness: Witness, explanation: dict[str, Any], at: int) -> None:
    """Every source that had been heard of is told, with events, money and audit rows that had been there by then."""
    standings = witness.history.truth.standings(at)
    assert {source["source"] for source in explanation["sources"]} == set(standings)
    for source in explanation["sources"]:
        standing = standings[source["source"]]
        require_object(source)
        assert source["counts"] is bool(standing.rights)
        if standing.rights:
            assert source["rule"] in rules_of((*standing.rights, *standing.ended))
        else:
            assert source["rule"] in refusals_of(standing) | rules_of(standing.ended)
        told = [witness.events[event["event_id"]] for event in source["events"]]
        assert all(event["created"] <= at for event in told)
        assert any(event["data"]["object"]["id"] == source["object_id"] for event in told)
        lines = source["payments"]
        assert all(witness.events[line["event_id"]]["created"] <= at for line in lines)
        state = standing.state
        if isinstance(state, PurchaseState) and state.paid_at is not None:
            assert state.amount in [line["amount"] for line in lines if line["settled"]]
        # Every line of the ledger has its audit row.
        assert [row["action"] for row in source["audit"]].count("payment.event") >= len(lines)


def entitled(document: dict[str, Any]) -> Entitled:
    """The API's answer in the truth's own words."""
    end = document["valid_until"]
    return Entitled(
        plan=document["plan_code"],
        status=document["status"],
        features=document["entitlements"],
        valid_until=None if end is None else round(datetime.fromisoformat(end).timestamp()),
    )


async def require_right_at_every_question(harness: Harness, users: int, count: int) -> None:
    """Lives simulated lives against a service, then asks and compares."""
    plan = Plan(seed=SEED, start=START, days=150, terms=read_terms(SHIPPED_CATALOG.read_text("utf-8")))
    target = Target(
        client=harness.client,
        secret=WEBHOOK_SECRET,
        api_key=await harness.service.api_keys.create("simulate", Scope.READ),
        clock=harness.clock,
    )
    histories = [live(plan, number) for number in range(users)]
    for number in range(users):
        route = route_of(plan, number, ROUGH)
        assert await deliver(target, (*route.delivered, *route.lost), lambda *_: None) == []
    asked = questions(histories, count)
    assert len(asked) == count
    causes: set[Cause] = set()
    for question in asked:
        history, at = question.history, question.at
        response = await harness.client.get(
            f"/api/v1/entitlements/{history.user_id}",
            params={"at": iso(from_unix(at)), "explain": "true"},
            headers={"Authorization": f"Bearer {target.api_key}"},
        )
        assert response.status_code == 200, response.text
        document = response.json()
        explanation = document.pop("explanation")
        assert compare(history, at, entitled(document), what="entitlement") == []
        witness = Witness(history, {event["id"]: event for event in history.events})
        context = f"{history.user_id} at {at} ({iso(from_unix(at))}), seed {SEED}"
        try:
            require_features(witness, explanation, at)
            require_sources(witness, explanation, at)
        except AssertionError as error:
            error.add_note(context)
            raise
        for standing in history.truth.standings(at).values():
            causes |= standing.causes.union(*(right.causes for right in standing.rights))
    # Questions that meet only a few causes would show little; only the rarest may be missed by a small sample.
    assert len(set(Cause) - causes) <= 3, sorted(set(Cause) - causes)


async def test_what_was_in_force_and_why_is_right_at_a_thousand_instants(sqlite_service: Harness) -> None:
    await require_right_at_every_question(sqlite_service, USERS, QUESTIONS)


async def test_it_is_right_on_postgresql_too(migrated_postgres_url: str) -> None:
    async with running_service(migrated_postgres_url) as harness:
        await require_right_at_every_question(harness, POSTGRES_USERS, POSTGRES_QUESTIONS)
