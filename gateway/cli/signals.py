"""SIGTERM and SIGINT: the first one drains, the second ends at once, whatever the process is doing. SIGHUP reloads.

`trio.open_signal_receiver` is not used: it hands a signal to a task, and an agent that blocks the event loop would
keep that task from running. The handlers here run between two bytecodes of the main thread, so a second signal
gets through; it starts a thread that ends the process if trio cannot.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import trio

AT_ONCE_SECONDS = 1.0
"""For children to be killed and files to be closed after the second signal. What was accepted is stored already."""


@contextlib.contextmanager
def on_signals(first: Callable[[str], object], second: Callable[[], object]) -> Iterator[None]:
    """Call `first` with the name of the first signal, `second` at the second. Use inside trio, in the main thread.

    Both are called in trio's context, never in the middle of a task. The process ends with exit code 0
    `AT_ONCE_SECONDS` after the second signal if it has not by then.
    """
    token = trio.lowlevel.current_trio_token()
    count = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        with contextlib.suppress(trio.RunFinishedError):
            if count == 1:
                token.run_sync_soon(first, signal.Signals(number).name)
            elif count == 2:
                end_within(AT_ONCE_SECONDS)
                token.run_sync_soon(second)

    before: dict[int, Any] = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def on_hangup(reload: Callable[[], object]) -> Iterator[None]:
    """Call `reload` at each SIGHUP, in trio's context. Use inside trio, in the main thread."""
    token = trio.lowlevel.current_trio_token()

    def handle(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(reload, idempotent=True)

    before = signal.signal(signal.SIGHUP, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def end_within(seconds: float, code: int = 0) -> None:
    """End the process after `seconds` if it has not ended by itself, however stuck its tasks and threads are."""

    def end() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
