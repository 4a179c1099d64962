"""Marks alone: which deltas an output had, for how long that is known, and what is said when it is not."""

from __future__ import annotations

import pytest

from gateway.protocol import marks as marks_module
from gateway.protocol import messages as m
from gateway.protocol.log import Log
from gateway.protocol.marks import Marks


def output(seq: int, content: str, *, turn_id: str = "t", channel: str = "answer") -> m.Output:
    return m.Output(seq=seq, first=seq, turn_id=turn_id, channel=channel, content=content)


def found(marks: Marks, low: int, high: int) -> list[list[tuple[int, str]]]:
    """Number and text of the deltas in a range, per output."""
    return [[(seq, out.content[begin:end]) for seq, out, begin, end in deltas] for deltas in marks.deltas(low, high)]


def test_each_delta_has_its_own_part_of_the_output() -> None:
    marks = Marks(since=10)
    marks.add(output(14, "one two three"), [(11, "one "), (12, "two "), (13, "three")])
    assert found(marks, 10, 13) == [[(11, "one "), (12, "two "), (13, "three")]]
    assert found(marks, 11, 13) == [[(12, "two "), (13, "three")]]
    assert found(marks, 10, 12) == [[(11, "one "), (12, "two ")]]
    assert found(marks, 13, 13) == [[]]
    assert len(marks) == 3


def test_only_outputs_above_the_range_are_looked_at() -> None:
    """What is served before an event are the deltas it stands for; an output at or below `high` had its own turn."""
    marks = Marks(since=0)
    marks.add(output(3, "ab"), [(1, "a"), (2, "b")])
    marks.add(output(6, "cd"), [(4, "c"), (5, "d")])
    assert found(marks, 0, 2) == [[(1, "a"), (2, "b")], []]
    assert found(marks, 0, 3) == [[]]
    assert found(marks, 3, 5) == [[(4, "c"), (5, "d")]]
    assert found(marks, 3, 6) == []


def test_the_channels_of_one_turn_are_found_together_and_those_of_the_next_turn_are_not() -> None:
    marks = Marks(since=0)
    marks.add(output(5, "AB", channel="reasoning"), [(1, "A"), (3, "B")])
    marks.add(output(6, "ab"), [(2, "a"), (4, "b")])
    marks.add(output(9, "c", turn_id="next"), [(8, "c")])
    assert found(marks, 0, 4) == [[(1, "A"), (3, "B")], [(2, "a"), (4, "b")]]
    assert found(marks, 6, 8) == [[(8, "c")]]


def test_how_much_of_an_output_was_streamed() -> None:
    marks = Marks(since=10)
    marks.add(output(13, "streamed, and more"), [(11, "stream"), (12, "ed")])
    marks.add(output(15, "rewritten"), [(14, "draft")])
    marks.add(output(16, "at once"), [])
    for seq, streamed in ((13, 8), (15, 0), (16, 0), (11, 0), (99, 0), (10, None), (9, None)):
        assert marks.streamed(output(seq, "whatever")) == streamed, seq
    assert len(marks) == 2


def test_what_is_forgotten_is_unknown_rather_than_not_streamed() -> None:
    marks = Marks(since=0)
    for seq in (2, 4, 6):
        marks.add(output(seq, "x"), [(seq - 1, "x")])
    marks.drop(1)
    assert [marks.streamed(output(seq, "x")) for seq in (2, 4, 6)] == [1, 1, 1]
    marks.drop(4)
    assert [marks.streamed(output(seq, "x")) for seq in (2, 4, 5, 6)] == [None, None, 0, 1]
    assert len(marks) == 1
    marks.drop(100)
    assert marks.streamed(output(6, "x")) is None
    assert (len(marks), marks.forgotten, marks.since) == (0, 6, 0)


def test_an_output_whose_deltas_left_the_log_before_it_is_unknown() -> None:
    log = Log(max_events=3, max_bytes=10_000)
    log.keep_marks()
    log.append(m.TurnStarted(seq=1, turn_id="t", request_ids=["r"]))
    log.append(m.Delta(seq=2, turn_id="t", channel="answer", text="a "))
    for seq in range(3, 8):
        log.append(m.Custom(seq=seq, name="n", data=None))
    log.append(m.Delta(seq=8, turn_id="t", channel="answer", text="b "))
    sealed = output(9, "a b ")
    log.append(sealed)
    assert log.floor >= 2
    assert log.marks is not None
    assert log.marks.streamed(sealed) is None


def test_the_oldest_outputs_go_first_when_there_are_too_many_deltas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(marks_module, "MAX_MARKS", 4)
    marks = Marks(since=0)
    marks.add(output(3, "ab"), [(1, "a"), (2, "b")])
    marks.add(output(6, "cd"), [(4, "c"), (5, "d")])
    assert (len(marks), marks.forgotten) == (4, 0)
    marks.add(output(8, "e"), [(7, "e")])
    assert (len(marks), marks.forgotten) == (3, 3)


def test_the_newest_output_stays_whole_however_many_deltas_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(marks_module, "MAX_MARKS", 4)
    marks = Marks(since=0)
    marks.add(output(2, "a"), [(1, "a")])
    marks.add(output(9, "bcdefg"), [(seq, letter) for seq, letter in enumerate("bcdefg", 3)])
    assert (len(marks), marks.forgotten) == (6, 2)
    assert found(marks, 2, 8) == [list(enumerate("bcdefg", 3))]


def test_what_nobody_knows_is_forgotten_with_its_output() -> None:
    marks = Marks(since=0)
    marks.add(output(3, "ab"), None)
    marks.add(output(6, "cd"), [(4, "c"), (5, "d")])
    assert marks.streamed(output(3, "ab")) is None
    assert found(marks, 0, 2) == [[], []]
    marks.drop(3)
    assert (len(marks), marks.forgotten) == (2, 3)
