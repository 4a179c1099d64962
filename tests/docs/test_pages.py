"""The code in the documentation runs, and what the pages say it prints is what it prints."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tls_certificates as certificates
import trio

from gateway import Config, Server, open_gateway, open_session
from gateway.protocol.messages import Ask
from gateway.testing import simulate as simulation
from gateway.testing import strategies
from gateway.testing.dialogue import dump
from gateway.testing.dialogue import load as load_dialogue
from gateway.testing.judge import FAILURES

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```(\w+)(?: file=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")


def files_of(page: Path) -> dict[str, str]:
    return {name: code for _, name, code in BLOCK.findall(page.read_text()) if name}


def load(page: str, name: str) -> dict[str, object]:
    """The names that a file of a page defines."""
    code = files_of(ROOT / page)[name]
    namespace: dict[str, object] = {"__name__": "page"}
    exec(compile(code, name, "exec"), namespace)
    return namespace


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_block_compiles(page: Path) -> None:
    for language, name, code in BLOCK.findall(page.read_text()):
        if language == "python":
            compile(code, name or page.name, "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


async def test_the_tutorials_agent_and_client(tmp_path: Path) -> None:
    files = files_of(ROOT / "docs/tutorial/first-agent.md")
    for name, code in files.items():
        (tmp_path / name).write_text(code)
    namespace = load("docs/tutorial/first-agent.md", "my_agent.py")
    async with open_gateway(Config(server=Server(port=0)), {"shout": namespace["shout"]}) as gateway:
        with trio.fail_after(60):
            done = await trio.run_process(
                [sys.executable, "talk.py", gateway.url], cwd=tmp_path, capture_stdout=True, stdin=subprocess.DEVNULL
            )
    assert done.stdout.decode() == "HELLO FROM PYTHON [completed]\n"


async def test_the_agent_that_asks() -> None:
    careful = load("docs/how-to/ask-the-user.md", "careful.py")["careful"]
    answers = iter([True, "green", "Ada"])
    async with open_gateway(Config(server=Server(port=0)), {"careful": careful}) as gateway:
        async with open_session(gateway.url, "careful") as session:
            with trio.fail_after(60):
                await session.send("clean up")
                async for event in session:
                    if isinstance(event, Ask):
                        await session.answer(event.ask_id, next(answers))
                    elif event.type == "output":
                        text = event.content
                    elif event.type == "turn_ended":
                        break
    assert text == "Deleted; the label is green, called Ada."


@pytest.mark.parametrize(
    ("name", "printed"),
    [("embedded.py", ["You said: hello", "1 session in memory"]), ("in_memory.py", ["You said: hello"])],
)
def test_the_embedded_gateway(tmp_path: Path, name: str, printed: list[str]) -> None:
    (tmp_path / name).write_text(files_of(ROOT / "docs/how-to/embed.md")[name])
    done = subprocess.run([sys.executable, name], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert [line for line in done.stdout.splitlines() if "[info" not in line] == printed


def test_the_gateway_with_tls(tmp_path: Path) -> None:
    certificates.write(tmp_path, certificates.issue())
    certificates.write_authority(tmp_path)
    (tmp_path / "secure.py").write_text(files_of(ROOT / "docs/how-to/tls.md")["secure.py"])
    done = subprocess.run([sys.executable, "secure.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert [line for line in done.stdout.splitlines() if "[info" not in line] == ["wss", "You said: hello"], done


def test_the_settings_of_the_page_on_tls() -> None:
    toml = tomllib.loads(files_of(ROOT / "docs/how-to/tls.md")["gateway.toml"])
    assert set(toml["server"]) == {"tls_certificate", "tls_key"}
    Server(**toml["server"])


def test_the_test_of_a_decoder(tmp_path: Path) -> None:
    name = "test_decoder.py"
    (tmp_path / name).write_text(files_of(ROOT / "docs/reference/testing.md")[name])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert "1 passed" in done.stdout


def test_the_saved_dialogue_is_one(tmp_path: Path) -> None:
    (block,) = [
        code for language, _, code in BLOCK.findall((ROOT / "docs/how-to/fuzz.md").read_text()) if language == "json"
    ]
    (tmp_path / "f").write_text(block)
    assert dump(load_dialogue(tmp_path / "f")) == block


def test_the_failures_are_all_named() -> None:
    kinds = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/how-to/fuzz.md").read_text(), re.MULTILINE)
    assert kinds == list(FAILURES)


def test_the_strategies_are_all_named() -> None:
    page = (ROOT / "docs/reference/testing.md").read_text().partition("## A running gateway")[0]
    named = {name for cell in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE) for name in re.findall(r"`(\w+)", cell)}
    assert named == set(strategies.__all__)


def test_the_generated_pages_are_current() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import generate
    finally:
        sys.path.pop(0)
    for name, make in generate.PAGES.items():
        assert (ROOT / "docs/reference" / name).read_text() == make(), "run: python docs/generate.py"


def test_the_agent_that_is_simulated(tmp_path: Path) -> None:
    page = ROOT / "docs/how-to/simulate.md"
    for name, code in files_of(page).items():
        (tmp_path / name).write_text(code)
    simulate = [sys.executable, "-m", "gateway.testing.simulate"]
    done = subprocess.run(
        [*simulate, "--agent", "my_agent:patient", "--text", "hello", "--text", "and again", "--runs", "2", "--trace"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert "Then not." in done.stdout
    plan = simulation.plan(3)
    (tmp_path / "simulation-1234.json").write_text(json.dumps(plan.as_json()))
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_history.py", "test_my_agent.py"]
    done = subprocess.run(tests, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert "2 passed" in done.stdout, done.stdout + done.stderr


def test_the_trace_of_the_page_is_one() -> None:
    page = (ROOT / "docs/how-to/simulate.md").read_text()
    steps = [
        simulation.Step("start"),
        simulation.Step("join", "c1", 1),
        simulation.Step("send", "c1", 21, {"script": "say:3 sleep:200 return", "on_busy": "queue"}),
    ]
    outcome = simulation.run(simulation.Plan(1, "tight", tuple(steps)))
    shown = next(code for language, name, code in BLOCK.findall(page) if language == "text").splitlines()
    # Who does what: which events share a commit, and in which order things of one moment come, is no promise.
    happened = {tuple(line.split()[:4]) for line in outcome.trace}
    assert [line for line in shown if tuple(line.split()[:4]) not in happened] == []


def test_the_names_of_the_testing_page() -> None:
    page = (ROOT / "docs/reference/testing.md").read_text()
    names = re.findall(r"^\| `(gateway\.testing\.[\w.]+)` \|", page, re.MULTILINE)
    assert len(names) > 20
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert getattr(importlib.import_module(module), attribute), name
