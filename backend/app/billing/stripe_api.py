"""Reading objects back from Stripe: bounded in time and size, and only ever from the configured base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from backend.app.core.errors import NotFound, Unavailable

# The version whose shapes these reads are tested with; events keep the version of their endpoint.
API_VERSION = "2025-06-30.basil"
# Stripe answers reads well within a second; the outbox tries again later.
READ_SECONDS_MAX = 5.0
# A session has at most 100 lines; the list endpoint gives them in pages of this size.
LINES_PER_PAGE = 100
PAGES_MAX = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class StripeObject:
    """An object as it stood when Stripe answered, by Stripe's own clock."""

    content: Mapping[str, Any]
    read_at: datetime


class StripeApi:
    """A client for the few objects that are read back."""

    def __init__(self, *, secret_key: str, api_base: str) -> None:
        self._client = httpx2.AsyncClient(
            base_url=api_base,
            headers={"Authorization": f"Bearer {secret_key}", "Stripe-Version": API_VERSION},
            timeout=READ_SECONDS_MAX,
            follow_redirects=False,
            # Proxies and certificates from the environment could lead the key elsewhere.
            trust_env=False,
        )

    async def subscription(self, subscription_id: str, *, account: str) -> StripeObject:
        """A subscription with all its items (docs.stripe.com/api/subscriptions/retrieve)."""
        found = await self._get(f"/v1/subscriptions/{subscription_id}", {}, account)
        items = await self._all("/v1/subscription_items", {"subscription": subscription_id}, account)
        return StripeObject(
            content={**found.content, "items": {"object": "list", "data": items, "has_more": False}},
            read_at=found.read_at,
        )

    async def checkout_session(self, session_id: str, *, account: str) -> StripeObject:
        """A checkout session with all its lines (docs.stripe.com/api/checkout/sessions/line_items)."""
        found = await self._get(f"/v1/checkout/sessions/{session_id}", {}, account)
        lines = await self._all(f"/v1/checkout/sessions/{session_id}/line_items", {}, account)
        return StripeObject(
            content={**found.content, "line_items": {"object": "list", "data": lines, "has_more": False}},
            read_at=found.read_at,
        )

    async def close(self) -> None:
        """Ends the connections."""
        await self._client.aclose()

    async def _all(self, path: str, parameters: Mapping[str, str], account: str) -> list[Any]:
        entries: list[Any] = []
        for _ in range(PAGES_MAX):
            more = {"starting_after": entries[-1]["id"]} if entries else {}
            page = await self._get(path, {**parameters, "limit": str(LINES_PER_PAGE), **more}, account)
            entries += page.content.get("data", [])
            if not page.content.get("has_more"):
                return entries
        raise Unavailable("Stripe's list did not end.")

    async def _get(self, path: str, parameters: Mapping[str, str], account: str) -> StripeObject:
        """Raises NotFound where there is no such object, Unavailable for all that may be different later."""
        headers = {"Stripe-Account": account} if account else {}
        try:
            response = await self._client.get(path, params=dict(parameters), headers=headers)
        except httpx2.HTTPError as error:
            raise Unavailable("Stripe can't be reached.") from error
        if response.status_code == 404:  # noqa: PLR2004  # HTTP's "not found"
            raise NotFound
        if response.status_code != 200:  # noqa: PLR2004  # HTTP's "OK"
            raise Unavailable(f"Stripe answered {response.status_code}.")
        sent_at = response.headers.get("date")
        read_at = parsedate_to_datetime(sent_at) if sent_at else datetime.now(UTC)
        return StripeObject(content=response.json(), read_at=read_at.astimezone(UTC))
