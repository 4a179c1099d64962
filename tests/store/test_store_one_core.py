"""The event loop gives way to the store's writer where both have one core, and only there."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from store_faults import Faults, Gate, commits
from store_helpers import Script, seqs, stored

from gateway.store import sqlite as sqlite_module
from gateway.store.sqlite import SqliteStore
from gateway.store.sqlite_writer import Operation


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "sessions.db")


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_module, "one_core", lambda: True)
    monkeypatch.setattr(sqlite_module, "GIVE_WAY", 10.0)


class Spinning:
    """A busy event loop, and what it did while the writer was at each transaction."""

    def __init__(self, faults: Faults) -> None:
        self.passes = 0
        self.during: list[int] = []
        self._moved = threading.Event()
        faults.before = self._before

    async def spin(self) -> None:
        while True:
            await trio.lowlevel.checkpoint()
            self.passes += 1
            self._moved.set()

    def _before(self, sql: str) -> None:
        if commits(sql):
            self._moved.clear()
            before = self.passes
            # An event loop that is free to go on does so at once.
            self._moved.wait(0.1)
            self.during.append(self.passes - before)


@asynccontextmanager
async def busy(path: str) -> AsyncIterator[tuple[SqliteStore, Spinning]]:
    faults = Faults()
    async with SqliteStore(path, make_connection=faults) as store, trio.open_nursery() as nursery:
        spinning = Spinning(faults)
        nursery.start_soon(spinning.spin)
        yield store, spinning
        nursery.cancel_scope.cancel()


async def test_the_event_loop_does_nothing_else_during_a_transaction(path: str) -> None:
    with trio.fail_after(10):
        async with busy(path) as (store, spinning):
            script = await Script(store).create()
            for _ in range(3):
                await script.write(script.output())
            assert spinning.during == [0, 0, 0, 0]
            assert seqs(await script.load()) == [1, 2, 3]


async def test_with_more_cores_it_goes_on(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_module, "one_core", lambda: False)
    with trio.fail_after(10):
        async with busy(path) as (store, spinning):
            await Script(store).create()
            assert spinning.during[0] > 0


@asynccontextmanager
async def after_a_slow_transaction(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Script, Spinning]]:
    """The event loop has waited in vain for the first transaction, and heard of its end all the same."""
    monkeypatch.setattr(sqlite_module, "GIVE_WAY", 0.05)
    faults = Faults()
    gate = Gate(faults)
    with trio.fail_after(10):
        async with SqliteStore(path, make_connection=faults) as store, trio.open_nursery() as nursery:
            script = Script(store)
            gate.armed = True
            began = time.perf_counter()
            async with trio.open_nursery() as creating:
                creating.start_soon(script.create)
                await gate.wait_reached()
                await trio.testing.wait_all_tasks_blocked()
                assert store.statistics().waiting == 1
                gate.go.set()
            # After the waiting, not within it: so it is no more than a fifth of the time.
            assert store._hurries_until - began >= (1 + sqlite_module.RATION) * 0.05
            monkeypatch.setattr(sqlite_module, "GIVE_WAY", 10.0)
            spinning = Spinning(faults)
            nursery.start_soon(spinning.spin)
            yield script, spinning
            nursery.cancel_scope.cancel()


async def test_a_slow_disk_is_not_waited_for(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_module, "RATION", 10_000_000)
    async with after_a_slow_transaction(path, monkeypatch) as (script, spinning):
        await script.write(script.output())
        assert spinning.during[0] > 0
        assert seqs(await script.load()) == [1]


async def test_after_a_slow_transaction_it_waits_again_in_time(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with after_a_slow_transaction(path, monkeypatch) as (script, spinning):
        while 0 not in spinning.during:
            await script.write(script.output())


class EachPass(trio.abc.Instrument):
    """Calls something at the beginning of every scheduler pass."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    def after_io_wait(self, timeout: float) -> None:
        self._call()


@pytest.mark.parametrize(("growing", "together"), [(3600, 5), (0, 1)])
async def test_a_group_grows_as_long_as_each_pass_adds_to_it(
    path: str, monkeypatch: pytest.MonkeyPatch, growing: float, together: int
) -> None:
    monkeypatch.setattr(sqlite_module, "GROWING", growing)
    groups: list[int] = []
    with trio.fail_after(10):
        async with SqliteStore(path) as store:
            scripts = [await Script(store, f"s{i}").create() for i in range(5)]
            left = deque(scripts)
            commit = store._writer.commit

            def count(group: Sequence[Operation]) -> None:
                groups.append(len(group))
                commit(group)

            def write() -> None:
                if left:
                    script = left.popleft()
                    store.append_soon(script.record.session_id, [stored(script.output())], 0, lambda _: None)

            monkeypatch.setattr(store._writer, "commit", count)
            trio.lowlevel.add_instrument(each_pass := EachPass(write))
            while sum(groups) < len(scripts):
                await trio.lowlevel.checkpoint()
            trio.lowlevel.remove_instrument(each_pass)
    assert groups[0] == together, "not for ever" if growing == 0 else "all of them"


async def test_new_sessions_that_nobody_joins_are_given_way_to(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with trio.fail_after(10):
        async with busy(path) as (store, spinning):
            async with trio.open_nursery() as nursery:
                for i in range(3):
                    nursery.start_soon(Script(store, f"s{i}").create)
            assert store.statistics().transactions == 1
            monkeypatch.setattr(sqlite_module, "GATHER", 0.01)
            before = spinning.passes
            await Script(store, "one for whom nobody comes").create()
            assert spinning.passes > before, "while it is waited for others the event loop goes on"
            assert spinning.during == [0, 0]


async def test_the_end_of_a_long_answer_waits_for_no_other(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def end() -> trio.Event:
        over = trio.Event()
        store.append_soon("s", [stored(script.output())], 0, lambda _: over.set(), patient=True)
        return over

    with trio.fail_after(10):
        async with SqliteStore(path) as store:
            script = await Script(store).create()
            for over in end(), end():  # two in one transaction
                await over.wait()
            monkeypatch.setattr(sqlite_module, "GATHER", 3600)
            await end().wait()


def pinned(cores: set[int]) -> Callable[[int], set[int]]:
    return lambda pid: cores


@pytest.mark.skipif(sys.platform != "linux", reason="cores are told by the affinity of a thread")
def test_one_core_is_what_the_event_loop_may_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(os, "sched_getaffinity", pinned({3}))
    assert sqlite_module.one_core()
    monkeypatch.setattr(os, "sched_getaffinity", pinned({0, 1}))
    assert not sqlite_module.one_core()
