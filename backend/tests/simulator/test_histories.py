"""Random histories through the real translation and decision: who has what, at any instant, is what the truth says."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from backend.app.billing.domain.catalog import parse_catalog
from backend.app.main import SHIPPED_CATALOG
from backend.app.simulator.delivery import Network
from backend.app.simulator.runner import explained, run_in_memory
from backend.app.simulator.truth import read_terms
from backend.app.simulator.world import START, Generation, Plan

SHIPPED = SHIPPED_CATALOG.read_text(encoding="utf-8")
# Ten groups, so that two processes share them evenly.
GROUPS = 10
HISTORIES_PER_GROUP = 200
LONG_HISTORIES_PER_GROUP = 5_000
ROUGH = Network(duplicates=0.3, disorder=0.4, delay=0.1, loss=0.05)


def edited(*replacements: tuple[str, str]) -> str:
    """The shipped catalog with other terms."""
    text = SHIPPED
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    return text


# Terms that the shipped ones do not use: seats that count, values that add up, purchases that end.
SEATS = edited(
    (
        '[features.max_devices]\ntype = "limit"',
        '[features.max_devices]\ntype = "limit"\nper_unit = true\nadditive = true',
    ),
    ("[plans.vip]\n", "[plans.vip]\npurchase_days = 45\n"),
    ("refund_revoke_percent = 100", "refund_revoke_percent = 50"),
)
# Every answer that the simulator plays turned round.
STRICT = edited(
    ("renewal_slack_hours = 72", "renewal_slack_hours = 0"),
    ("past_due_grace_days = 14", "past_due_grace_days = 2"),
    ('unpaid = "revoke"', 'unpaid = "keep"'),
    ('pause_collection_void = "keep"', 'pause_collection_void = "revoke"'),
    ('pause_collection_keep_as_draft = "keep"', 'pause_collection_keep_as_draft = "revoke"'),
    ('dispute_open = "revoke"', 'dispute_open = "keep"'),
    ('dispute_lost = "revoke"', 'dispute_lost = "keep"'),
)


def require_equal(seed: int, histories: int, catalog: str, generation: Generation = Generation.MIXED) -> None:
    """Fails with the smallest history that shows a difference, and the seed to play it again."""
    plan = Plan(seed=seed, start=START, days=150, terms=read_terms(catalog), generation=generation)
    report = run_in_memory(plan, histories, ROUGH, parse_catalog(catalog), lambda *_: None)
    assert not report.differences, "\n".join(explained(report.differences, plan, histories))


@pytest.mark.parametrize("group", range(GROUPS))
def test_everybody_has_what_they_paid_for_at_every_instant_of_random_histories(group: int) -> None:
    require_equal(1_000 + group, HISTORIES_PER_GROUP, SHIPPED)


@pytest.mark.parametrize("generation", list(Generation))
@pytest.mark.parametrize("catalog", [SEATS, STRICT], ids=["seats", "strict"])
def test_other_terms_and_each_generation_of_the_api_are_kept_as_well(
    catalog: str, generation: Generation
) -> None:
    require_equal(2_000, 60, catalog, generation)


@pytest.mark.long
@pytest.mark.parametrize("group", range(GROUPS))
def test_fifty_thousand_random_histories_agree(group: int) -> None:
    require_equal(3_000 + group, LONG_HISTORIES_PER_GROUP, SHIPPED)


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda text: text.replace("past_due_grace_days = 14", "past_due_grace_days = 15"), "entitlement"),
        (lambda text: text.replace('dispute_open = "revoke"', 'dispute_open = "keep"'), "dispute"),
    ],
    ids=["a day too much grace", "disputes that keep access"],
)
def test_a_service_with_other_terms_than_agreed_is_found_out(spoil: Callable[[str], str], word: str) -> None:
    plan = Plan(seed=1, start=START, days=150, terms=read_terms(SHIPPED))
    report = run_in_memory(plan, 60, ROUGH, parse_catalog(spoil(SHIPPED)), lambda *_: None)
    assert report.differences
    text = "\n".join(explained(report.differences, plan, 60))
    assert "seed 1" in text
    assert word in text
