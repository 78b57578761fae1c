"""Answers that are held for a moment are never wrong: own changes show at once, others' within a second, expiry to the instant."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from backend.app.billing import answers, store_reads
from backend.app.billing.answers import ENTITLEMENTS, HELD_SECONDS, Answers
from backend.app.billing.entitlements import entitlement_document
from backend.app.billing.grants import Terms
from backend.app.core.database import Database, Tx, database_now
from backend.app.core.representation import Representation
from backend.app.simulator import objects
from backend.tests.support.billing import Harness, statements


class Seconds:
    """A monotonic clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def held_by(harness: Harness, seconds: Callable[[], float] = time.monotonic) -> Answers:
    """Answers of their own, on the harness's database."""
    service = harness.service
    return Answers(service.database, service.catalog, monotonic_seconds=seconds)


async def buy(harness: Harness, user_id: str, plan_code: str = "premium") -> None:
    now = int(harness.clock.now().timestamp())
    session = objects.checkout_session(
        f"cs_{user_id}_{plan_code}",
        client_reference_id=user_id,
        metadata={"plan_code": plan_code},
        created=now,
    )
    event = objects.event(f"evt_{user_id}_{plan_code}", "checkout.session.completed", session, created=now)
    assert (await harness.deliver(event)).json()["status"] == "success"


async def plan_of(source: Answers, user_id: str) -> str:
    body = (await source.about(user_id, ENTITLEMENTS)).body
    return body.split(b'"plan_code":"')[1].split(b'"')[0].decode()


def reads(seen: Sequence[str]) -> int:
    """How many of the statements read what answers rest on."""
    return sum("user_entitlements" in statement and "WITH named(place" in statement for statement in seen)


@pytest.fixture
async def quiet(service: Harness) -> Harness:
    """A service whose relay has nothing left to write, so that no transaction of its own ends any more."""
    await buy(service, "usr_1")
    await service.service.relay.stop()
    return service


class TestHolding:
    async def test_for_half_a_second_nothing_is_read_again(self, quiet: Harness) -> None:
        seconds = Seconds()
        held = held_by(quiet, seconds)
        with statements(quiet) as seen:
            first = await held.about("usr_1", ENTITLEMENTS)
            seconds.now += HELD_SECONDS - 0.001
            assert await held.about("usr_1", ENTITLEMENTS) is first
            assert reads(seen) == 1
            seconds.now += 0.001
            # Unchanged rows: read, but neither decoded nor decided.
            assert await held.about("usr_1", ENTITLEMENTS) is first
            assert reads(seen) == 2

    async def test_no_more_users_are_held_than_the_bound(
        self, quiet: Harness, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(answers, "HELD_USERS_MAX", 10)
        held = held_by(quiet, Seconds())
        for number in range(25):
            await held.about(f"usr_{number}", ENTITLEMENTS)
        with statements(quiet) as seen:
            for number in range(15, 25):
                await held.about(f"usr_{number}", ENTITLEMENTS)
            assert reads(seen) == 0
            await held.about("usr_14", ENTITLEMENTS)
            assert reads(seen) == 1

    async def test_questions_that_come_together_share_statements_and_each_gets_its_own_answer(
        self, service: Harness
    ) -> None:
        users = [f"usr_{number}" for number in range(60)]
        await asyncio.gather(*(buy(service, user_id) for user_id in users[::3]))
        held = held_by(service)
        with statements(service) as seen:
            found = await asyncio.gather(*(held.about(user_id, ENTITLEMENTS) for user_id in users))
        assert reads(seen) <= 4
        for user_id, representation in zip(users, found, strict=True):
            view = await service.service.entitlements.view(user_id)
            assert representation == Representation.of(entitlement_document(view))

    async def test_a_user_whose_rows_cant_be_read_fails_alone(self, service: Harness) -> None:
        users = [f"usr_{number}" for number in range(6)]
        await asyncio.gather(*(buy(service, user_id) for user_id in users))
        body = '\'{"kind": "from_a_later_version"}\''
        async with service.service.database.transaction() as tx:
            await tx.execute(
                sa.text(f"UPDATE facts SET body = {body} WHERE subject_key = 'cs:cs_usr_3_premium'")
            )
        held = held_by(service)
        found = await asyncio.gather(*(plan_of(held, user_id) for user_id in users), return_exceptions=True)
        assert isinstance(found[3], ValueError)
        assert [*found[:3], *found[4:]] == ["premium"] * 5


class TestOwnChanges:
    async def test_they_show_at_once_however_much_is_asked_meanwhile(self, service: Harness) -> None:
        held = service.service.answers
        stopped = False

        async def ask_on(user_id: str) -> None:
            while not stopped:
                await held.about(user_id, ENTITLEMENTS)
                await asyncio.sleep(0)

        async def buy_and_look(user_id: str) -> None:
            for plan_code in ("premium", "vip", "enterprise"):
                await buy(service, user_id, plan_code)
                assert await plan_of(held, user_id) == plan_code

        users = [f"usr_{number}" for number in range(8)]
        askers = [asyncio.create_task(ask_on(user_id)) for user_id in users]
        try:
            await asyncio.gather(*(buy_and_look(user_id) for user_id in users))
        finally:
            stopped = True
            await asyncio.gather(*askers)

    async def test_a_persons_action_shows_at_once_too(self, service: Harness) -> None:
        held = service.service.answers
        assert await plan_of(held, "usr_1") == "free"
        grant = await service.service.grants.create(
            "usr_1",
            Terms(
                plan_code="vip", features={}, is_override=False, starts_at=None, ends_at=None, reason="test"
            ),
            actor="key:test",
            action_id="grant_1",
        )
        assert await plan_of(held, "usr_1") == "vip"
        await service.service.grants.remove(
            "usr_1", grant.made.grant_id, reason="test", actor="key:test", action_id="ungrant_1"
        )
        assert await plan_of(held, "usr_1") == "free"

    async def test_rows_that_were_read_before_a_change_and_came_after_it_are_not_given_out_again(
        self, service: Harness, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        held = held_by(service)
        has_read, may_return = asyncio.Event(), asyncio.Event()
        load_users = store_reads.load_users

        async def slow(tx: Tx, users: Sequence[str]) -> Any:
            found = await load_users(tx, users)
            has_read.set()
            await may_return.wait()
            return found

        with monkeypatch.context() as patch:
            patch.setattr(store_reads, "load_users", slow)
            early = asyncio.create_task(plan_of(held, "usr_1"))
            await has_read.wait()
        await buy(service, "usr_1")
        may_return.set()
        assert await early == "free"
        assert await plan_of(held, "usr_1") == "premium"

    async def test_of_two_reads_side_by_side_the_later_one_is_kept(
        self, quiet: Harness, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The change comes from another process, so nothing tells this one that its first read is out of date."""
        held = held_by(quiet)
        has_read, may_return = asyncio.Event(), asyncio.Event()
        load_users = store_reads.load_users

        async def slow(tx: Tx, users: Sequence[str]) -> Any:
            found = await load_users(tx, users)
            if not has_read.is_set():
                has_read.set()
                await may_return.wait()
            return found

        with monkeypatch.context() as patch:
            patch.setattr(store_reads, "load_users", slow)
            early = asyncio.create_task(plan_of(held, "usr_1"))
            await has_read.wait()
            await _as_another_process(quiet, "DELETE FROM sources")
            assert await plan_of(held, "usr_1") == "free"
            may_return.set()
            assert await early == "premium"
        assert await plan_of(held, "usr_1") == "free"


class TestExpiry:
    @pytest.mark.parametrize("kind", ["end", "start"])
    async def test_what_begins_or_ends_does_so_to_the_instant_also_while_answers_are_held(
        self, service: Harness, kind: str
    ) -> None:
        database = service.service.database
        edge = await _now(database) + timedelta(seconds=1.2)
        service.clock.instant = datetime.now(UTC)
        await service.service.grants.create(
            "usr_1",
            Terms(
                plan_code="vip",
                features={},
                is_override=False,
                starts_at=edge if kind == "start" else None,
                ends_at=edge if kind == "end" else None,
                reason="test",
            ),
            actor="key:test",
            action_id="grant_1",
        )
        before, after = ("vip", "free") if kind == "end" else ("free", "vip")
        held = service.service.answers
        seen = {before: 0, after: 0}
        with statements(service) as sent:
            while await _now(database) < edge + timedelta(seconds=0.3):
                asked_at = await _now(database)
                for _ in range(20):
                    plan_code = await plan_of(held, "usr_1")
                    seen[plan_code] += 1
                answered_at = await _now(database)
                if answered_at < edge:
                    assert plan_code == before
                if asked_at >= edge:
                    assert plan_code == after
        assert min(seen.values()) > 0
        assert reads(sent) < sum(seen.values()) / 5, "most answers must have been held ones"


async def _now(database: Database) -> datetime:
    async with database.snapshot() as tx:
        return await database_now(tx)


async def _as_another_process(harness: Harness, sql: str) -> None:
    database = Database.open(harness.service.settings.database_url)
    try:
        async with database.transaction() as tx:
            await tx.execute(sa.text(sql))
    finally:
        await database.close()
