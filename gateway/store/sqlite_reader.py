"""What the reading side of a `SqliteStore` asks, on a connection of its own. Each function is one consistent look.

As in the writer, few steps: a session's events come as one value, not as thousands of rows.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import orjson
from attrs import frozen

from gateway.errors import FrameError, StoreUnusable
from gateway.protocol.codec import decode_event
from gateway.protocol.keys import Key
from gateway.protocol.messages import Event, Input, TurnStarted
from gateway.protocol.patch import merge_patch
from gateway.store.base import SessionRecord, StoredInput, StoredSession

OPEN_ASKS = """SELECT seq, payload FROM events WHERE session = :session AND seq > :turn AND type = 'ask'
    AND json_extract(CAST(payload AS TEXT), '$.ask_id') NOT IN (
        SELECT json_extract(CAST(payload AS TEXT), '$.ask_id') FROM events
        WHERE session = :session AND seq > :turn AND type = 'answered') ORDER BY seq"""
"""The questions of the open turn that nobody has answered. They are kept for as long as they are open."""


WAITING = "inputs.turn IS NULL AND inputs.withdrawn = 0"
"""The inputs that no turn has taken."""

DONE = """(inputs.withdrawn = 1 OR inputs.turn IS NOT NULL AND inputs.turn IS NOT (
    SELECT s.turn FROM sessions AS s WHERE s.id = inputs.session))"""
"""The inputs that were withdrawn or had a turn that is over."""


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
            """SELECT id, agent_id, subject, epoch, sessions.generation, created_at, reserved, floor, turn, state,
                (SELECT value FROM meta WHERE name = 'generation')
            FROM sessions WHERE session_id = ?""",
            (session_id,),
        ).fetchone()
        if row is None:
            return None
        id_, agent_id, subject, epoch, born_in, created_at, reserved, floor, turn, state, generation = row
        # The first event that does not fit any more, counted from the newest.
        below, tail = connection.execute(
            """SELECT max(seq) FILTER (WHERE n > ?3 OR total > ?4), max(seq) FILTER (WHERE total > ?5) FROM (
                SELECT seq, row_number() OVER newest AS n, sum(length(payload)) OVER newest AS total
                FROM events WHERE session = ?1 AND seq > ?2 WINDOW newest AS (ORDER BY seq DESC))
            WHERE n > 1""",
            (id_, floor, max_events, max_bytes, tail_bytes),
        ).fetchone()
        if below is not None:
            floor = below
        tail = max(floor, tail or 0)
        if turn is not None:
            tail = max(floor, min(tail, turn - 1))
        (text,) = connection.execute(
            """SELECT json_group_array(json_array(seq, length(payload))) FROM events
            WHERE session = ? AND seq > ? AND seq <= ?""",
            (id_, floor, tail),
        ).fetchone()
        older = sorted((seq, size) for seq, size in orjson.loads(text))
        events = _events(connection, "session = ? AND seq > ?", (id_, tail))
        patches = _payloads(connection, "session = ? AND type = 'state'", (id_,))
        (text,) = connection.execute(
            """SELECT json_group_array(json_array(seq, request_id, hex(digest), at, on_busy, turn, withdrawn))
            FROM inputs WHERE session = ?""",
            (id_,),
        ).fetchone()
        inputs = sorted(orjson.loads(text))
        open_ = {row[0] for row in inputs if (not row[6] if row[5] is None else row[5] == turn)}
        asks: list[str] = []
        if turn is not None:
            (text,) = connection.execute(
                f"SELECT json_group_array(json_extract(CAST(payload AS TEXT), '$.ask_id')) FROM ({OPEN_ASKS})",
                {"session": id_, "turn": turn},
            ).fetchone()
            asks = orjson.loads(text)
        wanted = sorted(open_) + ([] if turn is None else [turn])
        kept = {event.seq: event for event in events}
        if missing := [seq for seq in wanted if seq not in kept]:
            where = "session = ? AND seq IN (SELECT value FROM json_each(?))"
            kept.update((event.seq, event) for event in _events(connection, where, (id_, orjson.dumps(missing))))
    merged = orjson.loads(state)
    for patch in patches:
        merged = merge_patch(merged, orjson.loads(patch)["patch"])
    waiting: list[StoredInput] = []
    taken: list[StoredInput] = []
    keys: dict[str, Key] = {}
    for seq, request_id, digest, at, on_busy, in_turn, _ in inputs:
        keys.pop(request_id, None)
        keys[request_id] = Key(seq, bytes.fromhex(digest), at)
        if seq in open_:
            event = kept.get(seq)
            if not isinstance(event, Input):
                raise StoreUnusable(f"session {session_id}: the stored input {seq} is missing; restore a backup")
            (waiting if in_turn is None else taken).append(StoredInput(event, on_busy))
    started = None if turn is None else kept.get(turn)
    if turn is not None and not isinstance(started, TurnStarted):
        raise StoreUnusable(f"session {session_id}: the stored turn {turn} is missing; restore a backup")
    return StoredSession(
        record=SessionRecord(session_id, agent_id, subject, _epoch(epoch, born_in, generation), created_at),
        reserved=reserved,
        floor=floor,
        state=merged,
        events=events,
        older=older,
        queue=waiting,
        turn=started,  # type: ignore[arg-type]
        turn_inputs=taken,
        asks=asks,
        keys=sorted(keys.items(), key=lambda item: item[1].at),
    )


def read(connection: sqlite3.Connection, session_id: str, after: int, upto: int) -> list[Event]:
    """A session's events with ``after < seq <= upto``.

    Raises:
        StoreUnusable: one of them cannot be read.
    """
    where = "session = (SELECT id FROM sessions WHERE session_id = ?) AND seq > ? AND seq <= ?"
    return _events(connection, where, (session_id, after, upto))


def _epoch(epoch: str, born_in: str, generation: str) -> str:
    """The session's epoch in this generation: its own in the one it was born in, another one in every other.

    It follows from what is stored, so that nothing needs to be written, and stays the same until the next bump.
    """
    if born_in == generation:
        return epoch
    return "e_" + blake2b(f"{epoch}\0{generation}".encode(), digest_size=12).hexdigest()


def _payloads(connection: sqlite3.Connection, where: str, values: tuple[Any, ...]) -> list[bytes]:
    # JSON as the codec writes it has no line break, so it can part the events.
    (joined,) = connection.execute(
        f"""SELECT CAST(group_concat(payload, char(10)) AS BLOB)
        FROM (SELECT payload FROM events WHERE {where} ORDER BY session, seq)""",
        values,
    ).fetchone()
    return joined.split(b"\n") if joined is not None else []


def _events(connection: sqlite3.Connection, where: str, values: tuple[Any, ...]) -> list[Event]:
    try:
        events = [decode_event(payload) for payload in _payloads(connection, where, values)]
    except FrameError as exc:
        raise StoreUnusable(f"a stored event cannot be read ({exc}); restore a backup, or upgrade") from exc
    events.sort(key=lambda event: event.seq)
    return events


def unfinished(connection: sqlite3.Connection) -> list[str]:
    """Ids of the sessions with an open turn or waiting inputs, oldest activity first."""
    (text,) = connection.execute(
        f"""SELECT json_group_array(session_id) FROM (
            SELECT session_id FROM sessions WHERE id IN (
                SELECT id FROM sessions WHERE turn IS NOT NULL UNION SELECT session FROM inputs WHERE {WAITING})
            ORDER BY active_at, id)"""
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
            SELECT * FROM sessions AS s WHERE active_at <= ? AND (active_at, id) > (?, ?) AND turn IS NULL
            AND NOT EXISTS (SELECT 1 FROM inputs WHERE session = s.id AND {WAITING})
            ORDER BY active_at, id LIMIT ?)""",
        (at, *after, limit),
    ).fetchone()
    return [Idle(*row) for row in sorted(orjson.loads(text))]


def sessions_with_keys_before(connection: sqlite3.Connection, at: int, after: int, limit: int) -> Sequence[int]:
    """Sessions (their row numbers, above `after`) with keys that are done with and older than `at` (ms)."""
    (text,) = connection.execute(
        f"""SELECT json_group_array(session) FROM (
            SELECT DISTINCT session FROM inputs WHERE at < ? AND session > ? AND {DONE}
            ORDER BY session LIMIT ?)""",
        (at, after, limit),
    ).fetchone()
    ids: list[int] = orjson.loads(text)
    return sorted(ids)
