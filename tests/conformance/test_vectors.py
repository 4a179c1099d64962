"""The conformance vectors against our own gateway, over real sockets; and that each of them can fail."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from vector_gateway import run
from vector_mutants import mutants

from gateway.errors import ConfigError
from gateway.protocol import messages as m
from gateway.testing.vector_runner import VectorFailed
from gateway.testing.vectors import Vector, action_of, clauses_of, load

ROOT = Path(__file__).parents[2]
VECTORS = load()
OF_GATEWAYS = [vector for vector in VECTORS if "gateway" in vector.sides]


@pytest.mark.parametrize("vector", OF_GATEWAYS, ids=lambda vector: vector.id)
async def test_our_gateway(vector: Vector) -> None:
    await run(vector)


@pytest.mark.parametrize("vector", OF_GATEWAYS, ids=lambda vector: vector.id)
async def test_no_wrong_expectation_is_fulfilled(vector: Vector) -> None:
    found = 0
    for number, mutant in mutants(vector):
        with pytest.raises(VectorFailed) as failed:
            await run(mutant)
        assert failed.value.step == number, failed.value
        found += 1
    assert found


@pytest.mark.parametrize(
    "silent", ["quiet", "closed", "cut"], ids=["unexpected frame", "closed too early", "nothing comes"]
)
async def test_what_nobody_expected_fails(silent: str) -> None:
    ask: dict[str, Any] = {"send": {"type": "ping", "nonce": 1}}
    steps: dict[str, list[dict[str, Any]]] = {
        "quiet": [{"join": "a"}, {"send": {"type": "x"}}, {"quiet": "a"}],
        "closed": [{"join": "a"}, {"send": {"type": "leave"}}, {"closed": {"code": 1000, "reason": "left"}}],
        "cut": [{"join": "a"}, ask, {"expect": {"type": "pong", "nonce": 1}}, {"expect": {"type": "pong"}}],
    }
    vector = Vector(id="x", title="", profile="default", sides=("gateway",), steps=tuple(steps[silent]))
    with pytest.raises(VectorFailed) as failed:
        await run(vector, patience=1.0 if silent == "cut" else 30.0)
    assert failed.value.step == len(steps[silent])


# --- the set as a whole ---

CLAUSES = re.findall(r"^- \*\*(\d+\.\d+)\*\* ", (ROOT / "docs/reference/clauses.md").read_text(), re.MULTILINE)


def test_clauses_are_numbered_in_order() -> None:
    numbers = [tuple(map(int, clause.split("."))) for clause in CLAUSES]
    assert numbers == sorted(set(numbers))


def test_every_clause_has_a_vector() -> None:
    assert clauses_of(VECTORS) == set(CLAUSES)


def test_every_wire_type_is_in_some_vector() -> None:
    seen: set[str] = set()

    def look(value: Any) -> None:
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
            look(item)
        if isinstance(value, dict) and isinstance(value.get("type"), str):
            seen.add(value["type"])

    for vector in VECTORS:
        look([dict(step) for step in vector.steps])
        if any(action_of(step) == "join" for step in vector.steps):
            seen.add("hello_ok")
        if any(action_of(step) == "text" for step in vector.steps):
            seen.add("delta")
    assert set(m.EVENTS) | set(m.CLIENT_FRAMES) | set(m.SERVER_FRAMES) <= seen


@pytest.mark.parametrize(
    "broken",
    [
        {"steps": [{"jump": 1}]},
        {"steps": [{"join": "a", "cut": "a"}]},
        {"steps": [{"join": "a", "color": 1}]},
        {"steps": [], "sides": ["moon"]},
    ],
    ids=["unknown action", "two actions", "unknown key", "unknown side"],
)
def test_a_broken_file_is_refused_by_name(tmp_path: Path, broken: dict[str, Any]) -> None:
    content = {"profile": "default", "vectors": [{"id": "odd.one", "title": "", **copy.deepcopy(broken)}]}
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"odd\.one"):
        load(tmp_path)
