"""The servers that are compared: how each is started, and which dialect it speaks.

A server runs pinned to one core, writes to a folder of its own, and is killed at the end of its run.
"""

from __future__ import annotations

import atexit
import os
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import trustme

from benchmarks import environments

ROOT = Path(__file__).parent.parent
START_SECONDS = 60.0
"""Until a server must listen."""

GATEWAY = """\
[server]
port = {port}
http_port = 0
{tls}
[limits]
# The load comes from one address.
max_pending_handshakes = 4096
max_pending_handshakes_per_peer = 4096
[store]
url = "{store}"
durability = "full"
[log]
level = "info"
format = "json"
"""


SOCKET_IO = "/socket.io/?EIO=4&transport=websocket"


class ServerFailed(Exception):
    """A server did not start; the text says what it said."""


@dataclass(frozen=True, kw_only=True)
class System:
    """A server. `command` may name ``{python}``, ``{node}``, ``{port}`` and ``{folder}``.

    With TLS a certificate and its key follow as two more arguments, or stand in the gateway's file.
    """

    name: str
    title: str
    environment: str
    command: tuple[str, ...]
    dialect: str = "plain"
    path: str = "/ws"
    loads: frozenset[str] = frozenset({"stream", "ask", "scale", "fan", "ping", "hello", "idle"})
    """What it can do, of `benchmarks.load.loads`."""
    tls: bool = True
    peer: bool = True
    """False for the server that only shows what the load generator can do."""
    store: str = ""
    """Of a gateway: ``memory``, or ``sqlite``."""


_ALL_LOADS = frozenset({"stream", "ask", "scale", "fan", "ping", "turn", "hello", "idle", "storm"})
_RUN = ("{python}", "-m", "gateway.cli", "run", "bench=benchmarks.agents:bench", "--config", "{folder}/gateway.toml")


def _gateway(name: str, title: str, store: str) -> System:
    return System(
        name=name, title=title, environment="own", command=_RUN, dialect="gateway", loads=_ALL_LOADS, store=store
    )  # fmt: skip


def _peer(name: str, title: str, environment: str, module: str, **other: Any) -> System:
    command = ("{python}", "-m", f"benchmarks.peers.{module}", "{port}")
    return System(name=name, title=title, environment=environment, command=command, **other)


def _node(name: str, title: str, **other: Any) -> System:
    command = ("node", f"{ROOT}/benchmarks/peers/bare.js", name, "{port}")
    return System(name=name, title=title, environment="node", command=command, **other)


SYSTEMS = {
    system.name: system
    for system in (
        _gateway("gateway", "trio-gateway, SQLite full", "sqlite"),
        _gateway("gateway-memory", "trio-gateway, memory", "memory"),
        _peer(
            "raw",
            "(picows, to check the load generator)",
            "own",
            "raw_picows",
            peer=False,
            loads=frozenset({"stream", "ask", "fan", "ping", "hello"}),
        ),
        _peer("trio-websocket", "trio-websocket", "own", "plain_trio"),
        _peer("websockets", "websockets on uvloop", "asyncio", "plain_websockets"),
        _peer("starlette", "uvicorn + starlette on uvloop", "asyncio", "starlette_app"),
        _node("ws", "Node ws"),
        _node("socket.io", "Node socket.io", dialect="socket.io", path=SOCKET_IO),
        _peer(
            "python-socketio",
            "python-socketio on uvloop",
            "asyncio",
            "socketio_app",
            dialect="socket.io",
            path=SOCKET_IO,
        ),
        _peer(
            "praisonai",
            "PraisonAI gateway",
            "praisonai",
            "praisonai_gateway",
            dialect="praisonai",
            path="/ws?token=a-token-for-benchmarks",
            tls=False,
            loads=frozenset({"stream", "hello", "idle"}),
        ),
    )
}


@dataclass(frozen=True)
class Server:
    """A running server."""

    pid: int
    port: int
    folder: Path


def free_port(kind: socket.SocketKind = socket.SOCK_STREAM) -> int:
    """A port that nobody uses at the moment."""
    with socket.socket(socket.AF_INET, kind) as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
        assert isinstance(port, int)
        return port


@cache
def _folders() -> str:
    """Where the servers' folders are. They stay until all runs are over: a file system that discards what is freed
    keeps the disk busy with it while the next server runs, for up to a third of a second."""
    folders = tempfile.TemporaryDirectory(prefix="benchmarks-", ignore_cleanup_errors=True)
    atexit.register(folders.cleanup)
    return folders.name


@contextmanager
def serving(system: System, core: int, *, tls: bool = False) -> Iterator[Server]:
    """Run a server on `core`.

    Raises:
        ServerFailed: it does not listen within `START_SECONDS`.
        EnvironmentFailed: what it needs cannot be installed.
    """
    port = free_port()
    folder = Path(tempfile.mkdtemp(dir=_folders()))
    words = {"port": str(port), "folder": str(folder)}
    if system.environment == "node":
        words["node"] = str(environments.node() / "node_modules")
    else:
        words["python"] = environments.python(system.environment)
    if system.store:
        store = f"sqlite:{folder}/sessions.sqlite" if system.store == "sqlite" else system.store
        (folder / "gateway.toml").write_text(GATEWAY.format(port=port, store=store, tls=_TLS if tls else ""))
    command = [word.format_map(words) for word in system.command]
    if tls:
        _make_certificate(folder)
        if not system.store:
            command += [str(folder / "certificate.pem"), str(folder / "key.pem")]
    environment = {name: text for name, text in os.environ.items() if not name.startswith("TRIO_GATEWAY_")}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "NODE_PATH": words.get("node", "")}
    with (folder / "out").open("wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=folder,
            env=environment,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )
    try:
        _wait(system, process, port, folder, tls)
        yield Server(process.pid, port, folder)
    finally:
        process.kill()
        process.wait()


_TLS = """\
tls_certificate = "certificate.pem"
tls_key = "key.pem"
"""


def _make_certificate(folder: Path) -> None:
    certificate = trustme.CA().issue_cert("127.0.0.1")
    certificate.cert_chain_pems[0].write_to_path(folder / "certificate.pem")
    certificate.private_key_pem.write_to_path(folder / "key.pem")


def _wait(system: System, process: subprocess.Popen[bytes], port: int, folder: Path, tls: bool) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as one:
                if tls:
                    context = ssl.create_default_context()
                    context.check_hostname = False
                    context.verify_mode = ssl.CERT_NONE
                    context.wrap_socket(one).close()
                return
        except OSError:
            time.sleep(0.05)
    said = (folder / "out").read_text(errors="replace")[-2000:]
    raise ServerFailed(f"{system.name} does not listen on port {port} (exit code {process.poll()}); it said:\n{said}")
