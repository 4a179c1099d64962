"""What turns a user's callable into an agent (placeholder until `shapes` lands: coroutine functions only)."""

from __future__ import annotations

from typing import Any


def as_agent(obj: Any, *, name: str, limiter: Any = None) -> Any:
    return obj
