"""Coverage-guided fuzzing, as long as you like: ``python tests/fuzz/fuzz.py TARGET [-runs=N] [-seed=N] [FOLDER]``.

Needs the extra ``fuzz`` (atheris). The options are libFuzzer's. It begins with the seeds of `fuzz_targets` in FOLDER
(made if it is not there), keeps there what reaches new code, and stops at the first input that lets something escape,
which it writes to a file ``crash-…``: give that as FOLDER to run it alone.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from functools import partial
from pathlib import Path
from typing import Any

import atheris
import trio

with atheris.instrument_imports(include=["gateway.protocol", "gateway.transport"]):
    import gateway.protocol.codec
    import gateway.protocol.handshake
    import gateway.protocol.praison
    import gateway.transport.frames
    import gateway.transport.websocket  # noqa: F401

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from fuzz_targets import MAX_INPUT, TARGETS, in_trio, seeds  # noqa: E402

ODD: list[Any] = [
    None, True, False, 0, -1, 1.5, 2**63, 2**64 - 1, "", "x", "\ud83d", "\x00", "a" * 129, [], {}, [[]],
    {"type": "ping"},
]  # fmt: skip


def mutate_json(data: bytes, max_size: int, seed: int) -> bytes:
    """One change to the JSON's structure, or, half of the time, to its bytes: most of those are no JSON any more."""
    chance = random.Random(seed)
    try:
        value = json.loads(data) if chance.random() < 0.5 else None
    except ValueError:
        value = None
    places: list[tuple[Any, Any]] = []

    def look(item: Any) -> None:
        for key in item if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ():
            places.append((item, key))
            look(item[key])

    look(value)
    if not places:
        return bytes(atheris.Mutate(data, max_size))
    parent, key = chance.choice(places)
    match chance.randrange(4):
        case 0:
            del parent[key]
        case 1:
            parent[key] = chance.choice(ODD)
        case 2:
            other, name = chance.choice(places)
            parent[key] = json.loads(json.dumps(other[name]))
        case 3:
            parent[key] = [parent[key]] if chance.random() < 0.5 else {"type": parent[key]}
    return json.dumps(value).encode()[:max_size]


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
    mutator = {} if name == "splitter" else {"custom_mutator": mutate_json}
    atheris.Setup(arguments, TARGETS[name], **mutator)
    trio.run(partial(in_trio, atheris.Fuzz))


if __name__ == "__main__":
    main()
