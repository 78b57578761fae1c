"""The leak scan: no card number, secret or signature may stay in a database, a log or a metric of any test.

`PLANTS` are values that nothing but a leak can bring there; tests send them in on purpose. Beside them the
scan knows what a test really used (`must_stay_secret`) and the general form of cards, keys and signatures.
It shares no code with the product's own masking, which it judges. conftest.py runs it at every teardown.
"""

from __future__ import annotations

import asyncio
import re
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg  # type: ignore[import-untyped]  # the driver ships no types

# A local database answers within milliseconds, on busy cores within seconds.
CONNECT_SECONDS_MAX = 30
# The first bytes of every SQLite file (sqlite.org/fileformat.html).
SQLITE_MAGIC = b"SQLite format 3\0"
# What a test's report shows of a long list; the first few name the culprit.
FINDINGS_SHOWN_MAX = 20


@dataclass(frozen=True, slots=True)
class Plant:
    """A value that must never stay anywhere, as it stands in an event, a header or a setting."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Finding:
    """Where something stayed (`table.column`, a file, a test's output) and what it is."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class LeakFound(AssertionError):
    """Something secret stayed where it must not be; the message names the places, never the values."""

    def __init__(self, findings: list[Finding]) -> None:
        shown = "\n".join(f"  {finding}" for finding in findings[:FINDINGS_SHOWN_MAX])
        super().__init__(f"{len(findings)} leaked:\n{shown}")


def with_check_digit(digits: str) -> str:
    """The number with its last digit added (ISO/IEC 7812-1 annex B)."""
    return next(f"{digits}{last}" for last in range(10) if _passes_luhn(f"{digits}{last}"))


def _passes_luhn(digits: str) -> bool:
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) << (place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def _grouped(number: str, separator: str) -> str:
    return separator.join(number[start : start + 4] for start in range(0, len(number), 4))


# One number of each scheme and length; the digits are nobody's and occur in no other test.
_CARDS = {
    "visa of 16": with_check_digit("471628390517264"),
    "visa of 13": with_check_digit("471628390517"),
    "mastercard": with_check_digit("527381904628175"),
    "mastercard 2-series": with_check_digit("236591780426315"),
    "american express": with_check_digit("37291846205718"),
    "discover": with_check_digit("601172839405162"),
    "diners club": with_check_digit("3062718394052"),
    "jcb": with_check_digit("354918273640527"),
    "unionpay": with_check_digit("621739482605173"),
    "maestro of 19": with_check_digit("675918273640518273"),
}
# 32 characters, like Stripe's; each use has its own prefix, so each is found by itself.
_RANDOM = "Zq7RtYw3LmXv9KpB2NcHd5FgJs8TaUeQ"
_HEX = "c0ffee5eed1eaf0ddba11decade5ca1ab1e0b5e55ed0fade0b0ebacafe5ad1e5"
_SECRETS = {
    "live secret key": f"sk_live_51{_RANDOM}",
    "test secret key": f"sk_test_51{_RANDOM}",
    "live restricted key": f"rk_live_51{_RANDOM}",
    "test restricted key": f"rk_test_51{_RANDOM}",
    "endpoint secret": f"whsec_{_RANDOM}",
    "endpoint secret in base64": "whsec_k3J/9dLq+V0aXw2ZrT7uYb5NcHd8FgJs4MpQeRtUiOo=",
    "payment intent's client secret": f"pi_3PlantLeak_secret_{_RANDOM}",
    "setup intent's client secret": f"seti_1PlantLeak_secret_{_RANDOM}",
    "checkout's client secret": f"cs_test_PlantLeak_secret_{_RANDOM}",
    "charge's client secret": f"py_3PlantLeak_secret_{_RANDOM}",
}
_SIGNATURES = {
    "signature header": f"t=1790000001,v1={_HEX}",
    "signature header of a rotation": f"t=1790000002,v1={_HEX[::-1]},v1={_HEX[32:]}{_HEX[:32]}",
    "signature": _HEX[16:] + _HEX[:16],
}
CARD_PLANTS = tuple(
    Plant(f"{name}, {form}", text)
    for name, number in _CARDS.items()
    for form, text in (
        ("plain", number),
        ("with spaces", _grouped(number, " ")),
        ("with dashes", _grouped(number, "-")),
        # As JSON may write any character; a plain text search would not see it.
        ("with JSON escapes", f"\\u{ord(number[0]):04x}{number[1:-1]}\\u{ord(number[-1]):04x}"),
    )
)
SECRET_PLANTS = tuple(Plant(name, text) for name, text in _SECRETS.items())
SIGNATURE_PLANTS = tuple(Plant(name, text) for name, text in _SIGNATURES.items())
PLANTS = CARD_PLANTS + SECRET_PLANTS + SIGNATURE_PLANTS

_NEEDLES = tuple(
    # Escapes and separators are taken out of what is searched.
    (name, text.encode("ascii"))
    for name, text in (*_CARDS.items(), *_SECRETS.items(), *_SIGNATURES.items())
)
_JSON_ESCAPE = re.compile(rb"\\u00([2-7][0-9a-fA-F])")
_SHA256 = re.compile(rb"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")
_UUID = re.compile(rb"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_FORMS = (
    ("a Stripe key", re.compile(rb"(?<![A-Za-z0-9])[sr]k_(?:live|test)_[A-Za-z0-9]{8}")),
    ("an endpoint secret", re.compile(rb"whsec_[A-Za-z0-9+/=_-]{8}")),
    ("a client secret", re.compile(rb"_secret_[A-Za-z0-9]{16}")),
    ("an API key of ours", re.compile(rb"(?<![A-Za-z0-9])tk_[A-Za-z0-9_-]{43}")),
    ("a signature header", re.compile(rb"\bt=[0-9]{9,12},v[01]=[0-9a-f]{64}")),
)
# Numbers of the four large schemes; a longer list would meet people's numeric user ids.
_CARD = re.compile(
    rb"(?<![A-Za-z0-9_.])(?:4[0-9]{15}|5[1-5][0-9]{14}|3[47][0-9]{13}|6011[0-9]{12})(?![A-Za-z0-9_.])"
)

# What the running test used for real: whole secrets, and the hexadecimal signatures made with them.
_secrets_in_use: set[bytes] = set()
_signatures_in_use: set[bytes] = set()


def must_stay_secret(*, secret: str, signature_header: str) -> None:
    """Makes the scan look for this endpoint secret and this signature until the test ends."""
    _secrets_in_use.add(secret.encode())
    _signatures_in_use.update(re.findall(rb"[0-9a-f]{64}", signature_header.encode()))


def forget_what_was_in_use() -> None:
    """The test has ended."""
    _secrets_in_use.clear()
    _signatures_in_use.clear()


def leaks_in(data: str | bytes, *, forms: bool) -> list[str]:
    """The names of what leaked into `data`; with `forms` also whatever looks like a card, key or signature."""
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    text = _JSON_ESCAPE.sub(lambda found: bytes([int(found[1], 16)]), raw) if b"\\u00" in raw else raw
    joined = text.translate(None, b" -")
    found = [name for name, needle in _NEEDLES if needle in text or needle in joined]
    found += ["the endpoint secret of this test" for secret in _secrets_in_use if secret in text]
    if _signatures_in_use and not _signatures_in_use.isdisjoint(_SHA256.findall(text)):
        found.append("a signature of this test")
    if forms:
        found += [name for name, form in _FORMS if form.search(text)]
        if any(_passes_luhn(card.decode()) for card in _CARD.findall(_UUID.sub(b"", text))):
            found.append("a card number")
    return found


def scan_sqlite(path: Path) -> list[Finding]:
    """What stayed in an SQLite file: in any column of any table, and in the pages that are free by now."""
    findings: list[Finding] = []
    try:
        with closing(sqlite3.connect(path)) as connection:
            tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
            for (table,) in tables:
                rows = connection.execute(f'SELECT * FROM "{table}"')
                columns = [column[0] for column in rows.description]
                findings += _in_rows(table, (zip(columns, row, strict=True) for row in rows))
    except sqlite3.DatabaseError:
        # A test broke the file on purpose; its bytes can still be looked at.
        pass
    for part in (path, path.with_name(f"{path.name}-wal")):
        if part.exists():
            findings += [Finding(part.name, name) for name in leaks_in(part.read_bytes(), forms=False)]
    return findings


def scan_postgres(url: str) -> list[Finding]:
    """What stayed in any column of any table of a PostgreSQL database; nothing when it was dropped."""

    async def run() -> list[Finding]:
        findings: list[Finding] = []
        try:
            connection = await asyncpg.connect(
                url, timeout=CONNECT_SECONDS_MAX, command_timeout=CONNECT_SECONDS_MAX
            )
        except asyncpg.InvalidCatalogNameError:
            return findings
        try:
            tables = await connection.fetch(
                "SELECT quote_ident(schemaname) || '.' || quote_ident(tablename) AS name FROM pg_tables"
                " WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
            )
            for table in tables:
                rows = await connection.fetch(f"SELECT * FROM {table['name']}")
                name = table["name"].removeprefix("public.")
                findings += _in_rows(name, (row.items() for row in rows))
        finally:
            await connection.close()
        return findings

    # A thread, because the caller may already be inside an event loop.
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(lambda: asyncio.run(run())).result()


def scan_directory(directory: Path) -> list[Finding]:
    """What stayed in the databases and logs that a test's services left in its directory.

    Other files there are what the test put in: events, and secrets for NAME_FILE.
    """
    findings: list[Finding] = []
    for path in sorted(directory.rglob("*")):
        if not path.is_file():
            continue
        with path.open("rb") as file:
            is_sqlite = file.read(len(SQLITE_MAGIC)) == SQLITE_MAGIC
        if is_sqlite:
            findings += scan_sqlite(path)
        elif path.suffix == ".log":
            findings += scan_log(path)
    return findings


def scan_log(path: Path) -> list[Finding]:
    """What stayed in the log of a server process."""
    return [Finding(path.name, name) for name in leaks_in(path.read_bytes(), forms=True)]


def require_none(findings: list[Finding]) -> None:
    """Raises LeakFound unless there is nothing."""
    if findings:
        raise LeakFound(findings)


def _in_rows(table: str, rows: Iterator[Any]) -> list[Finding]:
    found: dict[Finding, None] = {}
    for row in rows:
        for column, value in row:
            data = value if isinstance(value, bytes) else str(value)
            for name in leaks_in(data, forms=True):
                found[Finding(f"{table}.{column}", name)] = None
    return list(found)
