"""A PraisonAI client as its own code behaves (0.1.16, `gateway.client`): what it keeps, and what it would report.

Written anew from reading that package, so that tests of the protocol core need neither it nor a socket. What an
application sees is kept beside it: the joined tokens, the final responses, and the other events.
"""

from __future__ import annotations

import json
from typing import Any

Frame = dict[str, Any]


class PraisonReader:
    """Feed it every text message of a connection with `take`, in order; the first one answers its opening."""

    def __init__(self) -> None:
        self.session_id: str | None = None
        self.cursor = 0
        self.expected = 0
        self.gaps: list[tuple[int, int]] = []
        self.tokens: dict[tuple[str, str], str] = {}
        self.finals: dict[str, list[Frame]] = {}
        self.inputs: list[str] = []
        self.events: list[Frame] = []
        """Wrapped events but for a repeated ``event_id``."""
        self.repeated: list[Frame] = []
        self.plain: list[Frame] = []
        """Every other frame."""
        self._ids: set[str] = set()

    def opening(self, **fields: Any) -> Frame:
        """Its next first frame."""
        hello: Frame = {"type": "hello", "agent_id": "echo", "protocol_min": 1, "protocol_max": 1}
        hello["capabilities"] = ["streaming", "ack"]
        if self.session_id is not None:
            hello["session_id"] = self.session_id
        if self.cursor > 0:
            hello["since"] = self.cursor
        return hello | fields

    def take(self, text: bytes | str) -> Frame:
        frame: Frame = json.loads(text)
        if frame["type"] in ("hello_ok", "joined"):
            self.session_id = frame["session_id"]
            self.cursor = frame.get("cursor", 0)
            self.expected = frame.get("sequence", 0) + 1
        elif frame["type"] == "replay":
            self._handle(frame["event"])
            assert frame["seq"] == frame["event"]["data"]["seq"] == frame["event"]["data"]["cursor"]
            return frame
        self.plain.append(frame)
        return frame

    def _handle(self, event: Frame) -> None:
        data = event["data"]
        if event["sequence"] != self.expected:
            self.gaps.append((self.expected, event["sequence"]))
        self.expected = event["sequence"] + 1
        assert data["cursor"] >= self.cursor, "a cursor goes forward"
        self.cursor = data["cursor"]
        if event["event_id"] in self._ids:
            self.repeated.append(event)
            return
        self._ids.add(event["event_id"])
        self.events.append(event)
        kind = event["type"]
        if kind in ("token_stream", "reasoning_stream", "channel_stream"):
            channel = {"token_stream": "answer", "reasoning_stream": "reasoning"}.get(kind) or data["channel"]
            key = data["turn_id"], channel
            self.tokens[key] = self.tokens.get(key, "") + data["content"]
        elif kind == "response" and data["status"] == "final":
            self.finals.setdefault(data["turn_id"], []).append(data)
        elif kind == "response":
            assert data["status"] == "accepted"
            self.inputs.append(data["content"])
