"""Before a changed catalog is applied, it is told who would gain or lose what, and how many."""

from __future__ import annotations

from typing import Any

from backend.app.billing.catalog_diff import EXAMPLES_MAX, CatalogDiff, Direction, compare_catalogs
from backend.app.billing.domain.catalog import parse_catalog
from backend.app.main import SHIPPED_CATALOG
from backend.app.simulator import objects
from backend.app.simulator.objects import MONTH_SECONDS
from backend.tests.support.billing import Harness, unix_now

SHIPPED = SHIPPED_CATALOG.read_text(encoding="utf-8")
PREMIUM_FEATURES = 'max_devices = 5, analytics_level = "advanced"'


async def subscribe(service: Harness, number: int, lookup_key: str, **rest: Any) -> None:
    now = unix_now()
    content = objects.subscription(
        f"sub_{number}",
        customer=f"cus_{number}",
        prices=[objects.price(lookup_key)],
        period_start=now - 60,
        period_end=now + MONTH_SECONDS,
        metadata={"user_id": f"user_{number:03}"},
        **rest,
    )
    event = objects.event(f"evt_{number}", "customer.subscription.created", content, created=now - 60)
    assert (await service.deliver(event)).status_code == 200


async def difference(service: Harness, old: str, new: str) -> CatalogDiff:
    return await compare_catalogs(
        service.service.database, parse_catalog(old), parse_catalog(new), now=service.clock.now()
    )


def told(diff: CatalogDiff) -> dict[tuple[str, Any, Any], tuple[Direction, int]]:
    return {
        (effect.what, effect.before, effect.after): (effect.direction, group.count)
        for effect, group in diff.groups.items()
    }


async def test_the_same_catalog_changes_nothing_for_anybody(service: Harness) -> None:
    await subscribe(service, 1, "premium")
    diff = await difference(service, SHIPPED, SHIPPED)
    assert (diff.users, diff.users_changed, diff.groups) == (1, 0, {})


async def test_a_feature_that_grows_and_one_that_shrinks_are_told_apart(service: Harness) -> None:
    for number, plan in enumerate(("premium", "premium", "vip")):
        await subscribe(service, number, plan)
    assert PREMIUM_FEATURES in SHIPPED
    new = SHIPPED.replace(PREMIUM_FEATURES, 'max_devices = 7, analytics_level = "basic"')
    diff = await difference(service, SHIPPED, new)
    assert (diff.users, diff.users_changed) == (3, 2)
    assert told(diff) == {
        ("feature max_devices", 5, 7): (Direction.GAIN, 2),
        ("feature analytics_level", "advanced", "basic"): (Direction.LOSS, 2),
    }
    assert diff.document()["groups"][0]["direction"] == "loss"
    assert diff.document()["groups"][0]["users"] == ["user_000", "user_001"]


async def test_a_price_that_is_no_longer_mapped_takes_the_plan_away(service: Harness) -> None:
    await subscribe(service, 1, "vip")
    new = SHIPPED.replace('lookup_keys = ["vip", ', "lookup_keys = [")
    found = told(await difference(service, SHIPPED, new))
    assert found["plan_code", "vip", "free"] == (Direction.LOSS, 1)
    assert found["status", "active", "unmapped"] == (Direction.OTHER, 1)
    assert found["valid_until", "a date", "never"] == (Direction.OTHER, 1)


async def test_a_shorter_grace_moves_the_end_and_nothing_else(service: Harness) -> None:
    await subscribe(service, 1, "premium", status="past_due")
    new = SHIPPED.replace("past_due_grace_days = 14", "past_due_grace_days = 3")
    assert told(await difference(service, SHIPPED, new)) == {
        ("valid_until", "a date", "an earlier date"): (Direction.LOSS, 1)
    }


async def test_many_users_are_counted_and_a_few_are_named(sqlite_service: Harness) -> None:
    users = EXAMPLES_MAX + 3
    for number in range(users):
        await subscribe(sqlite_service, number, "premium")
    diff = await difference(sqlite_service, SHIPPED, SHIPPED.replace("max_devices = 5", "max_devices = 6"))
    ((_, group),) = diff.groups.items()
    assert (group.count, len(group.users)) == (users, EXAMPLES_MAX)


async def test_a_comparison_writes_nothing(sqlite_service: Harness) -> None:
    await subscribe(sqlite_service, 1, "vip")
    before = await sqlite_service.rows("SELECT * FROM user_entitlements")
    audited = await sqlite_service.count("audit_logs")
    await difference(sqlite_service, SHIPPED, SHIPPED.replace("max_devices = 10", "max_devices = 2"))
    assert await sqlite_service.rows("SELECT * FROM user_entitlements") == before
    assert await sqlite_service.count("audit_logs") == audited
