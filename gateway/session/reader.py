"""A connection, as its session sees it, and a reply that has to wait for several things."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from gateway.protocol.messages import Member, ServerFrame


class Reader(Protocol):
    """All synchronous: what a session tells its readers happens in the step in which it happens."""

    member: Member
    told_no_credit: bool
    """Whether the client was last told ``credit: 0``, and so must hear when there is room."""

    def wake(self) -> None:
        """There is something new behind the reader's cursor."""

    def push(self, frame: ServerFrame) -> None:
        """Send a frame without a number; droppable ones are dropped for a client that is behind."""

    def session_failed(self) -> None:
        """The session ended by an error of its own: close with 1011."""


def after_calls(count: int, done: Callable[[], None]) -> Callable[[], None]:
    """A function that calls `done` when it is called for the last of `count` times."""
    left = count

    def one() -> None:
        nonlocal left
        left -= 1
        if not left:
            done()

    return one
