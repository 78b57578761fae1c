"""The command line as operators and scripts use it: output, JSON, and exit codes 0, 1 and 2."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx2 as httpx
import pytest
from click.testing import CliRunner

from backend.app.billing.routes import WEBHOOK_PATH
from backend.app.billing.security import sign
from backend.app.cli import main
from backend.tests.support.server_process import free_port
from backend.tests.support.service import ServiceProcess

SECRET = "whsec_of_the_command_line_test_0123"
EVENT = {"id": "evt_1", "type": "charge.succeeded", "data": {"object": {"amount": 2999, "currency": "usd"}}}
COMMAND_SECONDS_MAX = 60


def tollkeeper(
    directory: Path, *arguments: str, text: str = "", **env: str
) -> subprocess.CompletedProcess[str]:
    """One command in a process of its own, with PATH and `env` as its whole environment."""
    return subprocess.run(
        [sys.executable, "-m", "backend.app.cli", *arguments],
        cwd=directory,
        env={"PATH": os.environ.get("PATH", os.defpath), **env},
        input=text,
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS_MAX,
        check=False,
    )


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """A service on its default database, tollkeeper.db in its directory."""
    directory = tmp_path_factory.mktemp("service")
    with ServiceProcess.start(directory, {"STRIPE_WEBHOOK_SECRET": SECRET}) as process:
        yield process


class TestKeys:
    def test_a_key_made_as_json_opens_the_api_of_the_running_service(self, service: ServiceProcess) -> None:
        directory = service.log_path.parent
        done = tollkeeper(directory, "keys", "create", "--name", "shop", "--scope", "read", "--json")
        assert (done.returncode, done.stderr) == (0, "")
        key = json.loads(done.stdout)["key"]
        response = httpx.get(
            f"{service.url}/api/v1/entitlements/usr_1",
            headers={"Authorization": f"Bearer {key}"},
            trust_env=False,
        )
        assert response.status_code == 200
        with closing(sqlite3.connect(directory / "tollkeeper.db")) as connection:
            [row] = connection.execute("SELECT * FROM api_keys WHERE name = 'shop'").fetchall()
        assert key not in str(row)

    def test_for_people_the_key_alone_is_on_stdout(self, tmp_path: Path) -> None:
        done = tollkeeper(tmp_path, "keys", "create", "--name", "me", "--scope", "admin")
        assert done.returncode == 0
        assert done.stdout.startswith("tk_")
        assert len(done.stdout.split()) == 1
        assert "only time" in done.stderr

    @pytest.mark.parametrize(
        "arguments",
        [
            ("keys", "create", "--name", "me", "--scope", "root"),
            ("keys", "create", "--name", "me"),
            ("keys", "create", "--name", "", "--scope", "read"),
            ("keys", "create", "--name", "line\nbreak", "--scope", "read"),
            ("keys", "revoke-everything"),
            ("nonsense",),
        ],
    )
    def test_wrong_use_is_exit_2(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        result = CliRunner().invoke(main, arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr
        assert isinstance(result.exception, SystemExit)


class TestMigrate:
    def test_it_may_be_run_again_and_the_service_starts_on_the_result(self, tmp_path: Path) -> None:
        for _ in range(2):
            done = tollkeeper(tmp_path, "migrate", "--json")
            assert (done.returncode, json.loads(done.stdout)) == (0, {"migrated": True})
        with ServiceProcess.start(tmp_path, {"STRIPE_WEBHOOK_SECRET": SECRET}) as process:
            assert httpx.get(f"{process.url}/readyz", trust_env=False).status_code == 200

    def test_serve_on_postgresql_asks_for_it_and_then_starts(self, tmp_path: Path, postgres_url: str) -> None:
        env = {"DATABASE_URL": postgres_url, "STRIPE_WEBHOOK_SECRET": SECRET}
        refused = tollkeeper(tmp_path, "serve", "--port", "0", **env)
        assert refused.returncode == 2
        assert "tollkeeper migrate" in refused.stderr
        assert tollkeeper(tmp_path, "migrate", **env).returncode == 0
        with ServiceProcess.start(tmp_path, env) as process:
            assert httpx.get(f"{process.url}/readyz", trust_env=False).status_code == 200

    def test_a_database_that_is_down_is_exit_1_without_its_password(self, tmp_path: Path) -> None:
        url = f"postgresql://user:canarypassword@127.0.0.1:{free_port()}/shop"
        done = tollkeeper(tmp_path, "migrate", DATABASE_URL=url)
        assert done.returncode == 1
        assert "database can't be reached" in done.stderr
        assert "canarypassword" not in done.stderr
        assert "Traceback" not in done.stderr


class TestSend:
    def send(self, service: ServiceProcess, *arguments: str, text: str) -> subprocess.CompletedProcess[str]:
        return tollkeeper(
            service.log_path.parent,
            "send",
            *arguments,
            "--url",
            service.url + WEBHOOK_PATH,
            text=text,
            STRIPE_WEBHOOK_SECRET=f"current={SECRET},previous=whsec_of_the_last_year_0123456789",
        )

    def test_an_event_from_standard_input_is_signed_and_accepted_and_again_as_a_duplicate(
        self, service: ServiceProcess
    ) -> None:
        first = self.send(service, "-", "--json", text=json.dumps(EVENT))
        assert first.returncode == 0
        answer = json.loads(first.stdout)
        assert answer["status"] == 200
        assert json.loads(answer["body"])["status"] == "success"
        again = json.loads(self.send(service, "-", "--json", text=json.dumps(EVENT)).stdout)
        assert again["body"] == answer["body"]
        assert {name.lower(): value for name, value in again["headers"].items()}[
            "idempotent-replayed"
        ] == "true"

    def test_an_event_from_a_file_is_shown_as_one_line(self, service: ServiceProcess, tmp_path: Path) -> None:
        path = tmp_path / "event.json"
        path.write_text(json.dumps({**EVENT, "id": "evt_file"}))
        done = self.send(service, str(path), text="")
        assert done.returncode == 0
        assert done.stdout.startswith('200 {"status":"success"')

    def test_a_refused_event_is_exit_1_with_the_answer(self, service: ServiceProcess) -> None:
        done = self.send(service, "-", "--secret", "whsec_of_somebody_else_entirely", text=json.dumps(EVENT))
        assert done.returncode == 1
        assert done.stdout.startswith("403 ")

    def test_nobody_there_is_exit_1(self, tmp_path: Path) -> None:
        done = tollkeeper(
            tmp_path,
            "send",
            "-",
            "--url",
            f"http://127.0.0.1:{free_port()}/",
            text="{}",
            STRIPE_WEBHOOK_SECRET=SECRET,
        )
        assert done.returncode == 1
        assert "can't reach" in done.stderr
        assert "Traceback" not in done.stderr

    @pytest.mark.parametrize(
        "arguments", [("/nonexistent.json",), ("-", "--url", "file:///etc/passwd"), ("-",)]
    )
    def test_wrong_use_is_exit_2(self, arguments: tuple[str, ...]) -> None:
        """A missing file, another scheme, and no secret at all."""
        env = {} if arguments == ("-",) else {"STRIPE_WEBHOOK_SECRET": SECRET}
        result = CliRunner(env=env).invoke(main, ["send", *arguments], input="{}")
        assert (result.exit_code, result.stdout) == (2, "")
        assert isinstance(result.exception, SystemExit)


class TestServe:
    def test_several_workers_count_together(self, tmp_path: Path) -> None:
        with ServiceProcess.start(tmp_path, {"STRIPE_WEBHOOK_SECRET": SECRET}, workers=2) as process:
            body = json.dumps(EVENT).encode()
            headers = {"Stripe-Signature": sign(body, SECRET.encode(), timestamp=int(time.time()))}
            for _ in range(6):
                response = httpx.post(
                    process.url + WEBHOOK_PATH, content=body, headers=headers, trust_env=False
                )
                assert response.status_code == 200
            deadline = time.monotonic() + COMMAND_SECONDS_MAX
            expected = "billing_webhook_replay_block_total 5.0\n"
            while expected not in httpx.get(f"{process.url}/metrics", trust_env=False).text:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert process.stop() in (0, -15)

    def test_its_log_is_json_lines_only(self, service: ServiceProcess) -> None:
        lines = service.log_text().splitlines()
        assert lines
        assert all(json.loads(line)["event"] for line in lines)
