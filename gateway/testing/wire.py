"""WebSocket bytes by hand (RFC 6455), right or wrong on purpose, and a reader of them that takes nothing for granted.

No I/O and no library: what is sent can break every rule, and what is received is held against every rule. Used by both
sides of `trio-gateway fuzz`.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence

from attrs import frozen

from gateway.transport.frames import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    FrameViolation,
    check_close,
    unmask,
)

__all__ = [
    "BINARY",
    "CLOSE",
    "CONTINUATION",
    "PING",
    "PONG",
    "TEXT",
    "Closed",
    "Control",
    "FrameViolation",
    "MessageReader",
    "Received",
    "accept_key",
    "fragments",
    "frame",
    "upgrade_request",
]  # fmt: skip

KEY = b"\x11\x22\x33\x44"
"""Masks need not be secret here, and a fixed one makes files of failures readable."""

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_UPGRADE_KEY = base64.b64encode(b"trio-gateway fuz").decode()


def frame(
    opcode: int,
    payload: bytes = b"",
    *,
    final: bool = True,
    bits: int = 0,
    masked: bool = True,
    length: int | None = None,
    length_bytes: int | None = None,
) -> bytes:
    """One frame, as wrong as asked.

    Args:
        bits: reserved bits to set (0x40, 0x20, 0x10).
        masked: a client's frames are masked, a server's are not.
        length: what the header claims, if not the truth.
        length_bytes: 0, 2 or 8, the form of the length, if not the shortest.
    """
    size = len(payload) if length is None else length
    if length_bytes is None:
        length_bytes = 0 if size < 126 else 2 if size < 65_536 else 8
    short = {0: size & 0x7F, 2: 126, 8: 127}[length_bytes]
    head = bytes((0x80 * final | bits | opcode, short | 0x80 * masked))
    head += (size & ((1 << 8 * length_bytes) - 1)).to_bytes(length_bytes, "big")
    return head + (KEY + unmask(payload, KEY) if masked else payload)


def fragments(payload: bytes, cuts: Sequence[int], between: Sequence[bytes] = (), *, masked: bool = True) -> bytes:
    """A text message in fragments that end at `cuts`, with whole frames of `between` behind them, in turn."""
    edges = [0, *sorted(min(cut, len(payload)) for cut in cuts), len(payload)]
    parts = []
    for at in range(len(edges) - 1):
        last = at == len(edges) - 2
        opcode = CONTINUATION if at else TEXT
        parts.append(frame(opcode, payload[edges[at] : edges[at + 1]], final=last, masked=masked))
        if not last and between:
            parts.append(between[at % len(between)])
    return b"".join(parts)


def upgrade_request(host: str, resource: str, token: str | None = None) -> bytes:
    """The request that opens a WebSocket. Its answer has `accept_key` of ours."""
    lines = [
        f"GET {resource} HTTP/1.1",
        f"Host: {host}",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {_UPGRADE_KEY}",
    ]
    if token is not None:
        lines.append(f"Authorization: Bearer {token}")
    return "\r\n".join([*lines, "", ""]).encode("ascii")


def accept_key(key: str = _UPGRADE_KEY) -> str:
    """What ``Sec-WebSocket-Accept`` must say to a key (RFC 6455 section 4.2.2)."""
    return base64.b64encode(hashlib.sha1(key.encode("ascii") + _GUID).digest()).decode()


@frozen
class Received:
    """A whole text or binary message."""

    payload: bytes
    binary: bool = False


@frozen
class Control:
    """A ping or pong."""

    opcode: int
    payload: bytes


@frozen
class Closed:
    """A close frame; code 1005 if it carried none."""

    code: int
    reason: str


class MessageReader:
    """Takes bytes of one direction and gives messages; strict.

    It reads a client's bytes as well as a server's, so it also tells what a peer must have made of what was sent to it:
    `violation` is the close code that is due then.

    Args:
        masked: whether frames must be masked (a client's) or must not be (a server's).
    """

    def __init__(self, *, masked: bool) -> None:
        self._masked = masked
        self._buffer = bytearray()
        self._message: bytearray | None = None
        self._binary = False
        self.violation: FrameViolation | None = None
        self.closed: Closed | None = None

    @property
    def mid_frame(self) -> bool:
        """Whether the last frame is incomplete: nothing else can be said on this line."""
        return bool(self._buffer)

    @property
    def mid_message(self) -> bool:
        """Whether fragments of a message wait for the last one."""
        return self._message is not None

    def feed(self, data: bytes) -> list[Received | Control | Closed]:
        """What has become complete. After a violation or a close frame the rest is ignored; `violation` and `closed`
        say so."""
        found: list[Received | Control | Closed] = []
        self._buffer += data
        try:
            while self.violation is None and self.closed is None:
                item = self._next()
                if item is None:
                    return found
                if item is not _NOTHING:
                    found.append(item)
                if isinstance(item, Closed):
                    self.closed = item
        except FrameViolation as exc:
            self.violation = exc
        self._buffer.clear()
        return found

    def _next(self) -> Received | Control | Closed | None:
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        final, opcode, size = bool(buffer[0] & 0x80), buffer[0] & 15, buffer[1] & 0x7F
        if buffer[0] & 0x70:
            raise FrameViolation(1002, "reserved bits are set")
        if opcode not in (TEXT, BINARY, CONTINUATION, CLOSE, PING, PONG):
            raise FrameViolation(1002, f"reserved opcode {opcode}")
        if bool(buffer[1] & 0x80) is not self._masked:
            raise FrameViolation(1002, f"a frame is {'not ' if self._masked else ''}masked")
        if opcode >= CLOSE and (size > 125 or not final):
            raise FrameViolation(1002, "a control frame is long or in pieces")
        start = 2 + {126: 2, 127: 8}.get(size, 0)
        if len(buffer) < start:
            return None
        if start > 2:
            size = int.from_bytes(buffer[2:start], "big")
            if size < (126 if start == 4 else 65_536) or size >= 2**63:
                raise FrameViolation(1002, "a length is not in its shortest form, or negative")
        if opcode < CLOSE and (opcode == CONTINUATION) is not self.mid_message:
            raise FrameViolation(1002, "a continuation without a beginning, or a beginning within a message")
        start += 4 * self._masked
        if len(buffer) < start + size:
            return None
        payload = bytes(buffer[start : start + size])
        if self._masked:
            payload = unmask(payload, bytes(buffer[start - 4 : start]))
        del buffer[: start + size]
        if opcode == CLOSE:
            return Closed(*check_close(payload))
        if opcode >= PING:
            return Control(opcode, payload)
        if opcode != CONTINUATION:
            self._binary = opcode == BINARY
        whole = (self._message or bytearray()) + payload
        self._message = None if final else whole
        if not final:
            return _NOTHING
        if not self._binary:
            try:
                whole.decode()
            except UnicodeDecodeError:
                raise FrameViolation(1007, "text is not UTF-8") from None
        return Received(bytes(whole), self._binary)


_NOTHING = Control(-1, b"")


def dumps(value: object) -> str:
    """JSON as people read it."""
    return json.dumps(value, ensure_ascii=False)
