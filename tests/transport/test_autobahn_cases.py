"""An echo server on our transport, against every case of the Autobahn test suite: see `websocket_cases`."""

from __future__ import annotations

from collections import Counter

import pytest
import trio
import trio.testing
from raw_peer import CLOSE, REQUEST, TEXT, Peer, close, frame
from websocket_cases import QUIET, SEEN, Case, all_cases, case_of

from gateway.errors import ConnectionLost
from gateway.transport.memory import memory_pair
from gateway.transport.streams import ByteStream
from gateway.transport.websocket import open_server_websocket

COUNTS = {
    "1.1": 8, "1.2": 8, "2": 11, "3": 7, "4.1": 5, "4.2": 5, "5": 20, "6.1": 3, "6.2": 4, "6.3": 2, "6.4": 4, "6.5": 5,
    "6.6": 11, "6.7": 4, "6.8": 2, "6.9": 4, "6.10": 3, "6.11": 5, "6.12": 8, "6.13": 5, "6.14": 10, "6.15": 1,
    "6.16": 3, "6.17": 5, "6.18": 5, "6.19": 5, "6.20": 7, "6.21": 8, "6.22": 34, "6.23": 7, "7.1": 6, "7.3": 6,
    "7.5": 1, "7.7": 13, "7.9": 9, "7.13": 2, "9.1": 6, "9.2": 6, "9.3": 9, "9.4": 9, "9.5": 6, "9.6": 6, "9.7": 6,
    "9.8": 6, "10.1": 1, "12.1": 18, "12.2": 18, "12.3": 18, "12.4": 18, "12.5": 18, "13.1": 18, "13.2": 18, "13.3": 18,
    "13.4": 18, "13.5": 18, "13.6": 18, "13.7": 18,
}  # fmt: skip
"""The suite's own list: cases by group, 517 in all."""


NUMBERS = [f"{group}.{n}" for group, count in COUNTS.items() for n in range(1, count + 1)]

QUICK = {
    "9.1": (1, 2, 3), "9.2": (1, 2, 3), "9.3": (5, 6, 7, 8, 9), "9.4": (5, 6, 7, 8, 9), "9.5": (5, 6), "9.6": (5, 6),
    "9.7": (1, 6), "9.8": (1, 6),
    **dict.fromkeys([f"12.{n}" for n in range(1, 6)] + [f"13.{n}" for n in range(1, 8)], (1, 9, 15)),
}  # fmt: skip
"""Of these groups, the cases that always run; the others are large or many, and run with --long."""


def marks(number: str) -> list[pytest.MarkDecorator]:
    group, _, last = number.rpartition(".")
    return [] if int(last) in QUICK.get(group, (int(last),)) else [pytest.mark.long]


def test_no_case_is_missing() -> None:
    assert len(NUMBERS) == 517
    assert Counter(case.number for case in all_cases()) == Counter(NUMBERS)
    assert all(case.about for case in all_cases())


async def echo(stream: ByteStream) -> None:
    """What the suite wants to talk to."""
    async with open_server_websocket(stream, max_message_bytes=32 * 1024 * 1024, close_timeout=60) as ws:
        unblocked = trio.lowlevel.ParkingLot()
        ws.on_unblocked = unblocked.unpark_all
        try:
            while True:
                for message in await ws.get_many():
                    while ws.blocked:
                        await unblocked.park()
                    ws.send_nowait([message])
        except ConnectionLost:
            pass


async def play(case: Case, peer: Peer) -> None:
    """Send what the case says, and check what comes back."""
    for _ in range(case.rounds):
        for part in case.send:
            if part == SEEN:
                await trio.testing.wait_all_tasks_blocked()
                continue
            if part == QUIET:
                await trio.testing.wait_all_tasks_blocked()
                with trio.move_on_after(0) as scope:
                    raise AssertionError(f"something came too early: {await peer.recv()}")
                assert scope.cancelled_caught
                continue
            for at in range(0, len(part), case.chop or len(part)):
                try:
                    await peer.send(part[at : at + (case.chop or len(part))])
                except trio.BrokenResourceError:
                    break  # it has closed, and rightly: the code tells
                if case.chop is not None and case.chop < 64:
                    await trio.testing.wait_all_tasks_blocked()
        if case.rounds > 1:
            assert await peer.recv() == case.echo[0]
            peer.frames.clear()
    if case.rounds > 1:
        await peer.send(close(1000))
    ours = any(part[:1] == b"\x88" for part in case.send) or case.rounds > 1
    while (got := await peer.recv()) is not None:
        if got[0] == CLOSE and not ours:
            await peer.send(close(1000))


@pytest.mark.parametrize("number", [pytest.param(number, marks=marks(number)) for number in NUMBERS])
async def test_case(number: str) -> None:
    case = case_of(number)
    near, far = memory_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(echo, far)
        peer = Peer(near)
        offer = f"Sec-WebSocket-Extensions: {case.extensions}\r\n\r\n".encode() if case.extensions else b"\r\n"
        await peer.send(REQUEST[:-2] + offer)
        while b"\r\n\r\n" not in peer.buffer:
            assert await peer.more()
        head, _, peer.buffer = peer.buffer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 ")
        assert b"sec-websocket-extensions" not in head.lower(), "nothing was granted"
        await play(case, peer)
        assert peer.closes[0][0] == case.code
        if case.rounds == 1:
            assert [got for got in peer.frames if got[0] != CLOSE] == case.echo
        await near.aclose()


async def test_what_was_not_granted_is_not_understood() -> None:
    """A client that compresses although the extension was declined breaks the framing."""
    near, far = memory_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(echo, far)
        peer = Peer(near)
        await peer.send(REQUEST[:-2] + b"Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n")
        await peer.http()
        await peer.send(frame(TEXT, b"\xf2H\xcd\xc9\xc9\x07\x00", bits=0x40))
        await peer.closed_with(1002)
        await near.aclose()
