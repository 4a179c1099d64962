"""The publisher: the one place where a session's events get their numbers, are stored, and become visible.

Theory of operation
-------------------
Two ways in. The *outbox* is a memory channel of fixed capacity that the agent writes to and waits for when it is full.
The *intake* is for the engine itself (inputs, answers, withdrawals, the ends of turns); each of its users is bounded
by a limit of its own (``max_inbox``, ``max_asks``, one turn), so it needs no capacity, and none of them may wait.

A pass takes all there is: first the outbox, then the intake, so an end of turn comes after everything its turn wrote.
It numbers the events, hands the durable ones to the store as one batch, and when they are stored makes all of them
visible in one step without an await: into the log, into the view, to whoever waits for them, to the readers.

    stored BEFORE visible: a client, or another task, never sees a durable event that a crash could take back
    volatile events flow at once, but never before an earlier durable one

Text is sealed here too, because only here is its order known: when a channel's unsealed text reaches
``segment_bytes``, an `Output` with ``metadata.more`` replaces its deltas; the end of a turn seals what is left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

import structlog
import trio
from attrs import define, field, frozen

from gateway.config import Limits
from gateway.errors import StoreUnavailable
from gateway.protocol import codec
from gateway.protocol.log import Log
from gateway.protocol.messages import Delta, ErrorInfo, Event, Input, Output, TurnEnded, TurnOutcome, Withdrawn
from gateway.protocol.view import SessionView
from gateway.session.sources import Sources
from gateway.store import Store, Stored

NUMBER_BLOCK = 1024
"""Numbers reserved ahead. A block lasts for seconds of fast streaming, and a crash skips at most this many."""

RETRY_FIRST, RETRY_MOST = 0.05, 1.0
"""Seconds between tries while the store cannot write: soon enough to be unnoticed once, seldom enough not to hammer."""

Done = Callable[[Event | None], None]
"""Called once, synchronously: with the event when it has become visible, or with None when it could not be stored."""

_log = structlog.get_logger(__name__)


@frozen
class Finish:
    """The end of a turn, as the engine hands it in: expands to the outputs that are left, then the `turn_ended`."""

    turn_id: str
    outcome: TurnOutcome
    error: ErrorInfo | None = None
    outputs: Sequence[Output] = ()


@define
class _Tail:
    """A channel's text since its last output, as numbered."""

    parts: list[str] = field(factory=list)
    size: int = 0


@frozen
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
    payload: bytes | None = None


class Publisher:
    """Numbers, stores and shows a session's events.

    Args:
        reserved: the highest number that may have been shown before; numbering goes on above it.
        on_visible: called after events became visible, once per pass.
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
    ) -> None:
        self._session_id = session_id
        self._log = log
        self._view = view
        self._store = store
        self._limits = limits
        self._sources = sources
        self._on_visible = on_visible
        self._next = next_seq
        self._reserved = reserved
        self._intake: deque[_Item] = deque()
        # Capacity: `max_outbox`. More would only delay the moment at which a fast agent is told to wait.
        self.outbox, self._outgoing = trio.open_memory_channel[Event | None](limits.max_outbox)
        self._turn_id: str | None = None
        self._tails: dict[str, _Tail] = {}
        self._working = False
        self.failing = False
        """Whether the store refuses writes at the moment; new inputs are refused meanwhile."""

    # ways in

    def enqueue(
        self, what: Event | Finish, done: Done | None = None, *, digest: bytes | None = None, on_busy: str = "queue"
    ) -> None:
        """Hand in an event of the engine's own. Never waits; `done` tells when it is visible."""
        self._intake.append(_Item(what, done, digest, on_busy))
        self._nudge()

    async def publish(self, what: Event | Finish) -> None:
        """Hand in an event and wait until it is visible. Cancelling does not take it back."""
        visible = trio.Event()
        self.enqueue(what, lambda _: visible.set())
        await visible.wait()

    def open_turn(self, turn_id: str) -> None:
        """Take events of this turn from now on; events of any other turn are dropped."""
        self._turn_id = turn_id
        self._tails = {}

    def _nudge(self) -> None:
        # If the outbox is full the publisher is about to look anyway.
        with suppress(trio.WouldBlock):
            self.outbox.send_nowait(None)

    @property
    def idle(self) -> bool:
        """Whether nothing is on its way."""
        return not self._working and not self._intake and self._outgoing.statistics().current_buffer_used == 0

    # the task

    async def run(self) -> None:
        """Publish until cancelled."""
        async for event in self._outgoing:
            self._working = True
            batch = self._collect(event)
            if batch:
                await self._commit(batch)
            self._working = False

    def _collect(self, first: Event | None) -> list[_Numbered]:
        """Take and number everything that waits: the outbox, then the intake."""
        batch: list[_Numbered] = []
        now = self._sources.now_ms()
        event = first
        while True:
            if event is not None:
                self._number(event, now, batch)
            try:
                event = self._outgoing.receive_nowait()
            except trio.WouldBlock:
                break
        while self._intake:
            item = self._intake.popleft()
            if isinstance(item.what, Finish):
                self._finish(item, item.what, now, batch)
            else:
                self._number(item.what, now, batch, item)
        return batch

    def _number(self, event: Event, now: int, batch: list[_Numbered], item: _Item | None = None) -> None:
        turn_id = getattr(event, "turn_id", None)
        if turn_id is not None and turn_id != self._turn_id and type(event) is not Withdrawn:
            return  # written by a turn that has ended
        event.seq = event.first = self._next
        event.at = now
        self._next += 1
        batch.append(_Numbered(event, item))
        if type(event) is Delta:
            tail = self._tails.get(event.channel)
            if tail is None:
                tail = self._tails[event.channel] = _Tail()
            text = event.text
            tail.parts.append(text)
            tail.size += len(text) if text.isascii() else len(text.encode())
            if tail.size >= self._limits.segment_bytes:
                self._seal(event.channel, {"more": True}, now, batch)
            elif len(self._tails) > 2 and sum(t.size for t in self._tails.values()) >= 2 * self._limits.segment_bytes:
                # What is not sealed is in every snapshot: many channels together must leave room for the rest of it.
                for channel in list(self._tails):
                    self._seal(channel, {"more": True}, now, batch)
        elif type(event) is Output:
            self._tails.pop(event.channel, None)

    def _seal(self, channel: str, metadata: dict[str, object], now: int, batch: list[_Numbered]) -> None:
        tail = self._tails.pop(channel, None)
        if tail is not None and tail.parts:
            assert self._turn_id is not None
            output = Output(
                turn_id=self._turn_id, channel=channel, content="".join(tail.parts), metadata=dict(metadata)
            )
            self._number(output, now, batch)

    def _finish(self, item: _Item, finish: Finish, now: int, batch: list[_Numbered]) -> None:
        for output in finish.outputs:
            self._number(output, now, batch)
        for channel in list(self._tails):
            self._seal(channel, {} if finish.outcome == "completed" else {"partial": True}, now, batch)
        ended = TurnEnded(turn_id=finish.turn_id, outcome=finish.outcome, error=finish.error)
        self._number(ended, now, batch, item)
        self._turn_id = None

    async def _commit(self, batch: list[_Numbered]) -> None:
        """Store what is durable, then show everything, in order."""
        while batch:
            durable = [one for one in batch if not one.event.volatile]
            last = batch[-1].event.seq
            if not durable and last <= self._reserved:
                self._show(batch)
                return
            start = next((i for i, one in enumerate(batch) if not one.event.volatile), len(batch))
            early = [one for one in batch[:start] if one.event.seq <= self._reserved]
            if early:
                self._show(early)
                batch = batch[len(early) :]
            stored = [self._stored(one) for one in durable]
            # Half a block is left when the next one is taken, so streaming rarely waits for it.
            reserved = self._reserved if last + NUMBER_BLOCK // 2 <= self._reserved else last + NUMBER_BLOCK
            if await self._store_or_trim(stored, reserved, batch):
                self._reserved = reserved
                self._show(batch)
                return

    async def _store_or_trim(self, stored: list[Stored], reserved: int, batch: list[_Numbered]) -> bool:
        """Append; if the store cannot write, refuse the batch's inputs and wait a little. True when it is stored."""
        try:
            await self._store.append(self._session_id, stored, reserved)
        except StoreUnavailable as exc:
            if not self.failing:
                _log.error("store_unavailable", session_id=self._session_id, error=str(exc))
            self.failing = True
            await self._refuse_and_wait(batch)
            return False
        self._pause = RETRY_FIRST
        if self.failing:
            self.failing = False
            _log.info("store_available_again", session_id=self._session_id)
        return True

    _pause = RETRY_FIRST

    async def _refuse_and_wait(self, batch: list[_Numbered]) -> None:
        refused: set[str] = set()
        keep: list[_Numbered] = []
        for one in batch:
            if type(one.event) is Input:
                refused.add(one.event.request_id)
                assert one.item is not None
                assert one.item.done is not None
                one.item.done(None)
            elif type(one.event) is Withdrawn and one.event.request_id in refused:
                # Its input never came to be; whoever asked for the withdrawal has got what it asked for.
                if one.item is not None and one.item.done is not None:
                    one.item.done(one.event)
            else:
                keep.append(one)
        batch[:] = keep
        if keep:
            await trio.sleep(self._pause)
            self._pause = min(RETRY_MOST, self._pause * 2)

    def _stored(self, one: _Numbered) -> Stored:
        if one.payload is None:
            one.payload = codec.encode_event(one.event, one.event.seq)
        item = one.item
        return Stored(one.event, one.payload, item.digest if item else None, item.on_busy if item else "queue")

    def _show(self, batch: list[_Numbered]) -> None:
        """Make events visible, in one step. No await here: a snapshot's state and position must agree."""
        log, view = self._log, self._view
        for one in batch:
            log.append(one.event, one.payload)
            view.apply(one.event)
        self._on_visible()
        for one in batch:
            if one.item is not None and one.item.done is not None:
                one.item.done(one.event)
