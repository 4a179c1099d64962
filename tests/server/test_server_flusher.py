"""Who is visited when: the flusher's two rounds, and what is published at once."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import pytest
import trio
import trio.testing

from gateway.protocol.log import Chunk
from gateway.server.flusher import GAP_MOST, HERE, SLICE, SLICE_ALONE, SOON, Flusher

BUSY = 2 * GAP_MOST
"""Seconds that a visit takes in these tests, so that there is a gap after the pass."""


class One:
    """A publisher or a connection that notes its visits."""

    def __init__(self, name: str, visits: list[str], does: Callable[[], None] = lambda: None) -> None:
        self.name = name
        self.dirty = 0
        self.visited_at = -1000.0
        self._visits = visits
        self.does = does

    def flush(self) -> None:
        self._visits.append(self.name)
        self.does()

    def crashed(self, exc: Exception) -> None:
        self._visits.append(f"{self.name} crashed")


class Stage:
    """A flusher whose timer only moves when a visit says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.visits: list[str] = []
        self.flusher = Flusher(timer=lambda: self.now)

    def one(self, name: str, does: Callable[[], None] = lambda: None) -> One:
        return One(name, self.visits, does)

    def take(self, seconds: float) -> None:
        self.now += seconds

    def seen(self) -> list[str]:
        seen, self.visits[:] = list(self.visits), []
        return seen


@pytest.fixture
def stage() -> Stage:
    return Stage()


async def settle() -> None:
    await trio.testing.wait_all_tasks_blocked()


async def test_what_is_published_is_visited_once(stage: Stage, nursery: Any) -> None:
    publisher = stage.one("publisher")
    stage.flusher.mark_publisher(publisher, urgent=True)
    stage.flusher.publish(publisher)
    assert stage.seen() == ["publisher"]
    nursery.start_soon(stage.flusher.run)
    await settle()
    assert stage.seen() == []


async def test_what_is_marked_again_after_it_was_published_is_visited_again(stage: Stage, nursery: Any) -> None:
    publisher = stage.one("publisher")
    stage.flusher.mark_publisher(publisher, urgent=True)
    stage.flusher.publish(publisher)
    stage.flusher.mark_publisher(publisher, urgent=True)
    assert stage.seen() == ["publisher"]
    nursery.start_soon(stage.flusher.run)
    await settle()
    assert stage.seen() == ["publisher"]
    assert publisher.dirty == 0


async def test_what_it_shows_is_written_in_the_middle_of_a_gap(
    stage: Stage, nursery: Any, mock_clock: trio.testing.MockClock
) -> None:
    def stream() -> None:
        stage.take(BUSY)
        stage.flusher.frames(Chunk([b"x"], 1, 1))

    reader = stage.one("reader")
    publisher = stage.one("publisher", lambda: stage.flusher.mark(reader))
    for n in range(2):
        stage.flusher.mark(stage.one(f"streaming{n}", stream))
    nursery.start_soon(stage.flusher.run)
    await settle()
    assert stage.seen() == ["streaming0", "streaming1"]
    stage.flusher.mark(stage.one("other"))
    stage.flusher.publish(publisher)
    await settle()
    assert stage.seen() == ["publisher", "reader"], "the clock stands still: the gap is not over"
    mock_clock.jump(GAP_MOST)
    await settle()
    assert stage.seen() == ["other"]


async def test_publishing_in_the_middle_of_an_urgent_round_leaves_it_urgent(stage: Stage, nursery: Any) -> None:
    reader = stage.one("reader")
    inner = stage.one("inner")

    def outer_does() -> None:
        stage.flusher.publish(inner)
        stage.flusher.mark(reader)
        assert reader.dirty == HERE

    outer = stage.one("outer", outer_does)
    stage.flusher.mark_publisher(outer, urgent=True)
    nursery.start_soon(stage.flusher.run)
    await settle()
    assert stage.seen() == ["outer", "inner", "reader"]


@pytest.mark.parametrize("others_take", [0.0, SLICE])
async def test_a_pass_stops_more_often_while_others_have_work(stage: Stage, nursery: Any, others_take: float) -> None:
    most = SLICE if others_take else SLICE_ALONE
    steps: list[int] = []

    class Others(trio.abc.Instrument):
        """Take their time once in each pass of the scheduler, and count what one step of the flusher visits."""

        def before_io_wait(self, timeout: float) -> None:
            stage.take(others_take)

        def after_task_step(self, task: trio.lowlevel.Task) -> None:
            if visited := len(stage.seen()):
                steps.append(visited)

    for n in range(30):
        stage.flusher.mark(stage.one(f"reader{n}", lambda: stage.take(SLICE / 2)))
    others = Others()
    trio.lowlevel.add_instrument(others)
    nursery.start_soon(stage.flusher.run)
    await settle()
    trio.lowlevel.remove_instrument(others)
    assert sum(steps) == 30
    assert steps[0] == 2, "it does not know yet whether others have work"
    assert steps[1] == pytest.approx(most / (SLICE / 2), abs=1)


async def test_a_long_pass_stops_for_what_is_urgent(stage: Stage, nursery: Any) -> None:
    urgent = stage.one("urgent")

    def slow() -> None:
        stage.take(2 * SLICE)
        if not urgent.dirty and "urgent" not in stage.visits:
            stage.flusher.mark(urgent, urgent=True)

    for n in range(3):
        stage.flusher.mark(stage.one(f"slow{n}", slow))
    nursery.start_soon(stage.flusher.run)
    await settle()
    assert stage.seen() == ["slow0", "urgent", "slow1", "slow2"]


async def test_one_that_fails_is_told_and_the_others_are_served(stage: Stage, nursery: Any) -> None:
    def fail() -> None:
        raise RuntimeError("boom")

    stage.flusher.mark(stage.one("bad", fail))
    stage.flusher.mark(stage.one("good"))
    stage.flusher.publish(stage.one("worse", fail))
    nursery.start_soon(stage.flusher.run)
    await settle()
    assert stage.seen() == ["worse", "worse crashed", "bad", "bad crashed", "good"]
    assert stage.flusher._when is SOON


async def test_what_is_delivered_is_written_in_the_same_step_and_wakes_nobody(stage: Stage, nursery: Any) -> None:
    reader, waiting = stage.one("reader"), stage.one("waiting")
    publisher = stage.one("publisher", lambda: stage.flusher.mark(reader))
    nursery.start_soon(stage.flusher.run)
    await settle()
    stage.flusher.deliver(publisher)
    assert stage.seen() == ["publisher", "reader"]
    assert not stage.flusher._now
    assert len(stage.flusher._work) == 1, "the flusher was not woken: there is nothing left for it"
    stage.flusher.mark(waiting, urgent=True)
    stage.flusher.deliver(publisher)
    assert stage.seen() == ["publisher", "reader"], "others are the flusher's"
    await settle()
    assert stage.seen() == ["waiting"]


async def test_who_waited_already_is_written_to_at_once_and_only_once(stage: Stage, nursery: Any) -> None:
    soon, now = stage.one("soon"), stage.one("now")

    def show() -> None:
        for reader in (soon, now, soon):
            stage.flusher.mark(reader)

    stage.flusher.mark(soon)
    stage.flusher.mark(now, urgent=True)
    stage.flusher.deliver(stage.one("publisher", show))
    assert stage.seen() == ["publisher", "soon", "now"]
    nursery.start_soon(stage.flusher.run)
    await settle()
    assert stage.seen() == []


async def test_a_reader_that_has_more_to_write_is_visited_again(stage: Stage, nursery: Any) -> None:
    def more() -> None:
        if stage.visits.count("reader") < 3:
            stage.flusher.mark(reader)

    reader = stage.one("reader", more)
    nursery.start_soon(stage.flusher.run)
    await settle()
    stage.flusher.deliver(stage.one("publisher", lambda: stage.flusher.mark(reader)))
    assert stage.seen() == ["publisher", "reader"]
    stage.visits.append("reader")
    await settle()
    assert stage.seen() == ["reader"] * 3


async def test_who_delivers_does_not_lend_its_context_variables(stage: Stage) -> None:
    mine: ContextVar[str] = ContextVar("mine", default="nobody's")
    seen: list[str] = []
    reader = stage.one("reader", lambda: seen.append(mine.get()))
    mine.set("the agent's")
    stage.flusher.deliver(stage.one("publisher", lambda: stage.flusher.mark(reader)))
    assert seen == ["nobody's"]


async def test_one_that_cannot_be_delivered_to_does_not_keep_the_others_from_it(stage: Stage) -> None:
    def fail() -> None:
        raise RuntimeError("boom")

    bad, good = stage.one("bad", fail), stage.one("good")

    def show() -> None:
        stage.flusher.mark(bad)
        stage.flusher.mark(good)
        fail()

    stage.flusher.deliver(stage.one("publisher", show))
    assert stage.seen() == ["publisher", "publisher crashed", "bad", "bad crashed", "good"]
    assert stage.flusher._when is SOON


@pytest.mark.parametrize("call", ["publish", "deliver"])
async def test_what_escapes_leaves_nobody_waiting_for_this_step(stage: Stage, nursery: Any, call: str) -> None:
    class Escapes(BaseException):
        pass

    def escape() -> None:
        raise Escapes

    with pytest.raises(Escapes):
        getattr(stage.flusher, call)(stage.one("publisher", escape))
    assert stage.flusher._when is SOON
    nursery.start_soon(stage.flusher.run)
    stage.flusher.mark(stage.one("reader"))
    await settle()
    assert stage.seen() == ["publisher", "reader"]
