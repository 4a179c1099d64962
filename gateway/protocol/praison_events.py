"""Dialect 1, numbered events: what of the log a PraisonAI client gets, and under which numbers.

Theory of operation
-------------------
Its client keeps two things: the ``cursor`` of the last event, which it sends back as ``since``, and the ``sequence``
that it expects next, which starts at what `hello_ok` says and must then rise by one. So every event is wrapped,
`cursor` is the number in the log, and `sequence` is a counter of the connection.

It has no idea of one event replacing another. Whoever uses it joins the ``token_stream`` contents, or takes the content
of the final ``response``, so each of the two must be the whole text, exactly once, wherever it was cut. The log however
removes the deltas when their output comes. What closes the gap is that their numbers are still free: before an event
whose range covers more than its own number, the deltas that had the others are cut out of their output (the log's
`Marks` say where) and served under their own numbers, as if they were still there. A client that was cut after any
number gets exactly the characters above it.

Nothing is merged and nothing left out, so in the usual course `sequence` equals `cursor`. That is more than
`GatewayClient` asks for, but the package's `SessionProjection` looks for gaps across connections.

One event of the log is one event here, with one exception. The end of a turn that did not simply complete becomes up
to three: ``error``, ``stream_end``, ``response``. The last carries the number, the others the one before: a client that
is cut among them gets the first ones again, with the same ``event_id``, and the response, which ends the turn for it,
once.

Where the marks are gone (the session left memory, or the process was restarted) and the client had begun to read an
answer, how much of it cannot be known: it gets no more tokens of that text, and the whole of it in the response. If not
even that can be known (it was cut between the segments of a long answer) the response says ``truncated``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import merge
from typing import Any

from attrs import frozen

from gateway.protocol import codec
from gateway.protocol import messages as m
from gateway.protocol.log import Chunk, CursorExpired, Log, NotInMemory, numbered_parts

EVENTS = (
    "typing", "response", "token_stream", "reasoning_stream", "channel_stream", "stream_end", "tool_call_stream",
    "tool_result_stream", "tool_progress_stream", "server_request", "server_request_closed", "message_nack",
    "session_update", "custom", "error",
)  # fmt: skip
"""Every type that a wrapped event can have."""

PIECE = 64 * 1024
"""Characters of one ``token_stream`` where a text must be cut: as many as version 2 merges into one delta."""

WRAPPING = 1024
"""Bytes that an event may need here beside what is in it."""

MOST_KEPT = 1024 * 1024
"""Characters of a sealed answer that a connection remembers, in case they are not in memory when its response comes."""

SEQUENCE = 64
"""Bytes that the sequence may add to a frame."""

_STATUS = {"completed": "ok", "failed": "error"}
_STREAMS = {"answer": "token_stream", "reasoning": "reasoning_stream"}

Frame = tuple[int, bytes]
"""A wrapped event's cursor, and its JSON up to where the sequence goes."""


@frozen
class Answer:
    """A turn's answer since its last final output.

    `whole`: all of it is known. `skipped`: characters that were let go, because no frame can hold what they begin.
    """

    turn_id: str = ""
    text: str = ""
    whole: bool = False
    responded: bool = False
    skipped: int = 0

    def followed_by(self, event: m.Event) -> Answer:
        """The answer after the next event of the log."""
        if type(event) is m.TurnStarted:
            return Answer(event.turn_id, whole=True)
        if type(event) is not m.Output or event.channel != "answer":
            return self
        if _responds(event):
            return Answer(event.turn_id, whole=True, responded=True)
        before = self if event.turn_id == self.turn_id else Answer(event.turn_id)
        text, skipped = before.text + event.content, before.skipped
        if len(text) > MOST_KEPT:
            text, skipped = "", skipped + len(text)
        return Answer(event.turn_id, text, before.whole, before.responded, skipped)


class Stream:
    """A connection's view of a log.

    Args:
        start: the cursor at which the connection continues; also the sequence that its client was told.
        max_frame_bytes: what no frame may exceed. Its client's WebSocket library closes at the same size.

    Invariant: `sequence` is that of the last event returned by `read`; it rises by one with each.
    """

    def __init__(self, session_id: str, agent_id: str, *, start: int, max_frame_bytes: int) -> None:
        self.sequence = start
        self._start = start
        self._answer = Answer()
        self._began = ""
        """The turn whose start the client got on this connection."""
        self._told: set[tuple[str, str]] = set()
        """The running turn's channels of which the client has got text by the delta."""
        self._holed: set[tuple[str, str]] = set()
        """Those of which something is missing: there is no more of them until the response."""
        self._session_id = session_id
        self._agent_id = agent_id
        self._room = max_frame_bytes - WRAPPING
        self._delta = (
            b'{"type":"replay","seq":%d,"event":{"type":%b,"data":{"content":%b,"turn_id":%b,"session_id":'
            + codec.dump_json(session_id).replace(b"%", b"%%")
            + b',"cursor":%d,"seq":%d},"event_id":"%b","timestamp":%b,"source":'
            + codec.dump_json(agent_id).replace(b"%", b"%%")
            + b',"target":'
            + codec.dump_json(session_id).replace(b"%", b"%%")
        )

    def restart(self, cursor: int) -> None:
        """A snapshot brought the client to `cursor`, maybe into the middle of an answer; its sequence goes on."""
        self._start = cursor
        self._answer = Answer()
        self._began = ""
        self._told, self._holed = set(), set()

    def read(self, log: Log, cursor: int, budget: int) -> Chunk:
        """What follows `cursor`, as `Log.read`. Each call continues the sequence, so its result must be sent.

        Raises:
            CursorExpired: `cursor` is below the log's floor.
        """
        if cursor < log.floor:
            raise CursorExpired(f"cursor {cursor} is below the oldest cursor {log.floor}")
        if cursor < log.tail:
            raise NotInMemory(f"what follows cursor {cursor} is in the store, up to {log.tail}")
        entries = log.entries
        payloads: list[bytes] = []
        size, position = 0, cursor
        for index in range(log.index_after(cursor), len(entries)):
            entry = entries[index]
            parts = len(entry.parts) if entry.parts else 1
            if entry.seq - parts > position:
                for frame in self._superseded(log, index, position, entry.seq - parts):
                    if size >= budget:
                        return Chunk(payloads, position, size)
                    size += self._append(payloads, [frame])
                    position = frame[0]
            # All of an event or nothing: only its last frame moves the client past it.
            if size >= budget:
                break
            event = entry.event
            frames = [] if type(event) is m.Delta and _text_of(event) in self._holed else self._frames(log, index)
            if parts > 1 and entry.seq - parts < position:
                frames = frames[position - entry.seq :]
            size += self._append(payloads, frames)
            position = entry.seq
            self._note(event)
        return Chunk(payloads, position, size)

    def _note(self, event: m.Event) -> None:
        if type(event) is m.Delta:
            self._told.add(_text_of(event))
        else:
            if type(event) is m.TurnStarted:
                self._began = event.turn_id
                self._told, self._holed = set(), set()
            elif type(event) is m.Output and _responds(event):
                self._told.discard(_text_of(event))
                self._holed.discard(_text_of(event))
            self._answer = self._answer.followed_by(event)

    def _append(self, payloads: list[bytes], frames: list[Frame]) -> int:
        size = 0
        for _, data in frames:
            self.sequence += 1
            payloads.append(b'%b,"sequence":%d}}' % (data, self.sequence))
            size += len(payloads[-1])
        return size

    # text whose deltas are gone

    def _superseded(self, log: Log, index: int, low: int, high: int) -> Iterator[Frame]:
        """The deltas above `low` up to `high`, whose numbers the entry at `index` covers."""
        if log.marks is not None:
            for seq, output, begin, end in merge(*log.marks.deltas(low, high)):
                if _text_of(output) in self._holed:
                    continue
                self._told.add(_text_of(output))
                yield self._text(seq, output, output.content[begin:end])
        event = log.entries[index].event
        if type(event) is not m.Output or not _responds(event) or not self._fits(event.content):
            return
        if _streamed(log, event) is None and self._unread(log, index, event):
            yield self._text(high, event, event.content)

    def _unread(self, log: Log, index: int, output: m.Output) -> bool:
        """Whether the client has nothing of an output of which nobody knows how it was streamed.

        So it is if it started before the turn, or right behind one of its outputs; anywhere else it may have a part.
        """
        if _text_of(output) in self._told:
            return False
        if self._began == output.turn_id:
            return True
        for i in range(index - 1, -1, -1):
            event = log.entries[i].event
            if type(event) is m.Output and event.channel == output.channel and event.seq == self._start:
                return event.turn_id == output.turn_id
            if type(event) is m.TurnStarted and event.turn_id == output.turn_id:
                return self._start <= event.seq
        return False

    # events as they are

    def _text(self, cursor: int, event: m.Delta | m.Output, text: str, event_id: str = "") -> Frame:
        kind = _STREAMS.get(event.channel)
        if kind is None:
            data = {"content": text, "channel": event.channel}
            return self._wrap(event, "channel_stream", data, cursor, event_id)
        dump = codec.dump_json
        turn_id = dump(event.turn_id)
        at = dump(event.at / 1000)
        event_id = event_id or str(cursor)
        return cursor, self._delta % (
            cursor, dump(kind), dump(text), turn_id, cursor, cursor, event_id.encode(), at,
        )  # fmt: skip

    def _frames(self, log: Log, index: int) -> list[Frame]:
        """One entry, as everyone gets it who has all that was before."""
        entry = log.entries[index]
        try:
            frames: list[Frame] = entry.wrapped
        except AttributeError:
            event = entry.event
            if type(event) is m.Delta:
                frames = [self._text(seq, event, text) for seq, text in numbered_parts(entry)]
            elif type(event) is m.Output:
                frames = self._output(log, index, event)
                if _streamed(log, event) is None:
                    return frames  # what is in it may depend on who reads
            elif type(event) is m.TurnEnded:
                frames = self._turn_ended(log, index, event)
            else:
                frames = [self._wrap(event, *_ENCODERS[type(event)](self, event), entry.seq)]
            # What is kept stays within twice the bounds of the log; a joined answer may be far longer than its entry.
            if sum(len(data) for _, data in frames) <= entry.size + WRAPPING:
                entry.wrapped = frames
        return frames

    def _wrap(self, event: m.Event, kind: str, data: dict[str, Any], cursor: int, event_id: str = "") -> Frame:
        turn_id = getattr(event, "turn_id", None)
        data |= {"session_id": self._session_id} if turn_id is None else {
            "turn_id": turn_id, "session_id": self._session_id
        }  # fmt: skip
        encoded = self._dump(event, kind, data, cursor, event_id)
        if len(encoded) > self._room + WRAPPING - SEQUENCE:
            self._shorten(data, len(encoded))
            encoded = self._dump(event, kind, data, cursor, event_id)
        return cursor, encoded

    def _dump(self, event: m.Event, kind: str, data: dict[str, Any], cursor: int, event_id: str) -> bytes:
        return codec.dump_json(
            {
                "type": "replay",
                "seq": cursor,
                "event": {
                    "type": kind,
                    "data": {**data, "cursor": cursor, "seq": cursor},
                    "event_id": event_id or str(cursor),
                    "timestamp": event.at / 1000,
                    "source": self._agent_id,
                    "target": self._session_id,
                },
            }
        )[:-2]

    def _shorten(self, data: dict[str, Any], size: int) -> None:
        """Cut what only just fitted into a frame of version 2, and say so."""
        name = max(data, key=lambda key: len(codec.dump_json(data[key])))
        value = data[name]
        # JSON needs a byte at least for each character, so this many less are enough.
        data[name] = value[: -(size - self._room)] if type(value) is str else None
        data["truncated"] = True

    def _output(self, log: Log, index: int, event: m.Output) -> list[Frame]:
        streamed = _streamed(log, event)
        if streamed is None:
            unread = self._unread(log, index, event)
            streamed = 0 if unread else len(event.content)
            if not unread:
                self._holed.add(_text_of(event))
        rest = event.content[streamed:]
        if not _responds(event):
            # Nothing else goes out under this number: room for text that came without deltas. There rarely is any.
            return self._texts(event, rest, event.seq)
        before = self._answer_before(log, index, event.turn_id)
        frames: list[Frame] = []
        head, tail = before.text, event.content
        if not self._fits(tail):
            frames = self._texts(event, rest[:-PIECE], event.seq - 1) if rest else []
            head, tail = head + tail[:-PIECE], tail[-PIECE:]
        return [*frames, self._final(event, head, tail, before, {"status": "ok"})]

    def _texts(self, event: m.Output, text: str, cursor: int) -> list[Frame]:
        """Text that was not streamed: one frame, if it fits. Of several, only the last moves the client's cursor."""
        most = len(text) if self._fits(text) else PIECE
        pieces = [text[i : i + most] for i in range(0, len(text), most)] if text else [""]
        frames = [self._text(event.seq - 1, event, piece, f"{event.seq}.{i}") for i, piece in enumerate(pieces)]
        frames[-1] = self._text(cursor, event, pieces[-1], "" if cursor == event.seq else f"{event.seq}.t")
        return frames

    def _fits(self, text: str) -> bool:
        return 6 * len(text) <= self._room - WRAPPING or len(codec.dump_json(text)) <= self._room - WRAPPING

    def _answer_before(self, log: Log, index: int, turn_id: str) -> Answer:
        """A turn's answer before an entry."""
        parts: list[str] = []
        for i in range(index - 1, -1, -1):
            event = log.entries[i].event
            if getattr(event, "turn_id", None) != turn_id:
                continue
            if type(event) is m.TurnStarted or (type(event) is m.Output and _responds(event)):
                responded = type(event) is m.Output
                return Answer(turn_id, "".join(reversed(parts)), whole=True, responded=responded)
            if type(event) is m.Output and event.channel == "answer":
                parts.append(event.content)
        if self._answer.turn_id == turn_id:
            return self._answer  # the rest was read on this connection, and is in memory no longer
        return Answer(turn_id, "".join(reversed(parts)))

    def _final(self, event: m.Event, before: str, text: str, answer: Answer, outcome: dict[str, Any]) -> Frame:
        """The response that ends a turn for the client. `offset`: where in the answer `content` begins."""
        data: dict[str, Any] = {"status": "final", "content": before + text, "offset": 0, "outcome": outcome}
        if answer.skipped or not self._fits(data["content"]):
            data |= {"content": text, "offset": answer.skipped + len(before)}
        if not answer.whole:
            data |= {"offset": None, "truncated": True}
        if type(event) is m.Output and event.metadata:
            data["metadata"] = event.metadata
        return self._wrap(event, "response", data, event.seq)

    def _turn_ended(self, log: Log, index: int, event: m.TurnEnded) -> list[Frame]:
        answer = self._answer_before(log, index, event.turn_id)
        before = answer.text
        outcome: dict[str, Any] = {"status": _STATUS.get(event.outcome, event.outcome)}
        error = event.error
        if error is not None:
            outcome["error"] = {"code": error.code, "message": error.message, "retryable": error.retryable}
        end = {"outcome": outcome}
        if event.outcome == "completed" and answer.responded and not (before or answer.skipped):
            return [self._wrap(event, "stream_end", end, event.seq)]
        frames = []
        if error is not None:
            frames.append(self._wrap(event, "error", dict(outcome["error"]), event.seq - 1, f"{event.seq}.e"))
        frames.append(self._wrap(event, "stream_end", end, event.seq - 1, f"{event.seq}.s"))
        frames.append(self._final(event, before[:-PIECE], before[-PIECE:], answer, outcome))
        return frames


def _streamed(log: Log, output: m.Output) -> int | None:
    return None if log.marks is None else log.marks.streamed(output)


def _text_of(event: m.Delta | m.Output) -> tuple[str, str]:
    return event.turn_id, event.channel


def _responds(output: m.Output) -> bool:
    """Whether an output is a response to the user: a whole answer, or the end of one."""
    return output.channel == "answer" and not output.metadata.get("more") and not output.metadata.get("partial")


def server_request(session_id: str, ask: m.Ask) -> dict[str, Any]:
    """A question, as this client's application gets it."""
    request: dict[str, Any] = {"request_id": ask.ask_id, "kind": ask.kind, "prompt": ask.prompt}
    if ask.options is not None:
        request["options"] = ask.options
    if ask.timeout_ms is not None:
        request["timeout_ms"] = ask.timeout_ms
    return {**request, "session_id": session_id}


def _turn_started(stream: Stream, event: m.TurnStarted) -> tuple[str, dict[str, Any]]:
    return "typing", {"request_ids": event.request_ids, "attempt": event.attempt}


def _input(stream: Stream, event: m.Input) -> tuple[str, dict[str, Any]]:
    data = {"status": "accepted", "content": event.content, "request_id": event.request_id, "sender": event.sender}
    return "response", data


def _withdrawn(stream: Stream, event: m.Withdrawn) -> tuple[str, dict[str, Any]]:
    return "message_nack", {"request_id": event.request_id, "reason": event.reason}


def _progress(stream: Stream, event: m.Progress) -> tuple[str, dict[str, Any]]:
    return "tool_progress_stream", {"content": event.key, "metadata": event.data}


def _tool_call(stream: Stream, event: m.ToolCall) -> tuple[str, dict[str, Any]]:
    return "tool_call_stream", {"tool_call": {"id": event.call_id, "name": event.name, "arguments": event.arguments}}


def _tool_result(stream: Stream, event: m.ToolResult) -> tuple[str, dict[str, Any]]:
    data = {"tool_call": {"id": event.call_id}, "result": event.result, "is_error": event.is_error}
    return "tool_result_stream", data


def _ask(stream: Stream, event: m.Ask) -> tuple[str, dict[str, Any]]:
    request = server_request(stream._session_id, event)
    short = len(codec.dump_json(request)) <= PIECE  # else it would be in there twice
    return "server_request", {**(request if short else {"request_id": event.ask_id}), "request": request}


def _answered(stream: Stream, event: m.Answered) -> tuple[str, dict[str, Any]]:
    data = {"request_id": event.ask_id, "value": event.value, "outcome": event.outcome}
    return "server_request_closed", data


def _state(stream: Stream, event: m.State) -> tuple[str, dict[str, Any]]:
    return "session_update", {"patch": event.patch}


def _custom(stream: Stream, event: m.Custom) -> tuple[str, dict[str, Any]]:
    return "custom", {"name": event.name, "data": event.data}


_ENCODERS: dict[type[m.Event], Callable[[Stream, Any], tuple[str, dict[str, Any]]]] = {
    m.TurnStarted: _turn_started,
    m.Input: _input,
    m.Withdrawn: _withdrawn,
    m.Progress: _progress,
    m.ToolCall: _tool_call,
    m.ToolResult: _tool_result,
    m.Ask: _ask,
    m.Answered: _answered,
    m.State: _state,
    m.Custom: _custom,
}
"""Events that need to know nothing but themselves."""
