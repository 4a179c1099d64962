"""A peer that speaks WebSocket by hand over a raw socket, and so can also get it wrong.

Nothing happens that a test does not say: nothing is read, answered or closed on its own.
"""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import trio

from gateway import Turn
from gateway.config import Config, Limits, Server
from gateway.server import Gateway, open_gateway
from gateway.transport.frames import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, unmask

__all__ = ["BINARY", "CLOSE", "CONTINUATION", "PING", "PONG", "TEXT"]

PATIENCE = 15.0
"""Seconds until a test gives up. Nothing is measured with it."""

KEY = b"\x11\x22\x33\x44"
HELLO = {"type": "hello", "protocol_min": 2, "protocol_max": 2, "agent_id": "echo"}
REQUEST = (
    b"GET /ws HTTP/1.1\r\nHost: gateway.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


def frame(opcode: int, payload: bytes = b"", *, final: bool = True, bits: int = 0, masked: bool = True) -> bytes:
    size = len(payload)
    form = bytes((size,)) if size < 126 else b"\x7e" + (size & 0xFFFF).to_bytes(2, "big")
    if size > 65_535:
        form = b"\x7f" + size.to_bytes(8, "big")
    head = bytes((0x80 * final | bits | opcode, form[0] | 0x80 * masked)) + form[1:]
    return head + KEY + unmask(payload, KEY) if masked else head + payload


def text(**fields: Any) -> bytes:
    """A whole text frame with a JSON object."""
    return frame(TEXT, json.dumps(fields, ensure_ascii=False).encode())


def ping_of(nonce: str) -> bytes:
    """The JSON that the gateway answers with a `pong` of the same nonce."""
    return json.dumps({"type": "ping", "nonce": nonce}, ensure_ascii=False).encode()


def close(code: int, reason: bytes = b"") -> bytes:
    return frame(CLOSE, code.to_bytes(2, "big") + reason)


def pieces(message: bytes, *sizes: int) -> list[bytes]:
    """A message in fragments of these sizes, the rest in the last."""
    cuts = [0]
    for size in sizes:
        cuts.append(cuts[-1] + size)
    cuts.append(len(message))
    parts = [message[start:end] for start, end in pairwise(cuts)]
    return [frame(CONTINUATION if at else TEXT, part, final=at == len(parts) - 1) for at, part in enumerate(parts)]


class Peer:
    def __init__(self, stream: trio.abc.HalfCloseableStream) -> None:
        self.stream = stream
        self.buffer = b""
        self.reset = False
        """Whether the line ended with a reset, which on some systems takes along what was sent before it."""
        self.frames: list[tuple[int, bytes]] = []
        """Every frame received, in order."""

    async def send(self, *parts: bytes) -> None:
        with trio.fail_after(PATIENCE):
            await self.stream.send_all(b"".join(parts))

    async def more(self) -> bool:
        """Read something; False at the end, a reset included."""
        with trio.fail_after(PATIENCE):
            try:
                data = await self.stream.receive_some(65_536)
            except trio.BrokenResourceError:
                data, self.reset = b"", True
        self.buffer += bytes(data)
        return bool(data)

    async def http(self) -> tuple[int, bytes]:
        """Read one HTTP answer: status and body; 101 leaves what follows in the buffer."""
        while b"\r\n\r\n" not in self.buffer:
            assert await self.more(), f"no answer, only {self.buffer!r}"
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        status = int(head.split()[1])
        if status == 101:
            assert b"sec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo=" in head.lower()
            return status, b""
        while await self.more():
            pass
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                assert int(line.partition(b":")[2]) == len(self.buffer)
        return status, self.buffer

    async def recv(self) -> tuple[int, bytes] | None:
        """The next frame, or None at the end. A server's frames are whole, unmasked and without reserved bits."""
        while True:
            buffer = self.buffer
            if len(buffer) >= 2:
                assert buffer[0] & 0xF0 == 0x80, f"torn or malformed: {buffer[:40]!r}"
                assert not buffer[1] & 0x80
                opcode, size, start = buffer[0] & 15, buffer[1], 2
                assert opcode in (TEXT, CLOSE, PING, PONG), f"torn or malformed: {buffer[:40]!r}"
                if size > 125:
                    start = 4 if size == 126 else 10
                    size = int.from_bytes(buffer[2:start], "big")
                if len(buffer) >= max(2, start) + size:
                    payload, self.buffer = buffer[start : start + size], buffer[start + size :]
                    assert not self.closes, "a frame behind a close frame"
                    self.frames.append((opcode, payload))
                    return opcode, payload
            if not await self.more():
                assert not self.buffer, f"torn: the line ended within {self.buffer[:40]!r}"
                return None

    @property
    def closes(self) -> list[tuple[int, str]]:
        return [
            (int.from_bytes(payload[:2], "big") if payload else 1005, payload[2:].decode())
            for opcode, payload in self.frames
            if opcode == CLOSE
        ]

    @property
    def texts(self) -> list[dict[str, Any]]:
        return [json.loads(payload) for opcode, payload in self.frames if opcode == TEXT]

    async def until(self, kind: str) -> dict[str, Any]:
        """Read to the next text frame of a type."""
        while (got := await self.recv()) is not None:
            if got[0] == TEXT and (fields := json.loads(got[1]))["type"] == kind:
                return dict(fields)
        raise AssertionError(f"no {kind} came: {self.frames[-3:]}")

    async def until_close(self) -> tuple[int, str]:
        """Read to the close frame."""
        while (got := await self.recv()) is not None:
            if got[0] == CLOSE:
                return self.closes[0]
        raise AssertionError(f"the line ended without a close frame: {self.frames[-3:]}")

    async def until_end(self) -> None:
        """Read to the end of the line; there is at most one close frame, and nothing behind it."""
        while await self.recv() is not None:
            pass

    async def closed_with(self, code: int, reason: str | None = None) -> None:
        """The close frame comes, is answered, and then the line ends."""
        got = await self.until_close()
        assert got[0] == code, got
        assert reason is None or got[1] == reason
        try:
            await self.send(close(code))
        except trio.BrokenResourceError:
            return
        await self.until_end()


async def eventually(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Look until it holds."""
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110 (conditions of every kind, some of them the kernel's)
            await trio.sleep(0.005)


async def echo(turn: Turn) -> str:
    return str(turn.input.content)


@asynccontextmanager
async def gateway_of(agent: Any = echo, *, crashes: int = 0, **limits: int) -> AsyncIterator[Gateway]:
    """A gateway on a port; when the block is left, no connection and no slot of one may be left within its limits."""
    small = {"close_timeout_ms": 1_500, "stop_timeout_ms": 500, **limits}
    config = Config(server=Server(port=0, drain_timeout_ms=1_000), limits=Limits(**small))
    async with open_gateway(config, {"echo": agent}) as gateway:
        yield gateway
        await eventually(lambda: gateway._serving == 0, small["close_timeout_ms"] / 1000 + 2)
        statistics = gateway.statistics()
        assert (statistics.connections, statistics.pending_handshakes, statistics.blocked_connections) == (0, 0, 0)
        assert statistics.crashed_connections == crashes


async def connect(gateway: Gateway, *, receive_buffer: int | None = None) -> trio.SocketStream:
    sock = trio.socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    await sock.connect(gateway.address)
    return trio.SocketStream(sock)


@asynccontextmanager
async def raw(gateway: Gateway, *, receive_buffer: int | None = None) -> AsyncIterator[Peer]:
    """A connected socket."""
    async with await connect(gateway, receive_buffer=receive_buffer) as stream:
        yield Peer(stream)


@asynccontextmanager
async def opened(gateway: Gateway, **options: Any) -> AsyncIterator[Peer]:
    """A WebSocket that has not said hello."""
    async with raw(gateway, **options) as peer:
        await peer.send(REQUEST)
        assert (await peer.http())[0] == 101
        yield peer


@asynccontextmanager
async def joined(gateway: Gateway, *, session_id: str | None = None, **options: Any) -> AsyncIterator[Peer]:
    """A WebSocket that has joined a session."""
    async with opened(gateway, **options) as peer:
        await peer.send(text(**HELLO, **({"session_id": session_id} if session_id else {})))
        await peer.until("hello_ok")
        yield peer
