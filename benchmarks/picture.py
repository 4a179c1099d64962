"""The results as a picture: for each workload a bar per system, so that lengths can be compared within it.

Plain SVG. Its colors follow the reader's scheme, light or dark; text is text, and each bar has its number.
"""

from __future__ import annotations

import statistics
from html import escape

from benchmarks.runner import Results
from benchmarks.systems import SYSTEMS
from benchmarks.workloads import WORKLOADS

WIDTH = 760
LEFT, RIGHT = 210, 90
ROW, HEAD, GAP = 20, 30, 30
LONGEST = 5.0
"""How many times longer than ours, or than the target, a bar may be: one outlier would leave no room for the others."""

STYLE = """\
text { font: 12px system-ui, sans-serif; fill: #24292f }
.title { font-weight: 600 } .bar { fill: #9aa5b1 } .ours { fill: #0b7285 }
.target { stroke: #c92a2a; stroke-width: 1.5 } .note { fill: #57606a }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .bar { fill: #57606a } .ours { fill: #3bc9db } .target { stroke: #ff8787 }
  .note { fill: #9aa5b1 }
}"""


def number(value: float) -> str:
    """Three digits that say something."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def draw(results: Results) -> str:
    """An SVG document of the first figure of each workload on the plain line."""
    parts: list[str] = []
    y = 0
    for workload, by_system in results.runs.items():
        figure = WORKLOADS[workload].figures[0]
        medians = {
            system: statistics.median(measured[figure.name] for measured in rounds)
            for system, rounds in by_system.items()
            if rounds and SYSTEMS[system].peer
        }
        if WORKLOADS[workload].tls or not medians:
            continue
        target = max((bound for system, bound in figure.targets.items() if system in medians), default=None)
        ours = [median for system, median in medians.items() if SYSTEMS[system].dialect == "gateway"]
        longest = LONGEST * max([*ours, target or 0.0]) or max(medians.values())
        scale = (WIDTH - LEFT - RIGHT) / min(longest, max([*medians.values(), target or 0.0]))
        parts.append(
            f'<text class="title" x="4" y="{y + 20}">{escape(f"{workload}: {figure.title}, {figure.unit}")}</text>'
        )
        top = y + HEAD
        for place, (system, median) in enumerate(medians.items()):
            at = top + place * ROW
            kind = "ours" if SYSTEMS[system].dialect == "gateway" else "bar"
            length = max(1.0, min(median, longest) * scale)
            broken = "» " if median > longest else ""
            parts += [
                f'<text x="{LEFT - 8}" y="{at + 13}" text-anchor="end">{escape(SYSTEMS[system].title)}</text>',
                f'<rect class="{kind}" x="{LEFT}" y="{at + 2}" width="{length:.1f}" height="{ROW - 5}" rx="2"/>',
                f'<text x="{LEFT + length + 6:.1f}" y="{at + 13}">{broken}{number(median)}</text>',
            ]
        bottom = top + len(medians) * ROW
        if target is not None:
            x = LEFT + target * scale
            parts += [
                f'<line class="target" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 2}" y2="{bottom + 2}"/>',
                f'<text class="note" x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">≤ {target:g}</text>',
            ]
        y = bottom + GAP
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" role="img">\n'
        "<title>Medians by workload; the red line is the gateway's target; shorter is better; » is cut off</title>\n"
        f"<style>\n{STYLE}\n</style>\n{body}\n</svg>\n"
    )
