"""Environments for what runs beside this process, made when they are first needed: one venv or npm folder each.

They live in a cache folder and are made anew when the versions named here change, or Python's or Node's.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

PYTHON: dict[str, tuple[str, ...]] = {
    "asyncio": (
        "websockets==17.4",
        "uvicorn==0.54.0",
        "starlette==1.10.0",
        "python-socketio==5.18.1",
        "uvloop==0.23.0",
        "httptools==0.9.0",
        "orjson==3.13.0",
    ),
    "praisonai": ("praisonai-bot[gateway]==0.1.16",),
}
"""Environment → what is installed into it. The environment ``own`` is the one that this process runs in: the gateway,
trio-websocket, and the load generator (extra ``benchmarks``) are there."""

NODE: dict[str, str] = {"ws": "8.23.0", "socket.io": "4.8.4", "bufferutil": "4.1.0"}


class EnvironmentFailed(Exception):
    """An environment could not be made; the text says which, and what the installer said."""


def cache() -> Path:
    """``$TRIO_GATEWAY_BENCHMARKS_CACHE``, or a folder of ours among the user's caches."""
    given = os.environ.get("TRIO_GATEWAY_BENCHMARKS_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given) if given else Path(base) / "trio-gateway-benchmarks"


def python(name: str) -> str:
    """The interpreter of an environment, which is made if it is not there."""
    if name == "own":
        return sys.executable
    folder = _made(name, [sys.version, *PYTHON[name]], lambda folder: _make_venv(folder, PYTHON[name]))
    return str(folder / "bin" / "python")


def node() -> Path:
    """The folder with ``node_modules``, which is made if it is not there."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        raise EnvironmentFailed("node and npm are not installed; on Debian: apt-get install nodejs npm")
    return _made("node", [_said("node", "--version"), json.dumps(NODE)], _make_node)


def versions(name: str) -> dict[str, str]:
    """What is installed in an environment."""
    if name == "node":
        folder = node() / "node_modules"
        found = {one: json.loads((folder / one / "package.json").read_text())["version"] for one in NODE}
        return {"node": _said("node", "--version"), **found}
    code = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    found = json.loads(_said(python(name), "-c", code))
    return {"python": _said(python(name), "-c", "import platform; print(platform.python_version())"), **found}


def _made(name: str, stamp: list[str], make: object) -> Path:
    assert callable(make)
    folder = cache() / name
    mark = folder / ".made"
    digest = hashlib.sha256("\n".join(stamp).encode()).hexdigest()
    if mark.exists() and mark.read_text() == digest:
        return folder
    print(f"installing the environment {name!r} into {folder}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        make(folder)
    except subprocess.CalledProcessError as exc:
        raise EnvironmentFailed(f"environment {name!r}: {exc}\n{exc.stderr}") from exc
    mark.write_text(digest)
    return folder


def _make_venv(folder: Path, packages: tuple[str, ...]) -> None:
    _said(sys.executable, "-m", "venv", str(folder))
    _said(str(folder / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check", *packages)


def _make_node(folder: Path) -> None:
    package = {"name": "trio-gateway-benchmarks", "private": True, "dependencies": NODE}
    (folder / "package.json").write_text(json.dumps(package))
    _said("npm", "install", "--silent", "--no-audit", "--no-fund", cwd=folder)


def _said(*command: str, cwd: Path | None = None) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=cwd).stdout.strip()
