"""One answer from many sources: reads each source, and merges what is live at an instant feature by feature."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from backend.app.billing.domain.access import Access, Reading, Source
from backend.app.billing.domain.catalog import Catalog, Plan
from backend.app.billing.domain.facts import FeatureValue
from backend.app.billing.domain.grants import read_grant
from backend.app.billing.domain.purchases import read_checkout, read_manual_invoice, read_payment_intent
from backend.app.billing.domain.subscriptions import read_subscription

# The status of a user from whom nothing was ever heard, of one whose last source ran out by itself, and of
# one who paid for something that the catalog does not know.
NO_SOURCE_STATUS = "none"
EXPIRED_STATUS = "expired"
UNMAPPED_STATUS = "unmapped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entitlement:
    """What a user may do: the plan in front, every feature's value, and until when this answer holds."""

    user_id: str
    plan_code: str
    status: str
    features: Mapping[str, FeatureValue]
    valid_until: datetime | None
    activated_at: datetime | None = None
    version: int = 0


def read_source(
    catalog: Catalog, source: Source, *, at: datetime | None = None, is_part_of_another: bool = False
) -> Reading | None:
    """The meaning of all that is known of a source, or was at an instant; None where it gives nothing to read.

    The order in which the facts came does not matter.
    """
    if at is not None:
        source = replace(source, facts=tuple(fact for fact in source.facts if fact.as_of <= at))
    match source.id.kind:
        case "sub":
            return read_subscription(catalog, source)
        case "cs":
            return read_checkout(catalog, source)
        case "in":
            return read_manual_invoice(catalog, source, is_part_of_another=is_part_of_another)
        case "pi":
            return read_payment_intent(catalog, source, is_part_of_another=is_part_of_another)
        case "grant":
            return read_grant(catalog, source)
    return None


def entitlement_of(
    catalog: Catalog,
    user_id: str,
    readings: Sequence[Reading],
    *,
    at: datetime,
    version: int = 0,
    activated_at: datetime | None = None,
) -> Entitlement:
    """What a user may do at an instant, merged from the readings of all of their sources."""
    live = live_accesses(readings, at)
    plan, status = _standing(catalog, readings, live, at)
    features = _features(catalog, live)

    def is_another_at(edge: datetime) -> bool:
        then = live_accesses(readings, edge)
        # Mostly the plan ends: then there is no need to look at each feature.
        return (
            _standing(catalog, readings, then, edge) != (plan, status) or _features(catalog, then) != features
        )

    return Entitlement(
        user_id=user_id,
        plan_code=plan.code,
        status=status,
        features=features,
        valid_until=next(filter(is_another_at, boundaries(readings, at)), None),
        activated_at=activated_at,
        version=version,
    )


def boundaries(readings: Iterable[Reading], after: datetime) -> list[datetime]:
    """The instants after one at which an access begins or ends, in order."""
    edges = {
        edge
        for reading in readings
        for access in reading.accesses
        for edge in (access.starts_at, access.ends_at)
        if edge is not None and edge > after
    }
    return sorted(edges)


def feature_value(
    catalog: Catalog, key: str, live: Sequence[Access]
) -> tuple[FeatureValue, tuple[Access, ...]]:
    """A feature's value from the accesses that are live, and the accesses that give it this value."""
    feature, default = catalog.features[key], catalog.default_plan.features[key]
    if not live:
        return default, ()
    overrides = [access for access in live if access.is_override and key in access.features]
    if overrides:
        # Of several overrides the newest was meant to replace the others.
        newest = max(overrides, key=lambda access: (access.starts_at, access.event_id))
        return newest.features[key], (newest,)
    given: list[tuple[FeatureValue, Access]] = []
    for access in live:
        if access.is_override:
            continue
        if access.plan is not None:
            given.append((feature.times(access.plan.features[key], access.quantity), access))
        if key in access.features:
            given.append((access.features[key], access))
    value = feature.merged(default, [value for value, _ in given])
    if feature.is_additive:
        return value, tuple(access for _, access in given)
    return value, tuple(access for own, access in given if own == value)


def live_accesses(readings: Iterable[Reading], at: datetime) -> list[Access]:
    """The accesses that hold at an instant."""
    return [access for reading in readings for access in reading.accesses if access.is_live(at)]


def _features(catalog: Catalog, live: Sequence[Access]) -> dict[str, FeatureValue]:
    return {key: feature_value(catalog, key, live)[0] for key in catalog.features}


def _standing(
    catalog: Catalog, readings: Sequence[Reading], live: Sequence[Access], at: datetime
) -> tuple[Plan, str]:
    """The plan and the status that speak for the user."""
    first = front_access(live, at)
    if first is not None and first.plan is not None:
        return first.plan, first.status
    if live:
        return catalog.default_plan, live[0].status
    newest = max(readings, key=lambda reading: (reading.as_of, reading.event_id), default=None)
    if newest is None:
        return catalog.default_plan, NO_SOURCE_STATUS
    if newest.grants:
        # It would give access, but has run out, or sells nothing that the catalog knows.
        return catalog.default_plan, EXPIRED_STATUS if newest.accesses else UNMAPPED_STATUS
    return catalog.default_plan, newest.status


def front_access(live: Iterable[Access], at: datetime) -> Access | None:
    """The access that speaks for the user: of the highest plan the one that lasts longest."""
    with_plan = [access for access in live if access.plan is not None]
    return max(
        with_plan,
        key=lambda access: (
            access.plan.rank if access.plan else -1,
            access.ends_at is None,
            access.ends_at or at,
            access.source,
            access.part,
        ),
        default=None,
    )
