"""The operator's log: one format for structlog and logging, on stderr, that nothing can break."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from gateway.cli.logs import set_up_logs
from gateway.config import Log


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    root, level = logging.getLogger(), logging.getLogger().level
    handlers = list(root.handlers)
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.raiseExceptions = True


def logged(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_both_kinds_of_logger_write_the_same_json() -> None:
    out = io.StringIO()
    set_up_logs(Log(format="json"), out)
    structlog.get_logger("ours").info("hello", peer="a", count=3)
    logging.getLogger("theirs").info("hello %d", 3)
    ours, theirs = logged(out)
    assert (ours["event"], ours["level"], ours["peer"], ours["count"]) == ("hello", "info", "a", 3)
    assert (theirs["event"], theirs["level"], theirs["logger"]) == ("hello 3", "info", "theirs")
    assert set(ours) - {"peer", "count"} == set(theirs) - {"logger"}


@pytest.mark.parametrize("format", ["console", "json"])
def test_a_level_filters_both(format: Any) -> None:
    out = io.StringIO()
    set_up_logs(Log(level="warning", format=format), out)
    structlog.get_logger().info("quiet")
    logging.getLogger("theirs").info("quiet")
    assert out.getvalue() == ""
    structlog.get_logger().warning("one")
    logging.getLogger("theirs").warning("two")
    assert out.getvalue().count("\n") == 2


def test_libraries_that_tell_of_every_connection_are_quiet_below_debug() -> None:
    out = io.StringIO()
    set_up_logs(Log(format="json"), out)
    logging.getLogger("hypercorn.error").info("Running on …")
    logging.getLogger("trio-websocket").info("connection")
    assert logged(out) == []
    set_up_logs(Log(format="json", level="debug"), out)
    logging.getLogger("trio-websocket").debug("connection")
    assert [line["event"] for line in logged(out)] == ["connection"]


@pytest.mark.parametrize("format", ["console", "json"])
def test_an_exception_is_logged_with_its_traceback_and_without_its_variables(format: Any) -> None:
    out = io.StringIO()
    set_up_logs(Log(format=format), out)
    password = "sesame" + "open"
    try:
        raise ValueError(len(password))
    except ValueError as exc:
        structlog.get_logger().error("failed", exc_info=exc)
    assert "ValueError: 10" in out.getvalue()
    assert "sesameopen" not in out.getvalue()


@pytest.mark.parametrize("format", ["console", "json"])
@pytest.mark.parametrize("value", ["\ud800", "\x1b[2J", "a\nb", 10**40, float("nan"), {1: object()}, b"\xff"])
def test_what_a_peer_sent_stays_on_one_line_and_raises_nothing(format: Any, value: object) -> None:
    out = io.StringIO()
    set_up_logs(Log(format=format), out)
    structlog.get_logger().info("peer_said", value=value)
    assert out.getvalue().count("\n") == 1
    assert "\x1b" not in out.getvalue()


def test_a_reader_that_went_away_breaks_nothing() -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    set_up_logs(Log(), Broken())
    structlog.get_logger().info("hello")
    logging.getLogger("theirs").info("hello")
