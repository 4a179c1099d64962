"""PROTOCOL section 7: a client that does not read is its own problem and nobody else's (DESIGN properties 7 and 12)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import plain_client
import pytest
import tls_certificates as certificates
import trio
from plain_client import Closed, Plain, Reader, dialled, ended, eventually, follow, gateway_of, joined
from wsproto.events import Ping

from gateway import Turn
from gateway.server import Gateway

pytestmark = pytest.mark.usefixtures("line")  # each with and without TLS

SMALL = {"send_buffer_bytes": 4096}
"""The kernel keeps little, so that a client that does not read is noticed soon."""


async def flood(turn: Turn) -> None:
    count, size = map(int, turn.input.content.split())
    for n in range(count):
        await turn.send(f"{n:<{size}}")


def text_of(count: int, size: int) -> str:
    return "".join(f"{n:<{size}}" for n in range(count))


async def drip(client: Plain, size: int, pause: float) -> None:
    """Read at a snail's pace, for ever."""
    while True:
        await client._read(size)
        await trio.sleep(pause)


@asynccontextmanager
async def process() -> AsyncIterator[tuple[subprocess.Popen[str], tuple[str, int]]]:
    script = Path(__file__).with_name("gateway_process.py")
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as directory:
        files = certificates.write(Path(directory), certificates.issue()) if plain_client.SECURE else {}
        child = subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, str(script), *files.values()],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        port = child.stdout and await trio.to_thread.run_sync(child.stdout.readline)
    try:
        assert child.stdout is not None
        yield child, ("127.0.0.1", int(port or 0))
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def resident(pid: int) -> float:
    """MiB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


async def gone(address: tuple[str, int], client: Plain) -> None:
    """Wait until a client is no member of its session any more, as everyone can see."""
    with trio.fail_after(30):
        while True:
            async with joined(address, client.hello, since=10**9) as looking:
                if client.hello["connection_id"] not in [item["connection_id"] for item in looking.hello["presence"]]:
                    return
            await trio.sleep(0.05)


def blocked(gateway: Gateway, client: Plain) -> bool:
    return client.hello["connection_id"] in [connection.member.connection_id for connection in gateway.blocked]


async def test_60_000_deltas_past_a_stalled_client(record_property: Any) -> None:
    async with (
        process() as (child, address),
        joined(address, "s") as reading,
        joined(address, "s", small=True) as stalled,
    ):
        await reading.message("1000 100")
        await reading.until("turn_ended")
        before = most = resident(child.pid)
        reader = Reader(reading.seen[-1]["seq"])
        closed_at: list[Closed] = []

        async def watch_memory() -> None:
            nonlocal most
            while True:
                most = max(most, resident(child.pid))
                await trio.sleep(0.01)

        await reading.send("message", request_id="big", content="60000 100")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch_memory)
            started = trio.current_time()
            end = await follow(reading, reader, ended)
            took = trio.current_time() - started
            await gone(address, stalled)
            # Within close_timeout: what was on its way comes out, then the close frame.
            closed_at.append(await stalled.until_closed())
            nursery.cancel_scope.cancel()
        assert (closed_at[0].code, closed_at[0].reason) == (1013, "slow_consumer")
        assert reader.text(end["turn_id"]) == text_of(60_000, 100)
        await reading.ask("ping", "pong")
        record_property("growth_mib", round(most - before, 1))
        record_property("seconds", round(took, 2))
        print(f"grew by {most - before:.1f} MiB, reader done after {took:.2f} s")
        assert most - before < 60


async def test_the_stalled_one_resumes_from_its_cursor() -> None:
    limits = {**SMALL, "slow_grace_ms": 50, "max_buffered_bytes": 100_000, "send_timeout_ms": 600_000}
    async with gateway_of(flood, limits=limits) as gateway:
        slow = Reader()
        async with joined(gateway, "s", small=True) as stalled:
            slow.take(stalled.hello)
            await stalled.send("message", request_id="r", content="20000 100")
            await eventually(lambda: gateway.statistics().closes == {"1013 slow_consumer": 1})
            closed = await stalled.until_closed()
            assert (closed.code, closed.reason) == (1013, "slow_consumer")
            for frame in stalled.seen[1:]:
                slow.take(frame)
        await eventually(lambda: gateway.statistics().turns == 0)
        async with joined(gateway, "s", since=slow.cursor, epoch=slow.epoch) as back:
            slow.take(back.hello)
            last = back.hello["last_disconnect"]
            assert (last["code"], last["reason"]) == (1013, "slow_consumer")
            end = await follow(back, slow, ended)
            assert slow.text(end["turn_id"]) == text_of(20_000, 100)
            assert slow.snapshots == 0
        assert gateway.statistics().blocked_connections == 0


async def test_a_write_without_progress_is_closed_even_if_little_is_left() -> None:
    limits = {**SMALL, "send_timeout_ms": 300}
    async with gateway_of(flood, limits=limits) as gateway, joined(gateway, "s", small=True) as stalled:
        await stalled.send("message", request_id="r", content="2000 100")
        await eventually(lambda: gateway.statistics().closes == {"1013 slow_consumer": 1})
        assert (await stalled.until_closed()).code == 1013


async def test_who_is_closed_for_not_reading_may_still_abort_and_nothing_else() -> None:
    async def flood_and_hold(turn: Turn) -> None:
        await flood(turn)
        await trio.sleep_forever()

    limits = {**SMALL, "send_timeout_ms": 300, "close_timeout_ms": 30_000}
    async with gateway_of(flood_and_hold, limits=limits) as gateway, joined(gateway, "s", small=True) as stalled:
        await stalled.send("message", request_id="r", content="2000 100")
        await eventually(lambda: gateway.statistics().closes == {"1013 slow_consumer": 1})
        await stalled.send("message", request_id="late", content="1 1")
        assert gateway.statistics().turns == 1
        await stalled.send("abort")
        await eventually(lambda: gateway.statistics().turns == 0)
        async with joined(gateway, "s", since=0) as other:
            end = await other.until("turn_ended")
            assert end["outcome"] == "aborted"
            await other.ask("ping", "pong")
            assert [frame["request_id"] for frame in other.seen if frame["type"] == "input"] == ["r"]


async def test_a_close_that_nobody_reads_is_bounded() -> None:
    limits = {**SMALL, "send_timeout_ms": 100, "close_timeout_ms": 100}
    async with gateway_of(flood, limits=limits) as gateway, joined(gateway, "s", small=True) as stalled:
        await stalled.send("message", request_id="r", content="2000 100")
        await eventually(lambda: gateway.statistics().closes == {"1013 slow_consumer": 1})
        await eventually(lambda: gateway._serving == 0)
        assert (await stalled.until_closed()).code in (None, 1006, 1013)


async def test_a_large_replay_to_a_slow_reader_is_no_fault() -> None:
    """Everything is slow here but the client never stops: what the log held before it joined does not count."""
    limits = {**SMALL, "slow_grace_ms": 20, "send_timeout_ms": 10_000, "max_buffered_bytes": 20_000}
    async with gateway_of(flood, limits=limits) as gateway:
        async with joined(gateway, "s") as client:
            await client.message("10000 100")
        await eventually(lambda: gateway.statistics().turns == 0)
        async with joined(gateway, "s", small=True) as slow:
            with trio.move_on_after(1.5):
                await drip(slow, 4096, 0.01)
            assert gateway.statistics().closes == {}
            reader = Reader()
            reader.take(slow.hello)
            end = await follow(slow, reader, ended)
            assert reader.text(end["turn_id"]) == text_of(10_000, 100)


async def test_what_comes_after_the_join_does_count() -> None:
    limits = {**SMALL, "slow_grace_ms": 20, "send_timeout_ms": 600_000, "max_buffered_bytes": 20_000}
    async with gateway_of(flood, limits=limits) as gateway:
        async with joined(gateway, "s", small=True) as client:
            await client.message("5000 100")
            await eventually(lambda: gateway.statistics().turns == 0)
            await eventually(lambda: gateway.statistics().connections == 0)
        assert gateway.statistics().closes == {"1013 slow_consumer": 1}


async def test_a_socket_blocked_by_a_websocket_pong_is_watched_too() -> None:
    """The library's own replies can fill a socket: the watch has to know although no write of ours was refused."""
    limits = {**SMALL, "send_timeout_ms": 300, "heartbeat_ms": 60_000}
    async with gateway_of(flood, limits=limits) as gateway, joined(gateway, "s", small=True) as stalled:
        with trio.fail_after(20):
            while not _blocked(gateway):
                await stalled.send_event(Ping(payload=b"x" * 120))
                await trio.lowlevel.checkpoint()
        assert gateway.statistics().blocked_connections == 0
        await stalled.send("ping")
        await eventually(lambda: gateway.statistics().closes == {"1013 slow_consumer": 1})


def _blocked(gateway: Gateway) -> bool:
    return any(connection._ws.blocked for connection in gateway.joined)


async def test_droppable_frames_are_dropped_for_who_is_behind_and_counted() -> None:
    limits = {**SMALL, "send_timeout_ms": 60_000, "heartbeat_ms": 60_000}
    async with gateway_of(flood, limits=limits) as gateway, joined(gateway, "s") as one:
        async with joined(gateway, "s", small=True) as stalled, joined(gateway, "s") as three:
            await one.message("3000 100")
            await one.until("turn_ended")
            await three.until("turn_ended")
            await eventually(lambda: gateway.statistics().blocked_connections == 1)
            for n in range(300):
                await one.send("signal", name="typing", data=n)
                assert (await three.until("signal"))["data"] == n
            assert gateway.statistics().dropped_frames == 300
            # Replies are not droppable: they come when it reads again.
            await stalled.send("ping", nonce="mine")
            assert (await stalled.until("pong"))["nonce"] == "mine"
            assert not stalled.taken("signal")


async def test_a_flood_of_requests_without_reading_is_overloaded_while_reading_goes_on() -> None:
    limits = {**SMALL, "send_timeout_ms": 60_000, "heartbeat_ms": 60_000, "slow_grace_ms": 60_000}

    async def forever(turn: Turn) -> None:
        await turn.send("x" * 2_000_000)
        await trio.sleep_forever()

    async with gateway_of(forever, limits=limits) as gateway, joined(gateway, "s") as one:
        async with joined(gateway, "s", small=True) as stalled:
            await one.message()
            await eventually(lambda: blocked(gateway, stalled))
            for n in range(200):
                await stalled.send("ping", nonce=n)
            # Nothing it is owed can reach it, but what it says is heard.
            await stalled.send("abort")
            await one.until("turn_ended", outcome="aborted")
            assert gateway.statistics().closes == {}
            for n in range(100):
                await stalled.send("ping", nonce=n)
            await eventually(lambda: gateway.statistics().connections == 1)
            assert gateway.statistics().closes == {"1013 overloaded": 1}
            closed = await stalled.until_closed()
            assert (closed.code, closed.reason) == (1013, "overloaded")


async def test_many_replies_at_once_are_no_fault_of_a_client_that_reads() -> None:
    async with gateway_of(flood) as gateway, joined(gateway) as client:
        await client.send_text(json.dumps([{"type": "ping", "nonce": n} for n in range(3000)]))
        assert [(await client.until("pong"))["nonce"] for _ in range(3000)] == list(range(3000))
        for n in range(600):
            await client.send("message", request_id=f"r{n}", content="1 1")
        answers = [await client.recv() for _ in range(600)]
        while len([frame for frame in client.seen if frame["type"] in ("accepted", "error")]) < 600:
            answers.append(await client.recv())
        assert {frame["code"] for frame in client.taken("error")} <= {"inbox_full"}


async def test_replies_are_bounded_in_bytes_too() -> None:
    limits = {**SMALL, "send_timeout_ms": 60_000, "max_buffered_bytes": 100_000, "max_frame_bytes": 262_144}
    async with gateway_of(flood, limits=limits) as gateway, joined(gateway, small=True) as client:
        sent = 0
        try:
            while not gateway.statistics().closes and sent < 250:
                await client.send("ping", nonce="x" * 16_000)
                sent += 1
                await trio.lowlevel.checkpoint()
        except trio.BrokenResourceError:
            pass  # closed while it was sending
        await eventually(lambda: gateway.statistics().closes == {"1013 overloaded": 1})
        assert sent < 200


async def test_an_abort_is_answered_at_once_while_outbox_and_socket_are_full(record_property: Any) -> None:
    async def endless(turn: Turn) -> None:
        while True:
            await turn.send("x" * 100)

    limits = {**SMALL, "slow_grace_ms": 60_000, "send_timeout_ms": 60_000, "max_turn_bytes": 2**30, "max_outbox": 16}
    took: list[float] = []
    async with gateway_of(endless, limits=limits) as gateway, joined(gateway, "s", small=True) as stalled:
        await stalled.message()
        for n in range(5):
            async with joined(gateway, "s", since=10**9, capabilities=[]) as other:
                if n:
                    await other.message()
                await eventually(lambda: blocked(gateway, stalled))
                await other.ask("ping", "pong")
                started = trio.current_time()
                await other.send("abort")
                aborted = await other.until("aborted")
                took.append(trio.current_time() - started)
                assert aborted["turn_id"]
        assert gateway.statistics().turns == 0
        assert gateway.statistics().blocked_connections >= 1
    print("abort answered after", [f"{1000 * item:.0f} ms" for item in took])
    record_property("abort_ms", [round(1000 * item, 1) for item in took])
    # The figure is 100 ms; a machine that is busy with other tests gets more.
    assert sorted(took)[2] < 1


async def test_an_abort_of_the_stalled_client_itself_is_heard() -> None:
    async def endless(turn: Turn) -> None:
        while True:
            await turn.send("x" * 100)

    limits = {**SMALL, "slow_grace_ms": 60_000, "send_timeout_ms": 60_000, "max_turn_bytes": 2**30}
    async with gateway_of(endless, limits=limits) as gateway, joined(gateway, small=True) as stalled:
        await stalled.message()
        await eventually(lambda: gateway.statistics().blocked_connections == 1)
        await stalled.send("abort")
        await eventually(lambda: gateway.statistics().turns == 0)
        assert (await stalled.until("aborted"))["withdrawn"] == []


async def test_a_laggard_gets_merged_deltas_and_skips_what_is_superseded() -> None:
    limits = {**SMALL, "slow_grace_ms": 60_000, "send_timeout_ms": 60_000}
    async with gateway_of(flood, limits=limits) as gateway, joined(gateway, "s") as keeping_up:
        async with joined(gateway, "s", small=True) as laggard:
            quick, slow = Reader(), Reader()
            slow.take(laggard.hello)
            await keeping_up.send("message", request_id="r", content="20000 50")
            await follow(keeping_up, quick, ended)
            end = await follow(laggard, slow, ended)
            assert slow.text(end["turn_id"]) == quick.text(end["turn_id"]) == text_of(20_000, 50)
            deltas = [frame for frame in laggard.seen if frame["type"] == "delta"]
            assert len(deltas) < 200, "merged"
            assert sum(len(frame["text"]) for frame in deltas) < 20_000 * 50 / 2, "superseded"
            assert slow.kept == [
                {**event, "first": old["first"]} for event, old in zip(quick.kept, slow.kept, strict=True)
            ]


async def test_a_laggard_that_the_log_has_left_behind_gets_a_snapshot() -> None:
    """Nobody evicts for it, and nobody waits for it: it is resynced on the connection it has."""

    async def agent(turn: Turn) -> str:
        return "x" * 50_000 + turn.input.content

    limits = {**SMALL, "slow_grace_ms": 60_000, "send_timeout_ms": 60_000, "replay_max_events": 8}
    async with gateway_of(agent, limits=limits) as gateway, joined(gateway, "s") as one:
        async with joined(gateway, "s", small=True) as laggard:
            for n in range(20):
                await one.message(str(n))
                while len(one.taken("turn_ended")) <= n:
                    await one.recv()
            assert blocked(gateway, laggard)
            reader = Reader()
            reader.take(laggard.hello)
            last = one.taken("turn_ended")[-1]["seq"]
            await follow(laggard, reader, lambda frame: reader.cursor == last)
            (snapshot,) = laggard.taken("snapshot")
            assert snapshot["reason"] == "cursor_expired"
            assert snapshot["transcript_truncated"] is True
            await one.message("live")
            end = await follow(laggard, reader, ended)
            assert reader.text(end["turn_id"]).endswith("live")


async def test_half_a_request_holds_up_nobody() -> None:
    async with gateway_of(flood) as gateway, dialled(gateway) as client, joined(gateway) as other:
        await client.send_raw(b"\x81\xfe\xff")
        await other.ask("ping", "pong")
        await client.send_raw(b"\xff")
        await other.ask("ping", "pong")


async def test_what_is_read_ahead_of_a_busy_handler_is_bounded() -> None:
    async with gateway_of(flood) as gateway, joined(gateway) as client:
        (connection,) = gateway.joined
        ahead = 0

        async def look() -> None:
            nonlocal ahead
            while True:
                ahead = max(ahead, sum(map(len, connection._ws._messages)))
                await trio.lowlevel.checkpoint()

        async def send() -> None:
            await client.send_text("[" + ",".join(['{"type":"pong"}'] * 60_000) + "]")
            for _ in range(30):
                await client.send("pong", nonce="x" * 500_000)
            await client.send("ping")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            nursery.start_soon(send)
            await client.until("pong")
            nursery.cancel_scope.cancel()
        assert ahead < 3_000_000
