"""What makes an agent of a user's callable, a command or an upstream model.

`shapes` turns a callable into what the engine runs; `loader` finds it by name and knows the built-in kinds: `demo`,
`openai` (any OpenAI-compatible server; extra ``openai``) and `process` (a command that speaks JSON lines).
`options` checks an agent's table.
"""

from gateway.agents.loader import build_agent, load_agent
from gateway.agents.shapes import Agent, SyncTurn, as_agent

__all__ = ["Agent", "SyncTurn", "as_agent", "build_agent", "load_agent"]
