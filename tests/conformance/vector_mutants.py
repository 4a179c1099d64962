"""Vectors with one expectation changed, so that nothing that is right fulfils it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs

from gateway.protocol import messages as m
from gateway.testing.vectors import Vector

PATTERNS = ("expect", "hello_ok", "closed")


def other(value: Any) -> Any:
    if type(value) is str:
        return value + "?"
    return not value if type(value) is bool else 77 if value is None else value + 1_000


def wrong(pattern: Any, top: bool = True) -> Iterator[Any]:
    """The pattern with one value changed, each in turn, but not the frame's `type`: it decides what is waited for."""
    for key, inner in pattern.items():
        if isinstance(inner, dict) and "$is" not in inner and "$add" not in inner and "$repeat" not in inner:
            yield from ({**pattern, key: changed} for changed in wrong(inner, top=False))
        elif isinstance(inner, list) and key in ("$contains", "transcript", "withdrawn", "presence", "queue", "asks"):
            yield {**pattern, key: [*inner, "nobody"]}
            for at, item in enumerate(inner):
                for changed in wrong(item if isinstance(item, dict) else {"-": item}, top=False):
                    yield {**pattern, key: [*inner[:at], changed.get("-", changed), *inner[at + 1 :]]}
        elif isinstance(inner, str | int | None) and not (top and key == "type") and not str(inner).startswith("$"):
            yield {**pattern, key: other(inner)}


def mutants(vector: Vector) -> Iterator[tuple[int, Vector]]:
    """The vector with one expectation changed so that no right gateway fulfils it, and the number of that step."""
    for at, step in enumerate(vector.steps):
        if step.get("retry"):
            continue  # it would wait for what never becomes true
        if vector.needs & {"crash", "start"} and "clauses" not in step:
            continue  # each takes two processes, a second
        changed: list[dict[str, Any]] = []
        for key in PATTERNS:
            if isinstance(step.get(key), dict):
                changed += [{**step, key: pattern} for pattern in wrong(step[key])]
        if "text" in step:
            changed.append({**step, "text": "?" + step["text"]})
            changed += [{**step, "pieces": 0}] if "pieces" in step else []
        if "expect_all" in step:
            changed.append({**step, "expect_all": [*step["expect_all"][:-1], {**step["expect_all"][-1], "seq": "?"}]})
        if step.get("refused"):
            changed.append({key: value for key, value in step.items() if key != "refused"})
        if not changed and "expect" in step:  # nothing but a type
            odd = "withdrawn" if step["expect"]["type"] in m.EVENTS else "credit"
            changed.append({**step, "expect": {"type": odd}})
        for new in changed:
            yield at + 1, attrs.evolve(vector, steps=(*vector.steps[:at], new, *vector.steps[at + 1 :]))
