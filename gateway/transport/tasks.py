"""A nursery that does not dress up the exceptions of its body.

What a user writes in ``async with open_session(...):`` runs inside a nursery of ours, and a strict nursery wraps
whatever leaves it into an `ExceptionGroup`. A user who writes ``except ValueError`` around the block does not know of
our tasks and must not have to.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def open_plain_nursery() -> AsyncIterator[trio.Nursery]:
    """Open a nursery for background tasks that do not raise; an exception of the body comes out as it is.

    Leaving the block cancels the tasks and waits for them: they live only as long as the body. A task that does raise
    (a bug of ours) cancels the body, and the group comes out as from any nursery.
    """
    failure: BaseException | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        except BaseException as exc:  # noqa: ASYNC103 - raised below
            # Kept only until the tasks have ended: raised in here, it would come out wrapped. That holds for a
            # cancellation too, whose scope is around this function.
            failure = exc
        nursery.cancel_scope.cancel()
    if failure is not None:
        context = failure.__context__
        try:
            raise failure
        finally:
            failure.__context__ = context
            del failure, context
