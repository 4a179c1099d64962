"""A storm: clients send and stream while the gateway is killed with SIGKILL, again and again.

    python tests/system/storm.py --kills 200 --sessions 50 --seed 7

What is checked, from outside, with a client that shares no code with the gateway:

- every input whose `accepted` said ``durable`` is in exactly one `turn_started` or `withdrawn`
- no number ever means two things within an epoch; every event covers the numbers after the client's cursor
- every turn that started ends exactly once; a repeated `request_id` is never a second input
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio
import trio_websocket

HERE = Path(__file__).parent
Json = dict[str, Any]


class Process:
    """A gateway process that can be killed and started again on the same port and file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: trio.Process | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/ws"

    async def start(self) -> None:
        """Start it and wait until it listens."""
        (self._folder / "gateway.toml").write_text(
            "[limits]\nreplay_max_events = 1000000\nmax_pending_handshakes_per_peer = 1000\n"
        )
        arguments = [
            sys.executable,
            "-m",
            "gateway",
            "run",
            "storm_agent:storm",
            "--no-http",
            "--config",
            "gateway.toml",
        ]
        arguments += ["--port", str(self.port), "--store", "sqlite:storm.db", "--log-format", "json"]
        environment = {**os.environ, "PYTHONPATH": str(HERE), "PYTHONUNBUFFERED": "1"}
        with (self._folder / "gateway.log").open("ab") as log:
            self._process = await trio.lowlevel.open_process(
                arguments, cwd=self._folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment
            )

    async def wait_listening(self) -> None:
        while True:
            try:
                stream = await trio.open_tcp_stream("127.0.0.1", self.port)
            except OSError:
                assert self._process is not None
                assert self._process.poll() is None, (self._folder / "gateway.log").read_text()[-3000:]
                await trio.sleep(0.02)
            else:
                await stream.aclose()
                return

    async def end(self, number: int) -> int:
        """Send a signal and wait for the end; returns the exit code."""
        assert self._process is not None
        self._process.send_signal(number)
        return await self._process.wait()


class Client:
    """One conversation, as a client that knows only the protocol."""

    def __init__(self, name: str, chance: random.Random) -> None:
        self.session_id = name
        self._chance = chance
        self.cursor = 0
        self.epoch: str | None = None
        self.accepted: dict[str, int] = {}  # durable ones: request_id → seq
        self.meanings: dict[int, str] = {}
        self.started: dict[str, list[str]] = {}
        self.withdrawn: list[str] = []
        self.turns: dict[str, int] = {}
        self.ended: dict[str, int] = {}
        self.connections = 0
        self.snapshots = 0
        self._sent = 0
        self.problems: list[str] = []

    def event(self, event: Json) -> None:
        seq, first, kind = event["seq"], event["first"], event["type"]
        if kind in ("delta", "progress"):
            meaning = f"{kind} {event['turn_id']}"  # merged deltas share their last number
        else:
            meaning = json.dumps({key: value for key, value in event.items() if key != "first"}, sort_keys=True)
        known = self.meanings.setdefault(seq, meaning)
        if known != meaning:
            self.problems.append(f"{self.session_id}: {seq} was {known}, now {meaning}")
        if seq <= self.cursor:
            self.problems.append(f"{self.session_id}: {seq} came twice, the cursor is {self.cursor}")
        if first > self.cursor + 1:
            self.problems.append(f"{self.session_id}: gap from {self.cursor} to {first}")
        self.cursor = max(self.cursor, seq)
        if kind == "turn_started":
            self.turns[event["turn_id"]] = self.turns.get(event["turn_id"], 0) + 1
            for request_id in event["request_ids"]:
                self.started.setdefault(request_id, []).append(event["turn_id"])
        elif kind == "withdrawn":
            self.withdrawn.append(event["request_id"])
        elif kind == "turn_ended":
            self.ended[event["turn_id"]] = self.ended.get(event["turn_id"], 0) + 1

    async def run(self, process: Process, until: trio.Event) -> None:
        """Connect, send, read, and come back, until told to stop."""
        while not until.is_set():
            try:
                with trio.fail_after(10):
                    ws = await trio_websocket.connect_websocket_url(self._nursery, process.url)
            except (OSError, trio_websocket.HandshakeError, trio.TooSlowError):
                await trio.sleep(0.02 + self._chance.random() * 0.1)
                continue
            try:
                await self._converse(ws, until)
            except* trio_websocket.ConnectionClosed:
                pass  # killed again
            finally:
                with trio.move_on_after(0.5, shield=True):
                    await ws.aclose()

    _nursery: trio.Nursery

    async def hello(self, ws: trio_websocket.WebSocketConnection, *, since: int | None = None) -> Json:
        hello: Json = {"type": "hello", "protocol_min": 2, "protocol_max": 2, "agent_id": "storm"}
        hello |= {"session_id": self.session_id, "since": self.cursor if since is None else since}
        if self.epoch is not None:
            hello["epoch"] = self.epoch
        await ws.send_message(json.dumps(hello))
        answer: Json = json.loads(await ws.get_message())
        return answer

    async def _converse(self, ws: trio_websocket.WebSocketConnection, until: trio.Event) -> None:
        answer = await self.hello(ws)
        if answer["type"] != "hello_ok":
            if not answer.get("retryable"):
                self.problems.append(f"{self.session_id}: {answer}")
            return
        self.connections += 1
        if self.epoch not in (None, answer["epoch"]):
            self.problems.append(f"{self.session_id}: the epoch changed")
        self.epoch = answer["epoch"]
        if answer["resync_required"]:
            # Right for a session of which nothing durable had been answered; wrong for any other.
            if self.accepted:
                self.problems.append(f"{self.session_id}: resync {answer['resync_reason']} at {self.cursor}")
            self.snapshots += 1
            self.cursor = answer["cursor"]

        async def send() -> None:
            while not until.is_set():
                # A repetition now and then: the answer to the original may have been lost.
                if self._sent == 0 or self._chance.random() > 0.2:
                    self._sent += 1
                request_id = f"r{self._sent}"
                frame = {"type": "message", "request_id": request_id, "content": f"content of {request_id}"}
                await ws.send_message(json.dumps(frame))
                await trio.sleep(self._chance.random() * 0.15)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(_ignoring_close, send)
            while not until.is_set():
                frame = json.loads(await ws.get_message())
                if "seq" in frame and frame["type"] != "accepted":
                    self.event(frame)
                elif frame["type"] == "accepted":
                    known = self.accepted.get(frame["request_id"])
                    if known not in (None, frame["seq"]):
                        self.problems.append(f"{self.session_id}: {frame['request_id']} is {known} and {frame['seq']}")
                    if frame["durable"]:
                        self.accepted[frame["request_id"]] = frame["seq"]
            nursery.cancel_scope.cancel()

    async def settle(self, process: Process) -> None:
        """Read the whole history from its start, until nothing is queued or running."""
        again = Client(self.session_id, self._chance)
        again.epoch = self.epoch
        again.meanings = self.meanings  # what was seen live must be what is replayed
        ws = await trio_websocket.connect_websocket_url(self._nursery, process.url)
        answer = await again.hello(ws, since=0)
        assert answer["type"] == "hello_ok", answer
        if answer["resync_required"]:
            self.problems.append(f"{self.session_id}: the history is not complete: {answer['resync_reason']}")
        missing = set(self.accepted)
        while missing or again.turns.keys() != again.ended.keys():
            with trio.move_on_after(60) as scope:
                frame = json.loads(await ws.get_message())
            if scope.cancelled_caught:
                self.problems.append(f"{self.session_id}: never ran {sorted(missing)[:5]} ({len(missing)})")
                break
            if "seq" in frame and frame["type"] != "accepted":
                again.event(frame)
                missing -= set(frame.get("request_ids", ()))
                if frame["type"] == "withdrawn":
                    missing.discard(frame["request_id"])
        self.problems += again.problems
        for request_id in self.accepted:
            places = len(again.started.get(request_id, ())) + again.withdrawn.count(request_id)
            if places != 1:
                self.problems.append(f"{self.session_id}: {request_id} is in {places} places")
        for turn_id, times in again.turns.items():
            if times != 1 or again.ended.get(turn_id) != 1:
                self.problems.append(f"{self.session_id}: {turn_id} started {times}, ended {again.ended.get(turn_id)}")
        await ws.aclose()


async def _ignoring_close(function: Any) -> None:
    with suppress(trio_websocket.ConnectionClosed):
        await function()


async def storm(folder: Path, *, kills: int, sessions: int, seed: int) -> Json:
    """Run a storm in `folder`; returns what happened. An empty ``problems`` is what it is about."""
    chance = random.Random(seed)
    process = Process(folder)
    process.port = await _free_port()
    clients = [Client(f"storm-{i}", random.Random(chance.random())) for i in range(sessions)]
    await process.start()
    await process.wait_listening()
    until = trio.Event()
    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as running:
            for client in clients:
                client._nursery = nursery
                running.start_soon(client.run, process, until)
            for _ in range(kills):
                await trio.sleep(0.2 + chance.random() * 0.8)
                await process.end(signal.SIGKILL)
                await process.start()
                await process.wait_listening()
            await trio.sleep(0.5)
            until.set()
            running.cancel_scope.cancel()
        async with trio.open_nursery() as settling:
            for client in clients:
                settling.start_soon(client.settle, process)
        code = await process.end(signal.SIGTERM)
        nursery.cancel_scope.cancel()
    return {
        "seed": seed,
        "kills": kills,
        "sessions": sessions,
        "durable_inputs": sum(len(client.accepted) for client in clients),
        "connections": sum(client.connections for client in clients),
        "numbers_seen": sum(len(client.meanings) for client in clients),
        "exit_code": code,
        "problems": [problem for client in clients for problem in client.problems],
    }


async def _free_port() -> int:
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    port: int = listener.socket.getsockname()[1]
    await listener.aclose()
    return port


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--sessions", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:

        async def run() -> Json:
            return await storm(Path(folder), kills=options.kills, sessions=options.sessions, seed=options.seed)

        result = trio.run(run)
        if result["problems"]:
            print((Path(folder) / "gateway.log").read_text()[-4000:], file=sys.stderr)
    print(json.dumps(result, indent=2))
    return bool(result["problems"])


if __name__ == "__main__":
    sys.exit(main())
