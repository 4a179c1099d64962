"""What a message does to a session that is idle, running, storing, handing over or ending a turn."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from session_harness import Bench, Script, echo, open_bench, settle

from gateway.config import Limits
from gateway.protocol.messages import Accepted, Error, Input, Output, TurnEnded, TurnStarted, Withdrawn
from gateway.session import Turn

MODES = ["queue", "interrupt", "steer", "collect", "reject"]


@pytest.mark.parametrize("mode", MODES)
async def test_an_idle_session_runs_it_at_once(mode: Any) -> None:
    async with open_bench(echo) as bench:
        bench.send("r1", "hi", on_busy=mode)
        await settle()
        assert bench.turns == [["r1"]]
        assert bench.ends == ["completed"]
        assert bench.reader.take() == [
            Accepted(request_id="r1", seq=1, queued=0, duplicate=False, durable=True, credit=256)
        ]
        [output] = bench.reader.of(Output)
        assert (output.content, output.metadata) == ("hi!", {})


async def test_accepted_comes_before_the_turn_that_takes_the_input() -> None:
    async with open_bench(echo) as bench:
        bench.send("r1")
        await settle()
        assert bench.reader.where(Input) < bench.reader.where(Accepted) < bench.reader.where(TurnStarted)


async def test_queued_inputs_run_one_by_one_in_order_with_their_boundaries() -> None:
    agent = Script()
    async with open_bench(agent) as bench:
        for i in range(5):
            bench.send(f"r{i}")
        await settle()
        assert [frame.queued for frame in bench.reader.got(Accepted)] == [0, 0, 1, 2, 3], "the first does not wait"
        for _ in range(5):
            await agent.finish("done")
        assert bench.turns == [["r0"], ["r1"], ["r2"], ["r3"], ["r4"]]
        assert bench.ends == ["completed"] * 5
        assert agent.most == 1
        assert not bench.session.busy


async def test_how_many_wait_before_an_input() -> None:
    agent = Script()
    async with open_bench(agent) as bench:
        bench.send("running")
        await settle()
        bench.send("q1")
        await settle()
        bench.send("q2")
        await settle()
        bench.send("i1", on_busy="interrupt")
        bench.send("i2", on_busy="interrupt")
        bench.send("q3")
        await settle()
        queued = {frame.request_id: frame.queued for frame in bench.reader.got(Accepted)}
        assert queued == {"running": 0, "q1": 0, "q2": 1, "i1": 0, "i2": 1, "q3": 4}
        bench.send("q2")
        bench.send("i2")
        again = [(frame.request_id, frame.queued) for frame in bench.reader.got(Accepted) if frame.duplicate]
        assert again == [("q2", 2), ("i2", 0)]  # i1 runs by now


async def test_an_interrupt_ends_the_turn_and_goes_first() -> None:
    agent = Script()
    async with open_bench(agent) as bench:
        bench.send("r1")
        await settle()
        await agent.say("half an ans")
        bench.send("q1")
        bench.send("q2")
        bench.send("now", on_busy="interrupt")
        await settle()
        assert bench.turns == [["r1"], ["now"]]
        assert bench.ends == ["interrupted"]
        [partial] = bench.reader.of(Output)
        assert (partial.content, partial.metadata) == ("half an ans", {"partial": True})
        bench.send("later", on_busy="interrupt")
        bench.send("last", on_busy="interrupt")
        await settle()
        assert bench.turns == [["r1"], ["now"], ["later"]]
        for _ in range(4):
            await agent.finish()
        # `last` came before `later` ran, so it does not interrupt it; it is next, before what was there long ago.
        assert bench.turns[3:] == [["last"], ["q1"], ["q2"]]


@pytest.mark.parametrize("steps", range(16))
async def test_an_interrupt_of_a_session_that_is_about_to_run_another_goes_first(steps: int) -> None:
    """At some step the loop was woken for an input and has not looked yet."""
    agent = Script()
    async with open_bench(agent) as bench:
        bench.send("r0")
        bench.send("q1")
        bench.send("q2")
        await settle()
        agent.finish_nowait()
        for _ in range(steps):
            await trio.lowlevel.checkpoint()
        bench.send("now", on_busy="interrupt")
        await settle()
        assert bench.turns[-1] == ["now"]
        for _ in range(4):
            await agent.finish()
        order = [request_id for turn in bench.turns for request_id in turn]
        assert sorted(order) == ["now", "q1", "q2", "r0"]
        assert order.index("now") < order.index("q2")
        assert not bench.session.busy


async def test_an_interrupt_before_the_agent_started_ends_the_turn_without_it() -> None:
    agent = Script()
    async with open_bench(agent) as bench:
        bench.send("r1")
        while bench.session.turn is None:
            await trio.lowlevel.checkpoint()
        # Its start is being stored, its agent does not run yet.
        bench.store.hold()
        bench.send("now", on_busy="interrupt")
        bench.store.release()
        await settle()
        assert [item.content for turn in agent.turns for item in turn.inputs][-1] == "now"
        assert bench.turns == [["r1"], ["now"]]
        assert bench.ends == ["interrupted"]


async def test_steered_inputs_are_taken_by_the_running_turn() -> None:
    agent = Script()
    taken: list[str] = []

    async def take(turn: Turn) -> None:
        taken.extend(item.content for item in turn.steered())

    async with open_bench(agent) as bench:
        bench.send("r1")
        await settle()
        bench.send("s1", on_busy="steer")
        bench.send("s2", on_busy="steer")
        await settle()
        assert bench.session.waiting == 2
        assert bench.session.credit == 254
        await agent.do(take)
        assert taken == ["s1", "s2"]
        assert bench.session.waiting == 0
        withdrawn = bench.reader.of(Withdrawn)
        assert [(event.request_id, event.reason) for event in withdrawn] == [("s1", "steered"), ("s2", "steered")]
        assert {event.turn_id for event in withdrawn} == {agent.turn.turn_id}
        await agent.do(take)
        await agent.finish()
        assert taken == ["s1", "s2"]
        assert bench.turns == [["r1"]]


async def test_what_a_turn_does_not_take_is_queued_in_order() -> None:
    agent = Script()
    async with open_bench(agent) as bench:
        bench.send("r1")
        await settle()
        bench.send("q1")
        bench.send("s1", on_busy="steer")
        bench.send("q2")
        await settle()
        await agent.finish()
        for _ in range(3):
            await agent.finish()
        assert bench.turns == [["r1"], ["q1"], ["s1"], ["q2"]]
        assert not bench.reader.of(Withdrawn)


async def test_steering_a_turn_that_is_ending_queues_the_input() -> None:
    agent = Script()
    async with open_bench(agent) as bench:
        bench.send("r1")
        await settle()
        bench.store.hold()
        await agent.finish()
        bench.send("s1", on_busy="steer")  # stored after the end, which is stored now
        await settle()
        bench.store.release()
        await settle()
        assert bench.ends[0] == "completed"
        assert bench.turns == [["r1"], ["s1"]]


async def test_steering_a_turn_that_is_being_stopped_loses_nothing() -> None:
    agent = Script()
    async with open_bench(agent) as bench:
        bench.send("r1")
        await settle()
        bench.send("s1", on_busy="steer")
        bench.abort()
        await settle()
        assert bench.ends == ["aborted"]
        assert bench.turns == [["r1"], ["s1"]]


async def test_collect_runs_one_senders_next_inputs_together() -> None:
    agent = Script()
    async with open_bench(agent) as bench:
        bob = bench.attach("c2", "bob")
        bench.send("r1")
        await settle()
        for request_id, reader, mode in [
            ("a1", bench.reader, "collect"),
            ("a2", bench.reader, "collect"),
            ("b1", bob, "collect"),
            ("a3", bench.reader, "collect"),
            ("q1", bench.reader, "queue"),
            ("a4", bench.reader, "collect"),
            ("a5", bench.reader, "collect"),
        ]:
            bench.send(request_id, reader=reader, on_busy=mode)
        await settle()
        for _ in range(6):
            await agent.finish()
        assert bench.turns == [["r1"], ["a1", "a2"], ["b1"], ["a3"], ["q1"], ["a4", "a5"]]
        assert [item.content for item in agent.turns[1].inputs] == ["a1", "a2"]
        assert agent.turns[2].subject == "bob"


async def test_collect_does_not_merge_what_was_not_asked_for() -> None:
    agent = Script()
    async with open_bench(agent) as bench:
        bench.send("r1")
        await settle()
        bench.send("q1")
        bench.send("q2")
        bench.send("c1", on_busy="collect")
        bench.send("i1", on_busy="interrupt")
        await settle()
        for _ in range(4):
            await agent.finish()
        assert bench.turns == [["r1"], ["i1"], ["q1"], ["q2"], ["c1"]]


async def _running(bench: Bench, agent: Script) -> None:
    await settle()


async def _storing(bench: Bench, agent: Script) -> None:
    pass


async def _ending(bench: Bench, agent: Script) -> None:
    await settle()
    bench.store.hold()
    await agent.finish()


async def _queued(bench: Bench, agent: Script) -> None:
    bench.send("q1")
    await settle()


@pytest.mark.parametrize("situation", [_running, _storing, _ending, _queued])
async def test_reject_wants_a_free_session(situation: Any) -> None:
    agent = Script()
    async with open_bench(agent) as bench:
        bench.send("r1")
        await situation(bench, agent)
        assert bench.session.busy
        bench.send("r2", on_busy="reject")
        error = bench.reader.frames[-1]
        assert isinstance(error, Error)
        assert (error.code, error.request_id, error.retryable) == ("busy", "r2", True)
        if bench.store.gate is not None:
            bench.store.release()
        await settle()
        assert "r2" not in bench.inputs
        # The refused id was not used: the same message may come again.
        for _ in range(2):
            await agent.finish()
        bench.send("r2", on_busy="reject")
        await settle()
        assert bench.turns[-1] == ["r2"]


@pytest.mark.parametrize("mode", ["queue", "interrupt", "steer", "collect"])
@pytest.mark.parametrize("steps", range(12))
async def test_a_message_at_any_moment_is_run_exactly_once(mode: Any, steps: int) -> None:
    """Whatever the session is doing, some scheduler passes after another message came in."""

    async def agent(turn: Turn) -> None:
        await turn.send("x")
        await trio.lowlevel.checkpoint()

    async with open_bench(agent) as bench:
        bench.send("r1")
        for _ in range(steps):
            await trio.lowlevel.checkpoint()
        bench.send("r2", on_busy=mode)
        await settle()
        assert sorted([x for turn in bench.turns for x in turn]) == ["r1", "r2"]
        assert len(bench.ends) == 2
        assert not bench.session.busy


async def test_after_every_step_an_accepted_input_waits_or_has_a_turn() -> None:
    """Looked at after each step of each task: the loop, too, may only be seen before or after it takes one."""
    steps = 0
    homeless: set[str] = set()

    class Look(trio.abc.Instrument):
        def after_task_step(self, task: trio.lowlevel.Task) -> None:
            nonlocal steps, homeless
            steps += 1
            session = bench.session
            taken = session.turn.inputs if session.turn is not None else ()
            homeless |= session.view.queue.keys() - session._inbox.waiting.keys() - {item.request_id for item in taken}
            assert session.busy or not session.view.queue

    async def agent(turn: Turn) -> None:
        await turn.send("x")
        await trio.lowlevel.checkpoint()

    async with open_bench(agent) as bench:
        look = Look()
        trio.lowlevel.add_instrument(look)
        for i, mode in enumerate(["queue", "steer", "collect", "collect", "interrupt", "queue"] * 3):
            bench.send(f"r{i}", on_busy=mode)
            for _ in range(i % 4):
                await trio.lowlevel.checkpoint()
        await settle()
        trio.lowlevel.remove_instrument(look)  # which trio has done itself if the look failed
        assert steps > 100
        assert homeless == set()
        assert sorted(x for turn in bench.turns for x in turn) == sorted(f"r{i}" for i in range(18))


async def test_the_session_is_free_in_the_step_that_shows_the_end() -> None:
    agent = Script()
    async with open_bench(agent, limits=Limits(max_inbox=1)) as bench:
        seen: list[bool] = []
        wake = bench.reader.wake

        def look() -> None:
            wake()
            if bench.ends and not seen:
                seen.append(True)
                bench.send("r2", on_busy="reject")

        bench.reader.wake = look  # type: ignore[method-assign]
        bench.send("r1")
        await settle()
        await agent.finish()
        assert bench.reader.of(TurnEnded)
        assert seen
        await settle()
        assert bench.turns[-1] == ["r2"]
