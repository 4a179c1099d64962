"""The whole way once, small: real server processes, a real load generator. Nothing that takes time is judged."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import runner
from benchmarks.systems import SYSTEMS, ServerFailed, System, serving
from benchmarks.workloads import WORKLOADS

SMALL: dict[str, dict[str, float]] = {
    "stream": {"clients": 3, "count": 20, "seconds": 0.1},
    "bulk": {"clients": 3, "count": 20, "seconds": 0.1},
    "ask": {"clients": 3, "count": 20, "pause_ms": 1.0, "seconds": 0.2},
    "fan-out": {"clients": 4, "seconds": 0.1},
    "bursts": {"clients": 4, "seconds": 0.1},
    "ping": {"clients": 3, "seconds": 0.1},
    "turn": {"clients": 3, "seconds": 0.1},
    "connect": {"clients": 10},
    "idle": {"clients": 10},
    "scale": {"few": 2, "many": 8, "rate": 80.0, "settle": 0.1, "seconds": 0.5},
    "storm": {"clients": 4, "events": 10, "within": 0.1},
    "stream-tls": {"clients": 3, "count": 20, "seconds": 0.1},
}


def run_small(workload: str, system: System) -> dict[str, float]:
    return runner.measure(replace(WORKLOADS[workload], quick=SMALL[workload]), system, quick=True)


@pytest.mark.parametrize("workload", SMALL)
def test_a_workload_runs_against_the_gateway(workload: str) -> None:
    measured = run_small(workload, SYSTEMS["gateway"])
    assert measured["cpu_s"] > 0
    assert {figure.name for figure in WORKLOADS[workload].figures} <= set(measured)


@pytest.mark.parametrize("system", ["trio-websocket", "raw"])
def test_a_peer_does_the_same_work(system: str) -> None:
    assert run_small("stream", SYSTEMS[system])["deltas"] >= 60


BAD_SERVER = """
import sys
from benchmarks.peers import plain_trio

right = plain_trio.dump
def dump(frame):
    FAULT
    return right(frame)
plain_trio.dump = dump
plain_trio.main(sys.argv[1])
"""


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("if frame.get('n') == 7: frame = {**frame, 'n': 8}", "delta 8 where 7 was expected"),
        ("if frame.get('n') == 7: frame = {**frame, 'text': frame['text'][:-1]}", "delta 7 says"),
        ("if frame['type'] == 'delta' and frame['n'] == 19: frame = {'type': 'end'}", "ended after 19 of 20"),
        ("if frame.get('n') == 7: raise RuntimeError", "closed with 1000"),
    ],
)
def test_a_server_that_sends_something_wrong_is_a_failure(fault: str, said: str, tmp_path: Path) -> None:
    code = tmp_path / "bad.py"
    code.write_text(BAD_SERVER.replace("FAULT", fault))
    bad = replace(SYSTEMS["trio-websocket"], command=(sys.executable, str(code), "{port}"))
    with pytest.raises(runner.RunFailed, match=said):
        run_small("stream", bad)


def test_what_failed_is_reported_and_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    bad = replace(
        SYSTEMS["trio-websocket"], name="bad", command=(sys.executable, "-c", "print('no'); raise SystemExit(3)")
    )
    workload = replace(WORKLOADS["stream"], quick=SMALL["stream"])
    results = runner.run([workload], [bad, SYSTEMS["raw"]], 2, quick=True)
    assert set(results.runs["stream"]) == {"raw"}
    assert len(results.runs["stream"]["raw"]) == 2
    assert len(results.failures) == 1
    assert "exit code 3" in results.failures[0]
    assert "FAILED stream against bad" in capsys.readouterr().err


def test_a_server_that_does_not_start_says_why() -> None:
    bad = replace(SYSTEMS["raw"], command=(sys.executable, "-c", "raise SystemExit('no such thing')"))
    with pytest.raises(ServerFailed, match="no such thing"), serving(bad, 0):
        pytest.fail("it did not start")
