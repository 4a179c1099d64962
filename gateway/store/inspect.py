"""Looking into a store file from outside, read-only: also while a gateway has it open."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote

from attrs import field, frozen

from gateway.errors import StoreUnusable
from gateway.store import sqlite_reader
from gateway.store.base import StoredSession
from gateway.store.sqlite_file import check_schema, explain


@frozen
class Summary:
    """A stored session in numbers. Times in ms, sizes in bytes; `floor` and `head` are its oldest and newest cursor."""

    session_id: str
    agent_id: str
    subject: str
    created_at: int
    active_at: int
    floor: int
    head: int
    events: int
    size: int
    waiting: int
    in_turn: bool = field(converter=bool)


@contextmanager
def open_read_only(path: str) -> Iterator[sqlite3.Connection]:
    """A connection that can change nothing.

    Raises:
        StoreUnusable: there is no such file, or it is no store; the message says what to do.
    """
    path = os.path.realpath(os.path.expanduser(path))
    if not os.path.exists(path):
        raise StoreUnusable(f"{path}: there is no such file; give the path that the gateway printed at its start")
    try:
        connection = sqlite3.connect(f"file:{quote(path)}?mode=ro", uri=True, timeout=2.0, isolation_level=None)
    except sqlite3.Error as exc:
        raise explain(exc, path, opening=True) from exc
    try:
        if not check_schema(connection, path):
            raise StoreUnusable(f"{path}: is empty; nothing was ever stored in it")
        yield connection
    except sqlite3.Error as exc:
        raise explain(exc, path, opening=True) from exc
    finally:
        connection.close()


def summaries(path: str, session_id: str | None = None) -> list[Summary]:
    """All stored sessions, the most recently active first; or the one with that id."""
    with open_read_only(path) as connection:
        rows = connection.execute(
            """SELECT session_id, agent_id, subject, created_at, active_at, floor, max(head, floor), events, bytes,
                waiting, turn IS NOT NULL
            FROM sessions WHERE ? IS NULL OR session_id = ? ORDER BY active_at DESC, id DESC""",
            (session_id, session_id),
        )
        return [Summary(*row) for row in rows]


def read_session(path: str, session_id: str) -> StoredSession | None:
    """One session with every event that is kept of it."""
    with open_read_only(path) as connection:
        return sqlite_reader.load(connection, session_id, 2**62, 2**62, 2**62)
