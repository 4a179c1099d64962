"""Reconnect stories: the line is cut at every point of an answer, and the text is complete all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio
from plain_client import EVENTS, Frame, Plain, Reader, ended, eventually, follow, gateway_of, joined

from gateway import Turn
from gateway.server import Gateway

pytestmark = pytest.mark.usefixtures("line")  # each with and without TLS

TOKENS = [f"token{n} " for n in range(30)]
TEXT = "".join(TOKENS)


class Stepper:
    """An agent that streams a token whenever it is let, and each as a delta of its own."""

    def __init__(self, tokens: list[str] = TOKENS) -> None:
        self._tokens = tokens
        self._let, self._take = trio.open_memory_channel[None](10_000)

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self._let.send_nowait(None)

    async def __call__(self, turn: Turn) -> None:
        for token in self._tokens:
            await self._take.receive()
            await turn.send(token)
            await trio.testing.wait_all_tasks_blocked()


async def all_at_once(turn: Turn) -> None:
    for token in TOKENS:
        await turn.send(token)
        await trio.lowlevel.checkpoint()


async def resume(gateway: Gateway, session: str, reader: Reader, done: Callable[[Frame], bool]) -> Frame:
    """Join at the reader's cursor and follow until `done`."""
    async with joined(gateway, session, since=reader.cursor, **({"epoch": reader.epoch} if reader.epoch else {})) as c:
        assert c.hello["resumed"] is True
        reader.take(c.hello)
        frame = await follow(c, reader, done)
        await c.cut()
        return frame


@pytest.mark.parametrize("cut_after", range(1, len(TOKENS) + 4))
async def test_cut_after_any_event_of_an_answer(cut_after: int) -> None:
    agent = Stepper()
    async with gateway_of(agent) as gateway:
        reader, seen = Reader(), 0

        def counted(frame: Frame) -> bool:
            nonlocal seen
            seen += frame["type"] in EVENTS
            return seen == cut_after or ended(frame)

        async with joined(gateway, "s") as client:
            reader.take(client.hello)
            await client.message("go", "r")
            for frame in client.seen[1:]:
                reader.take(frame)
                seen += frame["type"] in EVENTS
            if seen < cut_after:
                agent.step(max(0, cut_after - 2))
                await follow(client, reader, counted)
            await client.cut()
        agent.step(len(TOKENS))
        if not reader.kept or not ended(reader.kept[-1]):
            await resume(gateway, "s", reader, ended)
        turn_id = reader.kept[-1]["turn_id"]
        assert reader.text(turn_id) == TEXT
        assert [event["type"] for event in reader.kept] == ["input", "turn_started", "output", "turn_ended"]
        assert reader.snapshots == 0


async def test_a_cut_after_every_single_event() -> None:
    """The line never lives longer than one event."""
    agent = Stepper()
    async with gateway_of(agent) as gateway:
        reader = Reader()
        async with joined(gateway, "s") as client:
            await client.message("go", "r")
            await client.cut()
        while not (reader.kept and ended(reader.kept[-1])):
            agent.step()
            await resume(gateway, "s", reader, lambda frame: frame["type"] in EVENTS)
        assert reader.text(reader.kept[-1]["turn_id"]) == TEXT
        assert reader.snapshots == 0


async def test_resuming_in_the_middle_of_merged_deltas_repeats_nothing() -> None:
    """Merging happens from the cursor on, never across it: every cursor gets exactly the text above it."""
    agent = Stepper()
    async with gateway_of(agent) as gateway, joined(gateway, "s") as live:
        await live.message("go", "r")
        agent.step(20)
        pieces: dict[int, str] = {}
        while len(pieces) < 20:
            frame = await live.until("delta")
            assert frame["first"] == frame["seq"], "who keeps up gets them one by one"
            pieces[frame["seq"]] = frame["text"]
        for since in pieces:
            async with joined(gateway, "s", since=since) as late:
                await late.ask("ping", "pong")
                wanted = "".join(text for seq, text in pieces.items() if seq > since)
                while "".join(frame["text"] for frame in late.taken("delta")) != wanted:
                    assert (await late.recv())["type"] in ("delta", "presence")
                deltas = late.taken("delta")
                assert len(deltas) <= 8, "merged for a laggard"
                assert not deltas or deltas[0]["first"] <= since + 1
        agent.step(10)
        await live.until("turn_ended")


async def test_resuming_inside_deltas_that_were_published_as_one_repeats_nothing() -> None:
    """What an agent sends without a pause is one event with the numbers of all: a cursor may fall into it."""
    tokens, held = [f"<{n}>" for n in range(25)], trio.Event()

    async def agent(turn: Turn) -> None:
        for token in tokens:
            await turn.send(token)
        await held.wait()

    async with gateway_of(agent) as gateway, joined(gateway, "s") as live:
        await live.message("go", "r")
        start = (await live.had("turn_started"))["seq"]
        while (await live.until("delta"))["seq"] < start + len(tokens):
            pass
        assert len(live.taken("delta")) < len(tokens), "some are one"
        for behind in range(len(tokens)):
            async with joined(gateway, "s", since=start + behind) as late:
                wanted, got = "".join(tokens[behind:]), ""
                while got != wanted:
                    frame = await late.until("delta")
                    assert frame["first"] <= start + behind + 1 or got
                    got += frame["text"]
                    assert wanted.startswith(got)
        held.set()


async def test_resuming_after_the_turn_has_ended() -> None:
    agent = Stepper()
    async with gateway_of(agent) as gateway:
        for cursor in range(12):
            session, reader = f"s{cursor}", Reader()
            async with joined(gateway, session) as client:
                reader.take(client.hello)
                await client.send("message", request_id="r", content="go")
                agent.step(10)
                await follow(client, reader, lambda frame, until=cursor + 1: bool(frame.get("seq", 0) >= until))
                await client.cut()
            agent.step(20)
            await eventually(lambda: gateway.statistics().turns == 0)
            await resume(gateway, session, reader, ended)
            assert reader.text(reader.kept[-1]["turn_id"]) == TEXT


async def test_a_half_dead_predecessor_is_no_obstacle() -> None:
    """DESIGN property 15: the new connection works at once, and the old one's end changes nothing."""
    agent = Stepper()
    async with gateway_of(agent) as gateway, joined(gateway, "s", small=True) as dead:
        await dead.message("go", "r")
        reader = Reader()
        async with joined(gateway, "s") as client:
            reader.take(client.hello)
            assert len(client.hello["presence"]) == 2
            agent.step(10)
            await follow(client, reader, lambda frame: frame["type"] == "delta" and frame["text"].endswith("token9 "))
            await dead.cut()
            await client.until("presence", event="left")
            assert gateway.statistics().turns == 1
            agent.step(20)
            await follow(client, reader, ended)
            assert reader.text(reader.kept[-1]["turn_id"]) == TEXT


async def test_take_over_by_another_client_and_back() -> None:
    agent = Stepper()
    async with gateway_of(agent) as gateway:
        one, two = Reader(), Reader()
        async with joined(gateway, "s") as client:
            await client.message("go", "r")
            await client.ask("leave", "left")
        agent.step(5)
        await resume(gateway, "s", two, lambda frame: frame["type"] == "delta")
        agent.step(5)
        await resume(gateway, "s", one, lambda frame: frame["type"] == "delta")
        agent.step(20)
        await resume(gateway, "s", two, ended)
        await resume(gateway, "s", one, ended)
        assert one.kept == two.kept
        turn_id = one.kept[-1]["turn_id"]
        assert one.text(turn_id) == two.text(turn_id) == TEXT


async def test_several_connections_see_the_same_log() -> None:
    async with gateway_of(all_at_once) as gateway, joined(gateway, "s") as first:
        readers = [Reader() for _ in range(8)]

        async def read(reader: Reader) -> None:
            async with joined(gateway, "s") as client:
                done = 0
                while done < 5:
                    frame = await client.recv()
                    reader.take(frame)
                    done += ended(frame)

        async with trio.open_nursery() as nursery:
            for reader in readers:
                nursery.start_soon(read, reader)
            for n in range(5):
                await first.message(f"go {n}")
                await first.until("turn_ended")
        for reader in readers:
            assert reader.kept == readers[0].kept
            assert reader.sealed == readers[0].sealed
            assert reader.snapshots == 0


async def test_the_seam_of_snapshot_and_live() -> None:
    """DESIGN property 14: many resyncs while the agent streams; text and position never disagree."""
    tokens = [f"<{n}>" for n in range(3000)]

    async def agent(turn: Turn) -> None:
        for n, token in enumerate(tokens):
            await turn.send(token)
            if n % 7 == 0:
                await trio.lowlevel.checkpoint()

    async with gateway_of(agent) as gateway, joined(gateway, "s") as client, joined(gateway, "s") as asking:
        await client.message("go", "r")
        plain, synced = Reader(), Reader()
        for frame in client.seen:
            plain.take(frame)

        async def ask() -> None:
            with trio.move_on_after(30) as scope:
                while not scope.cancel_called:
                    await asking.send("resync")
                    await trio.sleep(0.001)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(follow, client, plain, ended)
            nursery.start_soon(ask)
            turn_id = ""
            while True:
                frame = await asking.recv()
                turn_id = frame.get("turn_id", turn_id)
                before = synced.text(turn_id)
                synced.take(frame)
                after = synced.text(turn_id)
                assert after.startswith(before) or frame["type"] == "output", "a snapshot never takes text back"
                assert "".join(tokens).startswith(after)
                if ended(frame):
                    break
                if (
                    frame["type"] == "snapshot"
                    and frame["turn"] is None
                    and frame["transcript"][-1:]
                    and ended(frame["transcript"][-1])
                ):
                    break
            nursery.cancel_scope.cancel()
        assert synced.snapshots > 3
        assert synced.text(turn_id) == "".join(tokens)


async def test_resuming_again_and_again_while_the_agent_streams() -> None:
    tokens = [f"<{n}>" for n in range(4000)]

    async def agent(turn: Turn) -> None:
        for n, token in enumerate(tokens):
            await turn.send(token)
            if n % 20 == 0:
                await trio.sleep(0.001)

    async with gateway_of(agent) as gateway:
        async with joined(gateway, "s") as client:
            await client.message("go", "r")
        reader, connections = Reader(), 0
        while not (reader.kept and ended(reader.kept[-1])):
            start = reader.cursor
            await resume(gateway, "s", reader, lambda frame, at=start: frame.get("seq", 0) > at + 100 or ended(frame))
            connections += 1
        assert connections > 3
        assert reader.snapshots == 0
        assert reader.text(reader.kept[-1]["turn_id"]) == "".join(tokens)


async def test_what_happens_while_nobody_is_attached_is_in_the_log() -> None:
    """DESIGN properties 11 and 13."""
    agent = Stepper()
    async with gateway_of(agent) as gateway:
        async with joined(gateway, "s") as client:
            ok = client.hello
            await client.message("go", "r")
            await client.cut()
        await eventually(lambda: gateway.statistics().connections == 0)
        agent.step(30)
        await eventually(lambda: gateway.statistics().turns == 0)
        reader = Reader()
        await resume(gateway, ok["session_id"], reader, ended)
        assert reader.text(reader.kept[-1]["turn_id"]) == TEXT


async def test_a_session_that_was_put_to_rest_goes_on() -> None:
    async def agent(turn: Turn) -> str:
        return f"answer to {turn.input.content}"

    async with gateway_of(agent, limits={"idle_session_ms": 30}) as gateway:
        reader = Reader()
        for n in range(3):
            async with joined(gateway, "s", since=reader.cursor) as client:
                reader.take(client.hello)
                assert client.hello["resumed"] is bool(n)
                await client.send("message", request_id=f"r{n}", content=str(n))
                await follow(client, reader, ended)
                assert (await client.message(str(n), f"r{n}"))["duplicate"] is True
            await eventually(lambda: gateway.statistics().sessions == 0)
        assert [event["content"] for event in reader.kept if event["type"] == "output"] == [
            "answer to 0", "answer to 1", "answer to 2"
        ]  # fmt: skip
        assert reader.snapshots == 0


async def test_a_message_sent_again_after_a_cut_runs_once() -> None:
    runs: list[str] = []

    async def agent(turn: Turn) -> str:
        runs.append(turn.input.content)
        return "ok"

    async def send(gateway: Gateway, n: int, cut: bool) -> Any:
        client: Plain
        async with joined(gateway, "s") as client:
            if cut:
                await client.send("message", request_id=f"r{n}", content=f"m{n}")
                await client.cut()
                return None
            return await client.message(f"m{n}", f"r{n}")

    async with gateway_of(agent) as gateway:
        async with joined(gateway, "s"):
            pass
        for n in range(20):
            await send(gateway, n, cut=True)
            assert (await send(gateway, n, cut=False))["seq"] > 0
        await eventually(lambda: gateway.statistics().turns == 0 and gateway.statistics().queued_inputs == 0)
        assert sorted(runs) == sorted(f"m{n}" for n in range(20))
