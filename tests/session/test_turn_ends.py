"""Every way an agent can end frees the session, with exactly one `turn_ended`, and says no more than it may."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from session_harness import Script, open_bench, open_house, settle
from structlog.testing import capture_logs

from gateway.config import Limits
from gateway.errors import TurnFailed, TurnLimitExceeded
from gateway.protocol.messages import Delta, ErrorInfo, Output, TurnEnded
from gateway.session import Turn

SECRET = "password=hunter2"


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


FAILURES: list[Any] = [
    ValueError(SECRET),
    ExceptionGroup("g", [ValueError(SECRET), KeyError(SECRET)]),
    BaseExceptionGroup("g", [SystemExit(SECRET), KeyError(SECRET)]),
    SystemExit(SECRET),
    asyncio.CancelledError(SECRET),
    TimeoutError(),
    trio.TooSlowError(),
    trio.BrokenResourceError(),
    Unprintable(),
    ValueError("lone \ud800 surrogate"),
    StopAsyncIteration(),
]


@pytest.mark.parametrize("exc", FAILURES, ids=lambda exc: type(exc).__name__)
async def test_an_exception_frees_the_session_and_does_not_leak(exc: BaseException) -> None:
    agent = Script()
    async with open_bench(agent) as bench:
        bench.send("r1")
        bench.send("r2")
        await settle()
        await agent.say("partial text")
        with capture_logs() as logs:
            await agent.fail(exc)
        end = bench.reader.of(TurnEnded)[0]
        assert (end.outcome, end.error and end.error.code, end.error and end.error.retryable) == (
            "failed",
            "agent_error",
            True,
        )
        [entry] = [entry for entry in logs if entry["event"] == "agent_failed"]
        assert end.error is not None
        assert entry["reference"] in end.error.message
        assert entry["turn_id"] == end.turn_id
        assert entry["session_id"] == "s1"
        leaf = exc.exceptions[0] if isinstance(exc, BaseExceptionGroup) else exc
        assert entry["error"].startswith(type(leaf).__name__)
        if SECRET in repr(leaf):
            assert SECRET in entry["error"]
        assert all(SECRET not in str(event) for event in bench.reader.events)
        assert [(e.content, e.metadata) for e in bench.reader.of(Output)] == [("partial text", {"partial": True})]
        assert bench.turns == [["r1"], ["r2"]]
        await agent.finish()
        assert not bench.session.busy


@pytest.mark.parametrize(
    "wrap",
    [
        lambda exc: exc,
        lambda exc: ExceptionGroup("g", [exc]),
        lambda exc: ExceptionGroup("g", [ExceptionGroup("h", [exc])]),
    ],
)
async def test_turn_failed_tells_the_client_what_the_agent_chose(wrap: Any) -> None:
    agent = Script()
    async with open_bench(agent) as bench:
        bench.send("r1")
        await settle()
        with capture_logs() as logs:
            await agent.fail(wrap(TurnFailed("rate_limited", "try again in a minute", retryable=True)))
        assert bench.reader.of(TurnEnded)[0].error == ErrorInfo(
            code="rate_limited", message="try again in a minute", retryable=True
        )
        assert logs == []


async def test_turn_failed_beside_another_error_in_a_deep_group() -> None:
    agent = Script()
    async with open_bench(agent) as bench:
        bench.send("r1")
        await settle()
        with capture_logs() as logs:
            await agent.fail(
                ExceptionGroup(
                    "g",
                    [ExceptionGroup("a", [ValueError(SECRET)]), ExceptionGroup("b", [TurnFailed("quota", "no more")])],
                )
            )
        assert bench.reader.of(TurnEnded)[0].error == ErrorInfo(code="quota", message="no more", retryable=False)
        assert [entry["error"] for entry in logs] == [f"ValueError: {SECRET}"]


async def test_turn_failed_with_anything_in_it_is_sent_as_text() -> None:
    agent = Script()
    async with open_bench(agent) as bench:
        for i, exc in enumerate(
            [TurnFailed("x" * 1000, "y" * 100_000), TurnFailed(5, None), TurnFailed("", "\ud800")]  # type: ignore[arg-type]
        ):
            bench.send(f"r{i}")
            await settle()
            await agent.fail(exc)
        errors = [event.error for event in bench.reader.of(TurnEnded)]
        assert errors[0] == ErrorInfo(code="x" * 64, message="y" * 4096)
        assert errors[1:] == [
            ErrorInfo(code="int", message="NoneType"),
            ErrorInfo(code="agent_error", message="?"),
        ]


@pytest.mark.parametrize("result", [5, b"text", ["text"], {"a": 1}, True, object()])
async def test_a_wrong_return_value_is_the_agents_failure(result: Any) -> None:
    async def agent(turn: Turn) -> Any:
        await turn.send("kept")
        return result

    async with open_bench(agent) as bench:
        bench.send("r1")
        with capture_logs() as logs:
            await settle()
        assert bench.ends == ["failed"]
        assert f"not {type(result).__name__}" in logs[0]["error"]
        assert bench.reader.of(Output)[0].content == "kept"


async def test_returned_text_with_half_a_character_is_the_agents_failure() -> None:
    async def agent(turn: Turn) -> str:
        return "a\ud83d"

    async with open_bench(agent) as bench:
        bench.send("r1")
        with capture_logs() as logs:
            await settle()
        assert bench.ends == ["failed"]
        assert "lone surrogate" in logs[0]["error"]


async def test_a_function_that_is_no_coroutine_function() -> None:
    async with open_bench(lambda turn: "text") as bench:  # type: ignore[arg-type, return-value]
        bench.send("r1")
        with capture_logs():
            await settle()
        assert bench.ends == ["failed"]


async def test_a_turn_may_run_for_max_turn_ms(autojump_clock: Any) -> None:
    agent = Script()
    async with open_bench(agent, limits=Limits(max_turn_ms=1000)) as bench:
        bench.send("r1")
        await settle()
        await agent.say("so far")
        await trio.sleep(0.99)
        assert bench.ends == []
        await trio.sleep(0.02)
        [end] = bench.reader.of(TurnEnded)
        assert end.outcome == "timed_out"
        assert end.error is not None
        assert (end.error.code, end.error.retryable) == ("timed_out", True)
        assert bench.reader.of(Output)[0].metadata == {"partial": True}


async def test_every_turn_has_its_own_time(autojump_clock: Any) -> None:
    """One timer watches all turns of a session: it may go off for one that is over."""
    agent = Script()
    async with open_bench(agent, limits=Limits(max_turn_ms=1000)) as bench:
        bench.send("r1")
        await trio.sleep(0.8)
        await agent.finish()
        bench.send("r2")
        await trio.sleep(0.9)  # until 1.7: the first one's time was over at 1.0
        await agent.finish()
        assert bench.ends == ["completed", "completed"]
        await trio.sleep(5)
        bench.send("r3")
        await trio.sleep(0.99)
        assert len(bench.ends) == 2
        await trio.sleep(0.02)
        assert bench.ends[2:] == ["timed_out"]


async def test_the_time_a_turn_waits_for_the_store_is_not_its_own(autojump_clock: Any) -> None:
    agent = Script()
    async with open_bench(agent, limits=Limits(max_turn_ms=1000)) as bench:
        bench.store.hold()
        bench.send("r1")
        await trio.sleep(5)
        bench.store.release()
        await trio.sleep(0.9)
        assert bench.ends == []
        await agent.finish()
        assert bench.ends == ["completed"]


@pytest.mark.parametrize("swallow", [False, True])
async def test_a_turn_that_writes_too_much_ends(swallow: bool) -> None:
    async def agent(turn: Turn) -> None:
        while True:
            try:
                await turn.send("x" * 100)
            except TurnLimitExceeded:
                if not swallow:
                    raise

    async with open_bench(agent, limits=Limits(max_turn_bytes=1024)) as bench:
        bench.send("r1")
        with capture_logs() as logs:
            await settle()
        [end] = bench.reader.of(TurnEnded)
        assert end.error is not None
        assert (end.outcome, end.error.code) == ("failed", "turn_too_large")
        assert bench.reader.text_of(end.turn_id) == "x" * 1000
        assert [entry["event"] for entry in logs if entry["log_level"] == "error"] == []


async def test_returned_text_counts_as_written() -> None:
    async def agent(turn: Turn) -> str:
        return "x" * 2000

    async with open_bench(agent, limits=Limits(max_turn_bytes=1024)) as bench:
        bench.send("r1")
        await settle()
        [end] = bench.reader.of(TurnEnded)
        assert end.error is not None
        assert end.error.code == "turn_too_large"
        assert not bench.reader.of(Output)


async def test_an_exception_during_the_stop_is_not_the_reason() -> None:
    async def agent(turn: Turn) -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise RuntimeError(SECRET)

    async with open_bench(agent) as bench:
        bench.send("r1")
        await settle()
        with capture_logs() as logs:
            bench.abort()
            await settle()
        [end] = bench.reader.of(TurnEnded)
        assert (end.outcome, end.error) == ("aborted", None)
        assert [entry["event"] for entry in logs] == ["agent_failed_when_stopped"]


async def test_an_agent_that_fails_while_the_gateway_is_cancelled_does_not_break_out() -> None:
    async def agent(turn: Turn) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            try:
                await trio.sleep_forever()
            finally:
                raise RuntimeError("in the clean-up")

    with capture_logs():
        async with open_house(agent) as house:
            bench = await house.bench("s1")
            bench.send("r1")
            await settle()
            assert bench.session.turn is not None


async def test_the_agents_children_are_finished_before_the_end_is_visible() -> None:
    finished: list[str] = []

    async def child(turn: Turn) -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                for _ in range(5):
                    await trio.lowlevel.checkpoint()
            assert not bench.ends
            finished.append("child")

    async def agent(turn: Turn) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(child, turn)

    async with open_bench(agent) as bench:
        bench.send("r1")
        await settle()
        bench.abort()
        await settle()
        assert finished == ["child"] * 3
        assert bench.ends == ["aborted"]


async def leave_open(what: str) -> Any:
    """Have the calling agent's task in a cancel scope of five seconds from now on: its own, or a generator's."""

    async def pieces() -> AsyncIterator[str]:
        with trio.fail_after(5):
            yield "one"
            yield "two"

    if what == "generator":
        generator = pieces()
        assert await anext(generator) == "one"
        return generator
    scope = trio.fail_after(5)
    scope.__enter__()
    return scope


@pytest.mark.parametrize("left", ["scope", "generator"])
async def test_a_cancel_scope_that_an_agent_leaves_open_does_not_reach_the_next_turn(
    left: str, autojump_clock: Any
) -> None:
    kept: list[Any] = []

    async def agent(turn: Turn) -> str:
        if turn.input.content != "leave":
            await trio.sleep(20)
            return "slept"
        kept.append(await leave_open(left))
        return "left"

    async with open_bench(agent) as bench:
        bench.send("r1", "leave")
        await settle()
        bench.send("r2", "sleep")
        await trio.sleep(30)
        assert bench.ends == ["completed", "completed"]
        assert bench.reader.of(Output)[-1].content == "slept"
        bench.send("r3", "sleep")
        await settle()
        bench.abort()
        await settle()
        assert bench.ends[2:] == ["aborted"]


@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("how", ["scope", "generator", "nursery", "child"])
async def test_an_agent_that_is_cancelled_by_what_it_left_open_fails(
    how: str, before: int, queued: bool, autojump_clock: Any
) -> None:
    kept: list[Any] = []

    async def agent(turn: Turn) -> str:
        if turn.input.content == "leave":
            if how == "nursery":
                nursery = trio.lowlevel.current_task().parent_nursery
                assert nursery is not None
                nursery.cancel_scope.cancel()
            else:
                kept.append(await leave_open(how))
            async with trio.open_nursery() as children:
                if how == "child":
                    children.start_soon(child)
                await trio.sleep(20)
        return "fine"

    async def child() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError("what its child says, and not the cancel scope")

    async with open_bench(agent) as bench:
        for n in range(before):
            bench.send(f"before{n}")
            await settle()
        with capture_logs() as logs:
            bench.send("r1", "leave")
            if queued:
                bench.send("r2")
            await trio.sleep(30)
            bench.send("r2")
            await settle()
        assert bench.ends == ["completed"] * before + ["failed", "completed"]
        end = bench.reader.of(TurnEnded)[before]
        assert end.error is not None
        assert end.error.code == "agent_error"
        [entry] = [entry for entry in logs if entry["event"] == "agent_failed"]
        assert entry["turn_id"] == end.turn_id
        assert "cancel scope" in entry["error"]
        assert ("what its child says" in entry["error"]) == (how == "child")


async def test_nothing_is_said_of_an_agent_that_is_stopped() -> None:
    async with open_bench(Script()) as bench:
        with capture_logs() as logs:
            for n in range(2):
                bench.send(f"r{n}")
                await settle()
                bench.abort()
                await settle()
        assert bench.ends == ["aborted"] * 2
        assert logs == []


async def test_an_interrupt_keeps_what_was_said_and_thought() -> None:
    agent = Script()
    async with open_bench(agent) as bench:
        bench.send("r1")
        await settle()
        await agent.say("because", "reasoning")
        await agent.say("so", "answer")
        bench.send("r2", on_busy="interrupt")
        await settle()
        outputs = {(e.channel, e.content): e.metadata for e in bench.reader.of(Output)}
        assert outputs == {("reasoning", "because"): {"partial": True}, ("answer", "so"): {"partial": True}}
        late = bench.attach("c2", cursor=0)
        late.read()
        assert not late.of(Delta), "superseded by the outputs"
