"""A state machine of the sans-I/O core alone: log, view, snapshots, keys, handshake, client. Fast, so many steps.

The machine is a gateway without I/O, in a few lines: what a session's publisher, its store and its connections do, done
at once with plain lists. Everything that decides is the real thing from `gateway.protocol` and `gateway.client.core`;
everything that clients get is checked by `gateway.testing.model`. Needs the extra ``testing``.
"""

from __future__ import annotations

import json
from collections import deque

from attrs import define, evolve, field
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway.client.core import ClientCore
from gateway.config import Limits
from gateway.protocol import codec
from gateway.protocol import messages as m
from gateway.protocol.handshake import FEATURES, position_for
from gateway.protocol.keys import Key, Keys, digest_of
from gateway.protocol.log import Chunk, CursorExpired, Log, Tails
from gateway.protocol.view import SessionView, encode_snapshot
from gateway.testing.invariants import VOLATILE, the_cursor_is_continued_or_resynced
from gateway.testing.model import Client, History, Violation, Work, check_always

BLOCK = 32
"""Numbers reserved at once: few, so that a crash often skips some and a history often crosses into a new block."""

WINDOW_MS = 100_000
POLICY = m.Policy(**{name: getattr(Limits(), name) for name in m.Policy.__annotations__})

names = st.sampled_from(["c1", "c2", "c3"])


@define(eq=False)
class Peer:
    """A client, and its connection as the gateway sees it. `cursor` is None while there is none."""

    core: ClientCore
    model: Client
    cursor: int | None = None
    line: deque[bytes] = field(factory=deque)
    """On the way to the client."""


class CoreMachine(RuleBasedStateMachine):
    """One session with three clients, in memory, without time or I/O."""

    @initialize(
        max_events=st.sampled_from([8, 12, 1_000]),
        max_bytes=st.sampled_from([1_500, 100_000]),
        buffer_events=st.sampled_from([4, 1_000]),
        tail=st.sampled_from([1, 600, 1 << 40]),
    )
    def begin(self, max_events: int, max_bytes: int, buffer_events: int, tail: int) -> None:
        self.max_events, self.max_bytes = max_events, max_bytes
        self.tails = Tails(tail, 1 << 60)
        self.log = Log(max_events=max_events, max_bytes=max_bytes, tails=self.tails)
        self.view = SessionView()
        self.keys = Keys(WINDOW_MS)
        self.history = History("s", "e1", reserved=BLOCK)
        self.next = 1
        self.now = 1_000
        self.count = 0
        self.turn: Work | None = None
        self.asks: list[str] = []
        self.pieces: list[m.Delta] = []
        self.used: dict[str, tuple[str, int, int]] = {}
        self.stored: list[m.Event] = []
        self.store_floor = 0
        self.peers = {
            name: Peer(ClientCore("agent", session_id="s", buffer_events=buffer_events), Client(name))
            for name in ("c1", "c2", "c3")
        }
        for peer in self.peers.values():
            self._connect(peer)

    # the publisher and its store

    def _publish(self, *events: m.Event) -> None:
        """Number, store and show, as a publisher does."""
        for event in events:
            event.seq, event.at = self.next, self.now
            self.next += 1
        reserved = self.history.reserved
        if self.next + BLOCK // 2 > reserved:
            reserved = self.next + BLOCK
        durable = [event for event in events if not event.volatile]
        self.history.commit([json.loads(codec.encode_event(event, event.seq)) for event in durable], reserved)
        self.stored += durable
        for event in events:
            self.log.append(event)
            self.view.apply(event)
            if isinstance(event, m.Delta):
                self.pieces.append(event)
        # A store keeps no less than the log does.
        while self.stored and self.stored[0].seq <= self.log.floor:
            self.store_floor = self.stored.pop(0).seq

    def _word(self) -> str:
        self.count += 1
        return f"w{self.count}"

    def _say(self, channel: str, final: bool = False) -> str:
        assert self.turn is not None
        word = self._word()
        self.turn.say(channel, word, final)
        return f"{word} "

    # the session

    @rule(again=st.booleans(), conflict=st.booleans())
    def send(self, again: bool, conflict: bool) -> None:
        """A message: new, repeated, or with a used id and another content. The keys decide; a dict knows better."""
        request_id = next(reversed(self.used)) if again and self.used else f"r{len(self.used) + 1}"
        content = self.used[request_id][0] if request_id in self.used else f"content of {request_id}"
        content += "!" * conflict
        self.keys.expire(self.now)
        key = self.keys.get(request_id)
        known = self.used.get(request_id)
        if known is not None and known[2] < self.now - WINDOW_MS:
            known = None
        if (key is None) != (known is None):
            raise Violation("keys_are_kept_for_the_window", (5,), f"{request_id}: {key}, should be {known}")
        if key is not None and known is not None:
            same = key.digest == digest_of(content, {})
            if key.seq != known[1] or same != (content == known[0]):
                raise Violation("repetitions_are_recognised", (5,), f"{request_id}: {key}, should be {known}")
            return
        if request_id in self.used:
            return  # out of its window: a new input under an old id is another story
        self.history.sent[request_id] = [content]
        event = m.Input(request_id=m.RequestId(request_id), content=content)
        self._publish(event)
        self.keys.add(request_id, Key(event.seq, digest_of(content, {}), self.now))
        self.used[request_id] = (content, event.seq, self.now)

    @precondition(lambda self: self.turn is None and bool(self.view.queue))
    @rule(collect=st.booleans())
    def start_turn(self, collect: bool) -> None:
        self._start(collect)

    def _start(self, collect: bool) -> None:
        taken = list(self.view.queue)[: 3 if collect else 1]
        for request_id in taken:
            self.history.modes[request_id] = {"collect"}
        turn_id = f"t{self.next}"
        self.turn = self.history.work[turn_id] = Work(turn_id, taken, epoch=self.history.epoch)
        self._publish(m.TurnStarted(turn_id=turn_id, request_ids=[m.RequestId(name) for name in taken]))

    def _in_turn(self) -> Work:
        """The running turn. If there is none one starts, and for it something is sent if nothing waits."""
        if self.turn is None:
            if not self.view.queue:
                self.send(again=False, conflict=False)
            self._start(collect=False)
        assert self.turn is not None
        return self.turn

    @precondition(lambda self: self.view.queue)
    @rule()
    def withdraw(self) -> None:
        self._publish(m.Withdrawn(request_id=m.RequestId(next(iter(self.view.queue))), reason="aborted"))

    @rule(
        n=st.sampled_from([1, 2, 7, 8, 9, 20]),
        channel=st.sampled_from(["answer", "reasoning"]),
        size=st.sampled_from([0, 90]),
    )
    def stream(self, n: int, channel: str, size: int) -> None:
        turn_id = self._in_turn().turn_id
        self._publish(
            *[m.Delta(turn_id=turn_id, channel=channel, text=self._say(channel) + " " * size) for _ in range(n)]
        )

    @rule(channel=st.sampled_from(["answer", "reasoning"]))
    def seal(self, channel: str) -> None:
        """What has been streamed becomes an output, as after `segment_bytes`."""
        turn_id = self._in_turn().turn_id
        tail = self._tail(channel, 0)
        if tail:
            self._publish(m.Output(turn_id=turn_id, channel=channel, content=tail, metadata={"more": True}))

    @rule()
    def replace(self) -> None:
        """A final text of the agent replaces what it streamed."""
        turn_id = self._in_turn().turn_id
        content = self._say("answer", final=True)
        self._publish(m.Output(turn_id=turn_id, channel="answer", content=content))

    @rule(key=st.sampled_from(["a", "b"]), n=st.integers(0, 5))
    def progress(self, key: str, n: int) -> None:
        self._publish(m.Progress(turn_id=self._in_turn().turn_id, key=key, data=n))

    @rule(n=st.integers(0, 3), keep=st.booleans())
    def other_events(self, n: int, keep: bool) -> None:
        turn_id = self._in_turn().turn_id
        self._publish(
            m.ToolCall(turn_id=turn_id, call_id=self._word(), name="look", arguments=n),
            m.State(patch={"n": n, "nested": {"k": n if keep else None}}),
            m.Custom(name="note", data=n, turn_id=turn_id),
        )

    @rule()
    def ask(self) -> None:
        turn_id = self._in_turn().turn_id
        ask_id = self._word()
        self.asks.append(ask_id)
        self._publish(m.Ask(turn_id=turn_id, ask_id=ask_id, kind="approval", prompt=ask_id))

    @precondition(lambda self: self.turn is not None and bool(self.asks))
    @rule()
    def answer(self) -> None:
        assert self.turn is not None
        self._publish(m.Answered(turn_id=self.turn.turn_id, ask_id=self.asks.pop(0), value=True))

    @rule(fails=st.booleans())
    def end_turn(self, fails: bool) -> None:
        self._in_turn().ended = "raised" if fails else "returned"
        self._finish("failed" if fails else "completed")

    def _finish(self, outcome: m.TurnOutcome) -> None:
        assert self.turn is not None
        turn_id = self.turn.turn_id
        events: list[m.Event] = []
        for channel in ("answer", "reasoning"):
            tail = self._tail(channel, 0)
            if tail and outcome != "lost":
                events.append(m.Output(turn_id=turn_id, channel=channel, content=tail))
        events += [m.Answered(turn_id=turn_id, ask_id=ask_id, outcome="cancelled") for ask_id in self.asks]
        events.append(m.TurnEnded(turn_id=turn_id, outcome=outcome))
        self.turn, self.asks = None, []
        self._publish(*events)

    def _tail(self, channel: str, cursor: int) -> str:
        """The open turn's text on a channel after its last output, and after `cursor`."""
        if self.turn is None:
            return ""
        turn_id = self.turn.turn_id
        outputs = [
            event["seq"]
            for event in self.history.log
            if event["type"] == "output" and event["channel"] == channel and event["turn_id"] == turn_id
        ]
        since = max([cursor, *outputs])
        return "".join(
            piece.text
            for piece in self.pieces
            if piece.seq > since and piece.channel == channel and piece.turn_id == turn_id
        )

    # the process

    @rule(loses_history=st.booleans().map(lambda lose: lose))
    def crash(self, loses_history: bool) -> None:
        """The process dies and comes back from its store; perhaps as another epoch, which forgets nothing here."""
        self.history.causes["crash"] += 1
        for peer in self.peers.values():
            self._cut(peer)
        if loses_history:
            old, self.history = self.history, evolve(self.history, epoch=self.history.epoch + "'")
            self.history.clients, self.history.shown = [], {}
            self.history.log, self.history.by_seq = list(old.log), dict(old.by_seq)
            for work in self.history.work.values():
                work.epoch = self.history.epoch
        base = self.store_floor
        self.log = Log(max_events=self.max_events, max_bytes=self.max_bytes, base=base, tails=self.tails)
        view, self.view = self.view, SessionView()
        for event in self.stored:
            self.log.append(event)
            self.view.apply(event)
        self.view.cursor = self.log.head
        self.view.state, self.view.queue = view.state, view.queue  # a store keeps these apart from its events
        self.next = self.history.reserved + 1
        self.pieces = []
        if self.turn is not None:
            self._finish("lost")

    @rule(ms=st.sampled_from([1, 50_000, 60_000]))
    def time_passes(self, ms: int) -> None:
        self.now += ms

    @rule()
    def let_go(self) -> None:
        """Memory is left to the store, as far as there is too much of it."""
        self.log.let_go()

    def _loaded(self, after: int, upto: int) -> list[m.Event]:
        return [event for event in self.stored if after < event.seq <= upto]

    def _read(self, cursor: int, budget: int) -> Chunk:
        """What follows a cursor, from memory or from the store."""
        log = self.log
        if cursor >= log.tail:
            return log.read(cursor, budget)
        return log.page(cursor, self._loaded(cursor, log.page_end(cursor, budget))).read(cursor, budget)

    # the connections

    def _connect(self, peer: Peer) -> None:
        hello = codec.decode_client(peer.core.open(None))[0]
        assert isinstance(hello, m.Hello)
        log, epoch = self.log, self.history.epoch
        position = position_for(hello, existed=True, epoch=epoch, floor=log.floor, head=log.head)
        ok = m.HelloOk(
            protocol=2,
            server=m.ServerInfo(name="core", version="0", node="n"),
            connection_id=self._word(),
            session_id="s",
            agent_id="agent",
            epoch=epoch,
            resumed=True,
            cursor=position.cursor,
            head=log.head,
            oldest_cursor=log.floor,
            resync_required=position.resync is not None,
            resync_reason=position.resync,
            credit=1,
            policy=POLICY,
            features=FEATURES,
            presence=[],
            health=m.Health(status="ok", draining=False),
        )
        frame = codec.encode_frame(ok)
        the_cursor_is_continued_or_resynced(json.loads(frame), self.history, hello.since or 0, hello.epoch)
        peer.line.append(frame)
        peer.cursor = position.cursor
        if position.resync is not None:
            self._snapshot(peer, position.resync)

    def _snapshot(self, peer: Peer, reason: m.ResyncReason) -> None:
        missing = self.log.older_than_tail(8, 1 << 20)
        peer.line.append(
            encode_snapshot(
                self.view,
                self.log,
                epoch=self.history.epoch,
                reason=reason,
                max_events=8,
                max_bytes=1 << 20,
                older=self._loaded(*missing) if missing is not None else (),
            )
        )
        peer.cursor = self.log.head

    def _cut(self, peer: Peer) -> None:
        peer.line.clear()
        if peer.cursor is not None:
            peer.cursor = None
            peer.core.close()

    @rule(name=names)
    def connect(self, name: str) -> None:
        """Come back on another connection; what was on the way on the old one is lost."""
        peer = self.peers[name]
        self._cut(peer)
        self._connect(peer)

    @rule(name=names)
    def cut(self, name: str) -> None:
        self._cut(self.peers[name])

    @rule(name=names)
    def resync(self, name: str) -> None:
        peer = self.peers[name]
        if peer.cursor is not None and peer.core.joined:
            self._snapshot(peer, "requested")

    @rule(name=names, budget=st.sampled_from([1, 300, 64 * 1024]))
    def serve(self, name: str, budget: int) -> None:
        """Put what follows the connection's cursor on the line, as a flusher does."""
        peer = self.peers[name]
        if peer.cursor is None or peer.cursor == self.log.head:
            return
        try:
            chunk = self._read(peer.cursor, budget)
        except CursorExpired:
            self._snapshot(peer, "cursor_expired")
            return
        if len(chunk.payloads) > 1 and sum(map(len, chunk.payloads)) > budget:
            raise Violation("reads_are_bounded", (12,), f"{sum(map(len, chunk.payloads))} bytes for {budget}")
        if chunk.cursor <= peer.cursor:
            raise Violation("reads_make_progress", (13,), f"from {peer.cursor} to {chunk.cursor}")
        peer.line += chunk.payloads
        peer.cursor = chunk.cursor

    @rule(name=names, count=st.sampled_from([1, 3, 100]))
    def deliver(self, name: str, count: int) -> None:
        """Frames arrive at the client, which takes in what it has room for."""
        peer = self.peers[name]
        while peer.line and count and peer.core.wants_input:
            peer.core.receive(peer.line.popleft(), 0.0)
            count -= 1

    @rule(name=names, count=st.sampled_from([1, 5, 100]))
    def take(self, name: str, count: int) -> None:
        """The client's user takes events. Each is checked, and so is what the client shows then."""
        peer = self.peers[name]
        core, model = peer.core, peer.model
        for _ in range(count):
            epoch = core._tracker.epoch
            item = core.take()
            if item is None:
                return
            if isinstance(item, m.Snapshot):
                frame = json.loads(codec.encode_frame(item))
                if item.epoch == self.history.epoch:
                    model.lost()
                    model.snapshot(frame, self.history)
                else:
                    model.history = None  # of an epoch that is over
            elif model.history is None and (core.epoch or epoch) == self.history.epoch and core.cursor == item.seq:
                if item.first == 1 or model.cursor == 0:
                    model._begin(self.history)
                    model.event(json.loads(codec.encode_event(item, item.first)))
            elif model.history is not None:
                model.event(json.loads(codec.encode_event(item, item.first)))
            self._compare(peer)

    def _compare(self, peer: Peer) -> None:
        core, model = peer.core, peer.model
        if model.history is None:
            return
        if core.cursor != model.cursor:
            raise Violation("clients_know_where_they_are", (13,), f"at {core.cursor}, should be {model.cursor}")
        fold = model.history.until(core.cursor)
        shown = core.view
        seen = (shown.turn.turn_id if shown.turn else None, list(shown.queue), list(shown.asks), shown.state)
        if seen != (fold.turn, fold.queue, fold.asks, fold.state):
            raise Violation("a_replay_leads_to_the_same_place", (13, 14), f"{model.name} shows {seen}, the log {fold}")
        for turn_id, channel in [*model.outputs, *model.tails]:
            text, said = core.text_of(turn_id, channel), model.text(turn_id, channel)
            if turn_id in model.whole and text != said:
                raise Violation("text_of_is_the_text", (4,), f"{model.name} shows {text!r}, should be {said!r}")

    @rule(cursor=st.integers(0, 400), budget=st.sampled_from([1, 64 * 1024]))
    def read_from_anywhere(self, cursor: int, budget: int) -> None:
        """Any cursor at or above the floor gets a gapless continuation that carries exactly the text above it."""
        log = self.log
        cursor = log.floor + cursor % (log.head - log.floor + 1)
        position, text = cursor, {"answer": "", "reasoning": ""}
        running = None if self.turn is None else self.turn.turn_id
        durable = []
        while position < log.head:
            chunk = self._read(position, budget)
            if not chunk.payloads:
                raise Violation("reads_make_progress", (13,), f"nothing after {position}, the head is {log.head}")
            for payload in chunk.payloads:
                event = json.loads(payload)
                if not event["first"] <= position + 1 <= event["seq"]:
                    raise Violation("covers", (13,), f"{event} after {position}")
                position = event["seq"]
                if event["type"] == "delta" and event["turn_id"] == running:
                    text[event["channel"]] += event["text"]
                elif event["type"] == "output" and event["turn_id"] == running:
                    text[event["channel"]] = ""
                if event["type"] not in VOLATILE:
                    durable.append(event["seq"])
        if durable != [event["seq"] for event in self.history.log if event["seq"] > cursor]:
            raise Violation("skips_nothing", (13,), f"from {cursor}: {durable}")
        for channel, said in text.items():
            if said != self._tail(channel, cursor):
                raise Violation("deltas_carry_the_text_above_the_cursor", (13,), f"from {cursor}: {said!r}")

    # what holds

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "history"):
            return
        check_always(self.history)
        log = self.log
        if log.retained_events > max(1, self.max_events):
            raise Violation("the_log_is_bounded", (12,), f"{log.retained_events} events of {self.max_events}")
        if log.retained_bytes > self.max_bytes and log.retained_events > 1:
            raise Violation("the_log_is_bounded", (12,), f"{log.retained_bytes} bytes of {self.max_bytes}")
        latest: dict[str, int] = {}
        for event in self.history.log:
            if event["type"] == "output":
                latest[event["channel"]] = event["seq"]
        running = None if self.turn is None else self.turn.turn_id
        for entry in log:
            if isinstance(entry, m.Delta | m.Progress) and entry.turn_id != running:
                raise Violation(
                    "text_is_superseded", (4, 12), f"the log keeps {entry.type} {entry.seq}: its turn is over"
                )
            if isinstance(entry, m.Delta) and entry.seq < latest.get(entry.channel, 0):
                raise Violation("text_is_superseded", (4, 12), f"the log keeps delta {entry.seq} beside its output")

    def teardown(self) -> None:
        """At the end everyone connects, reads everything, and shows the same."""
        if not hasattr(self, "history"):
            return
        for name, peer in self.peers.items():
            for _ in range(400):
                self.take(name, 100)
                if peer.cursor is None or (not peer.line and peer.core.wants_fresh_line):
                    self.connect(name)
                self.serve(name, 64 * 1024)
                self.deliver(name, 100)
            if peer.core.cursor != self.log.head:
                raise Violation("clients_agree", (13,), f"{name} is at {peer.core.cursor}, the head is {self.log.head}")
        self.holds()
