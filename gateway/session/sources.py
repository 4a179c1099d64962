"""Time, ids and chance, as one object: a simulation hands in its own, and the same seed gives the same run."""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Callable

from attrs import frozen


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


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
    new_id: Callable[[], str] = lambda: secrets.token_urlsafe(9)
    chance: Callable[[], float] = random.random
    timer: Callable[[], float] = time.perf_counter
