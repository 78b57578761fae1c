"""What another catalog or policy would do to every present user, before it is applied; changes nothing.

diff = await compare_catalogs(database, old, new, now=...)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from backend.app.billing import store_state
from backend.app.billing.domain.catalog import Catalog
from backend.app.billing.domain.facts import FeatureValue, SubjectId
from backend.app.billing.domain.merge import Entitlement, entitlement_of
from backend.app.billing.domain.state import State, around
from backend.app.billing.store_rebuild import count_users, hold_still, load_users_after
from backend.app.core.database import Database

# Users whose sources are in memory at a time; a user has a few dozen facts.
PAGE_USERS = 100
# Enough to look at by hand; the count tells the rest.
EXAMPLES_MAX = 10
# Groups are few unless a limit counts seats; beyond this the rest is counted as one.
GROUPS_MAX = 1_000
REST = "other differences"


class Direction(StrEnum):
    """Whether users are better off; a change of words only, such as of a status, is neither."""

    GAIN = "gain"
    LOSS = "loss"
    OTHER = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """One thing that becomes another for a user: `what` is plan_code, status, valid_until or `feature <key>`."""

    what: str
    before: FeatureValue | None
    after: FeatureValue | None
    direction: Direction


@dataclass(slots=True, kw_only=True)
class Group:
    """How many users an effect has, and the first EXAMPLES_MAX of them."""

    count: int = 0
    users: list[str] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class CatalogDiff:
    """All users that were looked at, those for whom something changes, and the effects, grouped."""

    users: int = 0
    users_changed: int = 0
    groups: dict[Effect, Group] = field(default_factory=dict)

    def add(self, user_id: str, effects: Iterable[Effect]) -> None:
        """Counts what changes for one user."""
        found = list(effects)
        self.users += 1
        self.users_changed += bool(found)
        for effect in found:
            if effect not in self.groups and len(self.groups) >= GROUPS_MAX:
                effect = Effect(what=REST, before=None, after=None, direction=Direction.OTHER)  # noqa: PLW2901  # counted with the rest
            group = self.groups.setdefault(effect, Group())
            group.count += 1
            if len(group.users) < EXAMPLES_MAX:
                group.users.append(user_id)

    def document(self) -> dict[str, Any]:
        """As JSON: losses first, the largest groups first."""
        order = [Direction.LOSS, Direction.GAIN, Direction.OTHER]
        return {
            "users": self.users,
            "users_changed": self.users_changed,
            "groups": [
                {
                    "what": effect.what,
                    "direction": effect.direction.value,
                    "before": effect.before,
                    "after": effect.after,
                    "count": group.count,
                    "users": group.users,
                }
                for effect, group in sorted(
                    self.groups.items(),
                    key=lambda item: (order.index(item[0].direction), -item[1].count, item[0].what),
                )
            ],
        }


def _silent(_done: int, _total: int) -> None:
    """Nobody is watching."""


async def compare_catalogs(
    database: Database,
    old: Catalog,
    new: Catalog,
    *,
    now: datetime,
    progress: Callable[[int, int], None] = _silent,
) -> CatalogDiff:
    """The difference between what the users have at an instant under one catalog and under another.

    `progress` is told how many users were compared, and how many there are.
    """
    diff = CatalogDiff()
    after: str | None = None
    async with database.snapshot() as tx:
        total = await count_users(tx)
    while True:
        async with database.snapshot() as tx:
            await hold_still(tx)
            users = await load_users_after(tx, after, limit=PAGE_USERS)
            if not users:
                return diff
            state = await store_state.load_state_of_users(tx, users)
        states = dict(_by_user(state))
        for user_id in users:
            own = states.get(user_id, State())
            at = max(now, own.newest_as_of(user_id) or now)
            entitlements = (
                entitlement_of(catalog, user_id, own.readings_of(catalog, user_id), at=at)
                for catalog in (old, new)
            )
            diff.add(user_id, effects_of(old, new, *entitlements))
        after = users[-1]
        progress(diff.users, max(diff.users, total))


def effects_of(old: Catalog, new: Catalog, before: Entitlement, after: Entitlement) -> Iterator[Effect]:
    """What is different between a user's entitlements under two catalogs."""
    if before.plan_code != after.plan_code:
        yield Effect(
            what="plan_code",
            before=before.plan_code,
            after=after.plan_code,
            direction=_plan_direction(old, new, before.plan_code, after.plan_code),
        )
    if before.status != after.status:
        yield Effect(what="status", before=before.status, after=after.status, direction=Direction.OTHER)
    if before.valid_until != after.valid_until:
        yield _end(before.valid_until, after.valid_until)
    for key in dict.fromkeys((*before.features, *after.features)):
        was, becomes = before.features.get(key), after.features.get(key)
        if was != becomes or type(was) is not type(becomes):
            yield Effect(
                what=f"feature {key}",
                before=was,
                after=becomes,
                direction=_feature_direction(old, new, key, was, becomes),
            )


def _plan_direction(old: Catalog, new: Catalog, before: str, after: str) -> Direction:
    """By the rank in the catalog that has both plans; the new one's word counts first."""
    for catalog in (new, old):
        if before in catalog.plans and after in catalog.plans:
            rises = catalog.plans[after].rank > catalog.plans[before].rank
            return Direction.GAIN if rises else Direction.LOSS
    return Direction.OTHER


def _feature_direction(
    old: Catalog, new: Catalog, key: str, before: FeatureValue | None, after: FeatureValue | None
) -> Direction:
    if before is None or after is None:
        return Direction.GAIN if before is None else Direction.LOSS
    for catalog in (new, old):
        feature = catalog.features.get(key)
        if feature is not None and feature.fits(before) and feature.fits(after):
            return Direction.GAIN if feature.merged(before, [after]) == after else Direction.LOSS
    return Direction.OTHER


def _end(before: datetime | None, after: datetime | None) -> Effect:
    """An end that moved: grouped by which way, because every user's own date differs."""
    if before is None or after is None:
        ends = after is not None
        return Effect(
            what="valid_until",
            before="never" if ends else "a date",
            after="a date" if ends else "never",
            # An open end may be that of the default plan as well; the plan's own line tells.
            direction=Direction.OTHER,
        )
    later = after > before
    return Effect(
        what="valid_until",
        before="a date",
        after="a later date" if later else "an earlier date",
        direction=Direction.GAIN if later else Direction.LOSS,
    )


def _by_user(state: State) -> Iterator[tuple[str, State]]:
    """A page's state taken apart: what a user has is looked for among all sources of a state."""
    owned_by: dict[str, list[SubjectId]] = {}
    for source_id, owned in state.sources.items():
        if owned.user_id is not None:
            owned_by.setdefault(owned.user_id, []).append(source_id)
    for user_id, source_ids in owned_by.items():
        yield user_id, _part(state, source_ids)


def _part(state: State, source_ids: list[SubjectId]) -> State:
    related = set(source_ids).union(
        *(around(source_id, state.sources[source_id].customer_id) for source_id in source_ids)
    )
    return State(
        facts={subject: state.facts[subject] for subject in related if subject in state.facts},
        parents={subject: state.parents[subject] for subject in related if subject in state.parents},
        sources={source_id: state.sources[source_id] for source_id in source_ids},
    )
