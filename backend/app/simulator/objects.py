"""Stripe objects and events as Stripe renders them, before and after API version 2025-03-31 (basil).

Keys and types follow Stripe's published API reference; every function returns a fresh dict that the
caller may change. Times are unix seconds, amounts the currency's smallest unit.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

Json = dict[str, Any]

DAY_SECONDS = 86_400
MONTH_SECONDS = 30 * DAY_SECONDS


class Shape(StrEnum):
    """The two generations that differ in what matters here; the value is an API version of each."""

    BEFORE_BASIL = "2024-06-20"
    BASIL = "2025-06-30.basil"


def event(
    event_id: str,
    event_type: str,
    content: Json,
    *,
    created: int,
    livemode: bool = False,
    shape: Shape = Shape.BASIL,
    account: str | None = None,
    previous_attributes: Json | None = None,
) -> Json:
    """An event around an object (docs.stripe.com/api/events/object)."""
    data: Json = {"object": content}
    if previous_attributes is not None:
        data["previous_attributes"] = previous_attributes
    envelope: Json = {
        "id": event_id,
        "object": "event",
        "api_version": shape.value,
        "created": created,
        "data": data,
        "livemode": livemode,
        "pending_webhooks": 1,
        "request": {"id": None, "idempotency_key": None},
        "type": event_type,
    }
    if account is not None:
        envelope["account"] = account
    return envelope


def price(lookup_key: str | None, *, unit_amount: int = 2999, price_id: str | None = None) -> Json:
    """A recurring monthly price (docs.stripe.com/api/prices/object)."""
    return {
        "id": price_id or f"price_{lookup_key}",
        "object": "price",
        "active": True,
        "billing_scheme": "per_unit",
        "currency": "usd",
        "livemode": False,
        "lookup_key": lookup_key,
        "metadata": {},
        "nickname": None,
        "product": f"prod_{lookup_key or price_id}",
        "recurring": {"interval": "month", "interval_count": 1, "usage_type": "licensed"},
        "type": "recurring",
        "unit_amount": unit_amount,
        "unit_amount_decimal": str(unit_amount),
    }


def checkout_session(
    session_id: str,
    *,
    mode: str = "payment",
    payment_status: str = "paid",
    status: str = "complete",
    amount_total: int | None = 2999,
    customer: str | None = None,
    subscription: str | None = None,
    invoice: str | None = None,
    payment_intent: str | None = None,
    client_reference_id: str | None = None,
    metadata: Json | None = None,
    created: int = 0,
) -> Json:
    """A hosted checkout (docs.stripe.com/api/checkout/sessions/object)."""
    return {
        "id": session_id,
        "object": "checkout.session",
        "amount_subtotal": amount_total,
        "amount_total": amount_total,
        "cancel_url": "https://example.com/cancel",
        "client_reference_id": client_reference_id,
        "client_secret": None,
        "created": created,
        "currency": "usd",
        "customer": customer,
        "customer_details": {"email": "buyer@example.com", "name": "A Buyer", "phone": None},
        "expires_at": created + DAY_SECONDS,
        "invoice": invoice,
        "livemode": False,
        "metadata": metadata or {},
        "mode": mode,
        "payment_intent": payment_intent,
        "payment_method_types": ["card"],
        "payment_status": payment_status,
        "setup_intent": None,
        "status": status,
        "subscription": subscription,
        "success_url": "https://example.com/success",
        "total_details": {"amount_discount": 0, "amount_shipping": 0, "amount_tax": 0},
        "url": None,
    }


def subscription(
    subscription_id: str,
    *,
    customer: str | None,
    status: str = "active",
    prices: list[Json] | None = None,
    period_start: int,
    period_end: int,
    metadata: Json | None = None,
    trial_end: int | None = None,
    cancel_at_period_end: bool = False,
    cancel_at: int | None = None,
    ended_at: int | None = None,
    start_date: int | None = None,
    quantity: int = 1,
    shape: Shape = Shape.BASIL,
) -> Json:
    """A subscription (docs.stripe.com/api/subscriptions/object); its period stands where its generation has it."""
    period = {"current_period_start": period_start, "current_period_end": period_end}
    items = [
        {
            "id": f"si_{subscription_id}_{index}",
            "object": "subscription_item",
            "created": period_start,
            "metadata": {},
            "price": entry,
            "quantity": quantity,
            "subscription": subscription_id,
            **(period if shape is Shape.BASIL else {}),
        }
        for index, entry in enumerate(prices if prices is not None else [price("premium")])
    ]
    return {
        "id": subscription_id,
        "object": "subscription",
        "billing_cycle_anchor": period_start,
        "cancel_at": cancel_at,
        "cancel_at_period_end": cancel_at_period_end,
        "canceled_at": ended_at,
        "collection_method": "charge_automatically",
        "created": start_date if start_date is not None else period_start,
        "currency": "usd",
        "customer": customer,
        "ended_at": ended_at,
        "items": {
            "object": "list",
            "data": items,
            "has_more": False,
            "url": f"/v1/subscription_items?subscription={subscription_id}",
        },
        "latest_invoice": None,
        "livemode": False,
        "metadata": metadata or {},
        "pause_collection": None,
        "pending_update": None,
        "schedule": None,
        "start_date": start_date if start_date is not None else period_start,
        "status": status,
        "trial_end": trial_end,
        "trial_start": period_start if trial_end is not None else None,
        **(period if shape is Shape.BEFORE_BASIL else {}),
    }


def invoice(
    invoice_id: str,
    *,
    customer: str | None,
    subscription_id: str | None = None,
    amount: int = 2999,
    paid: bool = True,
    attempt_count: int = 1,
    billing_reason: str = "subscription_cycle",
    metadata: Json | None = None,
    line_price: Json | None = None,
    period_start: int = 0,
    period_end: int = 0,
    shape: Shape = Shape.BASIL,
) -> Json:
    """An invoice of one line (docs.stripe.com/api/invoices/object); its links stand where its generation has them."""
    line: Json = {
        "id": f"il_{invoice_id}",
        "object": "line_item",
        "amount": amount,
        "currency": "usd",
        "description": "1 x plan",
        "metadata": metadata or {},
        "period": {"start": period_start, "end": period_end},
        "quantity": 1,
    }
    document: Json = {
        "id": invoice_id,
        "object": "invoice",
        "amount_due": amount,
        "amount_paid": amount if paid else 0,
        "amount_remaining": 0 if paid else amount,
        "attempt_count": attempt_count,
        "attempted": True,
        "billing_reason": billing_reason,
        "collection_method": "charge_automatically",
        "created": period_start,
        "currency": "usd",
        "customer": customer,
        "customer_email": "buyer@example.com",
        "lines": {"object": "list", "data": [line], "has_more": False},
        "livemode": False,
        "metadata": {},
        "period_end": period_end,
        "period_start": period_start,
        "status": "paid" if paid else "open",
        "total": amount,
    }
    used_price = line_price or price("premium")
    if shape is Shape.BASIL:
        line["pricing"] = {
            "type": "price_details",
            "price_details": {"price": used_price["id"], "product": used_price["product"]},
        }
        if subscription_id is not None:
            line["parent"] = {
                "type": "subscription_item_details",
                "subscription_item_details": {"subscription": subscription_id},
            }
            document["parent"] = {
                "type": "subscription_details",
                "quote_details": None,
                "subscription_details": {"metadata": metadata or {}, "subscription": subscription_id},
            }
        else:
            document["parent"] = None
        return document
    line["price"] = used_price
    line["subscription"] = subscription_id
    document.update(
        {
            "charge": f"ch_{invoice_id}" if paid else None,
            "paid": paid,
            "payment_intent": f"pi_{invoice_id}",
            "subscription": subscription_id,
            "subscription_details": {"metadata": metadata or {}} if subscription_id else None,
        }
    )
    return document


def charge(
    charge_id: str,
    *,
    amount: int = 2999,
    amount_refunded: int = 0,
    captured: bool = True,
    customer: str | None = None,
    payment_intent: str | None = None,
    invoice: str | None = None,
    status: str = "succeeded",
    metadata: Json | None = None,
    created: int = 0,
    shape: Shape = Shape.BASIL,
) -> Json:
    """A charge (docs.stripe.com/api/charges/object)."""
    document: Json = {
        "id": charge_id,
        "object": "charge",
        "amount": amount,
        "amount_captured": amount if captured else 0,
        "amount_refunded": amount_refunded,
        "balance_transaction": f"txn_{charge_id}",
        "billing_details": {"email": "buyer@example.com", "name": "A Buyer", "phone": None},
        "captured": captured,
        "created": created,
        "currency": "usd",
        "customer": customer,
        "description": None,
        "disputed": False,
        "livemode": False,
        "metadata": metadata or {},
        "paid": status == "succeeded",
        "payment_intent": payment_intent,
        "payment_method_details": {
            "card": {"brand": "visa", "exp_month": 8, "exp_year": 2031, "last4": "4242"},
            "type": "card",
        },
        "refunded": amount_refunded >= amount,
        "status": status,
    }
    if shape is Shape.BEFORE_BASIL:
        document["invoice"] = invoice
    return document


def payment_intent(
    intent_id: str,
    *,
    amount: int = 2999,
    status: str = "succeeded",
    customer: str | None = None,
    metadata: Json | None = None,
    created: int = 0,
) -> Json:
    """A payment intent (docs.stripe.com/api/payment_intents/object), with the secret that Stripe sends along."""
    return {
        "id": intent_id,
        "object": "payment_intent",
        "amount": amount,
        "amount_received": amount if status == "succeeded" else 0,
        "client_secret": f"{intent_id}_secret_0123456789abcdefghijklmn",
        "created": created,
        "currency": "usd",
        "customer": customer,
        "latest_charge": f"ch_{intent_id}",
        "livemode": False,
        "metadata": metadata or {},
        "status": status,
    }


def refund(
    refund_id: str,
    *,
    amount: int = 2999,
    charge_id: str | None = None,
    intent_id: str | None = None,
    status: str = "succeeded",
    created: int = 0,
) -> Json:
    """A refund (docs.stripe.com/api/refunds/object)."""
    return {
        "id": refund_id,
        "object": "refund",
        "amount": amount,
        "charge": charge_id,
        "created": created,
        "currency": "usd",
        "metadata": {},
        "payment_intent": intent_id,
        "reason": None,
        "status": status,
    }


def customer(customer_id: str, *, created: int = 0) -> Json:
    """A customer (docs.stripe.com/api/customers/object)."""
    return {
        "id": customer_id,
        "object": "customer",
        "address": None,
        "balance": 0,
        "created": created,
        "currency": "usd",
        "delinquent": False,
        "description": None,
        "email": "buyer@example.com",
        "livemode": False,
        "metadata": {},
        "name": "A Buyer",
        "phone": None,
    }


def dispute(
    dispute_id: str,
    *,
    amount: int = 2999,
    charge_id: str | None = None,
    intent_id: str | None = None,
    status: str = "needs_response",
    created: int = 0,
) -> Json:
    """A dispute (docs.stripe.com/api/disputes/object)."""
    return {
        "id": dispute_id,
        "object": "dispute",
        "amount": amount,
        "charge": charge_id,
        "created": created,
        "currency": "usd",
        "is_charge_refundable": status.startswith("warning"),
        "livemode": False,
        "metadata": {},
        "payment_intent": intent_id,
        "reason": "fraudulent",
        "status": status,
    }


def invoice_payment(
    payment_id: str, *, invoice_id: str, intent_id: str, amount: int = 2999, created: int = 0
) -> Json:
    """What links an invoice to its payment since basil (docs.stripe.com/api/invoice-payment/object)."""
    return {
        "id": payment_id,
        "object": "invoice_payment",
        "amount_paid": amount,
        "amount_requested": amount,
        "created": created,
        "currency": "usd",
        "invoice": invoice_id,
        "is_default": True,
        "livemode": False,
        "payment": {"payment_intent": intent_id, "type": "payment_intent"},
        "status": "paid",
    }
