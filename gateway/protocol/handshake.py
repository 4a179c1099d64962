"""The opening of a connection: versions, refusals, and where the stream continues (PROTOCOL section 3)."""

from __future__ import annotations

from typing import NoReturn

from attrs import frozen

from gateway.errors import FrameError, HandshakeRefused
from gateway.protocol import codec
from gateway.protocol.messages import CLIENT_FRAMES, EVENTS, Features, Hello, HelloError, ResyncReason

VERSIONS = (1, 2)
"""Protocol versions served, in rising order."""

CAPABILITIES = ("batch",)


def invalid_hello(message: str) -> HandshakeRefused:
    """The refusal of a first frame that is not a valid `hello`."""
    return HandshakeRefused(
        "invalid_hello",
        message,
        close_code=4400,
        next_step="Send a valid hello as the first frame; the message names the field that is wrong.",
    )


def read_hello(raw: bytes) -> Hello:
    """Read the first frame.

    Raises:
        HandshakeRefused: ``invalid_hello``: it is anything but a valid `hello`.
    """
    try:
        tag, fields = codec.read_object(codec.parse_json(raw))
        if tag != Hello.type:
            _refuse(f"field 'type': expected 'hello' as the first frame, got {tag[:40]!r}")
        hello: Hello = codec.structure(fields, Hello)
        if hello.protocol_min > hello.protocol_max:
            _wrong(f"field 'protocol_min': {hello.protocol_min} is above protocol_max {hello.protocol_max}")
        check_hello(hello.agent_id, hello.since)
    except FrameError as exc:
        _refuse(exc.message)
    return hello


def check_hello(agent_id: str, since: int | None) -> None:
    """What the types of an opening's fields do not say.

    Raises:
        FrameError: ``invalid_frame``, naming the field.
    """
    if since is not None and since < 0:
        _wrong(f"field 'since': expected 0 or more, got {since}")
    if not agent_id:
        _wrong("field 'agent_id': expected the name of an agent, got an empty string")


def _wrong(message: str) -> NoReturn:
    raise FrameError("invalid_frame", message)


def _refuse(message: str) -> NoReturn:
    raise invalid_hello(message) from None


def negotiate(hello: Hello) -> int:
    """The highest version that both sides support.

    Raises:
        HandshakeRefused: ``protocol_unsupported``.
    """
    for version in reversed(VERSIONS):
        if hello.protocol_min <= version <= hello.protocol_max:
            return version
    raise HandshakeRefused(
        "protocol_unsupported",
        f"this gateway speaks versions {VERSIONS[0]} to {VERSIONS[-1]}, "
        f"the client {hello.protocol_min} to {hello.protocol_max}",
        close_code=4406,
        next_step="Use a client that supports one of the server's versions.",
    )


def hello_error(refused: HandshakeRefused) -> HelloError:
    """The frame that tells a client why it may not join."""
    return HelloError(
        code=refused.code,
        message=refused.message,
        retryable=refused.retryable,
        retry_after_ms=refused.retry_after_ms,
        next_step=refused.next_step,
        server_min_version=VERSIONS[0],
        server_max_version=VERSIONS[-1],
    )


FEATURES = Features(
    messages=sorted(tag for tag in CLIENT_FRAMES if tag != Hello.type),
    events=sorted(EVENTS),
    capabilities=list(CAPABILITIES),
)


@frozen
class Position:
    """Where a connection's stream continues: after `cursor`, or with a snapshot when `resync` says why."""

    cursor: int
    resync: ResyncReason | None


def position_for(hello: Hello, *, existed: bool, epoch: str, floor: int, head: int) -> Position:
    """Decide between a gapless continuation and a snapshot.

    Args:
        existed: whether the session was there before this `hello`.
        epoch, floor, head: the session's, now.
    """
    since = hello.since or 0
    reason: ResyncReason | None = None
    if not existed:
        reason = "unknown_session" if since > 0 else None
    elif hello.epoch is not None and hello.epoch != epoch:
        reason = "epoch_changed"
    elif since > head:
        reason = "cursor_ahead"
    elif since < floor:
        reason = "cursor_expired"
    return Position(head if reason else since, reason)
