"""Writes to a store until it is killed, and prints the number of each input that `append` has returned for.

python store_writer_process.py PATH SESSIONS [CORES]
"""

from __future__ import annotations

import os
import sys

import trio
from store_helpers import Script

from gateway.store.sqlite import SqliteStore


async def main(path: str, sessions: int) -> None:
    async def write(script: Script) -> None:
        await script.create(reserved=1 << 40)
        name = script.record.session_id
        while True:
            request_id = f"r{script.seq + 1}"
            written = script.input(request_id)
            await script.write(written, script.start(f"t{written.seq}", request_id), script.output("x" * 300))
            # One write call per line: a kill leaves whole lines.
            sys.stdout.write(f"{name} {script.seq}\n")
            sys.stdout.flush()
            await script.write(script.end(f"t{written.seq}"), script.state(n=written.seq))

    async with SqliteStore(path) as store, trio.open_nursery() as nursery:
        for i in range(sessions):
            nursery.start_soon(write, Script(store, f"s{i}"))


if __name__ == "__main__":
    if sys.argv[3:]:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[3])])
    trio.run(main, sys.argv[1], int(sys.argv[2]))
