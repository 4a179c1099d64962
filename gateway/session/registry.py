"""Which sessions are in memory: joining one, bringing one back, putting idle ones to rest.

One session object per id, always: whoever asks for a session that is just being brought back waits for that one. That
is what "at most one turn per session" rests on, whatever alias, client or recovery path asks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import structlog
import trio
from attrs import frozen

from gateway.config import Limits
from gateway.errors import HandshakeRefused, StoreError
from gateway.protocol.messages import Hello
from gateway.session.publisher import NUMBER_BLOCK
from gateway.session.session import Agent, Session
from gateway.session.sources import Sources
from gateway.store import SessionRecord, Store

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
    ) -> None:
        self._nursery = nursery
        self._agents = agents
        self._store = store
        self._limits = limits
        self._sources = sources
        self._may_share = may_share
        self._sessions: dict[str, Session] = {}
        self._opening: dict[str, trio.Event] = {}
        self.draining = False

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
        while (opening := self._opening.get(session_id)) is not None:
            await opening.wait()
        session = self._sessions.get(session_id)
        existed = True
        if session is None:
            done = self._opening[session_id] = trio.Event()
            try:
                session = await self._bring_back(session_id)
                if session is None:
                    existed = False
                    session = await self._create(session_id, hello.agent_id, registered, subject)
            finally:
                del self._opening[session_id]
                done.set()
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
        limiter = trio.CapacityLimiter(4)

        async def resume(session_id: str) -> None:
            async with limiter:
                if session_id not in self._sessions and session_id not in self._opening:
                    done = self._opening[session_id] = trio.Event()
                    try:
                        await self._bring_back(session_id)
                    except (HandshakeRefused, StoreError) as exc:
                        _log.error("session_not_resumed", session_id=session_id, error=str(exc))
                    finally:
                        del self._opening[session_id]
                        done.set()

        async with trio.open_nursery() as nursery:
            for session_id in await self._store.unfinished():
                nursery.start_soon(resume, session_id)

    def rest_idle(self) -> None:
        """Put the sessions to rest that have had nothing to do for ``idle_session_ms``. No await here."""
        limit = trio.current_time() - self._limits.idle_session_ms / 1000
        for session_id, session in list(self._sessions.items()):
            if session.idle_since <= limit and session.at_rest:
                session.close()
                del self._sessions[session_id]

    async def _create(self, session_id: str, agent_id: str, registered: Registered, subject: str) -> Session:
        self._check_room()
        record = SessionRecord(session_id, agent_id, subject, f"e_{self._sources.new_id()}", self._sources.now_ms())
        try:
            await self._store.create(record, NUMBER_BLOCK)
        except StoreError as exc:
            raise _unavailable(str(exc)) from None
        return self._start(
            Session(
                record,
                registered.agent,
                self._store,
                self._limits,
                self._sources,
                reserved=NUMBER_BLOCK,
                max_detached_ms=registered.max_detached_ms,
            )
        )

    async def _bring_back(self, session_id: str) -> Session | None:
        limits = self._limits
        try:
            stored = await self._store.load(
                session_id, max_events=limits.replay_max_events, max_bytes=limits.replay_max_bytes
            )
        except StoreError as exc:
            raise _unavailable(str(exc)) from None
        if stored is None:
            return None
        self._check_room()
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
            )
        )
        await session.recovered.wait()
        return session

    def _check_room(self) -> None:
        if len(self._sessions) >= self._limits.max_sessions:
            self.rest_idle()
        if len(self._sessions) >= self._limits.max_sessions:
            raise HandshakeRefused(
                "too_many_sessions",
                f"{self._limits.max_sessions:,} sessions are active (limits.max_sessions)",
                close_code=1013,
                close_reason="overloaded",
                next_step="Try again later.",
                retryable=True,
                retry_after_ms=5_000,
            )

    def _start(self, session: Session) -> Session:
        session.draining = self.draining
        self._sessions[session.record.session_id] = session
        # Owned by the gateway's nursery; ends when the session is put to rest, or with the gateway.
        self._nursery.start_soon(self._run, session)
        return session

    async def _run(self, session: Session) -> None:
        """The crash barrier of one session: what fails in it ends it alone."""
        try:
            await session.run()
        except Exception as exc:
            _log.error("session_failed", session_id=session.record.session_id, exc_info=exc)
            if self._sessions.get(session.record.session_id) is session:
                del self._sessions[session.record.session_id]
            for reader in list(session.readers.values()):
                reader.session_failed()


def _unavailable(why: str) -> HandshakeRefused:
    return HandshakeRefused(
        "unavailable",
        f"the store cannot be used: {why}",
        close_code=1011,
        close_reason="internal",
        next_step="Try again later.",
        retryable=True,
        retry_after_ms=1_000,
    )
