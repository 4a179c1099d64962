"""The guard of the hot loops: the same count every time, and a call too many is reported."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

from benchmarks import cost


def run_cost(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, as the check command does: it changes how trio runs tasks."""
    return subprocess.run([sys.executable, "-m", "benchmarks.cost", *arguments], capture_output=True, text=True)


def test_the_hot_loops_cost_no_more_than_they_may() -> None:
    done = run_cost()
    assert done.returncode == 0, done.stderr


def test_every_loop_has_its_ceilings() -> None:
    allowed = cost.ceilings()
    assert {name: set(allowed[name]) for name in cost.LOOPS} == {name: {"calls", "blocks"} for name in cost.LOOPS}


def test_the_same_code_costs_the_same() -> None:
    first, second = (run_cost("--only", "stream", "turn").stdout for _ in range(2))
    assert [line.split("calls")[0] for line in first.splitlines()] == [
        line.split("calls")[0] for line in second.splitlines()
    ]


NEEDLESS = """
import sys
from benchmarks import cost
from gateway.protocol.log import Log

append = Log.append
def needless(self, *args, **kwargs):
    for _ in range({times}):
        len(())
    return append(self, *args, **kwargs)
Log.append = needless

measured = {{"stream": cost.measure("stream").cost}}
print(*cost.compare(measured, {{"stream": {allowed}}}), sep="\\n")
"""


def test_needless_calls_in_the_log_are_seen() -> None:
    calls = float(run_cost("--only", "stream").stdout.split()[1])
    allowed = {"calls": calls, "blocks": 1000.0}
    times = 2 * int(calls * cost.SLACK) + 2  # an append may stand for two deltas
    code = NEEDLESS.format(times=times, allowed=allowed)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"calls per delta, ceiling {calls:g}: if it is meant, run python -m benchmarks.cost --write" in done.stdout


def test_what_is_within_the_slack_passes_and_what_is_above_is_named() -> None:
    allowed = {"ping": {"calls": 100.0, "blocks": 5.0}}
    assert cost.compare({"ping": {"calls": 104.9, "blocks": 4.0}}, allowed) == []
    assert cost.compare({"ping": {"calls": 106.0, "blocks": 5.0}}, allowed) == [
        "ping: costs 106 calls per round trip, ceiling 100: if it is meant, run python -m benchmarks.cost --write"
    ]
    assert cost.compare({"turn": {"calls": 1.0}}, allowed) == [
        "turn: there is no ceiling for calls; run python -m benchmarks.cost --write"
    ]


def test_writing_keeps_the_ceilings_of_what_was_not_measured(tmp_path: Path) -> None:
    path = tmp_path / "cost.toml"
    path.write_text("ping = { calls = 7.5, blocks = 1 }\nforgotten = { calls = 1 }\n")
    cost.write({"turn": {"calls": 1292.86, "blocks": 4.8}}, path)
    written = tomllib.loads(path.read_text())
    assert "trio " in written.pop("measured_with")
    assert written == {"ping": {"calls": 7.5, "blocks": 1}, "turn": {"calls": 1292.86, "blocks": 4.8}}
