"""Every shape an agent may have, what it may return, and how it ends."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import trio
import trio.from_thread
import trio.testing
from fake_turn import FakeTurn, run

from gateway.agents import SyncTurn, as_agent, shapes
from gateway.errors import AgentError, AgentLoadError, TurnFailed
from gateway.session import Turn


async def async_function(turn: Turn) -> str:
    await turn.send("x")
    return f"async {turn.input.content}"


async def async_generator(turn: Turn) -> AsyncIterator[str]:
    yield "async "
    yield turn.input.content


def function(turn: SyncTurn) -> str:
    turn.send("x")
    return f"sync {turn.input.content}"


def generator(turn: SyncTurn) -> Iterator[str]:
    yield "sync "
    yield turn.input.content


class Object:
    def __init__(self, greeting: str = "object") -> None:
        self.greeting = greeting

    async def __call__(self, turn: Turn) -> str:
        return f"{self.greeting} {turn.input.content}"

    async def method(self, turn: Turn) -> str:
        return f"method {turn.input.content}"


class GeneratorObject:
    async def __call__(self, turn: Turn) -> AsyncIterator[str]:
        yield f"object {turn.input.content}"


async def with_option(turn: Turn, *, greeting: str) -> str:
    return f"{greeting} {turn.input.content}"


@pytest.mark.parametrize(
    ("obj", "shape", "returned", "sent"),
    [
        (async_function, "async function", "async Hello", "x"),
        (async_generator, "async generator", None, "async Hello"),
        (function, "function", "sync Hello", "x"),
        (generator, "generator", None, "sync Hello"),
        (Object("object"), "async function", "object Hello", ""),
        (Object, "async function", "object Hello", ""),
        (Object().method, "async function", "method Hello", ""),
        (GeneratorObject, "async generator", None, "object Hello"),
        (functools.partial(with_option, greeting="partial"), "async function", "partial Hello", ""),
        (functools.partial(functools.partial(async_generator)), "async generator", None, "async Hello"),
        (functools.partial(Object("inner")), "async function", "inner Hello", ""),
        (functools.partial(as_agent(function, name="inner")), "async function", "sync Hello", "x"),
        (lambda turn: "lambda", "function", "lambda", ""),
    ],
)
async def test_shape(obj: object, shape: str, returned: str | None, sent: str) -> None:
    agent = as_agent(obj, name="a")
    assert (agent.name, agent.shape) == ("a", shape)
    turn = FakeTurn()
    assert await run(agent, turn) == returned
    assert turn.text() == sent


async def test_an_agent_is_an_agent() -> None:
    agent = as_agent(as_agent(async_function, name="one"), name="two")
    assert agent.name == "two"
    assert await run(agent, FakeTurn()) == "async Hello"


class NoCall:
    pass


class NeedsArgument:
    def __init__(self, model: str) -> None: ...

    async def __call__(self, turn: Turn) -> None: ...


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        (3, "agent 'a': expected a function, a class or a callable object, got int"),
        (NoCall, "agent 'a': class NoCall has no 'async def __call__(self, turn)'"),
        (NeedsArgument, "agent 'a': NeedsArgument() failed: TypeError: "),
        (lambda: "no turn", "agent 'a': expected to be called with one argument, the turn; its signature is ()"),
        (lambda turn, more: "two", "its signature is (turn, more): missing a required argument: 'more'"),
    ],
)
def test_what_is_no_agent(obj: object, message: str) -> None:
    with pytest.raises(AgentLoadError) as caught:
        as_agent(obj, name="a")
    assert message in str(caught.value)
    assert caught.value.__cause__ is None


async def returns_int(turn: Turn) -> Any:
    return 3


async def yields_none(turn: Turn) -> AsyncIterator[Any]:
    yield None


def yields_bytes(turn: SyncTurn) -> Iterator[Any]:
    yield b"x"


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        (returns_int, "agent 'a' returned int, expected text or None"),
        (lambda turn: async_function(turn), "returned coroutine, expected text or None; write it with 'async def'"),
        (lambda turn: async_generator(turn), "returned async_generator, expected text or None; name the generator"),
        (yields_none, "agent 'a' yielded NoneType, expected text"),
        (yields_bytes, "agent 'a' yielded bytes, expected text"),
    ],
)
async def test_what_is_no_text(obj: object, message: str) -> None:
    with pytest.raises(AgentError) as caught:
        await run(as_agent(obj, name="a"), FakeTurn())
    assert message in str(caught.value)


async def test_an_agents_error_comes_through() -> None:
    def failing(turn: SyncTurn) -> str:
        raise TurnFailed("quota", "no more today", retryable=True)

    with pytest.raises(TurnFailed, match="no more today"):
        await run(as_agent(failing, name="a"), FakeTurn())


async def test_a_cancelled_generator_is_closed_before_the_agent_is_over() -> None:
    closed = False

    async def endless(turn: Turn) -> AsyncIterator[str]:
        nonlocal closed
        try:
            while True:
                yield "x"
        finally:
            closed = True

    turn = FakeTurn()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, as_agent(endless, name="a"), turn)
        await turn.wait_for(lambda turn: len(turn.calls) > 3)
        nursery.cancel_scope.cancel()
    assert closed


# --- threads ---------------------------------------------------------------------------------------------------------


async def test_a_thread_has_the_whole_turn() -> None:
    def busy(turn: SyncTurn) -> str:
        assert threading.current_thread() is not threading.main_thread()
        assert (turn.session_id, turn.turn_id, turn.subject, turn.attempt) == ("s_1", "t_1", "alice", 1)
        assert [event.content for event in turn.inputs] == ["Hello"]
        assert len(turn.transcript) == 1
        turn.check()
        turn.reason("hm")
        turn.progress("k", 1)
        call_id = turn.tool_call("look", {"at": 1})
        turn.tool_result(call_id, "seen")
        turn.custom("n", [1])
        turn.update_state({"a": 1})
        assert turn.state == {"a": 1}
        assert turn.steered() == []
        turn.output("done", metadata={"m": 1})
        return f"allowed: {turn.ask('approval', 'May I?', timeout=3)}"

    turn = FakeTurn(answers=[True])
    assert await run(as_agent(busy, name="a"), turn) == "allowed: True"
    assert turn.calls == [
        ("send", "reasoning", "hm"),
        ("progress", "k", 1),
        ("tool_call", "look", {"at": 1}, "call_2"),
        ("tool_result", "call_2", "seen", False),
        ("custom", "n", [1]),
        ("state", {"a": 1}),
        ("output", "answer", "done", {"m": 1}),
        ("ask", "approval", "May I?", None, 3),
    ]


async def test_the_limiter_bounds_the_threads() -> None:
    limiter = trio.CapacityLimiter(2)
    running = most = 0
    lock = threading.Lock()

    def work(turn: SyncTurn) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1

    agent = as_agent(work, name="a", limiter=limiter)
    async with trio.open_nursery() as nursery:
        for _ in range(6):
            nursery.start_soon(run, agent, FakeTurn())
    assert most == 2


@pytest.mark.parametrize("way", ["send", "check", "ask", "yield"])
async def test_a_cancelled_thread_ends_at_its_next_call(way: str) -> None:
    ended = threading.Event()

    def endless(turn: SyncTurn) -> None:
        try:
            turn.send("begun")
            if way == "ask":
                turn.ask("input", "?")  # nobody answers
            while True:
                turn.send("x") if way == "send" else turn.check()
                time.sleep(0.001)
        finally:
            ended.set()

    def yielding(turn: SyncTurn) -> Iterator[str]:
        try:
            while True:
                yield "x"
        finally:
            ended.set()

    turn = FakeTurn()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, as_agent(yielding if way == "yield" else endless, name="a"), turn)
        await turn.wait_for(lambda turn: turn.calls)
        await trio.sleep(0.02)
        nursery.cancel_scope.cancel()
    # The agent's task returned only after its thread: nothing of the turn works on.
    assert ended.is_set()


async def test_a_thread_that_ignores_its_cancellation_is_abandoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "THREAD_GRACE", 0.05)
    limiter = trio.CapacityLimiter(1)
    go_on, outcome = threading.Event(), []

    def stubborn(turn: SyncTurn) -> None:
        turn.send("begun")
        go_on.wait(10)
        try:
            turn.send("too late")
        except BaseException as exc:
            outcome.append(type(exc))
            raise

    turn = FakeTurn()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, as_agent(stubborn, name="a", limiter=limiter), turn)
        await turn.wait_for(lambda turn: turn.calls)
        start = trio.current_time()
        nursery.cancel_scope.cancel()
    assert trio.current_time() - start < 2
    assert limiter.borrowed_tokens == 1  # it still holds its place
    go_on.set()
    with trio.fail_after(5):
        await limiter.acquire()
    assert outcome == [trio.Cancelled]
    assert turn.calls == [("send", "answer", "begun")]


async def test_a_thread_that_has_not_begun_is_not_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    limiter = trio.CapacityLimiter(1)
    called = False

    def work(turn: SyncTurn) -> None:
        nonlocal called
        called = True

    await limiter.acquire()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, as_agent(work, name="a", limiter=limiter), FakeTurn())
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert trio.current_time() == autojump_clock.current_time() == 0
    assert not called
