"""A gateway in the configuration of a profile, on a free port."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from gateway.agents import load_agent
from gateway.cli.settings import Flag, load
from gateway.server import Gateway, open_gateway
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


async def run(vector: Vector, patience: float = 30.0) -> None:
    """Run a vector against a gateway of its own."""
    async with gateway_of(vector.profile, 30_000 if vector.needs_drain else 0) as gateway:

        async def drain() -> None:
            gateway.drain_nowait("maintenance")

        await Runner(gateway.url, drain=drain, patience=patience).run(vector)
