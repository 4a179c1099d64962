"""Dialect 1: the wire format of PraisonAI's gateway, so that its shipped client works unchanged (PROTOCOL section 10).

Observed from ``praisonai-bot`` 0.1.16, its ``gateway.client.GatewayClient`` above all. This module has everything
without a number: opening, requests, replies, refusals, snapshots. `praison_events` has the events.

What its client does, and so what counts here: it adopts ``cursor`` and ``sequence`` of `hello_ok`; it stops for good on
some codes of `hello_error` and tries again on all others, whatever the close code; it pings at the policy's
``heartbeat_ms`` and takes any frame for a sign of life; it hands every frame it does not know to its application.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import ceil
from typing import Any
from urllib.parse import parse_qs

from attrs import field, frozen

from gateway.errors import FrameError, HandshakeRefused
from gateway.protocol import codec, handshake
from gateway.protocol import messages as m
from gateway.protocol.log import Chunk, Log
from gateway.protocol.praison_events import EVENTS, Stream, server_request

METHODS = ("message", "abort", "message_abort", "server_reply", "leave", "ping", "pong")

STOP = {"/stop": "turn", "stop": "turn", "/stop all": "all", "/cancel": "all"}
"""Messages that are commands, after stripping and in lower case, and the scope of the abort that each is."""

_CODES = {
    "unauthorized": "auth_unauthorized",
    "forbidden": "auth_unauthorized",
    "too_many_connections": "rate_limited",
}
_NEXT_STEP = {
    "auth_required": "reauthenticate",
    "auth_unauthorized": "reauthenticate",
    "protocol_unsupported": "upgrade_client",
    "agent_not_found": "do_not_retry",
    "origin_not_allowed": "do_not_retry",
    "invalid_hello": "do_not_retry",
}
"""What its client tells its application to do. Everything else passes with time."""

_JOIN_CODES = {"protocol_unsupported": "version_unsupported", "invalid_hello": "invalid_protocol_hello"}


@frozen(kw_only=True)
class _Join:
    """The older opening."""

    agent_id: str
    min_version: int = 1
    max_version: int = 1
    session_id: m.SessionId | None = None
    since: int | None = None
    token: str | None = None


@frozen(kw_only=True)
class _Message:
    content: str
    request_id: m.RequestId | None = None
    metadata: dict[str, m.JSON] = field(factory=dict)


@frozen(kw_only=True)
class _Reply:
    request_id: str
    value: m.JSON


class Praison:
    """One connection's dialect 1.

    Args:
        joins: whether the client opened with `join` instead of `hello`; it gets the answers that go with it.
    """

    version = 1

    def __init__(self, *, joins: bool = False) -> None:
        self._joins = joins
        self._had_token = False
        self._session_id = ""
        self._agent_id = ""
        self._connection_id = ""
        self._made_up = 0
        self._replying = ""
        self._asks: Mapping[str, m.Ask] = {}
        self._max_frame_bytes = 0
        self._stream: Stream | None = None

    # opening

    def read_hello(self, raw: bytes, /) -> m.Hello:
        """Read `hello` or `join`.

        Raises:
            HandshakeRefused: no common version.
            FrameError: a field is wrong; the client may try again on the same connection, as with PraisonAI's own.
        """
        if not self._joins:
            try:
                hello = handshake.read_hello(raw)
            except HandshakeRefused as refused:
                raise FrameError(refused.code, refused.message) from None
            handshake.negotiate(hello)
            return hello
        _, fields = codec.read_object(codec.parse_json(raw))
        try:
            join: _Join = codec.structure(fields, _Join)
            if join.min_version > join.max_version:
                wrong = f"field 'min_version': {join.min_version} is above max_version {join.max_version}"
                raise FrameError("invalid_frame", wrong)
            handshake.check_hello(join.agent_id, join.since)
        except FrameError as exc:
            raise FrameError("invalid_hello", exc.message) from None
        highest = min(join.max_version, self.version)
        hello = m.Hello(
            protocol_min=join.min_version,
            protocol_max=highest if join.min_version <= highest else join.max_version,
            agent_id=join.agent_id,
            session_id=join.session_id,
            since=join.since,
            token=join.token,
        )
        if handshake.negotiate(hello) != self.version:
            raise HandshakeRefused(
                "protocol_unsupported",
                f"'join' opens version 1 only, not {join.min_version} to {join.max_version}",
                close_code=4406,
                next_step="Open with hello.",
            )
        return hello

    def find_token(self, given: str | None, query: str, /) -> str | None:
        """Its client has the query only."""
        token = given if given is not None else parse_qs(query).get("token", [None])[0]
        self._had_token = token is not None
        return token

    def attach(self, log: Log, asks: Mapping[str, m.Ask], /) -> None:
        """See `Dialect.attach`. From now on the log remembers which text its client has."""
        log.keep_marks()
        self._asks = asks

    def _opened(self, ok: m.HelloOk) -> dict[str, Any]:
        self._session_id, self._agent_id, self._connection_id = ok.session_id, ok.agent_id, ok.connection_id
        self._max_frame_bytes = ok.policy.max_frame_bytes
        self._stream = Stream(
            ok.session_id, ok.agent_id, start=ok.cursor, max_frame_bytes=ok.policy.max_frame_bytes
        )  # fmt: skip
        position = {
            "session_id": ok.session_id,
            "resumed": ok.resumed,
            "cursor": ok.cursor,
            "sequence": ok.cursor,
            "oldest_cursor": ok.oldest_cursor,
            "resync_required": ok.resync_required,
        }
        if self._joins:
            return {
                "type": "joined",
                **position,
                "agent_id": ok.agent_id,
                "protocol_version": self.version,
                "server_min_version": handshake.VERSIONS[0],
                "server_max_version": handshake.VERSIONS[-1],
                "presence": [
                    {"client_id": member.connection_id, "subject": member.subject, "joined_at": member.joined_at / 1000}
                    for member in ok.presence
                ],
                "health": {"status": ok.health.status, "draining": ok.health.draining},
            }
        return {
            "type": "hello_ok",
            "protocol": self.version,
            "features": {"methods": list(METHODS), "events": list(EVENTS)},
            "policy": {
                "max_payload": ok.policy.max_payload,
                "max_buffered_bytes": ok.policy.max_buffered_bytes,
                # What waits for a client is in the log, so its bound is the one that counts.
                "max_queued_frames": ok.policy.replay_max_events,
                "heartbeat_ms": ok.policy.heartbeat_ms,
            },
            **position,
        }

    def _refused(self, refusal: m.HelloError) -> dict[str, Any]:
        code = _CODES.get(refusal.code, refusal.code)
        if refusal.code == "unauthorized" and not self._had_token:
            code = "auth_required"
        return self._refusal(code, refusal.message, refusal.retry_after_ms)

    def _refusal(self, code: str, message: str, retry_after_ms: int | None = None) -> dict[str, Any]:
        step = _NEXT_STEP.get(code, "wait_then_retry")
        shown = _JOIN_CODES.get(code, code) if self._joins else code
        frame: dict[str, Any] = {"type": "error" if self._joins else "hello_error", "code": shown, "message": message}
        frame |= {"next_step": step, "next": step}
        if retry_after_ms is not None:
            frame["retry_after_seconds"] = ceil(retry_after_ms / 1000)
        return frame | {
            "server_min_version": handshake.VERSIONS[0],
            "server_max_version": handshake.VERSIONS[-1],
        }

    # reading

    def decode(self, raw: bytes, /) -> Iterator[m.ClientFrame | FrameError]:
        """One message is one frame: its wire format has no arrays."""
        try:
            tag, fields = codec.read_object(codec.parse_json(raw, codec.MAX_GIVEN_DEPTH))
            read = _READERS.get(tag)
            if read is None:
                known = ", ".join(METHODS)
                raise FrameError("unknown_type", f"field 'type': {tag[:40]!r} is not one of {known}")
            frame = read(self, fields)
        except FrameError as exc:
            yield exc
        else:
            yield frame

    def _read_message(self, fields: dict[str, Any]) -> m.ClientFrame:
        message: _Message = codec.structure(fields, _Message)
        content = message.content
        if not content.strip():
            raise FrameError("invalid_frame", "field 'content': expected text, got nothing", message.request_id)
        scope = STOP.get(content.strip().lower()) if len(content) < 32 else None
        if scope is not None:
            return m.Abort(scope=scope)  # type: ignore[arg-type]
        request_id = message.request_id
        if request_id is None:
            self._made_up += 1
            request_id = m.RequestId(f"{self._connection_id}.{self._made_up}")
        return m.Message(request_id=request_id, content=content, metadata=message.metadata)

    def _read_abort(self, fields: dict[str, Any]) -> m.ClientFrame:
        # Whatever else it says is taken for the turn alone: a malformed scope must not withdraw what waits.
        return m.Abort(scope="all" if fields.get("scope") == "session" else "turn")

    def _read_reply(self, fields: dict[str, Any]) -> m.ClientFrame:
        reply: _Reply = codec.structure(fields, _Reply)
        self._replying = reply.request_id
        value = reply.value
        ask = self._asks.get(reply.request_id)
        if ask is not None and ask.kind == "approval" and value in ("allow", "deny"):
            value = value == "allow"
        elif ask is not None and ask.kind == "choice" and type(value) is str and value not in (ask.options or ()):
            # Its replies are strings; an option may be any JSON value.
            for option in ask.options or ():
                if codec.dump_json(option).decode() == value:
                    value = option
        return m.Answer(ask_id=reply.request_id, value=value)

    def _read_leave(self, fields: dict[str, Any]) -> m.ClientFrame:
        return m.Leave()

    def _read_ping(self, fields: dict[str, Any]) -> m.ClientFrame:
        return m.Ping()

    def _read_pong(self, fields: dict[str, Any]) -> m.ClientFrame:
        return m.Pong()

    def _read_opening(self, fields: dict[str, Any]) -> m.ClientFrame:
        raise FrameError("already_joined", "this connection has joined a session; open another one")

    # writing

    def encode(self, frame: m.ServerFrame, /) -> bytes | None:
        """A frame without a number; None for what this version does not know."""
        write = _WRITERS.get(type(frame))
        return None if write is None else codec.dump_json(write(self, frame))

    def _accepted(self, frame: m.Accepted) -> dict[str, Any]:
        status = "duplicate" if frame.duplicate else "accepted"
        return {
            "type": "response", "status": status, "content": "", "session_id": self._session_id,
            "request_id": frame.request_id,
        }  # fmt: skip

    def _aborted(self, frame: m.Aborted) -> dict[str, Any]:
        # The engine says what was stopped, not what was asked for.
        whole = frame.turn_id is None or bool(frame.withdrawn)
        return self._stopped("session" if whole else "turn", frame.turn_id is not None, len(frame.withdrawn))

    def _stopped(self, scope: str, turn_aborted: bool, pending: int) -> dict[str, Any]:
        return {
            "type": "aborted" if turn_aborted or pending else "no_active_turn", "session_id": self._session_id,
            "scope": scope, "turn_aborted": turn_aborted, "pending_cancelled": pending,
        }  # fmt: skip

    def _error(self, frame: m.Error) -> dict[str, Any]:
        if self._stream is None:
            return self._refusal(frame.code, frame.message)
        if frame.code == "no_active_turn":
            return self._stopped("turn", False, 0)
        if frame.code == "unknown_ask":
            # The engine answers in the step in which it is asked, so this is the reply that was read last.
            return self._reply_ack(self._replying, "unknown_request")
        error: dict[str, Any] = {"type": "error", "code": frame.code, "message": frame.message}
        if frame.retryable:
            error["retryable"] = True
        if frame.retry_after_ms is not None:
            error["retry_after_seconds"] = ceil(frame.retry_after_ms / 1000)
        if frame.request_id is not None:
            error["request_id"] = frame.request_id
        return error

    def _answer_ok(self, frame: m.AnswerOk) -> dict[str, Any]:
        return self._reply_ack(frame.ask_id, "resolved")

    def _reply_ack(self, request_id: str, status: str) -> dict[str, Any]:
        return {"type": "server_reply_ack", "request_id": request_id, "status": status}

    def _left(self, frame: m.Left) -> dict[str, Any]:
        return {"type": "left", "session_id": self._session_id}

    def _ping(self, frame: m.ServerPing) -> dict[str, Any]:
        return {"type": "ping"}

    def _pong(self, frame: m.ServerPong) -> dict[str, Any]:
        return {"type": "pong"}

    # the session's events

    def read(self, log: Log, cursor: int, budget: int, /) -> Chunk:
        """See `Stream.read`."""
        assert self._stream is not None
        return self._stream.read(log, cursor, budget)

    def snapshot(self, snapshot: bytes, /) -> Iterable[bytes]:
        """The snapshot, then each open question as an event: that is where applications look for it."""
        (given,) = codec.decode_server(snapshot)
        assert isinstance(given, m.Snapshot)
        assert self._stream is not None
        self._stream.restart(given.cursor)
        yield self._snapshot(given)
        for ask in given.asks:
            yield codec.dump_json({"type": "server_request", "request": server_request(self._session_id, ask)})

    def _snapshot(self, given: m.Snapshot) -> bytes:
        assert self._stream is not None
        messages, events, unfinished = self._transcript(given.transcript)
        if given.turn is not None:
            text = unfinished + given.turn.channels.get("answer", "")
            if text:
                data = {"content": text, "turn_id": given.turn.turn_id}
                events.append(self._event("token_stream", data, given.cursor, given.turn.started_at))
        truncated = given.transcript_truncated
        while True:
            state = {
                "session_id": self._session_id,
                "agent_id": self._agent_id,
                "state": given.state,
                "messages": messages,
                "events": events,
                "event_cursor": given.cursor,
                "cursor": given.cursor,
                "sequence": self._stream.sequence,
                "truncated": truncated,
            }
            frame = codec.dump_json({"type": "snapshot", "resync_reason": given.reason, "state": state})
            if len(frame) <= self._max_frame_bytes or not (messages or events):
                return frame
            truncated = True
            # Down to nothing if need be: its client closes at a larger frame, comes back, and would get the same again.
            events = events[(len(events) + (not messages)) // 2 :]
            messages = messages[(len(messages) + 1) // 2 :]

    def _transcript(self, transcript: list[Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
        """Messages, other events, and what is sealed of an answer that goes on."""
        messages: list[dict[str, Any]] = []
        events: list[dict[str, Any]] = []
        parts: list[str] = []
        for event in transcript:
            if isinstance(event, m.Input):
                metadata = {**event.metadata, "request_id": event.request_id}
                messages.append(self._message(event, event.content, event.sender, metadata))
            elif isinstance(event, m.Output) and event.channel == "answer":
                parts.append(event.content)
                if not event.metadata.get("more"):
                    messages.append(self._message(event, "".join(parts), self._agent_id, event.metadata))
                    parts = []
            elif isinstance(event, m.TurnEnded) and parts:
                messages.append(self._message(event, "".join(parts), self._agent_id, {}))
                parts = []
            elif isinstance(event, m.ToolCall):
                data: dict[str, Any]
                call = {"id": event.call_id, "name": event.name, "arguments": event.arguments}
                data = {"tool_call": call, "turn_id": event.turn_id}
                events.append(self._event("tool_call_stream", data, event.seq, event.at))
            elif isinstance(event, m.ToolResult):
                data = {"tool_call": {"id": event.call_id}, "turn_id": event.turn_id}
                data |= {"result": event.result, "is_error": event.is_error}
                events.append(self._event("tool_result_stream", data, event.seq, event.at))
        return messages, events, "".join(parts)

    def _message(self, event: m.Event, content: str, sender: str, metadata: dict[str, Any]) -> dict[str, Any]:
        return {
            "content": content, "sender_id": sender, "session_id": self._session_id, "message_id": str(event.seq),
            "timestamp": event.at / 1000, "metadata": metadata,
        }  # fmt: skip

    def _event(self, kind: str, data: dict[str, Any], seq: int, at: int) -> dict[str, Any]:
        return {
            "type": kind,
            "data": {**data, "session_id": self._session_id, "cursor": seq, "seq": seq},
            "event_id": str(seq),
            "timestamp": at / 1000,
            "source": self._agent_id,
            "target": self._session_id,
        }


_READERS: dict[str, Callable[[Praison, dict[str, Any]], m.ClientFrame]] = {
    "message": Praison._read_message,
    "abort": Praison._read_abort,
    "message_abort": Praison._read_abort,
    "server_reply": Praison._read_reply,
    "leave": Praison._read_leave,
    "ping": Praison._read_ping,
    "pong": Praison._read_pong,
    "hello": Praison._read_opening,
    "join": Praison._read_opening,
}

_WRITERS: dict[type[m.ServerFrame], Callable[[Praison, Any], dict[str, Any]]] = {
    m.HelloOk: Praison._opened,
    m.HelloError: Praison._refused,
    m.Accepted: Praison._accepted,
    m.Aborted: Praison._aborted,
    m.AnswerOk: Praison._answer_ok,
    m.Left: Praison._left,
    m.ServerPing: Praison._ping,
    m.ServerPong: Praison._pong,
    m.Error: Praison._error,
}
"""Credit, presence, signals and `goaway` have no counterpart: its client would hand them to its application."""
