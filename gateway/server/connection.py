"""One joined (or joining) connection: a cursor into its session's log, a reader, and a few unsent frames.

Theory of operation
-------------------
Reading: one task waits for text messages and handles each inline. No handler waits for anything, so an abort never
stands behind a turn, an inbox or a slow socket (DESIGN property 7). A long array is read piece by piece, with pauses
in which everyone else is served.

Writing: there is no queue of events. `cursor` says what the client has; `flush`, called by the flusher, takes what
follows it in the log. Frames without a number wait in `_control`, bounded in count and bytes, and go before events.
Whoever writes many of them in one step must not look slow for it, so a long queue is written before it is judged.

    snapshot: the cursor moves to the log's head in the step that encodes it, so nothing is lost or repeated at the seam

What is not in memory (`Log.tail`) is fetched by a small task, one page at a time, and written by `flush` like the rest;
nothing waits for it but this connection. The last page ends where memory begins, so it joins the live log as any other
read does.

A client that does not read: the socket is `blocked`, nothing is read from the log for it any more, and the watch
closes it by the rules of PROTOCOL section 7. Its events wait where they are, in the log.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from math import inf
from typing import TYPE_CHECKING, Any

import structlog
import trio

from gateway.errors import ConnectionLost, FrameError, HandshakeRefused, StoreError
from gateway.protocol import codec, dialects, handshake
from gateway.protocol.log import Chunk, CursorExpired
from gateway.protocol.messages import (
    Abort,
    Answer,
    ClientFrame,
    ClientSignal,
    Error,
    Event,
    Health,
    Hello,
    HelloOk,
    Leave,
    Left,
    Member,
    Message,
    Ping,
    Pong,
    Refresh,
    Refreshed,
    Resync,
    ResyncReason,
    ServerFrame,
    ServerPing,
    ServerPong,
)
from gateway.protocol.states import Do, On, State, step
from gateway.server.auth import Identity, origin_allowed, unauthorized
from gateway.session import Session
from gateway.session.registry import unavailable
from gateway.transport.frames import text_frames
from gateway.transport.upgrade import UpgradeRequest
from gateway.transport.websocket import Phase, ServerWebSocket

if TYPE_CHECKING:
    from gateway.server.gateway import Gateway

FLUSH_BYTES = 64 * 1024
"""Events written to one connection in one pass: a long replay takes turns with everyone else's live events."""

BEHIND_FRAMES = 32
"""Unsent replies from which on they are written at once, without waiting for the flusher. If the socket does not take
them the client counts as behind, and droppable frames are dropped."""

YIELD_EVERY = 32
"""Frames of one message handled between two checkpoints: an array of 1 MiB can hold half a million."""

MAX_ID = 128
"""Characters of a turn's or ask's id in a client's frame. Ours are shorter; errors repeat them."""

EVENT_OVERHEAD = 1024
"""Bytes that an event may need besides what a client sent: its numbers, names and ids of ours."""

MEMBER_BYTES = 128
"""What a member takes in `presence` besides its subject."""

_log = structlog.get_logger(__name__)


class Connection:
    """Serves one WebSocket. `run` is its whole life; it belongs to the task that accepted the socket."""

    def __init__(self, gateway: Gateway, ws: ServerWebSocket, *, on_joined: Callable[[], None] = lambda: None) -> None:
        self._gateway = gateway
        self._on_joined = on_joined
        self._limits = gateway.config.limits
        self._ws = ws
        self._state = State.HANDSHAKE
        self._session: Session | None = None
        self._identity: Identity | None = None
        self._speak(dialects.NATIVE)
        self._control: list[bytes] = []
        self._control_bytes = 0
        # One frame each for hello_ok and snapshot, and replies up to what a client may be behind.
        self._max_control_bytes = 2 * self._limits.max_frame_bytes + self._limits.max_buffered_bytes
        self._resync: ResyncReason | None = None
        self._most = 0
        """Bytes that any part of the message at hand may have as JSON at most: written anew it grows sixfold."""
        self._protocol_errors = 0
        self._refreshing = False
        self._fetching = False
        self._page: tuple[int, list[Event]] | None = None
        """Fetched events, and the cursor that they follow."""
        self._baseline = 0
        """The log's head at the last join or snapshot: what it held then is no fault of a slow client."""
        self.cursor = 0
        self.dirty = 0
        self.visited_at = 0.0
        self.told_no_credit = False
        self.member = Member(connection_id="", subject="", joined_at=0)
        self.heard_at = self.sent_at = trio.current_time()
        ws.on_unblocked = self._unblocked
        ws.on_late = self._handle_late

    def _speak(self, dialect: dialects.Dialect) -> None:
        """Read and write as `dialect` says; what is used for every event is looked up here, once."""
        self._dialect = dialect
        self._decode = dialect.decode
        self._encode = dialect.encode
        self._read = dialect.read

    # life

    async def run(self) -> None:
        """Handshake, then read until the end; the session is left whatever the reason. Cancelling closes hard."""
        ws = self._ws
        self._gateway.opened(self)
        try:
            # The time for the upgrade and the hello together.
            with ws.reading(ws.connected_at + self._limits.handshake_timeout_ms / 1000) as scope:
                await self._admit(await self._read_hello())
                scope.deadline = inf
                while True:
                    batch = await ws.get_many()
                    self.heard_at = trio.current_time()
                    for raw in batch:
                        await self._handle(raw)
            if self._session is None and trio.current_time() >= scope.deadline:
                self.close(4408, "handshake_timeout")
        except ConnectionLost:
            if ws.phase is Phase.OPEN:  # the peer ended it, and still gets the replies to what it sent before
                self._write_control()
        except HandshakeRefused as refused:
            self._end_with(handshake.hello_error(refused), refused.close_code, refused.close_reason)
        except Exception as exc:
            # A bug of ours or of an authenticator's: this connection ends with 1011, the others do not notice.
            self.crashed(exc)
        finally:
            self._detach()

    def crashed(self, exc: Exception) -> None:
        """Something failed that must not: log it and close this connection alone."""
        self._gateway.crashed_connections += 1
        _log.error("connection_failed", peer=self._ws.peer, exc_info=exc)
        if self._state is State.HANDSHAKE:
            refused = HandshakeRefused(
                "internal",
                "the gateway failed while it handled this hello",
                close_code=1011,
                close_reason="internal",
                next_step="Try again later.",
                retryable=True,
                retry_after_ms=1_000,
            )
            self._end_with(handshake.hello_error(refused), refused.close_code, refused.close_reason)
        else:
            self.close(1011, "internal")

    def _detach(self) -> None:
        # Synchronous, so it happens even when the connection is cancelled.
        ws = self._ws
        self._state, _ = step(self._state, On.LOST)
        self._control = []
        if self._session is not None:
            self._session.detach(self, ws.close_code or 1006, ws.close_reason)
        self._gateway.ended(self)

    def close(self, code: int, reason: str) -> None:
        """End the connection: no frame is taken or delivered from now on. Never waits."""
        self._state, do = step(self._state, On.CLOSE)
        if do is Do.CLOSE:
            self._ws.close_nowait(code, reason)

    def _end_with(self, frame: ServerFrame, code: int, reason: str) -> None:
        """Send a last frame behind everything unsent, then close."""
        self._write_last(frame)
        self.close(code, reason)

    def _write_last(self, frame: ServerFrame) -> None:
        """Write a frame at once, whatever the connection's state, behind everything unsent."""
        data = self._encode(frame)
        if data is not None and self._ws.phase is Phase.OPEN:
            self._control.append(data)
            self._write_control()

    def session_failed(self) -> None:
        """The session ended by an error of its own. What it said before, say that it takes no input, goes out first."""
        if self._ws.phase is Phase.OPEN:
            self._write_control()
        self.close(1011, "internal")

    # joining

    async def _read_hello(self) -> Hello:
        ws = self._ws
        while True:
            (first,) = await ws.get_many()
            self.heard_at = trio.current_time()
            self._speak(dialects.choose(first))
            try:
                return self._dialect.read_hello(first)
            except FrameError as wrong:
                self._protocol_errors += 1
                if self._protocol_errors > self._limits.max_protocol_errors:
                    raise handshake.invalid_hello(wrong.message) from None
                self._write_last(Error(code=wrong.code, message=wrong.message))

    async def _admit(self, hello: Hello) -> None:
        gateway, ws = self._gateway, self._ws
        request = ws.request
        assert request is not None
        origin, host = request.header(b"origin"), request.header(b"host")
        if not origin_allowed(origin, host, gateway.config.server.allowed_origins):
            raise HandshakeRefused(
                "origin_not_allowed",
                "pages of this origin may not connect",
                close_code=4403,
                next_step="Add the page's origin to server.allowed_origins.",
            )
        gateway.check_admission()
        identity = await gateway.authenticate(self._token(hello, request))
        if identity.expired(gateway.sources.now_ms()):
            raise unauthorized("the token has expired", close_reason="token_expired")
        session, existed = await gateway.registry.join(hello, identity.subject)
        with session.kept():
            older = await self._older_for(hello, session, existed)
            # No await from here on: position and log must agree.
            self._enter(hello, identity, session, existed, older)

    async def _older_for(self, hello: Hello, session: Session, existed: bool) -> list[Event]:
        """What a snapshot in the answer to `hello` needs of what is not in memory, if there will be one."""
        if self._position(hello, session, existed).resync is None:
            return []
        try:
            return await session.older.for_snapshot()
        except StoreError as exc:
            raise unavailable(str(exc)) from None

    def _position(self, hello: Hello, session: Session, existed: bool) -> handshake.Position:
        log = session.log
        return handshake.position_for(
            hello, existed=existed, epoch=session.record.epoch, floor=log.floor, head=log.head
        )

    def _enter(self, hello: Hello, identity: Identity, session: Session, existed: bool, older: list[Event]) -> None:
        """Attach to the session and answer the `hello`, in one step."""
        gateway, ws = self._gateway, self._ws
        gateway.check_admission()
        if session.failed:
            raise unavailable("the session has failed")
        if len(session.readers) >= self._limits.max_connections_per_session:
            raise HandshakeRefused(
                "too_many_connections",
                f"{len(session.readers):,} connections are joined to this session",
                close_code=4429,
                next_step="Close some of them.",
                retryable=True,
                retry_after_ms=5_000,
            )
        self._identity = identity
        self.member = Member(
            connection_id=f"c_{gateway.sources.new_id()}",
            subject=identity.subject,
            joined_at=gateway.sources.now_ms(),
        )
        self._state, _ = step(self._state, On.HELLO)
        log = session.log
        position = self._position(hello, session, existed)
        session.attach(self)
        self._session = session
        self._dialect.attach(log, session.view.asks)
        gateway.joined[self] = None
        self._on_joined()
        ws.release(self._limits.max_payload)
        self.cursor = position.cursor
        self._baseline = log.head
        credit = session.credit
        self.told_no_credit = credit == 0
        self._push(
            HelloOk(
                protocol=self._dialect.version,
                server=gateway.server_info,
                connection_id=self.member.connection_id,
                session_id=session.record.session_id,
                agent_id=session.record.agent_id,
                epoch=session.record.epoch,
                resumed=existed,
                cursor=position.cursor,
                head=log.head,
                oldest_cursor=log.floor,
                resync_required=position.resync is not None,
                resync_reason=position.resync,
                credit=credit,
                policy=gateway.policy,
                features=handshake.FEATURES,
                presence=self._presence(session),
                health=Health(status="draining" if gateway.draining else "ok", draining=gateway.draining),
                last_disconnect=session.last_disconnect.get(identity.subject),
            )
        )
        if position.resync is not None:
            for data in self._dialect.snapshot(session.snapshot(position.resync, older)):
                self._push_bytes(data)

    def _presence(self, session: Session) -> list[Member]:
        """Who is joined: of the others as many as surely fit into half a frame, the longest joined first, and ours."""
        room = self._limits.max_frame_bytes // 2
        members: list[Member] = []
        for reader in session.readers.values():
            room -= MEMBER_BYTES + 6 * len(reader.member.subject)  # JSON may need six bytes for a character
            if room < 0:
                break
            if reader is not self:
                members.append(reader.member)
        return [*members, self.member]

    def _token(self, hello: Hello, request: UpgradeRequest) -> str | None:
        return self._dialect.find_token(_given_token(hello, request), request.query)

    # reading

    async def _handle(self, raw: bytes) -> None:
        """Handle one text message: a frame, or an array of them."""
        self._most = 6 * len(raw)
        for number, frame in enumerate(self._decode(raw), 1):
            if self._state is not State.JOINED:
                if not self._abort_late(frame):
                    return
            elif isinstance(frame, FrameError):
                self._protocol_error(frame.code, frame.message, frame.request_id)
            else:
                self._state, do = step(self._state, On.HELLO if type(frame) is Hello else On.FRAME)
                if do is Do.ALREADY_JOINED:
                    self._protocol_error("already_joined", "this connection has joined a session; open another one")
                else:
                    _HANDLERS[type(frame)](self, frame)
            if number % YIELD_EVERY == 0:
                await trio.lowlevel.checkpoint()

    def _handle_late(self, raw: bytes) -> None:
        for frame in self._decode(raw):
            if not self._abort_late(frame):
                return

    def _abort_late(self, frame: ClientFrame | FrameError) -> bool:
        """A client that is closed because it does not read may still abort: reading never stops for its unread replies
        (PROTOCOL section 5). False if nothing more may be taken from it."""
        if self._session is None or not self._ws.closed_by_us or self._ws.close_code != 1013:
            return False
        if type(frame) is Abort:
            self._abort(frame)
        return True

    def _protocol_error(self, code: str, message: str, request_id: str | None = None) -> None:
        self._protocol_errors += 1
        error = Error(code=code, message=message, request_id=request_id)
        if self._protocol_errors > self._limits.max_protocol_errors:
            self._end_with(error, 1008, "protocol_violation")
        else:
            self._push(error)

    def _message(self, frame: Message) -> None:
        assert self._session is not None
        size = self._too_large(frame.request_id, frame.content, frame.metadata, self.member.subject)
        if size:
            message = f"field 'content': {size:,} bytes with metadata do not fit into an event"
            self._protocol_error("invalid_frame", message, frame.request_id)
        else:
            self._session.submit(frame, self)

    def _abort(self, frame: Abort) -> None:
        assert self._session is not None
        if self._ids_fit(turn_id=frame.turn_id, request_id=frame.request_id):
            self._session.abort(frame, self)

    def _answer(self, frame: Answer) -> None:
        assert self._session is not None
        size = self._too_large(frame.value)
        if size:
            self._protocol_error("invalid_frame", f"field 'value': {size:,} bytes do not fit into an event")
        elif self._ids_fit(ask_id=frame.ask_id):
            self._session.answer(frame, self)

    def _too_large(self, *parts: Any) -> int:
        """0 if `parts` fit into an event, else their size as JSON."""
        if self._most <= self._limits.max_frame_bytes - EVENT_OVERHEAD:
            return 0
        size = len(codec.check_json(parts))
        return size if size > self._limits.max_frame_bytes - EVENT_OVERHEAD else 0

    def _ids_fit(self, **ids: str | None) -> bool:
        for name, value in ids.items():
            if value is not None and len(value) > MAX_ID:
                message = f"field {name!r}: expected at most {MAX_ID} characters, got {len(value):,}"
                self._protocol_error("invalid_frame", message)
                return False
        return True

    def _signal(self, frame: ClientSignal) -> None:
        assert self._session is not None
        size = len(codec.check_json([frame.name, frame.data]))
        if size > self._limits.max_signal_bytes:
            message = f"field 'data': expected at most {self._limits.max_signal_bytes:,} bytes, got {size:,}"
            self._protocol_error("invalid_frame", message)
            return
        self._session.signal(frame, self)

    def _request_resync(self, frame: Resync) -> None:
        # Taken when it is written, so that asking often costs one: at most one snapshot waits per connection.
        self._resync = "requested"
        self.wake()

    def _refresh(self, frame: Refresh) -> None:
        if self._refreshing:
            self._push(Error(code="rate_limited", message="a refresh is under way", retryable=True))
            return
        self._refreshing = True
        # Owned by the gateway's nursery; ends with the authenticator's answer. The reader does not wait for it.
        self._gateway.spawn(self._finish_refresh, frame.token)

    async def _finish_refresh(self, token: str) -> None:
        try:
            self._push(await self._judge_refresh(token))
        finally:
            self._refreshing = False

    async def _judge_refresh(self, token: str) -> Refreshed | Error:
        """The answer to a `refresh`; adopts the new identity if it is good. Bounded in time."""
        identity: Identity | None = None
        try:
            with trio.move_on_after(self._limits.handshake_timeout_ms / 1000):
                identity = await self._gateway.authenticate(token)
        except HandshakeRefused as refused:
            return Error(code="token_rejected", message=refused.message)
        except Exception as exc:
            _log.error("authenticator_failed", peer=self._ws.peer, exc_info=exc)
        if identity is None:
            return Error(code="unavailable", message="the token cannot be checked now; try again", retryable=True)
        old = self._identity
        assert old is not None
        if identity.subject != old.subject:
            return Error(code="token_rejected", message="field 'token': belongs to another subject")
        # The same token again is no error: a client may not have seen the first answer.
        sooner = identity.expires_at is not None and (old.expires_at is None or identity.expires_at < old.expires_at)
        if sooner or identity.expired(self._gateway.sources.now_ms()):
            return Error(code="token_rejected", message="field 'token': expires before the present one")
        self._identity = identity
        return Refreshed(expires_at=identity.expires_at)

    def _leave(self, frame: Leave) -> None:
        self._end_with(Left(), 1000, "left")

    def _ping(self, frame: Ping) -> None:
        if self._most > self._limits.max_signal_bytes and (
            (size := len(codec.check_json(frame.nonce))) > self._limits.max_signal_bytes
        ):
            message = f"field 'nonce': expected at most {self._limits.max_signal_bytes:,} bytes, got {size:,}"
            self._protocol_error("invalid_frame", message)
        else:
            self._push(ServerPong(nonce=frame.nonce))

    def _pong(self, frame: Pong) -> None:
        pass  # that it came is what counts, and that was noted

    # writing

    def wake(self) -> None:
        """Have the flusher come by."""
        self._gateway.flusher.mark(self)

    def _unblocked(self) -> None:
        self._gateway.blocked.pop(self, None)
        self.wake()

    def push(self, frame: ServerFrame) -> None:
        """Send a frame without a number (see `session.Reader.push`)."""
        if frame.droppable and self._behind:
            self._gateway.dropped_frames += 1
        else:
            self._push(frame)

    @property
    def _behind(self) -> bool:
        """Whether the client does not keep up: its socket takes no more, as far as anyone has tried."""
        if len(self._control) >= BEHIND_FRAMES and not self._ws.blocked:
            self._write_control()
        return self._ws.blocked

    def _push(self, frame: ServerFrame) -> None:
        data = self._encode(frame)
        if data is not None:
            self._push_bytes(data)

    def _push_bytes(self, data: bytes) -> None:
        if self._ws.phase is not Phase.OPEN or self._state is not State.JOINED:
            return
        self._control.append(data)
        self._control_bytes += len(data)
        if self._behind and (
            len(self._control) > self._limits.max_control_frames or self._control_bytes > self._max_control_bytes
        ):
            self._control = []
            self._control_bytes = 0
            self.close(1013, "overloaded")
        else:
            self._gateway.flusher.mark(self, urgent=True)

    def _write_control(self) -> None:
        """Write the frames without a number, as far as the kernel takes them. Order is kept: they go before events."""
        control, self._control, self._control_bytes = self._control, [], 0
        self._ws.send_nowait(control)
        self._written()

    def _written(self) -> None:
        self.sent_at = trio.current_time()
        if self._ws.blocked:
            self._gateway.blocked[self] = None

    def flush(self) -> None:
        """Write what the client has yet to get, as far as the kernel takes it. Called by the flusher alone."""
        ws, session = self._ws, self._session
        if self._gateway.draining:
            self._gateway.progress.unpark_all()
        if ws.phase is not Phase.OPEN or self._state is not State.JOINED or session is None:
            return
        if ws.blocked:
            # By a write of ours, or by a reply to a WebSocket ping: either way the watch has to look.
            self._gateway.blocked[self] = None
            return
        frames = b""
        if self._control:
            frames = text_frames(self._control)
            self._control = []
            self._control_bytes = 0
        log = session.log
        chunk = None
        if self._resync is not None or self.cursor < log.tail:
            chunk = self._fetched(session)
        elif self.cursor < log.head:
            chunk = self._read(log, self.cursor, FLUSH_BYTES)
        if chunk is not None:
            events = self._gateway.flusher.frames(chunk)
            frames = frames + events if frames else events
            # Invariant: the cursor only moves forward, and only past what is in the connection's FIFO or socket.
            assert chunk.cursor > self.cursor or not chunk.payloads
            self.cursor = chunk.cursor
        if frames:
            ws.send_frames_nowait(frames)
            self._written()
            if not ws.blocked and self.cursor < log.head and not self._fetching:
                self.wake()

    # what is not in memory

    def _fetched(self, session: Session) -> Chunk | None:
        """The page behind the cursor, if it has been fetched; otherwise it, or a snapshot, will be."""
        page, self._page = self._page, None
        if page is not None and self._resync is None and page[0] == self.cursor:
            with suppress(CursorExpired):  # meanwhile; a snapshot is next then
                return self._read(session.log.page(*page), self.cursor, FLUSH_BYTES)
            self._resync = "cursor_expired"
        if not self._fetching:
            self._fetching = True
            # Owned by the gateway's nursery; ends with the store's answer.
            self._gateway.spawn(self._fetch, session)
        return None

    async def _fetch(self, session: Session) -> None:
        log = session.log
        try:
            if self._resync is not None or self.cursor < log.floor:
                older = await session.older.for_snapshot()
                # No await from here on: the snapshot's position is where the stream goes on.
                reason = self._resync or "cursor_expired"
                self._resync = None
                for data in self._dialect.snapshot(session.snapshot(reason, older)):
                    self._push_bytes(data)
                self.cursor = self._baseline = log.head
            else:
                cursor = self.cursor
                self._page = cursor, await session.older.read(cursor, log.page_end(cursor, FLUSH_BYTES))
        except StoreError as exc:
            # What the client has stays true, and it continues from there when it comes back.
            _log.error("history_not_read", session_id=session.record.session_id, error=str(exc))
            self.close(1011, "internal")
        except Exception as exc:
            self.crashed(exc)
        finally:
            self._fetching = False
            self.wake()

    # the watch

    def check_blocked(self, now: float) -> None:
        """Close a client that does not read, by the rules of PROTOCOL section 7."""
        ws, limits = self._ws, self._limits
        if not ws.blocked or self._session is None:
            self._gateway.blocked.pop(self, None)
            return
        if now - ws.progress_at >= limits.send_timeout_ms / 1000:
            self.close(1013, "slow_consumer")
        elif now - ws.blocked_since >= limits.slow_grace_ms / 1000:
            enough = limits.max_buffered_bytes
            left = self._session.log.backlog(max(self.cursor, self._baseline), enough)
            if left + self._control_bytes > enough:
                self.close(1013, "slow_consumer")

    def check_alive(self, now: float, now_ms: int) -> None:
        """Ping after silence of ours, close after twice as much of theirs or when the token has expired."""
        silence = self._limits.heartbeat_ms / 1000
        if now - self.heard_at >= 2 * silence:
            self.close(4408, "heartbeat_timeout")
        elif self._identity is not None and self._identity.expired(now_ms):
            self.close(4401, "token_expired")
        elif now - self.sent_at >= silence and not self._ws.blocked:
            self.sent_at = now
            self._push(ServerPing())

    @property
    def settled(self) -> bool:
        """Whether everything for this client has been handed to the kernel, replies on their way included."""
        session = self._session
        if self._ws.phase is not Phase.OPEN or session is None:
            return True
        behind = self.cursor < session.log.head or not session.publisher.idle
        return not self._control and not self._ws.blocked and not behind


def _given_token(hello: Hello, request: UpgradeRequest) -> str | None:
    if hello.token is not None:
        return hello.token
    authorization = request.header(b"authorization")
    if authorization is not None and authorization[:7].lower() == "bearer ":
        return authorization[7:].strip()
    for offered in request.subprotocols:
        if offered.startswith("bearer."):
            return offered[7:]
    return None


_HANDLERS: dict[type[ClientFrame], Callable[[Connection, Any], None]] = {
    Message: Connection._message,
    Abort: Connection._abort,
    Answer: Connection._answer,
    ClientSignal: Connection._signal,
    Resync: Connection._request_resync,
    Refresh: Connection._refresh,
    Leave: Connection._leave,
    Ping: Connection._ping,
    Pong: Connection._pong,
}
