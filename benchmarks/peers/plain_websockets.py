"""`websockets` on uvloop: ``python -m benchmarks.peers.plain_websockets PORT [CERTIFICATE KEY]``."""

from __future__ import annotations

import asyncio
import ssl
import sys
from typing import Any

import orjson
import uvloop
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from benchmarks.texts import piece

everyone: set[ServerConnection] = set()
broadcast = 0


def dump(frame: dict[str, Any]) -> str:
    return orjson.dumps(frame).decode()


async def ask(ws: ServerConnection, frame: dict[str, Any]) -> None:
    tag, interval_ms = frame["tag"], frame["interval_ms"]
    loop = asyncio.get_running_loop()
    start = loop.time()
    for n in range(frame["count"]):
        if interval_ms is not None:
            await asyncio.sleep(start + n * interval_ms / 1000 - loop.time() if interval_ms else 0)
        await ws.send(dump({"type": "delta", "tag": tag, "n": n, "text": piece(tag, n)}))
    await ws.send(dump({"type": "end"}))


async def handle(ws: ServerConnection, frame: dict[str, Any]) -> None:
    global broadcast
    kind = frame["type"]
    if kind == "ping":
        await ws.send(dump({"type": "pong", "nonce": frame["nonce"]}))
    elif kind == "ask":
        await ask(ws, frame)
    elif kind == "go":
        for _ in range(frame["count"]):
            text = dump({"type": "delta", "tag": frame["tag"], "n": broadcast, "text": piece(frame["tag"], broadcast)})
            broadcast += 1
            # websockets.broadcast() would skip connections that are behind, with a warning.
            for one in everyone:
                await one.send(text)
    elif kind == "hello":
        everyone.add(ws)
        await ws.send(dump({"type": "hello_ok"}))


async def connection(ws: ServerConnection) -> None:
    try:
        async for message in ws:
            await handle(ws, orjson.loads(message))
    except ConnectionClosed:
        pass
    finally:
        everyone.discard(ws)


async def main(port: str, *certificate: str) -> None:
    context = None
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
    async with serve(connection, "127.0.0.1", int(port), ssl=context, compression=None, ping_interval=None):
        await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
