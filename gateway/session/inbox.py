"""The inbox: the inputs that no turn has taken yet, and the order in which the turn loop gets them.

Theory of operation
-------------------
An accepted input is in exactly one place at any time, and `waiting` knows all of them until a turn takes them:

    STORING ──▶ INBOX ──▶ (the turn loop)          withdrawn from any of these: GONE
        └─────▶ STEER ──▶ taken by the running turn, or back to INBOX when it ends

INBOX is a memory channel of fixed capacity.

An input that comes while nothing waits and no turn runs need not queue: `take` gives it to a turn while it is still
being stored.

Everything here is synchronous, and nobody waits in the channel: what is in it is in nobody's hand, so an input can
be withdrawn, or another put before it, until the moment at which a turn has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum

import trio
from attrs import define, field

from gateway.protocol.codec import dump_json
from gateway.protocol.messages import BusyMode, Error, Input


class Place(Enum):
    STORING = "being stored"
    INBOX = "in the inbox"
    STEER = "handed to the running turn"
    GONE = "withdrawn, or taken by a turn"


@define(eq=False)
class QueuedInput:
    """An accepted (or nearly accepted) input that no turn has taken yet."""

    event: Input
    on_busy: BusyMode
    digest: bytes
    size: int = field(init=False)
    """Bytes of its content and metadata."""
    place: Place = Place.STORING
    repliers: list[Callable[[Error | None, int, bool], None]] = field(factory=list)
    """Whoever sent it and waits for `accepted`: called with an error or None, how many inputs wait before it, and
    whether it is a repetition."""

    @size.default
    def _size(self) -> int:
        metadata = self.event.metadata
        return len(self.event.content.encode()) + (len(dump_json(metadata)) if metadata else 0)

    @property
    def rank(self) -> tuple[bool, int]:
        """The order of the inbox: those that interrupt, then the rest, each by number."""
        return self.on_busy != "interrupt", self.event.seq


class Inbox:
    """A session's waiting inputs.

    Args:
        capacity: of the channel. `Session.submit` refuses before it is full, so nothing ever waits for room in it.

    Invariant: an input is in `storing` from `admit` until its event is stored or refused, withdrawn or not; it is in
    `waiting` from `admit` until it is withdrawn or a turn takes it. Of one id there is one in each at most.

    Attributes:
        held: inputs that take up room: what waits, and what was withdrawn but is still on its way to the store.
        held_bytes: their bytes.
    """

    def __init__(self, capacity: int) -> None:
        self.waiting: dict[str, QueuedInput] = {}
        self.storing: dict[str, QueuedInput] = {}
        self._ready = 0  # in `waiting` and stored
        self.held = 0
        self.held_bytes = 0
        self._in, self._out = trio.open_memory_channel[QueuedInput](capacity)

    # coming in

    def admit(self, queued: QueuedInput) -> None:
        """Take in an input whose event is on its way to the store."""
        self.waiting[queued.event.request_id] = queued
        self.storing[queued.event.request_id] = queued
        self.held += 1
        self.held_bytes += queued.size

    def stored(self, queued: QueuedInput) -> int:
        """Its event is stored. Returns how many inputs wait before it."""
        del self.storing[queued.event.request_id]
        if queued.place is Place.GONE:
            self._free(queued)
            return 0
        # Events are stored in the order of their numbers, so all that is ready has a lower one.
        ahead = self._ready if queued.on_busy != "interrupt" else self.ahead(queued)
        self._ready += 1
        return ahead

    def refused(self, queued: QueuedInput) -> None:
        """Its event could not be stored: it never was."""
        del self.storing[queued.event.request_id]
        self._free(queued)
        if queued.place is not Place.GONE:
            queued.place = Place.GONE
            del self.waiting[queued.event.request_id]

    def restore(self, inputs: Sequence[QueuedInput]) -> None:
        """Fill a new inbox with what the store had."""
        for queued in inputs:
            self.waiting[queued.event.request_id] = queued
            queued.place = Place.INBOX
            self.held_bytes += queued.size
        self._ready = self.held = len(self.waiting)
        self._refill(inputs)

    def ahead(self, queued: QueuedInput) -> int:
        """How many stored inputs wait before this one; 0 when it does not wait any more."""
        if queued.place is Place.GONE:
            return 0
        rank = queued.rank
        return sum(other.rank < rank for other in self.waiting.values() if other.place is not Place.STORING)

    # moving

    def append(self, queued: QueuedInput) -> None:
        """Put the newest stored input behind all others (which an interrupting one must not be)."""
        queued.place = Place.INBOX
        self._in.send_nowait(queued)

    def insert(self, inputs: Sequence[QueuedInput]) -> None:
        """Put stored inputs in at their rank."""
        for queued in inputs:
            queued.place = Place.INBOX
        self._refill([*self._drain(), *inputs])

    def withdraw(self, inputs: Sequence[QueuedInput]) -> None:
        """Take waiting inputs out, wherever they are."""
        from_channel = any(queued.place is Place.INBOX for queued in inputs)
        for queued in inputs:
            self._leave(queued)
        if from_channel:
            self._refill([queued for queued in self._drain() if queued.place is Place.INBOX])

    def take(self, inputs: Sequence[QueuedInput]) -> list[Input]:
        """Hand received or steered inputs to a turn, which owns them from now on."""
        for queued in inputs:
            self._leave(queued)
        return [queued.event for queued in inputs]

    def following(self, queued: QueuedInput) -> list[QueuedInput]:
        """Take off the front what runs in one turn with a ``collect`` input: the same sender's next ones."""
        rest = self._drain()
        count = 0
        for other in rest:
            if other.on_busy != "collect" or other.event.sender != queued.event.sender:
                break
            count += 1
        for other in rest[count:]:
            self._in.send_nowait(other)
        return rest[:count]

    def next(self) -> QueuedInput | None:
        """Take the first input off, if there is one. The caller hands it to a turn (`take`) in the same step."""
        try:
            return self._out.receive_nowait()
        except trio.WouldBlock:
            return None

    def _leave(self, queued: QueuedInput) -> None:
        if queued.place is not Place.STORING:
            self._ready -= 1
            self._free(queued)
        queued.place = Place.GONE
        del self.waiting[queued.event.request_id]

    def _free(self, queued: QueuedInput) -> None:
        self.held -= 1
        self.held_bytes -= queued.size

    def _drain(self) -> list[QueuedInput]:
        taken: list[QueuedInput] = []
        while (queued := self.next()) is not None:
            taken.append(queued)
        return taken

    def _refill(self, inputs: Sequence[QueuedInput]) -> None:
        """Fill the (emptied) channel in the order of rank."""
        for queued in sorted(inputs, key=lambda queued: queued.rank):
            self._in.send_nowait(queued)
