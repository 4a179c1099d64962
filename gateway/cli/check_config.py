"""``trio-gateway check-config``: what a configuration comes to, or everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import click

from gateway.agents.loader import split_spec
from gateway.cli.failing import errors_as_lines
from gateway.cli.settings import OPTIONS, TABLES, Loaded, load
from gateway.cli.state import with_default_store
from gateway.config import AgentConfig, Config
from gateway.store import open_store
from gateway.transport.tls import load_certificate

_SECRET_WORDS = ("key", "token", "secret", "password")


@click.command("check-config")
@click.argument("file", required=False)
@click.option("--explain", is_flag=True, help="Instead, list every limit: default, range and reason.")
def check_config(file: str | None, explain: bool) -> None:
    """Check the settings in FILE, together with the environment, as `run --config FILE` would read them.

    Prints "ok", where sessions are kept, and every value that is not the default, with where it is from; or every
    problem, one per line, and the exit code is 2. Agents are not imported.
    """
    if explain:
        click.echo("\n".join(_explained()))
        return
    with errors_as_lines():
        loaded = with_default_store(load(file))
        # Names what it would open, and opens nothing.
        open_store(loaded.config.store, loaded.config.limits)
        server = loaded.config.server
        if server.tls_certificate is not None and server.tls_key is not None:
            load_certificate(server.tls_certificate, server.tls_key)
        for name in loaded.config.agents:
            split_spec(f"{name}=_")
    click.echo("ok")
    for line in _effective(loaded):
        click.echo(line)


def _effective(loaded: Loaded) -> Iterator[str]:
    default = Config()
    for path in OPTIONS:
        if path == "agents":
            continue
        value = _at(loaded.config, path)
        if value != _at(default, path):
            yield f"{path} = {_shown(path, value)}  ({loaded.sources[path]})"
    for name, agent in loaded.config.agents.items():
        yield from _agent(name, agent, loaded.sources["agents"])


def _agent(name: str, agent: AgentConfig, source: str) -> Iterator[str]:
    for field in attrs.fields(AgentConfig):
        value = getattr(agent, field.name)
        if field.name != "options" and value != field.default:
            yield f"agents.{name}.{field.name} = {value!r}  ({source})"
    for key, value in agent.options.items():
        yield f"agents.{name}.{key} = {_shown(key, value)}  ({source})"


def _shown(path: str, value: Any) -> str:
    """A value as it may be printed: secrets are not."""
    if any(word in path.lower() for word in _SECRET_WORDS) and not path.endswith(("_env", ".tls_key")):
        if isinstance(value, Mapping):
            return f"(a secret for each of {', '.join(value)})"
        if isinstance(value, str):
            return "(a secret)"
    if type(value) is int:
        return f"{value:,}".replace(",", "_")  # as TOML reads it
    return repr(list(value)) if isinstance(value, tuple) else repr(value)


def _at(config: Config, path: str) -> Any:
    table, _, name = path.partition(".")
    return getattr(getattr(config, table), name)


def _explained() -> Iterator[str]:
    for table, cls in TABLES.items():
        for field in attrs.fields(cls):
            if "why" in field.metadata:
                low, high = field.metadata["low"], field.metadata["high"]
                yield f"{table}.{field.name} = {field.default:_}  ({low:_} to {high:_})"
                yield f"    {field.metadata['why']}"
