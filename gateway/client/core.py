"""The client without its I/O: frames in, effects and frames out. No clock, no randomness, no await.

Theory of operation
-------------------
Three positions in the log, each behind the one before it:

    the gateway's head  ≥  received (`_tracker`)  ≥  taken (`cursor`)

*Received* is what a reconnect asks to continue from; between it and *taken* lies the buffer. *Taken* is what the user
has been given by ``async for``; `view`, `text_of` and `cursor` tell the state exactly there, so that what a user
persists and what a user sees agree with what the user has handled.

The buffer is bounded. When it is full, reading stops, and TCP slows the gateway down, which may close us as a slow
consumer; then we resume once there is room. One case must not wait for room: a request whose answer is behind the
unread events, made by the very task that would take them. While a request waits, reading goes on and events that do
not fit are *dropped and fetched again* (`overflow`): the received position stays where the buffer ends, and when the
user has made room, a new connection continues from there. The log is the buffer; ours is only a window on it.

Requests and a broken line. What was never written simply waits. What was written and not answered is

- a `message`: written again under its `request_id`, which the gateway accepts once;
- an `answer`: written again; `unknown_ask` then means success if the log says that we answered;
- an `abort` that names a turn or an input: written again; `no_active_turn` then means that it is over;
- any other `abort`: refused with ``connection_lost``. Repeated, it could stop what was not meant;
- a `signal`: dropped, it is ephemeral. A `resync`: written again.

The gateway's replies to `abort` and `answer` carry nothing to tell two of a kind apart, so one of each is in flight.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from math import inf
from typing import Any

from gateway.client.buffer import Buffer
from gateway.client.states import Effect, Joined, Noticed, Request, Retry, Settled, Statistics
from gateway.client.texts import TurnTexts
from gateway.errors import ClientError, FrameError, RequestRefused, SessionRefused
from gateway.protocol import codec
from gateway.protocol import messages as m
from gateway.protocol.cursor import Backoff, CursorTracker
from gateway.protocol.view import SessionView

PROTOCOL = 2

TERMINAL = {
    1000: ("left", "the gateway ended the session's connection"),
    1003: ("unsupported", "only text messages are spoken here"),
    1008: ("protocol_violation", "the gateway takes us for a broken client"),
    1009: ("payload_too_large", "a message was larger than the other side takes"),
    4400: ("invalid_hello", "the gateway does not understand our opening"),
    4401: ("unauthorized", "the token is missing, wrong or expired"),
    4403: ("forbidden", "this session belongs to someone else, or this origin may not connect"),
    4404: ("agent_not_found", "the gateway has no agent of this name"),
    4406: ("protocol_unsupported", "the gateway speaks other versions of the protocol"),
}
"""Close code → what it means, where reconnecting does not help (PROTOCOL section 9)."""

UNAUTHORIZED = ("unauthorized", "token_expired")

STABLE_S = 10.0
"""A connection that stayed joined for so long was good: the next delay starts small again."""

CREDIT_PROBE_S = 5.0
"""The gateway says when there is room again; if that never comes, one message is tried after so long."""

RETRY_S = 1.0
"""Before a refused message is tried again, when the gateway named no time."""

DOUBT_S = 1.0
"""What an `answered` takes at most from being decided to being in the log, with a slow disk."""

MAX_ANSWERS = 64
"""`answered` events remembered to tell whose answer counted; more asks than that are not open at once."""


class ClientCore:
    """Everything a session knows and decides. The caller does the I/O that it asks for."""

    def __init__(
        self,
        agent_id: str,
        *,
        session_id: str | None = None,
        since: int = 0,
        epoch: str | None = None,
        capabilities: tuple[str, ...] = ("batch",),
        client: m.ClientInfo | None = None,
        buffer_events: int = 1024,
        buffer_bytes: int = 4 * 1024 * 1024,
        keep_turns: int = 32,
        can_refresh: bool = False,
        backoff: Backoff | None = None,
    ) -> None:
        self.agent_id = agent_id
        self.session_id = session_id
        self.cursor = since
        self.epoch = epoch
        self.view = SessionView()
        self.view.cursor = since
        self.hello: m.HelloOk | None = None
        self.joined = False
        self.left = False
        self._capabilities = list(capabilities)
        self._client = client
        self._can_refresh = can_refresh
        self._backoff = backoff or Backoff()
        self._texts = TurnTexts(keep_turns)
        self._buffer = Buffer(buffer_events, buffer_bytes)
        self._tracker = CursorTracker(since, epoch)
        # Of the connection that is open now.
        self._refusal: m.HelloError | None = None
        self._joined_at = inf
        self._awaiting_snapshot = False
        self._overflow = False
        self._pong: m.Pong | None = None
        self._credit = 0
        self._credit_at = -inf
        # Of all connections.
        self._hint_ms = 0
        self._tokens_refused = 0
        self._connection_ids: list[str] = []
        self._answers: OrderedDict[str, m.Answered] = OrderedDict()
        self._seen = 0
        """The highest ``seq`` that arrived, kept or not."""
        # Requests, in the order they were made.
        self._messages: dict[str, Request] = {}
        self._controls: list[Request] = []
        self._doubts: list[tuple[Request, m.Error, float]] = []
        """Repeated answers that the gateway does not know, and when they are given up.

        They are told apart from wrong ones by their `answered`, which may still be on its way into the log.
        """
        self._hold_until = -inf
        self._request_backoff = Backoff(base=RETRY_S)
        self._counts = dict.fromkeys(
            ("joins", "events", "snapshots", "gaps", "duplicates", "overflows", "refused_frames"), 0
        )
        self._handlers: dict[type, Callable[[Any, float], list[Effect]]] = {
            m.HelloOk: self._on_hello_ok,
            m.Accepted: self._on_accepted,
            m.Aborted: lambda frame, now: self._reply(m.Abort, frame),
            m.AnswerOk: lambda frame, now: self._reply(m.Answer, frame),
            m.Credit: self._on_credit,
            m.Signal: lambda frame, now: [Noticed(frame)],
            m.Presence: lambda frame, now: [Noticed(frame)],
            m.Left: self._on_left,
            m.ServerPing: self._on_ping,
            m.Error: self._on_error,
            m.GoAway: self._on_goaway,
        }

    # --- what the caller asks ---

    @property
    def refused(self) -> bool:
        """A `hello_error` has come; only the close code is missing."""
        return self._refusal is not None

    @property
    def attempt(self) -> int:
        """Of connecting, from 1, since the line was last good."""
        return self._backoff.attempt + 1

    @property
    def wants_input(self) -> bool:
        """Whether to go on reading: there is room, or someone waits for an answer."""
        return not self._buffer.full or self._has_requests

    @property
    def wants_fresh_line(self) -> bool:
        """Dropped events can be fetched now, by a new connection. It waits for an abort, which must not be repeated."""
        return self._overflow and self._buffer.roomy and self._in_flight(m.Abort) is None

    @property
    def _has_requests(self) -> bool:
        return bool(self._messages) or any(not request.abandoned for request in self._controls)

    def statistics(self) -> Statistics:
        return Statistics(
            **self._counts,
            reconnects=max(0, self._counts["joins"] - 1),
            buffered=len(self._buffer),
            buffered_bytes=self._buffer.size,
        )

    def text_of(self, turn_id: str, channel: str) -> str:
        return self._texts.of(turn_id, channel)

    def take(self) -> m.Event | m.Snapshot | None:
        """The next item for the user, or None; `cursor`, `view` and the texts move with it."""
        item = self._buffer.take()
        if isinstance(item, m.Snapshot):
            self._texts.restore(item, same_epoch=item.epoch == self.epoch)
            self.view.restore(item)
            self.cursor, self.epoch = item.cursor, item.epoch
        elif item is not None:
            assert item.seq > self.cursor, "the user is never given an event twice"
            self.view.apply(item)
            self._texts.apply(item)
            self.cursor = item.seq
        return item

    # --- a connection's life ---

    def open(self, token: str | None) -> bytes:
        """A new connection is there: the `hello` to send first."""
        self.joined = False
        self._refusal = None
        self._joined_at = inf
        self._awaiting_snapshot = self._overflow = False
        self._pong = None
        return codec.encode_frame(
            m.Hello(
                protocol_min=PROTOCOL,
                protocol_max=PROTOCOL,
                agent_id=self.agent_id,
                session_id=None if self.session_id is None else m.SessionId(self.session_id),
                since=self._tracker.cursor,
                epoch=self._tracker.epoch,
                token=token,
                capabilities=self._capabilities,
                client=self._client,
            )
        )

    def close(self) -> list[Effect]:
        """The connection is gone, whoever ended it: decide about the requests that were on it."""
        effects: list[Effect] = []
        self.joined = False
        self._overflow = False
        for request in self._messages.values():
            request.repeated |= request.written
            request.written = False
        self._controls += [doubt[0] for doubt in self._doubts]
        self._doubts.clear()
        for request in list(self._controls):
            if isinstance(request.frame, m.ClientSignal | m.Leave):
                effects += self._settle(request, result=False)
            elif request.written and not _repeatable(request.frame):
                effects += self._refuse(
                    request, "connection_lost", "the line broke before the answer; it may have been carried out"
                )
            elif request.abandoned:
                effects += self._settle(request)
            else:
                request.repeated |= request.written
                request.written = False
        return effects

    def judge(
        self, code: int, reason: str, *, now: float, chance: float, status: int | None = None
    ) -> Retry | SessionRefused:
        """Decide what a lost connection means: come back after a while, or never.

        Args:
            code, reason: of the close, 1006 if none came.
            now: seconds.
            chance: a random number in 0..1, for the jitter.
            status: of HTTP, if the upgrade was refused.
        """
        refusal, self._refusal = self._refusal, None
        if now - self._joined_at >= STABLE_S:
            self._backoff.reset()
        self._joined_at = inf
        unauthorized = code == 4401 or (refusal is not None and refusal.code in UNAUTHORIZED)
        if unauthorized and self._can_refresh and self._tokens_refused == 0:
            self._tokens_refused += 1
        elif refusal is not None and not refusal.retryable and code != 4429:
            close_code = None if code == 1006 else code
            return SessionRefused(refusal.code, refusal.message, close_code=close_code, next_step=refusal.next_step)
        elif code in TERMINAL and (refusal is None or not refusal.retryable):
            name, meaning = TERMINAL[code]
            if reason.isidentifier():
                name, reason = reason, ""
            return SessionRefused(name, reason or meaning, close_code=code)
        elif status is not None and 400 <= status < 500 and status not in (408, 425, 429) and self.hello is None:
            return SessionRefused("upgrade_refused", reason, next_step="Check the URL and its path.")
        hint_ms = max(self._hint_ms, (refusal and refusal.retry_after_ms) or 0)
        self._hint_ms = 0
        said = refusal.message if refusal is not None else reason
        said = said or ("the line broke" if code == 1006 else f"closed with {code}")
        return Retry(self._backoff.delay(chance, hint_ms / 1000), said)

    def receive(self, raw: bytes, now: float) -> list[Effect]:
        """Take in one text message of the gateway.

        Raises:
            FrameError: it is not of this protocol; the connection is of no use any more.
        """
        frames = codec.decode_server(raw)
        # Judged once per message, so that the buffer's bound is exceeded by one message at most.
        fits = not self._buffer.full
        effects: list[Effect] = []
        for frame in frames:
            if not self.joined and not isinstance(frame, m.HelloOk | m.HelloError | m.GoAway):
                if self._refusal is not None:
                    continue
                raise FrameError("invalid_frame", f"expected hello_ok or hello_error first, got {frame.type}")
            size = len(raw) // len(frames)
            if isinstance(frame, m.Event):
                self._on_event(frame, size, fits)
            elif isinstance(frame, m.Snapshot):
                effects += self._on_snapshot(frame, size)
            elif isinstance(frame, m.HelloError):
                self._refusal = frame
            elif (handler := self._handlers.get(type(frame))) is not None:
                effects += handler(frame, now)
        if self._doubts:
            effects += self._resolve_doubts(now)
        return effects

    # --- the log ---

    def _on_event(self, event: m.Event, size: int, fits: bool) -> None:
        self._seen = max(self._seen, event.seq)
        if isinstance(event, m.Answered):
            self._remember(event)
        if self._awaiting_snapshot or self._overflow:
            return
        if not fits:
            self._overflow = True
            self._counts["overflows"] += 1
            return
        verdict = self._tracker.offer(event)
        if verdict == "new":
            self._counts["events"] += 1
            self._buffer.put(event, size)
        elif verdict == "duplicate":
            self._counts["duplicates"] += 1
        else:
            self._counts["gaps"] += 1
            self._awaiting_snapshot = True
            self._controls.append(self._control(m.Resync(), abandoned=True))

    def _on_snapshot(self, snapshot: m.Snapshot, size: int) -> list[Effect]:
        self._counts["snapshots"] += 1
        self._seen = max(self._seen, snapshot.cursor)
        for event in snapshot.transcript:
            if isinstance(event, m.Answered):
                self._remember(event)
        # Whatever was missing or dropped before it, the snapshot stands for it.
        self._awaiting_snapshot = self._overflow = False
        self._tracker.reset(snapshot)
        self._buffer.put(snapshot, size)
        effects: list[Effect] = []
        for request in [r for r in self._controls if isinstance(r.frame, m.Resync) and r.written]:
            effects += self._settle(request, result=snapshot)
        return effects

    def _remember(self, event: m.Answered) -> None:
        self._answers[event.ask_id] = event
        if len(self._answers) > MAX_ANSWERS:
            self._answers.popitem(last=False)

    # --- frames without a number ---

    def _on_hello_ok(self, hello: m.HelloOk, now: float) -> list[Effect]:
        if self.joined:
            raise FrameError("invalid_frame", "a second hello_ok")
        self.joined = True
        self.hello = hello
        self.session_id = hello.session_id
        self._joined_at = now
        self._tokens_refused = 0
        self._counts["joins"] += 1
        self._connection_ids = [*self._connection_ids[-7:], hello.connection_id]
        self._credit, self._credit_at = hello.credit, now
        self._hold_until = -inf
        # The position of a snapshot is adopted with the snapshot, not before: the line may break between the two.
        self._awaiting_snapshot = hello.resync_required
        if not hello.resync_required and self._tracker.epoch != hello.epoch:
            self._tracker.epoch = self.epoch = hello.epoch
        return [Joined(hello)]

    def _on_ping(self, ping: m.ServerPing, now: float) -> list[Effect]:
        self._pong = m.Pong(nonce=ping.nonce)
        return []

    def _on_goaway(self, goaway: m.GoAway, now: float) -> list[Effect]:
        self._hint_ms = max(0, goaway.reconnect_after_ms)
        return []

    def _on_left(self, left: m.Left, now: float) -> list[Effect]:
        self.left = True
        return self._reply(m.Leave, True)

    def _on_credit(self, frame: m.Credit, now: float) -> list[Effect]:
        self._credit, self._credit_at = frame.credit, now
        if frame.credit > 0:
            self._hold_until = -inf
        return []

    def _on_accepted(self, frame: m.Accepted, now: float) -> list[Effect]:
        self._credit, self._credit_at = frame.credit, now
        self._request_backoff.reset()
        request = self._messages.get(frame.request_id)
        return self._settle(request, result=frame) if request is not None else []

    def _on_error(self, frame: m.Error, now: float) -> list[Effect]:
        message = self._messages.get(frame.request_id or "")
        if message is not None and message.written:
            return self._on_message_refused(message, frame, now)
        kinds: tuple[type, ...] = {
            "unknown_ask": (m.Answer,),
            "no_active_turn": (m.Abort,),
            "unknown_request": (m.Abort,),
        }.get(frame.code, (m.Answer, m.Abort, m.Resync))
        request = next((r for kind in kinds if (r := self._in_flight(kind)) is not None), None)
        if request is None:
            self._counts["refused_frames"] += 1
            return []
        if request.repeated and frame.code == "no_active_turn" and isinstance(request.frame, m.Abort):
            return self._settle(request, result=m.Aborted(turn_id=request.frame.turn_id, withdrawn=[]))
        if request.repeated and frame.code == "unknown_ask":
            self._controls.remove(request)
            self._doubts.append((request, frame, now + DOUBT_S))
            return []
        return self._refuse_by(request, frame)

    def _on_message_refused(self, request: Request, frame: m.Error, now: float) -> list[Effect]:
        if not frame.retryable or frame.code == "busy":
            return self._refuse_by(request, frame)
        # Nothing of it was stored: it goes out again as if for the first time, and nothing newer overtakes it.
        request.written = request.repeated = False
        hint = (frame.retry_after_ms or 0) / 1000
        if frame.code == "inbox_full":
            self._credit, self._credit_at = 0, now
            self._hold_until = now + (hint or RETRY_S)
        else:
            self._hold_until = now + self._request_backoff.delay(1.0, hint)
        return []

    def _resolve_doubts(self, now: float) -> list[Effect]:
        """`unknown_ask` for a repeated answer: it was taken the first time, if the log says that it was ours."""
        assert self.hello is not None
        effects: list[Effect] = []
        for doubt in list(self._doubts):
            request, frame, until = doubt
            assert isinstance(request.frame, m.Answer)
            answered = self._answers.get(request.frame.ask_id)
            if answered is None and (now < until or self._seen < self.hello.head):
                continue
            self._doubts.remove(doubt)
            if answered is not None and answered.by in self._connection_ids:
                effects += self._settle(request, result=m.AnswerOk(ask_id=request.frame.ask_id))
            else:
                effects += self._refuse_by(request, frame)
        return effects

    # --- requests ---

    def message(self, frame: m.Message) -> Request:
        """Make a request of a message; it goes out in its turn.

        Raises:
            RequestRefused: it cannot be sent at all, or its `request_id` is still waiting.
        """
        if not 1 <= len(frame.request_id) <= codec.MAX_REQUEST_ID:
            raise RequestRefused("invalid_frame", f"request_id: expected 1 to {codec.MAX_REQUEST_ID} characters")
        if frame.request_id in self._messages:
            raise RequestRefused("request_id_in_use", f"a send with request_id {frame.request_id!r} is still waiting")
        request = self._control(frame)
        self._messages[frame.request_id] = request
        return request

    def control(self, frame: m.Abort | m.Answer | m.ClientSignal | m.Resync | m.Leave) -> Request:
        """Make a request of anything but a message.

        Raises:
            RequestRefused: it cannot be sent at all.
        """
        request = self._control(frame)
        self._controls.append(request)
        return request

    def _control(self, frame: m.ClientFrame, *, abandoned: bool = False) -> Request:
        try:
            fields = codec.to_builtins(frame)
            return Request(frame, codec.check_json(fields), abandoned=abandoned)
        except ValueError as exc:
            raise RequestRefused("invalid_frame", f"it has no JSON form: {exc}") from None

    def forget(self, request: Request) -> None:
        """Its caller does not wait any more. What was not written never will be."""
        if request.settled:
            return
        request.abandoned = True
        if isinstance(request.frame, m.Message):
            self._messages.pop(request.frame.request_id, None)
        elif not request.written and request in self._controls:
            self._controls.remove(request)
        self._doubts = [doubt for doubt in self._doubts if doubt[0] is not request]

    def fail_all(self, error: Callable[[], ClientError]) -> list[Effect]:
        """The session is over: every request gets an error of its own."""
        effects: list[Effect] = []
        for request in [*self._messages.values(), *self._controls, *(doubt[0] for doubt in self._doubts)]:
            effects += self._settle(request, error=error())
        self._doubts.clear()
        return effects

    def outgoing(self, now: float) -> tuple[list[bytes], list[Effect], float]:
        """What to write now, in order; the effects of writing it; and when to ask again if nothing else happens."""
        if not self.joined:
            return [], [], inf
        payloads: list[bytes] = []
        effects: list[Effect] = []
        if self._pong is not None:
            payloads.append(codec.encode_frame(self._pong))
            self._pong = None
        for request in list(self._controls):
            kind = type(request.frame)
            if request.written or (kind in (m.Abort, m.Answer) and self._in_flight(kind) is not None):
                continue
            if not self._fits(request):
                effects += self._refuse_size(request)
                continue
            request.written = True
            payloads.append(request.payload)
            if kind is m.ClientSignal:
                effects += self._settle(request, result=True)
        effects += self._resolve_doubts(now)
        again = min(
            [self._write_messages(now, payloads, effects), *(max(now, until) + 0.1 for *_, until in self._doubts)]
        )
        return payloads, effects, again

    def _write_messages(self, now: float, payloads: list[bytes], effects: list[Effect]) -> float:
        """Append the messages that may go out, oldest first; a held one holds those behind it.

        Returns when to look again.
        """
        in_flight = sum(request.written for request in self._messages.values())
        for request in list(self._messages.values()):
            if request.written:
                continue
            if not self._fits(request):
                effects += self._refuse_size(request)
                continue
            # A repeated message needs no room: if it was accepted, its key answers for it.
            if not request.repeated:
                if now < self._hold_until:
                    return self._hold_until
                if self._credit - in_flight <= 0:
                    probe_at = self._credit_at + CREDIT_PROBE_S
                    if in_flight or now < probe_at:
                        return inf if in_flight else probe_at
                    self._credit_at = now
            request.written = True
            in_flight += 1
            payloads.append(request.payload)
        return inf

    def _fits(self, request: Request) -> bool:
        assert self.hello is not None
        return len(request.payload) <= self.hello.policy.max_payload

    def _refuse_size(self, request: Request) -> list[Effect]:
        # Sent, it would cost the whole connection (1009).
        assert self.hello is not None
        limit = self.hello.policy.max_payload
        return self._refuse(
            request, "payload_too_large", f"{len(request.payload):,} bytes; at most {limit:,} are taken"
        )

    def _in_flight(self, kind: type) -> Request | None:
        return next((r for r in self._controls if r.written and type(r.frame) is kind), None)

    def _reply(self, kind: type, result: Any) -> list[Effect]:
        request = self._in_flight(kind)
        return self._settle(request, result=result) if request is not None else []

    def _refuse(self, request: Request, code: str, message: str) -> list[Effect]:
        return self._settle(request, error=RequestRefused(code, message))

    def _refuse_by(self, request: Request, frame: m.Error) -> list[Effect]:
        error = RequestRefused(
            frame.code, frame.message, retryable=frame.retryable, retry_after_ms=frame.retry_after_ms
        )
        return self._settle(request, error=error)

    def _settle(self, request: Request, *, result: Any = None, error: ClientError | None = None) -> list[Effect]:
        if isinstance(request.frame, m.Message):
            self._messages.pop(request.frame.request_id, None)
        elif request in self._controls:
            self._controls.remove(request)
        request.settled, request.result, request.error = True, result, error
        return [Settled(request)]


def _repeatable(frame: m.ClientFrame) -> bool:
    """Whether writing it again can do no more than writing it once."""
    return not isinstance(frame, m.Abort) or frame.turn_id is not None or frame.request_id is not None
