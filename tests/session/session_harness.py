"""One session (or a registry of them) without a network: readers that record, agents as gates, a store that obeys.

`Reader` is what a connection is to the engine: it keeps the frames pushed to it and reads the log by its own cursor,
whenever it is woken, checking the covering rule as it goes.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import trio
import trio.testing

from gateway.config import Limits
from gateway.errors import StoreUnavailable
from gateway.protocol import codec
from gateway.protocol.log import CursorExpired
from gateway.protocol.messages import (
    Abort,
    Answer,
    Delta,
    Event,
    Hello,
    Input,
    Member,
    Message,
    Output,
    Presence,
    ServerFrame,
    Snapshot,
    TurnEnded,
    TurnStarted,
)
from gateway.session import Registered, Registry, Session, Sources, Turn
from gateway.session.publisher import NUMBER_BLOCK
from gateway.store import SessionRecord, Stored
from gateway.store.memory import MemoryStore

E = TypeVar("E", bound=Event)
F = TypeVar("F", bound=ServerFrame)

AgentFunction = Callable[[Turn], Awaitable[str | None]]

settle = trio.testing.wait_all_tasks_blocked


_numbers = itertools.count(1)


def make_sources() -> Sources:
    return Sources(
        now_ms=lambda: int(trio.current_time() * 1000),
        new_id=lambda: f"{next(_numbers):06}",
        chance=lambda: 0.5,
        timer=trio.current_time,
    )


class ObedientStore(MemoryStore):
    """A store that can be held, and told to fail. It also checks what a session may hand in."""

    durable = True
    direct = False

    def __init__(self) -> None:
        super().__init__()
        self.gate: trio.Event | None = None
        self.unavailable = False
        self.error: Exception | None = None
        self.appends = 0
        self.batches: list[list[Event]] = []

    def hold(self) -> None:
        self.gate = trio.Event()

    def release(self) -> None:
        gate, self.gate = self.gate, None
        assert gate is not None
        gate.set()

    async def append(self, session_id: str, batch: Sequence[Stored], reserved: int) -> None:
        self.appends += 1
        if self.gate is not None:
            await self.gate.wait()
        await trio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
        if self.unavailable:
            raise StoreUnavailable("the disk is full")
        for item in batch:
            assert codec.decode_event(item.payload) == item.event, "what is stored must come back the same"
        self.batches.append([item.event for item in batch])
        await super().append(session_id, batch, reserved)


class Reader:
    """A connection, as its session sees it."""

    def __init__(self, name: str = "c1", subject: str = "alice") -> None:
        self.member = Member(connection_id=name, subject=subject, joined_at=0)
        self.told_no_credit = False
        self.session: Session | None = None
        self.cursor = 0
        self.seen: list[ServerFrame | Event] = []
        """Frames and events in the order in which a client could get them: frames go first, as in a connection."""
        self.closed = False

    # what the session calls

    def wake(self) -> None:
        assert self.session is not None
        if self.session.publisher_bound_is_broken():  # type: ignore[attr-defined]
            raise AssertionError("a number was shown that is not reserved in the store")

    def push(self, frame: ServerFrame) -> None:
        codec.encode_frame(frame)
        self.read()
        self.seen.append(frame)

    def session_failed(self) -> None:
        self.closed = True

    # what a test calls

    def read(self) -> None:
        """Take over everything in the log behind the cursor."""
        assert self.session is not None
        log = self.session.log
        while self.cursor < log.head:
            chunk = log.read(self.cursor, 64 * 1024)
            for payload in chunk.payloads:
                event = codec.decode_event(payload)
                assert event.first <= self.cursor + 1, f"gap before {event}"
                assert event.seq > self.cursor
                self.cursor = event.seq
                self.seen.append(event)

    @property
    def frames(self) -> list[ServerFrame]:
        return [item for item in self.seen if isinstance(item, ServerFrame) and not isinstance(item, Presence)]

    @property
    def events(self) -> list[Event]:
        self.read()
        return [item for item in self.seen if isinstance(item, Event)]

    def of(self, kind: type[E]) -> list[E]:
        return [item for item in self.events if isinstance(item, kind)]

    def got(self, kind: type[F]) -> list[F]:
        return [item for item in self.seen if isinstance(item, kind)]

    def take(self) -> list[ServerFrame]:
        """The frames since the last call."""
        self.read()
        frames = self.frames
        self.seen = [item for item in self.seen if not isinstance(item, ServerFrame)]
        return frames

    def where(self, kind: type[Any], **fields: Any) -> int:
        """The place of the first frame or event like that."""
        self.read()
        for i, item in enumerate(self.seen):
            if isinstance(item, kind) and all(getattr(item, name) == value for name, value in fields.items()):
                return i
        raise AssertionError(f"no {kind.__name__} with {fields} in {self.seen}")

    def text_of(self, turn_id: str, channel: str = "answer") -> str:
        """A channel's text by the client's rule: its outputs joined, then the deltas after the last."""
        done, tail = "", ""
        for event in self.events:
            if isinstance(event, Delta | Output) and event.turn_id == turn_id and event.channel == channel:
                if isinstance(event, Delta):
                    tail += event.text
                else:
                    done, tail = done + event.content, ""
        return done + tail


class Bench:
    """A session and its first reader."""

    def __init__(self, session: Session, store: ObedientStore, reader: Reader) -> None:
        self.session = session
        self.store = store
        self.reader = reader

    def attach(self, name: str, subject: str = "alice", cursor: int | None = None) -> Reader:
        reader = Reader(name, subject)
        join(self.session, reader, cursor)
        return reader

    def send(self, request_id: str, content: str | None = None, reader: Reader | None = None, **fields: Any) -> None:
        content = request_id if content is None else content
        self.session.submit(
            Message(request_id=request_id, content=content, **fields),  # type: ignore[arg-type]
            reader or self.reader,
        )

    def abort(self, reader: Reader | None = None, **fields: Any) -> None:
        self.session.abort(Abort(**fields), reader or self.reader)

    def answer(self, ask_id: str, value: Any, reader: Reader | None = None) -> None:
        self.session.answer(Answer(ask_id=ask_id, value=value), reader or self.reader)

    def snapshot(self) -> Snapshot:
        [frame] = codec.decode_server(self.session.snapshot("requested"))
        assert isinstance(frame, Snapshot)
        return frame

    # looking back

    @property
    def turns(self) -> list[list[str]]:
        """The request ids of each turn started so far."""
        return [list(event.request_ids) for event in self.reader.of(TurnStarted)]

    @property
    def ends(self) -> list[str]:
        return [event.outcome for event in self.reader.of(TurnEnded)]

    @property
    def inputs(self) -> list[str]:
        return [event.request_id for event in self.reader.of(Input)]


def join(session: Session, reader: Reader, cursor: int | None = None) -> None:
    reader.session = session
    reader.cursor = session.log.head if cursor is None else cursor
    if reader.cursor < session.log.floor:
        raise CursorExpired
    session.attach(reader)


def watch_numbers(session: Session, store: ObedientStore) -> None:
    """From now on every wake of a reader checks that no number above the stored reservation is visible."""
    session_id = session.record.session_id
    session.publisher_bound_is_broken = lambda: (  # type: ignore[attr-defined]
        session.log.head > store._sessions[session_id].reserved
    )


@asynccontextmanager
async def open_bench(
    agent: AgentFunction,
    *,
    limits: Limits | None = None,
    store: ObedientStore | None = None,
    attached: bool = True,
    **options: Any,
) -> AsyncIterator[Bench]:
    """One session, run by itself."""
    limits, store = limits or Limits(), store or ObedientStore()
    record = SessionRecord("s1", "agent", "alice", "e1", 0)
    await store.create(record, NUMBER_BLOCK)
    session = Session(record, agent, store, limits, make_sources(), reserved=NUMBER_BLOCK, **options)
    watch_numbers(session, store)
    reader = Reader()
    reader.session = session
    if attached:
        session.attach(reader)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(session.run)
        await settle()
        yield Bench(session, store, reader)
        check_history(reader.events)
        nursery.cancel_scope.cancel()


class House:
    """A registry."""

    def __init__(self, registry: Registry, store: ObedientStore) -> None:
        self.registry = registry
        self.store = store

    async def join(
        self, session_id: str | None = None, *, subject: str = "alice", agent_id: str = "agent"
    ) -> tuple[Session, bool]:
        hello = Hello(protocol_min=2, protocol_max=2, agent_id=agent_id, session_id=session_id)  # type: ignore[arg-type]
        session, existed = await self.registry.join(hello, subject)
        watch_numbers(session, self.store)
        return session, existed

    async def bench(
        self,
        session_id: str,
        *,
        name: str = "c1",
        subject: str = "alice",
        agent_id: str = "agent",
        cursor: int = 0,
    ) -> Bench:
        """Join, and attach a reader at a cursor."""
        session, _ = await self.join(session_id, subject=subject, agent_id=agent_id)
        reader = Reader(name, subject)
        join(session, reader, cursor)
        return Bench(session, self.store, reader)


@asynccontextmanager
async def open_house(
    agents: AgentFunction | dict[str, Registered],
    *,
    limits: Limits | None = None,
    store: ObedientStore | None = None,
    sources: Sources | None = None,
    **options: Any,
) -> AsyncIterator[House]:
    """A registry over a store; leaving the block is a crash of the process: the store stays as it is."""
    limits, store = limits or Limits(), store or ObedientStore()
    registered = agents if isinstance(agents, dict) else {"agent": Registered(agents)}
    async with trio.open_nursery() as nursery:
        yield House(Registry(nursery, registered, store, limits, sources or make_sources(), **options), store)
        nursery.cancel_scope.cancel()


class Script:
    """An agent whose every turn waits for the test.

    A turn takes what the test puts in with `say`, and ends with `finish` or `fail`. `log` has what happened.
    """

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.log: list[str] = []
        self.running = 0
        self.most = 0
        self._send: trio.MemorySendChannel[Callable[[Turn], Awaitable[Any]]]
        self._next()

    def _next(self) -> None:
        self._send, self._receive = trio.open_memory_channel[Callable[[Turn], Awaitable[Any]]](1000)

    async def __call__(self, turn: Turn) -> str | None:
        self.turns.append(turn)
        self.running += 1
        self.most = max(self.most, self.running)
        commands = self._receive
        try:
            while True:
                result = await (await commands.receive())(turn)
                if isinstance(result, Returned):
                    return result.text
        except trio.Cancelled:
            self.log.append("cancelled")
            raise
        finally:
            self.running -= 1
            if self._receive is commands:
                self._next()

    @property
    def turn(self) -> Turn:
        return self.turns[-1]

    async def do(self, command: Callable[[Turn], Awaitable[Any]]) -> None:
        """Run a step in the running turn, up to where it waits."""
        self._send.send_nowait(command)
        await settle()

    async def say(self, text: str, channel: str = "answer") -> None:
        await self.do(lambda turn: turn.send(text, channel))

    async def finish(self, text: str | None = None) -> None:
        self.finish_nowait(text)
        await settle()

    def finish_nowait(self, text: str | None = None) -> None:
        async def finish(_: Turn) -> Returned:
            return Returned(text)

        self._send.send_nowait(finish)

    async def fail(self, exc: BaseException) -> None:
        async def fail(_: Turn) -> None:
            raise exc

        await self.do(fail)


class Returned:
    """What a step returns to make its turn return."""

    def __init__(self, text: str | None) -> None:
        self.text = text


async def echo(turn: Turn) -> str:
    """Answers at once."""
    return " ".join(f"{item.content}!" for item in turn.inputs)


def check_history(events: Sequence[Event], *, finished: bool = False) -> None:
    """What every history keeps to, whatever happened.

    One turn at a time; a turn's events between its start and its one end, which is its last; asks answered once and
    within their turn; each input taken or withdrawn at most once (exactly once if `finished`), after it was accepted.
    """
    open_turn: str | None = None
    over: set[str] = set()
    waiting: dict[str, int] = {}
    steered: dict[str, str | None] = {}
    asks: set[str] = set()
    previous = 0
    for event in events:
        assert event.seq > previous
        previous = event.seq
        turn_id = getattr(event, "turn_id", None)
        kind = event.type
        if isinstance(event, TurnStarted):
            assert open_turn is None, "two turns at a time"
            assert turn_id not in over
            open_turn = turn_id
            for request_id in event.request_ids:
                assert event.attempt > 1 or waiting.pop(request_id, None) is not None, f"{request_id} was not waiting"
        elif kind == "withdrawn":
            request_id = event.request_id  # type: ignore[attr-defined]
            assert waiting.pop(request_id, None) is not None, f"{request_id} was not waiting"
            if event.reason == "steered":  # type: ignore[attr-defined]
                assert turn_id == open_turn
                steered[request_id] = turn_id
        elif isinstance(event, Input):
            assert event.request_id not in waiting
            waiting[event.request_id] = event.seq
        elif turn_id is not None:
            assert turn_id == open_turn, f"{kind} outside of its turn"
            if kind == "ask":
                asks.add(event.ask_id)  # type: ignore[attr-defined]
            elif kind == "answered":
                asks.remove(event.ask_id)  # type: ignore[attr-defined]
            elif kind == "turn_ended":
                assert not asks, "an ask was left open"
                over.add(turn_id)
                open_turn = None
    if finished:
        assert open_turn is None
        assert not waiting
