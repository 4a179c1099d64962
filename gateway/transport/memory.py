"""A network in memory: a pair of byte streams whose line can be delayed, stalled, truncated and cut.

The whole WebSocket stack runs over it, so what is tested here is what runs on sockets. Public: applications use it to
test their agents, and to talk to a gateway that they embed without a port.
"""

from __future__ import annotations

from collections import deque

import trio

from gateway.transport.streams import ByteStream, read_size

CAPACITY = 256 * 1024
"""Bytes on the way in one direction: what a kernel's socket buffers hold, roughly."""


class Line:
    """One direction of a connection, with the faults that can be put on it. Times in seconds of trio's clock."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._chunks: deque[tuple[float, bytes]] = deque()
        self._size = 0
        self._readers = trio.lowlevel.ParkingLot()
        self._writers = trio.lowlevel.ParkingLot()
        self._eof = False
        self._eof_at = 0.0
        self._broken = False
        self._stalled = False
        self._truncate_after: int | None = None
        self.delay = 0.0
        """Added to every byte written from now on."""
        self.transferred = 0
        """Bytes that were taken from the sender so far."""

    def stall(self) -> None:
        """Deliver nothing, not even the end, until `resume`. The sender notices only when the line is full."""
        self._stalled = True

    def resume(self) -> None:
        """End a `stall`."""
        self._stalled = False
        self._readers.unpark_all()

    def truncate(self, after: int) -> None:
        """Take `after` more bytes, then cut the line in the middle of whatever is being sent."""
        self._truncate_after = after

    def cut(self) -> None:
        """The line is gone: what is on the way is lost, both ends get `trio.BrokenResourceError`."""
        self._broken = True
        self._chunks.clear()
        self._readers.unpark_all()
        self._writers.unpark_all()

    def write(self, data: bytes | memoryview) -> int:
        """Take what there is room for at once. See `ByteStream.send_nowait`."""
        if self._broken or self._eof:
            raise trio.BrokenResourceError("the line was cut")
        taken = bytes(data[: max(0, self._capacity - self._size)])
        cut = False
        if self._truncate_after is not None:
            cut = len(taken) >= self._truncate_after
            taken = taken[: self._truncate_after]
            self._truncate_after -= len(taken)
        if taken:
            self._chunks.append((trio.current_time() + self.delay, taken))
            self._size += len(taken)
            self.transferred += len(taken)
            self._readers.unpark_all()
        if cut:
            # The reader gets what came through, then the end; the writer learns of it at its next write.
            self.end()
        return len(taken)

    def end(self) -> None:
        """Nothing more will be written: the reader gets what is on the way, then ``b""``."""
        if not self._eof:
            self._eof = True
            self._eof_at = trio.current_time() + self.delay
            self._readers.unpark_all()
            self._writers.unpark_all()

    def check_idle(self) -> None:
        """Raise `trio.BusyResourceError` if a task is waiting for room."""
        if self._writers:
            raise trio.BusyResourceError("another task is sending on this stream")

    async def wait_room(self) -> None:
        """Wait until `write` takes something, or raises."""
        await trio.lowlevel.checkpoint()
        self.check_idle()
        while self._size >= self._capacity and not self._broken and not self._eof:
            await self._writers.park()

    async def read(self, max_bytes: int) -> bytes:
        """Wait for bytes; ``b""`` is the end."""
        await trio.lowlevel.checkpoint()
        if self._readers:
            raise trio.BusyResourceError("another task is receiving on this stream")
        while True:
            if self._broken:
                raise trio.BrokenResourceError("the line was cut")
            if self._chunks and not self._stalled:
                ready, data = self._chunks[0]
                now = trio.current_time()
                if ready > now:
                    with trio.move_on_at(ready):
                        await self._readers.park()
                    continue
                self._chunks.popleft()
                if len(data) > max_bytes:
                    self._chunks.appendleft((ready, data[max_bytes:]))
                    data = data[:max_bytes]
                self._size -= len(data)
                self._writers.unpark_all()
                return data
            if self._eof and not self._chunks and not self._stalled:
                if trio.current_time() >= self._eof_at:
                    return b""
                with trio.move_on_at(self._eof_at):
                    await self._readers.park()
                continue
            await self._readers.park()


class MemoryByteStream(ByteStream):
    """One end of `memory_pair`. `outgoing` and `incoming` are its lines, to put faults on."""

    def __init__(self, outgoing: Line, incoming: Line, peer: str) -> None:
        self.outgoing = outgoing
        self.incoming = incoming
        self._peer = peer
        self._closed = False
        self._ended = False

    @property
    def peer(self) -> str:
        return self._peer

    def cut(self) -> None:
        """Break both directions at once."""
        self.outgoing.cut()
        self.incoming.cut()

    def _check_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this side closed the stream")

    def send_nowait(self, data: bytes | memoryview) -> int:
        self._check_open()
        if self._ended:
            raise trio.ClosedResourceError("this side has sent its end")
        return self.outgoing.write(data)

    async def send_some(self, data: bytes | memoryview) -> int:
        while True:
            await self.wait_send_all_might_not_block()
            sent = self.send_nowait(data)
            if sent or not data:
                return sent

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the line takes more. Cancelling is safe."""
        if not self._closed:
            await self.outgoing.wait_room()
        else:
            await trio.lowlevel.checkpoint()
        self._check_open()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Wait for at most `max_bytes` bytes and return them; ``b""`` is the peer's end. Cancelling loses nothing."""
        size = read_size(max_bytes)
        try:
            data = await self.incoming.read(size)
        except trio.BrokenResourceError:
            self._check_open()
            raise
        self._check_open()
        return data

    async def send_eof(self) -> None:
        """Say that nothing more will be sent."""
        self._check_open()
        self.outgoing.check_idle()
        self._ended = True
        self.outgoing.end()
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        """Close at once: what is on the way to the peer arrives, what the peer sends from now on is refused."""
        if not self._closed:
            self._closed = True
            self.outgoing.end()
            self.incoming.cut()
        await trio.lowlevel.checkpoint()


def memory_pair(*, capacity: int = CAPACITY, peer: str = "memory") -> tuple[MemoryByteStream, MemoryByteStream]:
    """Two connected streams: the client's end and the server's end."""
    up, down = Line(capacity), Line(capacity)
    return MemoryByteStream(up, down, peer), MemoryByteStream(down, up, peer)
