"""Logs as JSON lines on stderr, one record per line, with every secret taken out of them.

    configure_logging(level="INFO")          # once, by main or the command line
    log = structlog.get_logger(__name__)     # anywhere; fields are keyword arguments
    log.info("event applied", event_type=event_type)

A line has `timestamp`, `level`, `logger`, `event`, what is bound with structlog.contextvars
(`request_id`, `event_id`), the fields of the call and, after an error, `exception`.
"""

from __future__ import annotations

import decimal
import enum
import ipaddress
import itertools
import json
import logging
import pathlib
import re
import sys
import traceback
import unicodedata
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime, time, timedelta
from types import TracebackType
from typing import Any, Literal, cast

import structlog

REDACTED = "[redacted]"

# Two screens of text; a body or a page that was logged by mistake must not fill the disk.
VALUE_CHARACTERS_MAX = 2_000
# Names are ours and short; only a key that came from outside is longer.
KEY_CHARACTERS_MAX = 100
# Bounds the work for a value that somebody else shaped; our own records stay far below.
ITEMS_MAX = 50
DEPTH_MAX = 4
# Larger than any amount, id or count of ours; Python refuses to print integers of thousands of digits.
INTEGER_BITS_MAX = 64
# The failing end of the deepest stack we have (server, framework, store) fits.
FRAMES_MAX = 30
# An error with its causes, or the members of a group; more add nothing to a diagnosis.
EXCEPTIONS_MAX = 5
# Redaction of a text this long takes about five milliseconds; what is longer is cut before.
REDACTION_CHARACTERS_MAX = 20_000

_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
Level = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]

# Libraries that bring handlers of their own when they are left alone.
_LIBRARY_LOGGERS = (
    "uvicorn",
    "uvicorn.error",
    "uvicorn.access",
    "sqlalchemy",
    "alembic",
    "apprise",
    "py.warnings",
)

# A header's name, then its value: quoted, or up to the end of the line. It must come first, because it
# swallows whatever scheme the value uses.
_HEADER = re.compile(
    r"""(?i)\b((?:proxy-)?authorization|(?:set-)?cookie|stripe-signature|webhook-signature|x-api-key)\b
    ((?:["']?\s*[:=]|["']\s*,)\s*)
    (?:b?'(?:[^'\\\r\n]|\\.)*'|b?"(?:[^"\\\r\n]|\\.)*"|[^\r\n]+)""",
    re.VERBOSE,
)

_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    # Signing secrets of Stripe and of Standard Webhooks.
    (re.compile(r"(?i)whsec_[A-Za-z0-9+/=_-]+"), f"whsec_{REDACTED}"),
    # Stripe's secret, restricted and publishable keys (docs.stripe.com/keys), wherever they start.
    (re.compile(r"(?i)(sk|rk|pk)_(live|test)_[A-Za-z0-9_]+"), rf"\1_\2_{REDACTED}"),
    # Keys of other forms (organisation keys); publishable ones have none, and pk_... also names constraints.
    (re.compile(r"(?<![A-Za-z0-9])(sk|rk)_[A-Za-z0-9_]{16,}"), rf"\1_{REDACTED}"),
    # Our own API keys.
    (re.compile(r"(?<![A-Za-z0-9])tk_[A-Za-z0-9_-]{20,}"), f"tk_{REDACTED}"),
    # Stripe's client secrets: pi_..._secret_..., seti_..._secret_..., cs_..._secret_...
    (re.compile(r"_secret_[A-Za-z0-9%]{16,}"), f"_secret_{REDACTED}"),
    (
        re.compile(r"""(?i)(client_?secret["']?\s*[:=]\s*["']?)[^\s"',;&}\])]+"""),
        rf"\1{REDACTED}",
    ),
    # A Stripe-Signature header without its name, and its parts on their own.
    (re.compile(r"\bt=\d{1,20}(?:\s*,\s*v\d=[0-9A-Za-z]+)+"), f"t={REDACTED},v1={REDACTED}"),
    (re.compile(r"""(?i)\b(v\d["']?\s*[:=]\s*["']?)[0-9a-f]{16,}"""), rf"\1{REDACTED}"),
    # A signature by the Standard Webhooks specification: v1,<base64>.
    (re.compile(r"\b(v\d[a-z]?,)[A-Za-z0-9+/]{20,}={0,2}"), rf"\1{REDACTED}"),
    # Credentials of RFC 6750 and RFC 7617 outside a header.
    (re.compile(r"(?i)\b(bearer\s+)[A-Za-z0-9._~+/=-]{8,}"), rf"\1{REDACTED}"),
    (re.compile(r"\b(Basic\s+)(?=[A-Za-z0-9+/]*[0-9=A-Z])[A-Za-z0-9+/]{12,}={0,2}"), rf"\1{REDACTED}"),
    # A password inside a URL.
    (re.compile(r"(://)[^\s/@:]*:[^\s/@]+@"), rf"\1{REDACTED}@"),
    # The owner's alert channels: in an Apprise URL host and path are the credentials.
    (
        re.compile(
            r"(?i)(?<![a-z0-9+.-])(?!(?:https?|postgres(?:ql)?(?:\+[a-z]+)?|sqlite(?:\+[a-z]+)?|rediss?|file)://)"
            r"([a-z][a-z0-9+.-]{0,30}://)[^\s\"'<>]+"
        ),
        rf"\1{REDACTED}",
    ),
    (re.compile(r"(/bot)\d+:[A-Za-z0-9_-]+"), rf"\1{REDACTED}"),
    (re.compile(r"(/services/|/api/webhooks/)[A-Za-z0-9_/-]{20,}"), rf"\1{REDACTED}"),
)

# UUIDs and SHA-256 digests are ours and often hold long runs of digits, so they are stepped over.
_CARD_CANDIDATE = re.compile(
    r"(?<![0-9A-Za-z])(?:[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{64})(?![0-9A-Za-z])"
    r"|(?P<run>\d(?:[ \u00a0\u2010-\u2015-]?\d){12,})"
)
_DIGIT_BLOCK = re.compile(r"\d+")
# ISO/IEC 7812: what card schemes issue.
_CARD_DIGITS_MIN, _CARD_DIGITS_MAX = 13, 19

# A field so named never shows its value, whatever it looks like.
_SECRET_NAME = re.compile(
    r"(?i)(?:authorization|cookie|secret|password|passwd|token|api_?key|signature|signature_header|alert_urls"
    r"|payload|body|cvc|cvv|pan|card_number)$"
)

# SQLAlchemy ends its messages with the values of the statement: whole bodies, people's data.
_SQL_PARAMETERS = re.compile(r"\[parameters: .*", re.DOTALL)

# Types whose text is short, harmless and fixed by the standard library.
_PLAIN_TYPES = (
    date,
    time,
    timedelta,
    decimal.Decimal,
    uuid.UUID,
    pathlib.PurePath,
    ipaddress.IPv4Address,
    ipaddress.IPv6Address,
)


def redact(text: str) -> str:
    """The text without credentials and card numbers; everything else, Stripe ids included, stays as it is.

    Taken out: `whsec_`, `sk_`, `rk_`, `pk_` and `tk_` keys, client secrets, signatures, Authorization and
    Cookie values, passwords in URLs, alert channels, and Luhn-valid runs of 13 to 19 digits
    (PCI DSS, SAQ A: account data is neither stored nor logged).
    """
    text = _HEADER.sub(rf"\1\2{REDACTED}", text)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return _CARD_CANDIDATE.sub(_without_cards, text)


def clean(text: str, *, characters_max: int) -> str:
    """The text redacted, on few lines and short: fit for a person's phone or a database column.

    Control, format (bidirectional, zero width) and surrogate characters are removed, newlines kept.
    """
    text = text[:REDACTION_CHARACTERS_MAX].replace("\r\n", "\n")
    # Cs and the rest of C: a lone surrogate can't be encoded, the others change what a reader sees.
    text = "".join(
        character for character in text if character == "\n" or unicodedata.category(character)[0] != "C"
    )
    return cut(redact(text).strip(), characters_max=characters_max)


def cut(text: str, *, characters_max: int) -> str:
    """The text, or its beginning and three dots, never longer than `characters_max`."""
    return text if len(text) <= characters_max else text[: characters_max - 3] + "..."


def configure_logging(*, level: Level = "INFO") -> None:
    """Sends every log record of this process, our own and the libraries', to stderr as a JSON line.

    May be called again: the last call counts. Only main and the command line call it.
    """
    if level not in _LEVELS:
        raise ValueError(f"log level must be one of {', '.join(_LEVELS)}")
    handler = _JsonLineHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.contextvars.merge_contextvars],
            processors=[_render],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in _LIBRARY_LOGGERS:
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
    # Below WARNING it logs the owner's channels and the answers of their servers.
    logging.getLogger("apprise").setLevel(max(logging.WARNING, root.level))
    # Our own lines about deliveries say more than the server's.
    logging.getLogger("uvicorn.access").setLevel(max(logging.WARNING, root.level))
    logging.captureWarnings(capture=True)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(root.level),
    )


class _JsonLineHandler(logging.StreamHandler[Any]):
    """Writes to a stream; a record that can't be rendered is a JSON line too, never a raw traceback."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # the standard library's name
        """Writes the one line that stands for the broken record."""
        error = sys.exc_info()[0]
        if error is not None and issubclass(error, OSError):
            # The stream itself is gone; there is nowhere left to say so.
            return
        line = _line(
            {
                "timestamp": _timestamp(record),
                "level": "error",
                "logger": cut(record.name, characters_max=KEY_CHARACTERS_MAX),
                "event": "a log record could not be rendered",
                "error": "" if error is None else error.__name__,
            }
        )
        self.stream.write(line + self.terminator)


def _render(_logger: Any, _method: str, fields: structlog.typing.EventDict) -> str:
    """The last step of every record: its one line."""
    record: logging.LogRecord = fields.pop("_record")
    fields.pop("_from_structlog")
    fields.pop("stack_info", None)
    # structlog carries the error among the fields, the standard library on the record.
    error = _error_of(fields.pop("exc_info", None) or record.exc_info)
    known: dict[str, Any] = {
        "timestamp": _timestamp(record),
        "level": record.levelname.lower(),
        "logger": record.name,
        "event": _safe_value(_hide_parameters(str(fields.pop("event", ""))), DEPTH_MAX),
    }
    for name, value in itertools.islice(fields.items(), ITEMS_MAX):
        key = _safe_key(name)
        known.setdefault(key, _safe_field(key, value))
    if error is not None:
        known["exception"] = [_exception(one) for one in itertools.islice(_chain(error), EXCEPTIONS_MAX)]
    return _line(known)


def _line(fields: dict[str, Any]) -> str:
    # ASCII only: C1, bidirectional and line-separator characters leave as \uXXXX; json leaves out DEL alone.
    return json.dumps(fields, ensure_ascii=True, separators=(",", ":")).replace("\x7f", "\\u007f")


def _timestamp(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds")


def _safe_key(name: Any) -> str:
    return cut(redact(str(name)[:REDACTION_CHARACTERS_MAX]), characters_max=KEY_CHARACTERS_MAX)


def _safe_field(key: str, value: Any) -> Any:
    """A field's value as JSON; a container that is too long as the beginning of its JSON text."""
    safe = REDACTED if _SECRET_NAME.search(key) else _safe_value(value, DEPTH_MAX)
    if isinstance(safe, (dict, list)):
        text = json.dumps(safe)
        if len(text) > VALUE_CHARACTERS_MAX:
            return cut(text, characters_max=VALUE_CHARACTERS_MAX)
    return safe


def _safe_value(value: Any, depth: int) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, enum.Enum):
        return _safe_number(value)
    if isinstance(value, Mapping):
        return _safe_mapping(value, depth)
    if isinstance(value, (list, tuple, set, frozenset)):
        return (
            [_safe_value(item, depth - 1) for item in itertools.islice(value, ITEMS_MAX)] if depth else "..."
        )
    return cut(redact(_text(value)[:REDACTION_CHARACTERS_MAX]), characters_max=VALUE_CHARACTERS_MAX)


def _safe_mapping(value: Mapping[Any, Any], depth: int) -> Any:
    if not depth:
        return "..."
    safe: dict[str, Any] = {}
    for name, item in itertools.islice(value.items(), ITEMS_MAX):
        key = _safe_key(name)
        safe[key] = REDACTED if _SECRET_NAME.search(key) else _safe_value(item, depth - 1)
    return safe


def _safe_number(value: float) -> Any:
    if isinstance(value, int) and value.bit_length() > INTEGER_BITS_MAX:
        return f"<integer of {value.bit_length()} bits>"
    text = str(value)
    # JSON has no NaN and no Infinity.
    return value if text.lstrip("-")[:1].isdigit() and redact(text) == text else redact(text)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (bytes, bytearray)):
        return bytes(value[:REDACTION_CHARACTERS_MAX]).decode("utf-8", "backslashreplace")
    if isinstance(value, BaseException):
        return f"{type(value).__name__}: {_hide_parameters(str(value))}"
    if isinstance(value, enum.Enum):
        return str(value.value)
    if isinstance(value, _PLAIN_TYPES):
        return str(value)
    # The repr of anything else may be a whole body, a secret, or raise.
    return f"<{type(value).__module__}.{type(value).__qualname__}>"


def _hide_parameters(message: str) -> str:
    return _SQL_PARAMETERS.sub("[parameters hidden]", message)


def _error_of(exc_info: Any) -> BaseException | None:
    """The exception behind any of the forms in which loggers take one."""
    if isinstance(exc_info, BaseException):
        return exc_info
    if isinstance(exc_info, tuple):
        return cast("BaseException | None", exc_info[1])
    return sys.exc_info()[1] if exc_info else None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, then what it holds together or came from, nearest first."""
    waiting, seen = [error], set[int]()
    while waiting:
        one = waiting.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        if isinstance(one, BaseExceptionGroup):
            waiting.extend(one.exceptions)
        if one.__cause__ is not None:
            waiting.append(one.__cause__)
        elif one.__context__ is not None and not one.__suppress_context__:
            waiting.append(one.__context__)


def _exception(error: BaseException) -> dict[str, Any]:
    return {
        "type": f"{type(error).__module__}.{type(error).__qualname__}",
        "message": _safe_value(_hide_parameters(str(error)), DEPTH_MAX),
        "frames": _frames(error.__traceback__),
    }


def _frames(trace: TracebackType | None) -> list[str]:
    """`file:line:function` of each frame, the failing one last; never local variables."""
    frames = [
        f"{frame.f_code.co_filename}:{line}:{frame.f_code.co_name}"
        for frame, line in traceback.walk_tb(trace)
    ]
    return frames[-FRAMES_MAX:]


def _without_cards(match: re.Match[str]) -> str:
    """Masks the card numbers in a run of digit blocks: whole neighbouring blocks of 13 to 19 digits.

    Blocks, not single digits, are the unit, so that a year in front does not hide the card behind it
    and a number of 30 digits is not searched for card-like pieces.
    """
    run = match.group("run")
    if run is None:
        return match.group()
    blocks = list(_DIGIT_BLOCK.finditer(run))
    kept: list[str] = []
    copied_to = first = 0
    while first < len(blocks):
        last = _last_block_of_card(blocks, first)
        if last is None:
            first += 1
            continue
        kept += [run[copied_to : blocks[first].start()], "[card]"]
        copied_to = blocks[last].end()
        first = last + 1
    return "".join([*kept, run[copied_to:]])


def _last_block_of_card(blocks: list[re.Match[str]], first: int) -> int | None:
    digits, found = "", None
    for index in range(first, len(blocks)):
        digits += blocks[index].group()
        if len(digits) > _CARD_DIGITS_MAX:
            break
        if len(digits) >= _CARD_DIGITS_MIN and _passes_luhn(digits):
            found = index
    return found


def _passes_luhn(digits: str) -> bool:
    """ISO/IEC 7812-1 annex B; every issued card number passes, one in ten other numbers does."""
    total = 0
    for position, digit in enumerate(reversed(digits)):
        total += sum(divmod(int(digit) * (1 + position % 2), 10))
    return total % 10 == 0
