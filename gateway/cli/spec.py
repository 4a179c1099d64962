"""``trio-gateway spec``: the wire protocol for machines."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click

from gateway.protocol.asyncapi import asyncapi
from gateway.protocol.schema import json_schema

FORMATS: dict[tuple[str, str], Callable[[], dict[str, Any]]] = {
    ("2", "json-schema"): json_schema,
    ("2", "asyncapi"): asyncapi,
}


def written(document: dict[str, Any]) -> str:
    """A document as it is printed and kept."""
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


@click.command()
@click.option(
    "--format", "form", type=click.Choice(["json-schema", "asyncapi"]), required=True, help="What to write it as."
)
@click.option(
    "--protocol", type=click.Choice(sorted({version for version, _ in FORMATS})), default="2", show_default=True,
    help="Version of the protocol.",
)  # fmt: skip
def spec(form: str, protocol: str) -> None:
    """Print the protocol as JSON Schema (2020-12) or as an AsyncAPI 3 document.

    Made from the classes that this very gateway reads and writes, so validators and clients generated from it agree
    with it. Version 1 has no classes of its own (it is another way to write the same messages), and so no schema; the
    reference of the messages shows each of its frames.
    """
    click.echo(written(FORMATS[protocol, form]()), nl=False)
