"""``python -m benchmarks``: run everything side by side, and report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import report
from benchmarks.runner import run
from benchmarks.systems import ROOT, SYSTEMS
from benchmarks.workloads import WORKLOADS

ROUNDS, QUICK_ROUNDS = 5, 1
QUICK_SYSTEMS = ("gateway", "trio-websocket")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 1 if a run does not count."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a minute: shorter windows, one round, few systems")
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, metavar="WORKLOAD", help=", ".join(WORKLOADS))
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, metavar="SYSTEM", help=", ".join(SYSTEMS))
    parser.add_argument("--rounds", type=int, help=f"how often each is run [{ROUNDS}, with --quick {QUICK_ROUNDS}]")
    parser.add_argument("--no-write", action="store_true", help="only print the table")
    given = parser.parse_args(arguments)
    rounds = given.rounds or (QUICK_ROUNDS if given.quick else ROUNDS)
    systems = given.systems or (QUICK_SYSTEMS if given.quick else SYSTEMS)
    results = run(
        [WORKLOADS[name] for name in given.only or WORKLOADS],
        [SYSTEMS[name] for name in systems],
        rounds,
        quick=given.quick,
    )
    print(report.table(results))
    if not given.no_write:
        path = report.save(ROOT / "benchmarks" / "results", report.document(results, rounds, given.quick))
        print(f"written: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}", file=sys.stderr)
    for failure in results.failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if results.failures else 0


if __name__ == "__main__":
    sys.exit(main())
