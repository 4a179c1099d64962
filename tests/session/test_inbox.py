"""The inbox is bounded: typed refusals, credit, and a long queue that drains at constant depth."""

from __future__ import annotations

import inspect

import pytest
import trio
from session_harness import ObedientStore, Script, open_bench, open_house, settle

from gateway.config import Limits
from gateway.protocol.messages import Aborted, Accepted, Credit, Error
from gateway.session import Turn


async def test_a_full_inbox_refuses_and_stores_nothing() -> None:
    agent = Script()
    async with open_bench(agent, limits=Limits(max_inbox=2)) as bench:
        bench.send("r1")
        await settle()
        bench.send("r2")
        bench.send("r3")
        bench.send("r4")  # counts what is still being stored
        appends = bench.store.appends
        assert bench.reader.frames[-1] == Error(
            code="inbox_full",
            message="2 inputs of 4 bytes are waiting",
            retryable=True,
            retry_after_ms=1000,
            request_id="r4",
            credit=0,
        )
        await settle()
        assert bench.store.appends == appends + 1
        assert bench.inputs == ["r1", "r2", "r3"]
        assert [frame.credit for frame in bench.reader.got(Accepted)] == [2, 0, 0]


async def test_the_bytes_of_an_inbox_are_bounded_too() -> None:
    """Those of what waits: text and metadata, in UTF-8; also of what is still being stored."""
    agent = Script()
    async with open_bench(agent, limits=Limits(max_inbox_bytes=2048)) as bench:
        bench.send("runs", "x" * 3000)
        await settle()
        bench.send("first", "é" * 500, metadata={"a": "b" * 492})  # 1,000 bytes and 500
        bench.send("second", "x" * 547)
        bench.send("third", "x" * 5000)  # a byte was left
        appends = bench.store.appends
        bench.send("fourth", "")
        assert bench.reader.frames[-1] == Error(
            code="inbox_full",
            message="3 inputs of 7,047 bytes are waiting",
            retryable=True,
            retry_after_ms=1000,
            request_id="fourth",
            credit=0,
        )
        await settle()
        assert bench.store.appends == appends + 1
        assert [frame.credit for frame in bench.reader.got(Accepted)] == [256, 0, 0, 0]
        bench.reader.take()
        bench.abort(request_id="first")
        await settle()
        assert not bench.reader.got(Credit), "there is still too much"
        bench.abort(request_id="third")
        await settle()
        assert bench.reader.got(Credit) == [Credit(credit=255)]
        bench.send("fourth", "")
        await settle()
        assert bench.session.credit == 254
        await agent.finish()
        await settle()
        assert bench.session.credit == 255, "a turn has one of them"
        bench.abort(scope="all")
        await settle()
        assert bench.session.credit == 256
    assert bench.inputs == ["runs", "first", "second", "third", "fourth"]


async def test_the_bytes_that_wait_are_known_after_a_restart() -> None:
    store = ObedientStore()
    limits = Limits(max_inbox_bytes=2048)
    for lost in (True, False):
        async with open_house(Script(), store=store, limits=limits) as house:
            bench = await house.bench("s1")
            if lost:
                bench.send("running")
                bench.send("next")
                bench.send("waits", "é" * 500, metadata={"a": "b" * 492})
                await settle()
            else:
                await settle()
                assert bench.turns[-1] == ["next"]
                bench.send("fits", "x" * 548)
                bench.send("too much", "")
                await settle()
                assert [frame.request_id for frame in bench.reader.got(Error)] == ["too much"]
                assert [(frame.request_id, frame.credit) for frame in bench.reader.got(Accepted)] == [("fits", 0)]


@pytest.mark.parametrize("limits", [Limits(max_inbox=2), Limits(max_inbox_bytes=1024)], ids=["count", "bytes"])
@pytest.mark.parametrize("how", ["turn", "withdrawn", "steered", "not stored"])
async def test_credit_is_told_once_when_room_appears(how: str, limits: Limits) -> None:
    agent = Script()
    half = "x" * 512
    async with open_bench(agent, limits=limits) as bench:
        happy = bench.attach("c2")
        bench.send("r1")
        await settle()
        bench.send("r2", half, on_busy="steer" if how == "steered" else "queue")
        await settle()
        if how == "not stored":
            bench.store.unavailable = True
        bench.send("r3", half, reader=happy)
        bench.send("r4", half)
        assert bench.reader.frames[-1].code == "inbox_full"  # type: ignore[attr-defined]
        bench.reader.take()
        if how == "turn":
            await settle()
            await agent.finish()
        elif how == "withdrawn":
            bench.abort(request_id="r2")
        elif how == "steered":

            async def take(turn: Turn) -> None:
                assert len(turn.steered()) == 1

            await agent.do(take)
        await settle()
        credit = 1 if limits.max_inbox == 2 else 255
        assert [frame for frame in bench.reader.take() if isinstance(frame, Credit)] == [Credit(credit=credit)]
        bench.abort(scope="queue")
        await settle()
        assert not [frame for frame in bench.reader.take() if isinstance(frame, Credit)], "once is enough"
        # `happy` was told of credit 0 only if its `accepted` said so.
        told = [frame.credit for frame in happy.got(Accepted)]
        assert len(happy.got(Credit)) == (1 if told == [0] else 0)


async def test_sending_and_withdrawing_while_the_store_is_slow_is_bounded() -> None:
    async with open_bench(Script(), limits=Limits(max_inbox=4)) as bench:
        bench.send("running")
        await settle()
        bench.reader.take()
        bench.store.hold()
        for i in range(100):
            bench.send(f"r{i}")
            bench.abort(scope="queue")
        await settle()
        codes = [frame.code for frame in bench.reader.got(Error)]
        assert codes == ["inbox_full"] * 96, "what is on its way to the store takes up room, withdrawn or not"
        assert bench.session.credit == 0
        assert bench.session.waiting == 0
        bench.store.release()
        await settle()
        assert [frame.credit for frame in bench.reader.got(Accepted)] == [1, 2, 3, 4]
        assert bench.session.credit == 4
        assert len(bench.reader.got(Aborted)) == 100
        assert bench.turns == [["running"]]


async def test_replies_that_wait_are_bounded() -> None:
    agent = Script()
    async with open_bench(agent, limits=Limits(max_control_frames=8)) as bench:
        bench.store.hold()
        for _ in range(50):
            bench.send("r1")
        assert [frame.code for frame in bench.reader.got(Error)] == ["rate_limited"] * 41
        bench.store.release()
        await settle()
        assert len(bench.reader.got(Accepted)) == 9
        bench.store.hold()
        for _ in range(50):
            bench.abort()
        assert [frame.code for frame in bench.reader.got(Error)] == ["rate_limited"] * 82
        bench.store.release()
        await settle()
        assert len(bench.reader.got(Aborted)) == 9
        assert bench.ends == ["aborted"]


async def test_a_thousand_inputs_drain_with_constant_stack_and_tasks() -> None:
    depths: list[int] = []
    tasks: list[int] = []
    ran: list[str] = []

    class Tasks(trio.abc.Instrument):
        alive = most = 0

        def task_spawned(self, task: trio.lowlevel.Task) -> None:
            self.alive += 1
            self.most = max(self.most, self.alive)

        def task_exited(self, task: trio.lowlevel.Task) -> None:
            self.alive -= 1

    count = Tasks()
    gate = trio.Event()

    async def agent(turn: Turn) -> None:
        await gate.wait()
        depths.append(len(inspect.stack(0)))
        assert bench.session._nursery is not None
        tasks.append(len(bench.session._nursery.child_tasks))
        ran.append(turn.input.content)
        await turn.send("x")

    async with open_bench(agent, limits=Limits(max_inbox=1000)) as bench:
        bench.send("first")
        await settle()
        for i in range(1000):
            bench.send(f"r{i}")
        bench.send("too many")
        await settle()
        assert bench.session.credit == 0
        assert bench.reader.got(Error)[-1].code == "inbox_full"
        trio.lowlevel.add_instrument(count)
        gate.set()
        await settle()
        trio.lowlevel.remove_instrument(count)
        assert ran == ["first", *(f"r{i}" for i in range(1000))]
        assert len(set(depths)) == 1
        assert set(tasks) == {2}  # the publisher and the agent; the loop is the nursery's own task
        assert count.most <= 1  # one agent at a time, beside those that were there before
        assert bench.session.credit == 1000
        assert bench.session.waiting == 0
