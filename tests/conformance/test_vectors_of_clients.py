"""The conformance vectors against our client library, in memory and in virtual time; and that each of them can fail."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock
from wsproto import ConnectionType

from gateway.client import Session, open_session
from gateway.client import core as core_module
from gateway.client.core import ClientCore
from gateway.errors import SessionClosed
from gateway.testing.peer import Peer
from gateway.testing.vector_runner import VectorFailed
from gateway.testing.vector_server import Driver, ScriptedGateway, SessionDriver
from gateway.testing.vectors import Vector, load
from gateway.transport.dial import over
from gateway.transport.memory import memory_pair

OF_CLIENTS = [vector for vector in load() if "client" in vector.sides]


async def run(vector: Vector, patience: float = 60.0, chance: float = 0.0) -> None:
    """Run a vector against a client over memory streams."""
    arrive, arrived = trio.open_memory_channel[trio.abc.HalfCloseableStream](10)

    def open_stream() -> trio.abc.HalfCloseableStream:
        ours, theirs = memory_pair()
        arrive.send_nowait(theirs)
        return ours

    async def accept() -> Peer:
        peer = Peer(await arrived.receive(), ConnectionType.SERVER)
        await peer.accept()
        return peer

    @asynccontextmanager
    async def open_driver(hello: dict[str, Any]) -> AsyncIterator[Driver]:
        where = {name: hello[name] for name in ("session_id", "since", "epoch") if name in hello}
        async with open_session(
            "ws://gateway/ws", hello["agent_id"], connect=over(open_stream), chance=lambda: chance, **where
        ) as session:
            driver = SessionDriver(session)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(driver.follow)
                yield driver
                nursery.cancel_scope.cancel()

    await ScriptedGateway(open_driver, accept, patience=patience).run(vector)


def failure(error: BaseException) -> VectorFailed:
    """The one failure in what came out of the nurseries."""
    while isinstance(error, BaseExceptionGroup):
        (error,) = error.exceptions
    assert isinstance(error, VectorFailed), error
    return error


@pytest.mark.parametrize("vector", OF_CLIENTS, ids=lambda vector: vector.id)
async def test_our_client(vector: Vector, autojump_clock: MockClock) -> None:
    await run(vector)


def lose_inputs(patch: pytest.MonkeyPatch) -> None:
    """An event is forgotten."""
    apply = ClientCore._on_event
    patch.setattr(ClientCore, "_on_event", lambda self, event, *a: event.type == "input" or apply(self, event, *a))


def forget_the_cursor(patch: pytest.MonkeyPatch) -> None:
    """It asks for everything again after a reconnect."""
    opening = ClientCore.open
    patch.setattr(
        ClientCore, "open", lambda self, token: re.sub(rb'"since":[0-9]+', b'"since":99', opening(self, token))
    )


def never_stop(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(core_module, "TERMINAL", {})
    patch.setattr(ClientCore, "_on_left", lambda self, left, now: [])


def ignore_hints(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ClientCore, "_on_goaway", lambda self, goaway, now: [])


def never_repeat(patch: pytest.MonkeyPatch) -> None:
    """What was written before the line broke counts as sent."""
    close = ClientCore.close

    def without(self: ClientCore) -> Any:
        kept, self._messages = self._messages, {}
        effects = close(self)
        self._messages = kept
        return effects

    patch.setattr(ClientCore, "close", without)


def show_no_text(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ClientCore, "text_of", lambda self, turn_id, channel: "")


def swallow_errors(patch: pytest.MonkeyPatch) -> None:
    """Who made a request that was refused never hears of it."""
    patch.setattr(ClientCore, "_on_error", lambda self, frame, now: [])


def swallow_replies(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ClientCore, "_on_accepted", lambda self, frame, now: [])


def swallow_snapshots(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ClientCore, "_on_snapshot", lambda self, snapshot, size: [])


def leave_silently(patch: pytest.MonkeyPatch) -> None:
    async def leave(self: Session) -> None:
        await trio.lowlevel.checkpoint()
        self._finish(SessionClosed("left"))

    patch.setattr(Session, "leave", leave)


BROKEN = {
    leave_silently: "client.leaves",
    lose_inputs: "message.accepted",
    forget_the_cursor: "resume.gapless",
    never_stop: "client.stops-4403",
    ignore_hints: "client.waits-for-the-hint",
    never_repeat: "client.repeats-a-message",
    show_no_text: "abort.turn",
    swallow_errors: "busy.reject",
    swallow_replies: "turn.failed",
    swallow_snapshots: "resync.epoch-changed",
}


async def fails(vector: Vector, broken: Callable[[pytest.MonkeyPatch], None]) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        broken(patch)
        try:
            await run(vector)
        except BaseExceptionGroup as group:
            failure(group)
            return True
    return False


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
async def test_a_broken_client_is_found_out(
    broken: Callable[[pytest.MonkeyPatch], None], autojump_clock: MockClock
) -> None:
    (vector,) = [vector for vector in OF_CLIENTS if vector.id == BROKEN[broken]]
    assert await fails(vector, broken)


@pytest.mark.parametrize("vector", OF_CLIENTS, ids=lambda vector: vector.id)
async def test_each_vector_finds_some_broken_client(vector: Vector, autojump_clock: MockClock) -> None:
    for broken in BROKEN:
        if await fails(vector, broken):
            return
    pytest.fail("no broken client fails it")
