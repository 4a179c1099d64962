"""Deterministic simulation: a whole gateway, its disk, its clients and agents, from one seed.

    python -m gateway.testing.simulate --seed 1 --runs 200

Theory of operation
-------------------
A *plan* is a list of steps drawn from the seed before anything runs. `run` carries it out under a virtual clock, with
trio's scheduler seeded too, so a plan decides everything: the same plan gives the same trace, byte for byte. When an
invariant is violated, `minimised` drops steps for as long as the plan still violates one; what is left is small enough
to read, and is a file that can be replayed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import trio
import trio.testing
from attrs import evolve, field, frozen

from gateway.testing.determinism import scheduled_by
from gateway.testing.model import Json, Violation
from gateway.testing.world import DEEP, LIBRARY, PRAISON, RAW, ROOMY, SESSIONS, TIGHT, Step, World

LIMITS = {"tight": TIGHT, "deep": DEEP, "roomy": ROOMY}


@frozen
class Plan:
    """A history before it happens. `seed` is for the schedule; `limits` names one of `LIMITS`; `on_lost` is as for an
    agent: what becomes of a turn that a crash cut off, ``end`` or ``retry``."""

    seed: int
    limits: str
    steps: tuple[Step, ...]
    on_lost: str = "end"

    def as_json(self) -> Json:
        """For a file; `from_json` reads it."""
        steps = [step.as_json() for step in self.steps]
        return {"seed": self.seed, "limits": self.limits, "on_lost": self.on_lost, "steps": steps}

    @classmethod
    def from_json(cls, data: Json) -> Plan:
        """The plan of a file that `as_json` made."""
        steps = tuple(Step(**step) for step in data["steps"])
        return cls(data["seed"], data["limits"], steps, data.get("on_lost", "end"))


@frozen
class Outcome:
    """What came of a plan: the trace, and the violation if there was one."""

    plan: Plan
    trace: tuple[str, ...]
    violation: Violation | None = None
    events: int = field(default=0)
    """Events and snapshots that clients got."""


# --- drawing a plan --------------------------------------------------------------------------------------------------


WORDS = (
    "say:1", "say:3", "say:12", "think:2", "long:3", "long:12", "output", "progress:2", "state:3", "state:4", "custom",
    "tool", "ask:300", "ask:0", "choose:700", "steer", "sleep:1", "sleep:20", "sleep:200", "sleep:900", "deaf:100",
    "deaf:500", "stubborn:400", "raise", "fail",
)  # fmt: skip


@frozen
class _Theme:
    """What a history is mostly about: weights of what clients do and of what else happens, and favourite words."""

    clients: dict[str, int] = field(factory=dict)
    world: dict[str, int] = field(factory=dict)
    words: tuple[str, ...] = ()
    modes: tuple[str, ...] = ("queue", "queue", "queue", "queue", "interrupt", "steer", "collect", "collect", "reject")
    praison: bool = False
    """Whether those of dialect 1 are there from the start."""


_CLIENTS = {"send": 10, "burst": 1, "come": 3, "abort": 2, "answer": 2, "say": 1, "fault": 2, "refresh": 1, "leave": 0}

_THEMES = (
    _Theme(),
    _Theme(clients={"burst": 12, "abort": 4}, words=("say:1", "sleep:200", "steer", "sleep:20")),
    _Theme(clients={"answer": 14}, words=("ask:0", "choose:0", "ask:300"), modes=("queue",)),
    _Theme(clients={"fault": 9, "say": 4}, words=("long:12", "long:40", "sleep:200")),
    _Theme(clients={"come": 8}, world={"crash": 12, "drain": 4}),
    _Theme(world={"slow": 9, "full": 9, "break": 4}),
    _Theme(clients={"come": 6, "fault": 5}, words=("long:12", "say:12", "sleep:200"), praison=True),
    _Theme(clients={"refresh": 8, "come": 6}, world={"auth": 12}),
    _Theme(clients={"come": 2, "leave": 8}, world={"purge": 16, "crash": 5, "wait": 10}),
)
"""Each is met in depth by some histories, and all mixed by others."""


def plan(seed: int) -> Plan:
    """Draw a history of some dozen steps."""
    draw = random.Random(seed)
    theme = draw.choice(_THEMES)
    steps = [Step("start")]
    names = list(SESSIONS)
    draw.shuffle(names)
    if draw.random() < 0.5:  # everyone in one session
        names = [name for name in names if SESSIONS[name] == "s1"]
    if theme.praison:
        names.sort(key=lambda name: name not in PRAISON)
    present = names[: draw.randint(2, len(names))]
    steps += [Step("open" if name in LIBRARY else "join", name, draw.choice([1, 1, 20])) for name in present]
    clients = {**_CLIENTS, **theme.clients}
    world = {kind: theme.world.get(kind, weight) for kind, (weight, _) in _WORLD.items()}
    pace = draw.choice([3, 30, 300])
    for _ in range(draw.randint(8, 60)):
        after = draw.choice([0, 0, 1, draw.randint(0, pace), draw.randint(0, 10 * pace)])
        if draw.random() < 0.8:
            kind = draw.choices(list(clients), list(clients.values()))[0]
            drawn = _client_steps(draw, draw.choice(names), kind, theme)
        else:
            kind = draw.choices(list(world), list(world.values()))[0]
            drawn = [_WORLD[kind][1](draw)]
        steps += [evolve(drawn[0], after=after), *drawn[1:]]
    return Plan(
        seed, draw.choice(["tight", "tight", "deep", "roomy"]), tuple(steps), draw.choice(["end", "end", "retry"])
    )


def _script(draw: random.Random, theme: _Theme) -> str:
    words = [draw.choice(WORDS) for _ in range(draw.choice([0, 1, 2, 3, 5, 8]))]
    words += [draw.choice(theme.words) for _ in range(draw.choice([0, 1, 2])) if theme.words]
    draw.shuffle(words)
    if draw.random() < 0.5:
        words.append("return")
    return " ".join(words)


def _client_steps(draw: random.Random, name: str, kind: str, theme: _Theme) -> list[Step]:
    raw = name not in LIBRARY
    if kind in ("send", "burst"):
        mode = draw.choice(theme.modes)
        steps = []
        for _ in range(1 if kind == "send" else draw.randint(2, 6)):
            how: Json = {"script": _script(draw, theme), "on_busy": mode}
            if raw:
                how |= {"again": draw.random() < 0.15, "conflict": draw.random() < 0.05}
            steps.append(Step("send", name, how=how))
        return steps
    if kind == "come":
        if not raw:
            return [Step(draw.choice(["open", "sulk", "take", "take"]), name)]
        lifetime = draw.choice([0, 0, 300, 3000]) if name in RAW else 0
        return [Step("join", name, how={"lifetime": lifetime} if lifetime else {})]
    if kind == "refresh":
        how = {"lifetime": draw.choice([1, 500, 3000, 10_000]), "other": draw.random() < 0.1}
        return [Step("refresh", name, how=how)] if name in RAW else [Step("join" if raw else "take", name)]
    if kind == "leave":
        return [Step("leave" if raw else "cut", name)]
    if kind == "abort":
        how = {"scope": draw.choice(["turn", "queue", "all", "all"])}
        if name in RAW:
            how["newest"] = draw.random() < 0.2
        return [Step("abort", name, how=how)]
    if kind == "answer":
        return [Step("answer", name, how={"value": draw.choice([True, True, False, "a", "b", "c", 1])})]
    if kind == "say":
        if name in PRAISON:
            return [Step(draw.choice(["ping", "leave", "stop", "stop"]), name)]
        return [Step(draw.choice(["ping", "resync", "leave", "signal"]) if raw else "resync", name)]
    fault = draw.choice(["cut", "cut", "stall", "stall", "unstall", "unstall", "truncate"])
    how = {}
    if fault == "truncate":
        how = {"towards_client": draw.random() < 0.7, "after": draw.choice([0, 1, 7, 60, 300, 1500])}
    return [Step(fault, name, how=how)]


_JUNK = ["", "\x00", "GET / HTTP/1.1\r\n\r\n", "GET /ws HTTP/1.1\r\nHost: x\r\n", "\xff\xfe\x81\x82", "\x16\x03\x01"]

_WORLD: dict[str, tuple[int, Callable[[random.Random], Step]]] = {
    "crash": (
        2,
        lambda draw: Step("crash", how={"lose": draw.choice([0] * 9 + [1, 3, 30]), "cut": draw.random() < 0.5}),
    ),
    "drain": (1, lambda draw: Step("drain")),
    "slow": (
        3,
        lambda draw: Step("disk", how={"before": draw.choice([0, 1, 30, 400]), "after": draw.choice([0, 1, 30])}),
    ),
    "full": (2, lambda draw: Step("disk", how={"full": draw.random() < 0.6})),
    "break": (1, lambda draw: Step("break")),
    "lines": (2, lambda draw: Step("lines", how={"delay": draw.choice([0, 1, 40, 250])})),
    "garbage": (1, lambda draw: Step("garbage", how={"data": draw.choice(_JUNK)})),
    "stranger": (1, lambda draw: Step("stranger", how={"session_id": draw.choice(["s1", "s2"])})),
    "wait": (2, lambda draw: Step("wait")),
    "auth": (1, lambda draw: Step("auth", how={"delay": draw.choice([0, 1, 60, 800, 5000])})),
    "purge": (1, lambda draw: Step("purge")),
}


# --- carrying it out -------------------------------------------------------------------------------------------------


def run(plan: Plan, agent: Any = None, texts: Sequence[str] = ()) -> Outcome:
    """Carry a plan out. Never raises for what the gateway does wrong: that is in the outcome.

    Args:
        agent: anything `gateway.open_gateway` takes as an agent, or None for the scripted one. It must take its time
            from trio and use no threads, or the run cannot be repeated.
        texts: with an agent of yours: what is sent instead of scripts.
    """
    worlds: list[World] = []

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            world = World(
                nursery, seed=plan.seed, limits=LIMITS[plan.limits], on_lost=plan.on_lost, agent=agent, texts=texts
            )
            worlds.append(world)
            for step in plan.steps:
                if step.after:
                    await trio.sleep(step.after / 1000)
                    world.check_clients()
                world.perform(step)
            await world.come_to_rest()
            await world.end()
            nursery.cancel_scope.cancel()

    violation: Violation | None = None
    with scheduled_by(plan.seed):
        try:
            trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0), strict_exception_groups=True)
        except BaseException as exc:  # noqa: ASYNC103 - trio.run is over
            violation = first_violation(exc)
    (world,) = worlds
    if violation is not None:
        world.trace.append(f"violated: {violation}")
    models = [client.model for client in world.raw.values()] + [client.model for client in world.library.values()]
    events = sum(model.events + model.snapshots for model in models)
    return Outcome(plan, tuple(world.trace), violation, events)


def first_violation(exc: BaseException) -> Violation:
    """What went wrong first. Anything but a `Violation` is the process's death."""
    leaves = list(_leaves(exc))
    for leaf in leaves:
        if isinstance(leaf, Violation):
            return leaf
        if not isinstance(leaf, Exception | trio.Cancelled):
            raise leaf
    violation = Violation("the_process_lives", (20,), repr(leaves[0]))
    violation.__cause__ = leaves[0]
    return violation


def _leaves(exc: BaseException) -> list[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        return [leaf for one in exc.exceptions for leaf in _leaves(one)]
    return [exc]


def minimised(failing: Outcome, agent: Any = None, texts: Sequence[str] = ()) -> Outcome:
    """A shorter plan that violates the same invariant: steps and pauses are dropped as long as it does."""
    assert failing.violation is not None
    name = failing.violation.invariant
    best = failing

    def attempt(steps: Sequence[Step]) -> bool:
        nonlocal best
        outcome = run(evolve(best.plan, steps=tuple(steps)), agent, texts)
        if outcome.violation is not None and outcome.violation.invariant == name:
            best = outcome
            return True
        return False

    size = max(1, len(best.plan.steps) // 2)
    while True:
        start, shrunk = 0, False
        while start < len(best.plan.steps):
            steps = best.plan.steps
            if attempt([*steps[:start], *steps[start + size :]]):
                shrunk = True
            else:
                start += size
        if size > 1:
            size //= 2
        elif not shrunk:
            break
    for i, step in enumerate(best.plan.steps):
        if step.after:
            steps = best.plan.steps
            attempt([*steps[:i], evolve(step, after=0), *steps[i + 1 :]])
    return best


# --- the command -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 0, or 1 if an invariant was violated."""
    parser = argparse.ArgumentParser(
        prog="python -m gateway.testing.simulate", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first history (default 0)")
    parser.add_argument("--runs", type=int, default=1, help="how many histories, seeds counting up (default 1)")
    parser.add_argument("--trace", action="store_true", help="print what happened in each")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="carry out the plan of a file instead")
    parser.add_argument("--save", type=Path, metavar="FILE", help="where a minimised failing plan goes")
    parser.add_argument("--agent", metavar="MODULE:ATTR", help="an agent of yours instead of the scripted one")
    parser.add_argument("--text", action="append", default=[], help="what is sent to it; may be given several times")
    options = parser.parse_args(arguments)
    agent = _load(options.agent) if options.agent else None
    texts = tuple(options.text) or (("hello",) if agent else ())
    if options.replay:
        plans = [Plan.from_json(json.loads(options.replay.read_text()))]
    else:
        plans = [plan(seed) for seed in range(options.seed, options.seed + options.runs)]
    events = 0
    for one in plans:
        outcome = run(one, agent, texts)
        events += outcome.events
        if outcome.violation is not None and options.replay and not options.save:
            print(f"seed {one.seed}, limits {one.limits}:", *outcome.trace, sep="\n")
            return 1
        if outcome.violation is not None:
            return _report(outcome, agent, texts, options.save or Path(f"simulation-{one.seed}.json"))
        if options.trace:
            print(f"seed {one.seed}, limits {one.limits}", *outcome.trace, sep="\n")
    print(f"{len(plans)} histories, {events} events seen by clients: every invariant holds")
    return 0


def _report(outcome: Outcome, agent: Any, texts: Sequence[str], path: Path) -> int:
    assert outcome.violation is not None
    print(f"seed {outcome.plan.seed} violates {outcome.violation}")
    print(f"minimising {len(outcome.plan.steps)} steps...", flush=True)
    small = minimised(outcome, agent, texts)
    path.write_text(json.dumps(small.plan.as_json(), indent=1) + "\n")
    print(f"{len(small.plan.steps)} steps do, limits {small.plan.limits}:", *small.trace, sep="\n")
    print(f"replay with: python -m gateway.testing.simulate --replay {path}")
    return 1


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    sys.path.insert(0, "")
    return getattr(importlib.import_module(module), attribute)


if __name__ == "__main__":
    sys.exit(main())
