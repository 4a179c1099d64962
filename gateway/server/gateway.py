"""The gateway: everything put together, its watch, and its drain.

Drain, in this order (PROTOCOL section 8): admission closes; every connection gets `goaway`; running turns may finish
until the time is up, then end as ``interrupted``; unsent replies go out; connections close with 1012; sessions and
store close. Each step has a bound, so the whole has: drain_timeout + stop_timeout + 2 × close_timeout, whatever
clients, agents or threads do.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from ssl import SSLContext
from typing import Any

import attrs
import structlog
import trio
from attrs import frozen

from gateway._version import __version__
from gateway.agents import as_agent
from gateway.config import Config
from gateway.errors import ConfigError, ConnectionLost, GatewayError, HandshakeRefused, StoreError, StoreFenced
from gateway.protocol import codec
from gateway.protocol.messages import GoAway, Policy, ServerInfo
from gateway.server.auth import Authenticate, anyone, by_token
from gateway.server.connection import Connection
from gateway.server.flusher import Flusher
from gateway.server.listener import Admission, accept_forever, bind, serve_stream
from gateway.session import Registered, Registry, Sources
from gateway.store import SessionRecord, Store, open_store
from gateway.transport.memory import MemoryByteStream, memory_pair
from gateway.transport.streams import ByteStream
from gateway.transport.tasks import open_plain_nursery
from gateway.transport.tls import TlsByteStream, load_certificate
from gateway.transport.upgrade import Stopping, Upgrade

RECONNECT_SPREAD_MS = 5_000
"""Clients told to go away come back within so many ms, each at its own moment: 10,000 of them make 2,000 a second."""

PURGE_EVERY_SECONDS = 600
"""Sessions are kept for at least a day by default; ten minutes more do not matter, and a large file takes a while."""

SETTLE_SECONDS = 1.0
"""For replies that are not sent yet, before connections are closed in a drain."""

SETTLE_LOOK = 0.05
"""How often a drain looks again although no connection made progress."""

_log = structlog.get_logger(__name__)


@frozen
class Statistics:
    """A gateway at one moment, in counts."""

    connections: int
    pending_handshakes: int
    sessions: int
    turns: int
    queued_inputs: int
    blocked_connections: int
    dropped_frames: int
    refused_sockets: int
    crashed_connections: int
    closes: Mapping[str, int]
    """How the gateway closed connections: ``"1013 slow_consumer"`` → count."""


class Gateway:
    """A running gateway. Made by `open_gateway`."""

    def __init__(
        self,
        config: Config,
        agents: Mapping[str, Registered],
        store: Store,
        nursery: trio.Nursery,
        *,
        authenticate: Authenticate,
        may_share: Callable[[str, SessionRecord], bool],
        sources: Sources,
        ssl_context: SSLContext | None,
    ) -> None:
        limits = config.limits
        self.config = config
        self.sources = sources
        self.authenticate = authenticate
        self.ssl_context = ssl_context
        """For the next connections of the listening port; None: without TLS. It may be replaced, but not by None."""
        self.flusher = Flusher(sources.timer)
        self.registry = Registry(
            nursery,
            agents,
            store,
            limits,
            sources,
            may_share=may_share,
            pacer=self.flusher,
            on_fenced=self._lose_store,
        )
        self.admission = Admission(limits.max_pending_handshakes, limits.max_pending_handshakes_per_peer)
        # Sets in the order of coming: what is done to all of them is done in the same order in every run.
        self.connections: dict[Connection, None] = {}
        """Every open WebSocket, joined or not."""
        self.joined: dict[Connection, None] = {}
        self.blocked: dict[Connection, None] = {}
        self.draining = False
        self.dropped_frames = 0
        self.refused_sockets = 0
        self.crashed_connections = 0
        self.server_info = ServerInfo(name="trio-gateway", version=__version__, node=config.server.node)
        self.policy = Policy(**{name.name: getattr(limits, name.name) for name in attrs.fields(Policy)})
        self._closes: dict[str, int] = {}
        self._nursery = nursery
        self._connections: trio.Nursery | None = None
        self._serving = 0
        self._connected = 0
        self.upgrading: dict[Upgrade, None] = {}
        """The requests of sockets without a WebSocket yet: a drain does not wait for them."""
        self._listeners: list[trio.SocketListener] = []
        self._address: tuple[str, int] | None = None
        self.progress = trio.lowlevel.ParkingLot()
        """Where a drain waits: woken whenever a connection was flushed or has ended."""
        self._drained = trio.Event()
        self._store_lost: StoreFenced | None = None
        self._all_gone = trio.lowlevel.ParkingLot()

    # what others use

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the first listening socket.

        Raises:
            GatewayError: the gateway was opened with ``listen=False``.
        """
        if self._address is None:
            raise GatewayError("this gateway does not listen (listen=False); use connect()")
        return self._address

    @property
    def url(self) -> str:
        """Where clients connect."""
        host, port = self.address
        scheme = "ws" if self.ssl_context is None else "wss"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{self.config.server.path}"

    def statistics(self) -> Statistics:
        """Counts of this moment."""
        sessions = self.registry.sessions.values()
        return Statistics(
            connections=len(self.joined),
            pending_handshakes=self.admission.pending,
            sessions=len(self.registry),
            turns=sum(session.turn is not None for session in sessions),
            queued_inputs=sum(session.waiting for session in sessions),
            blocked_connections=len(self.blocked),
            dropped_frames=self.dropped_frames,
            refused_sockets=self.refused_sockets,
            crashed_connections=self.crashed_connections,
            closes=dict(self._closes),
        )

    def connect(self) -> MemoryByteStream:
        """A client's end of a connection in memory: ``open_session(url, agent, connect=over(gateway.connect))``.

        Raises:
            ConnectionLost: the gateway has drained.
        """
        if self._drained.is_set():
            raise ConnectionLost(1012, "restart")
        self._connected += 1
        # A peer of its own: the limit on connections that have not joined is for strangers behind one address.
        client, server = memory_pair(peer=f"memory {self._connected}")
        self.serve(server)
        return client

    async def serve_forever(self) -> None:
        """Wait until the gateway has drained.

        Raises:
            StoreFenced: it drained by itself, because another process has become the writer of its store.
        """
        await self._drained.wait()
        if self._store_lost is not None:
            raise self._store_lost

    def drain_nowait(self, reason: str = "shutdown") -> None:
        """Begin to drain; `serve_forever` returns when it is done. Calling it again changes nothing."""
        if not self.draining:
            self._begin_drain(reason)
            # Owned by the gateway's nursery; bounded.
            self._nursery.start_soon(self._drain)

    async def drain(self, reason: str = "shutdown") -> None:
        """Drain and wait for its end. Cancelling stops the wait, not the drain."""
        self.drain_nowait(reason)
        await self._drained.wait()

    # what connections use

    def opened(self, connection: Connection) -> None:
        """A WebSocket is open."""
        self.connections[connection] = None

    def ended(self, connection: Connection) -> None:
        """A connection is over, but for its closing handshake."""
        self.connections.pop(connection, None)
        self.joined.pop(connection, None)
        self.blocked.pop(connection, None)
        self.progress.unpark_all()

    def check_admission(self) -> None:
        """Raise `HandshakeRefused` if nobody, or nobody else, may join now."""
        if self.draining:
            raise self._refuse_draining()
        most = self.config.limits.max_connections
        if len(self.joined) >= most:
            raise HandshakeRefused(
                "too_many_connections",
                f"{most:,} connections are open (limits.max_connections)",
                close_code=4429,
                next_step="Try again later.",
                retryable=True,
                retry_after_ms=5_000,
            )

    def spawn(self, function: Callable[..., Awaitable[Any]], *args: Any) -> None:
        """Run a small task of a connection under a crash barrier."""
        self._nursery.start_soon(self._guarded, function, *args)

    async def _guarded(self, function: Callable[..., Awaitable[Any]], *args: Any) -> None:
        try:
            await function(*args)
        except Exception as exc:
            _log.error("task_failed", exc_info=exc)

    def count_close(self, code: int, reason: str) -> None:
        key = f"{code} {reason}"
        # The reasons are few and ours, but for close reasons made of a peer's mistakes there is a bound as well.
        if key in self._closes or len(self._closes) < 64:
            self._closes[key] = self._closes.get(key, 0) + 1

    def _refuse_draining(self) -> HandshakeRefused:
        return HandshakeRefused(
            "draining",
            "the gateway is stopping",
            close_code=1012,
            close_reason="restart",
            next_step="Reconnect in a moment.",
            retryable=True,
            retry_after_ms=self._reconnect_after(),
        )

    # life

    def _accept(self, listeners: list[trio.SocketListener]) -> None:
        assert self._connections is not None
        self._listeners = listeners
        if listeners:
            host, port, *_ = listeners[0].socket.getsockname()
            self._address = str(host), int(port)
        for listener in listeners:
            # Owned by the connection nursery; ends when the listener is closed.
            self._connections.start_soon(
                accept_forever, listener, self.config.limits.send_buffer_bytes, self._serve_accepted
            )

    def _stop_accepting(self) -> None:
        for listener in self._listeners:
            listener.socket.close()

    def _serve_accepted(self, stream: ByteStream) -> None:
        self.serve(stream if self.ssl_context is None else TlsByteStream(stream, self.ssl_context))

    def serve(self, stream: ByteStream) -> None:
        """Serve a client on a byte stream, which is the gateway's from now on. Never waits."""
        assert self._connections is not None
        self._serving += 1
        # Owned by the connection nursery; ends with the connection.
        self._connections.start_soon(self._serve_one, stream)

    async def _serve_one(self, stream: ByteStream) -> None:
        try:
            await serve_stream(self, stream)
        finally:
            self._serving -= 1
            if not self._serving:
                self._all_gone.unpark_all()

    async def _watch(self) -> None:
        """Everything that goes by the clock and not by an event: one task instead of a timer per connection."""
        limits = self.config.limits
        pace = _clamp(min(limits.slow_grace_ms, limits.send_timeout_ms) / 4000, 0.005, 0.25)
        alive_every = _clamp(limits.heartbeat_ms / 8000, 0.005, 2.0)
        rest_every = _clamp(limits.idle_session_ms / 4000, 0.005, 10.0)
        next_alive = next_rest = trio.current_time()
        while True:
            await trio.sleep(min(pace, alive_every, rest_every))
            now = trio.current_time()
            for connection in list(self.blocked):
                self._check(connection, connection.check_blocked, now)
            if now >= next_alive:
                next_alive = now + alive_every
                now_ms = self.sources.now_ms()
                for connection in list(self.joined):
                    self._check(connection, connection.check_alive, now, now_ms)
            if now >= next_rest:
                next_rest = now + rest_every
                self.registry.rest_idle()

    async def _purge(self, store: Store) -> None:
        """Have the store remove what was kept long enough, and nothing in use. Owned by the gateway's nursery."""
        while True:
            await trio.sleep(PURGE_EVERY_SECONDS)
            try:
                purged = await store.purge(now=self.sources.now_ms(), in_use=self.registry)
            except StoreFenced as exc:
                self._lose_store(exc)
            except StoreError as exc:
                _log.warning("purge_failed", error=str(exc))
            else:
                if purged.sessions:
                    _log.info("purged", sessions=purged.sessions, bytes=purged.size)

    def _check(self, connection: Connection, check: Callable[..., None], *args: Any) -> None:
        try:
            check(*args)
        except Exception as exc:
            connection.crashed(exc)

    def _reconnect_after(self) -> int:
        return 100 + int(self.sources.chance() * RECONNECT_SPREAD_MS)

    def _begin_drain(self, reason: str) -> None:
        """Close admission and tell everyone. No await: nobody gets in between."""
        self.draining = True
        self.registry.begin_drain()
        self._stop_accepting()
        for upgrade in list(self.upgrading):
            upgrade.stop(Stopping("the gateway is stopping; try again in a moment"))
        timeout = self.config.server.drain_timeout_ms
        for connection in list(self.connections):
            if connection in self.joined:
                connection.push(GoAway(reason=reason, reconnect_after_ms=self._reconnect_after(), deadline_ms=timeout))
            else:
                connection.close(1012, "restart")

    def _lose_store(self, exc: StoreFenced) -> None:
        """Nothing can be stored any more, and what others store is not seen here: end, and say so. No await here."""
        if self._store_lost is None:
            self._store_lost = exc
            _log.critical("store_lost", error=str(exc))
            self.drain_nowait("store_lost")

    async def _drain(self) -> None:
        limits = self.config.limits
        timeout = 0.0 if self._store_lost else self.config.server.drain_timeout_ms / 1000
        _log.info("drain_started", connections=len(self.joined), turns=self.statistics().turns)
        with trio.move_on_after(timeout + limits.stop_timeout_ms / 1000 + 1):
            async with trio.open_nursery() as nursery:
                for session in list(self.registry.sessions.values()):
                    nursery.start_soon(session.finish_turn, timeout)
        with trio.move_on_after(SETTLE_SECONDS):
            while not all(connection.settled for connection in self.joined):
                # Woken by progress on a connection; what a store is still writing tells nobody when there is none.
                with trio.move_on_after(SETTLE_LOOK):
                    await self.progress.park()
        for connection in list(self.connections):
            connection.close(1012, "restart")
        with trio.move_on_after(2 * limits.close_timeout_ms / 1000):
            while self._serving:
                await self._all_gone.park()
        left = self.statistics()
        _log.info("drained", turns_left=left.turns, queued_inputs=left.queued_inputs)
        self._drained.set()


def _clamp(value: float, low: float, high: float) -> float:
    return max(low, min(value, high))


@asynccontextmanager
async def open_gateway(
    config: Config | None = None,
    agents: Mapping[str, Any] | None = None,
    *,
    store: Store | None = None,
    authenticate: Authenticate | None = None,
    may_share: Callable[[str, SessionRecord], bool] = lambda subject, record: False,
    sources: Sources | None = None,
    listen: bool = True,
    ssl_context: SSLContext | None = None,
) -> AsyncIterator[Gateway]:
    """Run a gateway inside any trio program.

    Args:
        config: settings; the defaults listen on 127.0.0.1:8765 and keep sessions in memory.
        agents: agent id → anything that `gateway.agents.as_agent` takes, or a `Registered`.
        store: used instead of ``config.store``; entered and left here.
        authenticate: token → `Identity`; by default ``server.tokens``, or everyone is ``anonymous``.
        may_share: whether a subject has a grant for a session of another subject.
        listen: False opens no port; connect with `Gateway.connect`.
        ssl_context: a server's; the port speaks TLS with it instead of with ``server.tls_certificate`` and ``tls_key``.

    Leaving the block drains, within ``server.drain_timeout_ms`` and the bounds named in this module. Leaving it by an
    exception or by cancellation ends everything at once.

    Raises:
        BindError, StoreUnusable, ConfigError, AgentLoadError: before anything is served.
    """
    config = config or Config()
    if not agents:
        raise ConfigError("agents", "expected at least one agent")
    limiter = trio.CapacityLimiter(config.limits.max_sync_threads)
    registered = {
        name: agent
        if isinstance(agent, Registered)
        else Registered(as_agent(agent, name=name, limiter=limiter), config.limits.max_detached_ms)
        for name, agent in agents.items()
    }
    if authenticate is None:
        authenticate = by_token(config.server.tokens) if config.server.tokens else anyone
    server = config.server
    if listen and ssl_context is None and server.tls_certificate is not None and server.tls_key is not None:
        ssl_context = load_certificate(server.tls_certificate, server.tls_key)
    codec.structure_all()
    # Everything that can fail for a reason of the caller's does so before there is a nursery, which would wrap it.
    listeners = await bind(config.server.host, config.server.port) if listen else []
    try:
        async with (
            store or open_store(config.store, config.limits) as opened,
            open_plain_nursery() as nursery,
            # Inside, so that connections end before what serves them.
            open_plain_nursery() as connections,
        ):
            gateway = Gateway(
                config,
                registered,
                opened,
                nursery,
                authenticate=authenticate,
                may_share=may_share,
                sources=sources or Sources(),
                ssl_context=ssl_context,
            )
            gateway._connections = connections
            # All owned by the gateway's nurseries, which cancel them when the block is left.
            nursery.start_soon(gateway.flusher.run)
            nursery.start_soon(gateway._watch)
            nursery.start_soon(gateway._purge, opened)
            gateway.spawn(gateway.registry.resume_unfinished)
            gateway._accept(listeners)
            yield gateway
            await gateway.drain()
    finally:
        for listener in listeners:
            listener.socket.close()
