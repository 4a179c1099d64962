"""Runs a vector as a client against a gateway, over a real socket.

Two streams per connection are told apart, because the protocol orders them only in places (which `rules` checks): the
session's events, and the frames without a number. An `expect` takes the next frame of its stream; volatile events,
droppable frames and pings are passed over unless they are what is asked for.
"""

from __future__ import annotations

import json
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from math import inf
from typing import Any

import trio

from gateway.errors import ConfigError, ConnectionLost
from gateway.protocol import messages as m
from gateway.testing.peer import Peer, open_peer
from gateway.testing.praison_rules import PraisonObserver
from gateway.testing.rules import DROPPABLE, VOLATILE, Frame, Observer, RuleBroken
from gateway.testing.vectors import Mismatch, Names, Step, Vector, action_of, match, resolve

PULSE_S = 0.1
"""Between the pings of a `quiet` that lasts."""

PATIENCE_S = 30.0
"""For one step. Nothing is measured with it; a machine under load may take seconds."""

RETRY_S = 0.05
"""Between two joins that wait for something to be true."""

AGENT = "conformance"

Operator = Mapping[str, Callable[[], Awaitable[None]]]
"""Who runs the gateway, and can do some of `vectors.OPERATED` to it: ``drain`` it (returning before that is over),
``crash`` it (and start it again), ``start`` it again once it has drained."""


class VectorFailed(Exception):
    """The other side does not do what a vector says. Names the vector, the step (from 1) and its clauses."""

    def __init__(self, vector: Vector, number: int, step: Step, why: str) -> None:
        clauses = ", ".join(step.get("clauses", ())) or "none cited"
        super().__init__(f"{vector.id}, step {number} (clauses: {clauses}): {why}")
        self.step = number


class _Failed(Exception):
    pass


class _Connection:
    def __init__(self, peer: Peer, protocol: int) -> None:
        self.peer = peer
        self.observer = Observer() if protocol == 2 else PraisonObserver()
        self._numbered = m.EVENTS.keys() if protocol == 2 else {"replay"}
        # Dialect 1 merges nothing and leaves nothing out.
        self._volatile = VOLATILE if protocol == 2 else frozenset()
        self.events: deque[Frame] = deque()
        self.frames: deque[Frame] = deque()

    async def send(self, value: Any, known: set[str]) -> None:
        """Send a frame or an array of them; `known` are the request ids of this session that were sent before."""
        for frame in value if isinstance(value, list) else [value]:
            request_id = frame.get("request_id") if isinstance(frame, dict) and frame.get("type") == "message" else None
            if isinstance(request_id, str) and request_id not in known:
                known.add(request_id)
                self.observer.sent(request_id)
        await self.peer.send_text(json.dumps(value, ensure_ascii=False))

    async def read(self) -> None:
        """Take in one text message."""
        text = await self.peer.receive()
        try:
            parsed = json.loads(text)
        except ValueError:
            raise RuleBroken("1.3", f"expected JSON, got {text[:100]!r}") from None
        for frame in parsed if isinstance(parsed, list) else [parsed]:
            self.observer.received(frame, len(text.encode()))
            (self.events if frame["type"] in self._numbered else self.frames).append(frame)

    async def next(self, wanted: str, past: Sequence[str] = ()) -> Frame:
        """The next frame of the stream that `wanted` belongs to, passing over what may come in between."""
        numbered = wanted in self._numbered
        stream = self.events if numbered else self.frames
        passed = (self._volatile if numbered else DROPPABLE | {"ping"}) | set(past)
        while True:
            while stream:
                frame = stream.popleft()
                if frame["type"] == wanted or frame["type"] not in passed:
                    return frame
            await self.read()

    def left_over(self) -> Frame | None:
        """Something that came, must mean something, and was expected by nobody."""
        passed = self._volatile | DROPPABLE | {"ping", "pong"}
        return next((frame for frame in [*self.frames, *self.events] if frame["type"] not in passed), None)


class Runner:
    """Runs vectors against the gateway at `url`, whose agent ``conformance`` is that of `gateway.testing.conformance`.

    Args:
        operator: what can be done to the gateway, for the vectors that need it.
        patience: seconds for one step.
    """

    def __init__(self, url: str, *, operator: Operator | None = None, patience: float = PATIENCE_S) -> None:
        self._url = url
        self._operator = operator or {}
        self._patience = patience
        self._connections: dict[str, _Connection] = {}
        self._names: Names = {}
        self._protocol = 2
        self._known: set[str] = set()

    async def run(self, vector: Vector) -> None:
        """Run one vector, in sessions of its own: a gateway can be asked again and again.

        Raises:
            VectorFailed: the gateway does not do what it says.
            ConnectionLost: there is no gateway.
            ConfigError: the vector itself is wrong, or needs an operator.
        """
        fresh = secrets.token_hex(6)
        self._names = {"agent": AGENT, "session": f"v-{fresh}", "other_session": f"w-{fresh}"}
        self._connections, self._known = {}, set()
        self._protocol = vector.protocol
        try:
            for number, step in enumerate(vector.steps, 1):
                try:
                    with trio.fail_after(self._patience):
                        await self._do(step)
                except trio.TooSlowError:
                    raise VectorFailed(vector, number, step, f"nothing came for {self._patience:g} s") from None
                except (Mismatch, RuleBroken, _Failed) as exc:
                    raise VectorFailed(vector, number, step, str(exc)) from None
        finally:
            for connection in self._connections.values():
                await connection.peer.aclose()

    async def _do(self, step: Step) -> None:
        action = action_of(step)
        await getattr(self, f"_{action}")(step)

    def _on(self, step: Step) -> _Connection:
        name = step.get("on", "a")
        if name not in self._connections:
            raise ConfigError(name, "no such connection is open")
        connection = self._connections[name]
        self._names["cursor"] = connection.observer.cursor
        return connection

    # what is done

    async def _open(self, name: str, step: Step) -> _Connection:
        old = self._connections.get(name)
        if old is not None:
            await old.peer.aclose()
        query = step.get("query")
        peer = await open_peer(
            f"{self._url}?{query}" if query else self._url,
            headers=[(key, resolve(value, self._names)) for key, value in step.get("headers", ())],
            subprotocols=step.get("subprotocols", ()),
            receive_buffer=step.get("receive_buffer"),
        )
        if peer.ended is not None:
            await peer.aclose()
            raise _Failed(f"the upgrade was refused: {peer.ended.reason}")
        self._connections[name] = connection = _Connection(peer, step.get("protocol", self._protocol))
        return connection

    async def _connect(self, step: Step) -> None:
        if step.get("refused"):
            try:
                await self._open(step["connect"], step)
            except (ConnectionLost, _Failed):
                return
            raise Mismatch("expected this connection to be refused, it was opened")
        connection = await self._open(step["connect"], step)
        if "subprotocol" in step:
            match(step["subprotocol"], connection.peer.subprotocol, self._names)

    async def _join(self, step: Step) -> None:
        while True:
            try:
                await self._join_once(step)
                return
            except Mismatch:
                if not step.get("retry"):
                    raise
            await trio.sleep(RETRY_S)

    async def _join_once(self, step: Step) -> None:
        old = self._connections.get(step["join"])
        if old is not None:
            self._names["cursor"] = old.observer.cursor
        connection = await self._open(step["join"], step)
        protocol = step.get("protocol", self._protocol)
        hello = {
            "type": "hello", "protocol_min": protocol, "protocol_max": protocol, "agent_id": AGENT,
            "session_id": "$session", **step.get("hello", {}),
        }  # fmt: skip
        await connection.send(resolve(hello, self._names), self._known)
        await self._expect({"on": step["join"], "expect": {"type": "hello_ok", **step.get("hello_ok", {})}})

    async def _send(self, step: Step) -> None:
        connection = self._on(step)
        for _ in range(step.get("times", 1)):
            await connection.send(resolve(step["send"], self._names), self._known)

    async def _send_text(self, step: Step) -> None:
        await self._on(step).peer.send_text(resolve(step["send_text"], self._names))

    async def _send_binary(self, step: Step) -> None:
        await self._on(step).peer.send_binary(bytes.fromhex(step["send_binary"]))

    async def _close(self, step: Step) -> None:
        await self._on(step).peer.close(step["close"])

    async def _cut(self, step: Step) -> None:
        await self._connections[step["cut"]].peer.cut()

    async def _operate(self, step: Step) -> None:
        action = action_of(step)
        if action not in self._operator:
            raise ConfigError(action, "this vector needs somebody who does that to the gateway")
        await self._operator[action]()

    _drain = _crash = _start = _operate

    # what is expected

    async def _receive(self, connection: _Connection, wanted: str, past: Sequence[str] = ()) -> Frame:
        try:
            return await connection.next(wanted, past)
        except ConnectionLost as exc:
            raise _Failed(f"expected {wanted}, but the connection ended: {exc.code} {exc.reason}") from None

    async def _expect(self, step: Step) -> None:
        connection = self._on(step)
        pattern = step["expect"]
        frame = await self._receive(connection, pattern["type"], step.get("past", ()))
        self._names = self._matched(pattern, frame)

    def _matched(self, pattern: Frame, frame: Frame) -> Names:
        if pattern["type"] != frame["type"]:
            raise Mismatch(f"expected {pattern['type']}, got {json.dumps(frame, ensure_ascii=False)[:400]}")
        return match(pattern, frame, self._names)

    async def _expect_all(self, step: Step) -> None:
        connection = self._on(step)
        left = list(step["expect_all"])
        while left:
            frame = await self._receive(connection, left[0]["type"])
            for pattern in left:
                try:
                    self._names = self._matched(pattern, frame)
                except Mismatch as exc:
                    why = exc
                else:
                    left.remove(pattern)
                    break
            else:
                raise Mismatch(f"{json.dumps(frame)[:400]} fits none of what is expected; the last: {why}")

    async def _text(self, step: Step) -> None:
        connection = self._on(step)
        turn_id, expected = resolve(step["turn_id"], self._names), resolve(step["text"], self._names)
        while (text := connection.observer.text(turn_id, step.get("channel", "answer"))) != expected:
            if not expected.startswith(text):
                raise Mismatch(f"text: expected {expected[:80]!r}, got {text[:80]!r}")
            try:
                await connection.read()
            except ConnectionLost as exc:
                raise _Failed(f"expected text, but the connection ended: {exc.code} {exc.reason}") from None
        pieces = connection.observer.pieces(turn_id, step.get("channel", "answer"))
        if pieces > step.get("pieces", pieces):
            raise Mismatch(f"text: expected at most {step['pieces']} pieces, got {pieces}")

    async def _closed(self, step: Step) -> None:
        connection = self._on(step)
        pause = step["pinging_ms"] / 1000 if "pinging_ms" in step else inf
        while (ended := connection.peer.ended) is None:
            with suppress(ConnectionLost), trio.move_on_after(pause) as scope:
                await connection.read()
            if scope.cancelled_caught:
                await connection.peer.send_ping()
        if not step.get("skip") and (frame := connection.left_over()) is not None:
            raise Mismatch(f"nobody expected {json.dumps(frame, ensure_ascii=False)[:400]}")
        self._names = match(step["closed"], {"code": ended.code, "reason": ended.reason}, self._names)

    async def _quiet(self, step: Step) -> None:
        connection = self._on({"on": step["quiet"]})
        until = trio.current_time() + step.get("for_ms", 0) / 1000
        pongs = 0
        # Events may follow the first pong; what was there before it is here before the second.
        while pongs < 2 or trio.current_time() < until:
            if pongs >= 2:
                await trio.sleep(PULSE_S)
            pongs += 1
            await connection.send({"type": "ping"}, self._known)
            try:
                while not any(frame["type"] == "pong" for frame in connection.frames):
                    await connection.read()
            except ConnectionLost as exc:
                raise _Failed(f"the connection ended: {exc.code} {exc.reason}") from None
            connection.frames.remove(next(frame for frame in connection.frames if frame["type"] == "pong"))
        if (frame := connection.left_over()) is not None:
            raise Mismatch(f"nobody expected {json.dumps(frame, ensure_ascii=False)[:400]}")
        connection.frames.clear()
