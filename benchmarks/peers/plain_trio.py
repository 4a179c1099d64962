"""Plain trio-websocket, as its documentation shows it: ``python -m benchmarks.peers.plain_trio PORT [CERT KEY]``."""

from __future__ import annotations

import ssl
import sys
from typing import Any

import orjson
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, WebSocketRequest, serve_websocket

from benchmarks.texts import piece

everyone: set[WebSocketConnection] = set()
broadcast = 0


def dump(frame: dict[str, Any]) -> str:
    return orjson.dumps(frame).decode()


async def handle(ws: WebSocketConnection, frame: dict[str, Any]) -> None:
    global broadcast
    kind = frame["type"]
    if kind == "ping":
        await ws.send_message(dump({"type": "pong", "nonce": frame["nonce"]}))
    elif kind == "ask":
        tag, interval_ms = frame["tag"], frame["interval_ms"]
        start = trio.current_time()
        for n in range(frame["count"]):
            if interval_ms:
                await trio.sleep_until(start + n * interval_ms / 1000)
            # With 0 there is nothing to do: to send is a checkpoint.
            await ws.send_message(dump({"type": "delta", "tag": tag, "n": n, "text": piece(tag, n)}))
        await ws.send_message(dump({"type": "end"}))
    elif kind == "go":
        for _ in range(frame["count"]):
            text = dump({"type": "delta", "tag": frame["tag"], "n": broadcast, "text": piece(frame["tag"], broadcast)})
            broadcast += 1
            for one in everyone:
                await one.send_message(text)
    elif kind == "hello":
        everyone.add(ws)
        await ws.send_message(dump({"type": "hello_ok"}))


async def serve(request: WebSocketRequest) -> None:
    ws = await request.accept()
    try:
        while True:
            await handle(ws, orjson.loads(await ws.get_message()))
    except ConnectionClosed:
        pass
    finally:
        everyone.discard(ws)


def main(port: str, *certificate: str) -> None:
    context = None
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
    trio.run(serve_websocket, serve, "127.0.0.1", int(port), context)


if __name__ == "__main__":
    main(*sys.argv[1:])
