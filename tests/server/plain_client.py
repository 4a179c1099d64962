"""A small WebSocket client for tests: wsproto over a trio stream, plain JSON, and no code of the gateway's.

It does nothing on its own: nothing is read unless a test reads, so a test decides when a client stalls, and what it
sends is what the test says. `Reader` follows PROTOCOL section 4 as an outside checker would.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import tls_certificates as certificates
import trio
from wsproto import ConnectionType, WSConnection
from wsproto.connection import ConnectionState
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Ping,
    Pong,
    RejectConnection,
    RejectData,
    Request,
    TextMessage,
)

from gateway.config import Config, Limits, Server
from gateway.server import Gateway, open_gateway

PATIENCE = 20.0
"""Seconds until a test gives up waiting. Nothing is measured with it."""

SECURE: ssl.SSLContext | None = None
"""With what the gateways of a test speak TLS; set by the fixture `line`."""

Frame = dict[str, Any]


class Closed(Exception):
    """The gateway closed. `code` is None when the line ended without a close frame."""

    def __init__(self, code: int | None, reason: str) -> None:
        super().__init__(f"{code} {reason}")
        self.code = code
        self.reason = reason


class Rejected(Exception):
    """The upgrade was answered with an HTTP error."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"HTTP {status}: {body!r}")
        self.status = status
        self.body = body


class Plain:
    """One WebSocket of a client. Frames that were read and not asked for stay in `seen`, in order."""

    def __init__(self, stream: trio.abc.HalfCloseableStream) -> None:
        self.stream = stream
        self.ws = WSConnection(ConnectionType.CLIENT)
        self.subprotocol: str | None = None
        self.hello: Frame = {}
        self.seen: list[Frame] = []
        self.sizes: list[int] = []
        """Bytes of every text message received."""
        self.pongs = 0
        self.closed: Closed | None = None
        self._ready: list[Frame] = []
        self._text: list[str] = []
        self._accepted = False
        self._sending = trio.Lock()  # a test may send while it reads, and reading answers pings and closes

    async def _write(self, data: bytes) -> None:
        async with self._sending:
            await self.stream.send_all(data)

    async def upgrade(
        self,
        path: str = "/ws",
        host: str = "gateway.test",
        headers: Sequence[tuple[bytes, bytes]] = (),
        subprotocols: Sequence[str] = (),
    ) -> None:
        request = Request(host=host, target=path, extra_headers=list(headers), subprotocols=list(subprotocols))
        await self._write(self.ws.send(request))
        with trio.fail_after(PATIENCE):
            while not self._accepted:
                await self._read()

    async def _read(self, max_bytes: int = 65_536) -> None:
        if self.closed is not None:
            raise self.closed
        try:
            data = await self.stream.receive_some(max_bytes)
        except trio.BrokenResourceError:
            data = b""
        self.ws.receive_data(data or None)
        rejected: tuple[int, bytes] | None = None
        for event in self.ws.events():
            if isinstance(event, TextMessage):
                self._text.append(event.data)
                if event.message_finished:
                    text, self._text = "".join(self._text), []
                    self.sizes.append(len(text.encode()))
                    frame = json.loads(text)
                    assert isinstance(frame, dict), "the gateway sends objects only"
                    assert isinstance(frame["type"], str)
                    self._ready.append(frame)
            elif isinstance(event, AcceptConnection):
                self._accepted = True
                self.subprotocol = event.subprotocol
            elif isinstance(event, Ping):
                await self._write(self.ws.send(event.response()))
            elif isinstance(event, Pong):
                self.pongs += 1
            elif isinstance(event, CloseConnection):
                if data:
                    self.closed = Closed(event.code, event.reason or "")
                    if self.ws.state is ConnectionState.REMOTE_CLOSING:
                        with suppress(trio.BrokenResourceError):
                            await self._write(self.ws.send(event.response()))
                else:
                    self.closed = Closed(None, "")
            elif isinstance(event, RejectConnection):
                rejected = event.status_code, b""
            elif isinstance(event, RejectData):
                rejected = (rejected or (0, b""))[0], event.data
            else:
                assert not isinstance(event, BytesMessage), "the gateway sends text only"
        if rejected is not None:
            raise Rejected(*rejected)
        if not data and self.closed is None:
            self.closed = Closed(None, "")

    async def recv(self) -> Frame:
        """The next frame. Raises `Closed`."""
        with trio.fail_after(PATIENCE):
            while not self._ready:
                await self._read()
        frame = self._ready.pop(0)
        self.seen.append(frame)
        return frame

    async def until(self, kind: str, **fields: Any) -> Frame:
        """Read on to the next frame of a type (with these fields), and return it."""
        while True:
            frame = await self.recv()
            if frame["type"] == kind and all(frame.get(name) == value for name, value in fields.items()):
                return frame

    async def had(self, kind: str, **fields: Any) -> Frame:
        """The first such frame ever, whether it was read already or not."""
        for frame in self.seen:
            if frame["type"] == kind and all(frame.get(name) == value for name, value in fields.items()):
                return frame
        return await self.until(kind, **fields)

    async def until_closed(self) -> Closed:
        """Read on to the end."""
        try:
            while True:
                await self.recv()
        except Closed as closed:
            return closed

    async def send_text(self, text: str) -> None:
        with trio.fail_after(PATIENCE):
            await self._write(self.ws.send(TextMessage(data=text)))

    async def send_raw(self, data: bytes) -> None:
        await self._write(data)

    async def send_event(self, event: Any) -> None:
        await self._write(self.ws.send(event))

    async def send(self, type: str, **fields: Any) -> None:
        await self.send_text(json.dumps({"type": type, **fields}))

    async def ask(self, type: str, answer: str, **fields: Any) -> Frame:
        """Send a frame, and read on to its answer."""
        await self.send(type, **fields)
        return await self.until(answer)

    async def message(self, content: str = "hi", request_id: str | None = None, **fields: Any) -> Frame:
        """Send a message and wait for `accepted`."""
        request_id = request_id or f"r-{os.urandom(6).hex()}"
        await self.send("message", request_id=request_id, content=content, **fields)
        return await self.until("accepted", request_id=request_id)

    async def cut(self) -> None:
        """The line breaks: no close frame, and what was on the way is lost."""
        line = self.stream.transport_stream if isinstance(self.stream, trio.SSLStream) else self.stream
        if isinstance(line, trio.SocketStream):
            line.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await trio.aclose_forcefully(self.stream)

    async def close(self, code: int = 1000) -> None:
        """Say goodbye."""
        if self.closed is None:
            await self._write(self.ws.send(CloseConnection(code=code)))
            with trio.move_on_after(PATIENCE):
                while self.closed is None:
                    await self._read()
        await self.stream.aclose()

    def taken(self, kind: str) -> list[Frame]:
        """The frames of a type among those read so far."""
        return [frame for frame in self.seen if frame["type"] == kind]


EVENTS = {
    "input", "turn_started", "delta", "progress", "tool_call", "tool_result", "ask", "answered", "output",
    "turn_ended", "withdrawn", "state", "custom",
}  # fmt: skip


class Reader:
    """What a client knows: its cursor, the text of each turn, and that nothing is missing or repeated."""

    def __init__(self, cursor: int = 0) -> None:
        self.cursor = cursor
        self.epoch = ""
        self.kept: list[Frame] = []
        """Events that no other replaces, in order."""
        self.sealed: dict[tuple[str, str], str] = {}
        self.tail: dict[tuple[str, str], str] = {}
        self.snapshots = 0

    def text(self, turn_id: str, channel: str = "answer") -> str:
        key = turn_id, channel
        return self.sealed.get(key, "") + self.tail.get(key, "")

    def take(self, frame: Frame) -> None:
        kind = frame["type"]
        if kind == "hello_ok":
            self.epoch = frame["epoch"]
            if not frame["resync_required"]:
                assert frame["cursor"] == self.cursor
        elif kind == "snapshot":
            self._restore(frame)
        elif kind in EVENTS:
            assert isinstance(frame["at"], int)
            assert frame["first"] <= frame["seq"]
            assert frame["seq"] > self.cursor, f"repeated: {frame} at cursor {self.cursor}"
            assert frame["first"] <= self.cursor + 1, f"gap: {frame} at cursor {self.cursor}"
            self.cursor = frame["seq"]
            self._apply(kind, frame)

    def _apply(self, kind: str, frame: Frame) -> None:
        key = frame.get("turn_id", ""), frame.get("channel", "")
        if kind == "delta":
            self.tail[key] = self.tail.get(key, "") + frame["text"]
        elif kind == "output":
            self.sealed[key] = self.sealed.get(key, "") + frame["content"]
            self.tail.pop(key, None)
        if kind not in ("delta", "progress"):
            self.kept.append(frame)

    def _restore(self, frame: Frame) -> None:
        self.snapshots += 1
        assert frame["cursor"] >= self.cursor or frame["reason"] != "requested"
        self.cursor = frame["cursor"]
        self.sealed.clear()
        self.tail.clear()
        for event in frame["transcript"]:
            assert event["seq"] <= frame["cursor"]
            if event["type"] == "output":
                key = event["turn_id"], event["channel"]
                self.sealed[key] = self.sealed.get(key, "") + event["content"]
        if frame["turn"] is not None:
            for channel, text in frame["turn"]["channels"].items():
                self.tail[frame["turn"]["turn_id"], channel] = text


async def follow(client: Plain, reader: Reader, done: Callable[[Frame], bool]) -> Frame:
    """Feed a reader until `done`."""
    while True:
        frame = await client.recv()
        reader.take(frame)
        if done(frame):
            return frame


def ended(frame: Frame) -> bool:
    return bool(frame["type"] == "turn_ended")


async def dial(
    gateway: Gateway | tuple[str, int],
    *,
    small: bool = False,
    **upgrade: Any,
) -> Plain:
    """Open a WebSocket over TCP. `small` keeps the client's kernel from taking what the client does not read."""
    host, port = gateway.address if isinstance(gateway, Gateway) else gateway
    sock = trio.socket.socket()
    if small:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    try:
        await sock.connect((host, port))
        client = Plain(_line(gateway, sock))
        upgrade.setdefault("host", f"{host}:{port}")
        await client.upgrade(**upgrade)
    except BaseException:
        sock.close()
        raise
    return client


def _line(gateway: Gateway | tuple[str, int], sock: trio.socket.SocketType) -> Any:
    """The stream beneath a client's WebSocket, with TLS if that is what the gateway speaks."""
    stream = trio.SocketStream(sock)
    if (gateway.ssl_context if isinstance(gateway, Gateway) else SECURE) is None:
        return stream
    return trio.SSLStream(stream, certificates.client_context(), server_hostname="localhost", https_compatible=True)


def hello(**fields: Any) -> Frame:
    return {"type": "hello", "protocol_min": 2, "protocol_max": 2, "agent_id": "echo", **fields}


@asynccontextmanager
async def dialled(gateway: Gateway | tuple[str, int], **options: Any) -> AsyncIterator[Plain]:
    """A WebSocket that has not said hello; closed hard at the end of the block."""
    client = await dial(gateway, **options)
    try:
        yield client
    finally:
        await trio.aclose_forcefully(client.stream)


@asynccontextmanager
async def joined(
    gateway: Gateway | tuple[str, int], session: str | Frame | None = None, *, small: bool = False, **fields: Any
) -> AsyncIterator[Plain]:
    """A joined client. `session`: an id, or another client's hello_ok. Its own hello_ok is `hello`."""
    if session is not None:
        fields["session_id"] = session if isinstance(session, str) else session["session_id"]
    async with dialled(gateway, small=small) as client:
        await client.send_text(json.dumps(hello(**fields)))
        client.hello = await client.recv()
        assert client.hello["type"] == "hello_ok", client.hello
        yield client


async def echo(turn: Any) -> str:
    return f"echo: {turn.input.content}"


@asynccontextmanager
async def gateway_of(
    *agents: Any, limits: Frame | None = None, server: Frame | None = None, **options: Any
) -> AsyncIterator[Gateway]:
    """A gateway on a free port. The first agent is called ``echo``, others by their own names."""
    named = {"echo": agents[0] if agents else echo, **{agent.__name__: agent for agent in agents[1:]}}
    config = Config(
        server=Server(**{"port": 0, "drain_timeout_ms": 0, **(server or {})}),
        limits=Limits(**{"close_timeout_ms": 1000, **(limits or {})}),
    )
    async with open_gateway(config, named, **{"ssl_context": SECURE, **options}) as gateway:
        yield gateway


async def eventually(check: Callable[[], object]) -> None:
    """Wait until something holds."""
    with trio.fail_after(PATIENCE):
        while not check():  # noqa: ASYNC110
            await trio.sleep(0.005)
