"""``python -m benchmarks``: run everything side by side, and report."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks import report
from benchmarks.runner import run
from benchmarks.systems import SYSTEMS
from benchmarks.workloads import WORKLOADS

ROUNDS, QUICK_ROUNDS = 3, 1
QUICK_SYSTEMS = ("gateway", "trio-websocket")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 1 if a run does not count."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure the gateway beside its peers. A run of everything writes results/latest.json, the page on "
        "performance and its picture; any other only prints what it measured.",
    )
    parser.add_argument("--quick", action="store_true", help=f"a minute: short, {' and '.join(QUICK_SYSTEMS)} only")
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, metavar="WORKLOAD", help=", ".join(WORKLOADS))
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, metavar="SYSTEM", help=", ".join(SYSTEMS))
    parser.add_argument("--rounds", type=int, help=f"how often each is run [{ROUNDS}, with --quick {QUICK_ROUNDS}]")
    parser.add_argument("--no-write", action="store_true", help="write nothing in any case")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there as well")
    parser.add_argument("--render", action="store_true", help="run nothing; make page and picture of the last results")
    given = parser.parse_args(arguments)
    if given.render:
        report.save(json.loads(report.RESULTS.read_text()))
        return 0
    rounds = given.rounds or (QUICK_ROUNDS if given.quick else ROUNDS)
    systems = given.systems or (QUICK_SYSTEMS if given.quick else SYSTEMS)
    results = run(
        [WORKLOADS[name] for name in given.only or WORKLOADS],
        [SYSTEMS[name] for name in systems],
        rounds,
        quick=given.quick,
    )
    print(report.table(results))
    document = report.document(results, rounds, given.quick)
    if given.json:
        given.json.write_text(json.dumps(document, indent=1) + "\n")
    if not (given.no_write or given.quick or given.only or given.systems):
        report.save(document)
    for failure in results.failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if results.failures else 0


if __name__ == "__main__":
    sys.exit(main())
