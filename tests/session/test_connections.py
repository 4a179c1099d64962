"""Connections of a session: attach, detach, take-over, presence, signals; who may join; sessions side by side."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from session_harness import Reader, Script, echo, join, open_bench, open_house, settle

from gateway.config import Limits
from gateway.errors import HandshakeRefused
from gateway.protocol.messages import (
    Aborted,
    Accepted,
    ClientSignal,
    Delta,
    Error,
    Hello,
    Input,
    LastDisconnect,
    Presence,
    Signal,
    TurnEnded,
)
from gateway.session import Registered, Turn

# detaching is not cancelling


async def test_a_turn_goes_on_with_nobody_attached(autojump_clock: Any) -> None:
    agent = Script()
    async with open_bench(agent) as bench:
        bench.send("r1")
        bench.send("r2")
        await settle()
        bench.session.detach(bench.reader, 1006, "")
        await trio.sleep(500)
        await agent.say("said to nobody")
        await agent.finish()
        await agent.finish()
        late = bench.attach("c2", cursor=0)
        assert [event.outcome for event in late.of(TurnEnded)] == ["completed", "completed"]
        assert late.text_of(agent.turns[0].turn_id) == "said to nobody"


async def test_max_detached_ms_ends_a_turn_that_nobody_watches(autojump_clock: Any) -> None:
    agent = Script()
    async with open_bench(agent, max_detached_ms=2000) as bench:
        bench.send("r1")
        await settle()
        await agent.say("half")
        await trio.sleep(10)
        assert bench.ends == [], "someone is attached"
        bench.session.detach(bench.reader, 1006, "")
        await trio.sleep(1.9)
        assert bench.session.turn is not None
        await trio.sleep(0.2)
        late = bench.attach("c2", cursor=0)
        [end] = late.of(TurnEnded)
        assert end.error is not None
        assert (end.outcome, end.error.code, end.error.retryable) == ("aborted", "detached", True)
        assert late.text_of(end.turn_id) == "half"


async def test_attaching_again_in_time_resets_the_limit(autojump_clock: Any) -> None:
    agent = Script()
    async with open_bench(agent, max_detached_ms=2000, limits=Limits(max_turn_ms=20_000)) as bench:
        bench.send("r1")
        await settle()
        reader = bench.reader
        for i in range(4):
            bench.session.detach(reader, 1006, "")
            await trio.sleep(1.5)
            reader = bench.attach(f"again{i}")
            await trio.sleep(2.5)
            assert bench.session.turn is not None
        await trio.sleep(3.9)
        assert bench.session.turn is not None
        await trio.sleep(0.2)
        assert bench.ends == ["timed_out"], "the limit of the turn itself was not moved"


async def test_one_of_two_connections_may_go(autojump_clock: Any) -> None:
    agent = Script()
    async with open_bench(agent, max_detached_ms=1000) as bench:
        bench.attach("c2")
        bench.send("r1")
        await settle()
        bench.session.detach(bench.reader, 1006, "")
        await trio.sleep(100)
        assert bench.session.turn is not None


async def test_a_turn_that_starts_with_nobody_attached_is_limited_too(autojump_clock: Any) -> None:
    agent = Script()
    async with open_bench(agent, max_detached_ms=1000) as bench:
        bench.send("r1")
        bench.session.detach(bench.reader, 1006, "")
        await trio.sleep(0.9)
        assert bench.session.turn is not None
        await trio.sleep(0.2)
        assert not bench.session.busy


# several connections


async def test_a_second_connection_takes_over_and_the_firsts_end_touches_nothing() -> None:
    agent = Script()
    async with open_bench(agent) as bench:
        bench.send("r1")
        await settle()
        await agent.say("one ")
        bench.reader.read()
        successor = bench.attach("c2", cursor=bench.reader.cursor)
        await agent.say("two ")
        bench.session.detach(bench.reader, 4408, "heartbeat_timeout")
        bench.session.detach(bench.reader, 4408, "heartbeat_timeout")
        await agent.say("three")
        successor.read()
        assert "".join(event.text for event in successor.of(Delta)) == "two three"
        bench.send("r2", reader=successor)
        bench.abort(successor)
        await settle()
        assert len(successor.got(Aborted)) == 1
        assert list(bench.session.readers) == ["c2"]
        assert bench.session.last_disconnect["alice"].code == 4408


async def test_replies_go_to_the_connection_that_asked() -> None:
    async with open_bench(echo) as bench:
        other = bench.attach("c2")
        bench.send("r1", reader=other)
        await settle()
        assert not bench.reader.frames
        assert len(other.got(Accepted)) == 1
        assert bench.inputs == ["r1"], "the event is everyone's"


async def test_presence() -> None:
    async with open_bench(echo) as bench:
        bob = bench.attach("c2", "bob")
        assert bench.reader.got(Presence) == [Presence(event="joined", connection_id="c2", subject="bob")]
        assert not bob.got(Presence), "its hello_ok lists everyone, itself included"
        bench.session.detach(bob, 1000, "left")
        assert bench.reader.got(Presence)[1:] == [Presence(event="left", connection_id="c2", subject="bob")]
        assert list(bench.session.readers) == ["c1"]


async def test_signals_go_to_the_others() -> None:
    async with open_bench(echo) as bench:
        bob = bench.attach("c2", "bob")
        carol = bench.attach("c3", "carol")
        bench.session.signal(ClientSignal(name="typing", data={"on": True}), bob)
        expected = Signal(name="typing", data={"on": True}, from_=bob.member)
        assert bench.reader.got(Signal) == carol.got(Signal) == [expected]
        assert not bob.got(Signal)
        assert bench.session.log.head == 0


async def test_how_the_previous_connection_ended_is_remembered_per_subject(autojump_clock: Any) -> None:
    async with open_bench(echo) as bench:
        await trio.sleep(1)
        now = bench.session.sources.now_ms()
        bench.session.detach(bench.reader, 1013, "slow_consumer")
        assert bench.session.last_disconnect == {"alice": LastDisconnect(code=1013, reason="slow_consumer", at=now)}
        for i in range(40):
            reader = bench.attach(f"c{i}", f"subject{i}")
            bench.session.detach(reader, 1000, "left")
        assert len(bench.session.last_disconnect) == 16
        assert "subject39" in bench.session.last_disconnect


async def test_a_client_that_saw_nothing_resumes_at_zero() -> None:
    async with open_house(echo) as house:
        bench = await house.bench("s1", cursor=0)
        bench.session.detach(bench.reader, 1006, "")
        bench = await house.bench("s1", name="c2", cursor=0)
        assert bench.session.log.floor == 0
        bench.send("r1")
        await settle()
        assert bench.reader.events[0].first == 1
        assert bench.ends == ["completed"]


# joining


async def test_two_who_ask_at_once_get_one_session() -> None:
    async with open_house(echo) as house:
        bench = await house.bench("s1")
        bench.send("r1")
        await settle()
        bench.session.detach(bench.reader, 1006, "")
        bench.session.idle_since -= 1e6
        house.registry.rest_idle()
        assert len(house.registry) == 0
        loads = 0
        load = house.store.load

        async def slow_load(*args: Any, **options: Any) -> Any:
            nonlocal loads
            loads += 1
            await settle()
            return await load(*args, **options)

        house.store.load = slow_load  # type: ignore[method-assign]
        found: list[tuple[Any, bool]] = []

        async def ask(session_id: str) -> None:
            found.append(await house.join(session_id))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(ask, "s1")
        assert loads == 1
        assert len({id(session) for session, _ in found}) == 1
        assert all(existed for _, existed in found)
        found.clear()
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(ask, "new")
        assert len({id(session) for session, _ in found}) == 1
        assert sorted(existed for _, existed in found) == [False, True, True, True, True]


async def test_one_who_gives_up_leaves_the_way_free() -> None:
    async with open_house(echo) as house:
        gate = trio.Event()
        load = house.store.load

        async def slow_load(*args: Any, **options: Any) -> Any:
            await gate.wait()
            return await load(*args, **options)

        house.store.load = slow_load  # type: ignore[method-assign]
        found: list[bool] = []

        async def ask() -> None:
            found.append((await house.join("s1"))[1])

        async with trio.open_nursery() as nursery:
            with trio.move_on_after(0.01) as impatient:
                nursery.start_soon(ask)
                await house.join("s1")
            assert impatient.cancelled_caught
            gate.set()
        assert found == [False]


async def test_a_session_is_its_subjects() -> None:
    async with open_house(echo) as house:
        await house.bench("s1", subject="alice")
        for session_id in ("s1",):
            with pytest.raises(HandshakeRefused) as refused:
                await house.join(session_id, subject="mallory")
            assert (refused.value.code, refused.value.close_code, refused.value.retryable) == ("forbidden", 4403, False)
        assert len(house.registry.sessions["s1"].readers) == 1
        # Also when it has to be brought back first.
        session = house.registry.sessions["s1"]
        session.readers.clear()
        session.idle_since -= 1e6
        house.registry.rest_idle()
        with pytest.raises(HandshakeRefused):
            await house.join("s1", subject="mallory")


async def test_a_grant_opens_it() -> None:
    async with open_house(
        echo, may_share=lambda subject, record: (subject, record.session_id) == ("bob", "s1")
    ) as house:
        await house.join("s1", subject="alice")
        await house.join("s2", subject="alice")
        assert (await house.join("s1", subject="bob"))[1]
        for session_id, subject in (("s2", "bob"), ("s1", "carol")):
            with pytest.raises(HandshakeRefused):
                await house.join(session_id, subject=subject)


async def test_unknown_agents_and_other_agents() -> None:
    agents = {"a": Registered(echo), "b": Registered(echo)}
    async with open_house(agents) as house:
        await house.join("s1", agent_id="a")
        with pytest.raises(HandshakeRefused) as refused:
            await house.join("s1", agent_id="b")
        assert refused.value.code == "forbidden"
        with pytest.raises(HandshakeRefused) as refused:
            await house.join("s1", agent_id="nobody")
        assert (refused.value.code, refused.value.close_code) == ("agent_not_found", 4404)
        assert "a, b" in refused.value.next_step


async def test_without_an_id_everyone_gets_a_session_of_their_own() -> None:
    async with open_house(echo) as house:
        ids = {(await house.join())[0].record.session_id for _ in range(20)}
        assert len(ids) == 20
        epochs = {session.record.epoch for session in house.registry.sessions.values()}
        assert len(epochs) == 20


async def test_the_store_is_away_when_someone_joins() -> None:
    async with open_house(echo) as house:

        async def away(*args: Any, **options: Any) -> Any:
            from gateway.errors import StoreUnavailable

            raise StoreUnavailable("gone")

        load, house.store.load = house.store.load, away  # type: ignore[method-assign]
        with pytest.raises(HandshakeRefused) as refused:
            await house.join("s1")
        assert (refused.value.code, refused.value.retryable, refused.value.close_code) == ("unavailable", True, 1011)
        house.store.load = load  # type: ignore[method-assign]
        assert not (await house.join("s1"))[1]


# drain


async def test_draining_takes_nothing_new_and_lets_the_turn_finish() -> None:
    agent = Script()
    async with open_house(agent) as house:
        bench = await house.bench("s1")
        bench.send("r1")
        bench.send("r2")
        await settle()
        house.registry.begin_drain()
        bench.send("r3")
        bench.send("r2")
        assert [getattr(frame, "code", type(frame)) for frame in bench.reader.take()][-2:] == ["draining", Accepted]
        await agent.finish("done")
        await settle()
        assert bench.ends == ["completed"]
        assert bench.session.turn is None
        assert bench.session.waiting == 1, "it stays, for after the restart"
        assert await house.store.unfinished() == ["s1"]
        bench.abort(scope="queue")
        await settle()
        assert bench.reader.got(Aborted)[-1].withdrawn == ["r2"]
        with pytest.raises(HandshakeRefused) as refused:
            await house.join("another")
        assert refused.value.code == "draining"


async def test_draining_ends_a_turn_in_time(autojump_clock: Any) -> None:
    agent = Script()
    async with open_house(agent) as house:
        bench = await house.bench("s1")
        bench.send("r1")
        await settle()
        await agent.say("half")
        house.registry.begin_drain()
        with trio.fail_after(3):
            await bench.session.finish_turn(2)
        assert bench.ends == ["interrupted"]
        assert bench.reader.text_of(agent.turn.turn_id) == "half"


# side by side


async def test_fifty_sessions_stream_at_once_and_none_sees_another() -> None:
    async def agent(turn: Turn) -> None:
        for i in range(40):
            await turn.send(f"{turn.session_id}:{i} ")
            if i % 8 == 0:
                await turn.update_state({"mine": turn.session_id})
                await turn.custom("event", turn.session_id)
                await trio.lowlevel.checkpoint()

    async with open_house(agent, limits=Limits(max_outbox=16, segment_bytes=256)) as house:
        benches = [await house.bench(f"s{i}", name=f"c{i}", subject=f"u{i}") for i in range(50)]
        for number in range(3):
            for bench in benches:
                bench.send(f"r{number}", f"for {bench.session.record.session_id}")
        await settle()
        for bench in benches:
            own = bench.session.record.session_id
            ends = bench.reader.of(TurnEnded)
            assert [event.outcome for event in ends] == ["completed"] * 3
            for end in ends:
                assert bench.reader.text_of(end.turn_id) == "".join(f"{own}:{i} " for i in range(40))
            assert {event.content for event in bench.reader.of(Input)} == {f"for {own}"}
            assert {event.data for event in bench.reader.events if event.type == "custom"} == {own}  # type: ignore[attr-defined]
            assert bench.session.view.state == {"mine": own}
            assert len(bench.reader.got(Accepted)) == 3
            assert not bench.reader.got(Error)


async def test_one_sessions_trouble_is_not_the_others(autojump_clock: Any) -> None:
    async def agent(turn: Turn) -> str:
        if turn.session_id == "bad":
            with trio.CancelScope(shield=True):
                await gate.wait()
        return "fine"

    gate = trio.Event()
    async with open_house(agent) as house:
        bad = await house.bench("bad")
        good = await house.bench("good", name="c2")
        bad.send("r1")
        await settle()
        bad.abort()
        good.send("r1")
        await settle()
        assert good.ends == ["completed"]
        gate.set()


async def test_the_first_join_of_a_hello_with_everything_default() -> None:
    async with open_house(echo) as house:
        session, existed = await house.registry.join(Hello(protocol_min=1, protocol_max=2, agent_id="agent"), "alice")
        assert not existed
        reader = Reader("c9")
        session.publisher_bound_is_broken = lambda: False  # type: ignore[attr-defined]
        join(session, reader)
        assert session.credit == 256
