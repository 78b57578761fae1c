"""Every situation of docs/situations.md, told as a story of events: what a user then has, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backend.app.billing.domain.catalog import Catalog
from backend.app.billing.domain.decide import decide
from backend.app.billing.domain.facts import Event
from backend.app.billing.domain.state import State
from backend.app.billing.providers.stripe import translate
from backend.tests.domain.events import EMPTY, access_of, at, event, shipped_catalog
from backend.tests.domain.situations import ELSEWHERE, SITUATIONS, Elsewhere, Outcome, Situation, Step

CATALOG = shipped_catalog()
ROOT = Path(__file__).parents[3]
# Numbers are told with their unit in the catalog file and as durations in the policy.
DURATIONS = {
    "renewal_slack_hours": ("renewal_slack", 3600),
    "past_due_grace_days": ("past_due_grace", 86_400),
}


def with_answer(key: str, answer: str | int) -> Catalog:
    changes: dict[str, Any]
    if key in DURATIONS:
        name, unit_seconds = DURATIONS[key]
        changes = {name: at(int(answer) * unit_seconds) - at(0)}
    else:
        # Of the same kind as the answer that is shipped: a word of an enumeration, or a number.
        changes = {key: type(getattr(CATALOG.policy, key))(answer)}
    return replace(CATALOG, policy=replace(CATALOG.policy, **changes))


def declared(catalog: Catalog, per_unit: Sequence[str]) -> Catalog:
    """The catalog with some features counted per unit."""
    features = {
        key: replace(feature, is_per_unit=key in per_unit) for key, feature in catalog.features.items()
    }
    return replace(catalog, features=features)


def told(catalog: Catalog, story: Sequence[Step], asked_at: int, then: Outcome) -> Outcome:
    """What a story comes to; each event is decided when it occurs."""
    state: State = EMPTY
    answer = "ignored"
    settled: set[str] = set()
    notices: dict[str, str] = {}
    for step in story:
        envelope: Event
        if isinstance(step, tuple):
            envelope, translation = step
        else:
            envelope, read = step.envelope, translate(step)
            if read is None:
                answer = "ignored"
                continue
            translation = read
        state, decision = decide(catalog, state, envelope, translation, now=envelope.occurred_at)
        answer = decision.status.value
        settled |= {payment.fact.effect_key for payment in decision.payments if payment.fact.settled}
        # Of equal keys the outbox keeps the first.
        for notice in decision.notices:
            notices.setdefault(notice.key, notice.text)
    entitlement = access_of(catalog, state, "user_1", now=at(asked_at))
    until = entitlement.valid_until
    assert len(notices) == len(then.notices), notices
    for part, text in zip(then.notices, notices.values(), strict=True):
        assert part in text
    return Outcome(
        plan=entitlement.plan_code,
        status=entitlement.status,
        until=int((until - at(0)).total_seconds()) if until else None,
        answer=answer,
        settled=tuple(sorted(settled)),
        notices=then.notices,
        features={key: entitlement.features[key] for key in then.features},
    )


def name_of(value: object) -> str | None:
    return f"{value.situation} [{value.policy}]" if isinstance(value, Situation) else None


@pytest.mark.parametrize("case", SITUATIONS, ids=name_of)
def test_a_situation_comes_to_its_outcome(case: Situation) -> None:
    catalog = declared(CATALOG, case.per_unit)
    assert told(catalog, case.story, case.asked_at, case.then) == case.then


@pytest.mark.parametrize(
    ("case", "answer"),
    [(case, answer) for case in SITUATIONS for answer in case.otherwise],
    ids=name_of,
)
def test_the_policy_answered_differently_changes_the_outcome(case: Situation, answer: str | int) -> None:
    assert case.policy is not None
    then = case.otherwise[answer]
    catalog = declared(with_answer(case.policy, answer), case.per_unit)
    assert told(catalog, case.story, case.asked_at, then) == then


def test_every_policy_is_exercised_with_another_answer_than_the_shipped_one() -> None:
    answered = {case.policy for case in SITUATIONS if case.otherwise}
    shipped = {name for name in CATALOG.policy.__slots__ if name != "version"}
    assert {DURATIONS[key][0] if key in DURATIONS else key for key in answered if key} == shipped


def test_no_situation_is_told_twice() -> None:
    rows = [(case.table, case.situation) for case in SITUATIONS]
    assert len(rows) == len(set(rows))


@pytest.mark.parametrize("row", [row for row in ELSEWHERE if row.shown_by], ids=lambda row: row.situation)
def test_a_row_that_is_shown_elsewhere_names_a_test_that_is_there(row: Elsewhere) -> None:
    path, _, name = str(row.shown_by).rpartition("::")
    assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8")


def test_what_the_table_calls_ignored_is_not_translated() -> None:
    summary = event("evt_1", "entitlements.active_entitlement_summary.updated", {"customer": "cus_1"})
    assert translate(summary) is None
