"""The client's decisions, without I/O: against a gateway made of the real log, and frame by frame."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_gateway import accepted, custom, delta, error, hello_ok, snapshot

from gateway.client.core import ClientCore
from gateway.client.states import Joined, Retry, Settled
from gateway.client.texts import TurnTexts
from gateway.errors import FrameError, RequestRefused, SessionRefused
from gateway.protocol import messages as m
from gateway.protocol.handshake import position_for
from gateway.protocol.log import Log
from gateway.protocol.view import SessionView, encode_snapshot


def said(*frames: dict[str, Any]) -> bytes:
    return json.dumps(frames[0] if len(frames) == 1 else frames).encode()


def frames(core: ClientCore, now: float = 0.0) -> list[dict[str, Any]]:
    return [json.loads(payload) for payload in core.outgoing(now)[0]]


def joined(core: ClientCore, **fields: Any) -> ClientCore:
    core.open(None)
    core.receive(said(hello_ok(**fields)), 0.0)
    return core


def message(core: ClientCore, request_id: str = "r", content: str = "hi") -> Any:
    return core.message(m.Message(request_id=m.RequestId(request_id), content=content))


def drain(core: ClientCore) -> list[Any]:
    items = []
    while (item := core.take()) is not None:
        items.append(item)
    return items


# --- against the real log --------------------------------------------------------------------------------------------


class Gateway:
    """The server's side of the story: a log, its fold, and what one connection has been sent."""

    def __init__(self, max_events: int) -> None:
        self.log = Log(max_events=max_events, max_bytes=1 << 20)
        self.view = SessionView()
        self.texts = TurnTexts(1000)
        self.all: list[m.Event] = []
        self.wire: list[bytes] = []
        self.cursor: int | None = None
        self._turn = 0
        self._requests = 0

    def append(self, event: m.Event) -> None:
        event.seq = event.first = self.log.head + 1
        self.log.append(event)
        self.view.apply(event)
        self.texts.apply(event)
        self.all.append(event)

    def step(self, what: str) -> None:
        """Something happens in the session, if it can now."""
        turn = self.view.turn
        if what == "input":
            self._requests += 1
            self.append(m.Input(request_id=m.RequestId(f"r{self._requests}"), content="x"))
        elif turn is None:
            if what == "start" and self.view.queue:
                self._turn += 1
                self.append(
                    m.TurnStarted(turn_id=f"t{self._turn}", request_ids=[m.RequestId(next(iter(self.view.queue)))])
                )
        elif what == "delta":
            self.append(m.Delta(turn_id=turn.turn_id, channel="answer", text=f"[{self.log.head}]"))
        elif what == "output":
            text = "".join(turn.tails.get("answer", []))
            self.append(m.Output(turn_id=turn.turn_id, channel="answer", content=text, metadata={"more": True}))
        elif what == "ask":
            self.append(m.Ask(turn_id=turn.turn_id, ask_id=f"a{self.log.head}", kind="approval", prompt="?"))
        elif what == "end":
            self.step("output")
            self.append(m.TurnEnded(turn_id=turn.turn_id, outcome="completed"))

    def snapshot(self, reason: m.ResyncReason) -> bytes:
        return encode_snapshot(self.view, self.log, epoch="e_1", reason=reason, max_events=200, max_bytes=1 << 20)

    def connect(self, raw: bytes) -> None:
        hello = json.loads(raw)
        request = m.Hello(protocol_min=2, protocol_max=2, agent_id="echo", since=hello["since"], epoch=hello["epoch"])
        position = position_for(request, existed=True, epoch="e_1", floor=self.log.floor, head=self.log.head)
        self.cursor = position.cursor
        self.wire = [
            said(
                hello_ok(
                    cursor=position.cursor, head=self.log.head, oldest_cursor=self.log.floor,
                    resync_required=position.resync is not None, resync_reason=position.resync,
                )
            )
        ]  # fmt: skip
        if position.resync is not None:
            self.wire.append(self.snapshot(position.resync))

    def flush(self, budget: int) -> None:
        assert self.cursor is not None
        if self.cursor < self.log.floor:
            self.wire.append(self.snapshot("cursor_expired"))
            self.cursor = self.log.head
        chunk = self.log.read(self.cursor, budget)
        self.cursor = chunk.cursor
        if len(chunk.payloads) > 1:
            self.wire.append(b"[" + b",".join(chunk.payloads) + b"]")
        else:
            self.wire += chunk.payloads


STEPS = st.sampled_from(
    [
        "input",
        "start",
        *["delta"] * 3,
        "output",
        "ask",
        "end",
        *["flush"] * 2,
        *["deliver"] * 3,
        *["take"] * 2,
        "cut",
        "request",
    ]
)


@settings(max_examples=400, deadline=None)
@given(
    steps=st.lists(STEPS, min_size=40, max_size=200),
    room=st.integers(1, 12),
    max_events=st.integers(4, 40),
    budget=st.integers(50, 400),
)
def test_what_a_client_has_in_the_end_is_what_the_session_is(
    steps: list[str], room: int, max_events: int, budget: int
) -> None:
    """Whatever is cut, dropped, merged, evicted or refetched on the way."""
    gateway = Gateway(max_events)
    core = ClientCore("echo", buffer_events=room, keep_turns=1000)
    got: list[Any] = []
    waiting = None

    def connect() -> None:
        core.close()
        gateway.connect(core.open(None))

    def take() -> None:
        item = core.take()
        if item is not None:
            got.append(item)
        if core.wants_fresh_line:
            connect()

    connect()
    for step in steps:
        if step == "cut":
            connect()
        elif step == "flush":
            gateway.flush(budget)
        elif step == "deliver":
            # As the session does: nothing is read while the core does not want it.
            if gateway.wire and core.wants_input:
                core.receive(gateway.wire.pop(0), 0.0)
        elif step == "take":
            take()
        elif step == "request":
            waiting = waiting or core.control(m.Resync())
            waiting = None if waiting.settled else waiting
            # Written, but its answer is still far away: reading has to go on.
            core.outgoing(0.0)
        else:
            gateway.step(step)
    # In the end the line holds and the user takes everything.
    if waiting is not None:
        core.forget(waiting)
    for _ in range(2000):
        if core.cursor == gateway.log.head and not gateway.wire and not len(core._buffer):
            break
        if not core.joined and not gateway.wire:
            connect()
        if gateway.wire and core.wants_input:
            core.receive(gateway.wire.pop(0), 0.0)
        elif core.joined:
            gateway.flush(budget)
        take()
    else:
        pytest.fail("the client never caught up")

    assert core.cursor == gateway.log.head
    assert (core.view.state, list(core.view.queue), list(core.view.asks)) == (
        gateway.view.state, list(gateway.view.queue), list(gateway.view.asks),
    )  # fmt: skip
    assert (core.view.turn is None) == (gateway.view.turn is None)
    if core.view.turn is not None and gateway.view.turn is not None:
        assert core.view.turn.channels() == gateway.view.turn.channels()
    # Exactly once, in order: positions only rise, and an event covers on from where the one before it ended.
    position = 0
    for item in got:
        if isinstance(item, m.Snapshot):
            assert item.cursor >= position
            position = item.cursor
        else:
            assert item.first <= position + 1 <= item.seq
            position = item.seq
    if not any(isinstance(item, m.Snapshot) for item in got):
        kept = {event.seq for event in got}
        for event in gateway.all:
            assert event.seq in kept or isinstance(event, m.Delta), "only deltas may be merged or superseded"
        for turn in {event.turn_id for event in gateway.all if isinstance(event, m.TurnStarted)}:
            assert core.text_of(turn, "answer") == gateway.texts.of(turn, "answer")


@settings(max_examples=300)
@given(st.lists(st.sampled_from(["new", "cut", "accept", "full", "credit", "drain", "write"]), max_size=60))
def test_a_message_is_written_until_it_is_accepted(steps: list[str]) -> None:
    """In order, never two of one id on one connection, and never after its answer."""
    core = joined(ClientCore("echo"))
    order: list[str] = []
    on_line: list[str] = []
    accepted_ids: list[str] = []
    count, now = 0, 0.0
    for step in [*steps, "cut", "write", *["accept", "credit", "write"] * 70]:
        now += 0.5
        if step == "new":
            count += 1
            message(core, f"r{count}")
        elif step == "cut":
            core.close()
            core.open(None)
            core.receive(said(hello_ok(resumed=True)), now)
            on_line.clear()
        elif step == "write":
            for frame in frames(core, now):
                assert frame["request_id"] not in [*on_line, *accepted_ids]
                on_line.append(frame["request_id"])
                order.append(frame["request_id"])
        elif step == "credit":
            core.receive(said({"type": "credit", "credit": 256}), now)
        elif on_line:
            if step == "accept":
                accepted_ids.append(on_line.pop(0))
                core.receive(said(accepted(accepted_ids[-1])), now)
            else:
                code = "inbox_full" if step == "full" else "draining"
                # The gateway refuses all that is behind it, too: it handles frames in order.
                for request_id in on_line:
                    core.receive(said(error(code, request_id=request_id, retryable=True, retry_after_ms=300)), now)
                on_line.clear()
    assert accepted_ids == [f"r{i + 1}" for i in range(count)]


# --- frame by frame --------------------------------------------------------------------------------------------------


def test_duplicates_are_ignored_and_a_gap_asks_for_a_snapshot() -> None:
    core = joined(ClientCore("echo"))
    core.receive(said(custom(1), custom(2), custom(2), custom(1)), 0)
    core.receive(said(custom(5)), 0)
    core.receive(said(custom(6, first=3)), 0)  # Until the snapshot nothing counts, even what would fit.
    assert [frame["type"] for frame in frames(core)] == ["resync"]
    core.receive(said(snapshot(6, state={"a": 1}), custom(7)), 0)
    assert [getattr(item, "seq", "snapshot") for item in drain(core)] == [1, 2, "snapshot", 7]
    counts = core.statistics()
    assert (counts.duplicates, counts.gaps, counts.snapshots) == (2, 1, 1)
    assert core.view.state == {"a": 1}
    assert (core.cursor, core.epoch) == (7, "e_1")


def test_a_promised_snapshot_that_never_came_is_asked_for_again() -> None:
    core = joined(ClientCore("echo", session_id="s_1", since=3, epoch="e_0"), cursor=90, head=90, resync_required=True)
    core.close()
    assert json.loads(core.open(None))["since"] == 3
    assert json.loads(core.open(None))["epoch"] == "e_0"


def test_what_is_persisted_is_what_was_taken() -> None:
    core = joined(ClientCore("echo"))
    core.receive(said(custom(1), custom(2)), 0)
    assert (core.cursor, json.loads(core.open(None))["since"]) == (0, 2)
    core.take()
    assert core.cursor == 1


def test_events_that_do_not_fit_while_a_request_waits_are_fetched_again() -> None:
    core = joined(ClientCore("echo", buffer_events=2))
    request = message(core)
    frames(core)
    core.receive(said(custom(1)), 0)
    core.receive(said(custom(2)), 0)
    assert core.wants_input, "the answer is behind the events"
    core.receive(said(custom(3)), 0)
    core.receive(said(accepted("r", 4), custom(4)), 0)
    assert request.settled
    assert not core.wants_input
    assert not core.wants_fresh_line
    core.take()
    assert core.wants_fresh_line
    core.close()
    assert json.loads(core.open(None))["since"] == 2
    core.receive(said(hello_ok(cursor=2, head=4)), 0)
    core.receive(said(custom(3)), 0)
    assert [item.seq for item in drain(core)] == [2, 3]
    assert core.statistics().overflows == 1


def test_text_is_outputs_then_deltas() -> None:
    core = joined(ClientCore("echo"))
    output = {"type": "output", "seq": 3, "first": 1, "at": 0, "turn_id": "t_1", "channel": "answer", "content": "ab"}
    core.receive(said(delta(1, "a"), delta(2, "b"), output | {"metadata": {"more": True}}, delta(4, "c")), 0)
    texts = [core.text_of("t_1", "answer") for _ in iter(core.take, None)]
    assert texts == ["a", "ab", "ab", "abc"]
    # A snapshot of the same history without that output in its transcript keeps it.
    turn = {"turn_id": "t_1", "request_ids": [], "channels": {"answer": "cd"}, "progress": {}, "started_at": 0}
    core.receive(said(snapshot(9, turn=turn)), 0)
    drain(core)
    assert core.text_of("t_1", "answer") == "abcd"
    core.receive(said(snapshot(2, epoch="e_2", turn=turn)), 0)
    drain(core)
    assert core.text_of("t_1", "answer") == "cd"


def test_only_the_newest_turns_keep_their_text() -> None:
    core = joined(ClientCore("echo", keep_turns=2))
    core.receive(said(*(delta(i, "x", turn_id=f"t_{i}") for i in (1, 2, 3))), 0)
    drain(core)
    assert [core.text_of(f"t_{i}", "answer") for i in (1, 2, 3)] == ["", "x", "x"]


def test_credit_holds_messages_back() -> None:
    core = joined(ClientCore("echo"), credit=1)
    message(core, "r1")
    message(core, "r2")
    assert [frame["request_id"] for frame in frames(core)] == ["r1"]
    core.receive(said(accepted("r1", credit=0)), 0)
    assert frames(core, 1) == []
    core.receive(said({"type": "credit", "credit": 5}), 2)
    assert [frame["request_id"] for frame in frames(core, 2)] == ["r2"]


def test_without_a_word_about_credit_one_message_is_tried() -> None:
    core = joined(ClientCore("echo"), credit=0)
    message(core, "r1")
    payloads, _, again = core.outgoing(0.0)
    assert (payloads, again) == ([], 5.0)
    assert len(frames(core, again)) == 1


@pytest.mark.parametrize(("code", "waits"), [("inbox_full", 0.7), ("unavailable", 0.7), ("draining", 0.7)])
def test_a_retryable_refusal_is_retried_after_the_hint(code: str, waits: float) -> None:
    core = joined(ClientCore("echo"))
    request = message(core)
    frames(core)
    core.receive(said(error(code, request_id="r", retryable=True, retry_after_ms=700, credit=0)), 10)
    payloads, _, again = core.outgoing(10.0)
    assert payloads == []
    assert again >= 10 + waits
    core.receive(said({"type": "credit", "credit": 1}), 11)
    assert len(frames(core, 11)) == 1
    assert not request.settled


@pytest.mark.parametrize("code", ["busy", "request_id_conflict", "invalid_frame", "forbidden"])
def test_a_final_refusal_is_told(code: str) -> None:
    core = joined(ClientCore("echo"))
    request = message(core)
    frames(core)
    [effect] = core.receive(said(error(code, request_id="r", retryable=code == "busy")), 0)
    assert isinstance(effect, Settled)
    assert isinstance(request.error, RequestRefused)
    assert request.error.code == code


def test_what_cannot_be_sent_is_refused_here() -> None:
    core = joined(ClientCore("echo"))
    with pytest.raises(RequestRefused, match="JSON"):
        message(core, content="\ud800")
    with pytest.raises(RequestRefused, match="128"):
        message(core, "r" * 129)
    message(core, "r1")
    with pytest.raises(RequestRefused, match="request_id_in_use"):
        message(core, "r1")
    large = message(core, "r2", "x" * 1000)
    assert [frame["request_id"] for frame in frames(core)] == ["r1"]
    assert large.error.code == "payload_too_large"


def test_aborts_go_out_one_at_a_time() -> None:
    core = joined(ClientCore("echo"))
    first = core.control(m.Abort())
    second = core.control(m.Abort(scope="queue"))
    assert [frame["scope"] for frame in frames(core)] == ["turn"]
    core.receive(said({"type": "aborted", "turn_id": "t_1", "withdrawn": []}), 0)
    assert first.result.turn_id == "t_1"
    assert [frame["scope"] for frame in frames(core)] == ["queue"]
    core.receive(said({"type": "aborted", "turn_id": None, "withdrawn": ["r"]}), 0)
    assert second.result.withdrawn == ["r"]


def test_an_abandoned_abort_keeps_its_answer_from_the_next() -> None:
    core = joined(ClientCore("echo"))
    first = core.control(m.Abort())
    frames(core)
    core.forget(first)
    second = core.control(m.Abort())
    assert frames(core) == []
    core.receive(said({"type": "aborted", "turn_id": "t_1", "withdrawn": []}), 0)
    assert not second.settled
    assert len(frames(core)) == 1


def test_an_abort_cut_off_is_repeated_only_if_it_names_its_target() -> None:
    core = joined(ClientCore("echo"))
    vague = core.control(m.Abort(scope="all"))
    frames(core)
    core.close()
    assert vague.error.code == "connection_lost"
    named = core.control(m.Abort(turn_id="t_1"))
    joined(core)
    assert len(frames(core)) == 1
    core.close()
    joined(core)
    assert len(frames(core)) == 1
    core.receive(said(error("no_active_turn")), 0)
    assert named.result == m.Aborted(turn_id="t_1", withdrawn=[])


@pytest.mark.parametrize("by", ["c_1", "c_other", None])
def test_a_repeated_answer_counts_if_the_log_says_it_was_ours(by: str | None) -> None:
    core = joined(ClientCore("echo"))
    request = core.control(m.Answer(ask_id="a_1", value=True))
    frames(core)
    core.close()
    joined(core, connection_id="c_2", head=1)
    frames(core)
    core.receive(said(error("unknown_ask")), 0)
    assert not request.settled, "the log has not been heard yet"
    if by is not None:
        answered = {"type": "answered", "seq": 1, "first": 1, "at": 0, "turn_id": "t", "ask_id": "a_1", "value": True}
        core.receive(said(answered | {"by": by, "outcome": "answered"}), 0)
    else:
        core.receive(said(custom(1)), 0)
        core.outgoing(5.0)
    assert request.settled
    assert (request.error is None) == (by == "c_1")


def test_a_wrong_answer_is_told_to_its_sender() -> None:
    core = joined(ClientCore("echo"))
    abort = core.control(m.Abort())
    answer = core.control(m.Answer(ask_id="a_1", value=7))
    frames(core)
    core.receive(said(error("invalid_frame")), 0)
    assert answer.error.code == "invalid_frame"
    assert not abort.settled


def test_a_signal_does_not_outlive_its_line() -> None:
    core = ClientCore("echo")
    request = core.control(m.ClientSignal(name="typing"))
    core.close()
    assert request.result is False


def test_frames_that_answer_nothing_are_counted_only() -> None:
    core = joined(ClientCore("echo"))
    core.receive(
        said(error("rate_limited"), accepted("nobody"), {"type": "aborted", "turn_id": None, "withdrawn": []}), 0
    )
    core.receive(said({"type": "from_the_future", "x": 1}), 0)
    assert core.statistics().refused_frames == 1


@pytest.mark.parametrize("raw", [b"{", b"[1]", b'{"type":"delta","seq":"1"}', b"\xff", said(custom(1))])
def test_nonsense_is_one_error(raw: bytes) -> None:
    core = ClientCore("echo")
    core.open(None)
    with pytest.raises(FrameError):
        core.receive(raw, 0)


def test_pings_are_answered_by_one_pong() -> None:
    core = joined(ClientCore("echo"))
    core.receive(said({"type": "ping", "nonce": 1}, {"type": "ping", "nonce": 2}), 0)
    assert frames(core) == [{"type": "pong", "nonce": 2}]


# --- verdicts --------------------------------------------------------------------------------------------------------


def judge(core: ClientCore, code: int, reason: str = "", **options: Any) -> Retry | SessionRefused:
    return core.judge(code, reason, **{"now": 0.0, "chance": 1.0, **options})


@pytest.mark.parametrize("code", [1000, 1003, 1008, 1009, 4400, 4401, 4403, 4404, 4406])
def test_terminal_codes(code: int) -> None:
    verdict = judge(joined(ClientCore("echo")), code, "some_reason")
    assert isinstance(verdict, SessionRefused)
    assert (verdict.close_code, verdict.code) == (code, "some_reason")


@pytest.mark.parametrize("code", [1001, 1002, 1006, 1011, 1012, 1013, 4408, 4429, 4999])
def test_codes_to_come_back_from(code: int) -> None:
    assert isinstance(judge(joined(ClientCore("echo")), code), Retry)


def hello_error(code: str, **fields: Any) -> bytes:
    base = {"type": "hello_error", "code": code, "message": f"it is {code}", "retryable": False, "retry_after_ms": None}
    return said(base | {"next_step": "do this", "server_min_version": 2, "server_max_version": 2} | fields)


def test_a_refused_hello_is_explained() -> None:
    core = ClientCore("nobody")
    core.open(None)
    core.receive(hello_error("agent_not_found"), 0)
    verdict = judge(core, 1006)
    assert isinstance(verdict, SessionRefused)
    assert (verdict.code, verdict.next_step, verdict.close_code) == ("agent_not_found", "do this", None)


def test_a_retryable_refusal_s_hint_is_a_floor() -> None:
    core = ClientCore("echo")
    core.open(None)
    core.receive(hello_error("rate_limited", retryable=True, retry_after_ms=9000), 0)
    assert judge(core, 4429) == Retry(9.0, "it is rate_limited")


def test_goaway_s_hint_is_used_once() -> None:
    core = joined(ClientCore("echo"))
    core.receive(said({"type": "goaway", "reason": "drain", "reconnect_after_ms": 4000, "deadline_ms": 9}), 0)
    assert judge(core, 1012, chance=0.0) == Retry(4.0, "closed with 1012")
    assert judge(core, 1006, chance=0.0) == Retry(0.0, "the line broke")


def test_delays_grow_until_a_line_held() -> None:
    core = ClientCore("echo")
    assert [judge(core, 1006).delay for _ in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]  # type: ignore[union-attr]
    joined(core)
    assert judge(core, 1006, now=9.0) == Retry(30.0, "the line broke")
    joined(core)
    assert judge(core, 1006, now=10.0) == Retry(0.5, "the line broke")


def test_an_expired_token_is_refreshed_once() -> None:
    core = joined(ClientCore("echo", can_refresh=True))
    assert isinstance(judge(core, 4401, "token_expired"), Retry)
    assert isinstance(judge(core, 4401, "unauthorized"), SessionRefused)
    core = joined(ClientCore("echo", can_refresh=True))
    judge(core, 4401, "token_expired")
    joined(core)
    assert isinstance(judge(core, 4401, "token_expired"), Retry)


@pytest.mark.parametrize(("status", "stops"), [(404, True), (403, True), (429, False), (502, False), (408, False)])
def test_http_refusals(status: int, stops: bool) -> None:
    assert isinstance(judge(ClientCore("echo"), 1006, "HTTP", status=status), SessionRefused) == stops
    # Once it has worked, the URL is right: a proxy in front answers like that while the gateway is away.
    assert isinstance(judge(joined(ClientCore("echo")), 1006, "HTTP", status=status), Retry)


def test_joining_is_an_effect() -> None:
    core = ClientCore("echo")
    core.open(None)
    [effect] = core.receive(said(hello_ok(session_id="s_9")), 0)
    assert isinstance(effect, Joined)
    assert core.session_id == "s_9"
