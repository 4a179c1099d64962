"""A gateway that is as difficult as a gateway may be, and sometimes broken: for trying out client libraries.

It answers every message with a short turn, and each connection has a mood, drawn from the seed: the line is cut in the
middle of a frame, bytes trickle, deltas come merged or not at all, events come twice, one is left out, the cursor has
expired, the epoch is another, the gateway goes away, refuses, or sends what is no frame. Whatever it does, the story
of a session stays one that a client can get right, and what the client does is held against the protocol.
"""

from __future__ import annotations

import random
import re
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import trio
from attrs import evolve, field, mutable

from gateway.errors import FrameError, GatewayError, HandshakeRefused
from gateway.protocol import codec, handshake
from gateway.protocol import messages as m
from gateway.testing import wire
from gateway.testing.judge import shown
from gateway.testing.wire import Closed, MessageReader, Received
from gateway.transport.frames import CLOSE, PING, PONG, TEXT

MOODS = (
    "honest", "honest", "cut", "cut", "cut", "slow", "close", "goaway", "expired", "epoch", "twice", "gap", "future",
    "refuse", "no json", "no frame",
)  # fmt: skip
"""What a connection may be like. Every third is honest whatever the seed says, so that clients get on."""

RETRYABLE = (1001, 1011, 1012, 1013, 4408)

HINT_MS = 300
"""What a hint asks a client to wait: long enough to measure, short enough to wait for."""

KEPT_LINES = 400
"""Of the transcript: some connections' worth."""

POLICY = m.Policy(
    max_payload=1 << 20, max_frame_bytes=1 << 20, max_inbox=256, max_buffered_bytes=1 << 20, heartbeat_ms=30_000,
    resume_window_ms=86_400_000, max_turn_ms=600_000, replay_max_events=10_000, replay_max_bytes=8 << 20,
)  # fmt: skip

_KEY = re.compile(rb"\r\nsec-websocket-key:[ \t]*(\S+)", re.IGNORECASE)


class ClientFailure(GatewayError):
    """The client broke the protocol."""


class _Over(Exception):
    """This connection is done."""


@mutable
class Session:
    """What one session's clients were told, and what they may claim."""

    session_id: str
    agent_id: str
    epoch: str
    events: list[m.Event] = field(factory=list)
    inputs: dict[str, m.Input] = field(factory=dict)
    told: set[int] = field(factory=lambda: {0})
    """Positions that a client can have: ends of what was written to it."""
    claimed: tuple[str | None, int] = (None, 0)
    """Epoch and `since` of the last hello."""
    epochs: set[str] = field(factory=set)
    due_back: float | None = None
    """When its client must be here again, at the latest."""
    not_before: float = 0.0
    connections: int = 0

    @property
    def head(self) -> int:
        return self.events[-1].seq if self.events else 0

    def text_of(self, turn_id: str) -> str:
        """The answer of a turn: what a client's user must have seen."""
        return "".join(e.content for e in self.events if isinstance(e, m.Output) and e.turn_id == turn_id)


class HostileGateway:
    """The whole of it. Everything is synchronous but the sockets, so a seed decides what each connection is like.

    Args:
        max_stall: seconds for a client to answer, and to come back.

    Attributes:
        failures: what clients did wrong, in order.
        transcript: the last texts of both sides.
    """

    def __init__(self, seed: int, *, max_stall: float = 10.0, moods: tuple[str, ...] = MOODS) -> None:
        self._seed = seed
        self._max_stall = max_stall
        self._moods = moods
        self._failed = trio.Event()
        self.sessions: dict[str, Session] = {}
        self.connections = 0
        self.failures: list[ClientFailure] = []
        self.transcript: deque[dict[str, Any]] = deque(maxlen=KEPT_LINES)
        self.on_connection: Callable[[], None] = lambda: None

    def fail(self, message: str) -> None:
        self.failures.append(ClientFailure(message))
        self._failed.set()

    async def serve(self, stream: trio.SocketStream) -> None:
        """Serve one connection from its first byte to its last. For `trio.serve_tcp`."""
        self.connections += 1
        number = self.connections
        # Not for secrets.
        chance = random.Random(f"{self._seed}/{number}")
        mood = "honest" if number % 3 == 0 else chance.choice(self._moods)
        self.on_connection()
        connection = _Connection(self, stream, number, mood, chance)
        try:
            await connection.run()
        except* _Over:
            pass
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        except* ClientFailure as group:
            self.fail(f"connection {number} ({mood}): {_first(group)}")
        finally:
            connection.ended()
            await trio.aclose_forcefully(stream)

    async def watch(self) -> None:
        """Wait until a client broke the protocol, by staying away for too long, too."""
        while not self._failed.is_set():
            now = trio.current_time()
            for session in self.sessions.values():
                if session.due_back is not None and now > session.due_back:
                    self.fail(
                        f"session {session.session_id}: no client came back within {self._max_stall:g} s "
                        "after its line was cut or closed with a code after which it should"
                    )
            with trio.move_on_after(0.05):
                await self._failed.wait()

    @property
    def max_stall(self) -> float:
        return self._max_stall


class _Connection:
    def __init__(
        self, gateway: HostileGateway, stream: trio.SocketStream, number: int, mood: str, chance: random.Random
    ) -> None:
        self._gateway = gateway
        self._stream = stream
        self._number = number
        self._mood = mood
        self._chance = chance
        self._writing = trio.Lock()
        self._reader = MessageReader(masked=True)
        self._session: Session | None = None
        self._session_to_leave: Session | None = None
        self._capabilities: list[str] = []
        self._cursor = 0
        # What the mood waits for: bytes until the cut, or events until the trouble.
        self._bytes_left = chance.randrange(1, 6000) if mood == "cut" else None
        self._fuse = chance.randrange(0, 30)
        self._awaiting: float | None = None
        """When the client must have ended the connection or asked for a resync."""
        self._more = trio.Event()
        self._pongs: list[bytes] = []
        self._we_end = False
        self._left = False
        self._client_closed: Closed | None = None

    # life

    async def run(self) -> None:
        with trio.move_on_after(self._gateway.max_stall) as opening:
            hello = await self._open()
        if opening.cancelled_caught:
            raise ClientFailure(f"no hello within {self._gateway.max_stall:g} s")
        await self._welcome(hello)
        async with trio.open_nursery() as nursery:
            # Whichever raises first ends the connection.
            nursery.start_soon(self._read)
            nursery.start_soon(self._write_events)
            await self._patience()

    async def _patience(self) -> None:
        while True:
            await trio.sleep(0.02)
            if self._awaiting is not None and trio.current_time() > self._awaiting:
                raise ClientFailure(f"it goes on after {self._what()}")

    def _what(self) -> str:
        return "bytes that are no WebSocket frame" if self._mood == "no frame" else "an event that left a gap"

    def ended(self) -> None:
        """The line is as good as gone: note what is expected of the client now. May be called again."""
        session, self._session_to_leave = self._session_to_leave, None
        if session is not None:
            session.connections -= 1
            if self._we_end and not self._left:
                session.due_back = max(trio.current_time(), session.not_before) + self._gateway.max_stall

    # opening

    async def _open(self) -> m.Hello:
        head = b""
        while b"\r\n\r\n" not in head:
            data = await self._stream.receive_some(65_536)
            if not data or len(head) > 65_536:
                raise _Over
            head += data
        head, _, rest = head.partition(b"\r\n\r\n")
        key = _KEY.search(head)
        if not head.startswith(b"GET ") or key is None or b"upgrade: websocket" not in head.lower():
            raise ClientFailure(f"expected a WebSocket upgrade, got {shown(head)!r}")
        offered = re.search(rb"\r\nsec-websocket-protocol:[^\r]*\btrio-gateway\b", head, re.IGNORECASE)
        answer = (
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Accept: {wire.accept_key(key[1].decode('latin-1'))}\r\n"
            + ("Sec-WebSocket-Protocol: trio-gateway\r\n" if offered else "")
            + "\r\n"
        )
        await self._send(answer.encode())
        texts = self._texts(rest)
        while not texts:
            data = await self._stream.receive_some(65_536)
            if not data:
                raise _Over
            texts = self._texts(bytes(data))
        try:
            hello = handshake.read_hello(texts[0])
        except HandshakeRefused as exc:
            raise ClientFailure(f"a hello that is none: {exc.message}, in {shown(texts[0])}") from None
        if len(texts) > 1:
            raise ClientFailure(f"a frame before hello was answered: {shown(texts[1])}")
        return hello

    async def _welcome(self, hello: m.Hello) -> None:
        gateway = self._gateway
        session_id = hello.session_id or f"s_{gateway._seed}_{self._number}"
        session = gateway.sessions.get(session_id)
        known = session is not None
        if session is None:
            session = Session(session_id, hello.agent_id, f"e_{self._number}")
            session.epochs.add(session.epoch)
            gateway.sessions[session_id] = session
        else:
            self._check_return(session, hello)
        session.due_back = None
        session.connections += 1
        self._session = self._session_to_leave = session
        self._capabilities = hello.capabilities
        since = hello.since or 0
        if self._mood == "refuse":
            await self._refuse(session)
        if self._mood == "epoch":
            session.epoch = f"e_{self._number}"
            session.epochs.add(session.epoch)
        reason: m.ResyncReason | None = None
        if not known and since:
            reason = "unknown_session"
        elif hello.epoch is not None and hello.epoch != session.epoch:
            reason = "epoch_changed"
        elif since > session.head:
            reason = "cursor_ahead"
        elif self._mood == "expired" and 0 < since < session.head:
            reason = "cursor_expired"
        self._cursor = session.head if reason else since
        oldest = min(self._cursor, since + 1 if reason == "cursor_expired" else 0)
        await self._say(
            m.HelloOk(
                protocol=2,
                server=m.ServerInfo(name="hostile", version="0", node="n1"),
                connection_id=f"c_{self._number}",
                session_id=session_id,
                agent_id=hello.agent_id,
                epoch=session.epoch,
                resumed=known,
                cursor=self._cursor,
                head=session.head,
                oldest_cursor=oldest,
                resync_required=reason is not None,
                resync_reason=reason,
                credit=256,
                policy=POLICY,
                features=handshake.FEATURES,
                presence=[],
                health=m.Health(status="ok", draining=False),
            )
        )
        session.told.add(self._cursor)
        if reason is not None:
            await self._snapshot(reason)

    def _check_return(self, session: Session, hello: m.Hello) -> None:
        """Hold a client that comes back to what it was told."""
        since = hello.since or 0
        if trio.current_time() < session.not_before - 0.01:
            raise ClientFailure(f"it came back before the {HINT_MS} ms that it was asked to wait")
        if session.connections:
            return  # one more reader, which need not have been here before
        if hello.epoch is not None and hello.epoch not in session.epochs:
            raise ClientFailure(f"field 'epoch': {hello.epoch!r} was never told to it")
        if since not in session.told:
            raise ClientFailure(
                f"field 'since': it continues after {since}, where no event that it was sent ends; "
                f"the last one ended at {max(session.told)}"
            )
        epoch, before = session.claimed
        if epoch in (None, hello.epoch) and since < before:
            raise ClientFailure(f"field 'since': it had {before} and continues after {since}, so it sees events twice")
        session.claimed = hello.epoch, since

    async def _refuse(self, session: Session) -> None:
        self._we_end = True
        session.not_before = trio.current_time() + HINT_MS / 1000
        await self._say(
            m.HelloError(
                code="rate_limited", message="too many connections", retryable=True, retry_after_ms=HINT_MS,
                next_step="Wait.", server_min_version=1, server_max_version=2,
            )
        )  # fmt: skip
        await self._close(4429, "rate_limited")

    # reading

    def _texts(self, data: bytes) -> list[bytes]:
        texts = []
        for item in self._reader.feed(data):
            if isinstance(item, Received):
                if item.binary:
                    raise ClientFailure("a binary message")
                self._note("client", item.payload)
                texts.append(item.payload)
            elif isinstance(item, Closed):
                self._client_closed = item
            elif item.opcode == PING:
                self._pongs.append(item.payload)
        if self._reader.violation is not None:
            raise ClientFailure(f"not WebSocket as a client must speak it: {self._reader.violation.reason}")
        return texts

    async def _read(self) -> None:
        while True:
            data = bytes(await self._stream.receive_some(65_536))
            if not data:
                raise _Over
            for raw in self._texts(data):
                for frame in codec.iter_client(raw):
                    await self._on_frame(frame, raw)
            if self._client_closed is not None:
                await self._close(self._client_closed.code if self._client_closed.code != 1005 else 1000, "")
            while self._pongs:
                await self._send(wire.frame(PONG, self._pongs.pop(), masked=False))

    async def _on_frame(self, frame: m.ClientFrame | FrameError, raw: bytes) -> None:
        if isinstance(frame, FrameError):
            raise ClientFailure(f"a frame that is wrong: {frame.message}, in {shown(raw)}")
        if isinstance(frame, m.Hello):
            raise ClientFailure("a second hello")
        if isinstance(frame, m.Message):
            await self._on_message(frame)
        elif isinstance(frame, m.Ping):
            await self._say(m.ServerPong(nonce=frame.nonce))
        elif isinstance(frame, m.Resync):
            self._awaiting = None
            await self._snapshot("requested")
        elif isinstance(frame, m.Leave):
            self._left = True
            await self._say(m.Left())
            await self._close(1000, "left")
        elif isinstance(frame, m.Abort):
            if frame.scope == "turn" or frame.turn_id or frame.request_id:
                await self._say(m.Error(code="no_active_turn", message="no turn is running"))
            else:
                await self._say(m.Aborted(turn_id=None, withdrawn=[]))
        elif isinstance(frame, m.Answer):
            await self._say(m.Error(code="unknown_ask", message="there is no such ask"))
        elif isinstance(frame, m.Refresh):
            await self._say(m.Refreshed(expires_at=None))

    async def _on_message(self, frame: m.Message) -> None:
        session = self._session
        assert session is not None
        known = session.inputs.get(frame.request_id)
        if known is not None and (known.content, known.metadata) != (frame.content, frame.metadata):
            raise ClientFailure(f"request_id {frame.request_id!r} again, with other content")
        event = known or self._add(m.Input(request_id=frame.request_id, content=frame.content, metadata=frame.metadata))
        session.inputs[frame.request_id] = event
        if known is None:
            # Before anything is written: the line may be cut there, and what was accepted is answered all the same.
            self._turn(frame.request_id)
        await self._say(
            m.Accepted(
                request_id=frame.request_id, seq=event.seq, queued=0, duplicate=known is not None, durable=True,
                credit=256,
            )
        )  # fmt: skip
        self._more.set()

    def _add(self, event: Any) -> Any:
        session = self._session
        assert session is not None
        # Numbers need not be dense: a gateway that restarted leaves some out, and covers them.
        event.first = session.head + 1
        event.seq = session.head + self._chance.choice((1, 1, 1, 1, 4))
        event.at = event.seq
        session.events.append(event)
        return event

    def _turn(self, request_id: m.RequestId) -> None:
        chance = self._chance
        turn_id = f"t_{self._number}_{len(self._session.events) if self._session else 0}"
        self._add(m.TurnStarted(turn_id=turn_id, request_ids=[request_id]))
        words = [chance.choice(("cut ", "merge ", "é🙂 ", '"\\ ', "resume\n")) for _ in range(chance.randrange(0, 25))]
        for at, word in enumerate(words):
            self._add(m.Delta(turn_id=turn_id, channel="answer", text=word))
            if at % 7 == 3:
                self._add(m.ToolCall(turn_id=turn_id, call_id=f"k{at}", name="look", arguments={"at": at}))
        self._add(m.Output(turn_id=turn_id, channel="answer", content="".join(words)))
        self._add(m.TurnEnded(turn_id=turn_id, outcome="completed"))

    # writing

    async def _write_events(self) -> None:
        """Send what follows the cursor, as the mood has it."""
        while True:
            session = self._session
            assert session is not None
            if self._cursor >= session.head or self._awaiting is not None:
                self._more = trio.Event()
                with trio.move_on_after(0.05):
                    await self._more.wait()
                continue
            batch = self._next_events(session)
            self._fuse -= len(batch)
            if self._fuse <= 0:
                batch = await self._trouble(batch)
            if batch:
                await self._send_events(batch)
            if self._chance.random() < 0.3:
                await trio.sleep(self._chance.random() * 0.01)

    def _next_events(self, session: Session) -> list[m.Event]:
        """Some events after the cursor, merged or not, superseded ones left out or not."""
        chance = self._chance
        ahead = [event for event in session.events if event.seq > self._cursor]
        batch: list[m.Event] = []
        first = self._cursor + 1
        for event in ahead[: chance.randrange(1, 6)]:
            last = batch[-1] if batch else None
            if isinstance(event, m.Delta) and isinstance(last, m.Delta) and chance.random() < 0.5:
                batch[-1] = evolve(last, seq=event.seq, text=last.text + event.text)
            else:
                batch.append(evolve(event, first=first))
            first = event.seq + 1
        outputs = [at for at, event in enumerate(batch) if isinstance(event, m.Output)]
        if outputs and chance.random() < 0.5:
            # What the output replaces is skipped, and its range says so.
            end = outputs[0]
            start = end
            while start and isinstance(batch[start - 1], m.Delta):
                start -= 1
            batch[start : end + 1] = [evolve(batch[end], first=batch[start].first)]
        return batch

    async def _trouble(self, batch: list[m.Event]) -> list[m.Event]:
        """The mood breaks out. What is returned is still to be sent."""
        mood, chance, session = self._mood, self._chance, self._session
        assert session is not None
        self._fuse = 10_000
        if mood == "close":
            self._we_end = True
            code = chance.choice(RETRYABLE)
            await self._close(code, "as it happens")
        elif mood == "goaway":
            self._we_end = True
            session.not_before = trio.current_time() + HINT_MS / 1000
            await self._say(m.GoAway(reason="restart", reconnect_after_ms=HINT_MS, deadline_ms=HINT_MS))
            await self._close(1012, "restart")
        elif mood == "twice":
            self._fuse = 5
            before = [event for event in session.events if event.seq <= self._cursor][-3:]
            await self._send_events(before, moves=False)
        elif mood == "gap" and len(batch) > 1:
            # Only if something not replaced is missing can a client tell; the numbers do.
            # Before it goes out: the answer may be here before the last of it is written.
            self._awaiting = trio.current_time() + self._gateway.max_stall
            await self._send_events(batch[1:], moves=False, told=False)
            return []
        elif mood == "future":
            self._fuse = 5
            await self._send_text(b'{"type":"from_the_future","seq":"no number","x":[1]}')
            fields = {**codec.to_builtins(batch[0]), "unknown_field": {"a": 1}}
            await self._send_text(codec.dump_json(fields))
            self._moved(batch[0])
            return batch[1:]
        elif mood == "no json":
            await self._send_text(chance.choice([b"{", b"[]]", b"null", b'{"type":3}', b'{"type":"delta"}', b""]))
            # What a client makes of it is its own affair; some go on, some come back.
            await trio.sleep(0.05)
            await self._cut()
        elif mood == "no frame":
            broken = [
                wire.frame(TEXT, b"{}"), wire.frame(3, b"", masked=False), wire.frame(PING, bytes(126), masked=False),
                wire.frame(TEXT, b"\xff", masked=False), wire.frame(TEXT, b"{}", bits=0x40, masked=False),
            ]  # fmt: skip
            self._awaiting = trio.current_time() + self._gateway.max_stall
            await self._send(chance.choice(broken))
            return []
        return batch

    async def _send_events(self, events: list[m.Event], *, moves: bool = True, told: bool = True) -> None:
        payloads = [codec.encode_event(event, event.first) for event in events]
        if told and self._session is not None:
            self._session.told.update(event.seq for event in events)
        if len(payloads) > 1 and "batch" in self._capabilities and self._chance.random() < 0.3:
            payloads = [b"[" + b",".join(payloads) + b"]"]
        for payload in payloads:
            await self._send_text(payload)
        if moves and events:
            self._moved(events[-1])

    def _moved(self, event: m.Event) -> None:
        self._cursor = max(self._cursor, event.seq)
        if self._session is not None:
            self._session.told.add(event.seq)

    async def _snapshot(self, reason: m.ResyncReason) -> None:
        session = self._session
        assert session is not None
        self._cursor = session.head
        session.told.add(session.head)
        transcript: list[Any] = [event for event in session.events if isinstance(event, m.TRANSCRIPT_EVENTS)]
        await self._say(
            m.Snapshot(
                epoch=session.epoch, cursor=session.head, reason=reason, state={}, transcript=transcript[-200:],
                transcript_truncated=len(transcript) > 200, turn=None, queue=[], asks=[],
            )
        )  # fmt: skip

    async def _say(self, frame: m.ServerFrame) -> None:
        await self._send_text(codec.encode_frame(frame))

    async def _send_text(self, payload: bytes) -> None:
        self._note("gateway", payload)
        chance = self._chance
        if len(payload) > 1 and chance.random() < 0.1:
            data = wire.fragments(
                payload, [chance.randrange(len(payload))], [wire.frame(PING, b"hello", masked=False)], masked=False
            )
        else:
            data = wire.frame(TEXT, payload, masked=False)
        await self._send(data)

    async def _send(self, data: bytes) -> None:
        async with self._writing:
            if self._bytes_left is not None:
                if len(data) >= self._bytes_left:
                    await self._stream.send_all(data[: self._bytes_left])
                    self._we_end = True
                    await self._cut()
                self._bytes_left -= len(data)
            if self._mood == "slow":
                for at in range(0, len(data), 97):
                    await self._stream.send_all(data[at : at + 97])
                    await trio.sleep(0.001)
            else:
                await self._stream.send_all(data)

    async def _close(self, code: int, reason: str) -> None:
        """Send a close frame; wait a moment for the answer, and for the client's end of the line."""
        self.ended()
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self._send(wire.frame(CLOSE, code.to_bytes(2, "big") + reason.encode(), masked=False))
            await trio.sleep(0.02)
        raise _Over

    async def _cut(self) -> None:
        self.ended()
        await trio.aclose_forcefully(self._stream)
        raise _Over

    def _note(self, who: str, payload: bytes) -> None:
        self._gateway.transcript.append({"connection": self._number, "mood": self._mood, who: shown(payload)})


def _first(group: BaseException) -> BaseException:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group
