"""What sessions cost in memory: resting ones nothing, live ones a share of a budget.

    python -m benchmarks.memory --resting 10000 --live 2000

A gateway process on an SQLite file is measured from outside (resident memory, ``/proc``). First sessions come, talk and
go, and are put to rest; then others stay connected and talk until their histories are larger than the budget.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gateway import Limits, Turn

MIB = 1024 * 1024


async def answer(turn: Turn) -> str:
    """The agent: as many characters as it is asked for."""
    return "x" * int(turn.input.content)


class Gateway:
    """The process."""

    def __init__(self, folder: str, **limits: int) -> None:
        command = [sys.executable, "-m", "gateway", "run", "echo=benchmarks.memory:answer", "--no-http", "--port", "0"]
        given = {"max_pending_handshakes_per_peer": 10_000, "max_pending_handshakes": 10_000, **limits}
        variables = {f"TRIO_GATEWAY_LIMITS_{name.upper()}": str(value) for name, value in given.items()}
        # Threads of malloc would add arenas of their own, which say nothing about sessions.
        self.process = subprocess.Popen(
            [*command, "--store", f"sqlite:{folder}/s.db"],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "MALLOC_ARENA_MAX": "2", **variables},
        )
        assert self.process.stdout is not None
        self.url = ""
        for line in self.process.stdout:
            if found := re.search(r"ws://\S+/ws", line):
                self.url = found[0]
            if "stop  " in line:
                break

    def resident(self) -> float:
        """MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) / 1024

    def end(self) -> None:
        self.process.terminate()
        self.process.wait()


async def talk(url: str, turns: int, size: int) -> Any:
    """Open a session and have some turns. Returns the transport, still connected."""
    import picows

    news: asyncio.Queue[bytes] = asyncio.Queue()

    class Client(picows.WSListener):
        def on_ws_frame(self, transport: Any, frame: Any) -> None:
            head = frame.get_payload_as_bytes()[:24]
            if head.startswith((b'{"type":"hello_ok"', b'{"type":"turn_ended"')):
                news.put_nowait(head)

    transport, _ = await picows.ws_connect(Client, url)
    transport.send(picows.WSMsgType.TEXT, b'{"type":"hello","protocol_min":2,"protocol_max":2,"agent_id":"echo"}')
    await news.get()
    for n in range(turns):
        message = b'{"type":"message","request_id":"r%d","content":"%d"}' % (n, size)
        transport.send(picows.WSMsgType.TEXT, message)
        await news.get()
    return transport


async def many(url: str, count: int, turns: int, size: int, *, stay: bool) -> list[Any]:
    left = iter(range(count))
    transports: list[Any] = []

    async def work() -> None:
        for _ in left:
            transport = await talk(url, turns, size)
            if stay:
                transports.append(transport)
            else:
                transport.disconnect()

    await asyncio.gather(*[work() for _ in range(50)])
    return transports


def resting(count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        gateway = Gateway(folder, idle_session_ms=500)
        sizes = []
        # The first ones bring the process to its working size: code, caches of SQLite, the allocator's pools.
        for sessions in (1_000, count):
            asyncio.run(many(gateway.url, sessions, 3, 1_000, stay=False))
            time.sleep(5)
            sizes.append(gateway.resident())
        gateway.end()
    print(f"resting: {sizes[0]:.0f} MiB after 1,000 sessions, {sizes[1]:.0f} MiB after {count:,} more")


def live(count: int, turns: int, size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        gateway = Gateway(folder)

        async def run() -> None:
            before = gateway.resident()
            transports = await many(gateway.url, count, 1, 10, stay=True)
            connected = gateway.resident()
            for transport in transports:
                transport.disconnect()
            transports = await many(gateway.url, count, turns, size, stay=True)
            await asyncio.sleep(15)  # the watch has all sessions keep to their share every ten seconds
            budget, history = Limits().all_tails_max_bytes / MIB, count * turns * size / MIB
            print(f"live: {before:.0f} MiB at the start, {connected:.0f} MiB with {count:,} new sessions,")
            print(
                f"{gateway.resident():.0f} MiB with {history:.0f} MiB of history, {budget:.0f} of it in memory at most"
            )

        asyncio.run(run())
        gateway.end()


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of resting and of live sessions.")
    parser.add_argument("--resting", type=int, default=10_000)
    parser.add_argument("--live", type=int, default=2_000)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--size", type=int, default=16_000)
    given = parser.parse_args()
    if given.resting:
        resting(given.resting)
    if given.live:
        live(given.live, given.turns, given.size)


if __name__ == "__main__":
    main()
