"""What the reading side of a `SqliteStore` asks, on a connection of its own. Each function is one consistent look.

As in the writer, few steps: a session's events come as one value, not as thousands of rows.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b

import orjson
from attrs import frozen

from gateway.errors import FrameError, StoreUnusable
from gateway.protocol.codec import decode_event
from gateway.protocol.keys import Key
from gateway.protocol.messages import Event, Input, TurnStarted
from gateway.protocol.patch import merge_patch
from gateway.store.base import SessionRecord, StoredInput, StoredSession
from gateway.store.sqlite_segments import Line, fetch, key_of, open_asks

FINISHED = "turn IS NULL AND waiting = 0"
"""The sessions without an open turn and waiting inputs."""


@contextmanager
def _one_look(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN")
    try:
        yield
    finally:
        if connection.in_transaction:
            connection.execute("COMMIT")


def load(
    connection: sqlite3.Connection, session_id: str, max_events: int, max_bytes: int, tail_bytes: int = 1 << 62
) -> StoredSession | None:
    """A session with its newest events within those bounds; see `gateway.store.Store.load`.

    Raises:
        StoreUnusable: what is stored for it cannot be read.
    """
    with _one_look(connection):
        row = connection.execute(
            """SELECT id, agent_id, subject, epoch, sessions.generation, created_at, reserved, floor, turn, inputs,
                state, (SELECT value FROM meta WHERE name = 'generation')
            FROM sessions WHERE session_id = ?""",
            (session_id,),
        ).fetchone()
        if row is None:
            return None
        id_, agent_id, subject, epoch, born_in, created_at, reserved, floor, turn, inputs, state, generation = row
        lines = fetch(connection, id_, -1, 1 << 62)
        (text,) = connection.execute(
            "SELECT json_group_array(json_array(request_id, seq, hex(digest), at)) FROM keys WHERE session = ?", (id_,)
        ).fetchone()
    below, tail = _window(lines, floor, max_events, max_bytes, tail_bytes)
    if turn is not None:
        tail = max(below, min(tail, turn - 1))
    open_ = orjson.loads(inputs)
    wanted = {seq for seq, _ in open_} | {turn}
    on_busy = {line.seq: line.on_busy for line in lines if line.seq in wanted}
    kept = {line.seq: _decode(line) for line in lines if line.seq > tail or line.seq in wanted}
    merged = orjson.loads(state)
    for line in lines:
        if line.type == b"state":
            merged = merge_patch(merged, orjson.loads(line.payload)["patch"])
    waiting: list[StoredInput] = []
    taken: list[StoredInput] = []
    for seq, has_turn in open_:
        event = kept.get(seq)
        if not isinstance(event, Input):
            raise StoreUnusable(f"session {session_id}: the stored input {seq} is missing; restore a backup")
        (taken if has_turn else waiting).append(StoredInput(event, on_busy[seq]))
    keys = [(request_id, Key(seq, bytes.fromhex(digest), at)) for request_id, seq, digest, at in orjson.loads(text)]
    keys += [key_of(line) for line in lines if line.type == b"input"]
    newest = dict(sorted(keys, key=lambda item: item[1].seq))
    started = None if turn is None else kept.get(turn)
    if turn is not None and not isinstance(started, TurnStarted):
        raise StoreUnusable(f"session {session_id}: the stored turn {turn} is missing; restore a backup")
    return StoredSession(
        record=SessionRecord(session_id, agent_id, subject, _epoch(epoch, born_in, generation), created_at),
        reserved=reserved,
        floor=below,
        state=merged,
        events=[event for event in kept.values() if event.seq > tail],
        older=[(line.seq, len(line.payload)) for line in lines if below < line.seq <= tail],
        queue=waiting,
        turn=started,  # type: ignore[arg-type]
        turn_inputs=taken,
        asks=[] if turn is None else list(open_asks([line for line in lines if line.seq > turn])),
        keys=sorted(newest.items(), key=lambda item: item[1].at),
    )


def read(connection: sqlite3.Connection, session_id: str, after: int, upto: int) -> list[Event]:
    """A session's events with ``after < seq <= upto``.

    Raises:
        StoreUnusable: one of them cannot be read.
    """
    with _one_look(connection):
        row = connection.execute("SELECT id, floor FROM sessions WHERE session_id = ?", (session_id,)).fetchone()
        lines = [] if row is None else fetch(connection, row[0], max(after, row[1]), upto)
    return [_decode(line) for line in lines]


def _epoch(epoch: str, born_in: str, generation: str) -> str:
    """The session's epoch in this generation: its own in the one it was born in, another one in every other.

    It follows from what is stored, so that nothing needs to be written, and stays the same until the next bump.
    """
    if born_in == generation:
        return epoch
    return "e_" + blake2b(f"{epoch}\0{generation}".encode(), digest_size=12).hexdigest()


def _window(lines: Sequence[Line], floor: int, max_events: int, max_bytes: int, tail_bytes: int) -> tuple[int, int]:
    """The newest numbers that do not fit any more: into the window, and into the part of it that is loaded. The newest
    event fits, however large."""
    below, tail, size = floor, floor, 0
    for count, line in enumerate(reversed(lines), 1):
        size += len(line.payload)
        if line.seq <= floor:
            break
        if count > 1 and size > tail_bytes:
            tail = max(tail, line.seq)
        if count > 1 and (count > max_events or size > max_bytes):
            below = line.seq
            break
    return below, max(below, tail)


def _decode(line: Line) -> Event:
    try:
        return decode_event(line.payload)
    except FrameError as exc:
        raise StoreUnusable(f"a stored event cannot be read ({exc}); restore a backup, or upgrade") from exc


def unfinished(connection: sqlite3.Connection) -> list[str]:
    """Ids of the sessions with an open turn or waiting inputs, oldest activity first."""
    (text,) = connection.execute(
        f"""SELECT json_group_array(session_id) FROM (
            SELECT session_id FROM sessions WHERE NOT ({FINISHED}) ORDER BY active_at, id)"""
    ).fetchone()
    ids: list[str] = orjson.loads(text)
    return ids


def totals(connection: sqlite3.Connection) -> tuple[int, int]:
    """How many sessions there are, and the bytes of their events."""
    count, size = connection.execute("SELECT count(*), coalesce(sum(bytes), 0) FROM sessions").fetchone()
    return count, size


@frozen
class Idle:
    """A session that may be removed. `size` in bytes, `active_at` in ms."""

    active_at: int
    id: int
    session_id: str
    size: int
    events: int


def idle_since(connection: sqlite3.Connection, at: int, after: tuple[int, int], limit: int) -> list[Idle]:
    """Sessions without activity after `at` (ms) and with nothing unfinished, longest idle first.

    Args:
        after: continue behind this (`active_at`, `id`).
    """
    (text,) = connection.execute(
        f"""SELECT json_group_array(json_array(active_at, id, session_id, bytes, events)) FROM (
            SELECT * FROM sessions WHERE active_at <= ? AND (active_at, id) > (?, ?) AND {FINISHED}
            ORDER BY active_at, id LIMIT ?)""",
        (at, *after, limit),
    ).fetchone()
    return [Idle(*row) for row in sorted(orjson.loads(text))]


def sessions_with_keys_before(connection: sqlite3.Connection, at: int, after: int, limit: int) -> Sequence[int]:
    """Sessions (their row numbers, above `after`) with keys in ``keys`` that are older than `at` (ms)."""
    (text,) = connection.execute(
        """SELECT json_group_array(session) FROM (
            SELECT DISTINCT session FROM keys WHERE at < ? AND session > ? ORDER BY session LIMIT ?)""",
        (at, after, limit),
    ).fetchone()
    ids: list[int] = orjson.loads(text)
    return sorted(ids)
