"""The model of a client of dialect 1: what it may see of a session's `gateway.testing.model.History`.

Such a client knows a cursor and nothing else: no epochs, no turns it could look into. What it gets for each event of
the log is in `gateway.protocol.praison_events`; that single frames are well formed and counted is for `Judge1` to say.
"""

from __future__ import annotations

from collections.abc import Iterator

from attrs import define, field

from gateway.testing.invariants import invariant
from gateway.testing.model import History, Json

KINDS = {
    "typing": "turn_started",
    "server_request": "ask",
    "server_request_closed": "answered",
    "message_nack": "withdrawn",
    "session_update": "state",
    "tool_call_stream": "tool_call",
    "tool_result_stream": "tool_result",
    "custom": "custom",
}
"""Wrapped events that stand for one event of the log, under its number."""

SAME: dict[str, dict[str, str]] = {
    "input": {"content": "content", "request_id": "request_id", "sender": "sender"},
    "turn_started": {"turn_id": "turn_id", "request_ids": "request_ids", "attempt": "attempt"},
    "ask": {"request_id": "ask_id", "turn_id": "turn_id"},
    "answered": {"request_id": "ask_id", "value": "value", "outcome": "outcome"},
    "withdrawn": {"request_id": "request_id", "reason": "reason"},
    "state": {"patch": "patch"},
    "custom": {"name": "name", "data": "data"},
    "tool_result": {"result": "result", "is_error": "is_error"},
    "tool_call": {"turn_id": "turn_id"},
}
"""By event of the log: the field of a wrapped event's data, and the event's own that it must equal."""

FAR = 1 << 62

VOLATILE = ("token_stream", "reasoning_stream", "channel_stream", "tool_progress_stream")


def answer(history: History, turn_id: str, seq: int) -> str:
    """A turn's answer at the response of number `seq`: its outputs since the response before."""
    parts: list[str] = []
    for event in history.log:
        if event["seq"] > seq:
            break
        if event["type"] != "output" or event["turn_id"] != turn_id or event["channel"] != "answer":
            continue
        parts.append(event["content"])
        metadata = event["metadata"]
        if event["seq"] < seq and not metadata.get("more") and not metadata.get("partial"):
            parts = []
    return "".join(parts)


@define(eq=False)
class PraisonView:
    """What one client of dialect 1 knows of one session. `history` is the epoch that its connection is in.

    Attributes:
        tokens: by turn, the text streamed since its last response, over all connections.
        whole: turns of which no token may be missing or come twice.
        begun: turns that were seen from their start on.
        window: how many durable events the gateway keeps; deltas before them are forgotten.
    """

    name: str
    window: int = FAR
    history: History | None = None
    live: History | None = None
    cursor: int = 0
    turn: str | None = None
    tokens: dict[str, str] = field(factory=dict)
    whole: set[str] = field(factory=set)
    begun: set[str] = field(factory=set)
    outputs: dict[tuple[str, str], dict[int, str]] = field(factory=dict)
    """Nothing: responses are checked as they come."""
    events: int = 0
    snapshots: int = 0
    _memory: object = None
    _marked_from: int = 0

    def text(self, turn_id: str, channel: str) -> str:
        """What was streamed of a turn's answer since its last response."""
        return self.tokens.get(turn_id, "") if channel == "answer" else ""

    def lost(self) -> None:
        """The connection is gone."""

    def joined(self, frame: Json, history: History, memory: object, marked_from: int) -> None:
        """A `hello_ok` or `joined`.

        Args:
            memory: what remembers how answers were streamed; another one after a rest.
            marked_from: it does so for turns above this number, since somebody of dialect 1 is there.
        """
        if memory is None or memory is not self._memory:
            self.whole = set()
        self._memory, self._marked_from = memory, marked_from
        self.live = history
        if history is not self.history:
            if self.history is not None and self in self.history.clients:
                self.history.clients.remove(self)
            history.clients.append(self)
            # It has no idea of epochs: it is trusted on its cursor, and cannot know what it does not have.
            self.history, self.turn, self.tokens, self.whole, self.begun = history, None, {}, set(), set()
        self.cursor = frame["cursor"]

    def snapshot(self, state: Json) -> None:
        """A `snapshot`."""
        assert self.history is not None
        praison_snapshots_tell_the_session(state, self.history)
        self.snapshots += 1
        self.cursor = state["event_cursor"]
        self.turn = self.history.until(self.cursor).turn
        self.tokens, self.whole, self.begun = {}, set(), set()

    def replay(self, frame: Json) -> None:
        """A numbered frame."""
        history = self.history
        assert history is not None
        seq, event = frame["seq"], frame["event"]
        kind, data = event["type"], event["data"]
        praison_skips_nothing(self, seq)
        praison_is_what_was_stored(history, seq, kind, data)
        praison_belongs_to_the_running_turn(self, kind, data)
        self.cursor = seq
        self.events += 1
        turn_id = data.get("turn_id") or ""
        if kind == "typing":
            self.turn = turn_id
            self.tokens[turn_id] = ""
            self.begun.add(turn_id)
            if seq > self._marked_from:
                self.whole.add(turn_id)
        elif kind == "token_stream":
            self.tokens[turn_id] = self.tokens.get(turn_id, "") + data["content"]
            tokens_are_what_the_agent_wrote(history, turn_id, self.tokens[turn_id])
        elif kind == "response" and data["status"] == "final":
            responses_are_the_whole_answer(history, seq, data)
            tokens_make_up_the_response(self, seq, data)
            self.tokens[turn_id] = ""
        if history.by_seq.get(seq, {}).get("type") == "turn_ended":
            self.turn = None


@invariant(13)
def praison_skips_nothing(client: PraisonView, seq: int) -> Iterator[str]:
    """Dialect 1: no durable event lies between a client's cursor and what comes next; nothing older comes again."""
    assert client.history is not None
    if seq < client.cursor:
        yield f"{seq} comes at cursor {client.cursor}"
    for missing in reversed(client.history.log):
        if missing["seq"] <= client.cursor:
            break
        if missing["seq"] < seq:
            yield f"{missing['type']} {missing['seq']} is skipped by {seq}, the cursor was {client.cursor}"


@invariant(6, 14)
def praison_is_what_was_stored(history: History, seq: int, kind: str, data: Json) -> Iterator[str]:
    """Dialect 1: what is shown was stored before, and says the same; streamed text has a reserved number."""
    stored = history.by_seq.get(seq)
    if kind == "response" and data["status"] == "accepted":
        wanted: tuple[str, ...] = ("input",)
    elif kind == "response":
        wanted = ("output", "turn_ended")
    elif kind in KINDS:
        wanted = (KINDS[kind],)
    elif kind in ("error", "stream_end"):  # before the response that has the end's number, or under it
        ends = [item for item in (stored, history.by_seq.get(seq + 1)) if item and item["type"] == "turn_ended"]
        if not any(item["turn_id"] == data["turn_id"] for item in ends):
            yield f"{kind} {seq} of {data['turn_id']} is not about the end of a turn"
        return
    else:
        if kind not in VOLATILE:
            yield f"{kind} {seq} is unknown"
        if stored is None and seq > history.reserved:
            yield f"{kind} {seq} is shown, numbers are reserved up to {history.reserved}"
        return
    if stored is None or stored["type"] not in wanted:
        yield f"{kind} {seq} is shown, stored is {stored}"
        return
    for name, own in SAME.get(stored["type"], {}).items():
        if name in data and data[name] != stored[own]:
            yield f"{kind} {seq} says {name} {data[name]!r}, stored is {stored[own]!r}"


@invariant(1, 9, 17)
def praison_belongs_to_the_running_turn(client: PraisonView, kind: str, data: Json) -> Iterator[str]:
    """Dialect 1: what a turn says comes between its start and its end."""
    turn_id = data.get("turn_id")
    if kind == "typing":
        if client.turn is not None:
            yield f"{turn_id} starts while {client.turn} runs"
    elif turn_id is not None and client.turn is not None and turn_id != client.turn:
        yield f"{kind} of {turn_id} while {client.turn} runs"


@invariant(4, 9, 17)
def tokens_are_what_the_agent_wrote(history: History, turn_id: str, text: str) -> Iterator[str]:
    """Dialect 1: streamed text is what the agent wrote on that channel, in that order, each word once."""
    work = history.work.get(turn_id)
    if work is None:
        return
    places = {word.text: i for i, word in enumerate(work.channels.get("answer", []))}
    newest = -1
    for text_word in text.split():
        place = places.get(text_word)
        if place is None:
            yield f"{text_word!r} was not written by {turn_id}"
            return
        if place <= newest:
            yield f"{text_word!r} of {turn_id} comes again, or too late"
        newest = place


@invariant(4, 13)
def responses_are_the_whole_answer(history: History, seq: int, data: Json) -> Iterator[str]:
    """Dialect 1: the final response has the whole answer from its `offset` on, or says that it has not."""
    whole, content = answer(history, data["turn_id"], seq), data["content"]
    if data["offset"] is None or data.get("truncated"):
        if not whole.endswith(content):
            yield f"response {seq} is said to be truncated, and is no end of the answer: {content[-60:]!r}"
    elif whole[data["offset"] :] != content:
        yield f"response {seq} says {content[-60:]!r}, the answer is {whole[-60:]!r}"


@invariant(4, 13)
def tokens_make_up_the_response(client: PraisonView, seq: int, data: Json) -> Iterator[str]:
    """Dialect 1: tokens join up to the response, wherever the line was cut; once it is not known any more how an
    answer was streamed (its session left memory) there are no more of them, and the response has it all."""
    assert client.history is not None
    turn_id = data["turn_id"]
    work = client.history.work.get(turn_id)
    if turn_id not in client.begun or work is None or any(word.final for word in work.channels.get("answer", [])):
        return  # its start was in a snapshot; or the agent stated something else than it streamed
    said, whole = client.tokens.get(turn_id, ""), answer(client.history, turn_id, seq)
    if client.history.by_seq[seq].get("outcome") == "lost" and said.startswith(whole):
        return  # a crash takes text that was not stored, seen or not
    if not whole.startswith(said):
        yield f"{client.name} was streamed {said[-60:]!r} of {turn_id}, the answer is {whole[-60:]!r}"
    begun = next(e["seq"] for e in client.history.log if e.get("turn_id") == turn_id)
    kept = sum(begun <= event["seq"] <= seq for event in client.history.log) < client.window
    if kept and turn_id in client.whole and said != whole:
        yield f"{client.name} was streamed {len(said)} of {len(whole)} characters of {turn_id}, nothing was forgotten"


@invariant(13, 14)
def praison_snapshots_tell_the_session(state: Json, history: History) -> Iterator[str]:
    """Dialect 1: a snapshot has the state and the newest inputs as of its cursor, all or it says so."""
    cursor = state["event_cursor"]
    fold = history.until(cursor)
    if state["state"] != fold.state:
        yield f"at {cursor} its state is {state['state']}, the log's {fold.state}"
    inputs = [event for event in history.log if event["type"] == "input" and event["seq"] <= cursor]
    said = [item for item in state["messages"] if "request_id" in item["metadata"]]
    newest = inputs[len(inputs) - len(said) :]
    if [(item["metadata"]["request_id"], item["content"]) for item in said] != [
        (event["request_id"], event["content"]) for event in newest
    ]:
        yield f"at {cursor} its inputs are not the newest of the log"
    if len(said) < len(inputs) and not state["truncated"]:
        yield f"at {cursor} it has {len(said)} of {len(inputs)} inputs and does not say so"
