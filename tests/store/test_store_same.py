"""The two stores side by side: whatever is written, and whenever the file is closed in between, a session comes back
the same from both."""

from __future__ import annotations

import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import event, given
from hypothesis import strategies as st
from steady import steady
from store_helpers import Script, stored

from gateway.protocol import messages as m
from gateway.store import MemoryStore, Stored, StoredSession
from gateway.store.inspect import summaries
from gateway.store.sqlite import SqliteStore
from gateway.store.sqlite_segments import fetch

BOUNDS = [(8, 1 << 30), (40, 4000), (1000, 1500), (1000, 1 << 30)]

request_ids = st.sampled_from(["a", "b", "nul \0", "ä" * 40])
steps = st.one_of(
    st.tuples(st.just("input"), request_ids, st.sampled_from(["queue", "collect", "steer"])),
    st.tuples(st.just("withdraw"), request_ids),
    st.tuples(st.just("start"), st.sets(request_ids, max_size=3)),
    st.tuples(st.just("end"), st.sampled_from(["completed", "lost"])),
    st.tuples(st.just("output"), st.sampled_from([0, 0, 30, 300, 700, 900, 2500])),
    st.tuples(st.just("ask"), st.sampled_from(["q1", "q2", "q3"])),
    st.tuples(st.just("answer"), st.sampled_from(["q1", "q2", "q3"])),
    st.tuples(st.just("state"), st.dictionaries(st.sampled_from("xyz"), st.none() | st.integers(0, 9), max_size=2)),
    st.tuples(st.just("deltas"), st.integers(1, 20)),
)
programs = st.lists(
    st.one_of(
        st.tuples(st.sampled_from("st"), st.lists(steps, min_size=1, max_size=8)),
        st.just(("reopen", [])),
    ),
    min_size=1,
    max_size=25,
)


class Both:
    """A session in both stores. It writes what a gateway could: a turn's events in a turn, an ask's answer once."""

    def __init__(self, name: str, memory: MemoryStore) -> None:
        self.script = Script(memory, name)
        self.turn: str | None = None
        self.lost: tuple[int, list[str]] = (1, [])
        """Of the latest turn that was lost: its attempt and its inputs."""
        self.asks: set[str] = set()

    def events(self, step: tuple[Any, ...]) -> list[m.Event]:
        script, (kind, *args) = self.script, step
        turn_id = self.turn or ""
        match kind:
            case "input":
                return [script.input(args[0], f"{script.seq}")]
            case "withdraw":
                return [script.make(m.Withdrawn, request_id=args[0], reason="aborted")]
            case "deltas":
                script.seq += args[0]
                return []
            case "state":
                return [script.state(**args[0])]
            case "start" if not self.turn:
                attempt, again = self.lost
                self.lost = (1, [])
                self.turn = f"t{script.seq}"
                if again:
                    self.taken, self.attempt = again, attempt + 1
                else:
                    self.taken, self.attempt = sorted(args[0]), 1
                return [script.start(self.turn, *self.taken, attempt=self.attempt)]
            case "end" if self.turn:
                if args[0] == "lost":
                    self.lost = (self.attempt, self.taken)
                self.turn = None
                self.asks.clear()
                return [script.end(turn_id, args[0])]
            case "output" if self.turn:
                return [script.output("x" * args[0], turn_id)]
            case "ask" if self.turn and args[0] not in self.asks:
                self.asks.add(args[0])
                return [script.make(m.Ask, turn_id=turn_id, ask_id=args[0], kind="approval", prompt="Go on?")]
            case "answer" if args[0] in self.asks:
                self.asks.discard(args[0])
                return [script.make(m.Answered, turn_id=turn_id, ask_id=args[0], value=True)]
        return []

    def batch(self, plan: list[tuple[Any, ...]]) -> list[Stored]:
        batch = []
        for step in plan:
            on_busy = step[2] if step[0] == "input" else "queue"
            batch += [stored(one, on_busy) for one in self.events(step)]
        return batch


def plain(found: StoredSession | None) -> Any:
    assert found is not None
    return {name: getattr(found, name) for name in found.__slots__ if not name.startswith("__")}


def asks(one: m.Event) -> str | None:
    return one.ask_id if isinstance(one, m.Ask) else None


def below(path: Path, name: str, floor: int) -> set[int]:
    """The numbers up to `floor` that are in the file."""
    with closing(sqlite3.connect(path)) as connection:
        (id_,) = connection.execute("SELECT id FROM sessions WHERE session_id = ?", (name,)).fetchone()
        return {line.seq for line in fetch(connection, id_, -1, floor)}


async def run(path: Path, program: list[tuple[str, list[Any]]], max_events: int, max_bytes: int) -> None:
    memory = MemoryStore(max_events=max_events, max_bytes=max_bytes)
    store = SqliteStore(path, durability="normal", max_events=max_events, max_bytes=max_bytes)
    await store.__aenter__()
    try:
        sessions = {name: Both(name, memory) for name in "st"}
        for one in sessions.values():
            await memory.create(one.script.record, 64)
            await store.create(one.script.record, 64)
        floors = dict.fromkeys(sessions, 0)
        for name, plan in program:
            if name == "reopen":
                await store.__aexit__()
                store = SqliteStore(path, durability="normal", max_events=max_events, max_bytes=max_bytes)
                await store.__aenter__()
                continue
            batch = sessions[name].batch(plan)
            await memory.append(name, batch, 0)
            await store.append(name, batch, 0)
            for bounds in (
                {"max_events": max_events, "max_bytes": max_bytes, "tail_bytes": 500},
                {"max_events": 5, "max_bytes": 1500},
            ):
                same, found = await memory.load(name, **bounds), await store.load(name, **bounds)
                assert plain(found) == plain(same)
            whole = await store.load(name, max_events=1 << 40, max_bytes=1 << 40)
            assert whole is not None
            sizes = [len(stored(one).payload) for one in whole.events]
            assert len(sizes) <= max_events * 5 // 4
            assert len(sizes) == 1 or sum(sizes) <= max_bytes * 5 // 4
            if whole.events:
                numbers = [one.seq for one in whole.events]
                middle = numbers[len(numbers) // 2]
                read = await store.read(name, 0, middle)
                assert [one.seq for one in read] == [seq for seq in numbers if seq <= middle]
            if whole.floor != floors[name]:
                floors[name] = whole.floor
                needed = {one.event.seq for one in [*whole.queue, *whole.turn_inputs]}
                needed |= {whole.turn.seq} if whole.turn else set()
                needed |= {one.seq for one in sessions[name].script.written if asks(one) in whole.asks}
                assert below(path, name, whole.floor) <= needed, "a trim leaves what is needed, and nothing else"
                event("trimmed")
            assert set(await store.unfinished()) == set(await memory.unfinished())
            (summary,) = summaries(str(path), name)
            assert (summary.waiting, summary.in_turn) == (len(whole.queue), whole.turn is not None)
            assert (summary.events, summary.size) == (len(sizes), sum(sizes))
    finally:
        await store.__aexit__()


@pytest.mark.parametrize(("max_events", "max_bytes"), BOUNDS)
def test_both_stores_say_the_same(max_events: int, max_bytes: int) -> None:
    @steady
    @given(program=programs)
    def same(program: list[tuple[str, list[Any]]]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            trio.run(run, Path(folder) / "x.db", program, max_events, max_bytes)

    same()
