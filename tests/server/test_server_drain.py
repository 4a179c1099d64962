"""PROTOCOL section 8, drain (DESIGN property 16): told first, finished what runs, bounded whatever anyone does."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
import trio
import trio.testing
from plain_client import Closed, Plain, dial, dialled, eventually, gateway_of, hello, joined

from gateway import Turn
from gateway.errors import ConnectionLost
from gateway.server import Gateway, Identity
from gateway.server import gateway as server
from gateway.store.memory import MemoryStore

pytestmark = pytest.mark.usefixtures("line")  # each with and without TLS


class Held:
    """An agent that runs until it is let go."""

    def __init__(self) -> None:
        self.go = trio.Event()
        self.ran: list[str] = []

    async def __call__(self, turn: Turn) -> str:
        self.ran.append(turn.input.content)
        await turn.send("half ")
        await self.go.wait()
        return "the whole answer"


def tasks() -> int:
    return trio.lowlevel.current_statistics().tasks_living


async def test_everybody_is_told_and_running_turns_finish() -> None:
    agent = Held()
    async with gateway_of(agent, server={"drain_timeout_ms": 20_000}) as gateway:
        async with joined(gateway, "a") as one, joined(gateway, "b") as idle, joined(gateway, "a") as third:
            await one.message("running", "r1")
            await one.had("delta")
            await one.message("queued", "r2")
            gateway.drain_nowait("maintenance")
            gateway.drain_nowait("again")
            hints = []
            for client in (one, idle, third):
                goaway = await client.until("goaway")
                assert set(goaway) == {"type", "reason", "reconnect_after_ms", "deadline_ms"}
                assert (goaway["reason"], goaway["deadline_ms"]) == ("maintenance", 20_000)
                hints.append(goaway["reconnect_after_ms"])
                await client.ask("ping", "pong")
                assert len(client.taken("goaway")) == 1
            assert len(set(hints)) > 1
            assert all(0 < hint <= 5100 for hint in hints)
            refused = await one.ask("message", "error", request_id="r3", content="new")
            assert (refused["code"], refused["request_id"], refused["retryable"]) == ("draining", "r3", True)
            assert (await one.message("running", "r1"))["duplicate"] is True
            assert (await one.message("queued", "r2"))["duplicate"] is True
            conflict = await one.ask("message", "error", request_id="r1", content="other")
            assert conflict["code"] == "request_id_conflict"
            with pytest.raises(OSError):
                await dial(gateway)
            agent.go.set()
            for client in (one, third):
                assert (await client.until("turn_ended"))["outcome"] == "completed"
            for client in (one, idle, third):
                closed = await client.until_closed()
                assert (closed.code, closed.reason) == (1012, "restart")
            assert (await one_output(one)) == "the whole answer"
        await gateway.serve_forever()
        await gateway.drain()
        assert agent.ran == ["running"], "queued inputs wait for the restart"
        assert gateway.statistics().queued_inputs == 1


async def one_output(client: Plain) -> str:
    (output,) = client.taken("output")
    return str(output["content"])


async def test_hints_are_spread() -> None:
    async with gateway_of() as gateway:
        clients = [await dial(gateway) for _ in range(20)]
        for client in clients:
            await client.send_text(json.dumps(hello()))
            await client.until("hello_ok")
        gateway.drain_nowait()
        hints = [(await client.until("goaway"))["reconnect_after_ms"] for client in clients]
        assert len(set(hints)) > 10
        assert max(hints) - min(hints) > 1000
        for client in clients:
            assert (await client.until_closed()).code == 1012
            await trio.aclose_forcefully(client.stream)


async def test_a_turn_that_takes_too_long_is_interrupted() -> None:
    agent = Held()
    async with gateway_of(agent, server={"drain_timeout_ms": 100}) as gateway, joined(gateway) as client:
        await client.message()
        await client.had("delta")
        gateway.drain_nowait()
        output = await client.until("output")
        assert (output["content"], output["metadata"]) == ("half ", {"partial": True})
        assert (await client.until("turn_ended"))["outcome"] == "interrupted"
        assert (await client.until_closed()).code == 1012


async def test_no_task_is_left() -> None:
    before = tasks()
    agent = Held()
    async with gateway_of(agent) as gateway:
        clients = [await dial(gateway) for _ in range(6)]
        for client in clients[:4]:
            await client.send_text(json.dumps(hello()))
            await client.until("hello_ok")
            await client.message()
        assert tasks() > before
    await eventually(lambda: tasks() == before)
    for client in clients:
        await trio.aclose_forcefully(client.stream)


async def test_sockets_that_never_said_hello_do_not_delay_a_drain() -> None:
    limits = {"close_timeout_ms": 60_000, "handshake_timeout_ms": 60_000}
    async with gateway_of(limits=limits) as gateway:
        silent = await trio.open_tcp_stream(*gateway.address)
        async with silent, dialled(gateway) as upgraded:
            await eventually(lambda: gateway.statistics().pending_handshakes == 2)
            with trio.fail_after(10):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(gateway.drain)
                    closed = await upgraded.until_closed()
                    assert (closed.code, closed.reason) == (1012, "restart")


async def test_sockets_that_never_said_hello_are_closed_while_turns_run() -> None:
    agent = Held()
    async with gateway_of(agent, server={"drain_timeout_ms": 20_000}) as gateway, dialled(gateway) as upgraded:
        await eventually(lambda: len(gateway.connections) == 1)
        async with joined(gateway) as running:
            await running.message()
            await eventually(lambda: gateway.statistics().turns == 1)
            gateway.drain_nowait()
            assert (await upgraded.until_closed()).code == 1012
            assert gateway.statistics().turns == 1
            agent.go.set()
            assert (await running.until_closed()).code == 1012


async def test_who_is_just_joining_is_told_to_come_back() -> None:
    gate = trio.Event()

    async def slowly(token: str | None) -> Identity:
        await gate.wait()
        return Identity("alice")

    agent = Held()
    async with gateway_of(agent, authenticate=slowly, server={"drain_timeout_ms": 10_000}) as gateway:
        async with dialled(gateway) as client:
            await client.send_text(json.dumps(hello()))
            await eventually(lambda: gateway.statistics().pending_handshakes == 1)
            gateway.drain_nowait()
            gate.set()
            assert (await client.until_closed()).code == 1012
            assert not client.taken("hello_ok")


async def test_bounded_with_a_stalled_client_and_a_hanging_agent() -> None:
    release = trio.Event()

    async def hangs(turn: Turn) -> None:
        with trio.CancelScope(shield=True):
            await turn.send("x" * 1_000_000)
            await release.wait()

    limits = {
        "stop_timeout_ms": 200, "close_timeout_ms": 200, "send_buffer_bytes": 4096, "send_timeout_ms": 60_000,
        "slow_grace_ms": 60_000,
    }  # fmt: skip
    async with gateway_of(hangs, limits=limits, server={"drain_timeout_ms": 100}) as gateway:
        async with joined(gateway, "s", small=True) as stalled, joined(gateway, "s") as reading:
            await stalled.message()
            await eventually(lambda: gateway.statistics().blocked_connections >= 1)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(reading.until_closed)
                # 0.1 + 0.2 + 1 for the turns, 1 to settle, 2 * 0.2 to close: and a busy machine.
                with trio.fail_after(15):
                    await gateway.drain()
            release.set()
            assert reading.taken("turn_ended")[-1]["outcome"] == "interrupted"
            assert reading.closed is not None
            assert reading.closed.code == 1012


async def test_bounded_with_a_store_that_does_not_answer() -> None:
    release = trio.Event()
    hangs = False

    class HangingStore(MemoryStore):
        direct = False

        async def append(self, session_id, batch, reserved):  # type: ignore[no-untyped-def]
            if hangs:
                await release.wait()
            await super().append(session_id, batch, reserved)

    agent, limits = Held(), {"stop_timeout_ms": 100, "close_timeout_ms": 100}
    async with gateway_of(agent, store=HangingStore(), limits=limits) as gateway, joined(gateway) as client:
        await client.message()
        await client.had("delta")
        hangs = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.until_closed)
            with trio.fail_after(15):
                await gateway.drain()
        assert not client.taken("turn_ended"), "what is not stored is not shown"
        assert client.closed is not None
        assert client.closed.code == 1012
        release.set()


async def test_a_request_that_is_being_read_is_answered_when_the_drain_begins() -> None:
    async with gateway_of() as gateway:
        stream = gateway.connect()
        await stream.send_all(b"GET /ws HTTP/1.1\r\nHost: x\r\n")
        await eventually(lambda: len(gateway.upgrading) == 1)
        gateway.drain_nowait()
        answer = b""
        while data := await stream.receive_some():
            answer += data
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert answer.endswith(b"the gateway is stopping; try again in a moment\n")
        await stream.aclose()


async def test_who_comes_in_memory_during_a_drain_is_told_to_come_back() -> None:
    agent = Held()
    async with gateway_of(agent, server={"drain_timeout_ms": 10_000}) as gateway, joined(gateway) as running:
        await running.message()
        gateway.drain_nowait()
        late = Plain(gateway.connect())
        await late.upgrade()
        await late.send_text(json.dumps(hello()))
        error = await late.recv()
        assert (error["type"], error["code"], error["retryable"]) == ("hello_error", "draining", True)
        assert error["retry_after_ms"] > 0
        assert (await late.until_closed()).code == 1012
        agent.go.set()
        assert (await running.until_closed()).code == 1012


async def test_an_input_that_is_being_stored_still_gets_its_answer() -> None:
    """Unsent replies are work too: the drain waits for what the store is writing."""
    gate = trio.Event()
    waiting = trio.Event()

    class SlowStore(MemoryStore):
        direct = False

        async def append(self, session_id, batch, reserved):  # type: ignore[no-untyped-def]
            waiting.set()
            await gate.wait()
            await super().append(session_id, batch, reserved)

    async with gateway_of(store=SlowStore()) as gateway, joined(gateway) as client:
        await client.send("message", request_id="r", content="x")
        await waiting.wait()
        gateway.drain_nowait()
        await client.until("goaway")
        await client.ask("ping", "pong")
        gate.set()
        assert (await client.until("accepted"))["request_id"] == "r"
        assert (await client.until_closed()).code == 1012


async def test_who_reads_slowly_gets_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the log and not yet in a socket is work as well, though no turn runs any more."""
    monkeypatch.setattr(server, "SETTLE_SECONDS", 60)

    async def agent(turn: Turn) -> str:
        for _ in range(4):
            await turn.output("x" * 100_000)
        return "the end"

    limits = {"send_buffer_bytes": 4096, "slow_grace_ms": 60_000, "send_timeout_ms": 60_000}
    async with gateway_of(agent, limits=limits) as gateway, joined(gateway, "s", small=True) as slow:
        await slow.send("message", request_id="r", content="go")
        await eventually(lambda: gateway.statistics().turns == 0 and gateway.statistics().blocked_connections == 1)
        gateway.drain_nowait()
        await trio.testing.wait_all_tasks_blocked()  # by now the drain waits for this client alone
        assert (await slow.until("turn_ended"))["outcome"] == "completed"
        assert (await slow.until_closed()).code == 1012


async def test_leaving_the_block_by_an_exception_ends_everything_at_once() -> None:
    class Mine(Exception):
        pass

    before = tasks()
    client: Plain | None = None
    with pytest.raises(Mine):  # noqa: PT012
        async with gateway_of(Held(), server={"drain_timeout_ms": 60_000}) as gateway:
            client = await dial(gateway)
            await client.send_text(json.dumps(hello()))
            await client.until("hello_ok")
            await client.message()
            raise Mine
    assert client is not None
    assert (await client.until_closed()).code in (None, 1006)
    await trio.aclose_forcefully(client.stream)
    await eventually(lambda: tasks() == before)


async def test_being_cancelled_ends_everything_at_once() -> None:
    before = tasks()
    with trio.move_on_after(0.1) as scope:
        async with gateway_of(Held(), server={"drain_timeout_ms": 60_000}) as gateway, joined(gateway) as client:
            await client.message()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    await eventually(lambda: tasks() == before)


async def test_draining_a_gateway_in_memory() -> None:
    opened: Gateway
    async with gateway_of(listen=False) as opened:
        client = Plain(opened.connect())
        await client.upgrade()
        await client.send_text(json.dumps(hello()))
        await client.until("hello_ok")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(opened.drain)
            with suppress(Closed):
                while True:
                    await client.recv()
        assert client.closed is not None
        assert client.closed.code == 1012
        with pytest.raises(ConnectionLost):
            opened.connect()
