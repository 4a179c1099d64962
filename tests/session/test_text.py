"""An answer's text: streamed, sealed in segments, stated, returned; and the limits of what an agent may write."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import trio
from session_harness import Bench, open_bench, settle

from gateway.config import KIB, Limits
from gateway.errors import TurnLimitExceeded
from gateway.protocol import codec
from gateway.protocol.messages import Delta, Output, TurnEnded
from gateway.session import Turn

SMALL = Limits(segment_bytes=256)


async def run(bench: Bench) -> str:
    bench.send("r1")
    await settle()
    while bench.session.busy:
        await settle()
    return bench.reader.of(TurnEnded)[-1].turn_id


async def test_streamed_text_becomes_one_output() -> None:
    async def agent(turn: Turn) -> None:
        for piece in ("a", "", "b", "c"):
            await turn.send(piece)

    async with open_bench(agent) as bench:
        turn_id = await run(bench)
        assert [(e.content, e.metadata) for e in bench.reader.of(Output)] == [("abc", {})]
        assert bench.reader.text_of(turn_id) == "abc"


async def test_an_agent_that_says_nothing_leaves_no_output() -> None:
    async def agent(turn: Turn) -> str:
        await turn.send("")
        return ""

    async with open_bench(agent) as bench:
        await run(bench)
        assert [event.type for event in bench.reader.events] == ["input", "turn_started", "turn_ended"]


@pytest.mark.parametrize("text", ["x" * 10, "é" * 7, "🙂" * 5, '"\\' * 6, "\x00\x1f\n" * 4], ids=repr)
async def test_long_text_is_sealed_and_nothing_is_lost(text: str) -> None:
    async def agent(turn: Turn) -> None:
        for _ in range(200):
            await turn.send(text)

    async with open_bench(agent, limits=SMALL) as bench:
        slow = bench.attach("c2")
        turn_id = await run(bench)
        outputs = bench.reader.of(Output)
        assert "".join(output.content for output in outputs) == text * 200
        assert [output.metadata for output in outputs[:-1]] == [{"more": True}] * (len(outputs) - 1)
        sizes = [len(output.content.encode()) for output in outputs]
        assert all(256 <= size < 256 + len(text.encode()) for size in sizes[:-1])
        assert bench.reader.text_of(turn_id) == slow.text_of(turn_id) == text * 200


async def test_at_any_moment_outputs_and_the_deltas_after_them_are_the_text() -> None:
    said = ""

    async def agent(turn: Turn) -> None:
        nonlocal said
        for i in range(300):
            said += f"<{i}>"
            await turn.send(f"<{i}>")
            await settle()
            assert bench.reader.text_of(turn.turn_id) == said
            if i % 50 == 0:
                late = bench.attach(f"late{i}", cursor=0)
                assert late.text_of(turn.turn_id) == said
                running = bench.snapshot().turn
                assert running is not None
                assert said.endswith(running.channels.get("answer", ""))
                assert len(running.channels.get("answer", "")) < 256

    async with open_bench(agent, limits=SMALL) as bench:
        await run(bench)
        assert bench.ends == ["completed"]


@pytest.mark.parametrize("outbox", [1, 2, 256])
async def test_tasks_that_send_at_once_keep_one_order(outbox: int) -> None:
    """The order of the deltas is the order of the output, also when the outbox is full and the store slow."""

    async def one(turn: Turn, name: str) -> None:
        for i in range(60):
            await turn.send(f"{name}{i};")

    async def agent(turn: Turn) -> None:
        async with trio.open_nursery() as nursery:
            for name in "abcdef":
                nursery.start_soon(one, turn, name)

    async with open_bench(agent, limits=Limits(max_outbox=outbox, segment_bytes=512)) as bench:
        live = bench.attach("live")
        seen: list[str] = []
        wake = live.wake

        def follow() -> None:
            wake()
            seen.extend(event.text for event in live.of(Delta)[len(seen) :])

        live.wake = follow  # type: ignore[method-assign]
        turn_id = await run(bench)
        final = "".join(output.content for output in bench.reader.of(Output))
        assert live.text_of(turn_id) == final
        assert len(final) == sum(len(f"{name}{i};") for name in "abcdef" for i in range(60))
        for name in "abcdef":
            own = [piece for piece in final.split(";") if piece.startswith(name)]
            assert own == [f"{name}{i}" for i in range(60)]


async def test_channels_are_sealed_on_their_own() -> None:
    async def agent(turn: Turn) -> None:
        for i in range(100):
            for channel in range(8):
                await turn.send(f"{channel}:{i} ", f"ch{channel}")

    async with open_bench(agent, limits=SMALL) as bench:
        turn_id = await run(bench)
        for channel in range(8):
            assert bench.reader.text_of(turn_id, f"ch{channel}") == "".join(f"{channel}:{i} " for i in range(100))


async def test_many_unsealed_channels_leave_room_in_the_snapshot() -> None:
    sizes: list[int] = []

    async def agent(turn: Turn) -> None:
        await turn.update_state({"s": "x" * 120 * KIB})
        for _ in range(40):
            for channel in range(16):
                await turn.send("\x01" * 1000, f"ch{channel}")
            await settle()
            sizes.append(len(bench.session.snapshot("requested")))

    async with open_bench(agent, limits=Limits()) as bench:
        turn_id = await run(bench)
        assert bench.ends == ["completed"]
        assert max(sizes) <= bench.session.limits.max_frame_bytes
        assert bench.reader.text_of(turn_id, "ch3") == "\x01" * 40_000


@pytest.mark.parametrize("limits", [Limits(max_frame_bytes=256 * KIB), Limits()])
@pytest.mark.parametrize("how", ["send", "return"])
async def test_no_frame_is_larger_than_promised(limits: Limits, how: str) -> None:
    """Text of control characters is six times as long in JSON."""
    text = "\x02" * 150_000 + "🙂" * 50_000 + '"' * 150_000

    async def agent(turn: Turn) -> str | None:
        if how == "return":
            return text
        await turn.send(text)
        return None

    async with open_bench(agent, limits=limits) as bench:
        turn_id = await run(bench)
        for entry, first in bench.session.log.newest_first():
            assert len(entry.encode(first)) <= limits.max_frame_bytes
        assert bench.reader.text_of(turn_id) == text


@pytest.mark.parametrize("text", ["x" * 1000, "ü" * 1000, "🙂" * 300])
async def test_returned_text_is_cut_into_segments(text: str) -> None:
    async def agent(turn: Turn) -> str:
        return text

    async with open_bench(agent, limits=SMALL) as bench:
        await run(bench)
        outputs = bench.reader.of(Output)
        assert "".join(output.content for output in outputs) == text
        assert all(len(output.content.encode()) <= 256 for output in outputs)
        assert [output.metadata for output in outputs] == [{"more": True}] * (len(outputs) - 1) + [{}]


@pytest.mark.parametrize("length", [10, 100, 1000])
async def test_an_agent_may_stream_its_answer_and_return_the_whole_of_it(length: int) -> None:
    text = "".join(chr(97 + i % 26) for i in range(length))

    async def agent(turn: Turn) -> str:
        for i in range(0, length, 10):
            await turn.send(text[i : i + 10])
        return text

    async with open_bench(agent, limits=SMALL) as bench:
        turn_id = await run(bench)
        assert bench.reader.text_of(turn_id) == text, "also when it was long enough to be sealed on the way"


async def test_returned_text_replaces_what_was_streamed() -> None:
    async def agent(turn: Turn) -> str:
        await turn.send("a draft")
        return "the final answer"

    async with open_bench(agent) as bench:
        turn_id = await run(bench)
        assert bench.reader.text_of(turn_id) == "the final answer"


async def test_stated_text_replaces_its_channels_deltas() -> None:
    async def agent(turn: Turn) -> None:
        await turn.send("draft ")
        await turn.send("thought", "reasoning")
        await turn.output("final ", metadata={"k": [1, (2, 3)]})
        await turn.send("tail")

    async with open_bench(agent) as bench:
        turn_id = await run(bench)
        assert bench.reader.text_of(turn_id) == "final tail"
        assert bench.reader.text_of(turn_id, "reasoning") == "thought"
        assert bench.reader.of(Output)[0].metadata == {"k": [1, [2, 3]]}


async def test_one_long_piece() -> None:
    text = "".join(chr(0x1F600 + i % 60) for i in range(60_000))

    async def agent(turn: Turn) -> None:
        await turn.send(text)

    async with open_bench(agent) as bench:
        turn_id = await run(bench)
        assert bench.reader.text_of(turn_id) == text


class Attempts:
    """An agent that tries something and keeps the error."""

    def __init__(self, attempt: Any) -> None:
        self.attempt = attempt
        self.error: Exception | None = None

    async def __call__(self, turn: Turn) -> None:
        try:
            await self.attempt(turn)
        except Exception as exc:
            self.error = exc


BIG = "x" * 1024 * 1024
CYCLE: list[Any] = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    ("attempt", "kind", "words"),
    [
        (lambda turn: turn.output(BIG), TurnLimitExceeded, "limits.max_frame_bytes"),
        (lambda turn: turn.tool_result("c", BIG), TurnLimitExceeded, "limits.max_frame_bytes"),
        (lambda turn: turn.tool_call("n", {"k": BIG}), TurnLimitExceeded, "limits.max_frame_bytes"),
        (lambda turn: turn.custom("n", BIG), TurnLimitExceeded, "limits.max_frame_bytes"),
        (lambda turn: turn.output("x", metadata={"k": BIG}), TurnLimitExceeded, "limits.max_frame_bytes"),
        (lambda turn: turn.update_state({"k": "x" * 200_000}), TurnLimitExceeded, "state"),
        (lambda turn: turn.progress("k", "x" * 70_000), TurnLimitExceeded, "progress"),
        (lambda turn: turn.send("lone \ud83d"), ValueError, "lone surrogate"),
        (lambda turn: turn.send(b"bytes"), TypeError, "expected str, not bytes"),
        (lambda turn: turn.send(5), TypeError, "expected str, not int"),
        (lambda turn: turn.send(None), TypeError, "expected str"),
        (lambda turn: turn.send("x", ""), ValueError, "channel"),
        (lambda turn: turn.send("x", "c" * 65), ValueError, "channel"),
        (lambda turn: turn.send("x", "\udc00"), ValueError, "surrogate"),
        (lambda turn: turn.send("x", 5), TypeError, "channel"),
        (lambda turn: turn.output("\udc00"), ValueError, "surrogate"),
        (lambda turn: turn.output(5), TypeError, "content"),
        (lambda turn: turn.output("x", metadata={1: 2}), ValueError, ""),
        (lambda turn: turn.tool_call(5), TypeError, "name"),
        (lambda turn: turn.tool_call("n", call_id="\ud800"), ValueError, "surrogate"),
        (lambda turn: turn.tool_call("n", call_id="c" * 1000), ValueError, "call_id"),
        (lambda turn: turn.tool_result(7), TypeError, "call_id"),
        (lambda turn: turn.tool_result("c", {1, 2}), ValueError, ""),
        (lambda turn: turn.tool_result("c", 2**64), ValueError, ""),
        (lambda turn: turn.tool_result("c", CYCLE), ValueError, ""),
        (lambda turn: turn.progress("k", object()), ValueError, ""),
        (lambda turn: turn.progress("", 1), ValueError, "key"),
        (lambda turn: turn.custom("n", "\ud800"), ValueError, ""),
        (lambda turn: turn.update_state({"k": float}), ValueError, ""),
        (lambda turn: turn.update_state(5), TypeError, ""),
    ],
)
async def test_what_cannot_be_written_is_an_error_to_the_agent_and_nothing_else(
    attempt: Any, kind: Any, words: str
) -> None:
    agent = Attempts(attempt)
    async with open_bench(agent) as bench:
        await run(bench)
        assert isinstance(agent.error, kind), agent.error
        assert words in str(agent.error)
        assert [event.type for event in bench.reader.events] == ["input", "turn_started", "turn_ended"]
        assert bench.ends == ["completed"]
        assert bench.session.view.state == {}


async def test_max_channels() -> None:
    async def attempt(turn: Turn) -> None:
        for i in range(5):
            await turn.send("x", f"c{i}")

    agent = Attempts(attempt)
    async with open_bench(agent, limits=Limits(max_channels=3)) as bench:
        turn_id = await run(bench)
        assert isinstance(agent.error, TurnLimitExceeded)
        assert [bench.reader.text_of(turn_id, f"c{i}") for i in range(4)] == ["x", "x", "x", ""]


async def test_what_an_agent_hands_in_is_its_own_again_afterwards() -> None:
    async def agent(turn: Turn) -> None:
        data: dict[str, Any] = {"list": [1]}
        await turn.progress("p", data)
        await turn.tool_call("t", data)
        await turn.update_state(data)
        await turn.custom("c", data)
        await turn.output("o", metadata=data)
        data["list"].append({1, 2})
        data["self"] = data

    async with open_bench(agent) as bench:
        await run(bench)
        assert bench.ends == ["completed"]
        assert bench.session.view.state == {"list": [1]}
        for event in bench.reader.events:
            codec.encode_event(event, 1)
        assert bench.reader.of(Output)[0].metadata == {"list": [1]}


async def test_state_changes_of_many_tasks_all_count() -> None:
    async def agent(turn: Turn) -> None:
        async with trio.open_nursery() as nursery:
            for i in range(20):
                nursery.start_soon(turn.update_state, {f"k{i}": i, "last": i})
        assert turn.state == bench.session.view.state or not bench.session.publisher.idle
        await settle()
        assert turn.state == bench.session.view.state
        assert len(turn.state) == 21

    async with open_bench(agent, limits=Limits(max_outbox=1)) as bench:
        await run(bench)
        assert bench.ends == ["completed"]


async def test_a_turn_sees_the_state_and_transcript_of_those_before() -> None:
    seen: list[Any] = []

    async def agent(turn: Turn) -> str:
        seen.append((dict(turn.state), [getattr(e, "content", e.type) for e in turn.transcript]))
        await turn.update_state({"count": turn.state.get("count", 0) + 1, "gone": None})
        return f"answer {turn.input.content}"

    async with open_bench(agent) as bench:
        for i in range(3):
            bench.send(f"r{i}")
        await settle()
        assert seen == [
            ({}, ["r0"]),
            ({"count": 1}, ["r0", "answer r0", "turn_ended", "r1"]),
            ({"count": 2}, ["r0", "answer r0", "turn_ended", "r1", "answer r1", "turn_ended", "r2"]),
        ]


@pytest.mark.parametrize(
    "write",
    [
        lambda turn: turn.send("x" * 2000),
        lambda turn: turn.output("x" * 300_000),
        lambda turn: turn.progress("k", "x" * 70_000),
    ],
)
async def test_an_agent_that_swallows_every_error_does_not_starve_the_rest(write: Any) -> None:
    stop = trio.Event()

    async def agent(turn: Turn) -> None:
        while not stop.is_set():
            with suppress(TurnLimitExceeded):
                await write(turn)

    async with open_bench(agent, limits=Limits(max_frame_bytes=256 * KIB)) as bench:
        bench.send("r1")
        for _ in range(100):
            await trio.lowlevel.checkpoint()
        bench.abort()
        for _ in range(100):
            await trio.lowlevel.checkpoint()
        assert bench.ends in (["aborted"], ["failed"])
        stop.set()
