"""Agents for PraisonAI's client. ``PRAISON_STOP`` names a file: while it is not there, `stream` goes on."""

from __future__ import annotations

import os
from pathlib import Path

import trio

from gateway import Turn, TurnFailed

MOST = 100_000
"""Tokens after which a stream ends anyway: a test that failed must not leave it running."""


async def stream(turn: Turn) -> None:
    """Tokens for as long as the test likes; with one that is sealed now and then, and a tool call among them."""
    stop = Path(os.environ["PRAISON_STOP"])
    for n in range(MOST):
        await turn.send(f"{n} ")
        if n == 20:
            call = await turn.tool_call("look", {"n": n})
            await turn.tool_result(call, "seen")
        if n % 10 == 0:
            await trio.sleep(0.005)
            if await trio.Path(stop).exists():
                break


async def ask(turn: Turn) -> str:
    allowed = await turn.ask("approval", "Delete 3 files?", timeout=60)
    colour = await turn.ask("choice", "Which colour?", options=["red", "blue"], timeout=60)
    name = await turn.ask("input", "Your name?", timeout=60)
    return f"{allowed} {colour} {name}"


async def fail(turn: Turn) -> None:
    await turn.send("so far ")
    raise TurnFailed("quota", "No credit left; add some.", retryable=True)


async def echo(turn: Turn) -> str:
    return f"echo: {turn.input.content}"


async def assistant(turn: Turn) -> None:
    for word in ("You ", "said ", f"{turn.input.content}."):
        await turn.send(word)
