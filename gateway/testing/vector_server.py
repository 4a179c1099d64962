"""Runs a vector the other way round: as a gateway that follows the script, against a client library.

What a client sends in the vector is what the client under test is made to send; what it expects is what this gateway
sends, made whole: fields that the vector does not name get plain values, numbers are counted. After each event the
client must have given it to its user, and each reply must have reached who waits for it. A client library is driven
through a `Driver`; `SessionDriver` is the one for `gateway.client`.
"""

from __future__ import annotations

import json
import types
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal, Protocol, Union, get_args, get_origin, get_type_hints

import attrs
import trio

from gateway.client import Session
from gateway.errors import ClientError, ConnectionLost, RequestRefused
from gateway.protocol import codec
from gateway.protocol import messages as m
from gateway.testing.peer import Peer
from gateway.testing.vector_runner import AGENT, PATIENCE_S, VectorFailed
from gateway.testing.vectors import Mismatch, Names, Step, Vector, action_of, match, resolve

Frame = dict[str, Any]

SKIPPED = 1_000
"""Numbers that a crash leaves out: they were reserved, so somebody may have seen them."""


class Driver(Protocol):
    """One session of the client under test."""

    async def wait_joined(self) -> None:
        """Return when the client has taken in the `hello_ok` of its connection."""

    async def taken(self, number: int) -> Frame:
        """The event or snapshot that the client has given to its user as the one of this number, from 0."""

    async def perform(self, frame: Frame) -> Frame:
        """Do what sends this frame, and return the reply that the client's user gets, as on the wire."""

    async def wait_over(self) -> None:
        """Return when the client has given up: it will not connect again by itself."""

    def text_of(self, turn_id: str, channel: str) -> str:
        """What the client's user sees of a turn's text."""


OpenDriver = Callable[[Frame], AbstractAsyncContextManager[Driver]]
"""Opens a session with the fields of this `hello` (`agent_id`, `session_id`, `since`, `epoch`)."""

Accept = Callable[[], Awaitable[Peer]]
"""The next connection that the client opens, upgraded."""


class SessionDriver:
    """Drives `gateway.client.Session`. `follow` must run in a task."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._over = trio.Event()
        self._taken: list[Frame] = []
        self._more = trio.Event()

    async def follow(self) -> None:
        """Take what the session gives."""
        try:
            async for item in self._session:
                self._taken.append(_wire(item))
                self._more.set()
                self._more = trio.Event()
        except ClientError:
            pass
        finally:
            self._over.set()

    async def wait_joined(self) -> None:
        await self._session.wait_joined()

    async def taken(self, number: int) -> Frame:
        while len(self._taken) <= number:
            await self._more.wait()
        return self._taken[number]

    async def wait_over(self) -> None:
        await self._over.wait()

    def text_of(self, turn_id: str, channel: str) -> str:
        return self._session.text_of(turn_id, channel)

    async def perform(self, frame: Frame) -> Frame:
        session = self._session
        try:
            match frame:
                case {"type": "message"}:
                    return _wire(
                        await session.send(frame["content"], **_given(frame, "request_id", "metadata", "on_busy"))
                    )
                case {"type": "abort"}:
                    return _wire(await session.abort(**_given(frame, "scope", "turn_id", "request_id")))
                case {"type": "answer"}:
                    await session.answer(frame["ask_id"], frame["value"])
                    return {"type": "answer_ok", "ask_id": frame["ask_id"]}
                case {"type": "resync"}:
                    return _wire(await session.resync())
                case {"type": "leave"}:
                    await session.leave()
                    return {"type": "left"}
        except RequestRefused as refused:
            return {"type": "error", "code": refused.code, "message": refused.message, "retryable": refused.retryable}
        raise ValueError(f"no call sends {frame['type']}")


def _given(frame: Frame, *names: str) -> dict[str, Any]:
    return {name: frame[name] for name in names if name in frame}


def _wire(item: Any) -> Frame:
    frame: Frame = json.loads(codec.dump_json(codec.to_builtins(item)))
    return frame


class ScriptedGateway:
    """Plays the gateway of a vector.

    Args:
        open_driver, accept: the client under test, and where its connections arrive.
        patience: seconds for one step.
    """

    def __init__(self, open_driver: OpenDriver, accept: Accept, *, patience: float = PATIENCE_S) -> None:
        self._open_driver = open_driver
        self._accept = accept
        self._patience = patience
        self._peers: dict[str, Peer] = {}
        self._drivers: dict[str, Driver] = {}
        self._replies: dict[str, list[_Call]] = {}
        self._given_to: Counter[str] = Counter()
        self._names: Names = {}
        self._seqs: dict[str, int] = {}
        self._events: list[Frame] = []
        self._head = self._cursor = self._shown = 0

    async def run(self, vector: Vector) -> None:
        """Run one vector.

        Raises:
            VectorFailed: the client does not do what it says.
        """
        self._names = {"agent": AGENT, "session": "s-vector", "other_session": "s-other"}
        async with trio.open_nursery() as self._nursery:
            for number, step in enumerate(vector.steps, 1):
                try:
                    with trio.fail_after(self._patience):
                        await self._do(step)
                except trio.TooSlowError:
                    raise VectorFailed(vector, number, step, f"nothing came for {self._patience:g} s") from None
                except (Mismatch, ConnectionLost) as exc:
                    raise VectorFailed(vector, number, step, str(exc)) from None
            self._nursery.cancel_scope.cancel()

    async def _do(self, step: Step) -> None:
        await getattr(self, f"_{action_of(step)}")(step)

    # the client's side

    async def _join(self, step: Step) -> None:
        name = step["join"]
        hello = {"agent_id": AGENT, "session_id": "$session", **step.get("hello", {})}
        self._names["cursor"] = self._cursor
        hello = resolve(hello, self._names)
        if name not in self._drivers:
            # Owned by the vector's nursery; ends with it.
            self._drivers[name] = await self._nursery.start(self._keep_driver, hello)
            self._replies[name] = []
        begun = trio.current_time()
        peer = self._peers[name] = await self._accept()
        first = json.loads(await peer.receive())
        match({"type": "hello", **hello}, first, self._names)
        waited, least = round((trio.current_time() - begun) * 1000), step.get("not_before_ms", 0)
        if waited < least:
            raise Mismatch(f"expected to connect again after {least} ms at the earliest, came after {waited}")
        known = bool(self._events) or hello.get("since", 0) > 0
        pattern = {"type": "hello_ok", **step.get("hello_ok", {})}
        resync = pattern.get("resync_required") is True
        own = {
            "protocol": 2, "session_id": hello["session_id"], "agent_id": AGENT, "head": self._head,
            "cursor": self._head if resync else hello.get("since", 0), "resumed": known, "credit": 256,
        }  # fmt: skip
        frame = self._complete(m.HelloOk, pattern, own)
        frame["policy"] = {**dict.fromkeys(frame["policy"], 1_048_576), "heartbeat_ms": 600_000}
        self._names = match(pattern, frame, self._names)
        await self._send_frame(name, frame)
        await self._drivers[name].wait_joined()

    async def _keep_driver(self, hello: Frame, task_status: trio.TaskStatus[Driver]) -> None:
        async with self._open_driver(hello) as driver:
            task_status.started(driver)
            await trio.sleep_forever()

    async def _send(self, step: Step) -> None:
        name, frame = step.get("on", "a"), resolve(step["send"], self._names)
        call = _Call(frame)
        self._replies[name].append(call)
        # Owned by the vector's nursery; ends with the client's reply.
        self._nursery.start_soon(call.run, self._drivers[name])
        await self._again({"on": name, "again": frame})

    async def _again(self, step: Step) -> None:
        """The client sends this by itself."""
        name, frame = step.get("on", "a"), resolve(step["again"], self._names)
        while (sent := json.loads(await self._peers[name].receive()))["type"] in ("ping", "pong"):
            pass
        match(frame, sent, self._names)

    async def _over(self, step: Step) -> None:
        await self._drivers[step["over"]].wait_over()

    # the gateway's side

    async def _send_frame(self, name: str, frame: Frame) -> None:
        await self._peers[name].send_text(json.dumps(frame, ensure_ascii=False))

    async def _expect(self, step: Step) -> None:
        name, pattern = step.get("on", "a"), step["expect"]
        tag = pattern["type"]
        if tag in m.EVENTS:
            self._head += 1
            own = {"seq": self._head, "first": self._shown + 1, "at": 1_000 + self._head}
            self._shown = self._head
            frame = self._complete(m.EVENTS[tag], pattern, own)
            if tag == "output":  # stands for the deltas before it
                frame["first"] = self._last_kept() + 1
            self._names = match(pattern, frame, self._names)
            self._events.append(frame)
            if tag == "input":
                self._seqs[frame["request_id"]] = frame["seq"]
            await self._send_frame(name, frame)
            await self._given(name, frame)
            self._cursor = frame["seq"]
            return
        frame = self._complete(m.SERVER_FRAMES[tag], pattern, self._own(tag, pattern))
        self._names = match(pattern, frame, self._names)
        await self._send_frame(name, frame)
        if tag == "snapshot":
            await self._given(name, frame)
            self._cursor = frame["cursor"]
        if tag in ("accepted", "aborted", "answer_ok", "error", "left") or frame.get("reason") == "requested":
            await self._reply(name, frame)

    def _last_kept(self) -> int:
        return max((event["seq"] for event in self._events if event["type"] != "delta"), default=0)

    def _own(self, tag: str, pattern: Frame) -> Frame:
        if tag == "accepted":
            return {"seq": self._seqs.get(pattern.get("request_id", ""), self._head + 1), "credit": 256}
        if tag == "snapshot":
            return {"cursor": self._head, "reason": "requested"}
        return {"message": "as the vector says"} if tag == "error" else {}

    async def _text(self, step: Step) -> None:
        """Sent in two pieces, so that the client has to join them."""
        name, turn_id = step.get("on", "a"), resolve(step["turn_id"], self._names)
        text, channel = resolve(step["text"], self._names), step.get("channel", "answer")
        for part in (text[: len(text) // 2], text[len(text) // 2 :]):
            pattern = {"type": "delta", "turn_id": turn_id, "channel": channel, "text": part}
            await self._expect({"on": name, "expect": pattern})
        if (shown := self._drivers[name].text_of(turn_id, channel)) != text:
            raise Mismatch(f"text: expected the client to show {text!r}, it shows {shown!r}")

    async def _closed(self, step: Step) -> None:
        await self._peers[step.get("on", "a")].close(step["closed"]["code"], step["closed"].get("reason", ""))

    async def _cut(self, step: Step) -> None:
        await self._peers[step["cut"]].cut()

    async def _drain(self, step: Step) -> None:
        """What the client sees of it are the steps that follow."""

    _start = _drain

    async def _crash(self, step: Step) -> None:
        """Every line breaks, and what may have been shown last is skipped: numbers are reserved in blocks."""
        for peer in self._peers.values():
            await peer.cut()
        self._head += SKIPPED

    # what the client makes of it

    async def _given(self, name: str, frame: Frame) -> None:
        number = self._given_to[name]
        self._given_to[name] += 1
        _same(frame, await self._drivers[name].taken(number), "the client gave its user something else")

    async def _reply(self, name: str, frame: Frame) -> None:
        calls = self._replies[name]
        wanted = frame.get("request_id")
        call = next((call for call in calls if wanted is None or call.frame.get("request_id") == wanted), None)
        if call is None:
            raise Mismatch(f"nobody waits for {frame}")
        calls.remove(call)
        reply = await call.reply()
        if frame["type"] == "error":
            frame = {name: frame[name] for name in ("type", "code", "message", "retryable")}
        _same(frame, reply, f"the reply to {call.frame['type']} is another")

    # making frames whole

    def _complete(self, cls: type[Any], pattern: Frame, own: Frame) -> Frame:
        hints = get_type_hints(cls)
        frame: Frame = {"type": pattern["type"]} if "type" in pattern else {}
        for field in attrs.fields(cls):
            name = field.name.rstrip("_")
            kind = hints[field.name]
            if name in own and (name not in pattern or _is_open(pattern[name], self._names)):
                frame[name] = own[name]
            elif name in pattern:
                frame[name] = self._value(kind, pattern[name], name)
            elif field.default is not attrs.NOTHING:
                default = field.default
                frame[name] = default.factory() if isinstance(default, attrs.Factory) else default  # type: ignore[arg-type]
            else:
                frame[name] = self._plain(kind)
        return frame

    def _value(self, kind: Any, pattern: Any, name: str) -> Any:
        """A value that fits a pattern."""
        if _is_open(pattern, self._names):
            return f"{name}-{self._head}" if isinstance(pattern, str) else self._plain(kind)
        origin, args = get_origin(kind), [arg for arg in get_args(kind) if arg is not type(None)]
        if origin in (Union, types.UnionType) and pattern is not None and kind != m.AnyEvent:
            return self._value(args[0], pattern, name)
        if isinstance(pattern, dict) and "$contains" in pattern:
            pattern = pattern["$contains"]
        if isinstance(pattern, list) and origin is list:
            return [self._value(args[0], item, name) for item in pattern]
        if isinstance(pattern, dict) and (kind == m.AnyEvent or attrs.has(kind)):
            event = m.EVENTS.get(pattern.get("type", ""))
            if event is None:
                return self._complete(kind, pattern, {})
            return self._complete(event, pattern, {"seq": 1, "first": 1})
        return resolve(pattern, self._names)

    def _plain(self, kind: Any) -> Any:
        origin, args = get_origin(kind), get_args(kind)
        if origin in (Union, types.UnionType):
            return None if type(None) in args else self._plain(args[0])
        if origin is Literal:
            return args[0]
        if attrs.has(kind):
            return self._complete(kind, {}, {})
        if kind is Any:
            return None
        return {str: "x", int: 0, bool: False, list: [], dict: {}}[origin or kind]


def _is_open(pattern: Any, names: Names) -> bool:
    """Whether a pattern leaves the value to us."""
    if isinstance(pattern, dict):
        return "$is" in pattern
    return isinstance(pattern, str) and pattern.startswith("$") and pattern[1:] not in names


def _same(expected: Frame, given: Frame, what: str) -> None:
    """Equal as JSON, whatever a side leaves out because it is null."""

    def plain(frame: Frame) -> str:
        return json.dumps({key: value for key, value in frame.items() if value is not None}, sort_keys=True)

    if plain(expected) != plain(given):
        raise Mismatch(f"{what}: expected {plain(expected)[:400]}, got {plain(given)[:400]}")


class _Call:
    """Something that the client's user does, and what comes of it."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self._done = trio.Event()
        self._reply: Frame = {}

    async def run(self, driver: Driver) -> None:
        self._reply = await driver.perform(self.frame)
        self._done.set()

    async def reply(self) -> Frame:
        await self._done.wait()
        return self._reply
