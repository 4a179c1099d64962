"""The fuzzer finds each kind of failure, shrinks, saves and replays it; and finds nothing where nothing is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from faulty_proxy import Line, proxied
from plain_client import eventually
from run_process import PATIENCE, environment, running

from gateway.testing import wire
from gateway.testing.dialogue import Cut, Recording, SendBytes, SendText, Step, Wait, dump, load
from gateway.testing.fuzz import CannotStart, hunt, recording_of, replay, search
from gateway.testing.judge import FAILURES, Dead, Gone
from gateway.testing.line import Target

FUZZ = [sys.executable, "-m", "gateway.cli", "fuzz"]


async def dies(line: Line) -> None:
    await line.cut()


async def talks_nonsense(line: Line) -> None:
    await line.say(wire.TEXT, b'{"type":"surprise"}')


async def sends_no_json(line: Line) -> None:
    await line.say(wire.TEXT, b"{")


async def breaks_a_type(line: Line) -> None:
    await line.say(wire.TEXT, b'{"type":"credit","credit":"3"}')


async def errs_without_a_code(line: Line) -> None:
    await line.say(wire.TEXT, b'{"type":"error","code":"","message":"sorry","retryable":false}')


async def masks_its_frames(line: Line) -> None:
    await line.write(wire.frame(wire.TEXT, b'{"type":"credit","credit":3}'))


async def closes_oddly(line: Line) -> None:
    await line.say(wire.CLOSE, b"\x13\x87")


async def says_it_failed(line: Line) -> None:
    await line.say(wire.CLOSE, b"\x03\xf3internal")


async def stalls(line: Line) -> None:
    line.stalled = True


async def repeats(line: Line) -> None:
    line.repeat = True


async def disturbs(line: Line) -> None:
    # Those that were there before: what is left to read of a line that was given up must not cut the next one.
    for other in line.proxy.lines[: line.proxy.lines.index(line)]:
        await other.cut()


async def goes(line: Line) -> None:
    await line.proxy.shut()


FAULTS = {
    dies: "dead", talks_nonsense: "untyped", sends_no_json: "untyped", breaks_a_type: "untyped",
    errs_without_a_code: "untyped", masks_its_frames: "untyped", closes_oddly: "close_code",
    says_it_failed: "internal", stalls: "stall", repeats: "order", disturbs: "disturbed",
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
async def test_every_kind_of_failure_is_found_shrunk_and_replayed(fault: Any, tmp_path: Path) -> None:
    max_stall = 0.5 if fault is stalls else 5.0
    async with proxied(fault) as (proxy, healthy):
        target = Target(url=proxy.url, max_stall=max_stall)
        found = await hunt(target, seed=7, max_examples=400)
        assert found is not None
        assert found.failure.kind == FAULTS[fault], found.failure
        # A hello, an abort, and for an event to come twice: something that makes events.
        assert len(found.steps) <= (2 if fault is not repeats else 4), found.steps
        assert any(isinstance(step, SendText) and "abort" in step.text for step in found.steps)

        file = tmp_path / "failure.jsonl"
        file.write_text(dump(recording_of(found, target, 7)))
        recording = load(file)
        assert list(recording.steps) == found.steps
        again = await replay(target, recording)
        assert again is not None
        assert again.kind == recording.failure == FAULTS[fault]
        assert await replay(Target(url=healthy, max_stall=max_stall), recording) is None


@pytest.mark.parametrize("fault", [dies, talks_nonsense, stalls, repeats], ids=lambda fault: fault.__name__)
async def test_failures_of_version_1_are_found(fault: Any) -> None:
    async with proxied(fault) as (proxy, _):
        target = Target(url=proxy.url, protocol=1, max_stall=0.5 if fault is stalls else 5.0)
        found = await hunt(target, seed=7, max_examples=400)
        assert found is not None
        assert found.failure.kind == FAULTS[fault], found.failure
        assert len(found.steps) <= 4


async def test_a_server_that_is_gone_keeps_the_dialogue_as_it_was() -> None:
    async with proxied(goes) as (proxy, _):
        found = await hunt(Target(url=proxy.url, max_stall=5.0), seed=7, max_examples=400)
    assert found is not None
    assert found.failure.kind in ("gone", "dead", "disturbed")
    assert any(isinstance(step, SendText) and "abort" in step.text for step in found.steps)


@pytest.mark.parametrize("protocol", [1, 2])
async def test_nothing_is_found_where_nothing_is(protocol: int) -> None:
    async with proxied() as (proxy, _):
        assert await hunt(Target(url=proxy.url, protocol=protocol), seed=3, max_examples=40) is None


async def test_there_must_be_a_server_that_lets_us_in() -> None:
    with pytest.raises(CannotStart, match=r"cannot connect to 127\.0\.0\.1:1"):
        await hunt(Target(url="ws://127.0.0.1:1/ws"), seed=1)
    async with proxied() as (_, url):
        with pytest.raises(CannotStart, match="agent_not_found"):
            await hunt(Target(url=url, agent="nobody"), seed=1)


# --- the search alone ------------------------------------------------------------------------------------------------


def dialogues_of(seed: int, count: int = 250) -> list[list[Step]]:
    made: list[list[Step]] = []
    assert search(made.append, version=2, seed=seed, max_examples=count) is None
    return made


def test_the_same_seed_gives_the_same_dialogues() -> None:
    one, same, other = dialogues_of(5), dialogues_of(5), dialogues_of(6)
    assert one == same != other
    assert len(one) >= 240, "the second batch is new, too"
    assert len({str(steps) for steps in one}) > 200


def test_the_smallest_dialogue_of_the_first_kind_is_kept() -> None:
    """Shrinking may meet other failures on its way; they are not what was found."""

    found_one = False

    def run(steps: list[Step]) -> None:
        nonlocal found_one
        cuts = sum(isinstance(step, Cut) for step in steps)
        if cuts >= 2:
            found_one = True
            raise FAILURES["stall"]("two cuts")
        if cuts and found_one:
            raise Dead("one cut")

    found = search(run, version=2, seed=1, max_examples=2000)
    assert found is not None
    assert found.failure.kind == "stall"
    assert sum(isinstance(step, Cut) for step in found.steps) == 2
    assert len(found.steps) <= 4


def test_a_failure_that_does_not_come_again_is_still_reported() -> None:
    count = 0

    def run(steps: list[Step]) -> None:
        nonlocal count
        count += 1
        if count == 20:
            raise Dead("once")

    found = search(run, version=2, seed=1, max_examples=100)
    assert found is not None
    assert str(found.failure) == "once"


def test_a_server_that_is_gone_ends_the_search_at_once() -> None:
    count = 0

    def run(steps: list[Step]) -> None:
        nonlocal count
        count += 1
        if count >= 20:
            raise Gone("nobody there")

    found = search(run, version=2, seed=1, max_examples=100)
    assert found is not None
    assert count == 20


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_file_can_be_read_by_people_and_comes_back(tmp_path: Path) -> None:
    steps = [SendText("a", '{"type": "é"}'), SendBytes("b", b"\x81\x00", "not masked"), Cut("a"), Wait("b", 5, "left")]
    recording = Recording(protocol=1, steps=steps, agent="x", seed=4, failure="dead", message="it ended")
    file = tmp_path / "f.jsonl"
    file.write_text(dump(recording))
    assert load(file) == recording
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines[1:] == [
        {"on": "a", "do": "text", "text": '{"type": "é"}'},
        {"on": "b", "do": "bytes", "hex": "8100", "why": "not masked"},
        {"on": "a", "do": "cut"},
        {"on": "b", "do": "wait", "ms": 5, "until": "left"},
        {"failed": "dead", "message": "it ended"},
    ]


HEAD = '{"format": "trio-gateway dialogue 1", "protocol": 2}\n'


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "f:1"),
        ("{}", "f:1"),
        ("what", "cannot be read"),
        (HEAD.replace("2}", "3}"), "field 'protocol'"),
        (HEAD + '{"on": "a"}', "f:2: do: expected one of text, bytes"),
        (HEAD + '{"on": "a", "do": "bytes", "hex": "0"}', "f:2: hex"),
        (HEAD + '{"on": "a", "do": "wait", "ms": "1"}', "f:2: ms: expected an integer"),
        (HEAD + '{"on": "a", "do": "cut", "x": 1}', "f:2: .*'x'"),
        (HEAD + '{"do": "cut"}', "f:2: .*'on'"),
        (HEAD + "3", "f:2: expected an object"),
    ],
)
def test_a_file_that_is_wrong_names_the_line(text: str, named: str, tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_text(text)
    with pytest.raises(Exception, match=named):
        load(file)


# --- the command -----------------------------------------------------------------------------------------------------


async def fuzz(*args: str, cwd: Path, check: bool = False) -> subprocess.CompletedProcess[bytes]:
    with trio.fail_after(6 * PATIENCE):
        return await trio.run_process(
            [*FUZZ, *args], capture_stdout=True, capture_stderr=True, check=check, cwd=cwd, env=environment()
        )


async def test_the_command_finds_nothing_in_a_gateway_that_runs(tmp_path: Path) -> None:
    async with running("--no-http", "--drain-timeout", "0") as gateway:
        done = await fuzz(gateway.url, "--max-examples", "100", "--seed", "1", cwd=tmp_path)
        gateway.signal()
        assert await gateway.ended() == 0
    assert done.returncode == 0, done
    assert b"nothing found: 100 dialogues" in done.stdout
    assert done.stderr == b"", "quiet where nobody watches"
    assert os.listdir(tmp_path) == [], "nothing is left behind"


async def test_the_command_saves_what_it_found_and_plays_it_again(tmp_path: Path) -> None:
    async with proxied(dies) as (proxy, healthy):
        done = await fuzz(proxy.url.removesuffix("/ws"), "--seed", "1", "--save", "f.jsonl", cwd=tmp_path)
        assert done.returncode == 1, done
        assert b"FAILED (dead)" in done.stdout
        again = await fuzz("--replay", "f.jsonl", proxy.url, cwd=tmp_path)
        assert again.returncode == 1
        assert again.stdout.startswith(b"FAILED (dead)\n")
        passed = await fuzz("--replay", "f.jsonl", healthy, cwd=tmp_path)
        assert passed.returncode == 0, passed
        assert passed.stdout.startswith(b"passed")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "URL: expected the gateway's address"),
        (("http://x",), "expected ws://HOST"),
        (("ws://127.0.0.1:1",), "cannot connect to 127.0.0.1:1"),
        (("ws://127.0.0.1:1", "--replay", "no-such-file"), "no-such-file: cannot be read"),
    ],
)
async def test_the_command_cannot_start(args: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = await fuzz(*args, cwd=tmp_path)
    assert done.returncode == 2, done
    assert said in done.stderr.decode()
    assert done.stderr.decode().startswith("trio-gateway: ")


async def test_without_the_extra_the_command_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "hypothesis.py").write_text("raise ModuleNotFoundError('gone', name='hypothesis')")
    code = "import sys; sys.path.insert(0, '.'); from gateway.cli import main; main(['fuzz', 'ws://127.0.0.1:1'])"
    done = await trio.run_process(
        [sys.executable, "-c", code], capture_stderr=True, check=False, cwd=tmp_path, env=environment()
    )
    assert done.returncode == 2
    assert b"install trio-gateway[testing]" in done.stderr


async def test_ctrl_c_is_not_a_verdict(tmp_path: Path) -> None:
    async with proxied() as (proxy, _):
        process = await trio.lowlevel.open_process(
            [*FUZZ, proxy.url], cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        await eventually(lambda: proxy.lines)
        process.send_signal(signal.SIGINT)
        with trio.fail_after(PATIENCE):
            assert await process.wait() == 130
