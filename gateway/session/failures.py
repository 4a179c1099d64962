"""How a turn ended: what the client, and what the operator, gets to know of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import structlog

from gateway.config import Limits
from gateway.errors import TurnFailed
from gateway.protocol.messages import Error, ErrorInfo, TurnOutcome

MAX_CODE, MAX_MESSAGE = 64, 4096
"""Characters of what a `TurnFailed` may say to the client: a word, and a paragraph. The rest is cut off."""

AGENT_ERRORS = (Exception, SystemExit, asyncio.CancelledError)
"""What an agent may end with, and the gateway go on: also what a thread of it that ran asyncio, or a command-line
parser, may raise. `trio.Cancelled` and `KeyboardInterrupt` are for others."""

_log = structlog.get_logger(__name__)


def outcome_of(
    stop_reason: str | None, failure: ErrorInfo | None, limits: Limits
) -> tuple[TurnOutcome, ErrorInfo | None]:
    """The outcome of a turn whose agent is done: why it was stopped counts before what its agent did then."""
    if stop_reason == "turn_too_large":
        message = f"the turn wrote more than {limits.max_turn_bytes:,} bytes"
        return "failed", ErrorInfo(code="turn_too_large", message=message)
    if stop_reason == "detached":
        message = "nobody was attached for too long"
        return "aborted", ErrorInfo(code="detached", message=message, retryable=True)
    if stop_reason == "timed_out":
        message = f"the turn ran for more than {limits.max_turn_ms:,} ms"
        return "timed_out", ErrorInfo(code="timed_out", message=message, retryable=True)
    if stop_reason is not None:
        return stop_reason, None  # type: ignore[return-value]
    return ("completed", None) if failure is None else ("failed", failure)


def explain(exc: BaseException, reference: str, **where: Any) -> ErrorInfo:
    """The error for the client. Unless the agent chose it with `TurnFailed`, it has nothing but a `reference`.

    Everything that is no `TurnFailed` goes to the operator's log with that reference and `where` (ids). Never raises,
    whatever the exception's own methods do.
    """
    found = list(leaves(exc))
    chosen = next((leaf for leaf in found if isinstance(leaf, TurnFailed)), None)
    other = next((leaf for leaf in found if not isinstance(leaf, TurnFailed)), None)
    if other is not None:
        event = {**where, "reference": reference, "error": _describe(other)}
        try:
            _log.error("agent_failed", **event, exc_info=exc)
        except Exception:
            # A traceback that cannot be rendered or written must not cost the session.
            with suppress(Exception):
                _log.error("agent_failed", **event)
    if chosen is None:
        return ErrorInfo(code="agent_error", message=f"the agent failed (reference {reference})", retryable=True)
    return ErrorInfo(
        code=_clean(chosen.code, MAX_CODE) or "agent_error",
        message=_clean(chosen.message, MAX_MESSAGE),
        retryable=bool(chosen.retryable),
    )


def leaves(exc: BaseException) -> Iterator[BaseException]:
    """The exceptions of a group, however deep; one that is no group by itself."""
    if isinstance(exc, BaseExceptionGroup):
        for item in exc.exceptions:
            yield from leaves(item)
    else:
        yield exc


def _describe(exc: BaseException) -> str:
    try:
        text = str(exc)
    except Exception:
        text = "(its text cannot be shown)"
    return _clean(f"{type(exc).__name__}: {text}", MAX_MESSAGE)


def _clean(text: object, most: int) -> str:
    """Text that every encoder takes: an agent may put anything into its errors."""
    return (text if isinstance(text, str) else type(text).__name__)[:most].encode(errors="replace").decode()


def refusal(
    request_id: str, code: str, why: str, retry_after_ms: int | None = None, credit: int | None = None
) -> Error:
    """The answer to a message that was not taken."""
    conflict = code == "request_id_conflict"
    return Error(
        code=code,
        message=f"field 'request_id': {why}" if conflict else why,
        retryable=not conflict,
        retry_after_ms=retry_after_ms,
        request_id=request_id,
        credit=credit,
    )
