"""The message classes agree with each other and with PROTOCOL.md."""

from __future__ import annotations

from typing import get_args, get_type_hints

import attrs
import pytest

from gateway.config import Limits
from gateway.protocol import messages as m


def test_families_map_each_wire_type_to_its_class() -> None:
    for family in (m.EVENTS, m.CLIENT_FRAMES, m.SERVER_FRAMES):
        assert all(cls.type == tag for tag, cls in family.items())


@pytest.mark.parametrize(
    ("base", "family"), [(m.Event, m.EVENTS), (m.ClientFrame, m.CLIENT_FRAMES), (m.ServerFrame, m.SERVER_FRAMES)]
)
def test_no_class_is_left_out_of_its_family(base: type, family: dict[str, type]) -> None:
    written = {cls for cls in vars(m).values() if isinstance(cls, type) and issubclass(cls, base) and cls is not base}
    assert written == set(family.values())


def test_a_client_can_tell_events_from_other_frames_by_type() -> None:
    assert not m.EVENTS.keys() & m.SERVER_FRAMES.keys()


def test_any_event_is_every_event() -> None:
    assert set(get_args(m.AnyEvent)) == set(m.EVENTS.values())


def test_wire_types_are_those_of_the_protocol() -> None:
    assert set(m.EVENTS) == {
        "input", "turn_started", "delta", "progress", "tool_call", "tool_result", "ask", "answered", "output",
        "turn_ended", "withdrawn", "state", "custom",
    }  # fmt: skip
    assert set(m.CLIENT_FRAMES) == {
        "hello", "message", "abort", "answer", "signal", "resync", "refresh", "leave", "ping", "pong",
    }  # fmt: skip
    assert set(m.SERVER_FRAMES) == {
        "hello_ok", "hello_error", "snapshot", "accepted", "aborted", "answer_ok", "credit", "signal", "presence",
        "refreshed", "left", "ping", "pong", "error", "goaway",
    }  # fmt: skip


def test_only_what_something_replaces_is_volatile() -> None:
    assert {tag for tag, cls in m.EVENTS.items() if cls.volatile} == {"delta", "progress"}


def test_only_what_says_nothing_lasting_is_droppable() -> None:
    assert {tag for tag, cls in m.SERVER_FRAMES.items() if cls.droppable} == {"signal", "presence"}


def test_policy_names_are_the_names_of_the_settings() -> None:
    limits = {field.name for field in attrs.fields(Limits)}
    assert {field.name for field in attrs.fields(m.Policy)} <= limits


def test_frames_cannot_be_changed_after_they_were_read() -> None:
    frame = m.Leave()
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        frame.type = "ping"  # type: ignore[misc]


@pytest.mark.parametrize("cls", [*m.EVENTS.values(), *m.CLIENT_FRAMES.values(), *m.SERVER_FRAMES.values()])
def test_every_annotation_resolves(cls: type) -> None:
    assert {field.name for field in attrs.fields(cls)} <= get_type_hints(cls).keys()
