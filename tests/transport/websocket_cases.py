"""The cases of the Autobahn test suite (version 0.8.2, its numbers), and what our transport does with each.

A case is what a client sends and what has to come back from an echo server on our transport. The numbers and what each
is about are the suite's; the list was compared with the suite's own, which ran once against such an echo server with
the same verdicts. It needs Python 2.7, so here the cases are expressed anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache, partial

from attrs import frozen
from raw_peer import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, close, frame

OK, NON_STRICT, INFORMATIONAL = "OK", "NON-STRICT", "INFORMATIONAL"
REFUSED, DECLINED = "refused with 1003", "declined"

SEEN = b"\0"
"""A step: let the server see what was sent so far."""

QUIET = b""
"""The same; and nothing must have come of it."""

KIB, MIB = 1024, 1024 * 1024


@frozen(kw_only=True)
class Case:
    number: str
    about: str
    send: list[bytes]
    """Bytes, and the steps `SEEN` and `QUIET`."""
    echo: list[tuple[int, bytes]]
    """What comes back before the close: opcode and payload."""
    code: int = 1000
    """Of the server's close frame. The client's own is part of `send` where the client closes first."""
    verdict: str = OK
    chop: int | None = None
    """The bytes are sent in pieces of this size, each seen by the server before the next is sent."""
    extensions: str = ""
    rounds: int = 1
    """How often `send` is sent, each time after the echo of the time before."""

    @property
    def group(self) -> str:
        return self.number.rpartition(".")[0] or self.number


GOODBYE = close(1000)


def fragments(payload: bytes, size: int, opcode: int = TEXT) -> list[bytes]:
    """A message in fragments of at most `size` bytes."""
    parts = [payload[at : at + size] for at in range(0, len(payload), size)] or [b""]
    last = len(parts) - 1
    return [frame(CONTINUATION if at else opcode, part, final=at == last) for at, part in enumerate(parts)]


def text(number: str, about: str, payload: bytes, size: int | None = None, **more: object) -> Case:
    """A text message that comes back whole, then the client closes."""
    parts = [frame(TEXT, payload)] if size is None else fragments(payload, size)
    return Case(number=number, about=about, send=[*parts, GOODBYE], echo=[(TEXT, payload)], **more)  # type: ignore[arg-type]


def binary(number: str, about: str, payload: bytes, size: int | None = None, chop: int | None = None) -> Case:
    parts = fragments(payload, size or len(payload) or 1, BINARY)
    return Case(number=number, about=about, send=parts, echo=[], code=1003, verdict=REFUSED, chop=chop)


def fails(number: str, about: str, *send: bytes, echo: bytes | None = None, code: int = 1002, **more: object) -> Case:
    """The server closes; `echo` is the text that came before what was wrong."""
    back = [] if echo is None else [(TEXT, echo)]
    return Case(number=number, about=about, send=[*send], echo=back, code=code, **more)  # type: ignore[arg-type]


def answered(number: str, about: str, *send: bytes, echo: list[tuple[int, bytes]], chop: int | None = None) -> Case:
    return Case(number=number, about=about, send=[*send, GOODBYE], echo=echo, chop=chop)


def closed(number: str, about: str, payload: bytes, code: int, *after: bytes, verdict: str = OK) -> Case:
    """The client's close frame has this payload."""
    return Case(number=number, about=about, send=[frame(CLOSE, payload), *after], echo=[], code=code, verdict=verdict)


def all_cases() -> Iterator[Case]:
    """One at a time: together they hold hundreds of megabytes."""
    for make in dict.fromkeys(_MAKERS.values()):
        yield from make()


def case_of(number: str) -> Case:
    group = number.rpartition(".")[0]
    return _group(group if group in _MAKERS else number.partition(".")[0])[number]


@lru_cache(maxsize=1)  # tests go through a group in a row, and some are large
def _group(name: str) -> dict[str, Case]:
    return {case.number: case for case in _MAKERS[name]()}


SIZES = (0, 125, 126, 127, 128, 65_535, 65_536, 65_536)


def _messages() -> Iterator[Case]:
    for at, size in enumerate(SIZES, 1):
        chop = 997 if at == 8 else None
        how = f"{size:,} bytes" + (f" in chops of {chop}" if chop else "")
        yield text(f"1.1.{at}", f"text of {how}", b"*" * size, chop=chop)
        yield binary(f"1.2.{at}", f"binary of {how}", b"\xfe" * size, chop=chop)


def _pings() -> Iterator[Case]:
    every = bytes((0, 255, 254, 253, 252, 251, 0, 255))
    for number, about, payload, chop in (
        ("2.1", "ping without payload", b"", None),
        ("2.2", "ping with text", b"Hello", None),
        ("2.3", "ping with bytes that are not UTF-8", every, None),
        ("2.4", "ping of 125 bytes", b"\xfe" * 125, None),
        ("2.6", "the same, byte by byte", b"\xfe" * 125, 1),
    ):
        yield answered(number, about, frame(PING, payload), echo=[(PONG, payload)], chop=chop)
    yield fails("2.5", "ping of 126 bytes", frame(PING, b"\xfe" * 126))
    yield answered("2.7", "pong nobody asked for", frame(PONG), echo=[])
    yield answered("2.8", "the same with payload", frame(PONG, b"unasked"), echo=[])
    yield answered("2.9", "pong nobody asked for, then ping", frame(PONG, b"x"), frame(PING, b"y"), echo=[(PONG, b"y")])
    pings = [b"ping %d" % n for n in range(10)]
    for number, chop in (("2.10", None), ("2.11", 1)):
        about = "ten pings" + (", byte by byte" if chop else "")
        yield answered(number, about, *(frame(PING, p) for p in pings), echo=[(PONG, p) for p in pings], chop=chop)


def _reserved() -> Iterator[Case]:
    hello, ping = b"Hello, world!", frame(PING)
    good = frame(TEXT, hello)
    yield fails("3.1", "reserved bit 3", frame(TEXT, hello, bits=0x10))
    bad = frame(TEXT, hello, bits=0x20)
    yield fails("3.2", "good text, then reserved bit 2, then ping", good, bad, ping, echo=hello)
    bad = frame(TEXT, hello, bits=0x30)
    yield fails("3.3", "good text, then two reserved bits, each seen alone", good, SEEN, bad, ping, echo=hello)
    bad = frame(TEXT, hello, bits=0x40)
    yield fails("3.4", "good text, then reserved bit 1, byte by byte", good, bad, ping, echo=hello, chop=1)
    yield fails("3.5", "binary with two reserved bits", frame(BINARY, bytes(8), bits=0x50))
    yield fails("3.6", "binary with two others", frame(BINARY, hello, bits=0x60))
    yield fails("3.7", "close with all of them", frame(CLOSE, bits=0x70))
    for group, low in (("4.1", 3), ("4.2", 11)):
        kind = "data" if low == 3 else "control"
        yield fails(f"{group}.1", f"reserved {kind} opcode {low}", frame(low))
        yield fails(f"{group}.2", f"reserved {kind} opcode {low + 1} with payload", frame(low + 1, b"reserved"))
        about = f"good text, then reserved {kind} opcode"
        yield fails(f"{group}.3", f"{about} {low + 2}", good, frame(low + 2), ping, echo=hello)
        yield fails(f"{group}.4", f"{about} {low + 3} with payload", good, frame(low + 3, hello), ping, echo=hello)
        bad = frame(low + 4, hello)
        yield fails(f"{group}.5", f"{about} {low + 4}, byte by byte", good, bad, ping, echo=hello, chop=1)


def _in_three_ways(number: int, case: Case) -> Iterator[Case]:
    """At once, frame by frame, and byte by byte."""
    ways = (("", None, False), (", frame by frame", None, True), (", byte by byte", 1, False))
    for at, (how, chop, apart) in enumerate(ways):
        send = [step for part in case.send for step in ((part, SEEN) if apart else (part,))]
        yield Case(
            number=f"5.{number + at}", about=case.about + how, send=send, echo=case.echo, code=case.code, chop=chop
        )


def _fragmentation() -> Iterator[Case]:
    one, two = frame(TEXT, b"fragment1", final=False), frame(CONTINUATION, b"fragment2")
    whole = (TEXT, b"fragment1fragment2")
    more, text_frame = frame(CONTINUATION, b"more", final=False), frame(TEXT, b"Hello, world!")
    last = frame(CONTINUATION, b"last")
    yield fails("5.1", "ping in two fragments", frame(PING, b"fragment1", final=False), two)
    yield fails("5.2", "pong in two fragments", frame(PONG, b"fragment1", final=False), two)
    yield from _in_three_ways(3, answered("5.3", "text in two fragments", one, two, echo=[whole]))
    between = answered("5.6", "ping between two fragments", one, frame(PING, b"p"), two, echo=[(PONG, b"p"), whole])
    yield from _in_three_ways(6, between)
    yield from _in_three_ways(9, fails("5.9", "last continuation of nothing, then text", last, text_frame))
    yield from _in_three_ways(12, fails("5.12", "continuation of nothing, then text", more, text_frame))
    yield fails(
        "5.15", "two fragments, then a continuation of nothing, then text", one, two, more, text_frame, echo=whole[1]
    )
    yield fails("5.16", "twice: continuation of nothing, text begun, continued", *[more, one, last] * 2)
    yield fails("5.17", "twice: last continuation of nothing, text begun, continued", *[last, one, last] * 2)
    yield fails("5.18", "text begun twice", one, frame(TEXT, b"fragment2"))
    parts = fragments(b"123456789", 2)
    for number, apart in (("5.19", False), ("5.20", True)):
        send = [*parts[:2], frame(PING, b"1"), SEEN, *parts[2:4], frame(PING, b"2"), parts[4]]
        if apart:
            send = [step for part in send for step in (part, SEEN)]
        about = "five fragments with pings among them" + (", frame by frame" if apart else "")
        yield answered(number, about, *send, echo=[(PONG, b"1"), (PONG, b"2"), (TEXT, b"123456789")])


GREEK = bytes.fromhex("cebae1bdb9cf83cebcceb5")
BAD = GREEK + b"\xed\xa0\x80edited"
BEYOND = GREEK + b"\xf4\x90\x80\x80edited"
"""A code point past the last one; the 13th byte cannot follow the 12th."""


def _utf8() -> Iterator[Case]:
    yield text("6.1.1", "empty text", b"")
    empty = [frame(TEXT, final=False), frame(CONTINUATION, final=False), frame(CONTINUATION)]
    yield answered("6.1.2", "three empty fragments", *empty, echo=[(TEXT, b"")])
    middle = frame(CONTINUATION, b"middle", final=False)
    yield answered("6.1.3", "empty, full, empty", empty[0], middle, empty[2], echo=[(TEXT, b"middle")])
    words = "Hello-µ@ßöäüàá-UTF-8!!"
    at = len("Hello-µ@ßöä".encode())
    yield text("6.2.1", "UTF-8 in one frame", words.encode())
    yield text("6.2.2", "in two, cut between characters", words.encode(), at)
    yield text("6.2.3", "in fragments of one byte", words.encode(), 1)
    yield text("6.2.4", "the same in Greek", GREEK, 1)
    yield fails("6.3.1", "bad UTF-8 in one frame", frame(TEXT, BAD), code=1007)
    yield fails("6.3.2", "in fragments of one byte", *fragments(BAD, 1), code=1007)
    for at, cut, how in ((1, len(GREEK), "at a character"), (2, 12, "within one")):
        first, second = frame(TEXT, BEYOND[:cut], final=False), frame(CONTINUATION, BEYOND[cut : cut + 4], final=False)
        yield fails(f"6.4.{at}", f"bad UTF-8 in the second fragment, cut {how}", first, QUIET, second, code=1007)
        whole = frame(TEXT, BEYOND)
        head = len(whole) - len(BEYOND) + cut
        pieces = [whole[:head], QUIET, whole[head : head + 4], QUIET, whole[head + 4 :]]
        about = f"the same in one frame that comes in pieces, cut {how}; noticed when it is complete"
        yield fails(f"6.4.{at + 2}", about, *pieces, code=1007, verdict=NON_STRICT)
    for number, (about, payloads) in enumerate(UTF8, 5):
        for at, payload in enumerate(payloads, 1):
            try:
                payload.decode()
            except UnicodeDecodeError:
                yield fails(f"6.{number}.{at}", f"{about}: {payload.hex()}", frame(TEXT, payload), code=1007)
            else:
                yield text(f"6.{number}.{at}", f"{about}: {payload.hex()}", payload)


def _hex(words: str) -> list[bytes]:
    return [bytes.fromhex(word) for word in words.split()]


MISSING_LAST = _hex("c0 e080 f08080 f8808080 fc80808080 df efbf f7bfbf fbbfbfbf fdbfbfbfbf")
NON_CHARACTERS = [
    chr(plane << 16 | low).encode()
    for plane in range(17)
    for low in (0xFFFE, 0xFFFF)
]  # fmt: skip
UTF8: list[tuple[str, list[bytes]]] = [
    (
        "good UTF-8",
        [b"hello$world", "hello¢world".encode(), "hello€world".encode(), "hello𤭢world".encode(), GREEK],
    ),
    ("prefixes of good UTF-8", [GREEK[:size] for size in range(1, len(GREEK) + 1)]),
    ("first sequence of each length", _hex("00 c280 e0a080 f0908080")),
    ("first of lengths that do not exist", _hex("f888808080 fc8480808080")),
    ("last sequence of each length", _hex("7f dfbf efbfbf f48fbfbf")),
    ("last of lengths that do not exist", _hex("f7bfbfbf fbbfbfbfbf fdbfbfbfbfbf")),
    ("other boundaries", _hex("ed9fbf ee8080 efbfbd f48fbfbf f4908080")),
    ("continuations alone", [*_hex("80 bf 80bf 80bf80 80bf80bf 80bf80bf80 80bf80bf80bf"), bytes(range(0x80, 0xBF))]),
    (
        "starts alone",
        [
            b"".join(bytes((byte, 0x20)) for byte in range(low, high))
            for low, high in ((0xC0, 0xDF), (0xE0, 0xEF), (0xF0, 0xF7), (0xF8, 0xFB), (0xFC, 0xFD))
        ],
    ),
    ("last byte missing", MISSING_LAST),
    ("all of these in a row", [b"".join(MISSING_LAST)]),
    ("bytes that do not occur", _hex("fe ff fefeffff")),
    ("an overlong slash", _hex("c0af e080af f08080af f8808080af fc80808080af")),
    ("longest overlong sequences", _hex("c1bf e09fbf f08fbfbf f887bfbfbf fc83bfbfbfbf")),
    ("an overlong zero", _hex("c080 e08080 f0808080 f880808080 fc8080808080")),
    ("a surrogate", _hex("eda080 edadbf edae80 edafbf edb080 edbe80 edbfbf")),
    (
        "a pair of surrogates",
        _hex("eda080edb080 eda080edbfbf edadbfedb080 edadbfedbfbf edae80edb080 edae80edbfbf edafbfedb080 edafbfedbfbf"),
    ),
    ("no characters, and good UTF-8", NON_CHARACTERS),
    ("special characters", _hex("efbfb9 efbfba efbfbb efbfbc efbfbd efbfbe efbfbf")),
]

MAY_BE_SENT = (1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999)
MUST_NOT = (0, 999, 1004, 1005, 1006, 1016, 1100, 2000, 2999)


def _closing() -> Iterator[Case]:
    hello = b"Hello World!"
    yield text("7.1.1", "text, then close", hello)
    normal = (1000).to_bytes(2, "big")
    yield closed("7.1.2", "two closes", normal, 1000, frame(CLOSE))
    yield closed("7.1.3", "close, then ping", normal, 1000, frame(PING))
    yield closed("7.1.4", "close, then text", normal, 1000, frame(TEXT, hello))
    one, two = fragments(b"12", 1)
    yield Case(number="7.1.5", about="close between two fragments", send=[one, GOODBYE, two], echo=[])
    large = b"BAsd7&jh23" * 26_214 + b"BAsd"
    yield Case(
        number="7.1.6",
        about="256 KiB, text, close, ping: both texts come back",
        send=[frame(TEXT, large), frame(TEXT, hello), GOODBYE, frame(PING)],
        echo=[(TEXT, large), (TEXT, hello)],
        verdict=INFORMATIONAL,
    )
    yield closed("7.3.1", "close without payload", b"", 1005)
    yield closed("7.3.2", "close with a payload of one byte", b"a", 1002)
    yield closed("7.3.3", "close with a code", normal, 1000)
    yield closed("7.3.4", "with a code and a reason", normal + hello, 1000)
    yield closed("7.3.5", "with the longest reason", normal + b"*" * 123, 1000)
    yield closed("7.3.6", "with a reason too long", normal + b"*" * 124, 1002)
    yield closed("7.5.1", "with a reason that is not UTF-8", normal + BAD, 1007)
    for at, code in enumerate(MAY_BE_SENT, 1):
        yield closed(f"7.7.{at}", f"close with {code}", code.to_bytes(2, "big"), code)
    for at, code in enumerate(MUST_NOT, 1):
        yield closed(f"7.9.{at}", f"close with {code}, which must not be sent", code.to_bytes(2, "big"), 1002)
    for at, code in enumerate((5000, 65_535), 1):
        yield closed(f"7.13.{at}", f"close with {code}", code.to_bytes(2, "big"), 1002, verdict=INFORMATIONAL)


def _size(size: int) -> str:
    return f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB" if size >= KIB else f"{size} bytes"


def _sizes(number: str, make: Callable[..., Case], kind: str) -> Iterator[Case]:
    for at, size in enumerate((64 * KIB, 256 * KIB, MIB, 4 * MIB, 8 * MIB, 16 * MIB), 1):
        yield make(f"{number}.{at}", f"{kind} of {_size(size)}", b"*" * size)


def _in_fragments(number: str, make: Callable[..., Case], kind: str) -> Iterator[Case]:
    for at in range(9):
        size = min(64 * 4**at, 4 * MIB)
        yield make(f"{number}.{at + 1}", f"{kind} of 4 MiB in fragments of {_size(size)}", b"*" * (4 * MIB), size)


def _in_chops(number: str, make: Callable[..., Case], kind: str) -> Iterator[Case]:
    for at in range(6):
        size = 64 << at
        yield make(f"{number}.{at + 1}", f"{kind} of 1 MiB in chops of {_size(size)}", b"*" * MIB, chop=size)


def _round_trips(number: str, make: Callable[..., Case], kind: str) -> Iterator[Case]:
    for at, size in enumerate((0, 16, 64, 256, 1024, 4096), 1):
        about = f"1,000 round trips of {kind} of {_size(size)}"
        if make is binary:
            yield binary(f"{number}.{at}", about, b"*" * size)
        else:
            one = frame(TEXT, b"*" * size)
            yield Case(number=f"{number}.{at}", about=about, send=[one], echo=[(TEXT, b"*" * size)], rounds=1000)


def _many() -> Iterator[Case]:
    yield text("10.1.1", "text of 64 KiB in fragments of 1,300 bytes", b"*" * 65_536, 1_300)


_BOTH = "permessage-deflate; client_no_context_takeover; client_max_window_bits"
_FRESH = "permessage-deflate; server_no_context_takeover"
OFFERS = (
    _BOTH,
    f"{_BOTH}; server_no_context_takeover",
    f"{_BOTH}; server_max_window_bits=9",
    f"{_BOTH}; server_max_window_bits=15",
    f"{_BOTH}; server_no_context_takeover; server_max_window_bits=9",
    f"{_BOTH}; server_no_context_takeover; server_max_window_bits=15",
    f"{_FRESH}; server_max_window_bits=9, {_FRESH}, permessage-deflate",
)
DEFLATE_SIZES = [16, 64, 256, KIB, 4 * KIB, 8 * KIB, 16 * KIB, 32 * KIB, 64 * KIB, 128 * KIB]
DEFLATE = [(size, None) for size in DEFLATE_SIZES] + [
    *((size, 256) for size in DEFLATE_SIZES[5:]),
    *((128 * KIB, size) for size in (KIB, 4 * KIB, 32 * KIB)),
]


def _compression(number: str, offer: str) -> Iterator[Case]:
    """The extension is offered, not granted, and a message goes both ways as it is."""
    for at, (size, cut) in enumerate(DEFLATE, 1):
        about = f"compression offered, {_size(size)}" + (f" in fragments of {_size(cut)}" if cut else "")
        yield text(f"{number}.{at}", about, b"text" * (size // 4), cut, extensions=offer, verdict=DECLINED)


_MAKERS: dict[str, Callable[[], Iterator[Case]]] = {
    "1": _messages,
    "2": _pings,
    "3": _reserved,
    "4": _reserved,
    "5": _fragmentation,
    "6": _utf8,
    "7": _closing,
    "9.1": partial(_sizes, "9.1", text, "text"),
    "9.2": partial(_sizes, "9.2", binary, "binary"),
    "9.3": partial(_in_fragments, "9.3", text, "text"),
    "9.4": partial(_in_fragments, "9.4", binary, "binary"),
    "9.5": partial(_in_chops, "9.5", text, "text"),
    "9.6": partial(_in_chops, "9.6", binary, "binary"),
    "9.7": partial(_round_trips, "9.7", text, "text"),
    "9.8": partial(_round_trips, "9.8", binary, "binary"),
    "10": _many,
    **{f"12.{at}": partial(_compression, f"12.{at}", OFFERS[0]) for at in range(1, 6)},
    **{f"13.{at}": partial(_compression, f"13.{at}", offer) for at, offer in enumerate(OFFERS, 1)},
}

TITLES = {
    "1.1": "Text messages of sizes around the forms of a frame's length",
    "1.2": "The same, binary",
    "2": "Pings and pongs",
    "3": "Reserved bits",
    "4.1": "Reserved opcodes of data frames",
    "4.2": "Reserved opcodes of control frames",
    "5": "Fragments, and control frames between them",
    "6.1": "Empty text and empty fragments",
    "6.2": "UTF-8, whole and cut within characters",
    "6.3": "Bad UTF-8, whole and cut",
    "6.4": "How early bad UTF-8 is noticed",
    **{f"6.{number}": f"UTF-8: {about}" for number, (about, _) in enumerate(UTF8, 5)},
    "7.1": "Closing, and what follows it",
    "7.3": "Length of a close frame's payload",
    "7.5": "A close reason that is not UTF-8",
    "7.7": "Close codes that may be sent",
    "7.9": "Close codes that must not be sent",
    "7.13": "Close codes beyond the defined ranges",
    "9.1": "Text messages to 16 MiB",
    "9.2": "Binary messages to 16 MiB",
    "9.3": "Text of 4 MiB in fragments",
    "9.4": "Binary of 4 MiB in fragments",
    "9.5": "Text of 1 MiB in small pieces",
    "9.6": "Binary of 1 MiB in small pieces",
    "9.7": "Round trips, text",
    "9.8": "Round trips, binary",
    "10.1": "Many fragments of one size",
    **{f"12.{number}": "Compression with the usual offer" for number in range(1, 6)},
    **{f"13.{number}": f"Compression offered as `{offer}`" for number, offer in enumerate(OFFERS, 1)},
}


def table() -> list[str]:
    """The rows of the page ``docs/reference/websocket-conformance.md``."""
    verdicts: dict[str, Counter[str]] = {}
    for case in all_cases():
        verdicts.setdefault(case.group, Counter())[case.verdict] += 1
    rows = ["| cases | what | verdict |", "|---|---|---|"]
    for group, title in TITLES.items():
        count = verdicts[group]
        shown = ", ".join(f"{n} {verdict}" for verdict, n in count.items()) if len(count) > 1 else next(iter(count))
        last = f" – {group}.{count.total()}" if count.total() > 1 else ""
        rows.append(f"| {group}.1{last} | {title} | {shown} |")
    return rows
