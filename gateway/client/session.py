"""A session that outlives its connections: `open_session`, and the `Session` it gives.

One task owns the line (`Session._run`): it dials, joins, converses until the line ends, waits, and dials again. While
it converses, a reader and a writer run in a nursery of that conversation; what to read and write `ClientCore` says.
Every method of `Session` only changes the core, wakes these tasks, and waits for an event.
"""

from __future__ import annotations

import random
import ssl
import uuid
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from math import inf
from typing import Any

import trio

from gateway._version import __version__
from gateway.client.core import ClientCore
from gateway.client.feed import Feed
from gateway.client.seam import Connect, Socket, Token
from gateway.client.states import Connection, Effect, Joined, Noticed, Request, Retry, Settled, Statistics
from gateway.errors import ClientError, ConnectionLost, FrameError, SessionClosed, SessionRefused
from gateway.protocol import codec
from gateway.protocol.cursor import Backoff
from gateway.protocol.messages import (
    JSON,
    Abort,
    Aborted,
    AbortScope,
    Accepted,
    Answer,
    BusyMode,
    ClientInfo,
    ClientSignal,
    Event,
    HelloOk,
    Leave,
    Message,
    Ping,
    Presence,
    RequestId,
    Resync,
    Signal,
    Snapshot,
)
from gateway.protocol.view import SessionView
from gateway.transport.dial import UpgradeRefused, dial, parse_url
from gateway.transport.tasks import open_plain_nursery

REFUSAL_GRACE_S = 1.0
"""After a `hello_error`, for the close frame with its code; the refusal itself is already known."""

LEAVE_S = 3.0
"""For the gateway's `left`; after it the connection is closed without."""


@asynccontextmanager
async def open_session(
    url: str,
    agent_id: str,
    *,
    token: Token | None = None,
    session_id: str | None = None,
    since: int = 0,
    epoch: str | None = None,
    capabilities: Sequence[str] = ("batch",),
    client: tuple[str, str] = ("trio-gateway-python", __version__),
    headers: Sequence[tuple[str, str]] = (),
    ssl_context: ssl.SSLContext | None = None,
    connect: Connect = dial,
    connect_timeout: float = 10.0,
    handshake_timeout: float = 10.0,
    max_message_bytes: int = 64 * 1024 * 1024,
    buffer_events: int = 1024,
    buffer_bytes: int = 4 * 1024 * 1024,
    keep_turns: int = 32,
    backoff: Backoff | None = None,
    chance: Callable[[], float] = random.random,
) -> AsyncIterator[Session]:
    """Open a session with an agent and keep it over every break of the line.

    Entering returns at once, in state ``connecting``; `Session.wait_joined` waits for the gateway. Leaving closes the
    connection (the session lives on in the gateway) and is quick in every state: at most the 3 s that closing a socket
    may take. An exception of the block comes out as it is.

    To go on with a session in another process, keep `Session.session_id`, `Session.epoch` and `Session.cursor` after an
    event is handled, and give them here as `session_id`, `epoch`, `since`. What came before that cursor is then not
    known here, so `Session.view` and `Session.text_of` are incomplete until a `Session.resync`.

    Args:
        url: ``ws://`` or ``wss://``, with the gateway's path (``/ws``).
        token: a string, or an async function that returns one. The function is called before each connection; what
            it raises as `OSError` is tried again, anything else ends the session.
        client: name and version, told to the gateway.
        connect: opens one connection: `dial` or something like it; `over` makes one of streams (a network in memory).
        connect_timeout, handshake_timeout: seconds, for the WebSocket and then for the gateway's `hello_ok`.
        max_message_bytes: the largest message taken; the default is the most a gateway can be configured to send.
        buffer_events, buffer_bytes: what waits for you to take it. When it is full, reading stops; a gateway that then
            closes us as a slow consumer is resumed from when there is room.
        keep_turns: how many of the newest turns `Session.text_of` knows.
        backoff, chance: how long to wait before connecting again; `chance` gives numbers in 0..1.

    Raises:
        ConfigError: `url` is not a WebSocket URL.
    """
    parse_url(url)
    core = ClientCore(
        agent_id,
        session_id=session_id,
        since=since,
        epoch=epoch,
        capabilities=tuple(capabilities),
        client=ClientInfo(name=client[0], version=client[1]),
        buffer_events=buffer_events,
        buffer_bytes=buffer_bytes,
        keep_turns=keep_turns,
        can_refresh=callable(token),
        backoff=backoff,
    )

    def opener() -> AbstractAsyncContextManager[Socket]:
        return connect(
            url,
            headers=headers,
            subprotocols=(),
            max_message_bytes=max_message_bytes,
            connect_timeout=connect_timeout,
            ssl_context=ssl_context,
        )

    session = Session(core, opener, token, handshake_timeout, chance)
    async with open_plain_nursery() as nursery:
        # Owns the line; ends with this block, or before it when the session is over.
        nursery.start_soon(session._run)
        try:
            yield session
        finally:
            session._finish(SessionClosed("the block of open_session was left"))


class Session:
    """A session with an agent, from `open_session`. Usable by many tasks; events go to one of them.

    Every waiting method raises `SessionRefused` when the gateway says no for good (PROTOCOL section 9), and
    `SessionClosed` when the session was left. A broken line is not an error: what waits goes on waiting while the
    session connects again, unless a method says otherwise.
    """

    def __init__(
        self,
        core: ClientCore,
        opener: Callable[[], AbstractAsyncContextManager[Socket]],
        token: Token | None,
        handshake_timeout: float,
        chance: Callable[[], float],
    ) -> None:
        self._core = core
        self._opener = opener
        self._token = token
        self._handshake_timeout = handshake_timeout
        self._chance = chance
        self._connection = Connection(phase="connecting", attempt=1)
        self._end: ClientError | None = None
        # Replaced, never cleared: `_work` wakes the tasks that own the line, `_news` those that use the session.
        self._work = trio.Event()
        self._news = trio.Event()
        self._scope = trio.CancelScope()
        self._waiters: dict[Request, trio.Event] = {}
        self._states: weakref.WeakSet[Feed[Connection]] = weakref.WeakSet()
        self._notices: weakref.WeakSet[Feed[Signal | Presence]] = weakref.WeakSet()

    # --- what it knows ---

    @property
    def agent_id(self) -> str:
        return self._core.agent_id

    @property
    def session_id(self) -> str | None:
        """None until the gateway has made one: see `wait_joined`."""
        return self._core.session_id

    @property
    def cursor(self) -> int:
        """The ``seq`` of the last event that iteration gave you; with `epoch`, where another process would go on."""
        return self._core.cursor

    @property
    def epoch(self) -> str | None:
        """The history that `cursor` belongs to."""
        return self._core.epoch

    @property
    def view(self) -> SessionView:
        """State, queue, running turn and open asks as of `cursor`: as of the events you have taken. Read only."""
        return self._core.view

    @property
    def hello(self) -> HelloOk | None:
        """What the gateway said when it was last joined: its policy, features, who else is there."""
        return self._core.hello

    @property
    def connection(self) -> Connection:
        """The state of the line, now."""
        return self._connection

    def statistics(self) -> Statistics:
        """A snapshot of the counters."""
        return self._core.statistics()

    def text_of(self, turn_id: str, channel: str = "answer") -> str:
        """What a turn has said on a channel, as of `cursor`. Empty for a turn older than the last ``keep_turns``."""
        return self._core.text_of(turn_id, channel)

    # --- what happens ---

    def __aiter__(self) -> Session:
        return self

    async def __anext__(self) -> Event | Snapshot:
        """Wait for the next event: each exactly once, in order, over every reconnect.

        A `Snapshot` comes instead of events that the gateway no longer has (the session was away for long, its history
        began anew, or `resync` was called). It stands for everything before it: show its transcript, running turn and
        asks in place of what was shown. `view` and `text_of` have already adopted it.

        Take events steadily: what is not taken fills the buffer, then reading stops. Cancelling is safe: no event is
        lost. Iteration ends when the session was left, after what had arrived by then.

        Raises:
            SessionRefused: the gateway said no for good; what had arrived by then was given before.
        """
        await trio.lowlevel.checkpoint()
        while True:
            news = self._news
            paused = not self._core.wants_input
            item = self._core.take()
            if item is not None:
                if paused or self._core.wants_fresh_line:
                    self._wake_line()
                return item
            if isinstance(self._end, SessionRefused):
                raise self._error()
            if self._end is not None:
                raise StopAsyncIteration
            await news.wait()

    def connection_states(self) -> AsyncIterator[Connection]:
        """Iterate over the states of the line, beginning with the present one; the last is ``closed``.

        A reader that falls behind misses the oldest ones.
        """
        feed: Feed[Connection] = Feed(lambda: None if self._end else self._news)
        feed.items.append(self._connection)
        self._states.add(feed)
        return feed

    def notices(self) -> AsyncIterator[Signal | Presence]:
        """Iterate over signals of other connections, and over who joins and leaves. Ephemeral: some may be missing."""
        feed: Feed[Signal | Presence] = Feed(lambda: None if self._end else self._news)
        self._notices.add(feed)
        return feed

    async def wait_joined(self) -> HelloOk:
        """Wait until the line is up. Cancelling is safe."""
        await trio.lowlevel.checkpoint()
        while True:
            news = self._news
            if self._end is not None:
                raise self._error()
            if self._core.joined and self._core.hello is not None:
                return self._core.hello
            await news.wait()

    # --- what it does ---

    async def send(
        self,
        text: str,
        *,
        metadata: dict[str, JSON] | None = None,
        on_busy: BusyMode = "queue",
        request_id: str | None = None,
    ) -> Accepted:
        """Send a message; return when it is accepted. It is accepted exactly once, however often the line breaks.

        A full inbox, a drain or a store that cannot write now is waited out. Messages of several tasks go out in the
        order of their calls.

        Cancelling: not accepted if it was never written; otherwise it may or may not be. Sending the same text again
        with the same `request_id` finds out, and does not double it.

        Args:
            on_busy: what happens when a turn is running: ``queue``, ``interrupt``, ``steer``, ``collect``, ``reject``.
            request_id: 1 to 128 characters that name this message within the session; made up if not given.

        Raises:
            RequestRefused: not accepted, and trying again as it is would not help: ``busy`` (with ``reject``),
                ``request_id_conflict``, ``payload_too_large``, ``forbidden``, ...
        """
        accepted: Accepted = await self._perform(
            lambda: self._core.message(
                Message(
                    request_id=RequestId(request_id if request_id is not None else uuid.uuid4().hex),
                    content=text,
                    metadata=metadata or {},
                    on_busy=on_busy,
                )
            )
        )
        return accepted

    async def abort(
        self, *, scope: AbortScope = "turn", turn_id: str | None = None, request_id: str | None = None
    ) -> Aborted:
        """Stop the running turn; return when its end is in the log. Aborts go out one at a time.

        If the line breaks before the answer: an abort that names a turn or a queued input is repeated; any other is
        refused with ``connection_lost``, because repeated it could stop what came after. Cancelling does not take
        back what was written.

        Args:
            scope: ``turn``, ``queue`` (withdraw what waits), ``all``; unless one of these is given:
            turn_id: only this turn.
            request_id: withdraw this one queued input.

        Raises:
            RequestRefused: ``no_active_turn``, ``unknown_request``, ``connection_lost``.
        """
        frame = Abort(scope=scope, turn_id=turn_id, request_id=request_id)
        aborted: Aborted = await self._perform(lambda: self._core.control(frame))
        return aborted

    async def answer(self, ask_id: str, value: JSON) -> None:
        """Answer an open ask (`view` has them); return when the answer counts. Repeated if the line breaks.

        Args:
            value: ``True`` or ``False`` for an approval, one of the options for a choice, a string for an input.

        Raises:
            RequestRefused: ``unknown_ask`` (answered by someone else, or over), ``invalid_frame`` (not such a value).
        """
        await self._perform(lambda: self._core.control(Answer(ask_id=ask_id, value=value)))

    async def signal(self, name: str, data: JSON = None) -> bool:
        """Tell the session's other connections something ephemeral.

        Returns whether it was sent: without a line, or when it breaks at that moment, the signal is dropped.
        """
        if not self._core.joined:
            await trio.lowlevel.checkpoint()
            if self._end is not None:
                raise self._error()
            return False
        sent: bool = await self._perform(lambda: self._core.control(ClientSignal(name=name, data=data)))
        return sent

    async def resync(self) -> Snapshot:
        """Ask for a snapshot. Returns it; iteration gives it too, at its place among the events."""
        snapshot: Snapshot = await self._perform(lambda: self._core.control(Resync()))
        return snapshot

    async def leave(self) -> None:
        """Leave for good: tell the gateway if the line is up, then close. Afterwards every call raises `SessionClosed`.

        The session itself lives on in the gateway. Leaving twice is fine.
        """
        if self._end is None and self._core.joined:
            with trio.move_on_after(LEAVE_S), suppress(ClientError):
                await self._perform(lambda: self._core.control(Leave()))
        else:
            await trio.lowlevel.checkpoint()
        self._finish(SessionClosed("the session was left"))

    async def _perform(self, make: Callable[[], Request]) -> Any:
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._end is not None:
            raise self._error()
        request = make()
        done = self._waiters[request] = trio.Event()
        self._wake_line()
        try:
            await done.wait()
        finally:
            self._waiters.pop(request, None)
            self._core.forget(request)
        if request.error is not None:
            raise request.error
        return request.result

    # --- the line ---

    def _wake_line(self) -> None:
        self._work.set()
        self._work = trio.Event()

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()

    def _show(self, connection: Connection) -> None:
        if connection == self._connection:
            return
        self._connection = connection
        for feed in self._states:
            feed.items.append(connection)
        self._tell()

    def _error(self) -> ClientError:
        """How the session ended, as an exception of its own for each caller."""
        end = self._end
        assert end is not None
        if isinstance(end, SessionRefused):
            copy = SessionRefused(end.code, end.message, close_code=end.close_code, next_step=end.next_step)
            copy.__cause__ = end.__cause__
            return copy
        return SessionClosed(str(end))

    def _finish(self, end: ClientError) -> None:
        """The session is over: everyone who waits is told. No await here."""
        if self._end is not None:
            return
        self._end = end
        self._apply(self._core.fail_all(self._error))
        self._show(Connection(phase="closed", reason=str(end)))
        self._scope.cancel()

    def _apply(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Settled):
                waiter = self._waiters.pop(effect.request, None)
                if waiter is not None:
                    waiter.set()
            elif isinstance(effect, Joined):
                self._show(Connection(phase="joined", resumed=effect.hello.resumed))
            elif isinstance(effect, Noticed):
                for feed in self._notices:
                    feed.items.append(effect.notice)

    async def _run(self) -> None:
        """Keep the line up until the session is over."""
        core = self._core
        try:
            with self._scope:
                while self._end is None:
                    if not core.wants_input:
                        # No room for events, and nobody waits for an answer: a line would only be stalled.
                        self._show(Connection(phase="waiting", reason="events wait to be taken"))
                        while not core.wants_input:
                            await self._work.wait()
                    self._show(Connection(phase="connecting", attempt=core.attempt))
                    lost = await self._connect_once()
                    retry = None if lost is None else self._judge(lost)
                    self._apply(core.close())
                    if retry is not None:
                        self._show(
                            Connection(phase="waiting", seconds=retry.delay, reason=retry.reason, attempt=core.attempt)
                        )
                        await trio.sleep(retry.delay)
        finally:
            self._finish(SessionClosed("the session has ended"))

    def _judge(self, lost: ConnectionLost) -> Retry | None:
        """When to connect again; or None: the session is over, before its requests are told of a mere broken line."""
        status = lost.status if isinstance(lost, UpgradeRefused) else None
        verdict = self._core.judge(
            lost.code, lost.reason, now=trio.current_time(), chance=self._chance(), status=status
        )
        if isinstance(verdict, Retry):
            return verdict
        self._finish(verdict)
        return None

    async def _connect_once(self) -> ConnectionLost | None:
        """One connection from dialling to its end. Returns how it was lost, or None if we ended it."""
        try:
            token = self._token if self._token is None or isinstance(self._token, str) else await self._token()
        except (OSError, ConnectionLost) as exc:
            return ConnectionLost(1006, f"no token: {exc}")
        except Exception as exc:
            refused = SessionRefused("token_unavailable", f"getting a token failed: {exc!r}")
            refused.__cause__ = exc
            self._finish(refused)
            return None
        try:
            async with self._opener() as socket:
                lost = await self._use(socket, token)
                if lost is not None:
                    # Nobody is there to say goodbye to; a cancelled close drops the socket at once.
                    with trio.move_on_after(0):
                        await socket.aclose()
        except ConnectionLost as exc:
            lost = exc
        return lost

    async def _use(self, socket: Socket, token: str | None) -> ConnectionLost | None:
        core = self._core
        with trio.move_on_after(self._handshake_timeout):
            await socket.send(core.open(token))
            while not core.joined:
                with trio.move_on_after(REFUSAL_GRACE_S if core.refused else inf) as grace:
                    raw = await socket.receive()
                if grace.cancelled_caught:
                    return ConnectionLost(1006, "refused")
                lost = self._receive(raw)
                if lost is not None:
                    return lost
        if not core.joined:
            return ConnectionLost(1006, f"no hello_ok within {self._handshake_timeout:g} s")
        outcomes: list[ConnectionLost | None] = []

        async def half(converse: Callable[[Socket], Awaitable[ConnectionLost | None]]) -> None:
            try:
                outcomes.append(await converse(socket))
            except ConnectionLost as exc:
                outcomes.append(exc)
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            # Both end with this conversation: the first to end takes the other with it.
            nursery.start_soon(half, self._read)
            nursery.start_soon(half, self._write)
        return outcomes[0]

    def _receive(self, raw: bytes) -> ConnectionLost | None:
        try:
            self._apply(self._core.receive(raw, trio.current_time()))
        except FrameError as exc:
            return ConnectionLost(1006, f"the gateway sent something that is not of this protocol: {exc}")
        if self._core.left:
            self._finish(SessionClosed("the session was left"))
        self._tell()
        self._wake_line()
        return None

    def _heartbeat(self) -> float:
        assert self._core.hello is not None
        return max(0.02, self._core.hello.policy.heartbeat_ms / 1000)

    async def _read(self, socket: Socket) -> ConnectionLost | None:
        """Read while there is room. Silence counts only while we listen: what we do not read is not silence."""
        silence = 2 * self._heartbeat()
        while True:
            work = self._work
            if not self._core.wants_input:
                await work.wait()
                continue
            with trio.move_on_after(silence) as scope:
                raw = await socket.receive()
            if scope.cancelled_caught:
                return ConnectionLost(1006, f"no frame from the gateway for {silence:g} s")
            lost = self._receive(raw)
            if lost is not None:
                return lost

    async def _write(self, socket: Socket) -> ConnectionLost | None:
        """Write what the core has to say, and a ping after a heartbeat of our silence, even while we do not read."""
        heartbeat = self._heartbeat()
        ping_at = trio.current_time() + heartbeat
        while True:
            work = self._work
            if self._core.wants_fresh_line:
                return None
            payloads, effects, again = self._core.outgoing(trio.current_time())
            self._apply(effects)
            if trio.current_time() >= ping_at:
                payloads.append(codec.encode_frame(Ping()))
            for payload in payloads:
                await socket.send(payload)
                ping_at = trio.current_time() + heartbeat
            if not payloads:
                with trio.move_on_at(min(again, ping_at)):
                    await work.wait()
