"""What must be true of sessions and their clients, whatever happens: named invariants.

Each is a small generator of complaints. Its decorator says which of the 20 properties of the design it states, its
docstring is its sentence; the first complaint is raised as `Violation`. Those on single frames are called when the
frame arrives (by `gateway.testing.model`), those in `ALWAYS` by `check_always` at any time, and those in `AT_REST` by
`check_at_rest` when the world has calmed down.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any, ParamSpec

from attrs import frozen

if TYPE_CHECKING:
    from gateway.testing.model import Client, History

Json = dict[str, Any]
P = ParamSpec("P")

VOLATILE = ("delta", "progress")
MOST_ATTEMPTS = 3
TRANSCRIPT = ("input", "output", "tool_call", "tool_result", "answered", "turn_ended")


class Violation(AssertionError):
    """An invariant does not hold. `invariant` is its name, `properties` the numbers of what it states."""

    def __init__(self, invariant: str, properties: tuple[int, ...], complaint: str) -> None:
        super().__init__(f"{invariant} (property {', '.join(map(str, properties))}): {complaint}")
        self.invariant = invariant
        self.properties = properties
        self.complaint = complaint


@frozen
class Invariant:
    """A registered invariant: its name, the properties it states, and its sentence."""

    name: str
    properties: tuple[int, ...]
    says: str


INVARIANTS: dict[str, Invariant] = {}
ALWAYS: list[Callable[[History], None]] = []
AT_REST: list[Callable[[History], None]] = []


def invariant(
    *properties: int, group: list[Callable[[History], None]] | None = None
) -> Callable[[Callable[P, Iterator[str]]], Callable[P, None]]:
    """Make a check of a generator of complaints, registered under its name; its docstring is its sentence."""

    def decorate(complaints: Callable[P, Iterator[str]]) -> Callable[P, None]:
        name = complaints.__name__

        def check(*args: P.args, **kwargs: P.kwargs) -> None:
            for complaint in complaints(*args, **kwargs):
                raise Violation(name, properties, complaint)

        check.__name__, check.__doc__ = name, complaints.__doc__
        INVARIANTS[name] = Invariant(name, properties, (complaints.__doc__ or "").strip())
        if group is not None:
            group.append(check)  # type: ignore[arg-type]
        return check

    return decorate


# --- on single frames ------------------------------------------------------------------------------------------------


@invariant(14)
def never_used_again(history: History, events: list[Json]) -> Iterator[str]:
    """No number is used twice within an epoch, over crashes too; a volatile event's neither."""
    newest = max([history.head, *history.shown])
    for event in events:
        if event["seq"] <= history.head or event["seq"] in history.shown:
            yield f"{event['seq']} is committed as {event['type']}, the newest number used was {newest}"


@invariant(13, 14, 18)
def the_cursor_is_continued_or_resynced(frame: Json, history: History, since: int, epoch: str | None) -> Iterator[str]:
    """A hello's cursor is continued exactly, or there is a resync for a reason that is true."""
    reason = frame["resync_reason"]
    if frame["resync_required"] != (reason is not None):
        yield f"resync_required is {frame['resync_required']}, the reason {reason}"
    if frame["epoch"] != history.epoch:
        yield f"the epoch is {frame['epoch']}, it should be {history.epoch}"
    changed = epoch is not None and epoch != frame["epoch"]
    if reason is None and frame["cursor"] != since:
        yield f"continued from {frame['cursor']}, asked for {since}"
    if reason is None and not frame["oldest_cursor"] <= since <= frame["head"]:
        yield f"{since} was continued, possible are {frame['oldest_cursor']} to {frame['head']}"
    if reason is None and changed and frame["resumed"]:
        yield f"continued although the epoch changed from {epoch} to {frame['epoch']}"
    if reason == "epoch_changed" and not changed:
        yield "the epoch did not change"
    if reason == "cursor_expired" and since >= frame["oldest_cursor"]:
        yield f"{since} is not below the oldest cursor {frame['oldest_cursor']}"
    if reason == "cursor_ahead" and since <= frame["head"]:
        yield f"{since} is not above the head {frame['head']}"


@invariant(13, 14)
def covers(client: Client, event: Json) -> Iterator[str]:
    """An event covers the number after the client's cursor, and comes once: first <= cursor + 1 <= seq."""
    if client.awaiting is not None:
        yield f"{_short(event)} comes before the snapshot at {client.awaiting}"
    if event["seq"] <= client.cursor:
        yield f"{_short(event)} comes again, the cursor is {client.cursor}"
    if event["first"] > client.cursor + 1:
        yield f"gap before {_short(event)}, the cursor is {client.cursor}"
    if event["first"] > event["seq"]:
        yield f"first is above seq: {_short(event)}"


@invariant(13)
def skips_nothing(client: Client, event: Json) -> Iterator[str]:
    """No durable event lies between a client's cursor and the event that comes next, whatever that says it covers."""
    assert client.history is not None
    for missing in reversed(client.history.log):
        if missing["seq"] <= client.cursor:
            break
        if missing["seq"] < event["seq"]:
            yield f"{_short(missing)} is skipped by {_short(event)}, the cursor was {client.cursor}"


@invariant(6, 14)
def is_what_was_stored(client: Client, event: Json) -> Iterator[str]:
    """A durable event is stored before it is seen; a volatile one has a reserved number; each means one thing."""
    history = client.history
    assert history is not None
    seq, kind = event["seq"], event["type"]
    stored = history.by_seq.get(seq)
    if kind in VOLATILE:
        meaning = kind, event["turn_id"]
        if stored is not None:
            yield f"{_short(event)} has the number of {_short(stored)}"
        if seq > history.reserved:
            yield f"{_short(event)} is shown, numbers are reserved up to {history.reserved}"
        if history.shown.setdefault(seq, meaning) != meaning:
            yield f"{_short(event)} was a {history.shown[seq]} before"
    elif stored is None:
        yield f"{_short(event)} is shown but not stored"
    elif {key: value for key, value in event.items() if key != "first"} != stored:
        yield f"{event} is shown, {stored} was stored"


@invariant(1, 9, 17)
def belongs_to_the_running_turn(client: Client, event: Json) -> Iterator[str]:
    """What a turn says comes between its start and its end, and never in another session."""
    turn_id, kind = event.get("turn_id"), event["type"]
    if kind == "turn_started":
        if client.turn is not None:
            yield f"{turn_id} starts while {client.turn} runs"
    elif turn_id is not None and turn_id != client.turn:
        yield f"{_short(event)} while {client.turn or 'no turn'} runs"


@invariant(4, 9, 17)
def says_what_the_agent_wrote(client: Client, turn_id: str, channel: str) -> Iterator[str]:
    """A client's text is what the agent wrote so far on that channel: nothing doubled, mixed, foreign or left out.

    What an agent states as final replaces some of what it streamed; before it, words may be gone.
    """
    assert client.history is not None
    work = client.history.work.get(turn_id)
    if work is None:
        return
    written = work.channels.get(channel, [])
    places = {word.text: i for i, word in enumerate(written)}
    expected = 0 if turn_id in client.whole else None
    for text in client.text(turn_id, channel).split():
        place = places.get(text)
        if place is None:
            yield f"{text!r} in {turn_id} {channel} was not written there"
            return
        if expected is not None and place < expected:
            yield f"{text!r} in {turn_id} {channel} comes again"
        if expected is not None and place > expected and not written[place].final:
            missing = [word for word in written[expected:place] if not word.maybe]
            if missing:
                yield f"{missing[0].text!r} is missing in {turn_id} {channel} before {text!r}"
        expected = place + 1


@invariant(5, 9)
def leaves_nothing_out(client: Client, turn_id: str) -> Iterator[str]:
    """When a turn has ended, its clients have all that its agent wrote, unless a crash took it."""
    assert client.history is not None
    work = client.history.work.get(turn_id)
    if work is None or turn_id not in client.whole:
        return
    for channel, written in work.channels.items():
        words = [word.text for word in written if not word.maybe]
        said = client.text(turn_id, channel).split()
        if words and (not said or said[-1] != words[-1]):
            yield f"{turn_id} {channel} ends with {said[-1:]}, the agent's last word was {words[-1]!r}"


@invariant(13, 14)
def snapshots_are_where_they_were_promised(client: Client, frame: Json) -> Iterator[str]:
    """The snapshot after a hello_ok has the cursor that it named, or (if events came in between) a later one."""
    assert client.awaiting is not None
    if frame["cursor"] < client.awaiting:
        yield f"hello_ok said {client.awaiting}, the snapshot is at {frame['cursor']}"


@invariant(13)
def never_goes_back(client: Client, frame: Json) -> Iterator[str]:
    """A snapshot within an epoch is not older than what its client has."""
    if frame["cursor"] < client.cursor:
        yield f"the snapshot is at {frame['cursor']}, the client at {client.cursor}"


@invariant(13, 14)
def snapshots_tell_the_session_at_their_cursor(frame: Json, history: History) -> Iterator[str]:
    """State and position of a snapshot agree: it says what all events up to its cursor say, and no more."""
    fold = history.until(frame["cursor"])
    running = None if frame["turn"] is None else frame["turn"]["turn_id"]
    if frame["epoch"] != history.epoch:
        yield f"its epoch is {frame['epoch']}, it should be {history.epoch}"
    if running != fold.turn:
        yield f"at {frame['cursor']} it has turn {running}, the log {fold.turn}"
    if (queue := [item["request_id"] for item in frame["queue"]]) != fold.queue:
        yield f"at {frame['cursor']} its queue is {queue}, the log's {fold.queue}"
    if (asks := [item["ask_id"] for item in frame["asks"]]) != fold.asks:
        yield f"at {frame['cursor']} its open asks are {asks}, the log's {fold.asks}"
    if frame["state"] != fold.state:
        yield f"at {frame['cursor']} its state is {frame['state']}, the log's {fold.state}"
    newest = [event for event in history.log if event["type"] in TRANSCRIPT and event["seq"] <= frame["cursor"]]
    said = [{key: value for key, value in event.items() if key != "first"} for event in frame["transcript"]]
    if said != newest[len(newest) - len(said) :]:
        yield f"at {frame['cursor']} its transcript is not the newest part of the log"
    if len(said) < len(newest) and not frame["transcript_truncated"]:
        yield f"at {frame['cursor']} it has {len(said)} of {len(newest)} events and does not say so"


@invariant(6)
def accepted_is_stored(history: History, frame: Json, content: str) -> Iterator[str]:
    """`accepted` promises no more than is stored: this input, under this number, with this content."""
    seq, request_id = frame["seq"], frame["request_id"]
    stored = history.by_seq.get(seq)
    if stored is None or stored["type"] != "input" or stored["request_id"] != request_id:
        yield f"{request_id} is accepted as {seq}, which is {_short(stored) if stored else 'not stored'}"
    elif stored["content"] != content:
        yield f"{request_id} is accepted with another content than was sent"
    if history.told.get(request_id, seq) != seq:
        yield f"{request_id} was accepted as {history.told[request_id]}, now as {seq}"


@invariant(6)
def accepted_comes_before_its_turn(client: Client, frame: Json) -> Iterator[str]:
    """A new input's `accepted` comes before the `turn_started` that takes it."""
    if not frame["duplicate"] and frame["request_id"] in client.started:
        yield f"{frame['request_id']} is accepted after its turn has started"


@invariant(8, 10)
def aborted_means_over(history: History, frame: Json) -> Iterator[str]:
    """`aborted` comes when the end of the turn that it names, and each withdrawal, is in the log."""
    stored = {event["request_id"] for event in history.log if event["type"] == "input"}
    gone = {event["request_id"] for event in history.log if event["type"] == "withdrawn"}
    ended = {event["turn_id"] for event in history.log if event["type"] == "turn_ended"}
    for request_id in frame["withdrawn"]:
        if request_id in stored and request_id not in gone:
            yield f"{request_id} is said to be withdrawn and is not"
    if frame["turn_id"] is not None and frame["turn_id"] not in ended:
        yield f"{frame['turn_id']} is said to be aborted and has not ended"


@invariant(10)
def withdrawn_before_cancelled(history: History, frame: Json, waiting: Collection[str]) -> Iterator[str]:
    """An abort of everything starts nothing: what waited when it was sent does not run after the turn it stopped."""
    stopped = False
    for event in history.log:
        if event["type"] == "turn_started" and (stopped or set(event["request_ids"]) & set(frame["withdrawn"])):
            for request_id in event["request_ids"]:
                if request_id in waiting or request_id in frame["withdrawn"]:
                    yield f"{request_id} waited when everything was aborted, and ran in {event['turn_id']}"
        elif event["type"] == "turn_ended" and event["turn_id"] == frame["turn_id"]:
            stopped = True


# --- on a history, at any time ---------------------------------------------------------------------------------------


@invariant(1, 9, group=ALWAYS)
def one_turn_at_a_time(history: History) -> Iterator[str]:
    """At most one turn is open; each ends once; nothing of a turn comes before its start or after its end."""
    running: str | None = None
    over: set[str] = set()
    for event in history.log:
        turn_id = event.get("turn_id")
        if event["type"] == "turn_started":
            if running is not None:
                yield f"{turn_id} starts while {running} runs"
            if turn_id in over:
                yield f"{turn_id} starts again"
            running = turn_id
        elif turn_id is not None and turn_id != running:
            yield f"{_short(event)} while {running or 'no turn'} runs"
        if event["type"] == "turn_ended":
            over.add(event["turn_id"])
            running = None


@invariant(5, group=ALWAYS)
def inputs_are_taken_once(history: History) -> Iterator[str]:
    """An input is taken by one turn or withdrawn, once, and after it came; only a lost turn's may be tried again."""
    waiting: set[str] = set()
    lost: list[str] = []
    running: list[str] = []
    for event in history.log:
        kind = event["type"]
        if kind == "input":
            waiting.add(event["request_id"])
        elif kind == "withdrawn":
            if event["request_id"] not in waiting:
                yield f"{event['request_id']} is withdrawn ({event['reason']}) but does not wait"
            waiting.discard(event["request_id"])
        elif kind == "turn_started":
            running = event["request_ids"]
            if event["attempt"] > 1:
                if running != lost:
                    yield f"attempt {event['attempt']} takes {running}, what was lost is {lost}"
                continue
            for request_id in running:
                if request_id not in waiting:
                    yield f"{request_id} starts {event['turn_id']} but does not wait"
                waiting.discard(request_id)
        elif kind == "turn_ended":
            lost = running if event["outcome"] == "lost" else []


@invariant(5, group=ALWAYS)
def lost_turns_are_tried_again(history: History) -> Iterator[str]:
    """Where an agent asked for it, what a lost turn ran for runs next, MOST_ATTEMPTS times at most; elsewhere never."""
    lost: Json | None = None
    running: Json | None = None
    interrupts: set[str] = set()
    for event in history.log:
        kind = event["type"]
        if kind == "input" and "interrupt" in history.modes.get(event["request_id"], ()):
            interrupts.add(event["request_id"])
        elif kind == "withdrawn":
            interrupts.discard(event["request_id"])
        elif kind == "turn_started":
            if event["attempt"] > (MOST_ATTEMPTS if history.retries else 1):
                yield f"{event['turn_id']} is attempt {event['attempt']}"
            if lost is not None and not interrupts and event["attempt"] != lost["attempt"] + 1:
                yield f"{lost['turn_id']} was lost, next comes attempt {event['attempt']} of {event['request_ids']}"
            interrupts.difference_update(event["request_ids"])
            running, lost = event, None
        elif kind == "turn_ended":
            again = event["outcome"] == "lost" and history.retries
            lost = running if again and running is not None and running["attempt"] < MOST_ATTEMPTS else None


@invariant(5, group=ALWAYS)
def inputs_run_in_order(history: History) -> Iterator[str]:
    """Inputs run in the order of their numbers; only one that interrupts may overtake."""
    seqs = {event["request_id"]: event["seq"] for event in history.log if event["type"] == "input"}
    newest = 0
    for event in history.log:
        if event["type"] == "turn_started" and event["attempt"] == 1:
            for request_id in event["request_ids"]:
                if "interrupt" in history.modes.get(request_id, ()):
                    continue
                if seqs[request_id] < newest:
                    yield f"{request_id} (number {seqs[request_id]}) runs after number {newest}"
                newest = seqs[request_id]
            if len(event["request_ids"]) > 1:
                unasked = [name for name in event["request_ids"] if "collect" not in history.modes.get(name, "collect")]
                if unasked:
                    yield f"{event['request_ids']} run as one turn, but {unasked} did not ask for that"


@invariant(5, 6, group=ALWAYS)
def a_repetition_is_no_second_input(history: History) -> Iterator[str]:
    """A request id is in the log once, with the content that was sent first under it or not at all."""
    seen: set[str] = set()
    for event in history.log:
        if event["type"] == "input":
            request_id = event["request_id"]
            if request_id in seen:
                yield f"{request_id} is in the log twice"
            seen.add(request_id)
            sent = history.sent.get(request_id)
            if sent is not None and event["content"] not in sent:
                yield f"{request_id} is stored with a content that nobody sent"


@invariant(17, group=ALWAYS)
def sessions_are_apart(history: History) -> Iterator[str]:
    """Nothing is in a session's log that was not sent to it."""
    for event in history.log:
        if event["type"] == "input" and history.sent and event["request_id"] not in history.sent:
            yield f"{event['request_id']} was not sent to {history.session_id}"


@invariant(5, 6, group=ALWAYS)
def what_was_accepted_is_kept(history: History) -> Iterator[str]:
    """An input whose sender was told `accepted` is in the log, under the number that was told."""
    for request_id, seq in history.told.items():
        event = history.by_seq.get(seq)
        if event is None or event.get("request_id") != request_id:
            yield f"{request_id} was accepted as {seq}, which is {_short(event) if event else 'gone'}"


@invariant(8, group=ALWAYS)
def asks_are_answered_once(history: History) -> Iterator[str]:
    """A question is answered once, within its turn, and before the turn ends."""
    questions: dict[str, Json] = {}
    for event in history.log:
        if event["type"] == "ask":
            questions[event["ask_id"]] = event
        elif event["type"] == "answered":
            if event["ask_id"] not in questions:
                yield f"{event['ask_id']} is answered but not open"
            questions.pop(event["ask_id"], None)
        elif event["type"] == "turn_ended":
            for ask_id in questions:
                yield f"{event['turn_id']} ends with an open question: {ask_id}"
            questions = {}


@invariant(8, group=ALWAYS)
def agents_get_the_answer_in_the_log(history: History) -> Iterator[str]:
    """What an agent got for its question is what everybody can see."""
    prompts = {event["ask_id"]: event for event in history.log if event["type"] == "ask"}
    for event in history.log:
        if event["type"] == "answered":
            question = prompts.get(event["ask_id"])
            work = history.work.get(event["turn_id"])
            if question is None or work is None or question["prompt"] not in work.answers:
                continue
            if work.epoch != history.epoch:
                continue  # what it got then was lost with the old epoch
            nothing = False if question["kind"] == "approval" else None
            shown = event["value"] if event["outcome"] == "answered" else nothing
            if work.answers[question["prompt"]] != shown:
                yield f"{event['ask_id']}: the agent got {work.answers[question['prompt']]!r}, the log says {shown!r}"


@invariant(2, 10, 11, group=ALWAYS)
def turns_end_for_a_reason(history: History) -> Iterator[str]:
    """A turn is aborted only if somebody asked, interrupted only by an input or a drain, lost only in a crash."""
    causes = history.causes
    left = {
        "aborted": causes["abort"],
        "interrupted": causes["interrupt"] + causes["drain"],
        "lost": causes["crash"] + causes["failure"] + causes["drain"],  # a drain may not get its end stored
    }
    started = 0
    for event in history.log:
        if event["type"] == "turn_started":
            started = event["at"]
        elif event["type"] == "turn_ended":
            outcome = event["outcome"]
            work = history.work.get(event["turn_id"])
            if outcome in left:
                left[outcome] -= 1
                if left[outcome] < 0:
                    yield f"{event['turn_id']} ended as {outcome}; nothing happened that could cause it"
            if outcome == "timed_out" and event["at"] - started + 1 < history.max_turn_ms:
                yield f"{event['turn_id']} timed out after {event['at'] - started} ms"
            if work is not None and outcome == "completed" and work.ended != "returned":
                yield f"{event['turn_id']} ended as completed, its agent {work.ended or 'has not ended'}"
            if work is not None and outcome == "failed" and work.ended != "raised":
                yield f"{event['turn_id']} ended as failed, its agent {work.ended or 'has not ended'}"


# --- on a history, when everything has come to rest ------------------------------------------------------------------


@invariant(3, 5, group=AT_REST)
def every_input_has_its_fate(history: History) -> Iterator[str]:
    """Every accepted input was taken by a turn or withdrawn, and every turn has ended."""
    fold = history.until(history.head)
    if fold.queue:
        yield f"{fold.queue} still wait"
    if fold.turn is not None:
        yield f"{fold.turn} has not ended"


@invariant(13, 14, group=AT_REST)
def clients_agree(history: History) -> Iterator[str]:
    """All clients are at the end of the log, and show the same text."""
    for client in history.clients:
        if client.cursor < history.head:
            yield f"{client.name} is at {client.cursor}, the log ends at {history.head}"
        for (turn_id, channel), outputs in client.outputs.items():
            said, whole = client.text(turn_id, channel), history.text(turn_id, channel)
            if turn_id in client.whole and said != whole:
                yield f"{client.name} shows {said[-60:]!r} for {turn_id} {channel}, the log says {whole[-60:]!r}"
            for seq, content in outputs.items():
                if history.by_seq[seq]["content"] != content:
                    yield f"{client.name} has another output {seq} than the log"


def check_always(history: History) -> None:
    """Check what holds at any time. Raises `Violation`."""
    for check in ALWAYS:
        check(history)


def check_at_rest(history: History) -> None:
    """Check what holds when nothing happens any more. Raises `Violation`."""
    check_always(history)
    for check in AT_REST:
        check(history)


def _short(event: Json) -> str:
    name = event.get("request_id") or event.get("turn_id") or ""
    return f"{event['type']} {event['seq']} {name}".rstrip()
