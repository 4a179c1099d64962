"""Where in an output its deltas were: for a client that keeps text by the piece and was cut in mid-answer.

The log removes deltas when their output comes; version 2 has its clients replace the text, so nothing more is needed.
A dialect whose clients cannot do that has the log keep `Marks`, and cuts from the output what its client lacks.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator
from operator import attrgetter

from attrs import frozen

from gateway.protocol.messages import Output

MAX_MARKS = 250_000
"""Deltas of one session: 4 MB of marks, ten hours of a model's tokens."""

_by_seq = attrgetter("seq")


@frozen(eq=False)
class Mark:
    """One output: the delta ``seqs[i]`` ended at character ``ends[i]`` of it. Without any, nobody knows."""

    seq: int
    output: Output
    seqs: array[int]
    ends: array[int]


class Marks:
    """Of one log; `since` is its head when they began.

    Invariant: an output above `since` that has no mark was not streamed, or is not above `forgotten`.
    """

    def __init__(self, since: int) -> None:
        self.since = since
        self.forgotten = since
        self._marks: list[Mark] = []  # in the order of their numbers
        self._deltas = 0

    def __len__(self) -> int:
        return self._deltas

    def add(self, output: Output, texts: list[tuple[int, str]] | None) -> None:
        """Mark an output, before it is visible. `texts`: number and text of the deltas that it replaces, in order; None
        if some of them have left the log already."""
        if texts is None:
            self._marks.append(Mark(output.seq, output, array("Q"), array("Q")))
            return
        if not texts or not output.content.startswith("".join([text for _, text in texts])):
            return  # what it says was not streamed
        ends, end = array("Q"), 0
        for _, text in texts:
            end += len(text)
            ends.append(end)
        self._marks.append(Mark(output.seq, output, array("Q", [seq for seq, _ in texts]), ends))
        self._deltas += len(ends)
        while self._deltas > MAX_MARKS and len(self._marks) > 1:
            self._forget()

    def drop(self, tail: int) -> None:
        """Forget the outputs up to `tail`: they are in memory no longer, and marks must not hold on to them."""
        while self._marks and self._marks[0].seq <= tail:
            self._forget()

    def _forget(self) -> None:
        mark = self._marks.pop(0)
        self.forgotten = mark.seq
        self._deltas -= len(mark.seqs)

    def streamed(self, output: Output) -> int | None:
        """How many characters of an output were deltas once; None if nobody knows."""
        if output.seq <= self.forgotten:
            return None
        i = bisect_right(self._marks, output.seq, key=_by_seq)
        if not i or self._marks[i - 1].seq != output.seq:
            return 0
        ends = self._marks[i - 1].ends
        return ends[-1] if ends else None

    def deltas(self, low: int, high: int) -> Iterator[Iterator[tuple[int, Output, int, int]]]:
        """The deltas above `low` up to `high` whose outputs are above that, per output and in order: number, output,
        first and end character."""
        start = bisect_right(self._marks, high, key=_by_seq)
        for mark in self._marks[start:]:
            if mark.output.turn_id != self._marks[start].output.turn_id:
                return
            yield _between(mark, low, high)


def _between(mark: Mark, low: int, high: int) -> Iterator[tuple[int, Output, int, int]]:
    for i in range(bisect_right(mark.seqs, low), bisect_right(mark.seqs, high)):
        yield mark.seqs[i], mark.output, mark.ends[i - 1] if i else 0, mark.ends[i]
