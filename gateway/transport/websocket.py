"""A server's WebSocket connection (RFC 6455) for text messages.

Theory of operation
-------------------
`upgrade` reads the request for it and answers; then there is a `ServerWebSocket`.

    get_many() ── reads, splits and unmasks: whole messages in batches; answers pings; joins fragments
    send_nowait() ── the FIFO is empty: one non-blocking write
                  └─ otherwise, or what the kernel refused: FIFO ──▶ pump (a task only while there is something)

One task reads, the one that handles the messages, so nothing is read ahead of it. A pong, a close and ready-made frames
go the same way out: one FIFO, in which every entry ends at a frame boundary and an entry partly sent is never
withdrawn, so nothing can tear a frame.

The rules are checked at a frame's header: no byte beyond a limit is waited for. Malformed frames get a close frame with
the RFC's code. Either side may begin the closing handshake at any point of the other's; one close frame, with our code,
goes out.

Phases: OPEN → CLOSING (our close was asked for, or the peer's is being answered) → CLOSED. Ready-made
frames are taken only while OPEN; from CLOSING on, text is discarded, or the peer's close reply would never be reached.
What the peer sent before it closed, or broke a rule, is still handled and answered; the close frame goes out when the
handler has left the block.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from enum import IntEnum
from math import inf

import trio

from gateway.errors import ConnectionLost
from gateway.transport.frames import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    TEXT,
    FrameViolation,
    Head,
    check_close,
    parse_head,
    text_frames,
    unmask,
)
from gateway.transport.streams import ByteStream, end_gently
from gateway.transport.upgrade import HandshakeFailed, Upgrade, UpgradeRequest, accepting

__all__ = ["LINGER", "Phase", "ServerWebSocket", "open_server_websocket"]

READ_BYTES = 64 * 1024
BATCH_MESSAGES = 1024
BATCH_BYTES = 1024 * 1024
"""Messages handed over at once, and their bytes: many small ones are handled in several passes of the scheduler."""

MAX_EMPTY_FRAGMENTS = 1024
"""In one message. The byte limit does not see them, and without one such a message would never have to end."""

LINGER = 1.0
"""Seconds for a peer that gets an HTTP error to read it and to close."""

_UTF8 = codecs.getincrementaldecoder("utf-8")


class Phase(IntEnum):
    OPEN = 1
    CLOSING = 2
    CLOSED = 3


class _Fragments:
    """A message that comes in pieces."""

    __slots__ = ("_decoder", "empty", "parts", "size")

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.size = self.empty = 0
        self._decoder = _UTF8()

    def add(self, payload: bytes, final: bool) -> None:
        """Raises `UnicodeDecodeError` at the first piece that cannot become UTF-8."""
        self._decoder.decode(payload, final)
        if payload:
            self.parts.append(payload)
            self.size += len(payload)
            return
        self.empty += 1
        if self.empty > MAX_EMPTY_FRAGMENTS:
            raise FrameViolation(1008, "protocol_violation")


class ServerWebSocket:
    """One accepted WebSocket. Made by `open_server_websocket`.

    Args:
        buffer: what the client has sent behind its request.

    Attributes:
        request: the upgrade request; None from `release` on.
        phase: where in its life it is.
        hold: whether messages are taken one by one, and nothing behind is looked at; until `release`.
        blocked: whether something waits in the FIFO; then the kernel takes no more for now.
        blocked_since: when that began (trio time); meaningful while `blocked`.
        progress_at: when the kernel last took something (trio time).
        close_code, close_reason: what was sent or received to end the connection; 1006 if the line was lost.
        connected_at: when the stream was handed over (trio time).
        on_unblocked: called (synchronously) whenever the FIFO has run empty.
        on_late: called (synchronously) with each text message that arrives after a close with 1013: a client that is
            closed because it does not read may still have something to say.
    """

    # There is one for each of thousands of idle clients: slots save 1.3 KB.
    __slots__ = (
        "_buffer",
        "_by_us",
        "_fifo",
        "_flushed",
        "_fragments",
        "_garbage",
        "_max_queued_frames",
        "_messages",
        "_nursery",
        "_over",
        "_peer_closed",
        "_pumping",
        "_read_over",
        "_reading",
        "_skip",
        "_stream",
        "_takes_late",
        "_waiting",
        "blocked",
        "blocked_since",
        "close_code",
        "close_reason",
        "connected_at",
        "hold",
        "max_message_bytes",
        "on_late",
        "on_unblocked",
        "phase",
        "progress_at",
        "request",
    )

    def __init__(
        self,
        stream: ByteStream,
        nursery: trio.Nursery,
        request: UpgradeRequest,
        buffer: bytearray,
        *,
        connected_at: float,
        max_message_bytes: int,
        max_queued_frames: int,
    ) -> None:
        self._stream = stream
        self._nursery = nursery
        self.request: UpgradeRequest | None = request
        self.connected_at = connected_at
        self._buffer = buffer
        self._messages: list[bytes] = []
        self._fragments: _Fragments | None = None
        self._skip = 0  # bytes still to come of a frame that nobody wants
        self._garbage = False  # the peer broke the framing: where a frame starts is not known any more
        self._reading: trio.CancelScope | None = None
        self._waiting = False
        self._read_over = False  # nothing that comes now is of interest to anyone
        self._fifo: deque[bytes | memoryview] | None = None
        self._max_queued_frames = max_queued_frames
        self._pumping = False
        self._flushed = trio.lowlevel.ParkingLot()
        self._by_us = False
        self._peer_closed = False
        self._over = False  # no message follows those that are split already
        self._takes_late = False
        self.hold = False
        self.max_message_bytes = max_message_bytes
        self.phase = Phase.OPEN
        self.blocked = False
        self.blocked_since = 0.0
        self.progress_at = 0.0
        self.close_code: int | None = None
        self.close_reason = ""
        self.on_unblocked: Callable[[], None] = _nothing
        self.on_late: Callable[[bytes], None] = _ignore

    @property
    def peer(self) -> str:
        """The peer's address."""
        return self._stream.peer

    @property
    def closed_by_us(self) -> bool:
        """Whether `close_code` is ours and not the peer's."""
        return self._by_us

    # reading

    async def get_many(self) -> list[bytes]:
        """Wait for text messages and take those that have come, in order. Cancelling is safe.

        Raises:
            ConnectionLost: the peer closed, the line is gone, or `close_nowait` was called. Messages that came before
                the peer's close are returned first.
        """
        while True:
            if self.phase is Phase.OPEN and not self._over:
                self._split()
            if self._by_us and self.phase is Phase.CLOSING:
                break
            if self._messages:
                batch, self._messages = self._messages, []
                return batch
            if self.phase is not Phase.OPEN or self._over:
                break
            await self._receive()
        raise ConnectionLost(self.close_code or 1006, self.close_reason)

    def release(self, max_message_bytes: int) -> None:
        """End a `hold`: what follows is read, with this limit. The upgrade request is forgotten."""
        self.max_message_bytes = max_message_bytes
        self.hold = False
        self.request = None

    @contextmanager
    def reading(self, deadline: float = inf) -> Iterator[trio.CancelScope]:
        """Around many calls of `get_many`: one that waits when the connection is closed leaves this block, instead of
        raising. It spares a cancel scope for each wait (3 µs). The block's scope has the deadline, and may be given
        another."""
        with trio.CancelScope(deadline=deadline) as self._reading:
            try:
                yield self._reading
            finally:
                self._reading = None

    async def _receive(self) -> None:
        """Wait for bytes, or for the end of the connection."""
        if self._reading is None:
            with trio.CancelScope() as self._reading:
                await self._receive()
            self._reading = None
            return
        self._waiting = True
        try:
            data = await self._stream.receive_some(READ_BYTES)
        except trio.BrokenResourceError:
            data = b""
        finally:
            self._waiting = False
        if data:
            if self._skip:
                skipped = min(self._skip, len(data))
                self._skip -= skipped
                data = data[skipped:]
            self._buffer += data
        else:
            self._lost()

    def _split(self) -> None:
        """Take whole frames out of the buffer, up to a batch of messages or the end of the connection."""
        buffer = self._buffer
        have = len(buffer)
        at = taken = count = 0
        try:
            while at < have and not self._read_over and count < BATCH_MESSAGES and taken < BATCH_BYTES:
                head = parse_head(buffer, at)
                if head is None:
                    break
                control = head.opcode >= CLOSE
                if not control and not self._wanted(head):
                    self._skip = max(0, head.end - have)
                    at = min(head.end, have)
                    continue
                if head.end > have:
                    break
                at = head.end
                payload = unmask(buffer[head.start : at], buffer[head.start - 4 : head.start])
                if control:
                    self._take_control(head.opcode, payload)
                    continue
                if head.opcode == TEXT and head.final:
                    if not payload.isascii():
                        payload.decode()
                else:
                    fragments = self._fragments = self._fragments or _Fragments()
                    fragments.add(payload, head.final)
                    if not head.final:
                        continue
                    self._fragments = None
                    payload = b"".join(fragments.parts)
                count += 1
                taken += len(payload)
                if self.phase is not Phase.OPEN:
                    self.on_late(payload)
                    continue
                self._messages.append(payload)
                if self.hold:
                    break
        except FrameViolation as exc:
            self._fail(exc.code, exc.reason)
        except UnicodeDecodeError:
            self._fail(1007, "text must be UTF-8")
        del buffer[: len(buffer) if self._garbage else at]

    def _take_control(self, opcode: int, payload: bytes) -> None:
        if opcode == CLOSE:
            self._peer_closes(*check_close(payload))
        elif opcode == PING and self.phase is Phase.OPEN and not self._over:
            self._enqueue(bytes((0x8A, len(payload))) + payload)

    def _fail(self, code: int, reason: str) -> None:
        """Where the next frame starts is not known any more, so the peer's close reply could not be told from noise."""
        self._garbage = True
        self._refuse(code, reason)
        self._end_reading()

    def _wanted(self, head: Head) -> bool:
        """The rules for a data frame, checked at its header: no byte beyond the limit is waited for."""
        if self.phase is not Phase.OPEN or self._over:
            return self._takes_late and head.opcode == TEXT and head.final and head.end - head.start <= READ_BYTES
        fragments = self._fragments
        if (fragments is not None) != (head.opcode == CONTINUATION):
            raise FrameViolation(1002, "a continuation must follow its own message")
        if head.opcode == BINARY:
            self._refuse(1003, "binary not supported")
            return False
        if (fragments.size if fragments else 0) + head.end - head.start > self.max_message_bytes:
            self._refuse(1009, "payload_too_large")
            return False
        return True

    # writing

    def send_nowait(self, payloads: Iterable[bytes]) -> bool:
        """Send text messages, one frame each, without waiting. False if the connection is no longer open.

        Call it only while not `blocked`, so that what the kernel refuses stays one write; what is left waits in the
        FIFO and `on_unblocked` tells when it is through.
        """
        if self.phase is not Phase.OPEN:
            return False
        self._enqueue(text_frames(payloads))
        return True

    def send_frames_nowait(self, frames: bytes) -> bool:
        """As `send_nowait`, with what `frames.text_frames` made: a fan-out encodes once for all its connections."""
        if self.phase is not Phase.OPEN:
            return False
        self._enqueue(frames)
        return True

    def _enqueue(self, data: bytes) -> None:
        """Write now if nothing waits, else queue. Entries are whole frames."""
        if self.phase is Phase.CLOSED or not data:
            return
        fifo = self._fifo
        if not fifo:
            try:
                sent = self._stream.send_nowait(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self._lost()
                return
            if sent == len(data):
                return
            self.blocked = True
            self.blocked_since = self.progress_at = trio.current_time()
            if fifo is None:
                fifo = self._fifo = deque()
            fifo.append(memoryview(data)[sent:])
            if not self._pumping:
                self._pumping = True
                # Owned by the connection's nursery; ends when the FIFO is empty or the line is lost.
                self._nursery.start_soon(self._pump, fifo)
            return
        fifo.append(data)
        if len(fifo) > self._max_queued_frames and self.phase is Phase.OPEN:
            self.close_nowait(1013, "overloaded")

    async def _pump(self, fifo: deque[bytes | memoryview]) -> None:
        try:
            while fifo:
                entry = fifo[0]
                sent = await self._stream.send_some(entry)
                self.progress_at = trio.current_time()
                if not fifo:
                    break  # the reader has found the line lost meanwhile
                if sent == len(entry):
                    fifo.popleft()
                    self.blocked_since = self.progress_at
                else:
                    fifo[0] = memoryview(entry)[sent:]
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._lost()
        finally:
            self._pumping = False
        self.blocked = False
        self._flushed.unpark_all()
        self.on_unblocked()

    # ending

    def close_nowait(self, code: int, reason: str) -> None:
        """Ask for the end of the connection. Nothing more is taken or delivered; leaving the block sends the close."""
        if self.phase is Phase.OPEN:
            self.phase = Phase.CLOSING
            self._by_us = True
            self.close_code, self.close_reason = code, reason
            self._takes_late = code == 1013
            if not self._takes_late:
                self._messages.clear()
            self._stop_waiting()

    def _refuse(self, code: int, reason: str) -> None:
        """The peer broke a rule: the connection ends with this code, behind what came before."""
        if self.phase is Phase.OPEN and not self._over:
            self._over = self._by_us = True
            self.close_code, self.close_reason = code, reason
            self._stop_waiting()

    def _peer_closes(self, code: int, reason: str) -> None:
        self._peer_closed = True
        if self.phase is Phase.OPEN and not self._over:
            self._over = True
            self.close_code, self.close_reason = code, reason
        self._end_reading()

    def _end_reading(self) -> None:
        self._read_over = True
        self._stop_waiting()

    def _stop_waiting(self) -> None:
        """Whoever waits for bytes looks again whether there is a reason to."""
        if self._waiting and self._reading is not None:
            self._reading.cancel()

    def _lost(self) -> None:
        """The line is gone."""
        if self.phase is not Phase.CLOSED:
            self.phase = Phase.CLOSED
            if self.close_code is None:
                self.close_code = 1006
            if self._fifo:
                self._fifo.clear()
            self._flushed.unpark_all()
            self._end_reading()

    async def _finish(self, timeout: float) -> None:
        """Send our close if it is our turn, wait for the peer's, and see the bytes out; at most `timeout` seconds."""
        with trio.move_on_after(timeout):
            if self.phase is Phase.OPEN and self._over:
                self.phase = Phase.CLOSING
            elif self.phase is Phase.OPEN:
                self.close_nowait(1000, "")
            if self.phase is not Phase.CLOSED:
                self._enqueue(_close_frame(self.close_code or 1000, self.close_reason))
                late, self._messages = self._messages, []
                for message in late if self._takes_late else ():
                    self.on_late(message)
                self._split()
                while not self._read_over:
                    await self._receive()
                    self._split()
            while self._pumping and self._fifo:
                await self._flushed.park()
            if self.phase is not Phase.CLOSED and not self._peer_closed:
                # Nothing can follow the peer's close frame. Without one, bytes may be unread.
                await end_gently(self._stream, timeout)


def _short(reason: str) -> str:
    """A close reason has at most 123 bytes (RFC 6455 section 5.5)."""
    return reason.encode()[:123].decode(errors="ignore")


def _close_frame(code: int, reason: str) -> bytes:
    payload = b"" if code == 1005 else code.to_bytes(2, "big") + _short(reason).encode()
    return bytes((0x88, len(payload))) + payload


def _nothing() -> None:
    pass


def _ignore(message: bytes) -> None:
    pass


@asynccontextmanager
async def open_server_websocket(
    stream: ByteStream,
    *,
    choose: Callable[[UpgradeRequest], str | None] = lambda request: None,
    max_message_bytes: int,
    max_queued_frames: int = 256,
    handshake_timeout: float = 10.0,
    close_timeout: float = 3.0,
    upgrading: dict[Upgrade, None] | None = None,
) -> AsyncIterator[ServerWebSocket]:
    """Upgrade `stream`, which this owns, and run a WebSocket on it.

    Leaving the block closes: the close frame that `close_nowait` asked for (1000 if none did), the peer's reply awaited
    for `close_timeout` seconds, then the stream is closed whatever its state. When the block is left by cancellation
    the stream is closed at once.

    Args:
        choose: says which of the offered subprotocols to take, or raises `HandshakeFailed` to refuse the request.
        upgrading: holds the request while it is being read; whoever stops it there ends this with what they say.

    Raises:
        HandshakeFailed: no usable upgrade request came within `handshake_timeout` seconds, or `choose` refused it.
    """
    connected_at = trio.current_time()
    upgrade = Upgrade(stream, connected_at + handshake_timeout)
    upgrading = {} if upgrading is None else upgrading
    try:
        upgrading[upgrade] = None
        try:
            request = await upgrade.read()
            answer = accepting(request, choose(request))
        except HandshakeFailed as failed:
            upgrade.refuse(failed)
            await end_gently(stream, min(LINGER, close_timeout))
            raise
        finally:
            del upgrading[upgrade]
        async with trio.open_nursery() as nursery:
            ws = ServerWebSocket(
                stream,
                nursery,
                request,
                upgrade.rest,
                connected_at=connected_at,
                max_message_bytes=max_message_bytes,
                max_queued_frames=max_queued_frames,
            )
            try:
                ws._enqueue(answer)
                # What is only ours to keep while this waits: a head of up to 16 KiB, with its cookies and tokens.
                del upgrade, request, answer
                yield ws
                await ws._finish(close_timeout)
                nursery.cancel_scope.cancel()
            finally:
                # A circle with whoever was called: without it both leave memory now, and not when the collector comes.
                ws.on_unblocked, ws.on_late = _nothing, _ignore
    finally:
        await stream.aclose()
