"""The workloads, as the load generator drives them. Each returns what it measured, by name, as numbers.

Names end in their unit. `own_share` is the generator's own processor seconds per second, `others_share` what else ran
on the server's core: with the first near 1, or the second far from 0, a run says less about the server.
"""

from __future__ import annotations

import asyncio
import functools
import math
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any

from benchmarks.load.checks import ContentError
from benchmarks.load.clients import FAN_SESSION, FAN_TAG, Client, GatewayClient, Tally, Target
from benchmarks.processes import busy_seconds, cpu_seconds, resident_bytes

AT_ONCE = 16
"""Connections that are being opened at the same time, where that is not the point: no server's backlog overflows."""

PATIENCE = 120.0
"""Seconds until a run is given up. Nothing is measured with it."""

SLACK = 2.0
"""Seconds for thousands of sessions to start."""

Measured = dict[str, float]

Load = Callable[..., Coroutine[Any, Any, Measured]]

LOADS: dict[str, Load] = {}


def load(run: Load) -> Load:
    """Register a load. It ends with the first thing that is wrong, or after `PATIENCE`."""

    @functools.wraps(run)
    async def bounded(target: Target, **parameters: Any) -> Measured:
        task = asyncio.current_task()
        assert task is not None
        tally = Tally(task)
        try:
            async with asyncio.timeout(PATIENCE):
                return await run(target, tally, **parameters)
        except TimeoutError:
            raise ContentError(f"nothing came for too long: {tally.pieces} pieces in {tally.frames} frames") from None
        except asyncio.CancelledError:
            if tally.error is None:
                raise
            raise tally.error from None

    LOADS[run.__name__] = bounded
    return bounded


class Window:
    """What is measured, from its making to `close`."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._start = self._now()

    def _now(self) -> tuple[float, ...]:
        target = self._target
        return time.perf_counter(), cpu_seconds(target.pid), time.process_time(), busy_seconds(target.core)

    def close(self) -> Measured:
        """Seconds of the clock and of the server's processor, and the shares named above."""
        wall, cpu, own, busy = (now - then for now, then in zip(self._now(), self._start, strict=True))
        return {"wall_s": wall, "cpu_s": cpu, "own_share": own / wall, "others_share": max(0.0, busy - cpu) / wall}


async def connect(target: Target, tally: Tally, numbers: Iterable[int], **how: Any) -> list[Client]:
    """Open connections, a few at a time."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> Client:
        async with gate:
            return await Client.open(target, tally, number, **how)

    return list(await asyncio.gather(*map(one, numbers)))


def percentile(values: list[float], share: float) -> float:
    """The smallest value that `share` of them do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


@load
async def stream(
    target: Target, tally: Tally, *, clients: int, count: int, interval_ms: float | None, seconds: float
) -> Measured:
    """Everyone asks, takes the whole answer, and asks again. Measured from when all of them are under way, for the time
    given, and at least until each has taken one more answer."""
    them = await connect(target, tally, range(clients))
    left: set[int] = set()
    all_answered = asyncio.Event()
    enough = False

    async def ask(client: Client) -> None:
        while not enough:
            await client.ask(count, interval_ms)
            left.discard(client.number)
            if not left:
                all_answered.set()

    async def everybody() -> None:
        left.update(range(clients))
        all_answered.clear()
        await all_answered.wait()

    async with asyncio.TaskGroup() as group:
        for client in them:
            group.create_task(ask(client))
        await everybody()
        tally.first.clear()
        before = tally.pieces, tally.frames
        window = Window(target)
        await asyncio.gather(asyncio.sleep(seconds), everybody())
        measured = window.close()
        after = tally.pieces, tally.frames
        first = tally.first.copy()
        enough = True
    deltas, frames = after[0] - before[0], after[1] - before[1]
    measured |= {
        "deltas": deltas,
        "cpu_us_per_delta": measured["cpu_s"] / deltas * 1e6,
        "deltas_per_s": deltas / measured["wall_s"],
        "deltas_per_frame": deltas / frames,
        "first_delta_p50_ms": percentile(first, 0.5) * 1e3,
        "first_delta_p99_ms": percentile(first, 0.99) * 1e3,
    }
    if isinstance(them[0], GatewayClient):
        # The rest came in outputs that overtook them.
        streamed = sum(one.covered.streamed for one in them if isinstance(one, GatewayClient))
        measured["streamed_share"] = streamed / tally.pieces
    return measured


@load
async def ask(target: Target, tally: Tally, *, clients: int, count: int, pause_ms: float, seconds: float) -> Measured:
    """Everyone streams as in `stream`; one more asks for a word, pauses, and asks again."""
    them = await connect(target, tally, range(clients))
    questions = Tally(tally.task)
    [asker] = await connect(target, questions, [clients])
    window = Window(target)
    until = time.perf_counter() + seconds

    async def listen(client: Client) -> None:
        while time.perf_counter() < until:
            await client.ask(count, 0)

    async def now_and_then() -> None:
        await asyncio.sleep(seconds / 10)  # until all are under way
        while time.perf_counter() < until:
            await asker.ask(1, 0)
            await asyncio.sleep(pause_ms / 1000)

    try:
        await asyncio.gather(now_and_then(), *map(listen, them))
    finally:
        tally.error = tally.error or questions.error
    return window.close() | {
        "asked": len(questions.first),
        "first_delta_p50_ms": percentile(questions.first, 0.5) * 1e3,
        "first_delta_p99_ms": percentile(questions.first, 0.99) * 1e3,
    }


@load
async def scale(
    target: Target, tally: Tally, *, few: int, many: int, rate: float, settle: float, seconds: float
) -> Measured:
    """A number of sessions stream `rate` deltas a second in all; then many more stream the same in all."""
    cost = []
    measured: Measured = {}
    for round_, clients in enumerate((few, many)):
        interval = clients / rate
        # Those that start first go on until all have started, for which there are `SLACK` seconds.
        count = math.ceil((SLACK + settle + seconds) / interval) + 1
        them = await connect(target, tally, range(round_ * few, round_ * few + clients))

        async def ask(client: Client, place: float, interval: float = interval, count: int = count) -> None:
            await asyncio.sleep(place * interval)
            await client.ask(count, interval * 1e3)

        asked = asyncio.gather(*[ask(one, place / clients) for place, one in enumerate(them)])
        await asyncio.gather(*[one.heard_of for one in them])
        await asyncio.sleep(settle)
        before = tally.pieces
        window = Window(target)
        await asyncio.sleep(seconds)
        measured = window.close()
        deltas = tally.pieces - before
        if not 0.5 < deltas / (rate * seconds) < 1.5:
            raise ContentError(f"{deltas / seconds:,.0f} deltas/s from {clients} sessions where {rate:,.0f} were asked")
        cost.append(measured["cpu_s"] / deltas * 1e6)
        await asked
        for one in them:
            one.close()
    return measured | {"few_cpu_us_per_delta": cost[0], "many_cpu_us_per_delta": cost[1], "ratio": cost[1] / cost[0]}


@load
async def fan(target: Target, tally: Tally, *, clients: int, burst: int, seconds: float) -> Measured:
    """Events for everyone, `burst` at a time; the next when everyone has them."""
    owner, *others = them = await connect(target, tally, [0], fan=True, session=FAN_SESSION)
    knocks = None
    if isinstance(owner, GatewayClient):
        owner.message(f"fan {FAN_TAG} {target.knock}", FAN_TAG, None)
        knocks = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        knocks.connect(("127.0.0.1", target.knock))
    others += await connect(target, tally, range(1, clients), fan=True, session=FAN_SESSION)
    them += others

    def go(count: int) -> None:
        if knocks is not None:
            knocks.send(b"%d" % count)
        else:
            owner.go(count)

    async def events(many: int) -> None:
        go(many)
        await tally.reach(tally.pieces + many * clients)

    if knocks is not None:
        while not tally.pieces:  # until the agent listens, datagrams are lost
            await asyncio.sleep(0.05)
            try:
                go(1)
            except ConnectionRefusedError:
                continue
            await asyncio.sleep(0.5)
        await tally.reach(-(-tally.pieces // clients) * clients)
    for _ in range(5):
        await events(burst)
    before, frames = tally.pieces, tally.frames
    window = Window(target)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        await events(burst)
    measured = window.close()
    deliveries = tally.pieces - before
    return measured | {
        "deliveries": deliveries,
        "cpu_us_per_delivery": measured["cpu_s"] / deliveries * 1e6,
        "deltas_per_frame": deliveries / (tally.frames - frames),
    }


async def _closed_loop(
    target: Target, them: list[Client], once: Callable[[Client], Awaitable[Any]], seconds: float
) -> tuple[Measured, int]:
    """Everyone does `once` again and again. What was measured, and how often it was done."""
    done = 0
    until = 0.0

    async def loop(client: Client) -> None:
        nonlocal done
        while time.perf_counter() < until:
            await once(client)
            done += 1

    until = time.perf_counter() + seconds / 5
    await asyncio.gather(*map(loop, them))  # to warm up
    done = 0
    window = Window(target)
    until = time.perf_counter() + seconds
    await asyncio.gather(*map(loop, them))
    return window.close(), done


@load
async def ping(target: Target, tally: Tally, *, clients: int, seconds: float) -> Measured:
    """`ping` → `pong`, one at a time per connection."""
    them = await connect(target, tally, range(clients))
    measured, done = await _closed_loop(target, them, lambda client: client.ping(), seconds)
    return measured | {"cpu_us_per_ping": measured["cpu_s"] / done * 1e6, "pings_per_s": done / measured["wall_s"]}


@load
async def turn(target: Target, tally: Tally, *, clients: int, seconds: float) -> Measured:
    """`message` → accepted, input, turn_started, output, turn_ended."""
    them = await connect(target, tally, range(clients))

    def once(client: Client) -> Awaitable[Any]:
        assert isinstance(client, GatewayClient)
        return client.message("short")

    measured, done = await _closed_loop(target, them, once, seconds)
    return measured | {"cpu_us_per_turn": measured["cpu_s"] / done * 1e6, "turns_per_s": done / measured["wall_s"]}


@load
async def hello(target: Target, tally: Tally, *, clients: int) -> Measured:
    """Connect and join, each a session of its own."""
    await connect(target, tally, range(clients // 10))
    window = Window(target)
    await connect(target, tally, range(clients))
    measured = window.close()
    return measured | {
        "cpu_us_per_hello": measured["cpu_s"] / clients * 1e6,
        "hellos_per_s": clients / measured["wall_s"],
    }


@load
async def idle(target: Target, tally: Tally, *, clients: int) -> Measured:
    """Memory that joined connections take that do nothing, after some that had it allocated what all share."""
    await connect(target, tally, range(clients // 10))
    await asyncio.sleep(0.5)
    before = resident_bytes(target.pid)
    window = Window(target)
    await connect(target, tally, range(clients))
    await asyncio.sleep(0.5)
    measured = window.close()
    return measured | {"rss_kb_per_connection": (resident_bytes(target.pid) - before) / clients / 1024}


@load
async def storm(target: Target, tally: Tally, *, clients: int, events: int, within: float) -> Measured:
    """Clients come back within `within` seconds, each with `events` to replay; how long until all are live."""
    sessions = []
    for one in await connect(target, tally, range(clients)):
        assert isinstance(one, GatewayClient)
        # input, turn_started and turn_ended are events as well
        await one.message(f"tools {events - 3} {'x' * 90}")
        if one.covered.cursor != events:
            raise ContentError(f"{one.covered.cursor} events where {events} were asked for")
        sessions.append(one.session)
        one.close()
    await asyncio.sleep(0.5)
    late: list[float] = []
    start = time.perf_counter()
    window = Window(target)

    async def back(number: int) -> None:
        at = start + number / clients * within
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        one = await Client.open(target, tally, number, session=sessions[number], since=0)
        await one.ping()
        late.append(time.perf_counter() - at)

    await asyncio.gather(*map(back, range(clients)))
    measured = window.close()
    return measured | {
        "all_live_s": measured["wall_s"],
        "cpu_us_per_event": measured["cpu_s"] / clients / events * 1e6,
        "live_p99_s": percentile(late, 0.99),
    }
