"""The rules of docs/architecture.md that no linter knows, and that the import linter's rules bite."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from backend.tests.docs.repository import APP, ROOT

DOMAIN = "backend.app.billing.domain"


def imported_names(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def foreign_imports(root: Path, own: str) -> list[str]:
    """The imports below `root` that are neither the standard library's nor of the package `own`."""
    return [
        f"{path.name}: {name}"
        for path in sorted(root.rglob("*.py"))
        for name in imported_names(path)
        if name.partition(".")[0] not in sys.stdlib_module_names and not f"{name}.".startswith(f"{own}.")
    ]


def transaction_calls(root: Path) -> set[str]:
    """The modules below `root` that begin or commit a transaction."""
    return {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("commit", "begin", "begin_nested")
    }


def test_the_decision_needs_nothing_but_the_standard_library() -> None:
    assert (APP / "billing" / "domain" / "decide.py").is_file()
    assert foreign_imports(APP / "billing" / "domain", DOMAIN) == []


def test_an_import_in_a_function_or_for_types_only_is_found_too(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(
        "from typing import TYPE_CHECKING\n"
        "from backend.app.billing.domain.facts import Event\n"
        "if TYPE_CHECKING:\n    import sqlalchemy\n"
        "def f():\n    from backend.app.billing import store\n    from . import near\n"
    )
    assert foreign_imports(tmp_path, DOMAIN) == [
        "bad.py: sqlalchemy",
        "bad.py: backend.app.billing",
        "bad.py: .",
    ]


def test_only_the_database_module_begins_and_commits() -> None:
    assert transaction_calls(APP) == {"core/database.py"}


def test_importing_the_product_opens_nothing_reads_no_environment_and_builds_nothing(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-B", "-m", "backend.tests.docs.import_everything"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    *reports, last = [json.loads(line) for line in finished.stdout.splitlines()]
    assert reports == []
    assert "backend.app.billing.webhooks" in last["imported"]
    assert "backend.app.cli" in last["imported"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "code", "broken"),
    [
        ("core/clock.py", "def f():\n    import backend.app.billing.store\n", "A lower layer"),
        ("ops/health.py", "if TYPE_CHECKING:\n    from backend.app import main\n", "A lower layer"),
        ("audit/log.py", "from backend.app.ops import outbox\n", "A lower layer"),
        ("billing/domain/facts.py", "import pydantic\n", "The domain imports nothing"),
        ("billing/models.py", "def f():\n    from backend.app.billing import store\n", "Billing reads"),
        ("core/ids.py", "def f():\n    from backend.tests import support\n", "The product never"),
    ],
)
def test_an_import_against_the_direction_fails_the_check(
    tmp_path: Path, module: str, code: str, broken: str
) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "fixtures")
    shutil.copytree(ROOT / "backend", tmp_path / "backend", ignore=ignored)
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    path = tmp_path / "backend" / "app" / module
    path.write_text(path.read_text("utf-8") + "\nfrom typing import TYPE_CHECKING\n" + code)
    finished = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-logo", "--no-cache"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert finished.returncode == 1, finished.stdout + finished.stderr
    verdicts = [line for line in finished.stdout.splitlines() if line.endswith(" BROKEN")]
    assert any(line.startswith(broken) for line in verdicts), finished.stdout
