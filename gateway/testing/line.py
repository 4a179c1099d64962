"""One WebSocket of the fuzzer: what goes out is what a dialogue says, what comes in is judged at once.

The line also reads what it sends, with the eyes of a strict server, and so knows what is due: an answer, a close, or
nothing because a frame was left unfinished.
"""

from __future__ import annotations

import ssl
import struct
from collections.abc import Callable
from contextlib import suppress
from socket import SO_LINGER, SOL_SOCKET
from typing import Any

import trio
from attrs import frozen

from gateway.errors import ConfigError
from gateway.testing import wire
from gateway.testing.judge import (
    CLOSE_CODES,
    Dead,
    Gone,
    Internal,
    Judge,
    ServerFailure,
    Stalled,
    Untyped,
    WrongClose,
    shown,
)
from gateway.testing.wire import Closed, Control, MessageReader, Received
from gateway.transport.dial import parse_url

READ_BYTES = 65_536


@frozen(kw_only=True)
class Target:
    """The server under test. Nothing else is ever connected to.

    Args:
        url: ``ws://HOST:PORT/PATH`` or ``wss://…``.
        max_stall: seconds that an answer may take.
        trust: for ``wss``; by default the system's certificates.
    """

    url: str
    agent: str = "echo"
    token: str | None = None
    protocol: int = 2
    max_stall: float = 10.0
    trust: ssl.SSLContext | None = None

    def __attrs_post_init__(self) -> None:
        parse_url(self.url)
        if self.protocol not in (1, 2):
            raise ConfigError("protocol", f"expected 1 or 2, got {self.protocol!r}")
        if not self.max_stall > 0:
            raise ConfigError("max_stall", f"expected seconds above 0, got {self.max_stall!r}")


class Line:
    """One connection. Made by `open_line`; `run` reads until its end and belongs to whoever plays the dialogue.

    Attributes:
        judge: what may come and what is due.
        received_frames: how many frames of the gateway came.
        over: whether nothing more can be said here: cut, or closed by the gateway.
    """

    def __init__(
        self, stream: trio.abc.Stream, target: Target, judge: Judge, on_frame: Callable[[dict[str, Any]], None]
    ) -> None:
        self._stream = stream
        self._sending = trio.Lock()
        self._target = target
        self._on_frame = on_frame
        self._in = MessageReader(masked=False)
        self._out = MessageReader(masked=True)
        self._binary_sent = False
        self._pings = 0
        self._pong = b""
        self._news = trio.lowlevel.ParkingLot()
        self._polite = False
        self.judge = judge
        self.received_frames = 0
        self.cut_off = False
        self.ended = False
        self.leaving = False
        """A close frame of ours went out."""

    @property
    def over(self) -> bool:
        return self.cut_off or self.ended or self._in.closed is not None

    @property
    def closed(self) -> Closed | None:
        """The gateway's close frame."""
        return self._in.closed

    # outwards

    async def send(self, data: bytes) -> None:
        """Put bytes on the line, whatever they are.

        Raises:
            Stalled: they were not taken in time: the server does not read.
        """
        if self.over:
            await trio.lowlevel.checkpoint()
            return
        for item in self._out.feed(data):
            if isinstance(item, Received):
                if item.binary:
                    self._binary_sent = True
                elif not self._binary_sent:
                    self.judge.sent(item.payload)
            elif isinstance(item, Closed):
                self.leaving = True
        with trio.move_on_after(self._target.max_stall):
            await self._write(data)
            return
        raise Stalled(f"the server took no bytes for {self._target.max_stall:g} s")

    async def send_text(self, text: str) -> None:
        await self.send(wire.frame(wire.TEXT, text.encode()))

    async def cut(self) -> None:
        """Break the line: no close frame, and what is on its way is lost."""
        self.cut_off = True
        stream = self._stream
        if isinstance(stream, trio.SocketStream):
            with suppress(OSError):
                stream.socket.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
        await trio.aclose_forcefully(stream)
        self._news.unpark_all()

    # inwards

    async def run(self) -> None:
        """Read and judge to the end.

        Raises:
            ServerFailure: the first thing that is wrong.
        """
        data = b""
        while True:
            for item in self._in.feed(data):
                await self._take(item)
            if self._in.violation is not None:
                raise Untyped(f"not WebSocket as a server must speak it: {self._in.violation.reason}")
            self._news.unpark_all()
            try:
                data = bytes(await self._stream.receive_some(READ_BYTES))
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                data = b""
            if not data:
                break
        self.ended = True
        self._news.unpark_all()
        if self._in.closed is None and not self.cut_off:
            raise Dead("the line ended without a close frame")

    async def _take(self, item: Received | Control | Closed) -> None:
        if isinstance(item, Received):
            if item.binary:
                raise Untyped(f"a binary message: {item.payload[:40].hex()}")
            frames = self.judge.received(item.payload)
            self.received_frames += len(frames)
            for fields in frames:
                self._on_frame(fields)
                if self._polite and fields["type"] == "ping":
                    await self.send_text('{"type": "pong"}')
        elif isinstance(item, Closed):
            self._check_close(item)
            if self._out.closed is None and not self._out.mid_frame:
                # With an empty hand if ours went out already; the reply ends the line.
                code = b"" if item.code == 1005 else item.code.to_bytes(2, "big")
                await self._write(wire.frame(wire.CLOSE, code))
            elif self._out.mid_frame or self._out.violation is not None:
                # No reply can be made of what is on the line: show the end instead, or the server waits for one.
                await self._write(None)
        elif item.opcode == wire.PONG:
            self._pong = item.payload
        else:
            await self.send(wire.frame(wire.PONG, item.payload))

    async def _write(self, data: bytes | None) -> None:
        """Write, or end the writing; that the line is lost comes out where it is read."""
        async with self._sending:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                if data is not None:
                    await self._stream.send_all(data)
                elif isinstance(self._stream, trio.SocketStream):
                    await self._stream.send_eof()

    def _check_close(self, close: Closed) -> None:
        sent = self._out
        allowed = close.code in CLOSE_CODES
        if sent.violation is not None:
            allowed |= close.code in (1002, 1007)
        if sent.closed is not None:
            allowed |= close.code == sent.closed.code
        if not allowed:
            raise WrongClose(f"closed with {close.code} {close.reason!r}, which is not in the protocol's table")
        if close.code == 1011 and (sent.closed is None or sent.closed.code != 1011):
            raise Internal(f"closed with 1011 {close.reason!r}")
        if self.judge.owed and close.code == 1000 and sent.closed is None:
            raise WrongClose(f"closed with 1000 {close.reason!r} while {self.judge.owed} answers are due")

    # what is due

    async def wait_for(self, what: str, due: Callable[[], bool]) -> None:
        """Wait until something is there, or the line is over.

        Raises:
            Stalled: it did not come in time.
        """
        with trio.move_on_after(self._target.max_stall):
            while not due() and not self.ended and not self.cut_off:
                await self._news.park()
            return
        raise Stalled(f"{what} within {self._target.max_stall:g} s")

    async def sync(self) -> None:
        """Everything sent so far is answered: replies, closes, whatever is due on this line.

        Raises:
            Stalled: not in time.
        """
        out, judge = self._out, self.judge
        if judge.asked and not (out.violation or self._binary_sent or self.leaving or self.over):
            await self.wait_for("no answer to hello", lambda: judge.met)
        if self.cut_off or self.ended:
            await trio.lowlevel.checkpoint()
        elif out.violation or self._binary_sent or self.leaving or judge.ending or self._in.closed:
            await self.wait_for("no close frame", lambda: self._in.closed is not None)
            if not out.mid_frame and out.violation is None:
                await self.wait_for("no end behind the close frames", lambda: self.ended)
        elif out.mid_frame:
            await trio.lowlevel.checkpoint()  # nothing is due: the server waits for the rest
        elif judge.welcomed and not out.mid_message:
            await self.send_text('{"type": "ping", "nonce": "are you there"}')
            await self.wait_for("no answer to a ping, or to a request before it", lambda: not judge.owed)
        else:
            self._pings += 1
            payload = b"are you there %d" % self._pings
            await self.send(wire.frame(wire.PING, payload))
            await self.wait_for("no answer to a WebSocket ping", lambda: payload == self._pong)

    def be_polite(self) -> None:
        """From now on answer the gateway's own pings, as a client does that stays."""
        self._polite = True


async def open_line(target: Target, judge: Judge, on_frame: Callable[[dict[str, Any]], None]) -> Line:
    """Connect and upgrade.

    Raises:
        Gone: the server cannot be connected to.
        Stalled, Dead, Untyped: it did not answer the upgrade as it should.
    """
    address = parse_url(target.url)
    deadline = trio.current_time() + target.max_stall
    while True:
        stream = await _connect(target)
        try:
            with trio.move_on_at(deadline):
                request = wire.upgrade_request(address.authority, _resource(target), target.token)
                with suppress(trio.BrokenResourceError):
                    await stream.send_all(request)
                status, rest = await _upgraded(stream)
                if status == 101:
                    line = Line(stream, target, judge, on_frame)
                    for item in line._in.feed(rest):
                        await line._take(item)
                    return line
                # It says that it has no room just now, which is its right.
                await trio.aclose_forcefully(stream)
                await trio.sleep(0.1)
                continue
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        await trio.aclose_forcefully(stream)
        raise Stalled(f"no WebSocket within {target.max_stall:g} s: the upgrade was not answered, or refused with 503")


def _resource(target: Target) -> str:
    resource = parse_url(target.url).resource
    if target.protocol == 1 and target.token is not None and "token=" not in resource:
        resource += ("&" if "?" in resource else "?") + f"token={target.token}"
    return resource


async def _connect(target: Target) -> trio.abc.Stream:
    address = parse_url(target.url)
    with trio.move_on_after(target.max_stall):
        try:
            stream: trio.abc.Stream = await trio.open_tcp_stream(address.host, address.port)
            if address.secure:
                context = target.trust or ssl.create_default_context()
                stream = trio.SSLStream(stream, context, server_hostname=address.host, https_compatible=True)
                await stream.do_handshake()
        except (OSError, trio.BrokenResourceError) as exc:
            raise Gone(f"cannot connect to {address.authority}: {exc}") from None
        return stream
    raise Gone(f"cannot connect to {address.authority} within {target.max_stall:g} s")


async def _upgraded(stream: trio.abc.Stream) -> tuple[int, bytes]:
    """Read the answer to the upgrade: 101 and what follows it, or 503."""
    buffer = b""
    while b"\r\n\r\n" not in buffer:
        try:
            data = bytes(await stream.receive_some(READ_BYTES))
        except trio.BrokenResourceError:
            data = b""
        if not data:
            raise Dead(f"the line ended in the upgrade, after {shown(buffer)!r}")
        buffer += data
    head, _, rest = buffer.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    status = first.split(" ")[1:2]
    if status in (["503"], ["429"]):
        return 503, b""
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if status != ["101"] or headers.get("sec-websocket-accept") != wire.accept_key():
        raise Untyped(f"the upgrade was answered with {shown(buffer)!r}")
    return 101, rest


__all__ = ["Line", "ServerFailure", "Target", "open_line"]
