"""The built-in demo agent: answers with the user's own words, streamed, and shows every feature on a command.

It needs no model and no network, so that a gateway can be tried, and a client tested, with nothing else installed.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import trio
from attrs import field, frozen

from gateway.agents.options import number
from gateway.errors import TurnFailed
from gateway.protocol.messages import Input

if TYPE_CHECKING:
    from gateway.session import Turn

MAX_PAUSES = 100
"""Pauses in one answer: a long text comes in longer pieces, so that no answer takes minutes."""

MAX_SLOW = 600
"""Seconds for /slow; ``limits.max_turn_ms`` has the last word."""

MAX_LONG = 100_000
"""Words for /long: about 700 KB, ten segments."""

_WORDS = re.compile(r"\s*\S+\s*|\s+")
_FILLER = ("streams", "reach", "the", "sea", "by", "small", "and", "steady", "steps;")


@frozen(kw_only=True)
class DemoOptions:
    """Options of the kind ``demo``: `delay_ms` is the pause between two pieces of streamed text."""

    delay_ms: int = field(default=30, validator=number(0, 10_000))


class Demo:
    """The agent. Stateless: one serves every session."""

    def __init__(self, options: DemoOptions | None = None) -> None:
        self._pause = (options or DemoOptions()).delay_ms / 1000

    async def __call__(self, turn: Turn) -> None:
        for message in turn.inputs:
            await self._answer(turn, message)
        while more := turn.steered():
            for message in more:
                await self._say(turn, f"\nAnd you said: {message.content}")

    async def _answer(self, turn: Turn, message: Input) -> None:
        text = message.content
        found = re.fullmatch(r"/(\w+)(?:\s+(.*))?", text.strip(), re.DOTALL)
        command = COMMANDS.get(found[1]) if found else None
        if found is None:
            await self._say(turn, f"You said: {text}")
        elif command is None:
            await self._say(turn, f"You said: {text} (/{found[1]} is no command; /help lists them)")
        else:
            await command(self, turn, found[2] or "")

    async def _say(self, turn: Turn, text: str, channel: str = "answer") -> None:
        words = _WORDS.findall(text)
        step = -(-len(words) // MAX_PAUSES)
        for start in range(0, len(words), step):
            await turn.send("".join(words[start : start + step]), channel)
            await trio.sleep(self._pause)

    async def _help(self, turn: Turn, rest: str) -> None:
        lines = [f"/{name}  {what}" for name, what in HELP.items()]
        await self._say(turn, "\n".join(["Anything else is answered with your own words.", *lines]))

    async def _slow(self, turn: Turn, rest: str) -> None:
        seconds = _amount(rest, "/slow 10", MAX_SLOW)
        ticks = max(1, round(seconds * 5))
        await turn.send(f"{seconds:g} seconds:")
        for tick in range(1, ticks + 1):
            await trio.sleep(seconds / ticks)
            await turn.send(f" {tick}")
            await turn.progress("slow", {"done": tick, "of": ticks})

    async def _long(self, turn: Turn, rest: str) -> None:
        count = int(_amount(rest, "/long 3000", MAX_LONG))
        for number_ in range(1, count + 1):
            await turn.send(f"{number_}:{_FILLER[number_ % len(_FILLER)]} ")

    async def _think(self, turn: Turn, rest: str) -> None:
        subject = rest or "nothing in particular"
        await self._say(turn, f"The user wants me to think about {subject}. Thinking.", "reasoning")
        await self._say(turn, f"I have thought about {subject}.")

    async def _tool(self, turn: Turn, rest: str) -> None:
        text = rest or "how many words are these"
        call_id = await turn.tool_call("count_words", {"text": text})
        await trio.sleep(self._pause)
        words = len(text.split())
        await turn.tool_result(call_id, {"words": words})
        await self._say(turn, f"The tool counted {words} words in: {text}")

    async def _ask(self, turn: Turn, rest: str) -> None:
        allowed = await turn.ask("approval", rest or "Shall I go on?")
        await self._say(turn, "You approved: I go on." if allowed else "Not approved: I stop here.")

    async def _choose(self, turn: Turn, rest: str) -> None:
        options = rest.split() or ["tea", "coffee", "water"]
        chosen = await turn.ask("choice", "Which one?", options=options)
        await self._say(turn, "You chose nothing." if chosen is None else f"You chose: {chosen}")

    async def _name(self, turn: Turn, rest: str) -> None:
        name = await turn.ask("input", rest or "What is your name?")
        await self._say(turn, "No answer." if name is None else f"Hello, {name}!")

    async def _state(self, turn: Turn, rest: str) -> None:
        key, equals, value = rest.partition("=")
        if equals and key.strip():
            # An empty value removes the key, as a merge patch does.
            await turn.update_state({key.strip(): value.strip() or None})
        known = ", ".join(f"{name}={item}" for name, item in sorted(turn.state.items()))
        await self._say(turn, f"State: {known or 'empty; set something with /state key=value'}")

    async def _history(self, turn: Turn, rest: str) -> None:
        said = [event.content for event in turn.transcript if isinstance(event, Input)]
        await self._say(turn, f"You have sent {len(said)} messages. The first was: {said[0]}")

    async def _fail(self, turn: Turn, rest: str) -> None:
        await self._say(turn, "I am about to fail.")
        raise TurnFailed("demo_failure", rest or "failed as asked; send something else", retryable=False)

    async def _crash(self, turn: Turn, rest: str) -> None:
        raise RuntimeError(rest or "crashed as asked")


def _amount(text: str, example: str, most: int) -> float:
    try:
        amount = float(text)
    except ValueError:
        amount = -1.0
    if not 0 < amount <= most:
        raise TurnFailed("demo_usage", f"expected a number up to {most:,}, as in: {example}")
    return amount


COMMANDS: dict[str, Callable[[Demo, Turn, str], Awaitable[None]]] = {
    name.removeprefix("_"): getattr(Demo, name)
    for name in (
        "_help", "_slow", "_long", "_think", "_tool", "_ask", "_choose", "_name", "_state", "_history", "_fail",
        "_crash",
    )
}  # fmt: skip

HELP = {
    "slow N": "answers for N seconds, with progress",
    "long N": "answers N words as fast as it can",
    "think TEXT": "streams reasoning before the answer",
    "tool TEXT": "calls a tool",
    "ask QUESTION": "asks for an approval",
    "choose A B C": "asks for a choice",
    "name QUESTION": "asks for a line of text",
    "state KEY=VALUE": "changes the session's state",
    "history": "says how many messages it knows",
    "fail MESSAGE": "ends the turn with a typed error",
    "crash": "raises an exception",
}

echo = demo = Demo()

DEMO_AGENTS = ("echo", "demo")
"""Ids under which a gateway that was told of no agent serves this one. The first is the default."""
