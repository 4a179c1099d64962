"""A gateway in a process of its own, to measure it: prints its port, then serves until it is killed.

Arguments, if there are any: the files of its certificate and key.
Agent ``echo`` takes a message "COUNT SIZE" and streams COUNT deltas of SIZE bytes.
"""

from __future__ import annotations

import sys

import trio

from gateway import Config, Server, Turn, open_gateway


async def flood(turn: Turn) -> None:
    count, size = map(int, turn.input.content.split())
    for n in range(count):
        await turn.send(f"{n:<{size}}")


async def main() -> None:
    files = dict(zip(("tls_certificate", "tls_key"), sys.argv[1:], strict=False))
    async with open_gateway(Config(server=Server(port=0, **files)), {"echo": flood}) as gateway:
        print(gateway.address[1], flush=True)
        await gateway.serve_forever()


if __name__ == "__main__":
    trio.run(main)
