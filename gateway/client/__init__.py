"""The Python client: a session that outlives its connections.

    async with open_session("ws://127.0.0.1:8765/ws", "echo") as session:
        await session.send("hello")
        async for event in session:
            ...

Layout: `session` (the trio part: `open_session`, `Session`), `core` (what it decides, without I/O), `buffer`, `texts`,
`feed`, `states` (what users observe), `seam` (what a session needs from outside). The socket is
`gateway.transport.dial`.
"""

from gateway.client.seam import Connect, Socket
from gateway.client.session import Session, open_session
from gateway.client.states import Connection, Statistics
from gateway.transport.dial import over

__all__ = ["Connect", "Connection", "Session", "Socket", "Statistics", "open_session", "over"]
