"""The catalog: what the shipped one sells, how features merge, and errors that name the key."""

from __future__ import annotations

import pytest

from backend.app.billing.domain.catalog import Catalog, CatalogError, parse_catalog
from backend.app.billing.domain.facts import PriceRef
from backend.tests.domain.events import shipped_catalog

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
renewal_slack_hours = 72
past_due_grace_days = 14
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
    assert catalog.merge([]) == dict(catalog.plans["free"].features)


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
    merged = catalog.merge([catalog.plans["call"], catalog.plans["team"]])
    assert merged == {"on": True, "seats": 5, "support": "phone"}


def test_the_policy_is_read_with_its_units() -> None:
    policy = small().policy
    assert policy.renewal_slack.total_seconds() == 72 * 3600
    assert policy.past_due_grace.days == 14


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plans =", "not valid TOML"),
        (changed('default_plan = "free"', ""), "^default_plan: a text is expected$"),
        (
            changed('default_plan = "free"', 'default_plan = "gold"'),
            "^default_plan: there is no plan 'gold'$",
        ),
        ('default_plan = "free"', "^features: a table is expected$"),
        ('default_plan = "free"\n[features]', "^plans: a table is expected$"),
        (changed("[policy]", "[other]"), "^policy: a table is expected$"),
        (
            changed("renewal_slack_hours = 72", ""),
            "^policy.renewal_slack_hours: a whole number of 0 or more is expected$",
        ),
        (
            changed("past_due_grace_days = 14", "past_due_grace_days = -1"),
            "^policy.past_due_grace_days: a whole number of 0 or more is expected$",
        ),
        (
            changed("past_due_grace_days = 14", "past_due_grace_days = true"),
            "^policy.past_due_grace_days: a whole number of 0 or more is expected$",
        ),
        (
            changed("[features.on]", "[features]\non = 1\n[features.on2]"),
            "^features.on: a table is expected$",
        ),
        (changed('type = "boolean"', 'type = "switch"'), "^features.on.type: 'switch' is not boolean"),
        (changed('type = "boolean"', ""), "^features.on.type: a text is expected$"),
        (
            changed('levels = ["none", "mail", "phone"]', ""),
            "^features.support.levels: name each level once, from low to high$",
        ),
        (
            changed('levels = ["none", "mail", "phone"]', 'levels = ["none", "mail", "none"]'),
            "^features.support.levels: name each level once, from low to high$",
        ),
        (
            changed('levels = ["none", "mail", "phone"]', 'levels = "none"'),
            "^features.support.levels: a list of texts is expected$",
        ),
        (
            changed("on = true, seats = 5,", "seats = 5,"),
            "^plans.team.features: the feature 'on' is missing$",
        ),
        (
            changed("on = true,", "on = true, colour = 1,"),
            "^plans.team.features.colour: there is no such feature$",
        ),
        (changed("on = true,", "on = 1,"), "^plans.team.features.on: 1 is not a boolean$"),
        (changed("seats = 5", "seats = true"), "^plans.team.features.seats: True is not a limit$"),
        (changed("seats = 5", "seats = -5"), "^plans.team.features.seats: -5 is not a limit$"),
        (
            changed('support = "mail"', 'support = "fax"'),
            r"^plans.team.features.support: 'fax' is not one of \['none', 'mail', 'phone'\]$",
        ),
        (
            changed('prices = ["price_team"]', "prices = [5]"),
            "^plans.team.prices: a list of texts is expected$",
        ),
        (
            changed('products = ["prod_team"]', 'products = [""]'),
            "^plans.team.products: a list of texts is expected$",
        ),
        (
            changed('prices = ["price_call"]', 'prices = ["price_team"]'),
            "^plans.call.prices: 'price_team' also names plan 'team'$",
        ),
    ],
)
def test_a_catalog_error_names_the_key_and_what_is_expected_there(text: str, message: str) -> None:
    with pytest.raises(CatalogError, match=message):
        parse_catalog(text)
