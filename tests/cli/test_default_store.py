"""Sessions are kept though nobody said where: `run`, `check-config` and `sessions` mean the same file."""

from __future__ import annotations

import json
import signal
import stat
from pathlib import Path

import trio
from click.testing import CliRunner, Result
from run_process import Running, refused, running

from gateway import open_session
from gateway.cli import main


def state_of(home: Path) -> dict[str, str]:
    """The environment of a user of its own, who said nothing about a store."""
    return {"TRIO_GATEWAY_STORE_URL": "", "XDG_STATE_HOME": str(home)}


def command(*args: str, **env: str) -> Result:
    return CliRunner().invoke(main, args, env=env)


async def say(gateway: Running, text: str) -> str:
    with trio.fail_after(30):
        async with open_session(gateway.url, "echo", session_id="one") as session:
            await session.send(text)
            async for event in session:
                if event.type == "turn_ended":
                    return session.epoch or ""
    raise AssertionError("the session ended first")


async def test_a_conversation_survives_kill_9_without_a_word_about_a_store(tmp_path: Path) -> None:
    env = state_of(tmp_path / "state")
    file = tmp_path / "state" / "trio-gateway" / "sessions.db"
    async with running("--no-http", **env) as gateway:
        assert f"  store      sqlite:{file}\n" in gateway.out
        epoch = await say(gateway, "hello")
        gateway.signal(signal.SIGKILL)
        await gateway.ended()
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    async with running("--no-http", **env) as gateway:
        assert await say(gateway, "again") == epoch
        listed = await trio.to_thread.run_sync(lambda: command("sessions", "list", "--json", **env))
        assert json.loads(listed.output)["session_id"] == "one"
    exported = command("sessions", "export", "one", **env).output
    assert [line["content"] for line in map(json.loads, exported.splitlines()) if line["type"] == "input"] == [
        "hello",
        "again",
    ]


async def test_a_second_gateway_is_told_to_take_another_file(tmp_path: Path) -> None:
    env = state_of(tmp_path)
    async with running("--no-http", **env) as gateway:
        line = await refused("--no-http", "--port", "0", **env)
        assert f"is in use by process {gateway.process.pid}" in line
        assert "--store sqlite:PATH" in line


async def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = await refused("--no-http", "--port", "0", **state_of(tmp_path / "file" / "state"))
    assert line.startswith("trio-gateway: store.url: ")
    assert line.endswith("cannot be created: Not a directory; say where to keep sessions: "
                         "--store sqlite:PATH, or --store memory")  # fmt: skip


def test_check_config_and_sessions_mean_the_same_file(tmp_path: Path) -> None:
    file = tmp_path / "trio-gateway" / "sessions.db"
    env = state_of(tmp_path)
    assert command("check-config", **env).output == (
        f"ok\nstore.url = 'sqlite:{file}'  (the default of `trio-gateway run`)\n"
    )
    assert command("sessions", "list", **env).output == (
        f"trio-gateway: {file}: there is no such file; give the path that the gateway printed at its start\n"
    )
    assert not file.parent.exists()  # to look leaves nothing behind
    named = {**env, "TRIO_GATEWAY_STORE_URL": "sqlite:elsewhere.db"}
    assert "elsewhere.db: there is no such file" in command("sessions", "list", **named).output
    assert "expected sqlite:PATH, got 'memory'" in command("sessions", "list", TRIO_GATEWAY_STORE_URL="memory").output
