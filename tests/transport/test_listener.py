"""Accepting: how many sockets may stand at the door, and what must not end the loop that lets them in."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from raw_peer import HELLO, REQUEST, TEXT, Peer, connect, eventually, frame, gateway_of, joined, ping_of, raw, text

from gateway.server import listener as module
from gateway.server.listener import ACCEPT_PAUSE, Admission, accept_forever
from gateway.transport.memory import memory_pair
from gateway.transport.streams import ByteStream


@asynccontextmanager
async def waiting(gateway: Any, count: int) -> AsyncIterator[list[Peer]]:
    """So many sockets that say nothing."""
    async with AsyncExitStack() as stack:
        peers = [await stack.enter_async_context(raw(gateway)) for _ in range(count)]
        await eventually(lambda: gateway.statistics().pending_handshakes == count)
        yield peers


async def refused(peer: Peer) -> None:
    status, body = await peer.http()
    assert (status, body) == (503, b"too many connections that have not said hello\n")
    assert not peer.reset


async def test_the_33rd_socket_of_a_peer_is_refused_and_slots_are_freed() -> None:
    async with gateway_of() as gateway:
        async with waiting(gateway, 32) as peers:
            async with raw(gateway) as one_more:
                await refused(one_more)  # before it has said anything
            async with raw(gateway) as one_more:
                await one_more.send(REQUEST, text(**HELLO))  # all of it unread: a reset could swallow the answer
                await refused(one_more)
            assert gateway.statistics().refused_sockets == 2
            assert gateway.statistics().pending_handshakes == 32
            # An open WebSocket that has not said hello still holds its slot; one that has joined does not.
            await peers[0].send(REQUEST)
            assert (await peers[0].http())[0] == 101
            async with raw(gateway) as one_more:
                await refused(one_more)
            await peers[0].send(text(**HELLO))
            await peers[0].until("hello_ok")
            async with joined(gateway):
                assert gateway.statistics().connections == 2
            # So does one that gives up, or is turned away.
            await peers[1].stream.aclose()
            await peers[2].send(b"nonsense\r\n\r\n")
            assert (await peers[2].http())[0] == 400
            await eventually(lambda: gateway.statistics().pending_handshakes == 29)
            async with joined(gateway):
                pass
        await eventually(lambda: gateway.statistics().pending_handshakes == 0)
        assert gateway.statistics().refused_sockets == 3


async def test_the_total_counts_over_all_peers() -> None:
    async with gateway_of(max_pending_handshakes=3) as gateway, waiting(gateway, 2):
        near, far = memory_pair(peer="10.0.0.1")
        gateway.serve(far)
        await eventually(lambda: gateway.statistics().pending_handshakes == 3)
        other, far = memory_pair(peer="10.0.0.2")
        gateway.serve(far)
        peer = Peer(other)
        await refused(peer)
        await other.aclose()
        await near.aclose()


def test_admission_counts_each_peer_and_forgets_it() -> None:
    admission = Admission(3, 2)
    assert [admission.enter(peer) for peer in "aaabb"] == [True, True, False, True, False]
    admission.leave("a")
    assert admission.enter("b")
    assert not admission.enter("a")
    for peer in "abb":
        admission.leave(peer)
    assert (admission.pending, dict(admission._peers)) == (0, {})
    assert admission.enter("a")


async def test_refused_sockets_that_stay_are_closed_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINGER", 0.2)
    async with gateway_of(max_pending_handshakes=1) as gateway, waiting(gateway, 1), AsyncExitStack() as stack:
        peers = [await stack.enter_async_context(raw(gateway)) for _ in range(100)]
        began = trio.current_time()
        await eventually(lambda: gateway.statistics().refused_sockets == 100)
        assert gateway._serving <= 1 + module.MAX_LINGERING
        await eventually(lambda: gateway._serving == 1)
        assert trio.current_time() - began < 1.5
        for peer in peers:
            await refused(peer)


async def test_sockets_that_were_reset_before_they_were_accepted() -> None:
    async with gateway_of() as gateway:
        for _ in range(50):
            stream = await connect(gateway)
            stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            stream.socket.close()
        async with joined(gateway) as peer:
            await peer.send(frame(TEXT, ping_of("n")))
            await peer.until("pong")
        await eventually(lambda: gateway.statistics().pending_handshakes == 0)


async def test_a_crash_anywhere_in_a_connection_ends_only_that(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a bug")

    async with gateway_of(crashes=2) as gateway, joined(gateway) as bystander:
        for name in ("Connection", "open_server_websocket"):
            with monkeypatch.context() as patch:
                patch.setattr(module, name, crash)
                async with raw(gateway) as peer:
                    await peer.send(REQUEST)
                    while await peer.more():
                        pass
        await bystander.send(frame(TEXT, ping_of("n")))
        await bystander.until("pong")
        assert gateway.statistics().pending_handshakes == 0


# the accept loop


class Door:
    """A listener whose `accept` does what the script says, and then ends."""

    def __init__(self, script: list[Any]) -> None:
        self.socket = self
        self.script = script
        self.times: list[float] = []

    async def accept(self) -> Any:
        await trio.lowlevel.checkpoint()
        self.times.append(trio.current_time())
        if not self.script:
            raise trio.ClosedResourceError
        step = self.script.pop(0)
        if isinstance(step, int):
            raise OSError(step, os.strerror(step))
        return step, None


class Sock:
    """As much of a socket as the loop touches."""

    closed = False
    family = socket.AF_INET

    def __init__(self, broken: bool = False) -> None:
        self.broken = broken

    def getpeername(self) -> Any:
        return "10.0.0.9", 1

    def setsockopt(self, *args: Any) -> None:
        if self.broken:
            raise OSError(errno.EINVAL, "reset by now")

    def close(self) -> None:
        self.closed = True


async def test_the_accept_loop_outlives_every_error(autojump_clock: trio.testing.MockClock) -> None:
    served: list[ByteStream] = []
    good, broken = Sock(), Sock(broken=True)
    door = Door([errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EPERM, errno.ENETDOWN, broken, good])
    await accept_forever(door, 4096, served.append)  # type: ignore[arg-type]
    assert broken.closed
    assert [stream.peer for stream in served] == ["10.0.0.9"]
    waits = [later - earlier for earlier, later in zip(door.times, door.times[1:], strict=False)]
    assert waits == pytest.approx([ACCEPT_PAUSE] * 6 + [0, 0])


async def test_a_peer_that_is_gone_costs_no_pause(autojump_clock: trio.testing.MockClock) -> None:
    door = Door([errno.ECONNABORTED, errno.EPROTO, errno.ECONNABORTED, Sock()])
    await accept_forever(door, 4096, lambda stream: None)  # type: ignore[arg-type]
    assert door.times == [door.times[0]] * 5


async def test_a_closed_listener_ends_the_loop() -> None:
    await accept_forever(Door([errno.EBADF, Sock()]), 4096, lambda stream: None)  # type: ignore[arg-type]
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept_forever, listener, 4096, lambda stream: None)
        await trio.testing.wait_all_tasks_blocked()
        listener.socket.close()


SHORT_OF_FILES = """
import resource, sys, time
import trio
from gateway.config import Config, Limits, Server
from gateway.server import open_gateway

async def agent(turn):
    return turn.input.content

async def main():
    limits = Limits(max_pending_handshakes_per_peer=1000)
    config = Config(server=Server(port=0, drain_timeout_ms=0), limits=limits)
    async with open_gateway(config, {"echo": agent}) as gateway:
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
        print(gateway.address[1], flush=True)
        while (await trio.to_thread.run_sync(sys.stdin.readline)).strip():
            print(gateway.statistics().pending_handshakes, time.process_time(), flush=True)

trio.run(main)
"""


async def test_a_process_without_file_descriptors_waits_and_goes_on() -> None:
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", SHORT_OF_FILES],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "NO_COLOR": "1"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    output = b""

    async def line() -> bytes:
        nonlocal output
        while b"\n" not in output:
            output += await process.stdout.receive_some()  # type: ignore[union-attr]
        got, _, output = output.partition(b"\n")
        return got

    async def figures() -> tuple[int, float]:
        await process.stdin.send_all(b"?\n")  # type: ignore[union-attr]
        while len(words := (await line()).split()) != 2 or not words[0].isdigit():
            logged.append(words)
        return int(words[0]), float(words[1])

    logged: list[list[bytes]] = []
    try:
        with trio.fail_after(20):
            port = int(await line())
            async with AsyncExitStack() as stack:
                # More than it has descriptors for; the kernel takes the rest into the backlog.
                for _ in range(60):
                    await stack.enter_async_context(await trio.open_tcp_stream("127.0.0.1", port))
                before = 0, 0.0
                while (now := await figures())[0] == 0 or now[0] != before[0]:
                    before = now
                    await trio.sleep(0.05)
                held, cpu = now
                assert held < 60
                await trio.sleep(0.5)
                still, later = await figures()
                assert still == held
                assert later - cpu < 0.25, "the accept loop spins"
            peer = Peer(await trio.open_tcp_stream("127.0.0.1", port))
            await peer.send(REQUEST, text(**HELLO), frame(TEXT, ping_of("n")))
            assert (await peer.http())[0] == 101
            await peer.until("pong")
            await peer.stream.aclose()
            await process.stdin.aclose()
            assert await process.wait() == 0
        assert sum(b"out_of_files" in words for words in logged) == 1, "said once, not ten times a second"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
