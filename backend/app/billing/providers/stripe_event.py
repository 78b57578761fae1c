"""A Stripe event's envelope: verified JSON in, a checked `StripeEvent` out, or InvalidEvent."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from backend.app.billing.domain.facts import Event
from backend.app.billing.providers.fields import Fields, TranslationError
from backend.app.core.errors import InvalidEvent

# The dashboard's "Send test event" always carries this id; to remember it would make every later one a duplicate.
DASHBOARD_TEST_EVENT_ID = "evt_00000000000000"

_ID = re.compile(r"[A-Za-z0-9_\-]{1,255}")
_TYPE = re.compile(r"[a-z0-9_]+(\.[a-z0-9_\[\]]+){0,9}")
_TYPE_CHARACTERS_MAX = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class StripeEvent:
    """An event with its object (`data.object`) as Stripe rendered it in the event's API version."""

    envelope: Event
    object: Mapping[str, Any]
    previous_attributes: Mapping[str, Any] = field(default_factory=dict)
    # Whether it says itself when it occurred; else each delivery of it tells another time.
    is_dated: bool = True


def read_event(data: Mapping[str, Any], *, signed_at: datetime) -> StripeEvent:
    """The envelope of a parsed event body.

    `signed_at` stands in for a missing `created`, as in hand-made test events; Stripe always sends it.

    Raises:
        InvalidEvent: there is no usable `id`, `type` or `data.object`.

    Source: https://docs.stripe.com/api/events/object
    """
    fields = Fields(data, "event")
    event_id, event_type = data.get("id"), data.get("type")
    if not isinstance(event_id, str) or not _ID.fullmatch(event_id):
        raise InvalidEvent("The body has no usable event id.")
    if (
        not isinstance(event_type, str)
        or len(event_type) > _TYPE_CHARACTERS_MAX
        or not _TYPE.fullmatch(event_type)
    ):
        raise InvalidEvent("The body has no usable event type.")
    try:
        created = fields.instant("created")
        envelope = Event(
            account=fields.id("account") or "",
            livemode=fields.flag("livemode") or False,
            id=event_id,
            type=event_type,
            api_version=fields.text("api_version"),
            occurred_at=created or signed_at,
        )
    except TranslationError as error:
        raise InvalidEvent(f"The body is not an event: {error}.") from error
    carried = data.get("data")
    content = carried.get("object") if isinstance(carried, Mapping) else None
    if not isinstance(carried, Mapping) or not isinstance(content, Mapping):
        raise InvalidEvent("The body has no data.object.")
    previous = carried.get("previous_attributes")
    return StripeEvent(
        envelope=envelope,
        object=content,
        previous_attributes=previous if isinstance(previous, Mapping) else {},
        is_dated=created is not None,
    )
