"""What a stored event asserts, read from its body, or from what is kept of it once its body was let go.

    asserted = read_stored(key, payload, kept, occurred_at=..., livemode=...)
    kept = kept_form(read_body(payload, signed_at=...))     # the same event always gives the same document

What is kept does not depend on the mode that a deployment grants for: whether it may act on an event is
asked when that is read, so letting bodies go under a wrong setting loses nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from pydantic import TypeAdapter, ValidationError

from backend.app.billing.domain.decide import Decision, Notice, Status
from backend.app.billing.domain.facts import About, CustomerId, Event, EventKey, Translation
from backend.app.billing.providers.fields import TranslationError
from backend.app.billing.providers.stripe import customer_named, translate
from backend.app.billing.providers.stripe_event import StripeEvent, read_event
from backend.app.billing.store_state import FACT
from backend.app.billing.strict_json import parse_event_json

# The form of the document below. A later release that writes another one goes on reading this one; a default of
# `Translation` or of what is in it, but for facts, can't change without a new version, because defaults are left out.
VERSION = 1

_OTHER_MODE = Decision(status=Status.IGNORED, reason="other_livemode")
_NOT_HANDLED = "not_handled"

_INSTANT: TypeAdapter[datetime] = TypeAdapter(datetime)
_TRANSLATION: TypeAdapter[Translation] = TypeAdapter(Translation)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asserted:
    """An event and what it asserts, or the decision on it where it asserts nothing that can be decided on."""

    event: Event
    asserts: Translation | Decision


def asserted_by(event: StripeEvent) -> Translation | Decision:
    """What an event asserts, or the decision where that is nothing that anybody can act on."""
    try:
        translation = translate(event)
    except TranslationError as error:
        return replace(_unreadable(event.envelope, str(error)), customer=customer_named(event))
    return translation or Decision(status=Status.IGNORED, reason=_NOT_HANDLED, customer=customer_named(event))


def translated(event: StripeEvent, *, livemode: bool) -> Translation | Decision:
    """What an event asserts, or the decision where that is nothing a deployment of this mode may or can act on."""
    if event.envelope.livemode != livemode:
        return _OTHER_MODE
    return asserted_by(event)


def read_body(payload: bytes, *, signed_at: datetime) -> StripeEvent:
    """The event of a stored body: it was read before, so it can be read again.

    `signed_at` is the row's `occurred_at`: a missing `created` was replaced by the time of the signature,
    which only the row remembers.
    """
    return read_event(parse_event_json(payload), signed_at=signed_at)


def read_stored(
    key: EventKey,
    payload: bytes | None,
    kept: Mapping[str, Any] | None,
    *,
    occurred_at: datetime,
    livemode: bool,
) -> Asserted:
    """What a row of `webhook_events` asserts to a deployment of one mode: by its body, or by what is kept without it.

    Raises:
        ValueError: another Tollkeeper or another hand wrote what is kept.
    """
    if payload is not None:
        event = read_body(payload, signed_at=occurred_at)
        return Asserted(event=event.envelope, asserts=translated(event, livemode=livemode))
    asserted = read_kept(kept or {}, key=key)
    return asserted if asserted.event.livemode == livemode else replace(asserted, asserts=_OTHER_MODE)


def kept_form(read: StripeEvent) -> dict[str, Any] | None:
    """What is kept of an event without its body, with sorted keys and nothing in it but what is decided on.

    None where that can't be told, or not so that it reads back the same: then the body must stay.
    """
    event, asserts = read.envelope, asserted_by(read)
    if isinstance(asserts, Decision) and asserts.reason != _NOT_HANDLED:
        return None
    document: dict[str, Any] = {
        "version": VERSION,
        "type": event.type,
        "api_version": event.api_version,
        "occurred_at": _INSTANT.dump_python(event.occurred_at, mode="json"),
    }
    if isinstance(asserts, Decision):
        document["not_handled"] = {"customer_id": asserts.customer.id if asserts.customer else None}
    else:
        document["asserts"] = {
            # Without texts to the owner: they were told when the event came, and nothing rests on them.
            **_TRANSLATION.dump_python(
                replace(asserts, facts=(), alerts=()), mode="json", exclude_defaults=True
            ),
            # As they are in the table `facts`, so that both are read by the same reader.
            "facts": [
                {"key": about.key, "fact": FACT.dump_python(about.fact, mode="json")}
                for about in asserts.facts
            ],
        }
    kept: dict[str, Any] = json.loads(json.dumps(document, sort_keys=True))
    without_alerts = asserts if isinstance(asserts, Decision) else replace(asserts, alerts=())
    same = Asserted(event=event, asserts=without_alerts) == read_kept(kept, key=event.key)
    return kept if same else None


def read_kept(document: Mapping[str, Any], *, key: EventKey) -> Asserted:
    """What is kept of an event whose body was let go; `key` is the event's name.

    Raises:
        ValueError: another Tollkeeper or another hand wrote it.
    """
    account, livemode, event_id = key
    if document.get("version") != VERSION:
        raise ValueError(
            f"event {event_id} has no body, and what is kept of it is of version {document.get('version')}; "
            f"this Tollkeeper reads version {VERSION}"
        )
    problem = None
    try:
        event = Event(
            account=account,
            livemode=livemode,
            id=event_id,
            type=document["type"],
            api_version=document["api_version"],
            occurred_at=_INSTANT.validate_python(document["occurred_at"]),
        )
        return Asserted(event=event, asserts=_asserts(event, document))
    except (ValidationError, KeyError, TypeError, AttributeError) as error:
        problem = type(error).__name__
    # Raised out here: a chained error would carry the content along.
    raise ValueError(f"event {event_id} has no body, and what is kept of it can't be read: {problem}")


def _asserts(event: Event, document: Mapping[str, Any]) -> Translation | Decision:
    if "not_handled" in document:
        customer_id = document["not_handled"]["customer_id"]
        customer = CustomerId(event.account, event.livemode, customer_id) if customer_id else None
        return Decision(status=Status.IGNORED, reason=_NOT_HANDLED, customer=customer)
    asserts = document["asserts"]
    facts = tuple(
        About(key=about["key"], fact=FACT.validate_python(about["fact"])) for about in asserts["facts"]
    )
    return replace(_TRANSLATION.validate_python({**asserts, "facts": ()}), facts=facts)


def _unreadable(event: Event, problem: str) -> Decision:
    return Decision(
        status=Status.PARKED,
        reason=f"unreadable:{problem}",
        notices=(
            Notice(
                key=f"unreadable:{event.type}:{event.api_version}",
                text=f"Event {event.id} ({event.type}, API {event.api_version}) is parked: {problem}. "
                "It is kept and can be processed again once its shape is understood.",
            ),
        ),
    )
