"""Prices in the places where Stripe puts them, in every generation of its API."""

from __future__ import annotations

from collections.abc import Sequence

from backend.app.billing.domain.facts import PriceRef, PurchaseLine
from backend.app.billing.providers.fields import Fields


def price_of(entry: Fields) -> PriceRef:
    """The price of an item or line: `pricing.price_details` since basil, `price` since 2020, `plan` before.

    Sources: https://docs.stripe.com/api/subscription_items/object, https://docs.stripe.com/api/invoice-line-item/object
    """
    details = entry.object("pricing").object("price_details")
    if details.data:
        declared = details.object("price").object("metadata").text("plan_code")
        return PriceRef(
            price_id=details.id("price"),
            lookup_key=details.object("price").text("lookup_key"),
            product_id=details.id("product"),
            metadata_plan_code=declared or details.object("product").object("metadata").text("plan_code"),
        )
    price = entry.object("price") if entry.object("price").data else entry.object("plan")
    declared = price.object("metadata").text("plan_code")
    return PriceRef(
        price_id=entry.id("price") or entry.id("plan"),
        lookup_key=price.text("lookup_key"),
        product_id=price.id("product"),
        metadata_plan_code=declared or price.object("product").object("metadata").text("plan_code"),
    )


def purchase_lines(lines: Sequence[Fields]) -> tuple[PurchaseLine, ...]:
    """The lines of a purchase that name a price; free-text lines sell no plan."""
    named = [(line, price_of(line)) for line in lines]
    return tuple(
        PurchaseLine(
            line_id=line.id("id") or f"line-{index}",
            price=price,
            quantity=line.amount("quantity") or 1,
            # A session's line tells what was paid for it; an invoice's only what it cost before tax and discounts.
            amount=line.amount("amount_total"),
        )
        for index, (line, price) in enumerate(named)
        if price.price_id or price.product_id or price.lookup_key
    )


def main_price(lines: Sequence[Fields]) -> PriceRef | None:
    """The price an invoice is mostly for: that of its largest line, because prorations credit the old one."""
    best: tuple[int, PriceRef] | None = None
    for line in lines:
        price, amount = price_of(line), line.amount("amount") or 0
        if (price.price_id or price.product_id) and (best is None or amount > best[0]):
            best = (amount, price)
    return best[1] if best else None
