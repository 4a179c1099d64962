"""A terminal, or what stands in for one: lines in without blocking trio, text and notes out.

Standard input is read when the kernel says that there is something, so nothing is left behind at shutdown: no thread
that waits for a line that never comes. (A thread in `input()` would keep the process alive until the next Enter.)
"""

from __future__ import annotations

import codecs
import io
import os
import re
import select
import shutil
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TextIO

import trio

STDIN = 0
"""The descriptor rather than `sys.stdin`, which is None where it was closed."""

READ_BYTES = 65_536

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What an agent must not send to somebody's terminal: with it goes every escape sequence. Newline and tab stay."""

_DIM, _PLAIN, _CLEAR = "\x1b[2m", "\x1b[0m", "\r\x1b[K"


@contextmanager
def open_lines(fd: int) -> Iterator[Lines]:
    """The lines of a terminal, pipe or file, for ``async for``; leaving the block lets go of it."""
    with _own_description(fd) as own:
        yield Lines(own, _pollable(own))


class Lines:
    """An iterator over lines, without their newline. Cancelling is safe: nothing that was read is lost."""

    def __init__(self, fd: int, pollable: bool) -> None:
        self._fd = fd
        self._pollable = pollable
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._lines: deque[str] = deque()
        self._rest = ""
        self._ended = False

    def __aiter__(self) -> Lines:
        return self

    async def __anext__(self) -> str:
        await trio.lowlevel.checkpoint()
        while not self._lines:
            if self._ended:
                raise StopAsyncIteration
            if self._pollable:
                await trio.lowlevel.wait_readable(self._fd)
            self._read()
        return self._lines.popleft()

    def _read(self) -> None:
        try:
            data = os.read(self._fd, READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""  # Closed, or a terminal that went away: the end.
        *lines, self._rest = (self._rest + self._decoder.decode(data, final=not data)).split("\n")
        if not data:
            self._ended = True
            if self._rest:
                lines.append(self._rest)
        self._lines.extend(line.removesuffix("\r") for line in lines)


@contextmanager
def _own_description(fd: int) -> Iterator[int]:
    """A terminal opened once more, without blocking; anything else as it is.

    Ctrl-C throws away what was typed. Between "there is something" and the read, that would leave the read, and the
    process with it, waiting for another line. Making `fd` itself non-blocking would do so for everyone who shares it:
    the shell, too.
    """
    try:
        own = os.open(os.ttyname(fd), os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        yield fd
        return
    try:
        yield own
    finally:
        os.close(own)


def _pollable(fd: int) -> bool:
    """Whether readiness can be waited for. Of a regular file it cannot, and reading one does not wait either."""
    if not hasattr(select, "epoll"):
        return True
    try:
        with select.epoll() as poll:
            poll.register(fd, select.EPOLLIN)
    except OSError:
        return False
    return True


def open_screen() -> Screen:
    """The process's own terminal or pipes. Call it before trio runs."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            # Closed by who started us. Left so, the next thing opened, such as trio's epoll, would get its number.
            os.open(os.devnull, os.O_RDWR)
    streams = []
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # A terminal that is not UTF-8 shows a question mark.
        streams.append(stream)
    return Screen(*streams)


class Screen:
    """Where a conversation is shown: its text on standard output, notes about it on standard error.

    So a pipe gets the conversation alone. On a terminal notes are dim; without one there are no escape sequences.
    """

    def __init__(self, out: TextIO, err: TextIO) -> None:
        self._out = out
        self._err = err
        self.interactive = out.isatty()
        plain = os.environ.get("TERM") == "dumb" or "NO_COLOR" in os.environ
        self._ansi = self.interactive and not plain
        self._dim_notes = err.isatty() and not plain
        # Of the terminal's present line: nothing on it, text without an end, the prompt, or a status.
        self._line: Literal["empty", "text", "prompt", "status"] = "empty"
        self._status = ""
        self._style = ""

    @property
    def at_prompt(self) -> bool:
        return self._line == "prompt"

    def text(self, text: str, *, dim: bool = False) -> None:
        """Show a piece of streamed text, as far as it has come."""
        if not text:
            return
        if self.interactive:
            text = _CONTROL.sub("", text)
        if self._line in ("prompt", "status"):
            self.end_line()
        style = _DIM if dim and self._ansi else ""
        self._out.write(f"{style}{text}{_PLAIN if style else ''}")
        self._out.flush()
        self._line = "empty" if text.endswith("\n") else "text"

    def line(self, text: str) -> None:
        """Show a whole line."""
        self.end_line()
        self.text(text + "\n")

    def note(self, text: str) -> None:
        """Show a line about the conversation rather than of it."""
        if self.interactive:
            self.end_line()
        text = _CONTROL.sub("", text)
        self._err.write(f"{_DIM}· {text}{_PLAIN}\n" if self._dim_notes else f"· {text}\n")
        self._err.flush()

    def status(self, text: str) -> None:
        """Show how things stand, in place of the status before, until something else is shown; only where someone sits.

        A terminal that cannot take a line back gets a note instead, when the text is another one than before.
        """
        if not self.interactive:
            return
        text = " ".join(_CONTROL.sub("", text).split())
        if not self._ansi:
            if text != self._status:
                self.note(text)
            self._status = text
            return
        self.end_line()
        # On one row: of a line that wraps only the last row could be taken back.
        room = shutil.get_terminal_size().columns - 3
        self._out.write(f"{_DIM}· {text[:room]}{_PLAIN}")
        self._out.flush()
        self._line = "status"

    def prompt(self) -> None:
        """Invite input; only where someone sits."""
        if self.interactive and self._line != "prompt":
            self.end_line()
            self._out.write("> ")
            self._out.flush()
            self._line = "prompt"

    def entered(self) -> None:
        """The user has ended the line (the terminal has echoed it)."""
        if self._line in ("prompt", "status"):
            self._line = "empty"

    def end_line(self) -> None:
        """Go to the beginning of an empty line; a prompt or a status is taken back."""
        if self._line in ("prompt", "status") and self._ansi:
            self._out.write(_CLEAR)
        elif self._line != "empty":
            self._out.write("\n")
        self._out.flush()
        self._line = "empty"

    def discard(self) -> None:
        """Nobody reads standard output any more: keep the interpreter from failing over it at exit."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._out.fileno())
