"""``trio-gateway chat``: a conversation with an agent, at a terminal or through pipes.

Four tasks share a `Chat`: one shows what the session says, one shows the state of the line, one sends what was
written, one waits for signals. The body of the nursery reads lines and decides what each is: a command, the answer to
an open ask, or a message.

At a terminal a message goes out at once, whatever runs. From a pipe, lines are taken one at a time: the next message
waits until the turn before it has ended, so that a line can answer what the agent asks.
"""

from __future__ import annotations

import os
import signal
import sys
import uuid
from collections import deque
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from functools import partial

import click
import trio

from gateway.cli.address import complete_url, trusting
from gateway.cli.terminal import STDIN, Screen, open_lines, open_screen
from gateway.client import Session, open_session
from gateway.errors import ClientError, ConfigError, RequestRefused, SessionClosed, SessionRefused
from gateway.protocol.messages import (
    Answered,
    Ask,
    Delta,
    Event,
    Input,
    Output,
    Progress,
    Snapshot,
    ToolCall,
    TurnEnded,
    TurnStarted,
    Withdrawn,
)

DEFAULT_URL = "ws://127.0.0.1:8765/ws"

HISTORY = 400
"""Events of an earlier conversation shown on resuming: some screens, not the whole of a long life."""

FIRST_CONNECT_S = 5.0
"""Until then the gateway may still be starting; after it the likeliest reason is that none runs."""

UNSENT = 64
"""Lines typed ahead while the line is down."""

HELP = "/stop ends the answer, /stop all also what waits; /quit leaves"

_ENDINGS = {
    "aborted": "stopped",
    "interrupted": "interrupted",
    "timed_out": "the agent took too long and was stopped",
    "lost": "the gateway was restarted in the middle of this; send it again",
}

_YES, _NO = ("y", "yes", "true"), ("n", "no", "false")


@click.command()
@click.argument("url", default=DEFAULT_URL)
@click.option("--agent", default="echo", show_default=True, help="Which agent to talk to.")
@click.option("--session", "session_id", help="Resume this session, and show what was said.")
@click.option("--token", envvar="TRIO_GATEWAY_TOKEN", help="Who you are [also: TRIO_GATEWAY_TOKEN].")
@click.option("--ca", metavar="FILE", help="For wss://: trust the certificates in this PEM file, not the system's.")
@click.option("--history/--no-history", default=True, help="Whether resuming shows what was said before.")
def chat(url: str, agent: str, session_id: str | None, token: str | None, ca: str | None, history: bool) -> None:
    """Talk to an agent of a gateway.

    URL is the gateway's address, by default ws://127.0.0.1:8765/ws. Type a message and press Enter; /stop ends the
    answer, /stop all also what waits, /quit or Ctrl-C leaves. Lines of a pipe are sent one after the other.

    The exit code is 0, 1 if a piped message failed, 2 if there is no conversation to be had.
    """
    screen = open_screen()
    url = complete_url(url)
    try:
        connect = partial(open_session, url, agent, session_id=session_id, token=token, ssl_context=trusting(ca))
        code = trio.run(_main, screen, url, connect, history)
    except* KeyboardInterrupt:
        code = 0  # A second Ctrl-C, while leaving.
    except* BrokenPipeError:
        screen.discard()
        code = 0
    except* (ConfigError, ClientError) as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        click.echo(f"trio-gateway: {error}", err=True)
        code = 2
    sys.exit(code)


async def _main(
    screen: Screen, url: str, connect: Callable[[], AbstractAsyncContextManager[Session]], history: bool
) -> int:
    async with connect() as session:
        return await Chat(session, screen, url, history).run()


class Chat:
    """One conversation. Its tasks end when `_over` is cancelled, which is how the chat ends."""

    def __init__(self, session: Session, screen: Screen, url: str, history: bool) -> None:
        self._session = session
        self._screen = screen
        self._url = url
        self._history = history
        self._piped = not os.isatty(STDIN)
        self._code = 0
        self._refused: SessionRefused | None = None
        self._over = trio.CancelScope()
        self._changed = trio.Event()
        self._unsent, self._to_send = trio.open_memory_channel[str](UNSENT)
        self._sending = 0
        """Lines that are not accepted yet."""
        self._sent: set[str] = set()
        # Ours that have not been answered: request id → its `seq` once accepted, else None.
        self._mine: dict[str, int | None] = {}
        self._running: set[str] = set()
        """Request ids of the running turn, as far as events have been shown."""
        self._snapshot: tuple[int, set[str]] = (0, set())
        """Position of the last snapshot, and the request ids that were still waiting or running there."""
        # What was shown.
        self._shown = 0
        self._tail = ""
        self._channel = ""
        self._asked: set[str] = set()
        self._head: int | None = 0
        """Where history ends; None when that far was shown."""
        self._earlier: deque[Event] = deque(maxlen=HISTORY)

    async def run(self) -> int:
        """Converse until the user or the gateway ends it; returns the exit code."""
        with self._over:
            async with trio.open_nursery() as nursery:
                # All end with the nursery's scope: when the lines are over, or `_over` is cancelled.
                nursery.start_soon(self._obey_signals)
                nursery.start_soon(self._show_line)
                await self._join()
                nursery.start_soon(self._show_events)
                nursery.start_soon(self._send_all)
                await self._read_input()
                nursery.cancel_scope.cancel()
        # Leaving shows the cursor on a line of its own, and tells the gateway.
        self._screen.end_line()
        if self._refused is not None:
            raise self._refused
        await self._session.leave()
        if self._screen.interactive and self._session.session_id is not None:
            self._screen.note(f"left; come back with --session {self._session.session_id}")
        return self._code

    def _quit(self) -> None:
        self._over.cancel()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _join(self) -> None:
        with trio.move_on_after(FIRST_CONNECT_S):
            hello = await self._session.wait_joined()
            # What came before is history, up to here; it is shown as a whole.
            self._head = hello.head if hello.resumed else 0
            return
        why = self._session.connection.reason or "no answer"
        raise SessionRefused(
            "no_gateway", f"cannot connect to {self._url}: {why}", next_step="is it running? trio-gateway run"
        )

    async def _obey_signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for _ in signals:
                self._quit()
                return

    # --- what the user writes ---

    async def _read_input(self) -> None:
        self._prompt()
        with open_lines(STDIN) as lines:
            async for line in lines:
                self._screen.entered()
                if not await self._handle(line):
                    return
                self._prompt()
        if self._piped:
            await self._until(lambda: self._quiet or bool(self._open_asks))
            if self._open_asks:
                self._screen.note("the agent asks, and there is no more input to answer with")
                self._code = 1
                with suppress(RequestRefused):
                    await self._session.abort(scope="all")

    async def _handle(self, line: str) -> bool:
        """Do what a line says. Returns False to leave."""
        word = line.strip()
        if word == "/quit":
            return False
        if word in ("/stop", "/stop all"):
            if self._piped:
                await self._until(lambda: not self._sending)
            await self._stop("all" if word == "/stop all" else "turn")
        elif word:
            if self._piped:
                await self._until(lambda: self._quiet or bool(self._open_asks))
            if self._open_asks:
                await self._answer(self._open_asks[0], word)
            else:
                self._sending += 1
                try:
                    self._unsent.send_nowait(line)
                except trio.WouldBlock:
                    self._sending -= 1
                    self._screen.note("not sent: too much is waiting for the line")
        return True

    async def _stop(self, scope: str) -> None:
        try:
            await self._session.abort(scope="all" if scope == "all" else "turn")
        except RequestRefused as refused:
            nothing = refused.code == "no_active_turn"
            self._screen.note("nothing is running" if nothing else f"not stopped: {refused.message}")

    async def _answer(self, ask: Ask, word: str) -> None:
        value: object = word
        options = ask.options or []
        if ask.kind == "approval":
            if word.lower() not in (*_YES, *_NO):
                self._screen.note("y or n?")
                return
            value = word.lower() in _YES
        elif ask.kind == "choice":
            if word.isdecimal() and 1 <= int(word) <= len(options):
                value = options[int(word) - 1]
            elif word in map(str, options):
                value = options[[str(option) for option in options].index(word)]
            else:
                self._screen.note(f"a number from 1 to {len(options)}, or one of them in full?")
                return
        try:
            await self._session.answer(ask.ask_id, value)
        except RequestRefused as refused:
            self._screen.note(f"not answered: {refused.message}")
        # What it opens or closes is known once its event was shown.
        await self._until(lambda: ask.ask_id not in self._session.view.asks)

    @property
    def _open_asks(self) -> list[Ask]:
        # An ask that is met in the history may have been answered long ago.
        return list(self._session.view.asks.values()) if self._head is None else []

    async def _send_all(self) -> None:
        """Send what was written, one after the other: the line loop must not wait while the line is down."""
        async for text in self._to_send:
            request_id = uuid.uuid4().hex
            self._sent.add(request_id)
            self._mine[request_id] = None
            try:
                accepted = await self._session.send(text, request_id=request_id)
            except RequestRefused as refused:
                del self._mine[request_id]
                self._screen.note(f"not sent: {refused.message}")
                self._code = 1 if self._piped else 0
            except (SessionClosed, SessionRefused):
                return  # told by `_show_events`
            else:
                if request_id in self._mine:
                    self._mine[request_id] = accepted.seq
                    self._forget_answered()
            self._sending -= 1
            self._notify()

    async def _until(self, done: Callable[[], bool]) -> None:
        """Wait until `done()`; it is asked again whenever something was sent or shown."""
        while not done():
            await self._changed.wait()

    @property
    def _quiet(self) -> bool:
        """Nothing of ours is on its way or running, and all that was said is shown."""
        return not self._sending and not self._mine and self._head is None and self._session.view.turn is None

    def _prompt(self) -> None:
        if not self._piped and (self._quiet or self._open_asks):
            self._screen.prompt()

    # --- what the line does ---

    async def _show_line(self) -> None:
        joined = False
        async for state in self._session.connection_states():
            if state.phase == "joined":
                known = f"connected, session {self._session.session_id}"
                self._screen.note("resumed" if joined else f"{known}; {HELP}" if not self._piped else known)
                joined = True
            elif state.phase == "waiting" and joined:
                self._screen.note(f"{state.reason}; reconnecting in {max(1, round(state.seconds))} s")
            elif state.phase == "waiting" and state.attempt <= 2:
                self._screen.note(f"{state.reason}; waiting for a gateway")
            self._prompt()

    # --- what the session says ---

    async def _show_events(self) -> None:
        self._end_history()
        self._notify()
        self._prompt()
        try:
            async for item in self._session:
                if isinstance(item, Snapshot):
                    self._show_snapshot(item)
                elif self._head is not None:
                    self._earlier.append(item)
                else:
                    self._show(item)
                self._end_history()
                self._notify()
                self._prompt()
        except SessionRefused as refused:
            self._refused = refused
        self._quit()

    def _end_history(self) -> None:
        """When everything said before we joined has arrived, show the end of it."""
        if self._head is None or self._session.cursor < self._head:
            return
        self._head = None
        if self._history:
            for event in self._earlier:
                self._show(event)
        elif self._earlier:
            self._shown = self._earlier[-1].seq
        self._earlier.clear()
        self._ask_again()

    def _show_snapshot(self, snapshot: Snapshot) -> None:
        if self._head is not None:
            self._head = snapshot.cursor
            self._earlier.clear()
            self._earlier.extend(snapshot.transcript)
        else:
            if snapshot.reason in ("epoch_changed", "unknown_session"):
                self._screen.note("the gateway does not remember what was said before")
                self._shown = 0
            for event in snapshot.transcript:
                if event.seq > self._shown:
                    self._show(event)
        self._end_history()
        running = snapshot.turn
        if running is not None:
            self._catch_up("answer", running.channels.get("answer", ""))
        self._running = set(running.request_ids) if running is not None else set()
        self._snapshot = snapshot.cursor, self._running | {item.request_id for item in snapshot.queue}
        self._forget_answered()
        self._shown = max(self._shown, snapshot.cursor)
        self._ask_again()

    def _forget_answered(self) -> None:
        """What was accepted before the last snapshot, and was neither waiting nor running there, is over."""
        cursor, alive = self._snapshot
        for request_id, seq in list(self._mine.items()):
            if request_id not in alive and seq is not None and seq <= cursor:
                del self._mine[request_id]

    def _ask_again(self) -> None:
        for ask in self._open_asks:
            self._show_ask(ask)

    def _show(self, event: Event) -> None:
        self._shown = event.seq
        screen = self._screen
        match event:
            case Input() if event.request_id not in self._sent:
                screen.line(f"> {event.content}")
            case Delta() if event.channel == "answer" or screen.interactive:
                self._switch(event.channel)
                self._tail += event.text
                screen.text(event.text, dim=event.channel != "answer")
            case Output() if event.channel == "answer" or screen.interactive:
                self._catch_up(event.channel, event.content)
                self._tail = ""
            case ToolCall():
                screen.note(f"uses {event.name}")
            case Progress():
                screen.status(f"{event.key}: {event.data}")
            case Ask() if event.ask_id in self._session.view.asks:
                self._show_ask(event)
            case Answered():
                self._show_answered(event)
            case TurnStarted():
                screen.end_line()
                self._tail = self._channel = ""
                self._running = set(event.request_ids)
            case Withdrawn():
                self._show_withdrawn(event)
            case TurnEnded():
                self._show_end(event)

    def _switch(self, channel: str) -> None:
        if channel != self._channel:
            if self._channel:
                self._screen.end_line()
            self._channel, self._tail = channel, ""

    def _catch_up(self, channel: str, text: str) -> None:
        """Show what `text` says beyond what was streamed of it."""
        self._switch(channel)
        if not text.startswith(self._tail):
            self._screen.end_line()
            self._tail = ""
        self._screen.text(text[len(self._tail) :], dim=channel != "answer")
        self._tail = text

    def _show_ask(self, ask: Ask) -> None:
        if ask.ask_id in self._asked:
            return
        self._asked.add(ask.ask_id)
        if ask.kind == "approval":
            self._screen.line(f"? {ask.prompt} [y/n]")
        else:
            self._screen.line(f"? {ask.prompt}")
            for number, option in enumerate(ask.options or (), 1):
                self._screen.line(f"  {number}. {option}")

    def _show_answered(self, event: Answered) -> None:
        if event.ask_id in self._asked:
            self._asked.discard(event.ask_id)
            if event.outcome == "timed_out":
                self._screen.note("the agent has waited long enough for an answer")

    def _show_withdrawn(self, event: Withdrawn) -> None:
        if event.request_id in self._mine:
            if event.reason == "steered":
                self._running.add(event.request_id)
                return
            del self._mine[event.request_id]
            self._screen.note("a waiting message was withdrawn")

    def _show_end(self, event: TurnEnded) -> None:
        self._screen.end_line()
        self._tail = self._channel = ""
        ours = [self._mine.pop(request_id) for request_id in self._running if request_id in self._mine]
        if ours and self._piped and event.outcome in ("failed", "timed_out", "lost"):
            self._code = 1
        if event.outcome == "failed" and event.error is not None:
            self._screen.note(f"failed: {event.error.message}")
        elif event.outcome != "completed":
            self._screen.note(_ENDINGS.get(event.outcome, event.outcome))
