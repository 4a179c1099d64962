"""A turn, as an agent sees it: what it was asked, and everything it can say while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from math import inf
from typing import TYPE_CHECKING, Any

import trio
from attrs import define, field

from gateway.errors import TurnClosed, TurnLimitExceeded
from gateway.protocol import codec
from gateway.protocol.messages import (
    TRANSCRIPT_EVENTS,
    Answered,
    Ask,
    AskKind,
    AskOutcome,
    Custom,
    ErrorInfo,
    Event,
    Input,
    Output,
    Progress,
    State,
    ToolCall,
    ToolResult,
    TurnStarted,
    Withdrawn,
)
from gateway.protocol.patch import merge_patch
from gateway.session.stack import WAKE, check_stack

if TYPE_CHECKING:
    from gateway.session.inbox import QueuedInput
    from gateway.session.publisher import Text
    from gateway.session.session import Session

PIECE = 16 * 1024
"""Characters in one delta at most: at most 64 KiB of UTF-8, so a merged delta can always hold it."""

YIELD_EVERY = 32
"""Sends between two checkpoints when the outbox has room: a checkpoint costs as much as four sends, and 32 sends are
below 0.1 ms, so nobody else is kept waiting."""

NUMBERS = 64
"""Bytes that `seq`, `first` and `at` may add to an event between here and the wire."""

LONGEST_ASK = 1e9
"""Seconds; what is longer is for ever, and has no place in an integer of milliseconds."""

MAX_NAME = 256
"""Characters in a name an agent gives: a tool, a call, a progress key, an event of its own."""


@define(eq=False)
class PendingAsk:
    """A question that waits. `outcome` is set the moment it is decided, `decided` once everyone can see it."""

    event: Ask
    decided: trio.Event = field(factory=trio.Event)
    outcome: AskOutcome | None = None
    value: Any = None

    def accepts(self, value: object) -> str | None:
        """None if `value` answers the question, else what was expected."""
        kind = self.event.kind
        if kind == "approval":
            return None if type(value) is bool else "expected true or false"
        if kind == "choice":
            options = self.event.options or []
            return None if any(_same(value, option) for option in options) else "expected one of the ask's options"
        return None if type(value) is str else "expected a string"


class Turn:
    """One run of an agent. The engine makes it; an agent gets it as its only argument.

    Every writing method waits while the outbox is full, is safe to cancel (the write then happened or did not, never
    half), and raises `TurnClosed` once the turn has ended, `TurnLimitExceeded` when a limit would be exceeded,
    `TypeError` for what is no text and `ValueError` when something has no JSON form; nothing was written then. What is
    handed in is copied: changing it later changes nothing.

    Attributes:
        inputs: the messages this turn answers, in order; more than one only with ``on_busy: "collect"``.
        session_id, turn_id: names on the wire. subject: who sent the first input.
        attempt: 1, or more when an earlier run was lost in a crash and the agent asked for retries.
    """

    def __init__(self, session: Session, turn_id: str, inputs: Sequence[Input], attempt: int) -> None:
        self.inputs = tuple(inputs)
        self.session_id = session.record.session_id
        self.turn_id = turn_id
        self.subject = inputs[0].sender
        self.attempt = attempt
        self._session = session
        self._older: Sequence[Event] = ()
        """Events before those that were in memory when the turn started. Of the turn's own none leaves memory."""
        self._limits = session.limits
        self._publisher = session.publisher
        self._outbox = session.publisher.outbox
        self._state = session.view.state
        self._state_lock: trio.Lock | None = None
        self._channels: set[str] = set()
        self._progress: dict[str, int] = {}
        self._written = 0
        self._unyielded = 0
        # For the engine: see `Session._go_on`.
        self._running = False
        self._closed = False
        self._discarded = False
        self._agents: trio.Nursery | None = None
        self._deadline = self._max_deadline = inf
        self._started = False
        self._stop_reason: str | None = None
        self._result: str | None = None
        self._failure: ErrorInfo | None = None
        self._asks: dict[str, PendingAsk] = {}
        self._steer: list[QueuedInput] = []
        self._on_ended: list[Callable[[], None]] = []

    # what it was asked

    @property
    def input(self) -> Input:
        """The first (and usually only) input."""
        return self.inputs[0]

    @property
    def transcript(self) -> tuple[Event, ...]:
        """The conversation so far, oldest first: all of this turn, and before it at least half of
        ``limits.tail_max_bytes``, as far as there is so much.

        Consists of `Input`, `Output`, `ToolCall`, `ToolResult`, `Answered` and `TurnEnded` events. An input stands
        where its turn started (or took it in, if it was `steered`), not where it was sent: each answer follows its
        question, and when this turn starts its own inputs are last. What waits or was withdrawn is not part of it.
        """
        own = {item.request_id for item in self.inputs}
        waiting: dict[str, Input] = {}
        result: list[Event] = []
        for event in chain(self._older, self._session.log):
            if isinstance(event, Input):
                waiting[event.request_id] = event
            elif isinstance(event, TurnStarted):
                if event.turn_id == self.turn_id:
                    result += self.inputs
                else:  # of an earlier attempt at this turn, perhaps
                    taken = [request_id for request_id in event.request_ids if request_id not in own]
                    result += [waiting.pop(request_id) for request_id in taken if request_id in waiting]
            elif isinstance(event, Withdrawn):
                withdrawn = waiting.pop(event.request_id, None)
                if withdrawn is not None and event.reason == "steered":
                    result.append(withdrawn)
            elif isinstance(event, TRANSCRIPT_EVENTS):
                result.append(event)
        return tuple(result)

    @property
    def state(self) -> dict[str, Any]:
        """The session's state, this turn's own changes included. Change it with `update_state`, not in place."""
        return self._state

    def steered(self) -> list[Input]:
        """Take the inputs that clients handed to this running turn (``on_busy: "steer"``); never waits.

        An input taken here is done with: the log says so with a `withdrawn` event, reason ``steered``. What is not
        taken when the turn ends is queued as a turn of its own.
        """
        check_stack(WAKE)
        self._check_open()
        return self._session.take_steered(self)

    # what it can say

    async def send(self, text: str, channel: str = "answer") -> None:
        """Stream a piece of text; it may be of any length.

        It is not a checkpoint every time: it only waits when the outbox is full or after some writes without a pause.
        """
        self._unyielded += 1
        if self._unyielded >= YIELD_EVERY or self._closed or self._stop_reason is not None:
            await self._enter()
        if channel not in self._channels:
            self._add_channel(channel)
        if not isinstance(text, str):
            raise TypeError(f"text: expected str, not {type(text).__name__}")
        size = len(text) if text.isascii() else _utf8_size(text)
        self._written += size
        if self._written > self._limits.max_turn_bytes:
            self._charge(0)
        if size > PIECE:
            for i in range(0, len(text), PIECE):
                await self._put((self.turn_id, channel, text[i : i + PIECE]))
        elif size:
            try:
                self._outbox.send_nowait((self.turn_id, channel, text))
            except (trio.WouldBlock, trio.BrokenResourceError):
                await self._put((self.turn_id, channel, text))
                self._unyielded = 0
            else:
                publisher = self._publisher
                if not publisher.dirty:
                    # Somebody came by, so others ran since the last time. After the call: one that fails is no pause.
                    publisher.mark()
                    self._unyielded = 0

    async def reason(self, text: str) -> None:
        """`send` on the channel ``reasoning``."""
        await self.send(text, "reasoning")

    async def output(self, content: str, channel: str = "answer", metadata: Mapping[str, Any] | None = None) -> None:
        """State text as final: it replaces what was streamed on `channel` since the last output there."""
        await self._enter()
        self._add_channel(channel)
        content, given = _text("content", content), _plain(dict(metadata or {}))
        await self._emit(Output(turn_id=self.turn_id, channel=channel, content=content, metadata=given))

    async def progress(self, key: str, data: Any) -> None:
        """Say how far `key` is. Only the latest per key counts, and none after the turn."""
        await self._enter()
        event = Progress(turn_id=self.turn_id, key=_text("key", key, MAX_NAME), data=_plain(data))
        size = len(codec.dump_json([key, event.data]))
        others = sum(self._progress.values()) - self._progress.get(key, 0)
        if others + size > self._limits.max_state_bytes // 2:
            raise TurnLimitExceeded(f"progress: all keys together may hold {self._limits.max_state_bytes // 2:,} bytes")
        self._progress[key] = size
        await self._emit(event)

    async def tool_call(self, name: str, arguments: Any = None, call_id: str | None = None) -> str:
        """Show that a tool is called. Returns the call's id, for `tool_result`."""
        await self._enter()
        call_id = call_id or f"call_{self._session.sources.new_id()}"
        await self._emit(
            ToolCall(
                turn_id=self.turn_id,
                call_id=_text("call_id", call_id, MAX_NAME),
                name=_text("name", name, MAX_NAME),
                arguments=_plain(arguments),
            )
        )
        return call_id

    async def tool_result(self, call_id: str, result: Any = None, is_error: bool = False) -> None:
        """Show what a tool returned."""
        await self._enter()
        call_id = _text("call_id", call_id, MAX_NAME)
        await self._emit(
            ToolResult(turn_id=self.turn_id, call_id=call_id, result=_plain(result), is_error=bool(is_error))
        )

    async def custom(self, name: str, data: Any = None) -> None:
        """Write an event of the application's own."""
        await self._enter()
        await self._emit(Custom(turn_id=self.turn_id, name=_text("name", name, MAX_NAME), data=_plain(data)))

    async def update_state(self, patch: Mapping[str, Any]) -> None:
        """Change the session's state by an RFC 7396 merge patch: a key set to None goes away, objects are merged."""
        await self._enter()
        given = _plain(dict(patch))
        # One at a time: the next patch applies to what this one leaves, in the order in which they are written.
        lock = self._state_lock = self._state_lock or trio.Lock()
        async with lock:
            changed = merge_patch(self._state, given)
            if len(codec.dump_json(changed)) > self._limits.max_state_bytes:
                raise TurnLimitExceeded(f"state: a session's state may hold {self._limits.max_state_bytes:,} bytes")
            await self._emit(State(patch=given))
            self._state = changed

    async def ask(
        self, kind: AskKind, prompt: str, options: Sequence[Any] | None = None, timeout: float | None = None
    ) -> Any:
        """Ask whoever is attached, and wait for the answer.

        Args:
            kind: ``approval`` (the answer is a bool), ``choice`` (one of `options`) or ``input`` (a string).
            options: of a ``choice``: the values that may be answered.
            timeout: seconds; None (or infinity) waits as long as the turn may run. The question outlives every
                connection.

        Returns:
            The answer. When it timed out or was cancelled: False for an approval, else None.
        """
        await self._enter()
        if kind not in ("approval", "choice", "input"):
            raise ValueError(f"kind: expected approval, choice or input, got {kind!r}")
        if kind == "choice" and not options:
            raise ValueError("options: a choice needs at least one")
        if timeout is not None and not timeout >= 0:
            raise ValueError(f"timeout: expected seconds, 0 or more, got {timeout!r}")
        if len(self._asks) >= self._limits.max_asks:
            raise TurnLimitExceeded(f"ask: {self._limits.max_asks} questions are open already (limits.max_asks)")
        wait = inf if timeout is None or timeout > LONGEST_ASK else timeout
        event = Ask(
            turn_id=self.turn_id,
            ask_id=f"a_{self._session.sources.new_id()}",
            kind=kind,
            prompt=_text("prompt", prompt),
            options=None if options is None else _plain(list(options)),
            timeout_ms=None if wait == inf else int(wait * 1000),
        )
        room = self._limits.max_frame_bytes // (4 * self._limits.max_asks)
        if len(codec.dump_json([prompt, event.options])) > room:
            raise TurnLimitExceeded(f"ask: prompt and options may hold {room:,} bytes")
        pending = self._asks[event.ask_id] = PendingAsk(event)
        try:
            await self._emit(event)
            with trio.move_on_after(wait):
                await pending.decided.wait()
            if pending.outcome is None:
                self._session.decide_ask(self, pending, "timed_out")
            await pending.decided.wait()
        finally:
            if pending.outcome is None and not self._closed:
                self._session.decide_ask(self, pending, "cancelled")
        return pending.value

    # for itself

    async def _enter(self) -> None:
        """What every write begins with. An agent that catches all errors in a loop must not keep others from running,
        so being refused, and every so many writes, is a checkpoint; and a turn being stopped gets no further."""
        self._unyielded += 1
        if self._unyielded >= YIELD_EVERY or self._closed or self._stop_reason is not None:
            self._unyielded = 0
            await trio.lowlevel.checkpoint()
        self._check_open()

    def _check_open(self) -> None:
        if self._closed:
            raise TurnClosed(f"turn {self.turn_id} has ended; nothing more can be written to it")

    def _charge(self, size: int) -> None:
        self._written += size
        if self._written > self._limits.max_turn_bytes:
            self._session.stop_turn(self, "turn_too_large")
            raise TurnLimitExceeded(f"the turn may write {self._limits.max_turn_bytes:,} bytes (limits.max_turn_bytes)")

    def _add_channel(self, channel: str) -> None:
        self._check_open()
        if channel not in self._channels:
            _text("channel", channel, 64)
            if len(self._channels) >= self._limits.max_channels:
                raise TurnLimitExceeded(f"a turn may use {self._limits.max_channels} channels (limits.max_channels)")
            self._channels.add(channel)

    def _take_result(self, result: object) -> None:
        """Keep the text that the agent returned."""
        if result is not None and type(result) is not str:
            raise TypeError(f"an agent returns text or None, not {type(result).__name__}")
        if result:
            self._charge(_utf8_size(result))
        self._result = result

    async def _emit(self, event: Event) -> None:
        self._check_open()
        size = len(codec.encode_event(event, 0)) + NUMBERS
        if size > self._limits.max_frame_bytes:
            raise TurnLimitExceeded(
                f"{event.type}: {size:,} bytes do not fit into a frame of {self._limits.max_frame_bytes:,} "
                "(limits.max_frame_bytes); send it in parts"
            )
        self._charge(size)
        await self._put(event)

    async def _put(self, event: Event | Text) -> None:
        check_stack(WAKE)
        try:
            await self._outbox.send(event)
            self._publisher.mark()
        except trio.BrokenResourceError:
            raise TurnClosed(f"the session of turn {self.turn_id} has ended") from None


def _text(name: str, value: object, most: int | None = None) -> str:
    """Check text that an agent hands in; with `most`, a name of so many characters, not empty."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected str, not {type(value).__name__}")
    if most is not None and not 0 < len(value) <= most:
        raise ValueError(f"{name}: expected 1 to {most} characters, got {len(value)}")
    _utf8_size(value)
    return value


def _utf8_size(text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError as exc:
        raise ValueError(
            f"text: half a character (a lone surrogate) at index {exc.start}; decode a stream as a whole, not in pieces"
        ) from None


def _plain(value: Any) -> Any:
    """`value` as its readers will see it: plain JSON that nobody else can change any more."""
    return codec.parse_json(codec.check_json(value))


def _same(value: Any, option: Any) -> bool:
    # JSON has one kind of number (a browser sends 2 for 2.0); Python would also take true for 1.
    if type(value) is bool or type(option) is bool:
        return value is option
    return bool(value == option)


def answered(pending: PendingAsk, turn_id: str, by: str | None) -> Answered:
    """The event that closes an ask."""
    assert pending.outcome is not None
    value = pending.value if pending.outcome == "answered" else None
    return Answered(turn_id=turn_id, ask_id=pending.event.ask_id, value=value, by=by, outcome=pending.outcome)
