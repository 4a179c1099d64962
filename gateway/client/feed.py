"""Something that is told to many readers, each at its own pace."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

import trio

NEWEST = 64
"""Kept per reader: what is told this way (states, notices) is ephemeral, and the oldest goes first."""

T = TypeVar("T")


class Feed(Generic[T]):
    """One reader's view: the newest things it has not read yet.

    Args:
        news: gives the event to wait for when there is nothing, or None when nothing will come any more.
    """

    def __init__(self, news: Callable[[], trio.Event | None]) -> None:
        self._news = news
        self.items: deque[T] = deque(maxlen=NEWEST)

    def __aiter__(self) -> Feed[T]:
        return self

    async def __anext__(self) -> T:
        """Wait for the next. Cancelling is safe: nothing is lost."""
        await trio.lowlevel.checkpoint()
        while not self.items:
            news = self._news()
            if news is None:
                raise StopAsyncIteration
            await news.wait()
        return self.items.popleft()
