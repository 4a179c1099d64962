"""A gateway in the configuration of a profile, on a free port."""

from __future__ import annotations

import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from gateway.agents import load_agent
from gateway.cli.settings import Flag, load
from gateway.server import Gateway, open_gateway
from gateway.testing.vector_process import open_process
from gateway.testing.vector_runner import Runner
from gateway.testing.vectors import Vector, default_folder


@asynccontextmanager
async def gateway_of(profile: str, drain_timeout_ms: int = 0) -> AsyncIterator[Gateway]:
    flags = [
        Flag(name="--port", path="server.port", value=0),
        Flag(name="--drain-timeout", path="server.drain_timeout_ms", value=drain_timeout_ms),
    ]
    config = load(default_folder() / f"{profile}.toml", environ={}, flags=flags).config
    agents = {name: load_agent(f"{name}={table.run}")[1] for name, table in config.agents.items()}
    async with open_gateway(config, agents) as gateway:
        yield gateway


def command_of(profile: str, folder: Path, *arguments: str) -> tuple[list[str], str]:
    """What runs a gateway of a profile, its store in `folder`, and its URL. Nobody else has its port just now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [sys.executable, "-m", "gateway", "run", "--config", str(default_folder() / f"{profile}.toml")]
    command += ["--port", str(port), "--no-http", "--store", f"sqlite:{folder / 'conformance.db'}", *arguments]
    return command, f"ws://127.0.0.1:{port}/ws"


async def run(vector: Vector, patience: float = 30.0) -> None:
    """Run a vector against a gateway of its own: one in this process, unless it has to outlive one."""
    if "start" in vector.needs or "crash" in vector.needs:
        with tempfile.TemporaryDirectory() as folder:
            command, url = command_of(vector.profile, Path(folder), "--log-level", "error")
            async with open_process(command, url) as process:
                await Runner(url, operator=process.operator, patience=patience).run(vector)
        return
    async with gateway_of(vector.profile, 30_000 if vector.needs else 0) as gateway:

        async def drain() -> None:
            gateway.drain_nowait("maintenance")

        await Runner(gateway.url, operator={"drain": drain}, patience=patience).run(vector)
