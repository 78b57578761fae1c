"""The account as text for a terminal of 80 to 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

WIDTH_COLUMNS = 96

# The words of the stored reasons, for people.
_REASONS = {
    "unknown_user": "nobody knows whose it is",
    "unknown_price": "no plan has this price",
    "unknown_plan": "there is no such plan",
    "other_livemode": "a live event at a test deployment",
    "not_handled": "nothing here depends on this type",
}
# Durations and ages say little after a few seconds of work.
_METRICS_LEFT_OUT = ("billing_seconds_since_last_event",)


def render_account(account: Mapping[str, Any]) -> str:
    """The whole account; the marks of the checks carry colour codes, which `click.echo` drops off a terminal."""
    deliveries = account["deliveries"]
    users, duplicates, refused = len(account["access"]), deliveries["duplicates"], deliveries["refused"]
    lines = [
        f"{account['events']} events of {users} users and a guest, shuffled with the seed {account['seed']}:",
        f"{deliveries['total']} deliveries, of which {duplicates} were duplicates and {refused} had to be refused.",
    ]
    lines += _section("Who has what, until when and why", _access_lines(account["access"]))
    lines += _section(
        "Refused at the door", (f"{one['status']}  {one['what']}" for one in account["refused"])
    )
    lines += _section("Parked: kept until the missing piece is known", _event_lines(account["parked"]))
    lines += _section("Ignored: genuine, but nothing depends on it", _event_lines(account["ignored"]))
    lines += _section("Money in the ledger", _money_lines(account["money"]))
    lines += _section("Audit rows", (f"{action:<24}{count:>5}" for action, count in account["audit"].items()))
    lines += _section("Metrics that moved", _metric_lines(account["metrics"]))
    lines += _section("Checks", _check_lines(account["checks"]))
    held = sum(check["ok"] for check in account["checks"])
    lines += ["", f"{held} of {len(account['checks'])} checks hold, after {account['seconds']} s."]
    return "\n".join(lines)


def _section(title: str, lines: Iterator[str]) -> list[str]:
    return ["", title, "-" * len(title), *(f"  {line}" for line in lines)]


def _access_lines(users: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for user in users:
        end = user["valid_until"]
        until = f"until {end[:16].replace('T', ' ')}" if end else "without end"
        if user["plan_code"] == "free":
            until = "-"
        yield f"{user['user_id']:<6}{user['plan_code']:<9}{user['status']:<10}{until:<24}{user['story']}"
        sources = ", ".join(user["sources"])
        if user["event_id"]:
            yield f"{'':<6}by {sources}, last changed by {user['event_id']} {user['event_type']}"
        elif sources:
            yield f"{'':<6}by {sources}, which gives nothing"


def _event_lines(events: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for event in events:
        kind, _, name = event["reason"].partition(":")
        why = _REASONS.get(kind, kind) + (f": {name}" if name else "")
        yield f"{event['event_id']:<14}{event['event_type']:<32}{why}"


def _money_lines(users: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield f"{'user':<10}{'paid':>10}{'by card':>10}{'refunded':>10}{'lines':>7}   (USD)"
    for user in users:
        amounts = "".join(_dollars(user[column]) for column in ("received", "charged", "refunded"))
        yield f"{user['user_id'] or '(nobody)':<10}{amounts}{user['lines']:>7}"
    yield "'by card' is the card's side of what 'paid' counts already, where Stripe reported it."


def _dollars(cents: int) -> str:
    return f"{cents / 100:>10.2f}" if cents else f"{'-':>10}"


def _metric_lines(metrics: Mapping[str, float]) -> Iterator[str]:
    for name, value in metrics.items():
        if name not in _METRICS_LEFT_OUT:
            yield f"{value:>+6g}  {name}"


def _check_lines(checks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for check in checks:
        mark = (
            click.style("ok    ", fg="green") if check["ok"] else click.style("FAILED", fg="red", bold=True)
        )
        first, *rest = textwrap.wrap(f"{check['claim']} ({check['detail']})", WIDTH_COLUMNS - 10)
        yield f"{mark}  {first}"
        for line in rest:
            yield f"{'':<8}{line}"
