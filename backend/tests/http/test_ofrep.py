"""Feature checks over OFREP: the official OpenFeature client, unchanged, against a running service."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest
from openfeature import api
from openfeature.client import OpenFeatureClient
from openfeature.contrib.provider.ofrep import OFREPProvider
from openfeature.evaluation_context import EvaluationContext
from openfeature.exception import ErrorCode
from openfeature.flag_evaluation import Reason

from backend.app.billing.routes import WEBHOOK_PATH
from backend.app.billing.security import sign
from backend.app.core.api_keys import ApiKeys, Scope
from backend.app.core.clock import SystemClock
from backend.app.core.database import Database
from backend.app.simulator import objects
from backend.tests.support.billing import WEBHOOK_SECRET
from backend.tests.support.service import ServiceProcess

FLAGS = "/ofrep/v1/evaluate/flags"
# https://github.com/open-feature/protocol/blob/main/service/openapi.yaml, evaluationSuccess.reason.
OFREP_REASONS = {"STATIC", "TARGETING_MATCH", "SPLIT", "DISABLED", "UNKNOWN"}
VIP = EvaluationContext("usr_vip", {"country": "CA", "age": 30})
STRANGER = EvaluationContext("usr_nobody")


class Deployment:
    """A service in a process of its own and a read key to it."""

    def __init__(self, process: ServiceProcess, key: str) -> None:
        self.process = process
        self.key = key

    def post(self, path: str, document: object, **headers: str) -> httpx.Response:
        """Posts JSON, or bytes as they are, with the key unless `headers` say otherwise."""
        content = document if isinstance(document, bytes) else json.dumps(document).encode()
        return httpx.post(
            self.process.url + path,
            content=content,
            headers=headers or {"Authorization": f"Bearer {self.key}"},
            trust_env=False,
        )

    def evaluate(self, user_id: str, key: str) -> dict[str, Any]:
        response = self.post(f"{FLAGS}/{key}", {"context": {"targetingKey": user_id}})
        assert response.status_code == 200, response.text
        document: dict[str, Any] = response.json()
        return document

    def buy(self, user_id: str, plan_code: str) -> None:
        """A paid checkout, signed and delivered."""
        now = int(time.time())
        session = objects.checkout_session(
            f"cs_{user_id}_{plan_code}",
            client_reference_id=user_id,
            metadata={"plan_code": plan_code},
            created=now,
        )
        event = objects.event(
            f"evt_{user_id}_{plan_code}", "checkout.session.completed", session, created=now
        )
        body = json.dumps(event).encode()
        signature = sign(body, WEBHOOK_SECRET.encode(), timestamp=now)
        response = self.post(WEBHOOK_PATH, body, **{"Stripe-Signature": signature})
        assert response.json()["status"] == "success"


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A service in which usr_vip has bought vip."""
    directory = tmp_path_factory.mktemp("ofrep")
    with ServiceProcess.start(directory, {"STRIPE_WEBHOOK_SECRET": WEBHOOK_SECRET}) as process:
        key = asyncio.run(_read_key(f"sqlite:///{directory / 'tollkeeper.db'}"))
        found = Deployment(process, key)
        found.buy("usr_vip", "vip")
        yield found


async def _read_key(url: str) -> str:
    database = Database.open(url)
    try:
        return await ApiKeys(database, SystemClock()).create("product", Scope.READ)
    finally:
        await database.close()


@pytest.fixture
def provider(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> Iterator[OFREPProvider]:
    # Loopback goes through no proxy.
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made = OFREPProvider(
        deployment.process.url, headers_factory=lambda: {"Authorization": f"Bearer {deployment.key}"}
    )
    yield made
    made.session.close()


@pytest.fixture
def client(provider: OFREPProvider) -> Iterator[OpenFeatureClient]:
    """An OpenFeature client that knows nothing of us but the address and a key."""
    api.set_provider_and_wait(provider, domain="tollkeeper")
    yield api.get_client("tollkeeper")
    api.clear_providers()


class TestOfficialClient:
    def test_a_paying_user_gets_what_their_plan_gives(self, client: OpenFeatureClient) -> None:
        assert client.get_boolean_value("copy_trading", False, VIP) is True
        assert client.get_integer_value("max_devices", 0, VIP) == 10
        assert client.get_string_value("analytics_level", "none", VIP) == "pro"
        assert client.get_boolean_value("dedicated_support", True, VIP) is False

    def test_the_details_say_why(self, client: OpenFeatureClient) -> None:
        details = client.get_boolean_details("copy_trading", False, VIP)
        assert (details.error_code, details.reason, details.variant) == (None, Reason.TARGETING_MATCH, "true")
        assert details.flag_metadata == {
            "planCode": "vip",
            "status": "active",
            "version": 1,
            "rule": "checkout.paid",
            "granted": True,
        }

    def test_a_user_nobody_has_heard_of_has_the_default_plan(self, client: OpenFeatureClient) -> None:
        details = client.get_integer_details("max_devices", 77, STRANGER)
        assert (details.value, details.reason, details.error_code) == (1, Reason.STATIC, None)
        assert client.get_boolean_value("copy_trading", True, STRANGER) is False

    def test_a_feature_the_catalog_lacks_is_the_callers_own_default(self, client: OpenFeatureClient) -> None:
        details = client.get_boolean_details("time_travel", True, VIP)
        assert (details.value, details.reason) == (True, Reason.ERROR)
        assert details.error_code == ErrorCode.FLAG_NOT_FOUND
        assert client.get_integer_value("max_devices", 0, VIP) == 10

    def test_a_question_about_nobody_is_the_callers_own_default(self, client: OpenFeatureClient) -> None:
        for context in (None, EvaluationContext(), EvaluationContext("", {"plan": "vip"})):
            details = client.get_boolean_details("copy_trading", False, context)
            assert (details.value, details.error_code) == (False, ErrorCode.TARGETING_KEY_MISSING)

    def test_a_question_of_the_wrong_type_is_the_callers_own_default(self, client: OpenFeatureClient) -> None:
        details = client.get_string_details("max_devices", "many", VIP)
        assert (details.value, details.error_code) == ("many", ErrorCode.TYPE_MISMATCH)

    def test_a_wrong_key_pauses_nothing(self, client: OpenFeatureClient, provider: OFREPProvider) -> None:
        right = provider.headers_factory
        provider.headers_factory = lambda: {"Authorization": "Bearer tk_wrong"}
        assert client.get_boolean_details("copy_trading", False, VIP).error_code == ErrorCode.GENERAL
        provider.headers_factory = right
        assert client.get_boolean_value("copy_trading", False, VIP) is True

    def test_many_questions_in_a_row_are_never_held_back(
        self, client: OpenFeatureClient, provider: OFREPProvider
    ) -> None:
        assert all(client.get_boolean_value("copy_trading", False, VIP) for _ in range(200))
        assert provider.retry_after is None

    def test_what_is_bought_shows_at_the_next_question(
        self, client: OpenFeatureClient, deployment: Deployment
    ) -> None:
        buyer = EvaluationContext("usr_buyer")
        assert client.get_integer_value("max_devices", 0, buyer) == 1
        deployment.buy("usr_buyer", "premium")
        assert client.get_integer_value("max_devices", 0, buyer) == 5


class TestBulk:
    def test_every_feature_of_the_catalog_is_there_as_the_protocol_wants_it(
        self, deployment: Deployment
    ) -> None:
        response = deployment.post(FLAGS, {"context": {"targetingKey": "usr_vip"}})
        assert (response.status_code, response.headers["Content-Type"]) == (200, "application/json")
        document = response.json()
        assert document["metadata"] == {"planCode": "vip", "status": "active", "version": 1}
        flags = {flag["key"]: flag for flag in document["flags"]}
        assert {key: (flag["value"], flag["reason"]) for key, flag in flags.items()} == {
            "signals_enabled": (True, "STATIC"),
            "max_devices": (10, "TARGETING_MATCH"),
            "analytics_level": ("pro", "TARGETING_MATCH"),
            "copy_trading": (True, "TARGETING_MATCH"),
            "dedicated_support": (False, "STATIC"),
        }
        for flag in document["flags"]:
            assert flag["reason"] in OFREP_REASONS
            assert isinstance(flag["variant"], str)
            assert all(isinstance(value, bool | int | str) for value in flag["metadata"].values())
            assert flag == deployment.evaluate("usr_vip", flag["key"])

    def test_an_unchanged_answer_is_304_until_access_changes(self, deployment: Deployment) -> None:
        question = {"context": {"targetingKey": "usr_etag"}}
        key = {"Authorization": f"Bearer {deployment.key}"}
        first = deployment.post(FLAGS, question, **key)
        etag = first.headers["ETag"]
        again = deployment.post(FLAGS, question, **key, **{"If-None-Match": etag})
        assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", etag)
        other = {"context": {"targetingKey": "usr_vip"}}
        assert deployment.post(FLAGS, other, **key, **{"If-None-Match": etag}).status_code == 200

        deployment.buy("usr_etag", "premium")
        changed = deployment.post(FLAGS, question, **key, **{"If-None-Match": etag})
        assert (changed.status_code, changed.headers["ETag"] != etag) == (200, True)

    def test_no_cache_may_keep_it_without_asking(self, deployment: Deployment) -> None:
        response = deployment.post(FLAGS, {"context": {"targetingKey": "usr_vip"}})
        assert response.headers["Cache-Control"] == "private, no-cache"


class TestErrors:
    @pytest.mark.parametrize(
        ("body", "code"),
        [
            (b"", "PARSE_ERROR"),
            (b"{", "PARSE_ERROR"),
            (b"\xff\xfe", "PARSE_ERROR"),
            (b"[]", "PARSE_ERROR"),
            (b"null", "PARSE_ERROR"),
            (b"[" * 100_000, "PARSE_ERROR"),
            (b"1" * 5_000, "PARSE_ERROR"),
            (b"{}", "TARGETING_KEY_MISSING"),
            (b'{"context": {}}', "TARGETING_KEY_MISSING"),
            (b'{"context": {"targetingKey": ""}}', "TARGETING_KEY_MISSING"),
            (b'{"context": {"targetingKey": null}}', "TARGETING_KEY_MISSING"),
            (b'{"context": {"targeting_key": "usr_vip"}}', "TARGETING_KEY_MISSING"),
            (b'{"context": null}', "INVALID_CONTEXT"),
            (b'{"context": "usr_vip"}', "INVALID_CONTEXT"),
            (b'{"context": {"targetingKey": 7}}', "INVALID_CONTEXT"),
            (b'{"context": {"targetingKey": ["usr_vip"]}}', "INVALID_CONTEXT"),
            (b'{"context": {"targetingKey": "a\\u0000b"}}', "INVALID_CONTEXT"),
            (b'{"context": {"targetingKey": "\\ud800"}}', "INVALID_CONTEXT"),
            (b'{"context": {"targetingKey": "' + b"a" * 10_000 + b'"}}', "INVALID_CONTEXT"),
        ],
    )
    def test_what_cant_be_evaluated_is_400_in_the_protocols_shape(
        self, deployment: Deployment, body: bytes, code: str
    ) -> None:
        for path, known in ((f"{FLAGS}/copy_trading", {"key": "copy_trading"}), (FLAGS, {})):
            response = deployment.post(path, body)
            assert response.status_code == 400
            assert response.headers["Content-Type"] == "application/json"
            assert response.headers["X-Request-Id"]
            document = response.json()
            assert document.pop("errorDetails")
            assert document == {**known, "errorCode": code}

    def test_an_unknown_flag_is_404_in_the_protocols_shape(self, deployment: Deployment) -> None:
        response = deployment.post(f"{FLAGS}/time_travel", {"context": {"targetingKey": "usr_vip"}})
        assert (response.status_code, response.headers["Content-Type"]) == (404, "application/json")
        assert response.json() == {
            "key": "time_travel",
            "errorCode": "FLAG_NOT_FOUND",
            "errorDetails": "The catalog has no such feature.",
        }

    @pytest.mark.parametrize("path", [FLAGS, f"{FLAGS}/copy_trading", f"{FLAGS}/time_travel"])
    @pytest.mark.parametrize("headers", [{"Accept": "*/*"}, {"X-API-Key": "tk_wrong"}, {"X-API-Key": ""}])
    def test_without_a_key_nothing_is_told(
        self, deployment: Deployment, path: str, headers: dict[str, str]
    ) -> None:
        response = deployment.post(path, {"context": {"targetingKey": "usr_vip"}}, **headers)
        assert response.status_code == 401
        assert response.headers["Content-Type"] == "application/problem+json"
        assert "vip" not in response.json()["detail"]

    def test_the_key_may_come_as_x_api_key(self, deployment: Deployment) -> None:
        """OFREP's other way; it opens these routes only."""
        question = {"context": {"targetingKey": "usr_vip"}}
        response = deployment.post(f"{FLAGS}/copy_trading", question, **{"X-API-Key": deployment.key})
        assert (response.status_code, response.json()["value"]) == (200, True)
        elsewhere = httpx.get(
            f"{deployment.process.url}/api/v1/entitlements/usr_vip",
            headers={"X-API-Key": deployment.key},
            trust_env=False,
        )
        assert elsewhere.status_code == 401

    def test_a_body_without_bounds_is_413(self, deployment: Deployment) -> None:
        response = deployment.post(FLAGS, b'{"context": "' + b"a" * 300_000 + b'"}')
        assert response.status_code == 413
