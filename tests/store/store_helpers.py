"""A session as a publisher would write it, for the tests of stores."""

from __future__ import annotations

from typing import Any

from gateway.protocol import codec
from gateway.protocol import messages as m
from gateway.protocol.keys import digest_of
from gateway.store import SessionRecord, Store, Stored, StoredSession

MANY = {"max_events": 1_000_000, "max_bytes": 1 << 40}
"""Load bounds that bound nothing."""


def stored(event: m.Event, on_busy: str = "queue") -> Stored:
    """The event as a publisher hands it over: ``first == seq``."""
    event.first = event.seq
    digest = digest_of(event.content, event.metadata) if isinstance(event, m.Input) else None
    return Stored(event, codec.encode_event(event, event.seq), digest, on_busy)


class Script:
    """Writes one session: numbers and times go up by themselves (``at == 1000 * seq``)."""

    def __init__(self, store: Store, session_id: str = "s") -> None:
        self.store = store
        self.record = SessionRecord(session_id, "echo", "alice", f"e_{session_id}", 1)
        self.seq = 0
        self.written: list[m.Event] = []

    async def create(self, reserved: int = 64) -> Script:
        await self.store.create(self.record, reserved)
        return self

    def make(self, cls: type[m.Event], **fields: Any) -> m.Event:
        self.seq += 1
        event = cls(seq=self.seq, at=fields.pop("at", 1000 * self.seq), **fields)
        self.written.append(event)
        return event

    def input(self, request_id: str, content: str = "hi", **fields: Any) -> m.Event:
        return self.make(m.Input, request_id=request_id, content=content, **fields)

    def start(self, turn_id: str, *request_ids: str, attempt: int = 1) -> m.Event:
        return self.make(m.TurnStarted, turn_id=turn_id, request_ids=list(request_ids), attempt=attempt)

    def end(self, turn_id: str, outcome: str = "completed") -> m.Event:
        return self.make(m.TurnEnded, turn_id=turn_id, outcome=outcome)

    def output(self, text: str = "text", turn_id: str = "t1") -> m.Event:
        return self.make(m.Output, turn_id=turn_id, channel="answer", content=text)

    def state(self, **patch: Any) -> m.Event:
        return self.make(m.State, patch=patch)

    async def write(self, *events: m.Event, reserved: int = 0, on_busy: str = "queue") -> None:
        await self.store.append(self.record.session_id, [stored(event, on_busy) for event in events], reserved)

    async def load(self, **bounds: int) -> StoredSession:
        found = await self.store.load(self.record.session_id, **{**MANY, **bounds})
        assert found is not None
        return found


def queue(found: StoredSession) -> list[str]:
    return [item.event.request_id for item in found.queue]


def taken(found: StoredSession) -> list[str]:
    return [item.event.request_id for item in found.turn_inputs]


def seqs(found: StoredSession) -> list[int]:
    return [event.seq for event in found.events]
