"""Why a user may do what they may: the answer with explain=true, and `tollkeeper explain`."""

from __future__ import annotations

import ast
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from click.testing import CliRunner, Result

from backend.app.billing.domain.access import Access, Reading
from backend.app.billing.domain.catalog import parse_catalog
from backend.app.billing.domain.facts import SubjectId
from backend.app.billing.domain.merge import entitlement_of
from backend.app.billing.domain.state import Owned, State
from backend.app.billing.entitlements import Evidence, View
from backend.app.billing.explain import (
    NEXT_CHANGES_MAX,
    RULES,
    WHY_TEXTS,
    explain,
    explanation_text,
)
from backend.app.cli import main
from backend.app.core.api_keys import Scope
from backend.app.core.clock import iso
from backend.app.main import SHIPPED_CATALOG
from backend.app.simulator import objects
from backend.app.simulator.objects import DAY_SECONDS, MONTH_SECONDS
from backend.tests.docs.repository import APP, ROOT
from backend.tests.support.billing import Harness


def instant(unix: int) -> datetime:
    return datetime.fromtimestamp(unix, UTC)


async def deliver(harness: Harness, *events: dict[str, Any]) -> None:
    for event in events:
        response = await harness.deliver(event)
        assert response.json()["status"] == "success", response.text


async def subscribe(
    harness: Harness, *, user: str = "usr_1", price: str = "vip_monthly", number: int = 1, **rest: Any
) -> int:
    """A paid subscription that began five days ago; the second in which it began."""
    start = int(harness.clock.now().timestamp()) - 5 * DAY_SECONDS
    subscription = objects.subscription(
        f"sub_{number}",
        customer=f"cus_{user}",
        prices=[objects.price(price)],
        period_start=start,
        period_end=start + MONTH_SECONDS,
        metadata={"user_id": user},
        **rest,
    )
    invoice = objects.invoice(
        f"in_{number}",
        customer=f"cus_{user}",
        subscription_id=f"sub_{number}",
        line_price=objects.price(price),
        billing_reason="subscription_create",
        period_start=start,
        period_end=start + MONTH_SECONDS,
    )
    await deliver(
        harness,
        objects.event(f"evt_sub_{number}", "customer.subscription.created", subscription, created=start),
        objects.event(f"evt_in_{number}", "invoice.paid", invoice, created=start + 1),
    )
    return start


async def buy(harness: Harness, *, plan_code: str = "premium", days_ago: int = 3) -> None:
    """A one-time purchase of usr_1."""
    now = int(harness.clock.now().timestamp()) - days_ago * DAY_SECONDS
    session = objects.checkout_session(
        "cs_1",
        client_reference_id="usr_1",
        payment_intent="pi_1",
        metadata={"plan_code": plan_code},
        created=now,
    )
    await deliver(harness, objects.event("evt_cs", "checkout.session.completed", session, created=now))


async def ask(harness: Harness, user: str = "usr_1", **parameters: str) -> dict[str, Any]:
    """The API's answer with its explanation."""
    key = await harness.service.api_keys.create("test", Scope.READ)
    response = await harness.client.get(
        f"/api/v1/entitlements/{user}",
        params={"explain": "true", **parameters},
        headers={"Authorization": f"Bearer {key}"},
    )
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    return document


def by_feature(explanation: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["feature"]: entry for entry in explanation["features"]}


async def test_a_feature_is_traced_to_its_rule_object_events_payments_and_audit_rows(
    service: Harness,
) -> None:
    start = await subscribe(service)
    document = await ask(service)
    explanation = document["explanation"]
    copy_trading = by_feature(explanation)["copy_trading"]
    assert (copy_trading["value"], copy_trading["granted"]) == (True, True)
    assert copy_trading["reason"] == "subscription.active"
    assert copy_trading["text"] == RULES["subscription.active"]
    [giver] = copy_trading["given_by"]
    assert (giver["source"], giver["plan_code"], giver["event_id"]) == ("sub:sub_1", "vip", "evt_sub_1")
    assert giver["ends_at"] == document["valid_until"]

    [source] = explanation["sources"]
    assert (source["object"], source["object_id"], source["customer_id"]) == (
        "subscription",
        "sub_1",
        "cus_usr_1",
    )
    assert (source["counts"], source["status"]) == (True, "active")
    assert [(event["event_id"], event["says"], event["occurred_at"]) for event in source["events"]] == [
        ("evt_sub_1", "active", iso(instant(start))),
        ("evt_in_1", "paid, 2999", iso(instant(start + 1))),
    ]
    lines = await service.rows("SELECT id FROM payment_events")
    assert {payment["id"] for payment in source["payments"]} == {line["id"] for line in lines}
    [paid] = [payment for payment in source["payments"] if payment["settled"]]
    assert (paid["event_id"], paid["event_type"], paid["amount"], paid["currency"]) == (
        "evt_in_1",
        "invoice_paid",
        2999,
        "usd",
    )
    rows = await service.rows("SELECT id, action FROM audit_logs")
    assert {(row["id"], row["action"]) for row in source["audit"]} == {
        (row["id"], row["action"]) for row in rows
    }
    assert {row["action"] for row in rows} == {"entitlement.granted", "payment.event"}


async def test_every_feature_is_explained_also_those_that_are_not_granted(sqlite_service: Harness) -> None:
    await buy(sqlite_service)
    explanation = (await ask(sqlite_service))["explanation"]
    features = by_feature(explanation)
    assert list(features) == list(sqlite_service.service.catalog.features)
    for key in ("dedicated_support", "copy_trading"):
        assert (features[key]["value"], features[key]["granted"]) == (False, False)
        assert (features[key]["reason"], features[key]["given_by"]) == ("default_plan", [])
    assert features["max_devices"]["given_by"][0]["source"] == "cs:cs_1"


async def test_of_several_sources_each_feature_names_those_that_give_its_value(
    sqlite_service: Harness,
) -> None:
    await buy(sqlite_service, plan_code="premium")
    await subscribe(sqlite_service, price="vip_monthly")
    explanation = (await ask(sqlite_service))["explanation"]
    givers = [giver["source"] for giver in by_feature(explanation)["max_devices"]["given_by"]]
    assert givers == ["sub:sub_1"]
    assert [(source["source"], source["counts"]) for source in explanation["sources"]] == [
        ("cs:cs_1", True),
        ("sub:sub_1", True),
    ]


async def test_what_changes_next_is_said_with_its_date_and_cause(service: Harness) -> None:
    """A purchase for ever stays beneath a subscription that is cancelled to a date."""
    await buy(service, plan_code="premium")
    ends = int(service.clock.now().timestamp()) + 7 * DAY_SECONDS
    await subscribe(service, price="vip_monthly", cancel_at=ends)
    document = await ask(service)
    assert document["valid_until"] == iso(instant(ends))
    [change] = document["explanation"]["next_changes"]
    assert (change["at"], change["plan_code"], change["status"]) == (
        iso(instant(ends)),
        "premium",
        "active",
    )
    assert change["entitlements"] == {
        "max_devices": {"before": 10, "after": 5},
        "analytics_level": {"before": "pro", "after": "advanced"},
        "copy_trading": {"before": True, "after": False},
    }
    [because] = change["because"]
    assert (because["source"], because["what"], because["rule"]) == (
        "sub:sub_1",
        "ends",
        "subscription.cancel_at",
    )
    features = by_feature(document["explanation"])
    following = features["max_devices"]["next"]
    assert (following["at"], following["value"], following["is_planned"]) == (iso(instant(ends)), 5, False)
    assert following["because"] == change["because"]
    assert features["signals_enabled"]["next"] is None
    assert (await ask(service, at=iso(instant(ends))))["entitlements"]["max_devices"] == 5


async def test_a_trial_and_the_grace_of_a_failed_renewal_name_their_ends(sqlite_service: Harness) -> None:
    now = int(sqlite_service.clock.now().timestamp())
    start = now - 5 * DAY_SECONDS
    trial_end = start + 14 * DAY_SECONDS
    common: dict[str, Any] = {"period_start": start, "period_end": start + MONTH_SECONDS}
    trial = objects.subscription(
        "sub_1",
        customer="cus_1",
        status="trialing",
        trial_end=trial_end,
        metadata={"user_id": "usr_trial"},
        **common,
    )
    late = objects.subscription(
        "sub_2", customer="cus_2", status="past_due", metadata={"user_id": "usr_late"}, **common
    )
    await deliver(
        sqlite_service,
        objects.event("evt_1", "customer.subscription.created", trial, created=start),
        objects.event("evt_2", "customer.subscription.updated", late, created=now - DAY_SECONDS),
    )
    [change] = (await ask(sqlite_service, "usr_trial"))["explanation"]["next_changes"]
    assert (change["at"], change["because"][0]["rule"]) == (
        iso(instant(trial_end)),
        "subscription.trialing",
    )
    [change] = (await ask(sqlite_service, "usr_late"))["explanation"]["next_changes"]
    grace = sqlite_service.service.catalog.policy.past_due_grace
    assert change["at"] == iso(instant(now - DAY_SECONDS) + grace)
    assert change["because"][0]["rule"] == "subscription.past_due.grace"


async def test_a_source_that_gives_nothing_any_more_says_why(service: Harness) -> None:
    await buy(service)
    now = int(service.clock.now().timestamp())
    refund = objects.refund("re_1", intent_id="pi_1", created=now - 60)
    await deliver(service, objects.event("evt_re", "refund.created", refund, created=now - 60))
    document = await ask(service)
    assert (document["plan_code"], document["status"]) == ("free", "refunded")
    [source] = document["explanation"]["sources"]
    assert (source["counts"], source["rule"], source["text"]) == (
        False,
        "refund.full",
        RULES["refund.full"],
    )
    assert ("evt_re", "refund re_1 of 2999, succeeded") in [
        (event["event_id"], event["says"]) for event in source["events"]
    ]
    before = await ask(service, at=iso(instant(now - 61)))
    assert before["explanation"]["sources"][0]["rule"] == "checkout.paid"
    assert "evt_re" not in json.dumps(before)


async def test_nothing_of_another_user_is_shown(service: Harness) -> None:
    await subscribe(service, user="usr_1", number=1)
    await subscribe(service, user="usr_2", number=2)
    text = json.dumps(await ask(service, "usr_1"))
    assert "usr_2" not in text
    assert "sub_2" not in text
    assert "evt_in_2" not in text


async def test_a_user_nobody_has_heard_of_is_explained_too(sqlite_service: Harness) -> None:
    explanation = (await ask(sqlite_service, "usr_nobody"))["explanation"]
    assert {entry["reason"] for entry in explanation["features"]} == {"default_plan"}
    assert (explanation["sources"], explanation["next_changes"]) == ([], [])


async def test_an_unchanged_explanation_is_304_and_another_answer_than_without(
    sqlite_service: Harness,
) -> None:
    await subscribe(sqlite_service)
    key = await sqlite_service.service.api_keys.create("test", Scope.READ)
    headers = {"Authorization": f"Bearer {key}"}
    path = "/api/v1/entitlements/usr_1"
    first = await sqlite_service.client.get(f"{path}?explain=true", headers=headers)
    headers["If-None-Match"] = first.headers["ETag"]
    assert (await sqlite_service.client.get(f"{path}?explain=true", headers=headers)).status_code == 304
    assert (await sqlite_service.client.get(path, headers=headers)).status_code == 200


def test_a_long_future_is_told_up_to_a_bound() -> None:
    """A source that comes and goes every other day for months: of its changes the next ones are told."""
    catalog = parse_catalog(SHIPPED_CATALOG.read_text("utf-8"))
    now = datetime(2026, 11, 23, tzinfo=UTC)
    source_id = SubjectId("", False, "grant:1")
    accesses = tuple(
        Access(
            source=source_id,
            part=str(day),
            plan=catalog.plans["vip"],
            status="active",
            rule="grant",
            event_id="evt_1",
            starts_at=now + timedelta(days=day),
            ends_at=now + timedelta(days=day + 1),
        )
        for day in range(0, 4 * NEXT_CHANGES_MAX, 2)
    )
    reading = Reading(
        status="active", as_of=now, rule="grant", event_id="evt_1", grants=True, accesses=accesses
    )
    view = View(
        entitlement=entitlement_of(catalog, "usr_1", [reading], at=now),
        state=State(sources={source_id: Owned(customer_id=None, user_id="usr_1")}),
        readings=((source_id, reading),),
        at=now,
    )
    changes = explain(catalog, view, Evidence(payments=(), audit=(), children={})).next_changes
    assert [change.at for change in changes] == [
        now + timedelta(days=day) for day in range(1, NEXT_CHANGES_MAX + 1)
    ]
    assert [change.after.plan_code for change in changes[:3]] == ["free", "vip", "free"]
    assert (changes[0].end, changes[1].begin) == (accesses[:1], accesses[1:2])


class TestText:
    async def test_it_reads_from_the_answer_to_the_evidence(self, sqlite_service: Harness) -> None:
        ends = int(sqlite_service.clock.now().timestamp()) + 7 * DAY_SECONDS
        await subscribe(sqlite_service, cancel_at=ends)
        service = sqlite_service.service.entitlements
        view, evidence = await service.view_with_evidence("usr_1")
        text = explanation_text(explain(service.catalog, view, evidence))
        until = iso(instant(ends))
        assert text.startswith(f"User usr_1 at {iso(view.at)}: plan vip, active, until {until}\n")
        for line in (
            "  copy_trading = true",
            f"      from {until} on: false",
            "  dedicated_support = false (not granted)",
            "      as everybody has it by the default plan; no source changes it [default_plan]",
            "  subscription sub_1 of customer cus_usr_1: active, counts",
            f"  {until}: plan free, expired",
            "      max_devices: 10 -> 1",
        ):
            assert line in text.splitlines()
        for name in ("evt_sub_1", "evt_in_1", "2999 usd, settled", "entitlement.granted"):
            assert name in text

    async def test_an_id_from_outside_moves_no_cursor(self, sqlite_service: Harness) -> None:
        hostile = "usr\x1b[2J\r\n\u202eadmin"
        service = sqlite_service.service.entitlements
        view, evidence = await service.view_with_evidence(hostile)
        lines = explanation_text(explain(service.catalog, view, evidence)).split("\n")
        assert all(line.isprintable() for line in lines)
        assert lines[0].startswith("User usr\N{REPLACEMENT CHARACTER}[2J")


class TestCommand:
    def explain(self, monkeypatch: pytest.MonkeyPatch, url: str, *arguments: str) -> Result:
        monkeypatch.setenv("DATABASE_URL", url)
        return CliRunner().invoke(main, ["explain", *arguments])

    def test_a_user_nobody_has_heard_of_is_explained_as_text(
        self, monkeypatch: pytest.MonkeyPatch, migrated_url: str
    ) -> None:
        result = self.explain(monkeypatch, migrated_url, "usr_1")
        assert (result.exit_code, result.stderr) == (0, "")
        assert "plan free, none" in result.stdout
        assert "nothing was ever heard of this user" in result.stdout

    def test_as_json_it_is_what_the_api_answers_at_that_instant(
        self, monkeypatch: pytest.MonkeyPatch, migrated_url: str
    ) -> None:
        at = iso(datetime.now(UTC) - timedelta(days=1))
        result = self.explain(monkeypatch, migrated_url, "usr_1", "--at", at, "--json")
        assert result.exit_code == 0
        document = json.loads(result.stdout)
        assert (document["user_id"], document["plan_code"]) == ("usr_1", "free")
        assert len(document["explanation"]["features"]) == len(document["entitlements"])

    @pytest.mark.parametrize(
        "arguments",
        [(), ("",), ("usr_1", "--at", "yesterday"), ("usr_1", "--at", "2026-11-23T07:30:00"), ("a" * 9_999,)],
    )
    def test_wrong_use_is_exit_2(
        self, monkeypatch: pytest.MonkeyPatch, migrated_sqlite_url: str, arguments: tuple[str, ...]
    ) -> None:
        result = self.explain(monkeypatch, migrated_sqlite_url, *arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert isinstance(result.exception, SystemExit)

    def test_a_database_without_the_schema_is_named_as_the_reason(
        self, monkeypatch: pytest.MonkeyPatch, database_url: str
    ) -> None:
        result = self.explain(monkeypatch, database_url, "usr_1")
        assert (result.exit_code, result.stdout) == (2, "")
        assert "tollkeeper migrate" in result.stderr


def test_every_rule_of_the_domain_has_its_words() -> None:
    """What the domain names as a rule; those that it puts together from Stripe's words are tried by the tests above."""
    named = {
        value.value
        for path in (APP / "billing" / "domain").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.keyword) and node.arg == "rule"
        for value in ast.walk(node.value)
        if isinstance(value, ast.Constant) and isinstance(value.value, str) and not value.value.endswith(".")
    }
    assert named
    assert named - RULES.keys() == set()


def test_every_rule_is_in_the_document() -> None:
    rows = [f"| `{rule}` | {words} |" for rule, words in (*RULES.items(), *WHY_TEXTS.items())]
    text = (ROOT / "docs" / "explain.md").read_text("utf-8")
    assert [row for row in rows if row not in text.splitlines()] == []
