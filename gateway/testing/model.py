"""A model of sessions and their clients, of plain lists: what was committed, what was seen, what the agent wrote.

Theory of operation
-------------------
`History` is one session as its store saw it: `log` is the list of all durable events ever committed, in order. Nothing
in it is ever removed, so it knows more than any gateway. `Client` is what one client has received. `Work` is what the
agent wrote in one turn. Whoever runs a gateway (a state machine, a simulation, a test) feeds these three from outside:

- `History.commit` with each batch that reaches the store,
- `Client.hello`, `Client.event`, `Client.snapshot` and `Client.accepted` with each frame as JSON, before anything else
  is done with it,
- `Work.say` with what the agent writes, before it does so, and `Work.ended` with how it ended.

What must be true of them is in `gateway.testing.invariants`. What is about a single frame is checked here, when the
frame arrives; the rest by `check_always` and `check_at_rest`. Everything is plain data without a clock: it holds for
the sans-I/O core as for a gateway in another process.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from attrs import define, field

from gateway.testing import invariants as that
from gateway.testing.invariants import Violation, check_always, check_at_rest

if TYPE_CHECKING:
    from gateway.testing.model1 import PraisonView

__all__ = ["Client", "Fold", "History", "Violation", "Word", "Work", "check_always", "check_at_rest"]

Json = dict[str, Any]


@define(eq=False)
class Word:
    """One thing the agent wrote to a channel: `text` as a piece (`final` False) or as an output (`final` True).

    `maybe`: its write raised, so it may or may not be there.
    """

    text: str
    final: bool = False
    maybe: bool = False


@define(eq=False)
class Work:
    """What the agent did in one turn, as far as it got. `ended` is how: ``returned``, ``raised`` or ``cancelled``."""

    turn_id: str
    request_ids: list[str]
    attempt: int = 1
    epoch: str = ""
    channels: dict[str, list[Word]] = field(factory=dict)
    answers: dict[str, Any] = field(factory=dict)
    """What `Turn.ask` returned, by prompt."""
    ended: str | None = None

    def say(self, channel: str, text: str, final: bool = False) -> Word:
        """Note a write, before it is made. Each text must be one word, unlike all others of the session."""
        word = Word(text, final)
        self.channels.setdefault(channel, []).append(word)
        return word


@define(eq=False)
class History:
    """One session, in one epoch.

    Attributes:
        log: every durable event committed, in order, as JSON without ``first``.
        reserved: the highest number that may be shown.
        sent: request id → the contents that clients have sent under it. modes: each `on_busy` they gave.
        told: request id → ``seq``, for each durable `accepted` that a client has got.
        work: what the agent did, by turn. Epochs of one session share it, as they share `sent`, `modes` and `causes`.
        causes: how often happened what may end a turn: ``abort``, ``interrupt``, ``crash``, ``failure``, ``drain``.
        max_turn_ms: how long a turn may run before it is ended as ``timed_out``.
        retries: whether a lost turn is tried again.
    """

    session_id: str
    epoch: str
    log: list[Json] = field(factory=list)
    reserved: int = 0
    max_turn_ms: int = 0
    retries: bool = False
    sent: dict[str, list[str]] = field(factory=dict)
    modes: dict[str, set[str]] = field(factory=dict)
    told: dict[str, int] = field(factory=dict)
    work: dict[str, Work] = field(factory=dict)
    causes: Counter[str] = field(factory=Counter)
    clients: list[Client | PraisonView] = field(factory=list)
    by_seq: dict[int, Json] = field(factory=dict)
    shown: dict[int, tuple[str, str]] = field(factory=dict)
    """Volatile events that somebody saw: ``seq`` → (type, turn)."""

    def commit(self, events: list[Json], reserved: int) -> None:
        """Note a transaction of the store."""
        that.never_used_again(self, events)
        for event in events:
            plain = {key: value for key, value in event.items() if key != "first"}
            self.log.append(plain)
            self.by_seq[plain["seq"]] = plain
        self.reserved = max(self.reserved, reserved)

    @property
    def head(self) -> int:
        """The number of the newest durable event."""
        return self.log[-1]["seq"] if self.log else 0

    def until(self, seq: int) -> Fold:
        """The session right after the event `seq`."""
        fold = Fold()
        for event in self.log:
            if event["seq"] > seq:
                break
            fold.apply(event)
        return fold

    def text(self, turn_id: str, channel: str) -> str:
        """All outputs of a turn on a channel, joined."""
        return "".join(
            event["content"]
            for event in self.log
            if event["type"] == "output" and event["turn_id"] == turn_id and event["channel"] == channel
        )


@define(eq=False)
class Fold:
    """What a session looks like after some of its durable events: the slow and obvious way."""

    queue: list[str] = field(factory=list)
    turn: str | None = None
    asks: list[str] = field(factory=list)
    state: Json = field(factory=dict)

    def apply(self, event: Json) -> None:
        kind = event["type"]
        if kind == "input":
            self.queue.append(event["request_id"])
        elif kind == "withdrawn":
            self.queue = [name for name in self.queue if name != event["request_id"]]
        elif kind == "turn_started":
            self.queue = [name for name in self.queue if name not in event["request_ids"]]
            self.turn = event["turn_id"]
        elif kind == "turn_ended":
            self.turn, self.asks = None, []
        elif kind == "ask":
            self.asks.append(event["ask_id"])
        elif kind == "answered":
            self.asks = [name for name in self.asks if name != event["ask_id"]]
        elif kind == "state":
            self.state = _merged(self.state, event["patch"])


def _merged(target: Any, patch: Any) -> Any:
    """RFC 7396, as its own pseudocode has it."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = _merged(result.get(key), value)
    return result


@define(eq=False)
class Client:
    """What one client knows of one session. `history` is the epoch it is in; None before its first `hello_ok`."""

    name: str
    history: History | None = None
    live: History | None = None
    """The epoch of the present connection; another one than `history` until the snapshot has come."""
    cursor: int = 0
    awaiting: int | None = None
    """The cursor that `hello_ok` promised for the snapshot that must come next."""
    turn: str | None = None
    """The turn that runs, as of `cursor`."""
    outputs: dict[tuple[str, str], dict[int, str]] = field(factory=dict)
    tails: dict[tuple[str, str], str] = field(factory=dict)
    whole: set[str] = field(factory=set)
    """Turns that were seen from their start on, so nothing of their text may be missing."""
    started: set[str] = field(factory=set)
    """Request ids seen in a `turn_started`."""
    events: int = 0
    snapshots: int = 0

    def text(self, turn_id: str, channel: str) -> str:
        """A channel's text: its outputs joined, then the deltas after the last."""
        key = turn_id, channel
        return "".join(self.outputs.get(key, {}).values()) + self.tails.get(key, "")

    def hello(self, frame: Json, history: History, since: int, epoch: str | None) -> None:
        """A `hello_ok`, the answer to a hello with `since` and `epoch`."""
        that.the_cursor_is_continued_or_resynced(frame, history, since, epoch)
        self.live = history
        if frame["resync_required"]:
            self.awaiting = frame["cursor"]
            return
        self.awaiting = None
        if history is not self.history:
            self._begin(history)

    def _begin(self, history: History) -> None:
        if self.history is not None and self in self.history.clients:
            self.history.clients.remove(self)
        history.clients.append(self)
        self.history = self.live = history
        self.cursor, self.turn = 0, None
        self.outputs, self.tails = {}, {}
        self.whole, self.started = set(), set()

    def lost(self) -> None:
        """The connection is gone."""
        self.awaiting = None

    def event(self, event: Json) -> None:
        """An event, as it was received."""
        assert self.history is not None
        that.covers(self, event)
        that.skips_nothing(self, event)
        that.is_what_was_stored(self, event)
        that.belongs_to_the_running_turn(self, event)
        self.cursor = event["seq"]
        self.events += 1
        self._apply(event)
        channel = event.get("channel")
        if channel is not None:
            that.says_what_the_agent_wrote(self, event["turn_id"], channel)
        elif event["type"] == "turn_ended":
            for turn_id, name in list(self.outputs):
                if turn_id == event["turn_id"]:
                    that.says_what_the_agent_wrote(self, turn_id, name)
            if event["outcome"] != "lost":
                that.leaves_nothing_out(self, event["turn_id"])

    def _apply(self, event: Json) -> None:
        kind = event["type"]
        key = event.get("turn_id") or "", event.get("channel") or ""
        if kind == "turn_started":
            self.turn = event["turn_id"]
            self.whole.add(self.turn)
            self.started.update(event["request_ids"])
        elif kind == "delta":
            self.tails[key] = self.tails.get(key, "") + event["text"]
        elif kind == "output":
            self.outputs.setdefault(key, {})[event["seq"]] = event["content"]
            self.tails.pop(key, None)
        elif kind == "turn_ended":
            self.turn = None
            self.tails = {}

    def snapshot(self, frame: Json, history: History) -> None:
        """A `snapshot`, as it was received; `history` is that of its epoch."""
        if self.awaiting is not None:
            that.snapshots_are_where_they_were_promised(self, frame)
        elif history is self.history:
            that.never_goes_back(self, frame)
        that.snapshots_tell_the_session_at_their_cursor(frame, history)
        if history is not self.history:
            self._begin(history)
        self.awaiting = None
        self.snapshots += 1
        self.cursor = frame["cursor"]
        self.outputs, self.tails = {}, {}
        for event in frame["transcript"]:
            if event["type"] == "output":
                self.outputs.setdefault((event["turn_id"], event["channel"]), {})[event["seq"]] = event["content"]
        turn = frame["turn"]
        self.turn = None if turn is None else turn["turn_id"]
        if frame["transcript_truncated"]:
            self.whole = set()
        else:
            self.whole = {event["turn_id"] for event in history.log if event["type"] == "turn_started"}
        if turn is not None:
            for channel, text in turn["channels"].items():
                self.tails[turn["turn_id"], channel] = text
                that.says_what_the_agent_wrote(self, turn["turn_id"], channel)

    def accepted(self, frame: Json, content: str) -> None:
        """An `accepted` for a message with `content`."""
        assert self.live is not None
        that.accepted_is_stored(self.live, frame, content)
        that.accepted_comes_before_its_turn(self, frame)
        if frame["durable"]:
            self.live.told[frame["request_id"]] = frame["seq"]
