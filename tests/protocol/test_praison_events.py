"""Dialect 1, numbered events: wherever its client is cut, it has every character once and no gap; and both dialects
tell the same story."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from praison_reader import PraisonReader
from steady import steady

from gateway.protocol import codec
from gateway.protocol import marks as marks_module
from gateway.protocol import messages as m
from gateway.protocol.cursor import CursorTracker
from gateway.protocol.log import UNBOUNDED, Chunk, CursorExpired, Log, Tails
from gateway.protocol.praison_events import MOST_KEPT, PIECE, WRAPPING, Answer, Stream

FRAME = 1024 * 1024
BUDGET = 64 * 1024


class Writer:
    """Fills a log as a session does: numbers without gaps, outputs that replace their deltas, one turn at a time."""

    def __init__(self, *, marks: bool = True, tails: Tails = UNBOUNDED, **bounds: int) -> None:
        self.tails = tails
        self.log = Log(**{"max_events": 10_000, "max_bytes": 2**23, **bounds}, tails=tails)  # type: ignore[arg-type]
        self.store: list[m.Event] = []
        if marks:
            self.log.keep_marks()
        self.turn_id = ""
        self.outcomes: dict[str, str] = {}
        self.text: dict[tuple[str, str], str] = {}
        """(turn, channel) → all that was written there."""
        self.inputs: list[str] = []
        self._turns = 0
        self._tails: dict[str, str] = {}

    def add(self, event: m.Event, hole: int = 0, parts: list[str] | None = None) -> None:
        event.seq = event.first = self.log.head + (len(parts) if parts else 1) + hole
        event.at = 1_700_000_000_000 + event.seq
        self.log.append(event, parts=parts)
        if not event.volatile:
            self.store.append(event)

    def start(self) -> None:
        self._turns += 1
        self.turn_id = f"t{self._turns}"
        content = f"question {self._turns}"
        self.inputs.append(content)
        self.add(m.Input(request_id=m.RequestId(f"r{self._turns}"), content=content))
        self.add(m.TurnStarted(turn_id=self.turn_id, request_ids=[m.RequestId(f"r{self._turns}")]))

    def delta(self, text: str, channel: str = "answer") -> None:
        self.deltas([text], channel)

    def deltas(self, parts: list[str], channel: str = "answer") -> None:
        """Several deltas that the publisher made one of: each has its number."""
        text = "".join(parts)
        self._tails[channel] = self._tails.get(channel, "") + text
        self._say(channel, text)
        self.add(m.Delta(turn_id=self.turn_id, channel=channel, text=text), parts=parts)

    def _say(self, channel: str, text: str) -> None:
        key = self.turn_id, channel
        self.text[key] = self.text.get(key, "") + text

    def seal(self, channel: str = "answer", **metadata: bool) -> None:
        text = self._tails.pop(channel, None)
        if text is not None:
            self.add(m.Output(turn_id=self.turn_id, channel=channel, content=text, metadata=metadata))

    def say(self, text: str, **metadata: bool) -> None:
        """An output that was not streamed."""
        self.seal("answer", more=True)
        self._say("answer", text)
        self.add(m.Output(turn_id=self.turn_id, channel="answer", content=text, metadata=metadata))

    def tool(self) -> None:
        self.add(m.ToolCall(turn_id=self.turn_id, call_id="c", name="look", arguments={"n": self.log.head}))

    def progress(self) -> None:
        self.add(m.Progress(turn_id=self.turn_id, key="p", data=self.log.head))

    def end(self, outcome: Any = "completed") -> None:
        self.outcomes[self.turn_id] = outcome
        error = None
        if outcome == "lost":  # what was not sealed is gone, and so are some numbers
            for channel, text in self._tails.items():
                key = self.turn_id, channel
                self.text[key] = self.text[key][: len(self.text[key]) - len(text)]
            self._tails.clear()
            error = m.ErrorInfo(code="lost", message="the gateway stopped", retryable=True)
        elif outcome == "failed":
            error = m.ErrorInfo(code="agent_error", message="it failed")
        for channel in list(self._tails):
            self.seal(channel, **({} if outcome == "completed" else {"partial": True}))
        self.add(m.TurnEnded(turn_id=self.turn_id, outcome=outcome, error=error), hole=40 if outcome == "lost" else 0)
        self.turn_id = ""

    def reloaded(self) -> None:
        """The process was started again: what is volatile is gone, and what was known about it."""
        self.log = Log(
            max_events=10_000, max_bytes=2**23, tails=self.tails,
            older=[(event.seq, len(codec.encode_event(event, event.seq))) for event in self.store],
        )  # fmt: skip
        self.log.keep_marks()

    def read(self, read: Callable[[Log, int, int], Chunk], cursor: int, budget: int) -> Chunk:
        """As a connection does: from memory, or a page of the store."""
        if cursor >= self.log.tail:
            return read(self.log, cursor, budget)
        end = self.log.page_end(cursor, budget)
        page = self.log.page(cursor, [event for event in self.store if cursor < event.seq <= end])
        return read(page, cursor, budget)


class Line:
    """A client of dialect 1 on lines that are cut: after `frames` wrapped events it has nothing more of a chunk."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.client = PraisonReader()
        self.connect()

    def connect(self) -> None:
        self.client.expected = self.client.cursor + 1  # as `hello_ok` says
        self.position = self.client.cursor
        self.stream = Stream("s", "echo", start=self.position, max_frame_bytes=FRAME)

    def read(self, frames: int | None = None, budget: int = BUDGET) -> bool:
        """Read what there is; with `frames`, be cut after so many of them. Whether there was anything."""
        chunk = self.writer.read(self.stream.read, self.position, budget)
        for payload in chunk.payloads[:frames]:
            self.client.take(payload)
        assert chunk.cursor > self.position or not chunk.payloads
        moved, self.position = chunk.cursor > self.position, chunk.cursor
        if frames is not None:
            self.connect()
        return moved

    def catch_up(self, budget: int = BUDGET) -> None:
        while self.read(budget=budget):
            pass


def contents(finals: list[dict[str, Any]]) -> str:
    """What an application that takes responses alone has of a turn."""
    assert all(final["offset"] == 0 and "truncated" not in final for final in finals)
    return "".join(final["content"] for final in finals)


def check(writer: Writer, client: PraisonReader, *, exact: bool = True, whole: bool = True) -> None:
    """The client's whole story. `exact`: every token is there; else they may stop, but not repeat. `whole`: so is every
    response; else one may say that it is not, where a client was cut in an answer that is in the store alone."""
    assert client.gaps == []
    assert client.inputs == writer.inputs
    for key, text in writer.text.items():
        tokens = client.tokens.get(key, "")
        if writer.outcomes[key[0]] == "lost":
            continue  # tokens may be known to the client alone
        assert text == tokens if exact else text.startswith(tokens), key
    for turn_id, outcome in writer.outcomes.items():
        finals = client.finals[turn_id]
        if whole or not any(final.get("truncated") for final in finals):
            assert contents(finals) == writer.text.get((turn_id, "answer"), "")
        assert finals[-1]["outcome"]["status"] == {"completed": "ok", "failed": "error"}.get(outcome, outcome)
        ends = [e for e in client.events if e["type"] == "stream_end" and e["data"]["turn_id"] == turn_id]
        assert len(ends) == 1
    assert {event["type"] for event in client.repeated} <= {"error", "stream_end"}


# --- the property ----------------------------------------------------------------------------------------------------

TEXT = st.text(st.sampled_from('ab "\\é😀\n'), min_size=1, max_size=4)
WRITES = st.one_of(
    st.tuples(st.just("delta"), TEXT, st.sampled_from(["answer", "reasoning", "notes"])),
    st.tuples(st.just("delta"), TEXT, st.just("answer")),
    st.tuples(st.just("deltas"), st.lists(TEXT, min_size=2, max_size=9), st.sampled_from(["answer", "reasoning"])),
    st.tuples(st.just("tool")),
    st.tuples(st.just("progress")),
    st.tuples(st.just("seal"), st.sampled_from(["answer", "reasoning"])),
    st.tuples(st.just("end"), st.sampled_from(["completed", "completed", "aborted", "failed"])),
)
READS = st.one_of(
    st.tuples(st.just("read"), st.integers(1, 2_000)),
    st.tuples(st.just("cut"), st.integers(0, 6), st.integers(1, 4_000)),
)
SCRIPTS = st.lists(WRITES | WRITES | READS, max_size=80)


def play(
    writer: Writer, script: list[tuple[Any, ...]], read: Callable[[int], Any], cut: Callable[[int, int], Any]
) -> None:
    for name, *args in script:
        if name == "read":
            read(*args)
        elif name == "cut":
            cut(*args)
        else:
            if not writer.turn_id:
                writer.start()
            if name == "seal":
                writer.seal(args[0], more=True)
            else:
                getattr(writer, name)(*args)
    if writer.turn_id:
        writer.end()


@steady
@given(SCRIPTS)
def test_a_client_cut_anywhere_has_everything_once(script: list[tuple[Any, ...]]) -> None:
    writer = Writer()
    line = Line(writer)
    play(writer, script, lambda budget: line.read(budget=budget), line.read)
    line.catch_up()
    check(writer, line.client)


@steady
@given(SCRIPTS, st.lists(st.integers(0, 3), max_size=40), st.integers(1, 3_000))
def test_a_replay_cut_anywhere_has_everything_once(script: list[tuple[Any, ...]], cuts: list[int], budget: int) -> None:
    writer = Writer()
    line = Line(writer)
    play(writer, script, lambda _: None, lambda *_: None)
    for frames in cuts:
        line.read(frames, budget)
    line.catch_up(budget)
    check(writer, line.client)


@steady
@given(SCRIPTS, SCRIPTS)
def test_after_a_restart_responses_are_whole_and_no_token_is_repeated(
    before: list[tuple[Any, ...]], after: list[tuple[Any, ...]]
) -> None:
    writer = Writer()
    line = Line(writer)
    play(writer, before, lambda budget: line.read(budget=budget), line.read)
    writer.reloaded()
    line.connect()
    play(writer, after, lambda budget: line.read(budget=budget), line.read)
    line.catch_up()
    check(writer, line.client, exact=False, whole=False)


@steady
@given(SCRIPTS, SCRIPTS)
def test_a_session_that_is_read_from_the_store(before: list[tuple[Any, ...]], after: list[tuple[Any, ...]]) -> None:
    """By a client that starts at its beginning: deltas or not, it has everything once."""
    writer = Writer(marks=False)
    play(writer, before, lambda _: None, lambda *_: None)
    writer.reloaded()
    line = Line(writer)
    play(writer, after, lambda budget: line.read(budget=budget), lambda _, budget: line.read(budget=budget))
    line.catch_up(300)
    check(writer, line.client, exact=False)


@steady
@given(SCRIPTS)
def test_with_little_memory_responses_are_whole_and_no_token_is_repeated(script: list[tuple[Any, ...]]) -> None:
    """What a client has not read may leave memory as soon as the next turn starts."""
    tails = Tails(1, 1)
    tails.share = 600
    writer = Writer(tails=tails)
    line = Line(writer)
    play(writer, script, lambda budget: line.read(budget=budget), line.read)
    line.catch_up(200)
    check(writer, line.client, exact=False, whole=False)


@steady
@given(SCRIPTS)
def test_both_dialects_tell_the_same_story(script: list[tuple[Any, ...]]) -> None:
    """Two clients of one session, one of each version, cut at the same places: what they know is the same."""
    writer = Writer()
    line = Line(writer)
    tracker = CursorTracker(0)
    told: dict[tuple[str, str], list[str]] = {}
    tails: dict[tuple[str, str], str] = {}
    others: list[tuple[str, Any]] = []

    def native(budget: int, frames: int | None = None) -> bool:
        chunk = writer.read(Log.read, tracker.cursor, budget)
        for payload in chunk.payloads[:frames]:
            event = json.loads(payload)
            assert tracker.offer(codec.decode_event(payload)) == "new"
            key = event.get("turn_id"), event.get("channel")
            if event["type"] == "delta":
                tails[key] = tails.get(key, "") + event["text"]
            elif event["type"] == "output":
                tails.pop(key, None)
                told.setdefault(key, []).append(event["content"])
            elif event["type"] in ("input", "tool_call", "turn_ended"):
                others.append((event["type"], event.get("content") or event.get("arguments") or event.get("outcome")))
        return bool(chunk.payloads)

    def both(frames: int, budget: int) -> None:
        line.read(frames, budget)
        native(budget, frames)

    play(writer, script, lambda budget: (line.read(budget=budget), native(budget)), both)
    line.catch_up()
    while native(BUDGET):
        pass
    assert not tails
    assert {key: "".join(parts) for key, parts in told.items()} == line.client.tokens
    assert list(seen_by(line.client)) == others


def seen_by(client: PraisonReader) -> Iterator[tuple[str, Any]]:
    outcomes = {"ok": "completed", "error": "failed"}
    for event in client.events:
        data = event["data"]
        if event["type"] == "response" and data["status"] == "accepted":
            yield "input", data["content"]
        elif event["type"] == "tool_call_stream":
            yield "tool_call", data["tool_call"]["arguments"]
        elif event["type"] == "stream_end":
            status = data["outcome"]["status"]
            yield "turn_ended", outcomes.get(status, status)


# --- by hand ---------------------------------------------------------------------------------------------------------


def written(line: Line) -> list[tuple[str, int]]:
    return [(event["type"], event["data"]["cursor"]) for event in line.client.events]


def test_an_answer_read_live() -> None:
    writer = Writer()
    line = Line(writer)
    writer.start()
    writer.delta("one ")
    line.read()
    writer.delta("two")
    line.read()
    writer.end()
    line.read()
    assert written(line) == [
        ("response", 1), ("typing", 2), ("token_stream", 3), ("token_stream", 4), ("response", 5), ("stream_end", 6),
    ]  # fmt: skip
    check(writer, line.client)
    assert [e["sequence"] for e in line.client.events] == [1, 2, 3, 4, 5, 6]


def test_the_tail_of_an_answer_that_ended_while_the_client_was_away() -> None:
    writer = Writer()
    line = Line(writer)
    writer.start()
    for n in range(5):
        writer.delta(f"{n} ")
    line.read(frames=4)  # two of the tokens among them
    assert line.client.cursor == 4
    writer.end()
    assert len(writer.log) == 4
    line.catch_up()
    tokens = [("token_stream", 5), ("token_stream", 6), ("token_stream", 7)]
    assert written(line)[4:] == [*tokens, ("response", 8), ("stream_end", 9)]
    assert [e["data"]["content"] for e in line.client.events[4:7]] == ["2 ", "3 ", "4 "]
    check(writer, line.client)


def test_text_stands_where_it_stood_between_other_events() -> None:
    writer = Writer()
    line = Line(writer)
    writer.start()
    writer.delta("before")
    writer.tool()
    writer.delta("after")
    writer.end()
    line.catch_up()
    assert [event["data"].get("content") for event in line.client.events] == [
        "question 1", None, "before", None, "after", "beforeafter", None,
    ]  # fmt: skip


def test_a_long_answer_in_segments_is_one_response() -> None:
    writer = Writer()
    line = Line(writer)
    writer.start()
    for _ in range(3):
        writer.delta("x" * 1000)
        writer.seal(more=True)
    writer.delta("end")
    writer.end()
    line.catch_up()
    check(writer, line.client)
    assert [final["content"] for final in line.client.finals["t1"]] == ["x" * 3000 + "end"]


def test_an_answer_that_is_all_sealed_is_a_response_at_the_end_of_its_turn() -> None:
    writer = Writer()
    line = Line(writer)
    writer.start()
    writer.delta("x" * 1000)
    writer.seal(more=True)
    writer.end()
    line.catch_up()
    check(writer, line.client)


def test_an_answer_beyond_a_frame_says_where_its_response_begins() -> None:
    writer = Writer()
    line = Line(writer)
    writer.start()
    for _ in range(20):
        writer.delta("x" * 65_536)
        writer.seal(more=True)
    writer.delta("end")
    writer.end()
    line.catch_up()
    (final,) = line.client.finals["t1"]
    assert final["offset"] == 20 * 65_536
    assert final["content"] == "end"
    assert line.client.tokens["t1", "answer"] == writer.text["t1", "answer"]


@pytest.mark.parametrize("make", [
    lambda text: m.Input(request_id=m.RequestId("r"), content=text),
    lambda text: m.ToolResult(turn_id="t1", call_id="c", result={"data": text}),
    lambda text: m.Ask(turn_id="t1", ask_id="a", kind="input", prompt=text),
], ids=["input", "object", "ask"])  # fmt: skip
@pytest.mark.parametrize("character", ["x", "\x01", "é"])
@pytest.mark.parametrize("spare", [0, 100, 1500])
def test_what_only_just_fits_into_a_frame_still_does(
    make: Callable[[str], m.Event], character: str, spare: int
) -> None:
    """Its client's WebSocket library closes at 1 MiB, and what is wrapped is longer."""
    writer = Writer()
    line = Line(writer)
    writer.start()
    writer.add(fill(make, character, FRAME - spare))
    (payload,) = line.stream.read(writer.log, 2, BUDGET).payloads
    assert len(payload) <= FRAME
    data = json.loads(payload)["event"]["data"]
    assert data.get("truncated", False) is (spare < 200)


def fill(make: Callable[[str], m.Event], character: str, size: int) -> m.Event:
    """An event of (nearly) `size` bytes of JSON."""
    empty = make("")
    empty.seq = 3
    room = size - len(codec.encode_event(empty, 3)) - 26  # for its time
    return make(character * (room // (len(codec.dump_json(character)) - 2)))


@pytest.mark.parametrize("character", ["x", "\x01", "é"])
@pytest.mark.parametrize("channel", ["answer", "reasoning"])
def test_an_output_that_only_just_fits_into_a_frame_is_whole(channel: str, character: str) -> None:
    writer = Writer()
    line = Line(writer)
    writer.start()
    output = fill(lambda text: m.Output(turn_id="t1", channel=channel, content=text), character, FRAME)
    writer.add(output)
    writer.end()
    while (chunk := line.stream.read(writer.log, line.position, BUDGET)).payloads:
        assert all(len(payload) <= FRAME for payload in chunk.payloads)
        for payload in chunk.payloads:
            line.client.take(payload)
        line.position = chunk.cursor
    assert type(output) is m.Output
    text = line.client.tokens["t1", channel]
    if channel == "answer":
        final = line.client.finals["t1"][0]
        assert len(text) == final["offset"]
        text += final["content"]
    assert text == output.content
    assert line.client.gaps == line.client.repeated == []


def test_text_that_was_never_streamed() -> None:
    """An agent that returns a long text: all but its last segment would be in no response if it were too long."""
    writer = Writer()
    line = Line(writer)
    writer.start()
    writer.say("segment ", more=True)
    writer.say("end")
    writer.end()
    line.catch_up()
    assert line.client.tokens == {("t1", "answer"): "segment "}
    assert contents(line.client.finals["t1"]) == "segment end"


def test_an_output_that_replaces_what_was_streamed() -> None:
    writer = Writer()
    line = Line(writer)
    writer.start()
    writer.delta("draft")
    line.read(frames=1)
    writer._tails.clear()
    writer.add(m.Output(turn_id="t1", channel="answer", content="final version"))
    line.catch_up()
    assert line.client.tokens == {}
    assert contents(line.client.finals["t1"]) == "final version"


def test_a_session_that_nobody_of_this_dialect_has_read() -> None:
    """Its deltas were never marked, but a client that starts at the beginning has none of them."""
    writer = unmarked("one ", "two")
    line = Line(writer)
    line.catch_up()
    check(writer, line.client)


def unmarked(*segments: str) -> Writer:
    """A turn that ended before anyone of this dialect read it."""
    writer = Writer(marks=False)
    writer.start()
    for text in segments[:-1]:
        writer.delta(text)
        writer.seal(more=True)
    writer.delta(segments[-1])
    writer.end()
    writer.log.keep_marks()
    return writer


def test_what_depends_on_who_reads_is_not_kept() -> None:
    writer = unmarked("one ", "two ", "three")
    inside, start = Line(writer), Line(writer)
    inside.client.cursor = 3  # somewhere in the first segment, perhaps
    inside.connect()
    inside.catch_up()
    assert "".join(inside.client.tokens.values()) == ""
    start.catch_up()
    check(writer, start.client)


def test_a_client_that_was_cut_right_behind_a_segment_gets_the_others() -> None:
    writer = unmarked("one ", "two ", "three")
    line = Line(writer)
    line.read(frames=3)
    assert line.client.tokens == {("t1", "answer"): "one "}
    line.catch_up()
    check(writer, line.client)


def test_a_client_that_has_the_start_of_a_turn_alone_gets_all_of_its_answer() -> None:
    writer = unmarked("one ", "two")
    line = Line(writer)
    line.read(frames=2)  # the input and the start
    line.catch_up()
    check(writer, line.client)


def test_text_whose_marks_go_while_it_is_read_is_not_repeated() -> None:
    writer = Writer()
    line = Line(writer)
    writer.start()
    line.read()
    for text in ("one ", "two ", "three"):
        writer.delta(text)
    writer.end()
    line.read(budget=1)
    assert line.client.tokens == {("t1", "answer"): "one "}
    assert writer.log.marks is not None
    writer.log.marks.drop(writer.log.head)
    line.catch_up()
    assert line.client.tokens == {("t1", "answer"): "one "}
    assert contents(line.client.finals["t1"]) == "one two three"


def test_text_that_was_not_streamed_between_text_that_was() -> None:
    writer = Writer()
    line = Line(writer)
    writer.start()
    writer.delta("streamed ")
    line.read()
    writer.say("said ", more=True)
    writer.delta("streamed")
    writer.end()
    line.catch_up()
    check(writer, line.client)


def test_an_input_that_waits_does_not_part_an_answer() -> None:
    writer = Writer()
    writer.start()
    writer.delta("one ")
    writer.seal(more=True)
    cursor = writer.log.head
    writer.add(m.Input(request_id=m.RequestId("r2"), content="later"))
    writer.delta("two")
    writer.end()
    line = Line(writer)
    line.client.cursor = cursor
    line.connect()
    line.catch_up()
    assert line.client.tokens == {("t1", "answer"): "two"}
    assert contents(line.client.finals["t1"]) == "one two"


def test_an_answer_whose_beginning_is_gone_is_what_is_left_of_it() -> None:
    """Nothing behind a response is in it."""
    writer = Writer(max_events=4)
    writer.start()
    for text in ("zero ", "one ", "two "):
        writer.delta(text)
        writer.seal(more=True)
    writer.say("three")
    writer.say("four ", more=True)
    assert [entry.event.content for entry in writer.log.entries] == ["one ", "two ", "three", "four "]  # type: ignore[attr-defined]
    line = Line(writer)
    line.client.cursor = writer.log.entries[1].seq
    line.connect()
    line.catch_up()
    (final,) = line.client.finals["t1"]
    assert (final["content"], final["offset"], final["truncated"]) == ("one two three", None, True)


def test_no_token_follows_a_segment_that_was_perhaps_not_had() -> None:
    writer = Writer(marks=False)
    writer.start()
    writer.delta("one ")
    writer.seal(more=True)
    writer.log.keep_marks()
    line = Line(writer)
    line.client.cursor = 3  # somewhere in the segment, perhaps
    line.connect()
    writer.delta("two")
    line.catch_up()
    writer.end()
    line.catch_up()
    assert "".join(line.client.tokens.values()) == ""
    assert contents(line.client.finals["t1"]) == "one two"


def holed() -> tuple[Writer, Line]:
    """A turn goes on, and its client was perhaps cut in the answer's first segment: it gets no token behind that."""
    writer = Writer(marks=False)
    writer.start()
    writer.delta("one ")
    writer.seal(more=True)
    writer.log.keep_marks()
    line = Line(writer)
    line.client.cursor = 3
    line.connect()
    line.catch_up()
    return writer, line


def test_a_hole_in_the_answer_ends_with_its_response() -> None:
    writer, line = holed()
    writer.delta("two")
    writer.seal()
    writer.delta("three")
    line.catch_up()
    writer.end()
    line.catch_up()
    assert line.client.tokens == {("t1", "answer"): "three"}
    assert [final["content"] for final in line.client.finals["t1"]] == ["one two", "three"]


def test_a_hole_in_the_answer_is_none_in_the_reasoning() -> None:
    writer, line = holed()
    writer.delta("two")
    writer.delta("hm", "reasoning")
    writer.seal("reasoning")
    writer.end()
    line.catch_up()
    assert {key: text for key, text in line.client.tokens.items() if text} == {("t1", "reasoning"): "hm"}
    assert contents(line.client.finals["t1"]) == "one two"


def test_tokens_before_a_response_are_no_part_of_the_text_behind_it() -> None:
    """Of that, the client has nothing yet: it gets all of it, though nobody knows any more how it was streamed."""
    writer = Writer()
    line = Line(writer)
    writer.start()
    writer.delta("one ")
    line.read()
    writer.seal()
    line.read()
    writer.delta("two")
    writer.end()
    assert writer.log.marks is not None
    writer.log.marks.drop(writer.log.head)
    line.catch_up()
    check(writer, line.client)


def test_what_is_remembered_of_an_answer() -> None:
    def output(content: str, turn_id: str = "t", channel: str = "answer", **metadata: bool) -> m.Output:
        return m.Output(turn_id=turn_id, channel=channel, content=content, metadata=metadata)

    begun = Answer().followed_by(m.TurnStarted(turn_id="t", request_ids=[]))
    assert begun == Answer("t", whole=True)
    sealed = begun.followed_by(output("one ", more=True)).followed_by(output("two", partial=True))
    assert sealed == Answer("t", "one two", whole=True)
    for event in (output("hm", channel="reasoning"), m.Delta(turn_id="t", channel="answer", text="x")):
        assert sealed.followed_by(event) == sealed
    responded = sealed.followed_by(output("end"))
    assert responded == Answer("t", whole=True, responded=True)
    assert responded.followed_by(output("more", more=True)) == Answer("t", "more", whole=True, responded=True)
    assert sealed.followed_by(output("end", "u")) == Answer("u", whole=True, responded=True)
    assert sealed.followed_by(output("part", "u", more=True)) == Answer("u", "part")

    full = responded.followed_by(output("x" * MOST_KEPT, more=True))
    assert full == Answer("t", "x" * MOST_KEPT, whole=True, responded=True)
    over = full.followed_by(output("y", more=True))
    assert over == Answer("t", "", whole=True, responded=True, skipped=MOST_KEPT + 1)
    assert over.followed_by(output("z", more=True)) == Answer("t", "z", True, True, MOST_KEPT + 1)
    again = over.followed_by(output("z" * (MOST_KEPT + 1), more=True))
    assert again == Answer("t", "", True, True, 2 * MOST_KEPT + 2)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_cut_within_deltas_that_are_one_event(count: int) -> None:
    for had in range(count):
        writer = Writer()
        line = Line(writer)
        writer.start()
        writer.deltas([f"{n} " for n in range(count)])
        line.read(frames=2 + had)
        writer.delta("more")
        line.catch_up()
        writer.end()
        line.catch_up()
        check(writer, line.client)


def test_a_client_that_had_the_start_of_a_turn_here_gets_its_text_although_both_are_forgotten() -> None:
    writer = Writer(max_events=2)
    line = Line(writer)
    writer.start()
    line.read()
    writer.delta("one")
    writer.end()
    assert writer.log.floor == line.position
    assert writer.log.marks is not None
    writer.log.marks.drop(writer.log.head)
    line.catch_up()
    check(writer, line.client)


def test_the_size_of_what_is_read_is_that_of_all_its_frames() -> None:
    writer = Writer()
    writer.start()
    writer.deltas(["one ", "two ", "three"])
    chunk = Line(writer).stream.read(writer.log, 0, BUDGET)
    assert len(chunk.payloads) == 5
    assert chunk.size == sum(len(payload) for payload in chunk.payloads)


def test_what_is_sealed_behind_a_response_is_in_another() -> None:
    writer = Writer()
    line = Line(writer)
    writer.start()
    writer.say("one")
    writer.delta("two")
    writer.seal(more=True)
    writer.end()
    line.catch_up()
    assert [final["content"] for final in line.client.finals["t1"]] == ["one", "two"]


def small(writer: Writer, room: int) -> Line:
    """A client whose frames have `room` bytes."""
    line = Line(writer)
    line.stream = Stream("s", "echo", start=0, max_frame_bytes=room)
    return line


@pytest.mark.parametrize("outcome", ["completed", "aborted"])
def test_the_response_to_an_answer_beyond_a_frame_is_its_end(outcome: str) -> None:
    writer = Writer()
    line = small(writer, 150_000)
    writer.start()
    text = "".join(f"{n:9} " for n in range(20_000))
    for i in range(0, len(text), 50_000):
        writer.delta(text[i : i + 50_000])
        if outcome == "aborted":
            writer.seal(more=True)
    writer.end(outcome)
    line.catch_up()
    (final,) = line.client.finals["t1"]
    assert (final["offset"], final["content"]) == (len(text) - PIECE, text[-PIECE:])
    tokens = [event["data"]["content"] for event in line.client.events if event["type"] == "token_stream"]
    # A segment has a number of its own, and its text went out before; the response is all there is under its number.
    assert tokens.count("") == (4 if outcome == "aborted" else 0)
    assert "".join(tokens) == text


def test_what_fits_into_a_frame_is_not_cut() -> None:
    writer = Writer()
    line = Line(writer)
    writer.start()
    writer.say("x" * 500_000, more=True)
    writer.say("y" * 400_000)
    writer.end()
    line.catch_up()
    assert [len(event["data"]["content"]) for event in line.client.events if event["type"] == "token_stream"] == [
        500_000
    ]
    assert contents(line.client.finals["t1"]) == writer.text["t1", "answer"]


def test_pieces_of_one_output_are_told_apart() -> None:
    """A client leaves out what has an ``event_id`` that it has had."""
    for channel in ("answer", "reasoning", "notes"):
        writer = Writer()
        line = small(writer, 150_000)
        writer.start()
        text = "".join(f"{n:9} " for n in range(30_000))
        writer.add(m.Output(turn_id="t1", channel=channel, content=text, metadata={"more": True}))
        line.catch_up()
        assert line.client.repeated == []
        assert line.client.tokens == {("t1", channel): text}


def test_text_that_must_be_shortened_keeps_all_that_fits() -> None:
    writer = Writer()
    line = small(writer, 10_000)
    content = "".join(f"{n:4} " for n in range(2_000))
    writer.add(m.Input(request_id=m.RequestId("r"), content=content))
    (payload,) = line.stream.read(writer.log, 0, BUDGET).payloads
    data = json.loads(payload)["event"]["data"]
    assert 10_000 - WRAPPING - 200 < len(payload) <= 10_000
    assert content.startswith(data["content"])
    assert (data["truncated"], data["request_id"]) == (True, "r")
    line.client.take(payload)
    assert line.client.inputs == [data["content"]]
    error = m.ErrorInfo(code="agent_error", message=content * 2)
    writer.add(m.TurnEnded(turn_id="t1", outcome="failed", error=error))
    payloads = line.stream.read(writer.log, 1, BUDGET).payloads
    assert all(len(payload) <= 10_000 for payload in payloads)
    ended = [json.loads(payload)["event"] for payload in payloads]
    assert [(event["type"], event["event_id"], event["data"]["cursor"]) for event in ended] == [
        ("error", "2.e", 1), ("stream_end", "2.s", 1), ("response", "2", 2),
    ]  # fmt: skip


def test_names_may_have_percent_signs() -> None:
    writer = Writer()
    writer.start()
    writer.delta("100 %d")
    stream = Stream("s%d", "50%", start=2, max_frame_bytes=FRAME)
    (payload,) = stream.read(writer.log, 2, BUDGET).payloads
    event = json.loads(payload)["event"]
    assert (event["source"], event["target"], event["data"]["session_id"]) == ("50%", "s%d", "s%d")
    assert event["data"]["content"] == "100 %d"


@pytest.mark.parametrize(("size", "twice"), [(100, True), (PIECE, False)])
def test_a_long_question_is_in_its_event_once(size: int, twice: bool) -> None:
    writer = Writer()
    line = Line(writer)
    writer.add(m.Ask(turn_id="t1", ask_id="a_1", kind="input", prompt="?" * size))
    line.catch_up()
    data = line.client.events[0]["data"]
    assert (data["request_id"], data["request"]["prompt"]) == ("a_1", "?" * size)
    assert ("prompt" in data) is twice


def test_a_snapshot_in_mid_answer_is_where_the_client_starts() -> None:
    """Its marks are forgotten: how much of the answer was in the snapshot is not known."""
    writer = Writer()
    line = Line(writer)
    writer.start()
    line.read()
    for n in range(10):
        writer.delta(f"{n} ")
        if n == 4:
            cursor = writer.log.head
    writer.end()
    marks = writer.log.marks
    assert marks is not None
    marks.drop(writer.log.head)
    line.client.cursor = line.position = cursor
    line.stream.restart(cursor)
    line.catch_up()
    assert line.client.tokens == {}
    assert contents(line.client.finals["t1"]) == "0 1 2 3 4 5 6 7 8 9 "


def test_a_page_of_the_store_has_the_text_that_belongs_between_its_events() -> None:
    """The output that the text is in may still be in memory when the events before it are not."""
    tails = Tails(2**20, 2**20)
    writer = Writer(tails=tails)
    line = Line(writer)
    writer.start()
    writer.delta("before ")
    writer.tool()
    writer.delta("after " * 50)
    writer.end()
    asked, started, _, said, ended = (entry.size for entry in writer.log.entries)
    tails.share = (said + ended + asked + started + 10) * 4 // 3 + 1  # what stays when the next turn starts
    writer.start()
    first = writer.log.entries[0]
    assert (type(first.event), first.seq) == (m.Output, 6)
    line.read(budget=1)
    line.read(budget=1)
    line.catch_up(100)
    writer.end()
    line.catch_up()
    check(writer, line.client)


def test_a_replay_is_read_in_portions() -> None:
    writer = Writer()
    line = Line(writer)
    writer.start()
    for n in range(1000):
        writer.delta(f"{n} ")
    writer.end()
    while True:
        chunk = line.stream.read(writer.log, line.position, 4096)
        for payload in chunk.payloads:
            line.client.take(payload)
        line.position = chunk.cursor
        if not chunk.payloads:
            break
        assert chunk.size == sum(map(len, chunk.payloads)) < 4096 + 6000
    check(writer, line.client)


def test_a_turn_that_is_lost_ends_with_an_error_and_a_response() -> None:
    writer = Writer()
    line = Line(writer)
    writer.start()
    writer.delta("sealed ")
    writer.seal(more=True)
    writer.delta("lost")
    line.read()
    writer.end("lost")
    line.catch_up()
    assert [e["type"] for e in line.client.events[-3:]] == ["error", "stream_end", "response"]
    assert line.client.events[-3]["data"]["code"] == "lost"
    (final,) = line.client.finals["t1"]
    assert final["content"] == "sealed "
    assert final["outcome"]["status"] == "lost"
    assert line.client.gaps == []


def test_a_cut_within_the_end_of_a_turn_repeats_what_is_no_text() -> None:
    for frames in range(1, 4):
        writer = Writer()
        line = Line(writer)
        writer.start()
        line.read()
        writer.end("failed")
        line.read(frames)
        line.catch_up()
        check(writer, line.client)
        assert [e["type"] for e in line.client.repeated] == ["error", "stream_end"][: frames % 3]


def test_the_sequence_equals_the_cursor_unless_numbers_are_gone() -> None:
    """Its `SessionProjection` compares sequences across connections."""
    writer = Writer()
    line = Line(writer)
    writer.start()
    for n in range(30):
        writer.delta(f"{n} ", "reasoning" if n % 3 else "answer")
        if n % 10 == 0:
            writer.tool()
        if n == 20:
            writer.seal(more=True)
    line.read(5)
    writer.end()
    line.read(10, 100)
    line.catch_up(1_000)
    assert [e["sequence"] for e in line.client.events] == [e["data"]["cursor"] for e in line.client.events]
    check(writer, line.client)


def test_events_are_encoded_once_for_all_connections() -> None:
    writer = Writer()
    first, second = Line(writer), Line(writer)
    writer.start()
    writer.delta("hi")
    first.read()
    kept = [entry.wrapped for entry in writer.log.entries]
    second.read()
    assert all(entry.wrapped is frames for entry, frames in zip(writer.log.entries, kept, strict=True))
    assert first.client.events == second.client.events


def test_what_is_kept_encoded_stays_within_the_size_of_the_log() -> None:
    writer = Writer()
    line = Line(writer)
    writer.start()
    for _ in range(8):
        writer.delta("x" * 60_000)
        writer.seal(more=True)
    writer.delta("end")
    writer.end()
    line.catch_up()
    for entry in writer.log.entries:
        kept = sum(len(data) for _, data in getattr(entry, "wrapped", []))
        assert kept <= entry.size + WRAPPING


def test_marks_are_bounded_and_go_with_their_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(marks_module, "MAX_MARKS", 10)
    writer = Writer(max_events=12)
    line = Line(writer)
    marks = writer.log.marks
    assert marks is not None
    for _ in range(6):
        writer.start()
        for n in range(4):
            writer.delta(f"{n} ")
        writer.end()
        assert len(marks) == sum(len(mark.seqs) for mark in marks._marks) <= 10
        assert all(mark.seq > writer.log.floor for mark in marks._marks)
    with pytest.raises(CursorExpired):
        line.read()


def test_marks_hold_nothing_that_has_left_memory() -> None:
    tails = Tails(1, 1)
    tails.share = 600
    writer = Writer(tails=tails)
    for _ in range(8):
        writer.start()
        writer.delta("x" * 100)
        writer.end()
    assert writer.log.tail > 0
    assert writer.log.marks is not None
    assert all(mark.seq > writer.log.tail for mark in writer.log.marks._marks)


def test_version_2_pays_nothing() -> None:
    """No entry of a log that nobody of this dialect reads has anything of it."""
    writer = Writer(marks=False)
    writer.start()
    writer.delta("hi")
    writer.end()
    writer.log.read(0, BUDGET)
    assert writer.log.marks is None
    assert not any(hasattr(entry, "wrapped") for entry in writer.log.entries)
