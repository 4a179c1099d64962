"""A server that does as little as one can: ``python -m benchmarks.peers.raw_picows PORT [CERTIFICATE KEY]``.

It shows what the load generator can take. An answer is made once per tag and count and written in one piece.
"""

from __future__ import annotations

import ssl
import sys

import orjson
import picows
import uvloop

from benchmarks.texts import piece

TEXT = picows.WSMsgType.TEXT
everyone: set[picows.WSTransport] = set()
broadcast = 0


def frame(value: dict[str, object]) -> bytes:
    data = orjson.dumps(value)
    size = len(data)
    return (bytes((0x81, size)) if size < 126 else b"\x81\x7e" + size.to_bytes(2, "big")) + data


def delta(tag: str, n: int) -> dict[str, object]:
    return {"type": "delta", "tag": tag, "n": n, "text": piece(tag, n)}


class Raw(picows.WSListener):
    def on_ws_frame(self, transport: picows.WSTransport, message: picows.WSFrame) -> None:
        global broadcast
        if message.msg_type != TEXT:
            return
        given = orjson.loads(message.get_payload_as_bytes())
        kind = given["type"]
        if kind == "ping":
            transport.send(TEXT, orjson.dumps({"type": "pong", "nonce": given["nonce"]}))
        elif kind == "ask":
            frames = [frame(delta(given["tag"], n)) for n in range(given["count"])]
            transport.underlying_transport.write(b"".join([*frames, frame({"type": "end"})]))
        elif kind == "go":
            for _ in range(given["count"]):
                data = orjson.dumps(delta(given["tag"], broadcast))
                broadcast += 1
                for one in everyone:
                    one.send(TEXT, data)
        elif kind == "hello":
            everyone.add(transport)
            transport.send(TEXT, b'{"type":"hello_ok"}')

    def on_ws_disconnected(self, transport: picows.WSTransport) -> None:
        everyone.discard(transport)


async def main(port: str, *certificate: str) -> None:
    context = None
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
    server = await picows.ws_create_server(lambda request: Raw(), "127.0.0.1", int(port), ssl=context)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
