"""Tells whether requirements.lock is in step with pyproject.toml, without a network: `python -m tools.lock`."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
_PIN = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s;\\]+)(?P<rest>.*)$")


def problems(pyproject: str, lock: str) -> list[str]:
    """What is wrong with a lock file, in words; empty when it is in step.

    Every direct requirement (runtime, extras, build) is pinned, by every pin of its name satisfied, and
    every pin has a hash.
    """
    pins, found = _pins(lock)
    for text in _requirements(pyproject):
        requirement = Requirement(text)
        versions = pins.get(canonicalize_name(requirement.name), [])
        if not versions:
            found.append(f"{text} is not in the lock file")
        found += [
            f"{requirement.name}=={version} in the lock file does not satisfy {text}"
            for version in versions
            if not requirement.specifier.contains(version, prereleases=True)
        ]
    return found


def _requirements(pyproject: str) -> Iterator[str]:
    document = tomllib.loads(pyproject)
    yield from document["project"]["dependencies"]
    for extra in document["project"]["optional-dependencies"].values():
        yield from extra
    yield from document["build-system"]["requires"]


def _pins(lock: str) -> tuple[dict[str, list[str]], list[str]]:
    """The pinned versions by name, and what is wrong with single entries."""
    pins: dict[str, list[str]] = {}
    found: list[str] = []
    # An entry goes on over every line that ends in a backslash.
    for entry in lock.replace("\\\n", " ").splitlines():
        if not entry.strip() or entry.startswith("#"):
            continue
        match = _PIN.match(entry)
        if match is None:
            found.append(f"not a pinned package: {entry.split()[0]}")
            continue
        pins.setdefault(canonicalize_name(match["name"]), []).append(match["version"])
        if "--hash=sha256:" not in match["rest"]:
            found.append(f"{match['name']}=={match['version']} has no hash")
    return pins, found


@click.command()
def main() -> None:
    """Check the lock file against pyproject.toml; exit 1 when it is not in step."""
    found = problems(
        (ROOT / "pyproject.toml").read_text("utf-8"), (ROOT / "requirements.lock").read_text("utf-8")
    )
    for problem in found:
        click.echo(f"requirements.lock: {problem}; run `make lock`", err=True)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
