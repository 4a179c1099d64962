"""PROTOCOL section 8, liveness, and tokens that expire or are refreshed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest
import trio
from plain_client import Frame, Plain, dialled, eventually, gateway_of, hello, joined
from wsproto.events import Ping, Pong

from gateway.server import Identity, unauthorized

pytestmark = pytest.mark.usefixtures("line")  # each with and without TLS

BEAT = {"heartbeat_ms": 100}


def now_ms() -> int:
    return time.time_ns() // 1_000_000


async def test_the_gateway_pings_after_silence_and_text_keeps_the_line() -> None:
    # Three beats of silence would be too much; each pong has two to arrive in.
    async with gateway_of(limits={"heartbeat_ms": 300}) as gateway, joined(gateway) as client:
        for _ in range(4):
            assert await client.until("ping") == {"type": "ping", "nonce": None}
            await client.send("pong")
        assert gateway.statistics().closes == {}


async def test_silence_is_4408() -> None:
    async with gateway_of(limits=BEAT) as gateway, dialled(gateway) as client:
        started = trio.current_time()
        await client.send_text(json.dumps(hello()))
        closed = await client.until_closed()
        assert (closed.code, closed.reason) == (4408, "heartbeat_timeout")
        assert trio.current_time() - started >= 0.2
        assert gateway.statistics().closes == {"4408 heartbeat_timeout": 1}


async def test_a_late_hello_is_a_sign_of_life_too() -> None:
    async with gateway_of(limits=BEAT) as gateway, dialled(gateway) as client:
        await trio.sleep(0.3)
        await client.send_text(json.dumps(hello()))
        await client.until("hello_ok")
        await client.until("ping")
        await client.ask("ping", "pong")


async def test_websocket_pings_and_pongs_are_no_sign_of_life() -> None:
    async with gateway_of(limits=BEAT) as gateway, joined(gateway) as client:

        async def chatter() -> None:
            try:
                while True:
                    await client.send_event(Pong())
                    await client.send_event(Ping())
                    await trio.sleep(0.02)
            except Exception:  # closed while it was sending
                return

        async with trio.open_nursery() as nursery:
            nursery.start_soon(chatter)
            closed = await client.until_closed()
            assert (closed.code, closed.reason) == (4408, "heartbeat_timeout")
            nursery.cancel_scope.cancel()


async def test_what_the_gateway_sends_is_no_sign_of_life_but_any_text_frame_is() -> None:
    async def talker(turn: object) -> None:
        while True:
            await turn.send("x")  # type: ignore[attr-defined]
            await trio.sleep(0.01)

    async with gateway_of(talker, limits=BEAT) as gateway:
        async with joined(gateway) as client:
            await client.message()
            assert (await client.until_closed()).code == 4408
            assert len(client.taken("delta")) > 3, "we were not silent"
        async with joined(gateway) as client:
            for n in range(25):
                await client.send_text("not even json" if n < 10 else '{"type":"pong"}')
                await trio.sleep(0.02)
            await client.ask("ping", "pong")


# --- tokens ----------------------------------------------------------------------------------------------------------


async def by_json(token: str | None) -> Identity:
    """Tokens are ``{"subject":…, "expires_at":…}``."""
    if token is None or not token.startswith("{"):
        raise unauthorized("no such token")
    return Identity(**json.loads(token))


def token(subject: str = "alice", expires_in: int | None = None, at: Callable[[], int] = now_ms) -> str:
    return json.dumps({"subject": subject, "expires_at": None if expires_in is None else at() + expires_in})


async def refresh(client: Plain, new: str) -> Frame:
    await client.send("refresh", token=new)
    while (frame := await client.recv())["type"] not in ("refreshed", "error"):
        pass
    return frame


async def test_a_token_that_expires_is_4401() -> None:
    async with gateway_of(authenticate=by_json, limits=BEAT) as gateway:
        async with joined(gateway, token=token(expires_in=150)) as client:
            closed = await client.until_closed()
            assert (closed.code, closed.reason) == (4401, "token_expired")


async def test_a_refresh_moves_the_end() -> None:
    async with gateway_of(authenticate=by_json, limits={"heartbeat_ms": 1000}) as gateway:
        async with joined(gateway, token=token(expires_in=600)) as client:
            later = token(expires_in=1200)
            assert await refresh(client, later) == {
                "type": "refreshed",
                "expires_at": json.loads(later)["expires_at"],
            }
            assert await refresh(client, later) == {
                "type": "refreshed",
                "expires_at": json.loads(later)["expires_at"],
            }, "the same again, by a client that did not see the answer"
            assert await refresh(client, token(expires_in=None)) == {"type": "refreshed", "expires_at": None}
            with trio.move_on_after(1.3):
                while True:
                    await client.recv()
            await client.ask("ping", "pong")


async def test_refreshes_that_are_rejected() -> None:
    async with gateway_of(authenticate=by_json) as gateway:
        async with joined(gateway, token=token(expires_in=60_000)) as client:
            for new in (
                "nonsense",
                "",
                token("bob", 120_000),
                token("bob"),
                token(expires_in=1000),
                token(expires_in=-5),
            ):
                error = await refresh(client, new)
                assert (error["type"], error["code"]) == ("error", "token_rejected"), new
            await client.ask("ping", "pong")
        async with joined(gateway, token=token()) as client:
            assert (await refresh(client, token(expires_in=1000)))["code"] == "token_rejected"


async def test_a_refresh_is_answered_whatever_the_authenticator_does_and_nobody_waits_for_it() -> None:
    gate = trio.Event()

    async def authenticate(value: str | None) -> Identity:
        if value == "crash":
            raise ZeroDivisionError
        if value == "hang":
            await trio.sleep_forever()
        if value == "slow":
            await gate.wait()
        return Identity("alice")

    async with gateway_of(authenticate=authenticate, limits={"handshake_timeout_ms": 300}) as gateway:
        async with joined(gateway) as client:
            error = await refresh(client, "crash")
            assert (error["code"], error["retryable"]) == ("unavailable", True)
            await client.send("refresh", token="slow")
            await client.ask("ping", "pong")
            assert (await refresh(client, "fine"))["code"] == "rate_limited"
            gate.set()
            await client.until("refreshed")
            assert (await refresh(client, "hang"))["code"] == "unavailable"
            assert (await refresh(client, "fine"))["type"] == "refreshed"


async def test_a_refresh_whose_connection_is_gone() -> None:
    gate = trio.Event()

    async def authenticate(value: str | None) -> Identity:
        if value == "slow":
            await gate.wait()
        return Identity("alice")

    async with gateway_of(authenticate=authenticate) as gateway:
        async with joined(gateway) as client:
            await client.send("refresh", token="slow")
            await client.ask("ping", "pong")
            await client.cut()
        await eventually(lambda: gateway.statistics().connections == 0)
        gate.set()
        async with joined(gateway) as client:
            await client.ask("ping", "pong")


async def test_a_token_in_the_url_is_of_no_use_to_version_2() -> None:
    async with gateway_of(authenticate=by_json) as gateway, dialled(gateway, path="/ws?token=%7B%7D") as client:
        await client.send_text(json.dumps(hello()))
        assert (await client.until_closed()).code == 4401
