"""The page of guarantees: every promise has living tests, and every test that it names is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from gateway.testing.vectors import load

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/reference/guarantees.md").read_text()
README = (ROOT / "README.md").read_text()

PROPERTIES = 20
"""What must always hold, by the design; the guarantees after these are of the package as a whole."""

SECTION = re.compile(r"^### (\d+)\. (.+?)\n(.*?)(?=^##|\Z)", re.MULTILINE | re.DOTALL)
EVIDENCE = re.compile(r"^  - `([^`]+)`$", re.MULTILINE)
PROMISE = re.compile(r"^\| ([^|]+) \| ([\d, ]+) \|$", re.MULTILINE)

VECTORS = {vector.id for vector in load()}


@cache
def marks_in(file: str) -> dict[str, set[str]]:
    """The tests that a file defines, with the names of their marks. A test that is skipped has the mark ``skip``."""
    path = ROOT / file
    if not path.is_file():
        return {}
    found: dict[str, set[str]] = {}
    tree = ast.parse(path.read_text())
    common = {
        mark
        for node in tree.body
        if isinstance(node, ast.Assign) and any(getattr(name, "id", "") == "pytestmark" for name in node.targets)
        for mark in re.findall(r"mark\.(\w+)", ast.unparse(node.value))
    }
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            decorators = " ".join(ast.unparse(item) for item in node.decorator_list)
            found[node.name] = common | set(re.findall(r"mark\.(\w+)", decorators))
        elif isinstance(node, ast.Assign):  # a state machine's TestCase
            found |= {name.id: common for name in node.targets if isinstance(name, ast.Name) and name.id[:4] == "Test"}
    return found


def problems(page: str, readme: str = README) -> list[str]:
    """What is wrong with the page."""
    wrong: list[str] = []
    numbers: list[int] = []
    for number, title, text in SECTION.findall(page):
        numbers.append(int(number))
        wrong += [f"{number}: says nothing under {label!r}" for label in ("Against", "Not promised", "Shown by")
                  if not re.search(rf"^- \*\*{label}:\*\*\s+\S", text, re.MULTILINE)]  # fmt: skip
        alive = 0
        for name in EVIDENCE.findall(text):
            if name.startswith("vector:"):
                if name[7:] not in VECTORS:
                    wrong.append(f"{number}: there is no {name}")
                continue
            file, _, test = name.partition("::")
            marks = marks_in(file).get(test)
            if marks is None:
                wrong.append(f"{number}: there is no {name}")
            elif marks & {"skip", "skipif", "xfail"}:
                wrong.append(f"{number}: {name} does not run everywhere")
            elif not marks & {"long", "model"}:
                alive += 1
        if not alive:
            wrong.append(f"{number} ({title}): no living test")
    if numbers != list(range(1, len(numbers) + 1)) or len(numbers) < PROPERTIES:
        wrong.append(f"expected guarantees 1 to {PROPERTIES} and what follows them, got {numbers}")
    promised = dict(PROMISE.findall(page))
    for promise in re.findall(r"^- \*\*(.+?)\*\*", readme, re.MULTILINE):
        if promise not in promised:
            wrong.append(f"the README's {promise!r} is traced to no guarantee")
    for promise, listed in promised.items():
        if f"- **{promise}**" not in readme:
            wrong.append(f"{promise!r} is no promise of the README")
        if not {int(item) for item in listed.split(",")} <= set(numbers):
            wrong.append(f"{promise!r} names a guarantee that is not there")
    return wrong


def test_every_guarantee_has_living_tests() -> None:
    assert problems(PAGE) == []


def without_section(page: str) -> str:
    return re.sub(r"^### 7\..*?(?=^### 8)", "", page, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda page: page.replace("::test_two_sessions_never_mix", "::test_two_sessions_mix"), "17: there is no"),
        (lambda page: page.replace("tests/system/test_storm.py", "tests/system/test_calm.py"), "5: there is no"),
        (lambda page: page.replace("vector:abort.all", "vector:abort.some"), "10: there is no vector:abort.some"),
        (without_section, "expected guarantees 1 to 20"),
        (
            lambda page: re.sub(r"^  - `tests.*?`\n", "", page, flags=re.M),
            "1 (At most one turn runs per session): no liv",
        ),
        (lambda page: page.replace("- **Not promised:** constant time.", ""), "4: says nothing under 'Not promised'"),
        (lambda page: page.replace("| Agents | 22 |", ""), "the README's 'Agents'"),
        (lambda page: page.replace("| Agents | 22 |", "| Agents | 99 |"), "'Agents' names a guarantee"),
        (lambda page: page.replace("| Agents |", "| Agents and more |"), "'Agents and more' is no promise"),
    ],
    ids=[
        "test gone",
        "file gone",
        "vector gone",
        "guarantee gone",
        "no tests",
        "no limits",
        "untraced",
        "99",
        "invented",
    ],
)
def test_a_page_that_is_wrong_is_seen(change: Callable[[str], str], said: str) -> None:
    changed = change(PAGE)
    assert changed != PAGE
    assert any(problem.startswith(said) for problem in problems(changed)), problems(changed)


def test_a_test_that_is_skipped_is_no_evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As are those of the long form alone."""
    (tmp_path / "t.py").write_text(
        "import pytest\n@pytest.mark.skipif(True, reason='')\ndef test_a(): ...\n@pytest.mark.long\ndef test_b(): ...\n"
    )
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    marks = marks_in("t.py")
    assert marks == {"test_a": {"skipif"}, "test_b": {"long"}}


def test_the_named_tests_are_those_that_pytest_collects(pytestconfig: pytest.Config) -> None:
    """Names alone could be of functions that pytest never runs."""
    patterns = pytestconfig.getini("python_files")
    for file in {name.partition("::")[0] for name in EVIDENCE.findall(PAGE) if not name.startswith("vector:")}:
        assert any(Path(file).match(pattern) for pattern in patterns), file
        assert file.startswith(tuple(f"{path}/" for path in pytestconfig.getini("testpaths"))), file
