"""Who a connection speaks for: the seam for authentication, and the two ways that are built in."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Mapping

import trio
from attrs import frozen

from gateway.errors import HandshakeRefused


@frozen
class Identity:
    """A subject, and until when it may be believed (ms since the epoch; None for ever)."""

    subject: str
    expires_at: int | None = None

    def expired(self, now: int) -> bool:
        """Whether it may no longer be believed at `now` (ms)."""
        return self.expires_at is not None and self.expires_at <= now


Authenticate = Callable[[str | None], Awaitable[Identity]]
"""Turns a token (None if the client sent none) into an `Identity`, or raises `unauthorized`."""

ANONYMOUS = "anonymous"


def unauthorized(why: str, *, close_reason: str = "unauthorized") -> HandshakeRefused:
    """The refusal of a token."""
    return HandshakeRefused(
        "unauthorized",
        why,
        close_code=4401,
        close_reason=close_reason,
        next_step="Get a valid token and send it in the hello, as Authorization: Bearer, or as a subprotocol.",
    )


async def anyone(token: str | None) -> Identity:
    """Everybody is the same subject; for a gateway on a loopback address or behind something that authenticates."""
    await trio.lowlevel.checkpoint()
    return Identity(ANONYMOUS)


def by_token(tokens: Mapping[str, str]) -> Authenticate:
    """Subjects known by a secret of their own (``[server.tokens]``)."""

    async def authenticate(token: str | None) -> Identity:
        await trio.lowlevel.checkpoint()
        found: str | None = None
        if token is not None:
            # Every one is compared, in constant time: the time taken says nothing about which was close.
            for subject, secret in tokens.items():
                if hmac.compare_digest(secret.encode(), token.encode()):
                    found = subject
        if found is None:
            raise unauthorized("a token is required" if token is None else "the token is not known")
        return Identity(found)

    return authenticate


def origin_allowed(origin: str | None, host: str | None, allowed: tuple[str, ...]) -> bool:
    """Whether a browser page of `origin` may connect: none given (no browser), the gateway's own host, or listed.

    A page of any site can open a WebSocket to localhost; without this check it could talk to everyone's gateway.
    """
    if origin is None or "*" in allowed or origin in allowed:
        return True
    return host is not None and origin.partition("://")[2] == host
