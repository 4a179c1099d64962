"""The public strategies: their names, what they reach, and that the codec answers all of it with typed errors."""

from __future__ import annotations

import json
import time
from collections import Counter
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import Phase, given, seed, settings
from steady import steady

from gateway.errors import FrameError, HandshakeRefused
from gateway.protocol import codec, handshake
from gateway.protocol import messages as m
from gateway.testing import strategies
from gateway.testing.dialogue import Cut, SendText, fill_in, from_json, to_json
from gateway.testing.mutation import mutations
from gateway.testing.wire import CLOSE, Closed, MessageReader, Received


def sample(strategy: Any, rounds: int = 15) -> list[Any]:
    """What a strategy gives in rounds of 40. One long round lingers at what it found first, and in one of seven leaves
    out a class of frames; which one depends even on what modules are loaded."""
    found: list[Any] = []
    for start in range(rounds):

        @seed(start)
        @settings(steady, max_examples=40, phases=[Phase.generate], database=None)
        @given(strategy)
        def collect(value: Any) -> None:
            found.append(value)

        collect()
    return found


def only_typed_errors(raw: bytes) -> int:
    """Give a text to everything that reads texts of a peer; return how many readers took it."""
    taken = 0
    for result in codec.decode_client(raw):
        assert isinstance(result, FrameError | m.ClientFrame)
        taken += not isinstance(result, FrameError)
    for read in (codec.decode_server, codec.decode_event):
        with suppress(FrameError):
            read(raw)
            taken += 1
    with suppress(HandshakeRefused):
        handshake.read_hello(raw)
        taken += 1
    return taken


def test_the_public_names() -> None:
    assert strategies.__all__ == [
        "any_of",
        "client_frames",
        "damaged_wire",
        "dialogues",
        "gateway_frames",
        "hellos",
        "integers",
        "json_values",
        "near_valid",
        "of",
        "texts",
        "valid_wire",
    ]
    for name in strategies.__all__:
        assert getattr(strategies, name) is not None


def test_client_frames_are_valid_and_of_every_class() -> None:
    kinds = set()
    for fields in sample(strategies.client_frames()):
        (frame,) = codec.decode_client(codec.dump_json(fields))
        assert isinstance(frame, m.ClientFrame), fields
        kinds.add(frame.type)
    assert kinds == set(m.CLIENT_FRAMES)


def test_gateway_frames_are_valid_and_of_every_class() -> None:
    kinds = set()
    for fields in sample(strategies.gateway_frames()):
        (frame,) = codec.decode_server(codec.dump_json(fields))
        kinds.add(frame.type)
    assert kinds == set(m.SERVER_FRAMES) | set(m.EVENTS)


@pytest.mark.parametrize("frames", [strategies.client_frames(1), strategies.gateway_frames(1)])
def test_frames_of_version_1_are_objects_with_a_type(frames: Any) -> None:
    for fields in sample(frames):
        assert codec.read_object(codec.parse_json(codec.dump_json(fields)))[0] == fields["type"]


def test_near_valid_frames_are_sometimes_valid_and_mostly_not() -> None:
    """Were they all refused at the first look, they would test one line."""
    codes: Counter[str] = Counter()
    for raw in sample(strategies.near_valid(strategies.client_frames()), 30):
        for result in codec.decode_client(raw):
            codes[result.code if isinstance(result, FrameError) else "valid"] += 1
    assert set(codes) == {"valid", "invalid_json", "invalid_frame", "unknown_type"}
    assert codes["valid"] < codes["invalid_frame"] + codes["invalid_json"], codes


@pytest.mark.parametrize("version", [1, 2])
@settings(steady, max_examples=1500)
@given(data=strategies.st.data())
def test_near_valid_frames_meet_typed_errors_only(version: int, data: Any) -> None:
    frames = strategies.client_frames(version) | strategies.gateway_frames(version) | strategies.hellos(version)
    only_typed_errors(data.draw(strategies.near_valid(frames)))


@steady
@given(strategies.valid_wire(strategies.st.binary(max_size=50).map(lambda raw: raw.hex().encode())))
def test_valid_wire_is_one_message(data: bytes) -> None:
    reader = MessageReader(masked=True)
    received = [item for item in reader.feed(data) if isinstance(item, Received)]
    assert len(received) == 1
    assert reader.violation is None
    assert not reader.mid_frame
    assert not reader.mid_message


def test_damaged_wire_has_every_kind_of_damage() -> None:
    verdicts: Counter[str] = Counter()
    for data in sample(strategies.damaged_wire(), 20):
        reader = MessageReader(masked=True)
        items = reader.feed(data)
        if reader.violation is not None:
            verdicts[reader.violation.reason] += 1
        elif reader.mid_frame or reader.mid_message:
            verdicts["incomplete"] += 1
        else:
            assert any(isinstance(item, Closed) or (isinstance(item, Received) and item.binary) for item in items), data
    assert {reason.split()[0] for reason in verdicts} == {
        "reserved", "a", "text", "close", "incomplete"
    }  # fmt: skip
    assert len(verdicts) >= 9, verdicts


@pytest.mark.parametrize("version", [1, 2])
def test_dialogues_are_weighted_towards_trouble(version: int) -> None:
    counts: Counter[str] = Counter()
    found = sample(strategies.dialogues(version), 6)
    for steps in found:
        for step in steps:
            assert from_json(json.loads(json.dumps(to_json(step)))) == step
            counts[step.do] += 1
            if isinstance(step, SendText):
                text = fill_in(step.text, cursor=7, names={"session": "s"})
                with suppress(ValueError, RecursionError):
                    fields = json.loads(text)
                    if isinstance(fields, dict):
                        counts[str(fields.get("type"))] += 1
                        counts["since"] += fields.get("since") in (6, 7, 8)
                    else:
                        counts["array"] += isinstance(fields, list)
        counts["resumed"] += any(isinstance(step, Cut) for step in steps)
    client = {"hello", "message", "abort", "leave", "ping"} | ({"join", "server_reply"} if version == 1 else {"resync"})
    assert client | {"bytes", "cut", "close", "wait", "sync", "since", "array", "resumed"} <= set(counts), counts
    assert counts["message"] > len(found) / 2, counts


def test_the_same_seed_gives_the_same_mutations() -> None:
    corpus = [b'{"type":"ping","nonce":[1,{"a":true}]}', b"", b"\xff"]
    streams = [mutations(corpus, seed) for seed in (1, 1, 2)]
    one, same, other = ([next(stream) for _ in range(500)] for stream in streams)
    assert one == same != other
    assert len(set(one)) > 100


def mutate(count: int, seed: int) -> tuple[int, float]:
    """Give `count` mutated frames to every reader; how many were taken by one, and inputs per second."""
    frames = [*sample(strategies.client_frames()), *sample(strategies.gateway_frames())]
    inputs = mutations([codec.dump_json(frame) for frame in frames], seed)
    started, taken = time.perf_counter(), 0
    for _ in range(count):
        taken += only_typed_errors(next(inputs)) > 0
    return taken, count / (time.perf_counter() - started)


def test_tens_of_thousands_of_mutated_frames_meet_typed_errors_only() -> None:
    taken, _ = mutate(30_000, seed=1)
    assert 1_000 < taken < 29_000, "neither all valid nor all noise"


@pytest.mark.long
def test_a_million_mutated_frames_meet_typed_errors_only() -> None:
    taken, rate = mutate(1_000_000, seed=2)
    print(f"1,000,000 frames, {taken:,} taken, {rate:,.0f}/s")
    assert 30_000 < taken < 970_000


def test_a_close_frame_ends_what_is_read() -> None:
    reader = MessageReader(masked=True)
    items = reader.feed(strategies.frame(CLOSE, b"\x03\xe8bye") + b"anything")
    assert items == [Closed(1000, "bye")]
    assert reader.feed(b"more") == []
