"""The client's side of the network seam: one WebSocket to a gateway. The only client-side user of trio-websocket.

Theory of operation
-------------------
`dial` puts a stream of ours (`_Line`) beneath the library, because the library leaves four things to chance, each seen:

- A line that ends during the upgrade wakes nobody. `_Line` notices the end and ends the waiting.
- A cancelled `send_message` leaves half a frame on the wire and the next one is accepted. Here it drops the socket.
- `aclose()` to a peer that does not read never returns, and after a 1009 the library's reader waits for ever. Here
  every close has a deadline, after which the stream is closed by force; that ends the reader whatever it waits for.
- The reader may raise on odd input. It runs behind a crash barrier: what it raised is how the connection was lost.

So a socket ends in one way only: the task that owns the library's reader is cancelled, and closes the stream by force.
"""

from __future__ import annotations

import socket as _socket
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import trio
from attrs import frozen
from trio_websocket import ConnectionClosed, ConnectionRejected, WebSocketConnection, wrap_client_stream

from gateway.errors import ConfigError, ConnectionLost
from gateway.transport.tasks import open_plain_nursery

RECEIVE_BYTES = 64 * 1024
"""Read at once. The library's default of 4 KiB costs a system call and a task switch for every few deltas."""

MAX_REASON_BYTES = 123
"""What a close frame has room for beside its code (RFC 6455 section 5.5)."""


class UpgradeRefused(ConnectionLost):
    """The server answered the upgrade with plain HTTP. `status` is its code: 404 means a wrong path, 502 a proxy."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(1006, reason)
        self.status = status


@frozen
class Target:
    """A parsed WebSocket URL."""

    secure: bool
    host: str
    port: int
    resource: str

    @property
    def authority(self) -> str:
        """As the `Host` header has it: without the scheme's default port, IPv6 in brackets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.secure else 80) else f"{host}:{self.port}"


def parse_url(url: str) -> Target:
    """Take a ``ws://`` or ``wss://`` URL apart.

    Raises:
        ConfigError: it is none. The message says what was expected.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as exc:
        raise ConfigError("url", f"{url!r} is not a URL: {exc}") from None
    if parts.scheme not in ("ws", "wss") or not parts.hostname:
        raise ConfigError("url", f"expected ws://HOST[:PORT]/PATH or wss://..., got {url!r}")
    resource = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if not resource.isascii() or not resource.isprintable() or " " in resource:
        raise ConfigError("url", f"path and query must be percent-encoded, got {url!r}")
    secure = parts.scheme == "wss"
    return Target(secure, parts.hostname, port or (443 if secure else 80), resource)


@asynccontextmanager
async def dial(
    url: str,
    *,
    headers: Sequence[tuple[str, str]] = (),
    subprotocols: Sequence[str] = (),
    max_message_bytes: int = 64 * 1024 * 1024,
    connect_timeout: float = 10.0,
    send_timeout: float = 10.0,
    close_timeout: float = 3.0,
    stream: trio.abc.HalfCloseableStream | None = None,
    ssl_context: ssl.SSLContext | None = None,
) -> AsyncIterator[ClientSocket]:
    """Open a WebSocket; leaving the block closes it, by force after `close_timeout`.

    Args:
        max_message_bytes: a longer message ends the connection with 1009. The library counts characters, of which there
            are never more than bytes, so it refuses nothing that fits.
        connect_timeout, send_timeout, close_timeout: seconds; for the name lookup, TCP, TLS and upgrade together, for
            one message, and for the closing handshake.
        stream: used as it is instead of dialling; the host of `url` then only names it. It then belongs to `dial`.
        ssl_context: for ``wss``; by default the system's certificates.

    Raises:
        ConnectionLost: it could not be opened; `reason` says why in words for a person.
        UpgradeRefused: a `ConnectionLost`: the server is there and answered with an HTTP status.
        ConfigError: `url` is none.
    """
    target = parse_url(url)
    sock = ClientSocket(max_message_bytes, send_timeout, close_timeout)
    try:
        async with open_plain_nursery() as nursery:
            try:
                with trio.move_on_after(connect_timeout):
                    if stream is None:
                        stream = await _connect(target, ssl_context)
                    # Owned by this block, shielded: `aclose` needs the library's reader to see the peer's close, also
                    # when the block was cancelled. Ends when the line does, at the latest by its scope below.
                    nursery.start_soon(sock._run, stream, target, headers, subprotocols)
                    await sock._settled.wait()
                if not sock._is_open:
                    raise sock._lost or ConnectionLost(
                        1006, f"no answer from {target.authority} in {connect_timeout:g} s"
                    )
                try:
                    yield sock
                finally:
                    # Shielded: a cancelled block still says goodbye, within `close_timeout`.
                    with trio.move_on_after(2 * close_timeout, shield=True):
                        await sock.aclose()
            finally:
                sock._scope.cancel()
    finally:
        if stream is not None:
            await trio.aclose_forcefully(stream)


def over(
    open_stream: Callable[[], trio.abc.HalfCloseableStream],
) -> Callable[..., AbstractAsyncContextManager[ClientSocket]]:
    """A `dial` that runs over streams of yours: ``open_session(..., connect=over(gateway.connect))`` uses no port.

    Args:
        open_stream: called once per connection; may raise `ConnectionLost`.
    """

    def connect(url: str, **options: Any) -> AbstractAsyncContextManager[ClientSocket]:
        return dial(url, stream=open_stream(), **options)

    return connect


class ClientSocket:
    """One open WebSocket, made by `dial`. One task may receive at a time; any number may send."""

    def __init__(self, max_message_bytes: int, send_timeout: float, close_timeout: float) -> None:
        self._max_message = max_message_bytes
        self._send_timeout = send_timeout
        self._close_timeout = close_timeout
        self._ws: WebSocketConnection | None = None
        self._lock = trio.Lock()
        self._scope = trio.CancelScope(shield=True)
        self._settled = trio.Event()
        """The upgrade is over, well or not."""
        self._ended = trio.Event()
        self._lost: ConnectionLost | None = None
        """How the connection ended, if we know better than the library."""

    @property
    def _is_open(self) -> bool:
        return self._ws is not None

    @property
    def subprotocol(self) -> str | None:
        """What the server chose of those offered."""
        assert self._ws is not None
        return self._ws.subprotocol

    async def send(self, text: bytes) -> None:
        """Send one text message (UTF-8). Returns when the kernel has taken it.

        Cancelling is safe only in that the connection is then gone for everyone: part of a frame may be on the wire.

        Raises:
            ConnectionLost: it is closed, or the peer took nothing for `send_timeout`.
        """
        assert self._ws is not None
        message = text.decode()
        with trio.move_on_after(self._send_timeout):
            async with self._lock:
                self._check()
                whole = False
                try:
                    await self._ws.send_message(message)
                    whole = True
                    return
                except ConnectionClosed as exc:
                    raise self._closed(exc) from None
                finally:
                    if not whole:
                        self._drop("a send was cancelled half-way")
        self._lost = ConnectionLost(1006, f"a message was not taken within {self._send_timeout:g} s")
        self._scope.cancel()
        raise self._lost

    async def receive(self) -> bytes:
        """Wait for the next text message (UTF-8). Cancelling is safe: no message is lost.

        Not receiving stops the reading from the network: that is the back-pressure.

        Raises:
            ConnectionLost: the connection has ended; with the peer's close code and reason if it sent them.
        """
        assert self._ws is not None
        try:
            message = await self._ws.get_message()
        except ConnectionClosed as exc:
            raise self._closed(exc) from None
        if isinstance(message, str):
            return message.encode()
        self._lost = ConnectionLost(1003, "the gateway sent a binary message")
        await self.aclose(1003, "binary not supported")
        raise self._lost

    async def aclose(self, code: int = 1000, reason: str = "") -> None:
        """Close: send the close frame, wait for the peer's, at most `close_timeout`, then drop the stream.

        Cancelling drops it at once. A closed socket may be closed again.
        """
        # After a drop half a frame may be on the wire; a close frame behind it would be read as part of it.
        if self._ws is not None and not self._ended.is_set() and not self._scope.cancel_called:
            if self._lost is None:
                self._lost = ConnectionLost(code, reason or "closed here")
            fitting = reason.encode()[:MAX_REASON_BYTES].decode(errors="ignore")
            try:
                with trio.move_on_after(self._close_timeout):
                    await self._ws.aclose(code, fitting or None)
            finally:
                self._scope.cancel()
        await self._ended.wait()

    def _check(self) -> None:
        if self._lost is not None:
            raise ConnectionLost(self._lost.code, self._lost.reason)

    def _drop(self, why: str) -> None:
        """End the connection without another word. No await here: it is called from a cancelled task."""
        if self._lost is None:
            self._lost = ConnectionLost(1006, why)
        self._scope.cancel()

    def _closed(self, exc: ConnectionClosed) -> ConnectionLost:
        if self._lost is None:
            if exc.reason is None:
                self._lost = ConnectionLost(1006, "the connection broke")
            else:
                self._lost = ConnectionLost(exc.reason.code, exc.reason.reason or "")
        return ConnectionLost(self._lost.code, self._lost.reason)

    async def _run(
        self,
        stream: trio.abc.HalfCloseableStream,
        target: Target,
        headers: Sequence[tuple[str, str]],
        subprotocols: Sequence[str],
    ) -> None:
        """Own the library's reader: start it, keep what it raised, and close the stream behind it."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    with trio.CancelScope() as upgrade:
                        self._ws = await wrap_client_stream(
                            nursery,
                            _Line(stream, upgrade),  # type: ignore[arg-type]
                            target.authority,
                            target.resource,
                            subprotocols=subprotocols,
                            extra_headers=[(name.encode("ascii"), value.encode("latin-1")) for name, value in headers],
                            max_message_size=self._max_message,
                            receive_buffer_size=RECEIVE_BYTES,
                        )
                    if self._ws is None and self._lost is None:
                        self._lost = ConnectionLost(1006, f"{target.authority} closed the line during the upgrade")
                    self._settled.set()
        except* ConnectionRejected as group:
            rejected = _first(group)
            assert isinstance(rejected, ConnectionRejected)
            said = (rejected.body or b"")[:200].decode("utf-8", "replace").strip().replace("\n", " ")
            self._lost = UpgradeRefused(
                rejected.status_code, f"HTTP {rejected.status_code} from {target.authority}" + (said and f": {said}")
            )
        except* ConnectionClosed:
            pass
        except* Exception as group:
            # The crash barrier. What the library raises here is about bytes the peer sent.
            if self._lost is None:
                error = _first(group)
                self._lost = ConnectionLost(1006, f"{target.authority} does not speak WebSocket: {error}")
        finally:
            # The stream first: whoever wakes up by these events finds it closed.
            try:
                await trio.aclose_forcefully(stream)
            finally:
                # Also when this is where a cancellation of the outer block comes out.
                self._settled.set()
                self._ended.set()


class _Line(trio.abc.HalfCloseableStream):
    """The stream beneath the library. It cancels `upgrade` when the line ends, which the library tells nobody."""

    def __init__(self, stream: trio.abc.HalfCloseableStream, upgrade: trio.CancelScope) -> None:
        self._stream = stream
        self._upgrade = upgrade

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data: bytes | bytearray = b""
        try:
            data = await self._stream.receive_some(max_bytes)
        except trio.BrokenResourceError:
            pass  # A reset is an end; the library knows how to go on from one.
        finally:
            if not data:
                self._upgrade.cancel()
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        self._upgrade.cancel()
        await self._stream.aclose()


async def _connect(target: Target, ssl_context: ssl.SSLContext | None) -> trio.abc.HalfCloseableStream:
    """A TCP stream to `target`, with TLS for ``wss``."""
    where = target.authority
    try:
        tcp = await trio.open_tcp_stream(target.host, target.port)
    except _socket.gaierror as exc:
        raise ConnectionLost(1006, f"cannot find the host {target.host!r}: {exc.strerror}") from None
    except (OSError, UnicodeError) as exc:
        raise ConnectionLost(1006, _explain(exc, where)) from None
    if not target.secure:
        return tcp
    context = ssl_context or ssl.create_default_context()
    tls = trio.SSLStream(tcp, context, server_hostname=target.host, https_compatible=True)
    try:
        await tls.do_handshake()
    except (trio.BrokenResourceError, ssl.SSLError, OSError) as exc:
        await trio.aclose_forcefully(tcp)
        cause = exc.__cause__ or exc
        raise ConnectionLost(1006, f"no TLS with {where}: {cause}") from None
    except trio.Cancelled:
        await trio.aclose_forcefully(tcp)
        raise
    return tls  # type: ignore[return-value]


def _explain(exc: Exception, where: str) -> str:
    """Why TCP failed, in words. Of several addresses tried, the last one's error stands for all."""
    cause: BaseException = exc.__cause__ or exc
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[-1]
    if isinstance(cause, ConnectionRefusedError):
        return f"connection refused by {where}"
    return f"cannot reach {where}: {getattr(cause, 'strerror', None) or cause}"


def _first(group: BaseException) -> BaseException:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group
