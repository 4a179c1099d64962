"""An agent that does what its messages say.

A message's content is a script: words like ``say:3 sleep:50 ask return``, carried out in order. So what an agent does
is part of the history that is replayed and minimised, and is the same again after a crash.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from gateway.errors import TurnFailed
from gateway.session import Turn
from gateway.testing.model import Work

if TYPE_CHECKING:
    from gateway.testing.world import World


class ScriptedAgent:
    """Does what its messages say. Words are ``NAME`` or ``NAME:NUMBER``:

    - ``say:N``, ``think:N``: N pieces of text on the channel ``answer`` or ``reasoning``; ``long:N``: N large ones
    - ``output``: a final text on ``answer``; ``progress:N``, ``state:N``, ``custom``, ``tool``: one event of that kind
    - ``ask:MS``, ``choose:MS``: a question that waits so long (0: for ever)
    - ``steer``: take what clients handed to the running turn
    - ``sleep:MS``; ``deaf:MS``: the same, and it cannot be cancelled; ``stubborn:N``: writes on after being cancelled
    - ``raise``, ``fail``: end with an exception of its own, or of the gateway's for that purpose
    - ``return``: end by returning all of ``answer``
    """

    def __init__(self, world: World) -> None:
        self._world = world

    async def __call__(self, turn: Turn) -> str | None:
        world = self._world
        await trio.lowlevel.checkpoint_if_cancelled()  # a process that was killed starts no agent any more
        history = world.histories[turn.session_id]
        work = Work(turn.turn_id, [item.request_id for item in turn.inputs], turn.attempt, history.epoch)
        history.work[turn.turn_id] = work
        world.agent_enters(history, turn.turn_id)
        world.note("agent", f"starts {turn.turn_id} for {' '.join(work.request_ids)}")
        try:
            result: str | None = None
            for item in turn.inputs:
                result = await _Script(world, turn, work, item.request_id).play(item.content)
        except trio.Cancelled:
            work.ended = "cancelled"
            raise
        except BaseException:
            work.ended = "raised"
            raise
        else:
            work.ended = "returned"
            return result
        finally:
            world.agent_leaves(history, turn.turn_id)
            world.note("agent", f"{work.ended} in {turn.turn_id}")


class _Script:
    """The script of one input within a turn."""

    def __init__(self, world: World, turn: Turn, work: Work, request_id: str) -> None:
        self._world = world
        self._turn = turn
        self._work = work
        self._name = f"{turn.session_id}/{request_id}/{turn.attempt}"
        self._count = 0

    def _text(self, size: int = 0) -> str:
        self._count += 1
        return f"{self._name}.{self._count}{'.' * size} "

    async def _write(self, channel: str, final: bool = False, size: int = 0) -> None:
        text = self._text(size)
        word = self._work.say(channel, text.strip(), final)
        word.maybe = True  # until it is handed over
        if final:
            await self._turn.output(text, channel)
        else:
            await self._turn.send(text, channel)
        word.maybe = False

    async def play(self, content: str) -> str | None:
        for word in content.split()[1:]:
            name, _, number = word.partition(":")
            if name == "return":
                words = self._work.channels.get("answer", [])
                return None if any(word.final for word in words) else "".join(f"{word.text} " for word in words) or None
            await self._do(name, int(number or 1))
        return None

    async def _do(self, name: str, n: int) -> None:
        turn = self._turn
        if name in ("say", "think", "long"):
            for _ in range(n):
                await self._write("reasoning" if name == "think" else "answer", size=400 if name == "long" else 0)
        elif name == "output":
            await self._write("answer", final=True)
        elif name == "progress":
            await turn.progress("step", n)
        elif name == "state":
            await turn.update_state({"n": n, self._name: None if n % 2 else n})
        elif name == "custom":
            await turn.custom("note", self._name)
        elif name == "tool":
            call = await turn.tool_call("look", {"at": self._name})
            await turn.tool_result(call, n)
        elif name in ("ask", "choose"):
            prompt = self._text()
            timeout = n / 1000 if n > 1 else None
            if name == "ask":
                self._work.answers[prompt] = await turn.ask("approval", prompt, timeout=timeout)
            else:
                self._work.answers[prompt] = await turn.ask("choice", prompt, options=["a", "b"], timeout=timeout)
        elif name == "steer":
            for item in turn.steered():
                self._world.note("agent", f"takes {item.request_id} into {turn.turn_id}")
        elif name == "sleep":
            await trio.sleep(n / 1000)
        elif name == "deaf":
            with trio.CancelScope(shield=True):
                await trio.sleep(n / 1000)
        elif name == "stubborn":
            try:
                await trio.sleep(n / 1000)
            finally:
                await self._write_on()  # noqa: ASYNC102 - this is what it is for
        elif name == "raise":
            raise RuntimeError(self._name)
        elif name == "fail":
            raise TurnFailed("told_to", self._name)
        else:
            raise AssertionError(f"no such word: {name}")

    async def _write_on(self) -> None:
        """Go on writing after a cancellation, for a while longer than the gateway waits."""
        with trio.CancelScope(shield=True):
            for _ in range(4):
                await trio.sleep(0.1)
                try:
                    for _ in range(6):  # more than the outbox of a tight world holds
                        await self._write("answer")
                except Exception as exc:
                    self._world.note("agent", f"is refused: {type(exc).__name__}")
