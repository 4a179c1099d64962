"""PROTOCOL sections 4 to 6: every frame a client can send, every error code, and the exact shapes of the answers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio
from plain_client import Plain, Reader, dialled, ended, eventually, follow, gateway_of, hello, joined

from gateway import Turn
from gateway.errors import TurnFailed
from gateway.protocol import codec


class Gate:
    """An agent that says when it runs, and ends when it is told to."""

    def __init__(self) -> None:
        self.running = 0
        self.open = trio.Event()

    async def __call__(self, turn: Turn) -> str:
        self.running += 1
        try:
            await self.open.wait()
        finally:
            self.running -= 1
        return f"done: {turn.input.content}"


async def error_of(client: Plain, type: str, **fields: Any) -> dict[str, Any]:
    return await client.ask(type, "error", **fields)


async def test_a_turn_from_message_to_end() -> None:
    async def agent(turn: Turn) -> str:
        await turn.reason("hm")
        await turn.progress("steps", {"n": 1})
        call = await turn.tool_call("search", {"q": "x"}, "call_1")
        await turn.tool_result(call, {"hits": 0})
        await turn.update_state({"topic": "x"})
        await turn.custom("mine", [1])
        assert await turn.ask("choice", "Which?", ["a", "b"], timeout=60) == "b"
        await turn.send("str")
        await turn.send("eamed")
        return "final"

    async with gateway_of(agent) as gateway, joined(gateway) as client:
        accepted = await client.ask(
            "message", "accepted", request_id="r1", content="go", metadata={"k": [1, None]}, unknown="field"
        )
        assert accepted == {
            "type": "accepted", "request_id": "r1", "seq": 1, "queued": 0, "duplicate": False, "durable": False,
            "credit": 256 - 1,
        } | {"credit": accepted["credit"]}  # fmt: skip
        ask = await client.until("ask")
        answered = await client.ask("answer", "answer_ok", ask_id=ask["ask_id"], value="b")
        assert answered == {"type": "answer_ok", "ask_id": ask["ask_id"]}
        await client.until("turn_ended")
        events = {frame["type"]: frame for frame in client.seen if "first" in frame and frame["type"] != "output"}
        fields = {
            "input": {"request_id", "content", "metadata", "sender"},
            "turn_started": {"turn_id", "request_ids", "attempt"},
            "delta": {"turn_id", "channel", "text"},
            "progress": {"turn_id", "key", "data"},
            "tool_call": {"turn_id", "call_id", "name", "arguments"},
            "tool_result": {"turn_id", "call_id", "result", "is_error"},
            "ask": {"turn_id", "ask_id", "kind", "prompt", "options", "timeout_ms"},
            "answered": {"turn_id", "ask_id", "value", "by", "outcome"},
            "turn_ended": {"turn_id", "outcome", "error"},
            "state": {"patch"},
        }
        for kind, names in fields.items():
            assert set(events[kind]) == names | {"type", "seq", "first", "at"}, kind
        assert events["input"]["metadata"] == {"k": [1, None]}
        assert (ask["kind"], ask["options"], ask["timeout_ms"]) == ("choice", ["a", "b"], 60_000)
        assert (events["answered"]["value"], events["answered"]["outcome"]) == ("b", "answered")
        assert events["answered"]["by"] == client.hello["connection_id"]
        assert events["state"]["patch"] == {"topic": "x"}
        assert events["custom"]["data"] == [1]
        outputs = {frame["channel"]: frame for frame in client.taken("output")}
        assert set(outputs["answer"]) == {
            "type", "seq", "first", "at", "turn_id", "channel", "content", "metadata"
        }  # fmt: skip
        assert outputs["answer"]["content"] == "final"
        assert outputs["reasoning"]["content"] == "hm"
        assert (events["turn_ended"]["outcome"], events["turn_ended"]["error"]) == ("completed", None)
        story = Reader()
        for frame in client.seen:
            story.take(frame)


async def test_accepted_comes_before_the_turn_that_takes_the_input() -> None:
    async with gateway_of() as gateway, joined(gateway) as client:
        for n in range(20):
            await client.send("message", request_id=f"r{n}", content="x")
        for _ in range(20):
            await client.until("turn_ended")
        order = [(frame["type"], frame.get("request_id") or frame.get("request_ids")) for frame in client.seen]
        for n in range(20):
            assert order.index(("accepted", f"r{n}")) < order.index(("turn_started", [f"r{n}"]))


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("{", "invalid_json"),
        ("", "invalid_json"),
        ('{"type":"ping","type":"pong"}', "invalid_json"),
        ('{"type":"message","request_id":"\\ud800","content":""}', "invalid_json"),
        ('{"type":"ping","nonce":NaN}', "invalid_json"),
        ('{"type":"ping","nonce":1e999}', "invalid_json"),
        ('{"type":"ping","nonce":' + "9" * 40 + "}", "invalid_json"),
        ('{"type":"ping","nonce":' + "[" * 300 + "]" * 300 + "}", "invalid_json"),
        ("7", "invalid_frame"),
        ("null", "invalid_frame"),
        ("{}", "invalid_frame"),
        ('{"type":7}', "invalid_frame"),
        ('{"type":"nonsense"}', "unknown_type"),
        ('{"type":"hello_ok"}', "unknown_type"),
        ('{"type":"message","content":"x"}', "invalid_frame"),
        ('{"type":"message","request_id":"","content":"x"}', "invalid_frame"),
        ('{"type":"message","request_id":"' + "x" * 129 + '","content":"x"}', "invalid_frame"),
        ('{"type":"message","request_id":7,"content":"x"}', "invalid_frame"),
        ('{"type":"message","request_id":"r","content":7}', "invalid_frame"),
        ('{"type":"message","request_id":"r","content":"x","metadata":[]}', "invalid_frame"),
        ('{"type":"message","request_id":"r","content":"x","on_busy":"later"}', "invalid_frame"),
        ('{"type":"abort","scope":"everything"}', "invalid_frame"),
        ('{"type":"abort","turn_id":"' + "x" * 200 + '"}', "invalid_frame"),
        ('{"type":"answer","ask_id":"a"}', "invalid_frame"),
        ('{"type":"answer","ask_id":"' + "x" * 200 + '","value":1}', "invalid_frame"),
        ('{"type":"signal"}', "invalid_frame"),
        ('{"type":"signal","name":"x","data":"' + "x" * 20_000 + '"}', "invalid_frame"),
        ('{"type":"ping","nonce":"' + "x" * 20_000 + '"}', "invalid_frame"),
        ('{"type":"refresh"}', "invalid_frame"),
        ('{"type":"refresh","token":7}', "invalid_frame"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else None,
)
async def test_a_wrong_frame_gets_a_typed_error_and_the_connection_stays(text: str, code: str) -> None:
    async with gateway_of() as gateway, joined(gateway) as client:
        await client.send_text(text)
        error = await client.until("error")
        assert error["code"] == code
        assert isinstance(error["message"], str)
        assert error["retryable"] is False
        assert set(error) <= {"type", "code", "message", "retryable", "request_id"}
        assert len(json.dumps(error)) < 1000
        await client.ask("ping", "pong")


async def test_an_error_names_the_message_it_belongs_to() -> None:
    async with gateway_of() as gateway, joined(gateway) as client:
        error = await error_of(client, "message", request_id="mine", content=7)
        assert error["request_id"] == "mine"
        assert "content" in error["message"]


@pytest.mark.parametrize("batched", [False, True])
async def test_the_eleventh_protocol_error_is_1008(batched: bool) -> None:
    async with gateway_of() as gateway, joined(gateway) as client:
        bad = ["{}", "[7]", '{"type":"nonsense"}', json.dumps(hello()), "{"]
        for n in range(10):
            await client.send_text(bad[n % 5])
        for _ in range(10):
            await client.until("error")
        for kind, fields in (("abort", {}), ("answer", {"ask_id": "a", "value": 1})):
            await error_of(client, kind, **fields)  # refused, but nothing is wrong with the frames
        await client.send_text("[]")
        await client.ask("ping", "pong")
        await client.send_text('[{"type":"x"},{"type":"x"},{"type":"ping","nonce":"never"}]' if batched else "{}")
        closed = await client.until_closed()
        assert (closed.code, closed.reason) == (1008, "protocol_violation")
        assert client.seen[-1]["type"] == "error", "the eleventh is answered too"
        assert not [frame for frame in client.taken("pong") if frame["nonce"] == "never"]


async def test_an_array_is_handled_in_order_and_a_bad_member_spoils_nothing() -> None:
    async with gateway_of() as gateway, joined(gateway, capabilities=["batch"]) as client:
        members = [
            {"type": "ping", "nonce": 1}, 7, {"type": "ping", "nonce": {"a": [2]}}, {"type": "x"}, [],
            {"type": "message", "request_id": "r", "content": "x"}, {"type": "ping", "nonce": None},
        ]  # fmt: skip
        await client.send_text(json.dumps(members))
        await client.until("turn_ended")
        replies = [
            (frame["type"], frame.get("nonce", frame.get("code")))
            for frame in client.seen
            if frame["type"] in ("pong", "error")
        ]
        assert replies == [
            ("pong", 1), ("error", "invalid_frame"), ("pong", {"a": [2]}), ("error", "unknown_type"),
            ("error", "invalid_frame"), ("pong", None),
        ]  # fmt: skip


async def test_a_huge_array_does_not_hold_up_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """DESIGN property 20: half a million members in one message of 1 MiB are a second or ten of work as a whole."""
    read, looked_at = codec._read, 0

    def count(*args: Any) -> Any:
        nonlocal looked_at
        looked_at += 1
        return read(*args)

    monkeypatch.setattr(codec, "_read", count)
    async with gateway_of() as gateway, joined(gateway) as client, joined(gateway) as other:
        await client.send_text("[" + ",".join(["0"] * 500_000) + "]")
        closed = await client.until_closed()
        assert closed.code == 1008
        assert len(client.taken("error")) == 11
        assert looked_at < 100, "nobody looks at what comes after the eleventh"
        # 60,000 that are valid: answered or closed for, while others are served in between.
        async with joined(gateway) as third:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(third.send_text, "[" + ",".join(['{"type":"ping"}'] * 60_000) + "]")
                for _ in range(20):
                    await other.ask("ping", "pong")
                assert len(third.taken("pong")) == 0
                for _ in range(60_000):
                    await third.until("pong")


async def test_abort_codes() -> None:
    gate = Gate()
    async with gateway_of(gate) as gateway, joined(gateway) as client:
        assert (await error_of(client, "abort"))["code"] == "no_active_turn"
        assert (await error_of(client, "abort", turn_id="t_x"))["code"] == "no_active_turn"
        unknown = await error_of(client, "abort", request_id="r_x")
        assert (unknown["code"], unknown["request_id"]) == ("unknown_request", "r_x")
        for scope in ("queue", "all"):
            assert await client.ask("abort", "aborted", scope=scope) == {
                "type": "aborted",
                "turn_id": None,
                "withdrawn": [],
            }
        await client.message("first", "r1")
        started = await client.until("turn_started")
        await client.message("second", "r2")
        third = await client.message("third", "r3")
        assert third["queued"] == 1
        assert (await client.ask("abort", "aborted", request_id="r2")) == {
            "type": "aborted",
            "turn_id": None,
            "withdrawn": ["r2"],
        }
        withdrawn = (client.taken("withdrawn") or [await client.until("withdrawn")])[-1]
        assert (withdrawn["request_id"], withdrawn["reason"]) == ("r2", "aborted")
        assert (await error_of(client, "abort", turn_id="t_other"))["code"] == "no_active_turn"
        aborted = await client.ask("abort", "aborted", scope="all")
        assert aborted == {"type": "aborted", "turn_id": started["turn_id"], "withdrawn": ["r3"]}
        await client.ask("ping", "pong")
        (end,) = client.taken("turn_ended") or [await client.until("turn_ended")]
        assert end["outcome"] == "aborted"
        assert len(client.taken("turn_started")) == 1
        assert gate.running == 0


async def test_answers() -> None:
    values: list[Any] = []

    async def agent(turn: Turn) -> None:
        values.append(await turn.ask("approval", "Sure?"))
        values.append(await turn.ask("input", "Name?"))

    async with gateway_of(agent) as gateway, joined(gateway) as client, joined(gateway, client.hello) as other:
        assert (await error_of(client, "answer", ask_id="a_x", value=True))["code"] == "unknown_ask"
        await client.message()
        ask = await client.until("ask")
        for wrong in ("yes", 1, None, {}):
            assert (await error_of(client, "answer", ask_id=ask["ask_id"], value=wrong))["code"] == "invalid_frame"
        async with joined(gateway, client.hello, since=10**6) as late:
            snapshot = await late.until("snapshot")
            assert [item["ask_id"] for item in snapshot["asks"]] == [ask["ask_id"]]
        await other.ask("answer", "answer_ok", ask_id=ask["ask_id"], value=False)
        assert (await client.until("answered"))["by"] == other.hello["connection_id"]
        assert (await error_of(client, "answer", ask_id=ask["ask_id"], value=True))["code"] == "unknown_ask"
        ask = client.taken("ask")[-1] if len(client.taken("ask")) == 2 else await client.until("ask")
        await client.ask("answer", "answer_ok", ask_id=ask["ask_id"], value="Ada")
        await client.until("turn_ended")
        assert values == [False, "Ada"]


async def test_signals_and_presence_reach_the_others_only() -> None:
    async with gateway_of() as gateway, joined(gateway) as one:
        async with joined(gateway, one.hello) as two:
            came = await one.until("presence")
            assert came == {
                "type": "presence",
                "event": "joined",
                "connection_id": two.hello["connection_id"],
                "subject": "anonymous",
            }
            await two.send("signal", name="typing", data={"on": True})
            signal = await one.until("signal")
            assert set(signal) == {"type", "name", "data", "from"}
            assert (signal["name"], signal["data"]) == ("typing", {"on": True})
            assert signal["from"]["connection_id"] == two.hello["connection_id"]
            await two.ask("ping", "pong")
            assert not two.taken("signal")
            assert await two.ask("leave", "left") == {"type": "left"}
            assert (await two.until_closed()).code == 1000
        assert (await one.until("presence"))["event"] == "left"


async def test_a_burst_of_signals_reaches_a_client_that_keeps_up() -> None:
    async with gateway_of() as gateway, joined(gateway) as one, joined(gateway, one.hello) as two:
        await two.send_text(json.dumps([{"type": "signal", "name": "n", "data": n} for n in range(500)]))
        assert [(await one.until("signal"))["data"] for _ in range(500)] == list(range(500))
        assert gateway.statistics().dropped_frames == 0


async def test_idempotency_keys() -> None:
    gate = Gate()
    async with gateway_of(gate, limits={"max_inbox": 1}) as gateway, joined(gateway) as client:
        first = await client.message("one", "r1", metadata={"a": 1, "b": 2})
        await client.until("turn_started")
        again = await client.message("one", "r1", metadata={"b": 2, "a": 1}, on_busy="reject")
        assert (again["duplicate"], again["seq"]) == (True, first["seq"])
        conflict = await error_of(client, "message", request_id="r1", content="other")
        assert (conflict["code"], conflict["request_id"], conflict["retryable"]) == ("request_id_conflict", "r1", False)
        assert (await error_of(client, "message", request_id="r1", content="one"))["code"] == "request_id_conflict"
        busy = await error_of(client, "message", request_id="r0", content="x", on_busy="reject")
        assert (busy["code"], busy["retryable"]) == ("busy", True)
        await client.message("two", "r2")
        full = await error_of(client, "message", request_id="r3", content="three")
        assert (full["code"], full["credit"], full["request_id"], full["retryable"]) == ("inbox_full", 0, "r3", True)
        assert full["retry_after_ms"] > 0
        assert (await client.message("two", "r2"))["duplicate"] is True, "looked up before full"
        gate.open.set()
        assert (await client.until("credit")) == {"type": "credit", "credit": 1}
        await client.message("three", "r3")
        await eventually(lambda: gateway.statistics().turns == 0 and gateway.statistics().queued_inputs == 0)
        await client.ask("ping", "pong")
        assert [frame["content"] for frame in client.taken("input")] == ["one", "two", "three"]


async def test_two_connections_with_the_same_message() -> None:
    async with gateway_of() as gateway, joined(gateway) as one, joined(gateway, one.hello) as two:
        async with trio.open_nursery() as nursery:
            for client in (one, two):
                nursery.start_soon(client.message, "x", "r")
        await one.until("turn_ended") if not one.taken("turn_ended") else None
        accepted = one.taken("accepted") + two.taken("accepted")
        assert sorted(frame["duplicate"] for frame in accepted) == [False, True]
        assert len({frame["seq"] for frame in accepted}) == 1


async def test_interrupt_steer_and_collect() -> None:
    gate = Gate()
    steered: list[str] = []

    async def agent(turn: Turn) -> str:
        if turn.input.content == "steerable":
            while not (taken := turn.steered()):  # noqa: ASYNC110
                await trio.sleep(0.001)
            steered.extend(item.content for item in taken)
            return "steered"
        if turn.input.content == "now":
            return "at once"
        return await gate(turn) + f" {len(turn.inputs)}"

    async with gateway_of(agent) as gateway, joined(gateway) as client:
        await client.message("steerable", "s1")
        await client.until("turn_started")
        await client.message("this way", "s2", on_busy="steer")
        await client.until("turn_ended")
        assert steered == ["this way"]
        assert client.taken("withdrawn")[-1]["reason"] == "steered"
        await client.message("long", "l1")
        await client.until("turn_started", request_ids=["l1"])
        await client.message("c", "c1", on_busy="collect")
        await client.message("c", "c2", on_busy="collect")
        await client.message("now", "n1", on_busy="interrupt")
        assert (await client.until("turn_ended"))["outcome"] == "interrupted"
        assert (await client.until("turn_started"))["request_ids"] == ["n1"]
        assert (await client.until("turn_started"))["request_ids"] == ["c1", "c2"]
        gate.open.set()
        assert (await client.until("output"))["content"] == "done: c 2"


async def test_the_ends_of_turns() -> None:
    async def agent(turn: Turn) -> None:
        await turn.send("partial text")
        if turn.input.content == "fail":
            raise TurnFailed("rate_limited", "slow down", retryable=True)
        if turn.input.content == "crash":
            raise RuntimeError("secret detail")
        if turn.input.content == "long":
            raise TurnFailed("upstream", "x" * 2_000_000)
        await trio.sleep_forever()

    async with gateway_of(agent, limits={"max_turn_ms": 200}) as gateway, joined(gateway) as client:
        ends = {}
        for content in ("fail", "crash", "slow", "long"):
            await client.message(content)
            output = await client.until("output")
            assert (output["content"], output["metadata"]) == ("partial text", {"partial": True})
            ends[content] = await client.until("turn_ended")
        assert ends["fail"]["outcome"] == "failed"
        assert ends["fail"]["error"] == {"code": "rate_limited", "message": "slow down", "retryable": True}
        assert ends["crash"]["outcome"] == "failed"
        assert "secret" not in json.dumps(ends["crash"])
        assert ends["slow"]["outcome"] == "timed_out"
        assert ends["long"]["error"]["code"] == "upstream"
        assert max(client.sizes) <= client.hello["policy"]["max_frame_bytes"]


async def test_resync_gives_one_snapshot_then_what_follows() -> None:
    gate = Gate()
    async with gateway_of(gate) as gateway, joined(gateway) as client:
        await client.message("one", "r1")
        await client.until("turn_started")
        await client.message("two", "r2")
        snapshot = await client.ask("resync", "snapshot")
        assert set(snapshot) == {
            "type", "epoch", "cursor", "reason", "state", "transcript", "transcript_truncated", "turn", "queue", "asks",
        }  # fmt: skip
        assert snapshot["reason"] == "requested"
        assert set(snapshot["turn"]) == {"turn_id", "request_ids", "channels", "progress", "started_at"}
        assert snapshot["queue"] == [{"request_id": "r2", "seq": client.taken("accepted")[-1]["seq"]}]
        gate.open.set()
        await client.until("turn_ended")
        seqs = [frame["seq"] for frame in client.seen[client.seen.index(snapshot) :] if "first" in frame]
        assert seqs[0] == snapshot["cursor"] + 1


# --- sizes -----------------------------------------------------------------------------------------------------------

MIB = 1024 * 1024


def of_size(size: int, fields: dict[str, Any], name: str, piece: str = "x") -> str:
    room = size - len(json.dumps({**fields, name: ""}, ensure_ascii=False).encode())
    return json.dumps({**fields, name: piece * (room // len(piece.encode()))}, ensure_ascii=False)


async def test_a_frame_over_max_payload_is_1009_and_no_frame_of_ours_is_over_max_frame_bytes() -> None:
    async with gateway_of() as gateway:
        message = {"type": "message", "request_id": "r" * 128}
        bare = {**message, "content": ""}
        for text in (
            of_size(MIB, message, "content"),
            of_size(MIB // 2, message, "content", '"'),
            of_size(MIB // 6, message, "content", "\x01"),
            of_size(MIB, message, "content", "ä€😀"),
            of_size(MIB - 10, bare, "metadata").replace('"metadata": "', '"metadata": {"k": "')[:-1] + "}}",
            json.dumps(bare)[:-1] + ',"metadata":{"x":[' + "1e15," * 190_000 + "1]}}",
        ):
            assert len(text.encode()) <= MIB
            async with joined(gateway) as client:
                await client.send_text(text)
                while client.seen[-1]["type"] not in ("turn_ended", "error"):
                    await client.recv()
                if client.seen[-1]["type"] == "error":
                    assert client.seen[-1]["code"] == "invalid_frame"
                await client.ask("resync", "snapshot")
                assert max(client.sizes) <= MIB
        async with joined(gateway) as client:
            await client.send_text(of_size(MIB, message, "content") + "  " * 10)
            closed = await client.until_closed()
            assert (closed.code, closed.reason) == (1009, "payload_too_large")


async def test_large_answers_states_and_snapshots_fit_into_frames() -> None:
    hold = trio.Event()

    async def agent(turn: Turn) -> None:
        await turn.update_state({"x": "s" * 120_000})
        await turn.progress("p", "p" * 60_000)
        for n in range(16):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(turn.tool_call, f"tool{n}", "a" * 500_000)
        for channel in ("answer", "reasoning", *map(str, range(14))):
            for _ in range(10):
                await turn.send("\x01\u2028é" * 1000, channel)
        async with trio.open_nursery() as nursery:
            for n in range(16):
                nursery.start_soon(turn.ask, "input", "?" * 15_000 + str(n))
            await hold.wait()
            nursery.cancel_scope.cancel()

    async with gateway_of(agent) as gateway, joined(gateway) as client:
        await client.message("x" * 900_000)
        for _ in range(16):
            await client.until("ask")
        for n in range(200):
            await client.message("", f"{n:0128}")
        snapshot = await client.ask("resync", "snapshot")
        assert len(snapshot["asks"]) == 16
        assert len(snapshot["queue"]) == 200
        assert snapshot["transcript_truncated"] is True
        assert max(client.sizes) <= MIB
        hold.set()


async def test_a_long_answer_is_sealed_and_its_text_is_complete() -> None:
    words = [f"word{n} " for n in range(40_000)]

    async def agent(turn: Turn) -> None:
        for word in words:
            await turn.send(word)

    async with gateway_of(agent) as gateway, joined(gateway) as client:
        story = Reader()
        await client.send("message", request_id="r", content="x")
        end = await follow(client, story, ended)
        assert story.text(end["turn_id"]) == "".join(words)
        outputs = client.taken("output")
        assert [bool(frame["metadata"].get("more")) for frame in outputs] == [True] * (len(outputs) - 1) + [False]
        assert max(client.sizes) < 100_000


async def test_an_upgrade_and_nothing_more_leaves_no_trace() -> None:
    async with gateway_of() as gateway:
        async with dialled(gateway):
            await eventually(lambda: gateway.statistics().pending_handshakes == 1)
        await eventually(lambda: gateway.statistics().pending_handshakes == 0)
        assert gateway.statistics().sessions == 0


async def test_a_snapshot_of_a_full_inbox_fits_into_a_frame() -> None:
    async def held(turn: Turn) -> None:
        await trio.sleep_forever()

    limits = {"max_frame_bytes": 256 * 1024, "max_inbox": 372, "stop_timeout_ms": 100}
    async with gateway_of(held, limits=limits) as gateway, joined(gateway) as client:
        await client.message("runs", "first")
        await client.until("turn_started")
        for n in range(372):
            await client.message("waits", f"{n:0128}")
        snapshot = await client.ask("resync", "snapshot")
        assert len(snapshot["queue"]) == 372
        assert 372 * 160 < max(client.sizes) <= 256 * 1024
        await client.ask("abort", "aborted", scope="all")
