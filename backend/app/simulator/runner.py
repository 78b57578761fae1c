"""Sends simulated histories to a running service as Stripe would, and compares what the service says with the truth."""

from __future__ import annotations

import asyncio
import heapq
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

import httpx2 as httpx

from backend.app.billing.domain.catalog import Catalog
from backend.app.billing.routes import WEBHOOK_PATH
from backend.app.billing.security import sign
from backend.app.core.clock import Clock, from_unix, iso
from backend.app.core.progress import Progress
from backend.app.simulator.delivery import Network, Route, route
from backend.app.simulator.objects import Json
from backend.app.simulator.replay import Difference, compare, differences, instants, play
from backend.app.simulator.truth import Entitled
from backend.app.simulator.world import History, Plan, live

# Enough to keep a service busy that commits in groups; more would only wait in its queue.
DELIVERIES_AT_ONCE = 16
# Stripe's answer to a failure is to try again; a service that fails this often in a row is down.
ATTEMPTS_MAX = 5
RETRY_SECONDS = 0.5
# Longer than the service's own deadline for a delivery.
ANSWER_SECONDS_MAX = 15
# Instants asked about per user over HTTP, chosen at random from those worth it.
QUESTIONS_PER_USER = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A running service: a client with its base URL, the signing secret, a read key, and deliveries per second at most."""

    client: httpx.AsyncClient
    secret: str
    api_key: str
    clock: Clock
    rate: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a simulation came to; `questions` are the answers that were compared."""

    seed: int
    users: int
    events: int
    deliveries: int
    questions: int
    differences: tuple[Difference, ...]


def run_in_memory(plan: Plan, users: int, network: Network, catalog: Catalog, progress: Progress) -> Report:
    """The histories of users 0 to `users` - 1 through translation and decision; lost events come again at the end."""
    events = deliveries = questions = 0
    found: list[Difference] = []
    for number in range(users):
        history, routed = live(plan, number), route_of(plan, number, network)
        at = instants(history, _dice(plan, number, "instants"))
        outcome = play(catalog, (*routed.delivered, *routed.lost), now=history.end)
        found += differences(catalog, history, outcome, at)
        events += len(history.events)
        deliveries += len(routed.delivered) + len(routed.lost)
        questions += len(at)
        progress("users", number + 1, users)
    return Report(
        seed=plan.seed,
        users=users,
        events=events,
        deliveries=deliveries,
        questions=questions,
        differences=tuple(found),
    )


async def run_against(plan: Plan, users: int, network: Network, target: Target, progress: Progress) -> Report:
    """The same over HTTP. The ledger is not asked for: the API's page of it names no effect keys."""
    histories = [live(plan, number) for number in range(users)]
    routes = [route_of(plan, number, network) for number in range(users)]
    # All users' deliveries in the order in which things happened, so that they meet in the service.
    streams = [
        [(event["created"], number, event) for event in one.delivered] for number, one in enumerate(routes)
    ]
    deliveries = [event for *_, event in heapq.merge(*streams, key=lambda entry: entry[:2])]
    lost = [event for one in routes for event in one.lost]
    found = await deliver(target, deliveries, progress)
    # Stripe's later attempt at what was lost.
    found += await deliver(target, lost, progress)
    questions = 0
    for number, history in enumerate(histories):
        dice = _dice(plan, number, "instants")
        worth = instants(history, dice)
        chosen = [*dice.sample(worth, min(QUESTIONS_PER_USER, len(worth))), history.end]
        for at in chosen:
            found += compare(history, at, await ask(target, history, at), what="entitlement")
        questions += len(chosen)
        progress("users compared", number + 1, users)
    return Report(
        seed=plan.seed,
        users=users,
        events=sum(len(history.events) for history in histories),
        deliveries=len(deliveries) + len(lost),
        questions=questions,
        differences=tuple(found),
    )


def route_of(plan: Plan, number: int, network: Network) -> Route:
    """The way of one user's events, the same for the same seed."""
    return route(live(plan, number).events, network, _dice(plan, number, "network"))


async def deliver(target: Target, events: Sequence[Json], progress: Progress) -> list[Difference]:
    """Posts signed events, several at once; those that were not answered with success, after retries."""
    waiting = iter(enumerate(events))
    started = asyncio.get_running_loop().time()
    refused: list[Difference] = []
    done = 0

    async def sender() -> None:
        nonlocal done
        for number, event in waiting:
            if target.rate is not None:
                due = started + number / target.rate
                await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))
            answer = await _post(target, event)
            if answer is not None:
                refused.append(
                    Difference(
                        user_id="",
                        at=event["created"],
                        what=f"delivery of {event['id']}",
                        expected="200",
                        found=answer,
                    )
                )
            done += 1
            progress("deliveries", done, len(events))

    async with asyncio.TaskGroup() as group:
        for _ in range(DELIVERIES_AT_ONCE):
            group.create_task(sender())
    return refused


async def ask(target: Target, history: History, at: int) -> Entitled:
    """The API's answer about a user at an instant. Raises httpx.HTTPError where there is none."""
    response = await target.client.get(
        f"/api/v1/entitlements/{history.user_id}",
        params={"at": iso(from_unix(at))},
        headers={"Authorization": f"Bearer {target.api_key}"},
        timeout=ANSWER_SECONDS_MAX,
    )
    response.raise_for_status()
    document = response.json()
    until = document["valid_until"]
    return Entitled(
        plan=document["plan_code"],
        status=document["status"],
        features=document["entitlements"],
        valid_until=None if until is None else round(datetime.fromisoformat(until).timestamp()),
    )


def explained(differences: Iterable[Difference], plan: Plan, users: int) -> list[str]:
    """The differences for people, of the smallest history that shows one, with what had happened to the user."""
    shown = list(differences)
    if not shown:
        return []
    of_user = {f"sim-{plan.seed}-{number}": number for number in range(users)}
    histories = [live(plan, of_user[user]) for user in {one.user_id for one in shown} if user in of_user]
    lines = [f"{len(shown)} differences, for {len(histories)} users; seed {plan.seed}"]
    lines += [f"  {one.what}: expected {one.expected}, found {one.found}" for one in shown if not one.user_id]
    if not histories:
        return lines
    smallest = min(histories, key=lambda history: (len(history.events), history.number))
    first = next(one for one in shown if one.user_id == smallest.user_id)
    at = first.at if first.at is not None else smallest.end
    lines += [
        f"The smallest history that shows one is that of user {smallest.user_id}, {len(smallest.events)} events:",
        *(
            f"  {iso(from_unix(record.at))} {record.source} {record.cause}"
            for record in smallest.truth.causes(at)
        ),
        f"{iso(from_unix(at))} {first.what}",
        f"  expected {first.expected}",
        f"  found    {first.found}",
    ]
    return lines


async def _post(target: Target, event: Json) -> str | None:
    """None after a success, else what was answered at last."""
    body = json.dumps(event).encode()
    problem = ""
    for attempt in range(ATTEMPTS_MAX):
        timestamp = int(target.clock.now().timestamp())
        try:
            response = await target.client.post(
                WEBHOOK_PATH,
                content=body,
                headers={
                    "Content-Type": "application/json",
                    "Stripe-Signature": sign(body, target.secret.encode(), timestamp=timestamp),
                },
                timeout=ANSWER_SECONDS_MAX,
            )
        except httpx.HTTPError as error:
            problem = type(error).__name__
        else:
            if response.is_success:
                return None
            problem = f"{response.status_code} {response.text[:200]}"
            if response.is_client_error:
                break
        await asyncio.sleep(RETRY_SECONDS * (attempt + 1))
    return problem


def _dice(plan: Plan, number: int, purpose: str) -> random.Random:
    return random.Random(f"{plan.seed}:{number}:{purpose}")  # noqa: S311  # to be repeatable is the point
