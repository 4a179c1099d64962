"""What durability costs a stream: two gateways side by side, one in memory and one on an SQLite file, turn by turn.

    python -m benchmarks.stores --connections 100 --deltas 200 1200 --rounds 20

Per round each gateway gives a short and a long answer to all connections at once, and the one that begins changes.
Measured is the server process's CPU time, its store's thread included. The difference of the two answers is what deltas
cost; what else a turn costs (its input, its start and its output are stored, whatever its length) is in both. With
``--interval`` the agents get a delta every so many milliseconds, as from a model; without it they have all at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from gateway import Turn

TEXT = "x" * 90


async def flood(turn: Turn) -> None:
    """The agent of both: as many deltas as it is asked for, and as fast."""
    count, interval = turn.input.content.split()
    for _ in range(int(count)):
        await turn.send(TEXT)
        if interval != "0":
            await trio.sleep(float(interval) / 1000)


@dataclass(frozen=True)
class Cost:
    """Microseconds of CPU."""

    whole: float
    loop: float

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.whole - other.whole, self.loop - other.loop)

    def __truediv__(self, parts: int) -> Cost:
        return Cost(self.whole / parts, self.loop / parts)


class Server:
    """A gateway process on a core of its own."""

    def __init__(self, store: str) -> None:
        command = [sys.executable, "-m", "gateway", "run", "echo=benchmarks.stores:flood", "--store", store]
        limits = {"TRIO_GATEWAY_LIMITS_MAX_PENDING_HANDSHAKES_PER_PEER": "1000"}
        self.process = subprocess.Popen(
            [*command, "--port", "0", "--no-http"],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **limits},
            preexec_fn=lambda: os.sched_setaffinity(0, {0}),
        )
        assert self.process.stdout is not None
        self.url = ""
        for line in self.process.stdout:
            if found := re.search(r"ws://\S+/ws", line):
                self.url = found[0]
            if "stop  " in line:
                break

    def cpu(self) -> Cost:
        """Microseconds of CPU: of all threads, the store's writer is one, and of the event loop's."""
        # Nanoseconds on a CPU; ticks of 10 ms would be too coarse.
        tasks = {
            task.name: int((task / "schedstat").read_text().split()[0]) / 1e3
            for task in Path(f"/proc/{self.process.pid}/task").iterdir()
        }
        return Cost(sum(tasks.values()), tasks[str(self.process.pid)])


async def connect(url: str, count: int) -> list[Any]:
    import picows

    loop = asyncio.get_running_loop()

    class Client(picows.WSListener):
        def __init__(self) -> None:
            self.joined = loop.create_future()
            self.ended = loop.create_future()
            self.text = 0

        def on_ws_connected(self, transport: Any) -> None:
            self.transport = transport
            self.send(b'{"type":"hello","protocol_min":2,"protocol_max":2,"agent_id":"echo"}')

        def on_ws_frame(self, transport: Any, frame: Any) -> None:
            data = frame.get_payload_as_bytes()
            if data.startswith(b'{"type":"hello_ok"'):
                self.joined.set_result(None)
            elif data.startswith(b'{"type":"output"'):
                self.text += len(json.loads(data)["content"])
            elif data.startswith(b'{"type":"turn_ended"'):
                self.ended.set_result(None)

        def send(self, data: bytes) -> None:
            self.transport.send(picows.WSMsgType.TEXT, data)

    clients: list[Any] = []
    for _ in range(count):
        _, client = await picows.ws_connect(Client, url)
        clients.append(client)
    await asyncio.gather(*[client.joined for client in clients])
    return clients


async def one_round(server: Server, clients: list[Any], deltas: int, interval: float, number: int) -> Cost:
    """The server's CPU per connection."""
    loop = asyncio.get_running_loop()
    for client in clients:
        client.ended, client.text = loop.create_future(), 0
    before = server.cpu()
    for client in clients:
        client.send(b'{"type":"message","request_id":"r%d","content":"%d %g"}' % (number, deltas, interval))
    await asyncio.gather(*[client.ended for client in clients])
    used = server.cpu() - before
    assert all(client.text == deltas * len(TEXT) for client in clients), "an answer is not whole"
    return used / len(clients)


Costs = dict[str, list[tuple[Cost, Cost]]]
"""Per server and round: of the short answer and of the long one."""


async def compare(
    servers: dict[str, Server], connections: int, lengths: list[int], interval: float, rounds: int
) -> Costs:
    clients = {name: await connect(server.url, connections) for name, server in servers.items()}
    costs: Costs = {name: [] for name in servers}
    for number in range(rounds + 2):
        order = list(servers) if number % 2 else list(reversed(servers))
        for name in order:
            short, long = [
                await one_round(servers[name], clients[name], deltas, interval, 2 * number + i)
                for i, deltas in enumerate(lengths)
            ]
            if number >= 2:  # the first ones warm up
                costs[name].append((short, long))
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of a delta with SQLite and in memory.")
    parser.add_argument("--connections", type=int, default=100)
    parser.add_argument("--deltas", type=int, nargs=2, default=[200, 1200])
    parser.add_argument("--interval", type=float, default=0, help="milliseconds between two deltas of an answer")
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        servers = {"memory": Server("memory"), "sqlite": Server(f"sqlite:{folder}/s.db")}
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        try:
            costs = asyncio.run(compare(servers, given.connections, given.deltas, given.interval, given.rounds))
        finally:
            for server in servers.values():
                server.process.terminate()
    few, many = given.deltas
    per_delta = {name: [(long - short) / (many - few) for short, long in each] for name, each in costs.items()}
    for name, each in costs.items():
        cost = statistics.median([one.whole for one in per_delta[name]])
        loop = statistics.median([one.loop for one in per_delta[name]])
        turn = statistics.median([short.whole for short, _ in each]) - cost * few
        print(f"{name}: {cost:.2f} µs of CPU per delta ({loop:.2f} in the event loop), {turn:.0f} µs else per turn")
    pairs = list(zip(per_delta["sqlite"], per_delta["memory"], strict=True))
    whole = statistics.median([mine.whole / theirs.whole for mine, theirs in pairs])
    loop = statistics.median([mine.loop / theirs.loop for mine, theirs in pairs])
    print(f"per delta, sqlite / memory, median of the rounds: {whole:.3f} ({loop:.3f} in the event loop)")


if __name__ == "__main__":
    main()
