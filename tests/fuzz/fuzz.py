"""Coverage-guided fuzzing, as long as you like: ``python tests/fuzz/fuzz.py TARGET [-runs=N] [-seed=N] [FOLDER]``.

Needs the extra ``fuzz`` (atheris). The options are libFuzzer's. It begins with the seeds of `fuzz_targets` in FOLDER
(made if it is not there), keeps there what reaches new code, and stops at the first input that lets something escape,
which it writes to a file ``crash-…``: give that as FOLDER to run it alone.
"""

from __future__ import annotations

import hashlib
import sys
from functools import partial
from pathlib import Path

import atheris
import trio

with atheris.instrument_imports(include=["gateway.protocol", "gateway.transport"]):
    import gateway.protocol.codec
    import gateway.protocol.handshake
    import gateway.transport.frames
    import gateway.transport.websocket  # noqa: F401

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from fuzz_targets import MAX_INPUT, TARGETS, in_trio, seeds  # noqa: E402


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"expected one of {', '.join(TARGETS)} first")
    name, options = sys.argv[1], sys.argv[2:]
    folders = [option for option in options if not option.startswith("-")]
    if folders and not Path(folders[0]).is_file():
        folder = Path(folders[0])
        folder.mkdir(parents=True, exist_ok=True)
        for seed in seeds(name):
            (folder / hashlib.sha1(seed).hexdigest()).write_bytes(seed)
    arguments = [sys.argv[0], f"-max_len={MAX_INPUT}", "-print_final_stats=1", *options]
    atheris.Setup(arguments, TARGETS[name])
    trio.run(partial(in_trio, atheris.Fuzz))


if __name__ == "__main__":
    main()
