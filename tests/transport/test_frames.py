"""Frames as pure functions, against the frame encoder and decoder of wsproto."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from wsproto.frame_protocol import FrameProtocol, Opcode, ParseFailed

from gateway.transport.frames import (
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    FrameViolation,
    check_close,
    parse_head,
    text_frames,
    unmask,
)

EDGES = [0, 1, 125, 126, 127, 65_535, 65_536, 70_000]
KEY = b"\x11\x22\x33\x44"


def client_frame(opcode: int, payload: bytes, *, final: bool = True, size: int | None = None, form: int = 0) -> bytes:
    """A masked frame. `form` 126 or 127 forces the longer length, `size` states another one."""
    size = len(payload) if size is None else size
    form = form or (126 if 125 < size < 65_536 else 127 if size > 125 else 0)
    length = bytes((0x80 | (form or size),)) + (
        size.to_bytes(2, "big") if form == 126 else size.to_bytes(8, "big") if form == 127 else b""
    )
    return bytes((0x80 * final | opcode,)) + length + KEY + unmask(payload, KEY)


def naive(data: bytes, key: bytes) -> bytes:
    return bytes(byte ^ key[at % 4] for at, byte in enumerate(data))


@given(st.binary(max_size=300), st.binary(min_size=4, max_size=4))
@example(b"", b"\0\0\0\0")
@example(b"\0" * 9, b"\xff\0\0\0")
@example(b"\0\0\0\0", b"\0\0\0\0")
def test_unmask_is_xor_with_the_repeated_key(data: bytes, key: bytes) -> None:
    assert unmask(data, key) == naive(data, key)
    assert unmask(bytearray(data), bytearray(key)) == naive(data, key)
    assert unmask(unmask(data, key), key) == data


def test_unmask_is_linear() -> None:
    data = bytes(range(256)) * 16_384  # 4 MiB: something quadratic would take minutes
    assert unmask(data, KEY)[:1000] == naive(data[:1000], KEY)


@pytest.mark.parametrize("size", EDGES)
def test_text_frames_are_what_the_library_would_send(size: int) -> None:
    text = "a" * size
    assert text_frames([text.encode()]) == bytes(FrameProtocol(client=False, extensions=[]).send_data(text))


@given(st.lists(st.text(max_size=200), max_size=5))
def test_many_text_frames_stand_in_order(texts: list[str]) -> None:
    decoder = FrameProtocol(client=True, extensions=[])
    decoder.receive_bytes(text_frames([text.encode() for text in texts]))
    frames = list(decoder.received_frames())
    assert [str(frame.payload) for frame in frames if frame.message_finished] == texts


@pytest.mark.parametrize(
    ("opcode", "size"),
    [(opcode, size) for opcode in (TEXT, CONTINUATION, PING, PONG) for size in EDGES if opcode < 8 or size < 126],
)
def test_head_of_what_the_library_sends_as_a_client(opcode: int, size: int) -> None:
    library = FrameProtocol(client=True, extensions=[])
    frame = bytes(library._serialize_frame(Opcode(opcode), b"a" * size))
    head = parse_head(bytearray(b"junk" + frame), 4)
    assert head is not None
    assert (head.opcode, head.final, head.end, head.end - head.start) == (opcode, True, 4 + len(frame), size)
    payload = (b"junk" + frame)[head.start : head.end]
    assert unmask(payload, frame[head.start - 8 : head.start - 4]) == b"a" * size


@pytest.mark.parametrize("size", EDGES)
def test_every_prefix_of_a_frame(size: int) -> None:
    frame = client_frame(TEXT, b"a" * size)
    whole = parse_head(bytearray(frame), 0)
    assert whole is not None
    known_at = {0: 2, 1: 4, 2: 10}[(size > 125) + (size > 65_535)]
    for cut in range(min(len(frame), 20)):
        assert parse_head(bytearray(frame[:cut]), 0) == (whole if cut >= known_at else None)


def library_reads(data: bytes) -> list[tuple[int, bool, int]] | None:
    """The frames that wsproto reads of `data`, or None if it finds fault with them."""
    decoder = FrameProtocol(client=False, extensions=[])._frame_decoder
    decoder.receive_bytes(data)
    frames, size = [], 0
    try:
        while (frame := decoder.process_buffer()) is not None:
            size += len(frame.payload)
            if frame.frame_finished:
                opcode = frame.opcode
                frames.append((int(opcode), frame.message_finished, size))
                size = 0
    except ParseFailed:
        return None
    return frames


def ours_reads(data: bytes) -> list[tuple[int, bool, int]] | None:
    buffer, at, frames = bytearray(data), 0, []
    try:
        while (head := parse_head(buffer, at)) is not None and head.end <= len(buffer):
            frames.append((head.opcode, head.final, head.end - head.start))
            at = head.end
    except FrameViolation as exc:
        return None if exc.code == 1002 else [(exc.code, False, 0)]
    return frames


heads = st.builds(
    lambda b0, b1, more: bytes((b0, b1)) + more,
    st.one_of(st.sampled_from([0x81, 0x01, 0x80, 0x00, 0x88, 0x89, 0x8A, 0x82]), st.integers(0, 255)),
    st.one_of(st.sampled_from([0x80, 0x81, 0xFD, 0xFE, 0xFF]), st.integers(0, 255)),
    st.one_of(st.just(b"\0\x7e" + b"k" * 200), st.just(b"\0" * 40), st.binary(max_size=40)),
)


@given(st.one_of(heads, st.binary(max_size=60)))
@example(b"\x81\xfe\x00\x7dkkkk" + b"a" * 125)  # a length that would fit into a shorter form
@example(b"\x81\xff" + (65_535).to_bytes(8, "big") + b"kkkk" + b"a" * 65_535)
@example(b"\x81\xff" + (2**63).to_bytes(8, "big") + b"kkkk")
@example(b"\xc1\x80kkkk")
@example(b"\x09\x80kkkk")
@example(b"\x83\x80kkkk")
@example(b"\x81\x05hello")
def test_bytes_are_judged_as_the_library_judges_them(data: bytes) -> None:
    """Nothing but `FrameViolation` comes out, and never later than the library's own objection."""
    library, ours = library_reads(data), ours_reads(data)
    if ours is not None:
        assert library is not None
        assert [frame[1:] for frame in library] == [frame[1:] for frame in ours]
        return
    if library is not None:
        # We object at the first two bytes; the library waits for the rest of the header. Then it must object too.
        assert library_reads(data + b"\0" * 14) is None or library_reads(data + b"\x7e" * 14) is None


@given(st.binary(max_size=300), st.integers(0, 300))
def test_random_bytes_at_any_place(data: bytes, at: int) -> None:
    try:
        head = parse_head(bytearray(data), at)
    except FrameViolation:
        return
    if head is not None:
        assert at + 6 <= head.start <= head.end


@pytest.mark.parametrize(
    ("size", "form"), [(size, form) for form in (126, 127) for size in EDGES if size < 65_536 or form == 127]
)
def test_only_the_shortest_length_is_right(size: int, form: int) -> None:
    frame = bytearray(client_frame(TEXT, b"", size=size, form=form))
    if (size > 125) + (size > 65_535) == (form == 126) + 2 * (form == 127):
        assert parse_head(frame, 0) is not None
    else:
        with pytest.raises(FrameViolation, match="1002"):
            parse_head(frame, 0)


@given(st.binary(max_size=123))
@example(b"")
@example(b"\x03")
@example(b"\x03\xe8\xff")
@example(b"\x03\xe8\xed\xa0\x80")  # a surrogate
@example(b"\x0f\xa0" + b"r" * 121)
def test_close_payloads_are_judged_as_the_library_judges_them(payload: bytes) -> None:
    if payload[:2] != b"\x03\xf6":  # see the test of the codes
        same_close(payload)


@pytest.mark.parametrize("code", [0, 999, *range(1000, 1020), 1100, 1999, 2000, 2999, 3000, 4000, 4999, 5000, 65_535])
def test_close_codes(code: int) -> None:
    if code == 1014:
        # Registered with IANA after the RFC; the library does not know it.
        assert check_close(b"\x03\xf6why") == (1014, "why")
        return
    assert same_close(code.to_bytes(2, "big") + b"why") == (
        1000 <= code <= 1003 or 1007 <= code <= 1013 or 3000 <= code <= 4999
    )


def same_close(payload: bytes) -> bool:
    decoder = FrameProtocol(client=False, extensions=[])
    decoder.receive_bytes(client_frame(CLOSE, payload))
    try:
        (frame,) = list(decoder.received_frames())
        expected: object = tuple(frame.payload)
    except ParseFailed as exc:
        expected = int(exc.code)
    try:
        got: object = check_close(payload)
    except FrameViolation as exc:
        got = exc.code
    assert got == expected
    return isinstance(got, tuple)
