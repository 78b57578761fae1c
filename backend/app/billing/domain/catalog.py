"""Plans, features, the price map and the access policy, as read from `catalog.toml`; pure data and look-ups."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Any

from backend.app.billing.domain.facts import PriceRef

FeatureValue = bool | int | str
Features = Mapping[str, FeatureValue]


class CatalogError(ValueError):
    """The catalog can't be used; the message names the key and what is expected there."""


class FeatureType(StrEnum):
    """How several values of one feature become one."""

    BOOLEAN = "boolean"  # any source that has it gives it
    LIMIT = "limit"  # the largest
    LEVEL = "level"  # the highest of a declared order


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """A feature's type; `levels` from low to high for the type `level`."""

    key: str
    type: FeatureType
    levels: tuple[str, ...] = ()

    def best(self, values: Iterable[FeatureValue]) -> FeatureValue:
        """The one value a user has when several sources give this feature."""
        if self.type is FeatureType.LEVEL:
            return max(values, key=lambda value: self.levels.index(str(value)))
        return max(values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A plan: what it unlocks, and the names of the prices it is sold under. `rank` grows with the file's order."""

    code: str
    rank: int
    features: Features
    prices: tuple[str, ...]
    lookup_keys: tuple[str, ...]
    products: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How long access outlives what paid for it."""

    renewal_slack: timedelta
    past_due_grace: timedelta


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """The whole catalog; `plans` in rising rank, `default_plan` is what everybody has."""

    features: Mapping[str, Feature]
    plans: Mapping[str, Plan]
    default_plan: Plan
    policy: Policy
    by_price: Mapping[str, Plan]
    by_lookup_key: Mapping[str, Plan]
    by_product: Mapping[str, Plan]

    def plan_of_price(self, price: PriceRef) -> Plan | None:
        """The plan a price is mapped to: by its id, its lookup key or its product, in this order."""
        for names, name in (
            (self.by_price, price.price_id),
            (self.by_lookup_key, price.lookup_key),
            (self.by_product, price.product_id),
        ):
            if name is not None and name in names:
                return names[name]
        return None

    def knows(self, name: str) -> bool:
        """Whether a name that was missing, of a plan or a price, is in the catalog."""
        return any(
            name in names for names in (self.plans, self.by_price, self.by_lookup_key, self.by_product)
        )

    def merge(self, plans: Sequence[Plan]) -> dict[str, FeatureValue]:
        """The feature values of a user who has all of `plans` and the default plan."""
        given = [self.default_plan, *plans]
        return {
            key: feature.best([plan.features[key] for plan in given])
            for key, feature in self.features.items()
        }


def parse_catalog(text: str) -> Catalog:
    """A checked catalog from the text of a TOML file; CatalogError says what is wrong and where."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise CatalogError(f"not valid TOML: {error}") from error
    reader = _Reader(data, "")
    features = {
        key: _feature(key, reader.table("features").table(key)) for key in reader.table("features").data
    }
    plans: dict[str, Plan] = {}
    for rank, code in enumerate(reader.table("plans").data):
        plans[code] = _plan(code, rank, reader.table("plans").table(code), features)
    default = reader.text("default_plan")
    if default not in plans:
        raise CatalogError(f"default_plan: there is no plan {default!r}")
    policy = reader.table("policy")
    return Catalog(
        features=features,
        plans=plans,
        default_plan=plans[default],
        policy=Policy(
            renewal_slack=timedelta(hours=policy.whole_number("renewal_slack_hours")),
            past_due_grace=timedelta(days=policy.whole_number("past_due_grace_days")),
        ),
        by_price=_index(plans, "prices"),
        by_lookup_key=_index(plans, "lookup_keys"),
        by_product=_index(plans, "products"),
    )


def _feature(key: str, reader: _Reader) -> Feature:
    kind = reader.text("type")
    if kind not in set(FeatureType):
        raise CatalogError(f"{reader.path}.type: {kind!r} is not boolean, limit or level")
    levels = reader.texts("levels") if kind == FeatureType.LEVEL else ()
    if kind == FeatureType.LEVEL and (not levels or len(set(levels)) != len(levels)):
        raise CatalogError(f"{reader.path}.levels: name each level once, from low to high")
    return Feature(key=key, type=FeatureType(kind), levels=levels)


def _plan(code: str, rank: int, reader: _Reader, features: Mapping[str, Feature]) -> Plan:
    values = reader.table("features")
    for missing in features.keys() - values.data.keys():
        raise CatalogError(f"{values.path}: the feature {missing!r} is missing")
    for key, value in values.data.items():
        if key not in features:
            raise CatalogError(f"{values.path}.{key}: there is no such feature")
        feature = features[key]
        fits = {
            FeatureType.BOOLEAN: isinstance(value, bool),
            FeatureType.LIMIT: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
            FeatureType.LEVEL: value in feature.levels,
        }[feature.type]
        if not fits:
            expected = f"one of {list(feature.levels)}" if feature.levels else f"a {feature.type}"
            raise CatalogError(f"{values.path}.{key}: {value!r} is not {expected}")
    return Plan(
        code=code,
        rank=rank,
        features={key: values.data[key] for key in features},
        prices=reader.texts("prices"),
        lookup_keys=reader.texts("lookup_keys"),
        products=reader.texts("products"),
    )


def _index(plans: Mapping[str, Plan], names: str) -> dict[str, Plan]:
    index: dict[str, Plan] = {}
    for plan in plans.values():
        for name in getattr(plan, names):
            if name in index:
                raise CatalogError(
                    f"plans.{plan.code}.{names}: {name!r} also names plan {index[name].code!r}"
                )
            index[name] = plan
    return index


class _Reader:
    """Reads typed values out of parsed TOML and says where a wrong one stands."""

    def __init__(self, data: Mapping[str, Any], path: str) -> None:
        self.data = data
        self.path = path

    def table(self, key: str) -> _Reader:
        value = self.data.get(key)
        if not isinstance(value, dict):
            raise CatalogError(f"{self._at(key)}: a table is expected")
        return _Reader(value, self._at(key))

    def text(self, key: str) -> str:
        value = self.data.get(key)
        if not isinstance(value, str):
            raise CatalogError(f"{self._at(key)}: a text is expected")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.data.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            raise CatalogError(f"{self._at(key)}: a list of texts is expected")
        return tuple(value)

    def whole_number(self, key: str) -> int:
        value = self.data.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise CatalogError(f"{self._at(key)}: a whole number of 0 or more is expected")
        return value

    def _at(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key
