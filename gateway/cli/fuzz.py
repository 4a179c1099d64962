"""``trio-gateway fuzz``: find what breaks a gateway, or play a gateway that tries to break a client."""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click
import trio

from gateway.cli.address import complete_url, trusting
from gateway.cli.failing import errors_as_lines
from gateway.errors import ConfigError
from gateway.transport.tasks import open_plain_nursery

if TYPE_CHECKING:
    from gateway.testing.fuzz import Progress
    from gateway.testing.line import Target

FOUND = 1
INTERRUPTED = 130

SHOW_EVERY_S = 0.25


@click.command()
@click.argument("url", required=False)
@click.option("--agent", default="echo", show_default=True, help="Which agent to talk to.")
@click.option("--token", envvar="TRIO_GATEWAY_TOKEN", help="Who you are [also: TRIO_GATEWAY_TOKEN].")
@click.option("--ca", metavar="FILE", help="For wss://: trust the certificates in this PEM file, not the system's.")
@click.option("--protocol", type=click.IntRange(1, 2), default=2, show_default=True, help="Which version to speak.")
@click.option("--max-examples", type=click.IntRange(1), help="Stop after so many dialogues.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), help="Stop after so long.")
@click.option("--seed", type=click.IntRange(0), help="The same seed makes the same dialogues [default: random].")
@click.option(
    "--max-stall",
    type=click.FloatRange(0, min_open=True),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="How long an answer may take.",
)
@click.option(
    "--save", type=click.Path(dir_okay=False), default="fuzz-failure.jsonl", show_default=True, metavar="FILE",
    help="Where the smallest failing dialogue goes.",
)  # fmt: skip
@click.option(
    "--serve", "listen", is_flag=False, flag_value="127.0.0.1:0", metavar="[HOST:PORT]",
    help="Play a difficult gateway instead, for a client library to be tried on.",
)  # fmt: skip
@click.option("--replay", "recorded", metavar="FILE", help="Play a saved dialogue instead of looking for one.")
def fuzz(
    url: str | None,
    agent: str,
    token: str | None,
    ca: str | None,
    protocol: int,
    max_examples: int | None,
    seconds: float | None,
    seed: int | None,
    max_stall: float,
    save: str,
    listen: str | None,
    recorded: str | None,
) -> None:
    """Look for what breaks a gateway, and save the smallest dialogue that does.

    URL is any gateway that speaks this protocol, such as ws://127.0.0.1:8765/ws. Clients then do to it what the world
    does, and worse, each on a session of its own, until one of these happens: a connection ends without a close frame,
    an answer is not of the protocol, an event comes twice or not at all, an answer takes too long, a well-behaved
    client is disturbed, or nobody answers the door. Without --max-examples and --seconds it goes on until Ctrl-C.

    With --serve it is the gateway: it cuts, stalls, repeats and refuses, and watches what a client makes of that. Point
    the client at the address it prints; --max-examples then counts connections.

    The exit code is 0 if nothing was found, 1 if something was, 2 if it could not start, 130 if it was interrupted.
    Needs the extra "testing".
    """
    with errors_as_lines():
        seed = random.SystemRandom().randrange(2**32) if seed is None else seed
        if listen is not None:
            sys.exit(_run(_serve, *_address(listen), seed, max_examples, seconds, max_stall, save))
        if url is None:
            raise ConfigError("URL", "expected the gateway's address, such as ws://127.0.0.1:8765/ws")
        from gateway.testing.line import Target

        target = Target(
            url=complete_url(url), agent=agent, token=token, protocol=protocol, max_stall=max_stall, trust=trusting(ca)
        )
        if recorded is not None:
            sys.exit(_run(_replay, target, recorded))
        _prepare_hypothesis()
        sys.exit(_run(_hunt, target, seed, max_examples, seconds, save))


def _run(main: Callable[..., Awaitable[int]], *args: object) -> int:
    """`trio.run`; Ctrl-C is an exit code, not a traceback."""
    try:
        return trio.run(main, *args)
    except* KeyboardInterrupt:
        pass
    click.echo("interrupted", err=True)
    return INTERRUPTED


def _prepare_hypothesis() -> None:
    try:
        from hypothesis.configuration import set_hypothesis_home_dir
    except ModuleNotFoundError as exc:
        if exc.name is None or exc.name.partition(".")[0] != "hypothesis":
            raise
        raise ConfigError("", "fuzzing needs Hypothesis: install trio-gateway[testing]") from None
    # It keeps tables of Unicode somewhere, by default in the working directory, which is the user's.
    set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "trio-gateway-hypothesis")


async def _hunt(target: Target, seed: int, max_examples: int | None, seconds: float | None, save: str) -> int:
    from gateway.testing.dialogue import dump
    from gateway.testing.fuzz import Progress, hunt, recording_of

    progress = Progress()
    click.echo(f"fuzzing {target.url}, protocol {target.protocol}, seed {seed}")
    async with open_plain_nursery() as nursery:
        if sys.stderr is not None and sys.stderr.isatty():
            # Owned by this nursery, cancelled when the hunt is over.
            nursery.start_soon(_show, progress)
        found = await hunt(target, seed=seed, max_examples=max_examples, seconds=seconds, progress=progress)
    if found is None:
        click.echo(f"nothing found: {_summary(progress)}")
        return 0
    recording = recording_of(found, target, seed)
    where = await _save(save, dump(recording), "the dialogue")
    if where.startswith("saved"):
        where += f"; again: trio-gateway fuzz --replay {save} {target.url}"
    click.echo(f"FAILED ({recording.failure}) after {_summary(progress)}\n  {recording.message}\n  {where}")
    return FOUND


def _summary(progress: Progress) -> str:
    rate = progress.examples / max(progress.seconds, 0.001)
    return (
        f"{progress.examples:,} dialogues, {progress.frames:,} frames received, "
        f"{progress.seconds:,.1f} s ({rate:,.0f} dialogues/s)"
    )


async def _show(progress: Progress) -> None:
    """Keep a line of progress on the terminal."""
    try:
        while True:
            what = "found something, looking for the smallest form" if progress.shrinking else _summary(progress)
            click.echo(f"\r\x1b[K{what}", nl=False, err=True)
            await trio.sleep(SHOW_EVERY_S)
    finally:
        click.echo("\r\x1b[K", nl=False, err=True)


async def _replay(target: Target, file: str) -> int:
    import attrs

    from gateway.testing.dialogue import load
    from gateway.testing.fuzz import replay

    recording = load(file)
    target = attrs.evolve(target, protocol=recording.protocol, agent=recording.agent)
    failure = await replay(target, recording)
    if failure is None:
        click.echo(f"passed: {len(recording.steps)} steps" + (f", no {recording.failure}" if recording.failure else ""))
        return 0
    same = "" if failure.kind == recording.failure else f" (the file says {recording.failure})"
    click.echo(f"FAILED ({failure.kind}){same}\n  {failure}")
    return FOUND


def _address(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65_535:
        raise ConfigError("--serve", f"expected HOST:PORT, got {listen!r}")
    return host.strip("[]"), int(port)


async def _serve(
    host: str, port: int, seed: int, max_connections: int | None, seconds: float | None, max_stall: float, save: str
) -> int:
    from gateway.testing.hostile import HostileGateway

    hostile = HostileGateway(seed, max_stall=max_stall)
    enough = trio.Event()

    def count() -> None:
        if max_connections is not None and hostile.connections > max_connections:
            enough.set()

    hostile.on_connection = count
    try:
        listeners = await trio.open_tcp_listeners(port, host=host)
    except OSError as exc:
        raise ConfigError("--serve", f"cannot listen on {host}:{port}: {exc}") from None
    bound = listeners[0].socket.getsockname()
    shown = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
    click.echo(f"a difficult gateway on ws://{shown}:{bound[1]}/ws, seed {seed}")

    async def watch() -> None:
        await hostile.watch()
        enough.set()

    async with open_plain_nursery() as nursery:
        # Owned by this nursery, cancelled when it is enough.
        nursery.start_soon(trio.serve_listeners, hostile.serve, listeners)
        nursery.start_soon(watch)
        with trio.move_on_after(float("inf") if seconds is None else seconds):
            await enough.wait()
    summary = f"{hostile.connections:,} connections, {len(hostile.sessions):,} sessions"
    if not hostile.failures:
        click.echo(f"nothing found: {summary}")
        return 0
    lines = "".join(json.dumps(line) + "\n" for line in hostile.transcript)
    click.echo(f"FAILED after {summary}\n  {hostile.failures[0]}\n  {await _save(save, lines, 'what was said')}")
    return FOUND


async def _save(file: str, text: str, what: str) -> str:
    """Write a file, or say why not; what was found is shown then."""
    try:
        await trio.Path(file).write_text(text, encoding="utf-8")
    except OSError as exc:
        return f"not saved, {file} cannot be written: {exc.strerror}; {what}:\n{text}"
    return f"saved: {file}"
