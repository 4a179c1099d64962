"""The SQLite file: who may write it, its schema, and what its errors mean to an operator."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import sqlite3
from collections.abc import Callable
from typing import Literal

from gateway.errors import StoreError, StoreFenced, StoreRefused, StoreUnavailable, StoreUnusable
from gateway.store.sqlite_segments import SCHEMA as SEGMENTS

Durability = Literal["full", "normal"]
Connect = Callable[[str, float], sqlite3.Connection]
"""Makes a connection from a path and a busy timeout in seconds. Tests put their faults here."""

APPLICATION_ID = 0x74726777  # "trgw", so that another program's database is not taken for ours

OLDEST_SQLITE = (3, 35, 0)  # UPDATE … FROM, window functions, JSON

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    # 1
    (
        "CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID",
        # `writer` counts those who have opened the file for writing; the last one holds the token.
        "INSERT INTO meta VALUES ('writer', 0)",
        # `generation` names this file's history. A session that was born in another one gets a new epoch.
        "INSERT INTO meta VALUES ('generation', '1-' || lower(hex(randomblob(8))))",
        # floor: newest number not kept any more. events, bytes: what is kept above it. turn: `seq` of the open
        # turn_started. inputs: those that no finished turn has had, as [seq, whether that turn has it];
        # waiting: how many it has not. Their events are kept for as long. state: patches up to `floor` merged; later
        # ones are among the events. No index on turn or waiting: it would be one more page of every transaction, for
        # one look at each start.
        """CREATE TABLE sessions (
            id INTEGER PRIMARY KEY, session_id TEXT NOT NULL UNIQUE, agent_id TEXT NOT NULL, subject TEXT NOT NULL,
            epoch TEXT NOT NULL, generation TEXT NOT NULL, created_at INTEGER NOT NULL, active_at INTEGER NOT NULL,
            reserved INTEGER NOT NULL, head INTEGER NOT NULL DEFAULT 0, floor INTEGER NOT NULL DEFAULT 0,
            events INTEGER NOT NULL DEFAULT 0, bytes INTEGER NOT NULL DEFAULT 0, turn INTEGER,
            inputs BLOB NOT NULL DEFAULT '[]', waiting INTEGER NOT NULL DEFAULT 0, state BLOB NOT NULL DEFAULT '{}')""",
        *SEGMENTS,
        # An input's event is its idempotency key as well. When the event goes, the key comes here.
        """CREATE TABLE keys (
            session INTEGER NOT NULL, seq INTEGER NOT NULL, at INTEGER NOT NULL, request_id TEXT NOT NULL,
            digest BLOB NOT NULL, PRIMARY KEY (session, seq)) WITHOUT ROWID""",
    ),
)
"""The schema, as the steps that lead to it: entry *n* - 1 leads from version *n* - 1 to *n*. Never change an entry that
was released; add one."""


def _connect(path: str, timeout: float) -> sqlite3.Connection:
    # Autocommit mode: transactions are begun and ended by name. Each connection is used by one thread at a time.
    return sqlite3.connect(path, timeout=timeout, isolation_level=None, check_same_thread=False, cached_statements=256)


def explain(exc: Exception, path: str, *, opening: bool = False) -> StoreError:
    """What an error of SQLite, or of the operating system, means, and what to do about it."""
    if isinstance(exc, StoreError):
        return type(exc)(str(exc))  # a new one for each who gets it: tracebacks do not mix
    if isinstance(exc, OSError):
        return StoreUnusable(f"{path}: {_OS_ADVICE.get(exc.errno or 0, exc.strerror or exc)}")
    if not isinstance(exc, sqlite3.Error):
        return StoreRefused(f"{path}: this cannot be stored: {exc!r}")
    code = getattr(exc, "sqlite_errorcode", None)
    primary = code & 0xFF if code is not None else None
    if primary in _DAMAGE:
        return StoreUnusable(f"{path}: {_DAMAGE[primary]}")
    advice = f"{_ADVICE.get(primary, '')} ({exc})".lstrip() if primary in _ADVICE else str(exc)
    if opening and primary == sqlite3.SQLITE_ERROR:
        advice = f"has not the tables of this version; move that file away, or give another path ({exc})"
    if opening:
        return StoreUnusable(f"{path}: {advice}")
    if primary in _ADVICE or (primary is None and isinstance(exc, sqlite3.OperationalError)):
        return StoreUnavailable(f"{path}: {advice}")
    return StoreRefused(f"{path}: this cannot be stored: {exc}")


_PERMISSION = "cannot be written; check owner and permissions of the file and of its directory"
_OS_ADVICE = {
    errno.ENOENT: "its directory does not exist; create it, or give another path",
    errno.ENOTDIR: "a part of its directory is a file; give another path",
    errno.EISDIR: "is a directory; give the path of a file in it",
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EROFS: "is on a read-only file system; give another path",
    errno.ENOSPC: "the disk is full; make room",
}
_DAMAGE = {
    sqlite3.SQLITE_NOTADB: "is not an SQLite database; give another path, or move that file away",
    sqlite3.SQLITE_CORRUPT: "is damaged; restore a backup and run `sessions new-epoch` on it, "
    "or save what is left with `sqlite3 FILE .recover`",
}
_ADVICE = {
    sqlite3.SQLITE_BUSY: "is locked by another program; end it",
    sqlite3.SQLITE_LOCKED: "is locked by another program; end it",
    sqlite3.SQLITE_READONLY: _PERMISSION,
    sqlite3.SQLITE_PERM: _PERMISSION,
    sqlite3.SQLITE_CANTOPEN: "cannot be opened; check that its directory exists and may be written",
    sqlite3.SQLITE_FULL: "the disk is full; make room",
    sqlite3.SQLITE_IOERR: "the disk reports an error",
    sqlite3.SQLITE_NOMEM: "out of memory",
    sqlite3.SQLITE_PROTOCOL: "its locks do not work; WAL needs a local file system",
}


class WriterLock:
    """The right to write a store file, held by one process at a time and freed by the kernel when it ends.

    It is an advisory lock on ``PATH-lock``, not on the file: closing any descriptor of the file itself would drop
    the locks of SQLite. That file stays behind; removing it would let two processes lock two different ones.
    """

    def __init__(self, path: str) -> None:
        try:
            self._fd = os.open(path + "-lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as exc:
            raise explain(exc, path) from exc
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            holder = os.read(self._fd, 32).decode("ascii", "replace").strip()
            os.close(self._fd)
            who = f"process {holder}" if holder else "another process"
            raise StoreUnusable(
                f"{path}: is in use by {who}; end it, or give this gateway a file of its own (--store sqlite:PATH)"
            ) from exc
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, b"%d\n" % os.getpid(), 0)

    def release(self) -> None:
        """Let another process write."""
        os.close(self._fd)


def connect(path: str, durability: Durability, busy_timeout: float, make: Connect | None = None) -> sqlite3.Connection:
    """A connection to a file that exists, in WAL mode.

    Raises:
        StoreUnusable: it cannot be opened, is no database, is of a newer version or of another program.
    """
    connection: sqlite3.Connection | None = None
    try:
        connection = (make or _connect)(path, busy_timeout)
        # Before anything that writes: another program's file, or a newer one, stays as it is.
        check_schema(connection, path)
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise StoreUnusable(f"{path}: WAL mode is not available there; it needs a local file system")
        connection.execute(f"PRAGMA synchronous = {'FULL' if durability == 'full' else 'NORMAL'}")
        # On macOS an fsync alone may stop at the drive's cache; elsewhere this has no effect.
        connection.execute("PRAGMA fullfsync = ON")
        connection.execute("PRAGMA temp_store = MEMORY")
        # 32 MiB: what the largest transactions change (a page or two per session) fits, so it is written once.
        connection.execute("PRAGMA cache_size = -32768")
        # 64 MiB: only if `sqlite_checkpoint` does not keep up.
        connection.execute("PRAGMA wal_autocheckpoint = 16384")
        # What a burst made of the WAL beyond that is given back.
        connection.execute("PRAGMA journal_size_limit = 67108864")
    except BaseException as exc:
        if connection is not None:
            connection.close()
        raise_explained(exc, path)
        raise
    return connection


def raise_explained(exc: BaseException, path: str) -> None:
    """Raise what an error of SQLite means to whoever opens a store; nothing for any other exception."""
    if isinstance(exc, sqlite3.Error):
        raise explain(exc, path, opening=True) from exc


def prepare(connection: sqlite3.Connection, path: str) -> int:
    """Bring the schema to this version and take the writer's token, in one transaction. Returns the token.

    Raises:
        StoreUnusable: the file is damaged, locked, full or read-only.
    """
    try:
        connection.execute("BEGIN IMMEDIATE")
        version = check_schema(connection, path)
        for number in range(version, len(MIGRATIONS)):
            for statement in MIGRATIONS[number]:
                connection.execute(statement)
        if version < len(MIGRATIONS):
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        connection.execute("UPDATE meta SET value = value + 1 WHERE name = 'writer'")
        (token,) = connection.execute("SELECT value FROM meta WHERE name = 'writer'").fetchone()
        connection.execute("COMMIT")
    except sqlite3.Error as exc:
        raise explain(exc, path, opening=True) from exc
    assert isinstance(token, int)
    return token


def check_schema(connection: sqlite3.Connection, path: str) -> int:
    """The schema version of the file, 0 for an empty one.

    Raises:
        StoreUnusable: it is of a newer version, or of another program.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application != APPLICATION_ID and (tables or version or application):
        raise StoreUnusable(f"{path}: is a database of another program; give another path")
    if version > len(MIGRATIONS):
        raise StoreUnusable(
            f"{path}: was written by a newer trio-gateway (schema {version}, this one knows {len(MIGRATIONS)}); "
            "upgrade, or give another path"
        )
    assert isinstance(version, int)
    return version


def check_token(connection: sqlite3.Connection, path: str, token: int) -> None:
    """Raise `StoreFenced` unless `token` is the newest. It never becomes that again."""
    (newest,) = connection.execute("SELECT value FROM meta WHERE name = 'writer'").fetchone()
    if newest != token:
        raise StoreFenced(f"{path}: another process has opened it for writing; end one of the two")


def open_file(path: str) -> int:
    """Open the file, and create it if it does not exist, readable by its owner only: it holds conversations.

    Returns its descriptor. Close it after all connections to the file: closing any descriptor drops the locks that
    SQLite has on it in this process.
    """
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        need = ".".join(map(str, OLDEST_SQLITE))
        raise StoreUnusable(f"Python's SQLite is {sqlite3.sqlite_version}; the sqlite store needs {need} or later")
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as exc:
        raise explain(exc, path) from exc


def new_epoch(path: str) -> str:
    """Declare the history of a store file unproven: every session in it gets a new epoch when it is next loaded.

    For a file that was restored from a backup. Cursors of clients mean nothing in a new epoch, so each gets a snapshot.
    Blocks for a few milliseconds. Returns the file's new generation.

    Raises:
        StoreUnusable: it cannot be opened, or a gateway has it open.
    """
    path = os.path.realpath(os.path.expanduser(path))
    if not os.path.exists(path):
        raise StoreUnusable(f"{path}: there is no such file")
    lock = WriterLock(path)
    try:
        connection = connect(path, "full", 1.0)
        try:
            prepare(connection, path)
            (old,) = connection.execute("SELECT value FROM meta WHERE name = 'generation'").fetchone()
            # The random part keeps two restored copies of one file apart.
            new = f"{int(old.partition('-')[0]) + 1}-{secrets.token_hex(8)}"
            connection.execute("UPDATE meta SET value = ? WHERE name = 'generation'", (new,))
        except sqlite3.Error as exc:
            raise explain(exc, path, opening=True) from exc
        finally:
            connection.close()
    finally:
        lock.release()
    return new
