"""Personal data is found wherever Stripe puts it, and nothing that a decision reads is touched."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.app.billing.personal_data import without_personal_data
from backend.app.billing.providers.fields import TranslationError
from backend.app.billing.providers.registry import translators
from backend.app.billing.providers.stripe import translate
from backend.app.billing.providers.stripe_event import read_event

FIXTURES = Path(__file__).parents[1] / "fixtures"
OCCURRED_AT = datetime(2025, 11, 24, 16, 1, tzinfo=UTC)
ERASED = "[erased]"

ADDRESS = {
    "line1": "1 Main St",
    "city": "Springfield",
    "postal_code": "12345",
    "country": "US",
    "state": None,
}
# What Stripe knows of people, in the fields of its objects; every text says so itself.
PEOPLE: dict[str, dict[str, Any]] = {
    "customer": {
        "object": "customer",
        "id": "cus_1",
        "email": "personal@example.com",
        "name": "personal Jane",
        "description": "personal note",
        "phone": "personal +1 555",
        "address": {"line1": "personal street", "country": "personal"},
        "shipping": {"name": "personal", "phone": "personal", "address": {"city": "personal"}},
        "tax_ids": {"data": [{"object": "tax_id", "id": "txi_1", "type": "eu_vat", "value": "personal 123"}]},
        "sources": {
            "data": [{"object": "card", "id": "card_1", "name": "personal", "address_line1": "personal"}]
        },
    },
    "charge": {
        "object": "charge",
        "id": "ch_1",
        "receipt_email": "personal",
        "billing_details": {"name": "personal", "email": "personal", "address": {"line1": "personal"}},
        "payment_method_details": {
            "ideal": {"verified_name": "personal"},
            "paypal": {"payer_email": "personal"},
        },
        "customer": {"object": "customer", "id": "cus_1", "name": "personal", "email": "personal"},
    },
    "invoice": {
        "object": "invoice",
        "id": "in_1",
        "customer_email": "personal",
        "customer_name": "personal",
        "customer_phone": "personal",
        "customer_address": {"city": "personal"},
        "customer_shipping": {"name": "personal"},
        "customer_tax_ids": [{"type": "personal", "value": "personal"}],
    },
    "checkout session": {
        "object": "checkout.session",
        "id": "cs_1",
        "customer_details": {"email": "personal", "name": "personal", "tax_ids": [{"value": "personal"}]},
        "collected_information": {"shipping_details": {"name": "personal"}},
        "custom_fields": [{"key": "personal", "text": {"value": "personal"}}],
    },
    "dispute": {
        "object": "dispute",
        "id": "dp_1",
        "evidence": {"customer_email_address": "personal", "customer_purchase_ip": "personal 10.0.0.1"},
    },
    "review": {
        "object": "review",
        "id": "prv_1",
        "ip_address": "personal 10.0.0.1",
        "billing_zip": "personal",
        "ip_address_location": {"city": "personal", "latitude": 52.5},
    },
    "account": {
        "object": "account",
        "id": "acct_1",
        "individual": {"first_name": "personal", "dob": {"day": 1, "month": 2, "year": 1990}},
    },
}


def event_of(content: dict[str, Any], previous: dict[str, Any] | None = None) -> bytes:
    data: dict[str, Any] = {"object": content}
    if previous is not None:
        data["previous_attributes"] = previous
    document = {"id": "evt_1", "type": "customer.updated", "created": 1_764_000_060, "data": data}
    return json.dumps(document, ensure_ascii=False).encode()


@pytest.mark.parametrize("name", PEOPLE)
def test_no_personal_text_is_left_and_every_id_is(name: str) -> None:
    before = event_of(PEOPLE[name])
    after = without_personal_data(before, "customer.updated")
    assert b"personal" not in after
    assert json.loads(after)["data"]["object"]["id"] == PEOPLE[name]["id"]
    assert b"txi_1" in after or b"txi_1" not in before


def test_numbers_of_a_person_stay_numbers() -> None:
    after = json.loads(without_personal_data(event_of(PEOPLE["account"]), "account.updated"))
    assert after["data"]["object"]["individual"]["dob"] == {"day": 0, "month": 0, "year": 0}


def test_what_a_customer_was_called_before_goes_too() -> None:
    before = event_of(
        PEOPLE["customer"], {"name": "personal", "email": "personal", "metadata": {"name": "kept"}}
    )
    after = json.loads(without_personal_data(before, "customer.updated"))["data"]["previous_attributes"]
    assert after == {"name": ERASED, "email": ERASED, "metadata": {"name": "kept"}}


def test_ids_metadata_and_names_of_things_stay_byte_for_byte() -> None:
    content = {
        "object": "subscription",
        "client_reference_id": "jane@example.com",
        "metadata": {"email": "jane@example.com", "address": {"city": "kept"}, "user_id": "usr_1"},
        "items": {
            "data": [{"price": {"object": "price", "product": {"object": "product", "name": "Premium"}}}]
        },
        "billing_details": {"name": None, "email": "", "metadata": {"user_id": "usr_1"}, "id": "kept"},
        "description": "1 x Premium",
    }
    payload = event_of(content)
    assert without_personal_data(payload, "customer.subscription.updated") is payload


def test_all_other_bytes_stay_as_they_came() -> None:
    payload = b'{ "b" : 1.50,\t"em\\u0061il": "jane@example.com" , "a" : [1e3, "\\u00e9"]\n}'
    changed = b'{ "b" : 1.50,\t"em\\u0061il": "[erased]" , "a" : [1e3, "\\u00e9"]\n}'
    assert without_personal_data(payload, "customer.updated") == changed
    assert without_personal_data(changed, "customer.updated") is changed


@pytest.mark.parametrize("path", sorted((FIXTURES / "stripe").glob("*.json")), ids=lambda path: path.stem)
def test_an_event_means_the_same_without_its_personal_data(path: Path) -> None:
    before = path.read_bytes()
    event_type = json.loads(before)["type"]
    after = without_personal_data(before, event_type)
    assert b"@example.com" not in after
    meanings = [translate(read_event(json.loads(body), signed_at=OCCURRED_AT)) for body in (before, after)]
    assert meanings[0] == meanings[1]


SHAPES = sorted((FIXTURES / "shapes").glob("*/*.json"))


@pytest.mark.parametrize("path", SHAPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_stripes_own_examples_mean_the_same_without_their_personal_data(path: Path) -> None:
    """In every event type: whatever an object says there, it says without the person."""
    content = json.loads(path.read_bytes())
    for event_type in translators():
        meanings: list[Any] = []
        body = {"id": "evt_1", "type": event_type, "created": 1_764_000_060, "data": {"object": content}}
        before = json.dumps(body).encode()
        for payload in (before, without_personal_data(before, event_type)):
            try:
                meanings.append(translate(read_event(json.loads(payload), signed_at=OCCURRED_AT)))
            except TranslationError as error:
                meanings.append(str(error))
        assert meanings[0] == meanings[1]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["email", "name", "object", "metadata", "id", "address", "x", 'ä\\"', ""]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


def shape_of(value: Any) -> Any:
    """A document without its texts and numbers."""
    if isinstance(value, dict):
        return {key: shape_of(part) for key, part in value.items()}
    if isinstance(value, list):
        return [shape_of(part) for part in value]
    return type(value) if isinstance(value, str | bool | None) else "number"


@given(document=st.dictionaries(st.text(max_size=5), json_values, max_size=3), ascii_only=st.booleans())
def test_any_document_keeps_its_shape_and_twice_is_once(document: dict[str, Any], ascii_only: bool) -> None:
    payload = json.dumps(document, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    once = without_personal_data(payload, "customer.updated")
    assert shape_of(json.loads(once.decode("utf-8", "surrogatepass"))) == shape_of(document)
    assert without_personal_data(once, "customer.updated") is once


@given(st.binary(max_size=200))
def test_no_bytes_raise_an_error(payload: bytes) -> None:
    without_personal_data(payload.replace(b"\\", b"/"), "customer.updated")
