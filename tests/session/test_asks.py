"""Questions of an agent: who may answer what, and that each is answered exactly once, before its turn ends."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import pytest
import trio
from session_harness import Bench, Script, open_bench, settle

from gateway.config import Limits
from gateway.errors import TurnLimitExceeded
from gateway.protocol.messages import Aborted, Answered, AnswerOk, Ask, Error, TurnEnded
from gateway.session import Turn


class Asking:
    """Asks one question per turn and keeps what came back."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.args, self.options = args, options
        self.got: list[Any] = []

    async def __call__(self, turn: Turn) -> None:
        self.got.append(await turn.ask(*self.args, **self.options))


async def start(bench: Bench) -> str:
    bench.send("r1")
    await settle()
    return bench.reader.of(Ask)[-1].ask_id


@pytest.mark.parametrize(
    ("args", "wrong", "right", "expected"),
    [
        (("approval", "ok?"), ["yes", 1, 0, None, []], True, True),
        (("approval", "ok?"), [], False, False),
        (("choice", "which?", ["a", 2, True, None]), ["b", 1, False, "2", ["a"]], "a", "a"),
        (("choice", "which?", ["a", 2]), [2.5, True], 2, 2),
        (("choice", "which?", [2.0]), ["2"], 2, 2),
        (("choice", "which?", [{"k": (1, 2)}]), [{"k": 1}], {"k": [1, 2]}, {"k": [1, 2]}),
        (("input", "name?"), [5, None, True, ["x"]], "", ""),
    ],
)
async def test_what_answers_a_question(args: Any, wrong: list[Any], right: Any, expected: Any) -> None:
    agent = Asking(*args)
    async with open_bench(agent) as bench:
        ask_id = await start(bench)
        for value in wrong:
            bench.answer(ask_id, value)
            error = bench.reader.frames[-1]
            assert isinstance(error, Error)
            assert error.code == "invalid_frame"
            assert error.message.startswith("field 'value': expected")
        assert not bench.reader.of(Answered)
        assert bench.snapshot().asks[0].ask_id == ask_id
        bench.answer(ask_id, right)
        await settle()
        assert agent.got == [expected]
        [event] = bench.reader.of(Answered)
        assert (event.value, event.by, event.outcome) == (right, "c1", "answered")
        assert bench.reader.frames[-1] == AnswerOk(ask_id=ask_id)
        assert bench.reader.where(Answered) < bench.reader.where(AnswerOk)
        assert bench.ends == ["completed"]


async def test_the_first_answer_counts() -> None:
    agent = Asking("approval", "ok?")
    async with open_bench(agent) as bench:
        other = bench.attach("c2", "bob")
        ask_id = await start(bench)
        bench.answer(ask_id, True, other)
        bench.answer(ask_id, False)
        await settle()
        bench.answer(ask_id, False, other)
        bench.answer("a_unknown", True)
        assert agent.got == [True]
        assert [event.by for event in bench.reader.of(Answered)] == ["c2"]
        assert [frame.code for frame in bench.reader.got(Error)] == ["unknown_ask"] * 2
        assert len(other.got(AnswerOk)) == 1
        assert len(other.got(Error)) == 1


async def test_the_answer_is_promised_and_used_only_when_it_is_stored() -> None:
    agent = Asking("approval", "ok?")
    async with open_bench(agent) as bench:
        ask_id = await start(bench)
        bench.store.hold()
        bench.answer(ask_id, True)
        await settle()
        assert not bench.reader.got(AnswerOk)
        assert agent.got == []
        bench.store.release()
        await settle()
        assert bench.reader.got(AnswerOk)
        assert agent.got == [True]


@pytest.mark.parametrize(("kind", "value"), [("approval", False), ("input", None), ("choice", None)])
async def test_an_ask_times_out(kind: Any, value: Any, autojump_clock: Any) -> None:
    agent = Asking(kind, "?", ["a"] if kind == "choice" else None, timeout=2.5)
    async with open_bench(agent) as bench:
        ask_id = await start(bench)
        assert bench.reader.of(Ask)[0].timeout_ms == 2500
        await trio.sleep(2.4)
        assert not bench.reader.of(Answered)
        await trio.sleep(0.2)
        assert agent.got == [value]
        [event] = bench.reader.of(Answered)
        assert (event.value, event.by, event.outcome) == (None, None, "timed_out")
        bench.answer(ask_id, True)
        assert bench.reader.got(Error)[0].code == "unknown_ask"
        assert bench.ends == ["completed"]


@pytest.mark.parametrize("timeout", [None, inf, 1e30])
async def test_an_ask_without_end(timeout: Any, autojump_clock: Any) -> None:
    agent = Asking("approval", "?", timeout=timeout)
    async with open_bench(agent, limits=Limits(max_turn_ms=7 * 24 * 3_600_000)) as bench:
        ask_id = await start(bench)
        assert bench.reader.of(Ask)[0].timeout_ms is None
        await trio.sleep(6 * 24 * 3600)
        bench.answer(ask_id, True)
        await settle()
        assert agent.got == [True]


@pytest.mark.parametrize("shield", [False, True])
async def test_an_abort_cancels_the_question_before_the_turn_ends(shield: bool, autojump_clock: Any) -> None:
    got: list[Any] = []

    async def agent(turn: Turn) -> None:
        with trio.CancelScope(shield=shield):
            got.append(await turn.ask("approval", "ok?"))

    async with open_bench(agent) as bench:
        ask_id = await start(bench)
        bench.abort()
        await trio.sleep(6)
        [event] = bench.reader.of(Answered)
        assert (event.outcome, event.value) == ("cancelled", None)
        assert bench.reader.where(Answered) < bench.reader.where(TurnEnded) < bench.reader.where(Aborted)
        assert got == ([False] if shield else [])
        bench.answer(ask_id, True)
        assert bench.reader.got(Error)[0].code == "unknown_ask"
        assert bench.snapshot().asks == []


async def test_an_agents_own_cancel_scope_around_an_ask(autojump_clock: Any) -> None:
    async def agent(turn: Turn) -> None:
        with trio.move_on_after(1):
            await turn.ask("input", "quick?")
        await turn.send("went on")

    async with open_bench(agent) as bench:
        await start(bench)
        await trio.sleep(1.1)
        assert [event.outcome for event in bench.reader.of(Answered)] == ["cancelled"]
        assert bench.ends == ["completed"]


async def test_an_answer_and_the_agents_own_cancellation_at_once() -> None:
    scopes: list[trio.CancelScope] = []

    async def agent(turn: Turn) -> None:
        with trio.CancelScope() as scope:
            scopes.append(scope)
            await turn.ask("input", "?")

    async with open_bench(agent) as bench:
        ask_id = await start(bench)
        bench.answer(ask_id, "yes")
        scopes[0].cancel()
        await settle()
        assert [event.outcome for event in bench.reader.of(Answered)] == ["answered"]
        assert bench.reader.got(AnswerOk)


async def test_a_question_that_was_never_asked_is_not_answered() -> None:
    """The agent is cancelled while its ask waits for room in the outbox."""
    asked = trio.Event()
    second = trio.Event()

    async def agent(turn: Turn) -> None:
        await turn.send("x")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood, turn)
            await second.wait()
            with trio.move_on_after(0):
                asked.set()
                await turn.ask("approval", "?")
            nursery.cancel_scope.cancel()

    async def flood(turn: Turn) -> None:
        while True:
            await turn.send("x")
            await trio.lowlevel.checkpoint()

    async with open_bench(agent, limits=Limits(max_outbox=1)) as bench:
        bench.send("r1")
        while not bench.reader.events or bench.reader.events[-1].type != "delta":
            await trio.lowlevel.checkpoint()
        bench.store.hold()
        bench.send("r2")
        await settle()
        second.set()
        await asked.wait()
        await settle()
        bench.store.release()
        await settle()
        assert not bench.reader.of(Ask)
        assert not bench.reader.of(Answered)


async def test_a_question_outlives_every_connection_and_is_in_each_snapshot() -> None:
    agent = Asking("choice", "which?", ["a", "b"])
    async with open_bench(agent) as bench:
        ask_id = await start(bench)
        bench.session.detach(bench.reader, 1006, "")
        await settle()
        late = bench.attach("c2", cursor=0)
        [ask] = bench.snapshot().asks
        assert (ask.ask_id, ask.options) == (ask_id, ["a", "b"])
        bench.answer(ask_id, "b", late)
        await settle()
        assert agent.got == ["b"]
        assert bench.snapshot().asks == []


async def test_max_asks_questions_are_open_at_once() -> None:
    refused: list[str] = []

    async def one(turn: Turn) -> None:
        try:
            await turn.ask("approval", "ok?")
        except TurnLimitExceeded as exc:
            refused.append(str(exc))

    async def agent(turn: Turn) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(one, turn)

    async with open_bench(agent, limits=Limits(max_asks=3)) as bench:
        bench.send("r1")
        await settle()
        assert len(bench.reader.of(Ask)) == 3
        assert len(refused) == 2
        assert "limits.max_asks" in refused[0]
        for ask in bench.reader.of(Ask):
            bench.answer(ask.ask_id, True)
        await settle()
        assert bench.ends == ["completed"]


@pytest.mark.parametrize(
    ("args", "options"),
    [
        (("maybe", "?"), {}),
        (("choice", "?"), {}),
        (("choice", "?", []), {}),
        (("choice", "?", [{1}]), {}),
        (("input", "\ud800"), {}),
        (("input", 5), {}),
        (("approval", "?"), {"timeout": -1}),
        (("approval", "?"), {"timeout": nan}),
        (("approval", "x" * 20_000), {}),
    ],
)
async def test_a_wrong_question_is_an_error_to_the_agent(args: Any, options: Any) -> None:
    errors: list[Exception] = []

    async def agent(turn: Turn) -> None:
        try:
            await turn.ask(*args, **options)
        except (ValueError, TypeError, TurnLimitExceeded) as exc:
            errors.append(exc)

    async with open_bench(agent) as bench:
        bench.send("r1")
        await settle()
        assert len(errors) == 1
        assert not bench.reader.of(Ask)
        assert not bench.reader.of(Answered)
        assert bench.ends == ["completed"]


async def test_an_answer_that_fits_into_no_frame_is_refused() -> None:
    agent = Asking("input", "?")
    async with open_bench(agent) as bench:
        ask_id = await start(bench)
        bench.answer(ask_id, "\x00" * 200_000)
        assert bench.reader.got(Error)[0].code == "invalid_frame"
        bench.answer(ask_id, "short")
        await settle()
        assert agent.got == ["short"]


async def test_an_answer_to_the_question_of_an_earlier_turn() -> None:
    agent = Script()

    async def ask(turn: Turn) -> None:
        with trio.move_on_after(0):
            await turn.ask("approval", "?")

    async with open_bench(agent) as bench:
        bench.send("r1")
        bench.send("r2")
        await settle()
        await agent.do(ask)
        await agent.finish()
        for event in bench.reader.of(Ask):
            bench.answer(event.ask_id, True)
        assert all(frame.code == "unknown_ask" for frame in bench.reader.got(Error))
