"""python-socketio on uvicorn with uvloop: ``python -m benchmarks.peers.socketio_app PORT [CERTIFICATE KEY]``.

The frames of the plain dialect are the arguments of the event ``m``, in both directions.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import orjson
import socketio
import uvicorn

from benchmarks.texts import piece


class Fast:
    """`json` as python-socketio wants it, by orjson."""

    @staticmethod
    def dumps(value: Any, **_: Any) -> str:
        return orjson.dumps(value).decode()

    loads = staticmethod(orjson.loads)


server = socketio.AsyncServer(async_mode="asgi", json=Fast, http_compression=False)
broadcast = 0


async def ask(sid: str, frame: dict[str, Any]) -> None:
    tag, interval_ms = frame["tag"], frame["interval_ms"]
    loop = asyncio.get_running_loop()
    start = loop.time()
    for n in range(frame["count"]):
        if interval_ms is not None:
            await asyncio.sleep(start + n * interval_ms / 1000 - loop.time() if interval_ms else 0)
        await server.emit("m", {"type": "delta", "tag": tag, "n": n, "text": piece(tag, n)}, to=sid)
    await server.emit("m", {"type": "end"}, to=sid)


@server.on("m")  # type: ignore[untyped-decorator, unused-ignore]
async def handle(sid: str, frame: dict[str, Any]) -> None:
    global broadcast
    kind = frame["type"]
    if kind == "ping":
        await server.emit("m", {"type": "pong", "nonce": frame["nonce"]}, to=sid)
    elif kind == "ask":
        await ask(sid, frame)
    elif kind == "go":
        for _ in range(frame["count"]):
            delta = {"type": "delta", "tag": frame["tag"], "n": broadcast, "text": piece(frame["tag"], broadcast)}
            broadcast += 1
            await server.emit("m", delta)
    elif kind == "hello":
        await server.emit("m", {"type": "hello_ok"}, to=sid)


def main(port: str, certificate: str | None = None, key: str | None = None) -> None:
    uvicorn.run(
        socketio.ASGIApp(server),
        host="127.0.0.1",
        port=int(port),
        loop="uvloop",
        http="httptools",
        ws="websockets-sansio",
        ws_per_message_deflate=False,
        ws_ping_interval=None,
        log_level="warning",
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
