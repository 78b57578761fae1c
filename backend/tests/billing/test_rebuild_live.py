"""A rebuild knows what people said, and lives beside a service that goes on serving."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from backend.app.billing.party_index import Node, NodeKind
from backend.app.billing.rebuild import LOCK_ROUNDS_MAX, Rebuild, _Run
from backend.app.core.api_keys import Scope
from backend.app.core.clock import SystemClock
from backend.app.core.database import Database
from backend.app.core.settings import Settings
from backend.app.main import load_catalog
from backend.app.simulator import objects
from backend.app.simulator.objects import DAY_SECONDS, MONTH_SECONDS
from backend.tests.billing.test_rebuild import check, life, rebuild_of
from backend.tests.faults.processes import environment
from backend.tests.support.billing import Harness, unix_now
from backend.tests.support.load import send_all
from backend.tests.support.service import ServiceProcess

PEOPLE = 8


class Admin:
    """A person with an admin key."""

    def __init__(self, service: Harness) -> None:
        self._service = service
        self._actions = 0

    async def _ask(self, method: str, path: str, **rest: Any) -> dict[str, Any]:
        self._actions += 1
        self._service.clock.advance(seconds=1)
        key = await self._service.service.api_keys.create("alice", Scope.ADMIN)
        response = await self._service.client.request(
            method,
            f"/api/v1/users/{path}",
            headers={"Authorization": f"Bearer {key}", "Idempotency-Key": f"k{self._actions}"},
            **rest,
        )
        assert response.is_success, response.text
        document: dict[str, Any] = response.json()
        return document

    async def grant(self, user_id: str, **terms: Any) -> str:
        """Grants something; the grant's id."""
        made = await self._ask("POST", f"{user_id}/grants", json={"reason": "kindness", **terms})
        return str(made["id"])

    async def remove(self, user_id: str, grant_id: str) -> None:
        """Takes a grant back."""
        await self._ask("DELETE", f"{user_id}/grants/{grant_id}", params={"reason": "enough"})

    async def claim(self, user_id: str, **wanted: Any) -> None:
        """Gives a source or a customer to a user."""
        await self._ask("POST", f"{user_id}/claims", json={"reason": "receipt", "move": True, **wanted})


async def deliver(service: Harness, *events: dict[str, Any]) -> None:
    for event in events:
        response = await service.deliver(event)
        assert response.status_code == 200, response.text


def guest_purchase(number: int, **rest: Any) -> dict[str, Any]:
    session = objects.checkout_session(f"cs_{number}", metadata={"plan_code": "premium"}, **rest)
    return objects.event(
        f"evt_{number}", "checkout.session.completed", session, created=unix_now() - DAY_SECONDS
    )


async def without_a_subscription(_service: Harness, admin: Admin) -> None:
    """A grant to a stranger, an override, a future grant, and one that is taken back."""
    await admin.grant("user_1", plan_code="vip")
    await admin.grant("user_1", features={"max_devices": 3}, override=True)
    await admin.grant("user_2", plan_code="vip", starts_at="2099-01-01T00:00:00Z")
    await admin.remove("user_3", await admin.grant("user_3", plan_code="premium"))


async def beside_a_subscription(service: Harness, admin: Admin) -> None:
    """Grants before, between and after a user's events."""
    events = life(1, now=unix_now())
    first = await admin.grant("user_1", plan_code="enterprise")
    await deliver(service, *events[:4])
    await admin.grant("user_1", features={"copy_trading": True})
    await deliver(service, *events[4:8])
    await admin.remove("user_1", first)
    await deliver(service, *events[8:])


async def a_claimed_purchase(service: Harness, admin: Admin) -> None:
    """A guest's purchase is claimed, moved to somebody else, and refunded."""
    await deliver(service, guest_purchase(1, payment_intent="pi_1"))
    await admin.claim("user_1", source="cs:cs_1")
    await admin.claim("user_2", source="cs:cs_1")
    refund = objects.refund("re_1", intent_id="pi_1", charge_id="ch_1")
    await deliver(service, objects.event("evt_re", "refund.created", refund, created=unix_now() - 60))


async def a_claimed_customer(service: Harness, admin: Admin) -> None:
    """A customer is claimed before anything is heard of it, then after, then goes to another user."""
    await admin.claim("user_2", customer_id="cus_early")
    await deliver(service, guest_purchase(1, customer="cus_early"))
    await deliver(service, guest_purchase(2, customer="cus_late"))
    await admin.claim("user_1", customer_id="cus_late")
    await admin.claim("user_2", customer_id="cus_late")
    await deliver(service, guest_purchase(3, customer="cus_late"))


async def a_corrected_mistake(service: Harness, admin: Admin) -> None:
    """A customer whose own events name one user is tied to a second one, and back."""
    await deliver(service, *life(1, now=unix_now()))
    await admin.claim("user_2", customer_id="cus_1")
    await deliver(service, guest_purchase(77, customer="cus_1"))
    await admin.claim("user_1", customer_id="cus_1")


async def a_customer_given_back(service: Harness, admin: Admin) -> None:
    """A guest's customer goes to one user, to another, and back."""
    for number, user_id in enumerate(("user_1", "user_2", "user_1")):
        await deliver(service, guest_purchase(number, customer="cus_guest"))
        await admin.claim(user_id, customer_id="cus_guest")
    await deliver(service, guest_purchase(9, customer="cus_guest"))


STORIES: list[Callable[[Harness, Admin], Coroutine[Any, Any, None]]] = [
    without_a_subscription,
    beside_a_subscription,
    a_claimed_purchase,
    a_claimed_customer,
    a_corrected_mistake,
    a_customer_given_back,
]


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
async def test_what_people_said_is_no_difference_and_is_not_undone(
    service: Harness, story: Callable[[Harness, Admin], Coroutine[Any, Any, None]]
) -> None:
    await story(service, Admin(service))
    rows = await service.rows("SELECT * FROM user_entitlements ORDER BY user_id")
    assert (await check(service)).differences == []
    assert (await rebuild_of(service).run()).difference_count == 0
    assert await service.rows("SELECT * FROM user_entitlements ORDER BY user_id") == rows


async def test_what_people_say_during_a_run_is_not_undone(
    service: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grants, claims and ties have no place among the events' positions; they are found by whom they concern."""
    admin = Admin(service)
    await deliver(service, *life(1, now=unix_now()), *life(2, now=unix_now()), guest_purchase(77))
    await deliver(service, guest_purchase(78, customer="cus_78"))
    removed = await admin.grant("user_2", plan_code="enterprise")
    original = _Run.look_at_parties

    async def look_late(run: _Run) -> None:
        await admin.grant("user_1", plan_code="enterprise")
        await admin.grant("user_new", plan_code="vip")
        await admin.remove("user_2", removed)
        await admin.claim("user_2", source="cs:cs_77")
        await admin.claim("user_1", customer_id="cus_78")
        await original(run)

    monkeypatch.setattr(_Run, "look_at_parties", look_late)
    assert (await check(service)).differences == []
    admin = Admin(service)
    admin._actions = 100
    assert (await rebuild_of(service).run()).difference_count == 0


async def test_the_users_of_an_account_that_left_lose_their_access_by_a_rebuild(service: Harness) -> None:
    """One account may have any number of users; their rows follow with their next event or a rebuild."""
    now = unix_now()
    subscriptions = [
        objects.event(
            f"evt_{number}",
            "customer.subscription.created",
            objects.subscription(
                f"sub_{number}",
                customer=f"cus_{number}",
                prices=[objects.price("vip")],
                period_start=now - 60,
                period_end=now + MONTH_SECONDS,
                metadata={"user_id": f"user_{number}"},
            ),
            created=now - 60,
            account="acct_1",
        )
        for number in range(2)
    ]
    await deliver(service, *subscriptions)
    left = objects.event(
        "evt_left", "account.application.deauthorized", {"id": "ca_1"}, created=now - 30, account="acct_1"
    )
    await deliver(service, left)
    late = {**subscriptions[0], "id": "evt_late", "type": "customer.subscription.updated"}
    # Its row is right already, because something was heard of it since.
    await deliver(service, late)
    assert {difference.key for difference in (await check(service)).differences} == {("user_1",)}
    await rebuild_of(service).run()
    rows = await service.rows("SELECT plan_code FROM user_entitlements")
    assert [row["plan_code"] for row in rows] == ["free", "free"]
    assert (await check(service)).differences == []


async def test_a_party_of_many_hundred_subjects_is_corrected(sqlite_service: Harness) -> None:
    """A customer of many years is one party, however many payments they made."""
    service, now = sqlite_service, unix_now()
    await deliver(service, *life(1, now=now))
    for number in range(260):
        charge = objects.charge(f"ch_m{number}", customer="cus_1", payment_intent=f"pi_m{number}")
        await deliver(service, objects.event(f"evt_m{number}", "charge.succeeded", charge, created=now - 60))
    async with service.service.database.transaction() as tx:
        await tx.execute(sa.text("UPDATE payment_events SET amount = 1 WHERE effect_key LIKE '%ch_m%'"))
    assert (await rebuild_of(service).run()).difference_count == 260
    assert (await check(service)).differences == []


async def test_parties_that_keep_growing_are_corrected_one_by_one(
    sqlite_service: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deliveries for one of them come at each attempt to correct several at once."""
    service = sqlite_service
    await deliver(service, *(event for number in range(4) for event in life(number, now=unix_now())))
    async with service.service.database.transaction() as tx:
        await tx.execute(sa.text("UPDATE payment_events SET amount = 1"))
    damaged = (await check(service)).difference_count
    original = _Run._parties_of
    attempts = 0

    def parties_of(run: _Run, nodes: Any, last: int) -> list[int]:
        nonlocal attempts
        found = original(run, nodes, last)
        if len(found) > 1:
            attempts += 1
            newcomer = Node(NodeKind.SUBJECT, "", False, f"ch:new_{attempts}")
            growing = run.file.parties.nodes_of(found[-1])[0]
            run_join.append((run, {newcomer, growing}))
        return found

    run_join: list[tuple[_Run, set[Node]]] = []
    catch_up = _Run._catch_up

    async def catch_up_and_grow(run: _Run, tx: Any) -> None:
        await catch_up(run, tx)
        while run_join:
            grown, nodes = run_join.pop()
            grown._join(nodes)

    monkeypatch.setattr(_Run, "_parties_of", parties_of)
    monkeypatch.setattr(_Run, "_catch_up", catch_up_and_grow)
    assert (await rebuild_of(service).run()).difference_count == damaged
    assert attempts > LOCK_ROUNDS_MAX
    monkeypatch.undo()
    assert (await check(service)).differences == []


async def test_a_rebuild_beside_a_serving_process_loses_nothing(migrated_url: str, tmp_path: Path) -> None:
    """Deliveries keep arriving in another process while damage is repaired here, again and again."""
    now = unix_now()
    early = [json.dumps(event).encode() for number in range(PEOPLE) for event in life(number, now=now)]
    late = [
        json.dumps(event).encode() for number in range(PEOPLE, 2 * PEOPLE) for event in life(number, now=now)
    ]
    # The same people again: their parties grow while they are being corrected.
    late += [
        json.dumps(
            objects.event(
                f"evt_more_{number}_{place}",
                "charge.succeeded",
                objects.charge(f"ch_more_{number}_{place}", customer=f"cus_{number}"),
                created=now - DAY_SECONDS,
            )
        ).encode()
        for place in range(5)
        for number in range(PEOPLE)
    ]
    database = Database.open(migrated_url)
    settings = Settings(database_url=migrated_url)

    def rebuild() -> Rebuild:
        return Rebuild(database, load_catalog(settings), clock=SystemClock(), livemode=settings.livemode)

    with ServiceProcess.start(tmp_path, environment(migrated_url)) as service:
        for reply in await send_all([service.port], early, connections=4):
            assert reply is not None
            assert reply.status == 200
        sending = asyncio.create_task(send_all([service.port], late, connections=4))
        runs = repaired = 0
        while not sending.done():
            async with database.transaction() as tx:
                await tx.execute(sa.text("UPDATE payment_events SET amount = 1 WHERE effect_key = 'in:in_1'"))
                await tx.execute(
                    sa.text("UPDATE user_entitlements SET plan_code = 'free' WHERE user_id = 'user_2'")
                )
            repaired += (await rebuild().run()).difference_count
            runs += 1
        replies = await sending
    assert [reply.status if reply else None for reply in replies] == [200] * len(late)
    assert runs > 0
    assert repaired >= runs
    report = await rebuild().check()
    assert (report.differences, report.events) == ([], len(early) + len(late))
    await database.close()
