"""Every error this package raises on purpose.

    GatewayError
    ├── ConfigError            a setting is wrong (its `key`, what was expected)
    ├── AgentError             an agent, or how it is named, is wrong
    │   ├── AgentLoadError         MODULE:ATTR cannot be imported or is no agent
    │   ├── TurnClosed             the turn is over; nothing more can be written to it
    │   ├── TurnLimitExceeded      a write would exceed a limit of the turn
    │   └── TurnFailed             raised *by* an agent to end its turn with a typed error for the client
    ├── ProtocolError          the peer sent something the protocol does not allow
    │   ├── FrameError             one frame is wrong; answered with `error`, the connection stays
    │   └── HandshakeRefused       the opening `hello` is refused; answered with `hello_error`
    ├── StoreError
    │   ├── StoreUnavailable       cannot write now; the same write may succeed later
    │   ├── StoreRefused           this write contradicts what is stored; it will never succeed
    │   ├── StoreFenced            another process has become the writer; this one must stop writing
    │   └── StoreUnusable          this store cannot be opened or is damaged; the message says what to do
    ├── TransportError
    │   ├── ConnectionLost         the line is gone; a client reconnects and resumes
    │   └── BindError              the address cannot be listened on
    └── ClientError            what `gateway.client` raises to its user
        ├── SessionRefused         the gateway said no in a way that reconnecting cannot mend
        ├── RequestRefused         one request (a message, an answer, an abort) was refused
        └── SessionClosed          the session object was closed or left

What the caller did wrong (`ConfigError`, `AgentError`, `RequestRefused`) is kept apart from what the
peer did wrong (`ProtocolError`) and from what the world did (`StoreError`, `TransportError`).
"""

from __future__ import annotations


class GatewayError(Exception):
    """Base of every error raised by this package."""


class ConfigError(GatewayError):
    """A setting is wrong. `key` is its dotted name (``limits.max_inbox``), the message says what was expected."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}" if key else message)
        self.key = key


class AgentError(GatewayError):
    """An agent, or the way it was named, is wrong."""


class AgentLoadError(AgentError):
    """``MODULE:ATTR`` could not be imported, or what it names is not an agent."""


class TurnClosed(AgentError):
    """The turn has ended; nothing that belongs to it can be written any more (DESIGN property 9)."""


class TurnLimitExceeded(AgentError):
    """A write would exceed a limit of the turn; nothing of it was written."""


class TurnFailed(AgentError):
    """Raise this in an agent to end the turn as ``failed`` with an error that the client may see.

    Any other exception ends the turn as ``failed`` with code ``agent_error`` and a reference id only:
    its type and text go to the operator's log.

    Args:
        code: a short machine-readable word, such as ``rate_limited``.
        message: shown to the user; says what to do.
        retryable: whether sending the same input again later may work.
    """

    def __init__(self, code: str, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retryable = retryable


class ProtocolError(GatewayError):
    """The peer sent something the protocol does not allow. `code` is the wire's error code."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class FrameError(ProtocolError):
    """One frame is wrong: ``invalid_json``, ``invalid_frame`` or ``unknown_type`` (PROTOCOL section 6)."""

    def __init__(self, code: str, message: str, request_id: str | None = None) -> None:
        super().__init__(code, message)
        self.request_id = request_id


class HandshakeRefused(ProtocolError):
    """The connection may not join (PROTOCOL sections 3 and 9).

    `close_code` is the WebSocket close code that follows the `hello_error`.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        close_code: int,
        next_step: str,
        retryable: bool = False,
        retry_after_ms: int | None = None,
        close_reason: str | None = None,
    ) -> None:
        super().__init__(code, message)
        self.close_code = close_code
        self.close_reason = close_reason or code
        self.next_step = next_step
        self.retryable = retryable
        self.retry_after_ms = retry_after_ms


class StoreError(GatewayError):
    """Base of what a store raises."""


class StoreUnavailable(StoreError):
    """The store cannot write now (disk full, locked). Nothing of the batch was stored; it may be tried again."""


class StoreRefused(StoreError):
    """The write contradicts what is stored; nothing of it was stored and trying again will not help.

    The session is unknown or exists already, a number was given before, or the value has no stored form. Whoever
    holds that session in memory must drop it and load it again.
    """


class StoreFenced(StoreError):
    """Another process has become the writer of this store; nothing of the batch was stored, and nothing will be."""


class StoreUnusable(StoreError):
    """The store cannot be opened, or is damaged. The message says what to do."""


class TransportError(GatewayError):
    """Base of what a transport raises."""


class ConnectionLost(TransportError):
    """The connection has ended. `code` and `reason` are the WebSocket close code and reason, 1006 if none came."""

    def __init__(self, code: int = 1006, reason: str = "") -> None:
        super().__init__(f"connection closed: {code} {reason}".rstrip())
        self.code = code
        self.reason = reason


class BindError(TransportError):
    """An address cannot be listened on. The message names the address and says what to do."""


class ClientError(GatewayError):
    """Base of what `gateway.client` raises to its user."""


class SessionRefused(ClientError):
    """The gateway refused the session for good: `code` as in PROTOCOL sections 3 and 9, `close_code` if one came."""

    def __init__(self, code: str, message: str, *, close_code: int | None = None, next_step: str = "") -> None:
        super().__init__(f"{code}: {message}" + (f" ({next_step})" if next_step else ""))
        self.code = code
        self.message = message
        self.close_code = close_code
        self.next_step = next_step


class RequestRefused(ClientError):
    """One request was refused: the fields are those of the `error` frame (PROTOCOL section 6)."""

    def __init__(self, code: str, message: str, *, retryable: bool = False, retry_after_ms: int | None = None) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.retryable = retryable
        self.retry_after_ms = retry_after_ms


class SessionClosed(ClientError):
    """The session object was closed (its block was left, or `leave` was called)."""
