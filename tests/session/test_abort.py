"""Stopping: by scope, by turn, by input; at every moment; against agents that will not end."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import trio
from session_harness import Script, open_bench, settle
from structlog.testing import capture_logs

from gateway.config import Limits
from gateway.errors import TurnClosed
from gateway.protocol.messages import Aborted, Accepted, Delta, Error, Output, State, TurnEnded, Withdrawn
from gateway.session import Turn
from gateway.session.inbox import Place
from gateway.session.turn import PIECE


async def test_scope_turn_stops_the_turn_and_the_queue_runs_on() -> None:
    agent = Script()
    async with open_bench(agent) as bench:
        bench.send("r1")
        bench.send("r2")
        await settle()
        await agent.say("half")
        turn_id = agent.turn.turn_id
        bench.abort()
        await settle()
        assert bench.ends == ["aborted"]
        assert bench.turns == [["r1"], ["r2"]]
        assert bench.reader.got(Aborted) == [Aborted(turn_id=turn_id, withdrawn=[])]
        assert bench.reader.where(TurnEnded) < bench.reader.where(Aborted)
        assert [(e.content, e.metadata) for e in bench.reader.of(Output)] == [("half", {"partial": True})]


async def test_scope_queue_withdraws_and_lets_the_turn_run() -> None:
    agent = Script()
    async with open_bench(agent) as bench:
        bench.send("r1")
        await settle()
        bench.send("r2")
        bench.send("s1", on_busy="steer")
        await settle()
        bench.abort(scope="queue")
        assert not bench.reader.got(Aborted), "only when the log says so"
        await settle()
        assert bench.reader.got(Aborted) == [Aborted(turn_id=None, withdrawn=["r2", "s1"])]
        assert [(e.request_id, e.reason) for e in bench.reader.of(Withdrawn)] == [("r2", "aborted"), ("s1", "aborted")]
        assert bench.session.turn is not None
        await agent.finish()
        assert bench.turns == [["r1"]]
        assert not bench.session.busy


async def test_scope_all_withdraws_before_it_cancels() -> None:
    agent = Script()
    async with open_bench(agent) as bench:
        bench.send("r1")
        await settle()
        for i in range(2, 6):
            bench.send(f"r{i}", on_busy="collect" if i % 2 else "queue")
        await settle()
        bench.abort(scope="all")
        await settle()
        assert bench.turns == [["r1"]], "nothing is promoted into a half-stopped session"
        assert bench.ends == ["aborted"]
        assert bench.reader.got(Aborted)[0].withdrawn == ["r2", "r3", "r4", "r5"]
        assert bench.reader.where(Withdrawn, request_id="r5") < bench.reader.where(TurnEnded)
        assert not bench.session.busy


async def test_one_queued_input() -> None:
    agent = Script()
    async with open_bench(agent) as bench:
        for i in range(4):
            bench.send(f"r{i}")
        await settle()
        bench.abort(request_id="r2")
        bench.abort(request_id="r2")
        bench.abort(request_id="r0")  # runs, so it does not wait
        bench.abort(request_id="nobody")
        await settle()
        assert bench.reader.got(Aborted) == [Aborted(turn_id=None, withdrawn=["r2"])]
        assert [(e.code, e.request_id) for e in bench.reader.got(Error)] == [
            ("unknown_request", "r2"),
            ("unknown_request", "r0"),
            ("unknown_request", "nobody"),
        ]
        for _ in range(3):
            await agent.finish()
        assert bench.turns == [["r0"], ["r1"], ["r3"]]


async def test_nothing_runs() -> None:
    async with open_bench(Script()) as bench:
        bench.abort()
        bench.abort(turn_id="t_1")
        bench.abort(scope="queue")
        bench.abort(scope="all")
        assert [getattr(frame, "code", frame) for frame in bench.reader.frames] == [
            "no_active_turn",
            "no_active_turn",
            Aborted(turn_id=None, withdrawn=[]),
            Aborted(turn_id=None, withdrawn=[]),
        ]


async def test_an_unknown_turn_is_not_stopped_instead_of_the_running_one() -> None:
    agent = Script()
    async with open_bench(agent) as bench:
        bench.send("r1")
        await settle()
        bench.abort(turn_id="t_old", scope="all")
        await settle()
        assert bench.reader.got(Error)[0].code == "no_active_turn"
        assert bench.ends == []
        bench.abort(turn_id=agent.turn.turn_id)
        await settle()
        assert bench.ends == ["aborted"]


async def test_an_input_that_is_being_stored_is_accepted_then_withdrawn() -> None:
    agent = Script()
    async with open_bench(agent) as bench:
        bench.send("r0")
        await settle()
        bench.reader.take()
        bench.store.hold()
        bench.send("r1")
        await settle()
        bench.abort(scope="queue")
        await settle()
        assert not bench.reader.frames
        bench.store.release()
        await settle()
        assert [type(frame) for frame in bench.reader.frames] == [Accepted, Aborted]
        assert [e.request_id for e in bench.reader.of(Withdrawn)] == ["r1"]
        await agent.finish()
        assert bench.turns == [["r0"]]


@pytest.mark.parametrize("scope", ["turn", "all"])
async def test_a_turn_whose_input_is_being_stored_is_aborted_without_its_agent(scope: Any) -> None:
    agent = Script()
    async with open_bench(agent) as bench:
        bench.store.hold()
        bench.send("r1")
        await settle()
        bench.abort(scope=scope)
        await settle()
        assert not bench.reader.frames
        bench.store.release()
        await settle()
        assert [type(frame) for frame in bench.reader.frames] == [Accepted, Aborted]
        assert (bench.turns, bench.ends, agent.turns) == ([["r1"]], ["aborted"], [])
        assert not bench.session.busy


@pytest.mark.parametrize("abort", [None, "all", "turn"])
async def test_a_turn_whose_input_is_refused_never_was(abort: Any) -> None:
    agent = Script()
    async with open_bench(agent) as bench:
        bench.store.unavailable = True
        bench.send("r1")
        if abort:
            bench.abort(scope=abort)
        await settle()
        # `aborted` with a turn's id would promise its end in the log.
        codes = ["unavailable", "no_active_turn"] if abort == "turn" else ["unavailable"]
        assert [frame.code for frame in bench.reader.got(Error)] == codes
        assert bench.reader.got(Aborted) == ([Aborted(turn_id=None, withdrawn=[])] if abort == "all" else [])
        assert (bench.reader.events, agent.turns, bench.session.busy) == ([], [], False)
        bench.store.unavailable = False
        await trio.sleep(0.1)
        bench.send("r1")
        await settle()
        await agent.finish("done")
        assert bench.ends == ["completed"]


@pytest.mark.parametrize("steps", range(24))
@pytest.mark.parametrize("scope", ["turn", "queue", "all"])
async def test_an_abort_at_any_moment_is_answered_and_leaves_the_session_usable(scope: Any, steps: int) -> None:
    async def agent(turn: Turn) -> None:
        await turn.send("x")
        await trio.lowlevel.checkpoint()

    async with open_bench(agent) as bench:
        for i in range(3):
            bench.send(f"r{i}")
        for _ in range(steps):
            await trio.lowlevel.checkpoint()
        bench.abort(scope=scope)
        await settle()
        replies = [frame for frame in bench.reader.frames if isinstance(frame, Aborted | Error)]
        assert len(replies) == 1
        [reply] = replies
        withdrawn = [event.request_id for event in bench.reader.of(Withdrawn)]
        if isinstance(reply, Aborted):
            assert reply.withdrawn == withdrawn
        assert sorted(withdrawn + [x for turn in bench.turns for x in turn]) == ["r0", "r1", "r2"]
        bench.send("again")
        await settle()
        assert bench.turns[-1] == ["again"]
        assert bench.ends[-1] == "completed"


async def test_between_hand_over_and_start_the_agent_never_runs() -> None:
    agent = Script()
    async with open_bench(agent) as bench:
        bench.send("r1")
        while bench.session.turn is None:
            await trio.lowlevel.checkpoint()
        bench.abort()
        await settle()
        assert agent.turns == []
        assert bench.turns == [["r1"]]
        assert bench.ends == ["aborted"]
        assert len(bench.reader.got(Aborted)) == 1


async def test_an_input_that_the_loop_was_woken_for_is_withdrawn() -> None:
    """The waiting loop is to run it, but has not looked yet."""
    agent = Script()
    async with open_bench(agent) as bench:
        wake = bench.reader.wake
        seen: list[Place] = []

        def look() -> None:
            wake()
            inbox = bench.session._inbox
            if bench.ends and "r2" in inbox.waiting and inbox.waiting["r2"].place is Place.INBOX and not seen:
                seen.append(inbox.waiting["r2"].place)
                assert bench.session.turn is None
                assert not bench.session._work.statistics().tasks_waiting
                bench.abort(scope="queue")

        bench.reader.wake = look  # type: ignore[method-assign]
        bench.send("r1")
        await settle()
        bench.store.hold()
        await agent.finish()
        bench.send("r2")  # behind the end of the turn, so it does not start at once
        bench.store.release()
        bench.store.hold()
        await settle()
        assert bench.ends, "the loop waits"
        bench.store.release()
        await settle()
        assert seen == [Place.INBOX]
        assert bench.reader.got(Aborted)[0].withdrawn == ["r2"]
        assert bench.turns == [["r1"]]
        bench.send("r3")
        await settle()
        assert bench.turns == [["r1"], ["r3"]]


async def test_every_abort_has_its_reply() -> None:
    agent = Script()
    async with open_bench(agent) as bench:
        other = bench.attach("c2")
        bench.send("r1")
        await settle()
        bench.abort()
        bench.abort(other, scope="all")
        bench.abort(turn_id=agent.turn.turn_id)
        await settle()
        assert len(bench.reader.got(Aborted)) == 2
        assert len(other.got(Aborted)) == 1
        assert bench.ends == ["aborted"]


async def test_an_abort_of_a_turn_that_is_ending_promises_no_more_than_is_stored() -> None:
    agent = Script()
    async with open_bench(agent) as bench:
        bench.send("r1")
        bench.send("r2")
        await settle()
        bench.store.hold()
        await agent.finish("an answer")
        bench.abort(scope="all")
        bench.store.release()
        bench.store.hold()
        while not bench.ends:
            await trio.lowlevel.checkpoint()
        await settle()
        # The end is in the log, the withdrawal is not.
        assert not bench.reader.got(Aborted)
        bench.store.release()
        await settle()
        assert bench.reader.got(Aborted) == [Aborted(turn_id=agent.turn.turn_id, withdrawn=["r2"])]
        assert bench.ends == ["completed"], "the agent had finished; that it was stopped would be wrong"
        assert bench.turns == [["r1"]]


async def test_an_agent_that_has_returned_is_not_stopped_any_more() -> None:
    """The abort falls between the agent's return and the loop's next step."""

    class AbortRightThen(trio.abc.Instrument):
        done = False

        def after_task_step(self, task: trio.lowlevel.Task) -> None:
            turn = bench.session.turn
            if turn is not None and turn._closed and not self.done:
                self.done = True
                bench.abort()

    async def agent(turn: Turn) -> str:
        return "the whole answer"

    async with open_bench(agent) as bench:
        spy = AbortRightThen()
        trio.lowlevel.add_instrument(spy)
        bench.send("r1")
        await settle()
        trio.lowlevel.remove_instrument(spy)
        assert bench.ends == ["completed"]
        assert bench.reader.of(Output)[0].content == "the whole answer"
        assert len(bench.reader.got(Aborted)) == 1


async def test_an_agent_that_catches_its_cancellation_and_returns_text() -> None:
    async def agent(turn: Turn) -> str:
        await turn.send("streamed")
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            return "swallowed"
        raise AssertionError

    async with open_bench(agent) as bench:
        bench.send("r1")
        bench.send("r2")
        await settle()
        bench.abort()
        await settle()
        assert bench.ends == ["aborted"]
        assert [(e.content, e.metadata) for e in bench.reader.of(Output)] == [("streamed", {"partial": True})]
        assert bench.turns == [["r1"], ["r2"]]


async def test_an_agent_that_shields_itself_is_given_up_after_stop_timeout(autojump_clock: Any) -> None:
    refused: list[str] = []
    gate = trio.Event()

    async def agent(turn: Turn) -> str | None:
        if turn.input.content != "r1":
            await turn.send("fine")
            return None
        with trio.CancelScope(shield=True):
            with trio.move_on_after(1000):  # so that a failure of this test ends it
                await gate.wait()
            for write in (
                lambda: turn.send("late"),
                lambda: turn.send("late", "other"),
                lambda: turn.output("late"),
                lambda: turn.progress("k", 1),
                lambda: turn.update_state({"late": True}),
                lambda: turn.tool_call("late"),
                lambda: turn.tool_result("c", 1),
                lambda: turn.custom("late"),
                lambda: turn.ask("input", "late?", timeout=1),
            ):
                try:
                    await write()
                except TurnClosed:
                    refused.append("refused")
            try:
                turn.steered()
            except TurnClosed:
                refused.append("refused")
        return "late"

    async with open_bench(agent, limits=Limits(stop_timeout_ms=2000)) as bench:
        bench.send("r1")
        await settle()
        started = trio.current_time()
        with capture_logs() as logs:
            bench.abort()
            bench.send("s1", on_busy="steer")
            await trio.sleep(1.9)
            assert bench.ends == []
            await trio.sleep(0.2)
        assert [entry["event"] for entry in logs] == ["agent_ignores_cancellation"]
        assert trio.current_time() - started < 2.2
        assert bench.ends == ["aborted", "completed"]
        assert len(bench.reader.got(Aborted)) == 1
        before = list(bench.reader.events)
        with capture_logs() as logs:
            gate.set()
            await settle()
        assert refused == ["refused"] * 10
        assert bench.reader.events == before
        assert bench.session.view.state == {}
        bench.send("r2")
        await settle()
        assert bench.ends == ["aborted", "completed", "completed"]


async def test_a_zombies_end_does_not_touch_the_next_turn(autojump_clock: Any) -> None:
    gate = trio.Event()
    second = trio.Event()

    async def agent(turn: Turn) -> None:
        if turn.input.content == "r1":
            with trio.CancelScope(shield=True):
                await gate.wait()
            raise RuntimeError("late")
        await second.wait()
        await turn.send("second")

    async with open_bench(agent, limits=Limits(stop_timeout_ms=100)) as bench:
        bench.send("r1")
        bench.send("r2")
        await settle()
        first = bench.session.turn
        assert first is not None
        bench.abort()
        await trio.sleep(0.2)
        assert bench.turns == [["r1"], ["r2"]]
        bench.session.stop_turn(first, "aborted")
        gate.set()
        await settle()
        assert bench.ends == ["aborted"]
        second.set()
        await settle()
        assert bench.ends == ["aborted", "completed"]
        assert bench.reader.text_of(bench.reader.of(TurnEnded)[1].turn_id) == "second"


async def test_an_agent_that_was_given_up_and_ends_before_its_end_is_stored(autojump_clock: Any) -> None:
    gate = trio.Event()

    async def agent(turn: Turn) -> None:
        with trio.CancelScope(shield=True):
            await gate.wait()
        await trio.lowlevel.checkpoint()

    async with open_bench(agent, limits=Limits(stop_timeout_ms=100)) as bench:
        bench.send("r1")
        await settle()
        bench.store.hold()
        bench.abort()
        await trio.sleep(0.2)
        gate.set()
        await settle()
        assert bench.session.turn is not None
        bench.store.release()
        await settle()
        assert bench.ends == ["aborted"]
        assert bench.reader.got(Aborted) == [Aborted(turn_id=bench.reader.of(TurnEnded)[0].turn_id, withdrawn=[])]


async def test_a_full_outbox_does_not_hold_up_an_abort(autojump_clock: Any) -> None:
    sent = 0

    async def agent(turn: Turn) -> None:
        nonlocal sent
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(flood, turn)

    async def flood(turn: Turn) -> None:
        nonlocal sent
        while True:
            await turn.send("x")
            sent += 1

    async with open_bench(agent, limits=Limits(max_outbox=4)) as bench:
        bench.send("r1")
        while bench.session.turn is None or not sent:
            await trio.lowlevel.checkpoint()
        bench.store.hold()
        bench.send("r2")  # the publisher now waits for the store, and everyone for the publisher
        await settle()
        assert bench.session.publisher.outbox.statistics().tasks_waiting_send == 10
        bench.abort(scope="all")
        bench.store.release()
        started = trio.current_time()
        await settle()
        assert trio.current_time() - started < 0.1
        assert bench.ends == ["aborted"]
        assert len(bench.reader.got(Aborted)) == 1


async def test_a_zombie_that_waits_to_write_writes_nothing_after_the_end(autojump_clock: Any) -> None:
    """Shielded, in `send` and `update_state`, while the store takes longer than ``stop_timeout``."""
    ended: list[BaseException | None] = []

    async def agent(turn: Turn) -> None:
        if turn.input.content == "r2":
            return
        await turn.send("before")

        async def write(what: Any) -> None:
            with trio.CancelScope(shield=True):
                try:
                    while True:
                        await what()
                except TurnClosed as exc:
                    ended.append(exc)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, lambda: turn.send("y"))
            nursery.start_soon(write, lambda: turn.update_state({"z": 1}))

    async with open_bench(agent, limits=Limits(max_outbox=1, stop_timeout_ms=50)) as bench:
        bench.store.hold()
        bench.send("r1")
        await settle()
        bench.store.release()
        while not bench.reader.of(Delta):
            await trio.lowlevel.checkpoint()
        bench.store.hold()
        bench.send("r2")
        await settle()
        bench.abort()
        await trio.sleep(1)
        bench.store.release()
        await trio.sleep(1)
        assert bench.ends == ["aborted", "completed"]
        end = bench.reader.where(TurnEnded)
        late = [item for item in bench.reader.seen[end:] if isinstance(item, Delta | State)]
        assert late == []
        assert len(ended) == 2


async def test_the_rest_of_a_long_piece_is_dropped_after_the_end(autojump_clock: Any) -> None:
    async def agent(turn: Turn) -> None:
        if turn.input.content == "r1":
            await turn.send("before")
            with trio.CancelScope(shield=True), suppress(TurnClosed):
                await gate.wait()
                await turn.send("z" * 20 * PIECE)
                finished.set()
                await turn.send("closed")

    gate, finished = trio.Event(), trio.Event()
    async with open_bench(agent, limits=Limits(max_outbox=1, stop_timeout_ms=50)) as bench:
        bench.send("r1")
        await settle()
        bench.store.hold()
        bench.send("r2")
        await settle()
        gate.set()
        bench.abort()
        await trio.sleep(1)
        bench.store.release()
        await trio.sleep(1)
        assert finished.is_set()
        assert bench.ends == ["aborted", "completed"]
        end = bench.reader.where(TurnEnded)
        assert not [item for item in bench.reader.seen[end:] if isinstance(item, Delta | Output)]
