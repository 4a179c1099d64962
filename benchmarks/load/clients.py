"""A connection to each kind of server. All of them check what comes and add to one `Tally`.

A client's callbacks run inside picows' parser: they check, count, and wake whoever waits for the last of something.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import dataclass, field
from typing import Any

import orjson
import picows

from benchmarks.load.checks import ContentError, Covered, Numbered
from benchmarks.texts import tag

TEXT = picows.WSMsgType.TEXT

FAN_TAG = tag(0, 0)
"""The name of the one answer that everybody hears in a fan-out."""

FAN_SESSION = "s_fan"


@dataclass(frozen=True)
class Target:
    """The server of a run. `pid` is its process, `core` where it runs, `knock` a free UDP port (see `agents`)."""

    dialect: str
    port: int
    pid: int
    core: int
    knock: int = 0
    tls: bool = False
    path: str = "/ws"

    @property
    def url(self) -> str:
        return f"{'wss' if self.tls else 'ws'}://127.0.0.1:{self.port}{self.path}"


@dataclass
class Tally:
    """What all clients of a run have received, and the first thing that was wrong.

    Attributes:
        pieces: deltas' worth of text that arrived. frames: in how many messages.
        first: seconds from each question to the first piece of its answer.
    """

    task: asyncio.Task[Any]
    pieces: int = 0
    frames: int = 0
    first: list[float] = field(default_factory=list)
    error: Exception | None = None
    _goal: int = 0
    _reached: asyncio.Future[None] | None = None

    def add(self, pieces: int) -> None:
        self.pieces += pieces
        if self._reached is not None and self.pieces >= self._goal:
            self._reached.set_result(None)
            self._reached = None

    async def reach(self, pieces: int) -> None:
        """Wait until `pieces` have arrived in all."""
        if self.pieces < pieces:
            self._goal = pieces
            self._reached = asyncio.get_running_loop().create_future()
            await self._reached

    def fail(self, exc: Exception) -> None:
        """The run does not count: end it."""
        if self.error is None:
            self.error = exc
            self.task.cancel()


class Client(picows.WSListener):
    """A client of a bare server; subclasses speak other dialects.

    Args:
        session: what to join, where there are sessions. since: the cursor to resume from.
        fan: whether it hears what is broadcast, as one answer without an end.
    """

    def __init__(
        self, tally: Tally, number: int, *, session: str | None = None, since: int | None = None, fan: bool = False
    ) -> None:
        self.tally = tally
        self.number = number
        self.session = session
        self.since = since
        self.fan = fan
        self.turn = 0
        self.transport: picows.WSTransport
        self._closing = False
        self._asked_at = 0.0
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[Any] = loop.create_future()
        self.ended: asyncio.Future[Any] = loop.create_future()
        self.heard_of: asyncio.Future[Any] = loop.create_future()
        """Done with the first piece of all."""
        self._answer = Numbered(FAN_TAG if fan else "")

    @classmethod
    async def open(cls, target: Target, tally: Tally, number: int, **how: Any) -> Client:
        """Connect and join."""
        context = None
        if target.tls:
            context = ssl.create_default_context()
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        kind = CLIENTS[target.dialect]
        _, client = await picows.ws_connect(
            lambda: kind(tally, number, **how),
            target.url,
            ssl_context=context,
            websocket_handshake_timeout=30,
        )
        assert isinstance(client, Client)
        await client.ready
        return client

    # what a load does with it

    def ask(self, count: int, interval_ms: float | None = None) -> asyncio.Future[Any]:
        """Ask for `count` pieces; the future is done when they have come. `benchmarks.peers` tells of the interval."""
        self.turn += 1
        name = tag(self.number, self.turn)
        self._answer = Numbered(name, count)
        self._started()
        self.send({"type": "ask", "tag": name, "count": count, "interval_ms": interval_ms})
        return self.ended

    def ping(self) -> asyncio.Future[Any]:
        """The future is done when the pong is here."""
        self.turn += 1
        self._started()
        self.send({"type": "ping", "nonce": self.number})
        return self.ended

    def go(self, count: int) -> None:
        """Have `count` events sent to everybody."""
        self.send({"type": "go", "tag": FAN_TAG, "count": count})

    def close(self) -> None:
        """Hang up."""
        self._closing = True
        self.transport.disconnect(False)

    # dialect

    def greet(self) -> None:
        self.send({"type": "hello"})

    def send(self, frame: dict[str, Any]) -> None:
        self.transport.send(TEXT, orjson.dumps(frame))

    def receive(self, data: bytes) -> None:
        self.handle(orjson.loads(data))

    def handle(self, frame: dict[str, Any]) -> None:
        kind = frame["type"]
        if kind == "delta":
            self._answer.delta(frame["tag"], frame["n"], frame["text"])
            self._arrived(1)
        elif kind == "end":
            self._answer.end()
            self.ended.set_result(None)
        elif kind == "pong":
            if frame["nonce"] != self.number:
                raise ContentError(f"pong {frame['nonce']!r} on connection {self.number}")
            self.ended.set_result(None)
        elif kind == "hello_ok":
            self.ready.set_result(None)
        else:
            raise ContentError(f"unexpected: {frame}")

    def _started(self) -> None:
        self.ended = asyncio.get_running_loop().create_future()
        self._asked_at = time.perf_counter()

    def _arrived(self, pieces: int) -> None:
        if self._asked_at:
            self.tally.first.append(time.perf_counter() - self._asked_at)
            self._asked_at = 0.0
            if not self.heard_of.done():
                self.heard_of.set_result(None)
        self.tally.add(pieces)

    # picows

    def on_ws_connected(self, transport: picows.WSTransport) -> None:
        self.transport = transport
        try:
            self.greet()
        except Exception as exc:
            self.tally.fail(exc)

    def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
        if self._closing:
            return
        try:
            if frame.msg_type == TEXT and frame.fin:
                self.tally.frames += 1
                self.receive(frame.get_payload_as_bytes())
            elif frame.msg_type == picows.WSMsgType.CLOSE:
                raise ContentError(f"closed with {frame.get_close_code()} {frame.get_close_message()!r}")
            elif frame.msg_type not in (picows.WSMsgType.PING, picows.WSMsgType.PONG):
                raise ContentError(f"an unexpected frame: {frame}")
        except Exception as exc:
            self.tally.fail(exc)

    def on_ws_disconnected(self, transport: picows.WSTransport) -> None:
        if not self._closing:
            self.tally.fail(ContentError(f"connection {self.number} was closed"))


class GatewayClient(Client):
    """A client of the gateway, protocol 2."""

    EVENTS = frozenset({"input", "turn_started", "delta", "tool_call", "tool_result", "output", "turn_ended"})

    def __init__(self, *args: Any, **how: Any) -> None:
        super().__init__(*args, **how)
        self.covered = Covered(self.since or 0)
        if self.fan:
            self.covered.ask(FAN_TAG)
        self.head = 0
        """The session's newest event when this connection joined."""
        self._accepted = ""

    def greet(self) -> None:
        hello = {"type": "hello", "protocol_min": 2, "protocol_max": 2, "agent_id": "bench"}
        if self.session is not None:
            hello["session_id"] = self.session
        if self.since is not None:
            hello["since"] = self.since
        self.send(hello)

    def ask(self, count: int, interval_ms: float | None = None) -> asyncio.Future[Any]:
        name = tag(self.number, self.turn + 1)
        interval = "" if interval_ms is None else f" {interval_ms:g}"
        return self.message(f"stream {name} {count}{interval}", name, count)

    def message(self, content: str, name: str | None = None, count: int | None = 0) -> asyncio.Future[Any]:
        """Send a message; the future is done when its turn has ended."""
        self.turn += 1
        name = name or tag(self.number, self.turn)
        self.covered.ask(name, count)
        self._started()
        self._accepted = ""
        self.send({"type": "message", "request_id": name, "content": content})
        return self.ended

    def handle(self, frame: dict[str, Any]) -> None:
        kind = frame["type"]
        if kind in self.EVENTS:
            covered = self.covered
            before = covered.received
            covered.event(frame)
            if covered.received > before:
                self._arrived(covered.received - before)
            if kind == "turn_ended":
                if not self.fan and self._accepted != covered.tag:
                    raise ContentError(f"{covered.tag}: ended, but the answer to its message was {self._accepted!r}")
                self.ended.set_result(None)
            if frame["seq"] == self.head and not self.ready.done():
                self.ready.set_result(None)
        elif kind == "pong":
            if frame["nonce"] != self.number:
                raise ContentError(f"pong {frame['nonce']!r} on connection {self.number}")
            self.ended.set_result(None)
        elif kind == "accepted":
            self._accepted = frame["request_id"]
        elif kind == "hello_ok":
            self._joined(frame)
        elif kind == "ping":
            self.send({"type": "pong"})
        elif kind != "presence":
            raise ContentError(f"unexpected: {frame}")

    def _joined(self, hello: dict[str, Any]) -> None:
        if hello["resync_required"]:
            raise ContentError(f"a resync: {hello['resync_reason']}")
        self.session = hello["session_id"]
        self.covered.cursor = hello["cursor"]
        self.head = hello["head"]
        if self.since is None or self.head == hello["cursor"]:
            self.ready.set_result(None)


class SocketIoClient(Client):
    """The plain dialect as arguments of the event ``m``, in Engine.IO 4 packets on a WebSocket."""

    def greet(self) -> None:
        """The server speaks first."""

    def send(self, frame: dict[str, Any]) -> None:
        self.transport.send(TEXT, b"42" + orjson.dumps(["m", frame]))

    def receive(self, data: bytes) -> None:
        if data.startswith(b"42"):
            name, frame = orjson.loads(data[2:])
            if name != "m":
                raise ContentError(f"unexpected: {data[:200]!r}")
            self.handle(frame)
        elif data.startswith(b"0"):  # engine.io is open: connect to the namespace
            self.transport.send(TEXT, b"40")
        elif data.startswith(b"40"):
            self.send({"type": "hello"})
        elif data == b"2":
            self.transport.send(TEXT, b"3")
        else:
            raise ContentError(f"unexpected: {data[:200]!r}")


class PraisonClient(Client):
    """A client of PraisonAI's gateway. Each has an agent of its own: an agent's stream goes to all of its sessions."""

    def greet(self) -> None:
        agent = f"bench{self.number}"
        self.send({"type": "hello", "protocol_min": 1, "protocol_max": 1, "agent_id": agent, "caps": ["streaming"]})

    def ask(self, count: int, interval_ms: float | None = None) -> asyncio.Future[Any]:
        self.turn += 1
        name = tag(self.number, self.turn)
        self._answer = Numbered(name, count)
        self._started()
        self.send({"type": "message", "request_id": name, "content": f"stream {name} {count} {interval_ms}"})
        return self.ended

    def handle(self, frame: dict[str, Any]) -> None:
        kind = frame["type"]
        if kind == "token_stream":
            # Its deltas have a number of the session's, not of the answer; the text says which it is.
            self._answer.delta(self._answer.tag, self._answer.received, frame["data"]["content"])
            self._arrived(1)
        elif kind == "response" and frame["status"] == "final":
            if frame["outcome"] != {"status": "ok"}:
                raise ContentError(f"a turn ended as {frame['outcome']}: {frame['content']}")
            self._answer.end()
            self.ended.set_result(None)
        elif kind == "hello_ok":
            self.ready.set_result(None)
        elif kind not in ("response", "stream_end"):
            raise ContentError(f"unexpected: {frame}")


CLIENTS: dict[str, type[Client]] = {
    "plain": Client,
    "gateway": GatewayClient,
    "socket.io": SocketIoClient,
    "praisonai": PraisonClient,
}
