"""What the load generator counts: a run in which anything is missing, doubled, moved or wrong does not count."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from benchmarks.load.checks import ContentError, Covered, Numbered
from benchmarks.texts import LENGTH, TAG, piece, pieces, tag

NAME = tag(12, 3)
COUNT = 6


def test_a_piece_has_its_length_and_its_name() -> None:
    assert len(NAME) == TAG
    assert {len(piece(tag(client, turn), number)) for client, turn, number in [(0, 0, 0), (9999, 9999, 999_999)]} == {
        LENGTH
    }
    assert pieces(NAME, 2, 3) == piece(NAME, 2) + piece(NAME, 3) + piece(NAME, 4)


def play_numbered(deltas: list[tuple[str, int, str]]) -> Numbered:
    check = Numbered(NAME, COUNT)
    for delta in deltas:
        check.delta(*delta)
    check.end()
    return check


def numbered_deltas() -> list[tuple[str, int, str]]:
    return [(NAME, number, piece(NAME, number)) for number in range(COUNT)]


def test_a_complete_answer_of_a_peer_counts() -> None:
    assert play_numbered(numbered_deltas()).received == COUNT


@pytest.mark.parametrize("where", range(COUNT))
@pytest.mark.parametrize("how", ["dropped", "doubled", "swapped", "garbled", "foreign"])
def test_anything_wrong_with_a_peers_answer_is_refused(how: str, where: int) -> None:
    deltas = numbered_deltas()
    if how == "dropped":
        del deltas[where]
    elif how == "doubled":
        deltas.insert(where, deltas[where])
    elif how == "swapped":
        other = (where + 1) % COUNT
        deltas[where], deltas[other] = deltas[other], deltas[where]
    elif how == "garbled":
        deltas[where] = (NAME, where, piece(NAME, where).replace("April", "Apri1"))
    else:
        deltas[where] = (tag(13, 3), where, piece(tag(13, 3), where))
    with pytest.raises(ContentError):
        play_numbered(deltas)


Event = dict[str, Any]


def session_events(*cuts: int, sealed: int = 0, streamed: int = COUNT) -> list[Event]:
    """A turn's events, its deltas merged between `cuts`; with an output after `sealed` pieces, and at the end."""
    events: list[Event] = [{"type": "input"}, {"type": "turn_started"}]
    edges = [0, *cuts, streamed]
    for start, end in itertools.pairwise(edges):
        events.append({"type": "delta", "text": pieces(NAME, start, end - start), "stands_for": end - start})
        if end == sealed:
            events.append({"type": "output", "content": pieces(NAME, 0, sealed)})
    events.append(
        {"type": "output", "content": pieces(NAME, sealed, COUNT - sealed), "stands_for": 1 + COUNT - streamed}
    )
    events.append({"type": "turn_ended", "outcome": "completed"})
    seq = 0
    for event in events:
        event["first"] = seq + 1
        seq = event["seq"] = seq + event.pop("stands_for", 1)
    return events


def play_session(events: list[Event]) -> Covered:
    check = Covered()
    check.ask(NAME, COUNT)
    for event in events:
        check.event(event)
    return check


@pytest.mark.parametrize(
    "events",
    [
        session_events(*range(1, COUNT)),
        session_events(),
        session_events(2, 5),
        session_events(3, sealed=3),
        session_events(2, streamed=4),
    ],
    ids=["as they are", "merged into one", "merged", "sealed on the way", "overtaken by the output"],
)
def test_a_complete_turn_counts(events: list[Event]) -> None:
    check = play_session(events)
    assert check.received == COUNT
    assert check.cursor == events[-1]["seq"]


# All but the turn's end: without that the load generator waits until it gives the run up.
@pytest.mark.parametrize("where", range(len(session_events(2, 4)) - 1))
@pytest.mark.parametrize("how", ["dropped", "doubled", "swapped"])
def test_a_session_without_a_number_or_with_one_twice_is_refused(how: str, where: int) -> None:
    events = session_events(2, 4)
    if how == "dropped":
        del events[where]
    elif how == "doubled":
        events.insert(where, events[where])
    else:
        events[where], events[where + 1] = events[where + 1], events[where]
    with pytest.raises(ContentError):
        play_session(events)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("delta", {"text": pieces(NAME, 0, 2)}),
        ("delta", {"text": pieces(NAME, 2, 3)}),
        ("delta", {"text": pieces(NAME, 2, 1)}),
        ("delta", {"text": pieces(NAME, 2, 2)[:-1]}),
        ("delta", {"text": pieces(NAME, 2, 2).replace("April", "Apri1")}),
        ("delta", {"text": ""}),
        ("output", {"content": pieces(NAME, 0, COUNT - 1)}),
        ("output", {"content": pieces(NAME, 0, COUNT + 1)}),
        ("output", {"content": pieces(tag(1, 1), 0, COUNT)}),
        ("turn_ended", {"outcome": "failed", "error": {"code": "agent_failed"}}),
    ],
)
def test_right_numbers_do_not_excuse_a_wrong_text(kind: str, wrong: Event) -> None:
    events = session_events(2, 4)
    where = [number for number, event in enumerate(events) if event["type"] == kind][-1 if kind != "delta" else 1]
    events[where] |= wrong
    with pytest.raises(ContentError):
        play_session(events)


def test_a_gap_that_numbers_pretend_to_cover_shows_in_the_text() -> None:
    events = session_events(2, 4)
    lost = events.pop(3)
    events[3]["first"] = lost["first"]
    with pytest.raises(ContentError, match="wrong delta"):
        play_session(events)
