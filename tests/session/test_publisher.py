"""Numbers, storage, visibility: what is shown is stored, in order, also while the store is slow or cannot write."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from session_harness import ObedientStore, Script, echo, open_bench, open_house, settle
from structlog.testing import capture_logs

from gateway.config import Limits
from gateway.errors import HandshakeRefused, StoreFenced, StoreRefused, StoreUnusable, TurnClosed
from gateway.protocol.messages import Aborted, Accepted, Delta, Error, Input, Output, Progress, TurnEnded, Withdrawn
from gateway.session import Turn
from gateway.session.publisher import NUMBER_BLOCK

CHANNELS = ("answer", "reasoning")
"""Taking turns, so that no delta is merged into the one before it and each has a number of its own."""


async def test_accepted_only_after_it_is_stored() -> None:
    async with open_bench(echo) as bench:
        bench.store.hold()
        bench.send("r1")
        await settle()
        assert bench.reader.seen == []
        assert bench.session.log.head == 0
        assert bench.snapshot().queue == []
        bench.store.release()
        await settle()
        assert bench.reader.got(Accepted)[0].durable


async def test_what_the_store_promises_is_what_is_said() -> None:
    store = ObedientStore()
    store.durable = False
    async with open_bench(echo, store=store) as bench:
        bench.send("r1")
        await settle()
        assert not bench.reader.got(Accepted)[0].durable


async def test_a_volatile_event_never_overtakes_an_earlier_durable_one() -> None:
    async def agent(turn: Turn) -> None:
        await turn.send("before")
        await turn.tool_call("tool", call_id="c1")
        await turn.send("after")
        await trio.sleep_forever()

    async with open_bench(agent) as bench:
        bench.send("r1")
        while not bench.session.log.head >= 2:
            await trio.lowlevel.checkpoint()
        bench.store.hold()
        await settle()
        assert [event.text for event in bench.reader.of(Delta)] == ["before"], "at once; but what follows waits"
        bench.store.release()
        await settle()
        assert [event.type for event in bench.reader.events][-3:] == ["delta", "tool_call", "delta"]


async def test_deltas_flow_while_nothing_durable_waits() -> None:
    agent = Script()
    async with open_bench(agent) as bench:
        bench.send("r1")
        await settle()
        appends = bench.store.appends
        bench.store.hold()
        for i in range(100):
            await agent.say(str(i))
        assert "".join(event.text for event in bench.reader.of(Delta)) == "".join(map(str, range(100)))
        assert bench.store.appends == appends
        bench.store.release()


async def test_numbers_are_reserved_before_they_are_shown() -> None:
    """The readers of the harness check it at every wake; this makes a block run out many times."""

    async def agent(turn: Turn) -> None:
        for i in range(3 * NUMBER_BLOCK):
            await turn.send("x", CHANNELS[i % 2])
            if i % 500 == 0:
                await turn.progress("p", i)

    async with open_bench(agent, limits=Limits(max_outbox=8)) as bench:
        late = bench.attach("c2")
        bench.send("r1")
        await settle()
        numbers = [event.seq for event in late.events]
        assert numbers == sorted(set(numbers))
        assert bench.session.log.head > 3 * NUMBER_BLOCK


async def test_running_out_of_numbers_waits_for_the_store() -> None:
    agent = Script()

    async def many(turn: Turn) -> None:
        for i in range(2 * NUMBER_BLOCK):
            await turn.send("x", CHANNELS[i % 2])

    async with open_bench(agent, limits=Limits(max_outbox=8)) as bench:
        bench.send("r1")
        await settle()
        bench.store.hold()
        await agent.do(many)
        reserved = bench.store._sessions["s1"].reserved
        assert bench.session.log.head <= reserved
        assert bench.session.log.head > reserved - 20
        bench.store.release()
        await settle()
        await agent.finish()
        for channel in CHANNELS:
            assert bench.reader.text_of(agent.turn.turn_id, channel) == "x" * NUMBER_BLOCK


async def test_a_store_that_cannot_write_refuses_inputs() -> None:
    async with open_bench(echo) as bench:
        bench.store.unavailable = True
        with capture_logs() as logs:
            bench.send("r1")
            await settle()
            assert bench.reader.frames == [
                Error(
                    code="unavailable",
                    message="the message could not be stored; send it again",
                    retryable=True,
                    retry_after_ms=1000,
                    request_id="r1",
                )
            ]
            appends = bench.store.appends
            bench.send("r2")
            await settle()
        assert bench.reader.frames[-1].code == "unavailable"  # type: ignore[attr-defined]
        assert bench.store.appends == appends, "refused without asking the store again"
        assert [entry["event"] for entry in logs] == ["store_unavailable"]
        assert bench.session.log.head == 0
        assert bench.session.credit == 256


async def test_an_idle_session_finds_out_that_the_store_is_back(autojump_clock: Any) -> None:
    async with open_bench(echo) as bench:
        bench.store.unavailable = True
        with capture_logs() as logs:
            for _ in range(8):
                bench.send("r1")
                await trio.sleep(1.1)
            bench.store.unavailable = False
            bench.send("r1")
            await settle()
        assert [frame.code for frame in bench.reader.got(Error)] == ["unavailable"] * 8
        assert bench.turns == [["r1"]]
        assert bench.ends == ["completed"]
        assert [entry["event"] for entry in logs] == ["store_unavailable", "store_available_again"]


async def test_new_messages_are_refused_while_a_batch_is_tried_again(autojump_clock: Any) -> None:
    """Also during the try itself, when the pause before it is over."""
    go = trio.Event()

    async def agent(turn: Turn) -> None:
        await go.wait()
        await turn.output("said")

    async with open_bench(agent) as bench:
        bench.send("r1")
        await settle()
        bench.store.unavailable = True
        with capture_logs():
            go.set()
            await settle()
            bench.store.hold()
            await trio.sleep(2)
            bench.send("r2")
            assert [frame.code for frame in bench.reader.got(Error)] == ["unavailable"]
            bench.store.unavailable = False
            bench.store.release()
            await settle()
        assert bench.ends == ["completed"]


async def test_a_running_turns_events_are_tried_again_in_order(autojump_clock: Any) -> None:
    async def agent(turn: Turn) -> None:
        for i in range(50):
            await turn.send(f"d{i} ")
            if i % 10 == 0:
                await turn.tool_call("tool", i, call_id=f"c{i}")
            await trio.sleep(0.02)

    async with open_bench(agent) as bench:
        bench.send("r0")
        await settle()
        for outage in range(3):
            await trio.sleep(0.1)
            bench.store.unavailable = True
            bench.send(f"lost{outage}")
            await trio.sleep(2)
            bench.store.unavailable = False
            await trio.sleep(1.1)
        await trio.sleep(3)
        assert bench.ends == ["completed"]
        [end] = bench.reader.of(TurnEnded)
        assert bench.reader.text_of(end.turn_id) == "".join(f"d{i} " for i in range(50))
        calls = [event for event in bench.reader.events if event.type == "tool_call"]
        assert [call.call_id for call in calls] == [f"c{i}" for i in range(0, 50, 10)]  # type: ignore[attr-defined]
        stored = [event.seq for batch in bench.store.batches for event in batch]
        assert stored == sorted(set(stored))
        assert bench.inputs == ["r0"]
        assert {frame.code for frame in bench.reader.got(Error)} == {"unavailable"}


async def test_a_refused_input_in_a_batch_with_others(autojump_clock: Any) -> None:
    agent = Script()
    async with open_bench(agent) as bench:
        bench.send("r1")
        await settle()
        bench.store.unavailable = True
        await agent.say("partial")
        bench.send("r2")
        bench.abort()
        bench.send("r3")
        await trio.sleep(3)
        assert bench.ends == []
        assert not bench.reader.got(Aborted), "promised only when it is stored"
        assert sorted(frame.request_id or "" for frame in bench.reader.got(Error)) == ["r2", "r3"]
        bench.store.unavailable = False
        await trio.sleep(2)
        assert bench.ends == ["aborted"]
        assert len(bench.reader.got(Aborted)) == 1
        assert bench.inputs == ["r1"]
        bench.send("r2")
        await settle()
        assert bench.turns == [["r1"], ["r2"]]


@pytest.mark.parametrize("when", ["same batch", "next batch"])
async def test_withdrawing_an_input_that_could_not_be_stored(when: str, autojump_clock: Any) -> None:
    agent = Script()
    async with open_bench(agent) as bench:
        bench.send("r1")
        await settle()
        bench.send("r2")
        await settle()
        bench.store.unavailable = True
        if when == "next batch":
            bench.store.hold()
        bench.send("r3")
        if when == "next batch":
            await settle()
        bench.abort(scope="queue")
        if when == "next batch":
            bench.store.release()
        await settle()
        assert [frame.code for frame in bench.reader.got(Error)] == ["unavailable"]
        assert not bench.reader.got(Aborted), "r2 is not withdrawn in the log yet"
        bench.store.unavailable = False
        await trio.sleep(1)
        assert [event.request_id for event in bench.reader.of(Withdrawn)] == ["r2"]
        assert bench.reader.got(Aborted) == [Aborted(turn_id=None, withdrawn=["r2", "r3"])]
        bench.send("r3")
        await settle()
        await agent.finish()
        await agent.finish()
        assert bench.turns == [["r1"], ["r3"]]


async def test_every_sender_of_a_refused_input_hears_of_it() -> None:
    async with open_bench(echo, limits=Limits(max_inbox=2)) as bench:
        other = bench.attach("c2")
        bench.store.unavailable = True
        bench.store.hold()
        bench.send("r1")
        bench.send("r1", reader=other)
        bench.send("r2")
        await settle()
        bench.store.release()
        await settle()
        assert [frame.request_id for frame in bench.reader.got(Error)] == ["r1", "r2"]
        assert [frame.request_id for frame in other.got(Error)] == ["r1"]
        assert bench.session.waiting == 0


@pytest.mark.parametrize("error", [StoreRefused("no"), StoreFenced("other"), StoreUnusable("damaged"), OSError("x")])
@pytest.mark.parametrize("shield", [False, True])
async def test_any_other_error_of_the_store_ends_the_session_at_once(error: Exception, shield: bool) -> None:
    gate = trio.Event()
    told: list[BaseException] = []

    async def agent(turn: Turn) -> None:
        with trio.CancelScope(shield=shield):
            try:
                while not gate.is_set():
                    await turn.send("x")
                    await trio.lowlevel.checkpoint()
            except TurnClosed as exc:
                told.append(exc)
                raise

    with capture_logs() as logs:
        async with open_house(agent) as house:
            bench = await house.bench("s1")
            bench.send("r1")
            while not bench.reader.of(Delta):
                await trio.lowlevel.checkpoint()
            house.store.error = error
            bench.send("r2")
            for _ in range(100):
                await trio.lowlevel.checkpoint()
            assert bench.reader.closed
            assert bench.session.failed
            assert bench.session.turn is None
            assert "s1" not in house.registry.sessions
            assert len(told) == shield, "it cannot write any more, and is told so"
            head = bench.session.log.head
            # It comes back from the store, as another object; numbers go on above all that were shown.
            house.store.error = None
            again = await house.bench("s1", name="c2")
            assert again.session is not bench.session
            assert again.session.record == bench.session.record
            again.send("r3", on_busy="interrupt")
            for _ in range(100):
                await trio.lowlevel.checkpoint()
            assert again.ends[0] == "lost"
            assert min(event.seq for event in again.reader.of(TurnEnded)) > head
            assert again.turns[:2] == [["r1"], ["r3"]]
            gate.set()
    assert "session_failed" in [entry["event"] for entry in logs]


async def test_a_writer_that_waits_for_room_is_told_when_its_session_fails() -> None:
    told: list[BaseException] = []

    async def agent(turn: Turn) -> None:
        with trio.CancelScope(shield=True):
            try:
                while True:
                    await turn.send("x")
            except TurnClosed as exc:
                told.append(exc)

    with capture_logs():
        async with open_house(agent, limits=Limits(max_outbox=1)) as house:
            bench = await house.bench("s1")
            bench.send("r1")
            while not bench.reader.of(Delta):
                await trio.lowlevel.checkpoint()
            house.store.hold()
            bench.send("r2")
            await settle()
            house.store.error = StoreRefused("no")
            house.store.release()
            await settle()
            assert len(told) == 1


async def test_a_failure_during_recovery_does_not_leave_anyone_waiting() -> None:
    store = ObedientStore()
    agent = Script()
    async with open_house(agent, store=store) as house:
        bench = await house.bench("s1")
        bench.send("r1")
        await settle()
    store.error = StoreRefused("no")
    with capture_logs():
        async with open_house(agent, store=store) as house:
            with pytest.raises(HandshakeRefused) as refused, trio.fail_after(1):
                await house.join("s1")
            assert (refused.value.code, refused.value.retryable) == ("unavailable", True)
            store.error = None
            bench = await house.bench("s1")
            assert bench.ends == ["lost"]


async def test_progress_is_kept_by_key_until_the_turn_ends() -> None:
    agent = Script()
    async with open_bench(agent) as bench:
        bench.send("r1")
        await settle()
        for i in range(3):
            await agent.do(lambda turn, i=i: turn.progress("a", i))  # type: ignore[misc]
            await agent.do(lambda turn, i=i: turn.progress("b", {"i": i}))  # type: ignore[misc]
        running = bench.snapshot().turn
        assert running is not None
        assert running.progress == {"a": 2, "b": {"i": 2}}
        late = bench.attach("c2", cursor=0)
        assert [(event.key, event.data) for event in late.of(Progress)] == [("a", 2), ("b", {"i": 2})]
        await agent.finish("x")
        last = bench.attach("c3", cursor=0)
        assert [event.type for event in last.events] == ["input", "turn_started", "output", "turn_ended"]


async def test_snapshot_and_stream_meet_at_every_position() -> None:
    """A snapshot's state and position are of one step: going on from it leads where the whole stream leads."""
    agent = Script()
    async with open_bench(agent, limits=Limits(segment_bytes=256)) as bench:
        bench.send("r1")
        await settle()
        for i in range(40):
            await agent.say(f"{i:03}-" * 5)
            snapshot = bench.snapshot()
            assert snapshot.cursor == bench.session.log.head
            running = snapshot.turn
            assert running is not None
            tail = running.channels.get("answer", "")
            done = "".join(
                event.content
                for event in snapshot.transcript
                if isinstance(event, Output) and event.channel == "answer"
            )
            assert done + tail == bench.reader.text_of(running.turn_id) == "".join(f"{j:03}-" * 5 for j in range(i + 1))


async def test_replay_limit_counts_what_lasts_and_not_the_tokens() -> None:
    agent = Script()

    async def long(turn: Turn) -> None:
        for i in range(3000):
            await turn.send(f"token{i} ")

    async with open_bench(agent, limits=Limits(replay_max_events=40)) as bench:
        bench.send("r1")
        await settle()
        early = bench.attach("c2", cursor=0)
        early.read()
        resume_at = early.cursor
        bench.session.detach(early, 1006, "")
        await agent.do(long)
        await agent.finish()
        assert bench.session.log.floor == 0
        again = bench.attach("c3", cursor=resume_at)
        assert again.text_of(agent.turn.turn_id) == "".join(f"token{i} " for i in range(3000))
        assert bench.reader.of(Input)
