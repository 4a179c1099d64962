"""The state machines find nothing in the gateway and its core, and find what is broken on purpose.

Together at least 500 examples of 50 steps: `CoreMachine` has most of them because a step there costs next to nothing;
`GatewayMachine` runs the whole engine.
"""

from __future__ import annotations

from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test
from steady import steady

from gateway.protocol.handshake import Position
from gateway.protocol.keys import Keys
from gateway.protocol.log import Entry, Log
from gateway.session import Session
from gateway.session.publisher import NUMBER_BLOCK, Publisher
from gateway.testing import core_machine
from gateway.testing.core_machine import CoreMachine
from gateway.testing.gateway_machine import GatewayMachine
from gateway.testing.model import Violation
from gateway.testing.stage import Stage
from gateway.testing.world import World

STEPS = 50


def run(machine: type[RuleBasedStateMachine], examples: int, base: settings = steady) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine, settings=settings(base, max_examples=examples, stateful_step_count=STEPS)
    )


def test_the_core() -> None:
    run(CoreMachine, 400)


def test_the_gateway() -> None:
    run(GatewayMachine, 200)


at_random = settings(deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)


@pytest.mark.long
def test_the_core_at_length() -> None:
    run(CoreMachine, 10_000, at_random)


@pytest.mark.long
def test_the_gateway_at_length() -> None:
    run(GatewayMachine, 3_000, at_random)


# --- they see what is broken -----------------------------------------------------------------------------------------

quick = settings(steady, phases=[Phase.generate], print_blob=False)


def look(machine: type[RuleBasedStateMachine], examples: int) -> None:
    """Run in rounds with seeds of their own: a long one may miss a thing, which one depends even on what is loaded."""

    def made() -> RuleBasedStateMachine:
        return machine()

    for start in range(20):
        run(seed(start)(made), examples, quick)  # type: ignore[arg-type]


def breaks(machine: type[RuleBasedStateMachine], examples: int, match: str | None = None) -> None:
    with pytest.raises(Violation, match=match):
        look(machine, examples)


def no_key(self: Keys, request_id: str) -> None:
    return None


def every_cursor(*args: object, **named: object) -> Position:
    return Position(args[0].since or 0, None)  # type: ignore[attr-defined]


def as_it_was_written(self: Entry, first: int) -> bytes:
    return real_encode(self, self.seq)


real_encode = Entry.encode


def test_the_core_machine_sees_that_keys_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Keys, "get", no_key)
    breaks(CoreMachine, 50, "keys_are_kept_for_the_window")


def test_the_core_machine_sees_that_first_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Entry, "encode", as_it_was_written)
    breaks(CoreMachine, 50, r"covers|clients_agree")


def test_the_core_machine_sees_that_any_cursor_is_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_machine, "position_for", every_cursor)
    breaks(CoreMachine, 200, "the_cursor_is_continued_or_resynced")


def test_the_core_machine_sees_that_text_is_not_superseded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Log, "_supersede", lambda *args: None)
    breaks(CoreMachine, 50, "text_is_superseded")


def test_the_gateway_machine_sees_that_a_disconnect_stops_the_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Session.detach

    def detach(self: Session, *args: object) -> None:
        real(self, *args)  # type: ignore[arg-type]
        if self.turn is not None:
            self.stop_turn(self.turn, "aborted")

    monkeypatch.setattr(Session, "detach", detach)
    breaks(GatewayMachine, 100, "turns_end_for_a_reason")


def test_the_gateway_machine_sees_that_events_are_shown_before_they_are_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    def show_first(self: Publisher, batch: list[Any]) -> None:
        stored, _ = self._what_to_store(batch)
        self._show(batch)
        self._reserved += NUMBER_BLOCK
        self._handed = [], self._reserved, True
        self._store.append_soon(self._session_id, stored, self._reserved, self._appended)

    monkeypatch.setattr(Publisher, "_hand_over", show_first)
    breaks(GatewayMachine, 60)


# --- the stage -------------------------------------------------------------------------------------------------------


def test_the_stage_stands_still_until_it_is_told() -> None:
    said: list[str] = []

    async def talk() -> None:
        said.append("now")
        await trio.sleep(2)
        said.append("later")

    stage = Stage()
    stage.do(lambda: stage.nursery.start_soon(talk))
    assert said == ["now"]
    stage.advance(1.9)
    assert said == ["now"]
    stage.advance(0.2)
    assert said == ["now", "later"]
    assert stage.do(lambda: 7) == 7
    stage.close()
    assert stage.over


def test_what_a_task_raises_comes_out_of_the_step_in_which_it_does() -> None:
    async def fail() -> None:
        await trio.sleep(1)
        raise ValueError("as told")

    stage = Stage()
    stage.do(lambda: stage.nursery.start_soon(fail))
    with pytest.raises(ExceptionGroup) as caught:
        stage.advance(2)
    assert caught.group_contains(ValueError, match="as told")
    assert stage.over


@pytest.mark.parametrize("cause", ["close", "failure"])
def test_the_stage_ends_also_with_somebody_who_takes_a_while_and_cannot_be_cancelled(cause: str) -> None:
    said: list[str] = []

    async def linger() -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(5)
                said.append("done")

    stage = Stage()
    stage.do(lambda: stage.nursery.start_soon(linger))
    if cause == "close":
        stage.close()
    else:
        with pytest.raises(ExceptionGroup):
            stage.do(lambda: 1 // 0)
    assert stage.over
    assert said == ["done"]


@pytest.mark.parametrize("violated", [False, True])
def test_a_machine_leaves_no_run_of_trio_behind(monkeypatch: pytest.MonkeyPatch, violated: bool) -> None:
    def violate(self: World) -> None:
        raise Violation("as_told", (), "now")

    machine = GatewayMachine()
    machine.begin(seed=0, limits="deep", on_lost="end")
    machine.send(who="c1", script="sleep:200 say:1", on_busy="queue")
    if violated:
        monkeypatch.setattr(World, "check", violate)
        with pytest.raises(Violation, match="as_told"):
            machine.nothing_is_violated()
    machine.teardown()
    Stage().close()  # trio refuses to run inside of a run
