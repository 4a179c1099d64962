"""A session's transcript as the messages of a chat-completions request."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gateway.protocol import codec
from gateway.protocol.messages import Event, Input, Output, ToolCall, ToolResult

ChatMessage = dict[str, Any]


def to_chat(
    transcript: Iterable[Event], *, system: str | None = None, max_history: int | None = None
) -> list[ChatMessage]:
    """Map events to messages, oldest first.

    The outputs of a turn on the channel ``answer`` are one assistant message, the segments of a long answer and the
    partial text of an interrupted one included; other channels (reasoning) are left out, as servers ask for. Inputs
    without an answer between them are one user message, because many chat templates want the roles to alternate.
    A tool call is shown together with its result; a call that got none is left out, because servers refuse it.

    Args:
        max_history: at most so many messages, newest kept, beginning with a user's.
    """
    events = list(transcript)
    results = {event.call_id: event for event in events if isinstance(event, ToolResult)}
    messages: list[ChatMessage] = []
    last_output: Output | None = None
    for event in events:
        if isinstance(event, Input):
            if messages and messages[-1]["role"] == "user":
                messages[-1]["content"] += f"\n\n{event.content}"
            else:
                messages.append({"role": "user", "content": event.content})
        elif isinstance(event, Output) and event.channel == "answer" and event.content:
            if messages and messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]:
                joint = "" if last_output is not None and last_output.turn_id == event.turn_id else "\n\n"
                messages[-1]["content"] += joint + event.content
            else:
                messages.append({"role": "assistant", "content": event.content})
            last_output = event
        elif isinstance(event, ToolCall) and event.call_id in results:
            messages += _tool_messages(event, results.pop(event.call_id))
    if max_history is not None and len(messages) > max_history:
        messages = messages[-max_history:]
        while messages[0]["role"] != "user" and any(message["role"] == "user" for message in messages):
            del messages[0]
    return [{"role": "system", "content": system}, *messages] if system else messages


def _tool_messages(call: ToolCall, result: ToolResult) -> list[ChatMessage]:
    function = {"name": call.name, "arguments": _as_text(call.arguments)}
    return [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": call.call_id, "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": call.call_id, "content": _as_text(result.result)},
    ]


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else codec.dump_json(value).decode()
