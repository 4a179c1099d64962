"""The command `trio-gateway`. Each subcommand is a module of this package, imported when it is asked for.

`run` serves, `check_config` checks a file, `chat` talks to a gateway, `sessions` looks into a store, `spec` prints
the protocol for machines, `conformance` holds a gateway to it. Behind them: `settings` loads the configuration, `logs`
sets up the operator's log, `signals` turns signals into a drain.
"""

from __future__ import annotations

from importlib import import_module

import click

from gateway._version import __version__

COMMANDS = {
    "run": "gateway.cli.run:run",
    "chat": "gateway.cli.chat:chat",
    "check-config": "gateway.cli.check_config:check_config",
    "sessions": "gateway.cli.sessions:sessions",
    "fuzz": "gateway.cli.fuzz:fuzz",
    "spec": "gateway.cli.spec:spec",
    "conformance": "gateway.cli.conformance:conformance",
}


class _Lazy(click.Group):
    """Imports a subcommand when it is used: `run` does without the client, `chat` without the server."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="trio-gateway", message="%(prog)s %(version)s")
def main() -> None:
    """Stand between WebSocket clients and streaming agents, and lose nothing in between."""
