"""How long a gateway takes from its start to "listening" on a file with many sessions in it.

python tests/system/start.py --sessions 100000 --unfinished 100 --runs 5
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import trio

from gateway.protocol import codec
from gateway.protocol import messages as m
from gateway.protocol.keys import digest_of
from gateway.store import SessionRecord, Stored
from gateway.store.sqlite import SqliteStore

WRITERS = 500
"""Sessions written at once: they share the store's transactions."""


def conversation(n: int, finished: bool) -> list[Stored]:
    """A short one: a question and its answer, or a question that waits."""
    events: list[m.Event] = [m.Input(request_id=m.RequestId("r1"), content=f"question {n}", sender="alice")]
    if finished:
        events += [
            m.TurnStarted(turn_id="t1", request_ids=["r1"], attempt=1),
            m.Output(turn_id="t1", channel="answer", content="an answer of some length " * 8),
            m.TurnEnded(turn_id="t1", outcome="completed"),
        ]
    batch = []
    for seq, event in enumerate(events, 1):
        event.seq = event.first = seq
        event.at = 1_700_000_000_000 + n
        digest = digest_of(event.content, event.metadata) if isinstance(event, m.Input) else None
        batch.append(Stored(event, codec.encode_event(event, seq), digest))
    return batch


async def fill(path: Path, sessions: int, unfinished: int) -> None:
    """Write a file as gateways would have; the last `unfinished` sessions have an input that waits."""
    numbers = iter(range(sessions))
    async with SqliteStore(path, durability="normal") as store, trio.open_nursery() as nursery:

        async def write() -> None:
            for n in numbers:
                record = SessionRecord(f"s{n}", "echo", "anonymous", f"e_{n}", 1_700_000_000_000 + n)
                await store.create(record, 1024)
                await store.append(record.session_id, conversation(n, n < sessions - unfinished), 1024)

        for _ in range(min(WRITERS, sessions)):
            nursery.start_soon(write)


def time_to_listening(path: Path) -> float:
    """Start ``trio-gateway run`` on the file; seconds until it says that it listens."""
    command = [sys.executable, "-m", "gateway", "run", "--store", f"sqlite:{path}", "--port", "0", "--no-http"]
    began = time.perf_counter()
    with subprocess.Popen(
        [*command, "--log-format", "json"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if '"listening"' in line:
                    return time.perf_counter() - began
        finally:
            process.terminate()
            process.stdout.read()
    raise AssertionError("it ended before it listened")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time from start to listening on a file with many sessions.")
    parser.add_argument("--sessions", type=int, default=100_000)
    parser.add_argument("--unfinished", type=int, default=100)
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sessions.db"
        began = time.perf_counter()
        trio.run(fill, path, given.sessions, given.unfinished)
        size = path.stat().st_size / 2**20
        print(f"{given.sessions:,} sessions written in {time.perf_counter() - began:.1f} s, {size:.0f} MiB")
        times = [time_to_listening(path) for _ in range(given.runs)]
        shown = ", ".join(f"{seconds:.2f}" for seconds in times)
        print(f"listening after {shown} s; median {statistics.median(times):.2f} s")


if __name__ == "__main__":
    main()
