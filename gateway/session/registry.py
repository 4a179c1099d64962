"""Which sessions are in memory: joining one, bringing one back, putting idle ones to rest.

One session object per id, always: whoever asks for a session that is just being brought back waits for that one. That
is what "at most one turn per session" rests on, whatever alias, client or recovery path asks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import structlog
import trio
from attrs import frozen

from gateway.config import Limits
from gateway.errors import HandshakeRefused, StoreError, StoreFenced, StoreUnavailable
from gateway.protocol.log import Tails
from gateway.protocol.messages import Hello
from gateway.session.failures import leaves
from gateway.session.publisher import NUMBER_BLOCK, Pacer
from gateway.session.session import Agent, Session
from gateway.session.sources import Sources
from gateway.store import SessionRecord, Store

RESUME_RETRY = 1.0
"""Seconds between tries to bring back what a crash left unfinished, while there is no room or no store."""

_log = structlog.get_logger(__name__)


@frozen
class Registered:
    """An agent as the gateway runs it."""

    agent: Agent
    max_detached_ms: int = 0
    retry_lost: bool = False


class Registry:
    """The gateway's sessions.

    Args:
        nursery: the gateway's; it owns every session.
        may_share: whether a subject may use a session of another subject: a grant (DESIGN property 19).
        pacer: decides when what agents write is published (see `Publisher`).
        on_fenced: told, perhaps again and again, that another process has become the writer of the store.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        agents: Mapping[str, Registered],
        store: Store,
        limits: Limits,
        sources: Sources,
        *,
        may_share: Callable[[str, SessionRecord], bool] = lambda subject, record: False,
        pacer: Pacer | None = None,
        on_fenced: Callable[[StoreFenced], None] = lambda exc: None,
    ) -> None:
        self._nursery = nursery
        self._agents = agents
        self._store = store
        self._limits = limits
        self._sources = sources
        self._may_share = may_share
        self._pacer = pacer
        self._on_fenced = on_fenced
        self._sessions: dict[str, Session] = {}
        self._opening: dict[str, trio.Event] = {}
        self._tails = Tails(limits.tail_max_bytes, limits.all_tails_max_bytes)
        self._trimmed = self._tails.share
        """What a session could hold when all were last told to keep to their share."""
        self._reserved = 0  # sessions that are about to be in memory
        self.draining = False

    def __contains__(self, session_id: object) -> bool:
        """Whether a session is in memory, or on its way there: then nobody may remove it from the store."""
        return session_id in self._sessions or session_id in self._opening

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def sessions(self) -> Mapping[str, Session]:
        """The sessions in memory, by id."""
        return self._sessions

    def begin_drain(self) -> None:
        """From now on no session takes an input or starts a turn."""
        self.draining = True
        for session in self._sessions.values():
            session.draining = True

    async def join(self, hello: Hello, subject: str) -> tuple[Session, bool]:
        """Find, bring back or create the session a client asks for. Also says whether it existed before.

        The caller attaches to it without an await in between, or it may be put to rest. Cancelling is safe.

        Raises:
            HandshakeRefused: no such agent, not this subject's session, the store or the memory has no room.
        """
        registered = self._agents.get(hello.agent_id)
        if registered is None:
            names = ", ".join(sorted(self._agents))
            raise HandshakeRefused(
                "agent_not_found",
                f"field 'agent_id': {hello.agent_id[:80]!r} is not served here",
                close_code=4404,
                next_step=f"Use one of: {names}.",
            )
        session_id = hello.session_id
        if session_id is None:
            return await self._create(f"s_{self._sources.new_id()}", hello.agent_id, registered, subject), False
        session, existed = await self._find(session_id), True
        if session is None:
            with self._alone(session_id):
                session = await self._bring_back(session_id)
                if session is None:
                    existed = False
                    session = await self._create(session_id, hello.agent_id, registered, subject)
        record = session.record
        if record.subject != subject and not self._may_share(subject, record):
            raise HandshakeRefused(
                "forbidden",
                "field 'session_id': this session belongs to someone else",
                close_code=4403,
                next_step="Use a session of your own, or leave session_id out to get a new one.",
            )
        if record.agent_id != hello.agent_id:
            raise HandshakeRefused(
                "forbidden",
                f"field 'agent_id': this session belongs to the agent {record.agent_id!r}",
                close_code=4403,
                next_step="Name that agent, or use another session.",
            )
        return session, existed

    async def resume_unfinished(self) -> None:
        """Bring back every session that has work left from before: an open turn, or waiting inputs.

        Four at a time: enough to keep the store busy, too few to delay those who connect now.
        """
        while True:
            try:
                unfinished = deque(await self._store.unfinished())
                break
            except StoreUnavailable as exc:
                _log.error("sessions_not_resumed_yet", error=str(exc))
                await trio.sleep(RESUME_RETRY)

        async def work() -> None:
            while unfinished and not self.draining:
                session_id = unfinished.popleft()
                if not await self._resume(session_id):
                    unfinished.append(session_id)  # behind the others: it may be alone with its trouble
                    await trio.sleep(RESUME_RETRY)

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                # Owned by this call; ends when the sessions, or the gateway's time, are up.
                nursery.start_soon(work)

    async def _resume(self, session_id: str) -> bool:
        """Bring one session back, if nobody has. False: there is no room or no store now, try again later."""
        try:
            if await self._find(session_id) is None:
                with self._alone(session_id):
                    await self._bring_back(session_id)
        except HandshakeRefused as exc:
            if exc.retryable:
                _log.warning("session_not_resumed_yet", session_id=session_id, error=exc.message)
                return False
            _log.error("session_not_resumed", session_id=session_id, error=exc.message)
        except Exception as exc:
            # What is stored for one session may be beyond repair; the others are not to suffer for it.
            _log.error("session_not_resumed", session_id=session_id, exc_info=exc)
        return True

    async def _find(self, session_id: str) -> Session | None:
        """The session, if it is in memory; waits for one that is on its way. No await after that."""
        while True:
            if (opening := self._opening.get(session_id)) is not None:
                await opening.wait()
                continue
            session = self._sessions.get(session_id)
            if session is None or session.recovered.is_set():
                return session
            # Whoever brought it back was cancelled before it had recovered.
            await session.recovered.wait()

    @contextmanager
    def _alone(self, session_id: str) -> Iterator[None]:
        """Keep everyone else who asks for this session waiting, and keep it from being put to rest."""
        done = self._opening[session_id] = trio.Event()
        try:
            yield
        finally:
            del self._opening[session_id]
            done.set()

    def rest_idle(self) -> None:
        """Put the sessions to rest that have had nothing to do for ``idle_session_ms``. No await here."""
        self._trim()
        limit = trio.current_time() - self._limits.idle_session_ms / 1000
        for session_id, session in list(self._sessions.items()):
            if session.idle_since <= limit and self._may_rest(session):
                self._rest(session_id)

    def _may_rest(self, session: Session) -> bool:
        return session.at_rest and session.record.session_id not in self._opening

    def _rest(self, session_id: str) -> None:
        self._sessions.pop(session_id).close()
        self._tails.divide(len(self._sessions))

    def _trim(self) -> None:
        """Have every session keep to its share of what may be in memory."""
        self._trimmed = self._tails.share
        for session in self._sessions.values():
            session.log.let_go()

    async def _create(self, session_id: str, agent_id: str, registered: Registered, subject: str) -> Session:
        record = SessionRecord(session_id, agent_id, subject, f"e_{self._sources.new_id()}", self._sources.now_ms())
        with self._room():
            try:
                await self._store.create(record, NUMBER_BLOCK)
            except StoreError as exc:
                self._notice_fence(exc)
                raise unavailable(str(exc)) from None
        return self._start(
            Session(
                record,
                registered.agent,
                self._store,
                self._limits,
                self._sources,
                reserved=NUMBER_BLOCK,
                max_detached_ms=registered.max_detached_ms,
                tails=self._tails,
                on_failed=self._failed,
                start=self._run_soon,
                pacer=self._pacer,
            )
        )

    async def _bring_back(self, session_id: str) -> Session | None:
        limits = self._limits
        if self.draining:
            raise HandshakeRefused(
                "draining",
                "the gateway is stopping",
                close_code=1012,
                close_reason="restart",
                next_step="Reconnect in a moment.",
                retryable=True,
                retry_after_ms=1_000,
            )
        with self._room():
            try:
                stored = await self._store.load(
                    session_id,
                    max_events=limits.replay_max_events,
                    max_bytes=limits.replay_max_bytes,
                    tail_bytes=self._tails.share,
                )
            except StoreError as exc:
                raise unavailable(str(exc)) from None
        # No await from here to `_start`: the room that was kept is taken, or not needed.
        if stored is None:
            return None
        registered = self._agents.get(stored.record.agent_id)
        if registered is None:
            raise HandshakeRefused(
                "agent_not_found",
                f"the session's agent {stored.record.agent_id!r} is not served any more",
                close_code=4404,
                next_step="Start the gateway with that agent, or use a new session.",
            )
        session = self._start(
            Session(
                stored.record,
                registered.agent,
                self._store,
                limits,
                self._sources,
                reserved=stored.reserved,
                stored=stored,
                max_detached_ms=registered.max_detached_ms,
                retry_lost=registered.retry_lost,
                tails=self._tails,
                on_failed=self._failed,
                start=self._run_soon,
                pacer=self._pacer,
            )
        )
        await session.recovered.wait()
        if session.failed:
            raise unavailable("the session could not be recovered")
        return session

    @contextmanager
    def _room(self) -> Iterator[None]:
        """Keep room for one session while it is made; if there is none, the session idle for longest goes to rest."""
        if len(self._sessions) + self._reserved >= self._limits.max_sessions:
            self.rest_idle()
        if len(self._sessions) + self._reserved >= self._limits.max_sessions:
            resting = [session for session in self._sessions.values() if self._may_rest(session)]
            if resting:
                self._rest(min(resting, key=lambda session: session.idle_since).record.session_id)
        if len(self._sessions) + self._reserved >= self._limits.max_sessions:
            raise HandshakeRefused(
                "too_many_sessions",
                f"{self._limits.max_sessions:,} sessions are active (limits.max_sessions)",
                close_code=1013,
                close_reason="overloaded",
                next_step="Try again later.",
                retryable=True,
                retry_after_ms=5_000,
            )
        self._reserved += 1
        try:
            yield
        finally:
            self._reserved -= 1

    def _start(self, session: Session) -> Session:
        session.draining = self.draining
        self._sessions[session.record.session_id] = session
        self._tails.divide(len(self._sessions))
        if 2 * self._tails.share < self._trimmed:
            self._trim()  # in between, `rest_idle` does it: all of them at each new session would be too often
        if session.busy or not session.recovered.is_set():
            session.start()  # with work left from before
        return session

    def _run_soon(self, session: Session) -> None:
        # Owned by the gateway's nursery; ends when the session is put to rest, or with the gateway.
        self._nursery.start_soon(self._run, session)

    async def _run(self, session: Session) -> None:
        """The crash barrier of one session: what fails in it ends it alone."""
        try:
            await session.run()
        # `except*`: while the gateway is cancelled, a failure comes in one group with that.
        except* Exception as group:
            self._failed(session, group)

    def _failed(self, session: Session, exc: Exception) -> None:
        """Forget a session that has failed, so that it is loaded anew, and tell its connections. No await here."""
        _log.error("session_failed", session_id=session.record.session_id, exc_info=exc)
        if self._sessions.get(session.record.session_id) is session:
            del self._sessions[session.record.session_id]
            self._tails.divide(len(self._sessions))
        for reader in list(session.readers.values()):
            reader.session_failed()
        self._notice_fence(exc)

    def _notice_fence(self, exc: Exception) -> None:
        for one in leaves(exc):
            if isinstance(one, StoreFenced):
                self._on_fenced(one)


def unavailable(why: str) -> HandshakeRefused:
    """The refusal of a client whose session cannot be read or written now."""
    return HandshakeRefused(
        "unavailable",
        f"the store cannot be used: {why}",
        close_code=1011,
        close_reason="internal",
        next_step="Try again later.",
        retryable=True,
        retry_after_ms=1_000,
    )
