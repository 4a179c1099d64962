"""A `Turn` without an engine: it records what an agent says. Same names, same errors, no limits."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, cast

import trio

from gateway.errors import TurnClosed
from gateway.protocol.messages import Event, Input, Output, RequestId
from gateway.protocol.patch import merge_patch
from gateway.session import Turn


def said(content: str, request_id: str = "r1", **more: Any) -> Input:
    return Input(request_id=RequestId(request_id), content=content, **more)


class FakeTurn:
    """`calls` holds every write as a tuple, in order: ``("send", "answer", "Hello ")``.

    Args:
        answers: what asks get, in order. An ask beyond them waits for ever.
        before: the transcript before this turn's inputs.
    """

    session_id = "s_1"
    turn_id = "t_1"
    subject = "alice"
    attempt = 1

    def __init__(self, *inputs: str, answers: Sequence[Any] = (), before: Sequence[Event] = ()) -> None:
        texts = inputs or ("Hello",)
        self.inputs = tuple(said(text, f"r{number}") for number, text in enumerate(texts, 1))
        self.input = self.inputs[0]
        self.transcript: tuple[Event, ...] = (*before, *self.inputs)
        self.state: dict[str, Any] = {}
        self.calls: list[tuple[Any, ...]] = []
        self.closed = False
        self.steering: list[Input] = []
        self._answers = list(answers)
        self._wrote = trio.Event()

    async def _write(self, *call: Any) -> None:
        if self.closed:
            raise TurnClosed("turn t_1 has ended")
        self.calls.append(call)
        self._wrote.set()
        self._wrote = trio.Event()
        await trio.lowlevel.checkpoint()

    async def send(self, text: str, channel: str = "answer") -> None:
        await self._write("send", channel, text)

    async def reason(self, text: str) -> None:
        await self.send(text, "reasoning")

    async def output(self, content: str, channel: str = "answer", metadata: Mapping[str, Any] | None = None) -> None:
        await self._write("output", channel, content, dict(metadata or {}))

    async def progress(self, key: str, data: Any) -> None:
        await self._write("progress", key, data)

    async def tool_call(self, name: str, arguments: Any = None, call_id: str | None = None) -> str:
        call_id = call_id or f"call_{len(self.calls)}"
        await self._write("tool_call", name, arguments, call_id)
        return call_id

    async def tool_result(self, call_id: str, result: Any = None, is_error: bool = False) -> None:
        await self._write("tool_result", call_id, result, is_error)

    async def custom(self, name: str, data: Any = None) -> None:
        await self._write("custom", name, data)

    async def update_state(self, patch: Mapping[str, Any]) -> None:
        await self._write("state", dict(patch))
        self.state = merge_patch(self.state, dict(patch))

    async def ask(
        self, kind: str, prompt: str, options: Sequence[Any] | None = None, timeout: float | None = None
    ) -> Any:
        if kind == "choice" and not options:
            raise ValueError("options: a choice needs at least one")
        await self._write("ask", kind, prompt, options, timeout)
        if not self._answers:
            await trio.sleep_forever()
        return self._answers.pop(0)

    def steered(self) -> list[Input]:
        taken, self.steering = self.steering, []
        return taken

    # for tests

    def text(self, channel: str = "answer") -> str:
        """What was sent on `channel`."""
        return "".join(call[2] for call in self.calls if call[:2] == ("send", channel))

    def of(self, *kinds: str) -> list[tuple[Any, ...]]:
        """The writes of some kinds, in order."""
        return [call for call in self.calls if call[0] in kinds]

    async def wait_for(self, condition: Callable[[FakeTurn], object]) -> None:
        """Wait until what was written fulfils `condition`; at most 10 s."""
        with trio.fail_after(10):
            while not condition(self):
                await self._wrote.wait()


async def run(agent: Callable[[Turn], Awaitable[str | None]], turn: FakeTurn) -> str | None:
    """Run an agent to its end, for at most 30 s."""
    with trio.fail_after(30):
        return await agent(cast("Turn", turn))


def answered(text: str, turn_id: str = "t_0", **more: Any) -> Output:
    return Output(turn_id=turn_id, channel="answer", content=text, **more)
