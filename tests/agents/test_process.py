"""The kind `process`, with real processes: the protocol both ways, and that nothing outlives the turn."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from fake_turn import FakeTurn, answered, run, said
from structlog.testing import capture_logs

from gateway.agents import Agent, build_agent, process
from gateway.config import AgentConfig
from gateway.errors import ConfigError, TurnFailed

SPEAKER = Path(__file__).with_name("speaker.py")


def agent(*args: str, **options: Any) -> Agent:
    options = {"command": [sys.executable, str(SPEAKER), *args], **options}
    return build_agent("tool", AgentConfig(run="process", options=options))


async def speak(*args: str, turn: FakeTurn | None = None, **options: Any) -> FakeTurn:
    turn = turn or FakeTurn()
    await run(agent(*args, **options), turn)
    return turn


async def failure(*args: str, **options: Any) -> TurnFailed:
    with pytest.raises(TurnFailed) as caught:
        await speak(*args, **options)
    return caught.value


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


async def gone(*pids: int) -> None:
    # Another program's child: its end makes no event here.
    with trio.fail_after(5):
        while any(map(is_running, pids)):  # noqa: ASYNC110
            await trio.sleep(0.01)


async def test_deltas() -> None:
    assert (await speak("echo")).text() == "You said: Hello"


async def test_the_first_line_is_the_turn() -> None:
    turn = FakeTurn("one", "two", before=[said("before", "r0", seq=3), answered("yes", seq=5)])
    turn.state = {"mood": "good"}
    await speak("turn", turn=turn)
    line = json.loads(turn.of("output")[0][2])
    transcript = line.pop("transcript")
    assert [(event["type"], event["content"]) for event in transcript] == [
        ("input", "before"), ("output", "yes"), ("input", "one"), ("input", "two"),
    ]  # fmt: skip
    assert line.pop("inputs") == transcript[-2:]
    assert line == {
        "type": "turn", "turn_id": "t_1", "session_id": "s_1", "subject": "alice", "attempt": 1,
        "state": {"mood": "good"},
    }  # fmt: skip
    assert transcript[-1]["request_id"] == "r2"


async def test_the_history_is_bounded() -> None:
    turn = FakeTurn("now", before=[said(str(number)) for number in range(9)])
    await speak("turn", turn=turn, max_history=3)
    line = json.loads(turn.of("output")[0][2])
    assert [event["content"] for event in line["transcript"]] == ["7", "8", "now"]


async def test_everything_it_can_say() -> None:
    assert (await speak("everything")).calls == [
        ("send", "reasoning", "hm"),
        ("progress", "k", [1]),
        ("tool_call", "look", {"at": 1}, "c1"),
        ("tool_result", "c1", "seen", True),
        ("state", {"a": 1}),
        ("custom", "n", None),
        ("output", "answer", "done", {"m": 1}),
    ]


async def test_asks_are_answered_on_stdin() -> None:
    turn = await speak("ask", turn=FakeTurn(answers=["b", True]))
    assert sorted(turn.of("ask")) == [
        ("ask", "approval", "Sure?", None, None),
        ("ask", "choice", "Which?", ["a", "b"], 2.5),
    ]
    replies = json.loads(turn.text())
    assert {reply["ask_id"] for reply in replies} == {"mine", "2"}
    assert all(reply["type"] == "answered" and reply["value"] in ("b", True) for reply in replies)


async def test_steered_inputs_are_passed_on_if_asked_for() -> None:
    turn = FakeTurn()
    turn.steering = [said("and this", "r2")]
    await speak("steered", turn=turn, steer=True)
    assert turn.text() == "ready and this"
    turn.steering = [said("not this", "r3")]
    await speak("echo", turn=turn)
    assert turn.steering


async def test_a_process_that_does_not_read_is_no_failure() -> None:
    turn = FakeTurn(before=[said("x" * 1_000_000)])
    await speak("early", turn=turn)
    assert turn.calls == []


async def test_a_command_that_reads_to_the_end() -> None:
    program = "import sys, json; n = len(sys.stdin.readlines()); print(json.dumps({'type': 'delta', 'text': str(n)}))"
    turn = FakeTurn()
    await run(agent(command=[sys.executable, "-c", program], close_stdin=True), turn)
    assert turn.text() == "1"
    assert (await failure("ask", close_stdin=True)).code == "agent_process_protocol"


async def test_thousands_of_lines_written_just_before_the_exit_all_arrive() -> None:
    turn = await speak("flood", "20000")
    assert turn.text().split() == [str(number) for number in range(20_000)]


async def test_a_slow_reader_of_the_turn_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "EXIT_PATIENCE", 0.05)

    class SlowTurn(FakeTurn):
        async def send(self, text: str, channel: str = "answer") -> None:
            await trio.sleep(0.002)  # longer in all than the patience
            await super().send(text, channel)

    turn = await speak("flood", "200", turn=SlowTurn())
    assert turn.text().split() == [str(number) for number in range(200)]


async def test_a_command_is_one_text_or_a_list(tmp_path: Path) -> None:
    turn = FakeTurn()
    await run(agent(command=f"'{sys.executable}' '{SPEAKER}' echo"), turn)
    assert turn.text() == "You said: Hello"


async def test_its_directory_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (await speak("directory", cwd=str(tmp_path))).text() == str(tmp_path)
    monkeypatch.setenv("TRIO_GATEWAY_SERVER_TOKENS", "secret")
    monkeypatch.setenv("KEPT", "yes")
    seen = json.loads((await speak("environment", env={"ADDED": "too"})).text())
    assert seen["KEPT"] == "yes"
    assert seen["ADDED"] == "too"
    assert "TRIO_GATEWAY_SERVER_TOKENS" not in seen


# --- failures --------------------------------------------------------------------------------------------------------


async def test_its_own_error_ends_the_turn_and_the_process() -> None:
    with trio.fail_after(10):
        error = await failure("error")
    assert (error.code, error.message, error.retryable) == ("quota", "no more today", True)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("no json", "is no message: "),
        ("[1]", "is no message: "),
        ('{"text": "x"}', "is no message: field 'type'"),
        ('{"type": "shout"}', "has an unknown type; expected one of delta, output, "),
        ('{"type": "delta"}', "is no message: field 'text'"),
        ('{"type": "delta", "text": 3}', "is no message: field 'text': expected a string, got an integer"),
        ('{"type": "state", "patch": []}', "is no message: field 'patch': expected an object"),
        ('{"type": "ask", "kind": "guess", "prompt": "?"}', "is no message: field 'kind'"),
        ('{"type": "ask", "kind": "choice", "prompt": "?"}', "was refused: options: a choice needs at least one"),
        ('{"type": "ask", "kind": "input", "prompt": "?", "timeout": 1e300}', "field 'timeout': expected 0 to "),
        ('{"type": "ask", "kind": "input", "prompt": "?", "timeout": "1"}', "is no message: field 'timeout'"),
        ("x" * 3000, "is longer than 2,048 bytes"),
    ],
)
async def test_a_line_that_is_none_of_the_protocol(line: str, why: str) -> None:
    with capture_logs() as logs:
        error = await failure("raw", line, max_line_bytes=2048)
    assert error.code == "agent_process_protocol"
    assert error.message == "line 1 of the agent's command is no message of the process protocol"
    assert [entry["why"][: len(why)] for entry in logs if entry["event"] == "agent_process_protocol"] == [why]


async def test_a_line_without_end_is_not_collected() -> None:
    program = "import sys\nwhile True: sys.stdout.write('x' * 65536)"
    error = await failure(command=[sys.executable, "-c", program], max_line_bytes=100_000)
    assert error.code == "agent_process_protocol"


async def test_an_exit_code() -> None:
    with capture_logs() as logs:
        error = await failure("exit", "3")
    assert (error.code, error.message) == ("agent_process_failed", "the agent's command ended with exit code 3")
    assert {"event": "agent_stderr", "text": "about to fail"}.items() <= next(
        entry for entry in logs if entry["event"] == "agent_stderr"
    ).items()


async def test_a_signal() -> None:
    assert (await failure("kill")).message == "the agent's command ended with signal SIGKILL"


async def test_closing_stdout_is_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "EXIT_PATIENCE", 0.05)
    error = await failure("close")
    assert (error.code, error.message) == (
        "agent_process_failed", "the agent's command closed its output but did not exit",
    )  # fmt: skip


async def test_stderr_is_logged_up_to_a_limit() -> None:
    with capture_logs() as logs:
        assert (await speak("stderr", "5000")).text() == "done"
    lines = [entry["text"] for entry in logs if entry["event"] == "agent_stderr"]
    assert lines == [f"line {number}" for number in range(process.MAX_STDERR_LINES)]
    assert [entry["lines"] for entry in logs if entry["event"] == "agent_stderr_cut"] == [5001]


async def test_it_cannot_be_started_any_more(tmp_path: Path) -> None:
    program = tmp_path / "tool"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    built = agent(command=[str(program)])
    program.unlink()
    with pytest.raises(TurnFailed, match="cannot be started"):
        await run(built, FakeTurn())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"command": "no-such-tool --x"}, "agents.tool.command: no executable 'no-such-tool'; install it, or give"),
        ({"command": ["/no/such"]}, "agents.tool.command: no executable '/no/such'"),
        ({"command": [str(SPEAKER.parent)]}, "agents.tool.command: no executable"),
        ({"command": ""}, "agents.tool.command: expected a program"),
        ({"command": "a 'b"}, "agents.tool.command: cannot be split into words (No closing quotation)"),
        ({"command": ["a", 1]}, "agents.tool.command: expected text or a list of text"),
        ({"command": "sh", "cwd": "/no/such"}, "agents.tool.cwd: no directory '/no/such'"),
        ({"command": "sh", "env": {"A": 1}}, "agents.tool.env.A: expected text, got int"),
        ({"command": "sh", "steer": 1}, "agents.tool.steer: expected true or false, got 1"),
        ({"command": "sh", "comand": 1}, "agents.tool.comand: unknown option; did you mean 'command'?"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_turn(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_agent("tool", AgentConfig(run="process", options=options))
    assert message in str(caught.value)


# --- its end ---------------------------------------------------------------------------------------------------------


async def cancel_when_ready(built: Agent, turn: FakeTurn) -> float:
    """Run until something was said, then cancel; returns how many seconds the end took."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, built, turn)
        await turn.wait_for(lambda turn: turn.calls)
        start = trio.current_time()
        nursery.cancel_scope.cancel()
    return trio.current_time() - start


async def test_a_cancelled_turn_lets_the_process_clean_up(tmp_path: Path) -> None:
    mark = tmp_path / "cleaned"
    assert await cancel_when_ready(agent("polite", str(mark)), FakeTurn()) < 1.5
    assert mark.exists()


async def test_a_cancelled_turn_kills_what_does_not_listen_and_its_children() -> None:
    turn = FakeTurn()
    took = await cancel_when_ready(agent("children", "stay", grace_ms=100), turn)
    assert 0.1 <= took < 1.5
    await gone(*map(int, turn.text().split()))


async def test_children_left_behind_end_with_the_process() -> None:
    with trio.fail_after(process.EXIT_PATIENCE / 2):  # the pipes they hold do not hold the turn
        turn = await speak("children", "leave", grace_ms=100)
    await gone(*map(int, turn.text().split()))


async def test_a_child_that_left_the_group_does_not_hold_the_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "EXIT_PATIENCE", 0.05)
    turn = await speak("orphan")
    os.kill(int(turn.text()), signal.SIGKILL)


async def test_nothing_is_left_open() -> None:
    await speak("echo")
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        await speak("echo")
        await failure("exit", "1")
        await cancel_when_ready(agent("children", "stay", grace_ms=0), FakeTurn())
    assert len(os.listdir("/proc/self/fd")) <= len(before)


async def test_the_example_of_the_reference(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/reference/process-agent.md").read_text()
    found = re.search(r"^```python file=helper.py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert found is not None
    (tmp_path / "helper.py").write_text(found[1])
    turn = FakeTurn("stressed desserts")
    await run(agent(command=[sys.executable, "helper.py"], cwd=str(tmp_path)), turn)
    assert turn.text() == "desserts stressed "


def test_the_reference_names_every_line_and_option() -> None:
    page = (Path(__file__).parents[2] / "docs/reference/process-agent.md").read_text()
    rows = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    options = {item.name for item in attrs.fields(process.ProcessOptions)}
    assert rows == options | set(process._LINES) | {"turn", "answered", "steered"}
