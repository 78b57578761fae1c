"""Plans, features, the price map and the access policy, as read from `catalog.toml`; pure data and look-ups."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Any, TypeVar

from backend.app.billing.domain.facts import FeatureValue, PriceRef

Features = Mapping[str, FeatureValue]
Answer = TypeVar("Answer", bound=StrEnum)

POLICY_VERSION = 1
# A century of days and eleven years of hours: what is more is a slip of the finger.
WHOLE_NUMBER_MAX = 100_000

_POLICY_ANSWERS = (
    "unpaid",
    "pause_collection_void",
    "pause_collection_keep_as_draft",
    "pause_collection_mark_uncollectible",
    "refund_subscription",
    "dispute_open",
    "dispute_lost",
    "fraud_warning",
)


class CatalogError(ValueError):
    """The catalog can't be used; the message names the key and what is expected there."""


class FeatureType(StrEnum):
    """How several values of one feature become one."""

    BOOLEAN = "boolean"  # any source that has it gives it
    LIMIT = "limit"  # the largest, or the sum where it is declared additive
    LEVEL = "level"  # the highest of a declared order


class Keep(StrEnum):
    """A policy's two answers to "what becomes of access?"."""

    KEEP = "keep"
    REVOKE = "revoke"


class PartialRefund(StrEnum):
    """What becomes of a purchase of several units of which some were given back."""

    KEEP = "keep"  # all of them stay, and the purchase is flagged
    REDUCE_QUANTITY = "reduce_quantity"  # as many units stay as were not given back


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """A feature's type; `levels` from low to high for the type `level`.

    A limit that is `per_unit` counts once for each seat; one that is `is_additive` sums over sources.
    """

    key: str
    type: FeatureType
    levels: tuple[str, ...] = ()
    is_per_unit: bool = False
    is_additive: bool = False

    def merged(self, default: FeatureValue, values: Sequence[FeatureValue]) -> FeatureValue:
        """The one value a user has when several sources give this feature beside the default plan."""
        if self.is_additive and values:
            return max(int(default), sum(int(value) for value in values))
        if self.type is FeatureType.LEVEL:
            return max([default, *values], key=lambda value: self.levels.index(str(value)))
        return max([default, *values])

    def times(self, value: FeatureValue, quantity: int) -> FeatureValue:
        """A plan's value for so many seats."""
        return int(value) * quantity if self.is_per_unit else value

    def fits(self, value: object) -> bool:
        """Whether a value is one of this feature's."""
        if self.type is FeatureType.BOOLEAN:
            return isinstance(value, bool)
        if self.type is FeatureType.LIMIT:
            return isinstance(value, int) and not isinstance(value, bool) and value >= 0
        return value in self.levels

    @property
    def expected(self) -> str:
        """What a value should be, for an error message."""
        return f"one of {list(self.levels)}" if self.levels else f"a {self.type}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A plan: what it unlocks, and the names of the prices it is sold under. `rank` grows with the file's order.

    A one-time purchase of it lasts `purchase_days`, or for ever.
    """

    code: str
    rank: int
    features: Features
    prices: tuple[str, ...]
    lookup_keys: tuple[str, ...]
    products: tuple[str, ...]
    purchase_days: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What becomes of access when the money is late, given back or disputed; docs/policy.md explains each."""

    version: int
    renewal_slack: timedelta
    past_due_grace: timedelta
    unpaid: Keep
    pause_collection_void: Keep
    pause_collection_keep_as_draft: Keep
    pause_collection_mark_uncollectible: Keep
    refund_revoke_percent: int
    refund_partial: PartialRefund
    refund_subscription: Keep
    dispute_open: Keep
    dispute_lost: Keep
    fraud_warning: Keep

    def pause_collection(self, behavior: str) -> Keep:
        """The answer for one of Stripe's behaviors; one we don't know keeps access, as Stripe does."""
        return {
            "void": self.pause_collection_void,
            "keep_as_draft": self.pause_collection_keep_as_draft,
            "mark_uncollectible": self.pause_collection_mark_uncollectible,
        }.get(behavior, Keep.KEEP)


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


def parse_catalog(text: str) -> Catalog:
    """A checked catalog from the text of a TOML file; CatalogError says what is wrong and where."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise CatalogError(f"not valid TOML: {error}") from error
    reader = _Reader(data, "", text)
    features = {
        key: _feature(key, reader.table("features").table(key)) for key in reader.table("features").data
    }
    plans: dict[str, Plan] = {}
    for rank, code in enumerate(reader.table("plans").data):
        plans[code] = _plan(code, rank, reader.table("plans").table(code), features)
    reader.refuse_others("default_plan", "features", "plans", "policy")
    default = reader.text("default_plan")
    if default not in plans:
        raise CatalogError(f"{reader.at('default_plan')}: there is no plan {default!r}")
    return Catalog(
        features=features,
        plans=plans,
        default_plan=plans[default],
        policy=_policy(reader.table("policy")),
        by_price=_index(plans, "prices", reader.table("plans")),
        by_lookup_key=_index(plans, "lookup_keys", reader.table("plans")),
        by_product=_index(plans, "products", reader.table("plans")),
    )


def _feature(key: str, reader: _Reader) -> Feature:
    kind = reader.text("type")
    if kind not in set(FeatureType):
        raise CatalogError(f"{reader.at('type')}: {kind!r} is not boolean, limit or level")
    levels = reader.texts("levels") if kind == FeatureType.LEVEL else ()
    if kind == FeatureType.LEVEL and (not levels or len(set(levels)) != len(levels)):
        raise CatalogError(f"{reader.at('levels')}: name each level once, from low to high")
    feature = Feature(
        key=key,
        type=FeatureType(kind),
        levels=levels,
        is_per_unit=reader.flag("per_unit"),
        is_additive=reader.flag("additive"),
    )
    if (feature.is_per_unit or feature.is_additive) and feature.type is not FeatureType.LIMIT:
        raise CatalogError(f"{reader.at('type')}: only a limit can be per_unit or additive")
    reader.refuse_others("type", "levels", "per_unit", "additive")
    return feature


def _plan(code: str, rank: int, reader: _Reader, features: Mapping[str, Feature]) -> Plan:
    values = reader.table("features")
    for missing in sorted(features.keys() - values.data.keys()):
        raise CatalogError(f"{reader.at('features')}: the feature {missing!r} is missing")
    for key, value in values.data.items():
        if key not in features:
            raise CatalogError(f"{values.at(key)}: there is no such feature")
        if not features[key].fits(value):
            raise CatalogError(f"{values.at(key)}: {value!r} is not {features[key].expected}")
    reader.refuse_others("features", "prices", "lookup_keys", "products", "purchase_days")
    return Plan(
        code=code,
        rank=rank,
        features={key: values.data[key] for key in features},
        prices=reader.texts("prices"),
        lookup_keys=reader.texts("lookup_keys"),
        products=reader.texts("products"),
        purchase_days=reader.whole_number("purchase_days") if "purchase_days" in reader.data else None,
    )


def _policy(reader: _Reader) -> Policy:
    version = reader.whole_number("version")
    if version != POLICY_VERSION:
        raise CatalogError(f"{reader.at('version')}: this release understands version {POLICY_VERSION} only")
    percent = reader.whole_number("refund_revoke_percent")
    if not 1 <= percent <= 100:  # noqa: PLR2004  # a percentage
        raise CatalogError(f"{reader.at('refund_revoke_percent')}: a percentage from 1 to 100 is expected")
    answers = {key: reader.choice(key, Keep) for key in _POLICY_ANSWERS}
    reader.refuse_others(
        "version",
        "renewal_slack_hours",
        "past_due_grace_days",
        "refund_revoke_percent",
        "refund_partial",
        *_POLICY_ANSWERS,
    )
    return Policy(
        version=version,
        renewal_slack=timedelta(hours=reader.whole_number("renewal_slack_hours")),
        past_due_grace=timedelta(days=reader.whole_number("past_due_grace_days")),
        refund_revoke_percent=percent,
        refund_partial=reader.choice("refund_partial", PartialRefund),
        **answers,
    )


def _index(plans: Mapping[str, Plan], names: str, reader: _Reader) -> dict[str, Plan]:
    index: dict[str, Plan] = {}
    for plan in plans.values():
        for name in getattr(plan, names):
            if name in index:
                where = reader.table(plan.code).at(names)
                raise CatalogError(f"{where}: {name!r} also names plan {index[name].code!r}")
            index[name] = plan
    return index


class _Reader:
    """Reads typed values out of parsed TOML and says in which line and at which key a wrong one stands."""

    def __init__(self, data: Mapping[str, Any], path: str, text: str) -> None:
        self.data = data
        self.path = path
        self._text = text

    def table(self, key: str) -> _Reader:
        value = self.data.get(key)
        if not isinstance(value, dict):
            raise CatalogError(f"{self.at(key)}: a table is expected")
        return _Reader(value, f"{self.path}.{key}" if self.path else key, self._text)

    def text(self, key: str) -> str:
        value = self.data.get(key)
        if not isinstance(value, str):
            raise CatalogError(f"{self.at(key)}: a text is expected")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.data.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            raise CatalogError(f"{self.at(key)}: a list of texts is expected")
        return tuple(value)

    def flag(self, key: str) -> bool:
        value = self.data.get(key, False)
        if not isinstance(value, bool):
            raise CatalogError(f"{self.at(key)}: true or false is expected")
        return value

    def choice(self, key: str, answers: type[Answer]) -> Answer:
        value = self.data.get(key)
        if value not in set(answers):
            expected = " or ".join(f'"{answer}"' for answer in answers)
            raise CatalogError(f"{self.at(key)}: {expected} is expected")
        return answers(str(value))

    def whole_number(self, key: str) -> int:
        value = self.data.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= WHOLE_NUMBER_MAX:
            raise CatalogError(f"{self.at(key)}: a whole number from 0 to {WHOLE_NUMBER_MAX} is expected")
        return value

    def refuse_others(self, *known: str) -> None:
        """A misspelt key must not be taken for a default."""
        for key in self.data:
            if key not in known:
                raise CatalogError(f"{self.at(key)}: there is no such key; known are {', '.join(known)}")

    def at(self, key: str) -> str:
        """Where a key stands: the line, as far as the text tells it, and its whole name."""
        whole = f"{self.path}.{key}" if self.path else key
        line = _line_of(self._text, self.path, key)
        return f"line {line}, {whole}" if line else whole


def _line_of(text: str, table: str, key: str) -> int | None:
    """The line of a key in its table, or else of the table itself; tomllib keeps no positions."""
    whole = f"{table}.{key}" if table else key
    parent, _, own_key = table.rpartition(".")
    open_table, found = "", None
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.strip()
        if words.startswith("["):
            open_table = words.partition("#")[0].strip().strip("[]")
            if open_table == whole:
                return number
            if open_table == table:
                found = number
        elif open_table == table and _assigns(key, words):
            return number
        elif open_table == parent and own_key and _assigns(own_key, words):
            # An inline table stands in one line with all of its keys.
            found = number
    return found


def _assigns(key: str, words: str) -> bool:
    return re.match(rf"[\"']?{re.escape(key)}[\"']?\s*=", words) is not None
