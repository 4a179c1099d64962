"""``trio-gateway run`` as an operator has it: real processes, real signals, real ports."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from run_process import COMMAND, PATIENCE, environment, get, refused, running

from gateway import open_session
from gateway._version import __version__

AGENTS = '''
import os, threading, time
import trio

async def hello(turn):
    return f"hello {turn.input.content}"

async def held(turn):
    """Runs until the file exists that the message names."""
    await turn.send("waiting")
    while not os.path.exists(turn.input.content):
        await trio.sleep(0.01)
    return "done"

async def stubborn(turn):
    await turn.send("started")
    await trio.sleep_forever()

async def blocking(turn):
    """Blocks the event loop, as agents should not."""
    print("started", flush=True)
    time.sleep(3600)

def threaded(turn):
    turn.send("started")
    time.sleep(3600)

number = 3
'''


@pytest.fixture
def agents(tmp_path: Path) -> Path:
    """A directory with a module `my_agents`."""
    (tmp_path / "my_agents.py").write_text(AGENTS)
    return tmp_path


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that someone listens on."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock.getsockname()[1]


async def answer(url: str, agent: str, text: str) -> str:
    with trio.fail_after(PATIENCE):
        async with open_session(url, agent) as session:
            await session.send(text)
            async for event in session:
                if event.type == "turn_ended":
                    return session.text_of(event.turn_id)
    raise AssertionError("the session ended first")


# --- start -----------------------------------------------------------------------------------------------------------


async def test_without_arguments_it_serves_the_demo_and_says_how_to_talk_to_it() -> None:
    async with running() as gateway:
        host = gateway.url.removesuffix("/ws")
        assert host.startswith("ws://127.0.0.1:")
        lines = gateway.out.splitlines()
        assert lines[0] == f"trio-gateway {__version__}"
        assert "  agents     echo, demo" in lines
        assert "  store      memory (gone when this process ends)" in lines
        assert f"  talk       trio-gateway chat {gateway.url} --agent echo" in lines
        assert await answer(gateway.url, "echo", "hi") == "You said: hi"
        assert await answer(gateway.url, "demo", "hi") == "You said: hi"
        assert gateway.err == ""


async def test_the_http_side() -> None:
    async with running() as gateway:
        status, body = await get(gateway.http, "/healthz")
        assert (status, json.loads(body)) == (200, {"status": "ok"})
        status, body = await get(gateway.http, "/readyz")
        assert (status, json.loads(body)["status"]) == (200, "ready")
        status, body = await get(gateway.http, "/version")
        assert json.loads(body)["version"] == __version__


async def test_agents_by_argument_keep_their_ids(agents: Path) -> None:
    async with running("my_agents:hello", "other=my_agents:hello", "demo", cwd=agents) as gateway:
        assert "  agents     hello, other, demo" in gateway.out
        assert await answer(gateway.url, "hello", "you") == "hello you"
        assert await answer(gateway.url, "other", "you") == "hello you"


async def test_agents_of_the_file_are_served_all_or_by_name(agents: Path) -> None:
    (agents / "gateway.toml").write_text(
        '[agents.a]\nrun = "my_agents:hello"\n[agents.b]\nrun = "demo"\ndelay_ms = 0\n'
    )
    async with running("--config", "gateway.toml", cwd=agents) as gateway:
        assert "  agents     a, b\n" in gateway.out
    async with running(cwd=agents, TRIO_GATEWAY_CONFIG="gateway.toml") as gateway:
        assert "  agents     a, b\n" in gateway.out
    async with running("b", "--config", "gateway.toml", cwd=agents) as gateway:
        assert "  agents     b\n" in gateway.out
        assert await answer(gateway.url, "b", "hi") == "You said: hi"


async def test_flags_win_over_the_environment_and_the_file(tmp_path: Path) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text('[server]\npath = "/file"\nport = 1\nhttp = false\n[log]\nlevel = "error"')
    variables = {"TRIO_GATEWAY_SERVER_PATH": "/environment", "TRIO_GATEWAY_SERVER_PORT": "2"}
    async with running("--config", str(file), **variables) as gateway:  # with --port 0 and --http-port 0
        assert gateway.url.endswith("/environment")
        assert (await get(gateway.http, "/healthz"))[0] == 200


async def test_sessions_are_kept_in_the_file_that_is_named(tmp_path: Path) -> None:
    url = f"sqlite:{tmp_path / 'sessions.db'}"
    for known in (False, True):
        async with running("--store", url) as gateway:
            assert f"  store      {url}\n" in gateway.out
            with trio.fail_after(PATIENCE):
                async with open_session(gateway.url, "echo", session_id="mine") as session:
                    assert (await session.send("hi", request_id="once")).duplicate is known
                    async for event in session:
                        if event.type == "turn_ended":
                            assert session.text_of(event.turn_id) == "You said: hi"
                            break
            gateway.signal()
            assert await gateway.ended() == 0


async def test_json_goes_to_the_log_and_stdout_stays_empty() -> None:
    async with running("--log-format", "json", ready="listening") as gateway:
        line = json.loads(gateway.err)
        assert (line["event"], line["url"], line["http"]) == ("listening", gateway.url, f"http://{gateway.http}")
        assert (line["agents"], line["store"]) == (["echo", "demo"], "memory")
        gateway.signal()
        assert await gateway.ended() == 0
        assert gateway.out == ""


async def test_no_http_switches_it_off() -> None:
    async with running("--no-http") as gateway:
        assert "  HTTP       off" in gateway.out


async def test_it_says_when_everyone_may_talk_to_it() -> None:
    async with running("--host", "0.0.0.0", "--no-http") as gateway:
        assert "open_to_everyone" in gateway.err
        assert "  talk       trio-gateway chat ws://127.0.0.1:" in gateway.out


async def test_a_reader_of_stdout_that_goes_away_is_no_reason_to_end() -> None:
    read, write = os.pipe()
    os.close(read)
    process = await trio.lowlevel.open_process(
        [*COMMAND, "--port", "0", "--http-port", "0", "--log-level", "debug"],
        stdout=write, stderr=subprocess.PIPE, env=environment(),
    )  # fmt: skip
    os.close(write)
    assert process.stderr is not None
    try:
        with trio.fail_after(PATIENCE):
            while b"stdout_closed" not in await process.stderr.receive_some():
                pass
            process.terminate()
            assert await process.wait() == 0
    finally:
        process.kill()


async def test_it_raises_its_limit_of_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 300:
        pytest.skip("the hard limit is too low")
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        async with running(TRIO_GATEWAY_LIMITS_MAX_CONNECTIONS="40") as gateway:
            limits = resource.prlimit(gateway.process.pid, resource.RLIMIT_NOFILE)
            assert limits == (296, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_run_does_not_import_the_client() -> None:
    code = "import sys, gateway.cli.run; sys.exit(any(name.startswith('gateway.client') for name in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- stop ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_with_exit_code_0(number: int) -> None:
    async with running() as gateway:
        gateway.signal(number)
        assert await gateway.ended() == 0
        assert "Traceback" not in gateway.err


async def test_a_drain_lets_the_turn_finish_and_says_so_on_readyz(agents: Path) -> None:
    flag = agents / "flag"
    async with running("my_agents:held", cwd=agents) as gateway:
        with trio.fail_after(PATIENCE):
            async with open_session(gateway.url, "held") as session:
                turn = ""
                await session.send(str(flag))
                async for event in session:
                    if event.type == "delta":
                        gateway.signal()
                        while (await get(gateway.http, "/readyz"))[0] != 503:
                            pass
                        assert (await get(gateway.http, "/healthz"))[0] == 200
                        flag.touch()
                    if event.type == "turn_ended":
                        turn = event.turn_id
                        assert event.outcome == "completed"
                        break
                assert session.text_of(turn) == "done"
        assert await gateway.ended() == 0


async def test_the_drain_timeout_bounds_it(agents: Path) -> None:
    async with running("my_agents:stubborn", "--drain-timeout", "0.1", cwd=agents) as gateway:
        with trio.fail_after(PATIENCE):
            async with open_session(gateway.url, "stubborn") as session:
                await session.send("x")
                async for event in session:
                    if event.type == "delta":
                        gateway.signal()
                    if event.type == "turn_ended":
                        assert event.outcome == "interrupted"
                        break
        assert await gateway.ended() == 0


@pytest.mark.parametrize("agent", ["stubborn", "threaded", "blocking"])
async def test_a_second_signal_ends_it_at_once(agents: Path, agent: str) -> None:
    async with running(f"my_agents:{agent}", "--drain-timeout", "3600", cwd=agents) as gateway:
        with trio.fail_after(PATIENCE), trio.CancelScope() as conversation:
            async with open_session(gateway.url, agent) as session, trio.open_nursery() as nursery:

                @nursery.start_soon
                async def stop() -> None:
                    if agent == "blocking":
                        await gateway.said("started")
                    else:
                        await streamed.wait()
                    gateway.signal()
                    if agent != "blocking":
                        await gateway.said("drain_started")
                    # A process that blocks may take two equal signals that come together for one.
                    gateway.signal(signal.SIGINT)
                    began = trio.current_time()
                    assert await gateway.ended() == 0
                    assert trio.current_time() - began < 3
                    conversation.cancel()

                streamed = trio.Event()
                await session.send("x")
                async for event in session:
                    if event.type == "delta":
                        streamed.set()
        assert "Traceback" not in gateway.err


# --- what keeps it from starting -------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--port", "--http-port"])
async def test_a_port_in_use(taken: int, flag: str) -> None:
    args = {"--port": "0", "--http-port": "0", flag: str(taken)}
    line = await refused(*(word for pair in args.items() for word in pair))
    assert line.startswith(f"trio-gateway: 127.0.0.1:{taken} is in use")
    assert flag in line


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["no_such_module:agent"], "no module named 'no_such_module'"),
        (["my_agents:helo"], "my_agents has no 'helo'; did you mean 'hello'"),
        (["my_agents:number"], "'my_agents:number' is an int, no agent"),
        (["broken:agent"], "module 'broken' failed while it was imported: ZeroDivisionError"),
        (["nonsense"], "'nonsense': expected MODULE:ATTR"),
        (["a b=my_agents:hello"], "an agent's name is"),
        (["my_agents:hello", "hello=my_agents:held"], "two agents are called 'hello'"),
        (["helo", "--config", "ok.toml"], "unknown agent 'helo'; expected MODULE:ATTR, NAME=MODULE:ATTR or one of"),
        (["--config", "missing.toml"], "missing.toml: cannot be read: No such file or directory"),
        (["--config", "syntax.toml"], "syntax.toml: not valid TOML: Invalid value (at line 1, column 5)"),
        (["--config", "typo.toml"], "limits.max_inbx: unknown setting; did you mean max_inbox? (typo.toml)"),
        (["--config", "agent.toml"], "no module named 'nope'"),
        (["--port", "65536"], "server.port: must be from 0 to 65,535, got 65,536 (--port)"),
        (["--port", "http"], "server.port: expected an integer from 0 to 65,535, got 'http' (--port)"),
        (["--drain-timeout", "-1"], "server.drain_timeout_ms: must be from 0 to 3,600,000, got -1,000"),
        (["--drain-timeout", "nan"], "server.drain_timeout_ms: expected seconds, got 'nan' (--drain-timeout)"),
        (["--log-level", "loud"], "log.level: expected one of debug, info, warning, error, got 'loud' (--log-level)"),
        (["--log-format", "xml"], "log.format: expected one of console, json, got 'xml' (--log-format)"),
        (["--store", "paper"], "store.url: expected 'memory' or 'sqlite:PATH', got 'paper'"),
        (["--store", "sqlite:no/such/directory/x.db"], "no/such/directory/x.db"),
        (["--store", "sqlite:ok.toml"], "ok.toml"),
        (["--host", "256.0.0.1"], "cannot listen on 256.0.0.1"),
    ],
)  # fmt: skip
async def test_one_line_says_what_is_wrong(agents: Path, args: list[str], message: str) -> None:
    (agents / "broken.py").write_text("agent = 1 / 0")
    (agents / "syntax.toml").write_text("x = ]")
    (agents / "typo.toml").write_text("[limits]\nmax_inbx = 3")
    (agents / "ok.toml").write_text('[agents.hello]\nrun = "my_agents:hello"')
    (agents / "agent.toml").write_text('[agents.hello]\nrun = "nope:hello"')
    ports = [] if "--port" in args else ["--port", "0"]
    line = await refused(*args, *ports, "--http-port", "0", cwd=agents)
    assert line.startswith("trio-gateway: ")
    assert message in line


async def test_a_typo_in_the_environment() -> None:
    line = await refused(TRIO_GATEWAY_SERVER_PROT="1")
    assert line.endswith("unknown variable; did you mean TRIO_GATEWAY_SERVER_PORT?")


# --- without the extra `http` ----------------------------------------------------------------------------------------


@pytest.fixture
def no_hypercorn(tmp_path: Path) -> str:
    """A PYTHONPATH on which hypercorn is as good as not installed."""
    (tmp_path / "hypercorn").mkdir()
    (tmp_path / "hypercorn" / "__init__.py").write_text("raise ModuleNotFoundError(name='hypercorn')")
    return str(tmp_path)


async def test_without_the_extra_it_runs_without_http_and_says_so(no_hypercorn: str) -> None:
    # No --http-port: nobody asked for it.
    process = await trio.lowlevel.open_process(
        [*COMMAND, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment(PYTHONPATH=no_hypercorn),
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    out = b""
    try:
        with trio.fail_after(PATIENCE):
            while b"stop  " not in out:
                out += await process.stdout.receive_some()
            process.terminate()
            err = b"".join([data async for data in process.stderr])
            assert await process.wait() == 0
    finally:
        process.kill()
    assert b"HTTP       off" in out
    first = err.decode().splitlines()[0]
    assert first == (
        "trio-gateway: runs without health checks: HTTP needs hypercorn; install trio-gateway[http] to have them"
    )


async def test_without_the_extra_a_wanted_http_port_is_refused(no_hypercorn: str) -> None:
    line = await refused("--http-port", "0", PYTHONPATH=no_hypercorn)
    assert line.startswith("trio-gateway: server.http_port: needs hypercorn; install trio-gateway[http], or run with")
