"""A server's WebSocket connection: trio-websocket over a stream of ours.

Theory of operation
-------------------
trio-websocket does the handshake, answers pings and joins fragments. `_Wire` stands between it and the socket and takes
the text messages, which are nearly everything, the short way:

    socket ── _Wire.receive_some ──┬── whole text frames ──▶ inbox ──▶ get_many()
                                   └── anything else ──▶ trio-websocket ──▶ (fragments come back into the inbox)

    send_nowait() ──┬── the FIFO is empty ──▶ one non-blocking write
    library's send ─┘── otherwise, or what the kernel refused ──▶ FIFO ──▶ pump (a task only while there is something)

Order in: nothing behind a fragmented message is parsed until that message has come out of the library.
Order out: one FIFO. Every entry ends at a frame boundary, and an entry partly sent is never withdrawn, so nothing can
tear a frame, not even a cancelled library call: those only append to the FIFO.

What the library would do wrong is kept from it: heads that are not ASCII, malformed frames (it would drop the line
without a close frame; we send 1002 or 1007), messages beyond the limit, pings after our close (it would raise), and the
closing handshake: either side may begin it at any point of the other's, and one close frame, with our code, goes out.

Phases: HANDSHAKE → OPEN → CLOSING (our close was asked for, or the peer's is being answered) → CLOSED. Ready-made
frames are taken only while OPEN; from CLOSING on, text is discarded, or the peer's close reply would never be reached.
What the peer sent before it closed, or broke a rule, is still handled and answered; the close frame goes out when the
handler has left the block.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from enum import IntEnum

import trio
import trio_websocket

from gateway.errors import ConnectionLost, TransportError
from gateway.transport.frames import (
    BINARY,
    CLOSE,
    CONTINUATION,
    TEXT,
    FrameViolation,
    Head,
    check_close,
    parse_head,
    text_frames,
    unmask,
)
from gateway.transport.streams import ByteStream, end_gently

MAX_HEAD = 16 * 1024
"""Bytes of an upgrade request: what common HTTP servers take (8 to 16 KiB) at its upper end."""

_HOST = re.compile(rb"\r\nhost:[ \t]*([^\r\n]*?)[ \t]*\r\n", re.IGNORECASE)

_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")

READ_BYTES = 64 * 1024
INBOX_MESSAGES = 1024
INBOX_BYTES = 1024 * 1024
"""Messages read ahead of the handler, and their bytes. It handles them without waiting, so this bounds little more than
one scheduler pass: a long array is handled in several."""

MAX_EMPTY_FRAGMENTS = 1024
"""In one message. The byte limit does not see them, and the library keeps something for each."""

LINGER = 1.0
"""Seconds for a peer that gets an HTTP error to read it and to close."""


class Phase(IntEnum):
    HANDSHAKE = 0
    OPEN = 1
    CLOSING = 2
    CLOSED = 3


class HandshakeFailed(TransportError):
    """The upgrade request was refused or never completed; the peer got an HTTP answer where one was possible."""

    status = b"400 Bad Request"


class _NoRequest(HandshakeFailed):
    status = b"408 Request Timeout"


class _Wire(trio.abc.HalfCloseableStream):
    """The stream trio-websocket sees."""

    def __init__(self, ws: ServerWebSocket, stream: ByteStream) -> None:
        self._ws = ws
        self._stream = stream
        self._buffer = bytearray()
        self._head_seen = False
        self.host: str | None = None  # the library keeps this header to itself
        self._skip = 0  # bytes still to come of a frame that nobody wants
        self._garbage = False  # the peer broke the framing: where a frame starts is not known any more
        self._fragments = 0  # bytes of the fragmented message so far, headers of its frames not counted
        self._empty = 0  # empty fragments of it
        self._in_fragments = False
        self._collect = False  # the last fragment was handed over: its message is in the library now

    # inwards

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Bytes for the library: the request, then whatever is not a whole text frame."""
        ws = self._ws
        if ws.phase is Phase.HANDSHAKE and not self._head_seen:
            self._head_seen = True
            return await self._receive_head()
        while ws.phase is Phase.HANDSHAKE:
            await ws._opened.park()
        if self._collect:
            self._collect = False
            await ws._collect_message()
        while not ws._library_ended:
            for_library = self._parse()
            if for_library:
                return for_library
            if await ws._wait_inbox_room() or ws._library_ended:
                continue  # what was held back is in the buffer, or the reading is over
            try:
                data = await self._stream.receive_some(READ_BYTES)
            except trio.BrokenResourceError:
                ws._lost()
                raise
            if not data:
                ws._lost()
                return b""
            if self._skip:
                skipped = min(self._skip, len(data))
                self._skip -= skipped
                data = data[skipped:]
            self._buffer += data
        return b""

    async def _receive_head(self) -> bytes:
        buffer = self._buffer
        while (end := buffer.find(b"\r\n\r\n")) < 0:
            if len(buffer) > MAX_HEAD:
                raise HandshakeFailed(f"the request's head is longer than {MAX_HEAD} bytes")
            try:
                data = await self._stream.receive_some(4096)
            except trio.BrokenResourceError as exc:
                # Not as it is: the library would swallow it and wait on.
                raise HandshakeFailed(f"the line was lost during the upgrade request: {exc}") from None
            if not data:
                raise HandshakeFailed("the peer closed during the upgrade request")
            buffer += data
        head = bytes(buffer[: end + 4])
        if len(head) > MAX_HEAD:
            raise HandshakeFailed(f"the request's head is longer than {MAX_HEAD} bytes")
        if not head.isascii() or _CONTROL.search(head):
            raise HandshakeFailed("the request's head must be printable ASCII")
        if not head.startswith(b"GET "):
            raise HandshakeFailed("expected a GET request with Upgrade: websocket")
        if head.count(b"\n") != head.count(b"\r\n"):
            # The library's parser would take them, and see another Host than we do.
            raise HandshakeFailed("the request's lines must end with CR LF")
        del buffer[: end + 4]
        found = _HOST.search(head)
        self.host = found[1].decode("ascii") if found else None
        return head

    def _parse(self) -> bytes:
        """Move whole text messages to the inbox; return the first thing the library has to see, if any."""
        ws = self._ws
        buffer = self._buffer
        at = len(buffer) if self._garbage else 0
        try:
            while not ws._held and (head := parse_head(buffer, at)) is not None:
                if not head.control and not self._wanted(head):
                    self._skip = max(0, head.end - len(buffer))
                    at = min(head.end, len(buffer))
                    continue
                if head.end > len(buffer):
                    break
                frame_at, at = at, head.end
                if head.opcode == TEXT and head.final:
                    message = unmask(buffer[head.start : head.end], buffer[head.start - 4 : head.start])
                    if not message.isascii():
                        message.decode()
                    ws._put(message)
                    continue
                if not head.control:
                    self._count_fragment(head)
                elif head.opcode == CLOSE:
                    payload = unmask(buffer[head.start : head.end], buffer[head.start - 4 : head.start])
                    ws._peer_closes(*check_close(payload))
                    return b""
                elif ws.phase is not Phase.OPEN or ws._over:
                    continue  # the library would raise on a ping after our close
                return bytes(buffer[frame_at:at])
        except FrameViolation as exc:
            self._fail(exc.code, exc.reason)
        except UnicodeDecodeError:
            self._fail(1007, "text must be UTF-8")
        finally:
            del buffer[: len(buffer) if self._garbage else at]
        return b""

    def _fail(self, code: int, reason: str) -> None:
        """Where the next frame starts is not known any more, so the peer's close reply could not be told from noise."""
        self._garbage = True
        self._ws._refuse(code, reason)
        self._ws._end_reading()

    def _count_fragment(self, head: Head) -> None:
        size = head.end - head.start
        self._in_fragments = not head.final
        self._collect = head.final
        self._fragments = 0 if head.final else self._fragments + size
        self._empty = 0 if head.final else self._empty + (not size)
        if self._empty > MAX_EMPTY_FRAGMENTS:
            raise FrameViolation(1008, "protocol_violation")

    def _wanted(self, head: Head) -> bool:
        """The rules for a data frame, checked at its header: no byte beyond the limit is waited for."""
        ws = self._ws
        if ws.phase is not Phase.OPEN or ws._over:
            return ws._takes_late and head.opcode == TEXT and head.final and head.end - head.start <= READ_BYTES
        if self._in_fragments != (head.opcode == CONTINUATION):
            raise FrameViolation(1002, "a continuation must follow its own message")
        if head.opcode == BINARY:
            ws._refuse(1003, "binary not supported")
            return False
        if self._fragments + head.end - head.start > ws.max_message_bytes:
            ws._refuse(1009, "payload_too_large")
            return False
        return True

    # outwards: called by the library, whole frames only

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        # Enters the FIFO and returns: a pong must not stop the library from reading when the peer does not read.
        if not self._ws._close_sent:
            self._ws._enqueue(bytes(data))
        await trio.lowlevel.checkpoint()

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        # The library has given up on the peer; its owner flushes and closes the stream (`ServerWebSocket._finish`).
        self._ws._library_done()
        await trio.lowlevel.checkpoint()


class ServerWebSocket:
    """One accepted WebSocket. Made by `open_server_websocket`.

    Attributes:
        phase: where in its life it is.
        hold: whether nothing behind the next message is looked at until `release`; set it before the message can come.
        blocked: whether something waits in the FIFO; then the kernel takes no more for now.
        blocked_since: when that began (trio time); meaningful while `blocked`.
        progress_at: when the kernel last took something (trio time).
        close_code, close_reason: what was sent or received to end the connection; 1006 if the line was lost.
        connected_at: when the stream was handed over (trio time).
        on_unblocked: called (synchronously) whenever the FIFO has run empty.
        on_late: called (synchronously) with each text message that arrives after a close with 1013: a client that is
            closed because it does not read may still have something to say.
    """

    def __init__(
        self, stream: ByteStream, nursery: trio.Nursery, *, max_message_bytes: int, max_queued_frames: int
    ) -> None:
        self._stream = stream
        self._nursery = nursery
        self._wire = _Wire(self, stream)
        self._library: trio_websocket.WebSocketConnection | None = None
        self._request: trio_websocket.WebSocketRequest | None = None
        self._fifo: deque[bytes | memoryview] = deque()
        self._max_queued_frames = max_queued_frames
        self._pumping = False
        self._inbox: list[bytes] = []
        self._inbox_bytes = 0
        self._held = False
        self.hold = False
        self._arrived = trio.lowlevel.ParkingLot()
        self._taken = trio.lowlevel.ParkingLot()
        self._opened = trio.lowlevel.ParkingLot()
        self._ended = trio.lowlevel.ParkingLot()
        self._flushed = trio.lowlevel.ParkingLot()
        self._handshake_scope = trio.CancelScope()
        self._library_ended = False
        self._wrote = False
        self._by_us = False
        self._close_sent = False
        self._peer_closed = False
        self._over = False  # no message follows those in the inbox
        self._takes_late = False
        self.max_message_bytes = max_message_bytes
        self.phase = Phase.HANDSHAKE
        self.blocked = False
        self.blocked_since = 0.0
        self.progress_at = 0.0
        self.close_code: int | None = None
        self.close_reason = ""
        self.connected_at = trio.current_time()
        self.on_unblocked: Callable[[], None] = lambda: None
        self.on_late: Callable[[bytes], None] = lambda message: None

    # the upgrade request

    @property
    def peer(self) -> str:
        """The peer's address."""
        return self._stream.peer

    @property
    def closed_by_us(self) -> bool:
        """Whether `close_code` is ours and not the peer's."""
        return self._by_us

    @property
    def path(self) -> str:
        """The requested path without its query."""
        assert self._request is not None
        return self._request.path.partition("?")[0]

    @property
    def query(self) -> str:
        """The query of the request, without the question mark."""
        assert self._request is not None
        return self._request.path.partition("?")[2]

    @property
    def subprotocols(self) -> tuple[str, ...]:
        """What the client offers in ``Sec-WebSocket-Protocol``."""
        assert self._request is not None
        return self._request.proposed_subprotocols

    @property
    def host(self) -> str | None:
        """The ``Host`` header."""
        return self._wire.host

    def header(self, name: bytes) -> str | None:
        """A header of the request by its lower-case name."""
        assert self._request is not None
        for key, value in self._request.headers:
            if key == name:
                return value.decode("ascii")
        return None

    async def _handshake(self) -> None:
        """Read the upgrade request. Raises `HandshakeFailed`."""
        # When the library refuses a request it closes the stream but does not say so to `wrap_server_stream`, which
        # would wait for ever: `_library_done` cancels this scope.
        with self._handshake_scope:
            self._request = await trio_websocket.wrap_server_stream(
                self._nursery,
                self._wire,
                message_queue_size=1,
                max_message_size=2**63,  # bytes are counted here, from the header
                receive_buffer_size=None,
            )
        if self._request is None:
            raise HandshakeFailed("expected a WebSocket upgrade request (RFC 6455 section 4.2.1)")

    async def accept(self, subprotocol: str | None = None) -> None:
        """Answer 101 and open the connection. `subprotocol` must be one that was offered."""
        assert self._request is not None
        self._library = await self._request.accept(subprotocol=subprotocol)
        # Only now: what came right behind the request must not be read before there is somewhere to put it.
        if self.phase is Phase.HANDSHAKE:
            self.phase = Phase.OPEN
        self._opened.unpark_all()

    async def reject(self, status: int, body: bytes) -> None:
        """Answer with an HTTP error instead; the block of `open_server_websocket` should then be left."""
        assert self._request is not None
        headers = [(b"Content-Type", b"text/plain; charset=utf-8"), (b"Connection", b"close")]
        self.phase = Phase.CLOSING
        await self._request.reject(status, extra_headers=headers, body=body)
        self._library_done()

    # reading

    async def get_many(self) -> list[bytes]:
        """Wait for text messages and take all there are, in order. Cancelling is safe.

        Raises:
            ConnectionLost: the peer closed, the line is gone, or `close_nowait` was called. Messages that came before
                the peer's close are returned first.
        """
        while not self._inbox:
            if self.phase is not Phase.OPEN or self._over:
                raise ConnectionLost(self.close_code or 1006, self.close_reason)
            await self._arrived.park()
        if self._by_us and self.phase is Phase.CLOSING:
            raise ConnectionLost(self.close_code or 1006, self.close_reason)
        batch, self._inbox, self._inbox_bytes = self._inbox, [], 0
        self._taken.unpark_all()
        return batch

    def release(self, max_message_bytes: int) -> None:
        """End a `hold`: what follows is read, with this limit."""
        self.max_message_bytes = max_message_bytes
        self.hold = self._held = False
        self._taken.unpark_all()

    def _put(self, message: bytes) -> None:
        if self.phase is not Phase.OPEN:
            self.on_late(message)
            return
        self._inbox.append(message)
        self._inbox_bytes += len(message)
        self._held = self.hold
        self._arrived.unpark_all()

    async def _wait_inbox_room(self) -> bool:
        """Wait until the handler has room; says whether that took any waiting."""
        waited = False
        while self.phase is Phase.OPEN and (
            self._held or len(self._inbox) >= INBOX_MESSAGES or self._inbox_bytes >= INBOX_BYTES
        ):
            waited = True
            await self._taken.park()
        return waited

    async def _collect_message(self) -> None:
        """Take the message that the library has put together of fragments."""
        if self.phase is not Phase.OPEN or self._over:
            return
        assert self._library is not None
        try:
            message = await self._library.get_message()
        except trio_websocket.ConnectionClosed:
            # Fragments that are not UTF-8: the library has failed the connection on its own.
            self._refuse(1007, "text must be UTF-8")
            return
        self._put(message.encode() if isinstance(message, str) else message)

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
        if not self._fifo:
            try:
                sent = self._stream.send_nowait(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self._lost()
                return
            if sent:
                self._wrote = True
            if sent == len(data):
                return
            self.blocked = True
            self.blocked_since = self.progress_at = trio.current_time()
            self._fifo.append(memoryview(data)[sent:])
            if not self._pumping:
                self._pumping = True
                # Owned by the connection's nursery; ends when the FIFO is empty or the line is lost.
                self._nursery.start_soon(self._pump)
            return
        self._fifo.append(data)
        if len(self._fifo) > self._max_queued_frames and self.phase is Phase.OPEN:
            self.close_nowait(1013, "overloaded")

    async def _pump(self) -> None:
        fifo = self._fifo
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
        if self.phase in (Phase.HANDSHAKE, Phase.OPEN):
            self.phase = Phase.CLOSING
            self._by_us = True
            self.close_code, self.close_reason = code, reason
            self._takes_late = code == 1013
            if not self._takes_late:
                self._inbox.clear()
            self._wake()

    def _refuse(self, code: int, reason: str) -> None:
        """The peer broke a rule: the connection ends with this code, behind what came before."""
        if self.phase is Phase.OPEN and not self._over:
            self._over = self._by_us = True
            self.close_code, self.close_reason = code, reason
            self._wake()

    def _peer_closes(self, code: int, reason: str) -> None:
        self._peer_closed = True
        if self.phase is Phase.OPEN and not self._over:
            self._over = True
            self.close_code, self.close_reason = code, reason
        self._end_reading()

    def _end_reading(self) -> None:
        """Nothing that comes now is of interest to anyone."""
        self._library_ended = True
        self._wake()

    def _lost(self) -> None:
        """The line is gone."""
        if self.phase is not Phase.CLOSED:
            self.phase = Phase.CLOSED
            if self.close_code is None:
                self.close_code = 1006
            self._fifo.clear()
            self._flushed.unpark_all()
            self._end_reading()

    def _library_done(self) -> None:
        """The library has closed "its" stream: refused the request, or given up on the peer."""
        if self.phase is Phase.HANDSHAKE:
            self._handshake_scope.cancel()
        elif self.phase is Phase.OPEN:
            # Fragments that are not UTF-8: it gave up without a close frame, which `_finish` will send.
            self._refuse(1007, "text must be UTF-8")
        self._end_reading()

    def _wake(self) -> None:
        self._held = False
        self._arrived.unpark_all()
        self._taken.unpark_all()
        self._opened.unpark_all()
        self._ended.unpark_all()

    async def _finish(self, timeout: float) -> None:
        """Send our close if it is our turn, wait for the peer's, and see the bytes out; at most `timeout` seconds."""
        with trio.move_on_after(timeout):
            if self.phase is Phase.OPEN and self._over:
                self.phase = Phase.CLOSING
            elif self.phase is Phase.OPEN:
                self.close_nowait(1000, "")
            if self._library is not None and self.phase is not Phase.CLOSED:
                self._close_sent = True
                self._enqueue(_close_frame(self.close_code or 1000, self.close_reason))
                late, self._inbox = self._inbox, []
                for message in late if self._takes_late else ():
                    self.on_late(message)
                while not self._library_ended:
                    await self._ended.park()
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


_ANSWER = b"HTTP/1.1 %b\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b"


@asynccontextmanager
async def open_server_websocket(
    stream: ByteStream,
    *,
    max_message_bytes: int,
    max_queued_frames: int = 256,
    handshake_timeout: float = 10.0,
    close_timeout: float = 3.0,
) -> AsyncIterator[ServerWebSocket]:
    """Run a WebSocket on `stream`, which this owns. Inside the block, `accept` or `reject` comes first.

    Leaving the block closes: the close frame that `close_nowait` asked for (1000 if none did), the peer's reply awaited
    for `close_timeout` seconds, then the stream is closed whatever its state. When the block is left by cancellation
    the stream is closed at once.

    Raises:
        HandshakeFailed: no usable upgrade request came within `handshake_timeout` seconds.
    """
    ws: ServerWebSocket | None = None
    try:
        async with trio.open_nursery() as nursery:
            ws = ServerWebSocket(
                stream, nursery, max_message_bytes=max_message_bytes, max_queued_frames=max_queued_frames
            )
            with trio.move_on_after(handshake_timeout):
                await ws._handshake()
            if ws._request is None:
                raise _NoRequest("no upgrade request within the time limit")
            yield ws
            await ws._finish(close_timeout)
            nursery.cancel_scope.cancel()
    except ExceptionGroup as group:
        # Before the request is there, whatever went wrong is the request's fault: the library raises on some heads.
        if ws is None or ws._request is not None:
            raise
        failed = next((exc for exc in _leaves(group) if isinstance(exc, HandshakeFailed)), None)
        failed = failed or HandshakeFailed("malformed request")
        if not ws._wrote:
            _answer_in_http(stream, failed)
        await end_gently(stream, min(LINGER, close_timeout))
        raise failed from None
    finally:
        if ws is not None:
            # A circle with whoever was called: without it both leave memory now, and not when the collector comes by.
            ws.on_unblocked, ws.on_late = lambda: None, lambda message: None
        await stream.aclose()


def _leaves(group: ExceptionGroup[Exception]) -> Iterator[Exception]:
    for exc in group.exceptions:
        if isinstance(exc, ExceptionGroup):
            yield from _leaves(exc)
        else:
            yield exc


def _answer_in_http(stream: ByteStream, failed: HandshakeFailed) -> None:
    """Say it in HTTP, as far as one non-blocking write goes."""
    body = f"{failed}\n".encode()
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        stream.send_nowait(_ANSWER % (failed.status, len(body), body))
