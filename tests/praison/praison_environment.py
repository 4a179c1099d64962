"""A virtual environment with PraisonAI's client, made once and kept in the user's cache.

Only the three packages that the client is made of, at the versions it was observed at; their dozens of dependencies are
for other parts of them.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import venv
from hashlib import sha256
from pathlib import Path

PACKAGES = ("praisonai-bot==0.1.16", "praisonaiagents==1.7.17", "websockets==13.1")
"""The client needs ``websockets.client``, which left the package in version 14."""


def praison_python() -> Path:
    """The Python that has the client. Waits while another run makes the environment.

    Raises:
        RuntimeError: it cannot be made; the message has pip's output.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trio-gateway-tests"
    cache.mkdir(parents=True, exist_ok=True)
    key = sha256(" ".join((sys.version, sys.prefix, *PACKAGES)).encode()).hexdigest()[:12]
    home = cache / f"praison-{key}"
    python = home / "bin" / "python"
    with (cache / f"praison-{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / "complete").exists():
            venv.create(home, with_pip=True, clear=True)
            command = [python, "-m", "pip", "install", "--quiet", "--no-deps", *PACKAGES]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
            if done.returncode:
                raise RuntimeError(f"{' '.join(PACKAGES)} cannot be installed:\n{done.stderr}")
            (home / "complete").touch()
    return python
