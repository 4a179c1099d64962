"""An AsyncAPI 3 document of the wire protocol: who sends which message, and what answers it."""

from __future__ import annotations

from typing import Any

from gateway._version import __version__
from gateway.protocol import messages as m
from gateway.protocol.schema import Schemas, description_of, name_of

Document = dict[str, Any]

ANSWERS: dict[type[m.ClientFrame], tuple[type[m.ServerFrame], ...]] = {
    m.Hello: (m.HelloOk, m.HelloError),
    m.Message: (m.Accepted, m.Error),
    m.Abort: (m.Aborted, m.Error),
    m.Answer: (m.AnswerOk, m.Error),
    m.Resync: (m.Snapshot,),
    m.Refresh: (m.Refreshed, m.Error),
    m.Leave: (m.Left,),
    m.Ping: (m.ServerPong, m.Error),
}
"""PROTOCOL section 5: what a client frame is answered with. The others have no answer of their own."""

_CHANNEL = "#/channels/session"


def asyncapi() -> Document:
    """The document of protocol version 2, seen from the gateway: it receives what clients send."""
    schemas = Schemas("#/components/schemas/")
    from_clients = {name_of(cls): cls for cls in m.CLIENT_FRAMES.values()}
    from_gateway = {name_of(cls): cls for cls in (*m.EVENTS.values(), *m.SERVER_FRAMES.values())}
    everything: dict[str, type[Any]] = {**from_clients, **from_gateway}
    messages = {name: _message(cls, schemas) for name, cls in everything.items()}
    return {
        "asyncapi": "3.0.0",
        "id": "urn:trio-gateway:protocol:2",
        "info": {
            "title": "trio-gateway protocol 2",
            "version": __version__,
            "description": (
                "A session outlives its connections: its log is numbered, and a client that comes back continues "
                "after the last number it has. A client says `hello` first; then both sides send when they like."
            ),
            "license": {"name": "MIT"},
        },
        "defaultContentType": "application/json",
        "servers": {
            "local": {
                "host": "127.0.0.1:8765",
                "protocol": "ws",
                "description": "Where `trio-gateway run` listens unless it is told otherwise.",
            }
        },
        "channels": {
            "session": {
                "address": "/ws",
                "description": "One WebSocket joins one session. Text messages only, each one JSON object.",
                "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in messages},
                "bindings": {"ws": {"method": "GET", "bindingVersion": "0.1.0"}},
            }
        },
        "operations": {
            **{f"receive{name}": _received(cls) for name, cls in from_clients.items()},
            "sendEvents": _operation("send", "The session's log, from the client's cursor on.", [*m.EVENTS.values()]),
            "sendFrames": _operation("send", "What has no number.", [*m.SERVER_FRAMES.values()]),
        },
        "components": {"messages": messages, "schemas": schemas.defs},
    }


def _message(cls: type[Any], schemas: Schemas) -> Document:
    made: Document = {"name": cls.type, "title": name_of(cls), "payload": schemas.add(cls)}
    if text := description_of(cls):
        made["summary"] = text.partition("\n\n")[0].replace("\n", " ")
    return made


def _references(classes: list[type[Any]]) -> list[Document]:
    return [{"$ref": f"{_CHANNEL}/messages/{name_of(cls)}"} for cls in classes]


def _operation(action: str, summary: str, classes: list[type[Any]]) -> Document:
    return {"action": action, "channel": {"$ref": _CHANNEL}, "summary": summary, "messages": _references(classes)}


def _received(cls: type[m.ClientFrame]) -> Document:
    answers = ANSWERS.get(cls)
    said = " or ".join(f"`{answer.type}`" for answer in answers) if answers else "nothing of its own"
    made = _operation("receive", f"`{cls.type}`, answered by {said}.", [cls])
    if answers:
        made["reply"] = {"channel": {"$ref": _CHANNEL}, "messages": _references(list(answers))}
    return made
