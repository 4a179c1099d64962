"""The states of a connection, as a table: every state against everything that can happen.

    HANDSHAKE ──hello_accepted──▶ JOINED ──close──▶ CLOSING ──closed──▶ CLOSED

What a frame means depends on the state alone: a `hello` is the only frame that HANDSHAKE takes and an error in JOINED;
after a close was sent, whatever still arrives is discarded so that the peer's close reply can be seen.
"""

from __future__ import annotations

from enum import Enum


class _Key(Enum):
    """Looked up for every frame: the hash that `Enum` has is computed in Python, from the name."""

    __hash__ = object.__hash__


class State(_Key):
    HANDSHAKE = "handshake"
    JOINED = "joined"
    CLOSING = "closing"
    CLOSED = "closed"


class On(_Key):
    """What can happen to a connection."""

    HELLO = "a valid hello arrives"
    FRAME = "any other frame arrives, or one that is wrong"
    CLOSE = "either side starts to close"
    LOST = "the line is gone, or the closing handshake is through"


class Do(Enum):
    """What the gateway does about it."""

    JOIN = "attach to a session, answer hello_ok"
    REFUSE = "hello_error, close 4400"
    ALREADY_JOINED = "error already_joined"
    DISPATCH = "handle the frame"
    CLOSE = "send the close frame, wait for the reply within close_timeout"
    DISCARD = "nothing"
    DETACH = "leave the session; the session lives on"


TRANSITIONS: dict[tuple[State, On], tuple[State, Do]] = {
    (State.HANDSHAKE, On.HELLO): (State.JOINED, Do.JOIN),
    (State.HANDSHAKE, On.FRAME): (State.CLOSING, Do.REFUSE),
    (State.HANDSHAKE, On.CLOSE): (State.CLOSING, Do.CLOSE),
    (State.HANDSHAKE, On.LOST): (State.CLOSED, Do.DISCARD),
    (State.JOINED, On.HELLO): (State.JOINED, Do.ALREADY_JOINED),
    (State.JOINED, On.FRAME): (State.JOINED, Do.DISPATCH),
    (State.JOINED, On.CLOSE): (State.CLOSING, Do.CLOSE),
    (State.JOINED, On.LOST): (State.CLOSED, Do.DETACH),
    (State.CLOSING, On.HELLO): (State.CLOSING, Do.DISCARD),
    (State.CLOSING, On.FRAME): (State.CLOSING, Do.DISCARD),
    (State.CLOSING, On.CLOSE): (State.CLOSING, Do.DISCARD),
    (State.CLOSING, On.LOST): (State.CLOSED, Do.DETACH),
    (State.CLOSED, On.HELLO): (State.CLOSED, Do.DISCARD),
    (State.CLOSED, On.FRAME): (State.CLOSED, Do.DISCARD),
    (State.CLOSED, On.CLOSE): (State.CLOSED, Do.DISCARD),
    (State.CLOSED, On.LOST): (State.CLOSED, Do.DISCARD),
}


def step(state: State, event: On) -> tuple[State, Do]:
    """The next state and the duty that comes with it."""
    return TRANSITIONS[state, event]
