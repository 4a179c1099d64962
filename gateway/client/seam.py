"""What a session needs from outside: connections, and a token."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

Token = str | Callable[[], Awaitable[str]]
"""A token, or an async function that gets one: it is called before every connection, so it may refresh."""


class Socket(Protocol):
    """What a session needs of a connection; `gateway.transport.dial.ClientSocket` is one."""

    async def send(self, text: bytes, /) -> None: ...
    async def receive(self) -> bytes: ...
    async def aclose(self, code: int = ..., reason: str = ...) -> None: ...


class Connect(Protocol):
    """Opens one connection, as `gateway.transport.dial.dial` does; raises `ConnectionLost` if it cannot."""

    def __call__(
        self,
        url: str,
        *,
        headers: Sequence[tuple[str, str]],
        subprotocols: Sequence[str],
        max_message_bytes: int,
        connect_timeout: float,
        ssl_context: ssl.SSLContext | None,
    ) -> AbstractAsyncContextManager[Socket]: ...
