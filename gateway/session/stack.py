"""What keeps an agent that calls itself without end from harming others.

Such an agent meets Python's limit wherever its last call happens to be. In the middle of a call of ours, or of Trio's,
that leaves a half-done change behind in what all sessions share: a task taken out of a queue and never woken, and Trio
ends the program. So what an agent calls makes sure first that there is room.
"""

from __future__ import annotations

WAKE, DELIVER = 20, 50
"""Calls, one inside the other, that it may take to wake a task, and to publish and write to sockets: three times the
deepest way."""


def check_stack(calls: int) -> None:
    """Make sure that there is room for so many calls. It costs 40 ns for each.

    Raises:
        RecursionError: there is not. Nothing has begun.
    """
    if calls:
        check_stack(calls - 1)


def has_room(calls: int) -> bool:
    """Whether there is room for so many calls, for what can be done in a shorter way as well."""
    try:
        check_stack(calls)
    except RecursionError:
        return False
    return True
