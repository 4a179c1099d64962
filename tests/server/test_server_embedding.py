"""`open_gateway` inside another program, without a port, and what one connection's failure means for the others."""

from __future__ import annotations

import json
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import trio
import trio.lowlevel
import trio.testing
from plain_client import Plain, dial, echo, ended, eventually, gateway_of, hello, joined
from structlog.testing import capture_logs

from gateway import Config, Server, open_gateway
from gateway.errors import BindError, ConfigError, GatewayError
from gateway.server import Gateway
from gateway.server.connection import Connection
from gateway.session import Session, Turn
from gateway.session.turn import YIELD_EVERY
from gateway.store import MemoryStore, Store
from gateway.store.sqlite import SqliteStore


async def in_memory(gateway: Gateway, **fields: Any) -> Plain:
    client = Plain(gateway.connect())
    await client.upgrade()
    await client.send_text(json.dumps(hello(**fields)))
    client.hello = await client.recv()
    assert client.hello["type"] == "hello_ok"
    return client


async def test_a_gateway_without_a_port() -> None:
    async with gateway_of(listen=False) as gateway:
        with pytest.raises(GatewayError):
            _ = gateway.url
        client = await in_memory(gateway)
        await client.message("hi")
        assert (await client.had("output"))["content"] == "echo: hi"
        await client.had("turn_ended")
        now = gateway.statistics()
        assert (now.connections, now.sessions, now.turns, now.queued_inputs) == (1, 1, 0, 0)
        assert await client.ask("leave", "left")
        await client.until_closed()
        await eventually(lambda: gateway.statistics().connections == 0)
        assert gateway.statistics().closes == {"1000 left": 1}
        with pytest.raises(AttributeError):
            now.connections = 7  # type: ignore[misc]


async def test_two_gateways_side_by_side_know_nothing_of_each_other() -> None:
    async with gateway_of() as one, gateway_of(listen=False) as two:
        async with joined(one, "s") as first:
            second = await in_memory(two, session_id="s")
            assert second.hello["resumed"] is False
            assert second.hello["epoch"] != first.hello["epoch"]
            await first.message("x")
            await first.had("turn_ended")
            await second.ask("ping", "pong")
            assert not [frame for frame in second.seen if "first" in frame]


async def test_a_port_in_use_is_one_typed_error() -> None:
    before = trio.lowlevel.current_statistics().tasks_living
    async with gateway_of() as gateway:
        port = gateway.address[1]
        with pytest.raises(BindError, match=f"127.0.0.1:{port} is in use"):
            async with open_gateway(Config(server=Server(port=port)), {"echo": echo}):
                raise AssertionError("it must not start")
        async with joined(gateway) as client:
            await client.ask("ping", "pong")
    await eventually(lambda: trio.lowlevel.current_statistics().tasks_living == before)
    with pytest.raises(BindError):
        async with open_gateway(Config(server=Server(host="203.0.113.1", port=0)), {"echo": echo}):
            raise AssertionError("it must not start")


async def test_no_agent_is_a_config_error() -> None:
    with pytest.raises(ConfigError):
        async with open_gateway(Config(), {}):
            raise AssertionError("it must not start")


async def test_the_port_is_free_again_afterwards() -> None:
    async with gateway_of() as gateway:
        port = gateway.address[1]
    async with gateway_of(server={"port": port}) as gateway, joined(gateway) as client:
        await client.ask("ping", "pong")


async def test_the_url() -> None:
    async with gateway_of(server={"path": "/agents"}) as gateway:
        assert gateway.url == f"ws://127.0.0.1:{gateway.address[1]}/agents"


# --- one connection's fault is its own (DESIGN property 20) ----------------------------------------------------------


async def test_a_handler_that_crashes_closes_its_connection_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    submit = Session.submit

    def crash(self: Session, frame: Any, reader: Any) -> None:
        if frame.content == "crash":
            raise ZeroDivisionError
        submit(self, frame, reader)

    monkeypatch.setattr(Session, "submit", crash)
    async with gateway_of() as gateway, joined(gateway, "s") as other, joined(gateway, "s") as client:
        await client.send("message", request_id="r", content="crash")
        closed = await client.until_closed()
        assert (closed.code, closed.reason) == (1011, "internal")
        await other.until("presence", event="left")
        await other.message("fine")
        await other.had("turn_ended")
        assert gateway.statistics().crashed_connections == 1


async def test_a_flush_that_crashes_closes_its_connection_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    flush = Connection.flush

    def crash(self: Connection) -> None:
        if self.cursor < 0:
            self.cursor = 0
            raise ZeroDivisionError
        flush(self)

    monkeypatch.setattr(Connection, "flush", crash)
    async with gateway_of() as gateway, joined(gateway, "s") as other, joined(gateway, "s") as client:
        (mine,) = [item for item in gateway.joined if item.member.connection_id == client.hello["connection_id"]]
        mine.cursor = -1
        await other.message("fine")
        closed = await client.until_closed()
        assert (closed.code, closed.reason) == (1011, "internal")
        await other.had("turn_ended")
        assert gateway.statistics().crashed_connections == 1


async def test_a_watch_that_crashes_closes_its_connection_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    check_alive = Connection.check_alive

    def crash(self: Connection, now: float, now_ms: int) -> None:
        if self.cursor < 0:
            raise ZeroDivisionError
        check_alive(self, now, now_ms)

    monkeypatch.setattr(Connection, "check_alive", crash)
    async with gateway_of(limits={"heartbeat_ms": 400}) as gateway, joined(gateway) as other, joined(gateway) as client:
        (mine,) = [item for item in gateway.joined if item.member.connection_id == client.hello["connection_id"]]
        mine.cursor = -1
        assert (await client.until_closed()).code == 1011
        await other.ask("ping", "pong")


async def test_a_session_that_crashes_closes_its_connections_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway_of() as gateway, joined(gateway, "good") as good, joined(gateway, "bad") as bad:
        session = gateway.registry.sessions["bad"]

        def crash(*args: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(session.view, "apply", crash)
        await bad.send("message", request_id="r", content="x")
        closed = await bad.until_closed()
        assert (closed.code, closed.reason) == (1011, "internal")
        await good.message()
        await good.had("turn_ended")


@pytest.mark.parametrize(
    "data",
    [
        b"\x00" * 1000,
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET /ws HTTP/1.1\r\nHost: \xff\xfe\r\n\r\n",
        b"POST /ws HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"G" * 100_000,
    ],
    ids=["zeros", "no upgrade", "not ascii", "post", "tls", "long"],
)
async def test_garbage_instead_of_a_request_ends_nothing_else(data: bytes) -> None:
    async with gateway_of(limits={"handshake_timeout_ms": 300}) as gateway, joined(gateway) as other:
        async with await trio.open_tcp_stream(*gateway.address) as stream:
            try:
                await stream.send_all(data)
                with trio.fail_after(10):
                    while await stream.receive_some():
                        pass
            except trio.BrokenResourceError:
                pass
        await other.ask("ping", "pong")
        assert gateway.statistics().crashed_connections == 0


async def test_garbage_after_the_handshake_ends_nothing_else() -> None:
    async with gateway_of() as gateway, joined(gateway) as other:
        for data in (
            b"\xff" * 20,
            b"\x81\x05hello",
            b"\x81\x82\x00\x00\x00\x00\xff\xff",
            b"\x89\xfe\xff\xff",
            b"\x88\x81\x00\x00\x00\x00\x00",
        ):
            async with joined(gateway) as client:
                await client.send_raw(data)
                assert (await client.until_closed()).code in (1002, 1007)
            await other.ask("ping", "pong")
        assert gateway.statistics().crashed_connections == 0


async def test_connections_in_memory_are_no_strangers_behind_one_address() -> None:
    async with gateway_of(limits={"max_pending_handshakes_per_peer": 2}, listen=False) as gateway:
        streams = [gateway.connect() for _ in range(10)]
        await eventually(lambda: gateway.statistics().pending_handshakes == 10)
        assert gateway.statistics().refused_sockets == 0
        for stream in streams:
            await stream.aclose()


# --- the figures of a session ----------------------------------------------------------------------------------------


async def test_an_answer_of_3000_tokens_does_not_expire_an_earlier_cursor() -> None:
    async def answer(turn: Any) -> None:
        for n in range(3000):
            await turn.send(f"token{n} ")

    async with gateway_of(answer, limits={"replay_max_events": 40}) as gateway, joined(gateway, "s") as client:
        await client.message("one", "r1")
        cursor = (await client.had("input"))["seq"]
        await client.had("turn_ended")
        for since in (0, cursor):
            async with joined(gateway, "s", since=since) as late:
                assert late.hello["resync_required"] is False
                await late.until("turn_ended")
                text = "".join(frame["content"] for frame in late.taken("output"))
                assert text == "".join(f"token{n} " for n in range(3000))


async def test_fifty_sessions_never_see_each_others_events() -> None:
    """DESIGN property 17."""

    async def agent(turn: Any) -> None:
        for n in range(200):
            await turn.send(f"[{turn.session_id}/{turn.input.content}/{n}]")
            if n % 10 == 0:
                await trio.lowlevel.checkpoint()

    async def converse(gateway: Gateway, name: str) -> None:
        async with joined(gateway, name) as client, joined(gateway, name) as watching:
            for round in range(3):
                await client.send("message", request_id=f"r{round}", content=f"{name}-{round}")
                end = await client.until("turn_ended")
                await watching.until("turn_ended", turn_id=end["turn_id"])
            for reader in (client, watching):
                for frame in reader.seen:
                    for key in ("text", "content"):
                        for piece in frame.get(key, "").replace("]", "[").split("["):
                            assert not piece or piece.startswith((f"{name}/{name}-", f"{name}-"))
                outputs = [frame["content"] for frame in reader.taken("output")]
                assert outputs == ["".join(f"[{name}/{name}-{r}/{n}]" for n in range(200)) for r in range(3)]
                events = [frame for frame in reader.seen if "first" in frame]
                assert all(frame["first"] <= old["seq"] + 1 for old, frame in pairwise(events))

    async with gateway_of(agent) as gateway, trio.open_nursery() as nursery:
        for n in range(50):
            nursery.start_soon(converse, gateway, f"s{n}")


async def test_a_thousand_queued_inputs() -> None:
    """DESIGN property 4: they drain in order, with as many tasks and as deep a stack as one needs."""
    depths: set[int] = set()
    counts: set[int] = set()
    go = trio.Event()

    async def agent(turn: Any) -> str:
        await go.wait()
        depth = 0
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            depth, frame = depth + 1, frame.f_back
        depths.add(depth)
        counts.add(trio.lowlevel.current_statistics().tasks_living)
        return str(turn.input.content)

    limits = {"max_inbox": 1000, "replay_max_events": 100_000}
    async with gateway_of(agent, limits=limits) as gateway, joined(gateway) as client:
        for n in range(1001):
            await client.send("message", request_id=f"r{n}", content=f"{n}")
            if n == 0:
                await client.until("turn_started")
        await client.until("accepted", request_id="r1000")
        assert gateway.statistics().queued_inputs == 1000
        full = await client.ask("message", "error", request_id="more", content="x")
        assert (full["code"], full["credit"]) == ("inbox_full", 0)
        go.set()
        while len(client.taken("turn_ended")) < 1001:
            await client.until("turn_ended")
        assert [frame["content"] for frame in client.taken("output")] == [str(n) for n in range(1001)]
        assert all(ended(frame) for frame in client.taken("turn_ended"))
        assert len(depths) == 1
        assert max(counts) - min(counts) <= 1


async def test_a_client_in_the_same_program_over_tcp() -> None:
    async with gateway_of() as gateway:
        client = await dial(gateway)
        await client.send_text(json.dumps(hello()))
        await client.until("hello_ok")
        await client.close()
        await eventually(lambda: gateway.statistics().connections == 0)


STORES: dict[str, Callable[[Path], Store]] = {
    "memory": lambda _: MemoryStore(),
    "sqlite": lambda folder: SqliteStore(folder / "sessions.sqlite"),
}


@pytest.mark.parametrize("store", STORES)
async def test_what_a_turn_says_first_is_written_in_the_step_that_says_it(store: str, tmp_path: Path) -> None:
    """Not a pass of the scheduler later: that is milliseconds when others stream. What follows may come together."""
    shown: list[str] = []

    async def agent(turn: Turn) -> None:
        (connection,) = gateway.joined
        session = connection._session
        assert session is not None
        for word in ("one", "two"):
            await turn.send(word)
            assert connection.cursor == session.log.head
            assert session.view.turn is not None
            shown.append("".join(session.view.turn.tails["answer"]))

    async with gateway_of(agent, listen=False, store=STORES[store](tmp_path)) as gateway:
        client = await in_memory(gateway)
        for _ in range(2):
            await client.message("hi")
            await client.until("turn_ended")
    assert shown == ["one", "one"] * 2


async def test_what_was_stored_is_written_in_the_step_that_hears_of_it(tmp_path: Path) -> None:
    behind: list[int] = []

    class Watched(SqliteStore):
        def _finish(self, group: list[Any]) -> None:
            super()._finish(group)
            for connection in gateway.joined:
                assert connection._session is not None
                behind.append(connection._session.log.head - connection.cursor)

    async with gateway_of(listen=False, store=Watched(tmp_path / "sessions.sqlite")) as gateway:
        client = await in_memory(gateway)
        await client.message("hi")
        ended = await client.until("turn_ended")
        assert ended["seq"] > 0
    assert behind[:2] == [0, 0], "the input with the start of its turn, and the end of it"


async def _send(turn: Turn) -> None:
    for _ in range(4):  # more than the outbox holds
        await turn.send("x")


async def _wait(turn: Turn) -> None:
    await turn.send("the outbox is full")


async def _wake(turn: Turn) -> None:
    await turn.send("the flusher sleeps")


async def _tool_call(turn: Turn) -> None:
    await turn.tool_call("tool")


async def _progress(turn: Turn) -> None:
    await turn.progress("key", 1)


async def _steered(turn: Turn) -> None:
    assert turn.steered()


@pytest.mark.parametrize("write", [_send, _wait, _wake, _tool_call, _progress, _steered])
async def test_an_agent_that_meets_the_recursion_limit_anywhere_harms_nobody(
    write: Callable[[Turn], Awaitable[None]],
) -> None:
    """Also not when it meets it in the middle of a call of ours: there it would tear what all sessions share."""

    async def agent(turn: Turn) -> str:
        async def deep(n: int) -> None:
            await (deep(n - 1) if n else write(turn))

        if turn.input.content == "also":
            return "it was not taken"
        while write is _steered and not turn._steer:
            await trio.testing.wait_all_tasks_blocked()
        for _ in range({_wait: 2, _wake: 1}.get(write, 0)):
            await turn.send("x")
        if write is _wake:
            await trio.testing.wait_all_tasks_blocked()
        with suppress(RecursionError):
            await deep(int(turn.input.content))
        return "sorry"

    async with gateway_of(agent, listen=False, limits={"max_outbox": 1}) as gateway:
        client, other = await in_memory(gateway), await in_memory(gateway)
        limit = sys.getrecursionlimit()
        for n in range(limit - 110, limit):
            await client.message(str(n), f"r{n}")
            turn_id = (await client.until("turn_started", request_ids=[f"r{n}"]))["turn_id"]
            if write is _steered:
                await client.message("also", on_busy="steer")
            assert (await client.until("turn_ended", turn_id=turn_id))["outcome"] == "completed"
        await other.ask("ping", "pong")
        await (await in_memory(gateway)).ask("ping", "pong")


@pytest.mark.parametrize("spoken", [False, True])
async def test_an_agent_at_the_recursion_limit_that_tries_again_lets_others_run(spoken: bool) -> None:
    """It catches what it gets and never waits of its own accord."""
    ticks = refused = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await trio.lowlevel.checkpoint()
            ticks += 1

    async def agent(turn: Turn) -> None:
        async def deep(n: int) -> None:
            nonlocal refused
            before = ticks
            if n:
                await deep(n - 1)
            for _ in range(0 if n else 10 * YIELD_EVERY):
                try:
                    await turn.send("x")
                except RecursionError:
                    refused += 1
            assert n or ticks - before >= 8

        if spoken:
            await turn.send("x")
        with suppress(RecursionError):
            await deep(int(turn.input.content))

    async with gateway_of(agent, listen=False) as gateway, trio.open_nursery() as nursery:
        nursery.start_soon(tick)
        client = await in_memory(gateway)
        limit = sys.getrecursionlimit()
        for n in range(limit - 110, limit):
            await client.message(str(n), f"r{n}")
            assert (await client.until("turn_ended"))["outcome"] == "completed"
        assert refused > 100
        nursery.cancel_scope.cancel()


async def test_an_agent_without_end_fails_as_any_other() -> None:
    async def agent(turn: Turn, n: int = 0) -> None:
        await turn.tool_call(f"tool {n}")
        await agent(turn, n + 1)

    with capture_logs():
        async with gateway_of(agent, listen=False) as gateway:
            client = await in_memory(gateway)
            for _ in range(2):
                await client.message("hi")
                ended = await client.until("turn_ended")
                assert (ended["outcome"], ended["error"]["code"]) == ("failed", "agent_error")
