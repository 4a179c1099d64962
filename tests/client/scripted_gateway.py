"""A gateway that does what a test tells it, on the real protocol over an in-memory WebSocket."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_server_stream

from gateway.client import Session, open_session
from gateway.transport.dial import ClientSocket, dial
from gateway.transport.memory import MemoryByteStream, memory_pair

URL = "ws://gateway/ws"

POLICY = {
    "max_payload": 1000, "max_frame_bytes": 1_048_576, "max_inbox": 256, "max_buffered_bytes": 1_048_576,
    "heartbeat_ms": 30_000, "resume_window_ms": 86_400_000, "max_turn_ms": 600_000, "replay_max_events": 10_000,
    "replay_max_bytes": 8_388_608,
}  # fmt: skip


def hello_ok(**fields: Any) -> dict[str, Any]:
    policy = {**POLICY, **fields.pop("policy", {})}
    base = {
        "type": "hello_ok", "protocol": 2, "server": {"name": "scripted", "version": "0", "node": "n1"},
        "connection_id": "c_1", "session_id": "s_1", "agent_id": "echo", "epoch": "e_1", "resumed": False,
        "cursor": 0, "head": 0, "oldest_cursor": 0, "resync_required": False, "resync_reason": None, "credit": 256,
        "policy": policy, "features": {"messages": [], "events": [], "capabilities": ["batch"]}, "presence": [],
        "health": {"status": "ok", "draining": False}, "last_disconnect": None,
    }  # fmt: skip
    return base | fields


def custom(seq: int, first: int | None = None, **fields: Any) -> dict[str, Any]:
    return {"type": "custom", "seq": seq, "first": first or seq, "at": 0, "name": "n", "data": seq} | fields


def delta(seq: int, text: str, turn_id: str = "t_1") -> dict[str, Any]:
    return {"type": "delta", "seq": seq, "first": seq, "at": 0, "turn_id": turn_id, "channel": "answer", "text": text}


def snapshot(cursor: int, **fields: Any) -> dict[str, Any]:
    return {
        "type": "snapshot", "epoch": "e_1", "cursor": cursor, "reason": "requested", "state": {}, "transcript": [],
        "transcript_truncated": False, "turn": None, "queue": [], "asks": [],
    } | fields  # fmt: skip


def accepted(request_id: str, seq: int = 1, **fields: Any) -> dict[str, Any]:
    return {
        "type": "accepted", "request_id": request_id, "seq": seq, "queued": 0, "duplicate": False, "durable": True,
        "credit": 256,
    } | fields  # fmt: skip


def error(code: str, **fields: Any) -> dict[str, Any]:
    return {"type": "error", "code": code, "message": f"it is {code}", "retryable": False} | fields


class Line:
    """The gateway's end of one connection. `said` is all that the client sent on it."""

    def __init__(self, ws: WebSocketConnection, stream: MemoryByteStream) -> None:
        self._ws = ws
        self._stream = stream
        self.said: list[dict[str, Any]] = []

    async def hear(self, *kinds: str) -> dict[str, Any]:
        """The client's next frame; of one of `kinds`, if given."""
        frame: dict[str, Any] = json.loads(await self._ws.get_message())
        self.said.append(frame)
        if kinds:
            assert frame["type"] in kinds, frame
        return frame

    async def say(self, *frames: dict[str, Any]) -> None:
        for frame in frames:
            await self._ws.send_message(json.dumps(frame))

    async def say_batch(self, *frames: dict[str, Any]) -> None:
        await self._ws.send_message(json.dumps(frames))

    async def close(self, code: int, reason: str = "") -> None:
        await self._ws.aclose(code, reason)

    def stall(self) -> None:
        """From now on nothing gets through, in either direction."""
        self._stream.incoming.stall()
        self._stream.outgoing.stall()

    async def cut(self) -> None:
        await trio.aclose_forcefully(self._stream)

    async def linger(self) -> None:
        """Stay silent until the client has gone."""
        with suppress(ConnectionClosed):
            while True:
                await self.hear()

    @property
    def closed_with(self) -> int | None:
        return None if self._ws.closed is None else self._ws.closed.code


Script = Callable[[Line], Awaitable[None]]


class ScriptedGateway:
    """One script per connection, in order; then nobody answers the door."""

    def __init__(self, nursery: trio.Nursery, *scripts: Script) -> None:
        self._nursery = nursery
        self.scripts = list(scripts)
        self.lines: list[Line] = []
        self.dialled_at: list[float] = []

    @asynccontextmanager
    async def connect(self, url: str, **options: Any) -> AsyncIterator[ClientSocket]:
        self.dialled_at.append(trio.current_time())
        near, far = memory_pair()
        if self.scripts:
            self._nursery.start_soon(self._serve, far, self.scripts.pop(0))
        async with dial(url, stream=near, **options) as socket:
            yield socket

    async def _serve(self, stream: MemoryByteStream, script: Script) -> None:
        async with trio.open_nursery() as nursery:
            request = await wrap_server_stream(nursery, stream)
            line = Line(await request.accept(), stream)
            self.lines.append(line)
            try:
                await script(line)
            except* ConnectionClosed:
                pass
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def scripted(*scripts: Script, **options: Any) -> AsyncIterator[tuple[Session, ScriptedGateway]]:
    """A session with a gateway that plays `scripts`; jitter is switched off (the delay is always the ceiling)."""
    async with trio.open_nursery() as nursery:
        gateway = ScriptedGateway(nursery, *scripts)
        async with open_session(
            URL, options.pop("agent_id", "echo"), connect=gateway.connect, **{"chance": lambda: 1.0, **options}
        ) as session:
            yield session, gateway
        nursery.cancel_scope.cancel()


async def take(session: Session, count: int) -> list[Any]:
    """The next `count` items of a session."""
    return [await session.__anext__() for _ in range(count)]
