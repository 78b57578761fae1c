"""The catalog: what the shipped one sells, how features merge, and errors that name the key."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from backend.app.billing.domain.catalog import Catalog, CatalogError, parse_catalog
from backend.app.billing.domain.facts import PriceRef
from backend.app.billing.domain.merge import entitlement_of
from backend.app.main import SHIPPED_CATALOG
from backend.tests.domain.events import at, shipped_catalog

SMALL = """
default_plan = "free"
[features.on]
type = "boolean"
[features.seats]
type = "limit"
[features.support]
type = "level"
levels = ["none", "mail", "phone"]
[plans.free]
features = { on = false, seats = 1, support = "none" }
[plans.team]
prices = ["price_team"]
lookup_keys = ["team"]
products = ["prod_team"]
features = { on = true, seats = 5, support = "mail" }
[plans.call]
prices = ["price_call"]
features = { on = false, seats = 2, support = "phone" }
[policy]
version = 1
renewal_slack_hours = 72
past_due_grace_days = 14
unpaid = "revoke"
pause_collection_void = "keep"
pause_collection_keep_as_draft = "keep"
pause_collection_mark_uncollectible = "keep"
refund_revoke_percent = 100
refund_partial = "keep"
refund_subscription = "keep"
dispute_open = "revoke"
dispute_lost = "revoke"
fraud_warning = "keep"
"""


def small() -> Catalog:
    return parse_catalog(SMALL)


def changed(old: str, new: str) -> str:
    assert old in SMALL
    return SMALL.replace(old, new, 1)


@pytest.mark.parametrize(
    ("plan", "features"),
    [
        ("free", (True, 1, "basic", False, False)),
        ("premium", (True, 5, "advanced", False, False)),
        ("vip", (True, 10, "pro", True, False)),
        ("enterprise", (True, 999, "enterprise", True, True)),
    ],
)
def test_the_shipped_plans_unlock_what_is_promised(
    plan: str, features: tuple[bool, int, str, bool, bool]
) -> None:
    keys = ("signals_enabled", "max_devices", "analytics_level", "copy_trading", "dedicated_support")
    assert dict(shipped_catalog().plans[plan].features) == dict(zip(keys, features, strict=True))


@pytest.mark.parametrize("plan", ["premium", "vip", "enterprise"])
@pytest.mark.parametrize("suffix", ["", "_monthly", "_yearly"])
def test_the_shipped_plans_are_sold_under_their_lookup_keys(plan: str, suffix: str) -> None:
    found = shipped_catalog().plan_of_price(PriceRef(lookup_key=f"{plan}{suffix}"))
    assert found is not None
    assert found.code == plan


def test_everybody_has_the_default_plan() -> None:
    catalog = shipped_catalog()
    assert catalog.default_plan.code == "free"
    nobody = entitlement_of(catalog, "user_9", [], at=at(0))
    assert dict(nobody.features) == dict(catalog.plans["free"].features)


def test_plans_rank_in_the_order_of_the_file() -> None:
    plans = shipped_catalog().plans.values()
    assert [plan.code for plan in sorted(plans, key=lambda plan: plan.rank)] == [
        "free",
        "premium",
        "vip",
        "enterprise",
    ]


@pytest.mark.parametrize(
    ("price", "plan"),
    [
        (PriceRef(price_id="price_call", lookup_key="team", product_id="prod_team"), "call"),
        (PriceRef(price_id="price_other", lookup_key="team"), "team"),
        (PriceRef(price_id="price_other", lookup_key="other", product_id="prod_team"), "team"),
        (PriceRef(price_id="price_other", lookup_key="other", product_id="prod_other"), None),
        (PriceRef(), None),
    ],
)
def test_a_price_is_known_by_its_id_then_its_lookup_key_then_its_product(
    price: PriceRef, plan: str | None
) -> None:
    found = small().plan_of_price(price)
    assert (found.code if found else None) == plan


def test_several_sources_give_the_best_of_each_feature() -> None:
    """Booleans or, limits the largest, levels by their order and not by the alphabet."""
    catalog = small()
    default, call, team = (catalog.plans[code].features for code in ("free", "call", "team"))
    merged = {
        key: feature.merged(default[key], [call[key], team[key]]) for key, feature in catalog.features.items()
    }
    assert merged == {"on": True, "seats": 5, "support": "phone"}


def test_the_policy_is_read_with_its_units() -> None:
    policy = small().policy
    assert policy.renewal_slack.total_seconds() == 72 * 3600
    assert policy.past_due_grace.days == 14


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plans =", "not valid TOML: Invalid value (at end of document)"),
        (changed('default_plan = "free"', ""), "default_plan: a text is expected"),
        (
            changed('default_plan = "free"', 'default_plan = "gold"'),
            "line 2, default_plan: there is no plan 'gold'",
        ),
        ('default_plan = "free"', "features: a table is expected"),
        ('default_plan = "free"\n[features]', "plans: a table is expected"),
        (SMALL.partition("[policy]")[0], "policy: a table is expected"),
        (
            changed("[policy]", "[other]"),
            "line 20, other: there is no such key; known are default_plan, features, plans, policy",
        ),
        (
            changed("renewal_slack_hours = 72", ""),
            "line 20, policy.renewal_slack_hours: a whole number from 0 to 100000 is expected",
        ),
        (
            changed("past_due_grace_days = 14", "past_due_grace_days = -1"),
            "line 23, policy.past_due_grace_days: a whole number from 0 to 100000 is expected",
        ),
        (
            changed("past_due_grace_days = 14", "past_due_grace_days = true"),
            "line 23, policy.past_due_grace_days: a whole number from 0 to 100000 is expected",
        ),
        (
            changed("[features.on]", "[features]\non = 1\n[features.on2]"),
            "line 4, features.on: a table is expected",
        ),
        (
            changed('type = "boolean"', 'type = "switch"'),
            "line 4, features.on.type: 'switch' is not boolean, limit or level",
        ),
        (changed('type = "boolean"', ""), "line 3, features.on.type: a text is expected"),
        (
            changed('levels = ["none", "mail", "phone"]', ""),
            "line 7, features.support.levels: name each level once, from low to high",
        ),
        (
            changed('levels = ["none", "mail", "phone"]', 'levels = ["none", "mail", "none"]'),
            "line 9, features.support.levels: name each level once, from low to high",
        ),
        (
            changed('levels = ["none", "mail", "phone"]', 'levels = "none"'),
            "line 9, features.support.levels: a list of texts is expected",
        ),
        (
            changed("on = true, seats = 5,", "seats = 5,"),
            "line 16, plans.team.features: the feature 'on' is missing",
        ),
        (
            changed("on = true,", "on = true, colour = 1,"),
            "line 16, plans.team.features.colour: there is no such feature",
        ),
        (changed("on = true,", "on = 1,"), "line 16, plans.team.features.on: 1 is not a boolean"),
        (changed("seats = 5", "seats = true"), "line 16, plans.team.features.seats: True is not a limit"),
        (changed("seats = 5", "seats = -5"), "line 16, plans.team.features.seats: -5 is not a limit"),
        (
            changed('support = "mail"', 'support = "fax"'),
            "line 16, plans.team.features.support: 'fax' is not one of ['none', 'mail', 'phone']",
        ),
        (
            changed('prices = ["price_team"]', "prices = [5]"),
            "line 13, plans.team.prices: a list of texts is expected",
        ),
        (
            changed('products = ["prod_team"]', 'products = [""]'),
            "line 15, plans.team.products: a list of texts is expected",
        ),
        (
            changed('prices = ["price_call"]', 'prices = ["price_team"]'),
            "line 18, plans.call.prices: 'price_team' also names plan 'team'",
        ),
        (
            changed('unpaid = "revoke"', 'unpaid = "maybe"'),
            'line 24, policy.unpaid: "keep" or "revoke" is expected',
        ),
        (
            changed("refund_revoke_percent = 100", "refund_revoke_percent = 0"),
            "line 28, policy.refund_revoke_percent: a percentage from 1 to 100 is expected",
        ),
        (
            changed('refund_partial = "keep"', 'refund_partial = "revoke"'),
            'line 29, policy.refund_partial: "keep" or "reduce_quantity" is expected',
        ),
        (
            changed("version = 1", "version = 2"),
            "line 21, policy.version: this release understands version 1 only",
        ),
        (
            changed('type = "boolean"', 'type = "boolean"\nper_unit = true'),
            "line 4, features.on.type: only a limit can be per_unit or additive",
        ),
    ],
)
def test_a_catalog_error_names_the_key_and_what_is_expected_there(text: str, message: str) -> None:
    with pytest.raises(CatalogError) as caught:
        parse_catalog(text)
    assert str(caught.value) == message


def test_the_documentation_names_every_policy_with_its_shipped_answer() -> None:
    policy = tomllib.loads(SHIPPED_CATALOG.read_text(encoding="utf-8"))["policy"]
    document = (Path(__file__).parents[3] / "docs" / "policy.md").read_text(encoding="utf-8")
    for key, answer in policy.items():
        assert f"| `{key}` | `{answer}` |" in document
