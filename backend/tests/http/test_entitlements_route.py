"""GET /api/v1/entitlements/{user_id}: cached correctly, and only for who has a key."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import sqlalchemy as sa

from backend.app.core.api_keys import Scope, api_keys
from backend.app.core.errors import Forbidden, InvalidRequest
from backend.app.simulator import objects
from backend.tests.support.billing import Harness

PATH = "/api/v1/entitlements/usr_1"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def purchase(harness: Harness) -> dict[str, Any]:
    now = int(harness.clock.now().timestamp())
    session = objects.checkout_session(
        "cs_1", client_reference_id="usr_1", metadata={"plan_code": "premium"}, created=now
    )
    return objects.event("evt_1", "checkout.session.completed", session, created=now)


async def test_a_user_nobody_has_heard_of_has_the_default_plan(service: Harness) -> None:
    document = await service.entitlements("usr_nobody")
    assert document["plan_code"] == "free"
    assert document["entitlements"]["max_devices"] == 1
    assert document["sources"] == []
    assert document["version"] == 0


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

    async def test_a_revoked_key_is_refused_at_once(self, service: Harness) -> None:
        key = await service.service.api_keys.create("test", Scope.READ)
        async with service.service.database.transaction() as tx:
            await tx.execute(sa.update(api_keys).values(revoked_at=service.clock.now()))
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
