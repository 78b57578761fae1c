"""The real server on a real socket: what never reaches the application, and what a flood costs."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest

from backend.app.billing.routes import WEBHOOK_PATH
from backend.app.billing.security import sign
from backend.tests.support.server_process import LOOPBACK
from backend.tests.support.service import ServiceProcess

SECRET = "whsec_of_the_first_generation_0123"
NEXT_SECRET = "whsec_of_the_second_generation_4567"
REPLY_SECONDS_MAX = 10
MEBIBYTE = 1024 * 1024
# A refused body leaves nothing behind; what may grow is the allocator's own slack.
MEMORY_GROWTH_BYTES_MAX = 20 * MEBIBYTE
# The file is looked at once a second; the rest is for a busy machine.
ROTATION_SECONDS_MAX = 10


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """One service for the whole file; no test here changes its state."""
    directory = tmp_path_factory.mktemp("service")
    with ServiceProcess.start(directory, {"STRIPE_WEBHOOK_SECRET": SECRET}) as process:
        yield process


def exchange(port: int, request: bytes) -> bytes:
    """All bytes that come back on one connection until the server closes it or stays silent for half a second."""
    answer = b""
    with socket.create_connection((LOOPBACK, port), timeout=REPLY_SECONDS_MAX) as connection:
        connection.sendall(request)
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            while piece := connection.recv(65_536):
                answer += piece
                connection.settimeout(0.5)
    return answer


def deliver(url: str, event_id: str, secret: str) -> httpx.Response:
    body = json.dumps(
        {"id": event_id, "type": "charge.succeeded", "data": {"object": {"amount": 1}}}
    ).encode()
    header = sign(body, secret.encode(), timestamp=int(time.time()))
    with httpx.Client(trust_env=False) as client:
        return client.post(url + WEBHOOK_PATH, content=body, headers={"Stripe-Signature": header})


@pytest.mark.parametrize(
    "framing",
    [
        "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        "Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        "Content-Length: 5, 6\r\n\r\nabcdef",
        "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        "Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        "Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        "Content-Length: +5\r\n\r\nabcde",
        "Content-Length: -1\r\n\r\n",
        "Content-Length: 99999999999999999999999999\r\n\r\nabcde",
        "X-Folded: a\r\n b\r\nContent-Length: 0\r\n\r\n",
        "Transfer-Encoding: chunked\r\n\r\nzz\r\nabcde\r\n0\r\n\r\n",
    ],
)
def test_a_request_that_two_servers_could_read_differently_is_400_and_the_connection_ends(
    server: ServiceProcess, framing: str
) -> None:
    """Otherwise a second request could be smuggled past a proxy in front."""
    smuggled = "GET /metrics HTTP/1.1\r\nHost: smuggled\r\n\r\n"
    answer = exchange(server.port, f"POST {WEBHOOK_PATH} HTTP/1.1\r\nHost: a\r\n{framing}{smuggled}".encode())
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert re.findall(rb"HTTP/1\.1 \d+", answer) == [b"HTTP/1.1 400"]
    assert b"connection: close" in answer.lower()


def test_what_is_declared_too_large_is_refused_before_it_is_sent(server: ServiceProcess) -> None:
    started = time.monotonic()
    answer = exchange(
        server.port, f"POST {WEBHOOK_PATH} HTTP/1.1\r\nHost: a\r\nContent-Length: 104857600\r\n\r\n".encode()
    )
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"application/problem+json" in answer
    assert b"connection: close" in answer.lower()
    assert time.monotonic() - started < REPLY_SECONDS_MAX


def test_a_flood_of_huge_bodies_does_not_make_the_service_larger(server: ServiceProcess) -> None:
    flood(server.port, attempts=5)
    before = resident_bytes(server.pid)
    flood(server.port, attempts=40)
    assert resident_bytes(server.pid) - before < MEMORY_GROWTH_BYTES_MAX


def flood(port: int, *, attempts: int) -> None:
    """Bodies of 8 MiB without a length, sent for as long as the server lets us."""
    chunk = b"10000\r\n" + b"x" * 65_536 + b"\r\n"
    for _ in range(attempts):
        with socket.create_connection((LOOPBACK, port), timeout=REPLY_SECONDS_MAX) as connection:
            connection.sendall(
                f"POST {WEBHOOK_PATH} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
            )
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for _ in range(128):
                    connection.sendall(chunk)


def resident_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise LookupError("VmRSS")


def test_secrets_are_rotated_through_the_file_without_a_restart_or_a_lost_delivery(tmp_path: Path) -> None:
    secret_file = tmp_path / "webhook-secret"
    secret_file.write_text(f"old={SECRET}\n")
    with ServiceProcess.start(tmp_path, {"STRIPE_WEBHOOK_SECRET_FILE": str(secret_file)}) as service:
        assert deliver(service.url, "evt_1", SECRET).status_code == 200
        assert deliver(service.url, "evt_2", NEXT_SECRET).status_code == 403

        # Both live: Stripe keeps signing with the old one for up to 24 hours.
        secret_file.write_text(f"new={NEXT_SECRET},old={SECRET}\n")
        until_status(service.url, NEXT_SECRET, 200, meanwhile=SECRET)
        assert deliver(service.url, "evt_3", SECRET).status_code == 200

        # A half-written file changes nothing.
        secret_file.write_text("")
        time.sleep(1.2)
        assert deliver(service.url, "evt_4", NEXT_SECRET).status_code == 200

        secret_file.write_text(f"new={NEXT_SECRET}\n")
        until_status(service.url, SECRET, 403, meanwhile=NEXT_SECRET)
        assert deliver(service.url, "evt_5", NEXT_SECRET).status_code == 200
        log_text = service.log_text()
    assert "webhook_secret_file_reloaded" in log_text
    assert "webhook_secret_file_refused" in log_text
    assert SECRET not in log_text
    assert NEXT_SECRET not in log_text


def until_status(url: str, secret: str, status: int, *, meanwhile: str) -> None:
    """Delivers until `secret` gets `status`; what is signed with `meanwhile` is never refused."""
    deadline = time.monotonic() + ROTATION_SECONDS_MAX
    count = 0
    while deliver(url, f"evt_until_{count}", secret).status_code != status:
        assert time.monotonic() < deadline, f"still not {status}"
        assert deliver(url, f"evt_meanwhile_{status}_{count}", meanwhile).status_code == 200
        count += 1
        time.sleep(0.1)
