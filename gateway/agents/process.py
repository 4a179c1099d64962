"""The kind ``process``: a command per turn that speaks JSON lines (the protocol: docs/reference/process-agent.md).

The turn and the process live and die together. The process's exit ends the turn; a turn that is cancelled, or whose
process breaks the protocol, ends the process: SIGTERM to its whole process group, SIGKILL after `grace_ms`. A child
that leaves the group on purpose (``setsid``) is out of reach.

Five tasks per turn, all owned by the nursery in `Process.__call__` and ended with it: three move lines (stdin, stdout,
stderr), one waits for the exit, one takes steered inputs if asked to; and one task for every open ask.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import attrs
import structlog
import trio
from attrs import define, field, frozen

from gateway.agents import options as opt
from gateway.errors import ConfigError, FrameError, TurnFailed
from gateway.protocol import codec
from gateway.protocol.messages import JSON, AskKind

if TYPE_CHECKING:
    from gateway.session import Turn

_log = structlog.get_logger(__name__)

FAILED = "agent_process_failed"
BAD_LINE = "agent_process_protocol"

MAX_STDERR_LINES = 200
"""Lines of one turn's stderr that are logged: a traceback or ten. The rest is read and counted."""

MAX_STDERR_CHARS = 2000

EXIT_PATIENCE = 5.0
"""Seconds from the end of stdout to the exit, which is for cleaning up, not for work; and, after the exit, for silence
on a pipe that someone else still holds open."""

KILL_PATIENCE = 2.0
"""Seconds for a killed process to be gone. It takes longer only if it hangs in the kernel, where nothing reaches it."""

MAX_ASK_SECONDS = 7 * 24 * 3600
"""The longest time-out of an ask: as long as ``limits.max_turn_ms`` can be."""

STEER_INTERVAL = 0.05
"""Seconds between two looks for steered inputs: below what a person notices."""

STDIN_LINES = 16
"""Lines waiting for a process that does not read: as many as a turn may have asks open (``limits.max_asks``)."""


def _command(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        try:
            return tuple(shlex.split(value))
        except ValueError as exc:
            raise ConfigError("command", f"cannot be split into words ({exc}); write it as a list") from None
    if isinstance(value, Sequence) and all(type(word) is str and "\0" not in word for word in value):
        return tuple(value)
    raise ConfigError("command", f"expected text or a list of text, got {value!r}")


@frozen(kw_only=True)
class ProcessOptions:
    """Options of the kind ``process``.

    Args:
        command: the program and its arguments: a list, or one text that is split as a shell would; no shell runs.
        cwd: its working directory; the gateway's own if not given.
        env: added to the environment, which is the gateway's without ``TRIO_GATEWAY_…`` (its secrets).
        close_stdin: end stdin after the first line, for a command that reads its input to the end; it gets no answers.
        steer: take inputs that clients hand to the running turn, and pass them on; otherwise they wait their turn.
        max_history: events of the transcript passed on at most, newest kept.
        max_line_bytes: a longer line on stdout fails the turn.
        grace_ms: between SIGTERM and SIGKILL.
    """

    command: tuple[str, ...] = field(converter=_command)
    cwd: str | None = field(default=None, validator=opt.optional_text)
    env: Mapping[str, str] = field(factory=dict, validator=opt.text_table, repr=False)
    close_stdin: bool = field(default=False, validator=opt.flag)
    steer: bool = field(default=False, validator=opt.flag)
    max_history: int = field(default=200, validator=opt.number(1, 100_000))
    max_line_bytes: int = field(default=1024 * 1024, validator=opt.number(1024, 64 * 1024 * 1024))
    grace_ms: int = field(default=2_000, validator=opt.number(0, 60_000))

    @command.validator
    def _check_command(self, attribute: attrs.Attribute[Any], value: tuple[str, ...]) -> None:
        if not value or not value[0]:
            raise ConfigError("command", "expected a program, for example ['python3', 'agent.py']")


# --- what the process may say ----------------------------------------------------------------------------------------


@frozen(kw_only=True)
class _Delta:
    text: str
    channel: str = "answer"


@frozen(kw_only=True)
class _Output:
    content: str
    channel: str = "answer"
    metadata: dict[str, JSON] | None = None


@frozen(kw_only=True)
class _Progress:
    key: str
    data: JSON = None


@frozen(kw_only=True)
class _ToolCall:
    name: str
    arguments: JSON = None
    call_id: str | None = None


@frozen(kw_only=True)
class _ToolResult:
    call_id: str
    result: JSON = None
    is_error: bool = False


@frozen(kw_only=True)
class _Ask:
    kind: AskKind
    prompt: str
    options: list[JSON] | None = None
    timeout: float | None = None
    ask_id: str | None = None


@frozen(kw_only=True)
class _State:
    patch: dict[str, JSON]


@frozen(kw_only=True)
class _Custom:
    name: str
    data: JSON = None


@frozen(kw_only=True)
class _Error:
    code: str
    message: str
    retryable: bool = False


_LINES: dict[str, type[Any]] = {
    "delta": _Delta,
    "output": _Output,
    "progress": _Progress,
    "tool_call": _ToolCall,
    "tool_result": _ToolResult,
    "ask": _Ask,
    "state": _State,
    "custom": _Custom,
    "error": _Error,
}


class Process:
    """The agent. It starts one process per turn, with no shell between.

    Cancelling it ends the process group before it returns, at most `grace_ms` and a little later.

    Raises (when made):
        ConfigError: there is no such command or directory.
    """

    def __init__(self, options: ProcessOptions, *, key: str = "process") -> None:
        if options.cwd is not None and not Path(options.cwd).expanduser().is_dir():
            raise ConfigError(f"{key}.cwd", f"no directory {options.cwd!r}")
        self._options = options
        self._cwd = os.getcwd() if options.cwd is None else str(Path(options.cwd).expanduser().resolve())
        own = {name: value for name, value in os.environ.items() if not name.startswith("TRIO_GATEWAY_")}
        self._env = {**own, **options.env}
        program = options.command[0]
        # A path is relative to where the process will run, a bare name is looked up in the PATH that it will have.
        path = os.path.join(self._cwd, program) if "/" in program else program
        found = shutil.which(path, path=self._env.get("PATH"))
        if found is None:
            raise ConfigError(f"{key}.command", f"no executable {program!r}; install it, or give its full path")
        self._argv = [found, *options.command[1:]]

    async def __call__(self, turn: Turn) -> None:
        process = await self._start()
        run = _Run(turn, process, self._options)
        try:
            async with trio.open_nursery() as nursery:
                run.nursery = nursery
                nursery.start_soon(run.write_stdin)
                nursery.start_soon(run.log_stderr)
                nursery.start_soon(run.await_exit)
                if self._options.steer and not self._options.close_stdin:
                    nursery.start_soon(run.pass_steered)
                await run.read_stdout()
                nursery.cancel_scope.cancel()
        finally:
            grace = self._options.grace_ms / 1000
            # Every wait in it has a limit; this one only says so to the reader.
            with trio.move_on_after(grace + 2 * KILL_PATIENCE, shield=True):
                await run.end(grace)
        if run.failure is not None:
            raise run.failure
        run.check_exit()

    async def _start(self) -> trio.Process:
        try:
            return await trio.lowlevel.open_process(
                self._argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=self._cwd,
                env=self._env,
                start_new_session=True,  # a process group of its own, so that its children end with it
            )
        except OSError as exc:
            _log.error("agent_process_not_started", command=self._argv[0], error=str(exc))
            raise TurnFailed(FAILED, "the agent's command cannot be started", retryable=True) from None


@define(eq=False)
class _Run:
    """One process at work for one turn."""

    turn: Turn
    process: trio.Process
    options: ProcessOptions
    nursery: trio.Nursery = field(init=False)
    exited: trio.Event = field(factory=trio.Event)
    failure: TurnFailed | None = None
    _log: Any = field(init=False)
    _group_empty: bool = False
    _asked: int = 0
    _line: int = 0
    _lines_in: trio.MemorySendChannel[Any] = field(init=False)
    _lines_out: trio.MemoryReceiveChannel[Any] = field(init=False)
    _reading: set[trio.CancelScope] = field(factory=set)
    _stderr_read: trio.Event = field(factory=trio.Event)

    _handlers: ClassVar[dict[type[Any], Callable[[_Run, Any], Awaitable[object]]]] = {
        _Delta: lambda run, line: run.turn.send(line.text, line.channel),
        _Output: lambda run, line: run.turn.output(line.content, line.channel, line.metadata),
        _Progress: lambda run, line: run.turn.progress(line.key, line.data),
        _ToolCall: lambda run, line: run.turn.tool_call(line.name, line.arguments, line.call_id),
        _ToolResult: lambda run, line: run.turn.tool_result(line.call_id, line.result, line.is_error),
        _State: lambda run, line: run.turn.update_state(line.patch),
        _Custom: lambda run, line: run.turn.custom(line.name, line.data),
    }

    def __attrs_post_init__(self) -> None:
        self._lines_in, self._lines_out = trio.open_memory_channel(STDIN_LINES)
        self._log = _log.bind(
            session_id=self.turn.session_id, turn_id=self.turn.turn_id, command=self.options.command[0]
        )

    def fail(self, code: str, message: str, *, retryable: bool = False) -> None:
        """End the turn with this error; the first one counts."""
        if self.failure is None:
            self.failure = TurnFailed(code, message, retryable=retryable)
        self.nursery.cancel_scope.cancel()

    # stdin

    async def write_stdin(self) -> None:
        stdin = self.process.stdin
        assert stdin is not None
        turn = self.turn
        first = {
            "type": "turn",
            "turn_id": turn.turn_id,
            "session_id": turn.session_id,
            "subject": turn.subject,
            "attempt": turn.attempt,
            "inputs": [codec.to_builtins(event) for event in turn.inputs],
            "transcript": [codec.to_builtins(event) for event in turn.transcript[-self.options.max_history :]],
            "state": turn.state,
        }
        # A process that has read enough may close its stdin. What is written after that is of no use to anyone.
        with suppress(trio.BrokenResourceError):
            async with stdin:
                await stdin.send_all(codec.dump_json(first) + b"\n")
                if self.options.close_stdin:
                    return
                async for line in self._lines_out:
                    await stdin.send_all(codec.dump_json(line) + b"\n")
        async for _ in self._lines_out:
            pass

    async def pass_steered(self) -> None:
        while True:
            for event in self.turn.steered():
                await self._lines_in.send({"type": "steered", "input": codec.to_builtins(event)})
            await trio.sleep(STEER_INTERVAL)

    # stdout

    async def read_stdout(self) -> None:
        """Act on what the process says, until it has exited and everything is read."""
        assert self.process.stdout is not None
        splitter = _LineSplitter(self.options.max_line_bytes)
        chunk = b"any"
        while chunk:
            chunk = await self._receive(self.process.stdout)
            for raw in splitter.feed(chunk):
                self._line += 1
                if raw is None:
                    self._refuse(f"is longer than {self.options.max_line_bytes:,} bytes")
                elif raw.strip():
                    await self._take(raw)
                if self.failure is not None:
                    return
        with trio.move_on_after(EXIT_PATIENCE):
            await self.exited.wait()
        if not self.exited.is_set():
            self.fail(FAILED, "the agent's command closed its output but did not exit", retryable=True)
        # What it said last on stderr is often why it ended.
        await self._stderr_read.wait()

    async def _receive(self, stream: trio.abc.ReceiveStream) -> bytes:
        """The next bytes. The end, too, when the process is gone and a child it left behind holds the pipe silently."""
        with trio.CancelScope() as scope:
            self._reading.add(scope)
            self._hurry(scope)
            try:
                return bytes(await stream.receive_some(64 * 1024))
            finally:
                self._reading.discard(scope)
        return b""

    def _hurry(self, scope: trio.CancelScope) -> None:
        # A time limit on the silence, not on the reading: what was said before the exit may take long to pass on.
        scope.deadline = trio.current_time() + EXIT_PATIENCE if self.exited.is_set() else inf

    async def _take(self, raw: bytes) -> None:
        try:
            tag, fields = codec.read_object(codec.parse_json(raw))
            cls = _LINES.get(tag)
            if cls is None:
                self._refuse(f"has an unknown type; expected one of {', '.join(_LINES)}")
                return
            line = codec.structure(fields, cls)
        except FrameError as exc:
            self._refuse(f"is no message: {exc.message}")
            return
        if isinstance(line, _Error):
            self.fail(line.code[:64] or FAILED, line.message[:2000], retryable=line.retryable)
        elif isinstance(line, _Ask):
            if self.options.close_stdin:
                self._refuse("asks, but its stdin was closed (option close_stdin)")
                return
            if line.timeout is not None and not 0 <= line.timeout <= MAX_ASK_SECONDS:
                self._refuse(f"field 'timeout': expected 0 to {MAX_ASK_SECONDS:,} seconds")
                return
            self._asked += 1
            # Ends with its answer, its time-out or the turn.
            self.nursery.start_soon(self._ask, line, line.ask_id or str(self._asked), self._line)
        else:
            try:
                await self._handlers[cls](self, line)
            except ValueError as exc:
                self._refuse(f"was refused: {exc}")

    async def _ask(self, ask: _Ask, ask_id: str, number: int) -> None:
        try:
            value = await self.turn.ask(ask.kind, ask.prompt, ask.options, ask.timeout)
        except ValueError as exc:
            self._refuse(f"was refused: {exc}", number)
            return
        await self._lines_in.send({"type": "answered", "ask_id": ask_id, "value": value})

    def _refuse(self, why: str, number: int | None = None) -> None:
        number = number or self._line
        self._log.error("agent_process_protocol", line=number, why=why)
        # The reason may quote what the process wrote, so the client gets the place only.
        self.fail(BAD_LINE, f"line {number} of the agent's command is no message of the process protocol")

    # stderr

    async def log_stderr(self) -> None:
        assert self.process.stderr is not None
        splitter = _LineSplitter(4 * MAX_STDERR_CHARS)
        chunk, count = b"any", 0
        try:
            while chunk:
                chunk = await self._receive(self.process.stderr)
                for raw in splitter.feed(chunk):
                    count += 1
                    if count <= MAX_STDERR_LINES:
                        text = "(a very long line)" if raw is None else raw.decode("utf-8", "replace").rstrip()
                        self._log.info("agent_stderr", text=text[:MAX_STDERR_CHARS])
        finally:
            self._stderr_read.set()
            if count > MAX_STDERR_LINES:
                self._log.info("agent_stderr_cut", lines=count, logged=MAX_STDERR_LINES)

    # its end

    async def await_exit(self) -> None:
        await self.process.wait()
        self.exited.set()
        for scope in self._reading:
            self._hurry(scope)
        # Children that it left behind would hold the pipes open. They end with it, with the same grace.
        self._signal(signal.SIGTERM)
        await trio.sleep(self.options.grace_ms / 1000)
        self._signal(signal.SIGKILL)

    async def end(self, grace: float) -> None:
        """End what is left of the process group, within `grace` seconds and a little; called shielded."""
        if self.process.returncode is None:
            self._signal(signal.SIGTERM)
            with trio.move_on_after(grace):
                await self.process.wait()
        self._signal(signal.SIGKILL)  # its children as well
        with trio.move_on_after(KILL_PATIENCE):
            await self.process.wait()
        if self.process.returncode is None:
            self._log.error("agent_process_not_ended", pid=self.process.pid)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            await stream.aclose()

    def _signal(self, number: signal.Signals) -> None:
        # The process's number is not given to another while its group has members, waited for or not. An empty group
        # stays empty, so it is never signalled again.
        if not self._group_empty:
            try:
                os.killpg(self.process.pid, number)
            except (ProcessLookupError, PermissionError):  # the latter is what macOS says of a group of zombies
                self._group_empty = self.process.returncode is not None

    def check_exit(self) -> None:
        """Raise `TurnFailed` if the process ended with an error."""
        code = self.process.returncode
        if code is None or code == 0:
            return
        how = f"exit code {code}"
        if code < 0:
            with suppress(ValueError):
                how = f"signal {signal.Signals(-code).name}"
        raise TurnFailed(FAILED, f"the agent's command ended with {how}", retryable=True)


@define
class _LineSplitter:
    """Bytes in, lines out. A line over `limit` bytes comes out once, as None, and is not collected."""

    limit: int
    _rest: bytearray = field(factory=bytearray, init=False)
    _too_long: bool = field(default=False, init=False)

    def feed(self, chunk: bytes) -> list[bytes | None]:
        """Take the next bytes, empty at the end of the stream, where the last line needs no newline."""
        lines: list[bytes | None] = []
        *ends, tail = chunk.split(b"\n") if chunk else (b"", b"")
        for end in ends:
            self._add(end, lines)
            if not self._too_long and (chunk or self._rest):
                lines.append(bytes(self._rest))
            self._rest.clear()
            self._too_long = False
        self._add(tail, lines)
        return lines

    def _add(self, piece: bytes, lines: list[bytes | None]) -> None:
        if not self._too_long:
            self._rest += piece
            if len(self._rest) > self.limit:
                self._too_long = True
                self._rest.clear()
                lines.append(None)
