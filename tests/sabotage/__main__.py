"""`python -m tests.sabotage`: does a test fail for each mechanism that is taken away?"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import trio

from .mutations import MUTATIONS
from .runner import Mutation, Result, sabotage

ROOT = Path(__file__).parents[2]


def line(result: Result) -> str:
    mutation = result.mutation
    text = f"{mutation.property:2} {mutation.name}: {result.verdict.value} ({result.seconds:.1f} s)"
    if result.tests:
        names = [test.rpartition("::")[2] for test in result.tests]
        text += f" {'by' if result.verdict.good else 'unnoticed by'} {', '.join(names)}"
    return f"{text}\n{result.why}" if result.why else text


def listed(mutation: Mutation) -> str:
    return "\n   ".join((f"{mutation.property:2} {mutation.name}: {mutation.broken}", mutation.file, *mutation.tests))


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 when every mutation was killed, 1 when not, 2 when the tests do not pass without any."""
    parser = argparse.ArgumentParser(prog="python -m tests.sabotage", description=__doc__)
    parser.add_argument("--property", type=int, action="append", metavar="N", help="only this one; may be repeated")
    parser.add_argument("--list", action="store_true", help="show the mutations and their tests, run nothing")
    parser.add_argument("-j", "--jobs", type=int, default=1, help="how many at once, each in a copy of its own")
    parser.add_argument(
        "--timeout", type=float, default=120, help="seconds for the tests of one mutation; more is a hang (120)"
    )
    options = parser.parse_args(arguments)
    chosen = [one for one in MUTATIONS if options.property is None or one.property in options.property]
    if not chosen:
        parser.error("no mutation of that property")
    if options.list:
        print("\n".join(map(listed, chosen)))
        return 0
    try:
        results = trio.run(
            lambda: sabotage(
                chosen,
                root=ROOT,
                jobs=options.jobs,
                timeout=options.timeout,
                report=lambda result: print(line(result), flush=True),
            )
        )
    except RuntimeError as exc:
        print(exc, file=sys.stderr)
        return 2
    bad = sum(not result.verdict.good for result in results)
    print(f"{len(results) - bad} of {len(results)} mutations killed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
