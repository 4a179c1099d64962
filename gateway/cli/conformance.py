"""``trio-gateway conformance URL``: the conformance vectors against a running gateway."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from pathlib import Path

import click
import trio

from gateway.cli.failing import errors_as_lines
from gateway.errors import ConfigError
from gateway.testing.vector_process import open_process
from gateway.testing.vector_runner import PATIENCE_S, Operator, Runner, VectorFailed
from gateway.testing.vectors import Vector, default_folder, load


@click.command()
@click.argument("url", required=False)
@click.option("--profile", default="default", show_default=True, help="How the gateway is configured.")
@click.option("--vector", "only", metavar="ID", multiple=True, help="Run only these.")
@click.option(
    "--vectors", "folder", type=click.Path(path_type=Path, exists=True, file_okay=False), help="A folder of your own."
)
@click.option(
    "--drain-pid", type=int, metavar="PID", help="Send SIGTERM to PID for the vectors about a drain; they run last."
)
@click.option(
    "--run", "command", metavar="COMMAND", help="Start the gateway with COMMAND, and again when a vector ends it."
)
@click.option("--patience", default=PATIENCE_S, show_default=True, help="Seconds to wait in one step.")
@click.option("--list", "show", is_flag=True, help="Instead, list the vectors and the profiles' files.")
def conformance(
    url: str | None,
    profile: str,
    only: tuple[str, ...],
    folder: Path | None,
    drain_pid: int | None,
    command: str | None,
    patience: float,
    show: bool,
) -> None:
    """Check a gateway of any make against the protocol's conformance vectors.

    URL is its WebSocket (ws://127.0.0.1:8765/ws). It must serve the agent "conformance" and be configured as the
    profile says; for this gateway: trio-gateway run --config with the profile's file, which --list names. The exit code
    is 1 if a vector failed.
    """
    with errors_as_lines():
        vectors = [vector for vector in load(folder) if "gateway" in vector.sides]
        if show:
            _show(vectors, folder or default_folder())
            return
        if url is None:
            raise ConfigError("URL", "is required: ws://HOST:PORT/ws")
        known = {vector.id for vector in vectors}
        if unknown := sorted(set(only) - known):
            raise ConfigError("--vector", f"unknown: {', '.join(unknown)} (--list names all)")
        if command is not None and drain_pid is not None:
            raise ConfigError("--drain-pid", "is of no use with --run, which knows whom to drain")
        if profile not in {vector.profile for vector in vectors}:
            raise ConfigError("--profile", f"expected one of {', '.join(sorted({v.profile for v in vectors}))}")
        chosen = [vector for vector in vectors if vector.profile == profile and (not only or vector.id in only)]
        if command is not None:
            failed = trio.run(_run_with, shlex.split(command), url, chosen, patience)
        else:
            failed = trio.run(_run, url, chosen, _operator_of(drain_pid), patience)
    sys.exit(1 if failed else 0)


def _show(vectors: list[Vector], folder: Path) -> None:
    for profile in dict.fromkeys(vector.profile for vector in vectors):
        click.echo(f"{profile}  ({folder / profile}.toml)")
        for vector in vectors:
            if vector.profile == profile:
                click.echo(f"  {vector.id}  {vector.title}" + "".join(f"  [{need}s]" for need in sorted(vector.needs)))


def _operator_of(pid: int | None) -> Operator:
    if pid is None:
        return {}

    async def drain() -> None:
        await trio.lowlevel.checkpoint()
        os.kill(pid, signal.SIGTERM)

    return {"drain": drain}


async def _run_with(command: list[str], url: str, vectors: list[Vector], patience: float) -> int:
    async with open_process(command, url) as process:
        return await _run(url, vectors, process.operator, patience)


async def _run(url: str, vectors: list[Vector], operator: Operator, patience: float) -> int:
    runner = Runner(url, operator=operator, patience=patience)
    failed = passed = 0
    left_out: list[str] = []
    over = False
    for vector in sorted(vectors, key=lambda vector: len(vector.needs)):  # what does least to the gateway first
        if over and "crash" in operator:
            await operator["crash"]()  # whatever state it is in
            over = False
        if over or not vector.needs <= operator.keys():
            left_out.append(vector.id)
            continue
        over = "drain" in vector.needs and "start" not in vector.needs
        try:
            await runner.run(vector)
        except VectorFailed as exc:
            failed += 1
            over = over or bool(vector.needs)
            click.echo(f"FAILED  {exc}")
        else:
            passed += 1
            click.echo(f"ok      {vector.id}")
    click.echo(f"{passed} passed, {failed} failed")
    if left_out:
        click.echo(f"not run: {', '.join(left_out)} (they end the gateway: see --run and --drain-pid)")
    return failed
