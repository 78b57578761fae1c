"""Manual grants: a person gives or takes back, once, with a reason, and everybody can see who and why."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import httpx2 as httpx
import pytest

from backend.app.audit import log as audit_log
from backend.app.audit.models import AuditLog
from backend.app.billing.grants import Terms
from backend.app.core.api_keys import Scope
from backend.app.core.clock import iso
from backend.app.core.errors import StoreUnavailable
from backend.app.simulator import objects
from backend.tests.support.billing import Harness

PATH = "/api/v1/users/usr_1/grants"
VIP = {"plan_code": "vip", "reason": "won the raffle"}


async def admin(harness: Harness, name: str = "alice") -> dict[str, str]:
    return {"Authorization": f"Bearer {await harness.service.api_keys.create(name, Scope.ADMIN)}"}


async def grant(
    harness: Harness, body: dict[str, Any], *, key: str = "k1", headers: dict[str, str] | None = None
) -> httpx.Response:
    headers = headers or await admin(harness)
    return await harness.client.post(PATH, json=body, headers={**headers, "Idempotency-Key": key})


async def remove(
    harness: Harness, grant_id: str, *, key: str, headers: dict[str, str], reason: str = "mistake"
) -> httpx.Response:
    return await harness.client.delete(
        f"{PATH}/{grant_id}", params={"reason": reason}, headers={**headers, "Idempotency-Key": key}
    )


def purchase(harness: Harness) -> dict[str, Any]:
    now = int(harness.clock.now().timestamp())
    session = objects.checkout_session(
        "cs_1", client_reference_id="usr_1", metadata={"plan_code": "premium"}, created=now
    )
    return objects.event("evt_1", "checkout.session.completed", session, created=now)


async def audit(harness: Harness) -> list[tuple[str, str]]:
    rows = await harness.rows("SELECT action, actor FROM audit_logs ORDER BY action")
    return [(row["action"], row["actor"]) for row in rows]


class TestGranting:
    async def test_a_plan_is_there_at_once_and_the_records_name_the_key(self, service: Harness) -> None:
        response = await grant(service, VIP)
        assert response.status_code == 201, response.text
        document = response.json()
        assert (document["status"], document["plan_code"]) == ("active", "vip")
        assert (document["created_by"], document["reason"]) == ("key:alice", "won the raffle")
        entitlements = await service.entitlements("usr_1")
        assert (entitlements["plan_code"], entitlements["valid_until"]) == ("vip", None)
        assert entitlements["entitlements"]["max_devices"] == 10
        assert entitlements["sources"][0]["source"] == f"grant:{document['id']}"
        assert await audit(service) == [("entitlement.granted", "key:alice"), ("grant.created", "key:alice")]
        (history,) = await service.rows("SELECT cause_event_type, version FROM entitlement_history")
        assert history == {"cause_event_type": "grant.created", "version": 1}

    async def test_it_ends_by_itself(self, service: Harness) -> None:
        end = service.clock.now() + timedelta(days=3)
        response = await grant(service, {**VIP, "ends_at": iso(end)})
        assert response.json()["ends_at"] == iso(end)
        assert (await service.entitlements("usr_1"))["valid_until"] == iso(end)
        later = await service.service.entitlements.view("usr_1", at=end)
        assert later.entitlement.plan_code == "free"

    async def test_one_for_later_gives_nothing_before(self, service: Harness) -> None:
        start = service.clock.now() + timedelta(days=3)
        response = await grant(service, {**VIP, "starts_at": iso(start)})
        assert response.json()["status"] == "scheduled"
        now = await service.entitlements("usr_1")
        assert (now["plan_code"], now["valid_until"]) == ("free", iso(start))
        later = await service.service.entitlements.view("usr_1", at=start)
        assert later.entitlement.plan_code == "vip"

    async def test_single_features_join_what_was_paid_for(self, service: Harness) -> None:
        await service.deliver(purchase(service))
        await grant(service, {"features": {"max_devices": 7, "copy_trading": True}, "reason": "beta"})
        document = await service.entitlements("usr_1")
        assert document["plan_code"] == "premium"
        assert document["entitlements"]["max_devices"] == 7
        assert document["entitlements"]["copy_trading"] is True
        assert document["entitlements"]["analytics_level"] == "advanced"

    @pytest.mark.parametrize(
        ("feature", "value"), [("max_devices", 0), ("signals_enabled", False), ("analytics_level", "basic")]
    )
    async def test_an_override_may_take_away_what_was_paid_for(
        self, service: Harness, feature: str, value: object
    ) -> None:
        await service.deliver(purchase(service))
        await grant(service, {"features": {feature: value}, "override": True, "reason": "abuse"})
        document = await service.entitlements("usr_1")
        assert (document["plan_code"], document["entitlements"][feature]) == ("premium", value)

    @pytest.mark.parametrize(
        ("body", "location"),
        [
            ({"plan_code": "gold", "reason": "x"}, ["body", "plan_code"]),
            ({"features": {"jetpack": True}, "reason": "x"}, ["body", "features"]),
            ({"features": {"max_devices": -1}, "reason": "x"}, ["body", "features", "max_devices"]),
            ({"features": {"max_devices": True}, "reason": "x"}, ["body", "features", "max_devices"]),
            ({"features": {"copy_trading": 1}, "reason": "x"}, ["body", "features", "copy_trading"]),
            ({"features": {"max_devices": 2**63}, "reason": "x"}, ["body", "features", "max_devices"]),
            (
                {"features": {"analytics_level": "top"}, "reason": "x"},
                ["body", "features", "analytics_level"],
            ),
            ({"reason": "x"}, ["body", "plan_code"]),
            ({"plan_code": "vip", "features": {"max_devices": 1}, "reason": "x"}, ["body", "plan_code"]),
            ({"plan_code": "vip", "override": True, "reason": "x"}, ["body", "override"]),
            ({"plan_code": "vip"}, ["body", "reason"]),
            ({"plan_code": "vip", "reason": " \t"}, ["body", "reason"]),
            ({"plan_code": "vip", "reason": "a\u0000b"}, ["body", "reason"]),
            ({"plan_code": "vip", "reason": "x", "until": "2027"}, ["body", "until"]),
            ({**VIP, "ends_at": "2020-01-01T00:00:00Z"}, ["body", "ends_at"]),
            ({**VIP, "ends_at": "2030-01-01T00:00:00"}, ["body", "ends_at"]),
            ({**VIP, "ends_at": 1_900_000_000}, ["body", "ends_at"]),
        ],
    )
    async def test_what_the_catalog_lacks_or_makes_no_sense_is_422_and_names_the_field(
        self, sqlite_service: Harness, body: dict[str, Any], location: list[str]
    ) -> None:
        headers = await admin(sqlite_service)
        response = await grant(sqlite_service, body, headers=headers)
        assert response.status_code == 422, response.text
        assert response.headers["content-type"] == "application/problem+json"
        assert [error["location"] for error in response.json()["errors"]] == [location]
        assert await sqlite_service.count("facts") == await sqlite_service.count("audit_logs") == 0
        # The key is free again for the mended request.
        assert (await grant(sqlite_service, VIP, headers=headers)).status_code == 201

    async def test_a_read_key_may_look_but_not_grant(self, sqlite_service: Harness) -> None:
        key = await sqlite_service.service.api_keys.create("reader", Scope.READ)
        headers = {"Authorization": f"Bearer {key}"}
        assert (await grant(sqlite_service, VIP, headers=headers)).status_code == 403
        assert (await remove(sqlite_service, "g", key="k", headers=headers)).status_code == 403
        assert (await sqlite_service.client.get(PATH, headers=headers)).json() == {
            "data": [],
            "next_cursor": None,
        }
        assert await sqlite_service.count("facts") == 0


class TestRemoving:
    async def test_what_the_other_sources_give_stays(self, service: Harness) -> None:
        headers = await admin(service)
        await service.deliver(purchase(service))
        made = (await grant(service, VIP, headers=headers)).json()
        assert (await service.entitlements("usr_1"))["plan_code"] == "vip"

        response = await remove(service, made["id"], key="k2", headers=await admin(service, "bob"))
        assert response.status_code == 200, response.text
        document = response.json()
        assert (document["status"], document["reason"]) == ("removed", "won the raffle")
        assert (document["removed_by"], document["removed_reason"]) == ("key:bob", "mistake")
        assert (await service.entitlements("usr_1"))["plan_code"] == "premium"
        assert ("grant.removed", "key:bob") in await audit(service)
        assert ("entitlement.changed", "key:bob") in await audit(service)

    async def test_the_reason_may_come_in_the_body_and_must_come_somewhere(
        self, sqlite_service: Harness
    ) -> None:
        headers = await admin(sqlite_service)
        made = (await grant(sqlite_service, VIP, headers=headers)).json()
        path = f"{PATH}/{made['id']}"
        none = await sqlite_service.client.delete(path, headers={**headers, "Idempotency-Key": "k2"})
        assert (none.status_code, none.json()["errors"][0]["location"]) == (422, ["query", "reason"])
        given = await sqlite_service.client.request(
            "DELETE", path, json={"reason": "typo"}, headers={**headers, "Idempotency-Key": "k2"}
        )
        assert (given.status_code, given.json()["removed_reason"]) == (200, "typo")

    async def test_a_second_removal_changes_nothing(self, service: Harness) -> None:
        headers = await admin(service)
        made = (await grant(service, VIP, headers=headers)).json()
        first = await remove(service, made["id"], key="k2", headers=headers)
        rows = await service.count("audit_logs")
        second = await remove(service, made["id"], key="k3", headers=headers, reason="again")
        assert second.json() == first.json()
        assert await service.count("audit_logs") == rows

    async def test_nobody_elses_grant_can_be_removed_by_a_wrong_address(self, service: Harness) -> None:
        headers = await admin(service)
        made = (await grant(service, VIP, headers=headers)).json()
        response = await service.client.delete(
            f"/api/v1/users/usr_2/grants/{made['id']}",
            params={"reason": "x"},
            headers={**headers, "Idempotency-Key": "k2"},
        )
        assert response.status_code == 404
        assert (await remove(service, "no-such-grant", key="k3", headers=headers)).status_code == 404
        assert (await service.entitlements("usr_1"))["plan_code"] == "vip"


class TestOnce:
    async def test_the_same_key_is_one_grant_and_the_same_bytes(self, service: Harness) -> None:
        headers = await admin(service)
        first, second = [await grant(service, VIP, headers=headers) for _ in range(2)]
        assert (first.content, first.status_code) == (second.content, second.status_code)
        assert second.headers["Idempotent-Replayed"] == "true"
        assert await service.count("facts") == 1
        assert len(await audit(service)) == 2

        removed = [await remove(service, first.json()["id"], key="k2", headers=headers) for _ in range(2)]
        assert removed[0].content == removed[1].content
        assert await service.count("facts") == 2

    async def test_the_same_key_for_something_else_is_422(self, service: Harness) -> None:
        headers = await admin(service)
        await grant(service, VIP, headers=headers)
        other = await grant(service, {**VIP, "plan_code": "premium"}, headers=headers)
        assert (other.status_code, other.json()["type"]) == (422, "/problems/idempotency-mismatch")
        assert await service.count("facts") == 1

    async def test_no_key_is_400(self, sqlite_service: Harness) -> None:
        headers = await admin(sqlite_service)
        response = await sqlite_service.client.post(PATH, json=VIP, headers=headers)
        assert (response.status_code, response.json()["type"]) == (400, "/problems/idempotency-key-missing")

    async def test_an_impatient_client_that_asks_many_times_at_once_gets_one_grant(
        self, service: Harness
    ) -> None:
        headers = await admin(service)
        responses = await asyncio.gather(*(grant(service, VIP, headers=headers) for _ in range(5)))
        assert {response.status_code for response in responses} <= {201, 409}
        assert len({response.content for response in responses if response.status_code == 201}) == 1
        assert await service.count("facts") == 1

    async def test_two_admins_at_once_both_grant_and_both_are_named(self, service: Harness) -> None:
        """Each with the same key of their own choice: keys are per caller."""
        both = [await admin(service, name) for name in ("alice", "bob")]
        bodies: list[dict[str, Any]] = [VIP, {"features": {"max_devices": 50}, "reason": "big team"}]
        responses = await asyncio.gather(
            *(grant(service, body, headers=headers) for body, headers in zip(bodies, both, strict=True))
        )
        assert [response.status_code for response in responses] == [201, 201]
        document = await service.entitlements("usr_1")
        assert (document["plan_code"], document["entitlements"]["max_devices"]) == ("vip", 50)
        versions = await service.rows("SELECT version FROM entitlement_history ORDER BY version")
        assert [row["version"] for row in versions] == [1, 2]
        created = await service.rows("SELECT actor FROM audit_logs WHERE action = 'grant.created'")
        assert {row["actor"] for row in created} == {"key:alice", "key:bob"}

    async def test_two_admins_who_remove_at_once_remove_once(self, service: Harness) -> None:
        both = [await admin(service, name) for name in ("alice", "bob")]
        made = (await grant(service, VIP, headers=both[0])).json()
        responses = await asyncio.gather(
            *(remove(service, made["id"], key="k2", headers=headers) for headers in both)
        )
        assert [response.status_code for response in responses] == [200, 200]
        assert responses[0].json() == responses[1].json()
        assert await service.count("facts") == 2

    async def test_an_attempt_that_is_carried_out_again_grants_nothing_more(self, service: Harness) -> None:
        """The server died between the commit and the answer; whoever takes over finds the same grant."""
        terms = Terms(
            plan_code="vip", features={}, is_override=False, reason="x", starts_at=None, ends_at=None
        )
        first, second = [
            await service.service.grants.create("usr_1", terms, actor="key:alice", action_id="same")
            for _ in range(2)
        ]
        assert first == second
        assert await service.count("facts") == 1
        assert len(await audit(service)) == 2


async def test_nothing_is_half_done_when_the_last_row_fails(
    service: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = await admin(service)
    append = audit_log.append

    async def failing(tx: Any, rows: list[AuditLog]) -> None:
        if rows[0].action == "grant.created":
            raise StoreUnavailable
        await append(tx, rows)

    with monkeypatch.context() as patch:
        patch.setattr(audit_log, "append", failing)
        assert (await grant(service, VIP, headers=headers)).status_code == 503
    for table in ("facts", "sources", "user_entitlements", "entitlement_history", "audit_logs"):
        assert await service.count(table) == 0, table
    assert (await service.entitlements("usr_1"))["plan_code"] == "free"
    assert (await grant(service, VIP, headers=headers, key="k2")).status_code == 201


async def test_a_users_grants_are_listed_newest_first_with_those_that_are_over(service: Harness) -> None:
    headers = await admin(service)
    made: list[str] = []
    for number in range(3):
        service.clock.advance(seconds=1)
        response = await grant(service, {**VIP, "reason": f"r{number}"}, key=f"k{number}", headers=headers)
        made.append(response.json()["id"])
    await remove(service, made[0], key="k9", headers=headers)
    first = (await service.client.get(PATH, params={"limit": 2}, headers=headers)).json()
    assert [entry["id"] for entry in first["data"]] == [made[2], made[1]]
    rest = (
        await service.client.get(PATH, params={"limit": 2, "cursor": first["next_cursor"]}, headers=headers)
    ).json()
    assert [(entry["id"], entry["status"]) for entry in rest["data"]] == [(made[0], "removed")]
    assert rest["next_cursor"] is None
