"""JSON Schema (2020-12) of the wire protocol, made from the message classes.

A schema says what one frame may look like, exactly as strictly as the codec: the property tests hold both to it. What
it cannot say is said by the protocol alone: that 1.0 is no integer, how deep and how large a frame may be, that
``protocol_min`` is not above ``protocol_max``, a repeated ``type``, and everything about the order of frames.

It is stricter than a client's codec in two points, and no gateway ever sends what only the codec takes: events have
`seq`, `first` and `at` (the classes have defaults, as an event is made before it is numbered), and what stands among a
snapshot's `asks` says that it is one.
"""

from __future__ import annotations

import inspect
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import attrs

from gateway.protocol import messages as m
from gateway.protocol.codec import MAX_REQUEST_ID

DRAFT = "https://json-schema.org/draft/2020-12/schema"

Schema = dict[str, Any]

_SCALARS: dict[Any, Schema] = {
    Any: {},
    type(None): {"type": "null"},
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer", "minimum": -(2**63), "maximum": 2**64 - 1},
    m.RequestId: {"type": "string", "minLength": 1, "maxLength": MAX_REQUEST_ID},
    # Not "^…$": in many dialects `$` also matches before a final line break.
    m.SessionId: {"type": "string", "minLength": 1, "maxLength": 128, "not": {"pattern": "[^A-Za-z0-9._:-]"}},
}

_NARROWER: dict[tuple[type, str], Schema] = {
    (m.Hello, "since"): {"minimum": 0},
    (m.Hello, "agent_id"): {"minLength": 1},
}
"""What `handshake.read_hello` asks for beyond the types."""


def name_of(cls: type) -> str:
    """The name of a message's or part's schema."""
    return cls.__name__


class Schemas:
    """The schemas of message classes and of the classes within them, by name. `prefix` is where they will stand."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.defs: dict[str, Schema] = {}

    def ref(self, name: str) -> Schema:
        return {"$ref": self._prefix + name}

    def add(self, cls: type[Any]) -> Schema:
        """Define a class, once, and return the reference to it."""
        name = name_of(cls)
        if name not in self.defs:
            self.defs[name] = {}  # its place in the order, and an end to recursion
            self.defs[name] = self._object(cls)
        return self.ref(name)

    def choice(self, name: str, description: str, options: list[Schema]) -> Schema:
        """Define a union under a name, and return the reference to it."""
        self.defs[name] = {"description": description, "oneOf": options}
        return self.ref(name)

    def _object(self, cls: type[Any]) -> Schema:
        hints = get_type_hints(cls)
        properties: dict[str, Schema] = {}
        required: list[str] = []
        tag = getattr(cls, "type", None)
        if isinstance(tag, str):
            properties["type"] = {"const": tag}
            required.append("type")
        for field in attrs.fields(cls):
            wire_name = field.name.rstrip("_")
            schema = self._of(hints[field.name])
            if narrower := _NARROWER.get((cls, field.name)):
                schema = {**schema, **narrower}
            numbered = issubclass(cls, m.Event) and wire_name in ("seq", "first", "at")
            if field.default is attrs.NOTHING or numbered:
                required.append(wire_name)
            else:
                schema = {**schema, "default": _default(field.default)}
            properties[wire_name] = schema
        made: Schema = {"type": "object", "properties": properties}
        if required:
            made["required"] = required
        if text := description_of(cls):
            made["description"] = text
        for mark in ("volatile", "droppable"):
            if getattr(cls, mark, False):
                made[f"x-{mark}"] = True
        return made

    def _of(self, kind: Any) -> Schema:
        if kind in _SCALARS:
            return dict(_SCALARS[kind])
        if kind == m.AnyEvent:
            return self.event()
        origin, args = get_origin(kind), get_args(kind)
        if origin is Literal:
            return {"enum": list(args)}
        if origin in (Union, types.UnionType):
            return self._union([arg for arg in args if arg is not type(None)], type(None) in args)
        if origin is list:
            return {"type": "array", "items": self._of(args[0])} if args[0] is not Any else {"type": "array"}
        if origin is dict:
            values = {} if args[1] is Any else {"additionalProperties": self._of(args[1])}
            return {"type": "object", **values}
        return self.add(kind)

    def _union(self, kinds: list[Any], nullable: bool) -> Schema:
        assert len(kinds) == 1, "the protocol has no unions but with null, and of events"
        assert nullable
        schema = self._of(kinds[0])
        if "enum" in schema:
            return {"enum": [*schema["enum"], None]}
        if isinstance(schema.get("type"), str) and "not" not in schema:  # "not" would refuse null as well
            return {**schema, "type": [schema["type"], "null"]}
        return {"anyOf": [schema, {"type": "null"}]}

    def event(self) -> Schema:
        """The union of all events."""
        if "Event" not in self.defs:
            self.defs["Event"] = {}
            refs = [self.add(cls) for cls in m.EVENTS.values()]
            self.choice("Event", "An entry of a session's log, numbered.", refs)
        return self.ref("Event")


def _default(value: Any) -> Any:
    return value.factory() if isinstance(value, attrs.Factory) else value  # type: ignore[arg-type]


def description_of(cls: type) -> str:
    """The class's own docstring, in the wire's names."""
    doc = cls.__dict__.get("__doc__") or ""
    if not doc or doc.startswith("Method generated"):
        return ""
    return inspect.cleandoc(doc).replace("`from_`", "`from`").replace("None", "null")


def json_schema() -> Schema:
    """The schema of protocol version 2.

    ``$defs`` has one entry per class, named as the class; `ClientMessage` and `GatewayMessage` are what one text
    message of a client or of the gateway may be, and the schema as a whole is either.
    """
    schemas = Schemas("#/$defs/")
    client = schemas.choice(
        "ClientFrame", "What a client sends.", [schemas.add(cls) for cls in m.CLIENT_FRAMES.values()]
    )
    gateway = schemas.choice(
        "GatewayFrame",
        "What the gateway sends.",
        [schemas.event(), *(schemas.add(cls) for cls in m.SERVER_FRAMES.values())],
    )
    array = "or, where `batch` was agreed on, an array of frames that are handled in order."
    either = [
        schemas.choice("ClientMessage", f"One frame, {array}", [client, {"type": "array", "items": client}]),
        schemas.choice("GatewayMessage", f"One frame, {array}", [gateway, {"type": "array", "items": gateway}]),
    ]
    return {
        "$schema": DRAFT,
        "$id": "urn:trio-gateway:protocol:2",
        "title": "trio-gateway protocol 2",
        "description": "One text message on the WebSocket. Unknown fields are ignored by both sides.",
        "anyOf": either,
        "$defs": schemas.defs,
    }
