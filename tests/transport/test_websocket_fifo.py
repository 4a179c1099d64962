"""What goes out of one WebSocket: a single FIFO of whole frames, over a line in memory that takes only a few bytes."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing
from raw_peer import CLOSE, PING, PONG, REQUEST, TEXT, Peer, close, frame

from gateway.errors import ConnectionLost
from gateway.transport.memory import MemoryByteStream, memory_pair
from gateway.transport.websocket import Phase, ServerWebSocket, open_server_websocket

Clock = trio.testing.MockClock


class Server:
    """Serves one stream: opens, tells the test, and stays until the connection ends or `leave` is set."""

    def __init__(self, stream: MemoryByteStream, **limits: float) -> None:
        self.stream = stream
        self.limits = limits
        self.ready = trio.Event()
        self.leave = trio.Event()
        self.scope = trio.CancelScope()
        self.lost: ConnectionLost | None = None
        self.heard: list[bytes] = []
        self.ws: ServerWebSocket

    async def run(self) -> None:
        queued = int(self.limits.get("max_queued_frames", 10_000))
        timeout = self.limits.get("close_timeout", 5.0)
        with self.scope:
            async with open_server_websocket(
                self.stream, max_message_bytes=1 << 20, max_queued_frames=queued, close_timeout=timeout
            ) as ws:
                self.ws = ws
                self.ready.set()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._read, nursery.cancel_scope)
                    await self.leave.wait()
                    nursery.cancel_scope.cancel()

    async def _read(self, scope: trio.CancelScope) -> None:
        try:
            while True:
                self.heard += await self.ws.get_many()
        except ConnectionLost as exc:
            self.lost = exc
        scope.cancel()


async def start(nursery: trio.Nursery, capacity: int = 1 << 18, **limits: float) -> tuple[Server, Peer]:
    near, far = memory_pair(capacity=capacity)
    server, peer = Server(far, **limits), Peer(near)
    nursery.start_soon(server.run)
    nursery.start_soon(peer.send, REQUEST)
    assert (await peer.http())[0] == 101
    await server.ready.wait()
    return server, peer


SIZES = [0, 1, 2, 7, 60, 125, 126, 127, 1000, 65_535, 65_536, 70_000]


@pytest.mark.parametrize("capacity", [1, 2, 3, 7, 64, 1000, 65_536])
async def test_no_frame_is_torn(autojump_clock: Clock, nursery: trio.Nursery, capacity: int) -> None:
    chance = random.Random(capacity)
    server, peer = await start(nursery, capacity)
    sizes = [size for size in SIZES if size < capacity * 2000]
    sent: list[bytes] = []
    pings = 0

    async def write() -> None:
        for number in range(60):
            payloads = [b"%d:" % number + b"x" * chance.choice(sizes) for _ in range(chance.randrange(3))]
            # Also while it is blocked: what order and wholeness there is must not depend on the caller's manners.
            assert server.ws.send_nowait(payloads)
            sent.extend(payloads)
            await trio.sleep(chance.random())

    async def ping() -> None:
        nonlocal pings
        for number in range(40):
            await peer.send(frame(PING, b"%d" % number))
            pings += 1
            await trio.sleep(chance.random())

    async with trio.open_nursery() as writing:
        writing.start_soon(write)
        writing.start_soon(ping)
        while len(peer.frames) < 20:
            await peer.recv()
            await trio.sleep(chance.random())
    await peer.send(close(1000))
    await peer.until_end()
    assert [payload for opcode, payload in peer.frames if opcode == TEXT] == sent
    assert [payload for opcode, payload in peer.frames if opcode == PONG] == [b"%d" % number for number in range(pings)]
    assert peer.closes == [(1000, "")]
    assert server.lost is not None
    assert server.lost.code == 1000


async def test_blocked_tells_since_when_and_when_it_is_over(autojump_clock: Clock, nursery: trio.Nursery) -> None:
    server, peer = await start(nursery, 10)
    ws, told = server.ws, []
    ws.on_unblocked = lambda: told.append(trio.current_time())
    ws.send_nowait([b"fits"])
    assert not ws.blocked
    assert await peer.recv() == (TEXT, b"fits")
    await trio.sleep(5)
    ws.send_nowait([b"this does not fit"])
    began = trio.current_time()
    assert (ws.blocked, ws.blocked_since, ws.progress_at) == (True, began, began)
    await trio.sleep(3)
    assert (ws.blocked_since, told) == (began, [])
    await peer.more()
    await trio.testing.wait_all_tasks_blocked()
    assert (ws.blocked, told) == (False, [began + 3])
    assert ws.progress_at == began + 3
    assert await peer.recv() == (TEXT, b"this does not fit")


async def test_sending_nothing_is_nothing(autojump_clock: Clock, nursery: trio.Nursery) -> None:
    server, peer = await start(nursery, 10)
    server.ws.send_nowait([])
    server.ws.send_nowait([b"this does not fit"])
    server.ws.send_nowait([])  # must not become an entry: a write of nothing never gets done
    server.ws.send_frames_nowait(b"")
    server.ws.send_nowait([b"behind"])
    assert await peer.recv() == (TEXT, b"this does not fit")
    assert await peer.recv() == (TEXT, b"behind")
    await trio.testing.wait_all_tasks_blocked()
    assert not server.ws.blocked


@pytest.mark.parametrize("capacity", [3, 50])
async def test_a_cancelled_connection_drops_the_line(
    autojump_clock: Clock, nursery: trio.Nursery, capacity: int
) -> None:
    server, peer = await start(nursery, capacity)
    server.ws.send_nowait([b"x" * 100])
    assert server.ws.blocked
    server.scope.cancel()
    await trio.testing.wait_all_tasks_blocked()
    with pytest.raises(trio.BrokenResourceError):
        await peer.stream.send_all(b"anyone there?")
    while await peer.more():
        pass
    assert len(peer.buffer) == capacity, "nothing more may follow half a frame"


@pytest.mark.parametrize("queued", [8, 100])
async def test_a_full_queue_is_1013_behind_what_was_begun(
    autojump_clock: Clock, nursery: trio.Nursery, queued: int
) -> None:
    server, peer = await start(nursery, 10, max_queued_frames=queued)
    ws = server.ws
    for number in range(queued):
        assert ws.send_nowait([b"%03d" % number + b"x" * 20])
    assert ws.phase is Phase.OPEN
    for number in range(500):
        await peer.send(frame(PING, b"%d" % number))
    await trio.testing.wait_all_tasks_blocked()
    assert ws.phase is Phase.CLOSING
    assert not ws.send_nowait([b"late"])
    assert len(ws._fifo) <= queued + 2  # one over the limit, and the close frame
    assert await peer.until_close() == (1013, "overloaded")
    texts = [payload for opcode, payload in peer.frames if opcode == TEXT]
    assert texts == [b"%03d" % number + b"x" * 20 for number in range(queued)]
    await peer.send(close(1013))
    await peer.until_end()


async def test_leaving_the_block_is_1000_and_takes_out_what_waits(autojump_clock: Clock, nursery: trio.Nursery) -> None:
    server, peer = await start(nursery, 10)
    server.ws.send_nowait([b"x" * 200])
    server.leave.set()
    await trio.testing.wait_all_tasks_blocked()
    assert not server.ws.send_nowait([b"late"])
    assert not server.ws.send_frames_nowait(b"late")
    assert await peer.recv() == (TEXT, b"x" * 200)
    assert await peer.recv() == (CLOSE, b"\x03\xe8")
    await peer.send(frame(PING, b"after the close"), frame(TEXT, b"late"), close(1000))
    await peer.until_end()
    assert server.heard == []


@pytest.mark.parametrize("reason", ["r" * 200, "ü" * 100, ""])
async def test_a_long_reason_is_cut_at_a_character(autojump_clock: Clock, nursery: trio.Nursery, reason: str) -> None:
    server, peer = await start(nursery)
    server.ws.close_nowait(4999, reason)
    code, got = await peer.until_close()
    assert code == 4999
    assert reason.startswith(got)
    assert len(got.encode()) == min(len(reason.encode()), 122 if "ü" in reason else 123)


async def test_a_line_found_lost_while_frames_wait(autojump_clock: Clock, nursery: trio.Nursery) -> None:
    """The reader sees the end first; then the line takes bytes again, for a FIFO that has been given up."""
    server, peer = await start(nursery, 10)
    server.ws.send_nowait([b"x" * 200])
    await peer.stream.send_eof()
    await trio.testing.wait_all_tasks_blocked()
    assert server.lost is not None
    assert server.lost.code == 1006
    began = trio.current_time()
    while await peer.more():
        pass
    assert trio.current_time() == began, "a lost connection waits for nothing"


@pytest.mark.parametrize("how", ["cut", "truncated"])
@pytest.mark.parametrize("waiting", [False, True])
async def test_a_line_that_breaks(autojump_clock: Clock, nursery: trio.Nursery, how: str, waiting: bool) -> None:
    server, peer = await start(nursery, 10)
    if waiting:
        server.ws.send_nowait([b"x" * 200])
    if how == "cut":
        server.stream.cut()
    else:
        server.stream.outgoing.truncate(1)
        server.ws.send_nowait([b"x" * 20])
        while await peer.more():
            pass
        await trio.testing.wait_all_tasks_blocked()
        server.ws.send_nowait([b"finds out"])
    await trio.testing.wait_all_tasks_blocked()
    assert server.lost is not None
    assert server.lost.code == 1006
    assert server.ws.phase is Phase.CLOSED
    assert not server.ws.send_nowait([b"late"])


async def test_a_silent_peer_at_close_costs_the_time_limit_and_no_more(
    autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    server, _ = await start(nursery, 10, close_timeout=2.0)
    server.ws.send_nowait([b"x" * 200])
    began = trio.current_time()
    server.ws.close_nowait(1012, "restart")
    await trio.sleep(1.9)
    assert not server.stream._closed
    await trio.sleep(0.2)
    assert server.stream._closed
    assert trio.current_time() - began == pytest.approx(2.1)


async def test_a_handler_s_exception_closes_the_stream(autojump_clock: Clock, nursery: trio.Nursery) -> None:
    near, far = memory_pair()
    peer = Peer(near)
    nursery.start_soon(peer.send, REQUEST)
    with pytest.raises(ExceptionGroup) as caught:
        async with open_server_websocket(far, max_message_bytes=1000):
            raise KeyError("a bug")
    assert caught.group_contains(KeyError)
    assert (await peer.http())[0] == 101
    await peer.until_end()


async def test_read_ahead_is_bounded_and_lifted_when_closing(autojump_clock: Clock, nursery: trio.Nursery) -> None:
    near, far = memory_pair()
    peer = Peer(near)
    nursery.start_soon(peer.send, REQUEST)
    handed = 0
    async with open_server_websocket(far, max_message_bytes=1 << 20, close_timeout=3.0) as ws:
        assert (await peer.http())[0] == 101

        async def flood() -> None:
            nonlocal handed
            message = frame(TEXT, b"x" * 100_000)
            while handed < 100:
                await peer.send(message)
                handed += 1
            await peer.send(close(1000))

        nursery.start_soon(flood)
        await trio.sleep(1)
        assert handed < 3, "nobody takes it, so it must not be read"
        ws.close_nowait(4000, "enough")
        nursery.start_soon(peer.until_end)
        began = trio.current_time()
    assert trio.current_time() - began < 1, "the close reply stood behind text that was not discarded"
    assert handed == 100
    assert peer.closes == [(4000, "enough")]
