"""Child processes that never outlive the process that started them."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import pwd
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

LOOPBACK = "127.0.0.1"
# Below the ports that Linux (32768) and macOS (49152) hand to outgoing connections: a client that keeps
# dialling a stopped server's port from that range can end up connected to itself.
PORT_MIN = 15_000
PORT_MAX = 30_000
# Between choosing a port and listening on it somebody else may take it; three times running is no accident.
PORT_ATTEMPTS_MAX = 3
# A shutdown takes a tenth of a second; a busy machine may need a hundred times that.
STOP_SECONDS_MAX = 10
# A server needs 0.02 s to start, the service a second or more: the first questions come quickly, later ones
# seldom enough that a log which records each of them stays readable.
POLL_SECONDS = 0.01
POLL_GROWTH = 1.2
POLL_SECONDS_MAX = 0.25
# Room for the program's own words and a line for each question that was asked.
LOG_TAIL_CHARACTERS = 10_000
# `prctl(PR_SET_PDEATHSIG)`, number 1 in linux/prctl.h.
PR_SET_PDEATHSIG = 1

# PR_SET_PDEATHSIG fires when the *thread* that started the child ends, so all children are started by
# one thread that lives as long as the process. That makes starting safe from any thread.
_starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="process-starter")


class ServerFailed(RuntimeError):
    """A started program ended or stayed silent; the message carries the end of its log."""


class PortTaken(ServerFailed):
    """The program ended because somebody else listens on its port."""


class OwnedProcess:
    """A program in a process group of its own that ends with this process, even when that is killed.

    On Linux the kernel sends `death_signal` when we die (prctl(2)); elsewhere only an orderly exit does.
    """

    def __init__(self, process: subprocess.Popen[bytes], log_path: Path, log_start_bytes: int) -> None:
        self._process = process
        self._log_path = log_path
        self._log_start_bytes = log_start_bytes

    @classmethod
    def start(
        cls,
        command: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str],
        directory: Path,
        log_path: Path,
        death_signal: signal.Signals,
        account: pwd.struct_passwd | None = None,
    ) -> OwnedProcess:
        """Starts `command` with exactly `env`, in `directory`; both output streams are added to `log_path`.

        With an `account` (only as root) it runs as that user, without our supplementary groups.
        """
        with log_path.open("ab") as log:
            log_start_bytes = log.tell()
            process = _starter.submit(
                subprocess.Popen[bytes],
                [os.fspath(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=directory,
                env=dict(env),
                start_new_session=True,
                user=None if account is None else account.pw_uid,
                group=None if account is None else account.pw_gid,
                extra_groups=None if account is None else [],
                preexec_fn=_death_wish(death_signal),
            ).result()
        atexit.register(process.send_signal, death_signal)
        return cls(process, log_path, log_start_bytes)

    @property
    def pid(self) -> int:
        """The process id, which is also the id of its group."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended yet; a stopped (SIGSTOP) process is running."""
        return self._process.poll() is None

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to the process alone; nothing happens once it has ended."""
        self._process.send_signal(number)

    def wait_until(self, ready: Callable[[], bool], *, seconds_max: float) -> None:
        """Returns once `ready()` holds.

        Ends the process and raises ServerFailed after `seconds_max`, and at once when it ends by itself
        (PortTaken where its log says so).
        """
        deadline = time.monotonic() + seconds_max
        pause_seconds = POLL_SECONDS
        while not ready():
            if not self.running:
                self.kill()
                raise self._failure(f"ended with exit code {self._process.returncode}")
            if time.monotonic() > deadline:
                self.kill()
                raise self._failure(f"was not ready after {seconds_max:g} s")
            time.sleep(pause_seconds)
            pause_seconds = min(pause_seconds * POLL_GROWTH, POLL_SECONDS_MAX)

    def end(self, how: signal.Signals) -> int:
        """Asks it to end with the signal `how`; returns the exit code, negative for a signal's number.

        Raises ServerFailed, after killing the group, when it has not ended within STOP_SECONDS_MAX.
        """
        self._process.send_signal(how)
        try:
            self._process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired as error:
            self.kill()
            raise self._failure(f"did not end {STOP_SECONDS_MAX} s after {how.name}") from error
        self._forget()
        return self._process.returncode

    def kill(self) -> int:
        """Kills the whole process group; returns the exit code."""
        # The group's id can't be reused while a member lives, and without one there is nobody to kill.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        code = self._process.wait()
        self._forget()
        return code

    def log_text(self) -> str:
        """What the program has printed since this start."""
        with self._log_path.open("rb") as log:
            log.seek(self._log_start_bytes)
            return log.read().decode("utf-8", "replace")

    def _failure(self, what: str) -> ServerFailed:
        text = self.log_text()
        kind = PortTaken if "address already in use" in text.lower() else ServerFailed
        program = os.fspath(self._process.args[0])  # type: ignore[index,arg-type]  # always our list of strings
        return kind(f"{program} {what}; the end of {self._log_path}:\n{text[-LOG_TAIL_CHARACTERS:]}")

    def _forget(self) -> None:
        atexit.unregister(self._process.send_signal)


def _death_wish(death_signal: signal.Signals) -> Callable[[], None] | None:
    """What the child does before it becomes the program: asks the kernel to end it together with us."""
    if sys.platform != "linux":
        return None
    # Loaded here because the child, forked from a process with threads, should do as little as possible.
    libc = ctypes.CDLL(None)
    parent_pid = os.getpid()

    def ask() -> None:
        libc.prctl(PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
        if os.getppid() != parent_pid:  # we died before the child could ask
            os._exit(1)

    return ask


def free_port() -> int:
    """A loopback TCP port that nobody listens on at this moment."""
    while True:
        port = PORT_MIN + secrets.randbelow(PORT_MAX - PORT_MIN)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((LOOPBACK, port))
            return port


def start_on_port(start: Callable[[int], T], port: int | None) -> T:
    """`start(port)`; without a port, with a free one, and with another one when that was taken meanwhile."""
    if port is not None:
        return start(port)
    for _ in range(PORT_ATTEMPTS_MAX - 1):
        with contextlib.suppress(PortTaken):
            return start(free_port())
    return start(free_port())
