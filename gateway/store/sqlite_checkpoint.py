"""Moving what was written from the WAL into the file, beside the writer.

A checkpoint copies thousands of pages and syncs two files: up to a tenth of a second on a busy core. SQLite does it
inside of the COMMIT that made the WAL long enough, and everybody who writes waits. Here a thread of its own copies, on
a connection of its own, while the writer goes on; then the writer moves the little that was added meanwhile, which lets
the WAL start over at its beginning.
"""

from __future__ import annotations

import sqlite3
import threading
from contextlib import suppress
from queue import SimpleQueue

from gateway.config import MIB

EVERY = 32 * MIB
"""Bytes written between two checkpoints: each costs two syncs, and a page that changed often is copied once."""

OPERATION, PAYLOAD, JOB = 5 * 4096, 2, 8 * MIB
"""What is counted for a write: bytes for an operation (its session's row, inputs and newest events, each in another
page) and for each byte of payload (an old one goes when it comes), and for a purge. Rather too much than too little: as
much again, and SQLite does its own checkpoint in a COMMIT."""


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
            checkpoint(self._connection)
            self._copied.set()


def checkpoint(connection: sqlite3.Connection) -> None:
    """Move what no reader needs in the WAL any more. What fails now (a full disk) is tried again with the next one."""
    with suppress(sqlite3.Error):
        connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
