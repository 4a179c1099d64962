"""An agent starts once, in its session's context, and not when its session has ended."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

import pytest
import trio
from session_harness import (
    AgentFunction,
    Bench,
    ObedientStore,
    Reader,
    Script,
    echo,
    make_sources,
    open_bench,
    settle,
    watch_numbers,
)

from gateway.config import Limits
from gateway.errors import StoreFenced, StoreUnavailable, StoreUnusable
from gateway.protocol.log import Tails
from gateway.protocol.messages import Event, Input, TurnEnded, TurnStarted
from gateway.server.flusher import SILENCE, SOON, Flusher
from gateway.session import Session, Turn
from gateway.session import publisher as publisher_module
from gateway.session.publisher import NUMBER_BLOCK, SHORT_END
from gateway.session.turn import YIELD_EVERY
from gateway.store import MemoryStore, SessionRecord, Stored
from gateway.store.base import Appended

LONG = SHORT_END * 3 // 2
"""Characters, and less than a segment."""

whose: ContextVar[str] = ContextVar("whose", default="nobody's")


class SlowStore(MemoryStore):
    """While `slow`, says later that something is stored: when `finish` is called."""

    slow = False
    patient = False
    finish: Callable[[], None]

    def append_soon(
        self,
        session_id: str,
        batch: Sequence[Stored],
        reserved: int,
        done: Appended = lambda error: None,
        *,
        patient: bool = False,
    ) -> bool:
        assert super().append_soon(session_id, batch, reserved, done)
        if not self.slow:
            return True
        self.finish = lambda: done(None)
        self.patient = patient
        return False


@asynccontextmanager
async def open_flushed(
    agent: AgentFunction, store: SlowStore, failures: list[Exception], **limits: Any
) -> AsyncIterator[Bench]:
    """A session whose events a flusher shows, and that runs from its first input on, as in a gateway."""
    record = SessionRecord("s1", "agent", "alice", "e1", 0)
    await store.create(record, NUMBER_BLOCK)
    flusher = Flusher(timer=trio.current_time)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(flusher.run)
        session = Session(
            record,
            agent,
            store,
            Limits(**limits),
            make_sources(),
            reserved=NUMBER_BLOCK,
            start=lambda session: nursery.start_soon(session.run),
            on_failed=lambda _, exc: failures.append(exc),
            pacer=flusher,
        )
        watch_numbers(session, store)  # type: ignore[arg-type]
        bench = Bench(session, store, Reader())  # type: ignore[arg-type]
        bench.reader = bench.attach("c1")
        yield bench
        nursery.cancel_scope.cancel()


async def test_all_agents_of_a_session_start_in_one_context(autojump_clock: Any) -> None:
    """Whoever shows a turn's start; the first is shown before the session's tasks are there."""
    seen: list[str] = []

    async def agent(turn: Turn) -> None:
        seen.append(whose.get())

    async with open_flushed(agent, SlowStore(), []) as bench:
        for n in range(3):
            whose.set(f"the sender's of r{n}")
            bench.send(f"r{n}")
            await settle()
        bench.send("stopped")
        bench.abort()
        await settle()
        bench.send("r3")  # a new nursery for the agents
        await settle()
        assert seen == ["the sender's of r0"] * 4


async def test_an_agent_that_is_stopped_before_its_first_step_does_not_run() -> None:
    ran: list[str] = []

    async def agent(turn: Turn) -> None:
        ran.append(turn.input.request_id)

    async with open_flushed(agent, SlowStore(), []) as bench:
        for n in range(2):  # the first agent of a nursery, and one after it
            bench.send(f"now{n}")
            bench.abort()
            await settle()
            bench.send(f"later{n}")
            await settle()
    assert ran == ["later0", "later1"]


async def test_who_waits_for_a_turn_hears_that_it_never_was(autojump_clock: Any) -> None:
    async with open_bench(echo) as bench:
        bench.store.hold()
        bench.send("r1")
        await settle()
        assert bench.session.turn is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bench.session.finish_turn, 1)
            await settle()
            bench.store.error = StoreUnavailable("full")
            bench.store.release()
            await settle()
            assert not nursery.child_tasks


async def test_who_waits_for_a_turn_hears_that_its_session_has_failed(autojump_clock: Any) -> None:
    async with open_bench(Script(), on_failed=lambda *_: None) as bench:
        bench.send("r1")
        await settle()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bench.session.finish_turn, 1)
            await settle()
            bench.store.error = StoreFenced("taken over")
            bench.send("r2")
            await settle()
            assert not nursery.child_tasks


async def test_an_input_and_the_start_of_its_turn_wait_for_the_store_alone() -> None:
    """Each step takes all that can be done in it: neither waits for a pass of the flusher."""
    store = SlowStore()

    async def agent(turn: Turn) -> None:
        await trio.sleep_forever()

    async with open_flushed(agent, store, []) as bench:
        store.slow = True
        bench.send("r1")
        log = bench.session.log
        assert log.head == 0
        store.finish()  # it has it already
        assert [type(event) for event in log] == [Input, TurnStarted]
        await settle()
        assert bench.session.turn is not None
        assert bench.session.turn._running


@pytest.mark.parametrize(
    ("how", "length", "patient", "at_once"),
    [
        ("streamed", LONG, True, False),
        ("streamed", SHORT_END // 2, False, True),
        ("streamed in many words at once", 10, True, False),
        ("streamed in many words at once", 9, False, True),
        ("returned", LONG, False, True),
        ("returned after a word", LONG, False, True),
        ("returned after another text", LONG, False, True),
        ("streamed, then failed", LONG, False, True),
        ("streamed, and a message waits", LONG, False, True),
        ("streamed, and a tool's result comes with the end", LONG, False, True),
        ("streamed, and a message comes while the end is stored", LONG, True, True),
    ],
)
async def test_the_end_of_a_long_answer_is_left_to_the_flusher_once_it_was_streamed(
    how: str,
    length: int,
    patient: bool,
    at_once: bool,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Its readers have the text. Whatever somebody waits for is shown in the step that says that it is stored."""
    store = SlowStore()
    end = trio.Event()
    urgent: list[bool] = []
    mark = Flusher.mark_publisher

    def note(flusher: Flusher, publisher: Any, **kwargs: bool) -> None:
        urgent.append(kwargs.get("urgent", False))
        mark(flusher, publisher, **kwargs)

    monkeypatch.setattr(Flusher, "mark_publisher", note)
    # Less than an agent writes in one step: in a quiet gateway somebody comes by after each.
    monkeypatch.setattr(publisher_module, "SHORT_REST", 8)

    async def agent(turn: Turn) -> str | None:
        returned = how.startswith("returned")
        if how != "returned" and "many words" not in how:
            await turn.send("x" * (1 if how == "returned after a word" else length))
        await end.wait()
        for _ in range(length if "many words" in how else 0):
            await turn.send("x")
        if "tool" in how:
            await turn.tool_result("call_1", "something else")
        if how == "streamed, then failed":
            raise RuntimeError("boom")
        return "y" * length if returned else None

    async with open_flushed(agent, store, []) as bench:
        log = bench.session.log
        bench.send("r1")
        await settle()
        if how == "streamed, and a message waits":
            bench.send("r2")
            await settle()
        store.slow = True
        end.set()
        await settle()
        assert urgent[-1] is not (patient or "tool" in how)
        assert store.patient is patient
        if how == "streamed, and a message comes while the end is stored":
            bench.send("r2")
        before = log.head
        await trio.sleep(2 * SILENCE)
        store.finish()
        assert (log.head > before) is at_once
        if patient and not at_once:
            assert bench.session.publisher.dirty == SOON
        await settle()
        assert TurnEnded in [type(event) for event in log]


class Steps(trio.abc.Instrument):
    """Counts the steps of the task that is `watched`."""

    watched: trio.lowlevel.Task | None = None
    count = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.count += task is self.watched


@pytest.mark.parametrize(("pauses", "steps"), [(True, 200), (False, 200 // YIELD_EVERY)])
async def test_an_agent_that_lets_others_run_is_not_made_to_do_so_besides(pauses: bool, steps: int) -> None:
    store = SlowStore()
    counter = Steps()

    async def agent(turn: Turn) -> None:
        counter.watched = trio.lowlevel.current_task()
        for _ in range(200):
            await turn.send("word ")
            if pauses:
                await trio.lowlevel.checkpoint()

    async with open_flushed(agent, store, []) as bench:
        trio.lowlevel.add_instrument(counter)
        bench.send("r1")
        await settle()
        trio.lowlevel.remove_instrument(counter)
        assert TurnEnded in [type(event) for event in bench.session.log]
        assert counter.count == steps


@pytest.mark.parametrize("what", ["an input", "text"])
async def test_nothing_is_stored_after_what_could_not_be_shown(what: str) -> None:
    """A defect of ours, and a message in the same step: the session has not ended yet, but its log has a hole."""
    store = SlowStore()
    failures: list[Exception] = []

    async def agent(turn: Turn) -> None:
        await trio.sleep_forever()

    def fail(*args: Any) -> None:
        raise RuntimeError("boom")

    async with open_flushed(agent, store, failures) as bench:
        session = bench.session
        store.slow = True
        bench.send("r1")
        given = store.finish
        if what == "an input":
            session.log.append = fail  # type: ignore[method-assign]
            given()
        else:
            given()
            assert session.turn is not None
            session.log.append = fail  # type: ignore[method-assign]
            session.publisher.outbox.send_nowait((session.turn.turn_id, "answer", "x"))
            session.publisher.hurry()
        bench.send("r2")
        assert store.finish is given, "it was given another batch"
        await settle()
        assert [type(exc) for exc in failures] == [RuntimeError]


async def test_no_agent_starts_when_its_session_has_failed_while_older_events_were_read() -> None:
    started: list[str] = []
    failures: list[Exception] = []
    reading, go_on = trio.Event(), trio.Event()

    class Store(ObedientStore):
        async def read(self, session_id: str, after: int, upto: int) -> list[Event]:
            reading.set()
            with trio.CancelScope(shield=True):  # a thread that has to be waited for
                await go_on.wait()
            return await super().read(session_id, after, upto)

    async def agent(turn: Turn) -> str:
        started.append(turn.input.request_id)
        return "x" * 3000

    async with open_bench(
        agent,
        store=Store(),
        limits=Limits(tail_max_bytes=65_536),
        tails=Tails(4000, 4000),
        on_failed=lambda _, exc: failures.append(exc),
    ) as bench:
        while not reading.is_set():
            bench.send(f"r{len(started)}")
            await settle()
        before = list(started)
        bench.store.error = StoreFenced("taken over")
        bench.send("next")
        await settle()
        assert [type(exc) for exc in failures] == [StoreFenced]
        go_on.set()
        await settle()
        assert started == before


async def test_no_agent_starts_when_its_start_is_stored_after_the_session_has_failed(autojump_clock: Any) -> None:
    """An agent that was given up keeps the session's nursery open all the while."""
    started: list[str] = []
    failures: list[Exception] = []
    store = SlowStore()

    async def agent(turn: Turn) -> None:
        started.append(turn.input.request_id)
        with trio.CancelScope(shield=True), trio.move_on_after(50):
            await leave.wait()

    async def fail() -> None:
        raise StoreUnusable("the loop fails")

    leave = trio.Event()
    async with open_flushed(agent, store, failures, stop_timeout_ms=100) as bench:
        bench.send("stuck")
        await settle()
        bench.abort()
        await trio.sleep(1)
        assert bench.session.turn is None
        store.slow = True
        # One step: the failure, and a message, which goes to the store at once.
        await bench.session._guard(fail)
        bench.send("late")
        await settle()
        assert [type(exc) for exc in failures] == [StoreUnusable]
        store.finish()
        await settle()
        assert started == ["stuck"]
        leave.set()
