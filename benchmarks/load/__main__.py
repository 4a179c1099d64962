"""One run of one workload against one server."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys

import uvloop

from benchmarks.load.checks import ContentError
from benchmarks.load.clients import Target
from benchmarks.load.loads import LOADS, Measured


def main() -> int:
    spec = json.load(sys.stdin)
    os.sched_setaffinity(0, {spec["core"]})
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    target = Target(**spec["target"])
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            measured: Measured = runner.run(LOADS[spec["load"]](target, **spec["parameters"]))
    except (ContentError, OSError, TimeoutError) as exc:
        print(f"{type(exc).__name__}: {exc}", file=sys.stderr)
        return 1
    json.dump(measured, sys.stdout)
    return 0


if __name__ == "__main__":
    # Nothing is worth a clean-up of thousands of connections, each with its closing handshake.
    code = main()
    sys.stdout.flush()
    os._exit(code)
