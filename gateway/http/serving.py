"""The routes on a socket: hypercorn on trio.

hypercorn's server is one nursery for all connections, so what one request makes it raise ends it as a whole (seen: an
``Upgrade: h2c`` with settings that are no base64). Therefore the listening socket is ours, hypercorn serves a duplicate
of it, and when hypercorn fails it is started again on the next one: who connects in between waits in the kernel.
The road not taken is hypercorn's `TCPServer` per connection: better contained, but not public.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any, cast

import hypercorn.trio
import structlog
import trio
from hypercorn.config import Config

from gateway.errors import BindError
from gateway.http.app import State, make_app

SILENT_SECONDS = 5
"""For a request to arrive and for a response to be taken, then the connection is dropped: probes take milliseconds.
A peer that does not read can delay the end of the process by as much."""

GRACE_SECONDS = 1.0
"""For requests that are being answered when the server stops."""

RESTART_PAUSE = 0.2
"""Seconds before hypercorn is started again after it failed, so that a bad peer cannot make the process spin."""

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
        shutdown: set it to stop; requests that are being answered get a second.

    Cancelling is safe and stops at once.

    Raises:
        BindError: before it has started; the address cannot be listened on.
    """
    app = make_app(state)
    with await _listen(host, port) as sock:
        task_status.started(sock.getsockname()[:2])
        while not shutdown.is_set():
            try:
                await _serve_duplicate(app, sock, shutdown.wait)
            except* Exception as group:
                _log.warning("http_restarted", reason=_innermost(group))
                _log.debug("http_failed", exc_info=group)
            with trio.move_on_after(RESTART_PAUSE):
                await shutdown.wait()


def _innermost(exc: BaseException) -> str:
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return f"{type(exc).__name__}: {exc}"


async def _listen(host: str, port: int) -> socket.socket:
    """One listening socket: for a name with several addresses, the first."""
    try:
        found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                # hypercorn shields its sends, so nothing else ends one to a peer that does not read. Inherited by
                # the sockets that are accepted.
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENT_SECONDS * 1000)
            sock.bind(address)
            sock.listen(Config.backlog)
        except BaseException:
            sock.close()
            raise
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            raise BindError(f"{host}:{port} is in use; stop what listens there or choose another --http-port") from None
        raise BindError(f"cannot listen on {host}:{port}: {exc.strerror}; check --host and --http-port") from None
    return sock


async def _serve_duplicate(app: Any, sock: socket.socket, stopped: Callable[[], Awaitable[None]]) -> None:
    config = Config()
    config.bind = f"fd://{os.dup(sock.fileno())}"
    config.accesslog = None
    config.errorlog = logging.getLogger("hypercorn.error")
    # Its own message names the socket and offers CTRL + C; the start-up message of the command says it better.
    config.errorlog.setLevel(max(config.errorlog.level, logging.WARNING))
    config.include_server_header = False
    config.read_timeout = SILENT_SECONDS
    config.graceful_timeout = GRACE_SECONDS
    await hypercorn.trio.serve(cast("Any", app), config, shutdown_trigger=stopped)
