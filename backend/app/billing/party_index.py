"""Which events, subjects, customers and users hang together, in an SQLite file: memory stays the same however many there are.

Whoever hangs together is a *party*: events, the subjects, customers and users they name, and the ledger
lines they make. A party can be decided about without looking at anybody outside of it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple

# A batch holds whole parties of about this many nodes; a larger party is a batch of its own.
BATCH_NODES = 1_000


class NodeKind(StrEnum):
    """What a node of the index names."""

    EVENT = "event"
    SUBJECT = "subject"
    CUSTOMER = "customer"
    USER = "user"
    MONEY = "money"


class Node(NamedTuple):
    """One name in the index; users have neither account nor livemode of their own."""

    kind: NodeKind
    account: str
    livemode: bool
    name: str


def user_node(user_id: str) -> Node:
    """A user's node."""
    return Node(NodeKind.USER, "", False, user_id)


class PartyIndex:
    """The parties of a run, numbered; whoever opened the connection also begins and ends its transactions."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        connection.execute(
            "CREATE TABLE IF NOT EXISTS node (kind TEXT, account TEXT, livemode INTEGER, name TEXT, "
            "party INTEGER NOT NULL, PRIMARY KEY (kind, account, livemode, name)) WITHOUT ROWID"
        )
        connection.execute("CREATE INDEX IF NOT EXISTS node_party ON node (party)")
        (newest,) = connection.execute("SELECT coalesce(max(party), 0) FROM node").fetchone()
        self._newest: int = newest

    def party_of(self, node: Node) -> int | None:
        """The number of a node's party, or None where the index does not know the node."""
        row = self._connection.execute(
            "SELECT party FROM node WHERE kind = ? AND account = ? AND livemode = ? AND name = ?", node
        ).fetchone()
        return row[0] if row else None

    def join(self, nodes: Iterable[Node]) -> list[int] | None:
        """Makes one party of these nodes and all that hangs together with them.

        Of several parties the newest remains, so that whoever goes through them in order meets it still.
        Gives the numbers of those that are no more, or None where nothing had to be changed.
        """
        known: list[Node] = []
        unknown: list[Node] = []
        parties: set[int] = set()
        for node in set(nodes):
            party = self.party_of(node)
            if party is None:
                unknown.append(node)
            else:
                known.append(node)
                parties.add(party)
        if not unknown and len(parties) == 1:
            return None
        *absorbed, remaining = sorted(parties) or [self._next_number()]
        for older in absorbed:
            self._connection.execute("UPDATE node SET party = ? WHERE party = ?", (remaining, older))
        self._connection.executemany(
            "INSERT INTO node VALUES (?, ?, ?, ?, ?)", [(*node, remaining) for node in unknown]
        )
        return absorbed

    def batch_after(self, party: int) -> list[int]:
        """The next parties in order, as many as make a batch."""
        batch: list[int] = []
        nodes = 0
        for found, size in self._connection.execute(
            "SELECT party, count(*) FROM node WHERE party > ? GROUP BY party ORDER BY party LIMIT ?",
            (party, BATCH_NODES),
        ):
            if batch and nodes + size > BATCH_NODES:
                break
            batch.append(found)
            nodes += size
        return batch

    def nodes_of(self, party: int) -> list[Node]:
        """The nodes of a party, in order; none where it has become a part of another."""
        return [
            Node(NodeKind(kind), account, bool(livemode), name)
            for kind, account, livemode, name in self._connection.execute(
                "SELECT kind, account, livemode, name FROM node WHERE party = ? ORDER BY 1, 2, 3, 4", (party,)
            )
        ]

    def count_events(self, *, party_max: int | None = None) -> int:
        """How many events are in the index, or in the parties up to a number."""
        (found,) = self._connection.execute(
            "SELECT count(*) FROM node WHERE kind = ? AND party <= ?",
            (NodeKind.EVENT, self._newest if party_max is None else party_max),
        ).fetchone()
        return int(found)

    def _next_number(self) -> int:
        self._newest += 1
        return self._newest
