"""What every store promises, run on each of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from store_helpers import MANY, Script, queue, seqs, stored, taken

from gateway.errors import StoreError, StoreRefused
from gateway.protocol import messages as m
from gateway.protocol.keys import Key, digest_of
from gateway.protocol.log import Log
from gateway.store import MemoryStore, Retention, SessionRecord, Store, sqlite
from gateway.store.sqlite import SqliteStore

Make = Callable[..., Store]


@pytest.fixture(params=["memory", "sqlite", "sqlite-normal", "sqlite-one-core"])
def make(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes a store with the given retention."""
    monkeypatch.setattr(sqlite, "one_core", lambda: request.param == "sqlite-one-core")

    def make(**options: Any) -> Store:
        if request.param == "memory":
            return MemoryStore(**options)
        return SqliteStore(
            tmp_path / "sessions.db", durability="normal" if request.param == "sqlite-normal" else "full", **options
        )

    return make


# --- what is written comes back --------------------------------------------------------------------------------------


async def test_durable_says_what_survives(make: Make, request: pytest.FixtureRequest) -> None:
    assert make().durable is (request.node.callspec.params["make"] in ("sqlite", "sqlite-one-core"))


async def test_an_unknown_session_is_none(make: Make) -> None:
    async with make() as store:
        assert await store.load("nobody", **MANY) is None
        assert await store.unfinished() == []


async def test_a_new_session(make: Make) -> None:
    async with make() as store:
        script = await Script(store).create(reserved=64)
        found = await script.load()
        assert found.record == script.record
        assert (found.reserved, found.floor, found.state) == (64, 0, {})
        assert (found.events, found.queue, found.turn, found.turn_inputs, found.keys) == ([], [], None, [], [])


async def test_creating_twice_is_refused(make: Make) -> None:
    async with make() as store:
        script = await Script(store).create()
        with pytest.raises(StoreRefused, match="exists already"):
            await script.create()


EVERY_DURABLE_EVENT: list[m.Event] = [
    m.Input(request_id=m.RequestId("r"), content="hé\n\u2028 \x00 😀", metadata={"a": [1, {"b": None}]}, sender="bob"),
    m.TurnStarted(turn_id="t", request_ids=[m.RequestId("r")], attempt=2),
    m.ToolCall(turn_id="t", call_id="c", name="search", arguments={"q": ["x", 1.5, True]}),
    m.ToolResult(turn_id="t", call_id="c", result=[None, 2**63, -(2**63)], is_error=True),
    m.Ask(turn_id="t", ask_id="a", kind="choice", prompt="which?", options=["x", 2], timeout_ms=5),
    m.Answered(turn_id="t", ask_id="a", value="x", by="c_1", outcome="answered"),
    m.Output(turn_id="t", channel="answer", content="\n\ntext\n", metadata={"more": True}),
    m.State(patch={"a": {"b": [1]}, "gone": None}),
    m.Custom(name="n", data={"type": "input"}, turn_id="t"),
    m.Withdrawn(request_id=m.RequestId("other"), reason="steered", turn_id="t"),
    m.TurnEnded(turn_id="t", outcome="failed", error=m.ErrorInfo(code="x", message="y", retryable=True)),
]


async def test_every_durable_event_comes_back_as_it_was(make: Make) -> None:
    kinds = {type(event) for event in EVERY_DURABLE_EVENT}
    assert kinds == {cls for cls in m.EVENTS.values() if not cls.volatile}
    async with make() as store:
        script = await Script(store).create()
        batch = []
        for number, event in enumerate(EVERY_DURABLE_EVENT, 1):
            event.seq, event.at = number * 3, number
            batch.append(stored(event))
        await store.append("s", batch, 64)
        assert (await script.load()).events == EVERY_DURABLE_EVENT


@pytest.mark.parametrize("text", ["\x00", "a\x00b", '"\\', "ü" * 128, "😀", "' OR 1=1 --", "1", "null"])
async def test_ids_are_not_interpreted(make: Make, text: str) -> None:
    async with make() as store:
        script = Script(store)
        script.record = SessionRecord("s", text, text, text, 1)
        await script.create()
        await script.write(script.input(text))
        await script.write(script.input("other"), on_busy="steer")
        await script.write(script.start(text, text))
        found = await script.load()
        assert found.record == script.record
        assert (taken(found), queue(found)) == ([text], ["other"])
        assert [name for name, _ in found.keys] == [text, "other"]
        assert found.queue[0].on_busy == "steer"


async def test_order_is_that_of_the_numbers(make: Make) -> None:
    async with make() as store:
        script = await Script(store).create()
        for _ in range(30):
            script.seq += 7  # numbers that volatile events had
            await script.write(script.output(), script.output())
        assert (await script.load()).events == script.written


async def test_a_batch_is_stored_as_a_whole_or_not_at_all(make: Make) -> None:
    async with make() as store:
        script = await Script(store).create()
        await script.write(script.input("a"), script.output())
        before = await script.load()
        bad = [script.input("b"), script.start("t", "a"), script.state(x=1)]
        bad[2].seq = 2  # given before
        with pytest.raises(StoreRefused, match="given before"):
            await script.write(*bad, reserved=9999)
        assert await script.load() == before


async def test_append_soon_is_append_for_who_does_not_wait(make: Make) -> None:
    async with make() as store:
        script = await Script(store).create()
        told: list[StoreError | None] = []
        over = trio.Event()

        def done(error: StoreError | None) -> None:
            told.append(error)
            if len(told) == 3:
                over.set()

        def append(session_id: str, *events: m.Event) -> None:
            try:
                if store.append_soon(session_id, [stored(event) for event in events], 0, done):
                    done(None)
            except StoreError as exc:
                done(exc)

        assert store.direct
        append("s", script.input("a"), script.start("t", "a"))
        append("unknown", script.output())
        append("s", script.end("t"))
        # A load, too, sees what was handed over before it.
        assert seqs(await script.load()) == [1, 2, 4]
        await over.wait()
        assert [type(error) for error in told] == [type(None), StoreRefused, type(None)]


async def test_a_number_is_taken_only_once_and_only_upwards(make: Make) -> None:
    async with make() as store:
        script = await Script(store).create()
        await script.write(script.make(m.Custom, name="a"), script.make(m.Custom, name="b"))
        for seq in (1, 2):
            with pytest.raises(StoreRefused, match=f"number {seq} was given before, the newest is 2"):
                await store.append("s", [stored(m.Custom(name="x", seq=seq))], 64)
        assert seqs(await script.load()) == [1, 2]


async def test_volatile_events_are_refused(make: Make) -> None:
    async with make() as store:
        await Script(store).create()
        with pytest.raises(StoreRefused, match="volatile"):
            await store.append("s", [stored(m.Delta(turn_id="t", channel="answer", text="x", seq=1))], 64)


async def test_writing_to_an_unknown_session_is_refused(make: Make) -> None:
    async with make() as store:
        with pytest.raises(StoreRefused, match="not known"):
            await store.append("nobody", [stored(m.Custom(name="x", seq=1))], 64)
        with pytest.raises(StoreRefused, match="not known"):
            await store.append("nobody", [], 64)


async def test_two_sessions_never_mix(make: Make) -> None:
    async with make() as store:
        scripts = [await Script(store, name).create() for name in ("a", "a.", "A", "b")]

        async def write(script: Script) -> None:
            name = script.record.session_id
            for i in range(20):
                await script.write(script.input(f"{i}", name), script.state(**{name: i}))
                await script.write(script.start(f"{name}{i}", f"{i}"), script.end(f"{name}{i}"))
            await script.write(script.input("waits", name), script.start(f"{name}-open", "waits"))

        async with trio.open_nursery() as nursery:
            for script in scripts:
                nursery.start_soon(write, script)
        for script in scripts:
            name = script.record.session_id
            found = await script.load()
            assert found.events == script.written
            assert found.state == {name: 19}
            assert found.turn is not None
            assert found.turn.turn_id == f"{name}-open"
            assert found.turn_inputs[0].event.content == name
            assert [key.digest for _, key in found.keys] == [digest_of(name, {})] * 21


# --- numbers ---------------------------------------------------------------------------------------------------------


async def test_reserved_numbers_only_rise(make: Make) -> None:
    async with make() as store:
        script = await Script(store).create(reserved=64)
        await script.write(reserved=128)
        assert (await script.load()).reserved == 128
        await script.write(script.output(), reserved=5)
        assert (await script.load()).reserved == 128
        script.seq = 500
        await script.write(script.output(), reserved=0)
        assert (await script.load()).reserved == 501, "a stored number was certainly shown"


# --- recovery facts --------------------------------------------------------------------------------------------------


async def test_the_queue_and_the_open_turn(make: Make) -> None:
    async with make() as store:
        script = await Script(store).create()
        first = script.input("a")
        await script.write(first, on_busy="collect")
        await script.write(script.input("b"), script.input("c"), script.input("d"))
        found = await script.load()
        assert queue(found) == ["a", "b", "c", "d"]
        assert (found.queue[0].event, found.queue[0].on_busy) == (first, "collect")
        assert await store.unfinished() == ["s"]

        started = script.start("t1", "a", "c")
        await script.write(started)
        found = await script.load()
        assert (queue(found), taken(found), found.turn) == (["b", "d"], ["a", "c"], started)
        assert found.turn_inputs[0].on_busy == "collect"

        await script.write(script.make(m.Withdrawn, request_id="b", reason="aborted"))
        assert queue(await script.load()) == ["d"]

        await script.write(script.end("t1"))
        found = await script.load()
        assert (queue(found), taken(found), found.turn) == (["d"], [], None)
        await script.write(script.start("t2", "d"), script.end("t2"))
        assert await store.unfinished() == []


async def test_everything_in_one_batch(make: Make) -> None:
    async with make() as store:
        script = await Script(store).create()
        await script.write(
            script.input("a"), script.start("t1", "a"), script.end("t1"), script.input("b"), script.start("t2", "b"),
            script.input("c"), script.input("d"), script.make(m.Withdrawn, request_id="c", reason="aborted"),
        )  # fmt: skip
        found = await script.load()
        assert (taken(found), queue(found)) == (["b"], ["d"])
        assert found.turn is not None
        assert found.turn.turn_id == "t2"


async def test_an_open_turn_without_inputs_is_unfinished(make: Make) -> None:
    async with make() as store:
        script = await Script(store).create()
        await script.write(script.start("t1"))
        assert await store.unfinished() == ["s"]
        assert (await script.load()).turn == script.written[0]


@pytest.mark.parametrize("apart", [False, True])
async def test_another_attempt_has_the_inputs_of_the_lost_one(make: Make, apart: bool) -> None:
    async with make() as store:
        script = await Script(store).create()
        await script.write(script.input("a"), script.input("b"), on_busy="collect")
        await script.write(script.input("later"))
        await script.write(script.start("t1", "a", "b"))
        for attempt in (2, 3):
            ended = script.end(f"t{attempt - 1}", "lost")
            started = script.start(f"t{attempt}", "a", "b", attempt=attempt)
            if apart:
                await script.write(ended)
                assert taken(await script.load()) == []
                await script.write(started)
            else:
                await script.write(ended, started)
            found = await script.load()
            assert (taken(found), queue(found), found.turn) == (["a", "b"], ["later"], started)
            assert [item.on_busy for item in found.turn_inputs] == ["collect", "collect"]
        await script.write(script.end("t3"))
        assert taken(await script.load()) == []


async def test_a_withdrawn_input_does_not_come_back(make: Make) -> None:
    async with make() as store:
        script = await Script(store).create()
        await script.write(script.input("a"), script.make(m.Withdrawn, request_id="a", reason="aborted"))
        await script.write(script.start("t1", "a", attempt=2))
        assert taken(await script.load()) == []


async def test_unfinished_sessions_by_activity(make: Make) -> None:
    async with make() as store:
        for name, at in (("young", 300), ("old", 100), ("middle", 200)):
            script = await Script(store, name).create()
            await script.write(script.input("a", at=at))
        quiet = await Script(store, "quiet").create()
        await quiet.write(quiet.output(), quiet.state(x=1))
        assert await store.unfinished() == ["old", "middle", "young"]


async def test_the_state_is_all_patches_merged(make: Make) -> None:
    async with make() as store:
        script = await Script(store).create()
        await script.write(script.state(a=1, b={"c": 1, "d": 2}), script.state(b={"c": None}))
        await script.write(script.state(a=None, e=[1, 2]))
        assert (await script.load()).state == {"b": {"d": 2}, "e": [1, 2]}
        assert (await script.load(max_events=1)).state == {"b": {"d": 2}, "e": [1, 2]}


async def test_keys_have_number_digest_and_time_in_order(make: Make) -> None:
    async with make() as store:
        script = await Script(store).create()
        await script.write(script.input("a", "one", metadata={"x": 1}), script.output(), script.input("b", "two"))
        await script.write(script.start("t", "a"), script.end("t"))
        await script.write(script.make(m.Withdrawn, request_id="b", reason="aborted"))
        assert (await script.load()).keys == [
            ("a", Key(1, digest_of("one", {"x": 1}), 1000)),
            ("b", Key(3, digest_of("two", {}), 3000)),
        ]


async def test_a_key_used_again_names_the_newest_input(make: Make) -> None:
    async with make() as store:
        script = await Script(store).create()
        await script.write(script.input("a", "one"), script.start("t", "a"), script.end("t"), script.input("b"))
        await script.write(script.input("a", "two"))
        keys = (await script.load()).keys
        assert [(name, key.seq) for name, key in keys] == [("b", 4), ("a", 5)]


# --- bounds of a load ------------------------------------------------------------------------------------------------


async def test_load_gives_the_newest_events_within_its_bounds(make: Make) -> None:
    async with make() as store:
        script = await Script(store).create()
        for _ in range(5):
            script.seq += 2
            await script.write(script.output("x" * 100))  # 3, 6, 9, 12, 15
        newest_two = sum(len(stored(event).payload) for event in script.written[-2:])
        for bounds, floor in [
            ({"max_events": 5}, 0),
            ({"max_events": 3}, 6),
            ({"max_events": 1}, 12),
            ({"max_bytes": newest_two}, 9),
            ({"max_bytes": newest_two - 1}, 12),
            ({"max_bytes": 1}, 12),
        ]:
            found = await script.load(**bounds)
            assert found.floor == floor, bounds
            assert seqs(found) == [seq for seq in (3, 6, 9, 12, 15) if seq > floor]
        assert (await script.load()).floor == 0


async def test_a_loaded_session_continues_for_the_oldest_cursor_it_names(make: Make) -> None:
    async with make() as store:
        script = await Script(store).create()
        for _ in range(9):
            script.seq += 3
            await script.write(script.output())
        found = await script.load(max_events=4)
        log = Log(max_events=4, max_bytes=1 << 30, base=found.floor)
        for event in found.events:
            log.append(event)
        assert log.floor == found.floor
        assert len(log.read(found.floor, 1 << 30).payloads) == 4


async def test_what_a_load_leaves_out_is_still_in_the_facts(make: Make) -> None:
    async with make() as store:
        script = await Script(store).create()
        await script.write(script.input("a"), script.input("b"), script.start("t1", "a"), script.state(x=1))
        await script.write(*[script.output() for _ in range(10)])
        found = await script.load(max_events=2)
        assert len(found.events) == 2
        assert (taken(found), queue(found), found.state) == (["a"], ["b"], {"x": 1})
        assert found.turn == script.written[2]
        assert [name for name, _ in found.keys] == ["a", "b"]


# --- a load of the tail, and the rest page by page -------------------------------------------------------------------


async def test_a_load_of_the_tail_names_the_rest_and_read_gives_it(make: Make) -> None:
    async with make() as store:
        script = await Script(store).create()
        for i in range(30):
            script.seq += i % 3  # deltas had those numbers
            await script.write(script.output("x" * i))
        sizes = {event.seq: len(stored(event).payload) for event in script.written}
        whole = await script.load(max_events=20)
        for tail_bytes in (0, sizes[script.seq], 700, 1 << 40):
            found = await script.load(max_events=20, tail_bytes=tail_bytes)
            assert found.floor == whole.floor
            assert [*found.older, *((seq, sizes[seq]) for seq in seqs(found))] == [
                (seq, sizes[seq]) for seq in seqs(whole)
            ]
            held = sum(sizes[seq] for seq in seqs(found))
            assert held <= tail_bytes or len(found.events) == 1
            assert not found.older or held + found.older[-1][1] > tail_bytes, "as much as fits"
            older = await store.read("s", found.floor, found.events[0].seq - 1)
            assert [*older, *found.events] == whole.events
            for after, upto in [(found.floor, found.floor), (script.seq, script.seq + 5), (5, 4)]:
                assert await store.read("s", after, upto) == []
            middle = script.written[15].seq
            assert [event.seq for event in await store.read("s", middle - 1, middle)] == [middle]
        assert await store.read("nobody", 0, 100) == []


async def test_an_open_turn_is_loaded_as_a_whole(make: Make) -> None:
    async with make() as store:
        script = await Script(store).create()
        await script.write(*[script.output() for _ in range(5)], script.input("a"), script.start("t2", "a"))
        await script.write(*[script.output(turn_id="t2") for _ in range(10)])
        found = await script.load(tail_bytes=1)
        assert (seqs(found), [seq for seq, _ in found.older]) == (list(range(7, 18)), [1, 2, 3, 4, 5, 6])
        found = await script.load(tail_bytes=1, max_events=4)
        assert (found.floor, seqs(found), found.older) == (13, [14, 15, 16, 17], [])
        await script.write(script.end("t2"))
        assert seqs(await script.load(tail_bytes=1)) == [18]


# --- retention while appending ---------------------------------------------------------------------------------------


async def test_a_session_keeps_what_a_log_keeps_and_not_much_more(make: Make) -> None:
    async with make(max_events=40, max_bytes=4000) as store:
        script = await Script(store).create()
        log = Log(max_events=40, max_bytes=4000)
        for i in range(200):
            # Small ones are bounded by their count, large ones by their bytes.
            event = script.output("x" * (i % 7) * (60 if i > 100 else 1))
            await script.write(event)
            log.append(event)
            found = await script.load()
            assert found.floor <= log.floor
            assert seqs(found)[-len(log) :] == [kept.seq for kept in log]
            kept = script.written[-len(found.events) :]
            assert found.events == kept
            assert len(found.events) <= 50
            assert sum(len(stored(event).payload) for event in kept) <= 5000
            before = script.written[: -len(found.events)]
            assert found.floor == (before[-1].seq if before else 0)


async def test_the_newest_event_always_stays(make: Make) -> None:
    async with make(max_events=10, max_bytes=1000) as store:
        script = await Script(store).create()
        await script.write(script.output())
        await script.write(script.output("x" * 5000))
        assert seqs(await script.load()) == [2]
        assert seqs(await script.load(max_bytes=1)) == [2]


async def test_open_questions_outlive_their_events(make: Make) -> None:
    """A question of a turn that is lost gets its answer, however much its turn wrote after it."""
    async with make(max_events=8) as store:
        script = await Script(store).create()

        def ask(ask_id: str) -> m.Event:
            return script.make(m.Ask, turn_id="t1", ask_id=ask_id, kind="approval", prompt="Go on?")

        def answered(ask_id: str) -> m.Event:
            return script.make(m.Answered, turn_id="t1", ask_id=ask_id, value=True)

        await script.write(script.input("a"), script.start("t1", "a"), ask("q1"), ask("q2"), answered("q1"), ask("q3"))
        for _ in range(40):
            await script.write(script.output())
        found = await script.load()
        assert seqs(found)[0] > 6
        assert found.asks == ["q2", "q3"]
        await script.write(answered("q2"))
        for _ in range(40):
            await script.write(script.output())
        assert (await script.load()).asks == ["q3"]
        await script.write(answered("q3"), script.end("t1"), script.input("b"), script.start("t2", "b"))
        for _ in range(40):
            await script.write(script.output(turn_id="t2"))
        assert (await script.load()).asks == []


async def test_facts_outlive_the_events_they_come_from(make: Make) -> None:
    async with make(max_events=8) as store:
        script = await Script(store).create()
        await script.write(script.state(a={"b": 1, "c": 1}), script.input("a"), script.input("b"), script.input("c"))
        await script.write(script.start("t1", "a"), script.state(a={"b": None}))
        for i in range(40):
            await script.write(script.output(), script.state(n=i))
        found = await script.load()
        assert seqs(found)[0] > 6
        assert found.state == {"a": {"c": 1}, "n": 39}
        assert (taken(found), queue(found)) == (["a"], ["b", "c"])
        assert found.turn is not None
        assert found.turn.turn_id == "t1"
        await script.write(script.end("t1"), script.start("t2", "b"))
        found = await script.load()
        assert (taken(found), queue(found)) == (["b"], ["c"])
        await script.write(script.end("t2"), script.start("t3", "c"), script.end("t3"))
        for _ in range(20):
            await script.write(script.output())
        found = await script.load()
        assert (found.state, queue(found), found.turn) == ({"a": {"c": 1}, "n": 39}, [], None)
        assert [name for name, _ in found.keys] == ["a", "b", "c"]


async def test_many_events(make: Make) -> None:
    async with make(max_events=1_000_000, max_bytes=1 << 40) as store:
        script = await Script(store).create()
        for _ in range(100):
            batch = [script.output() for _ in range(995)]
            name = f"r{script.seq}"
            await script.write(*batch, script.state(n=script.seq), script.input(name), script.start(name, name))
            await script.write(script.end(name), script.make(m.Custom, name="x"))
        assert len(script.written) == 100_000
        found = await script.load()
        assert found.events == script.written
        assert len(found.keys) == 100
        found = await script.load(max_events=1000)
        assert found.events == script.written[-1000:]
        assert found.floor == 99_000


# --- deleting and purging --------------------------------------------------------------------------------------------


async def test_a_deleted_session_is_gone_and_may_be_born_again(make: Make) -> None:
    async with make() as store:
        script, other = await Script(store).create(), await Script(store, "other").create()
        await script.write(script.input("a"), script.start("t", "a"), script.state(x=1))
        await other.write(other.input("a"))
        await store.delete("s")
        await store.delete("s")
        assert await store.load("s", **MANY) is None
        assert await store.unfinished() == ["other"]
        again = await Script(store).create()
        found = await again.load()
        assert (found.events, found.state, found.keys, found.turn) == ([], {}, [], None)
        await again.write(again.input("b"))
        assert queue(await again.load()) == ["b"]
        assert queue(await other.load()) == ["a"]


async def with_activity(store: Store, **activity: int) -> dict[str, Script]:
    scripts = {}
    for name, at in activity.items():
        scripts[name] = await Script(store, name).create()
        await scripts[name].write(scripts[name].make(m.Custom, name="x" * 1000, at=at))
    return scripts


async def left(store: Store, *names: str) -> list[str]:
    return [name for name in names if await store.load(name, **MANY) is not None]


async def test_purge_by_age(make: Make) -> None:
    async with make(retention=Retention(resume_window_ms=50, max_age_ms=100)) as store:
        await with_activity(store, a=100, b=200, c=300)
        assert (await store.purge(now=200, in_use=())).sessions == 0
        purged = await store.purge(now=301, in_use=())
        assert (purged.sessions, purged.sessions_left) == (2, 1)
        assert purged.size > 2000
        assert await left(store, "a", "b", "c") == ["c"]


async def test_purge_by_count_takes_the_longest_idle(make: Make) -> None:
    async with make(retention=Retention(resume_window_ms=10, max_age_ms=10**9, max_sessions=2)) as store:
        await with_activity(store, c=300, a=100, d=400, b=200)
        purged = await store.purge(now=1000, in_use=())
        assert (purged.sessions, purged.sessions_left) == (2, 2)
        assert await left(store, "a", "b", "c", "d") == ["c", "d"]


async def test_purge_by_bytes_in_all(make: Make) -> None:
    async with make(retention=Retention(resume_window_ms=10, max_age_ms=10**9, max_total_bytes=2500)) as store:
        await with_activity(store, a=100, b=200, c=300, d=400)
        purged = await store.purge(now=1000, in_use=())
        assert await left(store, "a", "b", "c", "d") == ["c", "d"]
        assert purged.size_left <= 2500


async def test_purge_leaves_sessions_whose_resume_window_is_open(make: Make) -> None:
    async with make(retention=Retention(resume_window_ms=500, max_age_ms=10, max_sessions=0)) as store:
        await with_activity(store, a=100, b=600)
        purged = await store.purge(now=1100, in_use=())
        assert (purged.sessions, purged.sessions_left) == (1, 1), "what could not be removed is said"
        assert await left(store, "a", "b") == ["b"]


async def test_purge_never_touches_a_session_in_use(make: Make) -> None:
    async with make(retention=Retention(resume_window_ms=10, max_age_ms=10, max_sessions=0)) as store:
        await with_activity(store, a=100, b=200, c=300)
        purged = await store.purge(now=1000, in_use={"b"})
        assert purged.sessions == 2
        assert await left(store, "a", "b", "c") == ["b"]


async def test_purge_never_removes_what_is_unfinished(make: Make) -> None:
    async with make(retention=Retention(resume_window_ms=10, max_age_ms=10, max_sessions=0)) as store:
        waiting, turn = await Script(store, "waiting").create(), await Script(store, "turn").create()
        await waiting.write(waiting.input("a"))
        await turn.write(turn.start("t"))
        purged = await store.purge(now=10**9, in_use=())
        assert purged.sessions == 0
        found = await waiting.load()
        assert queue(found) == [name for name, _ in found.keys] == ["a"]
        assert (await turn.load()).turn is not None


async def test_keys_are_kept_for_the_resume_window(make: Make) -> None:
    async with make(max_events=8, retention=Retention(resume_window_ms=5000, max_age_ms=10**9)) as store:
        script = await Script(store).create()
        await script.write(script.input("a"), script.start("t", "a"), script.end("t"))
        await script.write(script.input("b"), script.start("u", "b"), script.end("u"))  # at 4000
        for _ in range(20):
            await script.write(script.output())
        for now, names in ((6000, ["a", "b"]), (6001, ["b"]), (9000, ["b"]), (9001, [])):
            await store.purge(now=now, in_use={"s"})
            found = await script.load()
            assert [name for name, _ in found.keys] == names
        assert len(found.events) >= 8, "only keys go"


async def test_the_key_of_a_waiting_input_stays(make: Make) -> None:
    async with make(max_events=8, retention=Retention(resume_window_ms=10)) as store:
        script = await Script(store).create()
        await script.write(script.input("done"), script.start("t", "done"), script.end("t"), script.input("waits"))
        for _ in range(20):
            await script.write(script.output())
        await store.purge(now=10**9, in_use={"s"})
        found = await script.load()
        assert queue(found) == [name for name, _ in found.keys] == ["waits"]
        await script.write(script.start("u", "waits"), script.end("u"))
        for _ in range(20):
            await script.write(script.output())
        assert [name for name, _ in (await script.load()).keys] == ["waits"]
        await store.purge(now=10**9, in_use={"s"})
        assert (await script.load()).keys == []


async def test_many_sessions_are_purged(make: Make) -> None:
    async with make(retention=Retention(resume_window_ms=10, max_age_ms=10)) as store:
        names = [f"s{i}" for i in range(350)]
        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(Script(store, name).create)
        in_use = set(names[::7])
        purged = await store.purge(now=10**6, in_use=in_use)
        assert purged.sessions == 300
        assert await left(store, *names) == names[::7]
