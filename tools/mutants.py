"""Breaks the product on purpose, one way at a time, and checks that the tests notice: `make mutants`.

    python -m tools.mutants             # all of them
    python -m tools.mutants livemode    # those with this word in their name

A suite that stays green while the product is broken proves nothing. Each mutant is a small plausible
mistake; it is made in a copy of the tree, and the tests named with it must fail there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
# The slowest of the named tests take a minute on a busy machine; a mutant that hangs is caught as well.
TESTS_SECONDS_MAX = 300
BILLING = "backend/app/billing"
DOMAIN_TESTS = ("backend/tests/domain", "backend/tests/providers")
FLOW_TESTS = ("backend/tests/billing/test_flows.py", "backend/tests/billing/test_parking.py")
BATCH_TESTS = "backend/tests/faults/test_batches.py"
REVIEW_TESTS = ("backend/tests/test_pr_040_security.py",)
RETENTION_TESTS = ("backend/tests/billing/test_retention.py",)
HISTORY_TESTS = ("backend/tests/billing/test_long_histories.py",)
ANSWER_TESTS = ("backend/tests/billing/test_answers.py",)


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """A mistake: in `path` the text `before`, which must stand there once, becomes `after`."""

    name: str
    path: str
    before: str
    after: str
    tests: tuple[str, ...]


MUTANTS = (
    Mutant(
        name="a link that comes after a payment's dispute does not take it along",
        path=f"{BILLING}/domain/decide.py",
        before="    inherited = state.inherited(facts, new_links)",
        after="    inherited = state.inherited(facts, [])",
        tests=DOMAIN_TESTS,
    ),
    Mutant(
        name="what waits is not known to what it bears on",
        path=f"{BILLING}/apply.py",
        before="                names = states[number].above(_waits(each.event, decision))",
        after="                names = _waits(each.event, decision)",
        tests=FLOW_TESTS,
    ),
    Mutant(
        name="the waiting of a payment does not follow a later link",
        path=f"{BILLING}/apply.py",
        before="                linked = states[number].above({child for child, _ in decision.links} & waiting)",
        after="                linked: set[SubjectId] = set()",
        tests=HISTORY_TESTS,
    ),
    Mutant(
        name="snapshots are ordered by their event's time alone",
        path=f"{BILLING}/domain/timeline.py",
        before="        if len(same_second) == 1:",
        after="        if same_second:",
        tests=DOMAIN_TESTS,
    ),
    Mutant(
        name="a terminal state is overwritten by a later event",
        path=f"{BILLING}/domain/timeline.py",
        before='TERMINAL_STATUSES = frozenset({"canceled", "incomplete_expired"})',
        after="TERMINAL_STATUSES: frozenset[str] = frozenset()",
        tests=DOMAIN_TESTS,
    ),
    Mutant(
        name="one invoice is counted for each of its two events",
        path=f"{BILLING}/providers/stripe_invoices.py",
        before='        return f"in:{invoice_id}"\n',
        after='        return f"in:{invoice_id}:{document.path}:{id(document)}"\n',
        tests=(*DOMAIN_TESTS, *FLOW_TESTS),
    ),
    Mutant(
        name="the claim is made outside of the transaction",
        path=f"{BILLING}/apply.py",
        before="        claimed = await claim(\n            tx,",
        after=(
            "        async with tx.engine.begin() as other:\n"
            "            claimed = await claim(\n            other,"
        ),
        tests=("backend/tests/faults/test_injected_faults.py",),
    ),
    Mutant(
        name="a purchase without a customer is looked up under no customer",
        path=f"{BILLING}/providers/registry.py",
        before="    if customer_id is None or not users:",
        after='    customer_id = customer_id or ""\n    if not users:',
        tests=(*DOMAIN_TESTS, *FLOW_TESTS),
    ),
    Mutant(
        name="a failure is answered as if it had been a success",
        path=f"{BILLING}/webhooks.py",
        before="            await self._record_failure(genuine, error)\n            raise",
        after=(
            "            await self._record_failure(genuine, error)\n"
            '            return Answer(body=b\'{"status":"success"}\', outcome="success")'
        ),
        tests=("backend/tests/faults/test_injected_faults.py",),
    ),
    Mutant(
        name="events of two accounts with one id are taken for one",
        path=f"{BILLING}/domain/facts.py",
        before="        return self.account, self.livemode, self.id",
        after='        return "", self.livemode, self.id',
        tests=FLOW_TESTS,
    ),
    Mutant(
        name="an unpaid checkout is granted",
        path=f"{BILLING}/providers/stripe_checkout.py",
        before='        "no_payment_required",\n',
        after='        "no_payment_required",\n        "unpaid",\n',
        tests=DOMAIN_TESTS,
    ),
    Mutant(
        name="events of the other livemode are granted",
        path=f"{BILLING}/asserted.py",
        before="    if event.envelope.livemode != livemode:",
        after="    if False:",
        tests=FLOW_TESTS,
    ),
    Mutant(
        name="one source pushes the others aside",
        path=f"{BILLING}/domain/merge.py",
        before="    return [access for reading in readings for access in reading.accesses if access.is_live(at)]",
        after="    return [access for reading in readings for access in reading.accesses if access.is_live(at)][-1:]",
        tests=DOMAIN_TESTS,
    ),
    Mutant(
        name="a signature from the future is accepted",
        path=f"{BILLING}/security.py",
        before="        if timestamp > now_seconds + self._tolerance_seconds:",
        after="        if timestamp > now_seconds + 10**12:",
        tests=("backend/tests/billing/test_verifier.py",),
    ),
    Mutant(
        name="access outlives its end",
        path=f"{BILLING}/domain/access.py",
        before="        return self.starts_at <= at and (self.ends_at is None or at < self.ends_at)",
        after="        return self.starts_at <= at",
        tests=DOMAIN_TESTS,
    ),
    Mutant(
        name="a ledger line has no audit row",
        path=f"{BILLING}/apply.py",
        before='                    self._add_audit(_payment_audit("payment.event", line, self._actor(event), now))',
        after="                    pass",
        tests=REVIEW_TESTS,
    ),
    Mutant(
        name="the grace of a failed renewal starts anew with each attempt",
        path=f"{BILLING}/domain/subscriptions.py",
        before="        since = fact.as_of\n",
        after="        since = max(since, fact.as_of)\n",
        tests=DOMAIN_TESTS,
    ),
    Mutant(
        name="the body of what is parked is let go",
        path=f"{BILLING}/store_retention.py",
        before="_SETTLED = (Status.SUCCESS.value, Status.IGNORED.value)",
        after="_SETTLED = tuple(Status)",
        tests=RETENTION_TESTS,
    ),
    Mutant(
        name="what retention lets go is told nowhere",
        path=f"{BILLING}/retention.py",
        before="            await self._audit(tx, read, report, run_id)\n",
        after="            pass\n",
        tests=RETENTION_TESTS,
    ),
    Mutant(
        name="an event without its body is of the mode that is set",
        path=f"{BILLING}/asserted.py",
        before="    return asserted if asserted.event.livemode == livemode else",
        after="    return asserted if asserted else",
        tests=RETENTION_TESTS,
    ),
    Mutant(
        name="a replay is answered anew instead of with the stored bytes",
        path=f"{BILLING}/store.py",
        before="(row.account, row.livemode, row.event_id): row.answer for row",
        after='(row.account, row.livemode, row.event_id): row.answer + " " for row',
        tests=REVIEW_TESTS,
    ),
    Mutant(
        name="a bad event fails all that share its transaction",
        path=f"{BILLING}/committer.py",
        before="        if len(batch) == 1 or (is_outage and not is_contention):",
        after="        if batch:",
        tests=(BATCH_TESTS,),
    ),
    Mutant(
        name="events of one user that share a transaction do not know of each other",
        path=f"{BILLING}/domain/components.py",
        before="    for names in named:\n        groups.join(names)\n",
        after="",
        tests=(*DOMAIN_TESTS, BATCH_TESTS),
    ),
    Mutant(
        name="what waited is not looked for when its user becomes known",
        path=f"{BILLING}/apply.py",
        before="                if _concerns(decision, waiting):",
        after="                if False:",
        tests=FLOW_TESTS,
    ),
    Mutant(
        name="a held answer is given out after a change of its own process",
        path=f"{BILLING}/answers.py",
        before="            held.reading.transactions_ended == self._database.transactions_ended\n            and ",
        after="            ",
        tests=ANSWER_TESTS,
    ),
    Mutant(
        name="a held answer outlives the end of an access",
        path=f"{BILLING}/answers.py",
        before="min(HELD_SECONDS, (until - now).total_seconds()) if until else HELD_SECONDS",
        after="HELD_SECONDS",
        tests=ANSWER_TESTS,
    ),
)


def main() -> int:
    """0 when every mutant was caught, 1 otherwise; a mutant that no longer fits the code counts as not caught."""
    everything = sorted({test for mutant in MUTANTS for test in mutant.tests})
    with tempfile.TemporaryDirectory(prefix="tollkeeper-mutant-") as directory:
        if (code := _test(_copy(Path(directory)), everything)) != 0:
            # Tests that fail anyway would catch every mutant.
            click.echo(f"the tests fail in an unbroken copy (exit code {code})")
            return 1
    chosen = [mutant for mutant in MUTANTS if all(word in mutant.name for word in sys.argv[1:])]
    caught = 0
    with ThreadPoolExecutor(os.cpu_count()) as executor:
        for number, (mutant, verdict) in enumerate(zip(chosen, executor.map(_try, chosen), strict=True), 1):
            caught += verdict == "caught"
            click.echo(f"{number:>3}  {verdict:<12} {mutant.name}")
    click.echo(f"{caught} of {len(chosen)} broken variants were caught")
    return 0 if chosen and caught == len(chosen) else 1


def _try(mutant: Mutant) -> str:
    with tempfile.TemporaryDirectory(prefix="tollkeeper-mutant-") as directory:
        copy = _copy(Path(directory))
        target = copy / mutant.path
        text = target.read_text(encoding="utf-8")
        if text.count(mutant.before) != 1:
            return "does not fit"
        target.write_text(text.replace(mutant.before, mutant.after), encoding="utf-8")
        # 1: tests ran and failed. Anything else, such as an import error, is no proof of a test.
        return {0: "MISSED", 1: "caught", None: "caught"}.get(
            code := _test(copy, mutant.tests), f"broken ({code})"
        )


def _copy(directory: Path) -> Path:
    copy = directory / "copy"
    for folder in ("backend", "tools", "docs"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "Makefile", "requirements.lock"):
        shutil.copy(ROOT / file, copy / file)
    return copy


def _test(copy: Path, tests: Sequence[str]) -> int | None:
    """The exit code of the tests in a copy; None where they took too long."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not long", "-p", "no:cacheprovider", *tests]
    try:
        run = subprocess.run(  # noqa: S603  # our own tests
            command,
            cwd=copy,
            # The copy must be what is imported, not the installed tree.
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(copy), "HOME": str(copy.parent)},
            capture_output=True,
            timeout=TESTS_SECONDS_MAX,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    return run.returncode


if __name__ == "__main__":
    sys.exit(main())
