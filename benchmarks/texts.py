"""The text that is streamed. Every piece says whose it is and which, so whoever reads it can tell what is missing."""

from __future__ import annotations

LENGTH = 90
"""Characters, and bytes, in a piece."""

TAG = 9
"""Characters in a tag, which names one answer of a run."""

NUMBER = 6
"""Digits of a piece's number: a million of them in one answer."""

FILLER = "It was a bright cold day in April, and all the clocks were striking thirteen, thrice."[
    : LENGTH - TAG - NUMBER - 2
]


def tag(client: int, turn: int) -> str:
    """Name the answer to the `turn`-th question of a client."""
    return f"c{client % 10_000:04d}{turn % 10_000:04d}"


def piece(tag: str, number: int) -> str:
    """The text of the delta with this number, from 0."""
    return f"{tag} {number:06d} {FILLER}"


def pieces(tag: str, start: int, count: int) -> str:
    """`count` pieces in a row."""
    return "".join([f"{tag} {number:06d} {FILLER}" for number in range(start, start + count)])
