"""What is measured, with which parameters, and what the gateway is meant to reach."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Figure:
    """One row of the report: a number that a workload measures.

    Attributes:
        name: as the load generator calls it.
        best: whether less or more of it is better.
        targets: system → the bound that its median has to keep.
        times: system → peer and the factor by which it has to be better than that peer's median.
    """

    name: str
    title: str
    unit: str
    best: Literal["low", "high"] = "low"
    targets: dict[str, float] = field(default_factory=dict)
    times: dict[str, tuple[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Workload:
    """A load with its parameters. `quick` overrides some for ``--quick``. `loads` is the generator's name for it."""

    name: str
    title: str
    load: str
    parameters: dict[str, Any]
    quick: dict[str, Any]
    figures: tuple[Figure, ...]


def _both(bound: float) -> dict[str, float]:
    return {"gateway": bound, "gateway-memory": bound}


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "stream",
            "100 connections, each asks, gets 200 deltas of 90 bytes, and asks again",
            "stream",
            {"clients": 100, "count": 200, "seconds": 3.0},
            {"seconds": 1.0},
            (
                Figure("cpu_us_per_delta", "stream: server CPU per delta", "µs", targets=_both(6.0)),
                Figure("deltas_per_s", "stream: deltas per second", "/s", best="high"),
                Figure("first_delta_p99_ms", "stream: first delta, p99", "ms", targets=_both(8.0)),
            ),
        ),
    )
}
