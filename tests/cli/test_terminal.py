"""Reading lines without blocking, and showing text with and without a terminal."""

from __future__ import annotations

import io
import os
import pty
import threading

import pytest
import trio
import trio.testing

from gateway.cli.terminal import Screen, open_lines


async def lines_of(fd: int) -> list[str]:
    with open_lines(fd) as lines:
        return [line async for line in lines]


@pytest.mark.parametrize(
    ("written", "lines"),
    [
        (b"", []),
        (b"one\ntwo\r\nthree", ["one", "two", "three"]),
        (b"\n\n", ["", ""]),
        ("é\n".encode() + b"\xff\n", ["é", "\ufffd"]),
        (b"\xc3", ["\ufffd"]),
    ],
)
async def test_lines_of_a_pipe_and_a_file(written: bytes, lines: list[str], tmp_path: object) -> None:
    read, write = os.pipe()
    os.write(write, written)
    os.close(write)
    assert await lines_of(read) == lines
    os.close(read)
    path = f"{tmp_path}/input"
    with open(path, "wb") as file:  # noqa: ASYNC230
        file.write(written)
    fd = os.open(path, os.O_RDONLY)
    assert await lines_of(fd) == lines
    os.close(fd)


async def test_a_character_in_two_reads() -> None:
    read, write = os.pipe()
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def slowly() -> None:
            for byte in "aé\n€".encode():
                os.write(write, bytes([byte]))
                await trio.testing.wait_all_tasks_blocked()
            os.close(write)

        assert await lines_of(read) == ["aé", "€"]
    os.close(read)


async def test_a_terminal_that_has_nothing_after_all_does_not_block_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As when Ctrl-C throws the line away between the readiness and the read."""
    master, slave = pty.openpty()
    real = trio.lowlevel.wait_readable
    waits = 0

    async def wait_readable(fd: int) -> None:
        nonlocal waits
        waits += 1
        if waits == 1:
            await trio.lowlevel.checkpoint()
        else:
            await real(fd)

    monkeypatch.setattr(trio.lowlevel, "wait_readable", wait_readable)
    # From a thread, so that a blocked process is only slow, and the test fails instead of hanging.
    timer = threading.Timer(1.0, lambda: os.write(master, b"late\n"))
    timer.start()
    started = trio.current_time()
    others: list[float] = []
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def other() -> None:
            await trio.sleep(0.05)
            others.append(trio.current_time() - started)

        with open_lines(slave) as lines:
            assert await anext(lines) == "late"
    assert others[0] < 0.9
    timer.join()
    os.close(slave)
    os.close(master)


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen(kind: type[io.StringIO]) -> tuple[Screen, io.StringIO, io.StringIO]:
    out, err = kind(), kind()
    return Screen(out, err), out, err


def test_a_pipe_gets_the_text_as_it_is() -> None:
    shown, out, err = screen(io.StringIO)
    shown.prompt()
    shown.text("a\x1b[1m")
    shown.note("a \x1bnote")
    shown.text("b", dim=True)
    shown.end_line()
    assert out.getvalue() == "a\x1b[1mb\n"
    assert err.getvalue() == "· a note\n"


def test_a_terminal_is_kept_tidy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown, out, err = screen(Tty)
    shown.prompt()
    shown.text("half\x1b[2J\ta")
    shown.note("note")
    shown.line("whole")
    assert out.getvalue() == "> \r\x1b[Khalf[2J\ta\nwhole\n"
    assert err.getvalue() == "\x1b[2m· note\x1b[0m\n"


@pytest.mark.parametrize(("name", "value"), [("TERM", "dumb"), ("NO_COLOR", "1")])
def test_a_plain_terminal_sees_no_escape_sequence(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(name, value)
    shown, out, err = screen(Tty)
    shown.prompt()
    shown.note("note")
    shown.text("text", dim=True)
    assert "\x1b" not in out.getvalue() + err.getvalue()


def test_a_status_is_shown_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown, out, err = screen(Tty)
    shown.text("half a line")
    shown.status("steps: 1")
    shown.status("steps:\n2 \x1b" + "x" * 50)
    shown.line("done")
    shown.status("steps: 3")
    shown.entered()
    shown.line("more")
    one, two, three = (f"\x1b[2m· {text}\x1b[0m" for text in ("steps: 1", "steps: 2 xxxxxxxx", "steps: 3"))
    assert out.getvalue() == f"half a line\n{one}\r\x1b[K{two}\r\x1b[Kdone\n{three}more\n"
    assert err.getvalue() == ""


def test_a_terminal_that_cannot_go_back_gets_each_status_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    shown, out, err = screen(Tty)
    for text in ("steps: 1", "steps: 1", "steps: 2"):
        shown.status(text)
    assert (out.getvalue(), err.getvalue()) == ("", "· steps: 1\n· steps: 2\n")


def test_a_pipe_gets_no_status() -> None:
    shown, out, err = screen(io.StringIO)
    shown.status("steps: 1")
    assert out.getvalue() + err.getvalue() == ""
