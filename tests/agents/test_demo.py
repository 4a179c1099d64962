"""The demo agent: the user's words come back, and every command shows what it says."""

from __future__ import annotations

from typing import Any

import pytest
import trio.testing
from fake_turn import FakeTurn, run, said

from gateway.agents.demo import COMMANDS, HELP, MAX_PAUSES, Demo, DemoOptions
from gateway.errors import TurnFailed


async def say(*texts: str, answers: tuple[Any, ...] = ()) -> FakeTurn:
    turn = FakeTurn(*texts, answers=answers)
    assert await run(Demo(DemoOptions(delay_ms=0)), turn) is None
    return turn


@pytest.mark.parametrize("text", ["Hello, world", " two  spaces\nand a line ", "", "日本語 🌊", "/nothing here", "/"])
async def test_plain_text_comes_back_unchanged(text: str) -> None:
    assert text in (await say(text)).text()


async def test_an_answer_comes_in_pieces_but_a_long_one_not_in_thousands() -> None:
    assert len((await say("one two three")).calls) == 5
    turn = await say("word " * 50_000)
    assert "word " * 50_000 in turn.text()
    assert len(turn.calls) <= MAX_PAUSES + 1


async def test_every_input_of_the_turn_is_answered() -> None:
    assert (await say("first", "second")).text() == "You said: firstYou said: second"


async def test_what_is_handed_in_meanwhile_is_answered() -> None:
    turn = FakeTurn("first")
    turn.steering = [said("second", "r2")]
    await run(Demo(), turn)
    assert "second" in turn.text()


def test_every_command_has_its_help() -> None:
    assert {line.split()[0] for line in HELP} | {"help"} == set(COMMANDS)


async def test_commands() -> None:
    assert "/slow N" in (await say("/help")).text()
    assert len((await say("/long 3000")).text().split()) == 3000
    slow = await say("/slow 0.2")
    assert slow.of("progress")[-1] == ("progress", "slow", {"done": 1, "of": 1})
    thought = await say("/think life")
    assert "life" in thought.text("reasoning")
    assert "life" in thought.text()
    tool = await say("/tool one two")
    assert [call[0] for call in tool.of("tool_call", "tool_result")] == ["tool_call", "tool_result"]
    assert "2 words" in tool.text()
    assert "approved" in (await say("/ask Really?", answers=(True,))).text()
    assert "Not approved" in (await say("/ask", answers=(False,))).text()
    assert "coffee" in (await say("/choose tea coffee", answers=("coffee",))).text()
    assert "Ada" in (await say("/name", answers=("Ada",))).text()
    assert (await say("/state mood=good")).state == {"mood": "good"}
    assert "first was: /history" in (await say("/history")).text()


async def test_slow_takes_its_time(autojump_clock: trio.testing.MockClock) -> None:
    turn = await say("/slow 7")
    assert autojump_clock.current_time() == pytest.approx(7)
    assert turn.of("progress")[-1] == ("progress", "slow", {"done": 35, "of": 35})


async def test_words_come_one_after_the_other(autojump_clock: trio.testing.MockClock) -> None:
    await run(Demo(DemoOptions(delay_ms=100)), FakeTurn("one two"))
    assert autojump_clock.current_time() == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("text", "code"), [("/fail no luck", "demo_failure"), ("/long many", "demo_usage"), ("/slow -1", "demo_usage")]
)
async def test_failures(text: str, code: str) -> None:
    with pytest.raises(TurnFailed) as caught:
        await say(text)
    assert caught.value.code == code


async def test_crash() -> None:
    with pytest.raises(RuntimeError):
        await say("/crash")
