"""What must hold on every connection of dialect 1, as `rules` has it for version 2 (PROTOCOL section 10)."""

from __future__ import annotations

from typing import Any

from gateway.testing.rules import Frame, RuleBroken

OPENINGS = ("hello_ok", "joined")


class PraisonObserver:
    """One connection's stream, judged frame by frame."""

    def __init__(self) -> None:
        self.cursor = 0
        self.joined = False
        self._sequence = 0
        self._tokens: dict[str, list[str]] = {}

    def text(self, turn_id: str, channel: str) -> str:
        """The tokens of a turn so far; it has no other channel."""
        return "".join(self._tokens.get(turn_id, ()))

    def pieces(self, turn_id: str, channel: str) -> int:
        """How many tokens that were."""
        return len(self._tokens.get(turn_id, ()))

    def sent(self, request_id: str) -> None:
        """A message goes out; its answer and its turn are not ordered here."""

    def received(self, frame: Any, size: int) -> None:
        """Judge one frame.

        Raises:
            RuleBroken: it may not come, not like this, or not now.
        """
        if not isinstance(frame, dict) or not isinstance(frame.get("type"), str):
            raise RuleBroken("1.3", "expected a JSON object with a string `type`")
        tag = frame["type"]
        if not self.joined and tag not in (*OPENINGS, "hello_error", "error"):
            raise RuleBroken("3.1", f"{tag} came before the answer to the opening")
        if tag in OPENINGS:
            if self.joined:
                raise RuleBroken("3.1", "a second answer to the opening")
            self.joined = True
            self.cursor, self._sequence = frame["cursor"], frame["sequence"]
            if self.cursor != self._sequence:
                raise RuleBroken("10.2", f"cursor {self.cursor} and sequence {self._sequence} differ at the opening")
        elif tag == "snapshot":
            self.cursor = frame["state"]["event_cursor"]
        elif tag == "replay":
            self._event(frame)

    def _event(self, frame: Frame) -> None:
        event = frame["event"]
        data = event["data"]
        if not frame["seq"] == data["seq"] == data["cursor"]:
            raise RuleBroken("10.4", f"one event, several numbers: {frame['seq']}, {data['seq']}, {data['cursor']}")
        if event["sequence"] != self._sequence + 1:
            raise RuleBroken("10.5", f"sequence {event['sequence']} after {self._sequence}")
        if frame["seq"] < self.cursor:
            raise RuleBroken("10.5", f"the cursor goes back from {self.cursor} to {frame['seq']}")
        self._sequence, self.cursor = event["sequence"], frame["seq"]
        turn_id = data.get("turn_id", "")
        if event["type"] == "token_stream":
            self._tokens.setdefault(turn_id, []).append(data["content"])
        elif event["type"] == "response" and data.get("status") == "final" and data.get("offset") == 0:
            tokens = self.text(turn_id, "answer")
            if tokens and not data["content"].endswith(tokens):
                raise RuleBroken("10.6", f"the response {data['content'][:80]!r} is not what the tokens said")
