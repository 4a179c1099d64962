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
from gateway.protocol.marks import Marks
from gateway.protocol.praison_events import Stream
from gateway.server import Identity
from gateway.server.connection import Connection
from gateway.session import Session, Turn
from gateway.testing import simulate
from gateway.testing.disk import Disk

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
        "hello_error forbidden", "snapshot at", "(requested)", "progress", "refreshed expires_at",
        "code=token_rejected", "lost: 4401 token_expired", "is purged", "resync unknown_session", "attempt=2",
        "d1     <- hello_ok", "d2     <- joined", "d1     <- snapshot at", "token_stream", "status=final",
        "server_reply_ack", "status=duplicate", "content=/stop", "<- aborted", "server_request", "message_nack",
    ):  # fmt: skip
        assert what in said, what


def break_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Keys, "get", lambda self, request_id: None)


def forget_marks(patch: pytest.MonkeyPatch) -> None:
    """What was streamed is not known any more once its output is there."""
    patch.setattr(Marks, "deltas", lambda self, low, high: iter(()))


def swallow_withdrawals(patch: pytest.MonkeyPatch) -> None:
    """Dialect 1 leaves a kind of event out, and counts on."""
    append = Stream._append

    def without(self: Stream, payloads: list[bytes], frames: list[Any]) -> int:
        return append(self, payloads, [frame for frame in frames if b'"message_nack"' not in frame[1]])

    patch.setattr(Stream, "_append", without)


def purge_what_is_used(patch: pytest.MonkeyPatch) -> None:
    purge = Disk.purge
    patch.setattr(Disk, "purge", lambda self, store, now, in_use: purge(self, store, now, ()))


def tokens_for_ever(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Identity, "expired", lambda self, now: False)


def anyone_refreshes(patch: pytest.MonkeyPatch) -> None:
    """A token of another subject does as well."""
    judge = Connection._judge_refresh

    async def judge_as_own(self: Connection, token: str) -> Any:
        assert self._identity is not None
        own = self._identity
        self._identity = evolve(own, subject=token.partition("@")[0])
        answer = await judge(self, token)
        self._identity = evolve(self._identity, subject=own.subject)
        return answer

    patch.setattr(Connection, "_judge_refresh", judge_as_own)


def retry_nothing(patch: pytest.MonkeyPatch) -> None:
    restore = Session._restore
    patch.setattr(Session, "_restore", lambda self, stored, retry_lost: restore(self, stored, False))


BROKEN = {
    forget_marks: ("tokens_make_up_the_response",),
    swallow_withdrawals: ("praison_skips_nothing",),
    purge_what_is_used: ("well_behaved_clients_are_served", "numbers_belong_to_a_history"),
    tokens_for_ever: ("tokens_end",),
    anyone_refreshes: ("refreshes_are_judged",),
    retry_nothing: ("lost_turns_are_tried_again",),
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_what_is_broken_on_purpose_is_found(broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch)
    for seed in range(100):
        violation = simulate.run(simulate.plan(seed)).violation
        if violation is not None:
            assert violation.invariant in BROKEN[broken]
            return
    pytest.fail("no history shows it")


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
