"""The agents that the gateway serves in these runs. A message names what is wanted: ``stream TAG COUNT [INTERVAL_MS]``.

The peers do the same work; `benchmarks.peers` says what the interval means.
"""

from __future__ import annotations

import socket

import trio

from benchmarks.texts import piece
from gateway import Turn


async def bench(turn: Turn) -> str | None:
    """Serve one workload's turn."""
    what, *rest = turn.input.content.split()
    if what == "stream":
        tag, count, *interval_ms = rest
        if interval_ms:
            await _paced(turn, tag, int(count), float(interval_ms[0]) / 1000)
        else:
            for number in range(int(count)):
                await turn.send(piece(tag, number))
    elif what == "fan":
        await _fan(turn, rest[0], int(rest[1]))
    elif what == "tools":
        for _ in range(int(rest[0])):
            await turn.tool_result("call_1", rest[1])
    else:
        return turn.input.content
    return None


async def _paced(turn: Turn, tag: str, count: int, interval: float) -> None:
    start = trio.current_time()
    for number in range(count):
        if interval:
            await trio.sleep_until(start + number * interval)
        else:
            await trio.lowlevel.checkpoint()
        await turn.send(piece(tag, number))


async def _fan(turn: Turn, tag: str, port: int) -> None:
    """Send as many deltas as each datagram says; 0 ends the turn.

    A datagram costs a few microseconds per event, of which there are hundreds of deliveries; a message to the session
    would be an event itself.
    """
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as knocks:
        await knocks.bind(("127.0.0.1", port))
        number = 0
        while count := int(await knocks.recv(16)):
            for _ in range(count):
                await turn.send(piece(tag, number))
                number += 1
