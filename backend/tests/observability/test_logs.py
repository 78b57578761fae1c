from __future__ import annotations

import contextlib
import io
import json
import logging
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import structlog

from backend.app.observability.logs import Level, clean, configure_logging, redact

Lines = Callable[[], list[dict[str, Any]]]

TOUCHED_LOGGERS = (
    "uvicorn",
    "uvicorn.error",
    "uvicorn.access",
    "sqlalchemy",
    "alembic",
    "apprise",
    "py.warnings",
)


def configure(stream: io.StringIO, level: Level = "DEBUG") -> None:
    """Logging configured as in production, onto a text; also takes away what the test runner listens with."""
    with contextlib.redirect_stderr(stream):
        configure_logging(level=level)


@pytest.fixture
def stderr() -> Iterator[io.StringIO]:
    """What production would write to stderr; everything is put back afterwards."""
    stream = io.StringIO()
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    before = {
        name: (
            logging.getLogger(name).handlers[:],
            logging.getLogger(name).level,
            logging.getLogger(name).propagate,
        )
        for name in TOUCHED_LOGGERS
    }
    configure(stream)
    try:
        yield stream
    finally:
        logging.captureWarnings(capture=False)
        structlog.reset_defaults()
        structlog.contextvars.clear_contextvars()
        root.handlers[:] = handlers
        root.setLevel(level)
        for name, (old_handlers, old_level, propagate) in before.items():
            logger = logging.getLogger(name)
            logger.handlers[:] = old_handlers
            logger.setLevel(old_level)
            logger.propagate = propagate


@pytest.fixture
def lines(stderr: io.StringIO) -> Lines:
    def read() -> list[dict[str, Any]]:
        text = stderr.getvalue()
        assert text == "" or text.endswith("\n")
        # splitlines also splits at what terminals and log shippers take for a line end (NEL, LS, VT, ...).
        return [json.loads(line) for line in text.splitlines()]

    return read


def fail(text: str) -> None:
    """Raises an error with a cause, the text in both."""
    try:
        dict[str, str]()[text]
    except KeyError as error:
        raise RuntimeError(text) from error


def luhn_complete(body: str) -> str:
    """The body with the check digit that makes it a valid card number."""
    for digit in "0123456789":
        number = body + digit
        doubled = [int(d) * 2 if i % 2 else int(d) for i, d in enumerate(reversed(number))]
        if sum(d - 9 if d > 9 else d for d in doubled) % 10 == 0:
            return number
    raise AssertionError(body)


LETTERS = "AbCdEfGhIjKlMnOpQrStUvWxYz0123456789"
HEX = "5257a869e7ecebeda32affa62cdca3fa51cad7e77a0e56ff536d0ce8e108d8bd"

# (text as it might be logged, the part of it that must not come through)
CARDS = [
    "4242424242424242",
    "5555555555554444",
    "378282246310005",
    "6011111111111117",
    "3056930009020004",
    "6200000000000005",
    "3566002020360505",
    "4000000000000002",
    luhn_complete("411111111111"),
    luhn_complete("670676111111111111"),
]
PLANTED: list[tuple[str, str]] = [
    *[(f"paid with {card} today", card) for card in CARDS],
    *[
        (f"card={card[:4]} {card[4:8]} {card[8:12]} {card[12:]}", card[4:8] + " " + card[8:12])
        for card in CARDS[:4]
    ],
    *[
        (f"{card[:4]}-{card[4:8]}-{card[8:12]}-{card[12:]}", card[4:8] + "-" + card[8:12])
        for card in CARDS[:4]
    ],
    ("2026 4242 4242 4242 4242", "4242 4242"),
    ("4242424242424242 2026", "4242424242424242"),
    ("user_4242424242424242", "4242424242424242"),
    ("1764000000 5555555555554444 12", "5555555555554444"),
    (f"whsec_{LETTERS}", LETTERS),
    ("whsec_ab", "_ab"),
    (f"old=whsec_{LETTERS}a,new=whsec_{LETTERS}b", LETTERS),
    (f"WHSEC_{LETTERS}", LETTERS),
    ("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw+/==", "MfKQ9r8GKYqr"),
    *[(f"{kind}_{mode}_{LETTERS}", LETTERS) for kind in ("sk", "rk", "pk") for mode in ("live", "test")],
    (f"Invalid API Key provided: sk_live_{LETTERS}", LETTERS),
    (f"STRIPE_SECRET_KEY=sk_test_{LETTERS}", LETTERS),
    (f"keysk_live_{LETTERS}", LETTERS),
    (f"sk_org_{LETTERS}", LETTERS),
    ("tk_Zm9vYmFyYmF6cXV4MTIzNDU2Nzg5MA-_x", "Zm9vYmFyYmF6"),
    ("key=tk_0123456789abcdefghij", "0123456789abcdefghij"),
    (f"pi_3Oq2hELk_secret_{LETTERS}", LETTERS),
    (f"seti_1Oq2hELk_secret_{LETTERS}", LETTERS),
    (f"cs_test_a1b2c3_secret_{LETTERS}", LETTERS),
    ('{"client_secret": "abc123def"}', "abc123def"),
    ("client_secret=abc123def&x=1", "abc123def"),
    ("clientSecret: 'abc123def'", "abc123def"),
    (f"t=1764000000,v1={HEX}", HEX),
    (f"t=1764000000,v1={HEX},v1={HEX[::-1]},v0={HEX}", HEX[::-1]),
    (f"Stripe-Signature: t=1,v1={HEX}", HEX),
    (f"('stripe-signature', 't=1, v1={HEX}')", HEX),
    (f"v1={HEX}", HEX),
    (f'"v1": "{HEX}"', HEX),
    ("v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=", "g0hM9SsE"),
    ("Authorization: Bearer abc.def.ghi", "abc.def"),
    ("{'authorization': 'Bearer opaque-words'}", "opaque"),
    ("(b'authorization', b'Basic dXNlcjpwYXNz')", "dXNlcjpwYXNz"),
    ("Basic dXNlcjpwYXNzd29yZA==", "dXNlcjpwYXNz"),
    ("bearer 0123456789abcdef", "0123456789abcdef"),
    ("Cookie: session=opaque; theme=dark", "opaque"),
    ('Set-Cookie: session="opaque"; HttpOnly', "opaque"),
    ("X-Api-Key: plain-words-key", "plain-words"),
    ("postgresql://app:hunter2@db.internal/tollkeeper", "hunter2"),
    ("redis://:hunter2@cache:6379/0", "hunter2"),
    ("tgram://123456789:AAbbCC/987654", "AAbbCC"),
    ("mailtos://me:secretword@example.org", "secretword"),
    ("Max retries exceeded with url: /bot123456:AAbbCC-dd/sendMessage", "AAbbCC"),
    ("https://hooks.slack.com/services/T00000000/B00000000/abcdefghijkl", "abcdefghijkl"),
]


@pytest.mark.parametrize(("text", "secret"), PLANTED)
def test_a_planted_secret_does_not_come_through(text: str, secret: str) -> None:
    assert secret in text
    assert secret not in redact(text)
    assert secret not in redact(f"before {text}")
    assert secret not in clean(text, characters_max=1_000)


def test_no_planted_secret_comes_through_any_way_into_a_record(stderr: io.StringIO, lines: Lines) -> None:
    """Message, fields, nested values, keys, standard library arguments and exceptions are all redacted."""
    assert len(PLANTED) >= 50
    log = structlog.get_logger("secrets")
    for text, _ in PLANTED:
        log.info(
            text, field=text, nested={"list": [text, (text,)], text: 1}, raw=text.encode(), **{text: "x"}
        )
        logging.getLogger("library").warning("library said %s", text)
        try:
            fail(text)
        except RuntimeError as error:
            log.exception("failed", error=error)
            logging.getLogger("library").exception("failed too")
    assert len(lines()) == 4 * len(PLANTED)
    written = stderr.getvalue()
    assert [secret for _, secret in PLANTED if secret in written] == []


def test_card_numbers_given_as_numbers_are_masked(lines: Lines) -> None:
    structlog.get_logger("n").info("paid", card=4242424242424242, amount=4999, ratio=0.5)
    assert lines()[0]["card"] == "[card]"
    assert lines()[0]["amount"] == 4999
    assert lines()[0]["ratio"] == 0.5


@pytest.mark.parametrize(
    "name",
    ["password", "stripe_secret_key_token", "Authorization", "cookie", "client_secret", "payload", "body"],
)
def test_a_field_with_a_secret_name_never_shows_its_value(lines: Lines, name: str) -> None:
    structlog.get_logger("n").info("x", **{name: "plain words"}, nested={name: "plain words"})
    assert lines()[0][name] == "[redacted]"
    assert lines()[0]["nested"] == {name: "[redacted]"}


@pytest.mark.parametrize(
    "text",
    [
        "cus_NffrFeUfNV2Hib",
        "sub_1MowQVLkdIwHu7ixeRlqHVzs",
        "in_1MtHbELkdIwHu7ixl4OzzPMv",
        "evt_1NG8Du2eZvKYlo2CUI79vXWy",
        "pi_3MtwBwLkdIwHu7ix28a3tqPa",
        "price_1MoBy5LkdIwHu7ixZhnattbh",
        "req_8hIjKlMnOpQrSt",
        "cs_test_a11YYufWQzNY63zpQ6QSNRQhkUpVph4WRmzW0zWJO2znZKdVujZ0N0S22u",
        "0197f3c1-4242-7424-8242-424242424242",
        HEX,
        "4242424242424242"[:12],
        "4242424242424243",
        "the task_runner asked for risk_level and disk_space",
        "pk_outbox uq_webhook_events_account_livemode_event_id",
        "Basic plan, premium_monthly, analytics_level basic",
        "https://dashboard.stripe.com/test/events sqlite:///./tollkeeper.db postgresql://localhost/x",
        "2026-11-23T07:30:00.123456+00:00 took 12.5 ms",
        "grüße, 世界",
        "webhook secret missing: STRIPE_WEBHOOK_SECRET must start with whsec_",
    ],
)
def test_ordinary_ids_and_words_come_through_unchanged(text: str) -> None:
    assert redact(text) == text


HOSTILE = [
    "line\nbreak",
    '\r\n{"level":"info","event":"forged"}',
    "\x1b[31mred\x1b[0m \x1b]0;title\x07",
    "\x9b31m C1 \x85 NEL",
    "\u2028 line \u2029 paragraph",
    "\u202e bidi \u2066 \u200b",
    "\x00 nul \x0b vt \x0c ff \x1c fs \x7f del",
    "\ud800 lone surrogate",
    '"}, "quote": {"',
    "%s %d %(event)s {0}",
    "\\u000a \\",
    "x" * 100_000,
]


@pytest.mark.parametrize("value", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_value_in_any_field_stays_on_one_line(
    stderr: io.StringIO, lines: Lines, value: str
) -> None:
    # A test report can't carry a lone surrogate between processes, so the runner must not hear this.
    configure(stderr)
    structlog.contextvars.bind_contextvars(request_id=value)
    log = structlog.get_logger("hostile")
    log.info("x", field=value)
    log.info(value)
    log.info("x", **{value: 1})
    log.info("x", nested={"a": [value, {value: value}]}, raw=value.encode("utf-8", "surrogatepass"))
    logging.getLogger(f"library.{value[:50]}").warning("got %s", value)
    try:
        fail(value)
    except RuntimeError:
        log.exception("x")
    assert len(lines()) == 6
    assert all(line["level"] in {"info", "warning", "error"} for line in lines())
    assert stderr.getvalue().isascii()
    assert all(0x20 <= ord(character) < 0x7F for character in stderr.getvalue().replace("\n", ""))
    assert all(
        len(str(field)) <= 2_000 for line in lines() for field in line.values() if isinstance(field, str)
    )


def test_a_record_says_when_where_and_in_which_request(lines: Lines) -> None:
    structlog.contextvars.bind_contextvars(request_id="r-1", event_id="evt_1")
    structlog.get_logger("backend.app.billing").info("applied", event_type="invoice.paid", count=2, ok=True)
    logging.getLogger("uvicorn.error").info("Started %s", "server")
    ours, theirs = lines()
    assert ours["timestamp"].endswith("+00:00")
    assert {key: ours[key] for key in ours if key != "timestamp"} == {
        "level": "info",
        "logger": "backend.app.billing",
        "event": "applied",
        "event_type": "invoice.paid",
        "count": 2,
        "ok": True,
        "request_id": "r-1",
        "event_id": "evt_1",
    }
    assert (theirs["event"], theirs["logger"], theirs["request_id"]) == (
        "Started server",
        "uvicorn.error",
        "r-1",
    )


def test_a_field_cannot_pretend_to_be_the_time_or_the_level(lines: Lines) -> None:
    structlog.get_logger("n").info("x", timestamp="1970", level="debug", logger="other", exception="none")
    assert lines()[0]["level"] == "info"
    assert lines()[0]["logger"] == "n"
    assert lines()[0]["timestamp"] != "1970"


def test_an_exception_shows_its_causes_and_frames_but_no_local_variables(lines: Lines) -> None:
    def inner() -> None:
        local_variable = "do not show me"
        raise KeyError(len(local_variable))

    try:
        try:
            inner()
        except KeyError as error:
            raise RuntimeError("outer") from error
    except RuntimeError:
        structlog.get_logger("n").exception("failed")
    outer, cause = lines()[0]["exception"]
    assert (outer["type"], outer["message"]) == ("builtins.RuntimeError", "outer")
    assert cause["type"] == "builtins.KeyError"
    assert cause["frames"][-1].endswith(":inner")
    assert "do not show me" not in json.dumps(lines())


def test_exception_groups_and_endless_chains_are_shown_in_part(lines: Lines) -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__context__, second.__context__ = second, first
    structlog.get_logger("n").error(
        "x", exc_info=ExceptionGroup("many", [first, *map(ValueError, range(50))])
    )
    assert [one["message"] for one in lines()[0]["exception"]][:2] == ["many (51 sub-exceptions)", "first"]
    assert len(lines()[0]["exception"]) == 5


def test_the_values_of_a_failed_statement_are_not_logged(lines: Lines) -> None:
    error = RuntimeError("broken\n[SQL: INSERT INTO t VALUES (?)]\n[parameters: ('a person''s data',)]")
    structlog.get_logger("n").error("x", exc_info=error, field=error)
    assert "person" not in json.dumps(lines())


def test_an_unknown_object_is_shown_as_its_type(stderr: io.StringIO, lines: Lines) -> None:
    configure(stderr)

    class Body:
        def __repr__(self) -> str:
            raise AssertionError("asked for its repr")

    identifier = uuid.uuid4()
    structlog.get_logger("n").info(
        "x", thing=Body(), id=identifier, big=10**5_000, nan=float("nan"), none=None
    )
    line = lines()[0]
    assert line["thing"].endswith("Body>")
    assert line["id"] == str(identifier)
    assert "bits" in line["big"]
    assert (line["nan"], line["none"]) == ("nan", None)


def test_deep_wide_and_endless_values_are_cut(lines: Lines) -> None:
    endless: list[Any] = []
    endless.append(endless)
    structlog.get_logger("n").info(
        "x", endless=endless, wide=list(range(10**6)), fat={"a": ["y" * 1_900] * 40}
    )
    assert lines()[0]["endless"] == [[[["..."]]]]
    assert len(lines()[0]["wide"]) == 50
    assert len(lines()[0]["fat"]) == 2_000


def test_a_record_that_cannot_be_rendered_is_one_line_too(stderr: io.StringIO, lines: Lines) -> None:
    configure(stderr)
    logging.getLogger("library").warning("%d items", "many")
    logging.getLogger("library").warning("goes on")
    assert [line["event"] for line in lines()] == ["a log record could not be rendered", "goes on"]
    assert lines()[0]["error"] == "TypeError"


def test_warnings_of_the_language_are_records(stderr: io.StringIO, lines: Lines) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=False)
        configure(stderr)
        warnings.warn("old\nthing", UserWarning, stacklevel=1)
    assert [line["logger"] for line in lines()] == ["py.warnings"]


def test_configuring_twice_does_not_write_twice(stderr: io.StringIO, lines: Lines) -> None:
    configure(stderr, "INFO")
    configure(stderr, "WARNING")
    structlog.get_logger("n").info("too quiet")
    logging.getLogger("n").info("too quiet")
    structlog.get_logger("n").warning("once")
    assert [line["event"] for line in lines()] == ["once"]


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="log level must be one of DEBUG, INFO"):
        configure_logging(level="LOUD")  # type: ignore[arg-type]


def test_the_alert_library_does_not_log_its_channels(lines: Lines) -> None:
    logging.getLogger("apprise").debug("tgram url 123")
    logging.getLogger("apprise.plugins").info("tgram url 123")
    assert lines() == []


def test_redaction_of_hostile_text_takes_linear_time() -> None:
    """Twenty thousand characters of each trap cost well under a second; a quadratic pattern takes many."""
    traps = ["1 " * 10_000, "a" * 20_000, "t=1" + " " * 20_000, "://" * 6_000, ":" * 20_000, "v1," * 6_000,
             "_secret_" * 2_500, "Basic " + "a" * 20_000, "sk_" * 6_000, "authorization" * 1_500, "cookie:'" * 2_500,
             "4242 " * 4_000, "42424242-" * 2_200, "bearer " * 2_800, "client_secret " * 1_400]  # fmt: skip
    for trap in traps:
        began = time.perf_counter()
        redact(trap)
        assert time.perf_counter() - began < 1, trap[:20]


def test_cleaned_text_has_no_control_or_direction_characters_and_is_short() -> None:
    text = clean("a\x1b[31m\u202eb\u200b\x00\ud800\r\nc sk_live_abcdef " + "z" * 5_000, characters_max=100)
    assert text.startswith("a[31mb\nc sk_live_[redacted] zzz")
    assert len(text) == 100
    assert text.endswith("...")


def test_a_real_process_writes_only_json_lines_to_stderr() -> None:
    program = (
        "import logging, structlog\n"
        "from backend.app.observability.logs import configure_logging\n"
        "configure_logging(level='INFO')\n"
        "structlog.get_logger('a').info('one\\ntwo', key='whsec_abcdef')\n"
        "logging.getLogger('uvicorn.error').warning('three')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == ""
    assert [json.loads(line)["event"] for line in done.stderr.splitlines()] == ["one\ntwo", "three"]
    assert "abcdef" not in done.stderr
