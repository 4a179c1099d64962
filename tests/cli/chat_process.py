"""``trio-gateway chat`` as a process: through pipes, or at a pseudo-terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import subprocess
import sys
import termios
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

COMMAND = [sys.executable, "-c", "from gateway.cli.chat import chat; chat()"]


def _environment(**extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TRIO_GATEWAY_TOKEN")}
    return {**kept, "TERM": "xterm", "PYTHONDONTWRITEBYTECODE": "1", **extra}


async def piped(url: str, *options: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[bytes]:
    """Run it to its end."""
    with trio.fail_after(30):
        return await trio.run_process(
            [*COMMAND, url, *options], stdin=stdin.encode(), capture_stdout=True, capture_stderr=True, check=False,
            env=_environment(**env),
        )  # fmt: skip


class Terminal:
    """Someone sitting there: types, and reads what appears."""

    def __init__(self, process: trio.Process, fd: int) -> None:
        self.process = process
        self._fd = fd
        self.raw = ""
        self._seen = 0

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    async def expect(self, pattern: str) -> re.Match[str]:
        """Wait until `pattern` appears after what was expected before."""
        with trio.fail_after(20):
            while True:
                found = re.compile(pattern).search(self.raw, self._seen)
                if found:
                    self._seen = found.end()
                    return found
                await self._read()

    async def _read(self) -> None:
        await trio.lowlevel.wait_readable(self._fd)
        try:
            data = os.read(self._fd, 65_536)
        except OSError:
            data = b""
        if not data:
            raise AssertionError(f"the terminal was closed after: {self.raw[self._seen :]!r}")
        self.raw += data.decode(errors="replace")

    async def ended(self) -> int:
        """Wait for the exit, and return its code."""
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:

                @nursery.start_soon
                async def drain() -> None:
                    try:
                        while True:
                            await self._read()
                    except AssertionError:
                        pass

                code = await self.process.wait()
                await trio.sleep(0.05)
                nursery.cancel_scope.cancel()
        return code


@asynccontextmanager
async def terminal(url: str, *options: str, **env: str) -> AsyncIterator[Terminal]:
    master, slave = pty.openpty()

    def control() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # So that Ctrl-C is a signal.

    process = await trio.lowlevel.open_process(
        [*COMMAND, url, *options], stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        preexec_fn=control, env=_environment(**env),
    )  # fmt: skip
    os.close(slave)
    try:
        yield Terminal(process, master)
    finally:
        if process.returncode is None:
            process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
        os.close(master)
