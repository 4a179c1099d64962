"""One joined (or joining) connection: a cursor into its session's log, a reader, and a few unsent frames.

Theory of operation
-------------------
Reading: one task waits for text messages and handles each inline. No handler waits for anything, so an abort never
stands behind a turn, an inbox or a slow socket (DESIGN property 7).

Writing: there is no queue of events. `cursor` says what the client has; `flush`, called by the flusher, takes what
follows it in the log. Frames without a number wait in `_control`, bounded in count, and go before events.

    snapshot: the cursor moves to the log's head in the step that encodes it, so nothing is lost or repeated at the seam

A client that does not read: the socket is `blocked`, nothing is read from the log for it any more, and the watch
closes it by the rules of PROTOCOL section 7. Its events wait where they are, in the log.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import structlog
import trio

from gateway.errors import ConnectionLost, FrameError, HandshakeRefused
from gateway.protocol import codec, handshake
from gateway.protocol.messages import (
    Abort,
    Answer,
    ClientFrame,
    ClientSignal,
    Error,
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
from gateway.server.auth import Identity, origin_allowed
from gateway.session import Session
from gateway.transport.frames import text_frames
from gateway.transport.websocket import Phase, ServerWebSocket

if TYPE_CHECKING:
    from gateway.server.gateway import Gateway

FLUSH_BYTES = 64 * 1024
"""Events written to one connection in one pass: a long replay takes turns with everyone else's live events."""

BEHIND_FRAMES = 32
"""Unsent replies from which on a client counts as behind, and droppable frames are dropped."""

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
        self._control: list[bytes] = []
        self._resync: ResyncReason | None = None
        self._batch = False
        self._protocol_errors = 0
        self._refreshing = False
        self._baseline = 0
        """The log's head at the last join or snapshot: what it held then is no fault of a slow client."""
        self.cursor = 0
        self.dirty = False
        self.told_no_credit = False
        self.member = Member(connection_id="", subject="", joined_at=0)
        self.heard_at = self.sent_at = trio.current_time()
        ws.on_unblocked = self.wake

    # life

    async def run(self) -> None:
        """Handshake, then read until the end; the session is left whatever the reason. Cancelling closes hard."""
        ws = self._ws
        try:
            rest = await self._join()
            self._handle_all(rest)
            while True:
                batch = await ws.get_many()
                self.heard_at = trio.current_time()
                self._handle_all(batch)
        except ConnectionLost:
            pass
        except HandshakeRefused as refused:
            self._end_with(handshake.hello_error(refused), refused.close_code, refused.close_reason)
        finally:
            self._detach()

    def _detach(self) -> None:
        # Synchronous, so it happens even when the connection is cancelled.
        ws = self._ws
        self._state, _ = step(self._state, On.LOST)
        if self._session is not None:
            self._session.detach(self, ws.close_code or 1006, ws.close_reason)
            self._gateway.joined.discard(self)
            self._gateway.progress.unpark_all()
        self._gateway.blocked.discard(self)

    def close(self, code: int, reason: str) -> None:
        """End the connection: no frame is taken or delivered from now on. Never waits."""
        self._state, do = step(self._state, On.CLOSE)
        if do is Do.CLOSE:
            self._gateway.count_close(code, reason)
            self._ws.close_nowait(code, reason)

    def _end_with(self, frame: ServerFrame, code: int, reason: str) -> None:
        """Send a last frame behind everything unsent, then close."""
        if self._ws.phase is Phase.OPEN:
            self._control.append(codec.encode_frame(frame))
            self._ws.send_nowait(self._control)
            self._control = []
        self.close(code, reason)

    def session_failed(self) -> None:
        """The session ended by an error of its own."""
        self.close(1011, "internal")

    # joining

    async def _join(self) -> list[bytes]:
        """Take the first frame and attach to a session; returns what came right behind it."""
        ws, limits = self._ws, self._limits
        ws.max_message_bytes = limits.max_handshake_bytes
        with trio.move_on_after(limits.handshake_timeout_ms / 1000):
            first, *rest = await ws.get_many()
            hello = handshake.read_hello(first)
            version = handshake.negotiate(hello)
            await self._admit(hello, version)
            return rest
        if self._session is None:
            self.close(4408, "handshake_timeout")
        raise ConnectionLost(4408, "handshake_timeout")

    async def _admit(self, hello: Hello, version: int) -> None:
        gateway, ws = self._gateway, self._ws
        if not origin_allowed(ws.header(b"origin"), ws.host, gateway.config.server.allowed_origins):
            raise HandshakeRefused(
                "origin_not_allowed",
                "pages of this origin may not connect",
                close_code=4403,
                next_step="Add the page's origin to server.allowed_origins.",
            )
        if gateway.draining:
            raise gateway.refuse_draining()
        if len(gateway.joined) >= self._limits.max_connections:
            raise HandshakeRefused(
                "too_many_connections",
                f"{self._limits.max_connections:,} connections are open (limits.max_connections)",
                close_code=4429,
                next_step="Try again later.",
                retryable=True,
                retry_after_ms=5_000,
            )
        identity = await gateway.authenticate(self._token(hello))
        session, existed = await gateway.registry.join(hello, identity.subject)
        # No await from here on: the session may not be put to rest, and position and log must agree.
        if gateway.draining:
            raise gateway.refuse_draining()
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
        self._batch = "batch" in hello.capabilities
        self._state, _ = step(self._state, On.HELLO)
        log = session.log
        position = handshake.position_for(
            hello, existed=existed, epoch=session.record.epoch, floor=log.floor, head=log.head
        )
        session.attach(self)
        self._session = session
        gateway.joined.add(self)
        self._on_joined()
        ws.max_message_bytes = self._limits.max_payload
        self.cursor = position.cursor
        self._baseline = log.head
        credit = session.credit
        self.told_no_credit = credit == 0
        self._push(
            HelloOk(
                protocol=version,
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
                presence=[reader.member for reader in session.readers.values()],
                health=Health(status="draining" if gateway.draining else "ok", draining=gateway.draining),
                last_disconnect=session.last_disconnect.get(identity.subject),
            )
        )
        if position.resync is not None:
            self._push_bytes(session.snapshot(position.resync))

    def _token(self, hello: Hello) -> str | None:
        if hello.token is not None:
            return hello.token
        authorization = self._ws.header(b"authorization")
        if authorization is not None and authorization[:7].lower() == "bearer ":
            return authorization[7:].strip()
        for offered in self._ws.subprotocols:
            if offered.startswith("bearer."):
                return offered[7:]
        return None

    # reading

    def _handle_all(self, batch: list[bytes]) -> None:
        for raw in batch:
            for frame in codec.decode_client(raw):
                if self._state is not State.JOINED:
                    return
                if isinstance(frame, FrameError):
                    self._protocol_error(frame.code, frame.message, frame.request_id)
                    continue
                self._state, do = step(self._state, On.HELLO if type(frame) is Hello else On.FRAME)
                if do is Do.ALREADY_JOINED:
                    self._protocol_error("already_joined", "this connection has joined a session; open another one")
                else:
                    _HANDLERS[type(frame)](self, frame)

    def _protocol_error(self, code: str, message: str, request_id: str | None = None) -> None:
        self._protocol_errors += 1
        error = Error(code=code, message=message, request_id=request_id)
        if self._protocol_errors > self._limits.max_protocol_errors:
            self._end_with(error, 1008, "protocol_violation")
        else:
            self._push(error)

    def _message(self, frame: Message) -> None:
        assert self._session is not None
        if len(frame.content) * 6 > self._limits.max_frame_bytes - 4096:
            # Only then can the event be too large for a frame; only then is it worth measuring.
            size = len(codec.check_json([frame.content, frame.metadata]))
            if size > self._limits.max_frame_bytes - 1024:
                message = f"field 'content': {size:,} bytes with metadata do not fit into an event"
                self._protocol_error("invalid_frame", message, frame.request_id)
                return
        self._session.submit(frame, self)

    def _abort(self, frame: Abort) -> None:
        assert self._session is not None
        self._session.abort(frame, self)

    def _answer(self, frame: Answer) -> None:
        assert self._session is not None
        self._session.answer(frame, self)

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
            identity = await self._gateway.authenticate(token)
        except HandshakeRefused as refused:
            self._push(Error(code="token_rejected", message=refused.message))
            return
        finally:
            self._refreshing = False
        old = self._identity
        assert old is not None
        if identity.subject != old.subject:
            self._push(Error(code="token_rejected", message="field 'token': belongs to another subject"))
        elif old.expires_at is not None and identity.expires_at is not None and identity.expires_at < old.expires_at:
            self._push(Error(code="token_rejected", message="field 'token': expires before the present one"))
        else:
            self._identity = identity
            self._push(Refreshed(expires_at=identity.expires_at))

    def _leave(self, frame: Leave) -> None:
        self._end_with(Left(), 1000, "left")

    def _ping(self, frame: Ping) -> None:
        self._push(ServerPong(nonce=frame.nonce))

    def _pong(self, frame: Pong) -> None:
        pass  # that it came is what counts, and that was noted

    # writing

    def wake(self) -> None:
        """Have the flusher come by."""
        self._gateway.flusher.mark(self)

    def push(self, frame: ServerFrame) -> None:
        """Send a frame without a number (see `session.Reader.push`)."""
        if frame.droppable and (self._ws.blocked or len(self._control) >= BEHIND_FRAMES):
            self._gateway.dropped_frames += 1
            return
        self._push(frame)

    def _push(self, frame: ServerFrame) -> None:
        self._push_bytes(codec.encode_frame(frame))

    def _push_bytes(self, data: bytes) -> None:
        if self._ws.phase is not Phase.OPEN:
            return
        self._control.append(data)
        if len(self._control) > self._limits.max_control_frames:
            self._control.clear()
            self.close(1013, "overloaded")
            return
        self.wake()

    def flush(self) -> None:
        """Write what the client has yet to get, as far as the kernel takes it. Called by the flusher alone."""
        ws, session = self._ws, self._session
        if self._gateway.draining:
            self._gateway.progress.unpark_all()
        if ws.blocked or ws.phase is not Phase.OPEN:
            return
        frames = b""
        if self._control:
            frames = text_frames(self._control)
            self._control = []
        if session is not None:
            log = session.log
            if self._resync is not None or self.cursor < log.floor:
                reason = self._resync or "cursor_expired"
                self._resync = None
                frames += text_frames([session.snapshot(reason)])
                self.cursor = self._baseline = log.head
            elif self.cursor < log.head:
                chunk = log.read(self.cursor, FLUSH_BYTES)
                events = self._gateway.flusher.frames(chunk)
                frames = frames + events if frames else events
                # Invariant: the cursor only moves forward, and only past what is in the connection's FIFO or socket.
                assert chunk.cursor > self.cursor or not chunk.payloads
                self.cursor = chunk.cursor
        if frames:
            ws.send_frames_nowait(frames)
            self.sent_at = trio.current_time()
            if ws.blocked:
                self._gateway.blocked.add(self)
            elif session is not None and self.cursor < session.log.head:
                self.wake()

    # the watch

    def check_blocked(self, now: float) -> None:
        """Close a client that does not read, by the rules of PROTOCOL section 7."""
        ws, limits = self._ws, self._limits
        if not ws.blocked or self._session is None:
            self._gateway.blocked.discard(self)
            return
        if now - ws.progress_at >= limits.send_timeout_ms / 1000:
            self.close(1013, "slow_consumer")
        elif now - ws.blocked_since >= limits.slow_grace_ms / 1000:
            enough = limits.max_buffered_bytes
            left = self._session.log.backlog(max(self.cursor, self._baseline), enough)
            if left + sum(map(len, self._control)) > enough:
                self.close(1013, "slow_consumer")

    def check_alive(self, now: float, now_ms: int) -> None:
        """Ping after silence of ours, close after twice as much of theirs or when the token has expired."""
        silence = self._limits.heartbeat_ms / 1000
        if now - self.heard_at >= 2 * silence:
            self.close(4408, "heartbeat_timeout")
        elif self._identity is not None and (self._identity.expires_at or now_ms + 1) <= now_ms:
            self.close(4401, "token_expired")
        elif now - self.sent_at >= silence and not self._ws.blocked:
            self.sent_at = now
            self._push(ServerPing())

    @property
    def settled(self) -> bool:
        """Whether everything for this client has been handed to the kernel."""
        if self._ws.phase is not Phase.OPEN:
            return True
        behind = self._session is not None and self.cursor < self._session.log.head
        return not self._control and not self._ws.blocked and not behind


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
