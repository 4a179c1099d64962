"""``trio-gateway spec``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from gateway.cli import main
from gateway.protocol.asyncapi import asyncapi
from gateway.protocol.schema import json_schema

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("form", "document", "kept"), [("json-schema", json_schema, "spec.json"), ("asyncapi", asyncapi, "asyncapi.json")]
)
def test_it_prints_the_document(form: str, document: object, kept: str) -> None:
    result = CliRunner().invoke(main, ["spec", "--format", form])
    assert result.exit_code == 0
    assert json.loads(result.output) == document()  # type: ignore[operator]
    assert result.output == (ROOT / "docs/reference" / kept).read_text(), f"run: {sys.executable} docs/generate.py"


def test_a_wrong_format_says_which_there_are() -> None:
    result = CliRunner().invoke(main, ["spec", "--format", "xml"])
    assert result.exit_code == 2
    assert "json-schema" in result.output
