"""``trio-gateway sessions``: what is in a store file, while the gateway runs or when it is stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import attrs
import click
import trio

from gateway.cli.failing import errors_as_lines
from gateway.cli.settings import CONFIG_VARIABLE, load
from gateway.cli.state import with_default_store
from gateway.errors import ConfigError
from gateway.protocol import codec
from gateway.protocol.messages import Answered, Ask, Event, Input, Output, ToolCall, ToolResult, TurnEnded
from gateway.store.base import Retention, StoredSession
from gateway.store.inspect import Summary, read_session, summaries


def _path(store: str | None) -> str:
    """The file that `store` names; without it, the one that `run` would use in this environment."""
    if store is None:
        store = with_default_store(load(os.environ.get(CONFIG_VARIABLE))).config.store.url
    kind, _, path = store.partition(":")
    if kind != "sqlite" or not path:
        raise ConfigError("--store", f"expected sqlite:PATH, got {store!r}; a memory store is gone with its process")
    return path


class _Command(click.Group):
    """Turns the store's errors into one line and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        with errors_as_lines():
            return super().invoke(ctx)


@click.group(cls=_Command)
def sessions() -> None:
    """Look at stored sessions, export them, or remove them."""


def _store_option(function: Any) -> Any:
    text = "sqlite:PATH, as the gateway printed it at its start [default: where `run` would keep them]."
    return click.option("--store", help=text)(function)


def _when(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _doing(summary: Summary) -> str:
    if summary.in_turn:
        return "turn"
    return f"{summary.waiting} waiting" if summary.waiting else "idle"


@sessions.command("list")
@_store_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def list_(store: str | None, as_json: bool) -> None:
    """All sessions, the most recently active first. Times are UTC."""
    found = summaries(_path(store))
    if as_json:
        for one in found:
            click.echo(json.dumps(attrs.asdict(one)))
        return
    if not found:
        click.echo("no sessions")
        return
    rows = [("SESSION", "AGENT", "SUBJECT", "LAST ACTIVITY", "CURSORS", "EVENTS", "BYTES", "STATE")]
    for one in found:
        cursors = f"{one.floor}..{one.head}"
        rows.append(
            (one.session_id, one.agent_id, one.subject, _when(one.active_at), cursors, str(one.events),
             f"{one.size:,}", _doing(one))
        )  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _find(store: str | None, session_id: str) -> StoredSession:
    found = read_session(_path(store), session_id)
    if found is None:
        raise ConfigError("SESSION_ID", f"there is no session {session_id!r}; `trio-gateway sessions list` shows all")
    return found


@sessions.command()
@_store_option
@click.argument("session_id")
def show(store: str | None, session_id: str) -> None:
    """One session: its numbers, state, and what waits."""
    found = _find(store, session_id)
    (summary,) = summaries(_path(store), session_id)
    record = found.record
    click.echo(f"session    {record.session_id}")
    click.echo(f"agent      {record.agent_id}")
    click.echo(f"subject    {record.subject}")
    click.echo(f"epoch      {record.epoch}")
    click.echo(f"created    {_when(record.created_at)} UTC, last active {_when(summary.active_at)}")
    click.echo(f"cursors    {found.floor} to {summary.head}, numbers reserved up to {found.reserved}")
    click.echo(f"kept       {summary.events} events, {summary.size:,} bytes, {len(found.keys)} request ids")
    turn = "none" if found.turn is None else f"{found.turn.turn_id} (attempt {found.turn.attempt})"
    click.echo(f"open turn  {turn}")
    for item in found.queue:
        click.echo(f"waiting    {item.event.request_id} ({item.on_busy}): {item.event.content[:60]!r}")
    click.echo(f"state      {json.dumps(found.state, ensure_ascii=False)}")


@sessions.command()
@_store_option
@click.argument("session_id")
@click.option("--format", "form", type=click.Choice(["jsonl", "markdown"]), default="jsonl", show_default=True)
def export(store: str | None, session_id: str, form: str) -> None:
    """A session's transcript, as one event per line or as Markdown, to standard output."""
    found = _find(store, session_id)
    lines = _jsonl(found.events) if form == "jsonl" else _markdown(found)
    for line in lines:
        click.echo(line)


def _jsonl(events: list[Event]) -> Iterator[str]:
    previous = events[0].first - 1 if events else 0
    for event in events:
        yield codec.encode_event(event, previous + 1).decode()
        previous = event.seq


def _markdown(found: StoredSession) -> Iterator[str]:
    yield f"# Session {found.record.session_id}\n"
    record = found.record
    yield f"Agent `{record.agent_id}`, subject `{record.subject}`, since {_when(record.created_at)} UTC."
    for event in found.events:
        match event:
            case Input():
                yield f"\n## {event.sender}, {_when(event.at)}\n\n{event.content}"
            case Output():
                note = " (partial)" if event.metadata.get("partial") else ""
                yield f"\n**{event.channel}**{note}\n\n{event.content}"
            case ToolCall():
                yield f"\n`{event.name}({json.dumps(event.arguments, ensure_ascii=False)})`"
            case ToolResult():
                yield f"\n→ `{json.dumps(event.result, ensure_ascii=False)}`"
            case Ask():
                yield f"\n*{event.prompt}*"
            case Answered():
                yield f"\n*→ {event.value if event.outcome == 'answered' else event.outcome}*"
            case TurnEnded() if event.outcome != "completed":
                yield f"\n*The turn ended: {event.outcome}.*"
            case _:
                pass


@sessions.command()
@_store_option
@click.argument("session_ids", nargs=-1)
@click.option("--older-than", "days", type=click.FloatRange(min=0), help="Remove sessions without activity for DAYS.")
def purge(store: str | None, session_ids: tuple[str, ...], days: float | None) -> None:
    """Remove sessions by name or by age. The gateway must be stopped; it purges by itself while it runs.

    Sessions with an open turn or waiting inputs are only removed by name.
    """
    if not session_ids and days is None:
        raise ConfigError("purge", "say which: SESSION_IDs, or --older-than DAYS")
    trio.run(_purge, _path(store), session_ids, days)


async def _purge(path: str, session_ids: tuple[str, ...], days: float | None) -> None:
    from gateway.session import Sources
    from gateway.store.sqlite import SqliteStore

    summaries(path)  # an unusable path is said before a file is created
    age = int((days or 0) * 86_400_000)
    async with SqliteStore(path, retention=Retention(resume_window_ms=age, max_age_ms=age)) as opened:
        removed = 0
        for session_id in session_ids:
            await opened.delete(session_id)
            removed += 1
        if days is not None:
            removed += (await opened.purge(now=Sources().now_ms(), in_use=())).sessions
    click.echo(f"removed {removed} session{'' if removed == 1 else 's'}")


@sessions.command("new-epoch")
@_store_option
def new_epoch(store: str | None) -> None:
    """Declare the history unproven, after the file was restored from a backup: every client gets a snapshot."""
    from gateway.store.sqlite import new_epoch as bump

    click.echo(f"new generation {bump(_path(store))}")
