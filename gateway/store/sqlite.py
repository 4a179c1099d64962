"""Sessions in one SQLite file, for a gateway that runs as one process.

Theory of operation
-------------------
*One writer, group commit.* All writes of all sessions go through one thread that owns one connection. The event loop
collects what waits (`_pending`). The writer takes all of it as one group, commits, tells the event loop, and takes what
has come meanwhile: the cost of a transaction, an fsync among it, is shared by all who wait, and a transaction that
follows another waits for no busy event loop. A writer that has nothing left to do is asked to look again one scheduler
pass after a write, so that those who write in the same pass are in one group. What nobody waits for, or comes in
numbers (the ends of long answers, new sessions), waits a moment for its like (`GATHER`).

    append() ─▶ _pending ─▶ writer thread: one group, one transaction (fsync) ─▶ _finish(): calls every waiter
                               ▲                                             │
                               └───── again, as long as anything waits ◀─────┘

*On one core* writer and event loop do not work at the same time anyway. There the event loop waits for the group that
it has just handed over (`GIVE_WAY`), and hears of its end without being woken: a writer that has to compete with a
hundred streaming agents takes several times as long, and everybody who has asked something waits for it.

*Cancellation* only takes the waiter away: its operation stays in the group. `load` waits for what was handed over for
its session, so a session that was dropped in mid-write and comes back sees the whole truth.

*Reading* is done on a second connection in a worker thread: in WAL mode it neither waits for a commit nor delays one.

*Who may write.* Two gateways on one file would each serve half of a conversation, so a second one is refused at once:
the first holds a lock that the kernel frees when its process ends, however it ends. Taking over from a process that is
alive would be wrong for an embedded store: starting a second gateway by mistake would break the first. Behind the lock
stands a token in the file: every opening takes the next number, every transaction checks that its own is the newest.
Should the lock ever fail (its file was removed, a file system without locks), the elder writer gets `StoreFenced`.

*Durable* means: with ``full``, the WAL was synced to the disk before `append` returns; with ``normal``, it survives a
crash of the process, not one of the machine.

*Failures.* A transaction that fails stores nothing and leaves the file as it was. Disk full, locked, I/O error:
`StoreUnavailable`, and the next write simply tries again. After an error *while syncing* the transaction may come back
if the machine crashes before the next write; its numbers were reserved, and its inputs have their keys, so a client
that sends again is told that it is a duplicate.

*Space.* What a purge frees is used again; the file itself does not shrink. Giving pages back would take a step, and
with it a wait for the interpreter's lock, per page inside a write transaction. ``VACUUM`` does it while the gateway is
stopped.

`sqlite_file` opens files and explains errors, `sqlite_segments` is how events are kept in them, `sqlite_writer` is the
thread's side, `sqlite_reader` has the queries, `sqlite_checkpoint` keeps the WAL short.
"""

from __future__ import annotations

import os
import sqlite3
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Container, Sequence
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import trio
from attrs import frozen

from gateway.config import MIB
from gateway.errors import StoreUnavailable
from gateway.protocol.messages import Event
from gateway.store import sqlite_reader
from gateway.store.base import Appended, Purged, Retention, SessionRecord, Store, Stored, StoredSession
from gateway.store.sqlite_checkpoint import JOB, OPERATION, PAYLOAD, TRANSACTION, Checkpoints
from gateway.store.sqlite_file import (
    Connect,
    Durability,
    WriterLock,
    connect,
    explain,
    new_epoch,
    open_file,
    prepare,
    raise_explained,
)
from gateway.store.sqlite_reader import Idle
from gateway.store.sqlite_writer import Append, Create, Job, Operation, Writer

__all__ = ["SqliteStore", "Statistics", "new_epoch"]

T = TypeVar("T")

MAX_GROUP = 1024
"""Operations of one transaction: enough for every session of a busy gateway, and milliseconds when it fails and each is
tried alone."""

MAX_GROUP_BYTES = 8 * MIB
"""Their payloads: a transaction stays below a tenth of a second on a slow disk, and the WAL stays small."""

GATHER = 0.005
"""Seconds that patient operations (new sessions, ends of long answers) wait, at most, until as many have come as the
last time, when nobody writes anything else. When a thousand clients come at once, a transaction each is a third of what
a connection costs; five milliseconds more are nothing beside its round trips. And who is told that a long answer has
ended has all of its text by then; that end waits only if the writer has a core of its own, for else it would only make
the next transaction longer, and whoever has just asked something wait for that."""

GIVE_WAY = 0.005
"""Seconds that the event loop waits, at most, for a writer that has no core of its own. Undisturbed, a transaction
takes it half a millisecond to two, with the sync. Beside a busy event loop it would take several times as long: each of
its steps waits until the operating system takes the core from the event loop, a time slice later."""

RATION = 4
"""How many times as long as it waited in vain the event loop goes on before it waits again. So a slow disk costs it a
fifth of its time."""

GROWING = 0.001
"""Seconds for which a group that the event loop is going to wait for stays open, at most, while each scheduler pass
adds to it. With half of that first deltas come a tenth sooner, and short turns cost a busy core another tenth."""

CLOSE_TIMEOUT = 10.0
"""Seconds for the last transaction. A disk that hangs for longer must not keep the process from ending."""

PURGE_SESSIONS, PURGE_EVENTS = 100, 5_000
"""Of one purge transaction: those who append wait behind it, for some ten milliseconds."""


@frozen
class Statistics:
    """What a store has done since it was opened. `operations` / `transactions` is how well commits are shared."""

    transactions: int
    operations: int
    failures: int
    waiting: int
    """Operations handed over and not yet done."""


class SqliteStore(Store):
    """Keeps sessions in the file `path` (and ``path-wal``, ``path-shm``, ``path-lock`` beside it).

    Args:
        path: the file; it is created, its directory is not. ``~`` is expanded.
        durability: ``full`` syncs every transaction to the disk; ``normal`` does not survive a crash of the machine.
        max_events: events kept per session (``replay_max_events``), up to a quarter more between two trims.
        max_bytes: their encoded bytes (``replay_max_bytes``), the same.
        retention: what `purge` removes.
        busy_timeout: seconds to wait for another program that has the file locked.
        make_connection: for tests.
    """

    direct = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        durability: Durability = "full",
        max_events: int = 10_000,
        max_bytes: int = 8 * MIB,
        retention: Retention | None = None,
        busy_timeout: float = 2.0,
        make_connection: Connect | None = None,
    ) -> None:
        # Two names of one file must meet at one lock.
        self._path = os.path.realpath(os.path.expanduser(path))
        self.durable = durability == "full"
        self._durability: Durability = durability
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._retention = retention or Retention()
        self._busy_timeout = busy_timeout
        self._make_connection = make_connection
        self._pending: deque[Operation] = deque()
        self._last: dict[str, Operation] = {}
        """Session → its newest operation that is not done. Invariant: operations of a session finish in order."""
        self._waiting = 0
        self._open = False
        self._enough: int | None = None
        """How many patient operations the writer, asleep, is to be woken for; None while it is awake, or was woken."""
        self._asked: SimpleQueue[bool] = SimpleQueue()
        self._written: deque[list[Operation]] = deque()
        """Groups that the writer is done with and the event loop has not heard of."""
        self._giving_way = False
        """Whether the event loop waits for the writer. It looks into `_written` afterwards, without being told."""
        self._rests = threading.Event()
        """Set by the writer before it sleeps, if the event loop waits."""
        self._hurries_until = 0.0
        """When the event loop may wait again, by `time.perf_counter`."""

    @property
    def path(self) -> str:
        """The file."""
        return self._path

    def statistics(self) -> Statistics:
        """A look at the writer."""
        writer = self._writer
        return Statistics(writer.transactions, writer.batches, writer.failures, self._waiting)

    # opening and closing

    async def __aenter__(self) -> SqliteStore:
        await trio.to_thread.run_sync(self._open_file)
        self._token = trio.lowlevel.current_trio_token()
        self._closed = trio.Event()
        self._work = trio.lowlevel.ParkingLot()
        self._handing_over = trio.CancelScope()
        self._begun: float | None = None
        """When the first operation came that the writer, asleep, is to be woken for."""
        trio.lowlevel.spawn_system_task(self._hand_over)
        self._read_turn = trio.CapacityLimiter(1)  # the reading connection serves one at a time
        self._open = True
        # Ended by the False that `__aexit__` sends. A daemon, so that a disk that hangs cannot keep the process alive.
        self._thread = threading.Thread(target=self._write_groups, name="store-writer", daemon=True)
        self._thread.start()
        return self

    def _connect(self) -> sqlite3.Connection:
        return connect(self._path, self._durability, self._busy_timeout, self._make_connection)

    def _open_file(self) -> None:
        self._lock = WriterLock(self._path)
        self._file: int | None = None
        connections: list[sqlite3.Connection] = []
        try:
            self._file = open_file(self._path)
            connections.append(self._connect())
            token = prepare(connections[0], self._path)
            connections.append(self._connect())
            connections[1].execute("PRAGMA query_only = ON")
            self._reader = connections[1]
            self._writer = Writer(
                self._path,
                connections[0],
                self._connect,
                token,
                max_events=self._max_events,
                max_bytes=self._max_bytes,
            )
            # Last: it starts a thread, which only closing the store ends.
            connections.append(self._connect())
            self._checkpoints = Checkpoints(connections[2], self._file)
        except BaseException as exc:
            for connection in connections:
                connection.close()
            self._close_file()
            raise_explained(exc, self._path)
            raise

    def _close_file(self) -> None:
        """After all connections: closing any descriptor of the file drops the locks of SQLite."""
        if self._file is not None:
            os.close(self._file)
        self._lock.release()

    async def __aexit__(self, *exc: object) -> None:
        self._open = False
        with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_TIMEOUT):
            try:
                # Behind everything that was handed over before.
                last = Job((), lambda writer: None)
                self._submit(last)
                await last.wait()
                async with self._read_turn:
                    self._reader.close()
            finally:
                # The writer's connection is closed last, which moves the WAL into the file, and then the lock goes.
                self._asked.put(False)
                self._handing_over.cancel()
            await self._closed.wait()

    # writing: the event loop's side. Only `_hand_over` and `Operation.wait` await.

    def _submit(self, operation: Operation) -> None:
        self._pending.append(operation)
        self._waiting += 1
        for session_id in operation.session_ids:
            self._last[session_id] = operation
        enough = self._enough
        if enough is not None and (len(self._pending) >= enough or not operation.patient):
            self._enough = None
            self._begun = time.perf_counter()
            self._work.unpark()

    async def _hand_over(self) -> None:
        """The task that wakes the writer, a scheduler pass after a group was begun."""
        with self._handing_over:
            while True:
                if self._begun is None:
                    await self._work.park()
                else:  # while the last one was handed over
                    await trio.lowlevel.checkpoint()
                begun, self._begun, seen = self._begun or 0.0, None, 0
                while self._gives_way() and len(self._pending) > seen and time.perf_counter() - begun < GROWING:
                    seen = len(self._pending)
                    await trio.lowlevel.checkpoint()
                self._wake_writer()

    def _gives_way(self) -> bool:
        return one_core() and time.perf_counter() >= self._hurries_until

    def _wake_writer(self) -> None:
        """Have the writer take what waits; if it has no core of its own, by waiting for it."""
        if not self._pending:
            return  # it has taken it already
        if not self._gives_way():
            self._asked.put(True)
            return
        self._rests.clear()
        self._giving_way = True
        self._asked.put(True)
        if not self._rests.wait(GIVE_WAY):
            self._hurries_until = time.perf_counter() + RATION * GIVE_WAY
        # In this order: what the writer adds later, it tells.
        self._giving_way = False
        self._hear()

    def _hear(self) -> None:
        while self._written:
            self._finish(self._written.popleft())

    def _finish(self, group: list[Operation]) -> None:
        self._waiting -= len(group)
        for operation in group:
            for session_id in operation.session_ids:
                if self._last.get(session_id) is operation:
                    del self._last[session_id]
            calls, operation.done = operation.done, []
            for call in calls:
                call(operation.error)

    def _check_open(self) -> None:
        if not self._open:
            raise StoreUnavailable(f"{self._path}: the store is closed")

    async def _write(self, operation: Operation) -> None:
        self._check_open()
        self._submit(operation)
        await operation.wait()
        if operation.error is not None:
            raise operation.error

    async def _job(self, session_ids: Sequence[str], work: Callable[[Writer], T]) -> T:
        job = Job(session_ids, work)
        await self._write(job)
        result: T = job.result
        return result

    def _write_groups(self) -> None:
        """The writer thread."""
        more, expected = True, 1
        while True:
            while self._pending:
                if self._can_wait(expected):
                    more = self._sleep(expected, GATHER) and more
                group = self._take()
                expected = sum([operation.patient for operation in group]) or expected
                self._writer.commit(group)
                self._written.append(group)
                if not self._giving_way:
                    self._tell(self._hear)
                if self._checkpoints.due(TRANSACTION + sum(map(_written, group))) and self._writer.checkpoint():
                    self._checkpoints.started_over()
            if not more:
                break
            more = self._sleep(1, None)
        self._checkpoints.close()
        self._writer.close()
        self._close_file()
        self._tell(self._closed.set)

    def _take(self) -> list[Operation]:
        """What waits, as far as one transaction may hold it. Called by the writer thread alone."""
        pending = self._pending
        group: list[Operation] = []
        size = 0
        while pending and len(group) < MAX_GROUP and size < MAX_GROUP_BYTES:
            if isinstance(pending[0], Job):
                return group or [pending.popleft()]
            operation = pending.popleft()
            group.append(operation)
            size += operation.size if isinstance(operation, Append) else 0
        return group

    def _can_wait(self, enough: int) -> bool:
        """Whether fewer than that wait, all of them patient."""
        pending = self._pending
        return len(pending) < enough and all(pending[i].patient for i in range(len(pending)))

    def _sleep(self, enough: int, seconds: float | None) -> bool:
        """Wait until so many patient operations, or any other, are to be written; no longer than `seconds`. False:
        there will be no more. Called by the writer thread alone."""
        more = True
        self._enough = enough
        # Who came before that was said has woken nobody.
        if self._can_wait(enough):
            if self._giving_way:
                self._rests.set()
            try:
                more = self._asked.get(timeout=seconds)
            except Empty:
                if one_core():  # let the event loop give way
                    self._enough = None
                    self._tell(self._wake_writer)
                    more = self._asked.get()
        self._enough = None
        return more

    def _tell(self, function: Callable[..., object], *args: Any) -> None:
        with suppress(trio.RunFinishedError):  # nobody is left to hear it
            self._token.run_sync_soon(function, *args)

    async def create(self, record: SessionRecord, reserved: int) -> None:
        await self._write(Create((record.session_id,), record, reserved, patient=True))

    async def append(self, session_id: str, batch: Sequence[Stored], reserved: int) -> None:
        size = sum([len(item.payload) for item in batch])
        await self._write(Append((session_id,), batch, reserved, size))

    def append_soon(
        self, session_id: str, batch: Sequence[Stored], reserved: int, done: Appended, *, patient: bool = False
    ) -> bool:
        self._check_open()
        size = sum([len(item.payload) for item in batch])
        patient = patient and not one_core()
        self._submit(Append((session_id,), batch, reserved, size, patient=patient, done=[done]))
        return False

    async def delete(self, session_id: str) -> None:
        await self._job((session_id,), partial(Writer.remove, session_ids=(session_id,)))

    # reading

    async def _read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        """Run a query in a thread. Cancelling waits for it: a look takes milliseconds."""
        self._check_open()
        try:
            return await trio.to_thread.run_sync(query, self._reader, limiter=self._read_turn)
        except sqlite3.Error as exc:
            raise explain(exc, self._path) from exc

    async def load(
        self, session_id: str, *, max_events: int, max_bytes: int, tail_bytes: int = 1 << 62
    ) -> StoredSession | None:
        last = self._last.get(session_id)
        if last is not None:
            await last.wait()
        look = partial(sqlite_reader.load, max_events=max_events, max_bytes=max_bytes, tail_bytes=tail_bytes)
        return await self._read(partial(look, session_id=session_id))

    async def read(self, session_id: str, after: int, upto: int) -> list[Event]:
        return await self._read(partial(sqlite_reader.read, session_id=session_id, after=after, upto=upto))

    async def unfinished(self) -> list[str]:
        return await self._read(sqlite_reader.unfinished)

    # retention

    async def purge(self, *, now: int, in_use: Container[str]) -> Purged:
        keep = self._retention
        sessions, size = 0, 0
        left, left_size = await self._read(sqlite_reader.totals)
        before = now - keep.resume_window_ms - 1
        place = (-1 << 62, 0)
        candidates: deque[Idle] = deque()
        enough = False
        while not enough:
            if not candidates:
                candidates.extend(
                    await self._read(partial(sqlite_reader.idle_since, at=before, after=place, limit=1_000))
                )
                if not candidates:
                    break
            chosen: list[str] = []
            events, then, then_size = 0, left, left_size
            while candidates and len(chosen) < PURGE_SESSIONS and events < PURGE_EVENTS:
                one = candidates[0]
                over = then > keep.max_sessions or then_size > keep.max_total_bytes
                enough = not over and now - one.active_at <= keep.max_age_ms
                if enough:
                    break
                candidates.popleft()
                place = (one.active_at, one.id)
                # No await from here to `_submit`: a session that is loaded afterwards finds it gone.
                if one.session_id not in in_use:
                    chosen.append(one.session_id)
                    events += one.events
                    then -= 1
                    then_size -= one.size
            if chosen:
                removed = await self._job(chosen, partial(Writer.remove, session_ids=chosen, idle_since=before))
                sessions, size = sessions + removed[0], size + removed[1]
                left, left_size = left - removed[0], left_size - removed[1]
        await self._expire_keys(now - keep.resume_window_ms)
        return Purged(sessions=sessions, size=size, sessions_left=left, size_left=left_size)

    async def _expire_keys(self, before: int) -> None:
        after = 0
        look = sqlite_reader.sessions_with_keys_before
        while ids := await self._read(partial(look, at=before, after=after, limit=PURGE_SESSIONS)):
            after = ids[-1]
            await self._job((), partial(Writer.expire_keys, sessions=ids, before=before))


def one_core() -> bool:
    """Whether the threads of this process share one core."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0)) == 1
    return os.cpu_count() == 1


def _written(operation: Operation) -> float:
    """About how many bytes of the WAL it takes."""
    if isinstance(operation, Job):
        return JOB
    return OPERATION + PAYLOAD * operation.size if isinstance(operation, Append) else OPERATION
