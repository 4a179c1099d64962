"""The client's socket: every way it can fail to open, and every way it can end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import pytest
import trio
import trio.testing
from trio_websocket import WebSocketConnection, wrap_server_stream

from gateway.errors import ConfigError, ConnectionLost
from gateway.transport.dial import UpgradeRefused, dial, parse_url

Handler = Callable[[WebSocketConnection], Awaitable[None]]


async def serve(stream: trio.abc.Stream, handler: Handler) -> None:
    async with trio.open_nursery() as nursery:
        request = await wrap_server_stream(nursery, stream)
        await handler(await request.accept())
        nursery.cancel_scope.cancel()


async def linger(ws: WebSocketConnection) -> None:
    await trio.sleep_forever()


def pair() -> tuple[trio.StapledStream, trio.StapledStream]:
    return trio.testing.memory_stream_pair()


async def test_messages_go_both_ways(nursery: trio.Nursery) -> None:
    async def echo(ws: WebSocketConnection) -> None:
        for _ in range(2):
            await ws.send_message(await ws.get_message())
        await ws.aclose(4408, "heartbeat_timeout")

    near, far = pair()
    nursery.start_soon(serve, far, echo)
    async with dial("ws://gateway/ws", stream=near) as sock:
        await sock.send("héllo".encode())
        assert await sock.receive() == "héllo".encode()
        await sock.send(b"x" * 300_000)
        assert len(await sock.receive()) == 300_000
        for _ in range(2):
            with pytest.raises(ConnectionLost) as caught:
                await sock.receive()
            assert (caught.value.code, caught.value.reason) == (4408, "heartbeat_timeout")
        with pytest.raises(ConnectionLost, match="4408"):
            await sock.send(b"late")


async def test_the_body_s_exception_comes_out_as_it_is(nursery: trio.Nursery) -> None:
    near, far = pair()
    nursery.start_soon(serve, far, linger)
    with pytest.raises(KeyError):
        async with dial("ws://gateway/ws", stream=near, close_timeout=0.01):
            raise KeyError("mine")
    near, far = pair()
    nursery.start_soon(serve, far, linger)
    with pytest.raises(ExceptionGroup) as caught:
        async with dial("ws://gateway/ws", stream=near, close_timeout=0.01):
            raise ExceptionGroup("mine too", [KeyError()])
    assert caught.value.message == "mine too"
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 101 Switching", b"SSH-2.0-OpenSSH_9.2\r\n\r\n", b"\x00\xff" * 50])
async def test_a_line_that_ends_or_talks_nonsense_during_the_upgrade(answer: bytes, autojump_clock: object) -> None:
    near, far = pair()
    await far.send_all(answer) if answer else None
    await far.send_eof()
    started = trio.current_time()
    with pytest.raises(ConnectionLost, match="gateway"):
        async with dial("ws://gateway/ws", stream=near):
            pass
    assert trio.current_time() - started < 1


async def test_an_http_answer_is_told_by_its_status() -> None:
    near, far = pair()
    await far.send_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\n\r\nnot here\n")
    with pytest.raises(UpgradeRefused, match="HTTP 404 from gateway: not here") as caught:
        async with dial("ws://gateway/ws", stream=near):
            pass
    assert caught.value.status == 404


async def test_a_silent_server_is_given_up(autojump_clock: object) -> None:
    near, _far = pair()
    with pytest.raises(ConnectionLost, match="no answer from gateway in 7 s"):
        async with dial("ws://gateway/ws", stream=near, connect_timeout=7):
            pass


async def test_connection_refused_and_unknown_host() -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    await listeners[0].aclose()
    with pytest.raises(ConnectionLost, match=f"connection refused by 127.0.0.1:{port}"):
        async with dial(f"ws://127.0.0.1:{port}/ws"):
            pass
    with pytest.raises(ConnectionLost, match=r"cannot find the host 'nowhere.invalid'|cannot reach"):
        async with dial("ws://nowhere.invalid/ws"):
            pass


@pytest.mark.parametrize(
    "url", ["", "http://x/ws", "127.0.0.1:8765", "ws://", "ws://h:99999/", "ws://h/a b", "ws://[::1"]
)
def test_a_bad_url_is_the_caller_s_fault(url: str) -> None:
    with pytest.raises(ConfigError, match="url"):
        parse_url(url)


def test_urls() -> None:
    assert parse_url("ws://localhost:8765/ws").authority == "localhost:8765"
    assert parse_url("wss://example.org/ws?a=b").authority == "example.org"
    assert parse_url("wss://example.org/ws?a=b").resource == "/ws?a=b"
    assert parse_url("ws://[::1]:80").authority == "[::1]"
    assert parse_url("ws://[::1]:81").authority == "[::1]:81"


async def test_closing_towards_a_peer_that_does_not_read_ends(autojump_clock: object) -> None:
    near, far = trio.testing.lockstep_stream_pair()
    accepted = trio.Event()

    async def deaf(stream: trio.abc.Stream) -> None:
        async with trio.open_nursery() as inner:
            request = await wrap_server_stream(inner, stream)
            await request.accept()
            inner.cancel_scope.cancel()  # Nothing reads from `stream` any more.
        accepted.set()
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(deaf, far)
        started = trio.current_time()
        async with dial("ws://gateway/ws", stream=near, close_timeout=3):
            await accepted.wait()
        assert trio.current_time() - started <= 3.5
        nursery.cancel_scope.cancel()


async def test_a_send_nobody_takes_ends_the_connection(autojump_clock: object, nursery: trio.Nursery) -> None:
    near, far = trio.testing.lockstep_stream_pair()

    async def accept_then_deaf() -> None:
        async with trio.open_nursery() as inner:
            request = await wrap_server_stream(inner, far)
            await request.accept()
            inner.cancel_scope.cancel()

    nursery.start_soon(accept_then_deaf)
    async with dial("ws://gateway/ws", stream=near, send_timeout=5) as sock:
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(ConnectionLost, match="not taken within 5 s"):
            await sock.send(b"hello")
        with pytest.raises(ConnectionLost, match="not taken"):
            await sock.receive()


async def test_a_cancelled_send_drops_the_socket(autojump_clock: object, nursery: trio.Nursery) -> None:
    near, far = trio.testing.lockstep_stream_pair()

    async def accept_then_deaf() -> None:
        async with trio.open_nursery() as inner:
            request = await wrap_server_stream(inner, far)
            await request.accept()
            inner.cancel_scope.cancel()

    nursery.start_soon(accept_then_deaf)
    async with dial("ws://gateway/ws", stream=near) as sock:
        await trio.testing.wait_all_tasks_blocked()
        with trio.move_on_after(1) as scope:
            await sock.send(b"half")
        assert scope.cancelled_caught
        with pytest.raises(ConnectionLost, match="cancelled"):
            await sock.send(b"whole")


async def test_a_message_too_large_ends_the_connection(nursery: trio.Nursery, autojump_clock: object) -> None:
    near, far = pair()

    async def shout(ws: WebSocketConnection) -> None:
        await ws.send_message("x" * 2000)
        await trio.sleep_forever()

    nursery.start_soon(serve, far, shout)
    started = trio.current_time()
    async with dial("ws://gateway/ws", stream=near, max_message_bytes=1000) as sock:
        with pytest.raises(ConnectionLost) as caught:
            await sock.receive()
        assert caught.value.code == 1009
    assert trio.current_time() - started < 10
    nursery.cancel_scope.cancel()


async def test_a_binary_message_ends_the_connection(nursery: trio.Nursery, autojump_clock: object) -> None:
    near, far = pair()

    async def binary(ws: WebSocketConnection) -> None:
        await ws.send_message(b"x")
        await ws.get_message()

    async def run() -> None:
        try:
            await serve(far, binary)
        except* Exception:
            pass

    nursery.start_soon(run)
    async with dial("ws://gateway/ws", stream=near) as sock:
        with pytest.raises(ConnectionLost) as caught:
            await sock.receive()
        assert caught.value.code == 1003


async def test_malformed_frames_do_not_escape(nursery: trio.Nursery, autojump_clock: object) -> None:
    near, far = pair()

    async def garbage() -> None:
        async with trio.open_nursery() as inner:
            request = await wrap_server_stream(inner, far)
            await request.accept()
            inner.cancel_scope.cancel()
        await far.send_all(b"\xff" * 40)
        await trio.sleep_forever()

    nursery.start_soon(garbage)
    async with dial("ws://gateway/ws", stream=near) as sock:
        with pytest.raises(ConnectionLost):
            await sock.receive()
    nursery.cancel_scope.cancel()


async def test_not_receiving_is_back_pressure(nursery: trio.Nursery) -> None:
    near, far = pair()
    sent = 0

    async def flood(ws: WebSocketConnection) -> None:
        nonlocal sent
        for _ in range(1000):
            await ws.send_message("x" * 1000)
            sent += 1
        await ws.aclose()

    listeners = await nursery.start(partial(trio.serve_tcp, partial(serve, handler=flood), 0, host="127.0.0.1"))
    port = listeners[0].socket.getsockname()[1]
    async with dial(f"ws://127.0.0.1:{port}/ws") as sock:
        assert len(await sock.receive()) == 1000
        for _ in range(999):
            await sock.receive()
        with pytest.raises(ConnectionLost, match="1000"):
            await sock.receive()
    nursery.cancel_scope.cancel()
    del near, far
