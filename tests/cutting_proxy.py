"""A TCP proxy that cuts, stalls and resumes lines on command or after so many bytes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import trio


class CuttingProxy:
    """`url` is where clients dial. `budget` is asked at each connection: bytes from the gateway until it is cut."""

    def __init__(self, nursery: trio.Nursery, host: str, port: int, budget: Callable[[], int | None]) -> None:
        self._nursery = nursery
        self._target = host, port
        self._budget = budget
        self._lines: set[trio.CancelScope] = set()
        self._flowing = trio.Event()
        self._flowing.set()
        self.accepted = 0
        self.url = ""

    def cut(self) -> None:
        """Reset every line that is open."""
        for scope in list(self._lines):
            scope.cancel()

    def stall(self) -> None:
        """From now on bytes go nowhere, and nobody is told: a half-open line."""
        self._flowing = trio.Event()

    def resume(self) -> None:
        self._flowing.set()

    async def _serve(self, near: trio.SocketStream) -> None:
        self.accepted += 1
        budget = self._budget()
        with trio.CancelScope() as scope:
            self._lines.add(scope)
            try:
                far = await trio.open_tcp_stream(*self._target)
                async with near, far, trio.open_nursery() as nursery:
                    nursery.start_soon(self._pump, near, far, None, scope)
                    nursery.start_soon(self._pump, far, near, budget, scope)
            except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
                pass
            finally:
                self._lines.discard(scope)
        await trio.aclose_forcefully(near)

    async def _pump(
        self, source: trio.SocketStream, sink: trio.SocketStream, budget: int | None, scope: trio.CancelScope
    ) -> None:
        while data := await source.receive_some(4096):
            await self._flowing.wait()
            if budget is not None:
                data = data[:budget]
                budget -= len(data)
            await sink.send_all(data)
            if budget == 0:
                break
        scope.cancel()


@asynccontextmanager
async def open_proxy(
    address: tuple[str, int], budget: Callable[[], int | None] = lambda: None
) -> AsyncIterator[CuttingProxy]:
    async with trio.open_nursery() as nursery:
        proxy = CuttingProxy(nursery, *address, budget)
        listeners = await nursery.start(partial(trio.serve_tcp, proxy._serve, 0, host="127.0.0.1"))
        proxy.url = f"ws://127.0.0.1:{listeners[0].socket.getsockname()[1]}/ws"
        yield proxy
        nursery.cancel_scope.cancel()
