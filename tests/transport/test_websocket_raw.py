"""A real gateway and raw sockets: what a peer may do to the upgrade request, to frames, to control frames and to the
end of a connection. Each hazard of trio-websocket that was seen has its test here."""

from __future__ import annotations

import gc
import json
import weakref
from typing import Any

import pytest
import trio
from raw_peer import (
    BINARY,
    CLOSE,
    CONTINUATION,
    HELLO,
    KEY,
    PING,
    PONG,
    REQUEST,
    TEXT,
    Peer,
    close,
    eventually,
    frame,
    gateway_of,
    joined,
    opened,
    pieces,
    ping_of,
    raw,
    text,
)

from gateway import Turn
from gateway.server import Gateway
from gateway.transport.upgrade import HandshakeFailed, parse_request


async def works(gateway: Gateway) -> None:
    """Somebody else is served."""
    async with joined(gateway) as peer:
        await peer.send(frame(TEXT, ping_of("still here")))
        assert (await peer.until("pong"))["nonce"] == "still here"
        await peer.send(close(1000))
        await peer.until_end()


# the upgrade request


def without(line: bytes, instead: bytes = b"") -> bytes:
    lines = [instead if part.startswith(line) else part for part in REQUEST.split(b"\r\n")]
    return b"\r\n".join(part for part in lines[:-2] if part) + b"\r\n\r\n"


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        pytest.param(without(b"Host", b"Host: gateway.test\r\nX-Name: J\xc3\xbcrgen"), 400, id="non-ascii header"),
        pytest.param(REQUEST.replace(b"/ws", b"/\xff"), 400, id="non-ascii path"),
        pytest.param(b"GET /ws HTTP/1.1 and more\r\n\r\n", 400, id="malformed request line"),
        pytest.param(b"GET\r\n\r\n", 400, id="no path"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, id="TLS on a plain port"),
        pytest.param(without(b"Host", b"Host: \x01"), 400, id="control character"),
        pytest.param(without(b"Host"), 400, id="no host"),
        pytest.param(without(b"Host", b"Host: a\r\nHost: b"), 400, id="two hosts"),
        pytest.param(without(b"Upgrade"), 400, id="no upgrade"),
        pytest.param(without(b"Upgrade", b"Upgrade: h2c"), 400, id="another upgrade"),
        pytest.param(without(b"Connection"), 400, id="no connection"),
        pytest.param(without(b"Sec-WebSocket-Key"), 400, id="no key"),
        pytest.param(without(b"Sec-WebSocket-Key", b"Sec-WebSocket-Key:"), 400, id="empty key"),
        pytest.param(without(b"Sec-WebSocket-Version"), 400, id="no version"),
        pytest.param(REQUEST.replace(b"HTTP/1.1", b"HTTP/1.0"), 400, id="an upgrade in HTTP/1.0"),
        pytest.param(without(b"Sec-WebSocket-Version", b"Sec-WebSocket-Version: 8"), 426, id="old version"),
        pytest.param(b"POST /ws HTTP/1.1\r\nHost: a\r\nContent-Length: 70000\r\n\r\n" + b"x" * 70_000, 400, id="POST"),
        pytest.param(b"GET /ws HTTP/1.1\r\nHost: a\r\n\r\n", 400, id="plain GET"),
        pytest.param(b"GET / HTTP/1.0\r\n\r\n", 400, id="plain GET of HTTP/1.0"),
        pytest.param(REQUEST.replace(b"/ws", b"/other"), 404, id="wrong path"),
        pytest.param(REQUEST.replace(b"/ws", b"/ws/"), 404, id="nearly the path"),
        pytest.param(REQUEST[:-2] + b"X: " + b"a" * 17_000 + b"\r\n\r\n", 400, id="giant head"),
        pytest.param(b"GET /ws HTTP/1.1\r\n" + b"X: y\r\n" * 20_000, 400, id="giant head without an end"),
        pytest.param(REQUEST.replace(b"Host: gateway.test\r\n", b"X: y\nHost: a\r\n"), 400, id="bare line feed"),
        pytest.param(without(b"Host", b"Host: a\r\nX: a\rb"), 400, id="bare carriage return"),
        pytest.param(without(b"Host", b"Host: a\r\nSec-WebSocket-Key: x"), 400, id="two keys"),
    ],
)
async def test_a_bad_request_gets_an_http_answer_and_ends_nothing_else(request_bytes: bytes, status: int) -> None:
    async with gateway_of() as gateway:
        async with raw(gateway) as peer:
            began = trio.current_time()
            await peer.send(request_bytes)
            got, body = await peer.http()
            assert got == status
            assert not peer.reset, "what is unread at the close must not become a reset"
            assert trio.current_time() - began < 5.0, "only the time limit ended it"
            if status == 404:
                assert b"/ws" in body
            elif status == 426:
                assert b"version 13" in body
        await works(gateway)
        assert not gateway.upgrading


@pytest.mark.parametrize(
    "line", [b"GET /ws?token=s3cret  HTTP/1.1\r\n", b"GET /ws HTTP/1.1\r\nAuthorization : Bearer s3cret\r\n"]
)
async def test_a_malformed_line_is_not_quoted(line: bytes) -> None:
    """A token may be in it, and an answer may be logged."""
    async with gateway_of() as gateway, raw(gateway) as peer:
        await peer.send(line + b"Host: a\r\n\r\n")
        assert await peer.http() == (400, b"malformed request: a line of it is not HTTP\n")


def test_a_carriage_return_alone_is_not_given_to_h11() -> None:
    """Its expression for a header tries every end of a run of spaces then: half a second, for 15 KB of them."""
    with pytest.raises(HandshakeFailed, match="must end with CR LF"):
        parse_request(without(b"Host", b"Host: a\r\nX:" + b" " * 15_000 + b"\ra"))


async def test_the_request_leaves_memory_when_the_client_has_joined() -> None:
    gc.collect()
    gc.disable()
    try:
        async with gateway_of() as gateway, raw(gateway) as peer:
            await peer.send(REQUEST)
            assert (await peer.http())[0] == 101
            (connection,) = gateway.connections
            request = weakref.ref(connection._ws.request)
            assert request() is not None
            await peer.send(text(**HELLO))
            await peer.until("hello_ok")
            assert request() is None
            await peer.send(text(type="ping", nonce="n"))
            assert (await peer.until("pong"))["nonce"] == "n"
    finally:
        gc.enable()


async def test_the_path_may_have_a_query_and_headers_any_case() -> None:
    async with gateway_of() as gateway, raw(gateway) as peer:
        await peer.send(REQUEST.replace(b"/ws", b"/ws?a=1").replace(b"Upgrade: websocket", b"uPGRADE:WebSocket"))
        assert (await peer.http())[0] == 101


@pytest.mark.parametrize("begun", [b"", REQUEST[:60], REQUEST[:-2]])
async def test_half_a_request_then_silence(begun: bytes) -> None:
    async with gateway_of(handshake_timeout_ms=100) as gateway:
        async with raw(gateway) as peer:
            await peer.send(begun)
            assert await peer.http() == (408, b"no upgrade request within the time limit\n")
        await works(gateway)


async def test_a_request_byte_by_byte() -> None:
    async with gateway_of() as gateway, raw(gateway) as peer:
        for at in range(len(REQUEST)):
            await peer.send(REQUEST[at : at + 1])
        assert (await peer.http())[0] == 101
        await peer.send(text(**HELLO))
        await peer.until("hello_ok")


async def test_the_time_limit_is_one_for_request_and_hello() -> None:
    """A peer that uses up most of it for its request does not get it anew for its hello."""
    async with gateway_of(handshake_timeout_ms=600) as gateway, raw(gateway) as peer:
        began = trio.current_time()
        await peer.send(REQUEST[:-2])
        await trio.sleep(0.45)
        await peer.send(REQUEST[-2:])
        assert (await peer.http())[0] == 101
        await peer.closed_with(4408, "handshake_timeout")
        assert trio.current_time() - began < 0.9


@pytest.mark.parametrize("sent", [b"", REQUEST[:50]])
@pytest.mark.parametrize("reset", [False, True])
async def test_a_peer_that_goes_during_its_request_frees_its_slot_at_once(sent: bytes, reset: bool) -> None:
    async with gateway_of() as gateway:
        async with raw(gateway) as peer:
            await peer.send(sent)
            await eventually(lambda: gateway.statistics().pending_handshakes == 1)
            if reset:
                reset_on_close(peer)
        await eventually(lambda: gateway.statistics().pending_handshakes == 0, 2.0)  # the time limit is 10 s


def reset_on_close(peer: Peer) -> None:
    assert isinstance(peer.stream, trio.SocketStream)
    peer.stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


# what comes behind the request in the same segment


@pytest.mark.parametrize(
    "frames",
    [
        [text(**HELLO), frame(TEXT, ping_of("1"))],
        [
            frame(TEXT, json.dumps(HELLO).encode()[:20], final=False),
            frame(CONTINUATION, json.dumps(HELLO).encode()[20:]),
            frame(TEXT, ping_of("1")),
        ],
        [frame(PING, b"early"), text(**HELLO), frame(TEXT, ping_of("1"))],
    ],
    ids=["text", "fragments", "ping"],
)
async def test_frames_right_behind_the_request(frames: list[bytes]) -> None:
    async with gateway_of() as gateway, raw(gateway) as peer:
        await peer.send(REQUEST, *frames)
        assert (await peer.http())[0] == 101
        await peer.until("hello_ok")
        assert (await peer.until("pong"))["nonce"] == "1"
        assert [payload for opcode, payload in peer.frames if opcode == PONG] == (
            [b"early"] if frames[0][0] == 0x80 | PING else []
        )


@pytest.mark.parametrize(
    ("frames", "code"),
    [([close(1000)], 1000), ([frame(BINARY, b"x")], 1003), ([frame(TEXT, b"\xff")], 1007), ([b"\xff\xff"], 1002)],
)
async def test_an_end_right_behind_the_request(frames: list[bytes], code: int) -> None:
    async with gateway_of() as gateway, raw(gateway) as peer:
        await peer.send(REQUEST, *frames)
        assert (await peer.http())[0] == 101
        await peer.closed_with(code)


# whole and fragmented messages


async def test_many_frames_in_one_segment_and_one_frame_in_many() -> None:
    async with gateway_of() as gateway, joined(gateway) as peer:
        nonces = [f"{number}é" for number in range(200)]
        await peer.send(*(frame(TEXT, ping_of(nonce)) for nonce in nonces))
        assert [(await peer.until("pong"))["nonce"] for _ in nonces] == nonces
        for byte in frame(TEXT, ping_of("slowly")) + frame(PING, b"p") + frame(TEXT, ping_of("x" * 200)):
            await peer.send(bytes((byte,)))
        assert (await peer.until("pong"))["nonce"] == "slowly"
        assert (await peer.until("pong"))["nonce"] == "x" * 200
        assert (PONG, b"p") in peer.frames


async def test_a_fragmented_message_and_a_whole_one_behind_it_keep_their_order() -> None:
    async with gateway_of() as gateway, joined(gateway) as peer:
        parts, nonces = [], []
        for number in range(50):
            message = ping_of(f"f{number}" + "é" * 20)
            cut = 40 + number % 11  # also in the middle of a character
            parts += [frame(TEXT, message[:cut], final=False), frame(CONTINUATION, message[cut:])]
            parts += [frame(TEXT, ping_of(f"w{number}"))]
            nonces += [f"f{number}" + "é" * 20, f"w{number}"]
        await peer.send(*parts)
        assert [(await peer.until("pong"))["nonce"] for _ in nonces] == nonces


async def test_pings_are_ponged_in_order_also_between_fragments() -> None:
    async with gateway_of() as gateway, joined(gateway) as peer:
        message = ping_of("in pieces")
        parts = [frame(PING, b"\0\xff" * 62), frame(PING), frame(TEXT, message[:9], final=False)]
        for number, at in enumerate(range(9, len(message), 4)):
            parts += [frame(PING, b"%d" % number), frame(CONTINUATION, message[at : at + 4], final=False)]
        count = len(range(9, len(message), 4))
        await peer.send(*parts, frame(PONG, b"nobody asked"), frame(PING, b"last"), frame(CONTINUATION))
        assert (await peer.until("pong"))["nonce"] == "in pieces"
        pongs = [payload for opcode, payload in peer.frames if opcode == PONG]
        assert pongs == [b"\0\xff" * 62, b"", *(b"%d" % number for number in range(count)), b"last"]


LIMIT = 4096


def padded(size: int) -> bytes:
    message = json.dumps({"type": "ping", "nonce": "n", "pad": ""}).encode()
    return message.replace(b'"pad": ""', b'"pad": "' + b"p" * (size - len(message)) + b'"')


@pytest.mark.parametrize("sizes", [(), (1,), (LIMIT - 1,), (LIMIT,), (0, 100, 0, 0), (1000, 1000, 1000)])
async def test_a_message_of_exactly_the_limit_is_taken(sizes: tuple[int, ...]) -> None:
    async with gateway_of(max_payload=LIMIT) as gateway, joined(gateway) as peer:
        await peer.send(*pieces(padded(LIMIT), *sizes))
        assert (await peer.until("pong"))["nonce"] == "n"


@pytest.mark.parametrize("sizes", [(), (1,), (LIMIT,), (0, 100, 0, 0), (1000, 1000, 1000)])
async def test_one_byte_more_is_1009(sizes: tuple[int, ...]) -> None:
    async with gateway_of(max_payload=LIMIT) as gateway, joined(gateway) as peer:
        await peer.send(*pieces(padded(LIMIT + 1), *sizes), frame(TEXT, ping_of("late")))
        await peer.closed_with(1009, "payload_too_large")
        assert [got["type"] for got in peer.texts] == ["hello_ok"]
        assert gateway.statistics().closes == {"1009 payload_too_large": 1}


async def test_1009_comes_from_the_header_alone() -> None:
    """No byte of the payload is waited for, and what comes of it is read, so that the close reply behind it is seen."""
    async with gateway_of() as gateway, joined(gateway) as peer:
        whole = frame(TEXT, b"x" * 3_000_000)
        await peer.send(whole[:14])
        assert await peer.until_close() == (1009, "payload_too_large")
        await peer.send(whole[14:], close(1009))
        began = trio.current_time()
        await peer.until_end()
        assert trio.current_time() - began < 1.0  # the close timeout is 1.5 s


@pytest.mark.parametrize("size", [2**62, 2**63 - 1])
async def test_a_length_that_nobody_can_send(size: int) -> None:
    async with gateway_of() as gateway, joined(gateway) as peer:
        await peer.send(b"\x81\xff" + size.to_bytes(8, "big") + KEY + b"x")
        assert (await peer.until_close())[0] == 1009


async def test_the_hello_has_a_limit_of_its_own() -> None:
    async with gateway_of() as gateway:
        large = {"type": "ping", "nonce": "n", "pad": "p" * 100_000}
        async with joined(gateway) as peer:
            await peer.send(text(**large))
            await peer.until("pong")
        async with opened(gateway) as peer:
            await peer.send(text(**HELLO, pad="p" * 66_000))
            await peer.closed_with(1009, "payload_too_large")
        async with opened(gateway) as peer:
            await peer.send(*pieces(json.dumps({**HELLO, "pad": "p" * 66_000}).encode(), 40_000))
            await peer.closed_with(1009, "payload_too_large")
        async with opened(gateway) as peer:  # what is sent right behind the hello is not the hello
            await peer.send(text(**HELLO, pad="p" * 60_000), text(**large))
            await peer.until("pong")


async def test_empty_fragments_have_an_end() -> None:
    async with gateway_of() as gateway, joined(gateway) as peer:
        await peer.send(frame(TEXT, b"", final=False), *[frame(CONTINUATION, b"", final=False)] * 5000)
        await peer.closed_with(1008, "protocol_violation")


# what RFC 6455 forbids


HALF = "é".encode()[:1]


@pytest.mark.parametrize(
    ("parts", "code"),
    [
        pytest.param([frame(TEXT, b"{}", bits=0x40)], 1002, id="reserved bit 1"),
        pytest.param([frame(TEXT, b"{}", bits=0x20)], 1002, id="reserved bit 2"),
        pytest.param([frame(PING, bits=0x10)], 1002, id="reserved bit 3"),
        *(pytest.param([frame(opcode)], 1002, id=f"opcode {opcode}") for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)),
        pytest.param([frame(TEXT, b"{}", masked=False)], 1002, id="unmasked text"),
        pytest.param([frame(PING, masked=False)], 1002, id="unmasked ping"),
        pytest.param([frame(CLOSE, masked=False)], 1002, id="unmasked close"),
        pytest.param([frame(PING, final=False), frame(CONTINUATION)], 1002, id="fragmented ping"),
        pytest.param([frame(CLOSE, final=False)], 1002, id="fragmented close"),
        pytest.param([frame(PING, b"x" * 126)], 1002, id="long ping"),
        pytest.param([frame(PONG, b"x" * 126)], 1002, id="long pong"),
        pytest.param([frame(CLOSE, b"\x03\xe8" + b"x" * 124)], 1002, id="long close"),
        pytest.param([frame(CONTINUATION, b"{}")], 1002, id="continuation of nothing"),
        pytest.param([frame(CONTINUATION, b"{}", final=False)], 1002, id="unfinished continuation of nothing"),
        pytest.param([frame(TEXT, b"{", final=False), frame(TEXT, b"}")], 1002, id="text within a message"),
        pytest.param([frame(TEXT, b"{", final=False), frame(BINARY, b"}")], 1002, id="binary within a message"),
        pytest.param(
            [frame(TEXT, ping_of("x")), frame(CONTINUATION, b"}")], 1002, id="continuation of a whole message"
        ),
        pytest.param([b"\x81\xfe\x00\x02" + KEY + b"{}"], 1002, id="length in two bytes for one"),
        pytest.param([b"\x01\xfe\x00\x02" + KEY + b"{}"], 1002, id="the same in a fragment"),
        pytest.param([b"\x81\xff" + bytes(7) + b"\x02" + KEY], 1002, id="length in eight bytes for one"),
        pytest.param([b"\x81\xff\x80" + bytes(7) + KEY], 1002, id="length of 2**63"),
        pytest.param([frame(BINARY, b"x")], 1003, id="binary"),
        pytest.param([frame(BINARY)], 1003, id="empty binary"),
        pytest.param([frame(BINARY, b"x", final=False), frame(CONTINUATION, b"x")], 1003, id="fragmented binary"),
        pytest.param([frame(TEXT, b'{"\xff"}')], 1007, id="not UTF-8"),
        pytest.param([frame(TEXT, b"\xed\xa0\x80")], 1007, id="surrogate"),
        pytest.param([frame(TEXT, b"\xf4\x90\x80\x80")], 1007, id="beyond Unicode"),
        pytest.param([frame(TEXT, b"\xc0\xaf")], 1007, id="overlong"),
        pytest.param([frame(TEXT, HALF)], 1007, id="half a character"),
        pytest.param([frame(TEXT, b"\xff", final=False)], 1007, id="not UTF-8 in a first fragment"),
        pytest.param([frame(TEXT, HALF, final=False), frame(CONTINUATION)], 1007, id="half a character at the end"),
        pytest.param([frame(TEXT, HALF, final=False), frame(CONTINUATION, HALF)], 1007, id="two halves"),
        pytest.param([frame(CLOSE, b"\x03")], 1002, id="close with one byte"),
        *(
            pytest.param([close(code)], 1002, id=f"close {code}")
            for code in (0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65_535)
        ),
        pytest.param([close(1000, b"\xff")], 1007, id="close reason not UTF-8"),
    ],
)
async def test_a_violation_gets_its_close_frame(parts: list[bytes], code: int) -> None:
    async with gateway_of() as gateway:
        async with joined(gateway) as peer:
            await peer.send(*parts, frame(PING, b"behind it"), frame(TEXT, ping_of("behind it")))
            began = trio.current_time()
            await peer.closed_with(code)
            assert trio.current_time() - began < 1.0  # not by running into the close timeout
            assert {got.get("nonce") for got in peer.texts} <= {None, "x"}, "answered what came behind it"
            assert len(peer.frames) == len(peer.texts) + 1
            assert list(gateway.statistics().closes.values()) == [1]
        await works(gateway)


@pytest.mark.parametrize(
    "end", [frame(TEXT, bits=0x40), frame(BINARY), frame(TEXT, b"\xff"), frame(TEXT, b"x" * 2000000)]
)
async def test_what_came_in_front_of_a_violation_is_handled_and_answered(end: bytes) -> None:
    async with gateway_of() as gateway, joined(gateway) as peer:
        await peer.send(*(frame(TEXT, ping_of(f"{number}")) for number in range(100)), end)
        await peer.until_close()
        assert [got["nonce"] for got in peer.texts[1:]] == [f"{number}" for number in range(100)]


@pytest.mark.parametrize("first", [frame(TEXT, bits=0x40), frame(TEXT, b"\xff")])
async def test_a_close_frame_survives_what_is_unread_behind_a_violation(first: bytes) -> None:
    async with gateway_of(close_timeout_ms=5_000) as gateway, joined(gateway) as peer:
        await peer.send(first, b"noise" * 200_000)
        await peer.until_close()
        await peer.stream.send_eof()
        await peer.until_end()
        assert not peer.reset


async def test_noise_of_every_kind_ends_only_its_own_connection() -> None:
    async with gateway_of() as gateway, joined(gateway) as bystander:
        for seed in range(40):
            async with joined(gateway) as peer:
                await peer.send(bytes((seed * 37 + at * at * 11 + at) % 256 for at in range(400)))
                await peer.stream.send_eof()
                await peer.until_end()
        await bystander.send(frame(TEXT, ping_of("fine")))
        await bystander.until("pong")


# ends


@pytest.mark.parametrize(
    ("sent", "code", "reason"),
    [
        (frame(CLOSE), 1005, ""),
        (close(1000), 1000, ""),
        (close(1001, "tschüß".encode()), 1001, "tschüß"),
        (close(1000, b"r" * 123), 1000, "r" * 123),
        *((close(code), code, "") for code in (1003, 1007, 1011, 1012, 1013, 1014, 3000, 3999, 4000, 4999)),
    ],
)
async def test_a_peer_s_close_is_answered_with_its_code(sent: bytes, code: int, reason: str) -> None:
    async with gateway_of() as gateway, joined(gateway) as peer:
        await peer.send(sent, frame(TEXT, ping_of("behind the close")), frame(PING))
        began = trio.current_time()
        await peer.until_end()
        assert trio.current_time() - began < 1.0
        assert peer.closes == [(code, reason)]
        assert len(peer.frames) == 2
        assert gateway.statistics().closes == {}


async def test_leave_is_answered_and_closed_with_1000() -> None:
    async with gateway_of() as gateway, joined(gateway) as peer:
        await peer.send(text(type="leave"), frame(TEXT, ping_of("after it")))
        await peer.closed_with(1000, "left")
        assert [got["type"] for got in peer.texts] == ["hello_ok", "left"]


async def test_a_ping_after_our_close_and_text_until_the_close_reply() -> None:
    async with gateway_of(close_timeout_ms=5_000) as gateway, joined(gateway) as peer:
        await peer.send(text(type="leave"))
        assert await peer.until_close() == (1000, "left")
        for _ in range(50):
            await peer.send(frame(PING, b"late"), frame(PONG), frame(TEXT, ping_of("late" * 200)))
            await peer.send(frame(TEXT, b"\xc3", final=False), frame(CONTINUATION, b"\xa9"), frame(BINARY, b"late"))
        await peer.send(close(1000))
        began = trio.current_time()
        await peer.until_end()
        assert trio.current_time() - began < 2.0, "the close reply was not seen"


async def test_a_ping_that_crosses_our_close_is_ponged_in_front_of_it_or_not_at_all() -> None:
    async with gateway_of() as gateway:
        for _ in range(20):  # who comes first is up to the scheduler; nothing may stand behind the close frame
            async with joined(gateway) as peer:
                await peer.send(text(type="leave"), frame(PING, b"crosses"), close(1000))
                await peer.until_end()
                assert len(peer.closes) == 1


async def test_more_text_than_any_buffer_holds_does_not_hide_the_close_reply() -> None:
    async with gateway_of(close_timeout_ms=10_000) as gateway, joined(gateway) as peer:
        await peer.send(text(type="leave"))
        for _ in range(20):
            await peer.send(frame(TEXT, ping_of("x" * 500_000)))
        await peer.send(close(1000))
        with trio.fail_after(8):
            await peer.until_end()
        assert peer.closes == [(1000, "left")]


@pytest.mark.parametrize("sent", [frame(BINARY), frame(TEXT, b"\xff"), frame(15), text(type="leave")])
async def test_closes_that_cross_are_one_close_frame_each_way(sent: bytes) -> None:
    """The peer's close stands in the same segment behind what makes us close."""
    async with gateway_of() as gateway, joined(gateway) as peer:
        await peer.send(sent, close(4000, b"mine"))
        began = trio.current_time()
        await peer.until_end()
        assert trio.current_time() - began < 1.0
        assert len(peer.closes) == 1


@pytest.mark.parametrize("ending", ["silence", "end", "reset"])
async def test_a_peer_that_does_not_answer_our_close_is_dropped(ending: str) -> None:
    async with gateway_of(close_timeout_ms=300) as gateway, joined(gateway) as peer:
        await peer.send(text(type="leave"))
        await peer.until_close()
        began = trio.current_time()
        if ending == "end":
            await peer.stream.send_eof()
        elif ending == "reset":
            reset_on_close(peer)
            await peer.stream.aclose()
        await eventually(lambda: gateway._serving == 0)
        if ending == "silence":
            assert 0.2 < trio.current_time() - began < 0.6
            await peer.until_end()
        else:
            assert trio.current_time() - began < 0.2


@pytest.mark.parametrize("at", [0, 1, 5, 40])
async def test_a_line_that_ends_without_a_close(at: int) -> None:
    async with gateway_of() as gateway, joined(gateway, session_id="s") as peer:
        await peer.send(frame(TEXT, ping_of("cut" * 20))[:at])
        await peer.stream.send_eof()
        await peer.until_end()
        assert peer.closes == []
        await eventually(lambda: gateway.statistics().connections == 0)
        async with joined(gateway, session_id="s") as again:
            assert again.texts[0]["last_disconnect"]["code"] == 1006


async def test_messages_in_front_of_a_close_are_still_taken() -> None:
    heard: list[Any] = []

    async def agent(turn: Turn) -> None:
        heard.append(turn.input.content)

    async with gateway_of(agent) as gateway, joined(gateway) as peer:
        await peer.send(text(type="message", request_id="r", content="hear me"), close(1000))
        await peer.until_end()
        await eventually(lambda: heard == ["hear me"])


async def test_a_handler_s_exception_is_1011_and_ends_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    from gateway.server.connection import Connection

    flush = Connection.flush

    def failing(self: Connection) -> None:
        raise KeyError("a bug")

    async with gateway_of(crashes=2) as gateway, joined(gateway) as bystander:
        monkeypatch.setattr(Connection, "_ids_fit", failing)
        async with joined(gateway) as peer:
            await peer.send(text(type="abort"))
            await peer.closed_with(1011, "internal")
        monkeypatch.setattr(Connection, "run", failing)  # even where nothing catches it
        async with opened(gateway) as peer:
            await peer.until_end()
        monkeypatch.undo()
        assert Connection.flush is flush
        await works(gateway)
        await bystander.send(frame(TEXT, ping_of("fine")))
        await bystander.until("pong")


@pytest.mark.parametrize("begun", [b"", b"\x81", b"\x81\xfe\x01", frame(TEXT, ping_of("half"))[:20], frame(PING)[:3]])
async def test_silence_in_the_middle_of_a_frame_is_silence(begun: bytes) -> None:
    async with gateway_of(heartbeat_ms=100) as gateway, joined(gateway) as peer:
        await peer.send(begun)
        await peer.closed_with(4408, "heartbeat_timeout")


async def test_websocket_pings_are_no_sign_of_life() -> None:
    async with gateway_of(heartbeat_ms=100) as gateway, joined(gateway) as peer:
        with trio.move_on_after(5) as scope:
            async with trio.open_nursery() as nursery:

                @nursery.start_soon
                async def _() -> None:
                    while True:
                        await peer.send(frame(PING, b"alive?"))
                        await trio.sleep(0.02)

                assert await peer.until_close() == (4408, "heartbeat_timeout")
                nursery.cancel_scope.cancel()
        assert not scope.cancelled_caught


# peers that do not read


async def say_much(turn: Turn) -> None:
    """More than the kernel takes for a peer that does not read; then wait to be stopped."""
    for _ in range(200):
        await turn.send("x" * 10_000)
    await trio.sleep_forever()


async def fill(peer: Peer, gateway: Gateway) -> None:
    """Have the agent write until the kernel takes no more for this peer."""
    await peer.send(text(type="message", request_id="r", content="go"))
    await eventually(lambda: gateway.statistics().blocked_connections == 1)


SLOW = {"send_buffer_bytes": 4096, "max_buffered_bytes": 1 << 30, "send_timeout_ms": 600_000}


async def test_a_peer_that_does_not_read_at_close_is_dropped() -> None:
    async with gateway_of(say_much, **SLOW, close_timeout_ms=300) as gateway:
        async with joined(gateway, receive_buffer=4096) as peer:
            await fill(peer, gateway)
            began = trio.current_time()
            await peer.send(text(type="leave"))
            await eventually(lambda: gateway._serving == 0)
            assert 0.2 < trio.current_time() - began < 1.0


@pytest.mark.parametrize("ours", [True, False])
async def test_the_close_frame_reaches_a_peer_that_reads_late(ours: bool) -> None:
    async with gateway_of(say_much, **SLOW, close_timeout_ms=5_000) as gateway:
        async with joined(gateway, receive_buffer=4096) as peer:
            await fill(peer, gateway)
            await peer.send(text(type="leave") if ours else close(4321))
            await eventually(lambda: gateway.statistics().connections == 0)
            await trio.sleep(0.1)
            code = 1000 if ours else 4321
            await peer.closed_with(code)


async def test_a_peer_that_ends_its_side_while_frames_wait_and_then_reads() -> None:
    async with gateway_of(say_much, **SLOW, close_timeout_ms=3_000) as gateway:
        async with joined(gateway, receive_buffer=4096) as peer:
            await fill(peer, gateway)
            await peer.stream.send_eof()
            began = trio.current_time()
            await eventually(lambda: gateway.statistics().connections == 0)
            while await peer.more():  # the rest of a frame may be gone with the line
                pass
            await eventually(lambda: gateway._serving == 0)
            assert trio.current_time() - began < 2.0


async def test_a_ping_flood_that_nobody_reads_is_bounded_and_reading_goes_on() -> None:
    ended: list[str] = []

    async def agent(turn: Turn) -> None:
        try:
            await say_much(turn)
        finally:
            ended.append(str(turn.input.content))

    async with gateway_of(agent, **SLOW, max_control_frames=32, close_timeout_ms=5_000) as gateway:
        async with joined(gateway, receive_buffer=4096) as peer:
            await fill(peer, gateway)
            (connection,) = gateway.joined
            # As many as may wait: the abort behind them gets through, and the connection lives.
            await peer.send(*(frame(PING, b"%03d" % number) for number in range(20)), text(type="abort"))
            await eventually(lambda: ended == ["go"])
            assert gateway.statistics().connections == 1
            # More than may wait: 1013, and the abort behind those is acted on as well.
            await peer.send(text(type="message", request_id="again", content="again"))
            (session,) = gateway.registry.sessions.values()
            await eventually(lambda: session.turn is not None)
            for _ in range(100):
                await peer.send(frame(PING, b"p" * 125) * 100)
            await peer.send(text(type="abort"))
            await eventually(lambda: ended == ["go", "again"])
            ws = connection._ws
            assert len(ws._fifo) <= 32 + 2
            await peer.closed_with(1013, "overloaded")
            pongs = [payload for opcode, payload in peer.frames if opcode == PONG]
            assert pongs[:20] == [b"%03d" % number for number in range(20)]
            # The kernel may have found room for the first of them meanwhile.
            assert len(pongs) <= 20 + 32 + 2
            assert gateway.statistics().closes == {"1013 overloaded": 1}


async def test_a_flood_of_json_pings_that_nobody_reads() -> None:
    ended: list[str] = []

    async def agent(turn: Turn) -> None:
        try:
            await say_much(turn)
        finally:
            ended.append(str(turn.input.content))

    async with gateway_of(agent, **SLOW, max_control_frames=32, close_timeout_ms=5_000) as gateway:
        async with joined(gateway, receive_buffer=4096) as peer:
            await fill(peer, gateway)
            await peer.send(*(frame(TEXT, ping_of(f"{number}")) for number in range(500)), text(type="abort"))
            await eventually(lambda: ended == ["go"])
            await peer.closed_with(1013, "overloaded")
