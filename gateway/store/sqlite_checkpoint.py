"""Moving what was written from the WAL into the file, beside the writer.

A checkpoint copies thousands of pages and syncs two files: up to a tenth of a second on a busy core. SQLite does it
inside of the COMMIT that made the WAL long enough, and everybody who writes waits. Here a thread of its own copies, on
a connection of its own, while the writer goes on; copies what was added meanwhile, and again, until that is little. The
writer moves the rest, which lets the WAL start over at its beginning.
"""

from __future__ import annotations

import sqlite3
import threading
from queue import SimpleQueue

import structlog

from gateway.config import MIB

_log = structlog.get_logger(__name__)

EVERY = 8 * MIB
"""Bytes written between two checkpoints. Each costs two syncs, and a page that changed often is copied once, so not
less. With 32 MiB what is copied has left the processor's cache, and the disk gets it all at once."""

OPERATION, PAYLOAD, JOB = 5 * 4096, 2, EVERY
"""What is counted for a write: bytes for an operation (its session's row, inputs and newest events, each in another
page) and for each byte of payload (an old one goes when it comes), and for a purge, after which one is due. Rather too
much than too little: at 64 MiB SQLite does its own checkpoint in a COMMIT."""

FEW, PASSES = 64, 5
"""A pass that has copied no more pages than that was the last: little has come meanwhile. And how many passes there are
at most: a writer that is faster than the copying must not be chased for ever."""


class Checkpoints:
    """Checkpoints of one file. `due` is called by the writer thread alone.

    Args:
        connection: of its own, to that file; closed by `close`.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._written = 0
        self._copying = False
        self._copied = threading.Event()
        self._asked: SimpleQueue[bool] = SimpleQueue()
        # A daemon, so that a disk that hangs cannot keep the process alive.
        self._thread = threading.Thread(target=self._run, name="store-checkpoint", daemon=True)
        self._thread.start()

    def due(self, written: int) -> bool:
        """Count the bytes that a transaction has written. True when the writer is to `checkpoint` the rest."""
        if self._copied.is_set():
            self._copied.clear()
            self._copying = False
            return True
        self._written += written
        if self._written >= EVERY and not self._copying:
            self._written = 0
            self._copying = True
            self._asked.put(True)
        return False

    def close(self) -> None:
        """End the thread and close the connection; waits for a checkpoint that is under way."""
        self._asked.put(False)
        self._thread.join()
        self._connection.close()

    def _run(self) -> None:
        while self._asked.get():
            before = 0
            for _ in range(PASSES):
                moved = checkpoint(self._connection)
                if moved - before <= FEW:
                    break
                before = moved
            self._copied.set()


def checkpoint(connection: sqlite3.Connection) -> int:
    """Move what no reader needs in the WAL any more; returns how many of its pages are moved by now, or 0 or less if
    nothing could be. What fails now (a full disk) is logged, and tried again with the next one."""
    try:
        ((_, _, moved),) = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
    except sqlite3.Error as exc:
        _log.warning("checkpoint_failed", error=str(exc), hint="the WAL grows until one succeeds; is the disk full?")
        return 0
    return int(moved)
