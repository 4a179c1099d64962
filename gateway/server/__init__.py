"""The server: `open_gateway` runs one; `Gateway` is it. Inside: `listener` (admission, crash barrier), `connection`
(reader and cursor), `flusher` (the one writer), `auth` (who a connection speaks for)."""

from gateway.server.auth import Authenticate, Identity, unauthorized
from gateway.server.gateway import Gateway, Statistics, open_gateway

__all__ = ["Authenticate", "Gateway", "Identity", "Statistics", "open_gateway", "unauthorized"]
