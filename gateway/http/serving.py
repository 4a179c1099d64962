"""The routes on a socket: hypercorn on trio, one connection at a time.

`hypercorn.trio.serve` is one nursery for all connections, so what one peer makes it raise ends it as a whole (seen: an
``Upgrade: h2c`` with settings that are no base64); it shields its sends, so that a peer that does not read keeps it
from ending; and there are connections it never lets go (the same upgrade, and then the end of the stream). So the
accepting is done here: each connection is a hypercorn `TCPServer` of its own behind a crash barrier, over a stream on
which nothing takes longer than `SILENT_SECONDS`, and there are at most `MAX_CONNECTIONS`. That class is not documented,
which is why ``pyproject.toml`` bounds hypercorn's version from above.
"""

from __future__ import annotations

import errno
import logging
import re
import socket
from functools import partial
from typing import Any, cast

import structlog
import trio
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState
from hypercorn.utils import wrap_app

from gateway.errors import BindError
from gateway.http.app import State, make_app

SILENT_SECONDS = 5.0
"""For a request to arrive, for a response to be taken, and for a connection to end after its peer has: probes take
milliseconds."""

GRACE_SECONDS = 1.0
"""For requests that are being answered when the server stops."""

MAX_CONNECTIONS = 128
"""Supervisors, load balancers and a few people; the process's files are for those who talk to agents."""

_RETURN_ALONE = re.compile(rb"\r[^\n]")

_log = structlog.get_logger(__name__)


async def serve_http(
    state: State,
    host: str,
    port: int,
    *,
    shutdown: trio.Event,
    task_status: trio.TaskStatus[tuple[str, int]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the routes until `shutdown` is set; start it with ``nursery.start``, which returns (host, port).

    Args:
        state: what the routes ask.
        port: 0 takes a free one.
        shutdown: set it to stop; requests that are being answered get `GRACE_SECONDS`.

    Cancelling is safe and stops at once.

    Raises:
        BindError: before it has started; the address cannot be listened on.
    """
    listener = await _listen(host, port)
    connections = _Connections(state)
    async with listener, trio.open_nursery() as handlers:
        try:
            async with trio.open_nursery() as accepting:
                # Handlers belong to the outer nursery: they outlive the accepting, and end below.
                accepting.start_soon(
                    partial(trio.serve_listeners, connections.serve, [listener], handler_nursery=handlers)
                )
                task_status.started(listener.socket.getsockname()[:2])
                await shutdown.wait()
                accepting.cancel_scope.cancel()
            await connections.finish()
        finally:
            connections.drop_all()
        handlers.cancel_scope.cancel()


class _Connections:
    """The connections of one server."""

    def __init__(self, state: State) -> None:
        self._app: AppWrapper = wrap_app(cast("Any", make_app(state)), 0, "asgi")
        self._config = _make_config()
        self._context = WorkerContext(None)
        self._open: set[_Stream] = set()
        self._changed = trio.lowlevel.ParkingLot()

    async def serve(self, stream: trio.SocketStream) -> None:
        """Serve one connection to its end. Nothing a peer does raises out of here."""
        bounded = _Stream(stream)
        if len(self._open) >= MAX_CONNECTIONS:
            bounded.drop()
            return
        self._open.add(bounded)
        try:
            with bounded.scope:
                await TCPServer(
                    self._app, self._config, self._context, ConnectionState(cast("Any", {})), cast("Any", bounded)
                ).run()
        except* Exception as group:
            _log.warning("http_connection_failed", reason=_innermost(group))
            _log.debug("http_connection_failed_at", exc_info=group)
        finally:
            bounded.drop()
            self._open.discard(bounded)
            self._changed.unpark_all()

    async def finish(self) -> None:
        """Let go of idle connections, and wait for the others within `GRACE_SECONDS`."""
        await self._context.terminated.set()
        with trio.move_on_after(GRACE_SECONDS):
            while self._open:
                await self._changed.park()

    def drop_all(self) -> None:
        for stream in self._open:
            stream.drop()


class _Stream:
    """What hypercorn needs of a stream, with an end to every wait.

    `scope` is around the connection's tasks. Its deadline is set when the peer is done or silent: what hypercorn still
    waits for then does not come.
    """

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._tail = b""
        self.socket = stream.socket
        self.scope = trio.CancelScope()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        data = b""
        with trio.move_on_after(SILENT_SECONDS):
            data = bytes(await self._stream.receive_some(max_bytes))
        # After a carriage return alone h11 looks for the end of a header in every possible way: for half a second, in a
        # head of 16 KiB, and everybody waits. No request of HTTP/1.1 has one.
        if _RETURN_ALONE.search(self._tail + data):
            data = b""
        self._tail = data[-1:]
        if not data:
            self.scope.deadline = min(self.scope.deadline, trio.current_time() + SILENT_SECONDS)
        return data

    async def send_all(self, data: bytes) -> None:
        # hypercorn calls it under a shield: this deadline, or `drop`, is what ends it.
        with trio.move_on_after(SILENT_SECONDS) as scope:
            await self._stream.send_all(data)
        if scope.cancelled_caught:
            self.drop()
            raise trio.BrokenResourceError("the peer does not read")

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()

    def drop(self) -> None:
        """Close the socket now; whoever waits on it gets `trio.ClosedResourceError`."""
        self.socket.close()


def _make_config() -> Config:
    config = Config()
    config.accesslog = None
    config.errorlog = logging.getLogger("hypercorn.error")
    config.include_server_header = False
    config.keep_alive_timeout = SILENT_SECONDS
    return config


def _innermost(exc: BaseException) -> str:
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return f"{type(exc).__name__}: {exc}"


async def _listen(host: str, port: int) -> trio.SocketListener:
    """One listening socket: for a name with several addresses, the first."""
    try:
        found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        sock = trio.socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            await sock.bind(address)
            sock.listen(MAX_CONNECTIONS)
        except BaseException:
            sock.close()
            raise
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            raise BindError(f"{host}:{port} is in use; stop what listens there or choose another --http-port") from None
        raise BindError(f"cannot listen on {host}:{port}: {exc.strerror}; check --host and --http-port") from None
    return trio.SocketListener(sock)
