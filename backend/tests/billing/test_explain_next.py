"""What comes next, and what came before: every end and plan names its date and object, every change its cause."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from backend.app.billing.rebuild import Rebuild
from backend.app.core.api_keys import Scope
from backend.app.core.clock import from_unix, iso
from backend.app.main import SHIPPED_CATALOG
from backend.app.simulator import objects
from backend.app.simulator.objects import DAY_SECONDS, MONTH_SECONDS
from backend.tests.support.billing import Harness, running_service

Json = dict[str, Any]
SHIPPED = SHIPPED_CATALOG.read_text("utf-8")


def now_of(harness: Harness) -> int:
    return int(harness.clock.now().timestamp())


def subscription(start: int, *, price: str = "vip_monthly", **rest: Any) -> Json:
    """sub_1 of usr_1, in a month that began at `start`."""
    return objects.subscription(
        "sub_1",
        customer="cus_1",
        prices=[objects.price(price)],
        period_start=start,
        period_end=start + MONTH_SECONDS,
        metadata={"user_id": "usr_1"},
        **rest,
    )


def schedule(*phases: tuple[int, str], status: str = "active") -> Json:
    """sub_sched_1 of sub_1, with phases from an instant on at a price."""
    return {
        "id": "sub_sched_1",
        "object": "subscription_schedule",
        "subscription": "sub_1",
        "customer": "cus_1",
        "status": status,
        "phases": [
            {"start_date": at, "items": [{"price": objects.price(price), "quantity": 1}]}
            for at, price in phases
        ],
    }


async def deliver(
    harness: Harness, event_id: str, event_type: str, content: Mapping[str, Any], created: int
) -> None:
    response = await harness.deliver(objects.event(event_id, event_type, dict(content), created=created))
    assert response.json()["status"] == "success", response.text


async def created(harness: Harness, content: Mapping[str, Any], at: int) -> None:
    await deliver(harness, "evt_1", "customer.subscription.created", content, at)


async def ask(harness: Harness, path: str, **parameters: str) -> Json:
    key = await harness.service.api_keys.create("test", Scope.READ)
    response = await harness.client.get(
        f"/api/v1/entitlements/usr_1{path}", params=parameters, headers={"Authorization": f"Bearer {key}"}
    )
    assert response.status_code == 200, response.text
    document: Json = response.json()
    return document


async def explained(harness: Harness, **parameters: str) -> Json:
    explanation: Json = (await ask(harness, "", explain="true", **parameters))["explanation"]
    return explanation


async def history(harness: Harness, **parameters: str) -> list[Json]:
    changes: list[Json] = (await ask(harness, "/history", **parameters))["data"]
    return changes


async def grant(harness: Harness, **terms: Any) -> str:
    """A grant by the API; its id."""
    key = await harness.service.api_keys.create("ada", Scope.ADMIN)
    response = await harness.client.post(
        "/api/v1/users/usr_1/grants",
        json={"reason": "a test", **terms},
        headers={"Authorization": f"Bearer {key}", "Idempotency-Key": "wish-1"},
    )
    assert response.status_code in (200, 201), response.text
    grant_id: str = response.json()["id"]
    return grant_id


def copy_trading(explanation: Json) -> Json:
    found: Json = next(entry for entry in explanation["features"] if entry["feature"] == "copy_trading")
    return found


def require_next(explanation: Json, at: int, rule: str, named: tuple[str, str], event_id: str) -> None:
    """The next change is at that instant, by that rule and object, and the feature that goes says the same."""
    following = copy_trading(explanation)["next"]
    assert (following["at"], following["value"], following["is_planned"]) == (
        iso(from_unix(at)),
        False,
        False,
    )
    [because] = following["because"]
    assert (because["what"], because["rule"]) == ("ends", rule)
    assert (because["object"], because["object_id"]) == named
    assert because["event_id"] == event_id
    assert explanation["next_changes"][0]["at"] == following["at"]


class TestWhatComesNext:
    async def test_the_end_of_the_slack_after_a_paid_period(self, sqlite_service: Harness) -> None:
        start = now_of(sqlite_service) - DAY_SECONDS
        await created(sqlite_service, subscription(start), start)
        slack = int(sqlite_service.service.catalog.policy.renewal_slack.total_seconds())
        require_next(
            await explained(sqlite_service),
            start + MONTH_SECONDS + slack,
            "subscription.active",
            ("subscription", "sub_1"),
            "evt_1",
        )

    async def test_a_cancellation_at_the_end_of_the_period(self, sqlite_service: Harness) -> None:
        start = now_of(sqlite_service) - DAY_SECONDS
        await created(sqlite_service, subscription(start, cancel_at_period_end=True), start)
        explanation = await explained(sqlite_service)
        require_next(
            explanation,
            start + MONTH_SECONDS,
            "subscription.cancel_at",
            ("subscription", "sub_1"),
            "evt_1",
        )
        assert explanation["planned_changes"] == []

    async def test_the_end_of_a_trial(self, sqlite_service: Harness) -> None:
        start = now_of(sqlite_service) - DAY_SECONDS
        content = subscription(start, status="trialing", trial_end=start + 7 * DAY_SECONDS)
        await created(sqlite_service, content, start)
        require_next(
            await explained(sqlite_service),
            start + 7 * DAY_SECONDS,
            "subscription.trialing",
            ("subscription", "sub_1"),
            "evt_1",
        )

    async def test_the_end_of_the_days_of_grace(self, sqlite_service: Harness) -> None:
        start = now_of(sqlite_service) - DAY_SECONDS
        await created(sqlite_service, subscription(start, status="past_due"), start)
        grace = int(sqlite_service.service.catalog.policy.past_due_grace.total_seconds())
        require_next(
            await explained(sqlite_service),
            start + grace,
            "subscription.past_due.grace",
            ("subscription", "sub_1"),
            "evt_1",
        )

    async def test_the_end_of_a_purchase_that_lasts_for_days(
        self, migrated_sqlite_url: str, tmp_path: Path
    ) -> None:
        catalog = tmp_path / "catalog.toml"
        catalog.write_text(SHIPPED.replace("[plans.vip]\n", "[plans.vip]\npurchase_days = 30\n"), "utf-8")
        async with running_service(migrated_sqlite_url, catalog_file=catalog) as harness:
            bought = now_of(harness) - DAY_SECONDS
            session = objects.checkout_session(
                "cs_1", client_reference_id="usr_1", metadata={"plan_code": "vip"}, created=bought
            )
            await deliver(harness, "evt_1", "checkout.session.completed", session, bought)
            require_next(
                await explained(harness),
                bought + 30 * DAY_SECONDS,
                "checkout.paid",
                ("checkout session", "cs_1"),
                "evt_1",
            )

    async def test_the_end_of_a_grant(self, sqlite_service: Harness) -> None:
        ends = now_of(sqlite_service) + 5 * DAY_SECONDS
        grant_id = await grant(sqlite_service, plan_code="vip", ends_at=iso(from_unix(ends)))
        require_next(
            await explained(sqlite_service), ends, "grant", ("grant", grant_id), f"action:{grant_id}"
        )

    async def test_the_phases_of_a_schedule_and_the_cancellation_after_them(self, service: Harness) -> None:
        """They are shown as planned, apart from what comes by itself, and change nothing before Stripe says so."""
        start = now_of(service) - DAY_SECONDS
        phases = [start + MONTH_SECONDS, start + 2 * MONTH_SECONDS]
        cancel_at = start + 6 * MONTH_SECONDS
        await created(service, subscription(start, cancel_at=cancel_at), start)
        plan = schedule((start, "vip_monthly"), (phases[0], "premium_monthly"), (phases[1], "enterprise"))
        await deliver(service, "evt_2", "subscription_schedule.updated", plan, start + 1)
        explanation = await explained(service)
        assert [
            (change["at"], change["object"], change["object_id"], change["event_id"], change["plan_codes"])
            for change in explanation["planned_changes"]
        ] == [
            (iso(from_unix(phases[0])), "subscription schedule", "sub_sched_1", "evt_2", ["premium"]),
            (iso(from_unix(phases[1])), "subscription schedule", "sub_sched_1", "evt_2", ["enterprise"]),
            (iso(from_unix(cancel_at)), "subscription", "sub_1", "evt_1", []),
        ]
        down, up, end = (change["entitlements"]["max_devices"] for change in explanation["planned_changes"])
        assert (down, up, end) == (
            {"before": 10, "after": 5},
            {"before": 5, "after": 999},
            {"before": 999, "after": 1},
        )
        following = copy_trading(explanation)["next"]
        assert (following["at"], following["value"], following["is_planned"]) == (
            iso(from_unix(phases[0])),
            False,
            True,
        )
        assert (following["because"][0]["object_id"], following["because"][0]["source"]) == (
            "sub_sched_1",
            "sub:sub_1",
        )
        # Nothing is granted or taken by a plan alone: without a further word the paid period runs out.
        at_phase = await ask(service, "", at=iso(from_unix(phases[0])))
        assert at_phase["plan_code"] == "vip"

    @pytest.mark.parametrize("status", ["released", "canceled", "completed"])
    async def test_a_schedule_that_is_over_plans_nothing(self, sqlite_service: Harness, status: str) -> None:
        start = now_of(sqlite_service) - DAY_SECONDS
        await created(sqlite_service, subscription(start), start)
        phase = (start + MONTH_SECONDS, "premium_monthly")
        await deliver(sqlite_service, "evt_2", "subscription_schedule.updated", schedule(phase), start + 1)
        over = schedule(phase, status=status)
        await deliver(sqlite_service, "evt_3", f"subscription_schedule.{status}", over, start + 2)
        assert (await explained(sqlite_service))["planned_changes"] == []


class TestWhyNot:
    async def test_an_override_and_a_better_source_say_so_of_the_others(
        self, sqlite_service: Harness
    ) -> None:
        start = now_of(sqlite_service) - DAY_SECONDS
        await created(sqlite_service, subscription(start), start)
        grant_id = await grant(sqlite_service, features={"max_devices": 3}, override=True)
        features = {entry["feature"]: entry for entry in (await explained(sqlite_service))["features"]}
        [withheld] = features["max_devices"]["not_given_by"]
        assert (withheld["source"], withheld["why"], withheld["event_id"]) == (
            "sub:sub_1",
            "overridden",
            "evt_1",
        )
        [other] = features["copy_trading"]["not_given_by"]
        assert (other["source"], other["why"]) == (f"grant:{grant_id}", "outdone")

    async def test_what_begins_later_or_is_unknown_says_so(self, sqlite_service: Harness) -> None:
        begins = now_of(sqlite_service) + DAY_SECONDS
        grant_id = await grant(sqlite_service, plan_code="vip", starts_at=iso(from_unix(begins)))
        start = now_of(sqlite_service) - DAY_SECONDS
        event = objects.event(
            "evt_1", "customer.subscription.created", subscription(start, price="gold"), created=start
        )
        assert (await sqlite_service.deliver(event)).json()["status"] == "parked"
        why = {
            entry["source"]: entry["why"]
            for entry in copy_trading(await explained(sqlite_service))["not_given_by"]
        }
        assert why == {f"grant:{grant_id}": "not_begun", "sub:sub_1": "unmapped"}


class TestHistory:
    async def test_an_event_is_named_with_its_actor_and_object(self, service: Harness) -> None:
        start = now_of(service) - DAY_SECONDS
        await created(service, subscription(start), start)
        [change] = await history(service)
        assert change["cause"] == {
            "kind": "event",
            "event_id": "evt_1",
            "event_type": "customer.subscription.created",
            "account": None,
            "actor": "stripe:evt_1",
            "subject": "sub:sub_1",
            "rule": None,
        }

    async def test_a_person_is_named_with_what_they_did_it_to(self, service: Harness) -> None:
        grant_id = await grant(service, plan_code="vip")
        key = await service.service.api_keys.create("bob", Scope.ADMIN)
        removed = await service.client.request(
            "DELETE",
            f"/api/v1/users/usr_1/grants/{grant_id}",
            params={"reason": "over"},
            headers={"Authorization": f"Bearer {key}", "Idempotency-Key": "wish-2"},
        )
        assert removed.status_code == 200, removed.text
        taken, given = await history(service)
        for change, event_type, name in ((given, "grant.created", "ada"), (taken, "grant.removed", "bob")):
            cause = change["cause"]
            assert (cause["kind"], cause["event_type"], cause["subject"]) == (
                "action",
                event_type,
                f"grant:{grant_id}",
            )
            assert name in cause["actor"]

    async def test_what_time_did_between_two_events_stands_between_them(self, service: Harness) -> None:
        start = now_of(service)
        trial_end = start + 7 * DAY_SECONDS
        await created(service, subscription(start, status="trialing", trial_end=trial_end), start)
        service.clock.advance(days=9)
        again = now_of(service)
        await deliver(service, "evt_2", "customer.subscription.updated", subscription(again), again)
        changes = await history(service)
        assert [
            (change["version"], change["change"], change["cause"]["kind"], change["plan_code"])
            for change in changes
        ] == [(2, "changed", "event", "vip"), (1, "revoked", "time", "free"), (1, "granted", "event", "vip")]
        lapse = changes[1]
        assert (lapse["occurred_at"], lapse["created_at"]) == (iso(from_unix(trial_end)),) * 2
        assert lapse["cause"] == {
            "kind": "time",
            "event_id": "evt_1",
            "event_type": None,
            "account": None,
            "actor": None,
            "subject": "sub:sub_1",
            "rule": "subscription.trialing",
        }
        assert lapse["entitlements"]["copy_trading"] is False

    @pytest.mark.parametrize("limit", [1, 2, 3])
    async def test_pages_of_any_size_show_what_time_did_once(
        self, sqlite_service: Harness, limit: int
    ) -> None:
        for number in range(3):
            start = now_of(sqlite_service)
            content = subscription(start, status="trialing", trial_end=start + DAY_SECONDS)
            kind = "updated" if number else "created"
            await deliver(sqlite_service, f"evt_{number}", f"customer.subscription.{kind}", content, start)
            sqlite_service.clock.advance(days=3)
        whole = await history(sqlite_service)
        assert [change["cause"]["kind"] for change in whole] == ["event", "time", "event", "time", "event"]
        read: list[Json] = []
        page = await ask(sqlite_service, "/history", limit=str(limit))
        read += page["data"]
        while page["next_cursor"] is not None:
            page = await ask(sqlite_service, "/history", limit=str(limit), cursor=page["next_cursor"])
            assert 0 < len(page["data"]) <= limit
            read += page["data"]
        assert read == whole

    async def test_what_ran_out_since_the_last_event_is_told_first(self, service: Harness) -> None:
        ended = datetime.now(UTC) - timedelta(days=1)
        service.clock.instant = ended - timedelta(days=2)
        await grant(service, plan_code="vip", ends_at=iso(ended))
        lapse, made = await history(service)
        assert (made["cause"]["kind"], lapse["cause"]["kind"], lapse["plan_code"]) == (
            "action",
            "time",
            "free",
        )
        assert lapse["cause"]["rule"] == "grant"
        assert lapse["plan_code"] == (await ask(service, ""))["plan_code"]

    async def test_a_changed_catalog_is_named_until_and_after_a_rebuild_applies_it(
        self, migrated_url: str, tmp_path: Path
    ) -> None:
        async with running_service(migrated_url) as harness:
            start = now_of(harness) - DAY_SECONDS
            await created(harness, subscription(start), start)
        catalog = tmp_path / "catalog.toml"
        catalog.write_text(SHIPPED.replace("max_devices = 10,", "max_devices = 20,"), "utf-8")
        async with running_service(migrated_url, catalog_file=catalog) as harness:
            changed, _ = await history(harness)
            assert (changed["version"], changed["change"], changed["cause"]["kind"]) == (
                1,
                "changed",
                "catalog",
            )
            assert changed["entitlements"]["max_devices"] == 20
            assert (changed["occurred_at"], changed["created_at"]) == (None, None)
            service = harness.service
            await Rebuild(service.database, service.catalog, clock=harness.clock, livemode=False).run()
            applied, _ = await history(harness)
            assert (applied["version"], applied["entitlements"]["max_devices"]) == (2, 20)
            assert (applied["cause"]["kind"], applied["cause"]["actor"]) == ("rebuild", "cli:rebuild")


async def test_money_that_came_before_its_user_was_known_keeps_its_audit_rows(service: Harness) -> None:
    start = now_of(service) - DAY_SECONDS
    invoice = objects.invoice(
        "in_1",
        customer="cus_1",
        subscription_id="sub_1",
        line_price=objects.price("vip_monthly"),
        billing_reason="subscription_create",
        period_start=start,
        period_end=start + MONTH_SECONDS,
        metadata={},
    )
    await service.deliver(objects.event("evt_0", "invoice.paid", invoice, created=start))
    await created(service, subscription(start), start + 1)
    [source] = (await explained(service))["sources"]
    [paid] = [line for line in source["payments"] if line["settled"]]
    assert paid["event_id"] == "evt_0"
    assert {"payment.event", "payment.attributed"} <= {row["action"] for row in source["audit"]}
