"""A transcript as chat messages."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from fake_turn import answered, said

from gateway.agents.chat import ChatMessage, to_chat
from gateway.protocol.messages import Answered, Event, Output, ToolCall, ToolResult, TurnEnded


def user(text: str) -> ChatMessage:
    return {"role": "user", "content": text}


def assistant(text: str) -> ChatMessage:
    return {"role": "assistant", "content": text}


def reasoning(text: str) -> Output:
    return Output(turn_id="t_0", channel="reasoning", content=text)


ENDED = TurnEnded(turn_id="t_0", outcome="completed")


@pytest.mark.parametrize(
    ("events", "messages"),
    [
        ([said("a")], [user("a")]),
        ([said("a"), answered("b"), ENDED, said("c")], [user("a"), assistant("b"), user("c")]),
        # the segments of a long answer
        ([said("a"), answered("b", metadata={"more": True}), answered("c"), ENDED], [user("a"), assistant("bc")]),
        # an interrupted answer stays what it was
        ([said("a"), answered("b", metadata={"partial": True}), said("c")], [user("a"), assistant("b"), user("c")]),
        # no answer at all: the roles alternate all the same
        ([said("a"), TurnEnded(turn_id="t_0", outcome="failed"), said("b")], [user("a\n\nb")]),
        # reasoning is not sent back, answers to asks are no messages
        ([said("a"), reasoning("hm"), Answered(turn_id="t_0", ask_id="a_1", value=True), answered("b")],
         [user("a"), assistant("b")]),
        # two turns that answered without an input between
        ([said("a"), answered("b", "t_0"), answered("c", "t_1")], [user("a"), assistant("b\n\nc")]),
    ],
)  # fmt: skip
def test_messages(events: Sequence[Event], messages: list[ChatMessage]) -> None:
    assert to_chat(events) == messages


def test_a_tool_call_comes_with_its_result() -> None:
    events = [
        said("a"),
        ToolCall(turn_id="t_0", call_id="c1", name="look", arguments={"at": 1}),
        ToolCall(turn_id="t_0", call_id="c2", name="lost", arguments={}),
        ToolResult(turn_id="t_0", call_id="c1", result={"seen": True}),
        answered("b"),
    ]
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at":1}'}}
    assert to_chat(events) == [
        user("a"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": '{"seen":true}'},
        assistant("b"),
    ]


def test_the_history_is_bounded_and_begins_with_a_user() -> None:
    events: list[Event] = []
    for number in range(5):
        events += [said(f"q{number}"), answered(f"a{number}", f"t_{number}")]
    events.append(said("now"))
    assert to_chat(events, system="S", max_history=4) == [
        {"role": "system", "content": "S"},
        user("q4"),
        assistant("a4"),
        user("now"),
    ]
    assert to_chat(events, max_history=1) == [user("now")]
