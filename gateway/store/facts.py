"""The fold that every store shares: what an event does to the inputs that are not done with and to the open turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attrs import define

from gateway.errors import StoreRefused
from gateway.protocol.messages import Event, Input, TurnEnded, TurnStarted, Withdrawn
from gateway.store.base import Stored


@define(eq=False)
class OpenInput:
    """An input, and whether a finished turn or a withdrawal is `done` with it.

    `turn` is the ``seq`` of the `TurnStarted` that took it, None while it waits.
    """

    request_id: str
    turn: int | None = None
    done: bool = False


def fold(event: Event, inputs: Mapping[int, OpenInput], turn: int | None) -> int | None:
    """Apply a stored event to the open inputs (``seq`` → input, in order) and the open turn; returns the open turn.

    An `Input` must be in `inputs` already, and so must what `retried` names: an input whose turn was lost is done with,
    until the next attempt takes it again.
    """
    if type(event) is TurnStarted:
        for request_id in event.request_ids:
            _take(inputs, request_id, event.seq)
        return event.seq
    if type(event) is TurnEnded:
        for item in inputs.values():
            if item.turn is not None:
                item.done = True
        return None
    if type(event) is Withdrawn:
        for item in inputs.values():
            if item.request_id == event.request_id and item.turn is None and not item.done:
                item.done = True
                break
    return turn


def _take(inputs: Mapping[int, OpenInput], request_id: str, turn: int) -> None:
    """Give the oldest waiting input with that id to `turn`; failing that, the newest that an earlier turn had."""
    again = None
    for item in inputs.values():
        if item.request_id == request_id:
            if item.turn is not None:
                again = item
            elif not item.done:
                item.turn = turn
                return
    if again is not None:
        again.turn, again.done = turn, False


def retried(batch: Sequence[Stored]) -> set[str]:
    """Request ids that a turn of this batch takes for another attempt: their inputs may be done with already."""
    return {
        request_id
        for item in batch
        if type(item.event) is TurnStarted and item.event.attempt > 1
        for request_id in item.event.request_ids
    }


FOLDED = (TurnStarted, TurnEnded, Withdrawn)
"""The events to which `fold` does anything."""


def check(session_id: str, head: int, batch: Sequence[Stored]) -> None:
    """Raise `StoreRefused` unless the batch continues a session whose newest stored number is `head`."""
    for item in batch:
        event = item.event
        if event.volatile:
            raise StoreRefused(f"session {session_id}: a {event.type} event is volatile and is not stored")
        if event.seq <= head:
            raise StoreRefused(f"session {session_id}: number {event.seq} was given before, the newest is {head}")
        if type(event) is Input and item.digest is None:
            raise StoreRefused(f"session {session_id}: input {event.seq} comes without its digest")
        head = event.seq
