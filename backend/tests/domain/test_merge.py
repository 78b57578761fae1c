"""Many sources, one answer: seats, sums and overrides, as the catalog declares them."""

from __future__ import annotations

import pytest

from backend.app.billing.domain.catalog import parse_catalog
from backend.app.main import SHIPPED_CATALOG
from backend.app.simulator import objects
from backend.tests.domain.events import access_of, at, event, folded, subscription


@pytest.mark.parametrize(
    ("declared", "devices"),
    [("", 5), ("per_unit = true", 15), ("additive = true", 10), ("per_unit = true\nadditive = true", 20)],
)
def test_seats_and_sums_count_only_where_the_catalog_declares_them(declared: str, devices: int) -> None:
    """One subscription with three seats and one with a single one, both of five devices."""
    limit = '[features.max_devices]\ntype = "limit"\n'
    text = SHIPPED_CATALOG.read_text(encoding="utf-8")
    assert limit in text
    catalog = parse_catalog(text.replace(limit, f"{limit}{declared}\n"))
    user = {"user_id": "user_1"}
    state = folded(
        catalog,
        [
            event(
                f"evt_{seats}",
                "customer.subscription.created",
                subscription(
                    f"sub_{seats}", quantity=seats, metadata=user, prices=[objects.price("premium")]
                ),
            )
            for seats in (3, 1)
        ],
        now=at(0),
    ).state
    assert access_of(catalog, state, "user_1", now=at(1)).features["max_devices"] == devices
