"""What every idempotency store keeps and promises: the record, its key, its answer, the store's protocol."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from backend.app.core.errors import IdempotencyKeyMissing

# The limit that Stripe states for its own Idempotency-Key header (docs.stripe.com/api/idempotent_requests);
# two such columns of four-byte characters still fit into one PostgreSQL index row (2,704 bytes).
KEY_CHARACTERS_MAX = 255
# Our own names are short; the limit keeps the index row below PostgreSQL's bound.
OPERATION_CHARACTERS_MAX = 64
# An answer is a small document; a store is not the place for downloads.
ANSWER_BODY_BYTES_MAX = 1_048_576
# What a repeat needs in order to mean the same. Cookies and credentials belong to the first exchange only.
ANSWER_HEADERS_ALLOWED = frozenset({"content-type", "content-language", "etag", "link", "location"})


class State(StrEnum):
    """How far the work behind a key is."""

    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    AMBIGUOUS = "ambiguous"


@dataclass(frozen=True, slots=True)
class RecordKey:
    """Whose key it is: one caller's `key` for one `operation`; `caller` is empty where there is only one.

    Raises IdempotencyKeyMissing for a key that some store could not keep: empty, longer than 255
    characters, or with a NUL or lone surrogate in it.
    """

    operation: str
    caller: str
    key: str

    def __post_init__(self) -> None:
        if not 0 < len(self.operation) <= OPERATION_CHARACTERS_MAX or not self.operation.isascii():
            raise ValueError("an operation's name is 1 to 64 ASCII characters")
        if not _is_storable(self.caller):
            raise ValueError("a caller's id is at most 255 characters of valid text")
        if not self.key or not _is_storable(self.key):
            raise IdempotencyKeyMissing("The idempotency key must be 1 to 255 characters of valid text.")


@dataclass(frozen=True, slots=True)
class Answer:
    """What the first call was answered: HTTP status, body bytes, and the headers a repeat may see again.

    Header names are lower case and in ANSWER_HEADERS_ALLOWED; anything else is a ValueError.
    """

    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if len(self.body) > ANSWER_BODY_BYTES_MAX:
            raise ValueError(f"an answer of {len(self.body)} bytes is too large to be remembered")
        for name, _ in self.headers:
            if name not in ANSWER_HEADERS_ALLOWED:
                raise ValueError(f"header {name} is not kept with an answer")

    @property
    def content_type(self) -> str:
        """The media type of the body, empty when unknown."""
        return dict(self.headers).get("content-type", "")


@dataclass(frozen=True, slots=True)
class Record:
    """One key's record as the store has it.

    `token` is the fencing token of the latest claim, `record_id` the token of the first one;
    `lease_seconds_left` is counted by the store's clock, zero or less once the lease is over.
    The record names its own key, so that a reply that was meant for someone else is noticed.
    """

    key: RecordKey
    fingerprint: str
    state: State
    record_id: str
    token: str
    lease_seconds_left: float
    answer: Answer | None

    @property
    def is_takeover(self) -> bool:
        """True when an earlier holder ended without saying how."""
        return self.record_id != self.token


class IdempotencyStore(Protocol):
    """Keeps records. Time is the store's own; each method is atomic and raises Unavailable when it can't work."""

    async def claim(
        self, key: RecordKey, fingerprint: str, token: str, *, lease_seconds: float, ttl_seconds: float
    ) -> Record:
        """The record after an attempt to own the key: the attempt won exactly when the record has `token`.

        It wins when there is no record, or an unfinished one with the same fingerprint whose lease is
        over. An unfinished record is forgotten `ttl_seconds` after the end of its lease.
        """
        ...

    async def complete(self, key: RecordKey, token: str, answer: Answer, *, ttl_seconds: float) -> bool:
        """Stores the final answer for `ttl_seconds`; False, and no change, unless `token` has an unexpired lease."""
        ...

    async def mark_ambiguous(self, key: RecordKey, token: str) -> bool:
        """Notes that nobody knows whether the work happened; False unless `token` has an unexpired lease."""
        ...

    async def release(self, key: RecordKey, token: str) -> bool:
        """Forgets the claim, as nothing happened; False unless `token` has an unexpired lease."""
        ...

    async def read(self, key: RecordKey) -> Record | None:
        """The record, or None when there is none or its time is over."""
        ...

    async def remember(
        self, key: RecordKey, fingerprint: str, token: str, answer: Answer, *, ttl_seconds: float
    ) -> Record:
        """Stores a finished answer if there is no record; ours is the one kept exactly when it has `token`."""
        ...


def _is_storable(text: str) -> bool:
    if len(text) > KEY_CHARACTERS_MAX or "\0" in text:
        return False
    return not any("\ud800" <= character <= "\udfff" for character in text)
