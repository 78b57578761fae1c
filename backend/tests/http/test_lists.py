"""Payments, events and the audit log in pages: nothing is missed, nothing shown twice, nothing secret shown at all."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx2 as httpx
import pytest

from backend.app.core.api_keys import Scope
from backend.app.simulator import objects
from backend.tests.support.billing import Harness, unix_now

LISTS = ("/api/v1/payments", "/api/v1/events", "/api/v1/audit", "/api/v1/events/parked")


async def reader(harness: Harness) -> dict[str, str]:
    return {"Authorization": f"Bearer {await harness.service.api_keys.create('reader', Scope.READ)}"}


async def get(harness: Harness, path: str, **query: Any) -> httpx.Response:
    return await harness.client.get(path, params=query, headers=await reader(harness))


async def pages(harness: Harness, path: str, **query: Any) -> list[list[dict[str, Any]]]:
    """All pages of a list, from the first to the last."""
    found: list[list[dict[str, Any]]] = []
    while True:
        response = await get(harness, path, **query)
        assert response.status_code == 200, response.text
        found.append(response.json()["data"])
        query["cursor"] = response.json()["next_cursor"]
        if query["cursor"] is None:
            return found


async def buys(harness: Harness, number: int, **rest: Any) -> None:
    options = {"client_reference_id": f"user_{number % 2}", "metadata": {"plan_code": "premium"}, **rest}
    session = objects.checkout_session(f"cs_{number}", **options)
    event = objects.event(f"evt_{number}", "checkout.session.completed", session, created=unix_now() - 60)
    assert (await harness.deliver(event)).status_code == 200


def cursor_of(*values: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(values).encode()).decode().rstrip("=")


class TestPages:
    @pytest.mark.parametrize("moves", [True, False])
    async def test_every_row_is_shown_once_newest_first_whatever_comes_meanwhile(
        self, service: Harness, moves: bool
    ) -> None:
        """Also when all of them came within one instant."""
        for number in range(7):
            service.clock.advance(seconds=int(moves))
            await buys(service, number)
        for path, name in (
            ("/api/v1/payments", "id"),
            ("/api/v1/events", "event_id"),
            ("/api/v1/audit", "id"),
        ):
            seen: list[dict[str, Any]] = []
            cursor: dict[str, str] = {}
            while True:
                page = (await get(service, path, limit=3, **cursor)).json()
                seen += page["data"]
                assert len(page["data"]) <= 3
                if page["next_cursor"] is None:
                    break
                cursor = {"cursor": page["next_cursor"]}
                service.clock.advance(seconds=1)
                await buys(service, 100 + len(seen) + 10 * len(path))
            names = [row[name] for row in seen]
            assert len(set(names)) == len(names)
            times = [row.get("created_at") or row["received_at"] for row in seen]
            assert times == sorted(times, reverse=True)
            if path == "/api/v1/events":
                assert {f"evt_{number}" for number in range(7)} <= set(names)

    async def test_a_full_last_page_promises_no_other(self, sqlite_service: Harness) -> None:
        for number in range(4):
            await buys(sqlite_service, number)
        assert [len(page) for page in await pages(sqlite_service, "/api/v1/payments", limit=2)] == [2, 2]

    async def test_an_empty_list_is_one_empty_page(self, sqlite_service: Harness) -> None:
        for path in LISTS:
            assert (await get(sqlite_service, path)).json() == {"data": [], "next_cursor": None}

    @pytest.mark.parametrize("limit", ["0", "201", "-1", "x", "1.5"])
    async def test_a_page_has_1_to_200_rows(self, sqlite_service: Harness, limit: str) -> None:
        for path in LISTS:
            response = await get(sqlite_service, path, limit=limit)
            assert response.status_code == 422
            assert response.json()["errors"][0]["location"] == ["query", "limit"]

    @pytest.mark.parametrize(
        "cursor",
        [
            "",
            "x",
            "%",
            "é",
            "\x00",
            "A" * 8_000,
            "W10",
            cursor_of(),
            cursor_of("payments"),
            cursor_of("payments", "2026-01-01T00:00:00Z"),
            cursor_of("payments", "2026-01-01T00:00:00", "id"),
            cursor_of("payments", "0001-01-01T00:00:00+23:00", "id"),
            cursor_of("payments", "9999-12-31T23:59:59-23:00", "id"),
            cursor_of("payments", "2026-01-01T00:00:00Z", 1),
            cursor_of("payments", "2026-01-01T00:00:00Z", None),
            cursor_of("payments", "2026-01-01T00:00:00Z", "a\x00b"),
            cursor_of("payments", "2026-01-01T00:00:00Z", "\ud800"),
            cursor_of("payments", "2026-01-01T00:00:00Z", ["id"]),
            cursor_of("payments", 10**400, "id"),
            cursor_of("payments", True, "id"),
            cursor_of("audit", "2026-01-01T00:00:00Z", "id"),
            cursor_of("payments", "2026-01-01T00:00:00Z", "id", "more"),
            base64.urlsafe_b64encode(b"[" * 5_000).decode(),
            base64.urlsafe_b64encode(b"\xff\xfe").decode(),
            base64.urlsafe_b64encode(b'{"payments": 1}').decode(),
            base64.urlsafe_b64encode(b"9" * 5_000).decode(),
        ],
    )
    async def test_a_hostile_cursor_is_400_and_no_statement(
        self, sqlite_service: Harness, cursor: str
    ) -> None:
        await buys(sqlite_service, 1)
        response = await get(sqlite_service, "/api/v1/payments", cursor=cursor)
        assert response.status_code == 400, response.text
        assert response.json()["type"] == "/problems/invalid-request"

    async def test_a_cursor_serves_its_own_list_only(self, service: Harness) -> None:
        for number in range(3):
            await buys(service, number)
        cursor = (await get(service, "/api/v1/audit", limit=1)).json()["next_cursor"]
        assert (await get(service, "/api/v1/payments", cursor=cursor)).status_code == 400
        assert (await get(service, "/api/v1/audit", cursor=cursor)).status_code == 200

    async def test_a_cursor_may_name_a_place_long_gone(self, service: Harness) -> None:
        await buys(service, 1)
        old = cursor_of("payments", "1970-01-01T00:00:00Z", "' OR 1=1 --")
        assert (await get(service, "/api/v1/payments", cursor=old)).json()["data"] == []


class TestContents:
    async def test_amounts_are_whole_numbers_beside_their_currency(self, service: Harness) -> None:
        await buys(service, 1, amount_total=123_456)
        ((payment,),) = await pages(service, "/api/v1/payments")
        assert (payment["amount"], payment["currency"], payment["settled"]) == (123_456, "usd", True)
        assert type(payment["amount"]) is int
        assert (payment["event_type"], payment["user_id"]) == ("checkout_completed", "user_1")
        assert (payment["subject"], payment["account"], payment["livemode"]) == ("cs:cs_1", None, False)

    async def test_filters_narrow_and_combine(self, service: Harness) -> None:
        for number in range(4):
            await buys(service, number)
        await buys(service, 9, client_reference_id=None)
        charge = objects.charge("ch_1", metadata={"user_id": "user_1"})
        await service.deliver(objects.event("evt_ch", "charge.succeeded", charge, created=unix_now() - 60))

        async def names(path: str, name: str, **query: Any) -> set[str]:
            return {row[name] for page in await pages(service, path, **query) for row in page}

        assert await names("/api/v1/payments", "stripe_event_id", user_id="user_0") == {"evt_0", "evt_2"}
        assert await names("/api/v1/events", "event_id", status="parked") == {"evt_9"}
        assert await names("/api/v1/events", "event_id", type="charge.succeeded") == {"evt_ch"}
        assert await names(
            "/api/v1/events",
            "event_id",
            user_id="user_1",
            status="success",
            type="checkout.session.completed",
        ) == {"evt_1", "evt_3"}
        assert await names("/api/v1/events", "event_id", user_id="user_1", status="parked") == set()
        assert await names("/api/v1/audit", "action", user_id="user_1") == {
            "payment.event",
            "entitlement.granted",
        }
        assert await names("/api/v1/audit", "user_id", action="entitlement.granted") == {"user_0", "user_1"}
        assert (await get(service, "/api/v1/events", status="lost")).status_code == 422
        assert (await get(service, "/api/v1/payments", user_id="a\x00b")).status_code == 422

    async def test_no_list_shows_what_was_sent_or_answered(self, sqlite_service: Harness) -> None:
        await buys(sqlite_service, 1)
        for path in LISTS:
            text = (await get(sqlite_service, path)).text
            assert "buyer@example.com" not in text
            assert '"payload"' not in text
            assert '"answer"' not in text

    async def test_the_audit_log_shows_who_did_what(self, service: Harness) -> None:
        await buys(service, 1)
        ((*rows,),) = await pages(service, "/api/v1/audit", action="entitlement.granted")
        assert [(row["actor"], row["resource_id"]) for row in rows] == [("stripe:evt_1", "user_1")]
        assert rows[0]["details"]["plan_code"] == "premium"
        assert len(rows[0]["content_sha256"]) == 64

    async def test_parked_events_are_grouped_by_what_they_wait_for(self, service: Harness) -> None:
        await buys(service, 1, client_reference_id=None)
        service.clock.advance(seconds=60)
        await buys(service, 2, client_reference_id=None)
        await buys(service, 3, metadata={"plan_code": "gold"})
        await buys(service, 4)
        ((*groups,),) = await pages(service, "/api/v1/events/parked")
        assert [(group["reason"], group["events"]) for group in groups] == [
            ("unknown_plan:gold", 1),
            ("unknown_user", 2),
        ]
        assert groups[1]["oldest_received_at"] < groups[1]["newest_received_at"]
        assert [len(page) for page in await pages(service, "/api/v1/events/parked", limit=1)] == [1, 1]


async def test_lists_need_a_key(sqlite_service: Harness) -> None:
    for path in LISTS:
        assert (await sqlite_service.client.get(path)).status_code == 401
