"""What should be in force: each source's state as the simulated world knows it, and the terms of sale applied to it.

Written from the published meaning of Stripe's states, on purpose without the service's own decision:
two independent readings of the same terms that agree are evidence, one reading twice is not.
Instants are unix seconds.
"""

from __future__ import annotations

import tomllib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Value = bool | int | str

HOUR_SECONDS = 3_600
DAY_SECONDS = 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """A catalog file as plain data: features, plans in rising rank, the default plan's name and the policy."""

    features: Mapping[str, Mapping[str, Any]]
    plans: Mapping[str, Mapping[str, Any]]
    default_plan: str
    policy: Mapping[str, Any]

    @property
    def sold(self) -> list[str]:
        """The plans that somebody can buy, in rising rank."""
        return [code for code in self.plans if code != self.default_plan]


def read_terms(text: str) -> Terms:
    """The terms of a catalog file that the service accepts.

    Raises:
        ValueError: refunds shall end subscriptions, which the world does not play.
    """
    data = tomllib.loads(text)
    if data["policy"]["refund_subscription"] != "keep":
        raise ValueError('the simulator knows refund_subscription = "keep" only')
    return Terms(
        features=data["features"],
        plans=data["plans"],
        default_plan=data["default_plan"],
        policy=data["policy"],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One item of a subscription, or line of a purchase."""

    plan: str
    quantity: int = 1
    period_end: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """What was taken back of a source's money, or is being fought over; `is_customer_gone` after a deletion."""

    refunded: int = 0
    disputes_open: int = 0
    is_dispute_lost: bool = False
    is_customer_gone: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SubscriptionState:
    """A subscription as it is; `past_due_since` is the first failure of the present delinquency."""

    status: str
    lines: tuple[Line, ...]
    claims: Claims
    trial_end: int | None = None
    cancel_at: int | None = None
    past_due_since: int | None = None
    pause_behavior: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PurchaseState:
    """A one-time purchase as it is; `paid_at` is None while it is not, or never was."""

    lines: tuple[Line, ...]
    claims: Claims
    amount: int
    paid_at: int | None


SourceState = SubscriptionState | PurchaseState


@dataclass(frozen=True, slots=True, kw_only=True)
class Right:
    """A plan from a source until an instant, exclusive; None is for ever."""

    source: str
    part: str
    plan: str
    quantity: int
    status: str
    ends_at: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Entitled:
    """What a user may do; `status` is None where no source gives anything, `valid_until` where nothing will change."""

    plan: str
    status: str | None
    features: Mapping[str, Value]
    valid_until: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A source's state from an instant on, and what happened then."""

    at: int
    source: str
    state: SourceState
    cause: str


@dataclass(slots=True)
class Truth:
    """One user's sources through time; records are added in the order in which they happened."""

    terms: Terms
    records: dict[str, list[Record]] = field(default_factory=dict)

    def add(self, record: Record) -> None:
        """Notes a source's new state."""
        self.records.setdefault(record.source, []).append(record)

    def entitled(self, at: int) -> Entitled:
        """What was in force at an instant, by all that had happened until and including its second."""
        rights: list[Right] = []
        for history in self.records.values():
            count = bisect_right(history, at, key=lambda record: record.at)
            if count:
                rights += self._rights(history[count - 1])
        answer = self._merged(rights, at)
        edges = sorted(
            {right.ends_at for right in rights if right.ends_at is not None and right.ends_at > at}
        )
        return Entitled(
            plan=answer[0],
            status=answer[1],
            features=answer[2],
            valid_until=next((edge for edge in edges if self._merged(rights, edge) != answer), None),
        )

    def causes(self, until: int) -> list[Record]:
        """Everything that happened until an instant, in order."""
        found = [record for history in self.records.values() for record in history if record.at <= until]
        return sorted(found, key=lambda record: record.at)

    def _rights(self, record: Record) -> list[Right]:
        state = record.state
        ended = (
            _subscription_end(self.terms.policy, state)
            if isinstance(state, SubscriptionState)
            else _is_purchase_over(self.terms.policy, state)
        )
        if ended:
            return []
        return [
            Right(
                source=record.source,
                part=f"{index:03}",
                plan=line.plan,
                quantity=line.quantity,
                status=state.status if isinstance(state, SubscriptionState) else "active",
                ends_at=self._end(state, line),
            )
            for index, line in enumerate(state.lines)
        ]

    def _end(self, state: SourceState, line: Line) -> int | None:
        policy = self.terms.policy
        if isinstance(state, PurchaseState):
            days: int | None = self.terms.plans[line.plan].get("purchase_days")
            return state.paid_at + days * DAY_SECONDS if days and state.paid_at is not None else None
        if state.past_due_since is not None:
            end = state.past_due_since + int(policy["past_due_grace_days"]) * DAY_SECONDS
        elif state.status == "trialing" and state.trial_end is not None:
            end = state.trial_end
        else:
            end = line.period_end + int(policy["renewal_slack_hours"]) * HOUR_SECONDS
        # The date the customer was told is kept to the second.
        return end if state.cancel_at is None else min(end, state.cancel_at)

    def _merged(self, rights: Sequence[Right], at: int) -> tuple[str, str | None, dict[str, Value]]:
        live = [right for right in rights if right.ends_at is None or at < right.ends_at]
        ranks = list(self.terms.plans)
        # Of the highest plan, the right that lasts longest speaks for the user.
        front = max(
            live,
            key=lambda right: (
                ranks.index(right.plan),
                right.ends_at is None,
                right.ends_at or 0,
                right.source,
                right.part,
            ),
            default=None,
        )
        features = {key: self._value(key, live) for key in self.terms.features}
        if front is None:
            return self.terms.default_plan, None, features
        return front.plan, front.status, features

    def _value(self, key: str, live: Sequence[Right]) -> Value:
        feature = self.terms.features[key]
        base: Value = self.terms.plans[self.terms.default_plan]["features"][key]
        values: list[Value] = []
        for right in live:
            value: Value = self.terms.plans[right.plan]["features"][key]
            values.append(int(value) * right.quantity if feature.get("per_unit") else value)
        if feature["type"] == "boolean":
            return bool(base) or any(values)
        if feature["type"] == "level":
            return max([base, *values], key=feature["levels"].index)
        if feature.get("additive"):
            return max(int(base), sum(int(value) for value in values))
        return max([int(base), *(int(value) for value in values)])


def _subscription_end(policy: Mapping[str, Any], state: SubscriptionState) -> bool:
    """Whether a subscription gives nothing at all."""
    gives = {"trialing", "active", "past_due"} | ({"unpaid"} if policy["unpaid"] == "keep" else set())
    paused = (
        state.pause_behavior is not None and policy[f"pause_collection_{state.pause_behavior}"] == "revoke"
    )
    return state.status not in gives or paused or _is_taken_away(policy, state.claims)


def _is_purchase_over(policy: Mapping[str, Any], state: PurchaseState) -> bool:
    refunded = state.claims.refunded
    given_back = refunded > 0 and refunded * 100 >= state.amount * policy["refund_revoke_percent"]
    return state.paid_at is None or given_back or _is_taken_away(policy, state.claims)


def _is_taken_away(policy: Mapping[str, Any], claims: Claims) -> bool:
    return (
        claims.is_customer_gone
        or (claims.disputes_open > 0 and policy["dispute_open"] == "revoke")
        or (claims.is_dispute_lost and policy["dispute_lost"] == "revoke")
    )
