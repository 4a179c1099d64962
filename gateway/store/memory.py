"""Sessions in this process's memory: nothing survives it, nothing waits."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Sequence
from typing import Any

from attrs import define, field

from gateway.config import MIB
from gateway.errors import StoreRefused
from gateway.protocol.keys import Key
from gateway.protocol.messages import Answered, Ask, Event, Input, State, TurnStarted, Withdrawn
from gateway.protocol.patch import merge_patch
from gateway.store.base import Appended, Purged, Retention, SessionRecord, Store, Stored, StoredInput, StoredSession
from gateway.store.facts import FOLDED, OpenInput, check, fold, retried


@define(eq=False)
class _Input(OpenInput):
    stored: StoredInput = field(kw_only=True)


@define(eq=False)
class _Session:
    """One session. `events` are (event, encoded bytes, ``on_busy``), `size` is the bytes of all.

    Invariant: ``floor < events[0][0].seq``; between two appends `inputs` holds none that is done.
    """

    record: SessionRecord
    reserved: int
    active_at: int
    head: int = 0
    floor: int = 0
    size: int = 0
    state: dict[str, Any] = field(factory=dict)
    events: deque[tuple[Event, int, str]] = field(factory=deque)
    inputs: dict[int, _Input] = field(factory=dict)
    turn: TurnStarted | None = None
    asks: dict[str, None] = field(factory=dict)
    keys: dict[str, Key] = field(factory=dict)

    def reopen(self, request_ids: set[str]) -> None:
        """Bring back what finished turns had consumed of these, for another attempt."""
        found: dict[str, StoredInput] = {}
        for event, _, on_busy in self.events:
            if type(event) is Input and event.request_id in request_ids:
                found[event.request_id] = StoredInput(event, on_busy)
            elif type(event) is Withdrawn:
                found.pop(event.request_id, None)
        for request_id, stored in found.items():
            again = _Input(request_id, turn=0, done=True, stored=stored)
            self.inputs.setdefault(stored.event.seq, again)
        self.inputs = dict(sorted(self.inputs.items()))


class MemoryStore(Store):
    """Keeps sessions as long as this object lives. No method waits, and none is a checkpoint.

    Args:
        max_events: events kept per session (``replay_max_events``); the newest always stays.
        max_bytes: their encoded bytes (``replay_max_bytes``).
        retention: what `purge` removes.
    """

    durable = False
    direct = True

    def __init__(
        self, *, max_events: int = 10_000, max_bytes: int = 8 * MIB, retention: Retention | None = None
    ) -> None:
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._retention = retention or Retention()
        self._sessions: dict[str, _Session] = {}

    async def __aenter__(self) -> MemoryStore:
        return self

    async def __aexit__(self, *exc: object) -> None:
        pass

    async def create(self, record: SessionRecord, reserved: int) -> None:
        if record.session_id in self._sessions:
            raise StoreRefused(f"session {record.session_id} exists already")
        self._sessions[record.session_id] = _Session(record, reserved, record.created_at)

    async def load(
        self, session_id: str, *, max_events: int, max_bytes: int, tail_bytes: int = 1 << 62
    ) -> StoredSession | None:
        session = self._sessions.get(session_id)
        if session is None:
            return None
        newest: list[Event] = []
        older: list[tuple[int, int]] = []
        floor, total = session.floor, 0
        open_from = session.turn.seq if session.turn else 1 << 62
        for event, size, _ in reversed(session.events):
            total += size
            if newest and (len(newest) + len(older) == max_events or total > max_bytes):
                floor = event.seq
                break
            if newest and total > tail_bytes and event.seq < open_from:
                older.append((event.seq, size))
            else:
                newest.append(event)
        newest.reverse()
        older.reverse()
        return StoredSession(
            record=session.record,
            reserved=session.reserved,
            floor=floor,
            state=session.state,
            events=newest,
            older=older,
            queue=[item.stored for item in session.inputs.values() if item.turn is None],
            turn=session.turn,
            turn_inputs=[item.stored for item in session.inputs.values() if item.turn is not None],
            asks=list(session.asks),
            keys=list(session.keys.items()),
        )

    async def read(self, session_id: str, after: int, upto: int) -> list[Event]:
        session = self._sessions.get(session_id)
        return [event for event, _, _ in session.events if after < event.seq <= upto] if session else []

    async def append(self, session_id: str, batch: Sequence[Stored], reserved: int) -> None:
        self.append_soon(session_id, batch, reserved)

    def append_soon(
        self,
        session_id: str,
        batch: Sequence[Stored],
        reserved: int,
        done: Appended | None = None,
        *,
        patient: bool = False,
    ) -> bool:
        session = self._sessions.get(session_id)
        if session is None:
            raise StoreRefused(f"session {session_id} is not known")
        check(session_id, session.head, batch)
        if again := retried(batch):
            session.reopen(again)
        turn = session.turn.seq if session.turn else None
        events = session.events
        folded = False
        for item in batch:
            event = item.event
            size = len(item.payload)
            events.append((event, size, item.on_busy))
            session.size += size
            session.head = event.seq
            if event.at > session.active_at:
                session.active_at = event.at
            if type(event) is Input:
                assert item.digest is not None
                session.inputs[event.seq] = _Input(event.request_id, stored=StoredInput(event, item.on_busy))
                # Taken out first: a key used again after its window moves to the end, which is where its `at` belongs.
                session.keys.pop(event.request_id, None)
                session.keys[event.request_id] = Key(event.seq, item.digest, event.at)
            elif type(event) is State:
                session.state = merge_patch(session.state, event.patch)
            elif type(event) is Ask:
                session.asks[event.ask_id] = None
            elif type(event) is Answered:
                session.asks.pop(event.ask_id, None)
            elif type(event) in FOLDED:
                folded = True
                turn = fold(event, session.inputs, turn)
                if type(event) is TurnStarted:
                    session.turn = event
                elif turn is None:
                    session.turn = None
                    session.asks.clear()
        if folded:
            for seq in [seq for seq, kept in session.inputs.items() if kept.done]:
                del session.inputs[seq]
        session.reserved = max(session.reserved, reserved, session.head)
        while (len(events) > self._max_events or session.size > self._max_bytes) and len(events) > 1:
            event, size, _ = events.popleft()
            session.floor = event.seq
            session.size -= size
        return True

    async def delete(self, session_id: str) -> None:
        self._sessions.pop(session_id, None)

    async def unfinished(self) -> list[str]:
        found = [item for item in self._sessions.values() if item.turn or item.inputs]
        found.sort(key=lambda item: item.active_at)
        return [item.record.session_id for item in found]

    async def purge(self, *, now: int, in_use: Container[str]) -> Purged:
        keep = self._retention
        sessions = size = 0
        left, left_size = len(self._sessions), sum(item.size for item in self._sessions.values())
        for session_id, session in sorted(self._sessions.items(), key=lambda item: item[1].active_at):
            idle = now - session.active_at
            over = left > keep.max_sessions or left_size > keep.max_total_bytes or idle > keep.max_age_ms
            removable = not (session.turn or session.inputs or session_id in in_use)
            if over and removable and idle > keep.resume_window_ms:
                del self._sessions[session_id]
                sessions += 1
                size += session.size
                left -= 1
                left_size -= session.size
                continue
            waiting = {item.stored.event.seq for item in session.inputs.values()}
            limit = now - keep.resume_window_ms
            for request_id in [k for k, key in session.keys.items() if key.at < limit and key.seq not in waiting]:
                del session.keys[request_id]
        return Purged(sessions=sessions, size=size, sessions_left=left, size_left=left_size)
