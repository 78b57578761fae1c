"""Stored events processed again: what waits, what failed and what a new catalog reads differently."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from backend.app.billing import asserted, store
from backend.app.billing.parked import StoredEvents
from backend.app.billing.providers.stripe import translate
from backend.app.billing.providers.stripe_event import StripeEvent
from backend.app.core.api_keys import Scope
from backend.app.main import SHIPPED_CATALOG
from backend.app.simulator import objects
from backend.app.simulator.objects import MONTH_SECONDS
from backend.tests.support.billing import Harness, running_service, unix_now

# Everything that processing an event again could change.
TABLES = (
    *("facts", "sources", "links", "customer_ties", "user_entitlements", "entitlement_history"),
    *("payment_events", "audit_logs", "webhook_claims", "webhook_events"),
)


async def admin(harness: Harness) -> dict[str, str]:
    return {"Authorization": f"Bearer {await harness.service.api_keys.create('alice', Scope.ADMIN)}"}


def subscribed(event_id: str = "evt_1", number: int = 1, **rest: Any) -> dict[str, Any]:
    start = unix_now() - 3600
    options = {"metadata": {"user_id": f"user_{number}"}, "prices": [objects.price("gold")], **rest}
    account = options.pop("account", None)
    content = objects.subscription(
        f"sub_{number}",
        customer=f"cus_{number}",
        period_start=start,
        period_end=start + MONTH_SECONDS,
        **options,
    )
    return objects.event(
        event_id, "customer.subscription.created", content, created=unix_now() - 60, account=account
    )


def gold_catalog(tmp_path: Path, plan: str = "premium") -> Path:
    path = tmp_path / f"{plan}.toml"
    text = SHIPPED_CATALOG.read_text(encoding="utf-8")
    old = f'lookup_keys = ["{plan}", '
    assert old in text
    path.write_text(text.replace(old, f'lookup_keys = ["gold", "{plan}", '), encoding="utf-8")
    return path


async def contents(harness: Harness) -> dict[str, list[dict[str, Any]]]:
    found = {}
    for table in TABLES:
        rows = await harness.rows(f"SELECT * FROM {table}")
        found[table] = sorted(rows, key=repr)
    # Of messages only which there are: the relay is at work on them meanwhile.
    found["outbox"] = await harness.rows("SELECT id, kind, dedupe_key FROM outbox ORDER BY id")
    return found


async def reprocess(harness: Harness, event_id: str = "evt_1", **query: Any) -> dict[str, Any]:
    response = await harness.client.post(
        f"/api/v1/events/{event_id}/reprocess", params=query, headers=await admin(harness)
    )
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    return document


async def test_a_dry_run_shows_the_difference_and_writes_nothing(migrated_url: str, tmp_path: Path) -> None:
    async with running_service(migrated_url) as before:
        await before.deliver(subscribed(prices=[objects.price("premium")]))
    async with running_service(migrated_url, catalog_file=_moved_premium(tmp_path)) as after:
        as_it_was = await contents(after)
        document = await reprocess(after, dry_run=True)
        assert await contents(after) == as_it_was
        (change,) = document["changes"]
        assert (document["dry_run"], change["user_id"]) == (True, "user_1")
        assert (change["before"]["plan_code"], change["after"]["plan_code"]) == ("premium", "vip")
        assert change["after"]["entitlements"]["copy_trading"] is True
        assert change["after"]["valid_until"] is not None

        done = await reprocess(after)
        assert done == {**document, "dry_run": False}
        assert (await after.entitlements("user_1"))["plan_code"] == "vip"
        assert (await reprocess(after))["changes"] == []


def _moved_premium(tmp_path: Path) -> Path:
    """A catalog in which the price `premium` sells the plan vip."""
    path = tmp_path / "moved.toml"
    text = SHIPPED_CATALOG.read_text(encoding="utf-8")
    text = text.replace('lookup_keys = ["premium", ', "lookup_keys = [").replace(
        'lookup_keys = ["vip", ', 'lookup_keys = ["premium", "vip", '
    )
    path.write_text(text, encoding="utf-8")
    return path


async def test_a_parked_event_that_still_lacks_its_price_stays_parked(service: Harness) -> None:
    await service.deliver(subscribed())
    document = await reprocess(service)
    assert (document["status_before"], document["status_after"]) == ("parked", "parked")
    assert document["reason_after"] == "unknown_price:gold"


async def test_a_failed_event_is_processed_as_if_it_was_delivered_now(
    service: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    event = subscribed(prices=[objects.price("premium")])

    def broken(*_arguments: Any, **_options: Any) -> None:
        raise RuntimeError("a bug of ours")

    with monkeypatch.context() as patch:
        patch.setattr(store, "insert_sources", broken)
        assert (await service.deliver(event)).status_code == 500
    (row,) = await service.rows("SELECT status, answer FROM webhook_events")
    assert row == {"status": "failed", "answer": None}

    as_it_was = await contents(service)
    dry = await reprocess(service, dry_run=True)
    assert await contents(service) == as_it_was
    assert (dry["status_before"], dry["status_after"]) == ("failed", "success")
    assert dry["changes"][0]["before"] is None

    done = await reprocess(service)
    assert done["changes"] == dry["changes"]
    assert (await service.entitlements("user_1"))["plan_code"] == "premium"
    granted = await service.rows("SELECT actor FROM audit_logs ORDER BY action")
    assert {row["actor"] for row in granted} == {"key:alice"}
    # Stripe's own next attempt gets the answer that this one left.
    again = await service.deliver(event)
    assert (again.status_code, again.json()["status"]) == (200, "success")
    assert again.headers["Idempotent-Replayed"] == "true"


async def test_an_event_that_fails_again_leaves_nothing_behind(
    service: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    await service.deliver(subscribed())
    as_it_was = await contents(service)

    def broken(*_arguments: Any, **_options: Any) -> None:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(store, "resettle_event", broken)
    response = await service.client.post("/api/v1/events/evt_1/reprocess", headers=await admin(service))
    assert response.status_code == 500
    assert await contents(service) == as_it_was


async def test_two_admins_at_once_apply_an_event_once(migrated_url: str, tmp_path: Path) -> None:
    async with running_service(migrated_url) as before:
        await before.deliver(subscribed(prices=[objects.price("premium")]))
        payments = await before.count("payment_events")
    async with running_service(migrated_url, catalog_file=_moved_premium(tmp_path)) as after:
        documents = await asyncio.gather(*(reprocess(after) for _ in range(2)))
        assert sorted(len(document["changes"]) for document in documents) == [0, 1]
        assert await after.count("entitlement_history") == 2
        assert await after.count("payment_events") == payments
        actions = await after.rows("SELECT actor FROM audit_logs WHERE action = 'event.reprocessed'")
        assert [row["actor"] for row in actions] == ["key:alice", "key:alice"]


async def test_of_several_events_with_one_id_the_account_decides(service: Harness) -> None:
    await service.deliver(subscribed())
    await service.deliver(subscribed(account="acct_1", number=2))
    headers = await admin(service)
    ambiguous = await service.client.post("/api/v1/events/evt_1/reprocess", headers=headers)
    assert ambiguous.status_code == 409
    assert "account=acct_1&livemode=false" in ambiguous.json()["detail"]
    assert (await reprocess(service, account="acct_1"))["account"] == "acct_1"
    assert (await reprocess(service, account=""))["account"] is None
    unknown = await service.client.post("/api/v1/events/evt_2/reprocess", headers=headers)
    assert unknown.status_code == 404


async def test_an_event_of_the_other_mode_is_never_applied(service: Harness) -> None:
    await service.deliver({**subscribed(prices=[objects.price("premium")]), "livemode": True})
    document = await reprocess(service)
    assert (document["status_after"], document["changes"]) == ("ignored", [])
    assert await service.count("facts") == 0


class TestAllParked:
    async def run(self, harness: Harness, **query: Any) -> dict[str, Any]:
        response = await harness.client.post(
            "/api/v1/events/reprocess-parked", params=query, headers=await admin(harness)
        )
        assert response.status_code == 200, response.text
        document: dict[str, Any] = response.json()
        return document

    async def test_they_are_counted_by_cause_and_looked_at_page_by_page(self, service: Harness) -> None:
        for number in range(1, 4):
            await service.deliver(subscribed(f"evt_{number}", number))
        await service.deliver(subscribed("evt_4", 4, metadata={}, prices=[objects.price("premium")]))
        as_it_was = await contents(service)
        whole = await self.run(service, dry_run=True)
        assert whole["causes"] == [
            {
                "reason": "unknown_price:gold",
                "events": 3,
                "success": 0,
                "ignored": 0,
                "parked": 3,
                "failed": 0,
            },
            {"reason": "unknown_user", "events": 1, "success": 0, "ignored": 0, "parked": 1, "failed": 0},
        ]
        assert whole["next_cursor"] is None
        seen: list[str] = []
        cursor: str | None = None
        while True:
            page = await self.run(service, dry_run=True, limit=3, **({"cursor": cursor} if cursor else {}))
            seen += [entry["event_id"] for entry in page["data"]]
            cursor = page["next_cursor"]
            if cursor is None:
                break
        assert seen == ["evt_1", "evt_2", "evt_3", "evt_4"]
        one_cause = await self.run(service, dry_run=True, reason="unknown_user")
        assert [entry["event_id"] for entry in one_cause["data"]] == ["evt_4"]
        assert await contents(service) == as_it_was

    async def test_what_can_be_applied_by_now_is_applied(self, migrated_url: str, tmp_path: Path) -> None:
        async with running_service(migrated_url) as before:
            for number in range(1, 3):
                await before.deliver(subscribed(f"evt_{number}", number))
        async with running_service(migrated_url, catalog_file=gold_catalog(tmp_path)) as after:
            # The service has applied them at its start; park them again, as an older release left them.
            async with after.service.database.transaction() as tx:
                await tx.exec_driver_sql(
                    "UPDATE webhook_events SET status = 'parked', reason = 'unknown_price:gold'"
                )
            document = await self.run(after)
            assert document["causes"] == [
                {
                    "reason": "unknown_price:gold",
                    "events": 2,
                    "success": 2,
                    "ignored": 0,
                    "parked": 0,
                    "failed": 0,
                }
            ]
            assert await after.metric("billing_events_parked") == 0
            assert (await after.entitlements("user_2"))["plan_code"] == "premium"

    async def test_one_that_meets_a_bug_stays_as_it_was_and_stops_no_other(
        self, service: Harness, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for number in range(1, 4):
            await service.deliver(subscribed(f"evt_{number}", number))

        def broken(event: StripeEvent) -> Any:
            if event.envelope.id == "evt_2":
                raise RuntimeError("a bug that only this event meets")
            return translate(event)

        with monkeypatch.context() as patch, capture_logs() as logs:
            patch.setattr(asserted, "translate", broken)
            document = await self.run(service)
        assert document["causes"] == [
            {
                "reason": "unknown_price:gold",
                "events": 3,
                "success": 0,
                "ignored": 0,
                "parked": 2,
                "failed": 1,
            }
        ]
        assert [entry.get("error") for entry in document["data"]] == [None, "RuntimeError", None]
        assert [entry["event_id"] for entry in logs if entry["event"] == "event_not_reprocessed"] == ["evt_2"]
        rows = await service.rows("SELECT status FROM webhook_events")
        assert [row["status"] for row in rows] == ["parked"] * 3


async def test_the_service_itself_needs_no_http_for_it(service: Harness) -> None:
    """The same part serves the console and the command line."""
    await service.deliver(subscribed())
    events: StoredEvents = service.service.stored_events
    key = await events.find("evt_1", account=None, livemode=None)
    done = await events.reprocess(key, actor="cli:test", dry_run=False)
    assert done.status_before == "parked"
    (row,) = await service.rows("SELECT actor FROM audit_logs WHERE action = 'event.reprocessed'")
    assert row["actor"] == "cli:test"
