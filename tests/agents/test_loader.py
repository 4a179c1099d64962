"""From a name to an agent; and every way a name can be wrong is one clear line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_turn import FakeTurn, run

from gateway.agents import build_agent, load_agent
from gateway.config import AgentConfig
from gateway.errors import AgentLoadError, ConfigError, GatewayError

SOURCE = """
import functools

async def chat(turn):
    return "chat"

async def polite(turn, *, greeting="Hello", loud=False):
    return greeting.upper() if loud else greeting

class Bot:
    def __init__(self, model="small"):
        if model == "bad":
            raise ValueError("no such model")
        self.model = model

    async def __call__(self, turn):
        return self.model

class space:
    inner = Bot("inner")

number = 3
"""


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An application's directory; what is imported from it is forgotten again."""
    (tmp_path / "my_agents.py").write_text(SOURCE)
    (tmp_path / "raising_agents.py").write_text("x = 1\nraise RuntimeError('no\\n  key')\n")
    (tmp_path / "exiting_agents.py").write_text("import sys\nsys.exit(3)\n")
    (tmp_path / "broken_agents.py").write_text("def chat(turn:\n")
    (tmp_path / "needy_agents.py").write_text("import no_such_dependency\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if "agents" in name and not name.startswith("gateway"):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("spec", "name", "text"),
    [
        ("my_agents:chat", "chat", "chat"),
        ("talk=my_agents:chat", "talk", "chat"),
        ("my_agents:Bot", "Bot", "small"),
        ("my_agents:space.inner", "inner", "inner"),
        ("my_agents.py:chat", "chat", "chat"),
        ("talk=./my_agents.py:chat", "talk", "chat"),
    ],
)
async def test_load(spec: str, name: str, text: str) -> None:
    found, agent = load_agent(spec)
    assert (found, agent.name) == (name, name)
    assert await run(agent, FakeTurn()) == text


async def test_a_file_is_loaded_once_and_by_its_full_path(directory: Path) -> None:
    _, first = load_agent(f"{directory}/my_agents.py:space.inner")
    _, second = load_agent("my_agents.py:space.inner")
    assert first.run.args[1] is second.run.args[1]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("spec", "name"), [("demo", "demo"), ("echo=demo", "echo")])
async def test_load_a_kind(spec: str, name: str) -> None:
    assert load_agent(spec)[0] == name


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such:chat", "no module named 'no_such' in {cwd} or the installed packages; start in the directory"),
        ("my_agents.sub:chat", "no module named 'my_agents.sub' in {cwd}"),
        ("my_agents:chatt", "'my_agents:chatt': my_agents has no 'chatt'; did you mean 'chat'? it has: Bot, chat, "),
        ("my_agents:space.outer", "'my_agents:space.outer': my_agents has no 'outer'"),
        ("my_agents:number", "'my_agents:number' is an int, no agent; expected a function, a class or a callable"),
        ("raising_agents:chat", "failed while it was imported: RuntimeError: no key (raising_agents.py, line 2)"),
        ("raising_agents.py:chat", "failed while it was imported: RuntimeError: no key (raising_agents.py, line 2)"),
        ("exiting_agents:chat", "module 'exiting_agents' failed while it was imported: SystemExit: 3"),
        ("broken_agents:chat", "'(' was never closed (broken_agents.py, line 1)"),
        ("needy_agents:chat", "module 'needy_agents' needs 'no_such_dependency', which is not installed"),
        ("needy_agents.py:chat", "'needy_agents.py' needs 'no_such_dependency', which is not installed"),
        ("missing.py:chat", "no file 'missing.py' in {cwd}"),
        ("my_agents", "'my_agents': expected MODULE:ATTR, for example 'my_agents:agent', or a built-in kind (demo, "),
        ("my_agents.py", "'my_agents.py': expected MODULE:ATTR, for example 'my_agents.py:agent'"),
        ("my_agents:", "'my_agents:': expected MODULE:ATTR or NAME=MODULE:ATTR"),
        ("talk=", "'talk=': expected MODULE:ATTR or NAME=MODULE:ATTR"),
        ("./my_agents:chat", "'./my_agents' is no module name; for a file write its path with .py"),
        ("a b=my_agents:chat", "an agent's name is 1 to 128 of the characters A-Z a-z 0-9 . _ : -, got 'a b'"),
        ("openai", "agents.openai.model: is required"),
        ("process", "agents.process.command: is required"),
    ],
)
def test_what_is_wrong_is_said_on_one_line(spec: str, message: str, directory: Path) -> None:
    with pytest.raises(GatewayError) as caught:
        load_agent(spec)
    assert isinstance(caught.value, AgentLoadError | ConfigError)
    assert message.replace("{cwd}", str(directory)) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize(
    ("run_", "options", "text"),
    [
        ("my_agents:Bot", {"model": "large"}, "large"),
        ("my_agents:polite", {"greeting": "Hi"}, "Hi"),
        ("my_agents:polite", {"greeting": "Hi", "loud": True}, "HI"),
    ],
)
async def test_options(run_: str, options: dict[str, object], text: str) -> None:
    agent = build_agent("bot", AgentConfig(run=run_, options=options))
    assert await run(agent, FakeTurn()) == text


@pytest.mark.parametrize(
    ("run_", "options", "message"),
    [
        ("my_agents:Bot", {"modle": 1}, "agents.bot.modle: unknown option; did you mean 'model'? it takes: model"),
        ("my_agents:Bot", {"model": "bad"}, "agents.bot: my_agents:Bot refused these options: ValueError: no such"),
        ("my_agents:polite", {"greting": 1}, "agents.bot.greting: unknown option; did you mean 'greeting'? it takes: "),
        ("my_agents:chat", {"x": 1}, "agents.bot.x: unknown option; it takes no options"),
        ("demo", {"delay": 1}, "agents.bot.delay: unknown option; did you mean 'delay_ms'? it takes: delay_ms"),
        ("demo", {"delay_ms": True}, "agents.bot.delay_ms: expected an integer from 0 to 10,000, got True"),
        ("demo", {"delay_ms": -1}, "agents.bot.delay_ms: must be from 0 to 10,000, got -1"),
    ],
)
def test_wrong_options(run_: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_agent("bot", AgentConfig(run=run_, options=options))
    assert message in str(caught.value)
