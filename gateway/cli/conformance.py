"""``trio-gateway conformance URL``: the conformance vectors against a running gateway."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import click
import trio

from gateway.cli.failing import errors_as_lines
from gateway.errors import ConfigError
from gateway.testing.vector_runner import PATIENCE_S, Drain, Runner, VectorFailed
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
@click.option("--patience", default=PATIENCE_S, show_default=True, help="Seconds to wait in one step.")
@click.option("--list", "show", is_flag=True, help="Instead, list the vectors and the profiles' files.")
def conformance(
    url: str | None,
    profile: str,
    only: tuple[str, ...],
    folder: Path | None,
    drain_pid: int | None,
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
        if profile not in {vector.profile for vector in vectors}:
            raise ConfigError("--profile", f"expected one of {', '.join(sorted({v.profile for v in vectors}))}")
        chosen = [vector for vector in vectors if vector.profile == profile and (not only or vector.id in only)]
        failed = trio.run(_run, url, chosen, _drain_of(drain_pid), patience)
    sys.exit(1 if failed else 0)


def _show(vectors: list[Vector], folder: Path) -> None:
    for profile in dict.fromkeys(vector.profile for vector in vectors):
        click.echo(f"{profile}  ({folder / profile}.toml)")
        for vector in vectors:
            if vector.profile == profile:
                click.echo(f"  {vector.id}  {vector.title}" + ("  [drains]" if vector.needs_drain else ""))


def _drain_of(pid: int | None) -> Drain | None:
    if pid is None:
        return None

    async def drain() -> None:
        await trio.lowlevel.checkpoint()
        os.kill(pid, signal.SIGTERM)

    return drain


async def _run(url: str, vectors: list[Vector], drain: Drain | None, patience: float) -> int:
    runner = Runner(url, drain=drain, patience=patience)
    failed = passed = 0
    left_out: list[str] = []
    drained = False
    for vector in sorted(vectors, key=lambda vector: vector.needs_drain):  # a gateway drains once
        if vector.needs_drain and (drain is None or drained):
            left_out.append(vector.id)
            continue
        drained = vector.needs_drain
        try:
            await runner.run(vector)
        except VectorFailed as exc:
            failed += 1
            click.echo(f"FAILED  {exc}")
        else:
            passed += 1
            click.echo(f"ok      {vector.id}")
    click.echo(f"{passed} passed, {failed} failed")
    if left_out:
        click.echo(f"not run: {', '.join(left_out)} (they drain the gateway: see --drain-pid)")
    return failed
