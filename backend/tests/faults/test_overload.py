"""More deliveries than can be taken are told when to come again, and transactions that meet never wait in a circle."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import pytest

from backend.app.billing import committer, store
from backend.app.billing.security import sign
from backend.app.billing.webhooks import Delivery, Genuine
from backend.app.core.errors import PROBLEM_CONTENT_TYPE
from backend.tests.faults import events
from backend.tests.faults.ledger import assert_processed_once, open_ledger
from backend.tests.faults.test_outages import held
from backend.tests.support.billing import WEBHOOK_SECRET, Harness, running_service

QUEUE_ITEMS_MAX = 10
DELIVERIES = 40


async def test_a_full_queue_answers_503_with_retry_after_and_keeps_what_it_took(
    migrated_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_service(migrated_url) as harness:
        # Connections as they are in a service that has been at work.
        assert (await harness.deliver(events.purchase("full00", user_id="user_00"))).status_code == 200
        monkeypatch.setattr(harness.service.webhooks._committer, "_queue_items_max", QUEUE_ITEMS_MAX)
        sent = [events.purchase(f"full{n:02d}", user_id=f"user_{n:02d}") for n in range(1, DELIVERIES)]
        async with held(migrated_url):
            # Each finds the lanes waiting, and then the queue full.
            waiting = [asyncio.create_task(harness.deliver(event)) for event in sent]
            _, taken = await asyncio.wait(waiting, timeout=1)
            refused = [task.result() for task in waiting if task.done()]
        answers = await asyncio.gather(*taken)
        assert Counter(answer.status_code for answer in refused) == {503: len(refused)}
        assert len(refused) >= DELIVERIES - QUEUE_ITEMS_MAX - 10
        for answer in refused:
            assert answer.headers["content-type"] == PROBLEM_CONTENT_TYPE
            assert answer.headers["retry-after"] == str(committer.RETRY_AFTER_SECONDS)
        assert Counter(answer.status_code for answer in answers) == {200: len(taken)}
        again = [await harness.deliver(event) for event in sent]
        assert {answer.status_code for answer in again} == {200}
        assert sum("idempotent-replayed" in answer.headers for answer in again) == len(taken)
    async with open_ledger(migrated_url) as ledger:
        await assert_processed_once(ledger, {f"evt_full{number:02d}" for number in range(DELIVERIES)})


async def test_batches_that_alert_of_the_same_things_in_another_order_do_not_wait_for_each_other(
    migrated_postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What had waited for a user is settled in the middle of a batch; alerts of before and after it are told together."""

    def waits_for_price(tag: str, price: str) -> bytes:
        return events.subscription(
            tag, subscription_id=f"sub_{tag}", customer=f"cus_{tag}", user_id=f"user_{tag}", price=price
        )

    async with running_service(migrated_postgres_url) as harness:
        batches = []
        for number, (first, last) in enumerate([("a", "b"), ("b", "a")]):
            bound = events.SCENARIOS["late_binding"](f"bound{number}")
            for before in bound.before:
                assert (await harness.deliver(before)).status_code == 200
            batch = [
                waits_for_price(f"first{number}", first),
                bound.event,
                waits_for_price(f"last{number}", last),
            ]
            batches.append([verified(harness, body) for body in batch])

        attribute, both = store.attribute_payments, asyncio.Barrier(2)

        async def attribute_together(*arguments: Any) -> Any:
            await both.wait()
            return await attribute(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(store, "attribute_payments", attribute_together)
            answers = await asyncio.gather(*map(harness.service.webhooks._commit, batches))
    statuses = [[json.loads(answer.body)["status"] for answer in batch] for batch in answers]
    assert statuses == [["parked", "success", "parked"]] * 2


def verified(harness: Harness, body: bytes) -> Genuine:
    now = harness.clock.now()
    signature = sign(body, WEBHOOK_SECRET.encode(), timestamp=int(now.timestamp()))
    headers = ((b"stripe-signature", signature.encode()),)
    return harness.service.webhooks._verify(
        Delivery(body=body, headers=headers, received_at=now, request_id="")
    )
