"""The service as a process of its own starts, reports, ends and never outlives its tests."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from backend.tests.support import server_process
from backend.tests.support import service as service_module
from backend.tests.support.server_process import LOOPBACK, ServerFailed, free_port
from backend.tests.support.service import ServiceProcess
from backend.tests.support.test_servers import REPOSITORY, children_of, is_alive, wait_gone

# Speaks HTTP like `serve`, has one worker process, and ends on SIGTERM with an exit code of its own.
STAND_IN = """
import http.server, json, os, signal, subprocess, sys
if os.environ.get("FAIL"):
    sys.exit("STRIPE_WEBHOOK_SECRET: serve refuses to start without one")
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"env": dict(os.environ), "argv": sys.argv[1:], "worker": worker.pid, "cwd": os.getcwd()})
        self.send_response(int(os.environ.get("STATUS", "200")))
        self.end_headers()
        self.wfile.write(body.encode())
def end(*_):
    # The kernel tells it twice when its owner's threads die one after the other; `wait` must not be entered twice.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    worker.kill()
    worker.wait()
    print("bye", flush=True)
    os._exit(3)
signal.signal(signal.SIGTERM, signal.SIG_IGN if os.environ.get("DEAF") else end)
port = int(sys.argv[sys.argv.index("--port") + 1])
print("listening", flush=True)
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
COMMAND = [sys.executable, "-c", STAND_IN]

OWNER_PROGRAM = """
import sys, time
from pathlib import Path
from backend.tests.support.service import ServiceProcess
service = ServiceProcess.start(Path(sys.argv[1]), {}, command=[sys.executable, "-c", sys.argv[2]])
print(service.pid, flush=True)
time.sleep(60)
"""


def ask(service: ServiceProcess) -> dict[str, Any]:
    connection = http.client.HTTPConnection(LOOPBACK, service.port, timeout=5)
    connection.request("GET", "/")
    answer: dict[str, Any] = json.loads(connection.getresponse().read())
    connection.close()
    return answer


def test_it_gets_path_and_the_given_settings_and_nothing_of_our_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://a-developers-own")
    with ServiceProcess.start(tmp_path, {"STRIPE_MODE": "test"}, workers=2, command=COMMAND) as service:
        answer = ask(service)
        # Python adds LC_CTYPE by itself where no locale is set (PEP 538).
        assert set(answer["env"]) - {"LC_CTYPE"} == {"PATH", "STRIPE_MODE"}
        assert answer["argv"] == ["--host", "127.0.0.1", "--port", str(service.port), "--workers", "2"]
        assert answer["cwd"] == str(tmp_path)
        assert service.url == f"http://127.0.0.1:{service.port}"
    assert not service.running


def test_stop_gives_the_exit_code_and_the_log_stays_readable(tmp_path: Path) -> None:
    service = ServiceProcess.start(tmp_path, {}, command=COMMAND)
    worker = ask(service)["worker"]
    assert service.stop() == 3
    assert service.stop() == 3, "stopping twice is harmless"
    assert "listening\n" in service.log_text()
    assert service.log_text().endswith("bye\n")
    wait_gone([service.pid, worker])


def test_kill_ends_the_workers_too(tmp_path: Path) -> None:
    service = ServiceProcess.start(tmp_path, {}, command=COMMAND)
    worker = ask(service)["worker"]
    assert is_alive(worker)
    assert service.kill() == -signal.SIGKILL
    wait_gone([service.pid, worker])


def test_a_refusal_to_start_is_raised_at_once_with_its_words(tmp_path: Path) -> None:
    with pytest.raises(ServerFailed, match=r"(?s)exit code 1.*STRIPE_WEBHOOK_SECRET: serve refuses to start"):
        ServiceProcess.start(tmp_path, {"FAIL": "1"}, command=COMMAND)


def test_a_service_that_never_becomes_live_is_ended_with_its_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "READY_SECONDS_MAX", 1)
    port = free_port()
    with pytest.raises(ServerFailed, match=r"(?s)not ready after 1 s.*listening"):
        ServiceProcess.start(tmp_path, {"STATUS": "503"}, port=port, command=COMMAND)
    with pytest.raises(ConnectionRefusedError):
        http.client.HTTPConnection(LOOPBACK, port, timeout=5).connect()


def test_a_service_deaf_to_sigterm_is_killed_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_process, "STOP_SECONDS_MAX", 0.5)
    service = ServiceProcess.start(tmp_path, {"DEAF": "1"}, command=COMMAND)
    worker = ask(service)["worker"]
    with pytest.raises(ServerFailed, match=r"did not end 0.5 s after SIGTERM"):
        service.stop()
    wait_gone([service.pid, worker])


def test_two_services_run_side_by_side(tmp_path: Path) -> None:
    with (
        ServiceProcess.start(tmp_path, {}, command=COMMAND) as first,
        ServiceProcess.start(tmp_path, {}, command=COMMAND) as second,
    ):
        assert first.port != second.port
        assert ask(first)["worker"] != ask(second)["worker"]


def test_it_is_gone_when_the_test_run_is_killed(tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER_PROGRAM, str(tmp_path), STAND_IN],
        cwd=REPOSITORY,
        env={"PATH": os.defpath},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    with owner.stdout:
        service_pid = int(owner.stdout.readline())
    family = [service_pid, *children_of(service_pid)]
    assert len(family) == 2
    assert all(is_alive(pid) for pid in family)
    owner.kill()
    owner.wait()
    wait_gone(family)
