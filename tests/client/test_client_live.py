"""The client with a real gateway: over TCP with a proxy that cuts, and over the network in memory."""

from __future__ import annotations

import random
from collections import Counter
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from cutting_proxy import open_proxy

from gateway import Config, Limits, Server, Turn, open_gateway, open_session
from gateway.client import Session, over
from gateway.errors import RequestRefused, SessionRefused
from gateway.protocol.cursor import Backoff
from gateway.protocol.messages import Ask, Delta, Event, Input, Output, Snapshot, TurnEnded, TurnStarted


def config(**limits: int) -> Config:
    return Config(server=Server(port=0, drain_timeout_ms=500), limits=Limits(**limits))


def quick() -> Backoff:
    return Backoff(base=0.02, cap=0.1)


async def echo(turn: Turn) -> None:
    """Streams what it was told, a character at a time, as many times as it says."""
    for letter in turn.input.content:
        await turn.send(letter)
        await trio.lowlevel.checkpoint()


async def asking(turn: Turn) -> str:
    return "yes" if await turn.ask("approval", "Shall I?") else "no"


async def endless(turn: Turn) -> None:
    while True:
        await turn.send("x" * 1000)
        await trio.sleep(0.001)


@asynccontextmanager
async def in_memory(gateway: Any, agent_id: str, **options: Any) -> Any:
    """A session without a port. `lines` collects the client's streams, to cut them."""
    lines: list[Any] = options.pop("lines", [])

    def open_stream() -> Any:
        lines.append(gateway.connect())
        return lines[-1]

    connect = over(open_stream)
    async with open_session("ws://gateway/ws", agent_id, connect=connect, backoff=quick(), **options) as session:
        yield session


async def until_ended(session: Session, count: int = 1) -> list[Event | Snapshot]:
    items: list[Event | Snapshot] = []
    async for item in session:
        items.append(item)
        count -= isinstance(item, TurnEnded)
        if not count:
            break
    return items


@pytest.mark.parametrize("seed", range(6))
async def test_conversations_over_a_line_that_breaks_all_the_time(seed: int) -> None:
    rng = random.Random(seed)
    runs: Counter[str] = Counter()

    async def counting(turn: Turn) -> None:
        runs[turn.input.request_id] += 1
        await echo(turn)

    texts = ["".join(rng.choices("abcdefgh ", k=rng.randrange(1, 400))) for _ in range(25)]
    async with open_gateway(config(), {"echo": counting}) as gateway:
        # A hello_ok is about 900 bytes: some lines break before it is through.
        async with open_proxy(gateway.address, lambda: rng.randrange(300, 9000)) as proxy:
            async with open_session(proxy.url, "echo", backoff=quick()) as session, trio.open_nursery() as nursery:

                @nursery.start_soon
                async def speak() -> None:
                    for number, text in enumerate(texts):
                        await session.send(text, request_id=f"r{number}")

                with trio.fail_after(60):
                    items = await until_ended(session, len(texts))
                assert proxy.accepted > 3
    assert runs == {f"r{i}": 1 for i in range(len(texts))}
    assert not any(isinstance(item, Snapshot) for item in items)
    assert [item.content for item in items if isinstance(item, Input)] == texts
    assert [item.content for item in items if isinstance(item, Output)] == texts
    turns = [item.turn_id for item in items if isinstance(item, TurnStarted)]
    assert [session.text_of(turn) for turn in turns] == texts
    # Deltas come once: those before a turn's output never say more than it.
    for turn, text in zip(turns, texts, strict=True):
        assert text.startswith("".join(i.text for i in items if isinstance(i, Delta) and i.turn_id == turn))


async def test_an_answer_on_a_line_that_breaks_counts_once(autojump_clock: trio.testing.MockClock) -> None:
    lines: list[Any] = []
    async with open_gateway(config(), {"asking": asking}) as gateway:
        async with in_memory(gateway, "asking", lines=lines) as session:
            await session.send("go")
            async for event in session:
                if isinstance(event, Ask):
                    break
            # Nothing comes back from here on; the answer itself gets through.
            lines[-1].incoming.stall()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(session.answer, event.ask_id, True)
                await trio.testing.wait_all_tasks_blocked(0.01)
                lines[-1].cut()
            [output] = [item for item in await until_ended(session) if isinstance(item, Output)]
            assert output.content == "yes"
            with pytest.raises(RequestRefused, match="unknown_ask"):
                await session.answer(event.ask_id, False)
            assert session.statistics().reconnects == 1


async def test_an_abort_on_a_line_that_breaks(autojump_clock: trio.testing.MockClock) -> None:
    lines: list[Any] = []
    async with open_gateway(config(), {"endless": endless}) as gateway:
        async with in_memory(gateway, "endless", lines=lines) as session:
            await session.send("go")
            async for event in session:
                if isinstance(event, Delta):
                    break
            lines[-1].incoming.stall()
            async with trio.open_nursery() as nursery:

                @nursery.start_soon
                async def abort() -> None:
                    assert (await session.abort(turn_id=event.turn_id)).turn_id == event.turn_id

                await trio.testing.wait_all_tasks_blocked(0.01)
                lines[-1].cut()
            ended = (await until_ended(session))[-1]
            assert isinstance(ended, TurnEnded)
            assert ended.outcome == "aborted"
            with pytest.raises(RequestRefused, match="no_active_turn"):
                await session.abort()


async def test_a_reader_that_pauses_gets_everything() -> None:
    flooded = trio.Event()

    async def flood(turn: Turn) -> None:
        for number in range(3000):
            await turn.send(f"{number:04}" + "x" * 996)
        flooded.set()

    limits = {"max_buffered_bytes": 64 * 1024, "slow_grace_ms": 50, "send_buffer_bytes": 16 * 1024}
    async with open_gateway(config(**limits), {"flood": flood}) as gateway:
        async with open_session(gateway.url, "flood", buffer_events=16, backoff=quick()) as session:
            await session.send("go")
            with trio.fail_after(20):
                await flooded.wait()
            assert session.statistics().buffered <= 64
            with trio.fail_after(20):
                items = await until_ended(session)
            turn = next(item.turn_id for item in items if isinstance(item, TurnStarted))
            text = session.text_of(turn)
            assert len(text) == 3_000_000
            assert text[::1000] == "".join(f"{n:04}"[0] for n in range(3000))


async def test_sending_between_events_nobody_takes(autojump_clock: trio.testing.MockClock) -> None:
    async with open_gateway(config(), {"echo": echo}) as gateway:
        async with in_memory(gateway, "echo", buffer_events=4) as session:
            for number in range(40):
                await session.send(f"message {number}")
            items = await until_ended(session, 40)
            assert [i.content for i in items if isinstance(i, Output)] == [f"message {n}" for n in range(40)]
            positions = [item.seq for item in items if isinstance(item, Event)]
            assert positions == sorted(set(positions))
            assert session.statistics().overflows > 0
            assert session.statistics().gaps == 0


async def test_what_is_too_old_comes_as_a_snapshot(autojump_clock: trio.testing.MockClock) -> None:
    async with open_gateway(config(replay_max_events=8), {"echo": echo}) as gateway:
        async with in_memory(gateway, "echo") as session:
            await session.send("one")
            await until_ended(session)
            saved = {"session_id": session.session_id, "since": session.cursor, "epoch": session.epoch}
            await session.leave()
        async with in_memory(gateway, "echo", session_id=saved["session_id"]) as other:
            for number in range(10):
                await other.send(f"more {number}")
            await until_ended(other, 8)
        async with in_memory(gateway, "echo", **saved) as session:
            first = await session.__anext__()
            assert isinstance(first, Snapshot)
            assert first.reason == "cursor_expired"
            assert session.view.turn is None
            assert session.text_of(first.transcript[-1].turn_id) == "more 9"


async def test_going_on_in_another_process(autojump_clock: trio.testing.MockClock) -> None:
    async with open_gateway(config(), {"echo": echo}) as gateway:
        async with in_memory(gateway, "echo") as session:
            await session.send("one")
            await session.send("two")
            first = await until_ended(session)
            saved = {"session_id": session.session_id, "since": session.cursor, "epoch": session.epoch}
        async with in_memory(gateway, "echo", **saved) as session:
            second = await until_ended(session)
            assert session.connection.resumed
        seqs = [item.seq for item in first + second if isinstance(item, Event)]
        assert seqs == sorted(set(seqs))
        assert [i.content for i in second if isinstance(i, Output)] == ["two"]


async def test_a_gateway_that_restarts_without_its_memory() -> None:
    async with open_gateway(config(), {"echo": echo}) as gateway:
        address = gateway.address
        async with open_proxy(address) as proxy:
            async with open_session(proxy.url, "echo", backoff=quick()) as session:
                await session.send("one")
                await until_ended(session)
                old = session.epoch
                phases = []

                async with trio.open_nursery() as nursery:

                    @nursery.start_soon
                    async def watch() -> None:
                        phases.extend([(state.phase, state.reason) async for state in session.connection_states()])

                    await gateway.drain()
                    again = Config(server=Server(port=address[1], drain_timeout_ms=0))
                    async with open_gateway(again, {"echo": echo}):
                        with trio.fail_after(10):
                            assert isinstance(await session.__anext__(), Snapshot)
                            await session.send("two")
                            items = await until_ended(session)
                        assert session.epoch != old
                        assert [i.content for i in items if isinstance(i, Output)] == ["two"]
                        await session.leave()
                assert ("waiting", "restart") in phases


async def test_a_half_open_line_is_noticed() -> None:
    async with open_gateway(config(heartbeat_ms=100), {"echo": echo}) as gateway:
        async with open_proxy(gateway.address) as proxy:
            async with open_session(proxy.url, "echo", backoff=quick()) as session:
                await session.wait_joined()
                await trio.sleep(0.5)
                assert session.statistics().reconnects == 0
                proxy.stall()
                with trio.fail_after(2):
                    async for state in session.connection_states():
                        if state.phase != "joined":
                            break
                assert "no frame from the gateway" in state.reason
                proxy.cut()
                proxy.resume()
                with trio.fail_after(2):
                    await session.send("still here")


async def test_refusals(autojump_clock: trio.testing.MockClock) -> None:
    settings = Config(server=Server(port=0, drain_timeout_ms=0, tokens={"ann": "a" * 20, "bob": "b" * 20}))
    async with open_gateway(settings, {"echo": echo}) as gateway:
        for agent, token, code in [
            ("echo", None, "unauthorized"),
            ("echo", "x", "unauthorized"),
            ("no", "a" * 20, "agent_not_found"),
        ]:
            async with in_memory(gateway, agent, token=token) as session:
                with pytest.raises(SessionRefused, match=code) as caught:
                    await session.send("hi")
                assert caught.value.close_code is not None
        async with in_memory(gateway, "echo", token="a" * 20, session_id="mine") as session:
            await session.send("hi")
        async with in_memory(gateway, "echo", token="b" * 20, session_id="mine") as session:
            with pytest.raises(SessionRefused, match="forbidden"):
                await session.wait_joined()


@pytest.mark.parametrize("limits", [{"max_inbox": 2}, {"max_inbox_bytes": 4096}], ids=["count", "bytes"])
async def test_a_full_inbox_is_waited_out(autojump_clock: trio.testing.MockClock, limits: dict[str, int]) -> None:
    async def slow(turn: Turn) -> str:
        await trio.sleep(1)
        return turn.input.content[0]

    async with open_gateway(config(**limits), {"slow": slow}) as gateway:
        async with in_memory(gateway, "slow") as session, trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(session.send, str(number) * (3_000 if number in (1, 2, 5) else 1))
                await trio.testing.wait_all_tasks_blocked()
            items = await until_ended(session, 8)
            assert [i.content for i in items if isinstance(i, Output)] == [str(n) for n in range(8)]
