"""A Stripe of our own: users who subscribe, buy, change their minds and fight over money, by a virtual clock.

Each user's history follows from the seed and the user's number alone, so one that shows a difference can
be played again by itself. Pure: no clock, no network.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from backend.app.simulator import objects
from backend.app.simulator.emit import Emitter, Money
from backend.app.simulator.money import Payment
from backend.app.simulator.objects import DAY_SECONDS, Json, Shape
from backend.app.simulator.purchases import Purchase
from backend.app.simulator.stage import Action, Stage
from backend.app.simulator.subscriptions import Subscription
from backend.app.simulator.truth import Terms, Truth

# 2025-11-24, for histories that are played in memory: with a fixed start the seed alone says what happens.
START = 1_764_000_000
# So many things a user does by themselves; what Stripe does about it comes on top.
ACTIONS_MIN, ACTIONS_MAX = 3, 12
SUBSCRIPTIONS_MAX = 3
PURCHASES_MAX = 4


class Generation(StrEnum):
    """Which API generation events are rendered in; `mixed` chooses per user."""

    MIXED = "mixed"
    BEFORE_BASIL = "before-basil"
    BASIL = "basil"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to simulate: from `start` (unix seconds) for so many days."""

    seed: int
    start: int
    days: int
    terms: Terms
    generation: Generation = Generation.MIXED


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What happened to one user: the events in order, the ledger that should follow, and the truth."""

    number: int
    user_id: str
    events: tuple[Json, ...]
    ledger: dict[str, Money]
    truth: Truth
    start: int
    end: int


def live(plan: Plan, number: int) -> History:
    """The history of one user."""
    rng = random.Random(f"{plan.seed}:{number}")  # noqa: S311  # to be repeatable is the point
    shape = {
        Generation.BEFORE_BASIL: Shape.BEFORE_BASIL,
        Generation.BASIL: Shape.BASIL,
        Generation.MIXED: rng.choice(list(Shape)),
    }[plan.generation]
    tag = f"s{plan.seed}u{number}"
    stage = Stage(
        rng=rng,
        tag=tag,
        user_id=f"sim-{plan.seed}-{number}",
        customer_id=f"cus_{tag}",
        named_in=rng.choice(["checkout", "subscription", "customer"]),
        now=plan.start,
        end=plan.start + plan.days * DAY_SECONDS,
        emitter=Emitter(rng=rng, shape=shape, account=f"acct_{tag}" if rng.random() < 0.1 else None),  # noqa: PLR2004  # a tenth sell through connected accounts
        truth=Truth(terms=plan.terms),
    )
    _User(stage).arrive()
    stage.run()
    return History(
        number=number,
        user_id=stage.user_id,
        events=tuple(stage.emitter.events),
        ledger=stage.emitter.ledger,
        truth=stage.truth,
        start=plan.start,
        end=stage.end,
    )


class _User:
    """Decides what a user does next, among what is possible then."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.subscriptions: list[Subscription] = []
        self.purchases: list[Purchase] = []

    def arrive(self) -> None:
        stage, rng = self.stage, self.stage.rng
        at = stage.now + rng.randint(0, max(1, (stage.end - stage.now) // 4))
        stage.later(at, self._register)
        stage.later(at, self._buy if stage.chance(0.3) else self._subscribe)
        for _ in range(rng.randint(ACTIONS_MIN, ACTIONS_MAX)):
            # A third happens in the very second of what came before.
            if not stage.chance(0.33):
                at = rng.randint(at, max(at, stage.end))
            stage.later(at, self._act)

    def _register(self) -> None:
        content = objects.customer(self.stage.customer_id, created=self.stage.now)
        if self.stage.named_in == "customer":
            content["metadata"] = {"user_id": self.stage.user_id}
        self.stage.emitter.emit(self.stage.now, "customer.created", content)

    def _act(self) -> None:
        if self.stage.is_customer_gone:
            return
        possible = self._possible()
        if possible:
            actions = [action for action, _ in possible]
            self.stage.rng.choices(actions, [weight for _, weight in possible])[0]()

    def _possible(self) -> list[tuple[Action, int]]:
        found: list[tuple[Action, int]] = []
        if len(self.subscriptions) < SUBSCRIPTIONS_MAX:
            found.append((self._subscribe, 2))
        if len(self.purchases) < PURCHASES_MAX:
            found.append((self._buy, 3))
        for subscription in self.subscriptions:
            found += _possible_for(subscription)
        for payment in self._payments():
            left = payment.amount - payment.given_back
            if left > 0 and not payment.is_disputed:
                found += [(self._refund_of(payment, left), 1), (payment.dispute, 1)]
        if self.subscriptions or self.purchases:
            found.append((self._delete_customer, 1))
        return found

    def _payments(self) -> list[Payment]:
        return [payment for source in self._sources() for payment in source.payments]

    def _sources(self) -> list[Subscription | Purchase]:
        return [*self.subscriptions, *self.purchases]

    def _subscribe(self) -> None:
        self.subscriptions.append(Subscription(self.stage))

    def _buy(self) -> None:
        # Without a checkout of ours only a customer we know can be found.
        kinds = ["checkout", "checkout", "checkout", "invoice", "intent"]
        kind = self.stage.rng.choice(kinds)
        self.purchases.append(
            Purchase(self.stage, kind=kind, is_guest=kind == "checkout" and self.stage.chance(0.1))
        )

    def _refund_of(self, payment: Payment, left: int) -> Callable[[], None]:
        def refund() -> None:
            part = self.stage.rng.randint(1, left)
            payment.refund(left if self.stage.chance(0.6) else part)

        return refund

    def _delete_customer(self) -> None:
        if not self.stage.chance(0.2):
            return
        self.stage.is_customer_gone = True
        for source in self._sources():
            source.customer_gone()
        self.stage.emitter.emit(
            self.stage.now,
            "customer.deleted",
            {"id": self.stage.customer_id, "object": "customer", "deleted": True},
        )


def _possible_for(subscription: Subscription) -> list[tuple[Action, int]]:
    """What can be done to a subscription as it is."""
    if subscription.is_over:
        return []
    if subscription.status == "paused":
        return [(subscription.resume, 3), (subscription.cancel, 1)]
    if subscription.status == "unpaid":
        return [(subscription.pay_debt, 3), (subscription.cancel, 1)]
    if subscription.status == "incomplete":
        return [(subscription.rename, 1)]
    found: list[tuple[Action, int]] = [
        (subscription.change_plan, 3),
        (subscription.change_seats, 2),
        (subscription.rename, 1),
        (subscription.cancel, 1),
        (subscription.cancel_later if subscription.cancel_at is None else subscription.keep, 2),
        (
            subscription.pause_collection
            if subscription.pause_behavior is None
            else subscription.resume_collection,
            1,
        ),
    ]
    if subscription.status == "past_due":
        found.append((subscription.pay_debt, 3))
    if subscription.status == "active":
        found.append((subscription.pause, 1))
    return found
