"""Time, ids and chance, as one object: a simulation hands in its own, and the same seed gives the same run."""

from __future__ import annotations

import os
import random
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable

from attrs import frozen

ID_BYTES = 9


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


class _Ids:
    """Ids from the operating system's random bytes, read 512 at a time: a system call for each costs 5 µs."""

    def __init__(self) -> None:
        self._ready: list[str] = []
        os.register_at_fork(after_in_child=self._ready.clear)  # two processes must not use the same ones

    def __call__(self) -> str:
        if not self._ready:
            text = urlsafe_b64encode(os.urandom(ID_BYTES * 512)).decode()
            width = ID_BYTES * 4 // 3
            self._ready += [text[i : i + width] for i in range(0, len(text), width)]
        return self._ready.pop()


_new_id = _Ids()


@frozen
class Sources:
    """Where a gateway takes from what is not in its input.

    Args:
        now_ms: wall-clock time in integer milliseconds.
        new_id: 12 URL-safe characters that nobody can guess: knowing a session's or ask's id must not be luck.
        chance: a float in 0..1.
        timer: seconds, to measure how long something took.
    """

    now_ms: Callable[[], int] = _now_ms
    new_id: Callable[[], str] = _new_id
    chance: Callable[[], float] = random.random
    timer: Callable[[], float] = time.perf_counter
