"""The chat command as a user has it: a real process, a real gateway, pipes and a pseudo-terminal."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from chat_process import COMMAND, piped, terminal
from cutting_proxy import open_proxy

from gateway import Config, Gateway, Server, Turn, open_gateway
from gateway.agents.demo import Demo, DemoOptions


async def letters(turn: Turn) -> None:
    """Says the alphabet, letter by letter."""
    for letter in "abcdefghijklmnopqrstuvwxyz":
        await turn.send(letter)
        await trio.sleep(0.05)


async def rude(turn: Turn) -> str:
    return "\x1b[2J\x1b]0;owned\x07gone\x9b31m"


@asynccontextmanager
async def gateway(**server: object) -> AsyncIterator[Gateway]:
    config = Config(server=Server(port=0, drain_timeout_ms=100, **server))  # type: ignore[arg-type]
    demo = Demo(DemoOptions(delay_ms=1))
    async with open_gateway(config, {"echo": demo, "letters": letters, "rude": rude}) as running:
        yield running


# --- pipes -----------------------------------------------------------------------------------------------------------


async def test_each_line_is_a_message_and_its_end_is_waited_for() -> None:
    async with gateway() as running:
        done = await piped(running.url, stdin="one\n\ntwo\r\nthree")
        assert done.stdout.decode() == "You said: one\nYou said: two\nYou said: three\n"
        assert "connected, session s_" in done.stderr.decode()
        assert b"\x1b" not in done.stdout + done.stderr
        assert done.returncode == 0


async def test_a_line_answers_an_ask() -> None:
    async with gateway() as running:
        done = await piped(running.url, stdin="/ask sure?\nperhaps\nn\n/choose red blue\n9\n2\n/name who?\nAnn Lee\n")
        out = done.stdout.decode()
        assert "? sure? [y/n]" in out
        assert "Not approved" in out
        assert "  1. red\n  2. blue\n" in out
        assert "blue" in out.split("2. blue")[1]
        assert "Ann Lee" in out
        assert "y or n?" in done.stderr.decode()
        assert "a number from 1 to 2" in done.stderr.decode()
        assert done.returncode == 0


async def test_an_ask_without_more_input_ends_the_chat() -> None:
    async with gateway() as running:
        done = await piped(running.url, stdin="/ask sure?\n")
        assert done.returncode == 1
        assert "no more input" in done.stderr.decode()
        assert running.statistics().turns == 0


async def test_stop_takes_effect_at_once() -> None:
    async with gateway() as running:
        started = trio.current_time()
        done = await piped(running.url, stdin="/stop\n/slow 20\n/stop\nhello\n/quit\nnever\n")
        assert trio.current_time() - started < 10
        notes = done.stderr.decode()
        assert notes.index("nothing is running") < notes.index("stopped")
        assert "never" not in done.stdout.decode()
        assert done.returncode == 0


async def test_a_failed_turn_is_the_exit_code_of_a_pipe() -> None:
    async with gateway() as running:
        done = await piped(running.url, stdin="/fail too bad\nhello\n")
        assert done.returncode == 1
        assert "failed: too bad" in done.stderr.decode()
        assert done.stdout.decode().endswith("You said: hello\n")


async def test_history_on_resuming() -> None:
    async with gateway() as running:
        await piped(running.url, "--session", "mine", stdin="one\ntwo\n")
        again = await piped(running.url, "--session", "mine")
        assert again.stdout.decode() == "> one\nYou said: one\n> two\nYou said: two\n"
        more = await piped(running.url, "--session", "mine", "--no-history", stdin="three\n")
        assert more.stdout.decode() == "You said: three\n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--agent", "nobody"], ["agent_not_found", "echo"]),
        (["--token", "wrong"], ["unauthorized"]),
        (["--session", "not valid!"], ["invalid_hello", "session_id"]),
    ],
)
async def test_refusals_are_one_clear_line(options: list[str], words: list[str]) -> None:
    async with gateway(tokens={"ann": "a" * 20} if "--token" in options else {}) as running:
        done = await piped(running.url, *options, stdin="hi\n")
        assert done.returncode == 2
        (line,) = done.stderr.decode().splitlines()
        assert line.startswith("trio-gateway: ")
        assert all(word in line for word in words)
        assert done.stdout == b""


@pytest.mark.parametrize("url", ["http://127.0.0.1:8765/ws", "nonsense", "ws://", "ws://h:99999/"])
async def test_a_bad_url_is_one_clear_line(url: str) -> None:
    done = await piped(url)
    assert done.returncode == 2
    (line,) = done.stderr.decode().splitlines()
    assert "url" in line.lower()


async def test_nobody_there_is_told_after_a_while() -> None:
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    port = listener.socket.getsockname()[1]
    await listener.aclose()
    done = await piped(f"ws://127.0.0.1:{port}", stdin="hi\n")
    assert done.returncode == 2
    assert "trio-gateway run" in done.stderr.decode().splitlines()[-1]
    assert f"connection refused by 127.0.0.1:{port}" in done.stderr.decode()


async def test_a_token_from_the_environment_and_a_url_without_a_path() -> None:
    async with gateway(tokens={"ann": "a" * 20}) as running:
        host, port = running.address
        done = await piped(f"ws://{host}:{port}", stdin="hi\n", TRIO_GATEWAY_TOKEN="a" * 20)
        assert (done.stdout, done.returncode) == (b"You said: hi\n", 0)


async def test_a_file_or_nothing_as_input(tmp_path: object) -> None:
    async with gateway() as running:
        path = trio.Path(str(tmp_path)) / "lines"
        await path.write_text("from a file\n")
        with open(path, "rb") as file:  # noqa: ASYNC230
            done = await trio.run_process([*COMMAND, running.url], stdin=file, capture_stdout=True, capture_stderr=True)
        assert done.stdout == b"You said: from a file\n"
        shell = f"exec {sys.executable} -c 'from gateway.cli.chat import chat; chat()' {running.url} <&-"
        done = await trio.run_process(["sh", "-c", shell], capture_stderr=True)
        assert "Traceback" not in done.stderr.decode()


async def test_a_reader_that_goes_away_is_no_traceback() -> None:
    async with gateway() as running:
        shell = f"yes hello | head -200 | {sys.executable} -c 'from gateway.cli.chat import chat; chat()' {running.url}"
        with trio.fail_after(20):
            done = await trio.run_process(
                ["sh", "-c", f"{shell} | head -1"], capture_stdout=True, capture_stderr=True, check=False
            )
        assert done.stdout == b"You said: hello\n"
        assert "Traceback" not in done.stderr.decode()


async def test_a_program_can_stop_an_answer_through_pipes() -> None:
    async with gateway() as running:
        process = await trio.lowlevel.open_process(
            [*COMMAND, running.url, "--agent", "letters"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        with trio.fail_after(20):
            await process.stdin.send_all(b"go\n")
            assert (await process.stdout.receive_some(1)) == b"a"
            await process.stdin.send_all(b"/stop\n")
            rest = b"".join([chunk async for chunk in _until_newline(process.stdout)])
            assert b"z" not in rest
            process.terminate()
            assert await process.wait() == 0


async def _until_newline(stream: trio.abc.ReceiveStream) -> AsyncIterator[bytes]:
    while True:
        data = await stream.receive_some()
        yield bytes(data)
        if not data or data.endswith(b"\n"):
            return


# --- a terminal ------------------------------------------------------------------------------------------------------


async def test_a_conversation_at_a_terminal() -> None:
    async with gateway() as running, terminal(running.url) as term:
        session = (await term.expect(r"connected, session (s_[\w-]+)"))[1]
        await term.expect("> ")
        term.type("hello there\n")
        await term.expect("You said: hello there\r\n")
        await term.expect("> ")
        term.type("/ask go on?\n")
        await term.expect(r"\? go on\? \[y/n\]")
        term.type("y\n")
        await term.expect("You approved")
        await term.expect("> ")
        term.type("\x03")
        assert await term.ended() == 0
        assert "\x1b[2m" in term.raw, "notes are dim at a terminal"
        assert f"come back with --session {session}" in term.raw
        assert "Traceback" not in term.raw
        assert term.raw.endswith("\n")
        async with terminal(running.url, "--session", session) as again:
            await again.expect(r"quit leaves\S*\r\n> hello there\r\nYou said: hello there\r\n")
            await again.expect("> ")
            again.type("\x04")
            assert await again.ended() == 0


async def test_text_appears_as_it_comes_and_stop_ends_it() -> None:
    async with gateway() as running, terminal(running.url, "--agent", "letters") as term:
        await term.expect("> ")
        term.type("go\n")
        await term.expect("abc")
        assert "z" not in term.raw.split("go")[-1]
        term.type("/stop\n")
        await term.expect("stopped")
        term.type("/stop\n")
        await term.expect("nothing is running")
        term.type("/quit\n")
        assert await term.ended() == 0


async def test_the_line_is_pulled_in_the_middle_of_an_answer() -> None:
    async with gateway() as running, open_proxy(running.address) as proxy:
        async with terminal(proxy.url, "--agent", "letters", NO_COLOR="1") as term:
            await term.expect("> ")
            term.type("go\n")
            await term.expect("abcd")
            proxy.cut()
            await term.expect("reconnecting in 1 s")
            await term.expect("resumed")
            await term.expect("z")
            said = term.raw[term.raw.index("abcd") :]
            text = "".join(line for line in said.split("\r\n") if not line.startswith("·"))
            assert text.startswith("abcdefghijklmnopqrstuvwxyz")
            assert "\x1b" not in term.raw
            term.type("\x03")
            assert await term.ended() == 0


async def test_ctrl_c_in_every_state() -> None:
    async with gateway() as running, open_proxy(running.address) as proxy:
        async with terminal(proxy.url, "--agent", "letters") as term:
            await term.expect("> ")
            term.type("go\n")
            await term.expect("abc")
            term.type("\x03")
            assert await term.ended() == 0
        async with terminal(proxy.url, "--agent", "letters") as term:
            await term.expect("> ")
            proxy.stall()
            proxy.cut()
            await term.expect("reconnecting")
            term.type("unsent\n\x03")
            assert await term.ended() == 0
            assert "Traceback" not in term.raw
    async with terminal("ws://127.0.0.1:9/ws") as term:
        await term.expect("waiting for a gateway")
        term.type("\x03")
        assert await term.ended() == 0


async def test_an_agent_cannot_write_escape_sequences_to_the_terminal() -> None:
    async with gateway() as running, terminal(running.url, "--agent", "rude") as term:
        await term.expect("> ")
        term.type("go\n")
        await term.expect("gone")
        term.type("/quit\n")
        await term.ended()
        assert "\x1b[2J" not in term.raw
        assert "\x1b]0" not in term.raw
        assert "\x9b" not in term.raw
