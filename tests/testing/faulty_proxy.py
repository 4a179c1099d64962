"""A real gateway with a fault in front of it: a proxy that does one thing wrong, once it sees an `abort` of a client.

Everything else is the gateway's own, so what a fuzzer finds is the fault.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import trio

from gateway import Config, Limits, Server, Turn, open_gateway
from gateway.testing import wire
from gateway.testing.wire import CLOSE, TEXT, Closed, Control, MessageReader, Received

EVENT = re.compile(rb'"first":|^{"type":"replay"')
"""What an event has, in either version."""


class Line:
    """One connection through the proxy."""

    def __init__(self, near: trio.SocketStream, far: trio.SocketStream, proxy: Proxy) -> None:
        self.near = near
        self.far = far
        self.proxy = proxy
        self._writing = trio.Lock()
        self.stalled = False
        self.repeat = False

    async def say(self, opcode: int, payload: bytes) -> None:
        """Send the client a frame as if the gateway had."""
        await self.write(wire.frame(opcode, payload, masked=False))

    async def write(self, data: bytes) -> None:
        async with self._writing:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await self.near.send_all(data)

    async def upwards(self) -> None:
        reader = MessageReader(masked=True)
        in_upgrade = True
        async for data in self.near:
            await self.far.send_all(data)
            if in_upgrade:
                in_upgrade = b"\r\n\r\n" not in data
                continue
            for item in reader.feed(bytes(data)):
                if isinstance(item, Received) and aborts(item.payload):
                    await self.proxy.fault(self)

    async def downwards(self) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            data = await self.far.receive_some()
            if not data:
                return
            head += data
        head, _, rest = head.partition(b"\r\n\r\n")
        await self.write(head + b"\r\n\r\n")
        reader = MessageReader(masked=False)
        while True:
            for item in reader.feed(bytes(rest)):
                if self.stalled:
                    continue
                if isinstance(item, Received):
                    await self.say(TEXT, item.payload)
                    if self.repeat and b'"seq":' in item.payload and EVENT.search(item.payload):
                        await self.say(TEXT, item.payload)
                elif isinstance(item, Control):
                    await self.say(item.opcode, item.payload)
                elif isinstance(item, Closed):
                    code = b"" if item.code == 1005 else item.code.to_bytes(2, "big")
                    await self.say(CLOSE, code + item.reason.encode())
            rest = await self.far.receive_some()
            if not rest:
                return

    async def cut(self) -> None:
        await trio.aclose_forcefully(self.near)


def aborts(payload: bytes) -> bool:
    with suppress(ValueError, RecursionError):
        frame = json.loads(payload)
        return isinstance(frame, dict) and frame.get("type") in ("abort", "message_abort")
    return False


Fault = Callable[[Line], Awaitable[None]]


async def no_fault(line: Line) -> None:
    await trio.lowlevel.checkpoint()


class Proxy:
    def __init__(self, fault: Fault, backend: tuple[str, int], listener: trio.SocketListener) -> None:
        self.fault = fault
        self.lines: list[Line] = []
        self.accepting = trio.CancelScope()
        self._backend = backend
        self._listener = listener

    @property
    def url(self) -> str:
        host, port = self._listener.socket.getsockname()[:2]
        return f"ws://{host}:{port}/ws"

    async def serve(self, near: trio.SocketStream) -> None:
        async with near, await trio.open_tcp_stream(*self._backend) as far:
            line = Line(near, far, self)
            self.lines.append(line)

            async def ended_by(side: Callable[[], Awaitable[None]]) -> None:
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await side()
                nursery.cancel_scope.cancel()

            async def upwards() -> None:
                await line.upwards()
                # The client has ended its side only; the gateway may have something to say to that.
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await far.send_eof()
                await trio.sleep_forever()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(ended_by, upwards)
                nursery.start_soon(ended_by, line.downwards)
            self.lines.remove(line)

    async def shut(self) -> None:
        """Nobody answers the door any more."""
        self.accepting.cancel()
        await self._listener.aclose()
        for line in list(self.lines):
            await line.cut()


async def echo(turn: Turn) -> str:
    return f"You said: {turn.input.content}"


@asynccontextmanager
async def proxied(fault: Fault = no_fault) -> AsyncIterator[tuple[Proxy, str]]:
    """A proxy with this fault, and the URL of the gateway behind it."""
    config = Config(server=Server(port=0, drain_timeout_ms=0), limits=Limits(close_timeout_ms=1000))
    async with open_gateway(config, {"echo": echo}) as gateway, trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        proxy = Proxy(fault, gateway.address, listener)

        async def accept() -> None:
            with proxy.accepting:
                await trio.serve_listeners(proxy.serve, [listener], handler_nursery=nursery)

        nursery.start_soon(accept)
        yield proxy, gateway.url
        nursery.cancel_scope.cancel()
