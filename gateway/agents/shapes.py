"""One `Agent` out of whatever an application wrote.

========================================  ===========================================================================
``async def f(turn)``                     runs on trio; the text it returns, if any, becomes the turn's output
``async def f(turn)`` with ``yield``      every piece of text yielded is a delta
``def f(turn)``                           runs in a thread and gets a `SyncTurn`; returns text, if any
``def f(turn)`` with ``yield``            the same, yielding deltas
an object whose ``__call__`` is a shape   as that shape; one object serves every session
a class of such objects                   made once, when the agent is built
========================================  ===========================================================================

Threads cannot be cancelled from outside, so a synchronous agent ends in one of three ways: its function returns; its
next call of the turn (or `SyncTurn.check`) raises `trio.Cancelled`; or, `THREAD_GRACE` after the cancellation, it is
abandoned: the turn ends without it, everything it still says is refused, and it keeps its place under the limiter until
it returns, so abandoned threads cannot pile up unseen.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, closing, suppress
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import structlog
import trio
import trio.from_thread
import trio.to_thread
from attrs import define, field, frozen

from gateway.errors import AgentError, AgentLoadError

if TYPE_CHECKING:
    from gateway.protocol.messages import AskKind, Event, Input
    from gateway.session import Turn

_T = TypeVar("_T")
_log = structlog.get_logger(__name__)

THREAD_GRACE = 3.0
"""Seconds a cancelled thread may go on before it is abandoned: below ``limits.stop_timeout_ms`` (5 s), so that the
engine sees an agent that ended."""

Shape = Literal["async function", "async generator", "function", "generator"]


@frozen(eq=False)
class Agent:
    """What the engine runs: ``await agent(turn)`` returns the turn's final text, or None if everything was sent.

    Cancelling it ends the agent's work before it returns, within `THREAD_GRACE` for a thread. It raises what the agent
    raised, and `AgentError` when the agent returned or yielded something other than text.
    """

    name: str
    shape: Shape
    run: Callable[[Turn], Awaitable[str | None]] = field(repr=False)

    def __call__(self, turn: Turn) -> Awaitable[str | None]:
        return self.run(turn)


def as_agent(obj: object, *, name: str, limiter: trio.CapacityLimiter | None = None) -> Agent:
    """Make an agent of a function, a callable object or a class (see the module's table).

    Args:
        name: for messages and logs.
        limiter: bounds the threads of synchronous agents; None shares trio's default limiter.

    Raises:
        AgentLoadError: `obj` is no agent. The message says what was expected.
    """
    if isinstance(obj, Agent):
        return Agent(name=name, shape=obj.shape, run=obj.run)
    if inspect.isclass(obj):
        obj = _make_instance(obj, name)
    if not callable(obj):
        raise AgentLoadError(
            f"agent {name!r}: expected a function, a class or a callable object, got {type(obj).__name__}"
        )
    shape = _shape_of(obj)
    _check_takes_turn(obj, name)
    run: Callable[[Turn], Awaitable[str | None]]
    if shape == "async function":
        run = functools.partial(_run_function, name, obj)
    elif shape == "async generator":
        run = functools.partial(_run_generator, name, obj)
    else:
        run = functools.partial(_run_in_thread, name, obj, limiter)
    return Agent(name=name, shape=shape, run=run)


def _make_instance(cls: type, name: str) -> object:
    # `callable(cls)` is true of every class; what counts is whether its instances are.
    if not any("__call__" in base.__dict__ for base in cls.__mro__):
        raise AgentLoadError(f"agent {name!r}: class {cls.__name__} has no 'async def __call__(self, turn)'")
    try:
        return cls()
    except Exception as exc:
        raise AgentLoadError(
            f"agent {name!r}: {cls.__name__}() failed: {type(exc).__name__}: {exc}; "
            "give it defaults, options in its [agents] table, or name an instance instead"
        ) from None


def _shape_of(obj: Callable[..., Any]) -> Shape:
    target: Any = obj
    while isinstance(target, functools.partial):
        target = target.func
    if isinstance(target, Agent):
        return "async function"
    if not (inspect.isroutine(target) or inspect.isclass(target)):
        target = type(target).__call__
        while isinstance(target, functools.partial | functools.partialmethod):
            target = target.func
    if inspect.isasyncgenfunction(target):
        return "async generator"
    if inspect.iscoroutinefunction(target):
        return "async function"
    return "generator" if inspect.isgeneratorfunction(target) else "function"


def _check_takes_turn(obj: Callable[..., Any], name: str) -> None:
    try:
        signature = inspect.signature(obj)
    except (ValueError, TypeError):
        return  # written in C, or hides it: the first turn will tell
    try:
        signature.bind(None)
    except TypeError as exc:
        raise AgentLoadError(
            f"agent {name!r}: expected to be called with one argument, the turn; its signature is {signature}: {exc}"
        ) from None


def _check_text(name: str, value: object, verb: str) -> str:
    if isinstance(value, str):
        return value
    advice = ""
    if inspect.iscoroutine(value):
        value.close()
        advice = "; write it with 'async def'"
    elif inspect.isasyncgen(value) or isinstance(value, Iterator):
        advice = "; name the generator function itself"
    expected = "text" if verb == "yielded" else "text or None"
    raise AgentError(f"agent {name!r} {verb} {type(value).__name__}, expected {expected}{advice}")


async def _run_function(name: str, function: Callable[..., Awaitable[object]], turn: Turn) -> str | None:
    result = await function(turn)
    return None if result is None else _check_text(name, result, "returned")


async def _run_generator(name: str, function: Callable[..., AsyncIterator[object]], turn: Turn) -> None:
    # Closed in this task, also when cancelled: what the generator opened does not wait for the garbage collector.
    async with aclosing(cast("Any", function(turn))) as pieces:
        async for piece in pieces:
            await turn.send(_check_text(name, piece, "yielded"))


# --- threads ---------------------------------------------------------------------------------------------------------


class SyncTurn:
    """A `Turn` for synchronous code: the same names, without ``await``, to be used in the agent's own thread only.

    Every method that writes raises `trio.Cancelled` once the turn is being stopped: let it pass. Code that computes for
    long without writing calls `check` now and then.
    """

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self._calls: set[trio.CancelScope] = set()
        self._stopping = False

    @property
    def input(self) -> Input:
        return self._turn.input

    @property
    def inputs(self) -> tuple[Input, ...]:
        return self._turn.inputs

    @property
    def transcript(self) -> tuple[Event, ...]:
        return trio.from_thread.run_sync(lambda: self._turn.transcript)

    @property
    def state(self) -> dict[str, Any]:
        return trio.from_thread.run_sync(lambda: self._turn.state)

    @property
    def session_id(self) -> str:
        return self._turn.session_id

    @property
    def turn_id(self) -> str:
        return self._turn.turn_id

    @property
    def subject(self) -> str:
        return self._turn.subject

    @property
    def attempt(self) -> int:
        return self._turn.attempt

    def check(self) -> None:
        """Raise `trio.Cancelled` if the turn is being stopped; else do nothing."""
        trio.from_thread.check_cancelled()

    def steered(self) -> list[Input]:
        self.check()
        return trio.from_thread.run_sync(self._turn.steered)

    def send(self, text: str, channel: str = "answer") -> None:
        self._run(self._turn.send, text, channel)

    def reason(self, text: str) -> None:
        self._run(self._turn.reason, text)

    def output(self, content: str, channel: str = "answer", metadata: Mapping[str, Any] | None = None) -> None:
        self._run(self._turn.output, content, channel, metadata)

    def progress(self, key: str, data: Any) -> None:
        self._run(self._turn.progress, key, data)

    def tool_call(self, name: str, arguments: Any = None, call_id: str | None = None) -> str:
        return self._run(self._turn.tool_call, name, arguments, call_id)

    def tool_result(self, call_id: str, result: Any = None, is_error: bool = False) -> None:
        self._run(self._turn.tool_result, call_id, result, is_error)

    def custom(self, name: str, data: Any = None) -> None:
        self._run(self._turn.custom, name, data)

    def update_state(self, patch: Mapping[str, Any]) -> None:
        self._run(self._turn.update_state, patch)

    def ask(
        self, kind: AskKind, prompt: str, options: Sequence[Any] | None = None, timeout: float | None = None
    ) -> Any:
        return self._run(self._turn.ask, kind, prompt, options, timeout)

    def _run(self, method: Callable[..., Awaitable[_T]], *args: Any) -> _T:
        self.check()
        done, result = trio.from_thread.run(self._call, method, args)
        if not done:
            self.check()
            raise AgentError("the turn is being stopped")  # unreachable: `stop` comes after the cancellation
        return cast("_T", result)

    async def _call(self, method: Callable[..., Awaitable[_T]], args: tuple[Any, ...]) -> tuple[bool, _T | None]:
        # Runs in a task of trio's, because the thread may be abandoned; so the turn's cancellation comes by `stop`.
        if self._stopping:
            return False, None
        scope = trio.CancelScope()
        self._calls.add(scope)
        try:
            with scope:
                return True, await method(*args)
        finally:
            self._calls.discard(scope)
        return False, None

    def _stop(self) -> None:
        self._stopping = True
        for scope in self._calls:
            scope.cancel()


@define(eq=False)
class _Thread:
    """Whether the thread has begun, decided under a lock by whoever comes first: it, or the cancellation."""

    lock: threading.Lock = field(factory=threading.Lock)
    begun: bool = False
    withdrawn: bool = False
    ended: trio.Event = field(factory=trio.Event)


async def _run_in_thread(
    name: str, function: Callable[..., object], limiter: trio.CapacityLimiter | None, turn: Turn
) -> str | None:
    facade = SyncTurn(turn)
    thread = _Thread()
    token = trio.lowlevel.current_trio_token()

    def work() -> str | None:
        with thread.lock:
            if thread.withdrawn:
                return None
            thread.begun = True
        try:
            result = function(facade)
            if not inspect.isgenerator(result):
                return None if result is None else _check_text(name, result, "returned")
            with closing(result):
                for piece in result:
                    facade.send(_check_text(name, piece, "yielded"))
            return None
        finally:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(thread.ended.set)

    try:
        return await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=limiter)
    except trio.Cancelled:
        facade._stop()
        with thread.lock:
            thread.withdrawn = not thread.begun
        if thread.begun:
            with trio.move_on_after(THREAD_GRACE, shield=True):
                await thread.ended.wait()
            if not thread.ended.is_set():
                _log.warning(
                    "sync_agent_abandoned",
                    agent=name,
                    session_id=turn.session_id,
                    turn_id=turn.turn_id,
                    hint="its thread still runs; call turn.check() in long computations, use time-outs for I/O",
                )
        raise
