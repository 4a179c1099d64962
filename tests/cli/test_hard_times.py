"""What a gateway must come through as a process: an input that kills it, a drain against everything that hangs, a store
that someone else takes."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from textwrap import dedent

import pytest
import trio
from plain_client import Plain, Reader, ended, joined
from run_process import COMMAND, PATIENCE, Running, environment, get, running

from gateway.protocol.messages import TurnEnded, TurnStarted
from gateway.store.inspect import read_session
from gateway.store.sqlite import SqliteStore


def address(gateway: Running) -> tuple[str, int]:
    host, _, port = gateway.url.removeprefix("ws://").removesuffix("/ws").rpartition(":")
    return host, int(port)


# --- poison ----------------------------------------------------------------------------------------------------------

POISON = """
import os, signal
import trio
from gateway import Turn

async def agent(turn: Turn) -> str:
    if turn.input.content in ("exit", "kill"):
        while not os.path.exists("armed"):
            await trio.sleep(0.01)
        os._exit(9) if turn.input.content == "exit" else os.kill(os.getpid(), signal.SIGKILL)
    return "fine"
"""


def ends_of(file: Path, session: str) -> list[tuple[list[str], int, str]]:
    """Each turn that ended: its request ids, its attempt and its outcome."""
    found = read_session(str(file), session)
    assert found is not None
    started = {event.turn_id: event for event in found.events if isinstance(event, TurnStarted)}
    return [
        (list(map(str, started[event.turn_id].request_ids)), started[event.turn_id].attempt, event.outcome)
        for event in found.events
        if isinstance(event, TurnEnded)
    ]


@pytest.mark.parametrize("how", ["exit", "kill"])
async def test_an_input_that_kills_the_process_is_tried_three_times_and_stops_nobody_else(
    tmp_path: Path, how: str
) -> None:
    (tmp_path / "poison.py").write_text(dedent(POISON))
    (tmp_path / "gateway.toml").write_text('[agents.echo]\nrun = "poison:agent"\non_lost = "retry"\n')
    arguments = ["--config", "gateway.toml", "--store", "sqlite:s.db", "--no-http"]
    file = tmp_path / "s.db"
    async with running(*arguments, cwd=tmp_path) as gateway:
        async with joined(address(gateway), "s") as client, joined(address(gateway), "other") as other:
            await client.message(how, "poison")
            await client.message("later", "later")
            await other.message("hello", "before")
            await other.until("turn_ended")
            (tmp_path / "armed").touch()
            assert await gateway.ended() == (9 if how == "exit" else -signal.SIGKILL)
    deaths = 1
    while True:
        process = await trio.lowlevel.open_process(
            [*COMMAND, "--port", "0", *arguments], cwd=tmp_path, env=environment(), stdout=-3, stderr=-3
        )
        try:
            with trio.fail_after(PATIENCE):
                # What it does is seen in its file alone.
                while process.poll() is None and len(ends_of(file, "s")) < 4:  # noqa: ASYNC110
                    await trio.sleep(0.02)
            if process.poll() is None:
                process.terminate()
                assert await process.wait() == 0
                break
        finally:
            process.kill()
        deaths += 1
        assert deaths <= 3, ends_of(file, "s")
    assert ends_of(file, "s") == [
        (["poison"], 1, "lost"),
        (["poison"], 2, "lost"),
        (["poison"], 3, "lost"),
        (["later"], 1, "completed"),
    ]
    async with running(*arguments, cwd=tmp_path) as gateway, joined(address(gateway), "other") as other:
        await other.message("again")
        await other.until("turn_ended", outcome="completed")


# --- drain -----------------------------------------------------------------------------------------------------------

HANGING = """
import os, sqlite3, time
import trio
from gateway import Turn
from gateway.store import sqlite_file

class SlowDisk(sqlite3.Connection):
    def execute(self, sql, *values):
        while sql.startswith("INSERT INTO written") and os.path.exists("slow"):
            time.sleep(0.05)
        return super().execute(sql, *values)

sqlite_file._connect = lambda path, timeout: sqlite3.connect(
    path, timeout=timeout, isolation_level=None, check_same_thread=False, factory=SlowDisk
)

async def obedient(turn: Turn) -> None:
    await turn.send("x")
    await trio.sleep_forever()

async def flooding(turn: Turn) -> None:
    while True:
        await turn.send("x" * 10_000)

async def shielded(turn: Turn) -> None:
    with trio.CancelScope(shield=True):
        await turn.send("x")
        await trio.sleep_forever()

async def swallowing(turn: Turn) -> None:
    await turn.send("x")
    while True:
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            pass

def threaded(turn: Turn) -> str:
    open("in-thread", "w").close()
    time.sleep(3600)
"""

LIMITS = {"TRIO_GATEWAY_LIMITS_STOP_TIMEOUT_MS": "200", "TRIO_GATEWAY_LIMITS_CLOSE_TIMEOUT_MS": "200"}
BOUND = 0.3 + 0.2 + 1 + 1 + 2 * 0.2 + 10
"""Seconds: drain_timeout, stop_timeout and a second for the turns, one for replies, two close_timeouts, and what the
process gets to clean up. See `gateway.server.gateway` and `gateway.cli.run`."""

SLACK = 10.0
"""Of a loaded machine."""


@asynccontextmanager
async def hanging(folder: Path, agent: str, *more: str) -> AsyncIterator[tuple[Running, Plain]]:
    (folder / "hanging.py").write_text(dedent(HANGING))
    arguments = [f"echo=hanging:{agent}", "--store", "sqlite:s.db", *more]
    async with running(*arguments, cwd=folder, **LIMITS) as gateway:
        async with joined(address(gateway), "s", small=agent == "flooding") as client:
            yield gateway, client


@pytest.mark.parametrize(
    ("agent", "slow_disk"),
    [("flooding", False), ("swallowing", False), ("threaded", False), ("obedient", True)],
)
async def test_a_drain_is_bounded_whatever_hangs(tmp_path: Path, agent: str, slow_disk: bool) -> None:
    async with hanging(tmp_path, agent, "--drain-timeout", "0.3") as (gateway, client):
        await client.message("go")
        if agent == "threaded":
            with trio.fail_after(PATIENCE):
                while not (tmp_path / "in-thread").exists():  # noqa: ASYNC110
                    await trio.sleep(0.01)
        else:
            await client.until("delta")
        if slow_disk:
            (tmp_path / "slow").touch()
            await client.send("message", request_id="never stored", content="x")
            await client.ask("ping", "pong")
        gateway.signal()
        await gateway.said("drain_started")
        assert (await get(gateway.http, "/readyz"))[0] == 503
        assert (await get(gateway.http, "/healthz"))[0] == 200
        began = trio.current_time()
        with trio.fail_after(BOUND + SLACK):
            assert await gateway.process.wait() == 0
        assert trio.current_time() - began < BOUND + SLACK
        assert "Traceback" not in gateway.err
        if agent != "flooding":  # that one does not read
            await client.until_closed()
            assert not [frame for frame in client.seen if frame.get("request_id") == "never stored"]


@pytest.mark.parametrize("agent", ["shielded", "swallowing"])
async def test_the_second_signal_ends_it_at_once_on_a_slow_disk_too(tmp_path: Path, agent: str) -> None:
    async with hanging(tmp_path, agent, "--drain-timeout", "3600") as (gateway, client):
        await client.message("go")
        await client.until("delta")
        (tmp_path / "slow").touch()
        await client.send("message", request_id="never stored", content="x")
        await client.ask("ping", "pong")
        gateway.signal()
        await gateway.said("drain_started")
        gateway.signal()
        with trio.fail_after(1 + SLACK):
            assert await gateway.process.wait() == 0


# --- the store is taken ----------------------------------------------------------------------------------------------


async def test_a_gateway_whose_store_is_taken_says_so_and_ends(tmp_path: Path) -> None:
    """Its lock file was removed, so that another process could open the store: one of the two has to go."""
    async with running("echo=gateway.agents.demo:demo", "--store", "sqlite:s.db", cwd=tmp_path) as gateway:
        async with joined(address(gateway), "s") as client, joined(address(gateway), "other") as other:
            reader = Reader()
            await client.send("message", content="hello", request_id="r1")
            while True:
                frame = await client.recv()
                reader.take(frame)
                if ended(frame):
                    break
            os.remove(tmp_path / "s.db-lock")
            async with SqliteStore(tmp_path / "s.db") as taker:
                await client.send("message", content="too late", request_id="r2")
                refused = await client.until("error", request_id="r2")
                assert (refused["code"], refused["retryable"]) == ("unavailable", True)
                assert (await client.until_closed()).code == 1011
                assert (await other.until("goaway"))["reason"] == "store_lost"
                assert (await other.until_closed()).code == 1012
                assert await gateway.ended() == 2
                line = gateway.err.splitlines()[-1]
                assert line == (
                    f"trio-gateway: {tmp_path}/s.db: another process has opened it for writing; end one of the two"
                )
                assert "store_lost" in gateway.err
                assert "Traceback" not in line
                found = await taker.load("s", max_events=100, max_bytes=1 << 20)
                assert found is not None
                assert found.events[-1].seq == reader.cursor, "what was stored before is there, and nothing else"
