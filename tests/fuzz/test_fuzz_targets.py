"""A small, fixed portion of the fuzzing; `fuzz.py` goes on for as long as one likes, guided by coverage."""

from __future__ import annotations

import random

import pytest
from fuzz_targets import TARGETS, in_trio, seeds, split

from gateway.testing.wire import frame
from gateway.transport.upgrade import HandshakeFailed, parse_request

TOKENS = [
    b"null", b"true", b"1e999", b"-0", b"18446744073709551616", b"\xff", b"\\ud800", b"{", b"[", b"]", b"}", b'"', b":",
    b",", b'"type"', b'"seq"', b'"request_id"', b'"turn_id"', b'"delta"', b'"message"', b'"hello"', b"\x81\x80",
    b"\x01\xfe", b"\x00\x80", b"\x88\x82", b"\x89\x80", b"\x81\xff",
    b"\r\n", b"\n", b" \t", b"Upgrade", b"Content-Length: 5", b"Transfer-Encoding: chunked", b"HTTP/1.0",
]  # fmt: skip


def mutated(chance: random.Random, corpus: list[bytes]) -> bytes:
    """A few random changes to a seed."""
    data = bytearray(chance.choice(corpus))
    for _ in range(chance.randint(1, 6)):
        at = chance.randint(0, len(data))
        match chance.randrange(6):
            case 0:
                data[at : at + 1] = bytes((chance.randrange(256),))
            case 1:
                del data[at : at + chance.randint(1, 16)]
            case 2:
                data[at:at] = chance.choice(TOKENS)
            case 3:
                data[at:at] = data[at : at + chance.randint(1, 32)]
            case 4:
                other = chance.choice(corpus)
                start = chance.randint(0, len(other))
                data[at:at] = other[start : start + chance.randint(1, 64)]
            case 5:
                if at < len(data):
                    data[at] ^= 1 << chance.randrange(8)
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
async def test_only_typed_errors_escape(name: str) -> None:
    target, corpus, chance = TARGETS[name], seeds(name), random.Random(name)

    def run() -> None:
        for data in corpus:
            target(data)
        for number in range(5_000):
            data = mutated(chance, corpus)
            try:
                target(data)
            except Exception as exc:
                raise AssertionError(f"input {number} of {name}: {data!r}") from exc

    await in_trio(run)


def test_some_mutated_upgrade_requests_are_taken_and_some_are_not() -> None:
    """Or the target would look at nothing but refusals."""
    corpus, chance = seeds("upgrade"), random.Random(1)
    taken = 0
    for _ in range(500):
        try:
            parse_request(mutated(chance, corpus))
        except HandshakeFailed:
            continue
        taken += 1
    assert 10 < taken < 490


async def test_the_splitter_is_really_run() -> None:
    """The harness finds messages, whole and in pieces, and refuses what is wrong."""

    def run() -> None:
        pieces = frame(1, b"in ", final=False) + frame(9) + frame(0, b"pieces")
        for size in (0, 1, 5):
            assert split(bytes((size,)) + frame(1, b"{}") + pieces) == ([b"{}", b"in pieces"], 1006, False)
            assert split(bytes((size,)) + frame(1, b"{}") + frame(3)) == ([b"{}"], 1002, True)
            assert split(bytes((size,)) + frame(1, b"\xff")) == ([], 1007, True)
            assert split(bytes((size,)) + frame(1, b"\xff", final=False)) == ([], 1007, True)
            assert split(bytes((size,)) + frame(2)) == ([], 1003, True)
            assert split(bytes((size,)) + frame(8, b"\x0f\xa0")) == ([], 4000, False)

    await in_trio(run)
