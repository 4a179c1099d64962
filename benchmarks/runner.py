"""Runs workloads against systems, interleaved: every system once, then all again, so that a slow minute of the machine
is everyone's."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from benchmarks import environments
from benchmarks.processes import cores
from benchmarks.systems import ROOT, ServerFailed, System, free_port, serving
from benchmarks.workloads import Workload

Measured = dict[str, float]


class RunFailed(Exception):
    """A run does not count; the text says why."""


@dataclass
class Results:
    """Workload → system → one `Measured` per round; and what failed."""

    runs: dict[str, dict[str, list[Measured]]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


def measure(workload: Workload, system: System, *, quick: bool = False) -> Measured:
    """One run: a fresh server, a fresh load generator.

    Raises:
        RunFailed: the server sent something wrong, or nothing, or could not be started.
    """
    server_core, load_core = cores()
    try:
        with serving(system, server_core, tls=workload.tls) as server:
            spec = {
                "load": workload.load,
                "core": load_core,
                "parameters": workload.parameters | (workload.quick if quick else {}),
                "target": {
                    "dialect": system.dialect,
                    "port": server.port,
                    "pid": server.pid,
                    "core": server_core,
                    "knock": free_port(socket.SOCK_DGRAM),
                    "tls": workload.tls,
                    "path": system.path,
                },
            }
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.load"],
                input=json.dumps(spec),
                capture_output=True,
                text=True,
                cwd=server.folder,
                env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
            )
            if done.returncode:
                said = (server.folder / "out").read_text(errors="replace")[-1000:]
                # The last line is what was wrong; the page has room for one.
                reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
                raise RunFailed(f"{reason}\n{done.stderr}The server said: {said}")
    except (ServerFailed, environments.EnvironmentFailed) as exc:
        raise RunFailed(str(exc)) from exc
    measured: Measured = json.loads(done.stdout)
    return measured


def run(
    workloads: Iterable[Workload],
    systems: Iterable[System],
    rounds: int,
    *,
    quick: bool = False,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> Results:
    """Run everything that goes together. A system whose run fails is left out of the rest of that workload."""
    results = Results()
    for workload in workloads:
        able = [system for system in systems if workload.load in system.loads and (system.tls or not workload.tls)]
        of_workload = results.runs.setdefault(workload.name, {})
        failed: set[str] = set()
        for round_ in range(1, rounds + 1):
            for system in able:
                if system.name in failed:
                    continue
                try:
                    measured = measure(workload, system, quick=quick)
                except RunFailed as exc:
                    failed.add(system.name)
                    results.failures.append(f"{workload.name} against {system.name}: {exc}")
                    say(f"FAILED {results.failures[-1]}")
                    continue
                of_workload.setdefault(system.name, []).append(measured)
                shown = "  ".join(f"{figure.name}={measured[figure.name]:.4g}" for figure in workload.figures)
                shares = f"generator {measured['own_share']:.0%}, others {measured['others_share']:.0%}"
                say(f"{workload.name} {round_}/{rounds}  {system.name:16} {shown}  ({shares})")
        for name in failed:
            of_workload.pop(name, None)
    return results
