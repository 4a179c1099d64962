"""The gateway has its store purged now and then, and never of what is in use."""

from __future__ import annotations

import json

import trio.testing
from plain_client import Plain, echo, hello

from gateway.config import Config, Limits
from gateway.config import Store as StoreSettings
from gateway.errors import StoreUnavailable
from gateway.server import open_gateway
from gateway.server.gateway import PURGE_EVERY_SECONDS
from gateway.session import Sources
from gateway.store import MemoryStore, Purged, open_store


async def test_what_nobody_uses_goes_and_what_is_in_use_stays(autojump_clock: trio.testing.MockClock) -> None:
    limits = Limits(resume_window_ms=60_000, idle_session_ms=1000, heartbeat_ms=3_600_000)
    sources = Sources(now_ms=lambda: int(trio.current_time() * 1000))
    store = open_store(StoreSettings(url="memory"), limits)
    agents = {"echo": echo}
    async with open_gateway(Config(limits=limits), agents, store=store, sources=sources, listen=False) as gateway:
        clients = []
        for name in ("stays", "goes"):
            client = Plain(gateway.connect())
            await client.upgrade()
            await client.send_text(json.dumps(hello(session_id=name)))
            await client.message()
            await client.until("turn_ended")
            clients.append(client)
        await clients[1].close()
        await trio.sleep(PURGE_EVERY_SECONDS + 1)
        assert (await store.load("goes", max_events=1, max_bytes=1)) is None
        assert (await store.load("stays", max_events=1, max_bytes=1)) is not None
        await clients[0].close()
        await trio.sleep(PURGE_EVERY_SECONDS + 1)
        assert (await store.load("stays", max_events=1, max_bytes=1)) is None


async def test_a_purge_that_fails_is_tried_again(autojump_clock: trio.testing.MockClock) -> None:
    tried = []

    class Failing(MemoryStore):
        async def purge(self, **options: object) -> Purged:  # type: ignore[override]
            tried.append(trio.current_time())
            if len(tried) == 1:
                raise StoreUnavailable("locked by another program")
            return Purged()

    async with open_gateway(Config(), {"echo": echo}, store=Failing(), listen=False):
        await trio.sleep(3 * PURGE_EVERY_SECONDS + 1)
    assert len(tried) == 3
