"""GET /api/v1/entitlements/{user_id}: now and at other times, cached correctly, and only for who has a key."""

from __future__ import annotations

import asyncio
import hashlib
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import httpx2 as httpx
import pytest
import sqlalchemy as sa
from fastapi import Depends, FastAPI, Header

from backend.app.billing.domain.catalog import Feature, FeatureType
from backend.app.billing.entitlements import FeatureCheck, is_granted
from backend.app.billing.guard import EntitlementGuard
from backend.app.core.api_keys import KNOWN_SECONDS, Scope, api_keys
from backend.app.core.clock import iso
from backend.app.core.errors import Forbidden, InvalidRequest, Unauthenticated
from backend.app.core.http import install_problem_handlers
from backend.app.simulator import objects
from backend.app.simulator.objects import DAY_SECONDS, MONTH_SECONDS
from backend.tests.support.billing import Harness, running_service
from backend.tests.support.servers import PostgresServer

PATH = "/api/v1/entitlements/usr_1"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def purchase(harness: Harness) -> dict[str, Any]:
    now = int(harness.clock.now().timestamp())
    session = objects.checkout_session(
        "cs_1", client_reference_id="usr_1", metadata={"plan_code": "premium"}, created=now
    )
    return objects.event("evt_1", "checkout.session.completed", session, created=now)


async def get(harness: Harness, path: str, **parameters: str | int) -> httpx.Response:
    """A GET below the entitlements, with a read key."""
    key = await harness.service.api_keys.create("test", Scope.READ)
    return await harness.client.get(f"/api/v1/entitlements/{path}", params=parameters, headers=bearer(key))


async def live_a_life(harness: Harness) -> datetime:
    """usr_1 subscribes to premium ten days ago, moves to vip five days ago and is cancelled a day ago; when it began."""
    start = int(harness.clock.now().timestamp()) - 10 * DAY_SECONDS

    def state(price: str, **rest: Any) -> dict[str, Any]:
        return objects.subscription(
            "sub_1",
            customer="cus_1",
            prices=[objects.price(price)],
            period_start=start,
            period_end=start + MONTH_SECONDS,
            metadata={"user_id": "usr_1"},
            **rest,
        )

    ended = start + 9 * DAY_SECONDS
    for event in (
        objects.event("evt_new", "customer.subscription.created", state("premium_monthly"), created=start),
        objects.event(
            "evt_up",
            "customer.subscription.updated",
            state("vip_monthly"),
            created=start + 5 * DAY_SECONDS,
        ),
        objects.event(
            "evt_end",
            "customer.subscription.deleted",
            state("vip_monthly", status="canceled", ended_at=ended),
            created=ended,
        ),
    ):
        assert (await harness.deliver(event)).json()["status"] == "success"
    return datetime.fromtimestamp(start, UTC)


async def test_a_user_nobody_has_heard_of_has_the_default_plan(service: Harness) -> None:
    document = await service.entitlements("usr_nobody")
    assert document["plan_code"] == "free"
    assert document["entitlements"]["max_devices"] == 1
    assert document["sources"] == []
    assert document["version"] == 0


class TestAtAnInstant:
    @pytest.mark.parametrize(
        ("days", "plan_code", "status"),
        [
            (-1, "free", "none"),
            (0, "premium", "active"),
            (4, "premium", "active"),
            (5, "vip", "active"),
            (8, "vip", "active"),
            (9, "free", "canceled"),
            (400, "free", "canceled"),
        ],
    )
    async def test_it_is_as_it_was_in_force_then(
        self, service: Harness, days: int, plan_code: str, status: str
    ) -> None:
        start = await live_a_life(service)
        at = iso(start + timedelta(days=days))
        document = (await get(service, "usr_1", at=at)).json()
        assert (document["plan_code"], document["status"]) == (plan_code, status)
        check = (await get(service, "usr_1/copy_trading", at=at)).json()
        assert check["value"] is (plan_code == "vip")

    async def test_the_instant_of_an_event_belongs_to_what_came_of_it(self, sqlite_service: Harness) -> None:
        start = await live_a_life(sqlite_service)
        moved = start + timedelta(days=5)
        before = await get(sqlite_service, "usr_1", at=iso(moved - timedelta(microseconds=1)))
        assert before.json()["plan_code"] == "premium"
        assert (await get(sqlite_service, "usr_1", at=iso(moved))).json()["plan_code"] == "vip"

    async def test_the_future_is_what_follows_if_nothing_more_is_heard(self, sqlite_service: Harness) -> None:
        start = int(sqlite_service.clock.now().timestamp())
        subscription = objects.subscription(
            "sub_1",
            customer="cus_1",
            period_start=start,
            period_end=start + MONTH_SECONDS,
            metadata={"user_id": "usr_1"},
        )
        await sqlite_service.deliver(
            objects.event("evt_1", "customer.subscription.created", subscription, created=start)
        )
        document = (await get(sqlite_service, "usr_1")).json()
        until = datetime.fromisoformat(document["valid_until"])
        last = (await get(sqlite_service, "usr_1", at=iso(until - timedelta(microseconds=1)))).json()
        first_without = (await get(sqlite_service, "usr_1", at=iso(until))).json()
        assert (last["plan_code"], first_without["plan_code"]) == ("premium", "free")
        assert first_without["status"] == "expired"

    @pytest.mark.parametrize(
        "at",
        [
            *("2026-11-23T07:30:00", "2026-11-23", "1700000000", "now", "", "2026-11-23 07:30:00Z"),
            *("2026-13-01T00:00:00Z", "2026-02-30T00:00:00Z", "2026-11-23T25:00:00Z", "2026-11-23T07:30Z"),
            *("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "2026-11-23T07:30:00 01:00"),
            *(
                "2026-11-23T07:30:00+0100",
                "20261123T073000Z",
                "\uff12\uff10\uff12\uff16-11-23T07:30:00Z",
                "\x00",
            ),
        ],
    )
    async def test_what_is_no_instant_with_an_offset_is_422(self, sqlite_service: Harness, at: str) -> None:
        for path in ("usr_1", "usr_1/max_devices"):
            response = await get(sqlite_service, path, at=at)
            assert response.status_code == 422, at
            assert response.headers["Content-Type"] == "application/problem+json"
            assert response.json()["errors"][0]["location"] == ["query", "at"]

    @pytest.mark.parametrize(
        "at",
        [
            *("2026-11-23T07:30:00Z", "2026-11-23t07:30:00z", "2026-11-23T07:30:00.123456789+05:30"),
            *("0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999Z", "2026-11-23T07:30:00-00:00"),
        ],
    )
    async def test_every_form_of_rfc_3339_is_understood(self, service: Harness, at: str) -> None:
        response = await get(service, "usr_1", at=at, explain="true")
        assert (response.status_code, response.json()["plan_code"]) == (200, "free")


class TestOneFeature:
    async def test_it_says_the_value_whether_it_is_granted_and_by_which_rule(self, service: Harness) -> None:
        await service.deliver(purchase(service))
        assert (await get(service, "usr_1/max_devices")).json() == {
            "feature": "max_devices",
            "value": 5,
            "granted": True,
            "reason": "checkout.paid",
        }
        assert (await get(service, "usr_1/copy_trading")).json() == {
            "feature": "copy_trading",
            "value": False,
            "granted": False,
            "reason": "default_plan",
        }

    async def test_what_everybody_has_does_not_rest_on_a_purchase(self, sqlite_service: Harness) -> None:
        await sqlite_service.deliver(purchase(sqlite_service))
        for user in ("usr_1", "usr_nobody"):
            check = (await get(sqlite_service, f"{user}/signals_enabled")).json()
            assert (check["value"], check["granted"], check["reason"]) == (True, True, "default_plan")

    async def test_an_unchanged_answer_is_304(self, sqlite_service: Harness) -> None:
        headers = bearer(await sqlite_service.service.api_keys.create("test", Scope.READ))
        first = await sqlite_service.client.get(f"{PATH}/max_devices", headers=headers)
        again = await sqlite_service.client.get(
            f"{PATH}/max_devices", headers={**headers, "If-None-Match": first.headers["ETag"]}
        )
        assert (first.status_code, again.status_code) == (200, 304)

    @pytest.mark.parametrize("feature", ["time_travel", "MAX_DEVICES", "max_devices ", "é", "a" * 5_000])
    async def test_a_feature_the_catalog_lacks_is_404(self, sqlite_service: Harness, feature: str) -> None:
        response = await get(sqlite_service, f"usr_1/{feature}")
        assert (response.status_code, response.json()["type"]) == (404, "/problems/not-found")

    @pytest.mark.parametrize(
        ("kind", "value", "granted"),
        [
            (FeatureType.BOOLEAN, True, True),
            (FeatureType.BOOLEAN, False, False),
            (FeatureType.LIMIT, 1, True),
            (FeatureType.LIMIT, 0, False),
            (FeatureType.LEVEL, "low", False),
            (FeatureType.LEVEL, "high", True),
        ],
    )
    def test_granted_means_that_it_lets_something_happen(
        self, kind: FeatureType, value: bool | int | str, granted: bool
    ) -> None:
        feature = Feature(key="f", type=kind, levels=("low", "high") if kind is FeatureType.LEVEL else ())
        assert is_granted(feature, value) is granted


class TestHistory:
    async def test_every_change_is_told_with_its_cause_the_newest_first(self, service: Harness) -> None:
        start = await live_a_life(service)
        document = (await get(service, "usr_1/history")).json()
        assert document["next_cursor"] is None
        assert [
            (
                change["version"],
                change["change"],
                change["plan_code_before"],
                change["plan_code"],
                change["status"],
                {key: change["cause"][key] for key in ("event_id", "event_type", "account")},
            )
            for change in document["data"]
        ] == [
            (
                3,
                "revoked",
                "vip",
                "free",
                "canceled",
                {"event_id": "evt_end", "event_type": "customer.subscription.deleted", "account": None},
            ),
            (
                2,
                "changed",
                "premium",
                "vip",
                "active",
                {"event_id": "evt_up", "event_type": "customer.subscription.updated", "account": None},
            ),
            (
                1,
                "granted",
                None,
                "premium",
                "active",
                {"event_id": "evt_new", "event_type": "customer.subscription.created", "account": None},
            ),
        ]
        ended, moved, began = document["data"]
        assert (began["occurred_at"], moved["entitlements"]["max_devices"]) == (iso(start), 10)
        assert (ended["valid_until"], ended["entitlements"]["copy_trading"]) == (None, False)
        assert datetime.fromisoformat(began["valid_until"]) > start
        assert datetime.fromisoformat(began["created_at"]) == service.clock.now()

    @pytest.mark.parametrize("limit", [1, 2, 3])
    async def test_pages_of_any_size_make_the_same_list(self, service: Harness, limit: int) -> None:
        await live_a_life(service)
        whole = (await get(service, "usr_1/history")).json()["data"]
        read: list[dict[str, Any]] = []
        page = (await get(service, "usr_1/history", limit=limit)).json()
        while True:
            assert 0 < len(page["data"]) <= limit
            read += page["data"]
            if page["next_cursor"] is None:
                break
            page = (await get(service, "usr_1/history", limit=limit, cursor=page["next_cursor"])).json()
        assert read == whole

    async def test_a_user_nobody_has_heard_of_has_none(self, sqlite_service: Harness) -> None:
        assert (await get(sqlite_service, "usr_1/history")).json() == {"data": [], "next_cursor": None}

    @pytest.mark.parametrize(
        ("parameters", "status"),
        [
            ({"limit": 0}, 422),
            ({"limit": 201}, 422),
            ({"limit": "many"}, 422),
            ({"cursor": "nonsense"}, 400),
            ({"cursor": "WyJwYXltZW50cyIsMV0"}, 400),
            ({"cursor": "a" * 10_000}, 422),
        ],
    )
    async def test_a_page_that_does_not_exist_is_refused(
        self, sqlite_service: Harness, parameters: dict[str, str | int], status: int
    ) -> None:
        assert (await get(sqlite_service, "usr_1/history", **parameters)).status_code == status


class TestGuard:
    """`require_entitlement` in the seller's own application."""

    @staticmethod
    def product(harness: Harness) -> httpx.AsyncClient:
        """An application whose users sign in with a header."""

        async def signed_in_user(x_user: Annotated[str, Header()]) -> str:
            return x_user

        guard = EntitlementGuard(harness.service.entitlements, user_id=signed_in_user)
        app = FastAPI()
        install_problem_handlers(app)

        @app.post("/copy-trades", dependencies=[Depends(guard.require_entitlement("copy_trading"))])
        async def copy_trades() -> str:
            return "copied"

        @app.get("/devices")
        async def devices(
            check: FeatureCheck = Depends(guard.require_entitlement("max_devices")),  # noqa: B008, FAST002  # made above
        ) -> Any:
            return check.value

        @app.get("/team", dependencies=[Depends(guard.require_entitlement("max_devices", at_least=5))])
        async def team() -> str:
            return "team"

        @app.get(
            "/charts", dependencies=[Depends(guard.require_entitlement("analytics_level", at_least="pro"))]
        )
        async def charts() -> str:
            return "charts"

        transport = httpx.ASGITransport(app=app)
        return httpx.AsyncClient(transport=transport, base_url="http://product.test")

    async def test_it_opens_for_who_paid_and_for_nobody_else(self, service: Harness) -> None:
        start = await live_a_life(service)
        now = int(start.timestamp()) + 9 * DAY_SECONDS
        session = objects.checkout_session(
            "cs_2", client_reference_id="usr_2", metadata={"plan_code": "vip"}, created=now
        )
        await service.deliver(objects.event("evt_2", "checkout.session.completed", session, created=now))
        async with self.product(service) as product:
            opened = await product.post("/copy-trades", headers={"X-User": "usr_2"})
            assert (opened.status_code, opened.json()) == (200, "copied")
            for user in ("usr_1", "usr_nobody"):
                refused = await product.post("/copy-trades", headers={"X-User": user})
                assert refused.status_code == 403
                assert refused.json()["type"] == "/problems/entitlement-missing"

    async def test_a_limit_or_a_level_may_be_asked_for_and_reaches_the_handler(
        self, sqlite_service: Harness
    ) -> None:
        await sqlite_service.deliver(purchase(sqlite_service))
        async with self.product(sqlite_service) as product:
            premium, stranger = {"X-User": "usr_1"}, {"X-User": "usr_nobody"}
            assert (await product.get("/devices", headers=premium)).json() == 5
            assert (await product.get("/devices", headers=stranger)).json() == 1
            assert (await product.get("/team", headers=premium)).status_code == 200
            assert (await product.get("/team", headers=stranger)).status_code == 403
            assert (await product.get("/charts", headers=premium)).status_code == 403

    async def test_who_is_not_signed_in_is_refused_by_the_application_itself(
        self, sqlite_service: Harness
    ) -> None:
        async with self.product(sqlite_service) as product:
            assert (await product.post("/copy-trades")).status_code == 422

    async def test_an_outage_is_no_denial(
        self, migrated_postgres_url: str, postgres_server: PostgresServer
    ) -> None:
        async with running_service(migrated_postgres_url) as harness, self.product(harness) as product:
            question = {"X-User": "usr_nobody"}
            assert (await product.post("/copy-trades", headers=question)).status_code == 403
            postgres_server.stop()
            try:
                response = await product.post("/copy-trades", headers=question)
                assert (response.status_code, "Retry-After" in response.headers) == (503, True)
            finally:
                postgres_server.restart()

    @pytest.mark.parametrize(
        ("key", "at_least"),
        [
            ("copy_tradign", None),
            ("copy_trading", True),
            ("max_devices", "many"),
            ("max_devices", -1),
            ("analytics_level", "best"),
            ("analytics_level", 3),
        ],
    )
    async def test_a_misspelt_question_fails_at_start(
        self, sqlite_service: Harness, key: str, at_least: bool | int | str | None
    ) -> None:
        guard = EntitlementGuard(sqlite_service.service.entitlements, user_id=lambda: "usr_1")
        with pytest.raises(ValueError, match=key):
            guard.require_entitlement(key, at_least=at_least)


class TestCaching:
    async def test_an_unchanged_answer_is_304_without_a_body_until_access_changes(
        self, service: Harness
    ) -> None:
        headers = bearer(await service.service.api_keys.create("test", Scope.READ))
        first = await service.client.get(PATH, headers=headers)
        etag = first.headers["ETag"]
        again = await service.client.get(PATH, headers={**headers, "If-None-Match": etag})
        assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", etag)

        await service.deliver(purchase(service))
        changed = await service.client.get(PATH, headers={**headers, "If-None-Match": etag})
        assert (changed.status_code, changed.json()["plan_code"]) == (200, "premium")
        assert changed.headers["ETag"] != etag

    @pytest.mark.parametrize(
        ("form", "status"),
        [
            ("{etag}", 304),
            ("W/{etag}", 304),
            ('"other", {etag}', 304),
            ("*", 304),
            ('"other"', 200),
            ("", 200),
            (",,,", 200),
        ],
    )
    async def test_if_none_match_is_read_as_rfc_9110_says(
        self, sqlite_service: Harness, form: str, status: int
    ) -> None:
        headers = bearer(await sqlite_service.service.api_keys.create("test", Scope.READ))
        etag = (await sqlite_service.client.get(PATH, headers=headers)).headers["ETag"]
        response = await sqlite_service.client.get(
            PATH, headers={**headers, "If-None-Match": form.format(etag=etag)}
        )
        assert response.status_code == status

    async def test_no_shared_cache_may_keep_it_and_two_users_never_share_an_etag(
        self, sqlite_service: Harness
    ) -> None:
        headers = bearer(await sqlite_service.service.api_keys.create("test", Scope.READ))
        one = await sqlite_service.client.get(PATH, headers=headers)
        other = await sqlite_service.client.get("/api/v1/entitlements/usr_2", headers=headers)
        assert one.headers["Cache-Control"] == "private, no-cache"
        assert one.headers["ETag"] != other.headers["ETag"]

    async def test_an_etag_is_no_way_around_the_key(self, sqlite_service: Harness) -> None:
        response = await sqlite_service.client.get(PATH, headers={"If-None-Match": "*"})
        assert response.status_code == 401


class TestApiKeys:
    async def test_a_key_is_kept_only_as_a_hash(self, service: Harness) -> None:
        key = await service.service.api_keys.create("shop", Scope.READ)
        [row] = await service.rows("SELECT * FROM api_keys")
        assert key not in str(row)
        assert key.removeprefix("tk_") not in str(row)
        assert row["key_sha256"] == hashlib.sha256(key.encode()).hexdigest()
        assert (row["name"], row["scope"]) == ("shop", "read")

    @pytest.mark.parametrize("scope", list(Scope))
    async def test_any_scope_may_read(self, service: Harness, scope: Scope) -> None:
        key = await service.service.api_keys.create("test", scope)
        assert (await service.client.get(PATH, headers=bearer(key))).status_code == 200

    async def test_a_read_key_may_not_do_what_needs_an_admin(self, service: Harness) -> None:
        keys = service.service.api_keys
        reader, admin = await keys.create("reader", Scope.READ), await keys.create("boss", Scope.ADMIN)
        with pytest.raises(Forbidden):
            await keys.authenticate(f"Bearer {reader}", Scope.ADMIN)
        assert (await keys.authenticate(f"Bearer {admin}", Scope.ADMIN)).name == "boss"

    async def test_a_revoked_key_is_refused_within_a_second_and_for_changes_at_once(
        self, service: Harness
    ) -> None:
        keys = service.service.api_keys
        key = await keys.create("test", Scope.ADMIN)
        assert (await service.client.get(PATH, headers=bearer(key))).status_code == 200
        async with service.service.database.transaction() as tx:
            await tx.execute(sa.update(api_keys).values(revoked_at=service.clock.now()))
        with pytest.raises(Unauthenticated):
            await keys.authenticate(f"Bearer {key}", Scope.ADMIN)
        await asyncio.sleep(KNOWN_SECONDS)
        assert (await service.client.get(PATH, headers=bearer(key))).status_code == 401

    @pytest.mark.parametrize(
        "header",
        [
            b"",
            b" ",
            b"Bearer",
            b"Bearer ",
            b"Bearer  \t",
            b"Bearer tk_",
            b"Bearer null",
            b"Bearer tk_' OR 1=1 --",
            b"Bearer " + b"a" * 100_000,
            b"Bearer \xff\xfe\xe9",
            b"Bearer KEY,KEY",
            b"Bearer KEY KEY",
            b"Bearer KEYx",
            b"Basic KEY",
            b"KEY",
            b"BearerKEY",
            b"Bearer\tKEY",
            b"Token KEY",
        ],
    )
    async def test_an_unknown_blank_or_hostile_header_is_401(self, service: Harness, header: bytes) -> None:
        key = await service.service.api_keys.create("test", Scope.READ)
        response = await service.client.get(
            PATH, headers={b"Authorization": header.replace(b"KEY", key.encode())}
        )
        assert response.status_code == 401
        assert key not in response.text

    @pytest.mark.parametrize("form", ["Bearer {}", "bearer {}", "BEARER {}", "Bearer  {}"])
    async def test_the_scheme_is_case_insensitive(self, sqlite_service: Harness, form: str) -> None:
        """RFC 9110 11.1."""
        key = await sqlite_service.service.api_keys.create("test", Scope.READ)
        response = await sqlite_service.client.get(PATH, headers={"Authorization": form.format(key)})
        assert response.status_code == 200

    @pytest.mark.parametrize("where", ["?api_key={}", "?key={}", "?access_token={}"])
    async def test_a_key_in_the_address_does_not_count(self, sqlite_service: Harness, where: str) -> None:
        """Addresses end up in logs and histories."""
        key = await sqlite_service.service.api_keys.create("test", Scope.ADMIN)
        assert (await sqlite_service.client.get(PATH + where.format(key))).status_code == 401

    @pytest.mark.parametrize("name", ["", "a" * 101, "line\nbreak", "\u202ereversed", "nul\0"])
    async def test_a_name_that_would_spoil_the_audit_log_is_refused(
        self, sqlite_service: Harness, name: str
    ) -> None:
        with pytest.raises(InvalidRequest):
            await sqlite_service.service.api_keys.create(name, Scope.READ)
        assert await sqlite_service.count("api_keys") == 0
