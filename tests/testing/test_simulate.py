"""The simulation repeats itself exactly, finds nothing in the gateway, and finds what is broken on purpose."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from gateway.protocol.keys import Keys
from gateway.session import Turn
from gateway.testing import simulate

REGRESSIONS = sorted((Path(__file__).parent / "histories").glob("*.json"))


@pytest.mark.parametrize("seed", range(1, 6))
def test_the_same_seed_gives_the_same_trace(seed: int) -> None:
    plan = simulate.plan(seed)
    assert plan == simulate.plan(seed)
    first, second = simulate.run(plan), simulate.run(plan)
    assert first.trace == second.trace
    assert len(first.trace) > 20


def test_another_process_gives_the_same_trace() -> None:
    """Neither the hashes of strings, nor the addresses of objects, nor the time of day is in it."""
    traces = []
    for hash_seed in ("1", "2"):
        command = [sys.executable, "-m", "gateway.testing.simulate", "--seed", "20", "--runs", "12", "--trace"]
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(command, env=environment, capture_output=True, timeout=300, check=True)
        traces.append(done.stdout)
    assert traces[0] == traces[1]
    assert traces[0].count(b"at rest") == 12


def test_another_schedule_gives_another_trace() -> None:
    """The seed of the schedule counts: what happens at the same moment happens in another order."""
    plan = simulate.plan(3)
    traces = {simulate.run(evolve(plan, seed=seed)).trace for seed in range(5)}
    assert len(traces) == 5


@pytest.mark.parametrize(
    "seed",
    [1030],  # a turn lost in a crash left a question open whose event was out of its store's window
)
def test_a_seed_that_found_something_finds_it_no_more(seed: int) -> None:
    assert simulate.run(simulate.plan(seed)).violation is None


@pytest.mark.parametrize("start", range(0, 200, 50))
def test_two_hundred_histories(start: int) -> None:
    events = 0
    for seed in range(start, start + 50):
        outcome = simulate.run(simulate.plan(seed))
        assert outcome.violation is None, f"seed {seed}: {outcome.violation}"
        events += outcome.events
    assert events > 1_000, "hardly anything happened"


@pytest.mark.long
@pytest.mark.parametrize("start", range(0, 10_000, 1_000))
def test_ten_thousand_histories(start: int) -> None:
    for seed in range(start, start + 1_000):
        outcome = simulate.run(simulate.plan(seed))
        assert outcome.violation is None, f"seed {seed}: {outcome.violation}"


def test_what_the_plans_reach() -> None:
    """The drawn histories meet what they are there for; a draw that no longer does would prove nothing."""
    said = "\n".join(line for seed in range(80) for line in simulate.run(simulate.plan(seed)).trace)
    for what in (
        "process 2 is up", "has drained", "commits", "resync cursor_expired", "resync epoch_changed", "duplicate=true",
        "outcome=completed", "outcome=failed", "outcome=aborted", "outcome=interrupted", "outcome=lost",
        "outcome=timed_out", "code=inbox_full", "code=unavailable", "code=busy", "code=request_id_conflict",
        "code=draining", "code=no_active_turn", "code=unknown_ask", "reason=steered", "reason=aborted", "answer_ok",
        "lost: 1006", "lost: 1011", "lost: 1012", "it closed 1013 slow_consumer", "heartbeat_timeout",
        "hello_error forbidden", "snapshot at", "(requested)", "progress",
    ):  # fmt: skip
        assert what in said, what


def break_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Keys, "get", lambda self, request_id: None)


def test_a_failing_history_is_minimised_and_replayed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    break_keys(monkeypatch)
    path = tmp_path / "failing.json"
    assert simulate.main(["--seed", "0", "--runs", "50", "--save", str(path)]) == 1
    said = capsys.readouterr().out
    assert "violates " in said
    assert f"--replay {path}" in said
    small = simulate.Plan.from_json(json.loads(path.read_text()))
    assert len(small.steps) <= 8 < len(simulate.plan(small.seed).steps)
    assert simulate.main(["--replay", str(path)]) == 1
    monkeypatch.undo()
    assert simulate.main(["--replay", str(path)]) == 0


def test_histories_that_found_something_once() -> None:
    for path in REGRESSIONS:
        outcome = simulate.run(simulate.Plan.from_json(json.loads(path.read_text())))
        assert outcome.violation is None, f"{path.stem}: {outcome.violation}"


async def polite(turn: Turn) -> Any:
    await turn.send("Hello. ")
    return None


def test_an_agent_of_yours() -> None:
    outcome = simulate.run(simulate.plan(2), polite, ["hi", "ho"])
    assert outcome.violation is None
    assert any("Hello. " in line for line in outcome.trace)
    assert not any("fail" in line and "outcome" in line for line in outcome.trace)
