"""Conformance vectors: dialogues as data, and what their patterns mean. No I/O; `vector_runner` runs them.

The format is described for implementers in any language in ``docs/reference/vectors.md``; what follows is that page's
definitions as code. A vector belongs to a profile (how the gateway is configured) and is a list of steps; a step names
what is done or expected on which connection, and the clauses of the protocol (``docs/reference/clauses.md``) it shows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from gateway.errors import ConfigError

Step = Mapping[str, Any]

ACTIONS: Mapping[str, frozenset[str]] = {
    "connect": frozenset({"headers", "query", "subprotocols", "subprotocol", "receive_buffer", "protocol", "refused"}),
    "join": frozenset({"hello", "hello_ok", "receive_buffer", "protocol", "retry", "not_before_ms"}),
    "send": frozenset({"on", "times"}),
    "send_text": frozenset({"on"}),
    "send_binary": frozenset({"on"}),
    "expect": frozenset({"on", "past"}),
    "expect_all": frozenset({"on"}),
    "text": frozenset({"on", "turn_id", "channel", "pieces"}),
    "closed": frozenset({"on", "skip", "pinging_ms"}),
    "close": frozenset({"on"}),
    "cut": frozenset(),
    "quiet": frozenset({"for_ms"}),
    "drain": frozenset(),
    "crash": frozenset(),
    "start": frozenset(),
    "over": frozenset(),
    "again": frozenset({"on"}),
}
"""What a step may do, and the keys it may have beside that one, `clauses` and `note`."""

OPERATED = frozenset({"drain", "crash", "start"})
"""Steps that whoever runs the gateway has to do."""

SIDES = ("gateway", "client")


@frozen(kw_only=True)
class Vector:
    """One dialogue. `sides` says whom it can check: a gateway, a client library, or both."""

    id: str
    title: str
    profile: str
    protocol: int = 2
    sides: tuple[str, ...]
    steps: tuple[Step, ...]

    @property
    def clauses(self) -> frozenset[str]:
        return frozenset(clause for step in self.steps for clause in step.get("clauses", ()))

    @property
    def needs(self) -> frozenset[str]:
        """What whoever runs the gateway has to do in the middle: some of `OPERATED`."""
        return OPERATED & {action_of(step) for step in self.steps}


def action_of(step: Step) -> str:
    """The one key of a step that says what it does."""
    (action,) = (key for key in step if key in ACTIONS)
    return action


def default_folder() -> Path:
    """Where the vectors that come with this package are."""
    installed = Path(__file__).parent / "vector_files"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "docs/reference/vectors"


def load(folder: Path | None = None) -> list[Vector]:
    """Read the ``*.json`` files of a folder; without one, those that come with the package.

    Raises:
        ConfigError: a file is no such file; the message names the vector and step.
    """
    folder = folder or default_folder()
    vectors: list[Vector] = []
    for file in sorted(folder.glob("*.json")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            vectors += [_vector(item, content) for item in content["vectors"]]
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise ConfigError(file.name, f"is no file of vectors: {exc!r}") from None
    if not vectors:
        raise ConfigError(str(folder), "has no vectors; expected *.json files")
    twice = {vector.id for vector in vectors if sum(other.id == vector.id for other in vectors) > 1}
    if twice:
        raise ConfigError(str(folder), f"two vectors are called {', '.join(sorted(twice))}")
    return vectors


def _vector(item: dict[str, Any], content: dict[str, Any]) -> Vector:
    name = item["id"]
    for number, step in enumerate(item["steps"], 1):
        actions = [key for key in step if key in ACTIONS]
        if len(actions) != 1:
            raise ConfigError(f"{name}, step {number}", f"expected one of {', '.join(ACTIONS)}, got {sorted(step)}")
        unknown = step.keys() - ACTIONS[actions[0]] - {actions[0], "clauses", "note"}
        if unknown:
            raise ConfigError(f"{name}, step {number}", f"unknown keys {sorted(unknown)}")
    sides = tuple(item.get("sides", ["gateway"]))
    if not sides or not set(sides) <= set(SIDES):
        raise ConfigError(name, f"sides: expected some of {SIDES}, got {sides}")
    return Vector(
        id=name,
        title=item["title"],
        profile=content["profile"],
        protocol=content.get("protocol", 2),
        sides=sides,
        steps=tuple(item["steps"]),
    )


# --- patterns --------------------------------------------------------------------------------------------------------

Names = dict[str, Any]
"""What the placeholders stand for, as far as it is known."""


class Mismatch(Exception):
    """A value is not what a pattern asks for; the message names the place."""


_NAME = re.compile(r"\$[a-z][a-z0-9_]*")

_KINDS: dict[str, Callable[[Any], bool]] = {
    "any": lambda value: True,
    "string": lambda value: type(value) is str,
    "integer": lambda value: type(value) is int,
    "boolean": lambda value: type(value) is bool,
    "object": lambda value: type(value) is dict,
    "array": lambda value: type(value) is list,
}


def resolve(value: Any, names: Names) -> Any:
    """A value to send: placeholders replaced.

    Raises:
        ConfigError: a placeholder has no value yet.
    """
    if isinstance(value, str) and _NAME.fullmatch(value):
        if value[1:] not in names:
            raise ConfigError(value, "stands for nothing yet")
        return names[value[1:]]
    if isinstance(value, str) and value.startswith("$$"):
        return value[1:]
    if isinstance(value, list):
        return [resolve(item, names) for item in value]
    if isinstance(value, dict):
        if "$repeat" in value:
            text, count = value["$repeat"]
            return text * count
        if "$add" in value:
            return sum(resolve(item, names) for item in value["$add"])
        return {key: resolve(item, names) for key, item in value.items()}
    return value


def match(pattern: Any, value: Any, names: Names) -> Names:
    """Hold a value against a pattern. Returns `names` and what the pattern captured.

    Raises:
        Mismatch: it does not fit.
    """
    captured = dict(names)
    _match(pattern, value, captured, "")
    return captured


def _match(pattern: Any, value: Any, names: Names, where: str) -> None:
    if isinstance(pattern, str) and _NAME.fullmatch(pattern):
        if pattern[1:] in names:
            _equal(names[pattern[1:]], value, where)
        else:
            names[pattern[1:]] = value
    elif isinstance(pattern, dict) and any(key.startswith("$") for key in pattern):
        _special(pattern, value, names, where)
    elif isinstance(pattern, dict):
        if type(value) is not dict:
            raise Mismatch(f"{where or 'frame'}: expected an object, got {_shown(value)}")
        for key, inner in pattern.items():
            place = f"{where}.{key}" if where else key
            if inner == {"$is": "absent"}:
                if key in value:
                    raise Mismatch(f"{place}: expected no such field, got {_shown(value[key])}")
            elif key not in value:
                raise Mismatch(f"{place}: is missing")
            else:
                _match(inner, value[key], names, place)
    elif isinstance(pattern, list):
        if type(value) is not list or len(value) != len(pattern):
            raise Mismatch(f"{where}: expected an array of {len(pattern)}, got {_shown(value)}")
        for at, (inner, item) in enumerate(zip(pattern, value, strict=True)):
            _match(inner, item, names, f"{where}[{at}]")
    else:
        _equal(resolve(pattern, names), value, where)


def _special(pattern: dict[str, Any], value: Any, names: Names, where: str) -> None:
    if "$contains" in pattern:
        if type(value) is not list:
            raise Mismatch(f"{where}: expected an array, got {_shown(value)}")
        for inner in pattern["$contains"]:
            if not any(_fits(inner, item, names) for item in value):
                raise Mismatch(f"{where}: expected {_shown(inner)} among {_shown(value)}")
    elif "$is" in pattern:
        if not _KINDS[pattern["$is"]](value):
            raise Mismatch(f"{where}: expected {pattern['$is']}, got {_shown(value)}")
        low, high = (resolve(pattern.get(bound), names) for bound in ("$min", "$max"))
        if (low is not None and value < low) or (high is not None and value > high):
            raise Mismatch(f"{where}: expected {_shown(pattern)}, got {_shown(value)}")
        if "$as" in pattern:
            names[pattern["$as"]] = value
    else:
        _equal(resolve(pattern, names), value, where)


def _fits(pattern: Any, value: Any, names: Names) -> bool:
    trial = dict(names)
    try:
        _match(pattern, value, trial, "")
    except Mismatch:
        return False
    names.update(trial)
    return True


def _equal(expected: Any, value: Any, where: str) -> None:
    # Python takes True for 1 and 1.0 for 1; the protocol does not.
    if json.dumps(expected, sort_keys=True) != json.dumps(value, sort_keys=True):
        raise Mismatch(f"{where or 'value'}: expected {_shown(expected)}, got {_shown(value)}")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:200] + "…"


def clauses_of(vectors: Iterable[Vector]) -> frozenset[str]:
    """Every clause that some vector cites."""
    return frozenset(clause for vector in vectors for clause in vector.clauses)
