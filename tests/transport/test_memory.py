"""Byte streams: the network in memory with its faults, and trio's own checks on it and on the socket."""

from __future__ import annotations

import socket

import pytest
import trio
import trio.testing

from gateway.transport.memory import MemoryByteStream, memory_pair
from gateway.transport.streams import SocketByteStream


async def read_all(stream: MemoryByteStream) -> bytes:
    data = b""
    while piece := await stream.receive_some():
        data += piece
    return data


async def make_memory() -> tuple[MemoryByteStream, MemoryByteStream]:
    return memory_pair()


async def make_clogged_memory() -> tuple[MemoryByteStream, MemoryByteStream]:
    near, far = memory_pair(capacity=64)
    near.send_nowait(b"x" * 64)
    far.send_nowait(b"x" * 64)
    return near, far


async def make_tcp() -> tuple[SocketByteStream, SocketByteStream]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    near = trio.socket.socket()
    await near.connect(listener.socket.getsockname())
    far, _ = await listener.socket.accept()
    await listener.aclose()
    return SocketByteStream(near, send_buffer=4096), SocketByteStream(far, send_buffer=4096)


async def make_unix() -> tuple[SocketByteStream, SocketByteStream]:
    near, far = trio.socket.socketpair()
    return SocketByteStream(near), SocketByteStream(far)


async def make_clogged_unix() -> tuple[SocketByteStream, SocketByteStream]:
    # Not with TCP: the kernel moves bytes from one buffer to the other in its own time, and takes more later.
    pair = await make_unix()
    for stream in pair:
        while stream.send_nowait(b"x" * 65_536):
            pass
    return pair


async def test_memory_streams_keep_trio_s_contract() -> None:
    await trio.testing.check_two_way_stream(make_memory, make_clogged_memory)
    await trio.testing.check_half_closeable_stream(make_memory, make_clogged_memory)


async def test_socket_streams_keep_trio_s_contract() -> None:
    await trio.testing.check_half_closeable_stream(make_tcp, None)
    await trio.testing.check_half_closeable_stream(make_unix, make_clogged_unix)


async def test_delay_keeps_order_and_delays_the_end(autojump_clock: trio.testing.MockClock) -> None:
    near, far = memory_pair()
    start = trio.current_time()
    near.outgoing.delay = 3.0
    near.send_nowait(b"slow ")
    near.outgoing.delay = 1.0
    near.send_nowait(b"quick")  # stands behind what was sent first
    assert await far.receive_some() == b"slow "
    assert trio.current_time() - start == pytest.approx(3.0)
    assert await far.receive_some() == b"quick"
    assert trio.current_time() - start == pytest.approx(3.0)
    near.outgoing.delay = 2.0
    await near.send_eof()
    assert await far.receive_some() == b""
    assert trio.current_time() - start == pytest.approx(5.0)
    # The other direction has a line of its own.
    far.send_nowait(b"back")
    assert await near.receive_some() == b"back"
    assert trio.current_time() - start == pytest.approx(5.0)


async def test_a_stalled_line_delivers_nothing_until_it_resumes(autojump_clock: trio.testing.MockClock) -> None:
    near, far = memory_pair(capacity=10)
    near.outgoing.stall()
    assert near.send_nowait(b"0123456789abc") == 10  # the sender notices only when the line is full
    assert near.send_nowait(b"abc") == 0
    near.outgoing.end()
    with trio.move_on_after(60) as scope:
        await far.receive_some()
    assert scope.cancelled_caught
    near.outgoing.resume()
    assert await read_all(far) == b"0123456789"

    near, far = memory_pair()
    near.outgoing.stall()
    await near.send_eof()
    with trio.move_on_after(60) as scope:
        await far.receive_some()
    assert scope.cancelled_caught, "the end overtook the stall"
    near.outgoing.resume()
    assert await far.receive_some() == b""


async def test_capacity_is_counted_in_bytes_and_given_back(autojump_clock: trio.testing.MockClock) -> None:
    near, far = memory_pair(capacity=8)
    sent = []

    async def send() -> None:
        await near.send_all(bytes(range(100)))
        sent.append(True)
        await near.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked()
        assert near.outgoing.transferred == 8
        assert await far.receive_some(3) == bytes((0, 1, 2))
        await trio.testing.wait_all_tasks_blocked()
        assert near.outgoing.transferred == 11
        assert not sent
        assert await read_all(far) == bytes(range(3, 100))
    assert sent


async def test_cancelled_send_some_took_nothing(autojump_clock: trio.testing.MockClock) -> None:
    near, far = memory_pair(capacity=4)
    assert near.send_nowait(b"full") == 4
    with trio.move_on_after(1) as scope:
        await near.send_some(b"more")
    assert scope.cancelled_caught
    near.outgoing.end()
    assert await read_all(far) == b"full"


async def test_cancelled_receive_loses_nothing(autojump_clock: trio.testing.MockClock) -> None:
    near, far = memory_pair()
    near.outgoing.delay = 5
    near.send_nowait(b"late")
    with trio.move_on_after(1) as scope:
        await far.receive_some()
    assert scope.cancelled_caught
    assert await far.receive_some() == b"late"


@pytest.mark.parametrize("after", [0, 1, 4, 7, 10])
async def test_truncate_ends_the_line_in_the_middle(after: int) -> None:
    near, far = memory_pair()
    near.outgoing.truncate(after)
    assert near.send_nowait(b"01234") == min(after, 5)
    if after > 5:
        assert near.send_nowait(b"56789") == after - 5
    elif after == 5:
        assert near.send_nowait(b"56789") == 0
    with pytest.raises(trio.BrokenResourceError):
        near.send_nowait(b"more")
    assert await read_all(far) == b"0123456789"[:after]


async def test_truncate_wakes_a_sender(autojump_clock: trio.testing.MockClock) -> None:
    near, far = memory_pair(capacity=4)
    near.outgoing.truncate(6)
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def _() -> None:
            with pytest.raises(trio.BrokenResourceError):
                await near.send_all(b"0123456789")

        assert await read_all(far) == b"012345"


async def test_cut_breaks_both_ends_and_loses_what_is_on_the_way(autojump_clock: trio.testing.MockClock) -> None:
    near, far = memory_pair(capacity=4)
    near.send_nowait(b"lost")

    async def send() -> None:
        with pytest.raises(trio.BrokenResourceError):
            await near.send_all(b"more")

    async def receive() -> None:
        with pytest.raises(trio.BrokenResourceError):
            await near.receive_some()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        far.cut()
    with pytest.raises(trio.BrokenResourceError):
        await far.receive_some()
    with pytest.raises(trio.BrokenResourceError):
        far.send_nowait(b"x")


async def test_closing_wakes_whoever_waits_on_this_side(autojump_clock: trio.testing.MockClock) -> None:
    near, far = memory_pair(capacity=4)
    near.send_nowait(b"full")

    async def send() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await near.send_all(b"more")

    async def receive() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await near.receive_some()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        await near.aclose()
    assert await read_all(far) == b"full"
    with pytest.raises(trio.BrokenResourceError):
        far.send_nowait(b"x")


async def test_a_unix_socket_s_peer_has_no_address() -> None:
    near, far = await make_unix()
    async with near, far:
        assert (near.peer, far.peer) == ("unix", "unix")


async def test_a_socket_s_fault_is_named(nursery: trio.Nursery) -> None:
    near, far = await make_tcp()
    assert near.peer == "127.0.0.1"
    far._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # close with a reset
    await far.aclose()
    with pytest.raises(trio.BrokenResourceError):
        await near.receive_some()
    with pytest.raises(trio.BrokenResourceError):
        await near.send_all(b"x" * 10_000_000)
    await near.aclose()
    with pytest.raises(trio.ClosedResourceError):
        near.send_nowait(b"x")
