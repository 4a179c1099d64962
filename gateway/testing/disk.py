"""A disk in memory, and stores over it: what was committed survives a crash of the process, as on a real one.

The disk is a list of commits; a store is one process's way to it. Faults are set on the disk: slow, full, broken, and
after a crash it may turn out to have lost its newest commits, which gives every session a new epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Coroutine, Sequence
from typing import Any, TypeVar

import trio
from attrs import evolve, frozen

from gateway.config import MIB
from gateway.errors import StoreError, StoreUnavailable, StoreUnusable
from gateway.protocol.messages import Event
from gateway.store import Appended, Purged, SessionRecord, Store, Stored, StoredSession
from gateway.store.memory import MemoryStore

T = TypeVar("T")


@frozen
class Commit:
    """One transaction: a session is created (`record`) or `purged`, or a batch of its events with its reservation."""

    session_id: str
    reserved: int = 0
    record: SessionRecord | None = None
    batch: tuple[Stored, ...] = ()
    purged: bool = False


def _at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a method of `MemoryStore`, none of which waits."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    raise AssertionError("a memory store does not wait")


KEPT_MS = 60 * 60_000
"""What nobody uses is purged after so long without activity."""


class Disk:
    """What survives a crash, and the faults that are put on it. Times in seconds of trio's clock.

    Args:
        max_events, max_bytes: what is kept per session, as for any store.
        on_commit: told of each commit in the step in which it happens.
    """

    def __init__(
        self,
        *,
        max_events: int = 10_000,
        max_bytes: int = 8 * MIB,
        on_commit: Callable[[Commit], None] = lambda commit: None,
    ) -> None:
        self.commits: list[Commit] = []
        self.before = 0.0
        """How long a write takes until it is committed."""
        self.after = 0.0
        """How long from then until its writer hears of it."""
        self.full = False
        """Every write is refused as `StoreUnavailable`: nothing was written, later it may succeed."""
        self.broken = 0
        """So many of the next writes raise `StoreUnusable`; whether they were committed, their writer cannot know."""
        self.generation = 0
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._on_commit = on_commit
        self._memory = self._blank()
        self._owner: DiskStore | None = None

    def open(self) -> DiskStore:
        """A store for a new process. The one before it reaches the disk no more, as if it were killed."""
        self._owner = DiskStore(self)
        return self._owner

    def kill(self) -> None:
        """From now on nothing of the present process reaches the disk."""
        self._owner = None

    def lose(self, count: int) -> None:
        """Take back the newest `count` commits; what remains is another history, so every epoch is a new one."""
        self.commits = self.commits[: max(0, len(self.commits) - count)]
        self.generation += 1
        self._memory = self._blank()
        kept, self.commits = self.commits, []
        for commit in kept:
            if commit.record is not None:
                epoch = f"{commit.record.epoch.partition('~')[0]}~{self.generation}"
                commit = evolve(commit, record=evolve(commit.record, epoch=epoch))
            self._write(commit)

    def _blank(self) -> MemoryStore:
        return MemoryStore(max_events=self._max_events, max_bytes=self._max_bytes)

    def _write(self, commit: Commit) -> None:
        if commit.record is not None:
            _at_once(self._memory.create(commit.record, commit.reserved))
        elif commit.purged:
            _at_once(self._memory.delete(commit.session_id))
        else:
            _at_once(self._memory.append(commit.session_id, commit.batch, commit.reserved))
        self.commits.append(commit)

    async def commit(self, store: DiskStore, commit: Commit) -> None:
        """Carry a write out, with the faults of this moment."""
        await trio.lowlevel.checkpoint()
        if self.before:
            await trio.sleep(self.before)
        await self._alive(store)
        if self.full:
            raise StoreUnavailable("the disk is full")
        broken = self.broken > 0
        if broken:
            self.broken -= 1
        if not broken or self.broken % 2:
            self._write(commit)
            self._on_commit(commit)
        if self.after:
            await trio.sleep(self.after)
        await self._alive(store)
        if broken:
            raise StoreUnusable("the disk is broken")

    async def read(self, store: DiskStore, coroutine: Coroutine[Any, Any, T]) -> T:
        """Carry a read out, as slowly as a write."""
        try:
            await trio.lowlevel.checkpoint()
            await trio.sleep(self.before)
            await self._alive(store)
        except BaseException:
            coroutine.close()
            raise
        return _at_once(coroutine)

    async def purge(self, store: DiskStore, now: int, in_use: Container[str]) -> int:
        """Remove the sessions that are old, finished and not in use, each in the step in which that was seen."""
        await trio.lowlevel.checkpoint()
        await trio.sleep(self.before)
        await self._alive(store)
        old = [
            session_id
            for session_id, item in self._memory._sessions.items()
            if now - item.active_at > KEPT_MS and not (item.turn or item.inputs or session_id in in_use)
        ]
        for session_id in old:
            commit = Commit(session_id, purged=True)
            self._write(commit)
            self._on_commit(commit)
        return len(old)

    async def _alive(self, store: DiskStore) -> None:
        if store is not self._owner:
            await trio.sleep_forever()


class DiskStore(Store):
    """One process's store; see `Disk.open`."""

    durable = True
    direct = True

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    async def __aenter__(self) -> DiskStore:
        return self

    async def __aexit__(self, *exc: object) -> None:
        pass

    async def create(self, record: SessionRecord, reserved: int) -> None:
        await self._disk.commit(self, Commit(record.session_id, reserved, record))

    async def append(self, session_id: str, batch: Sequence[Stored], reserved: int) -> None:
        await self._disk.commit(self, Commit(session_id, reserved, None, tuple(batch)))

    def append_soon(
        self, session_id: str, batch: Sequence[Stored], reserved: int, done: Appended, *, patient: bool = False
    ) -> bool:
        async def write() -> None:
            try:
                await self.append(session_id, batch, reserved)
            except StoreError as exc:
                done(exc)
            else:
                done(None)

        # As a disk's own business: it ends when it is done, or with the world.
        trio.lowlevel.spawn_system_task(write)
        return False

    async def load(
        self, session_id: str, *, max_events: int, max_bytes: int, tail_bytes: int = 1 << 62
    ) -> StoredSession | None:
        load = self._disk._memory.load
        return await self._disk.read(
            self, load(session_id, max_events=max_events, max_bytes=max_bytes, tail_bytes=tail_bytes)
        )

    async def read(self, session_id: str, after: int, upto: int) -> list[Event]:
        return await self._disk.read(self, self._disk._memory.read(session_id, after, upto))

    async def delete(self, session_id: str) -> None:
        raise NotImplementedError("no simulated world deletes a session")

    async def unfinished(self) -> list[str]:
        return await self._disk.read(self, self._disk._memory.unfinished())

    async def purge(self, *, now: int, in_use: Container[str]) -> Purged:
        return Purged(sessions=await self._disk.purge(self, now, in_use))
