"""Throw-away directories that the server's account can reach, and that are swept up after a killed run."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PREFIX = "tollkeeper-servers-"
MEMORY = Path("/dev/shm")
# An empty cluster takes 60 MB, a database 8 MB, its write-ahead log at most a few hundred; containers
# often have only 64 MB there.
MEMORY_FREE_BYTES_MIN = 1 << 30
# A directory is locked right after it is made; a minute is far more than lies between the two.
SWEEP_AGE_SECONDS_MIN = 60


def server_account() -> pwd.struct_passwd | None:
    """Who runs PostgreSQL: `nobody` when we are root, which it refuses; None when we stay who we are."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("nobody")
    except KeyError:
        raise RuntimeError("PostgreSQL refuses to run as root, and there is no user `nobody`") from None


def is_reachable(path: Path) -> bool:
    """Whether any user may enter every directory above `path`, and `path` itself."""
    path = path.resolve()
    return all(part.stat().st_mode & stat.S_IXOTH for part in (path, *path.parents))


@contextlib.contextmanager
def work_directory(*, on_disk: bool = False) -> Iterator[Path]:
    """A fresh directory for servers, removed at the end; after a kill, by the next run.

    In memory where there is room (`CREATE DATABASE` takes 6 ms there instead of 90); `on_disk` where
    fsync has to mean something. Raises RuntimeError when the server's account can reach no such place.
    """
    disk = _disk_base()
    for base in {disk, MEMORY}:
        _sweep(base)
    directory = Path(
        tempfile.mkdtemp(prefix=PREFIX, dir=disk if on_disk or not _memory_has_room() else MEMORY)
    )
    # The lock, not a process id, says that the owner lives: the kernel lets go of it whatever happens.
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if server_account() is not None:
            directory.chmod(0o711)
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(descriptor)


def _memory_has_room() -> bool:
    return os.access(MEMORY, os.W_OK | os.X_OK) and shutil.disk_usage(MEMORY).free >= MEMORY_FREE_BYTES_MIN


def _disk_base() -> Path:
    candidates = [
        Path(tempfile.gettempdir()),
        Path("/tmp"),
        Path("/var/tmp"),
    ]  # a private TMPDIR may be closed
    for candidate in candidates:
        if os.access(candidate, os.W_OK | os.X_OK) and (server_account() is None or is_reachable(candidate)):
            return candidate
    raise RuntimeError(f"no temporary directory that `nobody` can reach among {candidates}; set TMPDIR")


def _sweep(base: Path) -> None:
    """Removes our own directories in `base` whose owner no longer lives."""
    for left_over in base.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # somebody else's, gone meanwhile, or locked by a living owner
            status = left_over.lstat()
            if status.st_uid != os.geteuid() or time.time() - status.st_ctime < SWEEP_AGE_SECONDS_MIN:
                continue
            descriptor = os.open(left_over, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left_over, ignore_errors=True)
            finally:
                os.close(descriptor)
