"""starlette on uvicorn with uvloop and httptools: ``python -m benchmarks.peers.starlette_app PORT [CERT KEY]``."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from benchmarks.texts import piece

everyone: set[WebSocket] = set()
broadcast = 0


def dump(frame: dict[str, Any]) -> str:
    return orjson.dumps(frame).decode()


async def ask(ws: WebSocket, frame: dict[str, Any]) -> None:
    tag, interval_ms = frame["tag"], frame["interval_ms"]
    loop = asyncio.get_running_loop()
    start = loop.time()
    for n in range(frame["count"]):
        if interval_ms is not None:
            await asyncio.sleep(start + n * interval_ms / 1000 - loop.time() if interval_ms else 0)
        await ws.send_text(dump({"type": "delta", "tag": tag, "n": n, "text": piece(tag, n)}))
    await ws.send_text(dump({"type": "end"}))


async def handle(ws: WebSocket, frame: dict[str, Any]) -> None:
    global broadcast
    kind = frame["type"]
    if kind == "ping":
        await ws.send_text(dump({"type": "pong", "nonce": frame["nonce"]}))
    elif kind == "ask":
        await ask(ws, frame)
    elif kind == "go":
        for _ in range(frame["count"]):
            text = dump({"type": "delta", "tag": frame["tag"], "n": broadcast, "text": piece(frame["tag"], broadcast)})
            broadcast += 1
            for one in everyone:
                await one.send_text(text)
    elif kind == "hello":
        everyone.add(ws)
        await ws.send_text(dump({"type": "hello_ok"}))


async def connection(ws: WebSocket) -> None:
    await ws.accept()
    try:
        while True:
            await handle(ws, orjson.loads(await ws.receive_text()))
    except WebSocketDisconnect:
        pass
    finally:
        everyone.discard(ws)


def main(port: str, certificate: str | None = None, key: str | None = None) -> None:
    app = Starlette(routes=[WebSocketRoute("/ws", connection)])
    uvicorn.run(
        app,
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
