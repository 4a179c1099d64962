"""Byte streams a WebSocket can run on: what a trio stream offers, and one non-blocking write.

The non-blocking write is what makes the flusher possible: one task writes to thousands of connections, and only those
that the kernel refuses get a task of their own.
"""

from __future__ import annotations

import os
import socket
from abc import abstractmethod
from contextlib import suppress

import trio

READ_BYTES = 65_536
"""Bytes asked for in one read: the socket buffer of a peer that sends much, in a few reads."""


def read_size(max_bytes: int | None) -> int:
    """Check the argument of `receive_some`, as trio's streams do."""
    if max_bytes is None:
        return READ_BYTES
    if type(max_bytes) is not int:
        raise TypeError(f"max_bytes must be an int, not {type(max_bytes).__name__}")
    if max_bytes < 1:
        raise ValueError("max_bytes must be at least 1")
    return max_bytes


class ByteStream(trio.abc.HalfCloseableStream):
    """A trio stream that can also be written to without waiting. One writer at a time."""

    @property
    @abstractmethod
    def peer(self) -> str:
        """The peer's address without its port, as text: what admission counts by."""

    @abstractmethod
    def send_nowait(self, data: bytes | memoryview) -> int:
        """Hand over what can be taken at once; return how many bytes that was, 0 if none. What was not taken must be
        what the next call begins with: under TLS it may be encrypted already.

        Raises:
            trio.BrokenResourceError: the line is gone.
            trio.ClosedResourceError: this side closed the stream.
        """

    @abstractmethod
    async def send_some(self, data: bytes | memoryview) -> int:
        """Wait until something can be taken, and return how many bytes were; 0 if it was not a whole piece (TLS).

        Cancelling is safe: either bytes were taken and their number is returned, or none were. Errors as `send_nowait`.
        """

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send everything. A cancelled call has sent an unknown part of it."""
        await trio.lowlevel.checkpoint()
        rest = memoryview(bytes(data))
        self.send_nowait(b"")  # raises if this side is closed, also when there is nothing to send
        while rest:
            rest = rest[await self.send_some(rest) :]


async def end_gently(stream: ByteStream, seconds: float) -> None:
    """Say that nothing follows, and read until the peer is through, for at most `seconds`; the stream is then closed.

    Closing at once while bytes of the peer are unread would be a reset, which may take along what was sent last.
    """
    with trio.move_on_after(seconds), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await stream.send_eof()
        while await stream.receive_some():
            pass


class SocketByteStream(ByteStream):
    """A connected TCP or Unix socket (POSIX: it reads and writes the file descriptor itself, which saves a failed
    attempt per idle read and the trio socket's own bookkeeping per write).

    Args:
        sock: connected; this stream owns it from now on.
        send_buffer: the kernel's send buffer in bytes; what is in there cannot be merged or superseded any more.
    """

    def __init__(self, sock: trio.socket.SocketType, *, send_buffer: int | None = None) -> None:
        self._sock = sock
        self._peer = _address(sock)
        self._ended = False
        self._waiting = False  # whether a task waits until the kernel takes more
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if send_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)

    @property
    def peer(self) -> str:
        return self._peer

    def _fileno(self) -> int:
        # Asked for anew before each raw call: after a close the number may be someone else's socket.
        fd = self._sock.fileno()
        if fd < 0:
            raise trio.ClosedResourceError("this side closed the stream")
        return fd

    def send_nowait(self, data: bytes | memoryview) -> int:
        fd = self._fileno()
        if self._ended:
            raise trio.ClosedResourceError("this side has sent its end")
        try:
            return os.write(fd, data)
        except BlockingIOError:
            return 0
        except OSError as exc:
            raise trio.BrokenResourceError(str(exc)) from exc

    async def send_some(self, data: bytes | memoryview) -> int:
        while True:
            await self.wait_send_all_might_not_block()
            sent = self.send_nowait(data)
            if sent or not data:
                return sent

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the kernel takes more. Cancelling is safe."""
        if self._waiting:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._waiting = True
        try:
            await trio.lowlevel.wait_writable(self._fileno())
        except trio.ClosedResourceError:
            await trio.lowlevel.checkpoint()
            raise
        except OSError as exc:
            raise trio.BrokenResourceError(str(exc)) from exc
        finally:
            self._waiting = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Wait for bytes and return at most `max_bytes` of them; ``b""`` is the peer's end. Cancelling loses nothing.

        Waits for readability before it reads: on a socket that is mostly idle the first read would nearly always
        fail, and cost as much as one that succeeds.
        """
        size = read_size(max_bytes)
        while True:
            try:
                await trio.lowlevel.wait_readable(self._fileno())
                return os.read(self._fileno(), size)
            except BlockingIOError:
                continue
            except trio.ClosedResourceError:
                await trio.lowlevel.checkpoint()
                raise
            except OSError as exc:
                raise trio.BrokenResourceError(str(exc)) from exc

    async def send_eof(self) -> None:
        """Say that nothing more will be sent."""
        await trio.lowlevel.checkpoint()
        self._fileno()
        if self._waiting:
            raise trio.BusyResourceError("another task is sending on this stream")
        if self._ended:
            return
        self._ended = True
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError as exc:
            raise trio.BrokenResourceError(str(exc)) from exc

    async def aclose(self) -> None:
        """Close the socket at once; whoever waits on it gets `trio.ClosedResourceError`."""
        self._sock.close()
        await trio.lowlevel.checkpoint()


def _address(sock: trio.socket.SocketType) -> str:
    try:
        name = sock.getpeername()
    except OSError:
        return "?"
    return str(name[0]) if isinstance(name, tuple) else "unix"
