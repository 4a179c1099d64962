"""After a crash, and after a rest: the same history, the same epoch, no number twice, nothing lost silently."""

from __future__ import annotations

import random
from typing import Any

import pytest
import trio
from session_harness import (
    ObedientStore,
    Script,
    check_history,
    echo,
    make_sources,
    open_house,
    settle,
)
from structlog.testing import capture_logs

from gateway.config import Limits
from gateway.errors import HandshakeRefused
from gateway.protocol.messages import (
    Accepted,
    Answered,
    Ask,
    Delta,
    Error,
    Event,
    Input,
    Output,
    TurnEnded,
    TurnStarted,
    Withdrawn,
)
from gateway.session import Registered, Turn
from gateway.session.publisher import NUMBER_BLOCK


async def crash_with(store: ObedientStore, *sends: tuple[str, str], agent: Any = None) -> list[Event]:
    """Run a gateway until everything sent is stored and the first turn streams, then let it crash."""
    agent = agent or Script()
    async with open_house(agent, store=store, sources=make_sources()) as house:
        bench = await house.bench("s1")
        for request_id, mode in sends:
            bench.send(request_id, on_busy=mode)
            await settle()
        return bench.reader.events


async def test_an_open_turn_is_lost_above_every_number_that_was_shown() -> None:
    store = ObedientStore()

    async def agent(turn: Turn) -> None:
        for _ in range(300):
            await turn.send("x")
        await turn.ask("approval", "ok?")

    before = await crash_with(store, ("r1", "queue"), agent=agent)
    [ask] = [event for event in before if isinstance(event, Ask)]
    reserved = store._sessions["s1"].reserved
    assert before[-1].seq <= reserved
    async with open_house(echo, store=store) as house:
        bench = await house.bench("s1")
        # Nobody joined before it was in the log.
        [end] = bench.reader.of(TurnEnded)
        assert (end.outcome, end.seq) == ("lost", reserved + 2)
        [answered] = bench.reader.of(Answered)
        assert (answered.ask_id, answered.outcome, answered.seq) == (ask.ask_id, "cancelled", reserved + 1)
        assert bench.snapshot().asks == []
        assert bench.snapshot().turn is None
        # A client that saw everything continues without a gap, and gets just what is new.
        resumed = bench.attach("c2", cursor=before[-1].seq)
        assert [event.type for event in resumed.events] == ["answered", "turn_ended"]
        assert not bench.reader.of(Delta)


async def test_the_queue_runs_on_in_order() -> None:
    store = ObedientStore()
    await crash_with_an_interrupt(store)
    agent = Script()
    async with open_house(agent, store=store) as house:
        bench = await house.bench("s1")
        await settle()
        assert bench.ends == ["lost"]
        for _ in range(5):
            await agent.finish("done")
        assert bench.turns == [["r1"], ["i1"], ["q1"], ["c1", "c2"], ["s1"]]
        assert bench.ends == ["lost", "completed", "completed", "completed", "completed"]
        assert not bench.session.busy
        bench.send("c2")
        await settle()
        assert bench.reader.got(Accepted)[-1].duplicate
        check_history(bench.reader.events, finished=True)


async def test_what_waits_is_in_the_snapshot_although_its_events_are_not_kept_any_more() -> None:
    limits = Limits(replay_max_events=8)
    store = ObedientStore()
    agent = Script()
    async with open_house(agent, store=store, limits=limits, sources=make_sources()) as house:
        bench = await house.bench("s1")
        for request_id in ("r1", "q1", "q2"):
            bench.send(request_id)
            await settle()
        for _ in range(20):
            await agent.do(lambda turn: turn.custom("note"))
        before = bench.snapshot().queue
    assert [item.request_id for item in before] == ["q1", "q2"]
    async with open_house(Script(), store=store, limits=limits) as house:
        session, _ = await house.join("s1")
        assert session.log.floor > before[-1].seq
        assert [(item.request_id, item.seq) for item in before] == list(session.view.queue.items())


async def crash_with_an_interrupt(store: ObedientStore) -> None:
    """Inputs of every kind wait; the interrupting one is stored, but what it interrupts cannot end before the crash."""
    release = trio.Event()

    async def stubborn(turn: Turn) -> None:
        with trio.CancelScope(shield=True):
            await release.wait()

    async with open_house(stubborn, store=store, sources=make_sources()) as house:
        bench = await house.bench("s1")
        for request_id, mode in [
            ("r1", "queue"),
            ("q1", "queue"),
            ("c1", "collect"),
            ("c2", "collect"),
            ("s1", "steer"),
            ("w1", "queue"),
            ("i1", "interrupt"),
        ]:
            bench.send(request_id, on_busy=mode)
            await settle()
        bench.abort(request_id="w1")
        await settle()
        # The process dies now: nothing more reaches the store.
        store.hold()
        release.set()
        await settle()
    store.gate = None


async def test_nobody_joins_before_the_lost_turn_has_its_end() -> None:
    store = ObedientStore()
    await crash_with(store, ("r1", "queue"))
    async with open_house(echo, store=store) as house:
        store.hold()
        joined: list[int] = []

        async def join(patience: float) -> None:
            with trio.move_on_after(patience):
                session, existed = await house.join("s1")
                assert existed
                joined.append(session.log.head)

        async with trio.open_nursery() as nursery:
            # The first to ask gives up; those after it still have to wait.
            nursery.start_soon(join, 0)
            await settle()
            nursery.start_soon(join, 100)
            nursery.start_soon(join, 100)
            await settle()
            assert joined == []
            store.release()
        assert len(joined) == 2
        assert all(head > NUMBER_BLOCK for head in joined)
        assert len(house.registry) == 1


async def test_the_time_of_a_slow_recovery_does_not_put_the_session_to_rest(autojump_clock: Any) -> None:
    store = ObedientStore()
    await crash_with(store, ("r1", "queue"))
    async with open_house(echo, store=store, limits=Limits(idle_session_ms=10)) as house:
        store.hold()

        async def release_and_rest() -> None:
            await trio.sleep(1)
            store.release()
            while True:
                house.registry.rest_idle()
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(release_and_rest)
            bench = await house.bench("s1")
            nursery.cancel_scope.cancel()
        assert house.registry.sessions["s1"] is bench.session
        bench.send("r2")
        await settle()
        assert bench.ends == ["lost", "completed"]


async def test_a_lost_turn_is_tried_again_if_its_agent_wants_it() -> None:
    """Three runs at most, each in one batch with the end of the one before: its inputs always have an owner."""
    store = ObedientStore()
    await crash_with(store, ("r1", "queue"), ("q1", "queue"))
    for attempt in (2, 3):
        agent = Script()
        async with open_house({"agent": Registered(agent, retry_lost=True)}, store=store) as house:
            bench = await house.bench("s1")
            await settle()
            assert [turn.attempt for turn in agent.turns] == [attempt]
            assert [item.content for item in agent.turn.inputs] == ["r1"]
            assert agent.turn.transcript[-1] == agent.turn.input
            assert [event.attempt for event in bench.reader.of(TurnStarted)] == list(range(1, attempt + 1))
            [batch] = [batch for batch in store.batches if isinstance(batch[-1], TurnStarted) and len(batch) > 1][-1:]
            assert [type(event) for event in batch] == [TurnEnded, TurnStarted]
    agent = Script()
    async with open_house({"agent": Registered(agent, retry_lost=True)}, store=store) as house:
        bench = await house.bench("s1")
        await settle()
        assert bench.ends == ["lost"] * 3
        assert [(turn.attempt, turn.input.content) for turn in agent.turns] == [(1, "q1")]
        await agent.finish()
        assert bench.ends[-1] == "completed"


async def test_an_attempt_that_succeeds_is_the_last() -> None:
    store = ObedientStore()
    await crash_with(store, ("r1", "collect"), ("q1", "queue"))
    for _ in range(2):
        async with open_house({"agent": Registered(echo, retry_lost=True)}, store=store) as house:
            bench = await house.bench("s1")
            await settle()
            assert bench.turns == [["r1"], ["r1"], ["q1"]]
            assert bench.ends == ["lost", "completed", "completed"]


async def test_what_was_steered_into_a_lost_turn_is_in_the_transcript_of_the_next_attempt() -> None:
    """It is done with, `withdrawn` as ``steered``, once and for all. The next attempt finds it among what was said."""
    store, agent = ObedientStore(), Script()
    async with open_house(agent, store=store) as house:
        bench = await house.bench("s1")
        bench.send("r1")
        await settle()
        bench.send("steer", on_busy="steer")
        await settle()

        async def take(turn: Turn) -> None:
            assert [item.request_id for item in turn.steered()] == ["steer"]

        await agent.do(take)
    agent = Script()
    async with open_house({"agent": Registered(agent, retry_lost=True)}, store=store) as house:
        bench = await house.bench("s1")
        await settle()
        assert (agent.turn.attempt, [item.request_id for item in agent.turn.inputs]) == (2, ["r1"])
        asked = [event.request_id for event in agent.turn.transcript if isinstance(event, Input)]
        assert asked == ["steer", "r1"]
        await agent.finish()
        check_history(bench.reader.events, finished=True)


async def test_a_lost_turn_that_was_being_interrupted_is_not_tried_again() -> None:
    store = ObedientStore()
    await crash_with_an_interrupt(store)
    agent = Script()
    async with open_house({"agent": Registered(agent, retry_lost=True)}, store=store) as house:
        bench = await house.bench("s1")
        await settle()
        assert bench.turns == [["r1"], ["i1"]]


async def test_more_waits_than_the_inbox_holds_now() -> None:
    store = ObedientStore()
    await crash_with(store, *[(f"r{i}", "queue") for i in range(10)])
    async with open_house(
        {"agent": Registered(echo, retry_lost=True)}, store=store, limits=Limits(max_inbox=2)
    ) as house:
        bench = await house.bench("s1")
        assert bench.session.credit == 0
        await settle()
        assert bench.turns == [["r0"], *([f"r{i}"] for i in range(10))]
        assert bench.session.credit == 2


async def test_the_unfinished_are_brought_back_without_anyone_asking(autojump_clock: Any) -> None:
    store = ObedientStore()
    agent = Script()
    async with open_house(agent, store=store) as house:
        for i in range(12):
            bench = await house.bench(f"s{i}")
            bench.send("r1")
            bench.send("r2")
        await settle()
    async with open_house(echo, store=store) as house:
        with trio.fail_after(10):
            await house.registry.resume_unfinished()
            await settle()
        for i in range(12):
            bench = await house.bench(f"s{i}")
            assert bench.ends == ["lost", "completed"]
        assert await store.unfinished() == []


async def test_resuming_waits_for_the_store_and_for_room_and_skips_what_is_beyond_help(autojump_clock: Any) -> None:
    store = ObedientStore()
    agent = Script()
    agents = {"agent": Registered(agent), "other": Registered(agent)}
    async with open_house(agents, store=store) as house:
        for i in range(6):
            bench = await house.bench(f"s{i}")
            bench.send("r1")
        bench = await house.bench("gone", agent_id="other")
        bench.send("r1")
        await settle()
    store.unavailable = True
    with capture_logs() as logs:
        async with open_house(echo, store=store, limits=Limits(max_sessions=2, idle_session_ms=10)) as house:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(house.registry.resume_unfinished)
                await trio.sleep(3)
                assert len(house.registry) <= 2
                store.unavailable = False
                await trio.sleep(20)
    assert await store.unfinished() == ["gone"]
    errors = [entry for entry in logs if entry["event"] == "session_not_resumed"]
    assert [entry["session_id"] for entry in errors] == ["gone"]


async def test_a_session_is_put_to_rest_only_when_it_is_at_rest(autojump_clock: Any) -> None:
    agent = Script()
    async with open_house(agent, limits=Limits(idle_session_ms=1000)) as house:
        bench = await house.bench("s1")
        registry = house.registry

        async def rests() -> bool:
            await trio.sleep(2)
            registry.rest_idle()
            return "s1" not in registry.sessions

        assert not await rests(), "someone is attached"
        bench.send("r1")
        bench.send("r2")
        await settle()
        bench.session.detach(bench.reader, 1006, "")
        assert not await rests(), "a turn runs"
        await agent.finish()
        assert not await rests(), "the next one runs"
        house.store.hold()
        await agent.finish()
        assert not await rests(), "its end is being stored"
        house.store.release()
        await settle()
        registry.rest_idle()
        assert "s1" in registry.sessions, "not for long enough"
        assert await rests()
        assert len(registry) == 0


async def test_what_is_on_its_way_to_the_store_keeps_a_session_awake(autojump_clock: Any) -> None:
    agent = Script()
    async with open_house(agent, limits=Limits(idle_session_ms=1000)) as house:
        bench = await house.bench("s1")
        bench.send("r1")
        await settle()
        house.store.hold()
        await agent.finish()
        bench.send("r2")
        bench.abort(request_id="r2")
        house.store.release()
        house.store.hold()  # the turn's end is stored, what came behind it is not
        await settle()
        bench.session.detach(bench.reader, 1006, "")
        assert not bench.session.busy
        await trio.sleep(2)
        house.registry.rest_idle()
        assert "s1" in house.registry.sessions
        house.store.release()
        await settle()
        house.registry.rest_idle()
        assert "s1" not in house.registry.sessions
        bench = await house.bench("s1")
        assert [event.type for event in bench.reader.events][-2:] == ["input", "withdrawn"]


async def test_a_rested_sessions_tasks_are_gone() -> None:
    async with trio.open_nursery() as outer:
        async with open_house(echo, limits=Limits(idle_session_ms=10)) as house:
            bench = await house.bench("s1")
            nursery = house.registry._nursery
            assert len(nursery.child_tasks) == 0, "who has only joined needs none"
            bench.send("r1")
            await settle()
            assert len(nursery.child_tasks) == 1
            bench.session.detach(bench.reader, 1000, "")
            bench.session.idle_since -= 1
            house.registry.rest_idle()
            await settle()
            assert len(nursery.child_tasks) == 0
        outer.cancel_scope.cancel()


async def test_a_session_that_rests_before_it_ran_ends_too() -> None:
    async with open_house(echo, limits=Limits(max_sessions=1)) as house:
        await house.join("s1")
        await house.join("s2")  # no room: s1, which has nothing to do, makes it
        assert list(house.registry.sessions) == ["s2"]
        bench = await house.bench("s2")
        with pytest.raises(HandshakeRefused) as refused:
            await house.join("s1")
        assert (refused.value.code, refused.value.retryable) == ("too_many_sessions", True)
        bench.session.detach(bench.reader, 1000, "left")
        assert (await house.join("s1"))[1]


async def test_max_sessions_holds_for_those_that_come_at_once() -> None:
    async with open_house(echo, limits=Limits(max_sessions=3)) as house:
        results: list[str] = []

        async def join(i: int) -> None:
            try:
                await house.bench(f"s{i}")
                results.append("joined")
            except HandshakeRefused:
                results.append("refused")

        original = house.store.create

        async def slow_create(*args: Any) -> None:
            await trio.lowlevel.checkpoint()
            await original(*args)

        house.store.create = slow_create  # type: ignore[method-assign, assignment]
        async with trio.open_nursery() as nursery:
            for i in range(10):
                nursery.start_soon(join, i)
        assert sorted(results) == ["joined"] * 3 + ["refused"] * 7
        assert len(house.registry) == 3


@pytest.mark.parametrize("seed", range(15))
async def test_any_number_of_rests_and_crashes_keeps_one_gapless_history(seed: int) -> None:
    """A client that follows through all of it sees every number once, in order, in one epoch."""
    chance = random.Random(seed)
    store = ObedientStore()
    limits = Limits(idle_session_ms=10, segment_bytes=256, max_inbox=50)
    cursor, epochs, seen, sent = 0, set(), [], 0

    async def agent(turn: Turn) -> str:
        for _ in range(chance.randrange(40)):
            await turn.send("text ")
        if chance.random() < 0.3:
            await trio.sleep_forever()  # dies with the process
        if chance.random() < 0.3:
            raise ValueError("oops")
        return ""

    sources = make_sources()
    with capture_logs():
        for _ in range(4):
            async with open_house(
                {"agent": Registered(agent, retry_lost=chance.random() < 0.5)},
                store=store,
                limits=limits,
                sources=sources,
            ) as house:
                for _ in range(chance.randrange(1, 5)):
                    bench = await house.bench("s1", cursor=cursor)
                    epochs.add(bench.session.record.epoch)
                    for _ in range(chance.randrange(4)):
                        bench.send(f"r{sent}", on_busy=chance.choice(["queue", "collect", "interrupt", "steer"]))
                        sent += 1
                        if chance.random() < 0.5:
                            await settle()
                    if chance.random() < 0.3:
                        bench.abort()
                    for _ in range(chance.randrange(30)):
                        await trio.lowlevel.checkpoint()
                    seen += bench.reader.events  # checks that nothing is missing and nothing comes twice
                    assert all(frame.code == "no_active_turn" for frame in bench.reader.got(Error))
                    cursor = bench.reader.cursor
                    bench.session.detach(bench.reader, 1006, "")
                    await settle()
                    bench.session.idle_since -= 1
                    house.registry.rest_idle()
        numbers = [event.seq for event in seen]
        assert numbers == sorted(set(numbers))
        assert len(epochs) == 1
        assert cursor <= store._sessions["s1"].reserved
        # In the end: every input exactly once, whatever happened.
        async with open_house(echo, store=store, limits=limits, sources=sources) as house:
            bench = await house.bench("s1")
            await settle()
            assert not bench.session.busy
            check_history(bench.reader.events, finished=True)
            stored = [event.request_id for event in bench.reader.of(Input)]
            taken = {x for event in bench.reader.of(TurnStarted) for x in event.request_ids}
            taken |= {event.request_id for event in bench.reader.of(Withdrawn)}
            assert taken == set(stored)
            assert len(stored) == len(set(stored))


async def test_partial_text_of_a_lost_turn_is_kept_as_far_as_it_was_stored() -> None:
    store = ObedientStore()

    async def agent(turn: Turn) -> None:
        await turn.output("stored. ")
        await turn.send("not stored")
        await trio.sleep_forever()

    await crash_with(store, ("r1", "queue"), agent=agent)
    async with open_house(echo, store=store) as house:
        bench = await house.bench("s1")
        assert [event.content for event in bench.reader.of(Output)] == ["stored. "]
