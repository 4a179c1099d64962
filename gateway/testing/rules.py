"""What must hold on every connection whatever a dialogue is about: the rules of PROTOCOL sections 3 to 6 that a client
can check by itself. `Observer` is fed everything that one connection receives; it keeps the cursor by them.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from gateway.errors import FrameError
from gateway.protocol import codec
from gateway.protocol import messages as m

Frame = dict[str, Any]

VOLATILE = frozenset(tag for tag, cls in m.EVENTS.items() if cls.volatile)
DROPPABLE = frozenset(tag for tag, cls in m.SERVER_FRAMES.items() if cls.droppable)


class RuleBroken(Exception):
    """The gateway did what it must never do. `clause` is the number in ``docs/reference/clauses.md``."""

    def __init__(self, clause: str, message: str) -> None:
        super().__init__(f"clause {clause}: {message}")
        self.clause = clause


class Observer:
    """One connection's stream, judged frame by frame.

    Invariant: `cursor` only moves forward, but for a snapshot of another epoch.
    """

    def __init__(self) -> None:
        self.cursor = 0
        self.joined = False
        self._refused = False
        self._awaits_snapshot = False
        self._max_bytes = 0
        self._unanswered: set[str] = set()
        self._running: str | None = None
        self._ended: set[str] = set()
        self._knows_turns = True
        """Whether the stream was followed from a place where the running turn was known."""
        self._whole: set[str] = set()
        """Turns of which nothing is missing here, so that their text can be held against their output."""
        self._sealed: dict[tuple[str, str], str] = {}
        self._tail: dict[tuple[str, str], str] = {}
        self._pieces: Counter[tuple[str, str]] = Counter()

    def text(self, turn_id: str, channel: str) -> str:
        """What the turn has said on the channel so far."""
        key = turn_id, channel
        return self._sealed.get(key, "") + self._tail.get(key, "")

    def pieces(self, turn_id: str, channel: str) -> int:
        """In how many deltas and outputs that came."""
        return self._pieces[turn_id, channel]

    def sent(self, request_id: str) -> None:
        """Note a message that the client sends for the first time; a repetition may be answered behind its turn."""
        self._unanswered.add(request_id)

    def received(self, frame: Any, size: int) -> None:
        """Judge one frame; `size` is that of its text message, in bytes.

        Raises:
            RuleBroken: it may not come, not like this, or not now.
        """
        if not isinstance(frame, dict) or not isinstance(frame.get("type"), str):
            raise RuleBroken("1.3", "expected a JSON object with a string `type`")
        tag = frame["type"]
        if tag not in m.EVENTS and tag not in m.SERVER_FRAMES:
            raise RuleBroken("6.1", f"{tag!r} is no type of this protocol")
        try:
            codec.structure(frame, (m.EVENTS.get(tag) or m.SERVER_FRAMES[tag]))
        except FrameError as exc:
            raise RuleBroken("1.6", f"{tag}: {exc.message}") from None
        if not self.joined and tag not in ("hello_ok", "hello_error", "goaway"):
            raise RuleBroken("3.1", f"{tag} came before hello_ok or hello_error")
        if self._max_bytes and size > self._max_bytes:
            raise RuleBroken("4.13", f"{size:,} bytes in one message; policy.max_frame_bytes is {self._max_bytes:,}")
        if tag == "hello_ok":
            self._hello_ok(frame)
        elif tag == "hello_error":
            self._refused = True
        elif tag == "snapshot":
            self._snapshot(frame)
        elif tag in ("accepted", "error"):
            self._unanswered.discard(frame.get("request_id") or "")
        elif tag in m.EVENTS:
            self._event(tag, frame)

    def _hello_ok(self, frame: Frame) -> None:
        if self.joined or self._refused:
            raise RuleBroken("3.1", "a second answer to hello")
        self.joined = True
        self.cursor = frame["cursor"]
        self._max_bytes = frame["policy"]["max_frame_bytes"]
        self._awaits_snapshot = frame["resync_required"]
        self._knows_turns = self.cursor == 0 and not frame["resync_required"]
        if frame["resync_required"] is (frame["resync_reason"] is None):
            raise RuleBroken("3.8", "resync_reason is there exactly when resync_required is true")
        if not frame["resync_required"] and not frame["oldest_cursor"] <= frame["cursor"] <= frame["head"]:
            raise RuleBroken("3.7", f"cursor {frame['cursor']} is not within oldest_cursor and head")

    def _snapshot(self, frame: Frame) -> None:
        if self._awaits_snapshot and frame["cursor"] != self.cursor:
            raise RuleBroken("3.6", f"hello_ok named cursor {self.cursor}, its snapshot {frame['cursor']}")
        self._awaits_snapshot = False
        self.cursor = frame["cursor"]
        turn = frame["turn"]
        self._knows_turns = True
        self._running = None if turn is None else turn["turn_id"]
        self._tail = {} if turn is None else {(turn["turn_id"], name): text for name, text in turn["channels"].items()}
        self._sealed = {}
        self._whole = set() if turn is None else {turn["turn_id"]}
        last = 0
        for event in frame["transcript"]:
            if not last < event["seq"] <= frame["cursor"]:
                raise RuleBroken("6.3", f"transcript: seq {event['seq']} after {last}, cursor {frame['cursor']}")
            last = event["seq"]
            if event["type"] == "output" and turn is not None and event["turn_id"] == turn["turn_id"]:
                key = event["turn_id"], event["channel"]
                self._sealed[key] = self._sealed.get(key, "") + event["content"]

    def _event(self, tag: str, frame: Frame) -> None:
        if self._awaits_snapshot:
            raise RuleBroken("3.10", f"{tag} came before the snapshot")
        seq, first = frame["seq"], frame["first"]
        if seq <= self.cursor:
            raise RuleBroken("4.2", f"{tag} {seq} was sent twice: the cursor is {self.cursor}")
        if not first <= seq or first > self.cursor + 1:
            raise RuleBroken("4.1", f"a gap: {tag} stands for {first} to {seq}, the cursor is {self.cursor}")
        self.cursor = seq
        turn_id = frame.get("turn_id")
        if tag == "turn_started":
            missing = self._unanswered & set(frame["request_ids"])
            if missing:
                raise RuleBroken("5.3", f"turn_started with {sorted(missing)} came before their accepted")
            if self._running is not None:
                raise RuleBroken("4.5", f"turn {turn_id} started while {self._running} runs")
            self._running, self._knows_turns = turn_id, True
            self._whole.add(frame["turn_id"])
        elif turn_id is not None:
            self._of_turn(tag, turn_id)
        if tag in ("delta", "output"):
            self._text(tag, frame)

    def _of_turn(self, tag: str, turn_id: str) -> None:
        if turn_id in self._ended or (self._knows_turns and turn_id != self._running):
            raise RuleBroken("4.6", f"{tag} of turn {turn_id}, which does not run")
        self._running, self._knows_turns = turn_id, True
        if tag == "turn_ended":
            self._ended.add(turn_id)
            self._running = None

    def _text(self, tag: str, frame: Frame) -> None:
        key = frame["turn_id"], frame["channel"]
        self._pieces[key] += 1
        if tag == "delta":
            self._tail[key] = self._tail.get(key, "") + frame["text"]
            return
        tail = self._tail.pop(key, "")
        if frame["turn_id"] in self._whole and not frame["content"].startswith(tail):
            raise RuleBroken(
                "4.3", f"output {frame['content'][:80]!r} does not contain what was streamed, {tail[:80]!r}"
            )
        self._sealed[key] = self._sealed.get(key, "") + frame["content"]
