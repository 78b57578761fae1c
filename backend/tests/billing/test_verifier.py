"""Who gets in: genuine, recent deliveries signed with a live secret, and nobody else."""

from __future__ import annotations

import hashlib
import hmac
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import stripe
from structlog.testing import capture_logs

from backend.app.billing.security import (
    RefusalReason,
    SecretSource,
    SignatureRefused,
    WebhookSecret,
    WebhookSecurityValidator,
    parse_webhook_secrets,
    signature_header,
)
from backend.app.core.errors import SignatureInvalid

NOW_SECONDS = 1_764_000_000
NOW = datetime.fromtimestamp(NOW_SECONDS, UTC)
BODY = b'{"id": "evt_1", "object": "event"}'
OLD = "whsec_oldOldOldOldOld1234567890"
NEW = "whsec_newNewNewNewNew1234567890"


def sign(secret: str, body: bytes = BODY, timestamp: int = NOW_SECONDS) -> bytes:
    return hmac.new(secret.encode(), b"%d.%b" % (timestamp, body), "sha256").hexdigest().encode()


def header(secret: str = OLD, body: bytes = BODY, timestamp: int = NOW_SECONDS) -> bytes:
    return b"t=%d,v1=%b" % (timestamp, sign(secret, body, timestamp))


def validator(text: str = OLD, tolerance_seconds: int = 300) -> WebhookSecurityValidator:
    return WebhookSecurityValidator(
        SecretSource.from_text(text, livemode=True), tolerance_seconds=tolerance_seconds
    )


def refusal(signature: bytes | None, *, body: bytes = BODY, now: datetime = NOW) -> RefusalReason:
    with pytest.raises(SignatureRefused) as caught:
        validator().verify(body=body, header=signature, now=now)
    return caught.value.reason


def test_a_genuine_delivery_is_verified() -> None:
    verified = validator(f"main={OLD}").verify(body=BODY, header=header(), now=NOW)
    assert verified.timestamp == NOW_SECONDS
    assert verified.secret_name == "main"
    assert verified.signature_sha256 == hashlib.sha256(b"%d.%b" % (NOW_SECONDS, sign(OLD))).hexdigest()


def test_the_official_sdk_signs_what_is_accepted() -> None:
    made = stripe.WebhookSignature.generate_signature_header(BODY.decode(), OLD, NOW_SECONDS)
    assert validator().verify(body=BODY, header=made.encode(), now=NOW).timestamp == NOW_SECONDS


GOOD = sign(OLD)
T = b"t=%d" % NOW_SECONDS
ACCEPTED = {
    "v1 before t": b"v1=" + GOOD + b"," + T,
    "unknown schemes and empty items": b",v0=abc,x," + T + b",v2=1,v1=" + GOOD + b",,=",
    "a wrong v1 before the right one": T + b",v1=00,v1=" + GOOD,
    "a wrong v1 after the right one": T + b",v1=" + GOOD + b",v1=" + b"f" * 64,
    "something behind a second equals sign": T + b"=x,v1=" + GOOD + b"=y=z",
    "blanks around t's value": b"t= \t%d ,v1=" % NOW_SECONDS + GOOD,
    "leading zeros": b"t=00%d,v1=" % NOW_SECONDS + GOOD,
    "sixteen v1": T + b",v1=0" * 15 + b",v1=" + GOOD,
    "bytes outside ASCII in an unknown item": T + b",v1=" + GOOD + b",x=\xff",
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_every_form_of_header_that_the_sdk_accepts_is_accepted(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stripe._webhook.time", SimpleNamespace(time=lambda: float(NOW_SECONDS)))
    text = ACCEPTED[name].decode("latin-1")
    assert stripe.WebhookSignature.verify_header(BODY.decode(), text, OLD, 300)
    assert validator().verify(body=BODY, header=ACCEPTED[name], now=NOW).timestamp == NOW_SECONDS


REFUSED: dict[str, tuple[bytes | None, RefusalReason]] = {
    "no header": (None, RefusalReason.MISSING_HEADER),
    "empty header": (b"", RefusalReason.MISSING_HEADER),
    "blank header": (b" ", RefusalReason.MALFORMED_HEADER),
    "no t": (b"v1=" + GOOD, RefusalReason.MALFORMED_HEADER),
    "bare t": (b"t,v1=" + GOOD, RefusalReason.MALFORMED_HEADER),
    "empty t": (b"t=,v1=" + GOOD, RefusalReason.MALFORMED_HEADER),
    "bare v1": (T + b",v1", RefusalReason.MALFORMED_HEADER),
    "two t": (T + b"," + T + b",v1=" + GOOD, RefusalReason.MALFORMED_HEADER),
    "signed t": (b"t=+%d,v1=" % NOW_SECONDS + GOOD, RefusalReason.MALFORMED_HEADER),
    "negative t": (b"t=-1,v1=" + GOOD, RefusalReason.MALFORMED_HEADER),
    "fractional t": (T + b".0,v1=" + GOOD, RefusalReason.MALFORMED_HEADER),
    "t with underscore": (b"t=1_764_000_000,v1=" + GOOD, RefusalReason.MALFORMED_HEADER),
    "t in Latin-1 superscripts": (b"t=\xb9\xb2\xb3,v1=" + GOOD, RefusalReason.MALFORMED_HEADER),
    "thirteen digits": (b"t=" + b"0" * 3 + T[2:] + b",v1=" + GOOD, RefusalReason.MALFORMED_HEADER),
    "blank before t": (b" " + T + b",v1=" + GOOD, RefusalReason.MALFORMED_HEADER),
    "no v1": (T + b",v0=" + GOOD, RefusalReason.MISSING_SIGNATURE),
    "blank before v1": (T + b", v1=" + GOOD, RefusalReason.MISSING_SIGNATURE),
    "empty v1": (T + b",v1=", RefusalReason.NO_MATCH),
    "upper-case v1": (T + b",v1=" + GOOD.upper(), RefusalReason.NO_MATCH),
    "blank before the value of v1": (T + b",v1= " + GOOD, RefusalReason.NO_MATCH),
    "truncated v1": (T + b",v1=" + GOOD[:-1], RefusalReason.NO_MATCH),
    "lengthened v1": (T + b",v1=" + GOOD + b"0", RefusalReason.NO_MATCH),
    "another secret": (header(NEW), RefusalReason.NO_MATCH),
    "another body": (header(body=BODY + b" "), RefusalReason.NO_MATCH),
    "another t": (b"t=%d,v1=" % (NOW_SECONDS + 1) + GOOD, RefusalReason.NO_MATCH),
    "v1 outside ASCII": (T + b",v1=\xe9", RefusalReason.MALFORMED_HEADER),
    "v1 outside ASCII beside a right one": (T + b",v1=\xe9,v1=" + GOOD, RefusalReason.MALFORMED_HEADER),
    "seventeen v1": (T + b",v1=0" * 16 + b",v1=" + GOOD, RefusalReason.TOO_MANY_SIGNATURES),
    "over 4 KiB": (T + b",v1=" + GOOD + b",x=" + b"y" * 4_096, RefusalReason.HEADER_TOO_LONG),
    "301 s old": (header(timestamp=NOW_SECONDS - 301), RefusalReason.TIMESTAMP_TOO_OLD),
    "301 s ahead": (header(timestamp=NOW_SECONDS + 301), RefusalReason.TIMESTAMP_IN_FUTURE),
    "a year ahead": (header(timestamp=NOW_SECONDS + 31_536_000), RefusalReason.TIMESTAMP_IN_FUTURE),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_header_is_refused_with_its_reason(name: str) -> None:
    signature, reason = REFUSED[name]
    assert refusal(signature) == reason


def test_header_limits_are_inclusive() -> None:
    signature = T + b",v1=" + GOOD + b",x="
    full = signature + b"y" * (4_096 - len(signature))
    assert validator().verify(body=BODY, header=full, now=NOW).timestamp == NOW_SECONDS
    assert refusal(full + b"y") == RefusalReason.HEADER_TOO_LONG


def test_every_offset_within_the_tolerance_is_accepted_and_no_other() -> None:
    for offset_seconds in range(-1_000, 1_001):
        signature = header(timestamp=NOW_SECONDS + offset_seconds)
        if abs(offset_seconds) <= 300:
            verified = validator().verify(body=BODY, header=signature, now=NOW)
            assert verified.timestamp == NOW_SECONDS + offset_seconds
        elif offset_seconds < 0:
            assert refusal(signature) == RefusalReason.TIMESTAMP_TOO_OLD
        else:
            assert refusal(signature) == RefusalReason.TIMESTAMP_IN_FUTURE


@pytest.mark.parametrize("fraction", [0.0, 0.000001, 0.5, 0.999999])
def test_the_past_edge_is_the_sdks_to_the_microsecond(
    fraction: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = NOW + timedelta(seconds=fraction)
    monkeypatch.setattr("stripe._webhook.time", SimpleNamespace(time=now.timestamp))
    for offset_seconds in range(-1_000, 301):
        signature = header(timestamp=NOW_SECONDS + offset_seconds)
        try:
            theirs = stripe.WebhookSignature.verify_header(BODY.decode(), signature.decode(), OLD, 300)
        except stripe.SignatureVerificationError:
            theirs = False
        try:
            ours = validator().verify(body=BODY, header=signature, now=now) is not None
        except SignatureRefused:
            ours = False
        assert ours == theirs, offset_seconds


@pytest.mark.parametrize("reason", RefusalReason)
def test_a_refusal_says_signature_and_answers_403(reason: RefusalReason) -> None:
    error = SignatureRefused(reason)
    assert isinstance(error, SignatureInvalid)
    assert error.status == 403
    assert "signature" in error.detail


def test_a_refusal_carries_neither_header_nor_body() -> None:
    with pytest.raises(SignatureRefused) as caught:
        validator().verify(body=b"private-body", header=T + b",v1=private-header", now=NOW)
    error = caught.value
    assert "private" not in repr((error, error.args, vars(error), error.__cause__, error.__context__))


def test_the_time_check_cant_be_turned_off() -> None:
    with pytest.raises(ValueError, match="WEBHOOK_TOLERANCE_SECONDS"):
        validator(tolerance_seconds=0)


def test_a_body_that_is_not_utf8_is_verified_by_its_bytes() -> None:
    body = b"\xff\xfe{}"
    assert validator().verify(body=body, header=header(body=body), now=NOW).secret_name == "secret-1"
    assert refusal(header(body=b"\xff\xff{}"), body=body) == RefusalReason.NO_MATCH


def test_every_candidate_is_compared_under_every_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of comparisons, and so the time, doesn't tell which secret or signature fitted."""
    compared: list[tuple[bytes, bytes]] = []
    genuine = hmac.compare_digest

    def counting(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return genuine(one, other)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    signature = T + b",v1=" + GOOD + b",v1=" + b"0" * 64 + b",v1=" + sign(NEW)
    validator(f"{OLD},{NEW}").verify(body=BODY, header=signature, now=NOW)
    assert len(compared) == 6
    with pytest.raises(SignatureRefused):
        validator(f"{OLD},{NEW}").verify(body=BODY + b" ", header=signature, now=NOW)
    assert len(compared) == 12


def test_both_secrets_of_a_rotation_are_accepted() -> None:
    both = validator(f"old={OLD}, new={NEW}")
    assert both.verify(body=BODY, header=header(OLD), now=NOW).secret_name == "old"
    assert both.verify(body=BODY, header=header(NEW), now=NOW).secret_name == "new"


def test_the_order_of_a_rotations_signatures_doesnt_change_the_replay_key() -> None:
    both = validator(f"old={OLD}, new={NEW}")
    one = both.verify(body=BODY, header=T + b",v1=" + sign(OLD) + b",v1=" + sign(NEW), now=NOW)
    other = both.verify(body=BODY, header=b"v1=" + sign(NEW) + b",v1=" + sign(OLD) + b"," + T, now=NOW)
    assert one == other
    assert one.secret_name == "old"


def test_a_resent_delivery_has_another_replay_key() -> None:
    first = validator().verify(body=BODY, header=header(), now=NOW)
    again = validator().verify(body=BODY, header=header(timestamp=NOW_SECONDS + 1), now=NOW)
    assert first.signature_sha256 != again.signature_sha256


def test_one_signature_header_is_found_and_several_are_refused() -> None:
    other = (b"content-type", b"application/json")
    assert signature_header([other]) is None
    assert signature_header([other, (b"Stripe-Signature", b"t=1")]) == b"t=1"
    with pytest.raises(SignatureRefused) as caught:
        signature_header([(b"stripe-signature", b"t=1"), other, (b"stripe-signature", b"v1=2")])
    assert caught.value.reason == RefusalReason.REPEATED_HEADER


def test_secrets_are_read_in_order_with_and_without_names() -> None:
    assert parse_webhook_secrets(f" {OLD} , cli = {NEW},whsec_a=b=c", livemode=False) == (
        WebhookSecret("secret-1", OLD.encode()),
        WebhookSecret("cli", NEW.encode()),
        WebhookSecret("secret-3", b"whsec_a=b=c"),
    )


def test_a_secret_is_never_printed() -> None:
    assert OLD not in repr(parse_webhook_secrets(OLD, livemode=True))


UNUSABLE = {
    "nothing": "",
    "blank": " \n",
    "blank entry": f"{OLD},,{NEW}",
    "trailing comma": f"{OLD},",
    "another prefix": "sk_PRIVATE_0123456789012345",
    "quoted": f'"{OLD}"',
    "prefix only": "whsec_",
    "named prefix only": "a=whsec_",
    "nameless": f"={OLD}",
    "name with a space": f"PRIVATE name={OLD}",
    "same name twice": f"a={OLD},a={NEW}",
    "given name meets a made one": f"secret-2={OLD},{NEW}",
    "two lines": f"{OLD}\n{NEW}",
    "inner space": "whsec_PRIVATE 0123456789012345",
    "outside ASCII": "whsec_PRIVATE\u20ac0123456789012345",
    "short": "whsec_PRIVATE0123456789"[:23],
    "placeholder": "whsec_" + "x" * 32,
    "placeholder of four characters": "whsec_" + "1234" * 8,
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_secret_is_refused_without_being_shown(name: str) -> None:
    with pytest.raises(ValueError, match=r"^STRIPE_WEBHOOK_SECRET: ") as caught:
        parse_webhook_secrets(UNUSABLE[name], livemode=True)
    assert not any(part in str(caught.value) for part in ("PRIVATE", OLD, NEW, "xxx"))


def test_a_short_secret_is_good_enough_for_test_mode_only() -> None:
    assert parse_webhook_secrets("whsec_x", livemode=False)
    assert parse_webhook_secrets("whsec_abcdefghijklmnopqr", livemode=True)
    with pytest.raises(ValueError, match="24 characters"):
        parse_webhook_secrets("whsec_abcdefghijklmnopq", livemode=True)


def test_there_is_no_source_without_a_secret() -> None:
    with pytest.raises(ValueError, match="no secret"):
        SecretSource(())


class Monotonic:
    seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def replace(path: Path, content: bytes) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_bytes(content)
    fresh.rename(path)


def keys(source: SecretSource) -> list[str]:
    return [secret.key.decode() for secret in source.current()]


def test_a_rotated_file_is_followed_within_a_second(tmp_path: Path) -> None:
    path, clock = tmp_path / "secret", Monotonic()
    path.write_text(OLD + "\n")
    source = SecretSource.from_file(path, livemode=True, monotonic_seconds=clock)
    live = WebhookSecurityValidator(source, tolerance_seconds=300)
    assert live.verify(body=BODY, header=header(OLD), now=NOW).secret_name == "secret-1"
    replace(path, NEW.encode())
    clock.seconds += 0.99
    assert keys(source) == [OLD]
    clock.seconds += 0.01
    with capture_logs() as logs, pytest.raises(SignatureRefused):
        live.verify(body=BODY, header=header(OLD), now=NOW)
    assert live.verify(body=BODY, header=header(NEW), now=NOW).secret_name == "secret-1"
    assert [log["event"] for log in logs] == ["webhook_secret_file_reloaded"]
    assert NEW not in repr(logs)


def test_a_file_rewritten_in_place_with_the_same_size_is_followed(tmp_path: Path) -> None:
    path, clock = tmp_path / "secret", Monotonic()
    path.write_text(OLD)
    os.utime(path, ns=(1, 1))
    source = SecretSource.from_file(path, livemode=True, monotonic_seconds=clock)
    path.write_text(NEW)
    clock.seconds += 1
    assert keys(source) == [NEW]


@pytest.mark.parametrize("content", [b"", b"PRIVATE", b"whsec_PRIVATE", b"\xff\xfePRIVATE", None])
def test_a_bad_new_file_keeps_the_last_good_secrets_and_warns_once(
    content: bytes | None, tmp_path: Path
) -> None:
    path, clock = tmp_path / "secret", Monotonic()
    path.write_text(OLD)
    source = SecretSource.from_file(path, livemode=True, monotonic_seconds=clock)
    if content is None:
        path.unlink()
    else:
        replace(path, content)
    with capture_logs() as logs:
        for _ in range(3):
            clock.seconds += 1
            assert keys(source) == [OLD]
    assert [(log["event"], log["log_level"]) for log in logs] == [("webhook_secret_file_refused", "warning")]
    assert "PRIVATE" not in repr(logs)
    replace(path, NEW.encode())
    clock.seconds += 1
    assert keys(source) == [NEW]


def test_a_first_file_that_cant_be_used_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="can't read"):
        SecretSource.from_file(tmp_path / "absent", livemode=False)
    (tmp_path / "latin").write_bytes(b"whsec_PRIVATE\xff")
    with pytest.raises(ValueError, match="not UTF-8") as caught:
        SecretSource.from_file(tmp_path / "latin", livemode=False)
    assert caught.value.__context__ is None
