"""The publisher: the one place where a session's events get their numbers, are stored, and become visible.

Theory of operation
-------------------
Two ways in. The *outbox* is a memory channel of fixed capacity that the agent writes to and waits for when it is full.
The *intake* is for the engine itself (inputs, answers, withdrawals, the ends of turns); each of its users is bounded
by a limit of its own (``max_inbox``, ``max_asks``, one turn), so it needs no capacity, and none of them may wait.

A pass takes all there is: first the outbox, then the intake, so an end of turn comes after everything its turn wrote.
It numbers the events (adjacent deltas become one that has the numbers of all), hands the durable ones to the store as
one batch, and when they are stored makes all of them visible in one step without an await: into the log, into the view,
to whoever waits for them, to the readers.

What is written does not wake a task. It marks the publisher as dirty, and the gateway's flusher calls `flush` in its
next pass, just before it visits the readers: while many sessions stream, one pass takes several deltas of each. What
somebody waits for does not wait for that: an input goes to the store in the step that accepts it, and what a turn says
first goes to the readers in the step that says it. A batch that the store takes its time for is handed to it, and goes
to the readers in the step in which it hears that it was stored, unless it is but the end of a long answer that they
have already; only one is on its way at a time. The task is for stores that have to be waited for, and for those that
fail.

    stored BEFORE visible: a client, or another task, never sees a durable event that a crash could take back
    volatile events flow at once, but never before an earlier durable one

Text is sealed here too, because only here is its order known: when a channel's unsealed text reaches
``segment_bytes``, an `Output` with ``metadata.more`` replaces its deltas; the end of a turn seals what is left.

While the store cannot write, a batch waits and is tried again; only its inputs are refused, because their senders can
keep them. `failing` says so to whoever would hand in another one. Any other error of the store ends the session.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from hashlib import blake2b
from math import inf
from typing import Protocol

import structlog
import trio
from attrs import define, field

from gateway.config import Limits
from gateway.errors import StoreError, StoreFenced, StoreUnavailable, StoreUnusable
from gateway.protocol import codec
from gateway.protocol.log import Log
from gateway.protocol.messages import (
    Answered,
    Ask,
    Delta,
    ErrorInfo,
    Event,
    Input,
    Output,
    TurnEnded,
    TurnOutcome,
    TurnStarted,
    Withdrawn,
)
from gateway.protocol.view import SessionView
from gateway.session.sources import Sources
from gateway.session.stack import DELIVER, WAKE, check_stack, has_room
from gateway.store import Store, Stored

NUMBER_BLOCK = 16_384
"""Numbers reserved ahead. A block is taken along with an input or the start of a turn, and lasts for longer than nearly
every answer, so streaming does not write to the store for it. A crash skips at most this many; there are 2**53."""

RETRY_FIRST, RETRY_MOST = 0.05, 1.0
"""Seconds between tries while the store cannot write: soon enough to be unnoticed once, seldom enough not to hammer."""

ESCAPED = 6
"""JSON may need so many bytes for one character of text (``\\u0000``)."""

Text = tuple[str, str, str]
"""Turn id, channel and text of one `Turn.send`. There are so many of them that each being an event would show."""

Done = Callable[[Event | None], None]
"""Called once, synchronously: with the event when it has become visible, or with None when it could not be stored. It
may `enqueue` what follows, which the pacer's next pass takes; it must not `hurry`."""

_log = structlog.get_logger(__name__)


MERGED_MOST = 4096
"""Bytes of text from which on a merged delta is cut: more than any model makes between two passes."""

SHORT_END = 4096
"""Bytes of text, in JSON, up to which the end of a streamed answer is as urgent as its beginning. A longer one costs a
multiple, its readers have it already or get it with the end, and the ends of answers that began together come together:
at once, they would be before whoever asks next."""

SHORT_REST = 64
"""Entries in the outbox up to which the same goes: an agent that has its answer at once writes it between two passes.
With a smaller `max_outbox` the publisher has come by."""

_ENDING = {Output, TurnEnded}


@define
class Finish:
    """The end of a turn, as the engine hands it in: expands to the outputs that are left, then the `turn_ended`.

    `text` is what the agent returned: the text of the channel ``answer``, as a whole. `awaited`: something is to be
    done when it has ended.
    """

    turn_id: str
    outcome: TurnOutcome
    error: ErrorInfo | None = None
    text: str | None = None
    awaited: bool = field(default=True, kw_only=True)


@define
class _Tail:
    """A channel's text since its last output, as numbered. `size` is in bytes of text, `encoded` in bytes of JSON."""

    parts: list[str] = field(factory=list)
    size: int = 0
    encoded: int = 0


class _Sealed:
    """What a turn's outputs on ``answer`` say so far, joined. Most turns have one output, which the log has anyway; of
    more only length and digest are kept, they may be long."""

    def __init__(self) -> None:
        self.characters = 0
        self._first = ""
        self._state: blake2b | None = None

    def add(self, text: str) -> None:
        if not self.characters:
            self._first = text
        else:
            if self._state is None:
                self._state = blake2b(self._first.encode(), digest_size=16)
                self._first = ""
            self._state.update(text.encode())
        self.characters += len(text)

    def begins(self, text: str) -> bool:
        if self._state is None:
            return text.startswith(self._first)
        head = text[: self.characters]
        return len(head) == self.characters and blake2b(head.encode(), digest_size=16).digest() == self._state.digest()


@define
class _Item:
    """Something for the intake. `digest` and `on_busy` go with an `Input` to the store."""

    what: Event | Finish
    done: Done | None = None
    digest: bytes | None = None
    on_busy: str = "queue"


@define
class _Numbered:
    event: Event
    item: _Item | None = None
    parts: list[str] | None = None
    """Of a delta: the texts that were sent, one for each of its numbers."""
    payload: bytes | None = None


class Pacer(Protocol):
    """Decides when publishers are flushed."""

    def mark_publisher(self, publisher: Publisher, *, urgent: bool = False, patient: bool = False) -> None:
        """Have `Publisher.flush` called soon, or with the scheduler's next pass: if it is `urgent`, or was not visited
        lately and is not `patient`."""

    def publish(self, publisher: Publisher) -> None:
        """Call `Publisher.flush` in this step; readers are written to in the next pass of the scheduler."""

    def deliver(self, publisher: Publisher) -> None:
        """Call `Publisher.flush`, and write to the readers, in this step."""


class Publisher:
    """Numbers, stores and shows a session's events.

    Args:
        reserved: the highest number that may have been shown before; numbering goes on above it.
        on_visible: called after events became visible, once per pass.
        pacer: told when there is something new; has `flush` called. Without it the task looks at once.

    Attributes:
        outbox: where the agent writes; whoever does calls `mark` then.
        dirty, visited_at: the pacer's; `dirty` is 0 once it, or without it the task, has come by.
    """

    def __init__(
        self,
        session_id: str,
        log: Log,
        view: SessionView,
        store: Store,
        limits: Limits,
        sources: Sources,
        *,
        next_seq: int,
        reserved: int,
        on_visible: Callable[[], None],
        pacer: Pacer | None = None,
    ) -> None:
        self._session_id = session_id
        self._log = log
        self._view = view
        self._store = store
        self._limits = limits
        self._sources = sources
        self._on_visible = on_visible
        self._pacer = pacer
        self.dirty = 0
        self.visited_at = -inf
        self._next = next_seq
        self._reserved = reserved
        self._intake: list[_Item] = []
        # Capacity: `max_outbox`. More would only delay the moment at which a fast agent is told to wait.
        self.outbox, self._outgoing = trio.open_memory_channel[Event | Text](limits.max_outbox)
        self._turn_id: str | None = None
        self._spoken = False
        """Whether something of the turn's agent was delivered at once; what follows may come together."""
        self._tails: dict[str, _Tail] = {}
        self._unsealed = 0
        """JSON bytes of all tails. They are in every snapshot, beside the state, the asks and the queue."""
        segments, frame = 2 * limits.segment_bytes, limits.max_frame_bytes
        self._unsealed_most = max(frame // 8, min(segments, frame // 4))
        self._sealed = _Sealed()
        self._asks: dict[str, None] = {}
        """The turn's open asks, in order of number: each is answered exactly once, and before the turn's end."""
        self._work = trio.lowlevel.ParkingLot()
        self._batch: list[_Numbered] = []
        """Numbered, and the task's to commit."""
        self._working = False
        """Whether a batch is on its way: handed to the store, or the task's."""
        self._handed: tuple[list[_Numbered], int, bool] | None = None
        """A batch that the store was given, the reservation that goes with it, and whether it is patient."""
        self._patient = False
        """Whether the turn has ended and nobody waits for that: a long answer that its readers have, or get with it."""
        self._stored_it = False
        self._failed: StoreError | None = None
        """How storing the task's batch has ended before it got it."""
        self._direct = pacer is not None and store.direct
        self._error: Exception | None = None
        self._retrying = False
        self._unavailable = False
        self._try_again_at = -inf
        self._pause = RETRY_FIRST

    # ways in

    def enqueue(
        self, what: Event | Finish, done: Done | None = None, *, digest: bytes | None = None, on_busy: str = "queue"
    ) -> None:
        """Hand in an event of the engine's own. Never waits; `done` tells when it is visible."""
        self._intake.append(_Item(what, done, digest, on_busy))
        if self._direct:
            assert self._pacer is not None
            patient = type(what) is Finish and what.text is None and not what.awaited and self._long
            self._patient = self._patient or patient
            self._pacer.mark_publisher(self, urgent=not patient, patient=patient)
        else:
            self._work.unpark()

    def hurry(self) -> None:
        """Have what was handed in stored, and shown if the store needs no waiting, in this step."""
        if self._direct:
            assert self._pacer is not None
            self._pacer.publish(self)

    def mark(self) -> None:
        """The outbox has something new. Never waits. Called by agents.

        Raises:
            RecursionError: the agent has left too little of the stack. What is in the outbox stays there.
        """
        if self._pacer is None:
            check_stack(WAKE)
            self.dirty = 1
            self._work.unpark()
        elif not self.dirty:
            if not self._spoken and not self._working and has_room(DELIVER):
                # What its reader waits for. A pass of the scheduler later is a millisecond or two when others stream.
                self._spoken = True
                self._pacer.deliver(self)
            else:
                check_stack(WAKE)
                self._pacer.mark_publisher(self, urgent=self._silent)

    @property
    def _long(self) -> bool:
        """Whether the end of what was streamed costs much. What is in the outbox is counted: it has no size yet."""
        return self._unsealed > SHORT_END or self._outgoing.statistics().current_buffer_used > SHORT_REST

    @property
    def _silent(self) -> bool:
        """Whether the turn has shown no text yet."""
        return not self._tails and not self._sealed.characters

    def open_turn(self, turn_id: str, asks: Iterable[str] = ()) -> None:
        """Take events of this turn from now on, as its `TurnStarted` does; events of any other turn are dropped."""
        self._turn_id = turn_id
        self._spoken = self._patient = False
        self._asks = dict.fromkeys(asks)
        self._tails = {}
        self._unsealed = 0
        self._sealed = _Sealed()

    @property
    def failing(self) -> bool:
        """Whether the store cannot write at the moment; new inputs are refused meanwhile.

        With nothing to retry it is believed to be back after a pause: the next input finds out.
        """
        return self._unavailable and (self._retrying or trio.current_time() < self._try_again_at)

    @property
    def idle(self) -> bool:
        """Whether nothing is on its way."""
        return not self._working and not self._intake and self._outgoing.statistics().current_buffer_used == 0

    def forget_session(self) -> None:
        """Call nobody any more: the session has ended. Without this circle it leaves memory at once, and not when the
        garbage collector comes by, which in a process with many objects it seldom does."""
        self._on_visible = _nothing

    # the task, and the way without one

    async def run(self) -> None:
        """Publish until cancelled. When it ends, whoever waits to write gets `trio.BrokenResourceError`."""
        with self._outgoing:
            while True:
                if self._error is not None:
                    raise self._error
                if self._handed is None:
                    if self._pacer is None:
                        self.dirty = 0
                    batch, self._batch = self._batch or self._collect(), []
                    self._working = bool(batch)
                    if batch:
                        await self._commit(batch)
                        continue
                await self._work.park()

    def flush(self) -> None:
        """Show what has been stored, and publish what waits, as far as that takes no waiting."""
        if self._error is not None:
            return  # the session is about to end: nothing comes after what could not be shown
        if self._stored_it:
            self._show_handed()
        if self._working:
            return  # whatever comes now is taken when that is through
        batch = self._collect()
        if batch and (batch := self._show_volatile(batch)):
            self._working = True
            if self._direct:
                self._hand_over(batch)
            else:
                self._give_to_task(batch)

    def _show_handed(self) -> None:
        """Show what the store was handed, and has stored."""
        assert self._handed is not None
        (batch, self._reserved, _), self._handed = self._handed, None
        self._stored_it = False
        self._show(batch)
        self._working = False

    def _hand_over(self, batch: list[_Numbered]) -> None:
        stored, reserved = self._what_to_store(batch)
        patient = self._patient and {type(item.event) for item in stored} == _ENDING
        self._handed = batch, reserved, patient
        try:
            self._stored_it = self._store.append_soon(
                self._session_id, stored, reserved, self._appended, patient=patient
            )
        except StoreError as exc:
            self._appended(exc)
        else:
            if self._stored_it:
                self._show_handed()

    def _appended(self, error: StoreError | None) -> None:
        """The store is through with what it was handed."""
        assert self._pacer is not None
        assert self._handed is not None
        if error is None:
            self._stored_it = True
            if self._handed[2] and not self._intake:
                # However long the store took: those that come together stay together, behind who asks now.
                self._pacer.mark_publisher(self, patient=True)
            else:
                self._pacer.deliver(self)
        else:
            batch, self._handed = self._handed[0], None
            self._give_to_task(batch, error)

    def _give_to_task(self, batch: list[_Numbered], error: StoreError | None = None) -> None:
        """Have the task store it, or do what is to be done after that has failed."""
        self._batch = batch
        self._failed = error
        self._work.unpark()

    def crashed(self, exc: Exception) -> None:
        """`flush` failed: the task ends with its error."""
        self._error = exc
        self._work.unpark()

    def _collect(self) -> list[_Numbered]:
        """Take, merge and number everything that waits: the outbox, then the intake."""
        batch: list[_Numbered] = []
        now = self._sources.now_ms()
        receive = self._outgoing.receive_nowait
        turn_id = channel = ""
        parts: list[str] = []
        size = room = 0
        while True:
            try:
                event = receive()
            except trio.WouldBlock:
                break
            if type(event) is tuple:
                of, on, text = event
                if parts and (size >= room or on != channel or of != turn_id):
                    self._number_text(turn_id, channel, parts, now, batch)
                    parts = []
                if not parts:
                    turn_id, channel, size = of, on, 0
                    # Not beyond the point where the channel is sealed.
                    tail = self._tails.get(channel)
                    room = min(MERGED_MOST, self._limits.segment_bytes - (tail.size if tail else 0))
                parts.append(text)
                size += len(text) if text.isascii() else len(text.encode())
                continue
            if parts:
                self._number_text(turn_id, channel, parts, now, batch)
                parts = []
            self._number(event, now, batch)  # type: ignore[arg-type]
        if parts:
            self._number_text(turn_id, channel, parts, now, batch)
        intake, self._intake = self._intake, []
        for item in intake:
            if isinstance(item.what, Finish):
                self._finish(item, item.what, now, batch)
            else:
                self._number(item.what, now, batch, item)
        return batch

    def _number_text(self, turn_id: str, channel: str, parts: list[str], now: int, batch: list[_Numbered]) -> None:
        """Number texts, each its own, and put them into the batch as one delta."""
        if turn_id == self._turn_id:
            self._next += len(parts) - 1
        self._number(Delta(turn_id=turn_id, channel=channel, text="".join(parts)), now, batch, parts=parts)

    def _number(
        self,
        event: Event,
        now: int,
        batch: list[_Numbered],
        item: _Item | None = None,
        *,
        parts: list[str] | None = None,
    ) -> None:
        kind = type(event)
        if kind is TurnStarted:
            self.open_turn(event.turn_id)  # type: ignore[attr-defined]
        elif kind is not Withdrawn:
            turn_id = getattr(event, "turn_id", None)
            if turn_id is not None and turn_id != self._turn_id:
                _drop(item)  # written by a turn that has ended
                return
        if type(event) is Ask:
            self._asks[event.ask_id] = None
        elif type(event) is Answered:
            if event.ask_id not in self._asks:
                _drop(item)  # its agent was cancelled before it could ask
                return
            del self._asks[event.ask_id]
        event.seq = event.first = self._next
        event.at = now
        self._next += 1
        batch.append(_Numbered(event, item, parts))
        if type(event) is Delta:
            self._add_text(event.channel, event.text, now, batch)
        elif type(event) is Output:
            self._drop_tail(event.channel)
            if event.channel == "answer":
                self._sealed.add(event.content)

    def _add_text(self, channel: str, text: str, now: int, batch: list[_Numbered]) -> None:
        tail = self._tails.get(channel)
        if tail is None:
            tail = self._tails[channel] = _Tail()
        size = len(text) if text.isascii() else len(text.encode())
        encoded = len(codec.dump_json(text)) - 2
        tail.parts.append(text)
        tail.size += size
        tail.encoded += encoded
        self._unsealed += encoded
        if tail.size >= self._limits.segment_bytes:
            self._seal(channel, {"more": True}, now, batch)
        elif self._unsealed >= self._unsealed_most:
            for name in list(self._tails):
                self._seal(name, {"more": True}, now, batch)

    def _drop_tail(self, channel: str) -> _Tail | None:
        tail = self._tails.pop(channel, None)
        if tail is not None:
            self._unsealed -= tail.encoded
        return tail

    def _seal(self, channel: str, metadata: dict[str, object], now: int, batch: list[_Numbered]) -> None:
        tail = self._drop_tail(channel)
        if tail is not None:
            assert self._turn_id is not None
            text = "".join(tail.parts)
            self._number(Output(turn_id=self._turn_id, channel=channel, content=text, metadata=metadata), now, batch)

    def _finish(self, item: _Item, finish: Finish, now: int, batch: list[_Numbered]) -> None:
        if finish.text:
            for output in self._final_outputs(finish.turn_id, finish.text):
                self._number(output, now, batch)
        for channel in list(self._tails):
            self._seal(channel, {} if finish.outcome == "completed" else {"partial": True}, now, batch)
        for ask_id in list(self._asks):
            self._number(Answered(turn_id=finish.turn_id, ask_id=ask_id, outcome="cancelled"), now, batch)
        ended = TurnEnded(turn_id=finish.turn_id, outcome=finish.outcome, error=finish.error)
        self._number(ended, now, batch, item)
        self._turn_id = None

    def _final_outputs(self, turn_id: str, text: str) -> list[Output]:
        """Returned text as outputs, in segments if it is long.

        What outputs have said already is not said again: an agent that streams an answer and returns the whole of it
        has the same text in the log whether or not it was long enough to be sealed on the way.
        """
        if self._sealed.begins(text):
            text = text[self._sealed.characters :]
            if not text and "answer" not in self._tails:
                return []
        most = self._limits.segment_bytes if text.isascii() else self._limits.segment_bytes // 4
        if not text.isprintable():
            most = min(most, self._unsealed_most // ESCAPED)
        pieces = [text[i : i + most] for i in range(0, len(text), most)] or [""]
        outputs = [Output(turn_id=turn_id, channel="answer", content=piece) for piece in pieces]
        for output in outputs[:-1]:
            output.metadata = {"more": True}
        return outputs

    def _show_volatile(self, batch: list[_Numbered]) -> list[_Numbered]:
        """Show what need not be stored and has nothing before it that must be; returns the rest."""
        reserved = self._reserved
        count = 0
        for one in batch:
            if not one.event.volatile or one.event.seq > reserved:
                break
            count += 1
        if count:
            self._show(batch[:count])
        return batch[count:]

    def _what_to_store(self, batch: list[_Numbered]) -> tuple[list[Stored], int]:
        """The batch's durable events, and the reservation that its numbers need."""
        last = batch[-1].event.seq
        # Half a block is left when the next one is taken, so streaming rarely waits for it.
        reserved = self._reserved if last + NUMBER_BLOCK // 2 <= self._reserved else last + NUMBER_BLOCK
        return [self._stored(one) for one in batch if not one.event.volatile], reserved

    async def _commit(self, batch: list[_Numbered]) -> None:
        """Store what is durable, then show everything, in order."""
        while batch := self._show_volatile(batch):
            stored, reserved = self._what_to_store(batch)
            if await self._store_or_trim(stored, reserved, batch):
                self._reserved = reserved
                self._show(batch)
                return

    async def _store_or_trim(self, stored: list[Stored], reserved: int, batch: list[_Numbered]) -> bool:
        """Append; if the store cannot write, refuse the batch's inputs and wait a little. True when it is stored."""
        failed, self._failed = self._failed, None
        try:
            if failed is not None:
                raise failed
            await self._store.append(self._session_id, stored, reserved)
        except StoreUnavailable as exc:
            if not self._unavailable:
                self._unavailable = True
                _log.error("store_unavailable", session_id=self._session_id, error=str(exc))
            pause, self._pause = self._pause, min(RETRY_MOST, self._pause * 2)
            self._try_again_at = trio.current_time() + pause
            batch[:] = self._refuse_inputs(batch)
            if batch:
                self._retrying = True
                await trio.sleep(pause)
            else:
                self._retrying = False
            return False
        except (StoreFenced, StoreUnusable):
            # It will not become better. Their senders can keep the inputs; what else there is ends with the session.
            self._refuse_inputs(batch)
            raise
        self._retrying = False
        self._try_again_at = -inf
        self._pause = RETRY_FIRST
        if self._unavailable:
            self._unavailable = False
            _log.info("store_available_again", session_id=self._session_id)
        return True

    def _refuse_inputs(self, batch: list[_Numbered]) -> list[_Numbered]:
        """Give a batch's inputs back to their senders; returns the rest of it."""
        refused: set[str] = set()
        keep: list[_Numbered] = []
        unneeded: list[_Item] = []
        for one in batch:
            event, item = one.event, one.item
            if type(event) is Input:
                assert item is not None
                assert item.done is not None
                refused.add(event.request_id)
                item.done(None)
            elif type(event) is TurnStarted and refused.issuperset(event.request_ids):
                self._turn_id = None
                _drop(item)
            elif type(event) is Withdrawn and event.request_id in refused:
                if item is not None:
                    unneeded.append(item)
            else:
                keep.append(one)
        # An input that never came to be must not be withdrawn in the log; who asked for that has got what it asked for.
        # From now on nobody can withdraw it any more, so all such events are either in the batch or in the intake.
        for item in list(self._intake):
            if type(item.what) is Withdrawn and item.what.request_id in refused:
                self._intake.remove(item)
                unneeded.append(item)
        for item in unneeded:
            if item.done is not None:
                item.done(None)
        return keep

    def _stored(self, one: _Numbered) -> Stored:
        if one.payload is None:
            one.payload = codec.encode_event(one.event, one.event.seq)
        item = one.item
        return Stored(one.event, one.payload, item.digest if item else None, item.on_busy if item else "queue")

    def _show(self, batch: list[_Numbered]) -> None:
        """Make events visible, in one step. No await here: a snapshot's state and position must agree."""
        log, view = self._log, self._view
        for one in batch:
            log.append(one.event, one.payload, one.parts)
            view.apply(one.event)
            # Before the next event: a reply to an input comes before the start of its turn.
            if one.item is not None and one.item.done is not None:
                one.item.done(one.event)
        self._on_visible()


def _nothing() -> None:
    pass


def _drop(item: _Item | None) -> None:
    if item is not None and item.done is not None:
        item.done(None)
