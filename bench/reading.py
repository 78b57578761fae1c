"""What a simple handler takes from an event: whose it is, which plan, how much money. No decision, no doubt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Simple:
    """An event at its word; `amount` in the currency's smallest unit, None where no money moved."""

    event_id: str
    event_type: str
    user_id: str
    plan_code: str
    amount: int | None


def read_simply(event: Mapping[str, Any]) -> Simple:
    """The fields that tutorials read; KeyError or TypeError for an event of another kind."""
    document = event["data"]["object"]
    kind = event["type"]
    if kind == "checkout.session.completed":
        metadata = document["metadata"]
        return Simple(
            event["id"],
            kind,
            document["client_reference_id"],
            metadata["plan_code"],
            document["amount_total"],
        )
    if kind == "invoice.paid":
        metadata = document["parent"]["subscription_details"]["metadata"]
        return Simple(event["id"], kind, metadata["user_id"], metadata["plan_code"], document["amount_paid"])
    price = document["items"]["data"][0]["price"]
    # `vip_monthly` is the price of the plan `vip`.
    plan_code = price["lookup_key"].partition("_")[0]
    return Simple(event["id"], kind, document["metadata"]["user_id"], plan_code, None)
