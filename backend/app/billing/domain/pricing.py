"""Which plan a price sells: the catalog first, then what the price declares, then the hint around it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from backend.app.billing.domain.catalog import Catalog, Plan
from backend.app.billing.domain.facts import PriceRef

# A purchase whose event names neither price nor plan; Stripe sends a session's lines only when it is asked.
NO_PLAN_NAMED = "unknown_plan:none named"

Part = TypeVar("Part")


def resolve_plan(catalog: Catalog, price: PriceRef | None, plan_hint: str | None) -> Plan | None:
    """The plan of one price, or None."""
    if price is not None:
        mapped = catalog.plan_of_price(price)
        if mapped is not None:
            return mapped
        if price.metadata_plan_code is not None:
            return catalog.plans.get(price.metadata_plan_code)
    return catalog.plans.get(plan_hint) if plan_hint is not None else None


def plans_of(
    catalog: Catalog, parts: Sequence[tuple[PriceRef, Part]], plan_hint: str | None
) -> tuple[list[tuple[Plan, Part]], tuple[str, ...]]:
    """The plans of a source's items or lines, and the names that the catalog lacks.

    The hint (metadata of the subscription or session) speaks for the source as a whole: it is taken
    only where no price of it says anything, because it goes stale when a price changes.
    """
    plans: list[tuple[Plan, Part]] = []
    unknown: list[str] = []
    for price, part in parts:
        plan = resolve_plan(catalog, price, None)
        if plan is not None:
            plans.append((plan, part))
        elif price.metadata_plan_code is not None:
            unknown.append(f"unknown_plan:{price.metadata_plan_code}")
        elif price != PriceRef():
            unknown.append(f"unknown_price:{price.name}")
    silent = not plans and all(price.metadata_plan_code is None for price, _ in parts)
    if not silent:
        return plans, tuple(unknown)
    if plan_hint is None:
        return [], tuple(unknown) or (NO_PLAN_NAMED,)
    if plan_hint not in catalog.plans:
        return [], (f"unknown_plan:{plan_hint}",)
    return [(catalog.plans[plan_hint], part) for _, part in parts[:1]], ()


def highest(plans: Iterable[tuple[Plan, Part]]) -> Plan | None:
    """The plan of the highest rank."""
    return max((plan for plan, _ in plans), key=lambda plan: plan.rank, default=None)
