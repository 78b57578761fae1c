"""Recomputes everything that follows from events out of the stored bytes, and compares or corrects what is stored.

    report = await Rebuild(database, catalog, livemode=...).check()   # changes nothing
    report = await Rebuild(database, catalog, livemode=...).run()     # corrects what differs

Events are replayed party by party (see store_rebuild.py) with the shell's own decision, in the order in
which they were decided. docs/rebuild.md says what is compared with what.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from backend.app.audit import log as audit_log
from backend.app.audit.models import AuditLog
from backend.app.billing import store
from backend.app.billing import store_rebuild as rows
from backend.app.billing.domain.access import named_users
from backend.app.billing.domain.catalog import Catalog
from backend.app.billing.domain.decide import (
    NO_USER,
    Attribution,
    Change,
    Decision,
    EntitlementChange,
    Status,
    Waiting,
    decide,
    kind_of_change,
)
from backend.app.billing.domain.facts import (
    About,
    ClaimFact,
    Event,
    Fact,
    GrantFact,
    SubjectId,
    Tie,
    Translation,
    Via,
)
from backend.app.billing.domain.merge import Entitlement, boundaries, entitlement_of
from backend.app.billing.domain.state import State
from backend.app.billing.providers.fields import TranslationError
from backend.app.billing.providers.stripe import translate
from backend.app.billing.providers.stripe_event import StripeEvent, read_event
from backend.app.billing.store_rebuild import DerivedTable, Key, Node, NodeKind, PartyIndex, Row, StoredEvent
from backend.app.billing.strict_json import parse_event_json
from backend.app.core.clock import Clock, iso
from backend.app.core.database import Database, Tx
from backend.app.core.errors import StoreUnavailable
from backend.app.core.ids import new_id

ACTOR = "cli:rebuild"
CAUSE = "rebuild"
# What differs is counted in full, but only so much of it is kept and shown: a report must fit into memory.
DIFFERENCES_KEPT_MAX = 1_000
# A party that grows while it waits for its locks is looked at again; more often it is under heavy traffic.
LOCK_ROUNDS_MAX = 5

_FACT: TypeAdapter[Fact] = TypeAdapter(Annotated[Fact, Field(discriminator="kind")])


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What is stored and what the events say; `column` is None where the whole row is missing or too much."""

    table: str
    key: Key
    column: str | None
    stored: Any
    recomputed: Any

    def document(self) -> dict[str, Any]:
        """As JSON; instants as RFC 3339 in UTC."""
        return {
            "table": self.table,
            "key": [_plain(part) for part in self.key],
            "column": self.column,
            "stored": _plain(self.stored),
            "recomputed": _plain(self.recomputed),
        }


@dataclass(slots=True, kw_only=True)
class Report:
    """How much was looked at and what differed; `differences` are the first DIFFERENCES_KEPT_MAX of them."""

    events: int = 0
    parties: int = 0
    difference_count: int = 0
    differences: list[Difference] = field(default_factory=list)

    def add(self, found: Collection[Difference]) -> None:
        """Counts differences and keeps them while there is room."""
        self.difference_count += len(found)
        self.differences += list(found)[: DIFFERENCES_KEPT_MAX - len(self.differences)]


# Called with what is being done, how many of it are done, and how many there are (0: not known yet).
Progress = Callable[[str, int, int], None]


def _silent(_stage: str, _done: int, _total: int) -> None:
    """Nobody is watching."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Correction:
    """What a row should be; `row` None where there should be none, `current` None where there is none."""

    derived: DerivedTable
    key: Key
    current: Row | None
    row: Row | None

    @property
    def differences(self) -> list[Difference]:
        if self.current is None or self.row is None:
            return [
                Difference(
                    table=self.derived.table.name,
                    key=self.key,
                    column=None,
                    stored=_values(self.derived, self.current),
                    recomputed=_values(self.derived, self.row),
                )
            ]
        return [
            Difference(
                table=self.derived.table.name,
                key=self.key,
                column=column,
                stored=self.current[column],
                recomputed=self.row[column],
            )
            for column in self.derived.columns
            if self.current[column] != self.row[column]
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _UserCorrection:
    """A user's row that is wrong: what it differs in, and what the user has now (None: there should be no row)."""

    user_id: str
    current: Row | None
    differences: list[Difference]
    after: Entitlement | None
    before: Entitlement | None
    created_at: datetime


class Rebuild:
    """Compares or corrects one deployment's derived tables; `livemode` is the mode it grants for."""

    def __init__(
        self,
        database: Database,
        catalog: Catalog,
        *,
        clock: Clock,
        livemode: bool,
        progress: Progress = _silent,
    ) -> None:
        self._database = database
        self._catalog = catalog
        self._clock = clock
        self._livemode = livemode
        self._progress = progress

    async def check(self) -> Report:
        """Every difference between what is stored and what the events say; changes nothing."""
        return await self._go(corrects=False)

    async def run(self) -> Report:
        """Corrects every difference, a party in each transaction; what it reports is what it corrected.

        It may be stopped at any time and run again: what was corrected stays, and is found right.
        """
        return await self._go(corrects=True)

    async def _go(self, *, corrects: bool) -> Report:
        report = Report()
        with tempfile.TemporaryDirectory(prefix="tollkeeper-rebuild-") as directory:
            index = PartyIndex(Path(directory) / "parties.db")
            try:
                position = await self._read_events(index)
                await self._read_rows(index)
                total = index.count_events()
                last = 0
                while batch := index.batch_after(last):
                    last = batch[-1]
                    async with self._database.snapshot() as tx:
                        await rows.hold_still(tx)
                        position = await self._catch_up(tx, index, position)
                        bad, events = await self._compare_batch(tx, index, batch, report, keeps=not corrects)
                    if corrects:
                        for party in bad:
                            await self._correct(index, party, position, report)
                    report.events += events
                    report.parties += len(batch)
                    self._progress("replaying events", report.events, total)
            finally:
                index.close()
        return report

    async def _read_events(self, index: PartyIndex) -> int:
        """Learns which events hang together; gives the position up to which all are known."""
        async with self._database.snapshot() as tx:
            position = await rows.newest_position(tx)
        after: Key | None = None
        done = 0
        while True:
            async with self._database.snapshot() as tx:
                page = await rows.load_events_after(tx, after)
            if not page:
                return position
            for stored in page:
                self._add_event(index, stored)
            after = (page[-1].account, page[-1].livemode, page[-1].event_id)
            done += len(page)
            self._progress("reading events", done, 0)

    async def _read_rows(self, index: PartyIndex) -> None:
        """Adds the names of all derived rows, so that those which no event tells of are looked at too."""
        for derived in (*rows.REPLAYED, rows.ENTITLEMENTS):
            if derived is rows.EVENTS or derived is rows.CLAIMS:
                continue
            after: Key | None = None
            while True:
                async with self._database.snapshot() as tx:
                    page = await rows.load_keys_after(tx, derived, after)
                if not page:
                    break
                for row in page:
                    node = rows.node_of(derived, row)
                    if not index.knows(node):
                        index.join([node])
                after = derived.key_of(page[-1])
        after = None
        while True:
            async with self._database.snapshot() as tx:
                page = await rows.load_manual_facts_after(tx, after)
            if not page:
                return
            for row in page:
                fact = _FACT.validate_python(row["body"])
                subject = Node(NodeKind.SUBJECT, row["account"], row["livemode"], row["subject_key"])
                index.join([subject, *(rows.user_node(user) for user in named_users([fact]))])
            after = rows.FACTS.key_of(page[-1])

    def _add_event(self, index: PartyIndex, stored: StoredEvent) -> None:
        """Joins an event with what it names and with the ledger lines that it makes."""
        event = _read(stored)
        envelope = event.envelope
        scope = (envelope.account, envelope.livemode)
        nodes = {Node(NodeKind.EVENT, stored.account, stored.livemode, stored.event_id)}
        translation = self._translated(event)
        if isinstance(translation, Translation):
            named = store.Parties(
                subjects=frozenset(SubjectId(*scope, key) for key in _keys(translation)),
                customers=frozenset(),
                users=frozenset(
                    named_users(about.fact for about in translation.facts)
                    | {tie.user_id for tie in translation.ties}
                ),
            )
            nodes |= {Node(NodeKind.SUBJECT, *subject) for subject in named.subjects}
            nodes |= {Node(NodeKind.CUSTOMER, *scope, customer) for customer in _customers(translation)}
            # The customer's own subject too: what is said of it bears on all that rests on it.
            nodes |= {
                Node(NodeKind.SUBJECT, *scope, f"cus:{customer}") for customer in _customers(translation)
            }
            nodes |= {rows.user_node(user) for user in named.users}
            nodes |= {Node(NodeKind.MONEY, *scope, fact.effect_key) for fact in translation.payments}
        index.join(nodes)

    def _translated(self, event: StripeEvent) -> Translation | Decision:
        """What an event asserts, or the decision on one that asserts nothing that could be applied."""
        if event.envelope.livemode != self._livemode:
            return Decision(status=Status.IGNORED, reason="other_livemode")
        try:
            translation = translate(event)
        except TranslationError as error:
            return Decision(status=Status.PARKED, reason=f"unreadable:{error}")
        return (
            translation if translation is not None else Decision(status=Status.IGNORED, reason="not_handled")
        )

    async def _catch_up(self, tx: Tx, index: PartyIndex, position: int) -> int:
        """Adds what was decided while this run was under way; gives the position up to which all are known."""
        newest = await rows.newest_position(tx)
        new = [node for node in await rows.event_nodes_since(tx, position) if not index.knows(node)]
        for stored in await rows.load_events(tx, new):
            self._add_event(index, stored)
        return max(position, newest)

    async def _compare_batch(
        self, tx: Tx, index: PartyIndex, batch: Sequence[int], report: Report, *, keeps: bool
    ) -> tuple[list[int], int]:
        """The parties of a batch in which something differs, and how many events the batch has."""
        bad: list[int] = []
        events = 0
        now = self._clock.now()
        members = {party: index.nodes_of(party) for party in batch}
        loaded = await _Loaded.load(tx, [node for nodes in members.values() for node in nodes])
        for party, nodes in members.items():
            corrections, users = self._compare(loaded, nodes, now)
            found = _differences(corrections, users)
            events += sum(node.kind is NodeKind.EVENT for node in nodes)
            if found:
                bad.append(party)
                if keeps:
                    report.add(found)
        return bad, events

    def _compare(
        self, loaded: _Loaded, nodes: Sequence[Node], now: datetime
    ) -> tuple[list[_Correction], list[_UserCorrection]]:
        """What has to change in the rows of one party."""
        replay = _Replay(self._catalog)
        for happening in loaded.happenings(nodes, self._translated):
            replay.add(happening)
        corrections: list[_Correction] = []
        for derived in rows.REPLAYED:
            stored = loaded.rows_of(derived, nodes)
            expected = replay.tables[derived.table.name]
            for key in sorted({*stored, *expected}, key=repr):
                correction = _Correction(
                    derived=derived, key=key, current=stored.get(key), row=expected.get(key)
                )
                if correction.differences:
                    corrections.append(correction)
        entitlements = loaded.rows_of(rows.ENTITLEMENTS, nodes)
        users: list[_UserCorrection] = []
        for node in nodes:
            if node.kind is NodeKind.USER:
                row = entitlements.get((node.name,))
                history = loaded.history.get(node.name, ())
                user = self._compare_user(replay.state, node.name, row, history, now)
                if user is not None:
                    users.append(user)
        return corrections, users

    def _compare_user(
        self, state: State, user_id: str, row: Row | None, history: Sequence[Row], now: datetime
    ) -> _UserCorrection | None:
        """Whether a user's row is its history's newest version and says what held when it was written.

        A row is written when something is heard of the user, not when time passes; so it is right when it
        says what held at an instant since it was written. An access that has run out since is no difference.
        """
        owns = any(owned.user_id == user_id for owned in state.sources.values())
        if not owns and not history and row is None:
            return None
        head = history[-1] if history else None
        readings = state.readings_of(self._catalog, user_id)
        newest_as_of = state.newest_as_of(user_id)

        def at(instant: datetime) -> datetime:
            return max(instant, newest_as_of or instant)

        current = entitlement_of(self._catalog, user_id, readings, at=at(now))
        version = max(row["version"] if row else 0, head["version"] if head else 0)
        activated_at = _activated_at(history, current.plan_code) or now
        after = replace(current, version=version + 1, activated_at=activated_at)
        created_at = history[0]["created_at"] if history else now
        before = _entitlement_of_row(head) if head else None
        if not owns and head is None:
            # Nothing was ever heard of this user: whoever wrote the row, it was not the service.
            gone = Difference(
                table=rows.ENTITLEMENTS.table.name,
                key=(user_id,),
                column=None,
                stored=_values(rows.ENTITLEMENTS, row),
                recomputed=None,
            )
            return _UserCorrection(
                user_id=user_id,
                current=row,
                differences=[gone],
                after=None,
                before=None,
                created_at=created_at,
            )
        differences = (
            self._row_differences(user_id, row, history, current, readings, at, at(now))
            if row is not None
            else [
                Difference(
                    table=rows.ENTITLEMENTS.table.name,
                    key=(user_id,),
                    column=None,
                    stored=None,
                    recomputed=_shown(current),
                )
            ]
        )
        if not differences:
            return None
        return _UserCorrection(
            user_id=user_id,
            current=row,
            differences=differences,
            after=after,
            before=before,
            created_at=created_at,
        )

    def _row_differences(
        self,
        user_id: str,
        row: Row,
        history: Sequence[Row],
        current: Entitlement,
        readings: Sequence[Any],
        at: Callable[[datetime], datetime],
        at_now: datetime,
    ) -> list[Difference]:
        since = at(row["updated_at"])
        instants = [since, *(edge for edge in boundaries(readings, since) if edge <= at_now), at_now]
        should = _shown(current)
        for instant in instants:
            held = _shown(entitlement_of(self._catalog, user_id, readings, at=instant))
            if all(row[column] == value for column, value in held.items()):
                should = held
                break
        if history:
            head = history[-1]
            # The row and its newest version are written together and say the same.
            for column in ("plan_code", "entitlements", "status", "valid_until"):
                if row[column] != head[column] and should[column] == row[column]:
                    should[column] = head[column]
            should["version"] = head["version"]
            should["updated_at"] = head["created_at"]
            should["created_at"] = history[0]["created_at"]
            should["activated_at"] = _activated_at(history, head["plan_code"])
        else:
            should["version"] = None
        return [
            Difference(
                table=rows.ENTITLEMENTS.table.name,
                key=(user_id,),
                column=column,
                stored=row[column],
                recomputed=value,
            )
            for column, value in should.items()
            if row[column] != value
        ]

    async def _correct(self, index: PartyIndex, party: int, position: int, report: Report) -> None:
        """Corrects one party under the same locks as the shell's.

        Raises:
            StoreUnavailable: new events kept coming in for it; run again.
        """
        for _ in range(LOCK_ROUNDS_MAX):
            nodes = index.nodes_of(party)
            async with self._database.transaction() as tx:
                await store.lock_parties(tx, rows.as_parties(nodes))
                await self._catch_up(tx, index, position)
                if index.nodes_of(party) != nodes:
                    continue
                loaded = await _Loaded.load(tx, nodes)
                # One instant for what is compared and what is written: a new row's versions tell the same time.
                now = self._clock.now()
                corrections, users = self._compare(loaded, nodes, now)
                await self._write(tx, corrections, now)
                for user in users:
                    await self._write_user(tx, user, now)
            report.add(_differences(corrections, users))
            return
        raise StoreUnavailable

    async def _write(self, tx: Tx, corrections: Sequence[_Correction], now: datetime) -> None:
        for derived in rows.REPLAYED:
            changes = [(each.key, each.row) for each in corrections if each.derived is derived]
            await rows.write_rows(tx, derived, changes, now=now)
        await audit_log.append(
            tx,
            [
                _audited(
                    each.differences,
                    is_new=each.current is None,
                    is_gone=each.row is None,
                    user_id=(each.row or each.current or {}).get("user_id"),
                    now=now,
                )
                for each in corrections
            ],
        )

    async def _write_user(self, tx: Tx, user: _UserCorrection, now: datetime) -> None:
        if user.after is None:
            await rows.write_rows(tx, rows.ENTITLEMENTS, [((user.user_id,), None)], now=now)
        else:
            change = EntitlementChange(
                kind=kind_of_change(self._catalog, user.before, user.after) or Change.CHANGED,
                before=user.before,
                after=user.after,
            )
            cause = Event(
                account="", livemode=self._livemode, id=CAUSE, type=CAUSE, api_version=None, occurred_at=now
            )
            await store.save_entitlement(tx, change, cause, now=now)
            await rows.set_created_at(tx, user.user_id, user.created_at)
        row = _audited(
            user.differences,
            is_new=user.current is None,
            is_gone=user.after is None,
            user_id=user.user_id,
            now=now,
        )
        await audit_log.append(tx, [row])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Happening:
    """One thing that was decided: an event or a person's word, and what it asserts."""

    event: Event
    asserts: Translation | Decision
    received_at: datetime
    is_stored_event: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loaded:
    """All stored rows of some parties, read at one instant."""

    events: Mapping[Node, StoredEvent]
    tables: Mapping[str, Mapping[Node, Mapping[Key, Row]]]
    manual: Mapping[Node, Sequence[_Happening]]
    history: Mapping[str, Sequence[Row]]

    @classmethod
    async def load(cls, tx: Tx, nodes: Collection[Node]) -> _Loaded:
        """The rows of some nodes."""
        events = {
            Node(NodeKind.EVENT, stored.account, stored.livemode, stored.event_id): stored
            for stored in await rows.load_events(tx, nodes)
        }
        tables: dict[str, dict[Node, dict[Key, Row]]] = {}
        for derived in (*rows.REPLAYED, rows.ENTITLEMENTS):
            by_node = tables.setdefault(derived.table.name, {})
            for key, row in (await rows.load_rows(tx, derived, nodes)).items():
                by_node.setdefault(rows.node_of(derived, row), {})[key] = row
        manual: dict[Node, list[_Happening]] = {}
        for row in await rows.load_manual_facts(tx, nodes):
            node = Node(NodeKind.SUBJECT, row["account"], row["livemode"], row["subject_key"])
            manual.setdefault(node, []).append(_manual_fact(row))
        for row in await rows.load_own_ties(tx, nodes):
            node = Node(NodeKind.CUSTOMER, row["account"], row["livemode"], row["customer_id"])
            manual.setdefault(node, []).append(_own_tie(row))
        users = [node.name for node in nodes if node.kind is NodeKind.USER]
        return cls(events=events, tables=tables, manual=manual, history=await rows.load_history(tx, users))

    def rows_of(self, derived: DerivedTable, nodes: Iterable[Node]) -> dict[Key, Row]:
        """The rows of a table that belong to some nodes."""
        by_node = self.tables[derived.table.name]
        return {key: row for node in nodes for key, row in by_node.get(node, {}).items()}

    def happenings(
        self, nodes: Sequence[Node], translated: Callable[[StripeEvent], Translation | Decision]
    ) -> Iterable[_Happening]:
        """All that was decided about a party, in that order; a person's word stands where its time falls."""
        stored = sorted(
            (self.events[node] for node in nodes if node in self.events), key=lambda event: event.place
        )
        words = sorted(
            (word for node in nodes for word in self.manual.get(node, ())),
            key=lambda word: (word.received_at, word.event.id),
        )
        for event in stored:
            while words and words[0].received_at <= event.received_at:
                yield words.pop(0)
            parsed = _read(event)
            yield _Happening(
                event=parsed.envelope,
                asserts=translated(parsed),
                received_at=event.received_at,
                is_stored_event=True,
            )
        yield from words


class _Replay:
    """The tables as the shell would have written them, in memory."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self.state = State()
        self.tables: dict[str, dict[Key, Row]] = {derived.table.name: {} for derived in rows.REPLAYED}

    def add(self, happening: _Happening) -> None:
        """Decides on one event as the shell does and keeps every consequence."""
        if isinstance(happening.asserts, Decision):
            self._save_event(happening.event, happening.asserts)
            return
        self.state, decision = decide(
            self._catalog, self.state, happening.event, happening.asserts, now=happening.received_at
        )
        self.state = _within_window(self.state, [subject for subject, _ in decision.facts])
        self._save_rows(happening.event, decision)
        self._attribute(decision)
        if happening.is_stored_event:
            self._save_event(happening.event, decision)

    def _save_rows(self, event: Event, decision: Decision) -> None:
        for customer, tie in decision.ties:
            if tie.via in rows.OWN_TIES:
                continue
            ties = self._table(rows.TIES)
            key = (*customer, tie.user_id, int(tie.via))
            known = ties.get(key)
            if known is None or (tie.occurred_at, tie.event_id) < (known["occurred_at"], known["event_id"]):
                ties[key] = {"user_id": tie.user_id, "occurred_at": tie.occurred_at, "event_id": tie.event_id}
        for child, parent in decision.links:
            self._table(rows.LINKS)[*child, parent.key] = {}
        for subject, fact in decision.facts:
            if fact.kind not in rows.MANUAL_KINDS:
                self._table(rows.FACTS).setdefault(
                    (*subject, fact.kind, fact.as_of, fact.event_id),
                    {"body": _FACT.dump_python(fact, mode="json")},
                )
        for source, owned in decision.sources:
            if source.kind != "grant":
                self._table(rows.SOURCES)[tuple(source)] = {
                    "customer_id": owned.customer_id,
                    "user_id": owned.user_id,
                }
        for payment in decision.payments:
            fact_ = payment.fact
            self._table(rows.PAYMENTS).setdefault(
                (event.account, event.livemode, fact_.effect_key),
                {
                    "stripe_event_id": event.id,
                    "user_id": payment.user_id,
                    "event_type": fact_.event_type,
                    "plan_code": payment.plan_code,
                    "customer_id": fact_.customer_id,
                    "invoice_id": fact_.invoice_id,
                    "subscription_id": fact_.subscription_id,
                    "amount": fact_.amount,
                    "currency": fact_.currency,
                    "settled": fact_.settled,
                    "metadata": dict(fact_.metadata),
                    "subject_key": payment.subject.key if payment.subject else None,
                    "occurred_at": event.occurred_at,
                },
            )

    def _attribute(self, decision: Decision) -> None:
        """Gives what had waited for a user to that user, as the shell's statements do."""
        for attribution in decision.attributions:
            self._attribute_payments(attribution)
        for waiting in decision.waiting:
            self._name_plans(waiting)
            self._settle(waiting)
        for attribution in decision.attributions:
            self._settle_customer(attribution)

    def _attribute_payments(self, attribution: Attribution) -> None:
        for key, line in self._table(rows.PAYMENTS).items():
            about = (
                (*key[:2], line["customer_id"]) == attribution.customer
                if attribution.customer is not None
                else (*key[:2], line["subject_key"]) in attribution.subjects
            )
            if about and line["user_id"] is None:
                line["user_id"] = attribution.user_id

    def _name_plans(self, waiting: Waiting) -> None:
        for key, line in self._table(rows.PAYMENTS).items():
            if line["plan_code"] is None and (*key[:2], line["subject_key"]) in waiting.subjects:
                line["plan_code"] = waiting.plan_code

    def _settle(self, waiting: Waiting) -> None:
        for key, row in self._parked():
            if (*key[:2], row["subject_key"]) in waiting.subjects:
                row["status"] = (Status.SUCCESS if waiting.reason is None else Status.PARKED).value
                row["reason"] = waiting.reason
                row["user_id"] = waiting.user_id
                row["plan_code"] = waiting.plan_code or row["plan_code"]

    def _settle_customer(self, attribution: Attribution) -> None:
        for key, row in self._parked():
            if (*key[:2], row["customer_id"]) == attribution.customer and row["reason"] == NO_USER:
                row.update(status=Status.SUCCESS.value, reason=None, user_id=attribution.user_id)

    def _parked(self) -> list[tuple[Key, Row]]:
        """The events that wait for something; one that can't be read waits for a newer Tollkeeper, not a user."""
        return [
            (key, row)
            for key, row in self._table(rows.EVENTS).items()
            if row["status"] == Status.PARKED.value and not (row["reason"] or "").startswith("unreadable:")
        ]

    def _save_event(self, event: Event, decision: Decision) -> None:
        key = (event.account, event.livemode, event.id)
        self._table(rows.CLAIMS)[key] = {}
        self._table(rows.EVENTS)[key] = {
            "event_type": event.type,
            "api_version": event.api_version,
            "occurred_at": event.occurred_at,
            "status": decision.status.value,
            "reason": decision.reason,
            "user_id": decision.user_id,
            "plan_code": decision.plan_code,
            "customer_id": decision.customer.id if decision.customer else None,
            "subject_key": decision.subject.key if decision.subject else None,
        }

    def _table(self, derived: DerivedTable) -> dict[Key, Row]:
        return self.tables[derived.table.name]


def _differences(corrections: Iterable[_Correction], users: Iterable[_UserCorrection]) -> list[Difference]:
    found = [difference for correction in corrections for difference in correction.differences]
    return found + [difference for user in users for difference in user.differences]


def _within_window(state: State, subjects: Iterable[SubjectId]) -> State:
    """The state as it would be loaded again: of each kind of fact of a subject only the newest."""
    changed: dict[SubjectId, tuple[Fact, ...]] = {}
    for subject in subjects:
        known = state.facts[subject]
        if len(known) <= store.FACTS_PER_SUBJECT_MAX:
            continue
        kept: dict[str, list[Fact]] = {}
        for fact in sorted(known, key=lambda fact: (fact.as_of, fact.event_id)):
            kept.setdefault(fact.kind, []).append(fact)
        changed[subject] = tuple(
            fact for group in kept.values() for fact in group[-store.FACTS_PER_SUBJECT_MAX :]
        )
    return replace(state, facts={**state.facts, **changed}) if changed else state


def _read(stored: StoredEvent) -> StripeEvent:
    """The event in stored bytes, under the name it is stored by: it was read before, so it can be read again."""
    # A missing `created` was replaced by the time of the signature, which only the row remembers.
    return read_event(parse_event_json(stored.payload), signed_at=stored.occurred_at)


def _keys(translation: Translation) -> set[str]:
    keys = {about.key for about in translation.facts}
    keys |= {key for link in translation.links for key in (link.child, link.parent)}
    return keys | ({translation.subject} if translation.subject is not None else set())


def _customers(translation: Translation) -> set[str]:
    named = {
        translation.customer_id,
        *(tie.customer_id for tie in translation.ties),
        *(getattr(about.fact, "customer_id", None) for about in translation.facts),
        *(key.removeprefix("cus:") for key in _keys(translation) if key.startswith("cus:")),
    }
    return {customer for customer in named if customer is not None}


def _manual_fact(row: Row) -> _Happening:
    fact = _FACT.validate_python(row["body"])
    assert isinstance(fact, GrantFact | ClaimFact)
    return _Happening(
        event=_word(row, fact.event_id, fact.event_type, fact.as_of),
        asserts=Translation(subject=row["subject_key"], facts=(About(key=row["subject_key"], fact=fact),)),
        received_at=fact.as_of,
        is_stored_event=False,
    )


def _own_tie(row: Row) -> _Happening:
    tie = Tie(
        customer_id=row["customer_id"],
        user_id=row["user_id"],
        via=Via(row["via"]),
        occurred_at=row["occurred_at"],
        event_id=row["event_id"],
    )
    return _Happening(
        event=_word(row, tie.event_id, "tie", tie.occurred_at),
        asserts=Translation(ties=(tie,), customer_id=tie.customer_id),
        received_at=tie.occurred_at,
        is_stored_event=False,
    )


def _word(row: Row, event_id: str, event_type: str, at: datetime) -> Event:
    return Event(
        account=row["account"],
        livemode=row["livemode"],
        id=event_id,
        type=event_type,
        api_version=None,
        occurred_at=at,
    )


def _shown(entitlement: Entitlement) -> Row:
    """An entitlement's part of a row: what depends on the events alone."""
    return {
        "plan_code": entitlement.plan_code,
        "entitlements": dict(entitlement.features),
        "status": entitlement.status,
        "valid_until": entitlement.valid_until,
    }


def _entitlement_of_row(row: Row) -> Entitlement:
    return Entitlement(
        user_id=row["user_id"],
        plan_code=row["plan_code"],
        status=row["status"],
        features=row["entitlements"],
        valid_until=row["valid_until"],
        version=row["version"],
    )


def _activated_at(history: Sequence[Row], plan_code: str) -> datetime | None:
    """When the plan that a user has now began: with the first of the versions that had it ever since."""
    began: datetime | None = None
    for version in reversed(history):
        if version["plan_code"] != plan_code:
            break
        began = version["occurred_at"]
    return began


def _values(derived: DerivedTable, row: Row | None) -> Row | None:
    return {column: row[column] for column in derived.columns if column in row} if row is not None else None


def _audited(
    differences: Sequence[Difference],
    *,
    is_new: bool,
    is_gone: bool,
    user_id: str | None,
    now: datetime,
) -> AuditLog:
    """What became of one row."""
    verb = "added" if is_new else "removed" if is_gone else "corrected"
    first = differences[0]
    return AuditLog(
        id=new_id(),
        user_id=user_id,
        action=f"rebuild.{verb}",
        resource_type=first.table,
        resource_id="/".join(str(_plain(part)) for part in first.key),
        details={
            difference.column or "row": {
                "stored": _plain(difference.stored),
                "recomputed": _plain(difference.recomputed),
            }
            for difference in differences
        },
        actor=ACTOR,
        created_at=now,
    )


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, datetime):
        return iso(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value
