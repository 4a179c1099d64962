"""The whole way with a real model: its server, the agent, a gateway, a line cut in mid-answer, a client."""

from __future__ import annotations

import pytest
import trio
from cutting_proxy import open_proxy

from gateway import AgentConfig, Config, Server, open_gateway, open_session
from gateway.agents import build_agent
from gateway.protocol.messages import Delta, Output, TurnEnded


@pytest.mark.model
async def test_the_answer_is_whole_though_the_line_was_cut(model_url: str) -> None:
    options = {"base_url": model_url, "model": "any", "max_tokens": 120, "temperature": 0.0}
    agent = build_agent("assistant", AgentConfig(run="openai", options=options))
    async with open_gateway(Config(server=Server(port=0)), {"assistant": agent}) as gateway:
        async with open_proxy(gateway.address) as proxy:
            async with open_session(proxy.url, "assistant") as session:
                with trio.fail_after(180):
                    await session.send("Tell me a story about a lighthouse, in ten sentences.")
                    deltas, turn_id, cuts = 0, "", 0
                    outputs: list[str] = []
                    async for event in session:
                        if isinstance(event, Delta):
                            deltas += 1
                            if deltas in (5, 12):
                                cuts += 1
                                proxy.cut()
                        elif isinstance(event, Output) and event.channel == "answer":
                            outputs.append(event.content)
                        elif isinstance(event, TurnEnded):
                            turn_id = event.turn_id
                            assert event.outcome == "completed", event.error
                            break
                text = session.text_of(turn_id)
        assert cuts == 2
        assert session.statistics().reconnects >= 2
        assert session.statistics().gaps == 0
        # What the client has is what the gateway's log says the model said.
        (kept,) = gateway.registry.sessions.values()
        said = "".join(e.content for e in kept.log if isinstance(e, Output) and e.channel == "answer")
        assert text == "".join(outputs) == said
        assert len(text) > 100
