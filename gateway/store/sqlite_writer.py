"""What the writer thread of a `SqliteStore` does: a group of operations, one transaction.

Few statements, whatever the size of the group: each one gives up the interpreter's lock several times and may wait
milliseconds to get it back from a busy event loop. So rows are read as one JSON array, and written from one (`_Rows`):
a group of 200 appends is seven statements.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from typing import Any

import orjson
import trio
from attrs import define, field

from gateway.errors import StoreError, StoreRefused, StoreUnavailable
from gateway.protocol.messages import Input
from gateway.protocol.patch import merge_patch
from gateway.store.base import SessionRecord, Stored
from gateway.store.facts import OpenInput, check, fold, retried, touches_inputs
from gateway.store.sqlite_file import check_token, explain


class _Rows:
    """Rows for one statement: numbers in a JSON array, texts and blobs as places in one blob.

    Only numbers, because SQLite's JSON functions end a text at a NUL, which a request id may contain.
    """

    def __init__(self) -> None:
        self._rows: list[tuple[int | None, ...]] = []
        self._parts: list[bytes] = []
        self._size = 0

    def __bool__(self) -> bool:
        return bool(self._rows)

    def add(self, numbers: Sequence[int | None], *parts: bytes) -> None:
        """A row: its numbers (``$[0]``, …), then start and length of each part."""
        places: list[int | None] = [*numbers]
        for part in parts:
            places += (self._size + 1, len(part))
            self._size += len(part)
        self._rows.append(tuple(places))
        self._parts += parts

    def values(self) -> tuple[bytes, bytes]:
        """What the statement gets as ``?1`` (the JSON) and ``?2`` (the blob)."""
        return orjson.dumps(self._rows), b"".join(self._parts)


def _number(index: int) -> str:
    return f"json_extract(value, '$[{index}]')"


def _blob(index: int) -> str:
    return f"substr(?2, {_number(index)}, {_number(index + 1)})"


def _text(index: int) -> str:
    return f"CAST({_blob(index)} AS TEXT)"


_INSERT_SESSIONS = f"""INSERT INTO sessions
    (id, created_at, active_at, reserved, session_id, agent_id, subject, epoch, generation)
SELECT {_number(0)}, {_number(1)}, {_number(1)}, {_number(2)}, {_text(3)}, {_text(5)}, {_text(7)}, {_text(9)},
    (SELECT m.value FROM meta AS m WHERE m.name = 'generation') FROM json_each(?1)"""

_INSERT_EVENTS = f"""INSERT INTO events (session, seq, type, payload)
SELECT {_number(0)}, {_number(1)}, {_text(2)}, {_blob(4)} FROM json_each(?1)"""

_INSERT_INPUTS = f"""INSERT INTO inputs (session, seq, at, done, request_id, digest, on_busy)
SELECT {_number(0)}, {_number(1)}, {_number(2)}, 0, {_text(3)}, {_blob(5)}, {_text(7)} FROM json_each(?1)"""

_UPDATE_INPUTS = f"""UPDATE inputs SET turn = new.turn, done = new.done
FROM (SELECT {_number(0)} AS session, {_number(1)} AS seq, {_number(2)} AS turn, {_number(3)} AS done
    FROM json_each(?1)) AS new
WHERE inputs.session = new.session AND inputs.seq = new.seq"""

_UPDATE_SESSIONS = f"""UPDATE sessions SET reserved = new.reserved, head = new.head, events = new.events,
    bytes = new.bytes, turn = new.turn, active_at = new.active_at
FROM (SELECT {_number(0)} AS id, {_number(1)} AS reserved, {_number(2)} AS head, {_number(3)} AS events,
    {_number(4)} AS bytes, {_number(5)} AS turn, {_number(6)} AS active_at FROM json_each(?1)) AS new
WHERE sessions.id = new.id"""


@define(eq=False)
class Operation:
    """Something for the writer. `done` is set on the event loop when it is committed or has failed with `error`."""

    session_ids: Sequence[str]
    done: trio.Event = field(factory=trio.Event, kw_only=True)
    error: StoreError | None = field(default=None, kw_only=True)


@define(eq=False)
class Create(Operation):
    record: SessionRecord
    reserved: int


@define(eq=False)
class Append(Operation):
    batch: Sequence[Stored]
    reserved: int
    size: int


@define(eq=False)
class Job(Operation):
    """Maintenance: a transaction of its own. `work` returns the `result`."""

    work: Callable[[Writer], Any]
    result: Any = field(default=None, kw_only=True)


@define(eq=False)
class _Facts:
    """A row of ``sessions`` while a group is worked on. Invariant: ``floor <= head <= reserved``."""

    session_id: str
    id: int
    reserved: int
    head: int
    floor: int
    events: int
    size: int
    turn: int | None
    active_at: int
    inputs: dict[int, OpenInput] = field(factory=dict)
    folded: bool = False
    """Whether anything may have happened to `inputs`."""


class Writer:
    """Owns the writing connection. Every method is called by one thread at a time.

    Args:
        connection: to a file that `prepare` was done on.
        reopen: makes another connection when that one broke.
        token: the writer's token that `prepare` gave; when it is no longer the newest, nothing is written any more.
        max_events: kept per session.
        max_bytes: kept per session.
    """

    def __init__(
        self,
        path: str,
        connection: sqlite3.Connection,
        reopen: Callable[[], sqlite3.Connection],
        token: int,
        *,
        max_events: int,
        max_bytes: int,
    ) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = connection
        self._reopen = reopen
        self._token = token
        self._max_events = max_events
        self._max_bytes = max_bytes
        (self._next_id,) = connection.execute("SELECT coalesce(max(id), 0) + 1 FROM sessions").fetchone()
        self.transactions = 0
        self.batches = 0
        self.failures = 0

    def close(self) -> None:
        """Close the connection; the last one to do so moves the WAL into the file."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def commit(self, group: Sequence[Operation]) -> None:
        """Do the operations in one transaction; sets the `error` of those that failed. Never raises.

        If the transaction fails, nothing of the group is stored, and each operation is tried alone when one of
        them may be to blame: a batch that cannot be stored, or that needs more room than is left, fails no other.
        """
        try:
            self._transaction(group)
        except Exception as exc:
            if len(group) > 1 and _may_be_one(exc):
                for operation in group:
                    self.commit((operation,))
                return
            self.failures += 1
            for operation in group:
                operation.error = explain(exc, self._path)
                operation.error.__cause__ = exc

    def _transaction(self, group: Sequence[Operation]) -> None:
        if self._connection is None:
            self._connection = self._reopen()
        execute = self._connection.execute
        try:
            execute("BEGIN IMMEDIATE")
            check_token(self._connection, self._path, self._token)
            for operation in group:
                operation.error = None
            if isinstance(group[0], Job):
                (job,) = group
                assert isinstance(job, Job)
                job.result = job.work(self)
            else:
                self._write(group)
            execute("COMMIT")
        except BaseException:
            self._roll_back()
            raise
        self.transactions += 1
        self.batches += len(group)

    def _roll_back(self) -> None:
        connection = self._connection
        assert connection is not None
        try:
            # Some errors (a full disk among them) may have rolled it back already.
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        except sqlite3.Error:
            # Closing it rolls back too; the next transaction opens another.
            self._connection = None
            connection.close()

    # sessions and events

    def _write(self, group: Sequence[Operation]) -> None:
        known = self._facts(sorted({session_id for operation in group for session_id in operation.session_ids}))
        self._load_inputs(group, known)
        born, events, inputs, consumed, rows = _Rows(), _Rows(), _Rows(), _Rows(), _Rows()
        changed: dict[str, _Facts] = {}
        for operation in group:
            (session_id,) = operation.session_ids
            facts = known.get(session_id)
            try:
                if isinstance(operation, Create):
                    if facts is not None:
                        raise StoreRefused(f"session {session_id} exists already")
                    facts = known[session_id] = self._born(operation, born)
                else:
                    assert isinstance(operation, Append)
                    if facts is None:
                        raise StoreRefused(f"session {session_id} is not known")
                    check(session_id, facts.head, operation.batch)
                    _apply(facts, operation, events, inputs)
            except StoreRefused as exc:
                operation.error = exc
            else:
                changed[session_id] = facts
        for facts in changed.values():
            rows.add((facts.id, facts.reserved, facts.head, facts.events, facts.size, facts.turn, facts.active_at))
            if facts.folded:
                for seq, kept in facts.inputs.items():
                    consumed.add((facts.id, seq, kept.turn, int(kept.done)))
        if born:
            self._execute(_INSERT_SESSIONS, *born.values())
        if events:
            self._execute(_INSERT_EVENTS, *events.values())
        if inputs:
            self._execute(_INSERT_INPUTS, *inputs.values())
        if consumed:
            self._execute(_UPDATE_INPUTS, consumed.values()[0])
        if rows:
            self._execute(_UPDATE_SESSIONS, rows.values()[0])
        for facts in changed.values():
            # A quarter more than the bound may pile up, so that a trim is paid once in a while and not every time.
            if facts.events > self._max_events * 5 // 4 or facts.size > self._max_bytes * 5 // 4:
                self._trim(facts)

    def _facts(self, session_ids: list[str]) -> dict[str, _Facts]:
        rows = self._json(
            """SELECT json_group_array(json_array(
                session_id, id, reserved, head, floor, events, bytes, turn, active_at))
            FROM sessions WHERE session_id IN (SELECT value FROM json_each(?))""",
            _dump(session_ids),
        )
        return {row[0]: _Facts(*row) for row in rows}

    def _load_inputs(self, group: Sequence[Operation], known: dict[str, _Facts]) -> None:
        """Fill in the open inputs of the sessions whose batches touch any."""
        ids: dict[int, _Facts] = {}
        again: set[int] = set()
        for operation in group:
            facts = known.get(operation.session_ids[0])
            if facts is not None and isinstance(operation, Append) and touches_inputs(operation.batch):
                ids[facts.id] = facts
                if retried(operation.batch):
                    again.add(facts.id)
        if not ids:
            return
        query = """SELECT json_group_array(json_array(session, seq, request_id, turn, done)) FROM inputs
            WHERE session IN (SELECT value FROM json_each(?)) AND """
        rows = self._json(query + "done = 0", _dump(list(ids)))
        if again:
            # Those that a finished turn had, and whose event is still there.
            rows += self._json(
                query
                + """done = 1 AND turn IS NOT NULL AND EXISTS (
                    SELECT 1 FROM events AS e WHERE e.session = inputs.session AND e.seq = inputs.seq)""",
                _dump(list(again)),
            )
        for session, seq, request_id, turn, done in sorted(rows, key=lambda row: row[:2]):
            ids[session].inputs[seq] = OpenInput(request_id, turn, bool(done))

    def _born(self, operation: Create, born: _Rows) -> _Facts:
        r = operation.record
        facts = _Facts(r.session_id, self._next_id, operation.reserved, 0, 0, 0, 0, None, r.created_at)
        self._next_id += 1
        texts = (r.session_id, r.agent_id, r.subject, r.epoch)
        born.add((facts.id, r.created_at, facts.reserved), *[text.encode() for text in texts])
        return facts

    def _trim(self, facts: _Facts) -> None:
        """Bring a session back within its bounds. Its state, waiting inputs and open turn stay."""
        (floor,) = self._execute(
            """SELECT max(seq) FROM (
                SELECT seq, row_number() OVER newest AS n, sum(length(payload)) OVER newest AS total
                FROM events WHERE session = ? AND seq > ? WINDOW newest AS (ORDER BY seq DESC))
            WHERE n > 1 AND (n > ? OR total > ?)""",
            facts.id,
            facts.floor,
            self._max_events,
            self._max_bytes,
        ).fetchone()
        if floor is None:
            return
        (patches,) = self._execute(
            """SELECT CAST('[' || group_concat(payload) || ']' AS BLOB) FROM (
                SELECT payload FROM events WHERE session = ? AND type = 'state' AND seq <= ? ORDER BY seq)""",
            facts.id,
            floor,
        ).fetchone()
        if patches is not None:
            (raw,) = self._execute("SELECT state FROM sessions WHERE id = ?", facts.id).fetchone()
            state = orjson.loads(raw)
            for event in orjson.loads(patches):
                state = merge_patch(state, event["patch"])
            self._execute("UPDATE sessions SET state = ? WHERE id = ?", orjson.dumps(state), facts.id)
        self._execute(
            """DELETE FROM events WHERE session = ?1 AND seq <= ?2 AND seq IS NOT ?3
            AND seq NOT IN (SELECT seq FROM inputs WHERE session = ?1 AND done = 0)""",
            facts.id,
            floor,
            facts.turn,
        )
        self._execute(
            """UPDATE sessions SET floor = ?2, (events, bytes) =
                (SELECT count(*), sum(length(payload)) FROM events WHERE session = ?1 AND seq > ?2) WHERE id = ?1""",
            facts.id,
            floor,
        )

    # maintenance

    def remove(self, session_ids: Sequence[str], *, idle_since: int | None = None) -> tuple[int, int, int]:
        """Delete sessions; returns how many, their keys and their bytes.

        Args:
            idle_since: leave those with later activity (ms), waiting inputs or an open turn.
        """
        rows = self._json(
            """SELECT json_group_array(json_array(id, bytes)) FROM sessions
            WHERE session_id IN (SELECT value FROM json_each(?1)) AND (?2 IS NULL OR (active_at <= ?2
            AND turn IS NULL AND NOT EXISTS (SELECT 1 FROM inputs WHERE session = id AND done = 0)))""",
            _dump(list(session_ids)),
            idle_since,
        )
        ids = _dump([row[0] for row in rows])
        self._execute("DELETE FROM events WHERE session IN (SELECT value FROM json_each(?))", ids)
        keys = self._execute("DELETE FROM inputs WHERE session IN (SELECT value FROM json_each(?))", ids).rowcount
        self._execute("DELETE FROM sessions WHERE id IN (SELECT value FROM json_each(?))", ids)
        return len(rows), keys, sum(row[1] for row in rows)

    def expire_keys(self, sessions: Sequence[int], before: int) -> int:
        """Delete the keys of inputs that are done with and older than `before` (ms); returns how many."""
        return self._execute(
            "DELETE FROM inputs WHERE done = 1 AND at < ? AND session IN (SELECT value FROM json_each(?))",
            before,
            _dump(list(sessions)),
        ).rowcount

    def _execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        assert self._connection is not None
        return self._connection.execute(sql, values)

    def _json(self, sql: str, *values: Any) -> Any:
        (text,) = self._execute(sql, *values).fetchone()
        return orjson.loads(text)


def _apply(
    facts: _Facts,
    operation: Append,
    events: _Rows,
    inputs: _Rows,
) -> None:
    """Fold a checked batch into its session's facts and add its rows."""
    for item in operation.batch:
        event = item.event
        events.add((facts.id, event.seq), event.type.encode(), item.payload)
        facts.head = event.seq
        facts.active_at = max(facts.active_at, event.at)
        if type(event) is Input:
            facts.inputs[event.seq] = OpenInput(event.request_id)
            assert item.digest is not None
            texts = (event.request_id.encode(), item.digest, item.on_busy.encode())
            inputs.add((facts.id, event.seq, event.at), *texts)
        else:
            facts.turn = fold(event, facts.inputs, facts.turn)
    facts.folded = facts.folded or touches_inputs(operation.batch)
    facts.events += len(operation.batch)
    facts.size += operation.size
    facts.reserved = max(facts.reserved, operation.reserved, facts.head)


def _may_be_one(exc: Exception) -> bool:
    """Whether one operation of a group may be to blame: it is too large, or cannot be stored."""
    if not isinstance(exc, sqlite3.Error):
        return not isinstance(exc, StoreError)
    return getattr(exc, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL or not isinstance(
        explain(exc, ""), StoreUnavailable
    )


def _dump(value: Any) -> str:
    return orjson.dumps(value).decode()
