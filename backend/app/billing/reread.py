"""Settles what events leave open: reads the object back from Stripe and lets it through the same shell.

What was read is stored like an event of its own (`read_...`), so a rebuild from the store sees it too.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import structlog

from backend.app.billing.domain.decide import Reread
from backend.app.billing.stripe_api import API_VERSION, StripeApi, StripeObject
from backend.app.core.clock import to_unix
from backend.app.core.errors import NotFound
from backend.app.ops.outbox import Message, NewMessage

REREAD = "reread"

log = structlog.get_logger(__name__)


def reread_message(wanted: Reread, *, cause_event_id: str) -> NewMessage:
    """The outbox message that asks for a read; one event asks once."""
    return NewMessage(
        kind=REREAD,
        payload={
            "account": wanted.account,
            "livemode": wanted.livemode,
            "kind": wanted.kind,
            "object_id": wanted.object_id,
        },
        dedupe_key=f"reread:{wanted.account}:{wanted.livemode}:{wanted.object_id}:{cause_event_id}"[:255],
    )


class Rereader:
    """The outbox's handler of `reread` messages; `take` is the shell's way in for what was read."""

    def __init__(self, api: StripeApi, take: Callable[[bytes], Awaitable[None]]) -> None:
        self._api = api
        self._take = take

    async def deliver(self, message: Message) -> None:
        """Reads one object and applies it; raises Unavailable where it has to be tried again."""
        wanted = message.payload
        try:
            if wanted["kind"] == "sub":
                found = await self._api.subscription(wanted["object_id"], account=wanted["account"])
                event_type = "customer.subscription.updated"
            else:
                found = await self._api.checkout_session(wanted["object_id"], account=wanted["account"])
                event_type = "checkout.session.completed"
        except NotFound:
            # Deleted meanwhile: its events stay all that is known, and its deletion's event ends it.
            log.warning("reread_found_nothing", kind=wanted["kind"], object_id=wanted["object_id"])
            return
        await self._take(_as_event(message.id, event_type, found, wanted))


def _as_event(message_id: str, event_type: str, found: StripeObject, wanted: Mapping[str, Any]) -> bytes:
    document: dict[str, Any] = {
        "id": f"read_{message_id}",
        "object": "event",
        "api_version": API_VERSION,
        "created": to_unix(found.read_at),
        "livemode": wanted["livemode"],
        "type": event_type,
        "data": {"object": found.content},
    }
    if wanted["account"]:
        document["account"] = wanted["account"]
    return json.dumps(document).encode()
