"""Our verdict is the official SDK's, on generated headers, except where we differ on purpose."""

from __future__ import annotations

import hmac
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
import stripe
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.app.billing.security import SecretSource, SignatureRefused, WebhookSecurityValidator

TOLERANCE_SECONDS = 300
NOW_SECONDS = 1_764_000_000.25
NOW = datetime.fromtimestamp(NOW_SECONDS, UTC)
SECRETS = ("whsec_oneOneOneOneOneOne123456", "whsec_twoTwoTwoTwoTwoTwo123456")
FOREIGN = "whsec_foreignForeignForeign123"
# Four seeds of 25,000 make 100,000 cases and let parallel workers share them.
CASES_PER_SEED = 25_000

BODIES = (
    b"{}",
    b'{"id": "evt_1", "object": "event"}',
    '{"id": "evt_2", "name": "Zo\u00eb \U0001f600"}'.encode(),
    b"",
    b"\x00",
    b"\xff\xfe{}",
)
OFFSETS_SECONDS = (-100_000, -302, -301, -300, -299, -1, 0, 1, 299, 300, 301, 302, 100_000)
ODD_TIMESTAMPS = ("", " ", "abc", "-1", "0", "1e9", "1.5", "\xb2", "9" * 13, "9" * 4_400, "0x10")


def sign(secret: str, timestamp: int, body: bytes) -> str:
    return hmac.digest(secret.encode(), b"%d.%b" % (timestamp, body), "sha256").hex()


@dataclass(frozen=True)
class Signed:
    body: bytes
    timestamp: int
    signature: str


Items = list[str]
Mutation = Callable[[random.Random, Items, Signed], Items]


def insert(make: Callable[[random.Random, Signed], str]) -> Mutation:
    def mutation(rng: random.Random, items: Items, signed: Signed) -> Items:
        at = rng.randint(0, len(items))
        return [*items[:at], make(rng, signed), *items[at:]]

    return mutation


def each(scheme: str, change: Callable[[random.Random, str], str]) -> Mutation:
    def mutation(rng: random.Random, items: Items, _signed: Signed) -> Items:
        return [change(rng, item) if item.startswith(scheme) else item for item in items]

    return mutation


MUTATIONS: tuple[Mutation, ...] = (
    lambda rng, items, _: rng.sample(items, len(items)),
    lambda rng, items, _: rng.sample(items, max(0, len(items) - 1)),
    lambda _, items, signed: [*items, *[f"v1={signed.signature[::-1]}"] * (len(items) * 5)],
    insert(lambda _, signed: f"v0={signed.signature}"),
    insert(lambda _, signed: f"v1={sign(FOREIGN, signed.timestamp, signed.body)}"),
    insert(lambda rng, signed: f"v1={sign(rng.choice(SECRETS), signed.timestamp, signed.body)}"),
    insert(
        lambda rng, _: rng.choice(("", "=", " ", "x", "x=y=z", "v2=1", "t", "v1", "v1=", "v1==", "t=", "T=1"))
    ),
    insert(lambda rng, signed: rng.choice(("v1=\xe9", f"v1={signed.signature[1:]}\xfe", "x=\xe9", "\xe9"))),
    insert(lambda rng, signed: f"t={signed.timestamp + rng.choice((0, 1, -400))}"),
    insert(lambda rng, _: "x=" + "y" * rng.choice((100, 3_900, 4_096, 20_000))),
    each("v1=", lambda _, item: item.replace("=", "= ")),
    each("v1=", lambda _, item: item.replace("v1=", "v0=")),
    each("t=", lambda rng, item: rng.choice(("t= ", "t=\t", "t=0", "t=00", "t=+")) + item[2:]),
    each("t=", lambda rng, item: item + rng.choice((" ", "\t", ".0", "0", "\xa0"))),
    each("t=", lambda _, item: f"{item[:6]}_{item[6:]}"),
    each("t=", lambda rng, _: "t=" + rng.choice(ODD_TIMESTAMPS)),
    each("", lambda rng, item: rng.choice((" ", "\t", "")) + item + rng.choice((" ", ""))),
    each("", lambda rng, item: item.upper() if rng.random() < 0.5 else item),
    each("", lambda rng, item: item[: rng.randint(0, len(item))]),
    each("", lambda rng, item: item + rng.choice(("=", "=x", "==", "=x=y"))),
)


def generate(rng: random.Random) -> tuple[bytes, str]:
    """A body and a header: genuine, then with none to four things done to it."""
    body = rng.choice(BODIES)
    timestamp = int(NOW_SECONDS) + (
        rng.choice(OFFSETS_SECONDS) if rng.random() < 0.3 else rng.randint(-250, 250)
    )
    signed = Signed(body, timestamp, sign(rng.choice(SECRETS), timestamp, body))
    items = [f"t={timestamp}", f"v1={signed.signature}"]
    for _ in range(rng.choice((0, 0, 1, 1, 1, 2, 2, 3, 4))):
        items = rng.choice(MUTATIONS)(rng, items, signed)
    return body + b" " * (rng.random() < 0.03), ",".join(items)


def sdk_verdict(body: bytes, header: str) -> str:
    verdicts = set()
    for secret in SECRETS:
        try:
            stripe.WebhookSignature.verify_header(body, header, secret, TOLERANCE_SECONDS)
            verdicts.add("accepts")
        except stripe.SignatureVerificationError:
            verdicts.add("refuses")
        except (TypeError, UnicodeDecodeError):
            verdicts.add("crashes")
    return next(verdict for verdict in ("accepts", "crashes", "refuses") if verdict in verdicts)


def deliberate_difference(header: str) -> str | None:
    """Why we refuse a header that the SDK may accept: the list in the validator's docstring, once more."""
    items = [item.split("=", 2) for item in header.split(",")]
    times = [item[1] for item in items if item[0] == "t"]
    signatures = [item[1] for item in items if item[0] == "v1"]
    digits = times[0].strip(" \t\n\r\v\f")
    plain = digits.isascii() and digits.isdigit() and len(digits) <= 12
    differences = {
        "header too long": len(header) > 4_096,
        "repeated t": len(times) > 1,
        "too many signatures": len(signatures) > 16,
        "v1 outside ASCII": not all(signature.isascii() for signature in signatures),
        "t not plain digits": not plain,
        "future": plain and int(digits) > NOW_SECONDS + TOLERANCE_SECONDS,
    }
    return next((name for name, holds in differences.items() if holds), None)


def holds_a_genuine_signature(header: str, body: bytes) -> bool:
    digits = re.findall(r"(?<![^,])t=\s*([0-9]+)", header)
    return any(f"v1={sign(secret, int(t), body)}" in header for secret in SECRETS for t in digits)


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_the_verdict_is_the_sdks_on_generated_headers(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stripe._webhook.time", SimpleNamespace(time=lambda: NOW_SECONDS))
    source = SecretSource.from_text(",".join(SECRETS), livemode=True)
    validator = WebhookSecurityValidator(source, tolerance_seconds=TOLERANCE_SECONDS)
    rng = random.Random(seed)
    seen: Counter[str] = Counter()
    for _ in range(CASES_PER_SEED):
        body, header = generate(rng)
        try:
            validator.verify(body=body, header=header.encode("latin-1"), now=NOW)
            ours = "accepts"
        except SignatureRefused as refused:
            ours = "refuses"
            seen[f"reason {refused.reason}"] += 1
        theirs = sdk_verdict(body, header)
        case = (body, header)
        if theirs == "refuses":
            assert ours == "refuses", case
            seen["both refuse"] += 1
        elif theirs == "accepts":
            difference = deliberate_difference(header)
            assert ours == ("accepts" if difference is None else "refuses"), case
            seen["both accept" if difference is None else f"only the SDK accepts: {difference}"] += 1
        elif body.startswith(b"\xff"):
            # The SDK can't read the body; ours still demands a signature over exactly these bytes.
            assert ours == "refuses" or holds_a_genuine_signature(header, body), case
            seen[f"the SDK crashes on the body, ours {ours}"] += 1
        else:
            assert ours == "refuses", case
            seen["the SDK crashes on the header, ours refuses"] += 1
    print(seed, dict(sorted(seen.items())))  # noqa: T201  # the counts are the evidence of the run
    assert sum(count for name, count in seen.items() if not name.startswith("reason")) == CASES_PER_SEED
    wanted = {
        "both accept": 4_000,
        "both refuse": 4_000,
        "the SDK crashes on the header, ours refuses": 100,
        "the SDK crashes on the body, ours accepts": 500,
        "the SDK crashes on the body, ours refuses": 500,
        "only the SDK accepts: future": 100,
        "only the SDK accepts: header too long": 100,
        "only the SDK accepts: repeated t": 100,
        "only the SDK accepts: too many signatures": 10,
        "only the SDK accepts: v1 outside ASCII": 20,
        "only the SDK accepts: t not plain digits": 100,
        "reason malformed_header": 500,
        "reason header_too_long": 100,
        "reason missing_signature": 100,
        "reason missing_header": 1,
        "reason too_many_signatures": 10,
        "reason timestamp_too_old": 100,
        "reason timestamp_in_future": 100,
        "reason no_match": 500,
    }
    assert {name: seen[name] for name, least in wanted.items() if seen[name] < least} == {}


PIECES = st.sampled_from([b"t", b"v1", b"v0", b"=", b",", b" ", b"1764000000", b"\xe9", b"0", b"a" * 64])


@settings(max_examples=500, deadline=None)
@given(
    body=st.binary(max_size=200),
    header=st.none() | st.binary(max_size=200) | st.lists(PIECES, max_size=40).map(b"".join),
)
def test_whatever_bytes_come_in_the_only_error_is_a_refusal(body: bytes, header: bytes | None) -> None:
    source = SecretSource.from_text(SECRETS[0], livemode=True)
    validator = WebhookSecurityValidator(source, tolerance_seconds=TOLERANCE_SECONDS)
    with pytest.raises(SignatureRefused):
        validator.verify(body=body, header=header, now=NOW)
