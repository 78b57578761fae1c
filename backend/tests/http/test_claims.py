"""Guests' purchases find their users: by an admin's word or by a signed link, never by an e-mail address."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import httpx2 as httpx
import pytest

from backend.app.billing import claims as claims_module
from backend.app.core.api_keys import Scope
from backend.app.core.errors import StoreUnavailable
from backend.app.simulator import objects
from backend.app.simulator.objects import MONTH_SECONDS
from backend.tests.support.billing import Harness, unix_now


async def key(harness: Harness, name: str = "alice", scope: Scope = Scope.ADMIN) -> dict[str, str]:
    return {"Authorization": f"Bearer {await harness.service.api_keys.create(name, scope)}"}


async def claim(
    harness: Harness,
    user_id: str,
    *,
    idempotency_key: str | None = None,
    headers: dict[str, str] | None = None,
    **body: Any,
) -> httpx.Response:
    return await harness.client.post(
        f"/api/v1/users/{user_id}/claims",
        json={"reason": "showed the receipt", **body},
        headers={
            **(headers or await key(harness)),
            "Idempotency-Key": idempotency_key or f"{user_id}-{sorted(body.items())}",
        },
    )


def happened(event_id: str, event_type: str, content: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return objects.event(event_id, event_type, content, **{"created": unix_now() - 60, **rest})


async def guest_buys(harness: Harness, number: int = 1, **rest: Any) -> None:
    session = objects.checkout_session(f"cs_{number}", metadata={"plan_code": "premium"}, **rest)
    event = happened(f"evt_cs_{number}", "checkout.session.completed", session)
    assert (await harness.deliver(event)).json()["status"] == "parked"


def subscribed(number: int = 1, **rest: Any) -> dict[str, Any]:
    start = unix_now() - 3600
    content = objects.subscription(
        f"sub_{number}", customer="cus_1", period_start=start, period_end=start + MONTH_SECONDS, **rest
    )
    return happened(f"evt_sub_{number}", "customer.subscription.created", content)


async def plan(harness: Harness, user_id: str) -> str:
    code: str = (await harness.entitlements(user_id))["plan_code"]
    return code


class TestSources:
    async def test_the_purchase_its_payment_and_its_parked_event_are_the_users_at_once(
        self, service: Harness
    ) -> None:
        await guest_buys(service)
        response = await claim(service, "user_1", source="cs:cs_1")
        assert response.status_code == 201, response.text
        document = response.json()
        assert (document["sources"], document["moved_from"]) == (["cs:cs_1"], [])
        assert document["changes"][0]["after"]["plan_code"] == "premium"
        assert await plan(service, "user_1") == "premium"
        (payment,) = await service.rows("SELECT user_id FROM payment_events")
        (event,) = await service.rows("SELECT status, user_id FROM webhook_events")
        assert (payment["user_id"], event) == ("user_1", {"status": "success", "user_id": "user_1"})
        rows = await service.rows(
            "SELECT action, actor FROM audit_logs WHERE actor LIKE 'key:%' ORDER BY action"
        )
        assert [(row["action"], row["actor"]) for row in rows] == [
            ("claim.made", "key:alice"),
            ("entitlement.granted", "key:alice"),
            ("event.unparked", "key:alice"),
            ("payment.attributed", "key:alice"),
        ]

    async def test_what_is_another_users_is_moved_only_on_demand_and_can_be_moved_back(
        self, service: Harness
    ) -> None:
        await guest_buys(service)
        await claim(service, "user_1", source="cs:cs_1")
        refused = await claim(service, "user_2", source="cs:cs_1")
        assert (refused.status_code, refused.json()["type"]) == (409, "/problems/conflict")
        assert "user_1" in refused.json()["detail"]
        assert await plan(service, "user_2") == "free"

        for user_id, other in (("user_2", "user_1"), ("user_1", "user_2"), ("user_2", "user_1")):
            moved = await claim(
                service,
                user_id,
                source="cs:cs_1",
                move=True,
                idempotency_key=f"{user_id}-{await service.count('facts')}",
            )
            assert (moved.status_code, moved.json()["moved_from"]) == (201, [other])
            assert (await plan(service, user_id), await plan(service, other)) == ("premium", "free")

    async def test_a_users_own_name_on_the_purchase_yields_to_an_admins_word(self, service: Harness) -> None:
        await service.deliver(subscribed(metadata={"user_id": "user_1"}))
        assert (await claim(service, "user_2", source="sub:sub_1")).status_code == 409
        assert (await claim(service, "user_2", source="sub:sub_1", move=True)).status_code == 201
        assert (await plan(service, "user_2"), await plan(service, "user_1")) == ("premium", "free")

    @pytest.mark.parametrize(
        ("body", "status"),
        [
            ({"source": "cs:cs_unheard_of"}, 404),
            ({"source": "cs:cs_1", "account": "acct_1"}, 404),
            ({"source": "grant:g_1"}, 422),
            ({"source": "cs_1"}, 422),
            ({"source": "cs:"}, 422),
            ({}, 422),
            ({"source": "cs:cs_1", "customer_id": "cus_1"}, 422),
            ({"source": "cs:cs_1", "email": "buyer@example.com"}, 422),
        ],
    )
    async def test_a_wrong_name_binds_nothing(
        self, sqlite_service: Harness, body: dict[str, Any], status: int
    ) -> None:
        await guest_buys(sqlite_service)
        response = await claim(sqlite_service, "user_1", **body)
        assert response.status_code == status, response.text
        assert await plan(sqlite_service, "user_1") == "free"
        assert await sqlite_service.rows("SELECT id FROM audit_logs WHERE action = 'claim.made'") == []

    async def test_a_read_key_may_not_claim(self, sqlite_service: Harness) -> None:
        await guest_buys(sqlite_service)
        headers = await key(sqlite_service, scope=Scope.READ)
        assert (await claim(sqlite_service, "user_1", headers=headers, source="cs:cs_1")).status_code == 403


class TestCustomers:
    async def test_all_that_waited_for_a_customer_is_the_users_and_what_comes_later_too(
        self, service: Harness
    ) -> None:
        await service.deliver(subscribed(1))
        await service.deliver(
            happened("evt_ch", "charge.succeeded", objects.charge("ch_1", customer="cus_1"))
        )
        response = await claim(service, "user_1", customer_id="cus_1")
        assert response.status_code == 201, response.text
        assert response.json()["sources"] == ["sub:sub_1"]
        assert await plan(service, "user_1") == "premium"
        owners = await service.rows("SELECT DISTINCT user_id FROM payment_events")
        assert owners == [{"user_id": "user_1"}]
        assert await service.metric("billing_events_parked") == 0
        later = await service.deliver(subscribed(2, prices=[objects.price("vip")]))
        assert (later.json()["status"], later.json()["user_id"]) == ("success", "user_1")

    async def test_a_moved_customer_takes_along_what_names_the_other_user_itself(
        self, service: Harness
    ) -> None:
        await service.deliver(subscribed(1, metadata={"user_id": "user_1"}))
        await service.deliver(subscribed(2, prices=[objects.price("vip")]))
        assert (await claim(service, "user_2", customer_id="cus_1")).status_code == 409
        assert (await claim(service, "user_2", customer_id="cus_1", move=True)).status_code == 201
        assert (await plan(service, "user_1"), await plan(service, "user_2")) == ("free", "vip")
        owners = await service.rows("SELECT DISTINCT user_id FROM sources")
        assert owners == [{"user_id": "user_2"}]

    async def test_of_several_words_the_newest_holds(self, service: Harness) -> None:
        """Also when they are spoken within one instant, and when a user gets the customer back."""
        await service.deliver(subscribed(1))
        for number, user_id in enumerate(("user_1", "user_2", "user_1", "user_2")):
            response = await claim(
                service, user_id, customer_id="cus_1", move=True, idempotency_key=f"k{number}"
            )
            assert response.status_code == 201, response.text
            other = {"user_1": "user_2", "user_2": "user_1"}[user_id]
            assert (await plan(service, user_id), await plan(service, other)) == ("premium", "free")

    async def test_a_customer_can_be_bound_before_anything_is_heard_of_it(self, service: Harness) -> None:
        assert (await claim(service, "user_1", customer_id="cus_1")).json()["sources"] == []
        assert (await service.deliver(subscribed())).json()["user_id"] == "user_1"


class TestOnce:
    async def test_the_same_key_is_one_claim_and_the_same_bytes(self, service: Harness) -> None:
        await guest_buys(service)
        headers = await key(service)
        first, second = [
            await claim(service, "user_1", headers=headers, idempotency_key="k", source="cs:cs_1")
            for _ in range(2)
        ]
        assert (first.content, second.headers["Idempotent-Replayed"]) == (second.content, "true")
        assert len(await service.rows("SELECT id FROM audit_logs WHERE action = 'claim.made'")) == 1
        other = await claim(service, "user_1", headers=headers, idempotency_key="k", source="cs:cs_2")
        assert (other.status_code, other.json()["type"]) == (422, "/problems/idempotency-mismatch")

    async def test_of_two_admins_who_claim_for_two_users_at_once_one_is_told_no(
        self, service: Harness
    ) -> None:
        await guest_buys(service)
        both = [await key(service, name) for name in ("alice", "bob")]
        responses = await asyncio.gather(
            *(
                claim(service, user_id, headers=headers, source="cs:cs_1")
                for user_id, headers in zip(("user_1", "user_2"), both, strict=True)
            )
        )
        assert sorted(response.status_code for response in responses) == [201, 409]
        plans = [await plan(service, user_id) for user_id in ("user_1", "user_2")]
        assert sorted(plans) == ["free", "premium"]

    async def test_an_event_that_comes_at_the_same_moment_is_the_users_too(self, service: Harness) -> None:
        """Six subscriptions and the claim of their customer, in whatever order they get their locks."""
        await service.deliver(subscribed(1))
        responses = await asyncio.gather(
            *(service.deliver(subscribed(number)) for number in range(2, 7)),
            claim(service, "user_1", customer_id="cus_1"),
        )
        assert [response.status_code for response in responses] == [200] * 5 + [201]
        owners = await service.rows("SELECT user_id, count(*) AS n FROM sources GROUP BY user_id")
        assert owners == [{"user_id": "user_1", "n": 6}]
        assert await service.metric("billing_events_parked") == 0

    async def test_nothing_is_half_done_when_the_last_row_fails(
        self, service: Harness, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await guest_buys(service)
        headers = await key(service)
        rows = await service.count("audit_logs")

        async def failing(*_arguments: Any, **_options: Any) -> None:
            raise StoreUnavailable

        with monkeypatch.context() as patch:
            patch.setattr(claims_module, "record", failing)
            response = await claim(service, "user_1", headers=headers, source="cs:cs_1")
            assert response.status_code == 503
        assert await plan(service, "user_1") == "free"
        assert await service.count("audit_logs") == rows
        (event,) = await service.rows("SELECT status FROM webhook_events")
        (payment,) = await service.rows("SELECT user_id FROM payment_events")
        assert (event["status"], payment["user_id"]) == ("parked", None)


class TestLinks:
    async def link(self, harness: Harness, **body: Any) -> httpx.Response:
        return await harness.client.post(
            "/api/v1/claim-links", json={"source": "cs:cs_1", **body}, headers=await key(harness)
        )

    async def use(self, harness: Harness, path: str, user_id: str) -> httpx.Response:
        headers = await key(harness, "shop", Scope.READ)
        return await harness.client.post(path, json={"user_id": user_id}, headers=headers)

    async def test_it_binds_the_purchase_to_whoever_is_logged_in_and_only_once(
        self, service: Harness
    ) -> None:
        await guest_buys(service)
        made = await self.link(service)
        assert made.status_code == 201, made.text
        path = made.json()["url_path"]
        assert await plan(service, "user_1") == "free"

        used = await self.use(service, path, "user_1")
        assert (used.status_code, used.json()["sources"]) == (200, ["cs:cs_1"])
        assert await plan(service, "user_1") == "premium"
        rows = await service.rows("SELECT actor, user_id FROM audit_logs WHERE action = 'claim.made'")
        assert rows == [{"actor": "key:shop", "user_id": "user_1"}]

        # A repeat of the same user's request is no second use.
        facts = await service.count("facts")
        assert (await self.use(service, path, "user_1")).status_code == 200
        assert await service.count("facts") == facts
        stolen = await self.use(service, path, "user_2")
        assert (stolen.status_code, stolen.json()["type"]) == (409, "/problems/conflict")
        assert await plan(service, "user_2") == "free"

    async def test_it_ends_after_a_week(self, service: Harness) -> None:
        await guest_buys(service)
        path = (await self.link(service)).json()["url_path"]
        service.clock.advance(days=7)
        late = await self.use(service, path, "user_1")
        assert (late.status_code, late.json()["detail"]) == (400, "The claim link has expired.")
        assert await plan(service, "user_1") == "free"

    async def test_it_moves_nothing_that_has_found_its_user(self, service: Harness) -> None:
        await guest_buys(service)
        path = (await self.link(service)).json()["url_path"]
        await claim(service, "user_1", source="cs:cs_1")
        assert (await self.use(service, path, "user_2")).status_code == 409
        assert await plan(service, "user_1") == "premium"
        assert (await self.link(service)).status_code == 409
        # The refused use has not used the link up.
        assert await service.count("claim_link_uses") == 0

    async def test_of_many_users_who_open_it_at_once_one_gets_the_purchase(self, service: Harness) -> None:
        await guest_buys(service)
        path = (await self.link(service)).json()["url_path"]
        responses = await asyncio.gather(*(self.use(service, path, f"user_{number}") for number in range(5)))
        assert sorted(response.status_code for response in responses) == [200, 409, 409, 409, 409]
        plans = [await plan(service, f"user_{number}") for number in range(5)]
        assert sorted(plans) == ["free"] * 4 + ["premium"]

    async def test_no_changed_or_invented_token_opens_anything(self, sqlite_service: Harness) -> None:
        await guest_buys(sqlite_service, 1)
        await guest_buys(sqlite_service, 2)
        path = (await self.link(sqlite_service)).json()["url_path"]
        said, _, signature = path.rpartition("/")[2].partition(".")
        content = json.loads(base64.urlsafe_b64decode(said + "=" * (-len(said) % 4)))
        content[3] = "cs:cs_2"
        other = base64.urlsafe_b64encode(json.dumps(content, separators=(",", ":")).encode()).decode()
        flipped = "B" if signature[0] == "A" else "A"
        for token in (
            f"{other.rstrip('=')}.{signature}",
            f"{said}.{flipped}{signature[1:]}",
            f"{said}.",
            f"{said}",
            f".{signature}",
            "x",
            "a.b.c",
            "%C3%A9.%00",
            "A" * 1_000,
        ):
            response = await self.use(sqlite_service, f"/api/v1/claims/{token}", "user_1")
            assert (response.status_code, response.json()["detail"]) == (
                400,
                "The claim link is not genuine.",
            ), token
        assert await plan(sqlite_service, "user_1") == "free"

    async def test_only_an_admin_makes_links_and_only_for_what_there_is(
        self, sqlite_service: Harness
    ) -> None:
        headers = await key(sqlite_service, scope=Scope.READ)
        refused = await sqlite_service.client.post(
            "/api/v1/claim-links", json={"source": "cs:cs_1"}, headers=headers
        )
        assert refused.status_code == 403
        assert (await self.link(sqlite_service)).status_code == 404
        assert (await self.link(sqlite_service, expires_in_days=31)).status_code == 422
        assert (await self.link(sqlite_service, expires_in_days=0)).status_code == 422
