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
from enum import StrEnum
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
    """A one-time purchase as it is; `paid_at` is None while it is not, or never was, and `unpaid` says which."""

    lines: tuple[Line, ...]
    claims: Claims
    amount: int
    paid_at: int | None
    unpaid: Cause | None = None


SourceState = SubscriptionState | PurchaseState


class Cause(StrEnum):
    """Why a source gives what it gives, or gives nothing, in the words of the terms of sale."""

    PAID_PERIOD = "paid period"
    TRIAL = "trial"
    GRACE = "grace"
    PLANNED_END = "planned end"
    BOUGHT = "bought"
    RAN_OUT = "ran out"
    AWAITING_PAYMENT = "awaiting payment"
    PAYMENT_FAILED = "payment failed"
    EXPIRED = "expired"
    STATUS = "status"
    COLLECTION_PAUSED = "collection paused"
    REFUNDED = "refunded"
    DISPUTE_OPEN = "dispute open"
    DISPUTE_LOST = "dispute lost"
    CUSTOMER_GONE = "customer gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Right:
    """A plan from a source until an instant, exclusive; None is for ever.

    `causes` are why it ends when it ends; more than one where two ends fall on one second.
    """

    source: str
    part: str
    plan: str
    quantity: int
    status: str
    ends_at: int | None
    causes: frozenset[Cause]


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What a source comes to at an instant: its live rights, or all the causes for which it has none.

    `ended` are the rights that ran out by themselves; `state` is the source's state then.
    """

    state: SourceState
    rights: tuple[Right, ...]
    ended: tuple[Right, ...]
    causes: frozenset[Cause]


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
        rights = [right for record in self._newest(at) for right in self._rights(record)]
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

    def standings(self, at: int) -> dict[str, Standing]:
        """What each source that had been heard of came to at an instant."""
        found: dict[str, Standing] = {}
        for record in self._newest(at):
            rights = self._rights(record)
            live = tuple(right for right in rights if _is_live(right, at))
            why = frozenset({Cause.RAN_OUT}) if rights else self._refusals(record.state)
            found[record.source] = Standing(
                state=record.state,
                rights=live,
                ended=tuple(right for right in rights if not _is_live(right, at)),
                causes=frozenset() if live else why,
            )
        return found

    def givers(self, key: str, at: int) -> list[Right]:
        """The rights without which a feature would have another value; none where everybody has it."""
        live = [right for standing in self.standings(at).values() for right in standing.rights]
        value = self._value(key, live)
        if value == self.terms.plans[self.terms.default_plan]["features"][key]:
            return []
        if self.terms.features[key].get("additive"):
            return live
        return [right for right in live if self._value_of(key, right) == value]

    def causes(self, until: int) -> list[Record]:
        """Everything that happened until an instant, in order."""
        found = [record for history in self.records.values() for record in history if record.at <= until]
        return sorted(found, key=lambda record: record.at)

    def _newest(self, at: int) -> list[Record]:
        """Each source's newest record at an instant."""
        counts = [
            (history, bisect_right(history, at, key=lambda record: record.at))
            for history in self.records.values()
        ]
        return [history[count - 1] for history, count in counts if count]

    def _rights(self, record: Record) -> list[Right]:
        state = record.state
        if self._refusals(state):
            return []
        rights: list[Right] = []
        for index, line in enumerate(state.lines):
            ends_at, causes = self._end(state, line)
            rights.append(
                Right(
                    source=record.source,
                    part=f"{index:03}",
                    plan=line.plan,
                    quantity=line.quantity,
                    status=state.status if isinstance(state, SubscriptionState) else "active",
                    ends_at=ends_at,
                    causes=causes,
                )
            )
        return rights

    def _refusals(self, state: SourceState) -> frozenset[Cause]:
        """All the causes for which a source gives nothing at all; none where it gives something."""
        if isinstance(state, SubscriptionState):
            return _subscription_refusals(self.terms.policy, state)
        return _purchase_refusals(self.terms.policy, state)

    def _end(self, state: SourceState, line: Line) -> tuple[int | None, frozenset[Cause]]:
        """When a line ends by itself, and why then."""
        policy = self.terms.policy
        if isinstance(state, PurchaseState):
            days: int | None = self.terms.plans[line.plan].get("purchase_days")
            end = state.paid_at + days * DAY_SECONDS if days and state.paid_at is not None else None
            return end, frozenset({Cause.BOUGHT})
        if state.past_due_since is not None:
            end, cause = state.past_due_since + int(policy["past_due_grace_days"]) * DAY_SECONDS, Cause.GRACE
        elif state.status == "trialing" and state.trial_end is not None:
            end, cause = state.trial_end, Cause.TRIAL
        else:
            end, cause = (
                line.period_end + int(policy["renewal_slack_hours"]) * HOUR_SECONDS,
                Cause.PAID_PERIOD,
            )
        # The date the customer was told is kept to the second.
        told = end if state.cancel_at is None else state.cancel_at
        causes = {cause} if end <= told else set()
        if state.cancel_at is not None and state.cancel_at <= end:
            causes.add(Cause.PLANNED_END)
        return min(end, told), frozenset(causes)

    def _merged(self, rights: Sequence[Right], at: int) -> tuple[str, str | None, dict[str, Value]]:
        live = [right for right in rights if _is_live(right, at)]
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
        values = [self._value_of(key, right) for right in live]
        if feature["type"] == "boolean":
            return bool(base) or any(values)
        if feature["type"] == "level":
            return max([base, *values], key=feature["levels"].index)
        if feature.get("additive"):
            return max(int(base), sum(int(value) for value in values))
        return max([int(base), *(int(value) for value in values)])

    def _value_of(self, key: str, right: Right) -> Value:
        value: Value = self.terms.plans[right.plan]["features"][key]
        return int(value) * right.quantity if self.terms.features[key].get("per_unit") else value


def _is_live(right: Right, at: int) -> bool:
    return right.ends_at is None or at < right.ends_at


def _subscription_refusals(policy: Mapping[str, Any], state: SubscriptionState) -> frozenset[Cause]:
    found = _taken_away(policy, state.claims)
    if state.status not in {"trialing", "active", "past_due"} | (
        {"unpaid"} if policy["unpaid"] == "keep" else set()
    ):
        found.add(Cause.STATUS)
    if state.pause_behavior is not None and policy[f"pause_collection_{state.pause_behavior}"] == "revoke":
        found.add(Cause.COLLECTION_PAUSED)
    return frozenset(found)


def _purchase_refusals(policy: Mapping[str, Any], state: PurchaseState) -> frozenset[Cause]:
    if state.paid_at is None:
        return frozenset({state.unpaid or Cause.AWAITING_PAYMENT})
    found = _taken_away(policy, state.claims)
    refunded = state.claims.refunded
    if refunded > 0 and refunded * 100 >= state.amount * policy["refund_revoke_percent"]:
        found.add(Cause.REFUNDED)
    return frozenset(found)


def _taken_away(policy: Mapping[str, Any], claims: Claims) -> set[Cause]:
    found: set[Cause] = set()
    if claims.is_customer_gone:
        found.add(Cause.CUSTOMER_GONE)
    if claims.disputes_open > 0 and policy["dispute_open"] == "revoke":
        found.add(Cause.DISPUTE_OPEN)
    if claims.is_dispute_lost and policy["dispute_lost"] == "revoke":
        found.add(Cause.DISPUTE_LOST)
    return found
