"""Dialects: how one connection's frames look on the wire.

Everything behind a connection speaks one language: the classes of `messages` and the numbers of the log. A *dialect*
stands between that and the bytes of one protocol version. It is chosen by the client's first frame and stays for the
connection's life. The session engine does not know that there is more than one.

A dialect is sans-I/O, and an object of its connection: version 1 remembers a few things about it, version 2 nothing, so
that one object serves everybody and costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from gateway.errors import FrameError
from gateway.protocol import codec, handshake
from gateway.protocol.log import Chunk, Log
from gateway.protocol.messages import Ask, ClientFrame, Hello, ServerFrame
from gateway.protocol.praison import Praison


class Dialect(Protocol):
    """What a connection asks of its dialect."""

    @property
    def version(self) -> int:
        """The protocol version, as `hello_ok` names it."""

    def read_hello(self, raw: bytes, /) -> Hello:
        """Read the first frame.

        Raises:
            HandshakeRefused: the connection ends with this.
            FrameError: the client is told, and may send another first frame.
        """

    def find_token(self, given: str | None, query: str, /) -> str | None:
        """The token that counts, of the one given in the ways that every version knows, and the request's query."""

    def attach(self, log: Log, asks: Mapping[str, Ask], /) -> None:
        """The connection joins a session; `asks` are its open asks, now and later. Before its `hello_ok` is encoded."""

    def decode(self, raw: bytes, /) -> Iterable[ClientFrame | FrameError]:
        """One text message of a joined client: its frames in order, each a message or what is wrong with it."""

    def encode(self, frame: ServerFrame, /) -> bytes | None:
        """A frame without a number, or None if this version has no such thing."""

    def snapshot(self, snapshot: bytes, /) -> Iterable[bytes]:
        """The frames for a snapshot, which is given as version 2 has it."""

    def read(self, log: Log, cursor: int, budget: int, /) -> Chunk:
        """What follows a cursor, as `Log.read`."""


class Native:
    """Version 2. Everything is as the codec and the log have it: the bytes are shared by all its connections."""

    version = 2
    decode = staticmethod(codec.iter_client)
    encode = staticmethod(codec.encode_frame)
    read = staticmethod(Log.read)

    @staticmethod
    def read_hello(raw: bytes) -> Hello:
        """See `Dialect.read_hello`; no second attempt in this version."""
        hello = handshake.read_hello(raw)
        handshake.negotiate(hello)
        return hello

    @staticmethod
    def find_token(given: str | None, query: str) -> str | None:
        """The query is not looked at: what is in a URL ends up in logs."""
        return given

    @staticmethod
    def attach(log: Log, asks: Mapping[str, Ask]) -> None:
        """Nothing to remember."""

    @staticmethod
    def snapshot(snapshot: bytes) -> Iterable[bytes]:
        """It is ready as it is."""
        return (snapshot,)


NATIVE = Native()


def choose(first: bytes) -> Dialect:
    """The dialect of a connection that begins with this frame.

    Version 1 for a `join`, and for a `hello` whose highest version that is; everything else, unreadable frames
    included, is answered as version 2 does.
    """
    try:
        tag, fields = codec.read_object(codec.parse_json(first))
    except FrameError:
        return NATIVE
    if tag == "join":
        return Praison(joins=True)
    if tag == Hello.type and _only_one(fields.get("protocol_min"), fields.get("protocol_max")):
        return Praison()
    return NATIVE


def _only_one(lowest: object, highest: object) -> bool:
    # A hello that is wrong has no highest version.
    return type(lowest) is int and type(highest) is int and lowest <= highest == Praison.version
