"""The text of a session's newest turns, as a client shows it."""

from __future__ import annotations

from collections import OrderedDict

from attrs import define, field

from gateway.protocol.messages import Delta, Event, Output, Snapshot, TurnEnded, TurnStarted


@define(eq=False)
class _Channel:
    """Invariant: the text is `outputs` in order of their ``seq``, then `tail` (PROTOCOL section 4)."""

    outputs: dict[int, str] = field(factory=dict)
    tail: list[str] = field(factory=list)


class TurnTexts:
    """What each channel of the last `keep` turns says so far; what a turn may hold is bounded by the gateway."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._turns: OrderedDict[str, dict[str, _Channel]] = OrderedDict()

    def of(self, turn_id: str, channel: str) -> str:
        """Outputs joined, then the deltas after the last. Empty for a turn that is unknown or was forgotten."""
        found = self._turns.get(turn_id, {}).get(channel)
        return "" if found is None else "".join([*found.outputs.values(), *found.tail])

    def apply(self, event: Event) -> None:
        """Fold in the next event."""
        if isinstance(event, Delta):
            self._channel(event.turn_id, event.channel).tail.append(event.text)
        elif isinstance(event, Output):
            channel = self._channel(event.turn_id, event.channel)
            channel.outputs[event.seq] = event.content
            channel.tail.clear()
        elif isinstance(event, TurnStarted):
            self._turn(event.turn_id)
        elif isinstance(event, TurnEnded):
            self._drop_tails(event.turn_id)

    def restore(self, snapshot: Snapshot, same_epoch: bool) -> None:
        """Adopt a snapshot. Of the same history, outputs that its transcript has no room for are kept."""
        if not same_epoch:
            self._turns.clear()
        for turn_id in self._turns:
            self._drop_tails(turn_id)
        for event in snapshot.transcript:
            if isinstance(event, Output):
                self._channel(event.turn_id, event.channel).outputs[event.seq] = event.content
        for channels in self._turns.values():
            for channel in channels.values():
                channel.outputs = dict(sorted(channel.outputs.items()))
        if snapshot.turn is not None:
            for name, text in snapshot.turn.channels.items():
                self._channel(snapshot.turn.turn_id, name).tail = [text]

    def _drop_tails(self, turn_id: str) -> None:
        for channel in self._turns.get(turn_id, {}).values():
            channel.tail.clear()

    def _turn(self, turn_id: str) -> dict[str, _Channel]:
        turn = self._turns.get(turn_id)
        if turn is None:
            turn = self._turns[turn_id] = {}
            while len(self._turns) > self._keep:
                self._turns.popitem(last=False)
        return turn

    def _channel(self, turn_id: str, name: str) -> _Channel:
        return self._turn(turn_id).setdefault(name, _Channel())
