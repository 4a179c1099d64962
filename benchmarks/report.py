"""Results as JSON, as a table, and in the page on performance."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import environments
from benchmarks.processes import cores
from benchmarks.runner import Results
from benchmarks.systems import ROOT, SYSTEMS
from benchmarks.workloads import WORKLOADS, Figure

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"

PACKAGES = (
    "trio", "trio-websocket", "orjson", "picows", "uvloop", "websockets", "uvicorn", "starlette", "python-socketio",
    "praisonai-bot",
)  # fmt: skip
"""Whose versions the report names; the JSON has all."""


@dataclass(frozen=True)
class Spread:
    """What several rounds gave."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        ordered = sorted(values)
        return cls(statistics.median(ordered), ordered[0], ordered[-1])


def number(value: float) -> str:
    """Three digits that say something."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def verdict(figure: Figure, system: str, medians: Mapping[str, float]) -> str | None:
    """``≤ 6 pass`` for a system that has a target, else None. Only from what was measured."""
    parts = []
    low = figure.best == "low"
    if system in figure.targets:
        bound = figure.targets[system]
        kept = medians[system] <= bound if low else medians[system] >= bound
        parts.append(f"{'≤' if low else '≥'} {bound:g} {'pass' if kept else '**fail**'}")
    if system in figure.times:
        peer, factor = figure.times[system]
        if peer in medians:
            ratio = medians[peer] / medians[system] if low else medians[system] / medians[peer]
            kept = ratio >= factor
            parts.append(f"≥ {factor:g} × {peer}: {ratio:.1f} × {'pass' if kept else '**fail**'}")
        else:
            parts.append(f"≥ {factor:g} × {peer}: not measured")
    return ", ".join(parts) or None


def table(results: Results) -> str:
    """Markdown: a block for every figure, a line for every system, the medians with their spread."""
    lines = ["| figure | system | median | min – max | target |", "|---|---|---:|---:|---|"]
    for name, by_system in results.runs.items():
        for figure in WORKLOADS[name].figures:
            spreads = {
                system: Spread.of(measured[figure.name] for measured in rounds)
                for system, rounds in by_system.items()
                if all(figure.name in measured for measured in rounds)
            }
            medians = {system: spread.median for system, spread in spreads.items()}
            title = f"{name}: {figure.title}, {figure.unit}"
            for system, spread in spreads.items():
                shown = f"{number(spread.median)} | {number(spread.low)} – {number(spread.high)}"
                target = verdict(figure, system, medians) or ""
                lines.append(f"| {title} | {SYSTEMS[system].title} | {shown} | {target} |")
                title = ""
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Where and on what this was measured."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "server_core": cores()[0],
        "load_core": cores()[1],
        "kernel": platform.release(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
    }


def document(results: Results, rounds: int, quick: bool) -> dict[str, Any]:
    """Everything, for JSON."""
    used = {SYSTEMS[system].environment for by_system in results.runs.values() for system in by_system} | {"own"}
    return {
        "machine": machine(),
        "versions": {name: environments.versions(name) for name in sorted(used)},
        "rounds": rounds,
        "quick": quick,
        "parameters": {
            name: WORKLOADS[name].parameters | (WORKLOADS[name].quick if quick else {}) for name in results.runs
        },
        "runs": results.runs,
        "failures": results.failures,
    }


def _commit() -> str:
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True
    )
    return said.stdout.strip() or "unknown"


def into_page(page: str, text: str) -> str:
    """A page with what stands between its markers replaced.

    Raises:
        ValueError: it has no markers.
    """
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"expected {BEGIN} and {END}")
    return f"{head}{BEGIN}\n{text}\n{END}{tail}"


def save(folder: Path, results: dict[str, Any]) -> Path:
    """Write the JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "latest.json"
    path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    return path
