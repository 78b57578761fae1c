"""A signed body becomes an event, or is refused with a reason that carries nothing of the body."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from backend.app.billing.providers.stripe_event import read_event
from backend.app.core.errors import InvalidEvent

SIGNED_AT = datetime(2026, 11, 23, tzinfo=UTC)


def body(**changes: Any) -> dict[str, Any]:
    return {
        "id": "evt_1",
        "type": "invoice.paid",
        "api_version": "2024-06-20",
        "created": 1_764_000_000,
        "livemode": True,
        "data": {"object": {"id": "in_1"}},
        **changes,
    }


def test_the_envelope_is_read() -> None:
    event = read_event(body(account="acct_1"), signed_at=SIGNED_AT)
    assert event.object == {"id": "in_1"}
    envelope = event.envelope
    assert (envelope.id, envelope.type, envelope.account) == ("evt_1", "invoice.paid", "acct_1")
    assert envelope.livemode is True
    assert envelope.api_version == "2024-06-20"
    assert envelope.occurred_at == datetime(2025, 11, 24, 16, 0, tzinfo=UTC)


def test_what_a_hand_made_event_lacks_is_filled_in_cautiously() -> None:
    """The platform's own account, test mode, and the time of the signature."""
    envelope = read_event(
        {"id": "evt_1", "type": "invoice.paid", "data": {"object": {}}}, signed_at=SIGNED_AT
    ).envelope
    assert (envelope.account, envelope.livemode, envelope.api_version) == ("", False, None)
    assert envelope.occurred_at == SIGNED_AT


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"id": None}, "no usable event id"),
        ({"id": 5}, "no usable event id"),
        ({"id": ""}, "no usable event id"),
        ({"id": "evt 1"}, "no usable event id"),
        ({"id": "e" * 256}, "no usable event id"),
        ({"type": None}, "no usable event type"),
        ({"type": 5}, "no usable event type"),
        ({"type": "Invoice paid"}, "no usable event type"),
        ({"type": "a" * 201}, "no usable event type"),
        ({"data": None}, r"no data\.object"),
        ({"data": {}}, r"no data\.object"),
        ({"data": {"object": []}}, r"no data\.object"),
        ({"created": "today"}, r"event\.created is not seconds since 1970"),
        ({"livemode": "yes"}, r"event\.livemode is not true or false"),
        ({"account": 5}, r"event\.account is not a text"),
        ({"api_version": 5}, r"event\.api_version is not a text"),
    ],
)
def test_what_is_not_an_event_is_refused_by_name(changes: dict[str, Any], detail: str) -> None:
    with pytest.raises(InvalidEvent, match=detail):
        read_event(body(**changes), signed_at=SIGNED_AT)


@pytest.mark.parametrize("event_type", ["v2.core.event", "invoice.paid", "ping", "capability.updated"])
def test_types_we_have_never_heard_of_are_events_too(event_type: str) -> None:
    assert read_event(body(type=event_type), signed_at=SIGNED_AT).envelope.type == event_type
