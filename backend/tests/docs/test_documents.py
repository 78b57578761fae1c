"""The documents say what is: their generated parts, links, commands and paths."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from packaging.requirements import Requirement

from backend.app import cli
from backend.app.observability.metrics import MetricsCollector
from backend.tests.docs.repository import ROOT, documents
from tools import docs as generated
from tools import hosts, lock


def run_docs(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tools.docs", "--root", str(root), *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.fixture
def copied_documents(tmp_path: Path) -> Path:
    """The documents alone, to be spoilt."""
    for path in documents():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    return tmp_path


def test_the_generated_parts_are_what_the_code_says() -> None:
    stale = [
        path.name
        for path in documents()
        if generated.rendered(path.read_text("utf-8")) != path.read_text("utf-8")
    ]
    assert stale == [], "run `make fmt`"
    assert generated.missing_parts(path.read_text("utf-8") for path in documents()) == set()


def test_a_stale_document_fails_the_check_and_is_mended(copied_documents: Path) -> None:
    settings = copied_documents / "docs" / "settings.md"
    right = generated.rendered(settings.read_text("utf-8"))
    settings.write_text(
        right.replace("`WEBHOOK_TOLERANCE_SECONDS` | `300`", "`WEBHOOK_TOLERANCE_SECONDS` | `301`")
    )
    assert settings.read_text("utf-8") != right

    check = run_docs(copied_documents, "--check")
    assert (check.returncode, "docs/settings.md is not in step" in check.stderr) == (1, True)
    assert settings.read_text("utf-8") != right

    assert run_docs(copied_documents).returncode == 0
    assert settings.read_text("utf-8") == right
    assert run_docs(copied_documents, "--check").returncode == 0


def test_a_part_that_no_document_shows_any_more_fails_the_check(copied_documents: Path) -> None:
    (copied_documents / "docs" / "metrics.md").write_text("# Metrics\n")
    check = run_docs(copied_documents, "--check")
    assert (check.returncode, "metrics" in check.stderr) == (1, True)


def test_a_part_that_nobody_makes_is_an_error() -> None:
    with pytest.raises(ValueError, match="weather"):
        generated.rendered("<!-- generated: weather -->\nsun\n<!-- end of weather -->")


def test_every_link_of_a_document_leads_somewhere() -> None:
    broken = [
        f"{path.name}: {target}"
        for path in documents()
        for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8"))
        if not target.startswith("https://") and not _leads_somewhere(path, target)
    ]
    assert broken == []


def _leads_somewhere(path: Path, target: str) -> bool:
    file, _, anchor = target.partition("#")
    found = (path.parent / file) if file else path
    if not found.exists():
        return False
    headings = re.findall(r"^#+ (.+)$", found.read_text("utf-8"), re.MULTILINE) if anchor else []
    return not anchor or anchor in [
        heading.lower().replace(" ", "-").replace(":", "") for heading in headings
    ]


def test_every_path_of_the_repository_that_a_document_names_exists() -> None:
    missing = [
        f"{path.name}: {name}"
        for path in documents()
        for name in re.findall(r"`((?:backend|docs|tools|bench)/[\w./-]+)`", path.read_text("utf-8"))
        if not (ROOT / name).exists()
    ]
    assert missing == []


def test_every_make_verb_that_a_document_names_exists() -> None:
    verbs = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = {
        (path.name, verb)
        for path in documents()
        for verb in re.findall(r"(?:`|^|\n)make ([a-z-]+)", path.read_text("utf-8"))
    }
    assert {verb for _, verb in named} >= {"install", "demo", "test", "check"}
    assert {(name, verb) for name, verb in named if verb not in verbs} == set()


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of every `tollkeeper ...` that a reader could type."""
    for line in re.findall(r"(?:`|\.venv/bin/|\| )tollkeeper ([^`\n)]+)", text):
        yield shlex.split(line.split(" | ")[0])


def test_every_command_and_option_that_a_document_shows_exists() -> None:
    unknown: list[str] = []
    seen = 0
    for path in documents():
        for words in commands(path.read_text("utf-8")):
            seen += 1
            command: click.Command = cli.main
            while words and isinstance(command, click.Group):
                command = command.commands.get(words.pop(0), click.Command("unknown"))
            options = {option for parameter in command.params for option in parameter.opts}
            if command.name == "unknown" or not {word for word in words if word.startswith("--")} <= options:
                unknown.append(f"{path.name}: {command.name} {words}")
    assert unknown == []
    assert seen > 5


def test_every_metric_that_a_document_names_exists() -> None:
    known = set(vars(MetricsCollector()))
    named = {
        name
        for path in documents()
        for name in re.findall(
            r"`((?:billing|alerts|audit|entitlement|idempotent|idempotency|outbox|redis)_\w+_(?:total|seconds|parked|users))\b",
            path.read_text("utf-8"),
        )
    }
    assert "billing_webhook_replay_block_total" in named
    assert named - known == set()


def test_every_direct_dependency_is_explained_and_no_other_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    sections = (ROOT / "docs" / "dependencies.md").read_text("utf-8").split("\n## ")
    for heading, requirements in (
        ("Runtime", project["dependencies"]),
        ("Development and tests", project["optional-dependencies"]["dev"]),
    ):
        section = next(section for section in sections if section.startswith(f"{heading}\n"))
        explained = re.findall(r"^\| ([a-z][\w-]*) \| [\w. -]+ \| .+ \|$", section, re.MULTILINE)
        assert explained == sorted(Requirement(text).name for text in requirements)


def test_the_lock_file_is_in_step() -> None:
    assert lock.problems(*_project_files()) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("fastapi==", "slowapi=="), "fastapi"),
        (("\nredis==", "\nredis==1.0 \\\n    --hash=sha256:00\nother=="), "does not satisfy"),
        (("aiosqlite==0.22.1 \\\n", "aiosqlite==0.22.1\n"), "has no hash"),
        (("\nclick==", "\nclick>="), "not a pinned package"),
    ],
)
def test_a_lock_file_out_of_step_is_found(change: tuple[str, str], says: str) -> None:
    pyproject, locked = _project_files()
    spoilt = locked.replace(*change)
    assert spoilt != locked
    assert any(says in problem for problem in lock.problems(pyproject, spoilt))


def _project_files() -> tuple[str, str]:
    return (ROOT / "pyproject.toml").read_text("utf-8"), (ROOT / "requirements.lock").read_text("utf-8")


@pytest.mark.parametrize(
    "line",
    ["https://files.{0}ythonhosted.org/x", "https://{0}ypi.org/simple", "--index-url https://mirror.test"],
)
def test_a_registry_host_in_a_file_is_found(line: str) -> None:
    # Put together here, so that this file does not name one.
    assert hosts.named_hosts(f"first line\n{line.format('p')}\n".encode()) != []


def test_ordinary_text_is_no_registry_host() -> None:
    assert hosts.named_hosts(b"uv pip compile --no-emit-index-url; docs.stripe.com; org.pypi; \xff") == []


def test_every_generated_part_has_rows() -> None:
    for name, part in generated.PARTS.items():
        assert part().count("\n| `") + part().count("\n| 4") > 3, name
