"""The stored form of a signed body: the same bytes, with card numbers and secrets masked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

from backend.app.core.splice import Edit, spliced

CARD_MASK = "[card number masked]"
SECRET_MASK = "[masked]"  # noqa: S105  # what stands where a secret was

# ISO/IEC 7812-1: a card number has at most 19 digits; no scheme issues fewer than 13.
CARD_DIGITS_MIN = 13
CARD_DIGITS_MAX = 19

# The quick path. Substring search is many times faster than a regex, and a regex that begins with a literal is
# nearly as fast; so each of these does. Escapes of printable ASCII count, because they can write all the others.
_SECRET_HINTS = (b"k_live_", b"k_test_", b"whsec_")
_OTHER_HINTS = (
    re.compile(rb'client_secret"[ \t\r\n]*+:[ \t\r\n]*+"'),
    re.compile(rb"rk_(?<![A-Za-z0-9]rk_)"),
    re.compile(rb"\\u00[2-7]"),
)
_DIGITS_TO_ZERO = bytes.maketrans(b"0123456789", b"0000000000")
_DIGIT_SEPARATORS = b" -"

# A string and, where it is a key, its colon with the blanks on both sides: a value that is a string then
# starts where its key's match ended. Possessive, with an optional end: linear on an unclosed string too.
_STRING = re.compile(rb'"([^"\\]*+(?:\\.[^"\\]*+)*+)"?+([ \t\r\n]*+:[ \t\r\n]*+)?', re.DOTALL)
_CHARACTER = re.compile(r"\\u([0-9a-fA-F]{4})|\\(.)|.", re.DOTALL)
_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}

# docs.stripe.com/keys: secret (sk_), restricted (rk_) and endpoint (whsec_) secrets. Real ones have 24
# characters and more behind the prefix; `rk_` alone is short enough to begin an innocent word.
_SECRET = re.compile(
    r"(?<![A-Za-z0-9])(?:[sr]k_(?:live|test)_[A-Za-z0-9_]{8,}|rk_[A-Za-z0-9_]{16,}|whsec_[A-Za-z0-9_+/=-]{8,})"
)
_DIGIT_GROUPS = re.compile(r"[0-9]++(?:[ -][0-9]++)*+")
_DIGIT_GROUP = re.compile(r"[0-9]++")
_WORD_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")
# An all-digit stretch of a UUID passes Luhn once in ten; a UUID is an identifier, so all behind its first eight
# digits is looked at as letters. The match begins with the literal dash, which the search finds quickly.
_UUID_TAIL = re.compile(
    r"-(?<=(?<![A-Za-z0-9_])[0-9a-fA-F]{8}-)(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}(?![A-Za-z0-9_])"
)
_UUID_TAIL_BLANK = "u" * 28
_LUHN_DOUBLED = str.maketrans("0123456789", "0246813579")

# Their values name a user; a Discord or Telegram id may pass Luhn by chance, and masking it would lose the user.
_IDENTIFIER_KEYS = frozenset({"client_reference_id", "user_id"})
_SECRET_KEY = "client_secret"  # noqa: S105  # the name of Stripe's field

# Number ranges of the card schemes, as they publish them: Visa; Mastercard; American Express; Discover;
# Diners Club; JCB; UnionPay.
_CARD_BRAND = re.compile(
    r"4(?:[0-9]{12}|[0-9]{15})"
    r"|(?:5[1-5][0-9]{2}|222[1-9]|22[3-9][0-9]|2[3-6][0-9]{2}|27[01][0-9]|2720)[0-9]{12}"
    r"|3[47][0-9]{13}"
    r"|(?:6011|64[4-9][0-9]|65[0-9]{2})[0-9]{12}"
    r"|3(?:0[0-5]|[68][0-9])[0-9]{11}"
    r"|35(?:2[89]|[3-8][0-9])[0-9]{12}"
    r"|62[0-9]{14}"
)


def mask_sensitive(body: bytes) -> bytes:
    """`body` with every card number and secret inside its JSON strings masked; all other bytes as they came.

    Masked are Luhn-valid runs of 13 to 19 digits, in groups or not, that are no part of an identifier;
    the string value of any `client_secret`; and Stripe keys. Values of `user_id` and `client_reference_id`
    are masked only where a card brand has such numbers. Keys are masked like values and stay distinct.
    The very same object comes back where nothing needs masking; no bytes raise an error.
    """
    if not _may_need_masking(body):
        return body
    edits: list[Edit] = []
    key_edits: list[Edit] = []
    keys: list[bytes] = []
    value_starts_at, value_key = -1, ""
    for string in _STRING.finditer(body):
        content = string[1]
        start, end = string.span(1)
        if string[2] is not None:
            text, _ = _unescaped(content)
            keys.append(content)
            value_starts_at, value_key = string.end(), text
            masked = _masked_string(content, brands_only=False)
            if masked is not content:
                key_edits.append((start, end, masked))
            continue
        key = value_key if string.start() == value_starts_at else ""
        if key == _SECRET_KEY:
            masked = SECRET_MASK.encode("ascii")
        else:
            masked = _masked_string(content, brands_only=key in _IDENTIFIER_KEYS)
        if masked is not content:
            edits.append((start, end, masked))
    if key_edits:
        edits += _distinct_keys(body, key_edits, keys)
    return spliced(body, edits)


def contains_card_number(text: str) -> bool:
    """Whether `text` holds a Luhn-valid run of 13 to 19 digits that is no part of an identifier."""
    return next(_card_spans(text, brands_only=False), None) is not None


def _may_need_masking(raw: bytes) -> bool:
    """False only if nothing in these bytes, a whole body or the inside of a string, needs masking."""
    if any(hint in raw for hint in _SECRET_HINTS) or any(hint.search(raw) for hint in _OTHER_HINTS):
        return True
    if b"0" * CARD_DIGITS_MIN not in raw.translate(_DIGITS_TO_ZERO, _DIGIT_SEPARATORS):
        return False
    # With an escape, the bytes beside a number are not the characters beside it.
    return b"\\" in raw or contains_card_number(raw.decode("latin-1"))


def _masked_string(content: bytes, *, brands_only: bool) -> bytes:
    """The inside of a JSON string, masked; the same object where there is nothing to mask."""
    # Most strings of an event are shorter than anything that is looked for.
    if len(content) < CARD_DIGITS_MIN or not _may_need_masking(content):
        return content
    text, offsets = _unescaped(content)
    secrets = [(*found.span(), SECRET_MASK) for found in _SECRET.finditer(text)]
    # What holds a secret or a card number is no identifier, and gets no identifier's benefit of the doubt.
    doubt = brands_only and not secrets and next(_card_spans(text, brands_only=True), None) is None
    spans = secrets + [(start, end, CARD_MASK) for start, end in _card_spans(text, brands_only=doubt)]
    edits: list[Edit] = []
    for start, end, mask in _merged(spans):
        edits.append((offsets[start], offsets[end], mask.encode("ascii")))
    return spliced(content, edits)


def _unescaped(content: bytes) -> tuple[str, Sequence[int]]:
    """What the inside of a JSON string says, and where in `content` each of its characters begins.

    Bytes outside ASCII come out as one character each: nothing that is looked for contains one.
    """
    raw = content.decode("latin-1")
    if "\\" not in raw:
        return raw, range(len(raw) + 1)
    characters: list[str] = []
    offsets: list[int] = []
    for character in _CHARACTER.finditer(raw):
        offsets.append(character.start())
        if character[1]:
            characters.append(chr(int(character[1], 16)))
        elif character[2]:
            characters.append(_ESCAPES.get(character[2], character[2]))
        else:
            characters.append(character[0])
    offsets.append(len(raw))
    return "".join(characters), offsets


def _card_spans(text: str, *, brands_only: bool) -> Iterator[tuple[int, int]]:
    """Every stretch of whole digit groups that is a card number; they may overlap.

    All of them rather than the longest, because a number is often followed by its expiry date.
    """
    text = _UUID_TAIL.sub(_UUID_TAIL_BLANK, text)
    for run in _DIGIT_GROUPS.finditer(text):
        if run.end() - run.start() < CARD_DIGITS_MIN:
            continue
        groups = [group.span() for group in _DIGIT_GROUP.finditer(text, *run.span())]
        # Only the outer groups of a run can touch a letter, and then they are part of an identifier.
        if text[run.start() - 1 : run.start()] in _WORD_CHARACTERS:
            del groups[0]
        if groups and text[run.end() : run.end() + 1] in _WORD_CHARACTERS:
            del groups[-1]
        for first, (start, _) in enumerate(groups):
            digits = ""
            for group_start, end in groups[first : first + CARD_DIGITS_MAX]:
                digits += text[group_start:end]
                if len(digits) > CARD_DIGITS_MAX:
                    break
                if _is_card_number(digits, brands_only=brands_only):
                    yield start, end


def _is_card_number(digits: str, *, brands_only: bool) -> bool:
    return (
        len(digits) >= CARD_DIGITS_MIN
        and _is_luhn_valid(digits)
        and (not brands_only or _CARD_BRAND.fullmatch(digits) is not None)
    )


def _is_luhn_valid(digits: str) -> bool:
    """ISO/IEC 7812-1 annex B."""
    return sum(map(int, digits[-1::-2] + digits[-2::-2].translate(_LUHN_DOUBLED))) % 10 == 0


def _merged(spans: list[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """Overlapping spans as one, which is a secret's if any of them is."""
    merged: list[tuple[int, int, str]] = []
    for start, end, mask in sorted(spans):
        if merged and start < merged[-1][1]:
            last_start, last_end, last_mask = merged[-1]
            merged[-1] = (
                last_start,
                max(end, last_end),
                SECRET_MASK if SECRET_MASK in (mask, last_mask) else CARD_MASK,
            )
        else:
            merged.append((start, end, mask))
    return merged


def _distinct_keys(body: bytes, key_edits: list[Edit], keys: list[bytes]) -> list[Edit]:
    """The edits with a number added where a masked key would meet another one.

    Equal keys stay equal, so that a repeated key is still seen and refused by the parser.
    """
    taken = {_key_text(key) for key in keys}
    by_original: dict[str, bytes] = {}
    used: dict[bytes, int] = {}
    distinct: list[Edit] = []
    for start, end, masked in key_edits:
        original = _key_text(body[start:end])
        if original not in by_original:
            candidate = masked
            while _key_text(candidate) in taken:
                used[masked] = used.get(masked, 1) + 1
                candidate = masked + b" (%d)" % used[masked]
            taken.add(_key_text(candidate))
            by_original[original] = candidate
        distinct.append((start, end, by_original[original]))
    return distinct


def _key_text(content: bytes) -> str:
    try:
        text: str = json.loads(f'"{content.decode("utf-8")}"', strict=False)
    except ValueError:
        return content.decode("latin-1")
    return text
