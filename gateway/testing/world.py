"""A small world: one gateway (again and again), its disk, a few clients, and everything that can go wrong between them.

Theory of operation
-------------------
`World.perform` carries out one `Step` at once: it never waits, and what cannot be done now (a message of a client that
is not joined) does nothing. So a history is a list of steps with pauses between them, any part of such a list is a
history too, and the same list drives a state machine and a simulation.

A crash takes the process away as ``kill -9`` does: its lines end, nothing of it reaches the disk any more, its tasks
are cancelled, and the next process opens the same disk. What was committed is there; what was not is gone.

Everything that anyone sees is checked as it is seen, by `gateway.testing.model`. `World.come_to_rest` heals the world,
lets it calm down, and checks what must be true then.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import trio
from attrs import asdict, define, evolve, field, frozen

from gateway.agents import as_agent
from gateway.config import Config, Limits, Server
from gateway.errors import ConnectionLost
from gateway.protocol import codec
from gateway.server import Gateway, Identity, open_gateway
from gateway.server.auth import unauthorized
from gateway.session import Registered, Sources
from gateway.store import SessionRecord
from gateway.testing.actors import EXPECTED_CLOSES, LibraryClient, Link, RawClient
from gateway.testing.disk import KEPT_MS, Commit, Disk, DiskStore
from gateway.testing.model import History, Json, Violation, check_always, check_at_rest
from gateway.testing.praison_client import PraisonClient
from gateway.testing.scripted import ScriptedAgent
from gateway.transport.memory import MemoryByteStream, memory_pair

TIGHT = Limits(
    max_inbox=4,
    segment_bytes=256,
    replay_max_events=12,
    replay_max_bytes=64 * 1024,
    snapshot_max_events=8,
    max_buffered_bytes=2048,
    max_outbox=4,
    max_control_frames=32,
    heartbeat_ms=4_000,
    max_turn_ms=6_000,
    stop_timeout_ms=300,
    slow_grace_ms=200,
    send_timeout_ms=1_000,
    close_timeout_ms=400,
    handshake_timeout_ms=3_000,
    idle_session_ms=2_000,
)
"""Limits so small that a history of a few seconds meets every one of them."""

DEEP = evolve(TIGHT, replay_max_events=10_000, max_inbox=8, tail_max_bytes=1024)
"""A long history of which next to nothing is in memory: who comes back reads it from the disk."""

ROOMY = evolve(TIGHT, replay_max_events=10_000, max_inbox=64, snapshot_max_events=200, idle_session_ms=60_000)

FAR = 1 << 62
"""Above every number."""

CAPACITY = 4 * 1024
"""Bytes in flight on a line: small, so that a client that does not read blocks its connection."""

REST_SECONDS = 120.0
"""Time to calm down, besides what a turn for each message may take. It is virtual, and nothing is measured with it."""

PROMPT_SECONDS = 1.5
"""In which a ping is answered on a line without faults (whose delays add up to less than half of that)."""

SUBJECTS = {"s1": "alice", "s2": "bob"}
RAW = {"c1": "s1", "c2": "s1", "c3": "s2"}
LIBRARY = {"p1": "s1", "p2": "s2"}
PRAISON = {"d1": "s1", "d2": "s2"}
SESSIONS = {**RAW, **LIBRARY, **PRAISON}
"""Who is in which session: those who speak version 2 themselves, those who use the library, those of dialect 1."""


@frozen
class Step:
    """One thing that happens: after a pause of `after` ms, `who` does `do`, with `how`. JSON through and through."""

    do: str
    who: str = ""
    after: int = 0
    how: dict[str, Any] = field(factory=dict)

    def __str__(self) -> str:
        how = " ".join(f"{key}={value}" for key, value in self.how.items() if value not in (False, None, ""))
        return " ".join(part for part in (self.who, self.do, how) if part)

    def as_json(self) -> Json:
        return asdict(self)


@define(eq=False)
class Process:
    """One life of the gateway."""

    number: int
    store: DiskStore
    scope: trio.CancelScope = field(factory=trio.CancelScope)
    purging: trio.CancelScope = field(factory=trio.CancelScope)
    gateway: Gateway | None = None
    drain: trio.Event = field(factory=trio.Event)
    drained: bool = False
    ended: trio.Event = field(factory=trio.Event)


class World:
    """Everything that is simulated. Lives inside a trio run with a virtual clock.

    Args:
        nursery: owns all tasks of the world.
        seed: for what the gateway takes by chance, and for its clock's jitter.
        on_lost: what becomes of turns that a crash cut off: ``end`` or ``retry``.
        agent: anything `gateway.open_gateway` takes; by default a `ScriptedAgent`.
        texts: with an agent that follows no scripts: what clients send instead of them, one after the other.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        *,
        seed: int = 0,
        limits: Limits = TIGHT,
        on_lost: str = "end",
        agent: Any = None,
        texts: Sequence[str] = (),
    ) -> None:
        self._nursery = nursery
        self._texts = itertools.cycle(texts) if texts else None
        self._random = random.Random(seed)
        self._ids = itertools.count(1)
        self.limits = limits
        self.on_lost = on_lost
        self.agent = agent or ScriptedAgent(self)
        self._registered = Registered(
            as_agent(self.agent, name="agent"), limits.max_detached_ms, retry_lost=on_lost == "retry"
        )
        self.started_at = trio.current_time()
        self.trace: list[str] = []
        self.disk = Disk(
            max_events=limits.replay_max_events, max_bytes=limits.replay_max_bytes, on_commit=self._on_commit
        )
        self.histories: dict[str, History] = {}
        self._epochs: dict[tuple[str, str], History] = {}
        self._shared = {name: History(name, "") for name in SUBJECTS}
        self._running: dict[str, list[str]] = {}
        self.process: Process | None = None
        self._lives = 0
        self._links: list[Link] = []
        self.delay = 0.0
        self.resting = False
        self.injected_failures = 0
        self.auth_delay = 0.0
        self._strangers = self._purges = 0
        self._marked: dict[object, int] = {}
        """Sessions in memory that somebody of dialect 1 has joined: how long their logs were then."""
        self.raw = {name: RawClient(self, name, session, SUBJECTS[session]) for name, session in RAW.items()}
        for name, session in PRAISON.items():
            self.raw[name] = PraisonClient(self, name, session, SUBJECTS[session], joins=name == "d2")
        self.library = {
            name: LibraryClient(self, name, session, SUBJECTS[session]) for name, session in LIBRARY.items()
        }

    # what its inhabitants use

    def note(self, who: str, what: str) -> None:
        """Add a line to the trace: virtual ms, who, what."""
        at = round((trio.current_time() - self.started_at) * 1000)
        self.trace.append(f"{at:>7} {who:<6} {what}")

    def chance(self) -> float:
        return self._random.random()

    def spawn(self, function: Callable[..., Awaitable[Any]], *args: Any) -> None:
        self._nursery.start_soon(function, *args)

    def history(self, session_id: str, epoch: str) -> History:
        """The history of a session's epoch; raises `Violation` if that never was."""
        found = self._epochs.get((session_id, epoch))
        if found is None:
            raise Violation("numbers_belong_to_a_history", (14,), f"{session_id} never had the epoch {epoch}")
        return found

    def new_link(self) -> Link:
        """A line to the gateway, for a client.

        Raises:
            ConnectionLost: no process is there.
        """
        process = self.process
        if process is None or process.gateway is None or process.drained:
            raise ConnectionLost(1006, "nobody listens")
        client, server = memory_pair(capacity=CAPACITY, peer=f"peer{len(self._links)}")
        process.gateway.serve(server)
        link = Link(client)
        link.delay(self.delay)
        self._links.append(link)
        return link

    def remember(self, session_id: str, request_id: str, content: str, on_busy: str) -> None:
        """A client of the library sends a message, perhaps before there is a session."""
        shared = self._shared[session_id]
        shared.sent.setdefault(request_id, []).append(content)
        shared.modes.setdefault(request_id, set()).add(on_busy)
        if on_busy == "interrupt":
            shared.causes["interrupt"] += 1

    def cause(self, session_id: str, what: str) -> None:
        """Note what may end a turn of a session."""
        self._shared[session_id].causes[what] += 1

    def _cause_everywhere(self, what: str) -> None:
        for session_id in self._shared:
            self.cause(session_id, what)

    def was_accepted(self, session_id: str, request_id: str, seq: int) -> None:
        """The library says that a message was accepted. In which epoch it does not say, so only a match is taken."""
        history = self.histories.get(session_id)
        event = history.by_seq.get(seq) if history is not None else None
        if history is not None and event is not None and event.get("request_id") == request_id:
            history.told[request_id] = seq

    def agent_enters(self, history: History, turn_id: str) -> None:
        """Property 1, from the inside: no other agent runs in the session, but one whose turn has ended already."""
        over = {event["turn_id"] for event in history.log if event["type"] == "turn_ended"}
        running = self._running.setdefault(history.session_id, [])
        others = [other for other in running if other not in over]
        if others:
            raise Violation("one_agent_at_a_time", (1,), f"{turn_id} starts to run while {others} run")
        running.append(turn_id)

    def agent_leaves(self, history: History, turn_id: str) -> None:
        """An agent is done, whichever way."""
        running = self._running.get(history.session_id, [])
        if turn_id in running:
            running.remove(turn_id)

    def marks_of(self, session_id: str, head: int) -> tuple[object, int]:
        """Somebody of dialect 1 joins a session: the session as the present process has it in memory, and after which
        number it cannot have forgotten how answers were streamed."""
        process = self.process
        gateway = process.gateway if process is not None else None
        session = gateway.registry.sessions.get(session_id) if gateway is not None else None
        forgetful = self.limits.tail_max_bytes < TIGHT.tail_max_bytes
        return session, FAR if forgetful else self._marked.setdefault(session, head)

    def check_close(self, code: int, excused: bool) -> None:
        """A client's connection ended with `code`; it is `excused` if it was refused, or its token has expired."""
        if excused:
            return
        if code not in EXPECTED_CLOSES:
            raise Violation("well_behaved_clients_are_served", (20,), f"a connection was closed with {code}")
        if code == 1011 and not self.injected_failures:
            raise Violation("well_behaved_clients_are_served", (20,), "a session failed without a cause")

    # its gateway

    def _on_commit(self, commit: Commit) -> None:
        session_id = commit.session_id
        if commit.record is not None:
            self.note("disk", f"{session_id} is created, {commit.record.epoch}")
            self._adopt(commit.record, commit.reserved)
            return
        if commit.purged:
            self.note("disk", f"{session_id} is purged")
            del self.histories[session_id]
            return
        events = [json.loads(item.payload) for item in commit.batch]
        if events:
            what = ", ".join(f"{event['type']} {event['seq']}" for event in events)
            self.note("disk", f"{session_id} has {what}")
        self.histories[session_id].commit(events, commit.reserved)

    def _adopt(self, record: SessionRecord, reserved: int) -> None:
        # What clients have sent and what the agent did stays true, whatever the disk forgets.
        shared = self._shared[record.session_id]
        history = History(
            record.session_id,
            record.epoch,
            reserved=reserved,
            max_turn_ms=self.limits.max_turn_ms,
            retries=self.on_lost == "retry",
            sent=shared.sent,
            modes=shared.modes,
            work=shared.work,
            causes=shared.causes,
        )
        self.histories[record.session_id] = history
        self._epochs[record.session_id, record.epoch] = history

    async def _authenticate(self, token: str | None) -> Identity:
        """A token is a subject's name, or ``NAME@MS``: until then."""
        await trio.lowlevel.checkpoint()
        if self.auth_delay:
            await trio.sleep(self.auth_delay)
        subject, _, until = (token or "").partition("@")
        if subject not in (*SUBJECTS.values(), "mallory"):
            raise unauthorized("who is this?")
        return Identity(subject, int(until) if until else None)

    def start(self) -> None:
        """Start a process, if none is there."""
        if self.process is None:
            self._lives += 1
            self.process = Process(self._lives, self.disk.open())
            self.spawn(self._live, self.process)

    async def _live(self, process: Process) -> None:
        sources = Sources(
            now_ms=lambda: int(trio.current_time() * 1000),
            new_id=lambda: f"{next(self._ids):06}",
            chance=self.chance,
            # Some passes of the flusher look as if they took long, so that its pauses happen too.
            timer=lambda: trio.current_time() + self.chance() * 0.001,
        )
        config = Config(server=Server(drain_timeout_ms=1_500), limits=self.limits)
        with process.scope:
            async with open_gateway(
                config,
                {"agent": self._registered},
                store=process.store,
                authenticate=self._authenticate,
                sources=sources,
                listen=False,
            ) as gateway:
                process.gateway = gateway
                self.note("world", f"process {process.number} is up")
                await process.drain.wait()
                began = trio.current_time()
                await gateway.drain()
                process.drained = True
                self._check_drained(gateway, trio.current_time() - began)
            self.note("world", f"process {process.number} has drained")
            self._check_crashes(gateway)
        if self.process is process:
            self.process = None
        process.ended.set()

    def _check_drained(self, gateway: Gateway, seconds: float) -> None:
        limits = self.limits
        budget = 1.5 + limits.stop_timeout_ms / 1000 + 2 * limits.close_timeout_ms / 1000 + 2.5
        if seconds > budget:
            raise Violation("drain_is_bounded", (16,), f"it took {seconds:.1f} s, the bound is {budget:.1f} s")
        if gateway.joined:
            raise Violation("drain_is_bounded", (16,), "connections are left")

    def _check_crashes(self, gateway: Gateway) -> None:
        closes = gateway.statistics().closes
        if closes:
            self.note("world", "it closed " + ", ".join(f"{why} x{count}" for why, count in sorted(closes.items())))
        if gateway.crashed_connections:
            raise Violation("connections_do_not_crash", (20,), f"{gateway.crashed_connections} did; see the log")

    def crash(self, lose: int = 0, cut: bool = True) -> None:
        """Kill the process. `lose`: how many of its newest commits the disk turns out not to have."""
        process, self.process = self.process, None
        if process is None:
            return
        self._cause_everywhere("crash")
        if process.gateway is not None:
            self._check_crashes(process.gateway)
        for link in self._links:
            if cut:
                link.cut()
            else:
                link.end()
        self.disk.kill()
        process.scope.cancel()
        process.purging.cancel()
        self._running.clear()
        if lose:
            self._lose(lose)

    def _lose(self, count: int) -> None:
        self.disk.lose(count)
        self.histories = {}
        for commit in self.disk.commits:
            if commit.record is not None:
                self._adopt(commit.record, commit.reserved)
            elif commit.purged:
                del self.histories[commit.session_id]
            else:
                events = [json.loads(item.payload) for item in commit.batch]
                self.histories[commit.session_id].commit(events, commit.reserved)
        self.note("world", f"the disk has lost {count} commits")

    # what happens

    def perform(self, step: Step) -> None:
        """Carry out a step, at once."""
        if step.do == "send" and self._texts is not None:
            step = evolve(step, how={**step.how, "script": next(self._texts)})
        self.note("world", str(step))
        if step.who in self.raw:
            self._perform_raw(self.raw[step.who], step)
        elif step.who in self.library:
            self._perform_library(self.library[step.who], step)
        else:
            getattr(self, f"_do_{step.do}")(**step.how)

    def _perform_raw(self, client: RawClient, step: Step) -> None:
        do, how = step.do, step.how
        if do == "join":
            self._join(client, **how)
        elif do == "send":
            client.send(**how)
        elif do == "abort":
            client.abort(**how)
        elif do == "answer":
            client.answer(**how)
        elif do == "refresh":
            client.refresh(**how)
        elif do in ("ping", "resync", "leave", "signal", "stop"):
            client.say(do)
        elif client.wire is not None:
            self._fault(client.wire.link, do, how)

    def _join(self, client: RawClient, lifetime: int = 0) -> None:
        try:
            client.connect(self.new_link(), lifetime)
        except ConnectionLost as exc:
            self.note(client.name, str(exc))

    def _perform_library(self, client: LibraryClient, step: Step) -> None:
        do, how = step.do, step.how
        if do == "open":
            if not client.opened:
                client.opened = True
                self.spawn(client.run)
        elif client.session is None:
            return
        elif do == "send":
            client.send(**how)
        elif do == "abort":
            client.abort(**how)
        elif do == "answer":
            client.answer(**how)
        elif do == "resync":
            client.resync()
        elif do == "sulk":
            client.sulk()
        elif do == "take":
            client.go_on()
        elif client.link is not None:
            self._fault(client.link, do, how)

    def _fault(self, link: Link, do: str, how: Json) -> None:
        if do == "cut":
            link.cut()
        elif do == "stall":
            link.stall()
        elif do == "unstall":
            link.go_on()
        elif do == "truncate":
            link.truncate(**how)
        else:
            raise AssertionError(f"no such step: {do}")

    def _do_start(self) -> None:
        self.start()

    def _do_wait(self) -> None:
        pass

    def _do_crash(self, lose: int = 0, cut: bool = True) -> None:
        self.crash(lose, cut)
        self.start()

    def _do_drain(self) -> None:
        if self.process is not None and self.process.gateway is not None:
            self._cause_everywhere("drain")
            self.process.drain.set()
            self.spawn(self._restart, self.process)

    async def _restart(self, process: Process) -> None:
        await process.ended.wait()
        self.start()

    def _do_disk(self, before: int = 0, after: int = 0, full: bool = False) -> None:
        self.disk.before, self.disk.after, self.disk.full = before / 1000, after / 1000, full

    def _do_break(self) -> None:
        self.disk.broken += 1
        self.injected_failures += 1
        self._cause_everywhere("failure")

    def _do_auth(self, delay: int = 0) -> None:
        """From now on the authenticator takes so long."""
        self.auth_delay = delay / 1000

    def _do_purge(self) -> None:
        """All that is stored has become old, and is purged if nobody uses it."""
        # A stranger may have a name that is free again, and would keep everyone else out.
        if self.process is not None and self.process.gateway is not None and not (self._strangers or self._purges):
            self._purges += 1
            self.spawn(self._purge, self.process, self.process.gateway)

    async def _purge(self, process: Process, gateway: Gateway) -> None:
        try:
            with process.purging:
                now = int(trio.current_time() * 1000) + 2 * KEPT_MS
                await process.store.purge(now=now, in_use=gateway.registry)
        finally:
            self._purges -= 1
            process.purging = trio.CancelScope()

    def _do_lines(self, delay: int = 0) -> None:
        self.delay = delay / 1000

    def _do_garbage(self, data: str = "") -> None:
        """Somebody sends bytes that are no WebSocket, or no protocol."""
        try:
            link = self.new_link()
        except ConnectionLost:
            return
        self.spawn(_babble, link.stream, data.encode("latin-1"))

    def _do_stranger(self, session_id: str = "s1") -> None:
        """Somebody who knows a session's id, and is not its subject, wants to join it."""
        if session_id in self.histories and not self._purges:
            try:
                stranger = Stranger(self, session_id, self.new_link())
            except ConnectionLost:
                return
            self._strangers += 1
            self.spawn(self._let_in, stranger)

    async def _let_in(self, stranger: Stranger) -> None:
        try:
            await stranger.run()
        finally:
            self._strangers -= 1

    # looking at it

    def check(self) -> None:
        """What must hold at any time. Raises `Violation`."""
        for history in self.histories.values():
            check_always(history)
        self.check_clients()

    def check_clients(self) -> None:
        """What must hold of connections at any time. Raises `Violation`."""
        now = trio.current_time()
        for client in self.raw.values():
            wire = client.wire
            if wire is not None and client.joined and wire.link.healthy:
                for item in wire.pending:
                    if item.kind == "ping" and now - item.since > PROMPT_SECONDS:
                        raise Violation("pings_do_not_wait", (7,), f"{client.name} waits for {now - item.since:.1f} s")
                if wire.outlives_its_token(now):
                    raise Violation("tokens_end", (19,), f"{client.name} is there on a token until {wire.expires}")

    async def come_to_rest(self) -> None:
        """Heal everything, let it calm down, and check what must be true then. Raises `Violation`."""
        self.note("world", "all faults end")
        self.resting = True
        self.check()
        self.disk.before = self.disk.after = self.delay = self.auth_delay = 0.0
        self.disk.full, self.disk.broken = False, 0
        for link in self._links:
            link.go_on()
        self.start()
        for library in self.library.values():
            library.go_on()
        messages = sum(len(shared.sent) for shared in self._shared.values())
        turns = messages * (self.limits.max_turn_ms + self.limits.stop_timeout_ms) / 1000
        deadline = trio.current_time() + REST_SECONDS + turns
        while trio.current_time() < deadline:
            await trio.sleep(0.5)
            if self._calm_down():
                break
        self.check()
        for history in self.histories.values():
            check_at_rest(history)
        self._check_settled()
        self.note("world", "at rest")

    def _calm_down(self) -> bool:
        """Join whoever is not joined and send again what was not answered. True when nothing is left to do."""
        self.start()
        calm = True
        for client in self.raw.values():
            if not client.joined and (client.wire is None or client.wire.over):
                self._join(client)
            elif client.joined and client.wire is not None:
                waiting = {item.key for item in client.wire.pending}
                for frame in list(client.unanswered.values()):
                    if frame["request_id"] not in waiting:
                        client.resend(frame)
            calm &= client.settled
        calm &= all(client.settled for client in self.library.values())
        gateway = self.process.gateway if self.process is not None else None
        if gateway is None or not calm:
            return False
        now = gateway.statistics()
        agreed = all(client.cursor >= history.head for history in self.histories.values() for client in history.clients)
        return not now.turns and not now.queued_inputs and agreed

    def _check_settled(self) -> None:
        for client in self.raw.values():
            wire = client.wire
            if wire is None or not client.joined:
                raise Violation("everyone_can_come_back", (15, 20), f"{client.name} could not join")
            if wire.credit == 0:
                raise Violation(
                    "room_is_told", (6,), f"{client.name} was told that there is no room, not that there is"
                )
            for item in wire.pending:
                raise Violation(
                    "every_request_is_answered", (6,), f"{client.name} waits for its {item.kind} {item.key}"
                )
            for request_id in client.unanswered:
                raise Violation("every_request_is_answered", (6,), f"{request_id} of {client.name} was never accepted")
        for library in self.library.values():
            if not library.settled:
                raise Violation("every_request_is_answered", (6,), f"a send of {library.name} never returned")
        assert self.process is not None
        assert self.process.gateway is not None
        gateway = self.process.gateway
        self._check_crashes(gateway)
        now = gateway.statistics()
        if now.turns or now.queued_inputs:
            raise Violation(
                "busy_is_the_live_task", (2, 3), f"{now.turns} turns and {now.queued_inputs} inputs are left"
            )
        for session in gateway.registry.sessions.values():
            inbox = session._inbox
            if inbox.held or inbox.held_bytes:
                left = f"{inbox.held} inputs of {inbox.held_bytes} bytes"
                raise Violation("room_comes_back", (3, 12), f"{session.record.session_id} keeps room for {left}")

    async def end(self) -> None:
        """Drain the last process and check that nothing of it is left."""
        process = self.process
        assert process is not None
        self._cause_everywhere("drain")
        process.drain.set()
        with trio.move_on_after(60):
            await process.ended.wait()
        if not process.ended.is_set():
            raise Violation("drain_is_bounded", (16,), "the last process did not end within a minute")


async def _babble(stream: MemoryByteStream, data: bytes) -> None:
    try:
        await stream.send_all(data)
        with trio.move_on_after(2):
            while await stream.receive_some():
                pass
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass
    finally:
        await stream.aclose()


class Stranger:
    """A client that must be refused."""

    def __init__(self, world: World, session_id: str, link: Link) -> None:
        self._world = world
        self._session_id = session_id
        self._link = link

    async def run(self) -> None:
        """Try to join; raises `Violation` if that works, or shows anything."""
        from gateway.testing.actors import URL, _frames, _leaf
        from gateway.transport.dial import dial

        hello = {"type": "hello", "protocol_min": 2, "protocol_max": 2, "agent_id": "agent", "since": 0}
        hello |= {"session_id": self._session_id, "token": "mallory"}
        try:
            async with dial(URL, stream=self._link.stream, close_timeout=0.5) as ws:
                await ws.send(json.dumps(hello).encode())
                while True:
                    for frame in _frames(await ws.receive()):
                        if frame["type"] != "hello_error":
                            raise Violation("an_id_is_no_key", (19,), f"a stranger got {frame}")
                        self._world.note("mallory", f"<- hello_error {frame['code']}")
        except* ConnectionLost as group:
            self._world.note("mallory", f"lost: {_leaf(group)}")


codec.structure_all()
