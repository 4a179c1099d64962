"""The clients of a simulated world, of two kinds, and their lines.

`RawClient` speaks the protocol itself: JSON, a cursor, and the rules of PROTOCOL, checked on every frame. It connects
only when told to. `LibraryClient` is `gateway.open_session` with all it does on its own.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import trio
from attrs import define, field

from gateway.client import Session, open_session, over
from gateway.errors import ClientError, ConnectionLost, RequestRefused, SessionClosed
from gateway.protocol import codec
from gateway.protocol.messages import Snapshot
from gateway.testing.invariants import aborted_means_over, withdrawn_before_cancelled
from gateway.testing.model import Client, Json, Violation
from gateway.transport.dial import ClientSocket, dial
from gateway.transport.memory import MemoryByteStream

if TYPE_CHECKING:
    from gateway.testing.world import World

URL = "ws://simulated/ws"

EXPECTED_CLOSES = (1000, 1006, 1011, 1012, 1013, 4408)
"""How a gateway may close a client that does nothing wrong. 1006: the line broke; 1011: the session's disk did."""

TOKEN_SLACK_MS = 2_500
"""How long after its token's end a connection on a good line may still be there: it is looked at now and then."""

REFRESH_ERRORS = ("token_rejected", "rate_limited", "unavailable")

FINAL_ERRORS = ("request_id_conflict", "busy")
"""Errors after which a message is not sent again."""


# --- lines -----------------------------------------------------------------------------------------------------------


@define(eq=False)
class Link:
    """One connection's line. `healthy`: no fault was ever put on it, so what is sent must arrive in time."""

    stream: MemoryByteStream
    """The client's end."""
    healthy: bool = True
    stalled: bool = False

    def cut(self) -> None:
        self.healthy = False
        self.stream.cut()

    def end(self) -> None:
        """The peer's process is gone: what is on the way to the client arrives, then the end."""
        self.healthy = False
        self.stream.incoming.end()
        self.stream.outgoing.cut()

    def stall(self) -> None:
        self.healthy, self.stalled = False, True
        self.stream.incoming.stall()
        self.stream.outgoing.stall()

    def go_on(self) -> None:
        self.stalled = False
        self.stream.incoming.resume()
        self.stream.outgoing.resume()

    def truncate(self, towards_client: bool, after: int) -> None:
        self.healthy = False
        (self.stream.incoming if towards_client else self.stream.outgoing).truncate(after)

    def delay(self, seconds: float) -> None:
        self.stream.incoming.delay = self.stream.outgoing.delay = seconds


@define(eq=False)
class Pending:
    """A request on a connection that has not been answered there. `key` is its request or ask id."""

    kind: str
    key: str
    since: float
    content: str = ""
    waiting: frozenset[str] = frozenset()
    """Of an abort: the inputs that were stored and waited when it was sent."""


@define(eq=False)
class Wire:
    """One connection of a `RawClient`."""

    link: Link
    since: int
    epoch: str | None
    scope: trio.CancelScope = field(factory=trio.CancelScope)
    outbox: deque[Json] = field(factory=deque)
    wake: trio.Event = field(factory=trio.Event)
    pending: list[Pending] = field(factory=list)
    credit: int | None = None
    """What the client was last told on this connection."""
    expires: int | None = None
    """Until when the token is good that counts, in ms; None for ever."""
    joined: bool = False
    refused: bool = False
    over: bool = False

    @property
    def expired(self) -> bool:
        return self.expires is not None and self.expires <= trio.current_time() * 1000

    def outlives_its_token(self, now: float) -> bool:
        """Whether the gateway should have closed it."""
        if self.expires is None or any(item.kind == "refresh" for item in self.pending):
            return False
        return now * 1000 > self.expires + TOKEN_SLACK_MS


class RawClient:
    """A client of its own making. `model` is what it knows; every frame is checked by it."""

    def __init__(self, world: World, name: str, session_id: str, subject: str) -> None:
        self.world = world
        self.name = name
        self.session_id = session_id
        self.subject = subject
        self.model = Client(name)
        self.wire: Wire | None = None
        self.unanswered: dict[str, Json] = {}
        """Messages of which no connection has told their fate."""
        self.sent = 0
        self.refused_for_good: list[str] = []

    @property
    def joined(self) -> bool:
        return self.wire is not None and self.wire.joined and not self.wire.over

    @property
    def settled(self) -> bool:
        """Whether it is joined and every request of it was answered."""
        wire = self.wire
        return self.joined and wire is not None and not wire.pending and not self.unanswered

    def connect(self, link: Link, lifetime: int = 0) -> None:
        """Open a new connection and forget the old one, whatever state that is in.

        Args:
            lifetime: of its token, in ms; 0 for ever.
        """
        if self.wire is not None:
            self.wire.scope.cancel()
        history = self.model.history
        self.wire = Wire(link, self.model.cursor, history.epoch if history else None)
        self.wire.expires = _until(lifetime)
        self.model.lost()
        self.world.spawn(self._run, self.wire)

    def _note(self, what: str) -> None:
        self.world.note(self.name, what)

    def _hello(self, wire: Wire) -> Json:
        hello = {
            "type": "hello",
            "protocol_min": 2,
            "protocol_max": 2,
            "agent_id": "agent",
            "session_id": self.session_id,
            "since": wire.since,
            "token": _token(self.subject, wire.expires),
        }
        return hello if wire.epoch is None else {**hello, "epoch": wire.epoch}

    async def _run(self, wire: Wire) -> None:
        try:
            with wire.scope:
                async with dial(
                    URL, stream=wire.link.stream, connect_timeout=5, send_timeout=5, close_timeout=0.5
                ) as ws:
                    self._note(f"-> hello since {wire.since}")
                    await self._transmit(ws, wire, self._hello(wire))
                    async with trio.open_nursery() as nursery:
                        # Ends with the reader below, or when the line does.
                        nursery.start_soon(self._write, ws, wire)
                        while True:
                            raw = await ws.receive()
                            if wire is self.wire:
                                self._receive(wire, raw)
        except* ConnectionLost as group:
            lost = _leaf(group)
            assert isinstance(lost, ConnectionLost)
            self._note(f"lost: {lost.code} {lost.reason}")
            self.world.check_close(lost.code, wire.refused or (lost.code == 4401 and wire.expired))
        finally:
            wire.over = True
            if wire is self.wire:
                self.model.lost()

    async def _write(self, ws: ClientSocket, wire: Wire) -> None:
        while True:
            wake = wire.wake
            while wire.outbox:
                await self._transmit(ws, wire, wire.outbox.popleft())
            await wake.wait()

    async def _transmit(self, ws: ClientSocket, wire: Wire, frame: Json) -> None:
        await ws.send(json.dumps(frame).encode())

    def _receive(self, wire: Wire, raw: bytes) -> None:
        for frame in _frames(raw):
            self._take(wire, frame)

    def _push(self, frame: Json, key: str = "", content: str = "") -> bool:
        wire, history = self.wire, self.model.live
        if wire is None or history is None or not self.joined:
            return False
        wire.outbox.append(frame)
        if frame["type"] not in ("signal", "pong"):
            waiting = frozenset(history.until(history.head).queue)
            wire.pending.append(Pending(frame["type"], key, trio.current_time(), content, waiting))
        wire.wake.set()
        wire.wake = trio.Event()
        if frame["type"] != "pong":
            self._note(f"-> {_brief(frame)}")
        return True

    # what it is told to do

    def send(self, script: str, on_busy: str = "queue", again: bool = False, conflict: bool = False) -> None:
        """Send a message: a new one, the newest once more (`again`), or its id with another content (`conflict`)."""
        if not self.joined:
            return
        if not ((again or conflict) and self.sent):
            self.sent += 1
            conflict = again = False
        request_id = f"{self.name}-{self.sent}"
        history = self.model.live
        assert history is not None
        before = history.sent.get(request_id)
        content = f"{request_id} {script}"
        if before and not conflict:
            content = before[0]
        elif before:
            content = f"{request_id} say:{len(before) + 1} custom return"
        self.resend({"type": "message", "request_id": request_id, "content": content, "on_busy": on_busy})

    def resend(self, frame: Json) -> None:
        """Send a message frame as it is."""
        history = self.model.live
        assert history is not None
        contents = history.sent.setdefault(frame["request_id"], [])
        if frame["content"] not in contents:
            contents.append(frame["content"])
        # Which of two sendings of one id was taken in is not known before it is in the log.
        history.modes.setdefault(frame["request_id"], set()).add(frame["on_busy"])
        if frame["on_busy"] == "interrupt":
            history.causes["interrupt"] += 1
        if self._push(frame, frame["request_id"], frame["content"]) and frame["content"] == contents[0]:
            self.unanswered[frame["request_id"]] = frame

    def abort(self, scope: str = "turn", newest: bool = False) -> None:
        """Abort by scope, or withdraw the newest message of its own."""
        if self.model.live is not None and self.joined:
            self.model.live.causes["abort"] += 1
            if newest:
                self._push({"type": "abort", "request_id": f"{self.name}-{self.sent}"})
            else:
                self._push({"type": "abort", "scope": scope}, scope)

    def answer(self, value: Any) -> None:
        """Answer the oldest open question with `value`, right or wrong; if none is open, one that does not exist."""
        history = self.model.history
        if history is not None:
            asks = history.until(self.model.cursor).asks
            ask_id = asks[0] if asks else "none"
            self._push({"type": "answer", "ask_id": ask_id, "value": value}, ask_id)

    def refresh(self, lifetime: int, other: bool = False) -> None:
        """Show another token, good for `lifetime` ms; or one of somebody `other`."""
        if self.joined:
            until = _until(lifetime)
            token = _token("mallory" if other else self.subject, until)
            self._push({"type": "refresh", "token": token}, token)

    def say(self, kind: str) -> None:
        """Send one of ``ping``, ``resync``, ``leave`` or ``signal``."""
        if kind == "signal":
            self._push({"type": "signal", "name": "typing", "data": self.name})
        elif kind != "stop":  # which is a word of dialect 1
            self._push({"type": kind})

    # what it gets

    def _take(self, wire: Wire, frame: Json) -> None:
        kind, model = frame["type"], self.model
        if kind not in ("ping", "presence", "signal"):
            self._note(f"<- {_brief(frame)}")
        if frame.get("credit") is not None:
            wire.credit = frame["credit"]
        if kind == "hello_ok":
            model.hello(frame, self.world.history(frame["session_id"], frame["epoch"]), wire.since, wire.epoch)
            wire.joined = True
        elif kind == "hello_error":
            wire.refused = True
            if not frame["retryable"] and not wire.expired:
                raise Violation("well_behaved_clients_are_served", (20,), f"{self.name} is refused: {frame}")
        elif kind == "snapshot":
            model.snapshot(frame, self.world.history(self.session_id, frame["epoch"]))
            wire.pending = [item for item in wire.pending if item.kind != "resync"]
        elif "seq" in frame and kind != "accepted":
            model.event(frame)
        elif kind == "accepted":
            stored = model.live.by_seq.get(frame["seq"], {}) if model.live is not None else {}
            item = self._answered(
                wire, "message", frame["request_id"], lambda item: item.content != stored.get("content")
            )
            model.accepted(frame, item.content)
            self.unanswered.pop(frame["request_id"], None)
        elif kind == "aborted":
            self._check_aborted(frame, self._answered(wire, "abort"))
        elif kind == "answer_ok":
            self._answered(wire, "answer", frame["ask_id"])
        elif kind == "pong":
            self._answered(wire, "ping")
        elif kind == "left":
            self._answered(wire, "leave")
        elif kind == "refreshed":
            self._refreshed(wire, frame["expires_at"])
        elif kind == "error":
            self._refused(wire, frame)
        elif kind == "ping":
            self._push({"type": "pong"})
        elif kind not in ("credit", "presence", "signal", "goaway"):
            raise Violation("only_known_frames", (20,), f"{self.name} got {frame}")

    def _answered(
        self, wire: Wire, kind: str, key: str = "", unlikely: Callable[[Pending], bool] = lambda item: False
    ) -> Pending:
        """Take out the request that a reply is for: the oldest of its kind and key, those that are `unlikely` last."""
        found = [item for item in wire.pending if item.kind == kind and (not key or item.key == key)]
        for item in sorted(found, key=unlikely):
            wire.pending.remove(item)
            return item
        raise Violation("every_reply_has_its_request", (6,), f"{self.name} got a reply to no {kind} {key} of its own")

    def _refused(self, wire: Wire, frame: Json) -> None:
        code, request_id = frame["code"], frame.get("request_id")
        if code in ("no_active_turn", "unknown_request"):
            self._answered(wire, "abort")
        elif code == "unknown_ask" or (code == "invalid_frame" and "'value'" in frame["message"]):
            self._answered(wire, "answer")
        elif request_id is not None:
            conflict = code == "request_id_conflict"
            admitted = self._admitted(wire, request_id)
            item = self._answered(wire, "message", request_id, lambda item: conflict and item.content == admitted)
            self._check_refused(request_id, item, code)
        elif any(item.kind == "refresh" for item in wire.pending) and code in REFRESH_ERRORS:
            self._refresh_refused(wire, code)
        elif code == "rate_limited":
            self._answered(wire, "abort")
        else:
            raise Violation("every_reply_has_its_request", (6,), f"{self.name} got {frame}")

    def _refreshed(self, wire: Wire, expires: int | None) -> None:
        item = self._answered(wire, "refresh")
        subject, until = _read_token(item.key)
        if subject != self.subject or until != expires:
            raise Violation("refreshes_are_judged", (19,), f"{self.name} showed {item.key}, got {expires}")
        if wire.expires is None or until is None or until < wire.expires:
            raise Violation("refreshes_are_judged", (19,), f"{item.key} is taken, the token was good to {wire.expires}")
        wire.expires = until

    def _refresh_refused(self, wire: Wire, code: str) -> None:
        asked = [item for item in wire.pending if item.kind == "refresh"]
        item = asked[-1] if code == "rate_limited" else asked[0]
        wire.pending.remove(item)
        subject, until = _read_token(item.key)
        assert until is not None
        worse = subject != self.subject or wire.expires is None or until < wire.expires
        good = {
            "token_rejected": worse or until <= trio.current_time() * 1000,
            "rate_limited": len(asked) > 1,
            # Less a millisecond: sums of times are not exact.
            "unavailable": trio.current_time() - item.since >= self.world.limits.handshake_timeout_ms / 1000 - 0.001,
        }
        if not good[code]:
            raise Violation("refreshes_are_judged", (19,), f"{item.key} is refused as {code}, there is {wire.expires}")

    def _admitted(self, wire: Wire, request_id: str) -> str | None:
        """Of an id with several contents, the one that counts: what is stored, or else came first."""
        history = self.model.live
        assert history is not None
        stored = [e["content"] for e in history.log if e["type"] == "input" and e["request_id"] == request_id]
        pending = [item.content for item in wire.pending if item.kind == "message" and item.key == request_id]
        return next(iter(stored + pending), None)

    def _check_refused(self, request_id: str, item: Pending, code: str) -> None:
        history = self.model.live
        assert history is not None
        if code == "request_id_conflict":
            if all(content == item.content for content in history.sent[request_id]):
                raise Violation("conflicts_are_real", (6,), f"{request_id} was never sent with another content")
        elif code not in ("inbox_full", "busy", "draining", "unavailable", "rate_limited"):
            raise Violation("errors_are_typed", (6,), f"{request_id} is refused with {code}")
        if code in FINAL_ERRORS and self.unanswered.get(request_id, {}).get("content") == item.content:
            del self.unanswered[request_id]

    def _check_aborted(self, frame: Json, abort: Pending) -> None:
        history = self.model.live
        assert history is not None
        aborted_means_over(history, frame)
        if abort.key in ("queue", "all"):
            withdrawn_before_cancelled(history, frame, abort.waiting)


class LibraryClient:
    """`gateway.open_session`, with a task that takes its events and one per request."""

    def __init__(self, world: World, name: str, session_id: str, subject: str) -> None:
        self.world = world
        self.name = name
        self.session_id = session_id
        self.subject = subject
        self.model = Client(name)
        self.session: Session | None = None
        self.opened = False
        self.link: Link | None = None
        self.open_requests: Counter[str] = Counter()
        self.sent = 0
        self._awake = trio.Event()
        self._awake.set()

    @property
    def settled(self) -> bool:
        return not self.open_requests["send"]

    def _note(self, what: str) -> None:
        self.world.note(self.name, what)

    def _stream(self) -> MemoryByteStream:
        self.link = self.world.new_link()
        return self.link.stream

    async def run(self) -> None:
        """Live until cancelled."""
        async with open_session(
            URL,
            "agent",
            session_id=self.session_id,
            token=self.subject,
            connect=over(self._stream),
            chance=self.world.chance,
            connect_timeout=2.0,
            handshake_timeout=2.0,
            buffer_events=16,
        ) as self.session:
            session = self.session
            while True:
                await self._awake.wait()
                try:
                    item = await anext(session)
                except StopAsyncIteration:
                    raise Violation("well_behaved_clients_are_served", (20,), f"{self.name} was shut out") from None
                self._take(session, item)

    def _take(self, session: Session, item: Any) -> None:
        model = self.model
        assert session.epoch is not None
        history = self.world.history(self.session_id, session.epoch)
        if isinstance(item, Snapshot):
            frame = json.loads(codec.encode_frame(item))
            self._note(f"<- {_brief(frame)}")
            model.lost()
            model.snapshot(frame, history)
        else:
            frame = json.loads(codec.encode_event(item, item.first))
            self._note(f"<- {_brief(frame)}")
            if model.history is None or (model.history is not history and model.cursor == 0):
                model._begin(history)
            model.event(frame)
            if item.type == "delta":
                shown, text = session.text_of(item.turn_id, item.channel), model.text(item.turn_id, item.channel)
                # Outputs from before a snapshot that had no room for them are known to the library still.
                if shown != text and (item.turn_id in model.whole or not shown.endswith(text)):
                    raise Violation("text_of_is_the_text", (4,), f"{self.name} shows {shown!r}")

    def sulk(self) -> None:
        """Take no events until `go_on`."""
        if self._awake.is_set():
            self._awake = trio.Event()

    def go_on(self) -> None:
        self._awake.set()

    def send(self, script: str, on_busy: str = "queue") -> None:
        """Send a message; nothing but a conflict or ``reject`` may keep it from being accepted."""
        self.sent += 1
        self.world.spawn(self._send, f"{self.name}-{self.sent}", script, on_busy)

    async def _send(self, request_id: str, script: str, on_busy: str) -> None:
        assert self.session is not None
        content = f"{request_id} {script}"
        self.world.remember(self.session_id, request_id, content, on_busy)
        self._note(f"send {request_id} {on_busy}: {script}")
        self.open_requests["send"] += 1
        try:
            accepted = await self.session.send(content, request_id=request_id, on_busy=on_busy)  # type: ignore[arg-type]
        except RequestRefused as exc:
            self._note(f"send {request_id}: {exc}")
            if not (exc.code == "busy" and on_busy == "reject"):
                raise Violation("sends_are_never_lost", (5, 6), f"{request_id} is refused: {exc}") from None
        except SessionClosed:
            self._note(f"send {request_id}: closed")
        else:
            self._note(f"send {request_id}: accepted as {accepted.seq}")
            self.world.was_accepted(self.session_id, request_id, accepted.seq)
        finally:
            self.open_requests["send"] -= 1

    def abort(self, scope: str = "turn") -> None:
        self.world.spawn(self._request, "abort", scope)

    def answer(self, value: Any) -> None:
        self.world.spawn(self._request, "answer", value)

    def resync(self) -> None:
        self.world.spawn(self._request, "resync", None)

    async def _request(self, kind: str, value: Any) -> None:
        session = self.session
        if session is None:
            return
        self._note(f"{kind} {value}")
        try:
            if kind == "abort":
                self.world.cause(self.session_id, "abort")
                with trio.move_on_after(20):
                    await session.abort(scope=value)
            elif kind == "answer":
                asks = list(session.view.asks)
                with trio.move_on_after(20):
                    await session.answer(asks[0] if asks else "none", value)
            else:
                with trio.move_on_after(20):
                    await session.resync()
        except (ClientError, ValueError) as exc:
            self._note(f"{kind}: {exc}")


def _frames(raw: bytes) -> list[Json]:
    parsed = json.loads(raw)
    return parsed if isinstance(parsed, list) else [parsed]


def _until(lifetime: int) -> int | None:
    """When a token ends that is good for so many ms, from now on; 0 is for ever."""
    return int(trio.current_time() * 1000) + lifetime if lifetime else None


def _token(subject: str, until: int | None) -> str:
    return subject if until is None else f"{subject}@{until}"


def _read_token(token: str) -> tuple[str, int | None]:
    subject, _, until = token.partition("@")
    return subject, int(until) if until else None


def _leaf(group: BaseException) -> BaseException:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group


def _brief(frame: Json) -> str:
    """A frame in half a line."""
    kind = frame["type"]
    if kind == "replay":
        event = frame["event"]
        data = {key: value for key, value in event["data"].items() if key not in ("session_id", "cursor", "seq")}
        return f"{event['type']} {frame['seq']} #{event['sequence']} {_short(data)}"
    if kind == "snapshot" and "epoch" not in frame:
        state = frame["state"]
        return f"snapshot at {state['event_cursor']}, {len(state['messages'])} messages, {len(state['events'])} events"
    if kind == "hello_ok" and frame["protocol"] == 2:
        resync = f" resync {frame['resync_reason']}" if frame["resync_required"] else ""
        return (
            f"hello_ok {frame['epoch']} cursor {frame['cursor']} of {frame['oldest_cursor']}..{frame['head']}{resync}"
        )
    if kind == "snapshot":
        turn = frame["turn"]["turn_id"] if frame["turn"] else "none"
        queue = [item["request_id"] for item in frame["queue"]]
        return f"snapshot at {frame['cursor']} ({frame['reason']}) turn {turn} queue {queue}"
    if "seq" in frame and "first" in frame:
        where = f"{frame['first']}..{frame['seq']}" if frame["first"] < frame["seq"] else str(frame["seq"])
        rest = {key: value for key, value in frame.items() if key not in ("type", "seq", "first", "at")}
        return f"{kind} {where} {_short(rest)}"
    return f"{kind} {_short({key: value for key, value in frame.items() if key != 'type'})}"


def _short(fields: Json) -> str:
    parts = []
    for key, value in fields.items():
        if value in (None, {}, [], False) or key in ("durable", "metadata", "sender"):
            continue
        text = value if isinstance(value, str) else json.dumps(value)
        parts.append(f"{key}={text if len(text) <= 60 else text[:57] + '...'}")
    return " ".join(parts)
