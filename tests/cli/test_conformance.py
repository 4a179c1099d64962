"""``trio-gateway conformance`` against a gateway process, as a user runs it."""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from gateway.cli import main
from gateway.testing.vectors import default_folder, load


@contextmanager
def gateway(profile: str) -> Iterator[tuple[str, int]]:
    """A gateway process in a profile: its URL and process id."""
    config = default_folder() / f"{profile}.toml"
    command = [sys.executable, "-m", "gateway", "run", "--config", str(config), "--port", "0", "--no-http"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            url = next(found[0] for line in process.stdout if (found := re.findall(r"ws://\S+", line)))
            yield url, process.pid
        finally:
            process.kill()


def test_every_vector_of_the_default_profile_with_a_drain_in_the_end() -> None:
    with gateway("default") as (url, pid):
        result = CliRunner().invoke(main, ["conformance", url, "--drain-pid", str(pid)])
    expected = [vector for vector in load() if vector.profile == "default" and "gateway" in vector.sides]
    assert result.output.splitlines()[-1] == f"{len(expected)} passed, 0 failed"
    assert result.exit_code == 0


def test_a_gateway_that_the_tool_runs_itself(tmp_path: Path) -> None:
    """It is drained, killed and started again, and what comes last finds it alive."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [sys.executable, "-m", "gateway", "run", "--config", str(default_folder() / "stored.toml")]
    command += ["--port", str(port), "--no-http", "--log-level", "error", "--store", f"sqlite:{tmp_path / 'x.db'}"]
    vectors = tmp_path / "vectors"
    vectors.mkdir()
    for name in ("stored", "drain"):
        text = (default_folder() / f"{name}.json").read_text()
        (vectors / f"{name}.json").write_text(text.replace('"profile": "default"', '"profile": "stored"'))
    arguments = ["--vectors", str(vectors), "--profile", "stored", "--run", shlex.join(command)]
    result = CliRunner().invoke(main, ["conformance", f"ws://127.0.0.1:{port}/ws", *arguments])
    assert result.output.splitlines()[-1] == "4 passed, 0 failed", result.output
    assert result.exit_code == 0


def test_a_command_that_is_no_gateway() -> None:
    arguments = ["--profile", "stored", "--run", f"{sys.executable} -c pass"]
    result = CliRunner().invoke(main, ["conformance", "ws://127.0.0.1:1/ws", *arguments])
    assert result.exit_code == 2
    assert "--run: the command ended with exit code 0" in result.output


def test_the_wrong_profile_fails_and_says_where() -> None:
    with gateway("default") as (url, _):
        result = CliRunner().invoke(main, ["conformance", url, "--profile", "small", "--vector", "limits.inbox-full"])
    assert result.exit_code == 1
    assert "FAILED  limits.inbox-full, step 1 (clauses: none cited): credit: expected 2, got 256" in result.output


def test_without_a_gateway() -> None:
    result = CliRunner().invoke(main, ["conformance", "ws://127.0.0.1:1/ws"])
    assert result.exit_code == 2
    assert "cannot connect to 127.0.0.1:1" in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "URL: is required"),
        (["ws://x/ws", "--profile", "odd"], "--profile: expected one of brief, crowded, default"),
        (["ws://x/ws", "--vector", "odd"], "--vector: unknown: odd"),
        (["ws://x/ws", "--run", "x", "--drain-pid", "1"], "--drain-pid: is of no use with --run"),
    ],
)
def test_what_is_wrong_is_said(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(main, ["conformance", *arguments])
    assert result.exit_code == 2
    assert said in result.output


def test_vectors_that_drain_are_left_out_and_named(tmp_path: Path) -> None:
    with gateway("default") as (url, _):
        result = CliRunner().invoke(main, ["conformance", url, "--vector", "drain.told", "--vector", "frames.ping"])
    assert result.exit_code == 0
    assert "1 passed, 0 failed\nnot run: drain.told" in result.output


def test_the_list_names_profiles_and_vectors() -> None:
    result = CliRunner().invoke(main, ["conformance", "--list"])
    assert result.exit_code == 0
    assert f"default  ({default_folder() / 'default'}.toml)" in result.output
    assert "  drain.told  " in result.output
