"""The core cases of the Autobahn test suite, as far as a gateway that does not echo can have them: 1.1 and 2 to 7.1.

1.2 (binary), 9 (megabytes) and 12, 13 (compression) do not apply; 7.3 to 7.9 (closing) are in `test_websocket_raw`.
"""

from __future__ import annotations

import pytest
import trio
from raw_peer import CONTINUATION, PING, PONG, TEXT, close, frame, gateway_of, joined, pieces, ping_of

AUTOBAHN: dict[str, tuple[list[bytes], list[str], int]] = {}


def case(name: str, *parts: bytes, pongs: list[str] = [], code: int = 1000) -> None:  # noqa: B006
    AUTOBAHN[name] = [*parts], pongs, code


for size in (0, 125, 126, 127, 128, 65_535, 65_536):
    case(f"1.1 text {size}", frame(TEXT, ping_of("é" * (size // 2))), pongs=["é" * (size // 2)])
case("1.1.8 in chops of 997", frame(TEXT, ping_of("x" * 65_536)), pongs=["x" * 65_536])
case("2.10 ten pings", *(frame(PING, b"%d" % n) for n in range(10)), frame(TEXT, ping_of("e")), pongs=["e"])
case("2.7 unsolicited pong", frame(PONG), frame(PONG, b"x"), frame(TEXT, ping_of("e")), pongs=["e"])
case(
    "3.2 good text, then a reserved bit",
    frame(TEXT, ping_of("e")),
    frame(TEXT, b"{}", bits=0x20),
    pongs=["e"],
    code=1002,
)
case(
    "4.1.3 good text, then a reserved opcode", frame(TEXT, ping_of("e")), frame(5), frame(PING), pongs=["e"], code=1002
)
case(
    "4.2.3 good text, then a reserved control",
    frame(TEXT, ping_of("e")),
    frame(13),
    frame(PING),
    pongs=["e"],
    code=1002,
)
case("5.3 text in two fragments", *pieces(ping_of("two"), 10), pongs=["two"])
case(
    "5.6 ping between two fragments",
    pieces(ping_of("two"), 10)[0],
    frame(PING),
    pieces(ping_of("two"), 10)[1],
    pongs=["two"],
)
case("5.9 continuation, then text", frame(CONTINUATION, b"x"), frame(TEXT, ping_of("e")), code=1002)
case(
    "5.15 two fragments, then an orphan",
    *pieces(ping_of("two"), 10),
    frame(CONTINUATION, b"x", final=False),
    pongs=["two"],
    code=1002,
)
case("5.18 two messages begun", frame(TEXT, b"a", final=False), frame(TEXT, b"b"), code=1002)
case(
    "5.19 fragments with pings",
    *[part for piece in pieces(ping_of("many"), 5, 5, 5, 2) for part in (piece, frame(PING, b"p"))],
    pongs=["many"],
)
case("6.1.2 three empty fragments", *pieces(ping_of("x"), 0, 0), pongs=["x"])
case("6.2.4 each byte of UTF-8 by itself", *pieces(ping_of("κόσμε"), *[1] * 30), pongs=["κόσμε"])
case(
    "6.3.2 each byte of bad UTF-8 by itself", *pieces(b'"' + "κό".encode() + b"\xed\xa0\x80edited", *[1] * 9), code=1007
)
case(
    "6.4 bad UTF-8 early, its message unfinished",
    frame(TEXT, "κό".encode() + b"\xf4", final=False),
    frame(CONTINUATION, b"\x90", final=False),
    code=1007,
)
case("7.1.1 text, then close", frame(TEXT, ping_of("e")), pongs=["e"])
case("7.1.5 fragment, close", frame(TEXT, b"{", final=False))


@pytest.mark.parametrize("chop", [None, 1, 997])
async def test_autobahn_s_core_cases(chop: int | None) -> None:
    async with gateway_of(max_signal_bytes=1 << 20) as gateway:
        for name, (parts, pongs, code) in AUTOBAHN.items():
            data = b"".join(parts) + (close(1000) if code == 1000 else b"")
            if chop == 1 and len(data) > 5000:
                continue
            async with joined(gateway) as peer:
                for at in range(0, len(data), chop or len(data)):
                    try:
                        await peer.send(data[at : at + (chop or len(data))])
                    except trio.BrokenResourceError:
                        break  # it has closed, and rightly: the code tells
                if code == 1000:
                    await peer.until_end()
                    assert [got for got, _ in peer.closes] == [1000], name
                else:
                    await peer.closed_with(code)
                assert [got["nonce"] for got in peer.texts if got["type"] == "pong"] == pongs, name
                sent = [part for part in parts if part[0] == 0x80 | PING]
                if code == 1000:
                    assert sum(opcode == PONG for opcode, _ in peer.frames) == len(sent), name
