"""A gateway's address as a user gives it, and whom to trust there."""

from __future__ import annotations

import ssl
from contextlib import suppress
from urllib.parse import urlsplit

from gateway.errors import ConfigError


def complete_url(url: str) -> str:
    """Add the gateway's usual path to an address without one."""
    with suppress(ValueError):
        parts = urlsplit(url)
        if parts.scheme in ("ws", "wss") and parts.path in ("", "/") and not parts.query:
            return parts._replace(path="/ws").geturl()
    return url


def trusting(ca: str | None) -> ssl.SSLContext | None:
    """What verifies the gateway's certificate; None is the system's own way."""
    if ca is None:
        return None
    try:
        return ssl.create_default_context(cafile=ca)
    except ssl.SSLError:
        raise ConfigError("--ca", f"{ca} holds no certificate; expected a PEM file") from None
    except OSError as exc:
        raise ConfigError("--ca", f"cannot read {ca}: {exc.strerror}") from None
