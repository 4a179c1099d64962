"""The judge of version 1, PraisonAI's wire format (PROTOCOL section 10)."""

from __future__ import annotations

from typing import Any

from gateway.errors import FrameError
from gateway.protocol import codec
from gateway.protocol import messages as m
from gateway.protocol.asyncapi import ANSWERS
from gateway.protocol.cursor import CursorTracker
from gateway.protocol.praison import Praison
from gateway.protocol.praison_events import EVENTS
from gateway.testing.judge import Internal, Judge, Ledger, OutOfOrder, Untyped

Shape = dict[str, tuple[type, ...]]

_NUMBER = (int, float)

SHAPES: dict[str, Shape] = {
    "hello_ok": {
        "protocol": (int,), "session_id": (str,), "resumed": (bool,), "cursor": (int,), "sequence": (int,),
        "features": (dict,), "policy": (dict,),
    },
    "joined": {
        "session_id": (str,), "agent_id": (str,), "resumed": (bool,), "cursor": (int,), "oldest_cursor": (int,),
        "resync_required": (bool,), "sequence": (int,), "protocol_version": (int,), "server_min_version": (int,),
        "server_max_version": (int,), "presence": (list,), "health": (dict,),
    },
    "snapshot": {"state": (dict,)},
    "replay": {"seq": (int,), "event": (dict,)},
    "server_request": {"request": (dict,)},
    "response": {"status": (str,)},
    "aborted": {},
    "no_active_turn": {},
    "server_reply_ack": {"request_id": (str,)},
    "left": {},
    "ping": {},
    "pong": {},
    "error": {"code": (str,), "message": (str,)},
    "hello_error": {"code": (str,), "message": (str,), "next_step": (str,)},
}  # fmt: skip
"""Every frame of the gateway, with the fields that its client relies on. Others may be there."""

_EVENT: Shape = {
    "type": (str,), "data": (dict,), "event_id": (str,), "timestamp": _NUMBER, "source": (str,), "target": (str,),
    "sequence": (int,),
}  # fmt: skip
_STATE: Shape = {
    "session_id": (str,), "agent_id": (str,), "state": (dict,), "messages": (list,), "events": (list,),
    "event_cursor": (int,),
}  # fmt: skip
_REPLIES = ("response", "aborted", "no_active_turn", "server_reply_ack", "pong", "error")


def _check(fields: dict[str, Any], shape: Shape, where: str) -> None:
    for name, kinds in shape.items():
        if type(fields.get(name)) not in kinds:
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise Untyped(f"field {where + name!r}: expected {expected}, got {fields.get(name)!r}")


class Judge1(Judge):
    """Version 1 on one connection. An opening may be refused and tried again; nothing comes in arrays."""

    version = 1

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(ledger)
        self._dialect = Praison()
        self._openings = 0
        self._refusals = 0
        self._opening: dict[str, Any] = {}
        self._welcomed = False
        self._sequence = 0
        self._left_early = False

    @property
    def met(self) -> bool:
        return not self.asked or self.ending or self._welcomed or self._refusals >= self._openings

    @property
    def welcomed(self) -> bool:
        return self._welcomed

    @property
    def owed(self) -> int:
        if self.ending or self._left:
            return 0
        if not self.met:
            return 1
        return max(0, self._due - self._answers) if self._welcomed else 0

    @staticmethod
    def input_of(fields: dict[str, Any]) -> str | None:
        event = fields.get("event", {})
        if event.get("type") == "response" and event["data"].get("status") == "accepted":
            return str(event["data"].get("request_id"))
        return None

    @staticmethod
    def names_of(fields: dict[str, Any]) -> dict[str, Any]:
        event = fields.get("event", {})
        data = fields.get("request") or event.get("data") or {}
        if event.get("type", fields["type"]) == "server_request" and isinstance(data.get("request_id"), str):
            return {"ask": data["request_id"]}
        return {}

    def sent(self, raw: bytes) -> None:
        if self.ending:
            return
        self.asked = True
        if not self._welcomed:
            # More may be on its way before the answer is here: which text it was that opened is not known then.
            self._openings += 1
            try:
                self._opening = codec.read_object(codec.parse_json(raw))[1]
            except FrameError:
                self._opening = {}
            self._maybe += 1
            self._left_early |= self._opening.get("type") == "leave"
            return
        for frame in self._dialect.decode(raw):
            if isinstance(frame, m.Leave):
                self.ending = True
            elif isinstance(frame, FrameError) or type(frame) in ANSWERS:
                self._due += 1

    def _frame(self, fields: dict[str, Any]) -> None:
        kind = fields["type"]
        if kind not in SHAPES:
            raise Untyped(f"the gateway has no frame of type {kind!r}")
        _check(fields, SHAPES[kind], "")
        if self._left:
            raise Untyped("a frame behind the last one")
        if kind in ("hello_ok", "joined"):
            self._on_opened(fields)
        elif kind in ("hello_error", "error") and not self._welcomed:
            self._on_error(fields)
            self._refusals += 1
        elif not self._welcomed:
            raise Untyped("expected the answer to the opening first")
        elif kind == "replay":
            self._on_replay(fields)
        elif kind == "snapshot":
            _check(fields["state"], _STATE, "state.")
            cursor = fields["state"]["event_cursor"]
            if cursor < self.cursor.cursor and not self._snapshot_due:
                raise OutOfOrder(f"a snapshot of {cursor} at cursor {self.cursor.cursor}")
            self.cursor = CursorTracker(cursor)
            self._snapshot_due = False
        elif kind == "left":
            if not self.ending and not self._left_early:
                raise Untyped("left, without a leave")
            self._left = True
        elif kind in _REPLIES:
            if kind == "error":
                self._on_error(fields)
            self._answers += 1
            if self._answers > self._due + self._maybe:
                raise Untyped("an answer to nothing")

    def _on_error(self, fields: dict[str, Any]) -> None:
        if not fields["code"] or not fields["message"]:
            raise Untyped("an error without a code or message")
        if fields["code"] == "internal":
            raise Internal(fields["message"])

    def _on_opened(self, fields: dict[str, Any]) -> None:
        if self._welcomed or not self.asked:
            raise Untyped("opened twice, or without an opening")
        self._welcomed = True
        if fields.get("protocol", fields.get("protocol_version")) != self.version:
            raise Untyped(f"expected version {self.version}")
        since = self._opening.get("since") or 0
        resync = fields.get("resync_required", False)
        if self._openings == 1 and not resync and fields["cursor"] != since:
            raise OutOfOrder(f"asked to continue after {since}, continues after {fields['cursor']}")
        if fields["cursor"] != fields["sequence"]:
            raise OutOfOrder("cursor and sequence must begin as one")
        self._snapshot_due = bool(resync)
        self._sequence = fields["sequence"]
        self.cursor = CursorTracker(fields["cursor"])

    def _on_replay(self, fields: dict[str, Any]) -> None:
        event = fields["event"]
        _check(event, _EVENT, "event.")
        if event["type"] not in EVENTS:
            raise Untyped(f"there is no event of type {event['type']!r}")
        if self._snapshot_due:
            raise OutOfOrder("an event before the snapshot that was promised")
        seq, data = fields["seq"], event["data"]
        if not seq == data.get("seq") == data.get("cursor"):
            raise OutOfOrder("seq, event.data.seq and event.data.cursor differ")
        if seq < self.cursor.cursor:
            raise OutOfOrder(f"an event of {seq} at cursor {self.cursor.cursor}")
        if event["sequence"] != self._sequence + 1:
            raise OutOfOrder(f"sequence {event['sequence']} after {self._sequence}: its client reports a gap")
        self._sequence += 1
        self.cursor = CursorTracker(seq)
