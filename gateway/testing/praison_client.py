"""A client of dialect 1 in a simulated world: it does what `RawClient` does, in PraisonAI's words."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from gateway.testing.actors import Link, RawClient, Wire, _brief
from gateway.testing.judge import Ledger, ServerFailure
from gateway.testing.judge1 import Judge1
from gateway.testing.model import Json, Violation
from gateway.testing.model1 import PraisonView
from gateway.transport.dial import ClientSocket

if TYPE_CHECKING:
    from gateway.testing.world import World

REFUSALS = ("inbox_full", "busy", "draining", "unavailable", "rate_limited", "request_id_conflict")
"""What a message may be answered with."""


class PraisonClient(RawClient):
    """Version 1. `joins`: it opens with the older `join` instead of `hello`."""

    model: PraisonView  # type: ignore[assignment]

    def __init__(self, world: World, name: str, session_id: str, subject: str, *, joins: bool = False) -> None:
        super().__init__(world, name, session_id, subject)
        self.model = PraisonView(name, world.limits.replay_max_events)
        self._joins = joins
        self._judge = Judge1(Ledger())
        self._histories = world.histories

    def connect(self, link: Link, lifetime: int = 0) -> None:
        """See `RawClient.connect`; its tokens last for ever, as it cannot show another."""
        self._judge = Judge1(Ledger())
        # The one that a process has; what a disk turns out to have lost is another.
        self._histories = self.world.histories
        super().connect(link)

    def _hello(self, wire: Wire) -> Json:
        common = {"agent_id": "agent", "session_id": self.session_id, "since": wire.since, "token": self.subject}
        if self._joins:
            return {"type": "join", **common}
        return {"type": "hello", "protocol_min": 1, "protocol_max": 1, **common}

    async def _transmit(self, ws: ClientSocket, wire: Wire, frame: Json) -> None:
        raw = json.dumps(frame).encode()
        if wire is self.wire:
            self._judge.sent(raw)
        await ws.send(raw)

    def _receive(self, wire: Wire, raw: bytes) -> None:
        try:
            self._judge.received(raw)
        except ServerFailure as failure:
            raise Violation("dialect_1_is_kept", (13, 14, 20), f"{self.name}: {failure}") from None
        super()._receive(wire, raw)

    # what it is told to do

    def send(self, script: str, on_busy: str = "queue", again: bool = False, conflict: bool = False) -> None:
        """See `RawClient.send`; there is no other mode than to queue."""
        super().send(script, "queue", again, conflict)

    def resend(self, frame: Json) -> None:
        super().resend({**frame, "on_busy": "queue"})

    def _push(self, frame: Json, key: str = "", content: str = "") -> bool:
        if frame["type"] == "message":
            frame = {name: value for name, value in frame.items() if name != "on_busy"}
        return super()._push(frame, key, content)

    def abort(self, scope: str = "turn", newest: bool = False) -> None:
        """Stop the turn, or all."""
        if self.model.live is not None and self.joined:
            self.model.live.causes["abort"] += 1
            self._push({"type": "abort", "scope": "turn" if scope == "turn" else "session"}, scope)

    def answer(self, value: Any) -> None:
        history = self.model.history
        if history is not None:
            asks = history.until(self.model.cursor).asks
            ask_id = asks[0] if asks else "none"
            self._push({"type": "server_reply", "request_id": ask_id, "value": value}, ask_id)

    def say(self, kind: str) -> None:
        """``ping``, ``leave``, or ``stop``: the command as a message."""
        if kind in ("ping", "leave"):
            super().say(kind)
        elif kind == "stop" and self.model.live is not None and self.joined:
            self.model.live.causes["abort"] += 1
            self._push({"type": "message", "content": "/stop"})
            if self.wire is not None:
                self.wire.pending[-1].kind = "abort"

    # what it gets

    def _take(self, wire: Wire, frame: Json) -> None:
        kind, model = frame["type"], self.model
        if kind != "ping":
            self._note(f"<- {_brief(frame)}")
        if kind in ("hello_ok", "joined"):
            history = self._histories.get(self.session_id)
            if history is None:
                raise Violation("numbers_belong_to_a_history", (14,), f"{self.name} joined what is not stored")
            model.joined(frame, history, *self.world.marks_of(self.session_id, history.head))
            wire.joined = True
        elif not wire.joined and kind in ("hello_error", "error"):
            wire.refused = True
            if frame["next_step"] != "wait_then_retry":
                raise Violation("well_behaved_clients_are_served", (20,), f"{self.name} is refused: {frame}")
        elif kind == "snapshot":
            model.snapshot(frame["state"])
        elif kind == "replay":
            model.replay(frame)
        elif kind == "response":
            self._accepted(wire, frame)
        elif kind in ("aborted", "no_active_turn"):
            self._answered(wire, "abort")
        elif kind == "server_reply_ack":
            self._answered(wire, "server_reply", frame["request_id"])
        elif kind in ("pong", "left"):
            self._answered(wire, "ping" if kind == "pong" else "leave")
        elif kind == "error":
            self._refused(wire, frame)
        elif kind == "ping":
            self._push({"type": "pong"})
        elif kind != "server_request":
            raise Violation("only_known_frames", (20,), f"{self.name} got {frame}")

    def _accepted(self, wire: Wire, frame: Json) -> None:
        """Its `response` has no number: that the input is stored is all that can be checked."""
        request_id = frame["request_id"]
        history = self.model.live
        assert history is not None
        stored = [e["content"] for e in history.log if e["type"] == "input" and e["request_id"] == request_id]
        item = self._answered(wire, "message", request_id, lambda item: item.content not in stored)
        if item.content not in stored:
            raise Violation("accepted_is_stored", (6,), f"{request_id} is {frame['status']}, stored is {stored}")
        self.unanswered.pop(request_id, None)

    def _refused(self, wire: Wire, frame: Json) -> None:
        code, request_id = frame["code"], frame.get("request_id")
        if request_id is not None and code in REFUSALS:
            conflict = code == "request_id_conflict"
            admitted = self._admitted(wire, request_id)
            item = self._answered(wire, "message", request_id, lambda item: conflict and item.content == admitted)
            self._check_refused(request_id, item, code)
        elif code == "invalid_frame" and "'value'" in frame["message"]:
            self._answered(wire, "server_reply")
        elif code == "rate_limited":
            self._answered(wire, "abort")
        else:
            raise Violation("every_reply_has_its_request", (6,), f"{self.name} got {frame}")
