"""Damaged frames by the million: a seeded mutator of a corpus, for what Hypothesis is too careful to do fast.

No shrinking, but a million inputs in a minute or two; whoever finds something writes it down as an example of its own.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence

_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?[0-9]+(?:\.[0-9]+)?|true|false|null|[{}\[\],:]')
"""What JSON consists of: mutations move whole tokens, or most results would only ever test the JSON parser."""

_NASTY = [
    b"null", b"true", b"0", b"-1", b"1.5", b'""', b"{}", b"[]", b'"type"', b'"ping"', b'"\\ud800"', b'"\\u0074ype"',
    b"9223372036854775808", b"-9223372036854775809", b"18446744073709551616", b"1e400", b"NaN", b"[" * 70 + b"]" * 70,
    b'{"a":' * 60 + b"1" + b"}" * 60, b"\xff", b"\xed\xa0\x80", b"\x00", b'"' + b"x" * 200 + b'"', b"0" * 40, b"1" * 25,
]  # fmt: skip


def mutations(corpus: Sequence[bytes], seed: int) -> Iterator[bytes]:
    """Endless variations of the texts in `corpus`, the same ones for the same seed.

    Each has one to four mistakes. Most put a value where another one was, which leaves the text readable; the others
    drop, double or move a token, change a byte, or cut the end off.
    """
    # Not for secrets; a seed must give the same sequence everywhere.
    chance = random.Random(seed)
    texts = [[bytes(found[0]) for found in _TOKEN.finditer(text)] or [text] for text in corpus if text]
    values = [token for text in texts for token in text if token not in b"{}[],:"]
    pick, below = chance.choice, chance.random
    while True:
        work = list(pick(texts))
        for _ in range(1 + int(4 * below() ** 3)):
            at = int(len(work) * below())
            if below() < 0.7:
                # A value for a value; of the punctuation nothing is touched.
                if work[at] not in b"{}[],:":
                    work[at] = pick(values) if below() < 0.7 else pick(_NASTY)
                continue
            kind = int(4 * below())
            if kind == 0:
                del work[at]
                if not work:
                    break
            elif kind == 1:
                work.insert(at, work[at])
            elif kind == 2:
                other = int(len(work) * below())
                work[at], work[other] = work[other], work[at]
            else:
                changed = bytearray(work[at])
                changed[int(len(changed) * below())] = int(256 * below())
                work[at] = bytes(changed)
        text = b"".join(work)
        yield text[: int(len(text) * below())] if below() < 0.05 else text
