"""Moving what was written from the WAL into the file, beside the writer.

SQLite moves it inside of the COMMIT that made the WAL long enough, and syncs the file then: up to a tenth of a second,
in which everybody who writes waits. Here a thread of its own copies, on a connection of its own, and syncs the file,
while the writer goes on: a little at a time, so that the disk never has much to do before the next transaction's sync.
Once in a while the WAL is to start over at its beginning, for which all of it must have been copied: then the thread
copies what was added meanwhile, and again, until that is little, and the writer copies and syncs the rest.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from contextlib import suppress
from queue import SimpleQueue

import structlog

from gateway.config import MIB

_log = structlog.get_logger(__name__)

EVERY = MIB
"""Bytes written between two copies. A transaction whose sync comes while the file is synced waits for that: the
slowest first deltas of a busy core come a millisecond later with 2 MiB, with 4 five. Each copy costs two syncs."""

PAUSE = 0.03
"""Seconds between two copies, at least. Short turns write a hundred MiB a second, the same pages again and again: they
would take a tenth more processor time if each MiB of that were copied."""

LONG = 8 * MIB
"""Bytes written until the WAL is to start over. While it grows a sync costs twice as much: the file system has to note
that, too. And with 32 MiB it leaves the processor's cache."""

TRANSACTION, OPERATION, PAYLOAD, JOB = 4 * 4096, 4096, 1.5, EVERY
"""What is counted as written: bytes for a transaction (pages that all share), for each operation in it (a segment),
for each byte of payload (pages are not full, and an old one goes when it comes), and for a purge, after which one is
due. Rather too much than too little: at 64 MiB SQLite does its own checkpoint in a COMMIT."""

FEW, PASSES = 64, 5
"""Before the WAL starts over: a pass that has copied no more pages than that was the last, for little has come
meanwhile. And how many passes there are at most: a writer that is faster than the copying must not be chased for ever.
"""

_sync = getattr(os, "fdatasync", os.fsync)


class Checkpoints:
    """Checkpoints of one file. `due` and `started_over` are called by the writer thread alone.

    Args:
        connection: of its own, to that file; closed by `close`.
        file: a descriptor of the file, to sync it by; whoever opened it closes it, after all connections.
    """

    def __init__(self, connection: sqlite3.Connection, file: int) -> None:
        self._connection = connection
        self._file = file
        self._written = 0.0
        self._length = 0.0
        """About how many bytes the WAL has."""
        self._copying = False
        self._starting_over = False
        self._copied = threading.Event()
        self._closing = threading.Event()
        self._asked: SimpleQueue[int] = SimpleQueue()
        """With how many passes at most; 0 ends the thread."""
        # A daemon, so that a disk that hangs cannot keep the process alive.
        self._thread = threading.Thread(target=self._run, name="store-checkpoint", daemon=True)
        self._thread.start()

    def due(self, written: float) -> bool:
        """Count the bytes that a transaction has written. True when the writer is to `checkpoint` the rest, and to say
        `started_over` if it could."""
        self._length += written
        if self._copied.is_set():
            self._copied.clear()
            self._copying = False
            return self._starting_over
        self._written += written
        if self._written >= EVERY and not self._copying:
            self._written = 0
            self._copying = True
            self._starting_over = self._length >= LONG
            self._asked.put(PASSES if self._starting_over else 1)
        return False

    def started_over(self) -> None:
        """All of the WAL is in the file: it starts over with the next transaction."""
        self._length = 0

    def close(self) -> None:
        """End the thread and close the connection; waits for a checkpoint that is under way."""
        self._closing.set()
        self._asked.put(0)
        self._thread.join()
        self._connection.close()

    def _run(self) -> None:
        while passes := self._asked.get():
            before = 0
            for _ in range(passes):
                moved, _ = checkpoint(self._connection)
                # Only to leave less to the writer, whose checkpoint syncs again. SQLite does not sync what is not all.
                with suppress(OSError):  # it will find out, too
                    _sync(self._file)
                if moved - before <= FEW:
                    break
                before = moved
            self._copied.set()
            self._closing.wait(PAUSE)


def checkpoint(connection: sqlite3.Connection) -> tuple[int, bool]:
    """Move what no reader needs in the WAL any more; returns how many of its pages are moved by now, 0 or less if
    nothing could be, and whether those are all. What fails now (a full disk) is logged, and tried again with the next
    one."""
    try:
        ((_, pages, moved),) = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
    except sqlite3.Error as exc:
        _log.warning("checkpoint_failed", error=str(exc), hint="the WAL grows until one succeeds; is the disk full?")
        return 0, False
    return int(moved), bool(pages == moved >= 0)
