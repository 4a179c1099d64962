"""A state machine of a whole gateway: its rules are what happens in the world, its oracle is `gateway.testing.model`.

    from gateway.testing.gateway_machine import GatewayMachine
    TestMyGateway = GatewayMachine.TestCase

The machine is a `hypothesis.stateful.RuleBasedStateMachine`; each rule is a step of `gateway.testing.world.World`,
carried out on a `gateway.testing.stage.Stage`, so a rule is over when every task is
blocked. Needs the extra ``testing``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from gateway.testing.determinism import scheduled_by
from gateway.testing.model import Violation
from gateway.testing.simulate import LIMITS, WORDS, first_violation
from gateway.testing.stage import Stage
from gateway.testing.world import LIBRARY, PRAISON, RAW, SESSIONS, Step, World

clients = st.sampled_from(list(SESSIONS))
raw_clients = st.sampled_from([*RAW, *PRAISON])
native_clients = st.sampled_from(list(RAW))
library_clients = st.sampled_from(list(LIBRARY))

scripts = st.lists(st.sampled_from(WORDS), max_size=4).flatmap(
    lambda words: st.sampled_from([" ".join(words), " ".join([*words, "return"])])
)
"""What the agent does in a turn: see `gateway.testing.scripted.ScriptedAgent`."""

busy_modes = st.sampled_from(["queue", "queue", "interrupt", "steer", "collect", "reject"])


PROCESS = [
    ("crash", {"lose": 0, "cut": True}),
    ("crash", {"lose": 0, "cut": False}),
    ("crash", {"lose": 3, "cut": True}),
    ("drain", {}),
    ("break", {}),
    ("purge", {}),
]


class GatewayMachine(RuleBasedStateMachine):
    """Any sequence of what can happen to a gateway with its clients, agents, disk and lines.

    Subclass it to test an agent of yours: set `agent` to anything `gateway.open_gateway` takes, and `texts` to what
    clients send to it. The agent takes its time from trio and uses no threads.
    """

    agent: Any = None
    texts: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self._stack = ExitStack()
        self._world: World | None = None

    def _guarded(self, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except BaseException as exc:
            if isinstance(exc, Violation):
                raise
            raise first_violation(exc) from None  # noqa: ASYNC104 - this is the host, not a task

    def _perform(self, do: str, who: str = "", **how: Any) -> None:
        world = self._world
        assert world is not None
        self._guarded(lambda: self._stage.do(lambda: world.perform(Step(do, who, 0, how))))

    def _ask(self, do: str, who: str, **how: Any) -> None:
        """A step of a client that wants something: it comes first if it is not there."""
        world = self._world
        assert world is not None
        if who in LIBRARY:
            self._perform("open", who)
        elif not world.raw[who].joined:
            self._perform("join", who)
        self._perform(do, who, **how)

    @initialize(
        seed=st.integers(0, 2**16),
        limits=st.sampled_from(sorted(LIMITS)),
        on_lost=st.sampled_from(["end", "retry"]),
    )
    def begin(self, seed: int, limits: str, on_lost: str) -> None:
        self._stack.enter_context(scheduled_by(seed))
        self._stage = Stage()
        self._stack.callback(lambda: self._guarded(self._stage.close))
        agent = type(self).__dict__.get("agent", self.agent)
        self._world = self._stage.do(
            lambda: World(
                self._stage.nursery,
                seed=seed,
                limits=LIMITS[limits],
                on_lost=on_lost,
                agent=agent,
                texts=tuple(self.texts),
            )
        )
        self._perform("start")
        self._perform("join", "c1")
        self._perform("open", "p1")

    # clients

    @rule(who=raw_clients)
    def join(self, who: str) -> None:
        """A new connection; the old one, if there is one, is left as it is: half dead if its line is stalled."""
        self._perform("join", who)

    @rule(who=library_clients)
    def open(self, who: str) -> None:
        self._perform("open", who)

    @rule(who=clients, script=scripts, on_busy=busy_modes)
    def send(self, who: str, script: str, on_busy: str) -> None:
        self._ask("send", who, script=script, on_busy=on_busy)

    @rule(who=raw_clients, conflict=st.booleans(), on_busy=busy_modes)
    def send_again(self, who: str, conflict: bool, on_busy: str) -> None:
        """The newest request id once more, with the same content or another."""
        self._ask("send", who, script="say:1", again=not conflict, conflict=conflict, on_busy=on_busy)

    @rule(who=clients, n=st.integers(3, 7))
    def fill_the_inbox(self, who: str, n: int) -> None:
        for _ in range(n):
            self._ask("send", who, script="sleep:200 say:1", on_busy="queue")

    @rule(who=clients, scope=st.sampled_from(["turn", "queue", "all"]))
    def abort(self, who: str, scope: str) -> None:
        self._ask("abort", who, scope=scope)

    @rule(who=native_clients)
    def withdraw(self, who: str) -> None:
        self._ask("abort", who, newest=True)

    @rule(who=clients, value=st.sampled_from([True, False, "a", "c", 1]))
    def answer(self, who: str, value: Any) -> None:
        self._ask("answer", who, value=value)

    @rule(who=native_clients, join=st.booleans(), lifetime=st.sampled_from([1, 400, 4_000]), other=st.booleans())
    def another_token(self, who: str, join: bool, lifetime: int, other: bool) -> None:
        """Join with a token that ends soon, or show one on the connection that is there."""
        if join:
            self._perform("join", who, lifetime=lifetime)
        else:
            self._ask("refresh", who, lifetime=lifetime, other=other)

    @rule(who=raw_clients, what=st.sampled_from(["ping", "signal", "stop", "leave"]))
    def say(self, who: str, what: str) -> None:
        self._ask(what, who)

    @rule(who=clients)
    def resync(self, who: str) -> None:
        self._ask("resync", who)

    @rule(who=library_clients, what=st.sampled_from(["sulk", "take"]))
    def stop_taking_events(self, who: str, what: str) -> None:
        self._perform(what, who)

    # lines

    @rule(who=clients, what=st.sampled_from(["cut", "stall", "unstall"]))
    def line(self, who: str, what: str) -> None:
        self._perform(what, who)

    @rule(who=clients, towards_client=st.booleans(), after=st.integers(0, 600))
    def truncate(self, who: str, towards_client: bool, after: int) -> None:
        self._perform("truncate", who, towards_client=towards_client, after=after)

    @rule(delay=st.sampled_from([0, 30, 250]), session_id=st.sampled_from(["s1", "s2"]))
    def stranger(self, delay: int, session_id: str) -> None:
        """Somebody else wants to join, over a line with a delay that all new lines have from now on."""
        self._perform("lines", delay=delay)
        self._perform("stranger", session_id=session_id)

    # process and disk

    @rule(what=st.sampled_from(PROCESS))
    def process(self, what: tuple[str, dict[str, Any]]) -> None:
        """The process is killed and started again, or drained, or one of its writes fails in a way it cannot mend."""
        self._perform(what[0], **what[1])

    @rule(delay=st.sampled_from([0, 60, 5_000]))
    def authenticator(self, delay: int) -> None:
        self._perform("auth", delay=delay)

    @rule(before=st.sampled_from([0, 20, 300]), after=st.sampled_from([0, 20]), full=st.booleans())
    def disk(self, before: int, after: int, full: bool) -> None:
        self._perform("disk", before=before, after=after, full=full)

    @rule(ms=st.sampled_from([1, 20, 100, 100, 400, 1_500, 7_000]))
    def time_passes(self, ms: int) -> None:
        self._guarded(lambda: self._stage.advance(ms / 1000))

    # what holds

    @invariant()
    def nothing_is_violated(self) -> None:
        world = self._world
        if world is not None:
            self._guarded(lambda: self._stage.do(world.check))

    def teardown(self) -> None:
        """Let the world come to rest, and check what must be true then."""
        world = self._world
        with self._stack:
            if world is not None and not self._stage.over:
                self._guarded(lambda: self._rest(world))

    def _rest(self, world: World) -> None:
        finished: list[bool] = []

        async def rest() -> None:
            await world.come_to_rest()
            await world.end()
            finished.append(True)

        self._stage.do(lambda: self._stage.nursery.start_soon(rest))
        while not finished:
            self._stage.advance(0.5)
