"""trio-gateway: stands between WebSocket clients and streaming AI agents.

The layout, from the outside in (each layer uses only those after it)::

    cli        the command `trio-gateway`
    server     open_gateway: listener, connections, flusher, drain        client    open_session
    session    the engine: sessions, turns, publisher, registry           agents    what makes an agent of a callable
    transport  byte streams, WebSocket, a network in memory               store     memory, sqlite
    protocol   sans-I/O: messages, codec, covering log, snapshots, handshake
    config, errors

Start reading at `protocol`. What is named in `__all__` is public; the names are imported when first used, so a client
does not load a server.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gateway._version import __version__

if TYPE_CHECKING:
    from gateway.client import open_session
    from gateway.config import AgentConfig, Config, Limits, Log, Server, Store
    from gateway.errors import GatewayError, TurnFailed
    from gateway.server import Gateway, Identity, open_gateway
    from gateway.session import Turn

_HOME = {
    "AgentConfig": "gateway.config",
    "Config": "gateway.config",
    "Gateway": "gateway.server",
    "GatewayError": "gateway.errors",
    "Identity": "gateway.server",
    "Limits": "gateway.config",
    "Log": "gateway.config",
    "Server": "gateway.config",
    "Store": "gateway.config",
    "Turn": "gateway.session",
    "TurnFailed": "gateway.errors",
    "open_gateway": "gateway.server",
    "open_session": "gateway.client",
}

__all__ = [
    "AgentConfig",
    "Config",
    "Gateway",
    "GatewayError",
    "Identity",
    "Limits",
    "Log",
    "Server",
    "Store",
    "Turn",
    "TurnFailed",
    "__version__",
    "open_gateway",
    "open_session",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'gateway' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value
