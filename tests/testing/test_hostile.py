"""The difficult gateway: our own client gets everything right against it, and clients that do not are told apart."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from plain_client import Closed, Plain, eventually, hello
from run_process import PATIENCE, environment

from gateway import open_session
from gateway.testing.hostile import HINT_MS, MOODS, HostileGateway

MESSAGES = 5


@asynccontextmanager
async def hostile(seed: int, **options: Any) -> AsyncIterator[tuple[HostileGateway, str, int]]:
    gateway = HostileGateway(seed, **options)
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, gateway.serve, [listener])
        nursery.start_soon(gateway.watch)
        port = listener.socket.getsockname()[1]
        yield gateway, f"ws://127.0.0.1:{port}/ws", port
        nursery.cancel_scope.cancel()


async def converse(gateway: HostileGateway, url: str) -> None:
    """Have all messages answered, and check every word against what the gateway has."""
    async with open_session(url, "echo", chance=lambda: 0.02) as session:
        for number in range(MESSAGES):
            await session.send(f"message {number}")
        ended: set[str] = set()
        async for item in session:
            events = item.transcript if item.type == "snapshot" else [item]
            ended |= {event.turn_id for event in events if event.type == "turn_ended"}
            if len(ended) == MESSAGES:
                break
        assert session.session_id is not None
        assert session.cursor == gateway.sessions[session.session_id].head
        for turn_id in ended:
            assert session.text_of(turn_id, "answer") == gateway.sessions[session.session_id].text_of(turn_id)
        await session.leave()


async def conversations(seeds: range, moods: tuple[str, ...] = MOODS) -> int:
    connections = 0
    for seed in seeds:
        async with hostile(seed, max_stall=PATIENCE, moods=moods) as (gateway, url, _):
            with trio.fail_after(6 * PATIENCE):
                async with trio.open_nursery() as nursery:
                    for _ in range(3):
                        nursery.start_soon(converse, gateway, url)
            assert gateway.failures == []
            connections += gateway.connections
    return connections


@pytest.mark.parametrize("mood", sorted(set(MOODS)))
async def test_our_client_gets_everything_right_in_every_mood(mood: str) -> None:
    await conversations(range(1, 3), (mood,))


async def test_our_client_gets_everything_right_whatever_comes() -> None:
    assert await conversations(range(10, 14)) > 12, "lines were cut, and clients came back"


@pytest.mark.long
async def test_our_client_gets_everything_right_for_long() -> None:
    print(await conversations(range(100, 400)), "connections")


# --- clients that are wrong ------------------------------------------------------------------------------------------


async def opened(port: int) -> Plain:
    client = Plain(await trio.open_tcp_stream("127.0.0.1", port))
    await client.upgrade(host="127.0.0.1")
    return client


async def joined(port: int, **fields: Any) -> Plain:
    client = await opened(port)
    await client.send_text(json.dumps(hello(**fields)))
    client.hello = await client.recv()
    return client


async def says_no_hello(port: int) -> None:
    await (await opened(port)).send("ping")


async def says_a_bad_hello(port: int) -> None:
    await (await opened(port)).send("hello", protocol_min=2, protocol_max="2", agent_id="x")


async def says_nothing(port: int) -> Plain:
    return await opened(port)


async def speaks_no_websocket(port: int) -> None:
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    await stream.send_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")


async def does_not_mask(port: int) -> None:
    await (await joined(port)).send_raw(b"\x81\x02{}")


async def sends_binary(port: int) -> None:
    await (await joined(port)).send_raw(b"\x82\x80\0\0\0\0")


async def sends_wrong_types(port: int) -> None:
    await (await joined(port)).send("message", request_id=3, content="x")


async def says_hello_twice(port: int) -> None:
    await (await joined(port)).send_text(json.dumps(hello()))


async def reuses_a_request_id(port: int) -> None:
    client = await joined(port)
    await client.message("one", "r1")
    await client.send("message", request_id="r1", content="another")


BAD: dict[Callable[[int], Awaitable[Plain | None]], str] = {
    says_no_hello: "a hello that is none",
    says_a_bad_hello: "a hello that is none.*protocol_max",
    says_nothing: "no hello within",
    speaks_no_websocket: "expected a WebSocket upgrade",
    does_not_mask: "a frame is not masked",
    sends_binary: "a binary message",
    sends_wrong_types: "a frame that is wrong.*request_id",
    says_hello_twice: "a second hello",
    reuses_a_request_id: "request_id 'r1' again",
}


@pytest.mark.parametrize("client", BAD, ids=lambda client: client.__name__)
async def test_a_client_that_breaks_the_protocol_is_told_apart(
    client: Callable[[int], Awaitable[Plain | None]],
) -> None:
    async with hostile(1, max_stall=1.0 if client is says_nothing else PATIENCE, moods=("honest",)) as (
        gateway,
        _,
        port,
    ):
        kept = await client(port)
        await failed(gateway, BAD[client])
        del kept  # its line ends with it


async def failed(gateway: HostileGateway, pattern: str) -> None:
    with trio.fail_after(PATIENCE):
        await gateway.watch()
    assert re.search(pattern, str(gateway.failures[0])), gateway.failures


async def ended(client: Plain) -> Closed:
    await client.send("message", request_id="r1", content="x")
    return await client.until_closed()


async def test_a_client_that_does_not_come_back() -> None:
    async with hostile(1, max_stall=0.3, moods=("close",)) as (gateway, _, port):
        await ended(await joined(port))
        await failed(gateway, "no client came back")


async def test_a_client_that_comes_back_too_early() -> None:
    async with hostile(1, max_stall=PATIENCE, moods=("refuse",)) as (gateway, _, port):
        client = await joined(port, session_id="s")
        assert client.hello["retry_after_ms"] == HINT_MS
        assert (await client.until_closed()).code == 4429
        again = await opened(port)
        await again.send_text(json.dumps(hello(session_id="s")))
        await failed(gateway, f"before the {HINT_MS} ms")


@pytest.mark.parametrize(
    ("since", "pattern"), [(10_000, "continues after 10000, where no event"), (0, "it had .* and continues after 0")]
)
async def test_a_client_that_resumes_from_elsewhere(since: int, pattern: str) -> None:
    """From a position that it was never told, or from one before the one that it had."""
    async with hostile(3, max_stall=PATIENCE, moods=("close",)) as (gateway, _, port):
        first = await joined(port, session_id="s")
        await ended(first)
        cursor = max(frame["seq"] for frame in first.seen if "first" in frame)
        second = await joined(port, session_id="s", since=cursor, epoch=first.hello["epoch"])
        await second.cut()
        await eventually(lambda: not gateway.sessions["s"].connections)
        third = await opened(port)
        await third.send_text(json.dumps(hello(session_id="s", since=since, epoch=first.hello["epoch"])))
        await failed(gateway, pattern)


async def test_a_client_that_does_not_notice_a_gap() -> None:
    async with hostile(2, max_stall=0.5, moods=("gap",)) as (gateway, _, port):
        client = await joined(port)
        for number in range(5):
            await client.send("message", request_id=f"r{number}", content="x")
        await failed(gateway, "goes on after an event that left a gap")


# --- the command -----------------------------------------------------------------------------------------------------


async def serve(client: str, cwd: Path, *args: str) -> tuple[int, str]:
    """Run ``fuzz --serve`` and a client against the address that it prints; its exit code and output."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "gateway.cli", "fuzz", "--serve", "--seed", "5", *args],
        cwd=cwd, env=environment(PYTHONUNBUFFERED="1"), stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    out = b""
    with trio.fail_after(3 * PATIENCE):
        while b"\n" not in out:
            out += await process.stdout.receive_some()
        found = re.search(rb"ws://\S+(?=,)", out)
        assert found is not None, out
        await trio.run_process([sys.executable, "-c", client, found[0].decode()], cwd=cwd, env=environment())
        while data := await process.stdout.receive_some():
            out += data
        return await process.wait(), out.decode()


GOOD_CLIENT = """
import sys, trio
from gateway import open_session

async def main():
    async with open_session(sys.argv[1], "echo") as session:
        await session.send("hello")
        async for item in session:
            if item.type == "turn_ended":
                break
        await session.leave()

trio.run(main)
"""

BAD_CLIENT = """
import socket, sys, urllib.parse
url = urllib.parse.urlsplit(sys.argv[1])
with socket.create_connection((url.hostname, url.port)) as line:
    line.sendall(b"hello?\\r\\n\\r\\n")
    line.recv(1)
"""


async def test_the_command_has_nothing_to_say_about_a_good_client(tmp_path: Path) -> None:
    code, out = await serve(GOOD_CLIENT, tmp_path, "--seconds", "5")
    assert code == 0, out
    assert "nothing found" in out


async def test_the_command_reports_a_bad_client(tmp_path: Path) -> None:
    code, out = await serve(BAD_CLIENT, tmp_path, "--save", "said.jsonl")
    assert code == 1, out
    assert "FAILED" in out
    assert "expected a WebSocket upgrade" in out
    assert (tmp_path / "said.jsonl").exists()
