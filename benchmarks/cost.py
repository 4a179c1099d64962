"""What the hot loops cost, as a count that is the same on every machine: ``python -m benchmarks.cost``.

Seconds say nothing in a review: they differ from run to run. The calls of functions that Python makes, its own and
built-in ones, do not, and what they leave allocated does not either: a needless call per delta shows as one more, at
once. So the check command counts them, and compares with the ceilings in ``cost.toml``.

The whole gateway runs, on memory streams and trio's virtual clock, with everything that is left to chance taken away:
the order in which trio runs tasks, ids, time, the garbage collector. Nothing of a client runs while it counts: what it
sends was made before, and what it gets is read, and checked, after.

Between CPython 3.11 and 3.13 the counts differ by less than the slack. Not counted: what SQLite's thread does, the
kernel, and how long a call takes. That is what ``python -m benchmarks`` is for.
"""

from __future__ import annotations

import argparse
import base64
import gc
import importlib.metadata
import itertools
import json
import logging
import platform
import sys
import tomllib
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import structlog
import trio
import trio.testing
from trio._core import _run as trio_run

from benchmarks.agents import bench
from benchmarks.load.checks import Covered
from benchmarks.texts import piece, tag
from gateway import Turn
from gateway.config import Config, Limits
from gateway.server import Gateway, open_gateway
from gateway.session import Sources
from gateway.transport.memory import MemoryByteStream, memory_pair

CEILINGS = Path(__file__).parent / "cost.toml"
SLACK = 0.05
"""How far above its ceiling a count may be: a release of trio moves it that much, a call per delta moves it more."""

PACKAGES = ("trio", "h11", "attrs", "orjson", "structlog")

Cost = dict[str, float]


class Meter:
    """Counts between `start` and `stop`.

    Attributes:
        calls: how often functions were called or, being coroutines, resumed.
        by: the same by function.
        blocks: how many more blocks of memory are allocated at `stop` than at `start`.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.blocks = 0
        self.by: Counter[str] = Counter()
        self._seen: Counter[object] = Counter()

    def start(self) -> None:
        gc.collect()
        gc.disable()
        self._seen.clear()
        self._blocks = sys.getallocatedblocks()
        sys.setprofile(self._profile)

    def stop(self) -> None:
        sys.setprofile(None)
        # The keys of the count are objects that lived before, its values small integers: it is a block or two itself.
        self.blocks = sys.getallocatedblocks() - self._blocks
        gc.enable()
        for what, times in self._seen.items():
            self.by[_name(what)] += times
        self.calls = self.by.total()

    def _profile(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            self._seen[frame.f_code] += 1
        elif event == "c_call":
            self._seen[getattr(argument, "__qualname__", "?")] += 1


def _name(what: Any) -> str:
    if isinstance(what, str):
        return what
    path = Path(what.co_filename)
    return f"{what.co_qualname} ({path.parent.name}/{path.name})"


class Client:
    """A client's end of a line in memory that holds everything: it need not read while something is counted."""

    def __init__(self, stream: MemoryByteStream) -> None:
        self._stream = stream
        self._buffer = bytearray()
        self.covered = Covered()

    @classmethod
    async def open(cls, gateway: Gateway, session: str) -> Client:
        near, far = memory_pair(capacity=1 << 30)
        gateway.serve(far)
        self = cls(near)
        self.say(UPGRADE)
        await settle()
        self.say(hello(session))
        await settle()
        await self.joined()
        return self

    async def joined(self) -> None:
        """Read what answers the upgrade and the hello."""
        await self._read()
        del self._buffer[: self._buffer.index(b"\r\n\r\n") + 4]
        (welcome,) = [one for one in await self.heard() if one["type"] == "hello_ok"]
        self.covered.cursor = welcome["cursor"]

    def say(self, data: bytes) -> None:
        self._stream.send_nowait(data)

    async def heard(self) -> list[dict[str, Any]]:
        """Everything that came, in order; the events among it have been checked."""
        await self._read()
        frames = []
        while self._buffer:
            size, start = self._buffer[1], 2
            if size > 125:
                start = 4 if size == 126 else 10
                size = int.from_bytes(self._buffer[2:start], "big")
            frames.append(json.loads(self._buffer[start : start + size]))
            del self._buffer[: start + size]
            if "first" in frames[-1]:
                self.covered.event(frames[-1])
        return frames

    async def _read(self) -> None:
        with trio.move_on_after(0.001):
            while True:
                self._buffer += await self._stream.receive_some()


def frame(value: dict[str, Any]) -> bytes:
    """A client's frame: masked, with zeros."""
    data = json.dumps(value).encode()
    size = len(data)
    head = bytes((0x81, 0x80 | size)) if size < 126 else b"\x81\xfe" + size.to_bytes(2, "big")
    return head + bytes(4) + data


UPGRADE = (
    b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %b\r\n\r\n" % base64.b64encode(bytes(16))
)


def hello(session: str) -> bytes:
    """It names a session, which is made if there is none."""
    versions = {"protocol_min": 2, "protocol_max": 2}
    return frame({"type": "hello", **versions, "agent_id": "bench", "session_id": session})


def message(content: str, number: int) -> bytes:
    return frame({"type": "message", "request_id": f"r{number}", "content": content})


async def settle() -> None:
    """Let everybody go on until they wait: virtual time passes only then."""
    await trio.sleep(0.01)


@dataclass
class Rig:
    """What a loop is given. `knock` makes the agent of a turn ``knock TAG`` send its next piece."""

    gateway: Gateway
    meter: Meter
    knock: trio.MemorySendChannel[None]


# The loops. Each warms up, then counts, then checks that all of it arrived. They return how many units were counted.


async def _answers(rig: Rig, interval: str) -> int:
    count, rounds = 200, 2
    them = [await Client.open(rig.gateway, f"s{number}") for number in range(10)]
    for round_, number in itertools.product(range(rounds), (1, count)):
        asked = []
        for place, one in enumerate(them):
            name = tag(place, 2 * round_ + (number > 1))
            one.covered.ask(name, number)
            asked.append((one, message(f"stream {name} {number}{interval}", 1000 * round_ + number)))
        counted = round_ == rounds - 1 and number == count
        if counted:
            rig.meter.start()
        for one, data in asked:
            one.say(data)
        await settle()
        if counted:
            rig.meter.stop()
        for one in them:
            await one.heard()
            assert one.covered.received == number
    return len(them) * count


async def stream(rig: Rig) -> int:
    """`Turn.send` to bytes on the line, per delta; between two deltas every other task runs."""
    return await _answers(rig, " 0")


async def bulk(rig: Rig) -> int:
    """The same, from a producer that never waits of its own accord."""
    return await _answers(rig, "")


async def fan_out(rig: Rig) -> int:
    """One delta to all connections of a session, and only then the next; per delivery."""
    events, name = 20, tag(0, 0)
    owner, *others = them = [await Client.open(rig.gateway, "fan") for _ in range(100)]
    owner.covered.ask(name)
    for one in others:
        one.covered.ask(name)
    owner.say(message(f"knock {name}", 0))
    await settle()
    for counted in (False, True):
        if counted:
            rig.meter.start()
        for _ in range(events):
            rig.knock.send_nowait(None)
            await settle()
        if counted:
            rig.meter.stop()
        for one in them:
            await one.heard()
            assert one.covered.streamed == events * (1 + counted)
    return events * len(them)


async def ping(rig: Rig) -> int:
    """`ping` to `pong`, per round trip."""
    times, data = 20, frame({"type": "ping", "nonce": 7})
    them = [await Client.open(rig.gateway, f"s{number}") for number in range(16)]
    for counted in (False, True):
        if counted:
            rig.meter.start()
        for _ in range(times):
            for one in them:
                one.say(data)
            await settle()
        if counted:
            rig.meter.stop()
        for one in them:
            pongs = [pong for pong in await one.heard() if pong["type"] == "pong"]
            assert len(pongs) == times
    return times * len(them)


async def turn(rig: Rig) -> int:
    """`message` to `turn_ended`, per turn."""
    times = 10
    them = [await Client.open(rig.gateway, f"s{number}") for number in range(16)]
    for one in them:
        one.covered.ask("", 0)
    for counted in (False, True):
        said = [message("short", 100 * counted + number) for number in range(times)]
        if counted:
            rig.meter.start()
        for data in said:
            for one in them:
                one.say(data)
            await settle()
        if counted:
            rig.meter.stop()
        for one in them:
            ended = [event for event in await one.heard() if event["type"] == "turn_ended"]
            assert len(ended) == times
    return times * len(them)


async def connect(rig: Rig) -> int:
    """From a new line to `hello_ok`, each with a session of its own; per connection."""
    count = 50
    for counted in (False, True):
        lines = [memory_pair(capacity=1 << 30) for _ in range(count)]
        them = [Client(near) for near, _ in lines]
        hellos = [hello(f"s{counted}{number}") for number in range(count)]
        if counted:
            rig.meter.start()
        for _, far in lines:
            rig.gateway.serve(far)
        for one in them:
            one.say(UPGRADE)
        await settle()
        for one, data in zip(them, hellos, strict=True):
            one.say(data)
        await settle()
        if counted:
            rig.meter.stop()
        for one in them:
            await one.joined()
    return count


LOOPS: dict[str, tuple[str, Callable[[Rig], Awaitable[int]]]] = {
    "stream": ("delta", stream),
    "bulk": ("delta", bulk),
    "fan_out": ("delivery", fan_out),
    "ping": ("round trip", ping),
    "turn": ("turn", turn),
    "connect": ("connection", connect),
}
"""Name → what it is counted per, and the loop."""


@dataclass
class Measured:
    """A loop's cost per unit, and where its calls are."""

    cost: Cost
    by: dict[str, float] = field(default_factory=dict)


def measure(name: str) -> Measured:
    """Run a loop and count. The same code gives the same numbers."""
    meter = Meter()
    units = 0

    async def main() -> None:
        nonlocal units
        ids = itertools.count(1)
        sources = Sources(
            now_ms=lambda: 1_700_000_000_000 + int(trio.current_time() * 1000),
            new_id=lambda: f"{next(ids):012}",
            chance=lambda: 0.5,
            timer=trio.current_time,
        )
        send, receive = trio.open_memory_channel[None](1)

        async def agent(turn: Turn) -> str | None:
            what, *rest = turn.input.content.split()
            if what != "knock":
                return await bench(turn)
            number = 0
            async for _ in receive:
                await turn.send(piece(rest[0], number))
                number += 1
            return None

        config = Config(limits=Limits(heartbeat_ms=3_600_000, max_pending_handshakes_per_peer=100))
        async with open_gateway(config, {"bench": agent}, sources=sources, listen=False) as gateway:
            units = await LOOPS[name][1](Rig(gateway, meter, send))
            send.close()

    # As trio's own plugin for hypothesis does: tasks run in the order in which they were made.
    trio_run._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[misc]
    trio_run._r.seed(0)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    cost = {"calls": round(meter.calls / units, 2), "blocks": round(meter.blocks / units, 2)}
    return Measured(cost, {name: times / units for name, times in meter.by.most_common()})


def ceilings(path: Path = CEILINGS) -> dict[str, Any]:
    """What may be spent, by loop, and ``measured_with``."""
    return tomllib.loads(path.read_text()) if path.exists() else {}


def compare(measured: dict[str, Cost], allowed: dict[str, Any]) -> list[str]:
    """What costs more than it may, a line each."""
    problems = []
    for name, cost in measured.items():
        per = LOOPS[name][0]
        for what, value in cost.items():
            most = allowed.get(name, {}).get(what)
            if most is None:
                problems.append(f"{name}: there is no ceiling for {what}; run python -m benchmarks.cost --write")
            elif value > most * (1 + SLACK) + 0.05:
                problems.append(
                    f"{name}: costs {value:.6g} {what} per {per}, ceiling {most:.6g}: "
                    "if it is meant, run python -m benchmarks.cost --write"
                )
    return problems


def write(measured: dict[str, Cost], path: Path = CEILINGS) -> None:
    """Make what was measured the ceilings; a loop that was not measured keeps its own."""
    costs = {name: cost for name, cost in ceilings(path).items() if name in LOOPS} | measured
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    measured_with = ", ".join([f"Python {platform.python_version()}", *versions])
    lines = [
        "# What the hot loops may cost per unit (see cost.py). Written by: python -m benchmarks.cost --write",
        f'measured_with = "{measured_with}"',
    ]
    for name in LOOPS:
        if name in costs:
            numbers = ", ".join(f"{what} = {value:.6g}" for what, value in costs[name].items())
            lines.append(f"{name} = {{ {numbers} }}")
    path.write_text("\n".join(lines) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 1 if something costs more than it may."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost", description="Count what the hot loops cost.")
    parser.add_argument("--write", action="store_true", help="make what is measured the ceilings")
    parser.add_argument("--top", type=int, default=0, metavar="N", help="show the N functions that are called most")
    parser.add_argument("--only", nargs="+", choices=LOOPS, default=list(LOOPS), metavar="LOOP", help=", ".join(LOOPS))
    given = parser.parse_args(arguments)
    measured = {name: measure(name) for name in given.only}
    for name, one in measured.items():
        print(f"{name:8} {one.cost['calls']:8.2f} calls  {one.cost['blocks']:6.2f} blocks  per {LOOPS[name][0]}")
        for function, times in list(one.by.items())[: given.top]:
            print(f"    {times:7.2f}  {function}")
    costs = {name: one.cost for name, one in measured.items()}
    if given.write:
        write(costs)
        return 0
    allowed = ceilings()
    problems = compare(costs, allowed)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        print(f"The ceilings were measured with {allowed.get('measured_with')}.", file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
