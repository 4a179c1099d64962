"""A session's state as its events tell it, and the snapshot of it.

`SessionView` is a fold over events: the gateway keeps one per session for snapshots, a client keeps one to show. Both
apply the same events in the same order, so a snapshot and a replay lead to the same place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from attrs import define, field

from gateway.protocol import codec
from gateway.protocol.log import Log
from gateway.protocol.messages import (
    TRANSCRIPT_EVENTS,
    Answered,
    Ask,
    Delta,
    Event,
    Input,
    Output,
    Progress,
    QueuedRef,
    ResyncReason,
    RunningTurn,
    Snapshot,
    State,
    TurnEnded,
    TurnStarted,
    Withdrawn,
)
from gateway.protocol.patch import merge_patch


@define(eq=False)
class TurnView:
    """The running turn. `tails` holds, per channel, the deltas after its last output."""

    turn_id: str
    request_ids: list[str]
    started_at: int
    attempt: int = 1
    tails: dict[str, list[str]] = field(factory=dict)
    progress: dict[str, Any] = field(factory=dict)

    def channels(self) -> dict[str, str]:
        """Channel → text after its last output."""
        return {channel: "".join(parts) for channel, parts in self.tails.items() if parts}


class SessionView:
    """What a session looks like after the events applied so far.

    Invariant: `cursor` is the ``seq`` of the last applied event; `asks` and `queue` are in the order of their events.
    """

    def __init__(self) -> None:
        self.cursor = 0
        self.state: dict[str, Any] = {}
        self.queue: dict[str, int] = {}
        self.asks: dict[str, Ask] = {}
        self.turn: TurnView | None = None

    def apply(self, event: Event) -> None:
        """Fold in the next event; its ``seq`` must be above `cursor`."""
        self.cursor = event.seq
        kind = type(event)
        turn = self.turn
        if kind is Delta:
            if turn is not None:
                turn.tails.setdefault(event.channel, []).append(event.text)  # type: ignore[attr-defined]
        elif isinstance(event, Output):
            if turn is not None:
                turn.tails.pop(event.channel, None)
        elif isinstance(event, Progress):
            if turn is not None:
                turn.progress[event.key] = event.data
        elif isinstance(event, Input):
            self.queue[event.request_id] = event.seq
        elif isinstance(event, Withdrawn):
            self.queue.pop(event.request_id, None)
        elif isinstance(event, TurnStarted):
            for request_id in event.request_ids:
                self.queue.pop(request_id, None)
            self.turn = TurnView(event.turn_id, list(event.request_ids), event.at, event.attempt)
        elif isinstance(event, TurnEnded):
            self.turn = None
            self.asks.clear()
        elif isinstance(event, Ask):
            self.asks[event.ask_id] = event
        elif isinstance(event, Answered):
            self.asks.pop(event.ask_id, None)
        elif isinstance(event, State):
            self.state = merge_patch(self.state, event.patch)

    def restore(self, snapshot: Snapshot) -> None:
        """Replace everything by what a snapshot says."""
        self.cursor = snapshot.cursor
        self.state = snapshot.state
        self.queue = {item.request_id: item.seq for item in snapshot.queue}
        self.asks = {ask.ask_id: ask for ask in snapshot.asks}
        running = snapshot.turn
        self.turn = None
        if running is not None:
            self.turn = TurnView(
                running.turn_id,
                list(running.request_ids),
                running.started_at,
                tails={channel: [text] for channel, text in running.channels.items()},
                progress=dict(running.progress),
            )


def encode_snapshot(
    view: SessionView,
    log: Log,
    *,
    epoch: str,
    reason: ResyncReason,
    max_events: int,
    max_bytes: int,
    older: Sequence[Event] = (),
) -> bytes:
    """The session at ``log.head`` as one encoded `snapshot` frame of at most `max_bytes`.

    What is needed to go on (state, running turn, queue, open asks) always fits: the engine bounds each where it is
    written. The transcript gets the room that remains, newest events first.

    Args:
        older: the events right before those in memory, loaded from the store (`Log.older_than_tail`).
    """
    assert view.cursor == log.head or view.cursor == 0, "state and position of a snapshot must agree"
    turn = view.turn
    running = None
    if turn is not None:
        running = RunningTurn(
            turn_id=turn.turn_id,
            request_ids=list(turn.request_ids),
            channels=turn.channels(),
            progress=turn.progress,
            started_at=turn.started_at,
        )
    asks = [codec.encode_event(ask, ask.first or ask.seq) for ask in view.asks.values()]

    def encode(transcript: list[bytes], truncated: bool) -> bytes:
        snapshot = Snapshot(
            epoch=epoch,
            cursor=log.head,
            reason=reason,
            state=view.state,
            transcript=[],
            transcript_truncated=truncated,
            turn=running,
            queue=[QueuedRef(request_id=request_id, seq=seq) for request_id, seq in view.queue.items()],
            asks=[],
        )
        return codec.encode_snapshot(snapshot, transcript, asks)

    room = max_bytes - len(encode([], False)) - 16
    newest: list[bytes] = []
    loaded = log.with_first(older[0].seq - 1, older) if older else []
    truncated = (loaded[0][1] - 1 if loaded else log.tail) > 0

    def newest_first() -> Iterator[bytes]:
        for entry, first in log.newest_first():
            if isinstance(entry.event, TRANSCRIPT_EVENTS):
                yield entry.encode(first)
        for event, first in reversed(loaded):
            if isinstance(event, TRANSCRIPT_EVENTS):
                yield codec.encode_event(event, first)

    for payload in newest_first():
        room -= len(payload) + 1
        if len(newest) == max_events or room < 0:
            truncated = True
            break
        newest.append(payload)
    newest.reverse()
    return encode(newest, truncated)
