"""The operator's log: structlog and the standard library's logging, one format, one stream (stderr).

stdout is left to what a command has to say. A level that is filtered out costs an attribute look-up and an empty call:
`make_filtering_bound_logger` replaces the method itself.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from typing import Any, Literal, TextIO, cast

import orjson
import structlog
from structlog.typing import Processor

from gateway.config import Log

THIRD_PARTY = ("hypercorn", "trio-websocket", "httpx2", "httpcore2", "httpcore")
"""Loggers that speak of every connection at ``info``; their warnings are wanted, the rest only at ``debug``."""


class _SafeStream:
    """A text stream whose reader may go away: what cannot be written is dropped.

    A log line is written from the middle of a session's task. A broken pipe must not end that task.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            return self._stream.write(text)
        return 0

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def isatty(self) -> bool:
        return not self._stream.closed and self._stream.isatty()


def set_up_logs(config: Log, stream: TextIO | None = None) -> None:
    """Route structlog and `logging` to `stream` (by default stderr). Calling it again replaces the set-up."""
    out = _SafeStream(stream or sys.stderr)
    level = getattr(logging, config.level.upper())
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last = _last_processors(config.format, colors=out.isatty())
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(cast("TextIO", out)),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(cast("TextIO", out))
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    logging.raiseExceptions = False
    logging.basicConfig(handlers=[handler], level=level, force=True)
    for name in THIRD_PARTY:
        logging.getLogger(name).setLevel(level if level == logging.DEBUG else max(level, logging.WARNING))


def _last_processors(format: Literal["console", "json"], *, colors: bool) -> list[Processor]:
    if format == "console":
        # Plain tracebacks: with rich installed, the default would print every local variable, secrets included.
        # Quoted values: a peer's text could hold escape sequences and line breaks.
        plain = structlog.dev.plain_traceback
        return [structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=plain, repr_native_str=True)]
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(serializer=_dumps)]


def _dumps(value: Any, **_: Any) -> str:
    try:
        return orjson.dumps(value, default=repr, option=orjson.OPT_NON_STR_KEYS).decode()
    except TypeError:  # what orjson refuses and a peer may send: a lone surrogate, an integer beyond 64 bits
        return json.dumps(value, default=repr)
