"""Dialect 1 over a socket, frame by frame: openings, bad input, and a session shared with version 2."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from plain_client import Closed, Frame, Plain, Reader, dialled, ended, follow, gateway_of, joined
from praison_reader import PraisonReader

from gateway import Turn, TurnFailed
from gateway.server import Gateway

HELLO = {"type": "hello", "agent_id": "echo", "protocol_min": 1, "protocol_max": 1}
JOIN = {"type": "join", "agent_id": "echo"}


@asynccontextmanager
async def praison(gateway: Gateway, reader: PraisonReader | None = None, **fields: Any) -> AsyncIterator[Plain]:
    """A joined client of dialect 1. `reader` follows it, when its frames are read with `take`."""
    reader = reader or PraisonReader()
    async with dialled(gateway) as client:
        await client.send_text(json.dumps(reader.opening(**fields)))
        client.hello = await client.recv()
        reader.take(json.dumps(client.hello))
        yield client


async def wrapped(client: Plain, kind: str, **fields: Any) -> Frame:
    """Read on to a wrapped event of a type (with these data), and return its data."""
    while True:
        frame = await client.recv()
        if frame["type"] == "replay" and frame["event"]["type"] == kind:
            data: Frame = frame["event"]["data"]
            if all(data.get(name) == value for name, value in fields.items()):
                return data


async def take(client: Plain, reader: PraisonReader, kind: str) -> None:
    """Have `reader` follow up to the next wrapped event of a type."""
    while True:
        frame = reader.take(json.dumps(await client.recv()))
        if frame["type"] == "replay" and frame["event"]["type"] == kind:
            return


async def slowly(turn: Turn) -> None:
    """Streams until it is stopped."""
    while True:
        await turn.send("x")
        await trio.sleep(0.01)


async def opened(gateway: Gateway, frame: Any, **options: Any) -> Frame:
    """The first answer to a first frame."""
    async with dialled(gateway, **options) as client:
        await client.send_text(json.dumps(frame))
        return await client.recv()


# --- opening ---------------------------------------------------------------------------------------------------------


async def test_hello_and_join() -> None:
    async with gateway_of() as gateway:
        ok = await opened(gateway, HELLO)
        assert (ok["type"], ok["protocol"], ok["resumed"], ok["cursor"], ok["sequence"]) == ("hello_ok", 1, False, 0, 0)
        assert ok["policy"].keys() == {"max_payload", "max_buffered_bytes", "max_queued_frames", "heartbeat_ms"}
        assert {"methods", "events"} == ok["features"].keys()
        answer = await opened(gateway, JOIN | {"session_id": ok["session_id"]})
        assert (answer["type"], answer["protocol_version"], answer["resumed"]) == ("joined", 1, True)
        assert (answer["server_min_version"], answer["server_max_version"]) == (1, 2)
        assert answer["resync_required"] is False


async def test_the_highest_common_version_is_2() -> None:
    async with gateway_of() as gateway:
        assert (await opened(gateway, HELLO | {"protocol_max": 2}))["protocol"] == 2
        assert (await opened(gateway, HELLO | {"protocol_max": 2}))["epoch"]


async def test_a_token_in_the_query_is_for_dialect_1() -> None:
    secret = "the-secret-of-alice-0123456789ab"
    async with gateway_of(server={"tokens": {"alice": secret}}) as gateway:
        path = f"/ws?token={secret}"
        assert (await opened(gateway, HELLO, path=path))["type"] == "hello_ok"
        assert (await opened(gateway, JOIN, path=path))["type"] == "joined"
        refused = await opened(gateway, HELLO | {"protocol_max": 2}, path=path)
        assert (refused["type"], refused["code"]) == ("hello_error", "unauthorized")
        refused = await opened(gateway, HELLO, path="/ws?token=wrong")
        assert (refused["code"], refused["next_step"]) == ("auth_unauthorized", "reauthenticate")
        async with dialled(gateway) as client:
            await client.send_text(json.dumps(HELLO))
            assert (await client.recv())["code"] == "auth_required"
            assert (await client.until_closed()).code == 4401


@pytest.mark.parametrize("opening", [HELLO, JOIN], ids=["hello", "join"])
@pytest.mark.parametrize("fields", [{"since": "abc"}, {"since": -1}, {"session_id": 7}, {"agent_id": 7}], ids=str)
async def test_a_wrong_opening_leaves_the_connection_alive(opening: Frame, fields: Frame) -> None:
    async with gateway_of() as gateway, dialled(gateway) as client:
        for _ in range(3):
            await client.send_text(json.dumps(opening | fields))
            error = await client.recv()
            assert error["code"] in ("invalid_hello", "invalid_protocol_hello")
            assert f"field '{next(iter(fields))}'" in error["message"]
        await client.send_text(json.dumps(opening))
        assert (await client.recv())["type"] in ("hello_ok", "joined")
        await client.send("message", content="hi")
        assert (await wrapped(client, "response", status="final"))["content"] == "echo: hi"


async def test_wrong_openings_are_counted() -> None:
    async with gateway_of() as gateway, dialled(gateway) as client:
        for _ in range(11):
            await client.send_text(json.dumps(HELLO | {"since": "abc"}))
        assert (await client.until_closed()).code == 4400
        assert len(client.seen) == 11


async def test_a_hello_of_no_known_version_is_refused_as_ever() -> None:
    """What cannot be told to be dialect 1 is version 2's: PROTOCOL section 3."""
    async with gateway_of() as gateway:
        for first in (HELLO | {"protocol_max": "x"}, [HELLO], 7):
            async with dialled(gateway) as client:
                await client.send_text(json.dumps(first))
                assert (await client.recv())["code"] == "invalid_hello"
                assert (await client.until_closed()).code == 4400


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("{", "invalid_json"),
        ("", "invalid_json"),
        ('[{"type":"ping"}]', "invalid_frame"),
        ("[]", "invalid_frame"),
        ("7", "invalid_frame"),
        ("{}", "invalid_frame"),
        ('{"type":"message","content":""}', "invalid_frame"),
        ('{"type":"message","content":"  "}', "invalid_frame"),
        ('{"type":"message","content":{"text":"hi"}}', "invalid_frame"),
        ('{"type":"message"}', "invalid_frame"),
        ('{"type":"nonsense"}', "unknown_type"),
        (json.dumps(HELLO | {"since": "abc"}), "already_joined"),
        (json.dumps(HELLO | {"protocol_max": "x"}), "already_joined"),
        (json.dumps(JOIN), "already_joined"),
        ('{"type":"server_reply","request_id":7,"value":"x"}', "invalid_frame"),
    ],
)
async def test_bad_input_is_a_typed_error_and_no_end(text: str, code: str) -> None:
    async with gateway_of() as gateway, praison(gateway) as client:
        await client.send_text(text)
        error = await client.until("error")
        assert error["code"] == code
        assert error["message"]
        await client.send("message", content="hi")
        assert (await wrapped(client, "response", status="final"))["content"] == "echo: hi"


async def test_a_reply_to_no_question() -> None:
    async with gateway_of() as gateway, praison(gateway) as client:
        for request_id in ("nobody", "else"):
            await client.send("server_reply", request_id=request_id, value="x")
            ack = await client.until("server_reply_ack")
            assert (ack["request_id"], ack["status"]) == (request_id, "unknown_request")


async def test_too_much_bad_input_is() -> None:
    async with gateway_of() as gateway, praison(gateway) as client:
        for _ in range(11):
            await client.send_text("{")
        closed = await client.until_closed()
        assert (closed.code, closed.reason) == (1008, "protocol_violation")


async def test_ten_stops_in_a_row() -> None:
    async with gateway_of(slowly) as gateway, praison(gateway) as client:
        await client.send("message", content="go")
        await wrapped(client, "token_stream")
        for _ in range(10):
            await client.send("message", content="/stop")
        answers = []
        while len(answers) < 10:
            frame = await client.recv()
            if frame["type"] in ("aborted", "no_active_turn"):
                answers.append(frame)
        assert answers[0]["type"] == "aborted"
        await client.send("ping")
        await client.until("pong")
        assert not client.taken("error")
        ends = [f for f in client.seen if f["type"] == "replay" and f["event"]["type"] == "stream_end"]
        assert len(ends) == 1


async def test_a_cursor_ahead_of_the_head_is_a_resync() -> None:
    async with gateway_of() as gateway:
        async with joined(gateway) as other:
            await other.message("hi")
            await other.until("turn_ended")
            head = other.seen[-1]["seq"]
            for opening in (HELLO, JOIN):
                fields = {"session_id": other.hello["session_id"], "since": head + 1000}
                async with dialled(gateway) as client:
                    await client.send_text(json.dumps(opening | fields))
                    answer = await client.recv()
                    assert answer["resync_required"] is True
                    assert answer["cursor"] == answer["sequence"] == head
                    state = (await client.until("snapshot"))["state"]
                    assert state["event_cursor"] == head
                    assert [message["content"] for message in state["messages"]][:2] == ["hi", "echo: hi"]
                    await client.send("message", content="more")
                    assert (await wrapped(client, "response", status="accepted"))["cursor"] == head + 1
                    head = (await wrapped(client, "stream_end"))["cursor"]


async def test_an_expired_cursor_is_a_resync_with_what_goes_on() -> None:
    gate = trio.Event()

    async def asks(turn: Turn) -> str:
        if turn.input.content != "ask":
            return "x" * 100
        await turn.send("thinking")
        await turn.ask("approval", "Sure?")
        await turn.send(" more")
        await gate.wait()
        return "thinking more, done"

    async with gateway_of(asks, limits={"replay_max_events": 8}) as gateway:
        reader = PraisonReader()
        async with praison(gateway, reader) as client:
            for _ in range(4):
                await client.send("message", content="hi")
                await take(client, reader, "stream_end")
            await client.send("message", content="ask")
            await take(client, reader, "server_request")
        reader.cursor = 1
        async with praison(gateway, reader) as client:
            assert client.hello["resync_required"] is True
            assert client.hello["oldest_cursor"] > 1
            snapshot = await client.until("snapshot")
            assert snapshot["state"]["events"][-1]["data"]["content"] == "thinking"
            request = (await client.until("server_request"))["request"]
            assert request["prompt"] == "Sure?"
            await client.send("server_reply", request_id=request["request_id"], value="allow")
            await take(client, reader, "token_stream")
            gate.set()
            await take(client, reader, "stream_end")
            assert reader.gaps == []
            (final,) = (data for finals in list(reader.finals.values())[4:] for data in finals)
            assert final["content"] == "thinking more, done"


# --- one session, both versions --------------------------------------------------------------------------------------


async def test_clients_of_both_versions_share_a_session() -> None:
    gate = trio.Event()

    async def agent(turn: Turn) -> None:
        for n in range(40):
            await turn.send(f"{n} ")
            if n == 20:
                await gate.wait()

    async with gateway_of(agent) as gateway, joined(gateway) as native:
        old, new = PraisonReader(), Reader()
        async with praison(gateway, old, session_id=native.hello["session_id"]) as client:
            await client.send("message", content="hi", request_id="r")
            await take(client, old, "token_stream")
        gate.set()
        await follow(native, new, ended)
        async with praison(gateway, old) as client:
            assert client.hello["cursor"] == client.hello["sequence"] == old.cursor
            await take(client, old, "stream_end")
            (turn_id,) = old.finals
            text = new.text(turn_id)
            assert old.tokens[turn_id, "answer"] == old.finals[turn_id][0]["content"] == text
            assert old.gaps == []
            await native.send("message", request_id="r", content="hi")
            assert (await native.until("accepted"))["duplicate"] is True
            await client.send("message", content="hi", request_id="r")
            assert (await client.until("response"))["status"] == "duplicate"
            await client.send("message", content="other", request_id="r")
            assert (await client.until("error"))["code"] == "request_id_conflict"
            assert not client.taken("presence")
            await client.send("leave")
            assert (await client.until("left"))["session_id"] == native.hello["session_id"]
            with pytest.raises(Closed, match="1000"):
                await client.recv()
            assert (await native.until("presence"))["event"] in ("joined", "left")


async def test_what_has_left_memory_is_read_from_the_store() -> None:
    """A client that starts at the beginning of a long session: page by page, everything once."""

    async def long(turn: Turn) -> None:
        for n in range(40):
            await turn.send(f"{turn.input.content}.{n} " + "x" * 1000)

    limits = {"tail_max_bytes": 65_536, "segment_bytes": 16_384}
    async with gateway_of(long, limits=limits) as gateway:
        async with joined(gateway) as native:
            reader = Reader()
            for n in range(8):
                await native.message(str(n))
                await follow(native, reader, ended)
            assert gateway.registry.sessions[native.hello["session_id"]].log.tail > 0
            old = PraisonReader()
            async with praison(gateway, old, session_id=native.hello["session_id"]) as client:
                for _ in range(8):
                    await take(client, old, "stream_end")
            assert old.gaps == old.repeated == []
            assert len(old.finals) == 8
            for turn_id, finals in old.finals.items():
                assert "".join(final["content"] for final in finals) == reader.text(turn_id)
                assert old.tokens[turn_id, "answer"] == reader.text(turn_id)


async def test_an_agent_that_fails() -> None:
    async def fails(turn: Turn) -> None:
        raise TurnFailed("quota", "No credit left.")

    async with gateway_of(fails) as gateway, praison(gateway) as client:
        await client.send("message", content="hi")
        assert (await wrapped(client, "error"))["code"] == "quota"
        assert (await wrapped(client, "response", status="final"))["outcome"]["error"]["code"] == "quota"
