"""PROTOCOL section 3 (and 9), as an outside checker reads it: every clause of the handshake, over a real socket."""

from __future__ import annotations

import json
from contextlib import AsyncExitStack
from typing import Any

import pytest
import trio
from plain_client import Closed, Plain, Rejected, dial, dialled, echo, eventually, gateway_of, hello, joined
from wsproto.events import BytesMessage

from gateway.config import Limits
from gateway.server import Gateway, Identity, unauthorized

HELLO_OK = {
    "type", "protocol", "server", "connection_id", "session_id", "agent_id", "epoch", "resumed", "cursor", "head",
    "oldest_cursor", "resync_required", "resync_reason", "credit", "policy", "features", "presence", "health",
    "last_disconnect",
}  # fmt: skip
HELLO_ERROR = {
    "type", "code", "message", "retryable", "retry_after_ms", "next_step", "server_min_version", "server_max_version",
}  # fmt: skip


async def refused(gateway: Gateway, first: Any = None, **upgrade: Any) -> tuple[dict[str, Any], Closed]:
    """Send a first frame that is refused; return the hello_error and the close."""
    async with dialled(gateway, **upgrade) as client:
        await client.send_text(first if isinstance(first, str) else json.dumps(first or hello()))
        error = await client.recv()
        assert error["type"] == "hello_error", error
        assert set(error) == HELLO_ERROR
        assert error["message"]
        assert error["next_step"]
        closed = await client.until_closed()
        assert client.seen == [error]
        return error, closed


async def test_hello_ok_has_exactly_the_fields_of_the_protocol() -> None:
    async with gateway_of(server={"node": "n7"}) as gateway, joined(gateway, client={"name": "x"}, extra=1) as client:
        ok = client.hello
        limits = Limits()
        assert set(ok) == HELLO_OK
        assert ok["protocol"] == 2
        assert ok["server"]["name"] == "trio-gateway"
        assert ok["server"]["node"] == "n7"
        assert set(ok["server"]) == {"name", "version", "node"}
        assert ok["connection_id"].startswith("c_")
        assert ok["session_id"].startswith("s_")
        assert ok["epoch"].startswith("e_")
        assert ok["agent_id"] == "echo"
        assert (ok["resumed"], ok["cursor"], ok["head"], ok["oldest_cursor"]) == (False, 0, 0, 0)
        assert (ok["resync_required"], ok["resync_reason"]) == (False, None)
        assert ok["credit"] == limits.max_inbox
        assert ok["policy"] == {
            "max_payload": limits.max_payload,
            "max_frame_bytes": limits.max_frame_bytes,
            "max_inbox": limits.max_inbox,
            "max_buffered_bytes": limits.max_buffered_bytes,
            "heartbeat_ms": limits.heartbeat_ms,
            "resume_window_ms": limits.resume_window_ms,
            "max_turn_ms": limits.max_turn_ms,
            "replay_max_events": limits.replay_max_events,
            "replay_max_bytes": limits.replay_max_bytes,
        }
        assert set(ok["features"]["messages"]) == {
            "message", "abort", "answer", "signal", "resync", "refresh", "leave", "ping", "pong",
        }  # fmt: skip
        assert {"input", "delta", "turn_ended", "custom"} <= set(ok["features"]["events"])
        assert ok["features"]["capabilities"] == ["batch"]
        (member,) = ok["presence"]
        assert set(member) == {"connection_id", "subject", "joined_at"}
        assert member["connection_id"] == ok["connection_id"]
        assert ok["health"] == {"status": "ok", "draining": False}
        assert ok["last_disconnect"] is None


async def test_the_highest_common_version_is_chosen() -> None:
    async with gateway_of() as gateway, joined(gateway, protocol_min=1, protocol_max=9) as client:
        assert client.hello["protocol"] == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"protocol_min": 3, "protocol_max": 2},
        {"protocol_min": "2"},
        {"protocol_max": True},
        {"protocol_max": 2.0},
        {"agent_id": None},
        {"agent_id": ""},
        {"agent_id": 7},
        {"since": -1},
        {"since": "0"},
        {"since": True},
        {"since": 1.5},
        {"session_id": ""},
        {"session_id": "a b"},
        {"session_id": "ä"},
        {"session_id": "x" * 129},
        {"session_id": 5},
        {"epoch": 5},
        {"token": 5},
        {"capabilities": "batch"},
        {"client": "me"},
        {"type": "message"},
        {"type": "nonsense"},
        {"type": 7},
    ],
    ids=str,
)
async def test_a_wrong_hello_is_invalid_hello(fields: dict[str, Any]) -> None:
    async with gateway_of() as gateway:
        error, closed = await refused(gateway, hello(**fields))
        assert error["code"] == "invalid_hello"
        assert error["retryable"] is False
        assert (closed.code, closed.reason) == (4400, "invalid_hello")


@pytest.mark.parametrize("name", ["protocol_min", "protocol_max", "agent_id", "type"])
async def test_a_missing_field_is_named(name: str) -> None:
    async with gateway_of() as gateway:
        fields = hello()
        del fields[name]
        error, closed = await refused(gateway, fields)
        assert error["code"] == "invalid_hello"
        assert name in error["message"]
        assert closed.code == 4400


@pytest.mark.parametrize("text", ["", "{", "7", "[]", "null", '"hello"', json.dumps([hello()]), "{} {}", "NaN"])
async def test_a_first_frame_that_is_no_hello(text: str) -> None:
    async with gateway_of() as gateway:
        error, closed = await refused(gateway, text or " ")
        assert error["code"] == "invalid_hello"
        assert closed.code == 4400


@pytest.mark.parametrize("session_id", ["a", "A-Z_a.z:0-9", "x" * 128])
async def test_an_unknown_session_is_created_under_its_id(session_id: str) -> None:
    async with gateway_of() as gateway, joined(gateway, session_id) as client:
        assert client.hello["session_id"] == session_id
        assert client.hello["resumed"] is False
        assert client.hello["resync_required"] is False


async def test_no_common_version() -> None:
    async with gateway_of() as gateway:
        for low, high in ((3, 9), (-5, 0)):
            error, closed = await refused(gateway, hello(protocol_min=low, protocol_max=high))
            assert error["code"] == "protocol_unsupported"
            assert error["server_max_version"] == 2
            assert (closed.code, closed.reason) == (4406, "protocol_unsupported")


async def test_an_unknown_agent() -> None:
    async with gateway_of() as gateway:
        error, closed = await refused(gateway, hello(agent_id="nobody"))
        assert error["code"] == "agent_not_found"
        assert (closed.code, closed.reason) == (4404, "agent_not_found")
        assert "echo" in error["next_step"]


async def test_over_64_kib_is_1009_and_just_under_is_fine() -> None:
    async with gateway_of() as gateway:
        fields = hello(padding="")
        room = 64 * 1024 - len(json.dumps(fields))
        async with dialled(gateway) as client:
            await client.send_text(json.dumps(hello(padding="x" * room)))
            assert (await client.recv())["type"] == "hello_ok"
        async with dialled(gateway) as client:
            await client.send_text(json.dumps(hello(padding="x" * (room + 1))))
            closed = await client.until_closed()
            assert (closed.code, closed.reason) == (1009, "payload_too_large")
            assert client.seen == []


async def test_what_comes_right_behind_a_hello_counts_as_after_it() -> None:
    """A client that does not wait for hello_ok may send a message that only fits after it."""

    async def slowly(token: str | None) -> Identity:
        await trio.sleep(0.05)
        return Identity("alice")

    async with gateway_of(authenticate=slowly) as gateway, dialled(gateway) as client:
        await client.send_text(json.dumps(hello()))
        await client.send("message", request_id="r1", content="x" * 100_000)
        assert (await client.recv())["type"] == "hello_ok"
        assert (await client.until("accepted"))["request_id"] == "r1"


async def test_what_is_sent_before_the_answer_is_bounded() -> None:
    """A socket that has not joined costs no more than its buffers, however much it sends."""
    gate = trio.Event()

    async def later(token: str | None) -> Identity:
        await gate.wait()
        return Identity("alice")

    async with gateway_of(authenticate=later) as gateway, dialled(gateway) as client:
        await client.send_text(json.dumps(hello()))
        sent = 0
        with trio.move_on_after(1):
            while sent < 64 * 1024 * 1024:
                await client.send("ping", nonce="x" * 10_000)
                sent += 10_000
        assert sent < 16 * 1024 * 1024
        gate.set()


async def test_binary_is_1003() -> None:
    async with gateway_of() as gateway:
        async with dialled(gateway) as client:
            await client.send_event(BytesMessage(data=b"{}"))
            assert (await client.until_closed()).code == 1003
        async with joined(gateway) as client:
            await client.send_event(BytesMessage(data=b"{}"))
            assert (await client.until_closed()).code == 1003


async def test_silence_before_hello_is_4408() -> None:
    async with gateway_of(limits={"handshake_timeout_ms": 100}) as gateway, dialled(gateway) as client:
        closed = await client.until_closed()
        assert (closed.code, closed.reason) == (4408, "handshake_timeout")


async def test_an_authenticator_that_hangs_is_4408() -> None:
    async def never(token: str | None) -> Identity:
        await trio.sleep_forever()
        raise AssertionError

    async with gateway_of(limits={"handshake_timeout_ms": 100}, authenticate=never) as gateway:
        async with dialled(gateway) as client:
            await client.send_text(json.dumps(hello()))
            assert (await client.until_closed()).code == 4408


async def test_an_authenticator_that_crashes_ends_that_connection_alone() -> None:
    async def authenticate(token: str | None) -> Identity:
        if token == "crash":
            raise ZeroDivisionError
        return Identity("alice")

    async with gateway_of(authenticate=authenticate) as gateway, joined(gateway) as other:
        error, closed = await refused(gateway, hello(token="crash"))
        assert (error["code"], error["retryable"]) == ("internal", True)
        assert "Zero" not in error["message"]
        assert (closed.code, closed.reason) == (1011, "internal")
        assert gateway.statistics().crashed_connections == 1
        await other.ask("ping", "pong")


async def test_a_second_hello() -> None:
    async with gateway_of() as gateway, joined(gateway) as client:
        await client.send_text(json.dumps(hello()))
        error = await client.until("error")
        assert error["code"] == "already_joined"
        await client.ask("ping", "pong")


# --- where the stream continues --------------------------------------------------------------------------------------


async def conversation(gateway: Gateway, session: str, turns: int = 1) -> dict[str, Any]:
    """Have some turns; return the hello_ok of a connection afterwards."""
    async with joined(gateway, session) as client:
        for _ in range(turns):
            await client.message()
            await client.until("turn_ended")
        await client.ask("leave", "left")
    async with joined(gateway, session) as client:
        return client.hello


async def test_resuming_from_every_cursor_gives_what_follows_it() -> None:
    async with gateway_of() as gateway:
        head = (await conversation(gateway, "s"))["head"]
        for since in range(head + 1):
            async with joined(gateway, "s", since=since) as client:
                ok = client.hello
                assert ok["resumed"] is True
                assert (ok["cursor"], ok["head"], ok["resync_required"]) == (since, head, False)
                seqs = [(await client.recv())["seq"] for _ in range(since, head)]
                assert seqs == list(range(since + 1, head + 1))
                await client.ask("ping", "pong")
                assert not client.taken("snapshot")


async def resync_of(gateway: Gateway, session: str, **fields: Any) -> dict[str, Any]:
    """Join with a cursor that cannot be continued; check the snapshot and return the hello_ok."""
    async with joined(gateway, session, **fields) as client:
        ok = client.hello
        assert ok["resync_required"] is True
        snapshot = await client.recv()
        assert snapshot["type"] == "snapshot", "it comes right after hello_ok"
        assert snapshot["reason"] == ok["resync_reason"]
        assert snapshot["cursor"] == ok["cursor"]
        assert snapshot["epoch"] == ok["epoch"]
        await client.message("after")
        await client.until("turn_ended")
        assert len(client.taken("snapshot")) == 1
        seqs = [frame["seq"] for frame in client.seen if "first" in frame]
        assert seqs[0] == snapshot["cursor"] + 1
        return ok


async def test_reasons_to_resync_and_their_precedence() -> None:
    async with gateway_of(limits={"replay_max_events": 8}) as gateway:
        ok = await conversation(gateway, "s", turns=4)
        head, floor, epoch = ok["head"], ok["oldest_cursor"], ok["epoch"]
        assert floor > 0
        async with joined(gateway, "s", since=floor, epoch=epoch) as client:
            assert client.hello["resync_required"] is False
            assert (await client.recv())["seq"] > floor

        async def reason(session: str = "s", **fields: Any) -> str:
            return str((await resync_of(gateway, session, **fields))["resync_reason"])

        assert await reason(since=floor - 1) == "cursor_expired"
        assert await reason(since=0) == "cursor_expired"
        assert await reason() == "cursor_expired"
        assert await reason(since=head + 10_000) == "cursor_ahead"
        assert await reason(since=head + 10_000, epoch=epoch) == "cursor_ahead"
        assert await reason(since=head, epoch="e_other") == "epoch_changed"
        assert await reason(since=0, epoch="e_other") == "epoch_changed"
        assert await reason(since=head + 10_000, epoch="e_other") == "epoch_changed"
        assert await reason("gone", since=5) == "unknown_session"
        assert await reason("gone-too", since=5, epoch="e_other") == "unknown_session"


async def test_an_unknown_session_with_a_cursor_is_not_resumed() -> None:
    async with gateway_of() as gateway:
        ok = await resync_of(gateway, "s", since=7)
        assert (ok["resumed"], ok["resync_reason"], ok["cursor"], ok["head"]) == (False, "unknown_session", 0, 0)


async def test_a_client_that_connected_and_saw_nothing_can_resume() -> None:
    """DESIGN property 18."""
    async with gateway_of() as gateway:
        async with joined(gateway) as first:
            ok = first.hello
            await first.cut()
        async with joined(gateway, ok, since=0, epoch=ok["epoch"]) as client:
            assert client.hello["resumed"] is True
            assert client.hello["resync_required"] is False
            await client.message()
            await client.until("turn_ended")
            assert next(frame["seq"] for frame in client.seen if "first" in frame) == 1


async def test_last_disconnect() -> None:
    async with gateway_of() as gateway:
        async with joined(gateway, "s") as client:
            await client.ask("leave", "left")
            assert (await client.until_closed()).code == 1000
        async with joined(gateway, "s") as client:
            last = client.hello["last_disconnect"]
            assert (last["code"], last["reason"]) == (1000, "left")
            assert isinstance(last["at"], int)
            await client.cut()
        await eventually(lambda: gateway.statistics().connections == 0)
        async with joined(gateway, "s") as client:
            assert client.hello["last_disconnect"]["code"] == 1006


# --- who may join ----------------------------------------------------------------------------------------------------

ALICE, BOB = "alice-has-a-secret", "bob-has-another-one"
TOKENS = {"tokens": {"alice": ALICE, "bob": BOB}}


async def ok_of(gateway: Gateway, fields: dict[str, Any], **upgrade: Any) -> tuple[dict[str, Any], Plain]:
    client = await dial(gateway, **upgrade)
    await client.send_text(json.dumps(hello(**fields)))
    ok = await client.recv()
    await trio.aclose_forcefully(client.stream)
    assert ok["type"] == "hello_ok", ok
    return ok, client


async def test_the_three_places_of_a_token() -> None:
    async with gateway_of(server=TOKENS) as gateway:
        places: list[tuple[dict[str, Any], dict[str, Any]]] = [
            ({"token": ALICE}, {}),
            ({}, {"headers": [(b"Authorization", b"Bearer " + ALICE.encode())]}),
            ({}, {"headers": [(b"Authorization", b"bearer  " + ALICE.encode())]}),
            ({}, {"subprotocols": [f"bearer.{ALICE}", "trio-gateway"]}),
            ({}, {"subprotocols": ["trio-gateway", f"bearer.{ALICE}"]}),
        ]
        for fields, upgrade in places:
            ok, client = await ok_of(gateway, fields, **upgrade)
            assert ok["presence"][0]["subject"] == "alice"
            assert client.subprotocol == ("trio-gateway" if upgrade.get("subprotocols") else None)
        # Only the token is offered: it is not echoed, whatever the browser makes of that.
        _, client = await ok_of(gateway, {}, subprotocols=[f"bearer.{ALICE}"])
        assert client.subprotocol is None


@pytest.mark.parametrize(
    ("fields", "upgrade"),
    [
        ({}, {}),
        ({"token": "wrong"}, {}),
        ({"token": ""}, {}),
        ({"token": ALICE + "x"}, {}),
        ({"token": "wrong"}, {"headers": [(b"Authorization", b"Bearer " + ALICE.encode())]}),
        ({}, {"headers": [(b"Authorization", b"Basic " + ALICE.encode())]}),
        ({}, {"subprotocols": ["bearer.wrong", "trio-gateway"]}),
        ({}, {"path": f"/ws?token={ALICE}"}),
    ],
    ids=str,
)
async def test_a_wrong_token_is_4401(fields: dict[str, Any], upgrade: dict[str, Any]) -> None:
    async with gateway_of(server=TOKENS) as gateway:
        error, closed = await refused(gateway, hello(**fields), **upgrade)
        assert error["code"] == "unauthorized"
        assert ALICE not in json.dumps(error)
        assert (closed.code, closed.reason) == (4401, "unauthorized")


async def test_knowing_an_id_is_not_enough() -> None:
    """DESIGN property 19."""
    async with gateway_of(server=TOKENS) as gateway, joined(gateway, "private", token=ALICE) as client:
        error, closed = await refused(gateway, hello(session_id="private", token=BOB))
        assert error["code"] == "forbidden"
        assert (closed.code, closed.reason) == (4403, "forbidden")
        await client.ask("ping", "pong")
        assert client.taken("presence") == [], "nobody is told of somebody who did not get in"


async def test_a_grant_lets_another_subject_in() -> None:
    async with gateway_of(server=TOKENS, may_share=lambda subject, record: subject == "bob") as gateway:
        async with joined(gateway, "shared", token=ALICE) as alice, joined(gateway, "shared", token=BOB) as bob:
            assert [member["subject"] for member in bob.hello["presence"]] == ["alice", "bob"]
            await bob.message("from bob")
            assert (await alice.until("input"))["sender"] == "bob"


async def test_presence_fits_into_hello_ok_however_many_have_joined() -> None:
    names = {str(n): f"{n}{chr(1) * 5_000}" for n in range(30)}  # a subject of 30,000 bytes, as JSON

    async def authenticate(token: str | None) -> Identity:
        await trio.lowlevel.checkpoint()
        return Identity(names[token or ""])

    limits = {"max_frame_bytes": 512 * 1024}
    everyone = {"authenticate": authenticate, "may_share": lambda subject, record: True}
    async with gateway_of(limits=limits, **everyone) as gateway, AsyncExitStack() as stack:
        for n in range(30):
            client = await stack.enter_async_context(joined(gateway, "s", token=str(n)))
            seen = [member["subject"] for member in client.hello["presence"]]
            assert seen == [names[str(k)] for k in range(min(n, 8))] + [names[str(n)]]
            assert max(client.sizes) <= 512 * 1024


async def test_a_session_belongs_to_one_agent() -> None:
    async def other(turn: Any) -> str:
        return "other"

    async with gateway_of(echo, other) as gateway, joined(gateway, "s"):
        error, closed = await refused(gateway, hello(session_id="s", agent_id="other"))
        assert (error["code"], closed.code) == ("forbidden", 4403)


async def test_an_expired_identity_is_not_let_in() -> None:
    async def authenticate(token: str | None) -> Identity:
        if token is None:
            raise unauthorized("no token")
        return Identity("alice", expires_at=int(token))

    async with gateway_of(authenticate=authenticate) as gateway:
        for long_ago in ("0", "1000"):
            error, closed = await refused(gateway, hello(token=long_ago))
            assert error["code"] == "unauthorized"
            assert (closed.code, closed.reason) == (4401, "token_expired")


async def test_origins() -> None:
    allowed = {"allowed_origins": ("https://app.example",)}
    async with gateway_of(server=allowed) as gateway:
        host = f"127.0.0.1:{gateway.address[1]}"
        for origin in (b"https://evil.example", b"null", b"http://127.0.0.1:1", b"https://app.example.evil"):
            error, closed = await refused(gateway, headers=[(b"Origin", origin)])
            assert error["code"] == "origin_not_allowed"
            assert (closed.code, closed.reason) == (4403, "origin_not_allowed")
        for origin in (b"https://app.example", b"http://" + host.encode()):
            await ok_of(gateway, {}, headers=[(b"Origin", origin)])
    async with gateway_of(server={"allowed_origins": ("*",)}) as gateway:
        await ok_of(gateway, {}, headers=[(b"Origin", b"https://evil.example")])


# --- admission -------------------------------------------------------------------------------------------------------


async def test_another_path_is_404() -> None:
    async with gateway_of() as gateway:
        with pytest.raises(Rejected) as caught:
            await dial(gateway, path="/other")
        assert caught.value.status == 404
        await ok_of(gateway, {}, path="/ws?anything=1")
    async with gateway_of(server={"path": "/agents"}) as gateway:
        await ok_of(gateway, {}, path="/agents")


async def test_sockets_without_a_hello_are_bounded_by_address_and_in_total() -> None:
    async with gateway_of(limits={"max_pending_handshakes_per_peer": 3}) as gateway:
        async with dialled(gateway), dialled(gateway), dialled(gateway) as third:
            with pytest.raises((Rejected, Closed)):
                await dial(gateway)
            assert gateway.statistics().refused_sockets == 1
            assert gateway.statistics().pending_handshakes == 3
            await third.send_text(json.dumps(hello()))
            await third.until("hello_ok")
            # Whoever has joined does not count any more.
            async with joined(gateway) as fourth:
                await fourth.ask("ping", "pong")
        await eventually(lambda: gateway.statistics().pending_handshakes == 0)


async def test_too_many_connections_is_4429() -> None:
    async with gateway_of(limits={"max_connections": 1}) as gateway, joined(gateway) as client:
        error, closed = await refused(gateway)
        assert error["code"] == "too_many_connections"
        assert error["retryable"] is True
        assert error["retry_after_ms"] > 0
        assert (closed.code, closed.reason) == (4429, "too_many_connections")
        await client.ask("ping", "pong")
    async with gateway_of(limits={"max_connections_per_session": 1}) as gateway, joined(gateway, "s"):
        assert (await refused(gateway, hello(session_id="s")))[1].code == 4429
        await ok_of(gateway, {"session_id": "another"})


async def test_too_many_connections_at_the_same_moment() -> None:
    """The room is counted again after the authenticator, which everyone waited for together."""
    gate = trio.Event()

    async def together(token: str | None) -> Identity:
        await gate.wait()
        return Identity("alice")

    async with gateway_of(limits={"max_connections": 2}, authenticate=together) as gateway:
        clients = [await dial(gateway) for _ in range(5)]
        for client in clients:
            await client.send_text(json.dumps(hello()))
        await eventually(lambda: gateway.statistics().pending_handshakes == 5)
        gate.set()
        answers = [(await client.recv())["type"] for client in clients]
        assert sorted(answers) == ["hello_error"] * 3 + ["hello_ok"] * 2
        for client in clients:
            await trio.aclose_forcefully(client.stream)
