"""Applies mutations in scratch copies of the checkout and runs the tests that must notice.

Theory of operation
-------------------
A copy has what git tracks, as it is in the working tree now. The named tests run there once as it is: a test that fails
anyway proves nothing. Then each mutation is written into the copy, its tests run in a process of their own with the
same interpreter, and the file is put back. With several jobs each has a copy of its own.

A mutation is killed when every one of its tests fails, by an assertion or an error in the test itself. What cannot be
collected does not count: a mutant that nobody can import shows nothing about the tests.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from enum import Enum
from importlib.util import cache_from_source
from pathlib import Path

import trio
from attrs import frozen

FAILED = re.compile(r"^FAILED (\S+::.+?)(?: - .*)?$", re.MULTILINE)


@frozen
class Mutation:
    """One mechanism, and what shows that it is needed.

    `old` occurs exactly once in `file` and becomes `new`. `tests` are node ids; of a parametrized test one case is
    enough.
    """

    property: int
    name: str
    broken: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


class DoesNotApply(Exception):
    """The mechanism is not where the mutation looks for it: adapt the mutation to the code."""


class Verdict(Enum):
    KILLED = "killed"
    HUNG = "killed by a hang"
    SURVIVED = "SURVIVED"
    OBSOLETE = "DOES NOT APPLY"
    BROKEN = "COULD NOT RUN"

    @property
    def good(self) -> bool:
        return self in (Verdict.KILLED, Verdict.HUNG)


@frozen
class Result:
    """`tests` are those that decided: which failed, or, of a survivor, which did not."""

    mutation: Mutation
    verdict: Verdict
    seconds: float
    tests: tuple[str, ...] = ()
    why: str = ""


@frozen
class Run:
    """How pytest ended: `code` is None when it had to be stopped."""

    code: int | None
    failed: frozenset[str]
    output: str
    seconds: float

    def has_failed(self, test: str) -> bool:
        return any(one == test or one.startswith((test + "[", test + "::")) for one in self.failed)


def mutated(mutation: Mutation, root: Path) -> str:
    """The text of the mutation's file with the mutation in it.

    Raises:
        DoesNotApply: there is no such file, or `old` is not there exactly once.
    """
    path = root / mutation.file
    if not path.is_file():
        raise DoesNotApply(f"there is no {mutation.file}")
    text = path.read_text()
    found = text.count(mutation.old)
    if found != 1:
        raise DoesNotApply(f"{mutation.file} has {mutation.old!r} {found} times, expected once")
    return text.replace(mutation.old, mutation.new)


def judge(mutation: Mutation, run: Run) -> Result:
    """What the run of a mutation's tests says about it."""
    if run.code is None:
        return Result(mutation, Verdict.HUNG, run.seconds)
    if run.code not in (0, 1):
        return Result(mutation, Verdict.BROKEN, run.seconds, why=run.output)
    unharmed = tuple(test for test in mutation.tests if not run.has_failed(test))
    if unharmed:
        return Result(mutation, Verdict.SURVIVED, run.seconds, unharmed)
    return Result(mutation, Verdict.KILLED, run.seconds, mutation.tests)


def copy_checkout(root: Path, to: Path) -> None:
    """Copy what git tracks, and what is new and not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        check=True,
        capture_output=True,
    )
    for name in set(os.fsdecode(listed.stdout).split("\0")) - {""}:
        source, target = root / name, to / name
        if source.is_file():  # and not deleted since
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


def write(path: Path, text: str) -> None:
    """Replace a module's text. Its compiled form goes by size and seconds, which a small change can leave the same."""
    path.write_text(text)
    Path(cache_from_source(str(path))).unlink(missing_ok=True)


async def run_tests(root: Path, tests: Iterable[str], timeout: float) -> Run:
    """Run tests in a copy of the checkout, for `timeout` seconds at most; what they started ends with them."""
    command = [
        sys.executable, "-m", "pytest", "-q", "-rf", "--tb=short", "--color=no", "-p", "no:cacheprovider",
        "--hypothesis-profile=mutants", *tests,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(root)}
    environment.pop("PYTEST_ADDOPTS", None)

    async def end(process: trio.Process) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    done = None
    started = trio.current_time()
    with trio.move_on_after(timeout):
        done = await trio.run_process(
            command, cwd=root, env=environment, check=False, capture_stdout=True, stderr=subprocess.STDOUT,
            start_new_session=True, deliver_cancel=end,
        )  # fmt: skip
    output = "" if done is None else done.stdout.decode(errors="replace")
    code = None if done is None else done.returncode
    return Run(code, frozenset(FAILED.findall(output)), output, trio.current_time() - started)


async def sabotage(
    mutations: Sequence[Mutation],
    *,
    root: Path,
    report: Callable[[Result], None],
    jobs: int = 1,
    timeout: float = 120,
) -> list[Result]:
    """Judge all mutations; `report` is told of each when it is known.

    Args:
        root: the checkout. It is read, never written.
        timeout: seconds that the tests of one mutation may take; what is still running then has hung.

    Raises:
        RuntimeError: the tests do not pass as it is.
    """
    results: list[Result] = []
    todo = list(reversed(mutations))

    async def work(copy: Path) -> None:
        while todo:
            mutation = todo.pop()
            try:
                changed = mutated(mutation, copy)
            except DoesNotApply as exc:
                result = Result(mutation, Verdict.OBSOLETE, 0, why=str(exc))
            else:
                path = copy / mutation.file
                original = path.read_text()
                write(path, changed)
                result = judge(mutation, await run_tests(copy, mutation.tests, timeout))
                write(path, original)
            results.append(result)
            report(result)

    with tempfile.TemporaryDirectory(prefix="sabotage-") as scratch:
        copies = [Path(scratch, str(n)) for n in range(max(1, min(jobs, len(mutations))))]
        for copy in copies:
            copy_checkout(root, copy)
        tests = sorted({test for mutation in mutations for test in mutation.tests})
        baseline = await run_tests(copies[0], tests, timeout * max(1, len(mutations)))
        if baseline.code != 0:
            raise RuntimeError(f"the tests do not pass as it is:\n{baseline.output or 'they hang'}")
        async with trio.open_nursery() as nursery:
            for copy in copies:
                # Owned by this call; ends when nothing is left to do.
                nursery.start_soon(work, copy)
    return results
