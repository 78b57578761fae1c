"""Is this delivery really from Stripe, and recent? Bytes in, bytes compared, one kind of refusal out."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path

import structlog

from backend.app.core.errors import SignatureInvalid, Unavailable
from backend.app.core.idempotency import Answer, IdempotencyHandler
from backend.app.observability.metrics import MetricsCollector

SIGNATURE_HEADER = b"stripe-signature"

# Stripe's own header is about 80 bytes per signature; 4 KiB leaves room for 16 and costs nothing to scan.
HEADER_BYTES_MAX = 4_096

# A rotation has two live secrets, so two v1; each further one only buys a guesser another comparison.
SIGNATURES_MAX = 16

# Unix seconds have ten digits until the year 2286; twelve leave room for leading zeros.
TIMESTAMP_DIGITS_MAX = 12

SECRET_PREFIX = "whsec_"  # noqa: S105  # the public prefix of every Stripe endpoint secret

# "whsec_" and 18 characters: Stripe's have 38, and what people type as a stand-in is shorter.
LIVE_SECRET_CHARACTERS_MIN = 24

# "xxxx...", "1234 1234" and "......" have four or fewer; a random secret practically never.
LIVE_SECRET_DISTINCT_CHARACTERS_MIN = 5

# A secret that left the file is refused within this time; a stat per second is not measurable.
SECRET_FILE_CHECK_SECONDS = 1.0

# Names go into logs and metrics, so they are short and plain.
_SECRET_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RefusalReason(StrEnum):
    """Why a delivery was refused; the closed list of values of the metric's `reason` label."""

    MISSING_HEADER = "missing_header"
    REPEATED_HEADER = "repeated_header"
    HEADER_TOO_LONG = "header_too_long"
    MALFORMED_HEADER = "malformed_header"
    MISSING_SIGNATURE = "missing_signature"
    TOO_MANY_SIGNATURES = "too_many_signatures"
    TIMESTAMP_TOO_OLD = "timestamp_too_old"
    TIMESTAMP_IN_FUTURE = "timestamp_in_future"
    NO_MATCH = "no_match"


_DETAILS = {
    RefusalReason.MISSING_HEADER: "No signature: the Stripe-Signature header is missing or empty.",
    RefusalReason.REPEATED_HEADER: "More than one signature header was sent.",
    RefusalReason.HEADER_TOO_LONG: "The signature header is too long.",
    RefusalReason.MALFORMED_HEADER: "The signature header is malformed.",
    RefusalReason.MISSING_SIGNATURE: "The signature header has no signature of the scheme v1.",
    RefusalReason.TOO_MANY_SIGNATURES: "The signature header has too many signatures.",
    RefusalReason.TIMESTAMP_TOO_OLD: "The signature's timestamp is too far in the past.",
    RefusalReason.TIMESTAMP_IN_FUTURE: "The signature's timestamp is too far in the future.",
    RefusalReason.NO_MATCH: "The signature was not made with a current secret for these bytes.",
}


class SignatureRefused(SignatureInvalid):
    """The Stripe-Signature header is missing, malformed, outside the time window or made with another secret."""

    def __init__(self, reason: RefusalReason) -> None:
        # Header and body stay out of the error: a generic exception logger would print them.
        self.reason = reason
        super().__init__(_DETAILS[reason])


@dataclass(frozen=True, slots=True)
class WebhookSecret:
    """One live endpoint secret; `key` is the whole `whsec_...` text as bytes, which is Stripe's HMAC key."""

    name: str
    key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Verified:
    """A genuine delivery: `timestamp` in unix seconds, and the hex SHA-256 that identifies this signature."""

    timestamp: int
    secret_name: str
    signature_sha256: str


def parse_webhook_secrets(text: str, *, livemode: bool) -> tuple[WebhookSecret, ...]:
    """The secrets of `whsec_...` or `name=whsec_...` entries, comma separated, in the order given.

    Raises ValueError with the position of the entry that can't be used, never with its text.
    """
    if not text.strip():
        raise ValueError("STRIPE_WEBHOOK_SECRET: no secret is set; without one anybody could send events")
    secrets = tuple(
        _parse_secret(entry.strip(), position=position, livemode=livemode)
        for position, entry in enumerate(text.split(","), start=1)
    )
    if len({secret.name for secret in secrets}) != len(secrets):
        raise ValueError("STRIPE_WEBHOOK_SECRET: two entries have the same name")
    return secrets


def _parse_secret(entry: str, *, position: int, livemode: bool) -> WebhookSecret:
    where = f"STRIPE_WEBHOOK_SECRET: entry {position}"
    if not entry:
        raise ValueError(f"{where} is blank")
    name, value = f"secret-{position}", entry
    if not entry.startswith(SECRET_PREFIX):
        given_name, equals, given_value = entry.partition("=")
        if not equals or not given_value.strip().startswith(SECRET_PREFIX):
            raise ValueError(f"{where} must be {SECRET_PREFIX}... or name={SECRET_PREFIX}...")
        name, value = given_name.strip(), given_value.strip()
        if not _SECRET_NAME.fullmatch(name):
            raise ValueError(f"{where} needs a name of 1 to 64 letters, digits, dots, dashes or underscores")
    random_part = value.removeprefix(SECRET_PREFIX)
    if not random_part:
        raise ValueError(f"{where} has nothing behind {SECRET_PREFIX}")
    if not value.isascii() or not value.isprintable() or " " in value:
        raise ValueError(f"{where} has a space, a line break or another character no secret has")
    if livemode and len(value) < LIVE_SECRET_CHARACTERS_MIN:
        raise ValueError(
            f"{where} is under {LIVE_SECRET_CHARACTERS_MIN} characters; live mode needs a real one"
        )
    if livemode and len(set(random_part)) < LIVE_SECRET_DISTINCT_CHARACTERS_MIN:
        raise ValueError(f"{where} looks like a placeholder; live mode needs a real one")
    return WebhookSecret(name=name, key=value.encode("ascii"))


class SecretSource:
    """The secrets that are valid now; those of a file follow the file, so that a rotation needs no restart."""

    def __init__(self, secrets: tuple[WebhookSecret, ...]) -> None:
        if not secrets:
            raise ValueError("STRIPE_WEBHOOK_SECRET: no secret is set")
        self._secrets = secrets

    @classmethod
    def from_text(cls, text: str, *, livemode: bool) -> SecretSource:
        """The secrets of one setting's text; ValueError as in `parse_webhook_secrets`."""
        return cls(parse_webhook_secrets(text, livemode=livemode))

    @classmethod
    def from_file(
        cls, path: Path, *, livemode: bool, monotonic_seconds: Callable[[], float] = time.monotonic
    ) -> SecretSource:
        """The secrets of a file and its later versions; ValueError when the first one can't be used."""
        return _FileSecretSource(path, livemode=livemode, monotonic_seconds=monotonic_seconds)

    def current(self) -> tuple[WebhookSecret, ...]:
        """All live secrets, at least one, in the order they were written."""
        return self._secrets


class _FileSecretSource(SecretSource):
    def __init__(self, path: Path, *, livemode: bool, monotonic_seconds: Callable[[], float]) -> None:
        self._path = path
        self._livemode = livemode
        self._monotonic_seconds = monotonic_seconds
        self._checked_at_seconds = monotonic_seconds()
        try:
            # Before reading: a change in between is then seen as a change at the next look.
            self._version: tuple[int, int, int] | None = self._file_version()
            super().__init__(self._read())
        except OSError as error:
            raise ValueError(f"STRIPE_WEBHOOK_SECRET_FILE: can't read {path}: {error.strerror}") from error

    def current(self) -> tuple[WebhookSecret, ...]:
        now_seconds = self._monotonic_seconds()
        if now_seconds - self._checked_at_seconds >= SECRET_FILE_CHECK_SECONDS:
            self._checked_at_seconds = now_seconds
            self._follow_file()
        return self._secrets

    def _follow_file(self) -> None:
        try:
            version = self._file_version()
        except OSError:
            version = None
        if version == self._version:
            return
        # Remembered even when the new file is bad: one warning per change, not one per second.
        self._version = version
        try:
            self._secrets = self._read()
        except (OSError, ValueError) as error:
            # A half-done rotation must not stop payments: the last good secrets stay.
            structlog.get_logger().warning(
                "webhook_secret_file_refused",
                path=str(self._path),
                error=error.strerror if isinstance(error, OSError) else str(error),
            )
        else:
            structlog.get_logger().info(
                "webhook_secret_file_reloaded", secret_names=[secret.name for secret in self._secrets]
            )

    def _file_version(self) -> tuple[int, int, int]:
        stat = self._path.stat()
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _read(self) -> tuple[WebhookSecret, ...]:
        content = self._path.read_bytes()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            text = None
        # Raised out here: the decoding error holds the file's content.
        if text is None:
            raise ValueError("STRIPE_WEBHOOK_SECRET_FILE: not UTF-8")
        return parse_webhook_secrets(text, livemode=self._livemode)


def signature_header(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The one Stripe-Signature value of an ASGI request's header pairs, or None.

    Raises SignatureRefused when there are several: RFC 9110 5.3 would join them, and each hop might
    pick another one.
    """
    values = [value for name, value in headers if name.lower() == SIGNATURE_HEADER]
    if len(values) > 1:
        raise SignatureRefused(RefusalReason.REPEATED_HEADER)
    return values[0] if values else None


class WebhookSecurityValidator:
    """Checks a delivery's signature and time window (docs.stripe.com/webhooks#verify-manually).

    It accepts what Stripe's own Python SDK (16.1) accepts: items in any order, unknown schemes, `v0`,
    blanks around the value of `t`, and whatever follows a second `=` in an item. Deliberate differences:

    - `t` more than the tolerance ahead is refused; the SDK bounds only the past, which would let a
      captured delivery outlive the memory of seen signatures. Both edges are inclusive.
    - Header over 4 KiB, over 16 `v1`, or several `t` (the SDK takes the first): refused.
    - `t` is 1 to 12 ASCII digits; the SDK also takes `+1`, `1_0` and other forms of Python's int().
    - A `v1` with a byte outside ASCII is refused; the SDK fails with TypeError unless it matched before.
    - The body is bytes and need not be UTF-8 (the SDK fails with UnicodeDecodeError); the parser
      refuses it afterwards.
    """

    def __init__(self, secrets: SecretSource, *, tolerance_seconds: int) -> None:
        if tolerance_seconds < 1:
            raise ValueError(
                "WEBHOOK_TOLERANCE_SECONDS must be at least 1; the time check can't be turned off"
            )
        self._secrets = secrets
        self._tolerance_seconds = tolerance_seconds

    def verify(self, *, body: bytes, header: bytes | None, now: datetime) -> Verified:
        """The proof that `body` was signed within the tolerance of `now` (aware) with a live secret.

        Raises SignatureRefused and nothing else, whatever the bytes. If several secrets match, the first
        in written order names the result, so during a rotation one delivery has one replay key.
        """
        timestamp, candidates = _parse_header(header)
        now_seconds = now.timestamp()
        if timestamp < now_seconds - self._tolerance_seconds:
            raise SignatureRefused(RefusalReason.TIMESTAMP_TOO_OLD)
        if timestamp > now_seconds + self._tolerance_seconds:
            raise SignatureRefused(RefusalReason.TIMESTAMP_IN_FUTURE)
        signed = b"%d.%b" % (timestamp, body)
        matches: list[Verified] = []
        for secret in self._secrets.current():
            expected = hmac.digest(secret.key, signed, "sha256").hex().encode("ascii")
            # Every candidate under every secret: how long it takes says nothing about which one fits.
            if sum([hmac.compare_digest(expected, candidate) for candidate in candidates]):
                replay_key = hashlib.sha256(b"%d.%b" % (timestamp, expected)).hexdigest()
                matches.append(Verified(timestamp, secret.name, replay_key))
        if not matches:
            raise SignatureRefused(RefusalReason.NO_MATCH)
        return matches[0]


def sign(body: bytes, key: bytes, *, timestamp: int) -> str:
    """The Stripe-Signature header that Stripe would send with these bytes at this unix second."""
    digest = hmac.digest(key, b"%d.%b" % (timestamp, body), "sha256").hex()
    return f"t={timestamp},v1={digest}"


def _parse_header(header: bytes | None) -> tuple[int, list[bytes]]:
    """The `t` and all `v1` values of `t=...,v1=...[,v1=...]`."""
    if not header:
        raise SignatureRefused(RefusalReason.MISSING_HEADER)
    if len(header) > HEADER_BYTES_MAX:
        raise SignatureRefused(RefusalReason.HEADER_TOO_LONG)
    timestamps: list[bytes] = []
    candidates: list[bytes] = []
    for item in header.split(b","):
        scheme, *values = item.split(b"=", 2)
        if scheme not in (b"t", b"v1"):
            continue
        if not values:
            raise SignatureRefused(RefusalReason.MALFORMED_HEADER)
        (timestamps if scheme == b"t" else candidates).append(values[0])
    if len(timestamps) != 1 or not all(candidate.isascii() for candidate in candidates):
        raise SignatureRefused(RefusalReason.MALFORMED_HEADER)
    digits = timestamps[0].strip()
    if not digits.isdigit() or len(digits) > TIMESTAMP_DIGITS_MAX:
        raise SignatureRefused(RefusalReason.MALFORMED_HEADER)
    if not candidates:
        raise SignatureRefused(RefusalReason.MISSING_SIGNATURE)
    if len(candidates) > SIGNATURES_MAX:
        raise SignatureRefused(RefusalReason.TOO_MANY_SIGNATURES)
    return int(digits), candidates


# Two calls at most per delivery: together they may add 50 ms to it.
REDIS_CALL_SECONDS_MAX = 0.025
# After a failure Redis is left alone so long: an outage costs one slow call per pause, not one per delivery.
REDIS_PAUSE_SECONDS = 5.0


class WebhookReplayProtection:
    """Remembers signatures already answered, so that the same bytes sent again cost no database work.

    A memory, never the authority: when it is slow, stopped, emptied or absent, the claim in the
    database gives the same answer. It knows only what was committed.
    """

    def __init__(
        self,
        handler: IdempotencyHandler | None,
        *,
        metrics: MetricsCollector,
        monotonic_seconds: Callable[[], float] = time.monotonic,
    ) -> None:
        self._handler = handler
        self._metrics = metrics
        self._monotonic_seconds = monotonic_seconds
        self._paused_until_seconds = 0.0

    async def check_replay_cache(self, signature_sha256: str) -> bytes | None:
        """The answer that a delivery with this signature got, or None where it is not known."""
        if self._handler is None or self._is_paused():
            return None
        answer = await self._within_limit(self._handler.get_cached(signature_sha256))
        return answer.body if answer else None

    async def remember(self, signature_sha256: str, body: bytes) -> None:
        """Keeps the answer of a committed delivery, unless one is kept already."""
        if self._handler is None or self._is_paused():
            return
        await self._within_limit(self._handler.remember(signature_sha256, Answer(200, body)))

    def _is_paused(self) -> bool:
        return self._monotonic_seconds() < self._paused_until_seconds

    async def _within_limit(self, call: Awaitable[Answer | None]) -> Answer | None:
        try:
            async with asyncio.timeout(REDIS_CALL_SECONDS_MAX):
                return await call
        except (Unavailable, TimeoutError) as error:
            self._paused_until_seconds = self._monotonic_seconds() + REDIS_PAUSE_SECONDS
            self._metrics.redis_failed()
            structlog.get_logger().warning(
                "redis_left_alone", pause_seconds=REDIS_PAUSE_SECONDS, error=type(error).__name__
            )
            return None
