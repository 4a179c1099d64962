"""Every message of the wire protocol, as attrs classes (PROTOCOL sections 3 to 6).

Three families, told apart by who speaks and whether it is numbered:

- `Event`: an entry of a session's log. It has `seq`, `first` and `at`; everything else can be lost and asked for again.
- `ClientFrame`: what a client sends after (or as) its `Hello`.
- `ServerFrame`: what the gateway sends without a number.

The class attribute `type` is the wire's ``type``. `EVENTS`, `CLIENT_FRAMES` and `SERVER_FRAMES` map it to the class.
To add an event: write its class here and add it to `AnyEvent` and `EVENTS`; a `volatile` one needs a rule in `log` that
removes it. Codec, reference page and test strategies follow from the class.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NewType

from attrs import define, field, frozen

RequestId = NewType("RequestId", str)
"""1 to 128 characters; the idempotency key of an input within its session."""

SessionId = NewType("SessionId", str)
"""1 to 128 of ``A-Z a-z 0-9 . _ : -``."""

JSON = Any
"""Any JSON value."""

BusyMode = Literal["queue", "interrupt", "steer", "collect", "reject"]
AskKind = Literal["approval", "choice", "input"]
AskOutcome = Literal["answered", "timed_out", "cancelled"]
TurnOutcome = Literal["completed", "failed", "aborted", "timed_out", "interrupted", "lost"]
AbortScope = Literal["turn", "queue", "all"]
ResyncReason = Literal["unknown_session", "epoch_changed", "cursor_ahead", "cursor_expired", "requested"]


# --- events: the session's log (section 4) ---------------------------------------------------------------------------


@define(kw_only=True)
class Event:
    """An entry of the log. It is filled in once, when the publisher numbers it, and never changed afterwards.

    Invariant: ``first <= seq``; of two events in a row, ``next.first == previous.seq + 1``. `first` is a property
    of reading: the log computes it when an event is served.
    """

    type: ClassVar[str]
    volatile: ClassVar[bool] = False

    seq: int = 0
    first: int = 0
    at: int = 0


@define(kw_only=True)
class Input(Event):
    """A user's message accepted into the session. `sender` is the subject that sent it."""

    type: ClassVar[str] = "input"
    request_id: RequestId
    content: str
    metadata: dict[str, JSON] = field(factory=dict)
    sender: str = "anonymous"


@define(kw_only=True)
class TurnStarted(Event):
    """The agent starts to run for the named inputs."""

    type: ClassVar[str] = "turn_started"
    turn_id: str
    request_ids: list[RequestId]
    attempt: int = 1


@define(kw_only=True)
class Delta(Event):
    """A piece of streamed text. Volatile: the next `Output` of its turn and channel replaces it."""

    type: ClassVar[str] = "delta"
    volatile: ClassVar[bool] = True
    turn_id: str
    channel: str
    text: str


@define(kw_only=True)
class Progress(Event):
    """The latest word about `key`. Volatile: replaced by a later one with the same key, gone when the turn ends."""

    type: ClassVar[str] = "progress"
    volatile: ClassVar[bool] = True
    turn_id: str
    key: str
    data: JSON = None


@define(kw_only=True)
class ToolCall(Event):
    type: ClassVar[str] = "tool_call"
    turn_id: str
    call_id: str
    name: str
    arguments: JSON = None


@define(kw_only=True)
class ToolResult(Event):
    type: ClassVar[str] = "tool_result"
    turn_id: str
    call_id: str
    result: JSON = None
    is_error: bool = False


@define(kw_only=True)
class Ask(Event):
    """A question of the agent to whoever is attached. Open until the `Answered` with its `ask_id`."""

    type: ClassVar[str] = "ask"
    turn_id: str
    ask_id: str
    kind: AskKind
    prompt: str
    options: list[JSON] | None = None
    timeout_ms: int | None = None


@define(kw_only=True)
class Answered(Event):
    """Exactly one per ask. `by` is the connection that answered, null when it timed out or was cancelled."""

    type: ClassVar[str] = "answered"
    turn_id: str
    ask_id: str
    value: JSON = None
    by: str | None = None
    outcome: AskOutcome = "answered"


@define(kw_only=True)
class Output(Event):
    """Text that is final. It stands for all deltas of its turn and channel since the output before it there."""

    type: ClassVar[str] = "output"
    turn_id: str
    channel: str
    content: str
    metadata: dict[str, JSON] = field(factory=dict)


@define(kw_only=True)
class ErrorInfo:
    """Why a turn failed, as the client may see it."""

    code: str
    message: str
    retryable: bool = False


@define(kw_only=True)
class TurnEnded(Event):
    """Exactly one per turn, always the turn's last event."""

    type: ClassVar[str] = "turn_ended"
    turn_id: str
    outcome: TurnOutcome
    error: ErrorInfo | None = None


@define(kw_only=True)
class Withdrawn(Event):
    """A queued input that will not start a turn.

    `reason`: ``aborted`` (someone withdrew it) or ``steered`` (the running turn `turn_id` took it in).
    """

    type: ClassVar[str] = "withdrawn"
    request_id: RequestId
    reason: str
    turn_id: str | None = None


@define(kw_only=True)
class State(Event):
    """A merge patch on the session's state (RFC 7396)."""

    type: ClassVar[str] = "state"
    patch: dict[str, JSON]


@define(kw_only=True)
class Custom(Event):
    """An event of the application's own."""

    type: ClassVar[str] = "custom"
    name: str
    data: JSON = None
    turn_id: str | None = None


AnyEvent = (
    Input | TurnStarted | Delta | Progress | ToolCall | ToolResult | Ask | Answered | Output | TurnEnded | Withdrawn
    | State | Custom
)  # fmt: skip

EVENTS: dict[str, type[Event]] = {
    cls.type: cls
    for cls in (
        Input, TurnStarted, Delta, Progress, ToolCall, ToolResult, Ask, Answered, Output, TurnEnded, Withdrawn, State,
        Custom,
    )
}  # fmt: skip

TRANSCRIPT_EVENTS = (Input, Output, ToolCall, ToolResult, Answered, TurnEnded)
"""The types a snapshot's transcript and `Turn.transcript` consist of."""


# --- what clients send (sections 3 and 5) ----------------------------------------------------------------------------


@frozen(kw_only=True)
class ClientFrame:
    type: ClassVar[str]


@frozen(kw_only=True)
class ClientInfo:
    name: str = ""
    version: str = ""


@frozen(kw_only=True)
class Hello(ClientFrame):
    """A client's first frame. `since` is its cursor, 0 for none; `epoch` the history that cursor belongs to."""

    type: ClassVar[str] = "hello"
    protocol_min: int
    protocol_max: int
    agent_id: str
    session_id: SessionId | None = None
    since: int | None = None
    epoch: str | None = None
    token: str | None = None
    capabilities: list[str] = field(factory=list)
    client: ClientInfo | None = None


@frozen(kw_only=True)
class Message(ClientFrame):
    type: ClassVar[str] = "message"
    request_id: RequestId
    content: str
    metadata: dict[str, JSON] = field(factory=dict)
    on_busy: BusyMode = "queue"


@frozen(kw_only=True)
class Abort(ClientFrame):
    """Stop a turn (by scope or `turn_id`) or withdraw one queued input (`request_id`)."""

    type: ClassVar[str] = "abort"
    scope: AbortScope = "turn"
    turn_id: str | None = None
    request_id: str | None = None


@frozen(kw_only=True)
class Answer(ClientFrame):
    type: ClassVar[str] = "answer"
    ask_id: str
    value: JSON


@frozen(kw_only=True)
class ClientSignal(ClientFrame):
    type: ClassVar[str] = "signal"
    name: str
    data: JSON = None


@frozen(kw_only=True)
class Resync(ClientFrame):
    type: ClassVar[str] = "resync"


@frozen(kw_only=True)
class Refresh(ClientFrame):
    type: ClassVar[str] = "refresh"
    token: str


@frozen(kw_only=True)
class Leave(ClientFrame):
    type: ClassVar[str] = "leave"


@frozen(kw_only=True)
class Ping(ClientFrame):
    """Also sent by the gateway."""

    type: ClassVar[str] = "ping"
    nonce: JSON = None


@frozen(kw_only=True)
class Pong(ClientFrame):
    """Also sent by the gateway."""

    type: ClassVar[str] = "pong"
    nonce: JSON = None


CLIENT_FRAMES: dict[str, type[ClientFrame]] = {
    cls.type: cls for cls in (Hello, Message, Abort, Answer, ClientSignal, Resync, Refresh, Leave, Ping, Pong)
}


# --- what the gateway sends without a number (sections 3 and 6) ------------------------------------------------------


@frozen(kw_only=True)
class ServerFrame:
    """`droppable` frames are skipped for a client that is behind; everything else is critical."""

    type: ClassVar[str]
    droppable: ClassVar[bool] = False


@frozen(kw_only=True)
class ServerInfo:
    name: str
    version: str
    node: str


@frozen(kw_only=True)
class Policy:
    """The limits a client has to know; each is enforced under the same name in the configuration."""

    max_payload: int
    max_frame_bytes: int
    max_inbox: int
    max_buffered_bytes: int
    heartbeat_ms: int
    resume_window_ms: int
    max_turn_ms: int
    replay_max_events: int
    replay_max_bytes: int


@frozen(kw_only=True)
class Features:
    messages: list[str]
    events: list[str]
    capabilities: list[str]


@frozen(kw_only=True)
class Member:
    """One joined connection, as presence shows it. `joined_at` is in milliseconds."""

    connection_id: str
    subject: str
    joined_at: int


@frozen(kw_only=True)
class Health:
    status: Literal["ok", "draining"]
    draining: bool


@frozen(kw_only=True)
class LastDisconnect:
    """How the subject's previous connection to this session ended."""

    code: int
    reason: str
    at: int


@frozen(kw_only=True)
class HelloOk(ServerFrame):
    type: ClassVar[str] = "hello_ok"
    protocol: int
    server: ServerInfo
    connection_id: str
    session_id: str
    agent_id: str
    epoch: str
    resumed: bool
    cursor: int
    head: int
    oldest_cursor: int
    resync_required: bool
    resync_reason: ResyncReason | None
    credit: int
    policy: Policy
    features: Features
    presence: list[Member]
    health: Health
    last_disconnect: LastDisconnect | None = None


@frozen(kw_only=True)
class HelloError(ServerFrame):
    type: ClassVar[str] = "hello_error"
    code: str
    message: str
    retryable: bool
    retry_after_ms: int | None
    next_step: str
    server_min_version: int
    server_max_version: int


@frozen(kw_only=True)
class RunningTurn:
    """The running turn in a snapshot: `channels` holds the text after the last output of each channel."""

    turn_id: str
    request_ids: list[str]
    channels: dict[str, str]
    progress: dict[str, JSON]
    started_at: int


@frozen(kw_only=True)
class QueuedRef:
    request_id: str
    seq: int


@frozen(kw_only=True)
class Snapshot(ServerFrame):
    """The session at `cursor`, taken in one step; every event after it follows."""

    type: ClassVar[str] = "snapshot"
    epoch: str
    cursor: int
    reason: ResyncReason
    state: dict[str, JSON]
    transcript: list[AnyEvent]
    transcript_truncated: bool
    turn: RunningTurn | None
    queue: list[QueuedRef]
    asks: list[Ask]


@frozen(kw_only=True)
class Accepted(ServerFrame):
    type: ClassVar[str] = "accepted"
    request_id: str
    seq: int
    queued: int
    duplicate: bool
    durable: bool
    credit: int


@frozen(kw_only=True)
class Aborted(ServerFrame):
    type: ClassVar[str] = "aborted"
    turn_id: str | None
    withdrawn: list[str]


@frozen(kw_only=True)
class AnswerOk(ServerFrame):
    type: ClassVar[str] = "answer_ok"
    ask_id: str


@frozen(kw_only=True)
class Credit(ServerFrame):
    type: ClassVar[str] = "credit"
    credit: int


@frozen(kw_only=True)
class Signal(ServerFrame):
    """`from_` is ``from`` on the wire: the connection that sent it, as a `Member`."""

    type: ClassVar[str] = "signal"
    droppable: ClassVar[bool] = True
    name: str
    data: JSON
    from_: Member


@frozen(kw_only=True)
class Presence(ServerFrame):
    type: ClassVar[str] = "presence"
    droppable: ClassVar[bool] = True
    event: Literal["joined", "left"]
    connection_id: str
    subject: str


@frozen(kw_only=True)
class Refreshed(ServerFrame):
    type: ClassVar[str] = "refreshed"
    expires_at: int | None


@frozen(kw_only=True)
class Left(ServerFrame):
    type: ClassVar[str] = "left"


@frozen(kw_only=True)
class ServerPing(ServerFrame):
    type: ClassVar[str] = "ping"
    nonce: JSON = None


@frozen(kw_only=True)
class ServerPong(ServerFrame):
    type: ClassVar[str] = "pong"
    nonce: JSON = None


@frozen(kw_only=True)
class Error(ServerFrame):
    """A request was refused, or a frame was wrong. Fields that are None are left out on the wire."""

    type: ClassVar[str] = "error"
    code: str
    message: str
    retryable: bool = False
    retry_after_ms: int | None = None
    request_id: str | None = None
    credit: int | None = None


@frozen(kw_only=True)
class GoAway(ServerFrame):
    type: ClassVar[str] = "goaway"
    reason: str
    reconnect_after_ms: int
    deadline_ms: int


SERVER_FRAMES: dict[str, type[ServerFrame]] = {
    cls.type: cls
    for cls in (
        HelloOk, HelloError, Snapshot, Accepted, Aborted, AnswerOk, Credit, Signal, Presence, Refreshed, Left,
        ServerPing, ServerPong, Error, GoAway,
    )
}  # fmt: skip
