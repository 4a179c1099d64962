"""Tables, verdicts and picture of made-up measurements."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks import picture, report
from benchmarks.runner import Results
from benchmarks.systems import SYSTEMS
from benchmarks.workloads import OVER_TLS, WORKLOADS, Figure


def measured(cost: float, per_second: float, first: float = 5.0, **more: float) -> dict[str, float]:
    shares = {"own_share": 0.25, "others_share": 0.01}
    return {
        "cpu_us_per_delta": cost, "deltas_per_s": per_second, "first_delta_p99_ms": first, **shares, **more,
    }  # fmt: skip


def made_up() -> Results:
    stream = {
        "gateway": [measured(cost, 150_000) for cost in (5.5, 9.0, 5.0)],
        "gateway-memory": [measured(cost, 90_000, 20.0) for cost in (7.0, 7.1, 6.9)],
        "raw": [measured(0.5, 1_000_000, own_share=0.99)],
        "praisonai": [measured(150.0, 6_000)],
    }
    over_tls = {"gateway": [measured(11.0, 100_000)], "trio-websocket": [measured(40.0, 20_000)]}
    return Results({"stream": stream, "stream-tls": over_tls}, ["ping against ws: ContentError: a gap\nmore of it"])


def document() -> dict[str, object]:
    results = made_up()
    return {
        "machine": {
            "cpu": "A CPU", "cores": 2, "kernel": "6.1", "python": "CPython 3.11.7", "date": "2026-01-02",
            "commit": "abc123",
        },
        "versions": {"own": {"trio": "0.35.0"}, "praisonai": {"praisonai-bot": "0.1.16", "starlette": "9"}},
        "rounds": 3,
        "runs": results.runs,
        "failures": results.failures,
    }  # fmt: skip


def test_the_median_is_what_is_judged() -> None:
    text = report.table(made_up())
    assert "gateway               5.50   5.00 – 9.00            ≤ 6: pass" in text
    assert "gateway-memory        7.00   6.90 – 7.10            ≤ 6: **fail**" in text


def test_a_factor_is_judged_against_the_peers_median() -> None:
    text = report.table(made_up())
    assert "≥ 20 × praisonai: 25.0 × pass" in text
    assert "≥ 20 × praisonai: 15.0 × **fail**" in text
    results = made_up()
    del results.runs["stream"]["praisonai"]
    assert "≥ 20 × praisonai: not measured" in report.table(results)


@pytest.mark.parametrize(("best", "median", "said"), [("low", 3.0, "≤ 3: pass"), ("low", 3.01, "≤ 3: **fail**"),
("high", 3.0, "≥ 3: pass"), ("high", 2.99, "≥ 3: **fail**")])  # fmt: skip
def test_a_bound_may_be_reached(best: str, median: float, said: str) -> None:
    figure = Figure("name", "title", "µs", best=best, targets={"gateway": 3.0})  # type: ignore[arg-type]
    assert report.verdict(figure, "gateway", {"gateway": median}) == said
    assert report.verdict(figure, "ws", {"ws": median}) is None


def test_the_page_says_how_fast_the_machine_is_beside_the_one_of_the_targets() -> None:
    assert report.pace(made_up()) == ""
    results = Results({"bulk": {"ws": [measured(16.2, 1)], "trio-websocket": [measured(39.0, 1)]}}, [])
    assert "here they take 1.75 times as much (median of 2 figures, 1.50 to 2.00)" in report.pace(results)


def test_the_page_has_a_column_for_each_peer_and_says_what_failed() -> None:
    text = report.section(document())
    head = next(line for line in text.splitlines() if line.startswith("| workload"))
    assert "PraisonAI" in head
    assert "picows" not in head
    assert "5.50<br><sub>5.00–9.00</sub>" in text
    assert "trio 0.35.0, praisonai-bot 0.1.16" in text
    assert "busy for at most 25%" in text
    assert "- ping against ws: ContentError: a gap\n" in text + "\n"
    assert "more of it" not in text


def test_sizing_follows_from_the_medians() -> None:
    runs = {
        "scale": {"gateway": [{"many_cpu_us_per_delta": cost} for cost in (10.0, 50.0, 20.0)]},
        "idle": {"gateway": [{"rss_kb_per_connection": 32.0}]},
        "turn": {"ws": []},
    }
    streaming, idle = report.sizing(Results(runs)).splitlines()
    # 70 % of a second is 700,000 µs, and an answer takes 30 * 20 of them.
    assert streaming.startswith("- 1,167 answers of 30 deltas a second")
    assert idle.startswith("- 32,768 joined clients")


def test_what_tls_costs_is_shown_where_both_were_measured() -> None:
    (line,) = [line for line in report.tls_table(made_up()).splitlines() if "server CPU per delta" in line]
    assert "**stream**" in line
    assert line.endswith("| 2.00 × |")


def test_only_what_is_between_the_markers_of_the_page_is_replaced() -> None:
    page = report.PAGE.read_text()
    once = report.into_page(page, "new")
    assert f"{report.BEGIN}\nnew\n{report.END}" in once
    assert once.partition(report.BEGIN)[0] == page.partition(report.BEGIN)[0]
    assert once.partition(report.END)[2] == page.partition(report.END)[2]
    assert report.into_page(once, "new") == once
    with pytest.raises(ValueError, match="results:begin"):
        report.into_page("no markers", "new")


def test_the_picture_is_svg_with_a_bar_for_each_peer() -> None:
    root = ElementTree.fromstring(picture.draw(made_up()))
    space = "{http://www.w3.org/2000/svg}"
    bars = {bar.get("class"): float(bar.get("width", "")) for bar in root.iter(f"{space}rect")}
    assert len(list(root.iter(f"{space}rect"))) == 3
    assert bars["bar"] > bars["ours"] > 0
    assert len(list(root.iter(f"{space}line"))) == 1


def test_every_target_is_of_a_system_that_can_do_the_workload() -> None:
    for workload in WORKLOADS.values():
        for figure in workload.figures:
            assert all(workload.load in SYSTEMS[name].loads for name in figure.targets)
            assert all(peer in SYSTEMS for peer, _ in figure.times.values())
    assert {f"{name}-tls" for name in OVER_TLS} == {name for name, workload in WORKLOADS.items() if workload.tls}
