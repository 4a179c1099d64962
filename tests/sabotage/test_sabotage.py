"""The table fits the code, the page names it, the runner says what it must, and some mutations really run."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
from attrs import evolve

from sabotage.mutations import MUTATIONS
from sabotage.runner import DoesNotApply, Mutation, Result, Run, Verdict, judge, mutated, sabotage

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/reference/guarantees.md").read_text()
PROPERTIES = range(1, 21)

CHEAP = ("two loads of one session", "free later than seen", "a late end ends the next", "numbers used twice")
"""Run with every run of the tests, to see that mutations do fail: a fraction of a second each, but for the start."""


# the table


def test_every_property_has_a_mutation() -> None:
    assert {one.property for one in MUTATIONS} == set(PROPERTIES)
    names = [one.name for one in MUTATIONS]
    assert len(set(names)) == len(names)
    assert all(one.tests for one in MUTATIONS)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda one: one.name)
def test_a_mutation_applies_and_compiles(mutation: Mutation) -> None:
    text = mutated(mutation, ROOT)
    assert text != (ROOT / mutation.file).read_text()
    compile(text, mutation.file, "exec")


@cache
def names_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    machines = {
        name.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for name in node.targets
        if isinstance(name, ast.Name) and name.id.startswith("Test")
    }
    return functions | machines


def test_the_named_tests_are_there() -> None:
    named = {tuple(test.split("::")) for one in MUTATIONS for test in one.tests}
    assert [f"{file}::{test}" for file, test in named if test not in names_in(file)] == []


def test_the_page_names_the_mutations_of_each_guarantee() -> None:
    wanted = defaultdict(list)
    for one in MUTATIONS:
        wanted[one.property].append(one.name)
    found = {}
    for number, text in re.findall(r"^### (\d+)\.(.*?)(?=^##)", PAGE, re.MULTILINE | re.DOTALL):
        broken = re.search(r"^- \*\*Broken on purpose:\*\*(.*?)(?=^[-#]|\Z)", text, re.MULTILINE | re.DOTALL)
        if broken:
            found[int(number)] = [" ".join(name.split()) for name in re.findall(r"\*([^*]+)\*", broken[1])]
    assert found == dict(wanted)


# the verdict


SOME = Mutation(1, "some", "", "adder.py", "return a + b", "return a - b", ("t.py::test_a", "t.py::test_b"))


@pytest.mark.parametrize(
    ("code", "failed", "verdict", "tests"),
    [
        (1, {"t.py::test_a", "t.py::test_b[1-x]"}, Verdict.KILLED, SOME.tests),
        (1, {"t.py::test_a", "t.py::test_b::runTest"}, Verdict.KILLED, SOME.tests),
        (1, {"t.py::test_a", "t.py::test_bc"}, Verdict.SURVIVED, ("t.py::test_b",)),
        (0, set(), Verdict.SURVIVED, SOME.tests),
        (2, set(), Verdict.BROKEN, ()),
        (4, set(), Verdict.BROKEN, ()),
        (-9, set(), Verdict.BROKEN, ()),
        (None, set(), Verdict.HUNG, ()),
    ],
)
def test_every_named_test_must_fail(code: int | None, failed: set[str], verdict: Verdict, tests: tuple[str]) -> None:
    result = judge(SOME, Run(code, frozenset(failed), "", 1.0))
    assert (result.verdict, result.tests) == (verdict, tests)
    assert result.verdict.good == (verdict in (Verdict.KILLED, Verdict.HUNG))


# the runner


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A small checkout with one test that is worth something and one that is not."""
    (tmp_path / "adder.py").write_text("def add(a, b):\n    return a + b\n")
    (tmp_path / "conftest.py").write_text("import hypothesis\nhypothesis.settings.register_profile('mutants')\n")
    (tmp_path / "ignored.py").write_text("")
    (tmp_path / ".gitignore").write_text("ignored.py\n")
    (tmp_path / "test_add.py").write_text(
        "import os, adder\n"
        "def test_good(): assert adder.add(2, 1) == 3 and not os.path.exists('ignored.py')\n"
        "def test_weak(): assert adder.add(0, 0) == 0\n"
        "def test_bad(): assert adder.add(0, 0) == 1\n"
    )
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


GOOD = evolve(SOME, tests=("test_add.py::test_good",))


async def run_all(project: Path, *mutations: Mutation, jobs: int = 1, timeout: float = 60) -> dict[str, Result]:
    seen: list[Result] = []
    results = await sabotage(mutations, root=project, report=seen.append, jobs=jobs, timeout=timeout)
    assert results == seen
    assert (project / "adder.py").read_text() == "def add(a, b):\n    return a + b\n", "the checkout is not touched"
    return {result.mutation.name: result for result in results}


async def test_what_becomes_of_mutations(project: Path) -> None:
    results = await run_all(
        project,
        evolve(GOOD, name="good"),
        evolve(GOOD, name="weak", tests=("test_add.py::test_good", "test_add.py::test_weak")),
        evolve(GOOD, name="moved", old="return b + a"),
        evolve(GOOD, name="twice", old="a"),
        evolve(GOOD, name="gone", file="gone.py"),
        evolve(GOOD, name="unreadable", new="return )"),
        evolve(GOOD, name="equal", new="return b + a"),
        jobs=2,
    )
    assert {name: result.verdict for name, result in results.items()} == {
        "good": Verdict.KILLED,
        "weak": Verdict.SURVIVED,
        "moved": Verdict.OBSOLETE,
        "twice": Verdict.OBSOLETE,
        "gone": Verdict.OBSOLETE,
        "unreadable": Verdict.BROKEN,
        "equal": Verdict.SURVIVED,
    }
    assert results["weak"].tests == ("test_add.py::test_weak",)
    assert "has 'return b + a' 0 times" in results["moved"].why
    assert "SyntaxError" in results["unreadable"].why


async def test_a_hang_is_a_kill_of_its_own_kind(project: Path) -> None:
    hangs = evolve(GOOD, new="import time; time.sleep(1000)")
    assert (await run_all(project, hangs, timeout=5))["some"].verdict is Verdict.HUNG


async def test_tests_that_fail_anyway_prove_nothing(project: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)do not pass as it is.*test_bad"):
        await run_all(project, evolve(GOOD, tests=("test_add.py::test_bad",)))


def test_an_anchor_that_is_not_there_once_is_told() -> None:
    with pytest.raises(DoesNotApply, match=r"there is no adder\.py"):
        mutated(SOME, ROOT)


# for real


async def test_some_mutations_are_killed() -> None:
    chosen = [one for one in MUTATIONS if one.name in CHEAP]
    assert len(chosen) == len(CHEAP)
    results = await sabotage(chosen, root=ROOT, report=print, jobs=2)
    assert [result for result in results if not result.verdict.good] == []


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.sabotage", *arguments], cwd=ROOT, capture_output=True, text=True
    )


def test_the_command_lists_them() -> None:
    done = command("--list", "--property", "18")
    assert done.returncode == 0
    assert done.stdout.startswith("18 nothing is no position: ")
    assert command("--property", "99").returncode == 2


@pytest.mark.long
def test_all_mutations_are_killed() -> None:
    done = command("-j", "2")
    print(done.stdout, done.stderr)
    assert done.returncode == 0
