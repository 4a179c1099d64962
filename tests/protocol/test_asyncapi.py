"""The AsyncAPI document, as the AsyncAPI project's own parser reads it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from node_tools import node_package

from gateway.cli.spec import written
from gateway.protocol.asyncapi import asyncapi

PARSER = "3.6.3"


@pytest.fixture(scope="module")
def parser() -> Path:
    return node_package("@asyncapi/parser", PARSER)


def diagnose(parser: Path, folder: Path, document: dict[str, Any]) -> dict[str, Any]:
    file = folder / "asyncapi.json"
    file.write_text(written(document))
    script = Path(__file__).with_name("asyncapi_parser.mjs")
    done = subprocess.run(["node", str(script), str(parser), str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    # Version 3.0 is what most tools read; that there is a later one is no fault of the document.
    result["found"] = [item for item in result["found"] if item["code"] != "asyncapi-latest-version"]
    return result


def test_the_document_is_valid(parser: Path, tmp_path: Path) -> None:
    document = asyncapi()
    result = diagnose(parser, tmp_path, document)
    assert result["found"] == []
    assert result["messages"] == len(document["components"]["messages"])


@pytest.mark.parametrize("broken", ["reference", "action", "schema"])
def test_the_parser_sees_what_is_wrong(parser: Path, tmp_path: Path, broken: str) -> None:
    document = asyncapi()
    if broken == "reference":
        document["components"]["messages"]["Hello"]["payload"] = {"$ref": "#/components/schemas/Nobody"}
    elif broken == "action":
        document["operations"]["receiveHello"]["action"] = "shout"
    else:
        document["components"]["schemas"]["Hello"]["properties"]["since"]["type"] = "number of events"
    assert diagnose(parser, tmp_path, document)["found"]
