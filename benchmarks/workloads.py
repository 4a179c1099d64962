"""What is measured, with which parameters, and what the gateway is meant to reach."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal


@dataclass(frozen=True)
class Figure:
    """One row of the report: a number that a workload measures.

    Attributes:
        name: as the load generator calls it.
        best: whether less or more of it is better.
        targets: system → the bound that its median has to keep.
        times: system → peer and the factor by which it has to be better than that peer's median.
        then: peer → what it took when the targets were set, on another machine in another hour.
    """

    name: str
    title: str
    unit: str
    best: Literal["low", "high"] = "low"
    targets: dict[str, float] = field(default_factory=dict)
    times: dict[str, tuple[str, float]] = field(default_factory=dict)
    then: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Workload:
    """A load with its parameters.

    Attributes:
        load: as the load generator calls it.
        quick: what is different with ``--quick``.
        tls: whether it runs over TLS; its name is then that of the same workload without, and ``-tls``.
    """

    name: str
    title: str
    load: str
    parameters: dict[str, Any]
    quick: dict[str, Any]
    figures: tuple[Figure, ...]
    tls: bool = False


def _both(bound: float) -> dict[str, float]:
    return {"gateway": bound, "gateway-memory": bound}


def _then(trio_websocket: float, starlette: float, ws: float) -> dict[str, float]:
    return {"trio-websocket": trio_websocket, "starlette": starlette, "ws": ws}


def _twenty_times(peer: str) -> dict[str, tuple[str, float]]:
    return {"gateway": (peer, 20.0), "gateway-memory": (peer, 20.0)}


_STREAM = (
    Figure("cpu_us_per_delta", "server CPU per delta", "µs", targets=_both(6.0)),
    Figure("first_delta_p99_ms", "first delta, p99", "ms", targets=_both(8.0)),
    Figure("deltas_per_s", "deltas per second", "/s", best="high", times=_twenty_times("praisonai")),
)

_PLAIN = (
    Workload(
        "stream",
        "100 connections, each asks, gets 200 deltas of 90 bytes, and asks again; between two deltas the producer "
        "lets all other tasks run, as one does that gets its tokens from elsewhere",
        "stream",
        {"clients": 100, "count": 200, "interval_ms": 0, "seconds": 2.0},
        {"seconds": 1.0},
        _STREAM,
    ),
    Workload(
        "bulk",
        "the same, but a producer that has its 200 deltas at once and never waits of its own accord",
        "stream",
        {"clients": 100, "count": 200, "interval_ms": None, "seconds": 2.0},
        {"seconds": 1.0},
        (replace(_STREAM[0], then=_then(26, 9.0, 8.1)), *_STREAM[1:]),
    ),
    Workload(
        "ask",
        "one more client asks for a word every few milliseconds while 100 stream as above",
        "ask",
        {"clients": 100, "count": 200, "pause_ms": 7, "seconds": 3.0},
        {"seconds": 1.5},
        (
            Figure("first_delta_p50_ms", "first delta, p50", "ms"),
            Figure("first_delta_p99_ms", "first delta, p99", "ms", targets=_both(8.0)),
        ),
    ),
    Workload(
        "fan-out",
        "one session, 500 connections, one event in flight",
        "fan",
        {"clients": 500, "burst": 1, "seconds": 2.0},
        {"seconds": 1.0},
        (
            Figure(
                "cpu_us_per_delivery", "server CPU per delivery", "µs", targets=_both(10.0), then=_then(37, 10.6, 8.0)
            ),
        ),
    ),
    Workload(
        "bursts",
        "one session, 500 connections, events in bursts of 8",
        "fan",
        {"clients": 500, "burst": 8, "seconds": 2.0},
        {"seconds": 1.0},
        (Figure("cpu_us_per_delivery", "server CPU per delivery", "µs", targets=_both(2.0)),),
    ),
    Workload(
        "ping",
        "32 connections, ping → pong",
        "ping",
        {"clients": 32, "seconds": 2.0},
        {"seconds": 1.0},
        (Figure("cpu_us_per_ping", "server CPU per round trip", "µs", targets=_both(25.0), then=_then(57, 20, 11)),),
    ),
    Workload(
        "turn",
        "32 connections, message → accepted, input, turn_started, output, turn_ended",
        "turn",
        {"clients": 32, "seconds": 2.0},
        {"seconds": 1.0},
        (
            Figure("cpu_us_per_turn", "server CPU per turn", "µs", targets={"gateway": 250.0, "gateway-memory": 150.0}),
            Figure("turns_per_s", "turns per second", "/s", best="high"),
        ),
    ),
    Workload(
        "connect",
        "1,000 connections, each with hello → hello_ok",
        "hello",
        {"clients": 1000},
        {"clients": 200},
        (
            Figure(
                "cpu_us_per_hello", "server CPU per connection", "µs", targets=_both(500.0), then=_then(425, 353, 247)
            ),
        ),
    ),
    Workload(
        "idle",
        "1,000 joined connections that do nothing, each with a session of its own",
        "idle",
        {"clients": 1000},
        {"clients": 500},
        (Figure("rss_kb_per_connection", "RSS per connection", "KB", targets=_both(30.0)),),
    ),
    Workload(
        "scale",
        "10 sessions stream 2,500 deltas a second in all, then 2,000 do",
        "scale",
        {"few": 10, "many": 2000, "rate": 2500.0, "settle": 1.0, "seconds": 2.0},
        {"seconds": 1.0, "settle": 0.5},
        (
            Figure("ratio", "cost per delta, 2,000 sessions against 10", "×", targets=_both(1.3)),
            Figure("few_cpu_us_per_delta", "server CPU per delta, 10 sessions", "µs"),
            Figure("many_cpu_us_per_delta", "server CPU per delta, 2,000 sessions", "µs"),
        ),
    ),
    Workload(
        "storm",
        "1,000 clients come back within a second, each with 100 events to replay",
        "storm",
        {"clients": 1000, "events": 100, "within": 1.0},
        {"clients": 300},
        (
            Figure("all_live_s", "until all are live", "s", targets=_both(3.0)),
            Figure("live_p99_s", "one client, from connect to live, p99", "s"),
        ),
    ),
)

OVER_TLS = ("stream", "fan-out", "ping", "connect")
"""What is measured over TLS as well. A fan-out shows it most: the bytes cannot be shared, each connection encrypts."""


def _over_tls(plain: Workload) -> Workload:
    # Targets are for the plain line.
    cost = replace(plain.figures[0], targets={}, times={}, then={})
    name, title, parameters = f"{plain.name}-tls", f"{plain.title}, over TLS", plain.parameters
    if plain.name == "connect":  # the load generator's own part of a TLS handshake takes most of the time
        title, parameters = title.replace("1,000", "200"), {**parameters, "clients": 200}
    return replace(plain, name=name, title=title, parameters=parameters, figures=(cost,), tls=True)


WORKLOADS = {
    workload.name: workload for workload in (*_PLAIN, *(_over_tls(plain) for plain in _PLAIN if plain.name in OVER_TLS))
}
