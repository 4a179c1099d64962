"""The kind `openai` with a real language model behind a real server."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
import trio
from fake_turn import FakeTurn, answered, run, said

from gateway.agents import Agent, build_agent
from gateway.config import AgentConfig
from gateway.errors import TurnFailed

pytestmark = pytest.mark.model


SAMPLING = {"temperature": 0, "seed": 1, "cache_prompt": False}
"""The same text every time, so that the agent's can be compared with a plain request's."""


def agent(url: str, max_tokens: int = 40, **options: Any) -> Agent:
    options |= {"base_url": url, "model": "smollm2", "max_tokens": max_tokens, "extra_body": SAMPLING}
    return build_agent("llm", AgentConfig(run="openai", options=options))


async def plain_answer(url: str, *messages: tuple[str, str]) -> str:
    """What the server says to these messages when it is asked without a stream and without the gateway."""
    body = {"max_tokens": 40, "messages": [{"role": role, "content": text} for role, text in messages], **SAMPLING}
    async with httpx2.AsyncClient(timeout=60) as client:
        reply = (await client.post(f"{url}/chat/completions", json=body)).json()
    return str(reply["choices"][0]["message"]["content"])


async def busy_slots(url: str) -> int:
    async with httpx2.AsyncClient() as client:
        slots = (await client.get(url.removesuffix("/v1") + "/slots")).json()
    return sum(slot["is_processing"] for slot in slots)


async def test_it_streams_the_answer_of_the_model(model_url: str) -> None:
    turn = FakeTurn("What is the capital of France?")
    await run(agent(model_url, system="You are a helpful assistant."), turn)
    assert len(turn.of("send")) > 3
    messages = ("system", "You are a helpful assistant."), ("user", "What is the capital of France?")
    assert turn.text() == await plain_answer(model_url, *messages)


async def test_the_model_gets_the_conversation(model_url: str) -> None:
    before = [
        said("My name is Ada."),
        answered("Hello Ada!"),
        said("Are you there?"),
        answered("Y", "t_1"),
        said("Hm."),
    ]
    turn = FakeTurn("What is my name?", before=before)
    await run(agent(model_url), turn)
    assert turn.text() == await plain_answer(
        model_url,
        ("user", "My name is Ada."), ("assistant", "Hello Ada!"),
        ("user", "Are you there?"), ("assistant", "Y"),
        ("user", "Hm.\n\nWhat is my name?"),
    )  # fmt: skip


async def test_cancelling_stops_the_model(model_url: str) -> None:
    turn = FakeTurn("Tell me a very long story about a dragon.")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, agent(model_url, max_tokens=1500), turn)
        await turn.wait_for(lambda turn: len(turn.calls) >= 5)
        assert await busy_slots(model_url) == 1
        nursery.cancel_scope.cancel()
    # The model's server sees the end of the connection by itself, and has no event to wait for.
    with trio.fail_after(3):
        while await busy_slots(model_url):  # noqa: ASYNC110
            await trio.sleep(0.02)


async def test_an_answer_that_reaches_max_tokens_says_so(model_url: str) -> None:
    turn = FakeTurn("Count from 1 to 100.")
    await run(agent(model_url, max_tokens=5), turn)
    assert turn.calls[-1] == ("custom", "finish", {"reason": "length"})


async def test_a_conversation_too_long_for_the_model(model_url: str) -> None:
    with pytest.raises(TurnFailed) as caught:
        await run(agent(model_url), FakeTurn("word " * 10_000))
    assert (caught.value.code, caught.value.retryable) == ("upstream_error", False)
    assert "too long" in caught.value.message
