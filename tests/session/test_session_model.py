"""A session against a list: any commands, in any order.

Two tests share the commands. With a pause after each, a model of twenty lines predicts every turn, every end and every
place in the queue. Without, commands fall into any moment, and what must always hold is checked.
"""

from __future__ import annotations

from typing import Any, Literal

import trio
from attrs import define, field, frozen
from hypothesis import given, settings
from hypothesis import strategies as st
from session_harness import Bench, Reader, Returned, Script, check_history, join, open_bench, settle
from structlog.testing import capture_logs

from gateway.config import Limits
from gateway.protocol.messages import (
    Aborted,
    Accepted,
    AnswerOk,
    BusyMode,
    Credit,
    Error,
    Input,
    TurnEnded,
    TurnStarted,
    Withdrawn,
)
from gateway.session import Turn

MAX_INBOX = 4
LIMITS = Limits(max_inbox=MAX_INBOX, segment_bytes=256, max_outbox=2)


@frozen
class Send:
    mode: BusyMode
    sender: Literal["alice", "bob"]
    repeat: bool = False
    """Send the newest id once more."""


@frozen
class Stop:
    scope: Literal["turn", "queue", "all"]


@frozen
class Withdraw:
    which: int
    """An index into all ids sent so far, from the newest."""


@frozen
class Do:
    what: Literal["say", "take", "finish", "fail", "ask", "answer", "state"]


@frozen
class Reconnect:
    who: Literal["alice", "bob"]


@frozen
class Pause:
    steps: int


sends = st.builds(
    Send,
    st.sampled_from(["queue", "interrupt", "steer", "collect", "reject"]),
    st.sampled_from(["alice", "bob"]),
    st.sampled_from([False, False, False, True]),
)
others = st.one_of(
    st.builds(Stop, st.sampled_from(["turn", "queue", "all"])),
    st.builds(Withdraw, st.integers(0, 5)),
    st.builds(Do, st.sampled_from(["say", "take", "finish", "finish", "fail", "ask", "answer", "state"])),
    st.builds(Reconnect, st.sampled_from(["alice", "bob"])),
)
# What a question does to the commands behind it is left to the hurried test.
commands = st.lists(
    st.one_of(sends, others).filter(lambda command: command not in (Do("ask"), Do("answer"))), max_size=30
)
hurried = st.lists(st.one_of(sends, others, st.builds(Pause, st.integers(1, 6))), max_size=40)


@define
class Model:
    """What a session does, when it has time to do it."""

    running: list[str] | None = None
    queue: list[tuple[bool, int, str, Send]] = field(factory=list)
    steer: list[tuple[bool, int, str, Send]] = field(factory=list)
    turns: list[list[str]] = field(factory=list)
    ends: list[str] = field(factory=list)
    withdrawn: list[tuple[str, str]] = field(factory=list)
    accepted: list[str] = field(factory=list)

    def send(self, number: int, name: str, send: Send) -> None:
        if name in self.accepted:
            return  # a repetition; one of a refused message is a new one
        waiting = len(self.queue) + len(self.steer)
        if (send.mode == "reject" and self.running) or waiting >= MAX_INBOX:
            return
        self.accepted.append(name)
        item = (send.mode != "interrupt", number, name, send)
        if self.running and send.mode == "steer":
            self.steer.append(item)
            return
        self.queue = sorted([*self.queue, item], key=lambda item: item[:2])
        if not self.running:
            self.start()
        elif send.mode == "interrupt":
            self.end("interrupted")

    def start(self) -> None:
        self.running = None
        if self.queue:
            first = self.queue.pop(0)
            self.running = [first[2]]
            kind = (first[3].mode, first[3].sender)
            while kind[0] == "collect" and self.queue and (self.queue[0][3].mode, self.queue[0][3].sender) == kind:
                self.running.append(self.queue.pop(0)[2])
            self.turns.append(self.running)

    def end(self, outcome: str) -> None:
        if self.running:
            self.ends.append(outcome)
            self.queue = sorted([*self.queue, *self.steer], key=lambda item: item[:2])
            self.steer = []
            self.start()

    def withdraw(self, items: list[Any], reason: str) -> None:
        for item in sorted(items, key=lambda item: item[1]):
            self.withdrawn.append((item[2], reason))
        self.queue = [item for item in self.queue if item not in items]
        self.steer = [item for item in self.steer if item not in items]

    def stop(self, scope: str) -> None:
        if scope != "turn":
            self.withdraw([*self.queue, *self.steer], "aborted")
        if scope != "queue":
            self.end("aborted")


class Player:
    """Carries commands out on a real session."""

    def __init__(self, bench: Bench, agent: Script) -> None:
        self.bench = bench
        self.agent = agent
        self.readers = {"alice": bench.reader, "bob": bench.attach("c2", "bob", cursor=0)}
        self.everyone = list(self.readers.values())
        self.sent: list[tuple[str, Send]] = []
        self.requests = 0
        self.connections = 2

    def play(self, command: Any) -> tuple[str, Send] | None:
        bench = self.bench
        if isinstance(command, Send):
            self.requests += 1
            if command.repeat and self.sent:
                name, first = self.sent[-1]
                bench.send(name, on_busy=command.mode, reader=self.readers[first.sender])
                return name, Send(command.mode, first.sender)
            name = f"r{len(self.sent)}"
            self.sent.append((name, command))
            bench.send(name, on_busy=command.mode, reader=self.readers[command.sender])
            return self.sent[-1]
        if isinstance(command, Stop):
            self.requests += 1
            bench.abort(self.readers["alice"], scope=command.scope)
        elif isinstance(command, Withdraw):
            self.requests += 1
            name = self.sent[-1 - command.which][0] if command.which < len(self.sent) else "nobody"
            bench.abort(self.readers["bob"], request_id=name)
        elif isinstance(command, Reconnect):
            old = self.readers[command.who]
            old.read()
            bench.session.detach(old, 1006, "")
            self.connections += 1
            new = Reader(f"c{self.connections}", command.who)
            join(bench.session, new, old.cursor)
            new.seen = list(old.events)  # the client has them; the connection is new
            self.readers[command.who] = new
            self.everyone.append(new)
        elif command.what == "answer":
            asks = bench.session.view.asks
            self.requests += 1
            bench.answer(next(iter(asks), "none"), "yes", self.readers["bob"])
        elif bench.session.turn is not None:
            self.agent._send.send_nowait(getattr(self, f"_{command.what}"))
        return None

    async def _say(self, turn: Turn) -> None:
        for i in range(20):
            await turn.send(f"word {i} ")

    async def _take(self, turn: Turn) -> None:
        turn.steered()

    async def _state(self, turn: Turn) -> None:
        await turn.update_state({"n": turn.state.get("n", 0) + 1})

    async def _fail(self, turn: Turn) -> None:
        raise ValueError("as told")

    async def _ask(self, turn: Turn) -> None:
        await turn.ask("input", "well?")

    async def _finish(self, turn: Turn) -> Any:
        return Returned(None)

    async def wind_up(self) -> None:
        """Let everything end by itself, answering all questions."""
        for _ in range(200):
            await settle()
            if not self.bench.session.busy:
                return
            for ask_id in list(self.bench.session.view.asks):
                self.requests += 1
                self.bench.answer(ask_id, "yes", self.readers["bob"])
            if self.bench.session.turn is not None:
                self.agent._send.send_nowait(self._finish)
        raise AssertionError("the session does not come to an end")

    def check(self) -> None:
        """What holds after everything has ended."""
        whole = self.bench.attach("judge", cursor=0)
        events = whole.events
        check_history(events, finished=True)
        inputs = [event.request_id for event in whole.of(Input)]
        taken = [name for event in whole.of(TurnStarted) for name in event.request_ids]
        withdrawn = [event.request_id for event in whole.of(Withdrawn)]
        assert sorted(inputs) == sorted(taken + withdrawn)
        assert len(whole.of(TurnEnded)) == len(whole.of(TurnStarted))
        assert self.agent.most <= 1
        replies = [frame for reader in self.everyone for frame in reader.frames]
        answers = [frame for frame in replies if isinstance(frame, Accepted | Aborted | Error | AnswerOk)]
        assert len(answers) == self.requests, "every request has one reply"
        accepted = {frame.request_id for frame in replies if isinstance(frame, Accepted)}
        assert accepted == set(inputs)
        gone = [name for frame in replies if isinstance(frame, Aborted) for name in frame.withdrawn]
        assert sorted(gone) == sorted(event.request_id for event in whole.of(Withdrawn) if event.reason == "aborted")
        for reader in self.readers.values():
            # Whoever followed live, over reconnects, ends with the same text as who reads it all at the end.
            for end in whole.of(TurnEnded):
                assert reader.text_of(end.turn_id) == whole.text_of(end.turn_id)
        assert self.bench.session.credit == MAX_INBOX
        for reader in self.readers.values():
            told = [
                frame.credit
                for frame in reader.frames
                if isinstance(frame, Accepted | Error | Credit) and frame.credit is not None
            ]
            assert not told or told[-1] > 0, "the last word on credit must not be zero"


@settings(max_examples=120, deadline=None)
@given(commands)
def test_with_time_in_between_it_is_the_model(script: list[Any]) -> None:
    async def main() -> None:
        agent = Script()
        model = Model()
        async with open_bench(agent, limits=LIMITS) as bench:
            player = Player(bench, agent)
            for number, command in enumerate(script):
                sent = player.play(command)
                await settle()
                if sent is not None:
                    model.send(number, *sent)
                elif isinstance(command, Stop):
                    model.stop(command.scope)
                elif isinstance(command, Withdraw):
                    name = player.sent[-1 - command.which][0] if command.which < len(player.sent) else ""
                    model.withdraw([item for item in [*model.queue, *model.steer] if item[2] == name], "aborted")
                elif command == Do("take"):
                    if model.running:
                        model.withdraw(list(model.steer), "steered")
                elif command == Do("finish"):
                    model.end("completed")
                elif command == Do("fail"):
                    model.end("failed")
                assert bench.turns == model.turns
                assert bench.ends == model.ends
                assert [(e.request_id, e.reason) for e in bench.reader.of(Withdrawn)] == model.withdrawn
                assert bench.inputs == model.accepted
                assert bench.session.credit == MAX_INBOX - len(model.queue) - len(model.steer)
                bench.reader = player.everyone[0]
                bench.reader.read()
            await player.wind_up()
            player.check()

    with capture_logs():
        trio.run(main)


@settings(max_examples=150, deadline=None)
@given(hurried)
def test_at_any_moment_what_must_hold_holds(script: list[Any]) -> None:
    async def main() -> None:
        agent = Script()
        async with open_bench(agent, limits=LIMITS) as bench:
            player = Player(bench, agent)
            for command in script:
                if isinstance(command, Pause):
                    for _ in range(command.steps):
                        await trio.lowlevel.checkpoint()
                else:
                    player.play(command)
            await player.wind_up()
            player.check()

    with capture_logs():
        trio.run(main)
