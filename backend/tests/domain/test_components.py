"""Events that are decided together are decided as if each had come alone."""

from __future__ import annotations

import random
from collections.abc import Hashable
from datetime import UTC, datetime

import pytest

from backend.app.billing.apply import named_parties, party_names
from backend.app.billing.domain.catalog import parse_catalog
from backend.app.billing.domain.components import components
from backend.app.billing.domain.decide import decide
from backend.app.billing.domain.facts import (
    About,
    ClaimFact,
    CustomerId,
    EndedFact,
    Event,
    SubjectId,
    Tie,
    Translation,
    Via,
)
from backend.app.billing.domain.state import Owned, State
from backend.app.billing.providers.stripe import translate
from backend.app.billing.providers.stripe_event import read_event
from backend.app.main import SHIPPED_CATALOG
from backend.app.simulator.delivery import Network
from backend.app.simulator.runner import route_of
from backend.app.simulator.truth import read_terms
from backend.app.simulator.world import START, Plan

SHIPPED = SHIPPED_CATALOG.read_text("utf-8")
CATALOG = parse_catalog(SHIPPED)
NOW = datetime(2026, 6, 1, tzinfo=UTC)


@pytest.mark.parametrize("seed", range(4))
def test_a_batch_of_random_lives_is_decided_as_one_event_after_the_other(seed: int) -> None:
    plan = Plan(seed=seed, start=START, days=90, terms=read_terms(SHIPPED))
    rough = Network(duplicates=0.0, disorder=0.5, delay=0.2, loss=0.0)
    deliveries = [event for number in range(6) for event in route_of(plan, number, rough).delivered]
    random.Random(seed).shuffle(deliveries)
    read = [read_event(event, signed_at=NOW) for event in deliveries]
    batch = [
        (event.envelope, translation)
        for event in read
        if isinstance(translation := translate(event), Translation)
    ]
    state = State()
    while batch:
        size = random.Random(len(batch)).randint(1, 40)
        together, batch = batch[:size], batch[size:]
        numbers, states = components(state, [party_names(named_parties(*each)) for each in together])
        for (event, translation), number in zip(together, numbers, strict=True):
            state, alone = decide(CATALOG, state, event, translation, now=NOW)
            states[number], grouped = decide(CATALOG, states[number], event, translation, now=NOW)
            assert grouped == alone
    assert len(state.entitlements) == 6


def subject(key: str, account: str = "") -> SubjectId:
    return SubjectId(account, False, key)


def test_events_that_name_one_user_one_customer_or_one_subject_are_one_group_and_others_are_not() -> None:
    tie = Tie(
        customer_id="cus_2", user_id="user_2", via=Via.CLIENT_REFERENCE_ID, occurred_at=NOW, event_id="evt_0"
    )
    state = State(
        sources={
            subject("sub:sub_1"): Owned(customer_id="cus_1", user_id="user_1"),
            subject("sub:sub_2"): Owned(customer_id=None, user_id="user_2"),
        },
        parents={subject("in:in_1"): frozenset({subject("sub:sub_1")})},
        ties={CustomerId("", False, "cus_2"): frozenset({tie})},
    )
    named: list[list[Hashable]] = [
        [subject("in:in_1")],
        ["user_1"],
        [subject("cus:cus_1")],
        [subject("cus:cus_2")],
        [subject("sub:sub_2")],
        [subject("sub:sub_3")],
        [],
        [],
    ]
    numbers, states = components(state, named)
    assert len({*numbers[:3]}) == 1
    assert numbers[3] == numbers[4]
    assert len({numbers[0], *numbers[3:]}) == 5
    assert set(states[numbers[0]].sources) == {subject("sub:sub_1")}
    assert set(states[numbers[3]].sources) == {subject("sub:sub_2")}
    assert states[numbers[5]] == State()


def test_what_is_said_of_an_account_holds_for_all_its_sources_in_the_same_batch() -> None:
    user_claim = ClaimFact(
        event_id="evt_2", event_type="claim.made", as_of=NOW, user_id="user_1", actor="", reason=""
    )
    left = EndedFact(event_id="evt_1", event_type="account.application.deauthorized", as_of=NOW)
    batch = [
        (event("evt_1"), Translation(facts=(About(key="acct:acct_1", fact=left),))),
        (event("evt_2"), Translation(facts=(About(key="sub:sub_9", fact=user_claim),))),
    ]
    numbers, _ = components(State(), [party_names(named_parties(*each)) for each in batch])
    assert numbers[0] == numbers[1]
    # Said earlier, it is in every group of the account.
    known = State(facts={subject("acct:acct_1", "acct_1"): (left,)})
    numbers, states = components(known, [party_names(named_parties(*batch[1])), ["user_7"]])
    assert numbers[0] != numbers[1]
    assert subject("acct:acct_1", "acct_1") in states[numbers[0]].facts


def event(event_id: str) -> Event:
    return Event(
        account="acct_1", livemode=False, id=event_id, type="test", api_version=None, occurred_at=NOW
    )
