"""Recomputes everything that follows from events out of the stored bytes, and compares or corrects what is stored.

    report = await Rebuild(database, catalog, livemode=...).check()   # changes nothing
    report = await Rebuild(database, catalog, livemode=...).run()     # corrects what differs

Events are replayed party by party (party_index.py) with the shell's own decision, in the order in
which they were decided. docs/rebuild.md says what is compared with what.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib import metadata
from itertools import chain
from pathlib import Path

from backend.app.audit import log as audit_log
from backend.app.audit.models import AuditLog
from backend.app.billing import store, store_state
from backend.app.billing import store_rebuild as rows
from backend.app.billing.differences import (
    Correction,
    Difference,
    UserCorrection,
    row_corrections,
    user_correction,
)
from backend.app.billing.domain.catalog import Catalog
from backend.app.billing.domain.decide import Change, EntitlementChange, kind_of_change
from backend.app.billing.domain.facts import Event
from backend.app.billing.party_index import Node, NodeKind, PartyIndex
from backend.app.billing.replay import (
    Happening,
    Replay,
    happening_of_event,
    happening_of_manual_fact,
    happening_of_own_tie,
    nodes_named_by,
)
from backend.app.billing.run_file import RunFile
from backend.app.billing.store_rebuild import DerivedTable, Key, Row, StoredEvent
from backend.app.core.bulk import insert_all
from backend.app.core.clock import Clock
from backend.app.core.database import Database, Tx
from backend.app.core.errors import StoreUnavailable
from backend.app.core.ids import new_id
from backend.app.core.progress import Progress, silent

ACTOR = "cli:rebuild"
CAUSE = "rebuild"
# Parties that grow while they wait for their locks are looked at again; more often they are under heavy traffic,
# and each is tried by itself.
LOCK_ROUNDS_MAX = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How much was looked at and what differed; `differences` are the first of them, as many as are kept.

    `events_before` were looked at by an earlier process, which was stopped.
    """

    events: int
    events_before: int
    difference_count: int
    differences: Sequence[Difference]


class Rebuild:
    """Compares or corrects one deployment's derived tables; `livemode` is the mode it grants for.

    With a `file` a run that was stopped, in whatever way, is gone on with; the file stays when it is done,
    and tells the same report again, until somebody removes it.
    """

    def __init__(
        self,
        database: Database,
        catalog: Catalog,
        *,
        clock: Clock,
        livemode: bool,
        progress: Progress = silent,
        file: Path | None = None,
    ) -> None:
        self._database = database
        self._catalog = catalog
        self._clock = clock
        self._livemode = livemode
        self._progress = progress
        self._file = file

    async def check(self) -> Report:
        """Every difference between what is stored and what the events say; changes nothing.

        Raises:
            ValueError: the file belongs to something else.
        """
        return await self._go(corrects=False)

    async def run(self) -> Report:
        """Corrects every difference, a few parties in each transaction; what it reports is what it corrected.

        Raises:
            ValueError: the file belongs to something else.
            StoreUnavailable: new events kept coming in for the same parties; what was corrected stays.
        """
        return await self._go(corrects=True)

    async def _go(self, *, corrects: bool) -> Report:
        purpose = await self._purpose(corrects=corrects) if self._file is not None else {}
        with RunFile.open(self._file, purpose) as file:
            async with self._database.snapshot() as tx:
                if await rows.newest_position(tx) < file.place.position:
                    raise ValueError(f"{self._file} knows of more events than the database has now")
            run = _Run(
                database=self._database,
                catalog=self._catalog,
                clock=self._clock,
                livemode=self._livemode,
                progress=self._progress,
                file=file,
                corrects=corrects,
            )
            await run.settle_pending()
            events_before = file.parties.count_events(party_max=file.place.party)
            if not file.place.is_done:
                await run.read_events()
                await run.read_rows()
                await run.look_at_parties()
            return Report(
                events=file.parties.count_events(),
                events_before=events_before,
                difference_count=file.count_differences(),
                differences=[
                    Difference(**{**document, "key": tuple(document["key"])})
                    for document in file.differences()
                ],
            )

    async def _purpose(self, *, corrects: bool) -> dict[str, str]:
        """What must be the same when a run is gone on with, by the names that an error tells."""
        async with self._database.snapshot() as tx:
            database = await rows.database_identity(tx)
        return {
            "database": database,
            "catalog": hashlib.sha256(repr(self._catalog).encode()).hexdigest(),
            "version of Tollkeeper": metadata.version("tollkeeper"),
            "STRIPE_MODE": "live" if self._livemode else "test",
            "command": "rebuild" if corrects else "rebuild --check",
        }


@dataclass(slots=True, kw_only=True)
class _Run:
    """One run: reads which events hang together, then looks at each party and notes in its file how far it is."""

    database: Database
    catalog: Catalog
    clock: Clock
    livemode: bool
    progress: Progress
    file: RunFile
    corrects: bool
    # What was decided last, and is known: it is read again with every batch.
    recent: set[Node] = field(default_factory=set)

    async def settle_pending(self) -> None:
        """Finds out whether the correction that an earlier process was about to commit is there."""
        if self.file.place.pending is None:
            return
        audit_id, last = self.file.place.pending
        async with self.database.snapshot() as tx:
            is_there = await rows.is_audited(tx, audit_id)
        with self.file.step() as place:
            if is_there:
                place.party = last
            else:
                self.file.drop_differences(place.party + 1, last)
            place.pending = None

    async def read_events(self) -> None:
        """Learns which events hang together."""
        done = self.file.parties.count_events()
        while not self.file.place.are_events_read:
            with self.file.step() as place:
                async with self.database.snapshot() as tx:
                    if place.event is None:
                        # All that is decided from here on is caught up with.
                        place.position = await rows.newest_position(tx)
                    page = await rows.load_events_after(tx, place.event)
                for stored in page:
                    self._add_event(stored)
                if page:
                    place.event = (page[-1].account, page[-1].livemode, page[-1].event_id)
                else:
                    place.are_events_read = True
            done += len(page)
            self.progress("reading events", done, 0)

    async def read_rows(self) -> None:
        """Adds the names of all derived rows, so that those which no event tells of are looked at too."""
        for listing in _listings()[self.file.place.tables_read :]:
            after: Key | None = None
            is_read = False
            while not is_read:
                with self.file.step() as place:
                    async with self.database.snapshot() as tx:
                        page = await listing.load(tx, after)
                    for row in page:
                        self._join(listing.nodes(row))
                    if page:
                        after = listing.key(page[-1])
                    else:
                        place.tables_read += 1
                        is_read = True

    async def look_at_parties(self) -> None:
        """Replays the parties that are left, and compares or corrects them."""
        parties, place = self.file.parties, self.file.place
        done, total = parties.count_events(party_max=place.party), parties.count_events()
        while batch := parties.batch_after(place.party):
            last = batch[-1]
            with self.file.step():
                async with self.database.snapshot() as tx:
                    await rows.hold_still(tx)
                    await self._catch_up(tx)
                    loaded = await self._load(tx, batch)
                now = self.clock.now()
                bad = [
                    comparison
                    for party, nodes in loaded.members.items()
                    if (comparison := self._compare(loaded, party, nodes, now)).differences
                ]
                if not self.corrects:
                    for comparison in bad:
                        self.file.add_differences(
                            comparison.party, [asdict(difference) for difference in comparison.differences]
                        )
                if not self.corrects or not bad:
                    place.party = last
            if place.party != last:
                await self._correct_all([loaded.members[each.party][0] for each in bad], last)
            done += len(loaded.events)
            self.progress("replaying events", done, max(done, total))
        with self.file.step():
            place.is_done = True

    async def _correct_all(self, seeds: Sequence[Node], last: int) -> None:
        """Corrects the parties that some nodes are in, up to the last one: all at once, or else one by one.

        Raises:
            StoreUnavailable: new events kept coming in even for a single one; run again.
        """
        if await self._correct(seeds, last):
            return
        while waiting := self._parties_of(seeds, last):
            if not await self._correct(seeds, waiting[0]):
                raise StoreUnavailable
        with self.file.step() as place:
            place.party = last

    def _parties_of(self, nodes: Iterable[Node], last: int) -> list[int]:
        """The parties that some nodes are in now, of those that are next; one that was joined to a later one is met there."""
        found = (self.file.parties.party_of(node) for node in nodes)
        return sorted(
            {party for party in found if party is not None and self.file.place.party < party <= last}
        )

    async def _correct(self, seeds: Sequence[Node], last: int) -> bool:
        """Corrects the parties that some nodes are in under the same locks as the shell's; False where they kept growing."""
        for _ in range(LOCK_ROUNDS_MAX):
            batch = self._parties_of(seeds, last)
            locked = {party: self.file.parties.nodes_of(party) for party in batch}
            async with self.database.transaction() as tx:
                await store_state.lock_names(tx, _names(locked))
                with self.file.step():
                    await self._catch_up(tx)
                    loaded = await self._load(tx, batch)
                # What came meanwhile needs no lock of its own unless it names somebody new.
                if not _names(loaded.members) <= _names(locked):
                    continue
                # One instant for what is compared and what is written: a new row's versions tell the same time.
                now = self.clock.now()
                compared = [
                    self._compare(loaded, party, nodes, now) for party, nodes in loaded.members.items()
                ]
                audited = await self._write(tx, compared, now)
                with self.file.step() as place:
                    for comparison in compared:
                        self.file.add_differences(
                            comparison.party, [asdict(difference) for difference in comparison.differences]
                        )
                    place.pending = (audited[0].id, last) if audited else None
            with self.file.step() as place:
                place.party = last
                place.pending = None
            return True
        return False

    def _add_event(self, stored: StoredEvent) -> None:
        happening = happening_of_event(stored, livemode=self.livemode)
        self._join({stored.node, *nodes_named_by(happening)})

    def _join(self, nodes: Iterable[Node]) -> bool:
        """Makes one party of some nodes; whether they were not one before."""
        absorbed = self.file.parties.join(nodes)
        if absorbed and not self.corrects:
            # What is part of another by now is looked at again, and its differences found again.
            for party in absorbed:
                self.file.drop_differences(party, party)
        return absorbed is not None

    async def _catch_up(self, tx: Tx) -> None:
        """Adds what was decided since the events were read."""
        place = self.file.place
        newest = await rows.newest_position(tx)
        seen: set[Node] = set()
        after: Key | None = None
        while page := await rows.load_positions_after(tx, place.position, after):
            nodes = {rows.node_of(rows.EVENTS, row): row["position"] for row in page}
            new = [
                node for node in nodes if node not in self.recent and self.file.parties.party_of(node) is None
            ]
            for start in range(0, len(new), rows.PAGE_EVENTS):
                for stored in await rows.load_events(tx, new[start : start + rows.PAGE_EVENTS]):
                    self._add_event(stored)
            seen |= {
                node for node, position in nodes.items() if position > newest - rows.POSITIONS_IN_FLIGHT_MAX
            }
            if len(page) < rows.PAGE_KEYS:
                break
            after = tuple(page[-1].values())
        self.recent = seen
        place.position = max(place.position, newest)

    async def _load(self, tx: Tx, batch: Collection[int]) -> _Loaded:
        """All that is stored of some parties, and of those that they turn out to hang together with."""
        while True:
            nodes = {party: self.file.parties.nodes_of(party) for party in batch}
            members = {party: found for party, found in nodes.items() if found}
            loaded = await _Loaded.load(tx, self.file.parties, members, livemode=self.livemode)
            # What people said has no position: it is found where it bears on somebody.
            if sum(self._join(bond) for bond in loaded.bonds) == 0:
                return loaded

    def _compare(self, loaded: _Loaded, party: int, nodes: Sequence[Node], now: datetime) -> _Comparison:
        """What has to change in the rows of one party."""
        replay = Replay(self.catalog)
        for happening in loaded.happenings(nodes):
            replay.add(happening)
        replay.note_waiting()
        entitlements = loaded.rows_of(rows.ENTITLEMENTS, nodes)
        users = (
            user_correction(
                self.catalog,
                replay.state,
                node.name,
                entitlements.get((node.name,)),
                loaded.history.get(node.name, ()),
                now=now,
            )
            for node in nodes
            if node.kind is NodeKind.USER
        )
        return _Comparison(
            party=party,
            rows=[
                correction
                for derived in rows.REPLAYED
                for correction in row_corrections(
                    derived, loaded.rows_of(derived, nodes), replay.tables[derived.table.name]
                )
            ],
            users=[user for user in users if user is not None],
        )

    async def _write(self, tx: Tx, compared: Sequence[_Comparison], now: datetime) -> list[AuditLog]:
        """Writes the corrections with an audit row for each; the audit rows."""
        corrections = [correction for each in compared for correction in each.rows]
        for derived in rows.REPLAYED:
            mine = [each for each in corrections if each.derived is derived]
            await rows.write_rows(
                tx,
                derived,
                [(each.key, each.row) for each in mine],
                new={each.key for each in mine if each.current is None},
                now=now,
            )
        users = [user for each in compared for user in each.users]
        for user in users:
            await self._write_user(tx, user, now)
        audited = [
            _audited(
                each.differences,
                is_new=each.current is None,
                is_gone=each.row is None,
                user_id=(each.row or each.current or {}).get("user_id"),
                now=now,
            )
            for each in corrections
        ] + [
            _audited(
                user.differences,
                is_new=user.current is None,
                is_gone=user.after is None,
                user_id=user.user_id,
                now=now,
            )
            for user in users
        ]
        await audit_log.append(tx, audited)
        return audited

    async def _write_user(self, tx: Tx, user: UserCorrection, now: datetime) -> None:
        if user.after is None:
            await rows.write_rows(tx, rows.ENTITLEMENTS, [((user.user_id,), None)], now=now)
            return
        change = EntitlementChange(
            kind=kind_of_change(self.catalog, user.before, user.after) or Change.CHANGED,
            before=user.before,
            after=user.after,
        )
        cause = Event(
            account="", livemode=self.livemode, id=CAUSE, type=CAUSE, api_version=None, occurred_at=now
        )
        await insert_all(tx, store.insert_entitlements([(change, cause)], now=now))
        await rows.set_created_at(tx, user.user_id, user.created_at)


def _names(members: Mapping[int, Sequence[Node]]) -> set[str]:
    """What a decision about some parties locks."""
    return rows.as_parties(chain.from_iterable(members.values())).names


@dataclass(frozen=True, slots=True, kw_only=True)
class _Comparison:
    """What has to change in one party's rows."""

    party: int
    rows: Sequence[Correction]
    users: Sequence[UserCorrection]

    @property
    def differences(self) -> list[Difference]:
        found = [each.differences for each in self.rows] + [each.differences for each in self.users]
        return list(chain.from_iterable(found))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Listing:
    """How a table's rows are gone through for their names: a page after a key, and what each row hangs together with."""

    load: Callable[[Tx, Key | None], Awaitable[list[Row]]]
    key: Callable[[Row], Key]
    nodes: Callable[[Row], Collection[Node]]


def _listings() -> list[_Listing]:
    def names_of(derived: DerivedTable) -> _Listing:
        return _Listing(
            load=lambda tx, after: rows.load_keys_after(tx, derived, after),
            key=derived.key_of,
            nodes=lambda row: [rows.node_of(derived, row)],
        )

    # What may have more has nothing in it that nothing else tells of.
    derived_tables = [
        each for each in rows.REPLAYED if each not in (rows.EVENTS, rows.CLAIMS) and not each.may_have_more
    ]
    return [
        *(names_of(derived) for derived in (*derived_tables, rows.ENTITLEMENTS)),
        _Listing(
            load=rows.load_manual_facts_after,
            key=rows.FACTS.key_of,
            nodes=lambda row: nodes_named_by(happening_of_manual_fact(row)),
        ),
        _Listing(
            load=rows.load_own_ties_after,
            key=rows.TIES.key_of,
            nodes=lambda row: nodes_named_by(happening_of_own_tie(row)),
        ),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loaded:
    """All that is stored of some parties, read at one instant; `members` are their nodes.

    `around` are the events that bear on a whole connected account. `bonds` are nodes that hang together
    by what is stored beside the events.
    """

    livemode: bool
    members: Mapping[int, Sequence[Node]]
    events: Mapping[Node, StoredEvent]
    around: Mapping[tuple[str, bool], Sequence[StoredEvent]]
    tables: Mapping[str, Mapping[Node, Mapping[Key, Row]]]
    words: Mapping[Node, Sequence[Happening]]
    history: Mapping[str, Sequence[Row]]
    bonds: Sequence[Collection[Node]]

    @classmethod
    async def load(
        cls, tx: Tx, parties: PartyIndex, members: Mapping[int, Sequence[Node]], *, livemode: bool
    ) -> _Loaded:
        """The rows of some parties."""
        nodes = list(chain.from_iterable(members.values()))
        tables: dict[str, dict[Node, dict[Key, Row]]] = {}
        for derived in (*rows.REPLAYED, rows.ENTITLEMENTS):
            by_node = tables.setdefault(derived.table.name, {})
            for key, row in (await rows.load_rows(tx, derived, nodes)).items():
                by_node.setdefault(rows.node_of(derived, row), {})[key] = row
        words: dict[Node, list[Happening]] = {}
        for row in await rows.load_manual_facts(tx, nodes):
            node = Node(NodeKind.SUBJECT, row["account"], row["livemode"], row["subject_key"])
            words.setdefault(node, []).append(happening_of_manual_fact(row))
        for row in await rows.load_own_ties(tx, nodes):
            node = Node(NodeKind.CUSTOMER, row["account"], row["livemode"], row["customer_id"])
            words.setdefault(node, []).append(happening_of_own_tie(row))
        users = [node.name for node in nodes if node.kind is NodeKind.USER]
        said = [nodes_named_by(word) for found in words.values() for word in found]
        return cls(
            livemode=livemode,
            members=members,
            events={stored.node: stored for stored in await rows.load_events(tx, nodes)},
            around=await _load_around(tx, parties, nodes),
            tables=tables,
            words=words,
            history=await rows.load_history(tx, users),
            bonds=[*said, *await rows.load_owned(tx, users)],
        )

    def rows_of(self, derived: DerivedTable, nodes: Iterable[Node]) -> dict[Key, Row]:
        """The rows of a table that belong to some nodes."""
        by_node = self.tables[derived.table.name]
        return {key: row for node in nodes for key, row in by_node.get(node, {}).items()}

    def happenings(self, nodes: Sequence[Node]) -> Iterator[Happening]:
        """All that was decided about a party, in that order; a person's word stands where its time falls."""
        own = {node: self.events[node] for node in nodes if node in self.events}
        scopes = {(node.account, node.livemode) for node in nodes}
        around = {stored.node: stored for scope in scopes for stored in self.around.get(scope, ())}
        words = sorted(
            (word for node in nodes for word in self.words.get(node, ())),
            key=lambda word: (word.received_at, word.event.id),
            reverse=True,
        )
        for stored in sorted({**around, **own}.values(), key=lambda event: event.place):
            while words and words[-1].received_at <= stored.received_at:
                yield words.pop()
            yield happening_of_event(stored, livemode=self.livemode, is_of_party=stored.node in own)
        yield from reversed(words)


async def _load_around(
    tx: Tx, parties: PartyIndex, nodes: Iterable[Node]
) -> dict[tuple[str, bool], list[StoredEvent]]:
    """The events that bear on all of a connected account, which has too many users to be one party."""
    around: dict[tuple[str, bool], list[StoredEvent]] = {}
    for account, livemode in {(node.account, node.livemode) for node in nodes if node.account}:
        party = parties.party_of(Node(NodeKind.SUBJECT, account, livemode, f"acct:{account}"))
        if party is not None:
            around[account, livemode] = await rows.load_events(tx, parties.nodes_of(party))
    return around


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
        resource_id="/".join(str(part) for part in first.key),
        details={
            difference.column or "row": {"stored": difference.stored, "recomputed": difference.recomputed}
            for difference in differences
        },
        actor=ACTOR,
        created_at=now,
    )
