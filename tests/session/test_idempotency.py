"""One `request_id`, one turn: repetitions at every stage of an input's life, and what is looked up first."""

from __future__ import annotations

from typing import Any

import pytest
from session_harness import Script, open_bench, settle

from gateway.config import Limits
from gateway.protocol.messages import Aborted, Accepted, Error, Withdrawn


def accepted(bench: Any) -> list[tuple[str, int, bool]]:
    return [(frame.request_id, frame.seq, frame.duplicate) for frame in bench.reader.got(Accepted)]


async def test_repetitions_while_it_is_stored_get_the_same_answer_when_it_is() -> None:
    agent = Script()
    async with open_bench(agent) as bench:
        other = bench.attach("c2")
        bench.store.hold()
        bench.send("r1")
        bench.send("r1", on_busy="reject")
        bench.send("r1", reader=other)
        await settle()
        assert not bench.reader.frames
        bench.store.release()
        await settle()
        assert accepted(bench) == [("r1", 1, False), ("r1", 1, True)]
        assert [frame.duplicate for frame in other.got(Accepted)] == [True]
        assert bench.turns == [["r1"]]


@pytest.mark.parametrize("mode", ["queue", "interrupt", "steer", "collect", "reject"])
async def test_repetitions_while_it_waits_runs_and_after_it_ended(mode: Any) -> None:
    agent = Script()
    async with open_bench(agent) as bench:
        bench.send("r1")
        bench.send("r2")
        await settle()
        bench.send("r1", on_busy=mode)
        bench.send("r2", on_busy=mode)
        await agent.finish()
        await agent.finish()
        bench.send("r1", on_busy=mode)
        bench.send("r2", on_busy=mode)
        await settle()
        first, second = (bench.reader.got(Accepted)[i].seq for i in (0, 1))
        assert accepted(bench) == [
            ("r1", first, False),
            ("r2", second, False),
            ("r1", first, True),
            ("r2", second, True),
            ("r1", first, True),
            ("r2", second, True),
        ]
        assert bench.turns == [["r1"], ["r2"]]
        assert bench.inputs == ["r1", "r2"]


async def test_a_withdrawn_input_counts() -> None:
    agent = Script()
    async with open_bench(agent) as bench:
        bench.send("r1")
        bench.send("r2")
        await settle()
        bench.abort(request_id="r2")
        await settle()
        bench.send("r2")
        await settle()
        assert accepted(bench)[-1] == ("r2", bench.reader.got(Accepted)[1].seq, True)
        await agent.finish()
        assert bench.turns == [["r1"]]


async def test_a_repetition_of_an_input_that_was_withdrawn_while_it_is_stored() -> None:
    agent = Script()
    async with open_bench(agent) as bench:
        bench.send("r0")
        await settle()
        bench.reader.take()
        bench.store.hold()
        bench.send("r1")
        await settle()
        bench.abort(request_id="r1")
        bench.send("r1")
        bench.store.release()
        await settle()
        assert bench.inputs == ["r0", "r1"]
        assert [event.request_id for event in bench.reader.of(Withdrawn)] == ["r1"]
        assert accepted(bench) == [("r1", 3, False), ("r1", 3, True)]
        assert bench.turns == [["r0"]]
        assert bench.reader.frames[-1] == Aborted(turn_id=None, withdrawn=["r1"])


async def test_same_id_other_content_is_a_conflict_at_every_stage() -> None:
    agent = Script()
    async with open_bench(agent) as bench:

        def conflicts() -> bool:
            bench.reader.take()
            bench.send("r1", "other")
            bench.send("r1", "one", metadata={"k": 2})
            errors = [frame for frame in bench.reader.take() if isinstance(frame, Error)]
            return [(error.code, error.retryable, error.request_id) for error in errors] == [
                ("request_id_conflict", False, "r1")
            ] * 2

        bench.send("r1", "one", metadata={"k": 1})
        assert conflicts()
        await settle()
        assert conflicts()
        await agent.finish()
        assert conflicts()
        assert bench.inputs == ["r1"]


async def test_the_order_of_metadata_does_not_count() -> None:
    agent = Script()
    async with open_bench(agent) as bench:
        bench.send("r1", metadata={"a": 1, "b": {"c": [1, {"x": 1, "y": 2}], "d": None}})
        await settle()
        bench.send("r1", metadata={"b": {"d": None, "c": [1, {"y": 2, "x": 1}]}, "a": 1})
        assert accepted(bench)[-1] == ("r1", 1, True)
        bench.send("r1", metadata={"b": {"d": None, "c": [{"y": 2, "x": 1}, 1]}, "a": 1})
        assert bench.reader.got(Error)[-1].code == "request_id_conflict"


async def test_the_key_is_looked_up_before_busy_full_draining_and_unavailable() -> None:
    agent = Script()
    async with open_bench(agent, limits=Limits(max_inbox=1)) as bench:
        bench.send("r1")
        await settle()
        bench.send("r2")
        await settle()
        assert bench.session.credit == 0
        bench.store.unavailable = True
        bench.session.draining = True
        for request_id in ("r1", "r2"):
            bench.send(request_id, on_busy="reject")
            assert accepted(bench)[-1][0] == request_id
            assert accepted(bench)[-1][2]
        bench.send("r3")
        assert bench.reader.got(Error)[-1].code == "draining"


async def test_an_input_that_waits_for_longer_than_its_key_is_kept_is_still_the_same() -> None:
    agent = Script()
    clock = [0]
    async with open_bench(agent, limits=Limits(resume_window_ms=1000)) as bench:
        object.__setattr__(bench.session.sources, "now_ms", lambda: clock[0])
        bench.send("r1")
        await settle()
        bench.send("r2")
        await settle()
        seq = bench.reader.got(Accepted)[-1].seq
        clock[0] = 5_000
        bench.send("r2")
        bench.send("r2", "other")
        assert accepted(bench)[-1] == ("r2", seq, True)
        assert bench.reader.got(Error)[-1].code == "request_id_conflict"
        await agent.finish()
        await agent.finish()
        # Now nothing knows it any more.
        bench.send("r2", "other")
        await settle()
        assert bench.turns == [["r1"], ["r2"], ["r2"]]


async def test_a_repetition_after_the_store_failed_is_a_new_message() -> None:
    agent = Script()
    async with open_bench(agent) as bench:
        bench.store.unavailable = True
        bench.send("r1")
        bench.send("r1")
        await settle()
        assert [frame.code for frame in bench.reader.got(Error)] == ["unavailable"] * 2
        bench.store.unavailable = False
        bench.session.publisher._try_again_at = 0
        bench.send("r1")
        await settle()
        assert accepted(bench) == [("r1", bench.reader.events[0].seq, False)]
        assert bench.turns == [["r1"]]
