"""Records the README's picture: ``python docs/picture.py``. A real conversation in a pseudo-terminal; the gateway is
killed in the middle of an answer and started again."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

HERE = Path(__file__).parent
GATEWAY = [sys.executable, "-m", "gateway", "run", "--store", "sqlite:sessions.db", "--no-http", "--port"]


class Screen:
    """A command in a pseudo-terminal, and what it printed."""

    def __init__(self, command: list[str], folder: str) -> None:
        pid, self._fd = pty.fork()
        if pid == 0:
            os.chdir(folder)
            os.execve(command[0], command, {**os.environ, "TERM": "xterm-256color", "COLUMNS": "92"})
        self.raw = ""

    def until(self, pattern: str, seconds: float = 10) -> str:
        start = len(self.raw)
        end = time.monotonic() + seconds
        while not re.search(pattern, self.raw[start:]):
            if time.monotonic() > end:
                raise TimeoutError(f"{pattern!r} did not come: {self.raw[start:]!r}")
            if not select.select([self._fd], [], [], 0.1)[0]:
                continue
            try:
                self.raw += os.read(self._fd, 4096).decode(errors="replace")
            except OSError:
                break
        return self.raw[start:]

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:

        def gateway(port: str) -> tuple[subprocess.Popen[str], str]:
            process = subprocess.Popen([*GATEWAY, port], cwd=folder, stdout=subprocess.PIPE, text=True)
            assert process.stdout is not None
            url = ""
            while not url:
                line = process.stdout.readline()
                found = re.search(r"ws://\S+", line)
                url = found[0] if found else ""
            return process, url

        first, url = gateway("0")
        port = url.rsplit(":", 1)[1].split("/")[0]
        screen = Screen([sys.executable, "-m", "gateway", "chat", url], folder)
        screen.until("(?i)connected|echo")
        screen.type("hello there\r")
        screen.until("hello there[\\s\\S]*hello there")
        time.sleep(1)
        screen.type("/long 60\r")
        screen.until(" 30:")
        first.send_signal(signal.SIGKILL)
        first.wait()
        screen.until("(?i)reconnect|waiting|lost")
        second, _ = gateway(port)
        screen.until("(?i)(re)?connected|resumed|back")
        time.sleep(1)
        screen.type("are you still there?\r")
        screen.until("You said[^\n]*there\\?")
        time.sleep(1)
        screen.type("/quit\r")
        time.sleep(0.5)
        screen.until("$", 1)
        second.send_signal(signal.SIGTERM)
        second.wait()
    console = Console(record=True, width=92, file=open(os.devnull, "w"))  # noqa: SIM115
    shown = re.sub(r"\x1b\[[0-9;?]*[A-HJKSTfhlnsu]", "", screen.raw).replace("\r\n", "\n")
    shown = "\n".join(line.rsplit("\r", 1)[-1] for line in shown.split("\n"))
    console.print(Text.from_ansi(shown))
    svg = console.export_svg(title="trio-gateway chat")
    # The fonts are named, not fetched: a picture must not call home.
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    (HERE / "images").mkdir(exist_ok=True)
    (HERE / "images/chat.svg").write_text(svg)
    sys.stdout.write(shown)


if __name__ == "__main__":
    main()
