"""The storage seam: what a session needs kept, and what it gets back.

Theory of operation
-------------------
A session's publisher is the only writer of that session. It hands over *batches*: events in the order of their
numbers, atomic, all or nothing. A store keeps what is durable (volatile events never reach it) and folds the few facts
that recovery needs as it goes: the inputs that no finished turn has consumed, the turn that is open, the state, the
idempotency keys, and ``reserved``, the highest number that may have been shown to a client.

Numbers are reserved ahead in blocks and in the same transaction as the events, so that a number a client saw is never
given again, even after ``kill -9``: a session that comes back continues above ``reserved`` (DESIGN property 14).

Retention has two halves. While it appends, a store keeps each session within ``max_events`` and ``max_bytes``, but
never less than a `gateway.protocol.log.Log` with the same bounds keeps, so a session's floor in the store is never
above its floor in memory. `Store.purge`, called by the gateway now and then, removes what nobody needs any more: whole
sessions, and idempotency keys out of the window whose inputs are not kept. Neither removes what recovery needs: waiting
inputs, the open turn, the state.

`gateway.store` holds the implementations; one contract suite (``tests/store``) runs on each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Sequence
from typing import Any

from attrs import define, field, frozen

from gateway.config import HOUR_MS, MIB
from gateway.errors import StoreError
from gateway.protocol.keys import Key
from gateway.protocol.messages import Event, Input, TurnStarted


@frozen
class SessionRecord:
    """What a session is born with. `created_at` in ms."""

    session_id: str
    agent_id: str
    subject: str
    epoch: str
    created_at: int


@define
class Stored:
    """One durable event to write: numbered, with its JSON (``first == seq``).

    `digest` and `on_busy` are given for an `Input` only: its `digest_of`, and how it was to be queued.
    """

    event: Event
    payload: bytes
    digest: bytes | None = None
    on_busy: str = "queue"


@frozen
class StoredInput:
    """An input that no finished turn has consumed."""

    event: Input
    on_busy: str


@frozen
class StoredSession:
    """Everything a session needs to come back.

    Invariant: ``floor < older[0] <= older[-1] < events[0].seq``, ``events`` in order, ``reserved >= events[-1].seq``.
    """

    record: SessionRecord
    reserved: int
    floor: int
    """The oldest cursor that `older` and `events` continue without a gap."""
    state: dict[str, Any]
    """All `state` patches merged, those of purged events too."""
    events: list[Event]
    """The newest retained events, within the bounds given to `Store.load`."""
    queue: list[StoredInput]
    """Inputs that neither started a turn nor were withdrawn, in order of ``seq``."""
    turn: TurnStarted | None
    """The turn without a `turn_ended`, if the process died in it."""
    turn_inputs: list[StoredInput]
    """That turn's inputs."""
    asks: list[str] = field(factory=list)
    """Ids of that turn's questions that nobody has answered, in order; also of those whose event is not kept."""
    older: list[tuple[int, int]] = field(factory=list)
    """``seq`` and encoded bytes of each event above `floor` that is not in `events`, in order; see `Store.read`."""
    keys: list[tuple[str, Key]] = field(factory=list)
    """Idempotency keys in order of their ``at``."""


@frozen(kw_only=True)
class Retention:
    """How long sessions are kept. A session in use, with waiting inputs or with an open turn is never removed."""

    resume_window_ms: int = 24 * HOUR_MS
    """Idempotency keys are kept for at least so long, and for as long as their input; so is their session."""
    max_age_ms: int = 24 * HOUR_MS
    """A session without activity for so long is removed (but see `resume_window_ms`)."""
    max_sessions: int = 1_000_000
    """Sessions in all. Beyond it the longest idle go, unless their resume window is still open."""
    max_total_bytes: int = 10 * 1024 * MIB
    """Bytes of events in all; the same."""


@frozen(kw_only=True)
class Purged:
    """What a purge removed, and what it had to leave. `sessions` is a count, `size` is in bytes."""

    sessions: int = 0
    size: int = 0
    sessions_left: int = 0
    size_left: int = 0


Appended = Callable[[StoreError | None], None]
"""Told how an `append_soon` ended."""


class Store(ABC):
    """Keeps sessions. Used as ``async with store:``; every method may be called by many tasks at once.

    Every method may raise `StoreUnavailable` (nothing was written; the same call may succeed later), `StoreFenced`
    (another process is the writer now) and `StoreUnusable` (the store turns out to be damaged).
    """

    durable: bool
    """Whether what `append` returned for survives a crash of the process and the machine: `accepted.durable`."""

    direct = False
    """Whether there is an `append_soon`."""

    @abstractmethod
    async def __aenter__(self) -> Store:
        """Open. Raises `StoreUnusable` with a message that says what to do."""

    @abstractmethod
    async def __aexit__(self, *exc: object) -> None:
        """Close; what was appended before is kept."""

    @abstractmethod
    async def create(self, record: SessionRecord, reserved: int) -> None:
        """Add a session that does not exist yet, with its first block of numbers.

        Raises:
            StoreRefused: it exists.
        """

    @abstractmethod
    async def load(
        self, session_id: str, *, max_events: int, max_bytes: int, tail_bytes: int = 1 << 62
    ) -> StoredSession | None:
        """Bring a session back, with its newest events up to those bounds. None if it is not known.

        The newest event is always among them, however large. Writes of this session that were handed over before
        (also by a caller that was cancelled) are waited for, so what is loaded is the whole truth. The `first` of
        the events means nothing.

        Args:
            max_events, max_bytes: the window: what lies before it is as good as gone.
            tail_bytes: of the window, only so many bytes are loaded, but all of an open turn; the rest is `older`.
        """

    @abstractmethod
    async def read(self, session_id: str, after: int, upto: int) -> list[Event]:
        """The stored events with ``after < seq <= upto``, in order. The caller keeps the range small.

        The `first` of the events means nothing. Nothing that is unknown or was purged is among them.
        """

    @abstractmethod
    async def append(self, session_id: str, batch: Sequence[Stored], reserved: int) -> None:
        """Write a batch and raise the reservation, atomically. An empty batch only raises the reservation.

        The reservation never falls, and is never below the last number of the batch.

        A write that was handed over is not undone by cancelling the caller; the caller then does not know whether it
        happened, and must drop its session.

        Raises:
            StoreRefused: the session is not known, or a number is not above all that are stored.
        """

    def append_soon(
        self, session_id: str, batch: Sequence[Stored], reserved: int, done: Appended, *, patient: bool = False
    ) -> bool:
        """`append` for callers that do not wait, in a store that is `direct`: it spares a task for each session that
        writes. A `patient` batch may wait for some milliseconds, until others come along.

        Returns:
            True when it is written already. Otherwise `done` is called later, synchronously, with None or with what
            `append` would have raised; it must not raise itself.

        Raises:
            What `append` does, if that is known at once; `done` is not called then.
        """
        raise NotImplementedError

    @abstractmethod
    async def delete(self, session_id: str) -> None:
        """Forget a session with all it has. Nothing happens if it is not known."""

    @abstractmethod
    async def unfinished(self) -> list[str]:
        """Ids of the sessions with an open turn or waiting inputs, oldest activity first."""

    @abstractmethod
    async def purge(self, *, now: int, in_use: Container[str]) -> Purged:
        """Remove what `Retention` no longer keeps.

        Args:
            now: the time, in ms.
            in_use: ids that must stay. Asked again, without a pause in between, right before a session is removed; so
                it may be the live registry, if that names a session from before its `load` on.

        Cancelling is safe: what was removed until then stays removed.
        """
