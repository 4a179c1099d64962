"""Accepting sockets: admission by count before anything is read, and a crash barrier around each connection.

trio-websocket's own server ends as a whole when one connection raises. Here an exception, whatever a peer did to cause
it, ends that connection and is logged (DESIGN property 20).
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import structlog
import trio

from gateway.errors import BindError, ConnectionLost
from gateway.server.connection import Connection
from gateway.transport.streams import ByteStream, SocketByteStream, end_gently
from gateway.transport.upgrade import HandshakeFailed, NoWebSocketHere, TooMany, UpgradeRequest, refusing
from gateway.transport.websocket import LINGER, open_server_websocket

if TYPE_CHECKING:
    from gateway.server.gateway import Gateway

BACKLOG = 1024
"""Connections the kernel holds until they are accepted: everyone who comes back in the second after a restart."""

OUT_OF_FILES = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}
GONE = {errno.ECONNABORTED, errno.EPROTO, errno.EINTR}
ACCEPT_PAUSE = 0.1
"""Seconds before accepting again when that fails for another reason than one peer's: a spinning loop would not free a
file descriptor, and whatever else it is will not be over sooner."""

MAX_LINGERING = 64
"""Refused sockets that are kept for a moment, so that the peer can read why; the others are closed at once."""

SUBPROTOCOL = "trio-gateway"

_REFUSAL = refusing(TooMany("too many connections that have not said hello"))

_log = structlog.get_logger(__name__)


class Admission:
    """Counts the sockets that have not joined yet, in total and by address: they are cheap to open and hold."""

    def __init__(self, most: int, most_per_peer: int) -> None:
        self._most = most
        self._most_per_peer = most_per_peer
        self._peers: Counter[str] = Counter()
        self.pending = 0
        self.lingering = 0

    def enter(self, peer: str) -> bool:
        """Count a new socket in; False if there is no room for it."""
        if self.pending >= self._most or self._peers[peer] >= self._most_per_peer:
            return False
        self.pending += 1
        self._peers[peer] += 1
        return True

    def leave(self, peer: str) -> None:
        """Count a socket out: it joined or is gone."""
        self.pending -= 1
        self._peers[peer] -= 1
        if not self._peers[peer]:
            del self._peers[peer]


async def bind(host: str, port: int) -> list[trio.SocketListener]:
    """Listen on an address.

    Raises:
        BindError: it cannot be listened on; the message says why and what to do.
    """
    try:
        return await trio.open_tcp_listeners(port, host=host, backlog=BACKLOG)
    except OSError as exc:
        cause: BaseException = exc
        while isinstance(cause.__cause__, OSError):
            cause = cause.__cause__
        if getattr(cause, "errno", None) == errno.EADDRINUSE:
            raise BindError(f"{host}:{port} is in use; stop what listens there or choose another --port") from None
        raise BindError(f"cannot listen on {host}:{port}: {exc}; check --host and --port") from None


async def accept_forever(listener: trio.SocketListener, send_buffer: int, serve: Callable[[ByteStream], None]) -> None:
    """Accept until cancelled or the listener is closed; `serve` takes each connection over, without waiting."""
    failing: int | None = None
    while True:
        try:
            sock, _ = await listener.socket.accept()
        except OSError as exc:
            if exc.errno == errno.EBADF:
                return
            if exc.errno in GONE:
                continue  # the peer was gone before it was accepted
            if exc.errno != failing:  # said once, not ten times a second
                failing = exc.errno
                _log.error("out_of_files" if failing in OUT_OF_FILES else "accept_failed", error=str(exc))
            await trio.sleep(ACCEPT_PAUSE)
            continue
        except trio.ClosedResourceError:
            return
        failing = None
        try:
            stream = SocketByteStream(sock, send_buffer=send_buffer)
        except OSError:
            sock.close()
            continue
        serve(stream)


async def serve_stream(gateway: Gateway, stream: ByteStream) -> None:
    """Serve one byte stream from its first byte to its last. Nothing a peer does raises out of here."""
    peer = stream.peer
    try:
        if not gateway.admission.enter(peer):
            gateway.refused_sockets += 1
            await _refuse(gateway.admission, stream)
            return
        left = False

        def leave() -> None:
            nonlocal left
            if not left:
                left = True
                gateway.admission.leave(peer)

        try:
            await _serve(gateway, stream, leave)
        finally:
            leave()
    except (HandshakeFailed, ConnectionLost, trio.BrokenResourceError, trio.ClosedResourceError) as exc:
        _log.debug("connection_ended", peer=peer, reason=str(exc))
    except Exception as exc:
        gateway.crashed_connections += 1
        _log.error("connection_failed", peer=peer, exc_info=exc)
    finally:
        await stream.aclose()


async def _refuse(admission: Admission, stream: ByteStream) -> None:
    admission.lingering += 1
    try:
        stream.send_nowait(_REFUSAL)
        if admission.lingering <= MAX_LINGERING:
            await end_gently(stream, LINGER)
    finally:
        admission.lingering -= 1


async def _serve(gateway: Gateway, stream: ByteStream, leave: Callable[[], None]) -> None:
    limits = gateway.config.limits
    async with open_server_websocket(
        stream,
        choose=partial(_choose, gateway.config.server.path),
        max_message_bytes=limits.max_handshake_bytes,
        max_queued_frames=limits.max_control_frames,
        handshake_timeout=limits.handshake_timeout_ms / 1000,
        close_timeout=limits.close_timeout_ms / 1000,
        upgrading=gateway.upgrading,
    ) as ws:
        # The hello has a limit of its own, and nothing more is kept for somebody who has not joined.
        ws.hold = True
        connection = Connection(gateway, ws, on_joined=leave)
        await connection.run()
        if ws.closed_by_us:
            assert ws.close_code is not None
            gateway.count_close(ws.close_code, ws.close_reason)


def _choose(path: str, request: UpgradeRequest) -> str | None:
    if request.path != path:
        raise NoWebSocketHere(f"no WebSocket here; connect to {path}")
    return SUBPROTOCOL if SUBPROTOCOL in request.subprotocols else None
