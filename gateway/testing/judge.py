"""What a gateway may say on one connection, and what it owes: a judge that only listens.

Sans-I/O. It is told every text that was sent and every text that came, and raises the first `ServerFailure`. It knows
the message classes (PROTOCOL sections 3 to 6) and nothing about how a gateway works.
"""

from __future__ import annotations

from typing import Any, ClassVar

from gateway.errors import FrameError, GatewayError, HandshakeRefused
from gateway.protocol import codec, handshake
from gateway.protocol import messages as m
from gateway.protocol.asyncapi import ANSWERS
from gateway.protocol.cursor import CursorTracker

CLOSE_CODES = frozenset(
    (1000, 1001, 1003, 1008, 1009, 1011, 1012, 1013, 4400, 4401, 4403, 4404, 4406, 4408, 4429)
)  # fmt: skip
"""PROTOCOL section 9. RFC 6455 adds 1002 and 1007 for whoever broke its rules."""

ERROR_CODES = frozenset(
    (
        "already_joined", "busy", "draining", "forbidden", "inbox_full", "internal", "invalid_frame", "invalid_json",
        "no_active_turn", "rate_limited", "request_id_conflict", "token_rejected", "unavailable", "unknown_ask",
        "unknown_request", "unknown_type",
    )
)  # fmt: skip
"""PROTOCOL section 6."""

SHOWN = 300
"""Characters of a frame that a failure repeats."""


class ServerFailure(GatewayError):
    """The server broke the protocol. `kind` names how, and is what a file of a failure says."""

    kind: ClassVar[str]


class Dead(ServerFailure):
    """A connection ended without a close frame."""

    kind = "dead"


class Untyped(ServerFailure):
    """An answer that is none: not of the protocol, of wrong types, to a question nobody asked, without its code."""

    kind = "untyped"


class OutOfOrder(ServerFailure):
    """The covering rule is broken: an event came twice, a number was skipped, or one number means two things."""

    kind = "order"


class WrongClose(ServerFailure):
    """A close code that is not in the protocol's table, or not for this."""

    kind = "close_code"


class Stalled(ServerFailure):
    """No answer within the limit."""

    kind = "stall"


class Internal(ServerFailure):
    """The gateway itself says that it failed: close code 1011, or an error ``internal``."""

    kind = "internal"


class Disturbed(ServerFailure):
    """A well-behaved connection with a session of its own was disturbed by the others."""

    kind = "disturbed"


class Gone(ServerFailure):
    """The server does not accept connections any more."""

    kind = "gone"


FAILURES: dict[str, type[ServerFailure]] = {
    cls.kind: cls for cls in (Dead, Untyped, OutOfOrder, WrongClose, Stalled, Internal, Disturbed, Gone)
}


def shown(raw: bytes | str) -> str:
    """A frame as a failure names it, short."""
    text = raw if isinstance(raw, str) else raw.decode("utf-8", "replace")
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


class Ledger:
    """What the connections of one dialogue have seen of their sessions' logs, side by side."""

    def __init__(self) -> None:
        self._events: dict[tuple[str, str, int], bytes] = {}

    def enter(self, session_id: str, epoch: str, event: m.Event) -> None:
        """Note an event that everyone must see alike: a number means one thing within an epoch."""
        if event.volatile:
            return
        said = codec.encode_event(event, 0)
        before = self._events.setdefault((session_id, epoch, event.seq), said)
        if before != said:
            raise OutOfOrder(f"number {event.seq} of one session is both {shown(before)} and {shown(said)}")


class Judge:
    """Version 2 on one connection.

    Attributes:
        joined, refused: what became of the hello.
        ending: whether the gateway has to close now.
    """

    version = 2

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.joined: m.HelloOk | None = None
        self.refused: m.HelloError | None = None
        self.ending = False
        self.asked = False
        """Whether a first frame was sent."""
        self.cursor = CursorTracker()
        self._hello: m.Hello | None = None
        self._requests: set[str] = set()
        self._due = 0
        self._maybe = 0
        self._answers = 0
        self._snapshot_due = False
        self._ended_turns: set[str] = set()
        self._turn: str | None = None
        self._left = False

    @property
    def welcomed(self) -> bool:
        """Whether the opening was answered with a session."""
        return self.joined is not None

    @property
    def met(self) -> bool:
        """Whether the opening has its answer, or none is due."""
        return not self.asked or self.ending or self.welcomed

    @staticmethod
    def input_of(fields: dict[str, Any]) -> str | None:
        """The request id, if a frame is an input in the log."""
        return str(fields["request_id"]) if fields["type"] == "input" else None

    @staticmethod
    def names_of(fields: dict[str, Any]) -> dict[str, Any]:
        """What later frames may refer to."""
        names = {"epoch": fields.get("epoch"), "turn": fields.get("turn_id"), "ask": fields.get("ask_id")}
        return {name: value for name, value in names.items() if isinstance(value, str)}

    @property
    def owed(self) -> int:
        """Answers that are still to come."""
        if self.ending or not self.asked:
            return 0
        if self.joined is None:
            return 1
        return max(0, self._due - self._answers) + self._snapshot_due

    # what was sent

    def sent(self, raw: bytes) -> None:
        """A whole text message went out."""
        if self.ending:
            return
        if not self.asked:
            self.asked = True
            try:
                self._hello = handshake.read_hello(raw)
            except HandshakeRefused:
                self.ending = True
            return
        if self._hello is None:
            return
        for frame in codec.iter_client(raw):
            if isinstance(frame, m.Leave):
                self.ending = True
                return
            if isinstance(frame, m.Message):
                self._requests.add(frame.request_id)
            if isinstance(frame, m.Resync):
                self._snapshot_due = True
            elif isinstance(frame, FrameError) or type(frame) in ANSWERS:
                self._due += 1
            else:
                self._maybe += 1  # nothing, or an error if it is too large

    # what came

    def received(self, raw: bytes) -> list[dict[str, Any]]:
        """A whole text message came: its frames, if they are what they may be now."""
        try:
            value = codec.parse_json(raw)
            batch = type(value) is list
            items = [codec.read_object(item)[1] for item in (value if batch else [value])]
            for fields in items:
                self._frame(fields)
        except FrameError as exc:
            raise Untyped(f"{exc}, in {shown(raw)}") from None
        except ServerFailure as exc:
            raise type(exc)(f"{exc}, in {shown(raw)}") from None
        if batch and (self._hello is None or "batch" not in self._hello.capabilities):
            raise Untyped(f"an array, to a client without the capability batch: {shown(raw)}")
        return items

    def _frame(self, fields: dict[str, Any]) -> None:
        kind = fields["type"]
        cls: Any = m.EVENTS.get(kind) or m.SERVER_FRAMES.get(kind)
        if cls is None:
            raise Untyped(f"the gateway has no frame of type {kind!r}")
        frame = codec.structure(fields, cls)
        if self.refused is not None or self._left:
            raise Untyped("a frame behind the last one")
        if isinstance(frame, m.HelloError):
            self._on_refusal(frame)
        elif isinstance(frame, m.HelloOk):
            self._on_welcome(frame)
        elif self.joined is None:
            if not isinstance(frame, m.GoAway):
                raise Untyped("expected hello_ok or hello_error first")
        elif isinstance(frame, m.Event):
            self._on_event(frame)
        elif isinstance(frame, m.Snapshot):
            self._on_snapshot(frame)
        else:
            self._on_reply(frame)

    def _on_refusal(self, frame: m.HelloError) -> None:
        if self.joined is not None:
            raise Untyped("hello_error on a joined connection")
        if not frame.code or not frame.message:
            raise Untyped("hello_error without a code or message")
        if frame.code == "internal":
            raise Internal(f"hello_error internal: {frame.message}")
        self.refused = frame
        self.ending = True

    def _on_welcome(self, frame: m.HelloOk) -> None:
        hello = self._hello
        if hello is None or self.joined is not None:
            raise Untyped("hello_ok without a valid hello, or a second one")
        self.joined = frame
        since = hello.since or 0
        if frame.protocol != self.version:
            raise Untyped(f"expected protocol {self.version}, got {frame.protocol}")
        if hello.session_id is not None and frame.session_id != hello.session_id:
            raise Untyped(f"joined {frame.session_id!r} instead of {hello.session_id!r}")
        if frame.resync_required is (frame.resync_reason is None):
            raise Untyped("resync_required and resync_reason disagree")
        if not frame.resync_required and frame.cursor != since:
            raise OutOfOrder(f"asked to continue after {since}, continues after {frame.cursor}")
        if not frame.oldest_cursor <= frame.cursor <= frame.head:
            raise OutOfOrder("expected oldest_cursor <= cursor <= head")
        self.cursor = CursorTracker(frame.cursor, frame.epoch)
        self._snapshot_due = frame.resync_required

    def _on_event(self, event: m.Event) -> None:
        assert self.joined is not None
        if self.joined.resync_required and self._snapshot_due and self.cursor.cursor == self.joined.cursor:
            raise OutOfOrder("an event before the snapshot that hello_ok promised")
        before = self.cursor.cursor
        verdict = self.cursor.offer(event)
        if verdict != "new" or event.first > event.seq:
            raise OutOfOrder(f"{verdict} at cursor {before}: an event that stands for {event.first}..{event.seq}")
        self._ledger.enter(self.joined.session_id, self.joined.epoch, event)
        self._follow_turn(event)

    def _follow_turn(self, event: m.Event) -> None:
        turn_id = getattr(event, "turn_id", None)
        if isinstance(event, m.TurnStarted):
            if self._turn is not None:
                raise OutOfOrder(f"turn {turn_id} started while {self._turn} runs")
            self._turn = event.turn_id
        elif isinstance(event, m.TurnEnded):
            if event.turn_id in self._ended_turns:
                raise OutOfOrder(f"turn {turn_id} ended twice")
            self._ended_turns.add(event.turn_id)
            self._turn = None
        elif turn_id in self._ended_turns:
            raise OutOfOrder(f"{event.type} of turn {turn_id}, which has ended")

    def _on_snapshot(self, frame: m.Snapshot) -> None:
        assert self.joined is not None
        if frame.epoch == self.cursor.epoch and frame.cursor < self.cursor.cursor:
            raise OutOfOrder(f"a snapshot of {frame.cursor} at cursor {self.cursor.cursor}")
        if any(event.seq > frame.cursor for event in frame.transcript):
            raise OutOfOrder("a snapshot holds an event that is newer than it")
        for event in frame.transcript:
            self._ledger.enter(self.joined.session_id, frame.epoch, event)
        self.cursor.reset(frame)
        self._snapshot_due = False
        self._turn = frame.turn.turn_id if frame.turn is not None else None

    def _on_reply(self, frame: m.ServerFrame) -> None:
        if isinstance(frame, m.Error):
            if not frame.message or frame.code not in ERROR_CODES:
                raise Untyped(f"error code {frame.code!r} is not one of the protocol's, or says nothing")
            if frame.code == "internal":
                raise Internal(frame.message)
        elif isinstance(frame, m.Accepted):
            if frame.request_id not in self._requests:
                raise Untyped("accepted, for a message that was not sent here")
        elif isinstance(frame, m.Left):
            self._left = True
        elif not isinstance(frame, m.Aborted | m.AnswerOk | m.Refreshed | m.ServerPong):
            return
        if isinstance(frame, m.Left):
            if not self.ending:
                raise Untyped("left, without a leave")
            return
        self._answers += 1
        if self._answers > self._due + self._maybe:
            raise Untyped("an answer to nothing")
