"""PraisonAI's own client, unmodified, in a process of its own: run by the Python of `praison_environment`.

    python praison_client.py '{"url": …, "agent_id": …, …}'

Each line of stdin is what an application would do: ``{"send": FRAME}``, ``{"resync": true}``, ``{"report": true}``.
Each line of stdout is what it was told: an event, a gap, a state, a report. Nothing of ours is imported here.
"""

import asyncio
import json
import logging
import sys
from typing import Any

from praisonai_bot.gateway.client import BackoffConfig, GatewayClient
from praisonaiagents.gateway import SessionProjection


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


async def read_commands(client: GatewayClient, projection: SessionProjection) -> None:
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command = json.loads(line)
        if "send" in command:
            await client.send(command["send"])
        elif "resync" in command:
            await client.resync()
        else:
            state = projection.state
            say(
                report={
                    "session_id": client._session_id,
                    "cursor": client._cursor,
                    "heartbeat_ms": client.heartbeat_ms,
                    "features": client.features,
                    "policy": client.policy,
                    "transport_gap": state.has_transport_gap,
                    "runs": {run_id: [run.text, run.done] for run_id, run in state.runs.items()},
                }
            )


async def main() -> None:
    options = json.loads(sys.argv[1])
    backoff = BackoffConfig(initial=0.02, max=0.5)
    client = GatewayClient(options["url"], options["agent_id"], token=options.get("token"), backoff=backoff)
    projection = SessionProjection()
    client.on_gap = lambda expected, received: say(gap=[expected, received])
    client.on_state_change = lambda state: say(state=state)
    client.on_reconnect_paused = lambda code, next_step: say(paused=[code.value, next_step])
    await client.connect()
    commands = asyncio.create_task(read_commands(client, projection))
    async for event in client.events():
        projection.apply(event)
        kind = event.type.value if hasattr(event.type, "value") else event.type
        say(event=kind, data=event.data, sequence=event.sequence, event_id=event.event_id)
    await commands


logging.disable(logging.CRITICAL)
asyncio.run(main())
