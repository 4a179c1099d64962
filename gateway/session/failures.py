"""What the client, and what the operator, gets to know of an agent's exception."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import structlog

from gateway.errors import TurnFailed
from gateway.protocol.messages import ErrorInfo

MAX_CODE, MAX_MESSAGE = 64, 4096
"""Characters of what a `TurnFailed` may say to the client: a word, and a paragraph. The rest is cut off."""

_log = structlog.get_logger(__name__)


def explain(exc: BaseException, reference: str, **where: Any) -> ErrorInfo:
    """The error for the client. Unless the agent chose it with `TurnFailed`, it has nothing but a `reference`.

    Everything that is no `TurnFailed` goes to the operator's log with that reference and `where` (ids). Never raises,
    whatever the exception's own methods do.
    """
    leaves = list(_leaves(exc))
    chosen = next((leaf for leaf in leaves if isinstance(leaf, TurnFailed)), None)
    other = next((leaf for leaf in leaves if not isinstance(leaf, TurnFailed)), None)
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


def _leaves(exc: BaseException) -> Iterator[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        for item in exc.exceptions:
            yield from _leaves(item)
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
