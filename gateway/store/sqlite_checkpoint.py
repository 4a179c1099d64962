"""Moving what was written from the WAL into the file, beside the writer.

A checkpoint copies thousands of pages and syncs two files: up to a tenth of a second on a busy core. SQLite does it
inside of the COMMIT that made the WAL long enough, and everybody who writes waits. Here a thread of its own copies, on
a connection of its own, while the writer goes on. Once in a while the WAL is to start over at its beginning, for which
all of it must have been copied: then the thread copies what was added meanwhile, and again, until that is little, and
the writer copies the rest.

The thread has a low priority: where it shares a core with the writer it works while that waits for the disk.
"""

from __future__ import annotations

import os
import sqlite3
import sys
import threading
from contextlib import suppress
from queue import SimpleQueue

import structlog

from gateway.config import MIB

_log = structlog.get_logger(__name__)

EVERY = 8 * MIB
"""Bytes written between two checkpoints. Each costs two syncs, and a page that changed often is copied once, so not
less. With 32 MiB what is copied has left the processor's cache, and the disk gets it all at once."""

LONG = 32 * MIB
"""Bytes written until the WAL is to start over. That costs whoever asks just then a few milliseconds, so not at every
checkpoint; and it is a file that a start after a crash reads, so not much more."""

NICE = 10
"""How much the thread's priority is below the others': it gives way at once to whoever wakes up, and gets a tenth of a
core on which somebody else always works. That is three times what it needs there."""

OPERATION, PAYLOAD, JOB = 5 * 4096, 2, EVERY
"""What is counted for a write: bytes for an operation (its session's row, inputs and newest events, each in another
page) and for each byte of payload (an old one goes when it comes), and for a purge, after which one is due. Rather too
much than too little: at 64 MiB SQLite does its own checkpoint in a COMMIT."""

FEW, PASSES = 64, 5
"""Before the WAL starts over: a pass that has copied no more pages than that was the last, for little has come
meanwhile. And how many passes there are at most: a writer that is faster than the copying must not be chased for ever.
"""


class Checkpoints:
    """Checkpoints of one file. `due` and `started_over` are called by the writer thread alone.

    Args:
        connection: of its own, to that file; closed by `close`.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._written = 0
        self._length = 0
        """About how many bytes the WAL has."""
        self._copying = False
        self._starting_over = False
        self._copied = threading.Event()
        self._asked: SimpleQueue[int] = SimpleQueue()
        """With how many passes at most; 0 ends the thread."""
        # A daemon, so that a disk that hangs cannot keep the process alive.
        self._thread = threading.Thread(target=self._run, name="store-checkpoint", daemon=True)
        self._thread.start()

    def due(self, written: int) -> bool:
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
        self._asked.put(0)
        self._thread.join()
        self._connection.close()

    def _run(self) -> None:
        if sys.platform == "linux":  # where 0 is the calling thread; elsewhere it is the process
            with suppress(OSError):  # a sandbox may forbid it
                os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0) + NICE)
        while passes := self._asked.get():
            before = 0
            for _ in range(passes):
                moved, _ = checkpoint(self._connection)
                if moved - before <= FEW:
                    break
                before = moved
            self._copied.set()


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
