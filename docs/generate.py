"""Writes the reference pages that follow from the code: ``python docs/generate.py``. A test checks they are current."""

from __future__ import annotations

import inspect
import json
import sys
import typing
from pathlib import Path

import attrs
import click

import gateway.testing.model1  # noqa: F401 - registers the invariants of dialect 1
from gateway.cli import main as cli
from gateway.cli.spec import FORMATS, written
from gateway.config import Config, Limits, Log, Server, Store
from gateway.protocol import messages as m
from gateway.testing.invariants import INVARIANTS

HERE = Path(__file__).parent / "reference"
GOLDEN = Path(__file__).parents[1] / "tests/protocol/golden_frames.json"


def shown(kind: object) -> str:
    """A type as the wire knows it."""
    if kind is type(None):
        return "null"
    if kind is typing.Any:
        return "any JSON"
    names: dict[object, str] = {
        str: "string", int: "integer", bool: "true/false", m.RequestId: "string, 1–128 characters",
        m.SessionId: "string, 1–128 of A–Z a–z 0–9 . _ : -",
    }  # fmt: skip
    if kind in names:
        return names[kind]
    if kind == m.AnyEvent:
        return "event"
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return " / ".join(f"`{value}`" for value in args)
    if origin is list:
        return f"array of {shown(args[0])}"
    if origin is dict:
        return "object" if args[1] is typing.Any else f"object of {shown(args[1])}"
    if args:
        return " or ".join(shown(arg) for arg in args)
    return f"[{kind.__name__}](#{kind.__name__.lower()})" if isinstance(kind, type) else str(kind)


def fields_of(cls: type) -> str:
    hints = typing.get_type_hints(cls, include_extras=True)
    rows = []
    for field in attrs.fields(cls):
        if field.default is attrs.NOTHING:
            default = "required"
        elif isinstance(field.default, attrs.Factory):  # type: ignore[arg-type]
            default = "empty"
        else:
            default = f"`{field.default!r}`".replace("None", "null").replace("False", "false").replace("True", "true")
        rows.append(f"| `{field.name.rstrip('_')}` | {shown(hints[field.name])} | {default} |")
    if not rows:
        return "No fields.\n"
    return "\n".join(["| field | type | default |", "|---|---|---|", *rows]) + "\n"


def paragraph(cls: type) -> str:
    doc = cls.__dict__.get("__doc__") or ""
    if not doc or doc.startswith("Method generated"):
        return ""
    return inspect.cleandoc(doc).replace("`from_`", "`from`") + "\n\n"


def protocol() -> str:
    out = [
        "# Protocol messages\n",
        "Every message of protocol version 2, generated from the message classes (`gateway/protocol/messages.py`).",
        "A text message is one JSON object with a string `type`. Unknown fields are ignored; a field of the wrong type",
        "is answered with `error` `invalid_frame` that names it.\n",
    ]
    for title, family in (
        ("Events", m.EVENTS), ("What clients send", m.CLIENT_FRAMES), ("What the gateway sends", m.SERVER_FRAMES)
    ):  # fmt: skip
        out.append(f"## {title}\n")
        if title == "Events":
            out.append("Each has, besides its own fields, `seq`, `first` and `at` (integers; `at` in milliseconds).\n")
        for tag, cls in family.items():
            notes = [word for word in ("volatile", "droppable") if getattr(cls, word, False)]
            out.append(f"### `{tag}`{' · ' + ', '.join(notes) if notes else ''}\n")
            out.append(paragraph(cls) + fields_of(cls))
    out.append("## Parts of messages\n")
    parts = (
        m.ClientInfo, m.ServerInfo, m.Policy, m.Features, m.Member, m.Health, m.LastDisconnect, m.RunningTurn,
        m.QueuedRef, m.ErrorInfo,
    )  # fmt: skip
    out += [f"### {cls.__name__}\n\n{paragraph(cls)}{fields_of(cls)}" for cls in parts]
    return "\n".join(out) + dialect_1()


def dialect_1() -> str:
    """Version 1, from the golden vectors that its tests hold it to."""
    vectors = json.loads(GOLDEN.read_text())
    out = [
        "\n## Version 1\n",
        "The wire format of PraisonAI's gateway ([explained](../explanation/dialects.md)). A client opens with `join`",
        "or with a `hello` whose `protocol_max` is 1. Examples of every frame, as the tests hold the gateway to them",
        "(`tests/protocol/golden_frames.json`):\n",
        "### What clients of version 1 send\n",
        "| version 1 | what it means |",
        "|---|---|",
    ]
    out += [f"| {row(one['1'])} | {row(one['2'])} |" for one in vectors["client"] if "2" in one]
    out += ["\n### Events in version 1\n", "| version 2 | `event` in version 1 |", "|---|---|"]
    for one in vectors["events"]:
        wrapped = [{name: frame["event"][name] for name in ("type", "data")} for frame in one["1"]]
        out.append(f"| `{one['2']['type']}` | {'<br>'.join(map(row, wrapped))} |")
    out += ["\n### What the gateway sends in version 1, without a number\n", "| version 2 | version 1 |", "|---|---|"]
    for name, one in vectors["server"].items():
        frames = one["1"] if type(one["1"]) is list else [one["1"]]
        out.append(f"| {name} | {'<br>'.join(row(frame) if frame else 'nothing' for frame in frames)} |")
    return "\n".join(out) + "\n"


def row(frame: object) -> str:
    """A frame in a cell of a table."""
    return "`" + json.dumps(frame, ensure_ascii=False).replace("|", "\\|") + "`"


def configuration() -> str:
    out = [
        "# Configuration\n",
        "Settings come from a TOML file (`--config`), then the environment, then flags; later ones win. A setting has",
        "the same name everywhere: `[limits] max_inbox` in the file is `TRIO_GATEWAY_LIMITS_MAX_INBOX` in the",
        "environment. `trio-gateway check-config FILE` checks a file. Generated from `gateway/config.py`.\n",
        "## `[limits]`\n",
        "Times are in milliseconds, sizes in bytes, as the names say.\n",
        "| setting | default | range | why |",
        "|---|---|---|---|",
    ]
    for field in attrs.fields(Limits):
        low, high = field.metadata["low"], field.metadata["high"]
        out.append(f"| `{field.name}` | {field.default:,} | {low:,} – {high:,} | {field.metadata['why']} |")
    for title, cls in (("[server]", Server), ("[store]", Store), ("[log]", Log)):
        out += [f"\n## `{title}`\n", "| setting | default | range | why |", "|---|---|---|---|"]
        for field in attrs.fields(cls):
            default = field.default
            value = "empty" if isinstance(default, attrs.Factory) or default == () else f"`{default}`"  # type: ignore[arg-type]
            if "why" in field.metadata:
                low, high = field.metadata["low"], field.metadata["high"]
                out.append(f"| `{field.name}` | {default:,} | {low:,} – {high:,} | {field.metadata['why']} |")
            else:
                out.append(f"| `{field.name}` | {value} | | |")
    assert attrs.fields(Config)
    out += [
        "\n## `[agents.NAME]`\n",
        "`run` is `MODULE:ATTR`, or one of the built-in kinds `demo`, `openai`, `process`. `max_detached_ms` overrides",
        "the limit of that name. `on_lost` is `end` (a turn that a crash cut off ends as `lost`) or `retry` (its",
        "inputs run again, at most three times in all). Every other key is an option of the kind.",
    ]
    return "\n".join(out) + "\n"


def command_line() -> str:
    out = [
        "# Command line\n",
        "The help of each command, as the command prints it. Exit codes: 0 after a drain or a conversation that was",
        "left, 2 when something that was given is wrong, with one line on standard error that says what to do.",
    ]

    def add(command: click.Command, name: str, parent: click.Context | None = None) -> None:
        settings = {**command.context_settings, "max_content_width": 100, "terminal_width": 100}
        context = click.Context(command, info_name=name, parent=parent, **settings)
        out.append(f"\n## `{context.command_path}`\n\n```text\n{command.get_help(context)}\n```")
        if isinstance(command, click.Group):
            for child in command.list_commands(context):
                inner = command.get_command(context, child)
                assert inner is not None
                add(inner, child, context)

    add(cli, "trio-gateway")
    return "\n".join(out) + "\n"


def conformance() -> str:
    sys.path.insert(0, str(HERE.parents[1] / "tests/transport"))
    try:
        from websocket_cases import table
    finally:
        sys.path.pop(0)
    out = [
        "# WebSocket conformance\n",
        "The cases of the [Autobahn test suite](https://github.com/crossbario/autobahn-testsuite), version 0.8.2,",
        "against the gateway's WebSocket transport. The suite itself needs Python 2.7, so each case is a test of ours",
        "(`tests/transport/websocket_cases.py`), and this table is made of those: a case whose verdict is another",
        "fails the tests. The suite, run once against an echo server on this transport, came to the same verdicts.\n",
        "- **OK**, **NON-STRICT**, **INFORMATIONAL**: the suite's words. NON-STRICT are two cases of bad UTF-8 in a",
        "  frame that arrives in pieces: it is noticed when the frame is complete, not at the first bad byte.",
        "- **refused with 1003**: the suite sends binary messages and wants them back. The gateway's protocol is text;",
        "  a binary message is answered with close code 1003 (RFC 6455 section 7.4.1), so the suite reports FAILED.",
        "- **declined**: the client offers compression (`permessage-deflate`). The gateway does not grant it, and the",
        "  messages go both ways uncompressed; the suite reports UNIMPLEMENTED. A compressed frame would be closed",
        "  with 1002.\n",
    ]
    return "\n".join([*out, *table()]) + "\n"


def invariants() -> str:
    """The invariants of the model, from their registry."""
    lines = [
        "# Invariants",
        "",
        "What `gateway.testing` holds every history to, and which of the 20 properties of the design each states.",
        "How to run it: [Simulate](../how-to/simulate.md). A violation names the invariant.",
        "",
        "| invariant | properties | |",
        "|---|---|---|",
    ]
    for item in INVARIANTS.values():
        sentence = " ".join(item.says.split())
        lines.append(f"| `{item.name}` | {', '.join(map(str, item.properties))} | {sentence} |")
    lines += [
        "",
        "Worlds and machines add some about what a model of one session cannot see: one agent at a time, replies to",
        "every request, drains that end, rooms that come back, strangers who are refused, tokens that end and are",
        "refreshed, and a process that lives. Of dialect 1 they also keep all that `trio-gateway fuzz` judges by.",
    ]
    return "\n".join(lines) + "\n"


PAGES = {
    "invariants.md": invariants,
    "protocol.md": protocol,
    "configuration.md": configuration,
    "command-line.md": command_line,
    "websocket-conformance.md": conformance,
    "spec.json": lambda: written(FORMATS["2", "json-schema"]()),
    "asyncapi.json": lambda: written(FORMATS["2", "asyncapi"]()),
}


def main() -> int:
    for name, make in PAGES.items():
        (HERE / name).write_text(make())
    return 0


if __name__ == "__main__":
    sys.exit(main())
