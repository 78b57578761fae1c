"""A run of a rebuild on disk: its parties, how far it is, and what it has found so far.

    with RunFile.open(path, purpose) as file: ...

With a path it outlives its process and is gone on with; without one it is scratch, and goes with the run.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from backend.app.billing.party_index import PartyIndex

# Tells a file of ours from any other SQLite database (sqlite.org/pragma.html#pragma_application_id): "TkRb".
APPLICATION_ID = 0x546B5262
# Grows with every change of the tables below.
FORMAT = 1
# What differs is counted in full, but only so much of it is kept and shown: a report must fit into memory.
DIFFERENCES_KEPT_MAX = 1_000


@dataclass(slots=True, kw_only=True)
class Place:
    """How far a run is; everything before it is done and need not be looked at again.

    `position` is that of the newest decision whose event is in the index. Then the stages in their order:
    the event and the table read last, the party looked at last. `pending` is the correction that was about
    to commit when the place was written: the id of one of its audit rows and its parties' last number.
    """

    position: int = 0
    event: tuple[str, bool, str] | None = None
    are_events_read: bool = False
    tables_read: int = 0
    party: int = 0
    pending: tuple[str, int] | None = None
    is_done: bool = False

    @classmethod
    def of(cls, document: dict[str, Any]) -> Place:
        """A place out of its JSON, which knows no tuples."""
        event, pending = document.pop("event"), document.pop("pending")
        return cls(
            event=tuple(event) if event else None, pending=tuple(pending) if pending else None, **document
        )


class RunFile:
    """One run's file, held by one process at a time."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.parties = PartyIndex(connection)
        self.place = Place()

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path | None, purpose: Mapping[str, str]) -> Iterator[RunFile]:
        """The file of a run, begun or gone on with; `purpose` is what must be the same each time.

        Raises:
            ValueError: the file is not one of ours, is in use, or belongs to a run of another purpose.
        """
        if path is None:
            with (
                tempfile.TemporaryDirectory(prefix="tollkeeper-rebuild-") as directory,
                contextlib.closing(_connect(Path(directory) / "run.db")) as connection,
            ):
                # It is thrown away after the run, so nothing of it needs to outlive a crash.
                connection.execute("PRAGMA journal_mode = MEMORY")
                connection.execute("PRAGMA synchronous = OFF")
                yield cls._begun(connection, purpose)
            return
        try:
            with contextlib.closing(_connect(path)) as connection:
                known = _is_known(connection, path)
                # Held until this process ends, however it ends. WAL: a kill at any moment loses nothing.
                connection.execute("PRAGMA locking_mode = EXCLUSIVE")
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("BEGIN EXCLUSIVE")
                connection.execute("COMMIT")
                yield cls._known(connection, path, purpose) if known else cls._begun(connection, purpose)
        except sqlite3.OperationalError as error:
            busy = error.sqlite_errorcode == sqlite3.SQLITE_BUSY
            problem = "another run uses it" if busy else error
            raise ValueError(f"{path} can't be used: {problem}") from error
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{path} is not a file of `rebuild --resume`; name another") from error

    @classmethod
    def _begun(cls, connection: sqlite3.Connection, purpose: Mapping[str, str]) -> RunFile:
        with _transaction(connection):
            file = cls(connection)
            connection.execute("CREATE TABLE run (purpose TEXT NOT NULL, place TEXT NOT NULL)")
            connection.execute(
                "INSERT INTO run VALUES (?, ?)", (json.dumps(dict(purpose)), json.dumps(asdict(file.place)))
            )
            connection.execute("CREATE TABLE found (party INTEGER NOT NULL, differences INTEGER NOT NULL)")
            connection.execute("CREATE TABLE difference (party INTEGER NOT NULL, document TEXT NOT NULL)")
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {FORMAT}")
        return file

    @classmethod
    def _known(cls, connection: sqlite3.Connection, path: Path, purpose: Mapping[str, str]) -> RunFile:
        begun_for, place = connection.execute("SELECT purpose, place FROM run").fetchone()
        for name, begun_with in json.loads(begun_for).items():
            if purpose[name] != begun_with:
                raise ValueError(
                    f"{path} belongs to a run with another {name}; finish that one, or name another file"
                )
        file = cls(connection)
        file.place = Place.of(json.loads(place))
        return file

    @contextlib.contextmanager
    def step(self) -> Iterator[Place]:
        """Keeps what is done within it together with the place as it is at its end: all of it or nothing."""
        with _transaction(self._connection):
            yield self.place
            self._connection.execute("UPDATE run SET place = ?", (json.dumps(asdict(self.place)),))

    def add_differences(self, party: int, documents: Sequence[Mapping[str, Any]]) -> None:
        """Counts a party's differences and keeps them while there is room."""
        (kept,) = self._connection.execute("SELECT count(*) FROM difference").fetchone()
        self._connection.execute("INSERT INTO found VALUES (?, ?)", (party, len(documents)))
        self._connection.executemany(
            "INSERT INTO difference VALUES (?, ?)",
            [(party, json.dumps(document)) for document in documents[: max(0, DIFFERENCES_KEPT_MAX - kept)]],
        )

    def drop_differences(self, first: int, last: int) -> None:
        """Forgets what was found in the parties from one number to another: they are looked at again."""
        for table in ("found", "difference"):
            self._connection.execute(
                f"DELETE FROM {table} WHERE party BETWEEN ? AND ?",  # noqa: S608  # a fixed list of names
                (first, last),
            )

    def count_differences(self) -> int:
        """How many differences were found."""
        (count,) = self._connection.execute("SELECT coalesce(sum(differences), 0) FROM found").fetchone()
        return int(count)

    def differences(self) -> list[dict[str, Any]]:
        """The differences that were kept, in the order in which they were found."""
        return [
            json.loads(document)
            for (document,) in self._connection.execute("SELECT document FROM difference ORDER BY rowid")
        ]


def _connect(path: Path) -> sqlite3.Connection:
    # No waiting: whoever holds it holds it for a whole run.
    return sqlite3.connect(path, isolation_level=None, timeout=0)


def _is_known(connection: sqlite3.Connection, path: Path) -> bool:
    """Whether a run was begun in the file; False where there is nothing in it yet."""
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if tables == 0:
        return False
    if (application_id, version) != (APPLICATION_ID, FORMAT):
        raise ValueError(f"{path} is not a file of `rebuild --resume` of this version; name another")
    return True


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")
