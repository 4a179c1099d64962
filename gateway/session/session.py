"""A session: one nursery with a turn loop and a publisher, owned by the gateway and never by a connection.

Theory of operation
-------------------
Everything that decides is synchronous: `submit`, `abort`, `answer`, `attach`, `detach` change the session in one step
and never wait, so a reader calls them inline and nothing of what it read can wait behind something else. What takes
time happens in two tasks: the *turn loop*, which takes one input after the other from the inbox and runs the agent,
and the *publisher*.

An input is in exactly one place at any time, and `_waiting` knows all of them until a turn takes them:

    STORING ──▶ INBOX ──▶ (the turn loop)          withdrawn from any of these: GONE
        └─────▶ STEER ──▶ taken by the running turn, or back to INBOX when it ends

"Busy" is not a flag: a turn is `self.turn`, set when the loop takes its inputs and unset in the step that makes its
`turn_ended` visible. At most one turn runs because there is one loop. The next input is the loop's next iteration:
constant stack, constant tasks.

A turn ends in one way: `stop_turn` says why (the first reason counts), the loop waits for the agent's task within
``stop_timeout``, closes the turn's open questions, hands in its `Finish`, and waits until the `turn_ended` is visible.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from enum import Enum
from functools import partial
from itertools import takewhile
from typing import Protocol

import structlog
import trio
from attrs import define, field

from gateway.config import Limits
from gateway.errors import TurnFailed
from gateway.protocol.keys import Key, Keys, digest_of
from gateway.protocol.log import Log
from gateway.protocol.messages import (
    Abort,
    Aborted,
    Accepted,
    Answer,
    AnswerOk,
    AskOutcome,
    BusyMode,
    ClientSignal,
    Credit,
    Error,
    ErrorInfo,
    Input,
    LastDisconnect,
    Member,
    Message,
    Output,
    Presence,
    RequestId,
    ResyncReason,
    ServerFrame,
    Signal,
    TurnOutcome,
    TurnStarted,
    Withdrawn,
)
from gateway.protocol.view import SessionView, encode_snapshot
from gateway.session.publisher import Finish, Publisher
from gateway.session.sources import Sources
from gateway.session.turn import PendingAsk, Turn, answered
from gateway.store import SessionRecord, Store, StoredInput, StoredSession

Agent = Callable[[Turn], Awaitable[str | None]]
"""What the engine runs. It may return text, which becomes the turn's output; `gateway.agents` makes one of anything."""

INBOX_RETRY_MS = 1_000
"""When to try again after ``inbox_full``: about a short turn. A client with credit at zero is told sooner."""

STORE_RETRY_MS = 1_000

MAX_REQUEST_IDS = 100_000
"""Idempotency keys of one session within its resume window, 300 bytes each. Forgetting one early would break a
promise, so beyond this inputs are refused: 100,000 messages a day in one conversation are a loop."""

_log = structlog.get_logger(__name__)


class Reader(Protocol):
    """A connection, as its session sees it. All synchronous."""

    member: Member
    told_no_credit: bool
    """Whether the client was last told ``credit: 0``, and so must hear when there is room."""

    def wake(self) -> None:
        """There is something new behind the reader's cursor."""

    def push(self, frame: ServerFrame) -> None:
        """Send a frame without a number; droppable ones are dropped for a client that is behind."""

    def session_failed(self) -> None:
        """The session ended by an error of its own: close with 1011."""


class Place(Enum):
    STORING = "being stored"
    INBOX = "in the inbox"
    STEER = "handed to the running turn"
    GONE = "withdrawn"


@define(eq=False)
class QueuedInput:
    """An accepted (or nearly accepted) input that no turn has taken yet."""

    event: Input
    on_busy: BusyMode
    place: Place = Place.STORING
    digest: bytes = b""
    step_back: bool = False
    """Set when the loop has it in hand but something must run before it."""
    repliers: list[Callable[[Error | None, bool], None]] = field(factory=list)
    """Whoever sent it and waits for `accepted`: called with an error or None, and whether it is a repetition."""

    @property
    def rank(self) -> tuple[bool, int]:
        """The order of the inbox: those that interrupt, then the rest, each by number."""
        return self.on_busy != "interrupt", self.event.seq


class Session:
    """One conversation. Made by the registry, which also runs `run` in the gateway's nursery.

    Args:
        stored: what the store had, or None for a new session.
        max_detached_ms: how long a turn may run with nobody attached; 0 for as long as it likes.
        retry_lost: run the inputs of a turn that was lost in a crash again.
    """

    def __init__(
        self,
        record: SessionRecord,
        agent: Agent,
        store: Store,
        limits: Limits,
        sources: Sources,
        *,
        reserved: int,
        stored: StoredSession | None = None,
        max_detached_ms: int = 0,
        retry_lost: bool = False,
    ) -> None:
        self.record = record
        self.limits = limits
        self.sources = sources
        self.durable = store.durable
        self.readers: dict[str, Reader] = {}
        self.turn: Turn | None = None
        self.draining = False
        self.idle_since = trio.current_time()
        self.last_disconnect: dict[str, LastDisconnect] = {}
        self.keys = Keys(limits.resume_window_ms)
        self._agent = agent
        self._max_detached_ms = max_detached_ms
        self._waiting: dict[str, QueuedInput] = {}
        # Capacity: `max_inbox`. It is never waited on: `submit` refuses before it is full.
        self._inbox_in, self._inbox_out = trio.open_memory_channel[QueuedInput](limits.max_inbox)
        self._nursery: trio.Nursery | None = None
        self._attempts: dict[str, int] = {}
        head = stored.floor if stored else 0
        self.log = Log(max_events=limits.replay_max_events, max_bytes=limits.replay_max_bytes, base=head)
        self.view = SessionView()
        self.publisher = Publisher(
            record.session_id,
            self.log,
            self.view,
            store,
            limits,
            sources,
            next_seq=1 if stored is None else stored.reserved + 1,
            reserved=reserved,
            on_visible=self._wake_readers,
        )
        self.recovered = trio.Event()
        """Set once a turn that the last process left open has its end in the log; nobody joins before."""
        if stored is not None:
            self._restore(stored, retry_lost)
        if stored is None or stored.turn is None:
            self.recovered.set()

    def _restore(self, stored: StoredSession, retry_lost: bool) -> None:
        """Continue where the store's history ends. A turn that was open is lost: its end gets a number above every
        number that a client may have seen."""
        for event in stored.events:
            self.log.append(event)
            self.view.apply(event)
        self.view.cursor = self.log.head
        self.view.state = stored.state
        self.view.queue = {item.event.request_id: item.event.seq for item in stored.queue}
        for request_id, key in stored.keys:
            self.keys.add(request_id, key)
        waiting: list[StoredInput] = list(stored.queue)
        if stored.turn is not None:
            turn_id = stored.turn.turn_id
            self.publisher.open_turn(turn_id)
            for ask in self.view.asks.values():
                self.publisher.enqueue(answered(PendingAsk(ask, outcome="cancelled"), turn_id, None))
            error = ErrorInfo(code="lost", message="the gateway stopped while this turn ran", retryable=True)
            self.publisher.enqueue(Finish(turn_id, "lost", error), lambda _: self.recovered.set())
            if retry_lost and stored.turn.attempt < 3:
                waiting = stored.turn_inputs + waiting
                for item in stored.turn_inputs:
                    self._attempts[item.event.request_id] = stored.turn.attempt + 1
        for item in waiting:
            queued = QueuedInput(item.event, item.on_busy, Place.INBOX)  # type: ignore[arg-type]
            self._waiting[item.event.request_id] = queued
        self._refill(list(self._waiting.values()))

    # life

    async def run(self) -> None:
        """Run the session's two tasks until `close` or cancellation. Owned by the gateway's nursery."""
        async with trio.open_nursery() as self._nursery:
            self._nursery.start_soon(self.publisher.run)
            await self._turn_loop()

    def close(self) -> None:
        """End the session's tasks. Only for a session that is `at_rest`, or whose process is about to end."""
        self._inbox_in.close()
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    @property
    def busy(self) -> bool:
        """Whether a turn runs or an input waits: one look at live things, no flag beside them."""
        return self.turn is not None or bool(self._waiting)

    @property
    def waiting(self) -> int:
        """Inputs that no turn has taken yet."""
        return len(self._waiting)

    @property
    def at_rest(self) -> bool:
        """Whether nothing would be lost if the session left memory."""
        return not self.readers and not self.busy and self.publisher.idle

    @property
    def credit(self) -> int:
        """Inputs that may still be sent before the inbox is full."""
        return max(0, self.limits.max_inbox - len(self._waiting))

    # connections

    def attach(self, reader: Reader) -> None:
        """Add a connection; the others hear of it."""
        member = reader.member
        for other in self.readers.values():
            other.push(Presence(event="joined", connection_id=member.connection_id, subject=member.subject))
        self.readers[member.connection_id] = reader
        if self.turn is not None:
            self.turn._limit_scope.deadline = self.turn._max_deadline

    def detach(self, reader: Reader, code: int, reason: str) -> None:
        """Remove a connection. The turn goes on; touches nothing that belongs to another connection."""
        member = reader.member
        if self.readers.pop(member.connection_id, None) is None:
            return
        self.last_disconnect[member.subject] = LastDisconnect(code=code, reason=reason, at=self.sources.now_ms())
        if len(self.last_disconnect) > 16:  # subjects with a grant; only the newest few are of use
            del self.last_disconnect[next(iter(self.last_disconnect))]
        for other in self.readers.values():
            other.push(Presence(event="left", connection_id=member.connection_id, subject=member.subject))
        if not self.readers:
            self.idle_since = trio.current_time()
            if self.turn is not None:
                self._limit_detached(self.turn)

    def _limit_detached(self, turn: Turn) -> None:
        if self._max_detached_ms:
            deadline = trio.current_time() + self._max_detached_ms / 1000
            turn._limit_scope.deadline = min(turn._max_deadline, deadline)

    def signal(self, frame: ClientSignal, sender: Reader) -> None:
        """Pass an ephemeral message on to the session's other connections."""
        signal = Signal(name=frame.name, data=frame.data, from_=sender.member)
        for reader in self.readers.values():
            if reader is not sender:
                reader.push(signal)

    def snapshot(self, reason: ResyncReason) -> bytes:
        """The encoded snapshot at ``log.head``; the caller continues with what follows it."""
        return encode_snapshot(
            self.view,
            self.log,
            epoch=self.record.epoch,
            reason=reason,
            max_events=self.limits.snapshot_max_events,
            max_bytes=self.limits.max_frame_bytes,
        )

    def _wake_readers(self) -> None:
        for reader in self.readers.values():
            reader.wake()

    # inputs

    def submit(self, frame: Message, reader: Reader) -> None:
        """Take in a message, or refuse it; the sender gets `accepted` once it is stored, or `error`.

        The idempotency key is looked up first: a repetition gets the answer of the original, whatever the session
        is doing now.
        """
        request_id = frame.request_id
        digest = digest_of(frame.content, frame.metadata)
        self.keys.expire(self.sources.now_ms())
        key = self.keys.get(request_id)
        waiting = self._waiting.get(request_id)
        known = key.digest if key is not None else waiting.digest if waiting is not None else None
        if known is not None and known != digest:
            self._refuse(reader, request_id, "request_id_conflict", "was used before with another content")
            return
        if key is not None:
            self._accept(reader, request_id, key.seq, duplicate=True)
            return
        if waiting is not None:
            waiting.repliers.append(self._replier(reader, request_id))
            return
        if self.draining:
            self._refuse(reader, request_id, "draining", "the gateway is stopping; send it again after reconnecting")
            return
        if frame.on_busy == "reject" and self.busy:
            self._refuse(reader, request_id, "busy", "a turn is running or inputs are waiting")
            return
        if len(self._waiting) >= self.limits.max_inbox:
            self._refuse(
                reader, request_id, "inbox_full", f"{self.limits.max_inbox} inputs are waiting", INBOX_RETRY_MS, 0
            )
            return
        if self.publisher.failing:
            self._refuse(reader, request_id, "unavailable", "the store cannot write; try again", STORE_RETRY_MS)
            return
        if len(self.keys) >= MAX_REQUEST_IDS:
            self._refuse(
                reader, request_id, "rate_limited", f"{MAX_REQUEST_IDS:,} messages within the resume window", 60_000
            )
            return
        event = Input(
            request_id=RequestId(request_id),
            content=frame.content,
            metadata=frame.metadata,
            sender=reader.member.subject,
        )
        queued = QueuedInput(event, frame.on_busy, digest=digest)
        queued.repliers.append(self._replier(reader, request_id))
        self._waiting[request_id] = queued
        self.publisher.enqueue(
            event, lambda stored: self._stored(queued, stored is not None), digest=digest, on_busy=frame.on_busy
        )

    def _replier(self, reader: Reader, request_id: str) -> Callable[[Error | None, bool], None]:
        def reply(error: Error | None, duplicate: bool) -> None:
            if error is not None:
                reader.push(error)
                return
            key = self.keys.get(request_id)
            assert key is not None
            self._accept(reader, request_id, key.seq, duplicate=duplicate)

        return reply

    def _accept(self, reader: Reader, request_id: str, seq: int, *, duplicate: bool) -> None:
        queued = self._waiting.get(request_id)
        if queued is None or queued.place is Place.GONE:
            ahead = 0
        else:
            ahead = sum(other.rank < queued.rank for other in self._waiting.values() if other.event.seq)
        credit = self.credit
        reader.told_no_credit = credit == 0
        reader.push(
            Accepted(
                request_id=request_id,
                seq=seq,
                queued=ahead,
                duplicate=duplicate,
                durable=self.durable,
                credit=credit,
            )
        )

    def _refuse(
        self,
        reader: Reader,
        request_id: str,
        code: str,
        why: str,
        retry_after_ms: int | None = None,
        credit: int | None = None,
    ) -> None:
        if credit == 0:
            reader.told_no_credit = True
        retryable = code != "request_id_conflict"
        message = f"field 'request_id': {why}" if code == "request_id_conflict" else why
        reader.push(
            Error(
                code=code,
                message=message,
                retryable=retryable,
                retry_after_ms=retry_after_ms,
                request_id=request_id,
                credit=credit,
            )
        )

    def _stored(self, queued: QueuedInput, ok: bool) -> None:
        """An input's event is visible, or could not be stored. No await here: from now on a turn may take it."""
        request_id = queued.event.request_id
        if not ok:
            self._waiting.pop(request_id, None)
            queued.place = Place.GONE
            error = Error(
                code="unavailable",
                message="the message could not be stored; send it again",
                retryable=True,
                retry_after_ms=STORE_RETRY_MS,
                request_id=request_id,
            )
            for reply in queued.repliers:
                reply(error, False)
            self._tell_credit()
            return
        self.keys.add(request_id, Key(queued.event.seq, queued.digest, queued.event.at))
        repetition = False
        for reply in queued.repliers:
            reply(None, repetition)
            repetition = True
        queued.repliers.clear()
        if queued.place is Place.GONE:
            return
        turn = self.turn
        if queued.on_busy == "steer" and turn is not None and not turn._closed:
            queued.place = Place.STEER
            turn._steer.append(queued)
            return
        self._to_inbox([queued])
        if queued.on_busy == "interrupt" and turn is not None:
            self.stop_turn(turn, "interrupted")

    def _to_inbox(self, inputs: Sequence[QueuedInput]) -> None:
        """Put stored inputs into the inbox at their rank."""
        for queued in inputs:
            queued.place = Place.INBOX
        newest = inputs[-1]
        in_inbox = (other.rank for other in self._waiting.values() if other.place is Place.INBOX)
        if len(inputs) == 1 and max(in_inbox) == newest.rank:
            self._inbox_in.send_nowait(newest)
            return
        self._refill([*self._drain_inbox(), *inputs])

    def _drain_inbox(self) -> list[QueuedInput]:
        taken: list[QueuedInput] = []
        while True:
            try:
                taken.append(self._inbox_out.receive_nowait())
            except trio.WouldBlock:
                return taken

    def _refill(self, inputs: Sequence[QueuedInput]) -> None:
        """Fill the (emptied) inbox in the order of rank. No await here: the loop sees it before or after, not between.

        An input that the loop was handed but has not looked at yet is in neither; if something here ranks before it,
        it has to step back.
        """
        ordered = sorted(inputs, key=lambda queued: queued.rank)
        here = set(map(id, ordered))
        for queued in self._waiting.values():
            if queued.place is Place.INBOX and id(queued) not in here and ordered and ordered[0].rank < queued.rank:
                queued.step_back = True
        for queued in ordered:
            self._inbox_in.send_nowait(queued)

    def _tell_credit(self) -> None:
        """Whoever was told that there is no room hears that there is."""
        credit = self.credit
        if credit:
            for reader in self.readers.values():
                if reader.told_no_credit:
                    reader.told_no_credit = False
                    reader.push(Credit(credit=credit))

    def _withdraw(self, inputs: Sequence[QueuedInput], done: Callable[[], None]) -> list[str]:
        """Take waiting inputs out of wherever they are; `done` is called when the log says so."""
        if not inputs:
            done()
            return []
        gone = set(map(id, inputs))
        for queued in inputs:
            queued.place = Place.GONE
            del self._waiting[queued.event.request_id]
        self._refill([queued for queued in self._drain_inbox() if id(queued) not in gone])
        if self.turn is not None:
            self.turn._steer = [queued for queued in self.turn._steer if id(queued) not in gone]
        for queued in inputs:
            last = queued is inputs[-1]
            event = Withdrawn(request_id=queued.event.request_id, reason="aborted")
            self.publisher.enqueue(event, (lambda _: done()) if last else None)
        self._tell_credit()
        return [queued.event.request_id for queued in inputs]

    def take_steered(self, turn: Turn) -> list[Input]:
        """Give a running turn what was handed to it; see `Turn.steered`."""
        taken, turn._steer = turn._steer, []
        for queued in taken:
            queued.place = Place.GONE
            del self._waiting[queued.event.request_id]
            event = Withdrawn(request_id=queued.event.request_id, reason="steered", turn_id=turn.turn_id)
            self.publisher.enqueue(event)
        if taken:
            self._tell_credit()
        return [queued.event for queued in taken]

    # stopping and answering

    def abort(self, frame: Abort, reader: Reader) -> None:
        """Stop the turn, withdraw queued inputs, or both: withdraw BEFORE cancel, so nothing moves up in between."""
        turn = self.turn
        if frame.request_id is not None:
            queued = self._waiting.get(frame.request_id)
            if queued is None:
                message = f"field 'request_id': {frame.request_id!r} is not waiting in the queue"
                reader.push(Error(code="unknown_request", message=message, request_id=frame.request_id))
                return
            self._reply_aborted(reader, None, [queued])
            return
        if frame.turn_id is not None or frame.scope == "turn":
            if turn is None or frame.turn_id not in (None, turn.turn_id):
                which = "no turn is running" if turn is None else f"field 'turn_id': {frame.turn_id!r} is not running"
                reader.push(Error(code="no_active_turn", message=which))
                return
            self._reply_aborted(reader, turn, [])
            return
        self._reply_aborted(reader, turn if frame.scope == "all" else None, list(self._waiting.values()))

    def _reply_aborted(self, reader: Reader, turn: Turn | None, inputs: Sequence[QueuedInput]) -> None:
        turn_id = None if turn is None else turn.turn_id
        withdrawn: list[str] = [queued.event.request_id for queued in inputs]

        def reply() -> None:
            reader.push(Aborted(turn_id=turn_id, withdrawn=withdrawn))

        if turn is None:
            self._withdraw(inputs, reply)
        else:
            self._withdraw(inputs, lambda: None)
            turn._on_ended.append(reply)
            self.stop_turn(turn, "aborted")

    def stop_turn(self, turn: Turn, reason: str) -> None:
        """Ask a turn to end; the first reason counts. It ends within ``stop_timeout``, whatever its agent does."""
        if turn._stop_reason is None and not turn._closed:
            turn._stop_reason = reason
            turn._scope.cancel()
            turn._settled.set()

    def answer(self, frame: Answer, reader: Reader) -> None:
        """Answer an open ask; the first valid answer counts."""
        turn = self.turn
        pending = turn._asks.get(frame.ask_id) if turn is not None else None
        if turn is None or pending is None or pending.outcome is not None or frame.ask_id not in self.view.asks:
            message = f"field 'ask_id': {frame.ask_id!r} is not open"
            reader.push(Error(code="unknown_ask", message=message))
            return
        problem = pending.accepts(frame.value)
        if problem is not None:
            reader.push(Error(code="invalid_frame", message=f"field 'value': {problem}"))
            return
        pending.value = frame.value
        self.decide_ask(
            turn,
            pending,
            "answered",
            by=reader.member.connection_id,
            visible=lambda: reader.push(AnswerOk(ask_id=frame.ask_id)),
        )

    def decide_ask(
        self,
        turn: Turn,
        pending: PendingAsk,
        outcome: AskOutcome,
        *,
        by: str | None = None,
        visible: Callable[[], None] = lambda: None,
    ) -> None:
        """Close an ask, exactly once; its agent goes on when everyone can see it."""
        assert pending.outcome is None
        pending.outcome = outcome
        if outcome != "answered":
            pending.value = False if pending.event.kind == "approval" else None
        del turn._asks[pending.event.ask_id]

        def decided() -> None:
            visible()
            pending.decided.set()

        self.publisher.enqueue(answered(pending, turn.turn_id, by), lambda _: decided())

    # the turn loop

    async def _turn_loop(self) -> None:
        await self.recovered.wait()
        async for queued in self._inbox_out:
            if self.draining:
                await trio.sleep_forever()  # what waits stays stored, and runs after the restart
            if queued.place is not Place.INBOX:
                continue  # withdrawn while it was handed over
            if queued.step_back:
                queued.step_back = False
                self._refill([*self._drain_inbox(), queued])
                continue
            inputs = [queued]
            if queued.on_busy == "collect":
                rest = self._drain_inbox()
                same = partial(_collects, queued.event.sender)
                together = list(takewhile(same, rest))
                inputs += together
                self._refill(rest[len(together) :])
            await self._run_turn([item.event for item in inputs])

    async def _run_turn(self, inputs: Sequence[Input]) -> None:
        """Run the agent once. When this returns, the turn's `turn_ended` is visible and its work is over."""
        attempt = max(self._attempts.pop(item.request_id, 1) for item in inputs)
        turn = Turn(self, f"t_{self.sources.new_id()}", inputs, attempt)
        turn._max_deadline = trio.current_time() + self.limits.max_turn_ms / 1000
        # No await between taking the inputs out and having a turn: an input is in the inbox or owned by a turn.
        self.turn = turn
        for item in inputs:
            del self._waiting[item.request_id]
        self._tell_credit()
        self.publisher.open_turn(turn.turn_id)
        # Stored before the agent starts: after a crash the log says that it may have run.
        await self.publisher.publish(
            TurnStarted(turn_id=turn.turn_id, request_ids=[item.request_id for item in inputs], attempt=attempt)
        )
        if turn._stop_reason is None:
            assert self._nursery is not None
            # Owned by the session; ends by itself, or by `stop_turn`. Its own task, so that an agent that does not
            # react to its cancellation cannot wedge the session.
            self._nursery.start_soon(self._run_agent, turn)
            turn._limit_scope.deadline = turn._max_deadline
            if not self.readers:
                self._limit_detached(turn)
            with turn._limit_scope:
                await turn._settled.wait()
            if not turn._settled.is_set():
                timed_out = trio.current_time() >= turn._max_deadline
                self.stop_turn(turn, "timed_out" if timed_out else "detached")
            with trio.move_on_after(self.limits.stop_timeout_ms / 1000):
                await turn._finished.wait()
            if not turn._finished.is_set():
                _log.error("agent_ignores_cancellation", session_id=self.record.session_id, turn_id=turn.turn_id)
        await self._end_turn(turn)

    async def _run_agent(self, turn: Turn) -> None:
        try:
            with turn._scope:
                turn._take_result(await self._agent(turn))
        except Exception as exc:
            turn._result = None
            turn._failure = self._explain(turn, exc)
        finally:
            turn._finished.set()
            turn._settled.set()

    def _explain(self, turn: Turn, exc: Exception) -> ErrorInfo:
        """What the client may know of an agent's exception; the operator gets the rest, by a reference id."""
        leaf: BaseException = exc
        while isinstance(leaf, BaseExceptionGroup):
            leaf = next((item for item in leaf.exceptions if isinstance(item, TurnFailed)), leaf.exceptions[0])
        if isinstance(leaf, TurnFailed):
            return ErrorInfo(code=leaf.code, message=leaf.message, retryable=leaf.retryable)
        if turn._stop_reason is None:
            reference = self.sources.new_id()
            _log.error(
                "agent_failed",
                session_id=self.record.session_id,
                turn_id=turn.turn_id,
                reference=reference,
                error=f"{type(leaf).__name__}: {leaf}",
                exc_info=exc,
            )
            return ErrorInfo(code="agent_error", message=f"the agent failed (reference {reference})", retryable=True)
        return ErrorInfo(code="agent_error", message="the agent failed while it was being stopped", retryable=True)

    async def _end_turn(self, turn: Turn) -> None:
        """Close what the turn left open and write its end."""
        outcome, error = self._outcome(turn)
        for pending in list(turn._asks.values()):
            self.decide_ask(turn, pending, "cancelled")
        turn._closed = True
        back, turn._steer = turn._steer, []
        if back:
            self._to_inbox(back)
        outputs = self._final_outputs(turn) if outcome == "completed" else ()

        def visible() -> None:
            # One step with the event's appearance: who sees `turn_ended` finds the session free.
            self.turn = None
            self.idle_since = trio.current_time()
            for reply in turn._on_ended:
                reply()
            turn._ended.set()

        self.publisher.enqueue(Finish(turn.turn_id, outcome, error, outputs), lambda _: visible())
        await turn._ended.wait()

    def _outcome(self, turn: Turn) -> tuple[TurnOutcome, ErrorInfo | None]:
        reason = turn._stop_reason
        if reason == "turn_too_large":
            message = f"the turn wrote more than {self.limits.max_turn_bytes:,} bytes"
            return "failed", ErrorInfo(code="turn_too_large", message=message)
        if reason == "detached":
            message = "nobody was attached for too long"
            return "aborted", ErrorInfo(code="detached", message=message, retryable=True)
        if reason == "timed_out":
            message = f"the turn ran for more than {self.limits.max_turn_ms:,} ms"
            return "timed_out", ErrorInfo(code="timed_out", message=message, retryable=True)
        if reason is not None:
            return reason, None  # type: ignore[return-value]
        if turn._failure is not None:
            return "failed", turn._failure
        return "completed", None

    def _final_outputs(self, turn: Turn) -> list[Output]:
        """Returned text as outputs, in segments if it is long."""
        text = turn._result
        if not text:
            return []
        size = self.limits.segment_bytes // 4  # characters; at most `segment_bytes` of UTF-8
        if text.isascii():
            size = self.limits.segment_bytes
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        return [
            Output(
                turn_id=turn.turn_id,
                channel="answer",
                content=piece,
                metadata={"more": True} if i + 1 < len(pieces) else {},
            )
            for i, piece in enumerate(pieces)
        ]

    async def finish_turn(self, timeout: float) -> None:
        """Wait until no turn runs, at most `timeout` seconds; then end it as ``interrupted`` and wait for that."""
        with trio.move_on_after(timeout):
            while self.turn is not None:
                await self.turn._ended.wait()
        if (turn := self.turn) is not None:
            self.stop_turn(turn, "interrupted")
            await turn._ended.wait()


def _collects(sender: str, queued: QueuedInput) -> bool:
    return queued.on_busy == "collect" and queued.event.sender == sender
