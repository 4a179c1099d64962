"""``trio-gateway run`` as a process, and an HTTP client of five lines."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

COMMAND = [sys.executable, "-m", "gateway.cli", "run"]
PATIENCE = 20.0
"""Seconds until a test gives up waiting for a process. Nothing is measured with it."""


def environment(**extra: str) -> dict[str, str]:
    """Ours, without settings from it, and with a store that leaves nothing behind."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRIO_GATEWAY_")}
    return {**kept, "PYTHONDONTWRITEBYTECODE": "1", "TRIO_GATEWAY_STORE_URL": "memory", **extra}


async def refused(*args: str, cwd: Path | None = None, **env: str) -> str:
    """Run it where it cannot start: nothing on stdout, exit code 2, and one line on stderr, which is returned."""
    with trio.fail_after(PATIENCE):
        done = await trio.run_process(
            [*COMMAND, *args], capture_stdout=True, capture_stderr=True, check=False, cwd=cwd, env=environment(**env)
        )
    assert done.stdout == b""
    lines = done.stderr.decode().splitlines()
    assert len(lines) == 1, lines
    assert done.returncode == 2
    return lines[0]


class Running:
    """A gateway that has said what it listens on. `out` and `err` are what it printed so far."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.out = ""
        self.err = ""
        self._more = trio.lowlevel.ParkingLot()

    @property
    def url(self) -> str:
        """Where its WebSocket is."""
        return self._found(r"wss?://[^\s\"]+")

    @property
    def http(self) -> str:
        """HOST:PORT of its HTTP side."""
        return self._found(r"(?<=http://)[^/\s\"]+")

    def _found(self, pattern: str) -> str:
        found = re.search(pattern, self.out + self.err)
        assert found is not None, self.out + self.err
        return found[0]

    async def read(self, stream: trio.abc.ReceiveStream, name: str) -> None:
        async for data in stream:
            setattr(self, name, getattr(self, name) + data.decode())
            self._more.unpark_all()

    async def said(self, pattern: str) -> None:
        """Wait until stdout or stderr has `pattern`."""
        with trio.fail_after(PATIENCE):
            while not re.search(pattern, self.out + self.err):
                await self._more.park()

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    async def ended(self) -> int:
        """Wait for the exit, and return its code."""
        with trio.fail_after(PATIENCE):
            return await self.process.wait()


@asynccontextmanager
async def running(*args: str, cwd: Path | None = None, ready: str = "stop  ", **env: str) -> AsyncIterator[Running]:
    """A gateway on free ports, once it has printed `ready`. It is killed at the end of the block if it still runs."""
    command = [*COMMAND, "--port", "0", *args]
    if "--no-http" not in args and "--http-port" not in args:
        command += ["--http-port", "0"]
    async with trio.open_nursery() as nursery:
        process = await trio.lowlevel.open_process(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=cwd, env=environment(**env)
        )
        assert process.stdout is not None
        assert process.stderr is not None
        gateway = Running(process)
        nursery.start_soon(gateway.read, process.stdout, "out")
        nursery.start_soon(gateway.read, process.stderr, "err")
        try:
            await gateway.said(ready)
            yield gateway
        finally:
            if process.returncode is None:
                process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


async def get(where: str, path: str, method: str = "GET") -> tuple[int, bytes]:
    """Ask HOST:PORT for `path`: status and body."""
    host, _, port = where.rpartition(":")
    with trio.fail_after(PATIENCE):
        async with await trio.open_tcp_stream(host, int(port)) as stream:
            await stream.send_all(f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            answer = b"".join([data async for data in stream])
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body
