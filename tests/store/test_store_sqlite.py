"""What only a store in a file has: reopening, crashes, full disks, damaged files, a second writer, group commit."""

# ruff: noqa: ASYNC220, ASYNC230, ASYNC240
# Small local files, looked at while nothing else runs.

from __future__ import annotations

import errno
import os
import random
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from store_faults import Faults, Gate
from store_helpers import MANY, Script, queue, seqs, stored, taken
from structlog.testing import capture_logs

from gateway.config import Limits
from gateway.config import Store as StoreSettings
from gateway.errors import ConfigError, StoreError, StoreFenced, StoreRefused, StoreUnavailable, StoreUnusable
from gateway.protocol import messages as m
from gateway.store import MemoryStore, Retention, open_store, sqlite_checkpoint
from gateway.store import sqlite as sqlite_module
from gateway.store.sqlite import SqliteStore, new_epoch
from gateway.store.sqlite_file import MIGRATIONS


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "sessions.db")


@pytest.fixture(autouse=True)
def several_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """`test_store_one_core` has what is different on one."""
    monkeypatch.setattr(sqlite_module, "one_core", lambda: False)


# --- reopening -------------------------------------------------------------------------------------------------------


async def test_everything_is_there_after_a_reopening(path: str) -> None:
    async with SqliteStore(path) as store:
        script = await Script(store).create(reserved=77)
        await script.write(script.input("a"), script.input("b"), script.start("t", "a"), script.state(x=1))
        before = await script.load()
    assert not os.path.exists(path + "-wal"), "closing moves the WAL into the file"
    async with SqliteStore(path) as store:
        script.store = store
        assert await script.load() == before
        assert await store.unfinished() == ["s"]
        await script.write(script.end("t"))
        other = await Script(store, "other").create()
        await other.write(other.output())
        assert seqs(await other.load()) == [1]


async def test_a_closed_store_says_so(path: str) -> None:
    async with SqliteStore(path) as store:
        script = await Script(store).create()
    with pytest.raises(StoreUnavailable, match="closed"):
        await script.write(script.output())
    with pytest.raises(StoreUnavailable, match="closed"):
        await script.load()


async def test_closing_waits_for_what_was_handed_over(path: str) -> None:
    faults = Faults()
    gate = Gate(faults)
    async with trio.open_nursery() as nursery:
        async with SqliteStore(path, make_connection=faults) as store:
            script = await Script(store).create()
            gate.armed = True
            nursery.start_soon(script.write, script.input("a"))
            await gate.wait_reached()
            nursery.start_soon(script.write, script.input("b"))
            await trio.testing.wait_all_tasks_blocked()
            gate.go.set()
    async with SqliteStore(path) as store:
        script.store = store
        assert queue(await script.load()) == ["a", "b"]


async def test_closing_is_bounded_when_the_disk_hangs(path: str, autojump_clock: trio.testing.MockClock) -> None:
    faults = Faults()
    gate = Gate(faults)
    store = SqliteStore(path, make_connection=faults)
    await store.__aenter__()
    script = await Script(store).create()
    gate.armed = True
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(script.write, script.input("a"))
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    await store.__aexit__()
    assert trio.current_time() >= sqlite_module.CLOSE_TIMEOUT
    gate.go.set()  # the disk comes back: the thread ends what it was at, and lets go of the file
    await trio.to_thread.run_sync(store._thread.join, 10)
    async with SqliteStore(path) as store:
        script.store = store
        assert queue(await script.load()) == ["a"]


async def test_a_closed_store_leaves_no_task_behind(path: str) -> None:
    before = trio.lowlevel.current_statistics().tasks_living
    async with SqliteStore(path) as store:
        await Script(store).create()
    await trio.testing.wait_all_tasks_blocked()
    assert trio.lowlevel.current_statistics().tasks_living == before


async def test_the_file_is_for_its_owner_only(path: str) -> None:
    async with SqliteStore(path) as store:
        await Script(store).create()
        for name in (path, path + "-wal", path + "-lock"):
            assert stat.S_IMODE(os.stat(name).st_mode) == 0o600


@pytest.mark.parametrize("round_", range(3))
@pytest.mark.parametrize("cores", [[], ["1"]], ids=["all cores", "one core"])
async def test_what_append_returned_for_survives_kill_9(path: str, round_: int, cores: list[str]) -> None:
    sessions = 20
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("store_writer_process.py")), path, str(sessions), *cores],
        stdout=subprocess.PIPE,
        text=True,
    )
    promised: dict[str, int] = {}
    assert process.stdout is not None
    with process:
        for count, line in enumerate(process.stdout):
            name, written = line.split()
            promised[name] = int(written)
            if count == 300 + 37 * round_:
                process.kill()  # it goes on writing until here: in the middle of something
    assert len(promised) == sessions
    async with SqliteStore(path) as store:
        unfinished = await store.unfinished()
        for name, seq in promised.items():
            found = await store.load(name, **MANY)
            assert found is not None
            numbers = seqs(found)
            assert numbers == list(range(1, numbers[-1] + 1))
            assert numbers[-1] >= seq
            # Batches are of three and of two events: none is there in part.
            assert numbers[-1] % 5 in (0, 3)
            assert (numbers[-1] % 5 == 3) == (found.turn is not None) == (name in unfinished)
            assert taken(found) == ([f"r{numbers[-1] - 2}"] if found.turn else [])
            assert found.state == ({"n": numbers[-1] // 5 * 5 - 4} if numbers[-1] >= 5 else {})
            assert len(found.keys) == (numbers[-1] + 2) // 5


@pytest.mark.parametrize(("durability", "synchronous"), [("full", 2), ("normal", 1)])
async def test_full_syncs_every_transaction(path: str, durability: Any, synchronous: int) -> None:
    faults = Faults()
    async with SqliteStore(path, make_connection=faults, durability=durability) as store:
        writer = faults.connections[0]
        assert writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert writer.execute("PRAGMA synchronous").fetchone() == (synchronous,)
        assert store.durable == (synchronous == 2)


# --- a crash or an error between any two statements ------------------------------------------------------------------


def a_rich_batch(script: Script) -> tuple[m.Event, ...]:
    """One that makes the writer use every statement it has: it folds inputs, tries again, and trims."""
    return (
        script.end("t1", "lost"), script.start("t2", "a", attempt=2), script.input("c"), script.state(y=2),
        *[script.output() for _ in range(12)],
    )  # fmt: skip


async def prepared(store: SqliteStore) -> Script:
    script = await Script(store).create()
    await script.write(script.input("a"), script.input("b"), script.start("t1", "a"), script.state(x=1))
    return script


async def statements_of_a_rich_batch(path: str) -> int:
    faults = Faults()
    async with SqliteStore(path, make_connection=faults, max_events=10) as store:
        script = await prepared(store)
        faults.statements.clear()
        await script.write(*a_rich_batch(script))
        assert "BEGIN IMMEDIATE" in faults.statements, "it is trimmed in the same transaction"
        assert faults.statements[-1] == "COMMIT"
        return len(faults.statements)


async def test_an_error_at_any_statement_stores_nothing_and_passes(tmp_path: Path) -> None:
    count = await statements_of_a_rich_batch(str(tmp_path / "count.db"))
    assert count > 10
    for k in range(count):
        faults = Faults()
        async with SqliteStore(tmp_path / f"{k}.db", make_connection=faults, max_events=10) as store:
            script = await prepared(store)
            before = await script.load()
            batch = a_rich_batch(script)
            faults.fail_at = k
            with pytest.raises(StoreUnavailable):
                await script.write(*batch, reserved=9999)
            faults.fail_at = None
            assert await script.load() == before, f"statement {k}"
            await script.write(*batch)
            found = await script.load()
            assert (taken(found), queue(found), found.state) == (["a"], ["b", "c"], {"x": 1, "y": 2})


async def test_a_crash_at_any_statement_leaves_all_or_nothing(tmp_path: Path) -> None:
    """The connection is lost with its transaction, as in a crash; what is in the file then is looked at anew."""
    count = await statements_of_a_rich_batch(str(tmp_path / "count.db"))
    for k in range(count):
        path = tmp_path / f"{k}.db"
        faults = Faults()
        async with SqliteStore(path, make_connection=faults, max_events=10) as store:
            script = await prepared(store)
            before = await script.load()
            batch = a_rich_batch(script)
            left = k

            def crash(sql: str, faults: Faults = faults) -> None:
                nonlocal left
                left -= 1
                if left < 0:
                    faults.connections[0].close()

            faults.before = crash
            with pytest.raises(StoreError):
                await script.write(*batch)
        async with SqliteStore(path, max_events=10) as store:
            script.store = store
            assert await script.load() == before, f"statement {k}"


async def test_a_connection_that_cannot_even_roll_back_is_replaced(path: str) -> None:
    faults = Faults()
    async with SqliteStore(path, make_connection=faults, max_events=4) as store:
        script = await Script(store).create()
        await script.write(*[script.output() for _ in range(5)])

        def fail(sql: str) -> None:
            if sql in ("COMMIT", "ROLLBACK"):
                raise sqlite3.OperationalError("disk I/O error")

        faults.before = fail
        event = script.input("a")  # the session outgrows its bounds: that takes more than one statement
        with pytest.raises(StoreUnavailable):
            await script.write(event)
        await script.write(event)
        assert len(faults.connections) == 4, "one to write, read and checkpoint with, and another to write with"
        assert queue(await script.load()) == ["a"]


# --- checkpoints -----------------------------------------------------------------------------------------------------


def count_of(sql: str, faults: Faults) -> int:
    return sum(sql in statement for statement in faults.statements)


@pytest.fixture
def always_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint every MiB, after each of which the WAL starts over."""
    monkeypatch.setattr(sqlite_checkpoint, "EVERY", 1024 * 1024)
    monkeypatch.setattr(sqlite_checkpoint, "LONG", 1024 * 1024)
    monkeypatch.setattr(sqlite_checkpoint, "PAUSE", 0)


@pytest.mark.usefixtures("always_over")
async def test_nobody_who_writes_waits_for_a_checkpoint(path: str) -> None:
    """While the WAL is copied, transactions go on; then the writer copies the rest, and the WAL starts over."""
    faults = Faults()
    reached, go = threading.Event(), threading.Event()

    def hold() -> None:
        reached.set()
        assert go.wait(10)

    faults.before_copying = hold
    async with SqliteStore(path, make_connection=faults) as store:
        script = await Script(store).create()
        for _ in range(30):
            await script.write(script.output("x" * 50_000))
        assert await trio.to_thread.run_sync(reached.wait, 10)
        assert count_of("wal_checkpoint", faults) == 0
        for _ in range(3):
            await script.write(script.output("x" * 500_000))
        size = os.path.getsize(path)
        assert count_of("wal_checkpoint", faults) == 0, "the writer waits for the copy that is under way"
        go.set()
        with trio.fail_after(10):
            while not count_of("wal_checkpoint", faults):
                await script.write(script.output("y"))
        await script.write(script.output("z"))
        assert os.path.getsize(path) > size + 2 * 1024 * 1024
        assert store.statistics().failures == 0
        longest = os.path.getsize(path + "-wal")
        for _ in range(100):
            await script.write(script.output("x" * 100_000))
        assert os.path.getsize(path + "-wal") < longest + 4 * 1024 * 1024, "it starts over again and again"


@pytest.mark.usefixtures("always_over")
async def test_what_is_written_during_a_copy_is_not_left_to_the_writer(path: str) -> None:
    faults = Faults()
    reached, go, copied = threading.Event(), threading.Event(), threading.Event()
    copies = 0

    def hold() -> None:
        nonlocal copies
        copies += 1
        if copies == 2:  # it has copied what was there, and is about to look again
            reached.set()
            assert go.wait(10)
        if copies == 3:
            copied.set()

    faults.before_copying = hold
    async with SqliteStore(path, make_connection=faults) as store:
        script = await Script(store).create()
        with trio.fail_after(10):
            while not reached.is_set():
                await script.write(script.output("x" * 50_000))
        size = os.path.getsize(path)
        for _ in range(3):
            await script.write(script.output("x" * 500_000))
        go.set()
        assert await trio.to_thread.run_sync(copied.wait, 10)
        assert os.path.getsize(path) > size + 1_400_000
        assert count_of("wal_checkpoint", faults) == 0, "the writer has had nothing to do with it"


@pytest.fixture
def seldom_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint every MiB; after eight of them the WAL starts over."""
    monkeypatch.setattr(sqlite_checkpoint, "EVERY", 1024 * 1024)
    monkeypatch.setattr(sqlite_checkpoint, "LONG", 8 * 1024 * 1024)
    monkeypatch.setattr(sqlite_checkpoint, "PAUSE", 0)


@pytest.mark.usefixtures("seldom_over")
async def test_the_writer_moves_the_rest_only_when_the_wal_is_long(path: str) -> None:
    """Most checkpoints are the thread's alone, one pass each: whoever writes does not notice them."""
    faults = Faults()
    copies, longest = 0, 0

    def count() -> None:
        nonlocal copies
        copies += 1

    faults.before_copying = count
    async with SqliteStore(path, make_connection=faults) as store:
        script = await Script(store).create()
        with trio.fail_after(20):
            for times in range(1, 4):
                copies = 0
                while count_of("wal_checkpoint", faults) < times:
                    await script.write(script.output("x" * 20_000))
                    longest = max(longest, os.path.getsize(path + "-wal"))
                assert 5 <= copies <= 8 + sqlite_checkpoint.PASSES, "about one for each MiB, and more for the last"
        assert longest < 16 * 1024 * 1024, "it starts over"


@pytest.mark.usefixtures("seldom_over")
async def test_a_wal_that_somebody_reads_starts_over_as_soon_as_it_can(path: str) -> None:
    faults = Faults()
    async with SqliteStore(path, make_connection=faults) as store:
        script = await Script(store).create()
        faults.connections[1].execute("BEGIN")
        faults.connections[1].execute("SELECT count(*) FROM segments").fetchone()  # and goes on reading
        with trio.fail_after(10):
            while count_of("wal_checkpoint", faults) < 3:
                await script.write(script.output("x" * 20_000))
        longest = os.path.getsize(path + "-wal")
        assert longest < 16 * 1024 * 1024, "it is tried again with each checkpoint"
        faults.connections[1].execute("COMMIT")
        for _ in range(2000):
            await script.write(script.output("x" * 20_000))
        assert os.path.getsize(path + "-wal") < longest + 16 * 1024 * 1024, "of some 80 that were written"


async def test_there_is_a_pause_between_two_copies(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing the store does not wait for its end."""
    monkeypatch.setattr(sqlite_checkpoint, "EVERY", 1)
    monkeypatch.setattr(sqlite_checkpoint, "PAUSE", 1000)
    faults = Faults()
    copied = threading.Event()
    copies = 0

    def count() -> None:
        nonlocal copies
        copies += 1
        copied.set()

    faults.before_copying = count
    with trio.fail_after(10):
        async with SqliteStore(path, make_connection=faults) as store:
            script = await Script(store).create()
            assert await trio.to_thread.run_sync(copied.wait, 10)
            for _ in range(100):
                await script.write(script.output())
            assert copies == 1
        await trio.to_thread.run_sync(store._thread.join, 10)  # it has let go of the file, and is about to end
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("store-")]


class Syncs:
    """Counts, or refuses, the syncs of the copying thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files: list[int] = []
        self.error: OSError | None = None
        sync = sqlite_checkpoint._sync

        def count(file: int) -> None:
            assert threading.current_thread().name == "store-checkpoint"
            self.files.append(os.fstat(file).st_ino)
            if self.error is not None:
                raise self.error
            sync(file)

        monkeypatch.setattr(sqlite_checkpoint, "_sync", count)


@pytest.mark.usefixtures("seldom_over")
async def test_what_is_copied_is_synced_beside_the_writer(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite syncs the file only when it has all of the WAL, and then everything since the last time."""
    syncs, faults = Syncs(monkeypatch), Faults()
    async with SqliteStore(path, make_connection=faults) as store:
        script = await Script(store).create()
        with trio.fail_after(10):
            while not count_of("wal_checkpoint", faults):
                await script.write(script.output("x" * 20_000))
    assert len(syncs.files) >= 5, "one for each MiB"
    assert set(syncs.files) == {os.stat(path).st_ino}


@pytest.mark.usefixtures("always_over")
async def test_a_sync_beside_the_writer_may_fail(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs, faults = Syncs(monkeypatch), Faults()
    syncs.error = OSError(errno.EIO, "broken")
    async with SqliteStore(path, make_connection=faults) as store:
        script = await Script(store).create()
        with trio.fail_after(10):
            while count_of("wal_checkpoint", faults) < 3:
                await script.write(script.output("x" * 50_000))


async def test_the_descriptor_of_the_file_is_closed_after_all_connections(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closed earlier it would drop the locks of SQLite; never closed it would be lost."""
    closed: list[str] = []
    close = os.close

    def record(file: int) -> None:
        if os.path.samestat(os.fstat(file), os.stat(path)):
            closed.append("file")
        close(file)

    class Connection(sqlite3.Connection):
        def close(self) -> None:
            closed.append("connection")
            super().close()

    def make(path: str, timeout: float) -> sqlite3.Connection:
        return sqlite3.connect(path, isolation_level=None, check_same_thread=False, factory=Connection)

    monkeypatch.setattr(os, "close", record)
    async with SqliteStore(path, make_connection=make) as store:
        await Script(store).create()
    assert closed == ["connection"] * 3 + ["file"]
    closed.clear()
    for k in range(3):
        made = 0

        def fail(path: str, timeout: float, k: int = k) -> sqlite3.Connection:
            nonlocal made
            made += 1
            if made > k:
                raise sqlite3.OperationalError("disk I/O error")
            return make(path, timeout)

        with pytest.raises(StoreUnusable):
            await SqliteStore(path, make_connection=fail).__aenter__()
        assert closed == ["connection"] * k + ["file"], f"connection {k} cannot be opened"
        closed.clear()


@pytest.mark.usefixtures("always_over")
async def test_a_checkpoint_that_fails_is_tried_again(path: str) -> None:
    faults = Faults()
    failed = 0

    def fail() -> None:
        nonlocal failed
        failed += 1
        raise sqlite3.OperationalError("database or disk is full")

    faults.before_copying = fail
    async with SqliteStore(path, make_connection=faults) as store:
        script = await Script(store).create()
        with trio.fail_after(10), capture_logs() as logs:
            while failed < 3:
                await script.write(script.output("x" * 100_000))
        assert {(entry["event"], entry["error"]) for entry in logs} == {
            ("checkpoint_failed", "database or disk is full")
        }
        assert count_of("wal_checkpoint", faults) >= 2, "the writer has tried what the other could not"
        written = script.seq
    async with SqliteStore(path) as store:
        script.store = store
        assert seqs(await script.load())[-1] == written


async def test_one_bad_batch_fails_no_other(path: str) -> None:
    faults = Faults()
    gate = Gate(faults)
    async with SqliteStore(path, make_connection=faults) as store:
        scripts = [await Script(store, f"s{i}").create() for i in range(5)]
        results: dict[str, BaseException | None] = {}

        async def write(script: Script, *events: m.Event) -> None:
            try:
                await script.write(*events)
            except StoreError as exc:
                results[script.record.session_id] = exc
            else:
                results[script.record.session_id] = None

        faults.connections[0].setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 100_000)
        gate.armed = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, scripts[0], scripts[0].output())
            await gate.wait_reached()
            # One that SQLite will not take, in the middle of the next group.
            nursery.start_soon(write, scripts[1], scripts[1].output())
            nursery.start_soon(write, scripts[2], scripts[2].output("x" * 200_000))
            nursery.start_soon(write, scripts[3], scripts[3].output())
            await trio.testing.wait_all_tasks_blocked()
            gate.go.set()
        assert {name for name, error in results.items() if error is None} == {"s0", "s1", "s3"}
        assert isinstance(results["s2"], StoreRefused)
        assert [seqs(await script.load()) for script in scripts] == [[1], [1], [], [1], []]


# --- disk full, locked -----------------------------------------------------------------------------------------------


async def test_disk_full_and_recovery(path: str) -> None:
    faults = Faults()
    async with SqliteStore(path, make_connection=faults) as store:
        script = await Script(store).create()
        small = await Script(store, "small").create()
        await script.write(script.input("a"))
        before = await script.load()
        writer = faults.connections[0]
        (pages,) = writer.execute("PRAGMA page_count").fetchone()
        writer.execute(f"PRAGMA max_page_count = {pages + 2}")
        big = script.output("x" * 500_000)
        for _ in range(3):
            with pytest.raises(StoreUnavailable, match="make room"):
                await script.write(big, reserved=9999)
        assert await script.load() == before, "reading and resuming go on"
        await small.write(small.output())  # there is room for this one
        writer.execute("PRAGMA max_page_count = 1000000")
        await script.write(big)
        assert seqs(await script.load()) == [1, 2]
        assert store.statistics().failures == 3


async def test_a_full_disk_fails_only_what_does_not_fit(path: str) -> None:
    faults = Faults()
    gate = Gate(faults)
    async with SqliteStore(path, make_connection=faults) as store:
        big, small = await Script(store, "big").create(), await Script(store, "small").create()
        first = await Script(store, "first").create()
        writer = faults.connections[0]
        (pages,) = writer.execute("PRAGMA page_count").fetchone()
        writer.execute(f"PRAGMA max_page_count = {pages + 2}")
        refused = 0

        async def write_big() -> None:
            nonlocal refused
            try:
                await big.write(big.output("x" * 500_000))
            except StoreUnavailable:
                refused += 1

        gate.armed = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.write, first.output())
            await gate.wait_reached()
            nursery.start_soon(write_big)
            nursery.start_soon(small.write, small.output())
            await trio.testing.wait_all_tasks_blocked()
            gate.go.set()
        assert refused == 1
        assert seqs(await small.load()) == [1]
        assert store.statistics().operations == 5  # three births, two writes


async def test_locked_by_another_program(path: str) -> None:
    async with SqliteStore(path, busy_timeout=0.01) as store:
        script = await Script(store).create()
        event = script.input("a")
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable, match="locked by another program"):
            await script.write(event)
        assert (await script.load()).events == []
        other.execute("ROLLBACK")
        await script.write(event)
        other.close()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StoreUnusable, match="locked by another program"):
        await SqliteStore(path, busy_timeout=0.01).__aenter__()
    other.close()
    async with SqliteStore(path) as store:
        script.store = store
        assert queue(await script.load()) == ["a"]


# --- files that cannot be used ---------------------------------------------------------------------------------------


async def refused(path: str | Path, match: str, **options: Any) -> None:
    with pytest.raises(StoreUnusable, match=match) as caught:
        await SqliteStore(path, **options).__aenter__()
    assert os.path.basename(path) in str(caught.value)


async def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    for content in (b"hello\n", b"\0" * 10_000, b"SQLite format 3\0" + b"x" * 5000):
        (tmp_path / "notes.txt").write_bytes(content)
        await refused(tmp_path / "notes.txt", "is not an SQLite database; give another path|is damaged")
        assert (tmp_path / "notes.txt").read_bytes() == content


async def test_a_damaged_file(path: str) -> None:
    async with SqliteStore(path) as store:
        script = await Script(store).create()
        await script.write(*[script.output("x" * 1000) for _ in range(200)])
    with open(path, "r+b") as file:
        for page in range(1, os.path.getsize(path) // 4096):
            file.seek(page * 4096)
            file.write(b"\xff" * 200)
    with pytest.raises(StoreUnusable, match="is damaged; restore a backup"):  # noqa: PT012 - whichever notices
        async with SqliteStore(path) as store:
            script.store = store
            await script.load()


async def test_a_damaged_page_is_said_when_it_is_read_and_fails_no_other_session(path: str) -> None:
    async with SqliteStore(path) as store:
        script, other = await Script(store).create(), await Script(store, "other").create()
        await script.write(*[script.output("SPOIL" * 200) for _ in range(200)])
        await other.write(*[other.output("y" * 1000) for _ in range(200)])
    content = Path(path).read_bytes()
    first = content.index(b"SPOIL" * 100) // 4096
    with open(path, "r+b") as file:
        for page in range(first, content.rindex(b"SPOIL") // 4096):
            if b"SPOIL" in content[page * 4096 :][:4096] and b"yyy" not in content[page * 4096 :][:4096]:
                file.seek(page * 4096)
                file.write(b"\xff" * 4096)
    async with SqliteStore(path) as store:
        script.store = other.store = store
        with pytest.raises(StoreUnusable, match="is damaged"):
            await script.load()
        await other.write(other.output())
        assert len((await other.load()).events) == 201


async def test_an_event_that_cannot_be_read(path: str) -> None:
    async with SqliteStore(path) as store:
        script = await Script(store).create()
        await script.write(script.output())
    with sqlite3.connect(path) as other:
        other.execute('UPDATE segments SET lines = CAST(\'{"type":"from_the_future","seq":1,"x":1}\' AS BLOB)')
    other.close()
    async with SqliteStore(path) as store:
        script.store = store
        with pytest.raises(StoreUnusable, match="from_the_future"):
            await script.load()


async def test_a_newer_schema(path: str) -> None:
    async with SqliteStore(path):
        pass
    other = sqlite3.connect(path)
    other.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    other.close()
    before = Path(path).read_bytes()
    await refused(path, "newer trio-gateway.*upgrade")
    assert Path(path).read_bytes() == before


async def test_the_database_of_another_program(path: str) -> None:
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE bookmarks (url)")
    other.close()
    before = Path(path).read_bytes()
    await refused(path, "another program; give another path")
    assert Path(path).read_bytes() == before


async def test_an_older_schema_is_brought_up(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with SqliteStore(path) as store:
        script = await prepared(store)
        before = await script.load()
    newer = (*MIGRATIONS, ("CREATE TABLE added (x)", "INSERT INTO added VALUES (1)"))
    monkeypatch.setattr("gateway.store.sqlite_file.MIGRATIONS", newer)
    async with SqliteStore(path) as store:
        script.store = store
        assert await script.load() == before
    other = sqlite3.connect(path)
    assert other.execute("PRAGMA user_version").fetchone() == (len(newer),)
    assert other.execute("SELECT x FROM added").fetchall() == [(1,)]
    other.close()


async def test_a_file_of_this_version_with_other_tables(path: str) -> None:
    async with SqliteStore(path):
        pass
    with closing(sqlite3.connect(path)) as other:
        other.execute("DROP TABLE segments")
    await refused(path, r"move that file away, or give another path \(no such table: segments\)")


async def test_a_migration_that_fails_changes_nothing(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with SqliteStore(path):
        pass
    with monkeypatch.context() as patch:
        patch.setattr("gateway.store.sqlite_file.MIGRATIONS", (*MIGRATIONS, ("CREATE TABLE added (x)", "NONSENSE")))
        await refused(path, "NONSENSE")
    async with SqliteStore(path) as store:
        await Script(store).create()


async def test_an_empty_file_becomes_a_store(path: str) -> None:
    Path(path).touch()
    async with SqliteStore(path) as store:
        await Script(store).create()


async def test_places_where_no_file_can_be(tmp_path: Path) -> None:
    await refused(tmp_path / "missing" / "sessions.db", "its directory does not exist; create it")
    await refused(tmp_path, "is a directory; give the path of a file in it")
    (tmp_path / "file").touch()
    await refused(tmp_path / "file" / "sessions.db", "is a file; give another path")


@pytest.fixture
def nobody_dir() -> Iterator[Path]:
    """A directory that may be searched by a process that is not its owner. For root that takes giving up its rights."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        if os.geteuid() == 0:
            os.seteuid(65534)
            try:
                yield Path(name)
            finally:
                os.seteuid(0)
        else:
            os.chmod(name, 0o555)
            try:
                yield Path(name)
            finally:
                os.chmod(name, 0o755)


async def test_no_permission(nobody_dir: Path) -> None:
    await refused(nobody_dir / "sessions.db", "check owner and permissions")


async def test_a_connection_that_may_only_read(path: str) -> None:
    async with SqliteStore(path):
        pass

    def read_only(path: str, timeout: float) -> sqlite3.Connection:
        return sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None, check_same_thread=False)

    await refused(path, "cannot be written; check owner and permissions", make_connection=read_only)
    async with SqliteStore(path):
        pass  # the failed opening left nothing locked


# --- one writer ------------------------------------------------------------------------------------------------------


async def test_a_second_gateway_is_refused_while_the_first_is_alive(path: str, tmp_path: Path) -> None:
    (tmp_path / "alias.db").symlink_to(path)
    async with SqliteStore(path) as store:
        script = await Script(store).create()
        for name in (path, tmp_path / "alias.db"):
            with pytest.raises(StoreUnusable, match=f"in use by process {os.getpid()}; end it, or"):
                await SqliteStore(name).__aenter__()
        with pytest.raises(StoreUnusable, match="in use"):
            new_epoch(path)
        await script.write(script.output())  # and is none the worse for it
    async with SqliteStore(path):
        pass


async def test_a_stale_writer_is_fenced(path: str) -> None:
    async with SqliteStore(path) as stale:
        script = await Script(stale).create()
        await script.write(script.input("a"))
        os.unlink(path + "-lock")  # what the lock cannot see
        async with SqliteStore(path) as fresh:
            late = Script(fresh)
            late.seq = 1
            with pytest.raises(StoreFenced, match="another process has opened it"):
                await script.write(script.input("stale"))
            await late.write(late.input("b"))
            with pytest.raises(StoreFenced):
                await stale.create(Script(stale, "new").record, 1)
            with pytest.raises(StoreFenced):
                await stale.delete("s")
            with pytest.raises(StoreFenced):
                await stale.append("s", [], 10**6)
            found = await late.load()
            assert (queue(found), found.reserved) == (["a", "b"], 64)
        with pytest.raises(StoreFenced):
            await script.write(script.output())  # for good


# --- epochs ----------------------------------------------------------------------------------------------------------


async def epoch(path: str, name: str = "s") -> str:
    async with SqliteStore(path) as store:
        found = await store.load(name, **MANY)
        assert found is not None
        return found.record.epoch


async def test_a_new_generation_gives_every_session_a_new_epoch(path: str, tmp_path: Path) -> None:
    async with SqliteStore(path) as store:
        await Script(store).create()
        await Script(store, "t").create()
    assert await epoch(path) == "e_s"
    backup = Path(path).read_bytes()
    first = new_epoch(path)
    second = await epoch(path)
    assert second not in ("e_s", await epoch(path, "t"))
    assert await epoch(path) == second, "it stays until the next bump"
    async with SqliteStore(path) as store:
        await Script(store, "young").create()
    assert await epoch(path, "young") == "e_young"
    assert new_epoch(path) != first
    third = await epoch(path)
    assert len({"e_s", second, third}) == 3
    assert await epoch(path, "young") != "e_young"
    # Two restored copies of one backup have different histories from here on.
    epochs = set()
    for name in ("one", "two"):
        copy = str(tmp_path / f"{name}.db")
        Path(copy).write_bytes(backup)
        new_epoch(copy)
        epochs.add(await epoch(copy))
    assert len(epochs | {second, third, "e_s"}) == 5


def test_new_epoch_needs_a_store(tmp_path: Path) -> None:
    with pytest.raises(StoreUnusable, match="no such file"):
        new_epoch(str(tmp_path / "nothing.db"))
    assert list(tmp_path.iterdir()) == []


# --- group commit and cancellation -----------------------------------------------------------------------------------


async def test_those_who_wait_share_a_transaction(path: str) -> None:
    faults = Faults()
    async with SqliteStore(path, make_connection=faults) as store:
        scripts = [Script(store, f"s{i}") for i in range(200)]
        async with trio.open_nursery() as nursery:
            for script in scripts:
                nursery.start_soon(script.create)
        before = store.statistics()

        async def write(script: Script) -> None:
            for i in range(10):
                await script.write(script.input(f"r{i}"))

        faults.statements.clear()
        async with trio.open_nursery() as nursery:
            for script in scripts:
                nursery.start_soon(write, script)
        after = store.statistics()
        assert after.operations - before.operations == 2000
        # Who was woken by a commit is in the next one, or in the one after it if the writer was quicker.
        assert after.transactions - before.transactions <= 22
        of_transactions = len(faults.statements) - count_of("wal_checkpoint", faults)
        assert of_transactions == after.transactions - before.transactions, "one statement, however many rows"
        for script in scripts:
            assert queue(await script.load()) == [f"r{i}" for i in range(10)]


async def test_what_comes_during_a_commit_forms_the_next_group(path: str) -> None:
    faults = Faults()
    gate = Gate(faults)
    async with SqliteStore(path, make_connection=faults) as store:
        scripts = [await Script(store, f"s{i}").create() for i in range(50)]
        before = store.statistics().transactions
        gate.armed = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scripts[0].write, scripts[0].output())
            await gate.wait_reached()
            for script in scripts[1:]:
                nursery.start_soon(script.write, script.output())
            await trio.testing.wait_all_tasks_blocked()
            assert store.statistics().waiting == 50
            gate.go.set()
        assert store.statistics().transactions - before == 2
        assert store.statistics().waiting == 0


async def test_a_transaction_does_not_wait_for_a_busy_event_loop(path: str) -> None:
    """The writer takes what waits by itself."""
    faults = Faults()
    gate = Gate(faults)
    async with SqliteStore(path, make_connection=faults) as store:
        scripts = [await Script(store, f"s{i}").create() for i in range(2)]
        gate.armed = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scripts[0].write, scripts[0].output())
            await gate.wait_reached()
            nursery.start_soon(scripts[1].write, scripts[1].output())
            await trio.testing.wait_all_tasks_blocked()
            gate.reached.clear()
            gate.armed = True
            gate.go.set()
            # No await: nothing else runs on the event loop until the next transaction is there.
            assert gate.reached.wait(10)
        assert store.statistics().waiting == 0


async def test_what_comes_when_the_writer_is_about_to_rest_is_written(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its look, which found nothing, and its rest."""
    looked, go = threading.Event(), threading.Event()
    armed = False
    sleep = SqliteStore._sleep

    def about_to_rest(store: SqliteStore, enough: int, seconds: float | None) -> bool:
        if armed and not looked.is_set():
            looked.set()
            assert go.wait(10)
        return sleep(store, enough, seconds)

    monkeypatch.setattr(SqliteStore, "_sleep", about_to_rest)
    async with SqliteStore(path) as store:
        script = await Script(store).create()
        armed = True
        await script.write(script.output())
        assert await trio.to_thread.run_sync(looked.wait, 10)
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(script.write, script.output())
                await trio.testing.wait_all_tasks_blocked()
                go.set()
        assert seqs(await script.load()) == [1, 2]


def when_gathering(monkeypatch: pytest.MonkeyPatch, call: Callable[[], None]) -> None:
    """Have the writer call that when it has a new session and is about to wait for others."""
    sleep = SqliteStore._sleep

    def gathering(store: SqliteStore, enough: int, seconds: float | None) -> bool:
        if seconds is not None:
            call()
        return sleep(store, enough, seconds)

    monkeypatch.setattr(SqliteStore, "_sleep", gathering)


async def three_at_once(store: SqliteStore) -> None:
    """Three new sessions in one transaction: whoever comes next is expected not to be alone either."""
    async with trio.open_nursery() as nursery:
        for i in range(3):
            nursery.start_soon(Script(store, f"in one step {i}").create)


async def test_new_sessions_wait_until_as_many_have_come_as_the_last_time(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_module, "GATHER", 3600)
    gathering = threading.Event()
    when_gathering(monkeypatch, gathering.set)
    with trio.fail_after(10):
        async with SqliteStore(path) as store:
            await Script(store, "alone").create()
            await Script(store, "the next one").create()
            await three_at_once(store)
            assert not gathering.is_set()
            before = store.statistics().transactions
            async with trio.open_nursery() as nursery:
                nursery.start_soon(Script(store, "soon after").create)
                assert await trio.to_thread.run_sync(gathering.wait, 10)
                nursery.start_soon(Script(store, "later").create)
                await trio.testing.wait_all_tasks_blocked()
                assert store.statistics().waiting == 2
                assert store._enough is not None, "the writer was woken for two"
                await Script(store, "the third").create()
            assert store.statistics().transactions == before + 1
            monkeypatch.setattr(sqlite_module, "GATHER", 0.001)
            gathering.clear()
            await Script(store, "one for whom nobody comes").create()
            assert gathering.is_set(), "it was three again"
            monkeypatch.setattr(sqlite_module, "GATHER", 3600)
            await Script(store, "one who came after one alone").create()


async def test_who_is_patient_waits_for_as_many_as_the_last_time(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_module, "GATHER", 3600)
    gathering = threading.Event()
    when_gathering(monkeypatch, gathering.set)
    with trio.fail_after(10):
        async with SqliteStore(path) as store:
            a, b = await Script(store, "a").create(), await Script(store, "b").create()

            def write(script: Script, *, patient: bool) -> trio.Event:
                over = trio.Event()
                batch = [stored(script.output())]
                store.append_soon(script.record.session_id, batch, 0, lambda _: over.set(), patient=patient)
                return over

            await write(a, patient=True).wait()
            two = write(a, patient=True), write(b, patient=True)
            for over in two:
                await over.wait()
            assert not gathering.is_set()
            before = store.statistics().transactions
            first = write(a, patient=True)
            assert await trio.to_thread.run_sync(gathering.wait, 10)
            await trio.testing.wait_all_tasks_blocked()
            assert not first.is_set()
            second = write(b, patient=True)
            await first.wait()
            await second.wait()
            assert store.statistics().transactions == before + 1
            await write(a, patient=False).wait()
            assert store.statistics().transactions == before + 2
            monkeypatch.setattr(sqlite_module, "MAX_GROUP_BYTES", 1)
            gathering.clear()
            first = write(a, patient=True)
            assert await trio.to_thread.run_sync(gathering.wait, 10)
            second = write(b, patient=True)
            await first.wait()
            await second.wait()
            assert store.statistics().transactions == before + 4, "what was there already filled one"


@pytest.mark.parametrize("who", ["who writes", "who deletes", "closing"])
async def test_nobody_waits_for_new_sessions(path: str, monkeypatch: pytest.MonkeyPatch, who: str) -> None:
    monkeypatch.setattr(sqlite_module, "GATHER", 3600)
    gathering = threading.Event()
    when_gathering(monkeypatch, gathering.set)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery, SqliteStore(path) as store:
            script = await Script(store).create()
            await three_at_once(store)
            await script.write(script.output())  # says nothing about new sessions
            nursery.start_soon(Script(store, "new").create)
            assert await trio.to_thread.run_sync(gathering.wait, 10)
            if who == "who writes":
                before = store.statistics().transactions
                await script.write(script.output())
                assert store.statistics().transactions == before + 1, "in one with the new session"
            elif who == "who deletes":
                await store.delete("s")


async def test_who_is_there_already_waits_for_no_new_sessions(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_module, "GATHER", 3600)
    faults = Faults()
    gate = Gate(faults)
    with trio.fail_after(10):
        async with SqliteStore(path, make_connection=faults) as store:
            script = await Script(store).create()
            await three_at_once(store)
            gate.armed = True
            async with trio.open_nursery() as nursery:
                nursery.start_soon(script.write, script.output())
                await gate.wait_reached()
                nursery.start_soon(Script(store, "new").create)
                nursery.start_soon(script.write, script.output())
                await trio.testing.wait_all_tasks_blocked()
                gate.go.set()


@pytest.mark.parametrize("who", ["who writes", "new sessions"])
async def test_who_comes_when_the_writer_begins_to_gather_wakes_it(
    path: str, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    """Between its look, which found new sessions alone, and its sleep."""
    monkeypatch.setattr(sqlite_module, "GATHER", 3600)
    found, go = threading.Event(), threading.Event()

    def pause() -> None:
        found.set()
        assert go.wait(10)

    when_gathering(monkeypatch, pause)
    with trio.fail_after(10):
        async with SqliteStore(path) as store:
            script = await Script(store).create()
            await three_at_once(store)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(Script(store, "new").create)
                assert await trio.to_thread.run_sync(found.wait, 10)
                if who == "who writes":
                    nursery.start_soon(script.write, script.output())
                else:
                    for name in ("another", "and another"):
                        nursery.start_soon(Script(store, name).create)
                await trio.testing.wait_all_tasks_blocked()
                go.set()


async def test_groups_are_bounded_in_bytes(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_module, "MAX_GROUP_BYTES", 100_000)
    faults = Faults()
    gate = Gate(faults)
    async with SqliteStore(path, make_connection=faults) as store:
        first, *scripts = [await Script(store, f"s{i}").create() for i in range(11)]
        before = store.statistics().transactions
        gate.armed = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.write, first.output())
            await gate.wait_reached()
            for script in scripts:
                nursery.start_soon(script.write, script.output("x" * 40_000))
            await trio.testing.wait_all_tasks_blocked()
            gate.go.set()
        assert store.statistics().transactions - before == 1 + 4


async def test_reading_does_not_wait_for_a_commit(path: str) -> None:
    faults = Faults()
    gate = Gate(faults)
    async with SqliteStore(path, make_connection=faults) as store:
        script, other = await Script(store).create(), await Script(store, "other").create()
        gate.armed = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(script.write, script.input("a"))
            await gate.wait_reached()
            assert await store.unfinished() == []
            assert (await other.load()).events == []
            gate.go.set()


async def test_a_cancelled_waiter_tears_nothing(path: str) -> None:
    faults = Faults()
    gate = Gate(faults)
    async with SqliteStore(path, make_connection=faults) as store:
        scripts = [await Script(store, f"s{i}").create() for i in range(3)]
        gate.armed = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scripts[0].write, scripts[0].input("in the commit"))
            await gate.wait_reached()
            nursery.start_soon(scripts[1].write, scripts[1].input("waits"), scripts[1].state(x=1))
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert nursery.cancel_scope.cancelled_caught
        gate.go.set()
        await scripts[2].write(scripts[2].input("after"))
        assert [queue(await script.load()) for script in scripts] == [["in the commit"], ["waits"], ["after"]]
        assert (await scripts[1].load()).state == {"x": 1}


async def test_a_load_waits_for_what_a_cancelled_writer_handed_over(path: str) -> None:
    """Otherwise a session that was dropped and comes back would not know of an input that is about to be stored."""
    faults = Faults()
    gate = Gate(faults)
    async with SqliteStore(path, make_connection=faults) as store:
        script = await Script(store).create()
        gate.armed = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(script.write, script.input("a"))
            await gate.wait_reached()
            nursery.cancel_scope.cancel()
        loaded: list[list[str]] = []

        async def load() -> None:
            loaded.append(queue(await script.load()))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(load)
            await trio.testing.wait_all_tasks_blocked()
            assert loaded == []
            gate.go.set()
        assert loaded == [["a"]]


async def test_a_load_waits_for_the_newest_of_several(path: str) -> None:
    faults = Faults()
    first = Gate(faults)
    async with SqliteStore(path, make_connection=faults) as store:
        script = await Script(store).create()
        first.armed = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(script.write, script.input("a"))
            await first.wait_reached()
            nursery.start_soon(script.write, script.input("b"))
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        second = Gate(faults)
        second.armed = True
        first.go.set()
        await second.wait_reached()
        async with trio.open_nursery() as nursery:
            loaded: list[list[str]] = []

            async def load() -> None:
                loaded.append(queue(await script.load()))

            nursery.start_soon(load)
            await trio.testing.wait_all_tasks_blocked()
            assert loaded == []
            second.go.set()
        assert loaded == [["a", "b"]]


async def test_a_purge_asks_again_right_before_it_removes(path: str) -> None:
    """A session that comes into use while the purge looks for candidates stays."""
    store = SqliteStore(path, retention=Retention(resume_window_ms=10, max_age_ms=10))
    async with store:
        for name in ("a", "b"):
            await Script(store, name).create()
        registry: set[str] = set()
        asked: list[str] = []

        class Registry:
            def __contains__(self, session_id: object) -> bool:
                asked.append(str(session_id))
                if session_id == "a":
                    registry.add("b")  # it is joined meanwhile
                return session_id in registry

        assert (await store.purge(now=10**6, in_use=Registry())).sessions == 1
        assert asked == ["a", "b"]
        assert await store.load("b", **MANY) is not None


async def test_a_purge_leaves_what_became_active_after_it_looked(path: str) -> None:
    faults = Faults()
    gate = Gate(faults)
    store = SqliteStore(path, make_connection=faults, retention=Retention(resume_window_ms=10, max_age_ms=10))
    async with store:
        script, other = await Script(store).create(), await Script(store, "other").create()
        gate.armed = True

        class Registry:
            def __contains__(self, session_id: object) -> bool:
                gate.go.set()  # the purge has looked, and is about to hand over the removal
                return False

        async with trio.open_nursery() as nursery:
            # Handed over, not committed: the purge's look does not see it, its removal comes behind it.
            nursery.start_soon(script.write, script.input("a"))
            await gate.wait_reached()
            await store.purge(now=10**9, in_use=Registry())
        assert queue(await script.load()) == ["a"]
        assert await store.load("other", **MANY) is None
        assert other.seq == 0


async def test_the_space_of_what_was_purged_is_used_again(path: str) -> None:
    store = SqliteStore(path, retention=Retention(resume_window_ms=10, max_age_ms=10))
    sizes = []
    for _ in range(3):
        async with store:
            script = await Script(store).create()
            await script.write(*[script.output("x" * 10_000) for _ in range(400)])
            await store.purge(now=10**9, in_use=())
        sizes.append(os.path.getsize(path))
    assert sizes[2] < sizes[0] * 1.1


async def test_a_segment_is_filled_before_the_next_is_begun(path: str) -> None:
    """Also by a writer that finds it in the file, or has forgotten it; and a large one is not kept in memory."""

    def segments() -> list[int]:
        with closing(sqlite3.connect(path)) as connection:
            return [events for (events,) in connection.execute("SELECT events FROM segments ORDER BY id")]

    async with SqliteStore(path) as store:
        script = await Script(store).create()
        await script.write(script.output())
        await script.write(script.output())
        assert segments() == [2]
    async with SqliteStore(path) as store:
        script.store = store
        await script.write(script.output())
        assert segments() == [3]
        await store.delete("nobody")
        await script.write(script.output())
        assert segments() == [4]
        await script.write(script.output("x" * 50_000))
        await script.write(script.output())
        assert segments() == [4, 1, 1]
        await script.write(script.output("x" * 50_000))
        assert store._writer._known["s"].newest is None
        assert (await script.load()).events == script.written


async def test_a_deleted_session_leaves_nothing_to_whoever_gets_its_row(path: str) -> None:
    async with SqliteStore(path, max_events=8) as store:
        script = await Script(store).create()
        await script.write(script.input("a"), script.start("t", "a"), script.end("t"))
        for _ in range(20):
            await script.write(script.output())
        assert len((await script.load()).keys) == 1
        await store.delete("s")
    async with SqliteStore(path) as store:
        found = await (await Script(store, "another").create()).load()
        assert (found.events, found.keys) == ([], [])


# --- what a write costs the disk --------------------------------------------------------------------------------------


async def test_a_batch_changes_one_page_of_its_session_at_most(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment with room is written in place, wherever in the file it is, and new ones stand together at the end."""
    monkeypatch.setattr(sqlite_checkpoint, "EVERY", 1 << 40)  # so the WAL has a frame for each page of a transaction
    chance = random.Random(1)

    async def write(scripts: list[Script]) -> None:
        async with trio.open_nursery() as nursery:
            for script in scripts:
                turn_id = f"t{script.seq}"
                nursery.start_soon(script.write, script.input(turn_id), script.start(turn_id, turn_id))
        async with trio.open_nursery() as nursery:
            for script in scripts:
                turn_id = f"t{script.seq - 2}"
                nursery.start_soon(script.write, script.output("an answer", turn_id), script.end(turn_id))

    async with SqliteStore(path) as store:
        scripts = [await Script(store, f"s{i}").create() for i in range(200)]
        for _ in range(5):
            await write(scripts)
    async with SqliteStore(path) as store:  # which goes on where the other one ended
        for script in scripts:
            script.store = store
        before = os.path.getsize(path + "-wal")
        for _ in range(50):
            await write(chance.sample(scripts, 10))
        pages = (os.path.getsize(path + "-wal") - before) / (4096 + 24)
        transactions = store.statistics().transactions
    assert transactions <= 3 * 100
    # Of every transaction: a page or two of sessions, the index of segments, the first one of the file.
    assert pages - 5 * transactions < 1000


# --- by its URL ------------------------------------------------------------------------------------------------------


async def test_open_store(tmp_path: Path) -> None:
    limits = Limits(replay_max_events=8)
    assert isinstance(open_store(StoreSettings(), limits), MemoryStore)
    async with open_store(StoreSettings(url=f"sqlite:{tmp_path}/x.db"), limits) as store:
        assert isinstance(store, SqliteStore)
        assert store.durable
        script = await Script(store).create()
        for _ in range(20):
            await script.write(script.output())
        assert len((await script.load()).events) <= 10
    assert not open_store(StoreSettings(url=f"sqlite:{tmp_path}/x.db", durability="normal"), limits).durable


@pytest.mark.parametrize("url", ["sqlite", "sqlite:", "redis://x", "memory:", "sqlite::memory:", "/tmp/x.db"])
def test_an_unknown_url(url: str) -> None:
    with pytest.raises(ConfigError, match=r"store\.url: expected .*'?memory'?") as caught:
        open_store(StoreSettings(url=url), Limits())
    assert caught.value.key == "store.url"


async def test_a_file_keeps_sessions_for_longer_than_they_can_be_resumed_and_memory_does_not(tmp_path: Path) -> None:
    limits = Limits(resume_window_ms=1000)
    for url, day in (("memory", 1), (f"sqlite:{tmp_path}/x.db", 30)):
        keep = StoreSettings(url=url, keep_ms=30_000, max_sessions=2)
        async with open_store(keep, limits) as store:
            for n in range(4):
                script = await Script(store, f"s{n}").create()
                await script.write(script.make(m.Custom, name="n", at=n))
            assert (await store.purge(now=1000, in_use=())).sessions_left == 4, "they may still be resumed"
            assert (await store.purge(now=1010, in_use=())).sessions_left == (0 if day == 1 else 2)
            assert (await store.purge(now=30_003, in_use=())).sessions_left == (0 if day == 1 else 1)
            assert (await store.purge(now=30_004, in_use=())).sessions_left == 0
    with pytest.raises(ConfigError, match=r"store\.keep_ms"):
        StoreSettings(keep_ms=0)


def test_sqlite_is_imported_only_when_asked_for() -> None:
    code = "import sys, gateway.store; assert not {'sqlite3', 'gateway.store.sqlite'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
