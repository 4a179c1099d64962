"""The table of a connection's states."""

from __future__ import annotations

from itertools import product

from gateway.protocol.states import TRANSITIONS, Do, On, State, step

ORDER = [State.HANDSHAKE, State.JOINED, State.CLOSING, State.CLOSED]


def test_every_state_has_an_answer_to_everything() -> None:
    assert set(TRANSITIONS) == set(product(State, On))
    for state, event in product(State, On):
        assert step(state, event) == TRANSITIONS[state, event]


def test_no_way_leads_back() -> None:
    assert all(ORDER.index(after) >= ORDER.index(before) for (before, _), (after, _) in TRANSITIONS.items())


def test_a_lost_line_ends_every_state() -> None:
    assert all(step(state, On.LOST)[0] is State.CLOSED for state in State)


def test_a_session_is_joined_once_and_only_from_the_handshake() -> None:
    assert [key for key, (_, do) in TRANSITIONS.items() if do is Do.JOIN] == [(State.HANDSHAKE, On.HELLO)]
    assert step(State.JOINED, On.HELLO) == (State.JOINED, Do.ALREADY_JOINED)


def test_frames_are_handled_only_while_joined() -> None:
    assert [key for key, (_, do) in TRANSITIONS.items() if do is Do.DISPATCH] == [(State.JOINED, On.FRAME)]


def test_nothing_is_done_about_what_arrives_after_the_close() -> None:
    for state, event in product((State.CLOSING, State.CLOSED), (On.HELLO, On.FRAME, On.CLOSE)):
        assert step(state, event) == (state, Do.DISCARD)


def test_a_close_is_sent_once() -> None:
    closing = [key for key, (_, do) in TRANSITIONS.items() if do in (Do.CLOSE, Do.REFUSE)]
    assert {state for state, _ in closing} == {State.HANDSHAKE, State.JOINED}
