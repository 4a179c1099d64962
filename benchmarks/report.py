"""Results as JSON, as a table, and in the page on performance."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import environments, picture
from benchmarks.picture import number
from benchmarks.processes import cores
from benchmarks.runner import Results
from benchmarks.systems import ROOT, SYSTEMS
from benchmarks.workloads import WORKLOADS, Figure

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"

RESULTS = ROOT / "benchmarks" / "results" / "latest.json"
PAGE = ROOT / "docs" / "explanation" / "performance.md"
PICTURE = ROOT / "docs" / "images" / "performance.svg"

NAMED = {
    "own": ("trio", "trio-websocket", "orjson", "picows"),
    "asyncio": ("websockets", "uvicorn", "starlette", "python-socketio", "uvloop"),
    "node": ("node", "ws", "socket.io"),
    "praisonai": ("praisonai-bot",),
}
"""Environment → whose versions the page names; the JSON has all."""


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


def verdict(figure: Figure, system: str, medians: Mapping[str, float]) -> str | None:
    """``≤ 6: pass`` for a system that has a target, else None. Only from what was measured."""
    parts = []
    low = figure.best == "low"
    if system in figure.targets:
        bound = figure.targets[system]
        kept = medians[system] <= bound if low else medians[system] >= bound
        parts.append(f"{'≤' if low else '≥'} {bound:g}: {'pass' if kept else '**fail**'}")
    if system in figure.times:
        peer, factor = figure.times[system]
        if peer in medians:
            ratio = medians[peer] / medians[system] if low else medians[system] / medians[peer]
            kept = ratio >= factor
            parts.append(f"≥ {factor:g} × {peer}: {ratio:.1f} × {'pass' if kept else '**fail**'}")
        else:
            parts.append(f"≥ {factor:g} × {peer}: not measured")
    return ", ".join(parts) or None


def spreads(results: Results, workload: str, figure: Figure) -> dict[str, Spread]:
    """System → what its rounds gave."""
    return {
        system: Spread.of(measured[figure.name] for measured in rounds)
        for system, rounds in results.runs.get(workload, {}).items()
        if rounds and all(figure.name in measured for measured in rounds)
    }


def rows(results: Results) -> Iterator[tuple[str, Figure, dict[str, Spread], dict[str, str]]]:
    """Workload, figure, what each system gave, and the verdicts on those with a target."""
    for workload in results.runs:
        for figure in WORKLOADS[workload].figures:
            of_systems = spreads(results, workload, figure)
            medians = {system: spread.median for system, spread in of_systems.items()}
            verdicts = {system: verdict(figure, system, medians) for system in of_systems}
            yield workload, figure, of_systems, {system: said for system, said in verdicts.items() if said}


def table(results: Results) -> str:
    """For a terminal: a block for every figure, a line for every system."""
    lines = []
    for workload, figure, of_systems, verdicts in rows(results):
        lines.append(f"{workload}: {figure.title}, {figure.unit}")
        for system, spread in of_systems.items():
            shown = f"{number(spread.low)} – {number(spread.high)}"
            lines.append(f"  {system:16} {number(spread.median):>9}   {shown:22} {verdicts.get(system, '')}".rstrip())
    return "\n".join(lines)


def matrix(results: Results) -> str:
    """Markdown: a line for every figure on the plain line, a column for every system."""
    shown = [row for row in rows(results) if not WORKLOADS[row[0]].tls]
    systems = [name for name in SYSTEMS if SYSTEMS[name].peer and any(name in row[2] for row in shown)]
    lines = [
        "| workload | figure | " + " | ".join(SYSTEMS[name].title for name in systems) + " | target |",
        "|---|---|" + "---:|" * len(systems) + "---|",
    ]
    last = ""
    for workload, figure, of_systems, verdicts in shown:
        cells = [_cell(of_systems.get(name)) for name in systems]
        said = "<br>".join(f"{_short(system)}: {text}" for system, text in verdicts.items())
        name = f"**{workload}**" if workload != last else ""
        lines.append(f"| {name} | {figure.title}, {figure.unit} | {' | '.join(cells)} | {said} |")
        last = workload
    return "\n".join(lines)


def tls_table(results: Results) -> str:
    """Markdown: what TLS adds, a line for every system and figure."""
    lines = ["| workload | figure | system | plain | TLS | TLS costs |", "|---|---|---|---:|---:|---:|"]
    for workload, figure, of_systems, _ in rows(results):
        if not WORKLOADS[workload].tls:
            continue
        plain = workload.removesuffix("-tls")
        without = spreads(results, plain, figure)
        name = f"**{plain}**"
        for system, spread in of_systems.items():
            if system in without and SYSTEMS[system].peer:
                times = f"{spread.median / without[system].median:.2f} ×"
                cells = f"{_cell(without[system])} | {_cell(spread)} | {times}"
                lines.append(f"| {name} | {figure.title}, {figure.unit} | {SYSTEMS[system].title} | {cells} |")
                name = ""
    return "\n".join(lines)


def _short(system: str) -> str:
    return SYSTEMS[system].title.removeprefix("trio-gateway, ")


def _cell(spread: Spread | None) -> str:
    if spread is None:
        return "–"
    return f"{number(spread.median)}<br><sub>{number(spread.low)}–{number(spread.high)}</sub>"


def generator(results: Results) -> str:
    """How far the load generator, and whatever else ran, were from being what was measured."""
    counted = [
        (measured, SYSTEMS[system].peer)
        for by_system in results.runs.values()
        for system, rounds in by_system.items()
        for measured in rounds
    ]
    own = max(measured["own_share"] for measured, peer in counted if peer)
    others = Spread.of(measured["others_share"] for measured, _ in counted)
    text = (
        f"The load generator was busy for at most {own:.0%} of any run. Other processes took {others.median:.0%} of "
        f"the server's core (median; at most {others.high:.0%})."
    )
    reached = [
        f"{number(Spread.of(measured[name] for measured in rounds).median)} {what}"
        for workload, name, what in (("bulk", "deltas_per_s", "deltas/s"), ("ping", "pings_per_s", "round trips/s"))
        if (rounds := results.runs.get(workload, {}).get("raw"))
    ]
    if reached:
        text += f" Against a server that does next to nothing it reaches {' and '.join(reached)}."
    return text


def pace(results: Results) -> str:
    """How this machine, in this hour, compares with the one on which the targets were set: by what the peers took."""
    ratios = [
        Spread.of(measured[figure.name] for measured in rounds).median / then
        for name, by_system in results.runs.items()
        for figure in WORKLOADS[name].figures
        for peer, then in figure.then.items()
        if (rounds := by_system.get(peer))
    ]
    if not ratios:
        return ""
    all_ = Spread.of(ratios)
    return (
        f"When the targets were set, on another machine, three peers were measured as well; here they take "
        f"{number(all_.median)} times as much (median of {len(ratios)} figures, {number(all_.low)} to "
        f"{number(all_.high)}). The targets are not adjusted for that."
    )


BUSY = 0.7
"""Of a core: what is left takes up bursts, and what else runs."""

TOKENS = 30
"""Deltas a second of one answer: what a hosted model streams, roughly."""


def sizing(results: Results, system: str = "gateway") -> str:
    """Markdown: what a core and a gibibyte carry, by the medians."""
    lines = []
    for workload, name, text in (
        (
            "scale",
            "many_cpu_us_per_delta",
            f"{{:,.0f}} answers of {TOKENS} deltas a second each, every delta by itself",
        ),
        ("stream", "cpu_us_per_delta", "{:,.0f} such answers if a delta costs no more than in a busy gateway"),
        ("turn", "cpu_us_per_turn", "{:,.0f} short turns a second"),
        ("connect", "cpu_us_per_hello", "{:,.0f} clients a second that connect"),
        ("idle", "rss_kb_per_connection", "{:,.0f} joined clients, each with a session, in a GiB"),
    ):
        rounds = results.runs.get(workload, {}).get(system)
        if rounds:
            cost = Spread.of(measured[name] for measured in rounds).median
            each = {"scale": BUSY * 1e6 / TOKENS, "stream": BUSY * 1e6 / TOKENS, "idle": 1024.0 * 1024}.get(
                workload, BUSY * 1e6
            )
            lines.append(f"- {text.format(each / cost)} (`{workload}`: {number(cost)} {_unit(workload, name)})")
    return "\n".join(lines)


def _unit(workload: str, name: str) -> str:
    return next(figure.unit for figure in WORKLOADS[workload].figures if figure.name == name)


def section(document: Mapping[str, Any]) -> str:
    """What goes into the page, from a document of `document`."""
    results = Results(document["runs"], document["failures"])
    on, versions = document["machine"], document["versions"]
    named = [
        f"{package} {versions[name][package].removeprefix('v')}"
        for name, packages in NAMED.items()
        for package in packages
        if package in versions.get(name, {})
    ]
    where = f"{on['cpu']}, {on['cores']} cores, Linux {on['kernel']}, {on['python']}"
    parts = [
        (
            f"Measured {on['date'][:10]} at commit `{on['commit']}`: {where}; {', '.join(named)}. "
            f"{document['rounds']} rounds; in each cell the median, and below it the lowest and the highest."
        ),
        generator(results),
        *filter(None, [pace(results)]),
        "![Server CPU per unit of work, for each system](../images/performance.svg)",
        matrix(results),
        "### Sizing",
        f"By the medians of {SYSTEMS['gateway'].title}, a core of this machine that is {BUSY:.0%} busy carries one of:",
        sizing(results),
        "### Over TLS",
        tls_table(results),
    ]
    if results.failures:
        parts += ["### What failed", "\n".join(f"- {failure.splitlines()[0]}" for failure in results.failures)]
    return "\n\n".join(parts)


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


def save(document: Mapping[str, Any]) -> None:
    """Write the JSON, and the page and the picture made of it."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    PAGE.write_text(into_page(PAGE.read_text(), section(document)))
    PICTURE.write_text(picture.draw(Results(document["runs"], document["failures"])))
