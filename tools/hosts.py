"""Tells whether a file of the repository names a package registry's host: `python -m tools.hosts`.

Where packages come from is the business of the machine that installs them; a host in a lock file or a
script breaks every installation behind a mirror.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]
# With the dot escaped no pattern matches its own text.
_HOST = re.compile(
    rb"(?i)(?:pypi|pythonhosted|npmjs|yarnpkg|anaconda|jsdelivr|unpkg)\.(?:org|com|io|net)\b"
    rb"|(?:docker|ghcr|quay)\.io\b|^\s*--(?:extra-)?(?:index-url|find-links)\b",
    re.MULTILINE,
)


def named_hosts(content: bytes) -> list[str]:
    """The registry hosts and index options in a file's content."""
    return [match[0].decode().strip() for match in _HOST.finditer(content)]


def repository_files(root: Path) -> list[Path]:
    """The files that are committed or would be."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],  # noqa: S607  # git of the PATH
        cwd=root,
        check=True,
        capture_output=True,
    ).stdout.decode()
    return [path for name in listed.split("\0") if name and (path := root / name).is_file()]


@click.command()
def main() -> None:
    """Look through the repository; exit 1 when a registry's host is named."""
    found = [
        (path.relative_to(ROOT), host)
        for path in repository_files(ROOT)
        for host in named_hosts(path.read_bytes())
    ]
    for path, host in found:
        click.echo(f"{path} names {host}", err=True)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
