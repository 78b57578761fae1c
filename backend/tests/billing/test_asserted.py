"""What is kept of an event without its body says all that the body asserted, the same each time, and nothing personal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from backend.app.billing.asserted import Asserted, asserted_by, kept_form, read_body, read_kept, read_stored
from backend.app.billing.domain.decide import Decision, Status
from backend.app.billing.domain.facts import CustomerId, Translation
from backend.app.billing.personal_data import without_personal_data
from backend.app.billing.providers.registry import translators
from backend.app.billing.providers.stripe_event import StripeEvent, read_event
from backend.app.core.compact_json import compact_json
from backend.app.main import SHIPPED_CATALOG
from backend.app.simulator import objects
from backend.app.simulator.truth import read_terms
from backend.app.simulator.world import START, Plan, live
from backend.tests.domain.situations import SITUATIONS, Situation

FIXTURES = Path(__file__).parents[1] / "fixtures"
EXAMPLES = sorted((FIXTURES / "stripe").glob("*.json"))
SHAPES = sorted((FIXTURES / "shapes").glob("*/*.json"))
AT = datetime(2026, 11, 23, 7, 30, tzinfo=UTC)
KEY = ("", False, "evt_1")


def of_body(body: bytes) -> StripeEvent:
    return read_body(body, signed_at=AT)


def in_any_event(path: Path) -> Iterator[tuple[str, bytes]]:
    """An example object of Stripe's in every event type that is translated."""
    content = json.loads(path.read_bytes())
    for event_type in translators():
        body = {"id": "evt_1", "type": event_type, "created": 1_764_000_060, "data": {"object": content}}
        yield event_type, json.dumps(body).encode()


def assert_kept(event: StripeEvent) -> None:
    """What is kept is read back as what was asserted; what is not understood is not kept at all."""
    asserts = asserted_by(event)
    kept = kept_form(event)
    if isinstance(asserts, Decision) and asserts.status is Status.PARKED:
        assert kept is None
        return
    assert kept is not None
    told = asserts if isinstance(asserts, Decision) else replace(asserts, alerts=())
    # As a database gives it back: other keys first, and new objects.
    stored = json.loads(compact_json(dict(reversed(kept.items()))))
    assert read_kept(stored, key=event.envelope.key) == Asserted(event=event.envelope, asserts=told)
    assert (
        compact_json(kept_form(event))
        == compact_json(kept)
        == json.dumps(kept, sort_keys=True, separators=(",", ":"))
    )


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_kind_of_event_is_kept_whole_without_a_person(path: Path) -> None:
    body = path.read_bytes()
    assert_kept(of_body(body))
    kept = compact_json(kept_form(of_body(body)))
    assert "@example.com" not in kept
    assert kept == compact_json(kept_form(of_body(without_personal_data(body, json.loads(body)["type"]))))
    assert len(kept) < len(body)


@pytest.mark.parametrize("path", SHAPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_stripes_own_examples_are_kept_whole_without_a_person(path: Path) -> None:
    for event_type, body in in_any_event(path):
        assert_kept(of_body(body))
        pseudonymised = without_personal_data(body, event_type)
        assert kept_form(of_body(body)) == kept_form(of_body(pseudonymised))


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda each: each.situation)
def test_every_event_of_every_situation_is_kept_whole(situation: Situation) -> None:
    for step in situation.story:
        if isinstance(step, StripeEvent):
            assert_kept(step)


def test_every_event_of_simulated_lives_is_kept_whole() -> None:
    plan = Plan(seed=5, start=START, days=150, terms=read_terms(SHIPPED_CATALOG.read_text("utf-8")))
    for number in range(20):
        for event in live(plan, number).events:
            assert_kept(read_event(event, signed_at=AT))


def test_what_is_kept_has_this_form() -> None:
    """Written down, because a later release must go on reading it."""
    session = objects.checkout_session(
        "cs_1", customer="cus_1", client_reference_id="user_1", metadata={"plan_code": "premium"}
    )
    event = objects.event("evt_1", "checkout.session.completed", session, created=1_764_000_000)
    assert kept_form(of_body(json.dumps(event).encode())) == {
        "version": 1,
        "type": "checkout.session.completed",
        "api_version": event["api_version"],
        "occurred_at": "2025-11-24T16:00:00Z",
        "asserts": {
            "subject": "cs:cs_1",
            "customer_id": "cus_1",
            "expects_access": True,
            "facts": [
                {
                    "key": "cs:cs_1",
                    "fact": {
                        "kind": "checkout",
                        "event_id": "evt_1",
                        "event_type": "checkout.session.completed",
                        "as_of": "2025-11-24T16:00:00Z",
                        "session_id": "cs_1",
                        "mode": "payment",
                        "state": "paid",
                        "customer_id": "cus_1",
                        "subscription_id": None,
                        "lines": [],
                        "amount": 2999,
                        "client_reference_id": "user_1",
                        "metadata_user_id": None,
                        "metadata_plan_code": "premium",
                    },
                }
            ],
            "ties": [
                {
                    "customer_id": "cus_1",
                    "user_id": "user_1",
                    "via": 2,
                    "occurred_at": "2025-11-24T16:00:00Z",
                    "event_id": "evt_1",
                }
            ],
            "payments": [
                {
                    "effect_key": "cs:cs_1",
                    "event_type": "checkout_completed",
                    "customer_id": "cus_1",
                    "amount": 2999,
                    "currency": "usd",
                    "settled": True,
                    "metadata_user_id": "user_1",
                    "metadata_plan_code": "premium",
                    "metadata": {"plan_code": "premium"},
                }
            ],
        },
    }


def test_of_an_event_that_nothing_depends_on_only_its_customer_is_kept() -> None:
    content = {
        "id": "pm_1",
        "object": "payment_method",
        "customer": "cus_1",
        "billing_details": {"email": "e"},
    }
    event = objects.event("evt_1", "payment_method.attached", content, created=1_764_000_000)
    kept = kept_form(of_body(json.dumps(event).encode()))
    assert kept is not None
    assert kept["not_handled"] == {"customer_id": "cus_1"}
    assert "asserts" not in kept
    asserted = read_kept(kept, key=KEY)
    assert isinstance(asserted.asserts, Decision)
    assert asserted.asserts.customer == CustomerId("", False, "cus_1")


@pytest.mark.parametrize("livemode", [False, True])
def test_an_event_means_the_same_to_either_mode_with_its_body_and_without(livemode: bool) -> None:
    """So bodies may be let go under the wrong STRIPE_MODE, and nothing is lost for the right one."""
    session = objects.checkout_session("cs_1", client_reference_id="user_1")
    event = objects.event(
        "evt_1", "checkout.session.completed", session, created=1_764_000_000, livemode=True
    )
    body = json.dumps(event).encode()
    kept = kept_form(of_body(body))
    key = ("", True, "evt_1")
    with_body, without = (
        read_stored(key, payload, document, occurred_at=AT, livemode=livemode)
        for payload, document in ((body, None), (None, kept))
    )
    assert with_body == without
    assert isinstance(without.asserts, Translation) == livemode


def test_a_missing_time_of_creation_stays_what_the_signature_said() -> None:
    event = objects.event("evt_1", "price.updated", {"id": "price_1"}, created=1)
    del event["created"]
    kept = kept_form(of_body(json.dumps(event).encode()))
    assert kept is not None
    asserted = read_stored(KEY, None, kept, occurred_at=AT + timedelta(days=1), livemode=False)
    assert asserted.event.occurred_at == AT


def test_what_a_newer_tollkeeper_kept_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"event evt_1 .* version 2; this Tollkeeper reads version 1"):
        read_kept({"version": 2}, key=KEY)


@pytest.mark.parametrize(
    "document",
    [
        {"version": 1},
        {"version": 1, "type": "t", "api_version": None, "occurred_at": "secret", "asserts": {"facts": []}},
        {"version": 1, "type": "t", "api_version": None, "occurred_at": "2026-01-01T00:00:00Z", "asserts": 7},
        {
            "version": 1,
            "type": "t",
            "api_version": None,
            "occurred_at": "2026-01-01T00:00:00Z",
            "asserts": {"facts": [{"key": "cs:cs_1", "fact": {"kind": "secret"}}]},
        },
    ],
)
def test_what_somebody_altered_beyond_reading_is_refused_without_its_content(
    document: dict[str, Any],
) -> None:
    with pytest.raises(ValueError, match="event evt_1 has no body, and what is kept") as refused:
        read_kept(document, key=KEY)
    assert "secret" not in str(refused.value)
