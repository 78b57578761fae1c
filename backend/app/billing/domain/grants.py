"""What a person's grant means for access."""

from __future__ import annotations

from backend.app.billing.domain.access import Access, Reading, Source
from backend.app.billing.domain.catalog import Catalog
from backend.app.billing.domain.facts import GrantFact


def read_grant(catalog: Catalog, source: Source) -> Reading | None:
    """A manual grant: a plan or feature values from and until when, unless it was taken back."""
    facts = [fact for fact in source.facts if isinstance(fact, GrantFact)]
    if not facts:
        return None
    newest = max(facts, key=lambda fact: (fact.is_removed, fact.as_of, fact.event_id))
    plan = catalog.plans.get(newest.plan_code) if newest.plan_code is not None else None
    if newest.is_removed:
        return Reading(
            status="removed",
            as_of=newest.as_of,
            rule="grant.removed",
            event_id=newest.event_id,
            grants=False,
        )
    unknown = (f"unknown_plan:{newest.plan_code}",) if newest.plan_code is not None and plan is None else ()
    rule = "grant.override" if newest.is_override else "grant"
    access = Access(
        source=source.id,
        part="",
        plan=plan,
        features={key: value for key, value in newest.features.items() if key in catalog.features},
        is_override=newest.is_override,
        status="active",
        rule=rule,
        event_id=newest.event_id,
        starts_at=newest.starts_at,
        ends_at=newest.ends_at,
    )
    return Reading(
        status="active",
        as_of=newest.as_of,
        rule=rule,
        event_id=newest.event_id,
        grants=True,
        accesses=(access,) if plan is not None or access.features else (),
        unknown=unknown,
    )
