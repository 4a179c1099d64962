"""Connections that can be watched, held up or made to fail, for the tests of the store in a file."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from typing import Any

import trio


class Faults:
    """Makes connections whose statements can be counted, watched, held up or made to fail."""

    def __init__(self) -> None:
        self.statements: list[str] = []
        self.fail_at: int | None = None
        self.error: Exception = sqlite3.OperationalError("disk I/O error")
        self.before: Callable[[str], None] = lambda sql: None
        self.before_copying: Callable[[], None] = lambda: None
        self.connections: list[sqlite3.Connection] = []

    def __call__(self, path: str, timeout: float) -> sqlite3.Connection:
        faults = self

        class Connection(sqlite3.Connection):
            def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
                # Only the writer's: the reader has BEGIN without IMMEDIATE, and is the second connection.
                if faults.connections and self is faults.connections[0]:
                    faults.statements.append(sql)
                    faults.before(sql)
                    if faults.fail_at is not None and sql != "ROLLBACK":
                        faults.fail_at -= 1
                        if faults.fail_at < 0:
                            raise faults.error
                elif "wal_checkpoint" in sql:
                    faults.before_copying()
                return super().execute(sql, *values)

        connection = sqlite3.connect(
            path, timeout=timeout, isolation_level=None, check_same_thread=False, factory=Connection
        )
        self.connections.append(connection)
        return connection


def commits(sql: str) -> bool:
    """Whether the statement ends a transaction: most are one themselves."""
    return sql == "COMMIT" or sql.startswith("INSERT INTO written")


class Gate:
    """Holds the writer thread at the end of its next transaction."""

    def __init__(self, faults: Faults) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        self.armed = False
        faults.before = self._before

    def _before(self, sql: str) -> None:
        if self.armed and commits(sql):
            self.armed = False
            self.reached.set()
            assert self.go.wait(10)

    async def wait_reached(self) -> None:
        assert await trio.to_thread.run_sync(self.reached.wait, 10)
