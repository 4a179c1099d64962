"""Fuzzing a running gateway: dialogues made by Hypothesis, played over real connections, judged as they go.

Theory of operation
-------------------
Trio owns the process: a witness, which is a well-behaved client with a session of its own, and one dialogue at a time.
Hypothesis runs in a thread and hands each dialogue over; that is the only thing it does there. A dialogue opens its
own connections and a session that nobody else uses, so it means the same whenever it is played: that is what makes
shrinking, seeds and files of failures work.

A dialogue is played to its end and then every connection is held to what it owes (`Line.sync`), and so is the witness.
What was found first is shrunk: fewer steps, shorter texts, the same kind of failure. When nobody answers the door any
more nothing can be shrunk, and the dialogue is kept as it was.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import trio
from attrs import field, frozen, mutable

from gateway.errors import GatewayError
from gateway.testing import wire
from gateway.testing.dialogue import Close, Cut, Recording, SendBytes, SendText, Step, Sync, Wait, fill_in
from gateway.testing.judge import FAILURES, Disturbed, Gone, Judge, Ledger, ServerFailure
from gateway.testing.line import Line, Target, open_line
from gateway.testing.wire import dumps

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

BATCH = 200
"""Examples of one run of Hypothesis. It remembers all of them, so a long hunt is many short ones, each with a seed that
follows from the first."""

SHRINK_S = 60.0
"""For finding the smallest dialogue that still fails. With a stall each attempt takes as long as the limit."""

WITNESS_PAUSE = 0.5
"""Seconds between two messages of the witness: its session should mostly be streaming, and not pile up."""

REPLAYS = 3
"""Times a file is played before it counts as passed: what depends on timing need not fail at once."""


class CannotStart(GatewayError):
    """The server does not let even a well-behaved client in. The message says why."""


def judge_for(target: Target, ledger: Ledger) -> Judge:
    """The judge of the target's version."""
    if target.protocol == 1:
        from gateway.testing.judge1 import Judge1

        return Judge1(ledger)
    return Judge(ledger)


def opening(target: Target, session_id: str) -> dict[str, Any]:
    """The hello of a client that wants nothing special."""
    version = target.protocol
    return {
        "type": "hello",
        "protocol_min": version,
        "protocol_max": version,
        "agent_id": target.agent,
        "session_id": session_id,
    }


# --- one dialogue ----------------------------------------------------------------------------------------------------


class _Play:
    """A dialogue being played. The first failure ends it."""

    def __init__(self, target: Target, nursery: trio.Nursery) -> None:
        self._target = target
        self._nursery = nursery
        self._ledger = Ledger()
        self._lines: dict[str, Line] = {}
        self._all: list[Line] = []
        self._names = {"session": f"fuzz-{uuid.uuid4().hex[:12]}", "agent": target.agent}
        self._cursors: dict[str, int] = {}
        self._came: dict[tuple[str, str], int] = {}
        self._news = trio.lowlevel.ParkingLot()
        self.failure: ServerFailure | None = None

    @property
    def frames(self) -> int:
        return sum(line.received_frames for line in self._all)

    async def do(self, step: Step) -> None:
        if isinstance(step, Cut):
            line = self._lines.pop(step.on, None)
            if line is not None:
                await line.cut()
            return
        if isinstance(step, Wait):
            await self._wait(step)
            return
        line = await self._line(step.on)
        if isinstance(step, SendText):
            cursor = max(line.judge.cursor.cursor, self._cursors.get(step.on, 0))
            await line.send_text(fill_in(step.text, cursor=cursor, names=self._names))
        elif isinstance(step, SendBytes):
            await line.send(step.data)
        elif isinstance(step, Sync):
            await line.sync()
        elif isinstance(step, Close):
            await line.send(wire.frame(wire.CLOSE, step.code.to_bytes(2, "big")))
            self._cursors[step.on] = line.judge.cursor.cursor

    async def _line(self, on: str) -> Line:
        line = self._lines.get(on)
        if line is None or line.over or line.leaving:
            line = await open_line(self._target, judge_for(self._target, self._ledger), self._seen(on))
            self._lines[on] = line
            self._all.append(line)
            self._nursery.start_soon(self._read, line)
        return line

    def _seen(self, on: str) -> Callable[[dict[str, Any]], None]:
        def note(fields: dict[str, Any]) -> None:
            kind = str(fields["type"])
            self._came[on, kind] = self._came.get((on, kind), 0) + 1
            line = self._lines.get(on)
            if line is not None:
                self._cursors[on] = line.judge.cursor.cursor
                self._names |= line.judge.names_of(fields)
            self._news.unpark_all()

        return note

    async def _wait(self, step: Wait) -> None:
        line = self._lines.get(step.on)
        if step.until is not None and (line is None or line.over or not line.judge.welcomed):
            await trio.lowlevel.checkpoint()  # no such frame can come
            return
        before = self._came.get((step.on, step.until or ""), 0)
        with trio.move_on_after(step.ms / 1000):
            while step.until is None or self._came.get((step.on, step.until), 0) == before:
                await self._news.park()

    async def _read(self, line: Line) -> None:
        try:
            await line.run()
        except ServerFailure as failure:
            self.fail(failure)

    def fail(self, failure: ServerFailure) -> None:
        if self.failure is None:
            self.failure = failure
            self._nursery.cancel_scope.cancel()

    async def settle(self) -> None:
        """Hold every connection to what it owes."""
        for line in self._all:
            await line.sync()

    async def end(self) -> None:
        for line in self._all:
            if not line.cut_off:
                await line.cut()


async def play(target: Target, steps: Sequence[Step]) -> int:
    """Play a dialogue on connections of its own; return how many frames came.

    Raises:
        ServerFailure: the first thing that the server did wrong.
    """
    async with trio.open_nursery() as nursery:
        playing = _Play(target, nursery)
        try:
            for step in steps:
                await playing.do(step)
            await playing.settle()
        except ServerFailure as failure:
            playing.fail(failure)
        finally:
            # Closing sockets hard does not wait for anyone.
            with trio.CancelScope(shield=True):
                await playing.end()
            nursery.cancel_scope.cancel()
    if playing.failure is not None:
        raise playing.failure
    return playing.frames


# --- the witness -----------------------------------------------------------------------------------------------------


class Witness:
    """A client that does everything right while others do not: its story must not change for that."""

    def __init__(self, target: Target, nursery: trio.Nursery) -> None:
        self._target = target
        self._nursery = nursery
        self._line: Line | None = None
        self._failure: ServerFailure | None = None
        self._sent = 0
        self._said_at = -WITNESS_PAUSE
        self._inputs = 0
        self.session_id = ""

    async def join(self) -> None:
        """Open its connection, unless it has one that is well.

        Raises:
            ServerFailure: it cannot.
        """
        if self._line is not None and self._failure is None:
            await trio.lowlevel.checkpoint()
            return
        if self._line is not None:
            await self._line.cut()
        self._failure, self._sent, self._inputs = None, 0, 0
        self.session_id = f"witness-{uuid.uuid4().hex[:12]}"
        line = await open_line(self._target, judge_for(self._target, Ledger()), self._see)
        line.be_polite()
        self._line = line
        # Owned by the caller's nursery; ends with the line, or with the hunt.
        self._nursery.start_soon(self._read, line)
        await line.send_text(dumps(opening(self._target, self.session_id)))
        await line.wait_for("no answer to hello", lambda: line.judge.met)
        if not line.judge.welcomed:
            refused = line.judge.refused
            self._failure = Disturbed("the witness may not join" + (f": {refused}" if refused else ""))
            raise self._failure

    async def check(self) -> None:
        """Talk, and have it answered.

        Raises:
            Disturbed: something is wrong with a connection that did nothing wrong.
        """
        line = self._line
        assert line is not None, "join comes first"
        try:
            if self._failure is None and trio.current_time() - self._said_at >= WITNESS_PAUSE:
                self._said_at = trio.current_time()
                self._sent += 1
                message = {"type": "message", "request_id": f"w{self._sent}", "content": f"witness {self._sent}"}
                await line.send_text(dumps(message))
            if self._failure is None:
                await line.sync()
            if self._failure is None and line.over:
                code = line.closed.code if line.closed else None
                self._failure = Disturbed(f"the witness was closed with {code}")
        except ServerFailure as failure:
            self._failure = failure
        if self._failure is not None:
            raise Disturbed(f"a well-behaved connection, on a session of its own: {self._failure}")

    def _see(self, fields: dict[str, Any]) -> None:
        assert self._line is not None
        request_id = self._line.judge.input_of(fields)
        if request_id is not None:
            self._inputs += 1
            if request_id != f"w{self._inputs}":
                self._failure = self._failure or Disturbed(f"input {self._inputs} is {request_id!r}")

    async def _read(self, line: Line) -> None:
        try:
            await line.run()
        except ServerFailure as failure:
            if self._failure is None and line is self._line:
                self._failure = failure


# --- the hunt --------------------------------------------------------------------------------------------------------


@mutable
class Progress:
    """How far the hunt has come; `shrinking` once something was found."""

    examples: int = 0
    frames: int = 0
    shrinking: bool = False
    started: float = field(factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


@frozen
class Found:
    """The smallest dialogue that failed, and how."""

    steps: list[Step]
    failure: ServerFailure


class _Enough(BaseException):
    """Ends a run of Hypothesis from within an example; not an `Exception`, or it would be taken for a failure."""


def search(
    run: Callable[[list[Step]], None],
    *,
    version: int,
    seed: int,
    max_examples: int | None = None,
    enough: Callable[[], bool] = lambda: False,
    progress: Progress | None = None,
) -> Found | None:
    """Make dialogues and `run` each, until one fails; then find the smallest that does. The same seed gives the same
    dialogues, as long as `run` gives the same verdicts.

    Args:
        run: plays a dialogue; raises `ServerFailure`, or `Gone` if nothing can be played any more.
        max_examples: None for no end but `enough`.
        enough: asked before each example.
    """
    from hypothesis import HealthCheck, Phase, Verbosity, given, settings
    from hypothesis import seed as seeded
    from hypothesis.errors import Flaky

    from gateway.testing.strategies import dialogues

    progress = progress or Progress()
    found: Found | None = None
    shrink_until = 0.0
    batch = 0

    def example(steps: list[Step]) -> None:
        nonlocal found, shrink_until
        if found is None:
            if enough():
                raise _Enough
            progress.examples += 1
        elif time.monotonic() >= shrink_until:
            raise _Enough
        try:
            run(steps)
        except ServerFailure as failure:
            if found is None:
                shrink_until = time.monotonic() + SHRINK_S
                progress.shrinking = True
            elif isinstance(failure, Gone) and not isinstance(found.failure, Gone):
                raise _Enough from None
            if found is None or type(failure) is type(found.failure):
                found = Found(list(steps), failure)
            if isinstance(failure, Gone):
                raise _Enough from None
            # One place and one type for each kind, so that Hypothesis does not shrink one failure into another.
            raise failure.with_traceback(None)  # noqa: B904

    while found is None and not enough() and (max_examples is None or progress.examples < max_examples):
        count = BATCH if max_examples is None else min(BATCH, max_examples - progress.examples)
        test = settings(
            max_examples=count,
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            verbosity=Verbosity.quiet,
        )(seeded(f"{seed}/{batch}" if batch else seed)(given(dialogues(version))(example)))
        batch += 1
        try:
            test()
        except (_Enough, ServerFailure, Flaky):
            continue
    return found and _fewer_steps(found, run, shrink_until)


def _fewer_steps(found: Found, run: Callable[[list[Step]], None], until: float) -> Found:
    """Leave out whatever single step can be left out. Hypothesis does so too, but where timing has a say it may take a
    step for needed that is not."""
    at = 0
    while not isinstance(found.failure, Gone) and at < len(found.steps) and time.monotonic() < until:
        fewer = found.steps[:at] + found.steps[at + 1 :]
        at += 1
        try:
            run(list(fewer))
        except Gone:
            break
        except ServerFailure as failure:
            if type(failure) is type(found.failure):
                found, at = Found(fewer, failure), 0
    return found


async def hunt(
    target: Target,
    *,
    seed: int,
    max_examples: int | None = None,
    seconds: float | None = None,
    progress: Progress | None = None,
) -> Found | None:
    """Fuzz a gateway until something is found, or until it is enough. Cancelling is safe.

    Args:
        max_examples, seconds: None for no limit; without any it goes on for ever.

    Raises:
        CannotStart: there is no such server, or it does not let a well-behaved client in.
    """
    progress = progress or Progress()
    deadline = None if seconds is None else time.monotonic() + seconds
    before: list[Step] = []

    async with open_witness(target) as witness:

        async def one(steps: list[Step]) -> None:
            nonlocal before
            try:
                await witness.join()
            except ServerFailure as failure:
                # It was well after the last dialogue, so this is a late consequence of that.
                steps[:] = before or steps
                raise Gone(str(failure)) from None
            before = list(steps)
            progress.frames += await play(target, steps)
            await witness.check()

        def run(steps: list[Step]) -> None:
            trio.from_thread.run(one, steps)

        def work() -> Found | None:
            return search(
                run,
                version=target.protocol,
                seed=seed,
                max_examples=max_examples,
                enough=lambda: deadline is not None and time.monotonic() >= deadline,
                progress=progress,
            )

        return await trio.to_thread.run_sync(work)


async def replay(target: Target, recording: Recording) -> ServerFailure | None:
    """Play a recorded dialogue, a few times; the first failure, of whatever kind, or None.

    Raises:
        CannotStart: there is no such server, or it does not let a well-behaved client in.
    """
    async with open_witness(target) as witness:
        for _ in range(REPLAYS):
            try:
                await play(target, recording.steps)
                await witness.check()
            except ServerFailure as failure:
                return failure
    return None


@asynccontextmanager
async def open_witness(target: Target) -> AsyncIterator[Witness]:
    """A witness that has joined, and whose first words were answered.

    Raises:
        CannotStart: it could not.
    """
    result: BaseException | None = None
    async with trio.open_nursery() as nursery:
        witness = Witness(target, nursery)
        try:
            try:
                await witness.join()
                await witness.check()
            except ServerFailure as failure:
                raise CannotStart(str(failure)) from None
            yield witness
        except GatewayError as exc:
            result = exc  # out of the nursery as it is
        nursery.cancel_scope.cancel()
    if result is not None:
        raise result


def recording_of(found: Found, target: Target, seed: int | None) -> Recording:
    """What to save of a failure."""
    failure = found.failure
    assert failure.kind in FAILURES
    return Recording(
        protocol=target.protocol,
        agent=target.agent,
        seed=seed,
        steps=found.steps,
        failure=failure.kind,
        message=str(failure),
    )
