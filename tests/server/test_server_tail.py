"""Memory holds a session's newest events only; a client does not notice."""

from __future__ import annotations

import gc
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from plain_client import Frame, Plain, Reader, ended, eventually, follow, gateway_of, joined

from gateway import Turn
from gateway.errors import StoreUnavailable
from gateway.protocol.messages import Event, Output
from gateway.server import Gateway
from gateway.store import MemoryStore, Store
from gateway.store.sqlite import SqliteStore

SMALL = {"tail_max_bytes": 1024}
"""Four of the answers below."""


class Watched(MemoryStore):
    """Counts reads; they can be held, and told to fail."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.reads: list[tuple[int, int]] = []
        self.gate: trio.Event | None = None
        self.error: Exception | None = None

    async def read(self, session_id: str, after: int, upto: int) -> list[Event]:
        self.reads.append((after, upto))
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        return await super().read(session_id, after, upto)


async def long_answer(turn: Turn) -> str:
    return turn.input.content * 200


@asynccontextmanager
async def after_turns(store: Store, count: int, **limits: int) -> AsyncIterator[tuple[Gateway, Plain, Reader]]:
    """A gateway whose session ``s`` has had some turns, all of which `Reader` saw."""
    async with gateway_of(long_answer, store=store, limits={**SMALL, **limits}) as gateway:
        async with joined(gateway, "s") as client:
            reader = Reader()
            for n in range(count):
                await client.send("message", content=str(n % 10), request_id=f"r{n}")
                await follow(client, reader, ended)
            yield gateway, client, reader


def events(reader: Reader) -> list[Frame]:
    """What it was sent, but for `first`, which depends on where it began to read."""
    return [{**frame, "first": 0} for frame in reader.kept]


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return MemoryStore() if request.param == "memory" else SqliteStore(tmp_path / "s.db")


async def test_a_client_from_long_ago_gets_everything_that_others_got(store: Store) -> None:
    async with after_turns(store, 60) as (gateway, live, whole):
        log = gateway.registry.sessions["s"].log
        assert log.held_bytes <= 2048 < log.retained_bytes / 10
        for since in (0, 1, whole.kept[100]["seq"], log.tail - 1, log.tail, log.tail + 1, log.head):
            async with joined(gateway, "s", since=since) as late:
                assert (late.hello["oldest_cursor"], late.hello["resync_required"]) == (0, False)
                reader = Reader(since)
                while reader.cursor < log.head:
                    reader.take(await late.recv())
                assert events(reader) == [event for event in events(whole) if event["seq"] > since]
                assert reader.snapshots == 0
                # And it is joined to what happens now.
                await late.message("x")
                await late.until("turn_ended")
                while whole.cursor < log.head:
                    whole.take(await live.recv())


async def test_a_session_that_comes_back_has_its_tail_in_memory_and_the_rest_in_the_file(tmp_path: Path) -> None:
    async with after_turns(SqliteStore(tmp_path / "s.db"), 40) as (_, _, whole):
        pass
    async with gateway_of(long_answer, store=SqliteStore(tmp_path / "s.db"), limits=SMALL) as gateway:
        async with joined(gateway, "s", since=0) as late:
            log = gateway.registry.sessions["s"].log
            assert log.held_bytes <= 1024 < log.retained_bytes / 10
            reader = Reader()
            while reader.cursor < log.head:
                reader.take(await late.recv())
            assert events(reader) == events(whole)


async def test_a_snapshot_has_what_is_not_in_memory(store: Store) -> None:
    async with after_turns(store, 60, snapshot_max_events=100) as (gateway, live, whole):
        kept = [frame for frame in events(whole) if frame["type"] in ("input", "output", "turn_ended")]
        async with joined(gateway, "s", since=9, epoch="e_another") as late:
            assert late.hello["resync_reason"] == "epoch_changed"
            snapshot = await late.until("snapshot")
        assert [{**frame, "first": 0} for frame in snapshot["transcript"]] == kept[-100:]
        assert snapshot["transcript_truncated"] is True
        await live.send("resync")
        again = await live.until("snapshot")
        assert again["transcript"] == snapshot["transcript"]
        assert again["cursor"] == whole.cursor
        await live.message("x", "last")
        await follow(live, whole, ended)
        assert whole.kept[-1]["type"] == "turn_ended"
        assert [frame["request_id"] for frame in whole.kept if frame["type"] == "input"][-1] == "last"


async def test_a_cursor_that_left_the_window_expires_as_ever() -> None:
    async with after_turns(MemoryStore(), 60, replay_max_events=40) as (gateway, _, whole):
        log = gateway.registry.sessions["s"].log
        assert log.floor == whole.kept[-41]["seq"] < log.tail
        async with joined(gateway, "s", since=log.floor) as at_the_edge:
            assert at_the_edge.hello["resync_required"] is False
            reader = Reader(log.floor)
            while reader.cursor < log.head:
                reader.take(await at_the_edge.recv())
            assert events(reader) == events(whole)[-40:]
        async with joined(gateway, "s", since=log.floor - 1) as below:
            assert below.hello["resync_reason"] == "cursor_expired"
            assert (await below.until("snapshot"))["cursor"] == log.head


async def test_while_one_waits_for_the_store_everything_else_goes_on() -> None:
    store = Watched()
    async with after_turns(store, 30) as (gateway, live, whole):
        store.gate = trio.Event()
        async with joined(gateway, "s", since=0) as late:
            await eventually(lambda: store.reads)
            for n in range(20):  # the tail moves on far beyond where the page was to join it
                await live.message("y", f"more{n}")
                for frame in live.seen:
                    if frame.get("seq", 0) > whole.cursor:
                        whole.take(frame)
                await follow(live, whole, ended)
            assert (await late.ask("ping", "pong"))["type"] == "pong"
            assert not [frame for frame in late.seen if frame["type"] in ("input", "output")]
            store.gate.set()
            reader = Reader()
            while reader.cursor < whole.cursor:
                reader.take(await late.recv())
            assert events(reader) == events(whole)


async def test_a_resync_overtakes_a_page_that_was_asked_for() -> None:
    store = Watched()
    async with after_turns(store, 30) as (gateway, _, whole):
        store.gate = trio.Event()
        async with joined(gateway, "s", since=0) as late:
            await eventually(lambda: store.reads)
            await late.send("resync")
            await late.ask("ping", "pong")
            store.gate.set()
            reader = Reader()
            while reader.cursor < whole.cursor:
                reader.take(await late.recv())
            assert (reader.snapshots, reader.kept) == (1, [])


async def test_a_store_that_cannot_be_read_costs_a_reconnect_and_no_event() -> None:
    store = Watched()
    async with after_turns(store, 30) as (gateway, live, whole):
        store.error = StoreUnavailable("the disk reports an error")
        async with joined(gateway, "s", since=0) as late:
            assert str(await late.until_closed()) == "1011 internal"
        await live.message("still here")  # who has what memory has does not notice
        await follow(live, whole, ended)
        store.error = None
        async with joined(gateway, "s", since=0) as late:
            reader = Reader()
            while reader.cursor < whole.cursor:
                reader.take(await late.recv())
        assert reader.snapshots == 0


async def test_a_live_reader_never_goes_to_the_store() -> None:
    store = Watched()
    async with after_turns(store, 60) as (gateway, _, _):
        log = gateway.registry.sessions["s"].log
        assert log.floor == 0 < log.tail
        assert store.reads == []


async def test_an_agent_remembers_half_a_tail_however_little_memory_there_is() -> None:
    seen: list[list[str]] = []

    async def agent(turn: Turn) -> str:
        seen.append([event.content[:4] for event in turn.transcript if isinstance(event, Output)])
        return f"{len(seen):04}" + "x" * 2000

    limits = {"tail_max_bytes": 60_000, "all_tails_max_bytes": 1024}  # a share of 16 KiB: eight answers at most
    async with gateway_of(agent, limits=limits) as gateway:
        async with joined(gateway, "s") as client:
            for n in range(30):
                await client.send("message", content="go", request_id=f"r{n}")
                await client.until("turn_ended")
        assert gateway.registry.sessions["s"].log.held_bytes <= 18 * 1024
    for n, remembered in enumerate(seen, 1):
        assert remembered == [f"{i:04}" for i in range(1, n)][-len(remembered) :]
        assert len(remembered) >= min(n - 1, 10)
        assert len(remembered) == len(set(remembered))


async def test_sessions_share_what_all_may_hold() -> None:
    async with gateway_of(long_answer, limits={"all_tails_max_bytes": 64 * 1024}) as gateway:
        clients: list[Plain] = []
        async with trio.open_nursery() as nursery:

            async def talk(name: str) -> None:
                async with joined(gateway, name) as client:
                    clients.append(client)
                    for n in range(12):
                        await client.send("message", content="0123456789", request_id=f"r{n}")
                        await client.until("turn_ended")
                    await trio.sleep_forever()

            def held() -> list[int]:
                return [session.log.held_bytes for session in gateway.registry.sessions.values()]

            nursery.start_soon(talk, "first")
            await eventually(lambda: len(held()) == 1 and held()[0] > 24 * 1024)
            for n in range(3):
                nursery.start_soon(talk, f"other{n}")
            await eventually(lambda: len(held()) == 4)
            await eventually(lambda: all(len(client.taken("turn_ended")) == 12 for client in clients))
            gateway.registry.rest_idle()  # the watch does it every few seconds
            assert sum(held()) <= 64 * 1024
            assert min(held()) > 8 * 1024
            nursery.cancel_scope.cancel()


async def test_a_session_stays_while_someone_who_joins_waits_for_its_history() -> None:
    store = Watched()
    async with after_turns(store, 30, idle_session_ms=10) as (gateway, live, _):
        await live.cut()
        await eventually(lambda: not gateway.joined)
        store.gate = trio.Event()
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def let_it_wait() -> None:
                await eventually(lambda: store.reads)
                await trio.sleep(0.02)  # the session is idle for long enough now
                gateway.registry.rest_idle()
                assert store.gate is not None
                store.gate.set()

            async with joined(gateway, "s", since=5, epoch="e_another") as late:
                await late.message("are you there?")
                await late.until("turn_ended")


async def test_a_session_that_rests_leaves_memory_without_the_collector() -> None:
    """In a process with many objects the collector seldom comes by; a circle would stay for hours."""
    gc.collect()
    gc.disable()
    try:
        async with gateway_of(long_answer, limits={"idle_session_ms": 10}) as gateway:
            here: list[weakref.ref[object]] = []
            for n in range(20):
                async with joined(gateway, f"s{n}") as client:
                    await client.message()
                    await client.until("turn_ended")
                    here += map(weakref.ref, (gateway.registry.sessions[f"s{n}"], *gateway.joined))
                    if n % 2:
                        await client.close()
            await eventually(lambda: not gateway.connections and not len(gateway.registry))
            # A loop that looks at all of them may still have its last one in hand.
            await eventually(lambda: sum(ref() is not None for ref in here) <= 4)
    finally:
        gc.enable()
