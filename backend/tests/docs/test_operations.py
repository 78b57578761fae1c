"""What the README and the operations page tell people to type works as it stands there."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import asyncpg  # type: ignore[import-untyped]  # the driver ships no types
import httpx2 as httpx
import pytest
from sqlalchemy.engine import make_url

from backend.app.core.database import Database
from backend.app.core.migrations import migrate
from backend.tests.docs.repository import marked_block
from backend.tests.support.billing import running_service
from backend.tests.support.servers import PostgresServer
from backend.tests.support.service import ServiceProcess

PAID_CHECKOUT = {
    "id": "evt_roles",
    "type": "checkout.session.completed",
    "data": {
        "object": {
            "id": "cs_roles",
            "mode": "payment",
            "payment_status": "paid",
            "client_reference_id": "usr_roles",
            "amount_total": 2999,
            "currency": "usd",
            "metadata": {"plan_code": "premium"},
        }
    },
}


def test_the_quickstart_gives_the_user_their_plan(tmp_path: Path) -> None:
    block = marked_block("README.md", "quickstart")
    secret = block.split("STRIPE_WEBHOOK_SECRET=")[1].split()[0]
    with ServiceProcess.start(tmp_path, {"STRIPE_WEBHOOK_SECRET": secret}) as service:
        *typed, curl = block.strip().splitlines()
        script = "\n".join([*typed, 'echo "$KEY"'])
        script = script.replace(".venv/bin/tollkeeper", f"{Path(sys.executable).parent}/tollkeeper")
        script = script.replace("send -", f"send - --url {service.url}/api/v1/billing/webhooks")
        finished = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert finished.returncode == 0, finished.stderr
        # What curl would ask; not every machine that runs the tests has it.
        header, _, url = curl.removeprefix("curl -H ").rpartition(" ")
        assert header == '"Authorization: Bearer $KEY"'
        answer = httpx.get(
            url.replace("http://127.0.0.1:8000", service.url),
            headers={"Authorization": f"Bearer {finished.stdout.split()[-1]}"},
        )
    assert answer.status_code == 200
    assert answer.json()["plan_code"] == "premium"


@dataclass(frozen=True)
class Roles:
    """A database laid out as the operations page says, under names of its own."""

    owner_url: str
    app_url: str


@pytest.fixture
async def roles(postgres_server: PostgresServer) -> AsyncIterator[Roles]:
    if not postgres_server.running:
        postgres_server.restart()
    mark = secrets.token_hex(4)
    database = f"tollkeeper_{mark}"

    def renamed(sql: str) -> str:
        return (
            sql.replace("tollkeeper_owner", f"owner_{mark}")
            .replace("tollkeeper_app", f"app_{mark}")
            .replace("DATABASE tollkeeper ", f"DATABASE {database} ")
        )

    admin_url = postgres_server.url("postgres")
    at = make_url(admin_url).set(database=database)
    owner_url, app_url = (
        at.set(username=f"{role}_{mark}", password=password).render_as_string(hide_password=False)
        for role, password in (("owner", "choose-one"), ("app", "choose-another"))
    )
    await run_statements(admin_url, renamed(marked_block("docs/operations.md", "roles")))
    try:
        owned = Database.open(owner_url)
        await migrate(owned)
        await owned.close()
        await run_statements(owner_url, renamed(marked_block("docs/operations.md", "grants")))
        yield Roles(owner_url, app_url)
    finally:
        await run_statements(
            admin_url,
            f"DROP DATABASE IF EXISTS {database} WITH (FORCE); DROP ROLE app_{mark}; DROP ROLE owner_{mark}",
        )


async def run_statements(url: str, sql: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        # One by one: several at once are a transaction, in which no database can be made.
        for statement in filter(None, map(str.strip, sql.split(";"))):
            await connection.execute(statement)
    finally:
        await connection.close()


async def test_the_service_works_under_a_role_that_can_not_rewrite_the_past(roles: Roles) -> None:
    async with running_service(roles.app_url) as service:
        for replayed in (None, "true"):
            answer = await service.deliver(PAID_CHECKOUT)
            assert answer.status_code == 200, answer.text
            assert answer.json()["status"] == "success"
            assert answer.headers.get("Idempotent-Replayed") == replayed
        assert (await service.entitlements("usr_roles"))["plan_code"] == "premium"
        assert (await service.client.get("/readyz")).status_code == 200
        written = await service.count("audit_logs")
    assert written > 0

    for attempt in (
        "UPDATE audit_logs SET action = 'nothing'",
        "DELETE FROM audit_logs",
        "TRUNCATE audit_logs",
        "ALTER TABLE audit_logs DISABLE TRIGGER ALL",
        "DROP TRIGGER audit_logs_no_change ON audit_logs",
        "SET session_replication_role = replica",
        "DROP TABLE audit_logs",
        "UPDATE alembic_version SET version_num = '0000'",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await run_statements(roles.app_url, attempt)

    connection = await asyncpg.connect(roles.owner_url)
    assert await connection.fetchval("SELECT count(*) FROM audit_logs") == written
    await connection.close()
