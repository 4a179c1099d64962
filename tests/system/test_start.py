"""A gateway starts on a file with many sessions: they are not loaded, but what is unfinished in it runs on."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from run_process import running
from start import fill, time_to_listening

from gateway.store.inspect import summaries


async def start_and_finish(tmp_path: Path, sessions: int, unfinished: int) -> None:
    file = tmp_path / "sessions.db"
    await fill(file, sessions, unfinished)
    async with running("--store", f"sqlite:{file}", "--no-http"):
        with trio.fail_after(60):
            while any(one.waiting or one.in_turn for one in await trio.to_thread.run_sync(summaries, str(file))):  # noqa: ASYNC110
                await trio.sleep(0.1)
    assert len(summaries(str(file))) == sessions
    print(f"{sessions:,} sessions: listening after {await trio.to_thread.run_sync(time_to_listening, file):.2f} s")


async def test_three_thousand_sessions(tmp_path: Path) -> None:
    await start_and_finish(tmp_path, 3_000, 50)


@pytest.mark.long
async def test_a_hundred_thousand_sessions(tmp_path: Path) -> None:
    await start_and_finish(tmp_path, 100_000, 1_000)
