"""A session: one nursery with a turn loop and a publisher, owned by the gateway and never by a connection.

Theory of operation
-------------------
Everything that decides is synchronous: `submit`, `abort`, `answer`, `attach`, `detach` change the session in one step
and never wait, so a reader calls them inline and nothing of what it read can wait behind something else. What takes
time happens in three tasks: the *turn loop*, which takes one input after the other from the inbox, the turn's *agent*,
and the *publisher*.

An input is in the `Inbox`, in one place of it, until a turn takes it or it is withdrawn.

"Busy" is not a flag: a turn is `self.turn`, set in the step that takes its inputs and unset in the one that makes its
`turn_ended` visible; inputs are only taken while there is none, so at most one turn runs. The agent starts in the step
that makes `turn_started` visible. The loop is for what remains: inputs that had to wait, and starts that have to read
older events first. The next input is its next iteration: constant stack, constant tasks.

A turn ends in one step, `_close_turn`: it closes the turn's open questions and hands in its `Finish`. The agent's task
does it when the agent is through; `stop_turn` says why it should be (the first reason counts), and if the agent is not
within ``stop_timeout``, the loop does it. An agent that is still there then is on its own: it can write nothing any
more, and its task belongs to no turn.
A turn's time is watched by one cancel scope around the whole loop. Its deadline may be early, that of a turn before:
then the loop looks, and goes on. In the same way all agents run in one nursery, whose scope stops them, until one is
cancelled; the next one gets another. Entering a scope for each turn would cost, for either, a twentieth of a short one.
The tasks start with the first input; a session that is only joined has none.

What fails in the engine itself (a store that contradicts it) ends the session: in one step nothing of it can write
any more and its owner is told, who lets it be loaded again; its tasks are cancelled.

The module is longer than others here: what decides about inputs and turns shares one state, changes it in single steps,
and is read together.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from math import inf

import structlog
import trio

from gateway.config import Limits
from gateway.protocol import codec
from gateway.protocol.keys import Key, Keys, digest_of
from gateway.protocol.log import UNBOUNDED, Log, Tails
from gateway.protocol.messages import (
    Abort,
    Aborted,
    Accepted,
    Answer,
    AnswerOk,
    AskOutcome,
    ClientSignal,
    Credit,
    Error,
    ErrorInfo,
    Event,
    Input,
    LastDisconnect,
    Message,
    Presence,
    RequestId,
    ResyncReason,
    Signal,
    TurnStarted,
    Withdrawn,
)
from gateway.protocol.view import SessionView, encode_snapshot
from gateway.session.failures import AGENT_ERRORS, explain, outcome_of, refusal
from gateway.session.inbox import Inbox, Place, QueuedInput
from gateway.session.older import Older
from gateway.session.publisher import Finish, Pacer, Publisher
from gateway.session.reader import Reader, after_calls
from gateway.session.sources import Sources
from gateway.session.turn import PendingAsk, Turn, answered
from gateway.store import SessionRecord, Store, StoredSession

Agent = Callable[[Turn], Awaitable[str | None]]
"""What the engine runs. It may return text, which becomes the turn's output; `gateway.agents` makes one of anything."""

INBOX_RETRY_MS = 1_000
"""When to try again after ``inbox_full``: about a short turn. A client with credit at zero is told sooner."""

STORE_RETRY_MS = 1_000

MAX_REQUEST_IDS = 100_000
"""Idempotency keys of one session within its resume window, 300 bytes each. Forgetting one early would break a
promise, so beyond this inputs are refused: 100,000 messages a day in one conversation are a loop."""

MAX_ATTEMPTS = 3
"""Runs of one turn that keeps being lost: an agent that takes the process down with it must not do so for ever."""

_STRAY = (
    "the agent was cancelled though nobody had stopped it: by a cancel scope that it entered and did not leave, "
    "or left in an async generator (is there a `yield` in a `with trio.fail_after(...)`?)"
)

_NUMBERS = 512
"""Bytes that an `answered` event has beside its value."""

_log = structlog.get_logger(__name__)


class Session:
    """One conversation. Made by the registry, which also runs `run` in the gateway's nursery.

    Args:
        stored: what the store had, or None for a new session.
        max_detached_ms: how long a turn may run with nobody attached; 0 for as long as it likes.
        retry_lost: run the inputs of a turn that was lost in a crash again.
        tails: what the session's log may hold in memory.
        on_failed: told when the engine itself fails; without it, `run` raises.
        start: has `run` called soon; called once, when there is something to do. Without it the owner does it unasked.
        pacer: decides when what agents write is published (see `Publisher`).
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
        tails: Tails = UNBOUNDED,
        on_failed: Callable[[Session, Exception], None] | None = None,
        start: Callable[[Session], None] | None = None,
        pacer: Pacer | None = None,
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
        self._kept = 0
        self._max_detached_ms = max_detached_ms
        self._on_failed = on_failed
        self._start = start
        self._life = trio.CancelScope()
        self._timer = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        self._agents: trio.Nursery | None = None
        """Where the next agent starts: the nursery of those before, None if one of them was cancelled."""
        self._turn_over = trio.lowlevel.ParkingLot()
        self._work = trio.lowlevel.ParkingLot()
        """Where the turn loop waits. Unparked by whatever may let it go on; it looks for itself what there is to do."""
        self._inbox = Inbox(max(limits.max_inbox, len(stored.queue) if stored else 0))
        self.log = Log(
            max_events=limits.replay_max_events,
            max_bytes=limits.replay_max_bytes,
            base=stored.floor if stored else 0,
            older=stored.older if stored else (),
            tails=tails,
        )
        self.older = Older(record.session_id, self.log, store, limits)
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
            pacer=pacer,
        )
        self.recovered = trio.Event()
        """Set once a turn that the last process left open has its end in the log, or the session has `failed`; nobody
        joins before."""
        self.failed = False
        if stored is not None:
            self._restore(stored, retry_lost)
        if not (stored and stored.turn):
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
        self._inbox.restore(
            [
                QueuedInput(item.event, item.on_busy, digest_of(item.event.content, item.event.metadata))  # type: ignore[arg-type]
                for item in stored.queue
            ]
        )
        lost = stored.turn
        if lost is None:
            return
        self.publisher.open_turn(lost.turn_id, stored.asks)
        error = ErrorInfo(code="lost", message="the gateway stopped while this turn ran", retryable=True)
        self.publisher.enqueue(Finish(lost.turn_id, "lost", error), lambda _: self.recovered.set())
        overtaken = any(item.on_busy == "interrupt" for item in stored.queue)
        if retry_lost and stored.turn_inputs and lost.attempt < MAX_ATTEMPTS and not overtaken:
            # In one batch with the end of the lost turn: from one of them to the next nobody would own its inputs.
            self._begin_turn([item.event for item in stored.turn_inputs], lost.attempt + 1)

    # life

    def start(self) -> None:
        """Have the session's tasks run, if they do not yet. Never waits."""
        start, self._start = self._start, None
        if start is not None:
            start(self)

    async def run(self) -> None:
        """Run the session's two tasks until `close` or cancellation. Owned by the gateway's nursery."""
        self._context = copy_context()
        try:
            with self._life:
                async with trio.open_nursery() as self._nursery:
                    self._nursery.start_soon(self._guard, self.publisher.run)
                    await self._guard(self._turn_loop)
        finally:
            self._nursery = None
            self.publisher.forget_session()

    async def _guard(self, part: Callable[[], Awaitable[None]]) -> None:
        try:
            await part()
        except Exception as exc:
            if self._on_failed is None:
                raise
            # Told at once, and not when the nursery has ended: an agent may shield itself from being cancelled.
            if not self.failed:
                self.failed = True
                if (turn := self.turn) is not None:
                    self.turn = None
                    turn._closed = True
                    self._turn_over.unpark_all()
                self._life.cancel()
                self._on_failed(self, exc)
                self.recovered.set()

    def close(self) -> None:
        """End the session's tasks. Only for a session that is `at_rest`, or whose process is about to end."""
        self._life.cancel()

    @property
    def busy(self) -> bool:
        """Whether a turn runs or an input waits: one look at live things, no flag beside them."""
        return self.turn is not None or bool(self._inbox.waiting)

    @property
    def _most_pending(self) -> int:
        """Replies that may wait for one and the same thing; more than that is one client asking again and again."""
        return self.limits.max_control_frames + len(self.readers)

    @property
    def waiting(self) -> int:
        """Inputs that no turn has taken yet."""
        return len(self._inbox.waiting)

    @property
    def at_rest(self) -> bool:
        """Whether nothing would be lost if the session left memory."""
        return not self._kept and not self.readers and not self.busy and self.publisher.idle

    @property
    def credit(self) -> int:
        """Inputs that may still be sent before the inbox is full, as far as their bytes allow."""
        inbox, limits = self._inbox, self.limits
        if inbox.held_bytes >= limits.max_inbox_bytes:
            return 0
        return max(0, limits.max_inbox - inbox.held)

    # connections

    def attach(self, reader: Reader) -> None:
        """Add a connection; the others hear of it."""
        member = reader.member
        for other in self.readers.values():
            other.push(Presence(event="joined", connection_id=member.connection_id, subject=member.subject))
        self.readers[member.connection_id] = reader
        if (turn := self.turn) is not None and turn._stop_reason is None:
            self._until(turn, turn._max_deadline)

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
        if self._max_detached_ms and turn._stop_reason is None:
            self._until(turn, min(turn._max_deadline, trio.current_time() + self._max_detached_ms / 1000))

    def signal(self, frame: ClientSignal, sender: Reader) -> None:
        """Pass an ephemeral message on to the session's other connections."""
        signal = Signal(name=frame.name, data=frame.data, from_=sender.member)
        for reader in self.readers.values():
            if reader is not sender:
                reader.push(signal)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the session in memory for someone who is about to attach to it, and has to wait first."""
        self._kept += 1
        try:
            yield
        finally:
            self._kept -= 1

    def snapshot(self, reason: ResyncReason, older: Sequence[Event] = ()) -> bytes:
        """The encoded snapshot at ``log.head``, where the caller goes on; `older` is from `Older.for_snapshot`."""
        return encode_snapshot(
            self.view,
            self.log,
            epoch=self.record.epoch,
            reason=reason,
            max_events=self.limits.snapshot_max_events,
            max_bytes=self.limits.max_frame_bytes,
            older=older,
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
        storing = self._inbox.storing.get(request_id)
        # An input may wait for longer than its key is kept; it is still the same message.
        waiting = storing or self._inbox.waiting.get(request_id)
        known = key.digest if key is not None else waiting.digest if waiting is not None else None
        if known is not None and known != digest:
            self._refuse(reader, request_id, "request_id_conflict", "was used before with another content")
            return
        if storing is not None:
            if len(storing.repliers) >= self._most_pending:
                self._refuse(reader, request_id, "rate_limited", "it is being stored; its answer will come")
                return
            storing.repliers.append(self._replier(reader, storing))
            return
        if known is not None:
            seq = key.seq if key is not None else waiting.event.seq  # type: ignore[union-attr]
            waiting = self._inbox.waiting.get(request_id)
            ahead = self._inbox.ahead(waiting) if waiting is not None else 0
            self._accept(reader, request_id, seq, ahead, duplicate=True)
            return
        if self.draining:
            self._refuse(reader, request_id, "draining", "the gateway is stopping; send it again after reconnecting")
            return
        if frame.on_busy == "reject" and self.busy:
            self._refuse(reader, request_id, "busy", "a turn is running or inputs are waiting")
            return
        if self.credit == 0:
            inbox = self._inbox
            full = f"{inbox.held:,} inputs of {inbox.held_bytes:,} bytes are waiting"
            self._refuse(reader, request_id, "inbox_full", full, INBOX_RETRY_MS, 0)
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
        queued = QueuedInput(event, frame.on_busy, digest)
        queued.repliers.append(self._replier(reader, queued))
        at_once = not self.busy
        self._inbox.admit(queued)
        self.publisher.enqueue(
            event, lambda stored: self._stored(queued, stored is not None), digest=digest, on_busy=frame.on_busy
        )
        if at_once:
            # The input and the start of its turn are stored as one: half the waiting, and half the transactions.
            self._begin_turn(self._inbox.take([queued]))
        self.publisher.hurry()
        self.start()

    def _replier(self, reader: Reader, queued: QueuedInput) -> Callable[[Error | None, int, bool], None]:
        event = queued.event

        def reply(error: Error | None, ahead: int, duplicate: bool) -> None:
            if error is not None:
                reader.push(error)
            else:
                self._accept(reader, event.request_id, event.seq, ahead, duplicate=duplicate)

        return reply

    def _accept(self, reader: Reader, request_id: str, seq: int, ahead: int, *, duplicate: bool) -> None:
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
        reader.push(refusal(request_id, code, why, retry_after_ms, credit))

    def _stored(self, queued: QueuedInput, ok: bool) -> None:
        """An input's event is visible, or could not be stored. No await here: from now on a turn may take it."""
        request_id = queued.event.request_id
        repliers, queued.repliers = queued.repliers, []
        if not ok:
            self._inbox.refused(queued)
            error = refusal(request_id, "unavailable", "the message could not be stored; send it again", STORE_RETRY_MS)
            for reply in repliers:
                reply(error, 0, False)
            self._tell_credit()
            return
        ahead = self._inbox.stored(queued)
        self.keys.add(request_id, Key(queued.event.seq, queued.digest, queued.event.at))
        for i, reply in enumerate(repliers):
            reply(None, ahead, i > 0)
        if queued.place is Place.GONE:
            self._tell_credit()
            return
        turn = self.turn
        if queued.on_busy == "steer" and turn is not None and not turn._closed:
            queued.place = Place.STEER
            turn._steer.append(queued)
        elif queued.on_busy == "interrupt":
            self._inbox.insert([queued])
            if turn is not None:
                self.stop_turn(turn, "interrupted")
        else:
            self._inbox.append(queued)
        if turn is None:
            self._work.unpark()

    def _tell_credit(self) -> None:
        """Whoever was told that there is no room hears that there is."""
        credit = self.credit
        if credit:
            for reader in self.readers.values():
                if reader.told_no_credit:
                    reader.told_no_credit = False
                    reader.push(Credit(credit=credit))

    def _withdraw(self, inputs: Sequence[QueuedInput], done: Callable[[], None]) -> None:
        """Take waiting inputs out of wherever they are; `done` is called when the log says so of all of them."""
        if not inputs:
            done()
            return
        if self.turn is not None:
            gone = set(map(id, inputs))
            self.turn._steer = [queued for queued in self.turn._steer if id(queued) not in gone]
        self._inbox.withdraw(inputs)
        each = after_calls(len(inputs), done)
        for queued in inputs:
            event = Withdrawn(request_id=queued.event.request_id, reason="aborted")
            self.publisher.enqueue(event, lambda _: each())
        self._tell_credit()

    def take_steered(self, turn: Turn) -> list[Input]:
        """Give a running turn what was handed to it; see `Turn.steered`."""
        steered, turn._steer = turn._steer, []
        taken = self._inbox.take(steered)
        for event in taken:
            self.publisher.enqueue(Withdrawn(request_id=event.request_id, reason="steered", turn_id=turn.turn_id))
        if taken:
            self._tell_credit()
        return taken

    # stopping and answering

    def abort(self, frame: Abort, reader: Reader) -> None:
        """Stop the turn, withdraw queued inputs, or both: withdraw BEFORE cancel, so nothing moves up in between."""
        turn = self.turn
        if frame.request_id is not None:
            queued = self._inbox.waiting.get(frame.request_id)
            if queued is None:
                message = f"field 'request_id': {frame.request_id!r} is not waiting in the queue"
                reader.push(Error(code="unknown_request", message=message, request_id=frame.request_id))
                return
            self._stop(reader, None, [queued])
            return
        inputs: list[QueuedInput] = []
        if frame.turn_id is not None or frame.scope == "turn":
            if turn is None or frame.turn_id not in (None, turn.turn_id):
                which = "no turn is running" if turn is None else f"field 'turn_id': {frame.turn_id!r} is not running"
                reader.push(Error(code="no_active_turn", message=which))
                return
        else:
            inputs += self._inbox.waiting.values()
            turn = turn if frame.scope == "all" else None
        if turn is not None and len(turn._on_ended) >= self._most_pending:
            reader.push(Error(code="rate_limited", message="the turn is being stopped already", retryable=True))
            return
        self._stop(reader, turn, inputs, everything=frame.turn_id is None and frame.scope == "all")

    def _stop(
        self, reader: Reader, turn: Turn | None, inputs: Sequence[QueuedInput], *, everything: bool = False
    ) -> None:
        turn_id = None if turn is None else turn.turn_id
        withdrawn: list[str] = [queued.event.request_id for queued in inputs]

        def reply() -> None:
            if turn is None or not turn._discarded:
                reader.push(Aborted(turn_id=turn_id, withdrawn=withdrawn))
            elif everything:
                reader.push(Aborted(turn_id=None, withdrawn=withdrawn))
            else:
                reader.push(Error(code="no_active_turn", message="the turn's input could not be stored: it never ran"))

        # The turn may be ending already, so either can be in the log first; the reply promises both.
        done = after_calls(1 if turn is None else 2, reply)
        self._withdraw(inputs, done)
        if turn is not None:
            turn._on_ended.append(done)
            self.stop_turn(turn, "aborted")

    def stop_turn(self, turn: Turn, reason: str) -> None:
        """Ask a turn to end; the first reason counts. It ends within ``stop_timeout``, whatever its agent does.

        An agent that has returned is not stopped any more: its turn ends as it would have.
        """
        if turn._stop_reason is None and not turn._closed:
            turn._stop_reason = reason
            if turn._agents is not None:
                turn._agents.cancel_scope.cancel()
                self._agents = None
            self._until(turn, trio.current_time() + self.limits.stop_timeout_ms / 1000)

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
        room = self.limits.max_frame_bytes - _NUMBERS
        if type(frame.value) is str and (size := len(codec.dump_json(frame.value))) > room:
            message = f"field 'value': {size:,} bytes do not fit into an event; expected at most {room:,}"
            reader.push(Error(code="invalid_frame", message=message))
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
        while True:
            with trio.CancelScope(deadline=self._due) as self._timer:
                while True:
                    await self._go_on()
                    # No await from the look at things to the waiting: whatever changes them wakes the loop.
                    await self._work.park()
            self._look_at_time()

    async def _go_on(self) -> None:
        """Begin the next turn, or start the agent of one that has begun, if it is time for that.

        Cancelling is safe: called again, it goes on.
        """
        if self.turn is None and not self.draining:  # what waits then stays stored, and runs after the restart
            queued = self._inbox.next()
            if queued is not None:
                taken = [queued]
                if queued.on_busy == "collect":
                    taken += self._inbox.following(queued)
                self._begin_turn(self._inbox.take(taken))
                self._tell_credit()
        turn = self.turn
        # Stored before the agent starts: after a crash the log says that it may have run.
        if turn is not None and turn._started and not turn._running and not turn._closed:
            turn._older = await self.older.for_transcript()
            self._start_agent(turn)

    def _begin_turn(self, inputs: Sequence[Input], attempt: int = 1) -> None:
        """Make the turn and write its start. Its agent starts when that is stored."""
        # No await between taking inputs out and having a turn: an input is in the inbox or owned by a turn.
        turn = self.turn = Turn(self, f"t_{self.sources.new_id()}", inputs, attempt)
        started = TurnStarted(
            turn_id=turn.turn_id, request_ids=[item.request_id for item in inputs], attempt=turn.attempt
        )

        def visible(event: Event | None) -> None:
            if event is None:
                self._discard(turn)
                return
            turn._started = True
            if self._nursery is None or self.older.wanted_for_transcript:
                self._work.unpark()  # that is the loop's, which can wait
            else:
                self._start_agent(turn)

        self.publisher.enqueue(started, visible)

    def _discard(self, turn: Turn) -> None:
        """The store has refused the turn's input: neither ever was. Its agent has not been started."""
        self.turn = None
        turn._closed = turn._discarded = True
        for reply in turn._on_ended:
            reply()
        self._turn_over.unpark_all()
        self._work.unpark()

    def _start_agent(self, turn: Turn) -> None:
        """Run the agent, once: no more than one call for a turn."""
        assert self._nursery is not None
        if turn._closed or self._life.cancel_called:
            return  # the session ends
        if turn._stop_reason is not None:
            self._close_turn(turn)
            return
        turn._running = True
        turn._max_deadline = trio.current_time() + self.limits.max_turn_ms / 1000
        self._until(turn, turn._max_deadline)
        if not self.readers:
            self._limit_detached(turn)
        # Owned by the session; ends by itself, or by `stop_turn`. Its own task, so that an agent that does not react to
        # its cancellation cannot wedge the session; in the session's context variables, whoever has shown its start.
        turn._agents = self._agents
        if turn._agents is not None:
            self._context.run(turn._agents.start_soon, self._run_agent, turn)
        else:
            self._context.run(self._nursery.start_soon, self._host_agents, turn)

    # a turn's time

    def _until(self, turn: Turn, deadline: float) -> None:
        """Look at the turn then, if its agent still runs."""
        turn._deadline = deadline
        if turn._running and deadline < self._timer.deadline:
            self._timer.deadline = deadline

    @property
    def _due(self) -> float:
        turn = self.turn
        return turn._deadline if turn is not None and turn._running and not turn._closed else inf

    def _look_at_time(self) -> None:
        """The loop's timer went off: stop the turn if its time is over, and give its agent up if it was to stop."""
        turn, now = self.turn, trio.current_time()
        if turn is None or now < self._due:
            return
        if turn._stop_reason is None:
            self.stop_turn(turn, "timed_out" if now >= turn._max_deadline else "detached")
        else:
            _log.error("agent_ignores_cancellation", session_id=self.record.session_id, turn_id=turn.turn_id)
            self._close_turn(turn)

    async def _host_agents(self, first: Turn) -> None:
        """Run this turn's agent, and those of later turns, until one of them was cancelled and is through."""
        async with trio.open_nursery() as agents:
            first._agents = self._agents = agents
            try:
                agents.start_soon(self._run_agent, first)
                await trio.sleep_forever()
            finally:
                self._agents = None
        turn = self.turn
        # Not in a `finally`: a turn whose session is cancelled has no end, and is lost.
        if turn is not None and turn._agents is agents and not turn._closed:
            if turn._stop_reason is None and turn._failure is None:
                turn._failure = self._explain(turn, RuntimeError(_STRAY))
            self._close_turn(turn)

    async def _run_agent(self, turn: Turn) -> None:
        try:
            if turn._stop_reason is None:
                turn._take_result(await self._agent(turn))
        # `except*`: what an agent raises when it is cancelled comes in one group with that.
        except* AGENT_ERRORS as group:
            turn._failure = self._explain(turn, group)
        if not turn._closed:
            self._close_turn(turn)

    def _explain(self, turn: Turn, exc: BaseException) -> ErrorInfo:
        session_id, reference = self.record.session_id, self.sources.new_id()
        if turn._stop_reason is None and not turn._closed:
            return explain(exc, reference, session_id=session_id, turn_id=turn.turn_id)
        # Its turn ends for another reason; that clean-up failed is the usual echo of a cancellation.
        _log.info("agent_failed_when_stopped", session_id=session_id, turn_id=turn.turn_id, error=type(exc).__name__)
        return ErrorInfo(code="agent_error", message="the agent failed when it was stopped")

    def _close_turn(self, turn: Turn) -> None:
        """Close what the turn left open and write its end. It can write nothing from now on."""
        outcome, error = outcome_of(turn._stop_reason, turn._failure, self.limits)
        for pending in list(turn._asks.values()):
            self.decide_ask(turn, pending, "cancelled")
        turn._closed = True
        back, turn._steer = turn._steer, []
        if back:
            self._inbox.insert(back)
        text = turn._result if outcome == "completed" else None

        def visible() -> None:
            # One step with the event's appearance: who sees `turn_ended` finds the session free.
            self.turn = None
            self.idle_since = trio.current_time()
            for reply in turn._on_ended:
                reply()
            if self._turn_over:
                self._turn_over.unpark_all()
            if self._inbox.waiting:
                self._work.unpark()

        awaited = outcome != "completed" or bool(turn._on_ended or self._inbox.waiting)
        self.publisher.enqueue(Finish(turn.turn_id, outcome, error, text, awaited=awaited), lambda _: visible())

    async def finish_turn(self, timeout: float) -> None:
        """Wait until no turn runs, at most `timeout` seconds; then end it as ``interrupted`` and wait for that. For a
        session that is `draining`, so no other turn begins."""
        with trio.move_on_after(timeout):
            await self._without_turn()
        if self.turn is not None:
            self.stop_turn(self.turn, "interrupted")
            await self._without_turn()

    async def _without_turn(self) -> None:
        while self.turn is not None:
            await self._turn_over.park()
