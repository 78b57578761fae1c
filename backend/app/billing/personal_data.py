"""The stored form of a deleted customer's event: the same bytes, with personal data replaced by a fixed word."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

from backend.app.core.splice import Edit, spliced

# What stands where a text was; `[` makes sure that nobody takes it for a user's id.
ERASED = b'"[erased]"'
# A number, such as a day of birth, stays a number, so that the document keeps its types.
ERASED_NUMBER = b"0"

# Fields of Stripe's objects that are personal wherever they stand, with all that is in them
# (docs.stripe.com/api: customers, charges, invoices, checkout sessions, payment methods, disputes, persons, reviews).
_PERSONAL = frozenset(
    {
        *("email", "phone", "first_name", "last_name", "maiden_name", "individual_name", "business_name"),
        *("address", "address_city", "address_line1", "address_line2", "address_state", "address_zip"),
        *(
            "billing_address",
            "billing_details",
            "billing_zip",
            "shipping",
            "shipping_address",
            "shipping_details",
        ),
        *("customer_address", "customer_details", "customer_email", "customer_name", "customer_phone"),
        *("customer_shipping", "customer_tax_ids", "collected_information", "custom_fields"),
        *("receipt_email", "payer_email", "payer_name", "payer_details", "owner", "account_holder_name"),
        *("individual", "dob", "ssn_last_4", "tax_id", "tax_info", "business_vat_id", "cashtag"),
        *("verified_address", "verified_email", "verified_name", "verified_phone"),
        *("ip", "ip_address", "ip_address_location", "client_ip", "customer_purchase_ip", "user_agent"),
        # What a merchant told the bank in a dispute is all about the payer.
        "evidence",
    }
)
# Fields that are personal in some objects only: a product's name is none.
_PERSONAL_IN = {
    "customer": frozenset({"name", "description"}),
    "card": frozenset({"name"}),
    "source": frozenset({"name"}),
    "tax_id": frozenset({"value"}),
}
# Stay also inside of what is personal: by ids and metadata all is found and decided.
_KEPT = frozenset({"id", "object", "metadata"})
# Their `previous_attributes` are a customer's fields, without the word that says so.
_CUSTOMER_EVENTS = frozenset({"customer.created", "customer.updated", "customer.deleted"})

# A JSON text's strings, structure, and numbers or words; possessive, so linear on any bytes.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[{}\[\]:,]|[^\s"{}\[\]:,]++', re.DOTALL)


@dataclass(slots=True)
class _Open:
    """An object or list that is being read; `maybe` are its texts that are personal if it is of a certain kind."""

    is_object: bool
    key: str
    is_personal: bool = False
    is_kept: bool = False
    expects_key: bool = False
    kind: str = ""
    maybe: list[tuple[str, int, int]] = field(default_factory=list)

    def holds_personal(self, key: str) -> bool:
        """Whether the value of a key is personal wherever it stands."""
        if self.is_kept or (self.is_personal and key in _KEPT):
            return False
        return self.is_personal or key in _PERSONAL

    def read(self, text: bytes, start: int, end: int) -> list[Edit]:
        """Takes in a value of one token; how it is replaced, if that is known already."""
        is_text = text[:1] == b'"' and text != b'""'
        if self.holds_personal(self.key):
            if is_text:
                return [(start, end, ERASED)]
            return [(start, end, ERASED_NUMBER)] if text[:1] in b"-0123456789" else []
        if is_text and self.key == "object":
            self.kind = _text(text)
        elif is_text and not self.is_kept:
            self.maybe.append((self.key, start, end))
        return []

    def close(self) -> list[Edit]:
        """How the texts are replaced that are personal in an object of this kind."""
        personal = _PERSONAL_IN.get(self.kind, frozenset())
        return [(start, end, ERASED) for key, start, end in self.maybe if key in personal]


def without_personal_data(payload: bytes, event_type: str) -> bytes:
    """An event's stored bytes with its personal data replaced; all other bytes as they are.

    What a decision reads stays: ids, amounts, states, metadata. The very same object comes back where
    nothing was left to replace, so doing it twice changes nothing.
    """
    edits: list[Edit] = []
    open_: list[_Open] = [_Open(is_object=False, key="")]
    for token in _TOKEN.finditer(payload):
        text, (start, end) = token[0], token.span()
        here = open_[-1]
        if text in (b"{", b"["):
            open_.append(_opened(here, event_type, is_object=text == b"{"))
        elif text in (b"}", b"]"):
            edits += (open_.pop() if len(open_) > 1 else here).close()
        elif text == b",":
            here.expects_key = here.is_object
        elif text == b":":
            here.expects_key = False
        elif here.expects_key:
            here.key = _text(text)
        else:
            edits += here.read(text, start, end)
    return spliced(payload, edits)


def _opened(parent: _Open, event_type: str, *, is_object: bool) -> _Open:
    return _Open(
        is_object=is_object,
        # The entries of a list are what the list is called.
        key=parent.key,
        is_personal=parent.holds_personal(parent.key),
        is_kept=parent.is_kept or parent.key == "metadata",
        expects_key=is_object,
        kind="customer" if parent.key == "previous_attributes" and event_type in _CUSTOMER_EVENTS else "",
    )


def _text(token: bytes) -> str:
    if b"\\" in token:
        text: str = json.loads(token, strict=False)
        return text
    return token[1:-1].decode("utf-8", "replace")
