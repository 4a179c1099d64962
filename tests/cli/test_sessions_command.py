"""``trio-gateway sessions`` on a file that a gateway wrote, while it runs and afterwards."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import trio
from click.testing import CliRunner, Result

from gateway import Config, Server, Store, Turn, open_gateway, open_session
from gateway.cli import main


async def answer(turn: Turn) -> str:
    await turn.update_state({"seen": turn.input.content})
    return f"You said: {turn.input.content}"


def sessions(*arguments: str, path: Path) -> Result:
    return CliRunner().invoke(main, ["sessions", *arguments, "--store", f"sqlite:{path}"])


async def _converse(url: str) -> None:
    with trio.fail_after(30):
        async with open_session(url, "answer", session_id="one") as session:
            await session.send("hello")
            async for event in session:
                if event.type == "turn_ended":
                    return


async def test_what_an_operator_sees(tmp_path: Path) -> None:
    path = tmp_path / "sessions.db"
    config = Config(server=Server(port=0), store=Store(url=f"sqlite:{path}"))
    async with open_gateway(config, {"answer": answer}) as gateway:
        await _converse(gateway.url)
        listed = json.loads(sessions("list", "--json", path=path).output)
        assert (listed["session_id"], listed["agent_id"], listed["in_turn"]) == ("one", "answer", False)
        assert "one" in sessions("list", path=path).output
        shown = sessions("show", "one", path=path).output
        assert 'state      {"seen": "hello"}' in shown
        lines = [json.loads(line) for line in sessions("export", "one", path=path).output.splitlines()]
        assert [line["type"] for line in lines] == ["input", "turn_started", "state", "output", "turn_ended"]
        assert all(after["first"] == before["seq"] + 1 for before, after in pairwise(lines))
        assert "You said: hello" in sessions("export", "one", "--format", "markdown", path=path).output
        refused = await trio.to_thread.run_sync(lambda: sessions("purge", "one", path=path))
        assert refused.exit_code == 2
        assert "in use by process" in refused.output
    assert sessions("new-epoch", path=path).exit_code == 0
    removed = await trio.to_thread.run_sync(lambda: sessions("purge", "one", path=path))
    assert removed.output == "removed 1 session\n"
    assert sessions("list", path=path).output == "no sessions\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["list", "--store", "memory"], "expected sqlite:PATH"),
        (["list", "--store", "sqlite:nowhere.db"], "there is no such file"),
        (["show", "x", "--store", "sqlite:nowhere.db"], "there is no such file"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: list[str], expected: str) -> None:
    result = CliRunner().invoke(main, ["sessions", *arguments])
    assert result.exit_code == 2
    assert expected in result.output
    assert result.output.count("\n") == 1


def test_an_unknown_session_is_said(tmp_path: Path) -> None:
    from gateway.store.sqlite import SqliteStore

    async def make() -> None:
        async with SqliteStore(tmp_path / "s.db"):
            pass

    trio.run(make)
    result = sessions("show", "x", path=tmp_path / "s.db")
    assert result.exit_code == 2
    assert "there is no session 'x'" in result.output
