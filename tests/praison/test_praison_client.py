"""PraisonAI's shipped client against a gateway process: the package itself, unmodified, over lines that are cut."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from cutting_proxy import open_proxy
from plain_client import Reader, ended, follow, joined
from praison_environment import praison_python
from run_process import Running, running

HERE = Path(__file__).parent
PATIENCE = 60.0
"""Seconds until a test gives up waiting. Nothing is measured with it."""

Frame = dict[str, Any]


@pytest.fixture(scope="session")
def python() -> Path:
    return praison_python()


class Client:
    """Its process. `heard` is everything it said, in order; `events` what its application was given."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.heard: list[Frame] = []
        self._more = trio.lowlevel.ParkingLot()

    async def read(self) -> None:
        assert self.process.stdout is not None
        buffer = b""
        async for data in self.process.stdout:
            *lines, buffer = (buffer + data).split(b"\n")
            self.heard += [json.loads(line) for line in lines]
            self._more.unpark_all()

    async def do(self, **command: Any) -> None:
        assert self.process.stdin is not None
        await self.process.stdin.send_all(json.dumps(command).encode() + b"\n")

    async def send(self, type: str, **fields: Any) -> None:
        await self.do(send={"type": type, **fields})

    async def until(self, done: Callable[[Frame], bool]) -> Frame:
        """The first thing said, ever, for which `done` holds."""
        at = 0
        with trio.fail_after(PATIENCE):
            while True:
                for one in self.heard[at:]:
                    if done(one):
                        return one
                at = len(self.heard)
                await self._more.park()

    async def event(self, kind: str, /, **fields: Any) -> Frame:
        """The data of the first such event."""
        found = await self.until(
            lambda one: one.get("event") == kind and all(one["data"].get(k) == v for k, v in fields.items())
        )
        data: Frame = found["data"]
        return data

    async def report(self) -> Frame:
        had = sum("report" in one for one in self.heard)
        await self.do(report=True)
        await self.until(lambda one: "report" in one and sum("report" in two for two in self.heard) > had)
        report: Frame = [one["report"] for one in self.heard if "report" in one][-1]
        return report

    async def connected(self, times: int) -> None:
        """Wait until it has joined so many times in all."""
        await self.until(lambda _: self.connections >= times)

    @property
    def connections(self) -> int:
        return sum(one.get("state") == "connected" for one in self.heard)

    @property
    def gaps(self) -> list[list[int]]:
        return [one["gap"] for one in self.heard if "gap" in one]

    def events(self, kind: str) -> list[Frame]:
        return [one for one in self.heard if one.get("event") == kind]

    def tokens(self) -> str:
        return "".join(one["data"]["content"] for one in self.events("token_stream"))

    def finals(self) -> list[str]:
        return [one["data"]["content"] for one in self.events("response") if one["data"]["status"] == "final"]


@asynccontextmanager
async def praison(python: Path, url: str, agent_id: str, **options: Any) -> AsyncIterator[Client]:
    arguments = json.dumps({"url": url, "agent_id": agent_id, **options})
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    async with trio.open_nursery() as nursery:
        process = await trio.lowlevel.open_process(
            [python, "-u", str(HERE / "praison_client.py"), arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**kept, "PYTHONDONTWRITEBYTECODE": "1"},
        )
        client = Client(process)
        nursery.start_soon(client.read)
        try:
            yield client
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


def agents(*names: str) -> list[str]:
    return [f"{name}=praison_agents:{name}" for name in names]


@asynccontextmanager
async def gateway(tmp_path: Path, *args: str) -> AsyncIterator[tuple[Running, Path]]:
    """A gateway with these agents, and the file that ends its stream."""
    stop = tmp_path / "stop"
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")]))
    async with running(
        *agents("stream", "ask", "fail", "echo"), *args, PRAISON_STOP=str(stop), PYTHONPATH=path
    ) as process:
        yield process, stop


def address(url: str) -> tuple[str, int]:
    found = re.match(r"ws://(.+):(\d+)/", url)
    assert found is not None
    return found[1], int(found[2])


async def said(where: tuple[str, int], session_id: str) -> dict[str, str]:
    """What the gateway holds of a session, read with version 2: the text of each turn."""
    async with joined(where, session_id, agent_id="stream") as client:
        reader = Reader()
        reader.take(client.hello)
        while reader.cursor < client.hello["head"]:
            reader.take(await client.recv())
        return {turn_id: text for (turn_id, channel), text in reader.sealed.items() if channel == "answer"}


class Budgets:
    """How many bytes each connection gets before it is cut; the last is for all that follow."""

    def __init__(self, *budgets: int | None) -> None:
        self.budgets = list(budgets)

    def __call__(self) -> int | None:
        return self.budgets.pop(0) if len(self.budgets) > 1 else self.budgets[0]


async def test_cut_three_times_within_one_answer(python: Path, tmp_path: Path) -> None:
    async with gateway(tmp_path) as (process, stop):
        where = address(process.url)
        async with open_proxy(where, Budgets(20_000, 21_111, 22_222, None)) as proxy:
            async with praison(python, proxy.url, "stream") as client:
                await client.connected(1)
                session_id = (await client.report())["session_id"]
                await client.send("message", content="go")
                await client.connected(4)
                at = len(client.tokens())
                await client.until(lambda _: len(client.tokens()) > at + 100)  # it goes on after the last cut
                stop.touch()
                end = await client.event("stream_end")
                report = await client.report()
                texts = await said(where, session_id)
        assert proxy.accepted == 4
    text = texts[end["turn_id"]]
    assert client.tokens() == text
    assert client.finals() == [text]
    assert text.split() == [str(n) for n in range(len(text.split()))]
    assert client.gaps == []
    assert report["session_id"] == session_id
    assert report["transport_gap"] is False
    assert report["runs"] == {end["turn_id"]: [text, True]}
    ids = [one["event_id"] for one in client.heard if one.get("sequence") is not None]
    assert len(ids) == len(set(ids))
    assert len(client.events("tool_call_stream")) == len(client.events("tool_result_stream")) == 1


async def test_cut_three_times_while_it_catches_up(python: Path, tmp_path: Path) -> None:
    """The answer ended while the client was away: its tokens are gone from the log, and it is cut in the replay."""
    async with gateway(tmp_path) as (process, stop):
        where = address(process.url)
        async with open_proxy(where, budgets := Budgets(20_000, None)) as proxy:
            async with praison(python, proxy.url, "stream") as client:
                await client.connected(1)
                session_id = (await client.report())["session_id"]
                await client.send("message", content="go")
                await client.connected(2)
                proxy.stall()  # what comes from now on is lost on the way
                async with joined(where, session_id, agent_id="stream") as watcher:
                    reader = Reader()
                    await follow(watcher, reader, lambda _: len("".join(reader.tail.values())) > 8_000)
                    stop.touch()
                    await follow(watcher, reader, ended)
                budgets.budgets = [1_500, 1_700, None]
                proxy.cut()
                proxy.resume()
                end = await client.event("stream_end")
                texts = await said(where, session_id)
        assert proxy.accepted >= 5
    text = texts[end["turn_id"]]
    assert client.tokens() == text
    assert client.finals() == [text]
    assert client.gaps == []


async def test_a_gateway_that_is_killed_in_mid_answer(python: Path, tmp_path: Path) -> None:
    """It comes back from its store: the turn is lost, or run again; the client goes on in the same session."""
    config = tmp_path / "config.toml"
    config.write_text(
        "\n".join(f'[agents.{name}]\nrun = "praison_agents:{name}"\non_lost = "retry"' for name in ("stream", "echo"))
    )
    store = ["--store", f"sqlite:{tmp_path / 'sessions.db'}"]
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")]))
    stop = tmp_path / "stop"
    options = {"PRAISON_STOP": str(stop), "PYTHONPATH": path}
    args = ["--config", str(config), *store]
    async with running(*args, **options) as first:
        host, port = address(first.url)
        async with praison(python, first.url, "stream") as client:
            await client.connected(1)
            session_id = (await client.report())["session_id"]
            await client.send("message", content="go", request_id="r1")
            await client.until(lambda _: len(client.tokens()) > 200)
            first.signal(signal.SIGKILL)
            await first.ended()
            stop.touch()
            async with running(*args, "--port", str(port), **options):
                end = await client.event("response", status="final", outcome={"status": "ok"})
                await client.send("message", content="go", request_id="r1")
                await client.event("response", status="duplicate", request_id="r1")
                report = await client.report()
                texts = await said((host, port), session_id)
    lost = await client.event("error")
    assert lost["code"] == "lost"
    assert report["session_id"] == session_id
    assert report["runs"][end["turn_id"]][0] == end["content"] == texts[end["turn_id"]]
    assert report["runs"][lost["turn_id"]][0] != ""
    assert len(client.finals()) == 2
    assert client.gaps == []


async def test_questions_stops_and_failures(python: Path, tmp_path: Path) -> None:
    async with gateway(tmp_path) as (process, _):
        async with praison(python, process.url, "ask") as client:
            await client.connected(1)
            await client.send("message", content="go", request_id="r1")
            for kind, wrong, value in (
                ("approval", "maybe", "allow"),
                ("choice", "green", "blue"),
                ("input", None, "x"),
            ):
                asked = await client.event("server_request", kind=kind)
                if wrong is not None:
                    await client.send("server_reply", request_id=asked["request_id"], value=wrong)
                    await client.event("error", code="invalid_frame")
                await client.send("server_reply", request_id=asked["request_id"], value=value)
                await client.event("server_reply_ack", request_id=asked["request_id"], status="resolved")
            await client.event("response", status="final", content="True blue x")
            await client.send("message", content="go", request_id="r1")
            await client.event("response", status="duplicate", request_id="r1")
            await client.send("server_reply", request_id="nobody", value="x")
            await client.event("server_reply_ack", request_id="nobody", status="unknown_request")
            await client.send("abort")
            await client.event("no_active_turn")
        async with praison(python, process.url, "fail") as client:
            await client.connected(1)
            await client.send("message", content="go")
            assert (await client.event("error"))["code"] == "quota"
            final = await client.event("response", status="final")
            assert final["content"] == "so far "
            assert final["outcome"]["error"]["message"] == "No credit left; add some."
        async with praison(python, process.url, "stream") as client:
            await client.connected(1)
            for request_id in ("r1", "r2", "r3"):
                await client.send("message", content="go", request_id=request_id)
                await client.event("response", status="accepted", request_id=request_id)
            await client.event("token_stream")
            await client.send("message", content="/stop")
            assert (await client.event("aborted"))["turn_aborted"] is True
            first = await client.event("response", status="final", outcome={"status": "aborted"})
            assert client.tokens().startswith(first["content"])
            await client.event("typing", request_ids=["r2"])
            await client.send("message_abort", scope="session")
            assert (await client.event("aborted", pending_cancelled=1))["scope"] == "session"
            assert (await client.event("message_nack"))["request_id"] == "r3"
            assert client.gaps == []


async def test_it_stays_connected_while_nothing_is_said(python: Path, tmp_path: Path) -> None:
    """Both sides ping at the policy's interval, and both count what comes."""
    config = tmp_path / "config.toml"
    config.write_text("[limits]\nheartbeat_ms = 1000\n")
    async with gateway(tmp_path, "--config", str(config)) as (process, _):
        async with open_proxy(address(process.url)) as proxy:
            async with praison(python, proxy.url, "echo") as client:
                await client.connected(1)
                assert (await client.report())["heartbeat_ms"] == 1000
                await trio.sleep(3.5)  # the time after which either would have closed twice over
                await client.send("message", content="still here")
                await client.event("response", status="final", content="echo: still here")
                assert client.connections == proxy.accepted == 1
                assert client.gaps == []


async def test_refusals_that_it_understands(python: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('[server.tokens]\nalice = "the-secret-of-alice-0123456789ab"\n')
    async with gateway(tmp_path, "--config", str(config)) as (process, _):
        for token, agent_id, code, step in (
            (None, "echo", "auth_required", "reauthenticate"),
            ("wrong", "echo", "auth_unauthorized", "reauthenticate"),
            ("the-secret-of-alice-0123456789ab", "nobody", "agent_not_found", "do_not_retry"),
        ):
            async with praison(python, process.url, agent_id, token=token) as client:
                await client.until(lambda one, want=[code, step]: one.get("paused") == want)
        async with praison(python, process.url, "echo", token="the-secret-of-alice-0123456789ab") as client:
            await client.connected(1)
            await client.send("message", content="hi")
            await client.event("response", status="final", content="echo: hi")


async def test_a_resync_of_its_own_reads_everything_again(python: Path, tmp_path: Path) -> None:
    async with gateway(tmp_path) as (process, _):
        async with praison(python, process.url, "echo") as client:
            await client.connected(1)
            await client.send("message", content="hi")
            await client.event("stream_end")
            await client.do(resync=True)
            await client.connected(2)
            await client.until(lambda _: len(client.events("stream_end")) == 2)
            assert client.finals() == ["echo: hi"] * 2
            assert client.gaps == []


async def test_the_client_of_the_how_to(python: Path, tmp_path: Path) -> None:
    """The page's program, as it stands there, with the agent it names."""
    page = (HERE.parents[1] / "docs/how-to/from-praisonai.md").read_text()
    found = re.search(r"^```python file=talk.py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert found is not None
    (tmp_path / "talk.py").write_text(found[1])
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")]))
    async with running("assistant=praison_agents:assistant", PYTHONPATH=path) as process:
        with trio.fail_after(PATIENCE):
            done = await trio.run_process(
                [python, tmp_path / "talk.py", process.url], capture_stdout=True, stdin=subprocess.DEVNULL
            )
    assert done.stdout.decode() == "You said hello. [ok]\n"
