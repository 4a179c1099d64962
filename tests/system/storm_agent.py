"""The agent of the storm: streams a little, slowly enough to be killed in the middle."""

from __future__ import annotations

import trio

from gateway import Turn


async def storm(turn: Turn) -> None:
    for i in range(12):
        await turn.send(f"{turn.input.request_id}:{i} ")
        await trio.sleep(0.004)
    await turn.update_state({"last": turn.input.request_id})
