"""Settings, as frozen attrs classes: one name per setting in the file, the environment, the policy and the code.

Every limit is checked where it is constructed and says why it has its default. Times are integer milliseconds,
sizes are bytes, both in the names. `gateway.cli.settings` loads these from TOML, the environment and flags.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import attrs
from attrs import field, frozen

from gateway.errors import ConfigError

KIB = 1024
MIB = 1024 * KIB
HOUR_MS = 3_600_000
QUEUED_BYTES = 176
"""What a waiting input takes in a snapshot: a request id of 128 printable ASCII characters, and its number."""


def _within(low: int, high: int) -> Callable[[Any, attrs.Attribute[Any], Any], None]:
    def check(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        key = f"{instance.TABLE}.{attribute.name}"
        if type(value) is not int:
            raise ConfigError(key, f"expected an integer from {low:,} to {high:,}, got {value!r}")
        if not low <= value <= high:
            raise ConfigError(key, f"must be from {low:,} to {high:,}, got {value:,}")

    return check


def _text(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{instance.TABLE}.{attribute.name}", f"expected a text that is not empty, got {value!r}")


def _one_of(*allowed: str) -> Callable[[Any, attrs.Attribute[Any], Any], None]:
    def check(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        if value not in allowed:
            raise ConfigError(f"{instance.TABLE}.{attribute.name}", f"expected {' or '.join(allowed)}, got {value!r}")

    return check


def _limit(default: int, low: int, high: int, why: str) -> int:
    """A limit with its range; `why` is shown by `check-config` and in the reference."""
    return field(default=default, validator=_within(low, high), metadata={"low": low, "high": high, "why": why})


@frozen(kw_only=True)
class Limits:
    """Every bound the gateway keeps, in count and bytes (table ``[limits]``).

    The first group is advertised to clients in ``hello_ok.policy``.
    """

    TABLE = "limits"

    max_payload: int = _limit(MIB, KIB, 64 * MIB, "one client frame; a long pasted document fits, a flood does not")
    max_frame_bytes: int = _limit(MIB, 256 * KIB, 64 * MIB, "one gateway frame; what browsers and proxies pass easily")
    max_inbox: int = _limit(256, 1, 10_000, "inputs waiting in one session; more is a person leaning on a key")
    max_buffered_bytes: int = _limit(MIB, KIB, 1024 * MIB, "what a slow client may be behind before it is closed")
    heartbeat_ms: int = _limit(30_000, 50, HOUR_MS, "below the 60 s after which common proxies cut a silent line")
    resume_window_ms: int = _limit(24 * HOUR_MS, 1000, 366 * 24 * HOUR_MS, "a laptop closed overnight resumes")
    max_turn_ms: int = _limit(600_000, 10, 7 * 24 * HOUR_MS, "ten minutes; longer work should report progress")
    replay_max_events: int = _limit(10_000, 8, 1_000_000, "non-volatile events kept per session for replay")
    replay_max_bytes: int = _limit(8 * MIB, 64 * KIB, 1024 * MIB, "their bytes; with the count it bounds a session")

    max_inbox_bytes: int = _limit(
        8 * MIB,
        KIB,
        1024 * MIB,
        "bytes of the inputs waiting in one session; from there on no other is taken",
    )
    tail_max_bytes: int = _limit(
        MIB, KIB, 1024 * MIB, "newest events of one session in memory; older ones are read from the store"
    )
    all_tails_max_bytes: int = _limit(
        256 * MIB, KIB, 1024 * 1024 * MIB, "the same for all sessions together: above it each gets an equal share"
    )
    max_outbox: int = _limit(256, 1, 65_536, "events between agent and publisher; the agent waits when it is full")
    max_sessions: int = _limit(10_000, 1, 1_000_000, "sessions in memory; resting ones are not in memory")
    max_connections: int = _limit(10_000, 1, 1_000_000, "open sockets; keep it under the process's file limit")
    max_connections_per_session: int = _limit(1024, 1, 100_000, "readers of one session; presence is sent to each")
    max_pending_handshakes: int = _limit(512, 1, 100_000, "sockets that have not said hello: cheap to open, so few")
    max_pending_handshakes_per_peer: int = _limit(32, 1, 100_000, "the same, from one address")
    max_handshake_bytes: int = _limit(64 * KIB, KIB, MIB, "the first frame; a hello with a long token fits")
    max_control_frames: int = _limit(256, 8, 65_536, "unsent replies on one connection; more means it does not read")
    max_protocol_errors: int = _limit(10, 0, 10_000, "bad frames forgiven on one connection; a bug repeats for ever")
    idle_session_ms: int = _limit(300_000, 10, 7 * 24 * HOUR_MS, "then a session with nothing to do is put to rest")
    handshake_timeout_ms: int = _limit(10_000, 50, 600_000, "from the connection to a valid hello, also on bad lines")
    slow_grace_ms: int = _limit(1_000, 10, 600_000, "how long one write may be pending while the backlog is large")
    send_timeout_ms: int = _limit(10_000, 10, 600_000, "a write without any progress for so long is a dead peer")
    close_timeout_ms: int = _limit(3_000, 10, 600_000, "for the closing handshake, then the socket is dropped")
    stop_timeout_ms: int = _limit(5_000, 10, 600_000, "for an agent to end after its cancellation")
    segment_bytes: int = _limit(64 * KIB, 256, MIB, "text streamed before it is sealed as an output")
    max_turn_bytes: int = _limit(16 * MIB, KIB, 1024 * MIB, "everything one turn writes; a loop, not an answer")
    max_channels: int = _limit(16, 1, 1024, "text channels of one turn; each holds up to segment_bytes")
    max_asks: int = _limit(16, 1, 1024, "questions open at once in one turn")
    max_state_bytes: int = _limit(128 * KIB, KIB, 16 * MIB, "a session's state; it is part of every snapshot")
    max_signal_bytes: int = _limit(16 * KIB, 64, MIB, "one signal; it is for typing notices, not for content")
    snapshot_max_events: int = _limit(200, 1, 100_000, "newest transcript events in a snapshot: a screen or ten")
    max_detached_ms: int = _limit(
        0, 0, 7 * 24 * HOUR_MS, "a turn with nobody attached is aborted after this; 0 lets it finish"
    )
    send_buffer_bytes: int = _limit(
        256 * KIB, 4 * KIB, 64 * MIB, "the kernel's send buffer: what is in it cannot be merged any more"
    )
    max_sync_threads: int = _limit(40, 1, 10_000, "threads for synchronous agents, trio's own default")

    def __attrs_post_init__(self) -> None:
        # What a snapshot must hold besides its transcript has to fit into one frame: the text not yet sealed
        # and the state. JSON escapes may grow text sixfold, which `Turn` accounts for when it seals.
        need = self.max_state_bytes + 2 * self.segment_bytes
        if self.max_frame_bytes < need:
            raise ConfigError(
                "limits.max_frame_bytes",
                f"must be at least max_state_bytes + 2 * segment_bytes = {need:,}, got {self.max_frame_bytes:,}",
            )
        # A snapshot names every input that waits, and a quarter of it is for that.
        most = self.max_frame_bytes // (4 * QUEUED_BYTES)
        if self.max_inbox > most:
            raise ConfigError(
                "limits.max_inbox",
                f"must be at most max_frame_bytes / {4 * QUEUED_BYTES} = {most:,}, got {self.max_inbox:,}",
            )


@frozen(kw_only=True)
class Server:
    """Where the gateway listens and whom it admits (table ``[server]``)."""

    TABLE = "server"

    host: str = field(default="127.0.0.1", validator=_text)
    port: int = field(default=8765, validator=_within(0, 65_535))
    """0 takes a free one, which the start-up message names; the same holds for `http_port`."""
    http: bool = True
    """Whether health and readiness are served on `http_port` (extra ``http``)."""
    http_port: int = field(default=8766, validator=_within(0, 65_535))
    path: str = field(default="/ws")
    tls_certificate: str | None = field(default=None, validator=attrs.validators.optional(_text))
    """PEM file with the certificate and its chain. With it, and `tls_key`, the WebSocket port speaks TLS (``wss://``)."""
    tls_key: str | None = field(default=None, validator=attrs.validators.optional(_text))
    """PEM file with the certificate's private key, without a password."""
    node: str = field(default="n1", validator=_text)
    drain_timeout_ms: int = _limit(
        30_000, 0, HOUR_MS, "what common supervisors wait before they kill; running turns may finish in it"
    )
    allowed_origins: tuple[str, ...] = ()
    """Origins of browser pages that may connect, besides pages served from the gateway's own host. ``*`` allows all."""
    tokens: Mapping[str, str] = field(factory=dict, repr=False)
    """Subject → secret token. Empty: every client is the subject ``anonymous``."""

    def __attrs_post_init__(self) -> None:
        if (self.tls_certificate is None) != (self.tls_key is None):
            given, missing = ("tls_certificate", "tls_key") if self.tls_key is None else ("tls_key", "tls_certificate")
            raise ConfigError(f"server.{missing}", f"missing; TLS needs it beside server.{given}")

    @path.validator
    def _check_path(self, attribute: attrs.Attribute[str], value: str) -> None:
        if not value.startswith("/"):
            raise ConfigError("server.path", f"expected a path that starts with '/', got {value!r}")

    @tokens.validator
    def _check_tokens(self, attribute: attrs.Attribute[Any], value: Mapping[str, str]) -> None:
        for subject, token in value.items():
            if len(token) < 16:
                raise ConfigError(f"server.tokens.{subject}", "expected a secret of at least 16 characters")


@frozen(kw_only=True)
class Store:
    """Where sessions are kept, and for how long (table ``[store]``).

    A purge removes whole sessions, but never one that is in use, has something unfinished, or may still be resumed
    (``limits.resume_window_ms``). One session alone is bounded by ``limits.replay_max_events`` and
    ``replay_max_bytes``.
    """

    TABLE = "store"

    url: str = field(default="memory", validator=_text)
    """``memory``, or ``sqlite:PATH``."""
    durability: Literal["full", "normal"] = field(default="full", validator=_one_of("full", "normal"))
    """``full``: what was accepted survives a crash of the machine; ``normal``: one of the process."""
    keep_ms: int = _limit(
        30 * 24 * HOUR_MS, 1000, 3650 * 24 * HOUR_MS, "idle sessions in a file; at least resume_window_ms in any case"
    )
    max_sessions: int = _limit(1_000_000, 1, 1_000_000_000, "stored sessions; beyond it the longest idle go first")
    max_total_bytes: int = _limit(10 * 1024 * MIB, MIB, 1024 * 1024 * MIB, "bytes of their events; the same")


@frozen(kw_only=True)
class Log:
    """What the operator sees (table ``[log]``)."""

    TABLE = "log"

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["console", "json"] = "console"


@frozen(kw_only=True)
class AgentConfig:
    """One agent (table ``[agents.NAME]``): what it runs, and options passed to its kind.

    Args:
        run: ``MODULE:ATTR``, or one of the built-in kinds ``demo``, ``openai``, ``process``.
        max_detached_ms: overrides ``limits.max_detached_ms`` for this agent.
        on_lost: what becomes of a turn that a crash cut off: ``end`` (it ends as ``lost``) or ``retry`` (its inputs run
            again, at most three times in all).
        options: every other key of the table, handed to the kind (``base_url``, ``command``, …).
    """

    TABLE = "agents.*"

    run: str = field(validator=_text)
    max_detached_ms: int | None = field(default=None, validator=attrs.validators.optional(_within(0, 7 * 24 * HOUR_MS)))
    on_lost: Literal["end", "retry"] = field(default="end", validator=_one_of("end", "retry"))
    options: Mapping[str, Any] = field(factory=dict)


@frozen(kw_only=True)
class Config:
    """Everything a gateway is started with. The defaults are a working gateway."""

    server: Server = field(factory=Server)
    limits: Limits = field(factory=Limits)
    store: Store = field(factory=Store)
    log: Log = field(factory=Log)
    agents: Mapping[str, AgentConfig] = field(factory=dict)
