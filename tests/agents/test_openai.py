"""The kind `openai` against a server over real sockets: its stream, its request, its failures, its cancellation."""

from __future__ import annotations

import builtins
import json
from collections.abc import Mapping
from typing import Any

import h11
import pytest
import trio
import trio.testing
from fake_turn import FakeTurn, run, said
from openai_server import Behaviour, Exchange, OpenAIServer, open_openai_server
from structlog.testing import capture_logs

from gateway.agents import Agent, build_agent
from gateway.agents import openai as kind
from gateway.config import AgentConfig
from gateway.errors import AgentLoadError, ConfigError, TurnFailed

KEY = "sk-very-secret"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def agent(url: str, **options: Any) -> Agent:
    return build_agent("llm", AgentConfig(run="openai", options={"base_url": url, "model": "tiny", **options}))


async def ask(behaviour: Behaviour, turn: FakeTurn | None = None, **options: Any) -> tuple[FakeTurn, OpenAIServer]:
    turn = turn or FakeTurn()
    async with open_openai_server(behaviour) as server:
        assert await run(agent(server.url, **options), turn) is None
    return turn, server


async def failure(behaviour: Behaviour, turn: FakeTurn | None = None, **options: Any) -> TurnFailed:
    """The error that the turn ends with; it was logged once, and the key is nowhere in it."""
    with capture_logs() as logs:
        async with open_openai_server(behaviour) as server:
            built = agent(server.url, **options)
            try:
                await run(built, turn or FakeTurn())
            except TurnFailed as exc:
                error = exc
            else:
                pytest.fail("the turn did not fail")
    assert [entry["code"] for entry in logs if entry["event"] == "upstream_failed"] == [error.code]
    assert KEY not in repr(logs)
    assert KEY not in str(error)
    return error


async def silence(exchange: Exchange) -> None:
    await trio.sleep_forever()


# --- the answer ------------------------------------------------------------------------------------------------------


async def test_tokens_become_deltas_as_they_come() -> None:
    turn = FakeTurn()

    async def one_by_one(exchange: Exchange) -> None:
        await exchange.begin()
        await exchange.delta(role="assistant", content=None)
        for number, text in enumerate(("Hel", "lo", " wörld 🌊\u2028end"), 1):
            await exchange.delta(content=text)
            await turn.wait_for(lambda turn, number=number: len(turn.calls) == number)  # type: ignore[misc]
        await exchange.delta("stop")
        await exchange.event({"choices": [], "usage": {"total_tokens": 3}})
        await exchange.end()

    await ask(one_by_one, turn)
    assert turn.calls == [("send", "answer", text) for text in ("Hel", "lo", " wörld 🌊\u2028end")]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
async def test_reasoning_has_its_own_channel(name: str) -> None:
    async def thinking(exchange: Exchange) -> None:
        await exchange.begin()
        await exchange.delta(**{name: "Let me see."})
        await exchange.delta(content="Four.")
        await exchange.delta("stop")
        await exchange.end()

    turn, _ = await ask(thinking)
    assert turn.calls == [("send", "reasoning", "Let me see."), ("send", "answer", "Four.")]


async def test_tool_calls_are_put_together() -> None:
    def piece(index: int, arguments: str, **more: object) -> dict[str, object]:
        function = {"arguments": arguments, **({"name": more.pop("name")} if "name" in more else {})}
        return {"index": index, "function": function, **more}

    async def calling(exchange: Exchange) -> None:
        await exchange.begin()
        await exchange.delta(tool_calls=[piece(0, "", id="c1", name="look")])
        await exchange.delta(tool_calls=[piece(0, '{"a'), piece(1, "{}", id="c2", name="listen")])
        await exchange.delta(tool_calls=[piece(0, 't": [1]}')])
        await exchange.delta(tool_calls=[piece(2, "not json", id="c3", name="smell")])
        await exchange.delta(tool_calls=[piece(3, "[" * 500, name="taste")])
        await exchange.delta("tool_calls")
        await exchange.end()

    turn, _ = await ask(calling)
    assert turn.calls == [
        ("tool_call", "look", {"at": [1]}, "c1"),
        ("tool_call", "listen", {}, "c2"),
        ("tool_call", "smell", "not json", "c3"),
        ("tool_call", "taste", "[" * 500, "call_3"),
    ]


async def test_an_answer_that_was_cut_short_says_so() -> None:
    async def short(exchange: Exchange) -> None:
        await exchange.begin()
        await exchange.delta(content="Once upon a")
        await exchange.delta("length")
        await exchange.end()

    turn, _ = await ask(short)
    assert turn.calls[-1] == ("custom", "finish", {"reason": "length"})


async def test_a_stream_may_look_different() -> None:
    """Comments, other line ends, several data lines, a byte order mark, chunks cut anywhere, no [DONE]."""
    text = (
        '\ufeff: ping\n\ndata: {"choices":\ndata: [{"delta": {"content": "é1 "}}]}\n\n'
        'id: 7\r\nretry: 3\r\ndata:{"choices": [{"index": 0, "delta": {"content": "2 "}}]}\r\n\r\n'
        'data: {"choices": [{"index": 1, "delta": {"content": "another choice"}}]}\r\r'
        'data: {"choices": [{"delta": {"content": "3"}, "finish_reason": "stop"}]}\n\n'
    ).encode()

    async def bytewise(exchange: Exchange) -> None:
        await exchange.begin("text/event-stream; charset=utf-8")
        for byte in text:
            await exchange.raw(bytes([byte]))
        await exchange.send(h11.EndOfMessage())

    async def whole(exchange: Exchange) -> None:
        await exchange.begin()
        await exchange.raw(text)
        await exchange.send(h11.EndOfMessage())

    for behaviour in (bytewise, whole):
        turn, _ = await ask(behaviour)
        assert turn.text() == "é1 2 3"


async def test_half_a_surrogate_pair_is_replaced() -> None:
    async def half(exchange: Exchange) -> None:
        await exchange.begin()
        await exchange.raw('data: {"choices": [{"delta": {"content": "a\\ud83dé"}, "finish_reason": "stop"}]}\n\n')
        await exchange.end()

    turn, _ = await ask(half)
    assert turn.text() == "a\ufffdé"


async def test_a_server_that_does_not_stream() -> None:
    async def whole(exchange: Exchange) -> None:
        call = {"id": "c1", "function": {"name": "look", "arguments": "{}"}}
        message = {"role": "assistant", "content": "Hello", "reasoning_content": "hm", "tool_calls": [call]}
        body = json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
        await exchange.refuse(200, body, {"content-type": "application/json"})

    turn, _ = await ask(whole)
    assert turn.calls == [
        ("send", "reasoning", "hm"),
        ("send", "answer", "Hello"),
        ("tool_call", "look", {}, "c1"),
    ]


# --- the request -----------------------------------------------------------------------------------------------------


async def test_the_request() -> None:
    _, server = await ask(
        lambda exchange: exchange.answer("Hi"),
        FakeTurn("and now?", before=[said("before")]),
        system="Be brief.", temperature=0.5, max_tokens=7, headers={"X-Team": "blue"}, extra_body={"top_p": 0.9},
    )  # fmt: skip
    (request,) = server.requests
    assert request.path == "/v1/chat/completions"
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.headers["x-team"] == "blue"
    assert request.headers["user-agent"].startswith("trio-gateway/")
    assert request.body == {
        "model": "tiny",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "before\n\nand now?"}],
        "stream": True,
        "temperature": 0.5,
        "max_tokens": 7,
        "top_p": 0.9,
    }


@pytest.mark.parametrize("suffix", ["", "/", "/chat/completions", "/chat/completions/"])
async def test_a_base_url_may_be_written_in_several_ways(suffix: str) -> None:
    async with open_openai_server(lambda exchange: exchange.answer("Hi")) as server:
        await run(agent(server.url + suffix), FakeTurn())
    assert server.requests[0].path == "/v1/chat/completions"


async def test_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER_KEY", " other\n")
    _, server = await ask(lambda exchange: exchange.answer("Hi"), api_key_env="OTHER_KEY")
    assert server.requests[0].headers["authorization"] == "Bearer other"
    monkeypatch.delenv("OPENAI_API_KEY")
    _, server = await ask(lambda exchange: exchange.answer("Hi"))
    assert "authorization" not in server.requests[0].headers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "localhost:8080"}, "agents.llm.base_url: expected an http or https URL such as http://localhost"),
        ({"base_url": "http://"}, "agents.llm.base_url: expected an http or https URL"),
        ({"base_url": "http://x:port/v1"}, "agents.llm.base_url: expected an http or https URL"),
        ({"api_key_env": "UNSET"}, "agents.llm.api_key_env: the environment variable UNSET is not set"),
        ({"headers": {"X": "ö"}}, "agents.llm: header 'X' holds characters that no HTTP header can carry"),
        ({"headers": {"X": 1}}, "agents.llm.headers.X: expected text, got int"),
        ({"temperature": 3}, "agents.llm.temperature: must be from 0 to 2, got 3"),
        ({"max_tokens": "5"}, "agents.llm.max_tokens: expected an integer from 1 to 10,000,000, got '5'"),
        ({"modle": "x"}, "agents.llm.modle: unknown option; did you mean 'model'?"),
        ({"model": ""}, "agents.llm.model: expected text, got ''"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        agent("http://localhost", **options)
    assert message in str(caught.value)


def test_openais_own_server_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ConfigError, match=r"agents\.llm\.api_key_env: the environment variable OPENAI_API_KEY"):
        agent(kind.DEFAULT_URL)


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def importing(name: str, *args: Any, **more: Any) -> Any:
        if name == "httpx2":
            raise ImportError(name)
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", importing)
    with pytest.raises(AgentLoadError, match=r"pip install 'trio-gateway\[openai\]'"):
        agent("http://localhost")


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "headers", "body", "code", "retryable", "message"),
    [
        (401, {}, f"Incorrect API key provided: {KEY}", "upstream_auth", False, "refused the gateway's credentials"),
        (403, {}, "", "upstream_auth", False, "(403)"),
        (404, {}, "tiny is unknown", "upstream_error", False, "knows no such model or address (404)"),
        (400, {}, "bad", "upstream_error", False, "refused the request (400)"),
        (400, {}, '{"error":{"code":"context_length_exceeded"}}', "upstream_error", False, "too long for the model"),
        (408, {}, "", "upstream_timeout", True, "(408)"),
        (429, {"retry-after": "12"}, "", "upstream_rate_limited", True, "try again in 12 seconds"),
        (429, {"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}, "", "upstream_rate_limited", True, "again later"),
        (429, {}, '{"error":{"code":"insufficient_quota"}}', "upstream_rate_limited", False, "quota"),
        (500, {}, "", "upstream_unavailable", True, "(500)"),
        (503, {}, "x" * 3_000_000, "upstream_unavailable", True, "(503)"),
        (504, {}, "", "upstream_timeout", True, "(504)"),
        (302, {"location": "http://127.0.0.1:1/"}, "", "upstream_error", False, "(302)"),
    ],
)
async def test_a_refusal(
    status: int, headers: Mapping[str, str], body: str, code: str, retryable: bool, message: str
) -> None:
    error = await failure(lambda exchange: exchange.refuse(status, body, headers))
    assert (error.code, error.retryable) == (code, retryable)
    assert message in error.message
    assert body[:20] not in error.message or not body


async def test_nobody_listens() -> None:
    with trio.socket.socket() as socket:
        await socket.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{socket.getsockname()[1]}/v1"
        with pytest.raises(TurnFailed) as caught:
            await run(agent(url), FakeTurn())
    assert (caught.value.code, caught.value.retryable) == ("upstream_unavailable", True)
    assert caught.value.message == "the model server cannot be reached"
    assert caught.value.__suppress_context__


async def test_no_answer_in_time() -> None:
    error = await failure(silence, timeout_s=0.05)
    assert (error.code, error.retryable) == ("upstream_timeout", True)


async def test_silence_in_mid_answer() -> None:
    async def pausing(exchange: Exchange) -> None:
        await exchange.begin()
        await exchange.delta(content="Once")
        await trio.sleep_forever()

    turn = FakeTurn()
    error = await failure(pausing, turn, timeout_s=0.1)
    assert error.code == "upstream_timeout"
    assert turn.text() == "Once"


@pytest.mark.parametrize("how", ["reset", "close", "end"])
async def test_a_connection_lost_in_mid_answer(how: str) -> None:
    async def leaving(exchange: Exchange) -> None:
        await exchange.begin()
        await exchange.delta(content="Once")
        if how == "reset":
            exchange.stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        if how == "end":
            await exchange.send(h11.EndOfMessage())  # in good order, but the answer has no end
        await exchange.stream.aclose()

    turn = FakeTurn()
    error = await failure(leaving, turn)
    assert (error.code, error.retryable) == ("upstream_unavailable", True)
    assert how == "reset" or turn.text() == "Once"


HUGE = json.dumps({"name": "look", "arguments": "x" * (kind.MAX_TOOL_BYTES + 1)})


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("data: no json\n\n", "cannot be read"),
        ("data: [1]\n\n", "cannot be read"),
        ("data: " + "[" * 200_000 + "\n\n", "cannot be read"),
        ('data: {"choices": [{"delta": 3}]}\n\n', "cannot be read"),
        ('data: {"choices": [{"delta": {"tool_calls": ["x"]}}]}\n\n', "cannot be read"),
        ("data: " + "x" * 2_000_000, "cannot be read"),
        ("data: x\n" * 1_000_000, "cannot be read"),
        ('data: {"error": {"message": "overloaded"}}\n\n', "reported an error"),
        ('event: error\ndata: {"message": "overloaded"}\n\n', "reported an error"),
        ('error: {"message": "overloaded"}\n\n', "reported an error"),
        (f'data: {{"choices": [{{"delta": {{"tool_calls": [{{"function": {HUGE}}}]}}}}]}}\n\n', "cannot be read"),
    ],
    ids=["text", "array", "deep", "delta", "call", "line", "event", "error", "error event", "llama.cpp", "tools"],
)  # fmt: skip
async def test_what_is_not_of_this_api(raw: str, message: str) -> None:
    async def behaviour(exchange: Exchange) -> None:
        await exchange.begin()
        await exchange.raw(raw)
        await trio.sleep_forever()

    error = await failure(behaviour)
    assert (error.code, error.retryable) == ("upstream_error", False)
    assert message in error.message


@pytest.mark.parametrize("body", ["<html>", "{}", '{"choices": []}', '{"error": "no"}'])
async def test_a_page_instead_of_an_answer(body: str) -> None:
    error = await failure(lambda exchange: exchange.refuse(200, body, {"content-type": "text/html"}))
    assert error.code == "upstream_error"


async def test_not_even_http() -> None:
    async def shouting(exchange: Exchange) -> None:
        await exchange.stream.send_all(b"220 mail ready\r\n")
        await exchange.stream.send_eof()

    assert (await failure(shouting)).code == "upstream_unavailable"


# --- cancellation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before the answer", "in mid-answer"])
async def test_cancelling_the_turn_closes_the_request(when: str) -> None:
    async def endless(exchange: Exchange) -> None:
        if when == "in mid-answer":
            await exchange.begin()
            await exchange.delta(content="Once")
        await trio.sleep_forever()

    turn = FakeTurn()
    async with open_openai_server(endless) as server:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, agent(server.url), turn)
            with trio.fail_after(10):
                while not server.requests:
                    await trio.testing.wait_all_tasks_blocked(0.01)
            if when == "in mid-answer":
                await turn.wait_for(lambda turn: turn.calls)
            start = trio.current_time()
            nursery.cancel_scope.cancel()
        # The agent returned, and the server sees the end of the connection without sending anything more.
        with trio.fail_after(2):
            await server.disconnected.wait()
        assert trio.current_time() - start < 1


async def test_an_agents_failure_closes_the_request() -> None:
    async def endless(exchange: Exchange) -> None:
        await exchange.begin()
        await exchange.delta(content="Once")
        await trio.sleep_forever()

    turn = FakeTurn()
    turn.closed = True  # the turn has ended meanwhile
    async with open_openai_server(endless) as server:
        with pytest.raises(Exception, match="has ended"):
            await run(agent(server.url), turn)
        with trio.fail_after(2):
            await server.disconnected.wait()
