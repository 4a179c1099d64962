"""An OpenAI-compatible server for tests, over real sockets (h11): what it does is one function per test."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import h11
import trio
from attrs import define, field


@define
class Exchange:
    """One request, and the means to answer it."""

    stream: trio.SocketStream
    connection: h11.Connection
    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    async def send(self, *events: h11.Event) -> None:
        for event in events:
            data = self.connection.send(event)
            if data:
                await self.stream.send_all(data)

    async def refuse(self, status: int, body: str = "", headers: Mapping[str, str] | None = None) -> None:
        head = {"content-length": str(len(body.encode())), **(headers or {})}
        await self.send(
            h11.Response(status_code=status, headers=list(head.items())),
            h11.Data(data=body.encode()),
            h11.EndOfMessage(),
        )

    async def begin(self, content_type: str = "text/event-stream") -> None:
        await self.send(h11.Response(status_code=200, headers=[("content-type", content_type)]))

    async def raw(self, text: str | bytes) -> None:
        await self.send(h11.Data(data=text if isinstance(text, bytes) else text.encode()))

    async def event(self, data: object) -> None:
        await self.raw(f"data: {json.dumps(data)}\n\n")

    async def delta(self, finish: str | None = None, **delta: object) -> None:
        """A chunk of the answer."""
        await self.event({"object": "chat.completion.chunk", "choices": [choice(finish, delta)]})

    async def end(self) -> None:
        await self.raw("data: [DONE]\n\n")
        await self.send(h11.EndOfMessage())

    async def answer(self, *texts: str) -> None:
        await self.begin()
        for text in texts:
            await self.delta(content=text)
        await self.delta("stop")
        await self.end()


def choice(finish: str | None, delta: Mapping[str, object]) -> dict[str, object]:
    return {"index": 0, "delta": dict(delta), "finish_reason": finish}


Behaviour = Callable[[Exchange], Awaitable[None]]


@define
class OpenAIServer:
    """`url` is the base URL; `requests` is what came; `disconnected` is set when a client went away in mid-answer."""

    behaviour: Behaviour
    url: str = ""
    requests: list[Exchange] = field(factory=list)
    disconnected: trio.Event = field(factory=trio.Event)

    async def serve(self, stream: trio.SocketStream) -> None:
        connection = h11.Connection(h11.SERVER)
        async with stream:
            request, body = None, b""
            while True:
                event = connection.next_event()
                if event is h11.NEED_DATA:
                    try:
                        connection.receive_data(await stream.receive_some())
                    except trio.BrokenResourceError:
                        return
                elif isinstance(event, h11.Request):
                    request = event
                elif isinstance(event, h11.Data):
                    body += event.data
                elif isinstance(event, h11.EndOfMessage):
                    break
                else:
                    return  # it went away without a request
            assert request is not None
            headers = {name.decode(): value.decode() for name, value in request.headers}
            exchange = Exchange(stream, connection, request.target.decode(), headers, json.loads(body))
            self.requests.append(exchange)
            async with trio.open_nursery() as nursery:

                async def watch() -> None:
                    # The client says nothing more, so whatever comes is its end.
                    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                        await stream.receive_some()
                    self.disconnected.set()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(watch)
                try:
                    await self.behaviour(exchange)
                except trio.BrokenResourceError:
                    self.disconnected.set()
                nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_openai_server(behaviour: Behaviour) -> AsyncIterator[OpenAIServer]:
    server = OpenAIServer(behaviour)
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    server.url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/v1"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, server.serve, listeners)
        yield server
        nursery.cancel_scope.cancel()
