"""Trio, driven step by step from synchronous code: what a state machine needs whose rules are plain functions.

Theory of operation
-------------------
Trio runs in guest mode. The host here is nothing but a queue of ticks that is worked off by `Stage.do` and
`Stage.advance` until every task is blocked, and stands still in between. So that trio never goes to wait for I/O in a
thread, its main task is not blocked while the stage stands still: it has signalled that all else is, and is runnable.
The clock is a `trio.testing.MockClock` that only `Stage.advance` moves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import inf
from typing import Any, TypeVar

import outcome
import trio
import trio.testing

T = TypeVar("T")


class Stage:
    """A trio run that stands still unless it is told to go on. `close` it at the end.

    Whatever a task raises comes out of the call in which it happens, as trio would raise it; the run is over then.
    """

    def __init__(self) -> None:
        self._ticks: deque[Callable[[], object]] = deque()
        self._still = False
        self._job: Callable[[], Any] | None = None
        self._result: Any = None
        self._pause = 0.0
        self._closing = False
        self._outcome: outcome.Outcome[None] | None = None
        self._clock = trio.testing.MockClock()
        self.nursery: trio.Nursery
        """Owns what is started on the stage; cancelled by `close`."""
        trio.lowlevel.start_guest_run(
            self._main,
            run_sync_soon_threadsafe=self._ticks.append,
            done_callback=self._done,
            clock=self._clock,
            host_uses_signal_set_wakeup_fd=False,
        )
        self._go_on()

    async def _main(self) -> None:
        async with trio.open_nursery() as self.nursery:
            try:
                while not self._closing:
                    await trio.testing.wait_all_tasks_blocked()
                    self._still = True
                    await trio.lowlevel.checkpoint()  # here the stage stands still
                    job, self._job = self._job, None
                    if job is not None:
                        self._result = job()
                    pause, self._pause = self._pause, 0.0
                    if pause:
                        self._clock.autojump_threshold = 0
                        await trio.sleep(pause)
                        self._clock.autojump_threshold = inf
            finally:  # what is shielded may take its time, which nobody else lets pass now
                self._clock.autojump_threshold = 0
            self.nursery.cancel_scope.cancel()

    def _done(self, result: outcome.Outcome[None]) -> None:
        self._outcome = result

    def _go_on(self) -> None:
        self._still = False
        while not self._still and self._outcome is None:
            self._ticks.popleft()()
        if isinstance(self._outcome, outcome.Error):
            raise self._outcome.error

    @property
    def over(self) -> bool:
        """Whether the run has ended, by `close` or by an exception."""
        return self._outcome is not None

    def do(self, job: Callable[[], T]) -> T:
        """Call `job` inside the run, then go on until every task is blocked. Returns what `job` returned."""
        self._job = job
        self._go_on()
        result: T = self._result
        return result

    def advance(self, seconds: float) -> None:
        """Let time pass, from one deadline to the next, and let each have its effect."""
        self._pause = seconds
        self._go_on()

    def close(self) -> None:
        """Cancel everything that is on the stage, and end the run."""
        self._closing = True
        while self._outcome is None:
            self._go_on()
