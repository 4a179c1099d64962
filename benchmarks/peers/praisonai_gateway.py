"""PraisonAI's own gateway, with agents that stream: ``python -m benchmarks.peers.praisonai_gateway PORT``.

Its agents stream through an emitter that belongs to the agent and calls every session that runs a turn, so there is
one agent per connection. Limits on what one address may do are raised as its configuration allows.
"""

from __future__ import annotations

import asyncio
import logging
import sys

from praisonai_bot.gateway.server import WebSocketGateway
from praisonaiagents.gateway.config import GatewayConfig
from praisonaiagents.streaming.events import StreamEvent, StreamEventEmitter, StreamEventType

from benchmarks.texts import piece

AGENTS = 2000


class Bench:
    """An agent as the gateway uses it. It runs on the gateway's loop, which is cheaper than its other way, a thread."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.stream_emitter = StreamEventEmitter()

    async def achat(self, content: str) -> str:
        _, tag, count, interval = content.split()
        for number in range(int(count)):
            if interval != "None":
                await asyncio.sleep(0)
            self.stream_emitter.emit(StreamEvent(type=StreamEventType.DELTA_TEXT, content=piece(tag, number)))
        self.stream_emitter.emit(StreamEvent(type=StreamEventType.STREAM_END))
        return "done"


def main(port: str) -> None:
    logging.basicConfig(level=logging.WARNING)
    config = GatewayConfig(
        host="127.0.0.1",
        port=int(port),
        auth_token="a-token-for-benchmarks",
        max_connections=AGENTS,
        max_queued_frames=0,
        max_buffered_bytes=1 << 30,
    )
    gateway = WebSocketGateway(host="127.0.0.1", port=int(port), config=config)
    for number in range(AGENTS):
        gateway.register_agent(Bench(f"bench{number}"), f"bench{number}")
    asyncio.run(gateway.start())


if __name__ == "__main__":
    main(*sys.argv[1:])
