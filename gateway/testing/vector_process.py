"""A gateway that a command runs, for vectors in which it drains, crashes and comes back."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio

from gateway.errors import ConfigError
from gateway.testing.vector_runner import Operator
from gateway.transport.dial import parse_url

LOOK_EVERY_S = 0.05
"""How often a process that starts is asked whether it listens."""

STARTING_S = 60.0
"""For a start or an end; nothing is measured with it."""


class GatewayProcess:
    """The process of `command`, which listens at `url`. Its output goes nowhere, its errors where ours go."""

    def __init__(self, command: Sequence[str], url: str) -> None:
        self._command = list(command)
        self._url = parse_url(url)
        self._process: trio.Process | None = None

    @property
    def operator(self) -> Operator:
        """What a `Runner` needs of it."""
        return {"drain": self.drain, "crash": self.crash, "start": self.start}

    async def start(self) -> None:
        """Start it and wait until it listens. One that runs still must be ending: that is waited for first.

        Raises:
            ConfigError: the command ends instead, or nobody listens at the URL.
        """
        with trio.move_on_after(STARTING_S):
            if self._process is not None:
                await self._process.wait()
            try:
                self._process = await trio.lowlevel.open_process(self._command, stdout=subprocess.DEVNULL)
            except OSError as exc:
                raise ConfigError("--run", f"cannot run {self._command[0]}: {exc}") from None
            while not await self._listens():
                if self._process.poll() is not None:
                    raise ConfigError("--run", f"the command ended with exit code {self._process.returncode}")
                await trio.sleep(LOOK_EVERY_S)
            return
        raise ConfigError("--run", f"nobody listens at {self._url.authority} within {STARTING_S:g} s")

    async def _listens(self) -> bool:
        try:
            stream = await trio.open_tcp_stream(self._url.host, self._url.port)
        except OSError:
            return False
        # Until the gateway has let go of it: it would count among those that have not said hello.
        async with stream:
            try:
                await stream.send_eof()
                await stream.receive_some()
            except trio.BrokenResourceError:
                pass
        return True

    async def drain(self) -> None:
        """Ask it to end; it takes its time."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        await trio.lowlevel.checkpoint()

    async def crash(self) -> None:
        """Kill it as it is, and start it again."""
        await self.kill()
        await self.start()

    async def kill(self) -> None:
        """End it for good."""
        if self._process is not None:
            self._process.kill()
            await self._process.wait()


@asynccontextmanager
async def open_process(command: Sequence[str], url: str) -> AsyncIterator[GatewayProcess]:
    """Run a gateway within the block; it is killed at its end.

    Raises:
        ConfigError: see `GatewayProcess.start`.
    """
    process = GatewayProcess(command, url)
    try:
        await process.start()
        yield process
    finally:
        with trio.CancelScope(shield=True):  # a kill does not take long
            await process.kill()
