"""Settings come from the environment or from files; what can't be used is named at start, never shown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from backend.app.core.settings import Settings
from backend.app.main import load_catalog, open_redis, open_secrets

CANARY = "Kx7CanaryValue9Qz"
SECRET = f"whsec_{CANARY}0123456789"
START_SECONDS_MAX = 60


# Runs `tollkeeper serve` once per case, in one process: most of a start is loading the libraries.
REFUSALS_PROGRAM = """
import json, sys
from click.testing import CliRunner
from backend.app.cli import main
results = []
for env in json.load(sys.stdin):
    result = CliRunner(env=env).invoke(main, ["serve", "--port", "0"])
    results.append({"exit_code": result.exit_code, "output": result.output})
print(json.dumps(results))
"""
REFUSALS: tuple[tuple[dict[str, str], str], ...] = (
    ({}, "STRIPE_WEBHOOK_SECRET"),
    ({"STRIPE_WEBHOOK_SECRET": ""}, "STRIPE_WEBHOOK_SECRET"),
    ({"STRIPE_WEBHOOK_SECRET": " \t "}, "STRIPE_WEBHOOK_SECRET"),
    ({"STRIPE_WEBHOOK_SECRET": CANARY}, "STRIPE_WEBHOOK_SECRET"),
    ({"STRIPE_WEBHOOK_SECRET": "whsec_"}, "STRIPE_WEBHOOK_SECRET"),
    ({"STRIPE_WEBHOOK_SECRET": f"{SECRET},"}, "STRIPE_WEBHOOK_SECRET"),
    ({"STRIPE_WEBHOOK_SECRET": f"whsec_{CANARY[:16]}", "STRIPE_MODE": "live"}, "STRIPE_WEBHOOK_SECRET"),
    ({"STRIPE_WEBHOOK_SECRET_FILE": "/nonexistent/secret"}, "STRIPE_WEBHOOK_SECRET_FILE"),
    ({"STRIPE_WEBHOOK_SECRET": SECRET, "STRIPE_MODE": CANARY}, "STRIPE_MODE"),
    ({"STRIPE_WEBHOOK_SECRET": SECRET, "WEBHOOK_TOLERANCE_SECONDS": CANARY}, "WEBHOOK_TOLERANCE_SECONDS"),
    ({"STRIPE_WEBHOOK_SECRET": SECRET, "WEBHOOK_TOLERANCE_SECONDS": "0"}, "WEBHOOK_TOLERANCE_SECONDS"),
    ({"STRIPE_WEBHOOK_SECRET": SECRET, "DATABASE_URL": CANARY}, "DATABASE_URL"),
    ({"STRIPE_WEBHOOK_SECRET": SECRET, "DATABASE_URL": f"mysql://u:{CANARY}@h/d"}, "DATABASE_URL"),
    # A password with @ and : that was not percent-encoded.
    ({"STRIPE_WEBHOOK_SECRET": SECRET, "DATABASE_URL": f"postgresql://u:a@b:{CANARY}@h/d"}, "DATABASE_URL"),
    ({"STRIPE_WEBHOOK_SECRET": SECRET, "REDIS_URL": f"redis://u:{CANARY}@h:x/0"}, "REDIS_URL"),
    ({"STRIPE_WEBHOOK_SECRET": SECRET, "REDIS_URL": CANARY}, "REDIS_URL"),
    ({"STRIPE_WEBHOOK_SECRET": SECRET, "CATALOG_FILE": "/nonexistent/catalog.toml"}, "CATALOG_FILE"),
)


def run(directory: Path, *command: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """A command in an environment with nothing of ours, with `text` as its standard input."""
    return subprocess.run(
        [sys.executable, *command],
        env={"PATH": os.environ.get("PATH", os.defpath)},
        cwd=directory,
        capture_output=True,
        text=True,
        input=text,
        timeout=START_SECONDS_MAX,
        check=False,
    )


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `serve` said in each case of REFUSALS."""
    cases = json.dumps([env for env, _ in REFUSALS])
    done = run(tmp_path_factory.mktemp("serve"), "-c", REFUSALS_PROGRAM, text=cases)
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = json.loads(done.stdout)
    return results


@pytest.mark.parametrize("case", range(len(REFUSALS)))
def test_serve_refuses_to_start_and_names_the_setting_but_not_its_value(
    refusals: list[dict[str, Any]], case: int
) -> None:
    output = refusals[case]["output"]
    assert refusals[case]["exit_code"] == 2
    assert REFUSALS[case][1] in output
    assert "Traceback" not in output
    assert CANARY not in output
    assert CANARY[:16] not in output


def test_a_refused_start_ends_the_process_with_exit_code_2(tmp_path: Path) -> None:
    done = run(tmp_path, "-m", "backend.app.cli", "serve", "--port", "0")
    assert done.returncode == 2
    assert "STRIPE_WEBHOOK_SECRET: no secret is set" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("setting", ["STRIPE_WEBHOOK_SECRET", "ALERT_URLS", "DATABASE_URL"])
def test_a_file_that_is_no_text_is_named_but_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    path = tmp_path / "value"
    path.write_bytes(CANARY.encode() + b"\xff\xfe")
    monkeypatch.setenv(f"{setting}_FILE", str(path))
    with pytest.raises(ValueError, match=f"{setting}_FILE: not UTF-8") as refused:
        Settings()
    assert CANARY not in str(refused.value)
    assert refused.value.__cause__ is None


@pytest.mark.parametrize("name", sorted(Settings.model_fields))
def test_every_setting_can_come_from_a_file_and_the_file_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A mounted secret beats a variable that somebody left behind; the editor's final newline does not count."""
    values = {"stripe_mode": ("live", "test")}
    if Settings.model_fields[name].annotation is int:
        # Within the bounds of each of them.
        values[name] = ("1024", "1100")
    from_file, left_behind = values.get(name, (f"{CANARY}-file", f"{CANARY}-left"))
    path = tmp_path / "value"
    path.write_text(f"{from_file}\n")
    monkeypatch.setenv(name.upper(), left_behind)
    monkeypatch.setenv(f"{name.upper()}_FILE", str(path))
    value = getattr(Settings(), name)
    assert str(value.get_secret_value() if hasattr(value, "get_secret_value") else value) == from_file


def test_a_secret_with_names_can_come_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secrets"
    path.write_text(f"new={SECRET},old={SECRET}old\n")
    monkeypatch.setenv("STRIPE_WEBHOOK_SECRET_FILE", str(path))
    assert [secret.name for secret in open_secrets(Settings()).current()] == ["new", "old"]


def test_secrets_do_not_show_in_the_settings_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRIPE_WEBHOOK_SECRET", SECRET)
    monkeypatch.setenv("ALERT_URLS", f"tgram://{CANARY}/1")
    settings = Settings()
    assert CANARY not in repr(settings)
    assert CANARY not in settings.model_dump_json()


def test_settings_can_not_be_changed_after_the_start() -> None:
    settings = Settings(stripe_mode="test")
    with pytest.raises(ValidationError):
        settings.stripe_mode = "live"  # type: ignore[misc]


@pytest.mark.parametrize("url", [CANARY, f"http://{CANARY}", f"redis://u:{CANARY}@h:x{CANARY}/0"])
def test_a_redis_address_that_is_none_is_named_but_not_shown(url: str) -> None:
    with pytest.raises(ValueError, match="REDIS_URL") as refused:
        open_redis(url)
    assert CANARY not in str(refused.value)


def test_a_catalog_that_is_no_catalog_is_named_with_the_place(tmp_path: Path) -> None:
    path = tmp_path / "catalog.toml"
    path.write_text('default_plan = "gold"\n[plans]\n')
    with pytest.raises(ValueError, match=r"catalog\.toml: features: a table is expected"):
        load_catalog(Settings(catalog_file=path))
