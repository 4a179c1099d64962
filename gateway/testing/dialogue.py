"""A dialogue: what some clients do to a gateway, step by step, as data. And the file that keeps one.

A step names a connection (``"a"``, ``"b"``); its first step opens the connection, and the next one after its end opens
it again. Texts may hold names in double braces, for what is only known when the dialogue runs: ``{{session}}`` (an id
made up for the run, so that a dialogue can be run again and again), ``{{agent}}``, ``{{epoch}}``, ``{{turn}}`` and
``{{ask}}`` (the last ones seen), and the numbers ``"{{cursor}}"``, ``"{{cursor+1}}"`` (of the connection's last event,
written with their quotation marks).

The file is JSON lines: a head, the steps, and last what was expected and did not happen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import attrs
from attrs import field, frozen

from gateway.errors import ConfigError

FORMAT = "trio-gateway dialogue 1"


def _number(low: int, high: int) -> Any:
    def check(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        if type(value) is not int or not low <= value <= high:
            raise ConfigError(attribute.name, f"expected an integer from {low} to {high}, got {value!r}")

    return check


def _string(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if type(value) is not str:
        raise ConfigError(attribute.name, f"expected a string, got {value!r}")


@frozen
class Step:
    """Something that happens on connection `on`."""

    do: ClassVar[str]
    on: str = field(validator=_string)


@frozen
class SendText(Step):
    """A text message, whole and well framed; what it says may be anything."""

    do: ClassVar[str] = "text"
    text: str = field(validator=_string)


@frozen
class SendBytes(Step):
    """Bytes on the line as they are: frames, or what is none. `why` is for the reader."""

    do: ClassVar[str] = "bytes"
    data: bytes
    why: str = field(default="", validator=_string)


@frozen
class Close(Step):
    """A close frame; the line stays open for the reply."""

    do: ClassVar[str] = "close"
    code: int = field(default=1000, validator=_number(0, 65_535))


@frozen
class Cut(Step):
    """The line breaks, without a goodbye."""

    do: ClassVar[str] = "cut"


@frozen
class Wait(Step):
    """Time passes: `ms`, or less if a frame of type `until` comes on this connection. No such frame is no failure."""

    do: ClassVar[str] = "wait"
    ms: int = field(validator=_number(0, 60_000))
    until: str | None = None


@frozen
class Sync(Step):
    """Everything that was sent on this connection so far is answered before the dialogue goes on."""

    do: ClassVar[str] = "sync"


STEPS: dict[str, type[Step]] = {cls.do: cls for cls in (SendText, SendBytes, Close, Cut, Wait, Sync)}


def to_json(step: Step) -> dict[str, Any]:
    """A step as one line of the file."""
    fields = attrs.asdict(step, filter=lambda attribute, value: value not in (None, ""))
    if isinstance(step, SendBytes):
        fields["hex"] = fields.pop("data", b"").hex()
    if isinstance(step, SendText):
        fields.setdefault("text", "")
    return {"on": fields.pop("on"), "do": step.do, **fields}


def from_json(fields: Any) -> Step:
    """The step of a line.

    Raises:
        ConfigError: it is none; the message names the field.
    """
    if not isinstance(fields, dict):
        raise ConfigError("", f"expected an object, got {fields!r}")
    given = dict(fields)
    kind = given.pop("do", None)
    cls = STEPS.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise ConfigError("do", f"expected one of {', '.join(STEPS)}, got {kind!r}")
    if cls is SendBytes:
        try:
            given["data"] = bytes.fromhex(given.pop("hex"))
        except (KeyError, TypeError, ValueError):
            raise ConfigError("hex", "expected bytes as hexadecimal digits") from None
    try:
        return cls(**given)
    except TypeError as exc:
        raise ConfigError("", str(exc).partition("() ")[2] or str(exc)) from None


@frozen(kw_only=True)
class Recording:
    """A dialogue with what it is for: how it was run, and what went wrong (None if nothing did)."""

    protocol: int
    steps: Sequence[Step]
    agent: str = "echo"
    seed: int | None = None
    failure: str | None = None
    """The kind of failure, one of `gateway.testing.judge.FAILURES`."""
    message: str = ""


def dump(recording: Recording) -> str:
    """The file's text."""
    head = {"format": FORMAT, "protocol": recording.protocol, "agent": recording.agent, "seed": recording.seed}
    lines: list[dict[str, Any]] = [head, *map(to_json, recording.steps)]
    if recording.failure is not None:
        lines.append({"failed": recording.failure, "message": recording.message})
    return "".join(json.dumps(line, ensure_ascii=True) + "\n" for line in lines)


def load(path: str | Path) -> Recording:
    """Read such a file.

    Raises:
        ConfigError: it cannot be read, or is not of this format; the message names the line.
    """
    try:
        lines = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
        parsed = [json.loads(line) for line in lines]
    except (OSError, ValueError) as exc:
        raise ConfigError(str(path), f"cannot be read: {exc}") from None
    head = parsed[0] if parsed else None
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise ConfigError(f"{path}:1", f'expected {{"format": "{FORMAT}", ...}}')
    if head.get("protocol") not in (1, 2):
        raise ConfigError(f"{path}:1", f"field 'protocol': expected 1 or 2, got {head.get('protocol')!r}")
    end = parsed[-1] if isinstance(parsed[-1], dict) and "failed" in parsed[-1] else {}
    steps = []
    for number, line in enumerate(parsed[1 : -1 if end else None], 2):
        try:
            steps.append(from_json(line))
        except ConfigError as exc:
            raise ConfigError(f"{path}:{number}", str(exc)) from None
    return Recording(
        protocol=head["protocol"],
        steps=steps,
        agent=str(head.get("agent", "echo")),
        seed=head.get("seed"),
        failure=end.get("failed"),
        message=str(end.get("message", "")),
    )


_NAME = re.compile(r'"\{\{cursor(?P<add>[+-][0-9]{1,18})?\}\}"|\{\{(?P<name>session|agent|epoch|turn|ask)\}\}')


def fill_in(text: str, *, cursor: int, names: dict[str, str]) -> str:
    """Put the run's values for the names in double braces."""

    def value(found: re.Match[str]) -> str:
        if found["name"] is not None:
            return json.dumps(names.get(found["name"], f"no-{found['name']}"))[1:-1]
        return str(cursor + int(found["add"] or 0))

    return _NAME.sub(value, text)
