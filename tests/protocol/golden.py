"""The golden vectors: one instance of every message, and how each dialect has it on the wire.

``python tests/protocol/golden.py`` writes them anew. What changes then is a change of a wire format: look at the
difference before it is committed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gateway.protocol import codec
from gateway.protocol import messages as m
from gateway.protocol.dialects import NATIVE
from gateway.protocol.log import Log
from gateway.protocol.praison import Praison

PATH = Path(__file__).parent / "golden_frames.json"
AT = 1_700_000_000_123
ASK = m.Ask(turn_id="t_1", ask_id="a_1", kind="choice", prompt="Which?", options=["red", 7], timeout_ms=60_000)
MEMBER = m.Member(connection_id="c_1", subject="alice", joined_at=AT)
POLICY = m.Policy(
    max_payload=1_048_576, max_frame_bytes=1_048_576, max_inbox=256, max_buffered_bytes=1_048_576, heartbeat_ms=30_000,
    resume_window_ms=86_400_000, max_turn_ms=600_000, replay_max_events=10_000, replay_max_bytes=8_388_608,
)  # fmt: skip
HELLO_OK = m.HelloOk(
    protocol=1, server=m.ServerInfo(name="trio-gateway", version="0.1.0", node="n1"), connection_id="c_1",
    session_id="s_1", agent_id="echo", epoch="e_1", resumed=True, cursor=12, head=18, oldest_cursor=3,
    resync_required=False, resync_reason=None, credit=256, policy=POLICY,
    features=m.Features(messages=["message"], events=["delta"], capabilities=["batch"]), presence=[MEMBER],
    health=m.Health(status="ok", draining=False), last_disconnect=m.LastDisconnect(code=1006, reason="", at=AT),
)  # fmt: skip
SNAPSHOT = m.Snapshot(
    epoch="e_1", cursor=18, reason="cursor_expired", state={"topic": "sea"}, transcript_truncated=True,
    transcript=[
        m.Input(seq=4, first=4, at=AT, request_id=m.RequestId("r_1"), content="hi", metadata={"k": 1}, sender="alice"),
        m.ToolCall(seq=6, first=6, at=AT, turn_id="t_0", call_id="k_1", name="look", arguments={"x": 1}),
        m.ToolResult(seq=7, first=7, at=AT, turn_id="t_0", call_id="k_1", result="seen"),
        m.Output(seq=9, first=8, at=AT, turn_id="t_0", channel="answer", content="one ", metadata={"more": True}),
        m.Output(seq=11, first=10, at=AT, turn_id="t_0", channel="answer", content="two"),
        m.TurnEnded(seq=12, first=12, at=AT, turn_id="t_0", outcome="completed"),
        m.Output(seq=15, first=15, at=AT, turn_id="t_1", channel="answer", content="three ", metadata={"more": True}),
    ],
    turn=m.RunningTurn(
        turn_id="t_1", request_ids=["r_2"], channels={"answer": "four"}, progress={"p": 0.5}, started_at=AT
    ),
    queue=[m.QueuedRef(request_id="r_3", seq=16)], asks=[ASK],
)  # fmt: skip

SERVER: dict[str, m.ServerFrame] = {
    "hello_ok": HELLO_OK,
    "hello_error": m.HelloError(
        code="rate_limited", message="slow down", retryable=True, retry_after_ms=1500, next_step="Wait.",
        server_min_version=1, server_max_version=2,
    ),
    "accepted": m.Accepted(request_id="r_1", seq=4, queued=2, duplicate=False, durable=True, credit=9),
    "accepted, a duplicate": m.Accepted(request_id="r_1", seq=4, queued=0, duplicate=True, durable=True, credit=9),
    "aborted, a turn": m.Aborted(turn_id="t_1", withdrawn=[]),
    "aborted, all": m.Aborted(turn_id="t_1", withdrawn=["r_2", "r_3"]),
    "aborted, nothing": m.Aborted(turn_id=None, withdrawn=[]),
    "answer_ok": m.AnswerOk(ask_id="a_1"),
    "credit": m.Credit(credit=3),
    "signal": m.Signal(name="typing", data={"on": True}, from_=MEMBER),
    "presence": m.Presence(event="joined", connection_id="c_2", subject="bob"),
    "refreshed": m.Refreshed(expires_at=AT),
    "left": m.Left(),
    "ping": m.ServerPing(nonce=5),
    "pong": m.ServerPong(nonce="x"),
    "error": m.Error(code="invalid_frame", message="field 'content': expected a string, got an integer"),
    "error, with all": m.Error(
        code="inbox_full", message="256 inputs are waiting", retryable=True, retry_after_ms=1000, request_id="r_9",
        credit=0,
    ),
    "error, no_active_turn": m.Error(code="no_active_turn", message="no turn is running"),
    "goaway": m.GoAway(reason="draining", reconnect_after_ms=700, deadline_ms=30_000),
}  # fmt: skip

EVENTS: list[m.Event] = [
    m.Input(request_id=m.RequestId("r_1"), content="hi", metadata={"k": 1}, sender="alice"),
    m.TurnStarted(turn_id="t_1", request_ids=[m.RequestId("r_1")]),
    m.Delta(turn_id="t_1", channel="reasoning", text="hm "),
    m.Progress(turn_id="t_1", key="files", data={"done": 3}),
    m.ToolCall(turn_id="t_1", call_id="k_1", name="look", arguments={"x": 1}),
    m.ToolResult(turn_id="t_1", call_id="k_1", result="seen", is_error=False),
    ASK,
    m.Answered(turn_id="t_1", ask_id="a_1", value="red", by="c_1"),
    m.Delta(turn_id="t_1", channel="answer", text='say "é"\n'),
    m.Delta(turn_id="t_1", channel="notes", text="aside"),
    m.Output(turn_id="t_1", channel="reasoning", content="hm "),
    m.Output(turn_id="t_1", channel="answer", content='say "é"\n', metadata={"more": True}),
    m.Output(turn_id="t_1", channel="answer", content="it", metadata={"tone": "kind"}),
    m.State(patch={"topic": "sea", "old": None}),
    m.Custom(name="chart", data=[1, 2], turn_id="t_1"),
    m.TurnEnded(turn_id="t_1", outcome="completed"),
    m.Input(request_id=m.RequestId("r_2"), content="again"),
    m.Withdrawn(request_id=m.RequestId("r_2"), reason="aborted"),
    m.TurnStarted(turn_id="t_2", request_ids=[m.RequestId("r_1")], attempt=2),
    m.Delta(turn_id="t_2", channel="answer", text="so far"),
    m.Output(turn_id="t_2", channel="answer", content="so far", metadata={"partial": True}),
    m.TurnEnded(turn_id="t_2", outcome="failed", error=m.ErrorInfo(code="quota", message="No credit.", retryable=True)),
]

CLIENT: list[Any] = [
    {"type": "message", "content": "hi"},
    {"type": "message", "content": " hi ", "request_id": "r_1", "metadata": {"k": 1}},
    {"type": "message", "content": "/stop"},
    {"type": "message", "content": " STOP ", "request_id": "r_2"},
    {"type": "message", "content": "/stop all"},
    {"type": "message", "content": "/cancel"},
    {"type": "message", "content": "stop it"},
    {"type": "abort"},
    {"type": "abort", "scope": "session", "reason": "user"},
    {"type": "abort", "scope": ["session"]},
    {"type": "message_abort", "scope": "turn"},
    {"type": "message_abort", "scope": "session"},
    {"type": "server_reply", "request_id": "a_1", "value": "red"},
    {"type": "server_reply", "request_id": "a_1", "value": "7"},
    {"type": "server_reply", "request_id": "a_2", "value": "allow"},
    {"type": "server_reply", "request_id": "a_2", "value": "deny"},
    {"type": "server_reply", "request_id": "a_2", "value": "maybe"},
    {"type": "server_reply", "request_id": "a_3", "value": "allow"},
    {"type": "leave"},
    {"type": "ping", "nonce": 3},
    {"type": "pong"},
    # what is wrong
    {"type": "message"},
    {"type": "message", "content": ""},
    {"type": "message", "content": "  \n", "request_id": "r_3"},
    {"type": "message", "content": 7},
    {"type": "message", "content": "hi", "request_id": 7},
    {"type": "message", "content": "hi", "request_id": ""},
    {"type": "message", "content": "hi", "metadata": []},
    {"type": "server_reply", "request_id": "a_1"},
    {"type": "server_reply", "value": "red"},
    {"type": "hello", "agent_id": "echo", "since": "abc"},
    {"type": "join", "agent_id": "echo"},
    {"type": "resync"},
    {"type": "nonsense"},
    {"type": 7},
    {},
    [{"type": "ping"}],
    [],
    7,
    None,
]
ASKS = {
    "a_1": ASK,
    "a_2": m.Ask(turn_id="t_1", ask_id="a_2", kind="approval", prompt="Delete?"),
    "a_3": m.Ask(turn_id="t_1", ask_id="a_3", kind="input", prompt="Name?"),
}


def joined(*, joins: bool = False) -> tuple[Praison, Any]:
    """A dialect 1 that has joined, and what it answered."""
    dialect = Praison(joins=joins)
    dialect.attach(Log(max_events=1, max_bytes=1), ASKS)
    answer = dialect.encode(HELLO_OK)
    assert answer is not None
    return dialect, json.loads(answer)


def plain(raw: bytes | None) -> Any:
    return None if raw is None else json.loads(raw)


def vectors() -> dict[str, Any]:
    dialect, opened = joined()
    server: dict[str, Any] = {}
    for name, frame in SERVER.items():
        one = Praison() if isinstance(frame, m.HelloError) else dialect
        first = opened if frame is HELLO_OK else plain(one.encode(frame))
        server[name] = {"2": plain(NATIVE.encode(frame)), "1": first}
    server["joined"] = {"1": joined(joins=True)[1]}
    refused = Praison(joins=True).encode(SERVER["hello_error"])
    server["hello_error after join"] = {"1": plain(refused)}
    encoded = codec.encode_snapshot(
        SNAPSHOT, [codec.encode_event(event, event.first) for event in SNAPSHOT.transcript],
        [codec.encode_event(ask, 1) for ask in SNAPSHOT.asks],
    )  # fmt: skip
    server["snapshot"] = {"2": plain(encoded), "1": [json.loads(frame) for frame in joined()[0].snapshot(encoded)]}

    log = Log(max_events=1000, max_bytes=2**20)
    events: list[Any] = []
    reader = joined()[0]
    reader.attach(log, {})
    for seq, event in enumerate(EVENTS, 13):
        event.seq = event.first = seq
        event.at = AT + seq
        log.append(event)
        native = [json.loads(payload) for payload in log.read(seq - 1, 2**20).payloads]
        first_version = [json.loads(payload) for payload in reader.read(log, seq - 1, 2**20).payloads]
        events.append({"2": native[-1], "1": first_version})

    client: list[Any] = []
    for raw in CLIENT:
        (frame,) = joined()[0].decode(json.dumps(raw).encode())
        if isinstance(frame, m.ClientFrame):
            client.append({"1": raw, "2": codec.to_builtins(frame)})
        else:
            client.append({"1": raw, "error": frame.code, "message": frame.message, "request_id": frame.request_id})
    return {"server": server, "events": events, "client": client}


if __name__ == "__main__":
    PATH.write_text(json.dumps(vectors(), indent=1, ensure_ascii=False) + "\n")
