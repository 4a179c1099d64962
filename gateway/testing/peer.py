"""One WebSocket of either side that does only what it is told: nothing is read unless asked for, and what is sent may
be wrong in every way that whole messages can be. Text and binary messages, closes and cuts; wsproto does the framing.
"""

from __future__ import annotations

import socket
import struct
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

import trio
from attrs import frozen
from wsproto import ConnectionType, WSConnection
from wsproto.connection import ConnectionState
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Event,
    Ping,
    RejectConnection,
    Request,
    TextMessage,
)
from wsproto.utilities import LocalProtocolError, RemoteProtocolError

from gateway.errors import ConnectionLost
from gateway.transport.dial import parse_url

READ_BYTES = 64 * 1024


@frozen
class Ended:
    """How a connection ended: the peer's close code, 1006 if none came, or the HTTP status of a refused upgrade."""

    code: int
    reason: str = ""
    status: int | None = None


class Peer:
    """A WebSocket over a byte stream. One task uses it."""

    def __init__(self, stream: trio.abc.Stream, side: ConnectionType) -> None:
        self._stream = stream
        self._ws = WSConnection(side)
        self._messages: deque[str] = deque()
        self._parts: list[str] = []
        self._opened = False
        self.subprotocol: str | None = None
        self.ended: Ended | None = None

    # opening

    async def upgrade(
        self, host: str, resource: str, headers: Sequence[tuple[str, str]] = (), subprotocols: Sequence[str] = ()
    ) -> None:
        """As a client: open the WebSocket. `ended` is set if the server refuses."""
        extra = [(name.encode(), value.encode()) for name, value in headers]
        await self._send(Request(host=host, target=resource, extra_headers=extra, subprotocols=list(subprotocols)))
        while not self._opened and self.ended is None:
            await self._read()

    async def accept(self) -> None:
        """As a server: answer the client's upgrade."""
        while not self._opened and self.ended is None:
            await self._read()

    # talking

    async def send_text(self, text: str) -> None:
        """Send a text message. What a peer that is gone does not take is lost, which reading will tell."""
        await self._send(TextMessage(data=text))

    async def send_binary(self, data: bytes) -> None:
        """The same with a binary one."""
        await self._send(BytesMessage(data=data))

    async def send_ping(self) -> None:
        """The same with a WebSocket ping, which is not the protocol's."""
        await self._send(Ping())

    async def receive(self) -> str:
        """The next text message.

        Raises:
            ConnectionLost: there will be none; `ended` says why.
        """
        while not self._messages:
            if self.ended is not None:
                raise ConnectionLost(self.ended.code, self.ended.reason)
            await self._read()
        return self._messages.popleft()

    async def close(self, code: int, reason: str = "") -> None:
        """Say goodbye, and read on until the peer has said it too."""
        await self._send(CloseConnection(code=code, reason=reason or None))
        while self.ended is None:
            await self._read()

    async def cut(self) -> None:
        """Break the line: no close frame, and what was on the way is lost."""
        if isinstance(self._stream, trio.SocketStream):
            self._stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.ended = self.ended or Ended(1006, "cut here")
        await trio.aclose_forcefully(self._stream)

    async def aclose(self) -> None:
        await trio.aclose_forcefully(self._stream)

    # bytes

    async def _send(self, event: Event) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError, LocalProtocolError):
            await self._stream.send_all(self._ws.send(event))

    async def _read(self) -> None:
        try:
            data = await self._stream.receive_some(READ_BYTES)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            data = b""
        try:
            self._ws.receive_data(bytes(data) or None)
            for event in self._ws.events():
                await self._take(event)
        except RemoteProtocolError as exc:
            self.ended = self.ended or Ended(1006, f"not WebSocket: {exc}")
        if not data:
            self.ended = self.ended or Ended(1006, "the line ended without a close frame")

    async def _take(self, event: Event) -> None:
        if isinstance(event, TextMessage):
            self._parts.append(event.data)
            if event.message_finished:
                self._messages.append("".join(self._parts))
                self._parts = []
        elif isinstance(event, BytesMessage):
            self.ended = self.ended or Ended(1006, "the peer sent a binary message")
        elif isinstance(event, Ping):
            await self._send(event.response())
        elif isinstance(event, Request):
            self._opened = True
            await self._send(AcceptConnection())
        elif isinstance(event, AcceptConnection):
            self._opened, self.subprotocol = True, event.subprotocol
        elif isinstance(event, RejectConnection):
            self.ended = Ended(1006, f"HTTP {event.status_code}", event.status_code)
        elif isinstance(event, CloseConnection):
            self.ended = self.ended or Ended(event.code, event.reason or "")
            if self._ws.state is ConnectionState.REMOTE_CLOSING:
                await self._send(event.response())


async def open_peer(
    url: str,
    *,
    headers: Sequence[tuple[str, str]] = (),
    subprotocols: Sequence[str] = (),
    receive_buffer: int | None = None,
) -> Peer:
    """Dial a gateway (``ws://`` only) and upgrade.

    Args:
        receive_buffer: of the kernel, in bytes: a small one lets the gateway see soon that nobody reads.

    Raises:
        ConnectionLost: nobody listens there.
    """
    target = parse_url(url)
    sock = trio.socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    try:
        await sock.connect((target.host, target.port))
    except OSError as exc:
        sock.close()
        raise ConnectionLost(1006, f"cannot connect to {target.authority}: {exc}") from None
    peer = Peer(trio.SocketStream(sock), ConnectionType.CLIENT)
    await peer.upgrade(target.authority, target.resource, headers, subprotocols)
    return peer
