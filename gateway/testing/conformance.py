"""The agent that conformance vectors talk to: ``trio-gateway run conformance=gateway.testing.conformance:agent``.

What it does is part of the vectors' format (``docs/reference/vectors.md``), so that other gateways can have one too:
small, and the same at every run. It does what an input's text says:

    echo TEXT             completes with TEXT as its output
    stream N              streams "1 ", "2 ", … "N ", and completes
    hold N                the same, then waits until it is stopped
    text N                completes with N times "x"
    ask KIND [MS]         asks (a choice is of "a", "b"), waits MS at most, completes with the answer as JSON
    gate TEXT             asks for an input, then completes with TEXT: it runs until it is answered
    inputs                completes with the texts of the turn's inputs, joined by "|"
    steer                 asks for an input, then completes with the texts that it was steered with, joined by "|"
    progress              reports progress twice under one key, asks for an input, completes
    tool                  calls a tool "add" with {"a": 1, "b": 2}, whose result is 3, and completes
    state JSON            merges an object into the session's state, and completes with the state as JSON
    blobs N SIZE          writes N events "blob" with {"n": 1, "data": SIZE times "x"}, ..., and completes with N
    custom                writes an event "note" with {"n": 1}, and completes
    reason TEXT           says TEXT on the channel "reasoning", "ok" on "answer"
    fail CODE MESSAGE     ends its turn with this error, not retryable
    crash                 raises an error of the language
"""

from __future__ import annotations

import json
from typing import Any

import trio

from gateway import Turn
from gateway.errors import TurnFailed

CHUNK = 16 * 1024
"""Of ``text``: pieces that do not each fill an outbox."""


async def agent(turn: Turn) -> str | None:
    """Do what the first input says."""
    command, _, rest = turn.input.content.partition(" ")
    match command:
        case "echo":
            return rest
        case "stream" | "hold":
            for number in range(1, int(rest) + 1):
                await turn.send(f"{number} ")
            if command == "hold":
                await trio.sleep_forever()
            return None
        case "text":
            for start in range(0, int(rest), CHUNK):
                await turn.send("x" * min(CHUNK, int(rest) - start))
            return None
        case "ask":
            return json.dumps(await _ask(turn, *rest.split()))
        case "gate":
            await turn.ask("input", "gate")
            return rest
        case "inputs":
            return "|".join(item.content for item in turn.inputs)
        case "steer":
            await turn.ask("input", "gate")
            return "|".join(item.content for item in turn.steered())
        case "progress":
            await turn.progress("work", {"done": 1})
            await turn.progress("work", {"done": 2})
            await turn.ask("input", "gate")
            return "done"
        case "tool":
            call_id = await turn.tool_call("add", {"a": 1, "b": 2})
            await turn.tool_result(call_id, 3)
            return "3"
        case "state":
            await turn.update_state(json.loads(rest))
            return json.dumps(turn.state, sort_keys=True)
        case "blobs":
            count, size = map(int, rest.split())
            for number in range(1, count + 1):
                await turn.custom("blob", {"n": number, "data": "x" * size})
            return str(count)
        case "custom":
            await turn.custom("note", {"n": 1})
            return "noted"
        case "reason":
            await turn.reason(rest)
            return "ok"
        case "fail":
            code, _, message = rest.partition(" ")
            raise TurnFailed(code, message)
        case "crash":
            raise RuntimeError("crashed as asked")
    return f"unknown command {command}"


async def _ask(turn: Turn, kind: str, timeout_ms: str | None = None) -> Any:
    timeout = None if timeout_ms is None else int(timeout_ms) / 1000
    options = ["a", "b"] if kind == "choice" else None
    return await turn.ask(kind, "which?", options=options, timeout=timeout)  # type: ignore[arg-type]
