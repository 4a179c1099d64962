"""What a session tells its user about the line: its state, its numbers, and the request that waits on it."""

from __future__ import annotations

from typing import Any, Literal

from attrs import define, frozen

from gateway.errors import ClientError
from gateway.protocol.messages import ClientFrame, HelloOk, Presence, Signal

Phase = Literal["connecting", "joined", "waiting", "closed"]


@frozen(kw_only=True)
class Connection:
    """The state of the line to the gateway.

    - ``connecting``: dialling or in the handshake; `attempt` counts from 1 since the line was last good.
    - ``joined``: `resumed` says that the session existed before.
    - ``waiting``: for `seconds`, then it connects again; `reason` says how the last connection ended. With `seconds`
      zero it waits for the user to take events: there is no room for more.
    - ``closed``: for good; `reason` says why.
    """

    phase: Phase
    attempt: int = 0
    seconds: float = 0.0
    reason: str = ""
    resumed: bool = False


@frozen(kw_only=True)
class Statistics:
    """What a session counted so far.

    `gaps`: events arrived with others missing before them (each was mended by a snapshot). `duplicates`: events ignored
    because they were here already. `overflows`: the buffer was full while a request waited for its answer, so events
    were dropped and fetched again. `refused_frames`: `error` frames that belong to no request.
    """

    joins: int
    reconnects: int
    events: int
    snapshots: int
    gaps: int
    duplicates: int
    overflows: int
    refused_frames: int
    buffered: int
    buffered_bytes: int


@define(eq=False)
class Request:
    """One frame that waits for its answer.

    Invariant: `written` is about the connection that is open now, `repeated` about earlier ones: the frame was on its
    way when one of those broke, and nobody knows whether it arrived.
    """

    frame: ClientFrame
    payload: bytes
    written: bool = False
    repeated: bool = False
    settled: bool = False
    abandoned: bool = False
    """Its caller was cancelled; it stays only so that its answer is not taken for another's."""
    result: Any = None
    error: ClientError | None = None


@frozen
class Settled:
    """Effect: `request` has its `result` or its `error`."""

    request: Request


@frozen
class Joined:
    """Effect: the handshake is done."""

    hello: HelloOk


@frozen
class Noticed:
    """Effect: something ephemeral was said."""

    notice: Signal | Presence


Effect = Settled | Joined | Noticed


@frozen
class Retry:
    """Verdict on a lost connection: connect again in `delay` seconds."""

    delay: float
    reason: str
