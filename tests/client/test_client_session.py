"""A session on a scripted gateway: cut at every point, in every state, with an autojump clock."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Any

import pytest
import trio
import trio.testing
from scripted_gateway import URL, Line, accepted, custom, delta, error, hello_ok, scripted, snapshot, take

from gateway.client import Session, open_session
from gateway.errors import ConfigError, ConnectionLost, RequestRefused, SessionClosed, SessionRefused
from gateway.protocol.messages import Signal, Snapshot

Clock = trio.testing.MockClock


def joins(*frames: dict[str, Any], then: Callable[[Line], Awaitable[Any]] = Line.linger, **fields: Any) -> Any:
    """A script: take the hello, welcome, say `frames`, then `then`."""

    async def script(line: Line) -> None:
        await line.hear("hello")
        await line.say(hello_ok(**fields), *frames)
        await then(line)

    return script


def closes(code: int, reason: str = "") -> Callable[[Line], Awaitable[None]]:
    return lambda line: line.close(code, reason)


def hello_error(code: str, **fields: Any) -> dict[str, Any]:
    return {
        "type": "hello_error", "code": code, "message": "no", "retryable": False, "retry_after_ms": None,
        "next_step": "do this", "server_min_version": 2, "server_max_version": 2,
    } | fields  # fmt: skip


async def test_a_conversation(autojump_clock: Clock) -> None:
    async def script(line: Line) -> None:
        hello = await line.hear("hello")
        assert hello["agent_id"] == "echo"
        assert hello["token"] == "secret"
        assert hello["capabilities"] == ["batch"]
        await line.say(hello_ok())
        message = await line.hear("message")
        assert (message["content"], message["metadata"], message["on_busy"]) == ("hi", {"k": 1}, "steer")
        await line.say(accepted(message["request_id"], seq=1))
        await line.say_batch(custom(1), delta(2, "Hel"), delta(3, "lo"))
        await line.hear("leave")
        await line.say({"type": "left"})
        await line.close(1000, "left")

    async with scripted(script, token="secret") as (session, _):
        assert session.connection.phase == "connecting"
        assert session.session_id is None
        assert (await session.wait_joined()).session_id == session.session_id == "s_1"
        assert session.connection.phase == "joined"
        assert (await session.send("hi", metadata={"k": 1}, on_busy="steer")).seq == 1
        assert [event.seq async for event in _first(session, 3)] == [1, 2, 3]
        assert session.text_of("t_1") == "Hello"
        assert session.text_of("t_1", "reasoning") == ""
        assert (session.cursor, session.epoch) == (3, "e_1")
        await session.leave()
        await session.leave()
        assert session.connection.phase == "closed"
        with pytest.raises(SessionClosed):
            await session.send("late")
        assert [event async for event in session] == []


async def _first(session: Session, count: int) -> Any:
    for _ in range(count):
        yield await session.__anext__()


# --- cuts ------------------------------------------------------------------------------------------------------------


async def _cut_before_upgrade_is_over(line: Line) -> None:
    await line.cut()


async def _cut_after_hello(line: Line) -> None:
    await line.hear("hello")
    await line.cut()


async def _cut_after_message(line: Line) -> None:
    await line.hear("hello")
    await line.say(hello_ok())
    await line.hear("message")
    await line.cut()


@pytest.mark.parametrize(
    "cuts",
    [
        [_cut_before_upgrade_is_over],
        [_cut_after_hello],
        [_cut_after_message],
        [joins(then=Line.cut)],
        [joins(then=closes(1013, "slow_consumer"))],
        [_cut_after_message, _cut_after_hello, _cut_after_message, joins(then=closes(1012)), _cut_after_message],
    ],
)
async def test_a_message_is_accepted_once_wherever_the_line_is_cut(autojump_clock: Clock, cuts: list[Any]) -> None:
    async def last(line: Line) -> None:
        await line.hear("hello")
        await line.say(hello_ok())
        message = await line.hear("message")
        await line.say(accepted(message["request_id"], duplicate=True))
        await line.linger()

    async with scripted(*cuts, last) as (session, gateway):
        answer = await session.send("hi", request_id="r_1")
        assert answer.duplicate
        written = [frame for line in gateway.lines for frame in line.said if frame["type"] == "message"]
        assert {frame["request_id"] for frame in written} == {"r_1"}
        await trio.sleep(20)
        assert [frame["type"] for frame in gateway.lines[-1].said] == ["hello", "message"]


async def test_events_come_once_and_in_order_over_a_cut_in_the_middle(autojump_clock: Clock) -> None:
    async def second(line: Line) -> None:
        hello = await line.hear("hello")
        assert (hello["session_id"], hello["since"], hello["epoch"]) == ("s_1", 2, "e_1")
        # A gateway that repeats what we have: ignored. Then the rest.
        await line.say(hello_ok(resumed=True, cursor=2, head=4), delta(1, "a"), delta(2, "b"), delta(3, "c"))
        await line.say_batch(delta(4, "d"), delta(4, "d"))
        await line.linger()

    async with scripted(joins(delta(1, "a"), delta(2, "b"), then=Line.cut), second) as (session, _):
        assert [event.seq for event in await take(session, 4)] == [1, 2, 3, 4]
        assert session.text_of("t_1") == "abcd"
        assert session.statistics().duplicates == 3
        assert session.statistics().reconnects == 1
        assert session.connection.resumed


async def test_a_gap_is_mended_by_a_snapshot(autojump_clock: Clock) -> None:
    async def script(line: Line) -> None:
        await line.hear("hello")
        await line.say(hello_ok(), custom(1), custom(5))
        await line.hear("resync")
        await line.say(custom(6), snapshot(7, state={"k": "v"}), custom(8))
        await line.linger()

    async with scripted(script) as (session, _):
        first, second, third = await take(session, 3)
        assert (first.seq, second.cursor, third.seq) == (1, 7, 8)
        assert isinstance(second, Snapshot)
        assert session.view.state == {"k": "v"}
        assert session.statistics().gaps == 1


async def test_a_cut_between_the_promise_of_a_snapshot_and_the_snapshot(autojump_clock: Clock) -> None:
    async def second(line: Line) -> None:
        hello = await line.hear("hello")
        assert (hello["since"], hello["epoch"]) == (3, "e_0")
        await line.say(hello_ok(cursor=90, head=90, resync_required=True, resync_reason="epoch_changed"))
        await line.say(snapshot(90, reason="epoch_changed"), custom(91))
        await line.cut()

    async def third(line: Line) -> None:
        hello = await line.hear("hello")
        assert (hello["since"], hello["epoch"]) == (91, "e_1")
        await line.say(hello_ok(cursor=91, head=92), custom(92))
        await line.linger()

    first = joins(cursor=90, head=90, resync_required=True, resync_reason="epoch_changed", then=Line.cut)
    async with scripted(first, second, third, session_id="s_1", since=3, epoch="e_0") as (session, _):
        items = await take(session, 3)
        assert [getattr(item, "seq", item.type) for item in items] == ["snapshot", 91, 92]
        assert (session.cursor, session.epoch) == (92, "e_1")


async def test_resync_on_request(autojump_clock: Clock) -> None:
    async def script(line: Line) -> None:
        await line.hear("hello")
        await line.say(hello_ok(), custom(1))
        await line.hear("resync")
        await line.cut()

    async def second(line: Line) -> None:
        await line.hear("hello")
        await line.say(hello_ok(cursor=1))
        await line.hear("resync")
        await line.say(snapshot(1))
        await line.linger()

    async with scripted(script, second) as (session, _):
        assert (await session.resync()).cursor == 1
        assert [item.type for item in await take(session, 2)] == ["custom", "snapshot"]


# --- coming back -----------------------------------------------------------------------------------------------------


async def test_goaway_s_hint_is_respected_and_seen(autojump_clock: Clock) -> None:
    goaway = {"type": "goaway", "reason": "shutdown", "reconnect_after_ms": 7000, "deadline_ms": 100}
    seen = []
    async with scripted(joins(goaway, then=closes(1012, "restart")), joins(resumed=True)) as (session, gateway):
        async for state in session.connection_states():
            seen.append((state.phase, state.seconds))
            if len(seen) == 5:
                break
        assert seen == [("connecting", 0), ("joined", 0), ("waiting", 7.0), ("connecting", 0), ("joined", 0)]
        assert gateway.dialled_at[1] - gateway.dialled_at[0] >= 7


async def test_nobody_at_home_backs_off_with_full_jitter(autojump_clock: Clock) -> None:
    chances = iter([1.0, 0.5, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    times = []

    def connect(url: str, **options: Any) -> Any:
        times.append(trio.current_time())
        raise ConnectionLost(1006, "connection refused by nobody")

    async with open_session(URL, "echo", connect=connect, chance=lambda: next(chances)) as session:
        await trio.sleep(70)
        assert session.connection.phase == "waiting"
        assert session.connection.reason == "connection refused by nobody"
    assert [b - a for a, b in pairwise(times)] == pytest.approx([0.5, 0.5, 0.0, 4, 8, 16, 30])


async def test_terminal_codes_reach_every_waiting_call(autojump_clock: Clock) -> None:
    async def script(line: Line) -> None:
        await line.hear("hello")
        await line.say(hello_ok(), custom(1))
        await trio.sleep(1)
        await line.close(4403, "forbidden")

    caught: list[SessionRefused] = []

    async def catch(call: Callable[[], Awaitable[Any]]) -> None:
        with pytest.raises(SessionRefused) as info:
            await call()
        caught.append(info.value)

    async with scripted(script) as (session, gateway):
        async with trio.open_nursery() as nursery:
            for call in (
                lambda: session.send("a"),
                session.abort,
                lambda: session.answer("a", True),
                session.resync,
                lambda: take(session, 2),
            ):
                nursery.start_soon(catch, call)
        await catch(session.wait_joined)
        await catch(lambda: session.signal("typing"))
        await session.leave()
        states = [state async for state in session.connection_states()]
        assert [state.phase for state in states] == ["closed"]
    assert {(error.code, error.close_code) for error in caught} == {("forbidden", 4403)}
    assert len(caught) == len({id(error) for error in caught}) == 7
    assert len(gateway.dialled_at) == 1


@pytest.mark.parametrize(("code", "close_code"), [("agent_not_found", 4404), ("protocol_unsupported", 4406)])
async def test_a_refused_hello(autojump_clock: Clock, code: str, close_code: int) -> None:
    async def script(line: Line) -> None:
        await line.hear("hello")
        await line.say(hello_error(code))
        await line.close(close_code, code)

    async with scripted(script) as (session, _):
        with pytest.raises(SessionRefused, match=f"{code}: no .do this.") as caught:
            await session.wait_joined()
        assert caught.value.close_code == close_code


async def test_a_refusal_counts_without_its_close(autojump_clock: Clock) -> None:
    async def script(line: Line) -> None:
        await line.hear("hello")
        await line.say(hello_error("forbidden"))
        await trio.sleep(100)

    async with scripted(script) as (session, _):
        with trio.fail_after(2):
            with pytest.raises(SessionRefused, match="forbidden"):
                await session.wait_joined()


async def test_a_token_function_refreshes(autojump_clock: Clock) -> None:
    tokens: list[str] = []

    async def token() -> str:
        tokens.append(f"token-{len(tokens)}")
        if len(tokens) == 2:
            raise OSError("the issuer is away")
        return tokens[-1]

    async def last(line: Line) -> None:
        assert (await line.hear("hello"))["token"] == "token-2"
        await line.say(hello_error("unauthorized"))
        await line.close(4401, "unauthorized")

    async with scripted(joins(then=closes(4401, "token_expired")), last, last, token=token) as (session, _):
        with pytest.raises(SessionRefused, match="unauthorized"):
            await take(session, 1)
    assert len(tokens) == 3


async def test_a_token_function_that_fails_ends_the_session(autojump_clock: Clock) -> None:
    async def token() -> str:
        raise KeyError("no keyring")

    async with scripted(token=token) as (session, _):
        with pytest.raises(SessionRefused, match="token_unavailable") as caught:
            await session.send("hi")
        assert isinstance(caught.value.__cause__, KeyError)


async def test_handshake_timeout(autojump_clock: Clock) -> None:
    async def silent(line: Line) -> None:
        await line.hear("hello")
        await trio.sleep(1000)

    async with scripted(silent, joins(), handshake_timeout=4) as (session, gateway):
        await session.wait_joined()
        assert gateway.dialled_at[1] - gateway.dialled_at[0] == pytest.approx(4.5, abs=0.2)


async def test_a_gateway_that_talks_nonsense_is_left_and_tried_again(autojump_clock: Clock) -> None:
    async with scripted(joins({"type": "delta", "seq": "x"}), joins(resumed=True)) as (session, _):
        reasons = []
        async for state in session.connection_states():
            reasons.append(state.reason)
            if state.resumed:
                break
        assert any("not of this protocol" in reason for reason in reasons)


# --- liveness --------------------------------------------------------------------------------------------------------


async def test_heartbeats(autojump_clock: Clock) -> None:
    async def script(line: Line) -> None:
        await line.hear("hello")
        await line.say(hello_ok(policy={"heartbeat_ms": 1000}))
        started = trio.current_time()
        for _ in range(5):
            ping = await line.hear("ping")
            await line.say({"type": "pong", "nonce": ping["nonce"]})
        assert trio.current_time() - started == pytest.approx(5, abs=0.1)
        await line.say({"type": "ping", "nonce": 7})
        assert await line.hear("pong") == {"type": "pong", "nonce": 7}
        line.stall()
        await trio.sleep(1000)

    async with scripted(script, joins()) as (session, gateway):
        await trio.sleep(5.5)
        assert session.connection.phase == "joined"
        # Now nothing comes any more: the line is half open.
        await trio.sleep(3)
        assert len(gateway.dialled_at) == 2
        # Dropped at once: nobody is there for a closing handshake.
        assert gateway.dialled_at[1] == pytest.approx(7.5, abs=0.2)


async def test_who_does_not_take_events_stops_the_reading_and_stays_alive(autojump_clock: Clock) -> None:
    sent = 0

    async def flood(line: Line) -> None:
        nonlocal sent
        await line.hear("hello")
        await line.say(hello_ok(policy={"heartbeat_ms": 1000}))
        pinged = 0
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def write() -> None:
                nonlocal sent
                for seq in range(1, 2001):
                    await line.say(custom(seq, data="x" * 500))
                    sent = seq

            while pinged < 20:
                await line.hear("ping")
                pinged += 1
        await line.linger()

    async with scripted(flood, buffer_events=10) as (session, gateway):
        await trio.sleep(10.5)
        assert session.connection.phase == "joined", "what we do not read is not silence of the gateway"
        assert session.statistics().buffered == 10
        assert len(gateway.lines[0].said) >= 10, "pings go out while reading has stopped"
        assert [event.seq for event in await take(session, 2000)] == list(range(1, 2001))
        assert session.statistics().overflows == 0


async def test_a_full_buffer_does_not_hold_up_an_answer_of_the_same_task(autojump_clock: Clock) -> None:
    async def first(line: Line) -> None:
        await line.hear("hello")
        await line.say(hello_ok(), *(custom(seq) for seq in range(1, 101)))
        message = await line.hear("message")
        await line.say(*(custom(seq) for seq in range(101, 121)), accepted(message["request_id"], 121))
        await line.linger()

    async def second(line: Line) -> None:
        hello = await line.hear("hello")
        since = hello["since"]
        await line.say(hello_ok(cursor=since, head=130), *(custom(seq) for seq in range(since + 1, 131)))
        await line.linger()

    async with scripted(first, *[second] * 30, buffer_events=10) as (session, gateway):
        await session.wait_joined()
        await trio.sleep(1)
        assert (await session.send("hi")).seq == 121
        assert session.statistics().buffered <= 11
        assert [event.seq for event in await take(session, 130)] == list(range(1, 131))
        assert session.statistics().overflows == 1
        assert len(gateway.dialled_at) == 2
        assert gateway.dialled_at[1] == pytest.approx(1, abs=0.1), "fetched at once, without backing off"


async def test_closed_as_a_slow_consumer_it_comes_back_when_there_is_room(autojump_clock: Clock) -> None:
    async def slow(line: Line) -> None:
        await line.hear("hello")
        await line.say(hello_ok(), *(custom(seq) for seq in range(1, 21)))
        await line.cut()

    async def again(line: Line) -> None:
        since = (await line.hear("hello"))["since"]
        await line.say(hello_ok(cursor=since, head=30), *(custom(seq) for seq in range(since + 1, 31)))
        await line.linger()

    async with scripted(slow, again, buffer_events=5) as (session, gateway):
        await trio.sleep(100)
        assert len(gateway.dialled_at) == 1
        assert [event.seq for event in await take(session, 30)] == list(range(1, 31))


async def test_without_a_line_a_full_buffer_does_not_dial(autojump_clock: Clock) -> None:
    async with scripted(joins(*(custom(seq) for seq in range(1, 6)), then=Line.cut), joins(), buffer_events=5) as (
        session,
        gateway,
    ):
        await trio.sleep(100)
        assert session.connection.phase == "waiting"
        await take(session, 1)
        await session.wait_joined()
        assert len(gateway.dialled_at) == 2


# --- requests --------------------------------------------------------------------------------------------------------


async def test_refusals_and_waiting(autojump_clock: Clock) -> None:
    async def script(line: Line) -> None:
        await line.hear("hello")
        await line.say(hello_ok())
        for code in ("inbox_full", "unavailable"):
            message = await line.hear("message")
            refusal = {"request_id": message["request_id"], "retryable": True, "retry_after_ms": 2000, "credit": 0}
            await line.say(error(code, **refusal))
        message = await line.hear("message")
        await line.say(accepted(message["request_id"]))
        message = await line.hear("message")
        await line.say(error("busy", request_id=message["request_id"], retryable=True))
        await line.linger()

    async with scripted(script) as (session, _):
        started = trio.current_time()
        await session.send("a")
        assert trio.current_time() - started >= 4
        with pytest.raises(RequestRefused, match="busy") as caught:
            await session.send("b", on_busy="reject")
        assert caught.value.retryable
        with pytest.raises(RequestRefused, match="payload_too_large"):
            await session.send("x" * 1000)
        with pytest.raises(RequestRefused, match="JSON"):
            await session.send("a", metadata={"k": object()})


async def test_a_cancelled_send_that_was_not_written_never_is(autojump_clock: Clock) -> None:
    async with scripted(_cut_after_hello, joins()) as (session, gateway):
        with trio.move_on_after(0.1):
            await session.send("never")
        await session.wait_joined()
        await trio.sleep(5)
        assert [frame["type"] for frame in gateway.lines[-1].said] == ["hello"]


async def test_abort_answer_and_signal(autojump_clock: Clock) -> None:
    async def script(line: Line) -> None:
        await line.hear("hello")
        await line.say(hello_ok())
        assert (await line.hear("signal"))["name"] == "typing"
        await line.say(
            {
                "type": "signal",
                "name": "typing",
                "data": 1,
                "from": {"connection_id": "c", "subject": "s", "joined_at": 0},
            }
        )
        assert (await line.hear("abort"))["scope"] == "all"
        await line.say({"type": "aborted", "turn_id": "t_1", "withdrawn": ["r"]})
        await line.hear("abort")
        await line.say(error("no_active_turn"))
        assert (await line.hear("answer"))["value"] is False
        await line.say({"type": "answer_ok", "ask_id": "a_1"})
        await line.hear("answer")
        await line.say(error("unknown_ask"))
        await line.hear("abort")
        await line.cut()

    async with scripted(script) as (session, _):
        assert not await session.signal("too early")
        await session.wait_joined()
        notices = session.notices()
        assert await session.signal("typing")
        assert isinstance(await notices.__anext__(), Signal)
        assert (await session.abort(scope="all")).withdrawn == ["r"]
        with pytest.raises(RequestRefused, match="no_active_turn"):
            await session.abort()
        await session.answer("a_1", False)
        with pytest.raises(RequestRefused, match="unknown_ask"):
            await session.answer("a_2", True)
        with pytest.raises(RequestRefused, match="connection_lost"):
            await session.abort()


# --- leaving ---------------------------------------------------------------------------------------------------------


async def _deaf(line: Line) -> None:
    await line.hear("hello")
    await line.say(hello_ok())
    await trio.sleep(1000)


async def _refusing(line: Line) -> None:
    await line.hear("hello")
    await line.say(hello_error("forbidden"))
    await line.close(4403, "forbidden")


async def _silent(line: Line) -> None:
    await trio.sleep(1000)


@pytest.mark.parametrize("how", ["return", "raise", "cancel", "leave"])
@pytest.mark.parametrize("send", [False, True])
@pytest.mark.parametrize(
    ("script", "phase"),
    [
        (None, "connecting"),
        (_silent, "connecting"),
        (_cut_after_hello, "waiting"),
        (joins(), "joined"),
        (_deaf, "joined"),
        (_refusing, "closed"),
    ],
)
async def test_leaving_is_clean_in_every_state(
    autojump_clock: Clock, script: Any, phase: str, send: bool, how: str
) -> None:
    ended: list[type] = []

    async def sending(session: Session) -> None:
        try:
            await session.send("hi")
        except (SessionClosed, SessionRefused) as exc:
            ended.append(type(exc))

    async def story(scope: trio.CancelScope) -> None:
        async with scripted(*([script] if script else []), backoff=_slow()) as (session, _):
            async with trio.open_nursery() as nursery:
                if send:
                    nursery.start_soon(sending, session)
                await trio.sleep(3)
                assert session.connection.phase == phase
                times.append(trio.current_time())
                if how == "raise":
                    raise KeyError
                if how == "cancel":
                    scope.cancel()
                    await trio.sleep_forever()
                if how == "leave":
                    await session.leave()
                    await trio.sleep(0.01)
                    assert len(ended) == send
                nursery.cancel_scope.cancel()

    times: list[float] = []
    with trio.CancelScope() as scope:
        try:
            await story(scope)
        except* KeyError:
            assert how == "raise"
    assert scope.cancelled_caught == (how == "cancel")
    assert trio.current_time() - times[0] <= 6.5


def _slow() -> Any:
    from gateway.protocol.cursor import Backoff

    return Backoff(base=60, cap=60)


async def test_leaving_in_the_middle_of_a_write(autojump_clock: Clock) -> None:
    async def deaf(line: Line) -> None:
        await line.hear("hello")
        await line.say(hello_ok(policy={"max_payload": 10_000_000}))
        await trio.sleep(1000)

    async with scripted(deaf) as (session, _):
        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(session.send, "x" * 500_000)
            await trio.sleep(1)
            nursery.cancel_scope.cancel()
        started = trio.current_time()
    assert trio.current_time() - started < 6.5


async def test_the_block_s_exception_comes_out_as_it_is(autojump_clock: Clock) -> None:
    with pytest.raises(ZeroDivisionError):
        async with open_session("ws://127.0.0.1:9/ws", "echo"):
            raise ZeroDivisionError


async def test_a_bad_url_is_told_at_once(autojump_clock: Clock) -> None:
    with pytest.raises(ConfigError, match="ws://"):
        async with open_session("http://gateway", "echo"):
            pass


async def test_iteration_ends_with_what_had_arrived(autojump_clock: Clock) -> None:
    async with scripted(joins(custom(1), custom(2), then=closes(1012))) as (session, _):
        await session.wait_joined()
        await trio.sleep(0.1)
        await session.leave()
        assert [event.seq async for event in session] == [1, 2]
