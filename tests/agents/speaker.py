"""A process agent for tests: reads its turn, then does what its first argument says. Standard library only."""

import json
import os
import signal
import subprocess
import sys
import time


def say(**line: object) -> None:
    print(json.dumps(line), flush=True)


def hear() -> dict:
    return json.loads(sys.stdin.readline())


def main() -> None:
    what = sys.argv[1]
    if what == "early":
        return
    turn = hear()
    text = turn["inputs"][0]["content"]
    if what == "echo":
        say(type="delta", text="You said: ")
        say(type="delta", text=text)
    elif what == "turn":
        say(type="output", content=json.dumps(turn))
    elif what == "everything":
        say(type="delta", text="hm", channel="reasoning")
        say(type="progress", key="k", data=[1])
        say(type="tool_call", name="look", arguments={"at": 1}, call_id="c1")
        say(type="tool_result", call_id="c1", result="seen", is_error=True)
        say(type="state", patch={"a": 1})
        say(type="custom", name="n", data=None)
        say(type="output", content="done", metadata={"m": 1})
    elif what == "ask":
        say(type="ask", ask_id="mine", kind="choice", prompt="Which?", options=["a", "b"], timeout=2.5)
        say(type="ask", kind="approval", prompt="Sure?")
        replies = [hear(), hear()]
        say(type="delta", text=json.dumps(replies))
    elif what == "steered":
        say(type="delta", text="ready ")
        say(type="delta", text=hear()["input"]["content"])
    elif what == "error":
        say(type="error", code="quota", message="no more today", retryable=True)
        time.sleep(60)
    elif what == "raw":
        sys.stdout.write(sys.argv[2] + "\n")
        sys.stdout.flush()
        time.sleep(60)
    elif what == "exit":
        print("about to fail", file=sys.stderr, flush=True)
        sys.exit(int(sys.argv[2]))
    elif what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "close":
        os.close(1)
        time.sleep(60)
    elif what == "stderr":
        for number in range(int(sys.argv[2])):
            print(f"line {number}", file=sys.stderr)
        print("x" * 100_000, file=sys.stderr)
        say(type="delta", text="done")
    elif what == "flood":
        for number in range(int(sys.argv[2])):
            print(json.dumps({"type": "delta", "text": f"{number} "}))
    elif what == "children":
        # A child in the same group that ignores SIGTERM, as its parent does.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        say(type="delta", text=f"{os.getpid()} {child.pid}")
        if sys.argv[2] == "stay":
            time.sleep(60)
    elif what == "orphan":
        # A child that left the group and holds stdout open.
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
        say(type="delta", text=str(child.pid))
    elif what == "environment":
        say(type="delta", text=json.dumps(dict(os.environ)))
    elif what == "directory":
        say(type="delta", text=os.getcwd())
    elif what == "polite":
        try:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
            say(type="delta", text="ready")
            time.sleep(60)
        finally:
            open(sys.argv[2], "w").close()


main()
