"""No card number or secret is kept, and nothing else of a body is touched."""

from __future__ import annotations

import json
import random
import uuid
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from backend.app.billing.masking import CARD_MASK, SECRET_MASK, contains_card_number, mask_sensitive

# Numbers that payment providers publish for tests, and made-up Luhn-valid ones for the other ranges.
CARDS = [
    *("4111111111111111", "4242424242424242", "4012888888881881", "4222222222222"),
    *("5555555555554444", "5105105105105100", "2223003122003222", "2720990000000007"),
    *("378282246310005", "371449635398431", "6011111111111117", "6011000990139424", "6445644564456445"),
    *("6500000000000002", "30569309025904", "38520000023237", "36227206271667"),
    *("3530111333300000", "3566002020360505", "6200000000000005", "6205500000000000004"),
]

GROUPED = [
    "4111 1111 1111 1111",
    "4111-1111-1111-1111",
    "4111 1111-1111 1111",
    "4 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1",
    "411111 1111111111",
    "3782 822463 10005",
]

CARD = "4111111111111111"
AROUND = [
    f"card {CARD}",
    f"{CARD} 12/27 123",
    "4111 1111 1111 1111 12/27",
    "order 12 4111 1111 1111 1111",
    f"({CARD})",
    f"card:{CARD}.",
    f"\n{CARD}\n",
    f'"{CARD}"',
    f"\\{CARD}\\",
    f"\u5361\u53f7{CARD}\u3002",
    f"\u00e9{CARD}\u00e9",
    f"\U0001f4b3{CARD}",
    f"ORD-{CARD}",
    f"https://example.com/?card={CARD}&x=1",
    f"{CARD}, 5555555555554444",
    f"{CARD} 5555555555554444",
    f"{CARD}-5555-5555-5555-4444",
    f"{uuid.UUID(int=1)} {CARD}",
    f"{CARD}-{uuid.UUID(int=1)}",
]

SECRETS = [
    # Joined here, so that no scanner takes these made-up values for real ones.
    *(prefix + "51HabcDEF0123456789abcd" for prefix in ("sk_live_", "sk_test_", "rk_live_", "rk_test_")),
    "whsec_" + "0123456789abcdef" * 4,
    "whsec_" + "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
    "whsec_" + "ab+cd/ef==",
    "key=" + "sk_test_" + "4eC39HqLyjWDarjtT1zdp7dc!",
    "my_" + "sk_live_" + "51HabcDEF0123456789abcd",
    "rk_" + "0123456789abcdef0123",
]

LEFT_ALONE = [
    *("evt_1NG8Du2eZvKYlo2CUI79vXWy", "pi_4111111111111111", "cus_4111111111111111", "4111111111111111_x"),
    *("x4111111111111111", "4111111111111111x", "A4111 1111 1111 1111", "4111 1111 1111 1111B"),
    *("in_1MtHbELkdIwHu7ixl4OzzPMv", "ch_3MmlLrLkdIwHu7ix0snN0B15", "price_1MoBy5LkdIwHu7ixZhnattbh"),
    *("4111111111111112", "4242424242424241", "378282246310006", "4111 1111 1111 1112", "1234567890123456"),
    *(
        "411111111111",
        "41111111111111111111",
        "4111  1111  1111  1111",
        "4111.1111.1111.1111",
        "4111/1111/1111/1111",
    ),
    *("4111--1111--1111--1111", "4111_1111_1111_1111", "1764000000", "1764000000123", "1764000000.123456"),
    *(
        "2026-11-23T07:47:00.123456Z",
        "2026-11-23 07:47:00",
        "20261123074700",
        "+49 151 23456789",
        "+1 (415) 555-0132",
    ),
    *("0044 20 7946 0958 00", "+4915123456789", "19.99", "100000000000", "999999999999", "EUR 1.234.567,89"),
    *(
        "550e8400-e29b-41d4-a716-446655440000",
        "41111111-1111-4111-8111-111111111111",
        "00000000-0000-0000-0000-000000000001",
    ),
    *(
        "DE89370400440532013000",
        "GB82WEST12345698765432",
        "192.168.100.100",
        "2001:0db8:0000:0000:0000:0000:1428:57ab",
    ),
    *(
        "d41d8cd98f00b204e9800998ecf8427e",
        "#ff00ff",
        "1Z9999999999999999",
        "978-3-16-148410-0x",
        "",
        " ",
        "v1.2.3",
    ),
    *(
        "approved_by_network",
        "network_transaction_0123456789012345678",
        "risk_level",
        "task_live_stream",
        "desk_test_report",
    ),
    *(
        "sk_live_",
        "whsec_",
        "sk_live_...",
        "rk_short",
        "park_0123456789abcdef0123",
        "the client_secret is kept elsewhere",
    ),
]


def masked_value(value: str, *, key: str = "note", ascii_only: bool = True) -> str:
    body = json.dumps({"data": {"object": {key: value}}}, ensure_ascii=ascii_only).encode()
    found: str = json.loads(mask_sensitive(body))["data"]["object"][key]
    return found


def luhn_completed(prefix: str) -> str:
    return next(prefix + digit for digit in "0123456789" if luhn_total(prefix + digit) % 10 == 0)


def luhn_total(digits: str) -> int:
    """The textbook way, digit by digit, as a second opinion."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        doubled = int(digit) * (1 + place % 2)
        total += doubled - 9 if doubled > 9 else doubled
    return total


def escaped(text: str) -> str:
    return "".join(f"\\u{ord(character):04X}" for character in text)


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("text", CARDS + GROUPED + AROUND)
def test_a_planted_card_number_is_masked(text: str, ascii_only: bool) -> None:
    masked = masked_value(text, ascii_only=ascii_only)
    assert CARD_MASK in masked
    assert not contains_card_number(masked)
    assert not any(card in masked.replace(" ", "").replace("-", "") for card in CARDS)


@pytest.mark.parametrize("text", CARDS + GROUPED + SECRETS)
def test_what_is_written_with_escapes_is_masked_too(text: str) -> None:
    for written in (escaped(text), escaped(text[:1]) + text[1:], text[:5] + escaped(text[5]) + text[6:]):
        masked = json.loads(mask_sensitive(f'{{"a":"{written}"}}'.encode()))["a"]
        assert masked == masked_value(text)
        assert CARD_MASK in masked or SECRET_MASK in masked


@pytest.mark.parametrize("text", SECRETS)
def test_a_planted_secret_is_masked(text: str) -> None:
    masked = masked_value(text)
    assert SECRET_MASK in masked
    assert not any(part in masked for part in ("0123456789", "MfKQ", "4eC39", "ab+cd"))


@pytest.mark.parametrize("digits_total", range(13, 20))
def test_every_luhn_valid_number_of_13_to_19_digits_is_masked(digits_total: int) -> None:
    rng = random.Random(digits_total)
    for _ in range(200):
        number = luhn_completed("".join(rng.choices("0123456789", k=digits_total - 1)))
        wrong = number[:-1] + str((int(number[-1]) + 1) % 10)
        assert masked_value(number) == CARD_MASK
        assert masked_value(wrong) == wrong


def test_only_the_number_itself_is_replaced() -> None:
    body = b'{ "a" :\t"caf\xc3\xa9 \\/ 4111 1111 1111 1111 12\\/27 \\u00e9\\n", "b": 1.50, "c": 4111111111111111 }\n'
    assert mask_sensitive(body) == body.replace(b"4111 1111 1111 1111", CARD_MASK.encode())


@pytest.mark.parametrize("text", LEFT_ALONE)
def test_a_look_alike_is_left_alone(text: str) -> None:
    assert masked_value(text) == text
    assert masked_value(text, ascii_only=False) == text


def test_enough_is_planted_and_enough_looks_alike() -> None:
    assert len(CARDS + GROUPED + AROUND + SECRETS) >= 50
    assert len(LEFT_ALONE) >= 50


def test_every_client_secret_is_masked_and_nothing_beside_it() -> None:
    body = b'{"client_secret" : "pi_1_secret_x", "o": {"client_secret": ""}, "n": {"client_secret": null}}'
    assert json.loads(mask_sensitive(body)) == {
        "client_secret": SECRET_MASK,
        "o": {"client_secret": SECRET_MASK},
        "n": {"client_secret": None},
    }
    assert json.loads(mask_sensitive(rb'{"client\u005fsecret":"a","b":"client_secret"}')) == {
        "client_secret": SECRET_MASK,
        "b": "client_secret",
    }
    listed = b'{"client_secret": ["a"], "b": "c"}'
    assert mask_sensitive(listed) is listed


@pytest.mark.parametrize("key", ["user_id", "client_reference_id"])
def test_a_users_id_that_passes_luhn_by_chance_is_kept(key: str) -> None:
    rng = random.Random(key)
    for digits_total in (17, 18, 19):
        for _ in range(100):
            number = luhn_completed(
                str(rng.randint(1, 9)) + "".join(rng.choices("0123456789", k=digits_total - 2))
            )
            assert masked_value(number, key=key) == number
    for prefix in ("1", "7", "8", "9", "4000000000000000"):
        number = luhn_completed(prefix.ljust(14 if len(prefix) == 1 else 16, "1"))
        assert masked_value(number, key=key) == number
        assert masked_value(number, key="note") == CARD_MASK


@pytest.mark.parametrize("key", ["user_id", "client_reference_id"])
@pytest.mark.parametrize("card", [card for card in CARDS if len(card) <= 16] + GROUPED)
def test_a_real_card_number_is_masked_even_where_a_users_id_belongs(key: str, card: str) -> None:
    assert masked_value(card, key=key) == CARD_MASK


def test_the_exemption_ends_with_the_value() -> None:
    number = luhn_completed("1" * 16)
    body = json.dumps(
        {"user_id": [number], "a": number, "user_id2": {"user_id": number, "b": number}}
    ).encode()
    assert json.loads(mask_sensitive(body)) == {
        "user_id": [CARD_MASK],
        "a": CARD_MASK,
        "user_id2": {"user_id": number, "b": CARD_MASK},
    }


def test_masked_keys_stay_distinct_and_repeated_keys_stay_repeated() -> None:
    body = b'{"4111111111111111":1,"5555555555554444":2,"[card number masked]":3,"x":{"4111111111111111":4}}'
    assert json.loads(mask_sensitive(body)) == {
        f"{CARD_MASK} (2)": 1,
        f"{CARD_MASK} (3)": 2,
        CARD_MASK: 3,
        "x": {f"{CARD_MASK} (2)": 4},
    }
    repeated = json.loads(
        mask_sensitive(rb'{"4111111111111111":1,"\u0034111111111111111":2}'), object_pairs_hook=list
    )
    assert repeated == [(CARD_MASK, 1), (CARD_MASK, 2)]


def test_keys_beside_letters_written_in_two_ways_stay_distinct() -> None:
    body = '{"\u00e9 4111111111111111":1,"\\u00e9 5555555555554444":2}'.encode()
    assert sorted(json.loads(mask_sensitive(body)).values()) == [1, 2]


def test_a_body_without_candidates_comes_back_as_the_same_object() -> None:
    event = {"id": "evt_1", "created": 1_764_000_000, "user_id": "123456789012345670", "s": "Zo\u00eb\n"}
    body = json.dumps({"data": {"object": event, "client_secret": None}}).encode()
    assert mask_sensitive(body) is body


def test_a_number_outside_strings_is_left() -> None:
    body = b'{"a": 4111111111111111, "b": [4111111111111111], "c": "x"}'
    assert mask_sensitive(body) is body


@pytest.mark.parametrize("text", CARDS + GROUPED + AROUND)
def test_a_text_with_a_card_number_is_recognised(text: str) -> None:
    assert contains_card_number(text)


@pytest.mark.parametrize("text", LEFT_ALONE + SECRETS)
def test_a_text_without_a_card_number_is_recognised(text: str) -> None:
    assert not contains_card_number(text)


FRAGMENTS = st.sampled_from(
    [
        *("4111111111111111", "4111 1111 1111 1111", "5555-5555-5555-4444", "1764000000123", "12", "0", "1"),
        *(
            " ",
            "-",
            "_",
            "a",
            "\u00e9",
            "\\",
            '"',
            "\n",
            "\ud800",
            "\x00",
            "\U0001f600",
            "]",
            "[masked]",
            CARD_MASK,
        ),
        *("sk_live_" + "a" * 10, "whsec_", "rk_", "abcdefgh", "41111111-1111-4111-8111-111111111111"),
        *("client_secret", "user_id", "client_reference_id"),
    ]
)
TEXTS = st.text(max_size=8) | st.lists(FRAGMENTS, max_size=5).map("".join)
VALUES = st.recursive(
    TEXTS | st.integers() | st.none() | st.booleans(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=15,
)


def assert_same_but_masked(before: Any, after: Any) -> None:
    assert type(before) is type(after)
    if isinstance(before, dict):
        assert len(before) == len(after)
        for (key, value), (masked_key, masked) in zip(before.items(), after.items(), strict=True):
            assert_same_but_masked(key, masked_key)
            assert_same_but_masked(value, masked)
    elif isinstance(before, list):
        for value, masked in zip(before, after, strict=True):
            assert_same_but_masked(value, masked)
    elif isinstance(before, str) and before != after:
        assert CARD_MASK in after or SECRET_MASK in after
        assert not contains_card_number(after)
    else:
        assert before == after


@settings(max_examples=600, deadline=None)
@example(value={"user_id": "sk_live_aaaaaaaaaa4111 1111 1111 11114111 1111 1111 1111"}, ascii_only=False)
@given(value=st.dictionaries(TEXTS, VALUES, max_size=6), ascii_only=st.booleans())
def test_masking_keeps_the_structure_and_is_idempotent(value: dict[str, Any], ascii_only: bool) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "replace")
    masked = mask_sensitive(body)
    assert_same_but_masked(json.loads(body), json.loads(masked))
    assert mask_sensitive(masked) == masked


PIECES = st.sampled_from(
    [
        *(b'"', b"\\", b":", b"{", b"}", b",", b" ", b"\xff", b"\\u", b"\\u0034", b"4111111111111111", b"1"),
        *(b'"client_secret":"', b'"user_id":"', b"whsec_abcdefgh", b"rk_", b"\x00"),
    ]
)


@settings(max_examples=600, deadline=None)
@given(st.binary(max_size=300) | st.lists(PIECES, max_size=40).map(b"".join))
def test_whatever_bytes_come_in_masking_raises_nothing(body: bytes) -> None:
    masked = mask_sensitive(body)
    assert mask_sensitive(masked) == masked
