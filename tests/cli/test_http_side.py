"""The HTTP side: what it answers, and that no peer ends or stalls it."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial

import pytest
import structlog
import trio
from attrs import define, frozen
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway._version import __version__
from gateway.errors import BindError
from gateway.http import serve_http, serving

PATIENCE = 20.0
SILENT = 0.5
"""Instead of `serving.SILENT_SECONDS`, so that tests need not wait for it."""


@frozen
class Counts:
    connections: int = 1
    sessions: int = 2
    turns: int = 3


@define
class Fake:
    """A gateway as far as the routes can see."""

    draining: bool = False

    def statistics(self) -> Counts:
        return Counts()


class Side:
    """A running HTTP side."""

    def __init__(self, state: Fake, address: tuple[str, int], shutdown: trio.Event) -> None:
        self.state = state
        self.address = address
        self.shutdown = shutdown

    async def raw(self, request: bytes) -> bytes:
        """What comes back until the server closes."""
        async with await trio.open_tcp_stream(*self.address) as stream:
            try:
                await stream.send_all(request)
                await stream.send_eof()
                return b"".join([data async for data in stream])
            except trio.BrokenResourceError:
                return b""

    async def get(self, path: str, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
        request = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        with trio.fail_after(PATIENCE):
            head, _, body = (await self.raw(request.encode())).partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        return int(first.split()[1]), headers, body


@asynccontextmanager
async def side(host: str = "127.0.0.1") -> AsyncIterator[Side]:
    state, shutdown = Fake(), trio.Event()
    with trio.fail_after(2 * PATIENCE):
        async with trio.open_nursery() as nursery:
            address = await nursery.start(partial(serve_http, state, host, 0, shutdown=shutdown))
            yield Side(state, address, shutdown)
            shutdown.set()


@pytest.fixture(autouse=True, scope="module")
def _impatient() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "SILENT_SECONDS", SILENT)
        yield


@pytest.fixture
def log() -> Iterator[list[structlog.typing.EventDict]]:
    with structlog.testing.capture_logs() as entries:
        yield entries


# --- routes ----------------------------------------------------------------------------------------------------------


async def test_healthz_is_200_whatever_happens() -> None:
    async with side() as http:
        for http.state.draining in (False, True):
            status, headers, body = await http.get("/healthz")
            assert (status, json.loads(body)) == (200, {"status": "ok"})
            assert headers["content-type"] == "application/json"


async def test_readyz_turns_to_503_with_the_drain() -> None:
    async with side() as http:
        status, headers, body = await http.get("/readyz")
        assert (status, json.loads(body)) == (200, {"status": "ready", "connections": 1, "sessions": 2, "turns": 3})
        assert headers["cache-control"] == "no-store"
        http.state.draining = True
        status, headers, body = await http.get("/readyz")
        assert (status, json.loads(body)["status"]) == (503, "draining")
        assert headers["cache-control"] == "no-store"


async def test_version() -> None:
    async with side() as http:
        status, _, body = await http.get("/version")
        assert status == 200
        answer = json.loads(body)
        assert (answer["name"], answer["version"]) == ("trio-gateway", __version__)
        assert 2 in answer["protocols"]


async def test_other_paths_and_methods() -> None:
    async with side() as http:
        assert (await http.get("/"))[0] == 404
        assert (await http.get("/healthz", "POST"))[0] == 405
        status, headers, body = await http.get("/healthz", "HEAD")
        assert (status, body) == (200, b"")
        assert "server" not in headers


# --- the socket ------------------------------------------------------------------------------------------------------


async def test_a_port_in_use_is_said_before_anything_is_served() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BindError, match=rf"^127\.0\.0\.1:{port} is in use; .* --http-port$"):
            await serve_http(Fake(), "127.0.0.1", port, shutdown=trio.Event())


@pytest.mark.parametrize("host", ["256.0.0.1", "192.0.2.1"])
async def test_an_address_that_is_not_ours(host: str) -> None:
    with pytest.raises(BindError, match=rf"^cannot listen on {host}:0: .*; check --host and --http-port$"):
        await serve_http(Fake(), host, 0, shutdown=trio.Event())


async def test_a_name_is_one_address() -> None:
    async with side("localhost") as http:
        assert (await http.get("/healthz"))[0] == 200


async def test_shutdown_and_cancellation_close_the_port() -> None:
    async with side() as http:
        assert (await http.get("/healthz"))[0] == 200
    with pytest.raises(OSError, match=r"connect|refused"):
        await trio.open_tcp_stream(*http.address)
    async with trio.open_nursery() as nursery:
        address = await nursery.start(partial(serve_http, Fake(), "127.0.0.1", 0, shutdown=trio.Event()))
        nursery.cancel_scope.cancel()
    with pytest.raises(OSError, match=r"connect|refused"):
        await trio.open_tcp_stream(*address)


# --- peers -----------------------------------------------------------------------------------------------------------

HEAD = b"GET /healthz HTTP/1.1\r\nHost: a\r\n"
UPGRADE = HEAD + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: %b\r\n\r\n"
SEEDS = [
    b"GET /healthz HTTP/1.1\r\nHost: \xff\xfe\r\n\r\n",
    b"GET /%ff%00?\x80 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET http://[ HTTP/1.1\r\nHost: [::\r\n\r\n",
    b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
    b"POST /healthz HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET /version HTTP/1.1\r\nHost: a\r\nContent-Length: -3\r\n\r\n",
    HEAD + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: abc\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0" + b"\0\0\4\1\5\0\0\0\1\x82\x84\x86\x41",
    UPGRADE % b"",
    UPGRADE % b"AAMAAABkAAQAAP__",
    b"A" * 20_000,
    b"\0" * 100,
    b"",
]  # fmt: skip


async def ask(peer: trio.SocketStream) -> None:
    """Have a request answered on a connection that stays open."""
    answer = b""
    await peer.send_all(HEAD + b"\r\n")
    while not answer.endswith(b'{"status":"ok"}'):
        data = await peer.receive_some()
        assert data, "it was closed"
        answer += data
    assert answer.startswith(b"HTTP/1.1 200 ")


async def test_a_request_that_makes_hypercorn_raise_ends_its_own_connection(
    log: list[structlog.typing.EventDict],
) -> None:
    async with side() as http, await trio.open_tcp_stream(*http.address) as other:
        for n in range(3):
            await http.raw(UPGRADE % b"a")
            failures = [entry for entry in log if entry["event"] == "http_connection_failed"]
            assert len(failures) == n + 1, "otherwise this request breaks nothing any more, and another must be found"
            assert "base64" in failures[-1]["reason"]
            await ask(other)


async def test_a_carriage_return_alone_ends_its_connection() -> None:
    async with side() as http:
        assert await http.raw(HEAD + b"X: a\rb\r\n\r\n") == b"", "it was parsed"


@pytest.mark.parametrize(
    ("first", "second", "heard"), [(b"X: a\r", b"b", b""), (b"X: a\r", b"\nb", b"\nb"), (b"a\r\n", b"\nb", b"\nb")]
)
async def test_a_carriage_return_at_the_end_of_a_read(first: bytes, second: bytes, heard: bytes) -> None:
    ours, theirs = trio.socket.socketpair()
    with ours, theirs:
        stream = serving._Stream(trio.SocketStream(ours))
        for said, expected in ((first, first), (second, heard)):
            await theirs.send(said)
            assert await stream.receive_some() == expected


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_hostile_bytes_end_nothing(data: st.DataObject) -> None:
    def mutated() -> bytes:
        seed = bytearray(data.draw(st.sampled_from(SEEDS)))
        for _ in range(data.draw(st.integers(0, 4)) if seed else 0):
            seed[data.draw(st.integers(0, len(seed) - 1))] = data.draw(st.integers(0, 255))
        return bytes(seed)

    requests = [mutated() for _ in range(4)]

    async def main() -> None:
        async with side() as http:
            async with trio.open_nursery() as nursery:
                for request in requests:
                    nursery.start_soon(http.raw, request)
            assert (await http.get("/healthz"))[0] == 200

    trio.run(main)


@pytest.mark.parametrize("half_closed", [False, True])
@pytest.mark.parametrize(
    "said", [b"", b"GET /heal", HEAD, HEAD + b"\r\n", UPGRADE % b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]
)
async def test_a_silent_peer_is_let_go(said: bytes, half_closed: bool) -> None:
    async with side() as http, await trio.open_tcp_stream(*http.address) as peer:
        with suppress(trio.BrokenResourceError), trio.fail_after(PATIENCE / 2):
            if said:
                await peer.send_all(said)
            if half_closed:
                await peer.send_eof()
            while await peer.receive_some():
                pass


@asynccontextmanager
async def stuffed(http: Side) -> AsyncIterator[socket.socket]:
    """A peer has asked for more than it takes: the buffers are full, in both directions."""
    with socket.socket() as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.connect(http.address)
        peer.setblocking(False)
        full = 0
        while full < 5:
            try:
                peer.send((HEAD + b"\r\n") * 10_000)
                full = 0
            except BlockingIOError:
                full += 1
            except ConnectionError:
                break  # let go already
            await trio.sleep(0.01)
        yield peer


async def test_a_peer_that_does_not_read_is_let_go() -> None:
    async with side() as http, stuffed(http) as peer:
        assert (await http.get("/healthz"))[0] == 200
        with suppress(ConnectionError), trio.fail_after(PATIENCE):
            while True:
                with suppress(BlockingIOError):
                    peer.send(b"x")
                await trio.sleep(0.05)


@pytest.mark.parametrize("how", ["shutdown", "cancel"])
async def test_a_peer_that_does_not_read_does_not_keep_it_from_ending(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(serving, "SILENT_SECONDS", 3600)
    monkeypatch.setattr(serving, "GRACE_SECONDS", 0.1)
    shutdown, ended, scope = trio.Event(), trio.Event(), trio.CancelScope()

    async def serve(task_status: trio.TaskStatus[tuple[str, int]]) -> None:
        with scope:
            await serve_http(Fake(), "127.0.0.1", 0, shutdown=shutdown, task_status=task_status)
        ended.set()

    async with trio.open_nursery() as nursery:
        address = await nursery.start(serve)
        async with stuffed(Side(Fake(), address, shutdown)):
            if how == "shutdown":
                shutdown.set()
            else:
                scope.cancel()
            with trio.fail_after(PATIENCE):
                await ended.wait()


async def test_idle_connections_end_with_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "SILENT_SECONDS", 3600)
    monkeypatch.setattr(serving, "GRACE_SECONDS", 3600)
    async with side() as http:
        peer = await trio.open_tcp_stream(*http.address)
        await ask(peer)
    assert await peer.receive_some() == b""
    await peer.aclose()


async def test_there_is_a_bound_on_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "MAX_CONNECTIONS", 2)
    monkeypatch.setattr(serving, "SILENT_SECONDS", 3.0)  # after it, those who hold a place are let go
    async with side() as http:
        held = [await trio.open_tcp_stream(*http.address) for _ in range(2)]
        for peer in held:
            await ask(peer)
        async with await trio.open_tcp_stream(*http.address) as third:
            with suppress(trio.BrokenResourceError):
                assert await third.receive_some() == b""
        await held.pop().aclose()
        with trio.fail_after(PATIENCE):
            while True:  # until the place is free
                with suppress(trio.BrokenResourceError, IndexError):
                    assert (await http.get("/healthz"))[0] == 200
                    break
        await held.pop().aclose()
