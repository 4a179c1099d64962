"""What the writer thread of a `SqliteStore` does: a group of operations, one transaction.

One statement, whatever the size of the group, which is its own transaction: each one gives up the interpreter's lock
and may wait a millisecond to get it back from a busy event loop. So what is to be known of sessions is remembered, not
read, and the rows of all tables are handed over as JSON arrays (`_Rows`) in one row of a view: its trigger writes them.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from typing import Any

import orjson
import trio
from attrs import define, field

from gateway.errors import StoreError, StoreRefused, StoreUnavailable
from gateway.protocol.codec import decode_event
from gateway.protocol.messages import Input
from gateway.protocol.patch import merge_patch
from gateway.store.base import Appended, SessionRecord, Stored
from gateway.store.facts import FOLDED, OpenInput, check, fold, retried
from gateway.store.sqlite_checkpoint import checkpoint
from gateway.store.sqlite_file import check_token, explain
from gateway.store.sqlite_reader import FINISHED
from gateway.store.sqlite_segments import SEGMENT, Segment, fetch, key_of, open_asks


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


def _blob(rows: str, index: int) -> str:
    """Of the parts of `rows` in a `_WRITE`, or in ``?2``."""
    parts = f"NEW.{rows}_parts" if rows else "?2"
    return f"substr({parts}, {_number(index)}, {_number(index + 1)})"


def _text(rows: str, index: int) -> str:
    return f"CAST({_blob(rows, index)} AS TEXT)"


_GROUP = ("token", "born", "born_parts", "segments", "segments_parts", "changed", "changed_parts")
"""What a group of operations writes, as the columns of one row."""

_SCHEMA = (
    f"CREATE TEMP VIEW written AS SELECT {', '.join(f'0 AS {name}' for name in _GROUP)}",
    f"""CREATE TEMP TRIGGER write_group INSTEAD OF INSERT ON written BEGIN
        SELECT RAISE(ABORT, 'fenced') WHERE NEW.token IS NOT (SELECT value FROM meta WHERE name = 'writer');
        INSERT INTO sessions
            (id, created_at, active_at, reserved, session_id, agent_id, subject, epoch, generation)
        SELECT {_number(0)}, {_number(1)}, {_number(1)}, {_number(2)},
            {_text("born", 3)}, {_text("born", 5)}, {_text("born", 7)}, {_text("born", 9)},
            (SELECT m.value FROM meta AS m WHERE m.name = 'generation') FROM json_each(NEW.born);
        INSERT INTO segments (id, session, first, events, bytes, lines)
        SELECT {_number(0)}, {_number(1)}, {_number(2)}, {_number(3)}, {_number(4)}, {_blob("segments", 5)}
        FROM json_each(NEW.segments) WHERE true
        ON CONFLICT (id) DO UPDATE SET events = excluded.events, bytes = excluded.bytes, lines = excluded.lines;
        UPDATE sessions SET reserved = new.reserved, head = new.head, events = new.events, bytes = new.bytes,
            turn = new.turn, waiting = new.waiting, active_at = new.active_at, inputs = new.inputs
        FROM (SELECT {_number(0)} AS id, {_number(1)} AS reserved, {_number(2)} AS head, {_number(3)} AS events,
            {_number(4)} AS bytes, {_number(5)} AS turn, {_number(6)} AS waiting, {_number(7)} AS active_at,
            {_blob("changed", 8)} AS inputs FROM json_each(NEW.changed)) AS new
        WHERE sessions.id = new.id;
    END""",
)

_KEEP_KEYS = f"""INSERT INTO keys (session, seq, at, request_id, digest)
    SELECT {_number(0)}, {_number(1)}, {_number(2)}, {_text("", 3)}, {_blob("", 5)} FROM json_each(?1)"""

_WRITE = f"INSERT INTO written VALUES ({', '.join('?' for _ in _GROUP)})"


@define(eq=False)
class Operation:
    """Something for the writer. When it is committed or has failed with `error`, each of `done` is called on the event
    loop."""

    session_ids: Sequence[str]
    patient: bool = field(default=False, kw_only=True)
    """Whether it may wait a moment for others of its kind."""
    done: list[Appended] = field(factory=list, kw_only=True)
    error: StoreError | None = field(default=None, kw_only=True)

    async def wait(self) -> None:
        """Wait for the end of it. Cancelling is safe, and changes nothing."""
        event = trio.Event()
        self.done.append(lambda _: event.set())
        await event.wait()


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


KNOWN_MOST = 8192
"""Sessions whose facts the writer remembers, some 1500 bytes each: those a busy gateway writes to all the time."""

_OF_INPUTS = {cls.type.encode() for cls in (Input, *FOLDED)}
"""The events that say what became of inputs."""


@define(eq=False)
class _Facts:
    """A row of ``sessions`` and its open inputs, as the file has them. Invariant: ``floor <= head <= reserved``."""

    session_id: str
    id: int
    reserved: int
    head: int
    floor: int
    events: int
    size: int
    turn: int | None
    active_at: int
    newest: Segment | None = None
    """The segment that takes the next event, if it has room."""
    inputs: dict[int, OpenInput] = field(factory=dict)
    """By number, in order. Between two groups none of them is done with."""
    folded: bool = False
    """Whether anything may have happened to `inputs` in this group."""

    def close_group(self) -> None:
        """What is done with need not be known any more, nor what a full segment says."""
        if self.newest is not None and len(self.newest.lines) >= SEGMENT:
            self.newest = None
        if self.folded:
            self.inputs = {seq: kept for seq, kept in self.inputs.items() if not kept.done}
            self.folded = False

    def row(self) -> tuple[tuple[int | None, ...], bytes]:
        """What of it changes, as `_WRITE` takes it."""
        inputs = [(seq, kept.turn is not None) for seq, kept in self.inputs.items()]
        waiting = sum([not has_turn for _, has_turn in inputs])
        numbers = (self.id, self.reserved, self.head, self.events, self.size, self.turn, waiting, self.active_at)
        return numbers, orjson.dumps(inputs)


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
        self._connection: sqlite3.Connection | None = _writing(connection)
        self._reopen = reopen
        self._token = token
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._known: dict[str, _Facts] = {}
        """Of sessions that were written to lately; nobody else writes to the file, so it stays true until a transaction
        fails or a `Job` changes something."""
        (self._next_id,) = connection.execute("SELECT coalesce(max(id), 0) + 1 FROM sessions").fetchone()
        (self._last_segment,) = connection.execute("SELECT coalesce(max(id), 0) FROM segments").fetchone()
        # A trim removes whole segments, and comes when a quarter more than the bounds has piled up.
        self._most, self._room = max_events // 4, min(SEGMENT, max_bytes // 4)
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

    def checkpoint(self) -> bool:
        """Move into the file what the WAL holds; returns whether that was all of it."""
        return self._connection is not None and checkpoint(self._connection)[1]

    def _transaction(self, group: Sequence[Operation]) -> None:
        if self._connection is None:
            self._connection = _writing(self._reopen())
        for operation in group:
            operation.error = None
        try:
            if isinstance(group[0], Job):
                (job,) = group
                assert isinstance(job, Job)
                self._execute("BEGIN IMMEDIATE")
                check_token(self._connection, self._path, self._token)
                self._known.clear()
                job.result = job.work(self)
                self._execute("COMMIT")
            else:
                self._write(group)
        except BaseException:
            self._known.clear()
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
        known = self._recall(group)
        born, segments, rows = _Rows(), _Rows(), _Rows()
        written: dict[int, Segment] = {}
        changed: dict[str, _Facts] = {}
        for operation in group:
            (session_id,) = operation.session_ids
            facts = known.get(session_id)
            try:
                if isinstance(operation, Create):
                    if facts is not None:
                        raise StoreRefused(f"session {session_id} exists already")
                    facts = known[session_id] = self._known[session_id] = self._born(operation, born)
                else:
                    assert isinstance(operation, Append)
                    if facts is None:
                        raise StoreRefused(f"session {session_id} is not known")
                    check(session_id, facts.head, operation.batch)
                    self._apply(facts, operation, written)
            except StoreRefused as exc:
                operation.error = exc
            else:
                changed[session_id] = facts
        for one in written.values():
            segments.add((one.id, one.session, one.first, one.events, one.size), one.padded())
        for facts in changed.values():
            facts.close_group()
            numbers, open_inputs = facts.row()
            rows.add(numbers, open_inputs)
        # A quarter more than the bound may pile up, so that a trim is paid once in a while and not every time.
        outgrown = [
            facts
            for facts in changed.values()
            if facts.events > self._max_events * 5 // 4 or facts.size > self._max_bytes * 5 // 4
        ]
        if outgrown:
            self._execute("BEGIN IMMEDIATE")
        if rows:
            values = (*born.values(), *segments.values(), *rows.values())
            try:
                self._execute(_WRITE, self._token, *values)
            except sqlite3.IntegrityError as exc:
                assert self._connection is not None
                check_token(self._connection, self._path, self._token)
                if isinstance(group[0], Create) and len(group) == 1:
                    raise StoreRefused(f"session {group[0].record.session_id} exists already") from exc
                raise
        if outgrown:
            for facts in outgrown:
                self._trim(facts)
                del self._known[facts.session_id]
            self._execute("COMMIT")

    def _recall(self, group: Sequence[Operation]) -> dict[str, _Facts]:
        """The facts of the group's sessions: remembered, or read. A session to be created is taken for new; if it is
        not, the file will say so."""
        again = {
            operation.session_ids[0]
            for operation in group
            if isinstance(operation, Append) and retried(operation.batch)
        }
        known: dict[str, _Facts] = {}
        unknown: set[str] = set()
        new: set[str] = set()
        for operation in group:
            (session_id,) = operation.session_ids
            facts = self._known.get(session_id)
            if facts is not None and session_id not in again:
                known[session_id] = facts
            elif isinstance(operation, Create):
                new.add(session_id)
            elif session_id not in new:
                unknown.add(session_id)
        if unknown:
            known |= self._read_facts(sorted(unknown), again)
            if len(self._known) > KNOWN_MOST:
                self._known.clear()
            self._known |= known
        return known

    def _read_facts(self, session_ids: list[str], again: set[str]) -> dict[str, _Facts]:
        """From the file; for those in `again` with the inputs that an earlier turn had, and whose event is still
        there."""
        assert self._connection is not None
        rows = self._json(
            """SELECT json_group_array(json_array(
                s.session_id, s.id, s.reserved, s.head, s.floor, s.events, s.bytes, s.turn, s.active_at,
                CAST(s.inputs AS TEXT), n.id, n.first, n.events, n.bytes, CAST(n.lines AS TEXT)))
            FROM sessions AS s LEFT JOIN segments AS n ON n.bytes + n.events < ? AND n.id = (
                SELECT id FROM segments WHERE session = s.id ORDER BY first DESC LIMIT 1)
            WHERE s.session_id IN (SELECT value FROM json_each(?))""",
            SEGMENT,
            _dump(session_ids),
        )
        known: dict[str, _Facts] = {}
        for row in rows:
            facts = known[row[0]] = _Facts(*row[:9])
            facts.newest = _segment(facts.id, *row[10:])
            for seq, has_turn in orjson.loads(row[9]):
                for line in fetch(self._connection, facts.id, seq - 1, seq):
                    request_id = orjson.loads(line.payload)["request_id"]
                    facts.inputs[seq] = OpenInput(request_id, facts.turn if has_turn else None)
            if facts.session_id in again:
                self._read_done(facts)
        return known

    def _read_done(self, facts: _Facts) -> None:
        """Add the inputs that are done with, as far as their events are there."""
        assert self._connection is not None
        every: dict[int, OpenInput] = {}
        turn = None
        for line in fetch(self._connection, facts.id, -1, facts.head):
            if line.type in _OF_INPUTS:
                event = decode_event(line.payload)
                if type(event) is Input:
                    every[event.seq] = OpenInput(event.request_id)
                turn = fold(event, every, turn)
        facts.inputs = {**every, **facts.inputs}

    def _born(self, operation: Create, born: _Rows) -> _Facts:
        r = operation.record
        facts = _Facts(r.session_id, self._next_id, operation.reserved, 0, 0, 0, 0, None, r.created_at)
        self._next_id += 1
        texts = (r.session_id, r.agent_id, r.subject, r.epoch)
        born.add((facts.id, r.created_at, facts.reserved), *[text.encode() for text in texts])
        return facts

    def _new_segment(self, facts: _Facts, first: int) -> Segment:
        self._last_segment += 1
        return Segment(self._last_segment, facts.id, first)

    def _apply(self, facts: _Facts, operation: Append, written: dict[int, Segment]) -> None:
        """Fold a checked batch into its session's facts and put it into segments, which become `written`."""
        for item in operation.batch:
            event = item.event
            segment = facts.newest
            if segment is None or segment.events >= self._most or len(segment.lines) + len(item.payload) >= self._room:
                segment = facts.newest = self._new_segment(facts, event.seq)
            segment.add(item.payload, item.on_busy)
            written[segment.id] = segment
            facts.head = event.seq
            facts.active_at = max(facts.active_at, event.at)
            if type(event) is Input:
                facts.inputs[event.seq] = OpenInput(event.request_id)
                facts.folded = True
            elif type(event) in FOLDED:
                facts.turn = fold(event, facts.inputs, facts.turn)
                facts.folded = True
        facts.events += len(operation.batch)
        facts.size += operation.size
        facts.reserved = max(facts.reserved, operation.reserved, facts.head)

    def _trim(self, facts: _Facts) -> None:
        """Bring a session back within its bounds, whole segments at a time. Its state, waiting inputs, open turn and
        open questions stay."""
        assert self._connection is not None
        rows = self._json(
            "SELECT json_group_array(json_array(first, events, bytes)) FROM segments WHERE session = ? AND first > ?",
            facts.id,
            facts.floor,
        )
        oldest, events, size = facts.head, 0, 0
        for first, count, length in sorted(rows, reverse=True):
            # An event that is alone may be large. Of several, some may still fit.
            fits = events < self._max_events and size + (length if count == 1 else 1) <= self._max_bytes
            if events and not fits:
                break
            oldest, events, size = first, events + count, size + length
        else:
            return
        gone = fetch(self._connection, facts.id, -1, oldest - 1)
        floor = gone[-1].seq
        patches = [line.payload for line in gone if line.type == b"state"]
        if patches:
            (raw,) = self._execute("SELECT state FROM sessions WHERE id = ?", facts.id).fetchone()
            state = orjson.loads(raw)
            for patch in patches:
                state = merge_patch(state, orjson.loads(patch)["patch"])
            self._execute("UPDATE sessions SET state = ? WHERE id = ?", orjson.dumps(state), facts.id)
        needed = set(facts.inputs)
        if facts.turn is not None:
            needed |= {facts.turn, *open_asks(fetch(self._connection, facts.id, facts.turn, facts.head)).values()}
        keys = _Rows()
        for line in gone:
            if line.type == b"input" and line.seq not in needed:
                request_id, key = key_of(line)
                keys.add((facts.id, key.seq, key.at), request_id.encode(), key.digest)
        self._execute(_KEEP_KEYS, *keys.values())
        self._execute("DELETE FROM segments WHERE session = ? AND first <= ?", facts.id, floor)
        if kept := [line for line in gone if line.seq in needed]:
            segment = self._new_segment(facts, kept[0].seq)
            for line in kept:
                segment.add(line.payload, line.on_busy)
            self._execute(
                "INSERT INTO segments (id, session, first, events, bytes, lines) VALUES (?, ?, ?, ?, ?, ?)",
                segment.id,
                segment.session,
                segment.first,
                segment.events,
                segment.size,
                segment.lines,
            )
        self._execute(
            "UPDATE sessions SET floor = ?, events = ?, bytes = ? WHERE id = ?", floor, events, size, facts.id
        )

    # maintenance

    def remove(self, session_ids: Sequence[str], *, idle_since: int | None = None) -> tuple[int, int]:
        """Delete sessions; returns how many and their bytes.

        Args:
            idle_since: leave those with later activity (ms), waiting inputs or an open turn.
        """
        rows = self._json(
            f"""SELECT json_group_array(json_array(id, bytes)) FROM sessions
            WHERE session_id IN (SELECT value FROM json_each(?1)) AND (?2 IS NULL OR active_at <= ?2 AND {FINISHED})""",
            _dump(list(session_ids)),
            idle_since,
        )
        ids = _dump([row[0] for row in rows])
        self._execute("DELETE FROM segments WHERE session IN (SELECT value FROM json_each(?))", ids)
        self._execute("DELETE FROM keys WHERE session IN (SELECT value FROM json_each(?))", ids)
        self._execute("DELETE FROM sessions WHERE id IN (SELECT value FROM json_each(?))", ids)
        return len(rows), sum(row[1] for row in rows)

    def expire_keys(self, sessions: Sequence[int], before: int) -> None:
        """Delete the keys that are older than `before` (ms) and whose events are gone."""
        self._execute(
            "DELETE FROM keys WHERE at < ? AND session IN (SELECT value FROM json_each(?))",
            before,
            _dump(list(sessions)),
        )

    def _execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        assert self._connection is not None
        return self._connection.execute(sql, values)

    def _json(self, sql: str, *values: Any) -> Any:
        (text,) = self._execute(sql, *values).fetchone()
        return orjson.loads(text)


def _segment(session: int, id_: int | None, first: int, events: int, size: int, lines: str) -> Segment | None:
    """As it was read from the file, if there is one."""
    return None if id_ is None else Segment(id_, session, first, events, size, lines.rstrip("\n").encode() + b"\n")


def _writing(connection: sqlite3.Connection) -> sqlite3.Connection:
    """Prepare a connection for `_WRITE`."""
    for statement in _SCHEMA:
        connection.execute(statement)
    return connection


def _may_be_one(exc: Exception) -> bool:
    """Whether one operation of a group may be to blame: it is too large, or cannot be stored."""
    if not isinstance(exc, sqlite3.Error):
        return not isinstance(exc, StoreError)
    return getattr(exc, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL or not isinstance(
        explain(exc, ""), StoreUnavailable
    )


def _dump(value: Any) -> str:
    return orjson.dumps(value).decode()
