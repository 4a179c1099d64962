"""Node packages for tests, of a pinned version, in a folder that outlives the run. Sets up what it needs, or fails."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trio-gateway-tests"


def _apt_node() -> None:
    """A bare Debian has no Node."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise RuntimeError("Node and npm are needed for this test; on Debian: apt-get install nodejs npm")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "-qq"], check=True, env=environment)
    subprocess.run(["apt-get", "install", "-y", "-qq", "nodejs", "npm"], check=True, env=environment)


def node_package(name: str, version: str) -> Path:
    """The folder under which ``node_modules/NAME`` is installed."""
    folder = CACHE / f"{name.strip('@').replace('/', '-')}-{version}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs at once
        done = folder / ".installed"
        if shutil.which("node") is None or not (done.exists() or shutil.which("npm")):
            _apt_node()
        if not done.exists():
            command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder)]
            result = subprocess.run([*command, f"{name}@{version}"], capture_output=True, text=True)
            assert result.returncode == 0, f"npm install failed:\n{result.stderr}"
            done.touch()
    return folder
